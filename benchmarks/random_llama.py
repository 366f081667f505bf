"""A llama of a given shape with random weights, as one GGUF that llama.cpp runs and EdgeR1 converts.

What a kernel costs does not depend on the numbers, so a model too large to fetch can be measured without its weights.
Every matrix is Q4_0, written as random codes with one scale: what `llama-quantize --pure` makes of random weights,
without the file of five times the size in between. The vocabulary is SmolLM2's, filled up with unused words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import peers

BLOCK, BLOCK_BYTES = 32, 18  # Q4_0: an f16 scale and 32 codes of 4 bits, of which 8 stands for zero

# Codes 0..15 less 8 are -0.5 on average, which adds the same to every output of a matrix and, layer by layer, drowns
# all else. So 0 becomes 8: two codes of each byte.
_CENTRED = np.array([(low or 8) | (high or 8) << 4 for high in range(16) for low in range(16)], np.uint8)


@dataclass(frozen=True)
class Shape:
    """Sizes of a llama whose output shares the embedding's weights."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocabulary: int
    rope_base: float = 500_000.0


LLAMA_1B = Shape("llama-1b-random", 2048, 16, 32, 8, 8192, 128_256)


def gguf_file(shape: Shape) -> Path:
    """Return the model as GGUF, written on the first call (some seconds)."""
    target = peers.cache() / f"{shape.name}.Q4_0.gguf"
    if not target.exists():
        with peers.made_whole(target) as unfinished:
            _write(shape, unfinished)
    return target


def folder(shape: Shape) -> Path:
    """Return the same model as an MLX folder, converted without loss from that GGUF."""
    target = peers.cache() / f"{shape.name}-mlx"
    if not (target / "config.json").exists():
        from edger1.quant.convert import convert_gguf  # type: ignore[import-untyped]

        with peers.made_whole(target) as unfinished:
            convert_gguf(gguf_file(shape), unfinished)
    return target


def _matrices(shape: Shape) -> Iterator[tuple[str, int, int]]:
    """Yield (tensor, rows, columns)."""
    kv = shape.hidden // shape.heads * shape.kv_heads
    yield "token_embd", shape.vocabulary, shape.hidden
    for layer in range(shape.layers):
        for part, rows, columns in (
            ("attn_q", shape.hidden, shape.hidden),
            ("attn_k", kv, shape.hidden),
            ("attn_v", kv, shape.hidden),
            ("attn_output", shape.hidden, shape.hidden),
            ("ffn_gate", shape.feed_forward, shape.hidden),
            ("ffn_up", shape.feed_forward, shape.hidden),
            ("ffn_down", shape.hidden, shape.feed_forward),
        ):
            yield f"blk.{layer}.{part}", rows, columns


def q4_0(rows: int, columns: int, rng: np.random.Generator, gain: float = 1.0) -> np.ndarray:
    """Return random Q4_0 blocks, uint8 (rows, bytes), with weights of `gain` times the usual size 1/sqrt(columns)."""
    blocks = np.empty((rows, columns // BLOCK, BLOCK_BYTES), np.uint8)
    # The codes less 8 have a standard deviation of 4.2.
    scale = np.array([gain / (4.2 * columns**0.5)], np.float16)
    blocks[..., :2] = scale.view(np.uint8)
    blocks[..., 2:] = _CENTRED[rng.integers(0, 256, (rows, columns // BLOCK, BLOCK_BYTES - 2), np.uint8)]
    return blocks.reshape(rows, -1)


def _write(shape: Shape, target: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(str(target), "llama")
    writer.add_name(shape.name)
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.feed_forward)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    add_tokenizer(writer, shape.vocabulary)
    rng = np.random.default_rng(0)
    for name, rows, columns in _matrices(shape):
        writer.add_tensor(f"{name}.weight", q4_0(rows, columns, rng), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    norms = [f"blk.{layer}.{part}_norm" for layer in range(shape.layers) for part in ("attn", "ffn")]
    for name in (*norms, "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(shape.hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: object, vocabulary: int) -> None:
    """Give the model SmolLM2's tokenizer, with as many unused words as it takes to fill the vocabulary."""
    import gguf

    assert isinstance(writer, gguf.GGUFWriter)
    fields = gguf.GGUFReader(str(peers.smollm2_gguf())).fields

    def value(key: str) -> object:
        return fields[f"tokenizer.ggml.{key}"].contents()

    tokens, types, merges = value("tokens"), value("token_type"), value("merges")
    assert isinstance(tokens, list)
    assert isinstance(types, list)
    assert isinstance(merges, list)
    missing = range(vocabulary - len(tokens))
    writer.add_tokenizer_model(str(value("model")))
    writer.add_tokenizer_pre(str(value("pre")))
    writer.add_token_list([*tokens, *(f"unused{i}" for i in missing)])
    writer.add_token_types([*types, *(int(gguf.TokenType.NORMAL) for _ in missing)])
    writer.add_token_merges(merges)
    for key in ("bos_token_id", "eos_token_id"):
        writer.add_uint32(f"tokenizer.ggml.{key}", int(str(value(key))))
