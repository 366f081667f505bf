"""Tables in the pages of the documentation that a program writes, each between two marks.

<!-- docs/SCRIPT.py: NAME -->
<!-- end -->
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

END = "<!-- end -->"


def renewed(text: str, script: str, tables: Mapping[str, Callable[[], Iterable[str]]]) -> str:
    """Return a page's `text` with the tables of a script made anew; each is called for its lines.

    Raises ValueError where a table does not have exactly one place.
    """
    for name, table in tables.items():
        begin = f"<!-- docs/{script}: {name} -->"
        place = re.compile(f"{re.escape(begin)}.*?{re.escape(END)}", re.DOTALL)
        if len(place.findall(text)) != 1:
            raise ValueError(f"The page should have one place for the table of {script}: {begin}")
        made = "\n".join((begin, *table(), END))
        text = place.sub(lambda _, made=made: made, text)  # type: ignore[misc]
    return text


def write_or_check(target: Path, made: str, script: str) -> None:
    """Write what a script made of a page, or with --check on the command line leave with an error where it differs."""
    if "--check" not in sys.argv[1:]:
        target.write_text(made, encoding="utf-8")
    elif not target.exists() or target.read_text(encoding="utf-8") != made:
        sys.exit(f"docs/{target.name} is stale; renew it with: python docs/{script}")
