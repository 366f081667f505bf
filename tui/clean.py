"""Model text made safe for a terminal.

What a model says is data. Control characters can move the cursor, recolour the screen, set the clipboard or the title
of the window; bidirectional overrides show a text in another order than it has; a lone surrogate cannot be written.
"""

from __future__ import annotations

import re

_REMOVED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but tab and newline, DEL, C1
    "\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069\ufeff]"  # bidirectional marks and overrides, byte order mark
)
_LINE_ENDS = re.compile("[\u2028\u2029]")
_SURROGATES = re.compile("[\ud800-\udfff]")

STACK_MAX = 8
"""Marks without a width of their own that follow one another on the screen; no script needs as many."""
_NO_WIDTH = (
    "[\u00ad\u0300-\u036f\u0483-\u0489\u0591-\u05bd\u0610-\u061a\u064b-\u065f\u06d6-\u06dc\u0730-\u074a\u0e34-\u0e3a"
    "\u0e47-\u0e4e\u180b-\u180f\u1ab0-\u1aff\u1dc0-\u1dff\u200b-\u200d\u2060-\u2065\u20d0-\u20ff\u3099\u309a"
    "\ufe00-\ufe0f\ufe20-\ufe2f\U000e0000-\U000e01ef]"
)
_STACKS = re.compile(f"({_NO_WIDTH}{{{STACK_MAX}}}){_NO_WIDTH}+")


def clean(text: str) -> str:
    """Remove what a terminal or a layout would act on; newlines and tabs stay.

    Works piece by piece: cleaning two pieces gives the same as cleaning them joined.
    """
    return _SURROGATES.sub("\ufffd", _LINE_ENDS.sub("\n", _REMOVED.sub("", text)))


def tame(text: str) -> str:
    """Cut stacks of combining and invisible characters down to what a terminal can draw; for showing, not for keeping.

    Does not work piece by piece: a stack that is cut in two is two stacks.
    """
    return text if text.isascii() else _STACKS.sub(r"\1", text)
