"""Layers for multi-token prediction (MTP) of every family that publishes them, in one shape.

All of them follow DeepSeek-V3 (arXiv 2412.19437, section 2.2): for position i, what the model made of the tokens up to
i is joined with the embedding of token i + 1,

    h'_i = M [RMSNorm(Emb(t_{i+1})); RMSNorm(h_i)]

and passes one transformer block of the model's own kind; the shared head reads token i + 2 from the result, normed.
h_i is the hidden state after the model's last norm. Families differ in names, in the order of the two halves, and in
how their norms are stored; `FAMILIES` says how. What a checkpoint repeats of embedding and head is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base, deepseek_v3

from edger1.architectures.deepseek_v3 import raised

Weights = dict[str, mx.array]


class Predictor(nn.Module):
    """One MTP layer. `block` is a decoder layer, called as block(x, mask, cache)."""

    def __init__(
        self, hidden_size: int, eps: float, block: Any, *, embedding_first: bool = True, masks_with_arrays: bool = False
    ) -> None:
        super().__init__()
        self.enorm = nn.RMSNorm(hidden_size, eps=eps)
        self.hnorm = nn.RMSNorm(hidden_size, eps=eps)
        self.eh_proj = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.block = block
        self.norm = nn.RMSNorm(hidden_size, eps=eps)
        self._embedding_first = embedding_first
        self._masks_with_arrays = masks_with_arrays

    def __call__(self, hidden: mx.array, embedded: mx.array, cache: Any = None) -> mx.array:
        """Return states [B, L, D] from which the head reads the token after the next.

        hidden [B, L, D] are the model's own states, embedded [B, L, D] what the tokens after them are embedded as.
        """
        halves = [self.enorm(embedded), self.hnorm(hidden)]
        x = self.eh_proj(mx.concatenate(halves if self._embedding_first else halves[::-1], axis=-1))
        # Latent attention adds its mask to scores that it makes itself, so it wants an array.
        mask = base.create_attention_mask(x, cache, return_array=self._masks_with_arrays)
        states: mx.array = self.norm(self.block(x, mask, cache))
        return states


@dataclass(frozen=True)
class Family:
    """How a family's checkpoints hold their first MTP layer, and how the block is built.

    `prefix` stands before all names of the layer, with {layers} for the model's number of layers. `names` maps the
    layer's own parts to those of `Predictor`; everything else below `block` is the block's. `module` is mlx-lm's.
    """

    prefix: str
    names: Mapping[str, str]
    module: str
    block: Callable[[Any, Any], Any]
    inner: str = ""
    embedding_first: bool = True
    masks_with_arrays: bool = False
    norms_from_zero: bool = False
    """Whether norms are stored as what is to be added to 1."""


_NUMBERED = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "shared_head.norm": "norm"}
_MIMO = {"token_layernorm": "enorm", "hidden_layernorm": "hnorm", "input_proj": "eh_proj", "final_layernorm": "norm"}
_QWEN = {"pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm", "fc": "eh_proj", "norm": "norm"}
_COPIES = ("embed_tokens.", "shared_head.head.")


def _full_attention(args: Any) -> int:
    """Index of a layer with full attention, where others have a state of fixed size."""
    return int(args.full_attention_interval) - 1


FAMILIES = {
    "deepseek_v3": Family(
        "model.layers.{layers}.",
        _NUMBERED,
        "deepseek_v3",
        lambda module, args: module.DeepseekV3DecoderLayer(args, args.num_hidden_layers),
        masks_with_arrays=True,
    ),
    "glm4_moe": Family(
        "model.layers.{layers}.",
        _NUMBERED,
        "glm4_moe",
        lambda module, args: module.DecoderLayer(args, args.num_hidden_layers),
    ),
    "mimo": Family(
        "model.mtp_layers.0.",
        _MIMO,
        "mimo",
        lambda module, args: module.TransformerBlock(args),
        embedding_first=False,
    ),
    "qwen3_next": Family(
        "mtp.",
        _QWEN,
        "qwen3_next",
        lambda module, args: module.Qwen3NextDecoderLayer(args, _full_attention(args)),
        inner="layers.0.",
        norms_from_zero=True,
    ),
    "qwen3_5": Family(
        "mtp.",
        _QWEN,
        "qwen3_5",
        lambda module, args: module.DecoderLayer(args, _full_attention(args)),
        inner="layers.0.",
        norms_from_zero=True,
    ),
}
FAMILIES |= {"kimi_k2": FAMILIES["deepseek_v3"], "qwen3_5_moe": FAMILIES["qwen3_5"]}
"""By config.json's model_type."""


@dataclass(frozen=True)
class Base:
    """What an MTP layer shares with its model."""

    inner: Any
    """The module that returns hidden states after the last norm."""
    embed: Callable[[mx.array], mx.array]
    head: Callable[[mx.array], mx.array]


def base_of(model: Any) -> Base:
    """Return the parts of one of mlx-lm's models that its MTP layer shares."""
    text = model.language_model if "language_model" in model else model
    embedding = text.model.embed_tokens
    return Base(text.model, embedding, text.lm_head if "lm_head" in text else embedding.as_linear)


def prefix_of(family: Family, config: Mapping[str, Any]) -> str:
    """Return what stands before the names of the first MTP layer's weights."""
    text = config.get("text_config")
    own = {**config, **text} if isinstance(text, Mapping) else config
    return family.prefix.format(layers=own.get("num_hidden_layers"))


def build(family: Family, model: Any, weights: Weights, config: Mapping[str, Any]) -> Predictor:
    """Return the MTP layer of `model` with `weights`, those of a checkpoint whose names begin with its prefix.

    Raises ValueError where they are not what the model's config says.
    """
    import importlib

    text = model.language_model if "language_model" in model else model
    args, prefix = text.args, prefix_of(family, config)
    module = importlib.import_module(f"mlx_lm.models.{family.module}")
    predictor = Predictor(
        args.hidden_size,
        args.rms_norm_eps,
        family.block(module, args),
        embedding_first=family.embedding_first,
        masks_with_arrays=family.masks_with_arrays,
    )
    found = _sanitized(family, module, args, prefix, weights)
    quantization = config.get("quantization") or {}
    default = {k: quantization[k] for k in ("group_size", "bits", "mode") if k in quantization}

    def how(path: str, part: Any) -> Any:
        if f"{path}.scales" not in found or not hasattr(part, "to_quantized"):
            return False
        return quantization.get(_on_disk(family, prefix, path), default) or default

    nn.quantize(predictor, class_predicate=how)
    predictor.load_weights(list(found.items()))
    return predictor


def _on_disk(family: Family, prefix: str, path: str) -> str:
    """Return the name that a module of `Predictor` has in the model's files."""
    for theirs, ours in family.names.items():
        if path == ours:
            return prefix + theirs
    return prefix + family.inner + path.removeprefix("block.")


def _sanitized(family: Family, module: Any, args: Any, prefix: str, weights: Weights) -> Weights:
    """Return weights under `Predictor`'s names and in mlx-lm's shapes."""
    found: Weights = {}
    block: Weights = {}
    for name, value in weights.items():
        rest = name.removeprefix(prefix)
        part, _, kind = rest.rpartition(".")
        if family.norms_from_zero and value.ndim == 1 and part.endswith("norm") | part.startswith("pre_fc_norm"):
            value = value + 1.0
        if part in family.names:
            found[f"{family.names[part]}.{kind}"] = value
        elif not rest.startswith(_COPIES):
            block[f"model.layers.0.{rest.removeprefix(family.inner)}"] = value
    if not family.norms_from_zero:
        # Experts are stacked, attention's matrices split, FP8 read, as in the model's own layers.
        block = module.Model.sanitize(_Shape(replace(args, num_hidden_layers=1)), block)
        if module is deepseek_v3 and args.n_group > 1:
            block = raised(block)
    else:
        block = _stacked(block)
    return found | {name.replace("model.layers.0.", "block.", 1): value for name, value in block.items()}


def _stacked(weights: Weights) -> Weights:
    """Stack experts that have a tensor each: mlx-lm does so only together with all else that it changes."""
    found: Weights = {}
    experts: dict[str, dict[int, mx.array]] = {}
    for name, value in weights.items():
        before, inside, after = name.partition(".mlp.experts.")
        number, _, rest = after.partition(".")
        if inside and number.isdigit():
            experts.setdefault(f"{before}.mlp.switch_mlp.{rest}", {})[int(number)] = value
        else:
            found[name] = value
    for name, each in experts.items():
        found[name] = mx.stack([each[i] for i in range(len(each))])
    return found


class _Shape:
    """What mlx-lm's `sanitize` reads of a model."""

    def __init__(self, args: Any) -> None:
        self.args = args
