"""An evaluation for people: a table for the terminal, and a plot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edger1.tasks.estimates import Estimate
from edger1.tasks.results import Evaluation

if TYPE_CHECKING:
    from rich.table import Table


def table(found: Evaluation) -> Table:
    """Return a table with a column a model: figures, and what each differs by from the first."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    settings = found.settings
    sampled = "greedy" if settings.temperature == 0 else f"temperature {settings.temperature:g}"
    title = (
        f"{found.task}: {found.questions:,} questions, {settings.samples} "
        f"{'answer' if settings.samples == 1 else 'answers'} each, {sampled}, up to {settings.max_tokens:,} tokens"
    )
    made = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD)
    made.add_column("")
    for result in found.results:
        made.add_column(Text(result.name), justify="right", overflow="fold")

    def row(label: str, values: list[str]) -> None:
        made.add_row(Text(label), *map(Text, values))

    row("accuracy", [_interval(result.accuracy) for result in found.results])
    for k in found.results[0].pass_at:
        row(f"pass@{k}", [_interval(result.pass_at[k]) for result in found.results])
    for k in found.results[0].maj_at:
        row(f"maj@{k}", [_interval(result.maj_at[k]) for result in found.results])
    if len(found.results) > 1:
        differences = list(found.differences().values())
        row(
            "against the first",
            ["", *(f"{100 * d.value:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]" for d in differences)],
        )
        row("questions better, worse", ["", *(f"{d.better}, {d.worse}" for d in differences)])
        row("p (McNemar)", ["", *(f"{d.p:.2g}" for d in differences)])
    for name in found.results[0].rewards():
        row(f"mean {name}", [f"{result.rewards()[name]:.3f}" for result in found.results])
    row("tokens an answer", [f"{result.mean_tokens:,.0f}" for result in found.results])
    row("ended by themselves", [f"{result.finished:.1%}" for result in found.results])
    if any(result.seconds for result in found.results):
        rates = [result.tokens_sampled / result.seconds if result.seconds else 0.0 for result in found.results]
        row("tokens a second", [f"{rate:,.0f}" if rate else "" for rate in rates])
    return made


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.1%} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]"


def draw(path: Path, found: Evaluation) -> None:
    """Write a PNG of every model's accuracy and, with several samples, pass@k and maj@k, with their intervals.

    Raises UsageError where the file cannot be written or its name does not end in .png, EdgeR1Error where matplotlib
    is not installed.
    """
    from edger1.errors import UsageError
    from edger1.quant.measure_report import check_plot

    check_plot(path)
    # Without pyplot, which would look for a display.
    from matplotlib.figure import Figure

    several = bool(found.results[0].pass_at)
    figure = Figure(figsize=(11 if several else 6, 4.5), layout="constrained")
    left, *right = figure.subplots(1, 2 if several else 1, squeeze=False)[0]
    for place, result in enumerate(found.results):
        _bar(left, place, result.accuracy)
    left.set_xticks(range(len(found.results)), [result.name for result in found.results], rotation=20, ha="right")
    left.set(title=f"Accuracy on {found.task}", ylabel="% of questions, 95% interval", ylim=(0, 100))
    for axes in right:
        for place, result in enumerate(found.results):
            color = f"C{place}"
            for at, style, name in ((result.pass_at, "-", "pass@k"), (result.maj_at, "--", "maj@k")):
                points = {1: result.accuracy} | at
                ks = list(points)
                axes.plot(
                    ks,
                    [100 * p.value for p in points.values()],
                    style,
                    color=color,
                    marker=".",
                    label=f"{result.name}, {name}",
                )
                axes.fill_between(
                    ks,
                    [100 * p.low for p in points.values()],
                    [100 * p.high for p in points.values()],
                    color=color,
                    alpha=0.12,
                )
        axes.set_xscale("log", base=2)
        axes.set(title="With more samples", xlabel="k", ylim=(0, 100))
        axes.legend(fontsize="small")
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {(error.strerror or str(error)).lower()}.") from None


def _bar(axes, place: int, estimate: Estimate) -> None:  # type: ignore[no-untyped-def]
    below, above = 100 * (estimate.value - estimate.low), 100 * (estimate.high - estimate.value)
    axes.bar(place, 100 * estimate.value, yerr=[[max(0.0, below)], [max(0.0, above)]], capsize=4, color=f"C{place}")
