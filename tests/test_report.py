"""The report: what is gathered from a run, what is left out, and a page that a real browser shows
well at any width, in light and dark."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from browser import Browser
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.numpy import save_file

from metakd.deploy import facts as found
from metakd.deploy import plots, report, sections, speedup
from metakd.deploy.latency import _models_of_run
from metakd.deploy.run_folder import read_run
from metakd.errors import CheckpointError, ConfigError, UnsupportedError
from metakd.pipeline import labels as by_labels
from metakd.pipeline.card import origin
from metakd.pipeline.table import Cell, summarise

ROOT = Path(__file__).resolve().parents[1]
DOMAINS = ("books", "kitchen")
# Accuracy in percent by row, domain, seed.
ACCURACY = {
    "teacher: meta": {"books": [85.0], "kitchen": [90.0]},
    "finetune": {"books": [78.0, 80.0], "kitchen": [80.0, 82.0]},
    "tinybert_kd-from-meta": {"books": [80.0, 81.0], "kitchen": [84.0, 86.0]},
    "meta-from-meta": {"books": [80.5, 81.5], "kitchen": [85.0, 85.0]},
}
ENVIRONMENT = {
    "device": "CPU, somebody's",
    "cores": 4,
    "threads": 2,
    "date": "2026-01-02",
    "versions": {"python": "3.11.0", "torch": "2.13.0"},
}


def write(path: Path, content: dict | list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        path.write_text(json.dumps(content))


def scores(domain: str, accuracy: float) -> dict:
    right = round(accuracy)
    return {
        "accuracy": accuracy / 100,
        "macro_f1": accuracy / 100,
        f"accuracy/{domain}": accuracy / 100,
        f"confusion/{domain}": [[right, 100 - right], [100 - right, right]],
    }


def stage(result: dict, **more) -> dict:
    return {
        "inputs": "0",
        "kept": True,
        "command": "metakd compare shop.yaml",
        "seconds": 10.0,
        "world_size": 1,
        "result": result,
        **more,
    }


def make_run(folder: Path, domains=DOMAINS, accuracy=ACCURACY) -> Path:
    """A whole run: two domains, three methods, two seeds, one teacher; no model is real."""
    t = np.random.default_rng(0).normal(0.3, 0.1, 200).astype(np.float32)
    described = {"mean": float(t.mean()), "std": float(t.std()), "histogram": {}}
    write(folder / "prototypes" / "stage.json", stage(described))
    save_file({"t": t}, folder / "prototypes" / "scores.safetensors")
    classes = {"id2label": {"0": "bad", "1": "good"}}
    cells = []
    for row, by_domain in accuracy.items():
        cells += [
            Cell(row, new, seed, value)
            for new, values in zip(domains, by_domain.values())
            for seed, value in enumerate(values, 1)
        ]
        if row.startswith("teacher"):
            place = folder / "teachers" / "meta-s1"
            merged = {"accuracy": 0.9, "macro_f1": 0.9}
            for cell in cells:
                merged |= {f"accuracy/{cell.domain}": cell.score / 100}
            write(place / "stage.json", stage({"validation": merged, "test": merged}))
            save_file({"w": np.zeros((30, 10), np.float32)}, place / "model.safetensors")
            continue
        for cell in [cell for cell in cells if cell.row == row]:
            place = folder / "students" / f"{row}-s{cell.seed}-t1" / cell.domain
            result = {"label": row, "domain": cell.domain, "parameters": 100}
            scored = scores(cell.domain, cell.score)
            result |= {
                "validation": scored,
                "test": scored,
                "origin": {
                    "encoder": "encoder",
                    "licence": "apache-2.0",
                    "data": "train.jsonl",
                    "examples": 50,
                    "seed": cell.seed,
                },
            }
            write(place / "stage.json", stage(result))
            write(place / "config.json", classes)
            write(place / "log.jsonl", training_log(row))
    compared = {"split": "test", "command": "metakd compare shop.yaml", "summary": summarise(cells)}
    write(folder / "compare.json", compared | {"cells": [cell.as_json() for cell in cells]})
    write(folder / "latency.json", latency())
    for domain in domains:
        place = folder / "students" / "meta-from-meta-s1-t1" / domain / "onnx" / "export.json"
        write(place, export())
    return folder


def training_log(row: str) -> list[dict]:
    steps = []
    for step in (5, 10, 15):
        values = {"step": step, "split": "train", "loss": 1 / step}
        if row == "finetune":
            values |= {"hard_label_weighted": 1 / step}
        else:
            values |= {"attention_weighted": 10 / step, "prediction_weighted": 0.1 / step}
        if row.startswith("meta"):
            histogram = [0.0] * 40
            histogram[24:26] = [0.5, 0.5]
            values |= {"expertise": 0.625, "expertise_std": 0.01, "expertise_histogram": histogram}
        steps.append(values)
    return [*steps, {"step": 15, "split": "validation", "accuracy": 0.5}]


def latency() -> dict:
    rows = [
        {
            "model": model,
            "engine": engine,
            "batch": batch,
            "length": length,
            "calls": 50,
            "p50_ms": scale * factor * batch * length / 128,
            "p50_ci95_ms": [1.0, 2.0],
            "p90_ms": 3.0,
            "p95_ms": None,
            "p99_ms": None,
            "sequences_per_s": 100.0,
            "peak_memory_bytes": None,
            "flops": 10,
            "max_logit_error": 1e-6,
        }
        for model, scale in (("teacher", 12.0), ("student", 4.0))
        for engine, factor in (("eager", 1.0), ("onnx", 0.5), ("onnx-int8", 0.25))
        for batch in (1, 8)
        for length in (32, 128)
    ]
    size = {"source": "x", "parameters": 300, "layers": 2, "hidden": 8, "bytes": {"eager": 1200}}
    times = {"calls": 50, "p50_ms": 0.1, "p90_ms": 0.2, "p95_ms": 0.3, "p99_ms": None}
    return {
        "environment": ENVIRONMENT,
        "command": "metakd latency shop",
        "models": {role: size | {"role": role, "folder": None} for role in ("teacher", "student")},
        "rows": rows,
        "tokenising": [{"model": "student", "batch": 1, "length": 128, **times}],
        "absent": [{"model": "student", "engine": "cudagraph", "reason": "no CUDA device"}],
    }


def export(agreement: float = 0.995) -> dict:
    exact = {"bytes": 1200, "max_logit_error": 1e-6, "mean_logit_error": 1e-7}
    return {
        "source": "x",
        "command": "metakd export x --to onnx --int8",
        "opset": 20,
        "environment": ENVIRONMENT,
        "checked": {"examples": 200, "data": "test.jsonl", "accuracy": 0.83},
        "formats": {
            "model.onnx": exact | {"label_agreement": 1.0, "accuracy": 0.83},
            "model_int8.onnx": exact | {"label_agreement": agreement, "accuracy": 0.82},
        },
    }


def test_what_students_begin_as_is_told(run):
    texts = {"train": 1200, "texts": 30}
    result = {"preset": "tiny-2l-128", "encoder": "minilm", "files": ["wiki.txt"], "texts": texts}
    write(run / "starts" / "tiny-2l-128-s42" / "stage.json", stage(result))
    write(run / "starts" / "tiny-2l-128-s42" / "config.json", {})
    facts = gather(run)
    assert section(facts, "accuracy").notes[-1] == (
        "Students of tiny-2l-128 with student.pretrain begin pretrained against minilm, without "
        "labels, on 1,230 texts: 1,200 of train, 30 of texts (wiki.txt)."
    )
    assert [row["stage"] for row in facts["seconds"]][1] == "start: tiny-2l-128"
    assert {model.role for model in _models_of_run(run)} == {"student"}, "it is no classifier"


@pytest.fixture
def run(tmp_path) -> Path:
    return make_run(tmp_path / "shop")


def section(facts: dict, name: str) -> sections.Section:
    """One part, without the time that the plots of all others take."""
    return getattr(sections, f"_{name}")(facts)


def gather(run: Path) -> dict:
    return found.gather(read_run(run))


# What is gathered


def test_a_whole_run_has_every_part(run):
    facts = gather(run)
    assert facts["warnings"] == []
    for part in sections.sections(facts):
        assert part.tables, part.title
    assert facts["best"] == {
        "row": "meta-from-meta",
        "average": {"mean": 83.0, "std": pytest.approx(0.5**0.5 / 2), "n": 2},
        "teacher": "teacher: meta",
        "teacher_average": {"mean": 87.5, "std": None, "n": 1},
        "parameters": 100,
        "teacher_parameters": 300,
    }
    assert sections.headline(facts) == (
        "meta-from-meta reaches 83.0 ± 0.4 % accuracy on average over 2 domains (test split), "
        "4.5 points below the teacher's 87.5 %. It takes 100 parameters against 300 "
        "(3.0 times fewer) and 2.00 ms against 6.00 ms (3.0 times as fast; p50 at batch 1 "
        "and 128 tokens, onnx against onnx)."
    )
    assert facts["confusion"]["classes"] == ["bad", "good"]
    assert facts["confusion"]["domains"]["kitchen"] == [[170, 30], [30, 170]]
    assert facts["commands"] == [
        "metakd compare shop.yaml",
        "metakd latency shop",
        "metakd export x --to onnx --int8",
    ]
    assert [(row["stage"], row["seconds"]) for row in facts["seconds"]][:3] == [
        ("prototypes", 10.0),
        ("teacher: meta", 10.0),
        ("finetune", 40.0),
    ]
    assert facts["expertise"]["meta-from-meta"]["std"] == pytest.approx(0.0125)
    assert sum(facts["scores"]["counts"]) == 200


@pytest.mark.parametrize(
    "gone, name, remedy",
    [
        (["latency.json"], "latency", "metakd latency"),
        (["latency.json"], "tradeoff", "metakd latency"),
        (["**/export.json"], "exports", "metakd export"),
        (["prototypes/*"], "weights", "metakd prototypes"),
        (["**/log.jsonl"], "terms", "report_to"),
        (["students/**/stage.json"], "confusion", "metakd run"),
        (["compare.json", "*s/**/stage.json"], "accuracy", "metakd compare"),
    ],
)
def test_what_is_absent_is_left_out_and_named(run, gone, name, remedy):
    whole = gather(run)
    for pattern in gone:
        for path in run.glob(pattern):
            path.unlink()
    facts = gather(run)
    missing = section(facts, name)
    assert missing.plots == [] or name == "weights"
    assert len(missing.tables) < len(section(whole, name).tables) or name == "weights"
    assert remedy in " ".join(missing.notes)
    json.dumps(facts, allow_nan=False)


def test_a_run_that_has_only_begun(run):
    for name in ("compare.json", "latency.json", "teachers", "students"):
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    report.write_report(run)
    page = (run / "report.html").read_text()
    assert "No row of students is complete yet." in page
    assert page.count("<svg") == 1


def test_without_a_comparison_the_stages_speak(run):
    whole = gather(run)["comparison"]
    (run / "compare.json").unlink()
    facts = gather(run)["comparison"]
    assert facts["split"] == "test" and facts["seeds"] == whole["seeds"] == [1, 2]
    for row, values in whole["summary"].items():
        for domain, score in values.items():
            assert facts["summary"][row][domain] == pytest.approx(score), (row, domain)


def test_a_row_that_lacks_cells_has_no_average(run):
    """A run that is still growing: its first domains must not pass for all of them."""
    (run / "compare.json").unlink()
    shutil.rmtree(run / "students" / "meta-from-meta-s2-t1" / "kitchen")  # one seed of one domain
    shutil.rmtree(run / "students" / "tinybert_kd-from-meta-s1-t1" / "books")
    shutil.rmtree(run / "students" / "tinybert_kd-from-meta-s2-t1" / "books")  # a whole domain
    facts = gather(run)
    assert facts["best"]["row"] == "finetune"
    table = section(facts, "accuracy").tables[0]
    shown = {row[0]: row[1:] for row in table.rows}
    assert shown["meta-from-meta"] == ["81.0 ± 0.7", "85.0", "—", "1–2"]
    assert shown["tinybert_kd-from-meta"] == ["—", "85.0 ± 1.4", "—", "2"]
    names = [point["name"] for point in facts["tradeoff"]["points"]]
    assert names == ["teacher: meta", "finetune"]


def test_unfinished_stages_are_passed_over(run):
    before = gather(run)
    hidden = run / "students" / "meta-from-meta-s3" / ".tmp-books"
    shutil.copytree(run / "students" / "meta-from-meta-s1-t1" / "books", hidden)
    assert gather(run) == before


def test_a_run_from_before_histograms_and_confusions(run):
    for log in run.glob("students/*/*/log.jsonl"):
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        for row in rows:
            row.pop("expertise_histogram", None)
        write(log, rows)
    for path in run.glob("students/*/*/stage.json"):
        record = json.loads(path.read_text())
        for split in ("validation", "test"):
            kept = record["result"][split]
            record["result"][split] = {k: v for k, v in kept.items() if "confusion" not in k}
        write(path, record)
    facts = gather(run)
    assert facts["confusion"] is None
    spread = facts["expertise"]["meta-from-meta"]
    assert spread["within_batch"] and spread["std"] == pytest.approx(0.01)
    weights = section(facts, "weights")
    assert len(weights.plots) == 1
    assert weights.tables[0].rows[1][-1] == "0.0100 (within a batch)"


def test_steps_go_on_through_stages_of_a_schedule():
    steps = [{"step": number} for number in (5, 10, 5, 10, 15)]
    assert found._positions(steps) == [5, 10, 15, 20, 25]


def test_curves_are_averaged_at_equal_shares_of_training():
    short = [{"step": s, "a_weighted": float(s)} for s in (1, 2)]
    long = [{"step": s, "a_weighted": 10.0 * s} for s in (1, 2, 3, 4)]
    curves = found._curves([short, long])
    assert curves["step"][-1] == 3 and curves["students"] == 2
    assert curves["terms"]["a"][-1] == pytest.approx((2 + 40) / 2)
    assert curves["terms"]["a"][0] is None  # nothing is logged before the first step
    json.dumps(curves, allow_nan=False)


@pytest.mark.parametrize(
    "points, front",
    [
        ([(1, 80), (2, 90)], [True, True]),  # each wins on one side
        ([(1, 90), (2, 80)], [True, False]),  # slower and worse
        ([(1, 80), (1, 90)], [False, True]),  # as fast and worse, as students of one shape are
        ([(1, 80), (2, 80)], [True, False]),  # as good and slower
        ([(1, 80), (1, 80)], [True, True]),  # equal points do not beat each other
        ([(1, 80)], [True]),
        ([], []),
    ],
)
def test_pareto(points, front):
    assert found.pareto(points) == front


def test_int8_counts_only_where_every_domain_is_exported(run):
    points = {p["name"]: p for p in gather(run)["tradeoff"]["points"]}
    assert points["meta-from-meta, int8"]["score"] == pytest.approx(82)
    assert points["meta-from-meta, int8"]["p50_ms"] == 1.0
    assert not points["finetune"]["front"] and points["teacher: meta"]["front"]
    shutil.rmtree(run / "students" / "meta-from-meta-s1-t1" / "kitchen" / "onnx")
    trade = gather(run)["tradeoff"]
    assert [left["reason"] for left in trade["left_out"]] == ["not exported: kitchen"]
    assert len(trade["points"]) == 4
    shutil.rmtree(run / "students" / "meta-from-meta-s1-t1" / "books" / "onnx")
    assert "metakd export" in section(gather(run), "tradeoff").notes[-1]


def test_students_of_another_shape_have_a_latency_of_their_own(run):
    compared, timed = (
        json.loads((run / f"{name}.json").read_text()) for name in ("compare", "latency")
    )
    cells = [Cell.read(cell) for cell in compared["cells"]]
    for shape in ("tiny", "huge"):
        cells += [
            replace(cell, row=f"finetune-as-{shape}") for cell in cells if cell.row == "finetune"
        ]
    compared["cells"] = [cell.as_json() for cell in cells]
    write(run / "compare.json", compared | {"summary": summarise(cells)})
    timed["models"]["student as tiny"] = timed["models"]["student"] | {"shape": "tiny"}
    timed["rows"] += [
        row | {"model": "student as tiny", "p50_ms": row["p50_ms"] / 4}
        for row in timed["rows"]
        if row["model"] == "student"
    ]
    write(run / "latency.json", timed)
    facts = gather(run)
    points = {p["name"]: p["p50_ms"] for p in facts["tradeoff"]["points"]}
    assert points["finetune"] == 2.0 and points["finetune-as-tiny"] == 0.5
    assert facts["tradeoff"]["left_out"] == [
        {"name": "finetune-as-huge", "reason": "no latency of its shape"}
    ]
    # The headline speaks of the best row, and of the latency of its shape alone.
    assert facts["best"]["row"] == "meta-from-meta" and facts["ratios"][0]["ratio"] == 3.0
    for cell in compared["cells"]:
        cell["accuracy"] += 30 * (cell["row"] == "finetune-as-tiny")
    summary = summarise([Cell.read(cell) for cell in compared["cells"]])
    write(run / "compare.json", compared | {"summary": summary})
    facts = gather(run)
    assert facts["best"]["row"] == "finetune-as-tiny" and facts["ratios"][0]["ratio"] == 12.0
    assert "12.0 times as fast" in sections.headline(facts)


def test_latency_nearest_to_what_the_headline_speaks_of():
    times = [
        {"model": m, "engine": "eager", "batch": b, "length": n, "p50_ms": 1.0}
        for m in ("teacher", "student")
        for b, n in ((8, 128), (1, 512), (1, 200))
    ]
    at = speedup.nearest(speedup.ratios({"rows": times, "models": {"teacher": {}, "student": {}}}))
    assert (at["batch"], at["length"]) == (1, 200)
    alone = {"rows": times[:3], "models": {"teacher": {}}}
    assert speedup.ratios(alone) == []  # a teacher alone compares with nothing


# Warnings


def weak_teacher(run):
    change(run / "compare.json", lambda c: c["summary"]["finetune"]["books"].update(mean=86.04))


def flat_scores(run):
    change(run / "prototypes" / "stage.json", lambda s: s["result"].update(std=0.0099))


def one_seed(run):
    def keep_first(compared):
        compared["cells"] = [cell for cell in compared["cells"] if cell["seed"] == 1]

    change(run / "compare.json", keep_first)


def change(path: Path, how) -> None:
    content = json.loads(path.read_text())
    how(content)
    write(path, content)


@pytest.mark.parametrize(
    "spoil, said",
    [
        (weak_teacher, ["teacher: meta reaches 85.0 % on books", "fine-tuned alone 86.0 %"]),
        (flat_scores, ["0.0099", "nearly constant"]),
        (one_seed, ["one seed (1)"]),
    ],
)
def test_warnings(run, spoil, said):
    spoil(run)
    facts = gather(run)
    [warning] = facts["warnings"]
    for text in (warning["text"], report.markdown(facts, []), report.html(facts, [])):
        assert all(piece in text for piece in said), text


def test_a_difference_within_the_spread_is_called_none(run):
    facts = gather(run)
    assert [close["row"] for close in facts["close"]] == ["tinybert_kd-from-meta"]
    [note] = section(facts, "accuracy").notes
    assert "differ by 0.2 points" in note and "(1.1)" in note


# How it is written


def test_three_files_say_the_same(run, tmp_path):
    out = tmp_path / "elsewhere" / "deep"
    paths = report.write_report(run, out, "metakd report shop")
    assert [path.name for path in paths] == ["report.html", "report.md", "report.json"]
    assert not (run / "report.json").exists()
    facts = json.loads(paths[2].read_text())
    parts = sections.sections(facts)
    assert report.html(facts, parts) == paths[0].read_text()
    assert report.markdown(facts, parts) == paths[1].read_text()
    assert "| meta-from-meta | 81.0 ± 0.7 | 85.0 ± 0.0 | 83.0 ± 0.4 | 2 |" in paths[1].read_text()


def test_names_from_the_data_are_text_everywhere(tmp_path):
    """A domain's name is whatever stood in a column; so are the classes'."""
    hostile = "<script>alert(1)&|$x_1$"
    facts = gather(make_run(tmp_path / "shop", domains=("books", hostile)))
    facts["confusion"]["classes"] = [hostile, "`good`"]
    facts["tradeoff"]["points"][0]["name"] = hostile
    facts["terms"] = {hostile: facts["terms"]["finetune"]}
    parts = sections.sections(facts)
    page, text = report.html(facts, parts), report.markdown(facts, parts)
    assert "<script" not in page and "<script" not in text
    drawn = [plot for part in parts for plot in part.plots if "alert(1)" in plot]
    assert len(drawn) == 2
    for plot in drawn:
        texts = [element.text for element in ElementTree.fromstring(plot).iter("text")]
        assert hostile in texts  # and no formula was made of it
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(cells) == 1, table
    report.write_report(tmp_path / "shop")
    for card in (tmp_path / "shop").rglob("README.md"):
        assert "<script" not in card.read_text()


def test_the_page_needs_nothing_but_itself(run):
    facts = gather(run)
    page = report.html(facts, sections.sections(facts))
    assert not re.search(r"(?:src|href)=\"(?!#)", page)
    assert "http" not in page and "url(#" in page and "@import" not in page
    names = re.findall(r"\bid=\"([^\"]*)\"", page)
    assert len(names) == len(set(names))
    used = {*re.findall(r"href=\"#([^\"]*)\"", page), *re.findall(r"url\(#([^)]*)\)", page)}
    assert used <= set(names)
    for drawn in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert not re.search(r"#0a0b", drawn), "a sentinel colour was left"
        attributes = re.match(r"<svg ([^>]*)>", drawn).group(1)
        assert 'role="img"' in attributes and "aria-label=" in attributes


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_in_both_themes():
    """4.5 : 1 for whatever is written in it (WCAG AA); curves carry their names in their colour."""
    template = (ROOT / "metakd" / "deploy" / "report.html.jinja").read_text()
    themes = re.findall(r":root \{(.*?)\}", template, re.DOTALL)
    assert len(themes) == 2
    for theme in themes:
        colours = dict(re.findall(r"--([\w-]+): (#\w{6});", theme))
        assert {*plots.SERIES, plots.INK, plots.FAINT} <= set(colours)
        for name in (*plots.SERIES, "ink", "quiet", "link"):
            light, dark = sorted((luminance(colours[name]), luminance(colours["paper"])))[::-1]
            assert (light + 0.05) / (dark + 0.05) >= 4.5, name


def test_ends_of_curves_that_meet_keep_their_names_apart():
    """Five at the top and five at the bottom: none may leave the plot on its way."""
    ends = {f"{end} {step}": end + step / 1000 for end in (1.0, 0.1) for step in range(5)}
    values = {name: [1.0, value] for name, value in ends.items()}
    [drawn] = plots.curves({"row": {"step": [0, 1], "terms": values, "students": 1}})
    heights = {}
    for element in ElementTree.fromstring(drawn).iter("text"):
        place = ElementTree.tostring(element, encoding="unicode")
        [y] = re.findall(r"translate\([\d.]+ ([\d.]+)\)|\by=\"([\d.]+)\"", place) or [("0", "")]
        heights[element.text] = float(y[0] or y[1])
    ordered = [heights[name] for name in sorted(ends, key=ends.get, reverse=True)]
    assert min(b - a for a, b in itertools.pairwise(ordered)) >= 12
    assert heights["row"] < ordered[0] and ordered[-1] < heights["optimizer step"] - 20


# What goes wrong


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match="no finished stage of a run") as raised:
        report.write_report(tmp_path)
    assert "output_dir" in raised.value.remedy
    with pytest.raises(ConfigError):
        report.write_report(tmp_path / "nowhere")


def test_a_place_that_cannot_be_written_to(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file") as raised:
        report.write_report(run, tmp_path / "file" / "report")
    assert "--out" in raised.value.remedy


BOOKS = "students/meta-from-meta-s1-t1/books"


@pytest.mark.parametrize(
    "name",
    [
        "compare.json",
        "latency.json",
        "prototypes/scores.safetensors",
        "teachers/meta-s1/model.safetensors",
        f"{BOOKS}/stage.json",
        f"{BOOKS}/log.jsonl",
        f"{BOOKS}/onnx/export.json",
    ],
)
def test_a_damaged_file_is_named(run, name):
    path = run / name
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=re.escape(name)):
        gather(run)


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("compare.json", {"cells": []}, "lacks split, summary"),
        ("evaluation.json", {"score": 1}, "lacks split"),
        ("latency.json", [{"p50": 1}], "lacks environment"),
        (f"{BOOKS}/stage.json", {"status": "done"}, "lacks result"),
        (f"{BOOKS}/stage.json", {"result": [0.9]} | dict.fromkeys(("kept", "seconds")), "lacks"),
        (f"{BOOKS}/stage.json", stage([0.9]), "lacks validation"),
        ("prototypes/stage.json", stage({"mean": 0.5}), "lacks std"),
        (f"{BOOKS}/log.jsonl", [{"step": 1, "split": "train"}, {"epoch": 1}], ":2: is no line"),
        ("students/finetune-s1-t1/books/config.json", ["bert"], "is no JSON object"),
        (f"{BOOKS}/onnx/export.json", {"ok": True}, "lacks checked"),
    ],
)
def test_a_file_that_something_else_wrote_is_named(run, name, content, said):
    path = run / name
    path.unlink(missing_ok=True)
    if path.suffix == ".jsonl":
        write(path, content)
    else:
        path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}.*{re.escape(said)}") as raised:
        gather(run)
    assert raised.value.remedy


def test_every_file_is_read_once(run, monkeypatch):
    opened = []
    read = Path.read_text
    monkeypatch.setattr(
        Path,
        "read_text",
        lambda path, *how, **more: opened.append(path) or read(path, *how, **more),
    )
    report.write_report(run)
    own = [path for path in opened if run in path.parents]
    assert len(own) == len(set(own)), [path for path in own if own.count(path) > 1]
    assert sum(path.name == "stage.json" for path in own) == 14  # prototypes, teacher, 12 students


def test_of_many_classes_the_page_shows_the_worst_mistakes(run):
    facts = gather(run)
    size = 1000
    counts = (7 * np.eye(size, dtype=int)).tolist()
    counts[3][999] = 3
    facts["confusion"] |= {
        "classes": [f"class {number}" for number in range(size)],
        "domains": {"books": counts},
    }
    [table] = section(facts, "confusion").tables
    assert table.rows == [["class 3", "class 999", "3", "30%"]]
    assert "1000 classes" in table.caption and "report.json" in table.caption
    json.dumps(facts["confusion"])


def test_cards_that_cannot_be_written_are_told_apart_from_the_report(run, tmp_path):
    (run / BOOKS / "README.md").mkdir()
    with pytest.raises(ConfigError, match=r"the report is written to .*out, but") as raised:
        report.write_report(run, tmp_path / "out")
    assert str(run) in raised.value.remedy and "--out" not in raised.value.remedy
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_without_the_extra_the_remedy_is_its_name(run, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UnsupportedError) as raised:
        report.write_report(run)
    assert raised.value.remedy == "pip install 'metakd[deploy]'"
    assert not (run / "report.html").exists()


def test_the_command_line(run):
    """Without torch: a report is there in a second."""
    code = "import sys; sys.modules['torch'] = None; from metakd.cli import main; main()"
    command = [sys.executable, "-c", code, "report", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written: ") == 3
    assert (run / "report.html").exists()
    command[-1] = str(run / "nothing")
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "remedy: " in done.stderr


# Cards


def test_cards_tell_what_was_measured_since(run):
    report.write_report(run)
    place = run / "students" / "meta-from-meta-s1-t1" / "books"
    card = ModelCard.load(place / "README.md")
    assert card.data.license == "apache-2.0"
    assert "\n\n\n" not in card.text
    for piece in (
        "| licence of that encoder | apache-2.0 |",
        "| training data | train.jsonl, 50 examples |",
        "2 seeds: 81.0 ± 0.7 % accuracy on the test split",
        "| onnx/model_int8.onnx | 0.0 | 1.0e-06 | 99.50 |",
        "CPU, somebody's, 2 threads",
        "| onnx | 1 | 128 | 2.00 | - |",
        "AutoModelForSequenceClassification.from_pretrained",
        "from metakd.deploy import Predictor",
        "`metakd compare shop.yaml`",
    ):
        assert piece in card.text, piece
    other = (run / "students" / "finetune-s1-t1" / "books" / "README.md").read_text()
    assert "79.0 ± 1.4 %" in other and "onnx/" not in other


@pytest.mark.parametrize(
    "spoil",
    [
        lambda record: record.update(kept=False),  # no weights, no model, no card
        lambda record: record["result"].pop("origin"),  # trained before that was kept
    ],
    ids=["scores alone", "older run"],
)
def test_cards_that_cannot_be_written_again_stay(run, spoil):
    place = run / "students" / "meta-from-meta-s1-t1" / "books"
    change(place / "stage.json", spoil)
    report.write_report(run)
    assert not (place / "README.md").exists()
    assert (place.parent / "kitchen" / "README.md").exists()


@pytest.mark.parametrize(
    "card, licence",
    [
        ("---\nlicense: mit\n---\ntext", "mit"),
        ("---\nlicense: [mit, apache-2.0]\n---\n", ["mit", "apache-2.0"]),
        ("---\nlicense: 2020-01-01\n---\n", "2020-01-01"),  # a date to YAML, and no JSON
        ("---\nlanguage: en\n---\ntext", None),
        ("---\nlicense: [mit\n---\n", None),  # broken front matter
        ("no front matter", None),
        (None, None),
    ],
)
def test_the_licence_is_what_the_encoder_says(tmp_path, card, licence):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    config = SimpleNamespace(
        teacher=SimpleNamespace(model=str(tmp_path)), data=SimpleNamespace(train="a/train.jsonl")
    )
    known = origin(config, seed=1, examples=5)
    assert known["licence"] == licence
    json.dumps(known)


def test_a_silent_encoder_is_named(run):
    place = run / "students" / "meta-from-meta-s1-t1" / "books"
    change(place / "stage.json", lambda s: s["result"]["origin"].update(licence=None))
    report.write_report(run)
    card = ModelCard.load(place / "README.md")
    assert card.data.license is None
    assert "| licence of that encoder | not stated by encoder |" in card.text


# By labels


def compare_by_labels(folder: Path) -> Path:
    """Three rows on two domains with 10 and all labels, two seeds."""
    points = []
    for asked, counts, shift in ((10, (10, 10), 0), ("all", (90, 110), 15)):
        cells = [
            Cell(row, domain, seed, float(accuracy), "1" * accuracy + "0" * (100 - accuracy))
            for row, base in {"teacher: meta": 80, "finetune": 60, "meta-from-meta": 70}.items()
            for domain in DOMAINS
            for seed in (1, 2)
            for accuracy in [base + shift + seed]
        ]
        points.append(by_labels.point(asked, dict(zip(DOMAINS, counts)), cells))
    result = {"command": "metakd compare --labels", "split": "test", "seeds": [1, 2]}
    result |= {"points": points, **by_labels.against_base(points)}
    write(folder / "labels.json", result)
    return folder


def test_a_comparison_by_labels_begins_with_its_curve(tmp_path):
    run = compare_by_labels(tmp_path / "shop-labels")
    page, text, facts = report.write_report(run)
    found = json.loads(facts.read_text())["labels"]
    assert [point["labels"]["books"] for point in found["points"]] == [10, 90]
    [few] = [
        entry
        for entry in found["against_base"]
        if (entry["row"], entry["domain"], entry["labels"]) == ("meta-from-meta", "average", 10)
    ]
    assert few["difference"][0] == pytest.approx(10)
    assert few["efficiency"][0] == pytest.approx(10 ** (10 / 15))  # 71.5 of 61.5 to 76.5
    assert "With 10 labels of its domain meta-from-meta reaches 71.5" in text.read_text()
    assert text.read_text().index("Accuracy by labels") < text.read_text().index("by method")
    drawn = re.findall(r"<svg.*?</svg>", page.read_text(), re.S)
    assert 'aria-label="Accuracy by labels' in drawn[0]
    assert all(name in drawn[0] for name in ("finetune", "meta-from-meta", ">all<"))


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """With names long enough to push a phone's page apart, if anything does."""
    long = "a_domain_whose_name_is_long_and_has_no_place_to_break_it_at_all"
    run = make_run(tmp_path_factory.mktemp("report") / "shop", domains=(long, "<script>x"))
    one_seed(run)
    write(next(run.glob("students/meta-*/*/onnx/export.json")), export(agreement=0.5))
    return report.write_report(compare_by_labels(run))[0]


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme, paper", [("light", 253), ("dark", 22)])
def test_a_browser_shows_it(browser, page, tmp_path, width, scheme, paper):
    browser.open(page, width, scheme)
    assert browser.requests() == [page.as_uri()]
    assert browser.evaluate("document.scripts.length") == 0
    assert browser.evaluate("innerWidth") == width
    browser.evaluate("document.querySelectorAll('details').forEach(folded => folded.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    sizes = browser.evaluate(
        "[...document.querySelectorAll('svg')].map(drawn => drawn.getBoundingClientRect())"
        ".map(box => [box.left, box.right, box.height])"
    )
    assert len(sizes) == 7
    for left, right, height in sizes:
        assert left >= 0 and right - left > 250 and right <= width and height > 150
    # What is too wide for the page scrolls in its own box, and a keyboard gets there.
    boxes = browser.evaluate(
        "[...document.querySelectorAll('.scroll')].map(box => "
        "[box.scrollWidth > box.clientWidth, box.tabIndex])"
    )
    assert all(index == 0 for _, index in boxes)
    assert any(scrolls for scrolls, _ in boxes) or width > 600
    browser.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as shot:
        pixels = np.asarray(shot.convert("RGB")).astype(int)
    assert pixels.shape[1] == width
    assert abs(pixels[2, 2] - paper).max() <= 5
    shades = pixels.mean(axis=2)
    ink = shades.max() if scheme == "dark" else shades.min()
    assert abs(ink - paper) > 150  # text that can be read
    drawn = browser.evaluate(
        "getComputedStyle(document.querySelector('#tradeoff-text_1 text, svg text')).fill"
    )
    # Text of the plots has the theme's ink.
    assert (sum(map(int, re.findall(r"\d+", drawn)[:3])) > 3 * 128) == (scheme == "dark")
