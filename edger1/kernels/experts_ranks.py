"""What each rank's expert gives, in an array that knows how to become the weighted sum.

In mlx-lm the sum over ranks is not the switch layer's: each family's module writes `(y * scores[..., None]).sum(-2)`.
So a switch layer answers with `Ranks`, which is the array [..., ranks, hidden] to whoever takes it for one, but turns
that expression into the operation with the sum inside.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from edger1.kernels.experts_fit import Held


class Ranks:
    """What each expert gives, [..., ranks, hidden], before it is weighted and summed; everywhere else that array."""

    def __init__(self, array: mx.array, held: Held, x: mx.array, indices: mx.array) -> None:
        self._array, self._held, self._x, self._indices = array, held, x, indices

    def __mlx_array__(self) -> mx.array:
        return self._array

    def __getattr__(self, name: str) -> Any:
        return getattr(self._array, name)

    def astype(self, dtype: mx.Dtype, *args: Any, **kwargs: Any) -> Any:
        """As of an array."""
        return self if dtype == self._array.dtype else self._array.astype(dtype, *args, **kwargs)

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, mx.array) and other.shape == (*self._indices.shape, 1):
            return _Weighted(self, other)
        return self._array * other

    def __rmul__(self, other: Any) -> Any:
        return self * other


class _Weighted:
    """Ranks times their weights, before the sum; everywhere else that product."""

    def __init__(self, ranks: Ranks, weights: mx.array) -> None:
        self._ranks, self._weights = ranks, weights

    @property
    def _array(self) -> mx.array:
        return self._ranks._array * self._weights

    def __mlx_array__(self) -> mx.array:
        return self._array

    def __getattr__(self, name: str) -> Any:
        return getattr(self._array, name)

    def sum(self, axis: Any = None, *args: Any, **kwargs: Any) -> mx.array:
        """As of an array; over the axis of ranks it is the operation."""
        ranks = self._ranks
        if axis in (-2, ranks._indices.ndim - 1) and not args and not kwargs:
            done: mx.array | None = ranks._held.call(ranks._x, ranks._indices, self._weights)
            if done is not None:
                if ranks._held.seen is not None:
                    ranks._held.seen.append((ranks._x, ranks._indices, self._weights))
                return done
        return self._array.sum(axis, *args, **kwargs)


def _of_array(name: str) -> Any:
    return lambda self, *args: getattr(self._array, name)(*args)


# Operators are looked up in the class and would miss __getattr__.
for _name in ("add", "radd", "sub", "rsub", "truediv", "rtruediv", "matmul", "neg", "pow", "eq", "getitem", "len"):
    for _class in (Ranks, _Weighted):
        setattr(_class, f"__{_name}__", _of_array(f"__{_name}__"))
for _name in ("mul", "rmul"):
    setattr(_Weighted, f"__{_name}__", _of_array(f"__{_name}__"))
