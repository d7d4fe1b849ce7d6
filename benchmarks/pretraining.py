"""What pretraining gives students that would begin with random weights: ``python -m
benchmarks.pretraining``.

Students of two presets, with ``student.pretrain`` and without, learn by ``tinybert_kd`` from one
mixed teacher on the reviews of ``../shared/data/reviews`` (four domains, labelled and unlabelled
texts); nothing but what they begin as differs between the two rows of a preset. One start serves
all domains and seeds of its preset, so that the spread over seeds is not that of pretraining.

It is one ``metakd compare``: stopped and started again it goes on where it was, and with other
options only what they change is trained again. ``--steps`` and ``--pretrain-steps`` make it small.
Writes ``docs/results/pretraining.md``, or to ``--out``. The settings were fixed before the first
run; steps and rate of the students are those of the study for these presets, or half of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data" / "reviews"
FILES = {"train": "train", "validation": "dev", "test": "test", "unlabelled": "unlabelled"}
STEPS = {"tiny-2l-128": 2000, "mini-4l-256": 1500}
RATE, MAX_LENGTH, ENDLESS = 1e-3, 96, 100_000
ROW, TEACHER = "tinybert_kd-from-mix", "teacher: mix"


def settings(given: argparse.Namespace) -> dict:
    """The configuration of the comparison."""
    pretrain = {
        "max_steps": given.pretrain_steps,
        "num_train_epochs": ENDLESS,
        "learning_rate": RATE,
    }
    rows = [
        {
            "method": "tinybert_kd",
            "teacher": "mix",
            "student": {"preset": preset, **how},
            "max_steps": given.steps or STEPS[preset],
            "num_train_epochs": ENDLESS,
            "learning_rate": RATE,
        }
        for preset in given.preset
        for how in ({}, {"pretrain": pretrain})
    ]
    files = {key: str(given.data / f"{name}.jsonl") for key, name in FILES.items()}
    teacher = {"num_train_epochs": 2, "learning_rate": 1e-4, "selection": "last"}
    teacher |= {"max_steps": given.teacher_steps}
    return {
        "output_dir": str(given.runs),
        "data": {"max_length": MAX_LENGTH, **files},
        "teacher": {"model": str(given.encoder), "kind": "mix", "training": teacher},
        "student": rows[0]["student"],
        "distill": {
            "method": "tinybert_kd",
            "domains": given.domain,
            "cache_teacher": "all",
            "cache_limit_gib": given.cache_gib,
            "terms": {"attention": 0.1},
            "training": {"selection": "last"},
        },
        "compare": {"rows": rows, "seeds": given.seeds, "teacher_seeds": 1},
        "logging_steps": 50,
        "report_to": ["jsonl"],
    }


def page(given: argparse.Namespace, details: dict) -> str:
    """What came of it."""
    import torch

    from benchmarks.run import environment, heading
    from metakd.config.run import AS_SHAPE
    from metakd.pipeline.statistics import accuracy_difference
    from metakd.pipeline.table import (
        AVERAGE,
        Cell,
        answers_of,
        markdown_table,
        show,
        show_interval,
        summarise,
    )

    cells = [Cell.read(cell) for cell in details["cells"]]
    summary = summarise([cell for cell in cells if cell.domain in given.domain])
    rows = [["teacher", "", "", show(summary[TEACHER][AVERAGE]), ""]]
    for preset in given.preset:
        plain = f"{ROW}{AS_SHAPE}{preset}"
        pretrained = f"{plain}-pretrained"
        gain = accuracy_difference(answers_of(cells, pretrained), answers_of(cells, plain))
        steps = str(given.steps or STEPS[preset])
        place = given.runs / "starts" / f"{preset}-s42" / "stage.json"
        seconds = json.loads(place.read_text())["seconds"]
        begun = f"pretrained, {given.pretrain_steps} steps ({seconds:,.0f} s)"
        rows.append([preset, "random weights", steps, show(summary[plain][AVERAGE]), ""])
        rows.append([preset, begun, steps, show(summary[pretrained][AVERAGE]), show_interval(gain)])
    header = ["student", "begins", "steps", "accuracy, %", "gain, points (95 %)"]
    words = ["python", "-m", "benchmarks.pretraining", *sys.argv[1:]]
    return "\n".join(
        [
            "# Students that are pretrained first",
            "",
            f"`{shlex.join(words)}`",
            "",
            *heading(environment("cpu", torch.get_num_threads())),
            "",
            f"Mean accuracy on the test texts of {', '.join(given.domain)} ± its standard "
            f"deviation over student seeds {given.seeds}; one teacher (mix, of the encoder "
            f"{given.encoder.name}); TinyBERT-KD on labelled and unlabelled texts, batches of 32, "
            f"rate {RATE:g} in both stages, the attention term weighted 0.1. One start of each "
            "preset, on the texts of all domains. Intervals: paired draws of seeds and test texts.",
            "",
            markdown_table(header, rows),
            "",
        ]
    )


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--encoder", type=Path, default=ROOT / "models" / "minilm")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "pretraining")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "pretraining.md")
    parser.add_argument("--preset", action="append", choices=STEPS, help="only these")
    parser.add_argument("--domain", action="append", help="students of these; books and kitchen")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, help="of each student")
    parser.add_argument("--pretrain-steps", type=int, default=4000)
    parser.add_argument("--teacher-steps", type=int, default=-1, help="two epochs by default")
    parser.add_argument("--cache-gib", type=float, default=40.0, help="for teacher outputs")
    given = parser.parse_args(words)
    given.preset = given.preset or list(STEPS)
    given.domain = given.domain or ["books", "kitchen"]
    return given


def main() -> None:
    """Train what is missing, and write the page."""
    given = parse(sys.argv[1:])
    if lacking := [name for name in FILES.values() if not (given.data / f"{name}.jsonl").is_file()]:
        print(f"skipped: {given.data} holds no {', '.join(f'{name}.jsonl' for name in lacking)}")
        return
    import metakd

    result = metakd.compare(settings(given), command="python -m benchmarks.pretraining")
    text = page(given, result.details)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    main()
