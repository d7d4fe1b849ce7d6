"""Real tokens per second of a distillation step: ``python -m benchmarks.throughput --data FOLDER
--encoder FOLDER``.

A step is collating, the meta-teacher's forward pass, the student's forward and backward pass with
all terms of the method, and the optimizer, on the texts of ``FOLDER/train.jsonl``. The student is
every second layer of the encoder. Batches are padded or packed (``metakd.models.packing``), their
examples drawn at random or grouped by length (``metakd.data.StepSampler``). Packed and padded steps
see the same batches and must give the same loss (those with next to no padding run alike, which
shows the noise); all four and a large matrix product take turns, so
that a drift of the machine hits all alike.

Steps differ in length, so tokens are counted: real ones, padding never; the rate is the median over
the steps. Samples/s is tokens/s over the mean length of the corpus. "Of padded" is the median over
the steps of the time of a padded step over that of the packed step on the same batch. "Of padded,
grouped" compares tokens/s. Model flops of a batch whose examples have n_i real tokens are

    sum_i n_i (6 N_s + 2 N_t) + sum_i n_i^2 (12 l_s H_s + 4 l_t H_t)

with N the weights in the matrices of the layers and l the layers of student and teacher: a forward
pass multiplies and adds once per weight, and 2 n^2 H times for each of scores and mixed values; a
backward pass costs twice a forward pass. Embeddings, heads and losses, which are small, count as
nothing. MFU is that over the time and over the rate of the matrix product, which is of the same
dtype. Writes ``results/<device>/throughput.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.reports import table
from benchmarks.run import (
    environment,
    heading,
    inner_quantiles,
    large_product,
    read_options,
    write_report,
)
from benchmarks.step import training
from metakd.config import DataConfig, DistillConfig
from metakd.data.batches import StepSampler, collate
from metakd.data.corpus import Corpus, Split, load_corpus
from metakd.method.methods import build_terms
from metakd.method.objective import Distillation
from metakd.method.teachers import FrozenTeacher, Teacher
from metakd.models.student import keep_layers, load_classifier
from metakd.models.taps import encoder_layers

LAYOUTS = {  # name -> packed, grouped by length
    "padded, random": (False, False),
    "padded, grouped": (False, True),
    "packed, random": (True, False),
    "packed, grouped": (True, True),
}


def matrix_weights(model: nn.Module) -> int:
    """N: weights in the matrices of the layers."""
    return sum(p.numel() for p in encoder_layers(model).parameters() if p.dim() == 2)


@dataclass
class Scene:
    """A teacher, its student, and a step for padded and for packed batches."""

    corpus: Corpus
    encoder: str
    device: torch.device
    dtype: torch.dtype
    method: str = "meta"

    def __post_init__(self):
        torch.manual_seed(0)
        model = load_classifier(self.encoder, self.corpus.label2id)
        self.student = keep_layers(model, list(range(1, model.config.num_hidden_layers, 2)))
        self.teacher = Teacher(model, "meta", self.corpus.domains).to(self.device, self.dtype)
        config = DistillConfig(method=self.method)
        layers = (len(encoder_layers(m)) for m in (self.student, model))
        self.terms = build_terms(config, **dict(zip(("student_layers", "teacher_layers"), layers)))

    def distillation(self, packed: bool) -> tuple[Distillation, FrozenTeacher]:
        torch.manual_seed(1)
        module = Distillation(
            self.student,
            self.terms,
            teacher_hidden=self.teacher.model.config.hidden_size,
            num_domains=len(self.corpus.domains),
            weigh_by_expertise=self.method == "meta",
            packed=packed,
        ).to(self.device, self.dtype)
        needs = module.needs | {"logits"}
        return module, FrozenTeacher([self.teacher], needs, packed=packed)

    def model_flops(self, lengths: Tensor) -> float:
        """Of one step on examples of these lengths [B]."""
        linear = square = 0
        for model, passes in ((self.student, 3), (self.teacher.model, 1)):
            linear += 2 * passes * matrix_weights(model)
            square += 4 * passes * len(encoder_layers(model)) * model.config.hidden_size
        return float(lengths.sum()) * linear + float(lengths.square().sum()) * square


def check_same_loss(pairs: dict[str, tuple], batch: dict[str, Tensor], dtype) -> None:
    """Stops the benchmark where one of these pairs of module and teacher gives another loss than
    the first; dropout is off for it."""
    losses = {}
    for name, (module, teacher) in pairs.items():
        module.eval()
        with torch.no_grad():
            losses[name] = float(module(batch, teacher(batch)).rows.mean())
        module.train()
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    first, *others = losses.values()
    if any(abs(other - first) > tolerance * abs(first) for other in others):
        raise SystemExit(f"nothing is timed, as losses differ: {losses}")


def timed(function: Callable, *inputs) -> float:
    start = time.perf_counter()
    function(*inputs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def rates(amounts: list[float], seconds: list[float]) -> list[float]:
    return [a / s for a, s in zip(amounts, seconds, strict=True)]


def measure(scene: Scene, tokenizer, batch_size: int, budget_s: float) -> dict:
    train: Split = scene.corpus.train.with_column("t", torch.rand(len(scene.corpus.train)))
    lengths = torch.tensor(train.lengths)
    plans = {
        grouped: [
            micro
            for (micro,) in StepSampler(
                train.lengths,
                step_size=batch_size,
                micro_batches=1,
                seed=0,
                group_by_length=grouped,
            ).epoch(0)
        ]
        for grouped in (False, True)
    }
    modules = {packed: scene.distillation(packed) for packed in (False, True)}
    pads = {packed: collate(tokenizer, packed=packed) for packed in (False, True)}

    def batch_of(rows: list[int], packed: bool) -> dict[str, Tensor]:
        batch = pads[packed]([train[row] for row in rows])
        return {name: value.to(scene.device) for name, value in batch.items()}

    pairs = {"padded": modules[False], "packed": modules[True]}
    check_same_loss(pairs, batch_of(plans[False][0], packed=True), scene.dtype)
    steps = {}
    for packed, (module, frozen) in modules.items():
        learn = training(module, lambda b, m=module, f=frozen: m(b, f(b)).rows.mean())
        steps[packed] = lambda rows, p=packed, s=learn: s(batch_of(rows, p))
        steps[packed](plans[False][0])  # warm

    product, product_flops = large_product(scene.device.type, scene.dtype)
    product()
    seconds = {name: [] for name in (*LAYOUTS, "product")}
    end = time.perf_counter() + budget_s
    count = 0
    while count < min(map(len, plans.values())) and (count < 5 or time.perf_counter() < end):
        for name, (packed, grouped) in LAYOUTS.items():
            seconds[name].append(timed(steps[packed], plans[grouped][count]))
        seconds["product"].append(timed(product))
        count += 1

    rate = product_flops / statistics.median(seconds["product"])
    rows = {}
    for name, (_, grouped) in LAYOUTS.items():
        sizes = [lengths[micro] for micro in plans[grouped][:count]]
        padded = [p / s for p, s in zip(seconds[name.replace("packed", "padded")], seconds[name])]
        tokens = rates([int(n.sum()) for n in sizes], seconds[name])
        tokens_per_s = statistics.median(tokens)
        flops = rates(list(map(scene.model_flops, sizes)), seconds[name])
        rows[name] = {
            "tokens_per_s": tokens_per_s,
            "tokens_per_s_quantiles": inner_quantiles(tokens),
            "samples_per_s": tokens_per_s / float(lengths.double().mean()),
            "padding": 1
            - sum(int(n.sum()) for n in sizes) / sum(len(n) * int(n.max()) for n in sizes),
            "times_padded": statistics.median(padded),
            "times_padded_quantiles": inner_quantiles(padded),
            "mfu": statistics.median(flops) / rate,
            "seconds": seconds[name],
        }
    for row in rows.values():
        row["times_padded_grouped"] = row["tokens_per_s"] / rows["padded, grouped"]["tokens_per_s"]
    examples = plans[False][0]
    return {
        "max_length": int(lengths.max()),
        "mean_length": float(lengths.double().mean()),
        "batch": batch_size,
        "dtype": str(scene.dtype).removeprefix("torch."),
        "steps": count,
        "matmul": rate,
        "matmul_slowest_and_fastest": [
            product_flops / pick(seconds["product"]) for pick in (max, min)
        ],
        "load": os.getloadavg(),
        "collate_s": statistics.median(timed(batch_of, examples, True) for _ in range(20)),
        "layouts": rows,
    }


def markdown(report: dict) -> str:
    lines = [
        "# Throughput of distillation on review texts",
        "",
        *heading(report["environment"]),
        f"Encoder of {report['layers'][0]} layers to {report['layers'][1]} of them, Meta-KD with "
        "all terms, dropout on",
    ]
    for row in report["rows"]:
        slowest, fastest = (rate / 1e9 for rate in row["matmul_slowest_and_fastest"])
        step = statistics.median(row["layouts"]["packed, random"]["seconds"])
        cells = []
        for name, entry in row["layouts"].items():
            low, high = entry["times_padded_quantiles"]
            times = f"{entry['times_padded']:.2f} ({low:.2f}-{high:.2f})"
            cells.append(
                (
                    name,
                    f"{entry['padding']:.1%}",
                    f"{entry['tokens_per_s']:.0f}",
                    f"{entry['samples_per_s']:.1f}",
                    times if "packed" in name else "1",
                    f"{entry['times_padded_grouped']:.2f}",
                    f"{entry['mfu']:.0%}",
                )
            )
        columns = ("padding", "tokens/s", "samples/s", "of padded (20-80 %)")
        lines += [
            "",
            f"## Up to {row['max_length']} tokens (mean {row['mean_length']:.0f}), batch "
            f"{row['batch']}, {row['dtype']}",
            "",
            f"{row['steps']} steps of each, in turn. Matrix products between them: median "
            f"{row['matmul'] / 1e9:.0f}, {slowest:.0f} to {fastest:.0f} Gflop/s; the machine's "
            f"load at the end: {row['load'][0]:.1f}. Collating, which prefetching could hide, is "
            f"{row['collate_s'] / step:.2%} of a packed step.",
            "",
            table(("", *columns, "of padded, grouped", "MFU"), cells),
        ]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Texts:
    """What benchmarks on texts are asked, see ``read_text_options``.

    Args:
        options: the whole command line.
        device: to run on.
        dtype: of the models.
        tokenizer: of the encoder.
    """

    options: argparse.Namespace
    device: torch.device
    dtype: torch.dtype
    tokenizer: PreTrainedTokenizerBase

    def corpus(self, max_length: int) -> Corpus:
        """The texts, cut at so many tokens."""
        data = DataConfig(train=str(self.options.data / "train.jsonl"), max_length=max_length)
        return load_corpus(data, self.tokenizer)


def read_text_options(parser: argparse.ArgumentParser, seconds: float, per: str) -> Texts:
    """``read_options`` of a benchmark that reads texts and an encoder."""
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl")
    parser.add_argument("--encoder", required=True, help="folder of a BERT-like encoder")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 on a CPU")
    parser.add_argument("--batch", type=int, default=16)
    options = read_options(parser, seconds, per)
    for needed in (options.data / "train.jsonl", Path(options.encoder) / "config.json"):
        if not needed.exists():
            raise SystemExit(f"nothing is timed: {needed} does not exist")
    device = torch.device(options.device)
    usual = "bfloat16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, options.dtype or usual)
    return Texts(options, device, dtype, AutoTokenizer.from_pretrained(options.encoder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-length", type=int, nargs="+", default=[128, 256])
    texts = read_text_options(parser, 130.0, "length")
    options, device = texts.options, texts.device
    report = {"environment": environment(device.type, options.threads), "rows": []}
    for max_length in options.max_length:
        scene = Scene(texts.corpus(max_length), options.encoder, device, texts.dtype)
        models = scene.teacher.model, scene.student
        report["layers"] = [len(encoder_layers(model)) for model in models]
        report["rows"].append(measure(scene, texts.tokenizer, options.batch, options.seconds))
    write_report("throughput", report, markdown(report), device.type, options.out)


if __name__ == "__main__":
    main()
