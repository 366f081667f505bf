"""The vote among several samples, as messages keep it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from edger1.final_answers import final_answer, vote_key
from edger1.tui.clean import clean
from edger1.tui.tree import Node

LONGEST = 40
"""Characters that are shown of an answer which was voted for."""
NONE = "no answer"


def tally_of(node: Node, longest: int = LONGEST) -> tuple[str, list[tuple[str, int]]]:
    """Return a message's own answer and how often each was given, fit to be shown; nothing where it has no votes."""
    votes = (node.figures or {}).get("vote")
    if not isinstance(votes, dict) or not isinstance(votes.get("tally"), list):
        return "", []
    tally = [
        (shown(str(each[0]), longest), each[1])
        for each in votes["tally"]
        if isinstance(each, list | tuple) and len(each) == 2 and isinstance(each[1], int)
    ]
    return shown(str(votes.get("answer", "")), longest), tally


def keep(node: Node, answer: str, tally: Sequence[tuple[str, int]], voters: Sequence[Node]) -> None:
    """Have a message keep what it voted for, how the vote went, and which messages voted."""
    votes = {"answer": answer, "tally": [list(each) for each in tally], "voters": [each.id for each in voters]}
    node.figures = {**(node.figures or {}), "vote": votes}


def voters_with(node: Node) -> list[str]:
    """Return the ids of all messages that voted together with one, itself among them."""
    votes = (node.figures or {}).get("vote")
    voters = votes.get("voters") if isinstance(votes, dict) else None
    return [each for each in voters if isinstance(each, str)] if isinstance(voters, list) else []


def shown(answer: str, longest: int = LONGEST) -> str:
    """Return an answer in one line of so many characters at most."""
    words = " ".join(clean(answer).split())
    return (words if len(words) <= longest else words[: longest - 1] + "…") or NONE


@dataclass(frozen=True)
class Vote:
    """What came of a vote: which text won, the answer that each gave ("" for none), and how many gave each answer."""

    winner: int
    answers: tuple[str, ...]
    tally: tuple[tuple[str, int], ...]


def majority(texts: Sequence[str]) -> Vote:
    """Let texts vote by their final answers, as the engine's own samples do (`edger1.final_answers`).

    Of answers that tie, that of the earliest text wins; it is shown as the earliest text with it has it.
    """
    keys = [vote_key(text) for text in texts]
    counts = Counter(key for key in keys if key is not None)
    words = {key: final_answer(texts[keys.index(key)]) for key in counts}
    ranked = counts.most_common()
    answers = tuple("" if key is None else words[key] for key in keys)
    return Vote(keys.index(ranked[0][0]) if ranked else 0, answers, tuple((words[key], n) for key, n in ranked))
