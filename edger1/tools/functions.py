"""Plain Python functions as tools.

The schema comes from the signature, its annotations and the docstring; pydantic makes it and checks the arguments
before the function is called. What the function raises is a result that the model reads.

A call runs in a thread of its own, never the caller's. When its time is up, or the caller is cancelled, the caller goes
on at once and the thread is told to end by an exception raised inside it, which reaches Python code at its next step;
code that waits in the operating system ends when that returns. The thread is a daemon: it never keeps the program
alive.
"""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import importlib.util
import inspect
import json
import re
import sys
import threading
import time
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from edger1.errors import UsageError
from edger1.tools.kinds import RESULT_MAX, Result, Tool, shortened
from edger1.tools.settings import CALL_TIMEOUT_S

if TYPE_CHECKING:
    from pydantic import BaseModel

LEFT_MAX = 4
"""Calls of one function that may be past their time and still running; with more, it is not called again."""


class _Stop(BaseException):
    """Raised inside a thread whose call is over; a BaseException, so that `except Exception` does not swallow it."""


@dataclass(frozen=True)
class FunctionTool:
    """A function that the model may call."""

    tool: Tool
    function: Callable[..., Any]
    arguments: type[BaseModel]
    """Reads and checks the arguments."""

    async def call(
        self, arguments: dict[str, Any], *, timeout_s: float = CALL_TIMEOUT_S, limit: int = RESULT_MAX
    ) -> Result:
        """Check the arguments and call the function in a thread; errors and lateness are results."""
        from pydantic import ValidationError

        begun = time.monotonic()
        try:
            read = self.arguments.model_validate(arguments)
        except ValidationError as error:
            return Result(_wrong(self.tool, error), is_error=True, seconds=time.monotonic() - begun)
        given = {field.alias or name: getattr(read, name) for name, field in self.arguments.model_fields.items()}
        left = sum(thread.name == self._thread_name for thread in threading.enumerate())
        if left > LEFT_MAX:
            return Result(f"{left} earlier calls of {self.tool.name} are still running; it is not called.", True)
        return await self._run(given, begun, timeout_s, limit)

    @property
    def _thread_name(self) -> str:
        return f"tool {self.tool.key}"

    async def _run(self, given: dict[str, Any], begun: float, timeout_s: float, limit: int) -> Result:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[tuple[str, bool]] = loop.create_future()

        def tell(text: str, is_error: bool) -> None:
            if not done.done():
                done.set_result((text, is_error))

        def work() -> None:
            try:
                try:
                    value = self.function(**given)
                    if inspect.iscoroutine(value):
                        value = asyncio.run(value)
                    said = as_text(value), False
                except _Stop:
                    raise
                except BaseException as error:
                    # SystemExit too: a function that calls exit() ends itself and not the chat.
                    said = _raised(error), True
                loop.call_soon_threadsafe(tell, *said)
            except (_Stop, RuntimeError):
                # Told to end, or nobody is there any more to tell.
                return

        thread = threading.Thread(target=work, name=self._thread_name, daemon=True)
        thread.start()
        try:
            text, is_error = await asyncio.wait_for(done, timeout_s)
        except TimeoutError:
            _end(thread)
            text, is_error = f"{self.tool.name} did not return within {timeout_s:g} s and was given up.", True
        except asyncio.CancelledError:
            _end(thread)
            raise
        text, cut = shortened(text, limit)
        return Result(text, is_error, cut, time.monotonic() - begun)


def function_tool(function: Callable[..., Any], *, origin: str | None = None, runs: str = "") -> FunctionTool:
    """Make a tool of a function: name, description and schema of its arguments come from the function itself.

    The docstring's first part is the description; lines under "Args:" (or ":param name:") describe the arguments, as do
    `Annotated[int, "text"]` and pydantic's `Field`. Arguments without an annotation may be anything. Raises UsageError
    for what cannot be called by name and for annotations that have no JSON schema.
    """
    from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

    name = getattr(function, "__name__", type(function).__name__)
    where = f"{getattr(function, '__module__', '?')}.{name}"
    if not callable(function) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,63}", name):
        raise UsageError(f"{where} cannot be a tool: a function with a plain name of up to 64 letters was expected.")
    description, explained = read_docstring(inspect.getdoc(function) or "")
    try:
        model = _model(function, name, where, explained)
        schema = model.model_json_schema()
    except (PydanticSchemaGenerationError, PydanticUserError, NameError, TypeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"{where} cannot be a tool: {str(error).splitlines()[0]} Annotate its arguments with types that JSON has."
        ) from None
    schema.pop("title", None)
    schema.pop("description", None)
    for each in schema.get("properties", {}).values():
        each.pop("title", None)
    schema.setdefault("properties", {})
    tool = Tool(name, description, schema, origin or f"python:{getattr(function, '__module__', '?')}", name, runs)
    return FunctionTool(tool, function, model)


def _model(function: Callable[..., Any], name: str, where: str, explained: dict[str, str]) -> type[BaseModel]:
    """Return a pydantic model of a function's arguments."""
    from pydantic import ConfigDict, Field, create_model

    hints = typing.get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for at, parameter in enumerate(inspect.signature(function).parameters.values()):
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise UsageError(f"{where} cannot be a tool: its argument {parameter} cannot be given by name.")
        kind = hints.get(parameter.name, Any)
        notes = getattr(kind, "__metadata__", ())
        about = next((each for each in notes if isinstance(each, str)), None) or explained.get(parameter.name)
        # pydantic's Field says it better where it says it; a description of None would take its own away.
        if about is None or any(getattr(each, "description", None) for each in notes):
            more: dict[str, Any] = {}
        else:
            more = {"description": about}
        default = ... if parameter.default is parameter.empty else parameter.default
        # Aliases, because pydantic reserves some names ("json", "_x") that an argument may well have.
        described = Field(default, alias=parameter.name, **more)
        fields[f"argument_{at}"] = (kind, described)
    config = ConfigDict(extra="forbid", arbitrary_types_allowed=False, protected_namespaces=())
    return create_model(name, __config__=config, **fields)


_SECTION = re.compile(r"^(Args|Arguments|Parameters|Returns?|Raises|Yields|Examples?|Notes?):\s*$")
_PARAM = re.compile(r"^:param (?:\S+ )?(\w+):\s*(.*)$")
_ENTRY = re.compile(r"^\s+(\w+)\s*(?:\([^)]*\))?:\s*(.*)$")


def read_docstring(doc: str) -> tuple[str, dict[str, str]]:
    """Return a docstring's description, and what it says of each argument."""
    about: list[str] = []
    explained: dict[str, str] = {}
    section, current, indent = "", "", 0
    for line in doc.splitlines():
        if found := _SECTION.match(line):
            section, current = found[1], ""
        elif found := _PARAM.match(line):
            section, current, indent = "Args", found[1], 0
            explained[current] = found[2]
        elif line.startswith(":"):
            section, current = "Returns", ""
        elif section in ("Args", "Arguments", "Parameters"):
            depth = len(line) - len(line.lstrip())
            if (found := _ENTRY.match(line)) and (not current or depth <= indent):
                current, indent = found[1], depth
                explained[current] = found[2]
            elif current and line.strip():
                explained[current] = f"{explained[current]} {line.strip()}".strip()
        elif not section:
            about.append(line)
    return "\n".join(about).strip(), explained


def load_functions(path: Path) -> list[FunctionTool]:
    """Run a Python file and return its public functions as tools: those in `__all__`, or else those that it defines.

    Raises UsageError naming the file, and the line where it failed.
    """
    path = path.expanduser()
    if not path.is_file():
        raise UsageError(f"{path} is no file; [tools] functions in config.toml names Python files with functions.")
    # A name of its own, since two files of the same name may be given.
    name = f"edger1_tools_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    module = _run_file(path, name)
    public = getattr(module, "__all__", None)
    found = []
    for each, value in vars(module).items():
        mine = inspect.isfunction(value) and value.__module__ == name and not each.startswith("_")
        if (each in public) if public is not None else mine:
            found.append(function_tool(value, origin=f"python:{path}", runs=str(path)))
    if not found:
        raise UsageError(f"{path} defines no public function; a tool is a function whose name has no leading _.")
    return found


def _run_file(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is not a Python file; its name should end in .py.")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and string annotations look their module up by name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        line = _line_in(error, str(path))
        at = f" in line {line}" if line else ""
        raise UsageError(f"{path} failed{at}: {type(error).__name__}: {error}") from None
    return module


def _line_in(error: BaseException, file: str) -> int | None:
    if isinstance(error, SyntaxError):
        return error.lineno
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == file:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def as_text(value: Any) -> str:
    """Return what a function gave as text: strings as they are, everything else as JSON, where it can be."""
    if isinstance(value, str):
        return value
    if value is None:
        return "Done; nothing was returned."
    from pydantic_core import to_json

    try:
        return to_json(value, indent=None, fallback=str).decode()
    except Exception:
        return repr(value)


def _raised(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def _wrong(tool: Tool, error: Any) -> str:
    """Say what is wrong with the arguments in words that help to call again."""
    lines = []
    for each in error.errors(include_url=False, include_context=False)[:10]:
        where = ".".join(str(part) for part in each["loc"]) or "the arguments"
        lines.append(f"- {where}: {each['msg']} (found {str(each.get('input'))[:200]!r})")
    return (
        f"{tool.name} was not called: its arguments are wrong.\n"
        + "\n".join(lines)
        + (f"\nIt takes {json.dumps(tool.schema, ensure_ascii=False)[:4_000]}")
    )


def _end(thread: threading.Thread) -> None:
    """Raise _Stop inside a thread that still runs, as soon as it imports nothing."""
    if not _told_to_end(thread):
        threading.Thread(target=_end_later, args=(thread,), name=f"end of {thread.name}", daemon=True).start()


def _end_later(thread: threading.Thread) -> None:
    while not _told_to_end(thread):
        time.sleep(0.01)


def _told_to_end(thread: threading.Thread) -> bool:
    """Tell a thread to end; False where that has to wait: a lock of a module that it imports would be held for ever."""
    if thread.is_alive() and thread.ident is not None:
        frame = sys._current_frames().get(thread.ident)
        while frame is not None:
            if frame.f_globals.get("__name__") == "importlib._bootstrap":
                return False
            frame = frame.f_back
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_Stop))
    return True
