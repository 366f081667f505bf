"""Runs a tool server so that it never outlives the program that wanted it, even one that was killed.

    python -I -S guard.py SOCKET_FD COMMAND [ARG ...]

The server has the guard's standard streams and process group. The guard waits for the end of the server, or of the
other end of the socket, which the system closes with the program that holds it; then it ends the whole group, first
politely. How the server ended is sent through the socket. Only the standard library is imported, for a start in
milliseconds.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

PATIENCE_S = 1.5


def main() -> None:
    """Run the server; never returns."""
    # A handler and not SIG_IGN, which the server would inherit.
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(each, lambda *_: None)
    life = socket.socket(fileno=int(sys.argv[1]))
    try:
        server = subprocess.Popen(sys.argv[2:])
    except OSError as error:
        life.sendall(f"could not be started: {error.strerror or error}".encode())
        os._exit(127)
    threading.Thread(target=follow, args=(life, server), daemon=True).start()
    code = server.wait()
    ended = f"ended with exit code {code}" if code >= 0 else f"was killed by signal {-code}"
    with contextlib.suppress(OSError):
        life.sendall(ended.encode())
    end_group(0.05)


def follow(life: socket.socket, server: "subprocess.Popen[bytes]") -> None:
    """End the group when nobody holds the other end of the socket any more."""
    with contextlib.suppress(OSError):
        while life.recv(64):
            pass
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(PATIENCE_S)
    end_group(PATIENCE_S)


def end_group(patience_s: float) -> None:
    """Ask every process of the group to end, then kill what is left, this one too."""
    os.killpg(0, signal.SIGTERM)
    time.sleep(patience_s)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
