"""Several samples in lines: none is written before all are over, since lines cannot be taken back."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from edger1.messages import Done, Event, Failed, Sampled
from edger1.tui.backend import to_the_end
from edger1.tui.figures import duration
from edger1.tui.samples import Samples, Voted
from edger1.tui.tree import Node
from edger1.tui.votes import tally_of

if TYPE_CHECKING:
    from edger1.cli.plain_chat import Lines

REMARKS = {"cancelled": "Stopped. What was said is kept.", "length": "Stopped at the limit of length."}
"""What is said after an answer that did not end by itself."""


class PlainVote:
    """Says how far samples are, and then the one that won. `keep` saves a message as it is."""

    def __init__(self, lines: Lines, name: str, thoughts: bool, keep: Callable[[Node], None]) -> None:
        self._lines, self._name, self._thoughts, self._keep = lines, name, thoughts, keep
        self.shown: Node | None = None
        """The message that won, or that is the best of those that were stopped; None where there is no word of one."""

    def samples(self, nodes: Sequence[Node]) -> Samples:
        """Return samples that are ready to be drawn."""
        return Samples(nodes, self, self._keep, time.monotonic, first_begun=False)

    def grow(self, node: Node, text: str = "", thought: str = "") -> None:
        """Add a piece to a message; it is saved with its end."""
        node.text += text
        node.thought += thought

    def finish(self, node: Node) -> None:
        """Save a message."""
        self._keep(node)

    async def hold(self, samples: Samples, asked: AsyncIterator[Event]) -> Done | Failed | None:
        """Draw the samples and write what came of the vote; `asked` is the engine's answer. Returns how it ended."""
        end: Done | Failed | None = None
        async with aclosing(samples.run(to_the_end(asked, Done))) as events:
            async for event in events:
                match event:
                    case Sampled(done=done, total=of):
                        self._lines.say(f"{done} of {of} done.")
                    case Voted(node=node) if node.text.strip() or node.thought:
                        self.shown = node
                    case Done() | Failed():
                        end = event
        if self.shown is not None:
            self._write(self.shown)
        if isinstance(end, Done):
            for each in (REMARKS.get(end.finish_reason, ""), *end.notes):
                if each:
                    self._lines.say(each)
        elif end is not None:
            self._lines.say(f"The answer failed. {end.message} Your conversation is kept; /retry asks again.")
        return end

    def _write(self, node: Node) -> None:
        lines = self._lines
        lines.new_line()
        if node.thought:
            if self._thoughts:
                lines.write(f"Thinking: {node.thought.strip()}\n", dim=True)
            lines.say(f"Thought for {duration(node.thought_s or 0.0)}, {len(node.thought.split()):,} words.")
        lines.say(f"{self._name}: {node.text.strip()}")
        _, tally = tally_of(node)
        if tally:
            counted = ", ".join(f"{answer}: {count}" for answer, count in tally)
            lines.say(f"Votes: {counted}. /others writes the other samples out.")
