"""Single kernels: EdgeR1 against what the machine gives, against NumPy, and against MLX as shipped.

    python -m benchmarks.kernels                    # everything, five rounds
    python -m benchmarks.kernels --only matmul      # one part: stack, matmul, gather, lora
    python -m benchmarks.kernels --quick            # one short round, to see that all of it runs

stack    decoding through 1 GB of random quantized matrices, against the read bandwidth measured on as large a buffer
matmul   1024 x 1024 x 1024 in f32, against NumPy's BLAS in a process of its own
gather   one token through 8 of 64 quantized experts of 2048 x 1024, against mx.gather_qmm
lora     forward and backward of LoRA on SmolLM2-135M, 4 x 256 tokens, against mlx-lm as shipped, which takes minutes
         for each reading and therefore gets three
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from benchmarks import bandwidth, bench, peers
from benchmarks.bench import Bench, side
from benchmarks.common import Comparison, Measure
from benchmarks.worker import SideUnavailableError

STACK_BYTES = 1 << 30
STACK_WIDTH = 4096
STACK_BARS = {"fast": 0.75, "exact": 0.55}
MATMUL_SIZE, MATMUL_BAR = 1024, 0.7
EXPERTS = {"experts": 64, "inputs": 2048, "outputs": 1024, "top": 8}
GATHER_BAR = 15.0
LORA_ROWS, LORA_TOKENS, LORA_BAR = 4, 256, 15.0
LORA_PEER_ROUNDS = 3


def stack(run: Bench) -> list[Comparison]:
    """Weight bytes a second against read bandwidth."""
    size = STACK_BYTES // 4 if run.quick else STACK_BYTES
    streams, huge_pages = bandwidth.fastest_way(size, run.threads)
    memory = bandwidth.ReadBandwidth(size, run.threads, streams=streams, huge_pages=huge_pages)
    try:
        ours = run.ours("sides_kernels:quantized_stack", {"size_bytes": size, "width": STACK_WIDTH})
        measures: dict[str, Measure] = {p: partial(worker.measure, repeats=3) for p, worker in ours.items()}
        measures["memory"] = lambda: {"rate": max(memory.read() for _ in range(5))}
        readings = run.interleave(measures)
    finally:
        memory.close()
    pages = "huge pages" if huge_pages else "small pages"
    settings = f"{run.threads} threads, {streams} streams each, {pages}"
    return [
        Comparison(
            f"{size >> 20} MB of 4-bit matrices, one row, {precision} / read bandwidth",
            side(
                "EdgeR1",
                f"{precision}, {worker.info['huge_bytes'] / worker.info['bytes']:.0%} on huge pages",
                readings[precision],
                unit="GB/s",
                per=1e9,
            ),
            side("memory read", settings, readings["memory"], unit="GB/s", per=1e9),
            STACK_BARS[precision],
        )
        for precision, worker in ours.items()
    ]


def matmul(run: Bench) -> list[Comparison]:
    """Dense f32 product against NumPy's."""
    size = MATMUL_SIZE
    numpy = run.worker("sides_kernels:numpy_matmul", {"size": size})
    try:
        ours = run.worker("sides_kernels:matmul", {"size": size})
    except SideUnavailableError as error:
        run.skip("EdgeR1's f32 matmul", str(error))
        return []
    readings = run.interleave(
        {"EdgeR1": partial(ours.measure, repeats=10), "NumPy": partial(numpy.measure, repeats=10)}
    )
    return [
        Comparison(
            f"f32 matmul {size}^3 / NumPy",
            side("EdgeR1", "f32", readings["EdgeR1"], unit="GFLOP/s", per=1e9),
            side("NumPy", str(numpy.info["blas"]), readings["NumPy"], unit="GFLOP/s", per=1e9),
            MATMUL_BAR,
        )
    ]


def gather(run: Bench) -> list[Comparison]:
    """Experts of one token against MLX's own gathered product."""
    what = "{experts} experts, {inputs}x{outputs}, top-{top}, one token".format(**EXPERTS)
    request = {"repeats": 5 if run.quick else 20}
    return against_shipped(run, "sides_kernels:gathered", EXPERTS, what, GATHER_BAR, request)


def lora(run: Bench) -> list[Comparison]:
    """Training against mlx-lm's own."""
    rows, tokens = (1, 16) if run.quick else (LORA_ROWS, LORA_TOKENS)
    return against_shipped(
        run,
        "sides_kernels:lora",
        {"folder": str(peers.smollm2_folder())},
        f"LoRA forward and backward, {rows} x {tokens} tokens",
        LORA_BAR,
        {"rows": rows, "tokens": tokens},
        probe={"rows": 1, "tokens": 16},
        peer_rounds=LORA_PEER_ROUNDS,
    )


def against_shipped(
    run: Bench,
    function: str,
    arguments: Mapping[str, Any],
    what: str,
    bar: float,
    request: Mapping[str, Any],
    *,
    probe: Mapping[str, Any] | None = None,
    peer_rounds: int | None = None,
) -> list[Comparison]:
    """Compare both precisions with MLX as shipped, the faster of with and without mx.compile at `probe`.

    `peer_rounds` limits the readings of a peer that takes minutes for one; the result states how many it got.
    """
    ours = run.ours(function, arguments)
    shipped, settings = run.shipped(function, arguments, probe or request)
    measures: dict[str, Measure] = {p: partial(worker.measure, **request) for p, worker in ours.items()}
    measures["MLX"] = partial(shipped.measure, **request)
    readings = run.interleave(measures, fewer={} if peer_rounds is None else {"MLX": peer_rounds})
    if len(readings["MLX"]) < run.rounds:
        settings += f", {len(readings['MLX'])} readings"
    peer = side("MLX as shipped", settings, readings["MLX"])
    if not ours:
        run.notes.append(f"{what}: MLX as shipped alone reads {peer.median:.4g} tok/s")
    return [
        Comparison(f"{what}, {precision} / MLX as shipped", side("EdgeR1", precision, readings[precision]), peer, bar)
        for precision in ours
    ]


PARTS = {"stack": stack, "matmul": matmul, "gather": gather, "lora": lora}

if __name__ == "__main__":
    raise SystemExit(bench.main("kernels", __doc__, PARTS))
