"""What a folder claims about its files is checked before anything is read of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from weight_folders import file_bytes

from edger1.errors import FormatError
from edger1.quant.formats import folder as folders
from edger1.quant.formats.safetensors import read_header

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_files(folder: Path, **files: list[str]) -> None:
    for stem, names in files.items():
        arrays = {name: ("U8", np.zeros(2, np.uint8)) for name in names}
        (folder / f"{stem.replace('_', '-')}.safetensors").write_bytes(file_bytes(arrays))


def write_index(folder: Path, content: Any) -> None:
    (folder / folders.INDEX_NAME).write_text(json.dumps(content), encoding="utf-8")


def test_the_config_must_say_what_the_model_is(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="has no config.json, so it is no model folder"):
        folders.read_config(tmp_path)
    for content, message in [
        ("[1]", "not a JSON object"),
        ("{}", "which model_type"),
        ('{"model_type": 3}', "which model_type"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("\xff", "not valid JSON"),
    ]:
        (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(FormatError, match=message):
            folders.read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "x": 1}', encoding="utf-8")
    assert folders.read_config(tmp_path) == {"model_type": "llama", "x": 1}


def test_a_pipe_or_a_huge_file_in_place_of_json_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(FormatError, match="no regular file"):
        folders.read_json(tmp_path / "pipe.json")
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(folders.MAX_JSON_BYTES + 1)
    with pytest.raises(FormatError, match="too large"):
        folders.read_json(tmp_path / "huge.json")


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/tmp/model.safetensors", "a/model.safetensors", "a\\b.safetensors", "..", "", "a\0b"],
)
def test_an_index_that_points_outside_is_refused(tmp_path: Path, name: str) -> None:
    write_index(tmp_path, {"weight_map": {"a": name}})
    with pytest.raises(FormatError, match="not a plain file name beside it"):
        folders.read_index(tmp_path)


@pytest.mark.parametrize("content", [[], {}, {"weight_map": []}, {"weight_map": {"a": 1}}, {"weight_map": None}])
def test_an_index_without_a_map_is_refused(tmp_path: Path, content: Any) -> None:
    write_index(tmp_path, content)
    with pytest.raises(FormatError, match="has no weight_map"):
        folders.read_index(tmp_path)


def test_an_index_of_pickles_is_refused_with_the_reason(tmp_path: Path) -> None:
    write_index(tmp_path, {"weight_map": {"a": "pytorch_model.bin"}})
    with pytest.raises(FormatError, match=r"'pytorch_model\.bin'; only .safetensors files are read.*can run code"):
        folders.read_index(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth", "weights.pt", "model.ckpt", "weights.pkl"])
def test_pickles_alone_are_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(FormatError, match="as Python pickles only, which can run code when read and are refused"):
        folders.weight_files(tmp_path, None)


def test_no_weights_at_all(tmp_path: Path) -> None:
    write_files(tmp_path, adapters=["a"])
    with pytest.raises(FormatError, match="but no weights"):
        folders.weight_files(tmp_path, None)


def test_files_that_the_index_names_must_be_there(tmp_path: Path) -> None:
    write_files(tmp_path, model_00001_of_00002=["a"])
    with pytest.raises(FormatError, match=f"1 of its 2 weight files are missing, such as '{TWO}'"):
        folders.weight_files(tmp_path, {"a": ONE, "b": TWO})


def test_parts_are_counted_without_an_index_too(tmp_path: Path) -> None:
    write_files(tmp_path, model_00001_of_00003=["a"], model_00003_of_00003=["b"])
    with pytest.raises(FormatError, match=r"1 of its 3 .* such as 'model-00002-of-00003\.safetensors'"):
        folders.weight_files(tmp_path, None)


def test_files_that_are_coming_count_as_there(tmp_path: Path) -> None:
    write_files(tmp_path, model_00001_of_00002=["a"])
    assert folders.weight_files(tmp_path, {"a": ONE, "b": TWO}, [TWO]) == (tmp_path / ONE, tmp_path / TWO)


def test_the_index_decides_and_mtp_goes_along(tmp_path: Path) -> None:
    write_files(tmp_path, model=["a"], model_00001_of_00001=["a"], consolidated=["a"], mtp=["b"])
    named = folders.weight_files(tmp_path, {"a": "model-00001-of-00001.safetensors"})
    assert [path.name for path in named] == ["model-00001-of-00001.safetensors", "mtp.safetensors"]
    assert "consolidated.safetensors" not in [path.name for path in folders.weight_files(tmp_path, None)]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"a": ONE, "b": ONE}, f"says that tensor 'b' is in {ONE}, but it is not"),
        ({"a": ONE, "b": TWO, "c": TWO}, "says that tensor 'c' is in"),
        ({"a": TWO, "b": TWO}, "says that tensor 'a' is in"),
        ({"a": ONE}, None),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, index: dict[str, str], message: str | None) -> None:
    write_files(tmp_path, model_00001_of_00002=["a"], model_00002_of_00002=["b"])
    headers = [read_header(tmp_path / name) for name in (ONE, TWO)]
    if message is None:
        # What no entry names is not looked at.
        folders.check_index(tmp_path, index, headers)
        return
    with pytest.raises(FormatError, match=message):
        folders.check_index(tmp_path, index, headers)


def test_a_file_with_more_than_its_index_says_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path, model=["a", "b"])
    with pytest.raises(FormatError, match="holds 1 tensors that .* does not place there, such as 'b'"):
        folders.check_index(tmp_path, {"a": "model.safetensors"}, [read_header(tmp_path / "model.safetensors")])


def test_companions_are_the_small_files_of_a_model(tmp_path: Path) -> None:
    good = ["LICENSE", "chat_template.jinja", "generation_config.json", "merges.txt", "tokenization_x.py",
            "tokenizer.json", "tokenizer.model", "vocab.tiktoken"]  # fmt: skip
    other = ["config.json", "model.safetensors.index.json", "model.safetensors", "modeling_x.py", "README.md",
             "quantize_config.json", "hf_quant_config.json", "pytorch_model.bin", ".hidden.json",
             "conversion.json", "report.json", "journal.json"]  # fmt: skip
    for name in good + other:
        (tmp_path / name).write_text("x", encoding="utf-8")
    (tmp_path / "folder.json").mkdir()
    assert [path.name for path in folders.companions(tmp_path)] == good
