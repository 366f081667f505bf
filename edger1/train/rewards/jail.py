"""What runs inside the sandbox before the program does: `python -I -S jail.py`, which imports nothing of EdgeR1.

It reads what to run as JSON on standard input, takes away what the kernel lets it take away, writes the program's
files, runs the program as a child of its own, and reports on the descriptor that it was given. As the first process of
a PID namespace it takes every process that the program started with it when it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import signal
import struct
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
MS_NOSUID, MS_NODEV, MS_REC, MS_PRIVATE = 2, 4, 16384, 1 << 18
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1
PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 22, 2
NOBODY = 65534
REFUSED = "they would run as root, whose processes this system does not limit; run EdgeR1 as an ordinary user"
REFUSED_CODE = 97
# Architecture as the kernel's audit numbers it; clone, clone3, and the calls that only fork.
FORKS = {"x86_64": (0xC000003E, 56, 435, (57, 58)), "aarch64": (0xC00000B7, 220, 435, ())}


def main() -> None:
    """Confine this process, run the program, report how it ended."""
    asked = json.loads(sys.stdin.buffer.read())
    report = int(sys.argv[1])
    folder, limits = asked["folder"], asked["limits"]
    guards = []
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None
    if libc is not None:
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        guards = _separate(libc, folder, asked["disk_bytes"])
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # RLIMIT_NPROC does not hold for root, in a user namespace or out of one.
    forbid_forks = os.getuid() == 0
    if forbid_forks and (libc is None or os.uname().machine not in FORKS):
        os.write(report, json.dumps({"refused": REFUSED}).encode())
        return
    if forbid_forks:
        guards.append("forks")
    os.write(report, (json.dumps({"guards": guards}) + "\n").encode())
    os.chdir(folder)
    for name, text in asked["files"].items():
        with open(name, "w", encoding="utf-8") as file:  # noqa: PTH123  (pathlib would double the time to start)
            file.write(text)
    child = os.fork()
    if child == 0:
        os.close(report)
        if libc is not None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _limit(limits)
        if forbid_forks and not _forbid_forks(libc):
            os._exit(REFUSED_CODE)
        with open(asked["stdin"], "rb") as file:  # noqa: PTH123
            os.dup2(file.fileno(), 0)
        os.execve(asked["command"][0], asked["command"], asked["environment"])
    status = None
    while status is None:
        # Of a PID namespace this is the first process, which children without a parent come to.
        ended, code = os.wait()
        if ended == child:
            status = code
    code = os.waitstatus_to_exitcode(status)
    outcome: dict[str, Any] = {"refused": REFUSED} if forbid_forks and code == REFUSED_CODE else {"code": code}
    if asked.get("result"):
        with contextlib.suppress(OSError, ValueError), open(asked["result"], "rb") as file:  # noqa: PTH123
            outcome["result"] = file.read(limits["output_bytes"]).decode("utf-8", "replace")
    os.write(report, json.dumps(outcome).encode())


def _separate(libc: Any, folder: str, disk_bytes: int) -> list[str]:
    """Take network, other processes and the writable file system away; return what worked."""
    guards = []
    if os.getuid() == 0 and _drop(folder):
        guards.append("user")
    # A change of user takes both away; who is not dumpable may not write its own maps.
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
    user, group = os.getuid(), os.getgid()
    flags = CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWNS
    if libc.unshare(flags) == 0:
        guards += ["network", "processes"]
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123
                file.write(text)
        if _read_only(libc, folder, disk_bytes):
            guards.append("files")
        first = os.fork()
        if first != 0:
            # Outside the namespace: wait for its first process, and end with it.
            _, status = os.waitpid(first, 0)
            os._exit(0 if status == 0 else 1)
    return guards


def _drop(folder: str) -> bool:
    """Become nobody, where this is root: the kernel limits neither root's processes nor its writing."""
    if not os.access(sys.executable, os.X_OK) or not _readable_by_all(sys.executable):
        return False
    try:
        os.chown(folder, NOBODY, NOBODY)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError:
        return False
    return True


def _readable_by_all(path: str) -> bool:
    path = os.path.realpath(path)
    while path != "/":
        if not os.stat(path).st_mode & 0o001:  # noqa: PTH116
            return False
        path = os.path.dirname(path)  # noqa: PTH120
    return True


def _read_only(libc: Any, folder: str, disk_bytes: int) -> bool:
    """Make every mount read-only but a small one in memory over the program's folder."""

    class Attributes(ctypes.Structure):
        _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "namespace")]

    if libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) != 0:
        return False
    read_only = Attributes(MOUNT_ATTR_RDONLY, 0, 0, 0)
    size = ctypes.sizeof(read_only)
    if libc.syscall(SYS_MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, ctypes.byref(read_only), size) != 0:
        return False
    options = f"size={disk_bytes},mode=0700".encode()
    return libc.mount(b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options) == 0


def _forbid_forks(libc: Any) -> bool:
    """Have the kernel refuse new processes, but not threads, to this process for good (seccomp)."""
    architecture, clone, clone3, forks = FORKS[os.uname().machine]
    load, equal, any_bit, give = 0x20, 0x15, 0x45, 0x06
    allow, refuse, missing, kill = 0x7FFF0000, 0x00050000 | errno.EAGAIN, 0x00050000 | errno.ENOSYS, 0x80000000
    # Each: operation, jump if true, jump if false, operand. The call's number is at 0, the architecture at 4, the
    # first argument at 16. clone3, whose flags lie in memory, is missing: the C library then takes clone.
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, kill), (load, 0, 0, 0)]
    # Calls of x86-64's 32-bit pointers have other numbers for the same.
    steps += [(0x35, 0, 1, 0x40000000), (give, 0, 0, kill)] if clone == 56 else []
    steps += [(equal, 0, 1, clone3), (give, 0, 0, missing)]
    for number in forks:
        steps += [(equal, 0, 1, number), (give, 0, 0, refuse)]
    clone_thread = 0x00010000
    steps += [(equal, 0, 3, clone), (load, 0, 0, 16), (any_bit, 1, 0, clone_thread), (give, 0, 0, refuse)]
    steps += [(give, 0, 0, allow)]
    code = b"".join(struct.pack("=HBBI", *step) for step in steps)
    held = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(steps), ctypes.addressof(held))
    return bool(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.c_char_p(program), 0, 0) == 0)


def _limit(limits: dict[str, Any]) -> None:
    cpu = max(1, int(limits["cpu_s"]))
    wanted = {
        "RLIMIT_CPU": (cpu, cpu + 1),
        "RLIMIT_AS": (limits["memory_bytes"],) * 2,
        "RLIMIT_FSIZE": (limits["file_bytes"],) * 2,
        "RLIMIT_NPROC": (limits["processes"],) * 2,
        "RLIMIT_NOFILE": (64, 64),
        "RLIMIT_CORE": (0, 0),
    }
    for name, pair in wanted.items():
        # macOS refuses some of them.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            resource.setrlimit(getattr(resource, name), pair)


if __name__ == "__main__":
    main()
