"""Is the completion in the script of the language it should be in."""

from __future__ import annotations

import unicodedata

from edger1.errors import UsageError
from edger1.train.rewards.completion import Completion

SCRIPTS: dict[str, tuple[str, ...]] = {
    "latin": ("LATIN", "FULLWIDTH LATIN"),
    "cyrillic": ("CYRILLIC",),
    "greek": ("GREEK",),
    "han": ("CJK",),
    "japanese": ("CJK", "HIRAGANA", "KATAKANA"),
    "hangul": ("HANGUL",),
    "arabic": ("ARABIC",),
    "hebrew": ("HEBREW",),
    "devanagari": ("DEVANAGARI",),
    "thai": ("THAI",),
}
"""Beginnings of the names that Unicode gives the letters of a script."""

# Greek letters stand in formulas of every language.
_NEUTRAL = ("GREEK", "MATHEMATICAL", "DOUBLE-STRUCK")


def language(completion: Completion, *, script: str, of: str = "all") -> float:
    """Give the share of the letters that are of a script; 1 where there are no letters.

    After the language consistency reward of DeepSeek-R1 (arXiv:2501.12948), by letters instead of words, so that
    languages of one script are not told apart. `of`: "thinking", "answer" or "all". Greek letters count for the greek
    script alone, since formulas have them.
    """
    if script not in SCRIPTS:
        raise UsageError(f'language has script="{script}"; expected one of {", ".join(SCRIPTS)}.')
    texts = {"thinking": completion.thinking or "", "answer": completion.answer, "all": completion.text}
    if of not in texts:
        raise UsageError(f'language has of="{of}"; expected thinking, answer or all.')
    text = texts[of].replace("<think>", "").replace("</think>", "")
    names = [unicodedata.name(character, "") for character in text if character.isalpha()]
    wanted = SCRIPTS[script]
    counted = [name for name in names if name.startswith(wanted) or not name.startswith(_NEUTRAL)]
    return sum(name.startswith(wanted) for name in counted) / len(counted) if counted else 1.0
