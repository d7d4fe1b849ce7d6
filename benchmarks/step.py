"""Times whole distillation steps: ``python -m benchmarks.step --device cpu``.

A step is the teacher's forward pass, the student's forward and backward pass and the optimizer, on
random weights and full-length random tokens. What the knowledge-distillation losses cost is the
"KD tax": the time of a step with them over that of a step without. The rival is the loop that
TinyBERT and TextBrewer made common: ``output_attentions`` through eager attention, maps of every
layer of both models in memory, one ``mse_loss`` each. Its loss is checked to be ours.

Shapes: ``paper``, 12 layers of 768 to 4 layers of 312 (BERT-base and TinyBERT-4L-312), batch 32;
``small``, 6 layers of 384 to 3 of 384, batch 8. "Kept" is what a step holds for its backward pass,
weights aside. Writes ``results/<device>/step.json`` and ``.md``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertForSequenceClassification,
)
from transformers.masking_utils import eager_mask

from benchmarks.registry import attempt, give_memory_back
from benchmarks.reports import table
from benchmarks.run import (
    described,
    environment,
    heading,
    matmul_rate,
    of_each,
    peak_memory,
    quantiles,
    read_options,
    same_losses,
    write_report,
)
from metakd.config import DistillConfig
from metakd.method.methods import build_terms
from metakd.method.objective import Distillation
from metakd.method.teachers import FrozenTeacher, Teacher
from metakd.method.terms import layer_map

DOMAINS = ["books", "dvd", "electronics", "kitchen"]
CLASSES = 2


@dataclass(frozen=True)
class Encoder:
    layers: int
    hidden: int
    intermediate: int
    heads: int = 12

    def build(self, attention: str, device: str, dtype: torch.dtype) -> nn.Module:
        config = BertConfig(
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_attention_heads=self.heads,
            num_labels=CLASSES,
            # Without dropout all contenders compute the same loss.
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            attn_implementation=attention,
        )
        return BertForSequenceClassification(config).to(device, dtype)


SIZES = {
    "paper": (Encoder(12, 768, 3072), Encoder(4, 312, 1200), ((32, 128), (32, 512))),
    "small": (Encoder(6, 384, 1536), Encoder(3, 384, 1536), ((8, 128),)),
}


@dataclass
class Scene:
    """Models and a batch; every contender gets its own, from the same seed."""

    size: str
    batch: int
    length: int
    device: str
    dtype: torch.dtype

    def models(self, attention: str) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        teacher, student, _ = SIZES[self.size]
        return (
            teacher.build(attention, self.device, self.dtype).eval(),
            student.build(attention, self.device, self.dtype).train(),
        )

    def projections(self) -> dict[str, nn.Parameter]:
        """[H_s, H_t] as ``Distillation`` draws them after the seed of ``ours``."""
        wide, narrow, _ = SIZES[self.size]
        if wide.hidden == narrow.hidden:
            return {}
        torch.manual_seed(2)
        drawn = {}
        for name in ("embedding", "hidden"):
            weight = nn.init.normal_(
                torch.empty(narrow.hidden, wide.hidden), std=narrow.hidden**-0.5
            )
            drawn[name] = nn.Parameter(weight.to(self.device, self.dtype))
        return drawn

    def tokens(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        rows = (self.batch,)

        def integers(high: int, *shape: int) -> Tensor:
            return torch.randint(high, shape, generator=generator).to(self.device)

        return {
            "input_ids": integers(30000, *rows, self.length),
            "attention_mask": torch.ones(*rows, self.length, dtype=torch.long, device=self.device),
            "labels": integers(CLASSES, *rows),
            "domain": integers(len(DOMAINS), *rows),
            "t": torch.rand(rows, generator=generator).to(self.device),
        }


def training(module: nn.Module, loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # A learning rate of 0 costs what any other does and leaves the losses comparable.
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, weight_decay=0.0)

    def step(*inputs) -> Tensor:
        value = loss(*inputs)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


# Contenders: Scene -> a step that returns its loss


def without_kd(scene: Scene) -> Callable[[], Tensor]:
    """Teacher's forward pass and a student that learns from hard labels."""
    teacher, student = scene.models("sdpa")
    batch = scene.tokens()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def loss() -> Tensor:
        with torch.no_grad():
            teacher(**inputs)
        return F.cross_entropy(student(**inputs).logits.float(), batch["labels"])

    return training(student, loss)


def ours(method: str, backend: str) -> Callable[[Scene], Callable[[], Tensor]]:
    def build(scene: Scene) -> Callable[[], Tensor]:
        model, student = scene.models("sdpa")
        kind = "meta" if method == "meta" else "mix"
        teacher = Teacher(model, kind, DOMAINS).to(scene.device, scene.dtype)
        config = DistillConfig(method=method, backend=backend)
        wide, narrow, _ = SIZES[scene.size]
        terms = build_terms(config, student_layers=narrow.layers, teacher_layers=wide.layers)
        torch.manual_seed(2)
        module = Distillation(
            student,
            terms,
            teacher_hidden=wide.hidden,
            num_domains=len(DOMAINS),
            weigh_by_expertise=method == "meta",
        ).to(scene.device, scene.dtype)
        frozen = FrozenTeacher([teacher], module.needs | {"logits"})
        batch = scene.tokens()
        return training(module, lambda: module(batch, frozen(batch)).rows.mean())

    return build


def _attention_with_scores(module, query, key, value, attention_mask, scaling=None, **_):
    """Eager attention that hands out its scores before the softmax, as TinyBERT's does."""
    scores = (query @ key.mT) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if attention_mask is not None:
        scores = scores + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), scores


EAGER = "benchmark_scores"
AttentionInterface.register(EAGER, _attention_with_scores)
AttentionMaskInterface.register(EAGER, eager_mask)


def eager_loop(scene: Scene) -> Callable[[], Tensor]:
    """TinyBERT's loop: all maps and hidden states of both models, one mse_loss each."""
    teacher, student = scene.models(EAGER)
    wide, narrow, _ = SIZES[scene.size]
    projections = nn.ParameterDict(scene.projections())
    module = nn.ModuleList([student, projections])
    batch = scene.tokens()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    matched = layer_map("uniform", narrow.layers, wide.layers)

    def unmasked(scores: Tensor) -> Tensor:
        return torch.where(scores <= -1e2, torch.zeros_like(scores), scores)

    def project(name: str, states: Tensor) -> Tensor:
        return states @ projections[name] if name in projections else states

    def loss() -> Tensor:
        wanted = {"output_hidden_states": True, "output_attentions": True}
        with torch.no_grad():
            taught = teacher(**inputs, **wanted)
        seen = student(**inputs, **wanted)
        total = F.mse_loss(
            project("embedding", seen.hidden_states[0]).float(), taught.hidden_states[0].float()
        )
        for own, layer in enumerate(matched):
            total = total + F.mse_loss(
                project("hidden", seen.hidden_states[own + 1]).float(),
                taught.hidden_states[layer + 1].float(),
            )
            total = total + F.mse_loss(
                unmasked(seen.attentions[own]).float(), unmasked(taught.attentions[layer]).float()
            )
        log_s, log_t = (x.logits.float().log_softmax(-1) for x in (seen, taught))
        return total + F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)

    return training(module, loss)


def textbrewer(scene: Scene) -> Callable[[], Tensor]:
    """TextBrewer's own distiller on the same maps and states. Its prediction loss is the
    cross-entropy, which is the KL and the teacher's entropy."""
    from textbrewer import DistillationConfig as Matches
    from textbrewer import GeneralDistiller, TrainingConfig

    teacher, student = scene.models(EAGER)
    wide, narrow, _ = SIZES[scene.size]
    projections = scene.projections()

    def match(feature: str, own: int, layer: int, projection: str) -> dict:
        found = {"layer_T": layer, "layer_S": own, "feature": feature, "loss": f"{feature}_mse"}
        if projection in projections:
            found["proj"] = ["linear", narrow.hidden, wide.hidden]
        return found | {"weight": 1.0}

    matched = list(enumerate(layer_map("uniform", narrow.layers, wide.layers)))
    matches = [match("hidden", 0, 0, "embedding")]
    matches += [match("hidden", own + 1, layer + 1, "hidden") for own, layer in matched]
    matches += [match("attention", own, layer, "") for own, layer in matched]

    def adapt(batch, outputs) -> dict:
        return {
            "logits": outputs.logits.float(),
            "hidden": outputs.hidden_states,
            "attention": outputs.attentions,
            "inputs_mask": batch["attention_mask"],
        }

    with tempfile.TemporaryDirectory() as folder:
        config = TrainingConfig(output_dir=folder, device=scene.device)
    distiller = GeneralDistiller(
        config,
        Matches(temperature=1, hard_label_weight=0, intermediate_matches=matches),
        *(teacher, student, adapt, adapt),
    )
    module = nn.ModuleList([student, *(x for x in distiller.projs if x is not None)])
    for number, linear in enumerate(module[1:]):
        linear.to(scene.dtype)
        nn.init.zeros_(linear.bias)
        linear.weight.data.copy_(projections["hidden" if number else "embedding"].mT)
    batch = scene.tokens()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    wanted = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        log_t = teacher(**inputs).logits.float().log_softmax(-1)
    entropy = -(log_t.exp() * log_t).sum(-1).mean()
    return training(module, lambda: distiller.train_on_batch(inputs, wanted)[0] - entropy)


CONTENDERS = {
    "no KD loss": without_kd,
    "metakd": ours("tinybert_kd", "auto"),
    "metakd, meta-distillation": ours("meta", "auto"),
    "metakd, reference backend": ours("tinybert_kd", "reference"),
    "eager output_attentions loop": eager_loop,
    "TextBrewer": textbrewer,
}
OTHER_LOSS = ("no KD loss", "metakd, meta-distillation")
NEEDED = ("no KD loss", "metakd")  # what the others are measured by


def kept_for_backward(step: Callable[[], Tensor]) -> int:
    """Bytes of the distinct tensors that one step keeps for its backward pass, weights aside."""
    kept = {}

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    return sum(kept.values())


def measure(scene: Scene, budget_s: float, rate: float, problems: list[str]) -> dict:
    """One row of the report; ``problems`` takes what must not pass in silence.

    Raises:
        RuntimeError: what the others are measured by does not run.
    """
    absent: dict[str, str] = {}

    def refuse_without_needed() -> None:
        if missing := [f"{name}: {absent[name]}" for name in NEEDED if name in absent]:
            raise RuntimeError("; ".join(missing))

    steps = of_each(CONTENDERS, absent, lambda build: build(scene))
    losses = of_each(steps, absent, lambda step: float(step()))
    refuse_without_needed()
    # Half precision rounds the maps that the loop compares.
    tolerance = 1e-4 if scene.dtype == torch.float32 else 2e-2
    alike = {name: loss for name, loss in losses.items() if name not in OTHER_LOSS}
    wrong = same_losses(alike, "metakd", tolerance, absent)
    wrong += [name for name in OTHER_LOSS if name in absent]
    problems += [f"{name}: {absent[name]}" for name in wrong]
    steps = {name: step for name, step in steps.items() if name not in absent}
    with FlopCounterMode(display=False) as counter:
        steps["no KD loss"]()
    times = quantiles(steps, scene.device, budget_s, absent)
    refuse_without_needed()
    without = times["no KD loss"][0]
    rows = {}
    for name, found in times.items():
        rows[name] = described(*found) | {
            "samples_per_s": 1e3 * scene.batch / found[0],
            "of_no_kd": found[0] / without,
            "times_ours": found[0] / times["metakd"][0],
            "kept_bytes": kept_for_backward(steps[name]),
            "loss": losses[name],
        }
        if scene.device == "cuda":
            rows[name]["peak_extra_bytes"] = peak_memory(steps[name])
    return {
        "shape": f"{scene.size}: batch {scene.batch}, length {scene.length}",
        "dtype": str(scene.dtype).removeprefix("torch."),
        "flops_no_kd": counter.get_total_flops(),
        "mfu_no_kd": counter.get_total_flops() / (1e-3 * without) / rate,
        "contenders": rows,
        "absent": absent,
    }


def markdown(report: dict) -> str:
    lines = [
        "# A distillation step",
        "",
        *heading(report["environment"]),
        f"Matrix products of the same dtype in the same run: {report['matmul'] / 1e9:.0f} Gflop/s",
    ]
    for row in report["rows"]:
        cells = []
        for name, entry in row["contenders"].items():
            peak = entry.get("peak_extra_bytes")
            cells.append(
                (
                    name,
                    f"{entry['median_ms']:.1f}",
                    f"{entry['p20_ms']:.1f}-{entry['p80_ms']:.1f}",
                    f"{entry['samples_per_s']:.1f}",
                    f"{entry['of_no_kd']:.3f}",
                    f"{entry['times_ours']:.2f}",
                    f"{entry['kept_bytes'] / 2**20:.0f}",
                    "-" if peak is None else f"{peak / 2**20:.0f}",
                )
            )
        columns = ("median ms", "20-80 %", "samples/s", "KD tax", "times ours", "kept MiB")
        lines += [
            "",
            f"## {row['shape']}, {row['dtype']}",
            "",
            f"Without a KD loss {row['mfu_no_kd']:.0%} of that rate.",
            "",
            table(("", *columns, "peak MiB"), cells, absent=row["absent"]),
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, help="by default paper on CUDA, small on a CPU")
    parser.add_argument("--length", type=int, help="only this one")
    options = read_options(parser, 120.0, "shape, on a CPU")
    device = options.device
    size = options.size or ("paper" if device == "cuda" else "small")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    scenes = [
        Scene(size, batch, length, device, dtype)
        for batch, length in SIZES[size][2]
        if options.length in (None, length)
    ]
    rate = matmul_rate(device, dtype)
    problems: list[str] = []
    failed: dict[str, str] = {}
    report = {
        "environment": environment(device, options.threads),
        "matmul": rate,
        "rows": [],
    }
    for scene in scenes:
        doing = partial(measure, scene, options.seconds, rate, problems)
        row = attempt(f"batch {scene.batch}, length {scene.length}", failed, doing)
        report["rows"] += [] if row is None else [row]
        give_memory_back()
    write_report("step", report, markdown(report), device, options.out)
    problems += [f"{name}: {reason}" for name, reason in failed.items()]
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
