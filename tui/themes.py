"""The chat's own colours: quiet, with one colour for the user, one for reasoning, one for trouble.

Muted words keep a contrast of 4.5 on every background; in the high-contrast themes all words keep 7 (WCAG 2.2, levels
AA and AAA, see `edger1.tui.contrast`).
"""

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
    variables={"foreground-muted": "#5b6169"},
)
CONTRAST = Theme(
    name="edger1-contrast",
    primary="#7cc4ff",
    secondary="#d0d0d0",
    accent="#e6b3ff",
    warning="#ffd75f",
    error="#ffaba3",
    success="#87f0a5",
    foreground="#ffffff",
    background="#000000",
    surface="#000000",
    panel="#1c1c1c",
    dark=True,
    variables={
        "text": "#ffffff",
        "text-muted": "#e0e0e0",
        "text-disabled": "#b8b8b8",
        "foreground-muted": "#e0e0e0",
        "foreground-disabled": "#b8b8b8",
        "block-cursor-foreground": "#000000",
        "border": "#ffffff",
        "border-blurred": "#b8b8b8",
        "scrollbar": "#b8b8b8",
        "input-selection-background": "#00408a",
    },
)
CONTRAST_LIGHT = Theme(
    name="edger1-contrast-light",
    primary="#003a9b",
    secondary="#3d3d3d",
    accent="#5b0094",
    warning="#5c3a00",
    error="#8a0000",
    success="#00491c",
    foreground="#000000",
    background="#ffffff",
    surface="#ffffff",
    panel="#ededed",
    dark=False,
    variables={
        "text": "#000000",
        "text-muted": "#2b2b2b",
        "text-disabled": "#4a4a4a",
        "foreground-muted": "#2b2b2b",
        "foreground-disabled": "#4a4a4a",
        "block-cursor-foreground": "#ffffff",
        "border": "#000000",
        "border-blurred": "#4a4a4a",
        "scrollbar": "#4a4a4a",
        "input-selection-background": "#b8d4ff",
    },
)
COLOURLESS = Theme(
    name="edger1-colourless",
    ansi=True,
    primary="ansi_default",
    secondary="ansi_default",
    warning="ansi_default",
    error="ansi_default",
    success="ansi_default",
    accent="ansi_default",
    foreground="ansi_default",
    background="ansi_default",
    surface="ansi_default",
    panel="ansi_default",
    boost="ansi_default",
    variables={
        "ansi-background": "ansi_black",
        "ansi-foreground": "ansi_white",
        # Textual drops "reverse" on its way to what such widgets draw.
        "block-cursor-text-style": "bold underline",
        "block-cursor-blurred-text-style": "underline",
        "input-cursor-text-style": "reverse",
        "button-focus-text-style": "bold reverse",
        "link-style": "underline",
    },
)
"""For a terminal without colours: what is chosen is underlined or reversed."""
THEMES = (DARK, LIGHT, CONTRAST, CONTRAST_LIGHT)

COLOURLESS_CSS = """
TextArea:nocolor .text-area--selection { text-style: reverse; }
Input:nocolor > .input--selection { text-style: reverse; }
Screen:nocolor .screen--selection { text-style: reverse; }
"""
"""What the app adds to its own, since a selection is otherwise told by its background alone."""
