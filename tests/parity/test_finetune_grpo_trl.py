"""GRPO's losses on fixed rollouts against TRL's GRPOTrainer: same model, tokens, advantages and earlier policies."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import write_tokenizer

from edger1.train.finetune.grpo import Judged, Shares, group_advantages, make_batches, surrogate
from edger1.train.finetune.grpo_settings import GrpoSettings
from edger1.train.finetune.policy import LocalPolicy, open_policy
from edger1.train.finetune.rollouts import Prompt, Rollout

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

LARGEST_DIFFERENCE = 1e-5
TEMPERATURE = 0.7
MAX_TOKENS = 16
VOCABULARY = 260
PROMPT = (65, 66, 67)
# TRL has GSPO as a level at which grpo's ratio is taken.
THEIRS = {
    "grpo": ("grpo", "token"),
    "dr_grpo": ("dr_grpo", "token"),
    "dapo": ("dapo", "token"),
    "gspo": ("grpo", "sequence"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of two layers with random weights."""
    path: Path = tmp_path_factory.mktemp("grpo") / "model"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        eos_token_id=257,
        initializer_range=0.2,
    )
    transformers.LlamaForCausalLM(config).float().save_pretrained(path)
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def policy(folder: Path) -> Iterator[LocalPolicy]:
    opened = open_policy(str(folder))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def trainer(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        per_device_train_batch_size=6,
        num_generations=6,
        max_completion_length=MAX_TOKENS,
        temperature=TEMPERATURE,
        beta=0.0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to=[],
    )
    made = trl.GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": "ABC"}]),
        processing_class=tokenizer,
    )
    made.model.train()
    made.current_gradient_accumulation_steps = 1
    return made


def rollouts(policy: LocalPolicy, spread: float) -> list[Judged]:
    """Six completions of 3 to 14 tokens whose earlier log-probabilities lie `spread` around those of the model."""
    random = np.random.default_rng(3)
    sizes = random.integers(3, 15, 6)
    advantages, _ = group_advantages(random.random(6), 6, "group")
    prompt = Prompt("row", "ABC", PROMPT, "ABC")
    made = []
    for i, size in enumerate(sizes):
        ids = tuple(int(t) for t in random.integers(0, 256, size))
        nothing = Rollout(PROMPT, ids, np.zeros(size, dtype=np.float32), "", True)
        made.append(Judged(prompt, 0, i, nothing, {}, 0.0, float(advantages[i])))
    found = []
    for each in made:
        (batch,) = make_batches([each], Shares(1, 1), GrpoSettings(max_tokens=MAX_TOKENS))
        now = np.array(policy.logprobs(batch, temperature=TEMPERATURE))[0, len(PROMPT) :]
        old = (now + random.normal(0, spread, len(now))).astype(np.float32)
        found.append(
            Judged(prompt, 0, each.row, Rollout(PROMPT, each.rollout.ids, old, "", True), {}, 0.0, each.advantage)
        )
    return found


def reference(old: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """What a reference might have given these tokens."""
    return (old - 0.2 + 0.1 * (ids % 5)).astype(np.float32)


def theirs(trainer: Any, judged: list[Judged], settings: GrpoSettings) -> float:
    trainer.loss_type, trainer.importance_sampling_level = THEIRS[settings.loss]
    trainer.args.use_bias_correction_kl = settings.unbiased_kl
    trainer.beta, trainer.epsilon_low, trainer.epsilon_high = settings.beta, settings.clip_low, settings.clip_high
    shape = len(judged), max(len(each.rollout.ids) for each in judged)
    ids, mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    old, at_first = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
    for i, each in enumerate(judged):
        size = len(each.rollout.ids)
        ids[i, :size], mask[i, :size], old[i, :size] = each.rollout.ids, 1, each.rollout.logprobs
        at_first[i, :size] = reference(each.rollout.logprobs, np.array(each.rollout.ids))
    prompts = np.array([PROMPT] * len(judged))
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": np.ones_like(prompts),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": np.array([each.advantage for each in judged], dtype=np.float32),
        "old_per_token_logps": old,
        "ref_per_token_logps": at_first,
        "num_items_in_batch": mask.sum(),
    }
    loss = trainer._compute_loss(trainer.model, {name: torch.as_tensor(value) for name, value in inputs.items()})
    return float(loss.item())


@pytest.mark.parametrize(("beta", "unbiased"), [(0.0, True), (0.04, True), (0.04, False)])
@pytest.mark.parametrize("loss", list(THEIRS))
def test_the_loss_is_trls(policy: LocalPolicy, trainer: Any, loss: str, beta: float, unbiased: bool) -> None:
    settings = GrpoSettings(loss=loss, beta=beta, unbiased_kl=unbiased, max_tokens=MAX_TOKENS, temperature=TEMPERATURE)
    judged = rollouts(policy, 5e-3 if loss == "gspo" else 0.3)
    tokens = sum(len(each.rollout.ids) for each in judged)
    (batch,) = make_batches(judged, Shares(len(judged), tokens), settings)
    batch.extra["reference"] = np.where(batch.weights != 0, reference(batch.extra["old"], batch.ids), 0)
    ours, figures = surrogate(policy.logprobs(batch, temperature=TEMPERATURE), batch, settings)
    assert float(figures["clipped_low"].item()) + float(figures["clipped_high"].item()) > 0
    assert abs(float(ours.item()) - theirs(trainer, judged, settings)) <= LARGEST_DIFFERENCE


@pytest.mark.parametrize("scale", ["group", "none"])
def test_advantages_are_trls(scale: str) -> None:
    """TRL's own lines for a group's advantages, which stand within a method that generates as well."""
    from trl.trainer.utils import nanstd

    rewards = torch.tensor(np.random.default_rng(0).random(12), dtype=torch.float32)
    grouped = rewards.view(-1, 4)
    expected = grouped - torch.nanmean(grouped, dim=1, keepdim=True)
    if scale == "group":
        expected = expected / (nanstd(grouped, dim=1, keepdim=True) + 1e-4)
    found, _ = group_advantages(rewards.numpy(), 4, scale)
    assert np.abs(found - expected.reshape(-1).numpy()).max() <= LARGEST_DIFFERENCE


def test_what_is_lost_for_length_is_trls() -> None:
    from trl.rewards import get_soft_overlong_punishment

    from edger1.train.finetune.grpo import overlong

    lengths = [10, 79, 80, 81, 95, 100]
    expected = get_soft_overlong_punishment(100, 20)(completion_ids=[[1] * n for n in lengths])
    assert np.allclose([overlong(n, 100, 0.2) for n in lengths], expected)
