"""Models built from configs: what does not hang together is refused, and MTP is what the paper says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_corpus import DENSE, MOE, write_tokenizer

from edger1.errors import UsageError
from edger1.train.ops import Ops
from edger1.train.pretrain import export, forward, losses, model


def batch(rows: int = 2, length: int = 24, seed: int = 0) -> losses.Batch:
    generator = np.random.default_rng(seed)
    starts = np.zeros((rows, length), np.int64)
    starts[0, 10:] = 10
    return losses.batch_of(generator.integers(0, 60, (rows, length)), starts, np.ones((rows, length), bool))


@pytest.mark.parametrize(
    ("base", "change", "said"),
    [
        (MOE, {"model_type": "gpt"}, "model_type is 'gpt'"),
        (MOE, {"kv_lora_rank": None}, "no kv_lora_rank"),
        (MOE, {"hidden_size": 0}, "hidden_size is 0"),
        (MOE, {"num_experts_per_tok": 9}, "there are 8 routed experts"),
        (MOE, {"n_group": 3}, "does not divide the 8"),
        (MOE, {"n_group": 4, "topk_group": 5}, "there are 4 groups"),
        (MOE, {"n_group": 8}, "A group has 1 expert"),
        (MOE, {"n_group": 4, "num_experts_per_tok": 3}, "1 of 4 groups hold 2"),
        (MOE, {"qk_rope_head_dim": 7}, "even number"),
        (MOE, {"kv_lora_rank": 64}, "compresses nothing"),
        (MOE, {"q_lora_rank": 33}, "compresses nothing"),
        (MOE, {"num_key_value_heads": 1}, "num_key_value_heads is 1"),
        (MOE, {"first_k_dense_replace": 2}, "no layer has experts"),
        (MOE, {"num_nextn_predict_layers": 2}, "one MTP layer"),
        (MOE, {"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        (DENSE, {"num_key_value_heads": 3}, "must divide"),
        (DENSE, {"num_attention_heads": 5, "num_key_value_heads": 5}, "no multiple"),
        (DENSE, {"attention_bias": True}, "attention_bias"),
        (DENSE, {"vocab_size": 100}, "the tokenizer has 260 tokens"),
    ],
)
def test_a_config_that_does_not_hang_together(base: dict[str, Any], change: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as error:
        model.build({**base, **change}, 260)
    assert said in str(error.value)


def test_a_missing_size_is_named() -> None:
    config = {name: value for name, value in MOE.items() if name != "v_head_dim"}
    with pytest.raises(UsageError, match="no v_head_dim, which deepseek_v3 needs"):
        model.build(config, 260)


@pytest.mark.parametrize("config", [MOE, {**MOE, "n_group": 4, "topk_group": 2}, {**MOE, "q_lora_rank": None}, DENSE])
def test_the_differentiated_pass_is_the_models_own_within_a_document(config: dict[str, Any]) -> None:
    made = model.build(config, 64, std=0.3, seed=3)
    tokens = mx.array(np.random.default_rng(1).integers(0, 64, (1, 40)).astype(np.int32))
    starts = np.zeros((1, 40), np.int32)
    starts[0, 15:] = 15
    passed = forward.run(made, tokens, mx.array(starts), Ops(False))
    logits = passed.hidden @ forward.head_weight(made).T
    expected = mx.concatenate([made(tokens[:, :15]), made(tokens[:, 15:])], axis=1)
    assert np.abs(np.array(logits - expected)).max() < 2e-4 * np.abs(np.array(expected)).max()


def test_the_mtp_loss_is_the_papers() -> None:
    """Against NumPy and the layers' own forward: h' = M [norm(Emb(t + 1)); norm(h)], a block, the shared head."""
    made = model.build(MOE, 64, std=0.3, seed=5)
    rows = batch(rows=2)
    found = losses.compute(made, rows, Ops(False))
    total = count = 0.0
    for b, begin, end in ((0, 0, 10), (0, 10, 24), (1, 0, 24)):
        tokens = rows.tokens[b : b + 1, begin:end]
        hidden = made.model(tokens)[:, :-1]
        logits = np.array(made.mtp_logits(0, hidden, tokens[:, 1:], mask=causal(end - begin - 1)), dtype=np.float64)[0]
        targets = np.array(tokens)[0, 2:]
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= logs[np.arange(len(targets)), targets].sum()
        count += len(targets)
    assert found.ahead.item() == pytest.approx(total / count, rel=1e-4)
    layer = made.mtp[0]
    h, e = (np.random.default_rng(i).normal(size=(1, 3, 32)) for i in (1, 2))

    def norm(x: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)

    expected = np.concatenate([norm(e), norm(h)], -1) @ np.array(layer.eh_proj.weight, dtype=np.float64).T
    joined = layer.join(*(mx.array(x.astype(np.float32)) for x in (h, e)))
    assert np.abs(np.array(joined) - expected).max() < 1e-5


def causal(length: int) -> mx.array:
    at = mx.arange(length)
    return at[None, :] <= at[:, None]


def test_loads_count_every_choice_and_biases_move_against_the_surplus() -> None:
    made = model.build(MOE, 64, std=0.3)
    found = losses.compute(made, batch(rows=3), Ops(False))
    loads = np.array(found.loads)
    assert loads.shape == (2, 8)
    assert np.all(loads.sum(axis=1) == 3 * 24 * 2)
    losses.move_biases(made, found.loads, 0.01)
    for load, gate in zip(loads, forward.routers(made).values(), strict=True):
        expected = -0.01 * np.sign(load - load.mean())
        assert np.allclose(np.array(gate.e_score_correction_bias), expected)


def test_the_bias_spreads_a_lopsided_router() -> None:
    made = model.build(MOE, 64, std=0.3)
    gate = made.model.layers[1].mlp.gate
    # Every token's favourites are the first two experts.
    gate.e_score_correction_bias = mx.array([0.4, 0.4] + [0.0] * 6)
    rows = batch(rows=8)

    def largest() -> float:
        loads = losses.compute(made, rows, Ops(False)).loads[0]
        return float((loads.max() / loads.mean()).item())

    before = largest()
    for _ in range(60):
        losses.move_biases(made, losses.compute(made, rows, Ops(False)).loads, 0.01)
    assert before > 2
    assert largest() < 1.7


@pytest.mark.parametrize("config", [MOE, DENSE])
def test_an_exported_model_loads_in_mlx_lm_with_the_same_logits(tmp_path: Path, config: dict[str, Any]) -> None:
    from mlx_lm.utils import load_model

    write_tokenizer(tmp_path / "tokenizer")
    made = model.build(config, 260, std=0.1)
    complete = model.complete(config, {"vocab_size": 260})
    export.export(tmp_path / "model", made, complete, tmp_path / "tokenizer")
    loaded, _ = load_model(tmp_path / "model")
    tokens = mx.array([[1, 2, 3, 4, 5]])
    rounded = {
        n: w if "_bias" in n else w.astype(mx.bfloat16).astype(mx.float32) for n, w in model.parameters(made).items()
    }
    model.assign(made, rounded)
    loaded.set_dtype(mx.float32)
    assert np.allclose(np.array(loaded(tokens)), np.array(made(tokens)), atol=1e-5)
    assert (tmp_path / "model" / "tokenizer.json").is_file()


def test_the_hubs_names_are_read_back_with_the_mtp_layer(tmp_path: Path) -> None:
    from edger1.architectures.deepseek_v3_mtp import Model, ModelArgs

    write_tokenizer(tmp_path / "tokenizer")
    made = model.build(MOE, 64)
    export.export(tmp_path / "model", made, model.complete(MOE, {"vocab_size": 64}), tmp_path / "tokenizer")
    ahead = mx.load(str(tmp_path / "model" / "mtp.safetensors"))
    assert {n.removeprefix("model.layers.2.") for n in ahead} >= {
        "enorm.weight",
        "hnorm.weight",
        "eh_proj.weight",
        "shared_head.norm.weight",
        "mlp.experts.7.down_proj.weight",
        "self_attn.kv_b_proj.weight",
    }
    both = {**mx.load(str(tmp_path / "model" / "model.safetensors")), **ahead}
    # As the published checkpoints have it: copies of what is shared.
    both["model.layers.2.embed_tokens.weight"] = both["model.embed_tokens.weight"]
    both["model.layers.2.shared_head.head.weight"] = both["lm_head.weight"]
    fresh = Model(ModelArgs.from_dict(model.complete(MOE, {"vocab_size": 64})))
    weights = fresh.sanitize(both)
    expected = model.parameters(made)
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        assert np.allclose(np.array(value.astype(mx.float32)), np.array(expected[name]), atol=1e-3), name


def test_the_recipes_models_are_of_the_sizes_they_promise() -> None:
    from edger1.train.pretrain import settings

    sizes, active = {}, {}
    for name in ("nano-moe", "nano-dense"):
        config, _ = settings.read(Path(__file__).parents[1] / "recipes" / "nano" / "configs" / f"{name}.toml")
        made = model.build(config, 2048)
        sizes[name] = sum(weight.size for weight in model.parameters(made).values())
        active[name] = model.active_parameters(model.complete(config, {"vocab_size": 2048}))
    assert 2 * sizes["nano-moe"] < 45e6
    assert active["nano-dense"] == pytest.approx(active["nano-moe"], rel=0.02)
