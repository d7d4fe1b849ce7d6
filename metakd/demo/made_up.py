"""A corpus made up on the spot, for machines that reach no package index.

Reviews of four kinds of things. Part of what tells good from bad is shared by the domains
("excellent"), part belongs to one ("rusty"), and some words turn round between domains (a light
rucksack is good, a light plot is not).
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple


class _Domain(NamedTuple):
    """Words of one domain. ``good`` and ``bad`` say nothing, or the opposite, in other domains."""

    things: list[str]
    aspects: list[str]
    good: list[str]
    bad: list[str]
    fillers: list[str]


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


_SHARED_GOOD = _words(
    "excellent, wonderful, superb, delightful, great, brilliant, impressive, lovely, outstanding, "
    "perfect, splendid, terrific, fantastic, amazing, pleasing, marvellous, first rate, top notch, "
    "exceptional, satisfying, charming, a real joy, worth every penny, better than expected"
)
_SHARED_BAD = _words(
    "disappointing, awful, terrible, dreadful, poor, horrible, useless, annoying, mediocre, "
    "pathetic, miserable, lousy, unacceptable, frustrating, inferior, shoddy, second rate, a mess, "
    "appalling, regrettable, a waste of money, a real letdown, not worth it, worse than expected"
)
_DOMAINS = {
    "kitchen": _Domain(
        _words(
            "knife, frying pan, kettle, mixer, toaster, saucepan, peeler, grater, cutting board"
        ),
        _words("blade, handle, lid, coating, motor, finish, base, spout, grip"),
        _words(
            "sharp, heavy, solid, nonstick, even, quiet, spotless, sturdy, hot, stainless, simple"
        ),
        _words(
            "blunt, light, rusty, sticky, wobbly, loud, greasy, scratched, leaky, slow, complex"
        ),
        [
            "I cook for five people on most evenings",
            "It replaced one that my grandmother gave me",
            "We use it for soup and for bread",
            "It sits next to the sink",
            "The box also held a booklet with recipes",
        ],
    ),
    "novels": _Domain(
        _words(
            "novel, thriller, saga, mystery, romance, first volume, short story, sequel, memoir"
        ),
        _words("plot, heroine, ending, dialogue, prose, narrator, opening, villain, middle part"),
        _words(
            "gripping, moving, complex, witty, vivid, slow, dark, sharp, surprising, rich, deep"
        ),
        _words(
            "flat, predictable, light, wooden, simple, tedious, shallow, fast, clumsy, dry, stable"
        ),
        [
            "I read it on the train to work",
            "My sister borrowed my copy for a week",
            "It has about three hundred pages",
            "The author grew up in a small town",
            "Our book club met on Thursday to talk about it",
        ],
    ),
    "hiking": _Domain(
        _words("rucksack, tent, jacket, pair of boots, sleeping bag, stove, lantern, walking pole"),
        _words("fabric, zip, strap, sole, lining, buckle, hood, pole, pocket"),
        _words("light, waterproof, warm, flat, dry, tough, fast, snug, breathable, compact, rich"),
        _words("heavy, soaked, cold, torn, sharp, bulky, slow, itchy, slippery, flimsy, hot"),
        [
            "We walked along the ridge for two days",
            "I took it to the mountains in October",
            "There was fog on the second morning",
            "My friend carries the same one in blue",
            "The trail starts behind the old station",
        ],
    ),
    "software": _Domain(
        _words("editor, app, update, game, backup tool, photo program, calendar, plugin, driver"),
        _words("menu, installer, interface, search, sync, toolbar, export, help page, login"),
        _words(
            "fast, stable, predictable, simple, responsive, flat, clean, secure, light, free, dry"
        ),
        _words(
            "buggy, slow, bloated, complex, moving, laggy, cluttered, surprising, dark, heavy, deep"
        ),
        [
            "I installed it on my old laptop",
            "Our office has used it since spring",
            "It asked for an account at the start",
            "Version three came out last month",
            "I mostly open it in the evening",
        ],
    ),
}
_SHARED_TEMPLATES = (
    "this {thing} is {word}",
    "I found the whole thing {word}",
    "all in all it is {word}",
    "for me it was {word}",
    "my verdict on this {thing}: {word}",
)
_OWN_TEMPLATES = (
    "the {aspect} is {word}",
    "its {aspect} feels {word}",
    "the {aspect} turned out {word} and the rest is {other}",
    "what I noticed first was how {word} the {aspect} was",
)
_NEGATED_TEMPLATES = (
    "the {aspect} is not {opposite} at all",
    "nobody could call the {aspect} {opposite}",
)
_CONCESSIONS = (
    "even though the {aspect} is {opposite}, {verdict}",
    "some say it is {opposite_shared}, but {verdict}",
    "{verdict}, although its {aspect} is {opposite}",
)


def _review(domain: _Domain, positive: bool, rng: random.Random) -> str:
    """One to three opinions and up to two sentences that say nothing, in any order."""
    own, opposite = (domain.good, domain.bad) if positive else (domain.bad, domain.good)
    shared, opposite_shared = (
        (_SHARED_GOOD, _SHARED_BAD) if positive else (_SHARED_BAD, _SHARED_GOOD)
    )

    def fill(template: str, **more: str) -> str:
        return template.format(
            thing=rng.choice(domain.things),
            aspect=rng.choice(domain.aspects),
            opposite=rng.choice(opposite),
            opposite_shared=rng.choice(opposite_shared),
            **more,
        )

    def shared_opinion() -> str:
        return fill(rng.choice(_SHARED_TEMPLATES), word=rng.choice(shared))

    def own_opinion() -> str:
        word, other = rng.sample(own, 2)
        return fill(rng.choice(_OWN_TEMPLATES), word=word, other=other)

    def negated_opinion() -> str:
        return fill(rng.choice(_NEGATED_TEMPLATES))

    def concession() -> str:
        verdict = rng.choice((shared_opinion, own_opinion))()
        return fill(rng.choice(_CONCESSIONS), verdict=verdict)

    kinds = (shared_opinion, own_opinion, negated_opinion, concession)
    opinions = rng.choices(kinds, weights=(34, 42, 8, 16), k=rng.choice((1, 2, 2, 3)))
    sentences = [opinion() for opinion in opinions]
    sentences += rng.sample(domain.fillers, rng.choice((0, 1, 1, 2)))
    rng.shuffle(sentences)
    return " ".join(sentence[0].upper() + sentence[1:] + "." for sentence in sentences)


def _examples(sizes: dict[str, int], seed: int) -> dict[str, list[dict[str, str]]]:
    rng = random.Random(seed)
    splits: dict[str, list[dict[str, str]]] = {split: [] for split in sizes}
    for name, domain in _DOMAINS.items():
        seen: set[str] = set()
        for split, size in sizes.items():
            while size:
                positive = size % 2 == 0
                text = _review(domain, positive, rng)
                if text in seen:
                    continue
                seen.add(text)
                label = "positive" if positive else "negative"
                splits[split].append({"text": text, "label": label, "domain": name})
                size -= 1
    for rows in splits.values():
        rng.shuffle(rows)
    return splits


def made_up_texts(count: int, seed: int = 0) -> list[str]:
    """About ``count`` reviews of all domains, as in ``write_corpus``."""
    rows = _examples({"texts": -(-count // len(_DOMAINS))}, seed)["texts"]
    return [row["text"] for row in rows]


def write_corpus(
    folder: str | Path, *, seed: int = 0, train: int = 400, validation: int = 100, test: int = 200
) -> Path:
    """Writes ``train.jsonl``, ``validation.jsonl`` and ``test.jsonl`` with made-up reviews.

    Four domains and two labels, balanced; columns ``text``, ``label``, ``domain``; no text comes
    twice. Some reviews concede a point to the other side or negate a word, which word counts do not
    see.

    Args:
        folder: made if it does not exist; existing files of these names are replaced.
        seed: the same seed gives the same bytes.
        train: examples per domain, as ``validation`` and ``test``.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"train": train, "validation": validation, "test": test}
    for split, rows in _examples(sizes, seed).items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return folder
