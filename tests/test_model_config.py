"""Configs as transformers 5 saves them are completed with the names that mlx-lm's models read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from edger1.building import build
from edger1.folder import inspect
from edger1.quant.model_config import additions, for_mlx_lm

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


def test_rope_comes_under_its_older_names() -> None:
    config = {"model_type": "qwen2", "rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 0.5, **YARN}}
    completed = for_mlx_lm(config)
    assert completed["rope_theta"] == 5e5
    assert completed["partial_rotary_factor"] == 0.5
    assert completed["rope_scaling"] == YARN
    assert completed["rope_parameters"] == config["rope_parameters"]
    assert "rope_theta" not in config


def test_nothing_to_scale_is_said_so() -> None:
    completed = for_mlx_lm({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}})
    assert (completed["rope_theta"], completed["rope_scaling"]) == (1e4, None)


def test_each_kind_of_layer_may_have_its_own() -> None:
    kinds = {"full_attention": {"rope_theta": 1e6, **YARN}, "sliding_attention": {"rope_theta": 1e4}}
    completed = for_mlx_lm({"rope_parameters": kinds})
    assert (completed["rope_theta"], completed["rope_local_base_freq"]) == (1e6, 1e4)
    assert completed["rope_scaling"] == YARN


@pytest.mark.parametrize(
    "config",
    [
        {"rope_theta": 1e4, "rope_scaling": {"type": "linear"}, "num_experts": 4, "x": [1]},
        {"rope_parameters": None},
        {"rope_parameters": [1]},
    ],
)
def test_older_configs_stay_as_they_are(config: dict[str, Any]) -> None:
    assert for_mlx_lm(config) == config


def test_what_is_there_already_wins() -> None:
    config = {"rope_parameters": {"rope_theta": 1e4, **YARN}, "rope_theta": 5e5, "rope_scaling": {"type": "linear"}}
    completed = for_mlx_lm(config | {"num_local_experts": 8, "num_experts": 4})
    assert (completed["rope_theta"], completed["rope_scaling"]) == (5e5, {"type": "linear"})
    assert completed["num_experts"] == 4


def test_nested_configs_and_numbers_of_experts() -> None:
    completed = for_mlx_lm({"text_config": {"num_local_experts": 8, "rope_parameters": {"rope_theta": 7.0}}})
    assert completed["text_config"]["num_experts"] == 8
    assert completed["text_config"]["rope_theta"] == 7.0


def test_mlx_lm_builds_what_transformers_saves() -> None:
    from mlx_lm.models import qwen3_moe
    from tiny import MIXTURE

    saved = {key: value for key, value in MIXTURE.items() if key not in ("rope_theta", "num_experts")}
    saved |= {"num_local_experts": 64, "rope_parameters": {"rope_theta": 12345.0, "rope_type": "default"}}
    args = qwen3_moe.ModelArgs.from_dict(for_mlx_lm(saved))
    assert (args.num_experts, args.rope_theta, args.rope_scaling) == (64, 12345.0, None)


def test_a_folder_that_transformers_5_saved_runs_with_its_own_rope(tmp_path: Path) -> None:
    model = families.build("llama")
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    config = {key: value for key, value in families.tiny_config("llama").items() if not key.startswith("rope_")}
    config["rope_parameters"] = {"rope_theta": 1e5, "rope_type": "default"}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    loaded, _ = build(inspect(tmp_path), "saved")
    assert loaded.args.rope_theta == 1e5
    assert loaded.args.rope_scaling is None


def test_what_is_added_leaves_the_quantization_alone() -> None:
    nested = {"rope_parameters": {"rope_theta": 1e5}, "quantization": {"bits": 4}}
    added = additions({"model_type": "x", "quantization": {"bits": 4}, "text_config": nested})
    assert set(added) == {"text_config"}
    assert added["text_config"]["quantization"] == {"bits": 4}
    assert added["text_config"]["rope_theta"] == 1e5
    assert additions({"model_type": "x", "quantization": {"bits": 4}}) == {}
