"""Bits by sensitivity: choosing within a budget, and what a linear's rounding costs in its place."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx.core")

from edger1.errors import UsageError
from edger1.layers import open_layers
from edger1.quant.fit import PROBE, Mix, Option, choose, options, rounded, sensitivities


def ways(sensitivity: float, weights: int) -> list[Option]:
    return [Option(bits, 64, weights * bits // 8, sensitivity * 4.0**-bits) for bits in (2, 3, 4, 6, 8)]


def test_the_mix_is_the_best_there_is_but_for_rounding() -> None:
    table = {"a": ways(1.0, 800), "b": ways(30.0, 800), "c": ways(4.0, 3200), "d": ways(0.1, 1600)}
    for budget in (1700, 2400, 3200, 4800):
        mix = choose(table, budget)
        assert mix.nbytes <= budget
        every = (Mix(dict(zip(table, each, strict=True))) for each in product(*table.values()))
        best = min(other.loss for other in every if other.nbytes <= budget)
        assert mix.loss <= 1.3 * best


def test_what_costs_more_gets_more_bits() -> None:
    mix = choose({"calm": ways(0.01, 800), "touchy": ways(50.0, 800)}, 800)
    assert mix.options["touchy"].bits > mix.options["calm"].bits
    assert mix.recipe("mine")["rules"][1] == {"patterns": ["touchy"], "bits": 6, "group_size": 64, "mode": "affine"}


def test_memory_for_everything_takes_the_least_loss() -> None:
    assert {option.bits for option in choose({"a": ways(1, 800), "b": ways(2, 80)}, 10**9).options.values()} == {8}


def test_a_budget_below_the_fewest_bits_is_refused() -> None:
    with pytest.raises(UsageError, match="At the fewest bits the weights take"):
        choose({"a": ways(1.0, 8_000_000)}, 1_000_000)


def test_a_branch_costs_what_the_model_with_that_linear_rounded_loses(tiny_folder: Path) -> None:
    source = open_layers(tiny_folder)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 24))
    path = "model.layers.0.mlp.down_proj"
    found = sensitivities(source, tokens, [path, "model.embed_tokens", "lm_head"])
    assert set(found) == {path, "model.embed_tokens", "lm_head"}

    def predictions(changed: str) -> np.ndarray:
        def change(at: str, expert: int | None, start: int, rows: np.ndarray) -> np.ndarray | None:
            return rounded(rows, PROBE) if at == changed else None

        passing = source.begin(tokens, change)
        for layer in range(source.layers):
            source.advance(layer, [passing], change=change)
        logits = source.logits(passing, change=change)
        logits -= logits.max(-1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    expected = predictions("")
    for changed, loss in found.items():
        divergence = float((np.exp(expected) * (expected - predictions(changed))).sum(-1).mean())
        assert loss > 0
        assert loss == pytest.approx(divergence, rel=1e-3, abs=1e-7)


def test_more_bits_and_smaller_groups_are_predicted_to_lose_less(tiny_folder: Path) -> None:
    source = open_layers(tiny_folder)
    path = "model.layers.1.self_attn.q_proj"
    shape = source.linears(1)[path]
    found = {(o.bits, o.group_size): o for o in options(source, path, shape, 0.5, None)}
    for size in (32, 64):
        # The model has 4 bits already, which lose nothing.
        losses = [found[bits, size].loss for bits in (2, 3, 5, 6, 8)]
        assert losses == sorted(losses, reverse=True)
    assert found[3, 32].loss < found[3, 64].loss
    assert found[4, 64].nbytes == shape[0] * shape[1] // 2 + shape[0] * shape[1] // 64 * 4
