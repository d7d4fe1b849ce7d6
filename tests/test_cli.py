"""The command line as a person meets it: exit codes, one clear message, no traceback, tables."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from broken_data import CASES
from test_config import CONTRADICTIONS, GENERATED, UNREADABLE, VALID, WRONG, with_fault
from test_data import BROKEN, TEST, put

from metakd import demo, extension, front, ops
from metakd.demo import encoders, quickstart, rated
from metakd.errors import ConfigError
from metakd.models.student import PRESETS


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    texts = [f"{word} {place}" for word in ("good", "bad", "another") for place in ("one", "two")]
    return demo.scratch_encoder(
        folder, texts, hidden_size=16, layers=2, heads=2, vocab_size=60, mlm_steps=0
    )


def refused(result: tuple[int, str, str], code: int) -> str:
    """The message of a run that was refused with this exit code, and with nothing but a message."""
    ended, _, err = result
    assert ended == code
    assert err.startswith("metakd: ") and "remedy: " in err and "Traceback" not in err
    return err


def read_broken(call, encoder, folder, files: dict, data: dict) -> str:
    """What `metakd prototypes` says of a corpus of these files, which it must refuse."""
    for file, content in files.items():
        put(folder / file, content)
    settings = yaml.safe_load(VALID) | {
        "output_dir": str(folder / "run"),
        "data": {
            k: v.replace("{d}", str(folder)) if isinstance(v, str) else v for k, v in data.items()
        },
        "teacher": {"model": str(encoder)},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    message = refused(call("prototypes", folder / "config.yaml"), 3)
    assert not (folder / "run").exists()
    return message


@pytest.mark.parametrize("name", BROKEN)
def test_broken_data_ends_with_exit_code_3(name, call, encoder, tmp_path):
    files, keys, expected = BROKEN[name]
    files = {f: c for f, c in ({"test.csv": TEST} | files).items() if c is not None}
    message = read_broken(call, encoder, tmp_path, files, {"train": "{d}/train.csv"} | keys)
    assert all(line.replace("{d}", str(tmp_path)) in message for line in expected)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.deep] if number % 4 else [])
        for number, name in enumerate(CASES)
    ],
)
def test_every_damage_in_every_format_is_told_with_its_place(name, call, encoder, tmp_path):
    case = CASES[name]
    head, *lines = read_broken(call, encoder, tmp_path, case.files, case.keys).splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("remedy: "))
    found, remedy = lines[:at], lines[at]
    assert head.startswith(f"metakd: {len(case.expected)} problem") and "no row was" in remedy
    assert len(found) == min(len(case.expected), 20)
    for line, reason in zip(found, case.expected, strict=False):
        assert line.startswith(f"  {tmp_path}/{reason.replace('{d}', str(tmp_path))}")


def test_the_broken_corpora_are_many():
    assert len(CASES) >= 300 and len(CASES) + len(BROKEN) >= 120


BROKEN_CONFIGS = (
    {name: content for name, (content, _) in UNREADABLE.items()}
    | {name: with_fault(text) for name, (text, _) in WRONG.items()}
    | {name: with_fault(text) for name, (text, _) in CONTRADICTIONS.items()}
    | {name: text for name, (text, _) in GENERATED.items()}
)


def test_the_broken_configs_are_many():
    assert len(BROKEN_CONFIGS) >= 100


# The generated ones have been refused in test_config.py: some of them show that here, too, all are.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.deep] if name in GENERATED and number % 10 else [])
        for number, name in enumerate(BROKEN_CONFIGS)
    ],
)
def test_a_broken_config_ends_with_exit_code_2(name, call, tmp_path):
    put(tmp_path / "config.yaml", BROKEN_CONFIGS[name])
    message = refused(call("run", tmp_path / "config.yaml"), 2)
    assert str(tmp_path / "config.yaml") in message
    if name in GENERATED:
        assert GENERATED[name][1] in message


def test_usage_errors_end_with_exit_code_2(call, tmp_path):
    assert call("run")[0] == 2
    assert call("runn", "x.yaml")[0] == 2
    put(tmp_path / "config.yaml", VALID)
    for weights in ("a,b", "-1", "nan"):
        message = refused(call("compare", tmp_path / "config.yaml", f"--gamma2={weights}"), 2)
        assert "--gamma2" in message


def test_a_comparison_s_variants_lie_beside_it(call, monkeypatch, tmp_path):
    seen = []

    def note(config, *_):
        seen.append(config)
        raise ConfigError("enough", "nothing")

    monkeypatch.setattr(front, "open_run", note)
    put(tmp_path / "config.yaml", VALID)
    words = ["--withhold", "B\u00fccher \U0001f4da", "output_dir=runs/shop/"]
    refused(call("compare", tmp_path / "config.yaml", *words), 2)
    assert seen[0].data.withhold == ["B\u00fccher \U0001f4da"]
    assert seen[0].output_dir == "runs/shop-withhold-B\u00fccher \U0001f4da"


def test_debug_shows_the_traceback(call, tmp_path):
    code, _, err = call("run", tmp_path / "missing.yaml", "--debug")
    assert code == 2 and "Traceback" in err


def test_an_encoder_that_does_not_exist(call, tmp_path):
    settings = yaml.safe_load(VALID) | {"teacher": {"model": str(tmp_path / "nowhere")}}
    put(tmp_path / "config.yaml", yaml.safe_dump(settings))
    assert "teacher.model" in refused(call("prototypes", tmp_path / "config.yaml"), 2)


@pytest.fixture
def build_cache(monkeypatch, tmp_path):
    """An extension cache of the test's own."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return tmp_path / "extensions"


def test_doctor_names_each_backend_and_why_not(call, monkeypatch, build_cache):
    monkeypatch.setitem(ops.ABSENT, ("triton", "cpu"), frozenset({"hidden_mse"}))
    code, out, err = call("doctor", "--json")
    report = json.loads(out)
    assert code == 0, err
    assert set(report) == {"versions", "devices", "compiled kernels", "backends", "training"}
    assert "libmetakd_cpu.so" in report["compiled kernels"]["cpu"]
    assert report["training"] == {"DeepSpeed": "ready"}
    assert "13 of 14" in report["backends"]["triton on cpu"]
    assert "'triton' does not implement hidden_mse" in report["backends"]["triton on cpu"]
    assert report["backends"]["reference on cpu"].startswith("14 of 14")


def test_build_compiles_or_says_why_not(call, monkeypatch):
    asked = []

    def load(kind, compiling=False):
        asked.append((kind, compiling))
        return "no CUDA compiler" if kind == "cuda" else None

    monkeypatch.setattr(extension, "load", load)
    monkeypatch.setattr(extension, "describe", lambda kind: "installed: here")
    code, out, _ = call("build")
    assert code == 0 and out == "cpu: installed: here\n" and asked == [("cpu", True)]
    assert "no CUDA compiler" in refused(call("build", "--cuda"), 6)


def test_models_that_do_not_fit_are_refused_before_anything_is_built(call, encoder, tmp_path):
    demo.write_corpus(tmp_path, train=8, validation=2, test=2)
    settings = {
        "output_dir": str(tmp_path / "run"),
        "data": {n: str(tmp_path / f"{n}.jsonl") for n in ("train", "validation", "test")},
        "teacher": {"model": str(encoder)},
        "student": {"layers": [0, 7]},
    }
    put(tmp_path / "config.yaml", yaml.safe_dump(settings))
    message = refused(call("run", tmp_path / "config.yaml"), 2)
    assert "[0, 7] names a layer outside 0..1" in message
    assert not (tmp_path / "run" / "teachers").exists()


def test_doctor_names_a_build_lock_and_the_remedy(call, build_cache):
    put(build_cache / "py311_cpu" / "deepspeed_shm_comm" / "lock", "")
    put(build_cache / "py311_cpu" / "deepspeed_shm_comm" / "build.ninja", "")
    code, out, _ = call("doctor", "--json")
    ((lock, advice),) = json.loads(out)["build locks"].items()
    assert code == 0 and lock.endswith("py311_cpu/deepspeed_shm_comm/lock")
    assert "0 min old" in advice and advice.endswith(f"rm {lock}")


def test_doctor_estimates_the_memory_of_a_configuration(call, encoder, tmp_path, build_cache):
    put(
        tmp_path / "config.yaml",
        yaml.safe_dump(yaml.safe_load(VALID) | {"teacher": {"model": str(encoder)}}),
    )
    code, out, _ = call("doctor", tmp_path / "config.yaml", "bf16=true", "--json")
    table = json.loads(out)["memory per process, estimated"]
    assert code == 0 and table["counted for"] == "1 process, bf16"
    assert "weights" in table["student training, any ZeRO stage"]
    assert "weights" in table["teacher training, any ZeRO stage"]
    code, out, _ = call("doctor", tmp_path / "config.yaml")
    assert code == 0 and "frozen teacher beside the student" in out
    assert "seed" in refused(call("doctor", tmp_path / "config.yaml", "seed=x"), 2)
    message = refused(call("doctor", tmp_path / "config.yaml", "teacher.model=nowhere/at/all"), 2)
    assert "nowhere/at/all" in message


@pytest.mark.parametrize("stage", ["prototypes", "teach", "cache", "distill", "run", "compare"])
def test_every_stage_starts(stage, call, encoder, tmp_path):
    demo.write_corpus(tmp_path, train=8, validation=2, test=2)
    settings = {
        "output_dir": str(tmp_path / "run"),
        "data": {n: str(tmp_path / f"{n}.jsonl") for n in ("train", "validation", "test")}
        | {"max_length": 16},
        "teacher": {"model": str(encoder), "training": {"num_train_epochs": 1}},
        "student": {"preset": "tiny-2l-128"},
        "distill": {"training": {"num_train_epochs": 1}, "domains": ["novels"]},
        "compare": {"rows": [{"method": "meta", "teacher": "meta"}], "seeds": [1]},
        "report_to": ["tensorboard"],
    }
    put(tmp_path / "config.yaml", yaml.safe_dump(settings))
    options = {
        "compare": ["--withhold", "hiking", "--data-fraction", "0.5", "--gamma2", "0,1"],
        "cache": ["distill.cache_teacher=all"],
    }.get(stage, [])
    code, out, err = call(stage, tmp_path / "config.yaml", *options, "seed=7", "--local_rank=0")
    assert code == 0, err
    if stage == "cache":
        assert "teacher outputs are in" in out
        message = refused(call("cache", tmp_path / "config.yaml", "seed=7"), 2)
        assert "distill.cache_teacher: none keeps nothing" in message
    elif stage == "compare":
        assert "| meta-from-meta-gamma2-1 |" in out
        assert (tmp_path / "run-withhold-hiking-fraction-0.5" / "compare.md").exists()
    elif stage == "run":
        assert "novels" in out and "student is in" in out
        assert list((tmp_path / "run").rglob("events.out.tfevents*"))
        again = call("evaluate", tmp_path / "config.yaml", "seed=7")
        assert again[0] == 0 and "novels" in again[1] and "running" not in again[1]
    if stage == "teach":
        message = refused(call("evaluate", tmp_path / "config.yaml", "seed=7"), 4)
        assert "students/meta-from-meta-s7/novels: is missing" in message


def test_a_stage_checks_what_it_uses(call, encoder, tmp_path):
    """A teacher may be of a kind that the configured students cannot learn from, students may not
    fit it, and prototypes ask for no validation of each domain."""
    demo.write_corpus(tmp_path, train=8, validation=2, test=2)
    lines = (tmp_path / "validation.jsonl").read_text().splitlines(keepends=True)
    some = [line for line in lines if "novels" not in line]
    put(tmp_path / "some.jsonl", "".join(some))
    settings = {
        "output_dir": str(tmp_path / "run"),
        "data": {n: str(tmp_path / f"{n}.jsonl") for n in ("train", "validation")}
        | {"max_length": 16},
        "teacher": {"model": str(encoder), "training": {"num_train_epochs": 1}},
        "student": {"layers": [1]},
        "distill": {"layer_map": [7]},
    }
    put(tmp_path / "config.yaml", yaml.safe_dump(settings))
    code, out, err = call("teach", tmp_path / "config.yaml", "teacher.kind=mix")
    assert code == 0 and "teachers/mix-s42" in out, err
    assert "needs teacher meta" in refused(
        call("distill", tmp_path / "config.yaml", "teacher.kind=mix"), 2
    )
    assert "layer" in refused(call("distill", tmp_path / "config.yaml"), 2)
    only = f"data.validation={tmp_path / 'some.jsonl'}"
    assert call("prototypes", tmp_path / "config.yaml", only)[0] == 0
    message = refused(call("teach", tmp_path / "config.yaml", only), 3)
    assert "'novels' has no validation examples" in message and "leave the domain out" in message


def test_quickstart(call, tmp_path, monkeypatch):
    """The whole quickstart on a smaller corpus, with the fallback encoder."""

    def offline(*_args):
        raise ConnectionError("offline")

    monkeypatch.setattr(encoders, "download", offline)
    monkeypatch.setattr(rated, "download", offline)
    full = demo.write_corpus
    monkeypatch.setattr(
        quickstart, "write_corpus", lambda folder: full(folder, train=60, validation=4, test=8)
    )
    scratch = demo.scratch_encoder
    monkeypatch.setattr(
        encoders,
        "scratch_encoder",
        lambda folder, texts: scratch(folder, texts, hidden_size=32, layers=6, mlm_steps=0),
    )
    words = ["quickstart", tmp_path / "quick"]
    words += ["teacher.training.max_steps=2", "distill.training.max_steps=2"]
    code, out, err = call(*words)
    assert code == 0, err
    rows = ("teacher: meta", "finetune", "finetune_all", "meta-from-meta")
    assert all(f"| {row} |" in out for row in rows)
    assert "40 labels of novels: meta-from-meta has " in out.replace("\n", " ")
    assert len(list((tmp_path / "quick" / "students").rglob("model.safetensors"))) == 3
    # A second start finds everything done.
    assert "meta-from-meta-s42/novels: inputs unchanged, skipped" in call(*words)[1]


def test_a_config_is_refused_in_under_two_seconds_from_the_shell(tmp_path):
    put(tmp_path / "config.yaml", "outputdir: x\n")
    done = subprocess.run(
        [sys.executable, "-m", "metakd", "run", str(tmp_path / "config.yaml")],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ,
    )
    assert done.returncode == 2 and "did you mean" in done.stderr and "Traceback" not in done.stderr


def test_presets_are_those_of_the_configuration():
    from typing import get_args

    from metakd.config import StudentConfig

    literal = get_args(StudentConfig.model_fields["preset"].annotation)[0]
    assert set(get_args(literal)) == set(PRESETS)
