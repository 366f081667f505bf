"""Tiny models with routed experts, in folders as mlx-lm writes them, and their outputs resident and streamed."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import families
import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from edger1.experts import anatomy
from edger1.experts.anatomy import LayerExperts
from edger1.experts.device import Device
from edger1.experts.policy import DEFAULT_POLICY, POLICIES, Policy
from edger1.experts.streaming import Streaming
from edger1.folder import inspect
from edger1.kernels.install import install

UNSTREAMABLE: dict[str, str] = {
    "dbrx": "its experts are a list of plain MLPs and no SwitchGLU, each with tensors of its own",
    "muse_spark": "mlx-lm cannot run it on a CPU (its routing is a Metal kernel)",
}
"""Families with routed experts that are not streamed -> the reason."""


@cache
def moe_families() -> list[str]:
    """Return every family of mlx-lm whose tiny model has switch layers."""
    names = [name for name in families.families() if name not in families.UNBUILDABLE]
    return [name for name in names if anatomy.switches(families.skeleton(name))]


def write(folder: Path, family: str, *, quantize: bool = True, dtype: Any = None, **quantization: Any) -> Path:
    """Write a tiny model of a family with random weights; unquantized ones in `dtype`."""
    model = families.build(family, quantize=quantize)
    config = dict(families.tiny_config(family))
    if quantize:
        config["quantization"] = {"group_size": families.GROUP_SIZE, "bits": families.BITS, **quantization}
    folder.mkdir(parents=True, exist_ok=True)
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    if dtype is not None:
        weights = {name: w.astype(dtype) if w.dtype == mx.float32 else w for name, w in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def outputs(
    model: Any, prompt: Sequence[int] = families.PROMPT, decoded: Sequence[int] = families.DECODED
) -> list[Any]:
    """Return the logits of a prompt and of each token after it."""
    cache = make_prompt_cache(model)
    found = [np.array(model(mx.array([list(prompt)]), cache=cache))]
    return found + [np.array(model(mx.array([[token]]), cache=cache)) for token in decoded]


def resident(folder: Path, precision: str = "exact", *, fuse: bool = True, **given: Any) -> list[Any]:
    """Return the logits of a model whose experts are all in memory."""
    model, _ = load_model(folder)
    installed = install(model, precision, fuse=fuse)
    try:
        return outputs(model, **given)
    finally:
        installed.uninstall()


def open_streamed(
    folder: Path,
    slots: Callable[[LayerExperts], int],
    *,
    mode: str = "auto",
    policy: Callable[[int], Policy] = POLICIES[DEFAULT_POLICY],
    device: Device | None = None,
) -> tuple[Any, Streaming]:
    """Return a model with `slots(layer)` slots in each layer with experts, and its streaming; close the latter."""
    model, _ = load_model(folder, lazy=True)
    layers = anatomy.find(model, inspect(folder))
    streaming = Streaming(layers, [slots(layer) for layer in layers], policy=policy, mode=mode, device=device)
    streaming.attach(model)
    return model, streaming


def streamed(
    folder: Path,
    slots: Callable[[LayerExperts], int],
    precision: str = "exact",
    *,
    fuse: bool = True,
    whole: bool = True,
    mode: str = "auto",
    **given: Any,
) -> tuple[list[Any], Streaming]:
    """Return the logits with experts streamed, and what streamed them, closed.

    `whole` lets modules with experts be one operation, as in a model that is loaded for use.
    """
    model, streaming = open_streamed(folder, slots, mode=mode)
    with streaming.sleeping():
        installed = install(model, precision, fuse=fuse)
    if whole:
        streaming.fuse(model, installed)
    try:
        return outputs(model, **given), streaming
    finally:
        installed.uninstall()
        streaming.close()


def half(layer: LayerExperts) -> int:
    """Half of a layer's experts, and enough for a token."""
    return max(layer.experts // 2, layer.top_k)
