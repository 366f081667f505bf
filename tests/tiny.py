"""A tiny random model in a folder, which the tests load as they would a real one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
TINY_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "eos_token_id": 257,
}

MIXTURE = {
    "model_type": "qwen3_moe",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "moe_intermediate_size": 192,
    "num_experts": 64,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "vocab_size": 300,
}


def _alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def spoken_ids() -> list[int]:
    """Return the tokens of printable ASCII."""
    return [i for i, c in enumerate(_alphabet()) if " " < c <= "~"]


def _spoken(head: Any) -> Any:
    """Let a model say nothing but printable ASCII, so that its words are text: every other token's logit is 0."""
    import mlx.core as mx

    mask = mx.zeros((head.shape[0], 1))
    mask[mx.array(spoken_ids())] = 1
    return head * mask


def write_tokenizer(folder: Path, template: str | None = CHAT_TEMPLATE) -> None:
    """A byte-level tokenizer: one token a byte, and the special tokens of ChatML and of thinking."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(_alphabet())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_tiny_model(folder: Path, *, seed: int = 0, template: str | None = CHAT_TEMPLATE, **overrides: object) -> Path:
    """A llama of two layers with random weights, 4-bit quantized, in the layout that mlx-lm writes."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.models import llama

    folder.mkdir(parents=True, exist_ok=True)
    config = {**TINY_CONFIG, **overrides}
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.update(tree_map(lambda w: w * 8 if w.ndim > 1 else w, model.parameters()))
    model.lm_head.weight = _spoken(model.lm_head.weight)
    nn.quantize(model, group_size=32, bits=4)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    config["quantization"] = {"group_size": 32, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_tokenizer(folder, template)
    return folder


def write_predicting(folder: Path) -> Path:
    """A MiMo of two layers with random f32 weights, all layers one operation to the kernels, and an MTP layer."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.models import mimo

    folder.mkdir(parents=True, exist_ok=True)
    config = {**TINY_CONFIG, "model_type": "mimo", "num_nextn_predict_layers": 1, "attention_bias": True}
    mx.random.seed(0)
    model = mimo.Model(mimo.ModelArgs.from_dict(config))
    model.update(tree_map(lambda w: w * 8 if w.ndim > 1 else w, model.parameters()))
    model.lm_head.weight = _spoken(model.lm_head.weight)
    weights = dict(tree_flatten(model.parameters()))
    layer, width = "model.mtp_layers.0.", model.args.hidden_size
    block = mimo.TransformerBlock(model.args)
    weights |= {layer + name: array for name, array in tree_flatten(block.parameters())}
    norms = ("token_layernorm", "hidden_layernorm", "final_layernorm")
    weights |= {f"{layer}{name}.weight": mx.ones(width) for name in norms}
    weights[f"{layer}input_proj.weight"] = mx.random.normal((width, 2 * width)) * 0.1
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_tokenizer(folder)
    return folder


def write_mixture(folder: Path) -> Path:
    """A Qwen3 of two layers with 64 experts each, two a token: random f32 weights, 38 MB of them experts."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import qwen3_moe

    mx.random.seed(0)
    model = qwen3_moe.Model(qwen3_moe.ModelArgs.from_dict(MIXTURE))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(MIXTURE), encoding="utf-8")
    write_tokenizer(folder)
    return folder
