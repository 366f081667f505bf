"""`edger1 run`: one prompt, one answer."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edger1.cli import options
from edger1.errors import UsageError

if TYPE_CHECKING:
    from edger1.messages import Done
    from edger1.model import Model, Prompt


def read_stdin() -> str:
    """Return what is piped or redirected into standard input, or "" where nothing is.

    Raises UsageError where it is not text.
    """
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return ""
    if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)):
        return ""
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"Standard input is not UTF-8 text ({error.reason} at byte {error.start}).") from None


def _restore_or_save(model: Model, path: Path, prompt: Prompt, *, raw: bool, think: str) -> dict[str, Any]:
    """Restore the prompt cache in `path`, or read the prompt and save its cache there where that is no file yet.

    Returns what the JSON says of it.
    """
    restored = path.exists()
    done = model.load_prompt_cache(path) if restored else model.save_prompt_cache(path, prompt, raw=raw, think=think)
    return {"file": str(path), "restored": restored, "tokens": done.tokens}


def _notes(done: Done, cache: dict[str, Any] | None) -> list[str]:
    """Return what an answer has to note, and whether a restored cache was of no use."""
    if cache is None or not cache["restored"] or done.usage.cached_tokens >= cache["tokens"] // 2:
        return done.notes
    return [
        *done.notes,
        f"The prompt shares {done.usage.cached_tokens} of the {cache['tokens']} tokens in {cache['file']}. Name "
        f"another file to save this one, and put what stays the same at its beginning (--system).",
    ]


def run_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Alias, hub repository (owner/name) or folder.")],
    prompt: Annotated[str | None, typer.Argument(help="The question. Standard input is added, or stands in.")] = None,
    system: options.System = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it stands, without a chat template.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object with text, counts and figures.")] = False,
    figures: Annotated[bool, typer.Option("--figures", help="Print a line of figures to standard error.")] = False,
    show_thinking: Annotated[
        bool, typer.Option("--show-thinking", help="Print the reasoning even where the output is not a terminal.")
    ] = False,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    think: options.Think = "auto",
    think_budget: options.ThinkBudget = None,
    think_at_least: options.ThinkAtLeast = None,
    samples: options.Samples = None,
    memory: options.Memory = None,
    context: options.Context = None,
    precision: options.Precision = "fast",
    expert_slots: options.ExpertSlots = None,
    adapter: options.Adapter = None,
    draft: options.Draft = None,
    kv_bits: options.KvBits = None,
    speculate: options.Speculate = None,
    prompt_cache: options.PromptCache = None,
    context_shift: options.ContextShift = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.svg", help="Draw what streaming the experts took, by layer.")
    ] = None,
    offline: options.Offline = False,
) -> None:
    """Answer one prompt.

    [bold]Examples[/bold]

      edger1 run smollm2-135m "What is the capital of France?"

      git diff | edger1 run smollm2-135m "Write a commit message for this diff."

      edger1 run smollm2-135m --raw "Once upon a time" --max-tokens 50 --temperature 0.8 --seed 1

      edger1 run smollm2-135m "Name three rivers." --json

      edger1 run qwen3-0.6b "What is 17 * 23?" --think-budget 500 --samples 8
    """
    from edger1.cli.loading import open_model
    from edger1.messages import Done, Text, Thought, ToolCall
    from edger1.thinking_control import wanted

    piped = read_stdin()
    asked = "\n\n".join(part for part in (prompt, piped.strip("\n") if not raw else piped) if part)
    if not asked:
        raise UsageError('There is no prompt. Give one: edger1 run MODEL "...", or pipe it into standard input.')
    if plot is not None and plot.suffix != ".svg":
        raise UsageError(f"--plot {plot} draws an SVG; give a name that ends in .svg.")
    if raw and system is not None:
        raise UsageError("--system needs the chat template that --raw leaves out. Give one of the two.")

    messages = [{"role": "user", "content": asked}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    terminal = sys.stdout.isatty()
    text: list[str] = []
    thinking: list[str] = []
    calls: list[ToolCall] = []
    with open_model(
        model,
        memory=memory,
        context=context,
        precision=precision,
        expert_slots=expert_slots,
        adapter=adapter,
        draft=draft,
        kv_bits=kv_bits,
        offline=offline,
    ) as loaded:
        # A model without a chat template continues a plain prompt.
        plain = raw or (system is None and not loaded.info["has_chat_template"])
        cache = None
        if prompt_cache is not None:
            told = wanted(think, think_budget, think_at_least)
            cache = _restore_or_save(loaded, prompt_cache, asked if plain else messages, raw=plain, think=told)
        for event in loaded.stream(
            asked if plain else messages,
            raw=plain,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            think=think,
            think_budget=think_budget,
            think_at_least=think_at_least,
            samples=1 if samples is None else samples,
            speculate=speculate or ("auto" if draft is not None else "off"),
            context_shift=context_shift,
        ):
            if isinstance(event, Thought):
                thinking.append(event.text)
                if not json_ and (terminal or show_thinking):
                    shown = options.printable(event.text) if terminal else event.text
                    typer.echo(typer.style(shown, dim=True), nl=False)
            elif isinstance(event, Text):
                if thinking and not text and not json_ and (terminal or show_thinking):
                    typer.echo("\n")
                text.append(event.text)
                if not json_:
                    typer.echo(options.printable(event.text) if terminal else event.text, nl=False)
                    sys.stdout.flush()
            elif isinstance(event, ToolCall):
                calls.append(event)
            elif isinstance(event, Done):
                done = event
    if plot is not None:
        from edger1.experts.chart import draw

        draw(plot, loaded.name, done.figures.experts)
    if json_:
        usage, cost = done.usage, done.figures
        answer = {
            "model": loaded.name,
            "text": "".join(text),
            "thinking": "".join(thinking),
            "tool_calls": [{"id": c.call_id, "name": c.name, "arguments": c.arguments} for c in calls],
            "finish_reason": done.finish_reason,
            "notes": _notes(done, cache),
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "prefilled_tokens": usage.prefilled_tokens,
            "completion_tokens": usage.completion_tokens,
            "thought_tokens": usage.thought_tokens,
            "votes": done.votes,
            "samples": done.samples,
            "prefill_tokens_per_s": cost.prefill_tokens_per_s,
            "decode_tokens_per_s": cost.decode_tokens_per_s,
            "time_to_first_token_s": cost.time_to_first_token_s,
            "peak_memory_bytes": cost.peak_memory_bytes,
            "accounted_memory_bytes": cost.accounted_memory_bytes,
            "precision": loaded.info["precision"],
            "kernels": loaded.info["kernels"],
            "kv_bits": loaded.info["kv_bits"],
            "kv_cache": loaded.info["kv_cache"],
            "adapter": loaded.info["adapter"],
            "experts": cost.experts,
            "drafts": cost.drafts,
            "prompt_cache": cache,
        }
        typer.echo(json.dumps(answer, ensure_ascii=False))
        return
    typer.echo()
    if len(done.samples) > 1:
        typer.echo(options.votes_line(done.votes, len(done.samples)), err=True)
    for note in _notes(done, cache):
        typer.echo(f"edger1: {note}", err=True)
    if figures:
        line = options.figures_line(done.usage, done.figures)
        quantized = loaded.info["kv_bits"]
        typer.echo(line if quantized is None else f"{line} · KV cache at {quantized} bits", err=True)
