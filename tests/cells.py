"""Small training runs in processes of their own, for faults to be done to.

A run is ``fit`` on a tiny transformer inside a ``StageStore``. Its processes are forked from one
that has imported everything, so that a run takes a second or two: hence nothing here may compute
with several threads before the fork. What a run leaves behind is ``stage.json``, whose result holds
a digest of everything that must not depend on interruptions.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["METAKD_HISTORY"] = "off"

import torch
from rich.console import Console
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from metakd.config import RunConfig, Sharding, TrainingConfig
from metakd.data.batches import StepSampler
from metakd.data.corpus import Split, Tokens
from metakd.errors import MetakdError
from metakd.method.teachers import StepOutput
from metakd.pipeline.store import StageStore
from metakd.training import engine
from metakd.training.checkpoint import Checkpoints, Disk, safe_load
from metakd.training.log import RunLog
from metakd.training.saves import Saves
from metakd.training.scoring import evaluate
from metakd.training.world import World, join_world

EXAMPLES, STEP_SIZE, EPOCHS, ACCUMULATION, SEED = 22, 8, 4, 2, 5
STEPS_PER_EPOCH = 3  # 8 + 8 + 6 examples: the last step of an epoch is ragged
STEPS = EPOCHS * STEPS_PER_EPOCH
POISONED_STEP = 5


@dataclass(frozen=True)
class Cell:
    """A run.

    Args:
        zero: DeepSpeed's stage.
        ranks: processes.
        bf16: or fp32.
        save_steps: optimizer steps between checkpoints; does not change what is computed.
        poison: ``step`` makes a loss of step 5 NaN, ``all`` every loss, ``none`` no loss.
        step_timeout: seconds.
        pause: seconds before each micro-batch.
    """

    zero: int = 0
    ranks: int = 1
    bf16: bool = False
    save_steps: int = 2
    poison: str = "step"
    step_timeout: float = 45.0
    pause: float = 0.0

    @property
    def name(self) -> str:
        return f"zero{self.zero}-{self.ranks}rank-{'bf16' if self.bf16 else 'fp32'}"

    def config(self, folder: Path) -> RunConfig:
        return RunConfig.model_validate(
            {
                "output_dir": str(folder),
                "data": {"train": "none"},
                "teacher": {"model": "none"},
                "student": {"layers": [0]},
                "bf16": self.bf16,
                # DeepSpeed would keep weights of less than 100,000 numbers whole.
                "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
                "zero": self.zero,
                "save_steps": self.save_steps,
                "logging_steps": 2,
                "step_timeout": self.step_timeout,
            }
        )

    @property
    def training(self) -> TrainingConfig:
        return TrainingConfig(
            learning_rate=1e-2,
            num_train_epochs=EPOCHS,
            per_device_train_batch_size=STEP_SIZE // ACCUMULATION // self.ranks,
            gradient_accumulation_steps=ACCUMULATION,
        )


@dataclass(frozen=True)
class Fault:
    """What happens to one rank of a run.

    Args:
        rank: whose.
        where: ``forward`` counts micro-batches, ``change`` counts what is done to the disk.
        number: 1-based count at which it happens, from the start of the process.
        signal: that the process sends itself; 0 makes the change fail for want of space.
    """

    rank: int
    where: str
    number: int
    signal: int = signal.SIGKILL


class FaultyDisk(Disk):
    """Counts changes, and at one of them fails or ends the process.

    Args:
        fault: None for no fault; or of another rank.
        lasting: do all later changes fail as well?
    """

    def __init__(self, fault: Fault | None = None, lasting: bool = False):
        self.fault = fault
        self.lasting = lasting
        self.count = 0

    @property
    def is_due(self) -> bool:
        """Does the next change meet the fault?"""
        fault = self.fault
        if fault is None or fault.where != "change":
            return False
        return self.count + 1 == fault.number or (self.lasting and self.count >= fault.number)

    def _next(self) -> None:
        due = self.is_due
        self.count += 1
        if due and self.fault.signal:
            os.kill(os.getpid(), self.fault.signal)
        if due and not self.fault.signal:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def make_folder(self, path: Path) -> None:
        self._next()
        super().make_folder(path)

    def create(self, path: Path) -> BinaryIO:
        self._next()
        return _FaultyFile(super().create(path), self)

    def sync(self, file: BinaryIO) -> None:
        self._next()
        super().sync(file)

    def sync_folder(self, path: Path) -> None:
        self._next()
        super().sync_folder(path)

    def rename(self, source: Path, target: Path) -> None:
        self._next()
        super().rename(source, target)

    def remove(self, path: Path) -> None:
        if self.fault is not None and self.fault.signal:  # removing needs no space
            self._next()
        super().remove(path)


class _FaultyFile:
    def __init__(self, file: BinaryIO, disk: FaultyDisk):
        self._file, self._disk = file, disk

    def write(self, data) -> int:
        if self._disk.is_due:  # some of it arrives
            self._file.write(memoryview(data)[: len(data) // 2])
        self._disk._next()
        return self._file.write(data)

    def fileno(self) -> int:
        return self._file.fileno()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()


class Classifier(nn.Module):
    """A transformer of one layer with dropout, on [B, L] token ids.

    Args:
        trace: sees each training batch.
    """

    def __init__(self, trace: Callable[[dict], None] = lambda batch: None):
        super().__init__()
        self.trace = trace
        self.embedding = nn.Embedding(40, 16)
        self.queries_keys_values = nn.Linear(16, 48)
        self.norm = nn.LayerNorm(16)
        self.dense = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 16))
        self.head = nn.Linear(16, 2)

    def classify(self, batch: dict) -> torch.Tensor:
        """Logits [B, 2]."""
        hidden = self.embedding(batch["input_ids"])  # [B, L, H]
        heads = [
            part.unflatten(-1, (2, 8)).transpose(1, 2)  # [B, A, L, D]
            for part in self.queries_keys_values(hidden).chunk(3, -1)
        ]
        mixed = nn.functional.scaled_dot_product_attention(
            *heads, dropout_p=0.2 if self.training else 0.0
        )
        hidden = self.norm(hidden + mixed.transpose(1, 2).flatten(2))
        return self.head((hidden + self.dense(hidden)).mean(1)).float()

    def forward(self, batch: dict) -> StepOutput:
        self.trace(batch)
        rows = nn.functional.cross_entropy(self.classify(batch), batch["labels"], reduction="none")
        rows = rows * batch["poison"]
        return StepOutput(rows, {"entropy": rows.detach().nanmean()})


def examples() -> Split:
    """Tokens, labels and a column ``poison`` that multiplies the loss."""
    draw = random.Random(1)
    labels = torch.tensor([draw.randrange(2) for _ in range(EXAMPLES)])
    return Split(
        # The label shows in the tokens, so that there is something to learn.
        Tokens(
            torch.tensor([draw.randrange(20) + 20 * label for label in labels for _ in range(6)]),
            torch.full((EXAMPLES,), 6),
        ),
        labels,
        torch.zeros(EXAMPLES, dtype=torch.long),
        torch.arange(EXAMPLES),
        columns={"poison": torch.ones(EXAMPLES)},
    )


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Examples to a batch."""
    ids = pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    named = {
        name: torch.stack([row[name] for row in rows]) for name in rows[0].keys() - {"input_ids"}
    }
    return {"input_ids": ids, **named}


def poison_of(cell: Cell, epoch: int) -> torch.Tensor:
    """The factor of every example's loss in an epoch [N]."""
    values = torch.ones(EXAMPLES)
    if cell.poison == "all":
        values[:] = float("nan")
    elif cell.poison == "step" and epoch == (POISONED_STEP - 1) // STEPS_PER_EPOCH:
        values[poisoned_row()] = float("nan")
    return values


def poisoned_row() -> int:
    """The example whose loss is NaN in step 5."""
    sampler = StepSampler(
        examples().lengths, step_size=STEP_SIZE, micro_batches=ACCUMULATION, seed=SEED
    )
    epoch, step = divmod(POISONED_STEP - 1, STEPS_PER_EPOCH)
    return sampler.epoch(epoch)[step][0][0]


def train(cell: Cell, folder: Path, fault: Fault | None = None) -> None:
    """One process of a run: from its newest checkpoint to the end, or to its fault."""
    world = join_world()
    if fault is not None and fault.rank != world.rank:
        fault = None
    engine.seed_everything(SEED)
    split = examples()
    store = StageStore(
        folder,
        world,
        {},
        "faults",
        say=lambda text: print(text, flush=True) if world.is_main else None,
        disk=FaultyDisk(fault),
    )

    def build(place: Path, saves: Saves) -> dict:
        start = saves.start.facts["step"] if saves.start else 0
        told = (folder / f"trace-{world.rank}.jsonl").open("a", buffering=1)
        told.write(json.dumps({"start": start}) + "\n")
        done = 0

        def trace(batch: dict[str, torch.Tensor]) -> None:
            nonlocal done
            done += 1
            time.sleep(cell.pause)
            step = start + (done - 1) // ACCUMULATION + 1
            told.write(json.dumps({"step": step, "seen": batch["index"].tolist()}) + "\n")
            if fault is not None and fault.where == "forward" and fault.number == done:
                os.kill(os.getpid(), fault.signal)

        module, config = Classifier(trace), cell.config(folder)
        with RunLog(place, ["jsonl"], Console(quiet=True), active=world.is_main) as log:
            best = engine.fit(
                module,
                split,
                collate,
                config=config,
                training=cell.training,
                sharding=Sharding(cell.zero),
                world=world,
                log=log,
                title="cell",
                seed=SEED,
                columns=lambda epoch: {"poison": poison_of(cell, epoch)},
                score=lambda: evaluate(
                    module.classify,
                    split,
                    collate,
                    domains=["all"],
                    num_classes=2,
                    batch_size=8,
                    world=world,
                ),
                # The last checkpoint holds what a digest is made of.
                saves=replace(saves, last_phase=False),
            )
        told.write(json.dumps({"changes": saves.checkpoints.disk.count}) + "\n")
        final = saves.checkpoints.find("auto")
        if not world.is_main:
            return {}
        losses = [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
        for row in losses:
            for name in [name for name in row if name.endswith("_per_second")]:
                del row[name]
        return {
            "weights": digest({k: v for k, v in module.state_dict().items()}),
            "checkpoint": digest(contents(final.folder)),
            "log": digest(losses),
            "best": best,
            "skipped": [row for row in losses if row["split"] == "skipped"],
        }

    store.get(folder / "stage", asdict(replace(cell, save_steps=0)), build)


def contents(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds, without how many bytes the log had (it holds timings)."""
    held = {path.name: safe_load(path) for path in sorted(folder.glob("*.pt"))}
    for name, value in held.items():
        if name.startswith("rank-"):
            value.pop("log")
    held |= {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
    return held


def digest(value: Any) -> str:
    """SHA-256 of nested values: containers, tensors, numbers, plain objects."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            flat = value.detach().contiguous().view(-1)
            sha.update(f"{value.dtype}{tuple(value.shape)}".encode())
            sha.update(flat.view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=repr):
                sha.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            sha.update(f"[{len(value)}".encode())
            for one in value:
                add(one)
        elif value is None or isinstance(value, (bool, int, float, str, bytes)):
            sha.update(repr(value).encode())
        else:
            sha.update(type(value).__name__.encode())
            add(vars(value))

    add(value)
    return sha.hexdigest()


def outcome(folder: Path) -> dict:
    """What a finished run is compared by."""
    return json.loads((folder / "stage" / "stage.json").read_text())["result"]


@dataclass
class Attempt:
    """What one process of a run did: where it started, its micro-batches, its changes of the disk
    if it came that far."""

    start: int
    batches: list[tuple[int, list[int]]]  # step, examples
    changes: int = 0

    @property
    def finished(self) -> int:
        """Steps that were certainly over."""
        return max(self.start, self.batches[-1][0] - 1) if self.batches else self.start


def attempts(folder: Path, rank: int) -> list[Attempt]:
    """What the processes of one rank did, one after the other."""
    path, done = folder / f"trace-{rank}.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        told = json.loads(line)
        if "start" in told:
            done.append(Attempt(told["start"], []))
        elif "step" in told:
            done[-1].batches.append((told["step"], told["seen"]))
        else:
            done[-1].changes = told["changes"]
    return done


# ---- Processes -----------------------------------------------------------------------------------


def warm() -> None:
    """Load what every forked process needs; no parallel region may run before a fork."""
    torch.set_num_threads(1)


class Group:
    """Forked processes that join one world, each doing ``job(rank)``.

    Args:
        ranks: how many.
        job: what each does; its ``MetakdError`` becomes the exit code, as on the command line.
        folder: receives ``out-<rank>.txt``, to which later groups add.
    """

    def __init__(self, ranks: int, job: Callable[[int], None], folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.codes: dict[int, int] = {}  # of the ranks that ended; below 0 by a signal
        self.hung: list[int] = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        sys.stdout.flush()
        self.pids = [self._fork(rank, ranks, port, job) for rank in range(ranks)]

    def _fork(self, rank: int, ranks: int, port: int, job: Callable[[int], None]) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            out = os.open(self._out(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.environ.update(
                RANK=str(rank),
                WORLD_SIZE=str(ranks),
                LOCAL_RANK=str(rank),
                LOCAL_WORLD_SIZE=str(ranks),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
            job(rank)
            code = 0
        except MetakdError as error:
            print(f"{type(error).__name__}: {error.cause}\nremedy: {error.remedy}", flush=True)
            code = error.exit_code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _out(self, rank: int) -> Path:
        return self.folder / f"out-{rank}.txt"

    def said(self) -> str:
        """What all ranks printed."""
        return "".join(
            self._out(rank).read_text(errors="replace")
            for rank in range(len(self.pids))
            if self._out(rank).exists()
        )

    def _reap(self) -> None:
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)

    @property
    def ended(self) -> dict[int, int]:
        """Exit codes of the ranks that have ended."""
        self._reap()
        return self.codes

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to a rank that has not ended."""
        self._reap()
        if rank not in self.codes:
            with suppress(ProcessLookupError):
                os.kill(self.pids[rank], number)

    def wait(self, seconds: float = 120.0, grace: float | None = None) -> list[int]:
        """Wait for all to end, and return their exit codes.

        Args:
            seconds: after which the rest is killed and noted in ``hung``.
            grace: seconds that the others have after one was killed by a signal; None: as long as
                there is.
        """
        end = time.monotonic() + seconds
        while len(self.codes) < len(self.pids):
            self._reap()
            if grace is not None and any(code < 0 for code in self.codes.values()):
                end, grace = min(end, time.monotonic() + grace), None
            if time.monotonic() > end:
                left = [rank for rank in range(len(self.pids)) if rank not in self.codes]
                if not any(code < 0 for code in self.codes.values()):
                    self.hung = left
                for rank in left:
                    self.kill(rank)
                    _, status = os.waitpid(self.pids[rank], 0)
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        return [self.codes[rank] for rank in range(len(self.pids))]


def run(cell: Cell, folder: Path, fault: Fault | None = None) -> Group:
    """Start the processes of a run."""
    return Group(cell.ranks, lambda rank: train(cell, folder, fault), folder)


def checkpoints(folder: Path) -> Checkpoints:
    """The checkpoints of an unfinished run, looked at from one process."""
    return Checkpoints(folder / ".tmp-stage" / "checkpoints", World(), say=lambda text: None)
