"""The GGUF reader: it reads what others write, and believes nothing that the file's length does not allow."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_files import ARRAY, BOOL, F32, I32, STRING, U8, U32, U64, GGUFBytes, Metadata, Tensors, gguf_bytes

from edger1.errors import FormatError
from edger1.quant.formats import ggml
from edger1.quant.formats.gguf import GGUFFile, read_header

METADATA: Metadata = {
    "general.architecture": (STRING, "llama"),
    "a.flag": (BOOL, 1),
    "a.count": (U64, 1 << 40),
    "a.list": (ARRAY, (I32, [1, -2, 3])),
    "a.words": (ARRAY, (STRING, ["", "é", "wörld"])),
    "a.nested": (ARRAY, (ARRAY, [(U8, [1, 2]), (STRING, ["x"])])),
}
TENSORS: Tensors = {
    "one": (0, (2, 3), np.arange(6, dtype="<f4").tobytes()),
    "two": (8, (2, 32), bytes(68)),
    "three": (1, (5,), bytes(10)),
}


def read_everything(path: Path) -> None:
    with GGUFFile(path) as file:
        for tensor in file.header.tensors.values():
            assert len(file.read(tensor)) == tensor.nbytes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.gguf"


def test_reads_what_the_gguf_package_writes(path: Path) -> None:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_uint8("u8", 200)
    writer.add_int16("i16", -300)
    writer.add_int64("i64", -(1 << 40))
    writer.add_float32("f32", 0.5)
    writer.add_float64("f64", 1e300)
    writer.add_bool("flag", True)
    writer.add_string("text", "čaj 🍵")
    writer.add_array("words", ["a", "", "ž"])
    writer.add_array("numbers", [1, 2, -3])
    rng = np.random.default_rng(1)
    plain = rng.standard_normal((5, 7)).astype(np.float32)
    writer.add_tensor("plain", plain)
    quantized = gguf.quants.quantize(rng.standard_normal((6, 64)).astype(np.float32), GGMLQuantizationType.Q4_0)
    writer.add_tensor("quantized", quantized, raw_dtype=GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = gguf.GGUFReader(path)
    with GGUFFile(path) as file:
        header = file.header
        for key, field in theirs.fields.items():
            if not key.startswith("GGUF."):
                value: Any = header.metadata[key]
                assert (value.tolist() if isinstance(value, np.ndarray) else value) == field.contents()
        assert len(theirs.tensors) == len(header.tensors) == 2
        for tensor in theirs.tensors:
            ours = header.tensors[tensor.name]
            assert (ours.offset, ours.nbytes, ours.type.name) == (
                tensor.data_offset,
                tensor.n_bytes,
                tensor.tensor_type.name,
            )
            assert ours.shape == tuple(reversed(tensor.shape.tolist()))
        np.testing.assert_array_equal(file.read(header.tensors["plain"]).view("<f4").reshape(5, 7), plain)
        np.testing.assert_array_equal(file.read(header.tensors["quantized"]), quantized.reshape(-1))


def test_version_2_and_nested_arrays(path: Path) -> None:
    path.write_bytes(gguf_bytes(METADATA, TENSORS, version=2).data)
    header = read_header(path)
    assert header.version == 2
    nested: Any = header.metadata["a.nested"]
    assert [nested[0].tolist(), nested[1]] == [[1, 2], ["x"]]
    assert header.strings("a.words") == ["", "é", "wörld"]
    assert header.flag("a.flag", False) is True


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    # The package gives Q8_1, which never stands in files, the size of an older layout.
    for kind, (elements, size) in GGML_QUANT_SIZES.items():
        if kind.name != "Q8_1":
            assert ggml.TYPES[int(kind)] == ggml.GGMLType(kind.name, elements, size)


@pytest.mark.parametrize("key", ["general.architecture", "a.list", "a.flag", "missing"])
def test_getters_name_the_key_of_the_wrong_type(path: Path, key: str) -> None:
    path.write_bytes(gguf_bytes(METADATA, TENSORS).data)
    with pytest.raises(FormatError, match=key):
        read_header(path).integer(key)


def lie(change: Any, metadata: Metadata | None = None, tensors: Tensors | None = None) -> bytes:
    out = gguf_bytes(METADATA if metadata is None else metadata, TENSORS if tensors is None else tensors)
    result = change(out)
    return bytes(out.data if result is None else result)


def patch(offset: int, raw: bytes) -> Any:
    def change(out: GGUFBytes) -> None:
        out.data[offset : offset + len(raw)] = raw

    return change


def replaced(old: bytes, new: bytes) -> Any:
    def change(out: GGUFBytes) -> bytes:
        assert out.data.count(old) == 1
        return bytes(out.data).replace(old, new)

    return change


def unchanged(out: GGUFBytes) -> None:
    pass


HUGE = struct.pack("<Q", 1 << 60)
ONE_FLOAT = bytes(4)
LIES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes"),
    "magic": (lie(patch(0, b"GGML")), "begins with b'GGML'"),
    "big endian": (lie(patch(4, b"\0\0\0\3")), "big-endian"),
    "version 1": (lie(patch(4, b"\1\0\0\0")), "version 1"),
    "version 9": (lie(patch(4, b"\x09\0\0\0")), "version 9"),
    "tensor count": (lie(patch(8, HUGE)), "claims 1,152,921,504,606,846,976 tensors"),
    "metadata count": (lie(patch(16, HUGE)), "claims 1,152,921,504,606,846,976 metadata entries"),
    "key length": (lie(patch(24, HUGE)), "key of metadata entry 0 claims a length"),
    "string count": (
        lie(replaced(struct.pack("<IIQ", ARRAY, STRING, 3), struct.pack("<II", ARRAY, STRING) + HUGE)),
        "items of 'a.words'",
    ),
    "number count": (
        lie(replaced(struct.pack("<IIQ", ARRAY, I32, 3), struct.pack("<II", ARRAY, I32) + HUGE)),
        "items of 'a.list'",
    ),
    "array count": (
        lie(replaced(struct.pack("<IIQ", ARRAY, ARRAY, 2), struct.pack("<II", ARRAY, ARRAY) + HUGE)),
        "items of 'a.nested'",
    ),
    "value type": (lie(replaced(struct.pack("<IB", BOOL, 1), struct.pack("<IB", 99, 1))), "unknown type 99"),
    "item type": (lie(replaced(struct.pack("<II", ARRAY, I32), struct.pack("<II", ARRAY, 99))), "unknown type 99"),
    "boolean": (lie(replaced(struct.pack("<IB", BOOL, 1), struct.pack("<IB", BOOL, 7))), "boolean with the value 7"),
    "booleans": (lie(unchanged, {"b": (ARRAY, (BOOL, [0, 1, 2]))}), "booleans other than 0 and 1"),
    "utf-8": (lie(unchanged, {"b": (STRING, b"\xff\xfe")}), "not valid UTF-8"),
    "key twice": (lie(replaced(b"a.count", b"a.words")), "'a.words' is given twice"),
    "empty key": (lie(unchanged, {"": (U32, 1)}), "empty"),
    "tensor twice": (lie(replaced(b"\3\0\0\0\0\0\0\0two", b"\3\0\0\0\0\0\0\0one")), "'one' is given twice"),
    "dimensions": (lie(replaced(b"one\2\0\0\0", b"one\5\0\0\0")), "claims 5 dimensions"),
    "no dimensions": (lie(unchanged, {}, {"t": (0, (), ONE_FLOAT)}), "claims 0 dimensions"),
    "zero dimension": (lie(unchanged, {}, {"t": (0, (0, 4), b"")}), "dimension of zero"),
    "product": (lie(unchanged, {}, {"t": (0, (1 << 62, 1 << 62), ONE_FLOAT)}), "more than the whole file"),
    "wrapped product": (lie(unchanged, {}, {"t": (0, (1 << 32, 1 << 32), ONE_FLOAT)}), "more than the whole file"),
    "tensor type": (lie(unchanged, {}, {"t": (77, (1,), ONE_FLOAT)}), "unknown type 77"),
    "part of a block": (lie(unchanged, {}, {"t": (8, (2, 33), bytes(70))}), "cannot split into blocks of 32"),
    "alignment 24": (lie(unchanged, {"general.alignment": (U32, 24)}), "general.alignment is '24'"),
    "alignment 0": (lie(unchanged, {"general.alignment": (U32, 0)}), "general.alignment is '0'"),
    "alignment huge": (lie(unchanged, {"general.alignment": (U64, 1 << 60)}), "expected a power of two"),
    "alignment text": (lie(unchanged, {"general.alignment": (STRING, "32")}), "expected a power of two"),
    "last byte": (lie(lambda out: out.data[:-1]), "truncated"),
    "inside the header": (lie(lambda out: out.data[:90]), "truncated"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_lying_file_is_refused_in_one_sentence(path: Path, name: str) -> None:
    data, message = LIES[name]
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"a\.gguf") as caught:
        read_everything(path)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 400


def test_overlapping_and_misplaced_tensors_are_refused(path: Path) -> None:
    out = gguf_bytes(METADATA, TENSORS)
    offset_of_two = out.lengths[-4]
    for value, message in [(0, "overlap"), (5, "no multiple of 32"), (1 << 63, "should end at byte")]:
        changed = bytearray(out.data)
        changed[offset_of_two : offset_of_two + 8] = struct.pack("<Q", value)
        path.write_bytes(changed)
        with pytest.raises(FormatError, match=message):
            read_header(path)


def test_arrays_nested_too_deep_are_refused(path: Path) -> None:
    value: Any = (U8, [1])
    for _ in range(100):
        value = (ARRAY, [value])
    path.write_bytes(gguf_bytes({"deep": (ARRAY, value)}, {}).data)
    with pytest.raises(FormatError, match="nests arrays"):
        read_header(path)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "thing"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(FormatError, match="thing"):
        read_header(path)


def test_a_file_cut_while_open_is_noticed(path: Path) -> None:
    path.write_bytes(gguf_bytes(METADATA, TENSORS).data)
    with GGUFFile(path) as file:
        tensor = file.header.tensors["three"]
        os.truncate(path, tensor.offset + 3)
        with pytest.raises(FormatError, match="became shorter"):
            file.read(tensor)


BASE = gguf_bytes(METADATA, TENSORS)
TELLING = st.sampled_from([0, 1, 2, 31, 255, 1 << 16, (1 << 31) - 1, 1 << 32, 1 << 40, 1 << 60, 1 << 63, (1 << 64) - 1])


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A good file after one to four accidents: bits flipped, numbers replaced, bytes cut out, put in or cut off."""
    data = bytearray(BASE.data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["length", "length", "number", "flip", "cut", "insert", "truncate"])):
            case "length":
                at = draw(st.sampled_from(BASE.lengths))
                data[at : at + 8] = struct.pack("<Q", draw(TELLING))
            case "number":
                data[at : at + 4] = struct.pack("<I", draw(TELLING) & 0xFFFFFFFF)
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at : at + draw(st.integers(1, 16))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=16))
            case "truncate":
                del data[at:]
    return bytes(data)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=damaged())
def test_damage_gives_a_format_error_or_a_readable_file(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    tracemalloc.start()
    try:
        read_everything(path)
    except FormatError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 << 20, "the largest read window is 1 MB, and the file is smaller than that"


def random_blocks(rng: np.random.Generator, rows: int, blocks: int, kind: str) -> np.ndarray:
    """Random bytes as blocks of a quantized type, with every f16 in them finite."""
    size = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}[kind]
    raw = rng.integers(0, 256, (rows, blocks, size), dtype=np.uint8)
    for at in range(0, 4 if kind == "Q4_1" else 2, 2):
        halves = rng.standard_normal((rows, blocks)) * 10.0 ** rng.integers(-8, 2, (rows, blocks))
        halves[0, 0] = -0.0
        raw[..., at : at + 2] = halves.astype("<f2")[..., None].view(np.uint8)
    return raw


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_quantized_tensors_keep_every_number(kind: str) -> None:
    import mlx.core as mx
    from model_files import dequantized

    rng = np.random.default_rng(3)
    raw = random_blocks(rng, 16, 4, kind)
    expected = gguf.quants.dequantize(raw.reshape(16, -1), GGMLQuantizationType[kind])
    carried = ggml.carry("t", next(t for t in ggml.TYPES.values() if t.name == kind), raw.reshape(-1), (16, 128))
    arrays = {f"t.{name}": array.data for name, array in carried.parts.items()}
    assert [array.dtype for array in carried.parts.values()] == ["U32", "F16", "F16"]
    np.testing.assert_array_equal(dequantized(arrays, "t"), expected)
    # MLX's own reading of the arrays, in f32.
    weight, scales, biases = (mx.array(array) for array in arrays.values())
    by_mlx = mx.dequantize(
        weight, scales.astype(mx.float32), biases.astype(mx.float32), group_size=32, bits=carried.bits
    )
    np.testing.assert_array_equal(np.array(by_mlx), expected)


@pytest.mark.parametrize(("scale", "label"), [(511.0, "F16"), (512.0, "F32"), (2.0**-24, "F16"), (-60000.0, "F32")])
def test_biases_take_f32_where_f16_would_not_be_exact(scale: float, label: str) -> None:
    raw = np.zeros((1, 1, 34), np.uint8)
    raw[..., :2] = np.array([scale], "<f2").view(np.uint8)
    carried = ggml.carry("t", ggml.TYPES[8], raw.reshape(-1), (1, 32))
    assert carried.parts["scales"].dtype == carried.parts["biases"].dtype == label
    assert carried.parts["biases"].data[0, 0] == -128 * np.float32(np.float16(scale))


@pytest.mark.parametrize(("type_id", "dtype"), [(0, "F32"), (1, "F16"), (30, "BF16")])
def test_plain_tensors_are_copied(type_id: int, dtype: str) -> None:
    kind = ggml.TYPES[type_id]
    raw = np.random.default_rng(4).integers(0, 256, 6 * kind.block_bytes, dtype=np.uint8)
    carried = ggml.carry("t", kind, raw, (2, 3))
    assert carried.bits is None
    assert carried.parts[""].dtype == dtype
    assert carried.parts[""].shape == (2, 3)
    assert carried.parts[""].data.tobytes() == raw.tobytes()


def test_scales_that_are_not_finite_are_refused() -> None:
    raw = np.zeros((1, 1, 18), np.uint8)
    raw[..., :2] = np.array([np.inf], "<f2").view(np.uint8)
    with pytest.raises(FormatError, match=r"'t' \(Q4_0\) has scales that are not finite"):
        ggml.carry("t", ggml.TYPES[2], raw.reshape(-1), (1, 32))


def test_a_type_that_cannot_be_kept_is_named() -> None:
    with pytest.raises(FormatError, match=r"'blk.0.x' has the type Q4_K.*F32, F16, BF16, .*, Q8_0, MXFP4 are"):
        ggml.check_type("blk.0.x", ggml.TYPES[12], (2, 256))
    with pytest.raises(FormatError, match="1 dimensions instead of 2"):
        ggml.check_type("norm", ggml.TYPES[8], (32,))


def test_float_metadata_is_no_integer(path: Path) -> None:
    path.write_bytes(gguf_bytes({"x": (F32, 3.0)}, {}).data)
    header = read_header(path)
    assert header.number("x") == 3.0
    with pytest.raises(FormatError, match="whole number"):
        header.integer("x")
