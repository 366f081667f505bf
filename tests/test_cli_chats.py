"""`edger1 chats` as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from edger1 import paths
from edger1.cli import app
from edger1.errors import EdgeR1Error
from edger1.tui.settings import Settings
from edger1.tui.store import Store, Stored
from edger1.tui.tree import Node, Tree


def chats(*arguments: str, refused: bool = False) -> Result:
    result = CliRunner().invoke(app, ["chats", *arguments])
    assert isinstance(result.exception, EdgeR1Error) == refused, result.output
    return result


@pytest.fixture
def ids() -> list[str]:
    store = Store.open()
    for id_, title, text in (("aaaa1111", "Sky", "Why is it blue?"), ("aaaa2222", None, "What is a prime?")):
        asked = Node("user", text, f"{id_}q")
        answer = Node("assistant", "Because.", f"{id_}a", asked.id, thought="Scattering", finish="stop")
        store.insert(Stored(id_, title, Tree([asked, answer]), Settings(), "nano", None, False, 1e9, 1e9))
    store.close()
    return ["aaaa1111", "aaaa2222"]


def test_listing(ids: list[str]) -> None:
    assert "Sky  (2 messages)" in chats().output
    assert "What is a prime?" in chats("list", "-n", "1").output + chats().output
    assert {each["id"] for each in json.loads(chats("list", "--json").output)} == set(ids)


def test_nothing_yet() -> None:
    assert "edger1 chat" in chats().output
    assert chats("search", "x").exit_code == 1


def test_searching(ids: list[str]) -> None:
    assert "user: Why is it blue?" in chats("search", "why", "blu").output
    (hit,) = json.loads(chats("search", "prime", "--json").output)
    assert (hit["conversation"], hit["node"], hit["marks"]) == ("aaaa2222", "aaaa2222q", [[10, 15]])


def test_showing_and_exporting(ids: list[str], tmp_path: Path) -> None:
    assert "# Sky" in chats("show", "Sky").output
    assert "> Scattering" in chats("show", "aaaa1", "--thoughts").output
    assert json.loads(chats("export", "aaaa2").output)["id"] == "aaaa2222"
    file = tmp_path / "sky.md"
    chats("export", "Sky", str(file))
    assert "Because." in file.read_text()
    assert "--force" in str(chats("export", "Sky", str(file), refused=True).exception)
    chats("export", "Sky", str(file), "--force")
    assert "aaaa1111" in str(chats("show", "aaaa", refused=True).exception)
    assert "chats list" in str(chats("show", "bbbb", refused=True).exception)


def test_deleting_importing_and_having_back(ids: list[str], tmp_path: Path) -> None:
    file = tmp_path / "sky.json"
    chats("export", "Sky", str(file))
    chats("delete", "Sky", "nobody", refused=True)
    assert "Sky" in chats().output
    assert "delete --undo aaaa1111" in chats("delete", "Sky").output
    assert "Sky" not in chats().output
    assert "Sky is back" in chats("delete", "--undo", "aaaa1111").output
    assert "1 conversation: 1 here already" in chats("import", str(file)).output
    file.write_text("x")
    assert "sky.json" in str(chats("import", str(file), refused=True).exception)


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    paths.data().mkdir(parents=True)
    (paths.data() / "conversations.db").mkdir()
    file = tmp_path / "x.json"
    file.write_text("[]")
    assert "Nothing was changed" in str(chats("import", str(file), refused=True).exception)
