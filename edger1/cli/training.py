"""What the ways of training share at the command line: Ctrl-C, and a bar."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self


@contextmanager
def interrupts() -> Iterator[list[int]]:
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


class Show:
    """Shows a run of some steps on standard error: a bar on a terminal, otherwise a line now and then."""

    def __init__(self, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.console = Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, transient=True) if self.console.is_terminal else None
        self.steps = steps
        self._task: Any = None
        self._percent = -1

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def step(self, step: int, figures: str, *, measured: str = "") -> None:
        """Show a step that was done, and what was measured after it."""
        if measured:
            self.say(f"step {step} of {self.steps}: {' · '.join(part for part in (figures, measured) if part)}")
        if self.bar:
            if self._task is None:
                self._task = self.bar.add_task("", total=self.steps, figures="")
            self.bar.update(self._task, completed=step, figures=figures)
        elif not measured and (step == 1 or step * 100 // self.steps > self._percent):
            self.say(f"step {step} of {self.steps}: {figures}")
        self._percent = step * 100 // self.steps
