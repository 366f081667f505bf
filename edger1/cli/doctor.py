"""`edger1 doctor`: what this machine is, what EdgeR1 found on it, what is missing and how to get it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

_PACKAGES = (
    "mlx",
    "mlx-lm",
    "numpy",
    "transformers",
    "tokenizers",
    "huggingface-hub",
    "safetensors",
    "textual",
    "typer",
)


@dataclass(frozen=True)
class Checkup:
    """What `doctor` found. `problems` are sentences that each say what to do."""

    edger1: str
    python: str
    system: str
    cpu: str
    cores: int
    memory_bytes: int
    memory_available_bytes: int
    device: str
    kernels: dict[str, Any]
    packages: dict[str, str | None]
    data_folder: str
    disk_free_bytes: int
    config_file: str | None
    default_model: str
    default_model_installed: bool
    default_model_kernels: dict[str, Any] | None
    problems: list[str] = field(default_factory=list)


def _cpu_name() -> str:
    if sys.platform == "darwin":
        import subprocess

        done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return done.stdout.strip()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    # Here, because reading packages' data takes as long to import as all other commands together.
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def examine() -> Checkup:
    """Look at everything; asks no network and loads no model."""
    import psutil

    import edger1
    from edger1 import kernels, paths, runs
    from edger1.config import DEFAULT_MODEL, load_config
    from edger1.errors import EdgeR1Error
    from edger1.installed import resolve

    problems = []
    packages = {package: _version(package) for package in _PACKAGES}
    problems += [f"{p} is not installed; reinstall edger1." for p, v in packages.items() if v is None]

    device = "none"
    try:
        import mlx.core as mx

        device = "GPU" if mx.default_device().type == mx.gpu else "CPU"
    except ImportError as error:
        problems.append(f"MLX cannot be imported ({error}). On Linux it comes as mlx[cpu]; reinstall edger1.")

    state = kernels.state()
    if not state.available and sys.platform == "linux" and device == "CPU":
        problems.append(f"The CPU kernels are {state.reason}. Without them MLX is 15 to 50 times slower here.")

    home = paths.data()
    existing = next(p for p in (home, *home.parents) if p.exists())
    if not os.access(existing, os.W_OK):
        problems.append(f"{existing} cannot be written to. Change its owner, or name another folder with EDGER1_HOME.")
    free = shutil.disk_usage(existing).free

    config = load_config()
    default_model = config.model or DEFAULT_MODEL
    ran = None
    try:
        ran = runs.of(resolve(default_model))
        installed = True
    except EdgeR1Error:
        installed = False
        problems.append(
            f"The default model {default_model} is not installed; fetch it with: edger1 pull {default_model}"
        )

    memory = psutil.virtual_memory()
    return Checkup(
        edger1=edger1.__version__,
        python=f"{platform.python_version()} ({sys.executable})",
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpu=_cpu_name(),
        cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        memory_bytes=int(memory.total),
        memory_available_bytes=int(memory.available),
        device=device,
        kernels=asdict(state),
        packages=packages,
        data_folder=str(home),
        disk_free_bytes=free,
        config_file=str(paths.user_config()) if paths.user_config().exists() else None,
        default_model=default_model,
        default_model_installed=installed,
        default_model_kernels=ran,
        problems=problems,
    )


def doctor_command(
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    selftest: Annotated[
        bool,
        typer.Option(
            "--selftest",
            help="Compare every kernel with MLX's own result, and streamed with resident output; time them (two "
            "minutes); print JSON.",
        ),
    ] = False,
) -> None:
    """Show the machine, its memory, the device, the kernels and the versions, and what is missing.

    [bold]Examples[/bold]

      edger1 doctor

      edger1 doctor --json > machine.json

      edger1 doctor --selftest > selftest.json
    """
    if selftest:
        from edger1 import worker
        from edger1.experts.selftest import selftest as streaming
        from edger1.kernels.selftest import selftest as run

        report = run()
        report["streaming"] = worker.call(streaming)
        report["ok"] = report["ok"] and report["streaming"]["ok"]
        typer.echo(json.dumps(report, indent=2))
        raise typer.Exit(0 if report["ok"] else 1)
    found = examine()
    if json_:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    from edger1.units import format_bytes

    kernels = found.kernels
    ready = f"ready ({', '.join(kernels['instruction_sets'])})" if kernels["available"] else kernels["reason"]
    installed = "installed" if found.default_model_installed else "not installed"
    rows = {
        "EdgeR1": found.edger1,
        "Python": found.python,
        "System": found.system,
        "Processor": f"{found.cpu}, {found.cores} cores",
        "Memory": f"{format_bytes(found.memory_bytes)}, {format_bytes(found.memory_available_bytes)} available",
        "Device": found.device,
        "CPU kernels": ready,
        "Data folder": f"{found.data_folder}, {format_bytes(found.disk_free_bytes)} free",
        "Config file": found.config_file or "none",
        "Default model": f"{found.default_model} ({installed})",
    }
    if found.default_model_kernels:
        rows["Its layers"] = found.default_model_kernels["summary"]
    elif found.default_model_installed:
        rows["Its layers"] = f"known once it was loaded: edger1 models show {found.default_model} --kernels"
    versions = ", ".join(f"{package} {version or 'missing'}" for package, version in found.packages.items())
    for name, value in rows.items():
        typer.echo(f"{name:<14} {value}")
    typer.echo(f"{'Packages':<14} {versions}")
    if found.problems:
        typer.echo("\nTo mend:")
        for problem in found.problems:
            typer.echo(f"  - {problem}")
    else:
        typer.echo("\nNothing is missing.")
