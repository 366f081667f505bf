"""Completions sampled together: the same as alone, their log-probabilities, their ends, their memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from grpo_toys import END, ToyPolicy, prompts
from tiny import write_tiny_model

from edger1.errors import MemoryCeilingError, UsageError
from edger1.train.finetune import rollouts
from edger1.train.finetune.rollouts import Decoding, Prompt, make_prompt, roll_out


class Loaded:
    """A model of a folder on the kernels, as a policy that only generates."""

    def __init__(self, folder: Path) -> None:
        from mlx_lm.utils import load

        from edger1.kernels.install import install

        self.model, self.tokenizer = load(str(folder))
        self.installed = install(self.model, "exact")

    def generation(self) -> Any:
        from contextlib import nullcontext

        return nullcontext(self.model)


def tokens(found: list[rollouts.Rollout]) -> list[tuple[int, ...]]:
    return [each.ids for each in found]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_among_others_gets_the_tokens_that_it_gets_alone(tmp_path: Path, temperature: float) -> None:
    policy: Any = Loaded(write_tiny_model(tmp_path / "model"))
    try:
        asked = [make_prompt(str(i), "words " * (3 * i + 1), {}, policy.tokenizer) for i in range(3)]
        decoding = Decoding(24, temperature, rows=16)
        together = tokens(roll_out(policy, asked, 4, decoding, seed=5))
        alone = [
            ids
            for i, prompt in enumerate(asked)
            for ids in tokens(roll_out(policy, [prompt], 4, Decoding(24, temperature, rows=1), 5, numbers=[i]))
        ]
        assert together == alone
        refilled = tokens(roll_out(policy, asked, 4, Decoding(24, temperature, rows=5), seed=5))
        assert refilled == together
        if temperature:
            assert len(set(together)) == 12
            assert tokens(roll_out(policy, asked, 4, decoding, seed=6)) != together
        else:
            assert len(set(together[:4])) == 1
    finally:
        policy.installed.uninstall()


def test_greedy_rows_are_what_the_model_says_step_by_step() -> None:
    policy = ToyPolicy()
    (prompt,) = prompts(1)
    (found,) = roll_out(policy, [prompt], 1, Decoding(6, 0.0), seed=0)
    ids = list(prompt.ids)
    for token in found.ids:
        logits = policy.model(mx.array([ids]))[0, -1]
        assert int(mx.argmax(logits).item()) == token
        ids.append(token)


def test_log_probabilities_are_those_at_the_temperature() -> None:
    policy = ToyPolicy()
    found = roll_out(policy, prompts(2), 3, Decoding(8, 0.5), seed=1)
    for each in found:
        ids = mx.array([each.prompt_ids + each.ids])
        logits = policy.model(ids)[0, len(each.prompt_ids) - 1 : -1] / 0.5
        scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        expected = np.array(mx.take_along_axis(scores, mx.array(each.ids)[:, None], axis=-1))[:, 0]
        assert each.logprobs.dtype == np.float32
        assert np.abs(each.logprobs - expected).max() < 1e-5


def test_draws_follow_the_distribution() -> None:
    policy = ToyPolicy()
    (prompt,) = prompts(1)
    found = roll_out(policy, [prompt], 600, Decoding(1, 1.0, rows=600), seed=3)
    chances = np.array(mx.softmax(policy.model(mx.array([prompt.ids]))[0, -1]))
    counts = np.bincount([each.ids[0] for each in found], minlength=len(chances)) / 600
    # Four standard deviations of 600 draws.
    assert np.all(np.abs(counts - chances) < 4 * np.sqrt(chances / 600) + 1e-3)


def test_a_completion_ends_with_the_token_that_ends_it_or_with_the_limit() -> None:
    policy = ToyPolicy()
    found = roll_out(policy, prompts(3), 8, Decoding(12, 1.0), seed=2)
    ended, cut = [r for r in found if r.finished], [r for r in found if not r.finished]
    assert ended
    assert cut
    for each in ended:
        assert each.ids[-1] == END
        assert END not in each.ids[:-1]
        assert each.text == "".join(str(i) for i in each.ids[:-1] if i < END)
    for each in cut:
        assert len(each.ids) == 12
        assert END not in each.ids


def test_a_prompt_passes_the_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = ToyPolicy()
    read: list[int] = []
    original = type(policy.model).__call__

    def count(self: Any, ids: mx.array, *args: Any, **rest: Any) -> mx.array:
        if ids.shape[1] > 1:
            read.append(ids.size)
        return original(self, ids, *args, **rest)

    monkeypatch.setattr(type(policy.model), "__call__", count)
    prompt = Prompt("long", "1234567", (1, 2, 3, 4, 5, 6, 7), "1234567")
    roll_out(policy, [prompt], 8, Decoding(4, 1.0, rows=3), seed=0)
    assert read == [6]


def test_a_prompt_of_one_token_is_none_too_short() -> None:
    found = roll_out(ToyPolicy(), [Prompt("short", "1", (1,), "1"), *prompts(1)], 2, Decoding(3, 1.0), seed=0)
    assert [len(each.ids) > 0 for each in found] == [True] * 4


def test_caches_stay_within_the_memory_for_them() -> None:
    policy = ToyPolicy()
    from edger1.kv_layout import kv_layout

    each = kv_layout(policy.model, 4, 512).nbytes(20)
    most: list[int] = []
    original = rollouts._Batch.step

    def step(self: Any) -> Any:
        most.append(len(self.rows))
        return original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts._Batch, "step", step)
        roll_out(policy, prompts(2), 8, Decoding(16, 1.0, cache_bytes=4 * each), seed=0)
    assert max(most) == 3
    with pytest.raises(MemoryCeilingError, match="max_tokens"):
        roll_out(policy, prompts(1), 2, Decoding(16, 1.0, cache_bytes=each), seed=0)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(UsageError, match="row 7 is empty"):
        make_prompt("row 7", "", {}, ToyPolicy().tokenizer)
