"""A tree of token sequences: those that begin alike share their beginning's nodes, one node for each stretch.

Plain Python that knows nothing of caches. mlx-lm has a `PromptTrie`, which takes a dict a token (some 2 MB for 8,000
tokens, beside what a plan counts) and builds the rest of a longer sequence anew at every step of a search; this one
has a node for each place where sequences part or end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

H = TypeVar("H")
M = TypeVar("M")


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix of two token sequences."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


@dataclass(eq=False)
class Node(Generic[H, M]):
    """The place behind `ids`, which follow the parent's place; `end` tokens lead here from the root.

    What is `held` here, the `mark`, and when it was last `used` are the owner's. A node without children holds
    something.
    """

    ids: list[int]
    end: int
    parent: Node[H, M] | None = None
    children: dict[int, Node[H, M]] = field(default_factory=dict)
    held: H | None = None
    mark: M | None = None
    used: int = 0

    @property
    def path(self) -> list[Node[H, M]]:
        """The nodes from the root's child down to this one."""
        nodes: list[Node[H, M]] = []
        node: Node[H, M] = self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def below(self) -> Iterator[Node[H, M]]:
        """Yield this node and all under it, each before those under it."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())


@dataclass(frozen=True)
class Place(Generic[H, M]):
    """Where a walk ended: `matched` tokens, at `node`'s place or, where that is behind it, on the way to it."""

    node: Node[H, M]
    matched: int

    @property
    def path(self) -> list[Node[H, M]]:
        """The nodes that the walk has passed or reached."""
        path = self.node.path
        return path if self.matched == self.node.end else path[:-1]


class TokenTree(Generic[H, M]):
    """The tree itself."""

    def __init__(self) -> None:
        self.root: Node[H, M] = Node([], 0)

    def nodes(self) -> Iterator[Node[H, M]]:
        """Yield every node but the root."""
        return (node for node in self.root.below() if node is not self.root)

    def walk(self, ids: Sequence[int]) -> Place[H, M]:
        """Follow `ids` as far as the tree knows them."""
        node, at = self.root, 0
        while at < len(ids):
            child = node.children.get(ids[at])
            if child is None:
                break
            ahead = list(ids[at : at + len(child.ids)])
            if ahead != child.ids:
                return Place(child, at + common_prefix(ahead, child.ids))
            node, at = child, child.end
        return Place(node, at)

    def settle(self, place: Place[H, M]) -> Node[H, M]:
        """Return the node at a place, made there if there was none; it holds nothing then."""
        node = place.node
        while node.parent is not None and node.parent.end >= place.matched:
            # It was made there since the walk.
            node = node.parent
        parent = node.parent
        if place.matched == node.end or parent is None:
            return node
        at = place.matched - parent.end
        upper: Node[H, M] = Node(node.ids[:at], place.matched, parent, used=node.used)
        parent.children[upper.ids[0]] = upper
        node.ids, node.parent = node.ids[at:], upper
        upper.children[node.ids[0]] = node
        return upper

    def add(self, node: Node[H, M], ids: Sequence[int]) -> Node[H, M]:
        """Put a new node behind `ids`, which follow `node` and none of its children begins with."""
        child: Node[H, M] = Node(list(ids), node.end + len(ids), node)
        node.children[child.ids[0]] = child
        return child

    def prune(self, node: Node[H, M]) -> None:
        """Remove `node`, which holds nothing any more, and whatever above it then leads nowhere."""
        while node.parent is not None and not node.children and node.held is None:
            del node.parent.children[node.ids[0]]
            node = node.parent
