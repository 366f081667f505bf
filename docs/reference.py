"""Write docs/cli.md from the commands' own help: python docs/reference.py [--check]."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

COMMANDS = (
    (),
    ("chat",),
    ("run",),
    ("demo",),
    ("pull",),
    ("convert",),
    ("models",),
    ("models", "list"),
    ("models", "show"),
    ("models", "path"),
    ("models", "rm"),
    ("plan",),
    ("finetune",),
    ("distill",),
    ("pairs",),
    ("fuse",),
    ("export",),
    ("eval",),
    ("doctor",),
)
TARGET = Path(__file__).with_name("cli.md")


def page() -> str:
    """Return the page as it should be."""
    parts = ["# The command line\n\nMade from `--help` by `docs/reference.py`.\n"]
    plain = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1", "_TYPER_FORCE_DISABLE_TERMINAL": "1"}
    for command in COMMANDS:
        program = "from edger1.cli import main; import sys; sys.argv[0] = 'edger1'; main()"
        done = subprocess.run(
            [sys.executable, "-c", program, *command, "--help"],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, **plain},
        )
        text = "\n".join(line.rstrip() for line in done.stdout.strip("\n").splitlines())
        parts.append(f"## {' '.join(('edger1', *command))}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def main() -> None:
    """Write the page, or with --check fail where it is stale."""
    if "--check" in sys.argv[1:]:
        if TARGET.read_text(encoding="utf-8") != page():
            sys.exit("docs/cli.md is stale; renew it with: python docs/reference.py")
        return
    TARGET.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
