"""The safetensors header reader: it agrees with the safetensors library, and refuses whatever does not add up."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_files import safetensors_bytes, stored
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from edger1.errors import FormatError
from edger1.quant.formats.safetensors import MAX_HEADER_BYTES, read_header


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_agrees_with_the_library_that_wrote_the_file(path: Path) -> None:
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(4, dtype=np.uint8),
        "empty": np.zeros((0, 4), np.float16),
        "scalar": np.array(7, np.int64),
    }
    save_file(arrays, path, metadata={"format": "np"})
    header = read_header(path)
    assert header.metadata == {"format": "np"}
    data = path.read_bytes()
    assert header.entries.keys() == arrays.keys()
    for name, array in arrays.items():
        entry = header.entries[name]
        assert entry.shape == array.shape
        assert data[entry.offset : entry.offset + entry.nbytes] == array.tobytes()


GOOD = {"a": stored("F32", [2], 0, 8), "b": stored("U8", [4], 8, 12)}
DATA = bytes(12)
F32_TWO = stored("F32", [2], 0, 8)
LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "header longer than the file": (safetensors_bytes(GOOD, DATA, 1 << 60), "claims a header of 1,152,921,504"),
    "header longer than allowed": (safetensors_bytes(GOOD, DATA, MAX_HEADER_BYTES + 1), "claims a header"),
    "no JSON": (safetensors_bytes(b"[[[[[[[[[[", DATA), "not valid JSON"),
    "deep JSON": (safetensors_bytes(b"[" * 100_000, DATA), "not valid JSON"),
    "no UTF-8": (safetensors_bytes(b'{"\xff": 1}', DATA), "not valid JSON"),
    "long number": (safetensors_bytes(b'{"a": ' + b"9" * 9999 + b"}", DATA), "not valid JSON"),
    "no object": (safetensors_bytes([1, 2, 3], DATA), "not a JSON object"),
    "name twice": (safetensors_bytes(b'{"a": {}, "a": {}}      ', b""), "'a' twice"),
    "metadata": (safetensors_bytes({"__metadata__": {"a": 1}}, b""), "__metadata__"),
    "missing part": (safetensors_bytes({"a": {"dtype": "F32", "shape": [2]}}, DATA), "not described by"),
    "dtype": (safetensors_bytes({"a": stored("F99", [2], 0, 8)}, bytes(8)), "unknown dtype 'F99'"),
    "dtype no string": (safetensors_bytes({"a": {**F32_TWO, "dtype": ["F32"]}}, bytes(8)), "unknown dtype"),
    "negative shape": (safetensors_bytes({"a": stored("F32", [-2], 0, 8)}, bytes(8)), "list of whole numbers"),
    "float shape": (safetensors_bytes({"a": {**F32_TWO, "shape": [2.0]}}, bytes(8)), "list of whole numbers"),
    "boolean shape": (safetensors_bytes({"a": {**F32_TWO, "shape": [True, 2]}}, bytes(8)), "list of whole numbers"),
    "one offset": (safetensors_bytes({"a": {**F32_TWO, "data_offsets": [0]}}, bytes(8)), "two whole numbers"),
    "offsets swapped": (safetensors_bytes({"a": stored("F32", [2], 8, 0)}, bytes(8)), "lies at bytes 8 to 0"),
    "beyond the end": (safetensors_bytes({"a": stored("F32", [2], 0, 8)}, bytes(7)), "holds 7 bytes of data"),
    "shape too large": (safetensors_bytes({"a": stored("F32", [3], 0, 8)}, bytes(8)), "should take 12 bytes"),
    "huge product": (safetensors_bytes({"a": stored("F32", [1 << 62] * 40, 0, 8)}, bytes(8)), "larger than any file"),
    "part of a byte": (safetensors_bytes({"a": stored("F4", [3], 0, 1)}, bytes(1)), "takes 1"),
    "overlap": (safetensors_bytes({**GOOD, "b": stored("U8", [8], 4, 12)}, DATA), "overlaps"),
    "hole": (safetensors_bytes({**GOOD, "b": stored("U8", [3], 9, 12)}, DATA), "leaves a hole"),
    "bytes left over": (safetensors_bytes(GOOD, DATA + b"x"), "its tensors end at"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lying_file_is_refused_in_one_sentence(path: Path, name: str) -> None:
    data, message = LIES[name]
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"model\.safetensors") as caught:
        read_header(path)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_what_is_no_file_is_refused(path: Path, kind: str) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(FormatError, match=r"model\.safetensors"):
        read_header(path)


NUMBERS = st.sampled_from(
    [-1, 0, 1, 2, 3, 4, 8, 12, 1 << 31, 1 << 60, (1 << 64) - 1, 1 << 70, 1.5, None, "8", [], True]
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A file whose header has had numbers exchanged, or its bytes flipped, cut or cut off."""
    header: dict[str, Any] = json.loads(json.dumps({"__metadata__": {"format": "mlx"}, **GOOD}))
    if draw(st.booleans()):
        entry = header[draw(st.sampled_from(["a", "b"]))]
        key = draw(st.sampled_from(["shape", "data_offsets"]))
        entry[key] = draw(st.lists(NUMBERS, max_size=4))
    data = bytearray(safetensors_bytes(header, DATA))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["flip", "length", "cut", "truncate"])):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "length":
                data[:8] = struct.pack("<Q", draw(st.sampled_from([0, 1, 100, 1 << 20, 1 << 31, (1 << 64) - 1])))
            case "cut":
                del data[at : at + draw(st.integers(1, 8))]
            case "truncate":
                del data[at:]
    return bytes(data)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=damaged())
def test_what_we_accept_the_library_accepts(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    tracemalloc.start()
    try:
        header = read_header(path)
    except FormatError:
        return
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20
    try:
        with safe_open(path, "np") as file:
            assert set(file.keys()) == header.entries.keys()
    except SafetensorError as error:
        pytest.fail(f"accepted what safetensors refuses: {error}")
