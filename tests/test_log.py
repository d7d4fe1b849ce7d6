"""Throughput in the log, and progress in a file."""

import io
import json

import pytest
import torch
from rich.console import Console

from metakd.training import log as module
from metakd.training.log import Meter, RunLog
from metakd.training.world import World


@pytest.mark.parametrize("tokens", [0, 250])  # a caller that does not count tokens, one that does
def test_rates_are_since_the_last_line(tmp_path, monkeypatch, tokens):
    clock = iter([10.0, 14.0, 15.0])  # start, first and second line
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    with RunLog(tmp_path, ["jsonl"], Console()) as log:
        log.start("title", 3)
        for _ in range(2):
            log.advance(8, tokens)
        log.write(2, {"loss": 1.0})
        log.advance(8, tokens)
        log.write(3, {"loss": 0.5})
        log.write(3, {"accuracy": 1.0}, "validation")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line.get("samples_per_second") for line in lines] == [4.0, 8.0, None]
    rates = [line.get("tokens_per_second") for line in lines]
    assert rates == ([125.0, 250.0, None] if tokens else [None] * 3)


def test_an_evaluation_does_not_slow_the_rates_down(tmp_path, monkeypatch):
    clock = iter([10.0, 12.0, 112.0, 114.0])  # start, evaluation from and to, line
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    with RunLog(tmp_path, ["jsonl"], Console()) as log:
        log.start("title", 1)
        with log.pausing():
            pass
        log.advance(8)
        log.write(1, {"loss": 1.0})
    assert json.loads((tmp_path / "log.jsonl").read_text())["samples_per_second"] == 2.0


def test_means_of_scalars_and_vectors():
    meter = Meter()
    meter.add({"loss": torch.tensor(1.0), "shares": torch.tensor([1.0, 0.0])}, 3)
    meter.add({"loss": torch.tensor(5.0), "shares": torch.tensor([0.0, 1.0])}, 1)
    assert meter.read(World()) == {"loss": 2.0, "shares": [0.75, 0.25]}
    assert meter.read(World()) == {}


def test_lists_are_for_the_jsonl_alone(tmp_path, capsys):
    with RunLog(tmp_path, ["jsonl", "tensorboard"], Console()) as log:
        log.start("title", 1)
        log.write(1, {"loss": 1.0, "shares": [0.5, 0.5]})
    [line] = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line)["shares"] == [0.5, 0.5]


def test_a_file_gets_a_line_per_tenth(tmp_path):
    """Where no bar can be shown, as in the log of a job; what was done before is not told again."""
    out = io.StringIO()
    with RunLog(tmp_path, [], Console(file=out, width=200)) as log:
        log.start("teacher meta", 40, done=22)
        for _ in range(18):
            log.advance(32, 640)
    lines = out.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        f"teacher meta: step {step} of 40" for step in (24, 28, 32, 36, 40)
    ]
    assert lines[-1].endswith(" s, about 0 s left")
    with RunLog(tmp_path, [], Console(file=out, width=200), active=False) as log:
        log.start("teacher meta", 40)
        for _ in range(40):
            log.advance(1)
    assert len(out.getvalue().splitlines()) == 5
