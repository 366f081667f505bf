"""Quantized forms of the nano models for `benchmarks.quantization`: MLX folders of ours, GGUF files of llama.cpp's.

All of them are measured alike: as the f32 numbers that their codes stand for, in one implementation of the model, so
that what is compared is the quantization alone.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import REPOSITORY
from benchmarks.peers import llama_builds, run
from edger1.layers import ModelLayers, open_layers
from edger1.quant import calibrate, fitting_codes  # type: ignore[import-untyped]
from edger1.quant.calibrate import Document, Statistics  # type: ignore[import-untyped]
from edger1.quant.fit import Option  # type: ignore[import-untyped]
from edger1.quant.formats import safetensors

WEIGHTS = REPOSITORY / "recipes" / "nano" / "weights"
LENGTH = 256
SIDE_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def corpus(documents: int, held_out: int, seed: int = 7) -> tuple[list[Document], list[Document]]:
    """Return chats of the kinds the nano models were trained on, to calibrate with, and of problems held out."""
    from recipes.nano.corpus import Mix

    mix = Mix(seed)
    drawn = mix.documents()
    rows = [row for row, _ in zip(drawn, range(12 * documents), strict=False)]
    chosen = random.Random(seed).sample(rows, documents)
    aside = random.Random(seed).sample(list(mix.held_out.values()), held_out)
    return [row.get("text") or row["messages"] for row in chosen], [problem.messages() for problem in aside]


def halves(path: Path) -> tuple[list[Document], list[Document]]:
    """Return every other paragraph of a text, and the ones between."""
    parts = path.read_text(encoding="utf-8").split("\n\n")
    return ["\n\n".join(parts[::2])], ["\n\n".join(parts[1::2])]


@dataclass(frozen=True)
class Reference:
    """A bf16 model on held-out windows: log-probabilities f32 [windows, length, vocabulary]."""

    tokens: np.ndarray
    log_probabilities: np.ndarray

    def divergence(self, folder: Path) -> float:
        """Return the mean KL of a model folder's predictions from the reference's, in nats a token."""
        given = predictions(folder, self.tokens)
        return float((np.exp(self.log_probabilities) * (self.log_probabilities - given)).sum(-1).mean())


def reference(folder: Path, tokens: np.ndarray) -> Reference:
    """Let the unquantized model predict the windows."""
    return Reference(tokens, predictions(folder, tokens))


def predictions(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """Return log-probabilities f32 [windows, length, vocabulary] of the model in `folder`."""
    model = open_layers(folder)
    try:
        passes = calibrate.begin(model, tokens)
        for layer in range(model.layers):
            model.advance(layer, passes)
        logits = np.concatenate([model.logits(each) for each in passes])
    finally:
        model.close()
    logits -= logits.max(-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return logits


def linears(model: ModelLayers) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all linears that can be quantized, by path."""
    every = [*range(model.layers), None]
    return {path: shape for layer in every for path, shape in model.linears(layer).items() if shape[-1] % 32 == 0}


def uniform(shapes: Mapping[str, tuple[int, ...]], bits: int, group_size: int = 64) -> dict[str, Option]:
    """Return the same bits for every linear."""
    return {path: _option(shape, bits, group_size) for path, shape in shapes.items()}


def _option(shape: Sequence[int], bits: int, group_size: int) -> Option:
    size = next(s for s in (group_size, 64, 32) if s <= group_size and shape[-1] % s == 0)
    count = int(np.prod(shape))
    return Option(bits, size, count * bits // 8 + count // size * 4, 0.0)


def write(source: Path, target: Path, chosen: Mapping[str, Option], statistics: Statistics | None) -> Path:
    """Write the model in `source` as an MLX folder with affine codes, plainly rounded where there are no statistics."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    model = open_layers(source)
    arrays: dict[str, Any] = {}
    table: dict[str, Any] = {"group_size": 64, "bits": 4, "mode": "affine"}
    for name, value in tree_flatten(model.model.parameters()):
        path = name.removesuffix(".weight")
        option = chosen.get(path) if name.endswith(".weight") else None
        if option is None:
            arrays[name] = value if name.endswith("correction_bias") else value.astype(mx.bfloat16)
            continue
        table[path] = {"group_size": option.group_size, "bits": option.bits, "mode": "affine"}
        if statistics is None:
            parts = mx.quantize(value.astype(mx.bfloat16), option.group_size, option.bits)
        else:
            rows = np.array(value.astype(mx.float32))
            moments = statistics.importance(path, 0, len(rows))
            codes = fitting_codes.quantize(rows, option.bits, option.group_size, "BF16", moments)
            parts = [mx.array(codes.weight.data)]
            parts += [mx.array(part.data).view(mx.bfloat16) for part in (codes.scales, codes.biases)]
        for suffix, part in zip(("weight", "scales", "biases"), parts, strict=True):
            arrays[f"{path}.{suffix}"] = part
    config = model.config | {"quantization": table, "quantization_config": table}
    _folder(target, source, arrays, config)
    model.close()
    return target


def _folder(target: Path, source: Path, arrays: dict[str, Any], config: Mapping[str, Any]) -> None:
    import mlx.core as mx

    target.mkdir(parents=True)
    mx.save_safetensors(str(target / "model.safetensors"), arrays, {"format": "mlx"})
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in SIDE_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def weight_bytes(folder: Path) -> int:
    """Return the bytes of all tensors in a model folder, without the header."""
    return sum(entry.nbytes for entry in safetensors.read_header(folder / "model.safetensors").entries.values())


def parameters(folder: Path) -> int:
    """Return the numbers in an unquantized model folder."""
    entries = safetensors.read_header(folder / "model.safetensors").entries.values()
    return sum(int(np.prod(entry.shape)) for entry in entries)


def llama_quantized(source: Path, work: Path, kind: str, texts: Sequence[Document], windows: int) -> tuple[Path, int]:
    """Quantize nano-dense with llama.cpp and an importance matrix from the first `windows` of `texts`.

    Returns a folder with the f32 numbers that the file's codes stand for, and the bytes of its tensors.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    from recipes.nano import gguf_f16

    plain, importance = work / "f16.gguf", work / "imatrix.gguf"
    build = llama_builds()[0]
    if not plain.exists():
        gguf_f16.write(source, plain)
    if not importance.exists():
        text = work / "calibration.txt"
        text.write_text(_rendered(source, texts), encoding="utf-8")
        options = ["-c", str(LENGTH), "-b", "2048", "--chunks", str(windows), "--parse-special", "-ngl", "0"]
        run([build.tool("llama-imatrix"), "-m", plain, "-f", text, "-o", importance, *options], "llama-imatrix")
    file = work / f"{kind}.gguf"
    run([build.tool("llama-quantize"), "--imatrix", importance, plain, file, kind, "2"], f"llama-quantize to {kind}")
    reader = GGUFReader(file)
    config = json.loads((source / "config.json").read_text("utf-8"))
    names = {ours: theirs for theirs, ours in _names(config["num_hidden_layers"])}
    import mlx.core as mx

    arrays = {}
    for tensor in reader.tensors:
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
        name = names[tensor.name]
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if part in name:
                values = _half_apart(values, config[heads])
        arrays[name] = mx.array(values)
    target = work / f"{kind}-folder"
    _folder(target, source, arrays, config | {"dtype": "float32"})
    return target, sum(int(tensor.n_bytes) for tensor in reader.tensors)


def llama_types(file: Path) -> str:
    """Say which types a GGUF file's tensors have."""
    from collections import Counter

    from gguf import GGUFReader

    counted = Counter(tensor.tensor_type.name for tensor in GGUFReader(file).tensors)
    return ", ".join(f"{count} {kind}" for kind, count in counted.most_common())


def _names(layers: int) -> list[tuple[str, str]]:
    from recipes.nano import gguf_f16

    found = [(f"{ours}.weight", f"{theirs}.weight") for ours, theirs in gguf_f16._WHOLE.items()]
    for layer in range(layers):
        for ours, theirs in gguf_f16._LAYER.items():
            found.append((f"model.layers.{layer}.{ours}.weight", f"blk.{layer}.{theirs}.weight"))
    return found


def _half_apart(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo what gguf_f16 does to queries and keys: rows that lie side by side go half a head apart."""
    width = rows.shape[0] // heads
    return rows.reshape(heads, width // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)


def _rendered(source: Path, texts: Sequence[Document]) -> str:
    model = open_layers(source)
    try:
        return "".join(each if isinstance(each, str) else model.decode(model.render(each)) for each in texts)
    finally:
        model.close()
