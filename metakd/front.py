"""The Python front: what the command line does, in a script or a notebook.

``metakd.run`` and ``metakd.compare`` take a configuration as a YAML file, a dictionary or what
``metakd.load_config`` returns, do the work, and give a ``Result``. Started plainly they are one
process; in a script under ``deepspeed`` or ``torchrun`` every process calls them and every one gets
the result. Importing this module imports no torch.
"""

from __future__ import annotations

import atexit
import gc
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metakd.config import RunConfig, Stage, load_config, row_label
from metakd.environment import has_bf16
from metakd.errors import naming_extras
from metakd.method.methods import METHODS
from metakd.pipeline.table import TEACHER, Cell, Score, markdown, summarise

if TYPE_CHECKING:
    import pandas
    from rich.console import Console

    from metakd.pipeline.finished import Finished
    from metakd.pipeline.stages import Run

Configuration = RunConfig | Mapping[str, Any] | str | PathLike[str]


@dataclass(frozen=True)
class Result:
    """What came of a run or a comparison.

    Args:
        folder: the run directory.
        split: that the scores are of, test or validation.
        summary: row -> domain (or ``average``) -> ``mean``, ``std`` over seeds (None for one seed)
            and ``n``, of the task's metric in percent: accuracy, where texts have one class. Rows
            of teachers begin with ``teacher: ``.
        students: row -> folders of the students whose weights were kept, by domain and seed; each
            loads with plain ``AutoModelForSequenceClassification``.
        details: all of it, as ``evaluation.json`` or ``compare.json`` holds it.
        domains: of the corpus.
    """

    folder: Path
    split: str
    summary: dict[str, dict[str, Score]]
    students: dict[str, list[Path]]
    details: dict[str, Any]
    domains: list[str]

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """Row -> domain (or ``average``) -> score in percent, the mean over seeds."""
        return {
            row: {domain: score["mean"] for domain, score in scores.items()}
            for row, scores in self.summary.items()
        }

    def frame(self) -> pandas.DataFrame:
        """``scores`` as a data frame: a row a method, a column a domain."""
        import pandas

        return pandas.DataFrame.from_dict(self.scores, orient="index")

    def report(self, out: str | PathLike[str] | None = None) -> list[Path]:
        """Write all that is known of the run as one HTML page, as Markdown and as JSON.

        Args:
            out: folder to write to; the run directory by default.

        Returns:
            The files.

        Raises:
            UnsupportedError: a package is missing that the page needs (``metakd[deploy]``).
        """
        from metakd.deploy.report import write_report

        return write_report(self.folder, None if out is None else Path(out), "metakd.Result.report")

    def __str__(self) -> str:
        return markdown({"summary": self.summary})

    _repr_markdown_ = __str__


def run(
    config: Configuration,
    overrides: Sequence[str] = (),
    *,
    console: Console | None = None,
    resume: str = "auto",
    reshard: bool = False,
    command: str = "metakd.run",
) -> Result:
    """Prototypes, teacher, students and their scores; what is done already is skipped, and a run
    that is finished and unchanged not scored again.

    Args:
        config: a YAML file, a dictionary, or from ``load_config``.
        overrides: ``key.sub=value`` each, as on the command line.
        console: where progress is shown; the terminal by default.
        resume: ``auto`` goes on from the newest valid checkpoint, a tag from that one, ``never``
            starts afresh.
        reshard: go on from a checkpoint of another number of processes.
        command: recorded with what is made.

    Returns:
        Scores of the teacher and of the students of the configured method.

    Raises:
        MetakdError: one of ``metakd.errors``, with a line of cause and one of remedy.
    """
    from rich.console import Console

    from metakd.pipeline.finished import look_up

    checked = settled(_checked(config, overrides))
    console = console or Console(markup=False, emoji=False)
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    if found := look_up(checked, say):
        return _result(checked, found)
    result = evaluate(open_run(checked, (), console, resume, reshard, command))
    _leave_in_order()
    return result


def evaluate(opened: Run) -> Result:
    """Scores of the teacher and students of a run; what it may build and lacks is built."""
    from metakd.pipeline.finished import Finished, note

    scores = opened.evaluate()
    students = [place.relative_to(opened.folder).as_posix() for place in opened.students()]
    found = Finished(scores, opened.corpus.domains, students)
    note(opened, found)
    return _result(opened.config, found)


def _result(config: RunConfig, found: Finished) -> Result:
    kind = METHODS[config.distill.method].teacher(config.teacher.kind)
    label = row_label(config.distill.method, kind)
    rows = [] if kind is None else [(TEACHER + kind, found.scores["teacher"])]
    rows += [(label, scores) for scores in found.scores["students"].values()]
    cells = [
        cell
        for row, scores in rows
        for cell in Cell.all_of(row, found.domains, config.seed, scores)
    ]
    folder = Path(config.output_dir)
    students = {label: [folder / place for place in found.students]}
    rest = summarise(cells), students, found.scores, found.domains
    return Result(folder, found.scores["split"], *rest)


def compare(
    config: Configuration,
    overrides: Sequence[str] = (),
    *,
    withhold: Sequence[str] = (),
    data_fraction: float | None = None,
    gamma2: Sequence[float] = (),
    labels: Sequence[int | str] = (),
    console: Console | None = None,
    resume: str = "auto",
    reshard: bool = False,
    command: str = "metakd.compare",
) -> Result:
    """Methods x domains x seeds, see the ``compare`` block; writes ``compare.md``, ``.json`` and
    ``.csv``, with ``labels`` ``labels.md``, ``.json`` and ``.csv``.

    Args:
        config: a YAML file, a dictionary, or from ``load_config``.
        overrides: ``key.sub=value`` each, as on the command line.
        withhold: domains to keep from teacher and prototypes.
        data_fraction: share of the training examples to use.
        gamma2: weights of L_TKD to sweep.
        labels: takes the place of ``compare.labels``.
        console, resume, reshard, command: as for ``run``.

    Returns:
        Scores of every row, with ``labels`` for each number of them: ``finetune, 100 labels``.
        With ``withhold``, ``data_fraction`` or ``labels`` it has a run directory of its own, beside
        that of the plain comparison.

    Raises:
        MetakdError: one of ``metakd.errors``, with a line of cause and one of remedy.
    """
    changes, suffix = list(overrides), ""
    if withhold:
        changes.append(f"data.withhold={json.dumps(list(withhold), ensure_ascii=False)}")
        suffix += "-withhold-" + "-".join(withhold)
    if data_fraction is not None:
        changes.append(f"data.data_fraction={data_fraction}")
        suffix += f"-fraction-{data_fraction:g}"
    if labels:
        changes.append(f"compare.labels={json.dumps(list(labels))}")
    checked = _checked(config, changes)
    if checked.compare.labels:
        suffix += "-labels"
        data = checked.data.model_copy(update={"labels": {}})
        checked = checked.model_copy(update={"data": data})
    # Another question, another answer: variants never overwrite the plain comparison.
    folder = f"{Path(checked.output_dir)}{suffix}"
    checked = checked.model_copy(update={"output_dir": folder})
    opened = open_run(checked, (), console, resume, reshard, command)
    opened.compared = True
    by_labels = checked.compare.labels is not None
    result = _by_labels(opened, gamma2) if by_labels else compare_rows(opened, gamma2)
    _leave_in_order()
    return result


def compare_rows(opened: Run, gamma2: Sequence[float] = ()) -> Result:
    """The comparison of an opened run, see ``compare``."""
    from metakd.pipeline.compare import compare as compare_methods

    found = compare_methods(opened, gamma2)
    students = found["students"] if opened.config.compare.keep_students else {}
    kept = {row: [opened.folder / place for place in places] for row, places in students.items()}
    domains = opened.corpus.domains
    return Result(opened.folder, found["split"], found["summary"], kept, found, domains)


def _by_labels(opened: Run, gamma2: Sequence[float]) -> Result:
    from metakd.pipeline.labels import compare_labels

    found = compare_labels(opened, gamma2)
    summary = {
        f"{row}, {point['asked']} labels": scores
        for point in found["points"]
        for row, scores in point["summary"].items()
    }
    return Result(opened.folder, found["split"], summary, {}, found, opened.corpus.domains)


def open_run(
    config: Configuration,
    overrides: Sequence[str] = (),
    console: Console | None = None,
    resume: str = "auto",
    reshard: bool = False,
    command: str = "",
    last: Stage = "students",
) -> Run:
    """A run with its world, before anything of it is read; arguments as for ``run``, and ``last``,
    the last stage that it is opened for."""
    checked = settled(_checked(config, overrides, last))
    # Here and not above, since torch and DeepSpeed take seconds to import.
    with _without_collector(), naming_extras():
        from rich.console import Console

        from metakd.pipeline.stages import Run
        from metakd.training.world import join_world

    quiet_transformers()
    # Names come from the data: no bracket or colon of theirs is an instruction.
    console = console or Console(markup=False, emoji=False)
    world = join_world()
    # What the first process's device has, every process computes in.
    checked = checked.model_copy(update={"bf16": world.agree(checked.bf16)})
    return Run(checked, world, console, command, resume, reshard, last)


def settled(config: RunConfig) -> RunConfig:
    """The configuration with what it leaves to the machine decided: ``bf16: auto`` by the device
    that training takes. Warns of ``bf16: true`` where that is slower than fp32."""
    if not config.bf16:
        return config
    able = has_bf16()
    if config.bf16 is True and not able:
        warnings.warn(
            "bf16: true, and this device has no instructions for it: products can take many times "
            "as long as in fp32, which bf16: auto takes here",
            stacklevel=2,
        )
    return config.model_copy(update={"bf16": able if config.bf16 == "auto" else True})


@contextmanager
def _without_collector() -> Iterator[None]:
    """Modules are a million objects that stay, and looking through them again and again while they
    are made is a seventh of the time that imports take."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def need_training() -> None:
    """See that this environment can train, before anything is prepared for it.

    Raises:
        UnsupportedError: DeepSpeed cannot be imported.
    """
    import metakd.training  # noqa: F401


def quiet_transformers() -> None:
    """One bar per stage is enough, and a fresh classification head is no news here."""
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()


def _leave_in_order() -> None:
    """All went well: the processes part before the interpreters end."""
    from metakd.training.world import leave_world

    atexit.register(leave_world)


def _checked(
    config: Configuration, overrides: Sequence[str], last: Stage = "students"
) -> RunConfig:
    if not isinstance(config, RunConfig):
        return load_config(config, overrides, last)
    if not overrides:
        return config
    return load_config(config.model_dump(mode="json", exclude_unset=True), overrides, last)
