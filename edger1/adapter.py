"""The adapter over a model that runs: put on, exchanged and taken off between answers, on the thread that owns MLX.

The kernels stay as they were installed. Those that stand for a whole layer notice that it holds something else and step
back; an adapted layer then runs operation by operation on the kernels of single operations, and the others as before.
Taken off, the very layers come back, and with them what stood for them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edger1.errors import MemoryCeilingError, UsageError
from edger1.mlx_runtime import clear_cache
from edger1.units import format_bytes

if TYPE_CHECKING:
    from edger1.loader import LiveModel
    from edger1.train.adapters.wiring import Adapted


@dataclass(frozen=True)
class InUse:
    """An adapter over a running model."""

    folder: Path
    adapted: Adapted
    nbytes: int
    """What the plan counts for it."""

    def describe(self) -> dict[str, Any]:
        """Return what a client shows of it: plain JSON values."""
        return {"folder": str(self.folder), "summary": self.adapted.describe(), "bytes": self.nbytes}


def needed_bytes(folder: Path) -> int:
    """Return the bytes that an adapter takes in memory, without reading it. Raises as `files.load` does."""
    from edger1.train.adapters import files

    return files.weight_bytes(folder)


def use(model: LiveModel, folder: Path | None, *, planned: bool = False, most_bytes: int | None = None) -> None:
    """Put the adapter in `folder` over a model in place of the one that it has; None takes that off.

    No answer may be under way. `planned` says that the model's plan counts the adapter already; else the model may
    take `most_bytes` in all with it, its ceiling where that is None. Nothing changes where this raises:
    UnknownModelError and FormatError for a folder that is none, is damaged, or is of another model, UsageError for
    one over experts that are streamed, MemoryCeilingError where it does not fit.
    """
    from edger1.train.adapters import files

    before = model.adapter
    if folder is None:
        if before is not None:
            before.adapted.detach()
            model.plan = replace(model.plan, resident_bytes=model.plan.resident_bytes - before.nbytes)
            _taken(model, None)
        return
    nbytes = needed_bytes(folder)
    if not planned:
        _check_room(model, nbytes, model.plan.ceiling_bytes if most_bytes is None else most_bytes)
    saved = files.load(folder)
    if before is not None:
        before.adapted.detach()
    try:
        _check_streamed(model, saved, folder)
        adapted = files.put(model.model, saved, str(folder))
    except Exception:
        if before is not None:
            before.adapted.attach_again()
        raise
    others = model.plan.resident_bytes - (0 if before is None else before.nbytes)
    model.plan = replace(model.plan, resident_bytes=others + (0 if planned else nbytes))
    _taken(model, InUse(folder, adapted, nbytes))


def _taken(model: LiveModel, used: InUse | None) -> None:
    from edger1 import runs

    model.adapter = used
    # They are what other weights made of their tokens.
    model.kv.clear()
    clear_cache()
    runs.note(model.folder.path, model.report())


def _check_room(model: LiveModel, nbytes: int, most_bytes: int) -> None:
    """Raise MemoryCeilingError where an adapter does not fit beside all else, the adapter in use included."""
    need = model.plan.total_bytes + nbytes
    if need <= most_bytes:
        return
    advice = "Take off the adapter in use first, or load" if model.adapter is not None else "Load"
    is_own = most_bytes >= model.plan.ceiling_bytes
    found = (
        f"the ceiling is {format_bytes(most_bytes)}" if is_own else f"other models leave it {format_bytes(most_bytes)}"
    )
    raise MemoryCeilingError(
        f"The adapter takes {format_bytes(nbytes, up=True)}, and {model.name} with it would take "
        f"{format_bytes(need, up=True)} where {found}. {advice} the "
        f"model with --adapter, so that the plan counts it, or with more --memory."
    )


def _check_streamed(model: LiveModel, saved: Any, folder: Path) -> None:
    """Raise UsageError for an adapter over experts that come from the disk as they are needed."""
    from edger1.train.adapters import places

    if model.streaming is None:
        return
    switches = [p.path.rpartition(".")[0] for p in places.find(model.model) if p.kind == places.EXPERTS]
    # PEFT has a module for each expert: `mlp.experts.3.gate_proj` where the switch layer is `mlp.switch_mlp`.
    beginnings = [f"{path}." for path in switches]
    beginnings += [f"{path.rpartition('.')[0]}.experts." for path in switches]
    over = next((name for name in saved.weights if name.startswith(tuple(beginnings))), None)
    if over is not None:
        raise UsageError(
            f"The adapter {folder} goes over experts ({over.rpartition('.')[0]}), and those of {model.name} are "
            f"streamed from disk under this ceiling. Give a --memory that holds them, or fuse the adapter into the "
            f"model (edger1 fuse) and stream that."
        )
