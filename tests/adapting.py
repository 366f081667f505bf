"""Adapters with weights as training would leave them, for tests."""

from __future__ import annotations

import families
import mlx.core as mx

from edger1.train.adapters.wiring import Adapted

IDS = mx.array([families.PROMPT])


def learnt(adapted: Adapted, seed: int = 0, by: float = 0.05) -> Adapted:
    """Move all of an adapter's weights by random amounts, the same for the same seed."""
    keys = mx.random.split(mx.random.key(seed), len(adapted.parameters()))
    adapted.assign(
        {
            name: value + by * mx.random.normal(value.shape, key=key)
            for key, (name, value) in zip(keys, sorted(adapted.parameters().items()), strict=True)
        }
    )
    return adapted
