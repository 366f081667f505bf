"""The list of conversations as a user meets it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from textual.app import App
from textual.pilot import Pilot
from textual.widgets import Input, OptionList

from edger1.errors import StoreError
from edger1.tui.screens.conversation_rows import grouped, heading, hit_row, summary_row
from edger1.tui.screens.conversations import Choice, ConversationsScreen
from edger1.tui.settings import Settings
from edger1.tui.store import Hit, Store, Stored, Summary
from edger1.tui.themes import THEMES
from edger1.tui.tree import Node, Tree

NOW = datetime(2026, 11, 28, 15, 0, tzinfo=UTC)
DAY = 86400.0
Scenario = Callable[[Pilot[None], ConversationsScreen], Awaitable[None]]


class Host(App[None]):
    VERTICAL_BREAKPOINTS = [(0, "-short"), (20, "-tall")]  # noqa: RUF012

    def __init__(self, store: Store, current: str | None, theme: str) -> None:
        super().__init__()
        for own in THEMES:
            self.register_theme(own)
        self.theme = theme
        self.results: list[Choice | None] = []
        self.shown = ConversationsScreen(store, current, now=lambda: NOW)

    def on_mount(self) -> None:
        self.push_screen(self.shown, self.results.append)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "conversations.db")


def fill(store: Store) -> None:
    kept = [
        ("primes", "Prime numbers", 0.1, False, "Is 91 prime?"),
        ("sky", "Sky", 1.1, False, "Why is the sky blue?"),
        ("none", None, 2.1, False, "How does Python stream?"),
        ("pinned", "Kept on top", 400, True, "Keep this"),
        ("taxes", "Taxes", 40, False, "What is owed?"),
    ]
    for id_, title, days, pinned, text in kept:
        at = NOW.timestamp() - days * DAY
        asked = Node("user", text, id=f"{id_}-q", created_at=at)
        answer = Node("assistant", f"Well: {text}", f"{id_}-a", asked.id, at + 1, "thinking of preadv", finish="stop")
        store.insert(Stored(id_, title, Tree([asked, answer]), Settings(), "smollm2", None, pinned, at, at))


def drive(
    store: Store,
    scenario: Scenario,
    size: tuple[int, int] = (80, 24),
    current: str | None = None,
    theme: str = "edger1-dark",
) -> list[Choice | None]:
    app = Host(store, current, theme)

    async def run() -> None:
        async with app.run_test(size=size) as pilot:
            await pilot.pause()
            await scenario(pilot, app.shown)

    asyncio.run(asyncio.wait_for(run(), timeout=200))
    return app.results


def text(screen: ConversationsScreen) -> str:
    return "\n".join("".join(part.text for part in line).rstrip() for line in screen._compositor.render_strips())


async def until(pilot: Pilot[None], screen: ConversationsScreen, condition: Callable[[], bool]) -> None:
    for _ in range(2_000):
        await pilot.pause(0.01)
        if condition():
            return
    raise AssertionError(f"this never came about; the screen was:\n{text(screen)}")


async def type_(pilot: Pilot[None], words: str) -> None:
    await pilot.press(*("space" if letter == " " else letter for letter in words))


def order(shown: str, *words: str) -> bool:
    places = [shown.find(word) for word in words]
    return -1 not in places and places == sorted(places)


@pytest.mark.parametrize("size", [(60, 15), (80, 24), (120, 40)])
def test_the_list_goes_by_day_with_pinned_ones_on_top(store: Store, size: tuple[int, int]) -> None:
    fill(store)

    async def scenario(pilot: Pilot[None], screen: ConversationsScreen) -> None:
        shown = text(screen)
        assert order(shown, "Pinned", "Kept on top", "Today", "Prime numbers", "12:36", "Yesterday", "Sky")
        if size != (60, 15):
            assert order(shown, "Thursday", "How does Python stream?", "October", "Taxes", "19 Oct")
        await pilot.press("escape")

    assert drive(store, scenario, size) == [None]


@pytest.mark.parametrize("size", [(60, 15), (80, 24)])
@pytest.mark.parametrize("theme", ["edger1-light", "ansi-dark"])
def test_what_is_typed_is_searched_and_opened_where_it_stands(store: Store, size: tuple[int, int], theme: str) -> None:
    fill(store)

    async def scenario(pilot: Pilot[None], screen: ConversationsScreen) -> None:
        await type_(pilot, "sky blu")
        await until(pilot, screen, lambda: "Why is the sky blue?" in text(screen))
        assert "Taxes" not in text(screen)
        await pilot.press("down", "enter")

    assert drive(store, scenario, size, theme=theme) == [Choice("sky", "sky-q")]


def test_enter_opens_what_the_words_find_even_when_they_were_typed_just_now(store: Store) -> None:
    fill(store)

    async def scenario(pilot: Pilot[None], screen: ConversationsScreen) -> None:
        await pilot.press(*"taxes", "enter")
        await until(pilot, screen, lambda: not screen.is_current)

    assert drive(store, scenario) == [Choice("taxes", None)]


def test_thoughts_are_found_and_nothing_is_said_to_be_found(store: Store) -> None:
    fill(store)

    async def scenario(pilot: Pilot[None], screen: ConversationsScreen) -> None:
        await type_(pilot, "preadv")
        await until(pilot, screen, lambda: "thinking of preadv" in text(screen))
        await pilot.press("x")
        await until(pilot, screen, lambda: "Nothing found." in text(screen))
        await pilot.press("enter", "escape")
        await until(pilot, screen, lambda: "Kept on top" in text(screen))
        assert "Nothing found." not in text(screen)
        assert screen.is_current

    assert drive(store, scenario) == []


def test_the_open_conversation_is_highlighted(store: Store) -> None:
    fill(store)

    async def scenario(pilot: Pilot[None], screen: ConversationsScreen) -> None:
        await pilot.press("enter")
        await pilot.pause()

    assert drive(store, scenario, current="sky") == [Choice("sky", None)]


def test_the_mouse_opens_too(store: Store) -> None:
    fill(store)

    async def scenario(pilot: Pilot[None], screen: ConversationsScreen) -> None:
        row = next(y for y, line in enumerate(text(screen).splitlines()) if "Prime numbers" in line)
        await pilot.click(offset=(10, row))
        await pilot.pause()

    assert drive(store, scenario) == [Choice("primes", None)]


def test_renaming_pinning_deleting_and_having_it_back(store: Store) -> None:
    fill(store)

    async def scenario(pilot: Pilot[None], screen: ConversationsScreen) -> None:
        await pilot.press("ctrl+r")
        assert screen.query_one("#line", Input).value == "Sky"
        await pilot.press(*"line", "enter")
        await until(pilot, screen, lambda: store.load("sky").title == "Skyline")
        assert "Skyline" in text(screen)
        await pilot.press("ctrl+s")
        await until(pilot, screen, lambda: store.load("sky").pinned)
        assert order(text(screen), "Pinned", "Skyline", "Kept on top", "Today")
        await pilot.press("ctrl+d")
        await until(pilot, screen, lambda: "Ctrl+Z brings it back" in text(screen))
        assert "sky" not in {each.id for each in store.list()}
        await pilot.press("ctrl+d")
        await until(pilot, screen, lambda: "Deleted “Kept on top”" in text(screen))
        await pilot.press("ctrl+z", "ctrl+z")
        await until(pilot, screen, lambda: "“Skyline” is back" in text(screen))
        assert len(store.list()) == 5
        await pilot.press("enter")
        await pilot.pause()

    assert drive(store, scenario, current="sky") == [Choice("sky", None)]


def test_a_hit_can_be_deleted_and_comes_back(store: Store) -> None:
    fill(store)

    async def scenario(pilot: Pilot[None], screen: ConversationsScreen) -> None:
        await type_(pilot, "owed")
        await until(pilot, screen, lambda: "What is owed?" in text(screen))
        await pilot.press("ctrl+d")
        await until(pilot, screen, lambda: "Deleted “Taxes”" in text(screen))
        assert "What is owed?" not in text(screen)
        await pilot.press("ctrl+z")
        await until(pilot, screen, lambda: "What is owed?" in text(screen))

    drive(store, scenario)


def test_leaving_the_line_changes_nothing(store: Store) -> None:
    fill(store)

    async def scenario(pilot: Pilot[None], screen: ConversationsScreen) -> None:
        await pilot.press("ctrl+r", *"xyz", "ctrl+d", "escape")
        await pilot.pause()
        assert screen.query_one("#search", Input).has_focus
        assert len(store.list()) == 5

    drive(store, scenario)


def test_exporting_asks_before_it_writes_over_a_file(store: Store, tmp_path: Path) -> None:
    fill(store)
    there = tmp_path / "there.json"
    there.write_text("mine")

    async def scenario(pilot: Pilot[None], screen: ConversationsScreen) -> None:
        await pilot.press("ctrl+e")
        line = screen.query_one("#line", Input)
        assert line.value == "sky.md"
        line.value = str(tmp_path / "no" / "where.md")
        await pilot.press("enter")
        await until(pilot, screen, lambda: "cannot be written" in text(screen))
        line.value = str(there)
        await pilot.press("enter")
        await until(pilot, screen, lambda: "Enter once more writes over" in text(screen))
        assert there.read_text() == "mine"
        await pilot.press("enter")
        await until(pilot, screen, lambda: "Written to" in text(screen))
        await pilot.press("ctrl+e")
        line.value = str(tmp_path / "sky.md")
        await pilot.press("enter")
        await until(pilot, screen, lambda: (tmp_path / "sky.md").exists() and "Written to" in text(screen))

    drive(store, scenario, current="sky")
    assert json.loads(there.read_text())["id"] == "sky"
    assert "> thinking of preadv" in (tmp_path / "sky.md").read_text()


def test_importing_a_file_and_a_broken_one(store: Store, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("[{")
    asked = {"message": {"author": {"role": "user"}, "content": {"parts": ["from elsewhere"]}}}
    (tmp_path / "good.json").write_text(json.dumps([{"title": "Elsewhere", "mapping": {"q": asked}}]))

    async def scenario(pilot: Pilot[None], screen: ConversationsScreen) -> None:
        assert "No conversations yet" in text(screen)
        await pilot.press("ctrl+o")
        line = screen.query_one("#line", Input)
        line.value = str(tmp_path / "broken.json")
        await pilot.press("enter")
        await until(pilot, screen, lambda: "Nothing was" in text(screen))
        line.value = str(tmp_path / "good.json")
        await pilot.press("enter")
        await until(pilot, screen, lambda: "1 conversation: 1 new." in text(screen))
        assert "Elsewhere" in text(screen)

    drive(store, scenario)


def test_a_new_one_can_be_asked_for(store: Store) -> None:
    async def scenario(pilot: Pilot[None], screen: ConversationsScreen) -> None:
        await pilot.press("ctrl+n")
        await pilot.pause()

    assert drive(store, scenario) == [Choice(None)]


def test_a_slow_search_does_not_hold_up_the_keys(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store)
    held = threading.Event()
    searched: list[str] = []

    def slow(words: str, limit: int = 50) -> list[Hit]:
        searched.append(words)
        held.wait(60)
        return Store.search(store, words, limit)

    monkeypatch.setattr(store, "search", slow)

    async def scenario(pilot: Pilot[None], screen: ConversationsScreen) -> None:
        await type_(pilot, "sk")
        await until(pilot, screen, lambda: searched == ["sk"])
        begin = time.monotonic()
        await pilot.press("y")
        assert screen.query_one("#search", Input).value == "sky"
        assert time.monotonic() - begin < 30
        held.set()
        await until(pilot, screen, lambda: "Why is the sky blue?" in text(screen))
        assert searched[-1] == "sky"

    drive(store, scenario)


def test_enter_waits_for_the_search_that_is_under_way(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store)
    begun = threading.Event()

    def slow(words: str, limit: int = 50) -> list[Hit]:
        begun.set()
        time.sleep(0.5)
        return Store.search(store, words, limit)

    monkeypatch.setattr(store, "search", slow)

    async def scenario(pilot: Pilot[None], screen: ConversationsScreen) -> None:
        await pilot.press(*"taxes")
        await until(pilot, screen, begun.is_set)
        await pilot.press("enter")
        await until(pilot, screen, lambda: not screen.is_current)

    assert drive(store, scenario) == [Choice("taxes", None)]


def test_leaving_while_a_file_is_read(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edger1.tui.screens import conversations

    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def slow(*given: object) -> None:
        begun.set()
        go_on.wait(10)
        ended.set()
        raise StoreError("too late")

    monkeypatch.setattr(conversations, "bring_in", slow)

    async def scenario(pilot: Pilot[None], screen: ConversationsScreen) -> None:
        await pilot.press("ctrl+o", "x", "enter")
        await until(pilot, screen, begun.is_set)
        await pilot.press("escape", "escape")
        await until(pilot, screen, lambda: not screen.is_current)
        go_on.set()
        await until(pilot, screen, ended.is_set)
        await pilot.pause(0.05)

    assert drive(store, scenario) == [None]


def test_trouble_with_the_disk_is_said(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(store)

    def full(*given: object) -> None:
        raise StoreError("The disk is full.")

    monkeypatch.setattr(store, "delete", full)
    monkeypatch.setattr(store, "search", full)

    async def scenario(pilot: Pilot[None], screen: ConversationsScreen) -> None:
        await pilot.press("ctrl+d")
        await until(pilot, screen, lambda: "The disk is full." in text(screen))
        await pilot.press("x")
        await pilot.pause(0.3)
        assert "The disk is full." in text(screen)

    drive(store, scenario)


def test_what_was_found_at_the_start_is_shown(tmp_path: Path) -> None:
    folder = tmp_path / "folder.db"
    folder.mkdir()

    async def scenario(pilot: Pilot[None], screen: ConversationsScreen) -> None:
        assert "cannot be written" in text(screen)

    store = Store.open(folder)
    drive(store, scenario)
    fill(store)
    drive(store, scenario)


def test_hostile_titles_and_texts_are_only_shown(store: Store) -> None:
    bad = "[bold]x[/] \x1b]0;title\x07\x1b[2J\u202e end [@click=app.quit]go[/]"
    asked = Node("user", f"{bad} needle {bad}", id="q")
    store.insert(Stored("bad", bad, Tree([asked])))

    async def scenario(pilot: Pilot[None], screen: ConversationsScreen) -> None:
        assert "[bold]x[/]" in text(screen)
        assert "\x1b" not in text(screen)
        await type_(pilot, "needle")
        await until(pilot, screen, lambda: "needle" in text(screen).split("search")[-1] and "you ·" in text(screen))
        assert "\u202e" not in text(screen)

    drive(store, scenario)


def test_growing_and_shrinking(store: Store) -> None:
    fill(store)

    async def scenario(pilot: Pilot[None], screen: ConversationsScreen) -> None:
        assert "smollm2 ·" in text(screen)
        await pilot.resize_terminal(40, 12)
        await pilot.pause()
        assert "smollm2" not in text(screen)
        assert "12:36" in text(screen)
        await pilot.press("enter")
        await pilot.pause()

    assert drive(store, scenario, current="sky") == [Choice("sky", None)]


def test_many_conversations_open_soon(store: Store) -> None:
    at = NOW.timestamp()
    for number in range(700):
        asked = Node("user", "x", created_at=at)
        store.insert(Stored(f"c{number}", f"Number {number}", Tree([asked]), created_at=at, updated_at=at + number))

    async def scenario(pilot: Pilot[None], screen: ConversationsScreen) -> None:
        await until(pilot, screen, lambda: "200 older ones are not listed" in text(screen))
        assert screen.query_one(OptionList).option_count == 501
        await pilot.press("ctrl+end", "enter")
        await pilot.pause()

    assert drive(store, scenario) == [Choice("c200", None)]


def test_nothing_ticks_while_nothing_happens(store: Store) -> None:
    fill(store)

    async def scenario(pilot: Pilot[None], screen: ConversationsScreen) -> None:
        await type_(pilot, "sky")
        await until(pilot, screen, lambda: "blue" in text(screen))
        ticking = [
            timer for widget in (screen, *screen.query("*")) for timer in widget._timers if timer._active.is_set()
        ]
        assert [timer for timer in ticking if timer._repeat is None] == []

    drive(store, scenario)


@pytest.mark.parametrize("size", [(60, 15), (80, 24), (120, 40)], ids="{0[0]}x{0[1]}".format)
@pytest.mark.parametrize("words", ["", "prime"])
def test_pictures(
    snap_compare: Callable[..., bool],
    store: Store,
    size: tuple[int, int],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("NO_COLOR", "TEXTUAL_THEME", "TEXTUAL_ANIMATIONS", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    fill(store)

    async def search(pilot: Pilot[None]) -> None:
        await type_(pilot, words)
        await pilot.pause(0.5)
        await pilot.app.workers.wait_for_complete()
        await pilot.pause()

    assert snap_compare(Host(store, "sky", "edger1-dark"), terminal_size=size, run_before=search)


# The pure part


def test_headings() -> None:
    days = {0.0: "Today", -1.0: "Today", 0.7: "Yesterday", 1.5: "Yesterday", 2: "Thursday", 6: "Sunday", 7: "November"}
    days |= {40: "October", 400: "October 2025"}
    assert {ago: heading(NOW.timestamp() - ago * DAY, NOW) for ago in days} == days
    assert heading(1e300, NOW) == "Today"


def summaries(*days: float, pinned: bool = False) -> list[Summary]:
    return [Summary(str(day), f"t{day}", None, pinned, NOW.timestamp() - day * DAY, 1) for day in days]


def test_groups_keep_the_order() -> None:
    given = [*summaries(0, 0.1, 1), *summaries(0.05, pinned=True), *summaries(2)]
    found = [(title, [each.id for each in group]) for title, group in grouped(given, NOW)]
    assert found == [("Pinned", ["0.05"]), ("Today", ["0", "0.1"]), ("Yesterday", ["1"]), ("Thursday", ["2"])]


@given(st.text(max_size=80), st.text(max_size=200), st.integers(1, 130), st.floats(-1e12, 1e12))
def test_rows_fit_whatever_they_hold(title: str, snippet: str, width: int, at: float) -> None:
    row = summary_row(Summary("i", title, "model", False, at, 3, title), width, NOW)
    assert "\n" not in row.plain
    if width >= 30:
        assert row.cell_length <= width
    for node in (None, "n"):
        marks = [(0, 1)] if snippet else []
        for line in hit_row(Hit("c", title, node, "user", snippet, marks, at), width, NOW).split("\n"):
            assert width < 30 or line.cell_length <= width
