"""The slots of one layer: memory for some of its experts, filled from the store and overwritten in place.

A slot is a row in each of the layer's bank arrays, MLX arrays [slots, ...] that the layer computes with, written
through NumPy views of the same memory. So nothing that MLX has still to compute may read a slot that is being filled:
whoever asks for experts has MLX finish first (`layer.py`).

An expert's bytes are there when its read has ended well. A read that failed, or was given up, leaves its slot free.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edger1.experts import page_cache
from edger1.experts.anatomy import LayerExperts, mlx_dtype
from edger1.experts.policy import Policy
from edger1.experts.store import DIRECT_BLOCK, Bytes, Read, Store

ABSENT = -1
PATIENCE_S = 0.05
"""How long to wait for a read before it is looked whether anyone still wants it."""
_ALIGNED = 8
"""What begins at another number of bytes is not read in place: vectors of no dtype may begin there."""


class Bank:
    """Slots for the experts of one layer.

    `arrays` maps (projection, name) to the MLX array [slots, ...] of that part. Used by one thread; reads end on
    others.
    """

    def __init__(self, layer: LayerExperts, slots: int, store: Store, policy: Policy) -> None:
        self.layer, self.store, self.policy = layer, store, policy
        self.slots = slots
        self.arrays = {(part.projection, part.name): _allocate(slots, part) for part in layer.parts}
        self._rows = [_bytes_of(self.arrays[part.projection, part.name], part.nbytes) for part in layer.parts]
        self.table: npt.NDArray[np.int32] = np.full(layer.experts, ABSENT, np.int32)
        self.places: npt.NDArray[np.int32] = self.table.copy()
        """The same with the slots of experts that are on their way."""
        self._here: set[int] = set()
        self.loading: dict[int, Read] = {}
        self._lasting: set[int] = set()
        self._leaving: list[tuple[Read, int]] = []
        self.arrivals: Any = None
        """The kernels' `Arrivals`, where operations wait for reads by themselves."""
        self._slot_of_read: dict[int, int] = {}
        self._free = list(range(slots - 1, -1, -1))
        # Slots whose memory was given back; they are the last that are used again.
        self._released: list[int] = []
        self.identity = False
        """Whether expert e lies in slot e for all of them, so that indices need no translation."""
        self.check: Callable[[], None] = lambda: None
        """Called while it waits; raises where nobody wants the answer any more."""

    @property
    def nbytes(self) -> int:
        """Bytes of the slots whose memory is held."""
        return (self.slots - len(self._released)) * self.layer.expert_bytes

    @property
    def present(self) -> int:
        """How many experts are there."""
        return len(self._here)

    @property
    def usable_slots(self) -> int:
        """Slots that can hold an expert at the moment."""
        return self.slots - len(self._released)

    @property
    def has_free_slots(self) -> bool:
        """Whether an expert can come in without another leaving."""
        return bool(self._free)

    def load_all(self) -> Sequence[Read]:
        """Begin to fill every slot, expert e into slot e; for a bank with a slot for each expert."""
        self._free = []
        self._released = []
        reads = [self._start(expert, expert, guessed=False) for expert in range(self.layer.experts)]
        self.identity = True
        return reads

    def request(
        self, expert: int, keep: Collection[int], *, guessed: bool = False, lasting: bool = False
    ) -> Read | None:
        """Begin to bring in an expert that is not there; None where no slot can be freed without one of `keep`.

        A read that is under way already is returned, and goes before others now unless this one is a guess as well. A
        guess that is `lasting` is good for longer than the next call of the layer. Guesses may come at any moment after
        somebody looked: for an expert that is there by now a read that has ended is returned.
        """
        self.settle()
        if self.table[expert] >= 0:
            return Read.over(self.layer, expert)
        under_way = self.loading.get(expert)
        if under_way is not None:
            if not guessed:
                self.store.hurry(under_way)
            return under_way
        slot = self._take_slot(keep)
        if slot is None:
            return None
        if lasting:
            self._lasting.add(expert)
        else:
            self._lasting.discard(expert)
        return self._start(expert, slot, guessed=guessed)

    def ensure(self, experts: Sequence[int], keep: Collection[int] = ()) -> None:
        """Bring experts in and wait until they are there.

        Raises StreamError where a read fails, and ValueError for more experts, with those to keep, than usable slots.
        """
        wanted = {*experts, *keep}
        if len(wanted) > self.usable_slots:
            raise ValueError(f"{len(wanted)} experts at once in {self.usable_slots} slots")
        missing = [e for e in dict.fromkeys(experts) if self.table[e] < 0]
        reads: list[Read] = []
        for expert in missing:
            while (read := self.request(expert, wanted)) is None:
                self.make_way(wanted, reads)
            reads.append(read)
        self.wait(reads)

    def make_way(self, keep: Collection[int], reads: Collection[Read], patience_s: float = PATIENCE_S) -> None:
        """Go on towards a free slot where the slots suffice, but guesses hold some; `reads` are those to be kept.

        To be called again until `request` gives a read.
        """
        self.give_up_guesses(keep, lasting=True)
        self.settle()
        under_way = self.others_under_way(reads)
        # A guess that came just now holds a slot that can be had.
        if not self.has_free_slots and under_way:
            under_way[0].wait(patience_s)
        self.check()

    def wait(self, reads: Sequence[Read]) -> None:
        """Wait until reads have ended, and raise what the first failed of. Who can be interrupted puts its own here."""
        for read in reads:
            read.wait()
        self.settle()
        for read in reads:
            if read.error is not None:
                raise read.error

    def settle(self) -> None:
        """Take note of reads that have ended: their experts are there, or their slots free again."""
        for given_up in [each for each in self._leaving if each[0].done]:
            self._leaving.remove(given_up)
            self._free.append(given_up[1])
        for expert, read in list(self.loading.items()):
            if not read.done:
                continue
            del self.loading[expert]
            slot = self._slot_of_read.pop(expert)
            if read.error is None:
                self.table[expert] = slot
                self._here.add(expert)
            else:
                self.places[expert] = ABSENT
                self._free.append(slot)

    def others_under_way(self, reads: Collection[Read]) -> list[Read]:
        """Return the reads that hold slots and are none of `reads`."""
        held = [read for read, _ in self._leaving] + list(self.loading.values())
        return [read for read in held if read not in reads]

    def forget_arrivals(self) -> None:
        """Begin with new arrivals, which those reads tell as well that are under way: the next call may want them."""
        if self.arrivals is None:
            return
        self.arrivals = type(self.arrivals)(self.arrivals.slots)
        for expert, read in self.loading.items():
            self._tell(read, self._slot_of_read[expert])

    def give_up_guesses(self, wanted: Collection[int], *, lasting: bool = False) -> None:
        """Cancel the guesses that are not among `wanted`; what is being read by now is read to its end.

        Those that were made for longer than the next call go only if `lasting` says so.
        """
        for expert, read in list(self.loading.items()):
            if read.guessed and not read.done and expert not in wanted and (lasting or expert not in self._lasting):
                self.store.give_up(read)
                del self.loading[expert]
                self.places[expert] = ABSENT
                # Free when its last piece has been left out, or read.
                self._leaving.append((read, self._slot_of_read.pop(expert)))

    def shrink(self, slots: int, keep: Collection[int] = ()) -> int:
        """Give the memory of up to `slots` slots back to the system; returns how many bytes went."""
        if not page_cache.can_release():
            # No expert is to leave for nothing.
            return 0
        self.settle()
        given = 0
        for _ in range(slots):
            slot = self._take_slot(keep)
            if slot is None:
                break
            freed = sum(page_cache.release(row[slot].ctypes.data, row[slot].nbytes) for row in self._rows)
            if not freed:
                self._free.append(slot)
                break
            self._released.append(slot)
            given += freed
        self.identity = self.identity and not self._released
        return given

    def grow(self, slots: int) -> int:
        """Use up to `slots` of the slots again whose memory was given back; returns how many bytes they take."""
        back = min(slots, len(self._released))
        for _ in range(back):
            self._free.insert(0, self._released.pop())
        return back * self.layer.expert_bytes

    def resident(self) -> list[int]:
        """Return the experts that are there."""
        return sorted(self._here)

    def _start(self, expert: int, slot: int, *, guessed: bool) -> Read:
        read = self.store.read(self.layer, expert, [row[slot] for row in self._rows], guessed=guessed)
        self.loading[expert] = read
        self._slot_of_read[expert] = slot
        self.places[expert] = slot
        self._tell(read, slot)
        return read

    def _tell(self, read: Read, slot: int) -> None:
        """Let operations wait for a read."""
        arrivals = self.arrivals
        if arrivals is not None:
            arrivals.expect([slot])
            read.then(lambda ended: arrivals.done(slot) if ended.error is None else arrivals.fail(slot))

    def _take_slot(self, keep: Collection[int]) -> int | None:
        if self._free:
            return self._free.pop()
        leaving = self.policy.victim(self._here, keep)
        if leaving is None:
            return None
        slot = int(self.table[leaving])
        self.table[leaving] = self.places[leaving] = ABSENT
        self._here.discard(leaving)
        self.identity = False
        return slot


def _allocate(slots: int, part: Any) -> Any:
    import mlx.core as mx

    from edger1.kernels.pages import use_huge_pages

    dtype = getattr(mx, mlx_dtype(part))
    if part.nbytes % DIRECT_BLOCK or part.offset % _ALIGNED:
        array = mx.zeros((slots, *part.shape), dtype=dtype)
        mx.eval(array)
        use_huge_pages([array])
        return array
    # Every expert lies to a block of the disk as the first does. Where the slots do as well, direct reads come straight
    # into them.
    room = mx.zeros(slots * part.nbytes + DIRECT_BLOCK, dtype=mx.uint8)
    mx.eval(room)
    use_huge_pages([room])
    first = (part.offset - np.array(room, copy=False).ctypes.data) % DIRECT_BLOCK
    array = room[first : first + slots * part.nbytes].view(dtype).reshape(slots, *part.shape)
    mx.eval(array)
    return array


def _bytes_of(array: Any, nbytes: int) -> Bytes:
    """Return the memory of a bank array as uint8 [slots, nbytes]; writing to it changes the array."""
    import mlx.core as mx

    # NumPy has no bfloat16.
    plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    mx.eval(plain)
    view = np.array(plain, copy=False)
    return view.view(np.uint8).reshape(array.shape[0], nbytes)
