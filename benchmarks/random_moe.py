"""Mixtures of experts of real shapes with random weights: as MLX folders of 4 bits, and as GGUFs of Q4_0.

What a kernel or a read costs does not depend on the numbers, but which experts are read depends on the routers: these
are made by `benchmarks.skewed_routing`, with the embeddings and the head that they need, and quantized as mlx-lm's
converter would (4 bits in groups of 64, routers at 8 bits, bf16) or as llama.cpp's (Q4_0, routers in f32). All other
matrices are random codes with scales that keep the forward pass sane: what a layer adds is small beside the embedding.
The tokenizer is SmolLM2's, whose words are all that is ever recited; ids beyond it are unused.

    python -m benchmarks.random_moe qwen3-24              # the MLX folder
    python -m benchmarks.random_moe qwen3-24 --gguf       # the GGUF beside it
    python -m benchmarks.random_moe qwen3-24 --measure    # how uneven the routes are

Both are written tensor by tensor, in the folder of `benchmarks.peers`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import peers, random_llama, skewed_routing

if TYPE_CHECKING:
    from edger1.quant.formats.ggml import Array  # type: ignore[import-untyped]

GROUP, GATE_BITS = 64, 8
DISK_LEFT_BYTES = 4 << 30
"""What must stay free on the disk."""

# Sizes of what a matrix adds or makes, relative to weights of 1/sqrt(columns). What layers add must stay small beside
# the embedding, since routers and output head read the latter in their sum.
GAINS = {"self_attn.o_proj": 0.15, "mlp.switch_mlp.down_proj": 0.4}


@dataclass(frozen=True)
class Shape:
    """Sizes of a mixture of experts whose output head has weights of its own."""

    name: str
    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    experts: int
    top_k: int
    expert_hidden: int
    vocabulary: int
    rope_base: float
    norm_epsilon: float
    context: int
    head_norms: bool
    """Whether queries and keys are normalized head by head (Qwen3), or all heads together (OLMoE)."""
    config: tuple[tuple[str, Any], ...]

    @property
    def matrices(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """(module within a layer, shape) of all quantized matrices of one layer but the router."""
        q, kv = self.heads * self.head, self.kv_heads * self.head
        return (
            ("self_attn.q_proj", (q, self.hidden)),
            ("self_attn.k_proj", (kv, self.hidden)),
            ("self_attn.v_proj", (kv, self.hidden)),
            ("self_attn.o_proj", (self.hidden, q)),
            ("mlp.switch_mlp.gate_proj", (self.experts, self.expert_hidden, self.hidden)),
            ("mlp.switch_mlp.up_proj", (self.experts, self.expert_hidden, self.hidden)),
            ("mlp.switch_mlp.down_proj", (self.experts, self.hidden, self.expert_hidden)),
        )

    @property
    def norms(self) -> tuple[tuple[str, int], ...]:
        """(module within a layer, size) of all norms of one layer."""
        q, kv = (self.head, self.head) if self.head_norms else (self.heads * self.head, self.kv_heads * self.head)
        return (
            ("input_layernorm", self.hidden),
            ("post_attention_layernorm", self.hidden),
            ("self_attn.q_norm", q),
            ("self_attn.k_norm", kv),
        )

    @property
    def expert_weights(self) -> int:
        """Weights of one routed expert."""
        return 3 * self.hidden * self.expert_hidden


def qwen3(layers: int) -> Shape:
    """Return Qwen3-30B-A3B's widths with so many layers; it has 48."""
    own = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "intermediate_size": 6144,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
    }
    sizes = 2048, layers, 32, 4, 128, 128, 8, 768, 151_936
    return Shape(f"qwen3-{layers}-random", "qwen3_moe", *sizes, 1e6, 1e-6, 40_960, True, tuple(own.items()))


def olmoe() -> Shape:
    """Return OLMoE-1B-7B."""
    own = {"architectures": ["OlmoeForCausalLM"], "intermediate_size": 1024, "norm_topk_prob": False}
    sizes = 2048, 16, 16, 16, 128, 64, 8, 1024, 50_304
    return Shape("olmoe-random", "olmoe", *sizes, 1e4, 1e-5, 4096, False, tuple(own.items()))


SHAPES = {"qwen3-24": qwen3(24), "qwen3-48": qwen3(48), "olmoe": olmoe()}


class RandomMoe:
    """A model of a shape: its text and its directions, made when first asked for, and its files."""

    def __init__(self, shape: Shape, law: skewed_routing.Law | None = None, seed: int = 0) -> None:
        self.shape, self.law, self.seed = shape, law or skewed_routing.Law(), seed

    @cached_property
    def text(self) -> skewed_routing.Text:
        """The text that the model recites, over SmolLM2's ordinary tokens."""
        special = json.loads((peers.smollm2_folder() / "tokenizer.json").read_text("utf-8"))
        ids = sorted(special["model"]["vocab"].values())
        barred = {token["id"] for token in special["added_tokens"]}
        tokens = [token for token in ids if token not in barred]
        return skewed_routing.text(self.law, self.shape.vocabulary, tokens, np.random.default_rng([self.seed, 0]))

    @cached_property
    def directions(self) -> skewed_routing.Directions:
        """What embeddings, output head and routers are made of."""
        return skewed_routing.Directions(self.law, self.text, self.shape.hidden, self.seed)

    def folder(self) -> Path:
        """Return the MLX folder, written on the first call (a minute or two)."""
        target = peers.cache() / f"{self.shape.name}-mlx"
        if not (target / "config.json").exists():
            _check_disk(self._weights * 4.5 / 8)
            with peers.made_whole(target) as unfinished:
                unfinished.mkdir()
                self._write_mlx(unfinished)
        return target

    def gguf_file(self) -> Path:
        """Return the model as GGUF, written on the first call."""
        target = peers.cache() / f"{self.shape.name}.Q4_0.gguf"
        if not target.exists():
            _check_disk(self._weights * 4.5 / 8)
            with peers.made_whole(target) as unfinished:
                self._write_gguf(unfinished)
        return target

    def measure(self, tokens: int = 1000, layers: int = 4) -> list[skewed_routing.Skew]:
        """Measure the routes of the first layers over a stretch of the text."""
        ids = np.array(self.text.recited(int(self.text.order[0]), tokens))
        routes = (
            self.directions.routes(ids, layer, self.shape.experts, self.shape.top_k)
            for layer in range(min(layers, self.shape.layers))
        )
        return [skewed_routing.measure(chosen, self.shape.experts) for chosen in routes]

    @property
    def _weights(self) -> int:
        matrices = sum(int(np.prod(shape)) for _, shape in self.shape.matrices)
        return self.shape.layers * matrices + 2 * self.shape.vocabulary * self.shape.hidden

    def _write_mlx(self, target: Path) -> None:
        from edger1.quant import shards, writing  # type: ignore[import-untyped]

        units = [shards.Planned(names, nbytes) for names, nbytes, _ in self._mlx_units()]
        made = (dict(zip(names, make(), strict=True)) for names, _, make in self._mlx_units())
        shards.write(target, shards.split(units, writing.SHARD_BYTES), made, self._weights)
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copyfile(peers.smollm2_folder() / name, target / name)
        # Last: a folder with a config is a whole one.
        (target / "config.json").write_text(json.dumps(self.config(), indent=4), "utf-8")

    def config(self) -> dict[str, Any]:
        """Return config.json as mlx-lm's converter writes it."""
        shape = self.shape
        quantization: dict[str, Any] = {"group_size": GROUP, "bits": 4, "mode": "affine"}
        gate = {"group_size": GROUP, "bits": GATE_BITS}
        quantization |= {f"model.layers.{layer}.mlp.gate": gate for layer in range(shape.layers)}
        return {
            "model_type": shape.family,
            "hidden_size": shape.hidden,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head,
            "num_experts": shape.experts,
            "num_experts_per_tok": shape.top_k,
            "rms_norm_eps": shape.norm_epsilon,
            "vocab_size": shape.vocabulary,
            "rope_theta": shape.rope_base,
            "max_position_embeddings": shape.context,
            "tie_word_embeddings": False,
            "eos_token_id": 2,
            **dict(shape.config),
            "quantization": quantization,
            "quantization_config": quantization,
        }

    def _mlx_units(self) -> Iterator[tuple[tuple[str, ...], int, Callable[[], list[Array]]]]:
        """Yield (names, bytes, what makes the arrays) of each module, in the order of the file."""
        shape = self.shape
        table = shape.vocabulary, shape.hidden

        def quantized(module: str, size: tuple[int, ...], bits: int, make: Callable[[], list[Array]]) -> Any:
            count = int(np.prod(size))
            names = tuple(f"{module}.{part}" for part in ("weight", "scales", "biases"))
            return names, count * bits // 8 + 2 * count // GROUP * 2, make

        def whole(rows: Callable[[skewed_routing.Integers], skewed_routing.Floats]) -> Callable[[], list[Array]]:
            return lambda: _quantized((rows(ids) for ids in _pieces(shape.vocabulary)), 4)

        yield quantized("model.embed_tokens", table, 4, whole(lambda ids: self.directions.embeddings(ids)))
        for layer in range(shape.layers):
            for index, (part, size) in enumerate(shape.matrices):
                yield quantized(f"model.layers.{layer}.{part}", size, 4, self._codes(layer, index, part, size))
            gate = f"model.layers.{layer}.mlp.gate"
            router = self._router(layer)
            yield quantized(gate, (shape.experts, shape.hidden), GATE_BITS, lambda r=router: _quantized(iter([r()]), 8))
            for part, size in shape.norms:
                yield (f"model.layers.{layer}.{part}.weight",), 2 * size, lambda n=size: [_bf16(np.ones(n))]
        yield ("model.norm.weight",), 2 * shape.hidden, lambda: [_bf16(np.ones(shape.hidden))]
        yield quantized("lm_head", table, 4, whole(lambda ids: self.directions.heads(ids)))

    def _router(self, layer: int) -> Callable[[], skewed_routing.Floats]:
        return lambda: self.directions.router(layer, self.shape.experts)

    def _codes(self, layer: int, index: int, part: str, size: tuple[int, ...]) -> Callable[[], list[Array]]:
        """Return what makes random codes with scales and biases as an affine quantization would have them."""

        def make() -> list[Array]:
            from edger1.quant.formats.ggml import Array  # type: ignore[import-untyped]

            rng = np.random.default_rng([self.seed, 3, layer, index])
            groups = (*size[:-1], size[-1] // GROUP)
            # Codes 0..15 have a standard deviation of 4.6 around 7.5.
            usual = np.float32(GAINS.get(part, 1.0) / (4.6 * size[-1] ** 0.5))
            scales = usual * (0.8 + 0.4 * rng.random(groups, np.float32))
            biases = -scales * (7 + rng.random(groups, np.float32))
            words = rng.integers(0, 1 << 32, (*size[:-1], size[-1] // 8), np.uint32)
            return [Array("U32", words), _bf16(scales), _bf16(biases)]

        return make

    def _write_gguf(self, target: Path) -> None:
        import gguf

        shape = self.shape
        writer = gguf.GGUFWriter(str(target), shape.family.replace("_", ""))
        writer.add_name(shape.name)
        writer.add_context_length(shape.context)
        writer.add_embedding_length(shape.hidden)
        writer.add_block_count(shape.layers)
        writer.add_feed_forward_length(shape.expert_hidden)
        writer.add_expert_feed_forward_length(shape.expert_hidden)
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.top_k)
        writer.add_head_count(shape.heads)
        writer.add_head_count_kv(shape.kv_heads)
        writer.add_key_length(shape.head)
        writer.add_value_length(shape.head)
        writer.add_rope_dimension_count(shape.head)
        writer.add_rope_freq_base(shape.rope_base)
        writer.add_layer_norm_rms_eps(shape.norm_epsilon)
        writer.add_vocab_size(shape.vocabulary)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
        random_llama.add_tokenizer(writer, shape.vocabulary)
        q4_0 = gguf.GGMLQuantizationType.Q4_0
        for name, size, _ in self._gguf_tensors():
            if size[-1:] == (0,):
                writer.add_tensor_info(name, size[:-1], np.dtype(np.float32), 4 * int(np.prod(size[:-1])))
            else:
                packed = (*size[:-1], size[-1] // random_llama.BLOCK * random_llama.BLOCK_BYTES)
                writer.add_tensor_info(name, packed, np.dtype(np.uint8), int(np.prod(packed)), q4_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, _, make in self._gguf_tensors():
            writer.write_tensor_data(make())
        writer.close()

    def _gguf_tensors(self) -> Iterator[tuple[str, tuple[int, ...], Callable[[], np.ndarray]]]:
        """Yield (name, shape, what makes the bytes); a shape that ends in 0 is of an array in f32, without the 0."""
        shape = self.shape
        table = shape.vocabulary, shape.hidden
        parts = {
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output",
            "mlp.switch_mlp.gate_proj": "ffn_gate_exps",
            "mlp.switch_mlp.up_proj": "ffn_up_exps",
            "mlp.switch_mlp.down_proj": "ffn_down_exps",
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
            "self_attn.q_norm": "attn_q_norm",
            "self_attn.k_norm": "attn_k_norm",
        }

        def whole(rows: Callable[[skewed_routing.Integers], skewed_routing.Floats]) -> Callable[[], np.ndarray]:
            return lambda: np.concatenate([q4_0(rows(ids)) for ids in _pieces(shape.vocabulary)])

        def ones(size: int) -> Callable[[], np.ndarray]:
            return lambda: np.ones(size, np.float32)

        yield "token_embd.weight", table, whole(lambda ids: self.directions.embeddings(ids))
        for layer in range(shape.layers):
            for index, (part, size) in enumerate(shape.matrices):
                yield f"blk.{layer}.{parts[part]}.weight", size, self._blocks(layer, index, part, size)
            yield f"blk.{layer}.ffn_gate_inp.weight", (shape.experts, shape.hidden, 0), self._router(layer)
            for part, width in shape.norms:
                yield f"blk.{layer}.{parts[part]}.weight", (width, 0), ones(width)
        yield "output_norm.weight", (shape.hidden, 0), ones(shape.hidden)
        yield "output.weight", table, whole(lambda ids: self.directions.heads(ids))

    def _blocks(self, layer: int, index: int, part: str, size: tuple[int, ...]) -> Callable[[], np.ndarray]:
        rng = np.random.default_rng([self.seed, 4, layer, index])
        rows, columns = int(np.prod(size[:-1])), size[-1]
        return lambda: random_llama.q4_0(rows, columns, rng, GAINS.get(part, 1.0)).reshape(*size[:-1], -1)


def _pieces(rows: int) -> Iterator[skewed_routing.Integers]:
    for begin in range(0, rows, 8192):
        yield np.arange(begin, min(begin + 8192, rows))


def _check_disk(nbytes: float) -> None:
    free = shutil.disk_usage(peers.cache()).free
    if free < nbytes + DISK_LEFT_BYTES:
        raise peers.PeerMissingError(
            f"a model of {nbytes / 1e9:.1f} GB needs {(nbytes + DISK_LEFT_BYTES) / 1e9:.1f} GB of free disk in "
            f"{peers.cache()}, and there are {free / 1e9:.1f} GB: make room, or name another folder by "
            f"EDGER1_BENCH_CACHE"
        )


def _bf16(values: np.ndarray) -> Array:
    from edger1.quant.formats.ggml import Array  # type: ignore[import-untyped]

    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return Array("BF16", ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16))


def _quantized(pieces: Iterator[skewed_routing.Floats], bits: int) -> list[Array]:
    """Quantize rows as mlx-lm's converter does bf16 weights: [words, scales, biases]."""
    import mlx.core as mx

    from edger1.quant.formats.ggml import Array  # type: ignore[import-untyped]

    words, scales, biases = [], [], []
    for piece in pieces:
        w, s, *b = mx.quantize(mx.array(piece).astype(mx.bfloat16), GROUP, bits)
        words.append(np.array(w))
        scales.append(np.array(s.view(mx.uint16)))
        biases.append(np.array(b[0].view(mx.uint16)))
    return [
        Array("U32", np.concatenate(words)),
        Array("BF16", np.concatenate(scales)),
        Array("BF16", np.concatenate(biases)),
    ]


def q4_0(rows: skewed_routing.Floats) -> np.ndarray:
    """Quantize rows to Q4_0 as ggml's reference does: uint8 [rows, bytes]."""
    blocks = rows.reshape(len(rows), -1, random_llama.BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1)[..., None], axis=-1)
    scales = largest / -8
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales != 0)
    codes = np.clip(blocks * inverse + 8.5, 0, 15).astype(np.uint8)
    packed = np.empty((*blocks.shape[:2], random_llama.BLOCK_BYTES), np.uint8)
    packed[..., :2] = scales.astype(np.float16).view(np.uint8)
    packed[..., 2:] = codes[..., :16] | codes[..., 16:] << 4
    return packed.reshape(len(rows), -1)


def main() -> int:
    """Make a model, or measure its routing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--gguf", action="store_true", help="make the GGUF instead of the MLX folder")
    parser.add_argument("--measure", action="store_true", help="tell how uneven its routes are; nothing is written")
    options = parser.parse_args()
    model = RandomMoe(SHAPES[options.shape])
    if options.measure:
        for layer, skew in enumerate(model.measure()):
            print(f"layer {layer}: " + ", ".join(f"{name} {value:.2f}" for name, value in asdict(skew).items()))
        return 0
    try:
        print(model.gguf_file() if options.gguf else model.folder())
    except peers.PeerMissingError as error:
        print(f"!!! MISSING {options.shape}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
