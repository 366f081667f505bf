"""Every family of mlx-lm that has switch layers: streamed output equals resident output."""

from __future__ import annotations

from pathlib import Path

import families
import mlx.core as mx
import numpy as np
import pytest
import streamed_models
from streamed_models import UNSTREAMABLE, half, moe_families

from edger1.errors import UnstreamableError
from edger1.experts import anatomy
from edger1.experts.budget import LEAST_SLOTS
from edger1.experts.device import SimulatedDevice
from edger1.experts.figures import HITS, MISSES


def test_the_list_of_families_is_whole() -> None:
    """A family that mlx-lm adds, and that has experts in another way, must not go unnoticed."""
    known = set(moe_families())
    assert len(known) > 45
    others = set(families.families()) - known - families.UNBUILDABLE.keys()
    with_experts = {
        name
        for name in others
        if any("experts" in path.split(".") for path, _ in families.skeleton(name).named_modules())
    }
    assert with_experts == UNSTREAMABLE.keys() - families.UNBUILDABLE.keys()


@pytest.mark.families
@pytest.mark.parametrize("family", moe_families())
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_streamed_equals_resident(family: str, precision: str, tmp_path: Path) -> None:
    """Bit for bit: decoding, and a prompt of up to 16 rows, with half of the experts in slots.

    Whether modules with experts are one operation, as in models that are loaded for use, or not.
    """
    folder = streamed_models.write(tmp_path / family, family)
    expected = streamed_models.resident(folder, precision)
    for whole in (True, False):
        got, streaming = streamed_models.streamed(folder, half, precision, whole=whole)
        figures = streaming.figures.sum(axis=0)
        assert figures[MISSES] > 0
        assert figures[HITS] > 0
        for step, (a, b) in enumerate(zip(expected, got, strict=True)):
            np.testing.assert_array_equal(a, b, err_msg=f"{family}, step {step}, {whole=}")


@pytest.mark.parametrize(
    "family", ["deepseek_v3", "gpt_oss", "llama4", "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe"]
)
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("whole", [True, False])
def test_experts_that_take_turns_in_two_slots_give_the_same(
    family: str, precision: str, whole: bool, tmp_path: Path
) -> None:
    """Bit for bit with fewer slots than a token has experts, whether the whole module is one operation or not."""
    folder = streamed_models.write(tmp_path / family, family)
    expected = streamed_models.resident(folder, precision)
    got, streaming = streamed_models.streamed(folder, lambda _: LEAST_SLOTS, precision, whole=whole)
    assert streaming.figures[:, MISSES].sum() > 0
    for step, (a, b) in enumerate(zip(expected, got, strict=True)):
        np.testing.assert_array_equal(a, b, err_msg=f"{family}, step {step}")


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "mixtral", "nemotron_h", "olmoe", "qwen3_moe"])
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_a_long_prompt_is_the_same_within_rounding(family: str, precision: str, tmp_path: Path) -> None:
    """Beyond 16 rows experts are computed group by group, and products take other ways than the resident layer's."""
    folder = streamed_models.write(tmp_path / family, family)
    prompt = [int(i) for i in np.random.default_rng(1).integers(0, 190, 70)]
    expected = streamed_models.resident(folder, precision, prompt=prompt)
    got, _ = streamed_models.streamed(folder, half, precision, prompt=prompt)
    for a, b in zip(expected, got, strict=True):
        off = np.abs(a - b).max(axis=-1) / np.abs(a).max(axis=-1)
        if precision == "exact":
            assert off.max() <= 1e-5
        else:
            # int8 activations are rounded otherwise in other groups of rows; where two experts are nearly level for a
            # token, and random ones often are, another is chosen.
            assert np.median(off) <= 2e-2


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_unquantized_experts(dtype: mx.Dtype, tmp_path: Path) -> None:
    folder = streamed_models.write(tmp_path / "m", "qwen3_moe", quantize=False, dtype=dtype)
    expected = streamed_models.resident(folder)
    got, _ = streamed_models.streamed(folder, half)
    for a, b in zip(expected, got, strict=True):
        np.testing.assert_array_equal(a, b)


def test_all_experts_in_slots_never_read_anything_back(tmp_path: Path) -> None:
    folder = streamed_models.write(tmp_path / "m", "olmoe")
    expected = streamed_models.resident(folder)
    model, streaming = streamed_models.open_streamed(folder, lambda layer: layer.experts)
    list(streaming.fill())
    assert streaming.complete
    installed = streamed_models.install(model, "exact")
    got = streamed_models.outputs(model)
    installed.uninstall()
    assert streaming.device.reads_back == 0
    assert streaming.figures[:, MISSES].sum() == 0
    streaming.close()
    for a, b in zip(expected, got, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_anatomy_is_that_of_the_file(tmp_path: Path) -> None:
    folder = streamed_models.write(tmp_path / "m", "gpt_oss")
    model, _ = streamed_models.load_model(folder)
    layers = anatomy.find(model, streamed_models.inspect(folder))
    assert [layer.index for layer in layers] == list(range(len(layers)))
    switches = dict(anatomy.switches(model))
    for layer in layers:
        linears = dict(anatomy.projections(switches[layer.path]))
        assert {part.name for part in layer.parts} == {"weight", "scales", "biases", "bias"}
        for part in layer.parts:
            array = linears[part.projection][part.name]
            for expert in (0, layer.experts - 1):
                raw = np.fromfile(part.file, np.uint8, count=part.nbytes, offset=part.offset + expert * part.nbytes)
                assert raw.tobytes() == bytes(memoryview(np.array(array[expert].view(mx.uint8))))


def test_experts_that_do_not_lie_stacked_are_named(tmp_path: Path) -> None:
    folder = streamed_models.write(tmp_path / "m", "olmoe")
    model, _ = streamed_models.load_model(folder)
    weights = mx.load(str(folder / "model.safetensors"))
    mx.eval(weights)
    name = next(n for n in weights if "switch_mlp.up_proj.weight" in n)
    weights[name.replace("up_proj", "other")] = weights.pop(name)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)  # without metadata, which MLX writes as null
    with pytest.raises(UnstreamableError, match=r"up_proj.weight is not in the model's files.*Convert"):
        anatomy.find(model, streamed_models.inspect(folder))


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "mixtral", "olmoe", "qwen3_moe"])
def test_in_windows_too(family: str, tmp_path: Path) -> None:
    """As on a GPU, whose read-backs cost: MLX's own operations, and routers' choices read back for several layers."""
    folder = streamed_models.write(tmp_path / family, family)
    tokens = [int(i) for i in np.random.default_rng(2).integers(0, 190, 24)]
    model, _ = streamed_models.load_model(folder)
    expected = streamed_models.outputs(model, decoded=tokens)
    device = SimulatedDevice(sync_s=2e-3, compute_s=4e-4)
    model, streaming = streamed_models.open_streamed(folder, half, device=device)
    streaming.open_windows(model)
    got = streamed_models.outputs(model, decoded=tokens)
    figures = streaming.figures.sum(axis=0)
    streaming.close()
    assert figures[MISSES] > 0
    assert figures[HITS] > figures[MISSES] / 4
    for a, b in zip(expected, got, strict=True):
        np.testing.assert_array_equal(a, b)
