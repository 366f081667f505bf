"""What a tool server answers, as text that a model reads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from edger1.tools.kinds import shortened
from edger1.units import format_bytes

if TYPE_CHECKING:
    from mcp_types import CallToolResult


def read_result(result: CallToolResult, limit: int) -> tuple[str, bool, bool]:
    """Return a result's text, whether it is an error, and whether it was cut to `limit` characters.

    Text is taken as it is; an image, a sound or a file is named with its kind and size, since the model reads text.
    Structured content stands in where there is no text.
    """
    parts = [_block(block) for block in result.content]
    structured = result.structured_content
    if structured is not None and not any(part.strip() for part in parts):
        parts = [json.dumps(structured, ensure_ascii=False)]
    text, cut = shortened("\n".join(parts) or "The tool gave no content.", limit)
    return text, bool(result.is_error), cut


def _block(block: Any) -> str:
    match block.type:
        case "text":
            return str(block.text)
        case "image" | "audio":
            return (
                f"[{block.type}: {block.mime_type}, {format_bytes(len(block.data) * 3 // 4)}; not shown to the model]"
            )
        case "resource_link":
            return f"[link: {block.name}: {block.uri}]"
        case "resource":
            text = getattr(block.resource, "text", None)
            if text is not None:
                return f"{block.resource.uri}:\n{text}"
            size = format_bytes(len(block.resource.blob) * 3 // 4)
            return f"[file: {block.resource.uri}, {size}; not shown to the model]"
    return f"[{block.type}: not shown to the model]"
