"""A whole model: EdgeR1 against mlx-lm as shipped and against llama.cpp, SmolLM2-135M.

    python -m benchmarks.speed                # everything, five rounds
    python -m benchmarks.speed --only llama   # one peer
    python -m benchmarks.speed --quick        # one short round, to see that all of it runs

Prefill is 512 tokens from an empty cache; decoding is 128 tokens after a prompt of 64 (and after 1,024, for EdgeR1
alone). EdgeR1 is measured through its public API with sampling and detokenizing; the peers without: mlx-lm through its
generate_step in f32 (its fastest dtype on a CPU), llama.cpp through its own llama-bench at the fastest of its settings.
All run the same file: EdgeR1 and mlx-lm its lossless conversion, llama.cpp the GGUF itself (Q4_1) and requantizations.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

from benchmarks import common, peers
from benchmarks.common import Comparison, Measure, Side
from benchmarks.worker import Side as Worker
from benchmarks.worker import SideUnavailableError

PREFILL, PROMPT, GENERATE, LONG = 512, 64, 128, 1024
PRECISIONS = ("fast", "exact")

# Bars hold for the default precision, which is the one that llama.cpp's own arithmetic corresponds to.
DECODE_BARS = {"mlx-lm": 9.0, "Q4_0": 1.1, "Q4_1": 1.3, "Q8_0": 1.3}
PREFILL_BARS = {"mlx-lm": 100.0, "Q4_0": 2.0}
LONG_CONTEXT_BAR = 0.8

Readings = dict[str, list[dict[str, float]]]


class Speed:
    """One run: the sides that are up, and what could not be measured."""

    def __init__(self, threads: int, quick: bool, stack: ExitStack) -> None:
        self._threads = threads
        self._stack = stack
        self._lengths = (64, 16, 16, 128) if quick else (PREFILL, PROMPT, GENERATE, LONG)
        self.notes: list[str] = []
        self.settings: dict[str, str] = {}

    def ours(self) -> dict[str, Measure]:
        """Bring EdgeR1 up in each precision."""
        folder = str(peers.smollm2_folder())
        measures: dict[str, Measure] = {}
        for precision in PRECISIONS:
            arguments = {"folder": folder, "precision": precision}
            try:
                worker = self._worker("engine", arguments)
            except SideUnavailableError as error:
                self.notes.append(common.say_skipped(f"EdgeR1 {precision}", str(error)))
                continue
            kernels = "kernels" if worker.info["kernels"] else "WITHOUT kernels"
            self.settings[precision] = f"{precision}, {kernels}"
            if not worker.info["kernels"]:
                self.notes.append(
                    f"EdgeR1 ({precision}) ran without its kernels: the figures are MLX's own operations'"
                )
            measures[precision] = partial(self._model_reading, worker, long=True)
        return measures

    def mlx_lm(self) -> dict[str, Measure]:
        """Bring mlx-lm up the faster way, with or without mx.compile."""
        folder = str(peers.smollm2_folder())
        found: list[tuple[float, str, Worker]] = []
        for settings, variables in (("compile on", {}), ("compile off", {"MLX_DISABLE_COMPILE": "1"})):
            try:
                worker = self._worker("mlx_lm", {"folder": folder}, **variables)
                rate = worker.measure(prompt=8, generate=16)["decode"]
            except SideUnavailableError as error:
                self.notes.append(common.say_skipped(f"mlx-lm, {settings}", str(error)))
                continue
            print(f"  mlx-lm f32, {settings}: {rate:.2f} tok/s decoding", file=sys.stderr, flush=True)
            found.append((rate, settings, worker))
        if not found:
            return {}
        _, settings, worker = max(found, key=lambda side: side[0])
        for _, _, other in found:
            if other is not worker:
                other.close()
        self.settings["mlx-lm"] = f"as shipped, f32, {settings}"
        return {"mlx-lm": partial(self._model_reading, worker, long=False)}

    def llama_cpp(self) -> dict[str, Measure]:
        """Find llama.cpp's fastest settings for each quantization, for prefill and decoding apart."""
        prefill, _, generate, _ = self._lengths
        measures: dict[str, Measure] = {}
        for kind in peers.QUANTIZATIONS:
            try:
                model = peers.smollm2_quantized(kind)
                for_prefill = peers.fastest_settings(model, threads=self._threads, prompt=prefill, generate=0)
                for_decode = peers.fastest_settings(model, threads=self._threads, prompt=0, generate=generate)
            except peers.PeerMissingError as error:
                self.notes.append(common.say_skipped(f"llama.cpp {kind}", str(error)))
                continue
            self.settings[f"{kind} prefill"], self.settings[f"{kind} decode"] = str(for_prefill), str(for_decode)
            measures[kind] = partial(self._llama_reading, model, for_prefill, for_decode)
        return measures

    def _worker(self, function: str, arguments: Mapping[str, str], **variables: str) -> Worker:
        environment = common.child_environment(self._threads, **variables)
        return self._stack.enter_context(Worker(f"benchmarks.sides_model:{function}", arguments, environment))

    def _model_reading(self, worker: Worker, *, long: bool) -> dict[str, float]:
        prefill, prompt, generate, far = self._lengths
        short_prompt = worker.measure(prompt=prompt, generate=generate)
        reading = {
            "prefill": worker.measure(prompt=prefill, generate=0)["prefill"],
            "prefill of 64": short_prompt["prefill"],
            "decode": short_prompt["decode"],
        }
        if long:
            reading["decode at 1024"] = worker.measure(prompt=far, generate=min(generate, 64))["decode"]
        return reading

    def _llama_reading(
        self, model: peers.Path, for_prefill: peers.LlamaSettings, for_decode: peers.LlamaSettings
    ) -> dict[str, float]:
        prefill, prompt, generate, _ = self._lengths
        bench = partial(peers.llama_bench, model, threads=self._threads)
        return {
            "prefill": bench(for_prefill, prompt=prefill)[0],
            "prefill of 64": bench(for_prefill, prompt=prompt)[0],
            "decode": bench(for_decode, generate=generate, depth=prompt)[0],
        }

    def side(self, name: str, metric: str, readings: Readings) -> Side:
        """Describe one side's readings of one metric."""
        settings = self.settings.get(name) or self.settings[f"{name} {metric.split()[0]}"]
        shown = {"mlx-lm": "mlx-lm", **dict.fromkeys(PRECISIONS, "EdgeR1")}.get(name, f"llama.cpp {name}")
        return Side(shown, settings, "tok/s", common.column(readings[name], metric))


def compare(run: Speed, readings: Readings) -> list[Comparison]:
    """Hold each precision against each peer, and decoding far into the context against decoding near its start."""
    made: list[Comparison] = []
    for precision in (p for p in PRECISIONS if p in readings):
        for peer in (name for name in readings if name not in PRECISIONS):
            for metric, bars in (("decode", DECODE_BARS), ("prefill", PREFILL_BARS), ("prefill of 64", {})):
                made.append(
                    Comparison(
                        f"{metric}, {precision} / {peer}",
                        run.side(precision, metric, readings),
                        run.side(peer, metric, readings),
                        bars.get(peer) if precision == "fast" else None,
                    )
                )
        made.append(
            Comparison(
                f"decode at {LONG} / at {PROMPT}, {precision}",
                run.side(precision, "decode at 1024", readings),
                run.side(precision, "decode", readings),
                LONG_CONTEXT_BAR,
            )
        )
    return made


def main() -> int:
    """Measure, print, keep."""
    made = common.parser(__doc__)
    made.epilog = "parts: mlx-lm, llama"
    options = common.parse(made)
    wanted = set(options.only) or {"mlx-lm", "llama"}
    if unknown := wanted - {"mlx-lm", "llama"}:
        made.error(f"--only {unknown.pop()}: expected mlx-lm or llama")
    with ExitStack() as stack:
        run = Speed(options.threads, options.quick, stack)
        measures = run.ours()
        for name, bring_up in (("mlx-lm", run.mlx_lm), ("llama", run.llama_cpp)):
            if name in wanted:
                measures |= bring_up()
        readings = common.interleave(measures, options.rounds)
    return common.finish("speed", compare(run, readings), options, notes=run.notes)


if __name__ == "__main__":
    raise SystemExit(main())
