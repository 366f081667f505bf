"""A llama with LoRA written out in NumPy, to check gradients of losses against; it shares no line with what it checks.

Gradients are by the complex step (Squire and Trapp 1998): the imaginary part of loss(w + ih) over h is the derivative,
to the last digit of float64, since nothing is subtracted. A loss must be made of analytic functions for that; what
branches (a maximum, a clip) must branch by real parts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Weights = dict[str, np.ndarray]

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 40,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
LORA_SCALE = 2.0


def logits(weights: Weights, adapter: Weights, ids: np.ndarray, config: dict[str, Any] = CONFIG) -> np.ndarray:
    """Return [length, vocabulary] for one document's ids [length]; an empty adapter is the model alone."""
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size, length = config["hidden_size"] // heads, len(ids)

    def product(x: np.ndarray, path: str) -> np.ndarray:
        y = x @ weights[f"{path}.weight"].T
        if f"{path}.lora_a" in adapter:
            y = y + LORA_SCALE * (x @ adapter[f"{path}.lora_a"]) @ adapter[f"{path}.lora_b"]
        return y

    def normed(x: np.ndarray, path: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * weights[f"{path}.weight"]

    def turned(x: np.ndarray) -> np.ndarray:
        half = size // 2
        angles = np.arange(length)[:, None, None] * config["rope_theta"] ** (-np.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], -1)

    x = weights["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        n = normed(x, f"{at}.input_layernorm")
        q, k, v = (
            product(n, f"{at}.self_attn.{name}_proj").reshape(length, count, size)
            for name, count in (("q", heads), ("k", groups), ("v", groups))
        )
        q, k, v = turned(q), np.repeat(turned(k), heads // groups, 1), np.repeat(v, heads // groups, 1)
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(size)
        seen = np.tril(np.ones((length, length), bool))
        powers = np.where(seen, np.exp(scores - np.where(seen, scores.real, -np.inf).max(-1, keepdims=True)), 0)
        mixed = np.einsum("hij,jhd->ihd", powers / powers.sum(-1, keepdims=True), v).reshape(length, -1)
        x = x + product(mixed, f"{at}.self_attn.o_proj")
        n = normed(x, f"{at}.post_attention_layernorm")
        gate = product(n, f"{at}.mlp.gate_proj")
        x = x + product(gate / (1 + np.exp(-gate)) * product(n, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
    return normed(x, "model.norm") @ weights["lm_head.weight"].T


def logprobs(
    weights: Weights, adapter: Weights, ids: np.ndarray, temperature: float = 1.0, config: dict[str, Any] = CONFIG
) -> np.ndarray:
    """Return [length] for one document: log-probabilities of each token given those before; 0 for the first."""
    found = logits(weights, adapter, ids, config)[:-1] / temperature
    top = found.real.max(-1, keepdims=True)
    normal = np.log(np.exp(found - top).sum(-1)) + top[:, 0]
    return np.concatenate([[0.0], found[np.arange(len(ids) - 1), ids[1:]] - normal])


def gradient(loss: Callable[[Weights], Any], adapter: Weights) -> Weights:
    """Return the gradient of a loss of an adapter's weights, a weight at a time."""
    found: Weights = {}
    step = 1e-30
    for name, value in adapter.items():
        slopes = np.zeros(value.size)
        for i in range(value.size):
            moved = value.astype(np.complex128)
            moved.reshape(-1)[i] += 1j * step
            slopes[i] = np.imag(loss({**adapter, name: moved})) / step
        found[name] = slopes.reshape(value.shape)
    return found


def worst(found: dict[str, Any], expected: Weights) -> float:
    """Return the largest difference of two gradients, relative to the largest number in the expected one."""
    assert found.keys() == expected.keys()
    largest = max(np.abs(value).max() for value in expected.values())
    return max(float(np.abs(np.array(found[n], np.float64) - expected[n]).max()) for n in expected) / float(largest)


def toy_policy(
    tokenizer: Any = None, *, targets: tuple[str, ...] = ("q_proj", "v_proj", "down_proj"), **options: Any
) -> tuple[Any, Weights, Weights]:
    """Return a policy over such a llama with an adapter that already differs from nothing, and both in float64."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten

    from edger1.folder import ModelFolder
    from edger1.mlx_runtime import prepare
    from edger1.train.adapters.wiring import AdapterSpec, attach
    from edger1.train.finetune.policy import LocalPolicy

    prepare()
    from mlx_lm.models import llama

    random = np.random.default_rng(0)
    model = llama.Model(llama.ModelArgs.from_dict(CONFIG))
    drawn = {
        name: mx.array((1 + 0.1 * random.normal(size=w.shape)) if w.ndim == 1 else random.normal(size=w.shape) * 0.3)
        for name, w in tree_flatten(model.parameters())
    }
    model.update(tree_unflatten([(name, w.astype(mx.float32)) for name, w in drawn.items()]))
    weights = {name: np.array(w, np.float64) for name, w in tree_flatten(model.parameters())}
    adapted = attach(model, AdapterSpec(rank=2, scale=LORA_SCALE, targets=targets))
    adapted.assign({n: mx.array(random.normal(size=w.shape) * 0.2) for n, w in adapted.parameters().items()})
    adapter = {name: np.array(w, np.float64) for name, w in adapted.parameters().items()}
    folder = ModelFolder(Path("toy"), dict(CONFIG), "llama", None, None, (), 0, 6000, 64, False)
    return LocalPolicy(model, tokenizer, folder, adapted, **options), weights, adapter
