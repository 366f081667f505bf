"""How well a theme's text can be read: contrast ratios as WCAG 2.2 defines them (success criteria 1.4.3 and 1.4.6)."""

from __future__ import annotations

from dataclasses import dataclass

from textual.color import Color
from textual.theme import Theme

ENHANCED = 7.0
"""What WCAG's level AAA asks of text."""
MINIMUM = 4.5
"""What WCAG's level AA asks of text."""
BACKGROUNDS = ("background", "surface", "panel")
TEXT = ("foreground", "text")
MUTED = (
    "text-muted", "foreground-muted", "text-primary", "text-secondary", "text-accent", "text-warning", "text-error",
    "text-success", "primary", "accent", "warning", "error", "success",
)  # fmt: skip
"""Colours that words of less weight, or of a meaning, are written in."""


@dataclass(frozen=True)
class Reading:
    """The contrast of one colour of text on one background, 1 to 21."""

    text: str
    background: str
    ratio: float


def ratio(one: Color, other: Color) -> float:
    """Return WCAG's contrast ratio of two opaque colours, 1 to 21."""
    lighter, darker = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def readings(theme: Theme, names: tuple[str, ...]) -> list[Reading]:
    """Return the contrast of each of a theme's colours in `names` on each background, the lowest first."""
    colours = theme.to_color_system().generate()
    found = []
    for background in BACKGROUNDS:
        ground = Color.parse(colours[background])
        found += [Reading(name, background, ratio(colour(colours[name], ground), ground)) for name in names]
    return sorted(found, key=lambda each: each.ratio)


def colour(value: str, ground: Color) -> Color:
    """Return what a colour of a theme's variables, "auto 60%" among them, comes out as on a background."""
    name, _, share = value.partition(" ")
    alpha = float(share.rstrip("%")) / 100 if share else 1.0
    if name == "auto":
        return ground + ground.get_contrast_text(alpha)
    found = Color.parse(name)
    return ground + (found.multiply_alpha(alpha) if share else found)


def _luminance(colour: Color) -> float:
    """WCAG's relative luminance of an sRGB colour."""
    red, green, blue = (
        each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4
        for each in (channel / 255 for channel in colour.rgb)
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
