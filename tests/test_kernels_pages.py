"""Moving weights to huge pages changes where they lie and nothing else."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from edger1 import kernels
from edger1.kernels.pages import HUGE_PAGE_BYTES, HugePages, use_huge_pages

pytestmark = pytest.mark.skipif(kernels._load()[0] is None, reason="the kernels are not built")


def test_values_stay():
    large = mx.arange(3_000_000, dtype=mx.int32)
    small = mx.arange(100)
    mx.eval(large, small)
    moved = use_huge_pages([large, small])
    assert moved % HUGE_PAGE_BYTES == 0
    assert 0 <= moved <= large.nbytes
    assert np.array_equal(np.array(large), np.arange(3_000_000, dtype=np.int32))


def test_an_array_that_is_not_computed_is_refused():
    with pytest.raises(ValueError, match="evaluated"):
        use_huge_pages([mx.zeros((1000, 1000)) + 1])


def test_small_arrays_lie_side_by_side_and_outlive_what_they_came_from():
    shapes = [(3, 5), (64, 36), (1,), (700, 900), (2, 3, 4), (900, 1100)]
    kinds = [mx.float16, mx.uint32, mx.float32, mx.uint8, mx.bfloat16, mx.float32]
    sources = [mx.random.uniform(0, 200, shape).astype(kind) for shape, kind in zip(shapes, kinds, strict=True)]
    mx.eval(sources)
    expected = [np.array(a.astype(mx.float32)) for a in sources]
    pages = HugePages(sum(a.nbytes for a in sources[:-1]))
    held = [pages.hold(a) for a in sources]
    del sources, pages
    for a, shape, kind, values in zip(held, shapes, kinds, expected, strict=True):
        assert (a.shape, a.dtype) == (shape, kind)
        assert np.array_equal(np.array(a.astype(mx.float32)), values)
    # Written to by whoever holds it alone, an array changes nothing beside it.
    held[0] = held[0] + 1
    mx.eval(held[0])
    assert np.array_equal(np.array(held[1]), expected[1])


def test_columns_of_something_larger_stay_where_they_are():
    columns = mx.arange(100).reshape(10, 10)[:, :3]
    mx.eval(columns)
    assert np.array_equal(np.array(HugePages(1000).hold(columns)), np.arange(100).reshape(10, 10)[:, :3])


GUARDED = """
import mmap, os, sys
import numpy as np
from edger1 import kernels
path = sys.argv[1]
with open(path, "wb") as file:
    file.write(b"x" * 100 * mmap.PAGESIZE)
descriptor = os.open(path, os.O_RDONLY)
mapped = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
guard = kernels.extension().MapGuard(mapped)
whole = np.frombuffer(mapped, np.uint8)
assert whole.sum() == 100 * mmap.PAGESIZE * ord("x")
assert not guard.broken
os.truncate(path, 50 * mmap.PAGESIZE)
assert whole.sum() == 50 * mmap.PAGESIZE * ord("x")
assert guard.broken
other = mmap.mmap(-1, mmap.PAGESIZE)
assert not kernels.extension().MapGuard(other).broken
print("lived")
del guard
os.truncate(path, 10 * mmap.PAGESIZE)
print(whole.sum())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernels' maps are Linux's")
def test_a_map_whose_file_is_cut_short_does_not_end_the_process(tmp_path: Path) -> None:
    """Until nobody guards it any more: then it is an error as it always was."""
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, str(tmp_path / "file")], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.strip() == "lived", done.stderr
    assert done.returncode == -signal.SIGBUS


@pytest.mark.parametrize(
    ("kind", "wanted"), [(mx.float32, mx.float16), (mx.float32, mx.float32), (mx.float16, mx.float16)]
)
def test_a_cache_moves_to_a_room_with_its_rows_and_zeros_behind_them(kind: mx.Dtype, wanted: mx.Dtype):
    rooms = kernels._load()[0].CacheRooms()
    # Some share a room, and the last has one of its own.
    scale = 1e5 if kind == mx.float32 else 1.0
    sources = [(mx.random.normal((2, 3, rows, 64)) * scale).astype(kind) for rows in (300, 7, 20_000)]
    mx.eval(sources)
    moved = [rooms.hold(a, a.shape[2] - 2, a.shape[2] + 256, wanted) for a in sources]
    del rooms
    for a, b in zip(sources, moved, strict=True):
        used = a.shape[2] - 2
        assert (b.shape, b.dtype) == ((2, 3, a.shape[2] + 256, 64), wanted)
        largest = 65504 if wanted == mx.float16 and kind == mx.float32 else mx.inf
        assert mx.array_equal(b[..., :used, :], mx.clip(a[..., :used, :], -largest, largest).astype(wanted))
        assert mx.abs(b[..., used:, :]).max().item() == 0
    expected = moved[1] + 0
    mx.eval(expected)
    # Whoever comes next to it may go; who is left is as it was.
    del moved[0]
    assert mx.array_equal(moved[0], expected)


def test_what_a_room_cannot_hold_as_wanted_is_left_alone():
    rooms = kernels._load()[0].CacheRooms()
    a = mx.zeros((1, 2, 40, 64))
    mx.eval(a)
    assert rooms.hold(a, 41, 256, mx.float32) is None
    assert rooms.hold(a, 40, 39, mx.float32) is None
    assert rooms.hold(a, 40, 256, mx.bfloat16) is None
    columns = mx.arange(4000, dtype=mx.float32).reshape(1, 2, 20, 100)[..., :50]
    mx.eval(columns)
    assert rooms.hold(columns, 20, 256, mx.float32) is None
    with pytest.raises(ValueError, match="evaluated"):
        rooms.hold(mx.zeros((1, 2, 40, 64)) + 1, 40, 256, mx.float32)


def test_rooms_count_what_they_hold_and_keep_what_they_may() -> None:
    extension = kernels._load()[0]
    extension.keep_spare_rooms(0)
    before = extension.cache_room_bytes()

    def held() -> int:
        count: int = extension.cache_room_bytes() - before
        return count

    a = mx.zeros((1, 4, 5000, 64))
    mx.eval(a)
    # 5 MB each: two rooms.
    rooms = extension.CacheRooms()
    moved = [rooms.hold(a, 5000, 5120, mx.float32) for _ in range(2)]
    assert 2 * a.nbytes <= held() <= 2 * (a.nbytes + (4 << 20))
    in_use = held()
    extension.keep_spare_rooms(12 << 20)
    del rooms, moved
    assert held() == in_use // 2, "one room of 8 MB is let wait"
    rooms = extension.CacheRooms()
    moved = [rooms.hold(a, 5000, 5120, mx.float32)]
    assert held() == in_use // 2, "it is used again"
    del rooms, moved
    extension.keep_spare_rooms(0)
    assert held() == 0
