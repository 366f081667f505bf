"""The tiny models of every mlx-lm family, which other tests measure with, build and run."""

from __future__ import annotations

import gc

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from families import PROMPT, UNBUILDABLE, build, families, has_experts, logits, relative_error, tiny_config
from family_values import NESTED, OVERRIDES, VALUES
from mlx.utils import tree_flatten

# A dense transformer, latent attention, a recurrence, sliding windows over shared caches, a wrapper with experts.
REPRESENTATIVE = ["llama", "deepseek_v3", "mamba2", "gemma3n", "qwen3_vl_moe"]


@pytest.mark.families
@pytest.mark.parametrize("family", families())
def test_every_family_is_built_and_runs_or_is_accounted_for(family: str) -> None:
    """A new mlx-lm brings a family that nobody gave values for: this fails until somebody does."""
    if family not in UNBUILDABLE:
        assert all(relative_error(output, output) == 0 for output in logits(build(family)))
        gc.collect()


def test_nothing_is_called_unbuildable_that_mlx_lm_lacks_or_that_runs() -> None:
    assert set(UNBUILDABLE) <= set(families())
    if mx.metal.is_available():
        pytest.skip("the kernels that CPUs lack are here")
    for family in UNBUILDABLE:
        with pytest.raises((RuntimeError, ValueError)):
            logits(build(family), PROMPT, [1])


@pytest.mark.parametrize("family", REPRESENTATIVE)
@pytest.mark.parametrize("quantize", [False, True], ids=["f32", "4bit"])
def test_a_tiny_model_computes_something_that_depends_on_weights_and_context(family: str, quantize: bool) -> None:
    first = logits(build(family, 0, quantize), PROMPT, [11, 77])
    again = logits(build(family, 0, quantize), PROMPT, [11, 77])
    other = logits(build(family, 1, quantize), PROMPT, [11, 77])
    moved = logits(build(family, 0, quantize), [*PROMPT[:-2], 9, PROMPT[-1]], [11, 77])
    assert [output.shape[1] for output in first] == [len(PROMPT), 1, 1]
    for ours, same, another, context in zip(first, again, other, moved, strict=True):
        assert mx.isfinite(ours).all()
        assert np.array_equal(ours, same)
        assert relative_error(another, ours) > 0.1
        assert relative_error(context[:, -1], ours[:, -1]) > 1e-3


def test_a_nan_or_another_masked_token_is_no_small_error() -> None:
    masked, other = mx.array([1.0, -mx.inf, 2.0]), mx.array([1.0, 0.0, 2.0])
    assert relative_error(masked, masked) == 0
    assert relative_error(other, masked) == relative_error(masked, other) == mx.inf
    assert relative_error(mx.array([1.0, -mx.inf, mx.nan]), masked) == mx.inf
    assert relative_error(mx.array([3.0, 4.5]), mx.array([3.0, 4.0])) == pytest.approx(0.1)


def test_decoding_with_the_cache_continues_the_prompt() -> None:
    whole = logits(build("llama"), [*PROMPT, 11, 77], [5])[0]
    step = logits(build("llama"), PROMPT, [11, 77])[-1]
    assert relative_error(whole[:, -1], step[:, -1]) < 1e-4


def test_quantized_models_hold_quantized_layers() -> None:
    names = {name.rpartition(".")[2] for name, _ in _weights(build("deepseek_v3", quantize=True))}
    assert "scales" in names
    dense = {name.rpartition(".")[2] for name, _ in _weights(build("deepseek_v3"))}
    assert "scales" not in dense


def test_experts_are_seen_where_they_are() -> None:
    assert has_experts("qwen3_vl_moe")
    assert not has_experts("qwen3")


def test_the_tables_name_families_and_fields_that_exist() -> None:
    assert OVERRIDES.keys() | NESTED.keys() <= set(families())
    configs = [tiny_config(family) for family in families()]
    used = {name for config in configs for name in (*config, *config.get("text_config", {}))}
    assert VALUES.keys() <= used


def test_a_name_that_a_family_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OVERRIDES, "llama", {"hiden_size": 64})
    with pytest.raises(KeyError, match="hiden_size"):
        tiny_config("llama")


def test_a_config_nests_the_text_model_of_a_wrapper() -> None:
    config = tiny_config("pixtral")
    assert config["model_type"] == "pixtral"
    assert config["text_config"]["hidden_size"] == tiny_config("llama")["hidden_size"]


def _weights(model: nn.Module) -> list[tuple[str, mx.array]]:
    return list(tree_flatten(model.parameters()))
