"""Logit distillation: loss and gradient against NumPy in f64, the teacher asked once, tokenizers compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from toy_policy import ToyPolicy, numeric_gradient

from edger1.errors import FormatError, UsageError
from edger1.train.finetune.distill_settings import DistillSettings
from edger1.train.finetune.logit_distill import LogitDistill, check_tokenizers, documents_of, likeliest
from edger1.train.finetune.method import Batch, Evaluation, Step

VOCABULARY = 7


def batches() -> list[Batch]:
    """Two batches of packed rows; weights sum to 1 over both."""
    drawn = np.random.default_rng(5)
    found = []
    for rows in (2, 1):
        ids = drawn.integers(0, VOCABULARY, (rows, 12)).astype(np.int32)
        documents = np.repeat([[0, 0, 0, 0, 0, 1, 1, 1, 1, 2, -1, -1]], rows, axis=0).astype(np.int32)
        counted = np.zeros((rows, 12))
        counted[:, [2, 3, 4, 7, 8]] = 1
        found.append(Batch(ids, documents, (counted / 15).astype(np.float32)))
    return found


class Data:
    """SFT's part, with one step."""

    name = "sft"

    def describe(self) -> list[str]:
        return ["data"]

    def step(self, policy: Any, step: int) -> Step:
        return Step(batches(), 15)

    def evaluate(self, policy: Any, step: int) -> Evaluation | None:
        return Evaluation({"loss": 1.0}, -1.0)


class Teacher(ToyPolicy):
    """Has two logits more than the student, which pad its table."""

    closed = 0

    def logits(self, batch: Batch) -> mx.array:
        padding = mx.full((int((batch.weights != 0).sum()), 2), 50.0)
        return mx.concatenate([super().logits(batch), padding], axis=-1)

    def close(self) -> None:
        self.closed += 1


def method(of: Teacher, folder: Path | None = None, held_out: bool = False, **options: Any) -> LogitDistill:
    settings = DistillSettings(**{"teacher": "toy", "top": 3, **options})
    data: Any = Data()
    made = LogitDistill(data, batches()[:1] if held_out else [], settings, lambda: of, "toy", VOCABULARY)
    if folder is not None:
        made.log_to(folder)
    return made


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def numpy_loss(adapter: np.ndarray, base: np.ndarray, teacher: np.ndarray, s: DistillSettings) -> float:
    """The formula, for all tokens that count."""
    places = [(batch, r, t) for batch in batches() for r, t in zip(*np.nonzero(batch.weights), strict=True)]
    before = np.array([batch.ids[r, t - 1] for batch, r, t in places])
    targets = np.array([batch.ids[r, t] for batch, r, t in places])
    z, every = (base + adapter)[before], np.arange(len(places))
    p, q = softmax(teacher[before] / s.temperature), softmax(z / s.temperature)
    best = np.argsort(-p, axis=-1)[:, : s.top]
    p_best, q_best = (np.take_along_axis(x, best, axis=-1) for x in (p, q))
    kl = (p_best * np.log(p_best / q_best)).sum(axis=-1)
    if s.top < VOCABULARY:
        p_rest, q_rest = 1 - p_best.sum(axis=-1), 1 - q_best.sum(axis=-1)
        kl = kl + p_rest * np.log(p_rest / q_rest)
    cross = -np.log(softmax(z)[every, targets])
    return float((s.share * s.temperature**2 * kl + (1 - s.share) * cross).mean())


@pytest.mark.parametrize("top", [1, 3, VOCABULARY, 50])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("share", "chunk"), [(1.0, 100), (0.6, 2)])
def test_loss_and_gradient_are_those_of_numpy(
    monkeypatch: pytest.MonkeyPatch, top: int, temperature: float, share: float, chunk: int
) -> None:
    monkeypatch.setattr("edger1.train.finetune.logit_distill.CHUNK_BYTES", chunk * 4 * VOCABULARY)
    student, teacher = ToyPolicy(VOCABULARY), Teacher(VOCABULARY, seed=8)
    distill = method(teacher, top=top, temperature=temperature, share=share)
    found = [
        student.gradient(lambda batch=batch: distill.loss(student, batch)) for batch in distill.step(student, 0).batches
    ]
    base = student.base.astype(np.float64)
    theirs = (teacher.base + np.array(teacher.adapter)).astype(np.float64)
    settings = DistillSettings("toy", top, temperature, share)

    def expected(adapter: np.ndarray) -> float:
        return numpy_loss(adapter, base, theirs, settings)

    adapter = np.array(student.adapter).astype(np.float64)
    assert sum(value for value, _ in found) == pytest.approx(expected(adapter), abs=1e-5)
    difference = sum(slope for _, slope in found) - numeric_gradient(expected, adapter)
    assert np.abs(difference).max() <= 1e-5


def test_a_student_that_is_its_teacher_has_no_divergence() -> None:
    teacher = Teacher(VOCABULARY, seed=8)
    student = ToyPolicy(VOCABULARY, seed=8)
    distill = method(teacher, share=1.0)
    for batch in distill.step(student, 0).batches:
        loss, figures = distill.loss(student, batch)
        assert float(loss.item()) == pytest.approx(0, abs=1e-6)
        assert float(figures["kl"].item()) == pytest.approx(0, abs=1e-6)
        assert float(figures["cross_entropy"].item()) > 0


def test_a_sure_student_and_a_sure_teacher_give_finite_numbers() -> None:
    teacher, student = Teacher(VOCABULARY, seed=8), ToyPolicy(VOCABULARY)
    teacher.adapter, student.adapter = teacher.adapter * 1e3, student.adapter * 1e3
    distill = method(teacher)
    for batch in distill.step(student, 0).batches:
        value, slope = student.gradient(lambda batch=batch: distill.loss(student, batch))
        assert np.isfinite(value)
        assert np.isfinite(slope).all()


def test_the_teacher_is_asked_once_a_document_also_over_runs_and_then_let_go(tmp_path: Path) -> None:
    student, teacher = ToyPolicy(VOCABULARY), Teacher(VOCABULARY, seed=8)
    distill = method(teacher, tmp_path)
    first = distill.step(student, 0)
    assert teacher.passes == 6
    assert teacher.closed == 0
    distill.step(student, 1)
    assert (teacher.passes, teacher.closed) == (6, 1)
    again = method(teacher, tmp_path).step(student, 0)
    assert teacher.passes == 6
    for one, two in zip(first.batches, again.batches, strict=True):
        assert np.array_equal(one.extra["top"], two.extra["top"])
        assert np.array_equal(one.extra["logprobs"], two.extra["logprobs"])
    method(teacher, tmp_path, temperature=2.0).step(student, 0)
    assert teacher.passes == 12


def test_a_named_file_is_shared_by_runs(tmp_path: Path) -> None:
    student, teacher = ToyPolicy(VOCABULARY), Teacher(VOCABULARY, seed=8)
    for run in ("one", "two"):
        method(teacher, tmp_path / run, cache=str(tmp_path / "said.sqlite")).step(student, 0)
    assert teacher.passes == 6


def test_damaged_entries_are_refused(tmp_path: Path) -> None:
    import sqlite3

    student, teacher = ToyPolicy(VOCABULARY), Teacher(VOCABULARY, seed=8)
    method(teacher, tmp_path).step(student, 0)
    database = sqlite3.connect(tmp_path / "cache" / "teacher.sqlite")
    database.execute("UPDATE entries SET value = x'00'")
    database.commit()
    database.close()
    with pytest.raises(FormatError, match="move it away"):
        method(teacher, tmp_path).step(student, 0)


def test_held_out_data_is_measured_by_the_divergence(tmp_path: Path) -> None:
    student, teacher = ToyPolicy(VOCABULARY), Teacher(VOCABULARY, seed=8)
    found = method(teacher, tmp_path, held_out=True).evaluate(student, 0)
    assert found is not None
    assert found.figures["loss"] == 1.0
    assert found.better == -found.figures["kl"] < 0


def test_the_likeliest_tokens_are_those_of_a_sort_and_padding_is_none_of_them() -> None:
    logits = np.random.default_rng(1).normal(size=(40, 30)).astype(np.float32)
    logits[:, 28:] = 99
    found = likeliest(mx.array(logits), 5, 0.7, 28)
    p = softmax(logits[:, :28].astype(np.float64) / 0.7)
    order = np.argsort(-p, axis=-1)[:, :5]
    assert np.array_equal(found.indices, order)
    assert np.allclose(found.logprobs, np.log(np.take_along_axis(p, order, axis=-1)), atol=1e-5)


def test_documents_of_a_batch_come_in_the_order_of_their_tokens() -> None:
    batch = batches()[0]
    found = list(documents_of(batch))
    assert [one.ids.shape[1] for one in found] == [5, 4, 5, 4]
    assert (
        np.concatenate([one.ids[one.weights != 0] for one in found]).tolist() == batch.ids[batch.weights != 0].tolist()
    )


class Words:
    def __init__(self, **vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def get_vocab(self) -> dict[str, int]:
        return self._vocabulary


def test_tokenizers_must_be_the_same() -> None:
    check_tokenizers(Words(a=0, b=1), Words(b=1, a=0), "teacher")
    with pytest.raises(UsageError, match="teacher has 1 tokens, and the student 2"):
        check_tokenizers(Words(a=0), Words(a=0, b=1), "teacher")
    with pytest.raises(UsageError, match="'a' is token 1, not 0"):
        check_tokenizers(Words(a=1, b=0), Words(a=0, b=1), "teacher")


@pytest.mark.parametrize("wrong", [{"teacher": ""}, {"top": 0}, {"temperature": 0.0}, {"share": 0.0}, {"share": 1.1}])
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"\[distill\]"):
        method(Teacher(VOCABULARY), **wrong)
