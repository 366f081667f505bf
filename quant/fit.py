"""Which tensor gets how many bits, so that a model of a given size loses the least: `--fit`.

Three steps, of which only the first runs the model:

1. `sensitivities`: one pass of a little text, layer by layer. At each linear a branch begins, in which that linear
   alone is rounded to few bits; branches go on through the other layers beside the original. What a branch's
   predictions have lost against the original's (KL) is what that error in that place costs.
2. `options`: for each number of bits and group size, what a linear's products would lose once fitted
   (`fitting_codes.fit` on some of its rows), against what they lost in the branch. KL grows with the square of a small
   error, so that the branch's cost times the ratio predicts the loss.
3. `choose`: the options with the least predicted loss within the bytes there are. Losses are taken to add up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edger1.errors import UsageError
from edger1.quant.calibrate import Statistics
from edger1.quant.fitting_codes import Curvature, Grid, cost, fit
from edger1.quant.layers import Change, LayerSource, Pass
from edger1.units import format_bytes

PROBE = Grid(3, 64, "F32")
"""What a branch rounds its linear to: enough to be seen above rounding of f32, little enough to be a small error."""
SAMPLED_ROWS = 96
SAMPLED_EXPERTS = 4
BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Option:
    """A way to quantize a linear: what it takes, and by how much the model's predictions would differ (KL, nats)."""

    bits: int
    group_size: int
    nbytes: int
    loss: float


@dataclass(frozen=True)
class Mix:
    """What was chosen: `options` by module path, their bytes and predicted loss together."""

    options: dict[str, Option]

    @property
    def nbytes(self) -> int:
        """Bytes of all linears together."""
        return sum(option.nbytes for option in self.options.values())

    @property
    def loss(self) -> float:
        """The predicted loss."""
        return sum(option.loss for option in self.options.values())

    def recipe(self, name: str) -> dict[str, Any]:
        """Return it as a recipe's JSON: one rule a module."""
        rules = [
            {"patterns": [path], "bits": option.bits, "group_size": option.group_size, "mode": "affine"}
            for path, option in self.options.items()
        ]
        return {"name": name, "purpose": "bits by measured sensitivity", "rules": rules}


def sensitivities(
    source: LayerSource, tokens: np.ndarray, paths: Sequence[str], on_progress: Progress = lambda *_: None
) -> dict[str, float]:
    """Return for each linear what the model's predictions lose when it alone is rounded as `PROBE` says, KL in nats.

    `tokens` are int [windows, length]; hidden states of all of them are kept for each linear. One pass through the
    model.
    """
    wanted = set(paths)
    original = source.begin(tokens)
    branches: dict[str, Pass] = {}
    for path in source.linears(None):
        if path in wanted:
            # An embedding changes what the layers are given; an output head what they end in, see below.
            branches[path] = source.begin(tokens, _probing(path))
    for layer in range(source.layers):
        before = original.hidden
        source.advance(layer, [original, *branches.values()])
        for path in source.linears(layer):
            if path in wanted:
                branches[path] = Pass(original.tokens, before.copy(), original.own)
                source.advance(layer, [branches[path]], change=_probing(path))
        on_progress(layer + 1, source.layers)
    expected = _log_probabilities(source.logits(original))
    found = {}
    for path in list(branches):
        given = _log_probabilities(source.logits(branches.pop(path), change=_probing(path)))
        found[path] = max(0.0, float((np.exp(expected) * (expected - given)).sum(-1).mean()))
    return found


def _probing(path: str) -> Change:
    def change(at: str, expert: int | None, start: int, rows: np.ndarray) -> np.ndarray | None:
        return rounded(rows, _probe_of(rows.shape[1])) if at == path else None

    return change


def rounded(rows: np.ndarray, grid: Grid) -> np.ndarray:
    """Round f32 rows [n, k] plainly: scale and bias from each group's least and largest weight."""
    groups = rows.reshape(len(rows), -1, grid.size)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    scale = np.maximum((high - low) / grid.top, np.float32(1e-20))
    values: np.ndarray = np.rint((groups - low) / scale) * scale + low
    return values.reshape(rows.shape)


def _log_probabilities(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    found: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found


def options(
    source: LayerSource,
    path: str,
    shape: Sequence[int],
    sensitivity: float,
    statistics: Statistics | None,
    *,
    dtype: str = "BF16",
    bits: Sequence[int] = BITS,
    groups: Sequence[int] = GROUPS,
) -> list[Option]:
    """Return the ways to quantize one linear, from few bytes to many; none where no group divides its columns.

    `shape` is [rows, columns], of a stack [experts, rows, columns]; `sensitivity` is what `sensitivities` found of it.
    """
    columns = shape[-1]
    sizes = [size for size in groups if columns % size == 0]
    moments = None if statistics is None else statistics.moments(path)
    experts = _spread(shape[0], SAMPLED_EXPERTS) if len(shape) == 3 else [None]
    samples = []
    for expert in experts:
        own = moments if expert is None or moments is None else moments[expert]
        held = None if own is None else np.asarray(own)
        start = max(0, (shape[-2] - SAMPLED_ROWS) // 2)
        rows = source.rows(path, expert, start, min(shape[-2], start + SAMPLED_ROWS))
        samples.append((rows, held, Curvature.of(held) if held is not None and held.ndim == 2 else held))
    probe = sum(cost(rows, rounded(rows, _probe_of(columns)), held) for rows, held, _ in samples)
    found = []
    for number in bits:
        for size in sizes:
            grid = Grid(number, size, dtype)
            lost = sum(cost(rows, fit(rows, grid, fitted, sweeps=0).values(), held) for rows, held, fitted in samples)
            nbytes = int(np.prod(shape)) * number // 8 + int(np.prod(shape)) // size * 2 * (4 if dtype == "F32" else 2)
            found.append(Option(number, size, nbytes, sensitivity * lost / max(probe, 1e-30)))
    return sorted(found, key=lambda option: (option.nbytes, option.loss))


def _probe_of(columns: int) -> Grid:
    return PROBE if columns % PROBE.size == 0 else Grid(PROBE.bits, 32, PROBE.dtype)


def _spread(count: int, wanted: int) -> list[int | None]:
    return [int(i) for i in np.unique(np.linspace(0, count - 1, min(count, wanted)).round())]


def choose(ways: Mapping[str, Sequence[Option]], budget_bytes: int) -> Mix:
    """Return the mix with the least predicted loss that takes at most `budget_bytes`.

    Every byte is given a price, the same for all linears; each takes the option with the least loss and price together.
    The lowest price with which all fit is found by halving, and what bytes are left are spent on the best steps.

    Raises UsageError where even the smallest options do not fit.
    """
    least = sum(min(option.nbytes for option in each) for each in ways.values())
    if least > budget_bytes:
        raise UsageError(
            f"At the fewest bits the weights take {format_bytes(least)}, and there are {format_bytes(budget_bytes)} "
            f"for them. Give more memory, or choose a smaller model."
        )

    def at(price: float) -> dict[str, Option]:
        return {
            path: min(each, key=lambda option: (option.loss + price * option.nbytes, option.nbytes))
            for path, each in ways.items()
        }

    low, high = 0.0, 1.0
    while _total(at(high)) > budget_bytes:
        high *= 16
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if _total(at(middle)) <= budget_bytes else (middle, high)
    return Mix(_spend(at(high), ways, budget_bytes))


def _total(chosen: Mapping[str, Option]) -> int:
    return sum(option.nbytes for option in chosen.values())


def _spend(chosen: dict[str, Option], ways: Mapping[str, Sequence[Option]], budget_bytes: int) -> dict[str, Option]:
    """Take the step that lowers the loss most for its bytes, as long as one fits."""
    left = budget_bytes - _total(chosen)
    while True:
        steps = [
            ((held.loss - option.loss) / max(1, option.nbytes - held.nbytes), path, option)
            for path, held in chosen.items()
            for option in ways[path]
            if option.loss < held.loss and option.nbytes - held.nbytes <= left
        ]
        if not steps:
            return chosen
        _, path, option = max(steps, key=lambda step: step[:2])
        left -= option.nbytes - chosen[path].nbytes
        chosen[path] = option
