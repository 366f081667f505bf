"""Every architecture that mlx-lm ships, built tiny with random weights.

The list is whatever `mlx_lm.models` holds. A config comes from the fields of each family's `ModelArgs`, by their names,
with more for the families whose names do not say enough: both tables are in `family_values.py`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import pkgutil
import sys
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

from edger1 import mlx_runtime

mlx_runtime.prepare()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx_lm.models  # noqa: E402
from family_values import NESTED, OVERRIDES, VALUES, Config  # noqa: E402
from mlx.utils import tree_map_with_path  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP  # noqa: E402

GROUP_SIZE, BITS = 32, 4
# How much wider than MLX's own the random weights are. More makes attention sharper, and every rounding error larger.
GAIN = 1.5

UNBUILDABLE: dict[str, str] = {
    "bitnet": "its BitLinear is a Metal kernel; mlx-lm has no other implementation (RuntimeError: No Metal back-end)",
    "muse_spark": "its norms and its routing are Metal kernels; mlx-lm has no others (RuntimeError: No Metal back-end)",
    "olmo": "mlx-lm adds the mask 'causal', a string, to the scores of any prompt over one token (ValueError)",
}
"""Families that cannot be built or run on a CPU -> the reason, as seen."""

PROMPT = [3, 17, 99, 150, 42, 7, 180, 61, 3, 88, 120, 5]
DECODED = [11, 77, 140]


@cache
def _module(name: str) -> ModuleType:
    probed = "hf_olmo" not in sys.modules
    # mlx_lm.models.olmo leaves the process where this package, which it never uses, cannot be imported.
    sys.modules.setdefault("hf_olmo", ModuleType("hf_olmo"))
    try:
        return importlib.import_module(f"mlx_lm.models.{name}")
    finally:
        if probed:
            del sys.modules["hf_olmo"]


@cache
def families() -> list[str]:
    """Return the names of mlx-lm's modules that define an architecture, sorted."""
    names = sorted(info.name for info in pkgutil.iter_modules(mlx_lm.models.__path__))
    return [name for name in names if hasattr(_module(name), "Model") and hasattr(_module(name), "ModelArgs")]


def _fill(arguments: type, given: Config) -> Config:
    fields = dataclasses.fields(arguments)
    # ModelArgs.from_dict drops what it does not know: a name misspelled in the tables would be lost without a word.
    unknown = given.keys() - {field.name for field in fields} - {"model_type"}
    if unknown:
        raise KeyError(f"{arguments.__module__}.{arguments.__name__} has no fields {sorted(unknown)}")
    filled = {field.name: VALUES[field.name] for field in fields if field.name in VALUES} | given
    for field in fields:
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in filled:
            # An optional field without a default: absent is what most published configs have.
            if "Optional" in str(field.type) or field.name == "rope_scaling":
                filled[field.name] = None
            else:
                raise KeyError(
                    f"{arguments.__module__}.{arguments.__name__} has a field {field.name} ({field.type}) for which "
                    "tests/family_values.py gives no value; add one to VALUES or OVERRIDES"
                )
    return filled


def tiny_config(model_type: str) -> Config:
    """Return a config for `model_type`, as its config.json would have it: 128 wide, 2 to 4 layers, 200 tokens.

    Raises KeyError for a required field of which no tiny value is known.
    """
    given = {"model_type": model_type, **OVERRIDES.get(model_type, {})}
    if model_type in NESTED:
        module, arguments = NESTED[model_type]
        text = {"model_type": module, **(OVERRIDES.get(module, {}) if module != model_type else {})}
        text |= given.pop("text_config", {})
        text.pop("text_config", None)
        given["text_config"] = _fill(getattr(_module(module), arguments), text)
    return _fill(_module(model_type).ModelArgs, given)


def _randomize(path: str, weight: mx.array) -> mx.array:
    """Spread what a fresh model leaves constant, and widen the rest so that attention and routers prefer something."""
    if weight.dtype == mx.uint32:
        return mx.random.randint(0, 2**31 - 1, weight.shape).astype(mx.uint32)
    if not mx.issubdtype(weight.dtype, mx.floating) or path.endswith(".signs"):
        return weight
    weight = weight.astype(mx.float32)
    # The decay rates of a state space model are exponents: what they start from is what they should be.
    if path.endswith("A_log"):
        return weight
    if weight.ndim > 1 and (weight.min() != weight.max()).item():
        return weight * GAIN
    spread = weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.1
    return weight + spread * mx.random.normal(weight.shape)


def skeleton(model_type: str) -> nn.Module:
    """Return a tiny model of the family whose weights were never computed: all there is to see are its layers."""
    module = _module(model_type)
    model: nn.Module = module.Model(module.ModelArgs.from_dict(tiny_config(model_type)))
    return model


def build(model_type: str, seed: int = 0, quantize: bool = False) -> nn.Module:
    """Return a tiny model of the family with random f32 weights, evaluated.

    With `quantize`, every layer that can be is quantized to 4 bits in groups of 32, except where the family's own rule
    (its quant_predicate) says otherwise.
    """
    mx.random.seed(seed)
    model = skeleton(model_type)
    model.update(tree_map_with_path(_randomize, model.parameters()))
    model.eval()
    if quantize:
        nn.quantize(model, group_size=GROUP_SIZE, bits=BITS, class_predicate=_quantizable(model))
    mx.eval(model.parameters())
    return model


def _quantizable(model: nn.Module) -> Callable[[str, nn.Module], bool | dict[str, Any]]:
    own: Callable[[str, nn.Module], bool | dict[str, Any]] = getattr(model, "quant_predicate", None) or (
        lambda *_: True
    )

    def choose(path: str, layer: nn.Module) -> bool | dict[str, Any]:
        convert = getattr(layer, "to_quantized", None)
        # nn.quantize names the mode, which afm7's own layers do not take.
        if convert is None or "mode" not in inspect.signature(convert).parameters:
            return False
        if layer.weight.shape[-1] % GROUP_SIZE:
            return False
        wanted = own(path, layer)
        return {**wanted, "group_size": GROUP_SIZE} if isinstance(wanted, dict) else wanted

    return choose


@cache
def has_experts(model_type: str) -> bool:
    """Whether the family has layers of stacked experts (SwitchGLU or SwitchMLP)."""
    return any(isinstance(layer, SwitchGLU | SwitchMLP) for layer in skeleton(model_type).modules())


def logits(model: nn.Module, prompt: Sequence[int] = PROMPT, decoded: Sequence[int] = DECODED) -> list[mx.array]:
    """Run a prompt at once, then single tokens with the cache; return each pass's logits, (1, tokens, vocabulary)."""
    cache = make_prompt_cache(model)
    outputs = []
    for tokens in (prompt, *([token] for token in decoded)):
        outputs.append(model(mx.array([list(tokens)]), cache=cache))
        mx.eval(outputs[-1], [layer.state for layer in cache])
    return outputs


def relative_error(ours: mx.array, theirs: mx.array) -> float:
    """Return ||ours - theirs|| / ||theirs|| over all elements.

    It is infinite where either side has a NaN, or where their infinities, which mask tokens, are not the same.
    """
    masked = mx.isinf(theirs)
    if mx.any(mx.isnan(ours)).item() or mx.any(mx.isnan(theirs)).item():
        return math.inf
    if not mx.array_equal(mx.where(masked, theirs, 0.0), mx.where(mx.isinf(ours), ours, 0.0)).item():
        return math.inf
    difference = mx.where(masked, 0.0, ours - theirs)
    return float(mx.linalg.norm(difference) / mx.linalg.norm(mx.where(masked, 0.0, theirs)))
