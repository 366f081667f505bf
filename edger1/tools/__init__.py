"""Tools that a model may call: servers of the Model Context Protocol and plain Python functions.

`Toolbox` holds the tools of a conversation, `Approvals` says which calls may run, `Rounds` answers with tools until no
call is left. Importing this package imports nothing of it, nor `mcp`, nor `pydantic`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edger1.tools.approval import Approvals
    from edger1.tools.functions import FunctionTool, function_tool
    from edger1.tools.kinds import Call, Result, Tool
    from edger1.tools.loop import CallState, RoundBegins, Rounds, RoundsEnd
    from edger1.tools.settings import ServerSettings, ToolSettings
    from edger1.tools.toolbox import ServerView, Toolbox

_HOMES = {
    "Approvals": "approval",
    "Call": "kinds",
    "CallState": "loop",
    "FunctionTool": "functions",
    "Result": "kinds",
    "RoundBegins": "loop",
    "Rounds": "loop",
    "RoundsEnd": "loop",
    "ServerSettings": "settings",
    "ServerView": "toolbox",
    "Tool": "kinds",
    "ToolSettings": "settings",
    "Toolbox": "toolbox",
    "function_tool": "functions",
}
__all__ = [
    "Approvals",
    "Call",
    "CallState",
    "FunctionTool",
    "Result",
    "RoundBegins",
    "Rounds",
    "RoundsEnd",
    "ServerSettings",
    "ServerView",
    "Tool",
    "ToolSettings",
    "Toolbox",
    "function_tool",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
