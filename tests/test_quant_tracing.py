"""The record of mlx-lm's `sanitize`, against `sanitize` itself on real arrays, for every architecture that it has."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from array_source import tensors
from families import build, families, tiny_config
from mlx.utils import tree_flatten

from edger1.quant import architecture
from edger1.quant.expressions import dtype_name, height, to_numpy
from edger1.quant.tracing import Traced, trace


def assert_is_what_sanitize_gives(family: str, arrays: dict[str, mx.array]) -> Traced:
    config = tiny_config(family)
    traced = trace(config, tensors(arrays))
    model = architecture.build(config)
    real = model.sanitize(dict(arrays)) if hasattr(model, "sanitize") else arrays
    assert list(traced.tensors) == [name for name, _ in tree_flatten(model.parameters())]
    for name, target in traced.tensors.items():
        assert target.shape == tuple(real[name].shape), name
        assert target.dtype == dtype_name(real[name].dtype), name
        rows = height(target.shape)
        whole = target.read(0, rows)
        assert np.array_equal(whole, to_numpy(real[name])), name
        for start, stop in ((0, 1), (rows // 3, rows // 2 + 1), (rows - 1, rows)):
            window = target.read(start, stop)
            assert np.array_equal(window, whole[start:stop] if target.shape else whole), (name, start, stop)
    return traced


@pytest.mark.parametrize("family", families())
def test_a_checkpoint_in_mlx_lms_own_layout(family: str) -> None:
    arrays = dict(tree_flatten(build(family).parameters()))
    traced = assert_is_what_sanitize_gives(family, arrays)
    assert not traced.dropped
    assert not traced.mtp
