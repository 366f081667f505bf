"""The tokenizer: byte-level BPE, every digit by itself, DeepSeek-R1's special tokens and a chat template after its.

Digits are never merged: a model that reads 47 as 4 and 7 can learn columns, one that has a token for 47 must learn a
hundred by heart; nor does a space stick to them, so that a digit has one form only. Text is split as SmolLM's tokenizer
does it, since llama.cpp knows that way (`tokenizer.ggml.pre = "smollm"`) and none that is ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

VOCABULARY = 2048
BOS, EOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK, PAD = "<think>", "</think>", "<｜▁pad▁｜>"
SPECIAL = (BOS, EOS, PAD, USER, ASSISTANT, THINK, END_THINK)

# As R1's: an answer that opens with a thought, and thoughts of earlier turns left out. Unlike R1's the thoughts of
# the last turn stay, so that the template renders training examples too; `enable_thinking=false` closes the thought.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{%- for message in messages %}"
    "{%- if message.role == 'system' %}{{ message.content + '\n' }}"
    "{%- elif message.role == 'user' %}{{ '<｜User｜>' + message.content }}"
    "{%- elif message.role == 'assistant' %}{{ '<｜Assistant｜>' }}"
    "{%- if '</think>' in message.content and not loop.last %}"
    "{{ message.content.split('</think>')[-1].lstrip('\n') }}"
    "{%- else %}{{ message.content }}{%- endif %}{{ eos_token }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{ '\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)


def train(texts: Iterable[str], folder: Path, vocabulary: int = VOCABULARY) -> None:
    """Train on `texts` and write tokenizer.json, tokenizer_config.json and chat_template.jinja into `folder`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(word, special=word not in (THINK, END_THINK), normalized=False) for word in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", "utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, "utf-8")
