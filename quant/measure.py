"""What a model has lost against the one it was made from: perplexity, divergence, agreement, and each layer's error.

Both go through the text side by side, layer by layer (`quant.layers`): one layer of each is in memory at a time,
whatever the models' sizes, and the logits of a few positions. The text is cut into windows by one rule (`windows`):
each token is predicted once, from at least half a window of the tokens before it, or from all there are.

A layer's own error is that of what it gives for the source's input; its accumulated error is that of what it gives for
what the model's own layers before it gave. Either is the mean over positions of |model - source| / |source|, Euclidean
norms over the hidden state.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from edger1.errors import EdgeR1Error, FormatError, UsageError
from edger1.quant.divergence import Compared, compare
from edger1.quant.layers import LayerSource, Pass

WINDOW = 512
"""Tokens of a window, where nothing else is asked for."""
PASS_TOKENS = 2048
"""Tokens of a pass."""
CALL_BYTES = 64 << 20
"""Hidden states that are given to a layer at once. A layer of experts holds a few times as many beside them, and reads
its experts once for each such call."""
HIDDEN_BYTES = 256 << 20
"""Hidden states that are kept in memory between layers; more of them go to a file."""
LOGITS_BYTES = 128 << 20
"""Logits of one model that are in memory at once."""
PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99, 99.9)
"""Percentiles of the divergence that are told."""

Step = Callable[[str, int, int], None]
"""(what, done, total): "layer" after each decoder layer, "tokens" after each piece of logits."""


@dataclass(frozen=True)
class Side:
    """One of the two models. Sizes are of its weights on disk; 0 where they are not known."""

    name: str
    perplexity: float
    weight_bytes: int = 0
    bits_per_weight: float = 0.0


@dataclass(frozen=True)
class LayerError:
    """Relative errors of one decoder layer's output; see the module."""

    layer: int
    own: float
    accumulated: float


@dataclass(frozen=True)
class Measurement:
    """A model against its source, over `tokens` predicted tokens. Divergences are KL(source, model) in nats.

    `embedding_error` is that of the first layer's input. The keys of `divergence_percentiles` are PERCENTILES.
    """

    model: Side
    source: Side
    tokens: int
    window: int
    mean_divergence: float
    divergence_percentiles: dict[str, float]
    top1_agreement: float
    embedding_error: float
    layers: tuple[LayerError, ...]

    @property
    def divergence_99(self) -> float:
        """The 99th percentile of the divergence."""
        return self.divergence_percentiles["99"]

    def as_json(self) -> dict[str, Any]:
        """Return it as plain JSON values, with null for what is infinite."""
        return _plain(asdict(self))

    def with_sizes(self, model: tuple[int, float], source: tuple[int, float]) -> Measurement:
        """Return it with each side's (bytes of weights, bits a weight)."""
        return replace(
            self,
            model=replace(self.model, weight_bytes=model[0], bits_per_weight=model[1]),
            source=replace(self.source, weight_bytes=source[0], bits_per_weight=source[1]),
        )


@dataclass(frozen=True)
class Window:
    """Tokens [start, start + length) of a text, of which those from `first` on are predicted in this window."""

    start: int
    first: int


def windows(tokens: int, length: int, *, led: bool = False) -> list[Window]:
    """Cut a text of so many tokens into windows of `length` tokens that begin half a window apart.

    The last one ends with the text, so that all are of one length: that of the text where it is shorter. In the first,
    all tokens are predicted, but for the first one unless the text is `led` by special tokens; in the others those
    that no window before has predicted.

    Raises UsageError for a window under two tokens, and a text with nothing to predict.
    """
    if length < 2:
        raise UsageError(f"A window of {length} tokens predicts nothing; give one of at least 2.")
    unpredicted = 0 if led else 1
    if tokens <= unpredicted:
        raise UsageError(f"The text has {tokens} tokens, and there is nothing in it to predict; give a longer one.")
    found, end = [Window(0, unpredicted)], length
    while end < tokens:
        start = min(found[-1].start + length // 2, tokens - length)
        found.append(Window(start, end))
        end = start + length
    return found


def shared_tokens(model: LayerSource, source: LayerSource, text: str) -> list[int]:
    """Return the ids of the text's tokens, which must be the same for both.

    Raises UsageError where the two do not share a tokenizer.
    """
    ours, theirs = model.encode(text), source.encode(text)
    if ours == theirs:
        return ours
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    raise UsageError(
        f"{model.name} and {source.name} cut the text into different tokens (from token {at} on), so their predictions "
        f"cannot be compared; measure a model against the one that it was made from."
    )


def measure(
    model: LayerSource,
    source: LayerSource,
    tokens: Sequence[int],
    *,
    window: int = WINDOW,
    leading: Sequence[int] = (),
    scratch: Path | None = None,
    on_step: Step = lambda *_: None,
) -> Measurement:
    """Measure `model` against `source` on a text's tokens; see the module for what is measured and how.

    `leading` are the special tokens that every window begins with, beside its `window` tokens. Hidden states of a long
    text, 24 bytes a token and entry, lie in a file in the folder `scratch`, or where temporary files lie.

    Raises UsageError for windows and models that cannot be compared, FormatError where a layer gives numbers that are
    not finite, EdgeR1Error where there is no room for the hidden states.
    """
    if model.layers != source.layers:
        raise UsageError(
            f"{model.name} has {model.layers} decoder layers and {source.name} has {source.layers}, so one was not "
            f"made from the other; measure a model against the one that it was made from."
        )
    length = min(window, len(tokens))
    cut = windows(len(tokens), window, led=bool(leading))
    rows = np.array([[*leading, *tokens[each.start : each.start + length]] for each in cut], np.int32)
    together = max(1, PASS_TOKENS // rows.shape[1])
    batches = [rows[i : i + together] for i in range(0, len(rows), together)]
    with _Keeper(len(tokens), scratch) as keeper:
        walk = _Walk(model, source, batches, keeper, on_step)
        embedding, layers = walk.layers()
        found = walk.compare(cut, len(leading), tokens)
    divergence = found.divergence
    # Between an infinite and a finite one lies no number.
    with np.errstate(invalid="ignore"):
        percentiles = np.percentile(divergence, PERCENTILES)
    return Measurement(
        model=Side(model.name, _perplexity(found.model_loss)),
        source=Side(source.name, _perplexity(found.source_loss)),
        tokens=len(divergence),
        window=window,
        mean_divergence=float(divergence.mean()),
        divergence_percentiles={f"{p:g}": float(value) for p, value in zip(PERCENTILES, percentiles, strict=True)},
        top1_agreement=float(found.agrees.mean()),
        embedding_error=embedding,
        layers=layers,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _perplexity(losses: Any) -> float:
    with np.errstate(over="ignore"):
        return float(np.exp(losses.mean()))


class _Walk:
    """Both models on their way through the text."""

    def __init__(
        self,
        model: LayerSource,
        source: LayerSource,
        batches: Sequence[np.ndarray],
        keeper: _Keeper,
        on_step: Step,
    ) -> None:
        self._model, self._source, self._on_step = model, source, on_step
        self._rows = 0
        self._theirs = [keeper.keep(source.begin(batch)) for batch in batches]
        self._ours = [keeper.keep(model.begin(batch)) for batch in batches]
        # The model's layers on the source's inputs.
        self._alone = [keeper.keep(model.begin(batch)) for batch in batches]

    def layers(self) -> tuple[float, tuple[LayerError, ...]]:
        """Go through all layers; returns the embedding's error and theirs."""
        embedding = self._error(self._ours, "The embedding")
        found = []
        for layer in range(self._model.layers):
            for alone, theirs in zip(self._alone, self._theirs, strict=True):
                alone.hidden = theirs.hidden
            _advance(self._source, layer, self._theirs)
            _advance(self._model, layer, [*self._ours, *self._alone])
            what = f"Layer {layer}"
            found.append(LayerError(layer, self._error(self._alone, what), self._error(self._ours, what)))
            self._on_step("layer", layer + 1, self._model.layers)
        return embedding, tuple(found)

    def _error(self, passes: Sequence[Pass], what: str) -> float:
        total, positions = 0.0, 0
        for ours, theirs in zip(passes, self._theirs, strict=True):
            found, expected = ours.hidden, theirs.hidden
            if found.shape != expected.shape:
                raise UsageError(
                    f"{what} gives a hidden state of {found.shape[2:]} in {self._model.name} and of "
                    f"{expected.shape[2:]} in {self._source.name}; measure a model against the one it was made from."
                )
            for name, hidden in ((self._source.name, expected), (self._model.name, found)):
                if not np.isfinite(hidden).all():
                    raise FormatError(
                        f"{what} of {name} gives numbers that are not finite; its weights are damaged, or have lost "
                        f"their scale. Convert or fetch the model again."
                    )
            flat = (*found.shape[:2], -1)
            apart = np.linalg.norm((found - expected).reshape(flat), axis=-1)
            size = np.linalg.norm(expected.reshape(flat), axis=-1)
            total += float((apart / np.maximum(size, np.finfo(np.float32).tiny)).sum(dtype=np.float64))
            positions += apart.size
        return total / positions

    def compare(self, cut: Sequence[Window], led: int, tokens: Sequence[int]) -> Compared:
        """Compare the predictions of all windows, each led by so many special tokens."""
        found: list[Compared] = []
        left = list(cut)
        done, total = 0, len(tokens) - cut[0].first
        for theirs, ours in zip(self._theirs, self._ours, strict=True):
            count, length = theirs.tokens.shape
            batch, left = left[:count], left[count:]
            # What stands before a token predicts it.
            firsts = [led + each.first - each.start - 1 for each in batch]
            rows = np.concatenate([np.full(length - 1 - first, row) for row, first in enumerate(firsts)])
            columns = np.concatenate([np.arange(first, length - 1) for first in firsts])
            before, after = theirs.tokens[rows, columns], theirs.tokens[rows, columns + 1]
            expected, given = theirs.hidden[rows, columns], ours.hidden[rows, columns]

            def part(passing: Pass, hidden: np.ndarray, ids: np.ndarray, piece: slice) -> Pass:
                # A position's logits are its own, whatever stands beside it.
                return Pass(ids[None, piece], hidden[None, piece], passing.own)

            step = self._positions(part(theirs, expected, before, slice(0, 1)))
            for begin in range(0, len(rows), step):
                piece = slice(begin, begin + step)
                sides = part(theirs, expected, before, piece), part(ours, given, before, piece)
                found.append(self._piece(*sides, after[piece]))
                done += len(after[piece])
                self._on_step("tokens", done, total)
        return Compared(
            *(
                np.concatenate([getattr(each, name) for each in found])
                for name in ("divergence", "source_loss", "model_loss", "agrees")
            )
        )

    def _positions(self, one: Pass) -> int:
        """How many positions' logits of one model may be in memory, found out with one."""
        if not self._rows:
            self._rows = max(1, LOGITS_BYTES // self._source.logits(one).nbytes)
        return self._rows

    def _piece(self, theirs: Pass, ours: Pass, targets: np.ndarray) -> Compared:
        source, model = self._source.logits(theirs)[0], self._model.logits(ours)[0]
        for name, logits in ((self._source.name, source), (self._model.name, model)):
            if np.isnan(logits).any():
                raise FormatError(f"{name} gives logits that are no numbers; its output head is damaged.")
        return compare(source, model, targets)


def _advance(side: LayerSource, layer: int, passes: Sequence[Pass]) -> None:
    each = max(1, CALL_BYTES // passes[0].hidden.nbytes)
    for first in range(0, len(passes), each):
        side.advance(layer, passes[first : first + each])


class _Keeper:
    """Keeps hidden states between layers: in memory, or in a file where they are many."""

    def __init__(self, tokens: int, folder: Path | None) -> None:
        self._tokens = tokens
        self._folder = folder
        self._file: IO[bytes] | None = None
        self._end = 0

    def __enter__(self) -> _Keeper:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def keep(self, passing: Pass) -> Pass:
        """Return the pass, its hidden state where it is to be kept."""
        hidden = passing.hidden
        # Three passes, and windows that overlap by half.
        if 6 * self._tokens * (hidden.nbytes // passing.tokens.size) <= HIDDEN_BYTES:
            return passing
        with _room():
            self._file = self._file or tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - closed with the keeper
        start, self._end = self._end, self._end + hidden.nbytes
        return _Filed(passing, self._file, start)


class _Filed(Pass):
    """A pass whose hidden state lies in a file, from byte `start` on."""

    def __init__(self, passing: Pass, file: IO[bytes], start: int) -> None:
        self._file, self._start, self._shape = file, start, passing.hidden.shape
        super().__init__(passing.tokens, passing.hidden, passing.own)

    @property
    def hidden(self) -> np.ndarray:
        """Read it."""
        self._file.seek(self._start)
        found = np.fromfile(self._file, np.float32, int(np.prod(self._shape)))
        return found.reshape(self._shape)

    @hidden.setter
    def hidden(self, value: np.ndarray) -> None:
        if value.shape != self._shape:
            raise FormatError(f"A layer gave a hidden state of {value.shape} for one of {self._shape}.")
        with _room():
            self._file.seek(self._start)
            self._file.write(np.ascontiguousarray(value, np.float32).data)
            self._file.flush()


@contextlib.contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EdgeR1Error(
            f"The hidden states between layers cannot be kept in a temporary file: "
            f"{(error.strerror or str(error)).lower()}. Make room, or measure on fewer tokens."
        ) from error
