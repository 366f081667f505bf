"""The models on this machine: listing them, finding one by name, removing one.

A model is a folder under `paths.models()` or a link file there that names a folder elsewhere (see edger1.fetch.place).
When a model was last used stands in last-used.json beside the models, so that a run writes nothing into the folder.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edger1 import __version__, paths, registry
from edger1.errors import EdgeR1Error, FormatError, UnknownModelError, UsageError
from edger1.fetch.place import MANIFEST, Manifest, folder_name, link_file, read_manifest, write_atomically


@dataclass(frozen=True)
class Installed:
    """A model on this machine. `problem` says why it cannot be used; what could not be read is None then.

    `quantization` is a short name such as "4-bit, group 32" or "bf16"; `bytes` counts the weight files; `linked` means
    that the folder lies elsewhere and was only recorded.
    """

    name: str
    path: Path
    source: str | None = None
    repo: str | None = None
    revision: str | None = None
    installed: str | None = None
    linked: bool = False
    bytes: int = 0
    quantization: str | None = None
    architecture: str | None = None
    parameters: int | None = None
    context_length: int | None = None
    last_used: str | None = None
    problem: str | None = None


def models() -> list[Installed]:
    """Return every model on this machine, by name; a damaged one is listed with its problem."""
    used = _last_used()
    return sorted((_describe(manifest, path, used) for manifest, path in manifests()), key=lambda model: model.name)


def manifests() -> Iterator[tuple[Manifest, Path]]:
    """Yield manifest and folder of each model that is here: those installed, then those that came with EdgeR1.

    A folder put among the models by hand gets a manifest made up. One of a name stands for another that came along.
    """
    names = set()
    for manifest, path in _installed():
        names.add(manifest.name)
        yield manifest, path
    for alias, path in registry.packaged().items():
        if alias not in names:
            yield Manifest(alias, "package", f"edger1=={__version__}", alias), path


def _installed() -> Iterator[tuple[Manifest, Path]]:
    if not paths.models().is_dir():
        return
    for path in sorted(paths.models().iterdir()):
        if path.name.endswith(".link.json"):
            try:
                manifest = read_manifest(path)
            except FormatError:
                continue
            if manifest.link:
                yield manifest, Path(manifest.link)
        elif path.is_dir() and not path.name.startswith("."):
            try:
                yield read_manifest(path / MANIFEST), path
            except FormatError:
                yield Manifest(name=path.name, source="path", repo=str(path)), path


def get(name: str) -> Installed:
    """Return the installed model that `name` means, as `resolve` finds it."""
    folder = resolve(name)
    used = _last_used()
    for manifest, path in manifests():
        if path == folder:
            return _describe(manifest, path, used)
    return _describe(Manifest(name=folder.name, source="path", repo=str(folder)), folder, used)


def resolve(name: str | Path) -> Path:
    """Return the folder of the model that `name` means: an installed name, an alias, a hub repository, or a path.

    Raises UnknownModelError: for a model that is known but not here it says how to fetch it, for any other name it
    offers the nearest ones.
    """
    text = str(name).strip()
    here = list(manifests())
    for manifest, path in here:
        # Without the registry, which takes a while to read.
        if manifest.name.lower() == text.lower():
            return path
    entry = registry.find(text)
    wanted = {text.lower(), folder_name(text).lower()} | ({entry.alias} if entry else set())
    for manifest, path in here:
        if manifest.name.lower() in wanted or (manifest.alias and manifest.alias in wanted):
            return path
    repos = {text.partition("@")[0].lower()}
    repos |= (
        {source.repo.lower() for source in entry.sources if isinstance(source, registry.HubSource)} if entry else set()
    )
    for manifest, path in here:
        if manifest.source == "hub" and manifest.repo.lower() in repos:
            return path
    if entry:
        raise UnknownModelError(f"{entry.alias} is not on this machine yet. Fetch it: `edger1 pull {entry.alias}`.")
    folder = Path(text).expanduser()
    try:
        if text and (folder / "config.json").is_file():
            return folder.resolve()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise UnknownModelError(f"No model is called {text!r:.100} ...: that is too long for a name.") from None
    raise UnknownModelError(_unknown(text, folder, tuple(manifest.name for manifest, _ in here)))


def remove(name: str) -> int:
    """Remove an installed model, or what an unfinished pull of it left, and return the bytes freed.

    Of a linked model only the record goes, never the folder. Raises UnknownModelError when there is nothing, UsageError
    for a model that is a part of EdgeR1.
    """
    partial = paths.downloads() / folder_name(name)
    names = [manifest.name for manifest, _ in manifests()]
    try:
        folder = resolve(name)
    except UnknownModelError:
        if partial.is_dir():
            freed = _size(partial)
            shutil.rmtree(partial)
            return freed
        raise
    for manifest, path in list(manifests()):
        if path != folder:
            continue
        if manifest.source == "package":
            raise UsageError(f"{manifest.name} is a part of EdgeR1 and goes with it; nothing was removed.")
        if manifest.link:
            link_file(manifest.name).unlink()
            return 0
        freed = _size(path)
        removed = paths.downloads() / ".removed"
        removed.mkdir(parents=True, exist_ok=True)
        # Moved aside first: a removal that is killed half-way leaves no half model behind, and the next one ends it.
        path.rename(Path(tempfile.mkdtemp(dir=removed)) / "model")
        shutil.rmtree(removed)
        return freed
    known = f"Installed: {', '.join(names)}." if names else "No model is installed."
    raise UnknownModelError(f"{folder} was not installed by EdgeR1, so it is not removed. {known}")


def name_of(folder: Path) -> str:
    """Return the registry's alias of the model in `folder`, or its name on this machine where it has none."""
    for manifest, path in manifests():
        if path == folder:
            return manifest.alias or manifest.name
    return folder.name


def touch(folder: Path) -> None:
    """Note that the model in `folder` is being used now; a failure to write that down is no failure."""
    used = _last_used() | {str(folder): datetime.now(UTC).isoformat(timespec="seconds")}
    used = {path: when for path, when in used.items() if Path(path).is_dir()}
    try:
        write_atomically(_last_used_file(), json.dumps(used, indent=2))
    except OSError:
        return


def _last_used_file() -> Path:
    return paths.data() / "last-used.json"


def _last_used() -> dict[str, str]:
    try:
        values: Any = json.loads(_last_used_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in values.items()} if isinstance(values, dict) else {}


def _describe(manifest: Manifest, path: Path, used: dict[str, str]) -> Installed:
    model: dict[str, Any] = {
        "name": manifest.name,
        "path": path,
        "source": manifest.source,
        "repo": manifest.repo,
        "revision": manifest.revision,
        "installed": manifest.installed or None,
        "linked": manifest.link is not None,
        "last_used": used.get(str(path)),
    }
    from edger1.folder import inspect

    try:
        found = inspect(path)
    except EdgeR1Error as error:
        return Installed(**model, problem=str(error), bytes=_size(path) if path.is_dir() else 0)
    return Installed(
        **model,
        bytes=found.total_bytes,
        quantization=_quantization(found.quantization, found.config),
        architecture=found.model_type,
        parameters=found.parameters,
        context_length=found.context_length,
    )


def _quantization(quantization: Any, config: dict[str, Any]) -> str | None:
    """Return a short name of config.json's quantization table, or of the weights' dtype."""
    if isinstance(quantization, dict) and "bits" in quantization:
        mode = quantization.get("mode", "affine")
        name = f"{quantization['bits']}-bit" if mode == "affine" else str(mode)
        mixed = {value.get("bits") for value in quantization.values() if isinstance(value, dict)} - {
            quantization["bits"]
        }
        group = quantization.get("group_size")
        return name + (f", group {group}" if group else "") + (", mixed" if mixed else "")
    dtype = config.get("torch_dtype") or config.get("dtype")
    return {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}.get(str(dtype), str(dtype)) if dtype else None


def _size(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            # A pull or a removal may be at work in the folder meanwhile.
            with contextlib.suppress(OSError):
                total += Path(parent, name).lstat().st_size
    return total


def _unknown(text: str, folder: Path, names: tuple[str, ...]) -> str:
    if text and folder.is_dir():
        return f"{folder} holds no model: there is no config.json in it."
    if text.endswith(".gguf") and folder.is_file():
        return f"{folder} must be converted once: `edger1 pull {text}`."
    if "/" in text and not text.startswith((".", "/", "~")):
        return f"{text} is not on this machine. If it is a hub repository, fetch it: `edger1 pull {text}`."
    return f"No model is called {text!r}. {registry.suggestion(text, extra=names)}"
