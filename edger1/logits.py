"""Logits of many rows, a few rows at a time.

A model of mlx-lm's is an inner model, which holds the layers, and a head. Rows go through the layers together, as many
as a prefill step has; the logits of all of them at once would be larger than everything else (512 rows of 150,000 are
300 MB). So the inner model's answer is kept, and the model is called again with a few rows of it in the place of the
inner model's answer. Whatever a family does beside multiplying with its head, it does to each row alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from edger1.experts import anatomy

Answer = Callable[..., Any]


class Logits:
    """A model's logits in pieces, or whole where its inner model cannot be told from the rest of it."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._inner = _inner(model)

    @property
    def piecewise(self) -> bool:
        """Whether rows may be more than their logits find room for. Known for sure after the first call."""
        return self._inner is not None

    def of(self, tokens: Any, caches: list[Any], most_rows: int) -> Iterator[Any] | None:
        """Feed int [1, rows] tokens, and yield logits [most_rows or fewer, vocabulary] of all rows in their order.

        Where not `piecewise` all rows are one piece. The layers have computed what they will when this returns. Returns
        None where it shows just now that there are no pieces: the caches hold the tokens then, and are to be made anew.
        """
        import mlx.core as mx

        if self._inner is None:
            whole = self._model(tokens, cache=caches)[0]
            mx.eval(whole, [each.state for each in caches])
            return iter([whole])
        answers: list[Any] = []
        kind: Any = type(self._inner)

        def keep(*given: Any, **named: Any) -> Any:
            answers.append(kind.__call__(self._inner, *given, **named))
            return answers[-1]

        with _answered(self._inner, keep):
            logits = self._model(tokens, cache=caches)
        hidden = answers[0] if len(answers) == 1 else None
        rows = tokens.shape[1]
        if not isinstance(hidden, mx.array) or hidden.ndim != 3 or hidden.shape[1] != rows or logits.shape[1] != rows:
            self._inner = None
            return None
        # Not evaluated: that would compute all of them.
        del logits
        mx.eval(hidden, [each.state for each in caches])
        return self._pieces(tokens, hidden, caches, most_rows)

    def _pieces(self, tokens: Any, hidden: Any, caches: list[Any], most_rows: int) -> Iterator[Any]:
        for first in range(0, hidden.shape[1], most_rows):
            some = hidden[:, first : first + most_rows]
            with _answered(self._inner, lambda *_, some=some, **__: some):
                logits = self._model(tokens[:, first : first + most_rows], cache=caches)
            yield logits[0]


def _inner(model: Any) -> Any:
    """Return the module that holds the decoder layers, or None where that is the model itself."""
    found = dict(anatomy.modules(model))
    for path in found:
        owner, _, number = path.rpartition(".")
        inner, _, name = owner.rpartition(".")
        if number.isdigit() and name in ("layers", "h", "blocks"):
            return found.get(inner) if inner else None
    return None


@contextlib.contextmanager
def _answered(module: Any, answer: Answer) -> Iterator[None]:
    """Let calls of a module be answered by `answer`."""
    kind: Any = type(module)
    object.__setattr__(module, "_answer", answer)
    module.__class__ = _answering(kind)
    try:
        yield
    finally:
        module.__class__ = kind
        vars(module).pop("_answer", None)


@cache
def _answering(kind: Any) -> Any:
    def call(self: Any, *given: Any, **named: Any) -> Any:
        return vars(self)["_answer"](*given, **named)

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
