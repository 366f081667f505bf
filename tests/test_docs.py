"""The pages that are made from the program are not stale."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from children import LIMIT_S

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("script", ["reference.py", "chat_tables.py", "cache_tables.py"])
def test_tables_are_what_the_program_says(script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / script), "--check"],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr


def test_links_lead_somewhere() -> None:
    import re

    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
