"""A model run layer by layer predicts what the whole model predicts, and its linears' inputs are heard of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from tiny import write_mixture  # noqa: E402

from edger1.layers import open_layers  # noqa: E402

TOKENS = np.random.default_rng(3).integers(0, 250, (3, 20))


def through(source, tokens=TOKENS, watch=None):  # type: ignore[no-untyped-def]
    passes = [source.begin(tokens[:2]), source.begin(tokens[2:])]
    for layer in range(source.layers):
        source.advance(layer, passes, watch)
    return np.concatenate([source.logits(each, watch) for each in passes])


def whole(source, tokens=TOKENS):  # type: ignore[no-untyped-def]
    return np.array(source.model(mx.array(tokens)).astype(mx.float32))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layers") / "mixture"
    folder.mkdir()
    return write_mixture(folder)


def test_a_llama_layer_by_layer_is_the_llama(tiny_folder: Path) -> None:
    source = open_layers(tiny_folder)
    assert np.abs(through(source) - whole(source)).max() < 1e-4


def test_a_mixture_layer_by_layer_is_the_mixture(mixture: Path) -> None:
    source = open_layers(mixture)
    assert np.abs(through(source) - whole(source)).max() < 1e-4


def test_latent_attention_and_its_stacks_of_heads() -> None:
    source = open_layers(Path(__file__).parent.parent / "recipes" / "nano" / "weights" / "nano-moe")
    assert source.layers == 6
    assert np.abs(through(source) - whole(source)).max() < 1e-3


def test_matrices_are_computed_in_windows_of_rows(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_layers(tiny_folder)
    at_once = through(source)
    monkeypatch.setattr("edger1.layers.WINDOW_BYTES", 10_000)
    assert np.abs(through(source) - at_once).max() < 1e-4


def test_every_linear_is_heard_of_once_for_each_row(mixture: Path) -> None:
    source = open_layers(mixture)
    heard: dict[tuple[str, int | None], list[np.ndarray]] = {}
    through(source, watch=lambda path, expert, x: heard.setdefault((path, expert), []).append(x.copy()))
    query = np.concatenate(heard["model.layers.0.self_attn.q_proj", None])
    assert query.shape == (TOKENS.size, 128)
    assert np.array_equal(query, np.concatenate(heard["model.layers.0.self_attn.k_proj", None]))
    for layer in range(2):
        up = [x for (path, _), x in heard.items() if path == f"model.layers.{layer}.mlp.switch_mlp.up_proj"]
        # Each expert is asked once for the rows of all passes together, two experts for each token.
        assert all(len(each) == 1 for each in up)
        assert sum(len(each[0]) for each in up) == 2 * TOKENS.size
    known = {p for layer in (0, 1, None) for p in source.linears(layer)}
    assert {path for path, _ in heard} <= known
    assert ("lm_head", None) in heard


def test_a_change_is_computed_with(tiny_folder: Path) -> None:
    source = open_layers(tiny_folder)
    passing, changed = source.begin(TOKENS), source.begin(TOKENS)

    def silent(path: str, expert: int | None, start: int, rows: np.ndarray) -> np.ndarray | None:
        return np.zeros_like(rows) if path.endswith(("o_proj", "down_proj")) else None

    before = passing.hidden
    source.advance(0, [passing])
    source.advance(0, [changed], change=silent)
    # With nothing added to it the hidden state passes a layer unchanged.
    assert np.array_equal(changed.hidden, before)
    assert not np.array_equal(passing.hidden, before)


def test_a_layer_can_be_given_another_ones_hidden_state(tiny_folder: Path) -> None:
    source = open_layers(tiny_folder)
    one, other = source.begin(TOKENS), source.begin(TOKENS[:, ::-1].copy())
    other.hidden = one.hidden
    source.advance(0, [one, other])
    assert np.array_equal(one.hidden, other.hidden)
