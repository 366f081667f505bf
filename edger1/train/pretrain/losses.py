"""The losses of pretraining: next token, the token after it (MTP), and the balance of experts within a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from edger1.train.ops import Ops
from edger1.train.pretrain.forward import Passed, head_weight, routers, run


@dataclass(frozen=True)
class Batch:
    """Rows of packed documents: all [B, L], `tokens` and `starts` int32, the rest float32.

    `weights` is 1 where the next token belongs to the same document and counts, `ahead_weights` where the one after it
    does; `starts` is where a position's document begins in the row.
    """

    tokens: mx.array
    starts: mx.array
    weights: mx.array
    ahead_weights: mx.array


def batch_of(tokens: np.ndarray, starts: np.ndarray, counted: np.ndarray) -> Batch:
    """Make a batch of tokens [B, L], the starts of their documents, and a mask of the tokens that count as targets."""
    rows = [np.zeros(tokens.shape, np.float32), np.zeros(tokens.shape, np.float32)]
    for ahead, weights in enumerate(rows, 1):
        same = starts[:, ahead:] == starts[:, :-ahead]
        weights[:, :-ahead] = same & counted[:, ahead:]
    return Batch(
        mx.array(tokens.astype(np.int32)), mx.array(starts.astype(np.int32)), mx.array(rows[0]), mx.array(rows[1])
    )


@dataclass
class Losses:
    """Mean nats a token: of the next token, of the one after it (0 without an MTP layer); and the layers' expert loads.

    `loads` is float32 [layers, E], how many of the batch's choices fell on each expert; [0, 0] without experts.
    """

    main: mx.array
    ahead: mx.array
    balance: mx.array
    loads: mx.array


def compute(model: Any, batch: Batch, ops: Ops) -> Losses:
    """Return a batch's losses."""
    passed = run(model, batch.tokens, batch.starts, ops)
    head = head_weight(model)
    main = _mean(passed.hidden, head, batch.tokens, batch.weights, 1, ops)
    zero = mx.array(0.0)
    ahead = zero if passed.ahead is None else _mean(passed.ahead, head, batch.tokens, batch.ahead_weights, 2, ops)
    if not passed.routing:
        return Losses(main, ahead, zero, mx.zeros((0, 0)))
    balance, loads = _balance(model, passed, ops)
    return Losses(main, ahead, balance, loads)


def _mean(hidden: mx.array, head: mx.array, tokens: mx.array, weights: mx.array, ahead: int, ops: Ops) -> mx.array:
    targets = mx.concatenate([tokens[:, ahead:], tokens[:, :ahead]], axis=1)
    total = ops.cross_entropy(hidden.flatten(0, 1), head, targets.flatten(), weights.flatten())
    return total / mx.maximum(weights.sum(), 1.0)


def _balance(model: Any, passed: Passed, ops: Ops) -> tuple[mx.array, mx.array]:
    """Sequence-wise balance (DeepSeek-V3, equations 17 to 20), summed over layers: sum_i f_i P_i for each row.

    f_i is an expert's load as a multiple of the mean, P_i the mean of its affinity as a share of all.
    """
    loss = mx.array(0.0)
    loads = []
    for routing, gate in zip(passed.routing, routers(model).values(), strict=True):
        length, experts = routing.affinities.shape[-2:]
        hits = (routing.indices[..., None] == mx.arange(experts, dtype=routing.indices.dtype)).sum(axis=(1, 2))
        hits = hits.astype(mx.float32)
        share = routing.affinities / routing.affinities.sum(axis=-1, keepdims=True)
        load = hits * (experts / (gate.top_k * length))
        loss = loss + (load * share.mean(axis=1)).sum(axis=-1).mean()
        loads.append(hits.sum(axis=0))
    return loss, mx.stop_gradient(mx.stack(loads))


def total(losses: Losses, mtp_weight: float, balance_weight: float) -> mx.array:
    """Return the loss that is differentiated."""
    return losses.main + mtp_weight * losses.ahead + balance_weight * losses.balance


def move_biases(model: Any, loads: mx.array, speed: float) -> None:
    """Move each router's correction bias by `speed` against its experts' surplus (DeepSeek-V3, section 2.1.2)."""
    for i, gate in enumerate(routers(model).values()):
        surplus = loads[i] - loads[i].mean()
        gate.e_score_correction_bias = gate.e_score_correction_bias - speed * mx.sign(surplus)
