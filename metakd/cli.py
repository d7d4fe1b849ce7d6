"""The command line: ``metakd STAGE CONFIG.yaml [key=value ...]``.

Everything heavy is imported inside the commands, so that a wrong configuration is refused at once.
Started plainly it is one process; ``deepspeed --num_gpus N --module metakd ...`` and ``torchrun -m
metakd ...`` start several.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from metakd import cli_deploy, front, printed
from metakd.config import RunConfig, Stage, load_config
from metakd.errors import ConfigError, MetakdError, UnsupportedError, naming_extras
from metakd.front import Result
from metakd.pipeline.table import title_of
from metakd.printed import console, tell

if TYPE_CHECKING:
    from metakd.pipeline.stages import Run

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Compress language models across domains with Meta-KD.",
)
ConfigPath = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="override keys of CONFIG")
]
Resume = Annotated[
    str,
    typer.Option(
        metavar="auto|never|TAG",
        help="go on from the newest valid checkpoint, from none, or from this one",
    ),
]
Reshard = Annotated[
    bool,
    typer.Option("--reshard", help="go on from a checkpoint of another number of processes"),
]


def _open(
    config: str,
    overrides: list[str] | None,
    resume: str = "auto",
    reshard: bool = False,
    last: Stage = "students",
) -> Run:
    return front.open_run(
        config, overrides or [], console, resume, reshard, printed.command(), last
    )


def _stage(last: Stage = "students") -> Callable[[Callable[[Run], None]], None]:
    """Makes a command of what is done with a run that is opened up to its last stage."""

    def register(do: Callable[[Run], None]) -> None:
        def command(
            config: ConfigPath,
            overrides: Overrides = None,
            resume: Resume = "auto",
            reshard: Reshard = False,
        ):
            do(_open(config, overrides, resume, reshard, last))

        app.command(name=do.__name__, help=do.__doc__)(command)

    return register


@app.command()
def prototypes(config: ConfigPath, overrides: Overrides = None):
    """Score every training example against class x domain prototypes."""
    run = _open(config, overrides, last="prototypes")
    run.say(f"prototypes are in {run.prototypes()}")


@_stage(last="teacher")
def teach(run: Run):
    """Train the teacher (teacher.kind: meta, mix, mtl or single)."""
    places = run.teach()
    for place in places:
        run.say(f"teacher is in {place}")
    if not places:
        run.say(f"teacher.kind: {run.config.teacher.kind}: there is nothing to train")


@_stage()
def cache(run: Run):
    """Keep what the students' teachers say of the training examples (distill.cache_teacher)."""
    for place in run.cache():
        run.say(f"teacher outputs are in {place}")


@_stage()
def pretrain(run: Run):
    """Make what students with random weights begin as, from the encoder (student.pretrain)."""
    for place in run.pretrain():
        run.say(f"start is in {place}")


@_stage()
def distill(run: Run):
    """Train one student per domain (or one for all) from the teacher."""
    for place in run.distill():
        run.say(f"student is in {place}")


@app.command()
def evaluate(config: ConfigPath, overrides: Overrides = None):
    """Score the saved teacher and students on the test split; trains nothing."""
    run = _open(config, overrides)
    run.store.may_build = False
    _show_evaluation(front.evaluate(run))


@app.command("run")
def run_all(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Resume = "auto",
    reshard: Reshard = False,
):
    """All stages in order; what is done already is skipped."""
    how = {"resume": resume, "reshard": reshard, "command": printed.command()}
    _show_evaluation(front.run(config, overrides or [], console=console, **how))


@app.command()
def compare(
    config: ConfigPath,
    overrides: Overrides = None,
    withhold: Annotated[
        list[str] | None, typer.Option(help="keep this domain from teacher and prototypes")
    ] = None,
    data_fraction: Annotated[
        float | None, typer.Option(help="share of the training examples to use")
    ] = None,
    gamma2: Annotated[
        str | None, typer.Option(help="weights of L_TKD to sweep, as in 0,0.2,0.5")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="labels that each student's domain is to have in turn, as in 32,100,all"),
    ] = None,
    resume: Resume = "auto",
    reshard: Reshard = False,
):
    """Compare methods x domains over several seeds; print and write the table."""
    how = {"resume": resume, "reshard": reshard, "command": printed.command()}
    result = front.compare(
        config,
        overrides or [],
        withhold=withhold or [],
        data_fraction=data_fraction,
        gamma2=_weights(gamma2),
        labels=_words(labels),
        console=console,
        **how,
    )
    _show_comparison(result)


def _weights(text: str | None) -> list[float]:
    try:
        weights = [float(value) for value in text.split(",")] if text else []
    except ValueError:
        weights = [-1.0]
    if not all(0.0 <= weight < float("inf") for weight in weights):
        raise ConfigError(
            f"--gamma2: {text!r} is not a list of weights of at least 0", "write it as in 0,0.2,0.5"
        )
    return weights


def _words(text: str | None) -> list[int | str]:
    """Of a list with commas; numbers where they look like it."""
    words = [word.strip() for word in text.split(",")] if text is not None else []
    return [int(word) if word.isdecimal() else word for word in words]


@app.command()
def quickstart(
    folder: Annotated[
        str, typer.Argument(help="receives corpus, encoder and run")
    ] = "runs/quickstart",
    overrides: Overrides = None,
):
    """The whole method on short texts of four domains, one of them with few labels: teacher,
    students without and with Meta-KD."""
    from metakd.demo import prepare

    # Several ranks would race for the same files.
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("quickstart runs as one process", "start it plainly: metakd quickstart")
    front.need_training()
    run = _open(str(prepare(folder)), overrides)
    run.evaluate()
    result = front.compare_rows(run)
    _show_comparison(result)
    if gained := _gained(result, run):
        run.say(gained)
    for place in run.distill():
        run.say(f"student is in {place}")


def _gained(result: Result, run: Run) -> str:
    """What the last row of a comparison has over the others, in a line; nothing where no domain
    is scarce, or several are."""
    domain, labels = run.student_domains[0], run.config.data.labels
    if len(run.student_domains) > 1 or domain not in labels:
        return ""
    *others, (row, own) = ((name, scores[domain]) for name, scores in result.scores.items())
    gains = ", ".join(f"{own - score:+.1f} to {name}" for name, score in others)
    return f"{labels[domain]} labels of {domain}: {row} has {own:.1f}, {gains}"


app.add_typer(cli_deploy.app)


@app.command()
def suggest(
    config: ConfigPath,
    overrides: Overrides = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="write CONFIG with it to CONFIG.suggested.yaml")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
):
    """Say which settings did best in the past runs on this machine that are most like this one."""
    from metakd.pipeline.prior import suggest as look_up
    from metakd.pipeline.prior import write_suggested

    beside = Console(markup=False, emoji=False, stderr=as_json)
    run = front.open_run(config, overrides or [], beside, command=printed.command())
    found = look_up(run)
    if not _is_main():
        return
    if as_json:
        print(json.dumps(asdict(found), indent=1))
    else:
        if found.evidence:
            console.print(printed.neighbours(found))
        for line in found.why:
            tell(line)
        console.print(printed.suggested(found))
    if apply:
        path = write_suggested(run.config, found, Path(config))
        run.say("there is nothing to write" if path is None else f"written: {path}")


@app.command()
def verify(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False):
    """Compare every operation on this machine with float64, in each dtype and backend."""
    import torch

    from metakd.verify import verify as run_checks

    report = run_checks(["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        console.print(printed.verified(report))
    failed = [row for row in report if not row["passed"]]
    if failed:
        raise UnsupportedError(
            f"{len(failed)} of {len(report)} checks failed, the first: {failed[0]}",
            "use backend='reference' for these, and report it with `metakd doctor`",
        )
    if not as_json and {row["backend"] for row in report} == {"eager"}:
        console.print("no compiled backend runs here (see metakd doctor)")


@app.command()
def build(
    cuda: Annotated[bool, typer.Option("--cuda", help="the kernels for CUDA devices too")] = False,
):
    """Compile the kernels now, if none are there; otherwise the first call of a loss does."""
    from metakd import extension

    for kind in ("cpu", *(["cuda"] if cuda else [])):
        if reason := extension.load(kind, compiling=True):
            remedy = "`metakd doctor` says what computes; PyTorch's own operations can do it all"
            raise UnsupportedError(f"no kernels for {kind}: {reason}", remedy)
        tell(f"{kind}: {extension.describe(kind)}")


@app.command()
def doctor(
    config: Annotated[
        str | None, typer.Argument(metavar="[CONFIG]", help="YAML file: estimate its memory")
    ] = None,
    overrides: Overrides = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="say how long CONFIG takes, measured in a few steps")
    ] = False,
    processes: Annotated[
        str | None,
        typer.Option(metavar="N,...", help="estimate for so many, one a device; default: started"),
    ] = None,
    on: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="plan from published rates: h100, ...")
    ] = None,
    price: Annotated[
        float | None, typer.Option(help="of a device for an hour, for the plan")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
):
    """Print versions, devices, and each backend with the reason why it cannot run an operation; of
    a CONFIG also the memory that its models need per process, and with --plan the time it takes.
    Start it as the run will be to have it measured as that will be."""
    from metakd.diagnosis import diagnose

    counts = _counts(processes)
    checked = front.settled(load_config(config, overrides or [])) if config else None
    if plan and checked is None:
        raise ConfigError("--plan: there is nothing to plan", "name a configuration")
    for option, given in {"--on": on, "--price": price}.items():
        if given is not None and not plan:
            raise ConfigError(f"{option}: it is for a plan", "give --plan, too, or leave it out")
    report = diagnose()
    if checked is not None:
        import torch

        from metakd.pipeline.memory import memory_table

        # Not yet started as a world, one process per GPU is what it will be.
        started = int(os.environ.get("WORLD_SIZE") or max(1, torch.cuda.device_count()))
        for count in counts or [started]:
            of = f" of {count}" * bool(counts)
            report[f"memory per process{of}, estimated"] = memory_table(checked, count)
        if plan:
            report |= _planned(checked, counts or [started], on, price)
    if not _is_main():
        return
    if as_json:
        print(json.dumps(report, indent=1))
        return
    for title, block in report.items():
        table = Table(title=title, title_justify="left", show_header=False)
        for name, value in block.items():
            table.add_row(name, str(value))
        console.print(table)


def _counts(listed: str | None) -> list[int]:
    words = listed.split(",") if listed else []
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise ConfigError(f"--processes: {listed!r} is no list of numbers", "write it as 1,8,64")
    return list(map(int, words))


def _planned(
    config: RunConfig, counts: list[int], on: str | None, price: float | None
) -> dict[str, dict[str, str]]:
    from metakd.pipeline import plan
    from metakd.pipeline.probe import Probe

    device = plan.checked_device(on)
    run = front.open_run(config, console=console)
    if device is None:
        if set(counts) != {run.world.size}:
            raise ConfigError(
                f"--plan: {run.world.size} processes are started, and so many can be measured",
                "start as many as are to be planned for, or name a device with --on",
            )
        rates: plan.RatesOf = Probe(run)
        source = f"measured with {run.world.size} processes"
    else:
        known = plan.published(device, config.precision)
        rates, source = (lambda *_: known), f"predicted from published rates of {device}"
    return {
        f"plan for {count}, {source}": plan.as_table(plan.stages(run, count, rates), count, price)
        for count in counts
    }


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _show_evaluation(result: Result) -> None:
    if _is_main():
        console.print(f"{title_of(result.details)} in percent on the {result.split} split")
        console.print(printed.evaluated(result.scores, result.domains))
        for place in (place for places in result.students.values() for place in places):
            tell(f"student is in {place}")


def _show_comparison(result: Result) -> None:
    if _is_main():
        print(result)  # not through rich, which would wrap a wide table
        kind = "labels" if "points" in result.details else "compare"
        tell(f"written to {result.folder}/{kind}.md, .json and .csv")


def main() -> None:
    """Run the command line; ends the process with the error's exit code (see ``metakd.errors``)."""
    # Read by OpenMP when torch is loaded: threads that sleep at a barrier instead of spinning cost
    # little on idle cores, and on shared ones spinning makes small models several times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A letter that the terminal cannot show is no reason to lose the rest of a table.
    sys.stdout.reconfigure(errors="backslashreplace")
    debug = "--debug" in sys.argv
    # The deepspeed launcher hands its rank over as an option as well as in the environment.
    sys.argv[1:] = [
        word for word in sys.argv[1:] if word != "--debug" and not word.startswith("--local_rank")
    ]
    try:
        with naming_extras():
            app()
    except SystemExit as end:
        if not end.code and (world := sys.modules.get("metakd.training.world")):
            world.leave_world()
        raise
    except MetakdError as error:
        if debug:
            traceback.print_exc()
        where = "" if _is_main() else f"rank {os.environ['RANK']}: "
        print(f"metakd: {where}{error.cause}", file=sys.stderr)
        if error.remedy:
            print(f"remedy: {error.remedy}", file=sys.stderr)
        sys.exit(error.exit_code)
