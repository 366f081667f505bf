"""Compares every kernel with MLX's own result on this machine and times both: what `edger1 doctor --selftest` writes.

The answer is plain JSON, so that the owner of another machine can send what they saw. Nothing is read from disk and no
model is needed; the whole takes less than a minute, the quick form (checks only) a few seconds.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from edger1.kernels import _load, functions, quantized

EXACT_LIMIT = 1e-5
# int8 activations: half a step in 127, over sums whose errors mostly cancel.
FAST_LIMIT = 3e-2
_TIME_LIMIT_S = 50.0

Compute = Callable[[], mx.array]
Operation = Callable[..., mx.array]


@dataclass(frozen=True)
class Check:
    """One kernel against MLX's own operation: the largest difference over the largest value."""

    name: str
    relative_error: float
    limit: float
    ok: bool


@dataclass(frozen=True)
class Timing:
    """Medians in microseconds of one operation, ours and MLX's, evaluated one at a time."""

    name: str
    kernel_us: float
    mlx_us: float
    speedup: float


@dataclass(frozen=True)
class _Case:
    name: str
    ours: Compute
    theirs: Compute
    limit: float = EXACT_LIMIT


def selftest(quick: bool = False) -> dict[str, Any]:
    """Check every kernel and, unless `quick`, time it; return a report of plain JSON values.

    `ok` is whether every check held; it is False, with a reason, where the kernels cannot run at all. Raises
    RuntimeError while a model has the kernels installed, since MLX's functions are then not MLX's.
    """
    if functions.in_place():
        raise RuntimeError("the self test compares with MLX's own functions: run it before a model is loaded")
    started = time.perf_counter()
    extension, state = _load()
    report: dict[str, Any] = {
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "python": platform.python_version(),
            "mlx": version("mlx"),
            "device": str(mx.default_device()),
        },
        "kernels": {
            "available": state.available,
            "reason": state.reason,
            "instruction_sets": list(state.instruction_sets),
        },
        "ok": False,
        "checks": [],
        "timings": [],
    }
    if extension is None or mx.default_device().type != mx.cpu:
        return report
    report["kernels"] |= {"active": extension.active_instruction_set(), "threads": extension.threads()}
    mx.random.seed(0)
    checks = [_check(case) for case in _cases(extension, large=False)]
    report["checks"] = [asdict(check) for check in checks]
    report["ok"] = all(check.ok for check in checks)
    if not quick:
        for case in _cases(extension, large=True):
            if time.perf_counter() - started > _TIME_LIMIT_S:
                report["timings_cut_short"] = True
                break
            report["timings"].append(asdict(_time(case)))
    report["seconds"] = round(time.perf_counter() - started, 2)
    return report


def _check(case: _Case) -> Check:
    ours, theirs = case.ours().astype(mx.float32), case.theirs().astype(mx.float32)
    if ours.shape != theirs.shape:
        return Check(case.name, float("inf"), case.limit, False)
    found: Any = mx.abs(ours - theirs).max() / mx.maximum(mx.abs(theirs).max(), 1e-9)
    error = float(found.item())
    return Check(case.name, error, case.limit, error <= case.limit)


def _time(case: _Case) -> Timing:
    ours, theirs = _median_us(case.ours), _median_us(case.theirs)
    return Timing(case.name, round(ours, 1), round(theirs, 1), round(theirs / ours, 2))


def _median_us(compute: Compute, budget_s: float = 0.5) -> float:
    mx.eval(compute())
    readings: list[float] = []
    deadline = time.perf_counter() + budget_s
    while len(readings) < 3 or (len(readings) < 50 and time.perf_counter() < deadline):
        before = time.perf_counter()
        mx.eval(compute())
        readings.append((time.perf_counter() - before) * 1e6)
    return statistics.median(readings)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _cases(extension: Any, large: bool) -> Iterator[_Case]:
    """Each kernel on odd sizes (for checking) or on those of a small model (for timing)."""
    rows = (1, 512) if large else (1, 7, 33)
    hidden, inner, vocabulary = (576, 1536, 49152) if large else (96, 161, 1003)
    for m in rows:
        yield from _row_cases(extension, m, hidden, inner)
        yield from _attention_cases(extension, m, 64 if m == 1 else m)
        yield from _matmul_cases(extension, m, hidden, inner)
        yield from _quantized_cases(m, 576 if large else 128, inner)
    logits = _random(1, vocabulary)
    yield _Case("argmax", lambda: extension.argmax(logits, -1), lambda: mx.argmax(logits, -1))
    yield _Case("logsumexp", lambda: extension.logsumexp(logits, -1), lambda: mx.logsumexp(logits, -1))
    yield from _choosing_cases(extension, logits)
    yield from _stored_cases(extension, 1024 if large else 100)
    yield from _gather_cases(extension, 128 if large else 32)
    yield from _expert_cases(extension, 512 if large else 64)
    if not large:
        yield from _gradient_cases(extension)


def _random(*shape: int) -> mx.array:
    values = mx.random.normal(shape)
    mx.eval(values)
    return values


def _row_cases(extension: Any, m: int, hidden: int, inner: int) -> Iterator[_Case]:
    x, weight, bias = _random(1, m, hidden), _random(hidden), _random(hidden)
    gate, up = _random(1, m, inner), _random(1, m, inner)
    heads = _random(1, m, 9, 64).transpose(0, 2, 1, 3)
    at = f" {m} rows"
    yield _Case("rms_norm" + at, lambda: extension.rms_norm(x, weight, 1e-5), lambda: mx.fast.rms_norm(x, weight, 1e-5))
    yield _Case(
        "layer_norm" + at,
        lambda: extension.layer_norm(x, weight, bias, 1e-5),
        lambda: mx.fast.layer_norm(x, weight, bias, 1e-5),
    )
    yield _Case("softmax" + at, lambda: extension.softmax(gate, -1), lambda: mx.softmax(gate, -1))
    yield _Case("swiglu" + at, lambda: extension.swiglu(gate, up), lambda: gate * mx.sigmoid(gate) * up)
    yield _Case("gelu" + at, lambda: extension.gelu(gate), lambda: gate * (1 + mx.erf(gate / 2**0.5)) / 2)
    for traditional in (False, True):
        settings: dict[str, Any] = {"traditional": traditional, "base": 1e4, "scale": 1.0, "offset": 5}
        yield _Case(
            f"rope{' traditional' if traditional else ''}" + at,
            partial(extension.rope, heads, 64, **settings),
            partial(mx.fast.rope, heads, 64, **settings),
        )


def _attention_cases(extension: Any, m: int, keys: int) -> Iterator[_Case]:
    q = _random(1, m, 9, 64).transpose(0, 2, 1, 3)
    k, v = _random(1, 3, keys + 5, 64)[:, :, :keys], _random(1, 3, keys + 5, 64)[:, :, :keys]
    window = mx.arange(keys - m, keys)[:, None] - mx.arange(keys)[None]
    masks: dict[str, Any] = {"": None} if m == 1 else {" causal": "causal", " window": (window >= 0) & (window < 16)}
    for name, mask in masks.items():
        settings: dict[str, Any] = {"scale": 0.125, "mask": mask}
        yield _Case(
            f"attention{name} {m} rows {keys} keys",
            partial(extension.scaled_dot_product_attention, q, k, v, **settings),
            partial(mx.fast.scaled_dot_product_attention, q, k, v, **settings),
        )


def _matmul_cases(extension: Any, m: int, k: int, n: int) -> Iterator[_Case]:
    x, w = _random(m, k), _random(n, k)
    for dtype in (mx.float32, mx.bfloat16):
        weights = w.astype(dtype)
        mx.eval(weights)
        yield _Case(
            f"matmul {m} x {k} x {n} {str(dtype).rpartition('.')[2]}",
            partial(extension.matmul, x, weights.T),
            partial(mx.matmul, x, weights.T),
        )


def _quantized_cases(m: int, k: int, n: int) -> Iterator[_Case]:
    x, w = _random(m, k), _random(n, k)
    for group_size, bits, mode in ((32, 4, "affine"), (64, 8, "affine"), (32, 4, "mxfp4")):
        parts: Any = mx.quantize(w, group_size, bits, mode=mode)
        mx.eval(parts)
        settings: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": mode}
        theirs = partial(mx.quantized_matmul, x, *parts, **settings)
        for precision, limit in (("exact", EXACT_LIMIT), ("fast", FAST_LIMIT)):
            ours = partial(quantized.quantized_matmul, x, *parts, **(settings | {"precision": precision}))
            yield _Case(f"quantized_matmul {precision} {m} x {k} x {n} {mode} {bits} bits", ours, theirs, limit)


def _choosing_cases(extension: Any, logits: mx.array) -> Iterator[_Case]:
    k = min(40, logits.shape[-1] - 1)
    yield _Case("sort", lambda: extension.sort(logits), lambda: mx.sort(logits))
    yield _Case("argsort", lambda: extension.argsort(logits), lambda: mx.argsort(logits))
    yield _Case("topk", lambda: extension.topk(logits, k).sum(-1), lambda: mx.topk(logits, k).sum(-1))

    def likeliest() -> mx.array:
        # With so little of the mass kept one token is left, whatever the random number.
        return extension.draw_token(logits.reshape(1, -1), 1, top_p=1e-6)

    yield _Case("draw_token", likeliest, lambda: mx.argmax(logits.reshape(1, -1), axis=-1))


def _stored_cases(extension: Any, keys: int) -> Iterator[_Case]:
    """What is kept quantized and read back: embeddings and KV caches."""
    w, scales, biases = mx.quantize(_random(256, 512), 32, 4)
    at = mx.arange(3, 7)
    yield _Case(
        "embedding 4 bits",
        lambda: extension.dequantized_rows(w, scales, biases, at, group_size=32, bits=4),
        lambda: mx.dequantize(w[at], scales[at], biases[at], 32, 4),
    )
    q, k, v = _random(1, 9, 1, 64), _random(1, 3, keys, 64), _random(1, 3, keys, 64)
    stored = [tuple(mx.quantize(a, 64, 8)) for a in (k, v)]

    def theirs() -> mx.array:
        (keys_w, keys_scales, keys_biases), (values_w, values_scales, values_biases) = stored
        scores = mx.quantized_matmul(
            q.reshape(1, 3, 3, 64) / 8, keys_w, keys_scales, keys_biases, group_size=64, bits=8
        )
        mixed = mx.quantized_matmul(
            mx.softmax(scores, axis=-1), values_w, values_scales, values_biases, False, group_size=64, bits=8
        )
        return mixed.reshape(1, 9, 1, 64)

    yield _Case(
        f"attention over 8-bit keys, {keys} keys",
        lambda: extension.quantized_attention(q, *stored, 1 / 8, None, 64, 8),
        theirs,
    )


def _gather_cases(extension: Any, size: int) -> Iterator[_Case]:
    x, w = _random(3, 1, 1, size), _random(8, 2 * size, size)
    chosen = mx.array([[0, 3], [3, 7], [1, 0]])
    yield _Case(
        "gather_mm",
        lambda: extension.gather_mm(x, w.swapaxes(-1, -2), rhs_indices=chosen),
        lambda: mx.gather_mm(x, w.swapaxes(-1, -2), rhs_indices=chosen),
    )
    parts: Any = mx.quantize(w, 32, 4)
    settings: dict[str, Any] = {"rhs_indices": chosen, "group_size": 32, "bits": 4}
    yield _Case(
        "gather_qmm",
        lambda: quantized.gather_qmm(x, *parts, **settings),
        lambda: mx.gather_qmm(x, *parts, **settings),
    )


def _expert_cases(extension: Any, size: int) -> Iterator[_Case]:
    """Experts with their weighted sum, some rows an expert and many."""
    weights = {name: _random(8, 2 * size, size) / size**0.5 for name in ("gate", "up")}
    weights["down"] = _random(8, size, 2 * size) / size**0.5
    parts: dict[str, Any] = {name: mx.quantize(w, 32, 4) for name, w in weights.items()}
    for rows in (3, 80):
        x, shares = _random(rows, size), mx.random.uniform(shape=(rows, 2))
        chosen = mx.random.randint(0, 8, (rows, 2)).astype(mx.uint32)

        def theirs(x: mx.array = x, shares: mx.array = shares, chosen: mx.array = chosen) -> mx.array:
            gathered = partial(mx.gather_qmm, rhs_indices=chosen, group_size=32, bits=4)
            up, gate = (gathered(x[:, None, None], *parts[name]) for name in ("up", "gate"))
            down = gathered(gate * mx.sigmoid(gate) * up, *parts["down"])[..., 0, :]
            return (down * shares[..., None]).sum(axis=-2)

        for precision, limit in (("exact", EXACT_LIMIT), ("fast", FAST_LIMIT)):
            experts = extension.Experts(precision=precision)
            for name, part in parts.items():
                experts.project(name, *part, group_size=32)
            experts.finish()
            yield _Case(f"experts {precision} {rows} rows", partial(experts, x, chosen, shares), theirs, limit)


def _gradient_cases(extension: Any) -> Iterator[_Case]:
    x, weight, w = _random(5, 48), _random(48), _random(29, 48)
    q, k, v = (_random(1, heads, 20, 16) for heads in (4, 2, 2))
    direction = _random(5, 48)

    def both(name: str, ours: Operation, theirs: Operation, *at: mx.array) -> _Case:
        def gradient(f: Operation) -> Compute:
            found = mx.grad(lambda *args: (f(*args) * mx.sin(f(*args))).sum(), argnums=tuple(range(len(at))))
            return lambda: mx.concatenate([part.reshape(-1) for part in found(*at)])

        return _Case(f"gradient of {name}", gradient(ours), gradient(theirs), 1e-4)

    yield both(
        "rms_norm", lambda a, b: extension.rms_norm(a, b, 1e-5), lambda a, b: mx.fast.rms_norm(a, b, 1e-5), x, weight
    )
    yield both("matmul", lambda a, b: extension.matmul(a, b.T), lambda a, b: mx.matmul(a, b.T), x, w)
    yield both("swiglu", extension.swiglu, lambda a, b: nn.silu(a) * b, x, direction)
    yield both("softmax", lambda a: extension.softmax(a, -1), lambda a: mx.softmax(a, -1), x)
    settings: dict[str, Any] = {"scale": 0.25, "mask": "causal"}
    yield both(
        "attention",
        lambda *qkv: extension.scaled_dot_product_attention(*qkv, **settings),
        lambda *qkv: mx.fast.scaled_dot_product_attention(*qkv, **settings),
        q,
        k,
        v,
    )
