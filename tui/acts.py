"""What can be done with messages: other answers, other words, other branches."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence

from textual.widget import Widget

from edger1.tui.base import ChatBase
from edger1.tui.clean import clean
from edger1.tui.session import SessionEvent, State
from edger1.tui.tree import Node
from edger1.tui.widgets.prompt import Prompt
from edger1.tui.widgets.tool_call import CallView
from edger1.tui.widgets.transcript import Transcript
from edger1.tui.widgets.turn import Turn


class Acts(ChatBase, inherit_bindings=False):
    """The part of the app that takes what the user wants of a message."""

    async def act(self, event: Transcript.Act) -> None:
        """Do to a message what the user asks for."""
        session, transcript = self.session, self.stage.transcript
        if event.node_id not in session.tree:
            return
        node = session.tree[event.node_id]
        if event.action in ("previous", "next"):
            if self.busy("another branch is shown"):
                return
            if session.talk.switch(node.id, -1 if event.action == "previous" else 1):
                await transcript.follow(session.tree)
                await transcript.show(session.tree.path()[len(session.tree.path(node.id)) - 1].id, focus=True)
        elif event.action == "branch":
            if not self.busy("the conversation goes on elsewhere"):
                await self._branch(node)
        elif event.action == "edit" and node.role == "assistant":
            if self.busy("an answer is changed"):
                await self._edit(node)
            else:
                session.edit_answer(node.id, event.text or "")
                await transcript.follow(session.tree)
                self.query_one(Prompt).focus()
        elif event.action == "edit":
            if not self._go(session.ask_instead(node.id, event.text or "")):
                await self._edit(node)
        elif event.action == "regenerate":
            asked = node.id if node.role == "user" else node.parent
            if asked is not None:
                self._go(session.answer(asked))
        elif event.action == "continue":
            await self._continue(node)

    async def _branch(self, node: Node) -> None:
        """Go on from a message: after an answer, or, from a question, with other words in its place."""
        if node.role == "user":
            self.session.talk.show(node.parent)
            self.query_one(Prompt).give_back(node.text, node.attachments)
        else:
            self.session.talk.show(node.id)
        if self.session.tree.path():
            await self.stage.transcript.follow(self.session.tree)
        else:
            await self.show_talk()
        self.query_one(Prompt).focus()

    async def _continue(self, node: Node) -> None:
        if self.busy("an answer goes on") or not self.ready():
            return
        self.session.engage()
        self.session.talk.show(node.id)
        transcript = self.stage.transcript
        await transcript.follow(self.session.tree)
        await transcript.show_last()
        answer = transcript.answer(node.id)
        if answer is None:
            self.session.state = State.READY
            return
        await answer.resume()
        self.run_worker(self.follow(self.session.go_on(node.id), answer=answer), name="ask", group="engine")
        self.query_one(Prompt).focus()

    def _go(self, events: AsyncGenerator[SessionEvent, None]) -> bool:
        if self.busy("something else is asked") or not self.ready():
            return False
        self.session.engage()
        self.run_worker(self.follow(events), name="ask", group="engine")
        self.query_one(Prompt).focus()
        return True

    async def _edit(self, node: Node) -> None:
        for turn in self.query(Turn):
            if turn.node is node:
                await turn.begin_edit()

    # The same from anywhere, for the latest message

    def _latest(self, role: str) -> Node | None:
        return next((node for node in reversed(self.session.tree.path()) if node.role == role), None)

    def action_retry(self) -> None:
        """Ask for another answer to the last question."""
        asked = self._latest("user")
        if asked is None:
            self.notify("There is no question yet.", markup=False)
        else:
            self._go(self.session.answer(asked.id))

    async def action_continue(self) -> None:
        """Go on with the last answer."""
        node = self._latest("assistant")
        if node is None:
            self.notify("There is no answer yet.", markup=False)
        else:
            await self._continue(node)

    async def action_branch(self, step: int) -> None:
        """Show another version of the last message that has several."""
        if self.busy("another branch is shown"):
            return
        tree = self.session.tree
        for node in reversed(tree.path()):
            if self.session.talk.switch(node.id, step):
                await self.stage.transcript.follow(tree)
                return
        self.notify("No message here has another version.", markup=False)

    async def action_edit(self) -> None:
        """Edit the last question in its place."""
        node = self._latest("user")
        if node is None:
            self.notify("There is no question yet.", markup=False)
            return
        await self.stage.transcript.show(node.id, focus=True)
        await self._edit(node)

    def action_copy(self, what: str = "") -> None:
        """Copy the last answer, or "all" of the conversation."""
        if what == "all":
            self.stage.transcript.copy_all()
            return
        node = self._latest("assistant")
        if node is None:
            self.notify("There is no answer yet.", markup=False)
            return
        text = clean(node.text)
        self.copy_to_clipboard(text)
        self.notify(f"Copied the answer: {len(text):,} characters.", markup=False)

    def called(self, node: Node, results: Sequence[Node]) -> Iterable[Widget]:
        """Return what shows an answer's calls, with what came of them."""
        found = {each.call_id: each.text for each in results}
        return [
            CallView(
                call.name,
                call.arguments,
                stage="done" if call.id in found else "stopped",
                result=found.get(call.id),
            )
            for call in node.calls
        ]
