"""The peer whose GRPO runs on MLX: mlx-lm-lora, from the package index, unmodified, in an environment of its own."""

from __future__ import annotations

import os
import sys
import venv
from pathlib import Path

from benchmarks import peers
from benchmarks.common import REPOSITORY, child_environment

MLX_LM_LORA = "5.10.2"


def mlx_lm_lora_python() -> Path:
    """Return the interpreter of its environment, with EdgeR1's versions of MLX and mlx-lm; made on the first call.

    Raises PeerMissingError where the packages cannot be had.
    """
    home = peers.cache() / f"mlx-lm-lora-{MLX_LM_LORA}"
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        print(f"fetching mlx-lm-lora {MLX_LM_LORA} with pip", file=sys.stderr, flush=True)
        venv.create(home, with_pip=True, clear=True)
        # -I: what PYTHONPATH holds of ours must not count as installed.
        pip = [python, "-I", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        same = [f"{name}=={version}" for name, version in _shared_versions().items()]
        peers.run([*pip, *same, "psutil", f"mlx-lm-lora=={MLX_LM_LORA}"], f"pip install mlx-lm-lora=={MLX_LM_LORA}")
        (home / "complete").touch()
    return python


def _shared_versions() -> dict[str, str]:
    """Return mlx and mlx-lm as the constraints pin them; its other dependencies are its own affair."""
    pins = dict(
        line.split("==", 1) for line in (REPOSITORY / "constraints.txt").read_text("utf-8").splitlines() if "==" in line
    )
    mlx = "mlx[cpu]" if sys.platform == "linux" else "mlx"
    return {mlx: pins["mlx"], "mlx-lm": pins["mlx-lm"]}


def environment(threads: int) -> dict[str, str]:
    """Return the environment of a side that runs there: no packages but its own."""
    return child_environment(threads, EDGER1_KERNELS="0") | {"PYTHONPATH": os.fspath(REPOSITORY)}
