"""Thoughts of earlier turns are left out of the prompt; those that led to calls stay where the family has them."""

from __future__ import annotations

from typing import Any

import pytest
from chat_templates import FAMILIES
from chat_templates import tokenizer as made
from test_prompt import begin, model_of

from edger1 import thinking_families
from edger1.messages import Generate, Message
from edger1.prompt import render
from edger1.thinking import HARMONY, SOLUTION, Markers, split_thought
from edger1.tool_calls import call_format

CONTENTS = [
    "<think>Hm.</think>Yes",
    "<think>\nHm.\n</think>\n\nYes",
    "<|begin_of_thought|>\n\nHm.\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nYes\n\n<|end_of_solution|>",
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes",
]


def rendered(family: str, *messages: Message) -> str:
    return render(model_of(family), Generate("g", "m", messages=list(messages))).text


def asked(content: str) -> Message:
    return {"role": "user", "content": content}


def answered(content: str, **more: Any) -> Message:
    return {"role": "assistant", "content": content, **more}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("content", CONTENTS)
def test_a_thought_in_an_earlier_content_is_left_out(family: str, content: str) -> None:
    plain = rendered(family, asked("Hi"), answered("Yes"), asked("So?"))
    assert rendered(family, asked("Hi"), answered(content), asked("So?")) == plain
    assert "Yes" in plain


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", ["thought", "reasoning_content", "reasoning", "thinking"])
def test_a_thought_beside_an_earlier_content_is_left_out(family: str, key: str) -> None:
    plain = rendered(family, asked("Hi"), answered("Yes"), asked("So?"))
    assert rendered(family, asked("Hi"), answered("Yes", **{key: "Hm."}), asked("So?")) == plain


CALLED: Message = answered("", tool_calls=[{"id": "1", "function": {"name": "add", "arguments": {"a": 1}}}])
RESULT: Message = {"role": "tool", "tool_call_id": "1", "content": "3"}
# As gpt-oss has it: a thought stays where calls follow it, until an answer has been given.
WITH_CALLS = (
    "{% for m in messages %}{% if m.get('tool_calls') %}"
    "{% if m.content and m.thinking %}{{ raise_exception('Not both.') }}{% endif %}"
    "{% if m.content or m.thinking %}{{ '<|channel|>analysis<|message|>' + (m.content or m.thinking) + '<|end|>' }}"
    "{% endif %}<|channel|>commentary to=functions.add<|call|>"
    "{% else %}{{ '[' + m.role + ']' + m.content }}{% endif %}{% endfor %}"
)


def test_a_thought_that_led_to_a_call_stays_until_the_next_question() -> None:
    thinks = {**CALLED, "thought": "Add them.\n"}
    qwen = rendered("qwen3", asked("1+2?"), thinks, RESULT)
    assert "<think>\nAdd them.\n</think>" in qwen
    assert "Add them" not in rendered("qwen3", asked("1+2?"), thinks, RESULT, answered("3"), asked("And?"))
    assert rendered("r1", asked("1+2?"), thinks) == rendered("r1", asked("1+2?"), CALLED)

    model = model_of("harmony")
    model.tokenizer.chat_template = WITH_CALLS
    model.calls = call_format(model.tokenizer)
    for content, said in (("", "Add them."), ("I will.", "Add them.\n\nI will.")):
        request = Generate("g", "m", messages=[asked("1+2?"), {**thinks, "content": content}, RESULT])
        assert f"<|message|>{said}" in render(model, request).text


@pytest.mark.parametrize("content", ["a </think> b", "Use <think> tags.", "x<think>y</think>"])
def test_words_about_markers_are_no_thought(content: str) -> None:
    assert split_thought(content, None) == ("", content)


def test_a_thought_that_was_never_closed_or_never_opened() -> None:
    own = Markers("<think>", "</think>")
    assert split_thought("<think>so I", own) == ("so I", "")
    assert split_thought("so I\n</think>\n\nYes", own) == ("so I", "Yes")


def test_a_template_is_told_by_its_own_name_for_thinking() -> None:
    assert begin("switched", think="on").endswith("<think>")
    assert begin("switched", think="off").endswith("</think>")
    assert begin("qwen3", think_budget=0) == begin("qwen3", think="off")
    assert begin("qwen3", think_at_least=5) == begin("qwen3") + "<think>\n"
    assert begin("r1", think_at_least=5) == begin("r1")
    assert begin("harmony", think_at_least=5) == begin("harmony") + HARMONY.start


GLM = (
    "[gMASK]{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>\n' + m.content }}{% else %}"
    "{{ '<|assistant|>\n<think>' + m.reasoning_content + '</think>\n' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{{ '\n<think></think>' if enable_thinking is defined and not enable_thinking }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (FAMILIES["qwen3"][0], Markers("<think>", "</think>")),
        (FAMILIES["r1"][0], Markers("<think>", "</think>")),
        (FAMILIES["switched"][0], Markers("<think>", "</think>", blank="", gap="")),
        (GLM, Markers("<think>", "</think>", blank="", gap="\n")),
        (FAMILIES["harmony"][0], HARMONY),
        ("<|begin_of_thought|>{{ messages[0].content }}", SOLUTION),
        ("{{ messages[0].content }}</thought>.", Markers("<thought>", "</thought>")),
        (FAMILIES["llama3"][0], None),
    ],
    ids=["qwen3", "r1", "deepseek-v3.1", "glm", "harmony", "sky-t1", "exaone", "llama3"],
)
def test_markers_and_their_blanks_are_found(template: str, expected: Markers | None) -> None:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    thinks = expected is not None and expected.start == "<think>"
    wrapped = TokenizerWrapper(made(template, thinks=thinks))
    assert thinking_families.found("model", wrapped) == expected


def test_names_and_registries_tell_of_markers_that_are_plain_text() -> None:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    plain = TokenizerWrapper(made(FAMILIES["chatml"][0], thinks=False))
    assert thinking_families.found("Bespoke-Stratos-7B", plain) == SOLUTION
    assert thinking_families.found("sky-t1-32b-preview", plain) == SOLUTION
    assert thinking_families.named(HARMONY.start, HARMONY.end, plain) == HARMONY
    assert thinking_families.named(SOLUTION.start, SOLUTION.end, plain) == SOLUTION
    assert thinking_families.named("<t>", "</t>", plain) == Markers("<t>", "</t>")
