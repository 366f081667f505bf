"""Build the kernels with sanitizers and run their tests on every instruction set of this processor.

    python scripts/sanitize.py                       # address and undefined behaviour, then threads
    python scripts/sanitize.py thread avx2 pool qmm  # one of them, on one instruction set, two test modules
    python scripts/sanitize.py address -k "cache"    # what is left over goes to pytest

Every source of the extension is built so, beside the installed one, under build/, and stands in for it in the process
of the tests. Needs GCC, cmake, ninja and what the package's build needs; under an hour of two quiet cores.
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
    # The interpreter keeps much at exit that counts as leaked, and MLX is not instrumented. A test ends by SIGBUS.
    "ASAN_OPTIONS": "detect_leaks=0:handle_sigbus=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": f"suppressions={ROOT / 'scripts' / 'tsan.supp'} exitcode=66 handle_sigbus=0",
}
ALL = sorted(path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_kernels_*.py"))
ALL += ["quantized_kv", "train_ops"]
EACH = (
    *("kernels_blocks", "kernels_blocks_caches", "kernels_draw", "kernels_experts", "kernels_latent", "kernels_ops"),
    *("kernels_prefill", "kernels_qmm", "kernels_quantized_rows", "quantized_kv", "train_ops"),
)
"""Modules over what is compiled for each instruction set. The others' code is the same on all, and they run on one."""
ONLY = {"avx512bf16": ("kernels_latent", "train_ops")}
"""Sets that have few sources of their own (src/*_avx512bf16.cpp) -> the modules over those."""


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


def modules_for(name: str, offered: list[str]) -> tuple[str, ...]:
    """Return the test modules that have something to say about an instruction set."""
    most = [other for other in offered if other not in ONLY][-1]
    return ONLY.get(name, tuple(ALL) if name == most else EACH)


def run(kind: str, extension: Path, name: str, modules: tuple[str, ...], arguments: list[str]) -> bool:
    """Run test modules on an instruction set; return whether nothing was found."""
    # The C++ library too: a sanitizer's runtime looks for what it intercepts when the process begins.
    preload = ":".join(library(name) for name in (RUNTIMES[kind], "libstdc++.so.6"))
    environment = {**os.environ, **OPTIONS, "LD_PRELOAD": preload, "EDGER1_ISA": name}
    # Threads that wait for each other do so spinning: more than processors would take turns at that. Tests of what must
    # not depend on their number set up to three.
    environment |= {"EDGER1_TEST_EXAMPLES": "40", "EDGER1_THREADS": str(min(os.cpu_count() or 1, 3))}
    tests = [str(ROOT / "tests" / f"test_{module}.py") for module in modules]
    print(f"{kind} on {name}: {', '.join(modules)}", flush=True)
    began = time.monotonic()
    command = [sys.executable, __file__, "--inside", str(extension), *arguments, *tests]
    code = subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode
    print(f"  {'clean' if code == 0 else f'ended with {code}'} after {time.monotonic() - began:.0f} s", flush=True)
    return code == 0


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
    # Tests that start processes of their own would test the installed extension there, and a real model's are over
    # nothing that others are not over.
    apart = ("fork", "environment", "ends_by_itself", "idle", "instruction_set", "switched_off")
    alone = " and ".join(f"not {word}" for word in apart)
    chosen = arguments if "-k" in arguments else ["-k", alone, *arguments]
    options = ["-q", "-x", "-m", "not model and not parity", "--capture=sys", "-p", "no:cacheprovider", "--no-header"]
    return int(pytest.main([*options, *chosen]))


def main() -> int:
    """Do what the command line says."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["--inside"]:
        return inside(arguments[1], arguments[2:])
    offered = instruction_sets()
    kinds: list[str] = []
    names: list[str] = []
    modules: list[str] = []
    while arguments:
        word = arguments[0]
        sanitizers = [kind for kind in RUNTIMES if word in kind.split(",")]
        known = [module for module in ALL if word in (module, module.removeprefix("kernels_"))]
        if not sanitizers and not known and word not in offered:
            break
        kinds += sanitizers
        modules += known
        names += [word] if word in offered else []
        arguments = arguments[1:]
    clean = True
    for kind in kinds or list(RUNTIMES):
        extension = build(kind)
        for name in names or offered:
            clean = run(kind, extension, name, tuple(modules) or modules_for(name, offered), arguments) and clean
    print("clean" if clean else "not clean")
    return 0 if clean else 1


if __name__ == "__main__":
    raise SystemExit(main())
