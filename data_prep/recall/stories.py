"""The first three tasks of bAbI (Weston et al. 2015), told among the sentences of a book as in
BABILong (Kuratov et al. 2024), by a simulation of our own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from data_prep.recall.draws import Draws
from data_prep.recall.pair import Pair, hidden

_PERSONS = ("Mary", "John", "Daniel", "Sandra")
_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_THINGS = ("apple", "football", "milk")
_GOES = ("moved to", "went to", "travelled to", "journeyed to", "went back to")
_TAKES = ("grabbed", "got", "picked up", "took")
_DROPS = ("discarded", "dropped", "left", "put down")
_EVENTS = 10  # that a story has at least, where the question allows it
_INSTRUCTION = (
    "I will give you context with the facts about locations and actions of different persons "
    "hidden in some random text and a question. Answer the question based only on the facts."
)


@dataclass
class World:
    """Who is where and holds what, told in `facts`; `paths` are the places that a thing was at."""

    where: dict[str, str] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)
    paths: dict[str, list[str]] = field(default_factory=dict)
    facts: list[str] = field(default_factory=list)

    def go(self, person: str, verb: str, place: str) -> None:
        """A person moves, and what it holds with it."""
        self.where[person] = place
        for thing, holder in self.holder.items():
            if holder == person:
                self._seen(thing, place)
        self.facts.append(f"{person} {verb} the {place}.")

    def take(self, person: str, verb: str, thing: str) -> None:
        """A person takes a thing that nobody holds, where it stands."""
        self.holder[thing] = person
        self._seen(thing, self.where[person])
        self.facts.append(f"{person} {verb} the {thing} there.")

    def drop(self, person: str, verb: str, thing: str) -> None:
        """A person leaves a thing where it stands."""
        del self.holder[thing]
        self.facts.append(f"{person} {verb} the {thing} there.")

    def _seen(self, thing: str, place: str) -> None:
        path = self.paths.setdefault(thing, [])
        if not path or path[-1] != place:
            path.append(place)

    def takeable(self, person: str) -> list[str]:
        """Things that nobody holds and that were not seen elsewhere than where the person is."""
        place = self.where.get(person)
        return [
            thing
            for thing in _THINGS
            if place and thing not in self.holder and self.paths.get(thing, [place])[-1] == place
        ]

    def step(self, draws: Draws, with_things: bool) -> None:
        """Something happens: half of the time somebody moves, if things can be held at all."""
        person = draws.pick(_PERSONS)
        held = [thing for thing in _THINGS if self.holder.get(thing) == person]
        takeable = self.takeable(person)
        choice = draws.fraction() if with_things else 0.0
        if choice >= 0.5 and takeable and (choice < 0.85 or not held):
            self.take(person, draws.pick(_TAKES), draws.pick(takeable))
        elif choice >= 0.5 and held:
            self.drop(person, draws.pick(_DROPS), draws.pick(held))
        else:
            others = [place for place in _PLACES if place != self.where.get(person)]
            self.go(person, draws.pick(_GOES), draws.pick(others))


def one_fact(draws: Draws, filler: Sequence[str], depth: float | None) -> Pair:
    """Where somebody is (bAbI qa1)."""
    return _told(draws, filler, depth, False, _person_question)


def two_facts(draws: Draws, filler: Sequence[str], depth: float | None) -> Pair:
    """Where a thing is, that somebody took (qa2)."""
    return _told(draws, filler, depth, True, _thing_question)


def three_facts(draws: Draws, filler: Sequence[str], depth: float | None) -> Pair:
    """Where a thing was before it came to its last place (qa3)."""
    return _told(draws, filler, depth, True, _past_question)


def _told(
    draws: Draws,
    filler: Sequence[str],
    depth: float | None,
    with_things: bool,
    ask: Callable[[Draws, World], tuple[str, str] | None],
) -> Pair:
    """The facts keep their order; `depth` is that of the first, the others are drawn after it."""
    world = World()
    asked = None
    while asked is None or len(world.facts) < _EVENTS:
        world.step(draws, with_things)
        asked = ask(draws, world)
    question, answer = asked
    first = draws.fraction() if depth is None else depth
    later = sorted(first + (1 - first) * draws.fraction() for _ in world.facts[1:])
    text = hidden(list(zip([first, *later], world.facts, strict=True)), filler)
    return Pair(f"{_INSTRUCTION}\n{text}\nQuestion: {question}\nAnswer:", f" {answer}")


def _person_question(draws: Draws, world: World) -> tuple[str, str] | None:
    person = draws.pick(sorted(world.where))
    return f"Where is {person}?", world.where[person]


def _thing_question(draws: Draws, world: World) -> tuple[str, str] | None:
    moved = [thing for thing, path in sorted(world.paths.items()) if len(path) > 1]
    if not moved:
        return None
    thing = draws.pick(moved)
    return f"Where is the {thing}?", world.paths[thing][-1]


def _past_question(draws: Draws, world: World) -> tuple[str, str] | None:
    moved = [thing for thing, path in sorted(world.paths.items()) if len(path) > 2]
    if not moved:
        return None
    thing = draws.pick(moved)
    *_, before, last = world.paths[thing]
    return f"Where was the {thing} before the {last}?", before
