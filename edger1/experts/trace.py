"""Routing traces: which experts every token asked for, layer by layer, and how near the others came.

A trace file is NumPy's .npz, compressed, with

    version    int, 1
    experts    uint8 [tokens, layers, top_k]             chosen experts, best first; MoE layers in order
    nearness   uint8 [tokens, layers, ceil(experts / 2)] how near each expert came to being chosen, in 4 bits: expert 2i
                                                         in the low half of byte i, expert 2i + 1 in the high half
    sessions   int32 [sessions]                          first token of each session
    about      str                                       what was recorded, as JSON

with nearness = round(15 exp(min(0, (s - t) / d))) of what the router ranks by (its scores s with any correction bias),
t being the lowest chosen expert's and d the standard deviation over all experts: 15 is chosen or as good as that, 0 is
more than 3.4 deviations away. Tokens of prompts are recorded like those of answers, each a step of its own.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edger1.errors import FormatError

VERSION = 1
LEVELS = 15
_MOST_EXPERTS = 256
_DAMAGE = (
    *(OSError, EOFError, ValueError, KeyError, TypeError),
    # The last is what zipfile says of flags and methods of compression that it does not know.
    *(zipfile.BadZipFile, zlib.error, NotImplementedError),
)


@dataclass(frozen=True)
class Trace:
    """The routing of some sessions: `chosen` [tokens, layers, top_k] uint8, `nearness` [tokens, layers, experts] uint8.

    `sessions` holds the first token of each session; `about` says what was recorded.
    """

    chosen: np.ndarray
    nearness: np.ndarray
    sessions: np.ndarray
    about: dict[str, Any]

    @property
    def experts(self) -> int:
        """Number of experts of a layer."""
        return int(self.nearness.shape[-1])

    def part(self, keep: slice) -> Trace:
        """Return some of the sessions, one after the other as if they had been recorded so."""
        ends = [*self.sessions[1:], len(self.chosen)]
        spans = list(zip(self.sessions, ends, strict=True))[keep]
        rows = np.concatenate([np.arange(begin, end) for begin, end in spans])
        firsts = np.cumsum([0, *(end - begin for begin, end in spans[:-1])])
        return Trace(self.chosen[rows], self.nearness[rows], firsts, self.about)

    def counts(self, layer: int) -> np.ndarray:
        """Return how often each expert of a layer was used, [experts]."""
        return np.bincount(self.chosen[:, layer].ravel(), minlength=self.experts)

    def scores(self, layer: int) -> np.ndarray:
        """Return scores as a router might give them, float32 [tokens, experts]: log nearness, 0 for the chosen."""
        return np.log(np.maximum(self.nearness[:, layer].astype(np.float32), 0.5) / LEVELS)


def save(path: Path, trace: Trace) -> None:
    """Write a trace file."""
    near = trace.nearness
    if near.shape[-1] % 2:
        near = np.concatenate([near, np.zeros_like(near[..., :1])], axis=-1)
    np.savez_compressed(
        path,
        version=np.array(VERSION),
        experts=trace.chosen.astype(np.uint8),
        nearness=near[..., ::2] | near[..., 1::2] << 4,
        sessions=trace.sessions.astype(np.int32),
        about=np.array(json.dumps(trace.about | {"experts": trace.experts})),
    )


def load(path: Path) -> Trace:
    """Read a trace file. Raises FormatError where it is none or of another version."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if int(file["version"]) != VERSION:
                raise FormatError(f"{path} is a routing trace of version {file['version']}; expected {VERSION}.")
            packed, about = file["nearness"], json.loads(str(file["about"]))
            near = np.stack([packed & LEVELS, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
            return Trace(file["experts"], near[..., : about["experts"]], file["sessions"], about)
    except _DAMAGE as error:
        raise FormatError(f"{path} is no routing trace ({error}). Record it again.") from error


def nearness(scores: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return how near experts came, uint8 0..15 [..., experts], of scores [..., experts] and chosen [..., top_k]."""
    threshold = np.take_along_axis(scores, chosen, axis=-1).min(axis=-1, keepdims=True)
    deviation = np.maximum(scores.std(axis=-1, keepdims=True), 1e-12)
    return np.rint(LEVELS * np.exp(np.minimum(scores - threshold, 0) / deviation)).astype(np.uint8)


class Recorder:
    """Collects what a model's routers decide; see `recording`."""

    def __init__(self) -> None:
        self._calls: list[tuple[Any, Any]] = []  # a layer's scores [1, rows, experts] and choice [1, rows, top_k]
        self._chosen: list[np.ndarray] = []
        self._near: list[np.ndarray] = []
        self._sessions: list[int] = []

    def begin_session(self) -> None:
        """Count what follows as a new session."""
        self._sessions.append(sum(map(len, self._chosen)))

    def note(self, scores: Any, chosen: Any) -> None:
        """Take one layer's decision, unevaluated."""
        self._calls.append((scores, chosen))

    def pending(self) -> list[Any]:
        """Return the arrays of the last forward pass, to be evaluated together with its logits."""
        return [array for call in self._calls for array in call]

    def end_pass(self) -> None:
        """Keep the last forward pass, each of its rows as a token."""
        scores = np.stack([np.array(scores)[0] for scores, _ in self._calls], axis=1)
        chosen = np.stack([np.array(chosen)[0] for _, chosen in self._calls], axis=1)
        by_rank = np.argsort(-np.take_along_axis(scores, chosen, axis=-1), axis=-1, kind="stable")
        self._chosen.append(np.take_along_axis(chosen, by_rank, axis=-1).astype(np.uint8))
        self._near.append(nearness(scores, chosen))
        self._calls.clear()

    def trace(self, about: dict[str, Any]) -> Trace:
        """Return everything recorded."""
        return Trace(np.concatenate(self._chosen), np.concatenate(self._near), np.array(self._sessions), about)


@contextmanager
def recording(model: Any) -> Iterator[Recorder]:
    """Record the routers of a DeepSeek-V3 model of mlx-lm while the context lasts, for one sequence at a time.

    After each forward pass evaluate its result and `pending()`, then call `end_pass()`.
    Raises ValueError where the model has no such routers, or more experts a layer than a file can number.
    """
    import mlx.core as mx
    from mlx_lm.models.deepseek_v3 import MoEGate

    recorder = Recorder()

    class Watched(MoEGate):
        """A router that tells what it decides."""

        def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
            chosen, weights = super().__call__(x)
            scores = mx.sigmoid((x @ self.weight.T).astype(mx.float32)) + self.e_score_correction_bias
            recorder.note(scores, chosen)
            return chosen, weights

    gates = [layer.mlp.gate for layer in model.model.layers if isinstance(getattr(layer.mlp, "gate", None), MoEGate)]
    if not gates:
        raise ValueError("expected a DeepSeek-V3 model with MoE layers: there is no MoEGate in it")
    experts = max(gate.weight.shape[0] for gate in gates)
    if experts > _MOST_EXPERTS:
        raise ValueError(f"the model has {experts} experts a layer; expected {_MOST_EXPERTS} or fewer, a byte each")
    classes = [type(gate) for gate in gates]
    for gate in gates:
        gate.__class__ = Watched
    try:
        yield recorder
    finally:
        for gate, original in zip(gates, classes, strict=True):
            gate.__class__ = original
