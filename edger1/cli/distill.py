"""`edger1 distill`: a teacher's verified reasoning traces become a data set."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edger1.cli import INTERRUPTED, options
from edger1.errors import UsageError

if TYPE_CHECKING:
    from edger1.train.distill.dataset import Report
    from edger1.train.distill.sampling import Progress
    from edger1.train.distill.teachers import Teacher
    from edger1.train.rewards.opening import Rewards


def distill_command(
    teacher: Annotated[
        str,
        typer.Option("--teacher", metavar="MODEL|URL", help="A model, or an OpenAI-compatible address ending in /v1."),
    ],
    prompts: Annotated[
        str, typer.Option("--prompts", metavar="FILE|gym:TASK", help="Rows with prompts, or a task of reasoning-gym.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FOLDER", help="The data set, its card and cache.")],
    verify: Annotated[
        list[str] | None,
        typer.Option(metavar="REWARD", help="Keep answers to which this reward gives 1; repeatable. docs/rewards.md."),
    ] = None,
    unverified: Annotated[bool, typer.Option("--unverified", help="Keep all answers, for comparison.")] = False,
    samples: Annotated[int, typer.Option("-n", "--samples", metavar="N", help="Answers to each prompt.")] = 4,
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="N|all", help="Accepted answers kept of a prompt, shortest first. Default: 1; unverified, all."
        ),
    ] = None,
    at_least: Annotated[float, typer.Option("--at-least", metavar="R", help="What every reward must give.")] = 1.0,
    not_in: Annotated[
        list[str] | None,
        typer.Option("--not-in", metavar="FILE", help="Leave out prompts that are in this file; repeatable."),
    ] = None,
    size: Annotated[int | None, typer.Option(metavar="N", help="The first N prompts; how many to generate.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out bad rows, and count them.")] = False,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Longest answer; longer ones are not kept.")] = 4096,
    temperature: Annotated[float, typer.Option(metavar="T", help="How freely answers are drawn.")] = 0.7,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    think: options.Think = "auto",
    seed: Annotated[int, typer.Option(metavar="N", help="Another seed draws other answers.")] = 0,
    teacher_model: Annotated[
        str | None, typer.Option("--teacher-model", metavar="NAME", help="Which of the models at the address.")
    ] = None,
    concurrency: Annotated[int, typer.Option(metavar="N", help="Answers under way at once.")] = 8,
    timeout: Annotated[float, typer.Option(metavar="S", help="Longest silence of an address, in seconds.")] = 600.0,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Answers, shared by runs. Default: samples.sqlite in the folder."),
    ] = None,
    license_: Annotated[str | None, typer.Option("--license", metavar="NAME", help="For the card.")] = None,
    memory: options.Memory = None,
    context: options.Context = None,
    precision: options.Precision = "fast",
    offline: options.Offline = False,
) -> None:
    """Sample reasoning traces from a teacher and keep those that a verifier accepts.

    Of each prompt's answers the shortest accepted one is kept, unless --keep says otherwise. The folder gets data.jsonl
    to train on, samples.jsonl with every answer and its verdict, and README.md, a card with counts and settings. A run
    that was stopped or killed goes on where it was: run the same command again.

    A key for an address is taken from the environment variable EDGER1_TEACHER_KEY.

    [bold]Examples[/bold]

      edger1 distill --teacher qwen3-8b --prompts problems.jsonl --verify maths -o traces

      edger1 distill --teacher http://127.0.0.1:8080/v1 --prompts gym:countdown --size 500 -n 8 -o traces

      edger1 finetune smollm2-135m --data traces/data.jsonl
    """
    from edger1.cli.training import interrupts
    from edger1.train.distill.prompts import GENERATED, read_prompts
    from edger1.train.distill.run import run
    from edger1.train.distill.sampling import Settings
    from edger1.train.distill.teachers import Drawing

    kept = _kept(keep, unverified)
    drawing = Drawing(max_tokens, temperature, top_p, top_k, min_p, think)
    settings = Settings(samples, kept, drawing, seed)
    settings.check()
    _check(settings.drawing, samples, concurrency, timeout, output)
    if unverified and verify:
        raise UsageError("--unverified keeps all answers, and --verify names what to keep; give one of the two.")
    if not (unverified or verify or prompts.startswith(GENERATED)):
        raise UsageError(
            "Nothing says which answers are right: give --verify REWARD, or --unverified to keep them all."
        )
    found = read_prompts(prompts, size=size, seed=seed, skip_bad=skip_bad)
    with ExitStack() as stack:
        rewards: Rewards | None = None
        verified_by: list[str] = []
        if verify:
            from edger1.train.rewards.opening import open_rewards

            rewards, verified_by = stack.enter_context(open_rewards(verify)), list(verify)
        elif not unverified and found.reward is not None:
            rewards, verified_by = stack.enter_context(found.reward), [prompts]
        asked_of = stack.enter_context(
            _open_teacher(teacher, teacher_model, concurrency, timeout, memory, context, precision, offline)
        )
        show = stack.enter_context(_Show())
        asked = stack.enter_context(interrupts())
        report = run(
            settings,
            asked_of,
            found,
            rewards,
            output,
            at_least=at_least,
            evaluation=not_in or (),
            cache=cache,
            verified_by=verified_by,
            command=shlex.join(["edger1", *sys.argv[1:]]),
            license_=license_,
            on_progress=show,
            stop=lambda: bool(asked),
        )
    _tell(report)
    if not report.finished:
        raise typer.Exit(INTERRUPTED)


def _kept(keep: str | None, unverified: bool) -> int | None:
    if keep is None:
        return None if unverified else 1
    if keep == "all":
        return None
    if not keep.isdecimal():
        raise UsageError(f'--keep is {keep!r}; expected a number of answers, or "all".')
    return int(keep)


def _check(drawing: object, samples: int, concurrency: int, timeout: float, output: Path) -> None:
    from edger1 import sampling
    from edger1.messages import Sampling
    from edger1.train.distill.teachers import Drawing

    assert isinstance(drawing, Drawing)
    sampling.check(Sampling(drawing.temperature, drawing.top_p, drawing.top_k, drawing.min_p))
    sampling.check_count("--max-tokens", drawing.max_tokens)
    if drawing.temperature == 0 and samples > 1:
        raise UsageError(f"At --temperature 0 all {samples} answers to a prompt are the same; give -n 1, or more heat.")
    if not 1 <= concurrency <= 256:
        raise UsageError(f"--concurrency is {concurrency}; expected 1 to 256.")
    if not timeout > 0:
        raise UsageError(f"--timeout is {timeout:g}; expected more than 0 seconds.")
    if output.exists() and not output.is_dir():
        raise UsageError(f"{output} is a file; --output names a folder.")


@contextmanager
def _open_teacher(
    name: str,
    model: str | None,
    concurrency: int,
    timeout_s: float,
    memory: str | None,
    context: int | None,
    precision: str,
    offline: bool,
) -> Iterator[Teacher]:
    from edger1.train.distill.remote import KEY_VARIABLE, RemoteTeacher, is_address
    from edger1.train.distill.teachers import LocalTeacher

    if is_address(name):
        key = os.environ.get(KEY_VARIABLE) or None
        yield RemoteTeacher(name, model, key=key, concurrency=concurrency, timeout_s=timeout_s)
        return
    if model is not None:
        raise UsageError(f"--teacher-model chooses among the models at an address, and --teacher is {name!r}.")
    from edger1.cli.loading import ensure_model, open_model
    from edger1.config import load_config

    folder = ensure_model(name, offline or load_config().offline)
    with open_model(str(folder), memory=memory, context=context, precision=precision, offline=offline) as loaded:
        local = LocalTeacher(loaded, folder, concurrency=concurrency)
        try:
            yield local
        finally:
            local.stop()


class _Show:
    """Shows a run on standard error: a line that changes on a terminal, otherwise a line now and then."""

    _EVERY_S = 20.0

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._shown = 0.0

    def __enter__(self) -> _Show:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def __call__(self, progress: Progress) -> None:
        """Show how far it is."""
        at = time.monotonic()
        if at - self._shown < (0.1 if self._terminal else self._EVERY_S) and progress.done < progress.total:
            return
        self._shown = at
        start, end = ("\r\x1b[K", "") if self._terminal else ("", "\n")
        print(f"{start}{said(progress)}", end=end, file=sys.stderr, flush=True)


def said(progress: Progress) -> str:
    """Put a run's progress into a line."""
    parts = [f"{progress.done:,} of {progress.total:,} samples"]
    if progress.acceptance is not None:
        parts.append(f"{progress.acceptance:.0%} accepted")
    if progress.cached:
        parts.append(f"{progress.cached:,} from the cache")
    if progress.unanswered:
        parts.append(f"{progress.unanswered:,} unanswered")
    if progress.seconds_left is not None and progress.done < progress.total:
        parts.append(f"{_duration(progress.seconds_left)} left")
    return " · ".join(parts)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _tell(report: Report) -> None:
    counts = report.counts
    rejected = f"{counts.cut_off:,} cut off" + (f", {counts.wrong:,} wrong" if counts.wrong else "")
    say = [f"{counts.accepted:,} of {counts.samples:,} samples accepted ({counts.acceptance:.0%}; {rejected})"]
    say.append(
        f"{counts.kept:,} kept, of {counts.prompts - counts.prompts_without_answer:,} of {counts.prompts:,} prompts"
    )
    if counts.prompts_in_evaluation:
        say.append(f"{counts.prompts_in_evaluation:,} prompts left out, found in --not-in")
    typer.echo("; ".join(say) + ".", err=True)
    if report.unanswered:
        again = "run the same command again to ask once more"
        typer.echo(
            f"{len(report.unanswered):,} samples unanswered, {again}. The first: {report.unanswered[0]}", err=True
        )
    if not report.finished:
        typer.echo("Stopped; all answers are kept. Run the same command again to go on.", err=True)
    elif counts.kept:
        typer.echo(
            f"Train on it: edger1 finetune MODEL --data {shlex.quote(str(report.folder / 'data.jsonl'))}", err=True
        )
    typer.echo(str(report.folder))
