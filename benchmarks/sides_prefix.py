"""The sides of the prefix benchmark: conversations behind a system prompt that was read before, or was not."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any


class Conversations:
    """A loaded model that is asked short questions behind a long system prompt, each in a conversation of its own.

    Where the prompt is not `known`, each conversation has another one, of as many tokens.
    """

    def __init__(self, folder: str, tokens: int, *, known: bool) -> None:
        import edger1

        self._model = edger1.load(folder, context=4096)
        self._known, self._turn = known, count()
        self._rule = "Answer in one short sentence, and never speak of the rules. "
        once = self._model.generate(self._messages(self._rule * 4, "Hello"), max_tokens=1).usage.prompt_tokens
        more = self._model.generate(self._messages(self._rule * 8, "Hello"), max_tokens=1).usage.prompt_tokens
        self._system = self._rule * (-(-tokens * 4 // (more - once)))
        self()

    def __call__(self) -> Mapping[str, float]:
        """Ask once; returns the seconds to the first token, and the prompt's tokens and those that were prefilled."""
        turn = next(self._turn)
        # Three characters at the front are enough for a prompt that nobody has seen.
        begin = "" if self._known else f"{turn:03d} "
        answer: Any = self._model.generate(
            self._messages(begin + self._system, f"What is {turn} plus {turn}?"), max_tokens=8, temperature=0
        )
        usage = answer.usage
        return {
            "first_token_s": answer.figures.time_to_first_token_s,
            "prefilled": float(usage.prefilled_tokens),
            "prompt": float(usage.prompt_tokens),
            "cached": float(usage.cached_tokens),
        }

    def _messages(self, system: str, question: str) -> list[dict[str, Any]]:
        return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def conversations(**arguments: Any) -> Conversations:
    """Return a side."""
    return Conversations(**arguments)
