"""Rotary position embeddings: from GGUF's metadata and factor tensors to `rope_scaling` in config.json.

Keys after ggml's docs/gguf.md; what config.json says after transformers' rope utilities, which mlx-lm reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from edger1.errors import FormatError
from edger1.quant.formats.gguf_parts import GGUFParts
from edger1.quant.gguf_outline import Outline

LLAMA3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every Llama 3.1 to 3.3 and every model made from them uses; the GGUF holds only the resulting factors."""

FACTORS, LONG_FACTORS, SHORT_FACTORS = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"

FACTOR_TENSORS = (FACTORS, LONG_FACTORS, SHORT_FACTORS)
"""Tensors that say something of the configuration and are no weights."""

_YARN_NUMBERS = {"yarn_beta_fast": ("beta_fast", 32.0), "yarn_beta_slow": ("beta_slow", 1.0)}
_YARN_LOG_SCALE = 0.1
"""llama.cpp's converter multiplies DeepSeek's mscale_all_dim by this."""


@dataclass(frozen=True)
class RopeFactors:
    """What a file's factor tensors hold, each None where it has none."""

    llama3: np.ndarray | None = None
    long: np.ndarray | None = None
    short: np.ndarray | None = None


def read_factors(file: GGUFParts) -> RopeFactors:
    """Read the RoPE factors of a file. Raises FormatError where they are no short f32 vectors."""
    return RopeFactors(*(_vector(file, name) for name in FACTOR_TENSORS))


def scaling(outline: Outline, factors: RopeFactors, rotated: int, theta: float) -> dict[str, Any] | None:
    """Return `rope_scaling` of a model that rotates `rotated` elements of each head, None where nothing is scaled."""
    header = outline.header
    kind = header.text(outline.key("rope.scaling.type"), "none")
    if factors.llama3 is not None:
        if kind not in ("none", "llama3"):
            raise FormatError(
                f"{header.name} has RoPE factors and {kind[:40]!r} scaling at once, which is not supported."
            )
        return _llama3(outline, factors.llama3, rotated, theta)
    if factors.long is not None and factors.short is not None:
        return _longrope(outline, factors.long, factors.short, rotated)
    if kind == "none":
        return None
    factor = outline.number("rope.scaling.factor", 1.0)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and outline.number("rope.scaling.attn_factor", 1.0) == 1.0:
        found: dict[str, Any] = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": outline.count("rope.scaling.original_context_length"),
        }
        for key, (name, default) in _YARN_NUMBERS.items():
            if (value := outline.number(f"rope.scaling.{key}", default)) != default:
                found[name] = value
        if outline.name == "gpt-oss":
            # Not kept in the file, and part of the model.
            found["truncate"] = False
        if outline.name == "deepseek2" and outline.key("rope.scaling.yarn_log_multiplier") in header.metadata:
            # DeepSeek's own two are equal in every model, and only one of them is kept.
            scale = round(outline.any_number("rope.scaling.yarn_log_multiplier") / _YARN_LOG_SCALE, 6)
            found |= {"mscale": scale, "mscale_all_dim": scale}
        return found
    raise FormatError(
        f"{header.name} uses RoPE scaling {kind[:40]!r} in a form that cannot be converted; none, linear and yarn can. "
        "Get the model as an MLX folder instead."
    )


def _vector(file: GGUFParts, name: str) -> np.ndarray | None:
    tensor = file.header.tensors.get(name)
    if tensor is None:
        return None
    if tensor.type.name != "F32" or tensor.nbytes > 1 << 20 or len(tensor.shape) != 1:
        raise FormatError(f"{file.path.name}: tensor {name!r} should be a short F32 vector; the file is damaged.")
    return file.read(tensor).view("<f4")


def _llama3(outline: Outline, factors: np.ndarray, rotated: int, theta: float) -> dict[str, Any]:
    """Find the parameters that the factors were computed from, by computing them again.

    Formula after Meta's Llama 3.1 release: long wavelengths are slowed by `factor`, short ones kept, those between
    blended.
    """
    half = rotated // 2
    if factors.shape == (half,) and np.isfinite(factors).all() and factors.min() > 0:
        factor = float(factors.max())
        low, high = LLAMA3_SCALING["low_freq_factor"], LLAMA3_SCALING["high_freq_factor"]
        original = LLAMA3_SCALING["original_max_position_embeddings"]
        wavelengths = 2 * math.pi * theta ** (np.arange(half) * 2 / rotated)
        blend = (original / wavelengths - low) / (high - low)
        expected = np.where(
            wavelengths > original / low,
            factor,
            np.where(wavelengths < original / high, 1.0, 1 / ((1 - blend) / factor + blend)),
        )
        if np.allclose(factors, expected, rtol=1e-3, atol=0):
            return {"rope_type": "llama3", "factor": factor, **LLAMA3_SCALING}
    raise FormatError(
        f"{outline.header.name} has RoPE factors other than those of Llama 3.1, which cannot be converted. "
        "Get the model as an MLX folder instead."
    )


def _longrope(outline: Outline, long: np.ndarray, short: np.ndarray, rotated: int) -> dict[str, Any]:
    both = np.concatenate([long, short])
    if long.shape != short.shape or len(long) != rotated // 2 or not np.isfinite(both).all() or both.min() <= 0:
        raise FormatError(
            f"{outline.header.name} has RoPE factors for long texts that are not {rotated // 2} positive numbers each; "
            "it is damaged."
        )
    return {
        "rope_type": "longrope",
        "long_factor": [float(str(value)) for value in long],
        "short_factor": [float(str(value)) for value in short],
        "original_max_position_embeddings": outline.count("rope.scaling.original_context_length"),
    }
