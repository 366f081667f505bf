"""The worker process: `python -m edger1.train.rewards.serving`.

Frames of pickled requests come in on standard input, from the process that started this one; frames of JSON go out on
what was standard output. Whatever a reward prints goes to standard error, so that it cannot break the frames.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pickle
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from edger1.errors import UsageError
from edger1.train.rewards.calling import as_number, caller
from edger1.train.rewards.completion import Completion
from edger1.train.rewards.spec import Spec, check_options

_GRACE_S = 30.0

Answer = dict[str, Any]


def main() -> None:
    """Serve until standard input closes."""
    incoming = os.fdopen(os.dup(0), "rb")
    outgoing = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    functions: dict[str, Callable[[Completion], Any]] = {}
    while (frame := read_frame(incoming)) is not None:
        what, *arguments, timeout_s = pickle.loads(frame)
        # The kernel ends this process even where a function hangs in C and the one that waits for it is gone.
        if hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, timeout_s + _GRACE_S)
        answer = _open(functions, *arguments) if what == "open" else _score(functions, *arguments)
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        body = json.dumps(answer).encode()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        outgoing.write(struct.pack("<Q", len(body)) + body)
        outgoing.flush()


def read_frame(stream: BinaryIO) -> bytes | None:
    """Read a frame: its length in eight bytes, then that many; None at the end of the stream."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    return stream.read(struct.unpack("<Q", head)[0])


def _open(functions: dict[str, Callable[[Completion], Any]], spec: Spec) -> Answer:
    try:
        functions[spec.text] = _function(spec)
    except UsageError as error:
        return {"usage": str(error)}
    except BaseException as error:
        return {"error": _told(error)}
    return {"value": 0.0}


def _score(functions: dict[str, Callable[[Completion], Any]], text: str, completion: Completion) -> Answer:
    try:
        return {"value": as_number(functions[text](completion))}
    except UsageError as error:
        return {"usage": str(error)}
    except ValueError as error:
        where = _place(error)
        # A ValueError of as_number is about the value; others were raised by the function.
        return {"error": str(error)} if where is None else {"error": _told(error)}
    except BaseException as error:
        return {"error": _told(error)}


def _function(spec: Spec) -> Callable[[Completion], Any]:
    if spec.kind != "file":
        from edger1.train.rewards.builtin import BUILTIN

        function = BUILTIN[spec.kind].function
        options = check_options(function, spec.options, f'the reward "{spec.name}"', set())
        if spec.kind == "gym":
            from edger1.train.rewards.gym import dataset

            dataset(spec.options["task"], options={k: v for k, v in spec.options.items() if k != "task"})
        if spec.kind == "maths":
            _quiet_maths()
        return partial(function, **options)
    path = Path(spec.file)
    sys.path.insert(0, str(path.parent))
    # Not its plain name, which may be that of a module that others import.
    name = f"reward_file_{path.stem}"
    made = importlib.util.spec_from_file_location(name, path)
    assert made is not None
    assert made.loader is not None
    module = importlib.util.module_from_spec(made)
    # Dataclasses and pickle in the file look for it there.
    sys.modules[name] = module
    made.loader.exec_module(module)
    own = getattr(module, spec.function, None)
    if not callable(own):
        there = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == name]
        raise UsageError(f"{path} has no function {spec.function}; it has {', '.join(there) or 'none'}.")
    return caller(own, spec.options, f'the reward "{spec.name}"')


def _quiet_maths() -> None:
    """Import what maths needs, which takes seconds, before the first completion's time runs.

    The library warns at every call that its timeouts are off, where this process has one around it.
    """
    import logging

    import math_verify  # noqa: F401

    logging.getLogger("math_verify").setLevel(logging.ERROR)


def _told(error: BaseException) -> str:
    said = f"raised {type(error).__name__}"
    text = str(error)
    place = _place(error)
    return said + (f": {text:.300}" if text else "") + (f" ({place})" if place else "")


def _place(error: BaseException) -> str | None:
    """Return file and line of the innermost frame outside this package, where there is one."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if f"{os.sep}edger1{os.sep}train{os.sep}rewards{os.sep}" not in frame.filename
    ]
    return f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else None


if __name__ == "__main__":
    main()
