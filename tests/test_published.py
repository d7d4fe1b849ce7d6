"""Published models: who relies on one finds out that it is not what was published, before anything
comes of it."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from processes import run_ranks
from rich.console import Console
from tiny_runs import write_config

from metakd import cli
from metakd.config import load_config
from metakd.deploy import latency
from metakd.errors import CheckpointError
from metakd.pipeline import published
from metakd.pipeline.published import check_folder
from metakd.pipeline.stages import Run
from metakd.pipeline.store import StageStore
from metakd.training.world import World, join_world

TEACHER, STUDENT = "teachers/meta-s42", "students/meta-from-meta-s42/hiking"
WAY_OUT = "a model that was changed on purpose belongs in a folder of its own"


def flip(path: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def configure(path: Path) -> None:
    """A model of other answers, which loads without a word."""
    path.write_text(path.read_text().replace('"hidden_act": "gelu"', '"hidden_act": "relu"'))


DAMAGES = {
    "one bit": ("model.safetensors", flip, "was changed after it was written"),
    "empty": ("model.safetensors", lambda path: path.write_bytes(b""), "has 0 bytes"),
    "gone": ("model.safetensors", Path.unlink, "is missing"),
    "configured": ("config.json", configure, "was changed after it was written"),
}
COMMANDS = {
    "run": ("{config}", "output_dir={run}"),
    "evaluate": ("{config}", "output_dir={run}"),
    "report": ("{run}",),
    "export": ("{model}",),
    "predict": ("{model}", "a text"),
}


def comparisons(patch: pytest.MonkeyPatch) -> list[Path]:
    """Grows by each published file whose content is compared."""
    seen, check = [], published.check_content
    patch.setattr(
        published, "check_content", lambda path, entry: seen.append(path) or check(path, entry)
    )
    return seen


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory, world):
    """Configuration and folder of a finished run, of which nothing is to be changed, and how many
    of its files were read again to compare them."""
    folder = tmp_path_factory.mktemp("finished")
    config = write_config(source, folder, "run")
    config.write_text(config.read_text().replace("distill:\n", "distill:\n  domains: [hiking]\n"))
    run = Run(load_config(str(config)), world, Console(quiet=True), command="metakd test")
    with pytest.MonkeyPatch.context() as patch:
        read = comparisons(patch)
        run.evaluate()
    return config, folder / "run", len(read)


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the run."""
    return shutil.copytree(finished[1], tmp_path / "copy")


@pytest.fixture
def call(finished, copy, monkeypatch, capsys):
    """``call("run", model=STUDENT)``: exit code, output and errors of that command with the copy,
    or with one of its models."""

    def run(command: str, *more: str, model: str = STUDENT) -> tuple[int, str, str]:
        about = {"config": finished[0], "run": copy, "model": copy / model}
        words = [word.format(**about) for word in COMMANDS.get(command, COMMANDS["run"])]
        monkeypatch.setattr(sys, "argv", ["metakd", command, *words, *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, *capsys.readouterr()

    return run


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("model", [TEACHER, STUDENT], ids=["teacher", "student"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_before_anything_comes_of_it(copy, call, damage, model, command):
    name, change, said = DAMAGES[damage]
    path = copy / model / name
    before = path.read_bytes()
    change(path)
    assert not path.exists() or path.read_bytes() != before
    code, _, errors = call(command, model=model)
    assert code == CheckpointError.exit_code
    assert errors.startswith(f"metakd: {path}: {said}") and WAY_OUT in errors
    assert str(copy / model) in errors.split("remedy: ")[1]
    assert "Traceback" not in errors and not (copy / "report.html").exists()


def test_what_is_written_later_belongs_to_nobody(copy, call):
    for model in (TEACHER, STUDENT):
        (copy / model / "README.md").write_text("Ours, for the shop.")
        with (copy / model / "log.jsonl").open("a") as log:
            log.write('{"step": 9, "split": "note"}\n')
        (copy / model / "notes.txt").write_text("mine")
    for command in ("report", "run", "evaluate", "predict"):  # a report writes cards itself
        code, _, errors = call(command)
        assert code == 0, errors
    assert "Ours" not in (copy / STUDENT / "README.md").read_text()


def test_stages_that_say_nothing_of_their_files_are_taken_as_they_are(copy, call):
    for record in copy.rglob("stage.json"):
        old = json.loads(record.read_text())
        assert old.pop("files").keys() >= (
            {"config.json", "model.safetensors", "tokenizer.json"}
            if record.parent.name != "prototypes"
            else {"scores.safetensors", "prototypes.safetensors"}
        )
        record.write_text(json.dumps(old))
    configure(copy / STUDENT / "config.json")
    for command in COMMANDS.keys() - {"evaluate", "export"}:
        code, _, errors = call(command)
        assert code == 0, errors


def test_what_is_recorded(finished):
    record = json.loads((finished[1] / TEACHER / "stage.json").read_text())
    present = {
        str(file.relative_to(finished[1] / TEACHER))
        for file in (finished[1] / TEACHER).rglob("*")
        if file.is_file()
    }
    assert record["files"].keys() == present - {"log.jsonl", "stage.json"}
    assert "metakd.json" in present


def test_contents_are_read_where_they_are_used_and_once(finished, copy, call, monkeypatch):
    assert finished[2] == 0  # what was published a moment ago
    read = comparisons(monkeypatch)
    assert call("distill")[0] == 0 and not read
    assert call("evaluate")[0] == 0
    assert sorted(read) == sorted(
        copy / model / name
        for model in (TEACHER, STUDENT)
        for name in json.loads((copy / model / "stage.json").read_text())["files"]
    )


def test_a_student_learns_from_nothing_that_was_changed(copy, call):
    flip(copy / TEACHER / "domain.safetensors")
    assert call("distill")[0] == 0  # nobody asks the teacher
    code, _, errors = call("distill", "distill.domains=[kitchen]")
    assert code == CheckpointError.exit_code and f"{copy / TEACHER}/domain.safetensors" in errors
    code, _, errors = call("cache", "distill.cache_teacher=all")
    assert code == CheckpointError.exit_code and f"{copy / TEACHER}/domain.safetensors" in errors


def test_a_teacher_learns_from_no_scores_that_were_changed(copy, call):
    flip(copy / "prototypes" / "scores.safetensors")
    assert call("teach")[0] == 0
    code, _, errors = call("teach", "teacher.gamma1=0.5")
    assert code == CheckpointError.exit_code and "prototypes/scores.safetensors" in errors
    assert not list(copy.rglob(".tmp-*/stage.json"))


def test_what_has_other_inputs_is_built_whatever_became_of_it(copy, call):
    (copy / STUDENT / "model.safetensors").unlink()
    code, _, errors = call("distill", "student.layers=[0]")
    assert code == 0, errors
    check_folder(copy / STUDENT)


def test_moved_away_it_is_built_again_with_the_same_bits(copy, call, finished):
    flip(copy / STUDENT / "model.safetensors")
    (copy / STUDENT).rename(copy / "away")
    assert call("distill")[0] == 0
    name = f"{STUDENT}/model.safetensors"
    assert (copy / name).read_bytes() == (finished[1] / name).read_bytes()


def test_a_run_is_not_timed_without_one_of_its_models(copy):
    (copy / TEACHER / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: is missing"):
        latency.measure_latency([str(copy)])


def test_a_changed_model_is_not_timed(copy):
    flip(copy / STUDENT / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: was changed"):
        latency.measure_latency([str(copy / STUDENT)])


@pytest.mark.parametrize(
    "files", ["model.safetensors", ["model.safetensors"], {"model.safetensors": "0"}, {"a": {}}]
)
def test_a_list_of_files_that_is_none_is_named(tmp_path, files):
    (tmp_path / "stage.json").write_text(json.dumps({"files": files}))
    with pytest.raises(CheckpointError, match=r"stage\.json: is damaged"):
        check_folder(tmp_path)


def test_a_file_that_may_not_be_read_is_named(copy, monkeypatch):
    def refuse(path, entry):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(published, "check_content", refuse)
    with pytest.raises(CheckpointError, match=r"config\.json: Permission denied"):
        check_folder(copy / STUDENT)


def write_weights(folder: Path, saves) -> dict:
    if not saves.checkpoints.world.rank:
        (folder / "weights").write_text("w")
    return {}


def worker(folder: Path) -> None:
    world = join_world()
    store = StageStore(folder, world, {}, "test", lambda text: None)
    place = folder / "teacher"
    store.get(place, {}, write_weights)
    if world.is_main:
        flip(place / "weights")
    read = []
    published.check_content = lambda path, entry, check=published.check_content: (
        read.append(path) or check(path, entry)
    )
    store.checked(place)  # published by this very store
    store.forget()
    told = None
    try:
        store.checked(place)
    except CheckpointError as error:
        told = error.cause
    assert world.gather((told, len(read))) == [
        (f"{place}/weights: was changed after it was written", 1),
        (f"{place}/weights: was changed after it was written", 0),
    ]


def test_the_first_rank_reads_and_all_hear(tmp_path):
    run_ranks(2, worker, tmp_path)


def test_a_link_to_the_same_content_is_as_good(tmp_path):
    store = StageStore(tmp_path, World(), {}, "test", lambda text: None)
    place = tmp_path / "teacher"
    store.get(place, {}, write_weights)
    (place / "weights").rename(tmp_path / "elsewhere")
    (place / "weights").symlink_to(tmp_path / "elsewhere")
    check_folder(place)
