"""AWQ's packed 4-bit codes in the layout "gemm", as AutoAWQ writes them.

For a layer of k inputs and n outputs: `qweight` I32 [k, n / 8] is packed along the outputs, eight to a word, `qzeros`
I32 [groups, n / 8] likewise, `scales` [groups, n]. Within a word the outputs come in the order 0 2 4 6 1 3 5 7, lowest
bits first. A row of the weight is a part of a column of `qweight`; only those words are read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edger1.errors import FormatError
from edger1.quant.formats.files import RawTensor
from edger1.quant.formats.gptq import SCALES, WORDS, group_size_of
from edger1.quant.formats.plain import decode
from edger1.quant.formats.tensor import Context, Raw, check_dtype, check_matrix, check_shape, take
from edger1.quant.formats.zero_point import ZeroPointTensor
from edger1.quant.source import Tensor

_ORDER = np.array([0, 2, 4, 6, 1, 3, 5, 7])
_PLACE = np.argsort(_ORDER)
"""Where in a word each of eight outputs is."""


@dataclass(frozen=True)
class AWQTensor(ZeroPointTensor):
    """See the module."""

    qweight: RawTensor
    qzeros: RawTensor

    def read_codes(self, start: int, stop: int) -> np.ndarray:
        """Return the codes of rows [start, stop)."""
        return _outputs(self.qweight, start, stop)

    def read_scales(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return scales and zero points of rows [start, stop)."""
        scales = decode(self.scale.columns(start, stop).T, self.scale.dtype)
        return np.ascontiguousarray(scales), _outputs(self.qzeros, start, stop)


def _outputs(packed: RawTensor, start: int, stop: int) -> np.ndarray:
    """Return outputs [start, stop) of all packed rows: uint8 [stop - start, rows]."""
    first = start // 8
    words = np.ascontiguousarray(packed.columns(first, -(-stop // 8)).T).view(np.uint32)
    codes = np.empty((len(words), 8, words.shape[1]), np.uint8)
    for output, place in enumerate(_PLACE):
        np.bitwise_and(words >> np.uint32(4 * place), 15, out=codes[:, output], casting="unsafe")
    return codes.reshape(len(words) * 8, words.shape[1])[start - first * 8 : stop - first * 8]


def claim(left: Raw, context: Context) -> dict[str, Tensor]:
    """Take `X.qweight` and what belongs to it; GPTQ has taken its own before."""
    found: dict[str, Tensor] = {}
    settings = context.settings
    for part in [name for name in left if name.endswith(".qweight")]:
        version = str(settings.get("version", "gemm")).lower()
        if version != "gemm":
            raise FormatError(
                f"{left[part].path}: its AWQ weights are in the layout {version[:20]!r}, which cannot be read; only "
                "'gemm' can. Get the model in that layout, or unquantized."
            )
        if settings.get("bits", settings.get("w_bit", 4)) != 4:
            raise FormatError(
                f"{left[part].path}: config.json gives AWQ weights of {str(settings.get('bits'))[:20]} bits; only 4 "
                "can be read. Get the model in those, or unquantized."
            )
        path = part.removesuffix(".qweight")
        scale, qzeros = take(left, f"{path}.scales", part), take(left, f"{path}.qzeros", part)
        qweight = left.pop(part)
        for tensor in (qweight, qzeros):
            check_dtype(tensor, WORDS)
            check_matrix(tensor)
        check_dtype(scale, SCALES)
        inputs, outputs = qweight.shape[0], qweight.shape[1] * 8
        group_size = group_size_of(settings) or max(inputs, 1)
        groups = -(-inputs // group_size)
        check_shape(scale, [(groups, outputs)], qweight)
        check_shape(qzeros, [(groups, outputs // 8)], qweight)
        nbytes = sum(tensor.nbytes for tensor in (qweight, scale, qzeros))
        name = f"{path}.weight"
        found[name] = AWQTensor(
            name, (outputs, inputs), scale.dtype, "AWQ 4", nbytes, context.only_finite,
            4, group_size, scale, None, False, qweight, qzeros,
        )  # fmt: skip
    return found
