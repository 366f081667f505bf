"""`edger1 finetune`: train a model."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edger1.cli.pull import INTERRUPTED
from edger1.errors import UsageError

if TYPE_CHECKING:
    from edger1.train.pretrain.run import Event


def finetune_command(
    method: Annotated[str, typer.Option(metavar="pretrain", help="How to train.")] = "pretrain",
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TOML with [model] and [train]; docs/train.md lists the keys.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Documents (*.jsonl) and the tokenizer's files.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="The run: checkpoints, log, plots, model.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Steps of the whole schedule.")] = None,
    minutes: Annotated[float | None, typer.Option(metavar="M", help="Stop after so long, with a checkpoint.")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of the first weights and the data's order.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would be trained, and stop.")] = False,
) -> None:
    """Train a model.

    `pretrain` teaches a small model from nothing: all weights, on packed documents. The run's folder gets
    config.toml with every setting, log.jsonl, loss.svg, experts.svg, checkpoints and, at the end, model/, which
    `edger1 run` takes.
    Ctrl-C ends the step and saves. With --resume the run's own config.toml is taken unless another is given.

    Examples:

      edger1 finetune --method pretrain --config nano-moe.toml --data corpus --out runs/nano-moe

      edger1 finetune --method pretrain --data corpus --out runs/nano-moe --resume --minutes 90
    """
    if method != "pretrain":
        raise UsageError(f'--method is "{method}"; this version knows pretrain.')
    if out is None:
        raise UsageError("--out is missing; name a folder for the run.")
    if config is None and resume:
        config = out / "config.toml"
    if config is None or data is None:
        raise UsageError(f"{'--config' if config is None else '--data'} is missing; see edger1 finetune --help.")
    if minutes is not None and not minutes > 0:
        raise UsageError(f"--minutes is {minutes:g}; expected more than 0.")

    from dataclasses import replace

    from edger1.mlx_runtime import prepare
    from edger1.train.pretrain import settings

    table, chosen = settings.read(config)
    given: dict[str, Any] = {n: v for n, v in (("steps", steps), ("seed", seed)) if v is not None}
    chosen = replace(chosen, **given)
    prepare()
    from edger1.train.pretrain.model import check
    from edger1.train.pretrain.run import Pretraining

    if "vocab_size" in table:
        # Before the corpus is encoded, which may take a while.
        check(table)
    with _Show(chosen.steps) as show:
        run = Pretraining(show.open(data), table, chosen, out, resume=resume)
        show.say(run.describe())
        if plan:
            return
        with _interrupts() as asked:
            result = run.run(show.event, lambda: bool(asked), minutes)
    again = f"edger1 finetune --method pretrain --data {data} --out {out} --resume"
    if result.finished:
        held_out = "".join(f", held-out {name} {value:.4f}" for name, value in result.held_out.items() if value)
        typer.echo(f"Finished after {result.progress.tokens:,} tokens{held_out}.", err=True)
    else:
        typer.echo(f"Stopped after step {result.progress.step}; all is saved. Go on with: {again}", err=True)
        if asked:
            raise typer.Exit(INTERRUPTED)
    typer.echo(str(result.folder))


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collect the first Ctrl-C, or a polite request to end, in a list; a second one interrupts at once."""
    asked: list[int] = []

    def note(number: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Show:
    """Shows a run on standard error: a bar on a terminal, otherwise a line now and then."""

    def __init__(self, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, transient=True) if self.console.is_terminal else None
        self.steps = steps
        self.task: Any = None
        self.tenth = -1

    def __enter__(self) -> _Show:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def open(self, folder: Path) -> Any:
        """Open the corpus, showing how far its encoding is."""
        from edger1.train.pretrain.corpus import open_corpus

        tenth = -1

        def progress(done: int, whole: int) -> None:
            nonlocal tenth
            if done * 10 // max(1, whole) > tenth:
                tenth = done * 10 // max(1, whole)
                self.say(f"encoding documents {tenth * 10}%")

        return open_corpus(folder, progress)

    def event(self, event: Event) -> None:
        """Show a step."""
        step = event.progress.step
        figures = f"loss {event.loss:.3f}" + (f" · MTP {event.mtp_loss:.3f}" if event.mtp_loss else "")
        figures += f" · {event.tokens_per_s:,.0f} tokens/s"
        if event.held_out:
            self.say(f"step {step} of {self.steps}: {figures} · held-out loss {event.held_out['loss']:.4f}")
        if self.bar:
            if self.task is None:
                self.task = self.bar.add_task("", total=self.steps, figures="")
            self.bar.update(self.task, completed=step, figures=figures)
        elif not event.held_out and (step == 1 or step * 100 // self.steps > self.tenth):
            self.say(f"step {step} of {self.steps}: {figures}")
        self.tenth = step * 100 // self.steps
