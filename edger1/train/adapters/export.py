"""Models written out: fused, in mlx-lm's layout, or as transformers loads them.

    mlx   the folder as it is, quantized as it is, with an adapter fused into it
    hf    plain weights under the names of the hub's checkpoints: experts one by one, MLA's halves joined
    gguf  see `gguf_file.py`

A model is read lazily and written tensor by tensor.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from edger1.building import build
from edger1.errors import UsageError
from edger1.folder import inspect
from edger1.train.adapters import files, peft
from edger1.train.adapters.fuse import Fused, dequantize_model, fuse
from edger1.train.folder_writer import write_folder, write_tensors

SHARD_BYTES = 5 << 30
"""The size at which mlx-lm's own converter splits."""
_BESIDE = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "mtp*.safetensors", "LICENSE*")
_NOT_BESIDE = ("config.json", "model.safetensors.index.json", "edger1.json", "conversion.json", "report.json")
CLASSES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM",
    "gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM",
    "phi": "PhiForCausalLM", "phi3": "Phi3ForCausalLM", "olmo2": "Olmo2ForCausalLM", "olmoe": "OlmoeForCausalLM",
    "granite": "GraniteForCausalLM", "smollm3": "SmolLM3ForCausalLM", "starcoder2": "Starcoder2ForCausalLM",
}  # fmt: skip
"""transformers' class of a family, for configs that do not name it."""
_STACKED = ".switch_mlp."
_STAYS_F32 = "e_score_correction_bias"


def check_destination(destination: Path) -> None:
    """Raise UsageError where something is there already: nothing is overwritten."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UsageError(f"{destination} exists already; name a new one.")


def opened(folder: Path, adapter: Path | None, *, dequantize: bool) -> tuple[Any, dict[str, Any], Fused | None]:
    """Return a model with an adapter fused into it, and its config.

    Raises what reading them raises, and UsageError for experts that cannot be quantized again.
    """
    found = inspect(folder)
    model, config = build(found, folder.name)
    # mlx-lm's config is of the model as built: what it has dequantized itself is no longer quantized.
    kept = ("quantization", "quantization_config")
    config = {k: v for k, v in found.config.items() if k not in kept} | {k: config[k] for k in kept[:1] if k in config}
    fused = None
    if adapter is not None:
        fused = fuse(files.apply(model, adapter), dequantize=dequantize)
    if dequantize:
        dequantize_model(model)
        config.pop("quantization", None)
    return model, config, fused


def write_mlx(destination: Path, folder: Path, adapter: Path | None, *, dequantize: bool = False) -> Fused | None:
    """Write a model folder in mlx-lm's layout, whole or not at all. Raises SaveError where it cannot be written."""
    check_destination(destination)
    model, config, fused = opened(folder, adapter, dequantize=dequantize)
    weights = dict(tree_flatten(model.parameters()))
    del model
    write_folder(destination, lambda aside: _fill(aside, folder, weights, config, "mlx"))
    return fused


def write_hf(destination: Path, folder: Path, adapter: Path | None) -> Fused | None:
    """Write a folder that transformers loads, with plain weights. Raises UsageError for families of unknown names."""
    check_destination(destination)
    peft.check_family(inspect(folder).model_type)
    model, config, fused = opened(folder, adapter, dequantize=True)
    weights = hub_weights(model, config["model_type"])
    del model
    config = hub_config(config, weights)
    write_folder(destination, lambda aside: _fill(aside, folder, weights, config, "pt"))
    return fused


def write_peft(destination: Path, folder: Path, adapter: Path, base: str) -> str:
    """Write an adapter alone in PEFT's layout, and return what it is over. Raises UsageError as `peft.save` does."""
    check_destination(destination)
    found = inspect(folder)
    model, _ = build(found, folder.name)
    adapted = files.apply(model, adapter)
    peft.save(destination, adapted, found.model_type, base)
    return adapted.describe()


def hub_weights(model: Any, model_type: str) -> dict[str, mx.array]:
    """Return plain weights under the names of the hub's checkpoints; mlx-lm's `sanitize` undoes it."""
    found: dict[str, mx.array] = {}
    halves: dict[str, dict[str, mx.array]] = {}
    for name, value in tree_flatten(model.parameters()):
        path, _, part = name.rpartition(".")
        before, _, own = path.rpartition(".")
        if _STACKED in name:
            found |= {f"{peft.expert_name(model_type, path, e)}.{part}": value[e] for e in range(value.shape[0])}
        elif own in ("embed_q", "unembed_out"):
            halves.setdefault(before, {})[own] = value
        else:
            found[name] = value
    for before, each in halves.items():
        joined = mx.concatenate([each["embed_q"].swapaxes(-1, -2), each["unembed_out"]], axis=1)
        found[f"{before}.kv_b_proj.weight"] = joined.reshape(-1, joined.shape[-1])
    return found


def hub_config(config: dict[str, Any], weights: dict[str, mx.array]) -> dict[str, Any]:
    """Return a config.json for transformers, of a model with these weights."""
    config = {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}
    if not config.get("architectures"):
        if config["model_type"] not in CLASSES:
            raise UsageError(
                f"config.json names no architectures, and transformers' class of a {config['model_type']} is not known."
            )
        config["architectures"] = [CLASSES[config["model_type"]]]
    matrix = next(value for value in weights.values() if value.ndim > 1)
    dtype = str(matrix.dtype).removeprefix("mlx.core.")
    return config | {"torch_dtype": dtype}


def _fill(folder: Path, source: Path, weights: dict[str, mx.array], config: dict[str, Any], form: str) -> None:
    copy_beside(source, folder)
    write_shards(folder, weights, form)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_beside(source: Path, folder: Path) -> None:
    """Copy what lies beside a model's weights and config: the tokenizer's files, the chat template, a licence."""
    for path in _beside(source):
        shutil.copyfile(path, folder / path.name)


def _beside(source: Path) -> Iterable[Path]:
    found = {path for pattern in _BESIDE for path in source.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.name not in _NOT_BESIDE)


def write_shards(folder: Path, weights: dict[str, mx.array], form: str) -> None:
    """Write model*.safetensors and its index, taking each array out of `weights` when it is written."""
    shards: list[list[str]] = [[]]
    filled, total = 0, 0
    for name, value in weights.items():
        if shards[-1] and filled + value.nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += value.nbytes
        total += value.nbytes
    placed: dict[str, str] = {}
    for i, names in enumerate(shards):
        count = len(shards)
        file = "model.safetensors" if count == 1 else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        write_tensors(folder / file, {name: weights.pop(name) for name in names}, {"format": form})
        placed |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=4) + "\n", encoding="utf-8")
