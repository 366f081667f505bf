"""A measurement for people: a table for the terminal, and a plot."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from edger1.errors import EdgeR1Error, UsageError
from edger1.quant.measure import Measurement, Side
from edger1.units import format_bytes

_LABEL, _COLUMN = 22, 14


def table(found: Measurement) -> Iterator[str]:
    """Yield the lines of a table: both models, the divergences, and each layer's errors."""
    yield (
        f"{found.model.name} against {found.source.name}: {found.tokens:,} tokens predicted, windows of {found.window}"
    )
    yield ""
    yield _row("", "source", "model")
    yield _row("perplexity", f"{found.source.perplexity:.4f}", f"{found.model.perplexity:.4f}", _change(found))
    if found.source.weight_bytes and found.model.weight_bytes:
        yield _row("weights", *(format_bytes(side.weight_bytes) for side in (found.source, found.model)))
    if found.source.bits_per_weight and found.model.bits_per_weight:
        yield _row("bits a weight", *(f"{side.bits_per_weight:.2f}" for side in (found.source, found.model)))
    yield ""
    yield _row("mean KL divergence", f"{found.mean_divergence:.5f}", "nats")
    yield _row("99th percentile", f"{found.divergence_99:.5f}", "nats")
    yield _row("top-1 agreement", f"{found.top1_agreement:.2%}")
    yield ""
    yield _row("relative error", "of its own", "accumulated")
    yield _row("embedding", _percent(found.embedding_error), _percent(found.embedding_error))
    for each in found.layers:
        yield _row(f"layer {each.layer}", _percent(each.own), _percent(each.accumulated))


def _row(label: str, *values: str) -> str:
    return f"  {label:<{_LABEL}}{''.join(f'{value:>{_COLUMN}}' for value in values)}".rstrip()


def _change(found: Measurement) -> str:
    share = found.model.perplexity / found.source.perplexity - 1 if found.source.perplexity else math.nan
    return f"{share:+.2%}"


def _percent(share: float) -> str:
    return f"{share:.3%}"


def draw(path: Path, found: Measurement) -> None:
    """Write a PNG of each layer's error, and of the divergence's percentiles.

    Raises UsageError where the file cannot be written or its name does not end in .png, EdgeR1Error where matplotlib
    is not installed.
    """
    check_plot(path)
    # Without pyplot, which would look for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    errors, divergences = figure.subplots(1, 2)
    numbers = [each.layer for each in found.layers]
    errors.bar(numbers, [100 * each.own for each in found.layers], label="of its own", color="#9cc3f0")
    errors.plot(
        [-1, *numbers],
        [100 * error for error in (found.embedding_error, *(each.accumulated for each in found.layers))],
        label="accumulated",
        color="#1f6feb",
        marker=".",
    )
    errors.set(
        title="Relative error of each layer's output", xlabel="layer (-1: embedding)", ylabel="%", ylim=(0, None)
    )
    errors.legend()
    # A logarithmic axis has no room for none at all.
    shares = {float(p): value for p, value in found.divergence_percentiles.items() if 0 < value < math.inf}
    divergences.plot([str(p).removesuffix(".0") for p in shares], list(shares.values()), marker=".", color="#1f6feb")
    if 0 < found.mean_divergence < math.inf:
        divergences.axhline(found.mean_divergence, color="#d1242f", linewidth=1, label="mean")
        divergences.legend()
        divergences.set_yscale("log")
    divergences.set(title="KL divergence from the source", xlabel="percentile of tokens", ylabel="nats")
    figure.suptitle(_title(found))
    aside = path.with_name(f".{path.name}.part")
    try:
        figure.savefig(aside, format="png", dpi=120)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise UsageError(f"{path} cannot be written: {(error.strerror or str(error)).lower()}.") from None


def check_plot(path: Path) -> None:
    """Raise as `draw` would before anything is measured."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"The plot is a PNG; give a name that ends in .png, not {path.name!r}.")
    if not path.parent.is_dir():
        raise UsageError(f"{path} cannot be written: there is no folder {path.parent}.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise EdgeR1Error(
            "Plots are drawn by matplotlib, which is not installed. Install it with: pip install 'edger1[plots]'"
        ) from None


def _title(found: Measurement) -> str:
    def said(side: Side) -> str:
        return f"{side.name} ({side.bits_per_weight:.2f} bits a weight)" if side.bits_per_weight else side.name

    return f"{said(found.model)} against {said(found.source)}"
