"""What a load that fails gives back."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import mlx.core as mx
import pytest

from edger1 import installed, loader
from edger1.errors import FormatError
from edger1.kernels import functions


@pytest.mark.parametrize("expert_slots", [None, "25%"])
def test_a_load_that_fails_at_the_mtp_layer_leaves_nothing_behind(tmp_path: Path, expert_slots: str | None) -> None:
    folder = Path(shutil.copytree(installed.resolve("nano-moe"), tmp_path / "nano-moe"))
    beside = folder / "mtp.safetensors"
    weights = dict(mx.load(str(beside)))
    kept = {name: value for name, value in weights.items() if "eh_proj" not in name}
    assert len(kept) < len(weights)
    mx.save_safetensors(str(beside), kept)

    def fail() -> tuple[object, int, int]:
        steps = loader.load(
            "nano-moe", folder, ceiling_bytes=1 << 31, context=512, precision="fast", expert_slots=expert_slots
        )
        with pytest.raises(FormatError, match="MTP layer"):
            for _ in steps:
                pass
        return functions.installed(), len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    # The first one opens what the process keeps open.
    first = fail()
    assert first[0] is None
    assert fail() == first
