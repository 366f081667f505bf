"""The command line as a user meets it: a process with arguments, streams and an exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from children import LIMIT_S, child
from command_line import edger1, edger1_process, refused
from tiny import write_tiny_model


def test_version_and_help() -> None:
    assert edger1_process("--version").stdout.startswith("edger1 0.")
    for command in ("chat", "run", "pull", "models", "plan", "doctor"):
        done = edger1(command, "--help")
        assert done.returncode == 0
        assert "Examples" in done.stdout


def test_shell_completion_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    # What it is offered for is otherwise the shell that happens to run the tests.
    monkeypatch.setattr("shellingham.detect_shell", lambda *_, **__: ("bash", "/bin/bash"))
    done = edger1("--show-completion", "bash")
    assert "edger1" in done.stdout


def test_run_streams_the_answer_and_nothing_else(tiny_folder: Path) -> None:
    done = edger1_process("run", str(tiny_folder), "Hello", "--max-tokens", "5", "--temperature", "0")
    assert done.returncode == 0
    assert done.stderr == ""
    assert len(done.stdout) == 6
    assert done.stdout.endswith("\n")


def test_run_reads_standard_input(tiny_folder: Path) -> None:
    options = (str(tiny_folder), "--max-tokens", "5", "--temperature", "0", "--json")
    argument = json.loads(edger1("run", *options, "Hello").stdout)
    piped = json.loads(edger1("run", *options, stdin="Hello\n").stdout)
    both = json.loads(edger1("run", *options, "Say", stdin="Hello\n").stdout)
    assert piped["text"] == argument["text"]
    assert both["prompt_tokens"] == argument["prompt_tokens"] + len("Say\n\n")


def test_run_json_holds_text_counts_and_figures(tiny_folder: Path) -> None:
    done = edger1("run", str(tiny_folder), "Hello", "--json", "--max-tokens", "5", "--system", "S", "--seed", "1")
    answer = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert (answer["completion_tokens"], answer["finish_reason"], answer["thinking"]) == (5, "length", "")
    assert answer["prompt_tokens"] == answer["prefilled_tokens"] > 20
    for figure in ("prefill_tokens_per_s", "decode_tokens_per_s", "time_to_first_token_s", "peak_memory_bytes"):
        assert answer[figure] > 0


def test_run_raw_and_stop(tiny_folder: Path) -> None:
    options = ("--temperature", "0", "--max-tokens", "30", "--json")
    raw = json.loads(edger1("run", str(tiny_folder), "abc", "--raw", *options).stdout)
    assert raw["prompt_tokens"] == 3
    stop = raw["text"][5:8]
    cut = json.loads(edger1("run", str(tiny_folder), "abc", "--raw", "--stop", stop, *options).stdout)
    assert cut["text"] == raw["text"][: raw["text"].index(stop)]


def test_run_figures_go_to_standard_error(tiny_folder: Path) -> None:
    done = edger1("run", str(tiny_folder), "Hello", "--max-tokens", "5", "--figures")
    assert "5 tokens at" in done.stderr
    assert "peak memory" in done.stderr


def test_chat_without_a_terminal_asks_one_question(tiny_folder: Path) -> None:
    done = edger1("chat", str(tiny_folder))
    assert done.returncode == 0
    assert done.stdout.startswith("> What is the capital of France")
    assert "first token after" in done.stdout.splitlines()[-1]
    piped = edger1("chat", str(tiny_folder), stdin="Who?\n")
    assert piped.stdout.startswith("> Who?")


def test_bad_input_gets_one_clear_sentence(tiny_folder: Path, tmp_path: Path) -> None:
    run = ("run", str(tiny_folder), "Hello")
    refused(edger1("run", "smolm2-135m", "Hello"), 2, "smolm2-135m", "smollm2-135m")
    refused(edger1_process("run", str(tiny_folder)), 2, "no prompt")
    refused(edger1(*run, "--temperature", "-1"), 2, "temperature", "0")
    refused(edger1(*run, "--temperature", "warm"), 2, "--temperature")
    refused(edger1(*run, "--stop", ""), 2, "stop")
    refused(edger1(*run, "--memory", "much"), 2, "much")
    refused(edger1(*run, "--memory", "10MB"), 1, "10.0 MB", "--memory")
    refused(edger1(*run, "--context", "8"), 2, "8", "context")
    refused(edger1(*run, "--precision", "double"), 2, "double", "exact")
    refused(edger1(*run, "--raw", "--system", "S"), 2, "--system")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(edger1("run", str(empty), "Hello"), 2, "config.json")


def test_a_binary_prompt_is_refused(tiny_folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edger1", "run", str(tiny_folder)],
        input=b"\xff\xfe\x00",
        capture_output=True,
        check=False,
        timeout=LIMIT_S,
    )
    assert done.returncode == 2
    assert b"not UTF-8" in done.stderr


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "damaged")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(edger1("run", str(folder), "Hello"), 1, "model.safetensors")


def test_ctrl_c_stops_at_once_and_keeps_what_was_said(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "slow", hidden_size=256, intermediate_size=1024, max_position_embeddings=8192)
    with child(
        [sys.executable, "-m", "edger1", "run", str(folder), "Hello", "--max-tokens", "8000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(3)
        process.send_signal(signal.SIGINT)
        begun = time.monotonic()
        _, errors = process.communicate()
    assert time.monotonic() - begun < 15
    assert process.returncode == 130
    assert "Traceback" not in errors


def test_ctrl_c_during_start_up_shows_no_traceback(tmp_path: Path) -> None:
    # Importing the command line imports typer: this one says so, and never comes to its end.
    (tmp_path / "typer.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n", "utf-8")
    with child(
        [sys.executable, "-c", "from edger1.__main__ import main; main()"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    # What a shell shows as 130.
    assert errors == ""
    assert process.returncode in (130, -signal.SIGINT)


def test_a_context_beyond_training_is_told_once(tiny_folder: Path) -> None:
    limit = json.loads((tiny_folder / "config.json").read_text("utf-8"))["max_position_embeddings"]
    for context, told in ((limit, 0), (limit + 1, 1)):
        done = edger1("run", str(tiny_folder), "Hello", "--max-tokens", "2", "--context", str(context))
        assert done.returncode == 0
        assert done.stderr.count("was trained for") == told
    assert f"A context of {limit + 1:,} tokens is more than the {limit:,} that" in done.stderr


@pytest.mark.parametrize(("error", "closes"), [(KeyboardInterrupt, 0), (ValueError, 1), (None, 1)])
def test_ctrl_c_does_not_wait_for_the_step_that_is_running(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | None, closes: int
) -> None:
    from edger1.cli import loading

    closed = []

    class Busy:
        def close(self) -> None:
            closed.append(self)

    monkeypatch.setattr(loading, "_load", lambda *_: Busy())

    def use() -> None:
        with loading.open_model("m", memory=None, context=None, precision="fast", offline=True):
            if error is not None:
                raise error

    if error is None:
        use()
    else:
        with pytest.raises(error):
            use()
    assert len(closed) == closes


def test_closed_and_full_standard_streams(tiny_folder: Path) -> None:
    command = f"exec {sys.executable} -m edger1 run {tiny_folder} Hello --max-tokens 5 --temperature 0"
    for closing, code, words in (("<&- 2>&-", 0, ""), (">/dev/full", 1, "no space left")):
        done = subprocess.run(
            ["sh", "-c", f"{command} {closing}"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, (closing, done.stderr)
        assert words in done.stderr
        assert "bug" not in done.stderr
        assert len(done.stdout) == (0 if code else 6)


def test_a_pipe_that_nobody_reads_ends_the_answer_quietly(tiny_folder: Path) -> None:
    command = f"{sys.executable} -m edger1 run {tiny_folder} Hello --max-tokens 400 | head -c 5"
    done = subprocess.run(
        ["sh", "-c", command], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )
    assert len(done.stdout) == 5
    assert done.stderr == ""


def test_a_config_file_sets_defaults_and_is_checked(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("EDGER1_HOME", str(home))
    (home / "config.toml").write_text("context = 30\n", encoding="utf-8")
    refused(edger1("run", str(tiny_folder), "Hello" * 10), 2, "30 tokens")
    (home / "config.toml").write_text('contxt = 30\ncontext = "many"\n', encoding="utf-8")
    refused(edger1("run", str(tiny_folder), "Hello"), 2, "config.toml", "contxt")


def test_doctor_says_what_is_here_and_what_is_missing() -> None:
    done = edger1("doctor")
    assert done.returncode == 0
    for word in ("Processor", "Memory", "Device", "CPU kernels", "mlx 0.", "edger1 pull smollm2-135m"):
        assert word in done.stdout
    found = json.loads(edger1("doctor", "--json").stdout)
    assert found["memory_bytes"] > 0
    assert found["default_model_installed"] is False


def test_loading_tells_how_the_layers_run(tiny_folder: Path) -> None:
    before = edger1("models", "show", str(tiny_folder))
    assert "--kernels" in before.stdout
    shown = edger1("models", "show", str(tiny_folder), "--kernels")
    assert shown.returncode == 0, shown.stderr
    assert "How it runs (loaded just now, fast)" in shown.stdout
    report = json.loads(edger1("models", "show", str(tiny_folder), "--json").stdout)["kernels"]
    if report["active"]:
        assert report["layers"][0]["first"] == 0
        assert "layers as one operation" in report["summary"]
    else:
        assert report["reason"]


def test_doctor_names_missing_kernels() -> None:
    done = edger1_process("doctor", "--json", EDGER1_KERNELS="0")
    assert json.loads(done.stdout)["kernels"] == {
        "available": False,
        "reason": "switched off by EDGER1_KERNELS=0",
        "instruction_sets": [],
    }


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = edger1_process("--debug", "run", str(tmp_path), "Hello")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.model
def test_smollm2_knows_the_capital(smollm2: Path) -> None:
    question = "What is the capital of France?"
    done = edger1("run", str(smollm2), question, "--temperature", "0", "--max-tokens", "12", "--precision", "exact")
    assert "Paris" in done.stdout
