"""The tiny models of every mlx-lm family, which other tests measure with, build and run."""

from __future__ import annotations

import gc

import mlx.core as mx
import numpy as np
import pytest
from families import PROMPT, UNBUILDABLE, build, families, has_experts, logits, relative_error, tiny_config

# A dense transformer, latent attention, a recurrence, sliding windows over shared caches, a wrapper with experts.
REPRESENTATIVE = ["llama", "deepseek_v3", "mamba2", "gemma3n", "qwen3_vl_moe"]


@pytest.mark.parametrize("family", families())
def test_every_family_is_built_or_accounted_for(family: str) -> None:
    """A new mlx-lm brings a family that nobody gave values for: this fails until somebody does."""
    if family not in UNBUILDABLE:
        assert any(value.size for _, value in _weights(build(family)))
        gc.collect()


def test_nothing_is_called_unbuildable_that_mlx_lm_lacks_or_that_runs() -> None:
    assert set(UNBUILDABLE) <= set(families())
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


def test_decoding_with_the_cache_continues_the_prompt() -> None:
    whole = logits(build("llama"), [*PROMPT, 11, 77], [5])[0]
    step = logits(build("llama"), PROMPT, [11, 77])[-1]
    assert relative_error(whole[:, -1], step[:, -1]) < 1e-5


def test_quantized_models_hold_quantized_layers() -> None:
    names = {name.rpartition(".")[2] for name, _ in _weights(build("deepseek_v3", quantize=True))}
    assert "scales" in names
    dense = {name.rpartition(".")[2] for name, _ in _weights(build("deepseek_v3"))}
    assert "scales" not in dense


def test_experts_are_seen_where_they_are() -> None:
    assert has_experts("qwen3_vl_moe")
    assert not has_experts("qwen3")


def test_a_config_nests_the_text_model_of_a_wrapper() -> None:
    config = tiny_config("pixtral")
    assert config["model_type"] == "pixtral"
    assert config["text_config"]["hidden_size"] == tiny_config("llama")["hidden_size"]


def _weights(model: object) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    return list(tree_flatten(model.parameters()))  # type: ignore[attr-defined]
