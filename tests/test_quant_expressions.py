"""Windows of arrays that are made of tensors, and codes carried through, against MLX on the whole arrays."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from array_source import ArrayTensor, tensors
from families import build, tiny_config
from hub_layouts import LAYOUTS, hub_layout
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from edger1.errors import FormatError
from edger1.quant import architecture, expressions, tracing
from edger1.quant.expressions import height, to_numpy
from edger1.quant.source import Coding
from edger1.quant.targets import Plain

CODING = Coding("affine", 4, 32, "F32", "F32")

Sanitize = Callable[[dict[str, mx.array]], dict[str, mx.array]]


class Arguments:
    """Arguments of a model whose `sanitize` is a test's."""

    @staticmethod
    def from_dict(config: dict[str, Any]) -> Arguments:
        return Arguments()


def record(sanitize: Sanitize, arrays: dict[str, mx.array], coding: Coding | None = None) -> dict[str, Plain]:
    """What a model with this `sanitize` makes of arrays."""
    shapes = {name: array.shape for name, array in sanitize(dict(arrays)).items()}

    class Model(nn.Module):
        def __init__(self, arguments: Arguments) -> None:
            super().__init__()
            for name, shape in shapes.items():
                self[name] = mx.zeros(shape)

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            return sanitize(weights)

    traced = tracing.trace({"model_type": "made up"}, tensors(arrays, coding), (Model, Arguments))
    return dict(traced.tensors)


def assert_windows(target: Plain, whole: mx.array) -> None:
    expected = to_numpy(whole)
    rows = height(target.shape)
    assert target.shape == expected.shape
    for start, stop in ((0, rows), (0, 1), (rows - 1, rows), (rows // 3, rows // 2 + 1), (rows // 2, rows // 2)):
        window = target.read(start, stop)
        assert window.dtype == expected.dtype
        assert window.shape == (stop - start, *expected.shape[1:])
        assert np.array_equal(window, expected[start:stop])


def _steps(array: mx.array, draw: Callable[[st.SearchStrategy[Any]], Any]) -> mx.array:
    """Do one thing to an array that some `sanitize` could do."""
    shape, axis = array.shape, draw(st.integers(0, array.ndim - 1))
    kind = draw(st.sampled_from(["slice", "transpose", "reshape", "join", "split", "pick", "repeat", "add", "reduce"]))
    if kind == "slice":
        step = draw(st.sampled_from([1, 2, 3, -1, -2]))
        low, high = sorted(draw(st.tuples(*[st.integers(0, shape[axis])] * 2)))
        cut = slice(low, high) if step == 1 else slice(None, None, step)
        if step == 1 and low == high:
            return array
        return array[(slice(None),) * axis + (cut,)]
    if kind == "transpose":
        return array.transpose(*draw(st.permutations(range(array.ndim))))
    if kind == "reshape":
        return array.reshape(*shape[:axis], -1, *shape[axis + 2 :]) if axis + 1 < array.ndim else array[None]
    if kind == "join":
        return mx.concatenate([array, array * 2], axis=axis)
    if kind == "split":
        return mx.split(array, 2, axis=axis)[1] if shape[axis] % 2 == 0 else array
    if kind == "pick":
        return mx.take(array, draw(st.integers(0, shape[axis] - 1)), axis=axis) if array.ndim > 1 else array
    if kind == "repeat":
        return mx.repeat(array, 2, axis=axis)
    if kind == "add":
        return (array + 1).astype(mx.bfloat16) * draw(st.sampled_from([0.5, 3.0]))
    return array / (mx.linalg.norm(array.astype(mx.float32), axis=axis, keepdims=True) + 1e-7)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_any_window_of_anything_made_of_a_tensor(data: st.DataObject) -> None:
    source = mx.random.normal((6, 4, 8)).astype(data.draw(st.sampled_from([mx.float32, mx.bfloat16, mx.float16])))
    script: list[Any] = []

    def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        array, choices = weights["w"], iter(script)

        def again(strategy: st.SearchStrategy[Any]) -> Any:
            return next(choices)

        def first(strategy: st.SearchStrategy[Any]) -> Any:
            script.append(data.draw(strategy))
            return script[-1]

        draw = again if script else first
        for _ in range(4):
            array = _steps(array, draw) if array.size < 4000 else array
        return {"out": array}

    targets = record(sanitize, {"w": source})
    assert_windows(targets["out"], sanitize({"w": source})["out"])


@pytest.mark.parametrize("family", sorted(LAYOUTS))
def test_codes_go_where_sanitize_would_move_them(family: str) -> None:
    shapes = {name: array.shape for name, array in tree_flatten(build(family).parameters())}
    arrays = hub_layout(family, {name: mx.random.normal(shape).astype(mx.bfloat16) for name, shape in shapes.items()})
    coded = {name: array for name, array in arrays.items() if array.ndim > 1 and array.shape[-1] % 32 == 0}
    source = tensors(arrays) | tensors(coded, CODING)
    config = tiny_config(family)
    carried = {n: t for n, t in tracing.trace(config, source).tensors.items() if isinstance(t, Plain) and t.coding}
    codes = {name: source[name].codes(0, array.shape[0]) for name, array in coded.items()}
    for part in ("weight", "biases"):
        # What sanitize makes of the codes in place of the numbers; where it would compute, nothing is carried.
        given = arrays | {name: mx.array(getattr(found, part).data) for name, found in codes.items()}
        real = architecture.build(config).sanitize(given)
        for name, target in carried.items():
            rows = target.shape[0]
            for start, stop in ((0, rows), (rows // 2, rows)):
                found = getattr(target.codes(start, stop), part)
                assert np.array_equal(found.data, np.array(real[name])[start:stop]), (name, part)


@pytest.mark.parametrize(
    ("family", "pattern"),
    [
        ("llama", r"_proj\.weight|embed_tokens|lm_head"),
        ("qwen3_moe", r"_proj\.weight|embed_tokens|lm_head|gate\.weight"),
        ("mixtral", r"_proj\.weight|embed_tokens|lm_head|gate\.weight"),
        ("deepseek_v3", r"(?<!kv_b)_proj.*\.weight|unembed_out|embed_tokens|lm_head|gate\.weight"),
        ("granitemoe", r"_proj\.weight|embed_tokens|lm_head|layer\.weight"),
        ("qwen3_vl_moe", r"self_attn\.\w_proj\.weight|embed_tokens|lm_head|gate\.weight"),
    ],
)
def test_codes_are_carried_unless_the_last_axis_changes(family: str, pattern: str) -> None:
    arrays = hub_layout(family, dict(tree_flatten(build(family).parameters())))
    traced = tracing.trace(tiny_config(family), tensors(arrays, CODING))
    carried = {name for name, target in traced.tensors.items() if target.coding == CODING}
    assert carried == {name for name in traced.tensors if re.search(pattern, name)}


def test_codes_of_several_kinds_are_not_mixed() -> None:
    arrays = {name: mx.ones((4, 32)) for name in "ab"}
    stacked: Sanitize = lambda weights: {"s": mx.stack([weights["a"], weights["b"]])}  # noqa: E731
    other = Coding("affine", 8, 32, "F32", "F32")
    source = {"a": ArrayTensor("a", arrays["a"], CODING), "b": ArrayTensor("b", arrays["b"], other)}
    expression = record(stacked, arrays)["s"].expression
    assert isinstance(expression, expressions.Joined)
    leaves = {name: expressions.Leaf(tensor) for name, tensor in source.items()}
    parts = tuple(expressions.Reshaped((1, 4, 32), "F32", leaf) for leaf in leaves.values())
    mixed = Plain("s", expressions.Joined((2, 4, 32), "F32", parts, 0))
    assert mixed.coding is None
    with pytest.raises(FormatError, match="no codes"):
        mixed.codes(0, 1)


def test_scales_of_several_dtypes_become_f32() -> None:
    half = Coding("affine", 4, 32, "F16", "F16")
    tensor = _HalfScales("a", mx.ones((4, 32)), half)
    wide = ArrayTensor("b", mx.ones((4, 32)), CODING)
    parts = tuple(expressions.Leaf(t) for t in (tensor, wide))
    target = Plain("s", expressions.Joined((8, 32), "F32", parts, 0))
    assert target.coding == CODING
    codes = target.codes(2, 6)
    assert codes.scales.dtype == "F32"
    assert codes.scales.data.dtype == np.float32
    expected = np.concatenate([tensor.codes(2, 4).scales.data.astype(np.float32), wide.codes(0, 2).scales.data])
    assert np.array_equal(codes.scales.data, expected)


class _HalfScales(ArrayTensor):
    def codes(self, start: int, stop: int) -> Any:
        found = super().codes(start, stop)
        half = [
            expressions_array("F16", (array.data % 512).astype(np.float16)) for array in (found.scales, found.biases)
        ]
        return type(found)(found.weight, *half)


def expressions_array(dtype: str, data: np.ndarray) -> Any:
    from edger1.quant.formats.ggml import Array

    return Array(dtype, data)


def test_a_window_reads_only_what_it_needs() -> None:
    arrays = hub_layout("qwen3_moe", dict(tree_flatten(build("qwen3_moe").parameters())))
    source = tensors(arrays)
    traced = tracing.trace(tiny_config("qwen3_moe"), source)
    assert not any(tensor.reads for tensor in source.values())
    traced.tensors["model.layers.1.mlp.switch_mlp.up_proj.weight"].read(2, 4)
    read = {name: tensor.reads for name, tensor in source.items() if tensor.reads}
    assert read == {f"model.layers.1.mlp.experts.{e}.up_proj.weight": [(0, 64)] for e in (2, 3)}


def test_heads_are_read_by_their_rows() -> None:
    arrays = hub_layout("deepseek_v3", dict(tree_flatten(build("deepseek_v3").parameters())))
    source = tensors(arrays)
    target = tracing.trace(tiny_config("deepseek_v3"), source).tensors["model.layers.0.self_attn.embed_q.weight"]
    target.read(1, 3)
    kv_b = source["model.layers.0.self_attn.kv_b_proj.weight"]
    heads = target.shape[0]
    assert kv_b.reads == [(kv_b.shape[0] // heads, 3 * kv_b.shape[0] // heads)]


@pytest.mark.parametrize("chunk", [1, 1000, 5000])
def test_a_transpose_takes_its_input_in_pieces(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "CHUNK_BYTES", chunk)
    array = mx.random.normal((30, 50))
    source = tensors({"w": array})
    target = Plain("t", expressions.Permuted((50, 30), "F32", expressions.Leaf(source["w"]), (1, 0)))
    assert np.array_equal(target.read(10, 20), np.array(array.T)[10:20])
    assert len(source["w"].reads) == -(-30 // max(1, chunk // 200))


@pytest.mark.parametrize("chunk", [1, 1000, 100_000])
def test_a_reduction_over_rows_is_computed_once_and_to_the_bit(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "CHUNK_BYTES", chunk)
    array = mx.random.normal((300, 40)).astype(mx.bfloat16)

    def normed(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        norm = mx.linalg.norm(weights["w"].astype(mx.float32), axis=0, keepdims=True) + 1e-7
        return {"w": (weights["w"] / norm).astype(mx.bfloat16)}

    expected = to_numpy(normed({"w": array})["w"])
    target = record(normed, {"w": array})["w"]
    first = target.read(0, 7)
    (leaf,) = target.expression.leaves()
    assert isinstance(leaf.tensor, ArrayTensor)
    assert len(leaf.tensor.reads) == -(-300 // max(1, chunk // 160)) + 1
    assert np.array_equal(first, expected[:7])
    assert np.array_equal(target.read(7, 300), expected[7:])
    assert len(leaf.tensor.reads) == -(-300 // max(1, chunk // 160)) + 2


def test_what_no_node_does_is_computed_whole() -> None:
    array = mx.abs(mx.random.normal((6, 8)))
    log: Sanitize = lambda weights: {"w": mx.log2(weights["w"])[:, :4], "v": weights["v"]}  # noqa: E731
    arrays = {"w": array, "v": mx.ones((3,))}
    target = record(log, arrays)["w"]
    assert isinstance(target.expression, expressions.Whole)
    assert target.sources == ("w",)
    assert target.coding is None
    assert_windows(target, log(arrays)["w"])


def test_what_no_node_does_is_refused_of_large_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "MAX_WHOLE_BYTES", 100)
    with pytest.raises(FormatError, match="'w' with Log, for which all of 1 tensors have to be in memory, 192 bytes"):
        record(lambda weights: {"w": mx.log2(weights["w"])}, {"w": mx.ones((6, 8))})


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_vl_moe", "granitemoe"])
def test_a_window_takes_a_small_multiple_of_its_size(family: str) -> None:
    name, experts, rows, columns = "switch_mlp.up_proj.weight", 16, 256, 512
    shapes = {name: array.shape for name, array in tree_flatten(build(family).parameters())}
    config = tiny_config(family)
    target_name = next(found for found in shapes if found.endswith(name))
    text = config.get("text_config", config)
    text |= {"hidden_size": columns, "intermediate_size": rows, "moe_intermediate_size": rows}
    text |= {"num_experts": experts, "num_local_experts": experts}
    model = architecture.build(config)
    arrays = hub_layout(family, {n: mx.zeros(a.shape, mx.bfloat16) for n, a in tree_flatten(model.parameters())})
    target = tracing.trace(config, tensors(arrays)).tensors[target_name]
    assert target.shape == (experts, rows, columns)
    target.read(0, 1)
    tracemalloc.start()
    for start in range(0, experts, 2):
        target.read(start, start + 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The rows of two experts with those of gate_proj, where they lie together, and a copy.
    assert peak < 4.5 * 2 * rows * columns * 4


def test_threads_read_what_another_recorded() -> None:
    def computed(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        w = weights["w"]
        return {"a": w + 1, "b": mx.log2(w), "c": w / mx.linalg.norm(w, axis=0, keepdims=True), "d": w.view(mx.uint32)}

    array = mx.abs(mx.random.normal((40, 8))) + 1
    expected = {name: to_numpy(value) for name, value in computed({"w": array}).items()}
    targets = record(computed, {"w": array})
    with ThreadPoolExecutor(3) as pool:
        for name, target in targets.items():
            rows = list(pool.map(lambda i, target=target: target.read(i, i + 4), range(0, 40, 4)))
            assert np.array_equal(np.concatenate(rows), expected[name]), name
