"""What a conversation is rendered to, above all where its last answer is to be continued."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from chat_templates import FAMILIES, tokenizer

from edger1.cache import Entry, KVStore
from edger1.errors import UsageError
from edger1.messages import Generate, Message
from edger1.prompt import Rendered, check_messages, render
from edger1.thinking import HARMONY, Markers
from edger1.tool_calls import call_format

THINK = Markers("<think>", "</think>")
MARKERS = {"qwen3": THINK, "r1": THINK, "switched": THINK, "harmony": HARMONY}
ASKED: list[Message] = [{"role": "user", "content": "Hi"}]


def model_of(family: str, *entries: str) -> Any:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    template, end = FAMILIES[family]
    wrapped = TokenizerWrapper(tokenizer(template, end, thinks=family in MARKERS))
    kv = KVStore(1000, lambda tokens: tokens)
    for text in entries:
        kv.put(Entry([1], text, []))
    return SimpleNamespace(
        name="m",
        tokenizer=wrapped,
        has_chat_template=True,
        markers=MARKERS.get(family),
        calls=call_format(wrapped),
        kv=kv,
    )


def continued(family: str, content: str, thought: str = "", *entries: str, **options: Any) -> Rendered:
    last = {"role": "assistant", "content": content} | ({"thought": thought} if thought else {})
    request = Generate("g", "m", messages=[*ASKED, last], continue_last=True, **options)
    return render(model_of(family, *entries), request)


def begin(family: str, **options: Any) -> str:
    return render(model_of(family), Generate("g", "m", messages=ASKED, **options)).text


# What stands between the beginning of an answer, as it was asked for, and its text.
ANSWERS = {
    "chatml": "",
    "qwen2.5": "",
    "qwen3": "",
    "r1": "</think>\n\n",
    "switched": "",
    "llama3": "",
    "mistral": " ",
    "harmony": "<|channel|>final<|message|>",
    "endless": " ",
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("content", ["Hel", "Hello \n", " - a"])
def test_an_answer_goes_on_to_the_letter(family: str, content: str) -> None:
    found = continued(family, content)
    lead = "" if content[0] == " " and ANSWERS[family] == " " else ANSWERS[family]
    assert found == Rendered(begin(family) + lead + content, in_thought=False, said=True)


# The same for a thought, and what stands between it and the answer.
THOUGHTS = {
    "qwen3": ("<think>\n", "</think>\n\n"),
    "r1": ("", "</think>\n\n"),
    "harmony": ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
}


@pytest.mark.parametrize("family", THOUGHTS)
def test_a_thought_goes_on_and_an_answer_behind_its_thought(family: str) -> None:
    opening, closing = THOUGHTS[family]
    half = begin(family) + opening + "Let me s"
    assert continued(family, "", "Let me s") == Rendered(half, in_thought=True, said=True)
    assert continued(family, "Yes", "Let me s") == Rendered(half + closing + "Yes", in_thought=False, said=True)


def test_what_the_model_wrote_between_is_kept_where_it_is_known() -> None:
    own = begin("qwen3") + "<think>\n\n\nHm.\n</think>\nYes, a"
    # The end of the entry was not fed, or is not what was said.
    for entry in (own, own[:-3], begin("qwen3") + "<think>\n\n\nH"):
        text = continued("qwen3", "Yes, and", "Hm.\n", entry).text
        assert text.startswith(entry)
        assert text.removeprefix(begin("qwen3")).replace("\n", "") == "<think>Hm.</think>Yes, and"
    assert continued("qwen3", "No", "Hm.\n", own).text == begin("qwen3") + "<think>\nHm.\n</think>\n\nNo"
    # A template's blank, and one that the answer begins with.
    spaced = begin("mistral") + "  Yes"
    assert continued("mistral", "Yes", "", spaced).text == spaced
    assert continued("mistral", " Yes", "", spaced).text == spaced


def test_an_answer_of_which_nothing_was_said_is_asked_for() -> None:
    assert continued("chatml", "") == Rendered(begin("chatml"))
    assert continued("r1", "") == Rendered(begin("r1"), in_thought=True)


def test_a_thought_goes_on_where_the_template_is_told_not_to_think() -> None:
    assert continued("qwen3", "", "Hm", think="off").text == begin("qwen3") + "<think>\nHm"
    # The template closes the thought itself, before the answer.
    shut = continued("qwen3", "Yes", "Hm", think="off")
    assert shut.text == begin("qwen3", think="off") + "Yes"


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        (ASKED, "of the role user"),
        ([{"role": "assistant", "content": "Hi"}], "no message before it"),
        ([*ASKED, {"role": "assistant", "tool_calls": [{"function": {"name": "add"}}]}], "Add their results"),
        ([*ASKED, {"role": "assistant", "content": "", "thought": "Hm"}], "Ask again instead"),
        ([*ASKED, {"role": "assistant", "content": "x", "thought": 3}], "the thought of message 1 is 3"),
    ],
)
def test_what_cannot_be_continued_is_refused(messages: list[Message], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        render(model_of("chatml"), Generate("g", "m", messages=messages, continue_last=True))


def test_a_template_that_shuts_every_thought_continues_none() -> None:
    with pytest.raises(UsageError, match="allows no thought"):
        continued("switched", "", "Hm")


def test_a_thought_of_another_model_is_left_out() -> None:
    assert continued("chatml", "Yes", "Hm").text == begin("chatml") + "Yes"


ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": "é"}'}}
CALLED: list[Message] = [
    *ASKED,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": "3"},
]


def test_calls_and_results_go_to_a_template_that_knows_them() -> None:
    model = model_of("qwen2.5")
    model.tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + FAMILIES["qwen2.5"][0]
    model.calls = SimpleNamespace(described=False)
    text = render(model, Generate("g", "m", messages=CALLED, tools=[ADD])).text
    assert text.startswith('[{"type": "function", "function": {"name": "add"')
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "é"}}\n</tool_call>' in text
    assert "<tool_response>\n3\n</tool_response>" in text


def test_a_template_that_wants_arguments_as_text_gets_them() -> None:
    model = model_of("chatml")
    model.calls = SimpleNamespace(described=False)
    model.tokenizer.chat_template = (
        "{% for m in messages %}{% for c in m['tool_calls'] %}{{ c['function']['name'] + ':' }}"
        "{{ c['function']['arguments'] + '|' }}{% endfor %}{{ m['content'] }}{% endfor %}"
    )
    assert render(model, Generate("g", "m", messages=CALLED)).text == 'Hiadd:{"a": 1, "b": "é"}|3'


def test_a_template_that_knows_no_tools_has_them_described() -> None:
    model = model_of("chatml")
    assert model.calls.described
    text = render(model, Generate("g", "m", messages=[{"role": "system", "content": "Be."}, *CALLED], tools=[ADD])).text
    system, user, assistant, results, _ = text.split("<|im_start|>")[1:]
    assert system.startswith("system\nBe.\n\n")
    assert '"name": "add"' in system
    assert user == "user\nHi<|im_end|>\n"
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "é"}}\n</tool_call>' in assistant
    assert results == "user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
    # Without tools the calls that were made stay readable.
    assert "<tools>" not in render(model, Generate("g", "m", messages=CALLED)).text


def test_results_of_several_calls_are_one_turn() -> None:
    two: list[Message] = [*CALLED, {"role": "tool", "content": "4"}]
    text = render(model_of("chatml"), Generate("g", "m", messages=two)).text
    assert text.count("<|im_start|>user") == 2
    assert "3\n</tool_response>\n<tool_response>\n4\n" in text


@pytest.mark.parametrize(
    ("call", "why"),
    [
        ("x", "it names no function"),
        ({"function": {"name": "f", "arguments": "{"}}, "no JSON"),
        ({"function": {"name": "f", "arguments": [1]}}, "no object"),
    ],
)
def test_calls_that_are_none_are_refused(call: Any, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        check_messages([*ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}])
