"""The markers that reasoning traces are kept in, made one.

<think> ... </think> answer                                            DeepSeek-R1 and what follows it
... </think> answer                                                    the same, where the template wrote the first
<|begin_of_thought|> ... <|end_of_thought|> <|begin_of_solution|> ...  Sky-T1, Bespoke-Stratos, OpenThoughts
<think> ... </think> <answer> ... </answer>                            open-r1
"""

from __future__ import annotations

from edger1.train.datasets.rows import END_THINK, THINK

_BEGIN, _END = "<|begin_of_thought|>", "<|end_of_thought|>"
_BEGIN_SOLUTION, _END_SOLUTION = "<|begin_of_solution|>", "<|end_of_solution|>"
_ANSWER, _END_ANSWER = "<answer>", "</answer>"


def joined(thought: str | None, answer: str) -> str:
    """Return a thought and an answer as one content. Raises ValueError for what cannot be told apart again."""
    thought = (thought or "").strip()
    if not thought:
        return answer
    if END_THINK in thought:
        raise ValueError(f"the thought itself holds {END_THINK}")
    return f"{THINK}{thought}{END_THINK}{answer.strip()}"


def canonical(content: str) -> tuple[str, str | None]:
    """Return an assistant's content with its thought between <think> and </think>, and the markers it had.

    A content without a thought stays as it is. Raises ValueError for a thought that is opened and not closed.
    """
    text = content.strip()
    if text.startswith(_BEGIN):
        thought, closed, rest = text[len(_BEGIN) :].partition(_END)
        rest = rest.strip()
        if rest.startswith(_BEGIN_SOLUTION):
            rest, ended, after = rest[len(_BEGIN_SOLUTION) :].partition(_END_SOLUTION)
            closed = closed and ended
            rest += after
        if not closed:
            raise ValueError("its markers of thought and solution are opened and not closed; the trace was cut short")
        return joined(thought, rest.strip()), "Sky-T1"
    if END_THINK in text and THINK not in text:
        text = THINK + text
    if not text.startswith(THINK):
        return content, None
    thought, closed, rest = text[len(THINK) :].partition(END_THINK)
    if not closed:
        raise ValueError(f"its thought is opened with {THINK} and not closed; the trace was cut short")
    rest, markers = rest.strip(), "R1"
    if rest.startswith(_ANSWER) and rest.endswith(_END_ANSWER):
        rest, markers = rest[len(_ANSWER) : -len(_END_ANSWER)].strip(), "open-r1"
    return joined(thought, rest), markers
