"""Documents become tokens, and tokens become rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_corpus import counting_documents, write_corpus, write_tokenizer

from edger1.errors import EdgeR1Error, FormatError, UsageError
from edger1.train.pretrain.corpus import Corpus, open_corpus
from edger1.train.pretrain.packing import Place, Rows, pack


def text_of(corpus: Corpus, ids: np.ndarray) -> str:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(corpus.folder / "tokenizer.json"))
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False))


def test_texts_are_encoded_between_first_and_last_token_and_split(tmp_path: Path) -> None:
    documents = [{"text": "ab"}, {"text": "held", "split": "held-out", "task": "x"}, {"text": "c d", "task": "y"}]
    corpus = open_corpus(write_corpus(tmp_path / "c", documents))
    assert len(corpus.train) == 2
    assert len(corpus.held_out) == 1
    first = corpus.train.ids[corpus.train.starts[0] : corpus.train.starts[1]]
    assert text_of(corpus, first) == "<s>ab</s>"
    assert text_of(corpus, corpus.held_out.ids) == "<s>held</s>"
    assert [corpus.task_names[t] for t in corpus.train.tasks] == ["", "y"]
    assert corpus.vocabulary == 260
    assert corpus.train.ids.dtype == np.uint16


def test_only_assistant_turns_count_in_messages(tmp_path: Path) -> None:
    turns = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    corpus = open_corpus(write_corpus(tmp_path / "c", [row]))
    assert text_of(corpus, corpus.train.ids) == "<s><U>q1<A>a1</s><U>q2<A>a2</s>"
    assert text_of(corpus, corpus.train.ids[corpus.train.counted]) == "a1</s>a2</s>"


def test_a_template_that_drops_reasoning_is_refused(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>why</think>a"}]}
    folder = write_corpus(tmp_path / "c", [row])
    about = folder / "tokenizer_config.json"
    about.write_text(
        about.read_text().replace("{{ m['content'] }}{{ eos", "{{ m['content'].split('</think>')[-1] }}{{ eos")
    )
    with pytest.raises(FormatError, match="line 1: the chat template leaves out a part of turn 2"):
        open_corpus(folder)


def test_a_corpus_is_encoded_once_and_again_when_it_changes(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "c", [{"text": "one"}])
    seen: list[int] = []
    open_corpus(folder, lambda done, whole: seen.append(done))
    assert seen
    seen.clear()
    open_corpus(folder, lambda done, whole: seen.append(done))
    assert not seen
    with (folder / "documents.jsonl").open("a") as file:
        file.write('{"text": "two"}\n')
    assert len(open_corpus(folder).train) == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "documents.jsonl, line 2 is not JSON"),
        ("[]", 'line 2: expected an object with either "text" or "messages"'),
        ('{"text": "a", "messages": []}', "either"),
        ('{"text": ""}', "line 2: text is ''"),
        ('{"text": "a", "split": "test"}', "line 2: split is 'test'"),
        ('{"messages": []}', "line 2: messages is []"),
        ('{"messages": [{"content": "a"}]}', "line 2: messages must be objects with role and content"),
    ],
)
def test_a_line_that_is_no_document_is_named(tmp_path: Path, line: str, said: str) -> None:
    folder = write_corpus(tmp_path / "c", [{"text": "fine"}])
    with (folder / "documents.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(FormatError) as error:
        open_corpus(folder)
    assert said in str(error.value)
    assert not list((folder / "tokens").glob("*.part"))


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    for folder, said in (
        (tmp_path / "nowhere", "holds no *.jsonl"),
        (write_corpus(tmp_path / "empty", []), "no document for training"),
        (write_corpus(tmp_path / "held", [{"text": "a", "split": "held-out"}]), "no document for training"),
    ):
        with pytest.raises(UsageError) as error:
            open_corpus(folder)
        assert said in str(error.value)
    write_tokenizer(tmp_path / "bare")
    (tmp_path / "bare" / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "bare" / "tokenizer.json").unlink()
    with pytest.raises(EdgeR1Error, match=r"no tokenizer\.json"):
        open_corpus(tmp_path / "bare")


@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.randoms())
def test_packing_places_every_document_once_within_the_rows(sizes: list[int], random: object) -> None:
    order = np.random.default_rng(len(sizes)).permutation(len(sizes))
    rows = pack(np.array(sizes), 20, order)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= 20 for row in rows)
    # Best fit leaves at most one row half empty.
    assert sum(sum(sizes[i] for i in row) <= 10 for row in rows) <= 1


def test_rows_hold_whole_documents_and_count_what_lies_within_one(tmp_path: Path) -> None:
    corpus = open_corpus(write_corpus(tmp_path / "c", counting_documents()))
    rows = Rows(corpus.train, 48, corpus.pad, 1, counted_only=False)
    batch, place = rows.next(Place(), rows.epoch_rows(0))
    assert place == Place(0, rows.epoch_rows(0))
    tokens, starts, weights, ahead = (
        np.array(a) for a in (batch.tokens, batch.starts, batch.weights, batch.ahead_weights)
    )
    found = []
    for row, start in zip(tokens, starts, strict=True):
        for begin in np.unique(start):
            document = row[start == begin]
            if document[0] != corpus.pad:
                found.append(document.tolist())
    ends = corpus.train.starts
    expected = [corpus.train.ids[ends[i] : ends[i + 1]].tolist() for i in range(len(corpus.train))]
    assert sorted(found) == sorted(expected)
    # A document of n tokens has n - 1 next tokens, and n - 2 after those.
    assert weights.sum() == sum(len(d) - 1 for d in expected)
    assert ahead.sum() == sum(len(d) - 2 for d in expected)
    for b, i in np.argwhere(weights > 0):
        assert starts[b, i] == starts[b, i + 1]


def test_a_long_document_is_cut_into_rows_of_its_own(tmp_path: Path) -> None:
    corpus = open_corpus(write_corpus(tmp_path / "c", [{"text": "x" * 100}]))
    rows = Rows(corpus.train, 32, corpus.pad, 1, counted_only=False)
    assert rows.epoch_rows(0) == 4
    batch, _ = rows.next(Place(), 4)
    assert int(batch.weights.sum().item()) == 31 + 31 + 31 + 5


def test_rows_go_on_from_any_place_as_if_never_left(tmp_path: Path) -> None:
    corpus = open_corpus(write_corpus(tmp_path / "c", counting_documents()))

    def rows() -> Rows:
        return Rows(corpus.train, 32, corpus.pad, 7, counted_only=False)

    one, place = rows(), Place()
    for _ in range(7):
        _, place = one.next(place, 3)
    assert place.epoch > 0
    expected, _ = one.next(place, 3)
    found, _ = rows().next(place, 3)
    assert np.array_equal(expected.tokens, found.tokens)
    first, _ = rows().next(Place(0), 3)
    later, _ = rows().next(Place(1), 3)
    assert not np.array_equal(first.tokens, later.tokens)
