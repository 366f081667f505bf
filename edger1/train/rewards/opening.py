"""Rewards by name: what `[rewards]` of a settings file and `--reward` say, made into functions that score."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self

from edger1.errors import RewardError, UsageError
from edger1.train.rewards.builtin import BUILTIN
from edger1.train.rewards.calling import as_number
from edger1.train.rewards.completion import Completion
from edger1.train.rewards.spec import Spec, check_options, parse
from edger1.train.rewards.worker import CallError, Worker

TIMEOUT_S = 10.0
RIGHT = 1.0 - 1e-6
"""From which value on a reward that judges says that an answer is right."""
BUILTIN_TIMEOUT_S = 3.0
_POLICIES = ("stop", "zero")
_MOST_FAILURES = 1000


class Rewards:
    """Several rewards with weights. Close it, or use it in a `with` block, to end its worker process."""

    def __init__(self, specs: Sequence[Spec], timeout_s: float, on_error: str) -> None:
        self._specs = list(specs)
        self._on_error = on_error
        self.names: tuple[str, ...] = tuple(spec.name for spec in specs)
        self.weights: dict[str, float] = {spec.name: spec.weight for spec in specs}
        self.failures: list[str] = []
        """What went wrong and was counted as 0, the newest last; the first thousand."""
        self.failed = 0
        """How often that was."""
        self._here = {
            spec.name: partial(
                BUILTIN[spec.kind].function,
                **check_options(
                    BUILTIN[spec.kind].function,
                    spec.options,
                    f'the reward "{spec.name}"',
                    {"correct"} if spec.kind == "cosine" else set(),
                ),
            )
            for spec in specs
            if _place(spec) != "worker"
        }
        for spec in specs:
            if spec.kind == "cosine" or spec.by is not None:
                self._check_by(spec)
        there = [spec for spec in specs if _place(spec) == "worker"]
        self._worker = Worker(there, timeout_s) if there else None
        if self._worker is not None:
            self._worker.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def score(self, completions: Sequence[Completion]) -> list[dict[str, float]]:
        """Return each completion's value of every reward, unweighted.

        Raises RewardError where a reward raises, gives no finite number or takes longer than its time. What a model
        wrote may make a built-in reward do so, by a tower of powers for instance: that counts as 0 and is noted.
        Raises UsageError where a row lacks what a reward needs.
        """
        scores: list[dict[str, float]] = [{} for _ in completions]
        # Those that depend on another come last.
        for spec in sorted(self._specs, key=lambda spec: spec.kind == "cosine"):
            for scored, value in zip(scores, self._values(spec, completions, scores), strict=True):
                scored[spec.name] = value
        return [{name: scored[name] for name in self.names} for scored in scores]

    def total(self, scores: dict[str, float]) -> float:
        """Return the weighted sum of one completion's values."""
        return sum(self.weights[name] * value for name, value in scores.items())

    @property
    def judge(self) -> str | None:
        """The name of the first reward whose 1 means that the answer is right; None where there is none."""
        return next((spec.name for spec in self._specs if spec.kind == "file" or BUILTIN[spec.kind].judges), None)

    def right(self, scores: dict[str, float]) -> bool:
        """Whether the judge among the rewards, or the first of them, says that the answer is right."""
        return scores[self.judge or self.names[0]] >= RIGHT

    def close(self) -> None:
        """End the worker process. Closing twice does nothing."""
        if self._worker is not None:
            self._worker.close()

    def _values(self, spec: Spec, completions: Sequence[Completion], scores: list[dict[str, float]]) -> list[float]:
        total = len(completions)
        place = _place(spec)
        if place == "threads":
            with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
                futures = [pool.submit(self._here[spec.name], completion) for completion in completions]
                return [
                    self._guarded(spec, completion, k, total, lambda f=future: as_number(f.result()))  # type: ignore[misc]
                    for k, (completion, future) in enumerate(zip(completions, futures, strict=True))
                ]
        values = []
        for k, completion in enumerate(completions):
            call: Callable[[], float]
            if place == "worker":
                assert self._worker is not None
                call = partial(self._worker.score, spec, completion)
            else:
                more = {"correct": scores[k][spec.by or self.judge or ""] >= RIGHT} if spec.kind == "cosine" else {}
                call = partial(self._here[spec.name], completion, **more)
            values.append(self._guarded(spec, completion, k, total, call))
        return values

    def _guarded(self, spec: Spec, completion: Completion, k: int, total: int, call: Callable[[], float]) -> float:
        try:
            return call()
        except UsageError:
            raise
        except CallError as failure:
            said = str(failure)
        except Exception as error:
            said = f"raised {type(error).__name__}: {error}"
        row = completion.where or "a row without a name"
        message = f'The reward "{spec.name}" {said}, for completion {k + 1} of {total}: {row}.'
        if self._on_error == "stop" and spec.kind == "file":
            raise RewardError(f'{message} Mend it, or count such as 0 with on_error = "zero".')
        self.failed += 1
        if len(self.failures) < _MOST_FAILURES:
            self.failures.append(f"{message} It counts as 0.")
        return 0.0

    def _check_by(self, spec: Spec) -> None:
        if spec.kind != "cosine":
            raise UsageError(f'The reward "{spec.name}" does not depend on another; by= is for cosine.')
        if spec.by is None and self.judge is None:
            raise UsageError(
                "The reward cosine needs another that tells whether an answer is right; list one too, such as numeric."
            )
        if spec.by is not None and (spec.by not in self.names or spec.by == spec.name):
            others = ", ".join(name for name in self.names if name != spec.name) or "none"
            raise UsageError(f'The reward "{spec.name}" has by={spec.by}; the other rewards listed: {others}.')


def open_rewards(
    specs: Sequence[str],
    *,
    timeout_s: float = TIMEOUT_S,
    on_error: str = "stop",
    folder: Path | None = None,
) -> Rewards:
    """Open rewards, each given as `NAME`, `gym:TASK` or `FILE.py:FUNCTION`, then `:key=value,...` where wanted.

    `weight=0.5` among the keys is the reward's weight in the total, 1 otherwise; `timeout=2` its own seconds; `name=x`
    what it is called; the others are the function's own. `timeout_s`: of one completion's score, at most 3 s for
    built-in ones. `on_error`, for functions of the user's: "stop" raises RewardError, "zero" counts 0 and notes the
    failure. `folder`: what relative files are relative to, the current folder otherwise.

    Raises UsageError for a name, file, function or key that is not there.
    """
    if isinstance(specs, str) or not specs:
        raise UsageError(f'The rewards are {specs!r}; expected a list such as ["numeric", "format:weight=0.2"].')
    if on_error not in _POLICIES:
        raise UsageError(f'on_error is {on_error!r}; expected "stop" or "zero".')
    if not timeout_s > 0:
        raise UsageError(f"The timeout of rewards is {timeout_s!r} s; expected more than 0.")
    parsed = [_placed(parse(text, BUILTIN), folder or Path.cwd(), timeout_s) for text in specs]
    names = [spec.name for spec in parsed]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"The reward {twice[0]} is listed twice; give one of them a name=... of its own.")
    return Rewards(parsed, timeout_s, on_error)


def _place(spec: Spec) -> str:
    return "worker" if spec.kind == "file" else BUILTIN[spec.kind].place


def _placed(spec: Spec, folder: Path, timeout_s: float) -> Spec:
    """Return a spec with the whole paths of its files, and its time."""
    if spec.kind == "schema" and spec.options.get("file"):
        path = folder / Path(spec.options["file"]).expanduser()
        spec = replace(spec, options=spec.options | {"file": str(path)})
    if spec.kind != "file":
        # What hangs here is what the model wrote, and costs its time at every completion like it.
        return replace(spec, timeout_s=spec.timeout_s or min(BUILTIN_TIMEOUT_S, timeout_s))
    path = (folder / Path(spec.file).expanduser()).resolve()
    if not path.is_file():
        raise UsageError(f'The reward "{spec.text}" is in {path}, which is not there.')
    return replace(spec, file=str(path))
