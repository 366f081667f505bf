"""What a conversation is held under: its system prompt, how answers are drawn and thought over."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from edger1 import sampling
from edger1.errors import UsageError
from edger1.messages import Generate, Sampling

THINK = ("auto", "on", "off")
SPECULATE = ("off", "auto", "lookup", "mtp", "draft")
SAMPLES_MAX = 64
"""Answers to one question; each is written at the same time, into a cache of its own."""


@dataclass(frozen=True)
class Settings:
    """Settings of one conversation; None leaves a choice to the model."""

    system: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    think: str = "auto"
    """Whether the model thinks first: "auto", "on" or "off"."""
    think_budget: int | None = None
    """Most tokens of a thought; then it is closed and the answer follows."""
    think_at_least: int | None = None
    """A thought goes on until it has so many tokens."""
    samples: int = 1
    """How many answers are drawn to a question, of which the majority decides."""
    speculate: str = "off"
    """Where drafts come from: "off", "auto", "lookup", "mtp" or "draft"."""
    context_shift: bool = False
    """Whether the oldest turns are dropped where the context is full."""

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Settings:
        """Read settings back; what a later version has added, and what this one cannot use, is left out."""
        known = {each.name: found[each.name] for each in fields(cls) if each.name in found}
        names = {each.name for each in fields(Sampling)}
        drawn = known.pop("sampling", None) or {}
        settings = cls(sampling=Sampling(**{k: v for k, v in drawn.items() if k in names}))
        for name, value in known.items():
            with_it = replace(settings, **{name: value})
            settings = with_it if _usable(with_it) else settings
        return settings


def check(settings: Settings) -> None:
    """Raise UsageError for settings of a wrong type or out of range, or that contradict each other."""
    sampling.check(settings.sampling)
    sampling.check_count("max_tokens", settings.max_tokens)
    check_own(settings)


def check_own(settings: Settings) -> None:
    """Check what is neither sampling nor the length of an answer, see `check`."""
    if settings.system is not None and not isinstance(settings.system, str):
        raise UsageError(f"system is {settings.system!r:.100}; expected a text in quotes.")
    if settings.think not in THINK:
        raise UsageError(f'think is {settings.think!r}; expected "auto", "on" or "off".')
    if settings.speculate not in SPECULATE:
        raise UsageError(f"speculate is {settings.speculate!r}; expected one of {', '.join(SPECULATE)}.")
    count = settings.samples
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= SAMPLES_MAX:
        raise UsageError(f"samples is {count!r}; expected a whole number from 1 to {SAMPLES_MAX}.")
    if not isinstance(settings.context_shift, bool):
        raise UsageError(f"context_shift is {settings.context_shift!r:.100}; expected true or false.")
    bounds = {name: getattr(settings, name) for name in ("think", "think_budget", "think_at_least")}
    sampling.check_thinking(Generate("", "", **bounds))


def _usable(settings: Settings) -> bool:
    try:
        check_own(settings)
        sampling.check_count("max_tokens", settings.max_tokens)
    except UsageError:
        return False
    return True
