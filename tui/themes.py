"""The chat's own colours: quiet, with one colour for the user, one for reasoning, one for trouble."""

from __future__ import annotations

from textual.theme import Theme

DARK = Theme(
    name="edger1-dark",
    primary="#8ab4f8",
    secondary="#7d8799",
    accent="#c3a6e8",
    warning="#e6c07b",
    error="#f28b82",
    success="#8fce9b",
    foreground="#dcdfe4",
    background="#14161a",
    surface="#1e2127",
    panel="#262a32",
    dark=True,
)
LIGHT = Theme(
    name="edger1-light",
    primary="#2459b5",
    secondary="#69707d",
    accent="#7440a8",
    warning="#8a5a00",
    error="#b3261e",
    success="#1e6b34",
    foreground="#1f2328",
    background="#fbfbf9",
    surface="#f0f0ec",
    panel="#e6e6e1",
    dark=False,
)
THEMES = (DARK, LIGHT)
