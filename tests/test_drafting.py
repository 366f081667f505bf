"""The parts of drafting that need no model: look-up, rejection, and the choice of how many."""

from __future__ import annotations

import numpy as np
import pytest

from edger1.drafting.length import Acceptance, Cost, Length, Pace
from edger1.drafting.lookup import Lookup, Match
from edger1.drafting.rejection import accept, draw


def test_lookup_takes_the_longest_agreement_and_of_those_the_latest() -> None:
    #        8 2 3 -> 10    2 3 -> 11      9 2 3 -> 12     8 2 3
    tokens = [8, 2, 3, 10, 0, 2, 3, 11, 0, 9, 2, 3, 12, 0, 8, 2, 3]
    found = Lookup().find(tokens, 2)
    assert found == Match([10, 0], 3)
    tokens[-3] = 7
    found = Lookup().find(tokens, 1)
    assert found == Match([12], 2)


def test_lookup_finds_nothing_that_was_not_there_and_grows_with_the_text() -> None:
    lookup = Lookup()
    assert lookup.find([1, 2, 3, 4], 4) is None
    assert lookup.find([1, 2, 3, 4, 1], 4) is None
    found = lookup.find([1, 2, 3, 4, 1, 2], 4)
    assert found == Match([3, 4, 1, 2], 2)


def test_lookup_goes_on_with_a_repetition_past_the_end() -> None:
    found = Lookup().find([5, 6, 7, 6, 7], 5)
    assert found == Match([6, 7, 6, 7, 6], 2)


@pytest.mark.parametrize("flat", [True, False])
def test_what_comes_out_is_distributed_as_the_model_says(flat: bool) -> None:
    random = np.random.default_rng(7)
    p = random.dirichlet(np.ones(5), size=3)
    q = np.full((2, 5), 0.2) if flat else random.dirichlet(np.ones(5) * 0.5, size=2)
    counts, second = np.zeros(5), np.zeros(5)
    for _ in range(30_000):
        drafts = [draw(q[0], random), draw(q[1], random)]
        stood, following = accept(drafts, p, q, random)
        said = [*drafts[:stood], following]
        counts[said[0]] += 1
        if len(said) > 1:
            second[said[1]] += 1
    for seen, expected in ((counts, p[0]), (second, p[1])):
        # Chi-square with 4 degrees of freedom exceeds 18.5 once in a thousand times.
        assert ((seen - seen.sum() * expected) ** 2 / (seen.sum() * expected)).sum() < 18.5


def test_a_draft_that_the_model_never_says_never_stands() -> None:
    random = np.random.default_rng(0)
    p, q = np.array([[0.0, 1.0], [0.5, 0.5]]), np.array([[1.0, 0.0]])
    assert {accept([0], p, q, random) for _ in range(50)} == {(0, 1)}


def _pace(plain: float, steps: dict[int, float], nbytes: float = 0.0) -> Pace:
    pace = Pace()
    for _ in range(3):
        pace.note_plain(Cost(plain, nbytes=nbytes))
        for drafts, seconds in steps.items():
            pace.note("mtp", drafts, Cost(seconds, nbytes=nbytes))
    return pace


def _length(pace: Pace) -> Length:
    return Length("mtp", pace, 7, 0.2)


def test_nothing_is_drafted_before_plain_steps_were_measured() -> None:
    assert _length(Pace()).choose(Acceptance(1.0), 7) == (0, 1.0)


def test_drafts_are_as_many_as_say_most_tokens_a_second() -> None:
    pace = _pace(1.0, {1: 1.1, 2: 1.2, 3: 3.0, 7: 7.0})
    drafts, gain = _length(pace).choose(Acceptance(0.9, 1e6), 7)
    assert drafts == 2
    assert gain == pytest.approx((1 + 0.9 + 0.81) / 1.2, rel=1e-3)
    assert _length(pace).choose(Acceptance(0.9, 1e6), 1)[0] == 1


def test_drafting_ends_where_it_loses_and_is_tried_again_later() -> None:
    length = _length(_pace(1.0, {1: 2.5, 7: 9.0}))
    tried = []
    for i in range(100):
        if length.choose(Acceptance(0.9, 1e6), 7)[0]:
            tried.append(i)
            length.taken()
    assert tried == [23, 71], "after 24 tokens, and after twice as many"


def test_a_trial_may_take_several_steps() -> None:
    length = Length("mtp", _pace(1.0, {1: 2.5, 7: 9.0}), 7, 0.2, 1, 3)
    tried = []
    for i in range(100):
        if length.choose(Acceptance(0.9, 1e6), 7)[0]:
            tried.append(i)
            length.taken()
    assert tried == [23, 24, 25, 73, 74, 75]


def test_rejected_drafts_end_drafting_and_accepted_ones_bring_it_back() -> None:
    pace, acceptance = _pace(1.0, {1: 1.5}), Acceptance(0.7)
    assert _length(pace).choose(acceptance, 1)[0] == 1
    for _ in range(20):
        acceptance.note(1, 0)
    assert _length(pace).choose(acceptance, 1)[0] == 0
    for _ in range(60):
        acceptance.note(1, 1)
    assert _length(pace).choose(acceptance, 1)[0] == 1


def test_plain_decoding_is_measured_anew_while_drafts_win() -> None:
    length = _length(_pace(1.0, {1: 1.1}))
    chosen = []
    for _ in range(300):
        chosen.append(length.choose(Acceptance(0.9, 1e6), 1)[0])
        if chosen[-1]:
            length.taken()
    assert chosen[0] == 1
    assert chosen.count(0) in (6, 9)
    first = chosen.index(0)
    assert chosen[first : first + 4] == [0, 0, 0, 1]


def test_a_source_that_was_slower_in_the_end_must_promise_more() -> None:
    pace, acceptance = _pace(1.0, {1: 1.6}), Acceptance(0.9, 1e6)
    pace.came_of("", 200, 200.0)
    assert _length(pace).choose(acceptance, 1)[0] == 1, "1.9 tokens in the time of 1.6"
    for lost in range(1, 3):
        pace.came_of("mtp", 60, 66.0)
        assert pace.demand("mtp") == pytest.approx(1.05 * 1.15 ** (lost - 1)), "of so few tokens nothing is known"
        pace.came_of("mtp", 10, 11.0)
        assert pace.demand("mtp") == pytest.approx(1.05 * 1.15**lost)
    length = _length(pace)
    assert length.choose(acceptance, 1)[0] == 0
    # Each trial brings it a little nearer.
    while not (chosen := length.choose(acceptance, 1))[0] or chosen[1] == 1.0:
        if chosen[0]:
            length.taken()
    assert pace.demand("mtp") < 1.9 / 1.6


def test_a_source_that_gained_may_go_on() -> None:
    pace = _pace(1.0, {1: 1.6})
    pace.came_of("", 200, 200.0)
    pace.came_of("mtp", 500, 510.0)
    assert pace.demand("mtp") == 1.05


def test_drafts_are_priced_in_the_bytes_that_verifying_reads() -> None:
    pace = Pace()
    for _ in range(3):
        pace.note_plain(Cost(1.5, stall_s=0.5, nbytes=100.0))
    # One more row is taken to read as much as a plain step: 0.5 s more, and a fifth of what it computes.
    assert pace.seconds("mtp", 1, 0.2) == pytest.approx(1.2 + 1.0)
    for _ in range(3):
        pace.note("mtp", 1, Cost(1.8, stall_s=0.6, nbytes=120.0))
    assert pace.seconds("mtp", 1, 0.2) == pytest.approx(1.2 + 0.6, rel=0.01)
    for _ in range(200):
        pace.note_plain(Cost(5.0, stall_s=4.0, nbytes=100.0))
    # The disk has become slower: what reads more loses more by it.
    assert pace.seconds("mtp", 1, 0.2) == pytest.approx(1.2 + 4.8, rel=0.05)
