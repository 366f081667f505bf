"""DPO's loss, gradient and rewards against TRL's DPOTrainer, on pairs and probabilities that both are given."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_dpo_loss import VOCABULARY, method, some_pairs
from toy_policy import ToyPolicy

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")


class Table(torch.nn.Module):
    """The toy policy in torch, with the outputs that TRL's fused head has."""

    def __init__(self, base: np.ndarray, adapter: np.ndarray) -> None:
        super().__init__()
        self.base = torch.tensor(base)
        self.adapter = torch.nn.Parameter(torch.tensor(adapter))

    def forward(self, input_ids: Any, labels: Any, **_: Any) -> SimpleNamespace:
        logits = (self.base + self.adapter)[input_ids[:, :-1]]
        picked = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]
        nothing = torch.zeros_like(picked)
        return SimpleNamespace(
            log_probs=torch.where(labels[:, 1:] != -100, picked, nothing),
            entropy=nothing,
            mean_logits=nothing,
            is_top1=nothing.bool(),
        )


def trainer(loss: str, beta: float, smoothing: float) -> Any:
    """TRL's trainer with what its loss looks at."""
    made = object.__new__(trl.DPOTrainer)
    same = SimpleNamespace(gather_for_metrics=lambda x: x, gather=lambda x: x, device=torch.device("cpu"))
    attributes = {
        "model": torch.nn.Module(),
        "accelerator": same,
        "aux_loss_enabled": False,
        "ld_alpha": None,
        "precompute_ref_logps": True,
        "f_divergence_type": "reverse_kl",
        "loss_types": [loss],
        "loss_weights": [1.0],
        "beta": beta,
        "label_smoothing": smoothing,
        "use_weighting": False,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)},
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    for name, value in attributes.items():
        object.__setattr__(made, name, value)
    return made


def inputs(base: np.ndarray) -> dict[str, Any]:
    """All chosen answers, then all rejected ones, padded, and the reference's log-probability of each."""
    pairs = some_pairs().pairs
    halves = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    shape = (len(halves), max(len(half.ids) for half in halves))
    found = {name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "attention_mask", "completion_mask")}
    for row, half in enumerate(halves):
        size = len(half.ids)
        found["input_ids"][row, :size] = torch.tensor(half.ids.astype(np.int64))
        found["attention_mask"][row, :size] = 1
        found["completion_mask"][row, :size] = torch.tensor(half.counted.astype(np.int64))
    labels = found["input_ids"].masked_fill(found["completion_mask"] == 0, -100)
    with torch.no_grad():
        reference = Table(base, np.zeros_like(base))(found["input_ids"], labels).log_probs.sum(-1)
    chosen, rejected = reference.chunk(2)
    return {**found, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}


@pytest.mark.parametrize(
    ("loss", "smoothing"), [("sigmoid", 0.0), ("sigmoid_norm", 0.0), ("ipo", 0.0), ("robust", 0.2)]
)
@pytest.mark.parametrize("packs", [True, False])
def test_loss_gradient_and_rewards_are_trl_s(tmp_path: Path, loss: str, smoothing: float, packs: bool) -> None:
    beta = 0.3
    policy = ToyPolicy(VOCABULARY, packs=packs)
    dpo = method(tmp_path, beta=beta, loss=loss, label_smoothing=smoothing)
    value, slope, figures = 0.0, np.zeros((VOCABULARY, VOCABULARY)), defaultdict(float)
    for batch in dpo.step(policy, 0).batches:
        found, gradient = policy.gradient(lambda batch=batch: dpo.loss(policy, batch))
        value, slope = value + found, slope + gradient
        for name, figure in dpo.loss(policy, batch)[1].items():
            figures[name] += float(figure.item())

    table = Table(policy.base, np.array(policy.adapter))
    reference = trainer(loss, beta, smoothing)
    expected = reference._compute_loss(table, inputs(policy.base), False)
    expected.backward()
    assert value == pytest.approx(expected.item(), abs=1e-5)
    assert np.abs(slope - table.adapter.grad.numpy()).max() <= 1e-5
    metrics = reference._metrics["train"]
    for ours, name in (("rewards_chosen", "chosen"), ("rewards_rejected", "rejected"), ("margin", "margins")):
        assert figures[ours] == pytest.approx(metrics[f"rewards/{name}"][0], abs=1e-5)
    assert figures["accuracy"] == pytest.approx(metrics["rewards/accuracies"][0], abs=1e-6)


def test_smoothed_labels_are_those_of_trl_s_aot_on_one_pair(tmp_path: Path) -> None:
    # TRL's sigmoid loss has no smoothing; aot's is conservative DPO, where there is nothing to sort.
    from edger1.train.finetune.pairs import Pairs

    pairs = Pairs(some_pairs().pairs[:1])
    policy = ToyPolicy(VOCABULARY)
    dpo = method(tmp_path, pairs, each=1, beta=0.3, label_smoothing=0.2)
    (batch,) = dpo.step(policy, 0).batches
    value, slope = policy.gradient(lambda: dpo.loss(policy, batch))
    given = {name: torch.stack([x[0], x[5]]) if x.ndim == 2 else x[:1] for name, x in inputs(policy.base).items()}
    table = Table(policy.base, np.array(policy.adapter))
    expected = trainer("aot", 0.3, 0.2)._compute_loss(table, given, False)
    expected.backward()
    assert value == pytest.approx(expected.item(), abs=1e-5)
    assert np.abs(slope - table.adapter.grad.numpy()).max() <= 1e-5
