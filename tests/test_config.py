"""Broken configurations end in one ConfigError that lists every problem; right ones load."""

import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from metakd.config import DistillConfig, RunConfig, load_config
from metakd.config.checks import check_contradictions
from metakd.errors import ConfigError

VALID = """\
output_dir: runs/x
data: {train: train.jsonl}
teacher: {model: encoder}
student: {preset: tiny-2l-128}
"""


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes) -> str:
        path = tmp_path / "run.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def refused(path: str, overrides=()) -> str:
    start = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert time.process_time() - start < 10  # a second, or two beside other tests
    assert caught.value.exit_code == 2
    assert caught.value.remedy
    return caught.value.cause


# Files in which there is nothing to check yet: content, and what the message says after the path.
UNREADABLE = {
    "empty": ("", ": is empty"),
    "comments only": ("# nothing\n", ": is empty"),
    "a list": ("- a\n- b\n", ": must hold keys with values (got ['a', 'b'])"),
    "a word": ("hello", ": must hold keys with values (got 'hello')"),
    "bad YAML": ("data:\n  train: [a\nseed: 1\n", ":3:5: while parsing a flow sequence"),
    "a tab as indent": ("data:\n\ttrain: a\n", ":2:1: "),
    "a colon in a value": ("output_dir: a: b\n", ":1:14: "),
    "two documents": (VALID + "---\n" + VALID, ":5:1: "),
    "a key twice": (VALID + "output_dir: runs/y\n", ":5:1: key 'output_dir' is given twice"),
    "a nested key twice": ("data: {train: a, train: b}", ":1:18: key 'train' is given twice"),
    "a list as key": ("? [a, b]\n: 1\n", ":1:3: a key must be one word"),
    "an alias": ("a: &a [x]\nb: *a\n", ":2:4: aliases are not supported"),
    "a Python tag": ("a: !!python/object/apply:os.system [ls]\n", ":1:4: tags are not supported"),
    "a standard tag": ("seed: !!str 3\n", ":1:7: tags are not supported"),
    "an impossible date": ("output_dir: 2024-13-45\n", ":1:13: a value cannot be read:"),
    "deep nesting": ("[" * 5000, ":1:1: nested too deeply"),
    "a NUL": ("output_dir: a\nseed: \0\n", ":2:7: character #x0000 is not allowed"),
    "bad UTF-8": (b"output_dir: a\nseed: \xff\n", ":2:7: byte 0xff is not UTF-8"),
    "UTF-16": (VALID.encode("utf-16"), ":1:1: byte 0xff is not UTF-8"),
}


@pytest.mark.parametrize("content, message", UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_file(write, content, message):
    path = write(content)
    cause = refused(path)
    assert cause.startswith(path + message)
    assert "\n" not in cause


def test_missing_file_and_folder(tmp_path):
    assert refused(str(tmp_path / "none.yaml")).endswith("none.yaml: No such file or directory")
    assert refused(str(tmp_path)).endswith(": Is a directory")


# Keys that are wrong by themselves: what replaces VALID's blocks, and the whole list of problems.
WRONG = {
    "nothing required": (
        "seed: 1",
        [f"{key}: required key is missing" for key in ("output_dir", "data", "teacher", "student")],
    ),
    "typo at the top": (
        "outputdir: a",
        ["outputdir: unknown key, did you mean output_dir? (got 'a')"],
    ),
    "typo in a block": (
        "distill: {temprature: 2}",
        ["distill.temprature: unknown key, did you mean temperature? (got 2)"],
    ),
    "typo in an inner block": (
        "distill: {training: {learning_rat: 1.0}}",
        ["distill.training.learning_rat: unknown key, did you mean learning_rate? (got 1.0)"],
    ),
    "typo in a list of blocks": (
        "compare: {rows: [{method: finetune}, {metod: meta, teacher: meta}]}",
        ["compare.rows.1.metod: unknown key, did you mean method? (got 'meta')"],
    ),
    "key of another block": (
        "temperature: 2",
        ["temperature: unknown key, did you mean distill.temperature? (got 2)"],
    ),
    "key of several blocks": (
        "weight_decay: 0.1",
        [
            "weight_decay: unknown key, did you mean teacher.training.weight_decay or "
            "distill.training.weight_decay or distill.intermediate.weight_decay? (got 0.1)"
        ],
    ),
    "key like none": (
        "prototypes: {zzz: 1}",
        ["prototypes.zzz: unknown key, known here: alpha, rescale (got 1)"],
    ),
    "key that is no word": (
        "prototypes: {1: 1}",
        ["prototypes.1: unknown key, known here: alpha, rescale (got 1)"],
    ),
    "typo with a bad value": (
        "distill: {temprature: -2}",
        [
            "distill.temprature: unknown key, did you mean temperature? (got -2)",
            "distill.temperature: must be greater than 0 (got -2)",
        ],
    ),
    "wrong type": ("seed: abc", ["seed: must be a valid integer, unable to parse"]),
    "fraction for an integer": (
        "seed: 1.5",
        ["seed: must be a valid integer, got a number with a fractional part (got 1.5)"],
    ),
    "truth for a number": (
        "zero: true",
        ["zero: must not be true or false, quote the word if it is one (got True)"],
    ),
    "the word no": (
        "data: {train: a, withhold: [no]}",
        ["data.withhold.0: must not be true or false, quote the word if it is one (got False)"],
    ),
    "empty block": ("distill:", ["distill: must hold keys with values (got None)"]),
    "list for a block": ("distill: [1]", ["distill: must hold keys with values (got [1])"]),
    "word for a list": ("report_to: jsonl", ["report_to: must be a valid list (got 'jsonl')"]),
    "empty list": ("compare: {rows: []}", ["compare.rows: List should have at least 1 item"]),
    "unknown word": ("zero: 4", ["zero: must be 0, 1, 2 or 3 (got 4)"]),
    "out of range": (
        "prototypes: {alpha: 1.5}",
        ["prototypes.alpha: must be less than or equal to 1 (got 1.5)"],
    ),
    "not a number": (
        "distill: {gamma2: .nan}",
        ["distill.gamma2: must be a finite number (got nan)"],
    ),
    "infinite": (
        "distill: {temperature: .inf}",
        ["distill.temperature: must be a finite number (got inf)"],
    ),
    "infinite in words": (
        "distill: {temperature: inf}",
        ["distill.temperature: must be a finite number (got 'inf')"],
    ),
    "blank": ("output_dir: ' '", ["output_dir: must not be blank"]),
    "union, near the word": (
        "distill: {layer_map: unifrm}",
        ["distill.layer_map: must be 'uniform', 'last' or 'copied' or must be a valid list (got"],
    ),
    "union, near the list": (
        "distill: {layer_map: [0, -1]}",
        ["distill.layer_map.1: must be greater than or equal to 0 (got -1)"],
    ),
    "no student": (
        "student: {copy_from: teacher}",
        ["student: give exactly one of preset, layers, model (given: none)"],
    ),
    "two students": (
        "student: {preset: tiny-2l-128, layers: [0]}",
        ["student: give exactly one of preset, layers, model (given: preset, layers)"],
    ),
    "method without its teacher": (
        "compare: {rows: [{method: meta, teacher: mix}]}",
        ["compare.rows.0: method meta needs teacher meta, got mix"],
    ),
    "two precisions": (
        "{bf16: true, fp16: true}",
        ["bf16 and fp16 are both asked for: give one"],
    ),
    # A value that is wrong by itself neither hides contradictions of other keys nor makes any.
    "all at once": (
        "{seed: x, compat: easytransfer, bf16: true, fp16: true, student: {layers: [a]}}",
        [
            "student.layers.0: must be a valid integer",
            "seed: must be a valid integer",
            "bf16 and fp16 are both asked for",
            "compat: easytransfer trains in two stages, set distill.schedule: two_stage",
        ],
    ),
    "no contradiction with a wrong key": (
        "{compat: easytransfer, distill: {schedule: two_stag}}",
        ["distill.schedule: must be 'joint' or 'two_stage' (got 'two_stag')"],
    ),
}


def problems(cause: str) -> list[str]:
    first, *rest = cause.split("\n  ")
    if rest:
        assert first == f"{len(rest)} problems:"
    return rest or [first]


def with_fault(text: str) -> str:
    """A valid configuration with the keys of one entry of ``WRONG``."""
    wrong = yaml.safe_load(text)
    valid = {} if text == "seed: 1" else yaml.safe_load(VALID)
    if "outputdir" in wrong:
        del valid["output_dir"]  # the typo stands for it, so that it is not missing as well
    return yaml.safe_dump(valid | wrong)


@pytest.mark.parametrize("text, expected", WRONG.values(), ids=WRONG)
def test_wrong_keys(write, text, expected):
    path = write(with_fault(text))
    found = problems(refused(path))
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert line.startswith(f"{path}: {start}")


# Faults made from the models themselves, so that a new key is covered as soon as it exists.

Place = tuple[str | int, ...]


def blocks(model: type[BaseModel] = RunConfig, path: Place = ()) -> dict[Place, type[BaseModel]]:
    """Every block by its place; of a list of blocks the first."""
    found = {path: model}
    for key, field in model.model_fields.items():
        pending = [(field.annotation, (*path, key))]
        while pending:
            annotation, place = pending.pop()
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                found |= blocks(annotation, place)
            in_list = get_origin(annotation) is list
            pending += [(a, (*place, 0) if in_list else place) for a in get_args(annotation)]
    return found


# A valid entry of each list of blocks, and one that can hold others.
FIRST: dict[str | int, list[dict]] = {
    "rows": [{"method": "finetune"}, {"method": "logits_kd", "teacher": "mix"}],
    "chain": [{"preset": "tiny-2l-128"}],
}


def tree_with(path: Place) -> tuple[dict, dict]:
    """A valid configuration that spells out the block at ``path``, and that block."""
    tree = yaml.safe_load(VALID)
    block = tree
    for key, following in zip(path, [*path[1:], ""]):
        if isinstance(key, int):
            block = block[key]
        elif isinstance(following, int):
            entry = FIRST[key][0 if path[-2] == key else -1]
            block = block.setdefault(key, [dict(entry)])
        else:
            block = block.setdefault(key, {})
    return tree, block


def leaf_faults() -> Iterator[tuple[str, dict, str]]:
    """(name, tree, beginning of the one line to expect)."""
    for path, model in blocks().items():
        for key, field in model.model_fields.items():
            dotted = ".".join(map(str, (*path, key)))
            # A letter less, a letter more, and a word like none.
            typos = {key[:-1], key + "x", key[::-1].upper()} - model.model_fields.keys()
            for typo in sorted(typos):
                tree, block = tree_with(path)
                default = field.get_default(call_default_factory=True)
                default = None if field.is_required() else to_jsonable_python(default)
                block[typo] = block.pop(key, default)
                where = ".".join(map(str, (*path, typo)))
                yield f"{typo} for {dotted}", tree, f"{where}: unknown key"
            holds_list = "list" in str(field.annotation)
            wrong = {"a list in a list": [[1]], "a word": "?!"}
            if holds_list:
                wrong = {"a number": 3.5}
            elif "str" in str(field.annotation):
                wrong.pop("a word")
            if type(None) not in get_args(field.annotation):
                wrong["nothing"] = None
            for what, value in wrong.items():
                tree, block = tree_with(path)
                block[key] = value
                yield f"{what} for {dotted}", tree, dotted
            for limit in field.metadata:
                beyond = {
                    "ge": lambda bound: bound - 1,
                    "gt": lambda bound: bound,
                    "le": lambda bound: bound + 1,
                    "lt": lambda bound: bound,
                }
                for name, make in beyond.items():
                    if hasattr(limit, name):
                        tree, block = tree_with(path)
                        block[key] = make(getattr(limit, name))
                        yield f"{name} of {dotted}", tree, dotted


GENERATED = {name: (yaml.safe_dump(tree), start) for name, tree, start in leaf_faults()}


def test_the_generated_faults_cover_every_key():
    assert len(GENERATED) >= 300
    assert len(blocks()) >= 12 and ("compare", "rows", 0) in blocks()
    keys = {name.rpartition(" ")[2] for name in GENERATED}
    for path, model in blocks().items():
        assert keys >= {".".join(map(str, (*path, key))) for key in model.model_fields}


@pytest.mark.parametrize("name", GENERATED)
def test_no_generated_fault_passes(write, name):
    text, start = GENERATED[name]
    path = write(text)
    found = problems(refused(path))
    assert found[0].startswith(f"{path}: {start}"), found
    # A key like none is not taken for another, so that a required one is missing beside it.
    missing = ("required key is missing", "(given: none)")
    others = [line for line in found[1:] if not line.endswith(missing)]
    assert not others and len(found) <= 2


CONTRADICTIONS = {
    "domains for one student": (
        "distill: {domains: [a], one_student_for_all: true}",
        "distill.domains: excluded by distill.one_student_for_all: true",
    ),
    "release trains in two stages": (
        "compat: easytransfer",
        "compat: easytransfer trains in two stages, set distill.schedule: two_stage",
    ),
    "a cache of answers that change": (
        "{compat: easytransfer, distill: {schedule: two_stage, cache_teacher: logits}}",
        "distill.cache_teacher: excluded by compat: easytransfer",
    ),
    "a stream for a teacher that does not run": (
        "distill: {teacher_stream: true, cache_teacher: all}",
        "distill.teacher_stream: excluded by distill.cache_teacher: all",
    ),
    "map longer than the student": (
        "{student: {layers: [0, 2]}, distill: {layer_map: [0, 2, 4]}}",
        "distill.layer_map: has 3 teacher layers for 2 of the student",
    ),
    "map shorter than the preset": (
        "{student: {preset: mini-4l-256}, distill: {layer_map: [0]}}",
        "distill.layer_map: has 1 teacher layers for 4 of the student",
    ),
    "a seed twice": ("compare: {seeds: [1, 2, 1]}", "compare.seeds: given more than once: 1"),
    "a row twice": (
        "compare: {rows: [{method: finetune}, {method: finetune}]}",
        "compare.rows: given more than once: finetune",
    ),
    "a domain twice": ("distill: {domains: [a, a]}", "distill.domains: given more than once: a"),
    "no domain": ("distill: {domains: []}", "distill.domains: is empty"),
    "withheld twice": (
        "data: {train: t, withhold: [b, b]}",
        "data.withhold: given more than once: b",
    ),
    "nothing to learn": (
        "distill: {gamma2: 0, terms: {embedding: 0, hidden: 0, attention: 0, prediction: 0}}",
        "distill.terms: every weight is 0",
    ),
    "nothing to learn from logits": (
        "distill: {method: logits_kd, terms: {prediction: 0}}",
        "distill.terms: every weight is 0 that logits_kd has (prediction, hard_label)",
    ),
    "nothing to learn from relations": (
        "distill: {method: minilmv2, terms: {attention: 0, prediction: 0}}",
        "distill.terms: every weight is 0 that minilmv2 has",
    ),
    "warm-up without end": (
        "teacher: {model: m, training: {warmup_steps: 20, max_steps: 10}}",
        "teacher.training.warmup_steps: 20 is more than teacher.training.max_steps 10",
    ),
    "method against the teacher": (
        "teacher: {model: m, kind: mix}",
        "teacher.kind: against distill.method: method meta needs teacher meta, got mix",
    ),
    "more teachers than seeds": (
        "compare: {seeds: [1], teacher_seeds: 2}",
        "compare.teacher_seeds: 2 is more than the 1 of compare.seeds",
    ),
    "a range of a temperature that stays": (
        "distill: {temperature_range: [1, 2]}",
        "distill.temperature_range: needs a distill.temperature_schedule other than constant",
    ),
    "a range that falls": (
        "distill: {temperature_schedule: loss, temperature_range: [6, 2]}",
        "distill.temperature_range: [6, 2] must rise, give the lower end first",
    ),
    "one temperature and many": (
        "distill: {temperature_schedule: loss, temperature: 4}",
        "distill.temperature: excluded by distill.temperature_schedule: loss, leave it out or set "
        "distill.temperature_range",
    ),
    "an anchor at many temperatures": (
        "distill: {temperature_schedule: loss, generations: 2}",
        "distill.temperature_schedule: excluded by distill.generations and distill.anchors",
    ),
    "an anchor of many targets": (
        "{teacher: {model: m}, distill: {method: gated_kd, generations: 2}}",
        "distill.method: gated_kd has a target of each teacher and no one to anchor",
    ),
    "a temperature that the release has not": (
        "{compat: easytransfer, distill: {schedule: two_stage, temperature_schedule: loss}}",
        "distill.temperature_schedule: excluded by compat: easytransfer",
    ),
    "negative seed": ("seed: -1", "seed: must be from 0 to 2^32 - 1 (got -1)"),
}


@pytest.mark.parametrize("text, expected", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictions(write, text, expected):
    path = write(yaml.safe_dump(yaml.safe_load(VALID) | yaml.safe_load(text)))
    cause = refused(path)
    assert cause.startswith(f"{path}: {expected}")
    assert "\n" not in cause


def test_overrides_win_in_order(write):
    path = write(VALID + "seed: 1\ndistill: {gamma2: 0.1, temperature: 2}\n")
    config = load_config(
        path,
        [
            "seed=2",
            "seed=3",
            "distill.gamma2=0.5",
            "teacher.training.learning_rate=1e-4",  # a block the file does not have
            "data.withhold=[a, b]",
            "data.validation=",
        ],
    )
    assert config.seed == 3
    assert (config.distill.gamma2, config.distill.temperature) == (0.5, 2.0)
    assert config.teacher.training.learning_rate == 1e-4
    assert config.data.withhold == ["a", "b"]
    assert config.data.validation is None


BROKEN_OVERRIDES = {
    "seed": "command line: 'seed' is not key=value or block.key=value",
    "=1": "command line: '=1' is not key=value",
    "distill..gamma2=1": "command line: 'distill..gamma2=1' is not key=value",
    "distill.gama2=1": "command line: distill.gama2: unknown key, did you mean gamma2? (got 1)",
    "sed=1": "command line: sed: unknown key, did you mean seed? (got 1)",
    "distill.gamma2=-1": "command line: distill.gamma2: must be greater than",
    "data.withhold=[a": "command line: data.withhold: 1:3: ",
    "output_dir.x=1": "command line: output_dir.x: output_dir holds no keys in ",
    "seed=!!python/name:os.system": "command line: seed: 1:1: tags are not supported",
    "distill={}=1": "command line: distill: ",
}


@pytest.mark.parametrize("override, expected", BROKEN_OVERRIDES.items(), ids=BROKEN_OVERRIDES)
def test_broken_override(write, override, expected):
    assert problems(refused(write(VALID), [override]))[0].startswith(expected)


def test_problems_name_their_source(write):
    path = write(VALID + "zero: 4\n")
    found = problems(refused(path, ["seed=x", "oops"]))
    sources = sorted(line.split(": ")[0] for line in found)
    assert sources == sorted([path, "command line", "command line"])


def test_valid_file(write):
    config = load_config(write(VALID))
    assert config == RunConfig(
        output_dir="runs/x",
        data={"train": "train.jsonl"},
        teacher={"model": "encoder"},
        student={"preset": "tiny-2l-128"},
    )
    assert check_contradictions(config) == []


@pytest.mark.parametrize(
    "text",
    [
        "distill: {layer_map: [2, 5]}",
        "distill: {terms: {embedding: 0, hidden: 0, attention: 0, prediction: 0}}",
        "{compat: easytransfer, distill: {schedule: two_stage}}",
        "{teacher: {model: m, kind: single}, distill: {method: mtn_kd}}",
        "distill: {method: mtn_kd}",
        "distill: {temperature_schedule: loss, generations: 2, anchor_by: geometric}",
        "teacher: {model: m, training: {learning_rate: 2e-5, max_steps: 10, warmup_steps: 10}}",
        "data: {train: a, text: 'no'}",
    ],
)
def test_near_misses_are_valid(write, text):
    load_config(write(yaml.safe_dump(yaml.safe_load(VALID) | yaml.safe_load(text))))


def test_byte_order_mark_and_crlf(write):
    assert load_config(write(b"\xef\xbb\xbf" + VALID.replace("\n", "\r\n").encode())).seed == 42


@pytest.mark.parametrize(
    "text, transfer",
    [
        ("{}", "own"),
        ("{data: {train: t, unlabelled: u}}", "unlabelled"),
        ("{data: {train: t, labels: {a: 5}}}", "unlabelled"),
        ("{compare: {labels: [5, all]}}", "unlabelled"),
        ("{data: {train: t, unlabelled: u}, distill: {transfer: all}}", "all"),
        ("{data: {train: t, unlabelled: u}, compat: paper}", "own"),
    ],
)
def test_texts_without_labels_are_used_unless_the_paper_is_asked_for(write, text, transfer):
    config = load_config(write(yaml.safe_dump(yaml.safe_load(VALID) | yaml.safe_load(text))))
    assert config.distill.transfer == transfer and config.form == "paper"


def test_copied_layers_are_matched_with_those_they_come_from(write):
    rows = "[{method: finetune, student: {preset: tiny-2l-128}}]"
    options = ["student={layers: [0, 2, 5]}", f"compare.rows={rows}"]
    config = load_config(write(VALID), [*options, "distill.layer_map=copied"])
    row = config.compare.rows[0]
    assert config.distill.towards(config.student).layer_map == [0, 2, 5]
    assert row.taught(config.distill).towards(row.student).layer_map == "uniform"
    config = load_config(write(VALID), [*options, "distill.layer_map=last"])
    assert config.distill.towards(config.student) is config.distill


def test_defaults_do_not_leak(write):
    load_config(write(VALID), ["distill.terms.hidden=0.5"])
    assert load_config(write(VALID)).distill == DistillConfig()


def test_every_config_in_the_repository_loads():
    for path in (Path(__file__).parents[1] / "configs").glob("*.yaml"):
        load_config(str(path))


def test_refused_without_importing_torch(write):
    """A wrong configuration must not wait for the libraries that a right one needs."""
    code = (
        "import sys; from metakd.errors import ConfigError; from metakd.config import load_config\n"
        "try: load_config(sys.argv[1])\n"
        "except ConfigError: sys.exit('torch' in sys.modules)\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run([sys.executable, "-c", code, write("seed: x")], check=True, timeout=60)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1


# A DeepSpeed configuration: its file's content (None: no file), and what must be said.
WRONG_DEEPSPEED = {
    "no file": (None, ["deepspeed: No such file or directory"]),
    "no JSON": ("{", ["deepspeed: is no JSON file"]),
    "a list": ("[]", ["deepspeed: must hold keys with values (got [])"]),
    "typo at the top": (
        '{"zero_optimisation": {"stage": 2}}',
        ["deepspeed.zero_optimisation: unknown key, did you mean zero_optimization?"],
    ),
    "typo below": (
        '{"zero_optimization": {"stage": 2, "overlap_com": true}}',
        ["deepspeed.zero_optimization.overlap_com: unknown key, did you mean overlap_comm?"],
    ),
    "against one run and right for the other": (
        '{"optimizer": {"type": "AdamW", "params": {"lr": 2e-5}}}',
        ["deepspeed.optimizer.params.lr: is 2e-05, but learning_rate is 5e-05;"],
    ),
    "against both": (
        '{"gradient_clipping": 0.5}',
        ["deepspeed.gradient_clipping: is 0.5, but max_grad_norm is 1.0;"] * 2,
    ),
}


@pytest.mark.parametrize("content, expected", WRONG_DEEPSPEED.values(), ids=WRONG_DEEPSPEED)
def test_wrong_deepspeed_configuration(write, tmp_path, content, expected):
    file = tmp_path / "deepspeed.json"
    if content is not None:
        file.write_text(content)
    path = write(VALID + f"deepspeed: {file}\n")
    found = [line.removeprefix(f"{path}: ") for line in problems(refused(path))]
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected))


def test_the_stage_may_stand_in_the_deepspeed_configuration(write):
    declared = 'deepspeed: {zero_optimization: {stage: 3}, train_batch_size: "auto"}\n'
    config = load_config(write(VALID + declared))
    assert config.sharding(config.student) == config.sharding(config.teacher) == (3, False)
    config = load_config(write(VALID + "deepspeed: {zero_optimization: {stage: auto}}\nzero: 2\n"))
    assert config.sharding(config.student).zero == 2
    # Said twice it must be the same, for the teacher as for the student.
    found = problems(refused(write(VALID + declared + "zero: 2\n")))
    assert len(found) == 2 and "zero_optimization.stage: is 3, but zero is 2" in found[0]
