"""A frozen teacher at work: replicated on every process, or sharded by ZeRO-3 over all of them.

Sharded, it is read shard by shard from its files as well, so that it is never whole on any device;
each layer's weights are gathered when the forward pass comes to it. Every process must then run as
many forward passes as the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
from torch import nn
from transformers.integrations.deepspeed import (
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from metakd.config import RunConfig
from metakd.data.batches import Batch
from metakd.method.attribution import Attribution
from metakd.method.recipe import Recipe
from metakd.method.teachers import FrozenTeacher, Teacher
from metakd.models.sources import load_config
from metakd.models.taps import Features
from metakd.training.engine import compute_dtype, deepspeed_config
from metakd.training.world import World


class _ShardedLoading:
    """What transformers asks before it reads weights; its own class for this needs accelerate."""

    def __init__(self, settings: dict):
        self.config = settings

    def is_zero3(self) -> bool:
        return True


@contextmanager
def _loading_into_shards(settings: dict) -> Iterator[None]:
    """``from_pretrained`` builds modules whose weights are spread over the processes."""
    loading = _ShardedLoading(settings)  # transformers keeps a weak reference
    set_hf_deepspeed_config(loading)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()


class _Showing(nn.Module):
    """What DeepSpeed shards: the teachers, called through whoever asks for features."""

    def __init__(self, teachers: Sequence[Teacher]):
        super().__init__()
        self.teachers = nn.ModuleList(teachers)
        self.show: Callable[[Batch], Features] | None = None
        self.shown: Features | None = None

    def forward(self, batch: Batch) -> None:
        # Not returned: DeepSpeed looks through what modules return for tensors to wait for.
        self.shown = self.show(batch)


class TeacherService:
    """The teachers of one student, loaded once and asked for different features in each phase.

    Args:
        folders: of one teacher, or of several whose logits are averaged; what ``load`` reads.
        config: precision and packing; ``teacher.zero: 3`` shards, with ``teacher.offload`` into
            host memory.
        recipe: paper or released form.
        world: the processes that share a sharded teacher.
        load: a teacher from each folder.
    """

    def __init__(
        self,
        folders: Sequence[Path | str],
        config: RunConfig,
        recipe: Recipe,
        world: World,
        load: Callable[[Any, Recipe], Teacher] = Teacher.load,
    ):
        dtype = compute_dtype(config, world.device)
        sharding = config.sharding(config.teacher)
        self._engine = None
        self._packed = config.packed
        if sharding.zero < 3:
            self.teachers = [
                load(folder, recipe).to(device=world.device, dtype=dtype) for folder in folders
            ]
            return
        hidden = load_config(str(folders[0])).hidden_size
        settings = deepspeed_config(config, sharding, None, hidden_size=hidden)
        settings["train_micro_batch_size_per_gpu"] = 1  # asked for, without a meaning here
        with _loading_into_shards(settings):
            self.teachers = [load(folder, recipe) for folder in folders]
        for teacher in self.teachers:
            for name, part in teacher.named_children():
                if name != "model":
                    part.to(device=world.device, dtype=dtype)
        self._engine, *_ = deepspeed.initialize(model=_Showing(self.teachers), config=settings)

    @contextmanager
    def showing(
        self,
        needs: frozenset[str],
        own_stream: bool = False,
        attribution: Attribution | None = None,
    ) -> Iterator[Callable[[Batch], Features]]:
        """While it lasts, a function from a batch to the features asked for.

        Args:
            needs: see ``FrozenTeacher``.
            own_stream: see ``FrozenTeacher``; not for a sharded teacher.
            attribution: see ``FrozenTeacher``; not for a sharded teacher.
        """
        asked = needs, own_stream, self._packed, attribution
        with FrozenTeacher(self.teachers, *asked) as frozen:
            if self._engine is None:
                yield frozen
            else:
                self._engine.module.show = frozen
                yield self._through_engine

    def _through_engine(self, batch: Batch) -> Features:
        self._engine(batch)
        showing = self._engine.module
        features, showing.shown = showing.shown, None
        return features
