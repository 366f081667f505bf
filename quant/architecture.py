"""mlx-lm's model of a config, without weights: what its modules are, and which of them can be quantized."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from edger1.errors import FormatError

Classes = tuple[Any, Any]
"""Model and ModelArgs of an architecture."""

_EXPERT = re.compile(r"(?:^|\.)experts\.\d+\.")


@dataclass(frozen=True)
class Linear:
    """A module whose weight mlx-lm can hold quantized.

    `path` is the module's in mlx-lm's model, `shape` its weight's unquantized: [n, k], or [experts, n, k] of a stack.
    `role` is "experts" (routed ones), "router", "embedding", "head" or "linear". `own` is what the architecture's rule
    (its `quant_predicate`) says: whether to quantize it, or the settings that it must have. `tied` is set where an
    embedding is the head as well.
    """

    path: str
    shape: tuple[int, ...]
    role: str
    own: bool | Mapping[str, Any]
    tied: bool = False


def build(config: dict[str, Any], classes: Classes | None = None) -> Any:
    """Return mlx-lm's model of `config`, as it is made before weights are loaded; nothing in it is computed.

    Raises FormatError where mlx-lm has no such architecture, or where the config is not one of it.
    """
    import mlx.core as mx
    from mlx_lm.utils import _get_classes

    family = config.get("model_type")
    if not isinstance(family, str):
        raise FormatError(f"config.json gives {family!r} as model_type; expected the name of an architecture.")
    if config.get("model_file"):
        raise FormatError(
            f"config.json names a program of its own, {config['model_file']!r}, to build the model; none is run."
        )
    try:
        model_class, args_class = classes or _get_classes(config)
    except ValueError:
        raise FormatError(f"mlx-lm has no architecture {family!r}; update it, or take another model.") from None
    # Making a model draws random weights; the caller's generator stays as it was.
    generator: Any = mx.random.state
    high, low = generator[0].tolist()
    try:
        # mlx-lm's dataclasses write defaults into the dictionaries that they are given.
        return model_class(args_class.from_dict(copy.deepcopy(config)))
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise FormatError(
            f"config.json does not describe a {family} model that mlx-lm can build ({type(error).__name__}: {error})."
        ) from error
    finally:
        mx.random.seed(high << 32 | low)


def linears(config: dict[str, Any], classes: Classes | None = None) -> dict[str, Linear]:
    """Return the modules of a config's model that can be quantized, by path, in the model's order.

    Raises FormatError as `build` does.
    """
    return linears_of(build(config, classes))


def linears_of(model: Any) -> dict[str, Linear]:
    """Return the modules of a model that can be quantized, by path, in the model's order."""
    import mlx.nn as nn

    rule = getattr(model, "quant_predicate", None)
    modules = {
        path: module
        for path, module in model.named_modules()
        if hasattr(module, "to_quantized") and "mode" in inspect.signature(module.to_quantized).parameters
    }
    order = {path: place for place, path in enumerate(_in_order(model))}
    routed = {path: module.weight.shape[0] for path, module in modules.items() if _routes(path, module)}
    vocabulary = {module.weight.shape[0] for module in modules.values() if isinstance(module, nn.Embedding)}
    found = {}
    for path in sorted(modules, key=lambda path: order.get(path, len(order))):
        module = modules[path]
        shape = tuple(module.weight.shape)
        if path in routed or _EXPERT.search(path):
            role = "experts"
        elif isinstance(module, nn.Embedding):
            role = "embedding"
        elif _is_router(path, shape, routed):
            role = "router"
        elif shape[0] in vocabulary and not re.search(r"\.\d+\.", path):
            role = "head"
        else:
            role = "linear"
        own = True if rule is None else rule(path, module)
        found[path] = Linear(path, shape, role, dict(own) if isinstance(own, Mapping) else bool(own))
    if not any(linear.role == "head" for linear in found.values()):
        # Others, where there are any, hold positions or go into single layers.
        first = next((path for path, linear in found.items() if linear.role == "embedding"), None)
        if first is not None:
            found[first] = replace(found[first], tied=True)
    return found


def _in_order(model: Any) -> list[str]:
    from mlx.utils import tree_flatten

    return list(dict.fromkeys(name.rpartition(".")[0] for name, _ in tree_flatten(model.parameters())))


def _routes(path: str, module: Any) -> bool:
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    return isinstance(module, SwitchLinear | QuantizedSwitchLinear)


def _is_router(path: str, shape: tuple[int, ...], routed: Mapping[str, int]) -> bool:
    """Tell whether a matrix is named as a router and has a row for each expert of a stack in the same layer."""
    if len(shape) != 2 or not {"gate", "router"} & set(path.split(".")[-2:]):
        return False
    return any(shape[0] == experts and path.startswith(_layer(stack)) for stack, experts in routed.items())


def _layer(path: str) -> str:
    numbered = re.match(r"(.*?\.\d+\.)", path)
    return numbered[1] if numbered else ""
