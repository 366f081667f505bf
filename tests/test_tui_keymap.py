"""The user's keys: what is right applies, what is wrong is told of with its line."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from pathlib import Path

import pytest
from chatting import drive, screen, until
from fake_backend import FIGURES, FakeBackend, words
from hypothesis import given
from hypothesis import strategies as st
from textual.app import App
from textual.pilot import Pilot

from edger1.tui.app import ChatApp
from edger1.tui.belongings import Belongings
from edger1.tui.keymap import COMMANDS, EVERYWHERE, Keymap, binding, parse_key, read_keymap, shown
from edger1.tui.session import State
from edger1.tui.widgets.prompt import Prompt
from edger1.tui.widgets.turn import Editor


def test_no_two_commands_of_a_screen_share_a_key() -> None:
    screens = {each.where for each in COMMANDS} - {EVERYWHERE}
    for where in screens:
        taken = Counter(key for each in COMMANDS if each.where in (where, EVERYWHERE) for key in each.keys)
        assert [key for key, times in taken.items() if times > 1] == []
    assert len({each.id for each in COMMANDS}) == len(COMMANDS)
    assert all(parse_key(key) == key for each in COMMANDS for key in each.keys)


@pytest.mark.parametrize(
    ("written", "key", "read"),
    [
        ("Ctrl+N", "ctrl+n", "Ctrl+N"),
        ("control + shift + F5", "ctrl+shift+f5", "Ctrl+Shift+F5"),
        ("shift+ctrl+a", "ctrl+shift+a", "Ctrl+Shift+A"),
        ("PgUp", "pageup", "Page Up"),
        ("esc", "escape", "Esc"),
        ("alt+enter", "alt+enter", "Alt+Enter"),
        ("?", "question_mark", "?"),
        ("ctrl++", "ctrl+plus", "Ctrl++"),
        ("f12", "f12", "F12"),
    ],
)
def test_keys_are_read_as_people_write_them(written: str, key: str, read: str) -> None:
    assert parse_key(written) == key
    assert shown(key) == read


@pytest.mark.parametrize("written", ["", "ctlr+n", "ctrl+", "ctrl+nn", "pagupe", "a,b", "ctrl+n,ctrl+o", "<any>"])
def test_what_is_no_key_is_refused(written: str) -> None:
    with pytest.raises(ValueError, match="is no key"):
        parse_key(written)


@given(st.text(max_size=12))
def test_any_text_is_a_key_or_refused_in_words(written: str) -> None:
    with contextlib.suppress(ValueError):
        key = parse_key(written)
        assert "," not in key
        assert shown(key)


def keymap(folder: Path, text: str) -> Keymap:
    (folder / "keys.toml").write_text(text)
    return read_keymap(folder / "keys.toml")


def test_the_users_keys_replace_the_usual_ones(tmp_path: Path) -> None:
    found = keymap(tmp_path, '# mine\nnew = "ctrl+b"\nnewline = ["ctrl+j", "Ctrl+L"]\n')
    assert found.problems == ()
    assert found.overrides() == {"new": "ctrl+b", "newline": "ctrl+j,ctrl+l"}
    assert found.shown("newline") == "Ctrl+J, Ctrl+L"
    assert found.of("quit") == ("ctrl+q",)
    assert read_keymap(tmp_path / "none.toml").overrides() == {}


def test_two_commands_can_change_keys(tmp_path: Path) -> None:
    found = keymap(tmp_path, 'new = "ctrl+t"\nthoughts = "ctrl+n"\n')
    assert found.problems == ()
    assert found.overrides() == {"new": "ctrl+t", "thoughts": "ctrl+n"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('nwe = "f11"\n', ":1: there is no command 'nwe'. Did you mean new?"),
        ('zzzzz = "f11"\n', ":1: there is no command 'zzzzz'. Commands: send"),
        ('\nnew = "ctlr+n"\n', ":2: 'ctlr+n' is no key: 'ctlr' is none of alt, ctrl"),
        ('new = "pagupe"\n', "did you mean 'pageup'?"),
        ("new = 3\n", ":1: new is 3, but a key such as"),
        ("new = []\n", ":1: new is [], but a key such as"),
        ('new = "n"\n', ":1: 'n' types a character, so new could never be reached"),
        ('new = "ctrl+t"\n', ":1: Ctrl+T is taken by thoughts, so new keeps Ctrl+N. Give thoughts another key"),
        ('new = "f11"\nhelp = "f11"\n', ":2: F11 is taken by new, so help keeps F1"),
        ('quit = "escape"\n', ":1: Esc is taken by stop, so quit keeps Ctrl+Q"),
        ("new = = 3\n", ":1 cannot be read: invalid value"),
        ('new = "f11\n', ":1 cannot be read"),
        ('settings = "f11"\nsettings = "f12"\n', ":2 cannot be read: settings is set a second time"),
    ],
)
def test_what_is_wrong_is_told_with_its_line_and_the_rest_applies(tmp_path: Path, text: str, message: str) -> None:
    found = keymap(tmp_path, text + 'models = "ctrl+b"\n')
    assert found.overrides()["models"] == "ctrl+b"
    (problem,) = found.problems
    assert problem.startswith(str(tmp_path / "keys.toml"))
    assert message in problem


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "keys.toml").write_bytes(b"\xff\xfe")
    assert "is not UTF-8" in read_keymap(tmp_path / "keys.toml").problems[0]
    assert "cannot be read" in read_keymap(tmp_path).problems[0]


def test_textual_takes_the_users_keys(tmp_path: Path) -> None:
    class Host(App[None]):
        BINDINGS = [binding("new", "note('new')"), binding("newline", "note('line')")]  # noqa: RUF012
        noted: list[str] = []  # noqa: RUF012

        def action_note(self, what: str) -> None:
            self.noted.append(what)

    async def run() -> None:
        app = Host()
        async with app.run_test() as pilot:
            await pilot.press("ctrl+n", "ctrl+j", "alt+enter")
            assert app.noted == ["new", "line", "line"]
            app.set_keymap(keymap(tmp_path, 'new = ["f11", "f12"]\nnewline = ["f10", "ctrl+l"]\n').overrides())
            await pilot.press("ctrl+n", "ctrl+j", "f10", "ctrl+l")
            assert app.noted[3:] == ["line", "line"]
            app.set_keymap(keymap(tmp_path, 'new = ["f11", "ctrl+k"]\n').overrides())
            await pilot.press("ctrl+n", "f11", "ctrl+k")
            assert app.noted[5:] == ["new", "new"]

    asyncio.run(asyncio.wait_for(run(), timeout=90))


def test_every_command_of_the_chat_can_have_other_keys(tmp_path: Path) -> None:
    keys = 'send = "ctrl+enter"\nnewline = "enter"\nscroll_up = "f11"\nscroll_down = "f12"\npalette = "ctrl+l"\n'
    moved = keymap(tmp_path, keys)
    backend = FakeBackend([*words("\n\n".join(f"Line {at}." for at in range(40))), FIGURES])

    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        await until(pilot, lambda: app.session.state is State.READY)
        await pilot.press("a", "enter", "b")
        assert app.query_one(Prompt).text == "a\nb"
        await pilot.press("ctrl+enter")
        await until(pilot, lambda: "Line 39." in screen(app) and app.session.state is State.READY)
        assert backend.asked[0][-1]["content"] == "a\nb"
        await pilot.press("f11")
        await until(pilot, lambda: "Line 39." not in screen(app))
        await pilot.press("f12")
        await until(pilot, lambda: "Line 39." in screen(app))
        # A message that is edited is left by the same keys.
        await pilot.press("f5")
        await until(pilot, lambda: len(app.query(Editor)) == 1)
        assert app.query_one(Editor).border_subtitle == "Ctrl+Enter save · ⏎ new line · esc leave"
        await pilot.press("enter", "c")
        assert app.query_one(Editor).text == "a\nb\nc"
        await pilot.press("ctrl+enter")
        await until(pilot, lambda: len(backend.asked) == 2)
        assert backend.asked[1][-1]["content"] == "a\nb\nc"
        await pilot.press("ctrl+p")
        assert len(app.screen_stack) == 1
        await pilot.press("ctrl+l")
        await until(pilot, lambda: len(app.screen_stack) == 2)

    drive(backend, scenario, belongings=Belongings(keymap=moved))
