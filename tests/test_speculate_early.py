"""Passes that are built early, where another kind of step comes next: they keep nothing of the caches."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny import write_predicting

import edger1
from edger1 import kernels
from edger1.batch import Batch
from edger1.drafting.length import Length
from edger1.generate import Generation
from edger1.speculate import Speculation

pytestmark = pytest.mark.filterwarnings("ignore:A context of")

if not kernels.state().available:
    pytest.skip(f"CPU kernels: {kernels.state().reason}", allow_module_level=True)

OPTIONS: dict[str, Any] = {"raw": True, "temperature": 0, "speculate": "mtp"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_predicting(tmp_path_factory.mktemp("models") / "predicting")


def _places(caches: list[Any]) -> list[int]:
    return [np.array(cache.keys, copy=False).ctypes.data for cache in caches]


def test_a_plain_step_after_drafts_writes_the_caches_in_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drafts = [3, 3, 3, 0, 0, 0, 3, 3, 3]
    moved: list[bool] = []
    drafted: list[int] = []
    forward, verify = Speculation.forward, Speculation.step

    def drafting(speculation: Speculation, *given: Any) -> Any:
        drafted.append(1)
        return verify(speculation, *given)

    def plain(speculation: Speculation, tokens: Any, caches: list[Any], *rest: Any) -> Any:
        before = _places(caches) if drafted else None
        logits = forward(speculation, tokens, caches, *rest)
        mx.eval(logits)
        if before is not None:
            moved.append(_places(caches) != before)
        return logits

    monkeypatch.setattr(Length, "choose", lambda self, acceptance, room: (min(drafts.pop(0) if drafts else 0, room), 2))
    monkeypatch.setattr(Speculation, "step", drafting)
    monkeypatch.setattr(Speculation, "forward", plain)
    with edger1.load(folder, context=4096) as model:
        model.generate("abcd abcd", max_tokens=40, **OPTIONS)
    assert len(drafted) > 3, "twice, with plain steps between"
    assert len(moved) > 10
    assert not any(moved)


def test_who_joins_others_after_drafts_leaves_no_second_copy_of_its_caches(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lent: list[weakref.ref[Any]] = []
    left: list[int] = []
    drafted = threading.Event()
    lend, together, verify = Generation.lend, Batch.step, Speculation.step

    def noted(row: Generation, batch: Batch[Any]) -> Any:
        caches, drawn = lend(row, batch)
        lent.extend(weakref.ref(cache) for cache in caches)
        return caches, drawn

    def batched(batch: Batch[Any], rows: Any) -> Any:
        said = together(batch, rows)
        left.append(sum(cache() is not None for cache in lent))
        return said

    def drafting(speculation: Speculation, *given: Any) -> Any:
        said = verify(speculation, *given)
        drafted.set()
        return said

    monkeypatch.setattr(Length, "choose", lambda self, acceptance, room: (min(3, room), 2.0))
    monkeypatch.setattr(Generation, "lend", noted)
    monkeypatch.setattr(Batch, "step", batched)
    monkeypatch.setattr(Speculation, "step", drafting)
    with edger1.load(folder, context=4096) as model:
        handle = model.submit("abcd abcd", max_tokens=3000, **OPTIONS)
        assert drafted.wait(60)
        model.generate("Who is there", max_tokens=10, **OPTIONS)
        handle.cancel()
        handle.result(60)
    assert len(lent) >= 4
    assert left
    assert not any(left)
