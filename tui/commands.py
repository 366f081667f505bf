"""What can be done in the chat, in one list for every door: a line that begins with a slash, the palette, the keys."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Deed:
    """Something the chat can do. `action` names the method `action_<action>` of the app; `takes` what it is given."""

    name: str
    """What is typed after the slash."""
    help: str
    action: str
    takes: str = ""
    """How its argument is called, in brackets where it may be left out; "" where it has none."""
    binding: str = ""
    """Id of the key binding that does the same; "" where none does."""


DEEDS = (
    Deed("new", "begin a new conversation", "new", binding="new"),
    Deed("chats", "open, search, rename, delete, export conversations", "conversations", binding="conversations"),
    Deed("search", "search all conversations", "search", "[WORDS]"),
    Deed("model", "choose a model, or fetch one", "models", "[NAME]", "models"),
    Deed("adapter", "put an adapter over the model, or take it off", "adapter", "DIR|off"),
    Deed("settings", "system prompt, sampling, presets", "settings", binding="settings"),
    Deed("system", "set the system prompt of this conversation", "system", "[TEXT]"),
    Deed("think", "whether the model thinks first, and for how many tokens", "think", "[auto|on|off|TOKENS]", "think"),
    Deed("budget", "how many tokens of thought: at most, or from-to", "budget", "[TOKENS|LEAST-MOST|none]", "budget"),
    Deed("samples", "draw several answers, of which the majority decides", "samples", "[N]"),
    Deed("speculate", "where drafts come from", "speculate", "[off|auto|lookup|mtp|draft]"),
    Deed("shift", "whether the oldest turns are dropped where the context is full", "shift", "[on|off]"),
    Deed("tools", "which tools the model may ask for", "tools", binding="tools"),
    Deed("engine", "watch memory, rates and experts", "engine", binding="engine"),
    Deed("retry", "ask for another answer", "retry", binding="regenerate"),
    Deed("continue", "go on with the last answer", "continue", binding="continue"),
    Deed("edit", "edit your last message", "edit", binding="edit"),
    Deed("copy", "copy the last answer", "copy", "[all]", "copy_answer"),
    Deed("title", "name this conversation", "title", "[TITLE]"),
    Deed("pin", "pin this conversation, or unpin it", "pin"),
    Deed("export", "write this conversation to a file (.md or .json)", "export", "[FILE]"),
    Deed("import", "read conversations from a file", "import", "FILE"),
    Deed("delete", "delete this conversation (it can be brought back)", "delete"),
    Deed("theme", "change the colours", "theme", "[NAME]", "theme"),
    Deed("help", "show the keys", "help", binding="help"),
    Deed("quit", "leave", "quit", binding="quit"),
)
