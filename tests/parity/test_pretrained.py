"""What pretraining exports, in transformers: the same logits."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny_corpus import DENSE, MOE, write_tokenizer

from edger1.train.pretrain import export, model

WEIGHTS = Path(__file__).parents[2] / "recipes" / "nano" / "weights"
TEXT = "Sort from small to large: 23, 6, 12.\n6, 12, 23\nAnna has 31 apples and gives 4 to Ben. 31 - 4 = 27"

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("config", [MOE, {**MOE, "n_group": 4, "topk_group": 2, "q_lora_rank": None}, DENSE])
def test_transformers_gives_the_same_logits(tmp_path: Path, config: dict[str, Any]) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    made = model.build(config, 260, std=0.2, seed=1)
    for layer in made.layers:
        if "gate" in layer.mlp:
            layer.mlp.gate.e_score_correction_bias = mx.random.normal((8,), scale=0.1, key=mx.random.key(2))
    export.export(tmp_path / "model", made, model.complete(config, {"vocab_size": 260}), tmp_path / "tokenizer")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, 260, (2, 30))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    kept = model.parameters(made)
    rounded = {n: w if "_bias" in n else w.astype(mx.bfloat16).astype(mx.float32) for n, w in kept.items()}
    model.assign(made, rounded)
    found = np.array(made(mx.array(tokens)))
    assert np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()) < 1e-4


def logits(folder: Path, tokens: list[int], **options: Any) -> np.ndarray:
    """What transformers computes in f32."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    with torch.no_grad():
        found: np.ndarray = theirs(torch.tensor([tokens])).logits.numpy()
    return found


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()))


@pytest.mark.parametrize("name", ["nano-moe", "nano-dense"])
def test_the_recipes_models_give_the_same_logits(name: str) -> None:
    folder = WEIGHTS / name
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXT).input_ids
    ours, _ = export.load(folder)
    assert difference(np.array(ours(mx.array([tokens]))), logits(folder, tokens)) < 1e-4


def test_the_dense_one_says_the_same_as_gguf(tmp_path: Path) -> None:
    from recipes.nano import gguf_f16

    folder = WEIGHTS / "nano-dense"
    gguf_f16.write(folder, tmp_path / "nano-dense.gguf")
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXT).input_ids
    found = logits(tmp_path, tokens, gguf_file="nano-dense.gguf")
    assert difference(found, logits(folder, tokens)) < 1e-4
