"""Adapters between EdgeR1 and PEFT: trained on one side, the same logits on the other."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import write_tokenizer

from edger1.train.adapters import peft as ours
from edger1.train.adapters.wiring import AdapterSpec
from edger1.train.finetune.method import Batch
from edger1.train.finetune.policy import LocalPolicy, open_policy

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

LARGEST_DIFFERENCE = 1e-3
SHAPES = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
    # SmolLM2-135M's, but for the vocabulary.
    "smollm2": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}
KINDS = {
    "lora": AdapterSpec(rank=4, scale=2.0),
    "rslora": AdapterSpec(rank=4, scale=2.0, rslora=True),
    "dora": AdapterSpec(kind="dora", rank=4, scale=2.0),
    "some modules of the last layer": AdapterSpec(rank=4, scale=1.5, targets=("q_proj", "mlp"), layers=1),
}
CASES = [("tiny", kind) for kind in KINDS] + [("smollm2", kind) for kind in ("lora", "rslora", "dora")]
VOCABULARY = 260
TOKENS = np.random.default_rng(0).integers(0, 256, (2, 24)).astype(np.int32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Llamas with random weights, which transformers and mlx-lm read from the same folder."""
    found = {}
    for name, shape in SHAPES.items():
        found[name] = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            eos_token_id=257,
            rope_theta=1e5,
            **shape,
        )
        transformers.LlamaForCausalLM(config).save_pretrained(found[name])
        write_tokenizer(found[name])
    return found


@contextmanager
def opened(*arguments: Any, **options: Any) -> Iterator[LocalPolicy]:
    policy = open_policy(*arguments, **options)
    try:
        yield policy
    finally:
        policy.close()


def logits_here(policy: LocalPolicy) -> np.ndarray:
    return np.array(policy.model(mx.array(TOKENS)))


def logits_there(model: Any) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    return found


def base(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def train_here(policy: LocalPolicy, steps: int = 3) -> None:
    """Take steps down the gradient of the tokens' log-probability, each weight by the same amount."""
    weights = np.ones(TOKENS.shape, dtype=np.float32)
    weights[:, 0] = 0
    batch = Batch(TOKENS, np.zeros_like(TOKENS), weights)
    for _ in range(steps):
        _, _, gradients = policy.value_and_grad(lambda: (-policy.logprobs(batch).sum(), {}))
        policy.assign({name: w - 0.02 * mx.sign(gradients[name]) for name, w in policy.parameters().items()})


def train_there(model: Any, steps: int = 3) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    ids = torch.tensor(TOKENS, dtype=torch.long)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_peft_gives_the_logits_of_an_adapter_trained_here(
    folders: dict[str, Path], tmp_path: Path, shape: str, kind: str
) -> None:
    with opened(folders[shape], KINDS[kind]) as policy:
        before = logits_here(policy)
        train_here(policy)
        expected = logits_here(policy)
        assert policy.adapted is not None
        ours.save(tmp_path / "adapter", policy.adapted, "llama", str(folders[shape]))
    assert np.abs(expected - before).max() > 100 * LARGEST_DIFFERENCE
    theirs = peft.PeftModel.from_pretrained(base(folders[shape]), tmp_path / "adapter").eval()
    assert np.abs(logits_there(theirs) - expected).max() < LARGEST_DIFFERENCE
    merged = theirs.merge_and_unload()
    assert np.abs(logits_there(merged) - expected).max() < LARGEST_DIFFERENCE


@pytest.mark.parametrize(("shape", "kind"), CASES)
def test_an_adapter_that_peft_trained_gives_the_same_logits_here(
    folders: dict[str, Path], tmp_path: Path, shape: str, kind: str
) -> None:
    spec, plain = KINDS[kind], base(folders[shape])
    some = spec.layers > 0
    targets = ["q_proj", "gate_proj", "up_proj", "down_proj"] if some else "all-linear"
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=spec.rank,
        lora_alpha=spec.scale * spec.rank,
        use_rslora=spec.rslora,
        use_dora=spec.kind == "dora",
        target_modules=targets,
        layers_to_transform=[SHAPES[shape]["num_hidden_layers"] - 1] if some else None,
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(plain, config)
    before = logits_there(theirs)
    train_there(theirs)
    expected = logits_there(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    assert np.abs(expected - before).max() > 100 * LARGEST_DIFFERENCE
    with opened(folders[shape], adapter=tmp_path / "adapter") as policy:
        assert np.abs(logits_here(policy) - expected).max() < LARGEST_DIFFERENCE
