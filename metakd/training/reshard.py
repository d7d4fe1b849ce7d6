"""Checkpoints of one number of processes for another: ZeRO shards merged and cut anew.

DeepSpeed keeps fp32 weights and moments in flat vectors. At stages 1 and 2 rank r of w holds the
r-th of w equal parts of a parameter group's vector; at stage 3 it holds the r-th part of every
single parameter, one after the other. ``ReshardedFiles`` stands where DeepSpeed reads its files,
and hands every rank the shard that it would have written in a world of this size; bits do not
change. At stage 0 every rank holds everything and there is nothing to cut.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from torch import Tensor

from metakd.errors import CheckpointError
from metakd.training.checkpoint import Tag, safe_load
from metakd.training.world import World

_RANK = re.compile(r"(?<=zero_pp_rank_)\d+")


class ReshardedFiles(CheckpointEngine):
    """Reads a checkpoint that was written by another number of processes.

    Args:
        tag: the checkpoint.
        engine: DeepSpeed's, which is about to load it.
        world: this run's processes.
    """

    def __init__(self, tag: Tag, engine, world: World):
        self._folder = tag.folder
        self._before = tag.facts["world_size"]
        self._world = world
        self._stage = engine.zero_optimization_stage()
        # DeepSpeed looks for a file of each of its ranks; here all start from the first one's.
        first = _of_rank(engine._get_ckpt_name(str(tag.folder.parent), tag.folder.name), 0)
        engine._get_all_ckpt_names = lambda folder, name: [first]
        self._sizes: list[int] = []
        if self._stage in (1, 2):
            self._sizes = [p.numel() for p in engine.optimizer.single_partition_of_fp32_groups]
        elif self._stage == 3:
            self._sizes = [p.numel() for p in engine.optimizer.fp32_partitioned_groups_flat]

    def load(self, path: str, map_location=None):
        """One of DeepSpeed's files, as this rank would have written it."""
        name = Path(path).name
        if not name.endswith("optim_states.pt"):
            state = safe_load(self._folder / _of_rank(name, 0), map_location)
            state["dp_world_size"] = self._world.size
            if self._stage == 3 and state["frozen_param_fragments"]:
                self._cut_frozen(state, name, map_location)
            return state
        shards = [safe_load(self._folder / _of_rank(name, rank)) for rank in range(self._before)]
        held = [shard["optimizer_state_dict"] for shard in shards]
        if self._stage == 3:
            self._cut_each_parameter(held)
        else:
            self._cut_each_group(held)
        return shards[0]

    def _cut_frozen(self, mine: dict, name: str, map_location) -> None:
        """Stage 3: what is not trained is in no optimizer's vector, but here in shards as well."""
        ranks = range(1, self._before)
        held = [mine, *(safe_load(self._folder / _of_rank(name, r), map_location) for r in ranks)]
        for key, shape in mine["frozen_param_shapes"].items():
            shards = [state["frozen_param_fragments"][key] for state in held]
            whole = torch.cat(shards)[: math.prod(shape)]
            size = math.ceil(len(whole) / self._world.size)
            mine["frozen_param_fragments"][key] = _part(whole, self._world.rank * size, size)

    def _cut_each_group(self, held: list[dict]) -> None:
        """Stages 1 and 2: the first shard becomes this rank's."""
        mine = held[0]
        for group, size in enumerate(self._sizes):
            weights = torch.cat([shard["single_partition_of_fp32_groups"][group] for shard in held])
            numel, begin = len(weights), self._world.rank * size  # behind numel is padding
            moments = [shard["base_optimizer_state"]["state"][group] for shard in held]
            for name, value in moments[0].items():
                if value.ndim:
                    whole = torch.cat([state[name] for state in moments])[:numel]
                    moments[0][name] = _part(whole, begin, size)
            mine["single_partition_of_fp32_groups"][group] = _part(weights, begin, size)
            mine["group_paddings"][group] = size - len(weights[begin : begin + size])
        mine["partition_count"] = [self._world.size] * len(self._sizes)

    def _cut_each_parameter(self, held: list[dict]) -> None:
        """Stage 3: the first shard becomes this rank's."""
        [model_states] = self._folder.glob("zero_pp_rank_0_*model_states.pt")
        shapes = safe_load(model_states)["param_shapes"]
        numels = [math.prod(shape) for group in shapes for shape in group.values()]
        states = [shard["optimizer_state_dict"]["state"] for shard in held]
        if len(states[0]) != len(self._sizes):
            raise CheckpointError(
                f"{self._folder}: {len(states[0])} groups of weights, here they are "
                f"{len(self._sizes)}",
                f"start {self._before} processes, or set stage3 sub_group_size as it was",
            )

        def cut(groups: list[list[Tensor]]) -> list[Tensor]:
            vectors = [torch.cat(of_rank) for of_rank in groups]
            parts, begin = [], 0
            for numel in numels:
                before = math.ceil(numel / self._before)
                after = math.ceil(numel / self._world.size)
                whole = torch.cat([v[begin : begin + before] for v in vectors])[:numel]
                parts.append(_part(whole, self._world.rank * after, after))
                begin += before
            return list(torch.cat(parts).split(self._sizes))

        mine = held[0]
        mine["fp32_flat_groups"] = cut([shard["fp32_flat_groups"] for shard in held])
        mine["partition_count"] = self._world.size
        names = [name for name, value in states[0][0].items() if value.ndim]
        for name in names:
            pieces = cut([[state[i][name] for i in sorted(state)] for state in states])
            for i, piece in zip(sorted(states[0]), pieces):
                states[0][i][name] = piece

    # Nothing is written through this one.

    def create(self, info) -> None:
        """Not used."""

    def save(self, state_dict, path: str) -> None:
        """Not used."""

    def commit(self, info) -> None:
        """Not used."""


def _part(whole: Tensor, begin: int, size: int) -> Tensor:
    """``size`` numbers from ``begin``, zeros where there are none."""
    own = whole[begin : begin + size]
    return torch.cat([own, own.new_zeros(size - len(own))])


def _of_rank(name: str, rank: int) -> str:
    return _RANK.sub(str(rank), name)
