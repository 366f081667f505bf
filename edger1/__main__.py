"""The console command `edger1` and `python -m edger1`.

Kept apart from the command line so that Ctrl-C is quiet while that is being imported, which takes a tenth of a second.
"""

from __future__ import annotations

import gc
import signal


def main() -> None:
    """Run the command line; until it is imported, Ctrl-C ends the process at once, without a traceback."""
    # As the system does by itself: an exception raised in the middle of an import may come out anywhere.
    # A process that was told to ignore Ctrl-C goes on ignoring it.
    quiet = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if quiet:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Nothing is garbage while modules are imported, and looking for it among them takes a quarter of the time.
    gc.disable()
    from edger1.cli import main as run

    gc.enable()
    if quiet:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
