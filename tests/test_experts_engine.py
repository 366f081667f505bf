"""Streaming through the library: nano-moe with fewer slots than experts, and disks that misbehave while it runs."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from children import child
from mlx_lm.models.cache import KVCache
from typer.testing import CliRunner

import edger1
from edger1 import client, installed, kernels, logits, planning
from edger1.cli import app
from edger1.client import next_id
from edger1.errors import FormatError, MemoryCeilingError, StreamError, UnstreamableError, UsageError
from edger1.experts import store as store_module
from edger1.experts.layer import StreamedExperts
from edger1.experts.pressure import Pressure
from edger1.experts.streaming import Streaming
from edger1.messages import Score, Scores

QUESTION = "What is 17 + 25?"


@pytest.fixture(scope="module")
def nano() -> Path:
    return installed.resolve("nano-moe")


@pytest.fixture(scope="module")
def answer(nano: Path) -> Any:
    with edger1.load(nano, precision="exact") as model:
        return model.generate(QUESTION, temperature=0, max_tokens=120)


class Disk:
    """Reads of experts, which can be made to hang or to fail."""

    def __init__(self) -> None:
        self._preadv = os.preadv
        self.go = threading.Event()
        self.go.set()
        self.error: OSError | None = None
        self.waiting = threading.Event()

    def preadv(self, *given: Any) -> int:
        if not self.go.is_set():
            self.waiting.set()
            self.go.wait(60)
        if self.error is not None:
            raise self.error
        return self._preadv(*given)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    made = Disk()
    monkeypatch.setattr(store_module.os, "preadv", made.preadv)
    yield made
    made.go.set()


@pytest.mark.parametrize("slots", ["100%", "50%", 4])
def test_the_answer_is_the_resident_one(nano: Path, answer: Any, slots: str | int) -> None:
    with edger1.load(nano, precision="exact", expert_slots=slots) as model:
        assert model.plan.slots == {"100%": (32,) * 5, "50%": (16,) * 5, 4: (4,) * 5}[slots]
        got = model.generate(QUESTION, temperature=0, max_tokens=120)
    assert (got.text, got.thinking) == (answer.text, answer.thinking)
    decode = got.figures.experts["decode"]
    if slots == "100%":
        assert got.figures.experts["prefill"]["bytes_read"] == 0
    else:
        assert 0 < decode["hit_rate"] < 1
        assert decode["bytes_read"] > 0
        assert decode["tokens"] == got.usage.completion_tokens - 1
        assert len(got.figures.experts["layers"]) == 5


def scores(model: edger1.Model, ids: list[int]) -> Scores:
    request = Score(next_id(), model._id, ids)
    return next(event for event in client.events(model._connection, request) if isinstance(event, Scores))


def test_scoring_reads_each_expert_once_a_step(nano: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Beside banks as small as these a step would be short.
    monkeypatch.setattr(planning, "STREAMED_PREFILL_STEPS", (512,))
    ids = [(7 * i) % 2000 for i in range(301)]
    with edger1.load(nano, precision="exact") as model:
        expected = scores(model, ids)
    assert expected.figures.experts is None
    with edger1.load(nano, precision="exact", expert_slots=4) as model:
        stored = sum(f.stat().st_size for f in nano.glob("model*.safetensors"))
        got = scores(model, ids)
        assert got.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        experts = got.figures.experts
        assert experts is not None
        # All 300 rows are one step, so that no expert is read twice, and nearly all are needed.
        assert stored / 2 < experts["prefill"]["bytes_read"] < stored
        assert experts["prefill"]["tokens"] == 300
        assert experts["prefill"]["bytes_per_token"] == experts["prefill"]["bytes_read"] / 300
        assert experts["decode"]["bytes_read"] == 0
        assert got.figures.prefill_tokens_per_s is not None
        assert got.figures.peak_memory_bytes > 0
        assert model.score(ids) == pytest.approx(expected.logprobs, abs=1e-4)


def test_several_requests_at_once_have_the_answers_they_have_alone(nano: Path) -> None:
    questions = [QUESTION, "What is 5 * 6?", "Sort these numbers: 9 2 7 4"]
    with edger1.load(nano, precision="exact") as model:
        alone = [model.generate(q, temperature=0, max_tokens=60).text for q in questions]
    with edger1.load(nano, precision="exact", expert_slots=6) as model:
        handles = [model.submit(q, temperature=0, max_tokens=60) for q in questions]
        assert [handle.result(60).text for handle in handles] == alone


def test_a_disk_that_hangs_does_not_block_cancelling(nano: Path, answer: Any, disk: Disk) -> None:
    with edger1.load(nano, precision="exact", expert_slots=4) as model:
        disk.go.clear()
        handle = model.submit(QUESTION, temperature=0, max_tokens=120)
        assert disk.waiting.wait(30)
        handle.cancel()
        # The disk hangs until it is told to go on.
        assert handle.result(30).finish_reason == "cancelled"
        disk.go.set()
        again = model.generate(QUESTION, temperature=0, max_tokens=120)
        assert (again.text, again.thinking) == (answer.text, answer.thinking)


def test_a_disk_that_hangs_does_not_block_closing(nano: Path, disk: Disk) -> None:
    model = edger1.load(nano, expert_slots=4)
    disk.go.clear()
    handle = model.submit(QUESTION)
    assert disk.waiting.wait(30)
    began = time.perf_counter()
    model.close()
    assert time.perf_counter() - began < 30
    assert handle.done


def test_an_error_of_the_disk_ends_the_request_and_not_the_engine(nano: Path, answer: Any, disk: Disk) -> None:
    with edger1.load(nano, precision="exact", expert_slots=4) as model:
        disk.error = OSError(errno.EIO, os.strerror(errno.EIO))
        with pytest.raises(StreamError, match="input/output error"):
            model.generate(QUESTION)
        disk.error = None
        again = model.generate(QUESTION, temperature=0, max_tokens=120)
        assert (again.text, again.thinking) == (answer.text, answer.thinking)


def test_a_file_that_shrinks_gives_no_wrong_token(nano: Path, tmp_path: Path) -> None:
    folder = tmp_path / "nano-moe"
    shutil.copytree(nano, folder)
    with edger1.load(folder, expert_slots=4) as model:
        events = model.stream(QUESTION, temperature=0, max_tokens=400)
        for _ in range(4):
            next(events)
        weights = folder / "model.safetensors"
        os.truncate(weights, weights.stat().st_size // 2)
        with pytest.raises(StreamError, match="while the model"):
            list(events)
        with pytest.raises(StreamError, match="Load the model again"):
            model.generate(QUESTION)


@pytest.mark.skipif(not kernels.state().available, reason="the kernels compute on maps")
def test_scores_are_computed_before_their_file_is_found_whole(
    nano: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a model whose inner model cannot be told: a file that is cut short after it was looked at spoils nothing."""
    folder = tmp_path / "nano-moe"
    shutil.copytree(nano, folder)
    monkeypatch.setattr(logits, "_inner", lambda model: None)
    let_go, read_back = Streaming.let_go, StreamedExperts._read_back
    routing: list[bool] = []
    on_map: list[int] = []

    def noted_routing(held: StreamedExperts, *indices: Any) -> Any:
        routing.append(True)
        try:
            return read_back(held, *indices)
        finally:
            routing.pop()

    def cut(streaming: Streaming) -> None:
        touched = len(streaming._touched)
        let_go(streaming)
        if not routing:
            on_map.append(touched)
            os.truncate(folder / "model.safetensors", 1 << 16)

    ids = [5, 9]
    with edger1.load(nano, precision="exact") as model:
        expected = model.score(ids)
    with edger1.load(folder, precision="exact", expert_slots=4) as model:
        model.score([70, 90])
        monkeypatch.setattr(StreamedExperts, "_read_back", noted_routing)
        monkeypatch.setattr(Streaming, "let_go", cut)
        assert model.score(ids) == expected
    assert on_map[0] > 0


def test_two_processes_on_one_model(nano: Path, answer: Any) -> None:
    program = (
        "import sys, edger1\n"
        "with edger1.load(sys.argv[1], precision='exact', expert_slots=6) as m:\n"
        f"    print(m.generate({QUESTION!r}, temperature=0, max_tokens=120).text)\n"
    )
    with ExitStack() as stack:
        both = [
            stack.enter_context(child([sys.executable, "-c", program, str(nano)], stdout=subprocess.PIPE, text=True))
            for _ in range(2)
        ]
        for process in both:
            out, _ = process.communicate()
            assert process.returncode == 0
            assert out.strip() == answer.text.strip()


def test_what_cannot_be_is_refused_before_anything_is_loaded(nano: Path, smollm2_or_tiny: Path) -> None:
    with pytest.raises(MemoryCeilingError, match="needs .* of memory"):
        edger1.load(nano, memory="100MB")
    with pytest.raises(UsageError, match="each token asks for 4 experts"):
        edger1.load(nano, expert_slots=3)
    for wrong in ("many", "0", "0%", "120%", -1):
        with pytest.raises(UsageError, match="expert_slots is"):
            edger1.load(nano, expert_slots=wrong)
    with pytest.raises((UsageError, UnstreamableError), match="no"):
        edger1.load(smollm2_or_tiny, expert_slots="50%")


@pytest.fixture
def smollm2_or_tiny(tiny_folder: Path) -> Path:
    return tiny_folder


def test_the_command_line_tells_what_streaming_took(nano: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plot.svg"
    done = CliRunner().invoke(
        app, ["run", str(nano), QUESTION, "--expert-slots", "25%", "--json", "--plot", str(plot), "--temperature", "0"]
    )
    assert done.exit_code == 0, done.output
    experts = json.loads(done.stdout.splitlines()[-1])["experts"]
    assert experts["slots"] == [8] * 5
    assert 0 < experts["decode"]["hit_rate"] < 1
    assert "read a token" in plot.read_text()
    done = CliRunner().invoke(app, ["run", str(nano), QUESTION, "--expert-slots", "25%", "--figures"])
    assert "in slots" in done.output
    done = CliRunner().invoke(app, ["run", str(nano), QUESTION, "--plot", str(tmp_path / "plot.png")])
    assert isinstance(done.exception, UsageError)
    assert "ends in .svg" in str(done.exception)


def test_banks_make_room_for_other_programs_and_grow_again(
    nano: Path, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is short of memory, and later is not, as the engine is told: answers stay what they are."""
    said: list[tuple[int, int]] = []
    wanted = [-(1 << 30), 0, 1 << 30]

    def change(_: Any, held_bytes: int) -> int:
        said.append((held_bytes, wanted[0]))
        return wanted[0]

    monkeypatch.setattr(Pressure, "change_bytes", change)
    with edger1.load(nano, precision="exact", expert_slots="100%") as model:
        for _ in range(3):
            got = model.generate(QUESTION, temperature=0, max_tokens=120)
            assert (got.text, got.thinking) == (answer.text, answer.thinking)
            slots = got.figures.experts["slots"]
            assert slots == ([2] * 5 if wanted[0] <= 0 else [32] * 5)
            wanted.pop(0)
    held = [nbytes for nbytes, _ in said]
    assert min(held) < max(held) / 4


def test_banks_give_back_what_the_context_asks_for(nano: Path, answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[tuple[int, int]] = []
    allow = Streaming.allow

    def noted(streaming: Streaming, nbytes: int) -> None:
        allow(streaming, nbytes)
        held.append((nbytes, streaming.nbytes))

    monkeypatch.setattr(Streaming, "allow", noted)
    # With the fewest slots of all an answer takes long.
    little = edger1.plan(nano, context=4096).smallest_ceiling_bytes + (2 << 20)
    with edger1.load(nano, precision="exact", context=4096, memory=little) as model:
        plan = model.plan.stream
        assert sum(plan.lent_slots) > sum(plan.slots)
        got = model.generate(QUESTION, temperature=0, max_tokens=120)
        assert (got.text, got.thinking) == (answer.text, answer.thinking)
        short = max(nbytes for _, nbytes in held)
        model.generate("What is 2 + 2? " * 500, raw=True, temperature=0, max_tokens=8)
    assert all(nbytes <= max(allowed, plan.bank_bytes) for allowed, nbytes in held)
    assert held[-1][1] < short


def readers() -> int:
    return sum(thread.name == "edger1-reader" for thread in threading.enumerate())


def test_a_load_that_fails_or_is_given_up_leaves_nothing_running(nano: Path, tmp_path: Path) -> None:
    import mlx.core as mx

    from edger1 import loader
    from edger1.kernels import functions
    from edger1.quant.formats.folder import MTP_NAME

    before, replaced = readers(), functions.installed()

    def load(folder: Path, slots: str | int | None) -> Generator[Any, None, Any]:
        return loader.load("m", folder, ceiling_bytes=1 << 40, context=512, precision="exact", expert_slots=slots)

    given_up = load(nano, "100%")
    assert any(readers() != before for _ in given_up), "it loaded without readers"
    given_up.close()
    assert readers() == before

    folder = tmp_path / "nano-moe"
    shutil.copytree(nano, folder)
    file = str(folder / MTP_NAME)
    loaded: Any = mx.load(file)
    weights = {name: mx.array(value) for name, value in loaded.items()}
    name = next(name for name in weights if "eh_proj" in name and name.endswith(".weight"))
    weights[name] = weights[name][1:]
    mx.eval(weights)
    mx.save_safetensors(file, weights, metadata={"format": "mlx"})
    for experts in (4, None):
        with pytest.raises(FormatError, match="MTP layer .* does not fit"):
            list(load(folder, experts))
    assert readers() == before
    assert functions.installed() is replaced


def test_states_of_a_short_prompt_are_computed_before_its_experts_leave(nano: Path) -> None:
    """An MTP layer reads them later, when other requests have had their tokens."""
    import mlx.core as mx
    import numpy as np

    from edger1 import loader
    from edger1.sampling import RandomState, RandomTurn, Sampler
    from edger1.speculate import Speculation

    prompt, known = [11, 22, 33], [11, 22, 33, 44]
    found = []
    for slots in (None, 16):
        steps = loader.load("m", nano, ceiling_bytes=1 << 40, context=512, precision="exact", expert_slots=slots)
        try:
            while True:
                next(steps)
        except StopIteration as stop:
            model = stop.value
        sampler, random = Sampler(model.sampling, model.vocabulary), RandomState.seeded(1)
        drafts = Speculation(model, "mtp", sampler, random, RandomTurn(), seeded=True)
        # The second time all that it asks for is there.
        for _ in range(2):
            caches = model.new_caches()
            drafts.begin(None)
            drafts.forward(mx.array([prompt]), caches, 0, known)
            mx.eval([cache.state for cache in caches])
        others = model.new_caches()
        for token in range(100, 140):
            mx.eval(model.model(mx.array([[token]]), cache=others))
        assert drafts._mtp is not None
        found.append(np.array(drafts._mtp._hidden))
        model.close()
    np.testing.assert_array_equal(*found)


def test_the_room_of_an_mtp_layer_is_all_that_it_takes(nano: Path) -> None:
    """Under the smallest ceiling too, where the model's own experts take turns in fewer slots than its layer gets."""
    import mlx.core as mx

    from edger1 import loader
    from edger1.drafting import loading
    from edger1.experts.store import read_buffer_bytes

    context = 64
    least = edger1.plan(nano, context=context).smallest_ceiling_bytes
    steps = loader.load("m", nano, ceiling_bytes=least, context=context, precision="exact", expert_slots=None)
    try:
        while True:
            next(steps)
    except StopIteration as stop:
        model = stop.value
    share, found = loading.share(model.plan), loading.find(model.folder)
    assert found is not None
    assert share == 2 / 32
    ahead = loading.load(found, model.folder, model.model, "exact", share)
    try:
        assert ahead.streaming is not None
        states = mx.zeros((1, context, model.folder.config["hidden_size"]))
        cache = KVCache()
        ahead.predictor(states, states, cache)
        store = ahead.streaming.store
        buffers = len(store._threads) * read_buffer_bytes(store._largest)
        taken = ahead.nbytes + buffers + cache.nbytes + states.nbytes
        assert taken <= loading.room(found, model.plan, model.folder.config)
    finally:
        ahead.close()
        model.close()
