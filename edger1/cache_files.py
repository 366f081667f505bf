"""Prompt caches in files: what a model made of a text is kept, and a long text is read by it only once.

A file is safetensors, read by any tool that reads those. Its metadata has "edger1" = "prompt cache", "version", and
"about", a JSON object:

"key"     what must be the same where it is restored, see `key_of`: the model's weights and tokenizer, the adapter, the
          precision, the bits of the cache, the device, the kernels and mlx-lm, whose caches' `state` is what is stored
"name"    the model's name, for people
"text"    what the token ids stand for, "" where that is not known
"layers"  for each cache its class and its state, with the names of arrays in place of these

The tensors are "ids" (int32), the arrays, each in the dtype that it had, and at the end "sha256": the SHA-256 of all
bytes before it, the header included. Nothing in a file is believed before that has been found right, and classes are
those of the model that reads, whatever the file says.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edger1 import cache_parts
from edger1.cache import Entry
from edger1.cache_states import arrays_of, flattened, restored, tried, unflattened
from edger1.errors import ContextError, FormatError, MemoryCeilingError, PromptCacheError
from edger1.quant.formats import safetensors
from edger1.units import format_bytes

if TYPE_CHECKING:
    from edger1.loader import LiveModel

VERSION = 1
_KIND = "prompt cache"
_SUM, _SUM_BYTES = "sha256", 32
_CHUNK_BYTES = 1 << 22
_SAMPLE_BYTES = 4096
_ANEW = "Save it anew, or name another file."
_TOLD = {
    "weights": "the weights of {name}",
    "tokenizer": "the tokenizer of {name}",
    "adapter": "adapter {}",
    "precision": "precision {}",
    "kv_bits": "cache bits {}",
    "device": "device {}",
    "kernels": "kernels {}",
    "mlx_lm": "mlx-lm {}",
}
"""How each part of a key is named in an error, with its value or the model's name."""


@dataclass(frozen=True)
class Info:
    """What a file says of itself: its key and model, how many tokens and bytes of caches it has."""

    key: dict[str, str]
    name: str
    text: str
    layers: list[Any]
    tokens: int
    nbytes: int


def key_of(model: LiveModel) -> dict[str, str]:
    """Return what a prompt cache of `model` depends on, as strings.

    Weights are known by config.json, and for each file its name, size and header and the bytes in the middle of every
    tensor: training changes those, copying does not.
    """
    from mlx_lm._version import __version__

    from edger1.mlx_runtime import on_gpu

    bits = getattr(model.plan, "kv_bits", None)
    return {
        "weights": _weights(model.folder.path / "config.json", model.folder.weight_files),
        "tokenizer": _whole([model.folder.path / "tokenizer.json"]),
        "adapter": "none" if model.adapter is None else _whole(_files_of(model.adapter.folder)),
        "precision": model.precision,
        "kv_bits": "none" if bits is None else str(bits),
        "device": "gpu" if on_gpu() else "cpu",
        "kernels": "on" if model.installed.active else "off",
        "mlx_lm": __version__,
    }


def save(path: Path, model: LiveModel, entry: Entry) -> int:
    """Write an entry's caches to `path`, whole or not at all; returns the file's bytes.

    `entry.caches` are the model's own, without what an MTP layer knows. Raises PromptCacheError where they cannot be
    stored, or the file not written.
    """
    import mlx.core as mx

    arrays: dict[str, Any] = {"ids": mx.array(entry.ids, mx.int32)}
    divisible = cache_parts.divisible(entry.caches, len(entry.ids))
    layers = []
    for number, cache in enumerate(entry.caches):
        # Without the room for what may come.
        held = cache_parts.piece(cache, 0, cache.offset, lazily=True) if divisible else cache
        layers.append([type(cache).__name__, flattened(held.state, arrays, f"{number}")])
    about = {"key": key_of(model), "name": model.name, "text": entry.text, "layers": layers}
    metadata = {"format": "mlx", "edger1": _KIND, "version": str(VERSION), "about": json.dumps(about)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                size = _write(file, arrays, metadata)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise PromptCacheError(f"{path} cannot be written ({reason}); what was there before is untouched.") from None
    return size


def look(path: Path) -> Info:
    """Read what a file says of itself, without its tensors; nothing of it is verified yet but its form.

    Raises PromptCacheError for a file that is no prompt cache, is not whole, or is of a newer version.
    """
    try:
        header = safetensors.read_header(path)
    except FormatError as error:
        raise PromptCacheError(f"{path} is no prompt cache, or is damaged: {_own(error, path)} {_ANEW}") from None
    told = header.metadata
    if told.get("edger1") != _KIND:
        raise PromptCacheError(f"{path} is a safetensors file, but no prompt cache of EdgeR1. {_ANEW}")
    version = told.get("version", "")
    if version != str(VERSION):
        newer = version.isdecimal() and int(version) > VERSION
        advice = "Update EdgeR1, or save it anew." if newer else _ANEW
        raise PromptCacheError(f"{path} has version {version!r:.20} of the format; expected {VERSION}. {advice}")
    try:
        about = json.loads(told["about"])
        key, name, text, layers = about["key"], about["name"], about["text"], about["layers"]
        ids, last = header.entries["ids"], header.entries[_SUM]
        sound = (
            all(isinstance(each, str) for each in (name, text, *key, *key.values()))
            and all(isinstance(kind, str) for kind, _ in layers)
            and (ids.dtype, len(ids.shape), last.dtype, last.shape) == ("I32", 1, "U8", (_SUM_BYTES,))
            and next(reversed(header.entries)) == _SUM
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise _damaged(path)
    nbytes = sum(e.nbytes for e in header.entries.values()) - ids.nbytes - last.nbytes
    return Info(key, name, text, layers, ids.shape[0], nbytes)


def check(path: Path, info: Info, model: LiveModel) -> None:
    """Raise unless a file's cache is of this very model as it is loaded, and fits into its context and KV budget.

    PromptCacheError for another model, adapter or recipe, ContextError, MemoryCeilingError.
    """
    expected = key_of(model)
    wrong = [
        name for name in (*expected, *(info.key.keys() - expected.keys())) if info.key.get(name) != expected.get(name)
    ]
    if wrong:
        found = ", ".join(_told(name, info.key.get(name), info.name) for name in wrong)
        wanted = ", ".join(_told(name, expected.get(name), model.name) for name in wrong)
        raise PromptCacheError(
            f"{path} is the prompt cache of another model or recipe: found {found}; expected {wanted}. Load the model "
            f"as it was then, or name another file for a new cache."
        )
    if info.tokens >= model.context:
        raise ContextError(
            f"{path} holds {info.tokens} tokens, and the context of {model.context} tokens must hold them and what "
            f"follows. Give a larger context with --context."
        )
    if info.nbytes > model.kv.budget_bytes:
        raise MemoryCeilingError(
            f"{path} holds {format_bytes(info.nbytes, up=True)} of caches, and the plan of {model.name} has "
            f"{format_bytes(model.kv.budget_bytes)} for them. Give a larger context with --context."
        )


def read(path: Path, info: Info, model: LiveModel) -> Entry:
    """Read a cache that `check` found to be of this model. Raises PromptCacheError for a file that is damaged."""
    import mlx.core as mx

    _verify(path)
    if look(path) != info:
        raise PromptCacheError(f"{path} was replaced while it was being read. Restore it again.")
    try:
        arrays = cast("dict[str, Any]", mx.load(str(path), format="safetensors"))
        ids = [int(i) for i in arrays.pop("ids").tolist()]
        if not ids or not all(0 <= i < model.vocabulary for i in ids):
            raise _damaged(path)
        caches = []
        for own, (kind, flat) in zip(tried(model), info.layers, strict=True):
            state = unflattened(flat, arrays)
            cache = restored(own, state, len(ids)) if kind == type(own).__name__ else None
            if cache is None:
                raise _damaged(path)
            mx.eval(arrays_of(state))
            caches.append(cache)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise _damaged(path) from None
    return Entry(ids, info.text, caches)


def _damaged(path: Path) -> PromptCacheError:
    return PromptCacheError(f"{path} is damaged: what it holds is not what was saved. {_ANEW}")


def _told(name: str, value: str | None, model: str) -> str:
    if value is None:
        return f"no {name}"
    told = _TOLD.get(name, name + " {}").format(value if len(value) < 20 else value[:12], name=model)
    return f"{told} ({value[:12]})" if name in ("weights", "tokenizer") else told


def _own(error: FormatError, path: Path) -> str:
    """Return what an error says without the advice to fetch a file that nobody can fetch."""
    said = str(error).removeprefix(f"{path} ").removeprefix(f"{path}: ")
    for advice in (" Fetch it again.", " It is truncated or damaged; fetch it again."):
        said = said.removesuffix(advice)
    return said.replace("; fetch it again", "").rstrip(".") + "."


def _write(file: Any, arrays: dict[str, Any], metadata: Mapping[str, str]) -> int:
    """Write a safetensors file, an array at a time, with the sum of all bytes as its last tensor; empties `arrays`."""
    import mlx.core as mx

    names = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16", mx.int32: "I32", mx.uint32: "U32"}
    names |= {mx.uint8: "U8", mx.int8: "I8", mx.int64: "I64", mx.uint64: "U64", mx.bool_: "BOOL"}
    names |= {mx.int16: "I16", mx.uint16: "U16"}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    if unknown := next((a.dtype for a in arrays.values() if a.dtype not in names), None):
        raise PromptCacheError(f"A cache holds numbers of the type {unknown}, which cannot be stored.")
    described = [(name, names[a.dtype], list(a.shape), a.nbytes) for name, a in arrays.items()]
    for name, dtype, shape, nbytes in [*described, (_SUM, "U8", [_SUM_BYTES], _SUM_BYTES)]:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    for piece in (len(text).to_bytes(8, "little"), text):
        file.write(piece)
        digest.update(piece)
    for name in list(arrays):
        # Taken out, so that copies without spare room go one after the other.
        for raw in _raw(arrays.pop(name)):
            file.write(raw)
            digest.update(raw)
    file.write(digest.digest())
    return 8 + len(text) + at


def _raw(array: Any) -> Iterator[memoryview]:
    import mlx.core as mx
    import numpy as np

    if not array.size:
        return
    plain = mx.contiguous(array)
    flat: Any = np.array(plain.view(mx.uint16) if array.dtype == mx.bfloat16 else plain, copy=False).reshape(-1)
    yield memoryview(flat).cast("B")


def _verify(path: Path) -> None:
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            left = os.fstat(file.fileno()).st_size - _SUM_BYTES
            while left > 0:
                chunk = file.read(min(left, _CHUNK_BYTES))
                if not chunk:
                    raise _damaged(path)
                digest.update(chunk)
                left -= len(chunk)
            told = file.read(_SUM_BYTES)
    except OSError as error:
        raise PromptCacheError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}.") from None
    if told != digest.digest():
        raise _damaged(path)


def _weights(config: Path, files: Sequence[Path]) -> str:
    digest = hashlib.sha256(config.read_bytes())
    for path in files:
        header = safetensors.read_header(path)
        digest.update(f"{path.name} {header.size} {header.digest}\n".encode())
        with path.open("rb", buffering=0) as file:
            for entry in header.entries.values():
                length = min(_SAMPLE_BYTES, entry.nbytes)
                digest.update(os.pread(file.fileno(), length, entry.offset + (entry.nbytes - length) // 2))
    return digest.hexdigest()


def _files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))


def _whole(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()
