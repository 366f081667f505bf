"""The row of keys at the foot of the screen: true to what can be pressed, and made anew only where that changes."""

from __future__ import annotations

from chatting import drive, screen, settle, until
from fake_backend import FakeBackend
from textual.pilot import Pilot
from textual.widgets._footer import FooterKey

from edger1.tui.app import ChatApp


def test_the_keys_are_made_anew_where_they_change_and_only_there() -> None:
    async def scenario(pilot: Pilot[None], app: ChatApp) -> None:
        await settle(pilot, app)
        made = list(app.query(FooterKey))
        assert "f1 Help" in screen(app).splitlines()[-1]
        app.refresh_bindings()
        await pilot.pause()
        assert list(app.query(FooterKey)) == made
        app.set_keymap({"help": "f9"})
        await until(pilot, lambda: "f9 Help" in screen(app).splitlines()[-1])
        assert list(app.query(FooterKey)) != made

    drive(FakeBackend(), scenario, (120, 24))
