"""The sides of the drafts benchmark: a model that answers the same questions, with drafts or without, in a process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import REPOSITORY

DENSE = REPOSITORY / "recipes" / "nano" / "weights" / "nano-dense"

QUESTIONS = (
    "What is 317 + 485?",
    "Tom has 12 apples and gives 5 to Ann. How many apples does Tom have?",
    "What is 345 * 7?",
    "Sort these numbers: 41, 7, 23, 12.",
    "What is 902 - 418?",
    "Which number is the largest: 12, 99, 45?",
    "What is 84 divided by 6?",
    "What is 12 * 5 + 31 - 4?",
)
"""What nano-moe was trained to reason about."""

_PASSAGES = (
    "The lighthouse at Corran Point was built in 1874 from granite that came by sea. Its lamp burned whale oil "
    "until 1902, when the keepers changed to paraffin. The lamp was visible for nineteen miles in clear weather. "
    "In the winter of 1911 a storm broke two panes of the lantern, and the keeper held a sail over the gap for "
    "six hours. The lighthouse has been unmanned since 1968, and its light is now switched by a sensor.",
    "Bees tell each other where flowers are by dancing. A bee that has found food runs in a straight line on the "
    "comb, shakes her body, and returns in a half circle. The direction of the line shows the direction of the "
    "flowers relative to the sun. The length of the run shows the distance. Bees that follow the dance fly out "
    "and find the flowers, even when a hill lies between them and the hive.",
    "The town council met on Tuesday to discuss the new bridge. The engineer said that the old bridge can carry "
    "no more than eight tons, and that its northern pillar has moved by two centimetres. The council agreed to "
    "close the bridge to lorries from the first of March. A new bridge would cost four million and take two "
    "years. The council will vote on it in June, after the citizens have been heard.",
)
QUOTING = tuple(
    f"{task}\n\n{passage}"
    for passage in _PASSAGES
    for task in ("Summarise the following text in one sentence.", "Quote the following text word for word.")
)
"""Texts to be summed up and quoted: two questions each, since SmolLM2-135M does only the first of two things asked."""

PROMPTS = {"questions": QUESTIONS, "quoting": QUOTING}


class Answers:
    """A loaded model, and where its drafts come from."""

    def __init__(self, model: str, speculate: str, prompts: str, draft: bool = False, slots: str | None = None) -> None:
        import edger1

        self._speculate, self._prompts = speculate, PROMPTS[prompts]
        folder: str | Path = model
        self._model = edger1.load(folder, context=1024, expert_slots=slots, draft=DENSE if draft else None)
        self.info = {"kernels": self._model.info["kernels"], "precision": self._model.info["precision"]}
        # Times are learnt, and all that is made once is made.
        for _ in range(2):
            self(tokens=96)

    def __call__(self, tokens: int, temperature: float = 0.0) -> Mapping[str, float]:
        """Answer every prompt with `tokens` tokens at most; returns tokens a second and what came of drafts.

        "text" is a number that stands for all that was said.
        """
        count, seconds, drafted, accepted, nbytes = 0, 0.0, 0, 0, 0.0
        said = hashlib.sha256()
        for prompt in self._prompts:
            answer = self._model.generate(
                prompt, temperature=temperature, seed=1, max_tokens=tokens, speculate=self._speculate
            )
            figures: Any = answer.figures
            decoded = answer.usage.completion_tokens - 1
            count += decoded
            seconds += decoded / figures.decode_tokens_per_s
            drafted += figures.drafts["drafted"]
            accepted += figures.drafts["accepted"]
            nbytes += figures.experts["decode"]["bytes_read"] if figures.experts else 0.0
            said.update((answer.thinking + "\0" + answer.text).encode())
        return {
            "rate": count / seconds,
            "accepted": accepted / drafted if drafted else 0.0,
            "drafted": drafted / count,
            "bytes": nbytes / count,
            "text": float(int(said.hexdigest()[:12], 16)),
        }


def answers(**arguments: Any) -> Answers:
    """Return a side."""
    return Answers(**arguments)
