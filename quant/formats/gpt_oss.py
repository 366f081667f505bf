"""gpt-oss's experts unquantized, as transformers stores them: stacked the other way round, gate and up interleaved.

`gate_up_proj` [experts, hidden, 2 * intermediate] holds gate and up in turns along its last axis, `down_proj`
[experts, intermediate, hidden]; both are used from the right (x @ w). mlx-lm reads the experts quantized by MXFP4 alone
(`_blocks`, `_scales`), and takes everything as it stands where it finds its own names, which are given here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edger1.errors import FormatError
from edger1.quant.formats.files import RawTensor
from edger1.quant.formats.plain import decode
from edger1.quant.formats.tensor import Context, Raw, StoredTensor, check_shape
from edger1.quant.source import Tensor

_SUFFIX = ".experts.gate_up_proj"
_PLAIN = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class ExpertsTensor(StoredTensor):
    """A stack of experts, or their biases; of the last axis of what is stored every `step`th from `first`."""

    raw: RawTensor
    first: int
    step: int

    def values(self, start: int, stop: int) -> np.ndarray:
        """Return experts [start, stop)."""
        part = decode(self.raw.rows(start, stop)[..., self.first :: self.step], self.raw.dtype)
        return np.ascontiguousarray(part.swapaxes(1, 2) if part.ndim == 3 else part)


def claim(left: Raw, context: Context) -> dict[str, Tensor]:
    """Take the four tensors of each layer's experts."""
    found: dict[str, Tensor] = {}
    for name in [name for name in left if name.endswith(_SUFFIX)]:
        path = name.removesuffix("gate_up_proj")
        parts = [f"{path}{part}" for part in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")]
        # The biases are gpt-oss's alone.
        if not all(part in left and left[part].dtype in _PLAIN for part in parts):
            continue
        both, both_bias, down, down_bias = (left.pop(part) for part in parts)
        if len(both.shape) != 3 or len(down.shape) != 3 or both.shape[2] % 2:
            raise FormatError(
                f"{both.path}: tensors {name[:80]!r} of shape {list(both.shape)} and {down.name[-40:]!r} of shape "
                f"{list(down.shape)} are no stacks of gpt-oss's experts. Fetch the model again."
            )
        experts, hidden, twice = both.shape
        check_shape(both_bias, [(experts, twice)], both)
        check_shape(down, [(experts, twice // 2, hidden)], both)
        check_shape(down_bias, [(experts, hidden)], both)
        for target, raw, first, step in (
            ("gate_proj.weight", both, 0, 2), ("gate_proj.bias", both_bias, 0, 2),
            ("up_proj.weight", both, 1, 2), ("up_proj.bias", both_bias, 1, 2),
            ("down_proj.weight", down, 0, 1), ("down_proj.bias", down_bias, 0, 1),
        ):  # fmt: skip
            columns = raw.shape[-1] // step
            shape = (experts, columns, raw.shape[1]) if len(raw.shape) == 3 else (experts, columns)
            name = path + target
            found[name] = ExpertsTensor(
                name, shape, raw.dtype, raw.dtype, raw.nbytes // step, context.only_finite, raw, first, step
            )
    return found
