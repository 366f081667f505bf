"""Looks into a model folder and says what is in it, without MLX and without reading a weight.

A model folder is laid out as mlx-lm writes it: config.json, the tokenizer's files, model*.safetensors and, where there
are several of those, an index. Whatever a folder claims is checked before anyone builds on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edger1.errors import EdgeR1Error, FormatError, UnknownModelError
from edger1.quant.formats import safetensors
from edger1.quant.formats.folder import no_weights, read_config, read_index, read_json

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")


@dataclass(frozen=True)
class ModelFolder:
    """What a model folder holds. `total_bytes` counts the weight files; `parameters` counts unpacked weights.

    `parameters` leaves out the scales and biases of quantization. `context_length` is None where config.json does not
    give one.
    """

    path: Path
    config: dict[str, Any]
    model_type: str
    architecture: str | None
    quantization: dict[str, Any] | None
    weight_files: tuple[Path, ...]
    total_bytes: int
    parameters: int
    context_length: int | None
    has_chat_template: bool


def inspect(folder: Path) -> ModelFolder:
    """Describe the model folder `folder`.

    Raises UnknownModelError where there is no such folder, FormatError where it is not a whole model: config.json or
    weights missing or damaged, an index that names files that are missing or outside, weights as pickles only.
    """
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise UnknownModelError(f"{folder} {found}; expected a folder with config.json and model*.safetensors.")
    config = read_config(folder)
    files = _weight_files(folder)
    headers = [safetensors.read_header(file) for file in files]
    if not any(header.entries for header in headers):
        raise FormatError(f"{folder} has weight files that hold no tensors; fetch the model again.")
    quantization = config.get("quantization")
    text_config = config.get("text_config")
    nested = text_config if isinstance(text_config, dict) else {}
    _check_layers(folder, config | nested, sum(len(header.entries) for header in headers))
    architectures = config.get("architectures")
    return ModelFolder(
        path=folder,
        config=config,
        model_type=config["model_type"],
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else None,
        quantization=quantization if isinstance(quantization, dict) else None,
        weight_files=files,
        total_bytes=sum(file.stat().st_size for file in files),
        parameters=sum(_parameters(header, quantization) for header in headers),
        context_length=_context_length(config) or _context_length(nested),
        has_chat_template=_has_chat_template(folder),
    )


def beyond_training(folder: Path, context: int | None) -> str | None:
    """Return a sentence for people where `context` tokens are more than the model in `folder` was trained for.

    None where they are not, or where config.json does not say or is none.
    """
    try:
        config = read_config(folder)
    except EdgeR1Error:
        return None
    nested = config.get("text_config")
    limit = _context_length(config) or _context_length(nested if isinstance(nested, dict) else {})
    if context is None or limit is None or context <= limit:
        return None
    return (
        f"A context of {context:,} tokens is more than the {limit:,} that {folder.name} was trained for; beyond those "
        f"its answers may make no sense."
    )


def _check_layers(folder: Path, config: dict[str, Any], tensors: int) -> None:
    """Raise FormatError where config.json claims more layers than there are tensors, which would take for ever."""
    layers = config.get("num_hidden_layers")
    if isinstance(layers, int) and layers > tensors:
        raise FormatError(
            f"{folder} claims {layers:,} layers in its config.json but holds {tensors:,} tensors; fetch it again."
        )


def _weight_files(folder: Path) -> tuple[Path, ...]:
    # mlx-lm loads all of these, whatever the index says.
    present = {path.name: path for path in sorted(folder.glob("model*.safetensors"))}
    missing = sorted(set((read_index(folder) or {}).values()) - present.keys())
    if missing:
        raise FormatError(
            f"{folder} is incomplete: {len(missing)} weight files that its index names are missing, such as "
            f"{missing[0]!r}. Fetch the model again."
        )
    if not present:
        raise no_weights(folder)
    return tuple(present.values())


def _parameters(header: safetensors.Header, quantization: Any) -> int:
    count = 0
    for name, entry in header.entries.items():
        path, _, suffix = name.rpartition(".")
        if f"{path}.scales" in header.entries and suffix in ("weight", "scales", "biases"):
            if suffix == "weight" and entry.dtype == "U32":
                count += entry.nbytes * 8 // _bits(path, quantization)
        else:
            count += math.prod(entry.shape)
    return count


def _bits(path: str, quantization: Any) -> int:
    """Return the bits that each weight of the module `path` is packed into."""
    settings = quantization if isinstance(quantization, dict) else {}
    own = settings.get(path)
    bits = (own if isinstance(own, dict) else settings).get("bits", 4)
    return bits if isinstance(bits, int) and not isinstance(bits, bool) and 1 <= bits <= 8 else 4


def _context_length(config: dict[str, Any]) -> int | None:
    for key in _CONTEXT_KEYS:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _has_chat_template(folder: Path) -> bool:
    if any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return False
    config = read_json(path)
    return isinstance(config, dict) and bool(config.get("chat_template"))
