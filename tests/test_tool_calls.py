"""Calls of tools, as each family writes them, out of text that comes in any pieces."""

from __future__ import annotations

import importlib
import json
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edger1.errors import UsageError
from edger1.thinking import HARMONY, Markers, Splitter
from edger1.tool_calls import CallFormat, MalformedCallError, call_format, check_calls, check_tools

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            },
        },
    }
]
WANTED = {"city": "Rome", "days": 2}
_ARG = "<|open|>argument key={} type={}<|sep|>{}<|close|>argument<|sep|>"

# mlx-lm's parser -> a call in its format.
BLOCKS = {
    "json_tools": '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>',
    "qwen3_coder": "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n2\n"
    "</parameter>\n</function>\n</tool_call>",
    "glm47": "<tool_call>weather<arg_key>city</arg_key><arg_value>Rome</arg_value><arg_key>days</arg_key>"
    "<arg_value>2</arg_value></tool_call>",
    "laguna": "<tool_call>weather<arg_key>city</arg_key><arg_value>Rome</arg_value><arg_key>days</arg_key>"
    "<arg_value>2</arg_value></tool_call>",
    "longcat": "<longcat_tool_call>weather<longcat_arg_key>city</longcat_arg_key><longcat_arg_value>Rome"
    "</longcat_arg_value><longcat_arg_key>days</longcat_arg_key><longcat_arg_value>2</longcat_arg_value>"
    "</longcat_tool_call>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>"
    '{"city": "Rome", "days": 2}<|tool_call_end|><|tool_calls_section_end|>',
    "mistral": '[TOOL_CALLS]weather[ARGS]{"city": "Rome", "days": 2}',
    "pythonic": "<|tool_call_start|>[weather(city='Rome', days=2)]<|tool_call_end|>",
    "function_gemma": "<start_function_call>call:weather{city:<escape>Rome<escape>,days:2}<end_function_call>",
    "gemma4": '<|tool_call>call:weather{city:<|"|>Rome<|"|>,days:2}<tool_call|>',
    "minimax_m2": '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Rome</parameter>\n'
    '<parameter name="days">2</parameter>\n</invoke>\n</minimax:tool_call>',
    "minicpm5": '<function name="weather"><param name="city">Rome</param><param name="days">2</param></function>',
    "muse_spark": '<atem:function_calls><atem:invoke name="weather"><atem:parameter name="city">Rome</atem:parameter>'
    '<atem:parameter name="days">2</atem:parameter></atem:invoke></atem:function_calls>',
    "kimi_k3": '<|open|>tools<|sep|><|open|>call tool="weather" index="1"<|sep|>'
    '<|open|>argument key="city" type="string"<|sep|>Rome<|close|>argument<|sep|>'
    '<|open|>argument key="days" type="number"<|sep|>2<|close|>argument<|sep|>'
    "<|close|>call<|sep|><|close|>tools<|sep|>",
}
# What DeepSeek's and gpt-oss's templates hold, as far as it tells how they call.
DEEPSEEK = "{% if tools %}{% endif %}<｜tool▁calls▁begin｜>"
GPT_OSS = "functions <|channel|>commentary {% if tools %}{% endif %}"
V3 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    '{"city": "Rome", "days": 2}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)
V31 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
    '{"city": "Rome", "days": 2}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)


def format_of(parser: str) -> CallFormat:
    module = importlib.import_module(f"mlx_lm.tool_parsers.{parser}")
    return call_format(
        SimpleNamespace(
            chat_template="{% if tools %}",
            has_tool_calling=True,
            tool_call_start=module.tool_call_start,
            tool_call_end=module.tool_call_end,
            tool_parser=module.parse_tool_call,
        )
    )


def plain(template: Any) -> CallFormat:
    return call_format(SimpleNamespace(chat_template=template, has_tool_calling=False))


FORMATS = [(format_of(parser), block) for parser, block in BLOCKS.items()]
FORMATS += [(plain(DEEPSEEK), V3), (plain(DEEPSEEK), V31), (plain("no word of them"), BLOCKS["json_tools"])]
NAMES = [*BLOCKS, "deepseek-v3", "deepseek-v3.1", "described"]


def split(
    calls: CallFormat, text: str, cuts: list[int], *, whole: bool = True, markers: Markers | None = None, **more: Any
) -> list[tuple[str, str]]:
    splitter = Splitter(markers, (), calls=calls.markers, **more)
    edges = [0, *sorted({cut % (len(text) + 1) for cut in cuts}), len(text)]
    found = [each for a, b in pairwise(edges) for each in splitter.feed(text[a:b])] + splitter.finish(whole=whole)
    joined: list[tuple[str, str]] = []
    for kind, piece in found:
        if joined and joined[-1][0] == kind and kind in ("answer", "thought"):
            joined[-1] = (kind, joined[-1][1] + piece)
        else:
            joined.append((kind, piece))
    return joined


CUTS = st.lists(st.integers(0, 400), max_size=9)


def test_every_parser_of_mlx_lm_is_tried() -> None:
    import pkgutil

    import mlx_lm.tool_parsers as parsers

    assert {module.name for module in pkgutil.iter_modules(parsers.__path__)} == BLOCKS.keys()


@pytest.mark.parametrize(("calls", "block"), FORMATS, ids=NAMES)
@given(cuts=CUTS)
def test_a_call_between_texts(calls: CallFormat, block: str, cuts: list[int]) -> None:
    open_ended = not calls.markers[0][1]
    text = "I look < it up.\n" + block + ("" if open_ended else "\nDone <")
    found = split(calls, text, cuts)
    rest = [] if open_ended else [("answer", "Done <")]
    assert found == [("answer", "I look < it up.\n"), ("call", block), *rest]
    (call,) = calls.read(found[1][1], TOOLS)
    assert (call["name"], call["arguments"]) == ("weather", WANTED)
    assert call["id"]


@pytest.mark.parametrize(("calls", "block"), FORMATS, ids=NAMES)
def test_several_calls_are_each_given(calls: CallFormat, block: str) -> None:
    if not calls.markers[0][1]:
        block = block.replace("2}", '2}[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}')
        (one,) = [text for kind, text in split(calls, block, []) if kind == "call"]
        assert [call["arguments"]["city"] for call in calls.read(one, TOOLS)] == ["Rome", "Oslo"]
        return
    found = split(calls, block + "\n" + block.replace("Rome", "Oslo"), [])
    assert [kind for kind, _ in found] == ["call", "call"]
    cities = [call["arguments"]["city"] for _, text in found for call in calls.read(text, TOOLS)]
    assert cities == ["Rome", "Oslo"]


@pytest.mark.parametrize(("calls", "block"), FORMATS, ids=NAMES)
def test_a_call_that_is_cut_off_is_text(calls: CallFormat, block: str) -> None:
    text = block[: len(block) - 8]
    assert split(calls, "So: " + text, [], whole=False) == [("answer", "So: "), ("cut", text)]


@pytest.mark.parametrize(("calls", "block"), FORMATS, ids=NAMES)
def test_half_a_marker_is_text(calls: CallFormat, block: str) -> None:
    start = calls.markers[0][0]
    assert split(calls, "So: " + start[:-1], []) == [("answer", "So: " + start[:-1])]


@pytest.mark.parametrize(("calls", "block"), FORMATS, ids=NAMES)
def test_what_is_no_call_is_malformed(calls: CallFormat, block: str) -> None:
    start, end = calls.markers[0]
    with pytest.raises(MalformedCallError):
        calls.read(start + "{]" + end, TOOLS)


def test_several_calls_in_one_block() -> None:
    one, two = V31.removesuffix("<｜tool▁calls▁end｜>"), V31.removeprefix("<｜tool▁calls▁begin｜>")
    calls = plain(DEEPSEEK).read(one + two.replace("Rome", "Oslo"), TOOLS)
    assert [call["arguments"]["city"] for call in calls] == ["Rome", "Oslo"]
    with pytest.raises(MalformedCallError, match="not whole"):
        plain(DEEPSEEK).read(one + two.replace("<｜tool▁call▁end｜>", ""), TOOLS)


@pytest.mark.parametrize(
    "written",
    [
        '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Rome", "days": 2}',
        ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Rome", "days": 2}',
        '<|channel|>analysis to=functions.weather code<|message|>{"city": "Rome", "days": 2}',
    ],
)
@pytest.mark.parametrize("ended", ["", "<|call|>"])
@given(cuts=CUTS)
def test_harmonys_channels(written: str, ended: str, cuts: list[int]) -> None:
    calls = plain(GPT_OSS)
    text = (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>I look."
        "<|end|><|start|>assistant" + written + ended
    )
    found = split(calls, text, cuts, markers=HARMONY)
    assert found[:2] == [("thought", "Hm."), ("answer", "I look.")]
    assert [kind for kind, _ in found[2:]] == ["call"]
    (call,) = calls.read(found[2][1], TOOLS)
    assert (call["name"], call["arguments"]) == ("weather", WANTED)


@given(cuts=CUTS)
def test_harmonys_answer(cuts: list[int]) -> None:
    text = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final <|constrain|>x<|message|>Yes."
    assert split(plain(GPT_OSS), text, cuts, markers=HARMONY) == [("thought", "Hm."), ("answer", "Yes.")]
    # One that is continued begins within its channel.
    assert split(plain(GPT_OSS), "\n and", cuts, markers=HARMONY, said=True) == [("answer", "\n and")]
    half = split(plain(GPT_OSS), "\nso<|end|>", cuts, markers=HARMONY, in_thought=True, said=True)
    assert half == [("thought", "\nso")]


def test_a_model_that_keeps_to_no_channel_is_heard() -> None:
    assert split(plain(GPT_OSS), "Hello there", [], markers=HARMONY) == [("answer", "Hello there")]
    assert split(plain(GPT_OSS), "<|channel|>fin", [], markers=HARMONY) == []


def test_calls_in_a_thought_are_thought() -> None:
    text = "<think>" + BLOCKS["json_tools"] + "</think>" + BLOCKS["json_tools"]
    found = split(format_of("json_tools"), text, [], markers=Markers("<think>", "</think>"))
    assert found == [("thought", BLOCKS["json_tools"]), ("call", BLOCKS["json_tools"])]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"arguments": {}}', "names no function"),
        ("[1]", "names no function"),
        ("[]", "no call"),
        ('{"name": "f", "arguments": "{"}', "no JSON"),
        ('{"name": "f", "arguments": [1]}', "no object"),
    ],
)
def test_why_a_call_is_malformed(content: str, why: str) -> None:
    with pytest.raises(MalformedCallError, match=why):
        format_of("json_tools").read(f"<tool_call>{content}</tool_call>", TOOLS)


def test_arguments_that_are_no_json_are_malformed() -> None:
    with pytest.raises(MalformedCallError, match="cannot be JSON"):
        format_of("pythonic").read("<|tool_call_start|>[f(x={1, 2})]<|tool_call_end|>", TOOLS)


@pytest.mark.parametrize("value", ["NaN", "1e999", '"\\ud800"'], ids=["no number", "infinity", "half a character"])
def test_values_that_json_or_utf8_has_not_are_malformed(value: str) -> None:
    content = f'{{"name": "f", "arguments": {{"x": {value}}}}}'
    with pytest.raises(MalformedCallError, match="cannot be JSON"):
        format_of("json_tools").read(f"<tool_call>{content}</tool_call>", TOOLS)


def test_arguments_nested_beyond_all_measure_are_malformed() -> None:
    content = json.dumps({"name": "f", "arguments": "[" * 100_000})
    with pytest.raises(MalformedCallError, match="no JSON"):
        format_of("json_tools").read(f"<tool_call>{content}</tool_call>", TOOLS)
    with pytest.raises(UsageError, match="among the tool_calls of message 3"):
        check_calls([{"function": {"name": "f", "arguments": "[" * 100_000}}], 3)


def test_arguments_may_be_text_or_missing_or_called_parameters() -> None:
    read = format_of("json_tools").read
    for content, arguments in (
        ({"name": "f", "arguments": '{"a": 1}'}, {"a": 1}),
        ({"name": "f", "parameters": {"a": 1}}, {"a": 1}),
        ({"name": "f"}, {}),
    ):
        (call,) = read(f"<tool_call>{json.dumps(content)}</tool_call>", TOOLS)
        assert call["arguments"] == arguments


@pytest.mark.parametrize("tools", ["weather", [1], [{"name": "f"}], [{"function": {"name": "f", "parameters": 1}}]])
def test_tools_that_are_none_are_refused(tools: Any) -> None:
    with pytest.raises(UsageError, match="expected"):
        check_tools(tools)
