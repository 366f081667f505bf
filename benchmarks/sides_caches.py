"""The sides of the caches benchmark: a model whose KV cache is quantized or not, in a process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from benchmarks.sides_model import EngineRates, loaded

MOST_ROWS = 64
"""Rows of logits at once."""


class Divergence:
    """What a model says of a text at one number of bits against what it says with its cache in f32."""

    def __init__(self, folder: str, text: str, tokens: int) -> None:
        self._live = loaded(folder, "exact")
        ids = _text_ids(self._live, text)
        if len(ids) < tokens:
            raise RuntimeError(f"{text} has {len(ids)} tokens; expected {tokens}")
        self._ids = ids[:tokens]
        self.info = {"kernels": self._live.installed.active, "precision": self._live.precision}

    def __call__(self, bits: int) -> Mapping[str, float]:
        """Return the mean KL in nats a token, bytes a token of both caches, how often the likeliest token differs."""
        import mlx.core as mx

        from edger1.quantized_kv import choose

        quantization = choose(self._live.model, bits, self._live.name)
        assert quantization is not None
        ours, plain = quantization.caches(self._live.model), self._live.new_caches()
        step = self._live.prefill_step
        divergence, differing = 0.0, 0
        for start in range(0, len(self._ids), step):
            chunk = mx.array([self._ids[start : start + step]])
            expected, found = (self._live.model(chunk, cache=caches)[0] for caches in (plain, ours))
            mx.eval(expected, found, [cache.state for cache in (*plain, *ours)])
            for row in range(0, chunk.size, MOST_ROWS):
                p, q = (_log_probabilities(a[row : row + MOST_ROWS]) for a in (expected, found))
                divergence += float((mx.exp(p) * (p - q)).sum().item())
                changed: Any = (mx.argmax(p, axis=-1) != mx.argmax(q, axis=-1)).sum().item()
                differing += int(changed)
        count = len(self._ids)
        return {
            "kl": divergence / count,
            "differing": differing / count,
            "bytes": sum(cache.nbytes * count / _room(cache) for cache in ours) / count,
            "plain_bytes": sum(cache.nbytes * count / _room(cache) for cache in plain) / count,
        }


def _log_probabilities(logits: Any) -> Any:
    import mlx.core as mx

    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _room(cache: Any) -> int:
    """Tokens that the cache's arrays have room for."""
    return int(cache.keys.shape[2])


def _text_ids(live: Any, text: str) -> list[int]:
    if text == "problems":
        lines = (live.folder.path / "demo.jsonl").read_text(encoding="utf-8").splitlines()
        chats = [json.loads(line) for line in lines]
        ids: list[int] = []
        for each in chats:
            said = [
                {"role": "user", "content": each["question"]},
                {"role": "assistant", "content": str(each["answer"])},
            ]
            ids += live.tokenizer.apply_chat_template(said, tokenize=True)
        return ids
    from edger1.quant.calibrate import TEXT  # type: ignore[import-untyped]

    return list(live.tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False))


def divergence(**arguments: Any) -> Divergence:
    """Set up a measurement of what quantizing loses."""
    return Divergence(**arguments)


def decoding(**arguments: Any) -> EngineRates:
    """Set up the engine."""
    return EngineRates(**arguments)
