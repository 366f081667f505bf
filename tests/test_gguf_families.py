"""Every architecture that is read from GGUF: mlx-lm's model of the file answers as the one that it was written from."""

from __future__ import annotations

import contextlib
import importlib
import re
import struct
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import PROMPT, tiny_config
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from gguf_conventions import ARCHITECTURES, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_gguf_source import by_mlx

from edger1.errors import FormatError
from edger1.quant.convert import convert_gguf
from edger1.quant.formats.gguf import read_header
from edger1.quant.formats.gguf_source import GGUFSource, open_gguf
from edger1.quant.gguf_families import FAMILIES

import mlx.core as mx  # isort: skip
import mlx.nn as nn  # isort: skip
from mlx.utils import tree_flatten  # isort: skip

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 32, "beta_slow": 1}
LONGROPE = {
    "type": "longrope",
    "long_factor": [1.0 + index / 10 for index in range(12)],
    "short_factor": [1.0 + index / 100 for index in range(12)],
}
CHANGES: dict[str, dict[str, Any]] = {
    # What tests/families.py chooses and a GGUF file of the architecture cannot say.
    "llama": {"layer_types": None, "sliding_window": None, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "qwen3": {"rope_scaling": YARN},
    "olmoe": {"norm_topk_prob": False},
    "smollm3": {"layer_types": None, "sliding_window": None, "rope_scaling": None, "num_hidden_layers": 4},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"], "rope_scaling": YARN},
    "gemma2": {"attn_logit_softcapping": 20.0},
    "gpt_oss": {"rope_scaling": YARN},
    "glm4_moe": {"attention_bias": True},
    "phi3": {"partial_rotary_factor": 0.75, "rope_scaling": LONGROPE},
    "deepseek_v2": {"rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, "norm_topk_prob": False},
    "deepseek_v3": {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
}


def model_of(config: dict[str, Any]) -> nn.Module:
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config))
    return model


def tiny(model_type: str, **changes: Any) -> tuple[dict[str, Any], dict[str, np.ndarray], mx.array]:
    """A config, random weights of mlx-lm's model of it, and its logits for the prompt."""
    config = tiny_config(model_type) | CHANGES.get(model_type, {}) | changes
    rng = np.random.default_rng(5)
    model = model_of(config)
    weights = {name: np.array(weight) for name, weight in tree_flatten(model.parameters())}
    weights = {
        name: (rng.standard_normal(weight.shape) * 1.5 * weight.shape[-1] ** -0.5).astype(np.float32)
        if weight.ndim > 1
        else (weight + 0.1 * rng.standard_normal(weight.shape)).astype(np.float32)
        for name, weight in weights.items()
    }
    if config.get("tie_word_embeddings") or model_type == "gemma3_text":
        weights.pop("lm_head.weight", None)
    return config, weights, logits(model, weights)


def logits(model: nn.Module, weights: dict[str, Any]) -> mx.array:
    arrays = {name: mx.array(weight) for name, weight in weights.items()}
    if hasattr(model, "sanitize"):
        arrays = model.sanitize(arrays)
    model.load_weights(list(arrays.items()), strict=True)
    model.eval()
    return model(mx.array([PROMPT]))


def numbers(source: GGUFSource) -> dict[str, np.ndarray]:
    return {name: tensor.read(0, tensor.shape[0]) for name, tensor in source.tensors.items()}


def test_every_architecture_is_tested() -> None:
    import gguf

    assert {gguf.MODEL_ARCH_NAMES[architecture] for architecture in ARCHITECTURES.values()} == FAMILIES.keys()


def test_the_documentation_names_every_architecture() -> None:
    text = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    named = re.search(r"Architectures, by the names that the files give them: (.*?)Others,", text, re.DOTALL)
    assert named is not None
    assert set(re.findall(r"`([^`]+)`", named[1])) == FAMILIES.keys()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_model_of_each_architecture_answers_the_same(tmp_path: Path, model_type: str) -> None:
    config, weights, expected = tiny(model_type)
    write_gguf(tmp_path / "m.gguf", config, weights)
    source = open_gguf(tmp_path / "m.gguf")
    assert source.config["model_type"] == model_type
    assert source.tensors.keys() == weights.keys()
    read = numbers(source)
    for name, weight in weights.items():
        assert source.tensors[name].shape == weight.shape
        # What was added to gemma's norms and taken off again was rounded once.
        np.testing.assert_allclose(read[name], weight, rtol=0, atol=2e-7 if model_type.startswith("gemma") else 0)
    found = logits(model_of(source.config), read)
    np.testing.assert_allclose(np.array(found), np.array(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "granite", "olmo2"])
def test_tied_embeddings(tmp_path: Path, model_type: str) -> None:
    config, weights, expected = tiny(model_type, tie_word_embeddings=True)
    write_gguf(tmp_path / "m.gguf", config, weights)
    source = open_gguf(tmp_path / "m.gguf")
    assert source.config["tie_word_embeddings"] is True
    np.testing.assert_array_equal(np.array(logits(model_of(source.config), numbers(source))), np.array(expected))


@pytest.mark.parametrize("low_rank", [None, 64])
def test_queries_of_deepseek_with_and_without_a_low_rank(tmp_path: Path, low_rank: int | None) -> None:
    config, weights, expected = tiny("deepseek_v2", q_lora_rank=low_rank)
    write_gguf(tmp_path / "m.gguf", config, weights)
    source = open_gguf(tmp_path / "m.gguf")
    assert source.config["q_lora_rank"] == low_rank
    np.testing.assert_array_equal(np.array(logits(model_of(source.config), numbers(source))), np.array(expected))


def test_windows_of_a_projection_joined_from_two(tmp_path: Path) -> None:
    config, weights, _ = tiny("deepseek_v2")
    kind = GGMLQuantizationType.Q8_0
    written = write_gguf(tmp_path / "m.gguf", config, weights, {"attn_k_b.weight": kind, "attn_v_b.weight": kind})
    tensor = open_gguf(tmp_path / "m.gguf").tensors["model.layers.1.self_attn.kv_b_proj.weight"]
    keys, values = (
        dequantize(quantize(written[f"blk.1.attn_{half}_b.weight"], kind), kind).reshape(shape)
        for half, shape in (("k", (4, 64, 32)), ("v", (4, 32, 64)))
    )
    expected = np.concatenate([keys.swapaxes(1, 2), values], axis=1).reshape(256, 64)
    assert (tensor.shape, tensor.kind, tensor.coding) == (expected.shape, "Q8_0 joined", None)
    for start, stop in ((0, 256), (0, 1), (31, 33), (63, 129), (200, 256), (7, 7)):
        np.testing.assert_array_equal(tensor.read(start, stop), expected[start:stop])


@pytest.mark.parametrize(
    ("model_type", "name", "end"),
    [
        ("gpt_oss", "mlp.experts.down_proj", "ffn_down_exps.weight"),
        ("qwen3_moe", "mlp.switch_mlp.up_proj", "ffn_up_exps.weight"),
        ("deepseek_v3", "self_attn.embed_q", "attn_k_b.weight"),
    ],
)
@pytest.mark.parametrize("kind", [GGMLQuantizationType.MXFP4, GGMLQuantizationType.Q5_1, GGMLQuantizationType.Q8_0])
def test_stacks_keep_their_codes(
    tmp_path: Path, model_type: str, name: str, end: str, kind: GGMLQuantizationType
) -> None:
    config, weights, _ = tiny(model_type)
    written = write_gguf(tmp_path / "m.gguf", config, weights, {end: kind})
    tensor = open_gguf(tmp_path / "m.gguf").tensors[f"model.layers.1.{name}.weight"]
    expected = dequantize(quantize(written[f"blk.1.{end}"], kind), kind)
    assert (tensor.shape, tensor.kind) == (expected.shape, kind.name)
    coding = tensor.coding
    assert coding is not None
    assert coding.mode == ("mxfp4" if kind.name == "MXFP4" else "affine")
    for start, stop in ((0, len(expected)), (1, 3)):
        np.testing.assert_array_equal(tensor.read(start, stop), expected[start:stop])
        np.testing.assert_array_equal(by_mlx(tensor.codes(start, stop), coding), expected[start:stop])


def test_layers_that_predict_further_tokens_are_kept(tmp_path: Path) -> None:
    config, weights, expected = tiny("glm4_moe", num_nextn_predict_layers=1)
    last, extra = config["num_hidden_layers"] - 1, config["num_hidden_layers"]
    further = {
        name.replace(f"layers.{last}.", f"layers.{extra}."): weight
        for name, weight in weights.items()
        if f"layers.{last}." in name
    }
    hidden = config["hidden_size"]
    for name, shape in (
        ("eh_proj", (hidden, 2 * hidden)),
        ("enorm", (hidden,)),
        ("hnorm", (hidden,)),
        ("shared_head.norm", (hidden,)),
        ("embed_tokens", (config["vocab_size"], hidden)),
        ("shared_head.head", (config["vocab_size"], hidden)),
    ):
        further[f"model.layers.{extra}.{name}.weight"] = np.full(shape, 0.5, np.float32)
    write_gguf(tmp_path / "m.gguf", config, weights | further)
    source = open_gguf(tmp_path / "m.gguf")
    assert source.tensors.keys() == weights.keys() | further.keys()
    assert source.config["num_hidden_layers"] == extra
    # mlx-lm drops them.
    np.testing.assert_array_equal(np.array(logits(model_of(source.config), numbers(source))), np.array(expected))


def test_the_router_tells_deepseek_v3_where_the_file_does_not(tmp_path: Path) -> None:
    config, weights, _ = tiny("deepseek_v3")
    write_gguf(tmp_path / "m.gguf", config | {"scoring_func": None}, weights)
    assert open_gguf(tmp_path / "m.gguf").config["model_type"] == "deepseek_v3"


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("phi3", {"rope_scaling": YARN}, "a phi3 model with RoPE scaling 'yarn'"),
        ("qwen2_moe", {"rope_scaling": YARN}, "a qwen2moe model with RoPE scaling 'yarn'"),
        ("mixtral", {"head_dim": 16}, "heads that do not add up to its hidden size"),
        ("qwen3", {"partial_rotary_factor": 0.5}, "rotary embeddings over a part of each head"),
        ("deepseek_v3", {"first_k_dense_replace": 9}, "more dense layers than it has layers"),
        ("gpt_oss", {"tie_word_embeddings": True}, "a gpt-oss model with tied embeddings"),
    ],
)
def test_variants_that_mlx_lm_has_not_are_refused(
    tmp_path: Path, model_type: str, changes: dict[str, Any], message: str
) -> None:
    config, weights, _ = tiny(model_type)
    if changes.get("tie_word_embeddings"):
        del weights["lm_head.weight"]
    write_gguf(tmp_path / "m.gguf", config | changes, weights)
    with pytest.raises(FormatError, match=message):
        open_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen2_moe", "gemma3_text", "deepseek_v3", "mixtral", "phi3"])
def test_files_of_types_that_mlx_has_become_folders_without_loss(tmp_path: Path, model_type: str) -> None:
    import mlx_lm

    config, weights, _ = tiny(model_type)
    kinds = {"_exps.weight": GGMLQuantizationType.MXFP4, "attn_output.weight": GGMLQuantizationType.Q5_0}
    kinds |= {f"attn_{half}_b.weight": GGMLQuantizationType.Q8_0 for half in "kv"}
    kinds |= {"ffn_down.weight": GGMLQuantizationType.Q4_1, "token_embd.weight": GGMLQuantizationType.Q8_0}
    write_gguf(tmp_path / "m.gguf", config, weights, kinds)
    source = open_gguf(tmp_path / "m.gguf")
    assert not source.requantized()
    expected = logits(model_of(source.config), numbers(source))
    convert_gguf(tmp_path / "m.gguf", tmp_path / "model")
    model, _ = mlx_lm.load(str(tmp_path / "model"))
    # Scales in f32 are the same numbers, and what is computed from them is rounded less.
    model.set_dtype(mx.float32)
    np.testing.assert_allclose(np.array(model(mx.array([PROMPT]))), np.array(expected), rtol=1e-4, atol=1e-4)


def test_what_must_be_computed_is_not_carried(tmp_path: Path) -> None:
    config, weights, _ = tiny("deepseek_v2")
    write_gguf(tmp_path / "m.gguf", config, weights)
    with pytest.raises(FormatError, match="'blk.0.attn_k_b.weight' cannot be carried over without computing"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "model")


@pytest.mark.parametrize(
    ("pattern", "expected"), [([True, False], 2), ([True, True], 3), (2, 2), ([False, True], None)]
)
def test_the_period_of_gemmas_windows(tmp_path: Path, pattern: Any, expected: int | None) -> None:
    config, weights, _ = tiny("gemma3_text")
    write_gguf(tmp_path / "m.gguf", config | {"sliding_window_pattern": pattern}, weights)
    if expected is None:
        with pytest.raises(FormatError, match="windows over layers that follow no period"):
            open_gguf(tmp_path / "m.gguf")
    else:
        assert open_gguf(tmp_path / "m.gguf").config["sliding_window_pattern"] == expected


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v2"])
def test_models_in_parts(tmp_path: Path, model_type: str) -> None:
    config, weights, _ = tiny(model_type)
    write_gguf(tmp_path / "m.gguf", config, weights, part_tensors=7)
    parts = sorted(tmp_path.iterdir())
    assert [part.name for part in parts[:2]] == [f"m-0000{number}-of-{len(parts):05d}.gguf" for number in (1, 2)]
    read = numbers(open_gguf(parts[1]))
    assert read.keys() == weights.keys()
    for name, weight in weights.items():
        np.testing.assert_array_equal(read[name], weight)


@cache
def whole(model_type: str) -> tuple[bytes, int]:
    """The bytes of a file, and how many of them come before its tensors."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        config, weights, _ = tiny(model_type)
        write_gguf(path, config, weights, {"_exps.weight": GGMLQuantizationType.MXFP4})
        return path.read_bytes(), min(info.offset for info in read_header(path).tensors.values())


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    data, header_bytes = whole(draw(st.sampled_from(["deepseek_v2", "gpt_oss", "gemma3_text", "minimax"])))
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, header_bytes - 8))
        telling = draw(st.sampled_from([0, 1, 2, 3, 31, 255, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]))
        match draw(st.sampled_from(["flip", "byte", "number"])):
            case "flip":
                changed[at] ^= 1 << draw(st.integers(0, 7))
            case "byte":
                changed[at] = draw(st.integers(0, 255))
            case "number":
                changed[at : at + 4] = struct.pack("<I", telling)
    return bytes(changed)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=damaged())
def test_a_damaged_header_gives_a_format_error_or_a_source(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    try:
        source = open_gguf(path)
    except FormatError:
        return
    for tensor in source.tensors.values():
        with contextlib.suppress(FormatError):
            assert tensor.read(0, 1).shape == (1, *tensor.shape[1:])
    source.close()
