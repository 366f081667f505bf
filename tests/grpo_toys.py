"""What the tests of GRPO share: a tokenizer of digits, a policy that learns in seconds, and rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import llama

from edger1.train.finetune.grpo import Shares, make_batches
from edger1.train.finetune.grpo_settings import GrpoSettings
from edger1.train.finetune.method import Batch
from edger1.train.finetune.rollouts import Prompt
from edger1.train.rewards.completion import Completion

END = 10
CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 12,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


class Digits:
    """A tokenizer whose tokens are the ten digits, and one that ends."""

    eos_token_ids = frozenset({END})
    has_thinking = False

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [int(c) for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(str(i) for i in ids if i < END)


class ToyPolicy:
    """A model of 2 layers, all of whose weights are learned; the reference is a copy of what it began as."""

    def __init__(self, seed: int = 0) -> None:
        mx.random.seed(seed)
        self.tokenizer = Digits()
        self.model: Any = llama.Model(llama.ModelArgs.from_dict(CONFIG))
        mx.eval(self.model.parameters())
        self.first = self.parameters()
        self.reference_passes = 0

    def parameters(self) -> dict[str, mx.array]:
        from mlx.utils import tree_flatten

        return dict(tree_flatten(self.model.trainable_parameters()))

    def assign(self, weights: dict[str, mx.array]) -> None:
        self.model.load_weights(list(weights.items()))
        mx.eval(self.model.parameters())

    def logprobs(self, batch: Batch, *, temperature: float = 1.0) -> mx.array:
        assert batch.documents.max() == 0, "one document a row is all it knows"
        ids = mx.array(batch.ids)
        logits = self.model(ids)[:, :-1].astype(mx.float32) / temperature
        found = mx.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0] - mx.logsumexp(logits, axis=-1)
        counted = mx.array(batch.weights[:, 1:] != 0)
        return mx.concatenate([mx.zeros((ids.shape[0], 1)), mx.where(counted, found, 0)], axis=1)

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.reference_passes += 1
        trained = self.parameters()
        self.assign(self.first)
        try:
            yield
        finally:
            self.assign(trained)

    @contextmanager
    def generation(self) -> Iterator[Any]:
        yield self.model

    def value_and_grad(self, loss: Callable[[], Any]) -> tuple[float, dict[str, float], dict[str, mx.array]]:
        names, kept = list(self.parameters()), list(self.parameters().values())

        def of(weights: list[mx.array]) -> Any:
            self.model.load_weights(list(zip(names, weights, strict=True)))
            return loss()

        (value, figures), gradients = mx.value_and_grad(of)(kept)
        self.model.load_weights(list(zip(names, kept, strict=True)))
        mx.eval(value, figures, gradients)
        return (
            float(value.item()),
            {n: float(f.item()) for n, f in figures.items()},
            dict(zip(names, gradients, strict=True)),
        )


class FunctionReward:
    """One reward: a function of the completion's text."""

    names = ("toy",)

    def __init__(self, function: Callable[[str], float]) -> None:
        self.function = function
        self.asked = 0

    def score(self, completions: Sequence[Completion]) -> list[dict[str, float]]:
        self.asked += len(completions)
        return [{"toy": self.function(each.text)} for each in completions]

    def total(self, scores: dict[str, float]) -> float:
        return scores["toy"]


def prompts(count: int) -> list[Prompt]:
    return [
        Prompt(f"row {i}", text, tuple(int(c) for c in text), text)
        for i, text in ((i, f"{i % 10}{(7 * i + 3) % 10}{i // 10}") for i in range(count))
    ]


def train(policy: ToyPolicy, method: Any, steps: range, rate: float = 0.02) -> list[dict[str, float]]:
    """Do steps by plain gradient descent, as the training loop does them; returns each one's figures."""
    logged = []
    for number in steps:
        step = method.step(policy, number)
        figures = dict(step.figures)
        total: dict[str, mx.array] = {}
        for batch in step.batches:
            value, sums, gradients = policy.value_and_grad(lambda batch=batch: method.loss(policy, batch))
            figures["loss"] = figures.get("loss", 0.0) + value
            for name, figure in sums.items():
                figures[name] = figures.get(name, 0.0) + figure
            total = {n: total[n] + g if total else g for n, g in gradients.items()}
        if total:
            policy.assign({n: w - rate * total[n] for n, w in policy.parameters().items()})
        logged.append(figures)
    return logged


def fixed_batch(settings: GrpoSettings, *, seed: int = 0) -> tuple[Batch, np.ndarray]:
    """A batch of six completions of unequal lengths with made-up log-probabilities, and those of the policy now."""
    from edger1.train.finetune.grpo import Judged
    from edger1.train.finetune.rollouts import Rollout

    random = np.random.default_rng(seed)
    judged = []
    for i in range(6):
        size = int(random.integers(3, 9))
        ids = tuple(int(t) for t in random.integers(0, 10, size))
        rollout = Rollout((1, 2, 3), ids, -random.random(size).astype(np.float32) * 3, "", True)
        judged.append(Judged(prompts(1)[0], 0, i, rollout, {"toy": 0.0}, 0.0, float(random.normal())))
    tokens = sum(len(each.rollout.ids) for each in judged)
    (batch,) = make_batches(judged, Shares(6, tokens), settings)
    batch.extra["reference"] = np.where(
        batch.weights != 0, batch.extra["old"] + random.normal(0, 0.5, batch.ids.shape), 0
    )
    batch.extra["reference"] = batch.extra["reference"].astype(np.float32)
    spread = 0.3 if settings.loss != "gspo" else 3e-3
    now = np.where(batch.weights != 0, batch.extra["old"] + random.normal(0, spread, batch.ids.shape), 0)
    return batch, now.astype(np.float32)
