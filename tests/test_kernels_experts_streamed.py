"""The operation over a bank is found without running the module, and is that of the module whose experts are there."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")

from mlx_lm.models.qwen2_moe import Qwen2MoeSparseMoeBlock  # noqa: E402
from mlx_lm.models.qwen3_moe import Qwen3MoeSparseMoeBlock  # noqa: E402

from edger1 import kernels  # noqa: E402

if not kernels.state().available or mx.default_device().type != mx.cpu:
    pytest.skip(f"CPU kernels: {kernels.state().reason}", allow_module_level=True)

import families  # noqa: E402
from switches import EXPERTS, EXTENSION, HIDDEN, INNER, RANKS, GeGLU, same_bits, switch  # noqa: E402

from edger1.kernels.experts_fit import PROJECTIONS, Fit, UnfitError, difference, projections  # noqa: E402
from edger1.kernels.experts_streamed import StreamedOperation, streamed  # noqa: E402
from edger1.kernels.install import install  # noqa: E402

WHOLE = (
    "qwen3_moe", "olmoe", "mixtral", "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe", "qwen2_moe", "ernie4_5_moe",
    "lfm2_moe", "minimax", "glm4_moe",
)  # fmt: skip
PARTLY = ("llama4", "Klear", "phimoe", "longcat_flash", "gemma4_text", "deepseek_v41", "minimax_m3_vl")


def places(model: Any) -> Iterator[tuple[Any, Any]]:
    """Each module that holds a switch layer, and that layer."""
    for owner in model.modules():
        for child in owner.children().values():
            if isinstance(child, tuple(PROJECTIONS)):
                yield owner, child


def keep_slots(layer: Any, slots: int) -> None:
    """Leave a bank of the first experts in place of all, their bytes overwritten."""
    for name in projections(layer).values():
        linear = layer[name]
        for key in ("weight", "scales", "biases", "bias"):
            if key in linear:
                linear[key] = mx.contiguous(linear[key][:slots]) * 0
                mx.eval(linear[key])


def width(layer: Any) -> int:
    return int(layer[next(iter(projections(layer).values()))].input_dims)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("family", [*WHOLE, *PARTLY])
def test_it_is_the_operation_of_the_module_whose_experts_are_there(family: str, precision: str) -> None:
    model = families.build(family, quantize=True)
    fused = install(model, precision)
    resident = {id(owner): vars(owner)["_layer"].call for owner, _ in places(model) if "_layer" in vars(owner)}
    alone = {id(layer): vars(layer)["_experts"] for _, layer in places(model)}
    whole = bool(fused.experts.layers)
    fused.uninstall()
    state = install(model, precision, fuse=False)
    try:
        fit = Fit(precision, EXTENSION)
        for owner, layer in places(model):
            held, experts = alone[id(layer)], layer[next(iter(projections(layer).values()))].num_experts
            found = streamed(owner, layer, fit)
            assert found.stands(owner, layer)
            assert found.has_router == whole
            assert found.takes_ranks == held.ranked
            x = mx.random.normal((1, 40, width(layer)), key=mx.random.key(4))
            indices = mx.random.randint(0, experts, (1, 40, 2), key=mx.random.key(5))
            assert same_bits(found.ranks(x, indices), held.call(x, indices))
            if whole:
                for rows in (1, 16):
                    some = x[:, :rows]
                    chosen, shares = found.route(some)
                    assert same_bits(found.given(some, chosen, shares), resident[id(owner)].layer(some))
                    # Rank by rank, as where experts take turns in a few slots.
                    ranks = [found.ranks(some, chosen[..., i : i + 1]) for i in range(chosen.shape[-1])]
                    summed = found.summed(some, mx.concatenate(ranks, axis=-2), shares)
                    assert same_bits(summed, resident[id(owner)].layer(some))
                # More rows pass the shared expert, if there is one, outside of the operation.
                assert difference(found.given(x, *found.route(x))[0], owner(x)[0]) <= 1e-4
            keep_slots(layer, 1)
            bank = streamed(owner, layer, fit, experts=experts)
            assert (bank.slots, bank.has_router, bank.takes_ranks) == (1, whole, held.ranked)
            if whole:
                assert all(same_bits(a, b) for a, b in zip(bank.route(x), found.route(x), strict=True))
            assert not found.stands(owner, layer)
            assert bank.stands(owner, layer)
    finally:
        state.uninstall()


def block(kind: Any = Qwen2MoeSparseMoeBlock, **overrides: Any) -> Any:
    arguments = {
        "hidden_size": HIDDEN, "moe_intermediate_size": INNER, "shared_expert_intermediate_size": INNER,
        "num_experts": EXPERTS, "num_experts_per_tok": RANKS, "norm_topk_prob": True,
    }  # fmt: skip
    mx.random.seed(1)
    made = kind(SimpleNamespace(**(arguments | overrides)))
    made.gate.weight = mx.random.normal((EXPERTS, HIDDEN)) * 0.3
    mx.eval(made.parameters())
    return made


def test_what_else_a_module_does_shows_without_its_experts() -> None:
    class Halved(Qwen2MoeSparseMoeBlock):
        """The shared expert counts half: small beside the experts, and not what the operation computes."""

        def __call__(self, x: Any) -> Any:
            return super().__call__(x) - 0.5 * mx.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)

    class Residual(Qwen3MoeSparseMoeBlock):
        def __call__(self, x: Any) -> Any:
            return super().__call__(x) + 1e-3 * x

    fit = Fit("exact", EXTENSION)
    owner = block()
    assert streamed(owner, owner.switch_mlp, fit).has_router
    for kind in (Halved, Residual):
        owner = block(kind)
        found = streamed(owner, owner.switch_mlp, fit)
        assert found.takes_ranks
        assert not found.has_router


def test_a_bank_that_is_never_read_may_hold_anything() -> None:
    owner = block()
    for linear in owner.switch_mlp.children().values():
        if "weight" in linear:
            linear.weight = mx.full(linear.weight.shape, float("nan"))
    found = streamed(owner, owner.switch_mlp, Fit("exact", EXTENSION))
    assert found.has_router
    assert found.stands(owner, owner.switch_mlp)


def test_experts_of_a_map_are_behind_the_slots() -> None:
    owner = block(Qwen3MoeSparseMoeBlock)
    layer, fit = owner.switch_mlp, Fit("exact", EXTENSION)
    mapped = {
        (name, "weight"): [memoryview(np.array(layer[name].weight[e])).cast("B") for e in range(EXPERTS)]
        for name in projections(layer).values()
    }
    x = mx.random.normal((1, 3, HIDDEN))
    resident = streamed(owner, layer, fit)
    indices, weights = resident.route(x)
    expected = resident.given(x, indices, weights)
    mx.eval(expected)
    keep_slots(layer, 2)
    both = streamed(owner, layer, fit, experts=EXPERTS, mapped=mapped)
    assert both.slots == 2
    assert same_bits(both.given(x, indices + both.slots, weights), expected)
    mapped["up_proj", "weight"][1] = mapped["up_proj", "weight"][1][:-4]
    with pytest.raises(ValueError, match="up's codes of expert 1 have"):
        streamed(owner, layer, fit, experts=EXPERTS, mapped=mapped)


def test_what_was_changed_does_not_stand() -> None:
    fit = Fit("exact", EXTENSION)
    owner = block()
    found = streamed(owner, owner.switch_mlp, fit)
    owner.top_k = 1
    assert not found.stands(owner, owner.switch_mlp)
    for change in ("gate", "shared_expert_gate"):
        owner = block()
        found = streamed(owner, owner.switch_mlp, fit)
        assert found.stands(owner, owner.switch_mlp)
        owner[change].weight = owner[change].weight * 2
        assert not found.stands(owner, owner.switch_mlp)


def test_an_activation_that_is_not_known_is_no_operation() -> None:
    class Owner(nn.Module):
        def __init__(self, activation: Any) -> None:
            super().__init__()
            self.experts = switch(activation)

    class Wide(nn.Module):
        def __call__(self, x: Any, gate: Any) -> Any:
            return nn.silu(gate) * x * mx.ones((INNER,))

    for activation, reason in ((GeGLU(mx.tanh), "computes something else"), (Wide(), "not to be tried out apart")):
        owner = Owner(activation)
        with pytest.raises(UnfitError, match=reason):
            streamed(owner, owner.experts, Fit("exact", EXTENSION))


def test_an_operation_does_not_keep_its_module() -> None:
    owner = block()
    found: StreamedOperation | None = streamed(owner, owner.switch_mlp, Fit("exact", EXTENSION))
    # Whoever holds a bank hangs it to either.
    object.__setattr__(owner.switch_mlp, "bank", found)
    object.__setattr__(owner, "bank", found)
    left = weakref.ref(owner), weakref.ref(owner.switch_mlp), weakref.ref(owner.switch_mlp.up_proj)
    del owner, found
    gc.collect()
    assert [reference() for reference in left] == [None] * 3
