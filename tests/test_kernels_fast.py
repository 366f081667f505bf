"""What the int8 activations of precision "fast" cost on a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edger1 import kernels

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not kernels.state().available, reason="the CPU kernels are not built"),
]

TEXT = """The lighthouse on the northern cape was built in 1871 from granite that came by barge, forty tonnes a trip.
Its keeper wrote down the weather four times a day for 31 years, and when he retired his daughter went on
with it for another twenty. Nobody had asked them to. In 1926 a meteorologist who was looking for something
else found the books in a cupboard and saw that they were the longest unbroken record of wind on that coast.
He spent two winters copying them. What he published was short: a table, three curves and half a page of
text, which ended with the remark that the storms had not become more frequent, as everybody believed, but
that they came earlier in the year. "One learns from this," he wrote, "that memory keeps the size of a storm
and forgets its date." The table is still in use. If you add up its last column you get 4,382, which is the
number of days in twelve years, less one: the day on which the keeper was married.
"""


def logits(folder: Path, precision: str, ids: list[int], rows: int) -> np.ndarray:
    """Logits (tokens, vocabulary) of a text that is fed `rows` tokens at a time."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from edger1.loader import load

    steps = load("smollm2", folder, ceiling_bytes=8 << 30, context=None, precision=precision)
    model: Any
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            model = stop.value
            break
    caches = make_prompt_cache(model.model)
    parts = [np.array(model.model(mx.array([ids[i : i + rows]]), cache=caches)[0]) for i in range(0, len(ids), rows)]
    model.close()
    return np.concatenate(parts).astype(np.float64)


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("rows", [1, 200], ids=["decode", "prefill"])
def test_mean_kl_to_exact_is_below_a_thousandth_of_a_nat(smollm2: Path, rows: int) -> None:
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(smollm2 / "tokenizer.json")).encode(TEXT).ids[: 200 if rows > 1 else 80]
    exact = log_softmax(logits(smollm2, "exact", ids, 200))
    fast = log_softmax(logits(smollm2, "fast", ids, rows))
    kl = (np.exp(exact) * (exact - fast)).sum(-1).mean()
    print(f"mean KL of fast to exact, {rows} tokens at a time: {kl:.2e} nats")
    assert 0 < kl <= 1e-3
