"""Mathematical equality, by the math-verify library (LaTeX and expressions through sympy)."""

from __future__ import annotations

from edger1.errors import UsageError
from edger1.final_answers import final_answer
from edger1.train.rewards.answers import right_answers
from edger1.train.rewards.completion import Completion


def maths(completion: Completion, *, column: str = "answer", digits: int = 6) -> float:
    """Give 1 where the final answer is mathematically the right one, as 1/2 is 0.5 and (x+1)^2 is x^2+2x+1; else 0.

    `digits`: decimal places that floats are compared to. The library's own timeouts, which are signals and work on a
    main thread only, are off: rewards that may hang run in a process that is ended when their time is over.
    """
    try:
        from math_verify import parse, verify
    except ImportError:
        raise UsageError("The reward maths needs math-verify: pip install 'edger1[train]'") from None

    def read(text: str) -> list[object]:
        # Dollar signs make the library read plain expressions and LaTeX alike.
        marked = text if "$" in text or "\\boxed" in text else f"${text}$"
        parsed: list[object] = parse(marked, parsing_timeout=None) or parse(text, parsing_timeout=None)
        return parsed

    answer = read(final_answer(completion.answer))
    if not answer:
        return 0.0
    return float(
        any(
            verify(gold, answer, float_rounding=digits, timeout_seconds=None)
            for right in right_answers(completion, column)
            if (gold := read(right))
        )
    )
