"""A model as a GGUF file of F16 matrices and F32 vectors, with its tokenizer, for llama.cpp: Llama, Qwen2 and Qwen3.

Names of tensors and metadata are those of gguf-py. Two things are not a matter of names. llama.cpp turns neighbouring
elements of a head in its `llama` architecture where the model turns those half a head apart, so rows of queries and
keys change places. And a byte-level tokenizer's way of splitting text is one of llama.cpp's list, found by the
expressions in tokenizer.json. What has no place in the format is an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from edger1.errors import FormatError, UsageError
from edger1.quant.formats.folder import read_json
from edger1.quant.tokenizer import CONTROL, NORMAL, UNUSED, USER_DEFINED, splitting_name
from edger1.train.adapters.export import check_destination, opened
from edger1.train.adapters.fuse import Fused
from edger1.train.folder_writer import SaveError

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_MOSTLY_F16 = 1
_F16_MAX = 65504.0


def write_gguf(file: Path, folder: Path, adapter: Path | None) -> Fused | None:
    """Write a model as one GGUF file, whole or not at all.

    Raises UsageError for a model or tokenizer that cannot be written so, SaveError where the disk refuses.
    """
    from gguf import GGUFWriter

    check_destination(file)
    config = read_json(folder / "config.json")
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type not in ARCHITECTURES:
        raise UsageError(f"A {model_type} cannot be written as GGUF; {', '.join(ARCHITECTURES)} can.")
    words = _Vocabulary(folder)
    model, config, fused = opened(folder, adapter, dequantize=True)
    unfinished = file.with_name(f".{file.name}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        out = GGUFWriter(unfinished, ARCHITECTURES[model_type], use_temp_file=True)
        out.add_name(folder.name)
        _add_sizes(out, config, _head_dim(config))
        words.add(out, config["vocab_size"])
        for name, value in _tensors(model, config):
            out.add_tensor(name, value)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
        unfinished.replace(file)
    except OSError as error:
        raise SaveError(f"{file} could not be saved ({(error.strerror or str(error)).lower()}).") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return fused


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _add_sizes(out: Any, config: dict[str, Any], head_dim: int) -> None:
    out.add_context_length(config.get("max_position_embeddings", 4096))
    out.add_embedding_length(config["hidden_size"])
    out.add_block_count(config["num_hidden_layers"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(config["num_attention_heads"])
    out.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    out.add_key_length(head_dim)
    out.add_value_length(head_dim)
    out.add_rope_dimension_count(head_dim)
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_vocab_size(config["vocab_size"])
    out.add_file_type(_MOSTLY_F16)
    scaling, theta = _rope(config)
    out.add_rope_freq_base(theta)
    if scaling and (scaling.get("rope_type") or scaling.get("type")) == "linear":
        from gguf import RopeScalingType

        out.add_rope_scaling_type(RopeScalingType.LINEAR)
        out.add_rope_scaling_factor(scaling["factor"])


def _rope(config: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """Return how positions are scaled, {} for not at all, and the base. Raises UsageError for other ways."""
    parameters = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or parameters
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise UsageError(f"RoPE scaled as {kind!r} cannot be written as GGUF here; none, linear and llama3 can.")
    if config.get("use_sliding_window") or config.get("attn_temperature") or config.get("layer_types"):
        kinds = set(config.get("layer_types") or ["other"])
        if kinds != {"full_attention"}:
            raise UsageError("Attention within a window cannot be written as GGUF here.")
    theta = config.get("rope_theta") or parameters.get("rope_theta") or 10000.0
    return ({} if kind == "default" else scaling), float(theta)


def _tensors(model: Any, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield a model's weights under GGUF's names, a tensor in memory at a time."""
    head_dim, interleaved = _head_dim(config), ARCHITECTURES[config["model_type"]] == "llama"
    scaling, theta = _rope(config)
    if (scaling.get("rope_type") or scaling.get("type")) == "llama3":
        yield "rope_freqs.weight", _llama3_factors(scaling, theta, head_dim)
    for name, value in tree_flatten(model.parameters()):
        stem, _, part = name.rpartition(".")
        if stem in _WHOLE:
            target = f"{_WHOLE[stem]}.{part}"
        else:
            _, _, layer, own = stem.split(".", 3) if stem.startswith("model.layers.") else ("", "", "", stem)
            if own not in _LAYER:
                raise UsageError(f"{name} has no place in a GGUF file of this architecture.")
            target = f"blk.{layer}.{_LAYER[own]}.{part}"
        plain = np.array(value.astype(mx.float32))
        if interleaved and stem.endswith(("q_proj", "k_proj")):
            plain = _neighbouring(plain, head_dim)
        if plain.ndim > 1:
            if float(np.abs(plain).max(initial=0.0)) > _F16_MAX:
                raise FormatError(f"{name} holds numbers beyond what F16 can hold.")
            plain = plain.astype(np.float16)
        yield target, plain


def _neighbouring(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Bring rows i and i + half of each head side by side."""
    return rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _llama3_factors(scaling: dict[str, Any], theta: float, head_dim: int) -> np.ndarray:
    """Return by what each frequency is divided (Llama 3.1): long waves by `factor`, short ones by 1, others blended."""
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    original = scaling["original_max_position_embeddings"]
    waves = 2 * math.pi * theta ** (np.arange(head_dim // 2) * 2 / head_dim)
    blend = (original / waves - low) / (high - low)
    between = 1 / ((1 - blend) / factor + blend)
    return np.where(waves > original / low, factor, np.where(waves < original / high, 1.0, between)).astype(np.float32)


class _Vocabulary:
    """What a GGUF file says of a tokenizer."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        words = read_json(folder / "tokenizer.json")
        about = read_json(folder / "tokenizer_config.json")
        model = words.get("model") if isinstance(words, dict) else None
        if not isinstance(model, dict) or not isinstance(about, dict) or model.get("type") != "BPE":
            raise UsageError(f"The tokenizer in {folder} is no BPE, which is all that can be written as GGUF here.")
        self.pre = splitting_name(words)
        if self.pre is None:
            raise UsageError(
                f"The tokenizer in {folder} splits text in a way that has no name in GGUF, or is SentencePiece's; it "
                "cannot be written there."
            )
        added = words.get("added_tokens") or []
        self.ids = model["vocab"] | {token["content"]: token["id"] for token in added}
        self._kinds = {token["id"]: CONTROL if token["special"] else USER_DEFINED for token in added}
        self._merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        self._special = {name: self._id(about.get(f"{name}_token")) for name in ("bos", "eos", "pad")}
        first = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a").ids[:1]
        self._begins = self._special["bos"] is not None and first == [self._special["bos"]]
        template = about.get("chat_template")
        beside = folder / "chat_template.jinja"
        self._template = beside.read_text("utf-8") if beside.exists() else template

    def _id(self, token: Any) -> int | None:
        text = token.get("content") if isinstance(token, dict) else token
        return self.ids.get(text) if isinstance(text, str) else None

    def add(self, out: Any, size: int) -> None:
        """Add the metadata for a model with `size` rows of embeddings."""
        by_id = {number: token for token, number in self.ids.items()}
        out.add_tokenizer_model("gpt2")
        out.add_tokenizer_pre(self.pre)
        out.add_token_list([by_id.get(i, f"[PAD{i}]") for i in range(size)])
        out.add_token_types([self._kinds.get(i, NORMAL if i in by_id else UNUSED) for i in range(size)])
        out.add_token_merges(self._merges)
        for name, add in (
            ("bos", out.add_bos_token_id),
            ("eos", out.add_eos_token_id),
            ("pad", out.add_pad_token_id),
        ):
            if self._special[name] is not None:
                add(self._special[name])
        out.add_add_bos_token(self._begins)
        if isinstance(self._template, str):
            out.add_chat_template(self._template)
        elif self._template is not None:
            out.add_chat_template(json.loads(json.dumps(self._template)))
