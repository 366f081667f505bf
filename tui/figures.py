"""The figures of an answer in words, and what of them fits into a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edger1.messages import Figures, Usage
from edger1.tui.settings import Settings

SEPARATOR = " · "
CONTEXT_NEARLY_FULL = 0.9
UNKNOWN = "–"

Mood = Literal["", "warning", "error"]


def memory(size_bytes: int) -> str:
    """A number of bytes as people read it: 65 kB, 412 MB, 5.3 GB (decimal units)."""
    if size_bytes >= 1e9:
        return f"{size_bytes / 1e9:.1f} GB"
    return f"{size_bytes / 1e6:.0f} MB" if size_bytes >= 1e6 else f"{size_bytes / 1e3:.0f} kB"


def duration(seconds: float) -> str:
    """A length of time as people read it: 4.2 s, 37 s, 2 min 5 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


@dataclass(frozen=True)
class Field:
    """One figure, written out and short. What changes in a running answer is padded, so that it keeps its width."""

    long: str
    short: str
    mood: Mood = ""
    """Trouble that the words tell too."""


def fields(cost: Figures, usage: Usage | None = None, *, live: bool = False) -> list[Field]:
    """The figures of an answer, the most wanted first.

    What was not measured is left out, but while the answer runs (`live`) its place is kept.
    """
    found = [
        _rate(cost.decode_tokens_per_s, live),
        _context(cost),
        _drafts(cost.drafts, live),
        *_experts(cost, live),
        _first_token(cost.time_to_first_token_s, live),
        _memory(cost),
        _prompt(usage),
    ]
    return [field for field in found if field is not None]


def held(settings: Settings) -> Field | None:
    """What a conversation is held under that is not the usual, as thinking, samples and drafts; None where all is."""
    long, short = [], []
    if settings.think != "auto":
        long.append(f"thinking {settings.think}")
        short.append(f"think {settings.think}")
    if limits := thought_limits(settings):
        long.append(f"{limits} tokens of thought")
        short.append(limits.replace(" ", ""))
    if settings.samples > 1:
        long.append(f"{settings.samples} samples")
        short.append(f"{settings.samples}×")
    if settings.speculate != "off":
        long.append(f"drafts {settings.speculate}")
        short.append("drafts" if settings.speculate == "auto" else settings.speculate)
    if settings.context_shift:
        long.append("context shift")
        short.append("shift")
    return Field(", ".join(long), " ".join(short)) if long else None


def thought_limits(settings: Settings) -> str:
    """How long a thought may and must be, in tokens: "≤ 500", "≥ 200", "200–500"; "" where nothing is said."""
    least, most = settings.think_at_least, settings.think_budget
    if least and most is not None:
        return f"{least:,}–{most:,}"
    if most is not None:
        return f"≤ {most:,}"
    return f"≥ {least:,}" if least else ""


def fit(found: Sequence[Field], room: int) -> list[tuple[str, Mood]]:
    """Return the fields that fit into `room` columns with separators between: as many as can be, then written out.

    Only widths decide, so a figure stays where it is while its value changes.
    """
    fitting = list(found)
    while fitting and len(SEPARATOR.join(field.short for field in fitting)) > room:
        fitting.pop()
    spare = room - len(SEPARATOR.join(field.short for field in fitting))
    shown: list[tuple[str, Mood]] = []
    for field in fitting:
        grows = len(field.long) - len(field.short)
        if grows <= spare:
            spare -= grows
            shown.append((field.long, field.mood))
        else:
            shown.append((field.short, field.mood))
    return shown


def _rate(rate: float | None, live: bool) -> Field | None:
    if rate is None:
        return Field(f"{UNKNOWN:>5} tok/s", f"{UNKNOWN:>5} tok/s") if live else None
    said = f"{rate:5.1f} tok/s"
    return Field(said, said)


def _context(cost: Figures) -> Field | None:
    size, used = cost.context_size, cost.context_used
    if not size:
        return None
    most = f"{size:,}"
    now = f"{used:,}".rjust(len(most))
    trouble: Mood = ""
    remark = ""
    if used >= size:
        remark, trouble = " full", "error"
    elif used >= size * CONTEXT_NEARLY_FULL:
        remark, trouble = " nearly full", "warning"
    return Field(f"context {now} / {most}{remark}", f"ctx {now}/{most}{remark}", trouble)


def _drafts(drafts: dict[str, Any] | None, live: bool) -> Field | None:
    """What drafting came to; nothing where it was not asked for, and why where it could not be."""
    if drafts is None or drafts["off"] == "switched off":
        return None
    if not drafts["drafted"] and (drafts["off"] or not live):
        return Field(f"no drafts: {drafts['off']}", "no drafts") if drafts["off"] else None
    share = f"{drafts['accepted'] / drafts['drafted']:4.0%}" if drafts["drafted"] else UNKNOWN.rjust(4)
    if drafts["gain"] is None and not live:
        return Field(f"drafts {share} stood", f"drafts {share}")
    gain = UNKNOWN.rjust(4) if drafts["gain"] is None else f"{drafts['gain']:4.1f}"
    return Field(f"drafts {share} stood, {gain} times as fast", f"drafts {share}, {gain}×")


def _experts(cost: Figures, live: bool) -> list[Field]:
    """What streaming the experts took while the answer was decoded; nothing where all had their slots."""
    if cost.experts is None:
        return []
    decode = cost.experts["decode"]
    hits, nbytes, stall = decode["hit_rate"], decode["bytes_per_token"], decode["stall_share"]
    if hits is None and not live:
        return []
    read = (UNKNOWN if nbytes is None else memory(int(nbytes))).rjust(6)
    return [
        _share("experts ", hits, " in memory", "hits "),
        _share("waiting ", stall, "", "wait "),
        Field(f"{read} read a token", f"{read}/tok"),
    ]


def _share(before: str, share: float | None, after: str, short: str) -> Field:
    said = (UNKNOWN if share is None else f"{share:.0%}").rjust(4)
    return Field(f"{before}{said}{after}", f"{short}{said}")


def _first_token(seconds: float | None, live: bool) -> Field | None:
    if seconds is None and not live:
        return None
    said = f"{UNKNOWN:>4}" if seconds is None else f"{seconds:.2f}" if seconds < 100 else f"{seconds:.0f}"
    return Field(f"first token {said} s", f"first {said} s")


def _memory(cost: Figures) -> Field | None:
    held = cost.accounted_memory_bytes or cost.peak_memory_bytes
    ceiling = cost.ceiling_bytes
    if not held:
        return None
    if not ceiling:
        return Field(memory(held), memory(held))
    unit, factor = ("GB", 1e9) if ceiling >= 1e9 else ("MB", 1e6)
    digits = 1 if unit == "GB" else 0
    most = f"{ceiling / factor:.{digits}f}"
    now = f"{held / factor:.{digits}f}".rjust(len(most))
    over = held > ceiling
    remark = " over the ceiling" if over else ""
    return Field(f"memory {now} of {most} {unit}{remark}", f"{now}/{most} {unit}{remark}", "error" if over else "")


def _prompt(usage: Usage | None) -> Field | None:
    if usage is None or not usage.prompt_tokens:
        return None
    return Field(
        f"prompt {usage.prefilled_tokens:,} new, {usage.cached_tokens:,} cached",
        f"{usage.prefilled_tokens:,} new, {usage.cached_tokens:,} cached",
    )
