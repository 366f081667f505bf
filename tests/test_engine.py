"""The engine through the public API, on a tiny random model."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import write_tiny_model

import edger1
from edger1.client import ChildConnection, ThreadConnection, aevents, events, next_id
from edger1.messages import Cancel, Done, Failed, Generate, Load, Loaded, Progress, Sampling, Text, decode, encode
from edger1.units import format_bytes


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Iterator[edger1.Model]:
    # Random weights make near ties, and int8 activations round a row otherwise than many rows at once.
    # A context far beyond the model's own leaves room for answers that are still running when a test stops them.
    with edger1.load(tiny_folder, precision="exact", context=50_000) as loaded:
        yield loaded


def test_greedy_answers_repeat_and_count_their_tokens(model: edger1.Model) -> None:
    first = model.generate("Hello", max_tokens=12, temperature=0)
    second = model.generate("Hello", max_tokens=12, temperature=0)
    assert first.text == second.text
    assert first.finish_reason == "length"
    assert first.usage.completion_tokens == 12
    # <|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n, one token a byte and a special token.
    assert first.usage.prompt_tokens == 1 + 5 + 5 + 1 + 1 + 1 + 10


def test_greedy_equals_mlx_lm(model: edger1.Model, tiny_folder: Path) -> None:
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load

    reference, tokenizer = load(str(tiny_folder))
    reference.set_dtype(mx.float32)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    steps = generate_step(mx.array(ids), reference, max_tokens=24)
    expected = [token for token, _ in steps]
    with edger1.load(tiny_folder, precision="exact") as exact:
        answer = exact.generate("Hello", max_tokens=24, temperature=0)
    assert answer.text == tokenizer.decode(expected)


def test_a_seed_gives_the_same_answer_while_others_run(model: edger1.Model) -> None:
    alone = model.generate("Hello", max_tokens=20, temperature=1.5, seed=7).text
    handles = [model.submit("Hello", max_tokens=20, temperature=1.5, seed=seed) for seed in (7, 8, 7)]
    together = [handle.result(timeout_s=60).text for handle in handles]
    assert together[0] == together[2] == alone
    assert together[1] != alone


def test_a_chats_second_turn_prefills_only_what_is_new(model: edger1.Model) -> None:
    chat = model.chat(system="Be brief.")
    first = chat.send("One", max_tokens=8, temperature=0.0)
    second = chat.send("Two", max_tokens=8, temperature=0.0)
    # The first answer's last token was drawn but never fed.
    fed = first.usage.prompt_tokens + first.usage.completion_tokens - 1
    assert second.usage.cached_tokens == fed
    assert second.usage.prefilled_tokens == second.usage.prompt_tokens - fed
    assert second.usage.prompt_tokens > fed


def test_a_cached_prefix_changes_no_answer(tiny_folder: Path) -> None:
    with edger1.load(tiny_folder, precision="exact") as warm:
        chat = warm.chat()
        chat.send("One", max_tokens=8, temperature=0)
        warm_answer = chat.send("Two", max_tokens=8, temperature=0)
    with edger1.load(tiny_folder, precision="exact") as cold:
        cold_answer = cold.generate(chat.messages[:-1], max_tokens=8, temperature=0)
    assert cold_answer.usage.cached_tokens == 0 < warm_answer.usage.cached_tokens
    assert warm_answer.text == cold_answer.text


def test_fork_and_save(model: edger1.Model, tmp_path: Path) -> None:
    chat = model.chat(system="S")
    chat.send("One", max_tokens=3)
    chat.send("Two", max_tokens=3)
    fork = chat.fork(at=1)
    assert [m["content"] for m in fork.messages if m["role"] == "user"] == ["One"]
    fork.send("Three", max_tokens=3)
    assert len(chat.messages) == 4
    chat.save(tmp_path / "chat.json")
    assert json.loads((tmp_path / "chat.json").read_text())["messages"] == chat.messages
    with pytest.raises(edger1.UsageError, match="2 turns"):
        chat.fork(at=3)


def test_cancel_keeps_what_was_said(model: edger1.Model) -> None:
    handle = model.submit("Hello", max_tokens=40_000, temperature=0)
    time.sleep(0.2)
    handle.cancel()
    response = handle.result(timeout_s=60)
    assert response.finish_reason == "cancelled"
    assert response.usage.completion_tokens < 40_000


def test_cancel_takes_effect_within_one_token(tiny_folder: Path) -> None:
    connection = ThreadConnection()
    loaded = next(e for e in events(connection, Load(next_id(), str(tiny_folder))) if isinstance(e, Loaded))
    arrived: queue.SimpleQueue = queue.SimpleQueue()
    said = []

    def on_event(event: object) -> None:
        # Sent from the engine's own thread at the third piece of text: at most one more token may follow.
        if isinstance(event, Text):
            said.append(event.text)
            if len(said) == 3:
                connection.send(Cancel(next_id(), "g"))
        arrived.put(event)

    connection.submit(Generate("g", loaded.model, prompt="abc", max_tokens=300), on_event)
    while not isinstance(event := arrived.get(timeout=30), Done):
        pass
    connection.close()
    assert event.finish_reason == "cancelled"
    assert event.usage.completion_tokens <= 4


def test_leaving_a_stream_cancels_it(model: edger1.Model) -> None:
    stream = model.stream("Hello", max_tokens=40_000, temperature=0)
    next(stream)
    stream.close()
    begun = time.perf_counter()
    model.generate("Hi", max_tokens=1)
    # All the tokens that the other was asked for take longer.
    assert time.perf_counter() - begun < 20


def test_events_that_come_together_wake_the_loop_once() -> None:
    class Burst:
        """A connection that answers everybody at once, as soon as `expected` have asked."""

        def __init__(self, expected: int) -> None:
            self.waiting: list[tuple[str, Any]] = []
            self.expected = expected

        def submit(self, request: Generate, on_event: Any) -> None:
            self.waiting.append((request.id, on_event))
            if len(self.waiting) == self.expected:
                answer = threading.Thread(target=self.answer)
                answer.start()
                answer.join(60)

        def answer(self) -> None:
            for piece in "abc":
                for id_, on_event in self.waiting:
                    on_event(Text(id_, piece))
            for id_, on_event in self.waiting:
                on_event(Failed(id_, "EngineError", "over"))

    async def texts(connection: Any, id_: str) -> list[str]:
        return [event.text async for event in aevents(connection, Generate(id_, "m")) if isinstance(event, Text)]

    async def main() -> tuple[list[list[str]], int]:
        loop, woken = asyncio.get_running_loop(), 0
        wake = loop.call_soon_threadsafe

        def counted(*arguments: Any) -> Any:
            nonlocal woken
            woken += 1
            return wake(*arguments)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        connection = Burst(8)
        return await asyncio.gather(*(texts(connection, str(i)) for i in range(8))), woken

    for _ in range(2):
        seen, woken = asyncio.run(asyncio.wait_for(main(), timeout=120))
        assert seen == [["a", "b", "c"]] * 8
        assert woken == 1


def test_astream_leaves_the_loop_free(model: edger1.Model) -> None:
    async def main() -> tuple[int, list[object]]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        seen = [event async for event in model.astream("Hello", max_tokens=100)]
        ticking.cancel()
        return ticks, seen

    ticks, seen = asyncio.run(asyncio.wait_for(main(), timeout=120))
    assert isinstance(seen[-1], Done)
    assert ticks > 3


def test_agenerate_answers_as_generate_does_and_is_cancelled_with_its_task(model: edger1.Model) -> None:
    async def main() -> tuple[edger1.Response, edger1.Response]:
        whole = await model.agenerate("Hello", max_tokens=20, temperature=0)
        long = asyncio.create_task(model.agenerate("Hello", max_tokens=40_000, temperature=0))
        await asyncio.sleep(0.05)
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        return whole, await model.agenerate("Hello", max_tokens=20, temperature=0)

    whole, again = asyncio.run(asyncio.wait_for(main(), timeout=120))
    assert whole.text == again.text == model.generate("Hello", max_tokens=20, temperature=0).text


def test_stop_strings_are_cut_off(model: edger1.Model) -> None:
    whole = model.generate("Hello", max_tokens=40, temperature=0).text
    stop = whole[10:13]
    cut = model.generate("Hello", max_tokens=40, temperature=0, stop=[stop])
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_score_is_the_log_softmax_of_the_logits(model: edger1.Model, tiny_folder: Path) -> None:
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load

    ids = list(range(60, 160))
    reference, _ = load(str(tiny_folder))
    reference.set_dtype(mx.float32)
    logits = np.array(reference(mx.array([ids]))[0], dtype=np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = [logprobs[i, ids[i + 1]] for i in range(len(ids) - 1)]
    with edger1.load(tiny_folder, precision="exact") as exact:
        np.testing.assert_allclose(exact.score(ids), expected, atol=1e-4)


def test_closing_frees_the_memory_and_ends_use(tiny_folder: Path, tmp_path: Path) -> None:
    import mlx.core as mx

    folder = write_tiny_model(tmp_path / "larger", hidden_size=512, intermediate_size=4096)
    model = edger1.load(folder)
    with_model = mx.get_active_memory()
    model.close()
    model.close()
    assert with_model - mx.get_active_memory() > 5_000_000
    with pytest.raises(edger1.EngineError, match="closed"):
        model.generate("Hello")


def test_two_models_share_one_engine(tiny_folder: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", seed=1)
    with edger1.Engine(memory="4GB") as engine:
        a, b = engine.load(tiny_folder), engine.load(other)
        assert a.generate("Hi", max_tokens=8, temperature=0).text != b.generate("Hi", max_tokens=8, temperature=0).text
        a.close()
        assert b.generate("Hi", max_tokens=2).usage.completion_tokens == 2


def test_an_engines_models_share_its_ceiling(tiny_folder: Path) -> None:
    need = edger1.plan(tiny_folder).smallest_ceiling_bytes
    with edger1.Engine(memory=need + 1000) as engine:
        engine.load(tiny_folder)
        with pytest.raises(edger1.MemoryCeilingError, match="needs"):
            engine.load(tiny_folder)


def test_a_ceiling_that_is_too_small_is_refused_with_the_one_that_would_do(tiny_folder: Path) -> None:
    plan = edger1.plan(tiny_folder, memory="100MB")
    # The second one would not even hold the weights.
    for memory in ("100MB", "50kB"):
        with pytest.raises(
            edger1.MemoryCeilingError, match=f"needs {format_bytes(plan.smallest_ceiling_bytes, up=True)}.*--mem"
        ):
            edger1.load(tiny_folder, memory=memory)
    with edger1.load(tiny_folder, memory=plan.smallest_ceiling_bytes) as model:
        assert model.plan.ceiling_bytes == plan.smallest_ceiling_bytes


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"stop": [5]}, "list of non-empty strings"),
        ({"stop": 5}, "list of non-empty strings"),
        ({"stop": [""]}, "list of non-empty strings"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"seed": -1}, "seed"),
        ({"seed": True}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"think": "maybe"}, "think"),
        ({"colour": "red"}, "colour"),
        ({"tools": [{"function": {"name": "f", "parameters": {"default": {1, 2}}}}]}, "'f' is no JSON"),
        ({"tools": [{"function": {"name": "f", "description": "\ud800"}}]}, "'f' is no JSON"),
    ],
)
def test_bad_options_say_what_was_expected(model: edger1.Model, options: dict, expected: str) -> None:
    with pytest.raises(edger1.UsageError, match=expected):
        model.generate("Hello", **options)
    assert model.generate("Hello", max_tokens=1).usage.completion_tokens == 1


@pytest.mark.parametrize(
    "messages",
    [[], [1], [{"role": "nobody", "content": "x"}], [{"role": "user", "content": 5}], [{"role": "user"}]],
)
def test_bad_messages_say_what_was_expected(model: edger1.Model, messages: list) -> None:
    with pytest.raises(edger1.UsageError, match="expected|must be"):
        model.generate(messages)


@pytest.mark.parametrize("context", ["1", 0, 1.5, True])
def test_a_context_that_is_none_says_what_was_expected(tiny_folder: Path, context: Any) -> None:
    with pytest.raises(edger1.UsageError, match="context is .*expected a whole number"):
        edger1.load(tiny_folder, context=context)


def test_a_prompt_longer_than_the_context_is_refused(tiny_folder: Path) -> None:
    with edger1.load(tiny_folder, context=64) as model:
        with pytest.raises(edger1.ContextError, match="64"):
            model.generate("x" * 100)
        full = model.generate("x" * 20, temperature=0)
        assert full.finish_reason == "length"
        assert full.usage.prompt_tokens + full.usage.completion_tokens == 64


def test_options_of_later_versions_say_so(model: edger1.Model) -> None:
    with pytest.raises(edger1.NotYetError, match="schema"):
        model.generate("Hello", schema={"type": "object"})


def test_a_model_without_a_template_continues_text(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base", template=None)
    with edger1.load(base) as model:
        assert model.generate("abc", max_tokens=4).usage.prompt_tokens == 3
        with pytest.raises(edger1.UsageError, match="no chat template"):
            model.generate([{"role": "user", "content": "abc"}])


def test_a_template_that_refuses_gives_its_reason(tmp_path: Path) -> None:
    strict = write_tiny_model(tmp_path / "strict", template="{{ raise_exception('only one user message, please') }}")
    with edger1.load(strict) as model, pytest.raises(edger1.UsageError, match="only one user message"):
        model.generate("Hello")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_damaged_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_tiny_model(tmp_path / "damaged")
    (folder / name).write_bytes((folder / name).read_bytes()[:-40])
    with pytest.raises(edger1.EdgeR1Error):
        edger1.load(folder)


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "misfit")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(edger1.FormatError, match="cannot build"):
        edger1.load(folder)


def test_messages_survive_json() -> None:
    request = Generate("r1", "m", messages=[{"role": "user", "content": "é\n"}], sampling=Sampling(seed=3), stop=["x"])
    assert decode(encode(request)) == request
    assert "\n" not in encode(request)
    with pytest.raises(ValueError, match="not a message"):
        decode('{"kind": "Nothing"}')


def test_a_child_engine_answers_as_the_one_in_process(model: edger1.Model, tiny_folder: Path) -> None:
    expected = model.generate("Hello", max_tokens=10, temperature=0)
    connection = ChildConnection()
    try:
        loaded = list(events(connection, Load(next_id(), str(tiny_folder), precision="exact")))
        assert isinstance(loaded[-1], Loaded)
        assert any(isinstance(e, Progress) for e in loaded)
        request = Generate(
            next_id(),
            loaded[-1].model,
            messages=[{"role": "user", "content": "Hello"}],
            max_tokens=10,
            sampling=Sampling(temperature=0),
        )
        answer = list(events(connection, request))
    finally:
        connection.close()
    assert "".join(e.text for e in answer if isinstance(e, Text)) == expected.text
    after = list(events(connection, Generate(next_id(), loaded[-1].model, prompt="x")))
    assert isinstance(after[-1], Failed)


def test_a_killed_child_fails_what_is_open_and_says_why(tiny_folder: Path) -> None:
    connection = ChildConnection()
    loaded = list(events(connection, Load(next_id(), str(tiny_folder), context=50_000)))[-1]
    assert isinstance(loaded, Loaded)
    stream = events(connection, Generate(next_id(), loaded.model, prompt="abc", max_tokens=40_000))
    next(stream)
    os.kill(connection.pid, signal.SIGKILL)
    last = list(stream)[-1]
    assert isinstance(last, Failed)
    assert last.error == "EngineError"
    assert "killed" in last.message


def test_a_child_ends_with_its_parent(tiny_folder: Path) -> None:
    program = (
        "import os, sys; from edger1.client import ChildConnection, events, next_id; from edger1.messages import Load;"
        "c = ChildConnection(); list(events(c, Load(next_id(), sys.argv[1]))); print(c.pid, flush=True); os._exit(1)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tiny_folder)], capture_output=True, text=True, timeout=60, check=False
    )
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("end", ["m.close()", "pass", "next(m.stream('Tell me', max_tokens=40_000))"])
def test_the_program_exits_cleanly_whatever_is_running(tiny_folder: Path, end: str) -> None:
    program = f"import edger1, sys; m = edger1.load(sys.argv[1]); m.generate('Hi', max_tokens=2); {end}"
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tiny_folder)], capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_callers_on_several_threads(model: edger1.Model) -> None:
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        answers[number] = model.generate("Hello", max_tokens=6, temperature=0).text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(answers) == 4
    assert len(set(answers.values())) == 1


def test_progress_of_loading_comes_to_its_end(tiny_folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    with edger1.load(tiny_folder, on_progress=lambda done, total: seen.append((done, total))):
        pass
    assert seen[-1][0] == seen[-1][1] > 0
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
