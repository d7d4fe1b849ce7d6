"""Short texts of four domains that people rated, from a Python package under the MIT licence.

Snippets of product reviews, film reviews and newspaper editorials, and tweets, each with the mean
of twenty ratings from -4 to 4. Source: Hutto, Gilbert 2014, *VADER: A Parsimonious Rule-based Model
for Sentiment Analysis of Social Media Text*; the files lie in the source archive of
``vaderSentiment``. The archive is known by its hash before pip so much as unpacks it.
"""

from __future__ import annotations

import io
import json
import random
import tarfile
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from metakd.demo.packages import download, sha256
from metakd.errors import DataError

_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
_PACKAGE = f"vaderSentiment==3.3.2 --hash=sha256:{_SHA256}"
_INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_FILES = {
    "electronics": "amazonReviewSnippets_GroundTruth.txt",
    "films": "movieReviewSnippets_GroundTruth.txt",
    "news": "nytEditorialSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
}
DOMAINS = tuple(_FILES)
_CLEAR = 0.8  # ratings at least so far from 0 become labels
_TEST, _VALIDATION = 0.25, 0.1
SPLITS = ("train", "validation", "test", "unlabelled")
Most = int | Mapping[str, int] | None


class _Rated(NamedTuple):
    """A text, and the article, film or product that it is from."""

    group: str
    rating: float
    text: str


def rated_corpus(
    folder: str | Path,
    *,
    train: Most = None,
    validation: Most = None,
    test: Most = None,
    unlabelled: Most = None,
    seed: int = 0,
) -> Path:
    """Writes ``train.jsonl``, ``validation.jsonl``, ``test.jsonl`` and ``unlabelled.jsonl``.

    Columns ``text``, ``domain`` and, but for the last, ``label``: positive where the mean rating is
    at least 0.8, negative where it is at most -0.8; what lies between is unlabelled, and left out
    of the test and validation parts. No article, film or product is in two of train, validation and
    test (10 and 25 % of the texts), and no text comes twice.

    Args:
        folder: made if it does not exist; existing files of these names are replaced.
        train: at most so many examples of each domain, drawn at random, or by domain, with none
            of a domain that is not named; by default all. ``validation``, ``test`` and
            ``unlabelled`` likewise.
        seed: of the parts and of what is drawn.

    Returns:
        The folder.

    Raises:
        OSError: the package could not be fetched.
        DataError: the archive is another than the known one.
    """
    with tempfile.TemporaryDirectory() as temporary:
        options = ["--no-binary", ":all:", "--require-hashes"]
        archive = download(_PACKAGE, Path(temporary), options).read_bytes()
    if (found := sha256(archive)) != _SHA256:
        raise DataError(
            f"vaderSentiment's archive has SHA-256 {found}, expected {_SHA256}",
            "The package index gave another archive than the known one: do not use it.",
        )
    rows: dict[str, list[dict[str, str]]] = {name: [] for name in SPLITS}
    for domain, texts in _read(archive).items():
        parts = _split(texts, domain, random.Random(f"{seed} {domain}"))
        for name, most in zip(SPLITS, (train, validation, test, unlabelled), strict=True):
            most = most.get(domain, 0) if isinstance(most, Mapping) else most
            rows[name] += parts[name][:most]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in rows.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def _read(archive: bytes) -> dict[str, list[_Rated]]:
    """Texts of each domain; files are read and never written, wherever their names would lead."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as outer:
        inner = outer.extractfile(_INNER).read()
    with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
        members = {Path(member.name).name: member for member in tar.getmembers() if member.isfile()}
        return {
            domain: list(_rated(tar.extractfile(members[name]).read().decode("utf-8")))
            for domain, name in _FILES.items()
        }


def _rated(content: str) -> Iterable[_Rated]:
    seen: set[str] = set()
    for line in filter(None, content.split("\n")):
        key, rating, text = line.split("\t", 2)
        text = " ".join(text.split())
        if text and text not in seen:
            seen.add(text)
            yield _Rated(key.partition("_")[0], float(rating), text)


def _split(texts: list[_Rated], domain: str, rng: random.Random) -> dict[str, list[dict[str, str]]]:
    groups: dict[str, list[_Rated]] = {}
    for rated in texts:
        groups.setdefault(rated.group, []).append(rated)
    order = sorted(groups)
    rng.shuffle(order)
    parts: dict[str, list[dict[str, str]]] = {name: [] for name in SPLITS}
    gone = 0
    for group in order:
        part = "train"
        if gone < (_TEST + _VALIDATION) * len(texts):
            part = "test" if gone < _TEST * len(texts) else "validation"
        gone += len(groups[group])
        for rated in groups[group]:
            row = {"text": rated.text, "domain": domain}
            if abs(rated.rating) >= _CLEAR:
                label = "positive" if rated.rating > 0 else "negative"
                parts[part].append({**row, "label": label})
            elif part == "train":
                parts["unlabelled"].append(row)
    for part in parts.values():
        rng.shuffle(part)
    return parts
