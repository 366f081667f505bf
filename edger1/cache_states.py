"""The states of caches as JSON and arrays, and whether a state may be one of a given model's caches.

Kernels read caches where their shapes and offsets say; so what comes from a file is held against the caches that the
model makes itself, whatever the file says of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edger1.errors import PromptCacheError

if TYPE_CHECKING:
    from edger1.loader import LiveModel

_SETTINGS = ("keep", "max_size", "chunk_size", "group_size", "bits", "start_position", "_format")
"""Attributes that a cache has from its making on."""


def flattened(value: Any, arrays: dict[str, Any], name: str) -> Any:
    """Return a state as JSON; its arrays are put into `arrays` under names that begin with `name`, and named in place.

    Raises PromptCacheError for anything that is no array, number, string, None or sequence of these.
    """
    import mlx.core as mx

    if isinstance(value, mx.array):
        arrays[name] = value
        return {"array": name}
    if isinstance(value, list | tuple):
        return [flattened(each, arrays, f"{name}.{i}") for i, each in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise PromptCacheError(
        f"A cache holds {type(value).__name__}, which cannot be stored; expected arrays and numbers."
    )


def unflattened(value: Any, arrays: Mapping[str, Any]) -> Any:
    """Return the state that `flattened` was given, sequences as lists."""
    if isinstance(value, dict):
        return arrays[value["array"]]
    return [unflattened(each, arrays) for each in value] if isinstance(value, list) else value


def arrays_of(state: Any) -> list[Any]:
    """Return the arrays in a state."""
    import mlx.core as mx

    if isinstance(state, mx.array):
        return [state]
    return [array for each in state for array in arrays_of(each)] if isinstance(state, list | tuple) else []


def tried(model: LiveModel) -> list[Any]:
    """Return caches as the model fills them; nobody evaluates the pass that did."""
    import mlx.core as mx

    caches = model.new_caches()
    asleep = contextlib.nullcontext() if model.streaming is None else model.streaming.sleeping()
    with asleep:
        model.model(mx.zeros((1, 2), dtype=mx.int32), cache=caches)
    return caches


def restored(own: Any, state: Any, tokens: int) -> Any | None:
    """Return a cache of `tokens` tokens made of a state, None where that cannot be one of the kind that `own` is.

    May raise anything that a state of another form makes mlx-lm raise.
    """
    if not _alike(own.state, state, holds_state=not hasattr(own, "keys")):
        return None
    cache = type(own).from_state(state)
    return cache if _is_sound(own, cache, tokens) else None


def _alike(own: Any, state: Any, *, holds_state: bool) -> bool:
    """Whether a state has the form, the words and the shapes of a cache's own.

    Along the axis of tokens lengths may differ; an array of what `holds_state` has none.
    """
    import mlx.core as mx

    if isinstance(own, mx.array):
        if not isinstance(state, mx.array) or own.ndim != state.ndim:
            return False
        floating = mx.issubdtype(own.dtype, mx.floating) and mx.issubdtype(state.dtype, mx.floating)
        free = None if holds_state or own.ndim < 3 else own.ndim - 2
        same = all(a == b for axis, (a, b) in enumerate(zip(own.shape, state.shape, strict=True)) if axis != free)
        return same and (floating or own.dtype == state.dtype)
    if isinstance(own, list | tuple):
        return (
            isinstance(state, list)
            and len(own) == len(state)
            and all(_alike(a, b, holds_state=holds_state) for a, b in zip(own, state, strict=True))
        )
    if own is None or isinstance(own, str):
        return bool(own == state)
    return isinstance(state, bool | int | float)


def _is_sound(own: Any, cache: Any, tokens: int) -> bool:
    """Whether a cache's numbers agree with its arrays, and its settings with those of the model's own."""
    inside: Sequence[Any] | None = getattr(own, "caches", None)
    if inside is not None:
        return len(inside) == len(cache.caches) and all(
            _is_sound(a, b, tokens) for a, b in zip(inside, cache.caches, strict=True)
        )
    if any(getattr(own, name, None) != getattr(cache, name, None) for name in _SETTINGS):
        return False
    if not hasattr(own, "keys"):
        return True
    lengths = {array.shape[-2] for array in (*arrays_of(cache.keys), *arrays_of(cache.values))}
    window = getattr(cache, "max_size", None)
    held = tokens if window is None else min(tokens, window)
    at = getattr(cache, "_idx", held)
    return cache.offset == tokens and len(lengths) == 1 and held <= min(lengths) and 0 <= at <= min(lengths)
