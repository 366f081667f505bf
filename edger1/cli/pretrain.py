"""`edger1 finetune --method pretrain`: train a model from nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from edger1.cli import INTERRUPTED
from edger1.cli.training import Show, interrupts
from edger1.errors import UsageError

if TYPE_CHECKING:
    from edger1.train.pretrain.run import Event


def pretrain(
    config: Path | None,
    data: Path | None,
    out: Path | None,
    *,
    resume: bool = False,
    steps: int | None = None,
    minutes: float | None = None,
    seed: int | None = None,
    plan: bool = False,
) -> None:
    """Pretrain a model with what the command line says; see `edger1.cli.finetune`."""
    if out is None:
        raise UsageError("--output is missing; name a folder for the run.")
    if config is None and resume:
        config = out / "config.toml"
    if config is None or data is None:
        raise UsageError(f"{'--config' if config is None else '--data'} is missing; see edger1 finetune --help.")
    if minutes is not None and not minutes > 0:
        raise UsageError(f"--minutes is {minutes:g}; expected more than 0.")

    from dataclasses import replace

    from edger1.mlx_runtime import prepare
    from edger1.train.pretrain import settings

    table, chosen = settings.read(config)
    given: dict[str, Any] = {n: v for n, v in (("steps", steps), ("seed", seed)) if v is not None}
    chosen = replace(chosen, **given)
    prepare()
    from edger1.train.pretrain.model import check
    from edger1.train.pretrain.run import Pretraining

    if "vocab_size" in table:
        # Before the corpus is encoded, which may take a while.
        check(table)
    with Show(chosen.steps) as show:
        run = Pretraining(_open(show, data), table, chosen, out, resume=resume)
        show.say(run.describe())
        if plan:
            return
        with interrupts() as asked:
            result = run.run(lambda event: _step(show, event), lambda: bool(asked), minutes)
    again = f"edger1 finetune --method pretrain --data {data} --output {out} --resume"
    if result.finished:
        held_out = "".join(f", held-out {name} {value:.4f}" for name, value in result.held_out.items() if value)
        typer.echo(f"Finished after {result.progress.tokens:,} tokens{held_out}.", err=True)
    else:
        typer.echo(f"Stopped after step {result.progress.step}; all is saved. Go on with: {again}", err=True)
        if asked:
            raise typer.Exit(INTERRUPTED)
    typer.echo(str(result.folder))


def _open(show: Show, folder: Path) -> Any:
    """Open the corpus, showing how far its encoding is."""
    from edger1.train.pretrain.corpus import open_corpus

    tenth = -1

    def progress(done: int, whole: int) -> None:
        nonlocal tenth
        if done * 10 // max(1, whole) > tenth:
            tenth = done * 10 // max(1, whole)
            show.say(f"encoding documents {tenth * 10}%")

    return open_corpus(folder, progress)


def _step(show: Show, event: Event) -> None:
    figures = f"loss {event.loss:.3f}" + (f" · MTP {event.mtp_loss:.3f}" if event.mtp_loss else "")
    figures += f" · {event.tokens_per_s:,.0f} tokens/s"
    measured = f"held-out loss {event.held_out['loss']:.4f}" if event.held_out else ""
    show.step(event.progress.step, figures, measured=measured)
