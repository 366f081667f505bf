"""Loading a model for a command: the user's defaults filled in, fetching and loading shown."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edger1.cli import options
from edger1.config import load_config

if TYPE_CHECKING:
    from edger1.model import Model


def ensure_model(name: str, offline: bool) -> Path:
    """Return the model's folder, fetching it with a progress bar where it is not installed."""
    from edger1 import installed
    from edger1.errors import UnknownModelError

    # What is here is found without what would fetch it, which takes a while to import.
    with contextlib.suppress(UnknownModelError):
        return installed.resolve(name)
    from edger1.cli.pull import reporting
    from edger1.model import find

    with reporting() as watch:
        return find(name, offline=offline, on_progress=watch.progress, on_note=watch.note)


@contextlib.contextmanager
def open_model(
    name: str,
    *,
    memory: str | None,
    context: int | None,
    precision: str,
    offline: bool,
    expert_slots: str | None = None,
    adapter: str | None = None,
    draft: str | None = None,
    kv_bits: str | None = None,
) -> Iterator[Model]:
    """Load a model with what the command line says, else the user's config.toml, else the defaults; close it after.

    After Ctrl-C it is left open: closing waits for the step that is running, and the process ends anyhow.
    """
    with closing(_load(name, memory, context, precision, offline, expert_slots, adapter, draft, kv_bits)) as model:
        yield model


@contextlib.contextmanager
def closing(model: Model) -> Iterator[Model]:
    """Close a model after use, but not after Ctrl-C: that waits for the step that is running."""
    try:
        yield model
    except KeyboardInterrupt:
        raise
    except BaseException:
        model.close()
        raise
    model.close()


def _load(
    name: str,
    memory: str | None,
    context: int | None,
    precision: str,
    offline: bool,
    expert_slots: str | None,
    adapter: str | None,
    draft: str | None,
    kv_bits: str | None,
) -> Model:
    config = load_config()
    quantized = options.kv_bits(kv_bits, config.kv_bits)
    apply_threads(config.threads)
    folder = ensure_model(name, offline or config.offline)
    drafting = None if draft is None else ensure_model(draft, offline or config.offline)
    from edger1.model import load

    context = context if context is not None else config.context
    note_beyond_training(folder, context)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A context of .* was trained for")
        return load(
            folder,
            memory=memory if memory is not None else config.memory_bytes,
            context=context,
            precision=precision,
            expert_slots=expert_slots,
            adapter=adapter,
            draft=drafting,
            kv_bits=quantized,
            on_progress=_LoadingLine() if sys.stderr.isatty() else None,
        )


def note_beyond_training(folder: Path, context: int | None) -> None:
    """Say on standard error where the context is more than the model was trained for."""
    from edger1.folder import beyond_training

    if beyond := beyond_training(folder, context):
        print(f"edger1: {beyond}", file=sys.stderr)


def apply_threads(threads: int | None) -> None:
    """Hand the user's number of threads to the kernels, unless the environment names one."""
    if threads is not None:
        os.environ.setdefault("EDGER1_THREADS", str(threads))


class _LoadingLine:
    """Shows a loading percentage on the terminal, and takes it away at the end."""

    def __init__(self) -> None:
        self._shown = -1

    def __call__(self, done: int, total: int) -> None:
        percent = 100 if total == 0 else done * 100 // total
        if percent == self._shown:
            return
        self._shown = percent
        print("\r\x1b[K" if percent >= 100 else f"\rLoading {percent}%", end="", file=sys.stderr, flush=True)
