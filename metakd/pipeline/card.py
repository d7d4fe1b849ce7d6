"""The model card of a student: what it is, what it learned from, how well and how fast it does, how
to load it.

Written when the student is trained, and again by whoever has measured more since: all that only
training knows is kept with the stage's result (``origin``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

from metakd.config import RunConfig
from metakd.method.tasks import METRICS
from metakd.pipeline.table import markdown_table, plain, show

_BODY = """---
{front}
---
# {label} student, domain {domain}

A small sequence classifier distilled with metakd.

{facts}

## Scores

{scores}
{measured}
## Load

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```

or, from texts to labels, with the engines that `metakd latency` compares:

```python
from metakd.deploy import Predictor
Predictor(FOLDER)(["a text", "another one"])
```

The licence of the base encoder and of the data carries over to this model.
"""


_TITLES = METRICS | {
    "macro_f1": "macro-F1",
    "mean_average_precision": "mean average precision",
    "exact_match": "all classes right",
    "spearman": "Spearman correlation",
    "mse": "mean squared error",
    "r2": "R²",
}


@dataclass(frozen=True)
class Measured:
    """What was found out about a student after its training.

    Args:
        spread: of its method on its domain over all seeds, in percent: ``split``, ``mean``,
            ``std`` (None for one seed) and ``n``; None where nothing was compared.
        latency: rows of ``latency.json`` of a model of this shape.
        device: what they were measured on.
        formats: the files of its ``onnx/export.json``.
    """

    spread: dict | None = None
    latency: Sequence[dict] = ()
    device: str = ""
    formats: dict[str, dict] = field(default_factory=dict)


def origin(config: RunConfig, seed: int, examples: int) -> dict:
    """Where a student comes from, for its stage's result and thence its card.

    Args:
        config: of the run.
        seed: the student's.
        examples: that it was trained on.
    """
    return {
        "encoder": Path(config.teacher.model).name,
        "licence": _licence(config.teacher.model),
        "data": Path(config.data.train).name,
        "examples": examples,
        "seed": seed,
    }


@cache  # of a hub id it is asked over the network
def _licence(encoder: str) -> str | list[str] | None:
    """What the encoder's own model card states, a directory's or a hub id's; None where there is
    nothing that can be read."""
    card = Path(encoder) / "README.md"
    if Path(encoder).is_dir() and not card.is_file():
        return None
    try:
        source = card if card.is_file() else encoder
        stated = ModelCard.load(source, ignore_metadata_errors=True).data.license
    except (OSError, ValueError, yaml.YAMLError):
        return None
    # YAML may make anything of it, and the stage's result is JSON.
    if isinstance(stated, list):
        return [str(one) for one in stated]
    return None if stated is None else str(stated)


def write_card(folder: Path, result: dict, command: str, measured: Measured | None = None) -> None:
    """Write ``README.md`` beside the student's weights.

    Args:
        folder: the student's.
        result: of its stage.
        command: that trained it.
        measured: since then; None at training time.
    """
    known, measured = result["origin"], measured or Measured()
    licence = known["licence"]
    stated = ", ".join(licence) if isinstance(licence, list) else licence
    facts = {
        "method": result["label"],
        "domain": result["domain"],
        "encoder of the teacher": known["encoder"],
        "licence of that encoder": stated or f"not stated by {known['encoder']}",
        "parameters": f"{result['parameters']:,}",
        "training data": f"{known['data']}, {known['examples']:,} examples",
        **({"begins": begins(known["start"])} if "start" in known else {}),
        "seed": str(known["seed"]),
        "command": f"`{command}`",
    }
    data = ModelCardData(
        license=licence,
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["metakd"],
    )
    card = _BODY.format(
        front=data.to_yaml(),
        label=result["label"],
        domain=plain(result["domain"]),
        facts=markdown_table(["", ""], [list(fact) for fact in facts.items()]),
        scores=_scores(result, measured.spread),
        measured=_formats(measured) + _latency(measured),
    )
    ModelCard(card, ignore_metadata_errors=True).save(folder / "README.md")


def begins(start: dict) -> str:
    """What the weights are that it began with."""
    listed = ", ".join(f"{number:,} of {name}" for name, number in start["texts"].items())
    files = f" ({', '.join(start['files'])})" if start["files"] else ""
    return (
        f"pretrained against {start['encoder']}, without labels, on "
        f"{sum(start['texts'].values()):,} texts: {listed}{files}"
    )


def _scores(result: dict, spread: dict | None) -> str:
    splits = [split for split in ("validation", "test") if split in result]
    names = [name for name in _TITLES if name in result[splits[0]]]
    rows = [
        [split, *(f"{result[split][n]:.4f}" if n in result[split] else "-" for n in names)]
        for split in splits
    ]
    header = ["split", *(_TITLES[name] for name in names)]
    table = markdown_table(header, rows, numbers=len(names))
    if "doubt" in result:
        table += f"\n\n**Of no use as it is:** it {result['doubt']}."
    if spread is None or spread["n"] == 1:
        return table
    return (
        f"{table}\n\nThis method on this domain, {spread['n']} seeds: {show(spread)} % "
        f"{_TITLES[names[0]]} on the {spread['split']} split (mean ± sample standard deviation)."
    )


def _formats(measured: Measured) -> str:
    if not measured.formats:
        return ""
    rows = [
        [
            f"onnx/{name}",
            f"{file['bytes'] / 1e6:.1f}",
            f"{file['max_logit_error']:.1e}",
            f"{100 * file['label_agreement']:.2f}",
        ]
        for name, file in measured.formats.items()
    ]
    header = ["file", "size, MB", "largest logit error", "labels as PyTorch's, %"]
    return f"\n## Exported\n\n{markdown_table(header, rows, numbers=3)}\n"


def _latency(measured: Measured) -> str:
    if not measured.latency:
        return ""
    rows = [
        [
            row["engine"],
            str(row["batch"]),
            str(row["length"]),
            *("-" if row[p] is None else f"{row[p]:.2f}" for p in ("p50_ms", "p99_ms")),
        ]
        for row in measured.latency
    ]
    header = ["engine", "batch", "tokens", "p50, ms", "p99, ms"]
    return (
        f"\n## Latency\n\nA model of this shape on {measured.device}:\n\n"
        f"{markdown_table(header, rows, numbers=4)}\n"
    )
