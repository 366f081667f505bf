"""Runs: they learn, stop and go on as if never stopped, and keep what they had when something fails."""

from __future__ import annotations

import errno
import json
import math
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_corpus import DENSE, MOE, counting_documents, write_corpus

from edger1.errors import FormatError, UsageError
from edger1.train import folder_writer, log, run_folder
from edger1.train.folder_writer import SaveError
from edger1.train.pretrain import run as pretrain
from edger1.train.pretrain import settings
from edger1.train.pretrain.corpus import Corpus, open_corpus
from edger1.train.pretrain.run import Event, Pretraining
from edger1.train.pretrain.settings import Settings
from edger1.train.run_folder import DivergedError
from edger1.train.schedule import rate_share

SHORT = Settings(
    steps=12, rows=4, length=32, learning_rate=5e-3, log_every=1, evaluate_every=6, save_every=5, hidden_std=0.1
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return open_corpus(write_corpus(tmp_path_factory.mktemp("corpus"), counting_documents()))


def train(
    corpus: Corpus, run: Path, chosen: Settings = SHORT, config: dict[str, Any] = MOE, **options: Any
) -> tuple[list[Event], pretrain.Result]:
    events: list[Event] = []
    resume = options.pop("resume", False)
    after = options.pop("after", None)
    made = Pretraining(corpus, config, chosen, run, resume=resume)
    result = made.run(events.append, lambda: after is not None and len(events) >= after, **options)
    return events, result


@pytest.mark.parametrize("config", [MOE, DENSE])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_tiny_corpus_is_learned_by_heart(
    corpus: Corpus, tmp_path: Path, config: dict[str, Any], optimizer: str
) -> None:
    chosen = replace(
        SHORT, steps=120, optimizer=optimizer, rows=8, learning_rate=1e-2, evaluate_every=60, save_every=99
    )
    events, result = train(corpus, tmp_path / "run", chosen, config)
    assert result.finished
    assert events[0].loss > 5
    # Which of the 20 documents it is cannot be known at its first token; all else can.
    least = 20 * math.log(20) / (corpus.train.tokens - 20)
    assert 0.9 * least < events[-1].loss < 1.5 * least
    if config is MOE:
        assert events[-1].mtp_loss < 0.1
    assert result.held_out["loss"] > events[-1].loss


@pytest.mark.parametrize("config", [MOE, DENSE])
def test_a_resumed_run_has_the_losses_of_one_never_stopped(
    corpus: Corpus, tmp_path: Path, config: dict[str, Any]
) -> None:
    whole, _ = train(corpus, tmp_path / "whole", config=config)
    first, stopped = train(corpus, tmp_path / "parts", config=config, after=4)
    assert not stopped.finished
    assert stopped.folder.name == "step-00000004"
    second, ended = train(corpus, tmp_path / "parts", config=config, resume=True)
    assert ended.finished
    losses = [[(e.progress.step, e.loss, e.mtp_loss) for e in events] for events in (whole, [*first, *second])]
    assert losses[0] == losses[1]
    for name in ("model.safetensors", "training.safetensors"):
        a, b = (mx.load(str(tmp_path / run / "checkpoints" / "step-00000012" / name)) for run in ("whole", "parts"))
        assert all(mx.array_equal(a[n], b[n]).item() for n in a)
    entries = [log.read(tmp_path / run / "log.jsonl") for run in ("whole", "parts")]
    assert [e["step"] for e in entries[0]] == [e["step"] for e in entries[1]]
    for one, other in zip(*entries, strict=True):
        assert {**one, "tokens_per_s": 0} == {**other, "tokens_per_s": 0}


def test_the_log_and_the_plots_tell_what_happened(corpus: Corpus, tmp_path: Path) -> None:
    _, result = train(corpus, tmp_path / "run")
    entries = log.read(tmp_path / "run" / "log.jsonl")
    steps = [e for e in entries if "loss" in e]
    assert [e["step"] for e in steps] == list(range(1, 13))
    assert [e["step"] for e in entries if "held_out" in e] == [6, 12]
    for entry in steps:
        assert len(entry["experts"]) == 2
        assert all(sum(layer) == pytest.approx(1, abs=1e-3) for layer in entry["experts"])
        assert entry["grad_norm"] > 0
    assert [e["mtp_weight"] for e in steps] == [0.3] * 9 + [0.1] * 3
    for name in ("loss.svg", "experts.svg"):
        assert ET.parse(tmp_path / "run" / name).getroot().tag.endswith("svg")
    config, chosen = settings.read(tmp_path / "run" / "config.toml")
    assert chosen == SHORT
    assert config["n_routed_experts"] == 8
    assert result.folder == tmp_path / "run" / "model"
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000010", "step-00000012"]


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_checkpoint(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Pretraining(corpus, MOE, SHORT, tmp_path / "run")
    compute, calls = pretrain.losses.compute, 0

    def poisoned(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        found = compute(*args)
        return replace(found, main=found.main * math.nan) if calls == 8 else found

    monkeypatch.setattr(pretrain.losses, "compute", poisoned)
    with pytest.raises(
        DivergedError, match=r"loss is nan .* at step 7, .* the last good checkpoint is .*step-00000005"
    ):
        made.run()
    monkeypatch.undo()
    events, result = train(corpus, tmp_path / "run", resume=True)
    assert result.finished
    assert all(math.isfinite(e.loss) for e in events)


def test_a_full_disk_leaves_the_checkpoint_before(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Pretraining(corpus, MOE, SHORT, tmp_path / "run")
    write: Callable[..., None] = folder_writer.write_tensors
    calls = 0

    def full(path: Path, *args: Any) -> None:
        nonlocal calls
        calls += path.name == "training.safetensors"
        if calls == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(path, *args)

    monkeypatch.setattr(run_folder, "write_tensors", full)
    with pytest.raises(SaveError, match="no space left on device"):
        made.run()
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000005"]
    assert train(corpus, tmp_path / "run", resume=True)[1].finished


def test_what_cannot_begin_writes_nothing(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no checkpoint to go on from"):
        Pretraining(corpus, MOE, SHORT, tmp_path / "run", resume=True)
    with pytest.raises(UsageError, match="num_experts_per_tok is 9"):
        Pretraining(corpus, {**MOE, "num_experts_per_tok": 9}, SHORT, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    train(corpus, tmp_path / "run", after=1)
    with pytest.raises(UsageError, match="exists and is not empty"):
        Pretraining(corpus, MOE, SHORT, tmp_path / "run")
    with pytest.raises(UsageError, match="another model or optimizer"):
        Pretraining(corpus, {**MOE, "moe_intermediate_size": 24}, SHORT, tmp_path / "run", resume=True)


def test_minutes_end_a_run_with_a_checkpoint(corpus: Corpus, tmp_path: Path) -> None:
    _, result = train(corpus, tmp_path / "run", replace(SHORT, steps=100000), minutes=1 / 60)
    assert not result.finished
    assert (result.folder / "training.json").is_file()


def test_a_run_that_ended_before_its_first_step_can_begin_and_go_on(corpus: Corpus, tmp_path: Path) -> None:
    run = tmp_path / "run"
    _, result = train(corpus, run, minutes=0.0)
    assert (result.progress.step, result.finished) == (0, False)
    _, result = train(corpus, run, after=1, resume=True)
    assert result.progress.step == 1
    shutil.rmtree(run / "checkpoints")
    (run / "log.jsonl").write_text("[1]\n")
    assert train(corpus, run, after=2)[1].progress.step == 2


def test_a_corpus_without_what_counts_is_refused(tmp_path: Path) -> None:
    asked = [{"messages": [{"role": "user", "content": "1 2 3"}]}] * 3
    silent = open_corpus(write_corpus(tmp_path / "silent", asked))
    with pytest.raises(UsageError, match="no assistant turn"):
        Pretraining(silent, MOE, replace(SHORT, loss_on="assistant"), tmp_path / "run")


def test_a_config_that_cannot_be_written_stays_as_it_was(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train(corpus, run, after=1)
    before = (run / "config.toml").read_text()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_folder, "write_atomically", full)
    with pytest.raises(SaveError, match="No space left"):
        train(corpus, run, replace(SHORT, steps=77), resume=True)
    assert (run / "config.toml").read_text() == before


def test_a_damaged_checkpoint_is_named(corpus: Corpus, tmp_path: Path) -> None:
    _, result = train(corpus, tmp_path / "run", after=2)
    path = result.folder / "training.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(FormatError, match="no whole checkpoint"):
        Pretraining(corpus, MOE, SHORT, tmp_path / "run", resume=True)


@pytest.mark.parametrize("kind", ["wsd", "cosine"])
def test_rates_rise_and_fall(kind: str) -> None:
    chosen = Settings(steps=100, schedule=kind, warmup=0.1, decay=0.2, final=0.1)
    shares = [rate_share(step, chosen) for step in range(100)]
    assert shares[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(a >= b for a, b in pairwise(shares[9:]))
    assert 0.1 <= shares[99] < 0.15
    if kind == "wsd":
        assert all(share == 1 for share in shares[10:80])
        assert shares[90] == pytest.approx(0.1 + 0.9 * 10 / 21)
    else:
        assert shares[55] == pytest.approx(0.55)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x", "is not TOML"),
        ("[train]", "no [model] table"),
        ('train=3\n[model]\nmodel_type="llama"', "expected a table [train]"),
        ('[model]\nmodel_type="llama"\n[train]\nseed=-1', "seed is -1"),
        ('[model]\nmodel_type="llama"\n[train]\nbeta1=1.0', "beta1 is 1.0"),
        ('[model]\nmodel_type="llama"\n[other]', "table [other]"),
        ('[model]\nmodel_type="llama"\n[train]\nstep=1', "step, which is no setting"),
        ('[model]\nmodel_type="llama"\n[train]\nsteps="1"', "expected a whole number"),
        ('[model]\nmodel_type="llama"\n[train]\nsteps=0', "steps is 0"),
        ('[model]\nmodel_type="llama"\n[train]\noptimizer="sgd"', "one of adamw, muon"),
        ('[model]\nmodel_type="llama"\n[train]\nwarmup=2.0', "share between 0 and 1"),
        ('[model]\nmodel_type="llama"\n[train]\nclip=nan', "clip is nan"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        settings.read(path)
    assert said in str(error.value)


def test_settings_survive_being_written(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    model = {**MOE, "architectures": ["A"], "rope": {"a": 1.5}, "none": None}
    path.write_text(settings.to_toml(model, SHORT))
    assert settings.read(path) == ({n: v for n, v in model.items() if v is not None}, SHORT)


def test_the_command_trains_and_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from edger1.cli.finetune import finetune_command

    data = write_corpus(tmp_path / "data", counting_documents())
    config = tmp_path / "c.toml"
    config.write_text(settings.to_toml(MOE, SHORT))
    finetune_command(method="pretrain", config=config, data=data, out=tmp_path / "run", steps=3)
    shown = capsys.readouterr()
    assert shown.out.strip() == str(tmp_path / "run" / "model")
    assert "step 3 of 3" in shown.err
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["num_nextn_predict_layers"] == 1
    finetune_command(method="pretrain", data=data, out=tmp_path / "again", config=config, steps=50000, minutes=0.01)
    assert "--resume" in capsys.readouterr().err
    assert np.isfinite(log.read(tmp_path / "run" / "log.jsonl")[-1]["held_out"]["loss"])
    for options in ({}, {"out": tmp_path / "x"}, {"out": tmp_path / "x", "config": config}):
        with pytest.raises(UsageError):
            finetune_command(method="pretrain", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [MOE, DENSE])
def test_a_second_stage_begins_with_the_weights_of_the_first(
    corpus: Corpus, tmp_path: Path, config: dict[str, Any]
) -> None:
    chosen = replace(SHORT, steps=40, rows=8, learning_rate=1e-2, evaluate_every=40, save_every=99)
    _, first = train(corpus, tmp_path / "first", chosen, config)
    again = replace(chosen, start_from=str(first.folder), seed=9, steps=2, evaluate_every=2)
    events, _ = train(corpus, tmp_path / "second", again, config)
    # bf16 and other rows move the loss a little; random weights would begin above 5.
    assert events[0].loss < 1.3 * first.held_out["loss"] + 0.5
    _, resumed = settings.read(tmp_path / "second" / "config.toml")
    assert resumed.start_from == str(first.folder)


def test_a_model_of_another_config_is_no_start(corpus: Corpus, tmp_path: Path) -> None:
    _, first = train(corpus, tmp_path / "first", replace(SHORT, steps=1), DENSE)
    again = replace(SHORT, start_from=str(first.folder))
    with pytest.raises(UsageError, match="is of another model"):
        train(corpus, tmp_path / "second", again, {**DENSE, "intermediate_size": 64})
    with pytest.raises(FormatError, match="holds no model"):
        train(corpus, tmp_path / "third", replace(SHORT, start_from=str(tmp_path / "nowhere")), DENSE)
    assert not (tmp_path / "second").exists()
