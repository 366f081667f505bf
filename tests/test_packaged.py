"""Models that come with EdgeR1: here without a pull, listed, not to be removed, replaced by one of the same name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_installed import put, run, write_model

import edger1
from edger1 import installed, paths, registry
from edger1.errors import SourceError, UnknownModelError, UsageError


@pytest.fixture(autouse=True)
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGER1_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(paths, "assets", lambda: tmp_path / "assets")
    paths.downloads().mkdir(parents=True)
    return tmp_path / "assets"


def test_it_is_here_without_a_pull_and_a_pull_fetches_nothing(assets: Path) -> None:
    folder = write_model(assets / "nano-moe")
    assert installed.resolve("nano-moe") == installed.resolve("Nano-MoE") == folder
    assert edger1.pull("nano-moe", offline=True) == edger1.pull("nano-moe", offline=True, force=True) == folder
    assert installed.name_of(folder) == "nano-moe"
    (row,) = json.loads(run("--json"))
    assert (row["name"], row["source"], row["path"]) == ("nano-moe", "package", str(folder))
    assert "nano-moe" in run()
    assert "No model was fetched yet" in run()


def test_it_cannot_be_removed(assets: Path) -> None:
    folder = write_model(assets / "nano-moe")
    with pytest.raises(UsageError, match="nano-moe is a part of EdgeR1"):
        installed.remove("nano-moe")
    assert (folder / "model.safetensors").is_file()


def test_a_model_of_the_same_name_stands_for_it(assets: Path) -> None:
    write_model(assets / "nano-moe")
    mine = put("nano-moe")
    assert installed.resolve("nano-moe") == mine
    assert [model.path for model in installed.models()] == [mine]
    installed.remove("nano-moe")
    assert installed.resolve("nano-moe") == assets / "nano-moe"


def test_an_installation_without_it_says_so(assets: Path) -> None:
    assert registry.packaged() == {}
    with pytest.raises(UnknownModelError, match="not on this machine"):
        installed.resolve("nano-moe")
    with pytest.raises(SourceError, match="reinstall EdgeR1"):
        edger1.pull("nano-moe", offline=True)
