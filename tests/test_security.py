"""Nothing that a user is handed by others is ever run: models, data, configurations, names.

Each attack would leave a mark; no test may find one.
"""

import ast
import contextlib
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from test_cli import encoder, refused
from test_config import VALID
from test_data import ROWS, jsonl, put

from metakd import demo
from metakd.config import DataConfig, StudentConfig, load_config
from metakd.data.reading import read_corpus
from metakd.errors import CheckpointError, ConfigError, DataError
from metakd.method.teachers import Teacher
from metakd.models.sources import load_classifier, load_encoder, load_tokenizer
from metakd.models.sources import load_config as load_shape
from metakd.models.student import build_student
from metakd.pipeline.store import StageStore
from metakd.training.world import World

__all__ = ["encoder"]  # fixtures

LABELS = {"bad": 0, "good": 1}
PACKAGE = Path(__file__).resolve().parents[1] / "metakd"


class Payload:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


@pytest.fixture
def mark(tmp_path):
    """Where a payload would write; checked after every test."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "a payload was executed"


@pytest.fixture(autouse=True)
def _a_person_says_yes(monkeypatch):
    """transformers asks on the terminal whether to run a model's own code: no answer may matter."""
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")


def test_the_payload_works(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


# Pickled weights


def pickled(encoder, folder: Path, name: str, mark: Path) -> str:
    """A copy of the encoder whose weights are a payload of this name."""
    shutil.copytree(encoder, folder)
    (folder / "model.safetensors").unlink()
    if name.endswith(".index.json"):
        shard = name.removesuffix(".index.json").replace(".bin", "-00001-of-00001.bin")
        torch.save(Payload(mark), folder / shard)
        index = {"metadata": {}, "weight_map": {"embeddings.word_embeddings.weight": shard}}
        (folder / name).write_text(json.dumps(index))
    else:
        torch.save(Payload(mark), folder / name)
    return str(folder)


LOADERS = {
    "encoder": load_encoder,
    "classifier": lambda source: load_classifier(source, LABELS),
    "student": lambda source: build_student(
        StudentConfig(model=source),
        source="",
        tokenizer=load_tokenizer(source),
        label2id=LABELS,
    ),
    "layers": lambda source: build_student(
        StudentConfig(layers=[0]),
        source=source,
        tokenizer=load_tokenizer(source),
        label2id=LABELS,
    ),
}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("loader", LOADERS)
def test_pickled_weights_are_refused(encoder, tmp_path, mark, loader, name):
    source = pickled(encoder, tmp_path / "model", name, mark)
    with pytest.raises(ValueError, match=r"holds pytorch_model.*and no safetensors"):
        LOADERS[loader](source)


def test_pickles_beside_safetensors_are_not_read(encoder, tmp_path, mark):
    shutil.copytree(encoder, tmp_path / "model")
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tf_model.h5"):
        torch.save(Payload(mark), tmp_path / "model" / name)
    for load in LOADERS.values():
        load(str(tmp_path / "model"))


@pytest.mark.parametrize("name", ["model.safetensors", "domain.safetensors"])
def test_a_pickle_under_another_name_is_not_read(encoder, tmp_path, mark, name):
    folder = tmp_path / "teacher"
    Teacher(load_classifier(str(encoder), LABELS), "meta", ["a", "b"]).save(
        folder, load_tokenizer(str(encoder))
    )
    torch.save(Payload(mark), folder / name)
    with pytest.raises(CheckpointError, match="is damaged"):
        Teacher.load(folder)


# Code of a model's own

CODE = "open({mark!r}, 'w')\nfrom transformers import {base} as Own\n"
AUTO = {
    "AutoConfig": "own.Own",
    "AutoModel": "own.Own",
    "AutoModelForSequenceClassification": "own.Own",
    "AutoTokenizer": ["own.Own", "own.Own"],
}


@pytest.mark.parametrize("kind", ["a type of its own", "a type that is known"])
@pytest.mark.parametrize("loader", [*LOADERS, "config", "tokenizer"])
def test_code_of_a_model_is_never_run(encoder, tmp_path, mark, loader, kind):
    folder = tmp_path / "model"
    shutil.copytree(encoder, folder)
    for file, base in (("config.json", "BertConfig"), ("tokenizer_config.json", "BertTokenizer")):
        described = json.loads((folder / file).read_text()) | {"auto_map": AUTO}
        if kind == "a type of its own":
            described |= {"model_type": "own", "tokenizer_class": "Own"}
        (folder / file).write_text(json.dumps(described))
        (folder / "own.py").write_text(CODE.format(mark=str(mark), base=base))
    load = LOADERS | {"config": load_shape, "tokenizer": load_tokenizer}
    if kind == "a type of its own":
        with pytest.raises(ValueError, match="needs code of its own, which is never run"):
            load[loader](str(folder))
    else:  # read by the class that transformers has for this type
        load[loader](str(folder))


@pytest.mark.parametrize("attack", ["pickle", "code"])
@pytest.mark.parametrize("key", ["teacher", "student"])
def test_the_command_line_refuses_such_models(call, encoder, tmp_path, mark, attack, key):
    folder = tmp_path / "model"
    if attack == "pickle":
        pickled(encoder, folder, "pytorch_model.bin", mark)
    else:
        shutil.copytree(encoder, folder)
        described = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps(described | {"auto_map": AUTO, "model_type": "own"})
        )
        (folder / "own.py").write_text(CODE.format(mark=str(mark), base="BertConfig"))
    demo.write_corpus(tmp_path, train=8, validation=2, test=2)
    settings = yaml.safe_load(VALID) | {
        "output_dir": str(tmp_path / "run"),
        "data": {n: str(tmp_path / f"{n}.jsonl") for n in ("train", "validation", "test")}
        | {"max_length": 16},
        "teacher": {"model": str(encoder)},
        "distill": {"method": "finetune", "training": {"max_steps": 1}},
    }
    settings[key] = {"model": str(folder)}
    put(tmp_path / "config.yaml", yaml.safe_dump(settings))
    stage = "prototypes" if key == "teacher" else "distill"
    assert str(folder) in refused(call(stage, tmp_path / "config.yaml"), 2)


# Configurations

TAGS = [
    "!!python/object/apply:builtins.open [{mark}, w]",
    "!!python/object/new:builtins.open [{mark}, w]",
    "!!python/object/apply:os.system ['touch {mark}']",
    "!!python/object:metakd.config.RunConfig {{}}",
    "!!python/name:os.system",
    "!!python/module:os",
    "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch {mark}']",
    "!include {mark}",
]


@pytest.mark.parametrize("tag", TAGS)
def test_tags_in_yaml_are_refused(tmp_path, mark, tag):
    tag = tag.format(mark=mark)
    put(tmp_path / "tagged.yaml", VALID + f"seed: {tag}\n")
    put(tmp_path / "plain.yaml", VALID)
    for path, overrides in (("tagged.yaml", []), ("plain.yaml", [f"seed={tag}"])):
        with pytest.raises(ConfigError, match="tags are not supported"):
            load_config(str(tmp_path / path), overrides)


# Names that would lead out of the run directory

NAMES = [
    "../outside",
    "../../outside",
    "..",
    ".",
    "/tmp/outside",
    "a/b",
    "a\\b",
    "..\\outside",
    ".hidden",
    ".tmp-pans",  # a stage is built under such a name
    "a\nb",
    "a\x1b[2Jb",  # would clear the terminal it is printed on
    "x" * 201,
    "\u00e9" * 101,
]


@pytest.mark.parametrize("name", NAMES)
def test_a_domain_cannot_lead_out_of_the_run(call, encoder, tmp_path, name):
    rows = [row | {"domain": name if i == 4 else row["domain"]} for i, row in enumerate(ROWS)]
    put(tmp_path / "train.jsonl", jsonl(*rows))
    settings = yaml.safe_load(VALID) | {
        "output_dir": str(tmp_path / "run"),
        "data": {"train": str(tmp_path / "train.jsonl")},
        "teacher": {"model": str(encoder)},
    }
    put(tmp_path / "config.yaml", yaml.safe_dump(settings))
    message = refused(call("prototypes", tmp_path / "config.yaml"), 3)
    assert f"{tmp_path}/train.jsonl:5:domain: domain " in message
    assert "cannot name a folder" in message and "\x1b" not in message
    assert {path.name for path in tmp_path.iterdir()} <= {"train.jsonl", "config.yaml", "run"}


def test_a_file_s_name_cannot_either(tmp_path):
    for name in ("pans", "te\\nts"):
        put(tmp_path / "shops" / f"{name}.csv", "text,label\na,good\nb,bad\n")
    with pytest.raises(DataError, match=r"te\\nts\.csv:-:-: domain .* cannot name a folder"):
        read_corpus(DataConfig(train=str(tmp_path / "shops")))


@pytest.mark.parametrize(
    "words",
    [
        ("distill", 'distill.domains=["../../outside"]'),
        ("prototypes", 'data.withhold=["../../outside"]'),
        ("compare", "--withhold", "../../outside"),
    ],
    ids=lambda words: words[0],
)
def test_names_in_the_configuration_must_be_domains(call, encoder, tmp_path, words):
    inside = tmp_path / "a" / "b"
    put(inside / "train.jsonl", jsonl(*ROWS))
    settings = yaml.safe_load(VALID) | {
        "output_dir": str(inside / "run"),
        "data": {"train": str(inside / "train.jsonl")},
        "teacher": {"model": str(encoder)},
    }
    put(inside / "config.yaml", yaml.safe_dump(settings))
    code, _, err = call(words[0], inside / "config.yaml", *words[1:])
    assert code in (2, 3) and "outside" in err and "Traceback" not in err
    assert not list(tmp_path.rglob("outside*"))
    assert {path.name for path in inside.iterdir()} <= {"train.jsonl", "config.yaml", "run"}


# Links


@pytest.fixture
def precious(tmp_path):
    put(tmp_path / "elsewhere" / "precious", "kept")
    yield tmp_path / "elsewhere"
    assert (tmp_path / "elsewhere" / "precious").read_text() == "kept"


def build(run: Path) -> None:
    def write(folder: Path, saves) -> dict:
        (folder / "file").write_text("new")
        return {}

    store = StageStore(run, World(), {}, "test", lambda text: None)
    store.get(run / "stage", {"stage": "test"}, write)


def test_a_run_directory_may_be_a_link(tmp_path, precious):
    (tmp_path / "run").symlink_to(precious)
    build(tmp_path / "run")
    assert (precious / "stage" / "file").read_text() == "new"


@pytest.mark.parametrize("name", ["stage", ".tmp-stage"])
def test_nothing_behind_a_link_in_a_run_is_removed(tmp_path, precious, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(precious)
    # A stage that cannot be written may fail, as long as it removes nothing.
    with contextlib.suppress(OSError):
        build(tmp_path / "run")
    assert {path.name for path in precious.iterdir()} == {"precious"}


# The sources themselves


def calls() -> list[tuple[str, ast.Call]]:
    return [
        (f"{path.name}:{node.lineno}", node)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
    ]


def test_no_source_runs_or_unpickles_what_it_reads():
    forbidden = {"eval", "exec", "system", "popen", "unsafe_load", "full_load", "UnsafeLoader"}
    for place, node in calls():
        name = (
            node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        )
        of_module = isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)
        owner = node.func.value.id if of_module else ""
        # `model.eval()` is another thing than the built-in.
        if name == "eval" and isinstance(node.func, ast.Attribute):
            continue
        assert name not in forbidden, f"{place}: {name}"
        assert owner != "pickle", f"{place}: pickle.{name}"
        if name == "from_pretrained":
            # The last knows tokenizers of transformers' own alone, without the import of torch.
            doors = ("sources.py:", "adapters.py:", "known.py:")
            assert place.startswith(doors), f"{place}: load through these"
        options = {keyword.arg: keyword.value for keyword in node.keywords}
        if owner == "torch" and name == "load":
            assert ast.unparse(options["weights_only"]) == "True", place
        for option in ("trust_remote_code", "shell"):
            assert ast.unparse(options.get(option, ast.Constant(False))) == "False", place
