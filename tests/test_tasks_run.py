"""Tasks asked of models: files of questions, sampling, going on after a stop, and what is written."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from edger1 import paths
from edger1.cli import app
from edger1.errors import ContextError, EdgeR1Error, FormatError, UsageError
from edger1.tasks.asking import Settings, ask, seed_of
from edger1.tasks.results import Evaluation
from edger1.tasks.run import Variant, evaluate
from edger1.tasks.task import Question, Task, open_task

needs_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is NOT INSTALLED"
)


class FakeModel:
    """Answers sums; how often it is right is given. Notes what it was asked."""

    info = {"has_chat_template": True}  # noqa: RUF012

    def __init__(self, right: float = 1.0, stop_after: int | None = None) -> None:
        self.right = right
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.cancelled = 0
        self.stop_after = stop_after

    def submit(self, prompt: Any, **options: Any) -> Any:
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        self.asked.append((text, options))
        good = (options["seed"] % 1000) / 1000 < self.right
        terms = [int(word) for word in text.split() if word.isdigit()]
        answer = f"The answer is {sum(terms) + (0 if good else 1)}."
        number = len(self.asked)

        def result() -> Any:
            if self.stop_after is not None and number > self.stop_after:
                raise KeyboardInterrupt
            usage = SimpleNamespace(completion_tokens=7)
            return SimpleNamespace(thinking="hm", text=answer, usage=usage, finish_reason="stop")

        def cancel() -> None:
            self.cancelled += 1

        return SimpleNamespace(done=number % 3 == 0, result=result, cancel=cancel)


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    path = tmp_path / "sums.jsonl"
    rows = [{"question": f"{a} + {b}", "answer": str(a + b)} for a in range(4) for b in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def variant(tmp_path: Path) -> Variant:
    folder = tmp_path / "a-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return Variant("a-model", folder)


def run(task: Task, model: FakeModel, variants: list[Variant], settings: Settings, **options: Any) -> Evaluation:
    @contextmanager
    def opened(variant: Variant) -> Iterator[FakeModel]:
        yield model

    return evaluate(task, variants, settings, opened, **options)


def test_a_file_of_questions_with_numbers_is_scored_by_them(sums: Path) -> None:
    task = open_task(sums, size=5)
    assert task.reward.names == ("numeric",)
    assert [question.messages for question in task.questions[:2]] == [
        [{"role": "user", "content": "0 + 0"}],
        [{"role": "user", "content": "0 + 1"}],
    ]
    assert task.questions[1].where == "sums.jsonl, line 2"
    assert task.describe() == "sums.jsonl: 5 questions, scored by numeric"


def test_other_files_are_scored_by_what_fits(tmp_path: Path) -> None:
    words, programs, chats = (tmp_path / name for name in ("words.jsonl", "programs.jsonl", "chats.jsonl"))
    words.write_text('{"problem": "Capital of France?", "solution": "Paris"}\n')
    programs.write_text('{"prompt": "Write f.", "tests": ["assert f() == 1"]}\n')
    chat = [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "content": "2"}]
    chats.write_text(json.dumps({"messages": chat, "answer": 2}) + "\n")
    assert open_task(words).reward.names == ("exact",)
    assert open_task(words).questions[0].columns["answer"] == "Paris"
    assert open_task(programs).reward.names == ("code",)
    task = open_task(chats, system="Be brief.")
    assert [message["role"] for message in task.questions[0].messages] == ["system", "user"]
    assert open_task(words, rewards=["format", "exact"]).reward.names == ("format", "exact")


def test_columns_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text('{"q": "1 + 1", "a": "2", "answer": "no"}\n')
    task = open_task(path, options={"question": "q", "answer": "a"})
    assert task.questions[0].columns["answer"] == "2"
    with pytest.raises(FormatError, match=r"odd.jsonl, line 1: no question; expected a column question, problem"):
        open_task(path)
    with pytest.raises(FormatError, match="no column x; the row has q, a, answer"):
        open_task(path, options={"question": "x"})
    with pytest.raises(UsageError, match="is for tasks named gym"):
        open_task(path, options={"question": "q", "levels": 3})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no questions"),
        ("{bad\n", "line 1"),
        ('{"question": "x"}\n', "no answer; expected a column answer"),
        ('{"question": 3, "answer": 1}\n', "the question in question is 3; expected a text"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(FormatError, match=message):
        open_task(path)


def test_a_task_that_is_nowhere_says_how_tasks_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='is named "gym:NAME"'):
        open_task("countdown")


@needs_gym
def test_generated_tasks_repeat_and_score_their_own_answers() -> None:
    from edger1.tasks.task import _generated
    from edger1.train.rewards.completion import Completion

    options = {"min_terms": 2, "max_terms": 3}
    task = open_task("gym:chain_sum", size=2, seed=4, options=options)
    with task.reward:
        assert task.questions == _generated("chain_sum", 2, 4, options, [])
        assert task.questions != _generated("chain_sum", 2, 5, options, [])
        question = task.questions[0]
        texts = [f"<think>x</think>{question.columns['answer']}", "<think>x</think>no idea"]
        rows = [Completion.from_text(question.messages, text, columns=question.columns) for text in texts]
        assert [task.reward.right(scores) for scores in task.reward.score(rows)] == [True, False]


@needs_gym
@pytest.mark.parametrize("name", ["polynomial_multiplication", "mini_sudoku", "letter_counting", "decimal_arithmetic"])
def test_right_answers_of_many_shapes_survive_being_taken_out(name: str) -> None:
    from edger1.tasks.task import _generated
    from edger1.train.rewards.completion import Completion
    from edger1.train.rewards.gym import gym

    for question in _generated(name, 3, 1, {}, []):
        right = question.columns["answer"]
        for text in (f"<think>x</think>{right}", f"<think>x</think>So:\n<answer>{right}</answer>"):
            assert gym(Completion.from_text("", text, columns=question.columns), task=name) == 1.0


@needs_gym
def test_unknown_generators_and_options_are_named() -> None:
    with pytest.raises(UsageError, match='has no task "countdwn".*countdown'):
        open_task("gym:countdwn")
    with pytest.raises(UsageError, match="gym:chain_sum does not take these options.*min_terms="):
        open_task("gym:chain_sum", options={"depth": 3})
    with pytest.raises(UsageError, match="gym:chain_sum does not take these options"):
        open_task("gym:chain_sum", options={"min_terms": 9, "max_terms": 2})


def test_every_sample_has_a_seed_of_its_own() -> None:
    seeds = {seed_of(s, q, n) for s in range(3) for q in range(20) for n in range(4)}
    assert len(seeds) == 3 * 20 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_samples_come_whole_and_settings_reach_the_model(sums: Path) -> None:
    task, model = open_task(sums), FakeModel()
    settings = Settings(samples=3, temperature=0.7, max_tokens=50, seed=9, at_once=5)
    samples = list(ask(model, task.questions, settings))
    assert sorted((s.question, s.number) for s in samples) == [(q, n) for q in range(12) for n in range(3)]
    text, options = model.asked[4]
    assert text == "0 + 1"
    assert options["seed"] == seed_of(9, 1, 1)
    assert (options["temperature"], options["max_tokens"], options["top_p"], options["top_k"]) == (0.7, 50, 1.0, 0)


def test_a_model_without_a_chat_template_continues_the_question() -> None:
    model = FakeModel()
    model.info = {"has_chat_template": False}
    list(ask(model, [Question([{"role": "user", "content": "1 + 1"}])], Settings()))
    text, options = model.asked[0]
    assert (text, options["raw"]) == ("1 + 1\n", True)


def test_a_question_that_does_not_fit_is_named() -> None:
    class Small(FakeModel):
        def submit(self, prompt: Any, **options: Any) -> Any:
            def result() -> Any:
                raise ContextError("The prompt has 9 tokens.")

            return SimpleNamespace(done=True, result=result, cancel=lambda: None)

    with pytest.raises(ContextError, match="q.jsonl, line 3: The prompt has 9 tokens"):
        list(ask(Small(), [Question([{"role": "user", "content": "x"}], {}, "q.jsonl, line 3")], Settings()))


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="3 samples a question at temperature 0 are the same one"):
        Settings(samples=3).check()
    with pytest.raises(UsageError, match="max_tokens is 0"):
        Settings(max_tokens=0).check()


def test_figures_of_several_models(sums: Path, variant: Variant, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    settings = Settings(samples=4, temperature=0.6)
    task = open_task(sums)
    models = {"a-model": FakeModel(0.9), "other": FakeModel(0.4)}

    @contextmanager
    def opened(variant: Variant) -> Iterator[FakeModel]:
        yield models[variant.name]

    kept = tmp_path / "kept.jsonl"
    found = evaluate(task, [variant, Variant("other", other)], settings, opened, keep=kept)
    for result in found.results:
        good = [
            sum((seed_of(0, q, n) % 1000) / 1000 < models[result.name].right for n in range(4)) / 4 for q in range(12)
        ]
        assert result.shares == good
        assert result.accuracy.value == pytest.approx(sum(good) / 12)
        assert result.pass_at[4].value == pytest.approx(sum(share > 0 for share in good) / 12)
        assert (list(result.pass_at), list(result.maj_at)) == ([2, 4], [4])
        assert result.mean_tokens == 7
    told = found.differences()["other"]
    assert told.value == pytest.approx(found.results[1].accuracy.value - found.results[0].accuracy.value)
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert len(rows) == 2 * 12 * 4
    assert rows[0]["messages"] == [{"role": "user", "content": "0 + 0"}]
    assert (rows[0]["thinking"], rows[0]["expected"]) == ("hm", "0")
    assert sum(row["right"] for row in rows[:48]) / 48 == pytest.approx(found.results[0].accuracy.value)
    assert json.loads(json.dumps(found.as_json()))["differences"]["other"]["value"] == told.value


def test_a_stopped_run_goes_on_where_it_was(sums: Path, variant: Variant) -> None:
    settings = Settings(samples=2, temperature=0.6, at_once=4)
    task = open_task(sums)
    whole = run(task, FakeModel(0.5), [variant], settings)
    stopped = FakeModel(0.5, stop_after=10)
    with pytest.raises(KeyboardInterrupt):
        run(task, stopped, [variant], settings)
    assert stopped.cancelled > 0
    (cache,) = (paths.data() / "evaluations").iterdir()
    there = len(cache.read_text().splitlines())
    assert 0 < there <= 10
    # A line that was cut off, as by a full disk or a kill.
    cache.write_text(cache.read_text() + '{"question": 11, "num')
    rest = FakeModel(0.5)
    again = run(task, rest, [variant], settings, resume=True)
    assert len(rest.asked) == 24 - there
    assert again.results[0].shares == whole.results[0].shares
    assert again.results[0].maj_at == whole.results[0].maj_at
    assert list((paths.data() / "evaluations").iterdir()) == []


def test_what_was_kept_of_other_settings_or_files_is_not_taken(sums: Path, variant: Variant) -> None:
    settings = Settings(samples=2, temperature=0.6, at_once=2)
    task = open_task(sums)

    def stop() -> None:
        with pytest.raises(KeyboardInterrupt):
            run(task, FakeModel(stop_after=6), [variant], settings)

    stop()
    hot = FakeModel()
    run(task, hot, [variant], Settings(samples=2, temperature=0.9), resume=True)
    assert len(hot.asked) == 24
    (variant.folder / "model.safetensors").write_text("other weights")
    changed = FakeModel()
    run(task, changed, [variant], settings, resume=True)
    assert len(changed.asked) == 24
    # Without --resume, all are asked again.
    stop()
    anew = FakeModel()
    run(task, anew, [variant], settings)
    assert len(anew.asked) == 24


def eval_(*words: object) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, words)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("m",), "There is nothing to measure: give --task"),
        (("m", "--task", "x", "--against", "y"), "--against is for measuring what a model has lost"),
        (("m", "--task", "x", "--window", "9"), "--window is for measuring what a model has lost"),
        (("m", "--against", "y", "--text", "t", "--samples", "2"), "--samples goes with --task"),
        (("m", "--against", "y", "--text", "t", "--set", "a=1"), "--set goes with --task"),
        (("m", "--against", "y"), "--text FILE is missing"),
        (("m", "n", "--against", "y", "--text", "t"), "--against measures one model; there are 2: m, n"),
        (("m", "--task", "gym:x", "-n", "4", "--temperature", "0"), "at temperature 0 are the same one"),
        (("m", "--task", "gym:x", "--k", "9"), "expected numbers from 1 to the 1 samples"),
        (("m", "--task", "gym:x", "--k", "a"), "expected whole numbers such as"),
        (("m", "--task", "gym:x", "--precision", "low"), "expected fast or exact"),
        (("m", "--task", "gym:x", "--plot", "x.svg"), "png"),
        (("m", "--task", "nowhere.jsonl"), "There is no file nowhere.jsonl"),
    ],
)
def test_ways_to_measure_are_not_mixed(words: tuple[str, ...], message: str) -> None:
    done = eval_(*words)
    assert isinstance(done.exception, EdgeR1Error)
    assert message in str(done.exception)


def test_models_side_by_side_on_the_command_line(
    tiny_folder: Path, sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    words = (tiny_folder, "--task", sums, "--size", 3, "--max-tokens", 4, "--context", 64, "-n", 2)
    out, kept, plot = tmp_path / "out.json", tmp_path / "kept.jsonl", tmp_path / "plot.png"
    done = eval_(*words, "-o", out, "--keep", kept, "--plot", plot)
    assert done.exit_code == 0, done.output
    assert "accuracy" in done.output
    found = json.loads(out.read_text())
    assert (found["task"], found["questions"], found["results"][0]["name"]) == ("sums.jsonl", 3, "tiny")
    first = [json.loads(line) for line in kept.read_text().splitlines()]
    assert len(first) == 6
    assert plot.read_bytes().startswith(b"\x89PNG")
    # The same again, one at a time: what runs beside an answer does not change it.
    again = eval_(*words, "--keep", kept, "--at-once", 1, "--json")
    assert again.exit_code == 0, again.output
    assert [json.loads(line)["answer"] for line in kept.read_text().splitlines()] == [row["answer"] for row in first]
