"""Measuring a model against its source: the figures, the rule of windows, and that memory stays bounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layered import Layered

from edger1.errors import EdgeR1Error, FormatError, UsageError
from edger1.quant import measure as module
from edger1.quant.divergence import Divergence, compare
from edger1.quant.layers import Watch
from edger1.quant.measure import Measurement, measure, shared_tokens, windows

TEXT = "Of shoes and ships and sealing-wax, of cabbages and kings, and why the sea is boiling hot. " * 3


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))


def random_pair(rows: int = 9, vocabulary: int = 1000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    source = (5 * random.normal(size=(rows, vocabulary))).astype(np.float32)
    model = (source + 0.3 * random.normal(size=source.shape) + 7).astype(np.float32)
    return source, model, random.integers(0, vocabulary, rows)


def test_divergence_is_that_of_the_definition() -> None:
    source, model, targets = random_pair()
    found = compare(source, model, targets)
    p, q = log_softmax(source), log_softmax(model)
    rows = np.arange(len(targets))
    np.testing.assert_allclose(found.divergence, (np.exp(p) * (p - q)).sum(axis=-1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.source_loss, -p[rows, targets], rtol=1e-6)
    np.testing.assert_allclose(found.model_loss, -q[rows, targets], rtol=1e-6)
    np.testing.assert_array_equal(found.agrees, source.argmax(-1) == model.argmax(-1))


@pytest.mark.parametrize("slice_", [1, 7, 999, 1000])
def test_divergence_does_not_depend_on_slices(slice_: int) -> None:
    source, model, targets = random_pair()
    # Rising logits: every slice has a new maximum.
    source, model = np.sort(source), np.sort(model)
    found = Divergence(targets)
    for first in range(0, source.shape[1], slice_):
        found.add(source[:, first : first + slice_], model[:, first : first + slice_])
    whole = compare(source, model, targets)
    for name in ("divergence", "source_loss", "model_loss"):
        np.testing.assert_allclose(getattr(found.result(), name), getattr(whole, name), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(found.result().agrees, whole.agrees)


def test_what_both_forbid_does_not_count() -> None:
    source, model, targets = random_pair()
    before = compare(source, model, targets).divergence
    forbidden = np.full((len(targets), 5), -np.inf, np.float32)
    after = compare(np.hstack([source, forbidden]), np.hstack([model, forbidden]), targets).divergence
    np.testing.assert_allclose(after, before, rtol=1e-6)


def test_what_only_the_model_forbids_is_infinitely_far() -> None:
    source, model, targets = random_pair()
    model[0, 5] = -np.inf
    found = compare(source, model, targets).divergence
    assert np.isposinf(found[0])
    assert np.isfinite(found[1:]).all()


def test_a_model_is_no_way_from_itself() -> None:
    source, _, targets = random_pair()
    found = compare(source, source.copy(), targets)
    assert (found.divergence == 0).all()
    assert found.agrees.all()


@given(st.integers(2, 400), st.integers(2, 60), st.booleans())
def test_each_token_is_predicted_once_from_enough(tokens: int, length: int, led: bool) -> None:
    cut = windows(tokens, length, led=led)
    predicted = []
    for window in cut:
        stop = min(window.start + length, tokens)
        assert cut[0].start == 0
        # All windows have the same length.
        assert len(cut) == 1 or stop - window.start == length
        for token in range(window.first, stop):
            predicted.append(token)
            assert token - window.start >= min(token, (length + 1) // 2)
    assert predicted == list(range(0 if led else 1, tokens))


@pytest.mark.parametrize(("tokens", "length", "led"), [(1, 8, False), (0, 8, True), (0, 8, False), (9, 1, False)])
def test_nothing_to_predict_is_refused(tokens: int, length: int, led: bool) -> None:
    with pytest.raises(UsageError, match="predict"):
        windows(tokens, length, led=led)


def expected(model: Layered, source: Layered, tokens: list[int], length: int, leading: list[int]) -> dict[str, float]:
    """The same figures from whole windows, by the definition."""
    kl, ours, theirs, same = [], [], [], []
    for window in windows(len(tokens), length, led=bool(leading)):
        row = [*leading, *tokens[window.start : window.start + length]]
        p, q = log_softmax(source.whole(row)), log_softmax(model.whole(row))
        for at in range(len(leading) + window.first - window.start, len(row)):
            kl.append((np.exp(p[at - 1]) * (p[at - 1] - q[at - 1])).sum())
            theirs.append(-p[at - 1, row[at]])
            ours.append(-q[at - 1, row[at]])
            same.append(p[at - 1].argmax() == q[at - 1].argmax())
    return {
        "tokens": len(kl),
        "mean": float(np.mean(kl)),
        "99": float(np.percentile(kl, 99)),
        "model": float(np.exp(np.mean(ours))),
        "source": float(np.exp(np.mean(theirs))),
        "agreement": float(np.mean(same)),
    }


def figures(found: Measurement) -> dict[str, float]:
    return {
        "tokens": found.tokens,
        "mean": found.mean_divergence,
        "99": found.divergence_99,
        "model": found.model.perplexity,
        "source": found.source.perplexity,
        "agreement": found.top1_agreement,
    }


@pytest.mark.parametrize("length", [16, 50, 1000])
@pytest.mark.parametrize("leading", [[], [3]])
def test_figures_are_those_of_whole_windows(length: int, leading: list[int]) -> None:
    source, model = Layered(), Layered("model", noise=0.05)
    tokens = source.encode(TEXT)
    found = measure(model, source, tokens, window=length, leading=leading)
    assert 0 < found.top1_agreement < 1
    assert figures(found) == pytest.approx(expected(model, source, tokens, length, leading), rel=1e-4)


def test_a_layer_is_charged_with_its_own_error() -> None:
    source, model = Layered(), Layered("model")
    model.matrices[1] = model.matrices[1] + np.float32(0.1)
    tokens = source.encode(TEXT)[:40]
    found = measure(model, source, tokens)
    first, second, third = found.layers
    assert found.embedding_error == first.own == first.accumulated == 0
    assert second.own == second.accumulated > 0
    assert third.own == 0
    assert third.accumulated > 0
    # By hand: what the second layer gives for what the source's first one gave.
    before = source.layer(0, source.embedding[tokens][None])
    right, wrong = source.layer(1, before), model.layer(1, before)
    error = np.linalg.norm(wrong - right, axis=-1) / np.linalg.norm(right, axis=-1)
    assert second.own == pytest.approx(float(error.mean()), rel=1e-5)


def test_a_model_measured_against_itself_has_lost_nothing() -> None:
    found = measure(Layered("a"), Layered("b"), Layered().encode(TEXT), window=32)
    assert found.mean_divergence == found.divergence_99 == 0
    assert found.top1_agreement == 1
    assert found.model.perplexity == found.source.perplexity


def test_nothing_depends_on_how_much_goes_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, model = Layered(), Layered("model", noise=0.05)
    tokens = source.encode(TEXT)
    whole = measure(model, source, tokens, window=32)
    assert max(source.heads_rows) > 100

    monkeypatch.setattr(module, "PASS_TOKENS", 64)
    monkeypatch.setattr(module, "LOGITS_BYTES", 4 * 40 * 5)
    monkeypatch.setattr(module, "HIDDEN_BYTES", 0)
    monkeypatch.setattr(module, "CALL_BYTES", 4 * 16 * 64 * 2)
    source, model = Layered(), Layered("model", noise=0.05)
    pieces = measure(model, source, tokens, window=32, scratch=tmp_path)
    assert source.longest == model.longest == 128
    assert max(source.heads_rows) == max(model.heads_rows) == 5
    assert figures(pieces) == pytest.approx(figures(whole), rel=1e-5)
    for one, other in zip(pieces.layers, whole.layers, strict=True):
        assert (one.own, one.accumulated) == pytest.approx((other.own, other.accumulated), rel=1e-5)
    assert list(tmp_path.iterdir()) == []


def test_hidden_states_that_find_no_room_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HIDDEN_BYTES", 0)
    with pytest.raises(EdgeR1Error, match="measure on fewer tokens"):
        measure(Layered(), Layered(), Layered().encode(TEXT), scratch=tmp_path / "nowhere")


def test_progress_is_told() -> None:
    heard: list[tuple[str, int, int]] = []
    found = measure(Layered(), Layered(), Layered().encode(TEXT), window=32, on_step=lambda *step: heard.append(step))
    assert [step for step in heard if step[0] == "layer"] == [("layer", i, 3) for i in (1, 2, 3)]
    assert heard[-1] == ("tokens", found.tokens, found.tokens)


def test_what_is_infinite_is_null_in_json() -> None:
    found = measure(Forbidding("model"), Layered(), Layered().encode(TEXT))
    assert found.mean_divergence == np.inf
    values = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert values["mean_divergence"] is values["divergence_percentiles"]["99"] is None
    assert values["layers"] == [{"layer": i, "own": 0.0, "accumulated": 0.0} for i in range(3)]


class Forbidding(Layered):
    """Gives one token no chance."""

    def logits(self, passing: Any, watch: Watch | None = None) -> Any:
        found = super().logits(passing, watch)
        found[..., 5] = -np.inf
        return found


def test_the_tokenizer_must_be_shared() -> None:
    assert shared_tokens(Layered("a"), Layered("b"), TEXT) == Layered().encode(TEXT)
    with pytest.raises(UsageError, match="a and b cut the text into different tokens .from token 0"):
        shared_tokens(Layered("a"), Layered("b", shift=1), TEXT)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"layers": 4}, "4 decoder layers and source has 3"),
        ({"hidden": 8}, "hidden state"),
        ({"vocabulary": 50}, "40 logits a token and the model 50"),
    ],
)
def test_models_that_do_not_belong_together_are_refused(other: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        measure(Layered("model", **other), Layered(), [1, 2, 3])


def test_numbers_that_are_none_are_named() -> None:
    broken = Layered("broken")
    broken.matrices[1][0, 0] = np.nan
    with pytest.raises(FormatError, match="Layer 1 of broken"):
        measure(broken, Layered(), [1, 2, 3])
    with pytest.raises(FormatError, match="Layer 1 of broken"):
        measure(Layered(), broken, [1, 2, 3])
    headless = Layered("headless")
    headless.head[3] = np.nan
    with pytest.raises(FormatError, match="headless gives logits"):
        measure(headless, Layered(), [1, 2, 3])
