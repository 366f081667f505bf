"""What the readers of weights are fuzzed with: true files of every format, and what an input makes of them.

scripts/fuzz.py breeds inputs by coverage; test_fuzzing.py gives each target some random ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from model_files import F32, STRING, U32, byte_level_vocabulary, gguf_bytes
from packed_layers import Layer
from weight_folders import CONFIG, Arrays, file_bytes

from edger1.errors import EdgeR1Error
from edger1.quant import opening, source
from edger1.quant.formats import awq, files, folder, fp4, fp8, gguf, gptq, mlx, packed, plain, safetensors, tensor
from edger1.quant.formats import zero_point as zero_points

MODULES = (opening, awq, files, folder, fp4, fp8, gguf, gptq, mlx, packed, plain, safetensors, tensor, zero_points)
MAX_MESSAGE = 1200

NUMBERS = (-1, 0, 1, 2, 3, 4, 7, 8, 16, 31, 32, 33, 64, 128, 255, *(1 << bits for bits in (16, 31, 53, 62, 63, 70)))
VALUES = (None, True, False, 1.5, "", "x", "4", [], {}, [1], "weight", "fp8", "affine", "mxfp4", "../x", *NUMBERS)
SUFFIXES = (
    *(".scales", ".biases", ".weight", ".qweight", ".qzeros", ".g_idx", ".weight_scale", ".weight_scale_inv"),
    *(".weight_packed", ".weight_zero_point", ".weight_shape", ".weight_g_idx", ".weight_global_scale", ".x", "/../x"),
)
DTYPES = tuple(safetensors.DTYPE_BITS)


def formats() -> dict[str, tuple[Arrays, dict[str, Any]]]:
    """A small true folder in each format: its arrays and what config.json says of them."""
    rng = np.random.default_rng(0)
    layer = Layer.random(32, 64, 4, 32)
    byte = rng.integers(0, 0x7E, (32, 64), np.uint8)
    ones, words = np.ones((32, 2), np.float32), rng.integers(0, 1 << 32, (32, 8), np.uint32)
    scheme = {"group_0": {"weights": {"type": "int", "num_bits": 4, "group_size": 32}}}
    own = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "checkpoint_format": "gptq"}
    return {
        "plain": ({"a.weight": ("F32", ones), "b": ("BF16", byte.astype(np.uint16)), "c": ("I64", np.arange(3))}, {}),
        "fp8": (
            {"a.weight": ("F8_E4M3", byte), "a.weight_scale_inv": ("F32", ones[:1, :1])},
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}},
        ),
        "mlx": (
            {"a.weight": ("U32", words), "a.scales": ("F32", ones), "a.biases": ("F32", ones)},
            {"quantization": {"bits": 4, "group_size": 32, "mode": "affine", "a": {"bits": 4, "group_size": 32}}},
        ),
        "gptq": (layer.gptq("a"), {"quantization_config": own}),
        "awq": (layer.awq("a"), {"quantization_config": {**own, "quant_method": "awq", "version": "gemm"}}),
        "packed": (
            layer.compressed("a", order=True),
            {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": scheme}},
        ),
        "fp4": (
            {
                "a.weight_packed": ("U8", byte),
                "a.weight_scale": ("F8_E4M3", byte[:, :8]),
                "a.weight_global_scale": ("F32", ones[0, :1]),
                "b.weight_packed": ("U8", byte),
                "b.weight_scale": ("U8", byte[:, :4]),
            },
            {"quantization_config": {"quant_method": "compressed-tensors"}},
        ),
    }  # fmt: skip


FORMATS = formats()


def use(opened: source.Source) -> None:
    """Read what a converter would, a few rows of each tensor."""
    try:
        for one in opened.tensors.values():
            if np.prod([float(size) for size in one.shape]) > 1 << 20:
                continue
            rows = one.shape[0] if one.shape else 1
            one.read(rows // 2, min(rows, rows // 2 + 2))
            if one.coding is not None:
                one.codes(0, min(rows, 1))
    finally:
        opened.close()


class Edits:
    """Draws edits of a JSON value from the bytes of an input; when they are used up, the first choice is taken."""

    def __init__(self, data: bytes):
        self.left = memoryview(data)

    def number(self, most: int) -> int:
        """A number from 0 to `most`."""
        size = (most.bit_length() + 7) // 8
        raw, self.left = self.left[:size], self.left[size:]
        return int.from_bytes(raw, "little") % (most + 1)

    def pick(self, options: Any) -> Any:
        """One of the options."""
        return options[self.number(len(options) - 1)]

    def edit(self, value: Any) -> Any:
        """A value like the given one with one place changed."""
        choice = self.number(9)
        if isinstance(value, dict) and value and choice < 8:
            key = self.pick(list(value))
            if choice == 0:
                return {name: item for name, item in value.items() if name != key}
            if choice == 1:
                return {(self._rename(name) if name == key else name): item for name, item in value.items()}
            return {**value, key: self.edit(value[key])}
        if isinstance(value, list) and value and choice < 8:
            at = self.number(len(value) - 1)
            if choice == 0:
                return value[:at] + value[at + 1 :]
            if choice == 1:
                return value[: at + 1] + value[at:]
            return [*value[:at], self.edit(value[at]), *value[at + 1 :]]
        if isinstance(value, int) and choice < 6:
            return value + self.pick((-1, 1, value, -value // 2, 1 << 31))
        return self.pick((*VALUES, *DTYPES))

    def _rename(self, name: str) -> str:
        return name.rpartition(".")[0] + self.pick(SUFFIXES)


class Targets:
    """What can be fuzzed. Each method takes an input and says whether it came to anything; files go into `place`."""

    def __init__(self, place: Path):
        self.place = place
        self.weights = place / "model.safetensors"
        (place / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        for name, (arrays, _) in FORMATS.items():
            (place / name).mkdir()
            (place / name / "model.safetensors").write_bytes(file_bytes(arrays))
        parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", folder.MTP_NAME]
        (place / "parts").mkdir()
        (place / "parts" / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        for part, name in zip(parts, "abc", strict=True):
            (place / "parts" / part).write_bytes(file_bytes({name: ("U8", np.zeros(2, np.uint8))}))
        self.headers = {name: _header_of(file_bytes(arrays)) for name, (arrays, _) in FORMATS.items()}
        self.index_content = {"metadata": {"total_size": 4}, "weight_map": {"a": parts[0], "b": parts[1]}}

    def safetensors(self, data: bytes) -> bool:
        """A whole file, its length true or not."""
        self.weights.write_bytes(data)
        self._open_plainly()
        return True

    def header(self, data: bytes) -> bool:
        """The header alone, as text or as a true one that has been edited, before data of the right size or not."""
        size, text = 16 * (data[0] & 3 if data else 0), data[1:]
        if data[:1] < b"\x80":
            edits = Edits(text)
            content: Any = self.headers[edits.pick(list(FORMATS))]
            for _ in range(1 + edits.number(3)):
                content = edits.edit(content)
            text = json.dumps(content).encode()
            size = max((entry[1] for entry in _offsets(content)), default=0) + edits.number(1)
        self.weights.write_bytes(len(text).to_bytes(8, "little") + text + bytes(min(size, 1 << 16)))
        self._open_plainly()
        return True

    def _open_plainly(self) -> None:
        header = safetensors.read_header(self.weights)
        with files.WeightFiles([header]) as opened:
            for raw in opened.tensors().values():
                files.check_readable(raw)
                if raw.shape and raw.nbytes < 1 << 20:
                    raw.rows(0, min(raw.shape[0], 2))

    def tensors(self, data: bytes) -> bool:
        """A folder of each format whose tensors have other names, dtypes, shapes and bytes, in a file that is whole."""
        edits = Edits(data)
        arrays, config = FORMATS[edits.pick(list(FORMATS))]
        described: Any = {name: [dtype, list(array.shape)] for name, (dtype, array) in arrays.items()}
        for _ in range(1 + edits.number(3)):
            described = edits.edit(described)
        header: dict[str, Any] = {}
        at = 0
        for name, item in described.items() if isinstance(described, dict) else ():
            # The reader of headers has its own targets: here the sizes add up.
            if not (isinstance(item, list) and len(item) == 2 and item[0] in DTYPES and isinstance(item[1], list)):
                return False
            if not all(type(size) is int and 0 <= size < 4096 for size in item[1]):
                return False
            bits = int(np.prod(item[1], dtype=np.int64)) * safetensors.DTYPE_BITS[item[0]]
            if bits > 1 << 19 or bits % 8:
                return False
            header[name] = {"dtype": item[0], "shape": item[1], "data_offsets": [at, at + bits // 8]}
            at += bits // 8
        true = b"".join(array.tobytes() for _, array in arrays.values())
        content = (true * (at // max(len(true), 1) + 1))[:at]
        text = json.dumps(header).encode()
        self.weights.write_bytes(len(text).to_bytes(8, "little") + text + content)
        (self.place / "config.json").write_text(json.dumps({**CONFIG, **config}), encoding="utf-8")
        use(opening.open_source(self.place))
        return True

    def config(self, data: bytes) -> bool:
        """A folder of each format whose config.json has been edited as a tree, and cut or added to as text."""
        edits = Edits(data)
        name = edits.pick(list(FORMATS))
        content: Any = {**CONFIG, **FORMATS[name][1]}
        for _ in range(edits.number(4)):
            content = edits.edit(content)
        text = json.dumps(content).encode()
        if edits.number(7) == 0:
            at = edits.number(len(text))
            text = text[:at] + bytes(edits.left[:8]) + text[at + edits.number(8) :]
        (self.place / name / "config.json").write_bytes(text)
        use(opening.open_source(self.place / name))
        return True

    def index(self, data: bytes) -> bool:
        """A folder of two files and MTP weights whose index is the input, or a true one that has been edited."""
        text = data[1:]
        if data[:1] <= b"\x80":
            edits = Edits(text)
            content: Any = self.index_content
            for _ in range(1 + edits.number(3)):
                content = edits.edit(content)
            text = json.dumps(content).encode()
        (self.place / "parts" / folder.INDEX_NAME).write_bytes(text)
        use(opening.open_source(self.place / "parts"))
        return True

    def gguf(self, data: bytes) -> bool:
        """A whole GGUF file."""
        path = self.place / "model.gguf"
        path.write_bytes(data)
        with gguf.GGUFFile(path) as opened:
            for info in opened.header.tensors.values():
                if info.nbytes < 1 << 20:
                    opened.read(info)
        return True


def _header_of(data: bytes) -> Any:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def _offsets(content: Any) -> list[list[int]]:
    """The data_offsets of a header that are two numbers."""
    entries = content.values() if isinstance(content, dict) else ()
    found = [entry.get("data_offsets") for entry in entries if isinstance(entry, dict)]
    return [each for each in found if isinstance(each, list) and len(each) == 2 and all(type(n) is int for n in each)]


NAMES = ("safetensors", "header", "tensors", "config", "index", "gguf")


def seeds(name: str) -> list[bytes]:
    """True inputs to begin with."""
    whole = [file_bytes(arrays) for arrays, _ in FORMATS.values()]
    if name == "safetensors":
        return whole
    if name == "header":
        lengths = [int.from_bytes(data[:8], "little") for data in whole]
        small = [data[8 : 8 + length] for data, length in zip(whole, lengths, strict=True)]
        texts = [b"\x81" + text for text in small] + [b'\x81{"a":{"dtype":"U8","shape":[16],"data_offsets":[0,16]}}']
        return texts + [bytes(range(start, start + 24)) for start in range(0, 120, 10)]
    if name == "gguf":
        metadata = {"general.architecture": (STRING, "llama"), "general.alignment": (U32, 32), "a.b": (F32, 1.0)}
        tensors = {"t": (0, (2, 3), bytes(24)), "q": (8, (2, 32), bytes(68))}
        few = dict(list(byte_level_vocabulary().items())[:2])
        return [bytes(gguf_bytes({**metadata, **more}, tensors).data) for more in ({}, few)]
    if name == "index":
        return [b'\xff{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', bytes(16)]
    return [bytes(range(start, start + 24)) for start in range(0, 230, 10)]


def answers(target: Callable[[bytes], bool], data: bytes) -> bool:
    """Give the input to the target: whether it came to anything. Raises where the answer is no model or sentence."""
    try:
        return target(data)
    except EdgeR1Error as error:
        message = str(error)
        if not message or len(message) > MAX_MESSAGE or "\n" in message:
            raise AssertionError(f"no message for a person: {message[:2000]!r}") from error
        return True
