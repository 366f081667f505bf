"""What all screens over the conversation share: they come and go while keys, clicks and the engine go on."""

from __future__ import annotations

from typing import TypeVar

from textual.await_complete import AwaitComplete
from textual.screen import ModalScreen

Result = TypeVar("Result")


class Over(ModalScreen[Result]):
    """A screen that takes keys only while it is whole, and ends once, whatever is over it then."""

    _ended = False
    _awaits_top: tuple[Result | None, ...] = ()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Let no key act before all of the screen is there, nor when it is about to go."""
        if self._ended or not self.is_mounted:
            return False
        return super().check_action(action, parameters)

    def dismiss(self, result: Result | None = None) -> AwaitComplete:
        """End with a result. A second one comes too late; under another screen, this one ends when that has."""
        if not self._ended and self in self.app.screen_stack:
            if self.app.screen is self:
                self._ended = True
                return super().dismiss(result)
            self._awaits_top = (result,)
        return AwaitComplete.nothing()

    def on_screen_resume(self) -> None:
        """End now where that was asked for while another screen was over this one."""
        if self._awaits_top:
            self.call_later(self._end)

    def _end(self) -> None:
        # Nothing that could be waited for, as a screen may not wait for its own end.
        self.dismiss(*self._awaits_top)
