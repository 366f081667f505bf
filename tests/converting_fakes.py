"""A source that makes its numbers up, and the model it is of: for tests of the converter without files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edger1.quant.planning import Model
from edger1.quant.recipes import Spec
from edger1.quant.source import Codes, Coding

HIDDEN, EXPERTS, LAYERS = 128, 5, 3
SHAPES = {"model.embed_tokens.weight": (320, HIDDEN)}
for _layer in range(LAYERS):
    SHAPES |= {
        f"model.layers.{_layer}.input_layernorm.weight": (HIDDEN,),
        f"model.layers.{_layer}.self_attn.q_proj.weight": (256, HIDDEN),
        f"model.layers.{_layer}.mlp.gate.weight": (EXPERTS, HIDDEN),
        f"model.layers.{_layer}.mlp.switch_mlp.up_proj.weight": (EXPERTS, 192, HIDDEN),
        f"model.layers.{_layer}.mlp.switch_mlp.down_proj.weight": (EXPERTS, HIDDEN, 192),
    }
SHAPES["model.norm.weight"] = (HIDDEN,)


@dataclass
class FakeTensor:
    name: str
    shape: tuple[int, ...]
    values: np.ndarray
    dtype: str = "BF16"
    kind: str = "BF16"
    coding: Coding | None = None
    reads: list[tuple[int, int]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return self.values.size * 2

    def sources(self, start: int, stop: int) -> tuple[str, ...]:
        return (self.name,)

    def read(self, start: int, stop: int) -> np.ndarray:
        self.reads.append((start, stop))
        return self.values[start:stop] if self.shape else self.values

    def codes(self, start: int, stop: int) -> Codes:
        raise AssertionError


class FakeSource:
    """See quant/source.py's Source; `values` are bf16 numbers by name."""

    name = "fake"
    companions: tuple[Path, ...] = ()

    def __init__(self, shapes: Mapping[str, tuple[int, ...]] = SHAPES, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.config: dict[str, Any] = {"model_type": "fake", "num_hidden_layers": LAYERS}
        self.values = {
            name: (rng.standard_normal(shape, np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
            for name, shape in shapes.items()
        }
        self.tensors = {name: FakeTensor(name, value.shape, value) for name, value in self.values.items()}
        self.fingerprint = f"seed {seed}"

    def close(self) -> None:
        return


def fake_model(source: FakeSource, **own: bool | Spec) -> Model:
    """Return the model of `source`: every matrix can be quantized but the routers, which mlx-lm would have none of."""
    paths = {name.removesuffix(".weight"): len(t.shape) > 1 for name, t in source.tensors.items()}
    modules = {path: not path.endswith(".gate") for path, matrix in paths.items() if matrix}
    return Model(tuple(source.tensors.values()), {**modules, **own}, LAYERS)


def files(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
