"""Decoder layers as one operation: the same bits as layer by layer, and caches that keep mlx-lm's meaning."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")

from mlx.utils import tree_map  # noqa: E402
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache, trim_prompt_cache  # noqa: E402

from edger1 import kernels  # noqa: E402

if not kernels.state().available or mx.default_device().type != mx.cpu:
    pytest.skip(f"CPU kernels: {kernels.state().reason}", allow_module_level=True)

from edger1.kernels import _load  # noqa: E402
from edger1.kernels.install import Installed, install  # noqa: E402

PROMPT = [5, 6, 7, 200, 31]
CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 260,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-3": {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "llama-bias": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "granite": {
        "logits_scaling": 2.0,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.3,
        "attention_bias": False,
        "mlp_bias": False,
    },
}


def build(family: str = "llama", bits: int | None = 4, **overrides: Any) -> Any:
    """A random model of three layers."""
    kind = family.split("-")[0]
    module = importlib.import_module(f"mlx_lm.models.{kind}")
    config = {"model_type": kind, **CONFIG, **FAMILIES.get(family, {}), **overrides}
    mx.random.seed(3)
    model = module.Model(module.ModelArgs.from_dict(config))
    model.update(tree_map(lambda w: w * 3 if w.ndim > 1 else w + 0.1 * mx.random.normal(w.shape), model.parameters()))
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    model.eval()
    mx.eval(model.parameters())
    return model


@contextmanager
def installed(
    model: Any, precision: str = "exact", *, fuse: bool = True, narrow_caches: bool = False
) -> Iterator[Installed]:
    """Kernels in a model; "fast" has float16 caches only where that is asked for, so that bits can be compared."""
    state = install(model, precision, fuse=fuse)
    for module, _ in state._stacks:
        module._stack._cache_dtype = mx.float16 if narrow_caches else mx.float32
    try:
        yield state
    finally:
        state.uninstall()


def greedy(model: Any, count: int, caches: Any = None, prompt: list[int] | None = None) -> tuple[list[int], Any]:
    """The tokens, and every step's logits."""
    caches = caches if caches is not None else make_prompt_cache(model)
    x, tokens, logits = mx.array([prompt or PROMPT]), [], []
    for _ in range(count):
        logits.append(model(x, cache=caches)[:, -1, :])
        tokens.append(int(mx.argmax(logits[-1], -1).item()))
        x = mx.array([tokens[-1:]])
    return tokens, mx.concatenate(logits)


def address(a: Any) -> int:
    return int(np.array(a, copy=False).ctypes.data)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_what_its_layers_do(family: str, precision: str) -> None:
    model = build(family)
    with installed(model, precision, fuse=False) as state:
        expected, expected_logits = greedy(model, 40)
        assert state.blocks.count == 0
    with installed(model, precision) as state:
        tokens, logits = greedy(model, 40)
        assert state.blocks.count == 3, state.blocks.describe()
    assert tokens == expected
    assert mx.abs(logits - expected_logits).max().item() <= 1e-6 * mx.abs(expected_logits).max().item()


@pytest.mark.parametrize("bits", [None, 2, 3, 6, 8])
def test_other_weights(bits: int | None) -> None:
    model = build(bits=bits)
    with installed(model, fuse=False):
        expected, expected_logits = greedy(model, 10)
    with installed(model) as state:
        tokens, logits = greedy(model, 10)
        assert state.blocks.count == 3
    assert tokens == expected
    assert mx.abs(logits - expected_logits).max().item() <= 1e-6 * mx.abs(expected_logits).max().item()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_biases_that_follow_from_their_scales_change_no_bit(bits: int, precision: str) -> None:
    model = build(bits=bits)
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for projection in block.children().values():
                if hasattr(projection, "biases"):
                    projection.biases = -(2.0 ** (bits - 1)) * projection.scales
    # The last group of one matrix is another's: all its biases must be read.
    odd = model.model.layers[1].mlp.up_proj
    odd.biases[-1, -1] = odd.biases[-1, -1] + 0.5
    mx.eval(model.parameters())
    with installed(model, precision, fuse=False):
        expected, expected_logits = greedy(model, 10)
    with installed(model, precision) as state:
        tokens, logits = greedy(model, 10)
        assert state.blocks.count == 3
    assert tokens == expected
    assert mx.array_equal(logits, expected_logits)


def test_projections_of_one_layer_may_differ_in_bits() -> None:
    model = build(bits=None)
    choice = {"v_proj": (8, 32), "k_proj": (6, 64), "down_proj": (8, 32), "up_proj": (3, 64)}

    def predicate(path: str, module: Any) -> Any:
        bits, group = choice.get(path.split(".")[-1], (4, 32))
        return {"bits": bits, "group_size": group} if hasattr(module, "to_quantized") else False

    nn.quantize(model, class_predicate=predicate)
    for precision in ("exact", "fast"):
        with installed(model, precision, fuse=False):
            expected, expected_logits = greedy(model, 10)
        with installed(model, precision) as state:
            tokens, logits = greedy(model, 10)
            assert state.blocks.count == 3
        assert tokens == expected
        assert mx.array_equal(logits, expected_logits)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_rows_do_not_depend_on_their_company_nor_on_threads(precision: str, threads: int) -> None:
    extension = _load()[0]
    assert extension is not None
    before = extension.threads()
    model = build()
    long = [(7 * i) % 250 for i in range(270)]
    try:
        with installed(model, precision):
            extension.set_threads(1)
            caches = make_prompt_cache(model)
            model(mx.array([long]), cache=caches)
            alone = [model(mx.array([[t]]), cache=caches)[0, 0] for t in range(16)]
            mx.eval(alone)
            extension.set_threads(threads)
            for rows in (2, 7, 16):
                trim_prompt_cache(caches, caches[0].offset - len(long))
                together = model(mx.array([list(range(rows))]), cache=caches)[0]
                assert mx.array_equal(together, mx.stack(alone[:rows]))
    finally:
        extension.set_threads(before)


def test_a_batch_computes_what_its_rows_do() -> None:
    model = build()
    rows = [[1, 2, 3], [40, 50, 60], [7, 7, 7]]
    with installed(model) as state:
        assert state.blocks.count == 3
        single = [greedy(model, 6, prompt=row)[1] for row in rows]
        caches = make_prompt_cache(model)
        x = mx.array(rows)
        for step in range(6):
            logits = model(x, cache=caches)[:, -1, :]
            assert mx.array_equal(logits, mx.stack([s[step] for s in single]))
            x = mx.argmax(logits, -1)[:, None]


def test_a_copied_cache_is_not_written_over() -> None:
    model = build()
    with installed(model):
        expected, _ = greedy(model, 12)
        caches = make_prompt_cache(model)
        first, _ = greedy(model, 4, caches)
        fork = copy.deepcopy(caches)
        held = [(c.keys, c.values, mx.array(c.keys) + 0) for c in caches]
        mx.eval(held)
        greedy(model, 5, fork, prompt=[99])
        for keys, _, values_then in held:
            assert mx.array_equal(keys, values_then)
        rest, _ = greedy(model, 8, caches, prompt=first[-1:])
        assert first + rest == expected
        for keys, _, values_then in held:
            assert mx.array_equal(keys, values_then)


def test_a_cache_of_ones_own_is_written_in_place() -> None:
    model = build()
    with installed(model):
        caches = make_prompt_cache(model)
        greedy(model, 3, caches)
        mx.eval([c.state for c in caches])
        before = [address(c.keys) for c in caches]
        greedy(model, 5, caches)
        assert [address(c.keys) for c in caches] == before


def test_trimming_goes_back() -> None:
    model = build()
    with installed(model):
        caches = make_prompt_cache(model)
        first, _ = greedy(model, 6, caches)
        again_from = caches[0].offset
        expected, _ = greedy(model, 6, caches, prompt=first[-1:])
        assert trim_prompt_cache(caches, 6) == 6
        assert caches[0].offset == again_from
        assert greedy(model, 6, caches, prompt=first[-1:])[0] == expected


def test_a_cache_grows_as_mlx_lm_grows_it() -> None:
    model = build()
    with installed(model, fuse=False):
        plain = make_prompt_cache(model)
        expected, _ = greedy(model, 300, plain)
    with installed(model):
        caches = make_prompt_cache(model)
        tokens, _ = greedy(model, 300, caches)
    assert tokens == expected
    for ours, theirs in zip(caches, plain, strict=True):
        assert (ours.keys.shape, ours.values.shape, ours.offset) == (
            theirs.keys.shape,
            theirs.values.shape,
            theirs.offset,
        )
        assert mx.array_equal(ours.keys[..., : ours.offset, :], theirs.keys[..., : ours.offset, :])


def test_unevaluated_steps_follow_each_other() -> None:
    model = build()
    with installed(model):
        expected, _ = greedy(model, 8)
        caches = make_prompt_cache(model)
        x, tokens = mx.array([PROMPT]), []
        for _ in range(8):
            x = mx.argmax(model(x, cache=caches)[:, -1:, :], -1)
            tokens.append(x)
        mx.eval(tokens)
        assert [int(t.item()) for t in tokens] == expected


def test_what_is_not_covered_runs_as_it_was() -> None:
    model = build()
    window = [RotatingKVCache(max_size=8) for _ in range(3)]
    mask = mx.tril(mx.ones((5, 5), mx.bool_))
    x = mx.array([PROMPT])
    with installed(model, fuse=False):
        expected = greedy(model, 12, window)[0]
        masked = model.model.layers[0](mx.ones((1, 5, 64)), mask, KVCache())
        no_cache = model(x)
        mx.eval(masked, no_cache)
    window = [RotatingKVCache(max_size=8) for _ in range(3)]
    with installed(model):
        assert greedy(model, 12, window)[0] == expected
        assert mx.array_equal(model.model.layers[0](mx.ones((1, 5, 64)), mask, KVCache()), masked)
        assert mx.array_equal(model(x), no_cache)


def test_new_weights_and_adapters_are_noticed() -> None:
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = build()
    x = mx.random.normal((1, 1, 64), key=mx.random.key(2))

    def answer(m: Any) -> Any:
        cache = KVCache()
        m.model.layers[1](mx.ones((1, 4, 64)), "causal", cache)
        return m.model.layers[1](x, None, cache)

    with installed(model):
        before = answer(model)
        mx.eval(before)
        projection = model.model.layers[1].self_attn.o_proj
        projection.scales = projection.scales * 2
        changed = answer(model)
        assert mx.abs(changed - before).max().item() > 1e-3
        projection.scales = projection.scales / 2
        linear_to_lora_layers(model, 3, {"rank": 4, "scale": 10.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]})
        adapter = model.model.layers[1].self_attn.q_proj
        adapter.lora_b = mx.ones(adapter.lora_b.shape)
        assert mx.abs(answer(model) - before).max().item() > 1e-3


def test_gradients_pass_through_the_layers_as_they_were() -> None:
    model = build()
    x = mx.random.normal((1, 4, 64), key=mx.random.key(2))

    def loss(x: Any) -> Any:
        return model.model.layers[0](x, "causal", KVCache()).square().sum()

    with installed(model, fuse=False):
        expected = mx.grad(loss)(x)
        mx.eval(expected)
    with installed(model):
        assert mx.allclose(mx.grad(loss)(x), expected, rtol=1e-5, atol=1e-5)


def test_a_copied_model_has_no_operation_of_the_original() -> None:
    model = build()
    with installed(model):
        twin = copy.deepcopy(model)
        for layer in twin.layers:
            layer.mlp.down_proj.scales = layer.mlp.down_proj.scales * 0
            layer.mlp.down_proj.biases = layer.mlp.down_proj.biases * 0
        ours, theirs = greedy(model, 3)[1], greedy(twin, 3)[1]
        assert mx.abs(ours - theirs).max().item() > 1e-3


def test_what_differs_from_its_parts_is_left_alone_and_reported() -> None:
    model = build()

    class Doubled(type(model.model.layers[1])):  # type: ignore[misc]
        def __call__(self, x: Any, mask: Any = None, cache: Any = None) -> Any:
            return 2 * super().__call__(x, mask, cache)

    model.model.layers[1].__class__ = Doubled
    with installed(model, fuse=False):
        expected = greedy(model, 5)[0]
    with installed(model) as state:
        assert state.blocks.layers == {"TransformerBlock": 2}
        assert list(state.blocks.others.values()) == [1]
        assert "Doubled" in state.blocks.describe()
        assert "2 of 3" in state.blocks.describe()
        assert greedy(model, 5)[0] == expected


def test_a_layer_whose_answer_is_no_number_is_left_alone() -> None:
    model = build()
    projection = model.model.layers[2].mlp.down_proj
    projection.scales = projection.scales * float("nan")
    with installed(model) as state:
        assert state.blocks.count == 2
        assert "3" in state.blocks.describe()


def test_uninstall_gives_everything_back() -> None:
    model = build()
    classes = [type(layer) for layer in model.layers]
    state = install(model, "exact")
    assert [type(layer) for layer in model.layers] != classes
    state.uninstall()
    assert [type(layer) for layer in model.layers] == classes
    assert not any("_block" in vars(layer) for layer in model.layers)
    assert state.blocks.count == 0


def test_pieces_that_do_not_fit_are_refused() -> None:
    extension = _load()[0]
    assert extension is not None
    with pytest.raises(ValueError, match="multiple"):
        extension.DecoderLayer(heads=3, kv_heads=2, head_dim=8, attention_scale=1.0)
    layer = extension.DecoderLayer(heads=4, kv_heads=2, head_dim=16, attention_scale=1.0)
    with pytest.raises(ValueError, match="whatever"):
        layer.project("whatever", mx.zeros((4, 4)))
    with pytest.raises(ValueError, match="do not fit"):
        layer.project("q", mx.zeros((64, 8), mx.uint32), mx.zeros((64, 3)), mx.zeros((64, 2)), None, 32, 4)
    layer.project("q", mx.zeros((64, 64)))
    with pytest.raises(ValueError, match="expected"):
        layer.finish()


@pytest.mark.parity
def test_two_thousand_tokens_are_the_same() -> None:
    model = build()
    with installed(model, fuse=False):
        expected, _ = greedy(model, 2000)
    with installed(model) as state:
        assert state.blocks.count == 3
        tokens, _ = greedy(model, 2000)
    assert tokens == expected
    assert len(set(tokens)) > 20
