"""From files to served students, on the clock: ``python -m benchmarks.time_to_student --encoder
FOLDER``.

JSONL files of several domains become a teacher of all of them, a student of each (three of the
teacher's layers, taught on its domain's labelled texts) and an ONNX model of each student.
Contenders, a process each, in turn, once a seed:

- ``metakd``: the stages of ``metakd run``, TinyBERT-KD from a mixed teacher, then ``export``;
- ``metakd 0.1``: the same with the code of version 0.1, of which ``--first`` names a checkout whose
  extension is built;
- ``trainer``: the same in ``transformers.Trainer``, as TinyBERT made it common: every step runs the
  teacher, both through eager attention with ``output_attentions``;
- ``textbrewer``: teacher, scoring and export as there, students by TextBrewer's
  ``GeneralDistiller`` (fp32 alone; where the package is installed).

All train as many epochs of as many texts, in batches of as many, from the same encoder with the
same learning rates, losses and weights, and score their students on the same test texts. Time is
wall clock from the first import to the last file. Writes ``results/<device>/time_to_student.json``
and ``.md``; ``--contender NAME --seed N --files FOLDER --out FOLDER`` is one of those processes.
"""

from __future__ import annotations

import time

STARTED = time.perf_counter()  # before anything heavy is imported

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from functools import partial  # noqa: E402
from importlib.util import find_spec  # noqa: E402
from pathlib import Path  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (0, 2, 5)
TEACHER = {"num_train_epochs": 2, "learning_rate": 1e-4}
STUDENT = {"num_train_epochs": 4, "learning_rate": 2e-4}
BATCH, LENGTH, ATTENTION = 32, 64, 0.1


class Clock:
    """Seconds of each part of the way."""

    def __init__(self):
        self.parts = {"start-up": time.perf_counter() - STARTED}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.parts[name] = self.parts.get(name, 0.0) + time.perf_counter() - start


def ours(encoder: Path, files: Path, out: Path, seed: int, bf16: bool) -> tuple[Clock, dict]:
    """Through metakd, this version or 0.1."""
    import metakd
    from metakd.deploy import export_onnx

    first = metakd.__version__.startswith("0.1")
    rows = {"per_device_train_batch_size": BATCH}
    rows |= {} if first else {"selection": "last"}  # 0.1 keeps the best epoch
    settings = {
        "output_dir": str(out),
        "data": {
            **{name: str(files / f"{name}.jsonl") for name in ("train", "validation", "test")},
            "max_length": LENGTH,
        },
        "teacher": {"model": str(encoder), "kind": "mix", "training": TEACHER | rows},
        "student": {"layers": list(LAYERS)},
        "distill": {
            "method": "tinybert_kd",
            "layer_map": list(LAYERS),
            "terms": {"attention": ATTENTION},
            "cache_teacher": "all",
            "training": STUDENT | rows,
        },
        "seed": seed,
        "bf16": bf16,
        "save_steps": 1_000_000,
        "report_to": ["jsonl"],
    }
    run, read_texts = (_opened_by_0_1 if first else _opened)(settings, out)
    clock = Clock()
    with clock.part("teacher"):
        run.teach()
    with clock.part("students"):
        places = run.distill()
    with clock.part("scoring"):
        scores = run.evaluate()["students"]
    with clock.part("export"):
        for place in places:
            texts = [row.text for row in read_texts(str(files / "validation.jsonl"))][:50]
            export_onnx(place, texts, data="validation")
    return clock, {domain: 100.0 * found["accuracy"] for domain, found in scores.items()}


def _opened(settings: dict, out: Path) -> tuple:
    from metakd.data.reading import read_texts
    from metakd.front import open_run

    return open_run(settings), read_texts


def _opened_by_0_1(settings: dict, out: Path) -> tuple:
    import yaml
    from metakd.reading import read_texts
    from metakd.training.stages import Run

    from metakd.config import load_config
    from metakd.training.world import join_world

    file = out / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    return Run(load_config(str(file)), join_world()), read_texts


def rival(
    distil: Callable, encoder: Path, files: Path, out: Path, seed: int, bf16: bool
) -> tuple[Clock, dict]:
    """What people write around ``transformers.Trainer``, with students by ``distil``."""
    import copy

    import torch
    from datasets import load_dataset
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    clock = Clock()
    with clock.part("reading"):
        parts = {name: str(files / f"{name}.jsonl") for name in ("train", "test")}
        rows = load_dataset("json", data_files=parts, cache_dir=str(out / "datasets"))
        labels = sorted(set(rows["train"]["label"]))
        tokenizer = AutoTokenizer.from_pretrained(encoder)

        def prepare(batch: dict) -> dict:
            found = tokenizer(batch["text"], truncation=True, max_length=LENGTH)
            return found | {"labels": [labels.index(label) for label in batch["label"]]}

        rows = rows.map(prepare, batched=True, remove_columns=["text", "label"])
    set_seed(seed)

    def arguments(name: str, training: dict) -> TrainingArguments:
        return TrainingArguments(
            str(out / name),
            **training,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=64,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1_000_000,
            warmup_steps=0.1,
            weight_decay=0.01,
            bf16=bf16,
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
            train_sampling_strategy="group_by_length",
        )

    collate = DataCollatorWithPadding(tokenizer)
    teacher = AutoModelForSequenceClassification.from_pretrained(
        encoder, num_labels=len(labels), attn_implementation="eager"
    )
    with clock.part("teacher"):
        Trainer(
            model=teacher,
            args=arguments("teacher", TEACHER),
            train_dataset=rows["train"].remove_columns("domain"),
            data_collator=collate,
        ).train()
    teacher.eval()

    def score(model, part) -> float:
        """In percent."""
        scorer = Trainer(model=model, args=arguments("scoring", {}), data_collator=collate)
        said = scorer.predict(part.remove_columns("domain"))
        right = said.predictions[0] if isinstance(said.predictions, tuple) else said.predictions
        return 100.0 * float((right.argmax(-1) == said.label_ids).mean())

    with clock.part("scoring"):
        score(teacher, rows["test"])

    scores = {}
    for domain in sorted(set(rows["train"]["domain"])):
        student = copy.deepcopy(teacher)
        student.bert.encoder.layer = torch.nn.ModuleList(
            student.bert.encoder.layer[layer] for layer in LAYERS
        )
        student.config.num_hidden_layers = len(LAYERS)
        own = rows["train"].filter(lambda row, wanted=domain: row["domain"] == wanted)
        with clock.part("students"):
            told = arguments(f"students/{domain}", STUDENT)
            distil(teacher, student, own.remove_columns("domain"), collate, told)
            student.eval().save_pretrained(out / "students" / domain)
        with clock.part("scoring"):
            test = rows["test"].filter(lambda row, wanted=domain: row["domain"] == wanted)
            scores[domain] = score(student, test)
        with clock.part("export"):
            given = dict(tokenizer(["a text", "another text"], return_tensors="pt", padding=True))
            shape = torch.export.Dim.DYNAMIC
            torch.onnx.export(
                student,
                (),
                str(out / "students" / domain / "model.onnx"),
                kwargs=given,
                dynamo=True,
                dynamic_shapes={name: {0: shape, 1: shape} for name in given},
                verbose=False,
            )
    return clock, scores


ASKED = {"output_hidden_states": True, "output_attentions": True}


def by_trainer(teacher, student, rows, collate, arguments) -> None:
    """A ``Trainer`` with a loss of its own."""
    import torch
    from torch.nn import functional as F
    from transformers import Trainer

    class Distiller(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **_):
            inputs.pop("labels")
            with torch.no_grad():
                taught = teacher(**inputs, **ASKED)
            said = model(**inputs, **ASKED)
            loss = F.kl_div(
                said.logits.float().log_softmax(-1),
                taught.logits.float().log_softmax(-1),
                log_target=True,
                reduction="batchmean",
            )
            pairs = [(0, 0), *[(n + 1, layer + 1) for n, layer in enumerate(LAYERS)]]
            for mine, other in pairs:
                loss = loss + F.mse_loss(said.hidden_states[mine], taught.hidden_states[other])
            for mine, layer in enumerate(LAYERS):
                loss = loss + ATTENTION * F.mse_loss(
                    said.attentions[mine], taught.attentions[layer]
                )
            return (loss, said) if return_outputs else loss

    Distiller(model=student, args=arguments, train_dataset=rows, data_collator=collate).train()


def by_textbrewer(teacher, student, rows, collate, arguments) -> None:
    """TextBrewer's general distiller, with its matches of hidden states and attention maps."""
    import textbrewer
    import torch
    from torch.utils.data import DataLoader
    from transformers import get_linear_schedule_with_warmup
    from transformers.trainer_pt_utils import LengthGroupedSampler

    lengths = [len(ids) for ids in rows["input_ids"]]
    sampler = LengthGroupedSampler(BATCH, lengths=lengths)
    batches = DataLoader(rows, batch_size=BATCH, sampler=sampler, collate_fn=collate)
    pairs = [(0, 0), *[(n + 1, layer + 1) for n, layer in enumerate(LAYERS)]]
    matches = [
        {"layer_S": mine, "layer_T": other, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
        for mine, other in pairs
    ]
    matches += [
        {"layer_S": mine, "layer_T": layer, "feature": "attention", "loss": "attention_mse"}
        | {"weight": ATTENTION}
        for mine, layer in enumerate(LAYERS)
    ]

    def adaptor(batch, said) -> dict:
        return {
            "logits": said.logits,
            "hidden": said.hidden_states,
            "attention": said.attentions,
            "inputs_mask": batch["attention_mask"],
        }

    distiller = textbrewer.GeneralDistiller(
        train_config=textbrewer.TrainingConfig(
            device=str(teacher.device), output_dir=arguments.output_dir, ckpt_frequency=0
        ),
        distill_config=textbrewer.DistillationConfig(
            temperature=1, hard_label_weight=0, kd_loss_type="ce", intermediate_matches=matches
        ),
        model_T=teacher,
        model_S=student,
        adaptor_T=adaptor,
        adaptor_S=adaptor,
    )
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=arguments.learning_rate, weight_decay=arguments.weight_decay
    )
    steps = len(batches) * int(arguments.num_train_epochs)
    schedule = {"num_warmup_steps": int(0.1 * steps), "num_training_steps": steps}
    with distiller:
        distiller.train(
            optimizer,
            batches,
            int(arguments.num_train_epochs),
            scheduler_class=get_linear_schedule_with_warmup,
            scheduler_args=schedule,
            max_grad_norm=1.0,
            **ASKED,
        )


CONTENDERS: dict[str, Callable] = {
    "metakd": ours,
    "metakd 0.1": ours,
    "trainer": partial(rival, by_trainer),
    "textbrewer": partial(rival, by_textbrewer),
}


def one(options: argparse.Namespace) -> None:
    """A contender's process."""
    work = CONTENDERS[options.contender]
    clock, scores = work(options.encoder, options.files, options.out, options.seed, options.bf16)
    result = {
        "seconds": time.perf_counter() - STARTED,
        "parts": clock.parts,
        "accuracy": statistics.fmean(scores.values()),
        "scores": scores,
    }
    (options.out / "result.json").write_text(json.dumps(result))


def run(name: str, seed: int, files: Path, options: argparse.Namespace) -> dict:
    """What a contender's process came to.

    Raises:
        SystemExit: it failed.
    """
    with tempfile.TemporaryDirectory() as out:
        words = ["--contender", name, "--seed", str(seed), "--files", str(files), "--out", out]
        words += ["--encoder", str(options.encoder.resolve()), *["--bf16"] * options.bf16]
        # A file and no module, so that what is imported as metakd is what PYTHONPATH says.
        code = options.first.resolve() if name == "metakd 0.1" else ROOT
        done = subprocess.run(
            [sys.executable, __file__, *words],
            env=os.environ | {"PYTHONPATH": str(code)},
            capture_output=True,
            text=True,
            cwd=out,
        )
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-3000:]}")
        return json.loads(Path(out, "result.json").read_text())


def page(results: dict[str, list[dict]], options: argparse.Namespace) -> str:
    from benchmarks.reports import table
    from benchmarks.run import environment, heading

    rival = statistics.median(found["seconds"] for found in results["trainer"])
    parts = list(dict.fromkeys(part for found in results.values() for part in found[0]["parts"]))
    rows = []
    for name, found in results.items():
        seconds = [one["seconds"] for one in found]
        accuracy = [one["accuracy"] for one in found]
        middle = [statistics.median(one["parts"].get(part, 0.0) for one in found) for part in parts]
        rows.append(
            (
                name,
                f"{statistics.median(seconds):.0f} ({min(seconds):.0f}-{max(seconds):.0f})",
                f"{statistics.median(seconds) / rival:.2f}",
                f"{statistics.fmean(accuracy):.1f}",
                *(f"{value:.0f}" for value in middle),
            )
        )
    header = ("", "seconds (range)", "times the Trainer loop", "accuracy, %", *parts)
    text = (
        f"At most {options.texts} labelled texts a domain; teacher {TEACHER}, students {STUDENT}, "
        f"batches of {BATCH}, {'bf16' if options.bf16 else 'fp32'}, seeds {options.seeds}; medians."
    )
    told = environment("cpu", len(os.sched_getaffinity(0)))
    return "\n".join(["# Time to student", "", *heading(told), text, "", table(header, rows), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--encoder", type=Path, default=ROOT / "models" / "minilm")
    parser.add_argument("--files", type=Path, help="train, validation, test.jsonl; else fetched")
    parser.add_argument("--texts", type=int, default=1500, help="of each domain to train on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--first", type=Path, help="a checkout of version 0.1, its extension built")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cpu")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        one(options)
        return
    from metakd.demo import rated_corpus

    with tempfile.TemporaryDirectory() as folder:
        sizes = {"train": options.texts, "validation": 200, "test": 800, "unlabelled": 1}
        files = options.files or rated_corpus(folder, **sizes)
        there = dict.fromkeys(CONTENDERS, True)
        there |= {"metakd 0.1": options.first is not None}
        there |= {"textbrewer": find_spec("textbrewer") is not None and not options.bf16}
        results: dict[str, list[dict]] = {name: [] for name in CONTENDERS if there[name]}
        for seed in options.seeds:
            for name, found in results.items():
                found.append(run(name, seed, files.resolve(), options))
    text = page(results, options)
    (options.out / "time_to_student.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "time_to_student.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
