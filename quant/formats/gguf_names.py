"""The names of GGUF files that llama-gguf-split made of one: `<name>-00001-of-00003.gguf` and so on."""

from __future__ import annotations

import re
from pathlib import Path

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE)

MAX_PARTS = 1000
"""More than any split has; each takes a file descriptor."""


def whole_name(name: str) -> str:
    """Return a model's name: that of its file, without the suffix and without the number of a part."""
    match = PART.fullmatch(name)
    return match["stem"] if match else name.removesuffix(".gguf")


def part_paths(path: Path) -> list[Path]:
    """Return the paths of all parts of the model that `path` is a part of, by its name; whether they exist or not."""
    match = PART.fullmatch(path.name)
    count = int(match["count"]) if match else 1
    if match is None or not 1 < count <= MAX_PARTS:
        return [path]
    names = (f"{match['stem']}-{number:05d}-of-{match['count']}{match['suffix']}" for number in range(1, count + 1))
    return [path.with_name(name) for name in names]
