"""What requests share is prefilled once, in models of every kind of cache."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import spoken_ids, write_mixture, write_tiny_model, write_tokenizer

import edger1

SYSTEM = " ".join(f"Rule {i}: be brief." for i in range(60))[:1000]


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Iterator[edger1.Model]:
    with edger1.load(tiny_folder, precision="exact", context=8_000) as loaded:
        yield loaded


def test_three_conversations_take_turns_and_prefill_only_what_is_new(model: edger1.Model) -> None:
    chats = [model.chat(system=SYSTEM) for _ in range(3)]
    fed = [0, 0, 0]
    for turn in range(3):
        for i, chat in enumerate(chats):
            said = f"{'ABC'[i] * 20} {turn}"
            answer = chat.send(said, max_tokens=12, temperature=0).usage
            assert answer.prefilled_tokens == answer.prompt_tokens - answer.cached_tokens
            if turn:
                assert answer.cached_tokens == fed[i]
                # What the template puts between two answers, what was said, and what the last answer ended with.
                assert answer.prefilled_tokens < len(said) + 45
            elif i:
                assert answer.cached_tokens >= 1000
                assert answer.prefilled_tokens < len(said) + 45
            fed[i] = answer.prompt_tokens + answer.completion_tokens - 1


def test_a_conversation_that_was_forked_finds_what_came_before(model: edger1.Model) -> None:
    chat = model.chat(system=f"Fork. {SYSTEM}")
    first = chat.send("One", max_tokens=8, temperature=0).usage
    chat.send("Two", max_tokens=8, temperature=0)
    for word in ("Three", "Four"):
        fork = chat.fork(at=1)
        assert fork.send(word, max_tokens=4, temperature=0).usage.cached_tokens >= first.prompt_tokens + 7


def test_what_is_found_again_changes_no_answer(tiny_folder: Path) -> None:
    asked = [
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": word}] for word in ("One", "Two", "One")
    ]
    with edger1.load(tiny_folder, precision="exact", context=4_000) as warm:
        answers = [warm.generate(messages, max_tokens=16, temperature=0) for messages in asked]
        # Others were asked in between, and what is kept was cut and joined.
        answers += [warm.generate(messages, max_tokens=16, temperature=0) for messages in asked]
    expected = []
    for messages in asked[:2]:
        with edger1.load(tiny_folder, precision="exact", context=4_000) as cold:
            expected.append(cold.generate(messages, max_tokens=16, temperature=0).text)
    assert [answer.text for answer in answers] == [expected[i] for i in (0, 1, 0, 0, 1, 0)]
    assert all(answer.usage.cached_tokens > 1000 for answer in answers[1:])


def test_conversations_that_do_not_fit_together_lose_the_oldest_one(tiny_folder: Path) -> None:
    # Room for 1,300 tokens and a step: two conversations that share nothing fit, and three do not.
    with edger1.load(tiny_folder, precision="exact", context=1300) as small:
        for name in "ABC":
            small.generate(name * 500, max_tokens=2, temperature=0)
        again = [small.generate(name * 500, max_tokens=2, temperature=0).usage.cached_tokens for name in "CBA"]
    assert again[0] > 500
    assert again[1] > 500
    assert again[2] < 50


WINDOWED = {
    "model_type": "gemma3_text",
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 260,
    "rms_norm_eps": 1e-6,
    "sliding_window": 64,
    "sliding_window_pattern": 2,
    "query_pre_attn_scalar": 16,
    "rope_theta": 10000.0,
    "rope_local_base_freq": 10000.0,
    "max_position_embeddings": 2048,
    "eos_token_id": 257,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose every second layer sees the last 64 tokens only."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import gemma3_text

    folder = tmp_path_factory.mktemp("models") / "windowed"
    folder.mkdir()
    mx.random.seed(3)
    model = gemma3_text.Model(gemma3_text.ModelArgs.from_dict(WINDOWED))
    # Printable ASCII only, so that what it says is text.
    spoken = mx.zeros((WINDOWED["vocab_size"], 1))
    spoken[mx.array(spoken_ids())] = 1
    model.lm_head.weight = model.lm_head.weight * spoken
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(WINDOWED), encoding="utf-8")
    write_tokenizer(folder)
    return folder


def test_a_window_is_reused_where_that_is_right_and_nowhere_else(windowed: Path) -> None:
    def ask(model: edger1.Model, text: str) -> tuple[str, int]:
        answer = model.generate(text, raw=True, max_tokens=12, temperature=0)
        return answer.text, answer.usage.cached_tokens

    short, long = "abcdefghij" * 3, "abcdefghij" * 12
    asked = [short, short[:20] + "xyz", long, long + "more", long[:100] + "xyz", long + "other"]
    with edger1.load(windowed, precision="exact") as warm:
        found = [ask(warm, text) for text in asked]
    expected = []
    for text in asked:
        with edger1.load(windowed, precision="exact") as cold:
            expected.append(ask(cold, text)[0])
    assert [text for text, _ in found] == expected
    cached = [count for _, count in found]
    # Not full, it gives tokens back.
    assert cached[1] == 20
    # Full, it has forgotten what came before: only a text that goes on from its very end could use it.
    assert cached[4] == 0


def test_a_conversation_goes_on_from_a_window_that_is_full(windowed: Path) -> None:
    with edger1.load(windowed, precision="exact") as warm:
        chat = warm.chat(system="s" * 200)
        first = chat.send("One", max_tokens=8, temperature=0).usage
        second = chat.send("Two", max_tokens=8, temperature=0)
        messages = chat.messages[:-1]
    assert second.usage.cached_tokens == first.prompt_tokens + first.completion_tokens - 1
    with edger1.load(windowed, precision="exact") as cold:
        alone = cold.generate([{"role": "system", "content": "s" * 200}, *messages], max_tokens=8, temperature=0)
    assert alone.usage.cached_tokens == 0
    assert alone.text == second.text


def test_a_window_comes_back_from_a_file(windowed: Path, tmp_path: Path) -> None:
    document = [{"role": "system", "content": "s" * 200}]
    asked = [*document, {"role": "user", "content": "One"}]
    with edger1.load(windowed, precision="exact") as model:
        written = model.save_prompt_cache(tmp_path / "c", document)
        here = model.generate(asked, max_tokens=8, temperature=0)
    with edger1.load(windowed, precision="exact") as model:
        model.load_prompt_cache(tmp_path / "c")
        there = model.generate(asked, max_tokens=8, temperature=0)
    assert (there.text, there.usage) == (here.text, here.usage)
    assert there.usage.cached_tokens == written.tokens > 200


def test_a_window_that_is_full_is_read_again_where_the_context_goes_on(windowed: Path) -> None:
    with edger1.load(windowed, precision="exact", context=128) as model:
        long = model.generate("Hello", raw=True, temperature=0, max_tokens=184, context_shift=True)
    with edger1.load(windowed, precision="exact", context=400) as model:
        first = model.generate("Hello", raw=True, temperature=0, max_tokens=123)
        kept = "Hello" + first.text[123 // 2 :]
        after = model.generate(kept, raw=True, temperature=0, max_tokens=128 - len(kept))
    assert long.text.startswith(first.text + after.text)


def test_streamed_experts_save_and_restore_what_resident_ones_do(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    folder = write_mixture(tmp_path / "m")
    asked = "abcdefghij" * 8
    said = set()
    with edger1.load(folder, precision="exact", expert_slots="50%") as model:
        model.save_prompt_cache(tmp_path / "c", asked, raw=True)
        said.add(model.generate(asked + "x", raw=True, max_tokens=8, temperature=0).text)
    for slots in ("50%", None):
        with edger1.load(folder, precision="exact", expert_slots=slots) as model:
            model.load_prompt_cache(tmp_path / "c")
            answer = model.generate(asked + "x", raw=True, max_tokens=8, temperature=0)
            assert answer.usage.cached_tokens == 80
            said.add(answer.text)
    assert len(said) == 1


def test_a_models_own_text_keeps_its_tokens_in_every_branch(tmp_path: Path) -> None:
    with edger1.load(write_tiny_model(tmp_path / "m"), precision="exact", context=2000) as model:
        chat = model.chat()
        chat.send("One", max_tokens=8, temperature=0)
        second = chat.send("Two", max_tokens=8, temperature=0)
        other = chat.fork(at=1).send("Two", max_tokens=8, temperature=0)
    assert other.text == second.text
    assert other.usage.prefilled_tokens == 1
