"""MLX and mlx-lm, imported with their side effects put right. Everything that needs mlx-lm comes through here first."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# From glibc's malloc.h; 128 KiB is the value that it begins with.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


@cache
def prepare() -> None:
    """Import mlx-lm once and undo what that changes in the process; choose settings for the device."""
    # transformers warns on import that no torch was found; nothing here needs it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _fix_mmap_threshold()
    with _open_files_kept(), _sources_read_quickly():
        import mlx_lm.utils  # noqa: F401

    import mlx.core as mx

    from edger1.memory import ALLOCATOR_BYTES

    if not on_gpu():
        # On a CPU mx.compile calls g++ at run time, 0.8 s a kernel, and gains nothing over our kernels.
        mx.disable_compile()
        set_cache_limit(ALLOCATOR_BYTES)


def clear_cache() -> None:
    """Give the memory that MLX keeps for later arrays back to the system.

    MLX waits for the streams of all threads here, and holds the interpreter's lock meanwhile where Python calls it. A
    stream that waits for experts which threads of Python read would then wait for ever.
    """
    _memory().clear_cache()


def set_cache_limit(nbytes: int) -> int:
    """Let MLX keep so many bytes for later arrays; returns how many it was. It waits as `clear_cache` does."""
    return int(_memory().set_cache_limit(nbytes))


@contextlib.contextmanager
def cache_limited(nbytes: int) -> Iterator[None]:
    """Let MLX keep no more than so many bytes of what is freed."""
    before = set_cache_limit(nbytes)
    try:
        yield
    finally:
        set_cache_limit(before)


def _memory() -> ModuleType:
    import mlx.core as mx

    from edger1 import kernels

    # Nothing waits on a stream for threads of Python where there are no kernels.
    return kernels.extension() or mx


def _fix_mmap_threshold() -> None:
    """Let glibc give large blocks back to the system when they are freed.

    It raises the size from which it does so with every such block that is freed, up to 32 MB. KV caches, which grow by
    being copied, then leave holes: 100 MB of them beside 480 MB in use were measured.
    """
    if not sys.platform.startswith("linux") or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    # Other C libraries have no mallopt, and no threshold that moves.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 128 * 1024)


@contextlib.contextmanager
def freed_kept() -> Iterator[None]:
    """Let glibc keep large blocks that are freed, for the next ones, and give them back at the end.

    A conversion allocates arrays of the same few sizes again and again, from several threads. With the kernel asked for
    each of them, and zeroing it, that took as long as all computing.
    """
    if not sys.platform.startswith("linux") or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        yield
        return
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        for what in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            libc.mallopt(what, 1 << 30)
        # Arenas of single threads hold no block above 64 MB.
        libc.mallopt(_M_ARENA_MAX, 1)
    try:
        yield
    finally:
        with contextlib.suppress(AttributeError, OSError):
            libc = ctypes.CDLL(None)
            for what in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
                libc.mallopt(what, 128 * 1024)
            libc.mallopt(_M_ARENA_MAX, 0)
        give_back()


def give_back() -> None:
    """Let glibc give back what was freed in small pieces: after a tokenizer was read, 0.3 kB an entry."""
    if not sys.platform.startswith("linux"):
        return
    # Other C libraries have no malloc_trim.
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def _open_files_kept() -> Iterator[None]:
    """Keep the limit of open files: mlx_lm sets it on import to 2048, for good, and fails where it may not."""
    import resource

    set_limit = resource.setrlimit
    resource.setrlimit = lambda *_: None
    try:
        yield
    finally:
        resource.setrlimit = set_limit


class _QuickerReading:
    """Changes how transformers reads the sources of its models, as soon as the module that does so is there."""

    NAME = "transformers.utils.import_utils"

    def __init__(self) -> None:
        self.forget = lambda: None

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.NAME:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_change(module: ModuleType) -> None:
                execute(module)
                self._change(module)

            spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec

    def _change(self, module: Any) -> None:
        read = getattr(getattr(module, "create_import_structure_from_path", None), "__wrapped__", None)
        names = getattr(module, "fetch__all__", None)
        # Another release may do otherwise: it is left as it is.
        if read is not None and names is not None:
            module.create_import_structure_from_path = cache(read)
            self.forget = module.create_import_structure_from_path.cache_clear
            module.fetch__all__ = lambda content: names(content[content.rfind("\n__all__") + 1 :])


@contextlib.contextmanager
def _sources_read_quickly() -> Iterator[None]:
    """Let transformers read the sources of its models once, and look for the last `__all__` from their end.

    It reads all 1,700 of them on import to learn their names, line by line, and then again: its cache holds 128 of 549
    folders. That was half of the time that importing mlx-lm takes.
    """
    quicker = _QuickerReading()
    sys.meta_path.insert(0, quicker)
    try:
        yield
    finally:
        sys.meta_path.remove(quicker)
        quicker.forget()


def on_gpu() -> bool:
    """Whether MLX computes on a GPU by default."""
    import mlx.core as mx

    return bool(mx.default_device().type == mx.gpu)
