"""What the terminal can show, and what its user asks for: decided from the environment, before anything is drawn."""

from __future__ import annotations

from collections.abc import Mapping

NO_FULL_SCREEN = ("", "dumb", "unknown", "emacs")
"""Values of TERM whose terminals cannot move the cursor."""
_YES = ("1", "true", "yes", "on")
_COLOURS_MIN = 8


def accessible(environ: Mapping[str, str], configured: bool = False) -> bool:
    """Whether words in lines are wanted in place of a screen: `EDGER1_ACCESSIBLE`, else the user's config.toml.

    A screen reader reads a terminal as a stream of lines. A full screen redraws it, hides its cursor and fills it with
    borders, which is read out as noise; no terminal takes hints that would help.
    """
    said = environ.get("EDGER1_ACCESSIBLE", "").strip().lower()
    return said in _YES if said else configured


def full_screen(environ: Mapping[str, str]) -> bool:
    """Whether TERM names a terminal that a full screen can be drawn on."""
    return environ.get("TERM", "").strip().lower() not in NO_FULL_SCREEN


def in_lines(environ: Mapping[str, str], stdin_tty: bool, stdout_tty: bool, *, configured: bool = False) -> bool:
    """Whether somebody types who cannot be shown a full screen or wants none; `configured`: see `accessible`."""
    return stdin_tty and (not stdout_tty or not full_screen(environ) or accessible(environ, configured))


def colourless(environ: Mapping[str, str], colours: int | None = None) -> bool:
    """Whether no colour may be used: `NO_COLOR` (https://no-color.org), or a terminal that has none.

    `colours` is how many terminfo says that there are, see `terminfo_colours`; None: not known.
    """
    if environ.get("NO_COLOR"):
        return True
    if not full_screen(environ):
        return True
    if environ.get("COLORTERM"):
        return False
    return colours is not None and colours < _COLOURS_MIN


def terminfo_colours() -> int | None:
    """Return how many colours the terminal has by its terminfo entry, or None where there is no such entry."""
    try:
        import curses

        curses.setupterm(fd=1)
        return curses.tigetnum("colors")
    except Exception:
        # curses.error cannot be named where the module is missing; a terminal without an entry is not known.
        return None
