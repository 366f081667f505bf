"""A whole run of GRPO as the command line makes it: from a file of questions to an adapter, stopped and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import write_tiny_model

from edger1.errors import FormatError, UsageError
from edger1.train import log
from edger1.train.finetune import rollout_log, settings, show
from edger1.train.finetune.opening import open_run
from edger1.train.finetune.run import Result
from edger1.train.finetune.settings import Settings


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions, and a reward of one's own: how many of the answer's characters are capitals."""
    path = tmp_path_factory.mktemp("data")
    rows = [{"question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(12)]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    reward = "def capitals(completion):\n    return sum(c.isupper() for c in completion.text) / 8\n"
    (path / "own.py").write_text(reward, encoding="utf-8")
    return path


def chosen(model: Path, folder: Path, **tables: dict[str, Any]) -> Settings:
    given: dict[str, dict[str, Any]] = {
        "model": {"name": str(model)},
        "adapter": {"rank": 4},
        "data": {"path": str(folder / "rows.jsonl"), "validation_share": 0.2},
        "train": {
            "method": "grpo", "steps": 5, "learning_rate": 1e-2, "evaluate_every": 2, "save_every": 1, "keep": "last",
        },
        "grpo": {"group": 4, "prompts": 2, "max_tokens": 8, "beta": 0.02},
        "rewards": {"use": [f"{folder / 'own.py'}:capitals"]},
    }  # fmt: skip
    return settings.from_tables({n: {**given.get(n, {}), **tables.get(n, {})} for n in given | tables}, "test")


def run(found: Settings, where: Path, *, resume: bool = False, after: int | None = None) -> Result:
    steps: list[int] = []
    opened = open_run(found, where, resume=resume)
    try:
        return opened.finetuning.run(
            lambda event: steps.extend([1] * bool(event.figures)), lambda: after is not None and len(steps) >= after
        )
    finally:
        opened.policy.close()


def test_a_run_that_is_stopped_within_a_sampling_and_resumed_has_the_weights_of_one_that_was_not(
    model: Path, folder: Path, tmp_path: Path
) -> None:
    found = chosen(model, folder)
    whole = run(found, tmp_path / "whole")
    assert run(found, tmp_path / "parts", after=3).folder.name == "step-00000003"
    resumed = run(settings.read(tmp_path / "parts" / "finetune.toml"), tmp_path / "parts", resume=True)
    ends = [(result.folder / "adapters.safetensors").read_bytes() for result in (whole, resumed)]
    assert ends[0] == ends[1]
    tables = [show.read(tmp_path / name) for name in ("whole", "parts")]
    assert tables[0] == tables[1]
    assert [row.step for row in tables[0].rows] == [1, 3, 5]
    entries = log.read(tmp_path / "whole" / "log.jsonl")
    sampled = next(entry for entry in entries if entry["step"] == 1)
    assert sampled["mismatch"] < 1e-4
    assert sampled["kl"] < 1e-9
    assert len(rollout_log.read(tmp_path / "whole" / rollout_log.FILE).steps[1]) == 2


def test_what_nothing_can_be_learned_from_is_refused(model: Path, folder: Path, tmp_path: Path) -> None:
    for tables, error, said in (
        ({"rewards": {"use": []}}, UsageError, "use is empty"),
        ({"adapter": {"dropout": 0.1}}, UsageError, "dropout"),
        ({"data": {"length": 12}}, FormatError, "no prompt that leaves room"),
        ({"grpo": {"overlong": 0.5}, "rewards": {"use": ["overlong:limit=8,buffer=2"]}}, UsageError, "overlong"),
    ):
        with pytest.raises(error, match=said):
            run(chosen(model, folder, **tables), tmp_path / "run")


def test_steps_follow_from_epochs_and_prompts(model: Path, folder: Path, tmp_path: Path) -> None:
    opened = open_run(chosen(model, folder, train={"steps": 0, "epochs": 3.0}), tmp_path / "run")
    try:
        prompts = int(opened.method.describe()[-2].split()[0])
        assert opened.settings.train.steps == -(-3 * prompts // 2) * 2
        assert opened.settings.tables["grpo"]["batch_tokens"] == 4096
        assert opened.settings.tables["grpo"]["cache_bytes"] > 0
    finally:
        opened.policy.close()
