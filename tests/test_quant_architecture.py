"""What is said of the modules of mlx-lm's models that can be quantized, against mlx-lm quantizing them."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from families import GROUP_SIZE, build, families, tiny_config
from mlx.utils import tree_flatten

from edger1.quant.architecture import linears

# A BitLinear is quantized as it is; these have quantized layers of their own.
QUANTIZED_ALREADY = ("prism_hadamard_qwen35",)


@pytest.mark.parametrize("family", [family for family in families() if family not in QUANTIZED_ALREADY])
def test_they_are_the_modules_that_mlx_lm_quantizes(family: str) -> None:
    found = linears(tiny_config(family))
    quantized = dict(tree_flatten(build(family, quantize=True).parameters()))
    paths = {name.removesuffix(".scales") for name in quantized if name.endswith(".scales")}
    takes = {path for path, linear in found.items() if linear.own and linear.shape[-1] % GROUP_SIZE == 0}
    assert takes == paths
    plain = dict(tree_flatten(build(family).parameters()))
    for path, linear in found.items():
        assert linear.path == path
        assert linear.shape == tuple(plain[f"{path}.weight"].shape)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", {"embedding": ["model.embed_tokens"], "head": ["lm_head"]}),
        (
            "qwen3_moe",
            {
                "embedding": ["model.embed_tokens"],
                "head": ["lm_head"],
                "router": ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"],
                "experts": [
                    f"model.layers.{i}.mlp.switch_mlp.{name}"
                    for i in range(2)
                    for name in ("gate_proj", "up_proj", "down_proj")
                ],
            },
        ),
        (
            # The router of DeepSeek is no module that can be quantized.
            "deepseek_v3",
            {
                "embedding": ["model.embed_tokens"],
                "head": ["lm_head"],
                "experts": [f"model.layers.1.mlp.switch_mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")],
            },
        ),
        (
            "jamba",
            {
                "embedding": ["model.embed_tokens"],
                "head": ["lm_head"],
                "router": ["model.layers.0.feed_forward.router"],
                "experts": [
                    f"model.layers.0.feed_forward.switch_mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")
                ],
            },
        ),
        (
            "dbrx",
            {
                "embedding": ["transformer.wte"],
                "head": ["lm_head"],
                "experts": [
                    f"transformer.blocks.{i}.ffn.experts.{e}.{name}"
                    for i in range(2)
                    for e in range(4)
                    for name in ("v1", "w1", "w2")
                ],
            },
        ),
    ],
)
def test_roles(family: str, expected: dict[str, list[str]]) -> None:
    found: dict[str, list[str]] = {}
    for path, linear in linears(tiny_config(family)).items():
        found.setdefault(linear.role, []).append(path)
    for role, paths in expected.items():
        assert sorted(found.get(role, [])) == sorted(paths)
    assert set(found) == {"linear", *expected}


def test_the_models_own_rule_is_told() -> None:
    found = linears(tiny_config("qwen3_moe"))
    assert found["model.layers.0.mlp.gate"].own == {"group_size": 64, "bits": 8}
    assert found["model.layers.0.mlp.switch_mlp.up_proj"].own is True


@pytest.mark.parametrize(("family", "tied"), [("gemma2", "model.embed_tokens"), ("gpt2", "model.wte"), ("llama", None)])
def test_an_embedding_that_is_the_head_as_well_is_told(family: str, tied: str | None) -> None:
    assert [path for path, linear in linears(tiny_config(family)).items() if linear.tied] == ([tied] if tied else [])


def test_a_model_of_hundreds_of_gigabytes_takes_no_memory() -> None:
    config: dict[str, Any] = tiny_config("qwen3_moe") | {"hidden_size": 8192, "num_experts": 256}
    config |= {"moe_intermediate_size": 4096, "num_hidden_layers": 60}
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    found = linears(config)
    assert found["model.layers.59.mlp.switch_mlp.up_proj"].shape == (256, 4096, 8192)
    assert mx.get_peak_memory() - before < 1 << 20
