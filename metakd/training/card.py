"""The model card of a student: what it is, what it learned from, how well it does, how to load
it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from metakd.config import RunConfig

_BODY = """---
{front}
---
# {label} student, domain {domain}

A small sequence classifier distilled with metakd.

| | |
|---|---|
| method | {label} |
| domain | {domain} |
| encoder of the teacher | {encoder} |
| parameters | {parameters:,} |
| training data | {train} |
| seed | {seed} |
| command | `{command}` |

## Scores

{scores}

## Load

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained(FOLDER)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
```

The licence of the base encoder and of the data carries over to this model.
"""


def write_card(folder: Path, result: dict, config: RunConfig, command: str, seed: int) -> None:
    """Write ``README.md`` beside the student's weights from its stage's result."""
    rows = ["| split | accuracy | macro-F1 |", "|---|---|---|"]
    rows += [
        f"| {split} | {result[split]['accuracy']:.4f} | {result[split]['macro_f1']:.4f} |"
        for split in ("validation", "test")
        if split in result
    ]
    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-classification", tags=["metakd"]
    )
    card = _BODY.format(
        front=data.to_yaml(),
        label=result["label"],
        domain=result["domain"],
        encoder=Path(config.teacher.model).name,
        parameters=result["parameters"],
        train=Path(config.data.train).name,
        seed=seed,
        command=command,
        scores="\n".join(rows),
    )
    ModelCard(card).save(folder / "README.md")
