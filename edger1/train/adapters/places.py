"""Which layers of a model can have an adapter, and what each of them is there for.

That is read off the model itself, never its name. Stacked experts are known by their types. A layer inside a module
that is called with a cache or a mask mixes tokens, and counts as attention, be it softmax, latent or linear attention
or a state space. What scores experts, or weighs a shared one, is a router. What only chooses the positions that are
attended to is an indexer; no gradient reaches it. The rest of a decoder layer is MLP.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchLinear, SwitchMLP
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

from edger1.errors import UsageError

ATTENTION, MLP, EXPERTS, ROUTER = KINDS = ("attention", "mlp", "experts", "router")
INDEXER, OTHER = "indexer", "other"
USUAL = (ATTENTION, MLP, EXPERTS)
"""What "all" means: a router that is trained on little data forgets what it balanced."""

LINEARS = (nn.Linear, nn.QuantizedLinear)
SWITCHES = (SwitchLinear, QuantizedSwitchLinear)
MULTIS = (MultiLinear, QuantizedMultiLinear)
_OVER = (LoRALinear, LoRASwitchLinear, DoRALinear)
_INDEXER_NAME = re.compile(r"(^|\.)index")
_MLP_NAME = re.compile(r"mlp|ff|fc|gate|up_|down|w[123]$")


@dataclass(frozen=True)
class Place:
    """A layer that can have an adapter, and where it hangs: `holder[key]` is it."""

    path: str
    module: Any
    kind: str
    layer: int | None
    """Index of its decoder layer; None for what is outside of them."""
    holder: Any
    key: Any

    @property
    def name(self) -> str:
        """Its own name: the last part of the path that is no number."""
        return next(part for part in reversed(self.path.split(".")) if not part.isdigit())


def decoder_layers(model: Any) -> list[Any]:
    """Return a model's decoder layers. Raises UsageError for a model that does not tell them."""
    layers = getattr(model, "layers", None)
    if not isinstance(layers, list | tuple) or not layers:
        raise UsageError(f"{type(model).__module__} does not tell its decoder layers, so it cannot have an adapter.")
    return list(layers)


def find(model: Any) -> list[Place]:
    """Return all layers that can have an adapter, in the order in which they are called. Shared ones come twice."""
    index = {id(layer): i for i, layer in enumerate(decoder_layers(model))}
    found: list[Place] = []

    def visit(path: str, value: Any, above: tuple[Any, ...], layer: int | None, holder: Any, key: Any) -> None:
        if isinstance(value, nn.Module):
            layer = index.get(id(value), layer)
            if _adaptable(value) and not _read_directly(type(holder), str(key)):
                kind = OTHER if layer is None else _kind(value, path, above)
                found.append(Place(path, value, kind, layer, holder, key))
            if not isinstance(value, _OVER):
                # What is above a decoder layer says nothing of what is in it.
                inner = (value,) if id(value) in index else (*above, value)
                for name in value.children():
                    # Its own: `children` gives copies of lists, into which nothing could be put.
                    visit(f"{path}.{name}" if path else name, value[name], inner, layer, value, name)
        elif isinstance(value, dict):
            for name, child in value.items():
                visit(f"{path}.{name}", child, above, layer, value, name)
        elif isinstance(value, list | tuple):
            for i, child in enumerate(value):
                visit(f"{path}.{i}", child, above, layer, value, i)

    visit("", model, (), None, None, None)
    return found


def outputs(module: Any) -> int:
    """Return how many numbers a layer gives for each row, or each head or expert of it."""
    return int(module.weight.shape[-2])


def inputs(module: Any) -> int:
    """Return how many numbers a layer takes for each row."""
    packed = int(module.weight.shape[-1])
    return packed * 32 // module.bits if "scales" in module else packed


def _adaptable(module: Any) -> bool:
    if isinstance(module, MULTIS + SWITCHES):
        return True
    # Layers that bring an adapter of their own class answer with several arrays.
    return isinstance(module, LINEARS) and module.weight.ndim == 2 and not hasattr(module, "to_lora")


def _read_directly(holder: type, name: str) -> bool:
    """Whether a module takes the weight of its child `name` itself, so that an adapter over the child is not asked."""
    return any(name in _weights_read(each.__module__).get(each.__name__, ()) for each in holder.__mro__)


@cache
def _weights_read(module: str) -> dict[str, set[str]]:
    """Return which children's weights the classes of a module of mlx-lm's read: class -> `x` of `self.x.weight`."""
    file = getattr(sys.modules.get(module), "__file__", None)
    if not module.startswith(("mlx_lm.", "edger1.")) or file is None:
        return {}
    try:
        parts = re.split(r"^class (\w+)", Path(file).read_text(encoding="utf-8"), flags=re.MULTILINE)
    except OSError:
        return {}
    return {
        name: set(re.findall(r"self\.(\w+)\.weight\b", body))
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def _kind(module: Any, path: str, above: tuple[Any, ...]) -> str:
    """Return what a layer is there for; `above` are the modules around it, from the decoder layer inwards."""
    if isinstance(module, SWITCHES):
        return EXPERTS
    if _INDEXER_NAME.search(path):
        return INDEXER
    if any(_mixes_tokens(each) for each in above[1:]):
        return ATTENTION
    switch = next((s for each in above[1:] for s in _switches(each)), None)
    alone = sum(isinstance(child, LINEARS) for child in above[-1].children().values()) == 1 if above else False
    if switch is not None and not any(each is switch for each in above):
        direct = any(child is switch for child in above[-1].children().values())
        if outputs(module) == 1 or ((direct or alone) and outputs(module) == _experts(switch)):
            return ROUTER
    if len(above) == 1:
        return MLP if _MLP_NAME.search(path.rpartition(".")[2]) else ATTENTION
    return MLP


def _switches(module: Any) -> Iterator[Any]:
    return (each for each in module.modules() if isinstance(each, SwitchGLU | SwitchMLP))


def _experts(switch: Any) -> int:
    for child in switch.children().values():
        inner = child.linear if isinstance(child, LoRASwitchLinear) else child
        if isinstance(inner, SWITCHES):
            return int(inner.weight.shape[0])
    return 0


@cache
def _takes_cache(kind: type) -> bool:
    # The class that a kernel gave a module takes anything; its own is among the bases.
    for each in kind.__mro__:
        call = vars(each).get("__call__")
        if call is not None and {"cache", "mask"} & set(inspect.signature(call).parameters):
            return True
    return False


def _mixes_tokens(module: Any) -> bool:
    kind: Any = type(module)
    return _takes_cache(kind) or ("q_proj" in module and "k_proj" in module)
