"""What all screens over the conversation share: they come and go while keys, clicks and the engine go on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from textual.await_complete import AwaitComplete
from textual.message import Message
from textual.screen import ModalScreen, Screen
from textual.worker import NoActiveWorker, get_current_worker

Result = TypeVar("Result")


if TYPE_CHECKING:
    _Mixed = Screen[Any]
else:
    # Textual looks for styles along the first base that is a node; this one has none.
    _Mixed = object


class EndsOnce(_Mixed):
    """What makes a screen take keys only while it is whole, and end once, whatever is over it then."""

    _ended = False
    _awaits_top: tuple[Any, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether all of it is there; whoever has waited for something asks before touching its widgets."""
        return not self._ended and self.is_attached and bool(self.children)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Let no key act before all of the screen is there, nor when it is about to go."""
        if not self.whole:
            return False
        return super().check_action(action, parameters)

    async def _on_message(self, message: Message) -> None:
        # What its widgets still had to say is about what is no longer there.
        if not self._ended or message.control is None:
            await super()._on_message(message)

    def dismiss(self, result: Any = None) -> AwaitComplete:
        """End with a result. A second one comes too late; under another screen, this one ends when that has."""
        if not self._ended and self in self.app.screen_stack:
            if self.app.screen is self:
                self._ended = True
                self._call_off()
                return super().dismiss(result)
            self._awaits_top = (result,)
        return AwaitComplete.nothing()

    def _call_off(self) -> None:
        """Let nothing go on that would show what it has found here, but for whoever ends the screen."""
        try:
            own = get_current_worker()
        except NoActiveWorker:
            own = None
        for worker in list(self.workers):
            if worker.node is self and worker is not own:
                worker.cancel()

    def on_screen_resume(self) -> None:
        """End now where that was asked for while another screen was over this one."""
        if self._awaits_top:
            self.call_later(self._end)

    def _end(self) -> None:
        # Nothing that could be waited for, as a screen may not wait for its own end.
        self.dismiss(*self._awaits_top)


class Over(EndsOnce, ModalScreen[Result]):
    """A screen over the conversation."""
