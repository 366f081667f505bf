"""`edger1 eval --task`: models and adapters side by side on a task's questions."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from edger1.cli import INTERRUPTED
from edger1.cli.evaluate import write_output
from edger1.errors import UsageError

if TYPE_CHECKING:
    from edger1.model import Model
    from edger1.tasks.run import Variant

_SAMPLED_TEMPERATURE = 0.6
"""What DeepSeek-R1 is evaluated with (arXiv:2501.12948)."""


@dataclass(frozen=True)
class TaskOptions:
    """What the command line says."""

    models: list[str]
    task: str
    set: list[str]
    rewards: list[str]
    adapters: list[Path]
    size: int | None
    samples: int
    k: str | None
    temperature: float | None
    top_p: float
    max_tokens: int
    seed: int
    system: str | None
    think: str
    at_once: int
    keep: Path | None
    resume: bool
    on_reward_error: str
    memory: str | None
    context: int | None
    precision: str
    output: Path | None
    plot: Path | None
    json: bool
    offline: bool


def answer_task(given: TaskOptions) -> None:
    """Ask, score, and print. Raises UsageError for what is wrong with the options, before a model is loaded."""
    from edger1.quant.measure_report import check_plot
    from edger1.tasks.asking import Settings
    from edger1.tasks.report import draw, table
    from edger1.tasks.run import evaluate
    from edger1.tasks.task import open_task

    temperature = given.temperature
    if temperature is None:
        temperature = 0.0 if given.samples == 1 else _SAMPLED_TEMPERATURE
    settings = Settings(
        samples=given.samples,
        temperature=temperature,
        top_p=given.top_p,
        max_tokens=given.max_tokens,
        seed=given.seed,
        think=given.think,
        at_once=given.at_once,
    )
    settings.check()
    ks = _ks(given.k, given.samples)
    if given.precision not in ("fast", "exact"):
        raise UsageError(f'--precision is "{given.precision}"; expected fast or exact.')
    if given.plot is not None:
        check_plot(given.plot)
    task = open_task(
        given.task,
        size=given.size,
        seed=given.seed,
        options=_options(given.set),
        rewards=given.rewards,
        system=given.system,
        on_error=given.on_reward_error,
    )
    with task.reward:
        variants = _variants(given)
        print(task.describe(), file=sys.stderr)
        with _Progress(len(variants)) as show:
            try:
                found = evaluate(
                    task,
                    variants,
                    settings,
                    lambda variant: _opened(variant, given),
                    precision=given.precision,
                    ks=ks,
                    resume=given.resume,
                    keep=given.keep,
                    on_sample=show.sample,
                )
            except KeyboardInterrupt:
                show.stop()
                print(f"Stopped; every answer so far is kept. Go on with: {_again()}", file=sys.stderr)
                raise typer.Exit(INTERRUPTED) from None
    written = json.dumps(found.as_json(), indent=1)
    if given.output is not None:
        write_output(given.output, written)
    if given.plot is not None:
        draw(given.plot, found)
    for failure in found.failures[:5]:
        print(f"edger1: {failure}", file=sys.stderr)
    if task.reward.failed > 5:
        print(f"edger1: {task.reward.failed:,} scores in all failed and count as 0.", file=sys.stderr)
    if given.json:
        typer.echo(written)
    else:
        from rich.console import Console

        console = Console()
        console.print(table(found), soft_wrap=not console.is_terminal)


def _again() -> str:
    words = sys.argv[1:] if "--resume" in sys.argv else [*sys.argv[1:], "--resume"]
    return "edger1 " + shlex.join(words)


def _options(texts: list[str]) -> dict[str, Any]:
    from edger1.train.rewards.spec import parse_options

    options: dict[str, Any] = {}
    for text in texts:
        options |= parse_options(text, "--set")
    return options


def _ks(text: str | None, samples: int) -> tuple[int, ...]:
    if text is None:
        return ()
    try:
        ks = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UsageError(f'--k is "{text}"; expected whole numbers such as 1,4,16.') from None
    if not 1 <= ks[0] <= ks[-1] <= samples:
        raise UsageError(f'--k is "{text}"; expected numbers from 1 to the {samples} samples of --samples.')
    return tuple(ks)


def _variants(given: TaskOptions) -> list[Variant]:
    """Return every model as it is and with every adapter. Models that are missing are fetched."""
    from edger1.cli.loading import ensure_model
    from edger1.config import load_config
    from edger1.tasks.run import Variant

    offline = given.offline or load_config().offline
    for asked in given.adapters:
        if not asked.expanduser().is_dir():
            raise UsageError(f"--adapter {asked} is no folder; expected one with adapter_config.json.")
    found: dict[str, Variant] = {}
    for model in given.models:
        folder = ensure_model(model, offline)
        name = Path(model).name
        adapters: list[Path | None] = [None, *(path.expanduser().resolve() for path in given.adapters)]
        for adapter in adapters:
            label = name if adapter is None else f"{name} + {_adapter_name(adapter)}"
            if label in found:
                label = model if adapter is None else f"{model} + {adapter}"
            if label in found:
                raise UsageError(f"{label} is given twice.")
            found[label] = Variant(label, folder, adapter)
    return list(found.values())


def _adapter_name(path: Path) -> str:
    """Return a run's name for its folder "adapter", which says nothing, and else the folder's own."""
    return f"{path.parent.name}/{path.name}" if path.name in ("adapter", "adapters") else path.name


@contextmanager
def _opened(variant: Variant, given: TaskOptions) -> Iterator[Model]:
    """Load a variant, and close it after use."""
    from edger1.cli.loading import apply_threads, closing
    from edger1.config import load_config
    from edger1.model import load

    config = load_config()
    apply_threads(config.threads)
    model = load(
        variant.folder,
        memory=given.memory if given.memory is not None else config.memory_bytes,
        context=given.context if given.context is not None else config.context,
        precision=given.precision,
        **({} if variant.adapter is None else {"adapter": str(variant.adapter)}),
    )
    with closing(model):
        yield model


class _Progress:
    """Shows how far a variant is on standard error: a bar on a terminal, otherwise a line now and then."""

    def __init__(self, variants: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[right]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._tasks: dict[str, Any] = {}
        self._told: dict[str, int] = {}
        self._variants = variants

    def __enter__(self) -> _Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar:
            self._bar.stop()

    def sample(self, variant: Variant, done: int, total: int, right: float) -> None:
        """Show that a sample is complete."""
        if self._bar:
            if variant.name not in self._tasks:
                self._tasks[variant.name] = self._bar.add_task(variant.name, total=total, right="")
            self._bar.update(self._tasks[variant.name], completed=done, right=f"{right:.1%} right")
        elif done * 10 // total > self._told.get(variant.name, 0):
            self._told[variant.name] = done * 10 // total
            print(f"{variant.name}: {done:,} of {total:,} answers, {right:.1%} right", file=sys.stderr, flush=True)
