"""Fetch a model onto this machine: `pull("qwen3-8b")`, `pull("owner/name")`, `pull("./model.gguf")`.

Where models lie (`edger1.fetch.place`) is asked for by much that fetches none, so `pull` is imported when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edger1.fetch.steps import Step, Watch

if TYPE_CHECKING:
    from edger1.fetch.run import pull

__all__ = ["Step", "Watch", "pull"]


def __getattr__(name: str) -> Any:
    if name == "pull":
        from edger1.fetch.run import pull

        return pull
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
