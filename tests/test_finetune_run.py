"""The loop of fine-tuning: what a run leaves, and that stopping and going on changes nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from children import child
from tiny import write_tiny_model
from typer.testing import CliRunner

from edger1.cli import app
from edger1.errors import FormatError, MemoryCeilingError, UsageError
from edger1.train import log, run_folder
from edger1.train.finetune import checkpoint, settings
from edger1.train.finetune.method import Batch, Evaluation, Step
from edger1.train.finetune.opening import Opened, open_run
from edger1.train.finetune.run import Event, Result
from edger1.train.finetune.settings import Settings
from edger1.train.folder_writer import SaveError
from edger1.train.run_folder import DivergedError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "yes" if i % 2 else "no"}]}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chosen(model: Path, data: Path, **train: Any) -> Settings:
    return settings.from_tables(
        {
            "model": {"name": str(model)},
            "adapter": {"rank": 4, "dropout": 0.1},
            "data": {"path": str(data), "length": 64, "validation_share": 0.2},
            "train": {
                "steps": 6, "rows": 2, "accumulate": 2, "learning_rate": 1e-2, "evaluate_every": 2, "save_every": 2,
                "samples": 1, "sample_tokens": 4, "keep": "last", **train,
            },
        },
        "test",
    )  # fmt: skip


def train(
    found: Settings,
    run: Path,
    *,
    resume: bool = False,
    after: int | None = None,
    change: Callable[[Opened], None] | None = None,
) -> tuple[Result, list[Event]]:
    events: list[Event] = []
    opened = open_run(found, run, resume=resume)
    try:
        if change is not None:
            change(opened)
        steps = lambda: sum(bool(event.figures) for event in events)  # noqa: E731
        result = opened.finetuning.run(events.append, lambda: after is not None and steps() >= after)
    finally:
        opened.close()
    return result, events


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapters.safetensors").read_bytes()


def test_a_run_learns_and_leaves_what_it_says(model: Path, data: Path, tmp_path: Path) -> None:
    found = chosen(model, data, steps=16, accumulate=1, learning_rate=2e-2, evaluate_every=8, save_every=8)
    result, events = train(found, tmp_path / "run")
    assert result.finished
    assert result.folder == tmp_path / "run" / "adapter"
    measured = [event.evaluation.figures["loss"] for event in events if event.evaluation is not None]
    assert len(measured) == 3
    assert measured[-1] < 0.5 * measured[0]
    entries = log.read(tmp_path / "run" / "log.jsonl")
    assert [entry["step"] for entry in entries if "loss" in entry] == list(range(1, 17))
    assert entries[-1]["evaluation"]["loss"] == measured[-1]
    samples = log.read(tmp_path / "run" / "samples.jsonl")
    assert {sample["step"] for sample in samples} == {0, 8, 16}
    assert (tmp_path / "run" / "loss.png").exists() or (tmp_path / "run" / "loss.svg").exists()
    assert settings.read(tmp_path / "run" / "finetune.toml") == found
    config = json.loads((result.folder / "adapter_config.json").read_text())
    assert config["lora_parameters"]["rank"] == 4


def test_a_resumed_run_has_the_weights_of_one_that_never_stopped(model: Path, data: Path, tmp_path: Path) -> None:
    found = chosen(model, data)
    whole, _ = train(found, tmp_path / "whole")
    stopped, _ = train(found, tmp_path / "parts", after=3)
    assert not stopped.finished
    assert stopped.folder.name == "step-00000003"
    resumed, _ = train(settings.read(tmp_path / "parts" / "finetune.toml"), tmp_path / "parts", resume=True)
    assert resumed.finished
    assert adapter_bytes(resumed.folder) == adapter_bytes(whole.folder)
    timeless = [
        [{k: v for k, v in entry.items() if k != "tokens_per_s"} for entry in log.read(tmp_path / run / "log.jsonl")]
        for run in ("whole", "parts")
    ]
    assert timeless[0] == timeless[1]


_CHILD = """
import sys
from pathlib import Path
from edger1.mlx_runtime import prepare
prepare()
from edger1.train.finetune import settings
from edger1.train.finetune.opening import open_run
opened = open_run(settings.read(Path(sys.argv[1])), Path(sys.argv[2]))
opened.finetuning.run(lambda event: print(event.progress.step, flush=True))
"""


def test_a_killed_run_goes_on_to_the_same_weights(model: Path, data: Path, tmp_path: Path) -> None:
    found = chosen(model, data)
    whole, _ = train(found, tmp_path / "whole")
    (tmp_path / "settings.toml").write_text(found.to_toml())
    command = [sys.executable, "-c", _CHILD, str(tmp_path / "settings.toml"), str(tmp_path / "run")]
    with child(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert any(line.strip() == "3" for line in process.stdout), "it ended before its third step"
        process.send_signal(signal.SIGKILL)
    result, _ = train(found, tmp_path / "run", resume=True)
    assert adapter_bytes(result.folder) == adapter_bytes(whole.folder)


def test_how_a_step_is_split_into_batches_changes_nothing(model: Path, data: Path, tmp_path: Path) -> None:
    found = chosen(model, data)
    opened = open_run(replace(found, adapter=replace(found.adapter, dropout=0.0)), tmp_path / "run")
    step = opened.method.step(opened.policy, 0)
    rows = [
        Batch(batch.ids[r : r + 1], batch.documents[r : r + 1], batch.weights[r : r + 1])
        for batch in step.batches
        for r in range(len(batch.ids))
    ]
    assert len(rows) > len(step.batches)
    first = opened.finetuning._gradients(step, 0)
    second = opened.finetuning._gradients(replace(step, batches=rows), 0)
    opened.close()
    assert abs(first[0] - second[0]) < 1e-5
    for name, gradient in first[2].items():
        assert bool(mx.allclose(gradient, second[2][name], rtol=1e-3, atol=1e-6).item())


class _Worse:
    """A method whose measurements get worse after the second, and whose loss may turn NaN."""

    name = "worse"

    def __init__(self, inner: Any, nan_at: int = -1) -> None:
        self.inner, self.nan_at, self.count = inner, nan_at, 0

    def describe(self) -> list[str]:
        return []

    def step(self, policy: Any, step: int) -> Step:
        found: Step = self.inner.step(policy, step)
        if step == self.nan_at:
            return Step(
                [
                    replace(batch, weights=np.where(batch.weights != 0, np.float32(np.nan), np.float32(0)))
                    for batch in found.batches
                ],
                found.tokens,
            )
        return found

    def loss(self, policy: Any, batch: Batch) -> Any:
        return self.inner.loss(policy, batch)

    def evaluate(self, policy: Any, step: int) -> Evaluation:
        self.count += 1
        better = self.count if self.count <= 2 else -self.count
        return Evaluation({"loss": -float(better)}, float(better))

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return {"count": self.count}, {"array": np.arange(self.count)}

    def restore(self, values: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        assert arrays["array"].tolist() == list(range(values["count"]))
        self.count = values["count"]


def instead(**options: Any) -> Callable[[Opened], None]:
    def change(opened: Opened) -> None:
        opened.finetuning.method = _Worse(opened.method, **options)

    return change


def test_a_run_ends_early_and_keeps_the_best_adapter(model: Path, data: Path, tmp_path: Path) -> None:
    found = chosen(model, data, steps=20, patience=2, keep="best")
    result, _ = train(found, tmp_path / "run", change=instead())
    assert result.finished
    assert result.progress.ended
    # Measured after 0, 2, 4 and 6 steps; the second was best.
    assert result.progress.step == 6
    assert result.best_step == 2
    assert adapter_bytes(result.folder) == adapter_bytes(checkpoint.best(tmp_path / "run"))
    assert adapter_bytes(result.folder) != adapter_bytes(tmp_path / "run/checkpoints/step-00000006/adapter")


def test_a_loss_that_is_no_number_stops_the_run_before_its_update(model: Path, data: Path, tmp_path: Path) -> None:
    found = chosen(model, data)
    with pytest.raises(DivergedError, match="step 4, whose update was not made; the last good checkpoint is"):
        train(found, tmp_path / "run", change=instead(nan_at=3))
    kept = run_folder.latest(tmp_path / "run")
    assert kept is not None
    assert kept.name == "step-00000002"
    assert all(bool(mx.isfinite(value).all().item()) for value in checkpoint.load(kept).arrays.values())


def test_a_full_disk_leaves_the_checkpoint_before(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = chosen(model, data)
    train(found, tmp_path / "run", after=2)
    kept = run_folder.latest(tmp_path / "run")
    assert kept is not None
    before = adapter_bytes(kept / "adapter")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "write_tensors", full)
    with pytest.raises(SaveError, match="no space left"):
        train(found, tmp_path / "run", resume=True)
    assert run_folder.latest(tmp_path / "run") == kept
    assert adapter_bytes(kept / "adapter") == before


def test_runs_are_not_mixed_up(model: Path, data: Path, tmp_path: Path) -> None:
    found = chosen(model, data)
    with pytest.raises(UsageError, match="no checkpoint"):
        train(found, tmp_path / "run", resume=True)
    train(found, tmp_path / "run", after=1)
    with pytest.raises(UsageError, match="not empty"):
        train(found, tmp_path / "run")
    other = replace(found, adapter=replace(found.adapter, rank=8))
    with pytest.raises(UsageError, match="another model or adapter"):
        train(other, tmp_path / "run", resume=True)
    damaged = tmp_path / "run/checkpoints/step-00000001/training.json"
    damaged.write_text(damaged.read_text()[:40])
    with pytest.raises(FormatError, match="no whole checkpoint"):
        train(found, tmp_path / "run", resume=True)


def test_what_does_not_fit_into_memory_is_refused(model: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(MemoryCeilingError, match="--memory"):
        open_run(chosen(model, data, memory="1MB"), tmp_path / "run")


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"train": {"method": "sgd"}}, "expected one of"),
        ({"train": {"rate": 1}}, "no setting"),
        ({"train": {"steps": "many"}}, "whole number"),
        ({"adapter": {"targets": "q_proj"}}, "list of texts"),
        ({"trian": {}}, r"expected \[model\]"),
        ({"data": {"validation_share": 1.5}}, "validation_share"),
    ],
)
def test_settings_that_cannot_be(tables: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        settings.from_tables(tables, "here")


def test_the_command_trains_resumes_and_plans(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from edger1.cli.finetune import finetune_command

    run = tmp_path / "run"
    options = ["train.accumulate=1", "data.length=64", "train.samples=1", "train.sample_tokens=4"]
    finetune_command(str(model), data=data, out=run, steps=3, rank=2, rows=2, options=options, plan=True)
    assert not run.exists()
    assert "3 steps of up to 128 tokens" in capsys.readouterr().err
    finetune_command(str(model), data=data, out=run, steps=3, rank=2, rows=2, options=options, minutes=1e-9)
    assert f"edger1 finetune --output {run} --resume" in capsys.readouterr().err
    finetune_command(out=run, resume=True)
    shown = capsys.readouterr()
    assert shown.out.strip() == str(run / "adapter")
    assert "step 3 of 3" in shown.err
    for wrong in ({"out": run, "resume": False}, {"out": tmp_path / "none", "resume": True}, {"options": ["steps"]}):
        with pytest.raises(UsageError):
            finetune_command(**wrong)  # type: ignore[arg-type]


def test_only_a_run_that_was_measured_is_told_to_be_no_gain(model: Path, data: Path, tmp_path: Path) -> None:
    for share, said in ((0.0, False), (0.3, True)):
        options = ["--output", str(tmp_path / str(share)), "--steps", "1", "--lr", "1e-12", "--set", "train.samples=0"]
        options += ["--set", f"data.validation_share={share}"]
        done = CliRunner().invoke(app, ["finetune", str(model), "--data", str(data), *options])
        assert done.exit_code == 0, done.output
        assert ("this adapter is no gain" in done.output) == said
