"""GRPO's losses against the same written down in NumPy, one token after the other; advantages, weights, settings."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest
from grpo_toys import fixed_batch

from edger1.errors import UsageError
from edger1.train.finetune.grpo import group_advantages, overlong, surrogate
from edger1.train.finetune.grpo_settings import PAPERS, GrpoSettings
from edger1.train.finetune.method import Batch


def by_hand(now: np.ndarray, batch: Batch, s: GrpoSettings) -> tuple[float, np.ndarray]:
    """Return the loss and its gradient by every token's log-probability, in f64, from the papers' formulas."""
    old, reference, advantages = (batch.extra[name].astype(np.float64) for name in ("old", "reference", "advantages"))
    now = now.astype(np.float64)
    loss, gradient = 0.0, np.zeros_like(now)
    rows = [np.flatnonzero(batch.extra["completion"][i] == i) for i in range(len(now))]
    tokens = sum(len(places) for places in rows)
    for i, places in enumerate(rows):
        size = len(places)
        share = {
            "grpo": 1 / (len(rows) * size),
            "gspo": 1 / (len(rows) * size),
            "dr_grpo": 1 / (len(rows) * s.max_tokens),
            "dapo": 1 / tokens,
        }[s.loss]
        for t in places:
            among = list(places) if s.loss == "gspo" else [t]
            ratio = math.exp(sum(now[i, k] - old[i, k] for k in among) / len(among))
            a = advantages[i, t]
            bound = min(max(ratio, 1 - s.clip_low), 1 + s.clip_high)
            loss += share * -min(ratio * a, bound * a)
            if ratio * a <= bound * a:
                for k in among:
                    gradient[i, k] += share * -ratio * a / len(among)
            u = math.exp(reference[i, t] - now[i, t])
            k3, weight = u - math.log(u) - 1, ratio if s.unbiased_kl else 1.0
            loss += share * s.beta * weight * k3
            gradient[i, t] += share * s.beta * weight * (1 - u)
            for k in among if s.unbiased_kl else ():
                gradient[i, k] += share * s.beta * weight * k3 / len(among)
    return loss, gradient


@pytest.mark.parametrize("loss", list(PAPERS))
@pytest.mark.parametrize(("beta", "unbiased"), [(0.0, True), (0.04, True), (0.04, False)])
def test_losses_and_gradients_are_those_of_the_formulas(loss: str, beta: float, unbiased: bool) -> None:
    settings = GrpoSettings(loss=loss, beta=beta, unbiased_kl=unbiased, max_tokens=16)
    batch, now = fixed_batch(settings)
    expected, slopes = by_hand(now, batch, settings)

    def of(new: mx.array) -> mx.array:
        return surrogate(new, batch, settings)[0]

    value, gradient = mx.value_and_grad(of)(mx.array(now))
    assert abs(value.item() - expected) < 1e-5
    assert np.abs(np.array(gradient) - slopes).max() < 1e-5
    # Some tokens are beyond the bounds, and some are not: else this would show nothing of clipping.
    _, figures = surrogate(mx.array(now), batch, settings)
    assert 0 < figures["clipped_low"].item() + figures["clipped_high"].item() < 1


@pytest.mark.parametrize("loss", list(PAPERS))
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_of_a_toy_models_weights(loss: str, temperature: float) -> None:
    """The toy is a table of the logits after each token; its gradient is written down in NumPy."""
    settings = GrpoSettings(loss=loss, beta=0.1, max_tokens=16)
    batch, _ = fixed_batch(settings)
    random = np.random.default_rng(1)
    table = random.normal(0, 1, (12, 12))
    chances = np.exp(table / temperature) / np.exp(table / temperature).sum(axis=1, keepdims=True)
    now = np.zeros(batch.ids.shape)
    now[:, 1:] = np.log(chances[batch.ids[:, :-1], batch.ids[:, 1:]])
    now = np.where(batch.weights != 0, now, 0)
    # An old policy that is near enough for some of the ratios to be within the bounds.
    moved = random.normal(0, 3e-3 if loss == "gspo" else 0.3, now.shape)
    batch.extra["old"] = np.where(batch.weights != 0, now + moved, 0).astype(np.float32)
    _, slopes = by_hand(now, batch, settings)
    expected = np.zeros_like(table)
    for i, t in zip(*np.nonzero(batch.weights), strict=True):
        before, token = batch.ids[i, t - 1], batch.ids[i, t]
        expected[before] += slopes[i, t] * (np.eye(12)[token] - chances[before]) / temperature

    def of(weights: mx.array) -> mx.array:
        logits = weights[mx.array(batch.ids[:, :-1])] / temperature
        chosen = mx.take_along_axis(logits, mx.array(batch.ids[:, 1:, None]), axis=-1)[..., 0]
        scores = mx.where(mx.array(batch.weights[:, 1:] != 0), chosen - mx.logsumexp(logits, axis=-1), 0)
        return surrogate(mx.concatenate([mx.zeros((len(now), 1)), scores], axis=1), batch, settings)[0]

    assert np.abs(np.array(mx.grad(of)(mx.array(table.astype(np.float32)))) - expected).max() < 1e-5


def test_where_the_policy_has_not_moved_nothing_is_clipped_and_the_slope_is_the_advantage() -> None:
    settings = GrpoSettings(max_tokens=16)
    batch, _ = fixed_batch(settings)
    old = mx.array(batch.extra["old"])
    _, figures = surrogate(old, batch, settings)
    assert figures["clipped_low"].item() == figures["clipped_high"].item() == figures["mismatch"].item() == 0
    slope = np.array(mx.grad(lambda new: surrogate(new, batch, settings)[0])(old))
    assert np.allclose(slope, -batch.extra["advantages"] * batch.weights)


def test_the_weights_are_those_of_each_paper() -> None:
    def sums(loss: str) -> np.ndarray:
        batch, _ = fixed_batch(GrpoSettings(loss=loss, max_tokens=16))
        return batch.weights.sum(axis=1)

    batch, _ = fixed_batch(GrpoSettings(max_tokens=16))
    sizes = (batch.weights != 0).sum(axis=1)
    assert np.allclose(sums("grpo"), 1 / 6)
    assert np.allclose(sums("dr_grpo"), sizes / (6 * 16))
    assert np.allclose(sums("dapo"), sizes / sizes.sum())


def test_advantages_are_in_standard_deviations_of_the_group() -> None:
    found, flat = group_advantages(np.array([1.0, 0.0, 0.0, 1.0, 2.0, 2.0, 2.0, 2.0]), 4, "group")
    deviation = np.std([1, 0, 0, 1], ddof=1) + 1e-4
    assert np.allclose(found, [0.5 / deviation, -0.5 / deviation, -0.5 / deviation, 0.5 / deviation, 0, 0, 0, 0])
    assert flat.tolist() == [False] * 4 + [True] * 4
    plain, _ = group_advantages(np.array([3.0, 0.0, 0.0, 0.0]), 4, "none")
    assert plain.tolist() == [2.25, -0.75, -0.75, -0.75]


def test_long_completions_lose_up_to_1() -> None:
    assert [overlong(length, 100, 0.2) for length in (10, 80, 90, 100, 120)] == [0, 0, -0.5, -1, -1]


def test_a_capped_correction_weighs_each_token() -> None:
    settings = GrpoSettings(max_tokens=16)
    batch, now = fixed_batch(settings)
    half = np.full(batch.ids.shape, 0.5, dtype=np.float32)
    plain, _ = surrogate(mx.array(now), batch, settings)
    corrected, _ = surrogate(
        mx.array(now), Batch(batch.ids, batch.documents, batch.weights, {**batch.extra, "correction": half}), settings
    )
    assert corrected.item() == pytest.approx(plain.item() / 2, rel=1e-5)


def test_settings_take_the_papers_values_unless_told_otherwise() -> None:
    assert (GrpoSettings(loss="dapo").clip_high, GrpoSettings(loss="dapo").dynamic) == (0.28, True)
    assert GrpoSettings(loss="dapo", dynamic=False).dynamic is False
    assert GrpoSettings(loss="dr_grpo").scale == "none"
    assert GrpoSettings(loss="gspo").clip_low == 3e-4


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"loss": "ppo"}, "expected one of grpo, dr_grpo, dapo, gspo"),
        ({"group": 1}, "2 or more"),
        ({"top_p": 0.9}, "top_p, which is no setting"),
        ({"temperature": 0.0}, "above 0"),
        ({"clip_low": "wide"}, "such as 0.2"),
        ({"scale": "batch"}, "group or none"),
        ({"old": "new"}, "sampler, trainer"),
        ({"overlong": 3.0}, "from 0 to 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(table: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        GrpoSettings.of(table)
