from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import hub_server
import pytest
from children import LIMIT_S, child, join, until
from hub_server import COMMIT, Hub
from pulling import (
    CONFIG,
    GGUF,
    PATIENT,
    WEIGHTS,
    converter,
    home,
    in_progress,
    model_files,
    point_at,
    register,
    server,
    wait_long_for_answers,
)

from edger1 import installed, paths
from edger1.errors import SourceError, UsageError
from edger1.fetch import Step, hub, place, pull
from edger1.fetch.files import RemoteFile, choose
from edger1.fetch.steps import UnavailableError

# Fixtures: imported here so that pytest finds them.
__all__ = ["converter", "home", "server"]


def test_a_repository_is_fetched_whole_and_only_what_a_model_needs(server: Hub) -> None:
    server.repos["owner/name"] = model_files()
    steps: list[Step] = []
    folder = pull("owner/name", on_progress=steps.append)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "edger1.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    manifest = json.loads((folder / "edger1.json").read_text())
    assert (manifest["repo"], manifest["revision"], manifest["source"]) == ("owner/name", COMMIT, "hub")
    assert steps[-1].done == steps[-1].total == len(WEIGHTS) + len(CONFIG) + 18
    assert not in_progress("owner--name")


def test_a_model_that_is_here_is_not_asked_for_again(server: Hub) -> None:
    server.repos["owner/name"] = model_files()
    folder = pull("owner/name")
    asked = len(server.requests)
    assert pull("owner/name") == folder
    assert len(server.requests) == asked
    assert pull("owner/name", force=True) == folder
    assert len(server.requests) > asked


def test_a_branch_that_has_not_moved_is_not_fetched_again(server: Hub) -> None:
    server.repos["owner/name"] = model_files()
    folder = pull("owner/name")
    assert pull("owner/name@main") == folder
    assert len(server.ranges("model.safetensors")) == 1


def test_the_token_from_the_usual_place_is_sent(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.repos["owner/name"] = model_files()
    pull("owner/name")
    assert set(server.tokens) == {"Bearer hf_secret"}


def test_a_cut_connection_is_taken_up_where_it_stopped(server: Hub) -> None:
    server.repos["owner/name"] = model_files()
    server.cuts["model.safetensors"] = [700_000, 500_000]
    folder = pull("owner/name")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert server.ranges("model.safetensors") == [None, "bytes=700000-", "bytes=1200000-"]


def test_a_server_without_ranges_is_started_over(server: Hub) -> None:
    server.repos["owner/name"] = model_files()
    server.cuts["model.safetensors"] = [700_000]
    server.ignore_range = True
    assert (pull("owner/name") / "model.safetensors").read_bytes() == WEIGHTS


def test_what_a_failed_pull_got_is_kept_for_the_next_one(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_ATTEMPTS", 1)
    server.repos["owner/name"] = model_files()
    server.cuts["model.safetensors"] = [900_000]
    with pytest.raises(SourceError, match=r"owner/name could not be fetched.*model\.safetensors"):
        pull("owner/name")
    assert installed.models() == []
    folder = pull("owner/name")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert server.ranges("model.safetensors")[-1] == "bytes=900000-"


def bytes_in_progress() -> int:
    return sum(path.stat().st_size for path in in_progress("owner--name"))


def test_a_killed_pull_leaves_no_model_and_the_next_one_goes_on(server: Hub, home: Path) -> None:
    server.repos["owner/name"] = model_files()
    server.holds["model.safetensors"] = 1_000_000
    code = PATIENT + "from edger1.fetch import pull; pull('owner/name')"
    with child([sys.executable, "-c", code], env=os.environ | {"HF_ENDPOINT": server.url}) as pulling:
        until(lambda: bytes_in_progress() >= 1_000_000, "the middle of the weights", pulling)
        pulling.send_signal(signal.SIGKILL)
    assert installed.models() == []
    folder = pull("owner/name")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert server.ranges("model.safetensors") == [None, "bytes=1000000-"]


def test_ctrl_c_stops_at_once_and_keeps_what_came(server: Hub) -> None:
    server.repos["owner/name"] = model_files()
    server.holds["model.safetensors"] = 1_000_000

    stopped: list[float] = []

    def interrupt(step: Step) -> None:
        if step.done >= 1_000_000:
            stopped.append(time.monotonic())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("owner/name", on_progress=interrupt)
    # A transfer that is waited for takes as long as its read may: half a minute.
    assert time.monotonic() - stopped[0] < 15
    server.release.set()
    assert installed.models() == []
    assert (pull("owner/name") / "model.safetensors").read_bytes() == WEIGHTS
    assert server.ranges("model.safetensors")[-1] == "bytes=1000000-"


def test_damaged_bytes_are_refused_and_removed(server: Hub) -> None:
    server.repos["owner/name"] = model_files()
    server.corrupt = {"model.safetensors"}
    expected = hashlib.sha256(WEIGHTS).hexdigest()
    with pytest.raises(SourceError, match=f"model.safetensors should have SHA-256 {expected}, but has [0-9a-f]{{64}}"):
        pull("owner/name")
    assert "model.safetensors" not in [path.name.removesuffix(".partial") for path in in_progress("owner--name")]
    server.corrupt = set()
    assert (pull("owner/name") / "model.safetensors").read_bytes() == WEIGHTS


def test_a_damaged_small_file_costs_only_itself(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_WORKERS", 1)
    server.repos["owner/name"] = model_files()
    server.corrupt = {"tokenizer.json"}
    with pytest.raises(SourceError, match=r"tokenizer\.json should be git object"):
        pull("owner/name")
    assert [path.name for path in in_progress("owner--name")] == ["config.json", "model.safetensors"]


def test_unknown_gated_and_wrong_revision_each_say_so(server: Hub) -> None:
    server.repos["owner/name"] = model_files()
    server.gated.add("owner/closed")
    with pytest.raises(SourceError, match="no repository owner/nothing"):
        pull("owner/nothing")
    with pytest.raises(SourceError, match=r"owner/closed must be asked for.*HF_TOKEN"):
        pull("owner/closed")
    with pytest.raises(SourceError, match="owner/name has no revision v9"):
        pull("owner/name@v9")
    assert not (paths.downloads() / "owner--nothing").exists()


def test_a_silent_hub_costs_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_server.silent_server() as url:
        point_at(monkeypatch, url)
        started = time.monotonic()
        with pytest.raises(SourceError, match=r"cannot be reached .*no answer within 3 s"):
            pull("owner/name")
        # huggingface_hub's own retries would take 23 s.
        assert time.monotonic() - started < hub.PROBE_TIMEOUT_S + 10


def test_no_hub_at_all_costs_less(monkeypatch: pytest.MonkeyPatch) -> None:
    wait_long_for_answers(monkeypatch)
    point_at(monkeypatch, hub_server.dead_address())
    started = time.monotonic()
    with pytest.raises(SourceError, match="cannot be reached") as raised:
        pull("owner/name")
    # Neither the time that a silent hub gets, nor retries.
    assert "no answer" not in str(raised.value)
    assert time.monotonic() - started < 15


def test_no_disk_space_is_told_before_anything_is_fetched(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repos["owner/name"] = model_files()
    usage = type("Usage", (), {"free": 1_000_000})()
    monkeypatch.setattr(place.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(SourceError, match=r"owner/name .2\.10 MB. needs 2\.10 MB of disk, but only 1\.00 MB are free"):
        pull("owner/name")
    assert server.ranges("model.safetensors") == []


def test_a_disk_that_fills_up_keeps_what_came(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repos["owner/name"] = model_files()

    class Full:
        def write(self, chunk: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    write = hub._Transfer._write
    with monkeypatch.context() as patch:
        patch.setattr(hub._Transfer, "_write", lambda self, out, chunk: write(self, Full(), chunk))
        with pytest.raises(SourceError, match=r"cannot take more: No space left on device\. What is there is kept"):
            pull("owner/name")
    assert installed.models() == []
    assert (pull("owner/name") / "model.safetensors").read_bytes() == WEIGHTS


def test_two_pulls_of_one_model_fetch_it_once(server: Hub) -> None:
    server.repos["owner/name"] = model_files()
    server.holds["model.safetensors"] = 1_000_000
    folders: list[Path] = []
    failures: list[BaseException] = []
    notes: list[str] = []

    def fetch(on_note: Callable[[str], None]) -> None:
        try:
            folders.append(pull("owner/name", on_note=on_note))
        except BaseException as error:
            failures.append(error)

    first = threading.Thread(target=fetch, args=(lambda note: None,), daemon=True)
    second = threading.Thread(target=fetch, args=(notes.append,), daemon=True)
    try:
        first.start()
        until(lambda: server.ranges("model.safetensors") or failures, "the first pull's request for the weights")
        second.start()
        until(lambda: notes or failures, "the second pull's word that it waits")
        assert failures == []
        assert first.is_alive()
    finally:
        server.release.set()
    join(first, second)
    assert failures == []
    assert folders == [paths.models() / "owner--name"] * 2
    assert "under way" in notes[0]
    assert len(server.ranges("model.safetensors")) == 1


def test_an_old_model_stays_until_the_new_one_is_whole(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repos["owner/name"] = model_files()
    folder = pull("owner/name")
    server.corrupt = {"model.safetensors"}
    with pytest.raises(SourceError):
        pull("owner/name", force=True)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    server.corrupt = set()
    (folder / "config.json").write_bytes(b"damaged meanwhile")
    assert pull("owner/name", force=True) == folder
    assert (folder / "config.json").read_bytes() == CONFIG
    assert [path.name for path in paths.downloads().iterdir()] == ["owner--name.lock"]


def test_a_gguf_repository(server: Hub, converter: list[Path]) -> None:
    server.repos["owner/one"] = {"m-Q4_0.gguf": GGUF, "README.md": b"x"}
    server.repos["owner/two"] = {"m-Q4_0.gguf": GGUF, "m-Q8_0.gguf": GGUF + b"8"}
    server.repos["owner/parts"] = {f"m-0000{part}-of-00002.gguf": GGUF + b"%d" % part for part in (1, 2)}
    assert pull("owner/one") == paths.models() / "owner--one"
    with pytest.raises(UsageError, match="2 models in GGUF; name one: `edger1 pull owner/two:FILE`, of m-Q4_0"):
        pull("owner/two")
    folder = pull("owner/two:m-Q8_0.gguf")
    assert folder == paths.models() / "owner--two--m-Q8_0"
    assert json.loads((folder / "edger1.json").read_text())["sha256"] == hashlib.sha256(GGUF + b"8").hexdigest()
    assert pull("owner/parts:m-00002-of-00002.gguf") == paths.models() / "owner--parts--m"
    assert [path.name for path in converter] == ["m-Q4_0.gguf", "m-Q8_0.gguf", "m-00001-of-00002.gguf"]


def test_a_registered_checksum_is_held_against_the_hub(server: Hub, home: Path, converter: list[Path]) -> None:
    server.repos["owner/one"] = {"m.gguf": GGUF}
    register(home, "demo", {"kind": "hub", "repo": "owner/one", "file": "m.gguf", "sha256": "1" * 64})
    with pytest.raises(SourceError, match=f"m.gguf should have SHA-256 {'1' * 64}, but the hub has"):
        pull("demo")
    assert server.ranges("m.gguf") == []


def test_a_repository_that_lacks_a_shard_is_no_model(server: Hub) -> None:
    index = json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    )
    server.repos["owner/name"] = {
        "config.json": CONFIG,
        "model.safetensors.index.json": index.encode(),
        "model-00001-of-00002.safetensors": WEIGHTS,
    }
    with pytest.raises(SourceError, match=r"lacks 1 of 2 weight files, first model-00002-of-00002\.safetensors"):
        pull("owner/name")
    assert installed.models() == []


def test_which_files_make_a_model() -> None:
    def names(*given: str, wanted: str | None = None) -> list[str]:
        return [file.name for file in choose("o/n", [RemoteFile(name) for name in given], wanted)]

    assert names("config.json", "model.safetensors", "x.gguf", "a.md") == ["model.safetensors", "config.json"]
    with pytest.raises(UnavailableError, match="pickled"):
        names("config.json", "pytorch_model.bin")
    with pytest.raises(UnavailableError, match=r"neither model\*\.safetensors nor a GGUF"):
        names("README.md")
    with pytest.raises(UnavailableError, match=r"no config\.json"):
        names("model.safetensors")
    with pytest.raises(UnavailableError, match="outside its own folder"):
        names("config.json", "model.safetensors", "../../evil.json")
    parts = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    assert names(*reversed(parts)) == parts
    assert names("m-Q8_0.gguf", *parts, wanted=parts[1]) == parts
    with pytest.raises(UsageError, match=r"2 models in GGUF; name one: .*, of m-00001-of-00002.gguf, m-Q8_0.gguf"):
        names("m-Q8_0.gguf", *parts)
    with pytest.raises(UnavailableError, match="has 1 of the 3 parts of m-00002-of-00003.gguf"):
        names("m-00002-of-00003.gguf")


COMMAND = PATIENT + textwrap.dedent("""
    import typer
    from edger1.cli.pull import pull_command
    app = typer.Typer()
    app.command()(pull_command)
    app()
""")


def test_the_command_ends_cleanly_on_ctrl_c_and_says_how_to_go_on(server: Hub) -> None:
    server.repos["owner/name"] = model_files()
    server.holds["model.safetensors"] = 1_000_000
    with child(
        [sys.executable, "-c", COMMAND, "owner/name"],
        env=os.environ | {"HF_ENDPOINT": server.url},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as pulling:
        until(lambda: bytes_in_progress() >= 1_000_000, "the middle of the weights", pulling)
        pulling.send_signal(signal.SIGINT)
        out, err = pulling.communicate()
    assert (pulling.returncode, out) == (130, "")
    assert err.endswith("Stopped. What was fetched is kept; go on with `edger1 pull owner/name`.\n")
    assert "Traceback" not in err


def test_the_command_shows_lines_without_a_terminal_and_prints_the_folder(server: Hub, home: Path) -> None:
    server.repos["owner/name"] = model_files()
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, "owner/name"],
        env=os.environ | {"HF_ENDPOINT": server.url},
        capture_output=True,
        text=True,
        check=True,
        timeout=LIMIT_S,
    )
    assert done.stdout.strip() == str(paths.models() / "owner--name")
    assert f"Fetching owner/name at {COMMIT[:12]}: 2.10 MB." in done.stderr
    assert "download 100% of 2.10 MB" in done.stderr
    assert "\x1b" not in done.stderr
