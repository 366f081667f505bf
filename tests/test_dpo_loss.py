"""DPO's loss and gradient against NumPy in f64, its pairs in rows, and the reference kept on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_policy import ToyPolicy, numeric_gradient

from edger1.errors import FormatError, UsageError
from edger1.train.datasets.rows import Row
from edger1.train.datasets.template import Encoded
from edger1.train.finetune.dpo import Arrangement, Dpo
from edger1.train.finetune.dpo_settings import LOSSES, DpoSettings
from edger1.train.finetune.pairs import Pair, Pairs, encode_pairs, last_runs, pack

VOCABULARY = 7


def half(drawn: np.random.Generator, prompt: np.ndarray, answer: int) -> Encoded:
    ids = np.concatenate([prompt, drawn.integers(0, VOCABULARY, answer)]).astype(np.int32)
    counted = np.arange(len(ids)) >= len(prompt)
    return Encoded(ids, counted, 0, "row")


def some_pairs(count: int = 5, seed: int = 3) -> Pairs:
    drawn = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        prompt = drawn.integers(0, VOCABULARY, drawn.integers(1, 5))
        pairs.append(
            Pair(half(drawn, prompt, int(drawn.integers(1, 9))), half(drawn, prompt, int(drawn.integers(1, 9))))
        )
    return Pairs(pairs)


def method(folder: Path, pairs: Pairs | None = None, *, each: int = 5, identity: str = "toy", **options: Any) -> Dpo:
    settings = DpoSettings(pairs=each, **options)
    dpo = Dpo(pairs or some_pairs(), None, settings, Arrangement(24, 2, 7), identity)
    dpo.log_to(folder)
    return dpo


def log_probability(table: np.ndarray, of: Encoded) -> float:
    logits = table[of.ids[:-1]]
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return float((logp[np.arange(len(of.ids) - 1), of.ids[1:]] * of.counted[1:]).sum())


def numpy_loss(adapter: np.ndarray, base: np.ndarray, pairs: Pairs, settings: DpoSettings) -> float:
    """The formulas of the papers, pair by pair."""
    total = 0.0
    for pair in pairs.pairs:
        ratios = [log_probability(base + adapter, h) - log_probability(base, h) for h in (pair.chosen, pair.rejected)]
        if settings.loss in ("ipo", "sigmoid_norm"):
            ratios = [r / h.counted[1:].sum() for r, h in zip(ratios, (pair.chosen, pair.rejected), strict=True)]
        d = ratios[0] - ratios[1]
        right, wrong = (-np.log(1 / (1 + np.exp(-sign * settings.beta * d))) for sign in (1, -1))
        s = settings.label_smoothing
        if settings.loss == "ipo":
            total += (d - 1 / (2 * settings.beta)) ** 2
        elif settings.loss == "robust":
            total += ((1 - s) * right - s * wrong) / (1 - 2 * s)
        else:
            total += (1 - s) * right + s * wrong
    return total / len(pairs.pairs)


@pytest.mark.parametrize(
    ("loss", "smoothing"), [*((loss, 0.0) for loss in LOSSES), *((loss, 0.2) for loss in LOSSES if loss != "ipo")]
)
@pytest.mark.parametrize("packs", [True, False])
def test_loss_and_gradient_are_those_of_numpy(tmp_path: Path, loss: str, smoothing: float, packs: bool) -> None:
    policy = ToyPolicy(VOCABULARY, packs=packs)
    dpo = method(tmp_path, beta=0.3, loss=loss, label_smoothing=smoothing)
    step = dpo.step(policy, 0)
    assert len(step.batches) > 1
    found = [policy.gradient(lambda batch=batch: dpo.loss(policy, batch)) for batch in step.batches]
    base = policy.base.astype(np.float64)

    def expected(adapter: np.ndarray) -> float:
        return numpy_loss(adapter, base, some_pairs(), DpoSettings(beta=0.3, loss=loss, label_smoothing=smoothing))

    adapter = np.array(policy.adapter).astype(np.float64)
    assert sum(value for value, _ in found) == pytest.approx(expected(adapter), abs=1e-5)
    difference = sum(slope for _, slope in found) - numeric_gradient(expected, adapter)
    assert np.abs(difference).max() <= 1e-5


def test_figures_are_rewards_their_margin_and_how_often_the_chosen_one_is_ahead(tmp_path: Path) -> None:
    policy = ToyPolicy(VOCABULARY)
    dpo = method(tmp_path, beta=0.3)
    figures: dict[str, float] = {}
    for batch in dpo.step(policy, 0).batches:
        for name, value in dpo.loss(policy, batch)[1].items():
            figures[name] = figures.get(name, 0.0) + float(value.item())
    table = policy.base + np.array(policy.adapter)
    rewards = np.array(
        [
            [0.3 * (log_probability(table, h) - log_probability(policy.base, h)) for h in (pair.chosen, pair.rejected)]
            for pair in some_pairs().pairs
        ]
    )
    assert figures["rewards_chosen"] == pytest.approx(rewards[:, 0].mean(), abs=1e-5)
    assert figures["rewards_rejected"] == pytest.approx(rewards[:, 1].mean(), abs=1e-5)
    assert figures["margin"] == pytest.approx((rewards[:, 0] - rewards[:, 1]).mean(), abs=1e-5)
    assert figures["accuracy"] == pytest.approx((rewards[:, 0] > rewards[:, 1]).mean(), abs=1e-6)


def test_a_fresh_adapter_has_a_loss_of_log_2_and_no_margin(tmp_path: Path) -> None:
    policy = ToyPolicy(VOCABULARY)
    policy.adapter = policy.adapter * 0
    dpo = method(tmp_path)
    (value, margin) = (0.0, 0.0)
    for batch in dpo.step(policy, 0).batches:
        loss, figures = dpo.loss(policy, batch)
        value, margin = value + float(loss.item()), margin + float(figures["margin"].item())
    assert value == pytest.approx(np.log(2), abs=1e-6)
    assert margin == pytest.approx(0, abs=1e-6)


def test_a_loss_far_from_the_reference_stays_finite(tmp_path: Path) -> None:
    policy = ToyPolicy(VOCABULARY)
    policy.adapter = policy.adapter * 1e4
    dpo = method(tmp_path, beta=1.0, label_smoothing=0.1)
    for batch in dpo.step(policy, 0).batches:
        value, slope = policy.gradient(lambda batch=batch: dpo.loss(policy, batch))
        assert np.isfinite(value)
        assert np.isfinite(slope).all()


def test_the_reference_is_computed_once_a_pair_also_over_runs(tmp_path: Path) -> None:
    policy = ToyPolicy(VOCABULARY)
    dpo = method(tmp_path)
    first = dpo.step(policy, 0)
    assert policy.passes == 5
    dpo.step(policy, 1)
    assert policy.passes == 5
    other = ToyPolicy(VOCABULARY)
    again = method(tmp_path).step(other, 0)
    assert other.passes == 0
    for one, two in zip(first.batches, again.batches, strict=True):
        assert np.array_equal(one.extra["reference"], two.extra["reference"])
    method(tmp_path / "elsewhere").step(other, 0)
    assert other.passes == 5


def test_another_model_has_another_reference(tmp_path: Path) -> None:
    method(tmp_path).step(ToyPolicy(VOCABULARY), 0)
    other = ToyPolicy(VOCABULARY)
    method(tmp_path, identity="another").step(other, 0)
    assert other.passes == 5


def test_every_epoch_has_every_pair_once_in_an_order_of_its_own_that_the_step_decides(tmp_path: Path) -> None:
    policy, pairs = ToyPolicy(VOCABULARY), some_pairs(6)
    dpo = method(tmp_path, pairs, each=2)
    known = {pair.chosen.ids.tobytes(): i for i, pair in enumerate(pairs.pairs)}

    def seen(one: Dpo, step: int) -> list[int]:
        found = []
        for batch in one.step(policy, step).batches:
            for row, of in zip(batch.ids, batch.extra["half"], strict=True):
                found += [known[row[of == h].tobytes()] for h in range(0, of.max() + 1, 2) if (of == h).any()]
        return found

    steps = [seen(dpo, step) for step in range(6)]
    for epoch in (steps[:3], steps[3:]):
        assert sorted(i for step in epoch for i in step) == list(range(6))
    assert steps[:3] != steps[3:]
    assert seen(method(tmp_path, pairs, each=2), 4) == steps[4]


def test_held_out_pairs_are_measured_and_less_loss_is_better(tmp_path: Path) -> None:
    policy = ToyPolicy(VOCABULARY)
    dpo = Dpo(some_pairs(), some_pairs(3, seed=9), DpoSettings(beta=0.3), Arrangement(24, 2, 7), "toy")
    found = dpo.evaluate(policy, 0)
    assert found is not None
    adapter = np.array(policy.adapter)
    expected = numpy_loss(adapter, policy.base, some_pairs(3, seed=9), DpoSettings(beta=0.3))
    assert found.figures["loss"] == pytest.approx(expected, abs=1e-5)
    assert found.better == -found.figures["loss"]
    assert method(tmp_path).evaluate(policy, 0) is None


def test_both_halves_of_a_pair_lie_in_one_row_and_apart() -> None:
    pairs = some_pairs(8).pairs
    batches = pack(pairs, [(-1.0 - i, -2.0 - i) for i in range(8)], 24, 2)
    seen = 0
    for batch in batches:
        half = batch.extra["half"]
        assert batch.ids.shape[0] <= 2
        for h in range(half.max() + 1):
            rows, places = np.nonzero(half == h)
            assert len(set(rows)) == 1
            assert len({(r, d) for r, d in zip(rows, batch.documents[rows, places], strict=True)}) == 1
            assert batch.weights[rows[0], places[0]] == 0
            assert set(np.nonzero(half == h ^ 1)[0]) == set(rows)
            seen += 1
        assert ((half < 0) == (batch.documents < 0)).all()
        assert np.allclose(batch.extra["share"], 1 / 8)
    assert seen == 16
    assert sorted(float(x) for b in batches for x in b.extra["reference"][b.extra["reference"] != 0]) == sorted(
        [-1.0 - i for i in range(8)] + [-2.0 - i for i in range(8)]
    )


class Letters:
    """A template that has a token for each letter, of at most `length` a document; capitals are markers of turns."""

    def __init__(self, length: int = 100) -> None:
        self.length = length

    def encode(self, row: Row) -> Encoded:
        text, counted = "", []
        for turn in row.messages or []:
            text += turn["role"][0].upper() + turn["content"]
            counted += [False] + [turn["role"] == "assistant"] * len(turn["content"])
        ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)[: self.length]
        kept = np.array(counted, np.bool_)[: self.length]
        if not kept.any():
            raise FormatError(f"{row.where}: nothing of the answer is left")
        return Encoded(ids, kept, len(text) - len(ids), row.where)


def preference(where: str, chosen: str, rejected: str, before: str = "") -> Row:
    prompt = [{"role": "user", "content": "hi"}]
    if before:
        prompt += [{"role": "assistant", "content": before}, {"role": "user", "content": "so"}]
    answers = {
        name: [{"role": "assistant", "content": text}] for name, text in (("chosen", chosen), ("rejected", rejected))
    }
    return Row(where, prompt, None, answers)


def test_only_the_answers_count_and_not_what_the_assistant_said_before() -> None:
    (pair,) = encode_pairs([preference("1", "good", "bad", before="hello")], Letters()).pairs  # type: ignore[arg-type]
    assert bytes(pair.chosen.ids[pair.chosen.counted].astype(np.uint8)) == b"good"
    assert bytes(pair.rejected.ids[pair.rejected.counted].astype(np.uint8)) == b"bad"


def test_pairs_that_teach_nothing_are_refused_and_counted() -> None:
    rows = [
        preference("line 1", "good", "bad"),
        preference("line 2", "same", "same"),
        preference("line 3", "the same for long enough", "the same for long enough and then not"),
        Row("line 4", [{"role": "user", "content": "a very long question"}], None, preference("", "a", "b").columns),
        preference("line 5", "good", ""),
        Row("line 6", [{"role": "user", "content": "hi"}], None, {"chosen": "good"}),
    ]
    found = encode_pairs(rows, Letters(16))  # type: ignore[arg-type]
    assert len(found.pairs) == 1
    assert [bad.where for bad in found.equal] == ["line 2", "line 3"]
    assert [bad.where for bad in found.empty] == ["line 4", "line 5", "line 6"]
    said = " ".join(found.lines())
    assert "2 pairs refused, the same in both halves" in said
    assert "3 pairs refused, nothing to learn from" in said


def test_a_half_that_was_cut_is_counted() -> None:
    found = encode_pairs([preference("1", "good and long enough", "bad")], Letters(12))  # type: ignore[arg-type]
    assert (len(found.pairs), found.cut) == (1, 1)
    assert "1 with a half that was cut" in found.lines()[0]


def test_no_pair_left_is_an_error_that_says_why() -> None:
    with pytest.raises(FormatError, match=r"no pair to learn from.*line 2.*the same"):
        encode_pairs([preference("line 2", "same", "same")], Letters())  # type: ignore[arg-type]


def test_the_last_runs_of_counted_tokens() -> None:
    counted = np.array([1, 1, 0, 1, 0, 0, 1, 1], np.bool_)
    assert last_runs(counted, 1).tolist() == [False] * 6 + [True] * 2
    assert last_runs(counted, 2).tolist() == [False] * 3 + [True, False, False, True, True]


@pytest.mark.parametrize(
    "wrong",
    [{"beta": 0.0}, {"each": 0}, {"loss": "hinge"}, {"label_smoothing": 0.5}, {"loss": "ipo", "label_smoothing": 0.1}],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"\[dpo\]"):
        method(tmp_path, **wrong)
