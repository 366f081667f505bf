from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from edger1 import installed, paths
from edger1.cli.models import models_app
from edger1.errors import UnknownModelError, UsageError
from edger1.fetch.place import MANIFEST, Manifest, install, link_file, write_manifest


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGER1_HOME", str(tmp_path / "home"))
    # Without the models that come along; see test_packaged.py for those.
    monkeypatch.setattr(paths, "assets", lambda: tmp_path / "assets")
    paths.downloads().mkdir(parents=True)
    return tmp_path / "home"


def write_model(folder: Path, **config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 512, **config}))
    save_file({"w": np.zeros((8, 8), np.float16)}, folder / "model.safetensors")
    return folder


def put(name: str, source: str = "hub", repo: str = "owner/name", alias: str | None = None, **config: object) -> Path:
    ready = write_model(paths.downloads() / name, **config)
    return install(ready, Manifest(name=name, source=source, repo=repo, alias=alias))


def run(*arguments: str, answer: str | None = None) -> str:
    result = CliRunner().invoke(models_app, list(arguments), input=answer, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_list_tells_size_quantization_architecture_and_last_use() -> None:
    quantized = put("b", quantization={"bits": 4, "group_size": 32})
    put("a", torch_dtype="bfloat16")
    put("c", quantization={"bits": 4, "group_size": 64, "model.layers.0.mlp.down_proj": {"bits": 6, "group_size": 64}})
    put("d", quantization={"bits": 4, "group_size": 32, "mode": "mxfp4"})
    installed.touch(quantized)
    models = installed.models()
    assert [(model.name, model.quantization) for model in models] == [
        ("a", "bf16"),
        ("b", "4-bit, group 32"),
        ("c", "4-bit, group 64, mixed"),
        ("d", "mxfp4, group 32"),
    ]
    assert all(model.architecture == "llama" and model.context_length == 512 for model in models)
    assert models[0].bytes == (models[0].path / "model.safetensors").stat().st_size
    assert [model.last_used is not None for model in models] == [False, True, False, False]


def test_using_a_model_writes_nothing_into_its_folder() -> None:
    folder = put("a")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())
    installed.touch(folder)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir()) == before


def test_a_damaged_record_of_use_loses_nothing_else() -> None:
    folder = put("a")
    (paths.data() / "last-used.json").write_text("[1, 2")
    assert installed.models()[0].last_used is None
    installed.touch(folder)
    assert installed.models()[0].last_used is not None


def test_names_resolve_to_the_folder(tmp_path: Path) -> None:
    folder = put("qwen3-8b", repo="mlx-community/Qwen3-8B-4bit", alias="qwen3-8b")
    for name in ("qwen3-8b", "Qwen3-8B", "mlx-community/Qwen3-8B-4bit", str(folder), folder):
        assert installed.resolve(name) == folder
    other = write_model(tmp_path / "elsewhere")
    assert installed.resolve(other) == other


def test_an_alias_finds_the_repository_that_was_pulled_by_its_full_name() -> None:
    folder = put("mlx-community--Qwen3-8B-4bit", repo="mlx-community/Qwen3-8B-4bit")
    assert installed.resolve("qwen3-8b") == folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen3-8b", r"qwen3-8b is not on this machine yet. Fetch it: `edger1 pull qwen3-8b`"),
        ("owner/other", r"owner/other is not on this machine. If it is a hub repository, fetch it: `edger1 pull"),
        ("my-modl", r"No model is called 'my-modl'. Nearest: my-model"),
        ("", r"No model is called ''"),
    ],
)
def test_a_name_that_is_not_here_says_what_to_do(name: str, message: str) -> None:
    put("my-model")
    with pytest.raises(UnknownModelError, match=message):
        installed.resolve(name)


def test_a_folder_without_a_model_and_a_gguf_file_say_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match=r"holds no model: there is no config\.json"):
        installed.resolve(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnknownModelError, match=r"must be converted once: `edger1 pull .*x\.gguf`"):
        installed.resolve(tmp_path / "x.gguf")


def test_a_damaged_model_is_listed_with_its_problem_and_can_be_removed() -> None:
    folder = put("bad")
    (folder / "config.json").write_text("{")
    (model,) = installed.models()
    assert model.problem is not None
    assert "config.json" in model.problem
    assert "damaged" in run("list")
    assert installed.remove("bad") > 0
    assert not folder.exists()


def test_a_link_whose_folder_is_gone_is_listed_and_can_be_removed(tmp_path: Path) -> None:
    paths.models().mkdir(parents=True)
    gone = tmp_path / "gone"
    write_manifest(link_file("gone"), Manifest(name="gone", source="path", repo=str(gone), link=str(gone)))
    (model,) = installed.models()
    assert model.problem is not None
    installed.remove("gone")
    assert installed.models() == []


def test_removing_a_linked_model_leaves_its_folder(tmp_path: Path) -> None:
    paths.models().mkdir(parents=True)
    folder = write_model(tmp_path / "mine")
    write_manifest(link_file("mine"), Manifest(name="mine", source="path", repo=str(folder), link=str(folder)))
    assert "its folder was left alone" in run("rm", "mine", "--yes")
    assert (folder / "model.safetensors").is_file()
    assert installed.models() == []


def test_removing_frees_the_folder_and_leaves_nothing_behind() -> None:
    folder = put("a")
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert installed.remove("a") == size
    assert list(paths.models().iterdir()) == []
    assert list(paths.downloads().iterdir()) == []


def test_removing_an_unfinished_pull() -> None:
    work = paths.downloads() / "owner--name"
    work.mkdir()
    (work / "model.safetensors.partial").write_bytes(b"123")
    assert installed.remove("owner/name") == 3
    assert not work.exists()


def test_a_folder_that_edger1_did_not_install_is_never_removed(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "precious")
    with pytest.raises(UnknownModelError, match="was not installed by EdgeR1"):
        installed.remove(str(folder))
    assert (folder / "model.safetensors").is_file()


def test_a_folder_put_there_by_hand_is_a_model() -> None:
    folder = write_model(paths.models() / "by-hand")
    assert installed.resolve("by-hand") == folder
    (folder / MANIFEST).write_text("not json")
    assert [model.name for model in installed.models()] == ["by-hand"]


def test_rm_asks_and_without_a_terminal_wants_a_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = put("a")
    with pytest.raises(UsageError, match="add --yes"):
        run("rm", "a")
    monkeypatch.setattr("edger1.cli.models._can_ask", lambda: True)
    result = CliRunner().invoke(models_app, ["rm", "a"], input="n\n")
    assert result.exit_code == 1
    assert folder.is_dir()
    assert "Removed a" in run("rm", "a", answer="y\n")
    assert not folder.exists()


def test_the_commands() -> None:
    assert "No model was fetched yet" in run()
    folder = put("qwen3-8b", repo="mlx-community/Qwen3-8B-4bit", alias="qwen3-8b")
    assert run("path", "qwen3-8b").strip() == str(folder)
    (row,) = json.loads(run("--json"))
    assert (row["name"], row["path"], row["architecture"]) == ("qwen3-8b", str(folder), "llama")
    everything = run("--all")
    assert "deepseek-r1 " in everything
    assert "420 GB" in everything
    both = json.loads(run("show", "qwen3-8b", "--json"))
    assert both["installed"]["path"] == str(folder)
    assert both["registry"]["sources"][0] == {"kind": "hub", "repo": "mlx-community/Qwen3-8B-4bit"}
    shown = run("show", "deepseek-r1")
    assert "671B" in shown
    assert "edger1 pull deepseek-r1" in shown
    with pytest.raises(UnknownModelError):
        run("show", "nothing-like-it")


def test_how_a_model_ran_is_noted_and_shown(tmp_path: Path) -> None:
    from edger1 import runs

    folder = put("qwen3-8b")
    assert "edger1 models show qwen3-8b --kernels" in run("show", "qwen3-8b")
    layers = [
        {"first": 0, "last": 30, "kind": "Block", "runs": "layer", "reason": ""},
        {"first": 31, "last": 31, "kind": "Block", "runs": "attention half", "reason": "its mlp is a puzzle"},
    ]
    report = {
        "precision": "fast",
        "active": True,
        "reason": "",
        "summary": "31 of 32",
        "layers": layers,
        "also": ["x y"],
    }
    runs.note(folder, report)
    runs.note(tmp_path / "gone", report)
    shown = run("show", "qwen3-8b")
    assert "loaded just now, fast" in shown
    assert "layers 0-30       Block, one operation\n" in shown
    assert "layer 31          Block, one operation up to the MLP: its mlp is a puzzle" in shown
    assert "  x y" in shown
    assert json.loads(run("show", "qwen3-8b", "--json"))["kernels"]["layers"] == layers
    runs.note(folder, report | {"active": False, "reason": "switched off"})
    assert "MLX's own operations: switched off" in run("show", "qwen3-8b")
    assert list(json.loads((paths.data() / "kernels.json").read_text("utf-8"))) == [str(folder)]


@pytest.mark.parametrize("record", ["", "[]", "{", "[" * 100_000, '{"FOLDER": 3}', '{"FOLDER": {"when": 1}}'])
def test_a_damaged_record_of_how_a_model_ran_is_as_none(record: str) -> None:
    from edger1 import runs

    folder = put("qwen3-8b")
    (paths.data() / "kernels.json").write_text(record.replace("FOLDER", str(folder)), encoding="utf-8")
    assert runs.of(folder) is None
    assert "--kernels" in run("show", "qwen3-8b")


def test_a_name_that_no_file_can_have_is_no_models() -> None:
    with pytest.raises(UnknownModelError, match="too long for a name"):
        installed.resolve("x" * 5000)
