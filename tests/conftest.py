"""What several test modules need: a tiny random model in a folder of its own, and SmolLM2-135M if it is installed."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from tiny import write_tiny_model

# These machines are shared; how long one example takes says nothing. The same examples in every run, so that a change
# fails for what it changed: other ones are looked for with --hypothesis-profile=explore.
settings.register_profile("explore", deadline=None)
settings.register_profile("edger1", deadline=None, derandomize=True)
settings.load_profile("edger1")


def _share_parsed_styles() -> None:
    """Let the apps of a test run share parsed style sheets, as the screens of one app do; each would parse the same."""
    sheets = sys.modules.get("textual.css.stylesheet")
    if sheets is None:
        return
    parse = sheets.Stylesheet._parse_rules
    parsed: dict[Any, Any] = {}

    def parse_once(self: Any, *given: Any, **named: Any) -> Any:
        key = (given, *named.items(), *self._variables.items())
        if key not in parsed:
            parsed[key] = parse(self, *given, **named)
        return parsed[key]

    sheets.Stylesheet._parse_rules = parse_once


def pytest_configure() -> None:
    """Hear Ctrl-C: what a script's shell starts in the background ignores it, and so would all that tests start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Keep what is there before the first test, modules and tests, out of garbage collections: they took 0.4 s each."""
    _share_parsed_styles()
    gc.collect()
    gc.freeze()
    # Python's own threshold is 700 objects, which a screen of the chat makes by itself.
    gc.set_threshold(10_000)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny random model."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def real_home() -> Path:
    """The data folder that make test has pulled SmolLM2-135M into."""
    from edger1 import paths

    return paths.home()


@pytest.fixture(scope="session")
def smollm2(real_home: Path) -> Path:
    """Folder of SmolLM2-135M; `make test` fetches it."""
    folder = real_home / "v1" / "models" / "smollm2-135m"
    if not (folder / "config.json").is_file():
        pytest.skip("SmolLM2-135M is not installed; fetch it with: edger1 pull smollm2-135m")
    return folder


@pytest.fixture(autouse=True)
def own_home(real_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give each test a data folder of its own, so that none sees or changes the user's."""
    monkeypatch.setenv("EDGER1_HOME", str(tmp_path / "edger1-home"))
    for name in ("HF_HUB_OFFLINE", "EDGER1_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    yield
    os.environ.pop("EDGER1_DEBUG", None)


@pytest.fixture(autouse=True)
def layers_end_with_their_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close what a test has opened of a model's layers: as long as they are open, MLX's functions are other ones."""
    layers = sys.modules.get("edger1.layers")
    if layers is None:
        yield
        return
    opened: list[Any] = []
    begin = layers.ModelLayers.__init__

    def noted(self: Any, *given: Any, **named: Any) -> None:
        begin(self, *given, **named)
        opened.append(self)

    monkeypatch.setattr(layers.ModelLayers, "__init__", noted)
    yield
    for one in reversed(opened):
        one.close()
