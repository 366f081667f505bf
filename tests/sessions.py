"""What tests of a conversation without a screen do with one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fake_backend import FakeBackend

from edger1.tui.session import Session
from edger1.tui.tree import Node


async def play(events: AsyncIterator[Any]) -> list[Any]:
    return [event async for event in events]


async def ready(backend: FakeBackend, **given: Any) -> Session:
    session = Session(backend, model="smollm2", **given)
    await play(session.load())
    return session


def said(session: Session) -> list[str]:
    return [node.text for node in session.tree.path()]


async def ask(session: Session, text: str) -> list[Any]:
    return await play(session.ask(Node("user", text)))
