"""GGUF to MLX folder: every number kept, mlx-lm loads the result, and nothing half-done is ever left behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import struct
import subprocess
import sys
import tracemalloc
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from children import LIMIT_S
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_files import ARRAY, F32, STRING, U32, Tiny, dequantized, pack, tiny_model
from safetensors.numpy import load_file

from edger1.errors import EdgeR1Error, FormatError, UsageError
from edger1.folder import inspect
from edger1.quant import convert as converter
from edger1.quant.convert import Report, convert_gguf
from edger1.quant.formats.safetensors import read_header


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def convert(tiny: Tiny, folder: Path) -> tuple[Report, dict[str, np.ndarray], dict[str, Any]]:
    """Convert `tiny` into folder/model; return the report, the arrays and config.json."""
    report = convert_gguf(tiny.write(folder / "tiny.gguf"), folder / "model")
    arrays: dict[str, np.ndarray] = {}
    for name in report.files:
        arrays |= load_file(folder / "model" / name)
    return report, arrays, json.loads((folder / "model" / "config.json").read_text())


def changed(tiny: Tiny, drop: str | None = None, tensors: dict[str, Any] | None = None, **metadata: Any) -> Tiny:
    kept = {name: value for name, value in tiny.tensors.items() if name != drop}
    renamed = {key.replace("__", "."): value for key, value in metadata.items()}
    return Tiny(tiny.weights, tiny.metadata | renamed, kept | (tensors or {}))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "matrix",
    [
        GGMLQuantizationType.F32,
        GGMLQuantizationType.F16,
        GGMLQuantizationType.Q4_0,
        GGMLQuantizationType.Q4_1,
        GGMLQuantizationType.Q8_0,
    ],
)
def test_every_number_is_kept(tmp_path: Path, architecture: str, matrix: GGMLQuantizationType) -> None:
    tiny = tiny_model(architecture, matrix, tied=False)
    report, arrays, _ = convert(tiny, tmp_path)
    assert {tensor.target for tensor in report.tensors} == tiny.weights.keys()
    assert {tensor.source for tensor in report.tensors} == tiny.tensors.keys()
    for tensor in report.tensors:
        # The weights in Hugging Face's row order, quantized by the gguf package: rows quantize alike in any order.
        kind = GGMLQuantizationType[tensor.kind]
        expected = dequantize(quantize(tiny.weights[tensor.target], kind), kind)
        np.testing.assert_array_equal(
            dequantized(arrays, tensor.target.removesuffix(".weight"))
            if tensor.target.endswith(".weight")
            else arrays[tensor.target],
            expected,
        )


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_mlx_lm_loads_and_generates(tmp_path: Path, architecture: str) -> None:
    import mlx.core as mx
    import mlx_lm

    convert(tiny_model(architecture), tmp_path)
    model, tokenizer = mlx_lm.load(str(tmp_path / "model"))
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hello world"}])
    logits = model(mx.array([prompt])).astype(mx.float32)
    assert np.isfinite(np.array(logits)).all()
    assert tokenizer.eos_token_ids == {0, 2}
    embedding = model.model.embed_tokens
    assert (embedding.bits, embedding.group_size) == (8, 32)
    assert model.layers[0].mlp.up_proj.bits == 4


def test_config_and_folder(tmp_path: Path) -> None:
    report, _, config = convert(tiny_model(), tmp_path)
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 100000
    assert config["tie_word_embeddings"] is True
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    eight = {"group_size": 32, "bits": 8, "mode": "affine"}
    assert config["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine", "model.embed_tokens": eight}
    assert config["quantization_config"] == config["quantization"]
    assert report.summary() == (
        "10 Q4_1 codes kept, 4 bits in groups of 32; 5 F32 copied; "
        "4 Q4_1 codes kept, 4 bits in groups of 32, rows reordered; 1 Q8_0 codes kept, 8 bits in groups of 32"
    )
    found = inspect(report.folder)
    assert found.parameters == sum(weight.size for weight in tiny_model().weights.values())
    assert (found.context_length, found.has_chat_template) == (256, True)
    assert (found.total_bytes, found.weight_files) == (report.weight_bytes, (report.folder / "model.safetensors",))


def test_plain_models_have_no_quantization(tmp_path: Path) -> None:
    tiny = tiny_model(matrix=GGMLQuantizationType.F16, embedding=GGMLQuantizationType.BF16)
    report = convert_gguf(tiny.write(tmp_path / "tiny.gguf"), tmp_path / "model")
    assert inspect(report.folder).quantization is None
    entries = read_header(report.folder / report.files[0]).entries
    assert entries.keys() == tiny.weights.keys()
    assert entries["model.embed_tokens.weight"].dtype == "BF16"
    assert entries["model.layers.0.mlp.up_proj.weight"].dtype == "F16"


def test_splits_into_shards_that_mlx_lm_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx_lm

    monkeypatch.setattr(converter, "SHARD_BYTES", 40_000)
    report, arrays, _ = convert(tiny_model(), tmp_path)
    assert len(report.files) > 1
    assert report.files[0] == f"model-00001-of-{len(report.files):05d}.safetensors"
    assert all((report.folder / name).stat().st_size < 45_000 for name in report.files)
    index = json.loads((report.folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == arrays.keys()
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    assert len(inspect(report.folder).weight_files) == len(report.files)
    mlx_lm.load(str(report.folder))


def llama3_factors(head_dim: int, theta: float) -> np.ndarray:
    """The factors of Llama 3.1 (factor 8), one frequency at a time, after Meta's reference code."""
    factors = []
    for i in range(head_dim // 2):
        wavelength = 2 * np.pi * theta ** (2 * i / head_dim)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / 8 + smooth))
    return np.array(factors, np.float32)


def test_llama3_rope_factors_become_their_parameters(tmp_path: Path) -> None:
    import mlx_lm

    factors = llama3_factors(64, 100000.0)
    assert len(set(factors.tolist())) > 2
    tiny = changed(tiny_model(hidden=256), tensors={"rope_freqs.weight": pack(factors, GGMLQuantizationType.F32)})
    _, _, config = convert(tiny, tmp_path)
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model, _ = mlx_lm.load(str(tmp_path / "model"))
    plain = 100000.0 ** (np.arange(32) * 2 / 64)
    np.testing.assert_allclose(np.array(model.layers[0].self_attn.rope._freqs), plain * factors, rtol=1e-5)


def test_linear_and_yarn_scaling(tmp_path: Path) -> None:
    tiny = changed(
        tiny_model(),
        llama__rope__scaling__type=(STRING, "yarn"),
        llama__rope__scaling__factor=(F32, 4.0),
        llama__rope__scaling__original_context_length=(U32, 64),
    )
    _, _, config = convert(tiny, tmp_path)
    assert config["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


REFUSED: dict[str, tuple[Tiny, str]] = {
    "architecture": (changed(tiny_model(), general__architecture=(STRING, "mamba")), "'mamba'; GGUF files of llama"),
    "no architecture": (changed(tiny_model(), general__architecture=(U32, 1)), "general.architecture"),
    "missing tensor": (changed(tiny_model(), drop="blk.1.ffn_up.weight"), "lacks the tensor 'blk.1.ffn_up.weight'"),
    "missing embedding": (changed(tiny_model(), drop="token_embd.weight"), "token_embd.weight"),
    "left over": (
        changed(tiny_model(), tensors={"blk.0.extra": pack(np.ones(4), GGMLQuantizationType.F32)}),
        "1 tensors that its architecture has no place for, such as 'blk.0.extra'",
    ),
    "shape": (
        changed(tiny_model(), tensors={"output_norm.weight": pack(np.ones(32), GGMLQuantizationType.F32)}),
        r"'output_norm.weight' has the shape \[32\]",
    ),
    "one part of several": (changed(tiny_model(), split__count=(U32, 3)), "one of 3 parts of a model"),
    "experts": (
        changed(tiny_model(), llama__expert_count=(U32, 8), llama__expert_used_count=(U32, 2)),
        "lacks the tensor 'blk.0.ffn_gate_inp.weight'",
    ),
    "partial rotary": (changed(tiny_model(), llama__rope__dimension_count=(U32, 8)), "rotary embeddings over a part"),
    "rope factors": (
        changed(tiny_model(), tensors={"rope_freqs.weight": pack(np.full(8, 3.5), GGMLQuantizationType.F32)}),
        "RoPE factors other than",
    ),
    "rope scaling": (changed(tiny_model(), llama__rope__scaling__type=(STRING, "longrope")), "longrope"),
    "layers": (changed(tiny_model(), llama__block_count=(U32, (1 << 31) - 1)), "claims 2,147,483,647 layers"),
    "no layers": (changed(tiny_model(), llama__block_count=(U32, 0)), "expected a positive number"),
    "heads": (changed(tiny_model(), llama__attention__head_count_kv=(U32, 3)), "3 key/value heads"),
    "heads a layer": (
        changed(tiny_model(), llama__attention__head_count=(ARRAY, (U32, [4, 2]))),
        "should be a whole number",
    ),
    "epsilon": (
        changed(tiny_model(), llama__attention__layer_norm_rms_epsilon=(F32, float("nan"))),
        "is nan; expected a positive number",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_refused(tmp_path: Path, name: str) -> None:
    tiny, message = REFUSED[name]
    with pytest.raises(FormatError, match=message):
        convert(tiny, tmp_path)
    assert names(tmp_path) == ["tiny.gguf"]


def test_a_type_that_would_lose_is_named(tmp_path: Path) -> None:
    tiny = tiny_model(hidden=256)
    rows, columns = tiny.weights["model.layers.0.mlp.up_proj.weight"].shape
    with pytest.raises(FormatError, match=r"'blk.0.ffn_up.weight' has the type Q4_K.*Q5_0, Q5_1, Q8_0, MXFP4 are"):
        convert(changed(tiny, tensors={"blk.0.ffn_up.weight": (12, (rows, columns), bytes(rows * 144))}), tmp_path)


def test_the_source_is_only_read(tmp_path: Path) -> None:
    source = tiny_model().write(tmp_path / "tiny.gguf")
    source.chmod(0o444)
    before, stamp = source.read_bytes(), source.stat().st_mtime_ns
    convert_gguf(source, tmp_path / "model")
    assert (source.read_bytes(), source.stat().st_mtime_ns) == (before, stamp)


def test_progress_counts_the_bytes_of_the_source(tmp_path: Path) -> None:
    tiny = tiny_model()
    heard: list[tuple[int, int]] = []
    convert_gguf(
        tiny.write(tmp_path / "tiny.gguf"), tmp_path / "model", lambda done, total: heard.append((done, total))
    )
    total = sum(len(raw) for _, _, raw in tiny.tensors.values())
    assert heard[-1] == (total, total)
    assert len(heard) == len(tiny.tensors)
    assert heard == sorted(heard)


def test_one_tensor_at_a_time(tmp_path: Path) -> None:
    tiny = tiny_model(hidden=256, layers=16)
    source = tiny.write(tmp_path / "tiny.gguf")
    sizes = [len(raw) for _, _, raw in tiny.tensors.values()]
    del tiny
    tracemalloc.start()
    convert_gguf(source, tmp_path / "model")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(sizes) > 20 * max(sizes)
    assert peak < sum(sizes) / 2


def test_an_existing_destination_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        convert(tiny_model(), tmp_path)
    assert names(tmp_path / "model") == []


def test_a_full_disk_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(EdgeR1Error, match=r"needs up to \d+ MB under .*, but only 1 MB are free"):
        convert(tiny_model(), tmp_path)
    assert names(tmp_path) == ["tiny.gguf"]


@pytest.mark.parametrize(
    ("failure", "expected", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), EdgeR1Error, "became full"),
        (OSError(errno.EIO, "Input/output error"), EdgeR1Error, "input/output error"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
)
def test_a_failure_on_the_way_leaves_nothing(
    tmp_path: Path, failure: BaseException, expected: type[BaseException], message: str
) -> None:
    source = tiny_model().write(tmp_path / "tiny.gguf")

    def fail(done: int, total: int) -> None:
        if done > total // 2:
            raise failure

    with pytest.raises(expected, match=message):
        convert_gguf(source, tmp_path / "model", fail)
    assert names(tmp_path) == ["tiny.gguf"]


def test_a_folder_that_may_not_be_written_to(tmp_path: Path) -> None:
    source = tiny_model().write(tmp_path / "tiny.gguf")
    (tmp_path / "file").touch()
    with pytest.raises(EdgeR1Error, match=r"file/model cannot be written"):
        convert_gguf(source, tmp_path / "file" / "model")


KILLED = """
import os, signal, sys
from pathlib import Path
from edger1.quant import convert
point, source, destination = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
if point == "tensors":
    convert.convert_gguf(source, destination, die)
elif point == "config":
    write = convert.write_text
    convert.write_text = lambda path, text: die() if path.name == "config.json" else write(path, text)
elif point == "rename":
    Path.rename = die
convert.convert_gguf(source, destination)
"""


@pytest.mark.parametrize("point", ["tensors", "config", "rename"])
def test_a_kill_leaves_nothing_that_passes_for_a_model(tmp_path: Path, point: str) -> None:
    source, destination = tiny_model().write(tmp_path / "tiny.gguf"), tmp_path / "model"
    done = subprocess.run([sys.executable, "-c", KILLED, point, source, destination], timeout=LIMIT_S)
    assert done.returncode == -9
    assert names(tmp_path) == [".model.converting", "tiny.gguf"]
    if point != "rename":
        with pytest.raises(FormatError):
            inspect(tmp_path / ".model.converting")
    convert_gguf(source, destination)
    assert names(tmp_path) == ["model", "tiny.gguf"]
    assert inspect(destination).model_type == "llama"


def test_two_conversions_do_not_share_a_folder(tmp_path: Path) -> None:
    source = tiny_model().write(tmp_path / "tiny.gguf")
    other = tmp_path / ".model.converting"
    other.mkdir()
    (other / "theirs").touch()
    fd = os.open(other, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        with pytest.raises(EdgeR1Error, match="Another conversion"):
            convert_gguf(source, tmp_path / "model")
        assert names(other) == ["theirs"]
    finally:
        os.close(fd)


BASE = tiny_model(layers=1).bytes()
TELLING = st.sampled_from([0, 1, 3, 33, 1 << 16, (1 << 31) - 1, 1 << 40, 1 << 60, (1 << 64) - 1])


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    data = bytearray(BASE.data)
    header_bytes = BASE.lengths[-1] + 8
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, header_bytes - 1))
        match draw(st.sampled_from(["length", "flip", "number", "truncate"])):
            case "length":
                at = draw(st.sampled_from(BASE.lengths))
                data[at : at + 8] = struct.pack("<Q", draw(TELLING))
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "number":
                data[at : at + 4] = struct.pack("<I", draw(TELLING) & 0xFFFFFFFF)
            case "truncate":
                del data[draw(st.integers(0, len(data))) :]
    return bytes(data)


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=damaged())
def test_damage_gives_a_format_error_or_a_whole_folder(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "tiny.gguf").write_bytes(data)
    try:
        convert_gguf(folder / "tiny.gguf", folder / "model")
    except FormatError:
        assert names(folder) == ["tiny.gguf"]
    else:
        assert inspect(folder / "model").model_type == "llama"


def test_the_converter_needs_neither_mlx_nor_the_engine() -> None:
    code = (
        "import sys; import edger1.quant.convert; "
        "found = {m for m in sys.modules if m.startswith('edger1.') and not m.startswith('edger1.quant')}; "
        "assert found <= {'edger1.errors'}, found; assert not {'mlx', 'mlx_lm', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=LIMIT_S)
