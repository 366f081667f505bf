"""Quantize a trained model into a folder that EdgeR1 and mlx-lm load.

    python -m recipes.nano.quantize MODEL DESTINATION            # 4 bits, groups of 128
    python -m recipes.nano.quantize MODEL DESTINATION --questions FOLDER

MODEL is what training exported. Groups are 128 wide, so that nano-moe stays under 12 MB, and 64 where a matrix has no
128 columns. Norms, routers and their biases stay as they are. The MTP layer is quantized alike, into mtp.safetensors.
With --questions (a corpus' folder) some of its held-out questions go along as samples, for `edger1 demo`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_map_with_path

from edger1.demo import FILE
from edger1.train.folder_writer import write_folder, write_tensors
from edger1.train.pretrain import export
from edger1.train.pretrain.corpus import tokenizer_files
from recipes.nano.evaluate import Question, read

GROUP, SMALL_GROUP, BITS = 128, 64, 4
SAMPLES_EACH = 6


def quantized(model: Any, config: dict[str, Any], bits: int) -> dict[str, Any]:
    """Quantize a model in place and return the config that tells loaders how."""
    table: dict[str, Any] = {"group_size": GROUP, "bits": bits, "mode": "affine"}
    layers = config["num_hidden_layers"]

    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized"):
            return False
        columns = module.weight.shape[-1]
        if columns % GROUP == 0:
            return True
        if columns % SMALL_GROUP:
            return False
        own = {"group_size": SMALL_GROUP, "bits": bits, "mode": "affine"}
        table[_hub_name(path, layers)] = own
        return own

    nn.quantize(model, GROUP, bits, class_predicate=choose)
    return {**config, "quantization": table, "quantization_config": table}


def write(source: Path, destination: Path, bits: int = BITS, samples: list[Question] | None = None) -> None:
    """Write the quantized model; raises what export.load and write_folder raise."""
    model, config = export.load(source)
    # As the model is published: scales and biases take the weights' type.
    model.update(
        tree_map_with_path(
            lambda name, w: w if name.endswith("e_score_correction_bias") else w.astype(mx.bfloat16),
            model.parameters(),
        )
    )
    config = quantized(model, config, bits)
    layers = config["num_hidden_layers"]
    weights = {_hub_name(name, layers): value for name, value in tree_flatten(model.parameters())}
    ahead = {name: value for name, value in weights.items() if name.startswith(f"model.layers.{layers}.")}

    def fill(folder: Path) -> None:
        write_tensors(folder / "model.safetensors", {n: w for n, w in weights.items() if n not in ahead})
        if ahead:
            write_tensors(folder / "mtp.safetensors", ahead)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for path in tokenizer_files(source):
            shutil.copyfile(path, folder / path.name)
        if samples:
            rows = (
                json.dumps({"task": one.task, "question": one.question, "answer": one.answer}, ensure_ascii=False)
                for one in samples
            )
            (folder / FILE).write_text("\n".join(rows) + "\n", encoding="utf-8")

    write_folder(destination, fill)


def samples_of(folder: Path, each: int = SAMPLES_EACH) -> Iterator[Question]:
    """Yield a few held-out questions of each kind whose answer is the only right one."""
    rng = Random(1)
    for task, group in groupby(read(folder, 10**6), key=lambda q: q.task):
        if task != "countdown":
            every = list(group)
            yield from rng.sample(every, min(each, len(every)))


def _hub_name(name: str, layers: int) -> str:
    """Return the name that a module or weight has in a checkpoint: MTP layers follow the others."""
    if not name.startswith("mtp."):
        return name
    _, index, rest = name.split(".", 2)
    return f"model.layers.{layers + int(index)}.{rest}"


def main() -> int:
    """Quantize as the command line says and tell the files' sizes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--bits", type=int, default=BITS, choices=(2, 3, 4, 5, 6, 8))
    parser.add_argument("--questions", type=Path, help="a corpus' folder, to take sample questions from")
    options = parser.parse_args()
    samples = list(samples_of(options.questions)) if options.questions else None
    write(options.model, options.destination, options.bits, samples)
    for path in sorted(options.destination.iterdir()):
        print(f"{path.stat().st_size:12,}  {path.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
