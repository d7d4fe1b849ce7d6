"""The temperature of predictions, where it moves while a student is trained.

``T = T_min + (T_max - T_min) s``, s in [0, 1], set anew after every ``UPDATES``-th part of a run
and held in between. A rule makes s of how far the run is and of its mean loss since the last time,
over all processes, so that every process sets the same; that mean is the only smoothing.

Source: Haase, da Silva, *HPM-KD* (arXiv 2512.09886), whose draft has these rules, the range [2, 6],
4 to begin with and an update every ten epochs. It gives no k and no units: here time is the share
of the run, losses are counted in the first mean, and k is 1. Its text wants a low temperature where
the loss moves slowly, its formula one where it moves fast: both are rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from metakd.config import DistillConfig

RANGE = 2.0, 6.0
"""T_min and T_max where nothing else is said."""

UPDATES = 20
"""Into so many parts a run is cut, in whole steps: if they are few, into some more or less."""


@dataclass
class Temperature:
    """The temperature of one run and what its rule has heard so far.

    Args:
        rule: of ``RULES``.
        low: T_min.
        high: T_max.
        progress: share of the run that is done.
        first: mean loss until the first update; None: not yet known.
        last: the same until the last one.
        since: progress at that.
        speed: |dL/dt| between the last two; None: not yet known.
    """

    rule: str
    low: float
    high: float
    progress: float = 0.0
    first: float | None = None
    last: float | None = None
    since: float = 0.0
    speed: float | None = None

    @classmethod
    def configured(cls, config: DistillConfig) -> Temperature | None:
        """As ``distill`` says; None where it is constant."""
        if config.temperature_schedule == "constant":
            return None
        return cls(config.temperature_schedule, *(config.temperature_range or RANGE))

    @property
    def value(self) -> float:
        """T."""
        return self.low + (self.high - self.low) * RULES[self.rule](self)

    def begin(self) -> None:
        """Another run begins."""
        self.restore(type(self)(self.rule, self.low, self.high).state())

    def update(self, progress: float, loss: float | None) -> None:
        """Set it anew.

        Args:
            progress: share of the run that is done.
            loss: mean over all examples since the last time; None, or not finite: tells nothing.
        """
        self.progress = progress
        if loss is None or not math.isfinite(loss):
            return
        if self.last is None:
            self.first = loss
        else:
            moved = abs(loss - self.last) / max(abs(self.first), _TINY)
            self.speed = moved / (progress - self.since)
        self.last, self.since = loss, progress

    def state(self) -> dict:
        """All of it, as words and numbers."""
        return asdict(self)

    def restore(self, state: dict) -> None:
        """Go on from what ``state`` returned."""
        vars(self).update(state)


_TINY = 1e-12  # in place of a first loss of 0


def _cosine(told: Temperature) -> float:
    return (1 + math.cos(math.pi * told.progress)) / 2


def _loss(told: Temperature) -> float:
    if told.first is None or told.last is None:
        return 1.0
    return min(max(told.last / max(told.first, _TINY), 0.0), 1.0)


def _gradient(told: Temperature) -> float:
    return 0.5 if told.speed is None else math.exp(-told.speed)


RULES: dict[str, Callable[[Temperature], float]] = {
    "cosine": _cosine,
    "loss": _loss,
    "gradient": _gradient,
    "gradient_inverse": lambda told: 1 - _gradient(told),
}
"""s by the name of its rule: from 1 to 0 along a cosine; the last loss over the first; near 0 while
the loss moves fast, or while it moves slowly, and half before anybody knows."""
