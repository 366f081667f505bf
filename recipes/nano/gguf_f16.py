"""Write a trained llama (nano-dense) as a GGUF file of F16 matrices and F32 norms, which llama.cpp runs and quantizes.

    python -m recipes.nano.gguf_f16 MODEL FILE.gguf            # needs the package gguf

The bf16 weights fit into F16 but for those below 2^-14, which are rounded or become zero; the command says how far the
largest change goes. llama.cpp turns neighbouring dimensions of a head where the model turns those half a head apart, so
the rows of the queries' and keys' matrices change places.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from edger1.errors import UsageError

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


def tensors(folder: Path, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the model's weights as f32 under GGUF's names, rows in llama.cpp's order."""
    found = {}
    for name, value in mx.load(str(folder / "model.safetensors")).items():
        plain = np.array(value.astype(mx.float32))
        stem = name.removesuffix(".weight")
        if stem in _WHOLE:
            found[f"{_WHOLE[stem]}.weight"] = plain
            continue
        _, _, layer, part = stem.split(".", 3)
        heads = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}.get(part)
        if heads:
            plain = _neighbouring(plain, config[heads])
        found[f"blk.{layer}.{_LAYER[part]}.weight"] = plain
    return found


def _neighbouring(rows: np.ndarray, heads: int) -> np.ndarray:
    """Bring rows i and i + half of each head side by side."""
    width = rows.shape[0] // heads
    return rows.reshape(heads, 2, width // 2, -1).swapaxes(1, 2).reshape(rows.shape)


def write(folder: Path, file: Path) -> float:
    """Write the GGUF file and return the largest change of a weight.

    Raises UsageError for a model that is no llama.
    """
    from gguf import GGUFWriter

    config = json.loads((folder / "config.json").read_text("utf-8"))
    if config["model_type"] != "llama":
        raise UsageError(f"{folder} is a {config['model_type']}; expected a llama, such as nano-dense.")
    changed = 0.0
    unfinished = file.with_name(f".{file.name}.part")
    try:
        out = GGUFWriter(unfinished, "llama")
        out.add_name("nano-dense")
        out.add_license("Apache-2.0")
        out.add_context_length(config["max_position_embeddings"])
        out.add_embedding_length(config["hidden_size"])
        out.add_block_count(config["num_hidden_layers"])
        out.add_feed_forward_length(config["intermediate_size"])
        out.add_head_count(config["num_attention_heads"])
        out.add_head_count_kv(config["num_key_value_heads"])
        out.add_key_length(config["head_dim"])
        out.add_value_length(config["head_dim"])
        out.add_rope_dimension_count(config["head_dim"])
        out.add_rope_freq_base(config["rope_theta"])
        out.add_layer_norm_rms_eps(config["rms_norm_eps"])
        out.add_vocab_size(config["vocab_size"])
        out.add_file_type(1)  # mostly F16
        _add_tokenizer(out, folder, config["vocab_size"])
        for name, value in tensors(folder, config).items():
            stored = value if value.ndim == 1 else value.astype(np.float16)
            changed = max(changed, float(np.abs(stored.astype(np.float32) - value).max()))
            out.add_tensor(name, stored)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
    return changed


def _add_tokenizer(out: Any, folder: Path, size: int) -> None:
    words = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    about = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    ids = words["model"]["vocab"] | {token["content"]: token["id"] for token in words["added_tokens"]}
    kinds = {token["id"]: _CONTROL if token["special"] else _USER_DEFINED for token in words["added_tokens"]}
    by_id = {number: token for token, number in ids.items()}
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("smollm")
    out.add_token_list([by_id.get(i, f"<unused{i}>") for i in range(size)])
    out.add_token_types([kinds.get(i, _NORMAL if i in by_id else _CONTROL) for i in range(size)])
    out.add_token_merges([" ".join(pair) for pair in words["model"]["merges"]])
    out.add_bos_token_id(ids[about["bos_token"]])
    out.add_eos_token_id(ids[about["eos_token"]])
    out.add_pad_token_id(ids[about["pad_token"]])
    out.add_add_bos_token(True)
    out.add_chat_template(about["chat_template"])


def main() -> int:
    """Write as the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    changed = write(options.model, options.file)
    print(f"{options.file}: {options.file.stat().st_size:,} bytes; the largest change of a weight is {changed:.2g}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
