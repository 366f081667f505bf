"""What a process says that it holds, against what the system says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import json, sys, edger1
from edger1.accounting import resident_bytes
with edger1.load(sys.argv[1], context=1024, expert_slots=sys.argv[2] or None) as m:
    figures = m.generate("The quick brown fox jumps over the lazy dog. " * 30, raw=True, max_tokens=50).figures
    print(json.dumps([figures.accounted_memory_bytes, resident_bytes(), m.plan.total_bytes]))
"""


def run(model: str | Path, slots: str = "") -> Any:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model), slots], capture_output=True, text=True, timeout=200, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("slots", ["", "25%"])
def test_the_account_is_within_a_twentieth_of_what_the_system_says(slots: str) -> None:
    accounted, resident, planned = run("nano-moe", slots)
    assert accounted == pytest.approx(resident, rel=0.05)
    assert resident < planned


@pytest.mark.model
def test_the_account_of_a_larger_model(smollm2: Path) -> None:
    accounted, resident, planned = run(smollm2)
    assert accounted == pytest.approx(resident, rel=0.05)
    assert resident < planned
