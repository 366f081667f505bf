"""Codes fitted to products: less error than plain rounding, and arrays that MLX reads as what was fitted."""

from __future__ import annotations

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from edger1.quant.fit import rounded  # noqa: E402
from edger1.quant.fitting_codes import Curvature, Grid, cost, fit, pack, quantize  # noqa: E402


def matrix(rows: int = 24, columns: int = 128, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def correlated(columns: int = 128, seed: int = 1) -> np.ndarray:
    """Inputs that lie near a few directions, some columns much louder than others."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((600, 24)) @ rng.standard_normal((24, columns)) * rng.lognormal(0, 1, columns)
    inputs += 0.1 * rng.standard_normal(inputs.shape)
    return (inputs.T @ inputs / len(inputs)).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_mlx_reads_what_was_fitted(bits: int, dtype: str) -> None:
    rows, moments = matrix(), correlated()
    codes = quantize(rows, bits, 64, dtype, moments)
    scales, biases = (mx.array(part.data) for part in (codes.scales, codes.biases))
    if dtype == "BF16":
        scales, biases = scales.view(mx.bfloat16), biases.view(mx.bfloat16)
    wide = (scales.astype(mx.float32), biases.astype(mx.float32))
    read = np.array(mx.dequantize(mx.array(codes.weight.data), *wide, group_size=64, bits=bits))
    assert np.allclose(read, fit(rows, Grid(bits, 64, dtype), moments).values(), atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_each_step_lowers_the_cost(bits: int) -> None:
    rows, moments, grid = matrix(), correlated(), Grid(bits, 64, "F32")
    plain = cost(rows, rounded(rows, grid), moments)
    searched = cost(rows, fit(rows, grid, np.diag(moments).copy()).values(), moments)
    fed_back = cost(rows, fit(rows, grid, moments, sweeps=0).values(), moments)
    descended = cost(rows, fit(rows, grid, moments, sweeps=3).values(), moments)
    assert searched < plain
    assert fed_back < 0.6 * searched
    assert descended < fed_back


def test_the_diagonal_weighs_columns() -> None:
    rows, grid = matrix(), Grid(3, 64, "F32")
    loud = np.ones(128, np.float32)
    loud[::8] = 400
    weighted = fit(rows, grid, loud).values()
    alike = fit(rows, grid).values()
    assert np.square(weighted - rows)[:, ::8].mean() < 0.8 * np.square(alike - rows)[:, ::8].mean()


def test_rows_may_be_fitted_in_windows() -> None:
    rows, curvature, grid = matrix(), Curvature.of(correlated()), Grid(4, 32, "BF16")
    whole = fit(rows, grid, curvature)
    parts = [fit(rows[a:b], grid, curvature) for a, b in ((0, 7), (7, 24))]
    # Sums in another order may tip a code that lies in the middle.
    same = np.concatenate([part.codes for part in parts]) == whole.codes
    assert same.mean() > 0.999


def test_an_expert_of_a_stack_is_fitted_by_its_own_moments() -> None:
    stack = np.stack([matrix(seed=5), matrix(seed=6)])
    moments = np.stack([correlated(seed=7), correlated(seed=8)])
    together = quantize(stack, 4, 64, "F16", moments)
    for expert in range(2):
        alone = quantize(stack[expert], 4, 64, "F16", moments[expert])
        assert np.array_equal(together.weight.data[expert], alone.weight.data)
        assert np.array_equal(together.scales.data[expert], alone.scales.data)


@pytest.mark.parametrize("rows", [np.zeros((3, 64)), np.full((3, 64), 0.37), np.full((3, 64), -1e-30)])
def test_groups_without_spread_stay_what_they_are(rows: np.ndarray) -> None:
    for moments in (None, np.ones(64, np.float32), np.eye(64, dtype=np.float32), np.zeros((64, 64), np.float32)):
        values = fit(rows.astype(np.float32), Grid(4, 64, "BF16"), moments).values()
        assert np.isfinite(values).all()
        assert np.abs(values - rows).max() <= np.abs(rows).max() * 2**-8 + 1e-18


def test_inputs_that_were_never_seen_leave_a_column_bounded() -> None:
    rows, moments = matrix(), correlated()
    moments[:, :5] = moments[:5] = 0
    values = fit(rows, Grid(4, 64, "F32"), moments).values()
    assert np.abs(values - rows)[:, :5].max() < 1


def test_packing_has_no_gaps() -> None:
    codes = np.arange(64, dtype=np.uint8)[None] % 8
    packed = pack(codes, 3)
    assert packed.shape == (1, 6)
    bits = int.from_bytes(packed.tobytes(), "little")
    assert [(bits >> 3 * i) & 7 for i in range(64)] == codes[0].tolist()
