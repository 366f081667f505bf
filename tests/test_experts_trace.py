"""Routing traces: what is recorded of a model, the file, and the kept trace that policies are held against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import deepseek_v3

from edger1.errors import FormatError
from edger1.experts import replay, trace
from edger1.experts.policy import DEFAULT_POLICY, LRU, POLICIES
from edger1.experts.trace import Trace

KEPT = Path(__file__).parent.parent / "benchmarks" / "traces" / "nano-moe.npz"


def made(tokens: int = 20, layers: int = 2, experts: int = 7, top_k: int = 3) -> Trace:
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(tokens, layers, experts)).astype(np.float32)
    chosen = np.argsort(-scores, axis=-1)[..., :top_k]
    near = trace.nearness(scores, chosen)
    return Trace(chosen.astype(np.uint8), near, np.array([0, 5, 12]), {"model": "random"})


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    saved = made()
    trace.save(tmp_path / "t.npz", saved)
    found = trace.load(tmp_path / "t.npz")
    assert np.array_equal(found.chosen, saved.chosen)
    assert np.array_equal(found.nearness, saved.nearness)
    assert found.sessions.tolist() == [0, 5, 12]
    assert found.about["model"] == "random"
    assert found.experts == 7


def test_the_chosen_are_nearest_and_order_is_kept() -> None:
    scores = np.array([[3.0, 1.0, 2.0, -9.0, 0.9]], np.float32)
    near = trace.nearness(scores, np.array([[0, 2]]))[0]
    assert near[[0, 2]].tolist() == [15, 15]
    assert 15 > near[1] >= near[4] > near[3]


def test_sessions_are_taken_out_whole() -> None:
    whole = made()
    odd = whole.part(slice(1, None, 2))
    assert np.array_equal(odd.chosen, whole.chosen[5:12])
    even = whole.part(slice(0, None, 2))
    assert np.array_equal(even.nearness, np.concatenate([whole.nearness[:5], whole.nearness[12:]]))
    assert even.sessions.tolist() == [0, 5]
    assert even.counts(1).sum() == 13 * 3


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"\x93NUMPY nothing"])
def test_what_is_no_trace_is_said_to_be_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.npz"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"t\.npz is no routing trace"):
        trace.load(path)


def test_a_damaged_file_is_no_trace_or_has_the_same_in_it(tmp_path: Path) -> None:
    path, saved = tmp_path / "t.npz", made()
    trace.save(path, saved)
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            found = trace.load(path)
        except FormatError:
            continue
        assert np.array_equal(found.chosen, saved.chosen)
        assert np.array_equal(found.nearness, saved.nearness)


def test_another_version_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", version=np.array(2))
    with pytest.raises(FormatError, match="version 2; expected 1"):
        trace.load(tmp_path / "t.npz")


def routed(experts: int) -> Any:
    """A model with two layers that choose among so many experts."""
    args = deepseek_v3.ModelArgs(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_shared_experts=1,
        n_routed_experts=experts,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    return deepseek_v3.Model(args)


def test_a_models_routers_are_recorded_as_they_decide() -> None:
    mx.random.seed(3)
    model = routed(8)
    gates = [layer.mlp.gate for layer in model.model.layers[1:]]
    for gate in gates:
        gate.weight = mx.random.normal(gate.weight.shape)
        gate.e_score_correction_bias = mx.random.normal(gate.e_score_correction_bias.shape) * 0.1
    tokens = mx.array([[3, 1, 4, 1, 5]])
    before = model(tokens)
    with trace.recording(model) as recorder:
        recorder.begin_session()
        logits = model(tokens)
        mx.eval(logits, recorder.pending())
        recorder.end_pass()
    assert mx.array_equal(before, logits)
    found = recorder.trace({})
    assert found.chosen.shape == (5, 2, 2)
    assert found.nearness.shape == (5, 2, 8)
    mask = mx.tril(mx.ones((5, 5), dtype=mx.bool_))
    hidden = model.model.layers[0](model.model.embed_tokens(tokens), mask, None)
    layer = model.model.layers[1]
    attended = hidden + layer.self_attn(layer.input_layernorm(hidden), mask, None)
    scores = mx.sigmoid(layer.post_attention_layernorm(attended) @ gates[0].weight.T) + gates[0].e_score_correction_bias
    assert np.array_equal(found.chosen[:, 0], np.argsort(-np.array(scores)[0], axis=-1)[:, :2])
    assert all(type(gate) is deepseek_v3.MoEGate for gate in gates)


def test_more_experts_than_a_file_can_number_are_refused() -> None:
    with pytest.raises(ValueError, match="257 experts a layer; expected 256 or fewer"), trace.recording(routed(257)):
        pass
    with trace.recording(routed(256)):
        pass


def test_a_model_without_routers_cannot_be_recorded() -> None:
    class Dense:
        model = type("Inner", (), {"layers": [type("Layer", (), {"mlp": None})()]})

    with pytest.raises(ValueError, match="no MoEGate"), trace.recording(Dense()):
        pass


@pytest.mark.skipif(not KEPT.exists(), reason="a source package has no traces")
def test_the_default_policy_closes_part_of_the_gap_on_the_kept_trace() -> None:
    kept = trace.load(KEPT).part(slice(1, 6, 2))
    shares = []
    for layer in range(kept.chosen.shape[1]):
        steps, slots = kept.chosen[:, layer].tolist(), kept.experts // 4
        lru, ours = (replay.misses(make(kept.experts), steps, slots) for make in (LRU, POLICIES[DEFAULT_POLICY]))
        shares.append((lru - ours) / (lru - replay.fewest_misses(steps, slots)))
    assert min(shares) > 0.1
    assert np.mean(shares) > 0.25
