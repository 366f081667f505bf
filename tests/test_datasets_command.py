"""`edger1 data`: a dataset shown before anything is trained on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edger1.cli import app
from edger1.errors import FormatError

NANO = Path(__file__).parents[1] / "recipes" / "nano" / "weights" / "nano-moe"
ROWS = [
    {"prompt": f"What is {n} and {n}?", "completion": f"<think>\nthe sum of {n}\n</think>\n\n{2 * n}"}
    for n in range(20)
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def test_kind_and_rows_are_shown_without_a_model(rows: Path) -> None:
    shown = CliRunner().invoke(app, ["data", str(rows)]).stdout
    assert "20 rows of kind completion (prompt, completion), with reasoning: 20 in R1 form" in shown
    assert "with reasoning: 100% of rows" in shown
    assert "assistant: <think>the sum of 0</think>0" in shown


def test_what_is_learned_is_shown_and_counted_with_a_model(rows: Path) -> None:
    shown = CliRunner().invoke(app, ["data", str(rows), "--model", str(NANO)]).stdout
    assert "20 documents" in shown
    assert "<｜User｜>What is 0 and 0?<｜Assistant｜><think>\nthe sum of 0\n</think>\n\n0<｜end" in shown
    figures = json.loads(CliRunner().invoke(app, ["data", str(rows), "--model", str(NANO), "--json"]).stdout)
    assert (figures["kind"], figures["rows"], figures["reasoning"]) == ("completion", 20, 1.0)
    assert 0 < figures["counted"] < figures["tokens"]


def test_preference_rows_count_both_answers(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "q", "chosen": "right", "rejected": "wrong"}))
    figures = json.loads(CliRunner().invoke(app, ["data", str(path), "--model", str(NANO), "--json"]).stdout)
    assert (figures["kind"], figures["rows"], figures["documents"]) == ("preference", 1, 2)


def test_bad_rows_are_an_error_or_counted(rows: Path) -> None:
    rows.write_text(rows.read_text() + "\n{broken\n")
    refused = CliRunner().invoke(app, ["data", str(rows)])
    assert isinstance(refused.exception, FormatError)
    assert "rows.jsonl, line 21: it is not JSON" in str(refused.exception)
    assert "1 bad rows left out" in CliRunner().invoke(app, ["data", str(rows), "--skip-bad"]).stdout
