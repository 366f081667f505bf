"""A conversation -> the text that the model goes on from, through the chat template that came with it.

To continue an answer (`Generate.continue_last`) the conversation before it is rendered with the beginning of an answer,
as it was when the answer was asked for, and what was said stands behind that to the letter: no template sees it, since
templates trim answers, drop thoughts and end the turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edger1 import tool_calls
from edger1.errors import UsageError
from edger1.loader import LiveModel
from edger1.messages import Generate, Message, SaveCache
from edger1.thinking import Markers, begins_in_thought, split_thought
from edger1.thinking_control import wanted

ROLES = ("system", "user", "assistant", "tool", "developer")


@dataclass(frozen=True)
class Rendered:
    """A prompt as text; `raw` where special tokens (such as BOS) are still to be added.

    `in_thought` says that what follows belongs to a thought, `said` that some of the thought or the answer which
    follows is in the prompt already.
    """

    text: str
    raw: bool = False
    in_thought: bool = False
    said: bool = False


def render(model: LiveModel, request: Generate) -> Rendered:
    """Return the prompt of a request.

    Raises UsageError for messages that are none, that the model's template refuses, or that cannot be continued.
    """
    if request.prompt is not None:
        return Rendered(request.prompt, raw=True, in_thought=begins_in_thought(request.prompt, model.markers))
    messages = check_messages(request.messages)
    if not model.has_chat_template:
        raise _without_template(model)
    if request.continue_last:
        return _continued(model, request, messages)
    text = _through_template(model, messages, request.tools, _wanted(request))
    if request.think_at_least and model.markers is not None and not _closed_or_open(text, model.markers):
        # What it writes itself first, as other templates do for it.
        text += model.markers.start + model.markers.blank
    return Rendered(text, in_thought=begins_in_thought(text, model.markers))


def render_beginning(model: LiveModel, request: SaveCache) -> Rendered:
    """Return what prompts begin with whose first messages are those of a request; raises as `render` does."""
    if request.prompt is not None:
        return Rendered(request.prompt, raw=True)
    messages = check_messages(request.messages)
    if not model.has_chat_template:
        raise _without_template(model)
    return Rendered(_through_template(model, messages, request.tools, request.think, answer=False))


def encode(model: LiveModel, rendered: Rendered) -> list[int]:
    """Return the token ids of a rendered prompt, where it goes on from a cached text those that are cached.

    Raises UsageError where it is no text.
    """

    def encoded(part: str) -> list[int]:
        return list(model.tokenizer.encode(part, add_special_tokens=rendered.raw))

    try:
        rendered.text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(rendered.text[error.start]):04X}"
        raise UsageError(f"The prompt is no text: it holds half a character ({half}). Give it as UTF-8.") from None
    # Raw text gets its special tokens at its beginning, so it is encoded as a whole.
    return encoded(rendered.text) if rendered.raw else model.kv.encode(rendered.text, encoded)


def _without_template(model: LiveModel) -> UsageError:
    return UsageError(
        f"{model.name} has no chat template, so it cannot take messages. Give it raw text instead: "
        f'edger1 run {model.name} --raw "..."'
    )


def _wanted(request: Generate) -> str:
    return wanted(request.think, request.think_budget, request.think_at_least)


def _closed_or_open(text: str, markers: Markers) -> bool:
    return text.rstrip().endswith((markers.start, markers.end))


def check_messages(messages: Any) -> list[Message]:
    """Return `messages` with the arguments of tool calls as objects and a text in each.

    Raises UsageError unless it is a non-empty list of {"role": ..., "content": str}; an assistant's message with
    "tool_calls" needs no content.
    """
    if not isinstance(messages, list) or not messages:
        raise UsageError('messages must be a non-empty list such as [{"role": "user", "content": "Hello"}].')
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise UsageError(
                f"message {i} is {message!r:.200}; expected a dict whose role is one of {', '.join(ROLES)}."
            )
        if message.get("tool_calls"):
            calls = tool_calls.check_calls(message["tool_calls"], i)
            message = {**message, "content": message.get("content") or "", "tool_calls": calls}
        for name in ("content", "thought"):
            if not isinstance(message.get(name, "" if name == "thought" else None), str):
                raise UsageError(f"the {name} of message {i} is {message.get(name)!r:.200}; expected a string.")
        checked.append(message)
    return checked


_THOUGHT_KEYS = ("thought", "reasoning_content", "reasoning", "thinking")


def _without_thoughts(messages: Sequence[Message], markers: Markers | None) -> list[Message]:
    """Return messages without the thoughts of earlier turns, as R1's template drops them, for every family.

    Those behind the last question, where tools were called, are left to the template, under the names that templates
    have for them; those that know none drop them too.
    """
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    kept = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            thought, content = split_thought(message["content"], markers)
            thought = next((message[key] for key in _THOUGHT_KEYS if message.get(key)), thought)
            message = {key: value for key, value in message.items() if key not in _THOUGHT_KEYS} | {"content": content}
            if i > last and thought and message.get("tool_calls"):
                if markers is not None and markers.channels and content:
                    # Its template takes a thought or a content beside calls, and has them in the same channel.
                    message["content"], thought = "", f"{thought.rstrip()}\n\n{content}"
                message |= {"reasoning_content": thought, "thinking": thought}
        kept.append(message)
    return kept


def _switch(model: LiveModel, think: str) -> dict[str, Any]:
    """Return what turns the template's thinking on or off: DeepSeek-V3.1's has another name for it than the rest."""
    if think == "auto":
        return {}
    template = str(model.tokenizer.chat_template)
    other = "thinking" in template and "enable_thinking" not in template
    return {"enable_thinking": think == "on"} | ({"thinking": think == "on"} if other else {})


def _through_template(
    model: LiveModel, messages: Sequence[Message], tools: Sequence[Any], think: str, *, answer: bool = True
) -> str:
    thinking = _switch(model, think)
    messages = _without_thoughts(messages, model.markers)
    if model.calls.described:
        messages = tool_calls.described(messages, tools)
    elif tools:
        thinking["tools"] = list(tools)

    def rendered(said: Sequence[Message]) -> str:
        return str(
            model.tokenizer.apply_chat_template(list(said), tokenize=False, add_generation_prompt=answer, **thinking)
        )

    try:
        try:
            return rendered(messages)
        except TypeError:
            # Some put the arguments of calls together with text.
            if not any(message.get("tool_calls") for message in messages):
                raise
            return rendered(tool_calls.as_text(messages))
    except Exception as error:
        # Templates are programs; they refuse, for instance, a system message, or two user turns in a row.
        raise UsageError(f"The chat template of {model.name} does not take these messages: {error}") from error


def _continued(model: LiveModel, request: Generate, messages: Sequence[Message]) -> Rendered:
    *before, last = messages
    if last["role"] != "assistant":
        raise UsageError(f"continue_last goes on from an answer, and the last message is of the role {last['role']}.")
    if not before:
        raise UsageError("continue_last goes on from an answer to something, and there is no message before it.")
    if last.get("tool_calls"):
        raise UsageError(
            "The last message ends in tool calls and cannot be continued. Add their results as messages of the role "
            "tool and ask without continue_last."
        )
    thought, content, markers = last.get("thought", ""), last["content"], model.markers
    half = bool(thought) and not content
    if half and markers is None:
        raise UsageError(
            f"The last message was cut in its thought, and {model.name} does not think between markers that EdgeR1 "
            f"knows. Ask again instead."
        )
    think = _wanted(request)
    begin = _through_template(model, before, request.tools, "on" if half and think == "off" else think)
    if half and markers is not None and begin.rstrip().endswith(markers.end):
        raise UsageError(f"The chat template of {model.name} allows no thought here, so none can be continued.")
    pieces = _pieces(begin, thought, content, markers)
    if markers is None and content and not content[0].isspace():
        pieces[1] = _lead(model, before, begin)
    said = (_as_written(entry, pieces) for entry in model.kv.texts())
    text = next((each for each in said if each is not None), "".join(pieces))
    in_thought = half or (not content and begins_in_thought(text, markers))
    return Rendered(text, in_thought=in_thought, said=bool(thought if half else content))


def _pieces(begin: str, thought: str, content: str, markers: Markers | None) -> list[str]:
    """Return what the prompt consists of: every second piece is blank space, which models write as they like."""
    if markers is None or not (thought or content):
        return [begin, "", content]
    if begin.rstrip().endswith(markers.end):
        return [begin, "", content]
    opened = begins_in_thought(begin, markers)
    if not thought and not opened:
        return [begin + markers.answer, markers.gap if markers.answer else "", content]
    parts = [begin, "", thought] if opened else [begin + markers.start, markers.blank, thought]
    return parts if not content else [*parts, "", markers.to_answer, markers.gap, content]


def _lead(model: LiveModel, before: Sequence[Message], begin: str) -> str:
    """Return the blank that the template puts before an answer, where it puts one."""
    try:
        whole = str(
            model.tokenizer.apply_chat_template([*before, {"role": "assistant", "content": "x"}], tokenize=False)
        )
    except Exception:
        # Templates are programs, and this one is asked for a nicety.
        return ""
    lead = whole[len(begin) :].partition("x")[0] if whole.startswith(begin) else ""
    return lead if lead.isspace() else ""


def _as_written(text: str, pieces: Sequence[str]) -> str | None:
    """Return the pieces one after the other with the blank space of `text`; None where that is no beginning of them."""
    out: list[str] = []
    at = 0
    for i, piece in enumerate(pieces):
        rest = text[at:]
        if i % 2 and rest:
            own = pieces[i + 1]
            # What follows may begin with blanks of its own.
            count = _blanks(rest) - (_blanks(own) if _blanks(own) < len(own) else 0)
            piece = rest[: max(0, count)]
        if not (rest.startswith(piece) or piece.startswith(rest)):
            return None
        out.append(piece)
        at += len(piece)
    return "".join(out) if at >= len(text) else None


def _blanks(text: str) -> int:
    return len(text) - len(text.lstrip("\n "))
