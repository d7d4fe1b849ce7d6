"""Soft labels: what a teacher elsewhere said of each text, as probabilities or logits.

Sizes: N texts, M classes.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from metakd.config import DataConfig
from metakd.data.tables import Problems, ordered, show
from metakd.method.tasks import TASKS

if TYPE_CHECKING:
    from torch import Tensor

    from metakd.data.reading import Row

SUM_TOLERANCE = 1e-3
"""How far probabilities of a text may be from summing to 1, as rounded numbers are."""

SMALLEST = 1e-8
"""A probability below it counts as it: its logarithm must be finite."""

_LARGEST = float.fromhex("0x1.fffffep127")  # of float32

Numbers = dict[str, float] | list[float]


def as_logits(soft: Sequence[Sequence[float]], config: DataConfig) -> Tensor:
    """Soft labels of N texts as logits [N, M], float32; of probabilities those that give them."""
    import torch

    values = torch.tensor(soft, dtype=torch.float64)
    if config.soft_labels_as == "probabilities":
        values = TASKS[config.task].logits_of(values, SMALLEST)
    return values.float()


class SoftLabels:
    """What a teacher elsewhere said of a row, from one column or one for each class."""

    def __init__(self, config: DataConfig):
        self._by_class = config.soft_columns
        self._are_probabilities = config.soft_labels_as == "probabilities"
        self._sum_to_1 = self._are_probabilities and TASKS[config.task].one_class
        each_by_itself = self._are_probabilities and not self._sum_to_1
        self._most = 1 + SUM_TOLERANCE if each_by_itself else _LARGEST
        self._least = 0 if self._are_probabilities else -_LARGEST
        own = config.soft_labels if isinstance(config.soft_labels, str) else ""
        self.columns = list(self._by_class.values()) if self._by_class else [own]

    def check(self, values: dict[str, Any]) -> tuple[Numbers | None, str, str | None]:
        """The numbers of a row, by class where classes have names; the column and what is wrong."""
        given: Any = values.get(self.columns[0])
        if self._by_class:
            given = {name: values.get(column) for name, column in self._by_class.items()}
        elif isinstance(given, str) and given.lstrip()[:1] in ("[", "{"):
            try:
                given = json.loads(given)
            except (ValueError, RecursionError):
                return None, self.columns[0], f"{show(given)} is neither a list nor an object"
        if not isinstance(given, (dict, list)) or len(given) < 2:
            return None, self.columns[0], f"{show(given)} is not a list or an object of numbers"
        names = list(given) if isinstance(given, dict) else range(len(given))
        numbers: list[float] = []
        for place, name in enumerate(names):
            column = self.columns[place] if self._by_class else self.columns[0]
            value = given[name]
            try:
                number = math.nan if isinstance(value, bool) else float(value)
            except (TypeError, ValueError, OverflowError):
                number = math.nan
            if not self._least <= number <= self._most:
                wanted = "probability" if self._are_probabilities else "finite number"
                return None, column, f"{show(value)} is not a {wanted}"
            numbers.append(number)
        if self._sum_to_1 and abs(sum(numbers) - 1) > SUM_TOLERANCE:
            reason = (
                f"probabilities sum to {sum(numbers):.4g}, not to 1 (for logits set "
                "data.soft_labels_as: logits)"
            )
            return None, self.columns[0], reason
        found = dict(zip(given, numbers)) if isinstance(given, dict) else numbers
        return found, self.columns[0], None


def settle(
    splits: dict[str, list[Row]],
    taught: Sequence[str],
    labels: list[str],
    config: DataConfig,
    problems: Problems,
) -> list[str]:
    """The classes in their order; every row of soft labels is put into it, and takes what they say
    for its label where it has none."""
    given = [row.soft for split in taught for row in splits[split] if row.soft is not None]
    if not given:
        return labels
    # What most rows are of is what is meant: names of classes, or how many there are.
    usual = Counter(map(_classes_of, given)).most_common(1)[0][0]
    classes = labels or [str(number) for number in range(len(usual))]
    if any(isinstance(name, str) for name in usual):
        classes = ordered(set(usual))
        if lacking := sorted(set(labels) - usual):
            listed = f"{', '.join(map(repr, lacking))} (there are {', '.join(map(repr, classes))})"
            problems.add(config.train, None, None, f"soft labels say nothing of class {listed}")
            return labels
    wanted = {frozenset(classes), frozenset(range(len(classes)))}
    task, border = TASKS[config.task], 0.5 if config.soft_labels_as == "probabilities" else 0.0
    for split in taught:
        problems.split, settled = split, []
        for row in splits[split]:
            if row.soft is not None and _classes_of(row.soft) not in wanted:
                kind = "soft labels that cannot be used"
                reason = f"soft labels are not of the classes {', '.join(map(repr, classes))}"
                problems.add_row(row.file, row.row, None, kind, reason)
                continue
            soft = row.soft
            if isinstance(soft, dict):
                soft = [soft[name] for name in classes]
            if soft is not None and split == "train" and row.label is None:
                row = row._replace(label=task.told(soft, classes, border))
            settled.append(row._replace(soft=soft))
        splits[split] = settled
    return classes


def _classes_of(soft: Numbers) -> frozenset[str] | frozenset[int]:
    return frozenset(soft) if isinstance(soft, dict) else frozenset(range(len(soft)))
