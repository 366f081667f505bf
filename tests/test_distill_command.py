"""`edger1 distill` and `edger1 pairs` as a user runs them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from chat_server import Handler, completion, serving
from children import child, until
from typer.testing import CliRunner

from edger1.cli import app
from edger1.errors import EdgeR1Error, UsageError
from edger1.train.distill.remote import KEY_VARIABLE
from edger1.train.distill.teachers import TeacherError

KEY = "sk-secret-987"


def invoke(*args: object) -> tuple[str, str]:
    """Run a command; return what it printed and what it said."""
    done = CliRunner().invoke(app, [str(arg) for arg in args])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.stdout, done.stderr


def problems(folder: Path, count: int = 4) -> Path:
    path = folder / "sums.jsonl"
    rows = [{"question": f"What is {i} + {i + 1}", "answer": str(2 * i + 1)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_verified_traces_and_pairs_come_from_a_server_and_load_as_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edger1.train.datasets.reading import read

    monkeypatch.setenv(KEY_VARIABLE, KEY)
    out = tmp_path / "traces"
    with serving() as server:
        asked = ["distill", "--teacher", server.address, "--prompts", problems(tmp_path, 12), "-o", out]
        printed, said = invoke(*asked, "--verify", "exact", "-n", 6, "--license", "apache-2.0")
        assert server.authorizations[0] == f"Bearer {KEY}"
        assert server.requests[0]["model"] == "stand-in"
    assert printed.strip() == str(out)
    assert "72 of 72 samples" in said
    assert "edger1 finetune MODEL --data" in said
    kept = read(out / "data.jsonl")
    assert kept.kind == "messages"
    assert 6 < len(kept) <= 12
    assert all("<think>" in row.messages[-1]["content"] for row in kept if row.messages)
    card = (out / "README.md").read_text()
    for expected in ("license: apache-2.0", "`exact`", "stand-in", "accepted", "seed 0", '"temperature": 0.7'):
        assert expected in card
    for file in out.iterdir():
        assert KEY.encode() not in file.read_bytes()

    printed, said = invoke("pairs", out, "-o", tmp_path / "pairs.jsonl")
    pairs = read(tmp_path / "pairs.jsonl")
    assert pairs.kind == "preference"
    assert {row.columns["kind"] for row in pairs} == {"shorter", "right"}
    assert "prompts: 12" in said
    assert f"pairs, shorter: {sum(row.columns['kind'] == 'shorter' for row in pairs)}" in said


def test_what_is_right_must_be_said(tmp_path: Path) -> None:
    asked = ["distill", "--teacher", "http://127.0.0.1:9/v1", "--prompts", problems(tmp_path), "-o", tmp_path / "out"]
    with pytest.raises(UsageError, match="--verify REWARD, or --unverified"):
        invoke(*asked)
    with pytest.raises(UsageError, match="one of the two"):
        invoke(*asked, "--verify", "exact", "--unverified")


@pytest.mark.parametrize(
    "wrong",
    [
        ["--keep", "few"],
        ["-n", 0],
        ["--temperature", 0],
        ["--temperature", -1],
        ["--top-p", 2],
        ["--max-tokens", 0],
        ["--concurrency", 0],
        ["--timeout", 0],
        ["--size", 0],
        ["--verify", "no-such-reward"],
        ["--teacher", "http://me:pass@host/v1"],
    ],
)
def test_options_out_of_range_are_refused_before_anybody_is_asked(tmp_path: Path, wrong: list[object]) -> None:
    asked = ["distill", "--teacher", "http://127.0.0.1:9/v1", "--teacher-model", "m", "-o", tmp_path / "out"]
    verify = [] if "--verify" in wrong else ["--verify", "exact"]
    with pytest.raises(UsageError):
        invoke(*asked, "--prompts", problems(tmp_path), *verify, *wrong)
    assert not (tmp_path / "out").exists()


def test_a_row_without_an_answer_stops_a_verifier_that_needs_one(tmp_path: Path) -> None:
    path = tmp_path / "open.jsonl"
    path.write_text('{"prompt": "What is 1 + 2"}\n')
    with serving() as server, pytest.raises(EdgeR1Error, match=r"open.jsonl"):
        invoke("distill", "--teacher", server.address, "--prompts", path, "--verify", "exact", "-o", tmp_path / "out")


def test_generated_prompts_bring_their_own_verifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edger1.tasks import task
    from edger1.train.rewards.opening import open_rewards

    def sums(name: str, *, size: int | None, seed: int) -> task.Task:
        assert (name, size, seed) == ("gym:sums", 3, 5)
        asked = [task.Question([{"role": "user", "content": f"{i}?"}], {"answer": "7"}, f"{i}") for i in range(3)]
        return task.Task(name, asked, open_rewards(["exact"]))

    monkeypatch.setattr(task, "open_task", sums)
    with serving(lambda request: completion("7" if request["messages"][0]["content"] == "0?" else "8")) as server:
        asked = [
            "distill",
            "--teacher",
            server.address,
            "--prompts",
            "gym:sums",
            "--size",
            3,
            "--seed",
            5,
            "-o",
            tmp_path,
        ]
        invoke(*asked)
    figures = json.loads((tmp_path / "distill.json").read_text())
    assert figures["verified_by"] == ["gym:sums"]
    assert (figures["counts"]["wrong"], figures["counts"]["kept"]) == (8, 1)


def test_prompts_of_the_evaluation_set_are_left_out(tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text('{"question": "what is 2 + 3?", "answer": "5"}\n')
    with serving() as server:
        asked = ["distill", "--teacher", server.address, "--prompts", problems(tmp_path), "-o", tmp_path / "out"]
        _, said = invoke(*asked, "--verify", "exact", "--not-in", held)
        assert not any("2 + 3" in request["messages"][-1]["content"] for request in server.requests)
    assert "1 prompts left out" in said
    assert "held.jsonl" in (tmp_path / "out" / "README.md").read_text()


def test_ctrl_c_keeps_everything_and_says_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped = threading.Event()

    def slow(_: Handler, number: int) -> bool:
        if number >= 8:
            stopped.wait(1)
        return False

    with serving(trouble=slow) as server:
        command = [sys.executable, "-m", "edger1", "distill", "--teacher", server.address, "--verify", "exact"]
        command += ["--prompts", str(problems(tmp_path, 20)), "-o", str(out), "--concurrency", "2"]
        with child(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            until(lambda: len(server.requests) >= 8, "the eighth request", process)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate()
        stopped.set()
        assert process.returncode == 130
        assert "all answers are kept" in said
        asked = len(server.requests)
        assert len(rows(out / "samples.jsonl")) >= 6
        _, said = invoke(*command[3:])
        assert "from the cache" in said
        assert len(server.requests) - asked <= 80 - 6
    assert len(rows(out / "samples.jsonl")) == 80


def test_an_address_that_refuses_the_key_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)

    def refuse(handler: Handler, _: int) -> bool:
        handler.send(401, {"error": f"bad key {KEY}"})
        return True

    with serving(trouble=refuse) as server:
        asked = ["distill", "--teacher", server.address, "--teacher-model", "m", "--unverified", "-o", tmp_path / "out"]
        with pytest.raises(TeacherError, match=KEY_VARIABLE) as raised:
            invoke(*asked, "--prompts", problems(tmp_path))
    assert KEY not in str(raised.value)


def test_a_local_teacher_answers_and_resumes(tiny_folder: Path, tmp_path: Path) -> None:
    asked = ["distill", "--teacher", tiny_folder, "--prompts", problems(tmp_path, 3), "--unverified", "-n", 3]
    asked += ["-o", tmp_path / "out", "--max-tokens", 6, "--temperature", 1.5]
    invoke(*asked)
    first = (tmp_path / "out" / "samples.jsonl").read_bytes()
    samples = rows(tmp_path / "out" / "samples.jsonl")
    assert len(samples) == 9
    assert len({sample["text"] for sample in samples}) > 3
    assert all(sample["finish"] == "length" for sample in samples if sample["tokens"] == 6)
    _, said = invoke(*asked)
    assert "9 from the cache" in said
    assert (tmp_path / "out" / "samples.jsonl").read_bytes() == first


def test_pairs_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither"):
        invoke("pairs", tmp_path, "-o", tmp_path / "pairs.jsonl")
    sample = {"prompt": 0, "messages": [], "source": "1", "text": "a", "tokens": 1, "accepted": False, "finish": "stop"}
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    with pytest.raises(UsageError, match="gives no pair"):
        invoke("pairs", tmp_path, "-o", tmp_path / "pairs.jsonl")
    with pytest.raises(UsageError, match="'longer'"):
        invoke("pairs", tmp_path, "-o", tmp_path / "pairs.jsonl", "--kind", "longer")
    assert not (tmp_path / "pairs.jsonl").exists()
