"""Maps a GGUF model onto the layout that mlx-lm reads: config.json, and where each tensor goes.

Metadata keys and tensor names after ggml's docs/gguf.md and llama.cpp's gguf-py; target names after the Hugging Face
model classes, which mlx-lm follows.

llama.cpp rotates neighbouring elements in architecture `llama` and therefore stores the rows of its query and key
projections interleaved; mlx-lm rotates halves, so these rows are put back in their first order. The qwen architectures
rotate halves in both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from edger1.errors import FormatError
from edger1.quant.formats.gguf import Header
from edger1.quant.formats.gguf_parts import GGUFParts

ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
"""GGUF architecture -> (model_type, class name) in config.json."""

LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every Llama 3.1 to 3.3 and every model made from them uses; the GGUF holds only the resulting factors."""

_ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Placement:
    """Tensor `source` of the file becomes `target`.

    `heads` is the number of heads whose rows are to be put back, `shift` is to be added to each number.
    """

    source: str
    target: str
    heads: int | None = None
    shift: float = 0.0


@dataclass(frozen=True)
class Plan:
    """A model's config.json without its quantization and token ids, and a placement for every tensor to convert."""

    config: dict[str, Any]
    placements: tuple[Placement, ...]


@dataclass(frozen=True)
class _Sizes:
    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


def plan(header: Header, rope_factors: np.ndarray | None = None) -> Plan:
    """Work out the layout. `rope_factors` is the content of `rope_freqs.weight` where the file has it.

    Raises FormatError for an architecture or a variant of one that is not supported, and where tensors are missing,
    left over or of another shape than the metadata says.
    """
    name = header.text("general.architecture")
    if name not in ARCHITECTURES:
        raise FormatError(
            f"{header.name} has the architecture {name[:40]!r}; GGUF files of {', '.join(ARCHITECTURES)} can be "
            "converted. Get this model as an MLX folder instead."
        )
    sizes = _sizes(header, name)
    _refuse_variants(header, name, sizes)
    shapes = _expected(header, name, sizes)
    _check_tensors(header, shapes)
    model_type, class_name = ARCHITECTURES[name]
    config: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.feed_forward,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "max_position_embeddings": _positive(header, f"{name}.context_length"),
        "rms_norm_eps": _positive_number(header, f"{name}.attention.layer_norm_rms_epsilon"),
        "rope_theta": _positive_number(header, f"{name}.rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "vocab_size": sizes.vocabulary,
    }
    if name == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in header.tensors
    if (scaling := _rope_scaling(header, name, config, rope_factors)) is not None:
        config["rope_scaling"] = scaling
    return Plan(config, tuple(placement for placement, _ in shapes))


def read_rope_factors(file: GGUFParts) -> np.ndarray | None:
    """Return the RoPE frequency factors of a file, or None where it has none."""
    tensor = file.header.tensors.get(_ROPE_FACTORS)
    if tensor is None:
        return None
    if tensor.type.name != "F32" or tensor.nbytes > 1 << 20:
        raise FormatError(
            f"{file.path.name}: tensor {tensor.name!r} should be a short F32 vector; the file is damaged."
        )
    return file.read(tensor).view("<f4")


def restored_rows(rows: int, heads: int) -> np.ndarray:
    """Return the row indices that undo llama.cpp's interleaving: take(rows) is in half-rotation order."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def _sizes(header: Header, name: str) -> _Sizes:
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise FormatError(f"{header.name} has no matrix 'token_embd.weight'; it is no whole language model.")
    heads = _positive(header, f"{name}.attention.head_count")
    hidden = _positive(header, f"{name}.embedding_length")
    sizes = _Sizes(
        layers=_positive(header, f"{name}.block_count"),
        hidden=hidden,
        feed_forward=_positive(header, f"{name}.feed_forward_length"),
        heads=heads,
        kv_heads=_positive(header, f"{name}.attention.head_count_kv", heads),
        head_dim=_positive(header, f"{name}.attention.key_length", max(1, hidden // heads)),
        vocabulary=embedding.shape[0],
    )
    if sizes.layers > len(header.tensors):
        raise FormatError(
            f"{header.name} claims {sizes.layers:,} layers but holds {len(header.tensors)} tensors; it is damaged."
        )
    if sizes.heads % sizes.kv_heads or sizes.head_dim % 2:
        raise FormatError(
            f"{header.name} claims {sizes.heads} heads over {sizes.kv_heads} key/value heads of {sizes.head_dim} "
            "elements; heads must divide evenly and be of even size."
        )
    return sizes


def _refuse_variants(header: Header, name: str, sizes: _Sizes) -> None:
    def refuse(what: str) -> FormatError:
        return FormatError(
            f"{header.name} is a {name} model with {what}, which cannot be converted. Get it as an MLX folder instead."
        )

    if header.integer(f"{name}.expert_count", 0):
        raise refuse("experts")
    if header.integer(f"{name}.attention.value_length", sizes.head_dim) != sizes.head_dim:
        raise refuse("values of another size than its keys")
    if header.integer(f"{name}.rope.dimension_count", sizes.head_dim) != sizes.head_dim:
        raise refuse("rotary embeddings over a part of each head")
    if name == "qwen2" and sizes.head_dim * sizes.heads != sizes.hidden:
        raise refuse("heads that do not add up to its hidden size")


def _expected(header: Header, name: str, sizes: _Sizes) -> list[tuple[Placement, tuple[int, ...]]]:
    """List every tensor that the model has: where it goes and the shape it must have."""
    interleaved = name == "llama"
    hidden, wide, narrow = sizes.hidden, sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    query_heads, key_heads = (sizes.heads, sizes.kv_heads) if interleaved else (None, None)
    biased = name == "qwen2" or "blk.0.attn_q.bias" in header.tensors
    found: list[tuple[Placement, tuple[int, ...]]] = []

    def add(source: str, target: str, *shape: int, heads: int | None = None) -> None:
        found.append((Placement(source, target, heads), shape))

    add("token_embd.weight", "model.embed_tokens.weight", sizes.vocabulary, hidden)
    for layer in range(sizes.layers):
        here, there = f"blk.{layer}", f"model.layers.{layer}"
        add(f"{here}.attn_norm.weight", f"{there}.input_layernorm.weight", hidden)
        add(f"{here}.ffn_norm.weight", f"{there}.post_attention_layernorm.weight", hidden)
        linears: list[tuple[str, str, int, int, bool, int | None]] = [
            ("attn_q", "self_attn.q_proj", wide, hidden, biased, query_heads),
            ("attn_k", "self_attn.k_proj", narrow, hidden, biased, key_heads),
            ("attn_v", "self_attn.v_proj", narrow, hidden, biased, None),
            ("attn_output", "self_attn.o_proj", hidden, wide, biased and name == "llama", None),
        ]
        mlp_biased = name == "llama" and "blk.0.ffn_gate.bias" in header.tensors
        linears += [
            ("ffn_gate", "mlp.gate_proj", sizes.feed_forward, hidden, mlp_biased, None),
            ("ffn_up", "mlp.up_proj", sizes.feed_forward, hidden, mlp_biased, None),
            ("ffn_down", "mlp.down_proj", hidden, sizes.feed_forward, mlp_biased, None),
        ]
        for source, target, rows, columns, has_bias, heads in linears:
            add(f"{here}.{source}.weight", f"{there}.{target}.weight", rows, columns, heads=heads)
            if has_bias:
                add(f"{here}.{source}.bias", f"{there}.{target}.bias", rows, heads=heads)
        if name == "qwen3":
            add(f"{here}.attn_q_norm.weight", f"{there}.self_attn.q_norm.weight", sizes.head_dim)
            add(f"{here}.attn_k_norm.weight", f"{there}.self_attn.k_norm.weight", sizes.head_dim)
    add("output_norm.weight", "model.norm.weight", hidden)
    if "output.weight" in header.tensors:
        add("output.weight", "lm_head.weight", sizes.vocabulary, hidden)
    return found


def _check_tensors(header: Header, expected: list[tuple[Placement, tuple[int, ...]]]) -> None:
    for placement, shape in expected:
        tensor = header.tensors.get(placement.source)
        if tensor is None:
            raise FormatError(f"{header.name} lacks the tensor {placement.source!r}; it is incomplete or of a variant.")
        if tensor.shape != shape:
            raise FormatError(
                f"{header.name}: tensor {tensor.name!r} has the shape {list(tensor.shape)}, but the metadata "
                f"call for {list(shape)}; the file is damaged."
            )
    left = header.tensors.keys() - {placement.source for placement, _ in expected} - {_ROPE_FACTORS}
    if left:
        raise FormatError(
            f"{header.name} holds {len(left)} tensors that its architecture has no place for, such as {min(left)!r}; "
            "this variant cannot be converted. Get the model as an MLX folder instead."
        )


def _rope_scaling(
    header: Header, name: str, config: dict[str, Any], rope_factors: np.ndarray | None
) -> dict[str, Any] | None:
    kind = header.text(f"{name}.rope.scaling.type", "none")
    if rope_factors is not None:
        if kind not in ("none", "llama3"):
            raise FormatError(
                f"{header.name} has RoPE factors and {kind[:40]!r} scaling at once, which is not supported."
            )
        return _llama3_scaling(header, config, rope_factors)
    if kind == "none":
        return None
    factor = _positive_number(header, f"{name}.rope.scaling.factor", 1.0)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and header.number(f"{name}.rope.scaling.attn_factor", 1.0) == 1.0:
        original = _positive(header, f"{name}.rope.scaling.original_context_length")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise FormatError(
        f"{header.name} uses RoPE scaling {kind[:40]!r} in a form that cannot be converted; none, linear and yarn can. "
        "Get the model as an MLX folder instead."
    )


def _llama3_scaling(header: Header, config: dict[str, Any], factors: np.ndarray) -> dict[str, Any]:
    """Find the parameters that the factors were computed from, by computing them again.

    Formula after Meta's Llama 3.1 release: long wavelengths are slowed by `factor`, short ones kept, those between
    blended.
    """
    half = config["head_dim"] // 2
    if factors.shape == (half,) and np.isfinite(factors).all() and factors.min() > 0:
        factor = float(factors.max())
        low, high = LLAMA3_SCALING["low_freq_factor"], LLAMA3_SCALING["high_freq_factor"]
        original = LLAMA3_SCALING["original_max_position_embeddings"]
        wavelengths = 2 * math.pi * config["rope_theta"] ** (np.arange(half) * 2 / config["head_dim"])
        blend = (original / wavelengths - low) / (high - low)
        expected = np.where(
            wavelengths > original / low,
            factor,
            np.where(wavelengths < original / high, 1.0, 1 / ((1 - blend) / factor + blend)),
        )
        if np.allclose(factors, expected, rtol=1e-3, atol=0):
            return {"rope_type": "llama3", "factor": factor, **LLAMA3_SCALING}
    raise FormatError(
        f"{header.name} has RoPE factors other than those of Llama 3.1, which cannot be converted. "
        "Get the model as an MLX folder instead."
    )


def _positive(header: Header, key: str, default: int | None = None) -> int:
    value = header.integer(key, default)
    if not 0 < value < 1 << 31:
        raise FormatError(f"{header.name}: metadata {key!r} is {value:,}; expected a positive number below 2^31.")
    return value


def _positive_number(header: Header, key: str, default: float | None = None) -> float:
    value = header.number(key, default)
    if not (math.isfinite(value) and value > 0):
        raise FormatError(f"{header.name}: metadata {key!r} is {value}; expected a positive number.")
    # GGUF keeps it in f32: 1e-05 arrives as 9.999999747378752e-06. The shortest decimal names the same f32.
    return float(str(np.float32(value))) if float(np.float32(value)) == value else value
