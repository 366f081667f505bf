"""Attention over latents in MLX's own operations: what NumPy says in doubles, and what mlx-lm's layers compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

import families  # noqa: E402
from mlx_lm.models import deepseek_v3  # noqa: E402
from mlx_lm.models.base import create_attention_mask  # noqa: E402
from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache  # noqa: E402

from edger1 import kernels  # noqa: E402
from edger1.kernels import latent_plain  # noqa: E402
from edger1.kernels.install import install as kernels_install  # noqa: E402
from edger1.kernels.latent import Latents, install  # noqa: E402
from edger1.kernels.latent_parts import Shape  # noqa: E402

# Family -> how many of its layers cache latents.
FAMILIES = {
    "deepseek_v3": 2,
    "deepseek_v32": 2,
    "glm_moe_dsa": 2,
    "glm4_moe_lite": 2,
    "longcat_flash": 4,
    "kimi_linear": 1,
    "kimi_vl": 2,
    "kimi_k3": 1,
    "bailing_moe_v3": 1,
    "bailing_hybrid": 1,
}


def error(found: Any, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((np.array(found) - expected) ** 2) / np.mean(expected**2)))


class Heads:
    """A layer's matrices of keys and values, and random operands."""

    def __init__(self, batch: int, length: int, keys: int, sizes: Shape, seed: int = 0) -> None:
        from mlx_lm.models.mla import MultiLinear

        self.shape, heads = sizes, sizes.heads
        self.embed_q = MultiLinear(sizes.nope, sizes.rank, heads)
        self.unembed_out = MultiLinear(sizes.rank, sizes.value, heads)
        draw = np.random.default_rng(seed)
        shapes = (
            (batch, heads, length, sizes.nope),
            (batch, heads, length, sizes.rope),
            (batch, 1, keys, sizes.rank),
            (batch, 1, keys, sizes.rope),
        )
        self.operands = [draw.standard_normal(shape).astype(np.float32) for shape in shapes]
        self.kept = draw.random((batch, 1, length, keys)) < 0.6
        self.kept[0, 0, 0] = False

    def expected(self, kept: np.ndarray | None) -> np.ndarray:
        q_nope, q_pe, c, k_pe = (a.astype(np.float64) for a in self.operands)
        k = c @ np.array(self.embed_q.weight, np.float64)
        v = c @ np.array(self.unembed_out.weight, np.float64).swapaxes(-1, -2)
        scores = 0.3 * (q_nope @ k.swapaxes(-1, -2) + q_pe @ k_pe.swapaxes(-1, -2))
        scores = scores if kept is None else np.where(kept, scores, -1e30)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = weights / weights.sum(-1, keepdims=True) @ v
        return out.transpose(0, 2, 1, 3).reshape(out.shape[0], out.shape[2], -1)

    def found(self, mask: Any, causal: bool, tile_scores: int, dtype: Any = mx.float32) -> Any:
        operands = [mx.array(a).astype(dtype) for a in self.operands]
        given = None if mask is None else mx.array(mask)
        return latent_plain.attend(self, self.shape, 0.3, *operands, given, causal, tile_scores)


@pytest.mark.parametrize("tile_scores", [1, 1 << 22])
@pytest.mark.parametrize(("batch", "length", "keys"), [(1, 1, 1), (2, 5, 300), (1, 16, 777), (2, 90, 400), (1, 70, 70)])
def test_mlx_own_operations_give_what_numpy_does_in_any_tiles(
    batch: int, length: int, keys: int, tile_scores: int
) -> None:
    heads = Heads(batch, length, keys, Shape(3, 20, 6, 36, 12, 1.0, 1.0))
    # Both ways that there are.
    assert [latent_plain.is_absorbed(heads.shape, n) for n in (16, 90)] == [True, False]
    causal = np.arange(keys) <= np.arange(keys - length, keys)[:, None]
    for mask, is_causal, kept in ((None, True, causal), (heads.kept, False, heads.kept), (None, False, None)):
        assert error(heads.found(mask, is_causal, tile_scores), heads.expected(kept)) <= 1e-6


def test_sixteen_bits_are_summed_in_float32() -> None:
    heads = Heads(1, 24, 500, Shape(3, 20, 6, 36, 12, 1.0, 1.0))
    found = heads.found(None, True, 1, mx.bfloat16)
    assert found.dtype == mx.bfloat16
    causal = np.arange(500) <= np.arange(476, 500)[:, None]
    assert error(found.astype(mx.float32), heads.expected(causal)) <= 0.02


@contextmanager
def in_place(model: Any) -> Iterator[Latents]:
    state = install(model, "exact", None)
    try:
        yield state
    finally:
        state.uninstall()


def passes(model: Any) -> list[Any]:
    """Logits of a prompt, of drafts of several lengths, and of single tokens."""
    caches, out = make_prompt_cache(model), []
    for tokens in (families.PROMPT * 3, [1, 2, 3, 4], [7], [9, 8], [5] * 16):
        out.append(model(mx.array([tokens]), cache=caches))
        mx.eval(out[-1], [c.state for c in caches])
    return out


@pytest.mark.parametrize("quantize", [False, True], ids=["f32", "4-bit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_it_did(family: str, quantize: bool) -> None:
    model = families.build(family, quantize=quantize)
    classes = {name: type(module) for name, module in model.named_modules()}
    expected = passes(model)
    with in_place(model) as state:
        assert state.plain == FAMILIES[family], state.describe()
        for ours, theirs in zip(passes(model), expected, strict=True):
            assert families.relative_error(ours, theirs) <= 1e-5
    assert {name: type(module) for name, module in model.named_modules()} == classes


def test_a_layer_that_computes_something_else_is_left_alone_and_reported() -> None:
    class Strange(deepseek_v3.DeepseekV3Attention):  # type: ignore[misc]
        def __call__(self, x: Any, mask: Any = None, cache: Any = None) -> Any:
            return 1.01 * super().__call__(x, mask, cache)

    model = families.build("deepseek_v3")
    model.layers[1].self_attn.__class__ = Strange
    with in_place(model) as state:
        assert state.plain == state.count == 1
        assert "something else" in state.describe()


def test_rows_of_several_lengths_and_adapters_are_computed_too() -> None:
    from mlx_lm.tuner.lora import LoRALinear

    layer = families.build("deepseek_v3").layers[0].self_attn
    adapter = LoRALinear.from_base(layer.o_proj, r=4, scale=10.0)
    adapter.lora_b = mx.ones(adapter.lora_b.shape)
    layer.o_proj = adapter
    width = layer.kv_a_proj_with_mqa.weight.shape[1]
    rows = [mx.random.normal((1, n, width), key=mx.random.key(n)) for n in (9, 4)]
    steps = [mx.random.normal((2, n, width), key=mx.random.key(50 + n)) for n in (1, 3)]

    def run() -> list[Any]:
        cache = BatchKVCache([0, 5])
        x = mx.concatenate([rows[0], mx.concatenate([mx.zeros((1, 5, width)), rows[1]], 1)])
        out = []
        for part in (x, *steps):
            out.append(layer(part, cache.make_mask(part.shape[1]), cache))
            mx.eval(out[-1], cache.state)
        return [out[0][0], out[0][1, 5:], *out[1:]]

    expected = run()
    with in_place(layer) as state:
        assert state.plain == 1
        for ours, theirs in zip(run(), expected, strict=True):
            assert families.relative_error(ours, theirs) <= 1e-5


def test_where_the_kernels_do_not_apply_a_prompt_is_computed_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels.state().available:
        pytest.skip(f"CPU kernels: {kernels.state().reason}")
    model = families.build("deepseek_v3")
    expected = passes(model)
    done: list[int] = []
    attend = latent_plain.attend
    monkeypatch.setattr(latent_plain, "attend", lambda *given: done.append(given[3].shape[2]) or attend(*given))
    installed = kernels_install(model, "exact")
    try:
        passes(model)
        assert not done
        for layer in model.layers:
            # Another array, with the same numbers in it.
            layer.self_attn.embed_q.weight = layer.self_attn.embed_q.weight + 0
        found = passes(model)
    finally:
        installed.uninstall()
    assert done == [36, 36, 4, 4, 2, 2, 16, 16]
    for ours, theirs in zip(found, expected, strict=True):
        assert families.relative_error(ours, theirs) <= 1e-5


@pytest.mark.parametrize("length", [16, 96])
def test_a_prompt_needs_no_more_memory_after_a_longer_context(length: int) -> None:
    layer = deepseek_v3.DeepseekV3Attention(
        deepseek_v3.ModelArgs(
            hidden_size=128, num_attention_heads=16, kv_lora_rank=64, q_lora_rank=64, qk_rope_head_dim=16,
            v_head_dim=32, qk_nope_head_dim=32,
        )
    )  # fmt: skip
    mx.eval(layer.parameters())
    state = install(layer, "exact", None)
    object.__setattr__(layer, "_latent", replace(layer._latent, tile_scores=1))
    assert state.plain == 1
    extra = []
    for context in (512, 2048):
        cache = KVCache()
        cache.keys = mx.random.normal((1, 1, context + 256, 64))
        cache.values = mx.random.normal((1, 1, context + 256, 16))
        cache.offset = context
        x = mx.random.normal((1, length, 128), key=mx.random.key(3))
        mask = create_attention_mask(x, cache, return_array=True)
        mx.eval(cache.keys, cache.values, x, mask)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(layer(x, mask, cache), cache.keys, cache.values)
        extra.append(mx.get_peak_memory() - before)
    state.uninstall()
    # Keys and values of all heads would be 16 * 64 * 1536 floats more, scores 16 * length * 1536. What may grow is the
    # mask, and what is made of it.
    assert extra[1] - extra[0] <= 0.05 * extra[0] + 2 * length * 1536
