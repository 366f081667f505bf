"""`edger1 plan`: what a model would take of memory, what of it is streamed, and how fast it may be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from edger1.cli import options

if TYPE_CHECKING:
    from edger1.experts.budget import StreamPlan
    from edger1.memory import Plan


def plan_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="An installed model: its name or folder.")],
    memory: options.Memory = None,
    context: options.Context = None,
    expert_slots: options.ExpertSlots = None,
    kv_bits: options.KvBits = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object, sizes in bytes.")] = False,
) -> None:
    """Tell what a model would take of memory, without loading it.

    Of a mixture of experts it shows how many experts of each layer have a slot in memory, and how
    often a token is expected to find its experts there. The speed is what reading the weights allows,
    at rates of disk and kernels that are measured for the first plan of a day, in a second or two.

    A model that does not fit is an error (exit code 1), after the plan.

    [bold]Examples[/bold]

      edger1 plan qwen3-30b-a3b --memory 6GB

      edger1 plan qwen3-30b-a3b --expert-slots 25% --context 4096

      edger1 plan qwen3-8b --context 32768 --kv-bits 8

      edger1 plan smollm2-135m --json
    """
    from edger1.cli.loading import apply_threads, note_beyond_training
    from edger1.config import load_config
    from edger1.experts.budget import plan_json
    from edger1.installed import name_of, resolve
    from edger1.model import plan

    config = load_config()
    quantized = options.kv_bits(kv_bits, config.kv_bits)
    apply_threads(config.threads)
    folder = resolve(model)
    name = name_of(folder)
    context = context if context is not None else config.context
    note_beyond_training(folder, context)
    found = plan(folder, memory if memory is not None else config.memory_bytes, context, expert_slots, quantized)
    if json_:
        typer.echo(json.dumps({"model": name} | plan_json(found), indent=2))
    else:
        for line in lines(name, found):
            typer.echo(line)
    found.check(name)


def lines(name: str, plan: Plan) -> Iterator[str]:
    """Yield what to print of a plan."""
    from edger1.units import format_bytes

    stream = plan.stream
    yield f"{name}, a context of {plan.context} tokens, under a ceiling of {format_bytes(plan.ceiling_bytes)}"
    rows = [("weights" if stream is None else "resident weights", format_bytes(plan.resident_bytes))]
    if stream is not None:
        rows.append(("expert banks", f"{format_bytes(stream.bank_bytes)}, {_slots(stream)}"))
        rows.append(("reading, prefill", format_bytes(stream.staging_bytes)))
    rows += [
        ("KV cache", format_bytes(plan.kv_bytes) + (f", {plan.kv_note}" if plan.kv_note else "")),
        ("activations", format_bytes(plan.activation_bytes)),
        ("process", format_bytes(plan.process_bytes)),
        ("in all", format_bytes(plan.total_bytes)),
    ]
    if stream is not None:
        rows.append(("expected hits", _hits(stream)))
    if plan.prediction is not None:
        rates = [f"weights at {format_bytes(round(plan.prediction.weight_bytes_per_s))}/s"]
        if plan.prediction.disk_bytes_per_s is not None:
            rates.append(f"the disk at {format_bytes(round(plan.prediction.disk_bytes_per_s))}/s")
        rows.append(("predicted", f"up to {_speed(plan.prediction.tokens_per_s)} ({', '.join(rates)})"))
    least = format_bytes(plan.smallest_ceiling_bytes, up=True)
    streamed = plan.streamed_least_bytes is not None and plan.streamed_least_bytes == plan.smallest_ceiling_bytes
    rows.append(("smallest ceiling", f"{least}, experts streamed" if streamed else least))
    for what, value in rows:
        yield f"  {what:<18}{value}"


def _slots(stream: StreamPlan) -> str:
    layers = len(stream.slots)
    of = _span(stream.experts)
    return (
        f"{_span(stream.slots)} of {of} experts in {'each of ' if layers > 1 else ''}{layers} layer{'s'[: layers > 1]}"
    )


def _hits(stream: StreamPlan) -> str:
    least, most = min(stream.hit_rates), max(stream.hit_rates)
    spread = f" ({least:.0%} to {most:.0%} a layer)" if f"{least:.0%}" != f"{most:.0%}" else ""
    known = "from saved popularity" if stream.known else "as if all experts were used alike; none was counted yet"
    return f"{stream.hit_rate:.0%}{spread}, {known}"


def _speed(tokens_per_s: float) -> str:
    digits = 0 if tokens_per_s >= 99.5 else 1 if tokens_per_s >= 9.95 else 2
    return f"{tokens_per_s:,.{digits}f} tokens/s"


def _span(numbers: tuple[int, ...]) -> str:
    return str(numbers[0]) if len(set(numbers)) == 1 else f"{min(numbers)} to {max(numbers)}"
