"""DeepSeek-V3 against transformers: a tiny random model as it saves it, loaded as a user would, to the same logits.

Every part that the architecture has is in it: queries of low rank and not, YaRN with its two magnitudes, dense layers
first, shared experts, groups of experts, and corrections of both signs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import write_tokenizer

from edger1 import kernels, loader

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
"""Relative RMS of the logits of a pass."""
PASSES = (50, *range(1, 17))
TOKENS = np.random.default_rng(0).integers(0, 256, sum(PASSES))
CONFIG: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 64,
    "num_hidden_layers": 4, "first_k_dense_replace": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
    "q_lora_rank": 48, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 24,
    "n_routed_experts": 16, "n_shared_experts": 2, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2,
    "routed_scaling_factor": 2.5, "norm_topk_prob": True, "max_position_embeddings": 512, "initializer_range": 0.09,
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0.7,
        "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 64,
    },
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 257, "pad_token_id": 0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "as-published": {},
    "queries-of-full-rank": {"q_lora_rank": None},
    "r1s-magnitudes": {"rope_parameters": CONFIG["rope_parameters"] | {"mscale_all_dim": 1.0, "factor": 40.0}},
    "no-yarn-no-groups": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "n_group": 1, "topk_group": 1,
    },
}  # fmt: skip


@pytest.fixture(params=KINDS)
def published(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, np.ndarray]:
    """A folder as transformers saves it, and its own logits of all tokens."""
    # With 0 two experts of a token are within 1e-7 of each other, which rounding decides.
    torch.manual_seed(1)
    config = transformers.DeepseekV3Config(**CONFIG | KINDS[request.param])
    model = transformers.DeepseekV3ForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value.normal_(1, 0.1)
            elif name.endswith("mlp.gate.weight"):
                value.normal_(0, 0.09)
        for name, value in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                value.normal_(0, 0.3)
        expected = model(torch.tensor(TOKENS[None])).logits[0].numpy()
    folder = tmp_path / request.param
    model.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    assert saved["model_type"] == "deepseek_v3"
    write_tokenizer(folder)
    return folder, expected


@pytest.fixture(params=["kernels", "plain"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With the kernels, or as where there are none."""
    if request.param == "plain":
        monkeypatch.setenv("EDGER1_KERNELS", "0")
    elif not kernels.state().available:
        pytest.skip(f"CPU kernels: {kernels.state().reason}")
    kernels._load.cache_clear()
    yield request.param
    monkeypatch.undo()
    kernels._load.cache_clear()


def live_model(folder: Path) -> loader.LiveModel:
    steps = loader.load(folder.name, folder, ceiling_bytes=4 << 30, context=512, precision="exact")
    while True:
        try:
            next(steps)
        except StopIteration as done:
            loaded: loader.LiveModel = done.value
            return loaded


def test_logits_of_a_prefill_and_of_one_to_sixteen_tokens_after_it(
    published: tuple[Path, np.ndarray], device: str
) -> None:
    folder, expected = published
    live = live_model(folder)
    try:
        assert live.installed.active == (device == "kernels")
        caches = make_prompt_cache(live.model)
        first, errors = 0, {}
        for count in PASSES:
            found = live.model(mx.array(TOKENS[None, first : first + count]), cache=caches)[0]
            mx.eval(found, [c.state for c in caches])
            wanted = expected[first : first + count]
            errors[count] = float(np.sqrt(np.mean((np.array(found) - wanted) ** 2) / np.mean(wanted**2)))
            first += count
    finally:
        live.close()
    print(f"{folder.name}, {device}: largest relative RMS {max(errors.values()):.2g}")
    assert max(errors.values()) <= TOLERANCE, errors
