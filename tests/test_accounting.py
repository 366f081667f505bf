"""What a process says that it holds, against what the system says."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import edger1
from edger1 import kernels

PROGRAM = """
import json, sys, edger1
from edger1.accounting import resident_bytes
with edger1.load(sys.argv[1], context=1024, expert_slots=sys.argv[2] or None) as m:
    text = "The quick brown fox jumps over the lazy dog. " * int(sys.argv[3])
    figures = m.generate(text, raw=True, max_tokens=50).figures
    print(json.dumps([figures.accounted_memory_bytes, resident_bytes(), m.plan.total_bytes]))
"""


def run(model: str | Path, slots: str = "", times: int = 30) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model), slots, str(times)],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(not kernels.state().available, reason="the kernels keep it")
@pytest.mark.parametrize("roomy", [True, False])
def test_memory_that_caches_have_left_is_kept_where_the_ceiling_has_room_for_it(tiny_folder: Path, roomy: bool) -> None:
    extension = kernels.extension()
    assert extension is not None
    gc.collect()
    for nbytes in (0, 1 << 30):
        extension.keep_spare_rooms(nbytes)
    before = extension.cache_room_bytes()
    ceiling = None if roomy else edger1.plan(tiny_folder, context=512).total_bytes
    with edger1.load(tiny_folder, context=512, memory=ceiling) as model:
        model.generate("a" * 300, raw=True, max_tokens=150)
        # It takes the place of that in the KV budget, in other memory.
        model.score([i % 200 for i in range(500)])
        assert (extension.cache_room_bytes() > before) == roomy
    assert extension.cache_room_bytes() == before


@pytest.mark.parametrize("slots", ["", "25%"])
def test_the_account_is_within_a_twentieth_of_what_the_system_says(slots: str) -> None:
    accounted, resident, planned = run("nano-moe", slots)
    assert accounted == pytest.approx(resident, rel=0.05)
    assert resident < planned


@pytest.mark.model
@pytest.mark.parametrize("times", [30, 85])
def test_the_account_of_a_larger_model(smollm2: Path, times: int) -> None:
    """Also where caches of a long prompt lie on huge pages."""
    accounted, resident, planned = run(smollm2, times=times)
    assert accounted == pytest.approx(resident, rel=0.05)
    assert resident < planned
