"""Small stories of people who carry objects between places, and a question about one of them.

After the questions of bAbI (Weston et al. 2015, arXiv:1502.05698), with the steps shown: what bears on the answer, in
the order of the story.
"""

from __future__ import annotations

from random import Random

from recipes.nano.problems import Problem, some
from recipes.nano.words import NAMES, OBJECTS, PLACES


class _World:
    """Who and what is where. `trail` holds, for each person and object, the steps that brought it where it is."""

    def __init__(self, rng: Random) -> None:
        self.people = some(rng, NAMES, rng.randrange(2, 4))
        self.objects = some(rng, OBJECTS, rng.randrange(1, 3))
        self.places = some(rng, PLACES, rng.randrange(3, 5))
        self.where = {person: rng.choice(self.places) for person in self.people}
        self.lies: dict[str, str | None] = {thing: rng.choice(self.places) for thing in self.objects}
        self.held: dict[str, str | None] = dict.fromkeys(self.objects)
        self.trail: dict[str, list[str]] = {}
        self.sentences: list[str] = []
        for person in self.people:
            self.sentences.append(f"{person} is in the {self.where[person]}.")
            self.trail[person] = [f"{person}: {self.where[person]}"]
        for thing in self.objects:
            self.sentences.append(f"The {thing} is in the {self.lies[thing]}.")
            self.trail[thing] = [f"{thing}: {self.lies[thing]}"]
        rng.shuffle(self.sentences)

    def step(self, rng: Random) -> None:
        """Let something happen that can."""
        person = rng.choice(self.people)
        here = self.where[person]
        near = [thing for thing in self.objects if self.lies[thing] == here]
        held = [thing for thing in self.objects if self.held[thing] == person]
        company = [other for other in self.people if other != person and self.where[other] == here]
        options = ["go"] + ["take"] * 3 * bool(near) + ["drop"] * bool(held) + ["give"] * 2 * bool(held and company)
        action = rng.choice(options)
        if action == "go":
            to = rng.choice([place for place in self.places if place != here])
            self.where[person] = to
            self.sentences.append(f"{person} {rng.choice(('goes', 'walks', 'moves'))} to the {to}.")
            self.trail[person] = [f"{person}: {to}"]
            for thing in held:
                self.trail[thing].append(f"{person} goes to {to}")
        elif action == "take":
            thing = rng.choice(near)
            self.lies[thing], self.held[thing] = None, person
            self.sentences.append(f"{person} {rng.choice(('takes', 'picks up', 'gets'))} the {thing}.")
            self.trail[thing] = [f"{person} takes {thing} in {here}"]
        elif action == "drop":
            thing = rng.choice(held)
            self.lies[thing], self.held[thing] = here, None
            self.sentences.append(f"{person} {rng.choice(('drops', 'puts down', 'leaves'))} the {thing}.")
            self.trail[thing] = [f"{person} drops {thing} in {here}"]
        else:
            thing, other = rng.choice(held), rng.choice(company)
            self.held[thing] = other
            self.sentences.append(f"{person} gives the {thing} to {other}.")
            self.trail[thing] = [f"{other} has {thing} in {here}"]


def story(rng: Random) -> Problem:
    """Where somebody or something is, or who has it."""
    world = _World(rng)
    for _ in range(rng.randrange(3, 8)):
        world.step(rng)
    thing = rng.choice(world.objects)
    holder = world.held[thing]
    kind = rng.choice(("where", "where", "where", "who", "person"))
    if kind == "person":
        person = rng.choice(world.people)
        asked, steps, answer = f"Where is {person}?", world.trail[person], world.where[person]
    elif kind == "who":
        asked, answer = f"Who has the {thing}?", holder or "nobody"
        steps = [*world.trail[thing][:1], f"{answer} has {thing}"]
    else:
        place = world.where[holder] if holder else world.lies[thing]
        asked, answer = f"Where is the {thing}?", str(place)
        steps = [*world.trail[thing], f"{thing}: {answer}"]
    told = " ".join(world.sentences)
    return Problem("story", f"{told} {asked}", f"{told} {asked}", tuple(dict.fromkeys(steps)), answer)
