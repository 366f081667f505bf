"""Distillation from prompts to a data set: what is kept, what is counted, and what a stop or a kill leaves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from chat_server import Handler, adding, completion, serving
from children import child, until

from edger1.errors import EdgeR1Error, FormatError, UsageError
from edger1.tasks.task import Question
from edger1.train.distill.dataset import Report
from edger1.train.distill.prompts import Prompts
from edger1.train.distill.remote import RemoteTeacher
from edger1.train.distill.run import run
from edger1.train.distill.sampling import Progress, Settings
from edger1.train.distill.teachers import Drawing, NoAnswerError, Reply, TeacherError
from edger1.train.rewards.completion import Completion
from edger1.train.store import Store, StoreError


class Sums:
    """A reward: 1 where the answer is the column's."""

    def __init__(self) -> None:
        self.seen: list[Completion] = []

    def score(self, completions: Sequence[Completion]) -> list[dict[str, float]]:
        self.seen += completions
        return [{"sums": float(c.answer == str(c.columns["answer"]))} for c in completions]


def sums(count: int = 6) -> Prompts:
    questions = [
        Question(
            [{"role": "user", "content": f"What is {i} + {i + 1}"}], {"answer": 2 * i + 1}, f"sums.jsonl, line {i + 1}"
        )
        for i in range(count)
    ]
    return Prompts("sums.jsonl", questions)


class Fake:
    """A teacher that answers by a function of the question and the seed."""

    name, identity, concurrency = "fake", "fake 1", 3

    def __init__(self, answer: Any = None) -> None:
        self.asked: list[tuple[str, int]] = []
        self._answer = answer or self._add
        self._lock = threading.Lock()

    def about(self) -> dict[str, Any]:
        return {"name": self.name, "kind": "remote", "address": "http://fake/v1"}

    def ask(self, messages: list[dict[str, Any]], drawing: Drawing, seed: int) -> Reply:
        with self._lock:
            self.asked.append((messages[-1]["content"], seed))
        return self._answer(messages, seed)

    @staticmethod
    def _add(messages: list[dict[str, Any]], seed: int) -> Reply:
        said = adding({"messages": messages, "seed": seed})["choices"][0]["message"]
        return Reply(said["reasoning_content"], said["content"], "stop", 3 + seed % 3)

    def stop(self) -> None: ...

    def close(self) -> None: ...


def distill(folder: Path, teacher: Any, prompts: Prompts | None = None, **options: Any) -> Report:
    settings = options.pop("settings", Settings())
    rewards = options.pop("rewards", Sums())
    verified_by = ["sums"] if rewards else []
    return run(settings, teacher, prompts or sums(), rewards, folder, verified_by=verified_by, **options)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def written(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("data.jsonl", "samples.jsonl", "distill.json", "README.md")}


def test_the_shortest_right_answer_of_each_prompt_is_kept_with_its_reasoning(tmp_path: Path) -> None:
    report = distill(tmp_path, Fake())
    samples = rows(tmp_path / "samples.jsonl")
    kept = rows(tmp_path / "data.jsonl")
    assert len(samples) == 24
    right = [s for s in samples if s["text"].endswith(f"\n\n{2 * s['prompt'] + 1}")]
    assert [s["accepted"] for s in samples] == [s in right for s in samples]
    assert 0 < len(right) < 24
    expected = []
    for prompt in range(6):
        of = [s for s in right if s["prompt"] == prompt]
        if of:
            expected.append(min(of, key=lambda s: (s["tokens"], s["sample"]))["text"])
    assert [row["messages"][-1]["content"] for row in kept] == expected
    assert all(row["messages"][-1]["content"].startswith("<think>\nhm") for row in kept)
    assert kept[0]["messages"][0] == {"role": "user", "content": "What is 0 + 1"}
    counts = report.counts
    assert (counts.samples, counts.accepted, counts.wrong, counts.kept) == (24, len(right), 24 - len(right), len(kept))


def test_the_verifier_sees_the_thought_apart_and_the_columns(tmp_path: Path) -> None:
    rewards = Sums()
    distill(tmp_path, Fake(), sums(1), rewards=rewards, settings=Settings(samples=1))
    (seen,) = rewards.seen
    assert set((seen.thinking or "").split()) == {"hm"}
    assert seen.columns == {"answer": 1}
    assert seen.where == "sums.jsonl, line 1"


def test_unverified_answers_are_all_kept_and_the_card_says_so(tmp_path: Path) -> None:
    settings = Settings(samples=3, keep=None)
    report = distill(tmp_path, Fake(lambda m, seed: Reply("", f"a{seed}", "stop", 1)), rewards=None, settings=settings)
    assert report.counts.kept == report.counts.accepted == 18
    card = (tmp_path / "README.md").read_text()
    assert "unverified" in card
    assert "wrong answers are among these" in card


def test_answers_that_were_cut_off_are_never_kept(tmp_path: Path) -> None:
    teacher = Fake(lambda m, seed: Reply("hm", "", "length", 9))
    report = distill(tmp_path, teacher, rewards=None)
    assert (report.counts.cut_off, report.counts.accepted, report.counts.kept) == (24, 0, 0)
    assert report.counts.prompts_without_answer == 6
    assert (tmp_path / "data.jsonl").read_text() == ""


def test_rewards_that_failed_are_counted(tmp_path: Path) -> None:
    rewards: Any = Sums()
    rewards.failed = 3
    assert distill(tmp_path, Fake(), rewards=rewards).counts.reward_failures == 3
    assert "a reward failed on an answer, which counts as wrong | 3 |" in (tmp_path / "README.md").read_text()


def test_the_same_answer_twice_is_kept_once(tmp_path: Path) -> None:
    teacher = Fake(lambda m, seed: Reply("hm", "1", "stop", 2))
    report = distill(tmp_path, teacher, sums(1), settings=Settings(samples=4, keep=4))
    assert (report.counts.accepted, report.counts.kept) == (4, 1)


def test_without_counts_of_tokens_the_shortest_is_by_characters(tmp_path: Path) -> None:
    teacher = Fake(lambda m, seed: Reply("x" * (1 + seed % 97), "1", "stop", None))
    distill(tmp_path, teacher, sums(1), settings=Settings(samples=6))
    samples, kept = rows(tmp_path / "samples.jsonl"), rows(tmp_path / "data.jsonl")
    assert len(kept[0]["messages"][-1]["content"]) == min(len(s["text"]) for s in samples)
    assert "characters" in (tmp_path / "README.md").read_text()


def test_repeated_prompts_are_asked_once_and_counted(tmp_path: Path) -> None:
    twice = Prompts("twice.jsonl", sums(2).questions * 2)
    teacher = Fake()
    report = distill(tmp_path, teacher, twice)
    assert (report.counts.prompts_given, report.counts.prompts_repeated, report.counts.prompts) == (4, 2, 2)
    assert len(teacher.asked) == 8


def test_every_sample_has_a_seed_of_its_own_that_does_not_depend_on_the_others(tmp_path: Path) -> None:
    few, many = Fake(), Fake()
    distill(tmp_path / "few", few, sums(2), settings=Settings(samples=2))
    distill(tmp_path / "many", many, sums(3), settings=Settings(samples=3))
    assert len(set(many.asked)) == 9
    assert set(few.asked) < set(many.asked)


def test_a_second_run_asks_nothing_and_more_samples_ask_only_for_what_is_new(tmp_path: Path) -> None:
    distill(tmp_path, Fake())
    before = written(tmp_path)
    again = Fake()
    distill(tmp_path, again)
    assert again.asked == []
    assert written(tmp_path) == before
    more = Fake()
    distill(tmp_path, more, settings=Settings(samples=6))
    assert len(more.asked) == 12


@pytest.mark.parametrize(
    "changed",
    [{"settings": Settings(seed=1)}, {"settings": Settings(drawing=Drawing(temperature=0.3))}, {"teacher": "fake 2"}],
)
def test_another_teacher_seed_or_setting_is_asked_anew(tmp_path: Path, changed: dict[str, Any]) -> None:
    distill(tmp_path, Fake())
    teacher = Fake()
    teacher.identity = changed.pop("teacher", teacher.identity)
    distill(tmp_path, teacher, **changed)
    assert len(teacher.asked) == 24


def test_a_prompt_without_an_answer_is_counted_and_asked_again_by_the_next_run(tmp_path: Path) -> None:
    def sulky(messages: list[dict[str, Any]], seed: int) -> Reply:
        if " 3 + " in messages[-1]["content"]:
            raise NoAnswerError("it is too long")
        return Fake._add(messages, seed)

    report = distill(tmp_path, Fake(sulky))
    assert report.counts.unanswered == 4
    assert report.unanswered[0] == "sums.jsonl, line 4, sample 0: it is too long"
    again = Fake()
    assert distill(tmp_path, again).counts.unanswered == 0
    assert {question for question, _ in again.asked} == {"What is 3 + 4"}


def test_a_teacher_that_answers_nothing_any_more_ends_the_run_and_keeps_what_there_is(tmp_path: Path) -> None:
    answered = []

    def dying(messages: list[dict[str, Any]], seed: int) -> Reply:
        if len(answered) >= 5:
            raise NoAnswerError("gone")
        answered.append(seed)
        return Fake._add(messages, seed)

    with pytest.raises(TeacherError, match=r"10 prompts in a row unanswered. gone"):
        distill(tmp_path, Fake(dying))
    again = Fake()
    distill(tmp_path, again)
    assert len(again.asked) == 24 - len(answered)


def test_a_stop_keeps_what_was_answered_and_the_card_says_it_is_not_all(tmp_path: Path) -> None:
    teacher = Fake()
    seen: list[Progress] = []
    report = distill(tmp_path, teacher, on_progress=seen.append, stop=lambda: len(seen) >= 7)
    assert not report.finished
    assert 7 <= report.counts.samples < 24
    assert "Unfinished" in (tmp_path / "README.md").read_text()
    whole = distill(tmp_path, Fake())
    assert whole.finished
    distill(tmp_path / "at-once", Fake())
    assert written(tmp_path) == written(tmp_path / "at-once")


def test_progress_tells_the_share_accepted_and_the_time_left(tmp_path: Path) -> None:
    seen: list[Progress] = []
    report = distill(tmp_path, Fake(), on_progress=seen.append)
    assert [p.done for p in seen] == list(range(1, 25))
    assert seen[-1].acceptance == report.counts.acceptance
    assert seen[-1].seconds_left == 0
    assert (seen[3].seconds_left or 0) > 0


CHILD = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_distill_sampling import distill
from edger1.train.distill.remote import RemoteTeacher
print("began", flush=True)
distill(Path(sys.argv[1]), RemoteTeacher(sys.argv[2], "m", concurrency=3))
"""


def distilling(folder: Path, address: str) -> AbstractContextManager[subprocess.Popen[Any]]:
    return child([sys.executable, "-c", CHILD, str(folder), address], stdout=subprocess.DEVNULL)


def test_killed_in_the_middle_it_goes_on_and_ends_with_the_same_files(tmp_path: Path) -> None:
    killed = threading.Event()

    def hold(_: Handler, number: int) -> bool:
        if number >= 8:
            killed.wait(60)
        return False

    with serving(trouble=hold) as server:
        with distilling(tmp_path / "killed", server.address) as process:
            until(lambda: len(server.requests) >= 9, "the ninth request", process)
            process.send_signal(signal.SIGKILL)
        killed.set()
        asked = len(server.requests)
        assert asked < 24
        distill(tmp_path / "killed", RemoteTeacher(server.address, "m"))
        # Those under way when it was killed are asked for once more, and no others.
        assert len(server.requests) - 24 <= 3
        distill(tmp_path / "whole", RemoteTeacher(server.address, "m"))
    assert written(tmp_path / "killed") == written(tmp_path / "whole")


def test_two_processes_at_once_end_with_the_same_files(tmp_path: Path) -> None:
    # The teacher never says the same twice, so that each sample's answer shows who gave it.
    answers = iter(range(10**6))

    def fresh(request: dict[str, Any]) -> dict[str, Any]:
        return completion(adding(request)["choices"][0]["message"]["content"], f"thought {next(answers)}")

    with serving(fresh, delay_s=0.02) as server:
        with distilling(tmp_path, server.address) as one, distilling(tmp_path, server.address) as other:
            assert [one.wait(), other.wait()] == [0, 0]
        before = written(tmp_path)
        asked = len(server.requests)
        distill(tmp_path, RemoteTeacher(server.address, "m"))
        assert len(server.requests) == asked
    assert written(tmp_path) == before


def test_a_damaged_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "samples.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(FormatError, match="damaged"):
        distill(tmp_path, Fake())


def test_a_cache_of_something_else_is_refused(tmp_path: Path) -> None:
    import sqlite3

    database = sqlite3.connect(tmp_path / "samples.sqlite")
    database.execute("CREATE TABLE mine (x)")
    database.commit()
    database.close()
    with pytest.raises(FormatError, match="something else"):
        distill(tmp_path, Fake())


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be opened"):
        Store(tmp_path / "file" / "samples.sqlite")


def test_the_first_value_of_a_key_stays(tmp_path: Path) -> None:
    with Store(tmp_path / "s") as one, Store(tmp_path / "s") as other:
        assert one.add("k", b"1") == b"1"
        assert other.add("k", b"2") == b"1"
        assert (len(one), other.get("k"), other.get("missing")) == (1, b"1", None)


@pytest.mark.parametrize("settings", [Settings(samples=0), Settings(keep=0)])
def test_settings_out_of_range_are_refused(tmp_path: Path, settings: Settings) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        distill(tmp_path, Fake(), settings=settings)


def test_a_folder_that_cannot_be_written_keeps_the_answers(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(EdgeR1Error, match="answers are kept"):
        distill(tmp_path / "out", Fake(), cache=tmp_path / "cache")
    again = Fake()
    distill(tmp_path / "elsewhere", again, cache=tmp_path / "cache")
    assert again.asked == []
