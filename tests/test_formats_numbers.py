"""Numbers of few bits: every code of every small float, and packing against its definition and MLX's own."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from weight_folders import bf16, pack_bits

from edger1.errors import FormatError
from edger1.quant.formats import numbers

BYTES = np.arange(256, dtype=np.uint8)


def test_e4m3_is_what_mlx_reads() -> None:
    ours = numbers.decode_fp8(BYTES, "F8_E4M3")
    theirs = np.array(mx.from_fp8(mx.array(BYTES), dtype=mx.float32))
    numbered = BYTES & 0x7F != 0x7F
    np.testing.assert_array_equal(ours[numbered], theirs[numbered])
    assert np.isnan(ours[~numbered]).all()
    assert ours.max(initial=0, where=numbered) == 448


def test_e5m2_is_the_upper_half_of_float16() -> None:
    np.testing.assert_array_equal(
        numbers.decode_fp8(BYTES, "F8_E5M2"), (BYTES.astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    )


@pytest.mark.parametrize("shape", [(7,), (3, 5), (4, 6), (2, 3, 8), ()])
def test_fp8_of_any_shape_and_stride(shape: tuple[int, ...]) -> None:
    raw = np.random.default_rng(0).integers(0, 120, shape, np.uint8)
    single = np.array([numbers.decode_fp8(np.array([b]), "F8_E4M3")[0] for b in raw.reshape(-1)]).reshape(shape)
    np.testing.assert_array_equal(numbers.decode_fp8(raw, "F8_E4M3"), single)
    np.testing.assert_array_equal(numbers.decode_fp8(raw.T, "F8_E4M3"), single.T)


def test_e8m0_is_a_power_of_two() -> None:
    decoded = numbers.decode_e8m0(BYTES)
    assert [float(decoded[n]) for n in (0, 126, 127, 130, 254)] == [2.0**-127, 0.5, 1, 8, 2.0**127]
    assert np.isnan(decoded[255])


def test_fp4_is_what_mlx_reads() -> None:
    packed = np.arange(256, dtype=np.uint8).reshape(16, 16)
    scales = np.full((16, 1), 127, np.uint8)
    theirs = mx.dequantize(mx.array(packed.view(np.uint32)), mx.array(scales), mode="mxfp4", dtype=mx.float32)
    np.testing.assert_array_equal(numbers.decode_fp4(packed), np.array(theirs))


def test_bf16_widens_exactly() -> None:
    values = np.array([[1.5, -2.25], [0, 3e38]], np.float32)
    raw = bf16(values)
    np.testing.assert_array_equal(numbers.decode_bf16(raw), (raw.astype(np.uint32) << 16).view(np.float32))
    assert numbers.decode_bf16(raw)[0].tolist() == [1.5, -2.25]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_codes_are_a_stream_of_bits(bits: int, lead: tuple[int, ...]) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (*lead, 64)).astype(np.uint8)
    words = pack_bits(codes, bits)
    np.testing.assert_array_equal(numbers.unpack(words, bits), codes)
    np.testing.assert_array_equal(numbers.pack(codes, bits), words)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_word_is_enough_for_the_even_bits(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (5, 32 // bits)).astype(np.uint8)
    np.testing.assert_array_equal(numbers.unpack(numbers.pack(codes, bits), bits), codes)


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_what_the_words_have_no_room_for_is_dropped(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (2, 10)).astype(np.uint8)
    unpacked = numbers.unpack(pack_bits(codes, bits), bits)
    np.testing.assert_array_equal(unpacked[:, :10], codes)
    assert unpacked.shape[1] == -(-10 * bits // 32) * 32 // bits


@pytest.mark.parametrize(("bad", "word"), [(np.nan, "NaN"), (np.inf, "infinities"), (-np.inf, "infinities")])
def test_a_tensor_with_what_is_no_number_is_named(bad: float, word: str) -> None:
    values = np.ones((4, 5), np.float32)
    assert numbers.check_finite("a.weight", values) is values
    values[2, 3] = bad
    with pytest.raises(FormatError, match=rf"'a\.weight' holds {word} \(1 of the 20"):
        numbers.check_finite("a.weight", values)


def test_numbers_that_overflow_when_squared_are_numbers() -> None:
    numbers.check_finite("a", np.full((100,), 3e38, np.float32))
