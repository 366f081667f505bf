"""Writes folders of weights in every format that the converter reads, straight from the formats' definitions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from model_files import safetensors_bytes, stored

from edger1.quant.opening import FolderSource, open_source

Arrays = Mapping[str, tuple[str, np.ndarray]]
"""name -> (safetensors' dtype, its bytes in an array of the same shape)"""

CONFIG = {"model_type": "llama", "num_hidden_layers": 1}


def file_bytes(arrays: Arrays) -> bytes:
    header, data = {}, b""
    for name, (dtype, array) in arrays.items():
        raw = np.ascontiguousarray(array).tobytes()
        header[name] = stored(dtype, list(array.shape), len(data), len(data) + len(raw))
        data += raw
    return safetensors_bytes(header, data)


def write_folder(folder: Path, arrays: Arrays, quantization_config: Any = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(file_bytes(arrays))
    content = {**CONFIG, **config}
    if quantization_config is not None:
        content["quantization_config"] = quantization_config
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def open_folder(folder: Path, arrays: Arrays, quantization_config: Any = None, **config: Any) -> FolderSource:
    source = open_source(write_folder(folder, arrays, quantization_config, **config))
    assert isinstance(source, FolderSource)
    return source


def bf16(values: np.ndarray) -> np.ndarray:
    """The upper halves of float32 numbers, as uint16."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def from_bf16(raw: np.ndarray) -> np.ndarray:
    return (raw.astype(np.uint32) << 16).view(np.float32)


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack the last axis into 32-bit words, lowest bits first, code by code: slow, and plainly right."""
    flat = codes.reshape(-1, codes.shape[-1])
    words = np.zeros((len(flat), -(-flat.shape[1] * bits // 32)), np.uint32)
    for row, values in enumerate(flat):
        stream = sum(int(value) << index * bits for index, value in enumerate(values))
        for word in range(words.shape[1]):
            words[row, word] = stream >> 32 * word & 0xFFFFFFFF
    return words.reshape(*codes.shape[:-1], -1)


def windows(rows: int) -> list[tuple[int, int]]:
    """Ranges of rows that begin and end anywhere."""
    return [(0, rows), (0, 1), (rows - 1, rows), (1, rows), (rows // 3, rows // 2 + 1), (2, 2)]
