"""Conversations on disk: one SQLite file that several windows use at once. Nothing here knows of the screen."""

from __future__ import annotations

from edger1.tui.store.records import Hit, Stored, Summary
from edger1.tui.store.store import Store

__all__ = ["Hit", "Store", "Stored", "Summary"]
