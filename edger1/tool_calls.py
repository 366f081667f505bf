"""Tools that a model may call: how they are told to it, and how its calls are read.

What a call looks like is the family's own. mlx-lm reads those of the families that it knows; DeepSeek's (V3, R1, V3.1)
and gpt-oss's (harmony) are read here. A model whose chat template knows no tools, or whose calls nobody reads, has them
described in its system message, as the Hermes models were trained to take them, and its calls are read in that form:
`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. How well it does then is another matter.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edger1.errors import UsageError
from edger1.messages import Message

Tool = dict[str, Any]
Call = dict[str, Any]

_JSON = ("<tool_call>", "</tool_call>")
_DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_DEEPSEEK_CALL = re.compile(r"<｜tool▁call▁begin｜>(.*?)<｜tool▁sep｜>(.*?)<｜tool▁call▁end｜>", re.DOTALL)
_HARMONY = tuple((start, "<|call|>") for start in ("<|channel|>commentary to=", "<|channel|>analysis to=", " to="))
_HARMONY_CALL = re.compile(r"\s*(?:functions\.)?([^\s<]+)[^{]*?<\|message\|>(.*)", re.DOTALL)
_NAME = re.compile(r"[\w.:/-]{1,128}")

_DESCRIPTION = """You can call these functions:

<tools>
{tools}
</tools>

To call one, answer with its name and its arguments, and nothing after that:

<tool_call>
{{"name": "NAME", "arguments": {{"ARGUMENT": "VALUE"}}}}
</tool_call>"""


class MalformedCallError(ValueError):
    """What a model wrote as a call cannot be read as one."""


@dataclass(frozen=True)
class CallFormat:
    """How a model is told of tools, and how it calls them.

    `markers` are (start, end) of a block of calls, an end "" where blocks go on to the end of the answer; `parse` reads
    what is between them, with the tools. `described`: the tools are described in the system message.
    """

    markers: tuple[tuple[str, str], ...]
    parse: Callable[[str, Sequence[Tool]], Any]
    described: bool = False

    def read(self, block: str, tools: Sequence[Tool]) -> list[Call]:
        """Return the calls of a block, its markers included, as {"name", "arguments", "id"}.

        Raises MalformedCallError where it is not what the family writes.
        """
        start, end = next(each for each in self.markers if block.startswith(each[0]))
        try:
            found = self.parse(block.removeprefix(start).removesuffix(end), tools)
        except Exception as error:
            # mlx-lm's parsers fall over bad calls in any way.
            raise MalformedCallError(str(error) or type(error).__name__) from error
        calls = found if isinstance(found, list) else [found]
        if not calls:
            raise MalformedCallError("there is no call in it")
        return [_checked(call) for call in calls]


def _checked(call: Any) -> Call:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not _NAME.fullmatch(call["name"]):
        raise MalformedCallError("it names no function")
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise MalformedCallError(f"the arguments of {call['name']} are no JSON: {error}") from error
    if not isinstance(arguments, dict):
        raise MalformedCallError(f"the arguments of {call['name']} are no object")
    try:
        # Some parsers read values as Python's, which has more kinds of them; and half a character is no text.
        json.dumps(arguments, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise MalformedCallError(f"the arguments of {call['name']} cannot be JSON: {error}") from error
    id_ = call.get("id")
    # Nine letters and digits are what Mistral's templates insist on.
    return {"name": call["name"], "arguments": arguments, "id": id_ if isinstance(id_, str) else uuid.uuid4().hex[:9]}


def call_format(tokenizer: Any) -> CallFormat:
    """Return the format of a model by its tokenizer, mlx-lm's wrapper."""
    template = tokenizer.chat_template
    text = template if isinstance(template, str) else json.dumps(template or "", ensure_ascii=False)
    if "<|channel|>commentary" in text and "functions" in text:
        return CallFormat(_HARMONY, _parse_harmony)
    if _DEEPSEEK[0] in text and "tools" in text:
        return CallFormat((_DEEPSEEK,), _parse_deepseek)
    told = "tools" in text or not isinstance(template, str)
    if tokenizer.has_tool_calling and told:
        return CallFormat(((tokenizer.tool_call_start, tokenizer.tool_call_end),), tokenizer.tool_parser)
    return CallFormat((_JSON,), lambda block, _: json.loads(block), described=True)


def _parse_deepseek(block: str, _: Sequence[Tool]) -> list[Call]:
    calls = []
    for before, after in _DEEPSEEK_CALL.findall(block):
        # V3 and R1: the type of the call, then the name and the arguments in a code block; V3.1: name and arguments.
        name, fence, arguments = after.partition("```json")
        calls.append(
            {"name": name.strip(), "arguments": arguments.strip().removesuffix("```")}
            if fence
            else {"name": before.strip(), "arguments": after}
        )
    if len(calls) != block.count("<｜tool▁call▁begin｜>"):
        raise MalformedCallError("one of its calls is not whole")
    return calls


def _parse_harmony(block: str, _: Sequence[Tool]) -> Call:
    found = _HARMONY_CALL.fullmatch(block)
    if found is None:
        raise MalformedCallError("it has no <|message|>")
    return {"name": found[1], "arguments": found[2].strip() or "{}"}


def check_tools(tools: Any) -> list[Tool]:
    """Return tools as a list. Raises UsageError unless each is a function's schema as OpenAI has it."""
    if not isinstance(tools, list | tuple):
        raise UsageError(f"tools is {tools!r:.200}; expected a list of function schemas.")
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) else None
        known = function if isinstance(function, dict) else {}
        name = known.get("name")
        if not isinstance(name, str) or not name or not isinstance(known.get("parameters", {}), dict):
            raise UsageError(
                f'{tool!r:.200} is no tool; expected {{"type": "function", "function": {{"name": "add", "description": '
                f'"Add two numbers.", "parameters": {{"type": "object", "properties": ...}}}}}}.'
            )
        try:
            json.dumps(tool, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"The schema of the tool {name!r:.200} is no JSON: {error}.") from None
    return list(tools)


def check_calls(calls: Any, message: int) -> list[dict[str, Any]]:
    """Return the "tool_calls" of message number `message` with arguments as objects. Raises UsageError."""
    if not isinstance(calls, list):
        raise UsageError(f"tool_calls of message {message} is {calls!r:.200}; expected a list.")
    checked = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        try:
            read = _checked(function)
        except MalformedCallError as error:
            raise UsageError(
                f"{call!r:.200} among the tool_calls of message {message} is no call ({error}); expected "
                f'{{"id": ..., "type": "function", "function": {{"name": ..., "arguments": {{...}}}}}}.'
            ) from error
        named = {"name": read["name"], "arguments": read["arguments"]}
        checked.append({**call, "type": "function", "function": named})
    return checked


def as_text(messages: Sequence[Message]) -> list[Message]:
    """Return messages with the arguments of calls as JSON text."""
    return [
        {**m, "tool_calls": [{**c, "function": _with_text(c["function"])} for c in m["tool_calls"]]}
        if m.get("tool_calls")
        else m
        for m in messages
    ]


def _with_text(function: Call) -> Call:
    return {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}


def described(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """Return messages for a template that knows neither tools nor calls: tools told in the system message, calls as the
    model was told to write them, results as what the user says."""
    said: list[Message] = []
    for message in messages:
        if message["role"] == "tool":
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if said and said[-1].get("results"):
                said[-1]["content"] += f"\n{result}"
            else:
                said.append({"role": "user", "content": result, "results": True})
        elif message.get("tool_calls"):
            blocks = [f"{_JSON[0]}\n{_json(c['function'])}\n{_JSON[1]}" for c in message["tool_calls"]]
            content = "\n".join(part for part in (message["content"].rstrip("\n"), *blocks) if part)
            thought: dict[str, Any] = {key: message[key] for key in ("reasoning_content", "thinking") if key in message}
            said.append({"role": "assistant", "content": content, **thought})
        else:
            said.append(dict(message))
    if tools:
        text = _DESCRIPTION.format(tools="\n".join(map(_json, tools)))
        if said and said[0]["role"] == "system":
            said[0]["content"] = f"{said[0]['content']}\n\n{text}".lstrip("\n")
        else:
            said.insert(0, {"role": "system", "content": text})
    return [{key: value for key, value in message.items() if key != "results"} for message in said]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
