"""The engine's figures over a session: bounded memory, nothing lost in the sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from edger1.messages import Figures
from edger1.tui.engine_history import BUCKETS_MAX, History

LAYERS = 6


@dataclass(frozen=True)
class Live:
    id: str
    figures: Figures
    layers: list[dict[str, Any]] | None = None


def live(step: int, answer: str = "a", rate: float = 20.0, layers: int = LAYERS) -> Live:
    """The figures of the `step`-th half second of an answer."""
    decode = {"stall_s": 0.1 * step, "compute_s": 0.3 * step, "bytes_read": 1000 * step, "hit_rate": None}
    return Live(
        answer,
        Figures(
            decode_tokens_per_s=rate,
            accounted_memory_bytes=100 + step,
            context_used=step,
            context_size=512,
            experts={"decode": decode, "experts": [64] * layers},
        ),
        [{"layer": 2 + i, "hits": 7, "misses": i, "experts": {i: 4, 9: 1}} for i in range(layers)],
    )


def test_figures_of_a_session_add_up_and_stay_few() -> None:
    history = History()
    steps = 10_000
    for step in range(steps):
        history.add(live(step), at=1000.0 + step / 2)
    assert BUCKETS_MAX // 2 <= len(history.buckets) <= BUCKETS_MAX
    assert sum(bucket.seconds for bucket in history.buckets) == pytest.approx((steps - 1) / 2)
    assert sum(bucket.cell(3)[1] for bucket in history.buckets) == 3 * steps
    assert sum(bucket.cell(3)[0] for bucket in history.buckets) == 7 * steps
    assert sum(bucket.bytes_read for bucket in history.buckets) == 1000 * (steps - 1)
    assert history.buckets[5].tokens_per_s == pytest.approx(20.0)
    assert history.buckets[5].stall_share == pytest.approx(0.25)
    assert max(bucket.memory_bytes for bucket in history.buckets) == 100 + steps - 1
    assert history.buckets[0].begin == 1000.0
    assert history.buckets[-1].end == 1000.0 + (steps - 1) / 2
    assert all(one.end <= two.begin for one, two in zip(history.buckets, history.buckets[1:], strict=False))


def test_experts_are_ranked_by_their_use() -> None:
    history = History()
    for step in range(3):
        history.add(live(step), at=step / 2)
    assert history.layers == [2, 3, 4, 5, 6, 7]
    assert history.experts == 64
    assert history.ranked(1) == [(1, 12), (9, 3)]


def test_keys_of_experts_may_be_text_as_json_has_them() -> None:
    history = History()
    history.add(Live("a", Figures(), [{"layer": 0, "hits": 1, "misses": 1, "experts": {"3": 2}}]), at=0.0)
    assert history.ranked(0) == [(3, 2)]


def test_a_pause_between_answers_is_no_time_of_decoding() -> None:
    history = History()
    history.add(live(1), at=0.0)
    history.add(live(2), at=0.5)
    history.add(live(1, "b"), at=3600.0)
    history.add(live(2, "b"), at=3600.5)
    assert sum(bucket.seconds for bucket in history.buckets) == 1.0
    assert sum(bucket.stall_s for bucket in history.buckets) == pytest.approx(0.4)


def test_a_dense_model_has_rates_and_memory_only() -> None:
    history = History()
    for step in range(4):
        history.add(Live("a", Figures(decode_tokens_per_s=30.0, peak_memory_bytes=7)), at=step / 2)
    assert not history.streamed
    assert history.buckets[-1].hit_rate is None
    assert history.buckets[-1].stall_share is None
    assert history.buckets[-1].memory_share is None
    assert history.series("tokens_per_s")[0] == pytest.approx(30.0)


def test_another_models_layers_begin_anew() -> None:
    history = History()
    history.add(live(1), at=0.0)
    history.add(live(1, "b", layers=4), at=9.0)
    assert len(history.layers) == len(history.uses) == 4
    assert len(history.buckets) == 1


def test_watchers_are_told_until_they_stop() -> None:
    history = History()
    told: list[int] = []
    stop = history.watch(lambda: told.append(1))
    history.add(live(1), at=0.0)
    history.clear()
    assert len(told) == 2
    assert history.buckets == []
    stop()
    stop()
    history.add(live(1), at=0.0)
    assert len(told) == 2
