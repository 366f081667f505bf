"""KV caches at 8 and 4 bits: what is in them, what models make of them, what plans say of them."""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import families
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache, trim_prompt_cache
from tiny import write_tiny_model

import edger1
from edger1 import estimate, kernels, worker
from edger1.cache_parts import shrink
from edger1.folder import inspect
from edger1.kernels import install
from edger1.kv_layout import kv_layout
from edger1.memory import Plan
from edger1.packed_cache import PackedCache, QuantizedCache, ReadBackCache, packed, parts, unpacked
from edger1.quantized_kv import Quantization, choose

NANO_MOE = Path(estimate.__file__).parent / "assets" / "nano-moe"
needs_kernels = pytest.mark.skipif(not kernels.state().available, reason=f"CPU kernels: {kernels.state().reason}")
pytestmark = pytest.mark.filterwarnings("ignore:A context of")

STANDARD = ("llama", "qwen2", "qwen3", "qwen3_moe", "olmoe", "mixtral", "granite", "glm4_moe", "gemma3_text", "gpt_oss")
LATENT = ("deepseek_v3", "glm4_moe_lite")
PASSES = (30, 1, 16, 40, 1)


@contextmanager
def on_kernels(model: Any, *, wanted: bool = True) -> Iterator[None]:
    installed = install.install(model, "exact") if wanted else None
    try:
        yield
    finally:
        if installed is not None:
            installed.uninstall()


def rounded(rows: mx.array, bits: int, group_size: int) -> mx.array:
    """Quantize rows as their definition says it, in NumPy, and read them back."""
    w = np.array(rows.astype(mx.float32)).astype(np.float16).astype(np.float32)
    w = w.reshape(*w.shape[:-1], -1, group_size)
    least, most, bins = w.min(-1, keepdims=True), w.max(-1, keepdims=True), np.float32(2**bits - 1)
    edge = np.where(abs(least) > abs(most), least, most)
    sign = np.where(abs(least) > abs(most), np.float32(1), np.float32(-1))
    scale = np.maximum((most - least) / bins, np.float32(1e-7)) * sign
    steps = np.rint(edge / scale)
    scale, bias = np.where(steps == 0, scale, edge / np.where(steps == 0, 1, steps)), np.where(steps == 0, 0, edge)
    codes = np.clip(np.rint((w - bias) / scale), 0, bins)
    return mx.array((codes * scale.astype(np.float16) + bias).reshape(rows.shape).astype(np.float32))


class Rounded(KVCache):
    """mlx-lm's cache in f32, of rows that were rounded: what a quantized cache should come to."""

    def __init__(self, like: PackedCache) -> None:
        super().__init__()
        self.format, self.plain_values = like.format, like.plain_values

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> Any:
        kept = values.astype(mx.float16).astype(mx.float32) if self.plain_values else rounded(values, *self.format)
        return super().update_and_fetch(rounded(keys, *self.format), kept)


def run(model: Any, caches: list[Any], passes: Sequence[int] = PASSES) -> list[mx.array]:
    tokens, out = iter(range(5, 10**6, 7)), []
    for length in passes:
        out.append(model(mx.array([[next(tokens) % 190 for _ in range(length)]]), cache=caches))
        mx.eval(out[-1], [cache.state for cache in caches])
    return out


def difference(ours: list[mx.array], theirs: list[mx.array]) -> float:
    """Relative RMS of nine rows of ten: where a router just so chooses another expert, a row is another one."""
    a, b = (mx.concatenate([each[0] for each in side]) for side in (ours, theirs))
    errors = mx.linalg.norm(a - b, axis=-1) / mx.linalg.norm(b, axis=-1)
    return float(mx.sort(errors)[errors.size * 9 // 10].item())


def quantization_of(model: Any, bits: int) -> Quantization:
    found = choose(model, bits, "m")
    assert found is not None
    return found


@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=needs_kernels)])
@pytest.mark.parametrize(("bits", "group"), [(8, 64), (8, 32), (4, 64), (4, 32)])
def test_rows_are_what_mlx_makes_of_them(bits: int, group: int, kernel: bool) -> None:
    mx.random.seed(bits + group)
    rows = mx.random.normal((2, 3, 17, 128)) * mx.exp(3 * mx.random.normal((2, 3, 17, 1)))
    rows[0, 0, 0], rows[0, 0, 1, 5], rows[0, 0, 2, 7], rows[1, 1, 3] = 0, 1e9, -1e9, 2.5
    with on_kernels(families.skeleton("llama"), wanted=kernel):
        for given in (rows, rows.swapaxes(1, 2), rows.astype(mx.bfloat16), rows[..., ::2] if group == 64 else rows):
            held = packed(given, bits, group)
            assert held.shape == (*given.shape[:-1], given.shape[-1] * bits // 32 + given.shape[-1] // group)
            narrow = mx.clip(given.astype(mx.float32), -65504, 65504).astype(mx.float16).astype(mx.float32)
            for found, expected in zip(parts(held, bits, group), mx.quantize(narrow, group, bits), strict=True):
                assert mx.array_equal(found, expected.astype(found.dtype))
            error = mx.abs(unpacked(held, bits, group, mx.float32) - rounded(narrow, bits, group))
            assert error.max().item() <= 1e-6 * mx.abs(narrow).max().item()


@pytest.mark.parametrize("kind", [QuantizedCache, ReadBackCache])
def test_a_cache_holds_what_it_was_given_and_grows(kind: type[PackedCache]) -> None:
    mx.random.seed(0)
    cache, like, whole = kind(32, 8), KVCache(), []
    assert cache.empty()
    assert (cache.nbytes, cache.size()) == (0, 0)
    for length in (200, 1, 60, 300, 1):
        k, v = mx.random.normal((1, 2, length, 64)), mx.random.normal((1, 2, length, 96))
        whole.append((k, v))
        like.update_and_fetch(k, v)
        found = cache.update_and_fetch(k, v)
        expected = [rounded(mx.concatenate([pair[i] for pair in whole], axis=2), 8, 32) for i in (0, 1)]
        for side, right in zip(found, expected, strict=True):
            numbers = side if isinstance(side, mx.array) else mx.dequantize(*side, group_size=32, bits=8)
            assert mx.allclose(numbers, right, rtol=1e-2, atol=5e-3)
    assert cache.size() == 562
    capacity = like.keys.shape[2]
    assert cache.nbytes == 2 * capacity * (64 + 96) * (1 + 4 / 32)


def test_a_cache_is_trimmed_copied_and_kept_as_state() -> None:
    mx.random.seed(0)
    rows = [mx.random.normal((1, 2, 300, 64)) for _ in range(2)]
    for kind in (QuantizedCache, ReadBackCache):
        cache = kind(64, 4)
        cache.update_and_fetch(*rows)
        twin, again = copy.deepcopy(cache), kind.from_state(cache.state)
        assert cache.is_trimmable()
        assert cache.trim(15) == 15
        assert cache.make_mask(3, return_array=True, window_size=None).shape == (3, 288)
        # What is written over what was trimmed off is nobody else's matter.
        before = mx.array(twin.keys)
        for each in (cache, twin, again):
            each.offset = 25
        for each in (cache, again):
            each.update_and_fetch(rows[1][:, :, :1], rows[0][:, :, :1])
        assert mx.array_equal(twin.keys, before)
        assert mx.array_equal(cache.keys[..., :26, :], again.keys[..., :26, :])
        held = [cache]
        shrink(held, 26)
        (cache,) = held
        assert cache.keys.shape[2] == cache.values.shape[2] == 26
        assert trim_prompt_cache([cache], 100) == 26
        assert cache.size() == 0


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=needs_kernels)])
@pytest.mark.parametrize("family", [*STANDARD, *LATENT])
def test_a_model_says_what_it_says_over_rounded_rows(family: str, kernel: bool, bits: int) -> None:
    model = families.build(family)
    quantization = quantization_of(model, bits)
    reference = [Rounded(cache) if isinstance(cache, PackedCache) else cache for cache in quantization.caches(model)]
    expected, plain = run(model, reference), run(model, make_prompt_cache(model))
    lost = difference(expected, plain)
    with on_kernels(model, wanted=kernel):
        caches = quantization_of(model, bits).caches(model)
        found = run(model, caches)
    assert any(isinstance(cache, PackedCache) for cache in caches)
    # Float rounding turns a few numbers into the next code: far less than is lost.
    assert difference(found, expected) <= 0.35 * lost
    assert 1e-4 <= lost <= (0.05 if bits == 8 else 0.5)


@needs_kernels
@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_row_among_sixteen_has_the_bits_that_it_has_alone(family: str) -> None:
    model = families.build(family, quantize=True)
    with on_kernels(model):
        quantization = quantization_of(model, 8)
        together, alone = (quantization.caches(model) for _ in range(2))
        for caches in (together, alone):
            run(model, caches, [250])
        # A window that goes round is no matter of this.
        tokens = list(range(16)) if family != "gpt_oss" else list(range(4))
        found = model(mx.array([tokens]), cache=together)
        rows = [model(mx.array([[token]]), cache=alone) for token in tokens]
        for i, row in enumerate(rows):
            if not any(isinstance(cache, RotatingKVCache) for cache in alone):
                assert mx.array_equal(found[:, i : i + 1], row)
            else:
                assert families.relative_error(found[:, i : i + 1], row) <= 1e-4


@needs_kernels
def test_few_rows_pass_as_one_operation_over_packed_rows() -> None:
    model = families.build("qwen2")
    with on_kernels(model):
        caches = quantization_of(model, 8).caches(model)
        run(model, caches, [20])
        calls = []
        for cache in caches:
            cache.append = lambda *_, calls=calls: calls.append(1)
        run(model, caches, [1, 16])
        assert calls == []
        assert caches[0].offset == 37


@pytest.mark.parametrize("family", [*STANDARD, *LATENT, "qwen3_next"])
def test_a_plan_counts_the_bytes_of_the_arrays(family: str) -> None:
    model = families.build(family)
    for bits in (8, 4):
        quantization = quantization_of(model, bits)
        layout = kv_layout(model, 4, 100, quantization)
        assert layout.layers[0] != kv_layout(model, 4, 100).layers[0] or quantization.groups[0] is None
        for tokens in (100, 500):
            caches = quantization.caches(model)
            for _ in range(tokens // 100):
                # Never evaluated: the shapes are enough.
                model(mx.zeros((1, 100), dtype=mx.int32), cache=caches)
            grown = [
                (layer, cache)
                for layer, cache in zip(layout.layers, caches, strict=True)
                if isinstance(cache, PackedCache)
            ]
            for layer, cache in grown:
                assert cache.nbytes == layer.bytes_per_token * cache.keys.shape[2]
            assert sum(cache.nbytes for _, cache in grown) <= layout.nbytes(tokens)


def test_deepseek_r1_keeps_70272_bytes_a_token_and_42944_at_8_bits() -> None:
    deepseek_v3 = importlib.import_module("mlx_lm.models.deepseek_v3")
    r1 = {
        "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128, "v_head_dim": 128,
    }  # fmt: skip
    # Whole and random, and no weight of it is ever computed.
    model = deepseek_v3.Model(deepseek_v3.ModelArgs.from_dict(r1))
    for bits, expected in ((None, 70_272), (8, 61 * (512 + 512 // 8 + 2 * 64)), (4, 61 * (256 + 512 // 8 + 2 * 64))):
        layout = kv_layout(model, 2, 16, choose(model, bits, "R1"))
        assert (layout.nbytes(2560) - layout.nbytes(1536)) / 1024 == expected


def test_what_cannot_be_quantized_is_said() -> None:
    for bits in (5, 16, 0, True, "8"):
        with pytest.raises(edger1.UsageError, match=r"kv_bits is .*expected 8.*or 4"):
            choose(families.skeleton("llama"), bits, "m")  # type: ignore[arg-type]
    with pytest.raises(edger1.UsageError, match=r"no KV cache of state .*ArraysCache"):
        choose(families.skeleton("mamba"), 8, "state")
    module = importlib.import_module("mlx_lm.models.llama")
    odd = module.Model(module.ModelArgs.from_dict(families.tiny_config("llama") | {"head_dim": 80}))
    with pytest.raises(
        edger1.UsageError, match=r"odd cannot be quantized: its heads have 80 .* multiple of 32 .*Leave"
    ):
        choose(odd, 8, "odd")


def test_what_stays_as_it_is_is_told() -> None:
    said = quantization_of(families.skeleton("gpt_oss"), 4).describe()
    assert said.startswith("4 bits in groups of 32; not quantized: 1 with a window of ")
    assert "rotated keys in 16 bits" in quantization_of(families.skeleton("deepseek_v3"), 8).describe()


# Loaded models


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(
        tmp_path_factory.mktemp("models") / "wide", hidden_size=128, max_position_embeddings=8192, num_hidden_layers=3
    )


PROMPTS = [f"{chr(65 + i)} story of {'many ' * (3 * i)}words" for i in range(5)]


def test_a_loaded_model_says_how_it_caches_and_keeps_to_its_plan(folder: Path) -> None:
    with edger1.load(folder, context=2048, kv_bits=8) as model:
        assert model.info["kv_bits"] == model.plan.kv_bits == 8
        assert model.info["kv_cache"] == model.plan.kv_note == "8 bits in groups of 32"
        assert model.generate(PROMPTS[0], max_tokens=12, temperature=0).usage.completion_tokens == 12
        quantized = model.plan
    with edger1.load(folder, context=2048) as model:
        assert (model.info["kv_bits"], model.info["kv_cache"]) == (None, "")
        assert quantized.kv_bytes == model.plan.kv_bytes * (8 + 1) // 32 if not _on_gpu() else True
        assert json.loads(json.dumps(model.info["plan"]))["kv_bits"] is None
    assert edger1.plan(folder, context=2048, kv_bits=8).kv_bytes == quantized.kv_bytes
    assert Plan.from_json(json.loads(json.dumps(quantized.__dict__))) == quantized


def _on_gpu() -> bool:
    return mx.default_device().type == mx.gpu


def test_a_longer_context_fits_under_the_same_ceiling(folder: Path) -> None:
    ceiling = edger1.plan(folder, context=8192, kv_bits=8).total_bytes
    assert edger1.plan(folder, context=8192, kv_bits=4).total_bytes < ceiling
    with edger1.load(folder, memory=ceiling, context=8192, kv_bits=8):
        pass
    with pytest.raises(edger1.MemoryCeilingError):
        edger1.load(folder, memory=ceiling, context=8192)


def test_an_estimate_is_the_plan(folder: Path) -> None:
    from edger1.building import build
    from edger1.planning import plan_model

    def planned(path: Path, bits: int) -> Plan:
        found = inspect(path)
        return plan_model(found, build(found, "m")[0], 10**10, None, kv_bits=bits)[0]

    for path in (folder, NANO_MOE):
        for bits in (8, 4):
            plan = worker.call(lambda path=path, bits=bits: planned(path, bits))
            found = estimate.of_folder(inspect(path), 10**10, kv_bits=bits)
            assert (found.kv_bytes, found.needs_bytes) == (plan.kv_bytes, plan.total_bytes)


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_requests_together_are_answered_as_alone(folder: Path, precision: str) -> None:
    def ask(model: Any, prompt: str) -> Any:
        return model.submit(prompt, raw=True, max_tokens=30, temperature=0.8, seed=3)

    with edger1.load(folder, precision=precision, context=8192, kv_bits=8) as model:
        alone = [ask(model, prompt).result(60).text for prompt in PROMPTS]
    with edger1.load(folder, precision=precision, context=8192, kv_bits=8) as model:
        assert [handle.result(60).text for handle in [ask(model, prompt) for prompt in PROMPTS]] == alone


def test_drafts_change_nothing_and_a_prefix_is_reused(folder: Path) -> None:
    text = "one two three four five six seven eight one two three four five six seven"
    with edger1.load(folder, precision="exact", context=2048, kv_bits=8, draft=folder) as model:
        plain = model.generate(text, raw=True, max_tokens=60, temperature=0, speculate="off")
        for source in ("lookup", "draft"):
            drafted = model.generate(text + " ", raw=True, max_tokens=1, temperature=0, speculate=source)
            drafted = model.generate(text, raw=True, max_tokens=60, temperature=0, speculate=source)
            assert drafted.text == plain.text
            assert drafted.usage.cached_tokens > 0
            assert drafted.figures.drafts["drafted"] > 0
    chat = []
    with edger1.load(folder, precision="exact", context=2048, kv_bits=8) as model:
        talk = model.chat()
        chat = [talk.send(word, max_tokens=8, temperature=0) for word in ("One", "Two")]
        assert chat[1].usage.cached_tokens > 0
        fork = talk.fork(at=1)
        again = fork.send("Two", max_tokens=8, temperature=0)
        assert again.text == chat[1].text


def test_latents_and_an_mtp_layer_s_drafts() -> None:
    question, options = "What is 317 + 485?", {"max_tokens": 40, "temperature": 0}
    with edger1.load(NANO_MOE, context=512, kv_bits=8) as model:
        assert model.info["kv_cache"] == "8 bits in groups of 32, rotated keys in 16 bits"
        plain = model.generate(question, speculate="off", **options)
        drafted = model.generate(question, speculate="mtp", **options)
        assert (drafted.text, drafted.thinking) == (plain.text, plain.thinking)
        assert drafted.figures.drafts["accepted"] > 0
        handles = [model.submit(question, **options) for _ in range(2)]
        assert {(h.result(60).text, h.result(60).thinking) for h in handles} == {(plain.text, plain.thinking)}
        scores = model.score(list(range(300)))
    with edger1.load(NANO_MOE, context=512) as model:
        plain = model.score(list(range(300)))
    assert np.abs(np.array(scores) - np.array(plain)).mean() < 0.3
    assert scores != plain


def test_bad_bits_and_heads_are_refused(folder: Path, tiny_folder: Path) -> None:
    with pytest.raises(edger1.UsageError, match=r"kv_bits is 5; expected 8"):
        edger1.load(folder, kv_bits=5)
    with pytest.raises(edger1.UsageError, match=r"kv_bits is 5; expected 8"):
        edger1.plan(folder, kv_bits=5)
    # Heads of 16 elements.
    for open_model in (edger1.load, edger1.plan):
        with pytest.raises(edger1.UsageError, match=r"heads have 16 elements, and a multiple of 32"):
            open_model(tiny_folder, kv_bits=8)


def test_the_command_line_takes_and_tells_it(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from edger1.cli import app

    monkeypatch.setenv("EDGER1_HOME", str(tmp_path))
    asked = ["run", str(folder), "Hello", "--raw", "--max-tokens", "3", "--context", "512", "--json"]

    def told(*more: str) -> Any:
        return json.loads(CliRunner().invoke(app, [*asked, *more]).stdout)

    assert told("--kv-bits", "8")["kv_bits"] == 8
    assert told("--kv-bits", "4")["kv_cache"] == "4 bits in groups of 32"
    (tmp_path / "config.toml").write_text("kv_bits = 4\n")
    assert told()["kv_bits"] == 4
    assert told("--kv-bits", "off")["kv_bits"] is None
    shown = CliRunner().invoke(app, ["plan", str(folder), "--kv-bits", "8", "--context", "512"]).stdout
    assert ", 8 bits in groups of 32" in shown
    refused = CliRunner().invoke(app, [*asked, "--kv-bits", "6"])
    assert refused.exit_code != 0
