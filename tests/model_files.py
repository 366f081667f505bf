"""Writes small GGUF and safetensors files for the tests, true ones and lying ones."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_SCALARS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}


@dataclass
class GGUFBytes:
    """Builds a GGUF file byte by byte; `lengths` are the offsets of every u64 count, length, size and offset in it."""

    data: bytearray = field(default_factory=bytearray)
    lengths: list[int] = field(default_factory=list)

    def u32(self, value: int) -> None:
        self.data += struct.pack("<I", value)

    def u64(self, value: int) -> None:
        self.lengths.append(len(self.data))
        self.data += struct.pack("<Q", value)

    def string(self, value: str | bytes) -> None:
        raw = value.encode() if isinstance(value, str) else value
        self.u64(len(raw))
        self.data += raw

    def value(self, kind: int, value: Any) -> None:
        if kind == STRING:
            self.string(value)
        elif kind == ARRAY:
            item_kind, items = value
            self.u32(item_kind)
            self.u64(len(items))
            for item in items:
                self.value(item_kind, item)
        else:
            self.data += struct.pack("<" + _SCALARS[kind], value)


Metadata = dict[str, tuple[int, Any]]
Tensors = dict[str, tuple[int, tuple[int, ...], bytes]]
"""name -> (ggml type, shape with rows first, raw bytes)"""


def gguf_bytes(metadata: Metadata, tensors: Tensors, version: int = 3, alignment: int = 32) -> GGUFBytes:
    out = GGUFBytes()
    out.data += b"GGUF"
    out.u32(version)
    out.u64(len(tensors))
    out.u64(len(metadata))
    for key, (kind, value) in metadata.items():
        out.string(key)
        out.u32(kind)
        out.value(kind, value)
    offset = 0
    for name, (kind, shape, raw) in tensors.items():
        out.string(name)
        out.u32(len(shape))
        for size in reversed(shape):
            out.u64(size)
        out.u32(kind)
        out.u64(offset)
        offset += -(-len(raw) // alignment) * alignment
    for _, _, raw in tensors.values():
        out.data += bytes(-len(out.data) % alignment)
        out.data += raw
    return out


def pack(array: np.ndarray, kind: GGMLQuantizationType) -> tuple[int, tuple[int, ...], bytes]:
    """Return `array` (f32) in a GGUF type, by the gguf package's own quantizer."""
    return int(kind), array.shape, quantize(array.astype(np.float32), kind).tobytes()


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in byte-level BPE, in the order of the bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld", "Ġ hello"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def byte_level_vocabulary() -> Metadata:
    tokens = [*SPECIAL, *byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES)]
    types = [3, 3, 3, 4] + [1] * (len(tokens) - 4)
    return {
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.pre": (STRING, "smollm"),
        "tokenizer.ggml.tokens": (ARRAY, (STRING, tokens)),
        "tokenizer.ggml.token_type": (ARRAY, (I32, types)),
        "tokenizer.ggml.merges": (ARRAY, (STRING, MERGES)),
        "tokenizer.ggml.bos_token_id": (U32, 1),
        "tokenizer.ggml.eos_token_id": (U32, 2),
        "tokenizer.ggml.add_bos_token": (BOOL, 0),
        "tokenizer.chat_template": (STRING, TEMPLATE),
    }


@dataclass(frozen=True)
class Tiny:
    """A tiny model: its weights under Hugging Face's names, and what its GGUF file holds."""

    weights: dict[str, np.ndarray]
    metadata: Metadata
    tensors: Tensors

    def bytes(self) -> GGUFBytes:
        return gguf_bytes(self.metadata, self.tensors)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.bytes().data)
        return path


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Order the rows of a query or key projection as llama.cpp's converter does for the architecture llama."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def tiny_model(
    architecture: str = "llama",
    matrix: GGMLQuantizationType = GGMLQuantizationType.Q4_1,
    embedding: GGMLQuantizationType = GGMLQuantizationType.Q8_0,
    tied: bool = True,
    layers: int = 2,
    hidden: int = 64,
    seed: int = 0,
) -> Tiny:
    """A model of `architecture` with 4 heads over 2 key/value heads and the byte-level vocabulary."""
    rng = np.random.default_rng(seed)
    vocabulary = byte_level_vocabulary()
    rows = len(vocabulary["tokenizer.ggml.tokens"][1][1])
    heads, kv_heads, wide = 4, 2, hidden * 2
    head_dim = hidden // heads
    weights: dict[str, np.ndarray] = {}
    tensors: Tensors = {}

    def add(
        source: str, target: str, shape: tuple[int, ...], kind: GGMLQuantizationType, permuted: int | None = None
    ) -> None:
        array = (rng.standard_normal(shape) * 0.1 + (len(shape) == 1)).astype(np.float32)
        weights[target] = array
        tensors[source] = pack(interleave(array, permuted) if permuted else array, kind)

    add("token_embd.weight", "model.embed_tokens.weight", (rows, hidden), embedding)
    for layer in range(layers):
        shapes: dict[str, tuple[int, ...]] = {
            "attn_norm": (hidden,),
            "ffn_norm": (hidden,),
            "attn_q": (hidden, hidden),
            "attn_k": (kv_heads * head_dim, hidden),
            "attn_v": (kv_heads * head_dim, hidden),
            "attn_output": (hidden, hidden),
            "ffn_gate": (wide, hidden),
            "ffn_up": (wide, hidden),
            "ffn_down": (hidden, wide),
        }
        if architecture == "qwen3":
            shapes |= {"attn_q_norm": (head_dim,), "attn_k_norm": (head_dim,)}
        for name, shape in shapes.items():
            permuted = {"attn_q": heads, "attn_k": kv_heads}.get(name) if architecture == "llama" else None
            target = f"model.layers.{layer}.{_LAYER_NAMES[name]}"
            kind = GGMLQuantizationType.F32 if len(shape) == 1 else matrix
            add(f"blk.{layer}.{name}.weight", f"{target}.weight", shape, kind, permuted)
            if architecture == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
                add(f"blk.{layer}.{name}.bias", f"{target}.bias", shape[:1], GGMLQuantizationType.F32)
    add("output_norm.weight", "model.norm.weight", (hidden,), GGMLQuantizationType.F32)
    if not tied:
        add("output.weight", "lm_head.weight", (rows, hidden), matrix)
    metadata: Metadata = {
        "general.architecture": (STRING, architecture),
        f"{architecture}.block_count": (U32, layers),
        f"{architecture}.context_length": (U32, 256),
        f"{architecture}.embedding_length": (U32, hidden),
        f"{architecture}.feed_forward_length": (U32, wide),
        f"{architecture}.attention.head_count": (U32, heads),
        f"{architecture}.attention.head_count_kv": (U32, kv_heads),
        f"{architecture}.rope.freq_base": (F32, 100000.0),
        f"{architecture}.attention.layer_norm_rms_epsilon": (F32, 1e-5),
        **vocabulary,
    }
    return Tiny(weights, metadata, tensors)


def safetensors_bytes(header: Any, data: bytes, length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def stored(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def dequantized(arrays: dict[str, np.ndarray], path: str, group_size: int = 32) -> np.ndarray:
    """The f32 weights of module `path`, by the definition of MLX's affine format; plain ones as they are."""
    weight = arrays[f"{path}.weight"]
    if f"{path}.scales" not in arrays:
        return weight.astype(np.float32)
    scales, biases = (arrays[f"{path}.{name}"].astype(np.float32)[..., None] for name in ("scales", "biases"))
    bits = 32 * weight.shape[1] // (scales.shape[1] * group_size)
    codes = weight[..., None] >> np.arange(0, 32, bits, dtype=np.uint32) & np.uint32((1 << bits) - 1)
    grouped = codes.reshape(*scales.shape[:2], group_size).astype(np.float32)
    return (grouped * scales + biases).reshape(weight.shape[0], -1)
