"""Converting from the hub and from this machine: one file ahead, resumed, put in place, refused where it must be."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import hub_server
import mlx.core as mx
import numpy as np
import pytest
from children import join, until
from command_line import edger1
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from hub_server import Hub
from model_files import Tiny, tiny_model
from pulling import home, in_progress, server
from safetensors.numpy import save
from typer.testing import CliRunner

from edger1 import calibration, installed, mlx_runtime, paths
from edger1.cli import app
from edger1.errors import EdgeR1Error, FormatError, SourceError, UsageError
from edger1.fetch import hub, pull, quantize, run, streamed
from edger1.fetch.place import Manifest
from edger1.fetch.quantize import Calibration, Wanted, convert, describe
from edger1.fetch.steps import OnNote, Watch
from edger1.quant import calibrate, recipes, running
from edger1.quant.converting import Settings
from edger1.quant.layers import Pass

mlx_runtime.prepare()

# Fixtures: imported here so that pytest finds them.
__all__ = ["home", "server"]

REPO = "lab/tiny"
CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 96,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "max_position_embeddings": 512, "torch_dtype": "float16",
}  # fmt: skip


def checkpoint(shards: int = 6, seed: int = 0) -> dict[str, bytes]:
    """Return the files of a tiny llama, a layer or so a shard."""
    rng = np.random.default_rng(seed)
    tensors = {"model.embed_tokens.weight": (96, 64)}
    for layer in range(CONFIG["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        tensors |= {
            f"{at}.self_attn.q_proj.weight": (64, 64),
            f"{at}.self_attn.k_proj.weight": (32, 64),
            f"{at}.self_attn.v_proj.weight": (32, 64),
            f"{at}.self_attn.o_proj.weight": (64, 64),
            f"{at}.mlp.gate_proj.weight": (128, 64),
            f"{at}.mlp.up_proj.weight": (128, 64),
            f"{at}.mlp.down_proj.weight": (64, 128),
            f"{at}.input_layernorm.weight": (64,),
            f"{at}.post_attention_layernorm.weight": (64,),
        }
    tensors["model.norm.weight"] = (64,)
    values = {name: rng.standard_normal(shape).astype(np.float16) for name, shape in tensors.items()}
    names = list(values)
    files: dict[str, bytes] = {}
    where: dict[str, str] = {}
    for number in range(shards):
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        files[file] = save({name: values[name] for name in part})
        where |= dict.fromkeys(part, file)
    files["model.safetensors.index.json"] = json.dumps({"weight_map": where}).encode()
    files["config.json"] = json.dumps(CONFIG).encode()
    files["tokenizer.json"] = b'{"version": "1.0"}'
    return files


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def arrays(folder: Path) -> dict[str, mx.array]:
    return {name: value for path in folder.glob("model*.safetensors") for name, value in mx.load(str(path)).items()}


def fetched_weights(name: str) -> list[Path]:
    """Return what there is of weight files, their headers apart."""
    return [
        path
        for path in in_progress(name)
        if ".safetensors" in path.name and path.parent.name != ".headers" and "index" not in path.name
    ]


def assert_same_model(left: Path, right: Path) -> None:
    first, second = arrays(left), arrays(right)
    assert first.keys() == second.keys()
    assert all(mx.array_equal(first[name], second[name]) for name in first)
    assert (left / "config.json").read_bytes() == (right / "config.json").read_bytes()


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """What the repository's conversion should be: the same of files that are all here."""
    source = write(tmp_path / "source", checkpoint())
    return convert(Wanted(str(source), tmp_path / "local", recipes.uniform(4)), Settings(), Watch())


def test_a_folder_is_converted_and_installed(home: Path, tmp_path: Path, local: Path) -> None:
    notes: list[str] = []
    source = tmp_path / "source"
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    folder = convert(Wanted(str(source), None, recipes.uniform(4)), Settings(), Watch(note=notes.append))
    assert folder == paths.models() / "source-4bit"
    assert_same_model(folder, local)
    assert [model.name for model in installed.models()] == ["source-4bit"]
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert any("bits a weight" in note for note in notes)
    with pytest.raises(UsageError, match="source-4bit is installed already"):
        convert(Wanted(str(source), None, recipes.uniform(4)), Settings(), Watch())


def test_files_come_one_ahead_and_go_when_they_are_past(
    server: Hub, tmp_path: Path, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "SYNC_BYTES", 1 << 12)
    server.repos[REPO] = checkpoint()
    most: list[int] = []

    def count(file: Path) -> None:
        most.append(len(list(file.parent.glob("model-*.safetensors"))))

    unlink = Path.unlink

    def watched(path: Path, missing_ok: bool = False) -> None:
        if path.name.startswith("model-") and path.suffix == ".safetensors" and path.exists():
            count(path)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", watched)
    folder = convert(Wanted(REPO, None, recipes.uniform(4)), Settings(threads=2), Watch())
    assert_same_model(folder, local)
    assert len(most) == 6
    assert max(most) <= streamed.AT_ONCE
    assert (folder / "tokenizer.json").is_file()
    assert not in_progress("lab--tiny-4bit")
    manifest = json.loads((folder / "edger1.json").read_text())
    assert (manifest["repo"], manifest["source"]) == (REPO, "hub")


def test_one_file_at_a_time_is_enough_where_all_of_it_is_one_sync(server: Hub, local: Path) -> None:
    server.repos[REPO] = checkpoint()
    folder = convert(Wanted(REPO, None, recipes.uniform(4)), Settings(threads=3), Watch())
    assert_same_model(folder, local)


def test_an_interrupted_conversion_fetches_no_file_twice(
    server: Hub, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "SYNC_BYTES", 1 << 12)
    monkeypatch.setattr(hub, "_ATTEMPTS", 1)
    server.repos[REPO] = checkpoint()
    broken = "model-00004-of-00006.safetensors"
    # Its header comes, and then a piece of it.
    server.cuts[broken] = [1 << 30, 1000]
    with pytest.raises(EdgeR1Error, match="00004.*connection"):
        convert(Wanted(REPO, None, recipes.uniform(4)), Settings(), Watch())
    assert installed.models() == []
    assert not (paths.models() / "lab--tiny-4bit").exists()
    fetched = {name: len(server.ranges(name)) for name in server.repos[REPO] if name < broken and "model-0" in name}
    assert len(fetched) == 3
    folder = convert(Wanted(REPO, None, recipes.uniform(4)), Settings(), Watch())
    assert_same_model(folder, local)
    for name, times in fetched.items():
        assert len(server.ranges(name)) == times
    assert server.ranges(broken)[-1] == "bytes=1000-"


def stopped_on_the_way(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """See to it that a conversion of REPO stops at its fourth file."""
    monkeypatch.setattr(running, "SYNC_BYTES", 1 << 12)
    monkeypatch.setattr(hub, "_ATTEMPTS", 1)
    server.repos[REPO] = checkpoint()
    server.cuts["model-00004-of-00006.safetensors"] = [1 << 30, 1000]


def changed(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the repository other numbers of the same shapes, in another commit."""
    monkeypatch.setattr(hub_server, "COMMIT", "f" * 40)
    server.repos[REPO] = checkpoint(seed=1)


def test_other_numbers_under_the_same_headers_are_not_gone_on_with(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_on_the_way(server, monkeypatch)
    with pytest.raises(EdgeR1Error, match="00004"):
        convert(Wanted(REPO, None, recipes.uniform(4)), Settings(), Watch())
    changed(server, monkeypatch)
    with pytest.raises(UsageError, match="its source is not the same any more"):
        convert(Wanted(REPO, None, recipes.uniform(4)), Settings(), Watch())


def test_a_pull_begins_anew_where_the_repository_has_changed(
    server: Hub, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_on_the_way(server, monkeypatch)
    (home / "models.toml").write_text(f'[tiny]\nrepo = "{REPO}"\nrecipe = "4bit"\n')
    with pytest.raises(EdgeR1Error, match="00004"):
        pull("tiny")
    changed(server, monkeypatch)
    source = write(tmp_path / "source", checkpoint(seed=1))
    expected = convert(Wanted(str(source), tmp_path / "local", recipes.uniform(4)), Settings(), Watch())
    assert_same_model(pull("tiny"), expected)


@pytest.mark.parametrize("pulled", [False, True])
def test_a_whole_conversion_that_was_not_put_in_place_is_used(
    server: Hub, home: Path, local: Path, monkeypatch: pytest.MonkeyPatch, pulled: bool
) -> None:
    server.repos[REPO] = checkpoint()
    (home / "models.toml").write_text(f'[tiny]\nrepo = "{REPO}"\nrecipe = "4bit"\n')

    def killed(ready: Path, manifest: Manifest) -> Path:
        raise KeyboardInterrupt

    def make() -> Path:
        return pull("tiny") if pulled else convert(Wanted(REPO, None, recipes.uniform(4)), Settings(), Watch())

    with monkeypatch.context() as patched:
        patched.setattr(run if pulled else quantize, "install", killed)
        with pytest.raises(KeyboardInterrupt):
            make()
    weights = [name for name in server.repos[REPO] if name.endswith(".safetensors")]
    before = [len(server.ranges(name)) for name in weights]
    folder = make()
    assert [len(server.ranges(name)) for name in weights] == before
    assert_same_model(folder, local)
    assert not (folder / "journal.json").exists()


def test_a_conversion_that_waited_for_the_same_one_does_not_do_it_again(
    home: Path, tmp_path: Path, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import contextmanager

    hold = quantize.locked

    @contextmanager
    def late(name: str, note: OnNote) -> Iterator[Path]:
        with hold(name, note) as work:
            (paths.models() / name).mkdir(parents=True)
            yield work

    monkeypatch.setattr(quantize, "locked", late)
    with pytest.raises(UsageError, match="source-4bit is installed already"):
        convert(Wanted(str(tmp_path / "source"), None, recipes.uniform(4)), Settings(), Watch())


def test_a_lying_header_is_refused_before_any_weight_is_fetched(server: Hub) -> None:
    files = checkpoint()
    name = "model-00003-of-00006.safetensors"
    files[name] = (1 << 40).to_bytes(8, "little") + files[name][8:]
    server.repos[REPO] = files
    with pytest.raises(EdgeR1Error, match="claims a header of"):
        convert(Wanted(REPO, None, recipes.uniform(4)), Settings(), Watch())
    assert not fetched_weights("lab--tiny-4bit")


def test_room_for_two_files_is_asked_for_beside_the_output(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import namedtuple

    server.repos[REPO] = checkpoint()
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("usage", "total used free")(10**9, 0, 64 << 20))
    with pytest.raises(EdgeR1Error, match="Converting needs"):
        convert(Wanted(REPO, None, recipes.uniform(4)), Settings(), Watch())
    assert not fetched_weights("lab--tiny-4bit")


def test_the_hub_is_not_asked_when_offline(server: Hub) -> None:
    server.repos[REPO] = checkpoint()
    with pytest.raises(SourceError, match="offline"):
        convert(Wanted(REPO, None, recipes.uniform(4), offline=True), Settings(), Watch())
    assert not server.requests


def test_pulling_an_alias_converts_its_original_weights(server: Hub, home: Path, local: Path) -> None:
    server.repos[REPO] = checkpoint()
    (home / "models.toml").write_text(f'[tiny]\nrepo = "{REPO}"\nrecipe = "4bit"\n')
    folder = pull("tiny")
    assert folder.name == "tiny"
    assert_same_model(folder, local)
    assert pull("tiny") == folder


def test_pulling_a_repository_by_its_own_name_keeps_it_as_it_is(server: Hub, tmp_path: Path) -> None:
    server.repos[REPO] = checkpoint()
    folder = pull(REPO)
    assert "quantization" not in json.loads((folder / "config.json").read_text())


def test_a_plan_writes_nothing_and_fetches_headers_only(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    # Less than the header, so that the rest of it has to be asked for.
    monkeypatch.setattr(streamed, "FIRST_BYTES", 100)
    server.repos[REPO] = checkpoint()
    lines = list(describe(Wanted(REPO, None, recipes.find("small")), Watch()))
    assert lines[-1].startswith("small: ")
    assert any("F16: 3 bits in groups of 64" in line for line in lines)
    assert installed.models() == []
    for name, content in server.repos[REPO].items():
        if name.endswith(".safetensors"):
            assert server.sent[name] == 8 + int.from_bytes(content[:8], "little")


def test_no_gguf_file_is_fetched_for_a_plan(server: Hub) -> None:
    server.repos[REPO] = {"tiny.gguf": b"GGUF" + bytes(10_000)}
    with pytest.raises(UsageError, match=r"a plan would have to fetch whole"):
        list(describe(Wanted(REPO, None, recipes.find("small")), Watch()))
    assert not server.sent.get("tiny.gguf")


def test_waiting_threads_are_let_go_when_it_ends(tmp_path: Path) -> None:
    over = threading.Event()
    supply = streamed.ShardSupply(tmp_path, {"a": ["one"]}, lambda name: over.wait(120), lambda path: None)
    supply.begin(["a"])
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            supply.need(("a",))
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    try:
        thread.start()
        until(lambda: supply.waiting() == 1, "a thread that waits")
        # The file is on its way still.
        supply.stop()
        join(thread)
    finally:
        supply.stop()
        over.set()
    assert [type(error) for error in caught] == [streamed.StoppedError]


def test_a_file_that_is_needed_after_it_was_removed_is_an_error_and_no_endless_wait(tmp_path: Path) -> None:
    supply = streamed.ShardSupply(tmp_path, {"a": ["one"]}, lambda name: (tmp_path / name).touch(), lambda path: None)
    supply.begin(["a"])
    supply.need(("a",))
    supply.passed(frozenset("a"))
    with pytest.raises(FormatError, match="one was needed again"):
        supply.need(("a",))


def test_the_command(home: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "source", checkpoint())
    out = tmp_path / "out"
    done = edger1("convert", str(source), "--bits", "8", "--to", str(out))
    assert (done.returncode, done.stdout) == (0, f"{out}\n")
    assert "8.5 bits" in done.stderr or "bits a weight" in done.stderr
    again = edger1("convert", str(source), "--bits", "8", "--to", str(out))
    assert again.returncode == 2
    assert "exists already" in again.stderr
    both = edger1("convert", str(source), "--bits", "8", "--recipe", "small")
    assert both.returncode == 2
    assert "--recipe and --bits were both given" in both.stderr


def test_a_gguf_of_types_that_mlx_lacks_is_quantized_again_and_says_so(home: Path, tmp_path: Path) -> None:
    tiny = tiny_model(hidden=256)
    shape = tiny.weights["model.layers.1.mlp.up_proj.weight"].shape
    raw = np.random.default_rng(0).integers(0, 256, (shape[0], shape[1] // 256, 144), dtype=np.uint8)
    # The two f16 scales of a block, kept small.
    raw[..., 1:4:2] = 0x20
    raw = raw.reshape(shape[0], -1)
    numbers = dequantize(raw, GGMLQuantizationType.Q4_K)
    entry = int(GGMLQuantizationType.Q4_K), shape, raw.tobytes()
    mixed = Tiny(tiny.weights, tiny.metadata, tiny.tensors | {"blk.1.ffn_up.weight": entry})
    notes: list[str] = []
    folder = pull(mixed.write(tmp_path / "mixed.gguf"), on_note=notes.append)
    assert any("weights of Q4_K, which MLX has no like of" in note for note in notes)
    found = arrays(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"]["model.layers.1.mlp.up_proj"] == {"group_size": 32, "bits": 5, "mode": "affine"}
    parts = (found[f"model.layers.1.mlp.up_proj.{part}"] for part in ("weight", "scales", "biases"))
    restored = np.array(mx.dequantize(*parts, group_size=32, bits=5).astype(mx.float32))
    assert np.abs(restored - numbers).max() < 0.1 * np.abs(numbers).max()
    lossless = pull(tiny.write(tmp_path / "plain.gguf"), on_note=notes.append)
    expected = arrays(lossless)
    for name in expected:
        if not name.startswith("model.layers.1.mlp.up_proj"):
            assert mx.array_equal(found[name], expected[name]), name
    assert not (lossless / "conversion.json").exists()


def test_calibrated_codes_are_other_codes_and_the_record_says_so(home: Path, tmp_path: Path, tiny_folder: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("What is counted here is how often a letter comes. " * 40)
    plain = convert(Wanted(str(tiny_folder), tmp_path / "plain", recipes.uniform(3)), Settings(), Watch())
    fitted = Wanted(str(tiny_folder), tmp_path / "fitted", recipes.uniform(3), calibration=Calibration(text))
    folder = convert(fitted, Settings(), Watch())
    first, second = arrays(plain), arrays(folder)
    assert first.keys() == second.keys()
    assert not mx.array_equal(first["model.layers.0.mlp.up_proj.weight"], second["model.layers.0.mlp.up_proj.weight"])
    assert "tokens" in json.loads((folder / "conversion.json").read_text())["calibration"]
    assert "calibration" not in json.loads((plain / "conversion.json").read_text())


@pytest.mark.parametrize("recipe", [recipes.uniform(4, mode="mxfp4"), recipes.find("keep")])
def test_calibrating_for_a_recipe_that_has_nothing_to_fit_is_refused(
    home: Path, tmp_path: Path, tiny_folder: Path, recipe: recipes.Recipe
) -> None:
    wanted = Wanted(str(tiny_folder), tmp_path / "out", recipe, calibration=Calibration())
    with pytest.raises(UsageError, match=f"the recipe {recipe.name} has none"):
        convert(wanted, Settings(), Watch())
    assert not (tmp_path / "out").exists()


def test_the_command_takes_a_text_of_ones_own_or_the_one_that_comes_along(
    home: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("What is counted here is how often a letter comes. " * 40)
    found = {}
    for name in (str(text), "builtin"):
        command = ["convert", str(tiny_folder), "--bits", "3", "--calibrate", name, "--to", str(tmp_path / "fitted")]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        found[name] = json.loads((tmp_path / "fitted" / "conversion.json").read_text())["calibration"]
        shutil.rmtree(tmp_path / "fitted")
    assert found[str(text)] != found["builtin"]
    done = CliRunner().invoke(app, ["convert", str(tiny_folder), "--bits", "3", "--calibrate", str(tmp_path / "none")])
    assert isinstance(done.exception, UsageError)


def test_statistics_of_other_weights_are_not_used(home: Path, tmp_path: Path, tiny_folder: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("What is counted here is how often a letter comes. " * 40)
    source = tmp_path / "one" / "model"
    shutil.copytree(tiny_folder, source)
    first = calibration.prepare(source, tmp_path / "work", text, None).statistics
    made = (first.folder / calibrate.INDEX).stat().st_mtime_ns
    again = calibration.prepare(source, tmp_path / "work", text, None).statistics
    assert (again.folder / calibrate.INDEX).stat().st_mtime_ns == made
    # Trained on, under the same name.
    weights = source / "model.safetensors"
    weights.touch()
    other = calibration.prepare(source, tmp_path / "work", text, None).statistics
    assert (other.folder / calibrate.INDEX).stat().st_mtime_ns > made


@pytest.mark.parametrize("linears", [1, 60, 250, 800, 10_000])
@pytest.mark.parametrize("vocabulary", [2048, 152_000, 10**8])
def test_what_probing_holds_is_bounded(linears: int, vocabulary: int) -> None:
    class Layers:
        def begin(self, tokens: np.ndarray) -> Pass:
            return Pass(tokens, np.zeros((*tokens.shape, 4096), np.float32), None)

    tokens = np.zeros((64, 512), np.int32)
    probed = calibration._probed(Layers(), tokens, linears, vocabulary)  # type: ignore[arg-type]
    assert probed.size >= 2
    assert probed.size * 4096 * 4 * (linears + 1) <= calibration.PROBED_BYTES
    assert probed.size * vocabulary * 4 * 5 <= calibration.PROBED_BYTES or probed.size == 2
    assert probed.shape == (8, 512) or linears > 1 or vocabulary > 2048


def test_bits_are_fitted_to_a_size(home: Path, tmp_path: Path, tiny_folder: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("What is counted here is how often a letter comes. " * 40)
    wanted = Wanted(str(tiny_folder), tmp_path / "roomy", calibration=Calibration(text, 10**10))
    folder = convert(wanted, Settings(), Watch())
    said = json.loads((folder / "conversion.json").read_text())
    assert said["recipe"] == "fitted"
    assert all(
        "bits in groups of" in said["tensors"][f"model.layers.1.mlp.{one}_proj.weight"] for one in ("up", "down")
    )
    tight = Wanted(str(tiny_folder), tmp_path / "tight", calibration=Calibration(text, 10**6))
    with pytest.raises(UsageError, match="too little of 1.00 MB for weights"):
        convert(tight, Settings(), Watch())


def test_a_fitted_model_is_called_after_its_size(home: Path, tmp_path: Path, tiny_folder: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("What is counted here is how often a letter comes. " * 40)
    folder = convert(Wanted(str(tiny_folder), calibration=Calibration(text, 10**10)), Settings(), Watch())
    assert folder == paths.models() / f"{tiny_folder.name}-fitted-10.0GB"


def test_a_recipe_of_any_name_stays_in_the_models_folder(home: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "source", checkpoint())
    recipe = recipes.from_json(
        {"name": "/../../../up", "rules": [{"patterns": ["*"], "bits": 4}]}, "a file from somewhere"
    )
    folder = convert(Wanted(str(source), None, recipe), Settings(), Watch())
    assert folder.parent == paths.models()
    assert not (tmp_path / "up").exists()
    assert [model.name for model in installed.models()] == [folder.name]


def test_nothing_is_written_into_the_source(home: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "source", checkpoint())
    before = sorted(source.iterdir())
    with pytest.raises(UsageError, match="which is only ever read"):
        convert(Wanted(str(source), source / "out", recipes.uniform(4)), Settings(), Watch())
    assert sorted(source.iterdir()) == before


def test_fetched_files_need_room_on_their_own_disk(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second disk")
    assert quantize._beside(tmp_path, tmp_path / "to" / "model", 1000) == 1000
    assert quantize._beside(tmp_path, other / "to" / "model", 1000) == 0
    with pytest.raises(SourceError, match="Fetching two weight files"):
        quantize._beside(tmp_path, other / "model", 1 << 60)


def test_what_cannot_be_measured_is_said_before_it_is_converted(home: Path, server: Hub) -> None:
    from typer.testing import CliRunner

    from edger1.cli import app

    server.repos[REPO] = checkpoint()
    result = CliRunner().invoke(app, ["convert", REPO, "--bits", "4", "--report"])
    assert isinstance(result.exception, UsageError)
    assert "cannot be measured against it" in str(result.exception)
    assert not server.requests


def test_calibrating_needs_the_source_here(server: Hub) -> None:
    server.repos[REPO] = checkpoint()
    with pytest.raises(UsageError, match="edger1 pull lab/tiny"):
        convert(Wanted(REPO, None, recipes.uniform(4), calibration=Calibration()), Settings(), Watch())
