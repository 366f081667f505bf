"""The final answer out of a completion's answer: from `<answer>`, from `\\boxed`, or the last line."""

from __future__ import annotations

import re

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_LEAD = re.compile(
    r"^(?:so,?\s+|therefore,?\s+|thus,?\s+|hence,?\s+)?(?:the\s+)?(?:final\s+|correct\s+)?"
    r"answer(?:\s+is)?\s*[:=]?\s+(?=\S)|^answer\s*[:=]\s*",
    re.IGNORECASE,
)
_FENCE = re.compile(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)```", re.DOTALL)


def final_answer(answer: str, lines: int = 1) -> str:
    """Return what the model settled on.

    That is the last `<answer>...</answer>`, else the last `\\boxed{...}`, else the last `lines` lines; a lead such as
    "The answer is" and bold markers are cut off a line. `lines` above 1 is for answers of several lines, grids for
    instance. Empty where there is none.
    """
    if tagged := _TAGGED.findall(answer):
        inner = str(tagged[-1]).strip()
        return boxed(inner) or inner
    if (inside := boxed(answer)) is not None:
        return inside
    kept = answer.strip().splitlines()[-lines:]
    if len(kept) != 1:
        return "\n".join(kept)
    return _without_lead(kept[0])


def boxed(text: str) -> str | None:
    """Return what stands in the last complete `\\boxed{...}`, braces balanced; None where there is none."""
    found = None
    for match in re.finditer(r"\\boxed\s*\{", text):
        depth, start = 1, match.end()
        for place in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                found = text[start:place].strip()
                break
    return found


def fenced(answer: str, *languages: str) -> str | None:
    """Return the last fenced block of one of `languages`, else the last of any, else None."""
    blocks = _FENCE.findall(answer)
    named = [body for language, body in blocks if language.lower() in languages]
    bodies = named or [body for _, body in blocks]
    return str(bodies[-1]) if bodies else None


def _without_lead(line: str) -> str:
    line = re.sub(r"\*\*(.+?)\*\*", r"\1", line.strip())
    return _LEAD.sub("", line, count=1).strip()
