"""Write the kept results into README.md's table.

python -m benchmarks.readme             # rewrite the table between its markers
python -m benchmarks.readme --check     # fail where the README does not say what the results say
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from benchmarks import kept
from benchmarks.common import REPOSITORY, Comparison

README = REPOSITORY / "README.md"
BEGIN, END = "<!-- python -m benchmarks.readme: begin -->", "<!-- python -m benchmarks.readme: end -->"

BENCHMARKS = (
    ("startup", "From nothing to an answer, SmolLM2-135M at 4 bits"),
    ("chat", "The chat: SmolLM2-135M, or a script of 50 tokens a second"),
    ("speed", "A whole model: SmolLM2-135M at 4 bits, and a llama of 1B"),
    ("blocks", "Blocks of large models, random weights at 4 bits"),
    ("latent_memory", "Memory of a prompt in DeepSeek-R1's attention: one layer, 512 tokens"),
    ("kernels", "Single kernels"),
    ("streaming", "Experts streamed from disk: Qwen3-30B-A3B's widths, 24 layers, random weights at 4 bits"),
    ("caches", "KV caches at 8 and 4 bits: what they lose, and decoding with them"),
    ("convert", "Converting: DeepSeek-R1's tensor shapes in FP8, and 3 GB of bf16"),
    ("quantization", "What quantizing loses: the recipes' two models, KL divergence to bf16 on held-out problems"),
    ("pretrain", "Training the recipes' two models from nothing"),
    ("finetune", "Fine-tuning SmolLM2-135M at 4 bits with LoRA"),
)


def render() -> str:
    """Return the README's section on speed, from the results there are."""
    there = [(name, title) for name, title in BENCHMARKS if (kept.RESULTS / f"{name}.json").exists()]
    parts = [part for name, _ in there for part in kept.parts(name).values()]
    if not parts:
        return "Nothing has been measured yet.\n"
    machines = sorted({f"{p['machine']['physical_cores']} cores of an {p['machine']['cpu']}" for p in parts})
    dates = sorted({part["date"][:10] for part in parts})
    lines = [
        f"On {', '.join(machines)}, without a GPU, {dates[0] + ('' if len(dates) == 1 else f' to {dates[-1]}')}; which",
        "of them made a line stands with its readings.",
        "Both sides of a line in one run on the same weights, interleaved, medians; EdgeR1 in its default",
        '`precision="fast"` ([how](docs/benchmarks.md); every reading, and those of `precision="exact"`, in',
        "`benchmarks/results/`). *Ratio* is how many times better EdgeR1 is, or, with ≤, a share or a difference that",
        "should be small; *bar* is what the project wants to reach.",
        "",
    ]
    for name, title in there:
        lines += [f"**{title}** (`python -m benchmarks.{name}`)", "", "| | EdgeR1 | beside | ratio | bar |"]
        lines += ["|---|---|---|---|---|", *_rows(name), ""]
    return "\n".join(lines)


def _rows(name: str) -> Iterator[str]:
    for part in kept.parts(name).values():
        fast_bars = {line.bar for line in kept.comparisons(part) if ", fast" in line.what}
        for line in kept.comparisons(part):
            # Exact is shown where it has a bar of its own; the other readings of it are in the results.
            if ", exact" in line.what and line.bar in (None, *fast_bars):
                continue
            what = line.what.replace(", fast", "")
            if not line.peer.name.startswith("EdgeR1"):
                what = what.split(" / ")[0]
            cells = what, _value(line.ours.median, line.ours.unit), _peer(line), _ratio(line), _bar(line)
            yield f"| {' | '.join(cells)} |"


def _value(value: float, unit: str) -> str:
    shown = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{shown} {unit}"


def _peer(line: Comparison) -> str:
    return f"{line.peer.name}: {_value(line.peer.median, line.peer.unit)}"


def _ratio(line: Comparison) -> str:
    if line.form == "difference":
        return f"{line.figure:.2f} {line.ours.unit}"
    return f"{line.figure:.2f}" if line.figure < 10 else f"{line.figure:.0f}"


def _bar(line: Comparison) -> str:
    if line.bar is None:
        return ""
    sign = "≥" if line.form == "times" else "≤"
    unit = f" {line.ours.unit}" if line.form == "difference" else ""
    return f"{sign} {line.bar:g}{unit}{'' if line.met else ', not met'}"


def written(text: str) -> str:
    """Return the README `text` with the section between its markers made anew. Raises ValueError without markers."""
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise ValueError(f"{README.name} has no section between {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{render()}{END}{after}"


def main() -> int:
    """Rewrite or check the README."""
    text = README.read_text("utf-8")
    made = written(text)
    if "--check" in sys.argv[1:]:
        if text != made:
            print("README.md does not say what benchmarks/results says: python -m benchmarks.readme", file=sys.stderr)
        return int(text != made)
    README.write_text(made, "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
