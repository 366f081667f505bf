"""Caches of earlier prompts in a tree over their tokens: what several begin with is kept once.

Where caches can be cut (`cache_parts`), each node of the tree may hold the stretch of tokens that ends there, and a
prompt's cache is joined from those on its way. So a system prompt of 1,000 tokens lies in memory once, whatever the
number of conversations behind it, and each of them adds its own tokens; its bytes are counted once as well. MLX has no
arrays that several caches write behind, so a running request has a copy of its own, which the plan counts for it alone.

Beginnings shorter than `WORTH_TOKENS` (what every chat template puts first) are kept by each for itself: cutting two
long conversations for the sake of a few tokens costs more than it saves.

Caches that cannot be cut are kept whole. Where they can be trimmed (a window that is not full) they serve every prompt
that begins as they do; else (a window that has gone round, a state of fixed size) only prompts that continue them from
their very end.

mlx-lm's server has an `LRUPromptCache`: it copies the whole of an entry for each use before it trims it, holds each
conversation's beginning anew, and counts entries and bytes of its own beside those of running requests; a ceiling that
holds needs all three otherwise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from edger1 import cache_parts
from edger1.cache_parts import Part
from edger1.token_tree import Node, Place, TokenTree

WORTH_TOKENS = 32


@dataclass
class Entry:
    """One kept cache: exactly `ids` have passed through the model; they decode to `text`.

    `drawn` are the ids that the model had drawn to go on from there, `drawn_text` what they decode to. The last of
    `caches` may be what an MTP layer knows (`drafting.mtp.Kept`).
    """

    ids: list[int]
    text: str
    caches: list[Any]
    drawn: list[int] = field(default_factory=list)
    drawn_text: str = ""


@dataclass
class Held:
    """Caches of the tokens from `begin` to the node's place; from 0 where they cannot be cut.

    `extra` is what an MTP layer knows of all tokens up to there.
    """

    caches: list[Any]
    begin: int
    divisible: bool
    extra: Any = None
    nbytes: int = 0

    def __post_init__(self) -> None:
        self.nbytes = sum(cache.nbytes for cache in self.all)

    @property
    def all(self) -> list[Any]:
        """The caches, as a request gets them."""
        return self.caches if self.extra is None else [*self.caches, self.extra]


@dataclass(frozen=True)
class Mark:
    """The text that the ids up to a node stand for, and what was drawn behind it."""

    ids: list[int]
    text: str
    drawn: list[int]
    drawn_text: str


_Node = Node[Held, Mark]


class PrefixCache:
    """The tree of one model's caches. Who owns it keeps its `nbytes` within a budget by `evict`."""

    def __init__(self) -> None:
        self._tree: TokenTree[Held, Mark] = TokenTree()
        self._now = 0
        self.nbytes = 0
        """Bytes that the arrays of everything held take."""

    def marks(self) -> list[Mark]:
        """Return what is known of the texts of what is held."""
        return [node.mark for node in self._tree.nodes() if node.mark is not None and node.mark.text]

    def clear(self) -> None:
        """Drop everything."""
        self._tree, self.nbytes = TokenTree(), 0

    def put(self, entry: Entry) -> None:
        """Keep an entry's caches, which are its own no more; of what is there already only one copy."""
        caches, extra = _apart(entry.caches)
        divisible = cache_parts.divisible(caches, len(entry.ids))
        if any(node.held is not None and node.held.divisible != divisible for node in self._tree.nodes()):
            self.clear()
        place = self._tree.walk(entry.ids)
        node = self._put_parts(entry.ids, place, caches) if divisible else self._put_whole(entry.ids, place, caches)
        if node.held is not None and extra is not None:
            self._hold(node, Held(node.held.caches, node.held.begin, node.held.divisible, extra))
        if entry.text or node.mark is None:
            node.mark = Mark(entry.ids, entry.text, entry.drawn, entry.drawn_text)
        self._touch(node.path)
        self._forget_passed(node)

    def take(self, ids: list[int], fits: Callable[[], bool]) -> tuple[list[Any] | None, int]:
        """Return caches of the longest beginning of `ids` that there is one for, and its length; (None, 0) for none.

        At least one token of `ids` is left out. The caches are a copy as long as `fits`, which is asked whether what is
        held has its room; else what nothing else depends on is handed over itself, and others go, the least recently
        used first, until it does.
        """
        place = self._tree.walk(ids[:-1])
        if place.matched == 0:
            return None, 0
        held = _serving(place.node).held
        parts = held is not None and held.divisible
        return self._take_parts(place, fits, len(ids)) if parts else self._take_whole(place, fits, len(ids))

    def evict(self, protected: Collection[_Node] = ()) -> bool:
        """Drop what was used least recently of what nothing else depends on; False where there is nothing."""
        free = [node for node in self._tree.nodes() if _is_free(node) and node not in protected]
        if not free:
            return False
        self._drop(min(free, key=lambda node: node.used))
        return True

    def _put_parts(self, ids: list[int], place: Place[Held, Mark], caches: list[Any]) -> _Node:
        node = self._tree.settle(place)
        if place.matched == len(ids):
            return node
        if place.matched - _covered(node) >= WORTH_TOKENS:
            self._cut_at(node)
        begin = _covered(node)
        leaf = self._tree.add(node, ids[place.matched :])
        self._hold(leaf, Held(cache_parts.cut_off(caches, begin) if begin else caches, begin, True))
        return leaf

    def _put_whole(self, ids: list[int], place: Place[Held, Mark], caches: list[Any]) -> _Node:
        node = self._tree.settle(place)
        if place.matched < len(ids):
            node = self._tree.add(node, ids[place.matched :])
        self._hold(node, Held(caches, 0, False))
        if _trimmable(caches):
            # It serves whatever they would.
            for above in node.path[:-1]:
                if above.held is not None and _trimmable(above.held.caches):
                    self._hold(above, None)
        return node

    def _take_parts(self, place: Place[Held, Mark], fits: Callable[[], bool], room: int) -> tuple[list[Any], int]:
        matched, extra = place.matched, self._extra(place)
        kept = [node for node in place.path if node.held is not None]
        # What goes on beyond the place, and reaches back to what is held before it.
        beyond = None if kept and kept[-1].end == matched else _serving(place.node)
        given: list[Part] = []
        while not fits():
            if beyond is not None and not beyond.children and beyond.end <= 2 * matched:
                # Rather than another conversation, the smaller part of this one goes.
                given.append(_part(beyond, matched, own=True))
                self._drop(beyond)
                beyond = None
            elif beyond is not None and self._cut_at(node := self._tree.settle(place)):
                # What is shared is apart from what is not now, and that goes in its turn.
                kept.append(node)
                beyond = None
            elif beyond is None and kept and not kept[-1].children:
                given.insert(0, _part(kept[-1], kept[-1].end, own=True))
                self._drop(kept.pop())
            elif not self.evict(kept if beyond is None else [*kept, beyond]):
                break
        self._touch(kept)
        parts = [_part(node, node.end, own=False) for node in kept] + given
        if beyond is not None:
            parts.append(_part(beyond, matched, own=False))
        if given and len(parts) == 1:
            # A cache that is handed over as it is has spare room of its own.
            caches = _alone(given[0])
            cache_parts.shrink(caches, room)
        else:
            caches = cache_parts.join(parts, room)
        return caches if extra is None else [*caches, extra], matched

    def _take_whole(
        self, place: Place[Held, Mark], fits: Callable[[], bool], room: int
    ) -> tuple[list[Any] | None, int]:
        from mlx_lm.models.cache import trim_prompt_cache

        longer = [n for n in place.node.below() if n.held is not None and _trimmable(n.held.all)]
        if longer:
            node, shared = max(longer, key=lambda n: n.used), place.matched
        else:
            node = next((n for n in reversed(place.path) if n.held is not None), place.node)
            if node.held is None or node.end > place.matched:
                return None, 0
            shared = node.end
        surplus, held = node.end - shared, node.held
        assert held is not None
        if surplus > shared:
            while not fits() and self.evict([node]):
                pass
        if fits():
            self._touch([node])
            caches = copy.deepcopy(held.all)
        else:
            caches = held.all
            self._drop(node)
        if surplus:
            trim_prompt_cache(caches, surplus)
        cache_parts.shrink(caches, room)
        return caches, shared

    def _extra(self, place: Place[Held, Mark]) -> Any:
        """Return a copy of what an MTP layer knows of the tokens up to a place, None where that is nothing."""
        node = next((n for n in place.node.below() if n.held is not None and n.held.extra is not None), None)
        if node is None or node.held is None or not node.held.extra.is_trimmable():
            return None
        extra = copy.deepcopy(node.held.extra)
        extra.trim(node.end - place.matched)
        return extra

    def _cut_at(self, node: _Node) -> bool:
        """Let `node` hold the end of its own way, cut off what is held below it, where a single one begins above."""
        if node.held is not None or node.parent is None:
            return False
        begin = _covered(node)
        over = [n for n in node.below() if n.held is not None and n.held.begin == begin]
        if len(over) != 1 or begin == node.end:
            return False
        below = over[0]
        held = below.held
        assert held is not None
        first, second = cache_parts.divide(held.caches, node.end - begin)
        self._hold(below, Held(second, node.end, True, held.extra))
        self._hold(node, Held(first, begin, True))
        return True

    def _hold(self, node: _Node, held: Held | None) -> None:
        self.nbytes += (0 if held is None else held.nbytes) - (0 if node.held is None else node.held.nbytes)
        node.held = held

    def _drop(self, node: _Node) -> None:
        self._hold(node, None)
        self._tree.prune(node)

    def _touch(self, nodes: Iterable[_Node]) -> None:
        self._now += 1
        for node in nodes:
            node.used = self._now

    def _forget_passed(self, node: _Node) -> None:
        """Drop what MTP layers knew of beginnings of what one knows now."""
        if node.held is None or node.held.extra is None:
            return
        for above in node.path[:-1]:
            if above.held is not None and above.held.extra is not None:
                self._hold(above, Held(above.held.caches, above.held.begin, above.held.divisible))


def _apart(caches: list[Any]) -> tuple[list[Any], Any]:
    """Return the model's own caches, in the same list, and what its MTP layer knows or None."""
    from edger1.drafting.mtp import Kept

    # Of another list nobody could let go of a layer at a time.
    extra = caches.pop() if caches and isinstance(caches[-1], Kept) else None
    return caches, extra


def _trimmable(caches: list[Any]) -> bool:
    return all(cache.is_trimmable() for cache in caches)


def _is_free(node: _Node) -> bool:
    return node.held is not None and (not node.children or not node.held.divisible)


def _covered(node: _Node) -> int:
    """Return up to where what is held on the way to a node, itself included, reaches."""
    return max([0, *(each.end for each in node.path if each.held is not None)])


def _serving(node: _Node) -> _Node:
    """Return the first node from `node` on that holds something: every way down leads to one."""
    return next(each for each in node.below() if each.held is not None)


def _part(node: _Node, end: int, *, own: bool) -> Part:
    """Return what is held at a node, up to token `end`."""
    assert node.held is not None
    return Part(node.held.caches, end - node.held.begin, own)


def _alone(part: Part) -> list[Any]:
    """Return a part's own caches, without the tokens behind it."""
    from mlx_lm.models.cache import trim_prompt_cache

    trim_prompt_cache(part.caches, part.caches[0].offset - part.count)
    return part.caches
