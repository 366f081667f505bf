"""The nano recipe: every problem's own solution is graded right, nothing held out is trained on, tokens come back."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from recipes.nano import corpus, evaluate, gym, tokenizer
from recipes.nano.countdown import reaches
from recipes.nano.kinds import answer_of, grade, kinds
from recipes.nano.problems import Problem

KINDS = kinds(seed=3)
_EQUATION = re.compile(r"(?<![\d*/+-] )(?<![\d-])(\d+) ([-+*/]) (\d+) = (-?\d+)")


def drawn(name: str, count: int = 150) -> list[Problem]:
    rng = Random(7)
    return [KINDS[name].make(rng) for _ in range(count)]


@pytest.mark.parametrize("name", KINDS)
def test_a_kinds_own_answers_are_graded_right_and_others_wrong(name: str) -> None:
    problems = drawn(name)
    for problem in problems:
        assert problem.kind == name
        assert problem.question
        assert problem.steps
        reply = problem.messages()[1]["content"]
        assert grade(name, problem.key, problem.answer, reply), problem
        assert not grade(name, problem.key, problem.answer, f"<think>\n{problem.answer}\n</think>\n\n12345"), problem
        assert not grade(name, problem.key, problem.answer, f"<think>\n{problem.answer}"), "a thought is no answer"


@pytest.mark.parametrize("name", KINDS)
def test_every_equation_in_the_steps_holds(name: str) -> None:
    # Sums of one operation, as they stand in the steps of nearly every kind; longer ones are sums of these.
    for problem in drawn(name):
        for a, sign, b, result in _EQUATION.findall(problem.thoughts):
            value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / max(1, int(b))}
            assert value[sign] == int(result), problem


def test_steps_lead_to_the_answer() -> None:
    for name in ("add", "subtract", "multiply", "chain", "sequence", "worded", "gym sums", "gym legs", "gym angles"):
        if name in KINDS:
            for problem in drawn(name):
                assert problem.steps[-1].endswith(f"= {problem.answer}"), problem


@pytest.mark.skipif(not gym.available(), reason="reasoning-gym is not installed")
def test_the_filtered_list_is_what_the_steps_kept() -> None:
    for problem in drawn("gym filtering"):
        kept = [step.split()[0] for step in problem.steps if step.endswith("keep")]
        assert problem.answer == str(kept)


def test_answers_by_other_means() -> None:
    """Recompute what the question says, with nothing of the generator's own."""
    for problem in drawn("add"):
        a, b = map(int, re.findall(r"\d+", problem.question))
        assert int(problem.answer) == a + b
    for problem in drawn("divide"):
        a, b = map(int, re.findall(r"\d+", problem.question))
        assert problem.answer == "{} remainder {}".format(*divmod(a, b))
    for problem in drawn("count letters"):
        word, letter = problem.key.split()
        assert int(problem.answer) == word.count(letter)
    for problem in drawn("sort words"):
        assert problem.answer.split(", ") == sorted(problem.key.split(", "))


def test_dates_agree_with_the_calendar() -> None:
    from datetime import datetime, timedelta

    def day(text: str, year: int) -> datetime:
        return datetime.strptime(f"{text} {year}", "%B %d %Y")

    for problem in drawn("date"):
        named = re.findall(r"[A-Z][a-z]+ \d+", problem.question)
        named = [n for n in named if n.split()[0] not in ("What", "How")]
        if len(named) == 2:
            # Years that are no leap years, in which every span lies.
            begin, end = day(named[0], 2021), day(named[1], 2021)
            end = end if end >= begin else day(named[1], 2022)
            assert (end - begin).days == int(problem.answer), problem
        else:
            days = int(re.findall(r"(\d+) days", problem.question)[0])
            later = day(named[0], 2021) + timedelta(days=days)
            assert f"{later:%B} {later.day}" == problem.answer, problem


@pytest.mark.skipif(not gym.available(), reason="reasoning-gym is not installed")
def test_reasoning_gym_takes_our_answers() -> None:
    import reasoning_gym

    for name in gym.KINDS:
        source, settings, _ = gym._TASKS[name]
        dataset: Any = reasoning_gym.create_dataset(source, size=20, seed=3_000_009_000, **settings)
        made = gym.Gym(name, 3)
        for entry in dataset:
            problem = made(Random(0))
            assert dataset.score_answer(problem.answer, entry) == 1.0


@pytest.mark.parametrize(
    ("expression", "right"),
    [
        ("26 + 11 + 4", True),
        ("11+26+4", True),
        ("26 + 11", False),
        ("26 + 11 + 4 + 0", False),
        ("4 * 11 - 26", False),
        ("", False),
        ("__import__('os')", False),
    ],
)
def test_countdown_takes_any_expression_that_works(expression: str, right: bool) -> None:
    assert reaches(expression, [4, 11, 26], 41) is right


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("<think>\n1 + 1 = 2\n</think>\n\n2", "2"),
        ("2.", "2"),
        ("1 + 1 = 2\n</think>\n\n2", "2"),
        ("<think>\n1 + 1", ""),
    ],
)
def test_the_answer_is_what_follows_the_thoughts(reply: str, answer: str) -> None:
    assert answer_of(reply) == answer


def make(folder: Path) -> dict[str, Any]:
    """Make a small corpus, whose tokenizer is trained on four times as many documents as it has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "TOKENIZER_DOCUMENTS", 8000)
        patch.setattr(corpus, "SHARD_DOCUMENTS", 2000)
        return corpus.make(folder, tokens=150_000, seed=5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("nano")
    return folder, make(folder)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_nothing_held_out_is_trained_on(made: tuple[Path, dict[str, Any]]) -> None:
    folder, about = made
    questions = rows(folder / "questions" / "held-out.jsonl")
    assert len({row["task"] for row in questions}) >= 12
    kept = {row["question"] for row in questions}
    texts = [corpus.rendered(row) for path in folder.glob("train-*.jsonl") for row in rows(path)]
    assert len(texts) == about["documents"] > 1000
    assert not [text for text in texts if any(line in kept for line in text.splitlines())]
    for row in questions:
        assert Problem(row["task"], row["key"], row["question"], (), row["answer"]).held_out
    # And the other way round: a training question's own key is on the other side of the hash.
    for problem in drawn("chain", 400):
        assert problem.held_out is (Problem("chain", problem.key, "in other words", (), "").held_out)


def test_the_same_seed_gives_the_same_corpus(made: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = made
    make(tmp_path)
    for name in ("train-000.jsonl", "held-out.jsonl", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_the_tokenizer_gives_back_what_it_was_given(made: tuple[Path, dict[str, Any]]) -> None:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(str(made[0]), local_files_only=True)
    assert len(tokens) == tokenizer.VOCABULARY
    for text in ("What is 47 + 85?\n", " two  spaces, tabs\tand\nlines\n\n", "Ünïcode 漢字 🙂 and 12.5%", "a=b; x<y"):
        assert tokens.decode(tokens.encode(text, add_special_tokens=False)) == text
    for name in KINDS:
        for problem in drawn(name, 20):
            text = problem.messages()[1]["content"]
            assert tokens.decode(tokens.encode(text, add_special_tokens=False)) == text


def test_every_digit_is_a_token_of_its_own(made: tuple[Path, dict[str, Any]]) -> None:
    from tokenizers import Tokenizer

    tokens = Tokenizer.from_file(str(made[0] / "tokenizer.json"))
    assert not [word for word in tokens.get_vocab() if sum(c.isdigit() for c in word) and len(word) > 1]
    shown = tokens.encode("47 + 85 = 132", add_special_tokens=False).tokens
    assert shown == ["4", "7", "Ġ+", "Ġ", "8", "5", "Ġ=", "Ġ", "1", "3", "2"]


def test_the_chat_template_follows_r1(made: tuple[Path, dict[str, Any]]) -> None:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(str(made[0]), local_files_only=True)
    turns = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "<think>\n1 + 1 = 2\n</think>\n\n2"},
        {"role": "user", "content": "2 + 2?"},
    ]
    prompt = tokens.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert prompt == (
        "<｜begin▁of▁sentence｜><｜User｜>1 + 1?<｜Assistant｜>2<｜end▁of▁sentence｜>"
        "<｜User｜>2 + 2?<｜Assistant｜><think>\n"
    )
    trained = tokens.apply_chat_template(turns[:2], tokenize=False)
    assert trained.endswith("<｜Assistant｜><think>\n1 + 1 = 2\n</think>\n\n2<｜end▁of▁sentence｜>")
    assert trained.startswith(tokens.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True))
    silent = tokens.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert silent.endswith("<think>\n\n</think>\n\n")
    ids = tokens.apply_chat_template(turns[:1], add_generation_prompt=True)["input_ids"]
    assert tokens.convert_ids_to_tokens(ids)[-2:] == ["<think>", "Ċ"]


def test_mlx_lm_knows_the_thinking_tokens(made: tuple[Path, dict[str, Any]]) -> None:
    from mlx_lm.utils import load_tokenizer

    tokens = load_tokenizer(made[0])
    assert tokens.has_thinking
    assert (tokens.think_start, tokens.think_end) == ("<think>", "</think>")
    stream = tokens.detokenizer
    text = "47 + 85 = 132, write 2\n</think>\n\n12, 45"
    stream.reset()
    for token in tokens.encode(text, add_special_tokens=False):
        stream.add_token(token)
    stream.finalize()
    assert stream.text == text


def test_documents_fit_a_row(made: tuple[Path, dict[str, Any]]) -> None:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(str(made[0]), local_files_only=True)
    lengths = []
    for row in rows(made[0] / "train-000.jsonl"):
        if "messages" in row:
            lengths.append(len(tokens.apply_chat_template(row["messages"])["input_ids"]))
    assert sum(length > 256 for length in lengths) <= len(lengths) * 0.002


def test_accuracy_is_told_by_kind(made: tuple[Path, dict[str, Any]]) -> None:
    questions = evaluate.read(made[0], each=10)
    known = {q.question: q.answer for q in questions}

    def knows_sums_only(asked: Sequence[str]) -> list[str]:
        return [known[question] if "+" in question or "Add" in question else "no idea" for question in asked]

    told = {task: (right, asked) for task, right, asked in evaluate.accuracy(questions, knows_sums_only)}
    assert set(told) == {q.task for q in questions}
    assert told["compare"][0] == 0
    assert told["add"][0] > 0
    assert max(asked for _, asked in told.values()) == 10
