"""A trained model as a model folder that EdgeR1, mlx-lm and transformers load.

Weights are bf16 under the names of the hub's checkpoints; the correction biases of routers stay f32, as the published
models have them. The MTP layer goes into a file of its own, mtp.safetensors, because mlx-lm refuses weights that its
model has no place for, and reads model*.safetensors only.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from edger1.errors import FormatError
from edger1.train.folder_writer import write_folder, write_tensors
from edger1.train.pretrain import model as models
from edger1.train.pretrain.corpus import tokenizer_files


def export(destination: Path, model: Any, config: dict[str, Any], tokenizer: Path) -> None:
    """Write a model folder; `config` is a complete config.json, `tokenizer` a folder with the tokenizer's files.

    Raises SaveError where it cannot be written.
    """
    write_folder(destination, lambda aside: fill(aside, model, config, tokenizer))


def fill(folder: Path, model: Any, config: dict[str, Any], tokenizer: Path) -> None:
    """Write a model's files into a folder."""
    weights = _hub_weights(model, config)
    first_ahead = config["num_hidden_layers"]
    ahead = {n: w for n, w in weights.items() if n.startswith(f"model.layers.{first_ahead}.")}
    write_tensors(folder / "model.safetensors", {n: w for n, w in weights.items() if n not in ahead}, {"format": "pt"})
    if ahead:
        write_tensors(folder / "mtp.safetensors", ahead, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in tokenizer_files(tokenizer):
        shutil.copyfile(path, folder / path.name)


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Return a model that `export` wrote, its MTP layer included and its weights in f32, and its config.

    Raises FormatError where the folder holds no such model or a damaged one.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model = models.build(config)
        weights: dict[str, mx.array] = {}
        for path in (folder / "model.safetensors", folder / "mtp.safetensors"):
            if path.exists():
                weights |= cast(dict[str, mx.array], mx.load(str(path)))
        if hasattr(model, "sanitize"):
            weights = model.sanitize(weights)
        model.load_weights([(name, value.astype(mx.float32)) for name, value in weights.items()])
        mx.eval(model.parameters())
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise FormatError(f"{folder} holds no model as training exports it ({error}).") from None
    return model, config


def _hub_weights(model: Any, config: dict[str, Any]) -> dict[str, mx.array]:
    if config["model_type"] == "deepseek_v3":
        from edger1.architectures.deepseek_v3_mtp import hub_weights

        weights = hub_weights(model)
    else:
        weights = dict(tree_flatten(model.parameters()))
    return {n: w if n.endswith("e_score_correction_bias") else w.astype(mx.bfloat16) for n, w in weights.items()}
