"""``bf16: auto`` is what the device computes fast, ``bf16: true`` where it is slow is told of."""

import warnings
from pathlib import Path

import pytest

from metakd import environment, front
from metakd.config import load_config
from metakd.environment import has_bf16

PROCESSORS = {
    "x86 with AMX": ("model name\t: X\nflags\t\t: fpu avx512f amx_bf16 amx_tile\n", True),
    "x86 with AVX512-BF16": ("flags\t\t: avx512f avx512_bf16\n", True),
    "x86 without": ("flags\t\t: fpu avx2 avx512f avx512bw\nmodel name\t: bf16\n", False),
    "ARM with": ("processor\t: 0\nFeatures\t: fp asimd i8mm bf16 dgh\n", True),
    "ARM without": ("Features\t: fp asimd\n", False),
    "untold": ("", False),
}


def configured(**given):
    return load_config(
        {
            "output_dir": "runs/x",
            "data": {"train": "train.jsonl"},
            "teacher": {"model": "m"},
            "student": {"layers": [0]},
            **given,
        }
    )


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """``machine(text)``: a CPU of which Linux tells so."""

    def build(text: str):
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(environment, "has_cuda", lambda: False)
        monkeypatch.setattr(environment, "Path", lambda place: tmp_path / Path(place).name)

    return build


@pytest.mark.parametrize("name", PROCESSORS)
def test_auto_is_what_the_processor_has(machine, name):
    text, able = PROCESSORS[name]
    machine(text)
    assert has_bf16() is able
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = front.settled(configured(bf16="auto"))
    assert found.bf16 is able and found.precision == ("bf16" if able else "fp32")


def test_true_stays_and_is_told_of_where_it_is_slow(machine):
    machine(PROCESSORS["x86 without"][0])
    with pytest.warns(UserWarning, match="no instructions for it.*bf16: auto"):
        assert front.settled(configured(bf16=True)).bf16 is True
    machine(PROCESSORS["x86 with AMX"][0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert front.settled(configured(bf16=True)).bf16 is True
        assert front.settled(configured()).precision == "fp32"
        assert front.settled(configured(fp16=True)).precision == "fp16"


def test_a_run_knows_no_auto(machine, tmp_path):
    machine(PROCESSORS["x86 without"][0])
    opened = front.open_run(configured(bf16="auto", output_dir=str(tmp_path)))
    assert opened.config.bf16 is False
