"""What the inputs of each linear layer look like, from one pass of text through a model.

`calibrate` takes windows of text through a model layer by layer (`quant.layers`) and notes, for every linear, the
second moments of its inputs: the whole matrix sum of x x^T / n where it is small enough, its diagonal where it is not.
Experts have their own, from the tokens that chose them. An expert that saw few tokens borrows from its layer's others:
their mean counts as `BORROWED` tokens more.

The statistics lie in a folder, one array a linear, and are mapped from there, so that neither making nor using them
takes memory for more than one layer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edger1.errors import FormatError, UsageError
from edger1.quant.layers import LayerSource, Pass

TEXT = Path(__file__).parent / "assets" / "calibration.txt"
"""A text written for it: prose, code, mathematics, dialogue, several languages."""
WINDOW = 512
"""Tokens of a window."""
PASS_WINDOWS = 8
BORROWED = 32
MATRIX_BYTES = 512 << 20
"""What a layer's moments may take in memory: matrices for the linears with the fewest columns as long as they fit, the
diagonals for the rest."""
INDEX = "calibration.json"
_LAYOUT = 1

Document = str | Sequence[dict[str, str]]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Statistics:
    """Second moments by linear, mapped from `folder`. `tokens` went through; `digest` names text and model."""

    folder: Path
    tokens: int
    digest: str
    files: dict[str, str]
    shares: dict[str, Any] = field(repr=False)

    def moments(self, path: str) -> np.ndarray | None:
        """Return the moments of the linear at `path`: [k, k] or [k], of a stack [E, k, k] or [E, k].

        None where the linear was not seen.
        """
        name = self.files.get(path)
        return None if name is None else np.load(self.folder / name, mmap_mode="r")

    def importance(self, path: str, start: int, stop: int) -> np.ndarray | None:
        """Return the moments that rows [start, stop) of the weight at `path` are fitted with.

        Rows of a stack are experts; rows of a matrix all have the same.
        """
        found = self.moments(path)
        if found is None:
            return None
        return np.asarray(found[start:stop] if self.shares.get(path) else found)

    def share(self, path: str) -> np.ndarray | None:
        """Return for a stack which part of all tokens each expert saw, [E]; None for one that is no stack."""
        found = self.shares.get(path)
        return None if found is None else np.asarray(found)


def documents(path: Path | None) -> list[Document]:
    """Return the documents of a text file or of a .jsonl data set, or of the text that comes along.

    Rows of a data set are {"text": "..."} or {"messages": [{"role", "content"}, ...]}. Raises UsageError where the file
    cannot be read or holds nothing, FormatError for a row that is no document.
    """
    path = TEXT if path is None else path
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UsageError(f"{path} cannot be read for calibration: {reason}.") from None
    found: list[Document] = list(_rows(path, text)) if path.suffix == ".jsonl" else [text]
    if not any(found):
        raise UsageError(f"{path} holds no text to calibrate with.")
    return found


def _rows(path: Path, text: str) -> Iterator[Document]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found = row["text"] if "text" in row else row["messages"]
            if not isinstance(found, str):
                found = [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in found]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise FormatError(
                f'{path}, line {number} is no document; expected {{"text": "..."}} or {{"messages": [...]}}.'
            ) from None
        yield found


def windows(
    source: LayerSource, texts: Sequence[Document], limit: int | None = None, length: int = WINDOW
) -> np.ndarray:
    """Return int32 [windows, length] tokens of the texts one after another, at most `limit` windows.

    What is left over at the end is dropped; a text shorter than a window is one window. Raises UsageError for under two
    tokens.
    """
    ids: list[int] = []
    for text in texts:
        ids += source.encode(text) if isinstance(text, str) else source.render(text)
        if limit is not None and len(ids) >= limit * length:
            break
    if len(ids) < 2:
        raise UsageError("The text to calibrate with has under two tokens; give a longer one.")
    length = min(length, len(ids))
    count = min(len(ids) // length, limit or len(ids))
    return np.array(ids[: count * length], np.int32).reshape(count, length)


def begin(source: LayerSource, tokens: np.ndarray) -> list[Pass]:
    """Return passes of a few windows each."""
    return [source.begin(tokens[i : i + PASS_WINDOWS]) for i in range(0, len(tokens), PASS_WINDOWS)]


def calibrate(
    source: LayerSource,
    tokens: np.ndarray,
    folder: Path,
    *,
    matrix_bytes: int = MATRIX_BYTES,
    on_progress: Progress = lambda *_: None,
) -> Statistics:
    """Take [windows, length] tokens through the model and write its inputs' moments into `folder`.

    `on_progress(done, total)` is called after each layer. Raises FormatError where a layer's inputs are not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    passes = begin(source, tokens)
    files: dict[str, str] = {}
    shares: dict[str, Any] = {}
    for layer in range(source.layers + 1):
        last = layer == source.layers
        seen = _Layer(source.linears(None if last else layer), matrix_bytes)
        if last:
            for passing in passes:
                source.logits(passing, seen.watch)
        else:
            source.advance(layer, passes, seen.watch)
        for path, moments, share in seen.ended(tokens.size):
            if not np.isfinite(moments).all():
                raise FormatError(f"The inputs of {path} in {source.name} are not finite; its weights are damaged.")
            files[path] = f"{len(files):05}.npy"
            np.save(folder / files[path], moments)
            if share is not None:
                shares[path] = share.tolist()
        on_progress(layer + 1, source.layers + 1)
    digest = digest_of(source, tokens)
    about = {"layout": _LAYOUT, "tokens": int(tokens.size), "digest": digest, "files": files, "shares": shares}
    (folder / INDEX).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return Statistics(folder, int(tokens.size), digest, files, shares)


def digest_of(source: LayerSource, tokens: np.ndarray) -> str:
    """Return the digest that statistics of these tokens in this model have."""
    return hashlib.sha256(tokens.tobytes() + source.name.encode()).hexdigest()[:16]


def load(folder: Path) -> Statistics:
    """Return what `calibrate` wrote into `folder`. Raises FormatError where it is not that."""
    try:
        about = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if about["layout"] != _LAYOUT:
            raise ValueError(f"layout {about['layout']}")
        files = {str(path): str(name) for path, name in about["files"].items()}
        if any(Path(name).name != name for name in files.values()):
            raise ValueError("a file outside the folder")
        return Statistics(folder, int(about["tokens"]), str(about["digest"]), files, dict(about["shares"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{folder} holds no calibration that can be read ({error}); calibrate again.") from None


@dataclass
class _Seen:
    """One linear's sums: `total` is f32 [k, k] or [k], of a stack [E, ...]; `rows` counts its inputs, [E] or [1]."""

    total: np.ndarray
    rows: np.ndarray
    stack: bool
    latest: bytes = b""
    same_as: str | None = None


class _Layer:
    """The moments of one layer's linears."""

    def __init__(self, linears: dict[str, tuple[int, ...]], matrix_bytes: int) -> None:
        self._seen: dict[str, _Seen] = {}
        self._shapes = linears
        left = matrix_bytes
        self._whole = set()
        for path, shape in sorted(linears.items(), key=lambda item: (item[1][-1], item[0])):
            needed = 4 * shape[-1] ** 2 * (shape[0] if len(shape) == 3 else 1)
            if needed <= left:
                self._whole.add(path)
                left -= needed

    def watch(self, path: str, expert: int | None, inputs: np.ndarray) -> None:
        """Take in the inputs [rows, k] of a linear."""
        seen = self._seen.get(path) or self._first(path)
        place = expert or 0
        # Queries, keys and values have the same inputs, and so have gate and up: their sums are made once.
        mark = hashlib.blake2b(inputs[:: max(1, len(inputs) // 8)].tobytes(), digest_size=16).digest()
        if seen.same_as is None and not seen.rows.any():
            # A stack has sums of its own for each expert, even where one of them sees what a plain linear does.
            others = ((o, held) for o, held in self._seen.items() if o != path and held.stack == seen.stack)
            seen.same_as = next((o for o, held in others if held.latest == mark), None)
        if seen.same_as is not None:
            if self._seen[seen.same_as].latest == mark:
                return
            # Where they part, it counts what is its own only.
            seen.same_as = None
        seen.latest = mark
        seen.rows[place] += len(inputs)
        add = inputs.T @ inputs if path in self._whole else np.square(inputs).sum(0)
        if seen.stack:
            seen.total[place] += add
        else:
            seen.total += add

    def _first(self, path: str) -> _Seen:
        shape = self._shapes[path]
        stack, k = len(shape) == 3, shape[-1]
        own = (k, k) if path in self._whole else (k,)
        total = np.zeros((shape[0], *own) if stack else own, np.float32)
        self._seen[path] = _Seen(total, np.zeros(shape[0] if stack else 1, np.int64), stack)
        return self._seen[path]

    def ended(self, tokens: int) -> Iterator[tuple[str, np.ndarray, np.ndarray | None]]:
        """Yield path, moments a row, and for a stack each expert's share of the tokens."""
        for path, seen in self._seen.items():
            of = seen if seen.same_as is None else self._seen[seen.same_as]
            if not of.stack:
                yield path, of.total / of.rows[0], None
                continue
            mean = of.total.sum(0) / max(1, int(of.rows.sum()))
            rows = of.rows.reshape(-1, *[1] * mean.ndim)
            yield path, (of.total + BORROWED * mean) / (rows + BORROWED), of.rows / tokens
