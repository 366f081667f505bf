"""GPTQ's packed codes, as AutoGPTQ, GPTQModel and AutoRound write them.

For a layer of k inputs and n outputs: `qweight` I32 [k * bits / 32, n] is packed along the inputs, `qzeros`
I32 [groups, n * bits / 32] along the outputs, `scales` [groups, n], `g_idx` I32 [k] the group of each input. In the
first format ("gptq") the zero points are stored less one, in the second ("gptq_v2") as they are. A row of the weight is
a column of `qweight`, which is read by itself. The bits, which may differ from layer to layer, follow from the shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from edger1.errors import FormatError
from edger1.quant.formats.files import RawTensor
from edger1.quant.formats.numbers import unpack
from edger1.quant.formats.plain import decode
from edger1.quant.formats.tensor import Context, Raw, check_dtype, check_matrix, check_shape, take
from edger1.quant.formats.zero_point import ZeroPointTensor
from edger1.quant.source import Tensor

SCALES = ("F16", "BF16", "F32")
WORDS = ("I32", "U32")

_BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class GPTQTensor(ZeroPointTensor):
    """See the module; `zero_offset` is what to add to a stored zero point."""

    qweight: RawTensor
    qzeros: RawTensor
    zero_offset: int

    def read_codes(self, start: int, stop: int) -> np.ndarray:
        """Return the codes of rows [start, stop)."""
        return unpack(self.read_words(start, stop), self.bits)

    def read_words(self, start: int, stop: int) -> np.ndarray:
        """Return the codes of rows [start, stop) as MLX packs them, which is a column of them after the other."""
        return np.ascontiguousarray(self.qweight.columns(start, stop).T).view(np.uint32)

    def read_scales(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return scales and zero points of rows [start, stop)."""
        scales = decode(self.scale.columns(start, stop).T, self.scale.dtype)
        # 32 codes take whole words, whatever the bits.
        first = start // 32 * 32
        words = self.qzeros.columns(first * self.bits // 32, -(-stop * self.bits // 32))
        zeros = unpack(words.view(np.uint32), self.bits)[:, start - first : stop - first]
        return np.ascontiguousarray(scales), (zeros + np.uint8(self.zero_offset) & np.uint8((1 << self.bits) - 1)).T


def claim(left: Raw, context: Context) -> dict[str, Tensor]:
    """Take `X.qweight` and what belongs to it, unless the config says that this is AWQ."""
    found: dict[str, Tensor] = {}
    settings = context.settings
    if is_awq(settings):
        return found
    for part in [name for name in left if name.endswith(".qweight")]:
        path = part.removesuffix(".qweight")
        scale, qzeros = take(left, f"{path}.scales", part), take(left, f"{path}.qzeros", part)
        order = left.pop(f"{path}.g_idx", None)
        qweight = left.pop(part)
        for tensor in (qweight, qzeros):
            check_dtype(tensor, WORDS)
            check_matrix(tensor)
        check_dtype(scale, SCALES)
        outputs = qweight.shape[1]
        bits = qzeros.shape[1] * 32 // max(outputs, 1)
        if bits not in _BITS:
            raise FormatError(
                f"{qweight.path}: tensor {qzeros.name[:80]!r} of shape {list(qzeros.shape)} beside {part[-40:]!r} of "
                f"shape {list(qweight.shape)} means {bits} bits; {', '.join(map(str, _BITS))} bits can be read."
            )
        inputs = qweight.shape[0] * 32 // bits
        group_size = group_size_of(settings) or max(inputs, 1)
        groups = -(-inputs // group_size)
        check_shape(scale, [(groups, outputs)], qweight)
        check_shape(qzeros, [(groups, -(-outputs * bits // 32))], qweight)
        if order is not None:
            check_dtype(order, ("I32", "I64"))
            check_shape(order, [(inputs,)], qweight)
        nbytes = sum(tensor.nbytes for tensor in (qweight, scale, qzeros))
        offset = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
        name = f"{path}.weight"
        found[name] = GPTQTensor(
            name, (outputs, inputs), scale.dtype, f"GPTQ {bits}", nbytes, context.only_finite,
            bits, group_size, scale, order, bool(settings.get("desc_act")), qweight, qzeros, offset,
        )  # fmt: skip
    return found


def group_size_of(settings: Mapping[str, Any]) -> int | None:
    """Return the group size that the config gives, None for whole rows. Raises FormatError for nonsense."""
    value = settings.get("group_size", settings.get("q_group_size", 128))
    if value in (-1, None):
        return None
    if type(value) is not int or not 0 < value < 1 << 20:
        raise FormatError(
            f"config.json gives {str(value)[:40]!r} as its group_size; expected a positive number, or -1 for rows."
        )
    return value


def is_awq(settings: Mapping[str, Any]) -> bool:
    """Whether the config says that packed weights are AWQ's, which have the same names."""
    return settings.get("quant_method") == "awq" or "awq" in str(settings.get("packing_format", ""))
