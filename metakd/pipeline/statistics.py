"""How sure a comparison is: intervals of paired differences, and how many labels a method is worth.

Everything is a bootstrap over seeds, drawn anew together for all domains, and test examples, drawn
anew within each domain. Two methods are compared on the same draws, so that an example that is hard
for both tells nothing. What was the same for all seeds (the split, and without ``--labels`` the
labelled examples) is taken as given, and with few seeds an interval is somewhat too narrow: three
of them spread less than what they were drawn from.

Sizes: S seeds, N test examples of a domain, R draws.

Source: Efron, Tibshirani 1993, chapters 8 and 13.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

DRAWS = 2000
_SEED = 20210117

Answers = Mapping[str, Mapping[int, str]]
"""Domain -> seed -> a ``1`` or a ``0`` for each test example, whether it was answered right."""


class Interval(NamedTuple):
    """A value, and between what 95 of 100 draws lie."""

    value: float
    low: float
    high: float


# Each is drawn once: that takes longer than using it, and pairs need the same draws.
@cache
def _seed_draws(seeds: int) -> np.ndarray:
    """[R, S], shares of the seeds in each draw."""
    return _drawn(seeds, [_SEED])


@cache
def _example_draws(domain: str, size: int) -> np.ndarray:
    """[R, N], shares of a domain's test examples in each draw."""
    return _drawn(size, [_SEED, *domain.encode()])


def _drawn(size: int, entropy: list[int]) -> np.ndarray:
    generator = np.random.default_rng(entropy)
    counts = generator.multinomial(size, [1 / size] * size, DRAWS)
    return counts.astype(np.float32) / size


def _means(answers: Answers, domain: str) -> tuple[float, np.ndarray]:
    """Accuracy in percent on a domain, as it is and [R] in each draw."""
    right = 100.0 * _matrix(answers[domain])  # [S, N]
    drawn = _example_draws(domain, right.shape[1]) @ right.T  # [R, S]
    return float(right.mean()), (drawn * _seed_draws(len(right))).sum(1)


def _matrix(by_seed: Mapping[int, str]) -> np.ndarray:
    return np.array([[mark == "1" for mark in by_seed[seed]] for seed in sorted(by_seed)], float)


def _shared(sides: Sequence[Answers]) -> list[Answers] | None:
    """The answers of all sides on the domains, and with the seeds, that they have in common; None
    where that is nothing, or a domain's examples are not the same."""
    domains = [name for name in sides[0] if all(name in side for side in sides)]
    by_seed = [side[name].keys() for side in sides for name in domains]
    seeds = set.intersection(*map(set, by_seed)) if by_seed else set()
    kept = [{name: {s: side[name][s] for s in seeds} for name in domains} for side in sides]
    lengths = [{len(right) for side in kept for right in side[name].values()} for name in domains]
    return kept if seeds and all(len(found) == 1 for found in lengths) else None


def accuracy_difference(answers: Answers, base: Answers) -> Interval | None:
    """How many points of accuracy a method has over another: the mean over their common domains,
    with their common seeds.

    Returns:
        None where they have none in common, or not the same examples.
    """
    shared = _shared([answers, base])
    if shared is None:
        return None
    mine, other = ([_means(side, name) for name in side] for side in shared)
    value = float(np.mean([own[0] - base[0] for own, base in zip(mine, other, strict=True)]))
    drawn = [own[1] - base[1] for own, base in zip(mine, other, strict=True)]
    return _interval(value, np.mean(drawn, axis=0))


def _interval(value: float, drawn: np.ndarray) -> Interval:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def labels_to_reach(counts: Sequence[float], curve: Sequence[float], accuracy: float) -> float:
    """How many labels a curve of accuracy over labels needs to reach an accuracy: linear in the
    logarithm between its points. How few are enough for less than its first point nobody knows,
    which is 0; what it never reaches takes infinitely many.

    Args:
        counts: labels at each point, growing.
        curve: accuracy at each point.
        accuracy: to reach.
    """
    before: tuple[float, float] | None = None
    for count, reached in zip(counts, curve, strict=True):
        if reached >= accuracy:
            if before is None:
                return count if reached == accuracy else 0.0
            share = (accuracy - before[1]) / (reached - before[1])
            return math.exp(math.log(before[0]) + share * math.log(count / before[0]))
        before = (count, reached)
    return math.inf


def label_efficiency(
    counts: Sequence[float], curves: Sequence[Answers], answers: Answers, labels: float
) -> Interval | None:
    """How many times the labels a method needs to reach what another reaches with some.

    Args:
        counts: labels at each point of the first, the mean over domains.
        curves: its answers at each.
        answers: the other's.
        labels: that the other has.

    Returns:
        A factor, 0 and infinite as ``labels_to_reach`` says; None where a domain, or every
        seed, is missing from the curve, or the examples are not the same.
    """
    shared = _shared([answers, *curves])
    if shared is None or shared[0].keys() != answers.keys():
        return None
    found = [[_means(side, name) for name in side] for side in shared]
    values = [float(np.mean([value for value, _ in side])) for side in found]
    drawn = [np.mean([row for _, row in side], axis=0) for side in found]
    factors = [
        labels_to_reach(counts, curve, target) / labels
        for target, *curve in zip(*drawn, strict=True)
    ]
    value = labels_to_reach(counts, values[1:], values[0]) / labels
    # Infinities have no quantiles between them.
    ordered = sorted(factors)
    low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.025, 0.975))
    return Interval(value, low, high)
