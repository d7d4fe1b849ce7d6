"""What a training run saves of itself, and how it goes on from there as if nothing had happened."""

from __future__ import annotations

from dataclasses import dataclass, field

import deepspeed
import safetensors.torch
import torch
from torch import Tensor

from metakd import __version__
from metakd.errors import CheckpointError, DivergedError, StoppedError
from metakd.method.temperature import Temperature
from metakd.training.checkpoint import (
    Checkpoints,
    HashedFiles,
    Tag,
    random_state,
    restore_random_state,
    safe_load,
)
from metakd.training.log import Meter, RunLog
from metakd.training.reshard import ReshardedFiles
from metakd.training.shards import own_part
from metakd.training.world import World

BEST_WEIGHTS = "best.safetensors"
_VERSIONS = {"metakd": __version__, "torch": torch.__version__, "deepspeed": deepspeed.__version__}


@dataclass
class Saves:
    """Where a stage's training is saved and where it goes on.

    Args:
        checkpoints: of the stage.
        start: the checkpoint to go on from; None starts afresh.
        inputs: digest of everything that decides the result; a checkpoint of others is refused.
        reshard: go on from a checkpoint of another number of processes, with as many examples in a
            step as before.
        phase: 0-based number of this ``fit`` among those of the stage.
        last_phase: is no other ``fit`` to follow?
    """

    checkpoints: Checkpoints
    start: Tag | None = None
    inputs: str = ""
    reshard: bool = False
    phase: int = 0
    last_phase: bool = True


@dataclass
class Position:
    """Where a run is: what a checkpoint has to bring back beside weights and moments."""

    step: int = 0
    epochs_scored: int = 0
    skipped_in_a_row: int = 0
    best: dict[str, float] = field(default_factory=dict)
    averaged: int = 0  # how many weights those below are the mean of; 0 if they were chosen
    best_weights: dict[str, Tensor] | None = None  # on the first rank only


@dataclass
class Keeper:
    """Writes the state of one ``fit`` to checkpoints and brings it back."""

    engine: deepspeed.DeepSpeedEngine
    saves: Saves | None
    world: World
    log: RunLog
    meter: Meter
    position: Position
    temperature: Temperature | None = None
    heard: Meter = field(default_factory=Meter)  # losses since the temperature was set
    _saved_step: int | None = None

    def __post_init__(self):
        # DeepSpeed would put a script beside the tags, unhashed and outside of them.
        self.engine._copy_recovery_script = lambda folder: None

    def move_temperature(self, progress: float) -> None:
        """Set the temperature, if there is one that moves, by what all ranks have heard.

        Args:
            progress: share of the run that is done.
        """
        if self.temperature is not None:
            self.temperature.update(progress, self.heard.read(self.world).get("loss"))

    def save(self) -> None:
        """Publish a checkpoint of the last finished step."""
        if self.saves is None:
            return
        self._refuse_non_finite()
        saves, position = self.saves, self.position
        facts = {**self.facts, "phase": saves.phase, "step": position.step, "versions": _VERSIONS}
        own = {
            "random": random_state(self.world.device),
            "meter": self.meter.state(),
            "log": self.log.position(),
            "epochs_scored": position.epochs_scored,
            "skipped_in_a_row": position.skipped_in_a_row,
            "best": position.best,
            "averaged": position.averaged,
        }
        if self.temperature is not None:
            own |= {"temperature": self.temperature.state(), "heard": self.heard.state()}

        def write(files: HashedFiles) -> None:
            self.engine.checkpoint_engine = files
            self.engine.save_checkpoint(
                str(files.folder.parent), tag=files.folder.name, save_latest=False
            )
            files.write(_rank_file(self.world.rank), lambda file: torch.save(own, file))
            if position.best_weights is not None:
                best = safetensors.torch.save(position.best_weights)
                files.write(BEST_WEIGHTS, lambda file: file.write(best))

        saves.checkpoints.save(f"phase{saves.phase}-step{position.step:08d}", write, facts)
        self._saved_step = position.step

    def stop(self, number: int, title: str) -> None:
        """Save, unless this step is saved, and end, on a signal."""
        if self._saved_step != self.position.step:
            self.save()
        saved = "" if self.saves is None else "saved; "
        raise StoppedError(
            f"{title}: stopped by signal {number} after step {self.position.step}",
            f"{saved}go on with the same command",
            number=number,
        )

    def restore(self, facts: dict, plan: dict, seed: int) -> None:
        """Go on from the checkpoint to start from, if it is one of this phase.

        Args:
            facts: what must be the same then and now.
            plan: what must be the same unless the number of processes has changed.
            seed: of the processes that another number of processes starts afresh.
        """
        inputs = "" if self.saves is None else self.saves.inputs
        self.facts = {**facts, **plan, "inputs": inputs}
        start = None if self.saves is None else self.saves.start
        if start is None or start.facts["phase"] != self.saves.phase:
            return
        before, changed = start.facts["world_size"], start.facts["world_size"] != self.world.size
        if changed and not self.saves.reshard:
            raise CheckpointError(
                f"{start.folder}: written by {before} process{'es' * (before > 1)}, this run has "
                f"{self.world.size}",
                f"start as many (deepspeed --num_gpus {before} --module metakd ...), or "
                "convert it: the same command with --reshard",
            )
        fixed = self.facts.keys() - (plan.keys() if changed else ())
        facts = {"processes": before, **start.facts}
        wrong = [
            f"{name} was {facts.get(name)}, is {self.facts[name]}"
            for name in sorted(fixed)
            if facts.get(name) != self.facts[name]
        ]
        if wrong:
            raise CheckpointError(
                f"{start.folder}: {'; '.join(wrong)}", "start afresh with --resume never"
            )
        self.engine.checkpoint_engine = (
            ReshardedFiles(start, self.engine, self.world)
            if changed
            else HashedFiles(start.folder, self.saves.checkpoints.disk)
        )
        self.engine.load_checkpoint(str(start.folder.parent), tag=start.folder.name)
        sidecars = [self.world.rank] if not changed else range(before)
        told = [safe_load(start.folder / _rank_file(rank)) for rank in sidecars]
        own, position = told[0], self.position
        position.step = start.facts["step"]
        position.epochs_scored = own["epochs_scored"]
        position.skipped_in_a_row = own["skipped_in_a_row"]
        position.best = own["best"]
        position.averaged = own.get("averaged", 0)  # written since version 0.2
        best = start.folder / BEST_WEIGHTS
        if self.world.is_main and best.exists():
            position.best_weights = safetensors.torch.load_file(best)
        self.log.rewind(own["log"], position.step)
        if self.temperature is not None:
            self.temperature.restore(own["temperature"])
        for other in told if self.world.is_main or not changed else ():
            self.meter.include(other["meter"], self.world.device)
            if self.temperature is not None:
                self.heard.include(other["heard"], self.world.device)
        if not changed:
            restore_random_state(own["random"], self.world.device)
            return
        torch.manual_seed((seed + position.step) * self.world.size + self.world.rank)

    def _refuse_non_finite(self) -> None:
        held = [own_part(p, self.world.rank) for p in self.engine.module.parameters()]
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(held)])
        if not all(self.world.gather(bool(norms.isfinite().all()))):
            raise DivergedError(
                f"weights are not finite after step {self.position.step}; nothing was saved",
                "go on from the last checkpoint with a lower learning rate",
            )


def _rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.pt"
