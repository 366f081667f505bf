"""How rows are understood: the formats that chats, answers and reasoning traces are kept in."""

from __future__ import annotations

KINDS = ("messages", "conversations", "completion", "trace", "preference", "prompt", "text")
