"""Adapters in folders: mlx-lm's layout (adapter_config.json, adapters.safetensors), and PEFT's, which is read as well."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edger1.train.adapters.wiring import Adapted, AdapterSpec

if TYPE_CHECKING:
    import mlx.core as mx


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as read from a folder."""

    spec: AdapterSpec
    weights: dict[str, mx.array]
    """f32, named as in mlx-lm's adapters.safetensors: "model.layers.0.self_attn.q_proj.lora_a" ..."""
    of: str
    """The model that it was trained on, as its folder says: a path or a name, "" where it says nothing."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What else `save` was given."""


def save(folder: Path, adapted: Adapted, model_folder: Path | str, extra: dict[str, Any] | None = None) -> None:
    """Write mlx-lm's adapter folder, whole or not at all. Raises SaveError where it cannot be written."""
    raise NotImplementedError


def load(folder: Path) -> SavedAdapter:
    """Read an adapter folder in mlx-lm's or PEFT's layout. Raises FormatError for a damaged or unknown one."""
    raise NotImplementedError


def apply(model: Any, folder: Path) -> Adapted:
    """Put a saved adapter over its model. Raises FormatError for a damaged one and for one of another model."""
    raise NotImplementedError
