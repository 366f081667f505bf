"""`edger1 eval`, its table, JSON and plot, over model folders; and the report of a conversion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny import TINY_CONFIG, write_tokenizer
from typer.testing import CliRunner

from edger1 import measuring, worker
from edger1.cli import app
from edger1.errors import EdgeR1Error, UsageError
from edger1.quant.divergence import compare
from edger1.quant.measure import Measurement, windows
from edger1.quant.measure_report import draw, table

TEXT = "The time has come, the Walrus said, to talk of many things: of shoes, and ships. " * 2
BEGIN = 256


def write_pair(folder: Path, *, begins: bool = False) -> tuple[Path, Path]:
    """A random llama in f32, and the same in 4 bits; `begins` has the tokenizer put a special token before a text."""
    from mlx_lm.models import llama

    mx.random.seed(1)
    model = llama.Model(llama.ModelArgs.from_dict(TINY_CONFIG))
    found = []
    for name, bits in (("source", None), ("model", 4)):
        config: dict[str, Any] = dict(TINY_CONFIG)
        if bits is not None:
            nn.quantize(model, group_size=32, bits=bits)
            config["quantization"] = {"group_size": 32, "bits": bits}
        path = folder / name
        path.mkdir(parents=True)
        weights = dict(tree_flatten(model.parameters()))
        mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "mlx"})
        (path / "config.json").write_text(json.dumps(config))
        write_tokenizer(path)
        if begins:
            tokenizer = json.loads((path / "tokenizer.json").read_text())
            special = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
            tokenizer["post_processor"] = {
                "type": "TemplateProcessing",
                "single": [special, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [special, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [BEGIN], "tokens": ["<|im_start|>"]}},
            }
            (path / "tokenizer.json").write_text(json.dumps(tokenizer))
        found.append(path)
    return found[1], found[0]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folders of model and source."""
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of text."""
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def evaluate(model: Path, source: Path, **options: Any) -> Measurement:
    return worker.call(lambda: measuring.evaluate(model, source, TEXT, **options))


def by_whole_models(model: Path, source: Path, ids: list[int], length: int, leading: list[int]) -> tuple[float, ...]:
    """Perplexities and mean divergence, from whole windows in mlx-lm's own models."""
    from mlx_lm.utils import load_model

    sides = [load_model(path)[0] for path in (source, model)]
    found = []
    for window in windows(len(ids), length, led=bool(leading)):
        row = [*leading, *ids[window.start : window.start + length]]
        first = len(leading) + window.first - window.start
        p, q = (np.array(side(mx.array([row])))[0, first - 1 : -1] for side in sides)
        found.append(compare(p, q, np.array(row[first:])))
    source_loss, model_loss, divergence = (
        np.concatenate([getattr(each, name) for each in found]) for name in ("source_loss", "model_loss", "divergence")
    )
    return float(np.exp(source_loss.mean())), float(np.exp(model_loss.mean())), float(divergence.mean())


@pytest.mark.parametrize("begins", [False, True])
def test_figures_are_those_of_the_whole_models(tmp_path: Path, begins: bool) -> None:
    model, source = write_pair(tmp_path, begins=begins)
    found = evaluate(model, source, window=64, most_tokens=100)
    from mlx_lm.utils import load_tokenizer

    ids = load_tokenizer(model).encode(TEXT, add_special_tokens=False)[:100]
    expected = by_whole_models(model, source, ids, 64, [BEGIN] if begins else [])
    assert found.tokens == (100 if begins else 99)
    assert found.mean_divergence > 1e-4
    assert (found.source.perplexity, found.model.perplexity, found.mean_divergence) == pytest.approx(expected, rel=1e-3)


def test_the_table_says_what_was_found(pair: tuple[Path, Path], text: Path) -> None:
    done = CliRunner().invoke(app, ["eval", str(pair[0]), "--against", str(pair[1]), "--text", str(text)])
    assert done.exit_code == 0, done.output
    found = evaluate(*pair)
    for said in (
        "model against source",
        f"{found.source.perplexity:.4f}",
        f"{found.model.perplexity:.4f}",
        f"{found.mean_divergence:.5f}",
        f"{found.divergence_99:.5f}",
        f"{found.top1_agreement:.2%}",
        "layer 1",
        f"{found.layers[1].own:.3%}",
        f"{found.layers[1].accumulated:.3%}",
    ):
        assert said in done.output
    assert found.source.bits_per_weight == pytest.approx(32, rel=0.01)
    assert 5 < found.model.bits_per_weight < 7


def test_json_and_plot_are_written(pair: tuple[Path, Path], text: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot, out = tmp_path / "loss.png", tmp_path / "loss.json"
    command = ["eval", str(pair[0]), "--against", str(pair[1]), "--text", str(text), "--json"]
    done = CliRunner().invoke(app, [*command, "--plot", str(plot), "-o", str(out), "--window", "32"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert found == json.loads(out.read_text())
    assert found["window"] == 32
    assert found["divergence_percentiles"]["99"] > found["mean_divergence"] > 0
    assert [layer["layer"] for layer in found["layers"]] == [0, 1]
    width, height = png_size(plot)
    assert width > height > 300


def png_size(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def test_nothing_lost_can_be_drawn(pair: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    twin = tmp_path / "twin"
    shutil.copytree(pair[0], twin)
    found = evaluate(twin, pair[0])
    assert found.mean_divergence == 0
    assert any("100.00%" in line for line in table(found))
    draw(tmp_path / "nothing.png", found)
    assert png_size(tmp_path / "nothing.png")


@pytest.mark.parametrize("plot", ["loss.svg", "nowhere/loss.png"])
def test_a_plot_that_cannot_be_is_refused_before_anything_is_measured(
    pair: tuple[Path, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plot: str
) -> None:
    monkeypatch.setattr(measuring, "evaluate", lambda *_, **__: pytest.fail("was measured"))
    command = ["eval", str(pair[0]), "--against", str(pair[1]), "--text", str(text), "--plot", str(tmp_path / plot)]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, EdgeR1Error)


def test_a_model_is_not_measured_against_itself(pair: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="against itself"):
        evaluate(pair[0], pair[0])


def test_texts_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        measuring.read_text(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match="not UTF-8"):
        measuring.read_text(tmp_path / "latin.txt")


def test_an_empty_text_is_refused(pair: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="nothing in it to predict"):
        evaluate(*pair, most_tokens=1)


def test_another_tokenizer_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(pair[1], other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids["e"], ids["a"] = ids["a"], ids["e"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UsageError, match="different tokens"):
        evaluate(pair[0], other)


def test_the_report_of_a_conversion_is_a_measurement(pair: tuple[Path, Path]) -> None:
    model, source = pair
    assert measuring.report(source, model, TEXT) == evaluate(model, source)
