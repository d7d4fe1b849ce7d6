"""A checkpoint of two processes taken up by one, and of one by two, at every ZeRO stage: the same
master weights, moments and temperature, bit for bit."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from processes import run_ranks
from rich.console import Console

from metakd.config import RunConfig, Sharding, TrainingConfig
from metakd.data.corpus import Split, Tokens
from metakd.errors import CheckpointError
from metakd.method.teachers import StepOutput
from metakd.method.temperature import Temperature
from metakd.training import engine
from metakd.training import saves as saving
from metakd.training.checkpoint import Checkpoints
from metakd.training.log import RunLog
from metakd.training.world import join_world

CELLS = [(zero, precision) for zero in range(4) for precision in ("fp32", "bf16")]
STEPS = 3


class Classifier(torch.nn.Module):
    """Sizes that two processes cannot share evenly, both parameter groups, and what is frozen."""

    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(31, 7)
        self.norm = torch.nn.LayerNorm(7)
        self.out = torch.nn.Linear(7, 3)
        self.scale = torch.nn.Parameter(torch.randn(1, 7), requires_grad=False)

    def forward(self, batch):
        logits = self.out(self.norm(self.words(batch["input_ids"]).mean(1)) * self.scale).float()
        rows = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        return StepOutput(rows, {})


def collate(examples):
    batch = {name: torch.stack([e[name] for e in examples]) for name in ("labels", "index")}
    return {"input_ids": torch.tensor([e["input_ids"] for e in examples]), **batch}


def train(world, folder: Path, zero: int, precision: str, max_steps: int, reshard: bool = False):
    torch.manual_seed(1)
    words = torch.randint(31, (24 * 5,), generator=torch.Generator().manual_seed(0))
    split = Split(
        Tokens(words, torch.full((24,), 5)),
        torch.arange(24) % 3,
        torch.zeros(24, dtype=torch.long),
        torch.arange(24),
    )
    config = RunConfig(
        output_dir="unused",
        data={"train": "unused"},
        teacher={"model": "unused"},
        student={"preset": "tiny-2l-128"},
        bf16=precision == "bf16",
        # DeepSpeed would keep weights as small as these whole.
        deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}},
        save_steps=STEPS,
    )
    # Eight examples a step, however many processes.
    training = TrainingConfig(
        per_device_train_batch_size=8 // world.size, num_train_epochs=9, max_steps=max_steps
    )
    checkpoints = Checkpoints(folder, world, say=lambda text: None)
    saves = saving.Saves(checkpoints, checkpoints.find("auto"), reshard=reshard)
    engine.fit(
        Classifier(),
        split,
        collate,
        config=config,
        training=training,
        sharding=Sharding(zero),
        world=world,
        log=RunLog(None, [], Console(quiet=True)),
        title="test",
        seed=3,
        saves=saves,
        temperature=Temperature("loss", 2.0, 6.0),
    )


def heard(keeper) -> str:
    """The state of the temperature, and what all processes have heard since it was set."""
    parts = keeper.world.gather(keeper.heard.state())
    losses = [part["sums"]["loss"] for part in parts if part["sums"]]
    told = [keeper.temperature.state(), sum(losses).item(), sum(p["examples"] for p in parts)]
    return json.dumps(told)


def states(ds_engine) -> dict[str, str]:
    """A digest of every parameter's master weight and moments."""
    if hasattr(ds_engine.optimizer, "_hp_optimizer_states_linked"):
        # DeepSpeed links moments to parameters once, when the second group has none yet.
        ds_engine.optimizer._hp_optimizer_states_linked = False
        ds_engine.optimizer._lazy_init_hp_params_optimizer_state()
    plain = ds_engine.optimizer.state if not ds_engine.zero_optimization() else {}
    found = {}
    for name, parameter in ds_engine.module.named_parameters():
        if not parameter.requires_grad:
            with GatheredParameters(parameter):
                values = [parameter.float().clone()]
        elif ds_engine.zero_optimization():
            values = [safe_get_full_fp32_param(parameter)] + [
                safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")
            ]
        else:  # replicated as it is: nothing that could be cut wrongly
            values = [parameter.float(), *(plain.get(parameter) or {}).values()]
        content = b"".join(value.detach().float().cpu().numpy().tobytes() for value in values)
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def worker(folder: Path, reading: str) -> None:
    """Take up the checkpoints under ``folder/reading``, if any, and write those of this world."""
    world = join_world()
    engine.UPDATES = 2  # the third of four steps is heard and not yet told
    keep = saving.Keeper.restore
    seen = {}
    for zero, precision in CELLS:
        cell = f"{zero}-{precision}"

        def restore(keeper, *arguments, cell=cell):
            keep(keeper, *arguments)
            if keeper.saves.start is not None:
                seen[cell] = states(keeper.engine) | {"heard": heard(keeper)}

        saving.Keeper.restore = restore
        if reading:
            if zero and precision == "fp32":
                with pytest.raises(CheckpointError, match=r"process(es)?, this run has"):
                    train(world, folder / reading / cell, zero, precision, STEPS + 1)
            train(world, folder / reading / cell, zero, precision, STEPS + 1, reshard=True)
            continue
        save = saving.Keeper.save

        def note(keeper, cell=cell, save=save):
            save(keeper)
            seen[cell] = states(keeper.engine) | {"heard": heard(keeper)}

        saving.Keeper.save = note
        train(world, folder / str(world.size) / cell, zero, precision, STEPS + 1)
        saving.Keeper.save = save
    if world.is_main:
        name = f"{world.size}-from-{reading}" if reading else f"{world.size}"
        (folder / f"{name}.json").write_text(json.dumps(seen))


def launch(processes: int, folder: Path, reading: str = "") -> dict:
    run_ranks(processes, worker, folder, reading)
    name = f"{processes}-from-{reading}" if reading else f"{processes}"
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_resharded_states_are_bit_equal(before, after, tmp_path):
    written = launch(before, tmp_path)
    assert launch(after, tmp_path, str(before)) == written
    assert len(written) == len(CELLS)
