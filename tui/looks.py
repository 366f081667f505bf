"""What the chat looks like: the user's theme, remembered from one time to the next."""

from __future__ import annotations

from pathlib import Path

from edger1 import paths
from edger1.fetch.place import write_atomically


def remembered(path: Path | None = None) -> str | None:
    """Return the theme that was chosen last; None where none was, or the file cannot be read."""
    try:
        return (path or _file()).read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def remember(theme: str, path: Path | None = None) -> None:
    """Keep a theme for the next time; a failure to write is no failure."""
    target = path or _file()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, theme + "\n")
    except OSError:
        return


def _file() -> Path:
    return paths.data() / "theme"
