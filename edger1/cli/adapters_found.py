"""Finding the adapters that fit a model: folders of runs searched, headers compared, no weight read."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edger1.errors import EdgeR1Error
from edger1.folder import inspect
from edger1.quant.formats import safetensors
from edger1.quant.formats.folder import read_json
from edger1.train.adapters.files import CONFIG, PEFT_WEIGHTS, WEIGHTS
from edger1.tui.catalogue import AdapterEntry

_DEPTH = 4
_MOST_FOLDERS = 2000
# A run keeps its adapter beside the checkpoints that led to it.
_PASSED_OVER = ("checkpoints", "node_modules")
_LAYER = re.compile(r"\.(\d+)\.")

Shapes = dict[str, tuple[int, ...]]


def find(model: Path, folders: tuple[Path, ...]) -> list[AdapterEntry]:
    """Return the adapters below `folders` that fit the model, the newest first; what is damaged is left out.

    Raises EdgeR1Error where the model itself cannot be read.
    """
    shapes = {
        name: entry.shape
        for header in map(safetensors.read_header, inspect(model).weight_files)
        for name, entry in header.entries.items()
    }
    found: dict[Path, tuple[float, AdapterEntry]] = {}
    for top in folders:
        for folder in _holding_adapters(top.expanduser()):
            try:
                entry = _describe(top, folder, shapes)
                changed = folder.stat().st_mtime
            except (EdgeR1Error, OSError, ValueError, TypeError, KeyError):
                continue
            if entry is not None:
                found[folder.resolve()] = (changed, entry)
    newest_first = sorted(found.values(), key=lambda each: each[0], reverse=True)
    return [entry for _, entry in newest_first]


def _holding_adapters(top: Path) -> Iterator[Path]:
    for seen, (parent, folders, names) in enumerate(os.walk(top), 1):
        depth = len(Path(parent).relative_to(top).parts)
        folders[:] = sorted(
            name for name in folders if depth < _DEPTH and not name.startswith(".") and name not in _PASSED_OVER
        )
        if CONFIG in names:
            yield Path(parent)
        if seen >= _MOST_FOLDERS:
            return


def _describe(top: Path, folder: Path, model: Shapes) -> AdapterEntry | None:
    """Return the adapter in a folder, None where it is another model's."""
    config: Any = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get("fine_tune_type") == "full":
        return None
    peft = "peft_type" in config
    weights = folder / (PEFT_WEIGHTS if peft else WEIGHTS)
    header = safetensors.read_header(weights)
    if not fits({name: entry.shape for name, entry in header.entries.items()}, model):
        return None
    table = config if peft else config.get("lora_parameters", {})
    rank = table.get("r" if peft else "rank")
    kind = ("dora" if config.get("use_dora") else "lora") if peft else str(config.get("fine_tune_type", "lora"))
    of = config.get("base_model_name_or_path" if peft else "model")
    # A run's adapter lies in RUN/adapter, and is called by the run's name.
    named = folder.parent if folder.name == "adapter" and folder != top else folder
    return AdapterEntry(
        name=named.name,
        folder=folder,
        kind=kind,
        rank=rank if isinstance(rank, int) else None,
        size_bytes=weights.stat().st_size,
        layout="PEFT" if peft else "mlx-lm",
        of=Path(of).name if isinstance(of, str) else "",
    )


def fits(adapter: Shapes, model: Shapes) -> bool:
    """Tell whether an adapter's tensors belong over a model's: the modules that are in both have one output size.

    A model may compute with modules that its files have under other names (latents, experts of PEFT's), so that only
    what is found is compared; at least one module must be, and no layer beyond the model's may be asked for.
    """
    layers = max((_layer(name) for name in model), default=-1)
    agreeing = 0
    for name, shape in adapter.items():
        if _layer(name) > layers:
            return False
        path, rows = _second_half(name, shape)
        matrix = model.get(f"{path}.weight") if path else None
        if matrix is None or rows is None or len(matrix) != len(shape):
            continue
        if matrix[-2] != rows:
            return False
        agreeing += 1
    return agreeing > 0


def _layer(name: str) -> int:
    match = _LAYER.search(name)
    return int(match[1]) if match else -1


def _second_half(name: str, shape: tuple[int, ...]) -> tuple[str, int | None]:
    """Return the module that a lora B belongs to and its output size, which quantizing leaves as it is."""
    if name.endswith(".lora_b") and len(shape) in (2, 3):
        # mlx-lm: [rank, out]; over experts [experts, out, rank].
        return name.removesuffix(".lora_b"), shape[-1] if len(shape) == 2 else shape[-2]
    if name.endswith(".lora_B.weight") and len(shape) == 2:
        path = name.removesuffix(".lora_B.weight")
        return path.removeprefix("base_model.model."), shape[0]
    return "", None
