"""What a run tells: a progress bar for people, a line per tenth for files of theirs, JSONL and
TensorBoard for tools.

Values stay on the device until they are read, once every ``logging_steps``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from metakd.training.world import World

_WORTH_TELLING = 20  # steps; fewer are over before anybody looks


def tell(console: Console, text: str) -> None:
    """One line, however long, in which no bracket or colon is an instruction."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


class Meter:
    """Running means per example of device scalars and vectors, read with one transfer."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._examples = 0

    def add(self, means: dict[str, Tensor], examples: int) -> None:
        """Add the means over one micro-batch of ``examples``; nothing leaves the device."""
        for name, value in means.items():
            total = value.float() * examples
            self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._examples += examples

    def read(self, world: World) -> dict[str, float | list[float]]:
        """Means since the last read, over all ranks; synchronises with the host. Empty if nothing
        was added."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        shapes = [self._sums[name].shape for name in names]
        sums = torch.cat([self._sums[name].flatten() for name in names])
        sums = torch.cat([sums, sums.new_tensor([self._examples])])
        if world.size > 1:
            dist.all_reduce(sums)
        self._sums.clear()
        self._examples = 0
        means = (sums[:-1] / sums[-1]).cpu().split([shape.numel() for shape in shapes])
        return {n: mean.view(shape).tolist() for n, mean, shape in zip(names, means, shapes)}

    def state(self) -> dict:
        """What has been added since the last read, as tensors and numbers."""
        return {"sums": dict(self._sums), "examples": self._examples}

    def include(self, state: dict, device: torch.device) -> None:
        """Add what ``state`` returned, here or on another rank."""
        for name, value in state["sums"].items():
            self._sums[name] = self._sums.get(name, 0.0) + value.to(device)
        self._examples += state["examples"]


class RunLog:
    """Writers of one stage; on every rank but the first it writes and shows nothing.

    Args:
        folder: receives ``log.jsonl`` and ``tensorboard/``.
        report_to: which of jsonl and tensorboard to write.
        console: rich console; a bar is shown on a terminal, lines elsewhere.
        active: False on ranks other than the first.
    """

    def __init__(
        self, folder: Path | None, report_to: list[str], console: Console, active: bool = True
    ):
        self._active = active
        self._console = console
        self._folder = folder
        self._board_folder = None if folder is None else folder / "tensorboard"
        self._jsonl = self._board = None
        if active and folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if "jsonl" in report_to:
                self._jsonl = (folder / "log.jsonl").open("a", encoding="utf-8", buffering=1)
            if "tensorboard" in report_to:
                self._board = self._open_board()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not (active and console.is_terminal),
        )

    def _open_board(self, purge_step: int | None = None):
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        return SummaryWriter(str(self._board_folder), purge_step=purge_step)

    def begin_phase(self, number: int) -> None:
        """Steps are counted anew: from its second phase on a stage's curves are a run of their own
        in TensorBoard."""
        if number and self._board:
            self._board.close()
            self._board_folder = self._folder / "tensorboard" / f"stage-{number + 1}"
            self._board = self._open_board()

    def position(self) -> int:
        """How many bytes of ``log.jsonl`` are written; for ``rewind``."""
        return self._jsonl.tell() if self._jsonl else 0

    def rewind(self, position: int, step: int) -> None:
        """Forget what was logged after ``position``, at an optimizer step."""
        if self._jsonl:
            self._jsonl.truncate(position)
            self._jsonl.seek(position)
        if self._board:
            self._board.close()
            self._board = self._open_board(purge_step=step + 1)

    def start(self, title: str, total_steps: int, done: int = 0) -> None:
        """Begin a bar of ``total_steps`` optimizer steps, of which some are done already."""
        self._progress.start()
        self._task = self._progress.add_task(title, total=total_steps, completed=done, status="")
        self._since, self._begun = time.perf_counter(), time.monotonic()
        self._samples = self._tokens = 0
        self._title, self._steps, self._begun_at, self._done = title, total_steps, done, done

    def advance(self, samples: int, tokens: int = 0) -> None:
        """One optimizer step over ``samples`` examples of ``tokens`` real tokens (all ranks) is
        done."""
        self._samples += samples
        self._tokens += tokens
        self._done += 1
        self._progress.advance(self._task)
        before, tenths = (10 * step // self._steps for step in (self._done - 1, self._done))
        shown = self._active and self._steps >= _WORTH_TELLING and not self._console.is_terminal
        if shown and tenths > before:
            spent = time.monotonic() - self._begun
            left = spent / (self._done - self._begun_at) * (self._steps - self._done)
            tell(
                self._console,
                f"{self._title}: step {self._done} of {self._steps}, {spent:.0f} s, "
                f"about {left:.0f} s left",
            )

    @contextmanager
    def pausing(self) -> Iterator[None]:
        """What is done meanwhile, an evaluation or a checkpoint, does not slow the rates down."""
        begun = time.perf_counter()
        yield
        self._since += time.perf_counter() - begun

    def write(self, step: int, values: dict[str, float | list], prefix: str = "train") -> None:
        """Log values at an optimizer step; lists (histograms, confusions) go to the JSONL alone."""
        if prefix == "train":
            now = time.perf_counter()
            seconds = max(now - self._since, 1e-9)
            values = {**values, "samples_per_second": self._samples / seconds}
            if self._tokens:
                values["tokens_per_second"] = self._tokens / seconds
            self._since, self._samples, self._tokens = now, 0, 0
            shown = {
                k: v
                for k, v in _scalars(values).items()
                if not k.endswith("_weighted") and k != "learning_rate"
            }
            self._progress.update(
                self._task, status=" ".join(f"{k} {v:.3g}" for k, v in shown.items())
            )
        if self._jsonl:
            self._jsonl.write(json.dumps({"step": step, "split": prefix, **values}) + "\n")
        if self._board:
            for name, value in _scalars(values).items():
                self._board.add_scalar(f"{prefix}/{name}", value, step)

    def note(self, step: int, what: str, **facts) -> None:
        """Log an event that is no number, to ``log.jsonl`` and the console."""
        if self._jsonl:
            self._jsonl.write(json.dumps({"step": step, "split": what, **facts}) + "\n")
        if self._active:
            told = ", ".join(f"{name} {value}" for name, value in facts.items())
            tell(self._console, f"step {step}: {what}, {told}")

    def stop(self) -> None:
        """End the bar."""
        self._progress.stop()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_exception) -> None:
        """End the bar and close the files."""
        self.stop()
        for writer in (self._jsonl, self._board):
            if writer:
                writer.close()


def _scalars(values: dict[str, float | list]) -> dict[str, float]:
    return {name: value for name, value in values.items() if not isinstance(value, list)}
