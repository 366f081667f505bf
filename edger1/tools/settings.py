"""What config.toml says of tools."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

START_TIMEOUT_S = 30.0
CALL_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class ServerSettings:
    """One server of the Model Context Protocol: a program that is started (`command`), or an address (`url`)."""

    name: str
    command: str | None = None
    args: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    """Added to the few variables that a server gets (PATH, HOME and the like)."""
    cwd: Path | None = None
    url: str | None = None
    headers: dict[str, str] = field(default_factory=dict, repr=False)
    """Sent with each request; they may hold a secret and are shown nowhere."""
    start_timeout_s: float = START_TIMEOUT_S
    """Seconds until it must have started, agreed on a protocol and listed its tools."""
    call_timeout_s: float = CALL_TIMEOUT_S

    @property
    def runs(self) -> str:
        """What is started or asked, for the user to see; `env` and `headers` are left out."""
        if self.command is None:
            return self.url or ""
        import shlex

        return shlex.join((self.command, *self.args))


@dataclass(frozen=True)
class ToolSettings:
    """Where the tools of a conversation come from."""

    servers: tuple[ServerSettings, ...] = ()
    functions: tuple[Path, ...] = ()
    """Python files whose public functions are tools."""
    function_timeout_s: float = CALL_TIMEOUT_S
