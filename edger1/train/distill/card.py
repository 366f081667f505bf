"""The card of a distilled data set: README.md as the Hugging Face hub shows it."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edger1.train.distill.dataset import Counts, Origin
    from edger1.train.distill.sampling import Settings

_NAME = re.compile(r"[A-Za-z0-9._/ +-]{1,100}")


def card(teacher: dict[str, Any], settings: Settings, counts: Counts, origin: Origin, *, finished: bool) -> str:
    """Return the card's Markdown: what is in the data set, how it came to be, and how it is made again."""
    license_ = origin.license if origin.license and _NAME.fullmatch(origin.license) else "other"
    verified = bool(origin.rewards)
    head = [
        "---",
        f"license: {license_}",
        "task_categories:",
        "- text-generation",
        "tags:",
        "- reasoning",
        "- distillation",
    ]
    head += ["configs:", "- config_name: default", "  data_files: data.jsonl", "---", ""]
    kind = "verified" if verified else "unverified"
    body = [f"# Reasoning traces of {teacher['name']}, {kind}", ""]
    if not finished:
        body += [f"**Unfinished**: {counts.samples:,} of {counts.samples_wanted:,} samples are here.", ""]
    body += [
        f"{counts.kept:,} answers to {counts.prompts - counts.prompts_without_answer:,} prompts, one a line of "
        "`data.jsonl`, as messages; reasoning stands between `<think>` and `</think>` in the assistant's turn. "
        "`samples.jsonl` has every sample, with its verdict.",
        "",
        "## Counts",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _counts(counts, verified)),
        "",
        *_lengths(counts),
        "## How it was made",
        "",
        *(f"- {line}" for line in _made(teacher, settings, origin)),
        "",
        "## What was changed in the answers",
        "",
        *(f"- {line}" for line in _changed()),
        "",
        "## Licence",
        "",
        _license(origin),
        "",
        "## To make it again",
        "",
        f"    {_plain(origin.command)}",
        "",
        "The same teacher, prompts and settings give the same rows: from the cache in `samples.sqlite` at once, "
        "without it as far as the teacher answers the same for the same seed.",
        "",
    ]
    return "\n".join(head + body)


def _counts(counts: Counts, verified: bool) -> list[tuple[str, str]]:
    rows = [("prompts given", f"{counts.prompts_given:,}")]
    rows += [
        (name, f"{value:,}")
        for name, value in (
            ("rows that were no prompts, left out", counts.prompts_bad),
            ("repeated prompts, left out", counts.prompts_repeated),
            ("prompts found in the evaluation set, left out", counts.prompts_in_evaluation),
        )
        if value
    ]
    rows += [("prompts asked", f"{counts.prompts:,}"), ("samples", f"{counts.samples:,}")]
    if counts.unanswered:
        rows.append(("samples that the teacher did not give", f"{counts.unanswered:,}"))
    rows.append(("cut off at the limit, rejected", f"{counts.cut_off:,}"))
    if verified:
        rows.append(("wrong, rejected", f"{counts.wrong:,}"))
    if counts.reward_failures:
        rows.append(("times that a reward failed on an answer, which counts as wrong", f"{counts.reward_failures:,}"))
    rows += [
        ("accepted", f"{counts.accepted:,} ({counts.acceptance:.1%} of the samples)"),
        ("accepted without reasoning", f"{counts.without_reasoning:,}"),
        ("prompts without an accepted answer", f"{counts.prompts_without_answer:,}"),
        ("kept", f"{counts.kept:,}"),
    ]
    return rows


def _lengths(counts: Counts) -> list[str]:
    if not counts.lengths:
        return []
    lines = ["| answers | number | mean | median | longest | |", "|---|---|---|---|---|---|"]
    for name, of in counts.lengths.items():
        lines.append(f"| {name} | {of.count:,} | {of.mean:,.0f} | {of.median:,.0f} | {of.longest:,} | {of.unit} |")
    return [*lines, ""]


def _made(teacher: dict[str, Any], settings: Settings, origin: Origin) -> list[str]:
    local = teacher["kind"] == "local"
    where = f"fingerprint {teacher['fingerprint']}, precision {teacher['precision']}" if local else teacher["address"]
    drawing = settings.drawing.given()
    drawn = json.dumps({name: value for name, value in drawing.items() if name != "think" or local})
    kept = "all accepted answers" if settings.keep is None else f"the {settings.keep} shortest accepted of each prompt"
    by = "; ".join(f"`{_plain(reward)}`" for reward in origin.rewards)
    return [
        f"Teacher: {_plain(str(teacher['name']))} ({teacher['kind']}, {where})",
        f"Prompts: {_plain(origin.prompts)}",
        f"Samples of each prompt: {settings.samples}, seed {settings.seed}, settings {drawn}; what is not named was "
        "left to the teacher's own defaults",
        f"Verified by: {by}" if by else "Verified by nothing: wrong answers are among these",
        f"Kept: {kept}, a repeated answer once; cut off answers never",
        *(
            [f"Not in: {', '.join(map(_plain, origin.evaluation))} (no shared run of 13 words)"]
            if origin.evaluation
            else []
        ),
    ]


def _changed() -> list[str]:
    return [
        "The reasoning stands between `<think>` and `</think>`, with a line break inside each marker and a blank "
        "line after, whatever markers or fields the teacher used for it.",
        "Blanks and line breaks at the beginning and end of reasoning and answer are gone.",
        "Nothing else: no word was rewritten.",
    ]


def _license(origin: Origin) -> str:
    if origin.license:
        return f"{_plain(origin.license)}, as the maker of this data set said."
    return (
        "Not stated. The teacher's licence or terms of service may say what its answers may be used for, and the "
        "prompts have a licence of their own: see to both before passing this on."
    )


def _plain(text: str) -> str:
    """Keep a text within its line of Markdown."""
    return " ".join(text.replace("`", "'").split())
