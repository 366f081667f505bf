"""Blocks beyond the plain decoder layer: experts, sinks, score caps, other norms; the report."""

from __future__ import annotations

import copy
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")

from block_models import TOLERANCE, greedy, installed  # noqa: E402
from families import build, relative_error  # noqa: E402
from mlx_lm.models.cache import KVCache, make_prompt_cache  # noqa: E402

from edger1 import kernels  # noqa: E402

if not kernels.state().available or mx.default_device().type != mx.cpu:
    pytest.skip(f"CPU kernels: {kernels.state().reason}", allow_module_level=True)

from edger1.kernels import _load  # noqa: E402
from edger1.kernels.blocks import ATTENTION, HALF, LATENT, LAYER, PARTS  # noqa: E402
from edger1.kernels.install import install  # noqa: E402

RUNS = {
    "llama": {LAYER},
    "qwen2": {LAYER},
    "qwen3": {LAYER},
    "qwen3_moe": {HALF},
    "olmoe": {HALF},
    "mixtral": {HALF},
    "gpt_oss": {HALF},
    "granite": {LAYER},
    "granitemoe": {HALF},
    "gemma": {LAYER},
    "gemma2": {LAYER},
    "gemma3_text": {LAYER},
    "olmo2": {LAYER},
    "olmo3": {LAYER},
    "exaone4": {LAYER},
    "smollm3": {LAYER},
    "cohere2": {LAYER},
    "phi3": {LAYER},
    "glm4": {LAYER},
    "stablelm": {LAYER},
    "hunyuan_v1_dense": {LAYER},
    "minicpm": {LAYER},
    "starcoder2": {HALF},
    "phi": {HALF},
    "deepseek": {LAYER, HALF},
    "deepseek_v2": {LATENT},
    "deepseek_v3": {LATENT},
    "mimo_v2_flash": {LAYER, PARTS},
    "falcon_h1": {ATTENTION},
    "granitemoehybrid": {ATTENTION, PARTS},
}
"""Family -> what of its layers runs as one operation."""


@pytest.mark.parametrize("quantize", [False, True], ids=["f32", "4bit"])
@pytest.mark.parametrize("family", RUNS)
def test_every_family_computes_what_its_layers_do(family: str, quantize: bool) -> None:
    model = build(family, quantize=quantize)
    with installed(model, fuse=False):
        expected, expected_logits = greedy(model, 40)
    with installed(model) as state:
        assert {layer.runs for layer in state.blocks.found} == RUNS[family], state.blocks.describe()
        tokens, logits = greedy(model, 40)
    assert tokens == expected
    assert max(relative_error(ours, theirs) for ours, theirs in zip(logits, expected_logits, strict=True)) <= TOLERANCE


@pytest.mark.parametrize("family", RUNS)
def test_rounding_to_int8_hides_no_layer(family: str) -> None:
    """What rounds the activations makes much of the last bits of what was before it."""
    for seed in range(4):
        with installed(build(family, seed, quantize=True), "fast") as state:
            assert {layer.runs for layer in state.blocks.found} == RUNS[family], state.blocks.describe()


@pytest.mark.parametrize("family", ["gpt_oss", "olmoe", "gemma2", "gemma3_text", "qwen3_moe", "mixtral", "granite"])
def test_one_layer_gives_what_it_gave(family: str) -> None:
    """In the caches that the model itself makes, as far as the window and beyond it."""
    model = build(family, quantize=True)
    inputs = [mx.random.normal((1, n, 128), key=mx.random.key(n)) for n in (5, 1, 3, 1, 1, 9, 1, 1, 16, 1)]

    def answers(index: int) -> list[Any]:
        cache, layer = make_prompt_cache(model)[index], model.layers[index]
        results = []
        for x in inputs:
            mask = cache.make_mask(x.shape[1], return_array=family == "gemma2", window_size=None)
            results.append(layer(x, mask, cache) - x)
        mx.eval(results)
        return results

    for index in range(len(model.layers)):
        with installed(model, fuse=False):
            expected = answers(index)
        with installed(model) as state:
            assert state.blocks.found[index].runs == next(iter(RUNS[family]))
            got = answers(index)
        for ours, theirs in zip(got, expected, strict=True):
            assert mx.abs(ours - theirs).max().item() <= TOLERANCE * mx.abs(theirs).max().item()


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("family", ["gpt_oss", "gemma2", "gemma3_text", "olmoe", "cohere2"])
def test_rows_depend_neither_on_company_nor_on_threads_nor_on_turns_of_the_ring(
    family: str, threads: int, precision: str
) -> None:
    extension = _load()[0]
    assert extension is not None
    before = extension.threads()
    model = build(family, quantize=True)
    tokens = [(7 * i) % 190 for i in range(300)]
    try:
        with installed(model, precision):
            extension.set_threads(1)
            caches = make_prompt_cache(model)
            model(mx.array([tokens[:270]]), cache=caches)
            # Another few, so that the rings have turned and stand somewhere in the middle.
            for t in tokens[270:]:
                mx.eval(model(mx.array([[t]]), cache=caches))
            kept = copy.deepcopy(caches)
            alone = [model(mx.array([[t]]), cache=caches)[0, 0] for t in range(16)]
            mx.eval(alone)
            extension.set_threads(threads)
            for rows in (2, 7, 16):
                together = model(mx.array([list(range(rows))]), cache=copy.deepcopy(kept))[0]
                assert mx.array_equal(together, mx.stack(alone[:rows]))
    finally:
        extension.set_threads(before)


def test_the_experts_half_is_the_modules_own() -> None:
    """Whoever exchanges the module of experts is called, with the normed input."""
    model = build("qwen3_moe", quantize=True)
    heard = []

    class Other(nn.Module):
        def __call__(self, x: Any) -> Any:
            heard.append(x.shape)
            return x * 2

    with installed(model, fuse=False):
        plain = greedy(model, 3)[1]
    with installed(model) as state:
        assert state.blocks.counts[HALF] == 2
        experts, model.layers[1].mlp = model.layers[1].mlp, Other()
        changed = greedy(model, 3)[1]
        model.layers[1].mlp = experts
        restored = greedy(model, 3)[1]
    assert heard == [(1, 12, 128), (1, 1, 128), (1, 1, 128)]
    assert relative_error(changed, plain) > 1e-3
    assert relative_error(restored, plain) <= TOLERANCE


def test_new_weights_sinks_and_adapters_are_noticed_in_halves() -> None:
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = build("gpt_oss", quantize=True)
    x = mx.random.normal((1, 1, 128), key=mx.random.key(2))

    def answer() -> Any:
        cache = KVCache()
        model.layers[1](mx.ones((1, 4, 128)), "causal", cache)
        out = model.layers[1](x, None, cache)
        mx.eval(out)
        return out

    with installed(model):
        before = answer()
        attention = model.layers[1].self_attn
        attention.sinks = attention.sinks + 3
        assert mx.abs(answer() - before).max().item() > 1e-3
        attention.sinks = attention.sinks - 3
        norm = model.layers[1].post_attention_layernorm
        norm.weight = norm.weight * 2
        assert mx.abs(answer() - before).max().item() > 1e-3
        norm.weight = norm.weight / 2
        linear_to_lora_layers(model, 2, {"rank": 4, "scale": 10.0, "dropout": 0.0, "keys": ["self_attn.o_proj"]})
        attention.o_proj.lora_b = mx.ones(attention.o_proj.lora_b.shape)
        assert mx.abs(answer() - before).max().item() > 1e-3


@pytest.mark.parametrize("family", ["olmoe", "falcon_h1"])
def test_gradients_pass_through_halves_and_attention_as_they_were(family: str) -> None:
    model = build(family)

    def loss(x: Any) -> Any:
        cache = KVCache()
        attention = model.layers[0].self_attn
        return (attention(x, "causal", cache) + attention(x[:, :1], None, cache)).square().sum()

    x = mx.random.normal((1, 4, 128), key=mx.random.key(2))
    with installed(model, fuse=False):
        expected = mx.grad(loss)(x)
        mx.eval(expected)
    with installed(model):
        assert mx.allclose(mx.grad(loss)(x), expected, rtol=1e-4, atol=1e-4)


def test_layers_that_treat_late_positions_in_another_way_are_left_alone() -> None:
    model = build("llama", quantize=True)
    attention = model.layers[0].self_attn

    class Tempered(type(attention)):  # type: ignore[misc]
        def __call__(self, x: Any, mask: Any = None, cache: Any = None) -> Any:
            out = super().__call__(x, mask, cache)
            return out * 1.5 if cache is not None and cache.offset > 8192 else out

    attention.__class__ = Tempered
    with installed(model) as state:
        assert [layer.runs for layer in state.blocks.found] == [PARTS, LAYER]
        assert "off by" in state.blocks.found[0].reason


def test_the_report_says_what_runs_and_why_not_more() -> None:
    with installed(build("deepseek", quantize=True)) as state:
        line = state.blocks.describe()
    assert "1 of 2 layers as one operation" in line
    assert "1 up to the MLP" in line
    assert "DeepseekMoE" in line
    with installed(build("deepseek_v3", quantize=True)) as state:
        assert "0 of 2 layers as one operation, 2 in their latent attention" in state.blocks.describe()
        assert "caches latents" in state.blocks.describe()


@pytest.mark.parametrize("family", ["plamo", "plamo2", "gemma4", "hunyuan", "afm7", "gptj"])
def test_what_is_built_in_another_way_runs_all_the_same(family: str) -> None:
    """Layers within a module, layers that return more than one array, layers that are called by names."""
    model = build(family, quantize=True)
    expected = greedy(model, 3)[1]
    mx.eval(expected)
    with installed(model) as state:
        assert len(state.blocks.found) > 0
        assert relative_error(greedy(model, 3)[1], expected) <= TOLERANCE


def test_uninstall_gives_every_class_back() -> None:
    for family in ("olmoe", "falcon_h1", "gemma2"):
        model = build(family)
        classes = [type(module) for module in model.modules()]
        state = install(model, "exact")
        assert [type(module) for module in model.modules()] != classes
        state.uninstall()
        assert [type(module) for module in model.modules()] == classes
        assert not any("_block" in vars(module) for module in model.modules())
