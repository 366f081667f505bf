"""Preference pairs from answers that a verifier has judged, as Sky-T1-Flash was taught to think shorter.

For each prompt the shortest right answer is preferred to

    shorter    the longest right one: the same result for fewer tokens
    right      the longest wrong one: so that brevity costs no accuracy

Answers come from a distillation's samples.jsonl or a GRPO run's rollouts.jsonl. Those that were cut off make no pairs:
a text without an end teaches nothing about length. The same answers give the same pairs, in the prompts' order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edger1.errors import EdgeR1Error, FormatError, UsageError
from edger1.fetch.place import write_atomically
from edger1.tasks.task import Question
from edger1.train.rewards.completion import split_thought
from edger1.train.rewards.opening import RIGHT

KINDS = ("shorter", "right")


@dataclass(frozen=True)
class Answer:
    """One answer to a prompt, judged."""

    text: str
    length: int
    """In tokens; in characters where those were not counted."""
    right: bool
    finished: bool


@dataclass
class Answers:
    """All answers to one prompt."""

    messages: list[dict[str, Any]]
    where: str
    answers: list[Answer] = field(default_factory=list)


@dataclass(frozen=True)
class Preferences:
    """The pairs as rows, and what could not be paired."""

    rows: list[dict[str, Any]]
    counts: dict[str, int]

    def lines(self) -> list[str]:
        """Return the counts as lines, those of nothing left out but for the pairs."""
        kept = ("prompts", *(f"pairs, {kind}" for kind in KINDS))
        return [f"{name}: {count:,}" for name, count in self.counts.items() if count or name in kept]


def build(prompts: Iterable[Answers], kinds: Sequence[str] = KINDS) -> Preferences:
    """Pair the answers of each prompt.

    Rows are {"prompt": messages, "chosen": [turn], "rejected": [turn], "kind", "lengths": [chosen's, rejected's],
    "source"}.
    """
    rows: list[dict[str, Any]] = []
    counts = dict.fromkeys(
        (
            "prompts",
            *(f"pairs, {kind}" for kind in KINDS if kind in kinds),
            "prompts without a right answer",
            "prompts with one right answer, or several of one length, none to be shorter than",
            "prompts without a wrong answer",
            "answers left aside, cut off",
        ),
        0,
    )
    prompts_, no_right, no_longer, no_wrong, cut = "prompts", *list(counts)[-4:]
    for prompt in prompts:
        counts[prompts_] += 1
        counts[cut] += sum(not answer.finished for answer in prompt.answers)
        whole = [answer for answer in prompt.answers if answer.finished]
        right = sorted((answer for answer in whole if answer.right), key=lambda answer: answer.length)
        wrong = sorted((answer for answer in whole if not answer.right), key=lambda answer: answer.length)
        if not right:
            counts[no_right] += 1
            continue
        found = {"shorter": right[-1] if right[-1].length > right[0].length else None, "right": (wrong or [None])[-1]}
        for kind in KINDS:
            rejected = found[kind]
            if kind not in kinds:
                continue
            if rejected is None:
                counts[no_longer if kind == "shorter" else no_wrong] += 1
                continue
            counts[f"pairs, {kind}"] += 1
            rows.append(_row(prompt, kind, right[0], rejected))
    return Preferences(rows, counts)


def _row(prompt: Answers, kind: str, chosen: Answer, rejected: Answer) -> dict[str, Any]:
    turns = {
        name: [{"role": "assistant", "content": a.text}] for name, a in (("chosen", chosen), ("rejected", rejected))
    }
    lengths = [chosen.length, rejected.length]
    return {"prompt": prompt.messages, **turns, "kind": kind, "lengths": lengths, "source": prompt.where}


def read_samples(path: Path) -> list[Answers]:
    """Read a distillation's samples.jsonl. Raises FormatError where it is none."""
    found: dict[int, Answers] = {}
    counted = True
    for where, row in _rows(path):
        try:
            of = found.setdefault(row["prompt"], Answers(row["messages"], str(row["source"])))
            counted = counted and row["tokens"] is not None
            of.answers.append(
                Answer(str(row["text"]), row["tokens"] or 0, bool(row["accepted"]), str(row["finish"]) == "stop")
            )
        except (KeyError, TypeError, AttributeError):
            raise FormatError(f"{where} is no sample of edger1 distill; expected its samples.jsonl.") from None
    if not counted:
        for of in found.values():
            of.answers = [Answer(a.text, len(a.text), a.right, a.finished) for a in of.answers]
    return list(found.values())


def read_rollouts(path: Path, questions: Sequence[Question], judge: str | None) -> list[Answers]:
    """Read a GRPO run's rollouts.jsonl; all completions of a prompt belong together, whichever step sampled them.

    questions: the run's prompts, which the log names by their rows. judge: the reward whose 1 says that an answer is
    right; may be None where there is one alone.

    Raises FormatError where the log is none, UsageError where the judge or the prompts are not the run's.
    """
    # Of lines with the same number and row the last one counts: a resumed run writes some again.
    entries: dict[tuple[int, int], dict[str, Any]] = {}
    names: set[str] = set()
    for where, row in _rows(path):
        try:
            entries[row["number"], row["row"]] = row
            names |= row["rewards"].keys()
            _ = row["prompt"], row["text"], row["tokens"], row["finished"]
        except (KeyError, TypeError, AttributeError):
            raise FormatError(f"{where} is no completion of a GRPO run; expected its rollouts.jsonl.") from None
    listed = ", ".join(sorted(names))
    if judge is None:
        if len(names) != 1:
            raise UsageError(f"{path} has the rewards {listed}; name the one that says what is right, with --judge.")
        (judge,) = names
    if entries and judge not in names:
        raise UsageError(f"{path} has no reward {judge!r}; it has {listed}.")
    messages = {question.where: question.messages for question in questions}
    found: dict[str, Answers] = {}
    for (_, _), row in sorted(entries.items()):
        name = row["prompt"]
        if name not in messages:
            raise UsageError(f"{path} has a prompt from {name!r}, which is not among --prompts; give the run's own.")
        of = found.setdefault(name, Answers(messages[name], name))
        right = row["rewards"].get(judge, 0.0) >= RIGHT
        of.answers.append(Answer(_as_trace(row["text"]), row["tokens"], right, row["finished"]))
    return list(found.values())


def write(path: Path, preferences: Preferences) -> None:
    """Write the pairs as JSONL, whole or not at all. Raises EdgeR1Error where that fails."""
    text = "".join(json.dumps(row, ensure_ascii=True) + "\n" for row in preferences.rows)
    try:
        write_atomically(path, text)
    except OSError as error:
        raise EdgeR1Error(f"{path} cannot be written: {(error.strerror or str(error)).lower()}.") from None


def _as_trace(text: str) -> str:
    """Return a completion with both markers of its thought, of which the prompt may have held the first."""
    thinking, answer = split_thought(text)
    return answer if not thinking else f"<think>\n{thinking}\n</think>\n\n{answer}"


def _rows(path: Path) -> Iterable[tuple[str, Any]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}, line {number},"
                if not line.strip():
                    continue
                try:
                    yield where, json.loads(line)
                except (ValueError, RecursionError):
                    if not line.endswith(b"\n"):
                        # It was being written when its run ended.
                        return
                    raise FormatError(f"{where} is no JSON.") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}.") from None
