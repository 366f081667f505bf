"""The figures of an answer in words."""

from __future__ import annotations

from typing import Any

from edger1.messages import Done


def memory(size_bytes: int) -> str:
    """A number of bytes as people read it: 412 MB, 5.3 GB (decimal units)."""
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """A length of time as people read it: 4.2 s, 37 s, 2 min 5 s."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def experts(streamed: dict[str, Any]) -> list[str]:
    """What streaming the experts took while the answer was decoded; nothing where all had their slots."""
    decode = streamed["decode"]
    if decode["hit_rate"] is None:
        return []
    words = [f"experts {decode['hit_rate']:.0%} in memory"]
    if (decode["bytes_per_token"] or 0) >= 5e5:
        words.append(f"{memory(int(decode['bytes_per_token']))} read a token")
    if decode["stall_share"] is not None and decode["stall_share"] >= 0.005:
        words.append(f"waiting {decode['stall_share']:.0%}")
    return words


def figures(done: Done) -> list[str]:
    """What one answer cost, the most wanted figure first; what was not measured is left out."""
    cost, usage = done.figures, done.usage
    words = []
    if cost.decode_tokens_per_s is not None:
        words.append(f"{cost.decode_tokens_per_s:.1f} tok/s")
    if cost.experts is not None:
        words += experts(cost.experts)
    if cost.context_size:
        words.append(f"context {cost.context_used:,} / {cost.context_size:,}")
    if cost.time_to_first_token_s is not None:
        words.append(f"first token {cost.time_to_first_token_s:.2f} s")
    if usage.prompt_tokens:
        words.append(f"prompt {usage.prefilled_tokens:,} new, {usage.cached_tokens:,} cached")
    if cost.peak_memory_bytes:
        words.append(memory(cost.peak_memory_bytes))
    return words
