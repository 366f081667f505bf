"""Tools, continued answers and live figures through the engine, on tiny models with words put in their mouth."""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import write_mixture, write_tiny_model

import edger1
from edger1 import generate, planning
from edger1.messages import Done, Event, Progress, Running, Text, ToolCall, decode, encode
from edger1.sampling import Sampler

ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
ASKED = [{"role": "user", "content": "Hello"}]
Say = Callable[[str], None]


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Iterator[edger1.Model]:
    with edger1.load(tiny_folder, precision="exact", context=2000) as loaded:
        yield loaded


@pytest.fixture
def say(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Say:
    """Have the model say a text, a token a byte, and end its turn."""
    import mlx.core as mx
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))

    def script(text: str) -> None:
        ids = iter([*tokenizer.encode(text + "<|im_end|>").ids, *[0] * 8])
        monkeypatch.setattr(Sampler, "__call__", lambda *_: mx.array([next(ids)], mx.uint32))

    return script


def events_of(model: edger1.Model, **options: Any) -> list[Event]:
    return [e for e in model.stream(ASKED, temperature=0, **options) if not isinstance(e, Progress | Running)]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


def test_a_call_is_an_event_between_texts(model: edger1.Model, say: Say) -> None:
    say(f"Let me see < 2.\n{CALL}\nWell.")
    events = events_of(model, tools=[ADD])
    (call,) = [event for event in events if isinstance(event, ToolCall)]
    assert (call.name, call.arguments) == ("add", {"a": 1})
    assert len(call.call_id) == 9
    assert text_of(events[: events.index(call)]) == "Let me see < 2.\n"
    assert text_of(events[events.index(call) :]) == "Well."
    assert isinstance(events[-1], Done)
    assert (events[-1].finish_reason, events[-1].notes) == ("tools", [])


def test_several_calls_and_their_results(model: edger1.Model, say: Say) -> None:
    say(f"{CALL}\n{CALL.replace('1', '2')}")
    answer = model.generate(ASKED, tools=[ADD], temperature=0)
    assert [call.arguments for call in answer.tool_calls] == [{"a": 1}, {"a": 2}]
    assert (answer.text, answer.finish_reason) == ("", "tools")
    calls = [
        {"id": c.call_id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
        for c in answer.tool_calls
    ]
    results = [{"role": "tool", "tool_call_id": c.call_id, "content": "3"} for c in answer.tool_calls]
    say("Three.")
    further = model.generate([*ASKED, {"role": "assistant", "content": "", "tool_calls": calls}, *results], tools=[ADD])
    assert (further.text, further.finish_reason) == ("Three.", "stop")
    # What was asked is not prefilled again.
    assert further.usage.cached_tokens >= answer.usage.prompt_tokens


def test_a_malformed_call_is_text_with_a_note(model: edger1.Model, say: Say) -> None:
    said = f'So: <tool_call>{{"name": "add", "arg</tool_call> and {CALL}'
    say(said)
    answer = model.generate(ASKED, tools=[ADD], temperature=0)
    assert answer.text == said.removesuffix(CALL)
    assert [call.name for call in answer.tool_calls] == ["add"]
    assert answer.finish_reason == "tools"
    assert len(answer.notes) == 1
    assert "cannot be read" in answer.notes[0]
    say("So: <tool_call>nonsense</tool_call>")
    assert model.generate(ASKED, tools=[ADD], temperature=0).finish_reason == "stop"


def test_a_call_cut_off_by_the_limit_is_text_with_a_note(model: edger1.Model, say: Say) -> None:
    say(CALL + "\n" + CALL)
    answer = model.generate(ASKED, tools=[ADD], temperature=0, max_tokens=len(CALL) + 21)
    assert len(answer.tool_calls) == 1
    assert answer.text == CALL[:20]
    assert answer.finish_reason == "length"
    assert "in the middle of a tool call" in answer.notes[0]


def test_a_call_that_ends_with_the_turn_counts(model: edger1.Model, say: Say) -> None:
    say(CALL.removesuffix("</tool_call>"))
    answer = model.generate(ASKED, tools=[ADD], temperature=0)
    assert [call.arguments for call in answer.tool_calls] == [{"a": 1}]
    assert answer.finish_reason == "tools"


def test_without_tools_nothing_is_a_call(model: edger1.Model, say: Say) -> None:
    say(CALL)
    answer = model.generate(ASKED, temperature=0)
    assert (answer.text, answer.tool_calls, answer.finish_reason) == (CALL, (), "stop")


def test_tools_need_messages(model: edger1.Model) -> None:
    with pytest.raises(edger1.UsageError, match="Give messages"):
        model.generate("Hi", raw=True, tools=[ADD])
    with pytest.raises(edger1.UsageError, match="is no tool"):
        model.generate("Hi", tools=[{"name": "add"}])


def test_the_template_is_given_what_it_knows(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", template="{% if tools %}<tool_call>{% endif %}x{# tool_call.name #}")
    with edger1.load(folder) as knows:
        assert knows.info["tools"] == "template"
        assert knows.generate(ASKED, max_tokens=1, tools=[ADD]).usage.prompt_tokens == len("<tool_call>x")
        assert knows.generate(ASKED, max_tokens=1).usage.prompt_tokens == 1


@pytest.mark.parametrize("cut", [1, 2, 13, 39])
def test_an_answer_goes_on_as_if_it_had_not_been_cut(model: edger1.Model, cut: int) -> None:
    whole = model.generate(ASKED, max_tokens=40, temperature=0)
    first = model.generate(ASKED, max_tokens=cut, temperature=0)
    said = [*ASKED, {"role": "assistant", "content": first.text}]
    rest = model.generate(said, max_tokens=40 - cut, temperature=0, continue_last=True)
    assert first.text + rest.text == whole.text
    assert rest.usage.prompt_tokens == first.usage.prompt_tokens + cut
    # Only what was drawn last has not been through the model.
    assert rest.usage.prefilled_tokens <= 1


def test_an_answer_goes_on_after_another_was_asked_for(tiny_folder: Path, model: edger1.Model) -> None:
    whole = model.generate(ASKED, max_tokens=30, temperature=0).text
    said = [*ASKED, {"role": "assistant", "content": whole[:11]}]
    with edger1.load(tiny_folder, precision="exact") as cold:
        rest = cold.generate(said, max_tokens=19, temperature=0, continue_last=True)
    assert whole[:11] + rest.text == whole


def test_a_thought_goes_on_as_if_it_had_not_been_cut(model: edger1.Model, say: Say) -> None:
    say("<think>\nOne, two.\n</think>\n\nYes, two.")
    first = model.generate(ASKED, max_tokens=6, temperature=0)
    assert (first.thinking, first.text) == ("One,", "")
    said = {"role": "assistant", "content": "", "thought": first.thinking}
    say(" two.\n</think>\n\nYes, two.")
    rest = model.generate([*ASKED, said], temperature=0, continue_last=True)
    assert (rest.thinking, rest.text) == (" two.\n", "Yes, two.")
    assert rest.usage.prefilled_tokens <= 1
    said = {"role": "assistant", "content": "Yes", "thought": "One, two.\n"}
    say(", two.")
    last = model.generate([*ASKED, said], temperature=0, continue_last=True)
    assert last.text == ", two."
    # The blank lines between them are those that the model wrote.
    assert last.usage.prompt_tokens == rest.usage.prompt_tokens + len(" two.\n") + 1 + len("\n\nYes")
    assert last.usage.prefilled_tokens == 1


@pytest.mark.parametrize(("said", "more"), [("a", " b"), ("a ", " b"), ("a", "\n\nb"), ("a\n", "\nb"), ("é", "è")])
def test_no_blank_is_lost_or_doubled_at_the_seam(model: edger1.Model, say: Say, said: str, more: str) -> None:
    say(more)
    answer = model.generate([*ASKED, {"role": "assistant", "content": said}], temperature=0, continue_last=True)
    assert answer.text == more


def test_half_a_character_is_no_text(model: edger1.Model, say: Say) -> None:
    say("ab€")
    answer = model.generate(ASKED, temperature=0, max_tokens=4)
    assert answer.text == "ab"
    say("€ more")
    said = [*ASKED, {"role": "assistant", "content": "ab"}]
    assert model.generate(said, temperature=0, continue_last=True).text == "€ more"


def test_a_tokenizer_of_whole_words_keeps_the_blank_between(tmp_path: Path) -> None:
    from mlx_lm.tokenizer_utils import SPMStreamingDetokenizer

    from edger1.seam import Detokenizer

    class Words:
        words = ("▁Hello", "▁world", "lo", "<0xE2>", "<0x82>", "<0xAC>")

        def __len__(self) -> int:
            return len(self.words)

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [self.words[i] for i in ids]

        @property
        def detokenizer(self) -> SPMStreamingDetokenizer:
            return SPMStreamingDetokenizer(self)

    fresh, seam = Detokenizer(Words()), Detokenizer(Words(), [0])
    assert (fresh.add(0) + fresh.add(1), seam.add(1) + seam.add(2)) == ("Hello world", " worldlo")
    assert "".join(map(seam.add, (3, 4))) + seam.end() == ""
    assert "".join(map(Detokenizer(Words(), [0]).add, (3, 4, 5))) == "€"


def test_what_cannot_be_continued_is_told(model: edger1.Model) -> None:
    with pytest.raises(edger1.UsageError, match="of the role user"):
        model.generate(ASKED, continue_last=True)
    with pytest.raises(edger1.UsageError, match="list of them"):
        model.generate("Hi", continue_last=True)


def test_answers_tell_how_they_come_along(model: edger1.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "RUNNING_EVERY_S", 1e-9)
    events = list(model.stream(ASKED, max_tokens=5, temperature=0))
    running = [event for event in events if isinstance(event, Running)]
    assert running
    assert all(event.layers is None for event in running)
    used = [event.figures.context_used for event in running]
    assert used == sorted(used)
    assert running[0].figures.decode_tokens_per_s is not None
    assert running[0].figures.accounted_memory_bytes < running[0].figures.ceiling_bytes == model.plan.ceiling_bytes
    assert isinstance(events[-1], Done)


def test_they_do_about_twice_a_second(model: edger1.Model) -> None:
    import time

    began = time.perf_counter()
    count = sum(isinstance(e, Running) for e in model.stream(ASKED, max_tokens=400, temperature=0))
    assert count <= (time.perf_counter() - began) / 0.5


def test_answers_decoded_together_tell_as_well(model: edger1.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    monkeypatch.setattr(generate, "RUNNING_EVERY_S", 1e-9)

    async def heard() -> int:
        return sum([isinstance(e, Running) async for e in model.astream(ASKED, max_tokens=20, temperature=0)])

    async def together() -> list[int]:
        return await asyncio.gather(heard(), heard(), heard())

    assert min(asyncio.run(asyncio.wait_for(together(), timeout=120))) > 5


def test_streamed_layers_tell_hits_misses_and_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "RUNNING_EVERY_S", 1e-9)
    with edger1.load(write_mixture(tmp_path), expert_slots=8) as streamed:
        events = list(streamed.stream("Hello", raw=True, max_tokens=9, temperature=0))
    running = [event for event in events if isinstance(event, Running)]
    assert len(running) > 2
    for event in running[1:]:
        assert event.layers is not None
        assert [layer["layer"] for layer in event.layers] == [0, 1]
        for layer in event.layers:
            # A token each, which uses two of a layer's experts.
            assert layer["hits"] + layer["misses"] == 2 == sum(layer["experts"].values())
    assert decode(encode(running[-1])) == running[-1]


def test_the_program_prints_calls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_folder: Path
) -> None:
    from edger1.cli import main

    monkeypatch.setattr("sys.argv", ["edger1", "run", str(tiny_folder), "Hi", "--max-tokens", "1", "--json"])
    with pytest.raises(SystemExit):
        main()
    told = json.loads(capsys.readouterr().out)
    assert (told["tool_calls"], told["notes"]) == ([], [])


def test_a_conversation_leaves_tools_and_continuing_to_generate(model: edger1.Model) -> None:
    for options in ({"tools": [ADD]}, {"continue_last": True}):
        with pytest.raises(edger1.UsageError, match="give generate the messages"):
            model.chat().send("Hi", **options)


@pytest.mark.parametrize("piece", [Progress, Text])
def test_a_stop_takes_effect_within_one_step(tiny_folder: Path, piece: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the prompt a step is a chunk, in the answer a token; nothing is said after it."""
    from edger1.client import ThreadConnection, events, next_id
    from edger1.messages import Cancel, Generate, Load, Loaded

    monkeypatch.setattr(planning, "prefill_step", lambda _: 16)
    connection = ThreadConnection()
    loaded = next(e for e in events(connection, Load(next_id(), str(tiny_folder))) if isinstance(e, Loaded))
    arrived: queue.SimpleQueue[Event] = queue.SimpleQueue()
    stopped = threading.Event()

    def on_event(event: Event) -> None:
        if isinstance(event, piece) and not stopped.is_set():
            stopped.set()
            connection.send(Cancel(next_id(), "g"))
        arrived.put(event)

    asked = [{"role": "user", "content": "x" * 450}, {"role": "assistant", "content": "So"}]
    connection.submit(Generate("g", loaded.model, messages=asked, continue_last=True, max_tokens=20), on_event)
    heard: list[Event] = []
    while not heard or not isinstance(heard[-1], Done):
        heard.append(arrived.get(timeout=60))
    connection.close()
    done = heard[-1]
    assert isinstance(done, Done)
    assert done.finish_reason == "cancelled"
    assert sum(isinstance(event, piece) for event in heard) <= 2
    if piece is Progress:
        assert done.usage.completion_tokens == 0
        assert done.usage.prefilled_tokens <= 2 * 16
    else:
        assert done.usage.completion_tokens <= 2
