"""What a conversation is held under: its system prompt and how its answers are drawn."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from edger1.messages import Sampling


@dataclass(frozen=True)
class Settings:
    """Settings of one conversation; None leaves a choice to the model."""

    system: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    think: str = "auto"
    """Whether the model thinks first: "auto", "on" or "off"."""

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Settings:
        """Read settings back; what a later version has added is left out."""
        known = {each.name: found[each.name] for each in fields(cls) if each.name in found}
        names = {each.name for each in fields(Sampling)}
        drawn = known.pop("sampling", None) or {}
        return cls(sampling=Sampling(**{k: v for k, v in drawn.items() if k in names}), **known)
