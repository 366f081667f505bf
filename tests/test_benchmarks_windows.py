"""The simulation of windows: what it counts is what is expected, and its drawings say that they are simulated."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mlx.core")

from benchmarks import windows
from edger1.experts.window_width import token_seconds


def test_reading_back_everywhere_is_one_read_back_a_layer() -> None:
    run = windows.synthetic(0.8, 1, 2e-3, 8)
    assert (run.tokens, run.read_backs / run.tokens, run.layers / run.tokens) == (6, 48, 48)
    assert run.seconds(1e-3) == pytest.approx(48 * 1.44e-3)


def test_a_simulated_token_takes_what_is_expected() -> None:
    one, windowed = (windows.synthetic(0.8, width, 2e-3, 48) for width in (1, 5))
    windows._same_answers([one, windowed])
    assert windowed.full_hit == one.full_hit == pytest.approx(0.8, abs=0.04)
    expected = token_seconds(5, [one.full_hit] * windows.LAYERS, 2e-3, windows.COMPUTE_S)
    assert windowed.seconds(2e-3) == pytest.approx(expected, rel=0.05)


def test_the_drawings_say_that_nothing_was_measured(tmp_path: Path) -> None:
    rows = [windows._row(hit, width, windows.Run(1, 48, 48, hit, [1])) for hit in (0.3, 0.8) for width in (1, 2, None)]
    windows.draw({"rows": rows}, tmp_path)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert set(drawn) == {"windows-sync.svg", "windows-width.svg"}
    assert all("not measured on hardware" in svg for svg in drawn.values())
