"""How conversations and what was found in them look in a list: pure functions of what the store gives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime

from textual.content import Content

from edger1.tui.clean import clean
from edger1.tui.store import Hit, Summary

_ROLES = {"user": "you", "assistant": "answer", "tool": "tool", "title": "title"}
_WIDE = 50
"""From this width on a row has room for who answered."""


def grouped(summaries: Iterable[Summary], now: datetime) -> Iterator[tuple[str, list[Summary]]]:
    """Return the conversations under their headings: pinned ones, then by day, those of a heading in their order."""
    pinned: list[Summary] = []
    others: list[Summary] = []
    for summary in summaries:
        (pinned if summary.pinned else others).append(summary)
    if pinned:
        yield "Pinned", pinned
    group: list[Summary] = []
    title = ""
    for summary in others:
        begun = heading(summary.updated_at, now)
        if begun != title and group:
            yield title, group
            group = []
        title = begun
        group.append(summary)
    if group:
        yield title, group


def heading(at: float, now: datetime) -> str:
    """Return the day of a moment as one says it at `now`: Today, Yesterday, the weekday, then the month."""
    then = _local(at, now)
    days = (now.date() - then.date()).days
    if days <= 0:
        return "Today"
    if days == 1:
        return "Yesterday"
    if days < 7:
        return then.strftime("%A")
    return then.strftime("%B" if then.year == now.year else "%B %Y")


def clock(at: float, now: datetime) -> str:
    """Return a moment as shortly as one can below its heading: the time within the last days, then the date."""
    then = _local(at, now)
    return then.strftime("%H:%M") if (now.date() - then.date()).days < 7 else _date(then, now)


def when(at: float, now: datetime) -> str:
    """Return a moment as shortly as one can without a heading: the time today, the weekday, then the date."""
    then = _local(at, now)
    days = (now.date() - then.date()).days
    return then.strftime("%H:%M") if days <= 0 else then.strftime("%a") if days < 7 else _date(then, now)


def _date(then: datetime, now: datetime) -> str:
    return f"{then.day} {then.strftime('%b' if then.year == now.year else '%b %Y')}"


def _local(at: float, now: datetime) -> datetime:
    try:
        return datetime.fromtimestamp(at, now.tzinfo)
    except (ValueError, OverflowError, OSError):
        return now


def heading_row(title: str) -> Content:
    """Return a heading as a row."""
    return Content.styled(title, "bold $text-muted")


def summary_row(summary: Summary, width: int, now: datetime) -> Content:
    """Return a conversation as one line of `width` cells: its name, and at the right who answered and when."""
    about = [(when if summary.pinned else clock)(summary.updated_at, now)]
    if width >= _WIDE and summary.model:
        about.insert(0, clean(summary.model)[:24])
    style = "" if summary.title else "italic"
    return _line(Content.styled(f"  {_one_line(summary.name)}", style), " · ".join(about), width)


def hit_row(hit: Hit, width: int, now: datetime) -> Content:
    """Return what was found as its conversation's name and, below, the words where they stand."""
    about = f"{_ROLES.get(hit.role, hit.role)} · {when(hit.at, now)}"
    found = Content("  " + _one_line(hit.snippet))
    for begin, end in hit.marks:
        found = found.stylize("bold underline $text-primary", begin + 2, end + 2)
    if hit.node is None:
        return _line(found, about, width)
    # The words may stand far to the right of a narrow row.
    first = hit.marks[0][0] + 2 if hit.marks else 0
    if first > width - 12:
        found = Content.assemble("  …", found[first - width // 3 :])
    name = _line(Content(f"  {_one_line(hit.title)}"), about, width)
    return Content("\n").join([name, found.truncate(max(width, 1), ellipsis=True).stylize_before("$text-muted")])


def _line(left: Content, right: str, width: int) -> Content:
    room = max(width - len(right) - 2, 4)
    left = left.truncate(room, ellipsis=True)
    gap = " " * max(width - left.cell_length - len(right) - 1, 1)
    return Content.assemble(left, gap, (right, "$text-muted"), " ")


def _one_line(text: str) -> str:
    return clean(text).replace("\n", " ").replace("\t", " ")
