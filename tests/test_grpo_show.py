"""The viewer of GRPO's runs: figures by step, completions of one, while lines are being written or damaged."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from grpo_toys import FunctionReward, ToyPolicy, prompts, train
from rich.console import Console

from edger1.errors import UsageError
from edger1.train.finetune import rollout_log, show
from edger1.train.finetune.grpo import Grpo
from edger1.train.finetune.grpo_settings import GrpoSettings


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of four steps, two samplings, with the log that the loop writes."""
    rewards: Any = FunctionReward(lambda text: len(text) + text.count("7"))
    settings = GrpoSettings(group=4, prompts=2, mini_batches=1, epochs=2, max_tokens=6, beta=0.1)
    method = Grpo(prompts(4), rewards, settings, ToyPolicy().tokenizer, seed=1)
    method.log_to(tmp_path)
    logged = train(ToyPolicy(), method, range(4))
    lines = [json.dumps({"step": i + 1, **figures}) + "\n" for i, figures in enumerate(logged)]
    (tmp_path / show.LOG).write_text("".join(lines), encoding="utf-8")
    return tmp_path


def shown(run: Path, step: int | None = None, *, terminal: bool = False) -> str:
    out = io.StringIO()
    show.show(run, step, Console(file=out, force_terminal=terminal, width=160))
    return out.getvalue()


def test_the_table_has_a_line_for_each_sampling(run: Path) -> None:
    table = show.read(run)
    assert [row.step for row in table.rows] == [1, 3]
    logged = [json.loads(line) for line in (run / show.LOG).read_text().splitlines()]
    first = table.rows[0]
    assert first.reward == pytest.approx(logged[0]["reward"])
    assert first.spread == pytest.approx(logged[0]["reward_std"])
    assert first.length == pytest.approx(logged[0]["length"])
    assert first.entropy == pytest.approx(logged[0]["entropy"])
    # Both updates of the sampling, averaged.
    assert first.kl == pytest.approx((logged[0]["kl"] + logged[1]["kl"]) / 2)
    assert (first.groups, first.skipped) == (2, logged[0]["skipped_groups"])
    text = shown(run)
    assert text.splitlines()[0].split()[:3] == ["step", "reward", "±"]
    assert "\x1b" not in text
    assert len(text.splitlines()) == 3


def test_a_terminal_gets_a_table(run: Path) -> None:
    assert "reward" in shown(run, terminal=True)


def test_a_step_shows_its_groups_with_rewards(run: Path) -> None:
    text = shown(run, 1)
    entries = [json.loads(line) for line in (run / rollout_log.FILE).read_text().splitlines()]
    for entry in (e for e in entries if e["step"] == 1):
        assert entry["text"] in text
        assert f"advantage {entry['advantage']:+.3f}" in text
    assert text.count("━━") == 2
    with pytest.raises(UsageError, match="at steps 1, 3"):
        shown(run, 2)


def test_damaged_lines_are_left_out_and_counted_and_one_that_is_being_written_waits(run: Path) -> None:
    path = run / rollout_log.FILE
    before = show.read(run)
    with path.open("ab") as file:
        file.write(b'{"step": 5, "half\n\xff\xfe\n{"step": "x"}\n[1]\n{"step": 5, "prompt": "cut of')
    table = show.read(run)
    assert table.damaged == 4
    assert table.rows == before.rows
    assert "4 damaged lines left out" in shown(run)


def test_lines_written_again_after_a_resume_count_once(run: Path) -> None:
    path = run / rollout_log.FILE
    before = show.read(run)
    path.write_bytes(path.read_bytes() * 2)
    assert show.read(run).rows == before.rows


def test_a_line_that_was_cut_off_takes_no_other_with_it(run: Path) -> None:
    path = run / rollout_log.FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    method = Grpo(prompts(4), FunctionReward(len), GrpoSettings(group=2, prompts=1), ToyPolicy().tokenizer)  # type: ignore[arg-type]
    method.log_to(run)
    method.step(ToyPolicy(), 8)
    logged = rollout_log.read(path)
    assert logged.damaged == 1
    assert len(logged.steps[9][0].rows) == 2


def test_what_a_model_wrote_does_not_reach_the_terminal_as_commands(run: Path) -> None:
    path = run / rollout_log.FILE
    entry = json.loads(path.read_text().splitlines()[0])
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**entry, "text": "a\x1b]0;title\x07b [bold]c"}) + "\n")
    text = shown(run, 1, terminal=False)
    assert "\x1b" not in text
    assert "[bold]c" in text


def test_a_folder_that_is_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"rollouts\.jsonl"):
        shown(tmp_path)
