"""A conversation as text to learn from, made of what the model's own chat template renders.

Chat templates are for inference: some drop the thoughts of earlier turns, some write the marker that opens a thought
into the prompt. So the template renders placeholders instead of contents, turn by turn, and the contents are put in
afterwards, thoughts included:

    what comes before the turn, as the template renders it          not learned
    what it adds for the model to go on with (`<think>\\n`)          not learned
    [thought, closing marker] answer, end token                     learned

What a template renders around placeholders depends on roles alone, so it is worked out once for each sequence of roles.
A template is a program, though, and may look into contents: rows whose contents have a string of the template's source
in them, or begin or end in spaces, are rendered for real as well and compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from edger1.errors import EdgeR1Error, FormatError, UsageError
from edger1.thinking import Markers
from edger1.train.datasets.rows import END_THINK, THINK

_SPLITTER = re.compile(r"(zq\d+[at]qz)")
_LITERAL = re.compile(r"'((?:[^'\\\n]|\\.)*)'|\"((?:[^\"\\\n]|\\.)*)\"")
_THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Piece:
    """A part of a rendered conversation."""

    text: str
    content: bool
    """Whether it is what somebody wrote, in which no special token is meant; otherwise it is the template's."""
    counted: bool
    turn: int
    """The message it is the content of; for the template's own, the one before."""


def split_thought(content: str) -> tuple[str | None, str]:
    """Return an assistant's content as (thought, answer); the thought is None where there is none."""
    if not content.startswith(THINK):
        return None, content
    thought, closed, answer = content[len(THINK) :].partition(END_THINK)
    return (thought, answer) if closed else (None, content)


@dataclass(frozen=True)
class _Slot:
    text: str
    """The template's own text, or a placeholder."""
    content: bool
    counted: bool
    turn: int
    thought: bool = False


@dataclass(frozen=True)
class _Plan:
    """How the conversations of one sequence of roles are put together."""

    slots: list[_Slot]
    history: list[str]
    """What the template renders at inference: its own text and placeholders in turn."""
    strip: dict[int, tuple[str, str]]
    """Message -> "all", "lines" or "": what the template takes off the left and the right of its content."""


class Renderer:
    """Renders conversations with a tokenizer's chat template.

    `reasoning` is "all" or "last", as for `Template`; `ends` are the tokens that end a turn, as text.
    """

    def __init__(self, tokenizer: Any, reasoning: str, ends: Sequence[str]) -> None:
        self._apply = tokenizer.apply_chat_template
        self.reasoning = reasoning
        self.ends = [end for end in ends if end]
        start = getattr(tokenizer, "think_start", None) if getattr(tokenizer, "has_thinking", False) else None
        self.markers = Markers(str(start), str(tokenizer.think_end)) if start else Markers(THINK, END_THINK)
        source = getattr(tokenizer, "chat_template", None)
        literals = {
            a or b for a, b in _LITERAL.findall(source if isinstance(source, str) else json.dumps(source or ""))
        }
        # Names of roles and keys stand in most templates and in many contents.
        telling = sorted(
            {word for text in literals for word in text.split("\\n") if word.strip() and not word.strip().isalnum()}
        )
        self._telling = re.compile("|".join(map(re.escape, telling))) if telling else None
        self._plans: dict[Any, _Plan] = {}

    def pieces(self, messages: Sequence[dict[str, Any]], tools: Any = None) -> list[Piece]:
        """Return a conversation in pieces, up to the end of its last assistant turn.

        Raises FormatError for a conversation without one, or that the template does not take or renders in a way that
        cannot be followed; UsageError where it can be followed in no conversation.
        """
        parts = [split_thought(m["content"]) if m["role"] == "assistant" else (None, m["content"]) for m in messages]
        plan, fresh = self._plan(messages, parts, tools)
        texts = [_stripped(answer, plan.strip.get(i, ("", ""))) for i, (_, answer) in enumerate(parts)]
        if fresh or any(
            answer[:1].isspace() or answer[-1:].isspace() or self._is_telling(answer) for _, answer in parts
        ):
            self._compare(messages, parts, texts, plan, tools)
        pieces = []
        for slot in plan.slots:
            if slot.content:
                thought = parts[slot.turn][0] if slot.thought else None
                pieces.append(
                    Piece((thought or "").strip() if slot.thought else texts[slot.turn], True, slot.counted, slot.turn)
                )
            else:
                pieces.append(Piece(slot.text, False, slot.counted, slot.turn))
        return pieces

    def prompt(self, messages: Sequence[dict[str, Any]], tools: Any = None) -> str:
        """Return what the model gets at inference to answer these turns."""
        return self._render(messages, tools, ask=True)

    def _is_telling(self, text: str) -> bool:
        return self._telling is not None and self._telling.search(text) is not None

    def _render(self, messages: Sequence[dict[str, Any]], tools: Any, *, ask: bool = False, **options: Any) -> str:
        if tools:
            options["tools"] = tools
        try:
            return str(self._apply(list(messages), tokenize=False, add_generation_prompt=ask, **options))
        except EdgeR1Error:
            raise
        except Exception as error:
            # Templates are programs; they refuse, for instance, a system message, or two user turns in a row.
            raise FormatError(f"the model's chat template does not take this conversation: {error}") from error

    def _compare(
        self, messages: Sequence[dict[str, Any]], parts: list[Any], texts: list[str], plan: _Plan, tools: Any
    ) -> None:
        real = self._render([{**m, "content": answer} for m, (_, answer) in zip(messages, parts, strict=True)], tools)
        spliced = "".join(texts[int(part[2:-3])] if n % 2 else part for n, part in enumerate(plan.history))
        if real != spliced:
            both = zip(real, spliced, strict=False)
            at = next((i for i, (a, b) in enumerate(both) if a != b), min(len(real), len(spliced)))
            raise FormatError(
                "the model's chat template changes what is in this conversation, at "
                f"{real[max(0, at - 10) : at + 20]!r}, so its turns cannot be told apart"
            )

    def _plan(self, messages: Sequence[dict[str, Any]], parts: list[Any], tools: Any) -> tuple[_Plan, bool]:
        shape: list[Any] = []
        for message, (thought, answer) in zip(messages, parts, strict=True):
            extra = {k: v for k, v in message.items() if k not in ("role", "content")}
            written = json.dumps(extra, sort_keys=True, default=str) if extra else ""
            shape.append((message["role"], bool(answer), thought is not None, written))
        key = (tuple(shape), json.dumps(tools, sort_keys=True, default=str) if tools else "")
        plan = self._plans.get(key)
        if plan is not None:
            return plan, False
        if len(self._plans) >= 4096:
            self._plans.clear()
        skeleton = [{**m, "content": f"zq{i}aqz" if parts[i][1] else ""} for i, m in enumerate(messages)]
        plan = self._plans[key] = _Planner(self, skeleton, [thought is not None for thought, _ in parts], tools).plan()
        return plan, True


class _Planner:
    """Works out a plan for one sequence of roles."""

    def __init__(self, renderer: Renderer, skeleton: list[dict[str, Any]], thinks: list[bool], tools: Any) -> None:
        self.renderer = renderer
        self.skeleton = skeleton
        self.thinks = thinks
        self.tools = tools
        self.slots: list[_Slot] = []

    def plan(self) -> _Plan:
        turns = [i for i, message in enumerate(self.skeleton) if message["role"] == "assistant"]
        if not turns:
            raise FormatError("the conversation has no assistant turn, so there is nothing to learn")
        befores = [self._before(i) for i in turns]
        self._add(befores[0], False, turns[0] - 1)
        for n, i in enumerate(turns):
            following = befores[n + 1] if n + 1 < len(turns) else None
            self._turn(i, befores[n], following)
        history = _SPLITTER.split(self._render(self.skeleton))
        return _Plan(_merged(self.slots), history, self._strips(history))

    def _render(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        return self.renderer._render(messages, self.tools, **options)

    def _before(self, i: int) -> str:
        if i:
            return self._render(self.skeleton[:i])
        try:
            return self._render([])
        except FormatError:
            raise FormatError(
                "the conversation begins with the assistant, which the chat template does not take"
            ) from None

    def _turn(self, i: int, before: str, following: str | None) -> None:
        asked = self._render(self.skeleton[:i], ask=True) if i else before
        ended = self._render(self.skeleton[: i + 1])
        for text in (asked, ended, *([] if following is None else [following])):
            if not text.startswith(before):
                raise UsageError(
                    "The model's chat template renders earlier turns differently when a turn follows, so turns cannot "
                    "be told apart. Give conversations with one answer each, or the text itself."
                )
        lead, plain = asked[len(before) :], ended[len(before) :]
        place = f"zq{i}aqz" if self.skeleton[i]["content"] else ""
        body, end = self._body_and_end(plain, place)
        if following is not None:
            kept, rest = self._body_and_end(following[len(before) :], place)
            if self.renderer.reasoning == "last":
                # As at inference; learned only where the model would have written it like this.
                counted = kept.startswith(lead) and not self.thinks[i]
                self._written(kept, lead if counted else kept, i)
                self._ending(rest, end if counted else None, i)
                return
        if self.thinks[i]:
            lead, body = self._with_thought(i, before, lead, body, place)
        elif not body.startswith(lead):
            lead, body = self._without_thought(i, before, lead, body, place)
        self._written(body, lead, i)
        if following is None:
            self._ending(end, end, i)
            if not any(e in end for e in self.renderer.ends) and self.renderer.ends:
                self._add(self.renderer.ends[0], True, i)
        else:
            self._ending(rest, end, i)

    def _body_and_end(self, text: str, place: str) -> tuple[str, str]:
        """Split a turn after its content, or where it has none, before its first end token."""
        if place:
            if text.count(place) != 1:
                raise UsageError("The model's chat template leaves an assistant's content out, or repeats it.")
            at = text.index(place) + len(place)
        else:
            at = min((text.index(end) for end in self.renderer.ends if end in text), default=len(text))
        return text[:at], text[at:]

    def _with_thought(self, i: int, before: str, lead: str, body: str, place: str) -> tuple[str, str]:
        start, end = self.renderer.markers.start, self.renderer.markers.end
        thought = f"zq{i}tqz"
        for keys in (_THOUGHT_KEYS, *((key,) for key in _THOUGHT_KEYS)):
            turn = {**self.skeleton[i], **dict.fromkeys(keys, thought)}
            try:
                text = self._render([*self.skeleton[:i], turn])
            except FormatError:
                continue
            own = text[len(before) :]
            if not text.startswith(before) or own.count(thought) != 1 or own.count(place) < 1:
                continue
            own = self._body_and_end(own, place)[0]
            if own.startswith(lead) and thought in own:
                return lead, own
        if not lead.rstrip().endswith(start) and i:
            # Templates with a switch, such as DeepSeek-V3.1's.
            on = self._render(self.skeleton[:i], ask=True, enable_thinking=True, thinking=True)
            if on.startswith(before) and on.rstrip().endswith(start):
                lead = on[len(before) :]
        answer = place or body[len(lead) :]
        if lead.rstrip().endswith(start):
            space = lead[len(lead.rstrip()) :] or "\n"
            return lead, f"{lead}{thought}{space}{end}\n\n{answer}"
        opening = lead or body[: len(body) - len(answer)]
        return lead, f"{opening}{start}\n{thought}\n{end}\n\n{answer}"

    def _without_thought(self, i: int, before: str, lead: str, body: str, place: str) -> tuple[str, str]:
        """A turn without a thought where the prompt opens one: as the template closes it when thinking is off."""
        if not lead.rstrip().endswith(self.renderer.markers.start) or not place:
            raise UsageError(
                f"The model's chat template asks for an answer with {lead!r}, which is not how its assistant turns "
                f"begin ({body[:40]!r})."
            )
        off = self._render(self.skeleton[:i], ask=True, enable_thinking=False)
        closed = off[len(before) :]
        if not off.startswith(before) or not closed.startswith(lead) or closed == lead:
            closed = f"{lead}\n{self.renderer.markers.end}\n\n"
        return lead, closed + place

    def _written(self, body: str, lead: str, i: int) -> None:
        self._add(lead, False, i - 1 if lead != body else i)
        self._add(body[len(lead) :], True, i)

    def _ending(self, rest: str, end: str | None, i: int) -> None:
        """What follows an answer: its end is learned where it is `end`'s, up to the token that ends the turn."""
        counted = 0
        if end is not None:
            counted = min((end.index(e) + len(e) for e in self.renderer.ends if e in end), default=0)
            if not rest.startswith(end[:counted]):
                counted = 0
        self._add(rest[:counted], True, i)
        self._add(rest[counted:], False, i)

    def _add(self, text: str, counted: bool, turn: int) -> None:
        for n, part in enumerate(_SPLITTER.split(text)):
            if n % 2:
                self.slots.append(_Slot(part, True, counted, int(part[2:-3]), part[-3] == "t"))
            elif part:
                self.slots.append(_Slot(part, False, counted, turn))

    def _strips(self, history: list[str]) -> dict[int, tuple[str, str]]:
        """What the template takes off contents, seen on contents within spaces."""
        padded = [{**m, "content": f"\n {m['content']} \n"} if m["content"] else m for m in self.skeleton]
        seen = _SPLITTER.split(self._render(padded))
        if seen[1::2] != history[1::2]:
            return {}
        places = [int(part[2:-3]) for part in history[1::2]]
        strips = {i: ["", ""] for i in places}
        none = [("", "")]
        for n in range(0, len(history), 2):
            # What is left of the spaces before this part of the template's own, and behind it.
            befores = none if n == 0 else [(" \n", ""), ("", "all"), (" ", "lines")]
            behinds = none if n + 1 == len(history) else [("\n ", ""), ("", "all"), (" ", "lines")]
            for (before, right), (behind, left) in product(befores, behinds):
                if before + history[n] + behind == seen[n]:
                    if n:
                        strips[places[n // 2 - 1]][1] = right
                    if n + 1 < len(history):
                        strips[places[n // 2]][0] = left
                    break
        return {i: (left, right) for i, (left, right) in strips.items()}


def _stripped(text: str, strip: tuple[str, str]) -> str:
    left, right = strip
    if left:
        text = text.lstrip() if left == "all" else text.lstrip("\n")
    if right:
        text = text.rstrip() if right == "all" else text.rstrip("\n")
    return text


def _merged(slots: list[_Slot]) -> list[_Slot]:
    """Cut off what follows the last learned slot, and join neighbours of the template's own."""
    while slots and not slots[-1].counted:
        slots.pop()
    merged: list[_Slot] = []
    for slot in slots:
        if merged and not slot.content and not merged[-1].content and merged[-1].counted == slot.counted:
            merged[-1] = _Slot(merged[-1].text + slot.text, False, slot.counted, merged[-1].turn)
        else:
            merged.append(slot)
    return merged
