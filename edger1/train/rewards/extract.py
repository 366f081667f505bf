"""The final answer out of a completion's answer: from `<answer>`, from `\\boxed`, or the last line."""

from __future__ import annotations

import re

_BRACES = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")
_LEAD = re.compile(
    r"^(?:so,?\s+|therefore,?\s+|thus,?\s+|hence,?\s+)?(?:the\s+)?(?:final\s+|correct\s+)?"
    r"answer(?:\s+is)?\s*[:=]?\s+(?=\S)|^answer\s*[:=]\s*",
    re.IGNORECASE,
)
# Not the powers of x**2 + y**2.
_BOLD = re.compile(r"(?<![\w)*])\*\*(?=\S)(.+?)(?<=\S)\*\*(?![\w*(])")
_LONGEST_LINE = 1000
_FENCE = re.compile(r"```[ \t]*([\w+-]*)[^\n]*\n(.*?)```", re.DOTALL)


def final_answer(answer: str, lines: int = 1) -> str:
    """Return what the model settled on.

    That is the last `<answer>...</answer>`, else the last `\\boxed{...}`, else the last `lines` lines; a lead such as
    "The answer is" and bold markers are cut off a line. `lines` above 1 is for answers of several lines, grids for
    instance. Empty where there is none.
    """
    if (inner := _tagged(answer)) is not None:
        return boxed(inner) or inner
    if (inside := boxed(answer)) is not None:
        return inside
    kept = answer.strip().splitlines()[-lines:]
    if len(kept) != 1:
        return "\n".join(kept)
    return _without_lead(kept[0])


def boxed(text: str) -> str | None:
    """Return what stands in the last complete `\\boxed{...}`, braces balanced; None where there is none."""
    opened: list[int | None] = []
    found, at = None, -1
    # One pass, since a model that goes round in circles may open thousands that it never closes.
    for match in _BRACES.finditer(text):
        if match[0].endswith("{") and match[0] != "\\{":
            opened.append(match.end() if match[0] != "{" else None)
        elif match[0] == "}" and opened:
            start = opened.pop()
            if start is not None and start > at:
                found, at = text[start : match.start()].strip(), start
    return found


def _tagged(text: str) -> str | None:
    """Return what the last `<answer>` that is closed holds."""
    start = text.rfind("<answer>", 0, max(0, text.rfind("</answer>")))
    if start < 0:
        return None
    return text[start + len("<answer>") :].partition("</answer>")[0].strip()


def fenced(answer: str, *languages: str) -> str | None:
    """Return the last fenced block of one of `languages`, else the last of any, else None."""
    blocks = _FENCE.findall(answer)
    named = [body for language, body in blocks if language.lower() in languages]
    bodies = named or [body for _, body in blocks]
    return str(bodies[-1]) if bodies else None


def _without_lead(line: str) -> str:
    if len(line) > _LONGEST_LINE:
        return line.strip()
    line = _BOLD.sub(r"\1", line.strip())
    return _LEAD.sub("", line, count=1).strip()
