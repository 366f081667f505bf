"""Problems of order and number: comparing, sorting, counting, reversing, and who is taller than whom."""

from __future__ import annotations

import itertools
from random import Random

from recipes.nano.problems import Problem, joined, listed, some
from recipes.nano.words import ANIMALS, NAMES, OBJECTS, WORDS


def compare(rng: Random) -> Problem:
    """The largest or smallest of two to four numbers."""
    digits = rng.randrange(2, 5)
    span = range(10 ** (digits - 1), 10**digits) if rng.random() < 0.7 else range(0, 10**digits)
    numbers = some(rng, span, rng.choice((2, 2, 3, 4)))
    if rng.random() < 0.3:
        # Numbers that differ in late digits only are where reading from the left matters.
        base = numbers[0] // 10 * 10
        numbers = [base + digit for digit in some(rng, range(10), len(numbers))]
    largest = rng.random() < 0.5
    best = numbers[0]
    steps = []
    for number in numbers[1:]:
        steps.append(f"{best} {'>' if best > number else '<'} {number}")
        best = max(best, number) if largest else min(best, number)
    word = "larger" if largest else "smaller"
    if len(numbers) > 2:
        word = "largest" if largest else "smallest"
    question = rng.choice(
        (
            f"Which is {word}, {joined(numbers, 'or')}?"
            if len(numbers) == 2
            else f"Which number is the {word}: {listed(numbers)}?",
            f"Find the {word} of {joined(numbers)}.",
        )
    )
    steps.append(f"the {word} is {best}")
    return Problem("compare", f"{largest} {sorted(numbers)}", question, tuple(steps), str(best))


def sort_numbers(rng: Random) -> Problem:
    """Three to six numbers in order, the smallest (or largest) taken out each time."""
    numbers = some(rng, range(0, rng.choice((100, 100, 1000))), rng.randrange(3, 7))
    rising = rng.random() < 0.7
    steps, rest = [], list(numbers)
    while len(rest) > 1:
        best = min(rest) if rising else max(rest)
        steps.append(f"{listed(rest)}: {best}")
        rest.remove(best)
    steps.append(f"left: {rest[0]}")
    direction = "from small to large" if rising else "from large to small"
    question = rng.choice(
        (
            f"Sort these numbers {direction}: {listed(numbers)}",
            f"Put {joined(numbers)} in order, {direction}.",
            f"Sort {direction}: {listed(numbers)}.",
        )
    )
    answer = listed(sorted(numbers, reverse=not rising))
    return Problem("sort numbers", f"{rising} {sorted(numbers)}", question, tuple(steps), answer)


def sort_words(rng: Random) -> Problem:
    """Three to five words in alphabetical order."""
    words = some(rng, WORDS, rng.randrange(3, 6))
    steps, rest = [], list(words)
    while len(rest) > 1:
        best = min(rest)
        steps.append(f"{listed(rest)}: {best}")
        rest.remove(best)
    steps.append(f"left: {rest[0]}")
    question = rng.choice(
        (
            f"Sort these words alphabetically: {listed(words)}",
            f"Put {joined(words)} in alphabetical order.",
        )
    )
    return Problem("sort words", listed(sorted(words)), question, tuple(steps), listed(sorted(words)))


def count_letters(rng: Random) -> Problem:
    """How often a letter is in a word, spelled out with a running count."""
    word = rng.choice(WORDS)
    letter = rng.choice(word) if rng.random() < 0.85 else rng.choice("aeiourstln")
    found, spelled = 0, []
    for one in word:
        found += one == letter
        spelled.append(f"{one} {found}" if one == letter else one)
    question = rng.choice(
        (
            f'How many times is the letter {letter} in "{word}"?',
            f"Count the letter {letter} in the word {word}.",
            f"How many {letter}s are in {word}?",
        )
    )
    return Problem("count letters", f"{word} {letter}", question, (listed(spelled),), str(found))


def count_things(rng: Random) -> Problem:
    """How often a word is in a list."""
    kinds = some(rng, ANIMALS + OBJECTS, rng.randrange(2, 5))
    things = [rng.choice(kinds) for _ in range(rng.randrange(5, 13))]
    wanted = rng.choice(kinds)
    found, marked = 0, []
    for thing in things:
        found += thing == wanted
        marked.append(f"{thing} {found}" if thing == wanted else thing)
    question = rng.choice(
        (
            f"How many times is {wanted} in this list: {listed(things)}?",
            f"Count the word {wanted}: {listed(things)}.",
        )
    )
    return Problem("count things", f"{wanted} {listed(things)}", question, (listed(marked),), str(found))


def reverse(rng: Random) -> Problem:
    """A list backwards, or the letters of a word."""
    if rng.random() < 0.6:
        things = some(rng, WORDS + NAMES, rng.randrange(3, 8))
        question = rng.choice(
            (f"Reverse this list: {listed(things)}", f"Write this list from back to front: {listed(things)}")
        )
        numbered = listed([f"{i} {thing}" for i, thing in enumerate(things, 1)])
        answer = listed(reversed_ := things[::-1])
        steps = (numbered, listed([f"{len(things) - i} {thing}" for i, thing in enumerate(reversed_)]))
        return Problem("reverse", listed(things), question, steps, answer)
    word = rng.choice(WORDS)
    question = rng.choice((f"Spell {word} backwards.", f'Write the word "{word}" backwards, letter by letter.'))
    return Problem("reverse", word, question, (f"{word}: {listed(word)}",), listed(word[::-1]))


_RELATIONS = (
    ("taller", "tallest", "shorter", "shortest"),
    ("older", "oldest", "younger", "youngest"),
    ("faster", "fastest", "slower", "slowest"),
    ("heavier", "heaviest", "lighter", "lightest"),
)


def relations(rng: Random) -> Problem:
    """Who is first or last of three to five, from comparisons of neighbours in any order."""
    more, most, less, least = rng.choice(_RELATIONS)
    people = some(rng, NAMES, rng.randrange(3, 6))
    pairs = list(itertools.pairwise(people))
    rng.shuffle(pairs)
    told = [f"{a} is {more} than {b}." if rng.random() < 0.6 else f"{b} is {less} than {a}." for a, b in pairs]
    top = rng.random() < 0.5
    question = f"{' '.join(told)} Who is the {most if top else least}?"
    steps = [f"{a} > {b}" for a, b in pairs] + [" > ".join(people)]
    key = f"{more} {sorted(pairs)} {top}"
    return Problem("relations", key, question, tuple(steps), people[0] if top else people[-1])
