"""Models whose experts run as one operation: the families, routers, adapters, gradients and copies."""

from __future__ import annotations

import copy
import gc
import importlib
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")

from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP  # noqa: E402
from mlx_lm.tuner.lora import LoRASwitchLinear  # noqa: E402

from edger1 import kernels  # noqa: E402

if not kernels.state().available or mx.default_device().type != mx.cpu:
    pytest.skip(f"CPU kernels: {kernels.state().reason}", allow_module_level=True)

import families  # noqa: E402
from switches import (  # noqa: E402
    EXPERTS,
    EXTENSION,
    HIDDEN,
    INNER,
    RANKS,
    same_bits,
    switch,
)

from edger1.kernels import experts  # noqa: E402
from edger1.kernels.experts_fit import difference  # noqa: E402
from edger1.kernels.install import Installed, install  # noqa: E402


@contextmanager
def installed(model: Any, precision: str = "exact", *, fuse: bool = True) -> Iterator[Installed]:
    state = install(model, precision, fuse=fuse)
    try:
        yield state
    finally:
        state.uninstall()


WHOLE = (
    "qwen3_moe", "olmoe", "mixtral", "deepseek_v2", "deepseek_v3", "gpt_oss", "granitemoe", "qwen2_moe", "ernie4_5_moe",
    "lfm2_moe", "minimax", "glm4_moe",
)  # fmt: skip
PARTLY = ("llama4", "Klear", "nemotron_h", "phimoe", "longcat_flash", "gemma4_text", "deepseek_v41", "minimax_m3_vl")


@pytest.mark.parametrize("quantize", [False, True], ids=["f32", "4bit"])
@pytest.mark.parametrize("family", [*WHOLE, *PARTLY])
def test_families_run_their_experts_as_one_operation(family: str, quantize: bool) -> None:
    model = families.build(family, quantize=quantize)
    with installed(model, fuse=False) as state:
        expected = families.logits(model)
        assert state.experts.count == 0
    with installed(model) as state:
        got = families.logits(model)
        assert state.experts.count > 0
        assert not state.experts.others, state.experts.describe()
        assert bool(state.experts.layers) == (family in WHOLE), state.experts.describe()
        classes = {type(m) for m in model.modules()}
    for ours, theirs in zip(got, expected, strict=True):
        assert families.relative_error(ours, theirs) <= 1e-5
    assert classes.isdisjoint(type(m) for m in model.modules() if isinstance(m, SwitchGLU | SwitchMLP))


def moe(family: str = "qwen3_moe", **overrides: Any) -> Any:
    """One layer with experts, and its router's matrix such that it prefers some."""
    module = importlib.import_module(f"mlx_lm.models.{family}")
    arguments = {
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INNER,
        "num_experts": EXPERTS,
        "num_experts_per_tok": RANKS,
        "norm_topk_prob": True,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": None,
        "routed_scaling_factor": 2.5,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        **overrides,
    }
    mx.random.seed(1)
    layer = getattr(module, {"qwen3_moe": "Qwen3MoeSparseMoeBlock", "deepseek_v3": "DeepseekV3MoE"}[family])(
        SimpleNamespace(**arguments)
    )
    layer.gate.weight = mx.random.normal((arguments["num_experts"], HIDDEN)) * 0.3
    if family == "deepseek_v3":
        layer.gate.weight = mx.random.normal((arguments["n_routed_experts"], HIDDEN)) * 0.3
        layer.gate.e_score_correction_bias = mx.random.normal((arguments["n_routed_experts"],))
    holder = nn.Module()
    holder.mlp = layer
    nn.quantize(holder, group_size=32, bits=4, class_predicate=lambda path, _: path.endswith("_proj"))
    mx.eval(holder.parameters())
    return holder


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("kept", [1, 2, 4])
def test_groups_and_a_correction_choose_as_deepseek_does(kept: int, precision: str) -> None:
    holder = moe(
        "deepseek_v3", n_routed_experts=16, n_group=4, topk_group=kept, num_experts_per_tok=4, n_shared_experts=1
    )
    x = mx.random.normal((1, 16, HIDDEN), key=mx.random.key(9))
    with installed(holder, precision, fuse=False):
        expected = holder.mlp(x)
        mx.eval(expected)
    with installed(holder, precision) as state:
        assert state.experts.layers == {"DeepseekV3MoE": 1}
        got = holder.mlp(x)
        alone = mx.concatenate([holder.mlp(x[:, i : i + 1]) for i in range(16)], axis=1)
        assert same_bits(got, alone)
        many = mx.concatenate([x] * 3, axis=1)
        assert difference(holder.mlp(many)[:, :16], got) <= (1e-5 if precision == "exact" else 0.05)
    assert difference(got[0], expected[0]) <= 1e-5


def test_the_router_prefers_the_first_of_equals_and_survives_what_is_no_number() -> None:
    holder = moe()
    call = EXTENSION.Experts()
    for name in ("gate", "up", "down"):
        linear = holder.mlp.switch_mlp[f"{name}_proj"]
        call.project(name, linear["weight"], linear["scales"], linear["biases"], group_size=32)
    call.project("router", mx.zeros((EXPERTS, HIDDEN)))
    call.router(ranks=RANKS, score="sigmoid")
    call.finish()
    x = mx.random.normal((1, HIDDEN))
    indices, weights = call.route(x)
    assert indices.tolist() == [[0, 1, 2]]
    assert weights.tolist() == [[0.5] * RANKS]
    indices, _ = call.route(mx.full((1, HIDDEN), float("nan")))
    assert len(set(indices.tolist()[0])) == RANKS
    assert max(indices.tolist()[0]) < EXPERTS


def test_new_weights_an_adapter_or_a_copy_are_what_runs() -> None:
    holder = moe()
    x = mx.random.normal((1, 4, HIDDEN), key=mx.random.key(3))
    with installed(holder):
        before = holder.mlp(x)
        twin = copy.deepcopy(holder)
        assert twin.mlp._layer is None
        assert difference(twin.mlp(x)[0], before[0]) <= 1e-5
        holder.mlp.gate.weight = -holder.mlp.gate.weight
        changed = holder.mlp(x)
        assert difference(changed[0], before[0]) > 1e-2
        down = holder.mlp.switch_mlp.down_proj
        down.scales, down.biases = down.scales * 2, down.biases * 2
        assert difference(holder.mlp(x)[0], 2 * changed[0]) <= 1e-5
    with installed(holder, fuse=False):
        assert difference(holder.mlp(x)[0], 2 * changed[0]) <= 1e-5


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_fewer_experts_are_fewer(family: str) -> None:
    holder = moe(family)
    x = mx.random.normal((1, 2, HIDDEN), key=mx.random.key(3))
    with installed(holder) as state:
        assert state.experts.layers
        routes = holder.mlp if family == "qwen3_moe" else holder.mlp.gate
        all_of_them = holder.mlp(x)
        routes.top_k = 1
        got = holder.mlp(x)
        assert difference(got[0], all_of_them[0]) > 1e-2
    with installed(holder, fuse=False):
        assert difference(holder.mlp(x)[0], got[0]) <= 1e-5


def test_lora_over_experts_learns_as_without_the_operation() -> None:
    holder = moe()
    x = mx.random.normal((1, 5, HIDDEN), key=mx.random.key(3))

    def gradients(fuse: bool) -> dict[str, Any]:
        mx.random.seed(2)
        with installed(holder, fuse=fuse) as state:
            assert state.experts.count == (1 if fuse else 0)
            plain_up = holder.mlp.switch_mlp.up_proj
            adapter = LoRASwitchLinear.from_base(plain_up, r=4)
            adapter.lora_b = mx.random.normal(adapter.lora_b.shape)
            holder.mlp.switch_mlp.up_proj = adapter
            holder.freeze()
            adapter.unfreeze(keys=["lora_a", "lora_b"])
            holder.mlp.gate.unfreeze()
            _, found = nn.value_and_grad(holder, lambda x: (holder.mlp(x) ** 2).sum())(x)
            mx.eval(found)
            holder.mlp.switch_mlp.up_proj = plain_up
            grads = found["mlp"]["switch_mlp"]["up_proj"]
            return {"a": grads["lora_a"], "b": grads["lora_b"], "gate": found["mlp"]["gate"]["weight"]}

    expected, got = gradients(False), gradients(True)
    for name, g in expected.items():
        assert mx.abs(g).max().item() > 0
        assert mx.allclose(got[name], g, rtol=1e-5, atol=1e-6).item()


def test_gradients_pass_through_x_and_the_routing_weights() -> None:
    holder = moe()
    x = mx.random.normal((1, 5, HIDDEN), key=mx.random.key(3))

    def loss(x: Any) -> Any:
        return (holder.mlp(x) ** 2).sum()

    with installed(holder, fuse=False):
        expected = mx.grad(loss)(x)
        mx.eval(expected)
    with installed(holder):
        assert mx.allclose(mx.grad(loss)(x), expected, rtol=1e-5, atol=1e-6).item()


@pytest.mark.parametrize("family", ["gemma4_text", "deepseek_v41"])
def test_a_module_that_is_given_the_routing_sums_in_the_operation(family: str) -> None:
    model = families.build(family, quantize=True)
    with installed(model):
        owner = next(m for m in model.modules() if "_layer" in vars(m))
        hidden = owner.children()[next(iter(owner.children()))].children()["up_proj"].input_dims
        x, indices = mx.random.normal((3, hidden)), mx.array([[0, 1], [1, 0], [0, 1]], mx.uint32)
        weights = mx.random.uniform(shape=(3, 2))
        got = owner(x, indices, weights)
        assert same_bits(got, owner._layer.call(x, indices, weights))
        assert difference(got, type(owner).__mro__[1].__call__(owner, x, indices, weights)) <= 1e-5


def test_a_model_with_fused_experts_is_freed() -> None:
    holder = moe()
    left = weakref.ref(holder.mlp), weakref.ref(holder.mlp.switch_mlp)
    fused = experts.install(holder, "exact", EXTENSION)
    assert fused.layers
    mx.eval(holder.mlp(mx.random.normal((1, 1, HIDDEN))))
    del holder, fused
    gc.collect()
    assert [reference() for reference in left] == [None, None]


def test_a_module_that_takes_the_result_for_an_array_gets_one() -> None:
    class Odd(nn.Module):
        """Weights after the sum, a norm in between: nothing that the operation knows."""

        def __init__(self) -> None:
            super().__init__()
            self.switch_mlp = switch()

        def __call__(self, x: Any) -> Any:
            indices = mx.zeros((*x.shape[:-1], 2), mx.uint32) + mx.array([1, 3], mx.uint32)
            y = self.switch_mlp(x, indices)
            y = mx.fast.rms_norm(y, None, 1e-5) + 0.5 * y - y / 3
            return mx.max(y, axis=-2) + mx.concatenate([y, y], axis=-2).sum(axis=-2)

    odd = Odd()
    x = mx.random.normal((1, 4, HIDDEN))
    with installed(odd, fuse=False):
        expected = odd(x)
        mx.eval(expected)
    with installed(odd) as state:
        assert state.experts.experts == {"Odd": 1}
        assert difference(odd(x)[0], expected[0]) <= 1e-5


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_greedy_tokens_are_those_of_single_operations(precision: str) -> None:
    model = families.build("qwen3_moe", quantize=True)

    def greedy() -> list[int]:
        cache, x, tokens = make_prompt_cache(model), mx.array([families.PROMPT]), []
        for _ in range(60):
            tokens.append(int(mx.argmax(model(x, cache=cache)[:, -1], -1).item()))
            x = mx.array([tokens[-1:]])
        return tokens

    with installed(model, precision, fuse=False):
        expected = greedy()
    with installed(model, precision) as state:
        assert state.experts.layers
        assert greedy() == expected
