"""What a test module checks, once more in a process that uses another instruction set of this processor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TIMEOUT_S = 300


def check_on(name: str, module: str, *checks: str) -> None:
    """Call functions of a test module, such as "check_shapes()", on the instruction set `name`."""
    calls = "; ".join(f"t.{check}" for check in checks)
    program = f"import {module} as t; {calls}; from edger1.kernels import _ext; print(_ext.active_instruction_set())"
    where = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "EDGER1_ISA": name, "PYTHONPATH": where}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment)
    assert done.stdout.strip() == name, done.stderr
