"""Layers of mlx-lm's whose products are computed elsewhere: from rows of their matrices, by whoever owns them.

Each makes a subclass of the layer's own class. The owner, which is put beside the layer as `OWNER`, computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

OWNER = "_by_rows"


def kinds() -> dict[type, Callable[[type], type]]:
    """Return the classes whose products are computed by rows, with what makes the class that does."""
    import mlx.nn as nn
    from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
    from mlx_lm.models.switch_layers import (
        QuantizedSwitchLinear,
        SwitchGLU,
        SwitchLinear,
        SwitchMLP,
    )

    return {
        nn.Linear: _linear,
        nn.QuantizedLinear: _linear,
        nn.Embedding: _embedding,
        nn.QuantizedEmbedding: _embedding,
        MultiLinear: _multi,
        QuantizedMultiLinear: _multi,
        SwitchLinear: _switch_linear,
        QuantizedSwitchLinear: _switch_linear,
        SwitchGLU: _switch,
        SwitchMLP: _switch,
    }


def _linear(kind: type) -> type:
    class RowsLinear(kind):
        def __call__(self, x: Any) -> Any:
            out = _flat(self, x, None)
            return out + self["bias"] if "bias" in self else out

    return RowsLinear


def _embedding(kind: type) -> type:
    class RowsEmbedding(kind):
        def __call__(self, x: Any) -> Any:
            return vars(self)[OWNER].take(self, x)

        def as_linear(self, x: Any) -> Any:
            return _flat(self, x, None)

    return RowsEmbedding


def _multi(kind: type) -> type:
    class RowsMulti(kind):
        def __call__(self, x: Any, transpose: bool = True) -> Any:
            import mlx.core as mx

            owner = vars(self)[OWNER]
            plain = _numpy(x)
            heads = owner.count(self)
            found = []
            for head in range(heads):
                rows = plain[:, head if plain.shape[1] == heads else 0]
                flat = owner.product(self, rows.reshape(-1, rows.shape[-1]), head, transposed=not transpose)
                found.append(flat.reshape(*rows.shape[:-1], -1))
            return mx.array(np.stack(found, axis=1))

    return RowsMulti


def _switch_linear(kind: type) -> type:
    class RowsSwitchLinear(kind):
        def __call__(self, x: Any, indices: Any, sorted_indices: bool = False) -> Any:
            # Only called for rows that have all chosen the same expert: see `_ask_experts`.
            expert = int(np.array(indices).reshape(-1)[0])
            out = _flat(self, x, expert)
            return out + self["bias"][expert] if "bias" in self else out

    return RowsSwitchLinear


def _switch(kind: type) -> type:
    class RowsSwitch(kind):
        def __call__(self, x: Any, indices: Any, *args: Any, **kwargs: Any) -> Any:
            return vars(self)[OWNER].answer(self, x, indices)

    return RowsSwitch


def _flat(module: Any, x: Any, expert: int | None) -> Any:
    import mlx.core as mx

    plain = _numpy(x)
    flat = vars(module)["_by_rows"].product(module, plain.reshape(-1, plain.shape[-1]), expert)
    return mx.array(flat.reshape(*plain.shape[:-1], -1))


def _numpy(array: Any) -> np.ndarray:
    import mlx.core as mx

    return np.array(array.astype(mx.float32))
