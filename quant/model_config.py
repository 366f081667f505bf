"""A model's config.json in the words that mlx-lm's models read.

transformers 5 saves a few settings under new names: RoPE's in `rope_parameters` (one set, or one for each kind of
layer), the number of experts as `num_local_experts`. Most of mlx-lm's models know the older names alone, and where one
is missing they take their own default, which gives another model without a word. The older names are added here; what
is there already stays.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

_FULL, _SLIDING = "full_attention", "sliding_attention"


def for_mlx_lm(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of `config` with the names that mlx-lm's models read added, and without its quantization."""
    completed = copy.deepcopy(dict(config))
    for place in (completed, completed.get("text_config")):
        if isinstance(place, dict):
            place.pop("quantization", None)
            place.pop("quantization_config", None)
            _add_rope(place)
            if "num_local_experts" in place:
                place.setdefault("num_experts", place["num_local_experts"])
    return completed


def additions(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `for_mlx_lm` adds to `config`, to be laid over it; how its weights are quantized stays untouched."""
    completed = for_mlx_lm(config)
    nested = config.get("text_config")
    if isinstance(nested, dict):
        for name in ("quantization", "quantization_config"):
            if name in nested:
                completed["text_config"][name] = nested[name]
    return {name: value for name, value in completed.items() if name not in config or config[name] != value}


def _add_rope(place: dict[str, Any]) -> None:
    parameters = place.get("rope_parameters")
    if not isinstance(parameters, dict):
        return
    if isinstance(full := parameters.get(_FULL), dict):
        # Gemma 3's older name for the other kind of layer.
        if isinstance(sliding := parameters.get(_SLIDING), dict) and "rope_theta" in sliding:
            place.setdefault("rope_local_base_freq", sliding["rope_theta"])
        parameters = full
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in parameters:
            place.setdefault(name, parameters[name])
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    scaling = {name: value for name, value in parameters.items() if name not in ("rope_theta", "partial_rotary_factor")}
    if place.get("rope_scaling") is None:
        # Some models want the name even where there is nothing to scale.
        place["rope_scaling"] = scaling if kind != "default" else None
