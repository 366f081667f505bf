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
from tiny import write_mixture, write_tiny_model

import edger1
from edger1 import kernels

CGROUPS = Path("/sys/fs/cgroup")
CONTEXT = 1024
# A prompt that leaves a few tokens for the answer, three more of a third each at once, a conversation, and scoring.
PROGRAM = f"""
import sys, edger1
with edger1.load(sys.argv[1], memory=int(sys.argv[2]), context={CONTEXT}) as m:
    text = "The quick brown fox jumps over the lazy dog and runs far away. "
    times = int(sys.argv[3])
    first = m.generate(text * times, raw=True, max_tokens=8)
    handles = [m.submit(f"{{i}} " + text * (times * 2 // 7), raw=True, max_tokens=8) for i in range(3)]
    for handle in handles:
        handle.result()
    chat = m.chat()
    chat.send("Hello", max_tokens=8)
    last = chat.send("And again", max_tokens=8)
    m.score([i % 200 for i in range({CONTEXT // 2})])
    read = last.figures.experts["decode"]["bytes_read"] if last.figures.experts else 0
    print(first.usage.prompt_tokens, last.figures.peak_memory_bytes, read)
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


def run(folder: Path, ceiling: int, times: int, limited: Path | None) -> tuple[int, int, int]:
    """Run the program under a ceiling that the system enforces; return tokens of the prompt, peak, bytes read."""
    enter = ""
    if limited is not None:
        with contextlib.suppress(OSError):
            limited.write_text(str(ceiling))
            enter = f"echo $$ > {limited.parent}/cgroup.procs && "
    given = [sys.executable, "-c", PROGRAM, str(folder), str(ceiling), str(times)]
    done = subprocess.run(
        ["sh", "-c", f'{enter} exec "$@"', "sh", *given], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    prompt_tokens, peak_bytes, read = map(int, done.stdout.split())
    return prompt_tokens, peak_bytes, read


@pytest.mark.model
@pytest.mark.skipif(not kernels.state().available, reason="takes minutes without the kernels")
def test_a_full_context_stays_under_the_smallest_ceiling(smollm2: Path, limited: Path | None) -> None:
    ceiling = edger1.plan(smollm2, context=CONTEXT).smallest_ceiling_bytes
    prompt_tokens, peak_bytes, _ = run(smollm2, ceiling, 70, limited)
    assert CONTEXT - 200 < prompt_tokens < CONTEXT
    # A bound, and not a wild one.
    assert 0.6 * ceiling < peak_bytes < ceiling


@pytest.mark.skipif(not kernels.state().available, reason="takes minutes without the kernels")
def test_streamed_experts_stay_under_the_smallest_ceiling(tmp_path: Path, limited: Path | None) -> None:
    folder = write_mixture(tmp_path)
    ceiling = edger1.plan(folder, context=CONTEXT).smallest_ceiling_bytes
    assert edger1.plan(folder, context=CONTEXT, memory=ceiling).slots is not None
    # A token a letter.
    prompt_tokens, peak_bytes, read = run(folder, ceiling, 15, limited)
    assert CONTEXT - 200 < prompt_tokens < CONTEXT
    assert read > 0
    assert peak_bytes < ceiling


@pytest.mark.skipif(not kernels.state().available, reason="weights are not put on huge pages without the kernels")
def test_loading_many_small_matrices_takes_the_models_size_once(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 4096, "num_hidden_layers": 32, "head_dim": 64}
    folder = write_tiny_model(tmp_path / "many", **sizes, num_attention_heads=8, num_key_value_heads=8)
    nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert nbytes > 150e6
    program = """
import sys, edger1
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
edger1.load(sys.argv[1]).close()
before = peak()
with edger1.load(sys.argv[2]) as m:
    print(peak() - before)
"""
    small = write_tiny_model(tmp_path / "small")
    given = [sys.executable, "-c", program, str(small), str(folder)]
    done = subprocess.run(given, capture_output=True, text=True, timeout=300, check=True)
    # Beside it: MLX's cache of freed memory, and an arena that is being filled.
    assert int(done.stdout) < nbytes + 150e6


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
