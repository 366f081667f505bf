"""Where the routed experts of a model lie in its files: read off the unloaded model's modules and the headers, once.

A folder as mlx-lm writes it has the experts of a layer stacked: a tensor [experts, n, k] for each matrix, its scales
and its biases. Expert e of such a tensor is one range of bytes, so any such folder streams as it stands.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edger1.errors import UnstreamableError
from edger1.quant.formats import safetensors

if TYPE_CHECKING:
    from edger1.folder import ModelFolder


@dataclass(frozen=True)
class Part:
    """One tensor of a layer's experts.

    `offset` is where expert 0 lies, in bytes from the start of `file`; expert e lies at offset + e * nbytes. `shape`
    and `nbytes` are of one expert; `dtype` is safetensors' name of it.
    """

    projection: str
    name: str
    file: Path
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class LayerExperts:
    """The routed experts of one layer. `index` counts the layers that have experts; `path` is the switch module's."""

    index: int
    path: str
    experts: int
    top_k: int
    parts: tuple[Part, ...]

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert: all its matrices with scales and biases."""
        return sum(part.nbytes for part in self.parts)


# What mlx-lm calls safetensors' dtypes; others are not read here.
_DTYPES = {
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
}
_TOP_K = (
    *("num_experts_per_tok", "num_experts_per_token", "top_k", "moe_topk", "moe_top_k", "num_selected_experts"),
    *(
        "experts_per_token",
        "n_experts_per_tok",
        "moe_k",
        "num_activated_experts",
        "top_k_experts",
        "n_activated_experts",
    ),
    *("num_experts_to_select", "moe_num_active_experts", "experts_top_k", "expert_top_k"),
)


def mlx_dtype(part: Part) -> str:
    """Return the name of the MLX dtype that a part's elements have."""
    return _DTYPES[part.dtype]


def switches(model: Any) -> list[tuple[str, Any]]:
    """Return mlx-lm's switch layers in a model with their paths, in the order of the layers."""
    from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

    return [(path, module) for path, module in modules(model) if isinstance(module, SwitchGLU | SwitchMLP)]


def find(model: Any, folder: ModelFolder) -> tuple[LayerExperts, ...]:
    """Return where the experts of each layer lie; nothing for a model without routed experts.

    `model` may be lazy: no weight is read. Raises UnstreamableError where a tensor is not in the files as the model has
    it.
    """
    found = switches(model)
    if not found:
        return ()
    where = {
        name: (header.path, entry)
        for header in map(safetensors.read_header, folder.weight_files)
        for name, entry in header.entries.items()
    }
    layers = []
    for index, (path, switch) in enumerate(found):
        parts = tuple(_parts(path, switch, where))
        layers.append(LayerExperts(index, path, _experts(switch), top_k(folder.config), parts))
    return tuple(layers)


def modules(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield all modules in the order in which layers are called; MLX's own listing runs backwards."""

    def visit(path: str, value: Any) -> Iterator[tuple[str, Any]]:
        import mlx.nn as nn

        if isinstance(value, nn.Module):
            yield path, value
            items: Any = value.children().items()
        elif isinstance(value, dict):
            items = value.items()
        elif isinstance(value, list | tuple):
            items = enumerate(value)
        else:
            return
        for key, child in items:
            yield from visit(f"{path}.{key}" if path else str(key), child)

    return visit("", model)


def projections(switch: Any) -> list[tuple[str, Any]]:
    """Return the layers inside a switch layer that hold a matrix for each expert."""
    return [(name, child) for name, child in switch.children().items() if hasattr(child, "num_experts")]


def _experts(switch: Any) -> int:
    return int(projections(switch)[0][1].num_experts)


def _parts(path: str, switch: Any, where: Mapping[str, tuple[Path, safetensors.Entry]]) -> Iterator[Part]:
    import mlx.core as mx

    for projection, linear in projections(switch):
        for name, array in linear.items():
            if not isinstance(array, mx.array):
                continue
            full = f"{path}.{projection}.{name}"
            if full not in where:
                raise UnstreamableError(
                    f"{full} is not in the model's files under this name, so its experts cannot be read one by one. "
                    f"Convert the model to mlx-lm's layout."
                )
            file, entry = where[full]
            dtype = _DTYPES.get(entry.dtype)
            if entry.shape != tuple(array.shape) or dtype is None or getattr(mx, dtype) != array.dtype:
                raise UnstreamableError(
                    f"{full} is {entry.dtype} {list(entry.shape)} in {file.name} and {array.dtype} {list(array.shape)} "
                    f"in the model, so its experts cannot be read as they lie. Convert the model to mlx-lm's layout."
                )
            experts, shape = entry.shape[0], entry.shape[1:]
            if experts != _experts(switch):
                raise UnstreamableError(f"{full} has {experts} experts where the layer has {_experts(switch)}.")
            nbytes = entry.nbytes // experts
            assert nbytes == math.prod(shape) * safetensors.DTYPE_BITS[entry.dtype] // 8
            yield Part(projection, name, file, entry.offset, nbytes, shape, entry.dtype)


def top_k(config: Mapping[str, Any]) -> int:
    """Return how many experts a token uses in a layer, as a config.json says; 1 where it does not."""
    nested = config.get("text_config")
    for table in (nested, config):
        if not isinstance(table, Mapping):
            continue
        for key in _TOP_K:
            value = table.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return 1
