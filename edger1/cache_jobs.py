"""The engine's jobs that save a prompt's KV cache in a file, and restore it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edger1 import cache_files
from edger1.cache import Entry
from edger1.errors import ContextError, UsageError
from edger1.experts.figures import Account
from edger1.loader import LiveModel
from edger1.messages import CacheRestored, CacheSaved, Event, Failed, Progress, RestoreCache, SaveCache
from edger1.prompt import encode, render_beginning


def _path(text: str) -> Path:
    """Return the path of a file. Raises UsageError for a name that MLX cannot take: it knows UTF-8 alone."""
    try:
        if "\0" not in text and text.encode():
            return Path(text)
    except UnicodeEncodeError:
        pass
    raise UsageError(f"{text!a} is no name for a prompt cache; expected one in UTF-8 and without NUL.")


class CacheSaving:
    """A SaveCache request: the prompt is read, a chunk a step, then its caches are written and kept."""

    def __init__(self, model: LiveModel, request: SaveCache, emit: Callable[[Event], None]) -> None:
        self._model = model
        self._request = request
        self._emit = emit
        self._path = _path(request.path)
        self._rendered = render_beginning(model, request)
        self._ids = encode(model, self._rendered)
        if not self._ids:
            raise UsageError("The prompt is empty; there is nothing to save.")
        if len(self._ids) >= model.context:
            raise ContextError(
                f"The prompt has {len(self._ids)} tokens, and the context of {model.context} tokens must hold it and "
                f"what follows. Shorten it, or give a larger context with --context."
            )
        self._experts = None if model.streaming is None else Account(model.streaming)
        self._caches: list[Any] | None = None
        self._fed = 0
        self._cached: int | None = None

    def step(self) -> bool:
        """Read one chunk; after the last one write the file and send CacheSaved.

        Does nothing while older requests leave no room for the KV cache.
        """
        if self._caches is None and not self._begin():
            return False
        if not self._model.kv.hold(self, len(self._ids)):
            return False
        with contextlib.nullcontext() if self._experts is None else self._experts.counting(decoding=False):
            self._read_chunk()
        if self._fed < len(self._ids):
            return False
        self._write()
        return True

    def _begin(self) -> bool:
        from edger1.drafting.mtp import Kept

        taken = self._model.kv.take(self, self._ids)
        if taken is None:
            return False
        caches, self._fed = taken
        self._cached = self._fed if self._cached is None else self._cached
        # What an MTP layer knows is not saved, and would have to follow what is read.
        caches = caches[:-1] if caches and isinstance(caches[-1], Kept) else caches
        self._caches = caches or self._model.new_caches()
        return True

    def _read_chunk(self) -> None:
        import mlx.core as mx

        chunk = self._ids[self._fed : self._fed + self._model.prefill_step]
        self._model.model(mx.array([chunk]), cache=self._caches)
        assert self._caches is not None
        mx.eval([cache.state for cache in self._caches])
        if self._model.streaming is not None:
            # Nothing is saved that was computed on a file which is gone.
            self._model.streaming.let_go()
        self._fed += len(chunk)
        known = self._cached or 0
        self._emit(Progress(self._request.id, "prefill", self._fed - known, len(self._ids) - known))

    def _write(self) -> None:
        assert self._caches is not None
        entry = Entry(self._ids, "" if self._rendered.raw else self._rendered.text, self._caches)
        nbytes = cache_files.save(self._path, self._model, entry)
        self.drop()
        self._model.kv.put(entry)
        self._emit(
            CacheSaved(
                self._request.id, self._request.model, self._request.path, len(self._ids), nbytes, self._cached or 0
            )
        )

    def give_way(self) -> None:
        """Drop the KV cache for an older request; the prompt is read again when that has ended."""
        self._caches, self._fed = None, 0

    def cancel(self) -> None:
        """Write nothing."""
        self.drop()
        self._emit(
            Failed(self._request.id, "EngineError", "Saving the prompt cache was cancelled; nothing was written.")
        )

    def drop(self) -> None:
        """Give the KV cache back without a word."""
        self._caches = None
        self._model.kv.release(self)


class CacheRestoring:
    """A RestoreCache request; what the file is gets checked before anything is set aside for it."""

    def __init__(self, model: LiveModel, request: RestoreCache, emit: Callable[[Event], None]) -> None:
        self._model = model
        self._request = request
        self._emit = emit
        self._path = _path(request.path)
        self._info: cache_files.Info | None = None

    def step(self) -> bool:
        """Read the file into the KV budget, once it has room there, and send CacheRestored."""
        if self._info is None:
            # Not before it is due: the model may get another adapter until then.
            self._info = cache_files.look(self._path)
            cache_files.check(self._path, self._info, self._model)
        if not self._model.kv.hold(self, self._info.tokens):
            return False
        entry = cache_files.read(self._path, self._info, self._model)
        nbytes = sum(cache.nbytes for cache in entry.caches)
        self.drop()
        self._model.kv.put(entry)
        self._emit(CacheRestored(self._request.id, self._request.model, self._request.path, len(entry.ids), nbytes))
        return True

    def give_way(self) -> None:
        """Nothing: there is no half of it."""

    def cancel(self) -> None:
        """Leave the file unread."""
        self.drop()
        self._emit(Failed(self._request.id, "EngineError", "Restoring the prompt cache was cancelled."))

    def drop(self) -> None:
        """Give the room back without a word."""
        self._model.kv.release(self)
