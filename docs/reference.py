"""Write docs/cli.md from the commands' own help: python docs/reference.py [--check]."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from marked_tables import write_or_check

TARGET = Path(__file__).with_name("cli.md")
PLAIN = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1", "_TYPER_FORCE_DISABLE_TERMINAL": "1"}
# In a process of its own, since how help is printed is decided when it is imported.
PROGRAM = """
import contextlib, io, json
from typer.main import get_command
from edger1.cli import app

def walk(command, path):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        command.main([*path, "--help"], prog_name="edger1", standalone_mode=False)
    found = [(path, said.getvalue())]
    inner = command
    for name in path:
        inner = inner.commands[name]
    for name, each in getattr(inner, "commands", {}).items():
        if not each.hidden:
            found += walk(command, [*path, name])
    return found

print(json.dumps(walk(get_command(app), [])))
"""


def page() -> str:
    """Return the page as it should be: every command that is not hidden, in the order of the help."""
    parts = ["# The command line\n\nMade from `--help` by `docs/reference.py`.\n"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env={**os.environ, **PLAIN}
    )
    for command, said in json.loads(done.stdout):
        text = "\n".join(line.rstrip() for line in said.strip("\n").splitlines())
        parts.append(f"## {' '.join(('edger1', *command))}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def main() -> None:
    """Write the page, or with --check fail where it is stale."""
    write_or_check(TARGET, page(), Path(__file__).name)


if __name__ == "__main__":
    main()
