"""Blocks on mlx-lm's caches: windows that wrap around, masks, batches of unequal lengths."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")

from block_models import TOLERANCE, greedy, installed  # noqa: E402
from families import build, relative_error  # noqa: E402
from mlx_lm.models.base import create_causal_mask  # noqa: E402
from mlx_lm.models.cache import (  # noqa: E402
    BatchKVCache,
    BatchRotatingKVCache,
    KVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

from edger1 import kernels  # noqa: E402

if not kernels.state().available or mx.default_device().type != mx.cpu:
    pytest.skip(f"CPU kernels: {kernels.state().reason}", allow_module_level=True)

from edger1.kernels import _load  # noqa: E402
from edger1.kernels.blocks import ATTENTION, HALF, LAYER  # noqa: E402

WINDOWED = ["gpt_oss", "gemma3_text", "olmo3", "exaone4", "cohere2", "llama"]


@pytest.mark.parametrize("window", [8, 100, 300])
def test_a_block_of_keys_may_begin_and_end_anywhere(window: int) -> None:
    """Windows larger and smaller than the blocks that attention works in, through two turns of the ring."""
    model = build("llama", quantize=True)
    prompt = [(11 * i) % 190 for i in range(70)]

    def run() -> Any:
        caches = [RotatingKVCache(max_size=window) for _ in model.layers]
        return greedy(model, 2 * window + 20, caches, prompt)

    with installed(model, fuse=False):
        expected, expected_logits = run()
    with installed(model) as state:
        assert state.blocks.count == 2
        tokens, logits = run()
    assert tokens == expected
    assert max(relative_error(ours, theirs) for ours, theirs in zip(logits, expected_logits, strict=True)) <= TOLERANCE


@pytest.mark.parametrize("family", WINDOWED)
def test_hundreds_of_tokens_beyond_the_window_are_the_same(family: str) -> None:
    model = build(family, quantize=True)
    with installed(model, fuse=False):
        expected, _ = greedy(model, 300)
    with installed(model):
        tokens, _ = greedy(model, 300)
    assert tokens == expected


@pytest.mark.parametrize("prompt", [1, 3, 7, 8, 9, 30])
def test_a_rotating_cache_goes_through_the_states_that_mlx_lm_puts_it_in(prompt: int) -> None:
    model = build("gpt_oss", quantize=True)
    lengths = [prompt, 1, 1, 3, 1, 2, 16, *[1] * 10, 5, 1]

    def states() -> list[list[Any]]:
        caches, seen = make_prompt_cache(model), []
        for i, length in enumerate(lengths):
            mx.eval(model(mx.array([[(5 * i + j) % 190 for j in range(length)]]), cache=caches))
            ring = caches[0]
            seen.append([ring.offset, ring._idx, mx.array(ring.keys) + 0, mx.array(ring.values) + 0])
        return seen

    with installed(model, fuse=False):
        expected = states()
    with installed(model):
        got = states()
    for step, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert ours[:2] == theirs[:2], step
        for a, b in zip(ours[2:], theirs[2:], strict=True):
            assert a.shape == b.shape, step
            assert mx.allclose(a, b, rtol=1e-4, atol=1e-4), step


@pytest.mark.parametrize("family", WINDOWED)
def test_windows_hold_in_plain_caches_too(family: str) -> None:
    """Windows wider than what a stack of layers was tried with, in caches that somebody made by himself."""
    model = build(family, quantize=True)
    inner = model.model
    for name in ("window_size", "sliding_window"):
        if hasattr(inner, name):
            setattr(inner, name, 16)

    def run() -> Any:
        return greedy(model, 20, [KVCache() for _ in model.layers], [(7 * i) % 190 for i in range(30)])[1]

    with installed(model, fuse=False):
        expected = run()
    with installed(model):
        assert relative_error(run(), expected) <= TOLERANCE


def test_a_ring_of_ones_own_is_written_in_place_and_a_copied_one_is_not() -> None:
    import numpy as np

    def address(a: Any) -> int:
        return int(np.array(a, copy=False).ctypes.data)

    model = build("gemma3_text", quantize=True)
    with installed(model):
        caches = make_prompt_cache(model)
        first, _ = greedy(model, 12, caches)
        ring = caches[0]
        assert type(ring) is RotatingKVCache
        mx.eval(ring.keys, ring.values)
        before = address(ring.keys)
        greedy(model, 20, caches, prompt=first[-1:])
        mx.eval(ring.keys)
        assert address(ring.keys) == before
        held, values = ring.keys, mx.array(ring.keys) + 0
        mx.eval(values)
        fork = copy.deepcopy(caches)
        greedy(model, 5, fork, prompt=[99])
        assert mx.array_equal(held, values)


def test_rings_can_be_trimmed_saved_merged_and_gone_on_with(tmp_path: Path) -> None:
    model = build("gemma3_text", quantize=True)
    with installed(model):
        caches = make_prompt_cache(model)
        first, _ = greedy(model, 4, caches, prompt=[5])
        expected, _ = greedy(model, 4, copy.deepcopy(caches), prompt=first[-1:])
        greedy(model, 2, caches, prompt=first[-1:])
        assert trim_prompt_cache(caches, 2) == 2
        assert greedy(model, 4, caches, prompt=first[-1:])[0] == expected
        more, _ = greedy(model, 30, caches, prompt=expected[-1:])
        save_prompt_cache(str(tmp_path / "cache.safetensors"), caches)
        loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
        merged = [type(c).merge([c, copy.deepcopy(c)]) for c in copy.deepcopy(caches)]
        assert isinstance(merged[0], BatchRotatingKVCache)
        rest, logits = greedy(model, 12, caches, prompt=more[-1:])
        assert greedy(model, 12, loaded, prompt=more[-1:])[0] == rest
        both = model(mx.array([more[-1:], more[-1:]]), cache=merged)[:, -1, :]
        assert max(relative_error(row, logits[0]) for row in both) <= TOLERANCE


def test_a_ring_that_keeps_its_first_positions_runs_as_it_was() -> None:
    model = build("llama", quantize=True)

    def run() -> list[int]:
        return greedy(model, 30, [RotatingKVCache(max_size=10, keep=2) for _ in model.layers])[0]

    with installed(model, fuse=False):
        expected = run()
    with installed(model):
        assert run() == expected


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["bool", "float", "heads", "row"])
def test_masks_over_a_plain_cache(kind: str, batch: int) -> None:
    """Each kind of mask that models make, over more than one block of keys."""
    model, start = build("llama", quantize=True), 270
    layer = model.layers[0]
    prefix = mx.random.normal((batch, start, 128), key=mx.random.key(1))
    x = mx.random.normal((batch, 1 if kind == "row" else 4, 128), key=mx.random.key(2))
    mask = create_causal_mask(x.shape[1], start, window_size=12)
    if kind == "float":
        mask = mx.where(mask, mx.random.normal(mask.shape, key=mx.random.key(3)), -1e9).astype(mx.float32)
    elif kind == "heads":
        mask = mx.random.uniform(shape=(batch, 4, *mask.shape), key=mx.random.key(4)) < 0.7
    elif kind == "row":
        mask = mask[0]

    def answer() -> Any:
        cache = KVCache()
        layer(prefix, "causal", cache)
        return layer(x, mask, cache)

    with installed(model, fuse=False):
        expected = answer()
        mx.eval(expected)
    with installed(model):
        ran = layer._block
        calls = []
        object.__setattr__(layer, "_block", _Counting(ran, calls))
        got = answer()
        object.__setattr__(layer, "_block", ran)
    assert calls[-1] is not None
    assert mx.abs(got - expected).max().item() <= TOLERANCE * mx.abs(expected).max().item()


class _Counting:
    """A block that notes what its operation answers."""

    def __init__(self, block: Any, answers: list[Any]) -> None:
        self._block, self._answers = block, answers

    def call(self, *arguments: Any) -> Any:
        self._answers.append(self._block.call(*arguments))
        return self._answers[-1]


def test_masks_of_another_shape_are_the_layers_own_matter() -> None:
    model = build("llama")
    layer, cache = model.layers[0], KVCache()
    with installed(model):
        layer(mx.ones((1, 6, 128)), "causal", cache)
        with pytest.raises(ValueError, match="(?i)mask|shape|broadcast"):
            mx.eval(layer(mx.ones((1, 2, 128)), mx.ones((2, 5), mx.bool_), cache))


def test_a_batch_in_rings_computes_what_its_rows_do() -> None:
    model = build("gpt_oss", quantize=True)
    rows = [[(3 * i + j * j) % 190 for j in range(12)] for i in range(3)]
    with installed(model):
        single = [greedy(model, 14, prompt=row)[1] for row in rows]
        caches, x = make_prompt_cache(model), mx.array(rows)
        for step in range(14):
            logits = model(x, cache=caches)[:, -1, :]
            for row, one in zip(logits, single, strict=True):
                assert relative_error(row, one[step]) <= TOLERANCE
            x = mx.argmax(logits, -1)[:, None]


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek", "olmoe", "falcon_h1"])
def test_batches_of_different_lengths_compute_what_their_sequences_do(family: str) -> None:
    """Through growth, and on when a sequence has left."""
    model = build(family, quantize=True)
    if family == "falcon_h1":
        model = _Attention(model.layers[0].self_attn)
    prompts = [[(7 * i + j * j) % 190 for j in range(length)] for i, length in enumerate((252, 3, 40))]
    steps = [[(11 * i + 5 * j) % 190 for j in range(12)] for i in range(3)]
    with installed(model) as state:
        assert set(state.blocks.counts) <= {LAYER, HALF, ATTENTION}
        caches, expected = [], []
        for prompt, tokens in zip(prompts, steps, strict=True):
            caches.append(make_prompt_cache(model))
            model(mx.array([prompt]), cache=caches[-1])
            alone = copy.deepcopy(caches[-1])
            expected.append([model(mx.array([[t]]), cache=alone)[0, -1] for t in tokens])
        batch = [type(layers[0]).merge(list(layers)) for layers in zip(*caches, strict=True)]
        assert all(type(c) is BatchKVCache for c in batch)
        calls = _watched(model)
        rows = [0, 1, 2]
        for step in range(12):
            if step == 8:
                rows = [1, 2]
                for c in batch:
                    c.filter([1, 2])
            logits = model(mx.array([[steps[row][step]] for row in rows]), cache=batch)[:, -1, :]
            for got, row in zip(logits, rows, strict=True):
                assert relative_error(got, expected[row][step]) <= TOLERANCE
        # Once in each cache there was no room at first.
        assert sum(done is not None for done in calls) == 12 * len(batch)


class _Attention(nn.Module):
    """A model of one attention layer."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.embed = mx.random.normal((200, 128), key=mx.random.key(5))
        self.layers = [_Alone(attention)]

    def __call__(self, tokens: Any, cache: Any) -> Any:
        x = self.embed[tokens]
        mask = cache[0].make_mask(x.shape[1], return_array=False, window_size=None)
        return self.layers[0].self_attn(x, mask=mask, cache=cache[0])


class _Alone(nn.Module):
    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.self_attn = attention


def _watched(model: Any) -> list[Any]:
    """What the operations of a model's blocks answer from now on."""
    answers: list[Any] = []
    for module in model.modules():
        if vars(module).get("_block") is not None:
            held = vars(module)["_block"]
            object.__setattr__(module, "_block", dataclasses.replace(held, call=_Noting(held.call, answers)))
    return answers


class _Noting:
    def __init__(self, call: Any, answers: list[Any]) -> None:
        self._call, self._answers = call, answers

    def __call__(self, *arguments: Any) -> Any:
        self._answers.append(self._call(*arguments))
        return self._answers[-1]


def test_places_that_no_cache_has_are_refused() -> None:
    extension = _load()[0]
    assert extension is not None
    model = build("llama", quantize=True)
    with installed(model):
        layer = model.layers[0]
        call, x = layer._block.call, mx.ones((1, 1, 128))
        keys = mx.zeros((1, 2, 8, 32))
        assert call(layer, x, None, keys, keys, 20, 3, 8) is not None
        for offset, first_slot, count in ((20, 8, 8), (20, -1, 8), (20, 0, 9), (3, 0, 8), (-1, 0, 8), (20, 0, 0)):
            assert call(layer, x, None, keys, keys, offset, first_slot, count) is None
    part = extension.DecoderLayer(heads=4, kv_heads=2, head_dim=8, attention_scale=1.0)
    with pytest.raises(ValueError, match="sinks"):
        part.sinks(mx.zeros((3,)))
    with pytest.raises(ValueError, match="as many as all heads"):
        part.norm("q", mx.ones((12,)), 1e-5)
    with pytest.raises(ValueError, match="layer norm only"):
        part.norm("mlp", mx.ones((12,)), 1e-5, bias=mx.ones((12,)))
