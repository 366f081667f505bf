"""What a message keeps of the end of its answer, read back.

It may come from a file that another program wrote, or that somebody changed: what is not as it should be is left out.
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from edger1.messages import Done, Figures, Usage
from edger1.tui.tree import Node

_OF_EXPERTS = ("hit_rate", "bytes_per_token", "stall_share")


def recalled(found: dict[str, Any]) -> Done:
    """Return what `edger1.tui.hearing.kept` made into a mapping."""
    figures = found.get("figures")
    nested: dict[str, Any] = {}
    if isinstance(figures, dict):
        if _is_experts(figures.get("experts")):
            nested["experts"] = figures["experts"]
        if _is_drafts(figures.get("drafts")):
            nested["drafts"] = figures["drafts"]
    return Done(
        "",
        str(found.get("finish_reason", "")),
        Usage(**_numbers(Usage, found.get("usage"))),
        Figures(**_numbers(Figures, figures), **nested),
        notes=_texts(found.get("notes")),
    )


def notes_of(node: Node) -> list[str]:
    """Return what is to be said of an answer that is not as it seems."""
    return _texts((node.figures or {}).get("notes"))


def _texts(found: Any) -> list[str]:
    return [each for each in found if isinstance(each, str)] if isinstance(found, list | tuple) else []


def _numbers(kind: type, given: Any) -> dict[str, Any]:
    names = [each.name for each in fields(kind)]
    return {name: given[name] for name in names if _is_number(given.get(name))} if isinstance(given, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_experts(value: Any) -> bool:
    decode = value.get("decode") if isinstance(value, dict) else None
    return isinstance(decode, dict) and all(
        name in decode and (decode[name] is None or _is_number(decode[name])) for name in _OF_EXPERTS
    )


def _is_drafts(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("off"), str):
        return False
    gain = value.get("gain")
    return (
        all(_is_number(value.get(name)) for name in ("drafted", "accepted"))
        and "gain" in value
        and (gain is None or _is_number(gain))
    )
