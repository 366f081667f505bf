"""Putting models in place: names, locks, disk space, checksums, the manifest, and the atomic move at the end.

A model is fetched and converted under `paths.downloads()/NAME/` and renamed to `paths.models()/NAME` when it is whole,
manifest included. So a folder under models/ is complete by construction, and what a killed pull left under downloads/
is what the next one goes on from.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edger1 import __version__, paths
from edger1.errors import FormatError, SourceError
from edger1.fetch.steps import OnNote
from edger1.units import format_bytes

MANIFEST = "edger1.json"
CHUNK_BYTES = 1 << 20

# What a file system needs beside the payload: directory entries, the manifest, a log.
_SPARE_BYTES = 16 * 10**6


@dataclass(frozen=True)
class Manifest:
    """Where an installed model came from; edger1.json beside its config.json, which mlx-lm does not look at.

    `source` is "hub", "wheel", "package" or "path"; `repo` is the repository, package==version or path; `sha256` is the
    checksum of the single file it was made of, where there was one. `link` is set in place of a copy: the folder
    elsewhere.
    """

    name: str
    source: str
    repo: str
    alias: str | None = None
    revision: str | None = None
    file: str | None = None
    sha256: str | None = None
    link: str | None = None
    installed: str = ""
    edger1: str = __version__


def folder_name(text: str) -> str:
    """Return the name of the folder for an alias, a repository "owner/name" or a file's stem."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text.replace("/", "--")).strip(".-") or "model"


@contextmanager
def locked(name: str, note: OnNote) -> Iterator[Path]:
    """Hold the lock of one model's name and yield its folder under downloads/; a second pull waits for the first."""
    import filelock

    downloads = paths.downloads()
    downloads.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(downloads / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        note(f"Another pull of {name} is under way; waiting for it.")
        lock.acquire()
    try:
        _recover(name)
        work = downloads / name
        work.mkdir(exist_ok=True)
        try:
            yield work
        finally:
            # Only what can be gone on from is kept.
            with suppress(OSError):
                work.rmdir()
    finally:
        lock.release()


def _aside(name: str) -> Path:
    """Return the folder that an installed model is moved into while another takes its place."""
    return paths.downloads() / ".old" / name


def _recover(name: str) -> None:
    """Put back a model that was moved aside by a pull which was killed before the new one was in place."""
    aside, target = _aside(name), paths.models() / name
    if (aside / "model" / MANIFEST).is_file() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        (aside / "model").rename(target)
    _drop_aside(name)


def _drop_aside(name: str) -> None:
    aside = _aside(name)
    shutil.rmtree(aside, ignore_errors=True)
    # The parent goes with the last of them.
    with suppress(OSError):
        aside.parent.rmdir()


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise SourceError unless the disk of `folder` has room for `needed_bytes` more."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes + _SPARE_BYTES:
        raise NoSpaceError(
            f"{what} needs {format_bytes(needed_bytes)} of disk, but only {format_bytes(free)} are free at {folder}. "
            "Free some room, or set EDGER1_HOME to a folder on a larger disk."
        )


class NoSpaceError(SourceError):
    """The disk is full, or would be; no other source helps."""


def sha256_of(path: Path, on_bytes: Callable[[int], None] = lambda done: None) -> str:
    """Return the SHA-256 of a file, telling `on_bytes` how many bytes were read."""
    digest, done = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(8 * CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            on_bytes(done)
    return digest.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write `manifest` as JSON, dated now."""
    values = asdict(manifest) | {"installed": datetime.now(UTC).isoformat(timespec="seconds")}
    write_atomically(path, json.dumps({key: value for key, value in values.items() if value is not None}, indent=2))


def read_manifest(path: Path) -> Manifest:
    """Read a manifest; raises FormatError naming the file when it is damaged."""
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        known = {key: values[key] for key in Manifest.__dataclass_fields__ if key in values}
        manifest = Manifest(**known)
    except (OSError, ValueError, TypeError) as error:
        raise FormatError(f"{path} is no manifest of a model ({error}). Remove the model and pull it again.") from None
    if not all(value is None or isinstance(value, str) for value in known.values()):
        raise FormatError(f"{path} has a field that is no text. Remove the model and pull it again.")
    return manifest


def install(ready: Path, manifest: Manifest) -> Path:
    """Move the complete folder `ready` into models/ and return its place; a model that was there is replaced.

    The old folder is moved aside first, so that at each moment the name holds a whole model or none, and back where
    that fails; the next pull of a name puts back what a killed one left aside. Called under the lock of the name.
    """
    models = paths.models()
    models.mkdir(parents=True, exist_ok=True)
    target = models / manifest.name
    write_manifest(ready / MANIFEST, manifest)
    aside = _aside(manifest.name)
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        target.rename(aside / "model")
    try:
        ready.rename(target)
    except BaseException:
        _recover(manifest.name)
        raise
    link_file(manifest.name).unlink(missing_ok=True)
    _drop_aside(manifest.name)
    return target


def link_file(name: str) -> Path:
    """Return the file that stands for a model which stays where it is: its manifest, with `link` set."""
    return paths.models() / f"{name}.link.json"
