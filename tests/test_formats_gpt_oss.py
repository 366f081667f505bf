"""gpt-oss's unquantized experts: split and turned round as mlx-lm has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from weight_folders import Arrays, bf16, from_bf16, open_folder

from edger1.errors import FormatError

RNG = np.random.default_rng(0)
EXPERTS, HIDDEN, WIDE = 3, 6, 4
PATH = "model.layers.0.mlp.experts"
SHAPES = {
    "gate_up_proj": (EXPERTS, HIDDEN, 2 * WIDE), "gate_up_proj_bias": (EXPERTS, 2 * WIDE),
    "down_proj": (EXPERTS, WIDE, HIDDEN), "down_proj_bias": (EXPERTS, HIDDEN),
}  # fmt: skip
VALUES = {name: from_bf16(bf16(RNG.standard_normal(shape).astype(np.float32))) for name, shape in SHAPES.items()}
ARRAYS: Arrays = {f"{PATH}.{name}": ("BF16", bf16(value)) for name, value in VALUES.items()}


def test_an_expert_computes_what_it_did(tmp_path: Path) -> None:
    tensors = open_folder(tmp_path, ARRAYS, model_type="gpt_oss").tensors
    read = {name.removeprefix(f"{PATH}."): tensor.read(0, EXPERTS) for name, tensor in tensors.items()}
    assert {name: value.shape for name, value in read.items()} == {
        name: tensors[f"{PATH}.{name}"].shape for name in read
    }
    x = RNG.standard_normal(HIDDEN)
    for expert in range(EXPERTS):
        both = x @ VALUES["gate_up_proj"][expert] + VALUES["gate_up_proj_bias"][expert]
        for name, expected in (("gate_proj", both[::2]), ("up_proj", both[1::2])):
            found = read[f"{name}.weight"][expert] @ x + read[f"{name}.bias"][expert]
            np.testing.assert_allclose(found, expected, rtol=1e-6)
        down = both[::2] @ VALUES["down_proj"][expert] + VALUES["down_proj_bias"][expert]
        found = read["down_proj.weight"][expert] @ both[::2] + read["down_proj.bias"][expert]
        np.testing.assert_allclose(found, down, rtol=1e-6)


def test_one_expert_at_a_time(tmp_path: Path) -> None:
    tensors = open_folder(tmp_path, ARRAYS, model_type="gpt_oss").tensors
    for tensor in tensors.values():
        assert tensor.dtype == "BF16"
        whole = tensor.read(0, EXPERTS)
        for expert in range(EXPERTS):
            np.testing.assert_array_equal(tensor.read(expert, expert + 1), whole[expert : expert + 1])
    assert sum(tensor.nbytes for tensor in tensors.values()) == sum(array.nbytes for _, array in ARRAYS.values())


def test_mlx_lm_takes_the_names(tmp_path: Path) -> None:
    from mlx_lm.models import gpt_oss

    tensors = open_folder(tmp_path, ARRAYS, model_type="gpt_oss").tensors
    sizes = {"hidden_size": HIDDEN, "intermediate_size": WIDE, "num_local_experts": EXPERTS, "vocab_size": 8}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4}
    model = gpt_oss.Model(gpt_oss.ModelArgs(num_hidden_layers=2, **sizes, **heads))
    experts: Any = model.model.layers[0].mlp.experts
    for name, tensor in tensors.items():
        module, _, part = name.removeprefix(f"{PATH}.").partition(".")
        assert tuple(experts[module][part].shape) == tensor.shape
    assert model.sanitize(dict.fromkeys(tensors)) == dict.fromkeys(tensors)


@pytest.mark.parametrize("name", SHAPES)
def test_parts_that_do_not_go_together_are_refused(tmp_path: Path, name: str) -> None:
    odd = np.zeros((EXPERTS, 5, 5) if name in ("gate_up_proj", "down_proj") else (EXPERTS, 5), np.uint16)
    with pytest.raises(FormatError, match="experts"):
        open_folder(tmp_path, {**ARRAYS, f"{PATH}.{name}": ("BF16", odd)})


def test_experts_without_biases_are_somebody_elses(tmp_path: Path) -> None:
    arrays = {name: value for name, value in ARRAYS.items() if not name.endswith("_bias")}
    assert set(open_folder(tmp_path, arrays).tensors) == set(arrays)
