"""AdamW and Muon over a flat table of f32 weights, with clipping by the global norm.

Muon (Jordan 2024) takes the matrices inside the layers: each update is the momentum with its singular values brought
to about one by five Newton-Schulz steps, batched over stacked experts. AdamW takes the rest: embedding, head, norms,
routers. Weight decay is decoupled, and spares vectors.

MLX's own optimizers run each of a dozen operations a weight over all of memory, and its Muon takes a stack of experts
for one long matrix.
"""

from __future__ import annotations

import math
from types import ModuleType

import mlx.core as mx

from edger1.train import adamw
from edger1.train.adamw import Rule, Table, clipped
from edger1.train.ops import Ops, extension
from edger1.train.pretrain.settings import Settings

_MOMENTUM = 0.95


def takes_muon(name: str, weight: mx.array) -> bool:
    """Whether Muon updates a weight: a matrix inside a layer, or a stack of them, that is no router."""
    outside = name.startswith(("lm_head.", "model.embed_tokens.")) or ".mlp.gate." in name
    return weight.ndim >= 2 and not outside


def trained(name: str) -> bool:
    """Whether gradients move a weight; a router's correction bias moves by its experts' load instead."""
    return not name.endswith("e_score_correction_bias")


class Optimizer:
    """Updates weights in place of their table; `state` is all that a run which goes on needs, with the step count."""

    def __init__(self, weights: Table, settings: Settings, ops: Ops) -> None:
        self.settings = settings
        self.ops = ops
        self.kernels: ModuleType | None = extension()
        self.step = 0
        names = [name for name in weights if trained(name)]
        self.muon = [n for n in names if settings.optimizer == "muon" and takes_muon(n, weights[n])]
        self.adam = [n for n in names if n not in set(self.muon)]
        self.state: Table = {f"m.{n}": mx.zeros_like(weights[n]) for n in names}
        self.state |= {f"v.{n}": mx.zeros_like(weights[n]) for n in self.adam}

    def update(self, weights: Table, gradients: Table, share: float, norm: float) -> Table:
        """Return the weights after a step at `share` of the peak rates; `norm` is the gradients' global norm."""
        s = self.settings
        self.step += 1
        scale = clipped(norm, s.clip)
        found: Table = {}
        for name in self.adam:
            found[name] = self._adamw(name, weights[name], gradients[name], share * s.learning_rate, scale)
        return found | self._muon(weights, gradients, share * s.muon_rate, scale)

    def _adamw(self, name: str, weight: mx.array, gradient: mx.array, rate: float, scale: float) -> mx.array:
        s = self.settings
        rule = Rule(s.beta1, s.beta2, s.weight_decay if weight.ndim >= 2 else 0.0)
        m, v = self.state.pop(f"m.{name}"), self.state.pop(f"v.{name}")
        weight, m, v = adamw.update(
            weight, gradient, m, v, rule, step=self.step, rate=rate, scale=scale, kernels=self.kernels
        )
        self.state[f"m.{name}"], self.state[f"v.{name}"] = m, v
        return weight

    def _muon(self, weights: Table, gradients: Table, rate: float, scale: float) -> Table:
        blend, fresh = self.ops.blend, (1 - _MOMENTUM) * scale
        ahead: list[mx.array] = []
        for name in self.muon:
            momentum = blend(self.state.pop(f"m.{name}"), _MOMENTUM, gradients[name], fresh)
            self.state[f"m.{name}"] = momentum
            # Nesterov's look ahead.
            ahead.append(blend(gradients[name], fresh, momentum, _MOMENTUM))
        found: Table = {}
        for name, update in zip(self.muon, self.ops.orthogonal(ahead), strict=True):
            # The root mean square of an orthogonal M x N matrix is max(M, N)^-1/2; tall ones are brought to N^-1/2.
            rows, columns = weights[name].shape[-2:]
            rate_here = rate * math.sqrt(max(1.0, rows / columns))
            found[name] = blend(weights[name], 1 - rate * self.settings.weight_decay, update, -rate_here)
        return found
