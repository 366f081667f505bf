"""From a model that is built and not loaded to its plan: which experts are streamed, and what to expect.

The arithmetic is in `budget`; this reads the sizes off the model and its files. Runs on the thread that owns MLX.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from edger1.errors import UnstreamableError
from edger1.experts import anatomy, budget, rates
from edger1.experts.anatomy import LayerExperts
from edger1.folder import ModelFolder
from edger1.memory import Plan


def find_layers(model: Any, folder: ModelFolder, expert_slots: str | int | None = None) -> tuple[LayerExperts, ...]:
    """Return the layers whose experts can be streamed: none where they do not lie in the files as that needs.

    Raises UnstreamableError for those where the user asks for `expert_slots`.
    """
    try:
        return anatomy.find(model, folder)
    except UnstreamableError:
        if expert_slots is not None:
            raise
        return ()


def expert_tensors(layers: tuple[LayerExperts, ...]) -> frozenset[tuple[Any, int]]:
    """Return where the stacked tensors of all layers begin: file and offset."""
    return frozenset((part.file, part.offset) for layer in layers for part in layer.parts)


def expert_total(layers: tuple[LayerExperts, ...]) -> int:
    """Return the bytes of all experts of all layers as they lie on disk."""
    return sum(layer.experts * layer.expert_bytes for layer in layers)


def active_share(folder: ModelFolder, layers: tuple[LayerExperts, ...]) -> float:
    """Return the share of the weights that a token passes through: all but the experts that it does not choose."""
    idle = sum((layer.experts - layer.top_k) * layer.expert_bytes for layer in layers)
    return 1 - idle / max(1, folder.total_bytes)


def predict(plan: Plan, model: Any, folder: ModelFolder, layers: tuple[LayerExperts, ...]) -> Plan:
    """Return the plan with the tokens a second that can be expected, from rates measured on this machine."""
    if not layers and anatomy.switches(model):
        # How much of such a model a token reads is not known.
        return plan
    weights = rates.weight_rate(folder.quantization)
    disk = rates.disk_rate(layers) if plan.stream is not None else None
    if plan.stream is not None and disk is None:
        return plan
    read = plan.resident_bytes - _untied_embedding_bytes(model)
    if plan.stream is None:
        read -= sum((layer.experts - layer.top_k) * layer.expert_bytes for layer in layers)
    tokens_per_s = budget.predict_tokens_per_s(max(1, read), weights, plan.stream, disk)
    return replace(plan, prediction=budget.Prediction(tokens_per_s, weights, disk))


def _untied_embedding_bytes(model: Any) -> int:
    """Return the bytes of the table that turns tokens into rows, of which a token reads a row only; 0 where logits are
    taken from the same table."""
    import mlx.nn as nn
    from mlx.utils import tree_flatten

    tables = [
        (path, sum(array.nbytes for _, array in tree_flatten(module.parameters())))
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding)
    ]
    untied = any("lm_head" in path for path, _ in model.named_modules())
    return max((nbytes for _, nbytes in tables), default=0) if untied else 0
