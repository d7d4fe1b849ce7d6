"""What commands wait for: ``python -m benchmarks.startup``.

``metakd --help``, a configuration that is refused, ``metakd run`` of a run that is finished, the
same up to the first training step, ``metakd predict`` of one text from ONNX, and a loss in a script
beside ``import torch`` alone, each in processes of its own, in turn, ``--repeats`` times after one
that writes bytecode; and once a loss that has to compile its kernels first. Besides the clock the
seconds of CPU time, of the command and of what it starts, which a busy machine moves less. Writes
``results/cpu/startup.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from benchmarks.reports import table
from benchmarks.run import RESULTS, environment, heading
from metakd import demo

TARGETS = {  # seconds on two quiet cores
    "metakd --help": 0.3,
    "a refused configuration": 0.3,
    "metakd run, finished": 3.0,
    "metakd run, to the first step": 6.0,
    "metakd predict, ONNX": 2.5,
}
STUDENT = "students/meta-from-meta-s42/hiking"
TORCH = "import torch"
LOSS = f"{TORCH}, metakd; metakd.soft_kl(torch.zeros(3, 5), torch.zeros(3, 5), backend='cpp')"


def prepare(folder: Path) -> Path:
    """A small corpus, encoder and configuration, a finished run of it and an exported student;
    returns the configuration."""
    corpus, encoder = folder / "corpus", folder / "encoder"
    demo.write_corpus(corpus, train=50, validation=10, test=20)
    texts = [json.loads(line)["text"] for line in (corpus / "train.jsonl").open()]
    shape = {"hidden_size": 64, "layers": 4, "heads": 4, "vocab_size": 600, "mlm_steps": 0}
    demo.scratch_encoder(encoder, texts, **shape)
    splits = ("train", "validation", "test")
    settings = {
        "output_dir": str(folder / "run"),
        "data": {split: str(corpus / f"{split}.jsonl") for split in splits} | {"max_length": 32},
        "teacher": {"model": str(encoder), "training": {"num_train_epochs": 1}},
        "student": {"layers": [1, 3]},
        "distill": {"training": {"num_train_epochs": 1}},
        "report_to": ["jsonl"],
        "logging_steps": 1,
    }
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    for words in (("run", config), ("export", folder / "run" / STUDENT)):
        metakd(*words)
    return config


def started(*words: object, **settings: str) -> subprocess.Popen:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    # As an installed package has it; the history of this machine is its user's.
    usual = {"METAKD_HISTORY": "off", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, *map(str, words)]
    return subprocess.Popen(command, env=os.environ | usual | settings, **quiet)


def metakd(*words: object, code: int = 0) -> tuple[float, float]:
    """``to_its_end`` of a command of metakd."""
    return to_its_end("-m", "metakd", *words, code=code)


def to_its_end(*words: object, code: int = 0, **settings: str) -> tuple[float, float]:
    """Seconds on the clock and of CPU time that Python takes.

    Raises:
        SystemExit: it ends with another exit code.
    """
    since, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = started(*words, **settings)
    if process.wait() != code:
        raise SystemExit(f"python {' '.join(map(str, words))}: exit code {process.returncode}")
    spent, after = time.perf_counter() - since, resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def to_the_first_step(config: Path, output: Path) -> tuple[float, float]:
    """Seconds until the first training step is logged, and of CPU time."""
    shutil.rmtree(output, ignore_errors=True)
    since = time.perf_counter()
    process = started("-m", "metakd", "run", config, f"output_dir={output}")
    try:
        while not any(log.stat().st_size for log in output.rglob("log.jsonl")):
            if process.poll() is not None:
                raise SystemExit(f"metakd run ended before a step, exit code {process.returncode}")
            time.sleep(0.01)
        spent = time.perf_counter() - since
        # Of it, and of its children that have ended: user and system time, in ticks.
        ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[11:15]
    finally:
        process.terminate()
        process.wait()
    return spent, sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def measure(config: Path, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each command, in turn."""
    folder = config.parent
    commands = {
        "metakd --help": lambda: metakd("--help"),
        "a refused configuration": lambda: metakd("run", config, "sed=1", code=2),
        "metakd run, finished": lambda: metakd("run", config),
        "metakd run, to the first step": lambda: to_the_first_step(config, folder / "first"),
        "metakd predict, ONNX": lambda: metakd(
            "predict", folder / "run" / STUDENT, "a fine book", "--engine", "onnx"
        ),
        "import torch": lambda: to_its_end("-c", TORCH),
        "import torch, a loss": lambda: to_its_end("-c", LOSS),
    }
    found: dict[str, dict[str, list[float]]] = {
        name: {"wall_s": [], "cpu_s": []} for name in commands
    }
    for number in range(repeats + 1):
        for name, command in commands.items():
            wall, cpu = command()
            if number:
                found[name]["wall_s"].append(wall)
                found[name]["cpu_s"].append(cpu)
    empty = {"XDG_CACHE_HOME": str(folder / "cache")}
    wall, cpu = to_its_end("-c", LOSS, **empty)
    return found | {"the same, compiling its kernels": {"wall_s": [wall], "cpu_s": [cpu]}}


def markdown(report: dict) -> str:
    cells = []
    for name, seconds in report["commands"].items():
        wall, cpu = (statistics.median(seconds[key]) for key in ("wall_s", "cpu_s"))
        least = min(seconds["wall_s"])
        wanted = f"{TARGETS[name]:.1f}" if name in TARGETS else "-"
        cells.append((name, f"{cpu:.2f}", f"{wall:.2f}", f"{least:.2f}", wanted))
    header = ("", "CPU s", "wall s", "least wall s", "wanted, quiet cores")
    return "\n".join(
        [
            "# Start-up",
            "",
            *heading(report["environment"]),
            f"Medians of {report['repeats']} processes each, of the last row one. The machine's "
            f"load at the end: {report['load']:.1f}. A tiny run on made-up texts, so that starting "
            "is most of it.",
            "",
            table(header, cells),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="processes of each command")
    parser.add_argument("--out", type=Path, help="results folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        commands = measure(prepare(Path(work)), options.repeats)
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    report = {
        "environment": environment("cpu", threads),
        "repeats": options.repeats,
        "load": os.getloadavg()[0],
        "commands": commands,
    }
    folder = options.out or RESULTS / "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    page = markdown(report)
    (folder / "startup.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
