"""Sizes as people write them: "6GB", "512 MiB", "50%" of the machine's memory."""

from __future__ import annotations

import re
from fractions import Fraction

from edger1.errors import UsageError

_FACTORS = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "kb": 10**3,
    "m": 10**6,
    "mb": 10**6,
    "g": 10**9,
    "gb": 10**9,
    "t": 10**12,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_LONGEST = 40
"""Characters of a size that means something."""
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([a-zA-Z]*|%)\s*")


def parse_size(text: str | int, *, whole: int | None = None) -> int:
    """Return the bytes that `text` names.

    A number alone is bytes; KB, MB, GB, TB are powers of 1,000 and KiB, MiB, GiB, TiB powers of 1,024 (any case, the
    "B" of the former may be left out). "50%" is half of `whole`, or of the machine's memory where `whole` is None.

    Raises UsageError for anything else, for zero, and for more than 100%.
    """
    match = None if isinstance(text, bool) or len(str(text)) > _LONGEST else _SIZE.fullmatch(str(text))
    unit = match.group(2).lower() if match else None
    if match is None or (unit != "%" and unit not in _FACTORS):
        found = f"{text!r:.80}"
        raise UsageError(f'{found} is not a size; expected a number with a unit, such as "6GB", "512MiB" or "50%".')
    # Not through a float, in which 2.01 thousand are 2,009.99... and which holds only 53 bits.
    number = Fraction(match.group(1))
    if unit == "%":
        if number > 100:
            raise UsageError(f"{text!r} is more than the whole; expected at most 100%.")
        size = int(number / 100 * (_machine_memory() if whole is None else whole))
    else:
        size = int(number * _FACTORS[unit or ""])
    if size <= 0:
        raise UsageError(f"{text!r} is no memory at all; expected a size above zero.")
    return size


def format_bytes(size: int, *, up: bool = False) -> str:
    """Return `size` in decimal units with three significant digits: "98.4 MB", "4.07 GB", "812 B".

    `up` rounds up: a ceiling of what is printed then holds `size` bytes.
    """
    if abs(size) < 1000:
        return f"{size} B"
    value, factor = float(size), 1
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        factor *= 1000
        # 999.5 and more would print as four digits.
        if abs(value) < 999.5 or unit == "TB":
            break
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    if up:
        last = factor // 10**digits
        value = -(-size // last) * last / factor
    return f"{value:.{digits}f} {unit}"


def _machine_memory() -> int:
    from edger1.memory import machine_bytes

    return machine_bytes()
