"""Converting a hub repository while it is being fetched: weight files come one ahead and go when they are past.

Of every weight file the header is fetched first, which is enough to plan the conversion. The files then come in the
order in which the converter needs them, each as hub.py fetches it (resumed, checked); two of them are on the disk at a
time, the one being read and the next. A file is removed when all that was made of it is on the disk and journaled, so
that a pull that was stopped fetches no file twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from edger1.errors import EdgeR1Error, FormatError
from edger1.fetch.files import RemoteFile
from edger1.fetch.hub import Listing, fetch_range
from edger1.fetch.steps import UnavailableError
from edger1.quant.formats import safetensors

AT_ONCE = 2
FIRST_BYTES = 1 << 18
"""What is asked for at first; the header of a file of some hundred tensors fits."""
_HEADERS = ".headers"

Fetch = Callable[[str], None]
"""Fetches a file by name and returns when it is whole; raises SourceError."""


class StoppedError(EdgeR1Error):
    """The conversion ended while a thread of it waited for a file."""


def headers(found: Listing, folder: Path) -> list[safetensors.Header]:
    """Return the headers of the repository's weight files; those fetched once are kept in `folder`.

    Raises UnavailableError where the hub fails, FormatError where a header is damaged.
    """
    kept = folder / _HEADERS
    kept.mkdir(parents=True, exist_ok=True)
    return [_header(found, file, folder / file.name, kept / file.name) for file in weight_files(found)]


def weight_files(found: Listing) -> list[RemoteFile]:
    """Return the files of weights in a listing."""
    return [file for file in found.files if file.name.endswith(".safetensors")]


def contents(found: Listing) -> str:
    """Return what changes with the numbers in the repository's weight files, whatever their headers.

    Without checksums in the listing that is the commit.
    """
    sums = [f"{file.name} {file.sha256 or file.git_id or found.commit}" for file in weight_files(found)]
    return "\n".join(sorted(sums))


def _header(found: Listing, file: RemoteFile, path: Path, kept: Path) -> safetensors.Header:
    if file.size is None:
        raise UnavailableError(f"the hub does not say how large {file.name} is")
    if not kept.is_file():
        raw = fetch_range(found, file, 0, min(FIRST_BYTES, file.size))
        length = int.from_bytes(raw[:8], "little")
        if length > min(safetensors.MAX_HEADER_BYTES, file.size - 8):
            raise FormatError(
                f"{file.name} of {found.repo} claims a header of {length:,} bytes but has {file.size:,} in all; it is "
                "damaged, or no safetensors file."
            )
        if len(raw) < 8 + length:
            raw += fetch_range(found, file, len(raw), 8 + length)
        aside = kept.with_name(kept.name + ".new")
        aside.write_bytes(raw[8 : 8 + length])
        aside.replace(kept)
    try:
        return safetensors.parse_header(path, kept.read_bytes(), file.size)
    except FormatError:
        kept.unlink()
        raise


class ShardSupply:
    """Fetches files one ahead of the converter and removes those that it has passed; see quant/running.py's Supply.

    `files` says in which files of `folder` each tensor lies. `release` is told of a file before it is removed.
    """

    def __init__(
        self, folder: Path, files: Mapping[str, Sequence[str]], fetch: Fetch, release: Callable[[Path], None]
    ) -> None:
        self._folder, self._files, self._fetch, self._release = folder, files, fetch, release
        self._order: list[str] = []
        self._uses: dict[str, set[str]] = {}
        self._here: set[str] = set()
        self._waiting = 0
        self._idle = self._pressed = self._stopped = self._fetched = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def begin(self, names: Sequence[str]) -> None:
        """Hear which tensors will be needed, in the order of their first use, and start fetching."""
        for name in names:
            for file in self._files[name]:
                self._uses.setdefault(file, set()).add(name)
        for file in {file for files in self._files.values() for file in files} - self._uses.keys():
            (self._folder / file).unlink(missing_ok=True)
        self._here = {file for file in self._uses if (self._folder / file).is_file()}
        self._order = [file for file in self._uses if file not in self._here]
        threading.Thread(target=self._work, name="edger1-shards", daemon=True).start()

    def need(self, names: tuple[str, ...]) -> None:
        """Wait until the files of these tensors are there. Raises what hinders that."""
        wanted = {file for name in names for file in self._files[name]}
        with self._changed:
            self._waiting += 1
            try:
                while not wanted <= self._here:
                    if self._error is not None:
                        raise self._error
                    if self._stopped:
                        raise StoppedError("the conversion was stopped")
                    if self._fetched:
                        missing = ", ".join(sorted(wanted - self._here))
                        raise FormatError(f"{missing} was needed again after it was removed; convert again.")
                    self._changed.wait()
            finally:
                self._waiting -= 1

    def passed(self, names: frozenset[str]) -> None:
        """Remove the files that nothing is needed of any more."""
        with self._changed:
            for file in {file for name in names for file in self._files[name]}:
                if file not in self._uses:
                    continue
                self._uses[file] -= names
                if not self._uses[file] and file in self._here:
                    self._here.remove(file)
                    self._release(self._folder / file)
                    (self._folder / file).unlink(missing_ok=True)
            self._changed.notify_all()

    def waiting(self) -> int:
        """Return how many threads wait in `need`."""
        with self._changed:
            return self._waiting

    def press(self) -> None:
        """Let one more file come than are kept at a time: what is here is not enough for anybody."""
        with self._changed:
            self._pressed = self._idle
            self._changed.notify_all()

    def stop(self) -> None:
        """Let nobody wait any longer, and fetch no further file."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _work(self) -> None:
        for file in self._order:
            with self._changed:
                self._idle = True
                while not self._stopped and len(self._here) >= AT_ONCE and not self._pressed:
                    self._changed.wait()
                self._idle = self._pressed = False
                if self._stopped:
                    return
            try:
                self._fetch(file)
            except BaseException as error:  # raised again by whoever waits
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._here.add(file)
                self._changed.notify_all()
        with self._changed:
            self._fetched = True
            self._changed.notify_all()
