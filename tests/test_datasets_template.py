"""Conversations as tokens: what the model sees is the inference template's, what it learns is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import CHATML, FAMILIES, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from edger1.errors import FormatError, UsageError
from edger1.train.datasets.rows import Row
from edger1.train.datasets.template import Encoded, Template

TOKENIZERS = {name: tokenizer(template, end) for name, (template, end) in FAMILIES.items()}
TEMPLATES = {name: Template(chat, 4096) for name, chat in TOKENIZERS.items()}

ASKED = {"role": "user", "content": "What is 2+2?"}
THOUGHT = {"role": "assistant", "content": "<think>two and two</think>It is 4."}
AGAIN = {"role": "user", "content": "Sure?"}
PLAIN = {"role": "assistant", "content": "Yes."}


def row(*turns: dict[str, Any], **columns: Any) -> Row:
    return Row("test, line 1", list(turns), None, columns)


def learned(name: str, encoded: Encoded) -> str:
    return str(TOKENIZERS[name].decode(encoded.ids[encoded.counted]))


def rendered(name: str, encoded: Encoded) -> str:
    return str(TOKENIZERS[name].decode(encoded.ids))


def first_prompt(encoded: Encoded) -> list[int]:
    return list(encoded.ids[: int(np.argmax(encoded.counted))])


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("chatml", "<think>\ntwo and two\n</think>\n\nIt is 4.<|im_end|>"),
        ("qwen2.5", "<think>\ntwo and two\n</think>\n\nIt is 4.<|im_end|>"),
        ("qwen3", "<think>\ntwo and two\n</think>\n\nIt is 4.<|im_end|>"),
        ("r1", "two and two\n</think>\n\nIt is 4.<|eos|>"),
        ("llama3", "<think>\ntwo and two\n</think>\n\nIt is 4.<|eot_id|>"),
        ("mistral", " <think>\ntwo and two\n</think>\n\nIt is 4.<|eos|>"),
        (
            "harmony",
            "<|channel|>analysis<|message|>two and two<|end|>"
            "<|start|>assistant<|channel|>final<|message|>It is 4.<|return|>",
        ),
        ("endless", "<think>\ntwo and two\n</think>\n\nIt is 4.<|eos|>"),
    ],
)
def test_an_answer_is_learned_with_its_thought_and_end(name: str, answer: str) -> None:
    encoded = TEMPLATES[name].encode(row(ASKED, THOUGHT))
    assert learned(name, encoded) == answer


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "switched"])
@pytest.mark.parametrize("answer", [THOUGHT, PLAIN])
def test_the_prompt_is_token_for_token_that_of_inference(name: str, answer: dict[str, Any]) -> None:
    encoded = TEMPLATES[name].encode(row(ASKED, answer))
    ids = TOKENIZERS[name].apply_chat_template([ASKED], add_generation_prompt=True, tokenize=True)["input_ids"]
    assert first_prompt(encoded) == list(ids)
    assert list(TEMPLATES[name].prompt([ASKED])) == list(ids)


def test_a_thought_opens_by_the_switch_of_a_template_that_has_one() -> None:
    encoded = TEMPLATES["switched"].encode(row(ASKED, THOUGHT))
    assert learned("switched", encoded).startswith("two and two")
    asked = TOKENIZERS["switched"].apply_chat_template(
        [ASKED], add_generation_prompt=True, tokenize=False, thinking=True
    )
    assert rendered("switched", encoded).startswith(asked)
    plain = TEMPLATES["switched"].encode(row(ASKED, PLAIN))
    assert learned("switched", plain) == "Yes.<|eos|>"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_turn_is_learned_and_keeps_its_thought(name: str) -> None:
    encoded = TEMPLATES[name].encode(row(ASKED, THOUGHT, AGAIN, PLAIN))
    text = learned(name, encoded)
    assert text.count("two and two") == 1
    assert text.index("two and two") < text.index("It is 4.") < text.index("Yes.")
    assert "2+2" not in text
    assert "Sure" not in text


@pytest.mark.parametrize("name", FAMILIES)
def test_with_the_last_reasoning_alone_earlier_turns_look_as_at_inference(name: str) -> None:
    chat = TOKENIZERS[name]
    last = {"role": "assistant", "content": "<think>once more</think>Yes."}
    encoded = Template(chat, 4096, reasoning="last").encode(row(ASKED, THOUGHT, AGAIN, last))
    shown = {**THOUGHT, "content": "It is 4."}
    options = {"thinking": True} if name == "switched" else {}
    prompt = chat.apply_chat_template([ASKED, shown, AGAIN], add_generation_prompt=True, tokenize=True, **options)
    assert first_prompt(encoded) == list(prompt["input_ids"])
    assert "once more" in rendered(name, encoded)
    assert "two and two" not in rendered(name, encoded)
    assert "It is 4." not in learned(name, encoded)


def test_a_turn_without_thought_closes_the_one_that_the_prompt_opens() -> None:
    encoded = TEMPLATES["r1"].encode(row(ASKED, PLAIN))
    assert rendered("r1", encoded).endswith("<|Assistant|><think>\n\n</think>\n\nYes.<|eos|>")
    assert learned("r1", encoded) == "\n</think>\n\nYes.<|eos|>"


def test_a_newline_at_the_border_is_not_joined_with_the_prompts() -> None:
    # The tokenizer has a token of two newlines; at inference the prompt has ended before the second.
    encoded = TEMPLATES["r1"].encode(row(ASKED, PLAIN))
    newline = TOKENIZERS["r1"].encode("\n", add_special_tokens=False)
    assert encoded.ids[int(np.argmax(encoded.counted))] == newline[0]


def test_the_empty_thought_of_qwen3s_last_turn_is_kept() -> None:
    encoded = TEMPLATES["qwen3"].encode(row(ASKED, PLAIN))
    assert learned("qwen3", encoded) == "<think>\n\n</think>\n\nYes.<|im_end|>"


def test_the_models_own_markers_are_used() -> None:
    chat = tokenizer(CHATML, "<|im_end|>")
    chat.has_thinking, chat.think_start, chat.think_end = True, "<reason>", "</reason>"
    encoded = Template(chat, 4096).encode(row(ASKED, THOUGHT))
    assert "<reason>\ntwo and two\n</reason>\n\nIt is 4." in chat.decode(encoded.ids)


def test_a_tool_call_is_learned_and_its_result_is_not() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}
    encoded = TEMPLATES["qwen2.5"].encode(row(ASKED, call, {"role": "tool", "content": "four"}, PLAIN))
    text = learned("qwen2.5", encoded)
    assert '"add"' in text
    assert text.endswith("Yes.<|im_end|>")
    assert "four" not in text
    assert "four" in rendered("qwen2.5", encoded)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("marker", ["<|im_end|>", "<|eos|>", "<|end|>", "<|start|>", "<|eot_id|>"])
def test_special_tokens_in_what_somebody_wrote_stay_text(name: str, marker: str) -> None:
    asked = {"role": "user", "content": f"a {marker} b"}
    answer = {"role": "assistant", "content": f"<think>{marker}</think>c {marker}."}
    clean = TEMPLATES[name].encode(row({**asked, "content": "a b"}, {**answer, "content": "<think>x</think>c."}))
    encoded = TEMPLATES[name].encode(row(asked, answer))
    special = set(TOKENIZERS[name].get_added_vocab().values())
    assert [i for i in encoded.ids if i in special] == [i for i in clean.ids if i in special]
    assert rendered(name, encoded).count(f"a {marker} b") == 1
    assert f"c {marker}." in learned(name, encoded)


def test_a_thinking_marker_in_a_question_stays_text() -> None:
    for name in ("r1", "chatml", "qwen3"):
        encoded = TEMPLATES[name].encode(row({"role": "user", "content": "why <think>?"}, PLAIN))
        think = TOKENIZERS[name].convert_tokens_to_ids("<think>")
        counts = {"r1": 1, "chatml": 0, "qwen3": 1}
        assert list(encoded.ids).count(think) == counts[name]


text = st.text(min_size=1, max_size=60).filter(lambda t: t.strip()) | st.lists(
    st.sampled_from(
        ["<think>", "</think>", "<|im_end|>", "<|eos|>", "\n", " ", "the", "é", "漢", "👩‍🚀", "zq1aqz", "{{", "'"]
    ),
    min_size=1,
    max_size=8,
).map("".join).filter(lambda t: t.strip())


@settings(max_examples=40, deadline=None)
@given(asked=text, thought=text, answer=text, again=text, name=st.sampled_from(sorted(FAMILIES)))
def test_any_contents_come_out_whole_or_not_at_all(
    asked: str, thought: str, answer: str, again: str, name: str
) -> None:
    thought = thought.replace("</think>", "").strip() or "hm"
    turns = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": f"<think>{thought}</think>{answer.strip()}"},
        {"role": "user", "content": again},
        PLAIN,
    ]
    encoding = TEMPLATES[name].encode_all([row(ASKED, PLAIN), row(*turns)])
    if encoding.dropped:
        # Templates that look for the end of a thought change a content that has it.
        assert "changes what is in this conversation" in encoding.dropped[0].reason
        assert "</think>" in answer
        return
    encoded = encoding.documents[1]
    said = TOKENIZERS[name].decode(encoded.ids[encoded.counted])
    assert thought in said
    assert answer.strip() in said
    whole = TOKENIZERS[name].decode(encoded.ids)
    kept = str.strip if name == "llama3" else str
    assert kept(asked) in whole
    assert kept(again) in whole
    if not any(marker in asked for marker in TOKENIZERS[name].get_added_vocab()):
        options = {"thinking": True} if name == "switched" else {}
        ids = TOKENIZERS[name].apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=True, **options)[
            "input_ids"
        ]
        assert first_prompt(encoded) == list(ids)


def test_contents_are_trimmed_where_the_template_does() -> None:
    spaced = row({"role": "user", "content": " \n hello \n"}, {"role": "assistant", "content": "\n hi  "})
    assert "<|end_header_id|>\n\nhello<|eot_id|>" in rendered("llama3", TEMPLATES["llama3"].encode(spaced))
    assert learned("llama3", TEMPLATES["llama3"].encode(spaced)) == "hi<|eot_id|>"
    assert learned("chatml", TEMPLATES["chatml"].encode(spaced)) == "\n hi  <|im_end|>"


def test_a_conversation_that_the_template_refuses_is_named() -> None:
    with pytest.raises(FormatError, match=r"test, line 1: .*Roles must take turns"):
        TEMPLATES["mistral"].encode(row(ASKED, AGAIN, PLAIN))


def test_a_row_without_an_answer_is_named() -> None:
    with pytest.raises(FormatError, match=r"test, line 1: .*no assistant turn"):
        TEMPLATES["chatml"].encode(row(ASKED))


def test_a_template_that_drops_answers_is_refused() -> None:
    chat = tokenizer("{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}")
    with pytest.raises(UsageError, match="leaves an assistant's content out"):
        Template(chat, 64).encode(row(ASKED, PLAIN))


def test_half_a_character_is_named() -> None:
    encoding = TEMPLATES["chatml"].encode_all([row({"role": "user", "content": "\ud800"}, PLAIN), row(ASKED, PLAIN)])
    assert len(encoding.documents) == 1
    assert "half a character" in encoding.dropped[0].reason


class TestLength:
    def test_a_prompt_that_leaves_no_room_is_dropped_with_its_reason(self) -> None:
        template = Template(tokenizer(CHATML, "<|im_end|>"), 40)
        long = row({"role": "user", "content": "x" * 200}, PLAIN)
        encoding = template.encode_all([row({**ASKED, "content": "q"}, PLAIN), long])
        assert [len(encoding.documents), len(encoding.dropped)] == [1, 1]
        assert "its prompt has" in encoding.dropped[0].reason
        assert any("1 of 2 rows are left out" in line for line in encoding.lines())

    def test_an_answer_that_loses_its_end_is_counted(self) -> None:
        template = Template(tokenizer(CHATML, "<|im_end|>"), 60)
        encoded = template.encode(row({**ASKED, "content": "q"}, {"role": "assistant", "content": "y" * 100}))
        whole = Template(template.tokenizer, 4096).encode(
            row({**ASKED, "content": "q"}, {"role": "assistant", "content": "y" * 100})
        )
        assert len(encoded) == 60
        assert encoded.cut == len(whole) - 60
        assert list(encoded.ids) == list(whole.ids[:60])

    def test_a_prompt_is_cut_from_the_left_where_asked_for(self) -> None:
        chat = tokenizer(CHATML, "<|im_end|>")
        template = Template(chat, 80, cut_prompt=True)
        system = {"role": "system", "content": "Be kind."}
        encoded = template.encode(row(system, {"role": "user", "content": "x" * 200 + " and the end?"}, PLAIN))
        text = chat.decode(encoded.ids)
        assert len(encoded) <= 80
        assert encoded.prompt_cut > 0
        assert "Be kind." in text
        assert "the end?<|im_end|>" in text
        assert text.endswith("Yes.<|im_end|>")

    def test_nothing_left_at_all_is_an_error(self) -> None:
        template = Template(tokenizer(CHATML, "<|im_end|>"), 10)
        with pytest.raises(FormatError, match="None of the 2 rows gives anything to learn"):
            template.encode_all([row(ASKED, PLAIN), row(ASKED, THOUGHT)])

    def test_a_long_text_becomes_several_documents_and_loses_nothing(self) -> None:
        chat = tokenizer(CHATML, "<|im_end|>")
        encoding = Template(chat, 50).encode_all([Row("t, line 1", None, "abc " * 60)])
        assert all(len(document) <= 50 for document in encoding.documents)
        assert "".join(chat.decode(document.ids) for document in encoding.documents) == "abc " * 60 + "<|im_end|>"


class TestWithoutChatTemplate:
    def test_a_prompt_and_its_completion_follow_each_other(self) -> None:
        chat = tokenizer(None)
        encoded = Template(chat, 4096).encode(row({**ASKED, "content": "2+2="}, {**PLAIN, "content": "4"}))
        assert chat.decode(encoded.ids) == "2+2=4<|eos|>"
        assert chat.decode(encoded.ids[encoded.counted]) == "4<|eos|>"

    def test_turns_are_refused(self) -> None:
        with pytest.raises(FormatError, match="no chat template"):
            Template(tokenizer(None), 64).encode(row(ASKED, PLAIN, AGAIN, PLAIN))


def test_a_preference_row_gives_a_pair_with_the_same_prompt() -> None:
    template = TEMPLATES["chatml"]
    chosen, rejected = template.encode_pair(row(ASKED, chosen=[THOUGHT], rejected=[PLAIN]))
    assert first_prompt(chosen) == first_prompt(rejected)
    assert learned("chatml", rejected) == "Yes.<|im_end|>"
    assert "two and two" in learned("chatml", chosen)


def test_settings_that_make_no_sense_are_refused() -> None:
    chat = tokenizer(CHATML)
    with pytest.raises(UsageError, match="2 tokens or more"):
        Template(chat, 1)
    with pytest.raises(UsageError, match='"all" or "last"'):
        Template(chat, 64, reasoning="some")


@pytest.mark.parametrize("name", ["nano-moe", "nano-dense"])
def test_the_nano_models_see_what_they_see_at_inference(name: str) -> None:
    from mlx_lm.utils import load_tokenizer

    folder = Path(__file__).parents[1] / "recipes" / "nano" / "weights" / name
    chat = load_tokenizer(folder)
    encoded = Template(chat, 512).encode(row(ASKED, THOUGHT))
    prompt = chat.apply_chat_template([ASKED], tokenize=False, add_generation_prompt=True)
    assert first_prompt(encoded) == chat.encode(prompt, add_special_tokens=False)
    ends = json.loads((folder / "tokenizer_config.json").read_text())["eos_token"]
    end = ends["content"] if isinstance(ends, dict) else ends
    assert chat.decode(encoded.ids[encoded.counted]) == f"two and two\n</think>\n\nIt is 4.{end}"
