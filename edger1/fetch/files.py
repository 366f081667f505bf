"""Which files of a hub repository make up a model: pure functions on names and sizes."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import PurePosixPath

from edger1.errors import UsageError
from edger1.fetch.steps import UnavailableError
from edger1.quant.formats.gguf_names import PART

# Only at the repository's top: subfolders hold other formats of the same weights (original/, onnx/, metal/).
# tokenization_*.py is what a few tokenizers (Moonlight's) consist of; it never runs unless the user trusts remote code.
_SMALL = ("*.json", "*.jsonl", "*.jinja", "*.txt", "*.model", "*.tiktoken", "tokenization_*.py", "LICENSE*", "NOTICE*")
_WEIGHTS = "model*.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit: size in bytes, and its SHA-256 (large files) or git object id (others)."""

    name: str
    size: int | None = None
    sha256: str | None = None
    git_id: str | None = None


def choose(repo: str, files: list[RemoteFile], wanted: str | None = None) -> list[RemoteFile]:
    """Return the files to fetch: safetensors with config and tokenizer, or the one GGUF file or its parts in order.

    Raises UnavailableError when the repository holds no weights that can be used, UsageError when the user must pick
    a GGUF file.
    """
    unsafe = [file.name for file in files if not _is_plain(file.name)]
    if unsafe:
        raise UnavailableError(f"{repo} lists a file outside its own folder: {unsafe[0]!r}")
    ggufs = [file for file in files if file.name.lower().endswith(".gguf")]
    if wanted:
        for file in ggufs:
            if file.name == wanted:
                return _whole(repo, file, ggufs)
        raise UnavailableError(f"{repo} has no file {wanted}" + (f"; it has {_list(ggufs)}" if ggufs else ""))
    top = [file for file in files if "/" not in file.name]
    weights = [file for file in top if fnmatch(file.name, _WEIGHTS)]
    if weights:
        if not any(file.name == "config.json" for file in top):
            raise UnavailableError(f"{repo} has weights but no config.json")
        return weights + [file for file in top if any(fnmatch(file.name, pattern) for pattern in _SMALL)]
    if ggufs:
        models = {_stem(file): file for file in sorted(ggufs, key=lambda file: file.name, reverse=True)}
        if len(models) == 1:
            return _whole(repo, next(iter(models.values())), ggufs)
        raise UsageError(
            f"{repo} has {len(models)} models in GGUF; name one: `edger1 pull {repo}:FILE`, of "
            f"{_list(list(models.values()))}."
        )
    if any(fnmatch(file.name, pattern) for file in top for pattern in _PICKLES):
        raise UnavailableError(
            f"{repo} has only pickled weights, which can run code when opened; a safetensors copy is needed"
        )
    raise UnavailableError(f"{repo} has neither {_WEIGHTS} nor a GGUF file")


def _stem(file: RemoteFile) -> str:
    """Return what the parts of one model have in common."""
    match = PART.fullmatch(file.name)
    return f"{match['stem']}-of-{match['count']}" if match else file.name


def _whole(repo: str, file: RemoteFile, ggufs: list[RemoteFile]) -> list[RemoteFile]:
    """Return `file`, or all parts of the model that it is one of."""
    match = PART.fullmatch(file.name)
    if match is None:
        return [file]
    parts = sorted((other for other in ggufs if _stem(other) == _stem(file)), key=lambda part: part.name)
    if len(parts) != int(match["count"]):
        raise UnavailableError(f"{repo} has {len(parts)} of the {int(match['count'])} parts of {file.name}")
    return parts


def _is_plain(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name


def _list(files: list[RemoteFile]) -> str:
    names = sorted(file.name for file in files)
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
