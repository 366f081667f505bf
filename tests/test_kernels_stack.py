"""All layers of a model as one operation: the same bits as a layer at a time, alone and in mlx-lm's batches."""

from __future__ import annotations

import copy
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core")

from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache, trim_prompt_cache  # noqa: E402

from edger1 import kernels  # noqa: E402

if not kernels.state().available or mx.default_device().type != mx.cpu:
    pytest.skip(f"CPU kernels: {kernels.state().reason}", allow_module_level=True)

from edger1.kernels import _load  # noqa: E402
from edger1.kernels.install import install  # noqa: E402
from edger1.kernels.stack import _PLACED, _stacked, uninstall  # noqa: E402
from tests.test_kernels_blocks import FAMILIES, address, build, greedy, installed  # noqa: E402


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stack_has_the_bits_of_its_layers(family: str, precision: str) -> None:
    model = build(family)
    with installed(model, precision) as state:
        assert len(state._stacks) == 1
        tokens, logits = greedy(model, 300)
        uninstall(state._stacks)
        expected, expected_logits = greedy(model, 300)
    assert tokens == expected
    assert mx.array_equal(logits, expected_logits)


PROMPTS = [[5], [5, 6, 7, 200, 31], list(range(40, 80)), [(7 * i) % 250 for i in range(270)]]


def prefilled(model: Any, prompt: list[int]) -> Any:
    caches = make_prompt_cache(model)
    model(mx.array([prompt]), cache=caches)
    mx.eval([c.state for c in caches])
    return caches


def merged(rows: list[Any]) -> list[Any]:
    return [BatchKVCache.merge([row[i] for row in rows]) for i in range(len(rows[0]))]


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_batch_of_unequal_lengths_has_the_bits_of_its_rows_alone(precision: str, threads: int) -> None:
    extension = _load()[0]
    assert extension is not None
    before = extension.threads()
    model = build()
    try:
        extension.set_threads(threads)
        with installed(model, precision, narrow_caches=precision == "fast"):
            rows = [prefilled(model, prompt) for prompt in PROMPTS]
            batch = merged(rows)
            alone = [greedy(model, 20, row, [9]) for row in rows]
            x = mx.full((len(rows), 1), 9)
            for step in range(20):
                logits = model(x, cache=batch)[:, -1, :]
                assert mx.array_equal(logits, mx.stack([single[step] for _, single in alone]))
                x = mx.argmax(logits, -1)[:, None]
            assert batch[0].keys.dtype == (mx.float16 if precision == "fast" else mx.float32)
            lengths = [len(p) + 20 for p in PROMPTS]
            assert batch[0]._idx == max(lengths)
            assert batch[-1].offset.tolist() == lengths
            assert batch[-1].left_padding.tolist() == [max(lengths) - n for n in lengths]
    finally:
        extension.set_threads(before)


def test_fast_keeps_its_caches_in_16_bits_and_exact_in_32() -> None:
    model = build()
    answers = {}
    for precision, dtype in (("fast", mx.float16), ("exact", mx.float32)):
        state = install(model, precision)
        try:
            caches = prefilled(model, PROMPTS[3])
            answers[precision] = greedy(model, 20, caches, [9])[1]
            assert {a.dtype for c in caches for a in (c.keys, c.values)} == {dtype}
            # More than 16 rows are not the stack's; the next few are again.
            model(mx.array([PROMPTS[2]]), cache=caches)
            logits = model(mx.array([[9]]), cache=caches)
            assert mx.isfinite(logits).all().item()
            assert caches[0].keys.dtype == dtype
            assert caches[0].offset == len(PROMPTS[3]) + 20 + len(PROMPTS[2]) + 1
        finally:
            state.uninstall()
    with installed(model, "fast", narrow_caches=False):
        wide = greedy(model, 1, prefilled(model, PROMPTS[3]), [9])[1]
    from_caches = mx.abs(answers["fast"][0] - wide[0]).max().item()
    from_activations = mx.abs(answers["exact"][0] - wide[0]).max().item()
    assert 0 < from_caches < from_activations


def test_keys_and_values_beyond_16_bits_become_the_largest_there_are() -> None:
    model = build("llama-bias")
    for layer in model.model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.bias = projection.bias + mx.where(mx.arange(projection.bias.size) % 5 == 0, 1e5, 0.0)
    with installed(model, "fast", narrow_caches=True):
        caches = prefilled(model, PROMPTS[2])
        logits = greedy(model, 2, caches, [9])[1]
        assert mx.isfinite(logits).all().item()
        for cache in caches:
            # What was there when they were narrowed, and what has been written since.
            for slots in (slice(0, 40), slice(40, 42)):
                for held in (cache.keys, cache.values):
                    assert held.dtype == mx.float16
                    assert mx.abs(held[..., slots, :]).max().item() == 65504


def test_where_the_stack_does_not_apply_caches_stay_in_32_bits() -> None:
    model = build()
    x = mx.array([[9]])
    with installed(model, "fast", narrow_caches=True):
        caches = prefilled(model, PROMPTS[2])
        model(x, cache=caches)
        assert caches[0].keys.dtype == mx.float16
        trim_prompt_cache(caches, 1)
        norm = model.model.norm.weight
        model.model.norm.weight = norm * 1
        wide = prefilled(model, PROMPTS[2])
        model(x, cache=wide)
        plain = prefilled(model, PROMPTS[2])
        # Never narrowed: the prompt's keys have all their bits.
        assert all(mx.array_equal(a.keys[..., :40, :], b.keys[..., :40, :]) for a, b in zip(wide, plain, strict=True))
        model(x, cache=caches)
        assert {a.dtype for c in caches for a in (c.keys, c.values)} == {mx.float32}
        model.model.norm.weight = norm
        # A row's embeddings instead of its token are not the stack's either.
        model(x, cache=caches)
        assert caches[0].keys.dtype == mx.float16
        model(x, cache=caches, input_embeddings=model.model.embed_tokens(x))
        assert caches[0].keys.dtype == mx.float32
        full = prefilled(model, [(7 * i) % 250 for i in range(256)])
        model(x, cache=full)
        assert full[0].keys.dtype == mx.float16
        assert full[0].keys.shape[2] == 512


def test_several_positions_a_row_and_batches_that_change() -> None:
    model = build()
    with installed(model):
        rows = [prefilled(model, prompt) for prompt in PROMPTS[:3]]
        batch = merged(rows)
        ahead = mx.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
        expected = mx.concatenate([model(ahead[i : i + 1], cache=row) for i, row in enumerate(rows)])
        assert mx.array_equal(model(ahead, cache=batch), expected)
        for cache in batch:
            cache.filter(mx.array([0, 2]))
        expected = mx.concatenate([model(mx.array([[11]]), cache=rows[i]) for i in (0, 2)])
        assert mx.array_equal(model(mx.array([[11], [11]]), cache=batch), expected)
        more = merged([prefilled(model, PROMPTS[1])])
        for cache, other in zip(batch, more, strict=True):
            cache.extend(other)
        again = prefilled(model, PROMPTS[1])
        expected = mx.concatenate([model(mx.array([[12]]), cache=c) for c in (rows[0], rows[2], again)])
        assert mx.array_equal(model(mx.array([[12]] * 3), cache=batch), expected)


def test_the_batch_generator_gives_what_single_prompts_give() -> None:
    from mlx_lm.generate import BatchGenerator

    model = build()
    prompts = [list(range(20, 60)), list(range(100, 145)), list(range(5, 38))]
    with installed(model):
        expected = [greedy(model, 12, prompt=prompt)[0] for prompt in prompts]
        generator = BatchGenerator(model, max_tokens=12)
        ids = generator.insert(prompts)
        got: dict[int, list[int]] = {uid: [] for uid in ids}
        for _ in range(1000):
            if all(len(tokens) >= 12 for tokens in got.values()):
                break
            for response in generator.next_generated():
                got[response.uid].append(response.token)
        assert [got[uid] for uid in ids] == expected


def test_caches_of_different_kinds_and_padding_are_the_layers_own_matter() -> None:
    model = build()
    with installed(model):
        batch = merged([prefilled(model, prompt) for prompt in PROMPTS[:2]])
        batch[1].left_padding = batch[1].left_padding + 1
        module = model.model
        assert type(module) is _stacked(type(module).__mro__[1])
        x = module.embed_tokens(mx.array([[1], [1]]))
        assert module._stack.run(module, mx.array([[1], [1]]), batch) is None
        assert module._stack.run(module, mx.array([[1]]), [KVCache() for _ in range(3)]) is None
        mx.eval(x)


def test_held_arrays_stay_and_ones_own_are_written_in_place() -> None:
    model = build()
    with installed(model):
        caches = prefilled(model, PROMPTS[2])
        greedy(model, 2, caches, [1])
        mx.eval([c.state for c in caches])
        places = [address(c.keys) for c in caches]
        fork = copy.deepcopy(caches)
        held = [(c.keys, c.keys + 0) for c in fork]
        mx.eval(held)
        expected, _ = greedy(model, 6, fork, [3])
        for keys, then in held:
            assert mx.array_equal(keys, then)
        del fork, held, keys, then
        mx.eval([c.state for c in caches])
        assert greedy(model, 6, caches, [3])[0] == expected
        assert trim_prompt_cache(caches, 6) == 6
        before = [address(c.keys) for c in caches]
        assert greedy(model, 6, caches, [3])[0] == expected
        assert [address(c.keys) for c in caches] == before
        assert len(places) == len(before)


def test_caches_are_written_in_place_however_steps_that_run_ahead_fall() -> None:
    """Also where a step is asked for just as the one before it ends, and MLX is about to let go of the caches."""
    model = build()
    with installed(model):
        caches = prefilled(model, PROMPTS[2])
        greedy(model, 1, caches, [9])
        places = [address(array) for c in caches for array in (c.keys, c.values)]
        for _ in range(10):
            token = mx.array([9], mx.uint32)
            for _ in range(200):
                following = mx.argmax(model(token[None], cache=caches)[:, -1], axis=-1)
                mx.async_eval(following)
                token.item()
                token = following
            mx.eval(token)
            trim_prompt_cache(caches, 200)
        assert [address(array) for c in caches for array in (c.keys, c.values)] == places


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_decoding_moves_caches_once_and_again_when_they_grow_or_change(precision: str) -> None:
    model = build()
    with installed(model, precision, narrow_caches=precision == "fast"):
        caches = prefilled(model, PROMPTS[2])
        before = [address(c.keys) for c in caches]
        greedy(model, 1, caches, [9])
        moved = [address(c.keys) for c in caches]
        assert not set(moved) & set(before)
        greedy(model, 20, caches, [9])
        assert [address(c.keys) for c in caches] == moved
        greedy(model, 256, caches, [9])
        assert not {address(c.keys) for c in caches} & set(moved)
        batch = merged([prefilled(model, prompt) for prompt in PROMPTS[:3]])
        x = mx.full((3, 1), 9)
        mx.eval(model(x, cache=batch))
        moved = [address(c.keys) for c in batch]
        mx.eval(model(x, cache=batch))
        assert [address(c.keys) for c in batch] == moved
        for cache in batch:
            cache.filter(mx.array([0, 2]))
        assert all(vars(c)[_PLACED] != c.keys.shape for c in batch)
        mx.eval(model(x[:2], cache=batch))
        assert all(vars(c)[_PLACED] == c.keys.shape for c in batch)


def test_an_exchanged_layer_or_weight_is_noticed() -> None:
    model = build()
    with installed(model):
        caches = prefilled(model, PROMPTS[1])
        before = model(mx.array([[3]]), cache=caches)[0, 0]
        mx.eval(before)
        trim_prompt_cache(caches, 1)
        model.model.norm.weight = model.model.norm.weight * 2
        doubled = model(mx.array([[3]]), cache=caches)[0, 0]
        assert mx.abs(doubled - before).max().item() > 1e-3
        model.model.norm.weight = model.model.norm.weight / 2
        trim_prompt_cache(caches, 1)
        model.model.layers[0], model.model.layers[1] = model.model.layers[1], model.model.layers[0]
        swapped = model(mx.array([[3]]), cache=caches)[0, 0]
        assert mx.abs(swapped - before).max().item() > 1e-3
