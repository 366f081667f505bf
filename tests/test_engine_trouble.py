"""What the engine does when things go wrong or get tight: memory, failures, cancels, dying processes, bad input."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from tiny import write_tiny_model

import edger1
from edger1.client import ChildConnection, ThreadConnection, events, next_id
from edger1.messages import Cancel, CountTokens, Done, Failed, Generate, Load, Loaded, Progress, Text, Unload, encode


@pytest.fixture(scope="module")
def model(tiny_folder: Path):
    with edger1.load(tiny_folder) as loaded:
        yield loaded


def test_answers_that_outgrow_the_kv_budget_together_take_turns_and_say_the_same(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edger1.generate import Generation

    gave_way = []
    give_way = Generation.give_way
    monkeypatch.setattr(Generation, "give_way", lambda self: (gave_way.append(self), give_way(self)))
    with edger1.load(tiny_folder, context=900, precision="exact") as model:
        alone = model.generate("Hello", temperature=0)
        handles = [model.submit("Hello", temperature=0) for _ in range(2)]
        answers = [handle.result(timeout_s=60) for handle in handles]
    assert [answer.text for answer in answers] == [alone.text] * 2
    assert [answer.usage.completion_tokens for answer in answers] == [alone.usage.completion_tokens] * 2
    # The budget of 1,280 tokens holds the first halves of both answers, and not their ends.
    assert len(gave_way) == 1


def test_scoring_and_answering_share_the_kv_budget(tiny_folder: Path) -> None:
    ids = [65] * 400
    with edger1.load(tiny_folder, context=400) as model:
        scores = model.score(ids)
        other = model.submit("Hello", temperature=0)
        assert model.score(ids) == scores
        assert other.result(timeout_s=60).finish_reason == "length"


def test_scores_that_are_cancelled_are_no_scores(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edger1.score import Scoring

    with edger1.load(tiny_folder, context=2000) as model:
        chunk = Scoring._score_chunk

        def close_meanwhile(scoring: Scoring) -> None:
            chunk(scoring)
            model._connection.submit(Unload(next_id(), model._id), lambda event: None)

        monkeypatch.setattr(Scoring, "_score_chunk", close_meanwhile)
        with pytest.raises(edger1.EngineError, match="cancelled"):
            model.score([65] * 1500)


def test_a_request_that_cannot_be_cancelled_properly_ends_and_gives_its_room_back(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edger1.generate import Generation

    with edger1.load(tiny_folder, context=400) as model:
        alone = model.generate("Hello", temperature=0)
        began = threading.Event()
        decode = Generation._decode

        def noted(generation: Generation, **given: bool) -> None:
            decode(generation, **given)
            began.set()

        with monkeypatch.context() as broken:
            broken.setattr(Generation, "_decode", noted)
            broken.setattr(Generation, "finish", lambda _: 1 / 0)
            handle = model.submit("Hello", temperature=0)
            assert began.wait(60)
            handle.cancel()
            with pytest.raises(edger1.EngineError, match="failed inside"):
                handle.result(timeout_s=60)
        # It would wait for ever for the room of that, which was asked for before it.
        assert model.submit("Hello", temperature=0).result(timeout_s=60).text == alone.text
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_a_request_that_fails_midway_gives_its_room_back(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from edger1.generate import Generation

    with edger1.load(tiny_folder, context=400) as model:
        with monkeypatch.context() as broken:
            broken.setattr(Generation, "_publish", lambda *_: 1 / 0)
            with pytest.raises(edger1.EngineError, match="ZeroDivisionError"):
                model.generate("Hello")
        assert model.generate("Hello").usage.completion_tokens > 100


def test_loads_at_the_same_time_share_the_ceiling(tiny_folder: Path) -> None:
    connection = ThreadConnection(edger1.plan(tiny_folder).smallest_ceiling_bytes + 1000)
    ends: queue.SimpleQueue = queue.SimpleQueue()

    def on_event(event: object) -> None:
        if not isinstance(event, Progress):
            ends.put(event)

    connection.submit(Load("a", str(tiny_folder)), on_event)
    connection.submit(Load("b", str(tiny_folder)), on_event)
    first, second = ends.get(timeout=30), ends.get(timeout=30)
    connection.close()
    assert isinstance(first, Loaded)
    assert isinstance(second, Failed)
    assert second.error == "MemoryCeilingError"


def test_a_cancelled_load_lets_the_next_one_begin(tiny_folder: Path) -> None:
    connection = ThreadConnection()
    ends: queue.SimpleQueue = queue.SimpleQueue()

    def on_event(event: object) -> None:
        if isinstance(event, Progress) and event.id == "a":
            connection.send(Cancel("c", "a"))
        elif not isinstance(event, Progress):
            ends.put(event)

    connection.submit(Load("a", str(tiny_folder)), on_event)
    connection.submit(Load("b", str(tiny_folder)), on_event)
    assert isinstance(ends.get(timeout=30), Failed)
    assert isinstance(ends.get(timeout=30), Loaded)
    connection.close()


def test_cancel_in_the_prompt_keeps_what_was_read_of_it(tiny_folder: Path) -> None:
    connection = ThreadConnection()
    loaded = next(e for e in events(connection, Load(next_id(), str(tiny_folder))) if isinstance(e, Loaded))
    messages = [{"role": "user", "content": "x" * 450}]
    arrived: queue.SimpleQueue = queue.SimpleQueue()

    def on_event(event: object) -> None:
        if isinstance(event, Progress):
            connection.send(Cancel(next_id(), "g"))
        arrived.put(event)

    connection.submit(Generate("g", loaded.model, messages=messages, max_tokens=5), on_event)
    while not isinstance(event := arrived.get(timeout=30), Done):
        pass
    assert event.finish_reason == "cancelled"
    again = list(events(connection, Generate(next_id(), loaded.model, messages=messages, max_tokens=2)))[-1]
    connection.close()
    assert isinstance(again, Done)
    assert again.usage.cached_tokens == event.usage.prefilled_tokens > 0


def test_half_a_character_in_the_prompt_is_refused(model: edger1.Model) -> None:
    for prompt in ("a\udcffb", [{"role": "user", "content": "\ud800"}]):
        with pytest.raises(edger1.UsageError, match="half a character"):
            model.generate(prompt)


def test_what_is_no_text_is_not_counted(model: edger1.Model) -> None:
    for text in ("half \ud800", ["a", "b"], None):
        told = list(events(model._connection, CountTokens(next_id(), model._id, text)))  # type: ignore[arg-type]
        assert [getattr(event, "error", None) for event in told] == ["UsageError"]


def test_raw_text_is_encoded_as_a_whole(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "bos")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    bos = {"SpecialToken": {"id": "<think>", "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [bos, sequence],
        "pair": [bos, sequence, sequence],
        "special_tokens": {"<think>": {"id": "<think>", "ids": [258], "tokens": ["<think>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with edger1.load(folder) as model:
        answer = model.generate("Hi", max_tokens=3, temperature=0)
        rendered = f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{answer.text}"
        # Were it a continuation of the cached text, its beginning-of-text token would come in the middle.
        raw = model.generate(rendered, raw=True, max_tokens=1)
        assert raw.usage.prompt_tokens == 1 + 1 + 5 + 2 + 1 + 1 + 1 + 10 + 3
        assert raw.usage.cached_tokens == 0


def test_a_vocabulary_smaller_than_the_tokenizers_is_kept_to(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "small", vocab_size=258)
    with edger1.load(folder) as model:
        # 258 is a special token of the tokenizer that the model has no row for.
        with pytest.raises(edger1.UsageError, match="vocabulary of 258"):
            model.score([1, 258, 2])
        assert model.score(np.array([1, 2, 3])) == model.score([1, 2, 3])
        for wrong in (5, None, "ab", [1, "a"], [1, 2.0], [True, 1], [1]):
            with pytest.raises(edger1.UsageError, match="two whole numbers"):
                model.score(wrong)
        assert model.generate("a", raw=True, top_k=259, temperature=1.0, max_tokens=2).usage.completion_tokens == 2


def test_peak_memory_is_this_processs_own() -> None:
    parent = """
import subprocess, sys
ballast = b"x" * 400_000_000
child = "from edger1.generate import peak_memory_bytes; print(peak_memory_bytes())"
subprocess.run([sys.executable, "-c", child], check=True)
"""
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, timeout=60, check=True)
    assert 10_000_000 < int(done.stdout) < 300_000_000


def test_a_prompt_that_was_cached_has_no_prefill_rate(model: edger1.Model) -> None:
    model.generate("What is new?", max_tokens=2)
    again = model.generate("What is new?", max_tokens=2)
    assert again.usage.prefilled_tokens == 1
    assert again.figures.prefill_tokens_per_s is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": "four"},
        {"hidden_size": -64},
        {"num_hidden_layers": 10**9},
        {"quantization": 5},
        {"rope_scaling": 7},
        {"model_file": "evil.py"},
    ],
    ids=str,
)
def test_a_config_that_no_model_can_be_built_from_is_refused(
    tmp_path: Path, wrong: dict, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny_model(tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | wrong), encoding="utf-8")
    with pytest.raises(edger1.FormatError):
        edger1.load(folder)
    assert "Traceback" not in capfd.readouterr().err


def test_a_child_ends_when_its_input_breaks_off_in_the_middle_of_a_line() -> None:
    process = subprocess.Popen([sys.executable, "-m", "edger1.child"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdin is not None
    process.stdin.write(encode(Load("l", "nowhere")).encode()[:-5])
    process.stdin.close()
    try:
        assert process.wait(30) == 0
    finally:
        process.kill()


def test_a_child_that_dies_in_the_middle_of_a_line_fails_what_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "dies"
    script.write_text('#!/bin/sh\nread line\nprintf \'{"kind": "Sco\'\nkill -9 $$\n', encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    connection = ChildConnection()
    last = list(events(connection, Generate("g", "m", prompt="x")))[-1]
    connection.close()
    assert isinstance(last, Failed)
    assert "killed" in last.message


def test_a_child_takes_no_module_from_the_current_folder(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "queue.py").write_text("raise SystemExit('taken from the current folder')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    connection = ChildConnection()
    last = list(events(connection, Load(next_id(), str(tiny_folder))))[-1]
    connection.close()
    assert isinstance(last, Loaded)


def test_what_fails_on_the_engines_thread_does_not_end_it(capsys: pytest.CaptureFixture[str]) -> None:
    from edger1 import worker

    with pytest.raises(ZeroDivisionError):
        worker.call(lambda: 1 / 0)
    name = worker.call(lambda: threading.current_thread().name)
    assert name == "edger1-engine"


def test_a_chat_keeps_what_was_said_before_it_was_left(model: edger1.Model) -> None:
    chat = model.chat()
    for event in chat.stream("Hello", max_tokens=100, temperature=0):
        if isinstance(event, Progress):
            break
    assert chat.messages == []
    said = ""
    for event in chat.stream("Hello", max_tokens=100, temperature=0):
        if isinstance(event, Text):
            said += event.text
        if len(said) > 4:
            break
    assert [message["content"] for message in chat.messages] == ["Hello", said]
    assert chat.send("And?", max_tokens=2).usage.cached_tokens > len("Hello")
    with pytest.raises(edger1.ContextError):
        chat.send("x" * 1000)
    assert len(chat.messages) == 4


def test_saving_a_chat_fails_without_a_trace(model: edger1.Model, tmp_path: Path) -> None:
    chat = model.chat(system="\ud800")
    target = tmp_path / "chat.json"
    target.write_text("old", encoding="utf-8")
    with pytest.raises(UnicodeEncodeError):
        chat.save(target)
    assert target.read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["chat.json"]
