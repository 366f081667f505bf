"""The memory plan as a promise: a full context under a limit that the system enforces, and not only our accounting."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import edger1
from edger1 import kernels

CGROUPS = Path("/sys/fs/cgroup")
CONTEXT = 2048
# A prompt that leaves a few tokens for the answer, three more of a third each at once, a conversation, and scoring.
PROGRAM = f"""
import sys, edger1
with edger1.load(sys.argv[1], memory=int(sys.argv[2]), context={CONTEXT}) as m:
    text = "The quick brown fox jumps over the lazy dog and runs far away. "
    first = m.generate(text * 140, raw=True, max_tokens=8)
    handles = [m.submit(f"{{i}} " + text * 40, raw=True, max_tokens=8) for i in range(3)]
    for handle in handles:
        handle.result()
    chat = m.chat()
    chat.send("Hello", max_tokens=8)
    last = chat.send("And again", max_tokens=8)
    m.score(list(range({CONTEXT // 2})))
    print(first.usage.prompt_tokens, last.figures.peak_memory_bytes)
"""


@pytest.fixture
def limited() -> Iterator[Path | None]:
    """A cgroup of our own, version 1 or 2, or None where none can be made."""
    parents = (CGROUPS / "memory", "memory.limit_in_bytes"), (CGROUPS, "memory.max")
    for parent, limit in parents:
        group = parent / f"edger1-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        if (group / limit).exists():
            yield group / limit
            group.rmdir()
            return
        group.rmdir()
    yield None


@pytest.mark.model
@pytest.mark.skipif(not kernels.state().available, reason="takes minutes without the kernels")
def test_a_full_context_stays_under_the_smallest_ceiling(smollm2: Path, limited: Path | None) -> None:
    ceiling = edger1.plan(smollm2, context=CONTEXT).smallest_ceiling_bytes
    enter = ""
    if limited is not None:
        with contextlib.suppress(OSError):
            limited.write_text(str(ceiling))
            enter = f"echo $$ > {limited.parent}/cgroup.procs && "
    done = subprocess.run(
        ["sh", "-c", f'{enter} exec "$@"', "sh", sys.executable, "-c", PROGRAM, str(smollm2), str(ceiling)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    prompt_tokens, peak_bytes = map(int, done.stdout.split())
    assert CONTEXT - 200 < prompt_tokens < CONTEXT
    # A bound, and not a wild one.
    assert 0.6 * ceiling < peak_bytes < ceiling


def test_large_blocks_go_back_to_the_system_whatever_was_freed_before() -> None:
    program = """
import ctypes, json
from edger1.mlx_runtime import prepare
prepare()
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd".split()]
    _fields_ += [(f"other{i}", ctypes.c_size_t) for i in range(5)]
c = ctypes.CDLL(None)
if not hasattr(c, "mallinfo2"):
    print(json.dumps(None))
    raise SystemExit
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
c.mallinfo2.restype = Info
c.free(c.malloc(30 << 20))
before = c.mallinfo2().hblkhd
block = c.malloc(20 << 20)
print(json.dumps(c.mallinfo2().hblkhd - before))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    mapped = json.loads(done.stdout)
    if mapped is None:
        pytest.skip("the C library has no mallinfo2")
    assert mapped >= 20 << 20
