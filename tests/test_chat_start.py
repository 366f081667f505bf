"""The chat stands at once: what its first screen does not need is not imported before it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edger1.config import DEFAULT_MODEL

# Runs the command up to where the screen would be drawn, and tells what has been imported by then.
PROGRAM = """
import gc, json, sys
sys.stdin.isatty = sys.stdout.isatty = lambda: True
from edger1.tui import app
def run(chat, backend):
    told = {"modules": sorted(sys.modules), "engine": backend.pid, "collecting": gc.isenabled()}
    chat._on_painted()
    print(json.dumps(told | {"collecting_after": gc.isenabled(), "model": chat.session.model}))
app.run = run
sys.argv = ["edger1", "chat", *sys.argv[1:]]
from edger1.__main__ import main
main()
"""
HEAVY = ("numpy", "mlx", "mlx_lm", "pydantic", "mcp", "huggingface_hub", "markdown_it", "pygments", "pathspec")


def started(home: Path, *words: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        capture_output=True,
        text=True,
        env={**os.environ, "EDGER1_HOME": str(home), "TERM": "xterm-256color"},
        timeout=60,
        check=True,
    )
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize("words", [(), ("tiny",), ("tiny", "--system", "Be brief.", "--offline")], ids=len)
def test_the_first_screen_needs_little(tmp_path: Path, tiny_folder: Path, words: tuple[str, ...]) -> None:
    models = tmp_path / "v1" / "models"
    models.mkdir(parents=True)
    for name in ("tiny", DEFAULT_MODEL):
        (models / name).symlink_to(tiny_folder)
    (tmp_path / "config.toml").write_text('[mcp.none]\ncommand = "true"\n')
    told = started(tmp_path, *words)
    assert [name for name in HEAVY if name in told["modules"]] == []
    # Nor does the engine's start take the processor from it.
    assert told["engine"] is None
    assert told["model"] == (words[0] if words else DEFAULT_MODEL)


def test_garbage_is_looked_for_once_the_screen_is_there(tmp_path: Path) -> None:
    told = started(tmp_path)
    assert not told["collecting"]
    assert told["collecting_after"]
