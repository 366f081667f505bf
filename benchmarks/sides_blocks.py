"""The sides of benchmarks of whole blocks: one layer of mlx-lm's own model, with random 4-bit weights.

`precision` puts EdgeR1's kernels under it ("fast", "exact"); None is mlx-lm as shipped. A model of one layer is built
and not the block alone, so that whatever EdgeR1 recognises in a model is in place.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from typing import Any

BITS, GROUP = 4, 64

# OLMoE-1B-7B's layer.
MOE: dict[str, Any] = {
    "model_type": "olmoe",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": 1024,
    "num_experts": 64,
    "num_experts_per_tok": 8,
}
# DeepSeek-V3's attention; the MLP and the vocabulary are only there to make it a model.
MLA: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 1024,
    "hidden_size": 7168,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "first_k_dense_replace": 1,
    "n_routed_experts": None,
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
}


def layer(config: Mapping[str, Any], precision: str | None) -> Any:
    """Build a model of one layer with random quantized weights and f32 activations; returns the layer."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten, tree_unflatten

    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(dict(config)))
    nn.quantize(model, GROUP, BITS, class_predicate=lambda _, m: hasattr(m, "to_quantized"))
    # Nothing is computed yet: random codes take the places of what would be quantized, which takes MLX minutes here.
    model.update(tree_unflatten([(name, _random(name, w)) for name, w in tree_flatten(model.parameters())]))
    mx.eval(model.parameters())
    model.eval()
    if precision is not None:
        from edger1 import kernels
        from edger1.kernels.install import install
        from edger1.kernels.pages import use_huge_pages

        if not kernels.state().available:
            raise RuntimeError(f"EdgeR1's kernels are {kernels.state().reason}")
        use_huge_pages(w for _, w in tree_flatten(model.parameters()))
        install(model, "exact" if precision == "exact" else "fast")
    return model.model.layers[0]


def _random(name: str, weight: Any) -> Any:
    """Return random values of a parameter's shape: codes, or floats such that a product keeps the size of its input."""
    import mlx.core as mx

    if weight.dtype == mx.uint32:
        return mx.random.randint(0, 1 << 31, weight.shape).astype(mx.uint32) * 2 + 1
    if name.endswith(("scales", "biases")):
        # Codes 0..15 less 7.5 have a standard deviation of 4.6.
        scale = 1 / (4.6 * (weight.shape[-1] * GROUP) ** 0.5)
        return mx.full(weight.shape, scale if name.endswith("scales") else -7.5 * scale)
    if weight.ndim == 1:
        return mx.ones(weight.shape)
    return mx.random.normal(weight.shape) / weight.shape[-1] ** 0.5


class Moe:
    """One token through the layer's MLP, others each time so that the experts differ: tokens a second."""

    def __init__(self, precision: str | None) -> None:
        import mlx.core as mx

        self._mlp = layer(MOE, precision).mlp
        self._inputs = [mx.random.normal((1, 1, 2048)) for _ in range(64)]
        mx.eval(self._inputs)
        self._turn = 0
        for _ in range(2):
            self._token()

    def _token(self) -> None:
        import mlx.core as mx

        self._turn += 1
        mx.eval(self._mlp(self._inputs[self._turn % len(self._inputs)]))

    def __call__(self, repeats: int) -> dict[str, float]:
        began = time.perf_counter()
        for _ in range(repeats):
            self._token()
        return {"rate": repeats / (time.perf_counter() - began)}


class Mla:
    """Some tokens through the layer's attention over a cache of random latents: milliseconds, and their inverse."""

    def __init__(self, precision: str | None) -> None:
        self._attention = layer(MLA, precision).self_attn
        self._caches: dict[int, Any] = {}

    def _cache(self, cached: int) -> Any:
        import mlx.core as mx
        from mlx_lm.models.cache import KVCache

        if cached not in self._caches:
            cache = KVCache()
            latent, rope = (mx.random.normal((1, 1, cached, size)) for size in (512, 64))
            mx.eval(cache.update_and_fetch(latent, rope))
            self._caches[cached] = cache
        return self._caches[cached]

    def __call__(self, tokens: int, cached: int, repeats: int = 1, warm: bool = True) -> dict[str, float]:
        import mlx.core as mx
        from mlx_lm.models.base import create_attention_mask

        cache = self._cache(cached)
        x = mx.random.normal((1, tokens, MLA["hidden_size"]))
        mx.eval(x)

        def forward() -> None:
            # As the model does it: the mask is made anew for every forward pass.
            mask = create_attention_mask(x, cache, return_array=True)
            mx.eval(self._attention(x, mask, cache))
            cache.trim(tokens)

        if warm:
            forward()
        began = time.perf_counter()
        for _ in range(repeats):
            forward()
        took = (time.perf_counter() - began) / repeats
        return {"ms": 1e3 * took, "rate": 1 / took}


def moe(precision: str | None) -> Moe:
    """Set up the MoE layer."""
    return Moe(precision)


def mla(precision: str | None) -> Mla:
    """Set up latent attention."""
    return Mla(precision)
