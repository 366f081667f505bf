"""Models on the kernels against the same models on MLX's own operations, and that nothing stays behind."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from edger1 import kernels, mlx_runtime

mlx_runtime.prepare()

from mlx.utils import tree_map  # noqa: E402
from mlx_lm.models import activations, llama  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from mlx_lm.tuner.utils import linear_to_lora_layers  # noqa: E402

from edger1.kernels.install import install  # noqa: E402
from edger1.kernels.selftest import selftest  # noqa: E402

pytestmark = pytest.mark.skipif(not kernels.state().available, reason="the kernels are not built")

LIMIT = 1e-5
PROMPT = [3, 17, 99, 50, 42, 7, 80, 61, 3, 88, 20, 5]
SHARED = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": 101,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
    "phi3": {"rope_traditional": True},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, "intermediate_size": 64},
    "deepseek_v2": {
        "moe_intermediate_size": 64,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "kv_lora_rank": 32,
        "q_lora_rank": None,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16},
    },
}


def build(family: str, quantized: bool) -> nn.Module:
    module = importlib.import_module(f"mlx_lm.models.{family}")
    mx.random.seed(0)
    arguments = module.ModelArgs.from_dict({"model_type": family, **SHARED, **FAMILIES[family]})
    model: nn.Module = module.Model(arguments)
    model.eval()
    if quantized:
        nn.quantize(model, 32, 4)
    mx.eval(model.parameters())
    return model


def logits(model: nn.Module, prompt: list[int] = PROMPT) -> np.ndarray:
    """Of a prompt, and of two tokens decoded after it."""
    cache = make_prompt_cache(model)
    pieces = [model(mx.array([part]), cache=cache) for part in (prompt, [11], [77])]
    return np.concatenate([np.array(piece[0]) for piece in pieces])


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-6))


@pytest.mark.parametrize("quantized", [False, True], ids=["f32", "4bit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_on_the_kernels_computes_what_it_did(family: str, quantized: bool) -> None:
    long_prompt = [(37 * i + 11) % 100 for i in range(40)]
    model = build(family, quantized)
    plain, plain_long = logits(model), logits(model, long_prompt)
    installed = install(model, "exact")
    try:
        assert installed.active
        assert ("QuantizedLinear" in installed.layers) == quantized
        ours, ours_long = logits(model), logits(model, long_prompt)
    finally:
        installed.uninstall()
    assert not np.array_equal(ours_long, plain_long)
    assert difference(ours, plain) <= LIMIT
    assert difference(ours_long, plain_long) <= LIMIT


def test_uninstalling_leaves_nothing_behind() -> None:
    names = ("matmul", "addmm", "softmax", "quantized_matmul", "gather_qmm", "exp")
    before = [getattr(mx, name) for name in names] + [mx.fast.rms_norm, nn.silu, activations.swiglu, llama.swiglu]
    operator = mx.array.__matmul__
    model = build("llama", True)
    classes, plain = [type(layer) for layer in model.modules()], logits(model)
    installed = install(model, "fast")
    assert mx.fast.rms_norm is not before[len(names)]
    assert llama.swiglu is not before[-1]
    assert installed.layers == {"QuantizedLinear": 14, "QuantizedEmbedding": 1}
    installed.uninstall()
    installed.uninstall()
    after = [getattr(mx, name) for name in names] + [mx.fast.rms_norm, nn.silu, activations.swiglu, llama.swiglu]
    assert all(a is b for a, b in zip(before, after, strict=True))
    assert mx.array.__matmul__ is operator
    assert [type(layer) for layer in model.modules()] == classes
    assert np.array_equal(logits(model), plain)


def test_two_models_each_keep_their_precision() -> None:
    exact, fast = build("llama", True), build("llama", True)
    plain = logits(exact)
    first, second = install(exact, "exact"), install(fast, "fast")
    try:
        assert difference(logits(exact), plain) <= LIMIT
        assert 1e-4 < difference(logits(fast), plain) < 0.2
        second.uninstall()
        assert difference(logits(exact), plain) <= LIMIT
        assert mx.fast.rms_norm.__module__ != "mlx.core.fast"
    finally:
        second.uninstall()
        first.uninstall()
    assert np.array_equal(logits(exact), plain)


def test_layers_stay_what_mlx_lm_takes_them_for() -> None:
    model = build("llama", True)
    saved = {name: value.shape for name, value in _flat(model.parameters()).items()}
    installed = install(model, "exact")
    try:
        assert all(isinstance(m.self_attn.q_proj, nn.QuantizedLinear) for m in model.layers)
        assert {name: value.shape for name, value in _flat(model.parameters()).items()} == saved
    finally:
        installed.uninstall()


def test_lora_over_quantized_layers_trains_alike() -> None:
    def gradients(precision: str | None) -> dict[str, mx.array]:
        model = build("llama", True)
        model.freeze()
        mx.random.seed(1)
        linear_to_lora_layers(model, 2, {"rank": 4, "scale": 2.0, "dropout": 0.0})
        for layer in model.layers:
            layer.self_attn.q_proj.lora_b = mx.random.normal(layer.self_attn.q_proj.lora_b.shape)
        installed = install(model, precision) if precision else None
        try:
            tokens = mx.array([[(i * j) % 100 for i in range(1, 30)] for j in (3, 7)])

            def loss(model: nn.Module) -> mx.array:
                return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).mean()

            value, found = nn.value_and_grad(model, loss)(model)
            mx.eval(value, found)
            return {"loss": value, **_flat(found)}
        finally:
            if installed:
                installed.uninstall()

    plain, ours = gradients(None), gradients("exact")
    assert len(plain) > 8
    assert plain.keys() == ours.keys()
    for name, value in plain.items():
        assert difference(np.array(ours[name]), np.array(value)) <= 1e-4, name


@pytest.mark.parametrize("wide", [True, False], ids=["f32 activations", "bf16 activations"])
def test_an_unquantized_moe_in_bf16_runs(wide: bool) -> None:
    model = build("deepseek_v2", False)
    model.set_dtype(mx.bfloat16)
    reference = build("deepseek_v2", False)
    reference.update(tree_map(lambda x: x.astype(mx.float32), model.parameters()))
    plain = logits(reference)
    installed = install(model, "exact", float32_activations=wide)
    try:
        found = model(mx.array([PROMPT]), cache=make_prompt_cache(model))
        assert found.dtype == (mx.float32 if wide else mx.bfloat16)
        assert difference(np.array(found[0].astype(mx.float32)), plain[: len(PROMPT)]) <= (LIMIT if wide else 0.1)
    finally:
        installed.uninstall()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_scales_may_stay_in_16_bits(dtype: mx.Dtype) -> None:
    model, wide = build("llama", True), build("llama", True)
    model.set_dtype(dtype)
    wide.update(tree_map(lambda x: x if x.dtype == mx.uint32 else x.astype(mx.float32), model.parameters()))
    plain = logits(wide)
    installed = install(model, "exact")
    try:
        assert difference(logits(model), plain) <= LIMIT
        assert model.layers[0].self_attn.q_proj.scales.dtype == dtype
    finally:
        installed.uninstall()


def test_a_quantized_kv_cache_works() -> None:
    from mlx_lm.models.cache import QuantizedKVCache

    module = importlib.import_module("mlx_lm.models.llama")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict({"model_type": "llama", **SHARED, "head_dim": 32}))

    def run() -> np.ndarray:
        cache = [QuantizedKVCache(32, 8) for _ in model.layers]
        return np.concatenate([np.array(model(mx.array([part]), cache=cache)[0]) for part in (PROMPT, [11], [77])])

    plain = run()
    installed = install(model, "exact")
    try:
        assert difference(run(), plain) <= 1e-3
    finally:
        installed.uninstall()


def test_a_wrong_precision_is_named() -> None:
    with pytest.raises(ValueError, match='"half"; expected "exact" or "fast"'):
        install(build("llama", False), "half")  # type: ignore[arg-type]


def test_what_fails_half_way_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("half way")

    original, model = mx.fast.rms_norm, build("llama", True)
    monkeypatch.setattr("edger1.kernels.install._swap_held_functions", fail)
    with pytest.raises(RuntimeError, match="half way"):
        install(model, "exact")
    assert mx.fast.rms_norm is original
    assert all(not type(layer).__name__.startswith("Kernel") for layer in model.modules())


def test_the_self_test_refuses_while_functions_are_replaced() -> None:
    installed = install(build("llama", False), "exact")
    try:
        with pytest.raises(RuntimeError, match="before a model is loaded"):
            selftest(quick=True)
    finally:
        installed.uninstall()


def test_switched_off_nothing_is_touched() -> None:
    program = """
import mlx.core as mx
from edger1 import mlx_runtime
mlx_runtime.prepare()
import mlx.nn as nn
before = mx.fast.rms_norm, nn.silu, mx.matmul
from edger1.kernels.install import install
installed = install(nn.Linear(4, 4), "fast")
assert before == (mx.fast.rms_norm, nn.silu, mx.matmul)
print(installed.active, installed.reason)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "EDGER1_KERNELS": "0"},
    )
    assert done.stdout.strip() == "False EdgeR1's kernels are switched off by EDGER1_KERNELS=0"


def _flat(tree: Any) -> dict[str, mx.array]:
    from mlx.utils import tree_flatten

    return dict(tree_flatten(tree))


@pytest.mark.parametrize("snapshot", ["none", "slice", "copy"])
def test_a_cache_grows_in_place_while_a_step_is_queued_unless_somebody_else_holds_it(snapshot: str) -> None:
    import copy

    from mlx_lm.models.cache import KVCache

    installed = install(nn.Linear(2, 2), "exact")
    try:
        cache, token = KVCache(), mx.ones((1, 2, 1, 32))
        mx.eval(cache.update_and_fetch(mx.zeros((1, 2, 700, 32)), mx.zeros((1, 2, 700, 32))))
        mx.eval(cache.keys, cache.values)
        held = {"none": lambda: None, "slice": lambda: cache.keys[..., :700, :], "copy": lambda: copy.deepcopy(cache)}
        kept = held[snapshot]()
        if snapshot == "slice":
            mx.eval(kept)
        # Something long enough that the steps below are queued behind it, not run.
        busy = mx.random.normal((600, 600))
        for _ in range(8):
            busy = mx.matmul(mx.softmax(busy, 0), busy)
        mx.async_eval(busy)
        address = _address(cache.keys) if snapshot == "none" else None
        outputs = []
        for step in range(3):
            keys, values = cache.update_and_fetch(token * (step + 1), token)
            outputs.append(mx.fast.scaled_dot_product_attention(token, keys, values, scale=1.0))
            mx.async_eval(outputs[-1])
            del keys, values
        mx.eval(outputs)
        assert mx.array_equal(cache.keys[0, 0, 700:703, 0], mx.array([1.0, 2.0, 3.0]))
        if snapshot == "none":
            assert _address(cache.keys) == address
        if snapshot == "slice":
            assert (kept == 0).all()
        if snapshot == "copy":
            assert (kept.keys[..., 700:, :] == 0).all()
            kept.update_and_fetch(token * 9, token)
            assert mx.array_equal(cache.keys[0, 0, 700:703, 0], mx.array([1.0, 2.0, 3.0]))
    finally:
        installed.uninstall()


def _address(a: mx.array) -> int:
    return int(np.array(a, copy=False).__array_interface__["data"][0])
