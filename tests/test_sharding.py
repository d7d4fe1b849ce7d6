"""Two processes that shard a student, a teacher, both, give what two that replicate give."""

import json
from pathlib import Path

import pytest
import torch
from processes import run_ranks
from rich.console import Console
from safetensors.torch import load_file
from tiny_runs import SETTINGS, make_source, rows_of, write_config

from metakd.config import load_config
from metakd.pipeline.serving import TeacherService
from metakd.pipeline.stages import Run
from metakd.training.world import join_world

# DeepSpeed keeps small weights whole; with these settings every weight of a tiny model is sharded.
EVERY_WEIGHT = "deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"
STEPS = 12
VARIANTS = {
    "replicated": [],
    "optimizers sharded": ["zero=1"],
    "gradients sharded": ["zero=2"],
    "student sharded": ["student.zero=3", EVERY_WEIGHT],
    "both sharded": ["zero=3", EVERY_WEIGHT],
    "both sharded, packed": ["zero=3", EVERY_WEIGHT, "packed=true"],
    "student's optimizer in host memory": ["student.zero=2", "student.offload=true"],
    "student and optimizer in host memory": ["student.zero=3", "student.offload=true"],
    "activations recomputed": [
        "distill.training.gradient_checkpointing=true",
        "teacher.training.gradient_checkpointing=true",
    ],
    "outputs of a sharded teacher cached": [
        "teacher.zero=3",
        EVERY_WEIGHT,
        "distill.cache_teacher=all",
    ],
    "both sharded, activations recomputed": [
        "zero=3",
        EVERY_WEIGHT,
        "distill.training.gradient_checkpointing=true",
    ],
}


def worker(source: Path, folder: Path) -> None:
    """Train the same student in every variant, and ask a teacher in shards and a whole one."""
    world = join_world()
    for number, options in enumerate(VARIANTS.values()):
        path = folder / f"{number}.yaml"
        if world.is_main:
            write_config(source, folder, str(number))
        world.barrier()
        run = Run(
            load_config(
                str(path),
                [
                    "distill.one_student_for_all=true",
                    # Of another width: projections are sharded too.
                    f"student={{model: {source / 'small'}}}",
                    "distill.training.num_train_epochs=9",
                    f"distill.training.max_steps={STEPS}",
                    "distill.training.per_device_train_batch_size=4",
                    *options,
                ],
            ),
            world,
            Console(quiet=True),
        )
        run.distill()
        if number == 0:
            [teacher] = run.teach()
            train = run.corpus.train
            # Another batch on each rank, as in training.
            rows = range(world.rank * 5, world.rank * 5 + 5)
            batch = run.collate([train[row] for row in rows])
    needs = frozenset({"logits", "hidden", "query", "key", "domain", "embedding"})
    seen = []
    for options in (
        [],
        ["teacher.zero=3", EVERY_WEIGHT],
        ["teacher.zero=3", "teacher.offload=true"],
    ):
        config = load_config(str(folder / "0.yaml"), options)
        service = TeacherService([teacher], config, run.recipe, world)
        held = sum(getattr(p, "ds_tensor", p).numel() for p in service.teachers[0].parameters())
        with service.showing(needs) as show:
            features = show(batch)
        assert features.logits.shape == (len(rows), 2)
        flat = [features.logits, features.domain, features.embedding, *features.hidden]
        seen.append((held, [*flat, *features.query, *features.key]))
    (whole, expected), *others = seen
    for _, features in others:
        for value, wanted in zip(features, expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)
    if world.is_main:
        shares = [held / whole for held, _ in others]
        (folder / "shares.json").write_text(json.dumps(shares))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The runs of all variants, by two processes."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("sharding")
    make_source(source)
    run_ranks(2, worker, source, folder)
    return folder


def student(folder: Path, variant: str) -> Path:
    [place] = (folder / str(list(VARIANTS).index(variant)) / "students").glob("*/all")
    return place


@pytest.mark.parametrize("variant", list(VARIANTS)[1:])
def test_the_same_student(trained, variant):
    plain, other = student(trained, "replicated"), student(trained, variant)
    losses = [
        torch.tensor([row["loss"] for row in rows_of(place / "log.jsonl") if "loss" in row])
        for place in (plain, other)
    ]
    assert len(losses[0]) == STEPS and SETTINGS["logging_steps"] == 1
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-5)
    expected = load_file(plain / "model.safetensors")
    weights = load_file(other / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4, msg=name)


def test_a_sharded_teacher_is_held_in_halves(trained):
    """And shows the same features, which the worker has compared."""
    every_weight, large_weights = json.loads((trained / "shares.json").read_text())
    assert 0.5 <= every_weight < 0.52
    assert 0.5 <= large_weights <= 1.0


def test_prototypes_of_a_sharded_encoder(trained):
    whole, sharded = (
        load_file(trained / str(list(VARIANTS).index(name)) / "prototypes" / "scores.safetensors")
        for name in ("replicated", "both sharded")
    )
    torch.testing.assert_close(sharded["t"], whole["t"], rtol=0, atol=1e-5)
