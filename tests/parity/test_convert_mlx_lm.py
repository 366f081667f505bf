"""Conversion of every architecture against mlx-lm's own converter: the same arrays, number by number."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from families import families, tiny_config
from hub_layouts import hub_layout
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model

from edger1.quant import architecture
from edger1.quant.converting import convert
from edger1.quant.opening import open_source
from edger1.quant.recipes import find, uniform
from edger1.quant.traced_model import model_of

pytestmark = pytest.mark.parity

MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
NOT_BY_MLX_LM = {
    "afm7": "its fused layers do not take the mode that quantize_model names (TypeError)",
    "bitnet": "its weights are published packed, and stay so",
    "deepseek_v41": "its published weights are FP8 and FP4 under names that no other checkpoint has",
    "prism_hadamard_qwen35": "its weights are published quantized, and stay so",
    "rwkv7": "its own rule asks for groups of 64, and tiny models of it have matrices 32 wide (ValueError)",
}
"""Families of which mlx-lm's converter makes nothing that could be compared -> the reason."""


def publish(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint as its lab would publish it, with random weights."""
    mx.random.seed(3)
    shapes = {name: array.shape for name, array in tree_flatten(architecture.build(config).parameters())}
    arrays = {name: (mx.random.normal(shape) * 0.1).astype(mx.bfloat16) for name, shape in shapes.items()}
    published = hub_layout(config["model_type"], arrays)
    if config["model_type"] == "deepseek_v3":
        # mlx-lm knows its MTP layers by the number that they have in the published model only.
        published = {name: array for name, array in published.items() if not name.startswith("model.layers.2.")}
    if config["model_type"] == "gpt_oss":
        config = {**config, "quantization_config": MXFP4}
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), published)
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    return folder


def by_mlx_lm(folder: Path, bits: int | None) -> dict[str, mx.array]:
    """What `mlx_lm.convert` would write."""
    model, config = load_model(folder, lazy=True)
    if bits is not None:
        model, _ = quantize_model(model, config, 32, bits)
    return dict(tree_flatten(model.parameters()))


def by_us(folder: Path, bits: int | None) -> tuple[Path, dict[str, mx.array]]:
    source = open_source(folder)
    recipe = uniform(bits, 32) if bits is not None else find("keep")
    report = convert(source, model_of(source), folder.with_name("converted"), recipe)
    arrays: dict[str, mx.array] = {}
    for path in sorted(report.folder.glob("model*.safetensors")):
        arrays |= mx.load(str(path))
    return report.folder, arrays


def assert_same(found: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert mx.array_equal(found[name], array, equal_nan=True), name


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("family", [family for family in families() if family not in NOT_BY_MLX_LM])
def test_every_architecture_as_mlx_lm_converts_it(tmp_path: Path, family: str, bits: int | None) -> None:
    folder = publish(tmp_path / "source", tiny_config(family))
    converted, found = by_us(folder, bits)
    assert_same(found, by_mlx_lm(folder, bits))
    model, _ = load_model(converted)
    assert_same(dict(tree_flatten(model.parameters())), found)
