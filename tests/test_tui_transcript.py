"""The conversation on the screen: what is mounted, what stays in place, what messages can be told."""

from __future__ import annotations

import re

import pytest
from textual.pilot import Pilot
from transcripts import Host, drive, mounted, quiet, screen, shown_words, talk

from edger1.tui.tree import Attachment, Call, Node, Tree
from edger1.tui.widgets.answer import Answer
from edger1.tui.widgets.answer_text import AnswerText
from edger1.tui.widgets.plain_text import PlainText
from edger1.tui.widgets.thinking import Thinking
from edger1.tui.widgets.transcript import Transcript
from edger1.tui.widgets.turn import Turn


def test_a_long_conversation_mounts_its_end_only_and_stays_bounded() -> None:
    tree = talk(300)
    path = [node.id for node in tree.path()]

    async def scenario(pilot: Pilot[None], app: Host) -> None:
        await app.transcript.open(tree)
        await quiet(pilot, app)
        assert "Answer 299." in screen(app)
        most = len(app.query("*"))
        assert path[-len(mounted(app)) :] == mounted(app)
        for _ in range(12):
            app.transcript.scroll_page_up(animate=False)
            await quiet(pilot, app)
            most = max(most, len(app.query("*")))
            shown = mounted(app)
            at = path.index(shown[0])
            assert path[at : at + len(shown)] == shown
        assert path[-1] not in mounted(app)
        assert most < 700
        await app.transcript.show_last()
        await quiet(pilot, app)
        assert "Answer 299." in screen(app)
        assert app.transcript.is_vertical_scroll_end

    drive(scenario)


def test_what_is_seen_stays_where_it_is_while_more_is_mounted_above() -> None:
    tree = talk(200)

    async def scenario(pilot: Pilot[None], app: Host) -> None:
        await app.transcript.open(tree)
        await quiet(pilot, app)
        for _ in range(6):
            app.transcript.scroll_page_up(animate=False)
            await pilot.pause(0)
            before = screen(app)
            await quiet(pilot, app)
            assert screen(app).split("\n")[1:15] == before.split("\n")[1:15]

    drive(scenario)


def test_any_message_can_be_shown_and_home_is_the_very_start() -> None:
    tree = talk(300)

    async def scenario(pilot: Pilot[None], app: Host) -> None:
        await app.transcript.open(tree)
        for number in (150, 31, 298, 0):
            assert await app.transcript.show(tree.path()[number].id)
            assert f" {number}" in screen(app)
            await quiet(pilot, app)
            assert f" {number}" in screen(app)
        assert not await app.transcript.show("nobody")
        await app.transcript.show_last()
        await app.transcript.show_first()
        await quiet(pilot, app)
        assert screen(app).split("\n")[1].endswith("Question 0?")
        app.transcript.scroll_to(y=app.transcript.max_scroll_y // 2, animate=False)
        await quiet(pilot, app)
        assert len(re.findall(r"Line|Answer|Question", screen(app))) > 5

    drive(scenario)


def test_opening_at_a_message() -> None:
    tree = talk(300)

    async def scenario(pilot: Pilot[None], app: Host) -> None:
        await app.transcript.open(tree, at=tree.path()[100].id)
        await quiet(pilot, app)
        assert "Question 100?" in screen(app)

    drive(scenario)


def test_switching_a_branch_remounts_only_what_differs() -> None:
    tree = talk(8)
    fork = tree.path()[3]
    other = tree.add(Node("assistant", "Another answer.", parent=fork.parent, finish="stop"))
    tree.head = tree.deepest(fork.id)

    async def scenario(pilot: Pilot[None], app: Host) -> None:
        await app.transcript.open(tree)
        await quiet(pilot, app)
        before = {turn.node.id: turn for turn in app.query(Turn)}
        await app.transcript.show(fork.id, focus=True)
        assert "‹ 1/2 ›" in screen(app)
        await pilot.press("right")
        assert app.acts == [(fork.id, "next", None)]
        assert tree.switch(fork.id, 1)
        await app.transcript.follow()
        await quiet(pilot, app)
        assert "Another answer." in screen(app)
        assert "‹ 2/2 ›" in screen(app)
        assert "Question 4?" not in screen(app)
        for turn in app.query(Turn):
            assert turn.node is other or before[turn.node.id] is turn

    drive(scenario, size=(80, 40))


def test_the_branches_can_be_clicked() -> None:
    tree = talk(2)
    tree.add(Node("assistant", "Another answer.", parent=tree.path()[0].id, finish="stop"))

    async def scenario(pilot: Pilot[None], app: Host) -> None:
        await app.transcript.open(tree)
        await quiet(pilot, app)
        row = next(y for y, line in enumerate(screen(app).split("\n")) if "‹ 2/2 ›" in line)
        column = screen(app).split("\n")[row].index("‹")
        await pilot.click(offset=(column, row))
        await pilot.pause()
        assert app.acts == [(tree.head, "previous", None)]

    drive(scenario)


def test_the_keyboard_goes_through_the_messages_and_back() -> None:
    tree = talk(40)

    async def scenario(pilot: Pilot[None], app: Host) -> None:
        await app.transcript.open(tree)
        await quiet(pilot, app)
        await pilot.press("ctrl+up")
        seen = []
        for key in ("k", "up", "shift+tab") * 5:
            assert isinstance(app.focused, Turn)
            seen.append(app.focused.node.id)
            await pilot.press(key)
            await quiet(pilot, app)
        seen = list(dict.fromkeys(seen))
        path = [node.id for node in tree.path()]
        assert seen == path[: -len(seen) - 1 : -1]
        assert len(seen) > 8
        await pilot.press("home")
        await quiet(pilot, app)
        assert isinstance(app.focused, Turn)
        assert app.focused.node.id == path[0]
        await pilot.press("escape")
        assert app.focused is app.query_one("#prompt")

    drive(scenario)


def test_a_message_says_what_it_can_do_and_does_it() -> None:
    tree = talk(1)
    cut = tree.add(Node("assistant", "It is", parent=tree.head, finish="length", figures={"figures": {"x": 1}}))

    async def scenario(pilot: Pilot[None], app: Host) -> None:
        await app.transcript.open(tree)
        await quiet(pilot, app)
        assert "Stopped at the limit of length." in screen(app)
        assert "again" not in screen(app)
        await pilot.press("ctrl+up")
        await pilot.pause()
        for word in ("e edit", "r again", "o go on", "c copy", "b branch", "i figures"):
            assert word in screen(app)
        await pilot.press("r", "o", "b", "x")
        assert app.acts == [(cut.id, "regenerate", None), (cut.id, "continue", None), (cut.id, "branch", None)]
        await pilot.press("i")
        await pilot.pause()
        assert "Nothing was measured." in screen(app)
        await pilot.press("up")
        await quiet(pilot, app)
        assert "again" not in screen(app)

    drive(scenario)


@pytest.mark.parametrize("at", [0, 1])
def test_a_message_of_either_side_is_edited_in_place(at: int) -> None:
    tree = talk(2)
    node = tree.path()[at]

    async def scenario(pilot: Pilot[None], app: Host) -> None:
        await app.transcript.open(tree)
        await app.transcript.show(node.id, focus=True)
        await pilot.press("e")
        await pilot.pause()
        await pilot.press("ctrl+j", *"New", "escape")
        assert app.acts == []
        assert isinstance(app.focused, Turn)
        await pilot.press("e")
        await pilot.pause()
        await pilot.press("!", "enter")
        await pilot.pause()
        assert app.acts == [(node.id, "edit", f"{node.text.strip()}\nNew!")]

    drive(scenario)


def test_copying_a_message_its_code_and_everything() -> None:
    tree = Tree()
    asked = tree.add(Node("user", "Two ways?"))
    said = "First:\n\n```python\nx = 1\n```\n\n- Second:\n\n  ```sh\n  echo *x*\n  ```\n"
    tree.add(Node("assistant", said, parent=asked.id, finish="stop", thought="secret"))

    async def scenario(pilot: Pilot[None], app: Host) -> None:
        await app.transcript.open(tree)
        await quiet(pilot, app)
        await pilot.press("ctrl+up", "c")
        await pilot.pause()
        assert app.clipboard == said
        assert any(f"Copied the message: {len(said)} characters" in each.message for each in app._notifications)
        await pilot.press("x")
        await pilot.pause()
        assert "echo *x*" in screen(app)
        await pilot.press("2")
        await pilot.pause()
        assert app.clipboard == "echo *x*"
        await pilot.press("x", "down", "up", "enter")
        await pilot.pause()
        assert app.clipboard == "x = 1"
        await pilot.press("C")
        await pilot.pause()
        assert app.clipboard == f"## You\n\nTwo ways?\n\n## Answer\n\n{said.strip()}\n"
        app.copy_to_clipboard("")
        await pilot.click(AnswerText, offset=(10, 2))
        await pilot.pause()
        assert app.clipboard == "x = 1"

    drive(scenario, size=(80, 40))


def test_a_selection_across_messages_is_what_was_written() -> None:
    long = "word " * 60 + "end"
    tree = Tree()
    tree.add(Node("user", f"{long}\n  indented"))
    tree.add(Node("assistant", "One *two*.\n\n```\na\n  b\n```", parent=tree.head, finish="stop"))

    async def scenario(pilot: Pilot[None], app: Host) -> None:
        await app.transcript.open(tree)
        await quiet(pilot, app)
        app.screen.text_select_all()
        await pilot.pause()
        chosen = app.screen.get_selected_text() or ""
        assert chosen.startswith(f"{long}\n  indented\nOne two.\na\n  b")
        app.screen.clear_selection()
        lines = screen(app).split("\n")
        row = next(y for y, line in enumerate(lines) if "indented" in line)
        await pilot.mouse_down(offset=(lines[row - 1].index("end"), row - 1))
        await pilot.hover(offset=(lines[row].index("dented"), row))
        await pilot.mouse_up(offset=(lines[row].index("dented"), row))
        await pilot.pause()
        assert (app.screen.get_selected_text() or "").startswith("end\n  in")
        assert app.focused is app.query_one("#prompt")

    drive(scenario)


def test_reasoning_of_a_stored_answer_opens_for_ever() -> None:
    tree = Tree()
    tree.add(Node("user", "?"))
    tree.add(Node("assistant", "Four.", parent=tree.head, finish="stop", thought="two and two", thought_s=4.2))

    async def scenario(pilot: Pilot[None], app: Host) -> None:
        for _ in range(2):
            await app.transcript.open(tree)
            await quiet(pilot, app)
            assert "▸ Thought for 4.2 s · 3 words" in screen(app)
            assert not app.query("Thinking > PlainText")
            await pilot.press("ctrl+up", "enter")
            await quiet(pilot, app)
            assert "two and two" in screen(app)
            await pilot.press("t")
            await quiet(pilot, app)
            assert "two and two" not in screen(app)

    drive(scenario)


def test_reasoning_comes_folded_where_the_user_wants_it_so() -> None:
    async def scenario(pilot: Pilot[None], app: Host) -> None:
        answer = Answer(Node("assistant"), opened=False)
        await app.transcript.say(answer)
        await answer.think("two and ")
        await answer.think("two")
        await pilot.pause(0.2)
        assert "two and" not in screen(app)
        assert "▸ Thinking · 3 words" in screen(app)
        await answer.feed("Four.")
        await answer.finish()
        assert answer.query_one(Thinking).folded

    drive(scenario)


def test_an_answer_goes_on_where_it_was_cut() -> None:
    tree = talk(1)
    node = tree.add(Node("assistant", "It is *fo", parent=tree.head, finish="length"))

    async def scenario(pilot: Pilot[None], app: Host) -> None:
        await app.transcript.open(tree)
        await quiet(pilot, app)
        answer = app.transcript.answer(node.id)
        assert answer is not None
        await answer.resume()
        assert "Stopped" not in screen(app)
        await answer.feed("ur*. ")
        await answer.feed("Yes.")
        node.finish = "stop"
        await answer.finish()
        await pilot.pause()
        assert "It is four. Yes." in screen(app)

    drive(scenario)


def test_an_answer_that_comes_stays_mounted_while_the_user_reads_far_above() -> None:
    tree = talk(300)

    async def scenario(pilot: Pilot[None], app: Host) -> None:
        await app.transcript.open(tree)
        node = tree.add(Node("assistant", parent=tree.head))
        answer = Answer(node)
        await app.transcript.say(answer)
        await answer.feed("The beginning")
        await app.transcript.show_first()
        await quiet(pilot, app)
        before = screen(app)
        await answer.feed(" and the end.")
        await answer.finish("")
        await quiet(pilot, app)
        assert screen(app) == before
        node.text, node.finish = answer.text, "stop"
        await app.transcript.show_last()
        await quiet(pilot, app)
        assert "The beginning and the end." in screen(app)
        assert screen(app).count("The beginning") == 1

    drive(scenario)


def test_a_long_answer_is_whole_and_settles_what_is_written() -> None:
    said = "Part {} *is* here, with a few more words.", "- item {}\n\n  and more", "```py\nitem = {}\n```"
    text = "\n\n".join(said[at % 3].format(at) for at in range(90))

    async def scenario(pilot: Pilot[None], app: Host) -> None:
        streamed, opened = Answer(Node("assistant")), Answer(Node("assistant", text, finish="stop"))
        await app.transcript.say(streamed, opened)
        for at in range(0, len(text), 40):
            await streamed.feed(text[at : at + 40])
            await pilot.pause(0.01)
        await streamed.finish("")
        await pilot.pause()
        for answer in (streamed, opened):
            shown = re.findall(r"(?:Part|item|item =) (\d+)", shown_words(answer))
            assert [int(number) for number in shown] == list(range(90))
        (drawn,) = streamed.query(AnswerText)
        assert drawn.source == text
        assert drawn._tail_at > 0

    drive(scenario)


def test_calls_and_attachments_have_their_place() -> None:
    tree = Tree()
    tree.add(Node("user", "Sum?", attachments=(Attachment("a.py", "x\ny\n"), Attachment("b", "", tokens=1200))))
    call = tree.add(Node("assistant", parent=tree.head, finish="tools", calls=(Call("1", "add", {}),)))
    tree.add(Node("tool", "3", parent=call.id, call_id="1"))
    tree.add(Node("assistant", "Three.", parent=tree.head, finish="stop"))
    asked: list[tuple[Node, list[str]]] = []

    def called(node: Node, results: object) -> list[PlainText]:
        asked.append((node, [each.text for each in results]))  # type: ignore[attr-defined]
        return [PlainText("called add")]

    async def scenario(pilot: Pilot[None], app: Host) -> None:
        await app.transcript.open(tree)
        await quiet(pilot, app)
        shown = screen(app)
        assert re.search(r"a\.py · 2 lines.*b · 1,200 tokens.*Sum\?.*called add.*Three\.", shown, re.DOTALL)
        answer = app.transcript.answer(tree.head or "")
        assert answer is not None
        await answer.add(PlainText("another"))
        await pilot.pause()
        assert re.search(r"Three\..*another", screen(app), re.DOTALL)

    drive(scenario, transcript=Transcript(called=called))
    assert asked == [(call, ["3"])]


def test_nothing_is_left_running() -> None:
    tree = talk(100)

    async def scenario(pilot: Pilot[None], app: Host) -> None:
        await app.transcript.open(tree)
        await quiet(pilot, app)
        nodes = [app, app.screen, *app.query("*")]
        assert not [timer for node in nodes for timer in node._timers if timer._active.is_set() and not timer._repeat]

    drive(scenario)


@pytest.mark.parametrize("size", [(60, 15), (20, 6)])
def test_a_tiny_terminal(size: tuple[int, int]) -> None:
    tree = talk(50)

    async def scenario(pilot: Pilot[None], app: Host) -> None:
        await app.transcript.open(tree)
        await quiet(pilot, app)
        await pilot.press("ctrl+up", "e")
        await pilot.pause()
        await pilot.resize_terminal(size[0] - 5, size[1])
        await pilot.press("escape", "k", "k", "home")
        await quiet(pilot, app)
        assert "0?" in screen(app)

    drive(scenario, size=size)
