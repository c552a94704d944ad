"""Short stories with controlled attributes, written by a grammar and a seed.

The quickstart needs text that may be shipped with the repository and in which one concept, the
mood, can be switched while everything else stays as it is. The idea is that of the SimpleStories
data set (controlled attributes, plain words); the grammar in `stories.toml` is this repository's
own. The mood is drawn first and independently of every other attribute, and the two moods have
the same sections, so that a difference of class means measures the mood and little else.
"""

import random
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

MOODS = ("happy", "sad")
_GRAMMAR = Path(__file__).with_name("stories.toml")
_SLOT = re.compile(r"\{([A-Za-z_0-9]+)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")


@dataclass(frozen=True, slots=True)
class Story:
    """One story and the attributes that it was written from."""

    text: str
    mood: str
    hero: str
    place: str
    animal: str
    weather: str
    problem: str
    ending: str


@cache
def grammar() -> dict:
    """The tables of `stories.toml`."""
    return tomllib.loads(_GRAMMAR.read_text(encoding="utf-8"))


def mood_words(mood: str) -> frozenset[str]:
    """Every word that occurs in stories of this mood only, in lower case."""
    return frozenset(word for group in grammar()["words"][mood].values() for word in group)


def mood_score(text: str) -> int:
    """The number of happy words in a text minus the number of sad ones."""
    words = re.findall(r"[a-z]+", text.lower())
    happy, sad = mood_words("happy"), mood_words("sad")
    return sum(word in happy for word in words) - sum(word in sad for word in words)


def _attributes(rng: random.Random) -> dict[str, str]:
    """Everything about a story that stays the same from its first sentence to its last."""
    tables = grammar()
    free = tables["attributes"]
    # Half of the heroes are children; the other kinds share the rest.
    kinds = sorted(free["hero"])
    kind = rng.choices(kinds, weights=[4 if k in ("girl", "boy") else 1 for k in kinds])[0]
    feminine = kind in tables["feminine"]["kinds"]
    place = rng.choice(sorted(tables["places"]))
    detail, detail2 = rng.sample(tables["places"][place], 2)
    animal = rng.choice(sorted(tables["animals"]))
    time = rng.choice(free["time"])
    return {
        "kind": kind,
        "hero": rng.choice(free["hero"][kind]),
        "they": "she" if feminine else "he",
        "them": "her" if feminine else "him",
        "their": "her" if feminine else "his",
        "place": place,
        "detail": detail,
        "detail2": detail2,
        "animal": animal,
        "feature": rng.choice(tables["animals"][animal]),
        "object": rng.choice(tables["objects"]["names"]),
        "time": time,
        "time_of_day": "noon" if time == "day" else time,
        "size2": rng.choice(("small", "big", "old", "young")),
        **{
            name: rng.choice(free[name]) for name in ("colour", "trait", "helper", "size", "number")
        },
    }


def _fill(template: str, attributes: dict[str, str], mood: str, rng: random.Random) -> str:
    """A sentence of the grammar with its slots filled. Mood words are drawn anew at each slot."""
    words = grammar()["words"][mood]

    def word(match: re.Match[str]) -> str:
        slot = match.group(1)
        name = slot.lower()
        text = attributes[name] if name in attributes else rng.choice(words[name])
        return text if slot == name else text[0].upper() + text[1:]

    text = _ARTICLE.sub(r"\1n ", _SLOT.sub(word, template))
    return text[0].upper() + text[1:]


def _plan(mood: str, weather: str, problem: str, ending: str, rng: random.Random) -> list[str]:
    """The templates of one story in their order."""
    tables = grammar()
    neutral, coloured = tables["neutral"], tables[mood]

    def maybe(chance: float, pool: list[str]) -> list[str]:
        return [rng.choice(pool)] if rng.random() < chance else []

    first = neutral["opening"] if rng.random() < 0.75 else coloured["opening"]
    scene = [
        *maybe(0.4, neutral["scenery"]),
        *maybe(0.7, coloured["weather"][weather]),
        *maybe(0.9, coloured["mood"]),
    ]
    rng.shuffle(scene)
    templates = [
        rng.choice(first),
        *maybe(0.5, neutral["weather"][weather]),
        *scene,
        *maybe(0.3, [line for line in coloured["mood"] if line not in scene]),
        rng.choice(neutral["meeting"]),
        rng.choice(coloured["greeting"]),
        rng.choice(tables["problems"][problem]),
        rng.choice(coloured["reaction"]),
        *maybe(0.5, neutral["walk"]),
        rng.choice(coloured["outcome"][problem]),
        *maybe(0.6, coloured["after"]),
        rng.choice(coloured["ending"][ending]),
    ]
    if "{object}" not in templates[0] and any("{object}" in line for line in templates):
        templates.insert(1, rng.choice(neutral["object"]))
    return templates


def write_story(rng: random.Random, mood: str | None = None) -> Story:
    """One story. All randomness comes from `rng`; the mood is drawn when it is not given."""
    tables = grammar()
    drawn = rng.choice(MOODS)
    mood = drawn if mood is None else mood
    attributes = _attributes(rng)
    weather = rng.choice(sorted(tables["happy"]["weather"]))
    problem = rng.choice(sorted(tables["problems"]))
    ending = rng.choice(sorted(tables["happy"]["ending"]))
    templates = _plan(mood, weather, problem, ending, rng)
    text = " ".join(_fill(template, attributes, mood, rng) for template in templates)
    return Story(
        text=text,
        mood=mood,
        hero=attributes["hero"],
        place=attributes["place"],
        animal=attributes["animal"],
        weather=weather,
        problem=problem,
        ending=ending,
    )


def write_stories(seed: int, count: int) -> list[Story]:
    """`count` stories, alternately happy and sad, the same ones for the same seed."""
    rng = random.Random(seed)
    return [write_story(rng, MOODS[index % 2]) for index in range(count)]


def write_prompts(seed: int, count: int) -> list[str]:
    """`count` different beginnings of stories that say nothing of the mood: opening and weather."""
    rng = random.Random(seed)
    neutral = grammar()["neutral"]
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        weather = neutral["weather"][rng.choice(sorted(neutral["weather"]))]
        templates = (rng.choice(neutral["opening"]), rng.choice(weather))
        attributes = _attributes(rng)
        # The mood is never asked for: neutral sentences hold no slot that it would fill.
        prompts[" ".join(_fill(line, attributes, MOODS[0], rng) for line in templates)] = None
    return list(prompts)
