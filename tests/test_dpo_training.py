"""`edger1 finetune --method dpo` and `--method distill`, from files to an adapter, stopped and gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from tiny import write_tiny_model

from edger1.errors import UsageError
from edger1.train.finetune import settings as reading
from edger1.train.finetune.opening import open_run
from edger1.train.finetune.settings import Settings


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take longer than the training here, and are tested elsewhere."""
    monkeypatch.setattr("edger1.train.finetune.report.draw", lambda *_: None)


def preferences(folder: Path) -> Path:
    path = folder / "pairs.jsonl"
    rows = [
        {
            "prompt": f"What is {i}?",
            "chosen": f"{i}.",
            "rejected": f"<think>\nWell, {i}\n</think>\n\nIt is {i}, I think.",
        }
        for i in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chats(folder: Path) -> Path:
    path = folder / "chats.jsonl"
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings(model: Path, data: Path, method: str, **own: Any) -> Settings:
    train = {"method": method, "steps": 4, "learning_rate": 5e-3, "evaluate_every": 2, "save_every": 2, "samples": 1}
    tables = {
        "model": {"name": str(model)},
        "adapter": {"rank": 4},
        "data": {"path": str(data), "validation_share": 0.2},
        "train": {**train, "sample_tokens": 4},
        method: own,
    }
    return reading.from_tables(tables, "test")


def train(chosen: Settings, run: Path, *, stop_after: int | None = None, resume: bool = False) -> list[dict[str, Any]]:
    """Run, and return the log."""
    opened = open_run(chosen, run, resume=resume)
    done: list[int] = []
    try:
        opened.finetuning.run(
            lambda event: done.append(event.progress.step), lambda: stop_after is not None and stop_after in done
        )
    finally:
        opened.policy.close()
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, Any]:
    return dict(mx.load(str(run / "adapter" / "adapters.safetensors")))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(bool(mx.array_equal(one[name], other[name])) for name in one)


def test_dpo_learns_its_pairs_and_a_stop_changes_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    chosen = settings(tiny_folder, preferences(tmp_path), "dpo", pairs=4)
    log = train(chosen, tmp_path / "whole")
    steps = [entry for entry in log if "loss" in entry]
    assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert steps[0]["margin"] == pytest.approx(0, abs=1e-3)
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.05
    assert steps[-1]["margin"] > 0
    measured = [entry["evaluation"] for entry in log if "evaluation" in entry]
    assert measured[-1]["loss"] < measured[0]["loss"]
    assert {"accuracy", "margin", "rewards_chosen", "rewards_rejected"} <= measured[0].keys()
    assert (tmp_path / "whole" / "cache" / "references.sqlite").is_file()

    train(chosen, tmp_path / "halves", stop_after=3)
    train(chosen, tmp_path / "halves", resume=True)
    assert same(weights(tmp_path / "halves"), weights(tmp_path / "whole"))


def test_dpo_refuses_data_without_pairs(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"chats.jsonl has rows of kind completion; DPO learns from pairs"):
        open_run(settings(tiny_folder, chats(tmp_path), "dpo"), tmp_path / "run")


def test_logits_of_a_teacher_are_approached_and_a_stop_changes_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    teacher = write_tiny_model(tmp_path / "teacher", seed=5)
    chosen = settings(tiny_folder, chats(tmp_path), "distill", teacher=str(teacher), top=20)
    log = train(chosen, tmp_path / "whole")
    steps = [entry for entry in log if "loss" in entry]
    assert steps[-1]["kl"] < steps[0]["kl"]
    measured = [entry["evaluation"] for entry in log if "evaluation" in entry]
    assert 0 < measured[-1]["kl"] < measured[0]["kl"]
    assert (tmp_path / "whole" / "cache" / "teacher.sqlite").is_file()

    train(chosen, tmp_path / "halves", stop_after=3)
    train(chosen, tmp_path / "halves", resume=True)
    assert same(weights(tmp_path / "halves"), weights(tmp_path / "whole"))


def test_a_teacher_with_another_tokenizer_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    teacher = write_tiny_model(tmp_path / "teacher")
    file = teacher / "tokenizer.json"
    table = json.loads(file.read_text())
    vocabulary = table["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(table))
    chosen = settings(tiny_folder, chats(tmp_path), "distill", teacher=str(teacher))
    with pytest.raises(UsageError, match="another tokenizer than the student"):
        open_run(chosen, tmp_path / "run")


def test_a_teacher_must_be_named(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\[distill\] teacher is missing"):
        open_run(settings(tiny_folder, chats(tmp_path), "distill"), tmp_path / "run")
