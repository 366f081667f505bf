"""The chat's catalogue of models over real folders, and fetches in a child process from the stand-in hub."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from children import LIMIT_S, child
from hub_server import Hub, dead_address
from pulling import PATIENT, home, in_progress, model_files, register, server  # noqa: F401
from safetensors.numpy import save_file
from tiny import write_tiny_model

from edger1 import installed, paths
from edger1.cli import catalogue as module
from edger1.cli.adapters_found import fits
from edger1.cli.catalogue import ModelCatalogue
from edger1.errors import UnknownModelError, UsageError
from edger1.tui.catalogue import Entry, Fetched, FetchEvent, FetchFailed, Step

GB = 10**9
FETCHING = PATIENT + "from edger1.cli.fetching import main; main()"


@pytest.fixture
def hub(server: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:  # noqa: F811
    """The stand-in, which children that fetch let take its time."""
    create = asyncio.create_subprocess_exec

    async def patient(*command: Any, **options: Any) -> Any:
        assert command[2:4] == ("-m", "edger1.cli.fetching")
        return await create(*command[:2], "-c", FETCHING, *command[4:], **options)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", patient)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    return server


def entries(catalogue: ModelCatalogue) -> dict[str, Entry]:
    return {entry.name: entry for entry in asyncio.run(catalogue.entries())}


def fetch(
    catalogue: ModelCatalogue, name: str, stop: Callable[[FetchEvent], bool] = lambda event: False
) -> list[FetchEvent]:
    """Fetch a model, or a part of it: up to the first event that `stop` holds of."""
    seen: list[FetchEvent] = []

    async def run() -> None:
        events: Any = catalogue.fetch(name)
        async with aclosing(events):
            async for event in events:
                seen.append(event)
                if stop(event):
                    return

    asyncio.run(asyncio.wait_for(run(), LIMIT_S))
    return seen


def test_what_is_here_comes_first_and_then_what_the_registry_knows() -> None:
    write_tiny_model(paths.models() / "qwen3-8b")
    write_tiny_model(paths.models() / "mine")
    found = asyncio.run(ModelCatalogue(memory_bytes=8 * GB).entries())
    names = [entry.name for entry in found]
    assert names[:2] == ["mine", "qwen3-8b"]
    assert names.count("qwen3-8b") == 1
    by_name = {entry.name: entry for entry in found}
    mine, known = by_name["mine"], by_name["qwen3-8b"]
    assert mine.installed
    assert mine.folder == paths.models() / "mine"
    assert (mine.fit, mine.kind) == ("fits", "dense")
    assert dict(mine.numbers)["in all"].endswith("of 8.00 GB")
    assert known.licence == "Apache-2.0"
    assert by_name["deepseek-r1"].fit == "too big"
    assert "may take 8.00 GB" in by_name["deepseek-r1"].why
    moe = by_name["qwen3-30b-a3b"]
    assert (moe.fit, moe.kind, moe.installed) == ("streams", "moe", False)
    assert "of its experts in memory" in moe.why
    # What comes with the program only is nothing to fetch.
    assert "nano-moe" not in by_name


def test_the_fit_follows_the_ceiling_and_the_context() -> None:
    write_tiny_model(paths.models() / "mine")
    need = entries(ModelCatalogue(memory_bytes=8 * GB))["mine"].needs_bytes
    assert need is not None
    small = entries(ModelCatalogue(memory_bytes=need - 1))["mine"]
    assert (small.fit, small.needs_bytes) == ("too big", need)
    assert entries(ModelCatalogue(memory_bytes=8 * GB))["qwen3-8b"].fit == "fits"
    assert entries(ModelCatalogue(memory_bytes=8 * GB, context=32768))["qwen3-8b"].fit == "too big"


def test_a_damaged_model_is_listed_with_its_problem() -> None:
    write_tiny_model(paths.models() / "mine")
    (paths.models() / "mine" / "config.json").write_text("{")
    entry = entries(ModelCatalogue())["mine"]
    assert entry.problem is not None
    assert entry.fit == "unknown"
    assert "cannot be used" in entry.why


def test_a_bad_registry_of_the_user_is_an_error(home: Path) -> None:  # noqa: F811
    (home / "models.toml").write_text("[bad\n")
    with pytest.raises(UsageError, match=r"models\.toml"):
        entries(ModelCatalogue())


def test_a_model_is_fetched_with_progress(hub: Hub) -> None:
    hub.repos["owner/name"] = model_files()
    events = fetch(ModelCatalogue(), "owner/name")
    steps = [event for event in events if isinstance(event, Step)]
    assert steps[-1].done == steps[-1].total > 0
    assert all(step.stage == "download" for step in steps)
    assert events[-1] == Fetched(paths.models() / "owner--name")
    assert (paths.models() / "owner--name" / "model.safetensors").is_file()
    assert "owner--name" in entries(ModelCatalogue())


def test_stopping_keeps_what_came_and_the_next_fetch_goes_on_from_there(hub: Hub, home: Path) -> None:  # noqa: F811
    register(home, "tiny", {"kind": "hub", "repo": "owner/name"})
    hub.repos["owner/name"] = model_files()
    hub.holds["model.safetensors"] = 500_000
    events = fetch(ModelCatalogue(), "tiny", lambda event: isinstance(event, Step) and event.done >= 500_000)
    assert isinstance(events[-1], Step)
    assert not (paths.models() / "tiny").exists()
    # Files come side by side; small ones may be on their way still.
    assert "model.safetensors.partial" in [path.name for path in in_progress("tiny")]
    assert entries(ModelCatalogue())["tiny"].begun_bytes >= 500_000
    hub.release.set()
    assert isinstance(fetch(ModelCatalogue(), "tiny")[-1], Fetched)
    assert "bytes=500000-" in hub.ranges("model.safetensors")
    assert in_progress("tiny") == []


def test_what_an_unfinished_fetch_left_can_be_deleted(hub: Hub, home: Path) -> None:  # noqa: F811
    register(home, "tiny", {"kind": "hub", "repo": "owner/name"})
    hub.repos["owner/name"] = model_files()
    hub.holds["model.safetensors"] = 500_000
    fetch(ModelCatalogue(), "tiny", lambda event: isinstance(event, Step) and event.done >= 500_000)
    assert asyncio.run(ModelCatalogue().remove("tiny")) >= 500_000
    assert entries(ModelCatalogue())["tiny"].begun_bytes == 0


def test_offline_and_unreachable_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    (failed,) = fetch(ModelCatalogue(offline=True), "qwen3-8b")
    assert isinstance(failed, FetchFailed)
    assert "offline, so it was not asked" in failed.message
    monkeypatch.setenv("HF_ENDPOINT", dead_address())
    failed = fetch(ModelCatalogue(), "qwen3-8b")[-1]
    assert isinstance(failed, FetchFailed)
    assert "cannot be reached" in failed.message
    failed = fetch(ModelCatalogue(), "no-such-model")[-1]
    assert isinstance(failed, FetchFailed)
    assert failed.error == "UnknownModelError"


def test_a_disk_that_is_too_small_is_told_before_anybody_is_asked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: type("U", (), {"free": 3 * GB}))
    (failed,) = fetch(ModelCatalogue(), "qwen3-8b")
    assert isinstance(failed, FetchFailed)
    assert "needs 4.60 GB of disk, but only 3.00 GB are free" in failed.message
    assert hub.requests == []


def test_a_child_that_dies_is_a_failed_fetch(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repos["owner/name"] = model_files()
    hub.holds["model.safetensors"] = 500_000
    started: list[Any] = []
    create = asyncio.create_subprocess_exec

    async def remember(*command: Any, **options: Any) -> Any:
        started.append(await create(*command, **options))
        return started[-1]

    def kill(event: FetchEvent) -> bool:
        if isinstance(event, Step) and started[-1].returncode is None:
            os.kill(started[-1].pid, signal.SIGKILL)
        return False

    monkeypatch.setattr(asyncio, "create_subprocess_exec", remember)
    failed = fetch(ModelCatalogue(), "owner/name", kill)[-1]
    assert isinstance(failed, FetchFailed)
    assert "ended unexpectedly" in failed.message


def test_the_child_ends_with_the_chat(hub: Hub) -> None:
    hub.repos["owner/name"] = model_files()
    hub.holds["model.safetensors"] = 500_000
    command = [sys.executable, "-c", FETCHING, "owner/name"]
    with child(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert b"step" in next(line for line in process.stdout if b"step" in line)
        process.stdin.close()
        began = time.monotonic()
        process.wait()
        # A read that is waited for takes half a minute.
        assert time.monotonic() - began < 15


def test_recommended_models_say_where_they_are() -> None:
    for name in ("qwen3-1.7b", "r1-distill-qwen-1.5b"):
        write_tiny_model(paths.models() / name)
    advice = asyncio.run(ModelCatalogue(memory_bytes=6 * GB).recommended())
    assert advice
    assert {each.name: each.folder for each in advice}["qwen3-1.7b"] == paths.models() / "qwen3-1.7b"
    assert all(each.download_s and each.why and each.title for each in advice)


def test_a_folder_is_found_by_its_path(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "elsewhere")
    chosen = asyncio.run(ModelCatalogue().find(str(tmp_path / "elsewhere")))
    assert chosen.folder == tmp_path / "elsewhere"
    with pytest.raises(UnknownModelError):
        asyncio.run(ModelCatalogue().find(str(tmp_path / "nowhere")))


def test_a_model_tells_what_it_draws_with() -> None:
    folder = paths.models() / "qwen3-8b"
    write_tiny_model(folder)
    # The registry's, over generation_config.json's.
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.1, "repetition_penalty": 1.1}))
    found = asyncio.run(ModelCatalogue().defaults(folder))
    assert (found.temperature, found.top_k, found.repetition_penalty) == (0.6, 20, 1.1)


def test_nothing_of_it_imports_mlx_in_the_chat() -> None:
    write_tiny_model(paths.models() / "mine")
    code = (
        "import asyncio, sys; from pathlib import Path; from edger1.cli.catalogue import ModelCatalogue\n"
        f"c = ModelCatalogue(adapter_folders=(Path({str(paths.models())!r}),))\n"
        "found = asyncio.run(c.entries()); asyncio.run(c.recommended())\n"
        "asyncio.run(c.defaults(found[0].folder))\n"
        "asyncio.run(c.adapters(next(e.folder for e in found if e.name == 'mine')))\n"
        "sys.exit('mlx.core' in sys.modules or 'mlx_lm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=LIMIT_S).returncode == 0


# Adapters


def write_adapter(folder: Path, tensors: dict[str, tuple[int, ...]], config: dict[str, Any], weights: str) -> None:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: np.zeros(shape, np.float32) for name, shape in tensors.items()}, folder / weights)


def write_mlx(folder: Path, out: int = 64, layer: int = 0) -> None:
    q = f"model.layers.{layer}.self_attn.q_proj"
    config = {"fine_tune_type": "lora", "model": "/x/mine", "lora_parameters": {"rank": 8, "scale": 2.0, "dropout": 0}}
    write_adapter(folder, {f"{q}.lora_a": (64, 8), f"{q}.lora_b": (8, out)}, config, "adapters.safetensors")


def write_peft(folder: Path, out: int = 64) -> None:
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "o/mine"}
    tensors = {f"{q}.lora_A.weight": (4, 64), f"{q}.lora_B.weight": (out, 4)}
    write_adapter(folder, tensors, config, "adapter_model.safetensors")


def test_adapters_that_fit_are_found_in_both_layouts(tmp_path: Path) -> None:
    model, runs = tmp_path / "model", tmp_path / "runs"
    write_tiny_model(model)
    rows = query_rows(model)
    write_mlx(runs / "mine" / "adapter", rows)
    write_mlx(runs / "mine" / "checkpoints" / "step-1" / "adapter", rows)
    write_peft(runs / "theirs", rows)
    write_mlx(runs / "of-a-wider-model", rows + 32)
    write_mlx(runs / "of-a-deeper-model", rows, layer=99)
    write_peft(runs / "of-a-wider-model-of-peft", rows + 32)
    (runs / "damaged").mkdir()
    (runs / "damaged" / "adapter_config.json").write_text("{")
    os.utime(runs / "theirs", (1, 1))
    found = asyncio.run(ModelCatalogue(adapter_folders=(runs, tmp_path / "nowhere")).adapters(model))
    assert [(each.name, each.layout, each.rank, each.of) for each in found] == [
        ("mine", "mlx-lm", 8, "mine"),
        ("theirs", "PEFT", 4, "mine"),
    ]
    assert found[0].folder == runs / "mine" / "adapter"


def query_rows(model: Path) -> int:
    from edger1.folder import inspect
    from edger1.quant.formats import safetensors

    entries = safetensors.read_header(inspect(model).weight_files[0]).entries
    return int(entries["model.layers.0.self_attn.q_proj.weight"].shape[0])


def test_an_adapter_over_nothing_that_is_known_does_not_fit() -> None:
    model = {"model.layers.0.self_attn.q_proj.weight": (64, 8)}
    assert fits({"model.layers.0.self_attn.q_proj.lora_b": (8, 64)}, model)
    assert not fits({"model.layers.0.mixer.lora_b": (8, 64)}, model)
    assert not fits({}, model)
    assert not fits({"model.layers.0.self_attn.q_proj.lora_b": (8, 64)}, {})


def test_an_installed_model_is_deleted() -> None:
    write_tiny_model(paths.models() / "mine")
    assert asyncio.run(ModelCatalogue().remove("mine")) > 0
    assert "mine" not in [model.name for model in installed.models()]
