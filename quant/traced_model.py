"""A source in mlx-lm's terms, as the converter's plan wants it: the model's arrays, and those of the layers ahead.

mlx-lm drops layers of multi-token prediction (MTP). Where those are numbered on after the model's own layers, as
DeepSeek has them (arXiv 2412.19437, section 2.2), such a layer is an ordinary one with a few tensors more. Its ordinary
part is brought into mlx-lm's shape by letting it stand for the model's last layer. What is left over, and MTP layers of
another build, keep the names and shapes that the source has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edger1.quant.architecture import Classes, Linear
from edger1.quant.expressions import Leaf
from edger1.quant.needs import needed
from edger1.quant.planning import Model
from edger1.quant.recipes import BITS, GROUP_SIZES, Spec
from edger1.quant.source import Codes, Coding, Source, Tensor
from edger1.quant.targets import Packed, Plain
from edger1.quant.tracing import Traced, trace

_NUMBERED = re.compile(r"(?P<prefix>(?:.*\.)?layers)\.(?P<number>\d+)\.(?P<rest>.+)")
_COPIES = {"embed_tokens.weight": "embedding", "shared_head.head.weight": "head"}
"""What DeepSeek's checkpoints repeat in an MTP layer, and the role of the module that it is a copy of."""
_ROUTERS = (".gate", ".router")
_SAMPLE_ROWS = 16


@dataclass(frozen=True, eq=False)
class TracedTarget:
    """An array of mlx-lm's model; see quant/planning.py's Target."""

    of: Plain | Packed
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape, of numbers."""
        return self.of.shape

    @property
    def dtype(self) -> str:
        """What mlx-lm would hold it in, unquantized."""
        return self.of.dtype

    @property
    def coding(self) -> Coding | None:
        """How its codes could be carried over."""
        return self.of.coding

    def sources(self, start: int, stop: int) -> tuple[str, ...]:
        """Return the names of the source's tensors that rows [start, stop) are made of."""
        of = self.of
        parts = [of] if isinstance(of, Plain) else [part for part in (of.weight, of.scales, of.biases) if part]
        return tuple(dict.fromkeys(name for part in parts for name in needed(part.expression, start, stop)))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows [start, stop) as float32 (integers as they are)."""
        return self.of.read(start, stop)

    def codes(self, start: int, stop: int) -> Codes:
        """Return the codes of rows [start, stop)."""
        return self.of.codes(start, stop)


@dataclass
class _Ahead:
    """What was found of MTP layers."""

    targets: list[TracedTarget] = field(default_factory=list)
    modules: dict[str, bool | Spec] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)


def model_of(source: Source, classes: Classes | None = None) -> Model:
    """Trace `source` and return what the converter plans with.

    `classes` are Model and ModelArgs, where it is not mlx-lm's own for the config's model_type. Raises FormatError as
    `tracing.trace` does.
    """
    found = trace(source.config, source.tensors, classes)
    ahead = _ahead(source, found, classes)
    modules = {path: wish(linear) for path, linear in found.linears.items()}
    return Model(
        targets=tuple(TracedTarget(target, target.name) for target in found.tensors.values()),
        modules=modules | ahead.modules,
        layers=layer_count(source.config),
        ahead=tuple(ahead.targets),
        dropped=(*found.dropped, *ahead.dropped),
        roles={path: "head" if linear.tied else linear.role for path, linear in found.linears.items()} | ahead.roles,
    )


def layer_count(config: Mapping[str, Any]) -> int:
    """Return how many layers a config's model has, 0 where it does not say."""
    text = config.get("text_config")
    for place in (text if isinstance(text, dict) else {}, config):
        for key in ("num_hidden_layers", "n_layers", "n_layer", "num_layers"):
            if isinstance(place.get(key), int):
                return int(place[key])
    return 0


def wish(linear: Linear) -> bool | Spec:
    """Return what mlx-lm wants of a module: any quantization, none, or one of its own.

    Raises FormatError where it is none that MLX takes.
    """
    own = linear.own
    if isinstance(own, bool):
        return own
    mode = str(own.get("mode", "affine"))
    bits, group = own.get("bits", BITS.get(mode, (4,))[0]), own.get("group_size", GROUP_SIZES.get(mode, (64,))[0])
    return Spec(int(bits), int(group), mode)


def _ahead(source: Source, found: Traced, classes: Classes | None) -> _Ahead:
    ahead = _Ahead()
    layers: dict[tuple[str, int], dict[str, Tensor]] = {}
    last = layer_count(source.config) - 1
    for name in found.mtp:
        match = _NUMBERED.fullmatch(name)
        if match and int(match["number"]) > last >= 0:
            layers.setdefault((match["prefix"], int(match["number"])), {})[match["rest"]] = source.tensors[name]
        else:
            _as_it_is(source.tensors[name], ahead)
    for (prefix, number), own in layers.items():
        _layer_ahead(source, found, classes, f"{prefix}.{last}.", own, ahead, number)
    return ahead


def _layer_ahead(
    source: Source,
    found: Traced,
    classes: Classes | None,
    donor: str,
    own: Mapping[str, Tensor],
    ahead: _Ahead,
    number: int,
) -> None:
    """Let an MTP layer's tensors `own`, by their names within it, stand for the layer `donor`; take what it becomes."""
    usual = {name.removeprefix(donor) for name in source.tensors if name.startswith(donor)}
    rest = {name: tensor for name, tensor in own.items() if name not in usual}
    if usual and usual <= own.keys():
        gone = {f"{donor}{name}" for name in usual} | set(found.mtp)
        others = {name: tensor for name, tensor in source.tensors.items() if name not in gone}
        standing = trace(source.config, {**others, **{donor + name: own[name] for name in usual}}, classes)
        ordinary = {own[name].name for name in usual}
        place = donor.rsplit("layers.", 1)[1].removesuffix(".")
        for name, target in standing.tensors.items():
            if ordinary.issuperset(target.sources):
                renamed = name.replace(f"layers.{place}.", f"layers.{number}.", 1)
                ahead.targets.append(TracedTarget(target, renamed))
                path = name.removesuffix(".weight")
                if path in standing.linears:
                    ahead.modules[renamed.removesuffix(".weight")] = wish(standing.linears[path])
                    ahead.roles[renamed.removesuffix(".weight")] = standing.linears[path].role
    else:
        rest = dict(own)
    for name, tensor in rest.items():
        if name in _COPIES and _is_copy(tensor, found, _COPIES[name]):
            ahead.dropped.append(tensor.name)
        else:
            _as_it_is(tensor, ahead)


def _as_it_is(tensor: Tensor, ahead: _Ahead) -> None:
    ahead.targets.append(TracedTarget(Plain(tensor.name, Leaf(tensor)), tensor.name))
    path, _, part = tensor.name.rpartition(".")
    if part == "weight" and len(tensor.shape) > 1:
        ahead.modules[path] = not path.endswith(_ROUTERS)


def _is_copy(tensor: Tensor, found: Traced, role: str) -> bool:
    """Tell whether a tensor repeats the model's embedding or head, as far as its first rows show."""
    for path, linear in found.linears.items():
        of = found.tensors.get(f"{path}.weight")
        if (linear.role == role or (role == "head" and linear.tied)) and of is not None and of.shape == tensor.shape:
            rows = min(_SAMPLE_ROWS, tensor.shape[0])
            return bool(np.array_equal(of.read(0, rows), tensor.read(0, rows)))
    return False
