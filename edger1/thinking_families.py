"""Which markers a model's thoughts stand between, found once when it is loaded.

DeepSeek-R1, Qwen3, GLM, nano      <think> ... </think>, in the vocabulary or only in the chat template
Magistral, Seed-OSS, Kimi, EXAONE  markers of their own in the vocabulary
Sky-T1, Stratos                    <|begin_of_thought|> ... <|end_of_thought|> <|begin_of_solution|> ..., as plain text
gpt-oss                            harmony's channels

The blanks around them are the family's too: whoever closes a thought in a model's name should leave what it knows.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from edger1.thinking import HARMONY, SOLUTION, Markers

_PAIRS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("◁think▷", "◁/think▷"),
    ("<thought>", "</thought>"),
)
_WITH_SOLUTIONS = re.compile(r"sky-?t1|stratos", re.IGNORECASE)
_QUESTION = {"role": "user", "content": "q"}


def named(start: str, end: str, tokenizer: Any) -> Markers:
    """Return what is known of the markers `start` and `end`, as a registry names them."""
    for known in (HARMONY, SOLUTION):
        if start == known.start:
            return known
    return _with_blanks(Markers(start, end), tokenizer)


def found(name: str, tokenizer: Any) -> Markers | None:
    """Return the markers of a model of this name by its template and vocabulary; None for one that has none."""
    template = str(tokenizer.chat_template)
    if HARMONY.start in template:
        return HARMONY
    vocabulary = tokenizer.get_vocab()
    if SOLUTION.start in template or SOLUTION.start in vocabulary or _WITH_SOLUTIONS.search(name):
        return SOLUTION
    if tokenizer.has_thinking:
        return _with_blanks(Markers(tokenizer.think_start, tokenizer.think_end), tokenizer)
    for start, end in _PAIRS:
        if (start in vocabulary and end in vocabulary) or end in template:
            return _with_blanks(Markers(start, end), tokenizer)
    return None


def _with_blanks(markers: Markers, tokenizer: Any) -> Markers:
    """Return markers with the blanks that the chat template writes around them, R1's where it writes none of them."""
    start, end = re.escape(markers.start), re.escape(markers.end)
    said = {"role": "assistant", "content": "ANSWER", "reasoning_content": "THOUGHT"}
    whole = re.search(rf"{start}(\s*)THOUGHT\s*{end}(\s*)ANSWER", _rendered(tokenizer, [_QUESTION, said], False))
    if whole is not None:
        return replace(markers, blank=whole[1], gap=whole[2])
    closed = re.search(rf"(?:{start}(\s*))?{end}(\s*)\Z", _rendered(tokenizer, [_QUESTION], True))
    if closed is not None:
        # Between the two stand the blanks behind the first and those before the second.
        inner = closed[1] or ""
        return replace(markers, blank=inner[: (len(inner) + 1) // 2], gap=closed[2])
    return markers


def _rendered(tokenizer: Any, messages: list[dict[str, str]], asks: bool) -> str:
    if not tokenizer.has_chat_template:
        return ""
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=asks, enable_thinking=not asks
            )
        )
    except Exception:
        # Templates are programs, and this one is asked for a nicety.
        return ""
