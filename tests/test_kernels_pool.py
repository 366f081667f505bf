"""The thread pool: every chunk once, whoever calls; clear errors; clean ends."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
from children import join

from edger1 import kernels
from edger1.kernels.quantized import quantized_matmul

extension = kernels._load()[0]
pytestmark = pytest.mark.skipif(extension is None, reason="the kernels are not built")


@pytest.fixture
def four_threads():
    before = extension.threads()
    extension.set_threads(4)
    yield
    extension.set_threads(before)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("chunks", [0, 1, 2, 7, 1000])
def test_each_chunk_runs_once(four_threads, chunks, nested):
    for work in (1, 50):
        assert extension._count_chunks(chunks, work, nested) == [1] * chunks


def test_many_callers_at_once(four_threads):
    def call(_: int) -> bool:
        return all(extension._count_chunks(37, 200) == [1] * 37 for _ in range(50))

    with ThreadPoolExecutor(8) as callers:
        assert all(callers.map(call, range(16)))


def test_threads_can_change_while_others_call():
    before = extension.threads()
    stop = threading.Event()
    results: list[bool] = []

    def call() -> None:
        while not stop.is_set():
            results.append(extension._count_chunks(50, 20) == [1] * 50)

    callers = [threading.Thread(target=call, daemon=True) for _ in range(3)]
    try:
        for caller in callers:
            caller.start()
        for n in (1, 4, 2, 7, 1, 3) * 5:
            extension.set_threads(n)
    finally:
        stop.set()
        join(*callers)
        extension.set_threads(before)
    assert results
    assert all(results)


def test_several_streams_at_once(four_threads):
    packed, scales, biases = mx.quantize(mx.random.normal((256, 512)), 64, 4)
    x = mx.random.normal((40, 512))
    expected = np.array(quantized_matmul(x, packed, scales, biases, group_size=64, bits=4))
    mx.eval(packed, scales, biases, x)

    def call(_: int) -> bool:
        stream = mx.new_stream(mx.cpu)
        for _ in range(20):
            y = quantized_matmul(x, packed, scales, biases, group_size=64, bits=4, stream=stream)
            mx.eval(y)
            if not np.array_equal(np.array(y), expected):
                return False
        return True

    with ThreadPoolExecutor(4) as callers:
        assert all(callers.map(call, range(8)))


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("shared", [0, 1, 100])
def test_each_piece_of_a_course_runs_once_and_phases_follow_each_other(threads: int, shared: int):
    before = extension.threads()
    extension.set_threads(threads)
    try:
        for work in (1, 300):
            ran = extension._count_course(200, shared, work)
            assert ran == [[1] * (threads + shared * (i % 2)) for i in range(200)]
    finally:
        extension.set_threads(before)


def test_courses_and_jobs_of_many_callers(four_threads):
    def call(i: int) -> bool:
        if i % 2:
            return all(extension._count_chunks(37, 200) == [1] * 37 for _ in range(50))
        return all(phase == [1] * len(phase) for _ in range(20) for phase in extension._count_course(20, 5, 50))

    with ThreadPoolExecutor(8) as callers:
        assert all(callers.map(call, range(16)))


def test_a_failing_piece_ends_its_course_and_not_the_pool(four_threads):
    for _ in range(20):
        with pytest.raises(RuntimeError, match="piece of the course"):
            extension._count_course(10, 7, 20, 4)
    assert extension._count_chunks(100) == [1] * 100


@pytest.mark.parametrize("n", [0, -1, 1000])
def test_impossible_thread_counts_are_refused(n):
    with pytest.raises(ValueError, match=str(n)):
        extension.set_threads(n)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


USE_KERNELS = """
    import mlx.core as mx
    from edger1.kernels.quantized import quantized_matmul
    parts = mx.quantize(mx.ones((64, 64)), 32, 4)
    def use():
        mx.eval(quantized_matmul(mx.ones((3, 64)), *parts, group_size=32, bits=4))
"""


def test_use_after_a_fork_is_an_error_and_not_a_hang():
    result = run(
        USE_KERNELS
        + """
    import os, sys
    use()
    child = os.fork()
    if child == 0:
        try:
            use()
        except RuntimeError as error:
            os._exit(7 if "fork" in str(error) and "spawn" in str(error) else 8)
        os._exit(9)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    )
    assert result.returncode == 7, result.stderr


def test_threads_come_from_the_environment():
    code = "from edger1 import kernels; print(kernels._load()[0].threads())"
    assert run(code, EDGER1_THREADS="3").stdout.strip() == "3"
    assert int(run(code, EDGER1_THREADS="no number").stdout) >= 1


def test_the_process_ends_by_itself():
    result = run(USE_KERNELS + "\n    use()\n    print('done')", EDGER1_THREADS="4")
    assert (result.returncode, result.stdout.strip()) == (0, "done"), result.stderr


def test_idle_workers_sleep():
    result = run(
        USE_KERNELS
        + """
    import time
    from edger1 import kernels
    kernels._load()[0]._count_chunks(100)
    use()
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.5)
    print(time.process_time() - before)
    """,
        EDGER1_THREADS="4",
    )
    assert float(result.stdout) < 0.05, result.stderr
