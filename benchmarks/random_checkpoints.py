"""Checkpoints with random weights in the shapes and formats that labs publish, for the converter to be measured on.

    python -m benchmarks.random_checkpoints r1-fp8        # make one, print its folder

`r1-fp8` has DeepSeek-R1's tensors, one dense and two MoE layers of 256 experts: FP8 E4M3 with 128x128 scales, embedding
and head in bf16, in shards as published (28 GB). `llama-bf16` is a dense model of 3 GB, `moe-bf16` one of 3 GB whose
experts are most of it. What the numbers are makes no difference to what a conversion costs, so one block of random
bytes is written again and again.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.common import REPOSITORY

SHARD_BYTES = 4_300_000_000
BLOCK_BYTES = 64 << 20
DISK_LEFT_BYTES = 4 << 30

Tensors = Iterator[tuple[str, str, tuple[int, ...]]]
"""Name, safetensors' dtype, shape."""

R1: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 3, "num_attention_heads": 128,
    "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256, "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "v_head_dim": 128, "qk_nope_head_dim": 128,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "n_group": 8, "topk_group": 4,
    "num_experts_per_tok": 8, "moe_layer_freq": 1, "first_k_dense_replace": 1, "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-06, "rope_theta": 10000, "attention_bias": False, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    },
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 2048, "hidden_size": 2048,
    "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "max_position_embeddings": 4096,
}  # fmt: skip
MOE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 2048, "hidden_size": 2048,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 80, "num_experts_per_tok": 8, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "norm_topk_prob": True, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "max_position_embeddings": 4096,
}  # fmt: skip


def r1_tensors() -> Tensors:
    """Yield the tensors of R1's checkpoint in its order: by layer, by name."""
    hidden, heads = R1["hidden_size"], R1["num_attention_heads"]
    yield "model.embed_tokens.weight", "BF16", (R1["vocab_size"], hidden)
    for layer in range(R1["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", "BF16", (hidden,)
        if layer < R1["first_k_dense_replace"]:
            yield from _mlp(f"{at}.mlp", hidden, R1["intermediate_size"])
        else:
            for expert in range(R1["n_routed_experts"]):
                yield from _mlp(f"{at}.mlp.experts.{expert}", hidden, R1["moe_intermediate_size"])
            yield f"{at}.mlp.gate.e_score_correction_bias", "F32", (R1["n_routed_experts"],)
            yield f"{at}.mlp.gate.weight", "BF16", (R1["n_routed_experts"], hidden)
            yield from _mlp(f"{at}.mlp.shared_experts", hidden, R1["moe_intermediate_size"])
        yield f"{at}.post_attention_layernorm.weight", "BF16", (hidden,)
        yield f"{at}.self_attn.kv_a_layernorm.weight", "BF16", (512,)
        yield from _fp8(f"{at}.self_attn.kv_a_proj_with_mqa", 512 + 64, hidden)
        yield from _fp8(f"{at}.self_attn.kv_b_proj", heads * (128 + 128), 512)
        yield from _fp8(f"{at}.self_attn.o_proj", hidden, heads * 128)
        yield f"{at}.self_attn.q_a_layernorm.weight", "BF16", (1536,)
        yield from _fp8(f"{at}.self_attn.q_a_proj", 1536, hidden)
        yield from _fp8(f"{at}.self_attn.q_b_proj", heads * (128 + 64), 1536)
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (R1["vocab_size"], hidden)


def _mlp(path: str, hidden: int, width: int) -> Tensors:
    yield from _fp8(f"{path}.down_proj", hidden, width)
    yield from _fp8(f"{path}.gate_proj", width, hidden)
    yield from _fp8(f"{path}.up_proj", width, hidden)


def _fp8(path: str, rows: int, columns: int) -> Tensors:
    yield f"{path}.weight", "F8_E4M3", (rows, columns)
    yield f"{path}.weight_scale_inv", "F32", (-(-rows // 128), -(-columns // 128))


def plain_tensors(config: dict[str, Any]) -> Tensors:
    """Yield the bf16 tensors of a llama, or of a Qwen3 mixture of experts."""
    hidden, width = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim", hidden // config["num_attention_heads"])
    yield "model.embed_tokens.weight", "BF16", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", "BF16", (hidden,)
        experts = config.get("num_experts", 0)
        paths = [f"{at}.mlp.experts.{expert}" for expert in range(experts)] or [f"{at}.mlp"]
        inner = config.get("moe_intermediate_size", width)
        for path in paths:
            yield f"{path}.down_proj.weight", "BF16", (hidden, inner)
            yield f"{path}.gate_proj.weight", "BF16", (inner, hidden)
            yield f"{path}.up_proj.weight", "BF16", (inner, hidden)
        if experts:
            yield f"{at}.mlp.gate.weight", "BF16", (experts, hidden)
            yield f"{at}.self_attn.q_norm.weight", "BF16", (head,)
            yield f"{at}.self_attn.k_norm.weight", "BF16", (head,)
        yield f"{at}.post_attention_layernorm.weight", "BF16", (hidden,)
        for name, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"), ("v", "num_key_value_heads")):
            yield f"{at}.self_attn.{name}_proj.weight", "BF16", (config[heads] * head, hidden)
        yield f"{at}.self_attn.o_proj.weight", "BF16", (hidden, config["num_attention_heads"] * head)
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (config["vocab_size"], hidden)


MODELS: dict[str, tuple[dict[str, Any], Callable[[], Tensors]]] = {
    "r1-fp8": (R1, r1_tensors),
    "llama-bf16": (LLAMA, lambda: plain_tensors(LLAMA)),
    "moe-bf16": (MOE, lambda: plain_tensors(MOE)),
}


def folder(name: str) -> Path:
    """Return the checkpoint's folder, made on the first call. Raises PeerMissingError where the disk is too small."""
    target = peers.cache() / f"random-{name}"
    if not (target / "config.json").exists():
        with peers.made_whole(target) as unfinished:
            config, tensors = MODELS[name]
            _write(unfinished, config, list(tensors()))
    return target


def _write(target: Path, config: dict[str, Any], tensors: list[tuple[str, str, tuple[int, ...]]]) -> None:
    from edger1.quant.writing import INDEX, Output, Shard, index, lay_out  # type: ignore[import-untyped]

    outputs = [Output(*tensor) for tensor in tensors]
    shards = lay_out([(output,) for output in outputs], SHARD_BYTES)
    _check_disk(sum(shard.nbytes for shard in shards))
    target.mkdir(parents=True)
    blocks = {dtype: _block(dtype) for dtype in {output.dtype for output in outputs}}
    for shard in shards:
        assert isinstance(shard, Shard)
        with (target / shard.file).open("xb") as file:
            file.write(shard.header)
            for output in shard.outputs:
                left = output.nbytes
                while left:
                    left -= file.write(blocks[output.dtype][:left])
    (target / INDEX).write_text(index(shards, 0))
    for path in (REPOSITORY / "edger1" / "assets" / "nano-moe").glob("*token*.json"):
        shutil.copyfile(path, target / path.name)
    (target / "config.json").write_text(json.dumps(config, indent=1))


def _block(dtype: str) -> memoryview:
    """Return random bytes that are finite numbers of `dtype`, of the size that weights have."""
    rng = np.random.default_rng(0)
    if dtype == "F8_E4M3":
        codes = rng.integers(0, 0x7F, BLOCK_BYTES, np.uint8)
        return memoryview(codes | (rng.integers(0, 2, BLOCK_BYTES, np.uint8) << 7)).cast("B")
    if dtype == "F32":
        return memoryview(rng.uniform(1e-4, 2e-4, BLOCK_BYTES // 4).astype(np.float32)).cast("B")
    numbers = 0.02 * rng.standard_normal(BLOCK_BYTES // 2, np.float32)
    return memoryview((numbers.view(np.uint32) >> 16).astype(np.uint16)).cast("B")


def _check_disk(nbytes: int) -> None:
    free = shutil.disk_usage(peers.cache()).free
    if free < nbytes + DISK_LEFT_BYTES:
        raise peers.PeerMissingError(
            f"a checkpoint of {nbytes / 1e9:.1f} GB needs {(nbytes + DISK_LEFT_BYTES) / 1e9:.1f} GB of free disk in "
            f"{peers.cache()}, and there are {free / 1e9:.1f} GB: make room, or name another folder by "
            f"EDGER1_BENCH_CACHE"
        )


def main() -> int:
    """Make the checkpoint that the command line names."""
    if len(sys.argv) != 2 or sys.argv[1] not in MODELS:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        print(folder(sys.argv[1]))
    except peers.PeerMissingError as error:
        print(f"!!! MISSING {sys.argv[1]}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
