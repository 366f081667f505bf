"""What a tool is, what a call asks for and what comes of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

RESULT_MAX = 20_000
"""Characters of a result that the model reads: some 5,000 tokens; one careless call must not fill the context."""


@dataclass(frozen=True)
class Tool:
    """Something that the model may call."""

    name: str
    """Unique in its toolbox, and of the letters, digits, `_` and `-` that chat templates and OpenAI's API allow."""
    description: str
    schema: dict[str, Any]
    """JSON schema of the arguments, an object's."""
    origin: str
    """Whose it is: "mcp:" and the server's name in config.toml, or "python:" and the function's file or module."""
    own_name: str = ""
    """What its server or file calls it."""
    runs: str = ""
    """The program, address or file behind it, for the user to see."""

    @property
    def key(self) -> str:
        """Names the tool over sessions, whatever it does: origin and own name."""
        return f"{self.origin}/{self.own_name or self.name}"

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits that change with what the tool says of itself, and with what is run for it."""
        said = json.dumps([self.description, self.schema, self.runs], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def to_openai(self) -> dict[str, Any]:
        """Return the tool in the form of OpenAI's `tools`, which chat templates take."""
        function = {"name": self.name, "description": self.description, "parameters": self.schema}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class Call:
    """One use of a tool that the model asks for. `id` joins it to the message with its result."""

    id: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """What came of a call: `text` is for the model to read, an error's too."""

    text: str
    is_error: bool = False
    cut: bool = False
    """Whether the tool said more than `text` has."""
    seconds: float = 0.0


def shortened(text: str, limit: int = RESULT_MAX) -> tuple[str, bool]:
    """Cut a result to `limit` characters, saying so at its end; the second value tells whether it was cut."""
    if len(text) <= limit:
        return text, False
    return f"{text[:limit]}\n[Cut: these are the first {limit:,} of {len(text):,} characters.]", True
