"""The sides of the training benchmark; `precision` None is mlx-lm and MLX as shipped."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

VOCABULARY = 2048
CONFIGS = Path(__file__).parents[1] / "recipes" / "nano" / "configs"

Rate = Callable[..., Mapping[str, float]]


def pretrain(model: str, precision: str | None) -> Rate:
    """Whole training steps on random tokens: tokens a second."""
    from edger1.train.pretrain import settings

    config, chosen = settings.read(CONFIGS / f"nano-{model}.toml")
    step = _shipped(config) if precision is None else _ours(config, chosen, precision)

    def rate(rows: int, tokens: int) -> dict[str, float]:
        step(rows, tokens)
        began = time.perf_counter()
        step(rows, tokens)
        return {"rate": rows * tokens / (time.perf_counter() - began)}

    return rate


def _ours(config: dict[str, Any], settings: Any, precision: str) -> Callable[[int, int], None]:
    import mlx.core as mx
    import numpy as np

    from edger1 import kernels
    from edger1.kernels.install import install
    from edger1.train.adamw import global_norm
    from edger1.train.ops import Ops, extension
    from edger1.train.pretrain import losses, model
    from edger1.train.pretrain.optimizer import Optimizer, trained

    if not kernels.state().available:
        raise RuntimeError(f"EdgeR1's kernels are {kernels.state().reason}")
    made = model.build(config, VOCABULARY)
    install(made, "exact", fuse=False)
    mx.set_cache_limit(8 << 30)
    ops = Ops(precision == "fast")
    optimizer = Optimizer(model.parameters(made), settings, ops)
    generator = np.random.default_rng(0)

    def loss(weights: dict[str, mx.array], batch: losses.Batch) -> mx.array:
        model.assign(made, weights)
        return losses.total(losses.compute(made, batch, ops), 0.3, 1e-4)

    gradient = mx.value_and_grad(loss)

    def step(rows: int, tokens: int) -> None:
        shape = (rows, tokens)
        # One document a row, which costs attention most.
        batch = losses.batch_of(
            generator.integers(0, VOCABULARY, shape), np.zeros(shape, np.int64), np.ones(shape, bool)
        )
        weights = {n: w for n, w in model.parameters(made).items() if trained(n)}
        _, gradients = gradient(weights, batch)
        norm = global_norm(gradients, extension())
        mx.eval(norm, gradients)
        model.assign(made, optimizer.update(weights, gradients, 1e-3, float(norm.item())))
        del weights, gradients
        mx.eval(made.parameters(), optimizer.state)

    return step


def _shipped(config: dict[str, Any]) -> Callable[[int, int], None]:
    import importlib

    import mlx.core as mx
    import mlx.nn as nn
    from mlx.optimizers import AdamW, clip_grad_norm

    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict({**config, "vocab_size": VOCABULARY}))
    model.set_dtype(mx.float32)
    model.train()
    optimizer = AdamW(1e-4)

    def loss(tokens: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")

    gradient = nn.value_and_grad(model, loss)

    def step(rows: int, tokens: int) -> None:
        _, gradients = gradient(mx.random.randint(0, VOCABULARY, (rows, tokens + 1)))
        gradients, _ = clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)

    return step
