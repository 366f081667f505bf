"""The sides of benchmarks of single kernels. Each runs in a worker process and gives one metric, `rate`.

`precision` chooses EdgeR1's kernels ("fast", "exact"); None is MLX as shipped.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import numpy as np

BITS, GROUP = 4, 64
LORA_RANK, LORA_SCALE, LORA_LAYERS = 8, 20.0, 16  # mlx-lm's own defaults

Rate = Callable[..., Mapping[str, float]]


def _seconds(work: Callable[[], object], repeats: int) -> float:
    """Return the mean time of `work` over `repeats` runs, after one that is not counted."""
    work()
    began = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - began) / repeats


def _kernel(module: str, function: str) -> Callable[..., Any]:
    """Return one of EdgeR1's kernels; raises RuntimeError where they are switched off or not built."""
    from edger1 import kernels

    if not kernels.state().available:
        raise RuntimeError(f"EdgeR1's kernels are {kernels.state().reason}")
    return cast("Callable[..., Any]", getattr(importlib.import_module(module), function))


def _quantized_kernel(function: str, precision: str | None) -> Callable[..., Any]:
    """Return EdgeR1's or, without a precision, MLX's quantized product of that name."""
    if precision is None:
        import mlx.core as mx

        return cast("Callable[..., Any]", getattr(mx, function))
    return partial(_kernel("edger1.kernels.quantized", function), precision=precision)


def _random_quantized(shape: tuple[int, ...], inputs: int, rng: np.random.Generator) -> tuple[Any, Any, Any]:
    """Return random codes, scales and biases (f32, what activations in f32 go with) of `shape` + (inputs,) weights.

    Scaled so that a chain of products keeps the size of its input.
    """
    import mlx.core as mx

    codes = mx.array(rng.integers(0, 1 << 32, (*shape, inputs * BITS // 32), dtype=np.uint32))
    # Codes 0..15 less 7.5 have a standard deviation of 4.6.
    scales = mx.full((*shape, inputs // GROUP), 1 / (4.6 * inputs**0.5), dtype=mx.float32)
    biases = -7.5 * scales
    mx.eval(codes, scales, biases)
    return codes, scales, biases


class QuantizedStack:
    """One row through a stack of random quantized matrices of `size_bytes`, as decoding does: bytes a second.

    The weights lie on huge pages, as far as the system gives them, because EdgeR1's loader puts them there; `info`
    tells how many bytes do.
    """

    def __init__(self, size_bytes: int, width: int, precision: str | None) -> None:
        import mlx.core as mx

        from edger1.kernels.pages import use_huge_pages

        rng = np.random.default_rng(0)
        one = sum(part.nbytes for part in _random_quantized((width,), width, rng))
        self._stack = [_random_quantized((width,), width, rng) for _ in range(size_bytes // one)]
        self._product = _quantized_kernel("quantized_matmul", precision)
        self._start = mx.array(rng.standard_normal((1, width), dtype=np.float32))
        huge = sum(use_huge_pages(matrix) for matrix in self._stack)
        self.info = {"bytes": one * len(self._stack), "huge_bytes": huge}

    def _decode(self) -> None:
        import mlx.core as mx

        x = self._start
        for codes, scales, biases in self._stack:
            x = self._product(x, codes, scales, biases, transpose=True, group_size=GROUP, bits=BITS)
        mx.eval(x)

    def __call__(self, repeats: int) -> dict[str, float]:
        return {"rate": self.info["bytes"] / _seconds(self._decode, repeats)}


def quantized_stack(**arguments: Any) -> QuantizedStack:
    """Set up the stack."""
    return QuantizedStack(**arguments)


def matmul(size: int) -> Rate:
    """The f32 product of two square matrices through EdgeR1's kernels: floating-point operations a second."""
    import mlx.core as mx

    product = _kernel("edger1.kernels._ext", "matmul")
    rng = np.random.default_rng(0)
    a, b = (mx.array(rng.standard_normal((size, size), dtype=np.float32)) for _ in range(2))
    mx.eval(a, b)

    def rate(repeats: int) -> dict[str, float]:
        return {"rate": 2 * size**3 / _seconds(lambda: mx.eval(product(a, b)), repeats)}

    return rate


class NumpyMatmul:
    """The same through NumPy. `info` tells which BLAS it is and for which processor that chose its kernels."""

    def __init__(self, size: int) -> None:
        left_over = [name for name in os.environ if name.startswith(("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"))]
        if left_over:
            raise RuntimeError(f"{left_over} would steer OpenBLAS; a peer chooses by itself")
        rng = np.random.default_rng(0)
        self._a, self._b = (rng.standard_normal((size, size), dtype=np.float32) for _ in range(2))
        self.info = {"blas": _blas()}

    def __call__(self, repeats: int) -> dict[str, float]:
        return {"rate": 2 * len(self._a) ** 3 / _seconds(lambda: self._a @ self._b, repeats)}


def _blas() -> str:
    try:
        threadpoolctl = importlib.import_module("threadpoolctl")
    except ImportError:
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        return f"{blas['name']} {blas['version']} (install threadpoolctl to see its kernels)"
    found = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    return ", ".join(
        f"{pool['internal_api']} {pool['version']} for {pool.get('architecture', 'an unknown processor')}, "
        f"{pool['num_threads']} threads"
        for pool in found
    )


def numpy_matmul(size: int) -> NumpyMatmul:
    """Set up NumPy's side."""
    return NumpyMatmul(size)


def gathered(experts: int, inputs: int, outputs: int, top: int, precision: str | None) -> Rate:
    """One token through `top` of `experts` quantized matrices (outputs x inputs), others each time: tokens a second."""
    import mlx.core as mx

    rng = np.random.default_rng(0)
    codes, scales, biases = _random_quantized((experts, outputs), inputs, rng)
    product = _quantized_kernel("gather_qmm", precision)
    x = mx.array(rng.standard_normal((1, 1, 1, inputs), dtype=np.float32))
    chosen = [mx.array(rng.choice(experts, (1, top), replace=False).astype(np.uint32)) for _ in range(64)]
    mx.eval(x, chosen)
    turn = 0

    def token() -> None:
        nonlocal turn
        turn += 1
        mx.eval(
            product(
                x,
                codes,
                scales,
                biases,
                rhs_indices=chosen[turn % len(chosen)],
                transpose=True,
                group_size=GROUP,
                bits=BITS,
            )
        )

    def rate(repeats: int) -> dict[str, float]:
        return {"rate": 1 / _seconds(token, repeats)}

    return rate


def lora(folder: str, precision: str | None) -> Rate:
    """Forward and backward of LoRA over the quantized model, as mlx-lm's trainer does it: tokens a second.

    mlx-lm's model, LoRA layers (rank 8 on every linear layer of the last 16 blocks) and loss; f32 activations.
    """
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm import load
    from mlx_lm.tuner.trainer import default_loss
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = load(folder)[0]
    model.set_dtype(mx.float32)
    model.freeze()
    mx.random.seed(0)
    linear_to_lora_layers(model, LORA_LAYERS, {"rank": LORA_RANK, "scale": LORA_SCALE, "dropout": 0.0})
    if precision is not None:
        _kernel("edger1.kernels.install", "install")(model, precision)
    model.train()
    mx.eval(model.parameters())
    step = nn.value_and_grad(model, default_loss)
    vocabulary = model.args.vocab_size

    def rate(rows: int, tokens: int) -> dict[str, float]:
        # The loss predicts each next token, so one more than `tokens` goes in.
        batch = mx.random.randint(0, vocabulary, (rows, tokens + 1))
        lengths = mx.array([[0, tokens]] * rows)
        mx.eval(batch, lengths)
        began = time.perf_counter()
        mx.eval(step(model, batch, lengths))
        return {"rate": rows * tokens / (time.perf_counter() - began)}

    rate(rows=1, tokens=8)
    return rate
