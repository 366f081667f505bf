"""EdgeR1's exact kernels against plain MLX on a tiny model of every family that mlx-lm ships, dense and quantized."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from families import UNBUILDABLE, build, families, logits, relative_error
from mlx_lm.models import deepseek_v41

from edger1.kernels import state

TOLERANCE = 1e-5
"""Relative RMS error of each pass's logits. These models keep correct rounding within about 3e-6."""

kernels = pytest.importorskip("edger1.kernels.install", reason="edger1.kernels.install is missing: nothing to compare")
pytestmark = [
    pytest.mark.parity,
    pytest.mark.skipif(not state().available, reason=f"nothing to compare, EdgeR1's kernels are {state().reason}"),
]


@contextlib.contextmanager
def with_kernels(model: nn.Module) -> Iterator[None]:
    """Run `model` on EdgeR1's exact kernels, and on MLX's own operations afterwards."""
    installed = kernels.install(model, precision="exact")
    assert installed.active, installed.reason
    try:
        yield
    finally:
        installed.uninstall()


@pytest.fixture(autouse=True)
def smooth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out DeepSeek V4.1's rounding of keys to 4 and 8 bits, where a last bit can turn into a whole step."""
    monkeypatch.setattr(deepseek_v41, "_fake_quant_fp4", lambda x, **_: x)
    monkeypatch.setattr(deepseek_v41, "_fake_quant_fp8", lambda x, _: x)


@pytest.mark.parametrize("quantize", [False, True], ids=["f32", "4bit"])
@pytest.mark.parametrize("family", [name for name in families() if name not in UNBUILDABLE])
def test_exact_kernels_give_what_mlx_gives(family: str, quantize: bool) -> None:
    model = build(family, quantize=quantize)
    plain = logits(model)
    with with_kernels(model):
        ours = logits(model)
    errors = [relative_error(a, b) for a, b in zip(ours, plain, strict=True)]
    assert max(errors) <= TOLERANCE, f"prompt, then decoded tokens: {errors}"
    for before, after in zip(plain, logits(model), strict=True):
        assert np.array_equal(before, after), "uninstall() did not give MLX's own operations back"
    del model
    gc.collect()
    mx.clear_cache()


def test_the_kernels_take_part() -> None:
    """Sums in another order round differently: equal bits would mean that MLX ran twice."""
    model = build("llama", quantize=True)
    plain = logits(model)
    with with_kernels(model):
        ours = logits(model)
    assert not any(np.array_equal(a, b) for a, b in zip(ours, plain, strict=True))
