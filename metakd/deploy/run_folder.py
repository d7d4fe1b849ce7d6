"""What a run has left on the disk: ``read_run``, and stages that read the rest when asked.

Each file is read once. One that metakd did not write, or that was cut off, is an error that names
it. Imports neither torch nor DeepSpeed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from metakd.deploy.formats import EXPORT_REPORT, ONNX_FOLDER
from metakd.errors import CheckpointError, ConfigError
from metakd.pipeline.published import LOG, RECORD, check_files
from metakd.pipeline.table import ALL_DOMAINS, TEACHER, training_steps

_PLACES = ("prototypes", "starts/*", "teachers/*", "teachers/*/*", "students/*", "students/*/*")
_LINEAGE = re.compile(r"(?P<label>.+)-s(?P<seed>\d+)(?:-t\d+)?")

# What is relied on below and in the report; whatever else is there is nobody's business.
_RECORDED = ("result", "kept", "seconds", "world_size")
_RESULT = {
    "prototypes": ("mean", "std", "histogram"),
    "start": ("preset", "encoder", "files", "texts"),
}
_SCORED = ("validation",)
_REPORTS = {
    "compare": ("cells", "split", "summary"),
    "labels": ("split", "seeds", "points", "base", "against_base"),
    "evaluation": ("split", "teacher", "students"),
    "latency": ("environment", "command", "models", "rows", "tokenising", "absent"),
}
_EXPORT = ("checked", "environment", "formats")


@dataclass(frozen=True)
class Stage:
    """A finished stage.

    Args:
        folder: where it lies.
        kind: prototypes, start, teacher or student.
        label: of a student its method, of a teacher its kind, of a start its preset.
        seed: of any of them.
        domain: of either; ``all`` if it serves them all.
        record: ``stage.json``.
    """

    folder: Path
    kind: str
    label: str
    seed: int
    domain: str
    record: dict

    @property
    def row(self) -> str:
        """Its row in the table of methods and domains."""
        return {"teacher": TEACHER, "start": "start: "}.get(self.kind, "") + self.label

    @property
    def name(self) -> str:
        """What a person calls it."""
        return f"{self.folder.parent.name}/{self.domain}"

    @property
    def result(self) -> dict:
        """What it recorded of itself."""
        return self.record["result"]

    @cached_property
    def export(self) -> dict | None:
        """Its ``export.json``; None where it was not exported."""
        return _read(self.folder / ONNX_FOLDER / EXPORT_REPORT, _EXPORT)

    @cached_property
    def steps(self) -> list[dict]:
        """The training steps of its log."""
        return training_steps(self.folder / LOG)

    @cached_property
    def parameters(self) -> int | None:
        """How many numbers its weights are, from their file's header; None where none were kept."""

        def count(file) -> int:
            shapes = (file.get_slice(name).get_shape() for name in file.keys())  # noqa: SIM118
            return sum(map(math.prod, shapes))

        return _from_tensors(self.folder / "model.safetensors", count)

    @cached_property
    def class_names(self) -> list[str]:
        """Those of the outputs of its model, in order; none where no model was kept."""
        names = (_read(self.folder / "config.json") or {}).get("id2label", {})
        return [names[number] for number in sorted(names, key=int)]


@dataclass(frozen=True)
class RunFolder:
    """A run.

    Args:
        folder: its ``output_dir``.
        stages: every finished one.
        compare: ``compare.json``; None where it is absent, as in the next three.
        labels: ``labels.json``.
        evaluation: ``evaluation.json``.
        latency: ``latency.json``.
    """

    folder: Path
    stages: list[Stage]
    compare: dict | None
    labels: dict | None
    evaluation: dict | None
    latency: dict | None

    def of_kind(self, kind: str) -> list[Stage]:
        """The stages of this kind."""
        return [stage for stage in self.stages if stage.kind == kind]

    @cached_property
    def prototype_scores(self) -> np.ndarray | None:
        """The score t of every training example [N]; None where they were not kept."""
        return _from_tensors(
            self.folder / "prototypes" / "scores.safetensors", lambda file: file.get_tensor("t")
        )


def read_run(folder: Path) -> RunFolder:
    """What is there of a run.

    Args:
        folder: the run's ``output_dir``.

    Raises:
        ConfigError: the folder holds nothing of a run.
        CheckpointError: one of its files cannot be read, or is not what a run writes, or a stage's
            is not what it published; the logs and exports of stages raise it when they are asked
            for.
    """
    stages = find_stages(folder)
    for stage in stages:
        check_files(stage.folder, stage.record)
    reports = {name: _read(folder / f"{name}.json", keys) for name, keys in _REPORTS.items()}
    if not stages and not any(reports.values()):
        raise ConfigError(
            f"{folder}: no finished stage of a run is there",
            "give the output_dir of a configuration that `metakd run` or `metakd compare` has run",
        )
    return RunFolder(folder, stages, **reports)


def _stage_folders(run: Path) -> list[Path]:
    """Where the finished stages of a run lie; unfinished and replaced ones are in hidden folders,
    which are passed over."""
    found = (path.parent for place in _PLACES for path in run.glob(f"{place}/{RECORD}"))
    return sorted(
        folder
        for folder in found
        if not any(part.startswith(".") for part in folder.relative_to(run).parts)
    )


def find_stages(run: Path) -> list[Stage]:
    """The finished stages of a run; none where it is no run.

    Raises:
        CheckpointError: a record cannot be read, or is not what a run writes.
    """
    found = []
    for folder in _stage_folders(run):
        place = folder.relative_to(run).parts
        kind, label, seed, domain = place[0].removesuffix("s"), "", 0, ALL_DOMAINS
        if place == ("prototypes",):
            kind = "prototypes"
        elif lineage := _LINEAGE.fullmatch(place[1]):
            label, seed = lineage["label"], int(lineage["seed"])
            domain = place[2] if len(place) == 3 else ALL_DOMAINS
        else:
            continue
        record = _read(folder / RECORD, _RECORDED)
        _need(folder / RECORD, record["result"], _RESULT.get(kind, _SCORED))
        found.append(Stage(folder, kind, label, seed, domain, record))
    return found


def _read(path: Path, keys: tuple[str, ...] = ()) -> dict | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error})", "remove it, and give the command that wrote it"
        ) from error
    _need(path, content, keys)
    return content


def _need(path: Path, content, keys: tuple[str, ...]) -> None:
    known = content if isinstance(content, dict) else {}
    missing = [name for name in keys if name not in known]
    if missing or not isinstance(content, dict):
        lacks = f"lacks {', '.join(missing)}" if missing else "is no JSON object"
        raise CheckpointError(
            f"{path}: {lacks}: metakd has not written this",
            "take it out of the folder, and give the command that writes it",
        )


def _from_tensors(path: Path, ask: Callable):
    """The answer of a safetensors file; None where there is none."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            return ask(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error})", f"move {path.parent} away, and build it again"
        ) from error
