"""`edger1 demo`: a few sample questions, and whether the answers are right."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from edger1.cli import options


def demo_command(
    model: Annotated[str, typer.Argument(metavar="[MODEL]", help="A model with sample questions.")] = "nano-moe",
    count: Annotated[int, typer.Option("--questions", "-n", min=1, metavar="N", help="How many questions.")] = 6,
    seed: Annotated[int | None, typer.Option(metavar="N", help="The same seed asks the same questions.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    precision: options.Precision = "fast",
) -> None:
    """Ask a model sample questions of the kinds it learned, and tell which answers are right.

    nano-moe comes with EdgeR1: a DeepSeek-V3 of 22 million parameters that was trained on a laptop. It was not
    trained on these questions. Nothing is fetched.

    Examples:

      edger1 demo

      edger1 demo --questions 20 --seed 1
    """
    from edger1.answers import same_answer
    from edger1.cli.loading import open_model
    from edger1.demo import questions
    from edger1.installed import resolve

    asked = questions(resolve(model), count, seed)
    rows, tokens, seconds = [], 0, 0.0
    with open_model(model, memory=None, context=None, precision=precision, offline=True) as loaded:
        for number, one in enumerate(asked, 1):
            if not json_:
                typer.echo(typer.style(f"{number}. {one.task}", bold=True) + f"\n{one.question}")
            answer = loaded.generate([{"role": "user", "content": one.question}], temperature=0, max_tokens=512)
            text = options.printable(answer.text.strip())
            right = answer.finish_reason == "stop" and same_answer(text, one.answer)
            rows.append({"task": one.task, "question": one.question, "expected": one.answer, "right": right})
            rows[-1] |= {"answer": text, "thinking": answer.thinking.strip()}
            if rate := answer.figures.decode_tokens_per_s:
                tokens += answer.usage.completion_tokens
                seconds += answer.usage.completion_tokens / rate
            if not json_:
                typer.secho(options.printable(answer.thinking.strip()), dim=True)
                said = typer.style("right", fg="green") if right else typer.style("wrong", fg="red")
                typer.echo(f"{text or '(no answer)'}   {said}" + ("" if right else f", expected {one.answer}") + "\n")
    good = sum(row["right"] is True for row in rows)
    rate = tokens / seconds if seconds else None
    if json_:
        result = {
            "model": loaded.name,
            "asked": len(rows),
            "right": good,
            "decode_tokens_per_s": rate,
            "questions": rows,
        }
        typer.echo(json.dumps(result, ensure_ascii=False, indent=1))
        return
    typer.echo(f"{good} of {len(rows)} right" + (f", at {rate:,.0f} tokens a second." if rate else "."))
