"""A model to be trained, built from a config: checked first, then given its first weights.

Weights are f32 while training. Matrices begin normal with `std`, those that write into the residual stream narrower by
the square root of their number (GPT-2), norms at one, a router's correction bias at zero.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from edger1.errors import UsageError
from edger1.mlx_runtime import prepare

_OUTPUTS = (".o_proj.weight", ".down_proj.weight")


def build(config: dict[str, Any], vocabulary: int | None = None, std: float = 0.02, seed: int = 0) -> Any:
    """Return a model of a config with random f32 weights that depend on `seed` only.

    `vocabulary` is the tokenizer's size; it stands in where the config has no vocab_size and is checked where it has.

    Raises UsageError for an architecture that cannot be trained from nothing and for a config that does not hang
    together.
    """
    prepare()
    if vocabulary is not None:
        config = {"vocab_size": vocabulary, **config}
    check(config, vocabulary)
    config = complete(config)
    args_class, model_class = _classes(config["model_type"])
    model = model_class(args_class.from_dict(config))
    _initialize(model, std, mx.random.key(seed))
    model.train()
    return model


def complete(config: dict[str, Any], tokenizer: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a config as config.json holds it, with all that mlx-lm and transformers would each assume otherwise.

    `tokenizer` adds what the tokenizer knows: vocab_size where the config has none, and the special tokens' ids.
    """
    _, (name, _) = _kind(config["model_type"])
    heads = config["num_attention_heads"]
    common = {"num_key_value_heads": heads, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
    if config["model_type"] == "llama":
        own: dict[str, Any] = {"head_dim": config["hidden_size"] // heads, "tie_word_embeddings": True}
    else:
        own = _DEEPSEEK_DEFAULTS
    return {"architectures": [name], **common, **own, **(tokenizer or {}), **config, "dtype": "bfloat16"}


def parameters(model: Any) -> dict[str, mx.array]:
    """Return all weights by name, those that gradients do not reach (a router's bias) among them."""
    return dict(tree_flatten(model.parameters()))


def assign(model: Any, weights: dict[str, mx.array]) -> None:
    """Put weights of these names in the model's place."""
    model.update(tree_unflatten(list(weights.items())))


def active_parameters(config: dict[str, Any]) -> int:
    """Return how many weights of matrices a token passes: the head and chosen experts count, embedding and MTP not."""
    d, layers = config["hidden_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    head = config["vocab_size"] * d
    if config["model_type"] == "llama":
        size = config.get("head_dim") or d // heads
        attention = 2 * d * heads * size + 2 * d * (config.get("num_key_value_heads") or heads) * size
        return head + layers * (attention + 3 * d * config["intermediate_size"])
    latent, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    q_rank = config.get("q_lora_rank")
    queries = heads * (nope + rope)
    attention = (d * q_rank + q_rank * queries) if q_rank else d * queries
    attention += d * (latent + rope) + latent * heads * (nope + value) + heads * value * d
    dense = min(config.get("first_k_dense_replace", 0), layers)
    used = config["num_experts_per_tok"] + (config.get("n_shared_experts") or 0)
    expert = 3 * d * config["moe_intermediate_size"]
    sparse = used * expert + d * config["n_routed_experts"]
    return head + layers * attention + dense * 3 * d * config["intermediate_size"] + (layers - dense) * sparse


def _kind(model_type: str) -> tuple[str, tuple[str, Any]]:
    if model_type == "llama":
        return model_type, ("LlamaForCausalLM", _LLAMA)
    if model_type == "deepseek_v3":
        return model_type, ("DeepseekV3ForCausalLM", _DEEPSEEK)
    raise UsageError(f"model_type is {model_type!r}; deepseek_v3 and llama can be trained from nothing.")


def _classes(model_type: str) -> tuple[Any, Any]:
    if model_type == "llama":
        from mlx_lm.models import llama

        return llama.ModelArgs, llama.Model
    from edger1.architectures import deepseek_v3_mtp

    return deepseek_v3_mtp.ModelArgs, deepseek_v3_mtp.Model


_LLAMA = ("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "vocab_size")
_DEEPSEEK = (
    *_LLAMA,
    "moe_intermediate_size",
    "n_routed_experts",
    "num_experts_per_tok",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
)
_DEEPSEEK_DEFAULTS: dict[str, Any] = {
    "q_lora_rank": None,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "attention_bias": False,
    "num_nextn_predict_layers": 0,
    "tie_word_embeddings": False,
}
_OPTIONAL = ("q_lora_rank", "n_shared_experts", "num_key_value_heads", "head_dim", "n_group", "topk_group")
_COUNTS = ("num_nextn_predict_layers", "first_k_dense_replace")


def check(config: dict[str, Any], vocabulary: int | None = None) -> None:
    """Raise UsageError for the first thing in a config that is missing, no size, or at odds with another."""
    model_type, (_, needed) = _kind(config["model_type"])
    for name in needed:
        if config.get(name) is None:
            raise UsageError(f"The model's config has no {name}, which {model_type} needs.")
    for name in (*needed, *_OPTIONAL):
        value = config.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise UsageError(f"{name} is {value!r}; expected a whole number above 0.")
    for name in _COUNTS:
        value = config.get(name, 0)
        if type(value) is not int or value < 0:
            raise UsageError(f"{name} is {value!r}; expected a whole number, 0 or more.")
    if vocabulary is not None and config["vocab_size"] < vocabulary:
        raise UsageError(
            f"vocab_size is {config['vocab_size']}, and the tokenizer has {vocabulary} tokens; give at least that many."
        )
    if model_type == "deepseek_v3" and config.get("tie_word_embeddings"):
        raise UsageError("tie_word_embeddings is true; deepseek_v3 has a head of its own.")
    for name in ("rope_scaling", "attention_bias", "mlp_bias"):
        if config.get(name):
            raise UsageError(f"{name} is {config[name]!r}; training from nothing does without it, leave it out.")
    (_check_llama if model_type == "llama" else _check_deepseek)(config)


def _check_llama(config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    if heads % groups:
        raise UsageError(
            f"num_attention_heads is {heads} and num_key_value_heads {groups}; the second must divide the first."
        )
    if not config.get("head_dim") and config["hidden_size"] % heads:
        raise UsageError(
            f"hidden_size {config['hidden_size']} is no multiple of num_attention_heads {heads}; "
            "change one, or give head_dim."
        )
    size = config.get("head_dim") or config["hidden_size"] // heads
    if size % 2:
        raise UsageError(f"A head has {size} dimensions; rotary positions need an even number.")


def _check_deepseek(config: dict[str, Any]) -> None:
    if config["qk_rope_head_dim"] % 2:
        raise UsageError(f"qk_rope_head_dim is {config['qk_rope_head_dim']}; rotary positions need an even number.")
    heads = config["num_attention_heads"]
    if config.get("num_key_value_heads", heads) != heads:
        raise UsageError(
            f"num_key_value_heads is {config['num_key_value_heads']}; latent attention has as many as "
            f"num_attention_heads, {heads}."
        )
    experts, chosen = config["n_routed_experts"], config["num_experts_per_tok"]
    if chosen > experts:
        raise UsageError(f"num_experts_per_tok is {chosen}, and there are {experts} routed experts.")
    groups, kept = config.get("n_group", 1), config.get("topk_group", 1)
    if experts % groups:
        raise UsageError(f"n_group is {groups}, which does not divide the {experts} routed experts.")
    if kept > groups:
        raise UsageError(f"topk_group is {kept}, and there are {groups} groups of experts.")
    if groups > 1 and experts // groups < 2:
        raise UsageError(f"A group has {experts // groups} expert; groups are chosen by their best two.")
    if chosen > experts // groups * kept:
        raise UsageError(
            f"num_experts_per_tok is {chosen}, and {kept} of {groups} groups hold {experts // groups * kept} experts."
        )
    for name in ("kv_lora_rank", "q_lora_rank"):
        if (config.get(name) or 0) > config["hidden_size"]:
            raise UsageError(
                f"{name} is {config[name]}, more than hidden_size {config['hidden_size']}: that compresses nothing."
            )
    if config.get("first_k_dense_replace", 0) >= config["num_hidden_layers"]:
        raise UsageError(
            f"first_k_dense_replace is {config['first_k_dense_replace']} of {config['num_hidden_layers']} layers: "
            "no layer has experts."
        )
    if config.get("num_nextn_predict_layers", 0) > 1:
        raise UsageError(
            f"num_nextn_predict_layers is {config['num_nextn_predict_layers']}; training knows one MTP layer."
        )


def _initialize(model: Any, std: float, key: mx.array) -> None:
    weights = parameters(model)
    writers = sum(name.endswith(_OUTPUTS) for name in weights)
    found: dict[str, mx.array] = {}
    for name in sorted(weights):
        value = weights[name]
        if value.ndim < 2:
            at_rest = mx.zeros if name.endswith(("_bias", ".bias")) else mx.ones
            found[name] = at_rest(value.shape, dtype=mx.float32)
            continue
        key, own = mx.random.split(key)
        width = std / math.sqrt(writers) if name.endswith(_OUTPUTS) else std
        found[name] = mx.random.normal(value.shape, scale=width, key=own)
    assign(model, found)
    mx.eval(model.parameters())
