"""The record of mlx-lm's `sanitize`, against `sanitize` itself on real arrays, for every architecture that it has."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from array_source import ArrayTensor, tensors
from families import build, families, tiny_config
from hub_layouts import EXPERTS, KV_B, LAYOUTS, VARIANTS, hub_layout
from mlx.utils import tree_flatten
from mlx_lm.models import deepseek_v3

from edger1.architectures import deepseek_v3_mtp
from edger1.errors import FormatError
from edger1.quant import architecture, tracing
from edger1.quant.expressions import dtype_name, height, to_numpy
from edger1.quant.targets import Packed
from edger1.quant.tracing import Traced, trace

SETTINGS = {
    ("bailing_moe", "normed head"): {"norm_head": True},
    ("hunyuan", "dense"): {"num_experts": 1, "use_cla": False},
}


def bf16(family: str) -> dict[str, mx.array]:
    """A model's parameters as most checkpoints have them."""
    found = tree_flatten(build(family).parameters())
    return {name: a.astype(mx.bfloat16) if mx.issubdtype(a.dtype, mx.floating) else a for name, a in found}


def assert_is_what_sanitize_gives(config: dict[str, Any], arrays: dict[str, mx.array]) -> Traced:
    traced = trace(config, tensors(arrays))
    model = architecture.build(config)
    # Copies, because some change what they are given in place.
    given = {name: mx.array(array) for name, array in arrays.items()}
    real = model.sanitize(given) if hasattr(model, "sanitize") else given
    assert list(traced.tensors) == [name for name, _ in tree_flatten(model.parameters())]
    for name, target in traced.tensors.items():
        rows = height(target.shape)
        whole = target.read(0, rows)
        if isinstance(target, Packed):
            assert_packed(target, real)
        else:
            assert target.shape == tuple(real[name].shape), name
            assert target.dtype == dtype_name(real[name].dtype), name
            assert np.array_equal(whole, to_numpy(real[name])), name
        for start, stop in ((0, 1), (rows // 3, rows // 2 + 1), (rows - 1, rows)):
            window = target.read(start, stop)
            assert np.array_equal(window, whole[start:stop] if target.shape else whole), (name, start, stop)
    return traced


def assert_packed(target: Packed, real: dict[str, mx.array]) -> None:
    path = target.name.removesuffix(".weight")
    parts = [real[f"{path}.{part}"] for part in ("weight", "scales", "biases") if f"{path}.{part}" in real]
    rows = target.shape[0]
    codes = target.codes(1, rows)
    for array, part in zip((codes.weight, codes.scales, codes.biases), parts, strict=False):
        stored = part.view(mx.uint16) if part.dtype == mx.bfloat16 else part
        assert array is not None
        assert array.dtype == dtype_name(part.dtype)
        assert np.array_equal(array.data, np.array(stored)[1:])
    assert (codes.biases is None) == (len(parts) == 2)
    parts[1:] = [part.astype(mx.float32) if len(parts) == 3 else part for part in parts[1:]]
    mode = {"group_size": target.coding.group_size, "bits": target.coding.bits, "mode": target.coding.mode}
    numbers = mx.dequantize(*parts, **mode, dtype=mx.float32)
    assert np.array_equal(target.read(0, rows), np.array(numbers))


@pytest.mark.parametrize("family", families())
def test_a_checkpoint_in_mlx_lms_own_layout(family: str) -> None:
    arrays = dict(tree_flatten(build(family).parameters()))
    traced = assert_is_what_sanitize_gives(tiny_config(family), arrays)
    assert not traced.dropped
    assert not traced.mtp


@pytest.mark.parametrize("family", sorted(LAYOUTS))
def test_a_checkpoint_as_it_is_published(family: str) -> None:
    model = bf16(family)
    published = hub_layout(family, model)
    traced = assert_is_what_sanitize_gives(tiny_config(family), published)
    apart = {*traced.mtp, *traced.dropped}
    assert apart == {name for name in published if _is_apart(name)}
    assert set(traced.mtp) == {name for name in apart if "mtp" in name or "layers.2." in name}
    for name, target in traced.tensors.items():
        assert target.shape == tuple(model[name].shape), name


@pytest.mark.parametrize(("family", "variant"), sorted(VARIANTS))
def test_other_checkpoints_that_a_family_takes(family: str, variant: str) -> None:
    config = tiny_config(family) | SETTINGS.get((family, variant), {})
    model = architecture.build(config)
    mx.random.seed(1)
    arrays = {n: mx.random.normal(a.shape).astype(mx.bfloat16) for n, a in tree_flatten(model.parameters())}
    assert_is_what_sanitize_gives(config, hub_layout(family, arrays, variant))


def _is_apart(name: str) -> bool:
    """Whether the tests put a tensor beside the model's own."""
    apart = r"inv_freq|mtp|enorm|eh_proj|visual|vision|projector|masked_bias|\.attn\.bias$|cos$|bias_vl"
    return re.search(apart, name) is not None


def test_nothing_is_read_and_nothing_changes() -> None:
    config = tiny_config("deepseek_v3")
    before = str(config)
    source = tensors(hub_layout("deepseek_v3", bf16("deepseek_v3")))
    mx.random.seed(7)
    mx.random.normal((3,))
    state, contiguous = str(mx.random.state[0]), mx.contiguous
    trace(config, source)
    assert str(mx.random.state[0]) == state
    assert mx.contiguous is contiguous
    assert str(config) == before
    assert not any(tensor.reads for tensor in source.values())


def test_other_threads_keep_their_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    source = tensors(hub_layout("deepseek_v3", bf16("deepseek_v3")))
    seen = []

    class Model(deepseek_v3.Model):
        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            def elsewhere() -> None:
                made = mx.contiguous(mx.arange(6).reshape(2, 3).T)
                seen.append(memoryview(made).strides)

            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join(60)
            return super().sanitize(weights)

    trace(tiny_config("deepseek_v3"), source, (Model, deepseek_v3.ModelArgs))
    assert seen == [(8, 4)]


def test_only_what_is_looked_at_is_read() -> None:
    family = "prism_hadamard_qwen35"
    source = tensors(dict(tree_flatten(build(family).parameters())))
    traced = trace(tiny_config(family), source)
    read = {name for name, tensor in source.items() if tensor.reads}
    assert any(name.endswith(".signs") for name in read)
    assert all(source[name].array.size * 4 <= tracing.MAX_VALUE_BYTES for name in read)
    signs = next(name for name in traced.tensors if name.endswith(".signs"))
    assert traced.tensors[signs].sources == (signs,)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_mtp_layers_of_deepseek_v3_are_told_apart_whatever_their_number(layers: int) -> None:
    config = tiny_config("deepseek_v3") | {"num_hidden_layers": layers}
    model = architecture.build(config | {"num_hidden_layers": layers + 1})
    arrays = KV_B(EXPERTS(dict(tree_flatten(model.parameters()))))
    traced = trace(config, tensors(arrays))
    last = {name for name in arrays if name.startswith(f"model.layers.{layers}.")}
    assert last >= {f"model.layers.{layers}.mlp.experts.{e}.up_proj.weight" for e in range(8)}
    assert set(traced.mtp) == last
    assert not traced.dropped


def test_a_model_of_ones_own_keeps_its_mtp_layers() -> None:
    config = tiny_config("deepseek_v3") | {"num_nextn_predict_layers": 1}
    mx.random.seed(0)
    model = deepseek_v3_mtp.Model(deepseek_v3_mtp.ModelArgs.from_dict(config))
    arrays = deepseek_v3_mtp.hub_weights(model)
    traced = trace(config, tensors(arrays), (deepseek_v3_mtp.Model, deepseek_v3_mtp.ModelArgs))
    assert not traced.mtp
    real = dict(tree_flatten(model.parameters()))
    assert list(traced.tensors) == list(real)
    assert "mtp.0.mlp.switch_mlp.up_proj.weight" in real
    for name, target in traced.tensors.items():
        assert np.array_equal(target.read(0, height(target.shape)), to_numpy(real[name])), name


def test_a_tied_head_is_dropped_and_said_to_be_tied() -> None:
    config = tiny_config("qwen3") | {"tie_word_embeddings": True}
    traced = trace(config, tensors(bf16("qwen3")))
    assert traced.dropped == ("lm_head.weight",)
    assert traced.linears["model.embed_tokens"].tied
    without = {name: array for name, array in bf16("gemma3_text").items() if name != "lm_head.weight"}
    traced = trace(tiny_config("gemma3_text"), tensors(without))
    assert traced.linears["model.embed_tokens"].tied
    assert "lm_head" not in traced.linears


def test_dtypes_that_the_model_keeps_are_named() -> None:
    traced = trace(tiny_config("deepseek_v3"), tensors(bf16("deepseek_v3")))
    kept = {name for name, target in traced.tensors.items() if not target.casts}
    assert kept == {"model.layers.1.mlp.gate.e_score_correction_bias"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("model.norm.weight"), r"no whole qwen3_moe model .* it lacks model\.norm\.weight\."),
        (
            lambda a: a.pop("model.layers.1.mlp.experts.5.up_proj.weight"),
            r"no whole qwen3_moe model .* it lacks model\.layers\.1\.mlp\.experts\.5\.up_proj\.weight\.",
        ),
        (lambda a: a.update(other=mx.ones(3)), "it has no place for other. Check that config.json"),
        (
            lambda a: a.update({"lm_head.weight": mx.ones((200, 64))}),
            r"'lm_head.weight' has the shape \[200, 64\], but config.json asks for \[200, 128\]",
        ),
        (
            lambda a: a.update({"model.layers.1.mlp.experts.5.up_proj.weight": mx.ones((64, 64))}),
            "could not be followed on these tensors",
        ),
    ],
)
def test_what_is_no_whole_model_is_refused(change: Callable[[dict[str, mx.array]], Any], message: str) -> None:
    arrays = hub_layout("qwen3_moe", bf16("qwen3_moe"))
    change(arrays)
    with pytest.raises(FormatError, match=message):
        trace(tiny_config("qwen3_moe"), tensors(arrays))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "gives None as model_type"),
        ({"model_type": "gpt5"}, "mlx-lm has no architecture 'gpt5'"),
        ({"model_type": "llama"}, r"does not describe a llama model that mlx-lm can build \(TypeError"),
        ({"model_type": "llama", "model_file": "evil.py"}, "names a program of its own, 'evil.py'.* none is run"),
    ],
)
def test_a_config_that_is_no_models_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        trace(config, {})


def test_operations_that_mlx_does_not_record_are_refused() -> None:
    arrays = hub_layout("deepseek_v3", bf16("deepseek_v3"))
    name = "model.layers.0.self_attn.o_proj.weight"
    arrays |= {name: mx.to_fp8(arrays[name]), f"{name}_scale_inv": mx.ones((1, 1))}
    with pytest.raises(FormatError, match="deepseek_v3 could not be followed on these tensors .*FromFP8"):
        trace(tiny_config("deepseek_v3"), tensors(arrays))


def test_a_dtype_that_mlx_lacks_is_refused() -> None:
    class Double(ArrayTensor):
        dtype = "F64"  # type: ignore[assignment]

    arrays = bf16("llama")
    source = tensors(arrays) | {"model.norm.weight": Double("model.norm.weight", arrays["model.norm.weight"])}
    with pytest.raises(FormatError, match="'model.norm.weight' is of dtype F64, which MLX has not"):
        trace(tiny_config("llama"), source)
