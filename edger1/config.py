"""The user's config.toml: defaults for what would otherwise be typed each time.

The file is `paths.user_config()` and every key is optional:

    memory = "6GB"          # the ceiling for model, caches and process; a size, or a share such as "50%"
    context = 8192          # tokens
    kv_bits = 8             # or 4: a quantized KV cache, which takes less memory and loses a little
    threads = 2
    theme = "textual-dark"  # of the chat
    thoughts = true         # whether reasoning is open while it comes
    accessible = false      # true: the chat speaks in lines, for a screen reader
    offline = false         # true: no source is asked for anything
    model = "qwen3-8b"      # what `edger1 chat` opens: an alias, a hub repository or a path
    adapters = ["~/runs"]   # folders that the chat looks for adapters in, beside ./runs

    [tools]                 # what the model may call, each call only with your approval
    functions = ["tools.py"]    # Python files whose public functions are tools; relative to this file's folder
    timeout_s = 120             # of one call

    [mcp.files]             # a server of the Model Context Protocol; the name is yours
    command = "npx"             # a program that is started ...
    args = ["-y", "@modelcontextprotocol/server-filesystem", "/home/me/notes"]
    env = { LEVEL = "info" }    # added to PATH, HOME and the like
    cwd = "/home/me"
    start_timeout_s = 30        # until it has listed its tools
    call_timeout_s = 120

    [mcp.search]
    url = "http://127.0.0.1:8000/mcp"               # ... or an address (streamable HTTP)
    headers = { Authorization = "Bearer ..." }
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from edger1 import paths
from edger1.errors import UsageError
from edger1.memory import KV_BITS
from edger1.tools.settings import ServerSettings, ToolSettings
from edger1.units import parse_size

DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True)
class Config:
    """What config.toml sets; None leaves the choice to the program."""

    memory_bytes: int | None = None
    context: int | None = None
    threads: int | None = None
    theme: str | None = None
    offline: bool = False
    accessible: bool = False
    model: str | None = None
    thoughts: bool = True
    adapters: tuple[str, ...] = ()
    kv_bits: int | None = None
    tools: ToolSettings = field(default_factory=ToolSettings)
    """What `[tools]` and `[mcp.NAME]` say."""


_KEYS = (*("memory" if each.name == "memory_bytes" else each.name for each in fields(Config)), "mcp")


def load_config(path: Path | None = None) -> Config:
    """Read config.toml, by default the user's; a file that does not exist sets nothing.

    Raises UsageError naming file, key, what was found and what was expected.
    """
    path = path or paths.user_config()
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Config()
    except NotADirectoryError:
        raise UsageError(f"{path.parent} is a file; expected a folder, or none yet. EDGER1_HOME names it.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}. Repair or remove it.") from None
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not valid TOML: {error}.") from None
    servers = _servers(path, table.pop("mcp", {}))
    config = Config(**dict(_setting(path, key, value) for key, value in table.items()))
    return replace(config, tools=replace(config.tools, servers=servers))


def _setting(path: Path, key: str, value: Any) -> tuple[str, Any]:
    """Return the field of Config that `key` sets and its value, or raise UsageError."""
    if key == "memory":
        if not isinstance(value, (str, int)) or isinstance(value, bool):
            raise _wrong(path, key, value, 'a size such as "6GB" or "50%"')
        try:
            return "memory_bytes", parse_size(value)
        except UsageError as error:
            raise UsageError(f"{path}: memory: {error}") from None
    if key in ("context", "threads"):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise _wrong(path, key, value, "a whole number of at least 1")
    elif key == "kv_bits":
        if isinstance(value, bool) or value not in KV_BITS:
            raise _wrong(path, key, value, "8 or 4")
    elif key in ("theme", "model"):
        if not isinstance(value, str) or not value.strip():
            raise _wrong(path, key, value, "a name in quotes")
    elif key in ("offline", "accessible", "thoughts"):
        if not isinstance(value, bool):
            raise _wrong(path, key, value, "true or false")
    elif key == "adapters":
        if not isinstance(value, list) or not all(isinstance(each, str) and each.strip() for each in value):
            raise _wrong(path, key, value, 'a list of folders, such as ["~/runs"],')
        return key, tuple(value)
    elif key == "tools":
        return key, _tools(path, value)
    else:
        raise _unknown(path, key, _KEYS)
    return key, value


def _tools(path: Path, table: Any) -> ToolSettings:
    """Read [tools]; files are relative to the folder of config.toml."""
    if not isinstance(table, dict):
        raise _wrong(path, "tools", table, "a table, [tools],")
    settings = ToolSettings()
    for key, value in table.items():
        where = f"tools.{key}"
        if key == "functions":
            files = _strings(path, where, value)
            settings = replace(settings, functions=tuple(path.parent / Path(each).expanduser() for each in files))
        elif key == "timeout_s":
            settings = replace(settings, function_timeout_s=_seconds(path, where, value))
        else:
            raise _unknown(path, where, ("tools.functions", "tools.timeout_s"))
    return settings


def _servers(path: Path, table: Any) -> tuple[ServerSettings, ...]:
    """Read every [mcp.NAME]."""
    if not isinstance(table, dict):
        raise _wrong(path, "mcp", table, "a table a server, [mcp.NAME],")
    return tuple(_server(path, name, value) for name, value in table.items())


def _server(path: Path, name: str, table: Any) -> ServerSettings:
    where = f"mcp.{name}"
    if not isinstance(table, dict):
        raise _wrong(path, where, table, f"a table, [{where}],")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", name):
        raise UsageError(f"{path}: mcp has a server named {name!r}; up to 32 letters, digits, - and _ were expected.")
    found = {}
    for key, value in table.items():
        if key not in _SERVER_KEYS:
            raise _unknown(path, f"{where}.{key}", [f"{where}.{each}" for each in _SERVER_KEYS])
        found[key] = _SERVER_KEYS[key](path, f"{where}.{key}", value)
    if ("command" in found) == ("url" in found):
        has = "both a command and a url" if "url" in found else "neither a command nor a url"
        raise UsageError(f"{path}: {where} has {has}; a program to start (command) or an address (url) was expected.")
    needs, mine = ("command", ("args", "env", "cwd")) if "url" in found else ("url", ("headers",))
    for key in mine:
        if key in found:
            raise UsageError(f"{path}: {where}.{key} goes with {needs}, which {where} does not have.")
    return ServerSettings(name=name, **found)


def _strings(path: Path, key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) and "\0" not in each for each in value):
        raise _wrong(path, key, value, 'a list of texts such as ["a", "b"]')
    return tuple(value)


def _texts(path: Path, key: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(each, str) and "\0" not in each for each in value.values()):
        # What stands there may be a secret, and is not repeated.
        raise UsageError(f'{path}: {key} is no table of texts such as {{ NAME = "value" }}.')
    return dict(value)


def _text(path: Path, key: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise _wrong(path, key, value, "a text in quotes")
    return value


def _folder(path: Path, key: str, value: Any) -> Path:
    return path.parent / Path(_text(path, key, value)).expanduser()


def _address(path: Path, key: str, value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"https?://[^\s/]+(/\S*)?", value):
        raise _wrong(path, key, value, 'an address such as "http://127.0.0.1:8000/mcp"')
    return value


def _seconds(path: Path, key: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 86_400:
        raise _wrong(path, key, value, "a number of seconds up to 86400")
    return float(value)


_SERVER_KEYS: dict[str, Callable[[Path, str, Any], Any]] = {
    "command": _text,
    "args": _strings,
    "env": _texts,
    "cwd": _folder,
    "url": _address,
    "headers": _texts,
    "start_timeout_s": _seconds,
    "call_timeout_s": _seconds,
}


def _unknown(path: Path, key: str, known: Sequence[str]) -> UsageError:
    near = get_close_matches(key, known, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Known keys: {', '.join(known)}."
    return UsageError(f"{path} has the unknown key {key!r}. {hint}")


def _wrong(path: Path, key: str, value: Any, expected: str) -> UsageError:
    return UsageError(f"{path}: {key} is {value!r}, but {expected} was expected.")
