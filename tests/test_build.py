"""What is installed where there is no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the extension is built on Linux alone")


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"),
            *("--config-settings", f"build-dir={folder / 'build'}", "--wheel-dir", str(folder), str(ROOT)),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=250,
        env={
            **{k: v for k, v in os.environ.items() if k != "EDGER1_REQUIRE_KERNELS"},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "CXX": "/nonexistent/c++",
            **environment,
        },
    )


def test_without_a_compiler_everything_but_the_kernels_is_installed(tmp_path: Path) -> None:
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in ("models.toml", "py.typed", "quant/convert.py", "tui/app.py", "kernels/__init__.py", "cli/__init__.py"):
        assert f"edger1/{name}" in names
    assert not [name for name in names if name.endswith((".so", ".cpp", ".h")) or not name.startswith("edger1")]


def test_where_kernels_are_required_a_failed_build_fails(tmp_path: Path) -> None:
    done = build(tmp_path, EDGER1_REQUIRE_KERNELS="1")
    assert done.returncode != 0
    assert not list(tmp_path.glob("*.whl"))
