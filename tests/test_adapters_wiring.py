"""Adapters over live models: which layers, a start that changes nothing, off to the bit, gradients, refusals."""

from __future__ import annotations

from collections import Counter
from typing import Any

import adapting
import families
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from edger1.errors import FormatError, UsageError
from edger1.kernels.install import install
from edger1.train.adapters import layers, places
from edger1.train.adapters.wiring import AdapterSpec, attach

LORA, DORA = AdapterSpec(rank=4), AdapterSpec("dora", rank=4)
MODELS = ("llama", "qwen3_moe", "deepseek_v3")
NO_GRADIENT = {"deepseek_v41": "mlx-lm's model takes gradients through indices (ValueError from MLX)"}


def _same(a: list[mx.array], b: list[mx.array]) -> bool:
    return all(mx.array_equal(x, y, equal_nan=True).item() for x, y in zip(a, b, strict=True))


def _gradients(model: Any) -> dict[str, mx.array]:
    def loss(ids: mx.array) -> mx.array:
        out = model(ids)
        return mx.square(mx.where(mx.isinf(out), 0.0, out)).mean()

    _, gradients = nn.value_and_grad(model, loss)(adapting.IDS)
    found: dict[str, mx.array] = dict(tree_flatten(gradients))
    return found


@pytest.mark.parametrize("installed", ["", "parts", "whole"])
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_off_is_the_bare_model_bit_for_bit(family: str, quantize: bool, installed: str) -> None:
    model = families.build(family, quantize=quantize)
    kernels = install(model, "exact", fuse=installed == "whole") if installed else None
    try:
        bare = families.logits(model)
        for spec in (LORA, DORA):
            adapted = attach(model, spec)
            fresh = families.logits(model)
            # Blocks that are one operation round otherwise than their parts.
            assert max(families.relative_error(a, b) for a, b in zip(fresh, bare, strict=True)) < 1e-5
            adapting.learnt(adapted)
            assert families.relative_error(families.logits(model)[0], bare[0]) > 1e-2
            with adapted.off(), adapted.off():
                assert _same(families.logits(model), bare)
            assert families.relative_error(families.logits(model)[0], bare[0]) > 1e-2
            adapted.detach()
            assert _same(families.logits(model), bare)
    finally:
        if kernels is not None:
            kernels.uninstall()


@pytest.mark.families
def test_every_family_can_be_adapted() -> None:
    """A start that changes nothing, and a gradient for all of B (and m) that gets one; off again to the bit."""
    for i, family in enumerate(name for name in families.families() if name not in families.UNBUILDABLE):
        model = families.build(family, quantize=i % 2 == 0)
        bare = model(adapting.IDS)
        adapted = attach(model, DORA if i % 3 == 0 else LORA)
        assert _same([model(adapting.IDS)], [bare]), family
        trained = {name for name, _ in tree_flatten(model.trainable_parameters())}
        assert trained == set(adapted.parameters()), family
        if family not in NO_GRADIENT:
            gradients = _gradients(model)
            still = [name for name, g in gradients.items() if name.endswith("lora_b") and not mx.any(g != 0).item()]
            # An expert of dbrx, which has a module for each, may be chosen by no token.
            assert not still or family == "dbrx", (family, still)
        adapted.detach()
        assert _same([model(adapting.IDS)], [bare]), family


@pytest.mark.parametrize("spec", [LORA, DORA])
@pytest.mark.parametrize("family", MODELS)
def test_gradients_on_the_kernels_are_those_of_mlx(family: str, spec: AdapterSpec) -> None:
    found = []
    for installed in (False, True):
        model = families.build(family, quantize=True)
        kernels = install(model, "exact", fuse=False) if installed else None
        adapting.learnt(attach(model, spec))
        found.append(_gradients(model))
        mx.eval(found[-1])
        if kernels is not None:
            kernels.uninstall()
    for name, expected in found[0].items():
        assert families.relative_error(found[1][name], expected) < 1e-4, name


def test_dora_is_what_the_paper_says() -> None:
    """m (W + s B A) / |W + s B A| by rows (arXiv:2402.09353), in NumPy, over a linear layer with a bias."""
    linear = nn.Linear(64, 48)
    quantized = nn.QuantizedLinear.from_linear(linear, 32, 4)
    x = mx.random.normal((5, 64), key=mx.random.key(1))
    for base in (linear, quantized):
        layer = layers.over(base, "dora", 4, 1.5, 0.0, mx.random.key(0))
        layer.lora_b = mx.random.normal((4, 48), key=mx.random.key(2))
        layer.m = layer.m * 1.25
        w = np.array(layers.dequantized(base)) + 1.5 * np.array(layer.lora_a @ layer.lora_b).T
        w = np.array(layer.m)[:, None] * w / np.linalg.norm(w, axis=1, keepdims=True)
        expected = np.array(x) @ w.T + np.array(base.bias)
        np.testing.assert_allclose(np.array(layer(x)), expected, rtol=1e-4, atol=1e-4)
        layer.settle()
        np.testing.assert_allclose(np.array(layer(x)), expected, rtol=1e-4, atol=1e-4)
        layer.lora_b = layer.lora_b * 0
        assert not np.allclose(np.array(layer(x)), expected, atol=1e-2), "settled norms outlived their weights"


def test_latent_attentions_matrices_are_adapted_in_both_directions() -> None:
    from mlx_lm.models.mla import MultiLinear

    base = MultiLinear(32, 24, 3)
    x, back = (mx.random.normal((1, 3, 5, n), key=mx.random.key(n)) for n in (32, 24))
    for kind in ("lora", "dora"):
        layer = layers.over(base, kind, 4, 2.0, 0.0, mx.random.key(0))
        layer.lora_b = mx.random.normal(layer.lora_b.shape, key=mx.random.key(2))
        w = base.weight + 2.0 * layer.lora_b @ layer.lora_a
        if kind == "dora":
            w = layer.m[..., None] * w / mx.linalg.norm(w, axis=-1, keepdims=True)
        assert families.relative_error(layer(x), x @ w.swapaxes(-1, -2)) < 1e-5
        assert families.relative_error(layer(back, transpose=False), back @ w) < 1e-5


@pytest.mark.parametrize(
    ("family", "targets", "kinds"),
    [
        ("llama", ("all",), {"attention": 8, "mlp": 6}),
        ("qwen3_moe", ("all", "router"), {"attention": 8, "experts": 6, "router": 2}),
        ("qwen2_moe", ("all", "router"), {"attention": 8, "experts": 6, "mlp": 6, "router": 4}),
        ("deepseek_v3", ("attention", "lm_head"), {"attention": 12, "other": 1}),
        ("mamba", ("attention",), {"attention": 8}),
        ("qwen3_moe", ("down_proj", "self_attn.q_proj"), {"attention": 2, "experts": 2}),
        ("deepseek_v32", ("indexer",), {}),
    ],
)
def test_targets_are_found_by_place(family: str, targets: tuple[str, ...], kinds: dict[str, int]) -> None:
    model = families.build(family)
    if not kinds:
        with pytest.raises(UsageError, match=r'"indexer" is not in the model'):
            attach(model, AdapterSpec(targets=targets))
        assert {p.kind for p in places.find(model) if "indexer" in p.path} == {places.INDEXER}
        return
    adapted = attach(model, AdapterSpec(rank=2, targets=targets))
    assert Counter(adapted.modules.values()) == kinds
    assert f"adapted {sum(kinds.values())} modules (LoRA of rank 2)" in adapted.describe()


def test_what_was_adapted_is_told() -> None:
    adapted = attach(families.build("llama", quantize=True), AdapterSpec("dora", rank=4, rslora=True, layers=1))
    assert set(adapted.modules) == {
        *(f"model.layers.1.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        *(f"model.layers.1.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
    }
    count = sum(value.size for value in adapted.parameters().values())
    assert "DoRA of rank 4, rank-stabilised" in adapted.describe()
    assert "attention (q_proj 1x, k_proj 1x, v_proj 1x, o_proj 1x), mlp (gate_proj 1x" in adapted.describe()
    assert f"{count / 1000:.3g}K parameters (" in adapted.describe()
    assert adapted.nbytes == 4 * count


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (
            AdapterSpec(targets=("experts",)),
            r'"experts" is not in the model\. There is attention: q_proj \(2\), .*mlp:',
        ),
        (AdapterSpec(targets=("attention", "qq_proj"), layers=1), r"\"qq_proj\" is not in the model's last 1 layers"),
        (AdapterSpec(targets=()), "no targets"),
        (AdapterSpec(layers=3), "last 3 layers, and the model has 2"),
        (AdapterSpec(layers=0), "0 layers"),
        (AdapterSpec(rank=0), "rank is 0"),
        (AdapterSpec(scale=float("nan")), "scale is nan"),
        (AdapterSpec(dropout=1.0), r"dropout is 1\.0"),
        (AdapterSpec("magic"), "magic"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_adapted_is_refused(spec: AdapterSpec, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        attach(families.build("llama"), spec)


def test_a_second_adapter_is_refused_and_weights_must_fit() -> None:
    model = families.build("llama")
    adapted = attach(model, LORA)
    with pytest.raises(UsageError, match="has an adapter already"):
        attach(model, LORA)
    weights = adapted.parameters()
    name = "model.layers.0.mlp.up_proj.lora_b"
    with pytest.raises(FormatError, match=rf"{name} is \[1\] where this model needs \[4, 192\]"):
        adapted.assign(weights | {name: mx.zeros(1)})
    with pytest.raises(FormatError, match=f"{name} is missing"):
        adapted.assign({n: w for n, w in weights.items() if n != name})
    with pytest.raises(FormatError, match="x belongs to nothing"):
        adapted.assign(weights | {"x": mx.zeros(1)})
    adapted.detach()
    assert attach(model, LORA).parameters().keys() == weights.keys()


def test_what_is_drawn_depends_on_the_seed_alone() -> None:
    first, second, other = (attach(families.build("llama", seed=s), LORA, seed=n) for s, n in ((0, 7), (1, 7), (0, 8)))
    name = "model.layers.1.mlp.up_proj.lora_a"
    assert mx.array_equal(first.parameters()[name], second.parameters()[name]).item()
    assert not mx.array_equal(first.parameters()[name], other.parameters()[name]).item()
    assert all(value.dtype == mx.float32 for value in first.parameters().values())


def test_the_factor_of_rank_stabilised_lora() -> None:
    """alpha / sqrt(r) in place of alpha / r (arXiv:2312.03732)."""
    spec = AdapterSpec(rank=16, scale=2.0, rslora=True)
    assert spec.factor == 2.0 * 16 / 16**0.5
    assert AdapterSpec(rank=16, scale=2.0).factor == 2.0
    layer = attach(families.build("llama"), spec).layers["model.layers.0.self_attn.q_proj"]
    assert layer.scale == spec.factor


def test_freezing_ends_with_the_adapter() -> None:
    model = families.build("llama")
    before = {name for name, _ in tree_flatten(model.trainable_parameters())}
    adapted = attach(model, LORA)
    assert {name for name, _ in tree_flatten(model.trainable_parameters())} == set(adapted.parameters())
    adapted.detach()
    assert {name for name, _ in tree_flatten(model.trainable_parameters())} == before


def test_dropout_is_for_training_alone() -> None:
    model = families.build("llama")
    adapting.learnt(attach(model, AdapterSpec(rank=4, dropout=0.5)))
    assert _same([model(adapting.IDS)], [model(adapting.IDS)])
    model.train()
    assert not _same([model(adapting.IDS)], [model(adapting.IDS)])
