"""What is typed to change how answers are thought over, drawn, drafted and fitted into the context.

The chat and its line mode share it.

A dial takes settings and the words after its command, and returns other settings; with no words it goes on to its next
choice. It raises UsageError for words that it does not know.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from edger1.errors import UsageError
from edger1.tui.figures import thought_limits
from edger1.tui.settings import SPECULATE, THINK, Settings, check_own

Dial = Callable[[Settings, str], Settings]
BUDGETS = (None, 500, 2000, 8000)
SAMPLES = (1, 3, 5, 9)
_COUNT = re.compile(r"[0-9]{1,9}")
_RANGE = re.compile(r"([0-9]{0,9})\s*-\s*([0-9]{0,9})")
_T = TypeVar("_T")


def think(settings: Settings, words: str) -> Settings:
    """Take "auto", "on" or "off", or the most tokens of a thought."""
    word = words.strip().lower()
    if not word:
        return _with_think(settings, _next(THINK, settings.think))
    if word in THINK:
        return _with_think(settings, word)
    if not word[0].isdigit():
        raise UsageError(f"/think is {words!r}; expected auto, on or off, or the most tokens of a thought.")
    return budget(settings, words)


def budget(settings: Settings, words: str) -> Settings:
    """Take the most tokens of a thought, or "LEAST-MOST", of which one may be left out, or "none"."""
    word = words.strip().lower().replace("_", "").replace(",", "")
    if not word:
        return replace(settings, think_at_least=None, think_budget=_next(BUDGETS, settings.think_budget))
    if word in ("none", "off"):
        return replace(settings, think_budget=None, think_at_least=None)
    if settings.think == "off":
        # Who says how long it may be wants a thought.
        settings = replace(settings, think="auto")
    if _COUNT.fullmatch(word):
        return _checked(replace(settings, think_budget=int(word), think_at_least=None))
    found = _RANGE.fullmatch(word)
    if found is None or word == "-":
        raise UsageError(f"/budget is {words!r}; expected tokens, as in 500, 200-2000 or 200-, or none.")
    least, most = (int(each) if each else None for each in found.groups())
    return _checked(replace(settings, think_budget=most, think_at_least=least))


def samples(settings: Settings, words: str) -> Settings:
    """Take how many answers are drawn."""
    word = words.strip()
    if not word:
        return replace(settings, samples=_next(SAMPLES, settings.samples))
    if not _COUNT.fullmatch(word):
        raise UsageError(f"/samples is {words!r}; expected a whole number, 1 for a single answer.")
    return _checked(replace(settings, samples=int(word)))


def speculate(settings: Settings, words: str) -> Settings:
    """Take where drafts come from."""
    word = words.strip().lower()
    if not word:
        return replace(settings, speculate=_next(("off", "auto"), settings.speculate))
    if word not in SPECULATE:
        raise UsageError(f"/speculate is {words!r}; expected one of {', '.join(SPECULATE)}.")
    return replace(settings, speculate=word)


def shift(settings: Settings, words: str) -> Settings:
    """Take "on" or "off": whether the oldest turns go where the context is full."""
    word = words.strip().lower()
    if word not in ("", "on", "off"):
        raise UsageError(f"/shift is {words!r}; expected on or off.")
    return replace(settings, context_shift=word == "on" if word else not settings.context_shift)


def said(dial: Dial, settings: Settings) -> str:
    """Say in a sentence how a dial stands."""
    limits = thought_limits(settings)
    bounded = f"{limits} tokens of thought" if limits else "no limit of thought"
    if dial is think:
        return f"Thinking: {settings.think}, {bounded}." if limits else f"Thinking: {settings.think}."
    if dial is budget:
        return f"{bounded[0].upper()}{bounded[1:]}."
    if dial is samples:
        many = f"{settings.samples} answers to each question, of which the majority decides."
        return many if settings.samples > 1 else "One answer to each question."
    if dial is shift:
        full = "the oldest turns are dropped" if settings.context_shift else "nothing is dropped and the answer ends"
        return f"Context shift: {'on' if settings.context_shift else 'off'}. Where the context is full, {full}."
    return f"Drafts: {settings.speculate}."


def _with_think(settings: Settings, think: str) -> Settings:
    least = None if think == "off" else settings.think_at_least
    return replace(settings, think=think, think_at_least=least)


def _checked(settings: Settings) -> Settings:
    check_own(settings)
    return settings


def _next(choices: Sequence[_T], now: _T) -> _T:
    """Return the choice after `now`; after one that is none of them the first."""
    return choices[(choices.index(now) + 1) % len(choices)] if now in choices else choices[0]
