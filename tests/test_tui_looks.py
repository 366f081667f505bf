"""The theme that is remembered."""

from __future__ import annotations

from pathlib import Path

from edger1.tui.looks import remember, remembered


def test_a_theme_is_remembered_and_trouble_is_none(tmp_path: Path) -> None:
    path = tmp_path / "v1" / "theme"
    assert remembered(path) is None
    remember("nord", path)
    assert remembered(path) == "nord"
    path.write_bytes(b"\xff")
    assert remembered(path) is None
    remember("nord", path / "below a file")
