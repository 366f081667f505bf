"""Builds the tokenizer files that mlx-lm and transformers read from what a GGUF file says about its tokenizer.

Two kinds are known. `gpt2` is byte-level BPE; which pre-tokenizer splits the text is named by `tokenizer.ggml.pre`, and
the expressions below are those of the models' own tokenizer.json (llama.cpp's llama-vocab.cpp lists them). `llama` is
SentencePiece BPE with byte fallback: its merges are not in the file and follow from the scores, the pair that makes the
highest-scored token first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from edger1.errors import FormatError
from edger1.quant.formats.gguf import Header

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""The token types of `tokenizer.ggml.token_type`."""

MAX_PIECE_LENGTH = 1024
"""In characters. SentencePiece's longest are 16 by default; cutting a piece everywhere costs its length squared."""

ENDS_OF_TURN = (
    "<|im_end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<|observation|>", "<|end|>",
    "<|return|>", "<|call|>",
)  # fmt: skip
"""Control tokens that end an answer even where the file names only one of them as its end."""

_END_OF_MESSAGE = "<|end|>"
"""No end of a turn where there is <|return|> too (gpt-oss): thoughts end with it, and the answer follows."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_QWEN2 = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ENDING = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = _CASED % (_ENDING, _ENDING, "{1,3}")
_TEKKEN = _CASED % ("", "", "")
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED_LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ"
    "-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ"
    "-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
"""Every letter that has a case, as DeepSeek's first tokenizers list them."""


@dataclass(frozen=True)
class _Splitting:
    """How a byte-level tokenizer splits text before merging: each expression in turn isolates what it matches."""

    expressions: tuple[str, ...]
    whole_words: bool = False
    """A word that is a token is taken whole, whatever the merges say."""
    compose: bool = False
    """Text is brought to Unicode's NFC first."""
    begins: bool = False
    """The beginning-of-text token is added unless the file says otherwise."""


_SPLITTINGS = {
    "gpt-2": _Splitting((_GPT2,)),
    "smollm": _Splitting((r"\p{N}", _GPT2)),
    "llama-bpe": _Splitting((_LLAMA3,), whole_words=True, begins=True),
    "qwen2": _Splitting((_QWEN2,), compose=True),
    "deepseek-r1-qwen": _Splitting((_QWEN2,)),
    "deepseek-v3": _Splitting((r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _DEEPSEEK_V3)),
    "deepseek-coder": _Splitting((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}")),
}
_SPLITTINGS |= {
    "deepseek-llm": _Splitting(
        (
            r"[\r\n]", rf"\s?[{_CASED_LETTERS}]+", r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+", r"\s+$",
            "[一-龥ࠀ-一가-퟿]+", r"\p{N}+",
        )
    ),
    "gpt-4o": _Splitting((_GPT4O,)),
    "tekken": _Splitting((_TEKKEN,), whole_words=True, begins=True),
    "dbrx": _Splitting((_LLAMA3,)),
    "glm4": _Splitting((_LLAMA3,), whole_words=True),
    "qwen35": _Splitting((_QWEN35,), compose=True),
    "seed-coder": _Splitting((_SEED,)),
}  # fmt: skip
_SAME = {
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "lfm2"),
    "gpt-2": ("olmo", "phi-2", "exaone4", "granite-docling"),
    "smollm": ("refact", "starcoder", "command-r", "exaone"),
    "dbrx": ("smaug-bpe", "chatglm-bpe"),
    "gpt-4o": ("llama4", "minimax-m2"),
    "deepseek-r1-qwen": ("hunyuan", "megrez"),
    "deepseek-v3": ("hunyuan-dense",),
}
_SPLITTINGS |= {name: _SPLITTINGS[first] for first, names in _SAME.items() for name in names}


def splitting_name(tokenizer: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name of how a byte-level tokenizer.json splits text, None where it has none.

    Of several names for one way the first is meant, or that of Llama 3 where whole words are tokens.
    """
    steps = tokenizer.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps]) if isinstance(steps, dict) else []
    expressions: list[str] = []
    for step in steps:
        kind = step.get("type")
        if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            expressions.append(str((step.get("pattern") or {}).get("Regex")))
        elif kind == "Digits" and step.get("individual_digits"):
            expressions.append(r"\p{N}")
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            expressions += [_GPT2] if step.get("use_regex", True) else []
        else:
            return None
    if not any(step.get("type") == "ByteLevel" for step in steps):
        return None
    whole = bool((tokenizer.get("model") or {}).get("ignore_merges"))
    composes = (tokenizer.get("normalizer") or {}).get("type") == "NFC"
    for exact in (True, False):
        for name, each in _SPLITTINGS.items():
            same = not exact or (each.whole_words, each.compose) == (whole, composes)
            if same and each.expressions == tuple(expressions):
                return name
    return None


@dataclass(frozen=True)
class BuiltTokenizer:
    """A tokenizer as files: `write` puts them into a folder. Token ids are None where the file names none."""

    tokenizer: Tokenizer
    config: dict[str, Any]
    bos_id: int | None
    eos_ids: tuple[int, ...]
    pad_id: int | None

    def token_ids(self) -> dict[str, int]:
        """Return what config.json says of the tokens that begin and end a text."""
        ids = {"eos_token_id": self.eos_ids[0]}
        if self.bos_id is not None:
            ids["bos_token_id"] = self.bos_id
        return ids

    def write(self, folder: Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and generation_config.json into `folder`."""
        (folder / "tokenizer.json").write_text(self.tokenizer.to_str(pretty=False), encoding="utf-8")
        _write_json(folder / "tokenizer_config.json", self.config)
        generation: dict[str, Any] = {"eos_token_id": _one_or_all(self.eos_ids)}
        if self.bos_id is not None:
            generation["bos_token_id"] = self.bos_id
        if self.pad_id is not None:
            generation["pad_token_id"] = self.pad_id
        _write_json(folder / "generation_config.json", generation)


def build(header: Header, vocabulary: int) -> BuiltTokenizer:
    """Build the tokenizer of a model whose embedding has `vocabulary` rows.

    Raises FormatError where the file's tokenizer is of a kind that is not known, damaged, or larger than the embedding.
    """
    kind = header.text("tokenizer.ggml.model")
    if kind not in _BUILDERS:
        raise FormatError(
            f"{header.name} has a tokenizer of the kind {kind[:40]!r}; {' and '.join(_BUILDERS)} can be converted. "
            "Get the model as an MLX folder instead."
        )
    tokens = _tokens(header, vocabulary)
    types = _types(header, len(tokens))
    begins_by_default, tokenizer = _BUILDERS[kind](header, tokens, types)

    def special(*keys: str) -> int | None:
        for key in keys:
            identifier = header.integer(f"tokenizer.ggml.{key}", -1)
            if 0 <= identifier < len(tokens):
                return identifier
        return None

    bos, eos = special("bos_token_id"), special("eos_token_id")
    unknown, padding = special("unknown_token_id"), special("padding_token_id")
    named = {identifier for identifier in (bos, eos, unknown, padding) if identifier is not None}
    _add_tokens(tokenizer, tokens, types, named)
    begins = header.flag("tokenizer.ggml.add_bos_token", begins_by_default) and bos is not None
    ends = header.flag("tokenizer.ggml.add_eos_token", False) and eos is not None
    _frame(tokenizer, (tokens[bos], bos) if begins and bos is not None else None,
           (tokens[eos], eos) if ends and eos is not None else None)  # fmt: skip
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": begins,
        "add_eos_token": ends,
        "model_max_length": header.integer(f"{header.text('general.architecture')}.context_length"),
    }
    for key, identifier in (("bos", bos), ("eos", eos), ("unk", unknown), ("pad", padding)):
        if identifier is not None:
            config[f"{key}_token"] = tokens[identifier]
    if "tokenizer.chat_template" in header.metadata:
        config["chat_template"] = header.text("tokenizer.chat_template")
    known = set(ENDS_OF_TURN) - ({_END_OF_MESSAGE} if "<|return|>" in tokens else set())
    known_ends = [tokens.index(text) for text in ENDS_OF_TURN if text in known and text in tokens]
    ends_of_turn = [eos, special("eot_token_id"), special("eom_token_id")]
    ends_of_turn += [identifier for identifier in known_ends if types[identifier] == CONTROL]
    eos_ids = tuple(dict.fromkeys(identifier for identifier in ends_of_turn if identifier is not None))
    if not eos_ids:
        raise FormatError(f"{header.name} names no token that ends a text (tokenizer.ggml.eos_token_id).")
    return BuiltTokenizer(tokenizer, config, bos, eos_ids, padding)


def _tokens(header: Header, vocabulary: int) -> list[str]:
    # llama.cpp also gives empty tokens such a name, to keep their ids.
    tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(header.strings("tokenizer.ggml.tokens"))]
    if not 0 < len(tokens) <= vocabulary:
        raise FormatError(
            f"{header.name} lists {len(tokens):,} tokens, but its embedding has {vocabulary:,} rows; it is damaged."
        )
    seen: set[str] = set()
    for text in tokens:
        if text in seen:
            raise FormatError(f"{header.name} lists the token {text[:80]!r} twice; it is damaged.")
        seen.add(text)
    return tokens


def _types(header: Header, count: int) -> list[int]:
    if "tokenizer.ggml.token_type" not in header.metadata:
        return [NORMAL] * count
    types: list[int] = header.numbers("tokenizer.ggml.token_type").tolist()
    if len(types) != count:
        raise FormatError(f"{header.name} gives types for {len(types):,} tokens but lists {count:,}; it is damaged.")
    return types


def _byte_level(header: Header, tokens: list[str], types: list[int]) -> tuple[bool, Tokenizer]:
    name = header.text("tokenizer.ggml.pre", "missing")
    if name not in _SPLITTINGS:
        raise FormatError(
            f"{header.name} splits text by the pre-tokenizer {name[:40]!r}; {', '.join(_SPLITTINGS)} can be converted. "
            "Get the model as an MLX folder instead."
        )
    splitting = _SPLITTINGS[name]
    ids = {text: i for i, text in enumerate(tokens)}
    merges: list[tuple[str, str]] = []
    for merge in header.strings("tokenizer.ggml.merges"):
        # The first character may itself be a space.
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or left not in ids or right not in ids or left + right not in ids:
            raise FormatError(f"{header.name} has the merge {merge[:80]!r}, which joins no two tokens; it is damaged.")
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=splitting.whole_words))
    if splitting.compose:
        tokenizer.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in splitting.expressions]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return splitting.begins, tokenizer


def _sentencepiece(header: Header, tokens: list[str], types: list[int]) -> tuple[bool, Tokenizer]:
    scores: list[float] = header.numbers("tokenizer.ggml.scores").tolist()
    if len(scores) != len(tokens):
        raise FormatError(f"{header.name} scores {len(scores):,} tokens but lists {len(tokens):,}; it is damaged.")
    if max(map(len, tokens)) > MAX_PIECE_LENGTH:
        raise FormatError(f"{header.name} has a token of more than {MAX_PIECE_LENGTH:,} characters; it is damaged.")
    ids = {text: i for i, text in enumerate(tokens)}
    if any(f"<0x{byte:02X}>" not in ids for byte in range(256)):
        raise FormatError(f"{header.name} has a SentencePiece tokenizer without byte tokens, which is not supported.")
    unknown = tokens[types.index(UNKNOWN)] if UNKNOWN in types else None
    model = models.BPE(
        vocab=ids, merges=_merges_by_score(tokens, types, scores, ids), unk_token=unknown, fuse_unk=True,
        byte_fallback=True,
    )  # fmt: skip
    tokenizer = Tokenizer(model)
    prefix = header.flag("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces] if prefix else [spaces])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return True, tokenizer


_BUILDERS: dict[str, Callable[[Header, list[str], list[int]], tuple[bool, Tokenizer]]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}


def _merges_by_score(
    tokens: list[str], types: list[int], scores: list[float], ids: dict[str, int]
) -> list[tuple[str, str]]:
    """List every pair of tokens that joins to a token, best score of the joined token first."""
    found: list[tuple[float, int, int, str, str]] = []
    for identifier, text in enumerate(tokens):
        if types[identifier] not in (NORMAL, USER_DEFINED, UNUSED):
            continue
        for cut in range(1, len(text)):
            left, right = ids.get(text[:cut]), ids.get(text[cut:])
            if left is not None and right is not None:
                found.append((-scores[identifier], left, right, text[:cut], text[cut:]))
    return [(left, right) for _, _, _, left, right in sorted(found)]


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int], named: set[int]) -> None:
    """Make control tokens special, and keep user-defined ones whole."""
    special = {i for i, kind in enumerate(types) if kind in (CONTROL, UNKNOWN)} | named
    whole = [i for i, kind in enumerate(types) if kind == USER_DEFINED and i not in special]
    tokenizer.add_special_tokens([AddedToken(tokens[i], normalized=False, special=True) for i in sorted(special)])
    tokenizer.add_tokens([AddedToken(tokens[i], normalized=False, special=False) for i in whole])


def _frame(tokenizer: Tokenizer, first: tuple[str, int] | None, last: tuple[str, int] | None) -> None:
    """Have `first` and `last` (text, id) put around every text that is encoded with special tokens."""
    if first is None and last is None:
        return
    # Under names of our own, because a colon in a token's text would be read as the sign before a sequence number.
    named = {"first": first, "last": last}
    pair = ["first:0", "$A:0", "last:0", "first:1", "$B:1", "last:1"]
    pair = [piece for piece in pair if named.get(piece[:-2], piece) is not None]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[piece for piece in pair if piece.endswith(":0")],
        pair=pair,
        special_tokens=[
            {"id": name, "ids": [token[1]], "tokens": [token[0]]} for name, token in named.items() if token is not None
        ],
    )


def _one_or_all(ids: tuple[int, ...]) -> int | list[int]:
    return ids[0] if len(ids) == 1 else list(ids)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
