"""Where things live on disk.

Everything EdgeR1 keeps lies under one data folder, `EDGER1_HOME` or else the platform's usual place. What is in it is
under a version number, so that a later layout can stand beside this one and move it over.
"""

from __future__ import annotations

import os
from pathlib import Path

LAYOUT_VERSION = "v1"


def home() -> Path:
    """Return the data folder itself; it may not exist yet."""
    if override := os.environ.get("EDGER1_HOME"):
        return Path(override).expanduser()
    import platformdirs

    return Path(platformdirs.user_data_dir("edger1", appauthor=False))


def data() -> Path:
    """Return the versioned part of the data folder."""
    return home() / LAYOUT_VERSION


def models() -> Path:
    """Return the folder that holds one folder a model."""
    return data() / "models"


def downloads() -> Path:
    """Return the folder for what is being fetched; nothing in it is ever taken for a model."""
    return data() / "downloads"


def user_config() -> Path:
    """Return the user's config.toml (defaults for memory, context, threads, theme, offline)."""
    return home() / "config.toml"


def user_themes() -> Path:
    """Return the folder of the user's own themes of the chat, one TOML file each."""
    return home() / "themes"


def user_keys() -> Path:
    """Return the user's keys.toml, which gives the chat's commands other keys."""
    return home() / "keys.toml"


def user_registry() -> Path:
    """Return the user's models.toml, which adds to and overrides the one in the package."""
    return home() / "models.toml"


def assets() -> Path:
    """Return the folder of what comes with the program: one folder a model."""
    return Path(__file__).parent / "assets"
