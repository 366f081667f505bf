"""Documents packed whole into rows of one length, by best fit."""

from __future__ import annotations

import numpy as np


def pack(sizes: np.ndarray, length: int, order: np.ndarray) -> list[list[int]]:
    """Pack documents of `sizes`, none above `length`, into rows by best fit in an order; return rows of indices."""
    rows: list[list[int]] = []
    # Rows with so much room left, and a number whose bits say for which there are any: the best fit is its lowest
    # set bit from the document's size on.
    with_room: list[list[int]] = [[] for _ in range(length + 1)]
    open_rooms = 0
    for i in order.tolist():
        size = int(sizes[i])
        fitting = open_rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                open_rooms &= ~(1 << room)
        else:
            room, row = length, len(rows)
            rows.append([])
        rows[row].append(i)
        if room > size:
            with_room[room - size].append(row)
            open_rooms |= 1 << (room - size)
    return rows
