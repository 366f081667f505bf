"""The tokenizer files made from a GGUF: the same ids as the tokenizers they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_files import ARRAY, BOOL, F32, I32, STRING, U32, Metadata, byte_level_vocabulary, gguf_bytes
from tokenizers import Tokenizer

from edger1.errors import FormatError
from edger1.quant.formats.gguf import read_header
from edger1.quant.tokenizer import BuiltTokenizer, build

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "a tokenizer turns text into numbers and numbers into text",
    "he said hello to the world and the world said hello",
    "1234 567 89 0 and  double  spaces",
    "naïve café, Zürich, Łódź, привет мир",
] * 20


def built(folder: Path, metadata: Metadata, rows: int = 10_000) -> BuiltTokenizer:
    common: Metadata = {"general.architecture": (STRING, "llama"), "llama.context_length": (U32, 128)}
    path = folder / "t.gguf"
    path.write_bytes(gguf_bytes(common | metadata, {}).data)
    return build(read_header(path), rows)


def with_bytes(**changes: Any) -> Metadata:
    return byte_level_vocabulary() | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def test_byte_level_merges_specials_and_digits(tmp_path: Path) -> None:
    tokenizer = built(tmp_path, byte_level_vocabulary()).tokenizer
    encoded = tokenizer.encode("<|im_start|>hello world hello 12<think><|im_end|>")
    assert encoded.tokens == ["<|im_start|>", "hello", "Ġworld", "Ġhello", "Ġ", "1", "2", "<think>", "<|im_end|>"]
    assert tokenizer.decode(encoded.ids) == "hello world hello 12<think>"
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False).startswith("<|im_start|>hello")
    assert tokenizer.token_to_id("<think>") == 3


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
@pytest.mark.parametrize(
    "name",
    [
        *("gpt-2", "smollm", "llama-bpe", "deepseek-r1-qwen", "deepseek-v3", "deepseek-coder", "deepseek-llm"),
        *("gpt-4o", "tekken", "glm4", "qwen35", "seed-coder"),
    ],
)
def test_byte_level_gives_every_text_back(tmp_path: Path, name: str, text: str) -> None:
    tokenizer = _TOKENIZERS.setdefault(name, built(tmp_path, with_bytes(pre=(STRING, name))).tokenizer)
    # Qwen's takes what Unicode has two ways of writing as the composed one.
    kept = text if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == kept


_TOKENIZERS: dict[str, Tokenizer] = {}

SPLITS = [
    ("gpt-2", "I'm 1234 años", ["I", "'m", "Ġ1234", "ĠaÃ±os"]),
    ("smollm", "I'm 1234", ["I", "'m", "Ġ", "1", "2", "3", "4"]),
    ("llama-bpe", "I'M 1234\n\n x", ["I", "'M", "Ġ", "123", "4", "ĊĊ", "Ġx"]),
    ("qwen2", "I'M 1234\n\n x", ["I", "'M", "Ġ", "1", "2", "3", "4", "ĊĊ", "Ġx"]),
    ("deepseek-v3", "f(x)=1234 你好ab", ["f", "(x", ")=", "123", "4", "Ġ", "ä½łå¥½", "ab"]),
    ("deepseek-llm", "Hi there!? 12 你好\n", ["Hi", "Ġthere", "!?", "Ġ", "12", "Ġ", "ä½łå¥½", "Ċ"]),
    ("gpt-4o", "fooBar'S HTTPServer 12345 a/b\n", ["foo", "Bar'S", "ĠHTTPServer", "Ġ", "123", "45", "Ġa", "/b", "Ċ"]),
    ("llama4", "it's", ["it's"]),
    ("tekken", "fooBar's 123", ["foo", "Bar", "'s", "Ġ", "1", "2", "3"]),
    ("glm4", "I'M 1234", ["I", "'M", "Ġ", "123", "4"]),
    ("refact", "x = 12", ["x", "Ġ=", "Ġ", "1", "2"]),
    ("qwen35", "a\u0301b 12", ["aÌģb", "Ġ", "1", "2"]),
    ("seed-coder", "a!!\n\nb", ["a", "!!", "ĊĊ", "b"]),
]


@pytest.mark.parametrize(("name", "text", "pieces"), SPLITS)
def test_pre_tokenizers_split_as_their_models_do(tmp_path: Path, name: str, text: str, pieces: list[str]) -> None:
    pre_tokenizer = built(tmp_path, with_bytes(pre=(STRING, name))).tokenizer.pre_tokenizer
    assert pre_tokenizer is not None
    assert [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)] == pieces


def test_whole_words_win_over_merges_where_the_model_does_so(tmp_path: Path) -> None:
    merges = (ARRAY, (STRING, ["h e", "l l", "Ġ hello"]))
    pieces = {
        name: built(tmp_path, with_bytes(pre=(STRING, name), merges=merges)).tokenizer.encode("hello").tokens
        for name in ("llama-bpe", "gpt-2")
    }
    assert pieces == {"llama-bpe": ["hello"], "gpt-2": ["he", "ll", "o"]}


def test_qwen2_composes_text_first(tmp_path: Path) -> None:
    tokenizer = built(tmp_path, with_bytes(pre=(STRING, "qwen2"))).tokenizer
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("é").ids


def test_files_and_ids(tmp_path: Path) -> None:
    result = built(tmp_path, with_bytes(padding_token_id=(U32, 2), eot_token_id=(U32, 2)))
    result.write(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert config["clean_up_tokenization_spaces"] is False
    assert config["add_bos_token"] is False
    assert "im_start" in config["chat_template"]
    # <|endoftext|> ends an answer too: it is a control token that some models use instead.
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "eos_token_id": [2, 0],
        "bos_token_id": 1,
        "pad_token_id": 2,
    }


@pytest.mark.parametrize(("extra", "ends"), [("<|return|>", {"<|im_end|>", "<|endoftext|>", "<|return|>"}), ("", None)])
def test_ends_of_a_message_are_no_ends_of_a_turn(tmp_path: Path, extra: str, ends: set[str] | None) -> None:
    vocabulary = byte_level_vocabulary()
    added = ["<|end|>", *([extra] if extra else [])]
    tokens = [*vocabulary["tokenizer.ggml.tokens"][1][1], *added]
    types = [*vocabulary["tokenizer.ggml.token_type"][1][1], *[3] * len(added)]
    metadata = with_bytes(tokens=(ARRAY, (STRING, tokens)), token_type=(ARRAY, (I32, types)))
    found = {tokens[identifier] for identifier in built(tmp_path, metadata).eos_ids}
    assert found == (ends or {"<|im_end|>", "<|endoftext|>", "<|end|>"})


@pytest.mark.parametrize("name", ["smollm", "llama-bpe"])
@pytest.mark.parametrize("flag", [None, 0, 1])
def test_beginning_of_text_as_the_file_says(tmp_path: Path, name: str, flag: int | None) -> None:
    from transformers import AutoTokenizer

    metadata = with_bytes(pre=(STRING, name), add_bos_token=(BOOL, flag or 0))
    if flag is None:
        del metadata["tokenizer.ggml.add_bos_token"]
    result = built(tmp_path, metadata)
    result.write(tmp_path)
    expected = [1] if (name == "llama-bpe" if flag is None else flag) else []
    assert result.tokenizer.encode("").ids == expected
    # What mlx-lm loads the folder with must agree.
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.encode("hello") == result.tokenizer.encode("hello").ids
    assert loaded.encode("hello", add_special_tokens=False) == result.tokenizer.encode("hello").ids[len(expected) :]


DAMAGED: list[tuple[dict[str, Any], str]] = [
    ({"model": (STRING, "wordpiece")}, "kind 'wordpiece'; gpt2 and llama can be"),
    ({"pre": (STRING, "viking")}, "pre-tokenizer 'viking'; gpt-2, smollm"),
    ({"merges": (ARRAY, (STRING, ["h e", "q  q"]))}, "'q  q', which joins no two tokens"),
    ({"merges": (ARRAY, (STRING, ["nospace"]))}, "joins no two tokens"),
    ({"merges": (U32, 1)}, "should be a list of strings"),
    ({"tokens": (ARRAY, (STRING, ["a", "b", "a"]))}, "the token 'a' twice"),
    ({"tokens": (ARRAY, (STRING, []))}, "lists 0 tokens"),
    ({"token_type": (ARRAY, (I32, [1, 1]))}, "types for 2 tokens"),
    ({"eos_token_id": (U32, 1 << 31), "token_type": (ARRAY, (I32, [1] * 270))}, "names no token that ends"),
]


@pytest.mark.parametrize(("changes", "message"), DAMAGED)
def test_what_cannot_be_built_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        built(tmp_path, with_bytes(**changes))


def test_more_tokens_than_the_embedding_has_rows(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="270 tokens, but its embedding has 269 rows"):
        built(tmp_path, byte_level_vocabulary(), rows=269)


@pytest.fixture(scope="module")
def spm(tmp_path_factory: pytest.TempPathFactory) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece BPE model with byte fallback, trained the way Llama's was."""
    folder = tmp_path_factory.mktemp("spm")
    (folder / "corpus.txt").write_text("\n".join(CORPUS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "m"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "m.model"))


def spm_metadata(spm: sentencepiece.SentencePieceProcessor, **changes: Any) -> Metadata:
    ids = range(spm.get_piece_size())
    types = [2 if spm.is_unknown(i) else 3 if spm.is_control(i) else 6 if spm.is_byte(i) else 1 for i in ids]
    metadata: Metadata = {
        "model": (STRING, "llama"),
        "tokens": (ARRAY, (STRING, [spm.id_to_piece(i) for i in ids])),
        "scores": (ARRAY, (F32, [spm.get_score(i) for i in ids])),
        "token_type": (ARRAY, (I32, types)),
        "bos_token_id": (U32, spm.bos_id()),
        "eos_token_id": (U32, spm.eos_id()),
        "unknown_token_id": (U32, spm.unk_id()),
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (metadata | changes).items()}


TEXTS = [*CORPUS[:5], "", "  leading", "trailing  ", "日本語 🍵 emoji", "a\nb\tc", "naïve 2024", "the the the", "▁x"]


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_gives_the_ids_of_the_library(
    tmp_path: Path, spm: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    tokenizer = built(tmp_path, spm_metadata(spm)).tokenizer
    assert tokenizer.encode(text, add_special_tokens=False).ids == spm.encode(text)
    assert tokenizer.encode(text).ids == [spm.bos_id(), *spm.encode(text)]
    if "▁" not in text:
        assert tokenizer.decode(spm.encode(text)) == text


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("thequick brown foxhello worldzyéя茶 12\n"), max_size=60))
def test_sentencepiece_agrees_on_any_text(tmp_path: Path, spm: sentencepiece.SentencePieceProcessor, text: str) -> None:
    tokenizer = _TOKENIZERS.setdefault("spm", built(tmp_path, spm_metadata(spm)).tokenizer)
    assert tokenizer.encode(text, add_special_tokens=False).ids == spm.encode(text)


def test_sentencepiece_without_bytes_or_scores_is_refused(
    tmp_path: Path, spm: sentencepiece.SentencePieceProcessor
) -> None:
    metadata = spm_metadata(spm, scores=(ARRAY, (F32, [0.0])))
    with pytest.raises(FormatError, match="scores 1 tokens"):
        built(tmp_path, metadata)
    few = [f"t{i}" for i in range(4)]
    metadata = spm_metadata(
        spm, tokens=(ARRAY, (STRING, few)), scores=(ARRAY, (F32, [0.0] * 4)), token_type=(ARRAY, (I32, [1] * 4))
    )
    with pytest.raises(FormatError, match="without byte tokens"):
        built(tmp_path, metadata)
    few[0] = "x" * 5_000_000
    with pytest.raises(FormatError, match="more than 1,024 characters"):
        built(tmp_path, metadata)
