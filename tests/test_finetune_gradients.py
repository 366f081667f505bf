"""Losses and gradients of fine-tuning against a llama written out in NumPy (`numpy_llama`)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import numpy_llama
import pytest
from numpy_llama import Weights, gradient, logprobs, toy_policy, worst

from edger1.train.finetune.method import Batch
from edger1.train.finetune.sft import Sft, normalised

Toy = tuple[Any, Weights, Weights]


@pytest.fixture(params=["layer by layer", "whole"])
def toy(request: pytest.FixtureRequest) -> Iterator[Toy]:
    found = toy_policy(checkpointing=request.param == "layer by layer")
    assert found[0].packs
    assert found[0].layered == (request.param == "layer by layer")
    yield found
    found[0].close()


def documents(*sizes: int) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [random.integers(0, numpy_llama.CONFIG["vocab_size"], size).astype(np.int32) for size in sizes]


def packed(rows: list[list[np.ndarray]], length: int) -> Batch:
    """Rows of documents whose first three tokens are prompts."""
    ids = np.zeros((len(rows), length), np.int32)
    which = np.full((len(rows), length), -1, np.int32)
    weights = np.zeros((len(rows), length), np.float32)
    for r, row in enumerate(rows):
        at = 0
        for number, document in enumerate(row):
            end = at + len(document)
            ids[r, at:end], which[r, at:end], weights[r, at + 3 : end] = document, number, 1
            at = end
    return Batch(ids, which, weights)


def test_log_probabilities_are_those_of_each_document_alone(toy: Toy) -> None:
    policy, weights, adapter = toy
    a, b, c = documents(7, 9, 12)
    for temperature in (1.0, 0.7):
        found = np.array(policy.logprobs(packed([[a, b], [c]], 20), temperature=temperature))
        for row, at, document in ((0, 0, a), (0, 7, b), (1, 0, c)):
            expected = logprobs(weights, adapter, document, temperature)[3:]
            assert np.abs(found[row, at + 3 : at + len(document)] - expected).max() < 1e-5
        assert not found[0, :3].any() and not found[0, 7:10].any()
        assert not found[0, 16:].any()


def test_the_reference_is_the_model_without_adapter(toy: Toy) -> None:
    policy, weights, _ = toy
    (a,) = documents(9)
    with policy.reference():
        found = np.array(policy.logprobs(packed([[a]], 9)))
    assert np.abs(found[0, 3:] - logprobs(weights, {}, a)[3:]).max() < 1e-5
    with_adapter = np.array(policy.logprobs(packed([[a]], 9)))
    assert np.abs(with_adapter - found).max() > 1e-2


def test_logits_predict_the_counted_tokens(toy: Toy) -> None:
    policy, weights, adapter = toy
    (a,) = documents(8)
    found = np.array(policy.logits(packed([[a]], 8)))
    assert np.abs(found - numpy_llama.logits(weights, adapter, a)[2:7]).max() < 1e-4


def test_the_gradient_of_supervised_fine_tuning(toy: Toy) -> None:
    policy, weights, adapter = toy
    a, b, c = documents(7, 9, 12)
    step = normalised([packed([[a, b]], 20), packed([[c]], 14)])
    counted = sum(len(document) - 3 for document in (a, b, c))
    assert step.tokens == counted

    def loss(adapter: Weights) -> Any:
        return -sum(logprobs(weights, adapter, document)[3:].sum() for document in (a, b, c)) / counted

    total, gradients = 0.0, {name: np.zeros_like(value) for name, value in adapter.items()}
    for batch in step.batches:
        value, _, found = policy.value_and_grad(lambda batch=batch: Sft.loss(None, policy, batch))  # type: ignore[arg-type]
        total += float(value.item())
        gradients = {name: gradients[name] + np.array(found[name], np.float64) for name in found}
    assert abs(total - loss(adapter)) < 1e-6
    assert worst(gradients, gradient(loss, adapter)) < 1e-5


def test_a_temperature_is_differentiated_through(toy: Toy) -> None:
    policy, weights, adapter = toy
    (a,) = documents(11)
    batch = packed([[a]], 11)
    _, _, found = policy.value_and_grad(lambda: ((policy.logprobs(batch, temperature=0.6) ** 2).sum(), {}))
    expected = gradient(lambda adapter: (logprobs(weights, adapter, a, 0.6)[3:] ** 2).sum(), adapter)
    assert worst(found, expected) < 1e-5


def test_the_gradient_through_logits(toy: Toy) -> None:
    policy, weights, adapter = toy
    (a,) = documents(9)
    batch = packed([[a]], 9)
    _, _, found = policy.value_and_grad(lambda: ((policy.logits(batch) ** 3).mean(), {}))
    expected = gradient(lambda adapter: (numpy_llama.logits(weights, adapter, a)[2:8] ** 3).mean(), adapter)
    assert worst(found, expected) < 1e-5


def test_only_the_upper_layers_adapted(toy: Toy) -> None:
    policy, weights, adapter = toy
    upper = {name: value for name, value in adapter.items() if ".layers.1." in name}
    policy.close()
    from edger1.train.adapters.wiring import AdapterSpec, attach
    from edger1.train.finetune.policy import LocalPolicy

    second, weights, _ = toy_policy(targets=("q_proj",))
    second.adapted.detach()
    spec = AdapterSpec(rank=2, scale=numpy_llama.LORA_SCALE, targets=("q_proj", "v_proj", "down_proj"), layers=1)
    adapted = attach(second.model, spec)
    adapted.assign({name: mx.array(value.astype(np.float32)) for name, value in upper.items()})
    again = LocalPolicy(second.model, None, second.folder, adapted)
    (a,) = documents(9)
    batch = packed([[a]], 9)
    _, _, found = again.value_and_grad(lambda: Sft.loss(None, again, batch))  # type: ignore[arg-type]
    expected = gradient(lambda adapter: -logprobs(weights, adapter, a)[3:].sum(), upper)
    assert worst(found, expected) < 1e-5
    again.close()
    second.close()
