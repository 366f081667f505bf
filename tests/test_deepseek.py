"""DeepSeek-V3 as published, loaded as a user would, against its papers in NumPy; with the kernels and without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy_deepseek as reference
import pytest

mx = pytest.importorskip("mlx.core")

from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from weight_folders import file_bytes  # noqa: E402

import edger1  # noqa: E402
from edger1 import kernels, loader  # noqa: E402
from edger1.experts.figures import MISSES  # noqa: E402
from edger1.quant.converting import convert  # noqa: E402
from edger1.quant.opening import open_source  # noqa: E402
from edger1.quant.recipes import find, uniform  # noqa: E402
from edger1.quant.traced_model import model_of  # noqa: E402

TOLERANCE = 1e-4
"""Relative RMS of logits in f32."""
PREFILL = 50
TOKENS = np.random.default_rng(7).integers(0, 256, PREFILL + sum(range(1, 17))).tolist()
DEVICES = ["kernels", "plain"]


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With the kernels, or as where there are none."""
    if request.param == "plain":
        monkeypatch.setenv("EDGER1_KERNELS", "0")
    elif not kernels.state().available:
        pytest.skip(f"CPU kernels: {kernels.state().reason}")
    kernels._load.cache_clear()
    yield request.param
    monkeypatch.undo()
    kernels._load.cache_clear()


def live_model(folder: Path, expert_slots: str | None = None) -> loader.LiveModel:
    steps = loader.load(
        folder.name, folder, ceiling_bytes=4 << 30, context=512, precision="exact", expert_slots=expert_slots
    )
    while True:
        try:
            next(steps)
        except StopIteration as done:
            loaded: loader.LiveModel = done.value
            return loaded


def in_steps(model: Any) -> np.ndarray:
    """Logits of a prefill, and of one to sixteen tokens at a time after it."""
    caches = make_prompt_cache(model)
    found, first = [], 0
    for count in (PREFILL, *range(1, 17)):
        found.append(model(mx.array([TOKENS[first : first + count]]), cache=caches)[0])
        mx.eval(found[-1], [c.state for c in caches])
        first += count
    return np.concatenate([np.array(each) for each in found])


def error(found: Any, expected: np.ndarray) -> float:
    return float(np.sqrt(np.mean((np.array(found) - expected) ** 2) / np.mean(expected**2)))


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("changed", [{}, {"q_lora_rank": None, "rope_scaling": None}], ids=["q_lora-yarn", "neither"])
def test_logits_are_those_of_the_papers_however_tokens_come(
    changed: dict[str, Any], device: str, tmp_path: Path
) -> None:
    config = reference.CONFIG | changed
    weights = reference.random_weights(config)
    live = live_model(reference.write(tmp_path / "r1", config, weights))
    try:
        assert live.installed.active == (device == "kernels")
        latents = live.installed.latents
        assert (latents.count, latents.plain) == (3, 3 if device == "plain" else 0), latents.describe()
        found = in_steps(live.model)
    finally:
        live.close()
    expected = reference.logits(config, weights, TOKENS)
    assert error(found, expected) <= TOLERANCE
    assert max(error(a, b) for a, b in zip(found, expected, strict=True)) <= 10 * TOLERANCE
    # Experts outside a token's groups would have been chosen, had they only lost their scores.
    assert error(reference.logits(config, weights, TOKENS, outside=0.0), expected) > 100 * TOLERANCE


@pytest.mark.parametrize("layers", [1, 2])
def test_mtp_layers_follow_a_model_of_any_depth_and_the_first_drafts(layers: int, tmp_path: Path) -> None:
    config = reference.CONFIG | {"num_nextn_predict_layers": layers}
    weights = reference.random_weights(config)
    folder = reference.write(tmp_path / "r1", config, weights)
    with edger1.load(folder, precision="exact") as model:
        assert model.info["drafts"]["mtp"]
        plain = model.generate("abcabc", raw=True, temperature=0, max_tokens=12, speculate="off")
        drafted = model.generate("abcabc", raw=True, temperature=0, max_tokens=12, speculate="mtp")
    assert drafted.text == plain.text
    live = live_model(folder)
    try:
        assert live.ahead is not None
        norm = live.ahead.predictor.enorm.weight
        assert np.array_equal(np.array(norm), weights["model.layers.3.enorm.weight"])
    finally:
        live.close()


def test_a_model_deeper_than_deepseeks_own_keeps_its_layers() -> None:
    from edger1.architectures.deepseek_v3 import Model, ModelArgs

    config = reference.CONFIG | {"num_hidden_layers": 64, "first_k_dense_replace": 62}
    weights = {name: mx.array(value) for name, value in reference.random_weights(config).items()}
    model = Model(ModelArgs.from_dict(config))
    model.load_weights(list(model.sanitize(dict(weights)).items()))
    for layer in (0, 60, 61, 63):
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        assert mx.array_equal(model.layers[layer].self_attn.o_proj.weight, weights[name]), name
    expert = weights["model.layers.63.mlp.experts.5.up_proj.weight"]
    assert mx.array_equal(model.layers[63].mlp.switch_mlp.up_proj.weight[5], expert)


def test_weights_in_fp8_are_those_that_they_stand_for_as_they_are_and_converted(tmp_path: Path) -> None:
    config = reference.CONFIG
    weights = reference.random_weights(config)
    rounded, stored = dict(weights), {name: ("F32", value) for name, value in weights.items()}
    for name, value in weights.items():
        if ".layers." in name and value.ndim == 2 and not name.endswith(("mlp.gate.weight", "eh_proj.weight")):
            scale = np.full((-(-value.shape[0] // 128), -(-value.shape[1] // 128)), abs(value).max() / 448, np.float32)
            codes = mx.to_fp8(mx.array(value / scale[0, 0]))
            stored |= {name: ("F8_E4M3", np.array(codes)), f"{name}_scale_inv": ("F32", scale)}
            meant = mx.from_fp8(codes, mx.float32) * float(scale[0, 0])
            rounded[name] = np.array(meant.astype(mx.bfloat16).astype(mx.float32))
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    folder = reference.write(tmp_path / "fp8", config | {"quantization_config": quantization}, weights)
    (folder / "model.safetensors").write_bytes(file_bytes(stored))
    opened = open_source(folder)
    convert(opened, model_of(opened), tmp_path / "kept", find("keep"))
    convert(opened, model_of(opened), tmp_path / "8", uniform(8, 32))
    expected = reference.logits(config, rounded, TOKENS)
    for each, most in ((folder, 0.01), (tmp_path / "kept", 0.01), (tmp_path / "8", 0.1)):
        live = live_model(each)
        try:
            found = in_steps(live.model)
            assert live.ahead is not None
        finally:
            live.close()
        # Of the median token: routers may decide near ties otherwise.
        errors = [error(a, b) for a, b in zip(found, expected, strict=True)]
        assert float(np.median(errors)) <= most, (each.name, np.quantile(errors, [0.1, 0.5, 0.9]))
    # FP8 keeps three bits behind the leading one.
    assert error(expected, reference.logits(config, weights, TOKENS)) > 0.02


def test_experts_of_a_streamed_models_mtp_layer_are_read_through_a_bank_of_their_own() -> None:
    from mlx_lm.models.cache import KVCache

    from edger1 import installed

    folder = installed.resolve("nano-moe")
    tokens = mx.array([TOKENS[:12]])
    states, given = [], None
    for slots in (None, "25%"):
        live = live_model(folder, expert_slots=slots)
        try:
            assert live.ahead is not None
            if given is None:
                given = np.array(live.ahead.forward(tokens, make_prompt_cache(live.model))[0])
            hidden = mx.array(given)
            following = live.ahead.base.embed(mx.array([TOKENS[1:13]]))
            cache = KVCache()
            rows = [live.ahead.predictor(hidden[:, i : i + 1], following[:, i : i + 1], cache) for i in range(12)]
            states.append(np.array(mx.concatenate(rows, axis=1)))
            if slots:
                (bank,) = live.ahead.streaming.banks
                assert bank.usable_slots * 4 == bank.layer.experts
                # Twelve tokens ask for more experts than there are slots.
                assert live.ahead.streaming.figures[0, MISSES] > bank.usable_slots
            else:
                assert live.ahead.streaming is None
        finally:
            live.close()
    assert np.array_equal(*states)
