"""Colours that can be read, and the user's own, which may be wrong in any way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from textual.color import Color

from edger1.tui.contrast import BACKGROUNDS, ENHANCED, MINIMUM, MUTED, TEXT, ratio, readings
from edger1.tui.themes import CONTRAST, CONTRAST_LIGHT, DARK, LIGHT, THEMES
from edger1.tui.user_themes import read_themes


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("#000000", "#ffffff", 21.0),
        ("#777777", "#ffffff", 4.48),  # the grey that famously just fails AA on white
        ("#767676", "#ffffff", 4.54),
        ("#ff0000", "#ffffff", 4.0),
        ("#123456", "#123456", 1.0),
    ],
)
def test_the_contrast_ratio_is_wcags(one: str, other: str, expected: float) -> None:
    assert ratio(Color.parse(one), Color.parse(other)) == pytest.approx(expected, abs=0.005)
    assert ratio(Color.parse(other), Color.parse(one)) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
def test_every_theme_can_be_read(theme: object) -> None:
    assert theme in (DARK, LIGHT, CONTRAST, CONTRAST_LIGHT)
    assert len(readings(theme, MUTED)) == len(MUTED) * len(BACKGROUNDS)  # type: ignore[arg-type]
    assert readings(theme, TEXT)[0].ratio >= ENHANCED  # type: ignore[arg-type]
    assert readings(theme, MUTED)[0].ratio >= MINIMUM  # type: ignore[arg-type]


@pytest.mark.parametrize("theme", [CONTRAST, CONTRAST_LIGHT], ids=lambda theme: theme.name)
def test_in_high_contrast_every_word_has_seven_and_the_cursor_too(theme: object) -> None:
    lowest = readings(theme, (*MUTED, "text-disabled", "foreground-disabled"))[0]  # type: ignore[arg-type]
    assert lowest.ratio >= ENHANCED, lowest
    colours = theme.to_color_system().generate()  # type: ignore[attr-defined]
    for text, ground in (
        ("block-cursor-foreground", "block-cursor-background"),
        ("foreground", "input-selection-background"),
    ):
        assert ratio(Color.parse(colours[text]), Color.parse(colours[ground])) >= ENHANCED


def test_a_theme_of_the_users_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "mauve.toml").write_text(
        'dark = false\nprimary = "#5b2a86"\nbackground = "#fffaff"\nforeground = "#201020"\n'
        '[variables]\ntext-muted = "#504050"\n'
    )
    (tmp_path / "notes.txt").write_text("no theme")
    found = read_themes(tmp_path)
    assert found.problems == ()
    (theme,) = found.themes
    assert (theme.name, theme.dark, theme.primary) == ("mauve", False, "#5b2a86")
    assert theme.to_color_system().generate()["text-muted"] == "#504050"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'primary = "#8ab4f8"\npirmary = "#fff"\n',
            "mine.toml:2: 'pirmary' is no setting of a theme. Did you mean prim",
        ),
        ('primary = "#8ab4f8"\nzzz = 1\n', "mine.toml:2: 'zzz' is no setting of a theme. Known: primary"),
        (
            '\nprimary = "very blue"\n',
            "mine.toml:2: primary is 'very blue', which is no colour; write it as \"#8ab4f8\"",
        ),
        ("primary = 3\n", "mine.toml:1: primary is 3, but a colour"),
        ('dark = 1\nprimary = "red"\n', "mine.toml:1: dark is 1, but true or false"),
        ('primary = "red"\nvariables = 4\n', "mine.toml:2: variables is 4, but a table"),
        ('primary = "red"\n[variables]\ntext = 4\n', "mine.toml:3: text is 4, but a text in quotes"),
        ('primary = "red"\n[variables]\ntext = "nonsense"\n', "mine.toml:3: text is 'nonsense', which is no colour"),
        ('primary = "red"\n[variables]\nborder = "auto x%"\n', "mine.toml:3: border is 'auto x%', which is no colour"),
        ('primary = "red"\n[variables]\nlink-style = "wavy"\n', "mine.toml:3: link-style has the unknown style 'wavy'"),
        ('primary = "red"\n[variables]\ntext-mutd = "red"\n', "'text-mutd' is no theme variable. Did you mean text-m"),
        ('background = "black"\n', "mine.toml sets no primary colour"),
        ('primary = "red"\nprimary = = 2\n', "mine.toml:2 is not valid TOML"),
    ],
)
def test_a_bad_theme_is_told_of_with_its_line_and_the_others_are_there(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "good.toml").write_text('primary = "#8ab4f8"\n')
    (tmp_path / "mine.toml").write_text(text)
    found = read_themes(tmp_path)
    assert [theme.name for theme in found.themes] == ["good"]
    (problem,) = found.problems
    assert message in problem


def test_files_that_cannot_be_themes_stop_nothing(tmp_path: Path) -> None:
    (tmp_path / "good.toml").write_text('primary = "#8ab4f8"\n')
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "huge.toml").write_text("# " + "x" * 1_100_000)
    (tmp_path / "edger1-dark.toml").write_text('primary = "red"\n')
    loop = tmp_path / "loop.toml"
    loop.symlink_to(loop)
    if os.geteuid():
        (tmp_path / "closed.toml").touch(0o000)
    found = read_themes(tmp_path, taken={"edger1-dark"})
    assert [theme.name for theme in found.themes] == ["good"]
    told = " ".join(found.problems)
    for words in (
        "binary.toml is not UTF-8",
        "folder.toml cannot be read",
        "huge.toml is larger",
        "built-in",
        "loop.to",
    ):
        assert words in told, told
    assert read_themes(tmp_path / "none") == read_themes(tmp_path / "good.toml")


def test_text_that_can_hardly_be_read_is_told_of_and_can_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "grey.toml").write_text(
        'primary = "#888888"\nforeground = "#777777"\nbackground = "#666666"\nsurface = "#000"\npanel = "#000"\n'
    )
    found = read_themes(tmp_path)
    assert [theme.name for theme in found.themes] == ["grey"]
    assert "text on background has a contrast of 1.3" in found.problems[0]
