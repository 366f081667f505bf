"""mlx-lm's model of a folder, without its weights."""

from __future__ import annotations

from typing import Any

from edger1.errors import FormatError
from edger1.folder import ModelFolder
from edger1.mlx_runtime import prepare
from edger1.quant.model_config import additions


def build(folder: ModelFolder, name: str) -> tuple[Any, dict[str, Any]]:
    """Build mlx-lm's model of the folder and return it with its config; no weight is read yet."""
    prepare()
    from mlx_lm.utils import _get_classes, load_model

    from edger1.architectures import deepseek_v3

    try:
        model, config = load_model(
            folder.path,
            lazy=True,
            model_config=additions(folder.config),
            get_model_classes=lambda config: deepseek_v3.classes(*_get_classes(config)),
        )
    except Exception as error:
        # A config.json may hold anything, and mlx-lm falls over it in any way.
        raise misfit(folder, name, error) from error
    return model, config


def misfit(folder: ModelFolder, name: str, error: Exception) -> FormatError:
    """Return what to raise where a folder's config and weights make no model."""
    return FormatError(
        f"{name}: mlx-lm cannot build a model from {folder.path} ({type(error).__name__}: {error}). Its config.json "
        f"and its weights must belong together, and model_type {folder.model_type!r} must be one that mlx-lm knows."
    )
