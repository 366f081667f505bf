"""What is made of trained models: the quantized folder with its MTP layer, the GGUF file, and how they are measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_corpus import DENSE, MOE, counting_documents, write_corpus, write_tokenizer

from edger1.demo import questions
from edger1.errors import FormatError, UsageError
from edger1.quant.convert import convert_gguf
from edger1.train.pretrain import export, model
from edger1.train.pretrain.corpus import open_corpus
from recipes.nano import gguf_f16, measure, quantize
from recipes.nano.evaluate import Question

# Wide enough for groups: 128 columns in the layers, 64 in the latents.
WIDE = {
    **MOE,
    "hidden_size": 128,
    "moe_intermediate_size": 128,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "v_head_dim": 64,
}


def trained(folder: Path, config: dict[str, Any], vocabulary: int = 260) -> Any:
    write_tokenizer(folder / "tokenizer")
    made = model.build(config, vocabulary, std=0.1, seed=2)
    known = {"vocab_size": vocabulary, "bos_token_id": 256, "eos_token_id": 257}
    export.export(folder / "model", made, model.complete(config, known), folder / "tokenizer")
    return made


@pytest.mark.parametrize("config", [MOE, DENSE])
def test_what_was_exported_loads_as_it_was(tmp_path: Path, config: dict[str, Any]) -> None:
    made = trained(tmp_path, config)
    loaded, about = export.load(tmp_path / "model")
    assert about["model_type"] == config["model_type"]
    found, expected = model.parameters(loaded), model.parameters(made)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        rounded = value if name.endswith("_bias") else value.astype(mx.bfloat16).astype(mx.float32)
        assert mx.array_equal(found[name], rounded), name
    (tmp_path / "model" / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(FormatError, match="no model as training exports it"):
        export.load(tmp_path / "model")


def test_the_quantized_model_loads_and_says_nearly_the_same(tmp_path: Path) -> None:
    from mlx_lm.utils import load_model

    made = trained(tmp_path, WIDE)
    samples = [Question("letters", "k", "a b?", "c")]
    quantize.write(tmp_path / "model", tmp_path / "q", 8, samples)
    theirs, config = load_model(tmp_path / "q")
    assert config["quantization"]["bits"] == 8
    tokens = mx.array([[5, 9, 200, 31, 7]])
    expected, found = made(tokens), theirs(tokens).astype(mx.float32)
    assert (found - expected).square().mean().item() < 0.15**2 * expected.square().mean().item()
    groups = {
        path: (layer.group_size, layer.bits)
        for path, layer in theirs.named_modules()
        if hasattr(layer, "scales") or "scales" in layer
    }
    assert groups["model.layers.1.mlp.switch_mlp.gate_proj"] == (128, 8)
    assert groups["model.layers.0.self_attn.q_b_proj"] == (64, 8)
    assert [q.question for q in questions(tmp_path / "q", 5)] == ["a b?"]


def test_the_mtp_layer_goes_along_under_the_names_of_checkpoints(tmp_path: Path) -> None:
    made = trained(tmp_path, WIDE)
    quantize.write(tmp_path / "model", tmp_path / "q", 8)
    kept = mx.load(str(tmp_path / "q" / "mtp.safetensors"))
    assert all(name.startswith("model.layers.2.") for name in kept)
    both = kept | mx.load(str(tmp_path / "q" / "model.safetensors"))
    names = {name.replace("model.layers.2.", "mtp.0.") for name in both}
    weights = {name for name, _ in tree_flatten(made.parameters())}
    assert {name for name in names if not name.endswith((".scales", ".biases"))} == weights
    assert not (tmp_path / "q" / "demo.jsonl").exists()


def test_the_gguf_file_holds_the_same_model(tmp_path: Path) -> None:
    config = {**DENSE, "tie_word_embeddings": False, "head_dim": 8}
    made = trained(tmp_path, config, 261)
    _with_merges(tmp_path / "model")
    assert gguf_f16.write(tmp_path / "model", tmp_path / "m.gguf") < 1e-6
    convert_gguf(tmp_path / "m.gguf", tmp_path / "back")
    from mlx_lm.utils import load_model

    theirs, about = load_model(tmp_path / "back")
    assert about["rope_theta"] == config["rope_theta"]
    tokens = mx.array([[5, 9, 200, 31, 7]])
    expected, found = made(tokens), theirs(tokens).astype(mx.float32)
    assert (found - expected).square().mean().item() < 0.02**2 * expected.square().mean().item()
    first = json.loads((tmp_path / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    second = json.loads((tmp_path / "back" / "tokenizer.json").read_text())["model"]["vocab"]
    assert first.items() <= second.items()
    trained(tmp_path / "moe", MOE)
    with pytest.raises(UsageError, match="expected a llama"):
        gguf_f16.write(tmp_path / "moe" / "model", tmp_path / "n.gguf")
    assert not (tmp_path / "n.gguf").exists()


def _with_merges(folder: Path) -> None:
    path = folder / "tokenizer.json"
    words = json.loads(path.read_text())
    words["model"]["merges"] = [["a", "b"]]
    words["model"]["vocab"]["ab"] = 260
    path.write_text(json.dumps(words))
    about = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**about, "pad_token": "</s>"}))


def test_predictions_and_experts_are_counted(tmp_path: Path) -> None:
    made = trained(tmp_path, MOE)
    corpus = open_corpus(write_corpus(tmp_path / "corpus", counting_documents()))
    found, loads = measure.held_out(made, corpus)
    # By hand, document by document.
    split, right, ahead, chosen = corpus.held_out, [], [], np.zeros((2, 8))
    for begin, end in zip(split.starts[:-1], split.starts[1:], strict=True):
        tokens = mx.array(split.ids[begin:end].astype(np.int32))[None]
        hidden = made.model(tokens)
        right += (mx.argmax(made.lm_head(hidden), axis=-1)[0, :-1] == tokens[0, 1:]).tolist()
        causal = mx.tri(tokens.shape[1] - 1, dtype=mx.bool_)
        drafts = made.mtp_logits(0, hidden[:, :-1], tokens[:, 1:], causal)
        ahead += (mx.argmax(drafts, axis=-1)[0, :-1] == tokens[0, 2:]).tolist()
    assert found.tokens == len(right)
    assert found.next_right == pytest.approx(sum(right) / len(right))
    assert found.ahead_right == pytest.approx(sum(ahead) / len(ahead))
    assert loads.shape == chosen.shape
    assert loads.sum() == found.tokens * 2 * 2
