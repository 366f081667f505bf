"""`edger1 pairs`: preference pairs from answers that were judged."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from edger1.errors import UsageError


def pairs_command(
    source: Annotated[
        Path, typer.Argument(metavar="FROM", help="A folder of edger1 distill, a GRPO run, or their JSONL of answers.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.jsonl", help="The pairs.")],
    kinds: Annotated[
        list[str] | None,
        typer.Option("--kind", metavar="shorter|right", help="Which pairs; repeatable. Default: both."),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", metavar="FILE|gym:TASK", help="The prompts of a GRPO run.")
    ] = None,
    size: Annotated[int | None, typer.Option(metavar="N", help="How many of the prompts, as in the run.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of prompts that were generated, as in the run.")] = 0,
    judge: Annotated[
        str | None, typer.Option(metavar="REWARD", help="Which of a GRPO run's rewards says what is right.")
    ] = None,
) -> None:
    """Pair the shortest right answer to each prompt with the longest right one, and with the longest wrong one.

    The pairs are for --method dpo: they teach a model to reason in fewer tokens (Sky-T1-Flash). What could not be
    paired is counted. Answers that were cut off make no pairs.

    Examples:

      edger1 pairs traces -o pairs.jsonl

      edger1 pairs runs/grpo --prompts problems.jsonl --judge numeric -o pairs.jsonl

      edger1 finetune smollm2-135m --method dpo --data pairs.jsonl
    """
    from edger1.train.distill.dataset import SAMPLES
    from edger1.train.distill.prompts import read_prompts
    from edger1.train.finetune import preferences

    chosen = tuple(kinds or preferences.KINDS)
    if unknown := [kind for kind in chosen if kind not in preferences.KINDS]:
        raise UsageError(f"--kind is {unknown[0]!r}; expected {' or '.join(preferences.KINDS)}.")
    path = _answers(source, SAMPLES)
    if path.name.startswith("rollouts"):
        if prompts is None:
            raise UsageError("The log of a GRPO run names its prompts by their rows; give the run's data as --prompts.")
        questions = read_prompts(prompts, size=size, seed=seed).questions
        found = preferences.read_rollouts(path, questions, judge)
    else:
        if prompts or judge or size:
            raise UsageError(f"{path} has its prompts and verdicts; --prompts, --size and --judge are for GRPO runs.")
        found = preferences.read_samples(path)
    made = preferences.build(found, chosen)
    for line in made.lines():
        typer.echo(line, err=True)
    if not made.rows:
        raise UsageError(f"{path} gives no pair; nothing was written.")
    preferences.write(output, made)
    typer.echo(f"Train on it: edger1 finetune MODEL --method dpo --data {shlex.quote(str(output))}", err=True)
    typer.echo(str(output))


def _answers(source: Path, samples: str) -> Path:
    """Return the file of answers that a path means."""
    if not source.is_dir():
        return source
    # A run of fine-tuning has a samples.jsonl too: answers shown at its measurements, which nobody judged.
    for name in ("rollouts.jsonl", samples):
        if (source / name).is_file():
            return source / name
    raise UsageError(f"{source} has neither {samples} of edger1 distill nor rollouts.jsonl of a GRPO run.")
