"""The final answer out of an answer: from `<answer>`, from `\\boxed`, or the last line; and when two are the same."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

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

_MOST_CHARACTERS = 400
_NUMBER = re.compile(
    r"""(?P<sign>[-+]?)[ ]?(?P<currency>[$€£¥]?)[ ]?
        (?:(?P<whole>\d+)[ ](?P<mixed_top>\d+)/(?P<mixed_bottom>\d+)
          |(?P<top>\d+)[ ]?/[ ]?(?P<bottom>\d+)
          |(?P<digits>\d[\d.,_' ]*\d|\d|[.]\d+)(?:[eE](?P<exponent>[-+]?\d{1,3})(?!\d))?)
        [ ]?(?P<percent>%?)""",
    re.VERBOSE,
)
_GROUPED = re.compile(r"\d{1,3}([,_' ])\d{3}(?:\1\d{3})*")


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


def last_number(text: str) -> tuple[Fraction, bool] | None:
    """Return the last number of a text, and whether a percent sign follows it; None where there is none."""
    text = _unlatexed(text[-_MOST_CHARACTERS:])
    found = None
    for match in _NUMBER.finditer(text):
        before = text[: match.start()]
        # The minus of "3-4" or "x-4" is an operator; only what stands alone is a sign.
        signed = match["sign"] == "-" and not re.search(r"[\w)\]]$", before)
        if (value := _value(match)) is not None:
            found = (-value if signed else value), bool(match["percent"])
    return found


def _value(match: re.Match[str]) -> Fraction | None:
    for top, bottom, whole in (("mixed_top", "mixed_bottom", "whole"), ("top", "bottom", None)):
        if match[top] is not None:
            if int(match[bottom]) == 0:
                return None
            return int(match[whole] if whole else 0) + Fraction(int(match[top]), int(match[bottom]))
    try:
        number = Fraction(_undivided(match["digits"]))
    except ValueError:
        return None
    return number * Fraction(10) ** int(match["exponent"] or 0)


def _undivided(digits: str) -> str:
    """Take separators of thousands out of a number, and make its decimal mark a point."""
    comma, point = digits.rfind(","), digits.rfind(".")
    mark = "," if comma > point else "."
    if comma >= 0 and point >= 0:
        whole, _, rest = digits.rpartition(mark)
        return f"{re.sub(r'[^0-9]', '', whole)}.{rest}"
    if _GROUPED.fullmatch(digits) or digits.count(mark) > 1:
        return re.sub(r"[^0-9]", "", digits)
    if comma >= 0:
        whole, _, rest = digits.partition(",")
        # 1,234 is a thousand and more; a comma with other than three digits after it is a decimal comma.
        return re.sub(r"[^0-9]", "", digits) if len(rest) == 3 and len(whole) <= 3 else f"{whole}.{rest}"
    whole, dot, rest = digits.partition(".")
    grouped = _GROUPED.fullmatch(whole)
    # Blanks between numbers that are no groups of three: the last one counts.
    return f"{re.sub(r'[^0-9]', '', whole) if grouped else re.split(r'[^0-9]', whole)[-1]}{dot}{rest}"


def _unlatexed(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).replace("−", "-").replace("–", "-").replace("⁄", "/")
    text = re.sub(r"\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", r" \1/\2", text)
    text = re.sub(r"\\([%$])", r"\1", text)
    text = re.sub(r"\\(?:[,;!: ]|quad\b|text\b|mathrm\b)|\{,\}", lambda m: "," if m[0] == "{,}" else "", text)
    return re.sub(r"(?<=\d)\{?,\}?(?=\d{3}(?!\d))", ",", text)


def plain(text: str, case: bool) -> str:
    """Return a text without what makes no difference: blanks, quotes, a final full stop, and its case unless `case`."""
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    quotes = "\"'`“”‘’ "
    text = text.strip(quotes).rstrip(".").strip(quotes)
    return text if case else text.casefold()


def vote_key(answer: str) -> str | None:
    """Return what equal final answers have in common: a number's value or the plain text; None where there is none."""
    text = plain(final_answer(answer), case=False)
    if not any(character.isalpha() for character in text) and (found := last_number(text)) is not None:
        return f"{found[0]}{'%' * found[1]}" if _NUMBER.fullmatch(_unlatexed(text).strip()) else text
    return text or None
