"""EdgeR1: run, reason with and train open-weight reasoning models on the computer you own.

Everything here is loaded when it is first asked for, so that `import edger1` stays cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from edger1.errors import (
        ContextError,
        EdgeR1Error,
        EngineError,
        FormatError,
        MemoryCeilingError,
        NotYetError,
        PromptCacheError,
        SourceError,
        StreamError,
        UnknownModelError,
        UnstreamableError,
        UsageError,
    )
    from edger1.fetch import pull
    from edger1.installed import models
    from edger1.messages import Done, Progress, Running, Sampled, Text, Thought, ToolCall
    from edger1.model import Chat, Engine, Model, load, plan
    from edger1.response import Handle, Response

_HOME = {
    "edger1.errors": (
        "ContextError", "EdgeR1Error", "EngineError", "FormatError", "MemoryCeilingError", "NotYetError",
        "PromptCacheError", "SourceError", "StreamError", "UnknownModelError", "UnstreamableError", "UsageError",
    ),
    "edger1.fetch": ("pull",),
    "edger1.installed": ("models",),
    "edger1.messages": ("Done", "Progress", "Running", "Sampled", "Text", "Thought", "ToolCall"),
    "edger1.model": ("Chat", "Engine", "Model", "load", "plan"),
    "edger1.response": ("Handle", "Response"),
}  # fmt: skip
_WHERE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Chat",
    "ContextError",
    "Done",
    "EdgeR1Error",
    "Engine",
    "EngineError",
    "FormatError",
    "Handle",
    "MemoryCeilingError",
    "Model",
    "NotYetError",
    "Progress",
    "PromptCacheError",
    "Response",
    "Running",
    "Sampled",
    "SourceError",
    "StreamError",
    "Text",
    "Thought",
    "ToolCall",
    "UnknownModelError",
    "UnstreamableError",
    "UsageError",
    "__version__",
    "load",
    "models",
    "plan",
    "pull",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in _WHERE:
        raise AttributeError(f"module 'edger1' has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value
