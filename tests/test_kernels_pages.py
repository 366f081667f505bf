"""Moving weights to huge pages changes where they lie and nothing else."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from edger1 import kernels
from edger1.kernels.pages import HUGE_PAGE_BYTES, use_huge_pages

pytestmark = pytest.mark.skipif(kernels._load()[0] is None, reason="the kernels are not built")


def test_values_stay():
    large = mx.arange(3_000_000, dtype=mx.int32)
    small = mx.arange(100)
    mx.eval(large, small)
    moved = use_huge_pages([large, small])
    assert moved % HUGE_PAGE_BYTES == 0
    assert 0 <= moved <= large.nbytes
    assert np.array_equal(np.array(large), np.arange(3_000_000, dtype=np.int32))


def test_an_array_that_is_not_computed_is_refused():
    with pytest.raises(ValueError, match="evaluated"):
        use_huge_pages([mx.zeros((1000, 1000)) + 1])
