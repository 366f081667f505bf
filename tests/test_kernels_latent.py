"""Latent attention: what NumPy says in doubles, the same bits in any company, and caches that keep their meaning."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import check_on

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")

import families  # noqa: E402
from mlx_lm.models import deepseek_v3  # noqa: E402
from mlx_lm.models.base import create_attention_mask  # noqa: E402
from mlx_lm.models.cache import BatchKVCache, KVCache, make_prompt_cache, trim_prompt_cache  # noqa: E402

from edger1 import kernels  # noqa: E402

if not kernels.state().available or mx.default_device().type != mx.cpu:
    pytest.skip(f"CPU kernels: {kernels.state().reason}", allow_module_level=True)

from edger1.kernels import _load  # noqa: E402
from edger1.kernels.install import Installed, install  # noqa: E402

extension: Any = _load()[0]

# Family -> how many of its layers cache latents, and how many of them are one operation with their projections.
FAMILIES = {
    "deepseek_v3": (2, 2),
    "deepseek_v32": (2, 0),
    "glm_moe_dsa": (2, 0),
    "glm4_moe_lite": (2, 2),
    "longcat_flash": (4, 4),
    "kimi_linear": (1, 1),
    "kimi_vl": (2, 2),
    "kimi_k3": (1, 0),
    "bailing_moe_v3": (1, 0),
    "bailing_hybrid": (1, 1),
}
YARN = {
    "type": "yarn",
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 0.8,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 64,
}


class Case:
    """Random operands of one shape."""

    def __init__(self, batch: int, heads: int, length: int, keys: int, sizes: tuple[int, int, int, int], seed: int = 0):
        self.shape = (batch, heads, length, keys)
        self.nope, self.rope, self.rank, self.value = sizes
        nope, rope, rank, value = sizes
        draw = np.random.default_rng(seed)

        def normal(*shape: int) -> np.ndarray:
            return draw.standard_normal(shape).astype(np.float32)

        self.q_nope, self.q_pe = normal(batch, heads, length, nope), normal(batch, heads, length, rope)
        self.latent, self.k_pe = normal(batch, 1, keys, rank), normal(batch, 1, keys, rope)
        self.embed, self.unembed = normal(heads, rank, nope) / rank**0.25, normal(heads, value, rank)
        self.scale = (nope + rope) ** -0.5
        self.kept = draw.random((batch, 1, length, keys)) < 0.6

    def operation(self, precision: str = "exact", bits: int | None = None) -> Any:
        call = extension.LatentAttention(
            heads=self.shape[1], nope=self.nope, rope=self.rope, rank=self.rank, value=self.value, scale=self.scale,
            precision=precision,
        )  # fmt: skip
        for name, matrix in (("embed", self.embed), ("unembed", self.unembed)):
            if bits:
                call.project(name, *mx.quantize(mx.array(matrix), 32, bits), None, 32, bits)
            else:
                call.project(name, mx.array(matrix))
        call.finish()
        return call

    def operands(self) -> list[Any]:
        return [mx.array(a) for a in (self.q_nope, self.q_pe, self.latent, self.k_pe)]

    def expected(self, kept: np.ndarray | None) -> np.ndarray:
        """[B, L, H * value] in doubles; rows that see nothing weigh all keys alike.

        `self.size` is then the largest of the sums that it would be without signs, which is what rounding goes by.
        """
        batch, _, length, _ = self.shape
        k = np.einsum("bsr,hrn->bhsn", self.latent[:, 0].astype(float), self.embed.astype(float))
        v = np.einsum("bsr,hvr->bhsv", self.latent[:, 0].astype(float), self.unembed.astype(float))
        scores = np.einsum("bhln,bhsn->bhls", self.q_nope, k) + np.einsum("bhlp,bsp->bhls", self.q_pe, self.k_pe[:, 0])
        if kept is not None:
            scores = np.where(kept, scores, -1e30)
        weights = np.exp((scores - scores.max(-1, keepdims=True)) * self.scale)
        weights /= weights.sum(-1, keepdims=True)
        self.size = float(np.einsum("bhls,bhsv->blhv", weights, np.abs(v)).max())
        return np.einsum("bhls,bhsv->blhv", weights, v).reshape(batch, length, -1)

    def causal(self) -> np.ndarray:
        _, _, length, keys = self.shape
        return (np.arange(keys) <= np.arange(keys - length, keys)[:, None])[None, None]


def error(found: Any, expected: np.ndarray) -> float:
    return float(np.abs(np.array(found) - expected).max() / np.abs(expected).max())


SHAPES = [
    (1, 4, 1, 1, (16, 8, 32, 16)),
    (2, 3, 5, 300, (20, 6, 36, 12)),
    (1, 8, 16, 777, (32, 16, 64, 32)),
    (3, 2, 3, 257, (7, 2, 9, 5)),
    (1, 5, 40, 300, (24, 8, 40, 20)),
    (2, 3, 20, 20, (8, 4, 17, 3)),
    (1, 2, 530, 600, (32, 16, 48, 32)),
    (1, 4, 200, 513, (64, 16, 64, 64)),
    (20, 4, 1, 70, (32, 16, 64, 32)),
    # More keys than are taken together.
    (2, 3, 5, 1100, (32, 16, 64, 32)),
    (1, 2, 2, 5000, (8, 4, 600, 8)),
]


def check_shapes() -> None:
    """Hold every shape against NumPy: causal, with a mask, and with neither."""
    for shape in SHAPES:
        case = Case(*shape)
        call = case.operation()
        found = call.attend(*case.operands(), None, True)
        assert error(found, case.expected(case.causal())) <= 1e-5, shape
        found = call.attend(*case.operands(), mx.array(case.kept))
        assert error(found, case.expected(case.kept)) <= 1e-5, shape
        assert error(call.attend(*case.operands()), case.expected(None)) <= 1e-5, shape
        for bits in (4, 8):
            if case.nope % 32 == case.rank % 32 == 0:
                exact, fast = (
                    np.array(case.operation(p, bits).attend(*case.operands(), None, True)) for p in ("exact", "fast")
                )
                assert np.linalg.norm(exact - fast) <= 0.03 * np.linalg.norm(exact), shape


def test_every_shape_agrees_with_numpy() -> None:
    check_shapes()


@pytest.mark.parametrize("name", extension.instruction_sets()[:-1])
def test_every_other_instruction_set_agrees_with_numpy(name: str) -> None:
    check_on(name, "test_kernels_latent", "check_shapes()")


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 6),
    length=st.integers(1, 40),
    before=st.integers(0, 600),
    sizes=st.tuples(st.integers(1, 40), st.sampled_from([0, 2, 6, 16]), st.integers(1, 70), st.integers(1, 40)),
    masked=st.sampled_from(["causal", "array", "none"]),
    seed=st.integers(0, 99),
)
def test_any_shape_agrees_with_numpy(
    batch: int, heads: int, length: int, before: int, sizes: tuple[int, int, int, int], masked: str, seed: int
) -> None:
    case = Case(batch, heads, length, before + length, sizes, seed)
    kept = {"causal": case.causal(), "array": case.kept, "none": None}[masked]
    mask = mx.array(case.kept) if masked == "array" else None
    found = case.operation().attend(*case.operands(), mask, masked == "causal")
    # Not relative to the result: what has been added up may cancel.
    assert np.abs(np.array(found) - case.expected(kept)).max() <= 1e-5 * case.size


@pytest.mark.parametrize(("precision", "bits"), [("exact", None), ("fast", 4)])
def test_operands_of_any_strides_and_latents_in_16_bits(precision: str, bits: int | None) -> None:
    case = Case(2, 4, 6, 290, (32, 8, 64, 32))
    q_nope, q_pe, latent, k_pe = case.operands()
    both = mx.concatenate([q_nope, q_pe], -1).transpose(0, 2, 1, 3) + 0
    room = mx.concatenate([latent, mx.zeros((2, 1, 30, 64))], 2)
    turned = (k_pe.transpose(0, 1, 3, 2) + 0).transpose(0, 1, 3, 2)
    mx.eval(both, room, turned)
    q = both.transpose(0, 2, 1, 3)
    call = case.operation(precision, bits)
    plain = call.attend(q_nope, q_pe, latent, k_pe, None, True)
    strided = call.attend(q[..., :32], q[..., 32:], room[..., :290, :], turned, None, True)
    assert mx.array_equal(plain, strided)
    for dtype in (mx.float16, mx.bfloat16):
        narrow = [a.astype(dtype) for a in (latent, k_pe)]
        wide = call.attend(q_nope, q_pe, *[a.astype(mx.float32) for a in narrow], None, True)
        assert mx.array_equal(call.attend(q_nope, q_pe, *narrow, None, True), wide)


@pytest.mark.parametrize("length", [3, 30])
def test_rows_that_see_nothing_weigh_all_keys_alike(length: int) -> None:
    case = Case(1, 2, length, 300, (8, 4, 16, 8))
    kept = np.array(case.kept)
    kept[0, 0, 1] = False
    found = case.operation().attend(*case.operands(), mx.array(kept))
    assert error(found, case.expected(kept)) <= 1e-5


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("keys", [600, 1028])  # eight rows of which the first ones see a block less, or a span
def test_rows_do_not_depend_on_their_company_nor_on_threads(precision: str, threads: int, keys: int) -> None:
    before = extension.threads()
    case = Case(2, 40, 8, keys, (32, 16, 64, 32))
    call = case.operation(precision, 8)
    q_nope, q_pe, latent, k_pe = case.operands()
    try:
        extension.set_threads(1)
        alone = [
            [
                call.attend(
                    q_nope[b : b + 1, :, i : i + 1], q_pe[b : b + 1, :, i : i + 1],
                    latent[b : b + 1, :, : keys - 7 + i], k_pe[b : b + 1, :, : keys - 7 + i], None, True,
                )[0, 0]
                for i in range(8)
            ]
            for b in range(2)
        ]  # fmt: skip
        mx.eval(alone)
        extension.set_threads(threads)
        together = call.attend(q_nope, q_pe, latent, k_pe, None, True)
        assert mx.array_equal(together, mx.stack([mx.stack(rows) for rows in alone]))
        masked = call.attend(q_nope, q_pe, latent, k_pe, mx.array(case.causal()))
        assert mx.array_equal(together, masked)
    finally:
        extension.set_threads(before)


def test_what_does_not_fit_is_refused() -> None:
    case = Case(1, 4, 3, 9, (16, 8, 32, 16))
    call = case.operation()
    q_nope, q_pe, latent, k_pe = case.operands()
    with pytest.raises(ValueError, match="expected"):
        call.attend(q_nope, q_pe, latent[..., :31], k_pe)
    with pytest.raises(ValueError, match="expected"):
        call.attend(q_nope, q_pe, latent, k_pe[:, :, :8])
    with pytest.raises(ValueError, match="S >= L"):
        call.attend(q_nope, q_pe, latent[:, :, :2], k_pe[:, :, :2], None, True)
    with pytest.raises(ValueError, match="booleans"):
        call.attend(q_nope, q_pe, latent, k_pe, mx.zeros((3, 9)))
    with pytest.raises(ValueError, match="booleans"):
        call.attend(q_nope, q_pe, latent, k_pe, mx.ones((1, 4, 3, 9), mx.bool_))
    with pytest.raises(ValueError, match="float"):
        call.attend(q_nope.astype(mx.int32), q_pe, latent, k_pe)
    fresh = extension.LatentAttention(heads=4, nope=16, rope=8, rank=32, value=16, scale=1.0)
    with pytest.raises(ValueError, match=r"expected \[4, 32, 16\]"):
        fresh.project("embed", mx.zeros((4, 16, 32)))
    with pytest.raises(ValueError, match="needed"):
        fresh.finish()


@contextmanager
def installed(model: Any, precision: str = "exact") -> Iterator[Installed]:
    state = install(model, precision)
    try:
        yield state
    finally:
        state.uninstall()


def passes(model: Any, caches: Any = None) -> list[Any]:
    """Logits of a prompt, of drafts of several lengths, and of single tokens."""
    caches = make_prompt_cache(model) if caches is None else caches
    out = []
    for tokens in (families.PROMPT * 3, [1, 2, 3, 4], [7], [9, 8], [3], [5] * 16):
        out.append(model(mx.array([tokens]), cache=caches))
        mx.eval(out[-1], [c.state for c in caches])
    return out


@pytest.mark.parametrize("quantize", [False, True], ids=["f32", "4-bit"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_it_did(family: str, quantize: bool) -> None:
    model = families.build(family, quantize=quantize)
    classes = {name: type(module) for name, module in model.named_modules()}
    expected = passes(model)
    with installed(model) as state:
        assert (state.latents.count, state.latents.whole) == FAMILIES[family], state.latents.describe()
        for ours, theirs in zip(passes(model), expected, strict=True):
            assert families.relative_error(ours, theirs) <= 1e-5
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert all("_latent" not in vars(module) for module in model.modules())


def test_a_layer_that_computes_something_else_is_left_alone_and_reported() -> None:
    class Strange(deepseek_v3.DeepseekV3Attention):  # type: ignore[misc]
        def __call__(self, x: Any, mask: Any = None, cache: Any = None) -> Any:
            return 1.01 * super().__call__(x, mask, cache)

    model = families.build("deepseek_v3")
    model.layers[1].self_attn.__class__ = Strange
    expected = passes(model)
    with installed(model) as state:
        assert state.latents.count == 1
        assert "something else" in state.latents.describe()
        assert all(families.relative_error(a, b) <= 1e-5 for a, b in zip(passes(model), expected, strict=True))


def attention(q_lora: int | None = 64, rope: Any = YARN, bits: int | None = 4) -> Any:
    mx.random.seed(5)
    layer = deepseek_v3.DeepseekV3Attention(
        deepseek_v3.ModelArgs(
            hidden_size=128, num_attention_heads=6, kv_lora_rank=64, q_lora_rank=q_lora, qk_rope_head_dim=16,
            v_head_dim=32, qk_nope_head_dim=32, rope_scaling=rope, attention_bias=True,
        )
    )  # fmt: skip
    if bits:
        nn.quantize(layer, 32, bits)
    mx.eval(layer.parameters())
    return layer


def attend(layer: Any, cache: Any, length: int, batch: int = 1) -> Any:
    x = mx.random.normal((batch, length, 128), key=mx.random.key(length))
    mask = create_attention_mask(x, cache, return_array=True)
    out = layer(x, mask, cache)
    mx.eval(out, cache.state)
    return out


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("q_lora", [None, 64])
@pytest.mark.parametrize("rope", [None, YARN], ids=["plain", "yarn"])
def test_one_operation_gives_the_bits_of_the_parts(q_lora: int | None, rope: Any, precision: str) -> None:
    layer = attention(q_lora, rope)
    lengths = (5, 1, 4, 16, 1, 240, 3, 1, 16, 2)
    with installed(layer, precision) as state:
        assert state.latents.whole == 1
        whole = KVCache()
        ours = [attend(layer, whole, n) for n in lengths]
        parts = KVCache()
        object.__setattr__(layer._latent, "around", None)
        theirs = [attend(layer, parts, n) for n in lengths]
    for a, b in zip(ours, theirs, strict=True):
        assert mx.array_equal(a, b)
    assert whole.keys.shape == parts.keys.shape
    assert whole.offset == parts.offset == sum(lengths)
    for a, b in ((whole.keys, parts.keys), (whole.values, parts.values)):
        assert mx.array_equal(a[..., : whole.offset, :], b[..., : whole.offset, :])


@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_drafts_are_verified_with_the_bits_of_plain_decoding(precision: str) -> None:
    model = families.build("deepseek_v3", quantize=True)
    for layer in model.layers[1:]:
        # Rows that meet the same expert are another matter.
        layer.mlp = model.layers[0].mlp
    with installed(model, precision):
        caches = make_prompt_cache(model)
        model(mx.array([families.PROMPT]), cache=caches)
        alone = [model(mx.array([[t]]), cache=caches)[0, 0] for t in range(16)]
        mx.eval(alone)
        for length in (2, 5, 16):
            trim_prompt_cache(caches, caches[0].offset - len(families.PROMPT))
            together = model(mx.array([list(range(length))]), cache=caches)[0]
            assert mx.array_equal(together, mx.stack(alone[:length]))


def test_a_batch_with_padding_computes_what_its_rows_do() -> None:
    layer = attention()
    rows = [mx.random.normal((1, n, 128), key=mx.random.key(n)) for n in (9, 4)]
    steps = [mx.random.normal((2, n, 128), key=mx.random.key(50 + n)) for n in (1, 3)]

    def run() -> Any:
        cache = BatchKVCache([0, 5])
        x = mx.concatenate([rows[0], mx.concatenate([mx.zeros((1, 5, 128)), rows[1]], 1)])
        out = []
        for part in (x, *steps):
            out.append(layer(part, cache.make_mask(part.shape[1]), cache))
            mx.eval(out[-1], cache.state)
        return [out[0][0], out[0][1, 5:], *out[1:]]

    expected = run()
    with installed(layer):
        for ours, theirs in zip(run(), expected, strict=True):
            assert mx.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def address(a: Any) -> int:
    return int(np.array(a, copy=False).ctypes.data)


def test_a_cache_of_ones_own_is_written_in_place_also_while_steps_are_queued() -> None:
    layer = attention()
    with installed(layer):
        cache = KVCache()
        attend(layer, cache, 5)
        before = (address(cache.keys), address(cache.values))
        attend(layer, cache, 2)
        attend(layer, cache, 1)
        # What comes first keeps the stream busy until all steps are queued.
        slow = mx.ones((2000, 2000))
        x = mx.ones((1, 1, 128)) + 0.0 * (slow @ slow @ slow).max()
        for _ in range(6):
            x = layer(x, None, cache)
            mx.async_eval(x)
        mx.eval(x)
        assert (address(cache.keys), address(cache.values)) == before


def test_a_copied_cache_is_not_written_over() -> None:
    layer = attention()
    with installed(layer):
        cache = KVCache()
        attend(layer, cache, 5)
        fork, keys = copy.deepcopy(cache), cache.keys
        then = mx.array(np.array(keys))
        attend(layer, cache, 1)
        attend(layer, fork, 2)
        assert mx.array_equal(keys, then)


def test_a_view_of_a_cache_keeps_what_it_shows_also_while_the_step_that_wrote_it_is_queued() -> None:
    layer = attention()
    with installed(layer):
        fresh = KVCache()
        attend(layer, fresh, 5)
        x = mx.ones((1, 1, 128))
        layer(x, None, fresh)
        for part in ("keys", "values"):
            cache = KVCache()
            attend(layer, cache, 5)
            slow = mx.ones((2000, 2000))
            layer(x + 0.0 * (slow @ slow @ slow).max(), None, cache)
            view = getattr(cache, part)[..., :6, :]
            trim_prompt_cache([cache], 1)
            # In this order the view is there, and what reads it is not yet queued, when the next step asks who holds
            # the cache; of all that the first step gave, MLX evaluates it by the values.
            mx.eval(view + 0.0 + 0.0, layer(-2 * x, None, cache))
            assert mx.array_equal(view, getattr(fresh, part)[..., :6, :])


def test_gradients_and_adapters_get_what_the_layer_computes() -> None:
    from mlx_lm.tuner.lora import LoRALinear

    layer = attention(bits=None)
    x = mx.random.normal((1, 6, 128), key=mx.random.key(1))
    mask = create_attention_mask(x, None, return_array=True)

    def loss(x: Any) -> Any:
        return layer(x, mask).square().sum()

    def weight_loss(module: Any) -> Any:
        return module(x, mask).square().sum()

    expected = mx.grad(loss)(x), nn.value_and_grad(layer, weight_loss)(layer)[1]["embed_q"]["weight"]
    mx.eval(expected)
    with installed(layer):
        found = mx.grad(loss)(x), nn.value_and_grad(layer, weight_loss)(layer)[1]["embed_q"]["weight"]
        for ours, theirs in zip(found, expected, strict=True):
            assert mx.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * mx.abs(theirs).max().item())
        cache = KVCache()
        attend(layer, cache, 5)
        before = attend(layer, cache, 2)
        adapter = LoRALinear.from_base(layer.q_b_proj, r=4, scale=10.0)
        adapter.lora_b = mx.ones(adapter.lora_b.shape)
        layer.q_b_proj = adapter
        cache.trim(2)
        adapted = attend(layer, cache, 2)
        assert mx.abs(adapted - before).max().item() > 1e-3
        layer.freeze()
        adapter.unfreeze(keys=["lora_a", "lora_b"])
        ours = nn.value_and_grad(layer, weight_loss)(layer)[1]["q_b_proj"]["lora_b"]
        mx.eval(ours)
    cache.trim(2)
    assert mx.allclose(adapted, attend(layer, cache, 2), rtol=1e-4, atol=1e-5)
    theirs = nn.value_and_grad(layer, weight_loss)(layer)[1]["q_b_proj"]["lora_b"]
    assert mx.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * mx.abs(theirs).max().item())


def test_new_weights_are_noticed_and_copies_have_no_operation() -> None:
    layer = attention()
    with installed(layer):
        twin = copy.deepcopy(layer)
        cache = KVCache()
        attend(layer, cache, 5)
        before = attend(layer, cache, 1)
        cache.trim(1)
        layer.unembed_out.scales = layer.unembed_out.scales * 2
        layer.unembed_out.biases = layer.unembed_out.biases * 2
        assert mx.abs(attend(layer, cache, 1) - before).max().item() > 1e-3
        assert twin._latent is None
        cache.trim(1)
        assert mx.allclose(attend(twin, cache, 1), before, rtol=1e-4, atol=1e-5)


def test_a_prompt_needs_no_more_memory_after_a_longer_context() -> None:
    layer = attention()
    with installed(layer):
        extra = []
        for context in (512, 4096):
            cache = KVCache()
            cache.keys = mx.random.normal((1, 1, context + 256, 64))
            cache.values = mx.random.normal((1, 1, context + 256, 16))
            cache.offset = context
            x = mx.random.normal((1, 64, 128), key=mx.random.key(3))
            mask = create_attention_mask(x, cache, return_array=True)
            mx.eval(cache.keys, cache.values, x, mask)
            mx.clear_cache()
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            mx.eval(layer(x, mask, cache), cache.keys, cache.values)
            extra.append(mx.get_peak_memory() - before)
    # Scores of all heads would be 6 * 64 * 4096 floats, keys of all heads 6 * 48 * 4096.
    assert extra[1] - extra[0] <= 64 * 4096
