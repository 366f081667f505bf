"""Build the kernels with sanitizers and run their tests on every instruction set of this processor.

    python scripts/sanitize.py                       # address and undefined behaviour, then threads
    python scripts/sanitize.py thread avx2 -k pool   # one of them, on one instruction set; the rest goes to pytest

Every source of the extension is built so, beside the installed one, under build/, and stands in for it in the process
of tests/test_kernels_*.py. Needs GCC, cmake, ninja and what the package's build needs.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNTIMES = {"address,undefined": "libasan.so", "thread": "libtsan.so"}
OPTIONS = {
    # The interpreter keeps much at exit that counts as leaked, and MLX is not instrumented.
    "ASAN_OPTIONS": "detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": f"suppressions={ROOT / 'scripts' / 'tsan.supp'} exitcode=66",
}


def build(kind: str) -> Path:
    """Build the extension with the sanitizers `kind` and return its path."""
    folder = ROOT / "build" / f"sanitize-{kind.replace(',', '-')}"
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DEDGER1_SANITIZE={kind}"]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", folder], check=True, stdout=subprocess.DEVNULL)
    return next(folder.glob("_ext*.so"))


def library(name: str) -> str:
    """Return where the compiler keeps a library."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def instruction_sets() -> list[str]:
    """Return the names of what this processor offers."""
    listed = "from edger1 import kernels; print(*kernels.state().instruction_sets)"
    return subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True, check=True).stdout.split()


def run(kind: str, extension: Path, names: list[str], arguments: list[str]) -> int:
    """Run the kernels' tests on each instruction set; return how many runs failed."""
    # The C++ library too: a sanitizer's runtime looks for what it intercepts when the process begins.
    preload = ":".join(library(name) for name in (RUNTIMES[kind], "libstdc++.so.6"))
    failed = 0
    for name in names:
        print(f"{kind} on {name}:", flush=True)
        environment = {**os.environ, **OPTIONS, "LD_PRELOAD": preload, "EDGER1_ISA": name}
        environment |= {"EDGER1_TEST_EXAMPLES": "40", "EDGER1_THREADS": "3"}
        command = [sys.executable, __file__, "--inside", str(extension), *arguments]
        began = time.monotonic()
        failed += subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode != 0
        print(f"  {time.monotonic() - began:.0f} s", flush=True)
    return failed


def inside(extension: str, arguments: list[str]) -> int:
    """Run pytest with `extension` in place of the installed one."""
    import mlx.core  # noqa: F401  # its library must be loaded before the extension looks for it
    import pytest

    spec = importlib.util.spec_from_file_location("edger1.kernels._ext", extension)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{extension} is no extension module")
    module = importlib.util.module_from_spec(spec)
    sys.modules["edger1.kernels._ext"] = module
    spec.loader.exec_module(module)
    tests = sorted(str(path) for path in (ROOT / "tests").glob("test_kernels_*.py"))
    # Tests that start processes of their own would test the installed extension there.
    alone = "not fork and not environment and not ends_by_itself and not idle and not instruction_set"
    chosen = arguments if "-k" in arguments else ["-k", alone, *arguments]
    return int(pytest.main(["-q", "-x", "--capture=sys", "-p", "no:cacheprovider", "--no-header", *chosen, *tests]))


def main() -> int:
    """Do what the command line says."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["--inside"]:
        return inside(arguments[1], arguments[2:])
    offered = instruction_sets()
    kinds, names = [], []
    while arguments:
        found = [kind for kind in RUNTIMES if arguments[0] in kind.split(",")]
        if not found and arguments[0] not in offered:
            break
        kinds += found
        names += [] if found else [arguments[0]]
        arguments = arguments[1:]
    failed = sum(run(kind, build(kind), names or offered, arguments) for kind in kinds or RUNTIMES)
    print("clean" if failed == 0 else f"{failed} runs failed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
