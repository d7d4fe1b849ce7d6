"""What the benchmarks' own tools promise: reports compared, drawn and made unattended."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace

import pytest
import torch

from benchmarks import compare, plot, registry, run, suite, targets, unattended
from benchmarks.registry import ROWS, Contest, Row, attempt
from benchmarks.reports import Figure, ReportError, load
from benchmarks.serving import check_same_labels
from benchmarks.unattended import Task

ENVIRONMENT = {
    "device": "CPU, a maker's, x86_64",
    "threads": 2,
    "date": "2026-01-02",
    "commit": "abc1234",
    "versions": {"python": "3.11.7", "torch": "2.13.0", "trl": None},
}


def contest(**names):
    """Contenders whose 20-80 % interval is 10 % to either side of their median."""
    return {
        name: {"median_ms": ms, "p20_ms": 0.9 * ms, "p80_ms": 1.1 * ms}
        for name, ms in names.items()
    }


def operation():
    row = {"op": "soft_kl", "dtype": "float32", "absent": {}}
    small = row | {"shape": "[8, 2]", "contenders": contest(**{"metakd cpp": 1.0, "eager": 30.0})}
    large = row | {"shape": "[8, 9]", "contenders": contest(**{"metakd cpp": 4.0, "eager": 8.0})}
    return {"op": "soft_kl", "environment": ENVIRONMENT, "rates": {}, "rows": [small, large]}


def step():
    named = contest(**{"no KD loss": 100.0, "metakd": 103.0})
    row = {"shape": "small: batch 8", "dtype": "float32", "contenders": named}
    return {"environment": ENVIRONMENT, "matmul": 1e9, "rows": [row]}


def throughput():
    layouts = {
        name: {"tokens_per_s": rate, "tokens_per_s_quantiles": [0.9 * rate, 1.1 * rate]}
        for name, rate in (("padded, random", 1000.0), ("packed, random", 1300.0))
    }
    row = {"max_length": 128, "batch": 16, "dtype": "float32", "layouts": layouts}
    return {"environment": ENVIRONMENT, "layers": [6, 3], "rows": [row]}


def latency():
    rows = [
        {
            "model": model,
            "engine": engine,
            "batch": batch,
            "length": length,
            "p50_ms": ms * batch * length,
            "p50_ci95_ms": [0.98 * ms * batch * length, 1.02 * ms * batch * length],
        }
        for model, engine, ms in (
            ("large", "eager", 1.0),
            ("large", "onnx", 0.7),
            ("small", "eager", 0.1),
        )
        for batch in (1, 8)
        for length in (32, 128)
    ]
    rows[-1]["p50_ci95_ms"] = None  # too few calls
    tokenising = [
        {"model": "small", "batch": 1, "length": 32, "p50_ms": 0.2, "p50_ci95_ms": [0.19, 0.21]}
    ]
    head = {"environment": ENVIRONMENT, "command": "", "models": {}}
    return head | {"rows": rows, "tokenising": tokenising}


def pytest_benchmark():
    rows = [
        {"name": name, "stats": {"median": s, "q1": 0.9 * s, "q3": 1.1 * s, "iqr": 0.2 * s}}
        for name, s in (("test_row[soft_kl [8, 2]]", 1e-3), ("test_row[soft_kl [8, 9]]", 4e-3))
    ]
    machine = {"cpu": {"brand_raw": "a maker's"}, "python_version": "3.11.7"}
    return {"machine_info": machine, "benchmarks": rows, "datetime": "2026-01-02"}


def scaled(report, factor):
    """The report with its first figure, interval included, multiplied."""
    report = copy.deepcopy(report)
    row = (report.get("rows") or report["benchmarks"])[0]
    entry = next(iter((row.get("contenders") or row.get("layouts") or {"": row}).values()))
    entry = entry.get("stats", entry)
    for name, value in entry.items():
        if name.endswith(("_ms", "_per_s", "_quantiles")) or name in ("median", "q1", "q3"):
            several = isinstance(value, list)
            entry[name] = [factor * x for x in value] if several else factor * value
    return report


@pytest.fixture
def keep(tmp_path):
    """``keep(name, report)``: the path of a file with this content."""

    def write(name, report):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(report if isinstance(report, str) else json.dumps(report))
        return path

    return write


KINDS = {  # kind -> a report, the factor that makes its figures worse, and what is printed of one
    "operation": (operation(), 2.0, "soft_kl [8, 2] float32: metakd cpp"),
    "step": (step(), 2.0, "step small: batch 8 float32: no KD loss"),
    # More is better: half is worse.
    "throughput": (
        throughput(),
        0.5,
        "throughput, up to 128 tokens, batch 16, float32: padded, random",
    ),
    "latency": (latency(), 2.0, "large, batch 1, length 32: eager"),
    "pytest-benchmark": (pytest_benchmark(), 2.0, "pytest-benchmark: test_row[soft_kl [8, 2]]"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_got_slower_comes_first_and_fails(kind, keep, capsys):
    report, worse, row = KINDS[kind]
    before, after = keep("a.json", report), keep("b.json", scaled(report, worse))
    assert load(before).kind.name == kind
    assert compare.main([str(before), str(after)]) == 1
    lines = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line.startswith("| ")][1:]
    assert table[0].startswith(f"| {row} | slower | ")
    assert table[0].endswith(f" | {worse:.2f} |")
    calm = [line for line in table[1:] if "| within noise |" in line]
    assert len(calm) == len(table) - (2 if kind == "latency" else 1)
    figures = sum(map(len, load(before).panels.values()))
    assert len(table) == figures > 1


@pytest.mark.parametrize("kind", KINDS)
def test_what_got_faster_passes(kind, keep, capsys):
    report, worse, row = KINDS[kind]
    assert (
        compare.main([str(keep("a.json", report)), str(keep("b.json", scaled(report, 1 / worse)))])
        == 0
    )
    assert f"| {row} | faster | " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ((1.0, 0.9, 1.1), (1.3, 1.2, 1.4), "slower"),
        ((1.0, 0.9, 1.1), (0.7, 0.6, 0.8), "faster"),
        ((1.0, 0.9, 1.25), (1.3, 1.2, 1.4), "within noise"),  # intervals overlap
        ((1.0, 0.9, 1.2), (1.3, 1.2, 1.4), "within noise"),  # they touch
        ((1.0, 0.99, 1.01), (1.04, 1.03, 1.05), "within noise"),  # apart, under the threshold
        ((1.0, 0.99, 1.01), (1.06, 1.05, 1.07), "slower"),  # apart, just over it
        ((1.06, 1.05, 1.07), (1.0, 0.99, 1.01), "faster"),  # the same seen from the other side
        ((1.0,), (9.0, 8.9, 9.1), "too few calls"),  # before had no interval
        ((9.0, 8.9, 9.1), (1.0,), "too few calls"),  # after has none
    ],
)
def test_a_change_is_apart_and_over_the_threshold(before, after, verdict):
    figures = Figure(*before), Figure(*after)
    assert compare.judge(*figures, 0.05, higher_is_better=False) == verdict
    mirrored = {"slower": "faster", "faster": "slower"}.get(verdict, verdict)
    assert compare.judge(*figures, 0.05, higher_is_better=True) == mirrored


def test_the_worst_of_the_slower_ones_is_on_top(keep):
    report = operation()
    after = copy.deepcopy(report)
    for row, factor in zip(after["rows"], (2, 3)):
        row["contenders"] |= contest(
            **{"metakd cpp": factor * row["contenders"]["metakd cpp"]["median_ms"]}
        )
    changes = compare.compare(load(keep("a.json", report)), load(keep("b.json", after)), 0.05)
    assert [(change.verdict, change.ratio) for change in changes[:2]] == [
        ("slower", 3),
        ("slower", 2),
    ]


def test_rows_of_one_report_alone_are_listed_and_pass(keep, capsys):
    before, after = operation(), operation()
    del before["rows"][0]["contenders"]["eager"]
    del after["rows"][1]
    assert compare.main([str(keep("a.json", before)), str(keep("b.json", after))]) == 0
    printed = capsys.readouterr().out
    assert "| soft_kl [8, 2] float32: eager | only after | - | 30 (27-33) | - |" in printed
    assert printed.count("| only before | ") == 2


def test_another_machine_or_version_is_a_warning(keep, capsys):
    after = operation()
    changed = {"threads": 8, "date": "2026-02-03", "commit": "def5678", "cores": 8}
    after["environment"] = ENVIRONMENT | changed
    after["environment"]["versions"] = ENVIRONMENT["versions"] | {"torch": "2.14.0"}
    assert compare.main([str(keep("a.json", operation())), str(keep("b.json", after))]) == 0
    told = capsys.readouterr()
    assert told.err.splitlines() == [
        "warning: measured differently: threads: 2, then 8",
        "warning: measured differently: torch: 2.13.0, then 2.14.0",
    ]
    assert "commit abc1234 to def5678" in told.out


def broken(report, *path):
    """The report without the value at the end of the path."""
    report = copy.deepcopy(report)
    inner = report
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return report


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (None, "No such file"),
        ("", "no JSON"),
        ('{"rows": [', "no JSON"),  # cut off
        ("[1, 2]", "not a benchmark's report"),
        ({"metric": 1.0}, "not a benchmark's report: KeyError 'rows'"),
        (broken(operation(), "environment"), "KeyError 'environment'"),
        (broken(operation(), "rows", 0, "contenders", "eager", "p80_ms"), "KeyError 'p80_ms'"),
        (scaled(operation(), float("nan")), "nan is not within"),
        (scaled(operation(), 0.0), "0.0 is not within"),
        (operation() | {"rows": []}, "without rows"),
        (step(), "different kinds: operation before, step after"),
        (operation() | {"op": "soft_jsd"}, "no row in common"),
    ],
)
def test_what_cannot_be_compared_is_one_line_and_code_2(content, cause, keep, capsys, tmp_path):
    after = tmp_path / "b.json" if content is None else keep("b.json", content)
    assert compare.main([str(keep("a.json", operation())), str(after)]) == 2
    told = capsys.readouterr().err
    assert cause in told and "b" in told
    assert len(told.splitlines()) == 1


def test_folders_are_compared_file_by_file(keep, capsys, tmp_path):
    for name, report in (
        ("soft_kl.json", operation()),
        ("step.json", step()),
        ("old.json", step()),
    ):
        keep(f"a/{name}", report)
    keep("b/soft_kl.json", operation())
    keep("b/step.json", scaled(step(), 2))
    folders = [str(tmp_path / name) for name in "ab"]
    assert compare.main(folders) == 1
    printed = capsys.readouterr().out
    assert f"only in {folders[0]}: old.json" in printed
    assert "## soft_kl" in printed and "## step" in printed
    # A broken file is told after the others have been compared.
    keep("b/old.json", "{")
    assert compare.main(folders) == 2
    assert "| slower |" in capsys.readouterr().out
    assert compare.main([folders[0], str(tmp_path / "b" / "step.json")]) == 2
    assert "a file and a folder" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_a_drawing_is_the_same_bytes_each_time(kind, keep):
    path = keep("report.json", KINDS[kind][0])
    first = plot.plot(path).read_bytes()
    assert plot.plot(path).read_bytes() == first
    assert b"<text" in first and b"dc:date" not in first
    assert len(first) < 100_000


def test_each_contender_has_its_bar_with_name_and_number(keep):
    drawn = plot.plot(keep("soft_kl.json", operation())).read_text()
    assert drawn.count('id="bar: ') == 4
    assert drawn.count(">metakd cpp</text>") == 2
    for number in ("1.00", "30.0", "4.00", "8.00"):
        assert f">{number}</text>" in drawn
    # 30 is over 20 times 1, 8 is not over 20 times 4.
    assert ">soft_kl [8, 2] float32, logarithmic</text>" in drawn
    assert ">soft_kl [8, 9] float32</text>" in drawn


def test_latency_is_a_line_per_model_batch_and_engine(keep):
    drawn = plot.plot(keep("latency.json", latency())).read_text()
    for model, batch, engine in (
        ("large", 1, "eager"),
        ("large", 8, "onnx"),
        ("small", 8, "eager"),
    ):
        assert f">{model}, batch {batch}</text>" in drawn
        assert f'id="line: {model}: {batch}: {engine}' in drawn
    assert 'id="line: small: 1: onnx' not in drawn
    assert 'id="line: small: 1: tokenising' in drawn


def test_a_folder_is_drawn_though_one_file_is_broken(keep, capsys, tmp_path):
    keep("r/step.json", step())
    keep("r/broken.json", "{")
    assert plot.main([str(tmp_path / "r")]) == 2
    assert (tmp_path / "r" / "step.svg").exists()
    assert "broken.json: no JSON" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [False, True])
def test_the_suite_measures_every_operation(device, quick, tmp_path, monkeypatch):
    monkeypatch.setenv("METAKD_DATA", str(tmp_path))
    tasks, absent = suite.benchmarks(device, tmp_path, quick=quick)
    for op in {row.op for row in ROWS if device in row.devices}:
        assert tasks[op].command[1:5] == ["-m", "benchmarks.run", "--op", op]
        assert ("--quick" in tasks[op].command) == (quick and device == "cpu")
    assert {"step", "latency"} <= tasks.keys()
    assert list(absent) == ["throughput", "cached_teacher"]
    assert all(str(tmp_path) in reason for reason in absent.values())
    assert all(task.command[-2:] == ["--out", str(tmp_path)] for task in tasks.values())


def test_every_operation_has_a_row_that_ci_can_afford():
    quick = {row.op for row in ROWS if row.quick and "cpu" in row.devices}
    assert quick == {row.op for row in ROWS if "cpu" in row.devices}


def test_gpu_check_measures_what_the_suite_does(tmp_path):
    from benchmarks import gpu_check

    found = gpu_check.steps(tmp_path)
    named = {f"benchmark {name}" for name in suite.benchmarks("cuda", tmp_path)[0]}
    assert named <= found.keys() and "benchmark latency" in named
    assert gpu_check.choose(found, []) == found
    chosen = list(gpu_check.choose(found, ["memcheck"]))
    assert chosen[:2] == ["build", "planted for memcheck"]
    assert len(chosen) == 2 + len(gpu_check.SANITIZED)
    assert list(gpu_check.choose(found, ["racecheck test_soft", "verify"])) == [
        *("build", "verify", "race program", "planted for racecheck", "racecheck test_soft_kl"),
    ]
    # What is timed, or made for others, shares the machine with nothing.
    shared = {name for name, task in found.items() if not task.alone}
    assert all("memcheck" in name or "racecheck" in name for name in shared)
    assert not any("memcheck" in name for name in gpu_check.steps(tmp_path, sanitize=False))


def test_a_failing_task_stops_no_other(tmp_path, capsys):
    def python(code, **options):
        return Task([sys.executable, "-c", code], **options)

    done = unattended.run_all(
        {
            "first one": python("print('begin'); raise SystemExit(3)"),
            "no program": Task(["./there-is-no-such-program"]),
            "wanted": python("raise SystemExit(9)", expected=9),
            "unwanted": python("", expected=9),  # a sanitizer that found nothing
            "last": python("import os; print(os.environ['GIVEN'])", environment={"GIVEN": "x"}),
        },
        tmp_path / "logs",
    )
    statuses = [status for _, status, _ in done]
    assert statuses == ["FAILED (3)", "FAILED (127)", "ok", "FAILED (0)", "ok"]
    assert unattended.conclude(done) == 3
    assert (tmp_path / "logs" / "first-one.log").read_text() == "begin\n"
    assert (tmp_path / "logs" / "last.log").read_text() == "x\n"
    assert "begin" in capsys.readouterr().out  # the end of a failed task's log is shown at once


def test_time_that_is_lent_ends_in_time(tmp_path, capsys):
    """A task that runs on is stopped with its children, and no other begins."""
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    child = "import sys, time; open(sys.argv[1], 'w'); time.sleep(60); open(sys.argv[2], 'w')"
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
    tasks = {
        "long": Task([sys.executable, "-c", code, child, str(begun), str(ended)]),
        "late": Task([sys.executable, "-c", ""]),
    }
    done = unattended.run_all(tasks, tmp_path / "logs", seconds=3.0)
    assert [status for _, status, _ in done] == ["stopped", "no time"]
    assert done[0][2] < 3.0 + 2 * unattended.GRACE_S
    assert unattended.conclude(done) == 2 and "long: stopped" in capsys.readouterr().out
    assert begun.exists() and not ended.exists()
    assert not (tmp_path / "logs" / "late.log").exists()


def test_whoever_is_asked_to_stop_takes_the_tasks_along(tmp_path):
    code = (
        "import sys; from pathlib import Path; from benchmarks.unattended import Task, run_all\n"
        "begin = 'import os, sys, time; print(os.getpid(), flush=True); time.sleep(60)'\n"
        "run_all({'long': Task([sys.executable, '-c', begin])}, Path(sys.argv[1]))"
    )
    runner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=unattended.ROOT)
    log = tmp_path / "long.log"
    while not (log.exists() and log.read_text().strip()):
        assert runner.poll() is None
        time.sleep(0.05)
    runner.terminate()
    assert runner.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


def test_only_neighbours_that_may_run_side_by_side(tmp_path):
    """Two tasks that wait for each other end; what is alone begins after both."""
    meet = (
        "import pathlib, sys, time\n"
        "own, other = map(pathlib.Path, sys.argv[1:])\n"
        "own.touch()\n"
        "while not other.exists(): time.sleep(0.01)"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    both_there = f"import os; assert os.path.exists({a!r}) and os.path.exists({b!r})"
    tasks = {
        "a": Task([sys.executable, "-c", meet, a, b], alone=False),
        "b": Task([sys.executable, "-c", meet, b, a], alone=False),
        "after": Task([sys.executable, "-c", both_there]),
    }
    done = unattended.run_all(tasks, tmp_path / "logs", seconds=60, workers=2)
    assert [(name, status) for name, status, _ in done] == [(name, "ok") for name in tasks]


def test_targets_are_met_missed_or_not_measured(keep, tmp_path):
    row = {
        "shape": "[256, 30522]",
        "dtype": "float32",
        "contenders": {
            name: {"median_ms": ms, "p20_ms": ms, "p80_ms": ms}
            for name, ms in {
                "metakd cpp": 2.0,
                "metakd reference": 1.0,  # the oracle is not ours to boast of
                "torch.compile": 5.0,
                "F.kl_div, probabilities": 8.0,
            }.items()
        },
    }
    environment = {"device": "CPU, x86_64"}
    keep("soft_kl.json", {"op": "soft_kl", "environment": environment, "rows": [row]})
    found = targets.verdicts(tmp_path).splitlines()
    where = "| K8 | soft_kl [256, 30522] float32 "
    assert f"{where}| times torch.compile | at least 2 | 2.5 | met |" in found
    assert f"{where}| times F.kl_div, probabilities | at least 15 | 4 | MISSED |" in found
    assert any(line.startswith("| K9") and line.endswith("| not measured |") for line in found)
    assert not any(line.startswith("| K1 ") for line in found)  # a GPU's
    keep("step.json", "{")  # what cannot be read is named and costs the others nothing
    named = targets.verdicts(tmp_path).splitlines()
    assert named[:-1] == found and "step.json: no JSON" in named[-1]
    for name in ("soft_kl", "step"):
        (tmp_path / f"{name}.json").unlink()
    assert targets.verdicts(tmp_path) == ""


def test_a_target_may_bound_from_above():
    [tax] = [t for t in targets.TARGETS if t.name == "K7" and "without" in t.what]
    assert [tax.verdict(x) for x in (None, 1.1, 1.2)] == ["not measured", "met", "MISSED"]
    [memory] = [t for t in targets.TARGETS if t.name == "K7" and "memory" in t.what]
    contenders = {
        "metakd": {"median_ms": 1.0, "peak_extra_bytes": 10},
        "metakd, meta-distillation": {"median_ms": 0.5, "peak_extra_bytes": 1},
        targets.EAGER_LOOP: {"median_ms": 4.0, "peak_extra_bytes": 40},
    }
    assert memory.measure(contenders) == 0.25
    # Where no kernel of ours ran, there is nothing to judge.
    others = {targets.EAGER_LOOP: contenders[targets.EAGER_LOOP]}
    assert [t.measure(others) for t in targets.TARGETS] == [None] * len(targets.TARGETS)


def test_every_target_names_rows_that_the_benchmarks_have():
    shapes = {(row.op, f"{row.shape} {str(row.dtype).removeprefix('torch.')}") for row in ROWS}
    for target in targets.TARGETS:
        if target.report != "step":
            assert any(op == target.report and s.startswith(target.shape) for op, s in shapes), (
                target
            )


def test_the_suites_exit_code_counts_failures_and_the_rest_is_summed_up(
    tmp_path, capsys, monkeypatch, keep
):
    made = str(keep("made.json", operation()))
    copy_it = [sys.executable, "-c", "import shutil, sys; shutil.copy(*sys.argv[1:])"]
    tasks = {
        "bad": Task([sys.executable, "-c", "raise SystemExit('red')"]),
        "good": Task([*copy_it, made, str(tmp_path / "out")]),
    }
    monkeypatch.setattr(suite, "benchmarks", lambda *_, **__: (tasks, {"other": "no data"}))
    assert suite.main(["--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().out
    assert "other: not here: no data" in told
    assert "bad: FAILED (1)" in told and "red" in told
    assert "| soft_kl [8, 2] float32 | metakd cpp | eager | 1 ms | - | 30.00 |" in told
    assert (tmp_path / "out" / "made.svg").exists()
    with pytest.raises(SystemExit) as stop:
        suite.main(["--only", "nonesuch", "--out", str(tmp_path / "out")])
    assert stop.value.code == 2


def test_the_summary_is_fair_where_more_is_better_and_names_files_it_cannot_read(keep, tmp_path):
    keep("out/throughput.json", throughput())
    keep("out/latency.json", latency())
    keep("out/broken.json", "{")
    lines = suite.summary(tmp_path / "out").splitlines()
    assert any("| packed, random | padded, random | 1300 tokens/s | - | 1.30 |" in x for x in lines)
    assert any(
        "large, batch 8, length 128 | onnx | eager | 716.8 ms | - | 1.43 |" in x for x in lines
    )
    assert "broken.json: no JSON" in lines[-1]


def test_reading_says_which_file(tmp_path):
    with pytest.raises(ReportError, match=r"absent\.json: No such file"):
        load(tmp_path / "absent.json")


def test_a_cached_teacher_is_timed_beside_a_live_one(tmp_path, monkeypatch, capsys):
    from tiny_runs import make_source

    from benchmarks import cached_teacher

    make_source(tmp_path)
    inputs = ["--data", tmp_path / "corpus", "--encoder", tmp_path / "encoder", "--out", tmp_path]
    sizes = ["--batch", 4, "--steps", 5, "--seconds", 0, "--device", "cpu", "--max-length", 24]
    monkeypatch.setattr("sys.argv", ["cached_teacher", *map(str, inputs + sizes)])
    cached_teacher.main()
    report = load(tmp_path / "cached_teacher.json")
    assert [title.split(":")[0] for title in report.panels] == ["step logits_kd", "step meta"]
    for figures in report.panels.values():
        assert [report.kind.is_ours(name) for name in figures] == [False, True]
    # Of one matched layer of width 32: embedding, hidden state, queries and keys.
    sizes = [row["bytes"] / row["examples"] for row in report.data["rows"]]
    assert sizes[0] == 4 * 2
    assert sizes[1] == pytest.approx(4 * (4 * 32 * report.data["rows"][1]["mean_length"] + 2 + 32))
    assert "| live teacher |" in capsys.readouterr().out


def test_what_serves_other_labels_is_not_timed():
    steps = {"metakd Predictor, onnx-int8": lambda: ["a", "b"], "pipeline": lambda: ["a", "a"]}
    assert list(check_same_labels(steps, ["a", "a"]).values()) == [0.5, 1.0]
    with pytest.raises(SystemExit, match="onnx: labels 1 texts otherwise"):
        check_same_labels({"metakd Predictor, onnx": lambda: ["a", "b"]}, ["a", "a"])


def test_a_failure_is_a_reason_and_lets_go_of_its_tensors():
    class Held:
        pass

    held = []

    def fails():
        tensor = Held()
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 25.77 GiB")

    def says_nothing():
        raise NotImplementedError

    absent = {}
    assert attempt("rival", absent, fails) is None
    assert attempt("other", absent, says_nothing) is None
    assert attempt("last", absent, lambda: 3) == 3
    assert absent == {
        "rival": "OutOfMemoryError: CUDA out of memory.",
        "other": "NotImplementedError: ",
    }
    assert held[0]() is None


def row_of(contenders):
    return Row("soft_kl", "[8, 2]", torch.float32, ("cpu",), lambda device: Contest(contenders))


def gives(loss):
    return lambda: torch.tensor(loss)


def too_large():
    raise torch.OutOfMemoryError("CUDA out of memory.")


def test_a_contender_that_fails_costs_no_other_its_figure():
    steps = {
        "metakd triton": gives(2.0),
        "metakd reference": too_large,
        "eager": too_large,
        "torch.compile": gives(2.001),
    }
    problems = []
    row = run.measure(row_of(steps), "cpu", 0.1, {}, problems)
    assert row["contenders"].keys() == {"metakd triton", "torch.compile"}
    assert row["contenders"]["metakd triton"]["times_ours"] == 1.0
    assert row["absent"].keys() == {"metakd reference", "eager"} and problems == []
    assert "Not here: eager (OutOfMemoryError: CUDA out of memory.)" in run.markdown(
        {"op": "soft_kl", "environment": ENVIRONMENT, "rates": {}, "rows": [row]}
    )


@pytest.mark.parametrize("loss", [2.1, float("nan")])
def test_another_loss_is_not_timed_and_is_a_problem(loss):
    problems = []
    steps = {"metakd cpp": gives(2.0), "eager": gives(loss)}
    row = run.measure(row_of(steps), "cpu", 0.1, {}, problems)
    assert row["contenders"].keys() == {"metakd cpp"}
    assert problems == [f"soft_kl [8, 2]: eager: {row['absent']['eager']}"]


def test_a_kernel_of_ours_that_fails_is_a_problem():
    problems = []
    row = run.measure(
        row_of({"metakd cpp": too_large, "metakd triton": gives(2.0)}), "cpu", 0.1, {}, problems
    )
    assert row["loss"] == 2.0 and row["contenders"].keys() == {"metakd triton"}
    assert problems == ["soft_kl [8, 2]: metakd cpp: OutOfMemoryError: CUDA out of memory."]
    nobody = run.measure(row_of({"metakd cpp": too_large}), "cpu", 0.1, {}, problems)
    assert nobody["contenders"] == {} and nobody["loss"] is None


def test_a_row_that_fails_leaves_the_report_of_the_others(tmp_path, monkeypatch):
    def broken(device):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    good = row_of({"metakd cpp": gives(2.0)})
    monkeypatch.setattr(registry, "ROWS", [replace(good, shape="[9, 9]", build=broken), good])
    monkeypatch.setattr(run, "copy_rate", lambda device: 1e9)
    words = ["run", "--op", "soft_kl", "--device", "cpu", "--no-tests", "--seconds", "0.1"]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"soft_kl \[9, 9\]: OutOfMemoryError"):
        run.main()
    [row] = json.loads((tmp_path / "soft_kl.json").read_text())["rows"]
    assert row["shape"] == "[8, 2]" and row["contenders"].keys() == {"metakd cpp"}
