"""`edger1 chat`: the terminal chat, or one sample answer where there is no terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from edger1.cli import options

SAMPLE_QUESTION = "What is the capital of France, and what is it famous for?"
SAMPLE_TOKENS = 256


def chat_command(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Alias, hub repository or folder. Default: smollm2-135m.")
    ] = None,
    system: options.System = None,
    memory: options.Memory = None,
    context: options.Context = None,
    precision: options.Precision = "fast",
    expert_slots: options.ExpertSlots = None,
    adapter: options.Adapter = None,
    offline: options.Offline = False,
) -> None:
    """Talk to a model in the terminal.

    Without a terminal it answers what is piped in, or else one sample question, and exits.

    [bold]Examples[/bold]

      edger1 chat

      edger1 chat deepseek-r1-distill-qwen-1.5b --memory 4GB

      edger1 chat smollm2-135m --adapter runs/mine/adapter

      echo "Why is the sky blue?" | edger1 chat smollm2-135m
    """
    from edger1.config import load_config

    config = load_config()
    name = model or config.model
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        _answer_once(name, system, memory, context, precision, expert_slots, adapter, offline)
        return

    from edger1.cli.backend import ChildBackend
    from edger1.cli.loading import apply_threads, ensure_model, note_beyond_training
    from edger1.model import adapter_folder, memory_bytes
    from edger1.tui import run_chat

    apply_threads(config.threads)
    folder = ensure_model(name, offline or config.offline)
    context = context if context is not None else config.context
    note_beyond_training(folder, context)
    backend = ChildBackend(
        folder,
        memory=memory_bytes(memory) if memory is not None else config.memory_bytes,
        context=context,
        precision=precision,
        expert_slots=expert_slots,
        adapter=adapter_folder(adapter),
    )
    run_chat(backend, name, system=system, theme=config.theme)


def _answer_once(
    name: str,
    system: str | None,
    memory: str | None,
    context: int | None,
    precision: str,
    expert_slots: str | None,
    adapter: str | None,
    offline: bool,
) -> None:
    from edger1.cli.loading import open_model
    from edger1.cli.run import read_stdin
    from edger1.messages import Done, Text

    piped = read_stdin().strip()
    question = piped or SAMPLE_QUESTION
    terminal = sys.stdout.isatty()
    with open_model(
        name,
        memory=memory,
        context=context,
        precision=precision,
        expert_slots=expert_slots,
        adapter=adapter,
        offline=offline,
    ) as loaded:
        typer.echo(f"> {question}\n")
        done = None
        for event in loaded.chat(system).stream(
            question, max_tokens=None if piped else SAMPLE_TOKENS, temperature=None if piped else 0.0
        ):
            if isinstance(event, Text):
                typer.echo(options.printable(event.text) if terminal else event.text, nl=False)
                sys.stdout.flush()
            elif isinstance(event, Done):
                done = event
        assert done is not None
        typer.echo(f"\n\n{options.figures_line(done.usage, done.figures)}")
