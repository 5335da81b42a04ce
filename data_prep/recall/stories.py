"""The first three tasks of bAbI (Weston et al. 2015) by our own simulation, hidden among the
sentences of a book as in BABILong (Kuratov et al. 2024).
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
_EVENTS = 10  # at least, in a story
_INSTRUCTION = (
    "I will give you context with the facts about locations and actions of different persons "
    "hidden in some random text and a question. Answer the question based only on the facts."
)


@dataclass
class World:
    """Who is where and holds what, as sentences in `facts`; `paths` are the places of a thing."""

    where: dict[str, str] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)
    paths: dict[str, list[str]] = field(default_factory=dict)
    facts: list[str] = field(default_factory=list)

    def go(self, person: str, verb: str, place: str) -> None:
        """A person moves, with everything that it holds."""
        self.where[person] = place
        for thing, holder in self.holder.items():
            if holder == person:
                self._seen(thing, place)
        self.facts.append(f"{person} {verb} the {place}.")

    def take(self, person: str, verb: str, thing: str) -> None:
        """A person takes a thing that nobody holds, at the place of the person."""
        self.holder[thing] = person
        self._seen(thing, self.where[person])
        self.facts.append(f"{person} {verb} the {thing} there.")

    def drop(self, person: str, verb: str, thing: str) -> None:
        """A person leaves a thing at the place of the person."""
        del self.holder[thing]
        self.facts.append(f"{person} {verb} the {thing} there.")

    def _seen(self, thing: str, place: str) -> None:
        path = self.paths.setdefault(thing, [])
        if not path or path[-1] != place:
            path.append(place)

    def takeable(self, person: str) -> list[str]:
        """Things that nobody holds and that were last seen where the person is, or not yet."""
        place = self.where.get(person)
        return [
            thing
            for thing in _THINGS
            if place and thing not in self.holder and self.paths.get(thing, [place])[-1] == place
        ]

    def step(self, draws: Draws, with_things: bool) -> None:
        """A random event: a move or, half of the time, taking or dropping a thing, if possible."""
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


def story(
    draws: Draws,
    filler: Sequence[str],
    depth: float | None,
    *,
    with_things: bool,
    ask: Callable[[Draws, World], tuple[str, str] | None],
) -> Pair:
    """Events until `ask` finds a question; `depth` is that of the first fact (None: drawn)."""
    world = World()
    asked = None
    while asked is None or len(world.facts) < _EVENTS:
        world.step(draws, with_things)
        asked = ask(draws, world)
    question, answer = asked
    depths = draws.depths(depth, len(world.facts))
    text = hidden(list(zip(depths, world.facts, strict=True)), filler)
    return Pair(f"{_INSTRUCTION}\n{text}\nQuestion: {question}\nAnswer:", f" {answer}")


def person_question(draws: Draws, world: World) -> tuple[str, str]:
    """Where somebody is, and the answer."""
    person = draws.pick(sorted(world.where))
    return f"Where is {person}?", world.where[person]


def thing_question(draws: Draws, world: World) -> tuple[str, str] | None:
    """Where a thing is that was moved, and the answer; None where there is no such thing."""
    if moved := _moved(draws, world, 2):
        return f"Where is the {moved[0]}?", moved[-1]
    return None


def past_question(draws: Draws, world: World) -> tuple[str, str] | None:
    """Where a thing was before its last place, and the answer; None where none was moved twice."""
    if moved := _moved(draws, world, 3):
        thing, *_, before, last = moved
        return f"Where was the {thing} before the {last}?", before
    return None


def _moved(draws: Draws, world: World, places: int) -> list[str]:
    """A drawn thing with at least `places` places, and these; empty where there is none."""
    moved = [[thing, *path] for thing, path in sorted(world.paths.items()) if len(path) >= places]
    return draws.pick(moved) if moved else []
