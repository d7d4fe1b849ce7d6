"""Measures what a machine does in a second, for ``pipeline.plan``: a few steps of a run's own loop.

Models of one layer and of some layers of the shape in question are trained by
``training.engine.fit``, on texts of the corpus that are as long as its batches are, by all
processes that have been started: what more layers take longer than one are these layers, what one
takes longer with its table of words than with that table held still is that table's update, and
what remains is the start of a step. Between processes an ``all_reduce`` of so many bytes is timed,
and what updates send is taken out of them.
"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from itertools import pairwise
from statistics import median

import psutil
import torch
import torch.distributed as dist
from transformers import AutoModelForSequenceClassification, PretrainedConfig

from metakd.config import Sharding, TrainingConfig
from metakd.errors import UnsupportedError
from metakd.method.kinds import MixedTeacher
from metakd.method.teachers import Teacher
from metakd.models.sources import shortened
from metakd.models.student import word_embeddings
from metakd.pipeline.memory import BYTES, count_parameters, estimate, quantity
from metakd.pipeline.plan import Load, Rates, Sizes, step
from metakd.pipeline.stages import Run
from metakd.training.engine import fit, seed_everything

LAYERS = 4
WARM, TIMED = 3, 9
_SENT = 2**25  # bytes of the exchange that is timed
_MOST = 0.9  # of update and exchange that is exchange
_LEAST = 1e-12  # of a rate, where noise has hidden what was to be measured


class Probe:
    """Measures once for each shape, load and stage.

    Args:
        run: with the processes that will train, its corpus readable.
    """

    def __init__(self, run: Run):
        self._run = run
        self._found: dict[tuple, Rates] = {}
        self._link = _link(run)

    def __call__(self, shape: PretrainedConfig, load: Load, sharding: Sharding) -> Rates:
        """Rates of one process, see ``plan.stages``.

        Raises:
            UnsupportedError: two layers do not fit here.
        """
        alone = shortened(shape, [0]).to_json_string()
        texts = max(1, round(load.tokens / load.length))
        key = alone, texts, round(load.length), sharding
        if key not in self._found:
            self._found[key] = self._measure(shape, texts, round(load.length), sharding)
        return self._found[key]

    def _measure(
        self, shape: PretrainedConfig, texts: int, length: int, sharding: Sharding
    ) -> Rates:
        run, world = self._run, self._run.world
        one, some = shortened(shape, [0]), self._some_layers(shape, texts, length, sharding)
        tried = [(one, True), (one, False), (some, False)]
        # There and back, so that a machine that grows slower or faster meanwhile changes nothing.
        took = [
            self._seconds(model, texts, length, sharding, hold)
            for model, hold in (*tried, *reversed(tried))
        ]
        held, shallow, deep = ((a + b) / 2 for a, b in zip(took[:3], reversed(took[3:])))
        sizes, deeper = Sizes.of(one), Sizes.of(some)
        load = Load(1, 1, texts * length, length)
        sent = step(
            sizes,
            load,
            Rates(1.0, 0.0, 0.0),
            processes=world.size,
            zero=sharding.zero,
            itemsize=BYTES[run.config.precision],
        ).sent
        shared = world.size if sharding.zero else 1
        a_weight = max((shallow - held) / max(sizes.words, 1), _LEAST)
        more = deeper.matrices - sizes.matrices
        computed = max(deep - shallow - a_weight * more, _LEAST)
        # A link that was slower by itself than update and exchange together was measured wrong.
        a_byte = min(1 / self._link, _MOST * a_weight * sizes.parameters / max(sent, 1))
        exchange = a_byte * sent / sizes.parameters
        operations = 3 * (
            deeper.operations(load.tokens, length) - sizes.operations(load.tokens, length)
        )
        rate = operations / computed
        rest = sizes.parameters - sizes.words
        taken = 3 * sizes.operations(load.tokens, length) / rate + a_weight * rest
        return Rates(
            operations=rate,
            update=(a_weight - exchange) * shared,
            start=max(held - taken, 0.0),
            link=1 / a_byte if sent else math.inf,
        )

    def _some_layers(
        self, shape: PretrainedConfig, texts: int, length: int, sharding: Sharding
    ) -> PretrainedConfig:
        """As many of the first layers as there are and fit, from two to ``LAYERS``."""
        world, depth = self._run.world, shape.num_hidden_layers
        room = psutil.virtual_memory().available
        if world.device.type == "cuda":
            room = torch.cuda.mem_get_info(world.device)[0]
        for count in range(LAYERS, 1, -1):
            # A model of a single layer has it twice, which is as good to be measured by.
            layers = [min(number, depth - 1) for number in range(min(count, max(depth, 2)))]
            found = shortened(shape, layers)
            needed = estimate(
                count_parameters(found),
                zero=sharding.zero,
                offload=sharding.offload,
                dtype=self._run.config.precision,
                world_size=world.size,
                batch=texts,
                length=length,
                layers=len(layers),
                hidden=shape.hidden_size,
                heads=shape.num_attention_heads,
            )
            wanted = needed.device
            if world.device.type != "cuda":
                wanted = world.size * (needed.device + needed.host)
            if wanted <= room:
                return found
        raise UnsupportedError(
            f"two layers of {shape.hidden_size} cannot be measured here: they take "
            f"{quantity(wanted)}, {quantity(room)} are free",
            "name a device instead, with --on",
        )

    def _seconds(
        self,
        shape: PretrainedConfig,
        texts: int,
        length: int,
        sharding: Sharding,
        hold: bool,
    ) -> float:
        """Of a step, the slowest process's median."""
        run, world = self._run, self._run.world
        train = run.corpus.train
        needed = (WARM + TIMED) * texts * world.size
        near = (torch.tensor(train.lengths) - length).abs().argsort()
        split = train.select(near.repeat(-(-needed // len(near)))[:needed])
        training = TrainingConfig(
            per_device_train_batch_size=texts, num_train_epochs=1, group_by_length=False
        )
        seed_everything(0)
        shape.num_labels = len(run.corpus.label2id)
        shape.problem_type = run.corpus.task.problem_type
        shape.pad_token_id = run.reader.pad_token_id
        model = AutoModelForSequenceClassification.from_config(
            shape, trust_remote_code=False, dtype=torch.float32
        )
        if hold:
            with suppress(ValueError):  # an architecture without a table of words
                word_embeddings(model).requires_grad_(False)
        corpus, packed = run.corpus, run.config.packed
        teacher = Teacher(model, MixedTeacher.name, corpus.domains, packed=packed, task=corpus.task)
        times: list[float] = []
        with run.open_log(None) as log:
            fit(
                teacher,
                split,
                run.collate,
                config=run.config,
                training=training,
                sharding=sharding,
                world=world,
                log=log,
                title="measuring",
                seed=0,
                settle=lambda: times.append(_now(world.device)),
            )
        spans = [after - before for before, after in pairwise(times[WARM - 1 :])]
        return max(world.gather(median(spans)))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _link(run: Run) -> float:
    """Bytes a second that a process sends to the next."""
    world = run.world
    if world.size == 1:
        return math.inf
    values = torch.zeros(_SENT // 4, device=world.device)
    taken = []
    for _ in range(5):
        world.barrier()
        since = _now(world.device)
        dist.all_reduce(values)
        taken.append(_now(world.device) - since)
    return 2 * _SENT * (world.size - 1) / world.size / max(world.gather(median(taken)))
