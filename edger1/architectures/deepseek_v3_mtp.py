"""DeepSeek-V3 with its multi-token prediction (MTP) layers, which mlx-lm leaves out.

Layer k of DeepSeek-V3's MTP (arXiv 2412.19437, section 2.2) predicts the token after the next one: for position i it
joins what the model made of tokens up to i with the embedding of token i + 1,

    h'_i = M [RMSNorm(Emb(t_{i+1})); RMSNorm(h_i)]        M: eh_proj, the norms: enorm, hnorm

passes h' through one transformer block of its own, and lets the shared head read token i + 2 from the result, normed by
shared_head.norm. h_i is the model's hidden state after its last norm, as in the inference programs that run the
published weights; the embedding comes first in the concatenation, as in those weights.

On disk an MTP layer is `model.layers.{n}` for n >= num_hidden_layers, with `enorm`, `hnorm`, `eh_proj` and
`shared_head.norm` beside an ordinary layer's names. Published weights also hold copies of the embedding and head there;
here both are shared, so the copies are dropped on reading and not written.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.deepseek_v3 import DeepseekV3DecoderLayer

from edger1.architectures import deepseek_v3
from edger1.architectures.deepseek_v3 import ModelArgs, layer_of

__all__ = ["MTPLayer", "Model", "ModelArgs", "hub_weights"]


class SharedHead(nn.Module):
    """The norm before the head; the head itself is the model's."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)


class MTPLayer(DeepseekV3DecoderLayer):
    """One MTP layer: an ordinary decoder layer between a projection and a norm."""

    def __init__(self, args: ModelArgs, layer_idx: int) -> None:
        super().__init__(args, layer_idx)
        self.enorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.hnorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * args.hidden_size, args.hidden_size, bias=False)
        self.shared_head = SharedHead(args)

    def join(self, hidden: mx.array, embedded: mx.array) -> mx.array:
        """Return h' [B, L, D] of hidden states [B, L, D] and the embeddings [B, L, D] of the tokens after them."""
        return self.eh_proj(mx.concatenate([self.enorm(embedded), self.hnorm(hidden)], axis=-1))

    def predict(
        self, hidden: mx.array, embedded: mx.array, mask: mx.array | None = None, cache: Any | None = None
    ) -> mx.array:
        """Return the hidden states that, after `shared_head.norm`, the head reads token i + 2 from."""
        return super().__call__(self.join(hidden, embedded), mask, cache)


class Model(deepseek_v3.Model):
    """The model, whose `__call__` is mlx-lm's, with the MTP layers in `mtp`."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        first = args.num_hidden_layers
        self.mtp = [MTPLayer(args, first + i) for i in range(args.num_nextn_predict_layers)]

    def mtp_logits(
        self, layer: int, hidden: mx.array, tokens: mx.array, mask: mx.array | None = None, cache: Any | None = None
    ) -> mx.array:
        """Return logits [B, L, V] of the tokens after `tokens` [B, L], which follow the hidden states [B, L, D]."""
        mtp = self.mtp[layer]
        out = mtp.predict(hidden, self.model.embed_tokens(tokens), mask, cache)
        return self.lm_head(mtp.shared_head.norm(out))

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Bring a checkpoint's names and shapes into the module's, the MTP layers' among them."""
        first, count = self.args.num_hidden_layers, self.args.num_nextn_predict_layers
        shaped = super().sanitize(weights)
        own = {name: value for name, value in weights.items() if layer_of(name) is not None}
        for name, value in deepseek_v3.sanitized(self.args, own, first, count).items():
            if ".embed_tokens." not in name and ".shared_head.head." not in name:
                _, _, layer, rest = name.split(".", 3)
                shaped[f"mtp.{int(layer) - first}.{rest}"] = value
        return shaped


def hub_weights(model: Model) -> dict[str, mx.array]:
    """Return a model's weights under the names and in the shapes of DeepSeek's own checkpoints.

    Experts are one tensor each, embed_q and unembed_out are joined to kv_b_proj, and MTP layer i is
    `model.layers.{num_hidden_layers + i}`. `Model.sanitize` undoes it.
    """
    from mlx.utils import tree_flatten

    args = model.args
    found: dict[str, mx.array] = {}
    for name, value in tree_flatten(model.parameters()):
        if name.startswith("mtp."):
            _, index, rest = name.split(".", 2)
            name = f"model.layers.{args.num_hidden_layers + int(index)}.{rest}"
        if ".mlp.switch_mlp." in name:
            prefix, rest = name.split(".mlp.switch_mlp.")
            for expert in range(args.n_routed_experts):
                found[f"{prefix}.mlp.experts.{expert}.{rest}"] = value[expert]
        elif name.endswith(".embed_q.weight"):
            prefix = name.removesuffix(".embed_q.weight")
            found.setdefault(f"{prefix}.kv_b_proj.weight", value)
        elif not name.endswith(".unembed_out.weight"):
            found[name] = value
    for attention, prefix in _attentions(model):
        keys = attention.embed_q.weight.swapaxes(-1, -2)
        joined = mx.concatenate([keys, attention.unembed_out.weight], axis=1)
        found[f"{prefix}.kv_b_proj.weight"] = joined.reshape(-1, args.kv_lora_rank)
    return found


def _attentions(model: Model) -> list[tuple[Any, str]]:
    return [
        (layer.self_attn, f"model.layers.{i}.self_attn") for i, layer in enumerate([*model.model.layers, *model.mtp])
    ]
