"""Rows of text that are made by a seed: tagged words, answers, topics, scores, numbers to write out, questions."""

from collections.abc import Iterator
from random import Random
from typing import Any

FIRST = ["Ana", "Ben", "Carla", "David", "Elif", "Femi", "Greta", "Hugo", "Ines", "Jan"]
LAST = ["Adler", "Berg", "Costa", "Diaz", "Evans", "Fischer", "Garcia", "Haas"]
TOWNS = ["Oslo", "Lima", "Kyoto", "Cairo", "Porto", "Turin", "Quito", "Riga"]
HILLS = ("New York", "Cape Town", "San Juan", "Novi Sad")
FIRMS = ["Acme", "Globex", "Initech", "Umbra"]
KINDS = ["Bank", "Works", "Press", "Air"]
THINGS = ["coins", "books", "keys", "lamps", "stamps", "maps", "bells", "cups"]
ROOMS = ("the cellar", "the attic", "the red box", "the kitchen", "the old shed", "the green drawer")
SENTENCES = (
    "{PER} moved from {LOC} to {LOC} .",
    "{ORG} opened an office in {LOC} last year .",
    "last week {PER} left {ORG} .",
    "{PER} and {PER} met in {LOC} .",
    "the shares of {ORG} fell after {PER} spoke .",
    "nobody at {ORG} knew {PER} .",
)
TOPICS = {
    "sport": ("the match ended late", "our team won the cup", "she ran ten miles"),
    "food": ("the soup was too hot", "we baked fresh bread", "he cooked rice and beans"),
    "money": ("the bank raised its rates", "prices fell again", "they paid the bill"),
    "weather": ("it rained all day", "the wind was cold", "snow fell in the hills"),
}
GOOD = ("the room was clean", "the staff was kind", "the bed was soft", "the view was great")
BAD = ("the room was dirty", "the staff was rude", "the bed was hard", "the view was poor")
ONES = "zero one two three four five six seven eight nine ten eleven twelve"
ONES += " thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"

Rows = Iterator[dict[str, Any]]


def tags(draw: Random) -> Rows:
    """Sentences in words, each with its tag (IOB) for persons, places and firms."""
    while True:
        tokens, found = [], []
        for word in draw.choice(SENTENCES).split():
            name = _name(word.strip("{}"), draw) if word.startswith("{") else [word]
            tokens += name
            found += (
                [f"{'I' if i else 'B'}-{word.strip('{}')}" for i in range(len(name))] if word.startswith("{") else ["O"]
            )
        yield {"tokens": tokens, "tags": found}


def _name(kind: str, draw: Random) -> list[str]:
    if kind == "PER":
        return [draw.choice(FIRST), draw.choice(LAST)][: draw.randint(1, 2)]
    if kind == "ORG":
        return [draw.choice(FIRMS), draw.choice(KINDS)][: draw.randint(1, 2)]
    return draw.choice([*TOWNS, *HILLS]).split()


def sentences(draw: Random) -> Rows:
    """The same sentences as text."""
    for row in tags(draw):
        yield {"text": " ".join(row["tokens"])}


def answers(draw: Random) -> Rows:
    """Facts, a question about one of them, and where its answer stands."""
    while True:
        people = draw.sample(FIRST, draw.randint(2, 8))
        facts = [(p, str(draw.randint(2, 99)), draw.choice(THINGS), draw.choice(ROOMS)) for p in people]
        texts = ["{} keeps {} {} in {} .".format(*fact) for fact in facts]
        person, number, thing, room = facts[(i := draw.randrange(len(facts)))]
        where = draw.random() < 0.5
        question, answer = (
            (f"where does {person} keep {thing} ?", room)
            if where
            else (f"how many {thing} does {person} keep ?", number)
        )
        context = " ".join(texts)
        start = context.index(answer, sum(len(text) + 1 for text in texts[:i]) + len(person))
        yield {"question": question, "context": context, "answers": {"text": [answer], "answer_start": [start]}}


def pairs(draw: Random) -> Rows:
    """A question, and the sentence that answers it."""
    for row in answers(draw):
        start = row["answers"]["answer_start"][0]
        fact = row["context"][: row["context"].index(" .", start)].rpartition(" . ")[2]
        yield {"anchor": row["question"], "positive": f"{fact} ."}


def topics(draw: Random) -> Rows:
    """Sentences on some topics at once, and which."""
    while True:
        found = sorted(draw.sample(sorted(TOPICS), draw.randint(1, 3)))
        yield {"text": " and ".join(draw.choice(TOPICS[name]) for name in found), "label": found}


def scores(draw: Random) -> Rows:
    """Reviews of good and bad clauses, and a score from 0.5 to 5.5: 3, and half a point more or less for each clause."""
    while True:
        said = [(draw.choice(GOOD), 0.5) if draw.random() < 0.5 else (draw.choice(BAD), -0.5) for _ in range(5)]
        said = said[: draw.randint(1, 5)]
        yield {"text": " , ".join(text for text, _ in said), "label": 3.0 + sum(points for _, points in said)}


def numbers(draw: Random) -> Rows:
    """Numbers below a thousand in words, and in digits, one by one."""
    while True:
        number = draw.randint(0, 999)
        yield {"source": _spelled(number), "target": " ".join(str(number))}


def _spelled(number: int) -> str:
    ones, tens = ONES.split(), TENS.split()
    if number < 20:
        return ones[number]
    if number < 100:
        return tens[number // 10 - 2] + (f" {ones[number % 10]}" if number % 10 else "")
    rest = f" and {_spelled(number % 100)}" if number % 100 else ""
    return f"{ones[number // 100]} hundred{rest}"


ROWS = {
    "tags": tags, "sentences": sentences, "answers": answers, "pairs": pairs, "topics": topics, "scores": scores,
    "numbers": numbers,
}  # fmt: skip


def vocabulary() -> list[str]:
    """Every word that such rows hold."""
    draw, found = Random(0), {*ONES.split(), *TENS.split(), "hundred", *map(str, range(10))}
    for text in (*FIRST, *LAST, *TOWNS, *HILLS, *FIRMS, *KINDS, *THINGS, *ROOMS, *SENTENCES, *GOOD, *BAD):
        found |= set(text.split())
    for phrases in TOPICS.values():
        found |= {word for phrase in phrases for word in phrase.split()}
    for make in (answers, numbers):
        rows = make(draw)
        found |= {word for _ in range(200) for value in next(rows).values() for word in str(value).split()}
    return sorted(word for word in found if word.isalnum() or word in ".,?")
