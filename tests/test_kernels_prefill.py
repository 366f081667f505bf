"""Prompts through decoder layers as two operations: what the layers compute, in caches that keep mlx-lm's meaning."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")

from mlx.utils import tree_map  # noqa: E402
from mlx_lm.models.cache import KVCache, make_prompt_cache, trim_prompt_cache  # noqa: E402

from edger1 import kernels  # noqa: E402

if not kernels.state().available or mx.default_device().type != mx.cpu:
    pytest.skip(f"CPU kernels: {kernels.state().reason}", allow_module_level=True)

from edger1.kernels import _load, prefill  # noqa: E402
from edger1.kernels.install import install  # noqa: E402

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen3": {"head_dim": 40},
    "gemma": {"num_key_value_heads": 1},
    "granite": {
        "logits_scaling": 2.0,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.3,
        "attention_bias": False,
        "mlp_bias": False,
    },
}
PART_ROWS = 256
"""Rows over which the operation chooses the channels that stay in float32; the layers' own products choose over all."""


def build(family: str, bits: int = 4) -> Any:
    """A random model of two layers."""
    module = importlib.import_module(f"mlx_lm.models.{family}")
    config = {
        "model_type": family,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "vocab_size": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        **FAMILIES[family],
    }
    mx.random.seed(3)
    model = module.Model(module.ModelArgs.from_dict(config))
    model.update(tree_map(lambda w: w * 3 if w.ndim > 1 else w + 0.1 * mx.random.normal(w.shape), model.parameters()))
    nn.quantize(model, group_size=32, bits=bits)
    mx.eval(model.parameters())
    return model


@contextmanager
def counted(model: Any, monkeypatch: pytest.MonkeyPatch, precision: str, fuse: bool) -> Iterator[list[int]]:
    """The kernels installed, and the lengths of what passed a layer as two operations."""
    from edger1.kernels.blocks import wire

    lengths: list[int] = []

    def spy(operation: Any, layer: Any, x: Any, mask: Any, cache: Any) -> Any:
        done = prefill.prefill(operation, layer, x, mask, cache)
        if done is not None:
            lengths.append(x.shape[1])
        return done

    monkeypatch.setattr(wire, "prefill", spy)
    state = install(model, precision, fuse=fuse)
    try:
        yield lengths
    finally:
        state.uninstall()


def states(model: Any, x: Any, cuts: list[int]) -> tuple[Any, Any]:
    """Hidden states after the layers, and the caches, with x fed in pieces."""
    caches = [KVCache() for _ in model.layers]
    found = []
    for begin, end in zip([0, *cuts], [*cuts, x.shape[1]], strict=True):
        h = x[:, begin:end]
        for layer, cache in zip(model.layers, caches, strict=True):
            h = layer(h, "causal", cache)
        found.append(h)
        mx.eval(h)
    return mx.concatenate(found, axis=1), caches


def difference(a: Any, b: Any) -> float:
    """Return the root mean square of the error, relative to b's."""
    return float(mx.sqrt((a - b).square().mean() / b.square().mean()).item())


def assert_same(precision: str, found: Any, own: Any, exact: Any, largest_piece: int) -> None:
    """Assert that the operation found what the layers' own operations give, in the same precision.

    How far "fast" is from the truth is the model's matter: these random ones double an error from layer to layer.
    """
    if precision == "exact":
        assert difference(found, exact) <= 1e-5
        return
    extension = _load()[0]
    assert extension is not None
    tiles = extension.active_instruction_set() == "amx"
    if largest_piece <= PART_ROWS and not tiles:
        assert difference(found, own) <= 1e-3
    else:
        # Rounded otherwise: then it is no further from them than they are from the truth. On matrix tiles the operation
        # rounds more than they do, since attention is in bf16 too.
        assert difference(found, own) <= difference(own, exact) + (0.05 if tiles else 0)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("batch", "length", "cuts"), [(1, 17, []), (1, 600, [37, 300]), (2, 70, [33])])
def test_a_prompt_computes_what_the_layers_do(
    family: str, precision: str, batch: int, length: int, cuts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family)
    x = mx.random.normal((batch, length, 96), key=mx.random.key(1))
    with counted(model, monkeypatch, "exact", fuse=False) as lengths:
        expected, plain = states(model, x, cuts)
        assert not lengths
    with counted(model, monkeypatch, precision, fuse=False):
        own, own_caches = states(model, x, cuts)
    with counted(model, monkeypatch, precision, fuse=True) as lengths:
        found, caches = states(model, x, cuts)
        assert sum(lengths) == 2 * length
    largest = batch * max(end - begin for begin, end in zip([0, *cuts], [*cuts, length], strict=True))
    assert_same(precision, found, own, expected, largest)
    for ours, same, theirs in zip(caches, own_caches, plain, strict=True):
        assert (ours.offset, ours.keys.shape, ours.values.shape) == (
            theirs.offset,
            theirs.keys.shape,
            theirs.values.shape,
        )
        for held in ((ours.keys, same.keys, theirs.keys), (ours.values, same.values, theirs.values)):
            assert_same(precision, *(a[..., :length, :] for a in held), largest)


@pytest.mark.parametrize("bits", [3, 8])
def test_other_bits(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", bits)
    x = mx.random.normal((1, 130, 96), key=mx.random.key(1))
    with counted(model, monkeypatch, "exact", fuse=False):
        expected, _ = states(model, x, [])
    for precision in ("exact", "fast"):
        with counted(model, monkeypatch, precision, fuse=False):
            own, _ = states(model, x, [])
        with counted(model, monkeypatch, precision, fuse=True) as lengths:
            assert_same(precision, states(model, x, [])[0], own, expected, 130)
            assert lengths == [130, 130]


def test_a_copied_cache_is_not_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    tokens = mx.array([[(7 * i) % 60 for i in range(60)]])
    with counted(model, monkeypatch, "exact", fuse=True) as lengths:
        caches = make_prompt_cache(model)
        mx.eval(model(tokens[:, :20], cache=caches))
        held = [(c.keys, mx.array(c.keys) + 0) for c in caches]
        mx.eval(held)
        first = model(tokens[:, 20:], cache=caches)
        mx.eval(first)
        for keys, before in held:
            assert mx.array_equal(keys, before)
        assert trim_prompt_cache(caches, 40) == 40
        assert mx.array_equal(model(tokens[:, 20:], cache=caches), first)
        assert lengths == [20, 20, 40, 40, 40, 40]


def test_masks_and_gradients_run_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    x = mx.random.normal((1, 20, 96), key=mx.random.key(1))
    layer = model.layers[0]
    with counted(model, monkeypatch, "exact", fuse=True) as lengths:
        layer(x, mx.tril(mx.ones((20, 20), mx.bool_)), KVCache())
        gradient = mx.grad(lambda v: layer(v, "causal", KVCache()).square().sum())(x)
        mx.eval(gradient)
        assert not lengths
    with counted(model, monkeypatch, "exact", fuse=False):
        expected = mx.grad(lambda v: layer(v, "causal", KVCache()).square().sum())(x)
        assert mx.allclose(gradient, expected, rtol=1e-5, atol=1e-5)
