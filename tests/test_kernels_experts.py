"""Experts as one operation: what mlx-lm's layers compute, in the same bits wherever the weights lie."""

from __future__ import annotations

import copy
import gc
import importlib
import mmap
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")

from mlx_lm.models import activations  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP  # noqa: E402
from mlx_lm.tuner.lora import LoRASwitchLinear  # noqa: E402

from edger1 import kernels  # noqa: E402

if not kernels.state().available or mx.default_device().type != mx.cpu:
    pytest.skip(f"CPU kernels: {kernels.state().reason}", allow_module_level=True)

import families  # noqa: E402

from edger1.kernels import _load, experts  # noqa: E402
from edger1.kernels.experts_fit import Fit, UnfitError, difference  # noqa: E402
from edger1.kernels.install import Installed, install  # noqa: E402

EXTENSION: Any = _load()[0]
HIDDEN, INNER, EXPERTS, RANKS = 128, 96, 6, 3
FORMATS = {
    **{f"{bits} bits": {"bits": bits, "group_size": 32} for bits in (2, 3, 4, 5, 6, 8)},
    "groups of 64": {"bits": 4, "group_size": 64},
    "groups of 128": {"bits": 4, "group_size": 128},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
    "f32": None,
    "bf16": mx.bfloat16,
}


class Clipped(nn.Module):
    """As DeepSeek-V4.1 has it."""

    def __init__(self, limit: float = 2.0, after: bool = False) -> None:
        super().__init__()
        self.limit, self.after = limit, after

    def __call__(self, x: Any, gate: Any) -> Any:
        gate = nn.silu(gate) if self.after else nn.silu(mx.minimum(gate, self.limit))
        return mx.minimum(gate, self.limit) * mx.clip(x, -self.limit, self.limit)


class GeGLU(nn.Module):
    def __init__(self, f: Any) -> None:
        super().__init__()
        self.f = f

    def __call__(self, x: Any, gate: Any) -> Any:
        return self.f(gate) * x


GATED = {
    "swiglu": None,
    "geglu": GeGLU(nn.gelu),
    "geglu_approx": GeGLU(nn.gelu_approx),
    "swiglu_oai": activations.SwigluOAI(1.702, 7.0),
    "swiglu_clipped": Clipped(),
    "swiglu_capped": Clipped(after=True),
}
PLAIN = {
    "gelu": nn.GELU(),
    "gelu_approx": nn.GELU(approx="precise"),
    "silu": nn.SiLU(),
    "relu2": nn.ReLU2(),
    "relu": nn.ReLU(),
}


def switch(activation: Any = None, how: Any = FORMATS["4 bits"], bias: bool = False, inner: int = INNER) -> Any:
    """A random SwitchGLU, or SwitchMLP for an activation without a gate."""
    mx.random.seed(5)
    kind = SwitchMLP if any(activation is a for a in PLAIN.values()) else SwitchGLU
    layer = kind(HIDDEN, inner, EXPERTS, bias=bias, **({} if activation is None else {"activation": activation}))
    if bias:
        for projection in layer.children().values():
            if "bias" in projection:
                projection.bias = mx.random.normal(projection.bias.shape)
    if isinstance(how, dict):
        nn.quantize(layer, **how)
    elif how is not None:
        layer.set_dtype(how)
    mx.eval(layer.parameters())
    return layer


def plain(layer: Any, x: Any, indices: Any) -> Any:
    """What each expert gives, in float64, from the weights as they are."""

    def values(linear: Any) -> Any:
        w = linear["weight"]
        if "scales" in linear:
            parts = [
                a if a is None or a.dtype == mx.uint8 else a.astype(mx.float32)
                for a in map(linear.get, ("scales", "biases"))
            ]
            w = mx.dequantize(w, *parts, linear.group_size, linear.bits, mode=linear.mode)
        bias = linear["bias"] if "bias" in linear else mx.zeros(w.shape[:2])
        return np.array(w.astype(mx.float32)).astype(float), np.array(bias.astype(mx.float32)).astype(float)

    def apply(linear: Any, rows: Any) -> Any:
        w, bias = values(linear)
        chosen = np.array(indices)
        return np.einsum("trnk,trk->trn", w[chosen], rows) + bias[chosen]

    rows = np.repeat(np.array(x).astype(float)[:, None], indices.shape[1], axis=1)
    if isinstance(layer, SwitchGLU):
        up, gate = apply(layer.up_proj, rows), apply(layer.gate_proj, rows)
        hidden, down = layer.activation(mx.array(up, mx.float32), mx.array(gate, mx.float32)), layer.down_proj
    else:
        hidden, down = layer.activation(mx.array(apply(layer.fc1, rows), mx.float32)), layer.fc2
    return apply(down, np.array(hidden).astype(float))


def inputs(rows: int, seed: int = 0) -> tuple[Any, Any, Any]:
    """Rows, different experts for each, weights."""
    rng = np.random.default_rng(seed)
    x = mx.array(rng.standard_normal((rows, HIDDEN)).astype(np.float32))
    indices = np.stack([rng.permutation(EXPERTS)[:RANKS] for _ in range(rows)]).astype(np.uint32)
    weights = mx.array(rng.random((rows, RANKS)).astype(np.float32))
    return x, mx.array(indices), weights


def operation(layer: Any, precision: str = "exact") -> Any:
    if precision == "exact":
        return Fit(precision, EXTENSION).experts(layer)
    # A layer that the kernels are not installed in is no measure for int8 activations.
    call = Fit(precision, EXTENSION).start(layer, "swiglu")
    call.finish()
    return call


def same_bits(a: Any, b: Any) -> bool:
    return bool(mx.array_equal(a.view(mx.uint32), b.view(mx.uint32)).item())


@pytest.mark.parametrize("rows", [1, 5, 16, 70])
@pytest.mark.parametrize("how", FORMATS)
def test_experts_give_what_their_weights_say(how: str, rows: int) -> None:
    layer = switch(how=FORMATS[how], inner=128)
    x, indices, weights = inputs(rows)
    call = operation(layer)
    expected = plain(layer, x, indices)
    assert difference(call(x, indices), mx.array(expected, mx.float32)) <= 1e-5
    summed = (expected * np.array(weights)[..., None]).sum(1)
    assert difference(call(x, indices, weights), mx.array(summed, mx.float32)) <= 1e-5


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", [*GATED, *PLAIN])
def test_every_activation_is_found_and_computed(name: str, bias: bool, rows: int) -> None:
    layer = switch({**GATED, **PLAIN}[name], FORMATS["f32"], bias)
    x, indices, _ = inputs(rows)
    expected = mx.array(plain(layer, x * 30, indices), mx.float32)
    assert difference(operation(layer)(x * 30, indices), expected) <= 1e-5


def test_an_activation_that_is_not_known_is_left_alone() -> None:
    with pytest.raises(UnfitError, match="computes something else"):
        operation(switch(GeGLU(mx.tanh)))


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("how", ["4 bits", "3 bits", "mxfp4", "f32", "bf16"])
def test_a_row_among_sixteen_is_the_row_alone(how: str, precision: str) -> None:
    call = operation(switch(how=FORMATS[how], bias=True), precision)
    x, indices, weights = inputs(16)
    together = call(x, indices, weights)
    mx.eval(together)
    threads = EXTENSION.threads()
    try:
        for n in (1, 2, 3):
            EXTENSION.set_threads(n)
            assert same_bits(call(x, indices, weights), together)
            alone = [call(x[i : i + 1], indices[i : i + 1], weights[i : i + 1]) for i in range(16)]
            assert same_bits(mx.concatenate(alone), together)
    finally:
        EXTENSION.set_threads(threads)


@pytest.mark.parametrize("rows", [3, 60])
def test_ranks_are_summed_in_their_order(rows: int) -> None:
    # Whoever computes ranks apart, as their weights arrive, gets the same bits by adding in order.
    call = operation(switch())
    x, indices, weights = inputs(rows)
    ranks, summed = call(x, indices), call(x, indices, weights)
    by_hand = ranks[:, 0] * weights[:, :1]
    for r in range(1, RANKS):
        by_hand = by_hand + ranks[:, r] * weights[:, r : r + 1]
    assert same_bits(by_hand, summed)


def test_a_large_block_of_columns_is_the_sum_of_small_ones() -> None:
    # More pairs than one block of temporary columns holds.
    layer = SwitchGLU(32, 4096, 2)
    nn.quantize(layer, group_size=32, bits=4)
    call = operation(layer)
    x = mx.random.normal((1500, 32))
    indices = mx.zeros((1500, 2), mx.uint32) + mx.array([0, 1], mx.uint32)
    weights = mx.random.uniform(shape=(1500, 2))
    few = mx.concatenate([call(x[i : i + 8], indices[:8], weights[i : i + 8]) for i in range(0, 1500, 8)][:-1])
    assert difference(call(x, indices, weights)[: few.shape[0]], few) <= 1e-5


def test_slots_of_a_bank_are_experts_and_may_be_overwritten() -> None:
    layer, bank = switch(), switch()
    order = [4, 2, 0, 5, 1, 3]
    for ours, theirs in zip(bank.children().values(), layer.children().values(), strict=True):
        for key in ("weight", "scales", "biases"):
            if key in ours:
                ours[key] = mx.zeros_like(theirs[key])
    mx.eval(bank.parameters())
    call = Fit("exact", EXTENSION).start(bank, "swiglu")
    call.finish()
    for ours, theirs in zip(bank.children().values(), layer.children().values(), strict=True):
        for key in ("weight", "scales", "biases"):
            if key in ours:
                np.array(ours[key], copy=False)[:] = np.array(theirs[key])[order]
    x, indices, weights = inputs(4)
    slots = mx.array(np.argsort(order).astype(np.uint32))[indices]
    assert same_bits(call(x, slots, weights), operation(layer)(x, indices, weights))


@pytest.mark.parametrize("how", ["4 bits", "mxfp4", "f32", "bf16"])
def test_experts_in_a_mapped_file_give_the_same_bits(how: str, tmp_path: Path) -> None:
    layer = switch(how=FORMATS[how])
    path = tmp_path / "experts"
    places: dict[tuple[str, str, int], tuple[int, int]] = {}
    with path.open("wb") as file:
        for name in ("gate", "up", "down"):
            for key, a in layer[f"{name}_proj"].items():
                if not isinstance(a, mx.array):
                    continue
                rows = np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a)
                for e in reversed(range(EXPERTS)):
                    places[name, key, e] = (file.tell(), rows[e].nbytes)
                    file.write(rows[e].tobytes() + b"\0" * 8)
    with path.open("rb") as file:
        view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def slices(name: str, key: str) -> list[memoryview]:
        found = [places.get((name, key, e)) for e in range(EXPERTS)]
        return [view[place[0] : sum(place)] for place in found if place]

    call = EXTENSION.Experts()
    for name in ("gate", "up", "down"):
        linear = layer[f"{name}_proj"]
        quantized = "scales" in linear
        n, k = (INNER, HIDDEN) if name != "down" else (HIDDEN, INNER)
        options = {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode} if quantized else {}
        dtype = mx.float32 if quantized else linear["weight"].dtype
        call.project_mapped(
            name, n, k, dtype, slices(name, "weight"), slices(name, "scales"), slices(name, "biases"), **options
        )
    call.finish()
    for rows in (3, 60):
        x, indices, weights = inputs(rows)
        assert same_bits(call(x, indices, weights), operation(layer)(x, indices, weights))


def test_what_does_not_fit_is_refused_before_memory_is_touched() -> None:
    layer = switch()
    up = layer.up_proj
    call = EXTENSION.Experts()
    with pytest.raises(ValueError, match='activation is "cubist"'):
        EXTENSION.Experts(activation="cubist")
    with pytest.raises(ValueError, match="expected experts, rows and columns"):
        call.project("up", up["weight"][0], up["scales"][0], up["biases"][0], group_size=32)
    with pytest.raises(ValueError, match="do not fit codes"):
        call.project("up", up["weight"], up["scales"][:, :-1], up["biases"], group_size=32)
    with pytest.raises(ValueError, match="not one of the kernels'"):
        call.project("up", up["weight"], up["scales"], up["biases"], group_size=16)
    with pytest.raises(ValueError, match="were given for 2 experts; expected 3"):
        call.project_mapped("up", 4, 32, mx.float32, [b"\0" * 64] * 3, [b""] * 2, group_size=32, bits=4)
    with pytest.raises(ValueError, match="have 127 bytes"):
        call.project_mapped("up", 4, 8, mx.float32, [b"\0" * 127])
    call.project("up", up["weight"], up["scales"], up["biases"], group_size=32)
    with pytest.raises(ValueError, match="takes gate and up; got no gate"):
        call.finish()
    call.project("router", mx.zeros((EXPERTS, HIDDEN)))
    with pytest.raises(ValueError, match="chooses 7 of 6 experts"):
        call.router(ranks=7)


def test_what_does_not_apply_is_no_operation() -> None:
    call = operation(switch())
    x, indices, weights = inputs(2)
    assert call(x.astype(mx.bfloat16), indices) is None
    assert call(x[:, :64], indices) is None
    assert call(x, indices[:1]) is None
    assert call(x, indices.astype(mx.float32)) is None
    assert call(x, indices, weights[:, :2]) is None
    assert call.layer(x) is None
    assert call.route(x) is None


def test_an_index_beyond_the_experts_is_an_error() -> None:
    call = operation(switch())
    x, indices, _ = inputs(2)
    with pytest.raises(RuntimeError, match="index 99 where there are 6 experts"):
        mx.eval(call(x, mx.full(indices.shape, 99, mx.uint32)))
    with pytest.raises(RuntimeError, match="where there are 6 experts"):
        mx.eval(call(x, mx.full(indices.shape, -1, mx.int32)))


def test_strided_inputs_are_read_where_they_lie() -> None:
    call = operation(switch())
    x, indices, weights = inputs(8)
    expected = call(x[::2], mx.contiguous(indices[::2, ::-1]), mx.contiguous(weights[::2, ::-1]))
    turned = mx.contiguous(x.T).T
    assert same_bits(call(turned[::2], indices[::2, ::-1].astype(mx.int32), weights[::2, ::-1, None]), expected)


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
