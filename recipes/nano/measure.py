"""What the two trained models can do: losses against tokens seen, held-out questions, use of experts, drafts.

    python -m recipes.nano.measure --moe RUN --dense RUN --corpus FOLDER --out FOLDER

RUN is what `edger1 finetune` wrote. FOLDER (of --out) gets nano.json with every figure, nano-loss.svg and
nano-experts.svg, and the recipe's README its table. A draft is the MTP layer's best token after the model's own next
one, in an answer that the model gives greedily to a held-out question; it is accepted where the model's next choice is
the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from edger1.kernels.install import install
from edger1.train import plot
from edger1.train.ops import Ops
from edger1.train.pretrain import export, forward
from edger1.train.pretrain.corpus import Corpus, open_corpus
from edger1.train.pretrain.losses import Batch, batch_of
from edger1.train.pretrain.packing import Place, Rows
from recipes.nano.evaluate import MAX_TOKENS, Question, accuracy, asker, read

LENGTH, ROWS = 512, 16
README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- python -m recipes.nano.measure: begin -->", "<!-- python -m recipes.nano.measure: end -->"


@dataclass
class HeldOut:
    """Over the assistant's tokens of held-out documents: shares of right next tokens, and of those after them."""

    tokens: int
    next_right: float
    ahead_right: float | None


@dataclass
class Drafts:
    """How many of the MTP layer's drafts the model's own greedy answers accept."""

    drafted: int
    accepted: int
    answers: int

    @property
    def share(self) -> float:
        """Accepted of all."""
        return self.accepted / max(1, self.drafted)


def _best(states: mx.array, model: Any) -> np.ndarray:
    return np.array(mx.argmax(states @ forward.head_weight(model).T, axis=-1))


def held_out(model: Any, corpus: Corpus) -> tuple[HeldOut, np.ndarray]:
    """Return shares of right predictions, and how often each layer chose each expert, [layers, experts]."""
    rows = Rows(corpus.held_out, LENGTH, corpus.pad, 0, counted_only=True, shuffle=False)
    place, ops = Place(), Ops(False)
    right, counts = np.zeros(2), np.zeros(2)
    loads: list[np.ndarray] = []
    left = rows.epoch_rows(0)
    while left > 0:
        batch, place = rows.next(place, min(ROWS, left))
        left -= ROWS
        passed = forward.run(model, batch.tokens, batch.starts, ops)
        tokens = np.array(batch.tokens)
        for ahead, (states, weights) in enumerate(
            ((passed.hidden, batch.weights), (passed.ahead, batch.ahead_weights)), 1
        ):
            if states is not None:
                chosen, counted = _best(states, model)[:, :-ahead], np.array(weights)[:, :-ahead]
                right[ahead - 1] += ((chosen == tokens[:, ahead:]) * counted).sum()
                counts[ahead - 1] += counted.sum()
        if passed.routing:
            loads.append(_loads(passed.routing, batch))
    found = HeldOut(int(counts[0]), right[0] / counts[0], right[1] / counts[1] if counts[1] else None)
    return found, np.sum(loads, axis=0) if loads else np.zeros((0, 0))


def _loads(routing: list[forward.Routing], batch: Batch) -> np.ndarray:
    """How often each layer's experts were chosen, padding left out."""
    # A position of padding begins a document of its own at the row's end, where nothing counts.
    real = np.array(batch.weights) > 0
    experts = routing[0].affinities.shape[-1]
    return np.stack([np.bincount(np.array(r.indices)[real].ravel(), minlength=experts) for r in routing])


def drafts(model: Any, folder: Path, questions: list[Question]) -> Drafts:
    """Answer questions greedily and count which drafts the answers accept."""
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_tokenizer

    tokenizer, ops = load_tokenizer(folder), Ops(False)
    found = Drafts(0, 0, 0)
    for question in questions:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question.question}], add_generation_prompt=True
        )
        answer = []
        for token, _ in generate_step(mx.array(prompt), model, max_tokens=MAX_TOKENS):
            answer.append(int(token))
            if token in tokenizer.eos_token_ids:
                break
        row = np.array([*prompt, *answer])[None]
        batch = batch_of(row, np.zeros_like(row), np.ones(row.shape, bool))
        ahead = forward.run(model, batch.tokens, batch.starts, ops).ahead
        if ahead is None:
            return found
        first = len(prompt) - 1
        # At position i the MTP layer reads token i + 1, which the model chose, and drafts the one after it.
        drafted = _best(ahead, model)[0, first:-2]
        found.drafted += len(drafted)
        found.accepted += int((drafted == row[0, first + 2 :]).sum())
        found.answers += 1
    return found


def curve(run: Path) -> list[tuple[int, float]]:
    """Return (tokens seen, held-out loss) of a run's log, after those of the run whose model it began with."""
    settings = tomllib.loads((run / "config.toml").read_text("utf-8"))["train"]
    before = Path(settings["start_from"]).parent if settings.get("start_from") else None
    points = curve(before) if before is not None and (before / "log.jsonl").is_file() else []
    seen = points[-1][0] if points else 0
    entries = map(json.loads, (run / "log.jsonl").read_text("utf-8").splitlines())
    return points + [(seen + entry["tokens"], entry["held_out"]["loss"]) for entry in entries if "held_out" in entry]


def measure(run: Path, corpus: Corpus, corpus_folder: Path, each: int) -> tuple[dict[str, Any], np.ndarray]:
    """Return all figures of one run's model as plain values, and its experts' loads."""
    model, config = export.load(run / "model")
    installed = install(model, "exact", fuse=False)
    predictions, loads = held_out(model, corpus)
    questions = read(corpus_folder, each)
    found: dict[str, Any] = {"held_out": asdict(predictions), "loss": curve(run)}
    if loads.size:
        share = loads / loads.mean(axis=1, keepdims=True)
        found["experts"] = {
            "least_of_mean": share.min(axis=1).round(3).tolist(),
            "most_of_mean": share.max(axis=1).round(3).tolist(),
        }
        made = drafts(model, run / "model", read(corpus_folder, max(1, each // 20)))
        found["drafts"] = asdict(made) | {"share": made.share}
    installed.uninstall()
    del model
    kinds = {task: (right, asked) for task, right, asked in _told(accuracy(questions, asker(str(run / "model"))))}
    found["questions"] = {task: {"right": right, "asked": asked} for task, (right, asked) in kinds.items()}
    found["mean_right"] = sum(right / asked for right, asked in kinds.values()) / len(kinds)
    found["parameters"] = {"layers": config["num_hidden_layers"], "model_type": config["model_type"]}
    return found, loads


def table(results: dict[str, Any]) -> str:
    """Return the figures of both models as Markdown."""
    moe, dense = results["nano-moe"], results["nano-dense"]
    rows = [
        ("loss on held-out documents", *(f"{m['loss'][-1][1]:.4f}" for m in (moe, dense))),
        ("next token right, of the assistant's", *(f"{m['held_out']['next_right']:.1%}" for m in (moe, dense))),
        ("the one after it right (MTP layer)", f"{moe['held_out']['ahead_right']:.1%}", ""),
        ("drafts of the MTP layer accepted", f"{moe['drafts']['share']:.1%}", ""),
        ("least and most used expert, times the mean", _range(moe["experts"]), ""),
        (
            f"**questions right, mean of {len(moe['questions'])} kinds**",
            *(f"**{m['mean_right']:.1%}**" for m in (moe, dense)),
        ),
    ]
    for task, asked in moe["questions"].items():
        both = (asked, dense["questions"][task])
        rows.append((task, *(f"{q['right'] / q['asked']:.0%} of {q['asked']}" for q in both)))
    return (
        "\n".join(["| | nano-moe | nano-dense |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"
    )


def _range(experts: dict[str, list[float]]) -> str:
    return f"{min(experts['least_of_mean']):.2f} to {max(experts['most_of_mean']):.2f}"


def written(text: str, results: dict[str, Any]) -> str:
    """Return the README `text` with the table between its markers made anew."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(results)}{END}{after}"


def _told(results: Iterator[tuple[str, int, int]]) -> Iterator[tuple[str, int, int]]:
    for task, right, asked in results:
        print(f"{task:15} {right:4} of {asked:4}  {right / asked:7.1%}", file=sys.stderr, flush=True)
        yield task, right, asked


def main() -> int:
    """Measure both and write what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--moe", type=Path, required=True)
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--each", type=int, default=200, help="questions of each kind, at most")
    options = parser.parse_args()
    corpus = open_corpus(options.corpus)
    results: dict[str, Any] = {}
    series = []
    for name in ("moe", "dense"):
        results[f"nano-{name}"], loads = measure(getattr(options, name), corpus, options.corpus, options.each)
        points = results[f"nano-{name}"]["loss"]
        series.append(plot.Line(f"nano-{name}", [x for x, _ in points], [y for _, y in points]))
        if loads.size:
            share = loads / loads.mean(axis=1, keepdims=True)
            layers = [f"layer {i + 1}" for i in range(len(share) - 1)] + ["MTP"]
            rows = [(layer, list(values)) for layer, values in zip(layers, share.tolist(), strict=True)]
            title = "Use of experts over held-out documents, as multiples of the mean"
            (options.out / "nano-experts.svg").write_text(plot.heat_map(title, "expert", rows, 3.0), "utf-8")
    (options.out / "nano-loss.svg").write_text(
        plot.lines("Loss on held-out documents", "tokens seen", "nats a token", series), "utf-8"
    )
    (options.out / "nano.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    README.write_text(written(README.read_text("utf-8"), results), "utf-8")
    print(json.dumps({name: found["mean_right"] for name, found in results.items()}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
