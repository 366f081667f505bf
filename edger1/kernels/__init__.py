"""CPU kernels as MLX primitives, and what stands in where they are missing.

The extension is optional: a pure-Python install, another MLX than it was built with, or `EDGER1_KERNELS=0` leave MLX's
own operations in place. `state()` says which of these holds and why; nothing else in EdgeR1 imports `_ext` directly.
"""

from __future__ import annotations

import importlib
import os
import warnings
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from types import ModuleType


@dataclass(frozen=True)
class KernelState:
    """Whether the CPU kernels can run here; `reason` is a sentence for people when they cannot."""

    available: bool
    reason: str
    instruction_sets: tuple[str, ...] = ()


@cache
def _load() -> tuple[ModuleType | None, KernelState]:
    if os.environ.get("EDGER1_KERNELS") == "0":
        return None, KernelState(False, "switched off by EDGER1_KERNELS=0")
    # MLX may be installed elsewhere than beside this package: its library must be there before ours looks for it.
    importlib.import_module("mlx.core")
    try:
        extension = importlib.import_module("edger1.kernels._ext")
    except ModuleNotFoundError:
        return None, KernelState(
            False,
            "not built: install a C++20 compiler (on Debian: apt install g++) and reinstall edger1",
        )
    except ImportError as error:
        # An extension linked against another MLX fails here with undefined symbols.
        reason = f"built, but could not be loaded ({error}); reinstall edger1 to rebuild them"
        warnings.warn(f"EdgeR1's CPU kernels are {reason}. MLX's own operations are used.", stacklevel=2)
        return None, KernelState(False, reason)
    installed = version("mlx")
    if extension.built_for_mlx != installed:
        reason = f"built for mlx {extension.built_for_mlx}, but mlx {installed} is installed; reinstall edger1"
        warnings.warn(f"EdgeR1's CPU kernels are {reason}. MLX's own operations are used.", stacklevel=2)
        return None, KernelState(False, reason)
    return extension, KernelState(True, "ready", tuple(extension.instruction_sets()))


def state() -> KernelState:
    """Say whether the kernels are ready, and if not, why and what to do."""
    return _load()[1]


def extension() -> ModuleType | None:
    """Return the extension module where the kernels can run, for what calls them directly."""
    return _load()[0]
