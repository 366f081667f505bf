"""Reads ChatGPT's export: conversations.json, a list of conversations, each a tree of messages under "mapping".

OpenAI does not describe the format; this follows what exports up to 2026 hold. Of a mapping's nodes some have no
message, and some have one that ChatGPT does not show (system messages, a weight of 0, hidden ones): what follows them
is joined to what comes before. Reasoning ("thoughts") comes as messages of its own before the answer, and becomes its
thought. What a message holds beside text (images, sound, files) is named in its place.
"""

from __future__ import annotations

import json
from typing import Any

from edger1.tui.settings import Settings
from edger1.tui.store import fields, rows
from edger1.tui.store.records import Stored
from edger1.tui.tree import Call, Node

_ENDS = {"stop": "stop", "max_tokens": "length", "interrupted": "cancelled"}
_SILENT = ("reasoning_recap", "user_editable_context", "model_editable_context")


def is_export(value: dict[str, Any]) -> bool:
    """Whether a value is a conversation of an export."""
    return isinstance(value.get("mapping"), dict)


def conversation(value: dict[str, Any]) -> Stored:
    """Return the conversation of a value; what of it has another form than expected is left out."""
    mapping = {key: node for key, node in value["mapping"].items() if isinstance(node, dict)}
    outer = fields.text(value.get("conversation_id")) or fields.text(value.get("id"))
    begun = fields.moment(value.get("create_time"))
    if not outer:
        outer = f"{value.get('create_time')} {fields.text(value.get('title'))}"
    walk = _Walk(outer, mapping, begun)
    walk.run()
    head = walk.place.get(fields.text(value.get("current_node")))
    return Stored(
        fields.own_id("chatgpt", outer),
        fields.text(value.get("title")) or None,
        rows.to_tree(walk.nodes, head),
        Settings(system=walk.system),
        fields.text(value.get("default_model_slug")) or next((n.model for n in walk.nodes if n.model), None),
        None,
        value.get("is_starred") is True,
        begun,
        fields.moment(value.get("update_time"), begun),
    )


class _Walk:
    """Goes through a mapping from its roots, without recursion: a conversation is as deep as it is long."""

    def __init__(self, outer: str, mapping: dict[str, dict[str, Any]], begun: float) -> None:
        self.outer, self.mapping, self.begun = outer, mapping, begun
        self.parents = {key: fields.text(node.get("parent")) for key, node in mapping.items()}
        self.nodes: list[Node] = []
        self.by_id: dict[str, Node] = {}
        self.place: dict[str, str | None] = {}
        """Where a node of the mapping went: to the message it is, or the one before it."""
        self.system: str | None = None

    def run(self) -> None:
        """Visit every node once; where parents go round in a circle, one of them is taken for the first."""
        children = self._children()
        roots = [key for key, parent in self.parents.items() if parent not in self.mapping]
        for root in (*roots, *self.mapping):
            self._visit(root, children)

    def _children(self) -> dict[str, list[str]]:
        """Return what follows each node, in the order of its own list, and then what only names it as its parent."""
        children: dict[str, dict[str, None]] = {key: {} for key in self.mapping}
        for key, node in self.mapping.items():
            for child in fields.listed(node.get("children")):
                if isinstance(child, str) and child in self.mapping and self.parents[child] == key:
                    children[key][child] = None
        for key, parent in self.parents.items():
            if parent in self.mapping:
                children[parent][key] = None
        return {key: list(found) for key, found in children.items()}

    def _visit(self, root: str, children: dict[str, list[str]]) -> None:
        waiting: list[tuple[str, str | None, str, float | None]] = [(root, None, "", None)]
        while waiting:
            key, parent, thought, seconds = waiting.pop()
            if key in self.place:
                continue
            message = fields.mapping(self.mapping[key].get("message"))
            content = fields.mapping(message.get("content"))
            kind = fields.text(content.get("content_type"))
            if _is_hidden(message):
                self._read_system(message, content)
                self.place[key] = parent
            elif kind == "thoughts":
                thought = "\n\n".join(filter(None, (thought, _thoughts(content))))
                self.place[key] = parent
            elif kind in _SILENT:
                duration = fields.mapping(message.get("metadata")).get("finished_duration_sec")
                seconds = float(duration) if isinstance(duration, int | float) and 0 <= duration < 1e6 else seconds
                self.place[key] = parent
            else:
                parent = self._keep(key, message, content, parent, thought, seconds)
                if self.by_id[parent].role != "tool":
                    thought, seconds = "", None
                self.place[key] = parent
            following = [child for child in children[key] if child not in self.place]
            if thought and not following:
                self.place[key] = self._add(Node("assistant", thought=thought, finish="cancelled"), key + "#", parent)
            waiting += [(child, parent, thought, seconds) for child in reversed(following)]

    def _keep(
        self,
        key: str,
        message: dict[str, Any],
        content: dict[str, Any],
        parent: str | None,
        thought: str,
        seconds: float | None,
    ) -> str:
        author = fields.mapping(message.get("author"))
        role = fields.text(author.get("role"))
        about = fields.mapping(message.get("metadata"))
        said = _said(content)
        node = Node("user", said, created_at=fields.moment(message.get("create_time"), self.begun))
        if role == "tool":
            parent = self._calling(key, parent, fields.text(author.get("name")) or "tool")
            before = self.by_id[parent]
            node.role, node.call_id = "tool", before.calls[-1].id if before.calls else before.call_id
        elif role == "assistant":
            node.role, node.thought, node.thought_s = "assistant", thought, seconds
            node.model = fields.text(about.get("model_slug")) or None
            recipient = fields.text(message.get("recipient")) or "all"
            if recipient != "all":
                node.calls, node.text, node.finish = (_call(key, recipient, said),), "", "tools"
            else:
                ended = fields.text(fields.mapping(about.get("finish_details")).get("type"))
                node.finish = _ENDS.get(ended, "stop")
        else:
            if thought:
                # It was stopped before an answer came.
                stopped = Node("assistant", thought=thought, thought_s=seconds, finish="cancelled")
                parent = self._add(stopped, key + "#thought", parent)
            names = (fields.text(fields.mapping(each).get("name")) for each in fields.listed(about.get("attachments")))
            node.text = "\n".join(filter(None, (said, *(f"[file: {name}]" for name in names if name))))
        return self._add(node, key, parent)

    def _calling(self, key: str, parent: str | None, name: str) -> str:
        """Return what a tool's message answers; templates want a call there, so that one is made where none is."""
        before = self.by_id.get(parent or "")
        if before is not None and (before.calls or before.call_id):
            return before.id
        if before is not None and before.role == "assistant":
            before.calls, before.finish = (Call(key, name),), "tools"
            return before.id
        return self._add(Node("assistant", calls=(Call(key, name),), finish="tools"), key + "#call", parent)

    def _add(self, node: Node, key: str, parent: str | None) -> str:
        node.id, node.parent = fields.own_id("chatgpt", self.outer, key), parent
        self.nodes.append(node)
        self.by_id[node.id] = node
        return node.id

    def _read_system(self, message: dict[str, Any], content: dict[str, Any]) -> None:
        role = fields.text(fields.mapping(message.get("author")).get("role"))
        if self.system is None and role == "system" and (said := _said(content).strip()):
            self.system = said


def _is_hidden(message: dict[str, Any]) -> bool:
    role = fields.text(fields.mapping(message.get("author")).get("role"))
    about = fields.mapping(message.get("metadata"))
    content = fields.mapping(message.get("content"))
    kind = content.get("content_type")
    return (
        role not in ("user", "assistant", "tool")
        or message.get("weight") == 0
        or about.get("is_visually_hidden_from_conversation") is True
        or about.get("is_user_system_message") is True
        or (kind not in ("thoughts", *_SILENT) and not _said(content).strip() and not about.get("attachments"))
    )


def _said(content: dict[str, Any]) -> str:
    """Return a content's text, whatever its type calls it."""
    kind = fields.text(content.get("content_type"))
    if "parts" in content:
        return "\n".join(filter(None, (_part(part) for part in fields.listed(content["parts"]))))
    if kind == "tether_quote":
        parts = (fields.text(content.get(name)) for name in ("title", "url", "text"))
        return "\n".join(filter(None, parts))
    if kind == "system_error":
        return ": ".join(filter(None, (fields.text(content.get("name")), fields.text(content.get("text")))))
    for name in ("text", "result", "content"):
        if said := fields.text(content.get(name)):
            return said
    return ""


def _part(part: Any) -> str:
    """Return a part's text; what is no text is named."""
    if isinstance(part, str):
        return part
    found = fields.mapping(part)
    kind = fields.text(found.get("content_type"))
    if kind in ("audio_transcription", "text"):
        return fields.text(found.get("text"))
    pointer = fields.text(found.get("asset_pointer")).rsplit("/", 1)[-1]
    names = {
        "image_asset_pointer": "image",
        "audio_asset_pointer": "audio",
        "real_time_user_audio_video_asset_pointer": "audio and video",
    }
    name = names.get(kind, kind)
    if not name:
        return ""
    return f"[{name}: {pointer}]" if pointer else f"[{name}]"


def _thoughts(content: dict[str, Any]) -> str:
    thoughts = []
    for each in map(fields.mapping, fields.listed(content.get("thoughts"))):
        summary, said = fields.text(each.get("summary")), fields.text(each.get("content"))
        thoughts.append("\n\n".join(filter(None, (f"**{summary}**" if summary and said else summary, said))))
    return "\n\n".join(filter(None, thoughts))


def _call(key: str, name: str, said: str) -> Call:
    try:
        arguments = json.loads(said)
    except (ValueError, RecursionError):
        arguments = None
    return Call(key, name, arguments if isinstance(arguments, dict) else {"input": said})
