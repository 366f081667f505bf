"""Fetching a repository from the Hugging Face hub, or another server that speaks its protocol (HF_ENDPOINT).

huggingface_hub gives the session (proxies, certificates), the token and the repository's listing. The bytes are
fetched here, because its own download keeps no partial file and cannot go on where a killed one stopped: each file
grows as NAME.partial, is asked for from its end on, and takes its name once size and checksum agree with the listing.
"""

from __future__ import annotations

import hashlib
import os
import queue
import re
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from edger1.fetch.files import RemoteFile, choose
from edger1.fetch.place import NoSpaceError, require_space, sha256_of
from edger1.fetch.steps import Step, UnavailableError, Watch
from edger1.registry import HubSource
from edger1.units import format_bytes

# An unreachable hub must cost seconds: huggingface_hub's own retries take about 23.
PROBE_TIMEOUT_S = 3.0
_LISTING_TIMEOUT_S = 10.0
_CONNECT_TIMEOUT_S = 10.0
_READ_TIMEOUT_S = 30.0
_WORKERS = 4
_ATTEMPTS = 5
_PARTIAL = ".partial"


@dataclass(frozen=True)
class Listing:
    """What to fetch of a repository, pinned to one commit."""

    repo: str
    commit: str
    files: list[RemoteFile]

    @property
    def is_gguf(self) -> bool:
        """Tell whether the model is a GGUF file, or the parts of one, to be converted."""
        return all(file.name.lower().endswith(".gguf") for file in self.files)

    @property
    def total_bytes(self) -> int:
        """Return the size of all files, counting those of unknown size as nothing."""
        return sum(file.size or 0 for file in self.files)


def is_offline() -> bool:
    """Tell whether the environment forbids asking the hub (HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE)."""
    flags = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(flag.upper() in ("1", "ON", "YES", "TRUE") for flag in flags)


def probe() -> str | None:
    """Return None if the hub answers within PROBE_TIMEOUT_S, otherwise a few words on why not.

    It runs on a thread of its own, since looking up a name can block for much longer than any timeout given to it.
    """
    # Imported before the time runs: that may take seconds on a busy machine.
    from huggingface_hub import constants, get_session

    answer: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            get_session().head(f"{constants.ENDPOINT}/api/models", timeout=PROBE_TIMEOUT_S)
            answer.put(None)
        except Exception as error:  # whatever the transport raises is the reason
            answer.put(_reason(error))

    threading.Thread(target=ask, daemon=True, name="edger1-probe").start()
    try:
        reason = answer.get(timeout=PROBE_TIMEOUT_S)
    except queue.Empty:
        reason = f"no answer within {PROBE_TIMEOUT_S:g} s"
    return reason and f"{constants.ENDPOINT} cannot be reached ({reason})"


def listing(source: HubSource) -> Listing:
    """Ask the hub for the files of `source` at its revision; raises UnavailableError with the reason."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi(endpoint=constants.ENDPOINT).model_info(
            source.repo, revision=source.revision, files_metadata=True, timeout=_LISTING_TIMEOUT_S
        )
    except GatedRepoError:
        raise UnavailableError(
            f"access to {source.repo} must be asked for on its page, and a token given (`hf auth login` or HF_TOKEN)"
        ) from None
    except RepositoryNotFoundError:
        raise UnavailableError(
            f"there is no repository {source.repo}, or it is private and no token was given"
        ) from None
    except RevisionNotFoundError:
        raise UnavailableError(f"{source.repo} has no revision {source.revision}") from None
    except Exception as error:  # the transport's errors and the hub's share no base
        raise UnavailableError(_reason(error)) from None
    if not info.sha:
        raise UnavailableError(f"the hub names no commit for {source.repo}")
    files = [
        RemoteFile(item.rfilename, item.size, item.lfs.sha256 if item.lfs else None, item.blob_id)
        for item in info.siblings or []
    ]
    chosen = choose(source.repo, files, source.file)
    if source.sha256 and chosen[0].sha256 not in (None, source.sha256):
        raise UnavailableError(
            f"{chosen[0].name} should have SHA-256 {source.sha256}, but the hub has {chosen[0].sha256}"
        )
    return Listing(source.repo, info.sha, chosen)


def download(found: Listing, source: HubSource, folder: Path, watch: Watch) -> Path:
    """Fetch the files of `found` into `folder` and return it, or the GGUF file in it (the first, if in parts).

    Goes on from what is there. Raises UnavailableError when the hub fails for good or a checksum is wrong (the bad
    file is removed), NoSpaceError when the disk is full or will be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Converting a GGUF file takes its size once more.
    needed = found.total_bytes * (2 if found.is_gguf else 1) - _on_disk(found, folder)
    require_space(folder, max(needed, 0), f"Fetching {found.repo} ({format_bytes(found.total_bytes)})")
    transfer = _Transfer(found, source, folder)
    transfer.run(watch)
    return folder / PurePosixPath(found.files[0].name).name if found.is_gguf else folder


def fetch_range(found: Listing, file: RemoteFile, start: int, stop: int) -> bytes:
    """Return bytes [start, stop) of a file of the repository. Raises UnavailableError when the hub fails for good."""
    from huggingface_hub import constants, get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    url = hf_hub_url(found.repo, file.name, revision=found.commit, endpoint=constants.ENDPOINT)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={start}-{stop - 1}"}
    timeout = (_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S, _READ_TIMEOUT_S, _CONNECT_TIMEOUT_S)
    for attempt in range(_ATTEMPTS):
        try:
            with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
                hf_raise_for_status(response)
                if response.status_code != 206 and start:
                    raise UnavailableError(f"{file.name}: the server gives no parts of files")
                got = bytearray()
                for chunk in response.iter_bytes():
                    got += chunk
                    if len(got) >= stop - start:
                        break
            if len(got) >= stop - start:
                return bytes(got[: stop - start])
            raise ConnectionError(f"the connection ended after {len(got)} of {stop - start} bytes")
        except UnavailableError:
            raise
        except Exception as error:  # a broken connection, in whatever words the transport has
            if attempt + 1 == _ATTEMPTS or not _is_passing(error):
                raise UnavailableError(f"{file.name}: {_reason(error)}") from None
            time.sleep(min(2.0**attempt, 8.0) / 2)
    raise AssertionError


class Fetcher:
    """Fetches single files of a repository into `folder`, each whole and checked, until it is stopped."""

    def __init__(self, found: Listing, source: HubSource, folder: Path) -> None:
        self._found, self._source, self._folder = found, source, folder
        self._transfer: _Transfer | None = None
        self._stopped = False
        self._lock = threading.Lock()

    def fetch(self, names: Iterable[str]) -> None:
        """Fetch these files and return when they are there; raises what `download` raises."""
        wanted = set(names)
        files = [file for file in self._found.files if file.name in wanted]
        with self._lock:
            if self._stopped:
                raise UnavailableError("the transfer was stopped")
            self._transfer = _Transfer(replace(self._found, files=files), self._source, self._folder)
        self._transfer.run(Watch())
        if self._transfer.stopped.is_set():
            raise UnavailableError("the transfer was stopped")

    def stop(self) -> None:
        """End what is under way; what came of it stays for the next time."""
        with self._lock:
            self._stopped = True
            if self._transfer is not None:
                self._transfer.stop()


def _on_disk(found: Listing, folder: Path) -> int:
    return sum(_have(folder / PurePosixPath(file.name).name) for file in found.files)


def _have(path: Path) -> int:
    for candidate in (path, path.with_name(path.name + _PARTIAL)):
        if candidate.is_file():
            return candidate.stat().st_size
    return 0


class _StoppedError(Exception):
    """The transfer was stopped; nothing may be written any more."""


class _Transfer:
    """A few daemon threads that fetch files, and the calling thread that reports.

    Daemon threads, so that Ctrl-C ends the program at once; the lock around each write makes sure that none of them
    writes after `stop`, when another pull may already have the folder.
    """

    def __init__(self, found: Listing, source: HubSource, folder: Path) -> None:
        self.found, self.source, self.folder = found, source, folder
        self.lock = threading.Lock()
        self.stopped = threading.Event()
        self.error: BaseException | None = None
        self.waiting: queue.SimpleQueue[RemoteFile] = queue.SimpleQueue()
        self.done_bytes = _on_disk(found, folder)
        for file in sorted(found.files, key=lambda file: -(file.size or 0)):
            self.waiting.put(file)

    def run(self, watch: Watch) -> None:
        threads = [
            threading.Thread(target=self._work, daemon=True, name=f"edger1-pull-{number}")
            for number in range(min(_WORKERS, len(self.found.files)))
        ]
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                watch.progress(Step("download", self.done_bytes, self.found.total_bytes))
                for thread in threads:
                    thread.join(0.1 / len(threads))
        except BaseException:
            self._stop(None)
            raise
        if self.error:
            raise self.error
        watch.progress(Step("download", self.done_bytes, self.found.total_bytes))

    def stop(self) -> None:
        """Let nothing be written any more."""
        self._stop(None)

    def _stop(self, error: BaseException | None) -> None:
        with self.lock:
            self.error = self.error or error
            self.stopped.set()

    def _work(self) -> None:
        try:
            while not self.stopped.is_set():
                try:
                    file = self.waiting.get_nowait()
                except queue.Empty:
                    return
                self._fetch(file)
        except _StoppedError:
            return
        except BaseException as error:  # handed to the calling thread
            self._stop(error)

    def _fetch(self, file: RemoteFile) -> None:
        target = self.folder / PurePosixPath(file.name).name
        if target.is_file():
            return
        partial = target.with_name(target.name + _PARTIAL)
        failures = 0
        while True:
            before = _have(partial)
            try:
                self._stream(file, partial)
                break
            except (_StoppedError, NoSpaceError):
                raise
            except Exception as error:  # a broken connection, in whatever words the transport has
                failures = 1 if _have(partial) > before else failures + 1
                if failures >= _ATTEMPTS or not _is_passing(error):
                    raise UnavailableError(f"{file.name}: {_reason(error)}") from None
                if self.stopped.wait(min(2.0 ** (failures - 1), 8.0) / 2):
                    raise _StoppedError from None
        self._verify(file, partial)
        partial.replace(target)

    def _stream(self, file: RemoteFile, partial: Path) -> None:
        """Append to `partial` what is missing of `file`."""
        from huggingface_hub import constants, get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        start = _have(partial)
        if file.size is not None and start > file.size:
            self._truncate(partial)
            start = 0
        if file.size == start and partial.is_file():
            return
        url = hf_hub_url(self.found.repo, file.name, revision=self.found.commit, endpoint=constants.ENDPOINT)
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        timeout = (_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S, _READ_TIMEOUT_S, _CONNECT_TIMEOUT_S)
        with get_session().stream("GET", url, headers=headers, timeout=timeout) as response:
            if response.status_code == 416:
                self._truncate(partial)
                raise ConnectionError("the server did not go on where the last download stopped")
            hf_raise_for_status(response)
            ranged = str(response.headers.get("Content-Range", "")).startswith(f"bytes {start}-")
            if start and not (response.status_code == 206 and ranged):
                self._truncate(partial)
            # As it arrives and unbuffered: what a broken connection gave is kept to the last byte.
            with partial.open("ab", buffering=0) as out:
                for chunk in response.iter_bytes():
                    self._write(out, chunk)
        if file.size is not None and _have(partial) < file.size:
            raise ConnectionError(f"the connection ended after {_have(partial)} of {file.size} bytes")

    def _write(self, out: Any, chunk: bytes) -> None:
        with self.lock:
            if self.stopped.is_set():
                raise _StoppedError
            try:
                out.write(chunk)
            except OSError as error:
                raise NoSpaceError(
                    f"{self.folder} cannot take more: {error.strerror}. What is there is kept."
                ) from None
            self.done_bytes += len(chunk)

    def _truncate(self, partial: Path) -> None:
        with self.lock:
            if self.stopped.is_set():
                raise _StoppedError
            self.done_bytes -= _have(partial)
            partial.unlink(missing_ok=True)

    def _verify(self, file: RemoteFile, partial: Path) -> None:
        size = _have(partial)
        alone = self.found.is_gguf and len(self.found.files) == 1
        expected = self.source.sha256 if alone and self.source.sha256 else file.sha256
        problem = None
        if file.size is not None and size != file.size:
            problem = f"should have {file.size} bytes, but {size} came"
        elif expected:
            if (have := sha256_of(partial)) != expected:
                problem = f"should have SHA-256 {expected}, but has {have}"
        elif file.git_id and len(file.git_id) == 40:
            digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
            digest.update(partial.read_bytes())
            if digest.hexdigest() != file.git_id:
                problem = f"should be git object {file.git_id}, but is {digest.hexdigest()}"
        if problem:
            self._truncate(partial)
            raise UnavailableError(f"{file.name} {problem}; it was removed")


def _is_passing(error: Exception) -> bool:
    """Tell whether the same request may succeed in a moment."""
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status is None or status in (408, 429) or status >= 500


def _reason(error: Exception) -> str:
    """Return one line on why a request failed, without addresses that may hold a token."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", None)
        reasons = {401: "it wants a token (`hf auth login` or HF_TOKEN)", 403: "access is refused", 404: "not found"}
        return f"{reasons.get(status or 0, 'the hub answered')} (HTTP {status})"
    kind = type(error).__name__
    if "Timeout" in kind:
        return "no answer in time"
    text = str(error).strip().splitlines()
    return re.sub(r"^\[Errno -?\d+\] ", "", text[0])[:200] if text else kind
