"""A conversation's title: asked of the model, and made presentable."""

from __future__ import annotations

import re

from edger1.messages import Message
from edger1.tui.clean import clean
from edger1.tui.tree import Tree

TITLE_TOKENS = 24
LENGTH_MAX = 60
"""Characters of a title."""
WORDS_MAX = 9
"""Words of a title, with some to spare for languages that need more than was asked for."""
_ASK = "Name this conversation in two to six words. Answer with the name alone."
_LEADS = re.compile(r"^(?:(?:(?:title|name|conversation)\s*:|#+)\s*)+", re.IGNORECASE)


def title_question(tree: Tree, system: str | None) -> list[Message]:
    """Return the messages that ask for a title: the conversation itself with one more, so that its cache serves."""
    messages = tree.messages(system)
    if messages and messages[-1]["role"] == "user":
        messages.pop()
    return [*messages, {"role": "user", "content": _ASK}]


def tidy(said: str, tree: Tree) -> str:
    """Return the title out of what the model said; the beginning of the question where that is none."""
    lines = [line.strip() for line in clean(said).splitlines() if line.strip()]
    title = _LEADS.sub("", lines[0]) if lines else ""
    title = title.replace("**", "").strip(" \t\"'`*_“”‘’«».:")
    # A small model that goes on and on has not named anything.
    named = re.search(r"\w", title) and len(title.split()) <= WORDS_MAX
    return shorten(title) if named and not _repeats(title, tree) else first_words(tree)


def _repeats(title: str, tree: Tree) -> bool:
    """Whether most of a title is what it was asked for with, as small models give back, and nothing that was said."""
    asked, said = _words(_ASK), _words(" ".join(node.text for node in tree.path()))
    words = re.findall(r"\w+", title.lower())
    return 2 * sum(word in asked and word not in said for word in words) > len(words)


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


def first_words(tree: Tree) -> str:
    """Return the beginning of what was asked first."""
    asked = next((node for node in tree.path() if node.role == "user"), None)
    if asked is None:
        return ""
    text = " ".join(clean(asked.text).split())
    return shorten(text) or (asked.attachments[0].name if asked.attachments else "")


def shorten(text: str) -> str:
    """Cut at a word's end where a text is too long for a title."""
    text = " ".join(text.split())
    if len(text) <= LENGTH_MAX:
        return text
    head, _, _ = text[: LENGTH_MAX - 1].rpartition(" ")
    return (head or text[: LENGTH_MAX - 1]) + "…"
