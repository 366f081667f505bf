"""DeepSeek-V3 and R1 (arXiv 2412.19437): mlx-lm's classes, reading what the published checkpoints hold.

Three things differ from mlx-lm's model as it loads:

- Layers for multi-token prediction, `model.layers.{n}` with n >= num_hidden_layers, are left out wherever they begin;
  mlx-lm leaves out layer 61, whatever the model's depth. `edger1.drafting.loading` reads them for drafts.
- Experts outside a token's groups are never chosen (section 2.1.2; in DeepSeek's own program their scores become -inf).
  mlx-lm gives them the score 0, which beats a score with a negative correction. So the corrections are raised, all by
  the same amount, until none is negative: neither the order of groups nor that within them changes.
- `num_nextn_predict_layers`, the number of MTP layers, is an argument.

Attention over the latents for any number of rows is `edger1.kernels.latent`'s, which finds its layers by their shape.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
from mlx_lm.models import deepseek_v3

Weights = dict[str, mx.array]

_CORRECTION = ".e_score_correction_bias"
# mlx-lm's `sanitize` drops layer 61 and what its number begins with it.
_AT_ONCE = 61


@dataclass
class ModelArgs(deepseek_v3.ModelArgs):
    """mlx-lm's arguments with the number of MTP layers."""

    num_nextn_predict_layers: int = 0


class Model(deepseek_v3.Model):
    """mlx-lm's model, which reads checkpoints of any depth."""

    def sanitize(self, weights: Weights) -> Weights:
        """Bring a checkpoint's names and shapes into the module's; MTP layers are left out."""
        kept = {name: value for name, value in weights.items() if not is_beyond(name, self.args.num_hidden_layers)}
        return sanitized(self.args, kept, 0, self.args.num_hidden_layers)


def sanitized(args: deepseek_v3.ModelArgs, weights: Weights, first: int, count: int) -> Weights:
    """Return the weights of `count` layers from `first` on, and those of no layer, as mlx-lm's modules hold them.

    FP8 is read, experts are stacked, kv_b_proj is split, and corrections are raised where there are groups. The layers
    keep their numbers.
    """
    found: Weights = {}
    groups: dict[int | None, Weights] = {}
    for name, value in weights.items():
        layer = layer_of(name)
        if layer is None:
            groups.setdefault(None, {})[name] = value
        elif first <= layer < first + count:
            before = layer - (layer - first) % _AT_ONCE
            groups.setdefault(before, {})[_numbered(name, layer, layer - before)] = value
    shape = _Shape(replace(args, num_hidden_layers=_AT_ONCE))
    for start, own in groups.items():
        for name, value in deepseek_v3.Model.sanitize(shape, own).items():
            layer = layer_of(name)
            found[name if layer is None or start is None else _numbered(name, layer, layer + start)] = value
    return raised(found) if args.n_group > 1 else found


def raised(weights: Weights) -> Weights:
    """Raise the routers' corrections so that none is negative, those of one router all by the same amount."""
    return {
        name: value - mx.minimum(value.min(), 0) if name.endswith(_CORRECTION) else value
        for name, value in weights.items()
    }


def layer_of(name: str) -> int | None:
    """Return the number of the layer that a tensor of a checkpoint is in; None where it is in none."""
    parts = name.split(".", 3)
    return int(parts[2]) if parts[:2] == ["model", "layers"] and len(parts) > 3 and parts[2].isdigit() else None


def is_beyond(name: str, layers: int) -> bool:
    """Whether a tensor is of an MTP layer, which follow a model's `layers`."""
    layer = layer_of(name)
    return layer is not None and layer >= layers


def classes(model: Any, args: Any) -> tuple[Any, Any]:
    """Return these classes instead of mlx-lm's for DeepSeek-V3, and any others as they are."""
    return (Model, ModelArgs) if model is deepseek_v3.Model else (model, args)


def _numbered(name: str, layer: int, number: int) -> str:
    return name.replace(f"model.layers.{layer}.", f"model.layers.{number}.", 1)


class _Shape:
    """What mlx-lm's `sanitize` reads of a model."""

    def __init__(self, args: Any) -> None:
        self.args = args
