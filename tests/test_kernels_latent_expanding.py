"""Attention whose keys and values mlx-lm caches, on cached latents instead: it computes what it did."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from instruction_sets import check_on

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")

import families  # noqa: E402
from mlx.utils import tree_map  # noqa: E402
from mlx_lm.models import deepseek_v2  # noqa: E402
from mlx_lm.models.base import create_attention_mask  # noqa: E402
from mlx_lm.models.cache import (  # noqa: E402
    KVCache,
    make_prompt_cache,
)

from edger1 import kernels, runs  # noqa: E402

if not kernels.state().available or mx.default_device().type != mx.cpu:
    pytest.skip(f"CPU kernels: {kernels.state().reason}", allow_module_level=True)

from test_kernels_latent import SHAPES, YARN, Case, error  # noqa: E402

from edger1.kernels import _load  # noqa: E402
from edger1.kernels.install import Installed, install  # noqa: E402
from edger1.kernels.latent_expanding import layers_of  # noqa: E402

extension: Any = _load()[0]
FAMILIES = ("deepseek_v2", "minicpm3", "youtu_llm")
SIZES: dict[str, Any] = {
    "hidden_size": 192,
    "num_attention_heads": 6,
    "kv_lora_rank": 64,
    "q_lora_rank": None,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 48,
    "rope_scaling": YARN,
    "attention_bias": True,
}


@contextmanager
def installed(model: Any, precision: str = "exact") -> Iterator[Installed]:
    state = install(model, precision)
    try:
        yield state
    finally:
        state.uninstall()


# The operation


def rows_of(case: Case) -> np.ndarray:
    """Of each head the rows that make its keys, then those that make its values."""
    heads = case.shape[1]
    both = np.concatenate([case.embed.transpose(0, 2, 1), case.unembed], 1)
    return np.ascontiguousarray(both.reshape(heads * (case.nope + case.value), case.rank), np.float32)


def operation(case: Case, matrix: Any, quantization: Any = (), precision: str = "exact") -> Any:
    call = extension.LatentAttention(
        heads=case.shape[1], nope=case.nope, rope=case.rope, rank=case.rank, value=case.value, scale=case.scale,
        precision=precision,
    )  # fmt: skip
    if quantization:
        bits, group, mode = quantization
        parts = mx.quantize(matrix, group, bits, mode=mode)
        call.project("kv_b", parts[0], parts[1], parts[2] if mode == "affine" else None, None, group, bits, mode)
    else:
        call.project("kv_b", matrix)
    call.finish()
    return call


FORMATS = [(2, 32, "affine"), (3, 32, "affine"), (4, 64, "affine"), (5, 32, "affine"), (6, 64, "affine"),
           (8, 128, "affine"), (4, 32, "mxfp4")]  # fmt: skip


def check_shapes() -> None:
    """Hold plain matrices of every shape, and all that the kernels know of quantized ones, against NumPy in doubles."""
    for shape in SHAPES:
        case = Case(*shape)
        call = operation(case, mx.array(rows_of(case)))
        found = call.attend(*case.operands(), None, True)
        assert error(found, case.expected(case.causal())) <= 1e-5, shape
        found = call.attend(*case.operands(), mx.array(case.kept))
        assert error(found, case.expected(case.kept)) <= 1e-5, shape
    for bits, group, mode in FORMATS:
        for length in (1, 5, 16, 40, 300):
            case = Case(1, 3, length, 310, (24, 8, 256, 40))
            matrix = mx.array(rows_of(case))
            read = mx.dequantize(*mx.quantize(matrix, group, bits, mode=mode), group_size=group, bits=bits, mode=mode)
            heads = np.array(read.astype(mx.float32)).reshape(3, 64, 256)
            case.embed, case.unembed = heads[:, :24].transpose(0, 2, 1), heads[:, 24:]
            found = operation(case, matrix, (bits, group, mode)).attend(*case.operands(), None, True)
            assert error(found, case.expected(case.causal())) <= 1e-5, (bits, mode, length)
            fast = operation(case, matrix, (bits, group, mode), "fast").attend(*case.operands(), None, True)
            assert np.linalg.norm(np.array(fast - found)) <= 0.03 * np.linalg.norm(np.array(found)), (bits, mode)


def test_every_shape_and_format_agrees_with_numpy() -> None:
    check_shapes()


@pytest.mark.parametrize("name", extension.instruction_sets()[:-1])
def test_every_other_instruction_set_agrees_with_numpy(name: str) -> None:
    check_on(name, "test_kernels_latent_expanding", "check_shapes()")


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("quantization", [(), (4, 32, "affine"), (6, 32, "affine")], ids=["plain", "4 bits", "6 bits"])
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_do_not_depend_on_their_company_nor_on_threads(precision: str, quantization: Any, threads: int) -> None:
    before = extension.threads()
    case = Case(2, 5, 8, 300, (32, 16, 128, 32))
    call = operation(case, mx.array(rows_of(case)), quantization, precision)
    q_nope, q_pe, latent, k_pe = case.operands()
    try:
        extension.set_threads(1)
        alone = [
            [
                call.attend(
                    q_nope[b : b + 1, :, i : i + 1], q_pe[b : b + 1, :, i : i + 1],
                    latent[b : b + 1, :, : 293 + i], k_pe[b : b + 1, :, : 293 + i], None, True,
                )[0, 0]
                for i in range(8)
            ]
            for b in range(2)
        ]  # fmt: skip
        mx.eval(alone)
        extension.set_threads(threads)
        together = call.attend(q_nope, q_pe, latent, k_pe, None, True)
        assert mx.array_equal(together, mx.stack([mx.stack(rows) for rows in alone]))
    finally:
        extension.set_threads(before)


def test_a_matrix_that_does_not_fit_is_refused() -> None:
    case = Case(1, 4, 3, 9, (16, 8, 32, 16))
    fresh = extension.LatentAttention(heads=4, nope=16, rope=8, rank=32, value=16, scale=1.0)
    with pytest.raises(ValueError, match=r"expected \[128, 32\]"):
        fresh.project("kv_b", mx.array(rows_of(case)[:-1]))
    with pytest.raises(ValueError, match="with a bias"):
        fresh.project("kv_b", mx.array(rows_of(case)), bias=mx.zeros((128,)))
    with pytest.raises(ValueError, match="kv_b"):
        fresh.finish()


# Models


def passes(model: Any, caches: Any = None) -> list[Any]:
    """Logits of a prompt, of drafts of several lengths, of single tokens and of a further prompt."""
    caches = make_prompt_cache(model) if caches is None else caches
    out = []
    for tokens in (families.PROMPT * 3, [1, 2, 3, 4], [7], [9, 8], [3], [5] * 16, list(range(40))):
        out.append(model(mx.array([tokens]), cache=caches))
        mx.eval(out[-1], [c.state for c in caches])
    return out


def same(ours: list[Any], theirs: list[Any], limit: float = 1e-5) -> bool:
    return all(families.relative_error(a, b) <= limit for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("quantize", [False, True], ids=["f32", "4-bit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_it_did(family: str, quantize: bool) -> None:
    model = families.build(family, quantize=quantize)
    layers = len(model.layers)
    classes = {name: type(module) for name, module in model.named_modules()}
    expected = passes(model)
    with installed(model) as state:
        counts = state.latents.count, state.latents.whole, state.latents.narrowed
        assert counts == (layers, layers, layers), state.latents.describe()
        caches = make_prompt_cache(model)
        assert same(passes(model, caches), expected)
        assert all(type(c) is KVCache and c.keys.shape[1] == c.values.shape[1] == 1 for c in caches)
        # Nothing cached: what scoring does.
        assert families.relative_error(model(mx.array([families.PROMPT * 3])), expected[0]) <= 1e-5
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert all("_latent" not in vars(module) and "_latent_shape" not in vars(module) for module in model.modules())
    assert same(passes(model), expected, 0)


def config_of(**sizes: Any) -> dict[str, Any]:
    """Of a DeepSeek-V2 of three layers, one dense and two with experts."""
    return {
        "model_type": "deepseek_v2", "vocab_size": 211, "intermediate_size": 192, "moe_intermediate_size": 64,
        "num_hidden_layers": 3, "n_shared_experts": 2, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "first_k_dense_replace": 1, "topk_method": "greedy",
    } | SIZES | sizes  # fmt: skip


def model_of(bits: int | None = 4, mode: str = "affine", **sizes: Any) -> Any:
    mx.random.seed(3)
    model = deepseek_v2.Model(deepseek_v2.ModelArgs.from_dict(config_of(**sizes)))
    model.update(tree_map(lambda x: 1.5 * x, model.parameters()))
    if bits:
        nn.quantize(model, 32, bits, mode=mode)
    mx.eval(model.parameters())
    # YaRN's frequencies are no parameters.
    mx.eval([v for m in model.modules() for v in vars(m).values() if isinstance(v, mx.array)])
    return model


def greedy(model: Any, count: int, prompt: list[int], caches: Any = None) -> list[int]:
    caches = make_prompt_cache(model) if caches is None else caches
    x, tokens = mx.array([prompt]), []
    for _ in range(count):
        tokens.append(int(mx.argmax(model(x, cache=caches)[0, -1]).item()))
        x = mx.array([tokens[-1:]])
    return tokens


@pytest.mark.parametrize("q_lora", [None, 64], ids=["V2-Lite", "V2"])
@pytest.mark.parametrize(("bits", "mode"), [(None, ""), (4, "affine"), (6, "affine"), (8, "affine"), (4, "mxfp4")])
def test_greedy_tokens_are_those_of_mlx_lm(q_lora: int | None, bits: int | None, mode: str) -> None:
    model = model_of(bits, mode, q_lora_rank=q_lora)
    prompt = [int(t) for t in np.random.default_rng(1).integers(0, 211, 50)]
    expected = greedy(model, 100, prompt)
    assert len(set(expected)) > 10
    with installed(model) as state:
        assert state.latents.narrowed == 3, state.latents.describe()
        assert greedy(model, 100, prompt) == expected
    with installed(model, "fast"):
        assert len(greedy(model, 20, prompt)) == 20


# Where the operation steps back


def attention(bits: int | None = 4, **sizes: Any) -> Any:
    mx.random.seed(5)
    layer = deepseek_v2.DeepseekV2Attention(deepseek_v2.ModelArgs(**SIZES | sizes))
    if bits:
        nn.quantize(layer, 32, bits)
    mx.eval(layer.parameters(), layer.rope._freqs)
    return layer


def attend(layer: Any, cache: Any, length: int) -> Any:
    x = mx.random.normal((1, length, 192), key=mx.random.key(length))
    out = layer(x, create_attention_mask(x, cache, return_array=True), cache)
    mx.eval(out, cache.state)
    return out


def test_adapters_and_new_weights_go_on_over_the_same_cache() -> None:
    from mlx_lm.tuner.lora import LoRALinear

    layer = attention()
    with installed(layer):
        cache = KVCache()
        attend(layer, cache, 9)
        before = attend(layer, cache, 2)
        adapter = LoRALinear.from_base(layer.kv_b_proj, r=4, scale=1.0)
        adapter.lora_b = mx.zeros(adapter.lora_b.shape)
        layer.kv_b_proj = adapter
        cache.trim(2)
        # Nothing is added yet, so nothing changes but the way.
        assert mx.allclose(attend(layer, cache, 2), before, rtol=1e-4, atol=1e-5)
        adapter.lora_b = mx.ones(adapter.lora_b.shape)
        cache.trim(2)
        adapted = attend(layer, cache, 2)
        assert mx.abs(adapted - before).max().item() > 1e-3
        fresh = KVCache()
        attend(layer, fresh, 9)
        assert fresh.keys.shape[1] == 1
        assert mx.allclose(attend(layer, fresh, 2), adapted, rtol=1e-4, atol=1e-5)
    cache = KVCache()
    attend(layer, cache, 9)
    assert mx.allclose(attend(layer, cache, 2), adapted, rtol=1e-4, atol=1e-5)


def test_a_copy_of_a_layer_has_no_operation_and_the_same_cache() -> None:
    layer = attention()
    with installed(layer):
        twin = copy.deepcopy(layer)
        cache = KVCache()
        attend(layer, cache, 9)
        before = attend(layer, cache, 2)
        cache.trim(2)
        assert twin._latent is None
        assert mx.allclose(attend(twin, cache, 2), before, rtol=1e-4, atol=1e-5)
        # A mask of numbers is not the operation's either.
        cache.trim(2)
        x = mx.random.normal((1, 2, 192), key=mx.random.key(2))
        mask = mx.where(create_attention_mask(x, cache, return_array=True), 0.0, -1e9)
        assert mx.allclose(layer(x, mask, cache), before, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_layer() -> None:
    layer = attention(bits=None)
    x = mx.random.normal((1, 6, 192), key=mx.random.key(1))
    mask = create_attention_mask(x, None, return_array=True)

    def loss(module: Any) -> Any:
        return module(x, mask).square().sum()

    names = ("kv_b_proj", "q_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "o_proj")
    expected = nn.value_and_grad(layer, loss)(layer)[1]
    mx.eval(expected)
    with installed(layer):
        found = nn.value_and_grad(layer, loss)(layer)[1]
        mx.eval(found)
    for name in names:
        ours, theirs = found[name]["weight"], expected[name]["weight"]
        assert mx.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * mx.abs(theirs).max().item()), name


def test_what_is_of_another_kind_is_left_alone_and_said() -> None:
    class Strange(deepseek_v2.DeepseekV2Attention):  # type: ignore[misc]
        def __call__(self, x: Any, mask: Any = None, cache: Any = None) -> Any:
            return 1.01 * super().__call__(x, mask, cache)

    model = model_of()
    model.layers[1].self_attn.__class__ = Strange
    expected = passes(model)
    with installed(model) as state:
        assert (state.latents.count, state.latents.narrowed) == (2, 2)
        assert "something else" in state.latents.describe()
        assert same(passes(model), expected)
    assert layers_of(attention(None, num_attention_heads=1)) == []
    biased = attention(bits=None)
    biased.kv_b_proj.bias = mx.zeros((biased.kv_b_proj.weight.shape[0],))
    with installed(biased) as state:
        assert "kv_b_proj has a bias" in state.latents.describe()


def test_the_report_says_which_layers_cache_latents() -> None:
    with installed(model_of()) as state:
        shown = runs.lines(state.report())
    assert shown[0][0] == "layers 0-2"
    assert "attention over cached latents as one operation" in shown[0][1]
    assert any("3 with latents in the cache instead of keys and values" in line for _, line in shown)
