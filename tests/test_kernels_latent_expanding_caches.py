"""Caches of latents where mlx-lm caches keys and values: they do what mlx-lm's do, and plans count them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core")

import families  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.models import deepseek_v2  # noqa: E402
from mlx_lm.models.cache import (  # noqa: E402
    BatchKVCache,
    QuantizedKVCache,
    RotatingKVCache,
    load_prompt_cache,
    make_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)
from test_kernels_latent import YARN  # noqa: E402
from test_kernels_latent_expanding import (  # noqa: E402
    FAMILIES,
    config_of,
    greedy,
    installed,
    model_of,
    passes,
    same,
)
from tiny import write_tokenizer  # noqa: E402

import edger1  # noqa: E402
from edger1.kernels import latent  # noqa: E402
from edger1.kernels.latent_expanding import planned  # noqa: E402
from edger1.kv_layout import kv_layout  # noqa: E402
from edger1.loader import LiveModel, load  # noqa: E402


def test_a_cache_holds_a_latent_and_a_key_a_token() -> None:
    model = model_of()
    caches, ours = make_prompt_cache(model), make_prompt_cache(model)
    mx.eval(model(mx.array([list(range(40))]), cache=caches))
    with installed(model):
        mx.eval(model(mx.array([list(range(40))]), cache=ours))
    assert [c.keys.shape[-1] for c in ours] == [64] * 3
    assert [c.values.shape[-1] for c in ours] == [16] * 3
    # Of keys and values 6 * (32 + 16 + 48) elements a token, of latents 64 + 16.
    assert sum(c.nbytes for c in ours) * 6 * 96 == sum(c.nbytes for c in caches) * 80


def test_caches_are_trimmed_copied_and_saved(tmp_path: Path) -> None:
    model = model_of()
    with installed(model):
        caches = make_prompt_cache(model)
        model(mx.array([list(range(30))]), cache=caches)
        after = [model(mx.array([[t]]), cache=caches) for t in (5, 6, 7)]
        mx.eval(after)
        assert trim_prompt_cache(caches, 3) == 3
        save_prompt_cache(str(tmp_path / "cache.safetensors"), caches)
        for again in (copy.deepcopy(caches), load_prompt_cache(str(tmp_path / "cache.safetensors")), caches):
            for t, expected in zip((5, 6, 7), after, strict=True):
                assert mx.array_equal(model(mx.array([[t]]), cache=again), expected)


def test_a_cache_of_keys_and_values_goes_on_as_it_began(tmp_path: Path) -> None:
    model = model_of()
    caches = make_prompt_cache(model)
    model(mx.array([list(range(30))]), cache=caches)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), caches)
    expected = model(mx.array([[5, 6, 7]]), cache=caches)
    with installed(model):
        for again in (load_prompt_cache(str(tmp_path / "cache.safetensors")), caches):
            trim_prompt_cache(again, again[0].offset - 30)
            found = model(mx.array([[5, 6, 7]]), cache=again)
            assert families.relative_error(found, expected) <= 1e-5
            assert again[0].keys.shape[1:] == (6, 256, 48)


def test_a_rotating_cache_turns() -> None:
    model = model_of()

    def run() -> list[Any]:
        caches = [RotatingKVCache(max_size=24, keep=4) for _ in model.layers]
        return passes(model, caches)

    expected = run()
    with installed(model):
        assert same(run(), expected)


def test_quantized_caches_keep_keys_or_latents_whichever_they_began_with() -> None:
    model = model_of(qk_rope_head_dim=32, v_head_dim=64)

    def run(caches: Any) -> Any:
        model(mx.array([list(range(30))]), cache=caches)
        return model(mx.array([[7]]), cache=caches)

    expected = run([QuantizedKVCache(32, 8) for _ in model.layers])
    plain = run(make_prompt_cache(model))
    with installed(model):
        caches = [QuantizedKVCache(32, 8) for _ in model.layers]
        # Rounding may turn into another code.
        assert families.relative_error(run(caches), expected) <= 5e-3
        assert caches[0].keys[0].shape[1] == 6
        caches = make_prompt_cache(model)
        model(mx.array([list(range(30))]), cache=caches)
        caches = [c.to_quantized(32, 8) for c in caches]
        assert families.relative_error(model(mx.array([[7]]), cache=caches), plain) <= 0.05
        assert caches[0].keys[0].shape[1] == 1


def test_a_batch_computes_what_its_rows_do() -> None:
    model = model_of()
    prompts = [list(range(3, 33)), list(range(90, 103)), [4, 5]]
    expected = [greedy(model, 12, prompt) for prompt in prompts]
    with installed(model):
        alone = [make_prompt_cache(model) for _ in prompts]
        first = [greedy(model, 1, p, c) for p, c in zip(prompts, alone, strict=True)]
        merged = [BatchKVCache.merge(list(layer)) for layer in zip(*alone, strict=True)]
        said = [list(tokens) for tokens in first]
        for step in range(11):
            x = mx.array([[tokens[-1]] for tokens in said])
            logits = model(x, cache=merged)
            for tokens, row in zip(said, logits, strict=True):
                tokens.append(int(mx.argmax(row[-1]).item()))
            if step == 5:
                # One leaves, and comes back.
                left = [layer.extract(1) for layer in merged]
                for layer in merged:
                    layer.filter(mx.array([0, 2]))
                for layer, one in zip(merged, left, strict=True):
                    layer.extend(BatchKVCache.merge([one]))
                said = [said[0], said[2], said[1]]
        assert [said[0], said[2], said[1]] == expected


@pytest.mark.parametrize("window", [None, 16], ids=["BatchKVCache", "BatchRotatingKVCache"])
def test_mlx_lm_s_batch_generator_says_what_it_says_without_the_kernels(window: int | None) -> None:
    from mlx_lm.generate import BatchGenerator

    model = model_of()
    prompts = [list(range(3, 33)), list(range(90, 103)), [4, 5]]

    def run() -> list[list[int]]:
        generator = BatchGenerator(model, max_tokens=10, max_kv_size=window)
        said: dict[int, list[int]] = {name: [] for name in generator.insert(prompts)}
        while responses := generator.next_generated():
            for response in responses:
                said[response.uid].append(response.token)
        return list(said.values())

    expected = run()
    assert all(len(tokens) == 10 for tokens in expected)
    with installed(model):
        assert run() == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_counts_what_will_be_cached(family: str) -> None:
    model = families.build(family)
    with planned(model):
        foreseen = kv_layout(model, 4, 64)
    assert all("planned" not in type(m).__name__ for m in model.modules())
    with installed(model):
        assert kv_layout(model, 4, 64) == foreseen
    assert foreseen.nbytes(1000) < kv_layout(model, 4, 64).nbytes(1000)


def test_deepseek_v2_lite_keeps_a_ninth() -> None:
    lite = {
        "model_type": "deepseek_v2", "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16,
        "num_key_value_heads": 16, "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128, "v_head_dim": 128, "rope_scaling": YARN,
    }  # fmt: skip
    # Whole and random, and no weight of it is ever computed.
    model = deepseek_v2.Model(deepseek_v2.ModelArgs.from_dict(lite))
    keys = kv_layout(model, 2, step_tokens=16)
    with planned(model):
        latents = kv_layout(model, 2, step_tokens=16)
    per_token = [(layout.nbytes(2560) - layout.nbytes(1536)) / 1024 for layout in (keys, latents)]
    assert per_token == [27 * 16 * (192 + 128) * 2, 27 * (512 + 64) * 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "deepseek"
    folder.mkdir()
    model = model_of(vocab_size=300)
    # It says nothing but letters, so that its words are text: every other token's logit is 0.
    said = mx.array([[float(33 <= i < 90)] for i in range(300)])
    model.lm_head.scales, model.lm_head.biases = model.lm_head.scales * said, model.lm_head.biases * said
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    config = config_of(vocab_size=300) | {"quantization": {"group_size": 32, "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_tokenizer(folder)
    return folder


def loaded(folder: Path, ceiling_bytes: int = 8 << 30) -> LiveModel:
    steps = load("deepseek", folder, ceiling_bytes=ceiling_bytes, context=2048, precision="exact")
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            model: LiveModel = stop.value
            return model


def test_a_loaded_model_keeps_to_its_plan(folder: Path) -> None:
    live = loaded(folder)
    try:
        caches = make_prompt_cache(live.model)
        for _ in range(4):
            mx.eval(live.model(mx.zeros((1, 512), dtype=mx.int32), cache=caches))
        taken = sum(cache.nbytes for cache in caches)
        assert taken == 3 * 2048 * (64 + 16) * 4
        assert taken <= live.plan.kv_bytes < 2 * taken
    finally:
        live.close()


def test_where_a_layer_computes_something_else_the_plan_bears_keys_and_values(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = loaded(folder)
    latents = live.plan
    live.close()
    monkeypatch.setattr(latent, "_difference", lambda *_: "it computes something else")
    live = loaded(folder)
    live.close()
    assert live.plan.kv_bytes == latents.kv_bytes * 6 * 96 / 80
    assert live.kv._budget_bytes == live.plan.kv_bytes
    enough_for_latents = latents.total_bytes + (live.plan.kv_bytes - latents.kv_bytes) // 2
    with pytest.raises(edger1.MemoryCeilingError, match="--memory"):
        loaded(folder, enough_for_latents)


def test_the_engine_says_what_mlx_lm_says_and_keeps_its_caches(folder: Path) -> None:
    from mlx_lm.utils import load as load_with_mlx_lm

    reference, tokenizer = load_with_mlx_lm(str(folder))
    reference.set_dtype(mx.float32)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    expected = greedy(reference, 24, ids)
    with edger1.load(folder, precision="exact", context=2048) as model:
        answer = model.generate("Hello", max_tokens=24, temperature=0)
        assert answer.text == tokenizer.decode(expected)
        handles = [model.submit("Hello", max_tokens=24, temperature=0) for _ in range(3)]
        assert {handle.result(timeout_s=60).text for handle in handles} == {answer.text}
        chat = model.chat()
        chat.send("One", max_tokens=8, temperature=0)
        second = chat.send("Two", max_tokens=8, temperature=0)
        assert second.usage.cached_tokens > 0
    with edger1.load(folder, precision="exact", context=2048) as model:
        assert model.generate(chat.messages[:-1], max_tokens=8, temperature=0).text == second.text
