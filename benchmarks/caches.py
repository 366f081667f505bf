"""KV caches: what they lose at 8 and 4 bits, how fast a model decodes with them, and what reuse saves.

    python -m benchmarks.caches                       # all parts, five minutes
    python -m benchmarks.caches --only kl
    python -m benchmarks.caches --only decode
    python -m benchmarks.caches --only prefix

A KL is the mean over a text of what the model says with its cache quantized from what it says with the cache in f32, in
nats a token, all else the same and exact. Nothing in it depends on time, so it is one reading.
"""

from __future__ import annotations

from functools import partial

from benchmarks import peers
from benchmarks.bench import Bench, side
from benchmarks.caches_prefix import prefix
from benchmarks.common import REPOSITORY, Comparison, Side

KL_BAR = 1e-3
NANO_MOE = REPOSITORY / "edger1" / "assets" / "nano-moe"
DECODED = 96


def kl(run: Bench) -> list[Comparison]:
    """SmolLM2-135M on 2,048 tokens of the package's text; nano-moe, whose cache holds latents, on 1,024 of problems."""
    lines = []
    models = (
        ("SmolLM2-135M", str(peers.smollm2_folder()), "prose", 2048),
        ("nano-moe (MLA)", str(NANO_MOE), "problems", 1024),
    )
    for name, folder, text, tokens in models:
        tokens = tokens // 4 if run.quick else tokens
        worker = run.worker("sides_caches:divergence", {"folder": folder, "text": text, "tokens": tokens})
        for bits in (8, 4):
            found = worker.measure(bits=bits)
            run.notes.append(
                f"{name}, {bits} bits: {found['bytes']:,.0f} bytes a token, f32 {found['plain_bytes']:,.0f}; another "
                f"likeliest token at {found['differing']:.2%} of {tokens:,}"
            )
            ours = Side("EdgeR1", f"KV at {bits} bits", "nats", (found["kl"],))
            bar = Side("the bar", "", "nats", (KL_BAR,))
            what = f"KL of {name}, KV at {bits} bits to f32 KV / {KL_BAR:g}"
            lines.append(Comparison(what, ours, bar, 1.0 if bits == 8 else None, form="share"))
        worker.close()
    return lines


def decode(run: Bench, context: int, precision: str) -> list[Comparison]:
    """SmolLM2-135M behind a prompt of `context` tokens: caches at 8 and 4 bits against one that is not quantized.

    That is f16 in "fast", and f32 in "exact".
    """
    sides = {
        bits: run.worker(
            "sides_caches:decoding",
            {
                "folder": str(peers.smollm2_folder()),
                "precision": precision,
                "kv_bits": bits,
                "context": context + 256,
            },
        )
        for bits in (None, 8, 4)
    }
    readings = run.interleave(
        {str(bits): partial(worker.measure, prompt=context, generate=DECODED) for bits, worker in sides.items()}
    )
    plain = side("EdgeR1", "f32 KV" if precision == "exact" else "f16 KV", readings["None"], "decode")
    lines = []
    for bits in (8, 4):
        ours = side("EdgeR1", f"KV at {bits} bits", readings[str(bits)], "decode")
        what = f"decode behind {context:,} tokens, {precision}, KV at {bits} bits / not quantized"
        lines.append(Comparison(what, ours, plain))
    return lines


PARTS = {
    "kl": kl,
    "decode": partial(decode, context=1024, precision="exact"),
    "decode-fast": partial(decode, context=1024, precision="fast"),
    "decode-long": partial(decode, context=4096, precision="fast"),
    "prefix": prefix,
}


def main() -> int:
    """Measure."""
    from benchmarks import bench

    return bench.main("caches", __doc__, PARTS)


if __name__ == "__main__":
    raise SystemExit(main())
