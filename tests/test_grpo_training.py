"""GRPO as a method: what it samples, leaves out, learns from again, remembers; and that it learns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from grpo_toys import FunctionReward, ToyPolicy, prompts, train

from edger1.train.finetune import rollout_log
from edger1.train.finetune.grpo import Grpo
from edger1.train.finetune.grpo_settings import PAPERS, GrpoSettings


def sevens(text: str) -> float:
    return text.count("7") / 8


def make(function: Any = sevens, count: int = 6, held_out: int = 0, **settings: Any) -> Grpo:
    chosen = GrpoSettings.of({"group": 4, "prompts": 3, "max_tokens": 8, **settings})
    rewards: Any = FunctionReward(function)
    return Grpo(prompts(count), rewards, chosen, ToyPolicy().tokenizer, seed=1, held_out=prompts(count)[:held_out])


@pytest.mark.parametrize("loss", list(PAPERS))
def test_a_reward_is_learned_in_seconds(loss: str) -> None:
    # The reward is for tokens, so what learns it reaches the limit, which DAPO would hold against it.
    plain = {"overlong": 0.0, "mask_truncated": False}
    method = make(loss=loss, group=8, prompts=4, mini_batches=1, **plain)
    logged = train(ToyPolicy(), method, range(8), rate=3.0 if loss == "dr_grpo" else 1.0)
    assert logged[0]["reward"] < 0.1
    assert logged[-1]["reward"] > 0.5


def test_clipping_binds_from_the_second_update_on() -> None:
    logged = train(ToyPolicy(), make(mini_batches=1, epochs=4, clip_low=0.05, clip_high=0.05), range(4), rate=1.0)
    clipped = [each["clipped_low"] + each["clipped_high"] for each in logged]
    assert clipped[0] == 0
    assert clipped[1] > 0
    # One sampling, in the first of the four.
    assert ["reward" in each for each in logged] == [True, False, False, False]


def test_sampling_and_training_agree_on_log_probabilities() -> None:
    logged = train(ToyPolicy(), make(), range(2))
    assert 0 <= logged[0]["mismatch"] < 1e-5
    assert "mismatch" not in logged[1]


def test_groups_without_variance_are_skipped_and_counted(tmp_path: Path) -> None:
    method = make(lambda text: 1.0)
    method.log_to(tmp_path)
    step = method.step(ToyPolicy(), 0)
    assert step.batches == []
    assert step.tokens == 0
    assert step.figures["skipped_groups"] == step.figures["groups"] == 3
    lines = [json.loads(line) for line in (tmp_path / rollout_log.FILE).read_text().splitlines()]
    assert all(line["skipped"] for line in lines)
    assert len(lines) == 12


def test_leaving_a_group_out_changes_no_gradient() -> None:
    """Of three groups one has no variance; with it in the batch, its tokens' slopes would be 0."""
    policy = ToyPolicy()
    seen: list[str] = []

    def reward(text: str) -> float:
        seen.append(text)
        return 0.0 if len(seen) <= 4 else sevens(text)

    method = make(reward, mini_batches=1)
    step = method.step(policy, 0)
    assert step.figures["skipped_groups"] >= 1
    rows = sum(len(batch.ids) for batch in step.batches)
    assert rows == 12 - 4 * step.figures["skipped_groups"]
    # Each completion counts a twelfth, as if those left out were there.
    for batch in step.batches:
        assert np.allclose(batch.weights.sum(axis=1), 1 / 12)


def test_dynamic_sampling_goes_on_until_the_batch_is_full_or_the_bound_is_reached() -> None:
    asked: list[str] = []

    def every_other_group(text: str) -> float:
        asked.append(text)
        return 0.0 if (len(asked) - 1) // 4 % 2 else float(len(asked) % 4)

    method = make(every_other_group, loss="dapo", overlong=0.0, mask_truncated=False, count=20, most_rounds=9)
    step = method.step(ToyPolicy(), 0)
    assert step.figures["groups"] - step.figures["skipped_groups"] == 3
    assert step.figures["groups"] > 3
    bounded = make(lambda text: 0.0, loss="dapo", overlong=0.0, most_rounds=2)
    assert bounded.step(ToyPolicy(), 0).figures["groups"] == 6


def test_truncated_completions_can_be_left_out_of_the_loss_and_still_count_in_their_group() -> None:
    method = make(mini_batches=1, mask_truncated=True)
    policy = ToyPolicy()
    step = method.step(policy, 0)
    rows = sum(len(batch.ids) for batch in step.batches)
    assert 0 < rows < 12
    assert all((batch.extra["completion"].max(axis=1) >= 0).all() for batch in step.batches)
    # Each that is left ends with the token that ends.
    for batch in step.batches:
        for i in range(len(batch.ids)):
            assert batch.ids[i, np.flatnonzero(batch.weights[i])[-1]] == 10


def test_long_completions_lose_reward_under_a_name_of_its_own(tmp_path: Path) -> None:
    method = make(lambda text: 1.0, overlong=0.5)
    method.log_to(tmp_path)
    method.step(ToyPolicy(), 0)
    for line in map(json.loads, (tmp_path / rollout_log.FILE).read_text().splitlines()):
        assert line["rewards"]["overlong"] == min(0.0, -(line["tokens"] - 4) / 4)
        assert line["reward"] == 1.0 + line["rewards"]["overlong"]


def test_beta_0_makes_no_reference_pass_and_another_beta_one_for_each_batch() -> None:
    without = ToyPolicy()
    logged = train(without, make(beta=0.0), range(4))
    assert without.reference_passes == 0
    assert "kl" not in logged[0]
    with_it = ToyPolicy()
    logged = train(with_it, make(beta=0.1), range(4), rate=0.5)
    # One to see that training starts from the reference, and two mini-batches of each of two samplings.
    assert with_it.reference_passes == 5
    assert logged[0]["kl"] < 1e-9
    assert logged[3]["kl"] > 0


def test_training_that_starts_from_a_trained_adapter_has_that_as_its_reference() -> None:
    policy = ToyPolicy()
    policy.assign({name: weight + 0.1 for name, weight in policy.parameters().items()})
    logged = train(policy, make(beta=0.1), range(3), rate=0.5)
    # Against the model without its adapter it would not be 0 before the first update.
    assert logged[0]["kl"] < 1e-9
    assert logged[1]["kl"] > 1e-9
    assert policy.reference_passes == 1


def test_old_log_probabilities_may_be_the_training_passes() -> None:
    policy = ToyPolicy()
    step = make(old="trainer", mini_batches=1).step(policy, 0)
    for batch in step.batches:
        assert np.array_equal(batch.extra["old"], np.array(policy.logprobs(batch)))
        assert np.allclose(batch.extra["correction"], 1, atol=1e-4)


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_a_resumed_run_ends_with_equal_weights(stop: int) -> None:
    """Stopping falls between updates of one sampling, and between samplings."""
    settings: dict[str, Any] = {"mini_batches": 2, "epochs": 2, "beta": 0.05}
    through = ToyPolicy()
    train(through, make(**settings), range(7), rate=0.3)
    first = ToyPolicy()
    method = make(**settings)
    train(first, method, range(stop), rate=0.3)
    values, arrays = method.state()
    values = json.loads(json.dumps(values))
    arrays = {name: np.array(mx.array(value)) for name, value in arrays.items()}
    second = ToyPolicy()
    second.assign(first.parameters())
    resumed = make(**settings)
    resumed.restore(values, arrays)
    train(second, resumed, range(stop, 7), rate=0.3)
    for name, weight in through.parameters().items():
        assert np.array_equal(np.array(weight), np.array(second.parameters()[name])), name


def test_every_prompt_comes_before_any_comes_again() -> None:
    method = make(count=5)
    names = [prompt.id for _ in range(5) for prompt in method._next_prompts(3)[0]]
    for epoch in range(3):
        assert len(set(names[5 * epoch : 5 * epoch + 5])) == 5
    assert names[:5] != names[5:10]


def test_held_out_prompts_are_answered_greedily() -> None:
    policy, method = ToyPolicy(), make(held_out=4)
    one, again = method.evaluate(policy, 0), method.evaluate(policy, 1)
    assert one is not None
    assert again is not None
    assert one.figures == again.figures
    assert one.better == one.figures["reward"]
    assert len(one.samples) == 3
    assert make().evaluate(policy, 0) is None
