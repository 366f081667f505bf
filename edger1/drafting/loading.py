"""Finds a model's MTP layer on disk, says what it takes of memory, and loads it beside the model."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edger1.drafting.mtp import Ahead
from edger1.errors import FormatError
from edger1.experts.anatomy import top_k
from edger1.experts.budget import LEAST_SLOTS
from edger1.experts.store import THREADS, read_buffer_bytes
from edger1.folder import ModelFolder
from edger1.memory import KV_STEP, Plan
from edger1.quant.formats import safetensors
from edger1.quant.formats.folder import MTP_NAME

_KV_BYTES = 4
NO_ROOM = "its MTP layer does not fit under the memory ceiling"


@dataclass(frozen=True)
class Found:
    """An MTP layer's tensors: the file of each, in the order of names, and its bytes on disk."""

    prefix: str
    files: tuple[Path, ...]
    names: frozenset[str]
    nbytes: int
    expert_bytes: int
    """Of those, the bytes of stacked experts."""
    largest_bytes: int = 0
    """Of these, the bytes of the largest tensor."""


def find(folder: ModelFolder) -> Found | None:
    """Return where the MTP layer of a model lies; None where it has none, or is of no family whose layer is known."""
    from edger1.architectures.mtp import FAMILIES, prefix_of

    family = FAMILIES.get(folder.model_type)
    if family is None:
        return None
    prefix = prefix_of(family, folder.config)
    beside = folder.path / MTP_NAME
    files = (*folder.weight_files, *([beside] if beside.is_file() else []))
    found: dict[str, tuple[Path, int]] = {}
    for header in map(safetensors.read_header, files):
        found |= {
            name: (header.path, entry.nbytes) for name, entry in header.entries.items() if name.startswith(prefix)
        }
    if not found:
        return None
    paths = tuple(path for path in files if any(path == own for own, _ in found.values()))
    nbytes = sum(nbytes for _, nbytes in found.values())
    experts = [nbytes for name, (_, nbytes) in found.items() if ".switch_mlp." in name]
    return Found(prefix, paths, frozenset(found), nbytes, sum(experts), max(experts, default=0))


def share(plan: Plan) -> float | None:
    """Return the share of the layer's experts that have a slot: as many as the model's own do; None where all stay."""
    if plan.stream is None:
        return None
    return min(1.0, sum(plan.stream.slots) / sum(plan.stream.experts))


def room(found: Found, plan: Plan, config: Mapping[str, Any]) -> int:
    """Return what the layer takes at most beside a model so planned: weights, widened where they are, what reads of its
    experts go through, its KV cache, and hidden states that it has yet to read.

    The cache is counted as keys and values as wide as the hidden state, which no family exceeds.
    """
    text = config.get("text_config")
    hidden = (text if isinstance(text, Mapping) else config).get("hidden_size")
    width = hidden if isinstance(hidden, int) else 0
    experts = found.expert_bytes
    if plan.stream is not None and experts:
        # As many as the model's layers have, and with as many slots as `slots_by_hand` makes of the share.
        count = max(plan.stream.experts)
        slots = max(-int(-count * (share(plan) or 0) // 1), top_k(config), LEAST_SLOTS)
        experts = experts * min(count, slots) // count + THREADS * read_buffer_bytes(-(-found.largest_bytes // count))
    cached = 2 * (plan.context + KV_STEP) * width * _KV_BYTES
    return experts + 2 * (found.nbytes - found.expert_bytes) + cached


def is_worth(with_layer: Plan, without: Plan) -> bool:
    """Whether the layer fits, and no experts must leave memory for it."""
    fits = with_layer.total_bytes <= with_layer.ceiling_bytes
    return fits and (with_layer.stream is None or without.stream is not None)


def load(found: Found, folder: ModelFolder, model: Any, precision: str, slots_share: float | None) -> Ahead:
    """Load the layer beside `model`, which is loaded; its experts streamed through a share of slots, if one is given.

    Raises FormatError where its weights are not what config.json says.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten

    from edger1.architectures.mtp import FAMILIES, base_of, build
    from edger1.kernels.install import install
    from edger1.loader import is_widened

    weights: dict[str, Any] = {}
    try:
        for path in found.files:
            loaded: Any = mx.load(str(path))
            weights |= {name: value for name, value in loaded.items() if name in found.names}
        predictor = build(FAMILIES[folder.model_type], model, weights, folder.config)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise FormatError(
            f"The MTP layer of {folder.path.name} does not fit its config.json ({type(error).__name__}: {error}). "
            f"Convert the model again, or remove {MTP_NAME} to go without."
        ) from error
    del weights
    # Who reads experts, and what is replaced for the process, would outlive a layer that does not come to be.
    with contextlib.ExitStack() as undo:
        streaming = None if slots_share is None else _streamed(found, folder, predictor, slots_share)
        if streaming is not None:
            undo.callback(streaming.close)
        layers = _layers(found, folder, predictor) if streaming is not None else ()
        on_disk = {f"{layer.path.split('.mlp.')[-1]}" for layer in layers}
        for key, value in tree_flatten(predictor.parameters()):
            if any(f".mlp.{path}." in f".{key}" for path in on_disk):
                continue
            taken = value.astype(mx.float32) if is_widened(value) else value
            mx.eval(taken)
            predictor.update(tree_unflatten([(key, taken)]))
        mx.eval([v for m in predictor.modules() for v in vars(m).values() if isinstance(v, mx.array)])
        if streaming is not None:
            streaming.attach(_tree(found, predictor))
            for _ in streaming.fill():
                pass
        with streaming.sleeping() if streaming is not None else contextlib.nullcontext():
            installed = install(predictor, "exact" if precision == "exact" else "fast")
        undo.callback(installed.uninstall)
        if streaming is not None:
            streaming.fuse(predictor, installed)
        nbytes = sum(value.nbytes for _, value in tree_flatten(predictor.parameters()))
        undo.pop_all()
        return Ahead(predictor, base_of(model), installed, nbytes, streaming)


def _tree(found: Found, predictor: Any) -> dict[str, Any]:
    """Return the block under the path that it has on disk."""
    tree: Any = predictor.block
    for part in reversed(found.prefix.rstrip(".").split(".")):
        tree = {part: tree}
    return dict(tree)


def _layers(found: Found, folder: ModelFolder, predictor: Any) -> tuple[Any, ...]:
    from edger1.experts.planning import find_layers

    return find_layers(_tree(found, predictor), replace(folder, weight_files=found.files))


def _streamed(found: Found, folder: ModelFolder, predictor: Any, share: float) -> Any:
    """Return the streaming of the layer's experts; None where they do not lie on disk as streaming needs them."""
    from edger1.experts.budget import slots_by_hand
    from edger1.experts.streaming import Streaming

    layers = _layers(found, folder, predictor)
    return Streaming(layers, slots_by_hand(layers, f"{100 * share:.6f}%")) if layers else None
