"""SmolLM2-135M after conversion, held against the gguf package, transformers and its own pre-tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.parity, pytest.mark.model]

TEXT = """The history of cartography begins long before paper. People scratched rivers, hunting grounds and the
positions of stars into bone and rock, and carried that knowledge with them over many thousands of miles. By the year
1569 Gerardus Mercator had drawn a projection on which a straight line is a line of constant bearing, and sailors could
at last steer by a ruler. It came at a price: Greenland looks as large as Africa, which is in truth 14 times larger.

def area(width: float, height: float) -> float:
    \"\"\"Return the area of a rectangle.\"\"\"
    return width * height

"Why," she asked, "does 3 + 4 * 2 equal 11 and not 14?" Because multiplication binds tighter than addition, he said;
write (3 + 4) * 2 if you want 14. The naïve reader, who reads from left to right, will be surprised once and then never
again. Mathematics is full of such agreements, and most of them were made by people in a hurry, who wanted to write less
and to be understood all the same. It would be a mistake to think of them as laws of nature.
"""
TOKENS = 256


@pytest.fixture(scope="module")
def reference(smollm2_gguf: Path) -> Any:
    """The model as transformers reads it from the same file, dequantized to f32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def ids(smollm2: Path) -> list[int]:
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(smollm2 / "tokenizer.json")).encode(TEXT).ids
    assert len(ids) >= TOKENS
    return ids[:TOKENS]


def relative_rms(found: np.ndarray, expected: np.ndarray) -> float:
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def test_every_weight_equals_the_file_dequantized(smollm2: Path, smollm2_gguf: Path) -> None:
    import mlx.core as mx
    from gguf import GGUFReader
    from gguf.quants import dequantize

    from edger1.quant.gguf_models import restored_rows

    arrays = mx.load(str(smollm2 / "model.safetensors"))
    heads = {"attn_q": 9, "attn_k": 3}
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    tensors = GGUFReader(smollm2_gguf).tensors
    assert len(tensors) == 272
    for tensor in tensors:
        parts = tensor.name.split(".")
        kind = parts[-2]
        path = f"model.layers.{parts[1]}.{names[kind]}" if parts[0] == "blk" else names[kind]
        expected = dequantize(tensor.data, tensor.tensor_type)
        weight = arrays[f"{path}.weight"]
        if f"{path}.scales" in arrays:
            scales, biases = (arrays[f"{path}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
            bits = 32 * weight.shape[1] // expected.shape[1]
            weight = mx.dequantize(weight, scales, biases, group_size=32, bits=bits)
        if kind in heads:
            expected = expected[restored_rows(len(expected), heads[kind])]
        np.testing.assert_array_equal(np.array(weight), expected, err_msg=tensor.name)


def test_logits_through_mlx_lm(smollm2: Path, reference: Any, ids: list[int]) -> None:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(smollm2)
    model.set_dtype(mx.float32)
    found = np.array(model(mx.array([ids]))[0])
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0].numpy()
    assert found.shape == expected.shape == (TOKENS, 49152)
    assert relative_rms(found, expected) < 1e-3
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.99


def test_log_probabilities_through_edger1(smollm2: Path, reference: Any, ids: list[int]) -> None:
    import edger1

    model = edger1.load(smollm2, precision="exact")
    try:
        found = np.array(model.score(ids))
    finally:
        model.close()
    with torch.no_grad():
        expected = torch.log_softmax(reference(torch.tensor([ids])).logits[0].double(), -1).numpy()
    chosen = expected[np.arange(TOKENS - 1), ids[1:]]
    assert found.shape == chosen.shape
    assert relative_rms(found, chosen) < 1e-3


SAMPLES = [
    TEXT,
    "Hello world",
    "  leading and trailing  ",
    "Year 2024, 3.14159, 1,000,000 and ½ or ٣٤",
    "I'm you're we'll they've don't I'd it's",
    "tabs\tand\nnew\r\nlines\n\n\n  done",
    "naïve café 日本語 🍵 👩‍👩‍👧 \u00a0 привет",
    "x=1;y=[i**2 for i in range(10)]  # comment",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|><file_sep>",
]


def test_tokenizer_equals_smollm2s_own(smollm2: Path, smollm2_gguf: Path) -> None:
    """SmolLM2's published tokenizer.json splits by single digits, then as GPT-2 does; built here of the library's own
    parts instead of the expressions that we write into the file."""
    from gguf import GGUFReader
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoTokenizer

    fields = GGUFReader(smollm2_gguf).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    theirs = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(tokens)}, merges=merges))
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    theirs.decoder = decoders.ByteLevel()
    theirs.add_special_tokens(tokens[:17])
    ours = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    loaded = AutoTokenizer.from_pretrained(smollm2)
    for text in SAMPLES:
        expected = theirs.encode(text)
        assert ours.encode(text).ids == expected.ids
        assert loaded.encode(text) == expected.ids
        assert ours.decode(expected.ids, skip_special_tokens=False) == theirs.decode(
            expected.ids, skip_special_tokens=False
        )


def test_chat_template_and_ends(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.eos_token_id == 2
    assert (
        tokenizer("Hi", add_special_tokens=True)["input_ids"] == tokenizer("Hi", add_special_tokens=False)["input_ids"]
    )
