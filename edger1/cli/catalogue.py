"""The chat's catalogue of models: the registry, the models folder and the files of both, without importing MLX.

What works out memory needs NumPy, so it is imported when models are first listed and not when the chat starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edger1 import installed, paths, registry
from edger1.fetch.place import folder_name
from edger1.installed import Installed
from edger1.memory import default_ceiling, machine_bytes
from edger1.messages import Sampling
from edger1.tui.catalogue import AdapterEntry, Advice, Chosen, Entry, Fetched, FetchEvent, FetchFailed, Note, Step
from edger1.units import format_bytes

if TYPE_CHECKING:
    from edger1.estimate import Estimate

_KILL_S = 3.0


class ModelCatalogue:
    """Implements `edger1.tui.catalogue.Catalogue` for the ceiling and context that the chat was opened with.

    `memory_bytes` None is the usual ceiling, `context` None the usual context of each model. `adapter_folders` are
    searched for adapters.
    """

    def __init__(
        self,
        *,
        memory_bytes: int | None = None,
        context: int | None = None,
        kv_bits: int | None = None,
        offline: bool = False,
        adapter_folders: tuple[Path, ...] = (),
    ) -> None:
        self._memory_bytes = memory_bytes
        self._context = context
        self._kv_bits = kv_bits
        self._offline = offline
        self._adapter_folders = adapter_folders

    async def entries(self) -> list[Entry]:
        """Return every model that is here, then every other one that the registry knows."""
        return await asyncio.to_thread(self._entries)

    def _entries(self) -> list[Entry]:
        ceiling = self._memory_bytes or default_ceiling()
        known = registry.load()
        here = installed.models()
        found = [self._of_installed(model, registry.find(model.name, known), ceiling) for model in here]
        names = {model.name for model in here}
        absent = [entry for entry in known.values() if entry.alias not in names and not _is_packaged(entry)]
        return found + [self._of_registry(entry, ceiling) for entry in absent]

    def _of_installed(self, model: Installed, known: registry.Entry | None, ceiling_bytes: int) -> Entry:
        from edger1 import estimate

        found, problem = estimate.unknown(ceiling_bytes), model.problem
        if problem is None:
            found, problem = estimate.try_folder(model.path, ceiling_bytes, self._context, self._kv_bits)
        return Entry(
            name=model.name,
            title=(known.description if known else None) or model.architecture or model.repo or "",
            size_bytes=model.bytes or None,
            installed=True,
            folder=model.path,
            licence=known.licence if known else None,
            kind="moe" if found.moe else "dense",
            fit=found.fit,
            needs_bytes=needed(found),
            why=f"It cannot be used: {problem}" if problem else why(found),
            parameters=model.parameters,
            active_parameters=known.active_parameters if known else None,
            quantization=model.quantization,
            context_length=model.context_length,
            last_used=model.last_used,
            problem=problem,
            numbers=tuple(numbers(found)),
            own=model.source == "package",
            linked=model.linked,
        )

    def _of_registry(self, entry: registry.Entry, ceiling_bytes: int) -> Entry:
        from edger1 import estimate

        found = estimate.of_entry(entry, ceiling_bytes, self._context, kv_bits=self._kv_bits)
        active = entry.active_parameters
        return Entry(
            name=entry.alias,
            title=entry.description or entry.repo or "",
            size_bytes=entry.bytes,
            licence=entry.licence,
            kind="moe" if active and entry.parameters and active < entry.parameters else "dense",
            fit=found.fit,
            needs_bytes=needed(found),
            why=why(found),
            parameters=entry.parameters,
            active_parameters=active,
            context_length=entry.context_length,
            numbers=tuple(numbers(found)),
            begun_bytes=_begun_bytes(entry.alias),
        )

    async def recommended(self) -> list[Advice]:
        """Return a few models to begin with, by this machine's memory."""
        return await asyncio.to_thread(self._recommended)

    def _recommended(self) -> list[Advice]:
        from edger1.recommend import recommend

        known = registry.load()
        here = {manifest.alias or manifest.name: folder for manifest, folder in installed.manifests()}
        found = recommend(known.values(), machine_bytes(), ceiling_bytes=self._memory_bytes, context=self._context)
        return [
            Advice(
                name=each.entry.alias,
                title=each.entry.description or "",
                role=each.role,
                why=each.why,
                size_bytes=each.entry.bytes,
                download_s=each.download_s,
                licence=each.entry.licence,
                folder=here.get(each.entry.alias),
            )
            for each in found
        ]

    async def find(self, text: str) -> Chosen:
        """Return the model that a name or the path of a folder means; a folder must hold a whole model."""
        return await asyncio.to_thread(self._find, text)

    def _find(self, text: str) -> Chosen:
        from edger1.folder import inspect

        folder = installed.resolve(text)
        inspect(folder)
        return Chosen(installed.name_of(folder), folder)

    async def fetch(self, name: str) -> AsyncIterator[FetchEvent]:
        """Fetch a model in a process of its own. Closing this terminates it; what came is kept for the next time."""
        if refused := await asyncio.to_thread(self._no_room, name):
            yield FetchFailed("NoSpaceError", refused)
            return
        command = [sys.executable, "-P", "-m", "edger1.cli.fetching", name, *(["--offline"] if self._offline else [])]
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            async for line in process.stdout:
                event = _event(line)
                if event is not None:
                    yield event
                if isinstance(event, Fetched | FetchFailed):
                    return
            status = await process.wait()
            yield FetchFailed("SourceError", f"The fetch of {name} ended unexpectedly (exit code {status}). Try again.")
        finally:
            await _end(process)

    def _no_room(self, name: str) -> str | None:
        """Return why a fetch cannot work on this disk, from what is known before anybody is asked."""
        entry = registry.find(name)
        if entry is None or not entry.bytes:
            return None
        source = entry.sources[0]
        # A GGUF file is converted beside itself.
        factor = 2 if getattr(source, "file", None) else 1
        wanted = factor * entry.bytes - _begun_bytes(entry.alias)
        folder = next(each for each in (paths.downloads(), *paths.downloads().parents) if each.is_dir())
        free = shutil.disk_usage(folder).free
        if wanted <= free:
            return None
        return (
            f"{entry.alias} needs {format_bytes(wanted, up=True)} of disk, but only {format_bytes(free)} are free at "
            f"{folder}. Free some room, or set EDGER1_HOME to a folder on a larger disk."
        )

    async def adapters(self, model: Path) -> list[AdapterEntry]:
        """Return the adapters in the folders of runs that fit the model in a folder, the newest first."""
        from edger1.cli.adapters_found import find

        return await asyncio.to_thread(find, model, self._adapter_folders)

    async def defaults(self, model: Path) -> Sampling:
        """Return what the model in a folder draws with where nobody says otherwise."""
        from edger1.loader import sampling_defaults

        return await asyncio.to_thread(sampling_defaults, model)

    async def remove(self, name: str) -> int:
        """Delete a model as `edger1 models rm` does; returns the bytes freed."""
        return await asyncio.to_thread(installed.remove, name)


def usual_adapter_folders(configured: tuple[str, ...] = ()) -> tuple[Path, ...]:
    """Return where adapters are looked for: the folder of runs here, and those that config.toml names."""
    return (Path.cwd() / "runs", *(Path(each).expanduser() for each in configured))


def _is_packaged(entry: registry.Entry) -> bool:
    """Tell whether all there is of a model is what the program brings: there is nothing to fetch."""
    return all(isinstance(source, registry.PackageSource) for source in entry.sources)


def _begun_bytes(alias: str) -> int:
    total = 0
    for parent, _, names in os.walk(paths.downloads() / folder_name(alias)):
        for name in names:
            with contextlib.suppress(OSError):
                total += Path(parent, name).lstat().st_size
    return total


def _event(line: bytes) -> FetchEvent | None:
    """Read a line of the child's; None for what is none of them."""
    try:
        value = json.loads(line)
        if "step" in value:
            stage, done, total, unit = value["step"]
            return Step(str(stage), int(done), int(total), str(unit))
        if "note" in value:
            return Note(str(value["note"]))
        if "folder" in value:
            return Fetched(Path(value["folder"]))
        return FetchFailed(str(value["error"]), str(value["message"]))
    except (ValueError, KeyError, TypeError):
        return None


async def _end(process: asyncio.subprocess.Process) -> None:
    """Terminate the child and wait for it, so that the next fetch finds no lock."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _KILL_S)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def needed(found: Estimate) -> int | None:
    """Return the memory that a model takes, or the smallest ceiling that would do where it is too big."""
    return found.least_bytes if found.fit == "too big" else found.needs_bytes


def why(found: Estimate) -> str:
    """Return one sentence on how a model runs here."""
    about = "" if found.exact else "about "
    ceiling = format_bytes(found.ceiling_bytes)
    if found.needs_bytes is None or found.least_bytes is None:
        return "How much memory it takes is known once it is here."
    if found.fit == "fits":
        return f"Needs {about}{format_bytes(found.needs_bytes, up=True)} of the {ceiling} that it may take."
    if found.fit == "streams":
        held = f"{about}{found.experts_share:.0%} of its experts" if found.experts_share is not None else "some experts"
        if found.slots:
            held = f"{_span(found.slots)} of {_span(found.experts)} experts a layer"
        return f"Keeps {held} in memory and reads the others from disk."
    return f"Needs {about}{format_bytes(found.least_bytes, up=True)}, and may take {ceiling}."


def numbers(found: Estimate) -> Iterator[tuple[str, str]]:
    """Yield the plan's numbers, as pairs of what and how much."""
    if found.fit == "unknown" or found.weights_bytes is None or found.kv_bytes is None or found.least_bytes is None:
        return
    about = "" if found.exact else "about "
    streamed = found.experts_share is not None
    yield "resident weights" if streamed else "weights", about + format_bytes(found.weights_bytes)
    if found.experts_share is not None:
        slots = (
            f"{_span(found.slots)} of {_span(found.experts)} a layer" if found.slots else f"{found.experts_share:.0%}"
        )
        yield "experts in memory", slots if found.slots else about + slots
    yield f"context {found.context:,}", about + format_bytes(found.kv_bytes)
    if found.fit == "streams" or found.needs_bytes is None:
        yield "in all", f"the ceiling of {format_bytes(found.ceiling_bytes)}"
    elif found.fit == "fits":
        yield "in all", f"{about}{format_bytes(found.needs_bytes, up=True)} of {format_bytes(found.ceiling_bytes)}"
    yield "smallest ceiling", about + format_bytes(found.least_bytes, up=True)
    if found.read_bytes:
        yield "read a token", about + format_bytes(found.read_bytes)


def _span(numbers: tuple[int, ...]) -> str:
    return str(numbers[0]) if len(set(numbers)) == 1 else f"{min(numbers)} to {max(numbers)}"
