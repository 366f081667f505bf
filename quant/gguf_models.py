"""Maps a GGUF model onto the layout that mlx-lm reads: config.json, and where each tensor goes.

What an architecture has is in `gguf_families`; here the file is held against it, so that a tensor which is missing,
left over or of another shape than the metadata say is found before anything is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edger1.errors import FormatError
from edger1.quant import gguf_rope
from edger1.quant.formats.gguf import Header
from edger1.quant.gguf_families import FAMILIES, Family, basics, family
from edger1.quant.gguf_outline import Outline, Placement


@dataclass(frozen=True)
class Plan:
    """A model's config.json without its quantization and token ids, and a placement for every tensor to convert."""

    config: dict[str, Any]
    placements: tuple[Placement, ...]


def plan(header: Header, factors: gguf_rope.RopeFactors | None = None) -> Plan:
    """Work out the layout. `factors` is what the file's RoPE factor tensors hold.

    Raises FormatError for an architecture or a variant of one that is not supported, and where tensors are missing,
    left over or of another shape than the metadata says.
    """
    name = header.text("general.architecture")
    if name not in FAMILIES:
        raise FormatError(
            f"{header.name} has the architecture {name[:40]!r}; GGUF files of {', '.join(FAMILIES)} can be "
            "converted. Get this model as an MLX folder instead."
        )
    outline = Outline(header)
    chosen = family(outline)
    rotated = _rotated(outline, chosen)
    outline.config |= basics(outline, chosen)
    outline.add("token_embd.weight", "model.embed_tokens.weight", outline.vocabulary, outline.hidden)
    chosen.describe(outline)
    shift = -1.0 if name.startswith("gemma") else 0.0
    outline.add("output_norm.weight", "model.norm.weight", outline.hidden, shift=shift)
    if outline.has("output.weight"):
        outline.add("output.weight", "lm_head.weight", outline.vocabulary, outline.hidden)
    _check_tensors(outline)
    _add_rope(outline, chosen, factors or gguf_rope.RopeFactors(), rotated)
    return Plan(outline.config, tuple(outline.placements))


def restored_rows(rows: int, heads: int) -> np.ndarray:
    """Return the row indices that undo llama.cpp's interleaving: take(rows) is in half-rotation order."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def _rotated(outline: Outline, chosen: Family) -> int:
    """Return how many elements of a head are rotated, and refuse heads that mlx-lm's model cannot have."""
    rotated = outline.count("rope.dimension_count", outline.head_dim)
    if chosen.own_sizes:
        return rotated
    if outline.count("attention.value_length", outline.head_dim) != outline.head_dim:
        raise outline.refuse("values of another size than its keys")
    if rotated > outline.head_dim or rotated % 2 or (rotated != outline.head_dim and not chosen.partial):
        raise outline.refuse("rotary embeddings over a part of each head")
    if chosen.even and outline.wide != outline.hidden:
        raise outline.refuse("heads that do not add up to its hidden size")
    return rotated


def _check_tensors(outline: Outline) -> None:
    header = outline.header
    for expected in outline.expected:
        tensor = header.tensors.get(expected.source)
        if tensor is None:
            raise FormatError(f"{header.name} lacks the tensor {expected.source!r}; it is incomplete or of a variant.")
        if tensor.shape != expected.shape:
            raise FormatError(
                f"{header.name}: tensor {tensor.name!r} has the shape {list(tensor.shape)}, but the metadata "
                f"call for {list(expected.shape)}; the file is damaged."
            )
    left = header.tensors.keys() - {expected.source for expected in outline.expected} - {*gguf_rope.FACTOR_TENSORS}
    if left:
        raise FormatError(
            f"{header.name} holds {len(left)} tensors that its architecture has no place for, such as {min(left)!r}; "
            "this variant cannot be converted. Get the model as an MLX folder instead."
        )


def _add_rope(outline: Outline, chosen: Family, factors: gguf_rope.RopeFactors, rotated: int) -> None:
    config = outline.config
    if chosen.partial:
        config["partial_rotary_factor"] = rotated / outline.head_dim
    scaling = gguf_rope.scaling(outline, factors, rotated, config["rope_theta"])
    kind = scaling["rope_type"] if scaling else None
    allowed = _SCALINGS.get(chosen.model_type)
    if kind is not None and allowed is not None and kind not in allowed:
        raise outline.refuse(f"RoPE scaling {kind!r}")
    if scaling is not None:
        # The older name, which is the only one that these look for.
        config["rope_scaling"] = scaling if allowed is None else {**scaling, "type": kind}
        if kind == "longrope":
            config["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    elif chosen.model_type == "glm4_moe":
        config["rope_scaling"] = None
    elif chosen.model_type == "deepseek_v2":
        # mlx-lm's class has no attention without it; a factor of one changes nothing.
        config["rope_scaling"] = {"rope_type": "yarn", "factor": 1.0}


_SCALINGS: dict[str, tuple[str, ...]] = {
    "qwen2_moe": ("linear",),
    "phi3": ("linear", "longrope"),
    "gemma": (),
    "gemma2": (),
    "glm4_moe": (),
    "deepseek_v2": ("yarn",),
}
"""What mlx-lm's class computes, for families where it is not everything that `rope_utils` has."""
