"""Documents in batches, splits by content, duplicates, contamination and figures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edger1.errors import UsageError
from edger1.train.datasets.packing import Batches, pack
from edger1.train.datasets.rows import Row
from edger1.train.datasets.splitting import decontaminate, deduplicate, split
from edger1.train.datasets.statistics import describe, language_of
from edger1.train.datasets.template import Encoded, Encoding
from edger1.train.finetune.method import Batch


def documents(sizes: list[int]) -> list[Encoded]:
    """Documents whose tokens tell them apart: document d has d * 1000, d * 1000 + 1, ..."""
    return [
        Encoded(np.arange(n, dtype=np.int32) + 1000 * d, np.arange(n) >= n // 2, 0, f"line {d}")
        for d, n in enumerate(sizes)
    ]


def found(batches: list[Batch]) -> dict[int, tuple[list[int], list[float]]]:
    """The documents that batches hold, by their number: tokens and weights; each must stand once, in one stretch."""
    seen: dict[int, tuple[list[int], list[float]]] = {}
    for batch in batches:
        for ids, own, weights in zip(batch.ids, batch.documents, batch.weights, strict=True):
            assert not weights[own < 0].any()
            for number in range(own.max() + 1):
                places = np.flatnonzero(own == number)
                assert (np.diff(places) == 1).all()
                document = int(ids[places[0]]) // 1000
                assert document not in seen
                seen[document] = (ids[places].tolist(), weights[places].tolist())
    return seen


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    rows=st.integers(1, 5),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 3),
    packed=st.booleans(),
    shuffle=st.booleans(),
)
def test_every_document_stands_whole_in_one_row_of_an_epoch(
    sizes: list[int], rows: int, seed: int, epoch: int, packed: bool, shuffle: bool
) -> None:
    given_documents = documents(sizes)
    batches = Batches(given_documents, 50, rows, seed, packed=packed, shuffle=shuffle, pad=7).epoch(epoch)
    seen = found(batches)
    assert sorted(seen) == list(range(len(sizes)))
    for number, (ids, weights) in seen.items():
        document = given_documents[number]
        assert ids == document.ids.tolist()
        assert weights[0] == 0
        assert weights[1:] == document.counted[1:].astype(float).tolist()
    for batch in batches:
        assert batch.ids.shape == batch.documents.shape == batch.weights.shape
        assert batch.ids.shape[0] <= rows
        assert batch.ids.shape[1] <= 50
        assert (batch.ids[batch.documents < 0] == 7).all()
        assert (batch.ids.dtype, batch.documents.dtype, batch.weights.dtype) == (np.int32, np.int32, np.float32)


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_depends_on_its_number_and_the_seed_alone(packed: bool) -> None:
    docs = documents([5 + i * 7 % 40 for i in range(50)])
    going = Batches(docs, 64, 3, 1, packed=packed)
    many = [going.at(i) for i in range(40)]
    for i in (39, 0, 17):
        fresh = Batches(docs, 64, 3, 1, packed=packed).at(i)
        assert np.array_equal(fresh.ids, many[i].ids)
    assert going.place(0) == (0, 0)
    assert going.place(going.epoch_batches(0)) == (1, 0)
    other = Batches(docs, 64, 3, 2, packed=packed)
    assert any(not np.array_equal(other.at(i).ids, many[i].ids) for i in range(5))
    second = going.epoch(1)
    assert any(not np.array_equal(a.ids, b.ids) for a, b in zip(going.epoch(0), second, strict=False))


def test_packing_fills_rows() -> None:
    batches = pack(documents([10] * 64), 40, 4, 0, 0)
    assert len(batches) == 4
    assert all((batch.documents >= 0).all() for batch in batches)


def test_without_packing_a_batchs_rows_are_of_like_length() -> None:
    batches = Batches(documents([i % 40 + 1 for i in range(400)]), 40, 4, 0, packed=False).epoch(0)
    spread = [np.ptp((batch.documents >= 0).sum(1)) for batch in batches]
    assert np.mean(spread) < 3


def test_what_cannot_be_batched_is_refused() -> None:
    with pytest.raises(UsageError, match=r"line 0 has 9 tokens; a row has 8"):
        Batches(documents([9]), 8, 1, 0)
    with pytest.raises(UsageError, match="no documents"):
        Batches([], 8, 1, 0)
    with pytest.raises(UsageError, match="0 rows"):
        Batches(documents([3]), 8, 0, 0)


def asked(question: str, answer: str = "yes", where: str = "line 1") -> Row:
    return Row(where, [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], None)


@settings(max_examples=30, deadline=None)
@given(
    questions=st.lists(st.text(min_size=1), min_size=1, max_size=40),
    more=st.lists(st.text(min_size=1)),
    seed=st.integers(0, 3),
)
def test_a_rows_side_does_not_depend_on_the_others(questions: list[str], more: list[str], seed: int) -> None:
    rows = [asked(question) for question in questions]
    train, held_out = split(rows, 0.3, seed)
    assert sorted(map(id, train + held_out)) == sorted(map(id, rows))
    again, apart = split([*(asked(question) for question in more), *reversed(rows)], 0.3, seed)
    assert {id(row) for row in train} <= {id(row) for row in again}
    assert {id(row) for row in held_out} <= {id(row) for row in apart}


def test_a_split_has_about_its_share_and_keeps_equal_prompts_together() -> None:
    rows = [asked(f"What is {i}?", answer) for i in range(2000) for answer in ("a", "b")]
    train, held_out = split(rows, 0.1)
    assert 300 < len(held_out) < 500
    prompts = [{row.messages[0]["content"] for row in side} for side in (train, held_out)]  # type: ignore[index]
    assert not prompts[0] & prompts[1]
    assert split([asked("What is it?"), asked("what is  it")], 0.5)[0] in (
        [],
        [asked("What is it?"), asked("what is  it")],
    )
    assert split(rows, 0)[1] == []
    with pytest.raises(UsageError, match="share"):
        split(rows, 1.0)


def test_duplicates_are_dropped_behind_the_first() -> None:
    rows = [asked("a b", where="line 1"), asked("a b", where="line 2"), asked("A  b!", where="line 3"), asked("c")]
    kept, dropped = deduplicate(rows)
    assert ([row.where for row in dropped], len(kept)) == (["line 2"], 3)
    assert [row.where for row in deduplicate(rows, normalised=True)[1]] == ["line 2", "line 3"]
    assert deduplicate([asked("2+3?"), asked("2*3?"), asked("?")], normalised=True)[1] == []


def test_preferences_with_other_answers_are_no_duplicates() -> None:
    prompt = [{"role": "user", "content": "q"}]
    rows = [Row("x", prompt, None, {"chosen": [{"role": "assistant", "content": c}], "rejected": []}) for c in "ab"]
    assert deduplicate(rows)[1] == []


def test_rows_that_share_their_question_with_an_evaluation_are_dropped() -> None:
    long = "A train leaves at nine and goes eighty miles an hour towards a town far away."
    rows = [
        asked(f"Please: {long.upper()} When?"),
        asked("A train leaves at ten."),
        asked("say What is 2+2 again"),
        asked("漢字の問題です"),
    ]
    kept, dropped = decontaminate(rows, [asked(long), asked("What is 2 + 2?"), asked("漢字の問題")])
    assert kept == [rows[1]]
    assert len(dropped) == 3


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is the sum of these numbers, and how do you know?", "English"),
        ("Was ist die Summe der Zahlen und wie kommst du auf das Ergebnis?", "German"),
        ("Quelle est la somme des nombres et pourquoi est-ce que vous le dites ?", "French"),
        ("¿Cuál es la suma de los números y por qué lo dices?", "Spanish"),
        ("这些数字的总和是多少？", "Chinese"),
        ("これらの数字の合計はいくつですか", "Japanese"),
        ("Сколько будет два плюс два?", "Cyrillic"),
        ("이 숫자의 합은 얼마입니까?", "Korean"),
        ("2 + 2 = 4", "other"),
        ("zq xj kw", "other"),
    ],
)
def test_languages(text: str, language: str) -> None:
    assert language_of(text) == language


def test_statistics_say_what_is_there() -> None:
    rows = [
        asked("What is the sum of it?", "<think>why</think>so"),
        asked("Was ist das und wie?"),
        asked("Was ist das, und wie?"),
    ]
    encoding = Encoding(documents([10, 20, 100]), [], 3)
    figures = describe(rows, encoding)
    assert (figures.rows, figures.documents, figures.tokens, figures.counted, figures.longest) == (3, 3, 130, 65, 100)
    assert figures.histogram == [(16, 1), (32, 1), (64, 0), (128, 1)]
    assert figures.quantiles[50] == 20
    assert figures.reasoning == pytest.approx(1 / 3)
    assert figures.languages == {"German": pytest.approx(2 / 3), "English": pytest.approx(1 / 3)}
    assert figures.repeated == 1
    text = "\n".join(figures.lines())
    assert "130 tokens, of which 65 (50%) are learned" in text
    assert "German 67%" in text
