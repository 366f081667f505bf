"""Second moments of inputs, as a plain sum over the inputs has them, and the text that they come from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx.core")

from tiny import write_mixture

from edger1.errors import FormatError, UsageError
from edger1.layers import ModelLayers, open_layers
from edger1.quant import calibrate

TOKENS = np.random.default_rng(5).integers(0, 250, (3, 30)).astype(np.int32)
UP = "model.layers.1.mlp.switch_mlp.up_proj"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelLayers]:
    folder = tmp_path_factory.mktemp("calibrate") / "mixture"
    folder.mkdir()
    source = open_layers(write_mixture(folder))
    yield source
    source.close()


def inputs(source: ModelLayers) -> dict[tuple[str, int | None], np.ndarray]:
    """All inputs of all linears, one after another."""
    heard: dict[tuple[str, int | None], list[np.ndarray]] = {}

    def watch(path: str, expert: int | None, x: np.ndarray) -> None:
        heard.setdefault((path, expert), []).append(x.copy())

    passing = source.begin(TOKENS)
    for layer in range(source.layers):
        source.advance(layer, [passing], watch)
    source.logits(passing, watch)
    return {key: np.concatenate(each) for key, each in heard.items()}


def test_moments_are_the_mean_products_of_inputs(mixture: ModelLayers, tmp_path: Path) -> None:
    found = calibrate.calibrate(mixture, TOKENS, tmp_path)
    heard = inputs(mixture)
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "lm_head"):
        x = heard[path, None]
        assert np.allclose(found.moments(path), x.T @ x / len(x), rtol=1e-3, atol=1e-5)
        assert np.array_equal(found.importance(path, 3, 9), found.moments(path))
    assert found.tokens == TOKENS.size


def test_experts_have_their_own_and_borrow_where_they_saw_little(mixture: ModelLayers, tmp_path: Path) -> None:
    found = calibrate.calibrate(mixture, TOKENS, tmp_path)
    heard = inputs(mixture)
    experts = [heard.get((UP, e), np.zeros((0, 128), np.float32)) for e in range(64)]
    mean = sum(x.T @ x for x in experts) / sum(len(x) for x in experts)
    moments = found.moments(UP)
    for expert, x in enumerate(experts):
        expected = (x.T @ x + calibrate.BORROWED * mean) / (len(x) + calibrate.BORROWED)
        assert np.allclose(moments[expert], expected, rtol=1e-3, atol=1e-5)
    share = found.share(UP)
    assert share is not None
    assert share.sum() == pytest.approx(2)
    # What gate sees is what up sees; down sees something else.
    assert np.array_equal(found.moments(UP.replace("up_", "gate_")), moments)
    assert found.importance(UP, 4, 6).shape == (2, 128, 128)


def test_an_expert_that_sees_what_a_plain_linear_sees_has_its_own_sums() -> None:
    x = np.random.default_rng(2).standard_normal((40, 8)).astype(np.float32)
    layer = calibrate._Layer({"shared": (16, 8), "experts": (2, 16, 8)}, 1 << 20)
    layer.watch("shared", None, x)
    layer.watch("experts", 0, x)
    layer.watch("experts", 1, x[:5])
    found = {path: (moments, share) for path, moments, share in layer.ended(40)}
    moments, share = found["experts"]
    assert moments.shape == (2, 8, 8)
    assert share is not None
    assert share.tolist() == [1, 5 / 40]


def test_without_room_for_matrices_there_are_diagonals(mixture: ModelLayers, tmp_path: Path) -> None:
    whole = calibrate.calibrate(mixture, TOKENS, tmp_path / "whole")
    narrow = calibrate.calibrate(mixture, TOKENS, tmp_path / "narrow", matrix_bytes=100_000)
    path = "model.layers.0.self_attn.q_proj"
    kinds = {np.ndim(narrow.moments(p)) for p in (path, UP)}
    assert 2 in kinds
    for each in (path, UP):
        matrix, other = whole.moments(each), narrow.moments(each)
        diagonal = np.diagonal(matrix, axis1=-2, axis2=-1) if other.ndim < matrix.ndim else matrix
        assert np.allclose(other, diagonal, rtol=1e-3, atol=1e-6)


def test_what_was_written_is_read_again(mixture: ModelLayers, tmp_path: Path) -> None:
    made = calibrate.calibrate(mixture, TOKENS, tmp_path)
    read = calibrate.load(tmp_path)
    assert read.digest == made.digest
    assert np.array_equal(read.moments(UP), made.moments(UP))
    assert read.moments("nobody") is None


@pytest.mark.parametrize("damage", ["", "[]", '{"layout": 99}', '{"layout": 1, "files": {"a": "../b.npy"}}'])
def test_a_damaged_calibration_is_refused(tmp_path: Path, damage: str) -> None:
    (tmp_path / calibrate.INDEX).write_text(damage)
    with pytest.raises(FormatError, match="calibrate again"):
        calibrate.load(tmp_path)


def test_the_text_that_comes_along_is_there(tiny_folder: Path) -> None:
    source = open_layers(tiny_folder)
    tokens = calibrate.windows(source, calibrate.documents(None))
    assert tokens.shape[1] == calibrate.WINDOW
    assert tokens.size > 20_000


def test_data_sets_are_chats_or_texts(tiny_folder: Path, tmp_path: Path) -> None:
    source = open_layers(tiny_folder)
    rows = [{"text": "plain words"}, {"messages": [{"role": "user", "content": "a question"}]}]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = calibrate.documents(file)
    ids = calibrate.windows(source, found, length=12)
    assert source.decode(ids[0]).startswith("plain words")
    assert "<|im_start|>user" in source.decode(ids.reshape(-1).tolist())


@pytest.mark.parametrize("line", ["{", "[1]", '{"messages": 5}', '{"messages": [{"role": "user"}]}', "7"])
def test_a_row_that_is_no_document_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(FormatError, match="line 2 is no document"):
        calibrate.documents(file)


def test_texts_that_cannot_be_read_or_are_empty(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        calibrate.documents(tmp_path / "absent.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match="not UTF-8"):
        calibrate.documents(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UsageError, match="no text"):
        calibrate.documents(tmp_path / "empty.txt")
