"""The streaming converter on fakes: what is written, what a stop leaves, what is refused."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from children import child
from converting_child import SHARD_BYTES, convert_in_pieces
from converting_fakes import FakeSource, fake_model, files

from edger1.errors import EdgeR1Error, FormatError, UnknownModelError, UsageError
from edger1.folder import inspect
from edger1.quant import converting, journal, planning, running, writing
from edger1.quant.converting import Report, Settings, convert
from edger1.quant.formats.safetensors import read_header
from edger1.quant.planning import Model
from edger1.quant.recipes import Recipe, Rule, Spec, uniform
from edger1.quant.source import Codes, Coding

UP = "model.layers.1.mlp.switch_mlp.up_proj"
DOWN = "model.layers.1.mlp.switch_mlp.down_proj"


def converted(source: FakeSource, folder: Path, recipe: Recipe | None = None, **settings: Any) -> Report:
    settings = {"shard_bytes": SHARD_BYTES} | settings
    return convert(source, fake_model(source), folder / "model", recipe or uniform(4), Settings(**settings))


def arrays(folder: Path, pattern: str = "model*.safetensors") -> dict[str, mx.array]:
    found: dict[str, mx.array] = {}
    for path in sorted(folder.glob(pattern)):
        loaded = mx.load(str(path))
        assert not found.keys() & loaded.keys()
        found |= loaded
    return found


def test_every_array_is_what_mlx_makes_of_the_whole_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "WINDOW_BYTES", 1 << 15)
    source = FakeSource()
    found = arrays(converted(source, tmp_path).folder)
    for name, values in source.values.items():
        path = name.removesuffix(".weight")
        if values.ndim == 1 or path.endswith(".gate"):
            assert found[name].dtype == mx.bfloat16
            np.testing.assert_array_equal(np.array(found[name].astype(mx.float32)), values)
            continue
        expected = mx.quantize(mx.array(values).astype(mx.bfloat16), group_size=64, bits=4)
        for suffix, want in zip(("weight", "scales", "biases"), expected, strict=True):
            assert found[f"{path}.{suffix}"].dtype == want.dtype
            assert mx.array_equal(found[f"{path}.{suffix}"], want), (path, suffix)


def test_the_folder_is_one_that_mlx_lm_and_the_engine_can_read(tmp_path: Path) -> None:
    source = FakeSource()
    source.companions = (tmp_path / "tokenizer.json",)
    source.companions[0].write_text("{}")
    mine = Recipe("mine", "", (Rule(("*.down_proj",), Spec(6, 32)), Rule(("*",), Spec(4))))
    report = converted(source, tmp_path, mine)
    config = json.loads((report.folder / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    assert config["quantization"]["bits"] == 4
    assert config["quantization"][DOWN] == {"group_size": 32, "bits": 6, "mode": "affine"}
    found = inspect(report.folder)
    assert len(found.weight_files) > 1
    assert found.parameters == sum(values.size for values in source.values.values())
    weight_map = json.loads((report.folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name: file for file in found.weight_files for name in read_header(file).entries}.keys() == weight_map.keys()
    assert all((report.folder / file).stat().st_size <= SHARD_BYTES + 4096 for file in set(weight_map.values()))
    assert (report.folder / "tokenizer.json").read_text() == "{}"
    said = json.loads((report.folder / "conversion.json").read_text())
    assert said["tensors"][f"{DOWN}.weight"] == "BF16: 6 bits in groups of 32"
    assert not list(tmp_path.glob(".*"))


def test_no_more_than_a_window_of_rows_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "WINDOW_BYTES", 128 * 128 * 4)
    source = FakeSource()
    converted(source, tmp_path)
    assert source.tensors["model.embed_tokens.weight"].reads == [(0, 128), (128, 256), (256, 320)]
    assert sorted(source.tensors[f"{UP}.weight"].reads) == [(i, i + 1) for i in range(5)]


def test_what_mlx_lm_wants_of_a_module_counts_and_columns_decide(tmp_path: Path) -> None:
    source = FakeSource({"a.weight": (4, 96), "b.weight": (4, 40), "c.weight": (4, 128), "d.weight": (4, 128)})
    model = fake_model(source, c=Spec(8, 64), d=False)
    report = convert(source, model, tmp_path / "model", uniform(4, 128))
    how = {made.name: made.how for made in report.tensors}
    assert how == {
        "a.weight": "4 bits in groups of 32",
        "b.weight": "kept (40 columns, no multiple of a group of 128)",
        "c.weight": "8 bits in groups of 64",
        "d.weight": "kept",
    }


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_modes_without_biases(tmp_path: Path, mode: str) -> None:
    source = FakeSource({"a.weight": (96, 128)})
    found = arrays(converted(source, tmp_path, uniform(8 if mode == "mxfp8" else 4, mode=mode)).folder)
    expected = mx.quantize(mx.array(source.values["a.weight"]), mode=mode)
    assert found.keys() == {"a.weight", "a.scales"}
    assert mx.array_equal(found["a.weight"], expected[0])
    assert mx.array_equal(found["a.scales"], expected[1])


def coded(source: FakeSource, name: str, bits: int) -> Codes:
    """Give a tensor of the source codes of its own and return all of them."""
    from edger1.quant.quantizing import quantize

    tensor = source.tensors[name]
    whole = quantize(tensor.values, Spec(bits, 32), "F16")
    tensor.coding, tensor.kind = Coding("affine", bits, 32, "F16", "F16"), "Q"

    def cut(start: int, stop: int) -> Codes:
        parts = (whole.weight, whole.scales, whole.biases)
        return Codes(*(type(part)(part.dtype, part.data[start:stop]) for part in parts))

    tensor.codes = cut  # type: ignore[method-assign]
    return whole


def test_codes_are_carried_over_unless_fewer_bits_are_wanted(tmp_path: Path) -> None:
    source = FakeSource({"a.weight": (256, 128), "b.weight": (256, 128)})
    four, eight = coded(source, "a.weight", 4), coded(source, "b.weight", 8)
    report = converted(source, tmp_path)
    found = arrays(report.folder)
    assert {made.name: made.carried for made in report.tensors} == {"a.weight": True, "b.weight": False}
    np.testing.assert_array_equal(np.array(found["a.weight"]), four.weight.data)
    np.testing.assert_array_equal(np.array(found["a.biases"]), four.biases.data)
    assert found["b.weight"].shape != eight.weight.shape
    config = json.loads((report.folder / "config.json").read_text())
    table = config["quantization"]
    assert [table.get(path, table)["group_size"] for path in "ab"] == [32, 64]


def test_layers_ahead_lie_in_a_file_that_mlx_lm_does_not_read(tmp_path: Path) -> None:
    source = FakeSource()
    every = list(source.tensors.values())
    model = fake_model(source)
    ahead = tuple(tensor for tensor in every if ".layers.2." in tensor.name)
    model = Model(tuple(t for t in every if t not in ahead), model.modules, 2, ahead, ("left.out",))
    report = convert(source, model, tmp_path / "model", uniform(4))
    assert "model.layers.2.self_attn.q_proj.scales" in arrays(report.folder, "mtp.safetensors")
    assert not any(".layers.2." in name for name in arrays(report.folder))
    index = json.loads((report.folder / "model.safetensors.index.json").read_text())
    assert not any(".layers.2." in name for name in index["weight_map"])
    assert {made.name for made in report.ahead} == {tensor.name for tensor in ahead}
    assert report.dropped == ("left.out",)


def test_killed_at_twenty_moments_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    convert_in_pieces(FakeSource(), tmp_path / "whole")
    expected = files(tmp_path / "whole" / "model")
    assert sum(name.startswith("model-") for name in expected) > 3
    rng = random.Random(5)
    gone_on = 0
    converting = [sys.executable, Path(__file__).with_name("converting_child.py")]
    with child([*converting, tmp_path / "slow"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        began = time.monotonic()
        assert process.stdout.readline() == "ended\n"
        takes_s = time.monotonic() - began
    # More of them where a busy machine was slower or faster than it said: moments before and after all work say little.
    for attempt in itertools.count():
        if attempt >= 20 and gone_on >= 8:
            break
        assert attempt < 60
        home = tmp_path / str(attempt)
        with child([*converting, home], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            time.sleep(rng.uniform(0.0, takes_s))
            process.send_signal(signal.SIGKILL)
        # It may have been killed after its last step.
        if not (home / "model").exists():
            with pytest.raises(UnknownModelError):
                inspect(home / "model")
            left = journal.read(journal.working_folder(home / "model"))
            gone_on += left is not None and left.units > 0
            source = FakeSource()
            convert_in_pieces(source, home)
            if left is not None:
                read = sum(len(tensor.reads) for tensor in source.tensors.values())
                assert read == read_of_all(source) - left.units
        made = files(home / "model")
        # The very last thing that it does, when all else is in place, is to drop it.
        made.pop(journal.JOURNAL, None)
        assert made == expected
        assert [path.name for path in home.iterdir()] == ["model"]


def read_of_all(source: FakeSource) -> int:
    """Return how many units all of a source is."""
    order = {name: rank for rank, name in enumerate(source.tensors)}
    return len(planning.plan(fake_model(source), uniform(4), order, SHARD_BYTES).units)


def test_what_was_finished_before_a_failure_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "WINDOW_BYTES", 1 << 15)
    source = FakeSource()
    tensor = source.tensors[f"{DOWN}.weight"]

    def broken(start: int, stop: int) -> np.ndarray:
        raise FormatError("it is damaged")

    tensor.read = broken  # type: ignore[method-assign]
    with pytest.raises(FormatError, match=r"layers\.1\.mlp\.switch_mlp\.down_proj.*: it is damaged"):
        converted(source, tmp_path)
    hidden = journal.working_folder(tmp_path / "model")
    assert list(tmp_path.iterdir()) == [hidden]
    assert list(hidden.glob("model-00001-of-*.safetensors"))
    again = FakeSource()
    converted(again, tmp_path)
    assert not again.tensors["model.embed_tokens.weight"].reads
    converted(FakeSource(), tmp_path / "other")
    assert files(tmp_path / "model") == files(tmp_path / "other" / "model")


def stopped_half_way(folder: Path) -> None:
    source = FakeSource()
    source.tensors[f"{DOWN}.weight"].values = np.full((5, 128, 192), np.nan, np.float32)
    with pytest.raises(FormatError):
        converted(source, folder)


@pytest.mark.parametrize("other", ["source", "recipe"])
def test_another_source_or_recipe_does_not_go_on(tmp_path: Path, other: str) -> None:
    stopped_half_way(tmp_path)
    source = FakeSource(seed=1 if other == "source" else 0)
    recipe = uniform(5 if other == "recipe" else 4)
    with pytest.raises(UsageError, match=f"{other} is not the same any more.*--restart"):
        converted(source, tmp_path, recipe)
    report = converted(source, tmp_path, recipe, restart=True)
    converted(source, tmp_path / "other", recipe)
    assert files(report.folder) == files(tmp_path / "other" / "model")


def test_another_source_or_recipe_begins_anew_where_that_was_said_before(tmp_path: Path) -> None:
    stopped_half_way(tmp_path)
    report = converted(FakeSource(seed=1), tmp_path, uniform(5), renew=True)
    converted(FakeSource(seed=1), tmp_path / "other", uniform(5))
    assert files(report.folder) == files(tmp_path / "other" / "model")
    # The same one goes on.
    stopped_half_way(tmp_path / "same")
    again = FakeSource()
    converted(again, tmp_path / "same", renew=True)
    assert not again.tensors["model.embed_tokens.weight"].reads


def test_what_the_disk_refused_to_keep_is_not_journaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import stat

    monkeypatch.setattr(running, "SYNC_BYTES", 1 << 12)
    fsync, refused = os.fsync, []

    def once(fd: int) -> None:
        about = os.fstat(fd)
        if stat.S_ISREG(about.st_mode) and about.st_size > 1 << 14 and not refused:
            refused.append(fd)
            raise OSError(errno.EIO, "Input/output error")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", once)
    with pytest.raises(EdgeR1Error, match="input/output error"):
        converted(FakeSource(), tmp_path)
    assert refused
    found = journal.read(journal.working_folder(tmp_path / "model"))
    assert found is None or found.units == 0


def test_a_journal_over_missing_files_is_not_believed(tmp_path: Path) -> None:
    stopped_half_way(tmp_path)
    (first,) = journal.working_folder(tmp_path / "model").glob("model-00001-of-*.safetensors")
    first.unlink()
    report = converted(FakeSource(), tmp_path)
    converted(FakeSource(), tmp_path / "other")
    assert files(report.folder) == files(tmp_path / "other" / "model")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named_and_made_zero_only_if_told(tmp_path: Path, value: float) -> None:
    source = FakeSource()
    source.values[f"{UP}.weight"][3, 7, 9] = value
    with pytest.raises(FormatError, match=rf"{UP}\.weight holds 1 values that are NaN or infinite in rows .* to "):
        converted(source, tmp_path)
    report = converted(source, tmp_path, zero_nonfinite=True)
    assert report.zeroed == (f"{UP}.weight",)
    found = arrays(report.folder)
    restored = mx.dequantize(*(found[f"{UP}.{part}"] for part in ("weight", "scales", "biases")), group_size=64, bits=4)
    assert mx.all(mx.isfinite(restored))
    assert abs(restored[3, 7, 9].item()) < 0.3


@pytest.mark.parametrize("part", ["scales", "biases"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_codes_that_stand_for_nan_are_refused_as_well(tmp_path: Path, part: str, value: float) -> None:
    source = FakeSource({"a.weight": (256, 128), "b.weight": (256, 128)})
    whole = coded(source, "a.weight", 4)
    getattr(whole, part).data.setflags(write=True)
    getattr(whole, part).data[7, 2] = value
    with pytest.raises(FormatError, match=r"a\.weight holds 1 groups of codes that are NaN or infinite in rows 0 to"):
        converted(source, tmp_path)
    report = converted(source, tmp_path, zero_nonfinite=True)
    assert report.zeroed == ("a.weight",)
    found = arrays(report.folder)
    numbers = mx.dequantize(found["a.weight"], found["a.scales"], found["a.biases"], group_size=32, bits=4)
    assert mx.all(mx.isfinite(numbers))
    assert not mx.any(numbers[7, 64:96])
    np.testing.assert_array_equal(np.array(found["a.weight"])[:7], whole.weight.data[:7])


@pytest.mark.parametrize(("mode", "nan"), [("mxfp4", 255), ("nvfp4", 127), ("mxfp8", 255)])
def test_each_mode_has_a_nan_of_its_own(mode: str, nan: int) -> None:
    from edger1.quant import quantizing

    group = 16 if mode == "nvfp4" else 32
    bits = 8 if mode == "mxfp8" else 4
    codes = quantizing.quantize(np.ones((2, 64), np.float32), Spec(bits, group, mode), "BF16")
    assert not quantizing.broken_groups(codes, mode).any()
    scales = codes.scales.data.copy()
    scales[1, 1] = nan
    broken = quantizing.broken_groups(replace(codes, scales=replace(codes.scales, data=scales)), mode)
    assert np.argwhere(broken).tolist() == [[1, 1]]


def test_a_destination_that_exists_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        converted(FakeSource(), tmp_path)
    assert not list((tmp_path / "model").iterdir())


def test_what_cannot_take_its_name_is_kept_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if target == tmp_path / "model":
            raise PermissionError(errno.EACCES, "Permission denied")
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", refuse)
        with pytest.raises(EdgeR1Error, match="cannot be written: permission denied"):
            converted(FakeSource(), tmp_path)
    again = FakeSource()
    report = converted(again, tmp_path)
    assert not any(tensor.reads for tensor in again.tensors.values())
    converted(FakeSource(), tmp_path / "other")
    assert files(report.folder) == files(tmp_path / "other" / "model")


def test_two_conversions_do_not_write_into_one_folder(tmp_path: Path) -> None:
    hidden = journal.working_folder(tmp_path / "model")
    hidden.mkdir()
    fd = os.open(hidden, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(EdgeR1Error, match="is running"):
            converted(FakeSource(), tmp_path)
    finally:
        os.close(fd)


def test_room_is_asked_for_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 0, 65_000_000))
    source = FakeSource()
    with pytest.raises(EdgeR1Error, match=r"Converting needs .* MB on the disk of .*, but only 65.0 MB are free"):
        converted(source, tmp_path)
    assert not any(tensor.reads for tensor in source.tensors.values())
    assert not list(tmp_path.iterdir())


def test_what_is_written_already_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_half_way(tmp_path)
    usage = namedtuple("usage", "total used free")
    source = FakeSource()
    model = fake_model(source)
    whole = planning.plan(model, uniform(4), dict.fromkeys(source.tensors, 0), SHARD_BYTES).output_bytes
    free = converting.SMALL_FILES_BYTES + whole - 100_000
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 0, free))
    with pytest.raises(EdgeR1Error, match="Converting needs"):
        converted(source, tmp_path / "fresh")
    converted(source, tmp_path)


def test_a_disk_that_becomes_full_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "WINDOW_BYTES", 1 << 15)
    room = [400_000]

    def full(fd: int, nbytes: int) -> None:
        room[0] -= nbytes
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        os.ftruncate(fd, nbytes)

    monkeypatch.setattr(writing, "reserve", full)
    with pytest.raises(EdgeR1Error, match=r"became full .* start the same conversion again"):
        converted(FakeSource(), tmp_path)
    found = journal.read(journal.working_folder(tmp_path / "model"))
    assert found is not None
    assert found.units > 0
    room[0] = 10**9
    converted(FakeSource(), tmp_path)


def test_nothing_is_read_any_more_after_a_failure_and_threads_are_used_again(tmp_path: Path) -> None:
    stopped_half_way(tmp_path / "1")
    before = [thread for thread in threading.enumerate() if thread.name == "edger1-convert"]
    source = FakeSource()
    source.tensors[f"{DOWN}.weight"].values = np.full((5, 128, 192), np.nan, np.float32)
    with pytest.raises(FormatError):
        converted(source, tmp_path / "2")
    read = sum(len(tensor.reads) for tensor in source.tensors.values())
    time.sleep(0.05)
    assert sum(len(tensor.reads) for tensor in source.tensors.values()) == read
    assert [thread for thread in threading.enumerate() if thread.name == "edger1-convert"] == before


class Watched:
    """A supply that notes what it is asked for and told."""

    def __init__(self) -> None:
        self.needed: list[str] = []
        self.gone: list[frozenset[str]] = []

    def begin(self, names: Sequence[str]) -> None:
        self.coming = list(names)

    def waiting(self) -> int:
        return 0

    def press(self) -> None:
        raise AssertionError

    def need(self, names: tuple[str, ...]) -> None:
        assert not any(set(names) & gone for gone in self.gone)
        self.needed.extend(names)

    def passed(self, names: frozenset[str]) -> None:
        self.gone.append(names)

    def stop(self) -> None:
        return


def test_a_supply_hears_what_is_needed_and_what_is_safely_past(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "SYNC_BYTES", 1)
    supply = Watched()
    source = FakeSource()
    converted(source, tmp_path, supply=supply, threads=1)
    assert supply.needed == sorted(supply.needed, key=list(source.tensors).index)
    assert supply.needed[0] == supply.coming[0]
    assert set(supply.coming) == source.tensors.keys()
    assert frozenset().union(*supply.gone) == source.tensors.keys()
    assert len([gone for gone in supply.gone if gone]) > 1
