"""`edger1 finetune`: teach a model, by examples, rewards or preferences, or from nothing."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edger1.cli import INTERRUPTED
from edger1.errors import UsageError

if TYPE_CHECKING:
    from edger1.cli.training import Show
    from edger1.train.finetune.method import Evaluation
    from edger1.train.finetune.run import Event


def finetune_command(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Alias, hub name or folder; none for pretrain.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="PATH", help="JSONL, JSON, CSV or Parquet: a file, or a folder of files.")
    ] = None,
    method: Annotated[str | None, typer.Option(metavar="NAME", help="sft (default), grpo, dpo, or pretrain.")] = None,
    out: Annotated[
        Path | None,
        typer.Option("--output", "--out", metavar="RUN", help="Folder of the run. Default: runs/MODEL-METHOD."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TOML with settings; other options override it.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last checkpoint.")] = False,
    adapter: Annotated[str | None, typer.Option(metavar="FOLDER", help="Begin with this adapter.")] = None,
    rank: Annotated[int | None, typer.Option(metavar="R", help="Of a fresh adapter. Default: 16.")] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="What is adapted: attention, mlp, experts, or a module; repeatable."),
    ] = None,
    epochs: Annotated[float | None, typer.Option(metavar="N", help="How often the data is seen. Default: 2.")] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Steps of the whole schedule.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", metavar="X", help="At its peak.")
    ] = None,
    length: Annotated[int | None, typer.Option(metavar="TOKENS", help="Longest document.")] = None,
    rows: Annotated[int | None, typer.Option(metavar="N", help="Rows that pass the model together.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help='Memory ceiling, such as "6GB" or "50%".')] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out bad rows, and count them.")] = False,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Of first weights and the data's order.")] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Any setting of the TOML file; repeatable."),
    ] = None,
    minutes: Annotated[float | None, typer.Option(metavar="M", help="Stop after so long, with a checkpoint.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would be trained, and stop.")] = False,
    show: Annotated[
        Path | None, typer.Option(metavar="RUN", help="View the answers and rewards of a run instead.")
    ] = None,
    step: Annotated[int | None, typer.Option(metavar="N", help="With --show: the answers of step N.")] = None,
) -> None:
    """Teach a model from data, from rewards or from preferences: an adapter (LoRA) beside its weights.

    The run's folder gets finetune.toml with every setting, log.jsonl, samples.jsonl, plots, checkpoints and, at the
    end, adapter/, which `edger1 run --adapter` takes. Ctrl-C ends the step and saves; --resume goes on to the same
    weights.

    `--method pretrain` trains a small model from nothing (docs/pretrain.md).

    Examples:

      edger1 finetune smollm2-135m --data traces.jsonl

      edger1 finetune smollm2-135m --data traces.jsonl --output runs/mine --rank 32 --set train.schedule=wsd

      edger1 finetune smollm2-135m --method grpo --data questions.jsonl --set 'rewards.use=["maths"]'

      edger1 finetune --show runs/smollm2-135m-grpo --step 12

      edger1 finetune --output runs/mine --resume

      edger1 finetune --method pretrain --config nano-moe.toml --data corpus --output runs/nano-moe
    """
    if show is not None:
        _view(show, step)
        return
    if step is not None:
        raise UsageError("--step is for --show RUN; --steps is how many are trained.")
    if method == "pretrain":
        from edger1.cli.pretrain import pretrain

        pretrain(config, data, out, resume=resume, steps=steps, minutes=minutes, seed=seed, plan=plan)
        return
    asked: dict[str, dict[str, Any]] = {
        "model": {"name": model, "adapter": adapter},
        "adapter": {"rank": rank, "targets": target or None},
        "data": {"path": None if data is None else str(data), "length": length, "skip_bad": skip_bad or None},
        "train": {
            "method": method, "epochs": epochs, "steps": steps, "learning_rate": learning_rate, "rows": rows,
            "memory": memory, "seed": seed,
        },
    }  # fmt: skip
    given = {name: {key: v for key, v in table.items() if v is not None} for name, table in asked.items()}
    for text in options or ():
        name, key, value = _setting(text)
        given.setdefault(name, {})[key] = value
    if minutes is not None and not minutes > 0:
        raise UsageError(f"--minutes is {minutes:g}; expected more than 0.")
    _finetune(given, config, out, resume=resume, plan_only=plan, minutes=minutes)


def _finetune(
    given: dict[str, dict[str, Any]],
    config: Path | None,
    out: Path | None,
    *,
    resume: bool,
    plan_only: bool,
    minutes: float | None,
) -> None:
    import time

    from edger1.cli.training import Show, interrupts

    settings, out = _settings(given, config, out, resume=resume)
    from edger1.mlx_runtime import prepare

    prepare()
    from edger1.train.finetune import run
    from edger1.train.finetune.opening import open_run

    run.check_folder(out, resume=resume)
    with Show(1) as show:
        opened = open_run(settings, out, resume=resume)
        try:
            for line in (*opened.policy.describe(), *opened.method.describe()):
                show.say(line)
            for line in opened.plan_lines():
                show.say(line)
            if plan_only:
                return
            show.steps = opened.settings.train.steps
            limit = None if minutes is None else time.monotonic() + 60 * minutes
            with interrupts() as asked:
                result = opened.finetuning.run(
                    lambda event: _step(show, event),
                    lambda: bool(asked) or (limit is not None and time.monotonic() > limit),
                )
        finally:
            opened.close()
    if not result.finished:
        again = f"edger1 finetune --output {out} --resume"
        typer.echo(f"Stopped after step {result.progress.step}; all is saved. Go on with: {again}", err=True)
        if asked:
            raise typer.Exit(INTERRUPTED)
    else:
        of = f"; the adapter is that of step {result.best_step}" if result.best_step is not None else ""
        early = (
            f" early, for no better measurement in {opened.settings.train.patience}" if result.progress.ended else ""
        )
        typer.echo(f"Finished{early} after step {result.progress.step}{of}.", err=True)
        if result.progress.best is not None and result.progress.best_step == 0:
            typer.echo("No measurement was better than the one before training: this adapter is no gain.", err=True)
    typer.echo(str(result.folder))


def _settings(
    given: dict[str, dict[str, Any]], config: Path | None, out: Path | None, *, resume: bool
) -> tuple[Any, Path]:
    """Return the settings: a file's, or those of the run to go on with, with the command line's put over them."""
    from edger1.train import tables
    from edger1.train.finetune import settings as reading
    from edger1.train.finetune.run import CONFIG

    if resume and out is None:
        raise UsageError("--output is missing; name the run to go on with.")
    if config is None and resume and out is not None:
        config = out / CONFIG
        if not config.is_file():
            raise UsageError(f"{out} holds no {CONFIG}, so there is no run to go on with; leave --resume out to begin.")
    merged = reading.merged(tables.load(config) if config is not None else {}, given)
    settings = reading.from_tables(merged, "The command line" if config is None else str(config))
    if not settings.model.name:
        raise UsageError("MODEL is missing; name one, such as smollm2-135m (edger1 models lists them).")
    if out is None:
        out = Path("runs") / f"{Path(settings.model.name).name}-{settings.train.method}"
    return settings, out


def _setting(text: str) -> tuple[str, str, Any]:
    """Read TABLE.KEY=VALUE; a value that is no TOML is a text."""
    place, equals, value = text.partition("=")
    table, dot, key = place.strip().partition(".")
    if not equals or not dot or not key:
        raise UsageError(f'--set is "{text}"; expected TABLE.KEY=VALUE, such as train.schedule=wsd.')
    try:
        return table, key, tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        return table, key, value.strip()


def _view(run: Path, step: int | None) -> None:
    from edger1.train.finetune.show import show

    show(run, step)


def _step(show: Show, event: Event) -> None:
    from edger1.cli.options import printable

    found = event.figures
    parts = [f"loss {found['loss']:.3f}"] if "loss" in found else []
    parts += [f"reward {found['reward']:.3f}"] if "reward" in found else []
    parts += [f"{found['tokens_per_s']:,.0f} tokens/s"] if "tokens_per_s" in found else []
    show.step(event.progress.step, " · ".join(parts), measured=_measured(event.evaluation))
    for sample in event.evaluation.samples if event.evaluation is not None else ():
        show.say(f"  {_line(printable(sample.prompt), 40)} -> {_line(printable(sample.text), 100)}")


def _measured(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return ""
    return "held out: " + ", ".join(f"{name} {value:.4g}" for name, value in evaluation.figures.items())


def _line(text: str, width: int) -> str:
    """Put a text into one line of a width."""
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
