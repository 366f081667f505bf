"""Models in words: a row of the list, the details of one, a fetch under way. Texts from outside are cleaned here."""

from __future__ import annotations

from textual.content import Content

from edger1.tui.catalogue import AdapterEntry, Entry
from edger1.tui.clean import clean
from edger1.tui.fetches import Fetch
from edger1.tui.figures import duration
from edger1.units import format_bytes

FIT_COLOURS = {
    "fits": "$text-success",
    "streams": "$text-warning",
    "too big": "$text-error",
    "unknown": "$foreground 70%",
}
STAGES = {"download": "Downloading", "convert": "Converting", "calibrate": "Calibrating", "fit": "Fitting"}
_SIZE_WIDTH, _FIT_WIDTH = 8, 9


def line(text: str) -> str:
    """Return a text from outside as one clean line."""
    return " ".join(clean(text).split())


def row(
    entry: Entry, width: int, fetch: Fetch | None = None, *, current: bool = False, name: Content | None = None
) -> Content:
    """One line of the list: name, size, and whether it fits, or how far its fetch is."""
    room = max(8, width - _SIZE_WIDTH - _FIT_WIDTH - 4)
    shown = name if name is not None else Content(line(entry.name))
    if current:
        shown = Content.assemble(shown, (" in use", "$text-primary"))
    shown = shown.truncate(room, ellipsis=True)
    size = format_bytes(entry.size_bytes) if entry.size_bytes else "?"
    gap = " " * (room - shown.cell_length + 2)
    if entry.problem:
        words, colour = "damaged", FIT_COLOURS["too big"]
    elif fetch is not None and fetch.open:
        words, colour = percent(fetch), "$text-primary"
    else:
        words, colour = entry.fit, FIT_COLOURS[entry.fit]
    return Content.assemble(
        shown, gap, (size.rjust(_SIZE_WIDTH), "$foreground 70%"), "  ", (words.ljust(_FIT_WIDTH), colour)
    )


def percent(fetch: Fetch) -> str:
    """How far a fetch is, in a word."""
    if fetch.status == "waiting":
        return "queued"
    if fetch.status == "stopping":
        return "stopping"
    if fetch.step is None or not fetch.step.total:
        return "begun"
    return f"{min(100, fetch.step.done * 100 // fetch.step.total)}%"


def progress(fetch: Fetch, waiting: list[str]) -> str:
    """What is being fetched, how fast, how long still, and what comes after."""
    name = line(fetch.name)
    if fetch.status == "stopping":
        words = [f"Stopping {name}; what came is kept"]
    elif fetch.step is None:
        words = [f"Fetching {name}", line(fetch.note) or "asking for it"]
    else:
        step = fetch.step
        of = format_bytes(step.total) if step.unit == "bytes" else f"{step.total} {step.unit}"
        words = [f"{STAGES.get(step.stage, line(step.stage))} {name}", f"{percent(fetch)} of {of}"]
        if fetch.rate and step.unit == "bytes":
            words.append(f"{format_bytes(round(fetch.rate))}/s")
        if fetch.left_s is not None:
            words.append(f"{duration(fetch.left_s)} left")
    if waiting:
        words.append(f"then {', '.join(map(line, waiting))}")
    return " · ".join(words)


def count(parameters: int) -> str:
    """A number of parameters as people say it."""
    for factor, unit in ((10**9, "B"), (10**6, "M")):
        if parameters >= factor:
            return f"{parameters / factor:.3g}{unit}"
    return str(parameters)


def fit(entry: Entry) -> Content:
    """Whether a model fits, and why, in colour and in words."""
    if entry.problem:
        return Content.assemble(("Damaged. ", "bold $text-error"), line(entry.why))
    word = {"fits": "Fits", "streams": "Streams", "too big": "Too big", "unknown": "Unknown"}[entry.fit]
    return Content.assemble((f"{word}. ", f"bold {FIT_COLOURS[entry.fit]}"), line(entry.why))


def details(entry: Entry) -> Content:
    """All that is known of a model."""
    facts: list[tuple[str, str]] = []
    if entry.size_bytes:
        facts.append(("size on disk", format_bytes(entry.size_bytes)))
    if entry.parameters:
        active = f", {count(entry.active_parameters)} active" if entry.active_parameters else ""
        facts.append(("parameters", count(entry.parameters) + active))
    facts.append(("kind", "mixture of experts" if entry.kind == "moe" else "dense"))
    if entry.quantization:
        facts.append(("quantization", line(entry.quantization)))
    if entry.context_length:
        facts.append(("trained context", f"{entry.context_length:,}"))
    facts.append(("licence", line(entry.licence) if entry.licence else "see its page"))
    if entry.begun_bytes:
        facts.append(("fetched so far", format_bytes(entry.begun_bytes)))
    if entry.installed:
        facts.append(("last used", line(entry.last_used or "never").replace("T", " ").removesuffix("+00:00")))
    parts = [Content.assemble((line(entry.name), "bold $text-primary"))]
    if entry.title:
        parts.append(Content.assemble((line(entry.title), "$foreground 70%")))
    parts += [Content(""), fit(entry), Content("")]
    parts += [table(entry.numbers), Content("")] if entry.numbers else []
    return Content("\n").join([*parts, table(tuple(facts))])


def table(rows: tuple[tuple[str, str], ...]) -> Content:
    """Pairs of what and how much, below one another."""
    wide = max((len(what) for what, _ in rows), default=0) + 2
    return Content("\n").join([Content.assemble((what.ljust(wide), "$foreground 70%"), value) for what, value in rows])


def adapter(entry: AdapterEntry) -> Content:
    """An adapter in two lines."""
    rank = f" of rank {entry.rank}" if entry.rank else ""
    facts = f"{line(entry.kind)}{rank}, {entry.layout}, {format_bytes(entry.size_bytes)}"
    about = f"{facts}, trained on {line(entry.of)}" if entry.of else facts
    return Content.assemble((line(entry.name), "bold"), "\n", (f"  {about}", "$foreground 70%"))
