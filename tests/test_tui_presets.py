from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edger1 import paths
from edger1.errors import UsageError
from edger1.messages import Sampling
from edger1.tui.presets import Presets, to_toml
from edger1.tui.settings import Settings

CAREFUL = Settings('Answer "briefly".\n\tNo \\ and no """.\n', Sampling(temperature=0.2, top_k=20, seed=7), 512, "on")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "presets.toml"


def test_a_preset_is_the_same_after_it_was_written(file: Path) -> None:
    presets = Presets(file)
    presets.save("careful", CAREFUL)
    presets.save("as is", Settings())
    again = Presets(file)
    assert again.names() == ["careful", "as is"]
    assert again.get("careful") == CAREFUL
    assert again.get("as is") == Settings()
    again.delete("careful")
    assert Presets(file).names() == ["as is"]
    with pytest.raises(KeyError):
        again.delete("careful")


# What write_text would translate, and what UTF-8 cannot write, are no part of what a text area gives.
_TEXT = st.text(st.characters(exclude_categories=("Cs",)))


@given(st.dictionaries(_TEXT.filter(bool), _TEXT, max_size=3))
def test_any_text_survives_the_file(texts: dict[str, str]) -> None:
    written = to_toml({name: Settings(system=text or None) for name, text in texts.items()})
    assert {name: table.get("system", "") for name, table in tomllib.loads(written).items()} == texts


def test_people_can_read_and_edit_the_file(file: Path) -> None:
    Presets(file).save("careful", CAREFUL)
    text = file.read_text()
    assert "temperature = 0.2" in text
    assert "min_p" not in text
    file.write_text('[mine]\ntemperature = 1\nthink = "off"\n')
    assert Presets(file).get("mine") == Settings(sampling=Sampling(temperature=1), think="off")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[mine", "not valid TOML"),
        ("[mine]\ntemperature = -1\n", "temperature is -1"),
        ('[mine]\ntemperature = "hot"\n', "temperature is 'hot'"),
        ("[mine]\nmax_tokens = 0\n", "max_tokens is 0"),
        ('[mine]\nthink = "maybe"\n', 'expected "auto", "on" or "off"'),
        ("[mine]\nthink = [1]\n", "think is"),
        ("[mine]\nsystem = 3\n", "system is 3"),
        ("[mine]\ntemprature = 1\n", "unknown key 'temprature'"),
        ("mine = 3\n", "a table was expected"),
        ("\x00", "not valid TOML"),
    ],
)
def test_a_bad_file_is_said_and_left_alone(file: Path, content: str, reason: str) -> None:
    file.write_text(content)
    presets = Presets(file)
    assert presets.names() == []
    assert reason in (presets.problem or "")
    assert str(file) in (presets.problem or "")
    with pytest.raises(UsageError, match="left as it is"):
        presets.save("new", Settings())
    assert file.read_text() == content


def test_what_another_window_saved_is_kept(file: Path) -> None:
    one, two = Presets(file), Presets(file)
    one.save("a", Settings(think="on"))
    two.save("b", Settings(think="off"))
    assert Presets(file).names() == ["a", "b"]


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        Presets(tmp_path / "file" / "presets.toml").save("a", Settings())


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "x" * 61])
def test_a_name_is_a_line_of_letters(file: Path, name: str) -> None:
    with pytest.raises(UsageError, match="printable"):
        Presets(file).save(name, Settings())
    assert not file.exists()


def test_settings_out_of_range_are_not_saved(file: Path) -> None:
    with pytest.raises(UsageError, match="top_p"):
        Presets(file).save("a", Settings(sampling=Sampling(top_p=2.0)))


def test_the_file_lies_beside_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGER1_HOME", str(tmp_path / "home"))
    presets = Presets()
    presets.save("a", Settings())
    assert paths.user_config().parent == presets.path.parent
    assert [each.name for each in (tmp_path / "home").iterdir()] == ["presets.toml"]
