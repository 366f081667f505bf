"""Adapters over models that the engine runs: loaded with one, switched, refused."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any

import adapting
import pytest
from mlx_lm.utils import load_model
from tiny import write_mixture, write_tiny_model

import edger1
from edger1.memory import PROCESS_BYTES
from edger1.messages import (
    AdapterUsed,
    Done,
    Failed,
    Generate,
    Load,
    Loaded,
    Sampling,
    Text,
    UseAdapter,
    decode,
    encode,
)
from edger1.train.adapters import files
from edger1.train.adapters.wiring import AdapterSpec, attach

ASKED: dict[str, Any] = {"max_tokens": 12, "temperature": 0}


def _adapter(folder: Path, model: Path, spec: AdapterSpec, seed: int) -> Path:
    live, _ = load_model(model)
    files.save(folder, adapting.learnt(attach(live, spec), seed, by=0.2), model)
    return folder


@pytest.fixture(scope="module")
def adapters(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters over the tiny model, a LoRA and a DoRA."""
    base = tmp_path_factory.mktemp("adapters")
    specs = (AdapterSpec(rank=4), AdapterSpec("dora", rank=2, targets=("attention",)))
    return [_adapter(base / f"a{i}", tiny_folder, spec, i) for i, spec in enumerate(specs)]


def _fresh(folder: Path, adapter: Path | None) -> str:
    with edger1.load(folder, precision="exact", adapter=adapter) as model:
        return model.generate("Hello", **ASKED).text


def test_switching_answers_as_a_model_loaded_with_the_adapter(tiny_folder: Path, adapters: list[Path]) -> None:
    expected = {adapter: _fresh(tiny_folder, adapter) for adapter in (None, *adapters)}
    assert len(set(expected.values())) == 3
    with edger1.load(tiny_folder, precision="exact") as model:
        bare = model.plan.resident_bytes
        for adapter in (None, adapters[0], adapters[1], None, adapters[1]):
            model.use_adapter(adapter)
            # The prompt's keys and values under other weights must not be used again.
            first = model.generate("Hello", **ASKED)
            assert (first.text, first.usage.cached_tokens) == (expected[adapter], 0)
            assert model.generate("Hello", **ASKED).text == expected[adapter]
            used = model.info["adapter"]
            assert (used and used["folder"]) == (adapter and str(adapter))
            extra = 0 if adapter is None else files.weight_bytes(adapter)
            assert model.plan.resident_bytes == bare + extra


def test_answers_asked_for_before_a_switch_end_with_the_weights_they_began_with(
    tiny_folder: Path, adapters: list[Path]
) -> None:
    from edger1.engine import Scheduler

    def ask(id_: str) -> Generate:
        return Generate(id_, "m", prompt="Hello", max_tokens=12, sampling=Sampling(temperature=0.0))

    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    events: list[Any] = []

    def emit(event: Any) -> None:
        events.append(event)
        if isinstance(event, Loaded):
            for request in (ask("a"), ask("b"), UseAdapter("s", "m", str(adapters[0])), ask("c")):
                inbox.put(request)
        elif isinstance(event, Failed) or (isinstance(event, Done) and event.id == "c"):
            inbox.put(None)

    inbox.put(Load("m", str(tiny_folder), precision="exact", context=512))
    Scheduler(emit).run(inbox)
    said = {i: "".join(e.text for e in events if isinstance(e, Text) and e.id == i) for i in "abc"}
    ends = [e.id for e in events if isinstance(e, Done | AdapterUsed)]
    assert ends[2:] == ["s", "c"]
    assert said["a"] == said["b"] != said["c"]


def test_messages_about_adapters_survive_json() -> None:
    for message in (UseAdapter("1", "m", None), AdapterUsed("1", "m", {"a": 1}), Load("1", "f", adapter="x")):
        assert decode(encode(message)) == message


def test_a_broken_or_strange_adapter_leaves_the_one_in_use(
    tiny_folder: Path, adapters: list[Path], tmp_path: Path
) -> None:
    other = write_tiny_model(tmp_path / "other", hidden_size=128)
    strange = _adapter(tmp_path / "strange", other, AdapterSpec(rank=2), 0)
    with edger1.load(tiny_folder, precision="exact", adapter=adapters[0]) as model:
        expected = model.generate("Hello", **ASKED).text
        with pytest.raises(edger1.FormatError, match="another model"):
            model.use_adapter(strange)
        with pytest.raises(edger1.UnknownModelError, match="does not exist"):
            model.use_adapter(tmp_path / "nothing")
        assert model.info["adapter"]["folder"] == str(adapters[0])
        assert model.generate("Hello", **ASKED).text == expected
    with pytest.raises(edger1.FormatError, match="another model"):
        edger1.load(tiny_folder, adapter=strange)


def test_an_adapter_takes_nothing_of_what_another_model_of_the_engine_has(
    tiny_folder: Path, adapters: list[Path]
) -> None:
    need = edger1.plan(tiny_folder).total_bytes
    with edger1.Engine(memory=2 * need - PROCESS_BYTES) as engine:
        first = engine.load(tiny_folder)
        first.use_adapter(adapters[0])
        first.use_adapter(None)
        second = engine.load(tiny_folder)
        for model in (first, second):
            with pytest.raises(edger1.MemoryCeilingError, match="adapter takes"):
                model.use_adapter(adapters[0])
        second.close()
        first.use_adapter(adapters[0])


def test_the_ceiling_holds_the_adapter(tiny_folder: Path, adapters: list[Path]) -> None:
    with edger1.load(tiny_folder, adapter=adapters[0]) as model:
        need = model.plan.total_bytes
    with pytest.raises(edger1.MemoryCeilingError):
        edger1.load(tiny_folder, adapter=adapters[0], memory=need - 1)
    with edger1.load(tiny_folder, memory=need - 1) as model:
        with pytest.raises(edger1.MemoryCeilingError, match="adapter takes"):
            model.use_adapter(adapters[0])
        assert model.info["adapter"] is None


def test_streamed_models_take_adapters_beside_their_experts(tmp_path: Path) -> None:
    (tmp_path / "mixture").mkdir()
    folder = write_mixture(tmp_path / "mixture")
    beside = _adapter(tmp_path / "a", folder, AdapterSpec(rank=2, targets=("attention", "router")), 1)
    over = _adapter(tmp_path / "b", folder, AdapterSpec(rank=2, targets=("experts",)), 1)
    with edger1.load(folder, precision="exact", adapter=beside) as model:
        expected = model.generate("Hello", raw=True, **ASKED).text
        assert model.plan.stream is None
        model.use_adapter(over)
    with edger1.load(folder, precision="exact", expert_slots="50%") as model:
        assert model.plan.stream is not None
        bare = model.generate("Hello", raw=True, **ASKED).text
        model.use_adapter(beside)
        assert model.generate("Hello", raw=True, **ASKED).text == expected != bare
        with pytest.raises(edger1.UsageError, match=r"streamed from disk"):
            model.use_adapter(over)
        model.use_adapter(None)
        assert model.generate("Hello", raw=True, **ASKED).text == bare


def test_how_it_runs_is_told(tiny_folder: Path, adapters: list[Path]) -> None:
    from edger1 import runs

    with edger1.load(tiny_folder, adapter=adapters[1]):
        report = runs.of(tiny_folder)
    assert report is not None
    assert any("a1" in line and "DoRA of rank 2" in line for line in report["also"])
