"""`edger1 pull`: fetch a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from edger1.cli import INTERRUPTED

if TYPE_CHECKING:
    from rich.progress import TaskID

    from edger1.fetch import Step, Watch


def pull_command(
    target: Annotated[
        str, typer.Argument(metavar="ALIAS|REPO|PATH", help="A name of the registry, OWNER/NAME, or a path.")
    ],
    offline: Annotated[bool, typer.Option("--offline", help="Ask no source for anything.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Fetch it again even if it is here.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print the folder and nothing else.")] = False,
) -> None:
    """Fetch a model, or go on with a pull that was interrupted.

    A hub repository may carry a revision and, where it holds several GGUF files, the one to take. A GGUF file is
    converted into the models folder; a model folder stays where it is and is recorded. The folder's path goes to
    standard output.

    Examples:

      edger1 pull smollm2-135m

      edger1 pull mlx-community/Qwen3-8B-4bit

      edger1 pull bartowski/Qwen_Qwen3-8B-GGUF:Qwen_Qwen3-8B-Q8_0.gguf

      edger1 pull ./my-model.gguf
    """
    from edger1.config import load_config
    from edger1.fetch import pull

    offline = offline or load_config().offline
    try:
        with reporting(quiet) as watch:
            folder = pull(target, offline=offline, force=force, on_progress=watch.progress, on_note=watch.note)
    except KeyboardInterrupt:
        typer.echo(f"Stopped. What was fetched is kept; go on with `edger1 pull {target}`.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    typer.echo(str(folder))


class reporting:  # noqa: N801 - used as `with reporting(...)`
    """Shows a pull on standard error: a bar on a terminal, otherwise a line for each tenth of a stage."""

    def __init__(self, quiet: bool = False) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self.quiet = quiet
        self.console = Console(stderr=True)
        self.bar: Progress | None = None
        if self.console.is_terminal and not quiet:
            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self.bar = Progress(TextColumn("{task.description}"), *columns, console=self.console, transient=True)
        self.stage = ""
        self.tenth = -1
        self.task: TaskID | None = None

    def __enter__(self) -> Watch:
        """Start the bar and return the callbacks for a pull."""
        from edger1.fetch import Watch

        if self.bar:
            self.bar.start()
        return Watch(self._progress, self._note)

    def __exit__(self, *_: object) -> None:
        """Take the bar away, also when the pull failed."""
        if self.bar:
            self.bar.stop()

    def _note(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _progress(self, step: Step) -> None:
        if self.quiet:
            return
        started = step.stage != self.stage
        if started:
            self.stage, self.tenth = step.stage, -1
        if self.bar:
            if started or self.task is None:
                if self.task is not None:
                    self.bar.remove_task(self.task)
                self.task = self.bar.add_task(step.stage, total=step.total or None)
            self.bar.update(self.task, completed=step.done, total=step.total or None)
        elif step.total and (tenth := step.done * 10 // step.total) > self.tenth:
            from edger1.units import format_bytes

            self.tenth = tenth
            whole = format_bytes(step.total) if step.unit == "bytes" else f"{step.total} {step.unit}"
            self._note(f"{step.stage} {tenth * 10}% of {whole}")
