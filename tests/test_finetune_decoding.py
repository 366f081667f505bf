"""Adapters merged for decoding: the same log-probabilities as beside their layers, and all put back afterwards."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tiny import write_tiny_model

from edger1.train.adapters.wiring import AdapterSpec
from edger1.train.finetune import decoding
from edger1.train.finetune.method import Batch
from edger1.train.finetune.policy import open_policy
from edger1.train.finetune.rollouts import Decoding, make_prompt, roll_out


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_samplers_log_probabilities_are_the_training_passes(tmp_path: Path, kind: str) -> None:
    policy = open_policy(str(write_tiny_model(tmp_path / "model")), AdapterSpec(kind=kind, rank=4), seed=1)  # type: ignore[arg-type]
    try:
        mx.random.seed(0)
        policy.assign({n: w + 0.05 * mx.random.normal(w.shape) for n, w in policy.parameters().items()})
        prompt = make_prompt("row", "count to ten", {}, policy.tokenizer)
        found = roll_out(policy, [prompt], 3, Decoding(12, 0.8), seed=1)
        for each in found:
            ids = np.array([each.prompt_ids + each.ids], dtype=np.int32)
            weights = np.zeros(ids.shape, dtype=np.float32)
            weights[0, len(each.prompt_ids) :] = 1
            batch = Batch(ids, np.zeros_like(ids), weights)
            trained = np.array(policy.logprobs(batch, temperature=0.8))[0, len(each.prompt_ids) :]
            assert np.abs(trained - each.logprobs).max() < 1e-3
    finally:
        policy.close()


def test_afterwards_the_adapter_is_beside_its_layers_again(tmp_path: Path) -> None:
    policy = open_policy(str(write_tiny_model(tmp_path / "model")), AdapterSpec(rank=4), seed=1)
    try:
        ids = mx.array([[1, 2, 3]])
        before, classes = np.array(policy.model(ids)), [type(m) for m in policy.model.modules()]
        with policy.merged() as model:
            assert not any("lora_a" in module for module in model.modules())
        assert [type(m) for m in policy.model.modules()] == classes
        assert np.array_equal(np.array(policy.model(ids)), before)
    finally:
        policy.close()


def test_large_models_decode_with_the_adapter_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = open_policy(str(write_tiny_model(tmp_path / "model")), AdapterSpec(rank=4), seed=1)
    try:
        monkeypatch.setattr(decoding, "MERGED_BYTES", 1000)
        with policy.merged() as model:
            assert any("lora_a" in module for module in model.modules())
    finally:
        policy.close()
