"""Policies over mlx-lm's families: packed rows give each document what it has alone, and gradients agree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import families
import mlx.core as mx
import numpy as np
import pytest
from tiny import write_tiny_model

from edger1.folder import ModelFolder
from edger1.mlx_runtime import on_gpu
from edger1.train.adapters.wiring import AdapterSpec, attach
from edger1.train.finetune.method import Batch
from edger1.train.finetune.policy import LocalPolicy, open_policy

SIZES = (9, 6, 8)


@contextmanager
def opened(family: str, *, quantize: bool = True, checkpointing: bool = True) -> Iterator[LocalPolicy]:
    model = families.build(family, quantize=quantize)
    adapted = attach(model, AdapterSpec(rank=2, targets=("attention",)))
    random = np.random.default_rng(3)
    adapted.assign({n: mx.array(random.normal(size=w.shape) * 0.05) for n, w in adapted.parameters().items()})
    folder = ModelFolder(Path(family), families.tiny_config(family), family, None, None, (), 0, 1, None, False)
    policy = LocalPolicy(model, None, folder, adapted, checkpointing=checkpointing)
    try:
        yield policy
    finally:
        policy.close()


def documents() -> list[np.ndarray]:
    random = np.random.default_rng(5)
    return [random.integers(3, 190, size).astype(np.int32) for size in SIZES]


def batch_of(rows: list[list[np.ndarray]]) -> Batch:
    length = max(sum(map(len, row)) for row in rows)
    ids = np.zeros((len(rows), length), np.int32)
    which = np.full((len(rows), length), -1, np.int32)
    weights = np.zeros((len(rows), length), np.float32)
    for r, row in enumerate(rows):
        at = 0
        for number, document in enumerate(row):
            ids[r, at : at + len(document)] = document
            which[r, at : at + len(document)] = number
            weights[r, at + 1 : at + len(document)] = 1
            at += len(document)
    return Batch(ids, which, weights)


def alone(policy: LocalPolicy, document: np.ndarray) -> np.ndarray:
    """Log-probabilities by the model's own call."""
    logits = policy.model(mx.array(document)[None])[0, :-1].astype(mx.float32)
    normal = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return np.array(normal)[np.arange(len(document) - 1), document[1:]]


def gradients(policy: LocalPolicy, batch: Batch) -> dict[str, np.ndarray]:
    def loss() -> tuple[mx.array, dict[str, mx.array]]:
        return -(policy.logprobs(batch) * mx.array(batch.weights)).sum(), {}

    return {name: np.array(value) for name, value in policy.value_and_grad(loss)[2].items()}


# Windows, a soft-capped and a scaled head, multipliers, experts, sinks and latent attention among them.
PACKED = ("llama", "gemma3_text", "cohere", "starcoder2", "granite", "qwen3", "qwen3_moe", "gpt_oss", "phi3", "olmo2")


@pytest.mark.parametrize("family", PACKED)
def test_documents_in_a_row_are_as_alone(family: str) -> None:
    a, b, c = documents()
    with opened(family) as policy:
        assert policy.packs
        assert policy.structure is not None
        assert policy.layered
        found = np.array(policy.logprobs(batch_of([[a, b], [c]])))
        for row, at, document in ((0, 0, a), (0, len(a), b), (1, 0, c)):
            expected = alone(policy, document)
            assert np.abs(found[row, at + 1 : at + len(document)] - expected).max() < 2e-3


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_moe", "gpt_oss"])
def test_gradients_layer_by_layer_are_those_of_the_whole(family: str) -> None:
    a, b, c = documents()
    batch = batch_of([[a, b], [c]])
    with opened(family) as policy:
        found = gradients(policy, batch)
    with opened(family, checkpointing=False) as policy:
        assert not policy.layered
        expected = gradients(policy, batch)
    largest = max(np.abs(value).max() for value in expected.values())
    assert largest > 0
    assert max(np.abs(found[name] - expected[name]).max() for name in expected) < 1e-4 * largest


# Recurrent layers, and attention that applies the mask of one row to another.
@pytest.mark.parametrize("family", ["mamba", "qwen3_next", "gemma2"])
def test_what_cannot_be_packed_takes_one_document_a_row(family: str) -> None:
    a, b, _ = documents()
    model: Any = families.build(family)
    folder = ModelFolder(Path(family), {}, family, None, None, (), 0, 1, None, False)
    policy = LocalPolicy(model, None, folder, None)
    try:
        assert not policy.packs
        assert any("not packed" in line for line in policy.describe())
        found = np.array(policy.logprobs(batch_of([[a], [b]])))
        for row, document in ((0, a), (1, b)):
            assert np.abs(found[row, 1 : len(document)] - alone(policy, document)).max() < 2e-3
        with pytest.raises(ValueError, match="one a row"):
            policy.logprobs(batch_of([[a, b]]))
    finally:
        policy.close()


def test_going_back_holds_one_layer_at_a_time(tmp_path: Path) -> None:
    if on_gpu():
        pytest.skip("counts the CPU's arrays")
    model = write_tiny_model(tmp_path / "model", num_hidden_layers=16)
    ids = np.random.default_rng(1).integers(3, 190, (2, 256)).astype(np.int32)
    weights = np.ones((2, 256), np.float32)
    weights[:, 0] = 0
    batch = Batch(ids, np.zeros((2, 256), np.int32), weights)
    peaks = {}
    for checkpointing in (True, False):
        policy = open_policy(model, AdapterSpec(rank=2), checkpointing=checkpointing)
        gradients(policy, batch)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        gradients(policy, batch)
        peaks[checkpointing] = mx.get_peak_memory() - before
        policy.close()
    assert peaks[True] < 0.25 * peaks[False]
