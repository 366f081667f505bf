"""Drafts from a smaller model with the same vocabulary (Leviathan et al., arXiv 2211.17192)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edger1.drafting.draws import Draws
from edger1.drafting.rejection import Probabilities
from edger1.errors import UsageError

if TYPE_CHECKING:
    from edger1.loader import LiveModel


def check_vocabulary(model: LiveModel, draft: LiveModel) -> None:
    """Raise UsageError unless both models mean the same by every token."""
    if model.tokenizer.get_vocab() == draft.tokenizer.get_vocab():
        return
    ours, theirs = (f"{m.name} one of {len(m.tokenizer.get_vocab()):,} tokens" for m in (model, draft))
    raise UsageError(
        f"{draft.name} cannot draft for {model.name}: their vocabularies differ, {ours}, {theirs}, and both must mean "
        f"the same by every token. Give a smaller model of the family of {model.name}."
    )


class ModelDrafter:
    """A drafting model in one answer: its KV caches, and which tokens are in them.

    `vocabulary` tokens are those that the model it drafts for may say. Models of one family pad their logits to
    different widths: what is behind these is nobody's token.
    """

    name = "draft"

    def __init__(self, model: LiveModel, vocabulary: int) -> None:
        self._model = model
        self._vocabulary = vocabulary
        self._caches: list[Any] | None = None
        self._fed: list[int] = []
        # How many of the tokens fed are known to be the text's.
        self._sure = 0

    def begin(self) -> None:
        """Forget everything."""
        self._caches, self._fed, self._sure = None, [], 0

    def back(self, fed: int) -> None:
        """Note that the text has changed behind its first `fed` tokens."""
        self._sure = min(self._sure, fed)

    def ready(self, known: Sequence[int]) -> bool:
        """Whether `known` and a draft fit its context."""
        return len(known) + 16 <= self._model.context

    def behind(self, known: Sequence[int]) -> int:
        """How many tokens it would have to read before it drafts."""
        return len(known) - self._sure

    def draft(self, known: Sequence[int], count: int, draws: Draws) -> tuple[Any, Probabilities | None]:
        """Return `count` drafts of what follows `known` (uint32, [count]), unread, and their distributions."""
        import mlx.core as mx
        import numpy as np

        logits = self._follow(known)
        tokens: list[Any] = []
        distributions: list[Any] = []
        said = list(known[-64:])
        for place in range(count):
            if place:
                logits = self._model.model(tokens[-1][None], cache=self._caches)[:, -1]
            token, q = draws.draft(logits[:, : self._vocabulary], place, said)
            tokens.append(token)
            if not draws.lazy:
                said.append(int(token.item()))
            if q is not None:
                distributions.append(q)
        self._trim(count - 1)
        return mx.concatenate(tokens), np.stack(distributions) if distributions else None

    def _follow(self, known: Sequence[int]) -> Any:
        """Feed what is not in the caches; returns the logits [1, V] behind the last of `known`."""
        import mlx.core as mx

        if self._caches is None:
            self._caches = self._model.new_caches()
        same = self._sure
        while same < min(len(self._fed), len(known) - 1) and self._fed[same] == known[same]:
            same += 1
        self._trim(len(self._fed) - same)
        del self._fed[same:]
        step = self._model.prefill_step
        while len(known) - len(self._fed) > step:
            chunk = list(known[len(self._fed) : len(self._fed) + step])
            self._model.model(self._read(chunk), cache=self._caches)
            mx.eval([cache.state for cache in self._caches])
            self._fed += chunk
        rest = list(known[len(self._fed) :])
        logits = self._model.model(self._read(rest), cache=self._caches)[:, -1]
        self._fed += rest
        self._sure = len(self._fed)
        return logits

    def _read(self, tokens: Sequence[int]) -> Any:
        """Return tokens [1, L] as it reads them: the other model's padding, should that be said, as its last token."""
        import mlx.core as mx

        last = self._model.vocabulary - 1
        return mx.array([[min(token, last) for token in tokens]])

    def _trim(self, count: int) -> None:
        from mlx_lm.models.cache import trim_prompt_cache

        if count > 0:
            trim_prompt_cache(self._caches, count)
