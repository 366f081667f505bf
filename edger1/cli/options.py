"""Options that several commands share, and how an answer's figures are printed."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from edger1.messages import Figures, Usage

Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", help='Memory ceiling, such as "6GB" or "50%". Default: three quarters of the machine.'
    ),
]
Context = Annotated[
    int | None, typer.Option(metavar="TOKENS", help="Context: prompt and answer together. Default: up to 8192.")
]
Precision = Annotated[
    str,
    typer.Option(metavar="fast|exact", help='"fast" computes with int8 activations on CPUs, "exact" with f32.'),
]
ExpertSlots = Annotated[
    str | None,
    typer.Option(
        "--expert-slots",
        metavar="N|P%",
        help="Slots a layer for streamed experts, as a number or a share of them. Default: what the ceiling allows.",
    ),
]
Adapter = Annotated[
    str | None,
    typer.Option("--adapter", metavar="DIR", help="Adapter to put over the model, in mlx-lm's or PEFT's layout."),
]
KvBits = Annotated[
    str | None,
    typer.Option(
        "--kv-bits",
        metavar="8|4|off",
        help="Bits of a quantized KV cache: less memory for a little loss. Default: off.",
    ),
]
Draft = Annotated[
    str | None,
    typer.Option("--draft", metavar="MODEL", help="Smaller model with the same vocabulary, which drafts for this one."),
]
Speculate = Annotated[
    str | None,
    typer.Option(
        "--speculate",
        metavar="auto|off|lookup|mtp|draft",
        help="Where drafted tokens come from; the answer is the same. Default: off, and auto with --draft.",
    ),
]
PromptCache = Annotated[
    Path | None,
    typer.Option(
        "--prompt-cache",
        metavar="FILE",
        help="Restore what the model made of an earlier prompt; where there is no such file, save it there.",
    ),
]
ContextShift = Annotated[
    bool,
    typer.Option("--context-shift", help="Drop the oldest turns or tokens where the context is full, and go on."),
]
System = Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")]
MaxTokens = Annotated[int | None, typer.Option(metavar="N", help="Longest answer in tokens. Default: what fits.")]
Temperature = Annotated[
    float | None, typer.Option(metavar="T", help="0 is greedy. Default: what the model recommends.")
]
TopP = Annotated[float | None, typer.Option("--top-p", metavar="P", help="Keep the likeliest tokens up to this mass.")]
TopK = Annotated[int | None, typer.Option("--top-k", metavar="K", help="Keep the K likeliest tokens; 0 is off.")]
MinP = Annotated[
    float | None, typer.Option("--min-p", metavar="P", help="Drop tokens below this share of the likeliest one's.")
]
RepetitionPenalty = Annotated[
    float | None, typer.Option("--repetition-penalty", metavar="R", help="Above 1 discourages repeating; 1 is none.")
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="The same seed gives the same answer.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End the answer before this text; repeatable.")]
Think = Annotated[str, typer.Option(metavar="auto|on|off", help="Reasoning, where the model's template can switch it.")]
ThinkBudget = Annotated[
    int | None, typer.Option("--think-budget", metavar="N", help="Close the thought after N tokens; 0 is no thought.")
]
ThinkAtLeast = Annotated[
    int | None, typer.Option("--think-at-least", metavar="N", help='Let the thought go on ("Wait") for N tokens.')
]
Samples = Annotated[
    int | None,
    typer.Option("--samples", metavar="N", help="Draw N answers, and give the one that most of them come to."),
]
Offline = Annotated[bool, typer.Option("--offline", help="Ask no hub or package index for anything.")]


def kv_bits(asked: str | None, configured: int | None = None) -> int | None:
    """Read --kv-bits, or else what config.toml says. Raises UsageError for anything but 8, 4 and off."""
    from edger1.errors import UsageError
    from edger1.memory import KV_BITS

    if asked is None:
        return configured
    if asked == "off":
        return None
    if asked not in map(str, KV_BITS):
        raise UsageError(
            f"--kv-bits is {asked!r}; expected 8, 4 or off. 8 loses next to nothing, 4 takes half of that."
        )
    return int(asked)


def figures_line(usage: Usage, figures: Figures) -> str:
    """Put what an answer cost into one line."""
    from edger1.units import format_bytes

    parts = [f"{usage.completion_tokens} tokens"]
    thought = f", {usage.thought_tokens} of them thought" if usage.thought_tokens else ""
    if figures.decode_tokens_per_s is not None:
        parts[0] += f" at {figures.decode_tokens_per_s:.1f}/s"
    parts[0] += thought
    prefill = f"prompt {usage.prefilled_tokens} tokens"
    if figures.prefill_tokens_per_s is not None:
        prefill += f" at {figures.prefill_tokens_per_s:.0f}/s"
    if usage.cached_tokens:
        prefill += f" + {usage.cached_tokens} cached"
    parts.append(prefill)
    if figures.time_to_first_token_s is not None:
        parts.append(f"first token after {figures.time_to_first_token_s:.2f} s")
    if figures.experts is not None:
        parts.append(experts_line(figures.experts))
    if figures.drafts is not None and figures.drafts["drafted"]:
        parts.append(drafts_line(figures.drafts))
    parts.append(f"context {figures.context_used}/{figures.context_size}")
    parts.append(f"peak memory {format_bytes(figures.peak_memory_bytes)}")
    return " · ".join(parts)


def votes_line(votes: dict[str, int], samples: int) -> str:
    """Put the votes of several samples into one line."""
    said = [f"{printable(' '.join(answer.split()))[:60]}: {count}" for answer, count in votes.items()]
    return f"{samples} samples · " + (" · ".join(said) or "no answer")


def experts_line(experts: dict[str, Any]) -> str:
    """Put what streaming took while decoding into a few words."""
    from edger1.units import format_bytes

    decode = experts["decode"]
    if decode["hit_rate"] is None:
        return "experts all in their slots"
    said = f"experts {decode['hit_rate']:.0%} in slots"
    if decode["bytes_per_token"] is not None:
        said += f", {format_bytes(int(decode['bytes_per_token']))} read a token"
    return said + f", {decode['stall_share'] or 0:.0%} of the time waiting"


def drafts_line(drafts: dict[str, Any]) -> str:
    """Put what drafting came to into a few words."""
    gain = "" if drafts["gain"] is None else f", {drafts['gain']:.2f} times as fast there"
    return f"{drafts['accepted']} of {drafts['drafted']} drafts stood{gain}"


def printable(text: str) -> str:
    """Drop control characters, which a terminal would obey, from a model's words; newlines and tabs stay."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
