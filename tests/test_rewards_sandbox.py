"""Programs with tests in the sandbox. None of these programs does harm where the sandbox does not hold."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from edger1.errors import UsageError
from edger1.train.rewards.code import code
from edger1.train.rewards.completion import Completion
from edger1.train.rewards.sandbox import Limits, SandboxResult, run

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no sandbox on Windows")

LIMITS = Limits(wall_s=20.0, cpu_s=10.0, memory_bytes=300 * 2**20, file_bytes=2**20)


@pytest.fixture(scope="module")
def guards() -> tuple[str, ...]:
    """What this kernel takes away beside the limits."""
    return run("", "assert True", LIMITS).guards


def outcome(program: str, test: str = "assert True", limits: Limits = LIMITS) -> SandboxResult:
    return run(program, test, limits)


def test_assertions_pass_one_by_one() -> None:
    result = run(
        "def f(x):\n    return x + 1", ["assert f(1) == 2", "assert f(2) == 4, 'no'", "assert f(3) == 4"], LIMITS
    )
    assert (result.passed, result.total, result.ended) == (2, 3, "exit 0")
    assert "test 2: AssertionError: no" in result.output


def test_programs_that_read_and_write_are_compared_up_to_trailing_blanks() -> None:
    tests = [{"input": "4\n", "output": "8"}, {"input": "5", "output": "11"}]
    result = run("print(int(input()) * 2, ' ')\nprint()", tests, LIMITS)
    assert (result.passed, result.total) == (1, 2)
    assert result.output.startswith("10")


def test_leaving_early_passes_nothing() -> None:
    for program in ("import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"):
        assert outcome(program, "assert 1 == 2").passed == 0
    assert run("import os; print(8); os._exit(3)", [{"input": "", "output": "8"}], LIMITS).passed == 0


@pytest.mark.parametrize(
    "program",
    ["while True: pass", "import time; time.sleep(60)", "import re; re.match(r'(a+)+$', 'a' * 40 + 'b')"],
    ids=["busy", "asleep", "hanging in C"],
)
def test_what_hangs_is_ended(program: str) -> None:
    begin = time.monotonic()
    result = outcome(program, limits=Limits(wall_s=1.5, cpu_s=60))
    assert (result.passed, result.ended) == (0, "timeout")
    assert time.monotonic() - begin < 10


def test_processor_time_is_limited() -> None:
    result = outcome("while True: pass", limits=Limits(wall_s=60, cpu_s=1))
    assert (result.passed, result.ended) in ((0, "SIGXCPU"), (0, "SIGKILL"))


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not hold this limit")
def test_memory_is_limited() -> None:
    assert "MemoryError" in outcome("x = bytearray(400 * 2**20)").output


def test_files_are_limited_and_stay_in_the_folder(tmp_path: Path, guards: tuple[str, ...]) -> None:
    assert "OSError" in outcome("open('big', 'wb').write(b'0' * (2 * 2**20))").output
    assert outcome("open('small', 'w').write('x')", "assert open('small').read() == 'x'").passed == 1
    outside = tmp_path / "outside"
    result = outcome(f"open({str(outside)!r}, 'w').write('x')")
    if "files" in guards or "user" in guards:
        assert result.passed == 0
        assert not outside.exists()


def test_processes_are_limited_and_end_with_the_program(guards: tuple[str, ...]) -> None:
    forks = """
import os, time
made = 0
for _ in range(12):
    try:
        if os.fork() == 0:
            os.setsid()
            time.sleep(60)
            os._exit(0)
    except OSError:
        break
    made += 1
print("made", made)
"""
    begin = time.monotonic()
    result = outcome(forks, "assert made < 8, made", Limits(wall_s=30, processes=6))
    if "processes" in guards or "forks" in guards:
        assert result.passed == 1, result.output
    assert time.monotonic() - begin < 25


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.getuid() != 0, reason="only root is not limited")
def test_root_is_limited_otherwise(guards: tuple[str, ...]) -> None:
    assert {"user", "forks"} & set(guards)
    if "forks" in guards:
        assert "BlockingIOError" in outcome("import os; os.fork()").output
        assert outcome("import threading; t = threading.Thread(target=int); t.start(); t.join()").passed == 1


def test_there_is_no_network(guards: tuple[str, ...]) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = outcome(f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)")
    if "network" in guards:
        assert (result.passed, "OSError" in result.output) == (0, True)


def test_output_is_bounded() -> None:
    result = outcome("while True: print('x' * 1000)", limits=Limits(output_bytes=5000))
    assert result.ended == "too much output"
    assert len(result.output) <= 5000


def test_the_environment_is_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGER1_SECRET", "s3cret")
    assert outcome("import os", "assert 's3cret' not in str(os.environ)").passed == 1


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    outcome("open('x', 'w').write('x')")
    assert list(tmp_path.iterdir()) == []


def test_tests_of_another_shape_are_refused() -> None:
    for tests in ("", [], {"input": "1"}, [1], [{"input": "1"}]):
        with pytest.raises(UsageError, match="expected text with assertions"):
            run("x = 1", tests)


def test_the_reward_runs_the_last_block_of_python() -> None:
    def said(text: str, **columns: object) -> Completion:
        return Completion.from_text("p", text, columns=columns, where="row 3")

    answer = "First:\n```python\ndef f(x): return 0\n```\nBetter:\n```python\ndef f(x): return x\n```"
    tests = ["assert f(1) == 1", "assert f(2) == 3"]
    assert code(said(answer, tests=tests[:1])) == 1.0
    assert code(said(answer, tests=tests)) == 0.0
    assert code(said(answer, tests=tests), partial=True) == 0.5
    assert code(said("def f(x): return x", tests="assert f(1) == 1")) == 1.0
    assert code(said("<think>no answer", tests=tests)) == 0.0
    with pytest.raises(UsageError, match='row 3 has no column "tests"'):
        code(said(answer, answer="1"))
