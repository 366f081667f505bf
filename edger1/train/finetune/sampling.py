"""Greedy answers during training."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from edger1.train.finetune.method import Policy


def answer(policy: Policy, prompt: np.ndarray, limit: int) -> str:
    """Return what the model answers to int32 ids of a prompt, greedily, in at most `limit` tokens."""
    from mlx_lm.models.cache import make_prompt_cache

    ends = set(policy.tokenizer.eos_token_ids)
    found: list[int] = []
    with policy.generation() as model:
        cache = make_prompt_cache(model)
        logits: Any = model(mx.array(prompt)[None], cache=cache)
        while len(found) < limit:
            token = int(mx.argmax(logits[0, -1]).item())  # type: ignore[arg-type]
            if token in ends:
                break
            found.append(token)
            logits = model(mx.array([[token]]), cache=cache)
    return str(policy.tokenizer.decode(found))
