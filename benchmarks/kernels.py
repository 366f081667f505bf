"""Single kernels: EdgeR1 against what the machine gives, against NumPy, and against MLX as shipped.

    python -m benchmarks.kernels                    # everything, five rounds
    python -m benchmarks.kernels --only matmul      # one part: stack, matmul, gather, lora
    python -m benchmarks.kernels --quick            # one short round, to see that all of it runs

stack    decoding through 1 GB of random quantized matrices, against the read bandwidth measured on as large a buffer
matmul   1024 x 1024 x 1024 in f32, against NumPy's BLAS in a process of its own
gather   one token through 8 of 64 quantized experts of 2048 x 1024, against mx.gather_qmm
lora     forward and backward of LoRA on SmolLM2-135M, 4 x 256 tokens, against mlx-lm as shipped. mlx-lm takes minutes
         for each reading.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from benchmarks import bandwidth, common, peers
from benchmarks.common import Comparison, Measure
from benchmarks.worker import Side as Worker
from benchmarks.worker import SideUnavailableError

PRECISIONS = ("fast", "exact")
STACK_BYTES = 1 << 30
STACK_WIDTH = 4096
STACK_BARS = {"fast": 0.75, "exact": 0.55}
MATMUL_SIZE, MATMUL_BAR = 1024, 0.7
EXPERTS = {"experts": 64, "inputs": 2048, "outputs": 1024, "top": 8}
GATHER_BAR = 15.0
LORA_ROWS, LORA_TOKENS, LORA_BAR = 4, 256, 15.0


class Kernels:
    """One run: each part measures its sides in turns and returns its comparisons."""

    def __init__(self, threads: int, rounds: int, quick: bool) -> None:
        self._threads = threads
        self._rounds = rounds
        self._quick = quick
        self.notes: list[str] = []

    def stack(self) -> list[Comparison]:
        """Weight bytes a second against read bandwidth."""
        size = STACK_BYTES // 4 if self._quick else STACK_BYTES
        streams, huge_pages = bandwidth.fastest_way(size, self._threads)
        memory = bandwidth.ReadBandwidth(size, self._threads, streams=streams, huge_pages=huge_pages)
        with ExitStack() as up:
            up.callback(memory.close)
            arguments = {"size_bytes": size, "width": STACK_WIDTH}
            ours = self._ours(up, "quantized_stack", arguments)
            measures: dict[str, Measure] = {p: partial(worker.measure, repeats=3) for p, worker in ours.items()}
            measures["memory"] = lambda: {"rate": max(memory.read() for _ in range(5))}
            readings = common.interleave(measures, self._rounds)
        pages = "huge pages" if huge_pages else "small pages"
        peer = self._side(
            "memory read", f"{self._threads} threads, {streams} streams each, {pages}", readings["memory"]
        )
        return [
            Comparison(
                f"{size >> 20} MB of 4-bit matrices, one row, {precision} / read bandwidth",
                self._side("EdgeR1", precision, readings[precision]),
                peer,
                STACK_BARS[precision],
            )
            for precision in ours
        ]

    def matmul(self) -> list[Comparison]:
        """Dense f32 product against NumPy's."""
        size = MATMUL_SIZE
        with ExitStack() as up:
            numpy = self._worker(up, "numpy_matmul", {"size": size})
            ours = self._try(up, "matmul", {"size": size}, "EdgeR1's f32 matmul")
            if ours is None:
                return []
            sides = {"EdgeR1": ours, "NumPy": numpy}
            measures: dict[str, Measure] = {n: partial(worker.measure, repeats=10) for n, worker in sides.items()}
            readings = common.interleave(measures, self._rounds)
            peer = self._side("NumPy", str(numpy.info["blas"]), readings["NumPy"], 1e9, "GFLOP/s")
        side = self._side("EdgeR1", "f32", readings["EdgeR1"], 1e9, "GFLOP/s")
        return [Comparison(f"f32 matmul {size}^3 / NumPy", side, peer, MATMUL_BAR)]

    def gather(self) -> list[Comparison]:
        """Experts of one token against MLX's own gathered product."""
        what = "{experts} experts, {inputs}x{outputs}, top-{top}, one token".format(**EXPERTS)
        return self._against_shipped("gathered", EXPERTS, what, GATHER_BAR, {"repeats": 5 if self._quick else 20})

    def lora(self) -> list[Comparison]:
        """Training against mlx-lm's own."""
        rows, tokens = (1, 16) if self._quick else (LORA_ROWS, LORA_TOKENS)
        what = f"LoRA forward and backward, {rows} x {tokens} tokens"
        try:
            arguments = {"folder": str(peers.smollm2_folder())}
        except peers.PeerMissingError as error:
            self.notes.append(common.say_skipped("LoRA", str(error)))
            return []
        return self._against_shipped("lora", arguments, what, LORA_BAR, {"rows": rows, "tokens": tokens})

    def _against_shipped(
        self, function: str, arguments: Mapping[str, Any], what: str, bar: float, request: Mapping[str, Any]
    ) -> list[Comparison]:
        """Compare both precisions with MLX as shipped, the faster of with and without mx.compile."""
        probe = {"rows": 1, "tokens": 16} if function == "lora" else request
        with ExitStack() as up:
            ours = self._ours(up, function, arguments)
            found: list[tuple[float, str, Worker]] = []
            for settings, variables in (("compile on", {}), ("compile off", {"MLX_DISABLE_COMPILE": "1"})):
                worker = self._worker(up, function, {**arguments, "precision": None}, EDGER1_KERNELS="0", **variables)
                rate = worker.measure(**probe)["rate"]
                print(f"  MLX as shipped, {settings}: {rate:.4g}", file=sys.stderr, flush=True)
                found.append((rate, settings, worker))
            _, settings, shipped = max(found, key=lambda side: side[0])
            measures: dict[str, Measure] = {p: partial(worker.measure, **request) for p, worker in ours.items()}
            measures["MLX"] = partial(shipped.measure, **request)
            readings = common.interleave(measures, self._rounds)
        peer = self._side("MLX as shipped", f"f32, {settings}", readings["MLX"], 1, "tok/s")
        if not ours:
            self.notes.append(f"{what}: MLX as shipped alone reads {peer.median:.4g} tok/s")
        return [
            Comparison(
                f"{what}, {precision} / MLX as shipped",
                self._side("EdgeR1", precision, readings[precision], 1, "tok/s"),
                peer,
                bar,
            )
            for precision in ours
        ]

    def _ours(self, up: ExitStack, function: str, arguments: Mapping[str, Any]) -> dict[str, Worker]:
        """Bring EdgeR1's side up in each precision that runs here."""
        found = {
            precision: self._try(up, function, {**arguments, "precision": precision}, f"EdgeR1 {function} {precision}")
            for precision in PRECISIONS
        }
        return {precision: worker for precision, worker in found.items() if worker is not None}

    def _try(self, up: ExitStack, function: str, arguments: Mapping[str, Any], what: str) -> Worker | None:
        try:
            return self._worker(up, function, arguments)
        except SideUnavailableError as error:
            self.notes.append(common.say_skipped(what, str(error)))
            return None

    def _worker(self, up: ExitStack, function: str, arguments: Mapping[str, Any], **variables: str) -> Worker:
        environment = common.child_environment(self._threads, **variables)
        return up.enter_context(Worker(f"benchmarks.sides_kernels:{function}", arguments, environment))

    @staticmethod
    def _side(
        name: str, settings: str, readings: list[dict[str, float]], scale: float = 1e9, unit: str = "GB/s"
    ) -> common.Side:
        return common.Side(name, settings, unit, tuple(value / scale for value in common.column(readings, "rate")))


def main() -> int:
    """Measure, print, keep."""
    made = common.parser(__doc__)
    made.epilog = "parts: stack, matmul, gather, lora"
    options = common.parse(made)
    run = Kernels(options.threads, options.rounds, options.quick)
    parts: dict[str, Callable[[], list[Comparison]]] = {
        "stack": run.stack,
        "matmul": run.matmul,
        "gather": run.gather,
        "lora": run.lora,
    }
    if unknown := set(options.only) - set(parts):
        made.error(f"--only {unknown.pop()}: expected one of {', '.join(parts)}")
    comparisons: list[Comparison] = []
    for name in options.only or parts:
        print(f"{name}:", file=sys.stderr, flush=True)
        try:
            comparisons += parts[name]()
        except (peers.PeerMissingError, SideUnavailableError) as error:
            run.notes.append(common.say_skipped(name, str(error)))
    return common.finish("kernels", comparisons, options, notes=run.notes)


if __name__ == "__main__":
    raise SystemExit(main())
