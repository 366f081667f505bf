"""Taking in what is on this machine already: a GGUF file is converted, a model folder is recorded where it lies."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from edger1 import paths
from edger1.errors import FormatError
from edger1.fetch.convert import convert
from edger1.fetch.place import (
    MANIFEST,
    Manifest,
    install,
    link_file,
    locked,
    read_manifest,
    require_space,
    sha256_of,
    write_manifest,
)
from edger1.fetch.steps import Watch
from edger1.quant.formats.gguf_names import part_paths


def add(name: str, path: Path, watch: Watch, *, force: bool = False) -> Path:
    """Take in `path`, a GGUF file or a model folder, and return the model's folder.

    Raises FormatError naming what is missing or damaged; nothing is recorded then.
    """
    if path.is_dir():
        if path.parent == paths.models() and (path / MANIFEST).is_file():
            return path
        ggufs = sorted(path.glob("*.gguf"))
        if (path / "config.json").exists() or not ggufs:
            return _record(name, path)
        if len(ggufs) > 1 and part_paths(ggufs[0]) != ggufs:
            names = ", ".join(file.name for file in ggufs[:8])
            raise FormatError(f"{path} holds {len(ggufs)} GGUF files; name the one to take: {names}.")
        path = ggufs[0]
    if path.suffix.lower() != ".gguf":
        raise FormatError(f"{path} is neither a model folder nor a GGUF file.")
    return _convert(name, path, watch, force=force)


def check_folder(folder: Path) -> None:
    """Raise FormatError unless `folder` is a whole model: config, every shard its index names, sound tensor headers."""
    if not (folder / "config.json").is_file():
        raise FormatError(f"{folder} has no config.json; expected a model folder as mlx-lm or the hub has it.")
    if not any(folder.glob("model*.safetensors")):
        raise FormatError(f"{folder} has no weights; expected model*.safetensors.")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise FormatError(f"{index} is damaged ({error}); expected a JSON object with a weight_map.") from None
        if missing := sorted(str(shard) for shard in shards if not (folder / str(shard)).is_file()):
            raise FormatError(f"{folder} lacks {len(missing)} of {len(shards)} weight files, first {missing[0]}.")
    from edger1.folder import inspect

    inspect(folder)


def _record(name: str, folder: Path) -> Path:
    check_folder(folder)
    paths.models().mkdir(parents=True, exist_ok=True)
    name = _free_name(name, folder)
    write_manifest(link_file(name), Manifest(name=name, source="path", repo=str(folder), link=str(folder)))
    return folder


def _convert(name: str, file: Path, watch: Watch, *, force: bool) -> Path:
    name = _free_name(name, file)
    with locked(name, watch.note) as work:
        # The converter says which are missing.
        parts = [part for part in part_paths(file) if part.is_file()]
        checksum = _checksum(parts)
        folder = paths.models() / name
        if not force and (folder / MANIFEST).is_file() and read_manifest(folder / MANIFEST).sha256 == checksum:
            return folder
        require_space(work, sum(part.stat().st_size for part in parts), f"Converting {file.name}")
        ready = convert(file, work / "converted", watch)
        return install(ready, Manifest(name=name, source="path", repo=str(file), file=file.name, sha256=checksum))


def _checksum(parts: list[Path]) -> str:
    """Return the SHA-256 of a file; of several, that of their checksums one below the other."""
    sums = [sha256_of(part) for part in parts]
    return sums[0] if len(sums) == 1 else hashlib.sha256("\n".join(sums).encode()).hexdigest()


def _free_name(name: str, path: Path) -> str:
    """Return `name`, or with a few digits of `path` behind it where another model has that name."""
    for candidate in (paths.models() / name / MANIFEST, link_file(name)):
        if candidate.is_file() and read_manifest(candidate).repo != str(path):
            return f"{name}-{hashlib.sha256(str(path).encode()).hexdigest()[:6]}"
    return name
