"""GGUF as a source of weights: every type's numbers, codes that MLX reads the same, split models."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from model_files import I32, U16, Metadata, Tensors, Tiny, gguf_bytes, tiny_model

from edger1.errors import FormatError
from edger1.quant.formats.gguf_parts import GGUFParts
from edger1.quant.formats.gguf_source import GGUFSource, open_gguf
from edger1.quant.source import Codes, Coding

COLUMNS = 256
READABLE = [*sorted(kind.name for kind in gguf.quants._type_traits), "F16", "F32"]
CODED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"]
UP = "model.layers.1.mlp.up_proj.weight"


def random_rows(kind: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random bytes that are rows of `kind` with finite numbers: [rows, bytes of a row]."""
    rng = np.random.default_rng(seed)
    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    raw = rng.integers(0, 256, (rows, columns // elements, size), dtype=np.uint8)
    if elements > 1:
        # No byte of these is the upper one of an f16 infinity, nor an e8m0 beyond what f32 holds.
        raw[(raw & 0x7F) > 0x57] ^= 0x40
    else:
        raw = rng.standard_normal((rows, columns)).astype("<f2" if kind == "F16" else "<f4").view(np.uint8)
        if kind == "BF16":
            raw = raw.reshape(rows, columns, 4)[..., 2:]
    return np.ascontiguousarray(raw).reshape(rows, -1)


@cache
def wide_model(hidden: int) -> Tiny:
    return tiny_model(hidden=hidden, matrix=GGMLQuantizationType.F32, embedding=GGMLQuantizationType.F32)


def with_tensor(kind: str, hidden: int = COLUMNS) -> tuple[Tiny, np.ndarray]:
    """A tiny model whose blk.1.ffn_up is random bytes of `kind`, and the numbers in them."""
    tiny = wide_model(hidden)
    rows = tiny.weights[UP].shape[0]
    raw = random_rows(kind, rows, hidden)
    entry = int(GGMLQuantizationType[kind]), (rows, hidden), raw.tobytes()
    with np.errstate(all="ignore"):
        numbers = gguf.quants.dequantize(raw, GGMLQuantizationType[kind])
    return Tiny(tiny.weights, tiny.metadata, tiny.tensors | {"blk.1.ffn_up.weight": entry}), numbers


def opened(tiny: Tiny, folder: Path) -> GGUFSource:
    return open_gguf(tiny.write(folder / "tiny.gguf"))


@pytest.mark.parametrize("kind", READABLE)
def test_numbers_are_those_of_the_gguf_package(tmp_path: Path, kind: str) -> None:
    tiny, expected = with_tensor(kind)
    source = opened(tiny, tmp_path)
    tensor = source.tensors[UP]
    assert (tensor.shape, tensor.kind) == (expected.shape, kind)
    assert tensor.dtype == (kind if kind in ("F32", "BF16") else "F16")
    assert np.isfinite(expected).all()
    read = tensor.read(0, len(expected))
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, expected)
    for start, stop in ((0, 1), (17, 40), (len(expected) - 3, len(expected)), (5, 5)):
        np.testing.assert_array_equal(tensor.read(start, stop), expected[start:stop])
    assert (tensor.coding is not None) == (kind in CODED)


def by_mlx(codes: Codes, coding: Coding) -> np.ndarray:
    import mlx.core as mx

    weight, scales = mx.array(codes.weight.data), mx.array(codes.scales.data)
    if codes.biases is None:
        numbers = mx.dequantize(
            weight, scales, group_size=coding.group_size, bits=coding.bits, mode=coding.mode, dtype=mx.float32
        )
    else:
        scales, biases = (part.astype(mx.float32) for part in (scales, mx.array(codes.biases.data)))
        numbers = mx.dequantize(weight, scales, biases, group_size=coding.group_size, bits=coding.bits)
    return np.array(numbers)


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("window", [(0, 512), (100, 101), (37, 300)])
def test_codes_are_read_by_mlx_as_the_same_numbers(tmp_path: Path, kind: str, window: tuple[int, int]) -> None:
    tiny, expected = with_tensor(kind)
    tensor = opened(tiny, tmp_path).tensors[UP]
    coding = tensor.coding
    assert coding is not None
    codes = tensor.codes(*window)
    assert (codes.scales.dtype, codes.biases and codes.biases.dtype) == (coding.scales, coding.biases)
    assert codes.weight.shape == (window[1] - window[0], COLUMNS * coding.bits // 32)
    np.testing.assert_array_equal(by_mlx(codes, coding), expected[slice(*window)])


@pytest.mark.parametrize("kind", [GGMLQuantizationType.F32, GGMLQuantizationType.Q5_0])
def test_rows_that_llama_cpp_reorders_are_put_back_in_any_window(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    tiny = tiny_model(matrix=kind)
    source = opened(tiny, tmp_path)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"):
        expected = gguf.quants.dequantize(gguf.quants.quantize(tiny.weights[name], kind), kind)
        tensor = source.tensors[name]
        for start, stop in ((0, len(expected)), (3, 4), (9, 21)):
            np.testing.assert_array_equal(tensor.read(start, stop), expected[start:stop])
            if tensor.coding is not None:
                np.testing.assert_array_equal(by_mlx(tensor.codes(start, stop), tensor.coding), expected[start:stop])


def test_a_source_is_what_the_converter_asks_for(tmp_path: Path) -> None:
    tiny = tiny_model()
    source = opened(tiny, tmp_path)
    assert source.name == "tiny"
    assert source.tensors.keys() == tiny.weights.keys()
    assert all(source.tensors[name].shape == weight.shape for name, weight in tiny.weights.items())
    assert source.config["model_type"] == "llama"
    assert (source.config["bos_token_id"], source.config["eos_token_id"]) == (1, 2)
    assert "quantization" not in source.config
    companions = source.companions
    assert [path.name for path in companions] == ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    source.close()
    source.close()
    assert not any(path.exists() for path in companions)


def test_the_fingerprint_changes_with_the_file(tmp_path: Path) -> None:
    tiny = tiny_model()
    first = opened(tiny, tmp_path).fingerprint
    assert opened(tiny_model(seed=1), tmp_path).fingerprint != first


def test_scales_whose_offsets_do_not_fit_are_named(tmp_path: Path) -> None:
    tiny, _ = with_tensor("Q8_0")
    raw = np.zeros((512, 8, 34), np.uint8)
    raw[300, 2, :2] = np.array([600.0], "<f2").view(np.uint8)
    tiny.tensors["blk.1.ffn_up.weight"] = (8, (512, 256), raw.tobytes())
    tensor = opened(tiny, tmp_path).tensors[UP]
    tensor.codes(0, 300)
    with pytest.raises(FormatError, match=r"'blk.1.ffn_up.weight' \(Q8_0\).*do not fit in float16"):
        tensor.codes(300, 301)
    np.testing.assert_array_equal(tensor.read(300, 301), np.zeros((1, 256)))


def test_a_file_that_became_shorter_is_noticed(tmp_path: Path) -> None:
    source = opened(tiny_model(), tmp_path)
    with (tmp_path / "tiny.gguf").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 4096)
    with pytest.raises(FormatError, match="became shorter"):
        source.tensors["model.norm.weight"].read(0, 64)


@pytest.mark.parametrize("kind", ["Q8_1", "Q8_K"])
def test_types_without_weights_are_refused(tmp_path: Path, kind: str) -> None:
    tiny = tiny_model(hidden=COLUMNS)
    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    raw = bytes(512 * COLUMNS // elements * size)
    tiny.tensors["blk.1.ffn_up.weight"] = (int(GGMLQuantizationType[kind]), (512, COLUMNS), raw)
    with pytest.raises(FormatError, match=f"'blk.1.ffn_up.weight' has the type {kind}"):
        opened(tiny, tmp_path)


def split(tiny: Tiny, folder: Path, count: int = 3, name: str = "tiny-{:05d}-of-{:05d}.gguf") -> list[Path]:
    """Write `tiny` as llama-gguf-split would, the metadata in the first part only."""
    names = list(tiny.tensors)
    paths = []
    for number in range(count):
        metadata: Metadata = {
            "split.no": (U16, number),
            "split.count": (U16, count),
            "split.tensors.count": (I32, len(names)),
        }
        share: Tensors = {key: tiny.tensors[key] for key in names[number::count]}
        paths.append(folder / name.format(number + 1, count))
        paths[-1].write_bytes(gguf_bytes((tiny.metadata if number == 0 else {}) | metadata, share).data)
    return paths


def test_a_split_model_reads_as_the_whole_one(tmp_path: Path) -> None:
    tiny = tiny_model()
    whole = opened(tiny, tmp_path)
    for path in split(tiny, tmp_path):
        source = open_gguf(path)
        assert (source.name, source.config) == ("tiny", whole.config)
        assert list(source.tensors) == list(whole.tensors)
        for name, tensor in whole.tensors.items():
            np.testing.assert_array_equal(source.tensors[name].read(0, 3), tensor.read(0, 3))


def test_the_fingerprint_of_a_split_model_covers_every_part(tmp_path: Path) -> None:
    paths = split(tiny_model(), tmp_path)
    first = open_gguf(paths[0]).fingerprint
    data = paths[2].read_bytes()
    paths[2].unlink()
    paths[2].write_bytes(data)
    assert open_gguf(paths[0]).fingerprint != first


def test_parts_that_do_not_make_a_model_are_refused(tmp_path: Path) -> None:
    tiny = tiny_model()
    paths = split(tiny, tmp_path)
    kept = [path.read_bytes() for path in paths]

    def restore() -> None:
        for path, data in zip(paths, kept, strict=True):
            path.write_bytes(data)

    paths[1].unlink()
    with pytest.raises(FormatError, match="1 of them are missing beside it, first tiny-00002-of-00003.gguf"):
        open_gguf(paths[0])
    restore()
    paths[1].write_bytes(kept[2])
    with pytest.raises(FormatError, match="tiny-00002-of-00003.gguf calls itself part 3 of 3, but its name says 2"):
        open_gguf(paths[0])
    restore()
    paths[0].rename(tmp_path / "other.gguf")
    with pytest.raises(FormatError, match="one of 3 parts of a model, which are to be named <name>-00001-of-00003"):
        open_gguf(tmp_path / "other.gguf")
    restore()
    paths[2].write_bytes(kept[2][:-8])
    with pytest.raises(FormatError, match="truncated or damaged"):
        open_gguf(paths[0])
    other = tmp_path / "other"
    other.mkdir()
    split(Tiny(tiny.weights, tiny.metadata, dict(list(tiny.tensors.items())[:-3])), other)
    restore()
    paths[2].write_bytes((other / paths[2].name).read_bytes())
    with pytest.raises(FormatError, match="says that the model has 20 tensors, but its 3 parts hold 19"):
        open_gguf(paths[0])
    paths[2].write_bytes(kept[1].replace(b"split.no\x02\x00\x00\x00\x01", b"split.no\x02\x00\x00\x00\x02"))
    with pytest.raises(FormatError, match="holds the tensor 'blk.0.attn_norm.weight', as tiny-00002"):
        open_gguf(paths[0])


def test_reading_part_of_a_tensor_reads_only_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, _ = with_tensor("Q6_K")
    source = opened(tiny, tmp_path)
    asked: list[int] = []
    read = GGUFParts.read
    monkeypatch.setattr(
        GGUFParts,
        "read",
        lambda *given: asked.append(len(result := read(*given))) or result,  # type: ignore[func-returns-value]
    )
    source.tensors[UP].read(10, 12)
    assert asked == [2 * 210]


@pytest.mark.parametrize(
    ("kind", "at"), [("Q4_K", 0), ("F32", None), ("Q8_0", 0), ("BF16", None), ("MXFP4", 0), ("IQ4_XS", 0)]
)
def test_numbers_that_are_not_finite_are_named(tmp_path: Path, kind: str, at: int | None) -> None:
    tiny, numbers = with_tensor(kind)
    type_id, shape, data = tiny.tensors["blk.1.ffn_up.weight"]
    raw = np.frombuffer(data, np.uint8).reshape(shape[0], -1).copy()
    if kind == "MXFP4":
        raw[7, 0] = 255
    elif at is not None:
        raw[7, at : at + 2] = np.array([np.inf], "<f2").view(np.uint8)
    else:
        raw[7, : len(raw[7]) // shape[1]] = 255
    tiny.tensors["blk.1.ffn_up.weight"] = (type_id, shape, raw.tobytes())
    path = tiny.write(tmp_path / "tiny.gguf")
    tensor = open_gguf(path).tensors[UP]
    np.testing.assert_array_equal(tensor.read(8, 20), numbers[8:20])
    with pytest.raises(FormatError, match=rf"tensor 'blk.1.ffn_up.weight' \({kind}\) holds NaN or infinities"):
        tensor.read(0, 8)
    assert not np.isfinite(open_gguf(path, allow_nonfinite=True).tensors[UP].read(7, 8)).all()
    if tensor.coding is not None:
        with pytest.raises(FormatError, match="scales that are not finite"):
            tensor.codes(0, 8)


def test_what_no_format_of_mlx_holds_is_counted(tmp_path: Path) -> None:
    assert not opened(tiny_model(matrix=GGMLQuantizationType.Q5_1), tmp_path).requantized()
    assert opened(with_tensor("Q4_K")[0], tmp_path).requantized() == {"Q4_K": 1}


def test_several_threads_read_at_once(tmp_path: Path) -> None:
    source = opened(wide_model(COLUMNS), tmp_path)
    expected = {name: tensor.read(0, tensor.shape[0]) for name, tensor in source.tensors.items()}

    def read(name: str) -> bool:
        return all(np.array_equal(source.tensors[name].read(0, len(expected[name])), expected[name]) for _ in range(20))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, expected))
    finally:
        sys.setswitchinterval(interval)


def test_a_source_that_was_closed_says_so(tmp_path: Path) -> None:
    source = opened(tiny_model(), tmp_path)
    source.close()
    with pytest.raises(FormatError, match="'output_norm.weight' cannot be read: bad file descriptor"):
        source.tensors["model.norm.weight"].read(0, 1)
