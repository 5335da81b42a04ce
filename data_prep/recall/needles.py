"""Tasks after RULER's definitions (Hsieh et al. 2024): needles, variable tracking, common words.

Prompts have RULER's wording. Keys are from our own lists and uncommon words from the filler,
since RULER takes its words from a package. Several answers are in the order of the text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from data_prep.recall.draws import Draws
from data_prep.recall.pair import Pair, hidden

_VALUE_DIGITS = 7
_VARIABLE_DIGITS = 5
_HOPS = 4
_COMMON = 10
_COMMON_TIMES, _UNCOMMON_TIMES = 30, 3

ADJECTIVES = re.findall(
    r"\w+",
    """
    ancient brave bright calm clever cold curious dark deep distant early eager fair faint fierce
    gentle glad golden grand grave green happy heavy hollow honest humble keen kind large late light
    lonely loud mild narrow noble odd old pale plain proud quick quiet rare rough sharp silent
    simple slow small soft solemn steady strange strong sudden sweet swift tall tame thin tired vast
    warm weary wide wild wise young
    """,
)
NOUNS = re.findall(
    r"\w+",
    """
    anchor apple arrow basket bell bird boat bonnet book bottle bridge brook candle carriage cat
    chair church clock cloud coat coin cottage crown cup door drum engine farm feather fence fire
    flower forest garden gate glove harbour hat hill horse house island jewel kettle key ladder lamp
    lantern leaf letter mill mirror mountain needle orchard oven path pearl pen picture pocket pond
    purse queen ribbon river road rose sail shell ship shoe spoon star stone table tower tree valley
    village wagon well wheel window
    """,
)


def needles(
    draws: Draws,
    filler: Sequence[str],
    depth: float | None,
    *,
    keys: int,
    values: int,
    queries: int,
) -> Pair:
    """Keys with `values` numbers each, of which `queries` keys are asked for (RULER's niah).

    `depth` is that of the first needle asked for; None, and that of all others: drawn.
    """
    adjectives, nouns = draws.sample(ADJECTIVES, keys), draws.sample(NOUNS, keys)
    names = [f"{adjective}-{noun}" for adjective, noun in zip(adjectives, nouns, strict=True)]
    found = [
        (draws.fraction(), name, draws.number(_VALUE_DIGITS))
        for name in names
        for _ in range(values)
    ]
    if depth is not None:
        found[0] = (depth, *found[0][1:])
    asked = names[:queries]
    facts = [
        (place, f"One of the special magic numbers for {name} is: {value}.")
        for place, name, value in found
    ]
    # Sorted by the place alone: of equal ones the first in the text.
    in_order = sorted(found, key=lambda item: item[0])
    answers = [value for _, name, value in in_order if name in asked]
    *others, last = asked
    query = f"{', '.join(others)}, and {last}" if others else last
    several = len(answers) > 1
    what = f"special magic number{'s' if several else ''} for {query} mentioned in the provided"
    return Pair(
        "Some special magic numbers are hidden within the following text. Make sure to memorize "
        "it. I will quiz you about the numbers afterwards.\n"
        f"{hidden(facts, filler)}\n"
        f"What {'are all the' if several else 'is the'} {what} text? "
        f"The {what} text {'are' if several else 'is'}",
        f" {', '.join(answers)}",
    )


def variable_tracking(draws: Draws, filler: Sequence[str], depth: float | None) -> Pair:
    """All variables that have a value through a chain of assignments (RULER's vt, one chain).

    `depth` is that of the first assignment; None, and that of all others: drawn.
    """
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    names: list[str] = []
    while len(names) <= _HOPS:
        name = "".join(draws.pick(letters) for _ in range(5))
        names += [] if name in names else [name]
    value = draws.number(_VARIABLE_DIGITS)
    # In the order of the chain, so that it can be read from its start to its end.
    places = draws.depths(depth, len(names))
    sources = [value, *(f"VAR {name}" for name in names)]
    facts = [
        (place, f"VAR {name} = {source}.")
        for place, name, source in zip(places, names, sources, strict=False)
    ]
    return Pair(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        f"{hidden(facts, filler)}\n"
        f"Question: Find all variables that are assigned the value {value} in the text above. "
        "Answer: According to the chain(s) of variable assignment in the text above, "
        f"{len(names)} variables are assigned the value {value}, they are:",
        f" {' '.join(names)}",
    )


def common_words(draws: Draws, filler: Sequence[str], depth: float | None) -> Pair:
    """The ten words that a list has thirty times, where it has all others three times (cwe).

    Every piece of filler adds one word that is not in the list yet, if it has one. There are no
    depths: the list is shuffled.
    """
    common = draws.sample(NOUNS, _COMMON)
    times = Counter(dict.fromkeys(common, _COMMON_TIMES))
    for piece in filler:
        words = re.findall(r"[a-z]{4,}", piece)
        new = next((word for word in words if word not in times and word not in NOUNS), None)
        if new is not None:
            times[new] = _UNCOMMON_TIMES
    listed = draws.sample(list(times.elements()), times.total())
    numbered = " ".join(f"{number}. {word}" for number, word in enumerate(listed, 1))
    # In the order of the list, like all answers of several parts.
    found = [word for word in dict.fromkeys(listed) if word in common]
    return Pair(
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
        f"{numbered}\n"
        f"Question: What are the {_COMMON} most common words in the above list? Answer: The top "
        f"{_COMMON} words that appear most often in the list are:",
        f" {', '.join(found)}",
    )
