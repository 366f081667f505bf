"""What lies in a folder of weights: its config.json, the files its index names, the small files that go along.

A folder is not believed either: an index that names files outside, that are missing, or that do not hold what it says
is refused, and so are pickles, whose reading can run code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from edger1.errors import FormatError
from edger1.quant.formats.safetensors import Header

INDEX_NAME = "model.safetensors.index.json"
MTP_NAME = "mtp.safetensors"
"""Multi-token prediction layers, which mlx-lm has no place for, in a file that it does not look at."""
MAX_JSON_BYTES = 100_000_000

_PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt", "*.pkl")
_COMPANIONS = (
    "*.json", "*.jsonl", "*.jinja", "*.txt", "*.model", "*.tiktoken", "tokenization_*.py", "LICENSE*", "NOTICE*",
)  # fmt: skip
_NO_COMPANIONS = (
    "config.json", "*.index.json", "quant*config.json", "hf_quant_config.json", "edger1*.json", ".*",
    # What converting says of the model that it made, which is another than what is made of that.
    "conversion.json", "report.json", "journal.json",
)  # fmt: skip
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises FormatError where it cannot be read, is too large or is no JSON."""
    try:
        if not path.is_file():
            raise FormatError(f"{path} is missing or no regular file; fetch the model again.")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise FormatError(f"{path} has {path.stat().st_size:,} bytes, which is too large for what it should be.")
        return json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}.") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not valid JSON; fetch the model again.") from error


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json. Raises FormatError where it is missing, damaged or does not name the model's type."""
    path = folder / "config.json"
    if not path.is_file():
        hint = " It holds GGUF files: convert one with `edger1 pull PATH`." if any(folder.glob("*.gguf")) else ""
        raise FormatError(f"{folder} has no config.json, so it is no model folder.{hint}")
    config = read_json(path)
    if not isinstance(config, dict):
        raise FormatError(f"{path} is not a JSON object; fetch the model again.")
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise FormatError(f'{path} does not say which model_type it is; expected for example "model_type": "qwen3".')
    return config


def read_index(folder: Path) -> dict[str, str] | None:
    """Return the index's map of tensor names to plain file names, or None where there is no index.

    Raises FormatError where it is damaged or names a file that would not lie beside it.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        return None
    content = read_json(path)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise FormatError(f"{path} has no weight_map of tensor names to file names; fetch the model again.")
    for name in set(weight_map.values()):
        if not is_plain_name(name):
            raise FormatError(f"{path} names the file {name[:80]!r}, which is not a plain file name beside it.")
        if not name.endswith(".safetensors"):
            raise FormatError(
                f"{path} names the file {name[:80]!r}; only .safetensors files are read, because others can run code."
            )
    return weight_map


def is_plain_name(name: str) -> bool:
    """Whether `name` names a file in the folder itself and nothing else."""
    return bool(name) and name not in (".", "..") and not any(mark in name for mark in ("/", "\\", "\0"))


def weight_files(folder: Path, index: Mapping[str, str] | None, coming: Iterable[str] = ()) -> tuple[Path, ...]:
    """Return the weight files: those that the index names, without one all model*.safetensors.

    `coming` names files that are not there yet and count as present. mtp.safetensors is among them where it exists.
    Raises FormatError where files are missing, and where there are only pickles.
    """
    present = {path.name for path in folder.glob("*.safetensors")} | set(coming)
    named = set(index.values()) if index is not None else {name for name in present if fnmatch(name, "model*")}
    missing = sorted((named | _parts(named)) - present)
    if missing:
        raise FormatError(
            f"{folder} is incomplete: {len(missing)} of its {len(named | _parts(named))} weight files are missing, "
            f"such as {missing[0]!r}. Fetch the model again."
        )
    if not named:
        raise no_weights(folder)
    return tuple(folder / name for name in sorted(named | ({MTP_NAME} & present)))


def check_index(folder: Path, index: Mapping[str, str], headers: Iterable[Header]) -> None:
    """Raise FormatError unless each tensor lies in the file that the index gives for it, and no others lie there."""
    held = {header.path.name: header.entries for header in headers}
    for name, file in index.items():
        if name not in held[file]:
            raise FormatError(
                f"{folder / INDEX_NAME} says that tensor {name[:80]!r} is in {file}, but it is not; the folder is "
                "incomplete or of two versions. Fetch the model again."
            )
    named = set(index.values())
    for file, entries in held.items():
        extra = sorted(name for name in entries if index.get(name) != file) if file in named else []
        if extra:
            raise FormatError(
                f"{folder / file} holds {len(extra)} tensors that {INDEX_NAME} does not place there, such as "
                f"{extra[0][:80]!r}. Fetch the model again, or remove the index where the files are known to be right."
            )


def companions(folder: Path) -> tuple[Path, ...]:
    """Return the small files that go along with a model: tokenizer, chat template, generation config, licence."""
    return tuple(
        path
        for path in sorted(folder.iterdir())
        if any(fnmatch(path.name, pattern) for pattern in _COMPANIONS)
        and not any(fnmatch(path.name, pattern) for pattern in _NO_COMPANIONS)
        and path.is_file()
        and path.stat().st_size <= MAX_JSON_BYTES
    )


def _parts(names: Iterable[str]) -> set[str]:
    """Return all the parts of the sets that `names` are parts of: model-00001-of-00003.safetensors and so on."""
    found: set[str] = set()
    for stem, count in {(m[1], m[3]) for m in map(_PART.fullmatch, names) if m}:
        found |= {f"{stem}-{part:05d}-of-{count}.safetensors" for part in range(1, int(count) + 1)}
    return found


def no_weights(folder: Path) -> FormatError:
    """Return the error for a folder without weight files, which says so where there are pickles in their place."""
    if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        return FormatError(
            f"{folder} holds its weights as Python pickles only, which can run code when read and are refused. "
            "Get the model as safetensors."
        )
    return FormatError(f"{folder} has a config.json but no weights (model*.safetensors); fetch the model again.")
