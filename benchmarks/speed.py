"""A whole model: EdgeR1 against mlx-lm as shipped and against llama.cpp, SmolLM2-135M and a larger one.

    python -m benchmarks.speed                # everything, five rounds
    python -m benchmarks.speed --only q4_0    # one part
    python -m benchmarks.speed --quick        # one short round, to see that all of it runs

mlx-lm, q4_0, q4_1, q8_0    prefill of 512 tokens (and 64) from an empty cache, decoding of 128 after a prompt of 64
1b         decoding of a llama of the shape of Llama-3.2-1B with random weights, against llama.cpp Q4_0 of the same file
context    decoding after a prompt of 1,024 tokens against after 64
batch      8 sequences at a time against one, through the engine and through mlx-lm's batch generator
sampling   the engine's time for a token of a model of one layer, against the forward pass alone, in milliseconds

EdgeR1 is measured through its public API with sampling and detokenizing; the peers without: mlx-lm through its
generate_step in f32 (its fastest dtype on a CPU), llama.cpp through its own llama-bench at the fastest of its settings.
All run the same file: EdgeR1 and mlx-lm its lossless conversion, llama.cpp the GGUF itself (Q4_1) and requantizations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks import bench, peers, random_llama
from benchmarks.bench import Bench, Readings, side
from benchmarks.common import Comparison, Measure
from benchmarks.common import Side as Shown
from benchmarks.worker import Side as Worker

PREFILL, PROMPT, GENERATE, LONG = 512, 64, 128, 1024
SEQUENCES = 8

# Bars hold for the default precision, which is the one that llama.cpp's own arithmetic corresponds to.
DECODE_BARS = {"mlx-lm": 9.0, "Q4_0": 1.1, "Q4_1": 1.3, "Q8_0": 1.3}
PREFILL_BARS = {"mlx-lm": 100.0, "Q4_0": 2.0}
LONG_CONTEXT_BAR, BATCH_BAR, LARGER_BAR = 0.8, 3.0, 1.1
SAMPLING_BAR_MS = 0.3
SAMPLED = {"greedy": {"temperature": 0.0}, "temperature 0.6, top-p 0.95": {"temperature": 0.6, "top_p": 0.95}}


def _engines(run: Bench, folder: Path) -> dict[str, Worker]:
    """Bring EdgeR1 up in each precision."""
    found = run.ours("sides_model:engine", {"folder": str(folder)})
    for precision, worker in found.items():
        if not worker.info["kernels"]:
            run.notes.append(f"EdgeR1 ({precision}) ran without its kernels: the figures are MLX's own operations'")
    return found


def _shown(precision: str, worker: Worker) -> str:
    return f"{precision}, {'kernels' if worker.info['kernels'] else 'WITHOUT kernels'}"


def _model_reading(worker: Worker, prefill: int, generate: int) -> dict[str, float]:
    """Read prefill of `prefill` and of 64 tokens, and decoding of `generate` after the latter."""
    short_prompt = worker.measure(prompt=PROMPT, generate=generate)
    return {
        "prefill": worker.measure(prompt=prefill, generate=0)["prefill"],
        "prefill of 64": short_prompt["prefill"],
        "decode": short_prompt["decode"],
    }


def _against(
    name: str, engines: dict[str, Worker], readings: Readings, peer: Callable[[str], Shown]
) -> list[Comparison]:
    return [
        Comparison(
            f"{metric}, {precision} / {name}",
            side("EdgeR1", _shown(precision, worker), readings[precision], metric),
            peer(metric),
            bars.get(name) if precision == "fast" else None,
        )
        for precision, worker in engines.items()
        for metric, bars in (("decode", DECODE_BARS), ("prefill", PREFILL_BARS), ("prefill of 64", {}))
    ]


def mlx_lm(run: Bench) -> list[Comparison]:
    """Against mlx-lm as shipped."""
    prefill, generate = (64, 16) if run.quick else (PREFILL, GENERATE)
    folder = peers.smollm2_folder()
    engines = _engines(run, folder)
    shipped, settings = run.shipped(
        "sides_model:mlx_lm", {"folder": str(folder)}, {"prompt": 8, "generate": 16}, metric="decode"
    )
    sides = {**engines, "mlx-lm": shipped}
    readings = run.interleave({n: partial(_model_reading, worker, prefill, generate) for n, worker in sides.items()})
    return _against(
        "mlx-lm",
        engines,
        readings,
        lambda metric: side("mlx-lm", f"as shipped, {settings}", readings["mlx-lm"], metric),
    )


def llama_cpp(kind: str, run: Bench) -> list[Comparison]:
    """Against llama.cpp's quantization `kind`, at its fastest settings for prefill and for decoding."""
    prefill, generate = (64, 16) if run.quick else (PREFILL, GENERATE)
    model = peers.smollm2_quantized(kind)
    chosen = {
        "prefill": peers.fastest_settings(model, threads=run.threads, prompt=prefill),
        "decode": peers.fastest_settings(model, threads=run.threads, generate=min(generate, 64)),
    }

    def llama_reading() -> dict[str, float]:
        ask = partial(peers.llama_bench, model, threads=run.threads)
        return {
            "prefill": ask(chosen["prefill"], prompt=prefill)[0],
            "prefill of 64": ask(chosen["prefill"], prompt=PROMPT)[0],
            "decode": ask(chosen["decode"], generate=generate, depth=PROMPT)[0],
        }

    engines = _engines(run, peers.smollm2_folder())
    measures: dict[str, Measure] = {n: partial(_model_reading, w, prefill, generate) for n, w in engines.items()}
    readings = run.interleave({**measures, kind: llama_reading})
    return _against(
        kind,
        engines,
        readings,
        lambda metric: side(f"llama.cpp {kind}", str(chosen[metric.split()[0]]), readings[kind], metric),
    )


def larger(run: Bench) -> list[Comparison]:
    """Decoding with random weights of a larger shape, both sides the same file."""
    generate = 8 if run.quick else 64
    model = random_llama.gguf_file(random_llama.LLAMA_1B)
    settings = peers.fastest_settings(model, threads=run.threads, generate=16, repetitions=2)
    engines = _engines(run, random_llama.folder(random_llama.LLAMA_1B))
    measures: dict[str, Measure] = {
        name: partial(worker.measure, prompt=PROMPT, generate=generate) for name, worker in engines.items()
    }
    measures["Q4_0"] = lambda: {
        "decode": peers.llama_bench(model, settings, threads=run.threads, generate=generate, depth=PROMPT)[0]
    }
    readings = run.interleave(measures)
    peer = side("llama.cpp Q4_0", str(settings), readings["Q4_0"], "decode")
    return [
        Comparison(
            f"decode, llama of 1B, {precision} / Q4_0",
            side("EdgeR1", _shown(precision, worker), readings[precision], "decode"),
            peer,
            LARGER_BAR if precision == "fast" else None,
        )
        for precision, worker in engines.items()
    ]


def context(run: Bench) -> list[Comparison]:
    """Decoding far into the context against decoding near its start."""
    generate = 16 if run.quick else 64
    engines = _engines(run, peers.smollm2_folder())
    readings = run.interleave(
        {
            f"{precision} {prompt}": partial(worker.measure, prompt=prompt, generate=generate)
            for precision, worker in engines.items()
            for prompt in (LONG, PROMPT)
        }
    )
    return [
        Comparison(
            f"decode at {LONG} / at {PROMPT}, {precision}",
            side("EdgeR1", f"{_shown(precision, worker)}, at {LONG}", readings[f"{precision} {LONG}"], "decode"),
            side("EdgeR1", f"{_shown(precision, worker)}, at {PROMPT}", readings[f"{precision} {PROMPT}"], "decode"),
            LONG_CONTEXT_BAR,
        )
        for precision, worker in engines.items()
    ]


def batch(run: Bench) -> list[Comparison]:
    """Several sequences at a time against one alone."""
    request = {"prompt": PROMPT, "generate": 32 if run.quick else 96}
    folder = {"folder": str(peers.smollm2_folder())}
    ways = {
        "engine": run.ours("sides_batch:engine", folder),
        "mlx-lm's BatchGenerator": run.ours("sides_batch:generator", folder),
    }
    readings = run.interleave(
        {
            f"{way} {precision} {count}": partial(worker.measure, sequences=count, **request)
            for way, sides in ways.items()
            for precision, worker in sides.items()
            for count in (1, SEQUENCES)
        }
    )
    return [
        Comparison(
            f"{SEQUENCES} sequences / one, {way}, {precision}",
            side(f"EdgeR1, {way}", f"{precision}, {SEQUENCES} sequences", readings[f"{way} {precision} {SEQUENCES}"]),
            # One alone is fastest without a batch generator, so that is what every way is held against.
            side("EdgeR1, engine", f"{precision}, one sequence", readings[f"engine {precision} 1"]),
            BATCH_BAR,
        )
        for way, sides in ways.items()
        for precision in sides
        if precision in ways["engine"]
    ]


def sampling(run: Bench) -> list[Comparison]:
    """What the engine adds to the forward pass for each token, at a vocabulary of 49,152."""
    tokens = 64 if run.quick else 512
    folder = {"folder": str(peers.smollm2_cut())}
    found: list[Comparison] = []
    engine = run.worker("sides_model:engine", {**folder, "precision": "fast"})
    bare = run.worker("sides_model:forward", {**folder, "precision": "fast"})
    measures: dict[str, Measure] = {
        name: partial(engine.measure, prompt=PROMPT, generate=tokens, **settings) for name, settings in SAMPLED.items()
    }
    measures["forward"] = partial(bare.measure, prompt=PROMPT, generate=tokens)
    readings = run.interleave(measures)
    for name in SAMPLED:
        timed = [{"ms": 1e3 / reading["decode"]} for reading in readings[name]]
        found.append(
            Comparison(
                f"a token in the engine less its forward pass, {name}",
                side("EdgeR1's engine", "fast", timed, "ms", "ms"),
                side("forward pass alone", "fast", readings["forward"], "ms", "ms"),
                SAMPLING_BAR_MS,
                less_is_better=True,
                form="difference",
            )
        )
    return found


PARTS: dict[str, Callable[[Bench], list[Comparison]]] = {
    "mlx-lm": mlx_lm,
    **{kind.lower(): partial(llama_cpp, kind) for kind in peers.QUANTIZATIONS},
    "1b": larger,
    "context": context,
    "batch": batch,
    "sampling": sampling,
}

if __name__ == "__main__":
    raise SystemExit(bench.main("speed", __doc__, PARTS))
