"""Which of a source's tensors some rows of an expression are made of: fewer than all, where experts are stacked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import accumulate

from edger1.quant.expressions import Computed, Expression, Joined, Leaf, Permuted, Reshaped, Sliced, Viewed


def needed(node: Expression, start: int, stop: int) -> Iterator[str]:
    """Yield the names of the tensors that rows [start, stop) depend on, some of them more than once.

    Where a kind of node is not known, that is all tensors below it.
    """
    if isinstance(node, Leaf):
        yield node.name
    elif isinstance(node, Joined) and node.axis == 0:
        ends = list(accumulate(part.shape[0] for part in node.parts))
        for part, end in zip(node.parts, ends, strict=True):
            begin = end - part.shape[0]
            if max(start, begin) < min(stop, end):
                yield from needed(part, max(start, begin) - begin, min(stop, end) - begin)
    elif isinstance(node, Reshaped) and node.shape and node.source.shape and 0 not in node.shape:
        ours, theirs = math.prod(node.shape[1:]), math.prod(node.source.shape[1:])
        yield from needed(node.source, start * ours // theirs, -(-stop * ours // theirs))
    elif isinstance(node, Sliced) and node.picks[0][1] > 0 and start < stop:
        first, step = node.picks[0]
        yield from needed(node.source, first + start * step, first + (stop - 1) * step + 1)
    elif isinstance(node, Permuted) and node.order[0] != 0:
        yield from (leaf.name for leaf in node.leaves())
    elif isinstance(node, Joined | Computed | Permuted) or (isinstance(node, Viewed) and len(node.shape) > 1):
        for source in node.inputs:
            yield from needed(source, start, stop)
    else:
        yield from (leaf.name for leaf in node.leaves())
