"""What the user means by ALIAS | OWNER/NAME[@REVISION][:FILE.gguf] | PATH."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from edger1 import registry
from edger1.errors import UnknownModelError
from edger1.fetch.place import folder_name
from edger1.quant.formats.gguf_names import whole_name
from edger1.registry import HubSource, Source

_REPO = re.compile(
    r"(?P<repo>[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)"
    r"(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]*))?"
    r"(?::(?P<file>[^:@]+\.gguf))?"
)


@dataclass(frozen=True)
class Target:
    """What to pull: `path` for something on this machine, otherwise `sources` in the order to try them."""

    text: str
    name: str
    sources: tuple[Source, ...] = ()
    alias: str | None = None
    revision: str | None = None
    path: Path | None = None


def parse(text: str) -> Target:
    """Read a target: an alias first, then a path that exists (or is written like one), then a hub repository.

    Raises UnknownModelError with the nearest names for what is none of them.
    """
    text = text.strip()
    if entry := registry.find(text):
        return Target(text, folder_name(entry.alias), sources=entry.sources, alias=entry.alias)
    path = Path(text).expanduser()
    written_as_path = text.startswith((".", "/", "~", "\\")) or path.is_absolute()
    match = _REPO.fullmatch(text.removeprefix("hf://").removeprefix("https://huggingface.co/"))
    if text and (written_as_path or path.is_dir() or (text.endswith(".gguf") and (not match or path.is_file()))):
        if not path.exists():
            raise UnknownModelError(f"There is no file or folder {path}.")
        return Target(text, folder_name(whole_name(path.resolve().name)), path=path.resolve())
    if match:
        repo, revision, file = match["repo"], match["revision"], match["file"]
        stem = f"{repo}/{whole_name(Path(file).name)}" if file else repo
        return Target(text, folder_name(stem), sources=(HubSource(repo, revision, file),), revision=revision)
    raise UnknownModelError(f"No model is called {text!r}. {registry.suggestion(text)}")
