"""Where the user types, as a user meets it: keys go in, the screen is read."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path

import pytest
from prompting import COMMANDS, SIZES, PromptApp, typing, until
from textual.pilot import Pilot

from edger1.tui import attaching
from edger1.tui.chips import Chip, lay_out
from edger1.tui.tree import Attachment
from edger1.tui.widgets import prompt as prompt_module
from edger1.tui.widgets.attachment_row import AttachmentRow
from edger1.tui.widgets.attachment_view import AttachmentView
from edger1.tui.widgets.file_picker import FilePicker
from edger1.tui.widgets.prompt import TEXT_CHARACTERS, Prompt

LONG = "\n".join(f"line {number}" for number in range(30))

sizes = pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "work"
    (root / "src" / "deep").mkdir(parents=True)
    (root / "src" / "engine.py").write_text("def run(): ...\n")
    (root / "src" / "deep" / "cache.py").write_text("CACHE = {}\n")
    (root / "my notes.txt").write_text("some notes\n")
    (root / ".gitignore").write_text("ignored.txt\n")
    (root / "ignored.txt").write_text("x")
    (root / "pic.png").write_bytes(b"\x89PNG\0\0")
    return root


# Lines


@sizes
def test_it_grows_with_the_text_to_a_share_of_the_height(tmp_path: Path, size: tuple[int, int]) -> None:
    async def scenario(pilot: Pilot[None], app: PromptApp, prompt: Prompt) -> None:
        assert prompt.outer_size.height == 3
        await pilot.press("a", "ctrl+j", "b", "shift+enter", "c", "alt+enter", "d")
        assert prompt.text == "a\nb\nc\nd"
        assert prompt.outer_size.height == 6
        await pilot.press(*["ctrl+j"] * 30)
        assert prompt.outer_size.height == int(size[1] * 0.4)
        await pilot.press("enter")
        assert app.sent == [("a\nb\nc\nd", ())]
        assert prompt.outer_size.height == 3

    typing(PromptApp(tmp_path), scenario, size)


def test_keys_typed_at_once_act_in_their_order(tree: Path) -> None:
    async def scenario(pilot: Pilot[None], app: PromptApp, prompt: Prompt) -> None:
        await pilot.press("@")
        await until(pilot, app, lambda: "engine.py" in app.shown)
        for key in ("e", "n", "g", "tab", "h", "i", "enter"):
            app.simulate_key(key)
        await until(pilot, app, lambda: len(app.sent) == 1)
        assert app.sent[0][0] == "@src/engine.py hi"
        for key in ("a", "enter", "b", "up", "up"):
            app.simulate_key(key)
        await until(pilot, app, lambda: len(app.sent) == 2)
        assert app.sent[1][0] == "a"
        assert prompt.text == "b"

    typing(PromptApp(tree), scenario)


# History


@sizes
def test_history_is_walked_from_the_edges_and_the_draft_comes_back(tmp_path: Path, size: tuple[int, int]) -> None:
    async def scenario(pilot: Pilot[None], app: PromptApp, prompt: Prompt) -> None:
        await pilot.press("up")
        assert prompt.text == "say c"
        await pilot.press("up")
        assert prompt.text == "fix a\nand b"
        await pilot.press("up", "up")
        assert prompt.text == "first"
        await pilot.press("down", "down", "down", "down", "down", "down")
        assert prompt.text == ""
        await pilot.press(*"fix", "up")
        assert prompt.text == "fix a\nand b"
        await pilot.press("up")
        assert prompt.text == "fix a\nand b"
        await pilot.press("down", "down")
        assert prompt.text == "fix"
        await pilot.press("up", "x", "ctrl+z", "ctrl+z")
        assert prompt.text == "fix"

    typing(PromptApp(tmp_path, ["first", "fix a\nand b", "say c"]), scenario, size)


def test_up_moves_through_lines_before_it_walks(tmp_path: Path) -> None:
    async def scenario(pilot: Pilot[None], app: PromptApp, prompt: Prompt) -> None:
        await pilot.press(*"ab", "ctrl+j", "c", "up")
        assert prompt.text == "ab\nc"
        assert prompt.cursor_location == (0, 1)
        prompt.clear()
        prompt.insert("word " * 30)
        prompt.move_cursor(prompt.document.end)
        await pilot.press("up")
        assert prompt.text.startswith("word")

    typing(PromptApp(tmp_path, ["old"]), scenario)


@sizes
def test_control_r_finds_what_was_sent(tmp_path: Path, size: tuple[int, int]) -> None:
    async def scenario(pilot: Pilot[None], app: PromptApp, prompt: Prompt) -> None:
        await pilot.press(*"draft", "ctrl+r")
        await pilot.pause()
        assert "say [b]c[/b]" in app.shown
        await pilot.press(*"fix")
        assert "Search: fix" in app.shown
        assert "fix a ⏎ and b" in app.shown
        assert "say [b]c[/b]" not in app.shown
        await pilot.press("escape")
        assert prompt.text == "draft"
        await pilot.press("ctrl+r", *"fix", "ctrl+r", "enter")
        assert prompt.text == "fix older"
        await pilot.press("ctrl+z")
        assert prompt.text == "draft"
        await pilot.press("ctrl+r", *"zzz")
        assert "Nothing you sent has that" in app.shown
        await pilot.press("backspace", "backspace", "backspace", "enter")
        assert prompt.text == "say [b]c[/b]"

    typing(PromptApp(tmp_path, ["fix older", "fix a\nand b", "say [b]c[/b]"]), scenario, size)


def test_what_is_sent_is_remembered_once(tmp_path: Path) -> None:
    async def scenario(pilot: Pilot[None], app: PromptApp, prompt: Prompt) -> None:
        await pilot.press("a", "enter", "a", "enter", *"/new", "enter")
        assert prompt.past == ["a", "/new"]

    typing(PromptApp(tmp_path), scenario)


# Drafts


def test_a_draft_is_offered_within_a_second_and_nothing_runs_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prompt_module.DRAFT_S < 1
    # Long enough that a busy machine sees both keys in it.
    monkeypatch.setattr(prompt_module, "DRAFT_S", 2.0)

    async def scenario(pilot: Pilot[None], app: PromptApp, prompt: Prompt) -> None:
        await until(pilot, app, lambda: prompt._draft_timer is None)
        before = app.drafts
        await pilot.press("a", "b")
        assert app.drafts == before
        await until(pilot, app, lambda: app.drafts > before)
        assert app.drafts == before + 1
        assert prompt.draft == ("ab", ())
        assert prompt._draft_timer is None
        await asyncio.sleep(0.5)
        assert app.drafts == before + 1

    typing(PromptApp(tmp_path), scenario)


def test_a_draft_is_restored_with_its_attachments(tmp_path: Path) -> None:
    async def scenario(pilot: Pilot[None], app: PromptApp, prompt: Prompt) -> None:
        given = Attachment("a.txt", "text", "a.txt", 7)
        prompt.restore("half a\x1b[2J", (given,))
        assert prompt.draft == ("half a[2J", (given,))
        await pilot.press("ctrl+z")
        assert prompt.draft == ("half a[2J", (given,))
        await pilot.pause()
        assert "[a.txt 7 ×]" in app.shown
        await pilot.press("enter")
        prompt.insert("later")
        prompt.give_back(*app.sent[0])
        assert prompt.draft == ("half a[2J\n\nlater", (given,))

    typing(PromptApp(tmp_path), scenario)


# Pasting


@sizes
def test_a_long_paste_is_a_chip_that_opens_returns_and_goes(tmp_path: Path, size: tuple[int, int]) -> None:
    async def scenario(pilot: Pilot[None], app: PromptApp, prompt: Prompt) -> None:
        await pilot.press(*"see ")
        prompt.paste(LONG.replace("\n", "\r"))
        await pilot.pause()
        assert prompt.text == "see "
        assert "[Pasted text 1 ~" in app.shown
        await pilot.press("shift+tab", "enter")
        await pilot.pause()
        assert isinstance(app.screen, AttachmentView)
        assert "line 3" in app.shown
        await pilot.press("escape", "t")
        await pilot.pause()
        assert prompt.text == "see " + LONG
        assert prompt.chips == ()
        await pilot.press("ctrl+z")
        assert prompt.text == "see "
        assert prompt.draft[1] == (Attachment("Pasted text 1", LONG),)
        await pilot.press("ctrl+z")
        assert prompt.draft == ("see ", ())
        await pilot.press("ctrl+y")
        assert len(prompt.chips) == 1
        await pilot.press("shift+tab", "x")
        assert prompt.chips == ()
        assert app.focused is prompt
        await pilot.press("ctrl+z", "ctrl+a", "backspace", "delete")
        await until(pilot, app, lambda: app.focused is prompt)
        assert prompt.text == "see "

    typing(PromptApp(tmp_path), scenario, size)


def test_short_pastes_stay_text_and_lose_what_a_terminal_acts_on(tmp_path: Path) -> None:
    async def scenario(pilot: Pilot[None], app: PromptApp, prompt: Prompt) -> None:
        prompt.paste("a\r\nb\rc\x1b]0;x\x07")
        assert prompt.text == "a\nb\nc]0;x"
        prompt.clear()
        prompt.paste("x\n" * 20)
        assert prompt.chips == ()
        prompt.paste("x" * 2001)
        assert len(prompt.chips) == 1

    typing(PromptApp(tmp_path), scenario)


def test_a_megabyte_stays_attached(tmp_path: Path) -> None:
    async def scenario(pilot: Pilot[None], app: PromptApp, prompt: Prompt) -> None:
        prompt.paste("word " * 200_000)
        await pilot.press("a", "shift+tab", "t")
        assert prompt.text == "a"
        assert "too long for the text box" in app.notices
        assert len(prompt.chips) == 1
        assert TEXT_CHARACTERS < 1_000_000

    typing(PromptApp(tmp_path), scenario)


def test_clearing_and_sending_can_be_undone(tmp_path: Path) -> None:
    async def scenario(pilot: Pilot[None], app: PromptApp, prompt: Prompt) -> None:
        await pilot.press("a")
        prompt.paste(LONG)
        await pilot.press("enter")
        assert [text for text, _ in app.sent] == ["a"]
        assert app.sent[0][1][0].text == LONG
        assert prompt.draft == ("", ())
        await pilot.press("ctrl+z")
        assert prompt.draft == ("a", app.sent[0][1])

    typing(PromptApp(tmp_path), scenario)


def test_attachments_alone_can_be_sent(tmp_path: Path) -> None:
    async def scenario(pilot: Pilot[None], app: PromptApp, prompt: Prompt) -> None:
        prompt.paste(LONG)
        await pilot.press("enter")
        assert app.sent == [("", (Attachment("Pasted text 1", LONG),))]

    typing(PromptApp(tmp_path), scenario)


# Files


@sizes
def test_a_file_is_found_measured_and_attached(tree: Path, size: tuple[int, int]) -> None:
    async def count(text: str) -> int | None:
        return len(text)

    async def scenario(pilot: Pilot[None], app: PromptApp, prompt: Prompt) -> None:
        prompt.count, prompt.context = count, 8192
        await pilot.press(*"see @eng")
        await until(pilot, app, lambda: "15 B, 15 tokens; with it 15 of 8,192" in app.shown)
        await pilot.press("tab")
        await until(pilot, app, lambda: "[src/engine.py 15 ×]" in app.shown)
        assert "15 of 8,192 tokens" in app.shown
        assert prompt.text == "see @src/engine.py "
        await pilot.press(*"now", "enter")
        path = str(tree / "src" / "engine.py")
        expected = Attachment("src/engine.py", "def run(): ...\n", path, 15)
        assert app.sent == [("see @src/engine.py now", (expected,))]

    typing(PromptApp(tree), scenario, size)


def test_names_with_spaces_directories_and_undo(tree: Path) -> None:
    async def scenario(pilot: Pilot[None], app: PromptApp, prompt: Prompt) -> None:
        await pilot.press(*"@notes")
        await until(pilot, app, lambda: "my notes.txt" in app.shown)
        assert "ignored.txt" not in app.shown
        await pilot.press("enter")
        assert prompt.text == '@"my notes.txt" '
        assert app.sent == []
        await pilot.press(*"@src/")
        await until(pilot, app, lambda: "src/deep/cache.py" in app.shown)
        await pilot.press("backspace", "enter")
        await until(pilot, app, lambda: "src 2 files" in app.shown)
        await pilot.press("ctrl+z")
        assert prompt.text == '@"my notes.txt" @src'
        assert [chip.name for chip in prompt.chips] == ["my notes.txt"]
        await pilot.press("ctrl+y")
        assert [each.name for each in prompt.draft[1]] == ["my notes.txt", "src/engine.py", "src/deep/cache.py"]

    typing(PromptApp(tree), scenario)


def test_a_space_behind_a_whole_name_takes_it_and_escape_leaves(tree: Path) -> None:
    async def scenario(pilot: Pilot[None], app: PromptApp, prompt: Prompt) -> None:
        await pilot.press(*"@src/engine.py")
        await until(pilot, app, lambda: app.area.query_one(FilePicker).is_open)
        await pilot.press("space", "x")
        assert prompt.text == "@src/engine.py x"
        assert len(prompt.chips) == 1
        await pilot.press(*" @src/engine.py")
        await pilot.pause()
        await pilot.press("escape", "space", "y")
        assert len(prompt.chips) == 1
        assert prompt.text.endswith("@src/engine.py y")

    typing(PromptApp(tree), scenario)


@pytest.mark.parametrize("text", ["me@src.org", "a@", "@zzzzz"])
def test_what_names_no_file_opens_nothing(tree: Path, text: str) -> None:
    async def scenario(pilot: Pilot[None], app: PromptApp, prompt: Prompt) -> None:
        await pilot.press(*text)
        await app.workers.wait_for_complete()
        await pilot.pause()
        assert not app.area.query_one(FilePicker).is_open
        await pilot.press("enter")
        assert app.sent == [(text, ())]

    typing(PromptApp(tree), scenario)


def test_paths_are_listed_as_they_are_typed(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tree.parent))
    (tree.parent / "outside.txt").write_text("o")

    async def scenario(pilot: Pilot[None], app: PromptApp, prompt: Prompt) -> None:
        await pilot.press(*"@~/")
        await until(pilot, app, lambda: "outside.txt" in app.shown)
        await pilot.press(*"wo", "tab")
        assert prompt.text == "@~/work/"
        await until(pilot, app, lambda: "my notes.txt" in app.shown)
        await pilot.press(*"notes", "enter")
        assert prompt.text == '@"my notes.txt" '
        prompt.clear()
        prompt.insert(f"@{tree.parent}/o")
        await pilot.press(*"ut")
        await until(pilot, app, lambda: "outside.txt" in app.shown.split("╭", 2)[1])
        await pilot.press("enter")
        await until(pilot, app, lambda: [each.text for each in prompt.draft[1]] == ["o"])

    typing(PromptApp(tree), scenario, (120, 40))


def test_what_cannot_be_attached_says_why_and_the_text_stays(tree: Path) -> None:
    async def scenario(pilot: Pilot[None], app: PromptApp, prompt: Prompt) -> None:
        await pilot.press(*"@pic")
        await until(pilot, app, lambda: "pic.png" in app.shown)
        await pilot.press("enter")
        await until(pilot, app, lambda: "a PNG image, not text" in app.notices)
        assert prompt.chips == ()
        assert prompt.text == "@pic.png "
        await pilot.press("ctrl+z", "ctrl+y")
        assert prompt.chips == ()

    typing(PromptApp(tree), scenario)


@sizes
def test_something_too_large_waits_for_a_choice(
    tree: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    monkeypatch.setattr(attaching, "FILE_BYTES", 1000)
    (tree / "big.log").write_text("a line of it\n" * 1000)

    async def scenario(pilot: Pilot[None], app: PromptApp, prompt: Prompt) -> None:
        await pilot.press(*"@big")
        await until(pilot, app, lambda: "too large to attach whole" in app.shown)
        await pilot.press("enter")
        await until(pilot, app, lambda: "[big.log too large ×]" in app.shown)
        await pilot.press("enter")
        await pilot.pause()
        assert app.sent == []
        assert isinstance(app.focused, AttachmentRow)
        assert "attach its first 1.00 kB" in app.shown
        await pilot.press("enter")
        await until(pilot, app, lambda: bool(prompt.draft[1]))
        assert "cut here" in prompt.draft[1][0].text
        await pilot.press("enter")
        await until(pilot, app, lambda: len(app.sent) == 1)

    typing(PromptApp(tree), scenario, size)


def test_sending_waits_for_a_file_that_is_being_read(tree: Path) -> None:
    async def scenario(pilot: Pilot[None], app: PromptApp, prompt: Prompt) -> None:
        prompt.attach(tree / "src" / "engine.py")
        prompt.action_send()
        assert app.sent == []
        await until(pilot, app, lambda: len(app.sent) == 1)
        assert app.sent[0][1][0].name == "src/engine.py"

    typing(PromptApp(tree), scenario)


# Commands


@sizes
def test_commands_are_listed_completed_and_given(tmp_path: Path, size: tuple[int, int]) -> None:
    async def scenario(pilot: Pilot[None], app: PromptApp, prompt: Prompt) -> None:
        await pilot.press("/")
        await pilot.pause()
        assert "/adapter DIR|off" in app.shown
        assert "begin a conversation" in app.shown
        await pilot.press(*"ad", "tab")
        assert prompt.text == "/adapter "
        await until(pilot, app, lambda: "runs/my words" in app.shown)
        await pilot.press(*"word", "tab")
        assert prompt.text == "/adapter runs/my words"
        await pilot.press("enter")
        assert app.given == [("adapter", "runs/my words")]
        assert prompt.text == ""
        await pilot.press(*"/ne", "enter", *"/model", "enter", *"/model ", "down", "enter")
        assert app.given[1:] == [("new", ""), ("model", ""), ("model", "smollm2-135m")]
        await pilot.press("/", "escape")
        await pilot.pause()
        assert "Commands" not in app.shown
        assert app.sent == []

    typing(PromptApp(tmp_path), scenario, size)


@sizes
def test_an_unknown_command_says_so_and_two_slashes_send(tmp_path: Path, size: tuple[int, int]) -> None:
    async def scenario(pilot: Pilot[None], app: PromptApp, prompt: Prompt) -> None:
        await pilot.press(*"/adaptor x")
        await pilot.pause()
        assert "There is no command /adaptor. Did you mean /adapter?" in app.shown
        await pilot.press("enter")
        assert "Did you mean /adapter?" in app.notices
        assert (app.sent, app.given, prompt.text) == ([], [], "/adaptor x")
        prompt.clear()
        await pilot.press(*"//etc/hosts", "enter")
        assert [text for text, _ in app.sent] == ["/etc/hosts"]

    typing(PromptApp(tmp_path), scenario, size)


def test_without_commands_a_slash_is_text(tmp_path: Path) -> None:
    async def scenario(pilot: Pilot[None], app: PromptApp, prompt: Prompt) -> None:
        prompt.commands = ()
        await pilot.press(*"/x", "enter")
        assert [text for text, _ in app.sent] == ["/x"]

    typing(PromptApp(tmp_path), scenario)


def test_letters_typed_at_once_behind_control_r_are_searched_for(tmp_path: Path) -> None:
    async def scenario(pilot: Pilot[None], app: PromptApp, prompt: Prompt) -> None:
        for key in ("a", "ctrl+r", "f", "i", "x", "enter"):
            app.simulate_key(key)
        await until(pilot, app, lambda: prompt.text == "fix it")

    typing(PromptApp(tmp_path, ["fix it", "other"]), scenario)


# The mouse and the row


@sizes
def test_the_mouse_takes_rows_opens_and_removes_chips(tmp_path: Path, size: tuple[int, int]) -> None:
    async def scenario(pilot: Pilot[None], app: PromptApp, prompt: Prompt) -> None:
        await pilot.press("/")
        await pilot.pause()
        await pilot.click("Completion", offset=(5, 1 + COMMANDS.index(COMMANDS[2])))
        await pilot.pause()
        assert app.given == [("new", "")]
        assert app.focused is prompt
        prompt.paste(LONG)
        await pilot.pause()
        await pilot.click(AttachmentRow, offset=(3, 0))
        await pilot.pause()
        assert isinstance(app.screen, AttachmentView)
        await pilot.press("escape")
        cross = app.shown.split("\n")[-4].index("×")
        await pilot.click(offset=(cross, size[1] - 4))
        await pilot.pause()
        assert prompt.chips == ()

    typing(PromptApp(tmp_path), scenario, size)


def test_backspace_at_the_beginning_goes_to_the_row_and_removes_nothing(tmp_path: Path) -> None:
    async def scenario(pilot: Pilot[None], app: PromptApp, prompt: Prompt) -> None:
        prompt.paste(LONG)
        await pilot.press("a", "backspace", "backspace", "backspace", "backspace")
        assert isinstance(app.focused, AttachmentRow)
        assert len(prompt.chips) == 1
        await pilot.press("escape", "b")
        assert prompt.text == "b"

    typing(PromptApp(tmp_path), scenario)


def test_more_than_the_context_is_said(tmp_path: Path) -> None:
    async def scenario(pilot: Pilot[None], app: PromptApp, prompt: Prompt) -> None:
        prompt.context = 100
        prompt.paste("x" * 3000)
        await pilot.pause()
        assert "too many: ~750 of 100 tokens" in app.shown

    typing(PromptApp(tmp_path), scenario)


def test_a_row_shows_the_chosen_chip_whatever_the_room() -> None:
    chips = [Chip(f"file {number} {'n' * number}", (Attachment("x", "y" * number),)) for number in range(30)]
    for cells in (12, 40, 100):
        for selected in range(30):
            pieces, hidden = lay_out(chips, selected, cells)
            assert selected in [piece.index for piece in pieces]
            assert hidden + len(pieces) == 30
            assert all(piece.end <= cells for piece in pieces)
            assert all(a.end < b.begin for a, b in pairwise(pieces))
