"""Model text made safe for a terminal.

What a model says is data. Control characters can move the cursor, recolour the screen, set the clipboard or the title
of the window; bidirectional overrides show a text in another order than it has; a lone surrogate cannot be written.
"""

from __future__ import annotations

import re

_REMOVED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but tab and newline, DEL, C1
    "\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]"  # bidirectional marks and overrides, byte order mark
)
_LINE_ENDS = re.compile("[\u2028\u2029]")
_SURROGATES = re.compile("[\ud800-\udfff]")


def clean(text: str) -> str:
    """Remove what a terminal or a layout would act on; newlines and tabs stay.

    Works piece by piece: cleaning two pieces gives the same as cleaning them joined.
    """
    return _SURROGATES.sub("\ufffd", _LINE_ENDS.sub("\n", _REMOVED.sub("", text)))
