"""What the study trains: corpora, blocks of rows, and what is known of each group of results.

Fixed before the first run, by single trainings on news with 100 labels: the learning rates, and
which layers a student has.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "docs" / "results" / "study" / "cells.json"
SHORT_SIZES = {"train": 3000, "validation": 200, "test": 800, "unlabelled": 2000}
OTHERS_LABELS = 1500  # that each of the domains which are not scarce has
STUDENT = {"max_steps": 250, "num_train_epochs": 1000, "learning_rate": 4e-4, "selection": "last"}
TEACHER = {"num_train_epochs": 2, "learning_rate": 1e-4, "selection": "last"}
SHAPE = {"layers": [0, 2, 5], "freeze_embeddings": True}
ALL = "all"


def joined(first: dict, second: dict) -> dict:
    """The settings of both; where they say different things, the second's."""
    both = copy.deepcopy(first)
    for name, value in second.items():
        known = both.get(name)
        inner = isinstance(known, dict) and isinstance(value, dict)
        both[name] = joined(known, value) if inner else value
    return both


@dataclass(frozen=True)
class Part:
    """A corpus and how it is trained on."""

    domains: tuple[str, ...]
    max_length: int
    few: int = 100  # labels of a scarce domain
    files: str = ""  # where they are, "" for the rated corpus
    columns: dict = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Block:
    """Rows that are trained alike."""

    name: str
    rows: tuple[dict, ...]
    labels: tuple[int | str, ...] = (100,)
    seeds: tuple[int, ...] = (1, 2, 3)
    domains: tuple[str, ...] | None = None  # None: all
    changes: dict = field(default_factory=lambda: TAUGHT)
    parts: tuple[str, ...] = ("short",)


PAIRS = {"text": "premise", "text_pair": "hypothesis", "domain": "genre"}
PARTS = {
    "short": Part(("electronics", "films", "news", "tweets"), 64),
    "reviews": Part(("books", "dvd", "electronics", "kitchen"), 96, files="reviews"),
    "mnli": Part(("fiction", "government", "slate", "telephone", "travel"), 96, 300, "mnli", PAIRS),
}


def _kd(method: str, transfer: str, teacher: str = "meta") -> dict:
    return {"method": method, "teacher": teacher, "transfer": transfer}


def _field() -> tuple[dict, ...]:
    """The rows of ``configs/methods.yaml``."""
    rows = yaml.safe_load((ROOT / "configs" / "methods.yaml").read_text())["compare"]["rows"]
    return tuple({"transfer": "unlabelled", **row} for row in rows)


REST_OF_CURVE = (ALL, 300, 32)
BASELINES = {"distill": {"training": {"learning_rate": 1e-4}}}
TAUGHT = {"distill": {"layer_map": "copied"}}
FINETUNED = ({"method": "finetune"}, {"method": "finetune_all"})
STUDENTS = (_kd("tinybert_kd", "unlabelled"), _kd("meta", "unlabelled"))
BLOCKS = (
    Block("baselines", FINETUNED, changes=BASELINES),
    Block("students", STUDENTS),
    Block("today", (_kd("tinybert_kd", "own"), _kd("meta", "own"))),
    Block("pseudo", (_kd("pseudo_labels", "unlabelled"), _kd("logits_kd", "unlabelled"))),
    Block("baselines", FINETUNED, REST_OF_CURVE, changes=BASELINES),
    Block("students", STUDENTS, REST_OF_CURVE),
    Block("foreign", (_kd("tinybert_kd", "all+unlabelled"), _kd("meta", "all+unlabelled"))),
    Block("mix", (_kd("tinybert_kd", "unlabelled", "mix"),)),
    Block("then_own", ({"method": "finetune_all_then_own"},), changes=BASELINES),
    Block("logits", tuple(_kd("logits_kd", name) for name in ("own", "all", "all+unlabelled"))),
    Block("labelled", (_kd("tinybert_kd", "all"), _kd("meta", "all"))),
    Block("single", (_kd("tinybert_kd", "unlabelled", "single"),)),
)
FIELD = _field()
_TRAINED = [row for block in BLOCKS for row in block.rows]
BLOCKS += (Block("methods", tuple(row for row in FIELD if row not in _TRAINED)),)
VARIANTS = {
    "layer_map uniform": {"distill": {"layer_map": "uniform"}},
    "embeddings trained": {"student": {"freeze_embeddings": False}},
    "layers 1, 3, 5": {"student": {"layers": [1, 3, 5]}},
    "balance": {"distill": {"balance": "variance", "terms": {"attention": 1.0}}},
    "gamma2=0": {"distill": {"gamma2": 0.0}},
    "attention=1": {"distill": {"terms": {"attention": 1.0}}},
    "learning_rate=5e-5": {"distill": {"training": {"learning_rate": 5e-5}}},
    "learning_rate=8e-4": {"distill": {"training": {"learning_rate": 8e-4}}},
    "steps=600": {"distill": {"training": {"max_steps": 600}}},
    "selection=best": {"distill": {"training": {"selection": "best"}}},
    "selection=average": {"distill": {"training": {"selection": "average"}}},
    "folds=5": {"teacher": {"folds": 5}},
    "by_score": {"distill": {"transfer": "all+unlabelled", "transfer_by_score": True}},
    "minmax": {"prototypes": {"rescale": "minmax"}},
    "ensemble=3": {"teacher": {"ensemble": 3}},
    "teacher average": {"teacher": {"training": {"selection": "average"}}},
    "teacher best": {"teacher": {"training": {"selection": "best"}}},
    "fp32": {"bf16": False},
}
BLOCKS += tuple(
    Block(
        name,
        (_kd("meta", "all+unlabelled" if name == "by_score" else "unlabelled"),),
        domains=("electronics", "news"),
        changes=joined(TAUGHT, changes),
    )
    for name, changes in VARIANTS.items()
)
# Students of another shape, in search of one with a ninth of the teacher's latency: by number of
# steps and learning rate.
SHAPES = (
    ({"layers": [0, 5], "freeze_embeddings": True}, 400, 4e-4),
    ({"layers": [2], "freeze_embeddings": True}, 600, 4e-4),
    ({"preset": "tiny-2l-128"}, 4000, 1e-3),
    ({"preset": "mini-4l-256"}, 1500, 1e-3),
)
BLOCKS += (
    Block(
        "shapes",
        tuple(
            _kd("tinybert_kd", "unlabelled")
            | {"student": shape, "max_steps": steps, "learning_rate": rate}
            for shape, steps, rate in SHAPES
        ),
        seeds=(1, 2),
    ),
)
ELSEWHERE = {"reviews": (100, ALL), "mnli": (300,)}  # which has no texts without labels but those
BLOCKS += tuple(
    Block(block.name, block.rows, (labels,), (1, 2), changes=block.changes, parts=(part,))
    for part, counts in ELSEWHERE.items()
    for labels in counts
    for block in BLOCKS[:3]
)


@dataclass(frozen=True, eq=False)
class Group:
    """What one comparison trains: the rows of a block, for one domain, number of labels, seed."""

    part: str
    block: Block
    domain: str
    labels: int | str
    seed: int

    @property
    def key(self) -> str:
        """Its name."""
        return f"{self.part}/{self.block.name}/{self.domain}-{self.labels}/s{self.seed}"

    def settings(self) -> dict:
        """Its configuration, without places."""
        part = PARTS[self.part]
        labels = dict.fromkeys(part.domains, OTHERS_LABELS)
        labels[self.domain] = SHORT_SIZES["train"] if self.labels == ALL else self.labels
        settings = {
            "data": {"max_length": part.max_length, "labels": labels, **part.columns},
            "teacher": {"training": dict(TEACHER)},
            "student": dict(SHAPE),
            "distill": {
                "domains": [self.domain],
                "cache_teacher": "all",
                "terms": {"attention": 0.1},
                "training": dict(STUDENT),
            },
            "compare": {"rows": list(self.block.rows), "seeds": [self.seed]},
            "bf16": True,
            "seed": 41 + self.seed,  # each seed draws other labels
            "logging_steps": 50,
            "save_steps": 100000,
            "report_to": ["jsonl"],
        }
        return joined(settings, self.block.changes)

    def folder(self, runs: Path) -> Path:
        """Its run directory, shared with those that have the same teachers."""
        name = f"{self.domain}-{self.labels}-s{self.seed}"
        own = set(self.block.changes) - {"distill", "student"}
        return runs / self.part / (f"{name}-{self.block.name}" if own else name)

    @property
    def digest(self) -> str:
        """Of what decides its results."""
        decided = json.dumps([self.settings(), self.part, SHORT_SIZES], sort_keys=True)
        return hashlib.sha256(decided.encode()).hexdigest()[:16]


def groups() -> Iterator[Group]:
    """All of the study, what matters most first."""
    for block in BLOCKS:
        for part in block.parts:
            for labels in block.labels:
                for seed in block.seeds:
                    for domain in block.domains or PARTS[part].domains:
                        yield Group(part, block, domain, labels, seed)


class Results:
    """What is known of the study: cells of finished groups, by the group's name.

    Args:
        runs: where groups are trained; each leaves a file here when it is done.
    """

    def __init__(self, runs: Path):
        self._folder = runs / "cells"
        self.known: dict[str, dict] = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
        for path in sorted(self._folder.rglob("*.json")):
            self.known |= json.loads(path.read_text())

    def of(self, group: Group) -> dict | None:
        """What came of a group, if it is what would come of it now."""
        found = self.known.get(group.key)
        return found if found and found["digest"] == group.digest else None

    def add(self, group: Group, found: dict) -> None:
        """Note what came of a group."""
        path = self._folder / f"{group.key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.known[group.key] = found
        path.write_text(json.dumps({group.key: found}))

    def keep(self) -> None:
        """Write what is known of the present plan, to be committed."""
        known = {group.key: found for group in groups() if (found := self.of(group))}
        lines = [f"{json.dumps(key)}: {json.dumps(known[key])}" for key in sorted(known)]
        KEPT.write_text("{\n" + ",\n".join(lines) + "\n}\n")
