"""`edger1 eval`: what a model has lost against the one it was made from, and what it answers right."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from edger1.cli import options
from edger1.errors import UsageError

_LOSS = ("against", "text", "window", "tokens")
_TASK = (
    "set", "reward", "adapter", "size", "samples", "k", "temperature", "top_p", "max_tokens", "seed", "system", "think",
    "at_once", "keep", "resume", "on_reward_error", "memory", "context", "precision",
)  # fmt: skip
_ONE, _OTHER = "Loss against the source", "Questions answered"


def evaluate_command(
    context_: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="Alias, hub repository (owner/name), folder or .gguf file."),
    ],
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="SOURCE", help="What it was made from; likewise.", rich_help_panel=_ONE),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option("--text", metavar="FILE", help="The text to predict, UTF-8.", rich_help_panel=_ONE),
    ] = None,
    window: Annotated[
        int, typer.Option(metavar="TOKENS", help="Tokens of a window of the text.", rich_help_panel=_ONE)
    ] = 512,
    tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Measure on the first N tokens of the text. Default: all.", rich_help_panel=_ONE
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            metavar="gym:NAME|FILE",
            help="Questions: a task of reasoning-gym, or rows with question and answer.",
            rich_help_panel=_OTHER,
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="An option of the generator, or a file's columns: question=, answer=; repeatable.",
            rich_help_panel=_OTHER,
        ),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE.py:FUNCTION",
            help="What scores answers, instead of the task's own; repeatable, the first one judges.",
            rich_help_panel=_OTHER,
        ),
    ] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FOLDER", help="Every model with this adapter as well; repeatable.", rich_help_panel=_OTHER
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(metavar="N", help="Questions. Default: all of a file, 100 generated.", rich_help_panel=_OTHER),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", "-n", metavar="N", help="Answers a question.", rich_help_panel=_OTHER)
    ] = 1,
    k: Annotated[
        str | None,
        typer.Option(
            "--k", metavar="K,K", help="For pass@k and maj@k. Default: 2, 4, 8 ... N.", rich_help_panel=_OTHER
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            metavar="T", help="0 is greedy. Default: 0 with one answer, 0.6 with more.", rich_help_panel=_OTHER
        ),
    ] = None,
    top_p: Annotated[
        float,
        typer.Option("--top-p", metavar="P", help="Keep the likeliest tokens up to this mass.", rich_help_panel=_OTHER),
    ] = 1.0,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", help="Longest answer in tokens.", rich_help_panel=_OTHER)
    ] = 1024,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Of generated questions and of the sampling.", rich_help_panel=_OTHER)
    ] = 0,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System prompt of every question.", rich_help_panel=_OTHER)
    ] = None,
    think: Annotated[
        str,
        typer.Option(
            metavar="auto|on|off", help="Reasoning, where the template can switch it.", rich_help_panel=_OTHER
        ),
    ] = "auto",
    at_once: Annotated[
        int, typer.Option("--at-once", metavar="N", help="Answers under way together.", rich_help_panel=_OTHER)
    ] = 16,
    keep: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="Write every answer with its rewards there.", rich_help_panel=_OTHER),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where the same command was stopped.", rich_help_panel=_OTHER)
    ] = False,
    on_reward_error: Annotated[
        str,
        typer.Option(
            "--on-reward-error", metavar="stop|zero", help="Where a reward of yours fails.", rich_help_panel=_OTHER
        ),
    ] = "stop",
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help='Memory ceiling, such as "6GB" or "50%".', rich_help_panel=_OTHER),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(metavar="TOKENS", help="Context: question and answer together.", rich_help_panel=_OTHER),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(metavar="fast|exact", help="int8 activations on CPUs, or f32.", rich_help_panel=_OTHER),
    ] = "fast",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.json", help="Write the figures there, as JSON.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the figures.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
    offline: options.Offline = False,
) -> None:
    """Measure what a model has lost against the one it was made from, or how many questions it answers right.

    With --against and --text: perplexity of both on a text, the Kullback-Leibler divergence of the
    model's predictions from the source's (mean and 99th percentile), how often both think the same
    token likeliest, and each layer's relative error. One layer of each is in memory at a time, so
    neither model need fit.

    With --task: accuracy, pass@k and maj@k with 95% intervals, of several models and adapters side by
    side, each compared with the first on the same questions.

    [bold]Examples[/bold]

      edger1 eval qwen3-30b-a3b --against Qwen/Qwen3-30B-A3B --text book.txt --tokens 8000

      edger1 eval ./my-4bit --against ./my-model --text book.txt --plot loss.png -o loss.json

      edger1 eval smollm2-135m --task gym:chain_sum --size 200 --set min_terms=2 --set max_terms=3

      edger1 eval ./my-model ./my-4bit --adapter runs/sums/adapter --task questions.jsonl -n 8 --plot tasks.png
    """
    _check_mode(context_, task, against, text, models)
    if task is None:
        assert against is not None
        assert text is not None
        _lost(models[0], against, text, window, tokens, output, plot, json_, offline)
        return
    from edger1.cli.evaluate_task import TaskOptions, answer_task

    answer_task(
        TaskOptions(
            models=models,
            task=task,
            set=set_ or [],
            rewards=reward or [],
            adapters=adapter or [],
            size=size,
            samples=samples,
            k=k,
            temperature=temperature,
            top_p=top_p,
            max_tokens=max_tokens,
            seed=seed,
            system=system,
            think=think,
            at_once=at_once,
            keep=keep,
            resume=resume,
            on_reward_error=on_reward_error,
            memory=memory,
            context=context,
            precision=precision,
            output=output,
            plot=plot,
            json=json_,
            offline=offline,
        )
    )


def _check_mode(
    given: typer.Context, task: str | None, against: str | None, text: Path | None, models: list[str]
) -> None:
    """Raise UsageError where the options of both ways to measure are mixed, or neither is whole."""

    def said(names: tuple[str, ...]) -> list[str]:
        asked = [name for name in names if _typed(given, name)]
        return [f"--{name.replace('_', '-')}" for name in asked]

    if task is not None:
        if mixed := said(_LOSS):
            raise UsageError(
                f"{' and '.join(mixed)} is for measuring what a model has lost, and --task asks questions; give one of "
                "the two."
            )
        return
    if against is None and text is None:
        raise UsageError(
            "There is nothing to measure: give --task gym:NAME or FILE to ask questions, or --against SOURCE and "
            "--text FILE for what the model has lost."
        )
    if mixed := said(_TASK):
        raise UsageError(f"{' and '.join(mixed)} goes with --task, which is missing.")
    if against is None or text is None:
        raise UsageError(f"{'--text FILE' if text is None else '--against SOURCE'} is missing; both are needed.")
    if len(models) > 1:
        raise UsageError(f"--against measures one model; there are {len(models)}: {', '.join(models)}.")


def _typed(given: typer.Context, name: str) -> bool:
    """Whether an option is on the command line, rather than its default."""
    source = given.get_parameter_source("set_" if name == "set" else name)
    return source is not None and source.name == "COMMANDLINE"


def _lost(
    model: str,
    against: str,
    text: Path,
    window: int,
    tokens: int | None,
    output: Path | None,
    plot: Path | None,
    json_: bool,
    offline: bool,
) -> None:
    from edger1 import worker
    from edger1.cli.loading import apply_threads
    from edger1.config import load_config
    from edger1.measuring import evaluate, read_text
    from edger1.quant.measure_report import check_plot, draw, table
    from edger1.sampling import check_count

    check_count("tokens", tokens)
    words = read_text(text)
    if plot is not None:
        check_plot(plot)
    config = load_config()
    apply_threads(config.threads)
    folder, source = (_find(name, offline or config.offline) for name in (model, against))
    found = worker.call(lambda: evaluate(folder, source, words, window=window, most_tokens=tokens, on_step=_show))
    written = json.dumps(found.as_json(), indent=1)
    if output is not None:
        write_output(output, written)
    if plot is not None:
        draw(plot, found)
    if json_:
        typer.echo(written)
    else:
        for line in table(found):
            typer.echo(line)


def write_output(output: Path, written: str) -> None:
    """Write figures to a file. Raises UsageError where it cannot be written."""
    from edger1.fetch.place import write_atomically

    try:
        write_atomically(output, written + "\n")
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {(error.strerror or str(error)).lower()}.") from None


def _find(name: str, offline: bool) -> Path:
    """Return where a model is, fetching it where it is not on this machine. Files need not be converted."""
    from edger1.cli.loading import ensure_model

    path = Path(name).expanduser()
    if path.is_file() or any(path.glob("*.gguf")):
        return path
    return ensure_model(name, offline)


def _show(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        said = f"Layer {done} of {total}" if what == "layer" else f"Tokens compared: {done:,} of {total:,}"
        end = "\r\x1b[K" if what == "tokens" and done == total else ""
        print(f"\r\x1b[K{said}{end}", end="", file=sys.stderr, flush=True)
