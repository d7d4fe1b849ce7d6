"""What a finished student leaves in the history, and what ``metakd suggest`` makes of it."""

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from math import expm1
from pathlib import Path

import pytest
from test_config import VALID
from tiny_runs import write_config

from metakd import cli
from metakd.config import DistillConfig, load_config
from metakd.errors import CheckpointError
from metakd.pipeline import history
from metakd.pipeline.compare import compare
from metakd.pipeline.history import VARIABLE, History, PastRun, history_file
from metakd.pipeline.prior import ENOUGH, features_of, remember, settings_of, suggest, weigh
from metakd.training.world import World

ROOT = Path(__file__).resolve().parents[1]
HIKING = "distill.domains=[hiking]"


@pytest.fixture
def remembered(tmp_path, monkeypatch):
    """The file of past runs, while a test lasts."""
    path = tmp_path / "kept" / "runs.sqlite"
    monkeypatch.setenv(VARIABLE, str(path))
    return path


def past(score=0.8, seed=1, features=None, **settings) -> PastRun:
    """One of a made-up history; settings in ``distill``."""
    named = {f"distill.{key}": value for key, value in settings.items()}
    return PastRun("accuracy", features or {"a": 1.0}, named, (seed, None), score)


# ---- What is kept --------------------------------------------------------------------------------


def test_a_student_leaves_a_row_of_numbers_and_names(make, remembered, tmp_path):
    run = make(HIKING)
    (place,) = run.distill()
    (kept,) = History(remembered).read()
    known = {
        "labels": 12,
        "validation": 4,
        "unlabelled": 0,
        "other_labels": 36,
        "domains": 4,
        "classes": 2,
        "balance": 1,
        "teacher_layers": 2,
        "student_layers": 1,
        "student_width": 32,
        "processes": 1,
    }
    assert {name: kept.features[name] for name in known} == known
    lengths = run.part(run.corpus.train, "hiking").lengths
    assert kept.features["tokens_mean"] == pytest.approx(sum(lengths) / 12, abs=1e-6)
    assert kept.settings["distill.method"] == kept.settings["teacher.kind"] == "meta"
    assert kept.settings["distill.training.learning_rate"] == 1e-3
    result = run.store.result(place)
    assert (kept.metric, kept.validation) == ("accuracy", result["validation"]["accuracy"])
    assert kept.test == result["test"]["accuracy"] and kept.teacher is not None
    assert kept.seeds == [42, 42] and kept.seconds > 0
    # Nothing of the user's: no place, no domain, no model.
    content = remembered.read_bytes()
    for private in (str(tmp_path), "hiking", "encoder", "jsonl", "positive"):
        assert private.encode() not in content
    assert remembered.stat().st_mode & 0o777 == 0o600
    (told,) = (line for line in run.said if VARIABLE in line)
    assert str(remembered) in told and f"{VARIABLE}=off" in told

    again = make(HIKING)
    again.distill()  # is there already
    assert len(History(remembered).read()) == 1
    # Trained once more, it takes the place of its row.
    History(remembered).add(replace(kept, validation=0.25))
    assert [one.validation for one in History(remembered).read()] == [0.25]


def test_cells_of_a_comparison_are_kept_and_their_situations_are_the_same(make, remembered):
    rows = "{method: finetune}, {method: finetune, student: {layers: [0, 1]}, learning_rate: 0.01}"
    run = make(f"compare={{seeds: [1, 2], rows: [{rows}]}}", HIKING)
    compare(run)
    kept = History(remembered).read()
    cells = {(one.features["student_layers"], one.seeds[0]) for one in kept}
    assert len(kept) == 4 and cells == {(1, 1), (1, 2), (2, 1), (2, 2)}
    assert all(one.teacher is None and one.seeds[1] is None for one in kept)
    assert len({json.dumps(one.features) for one in kept}) == 2
    lesson = run.lesson_of("hiking")
    assert features_of(run, lesson) in [one.features for one in kept]


ON_THE_WAY = {"generations": 2, "chain": [{"layers": [0, 1]}]}


@pytest.mark.parametrize("key", ON_THE_WAY)
def test_who_was_trained_on_the_way_leaves_no_row(key, make, remembered):
    asked = f"distill.{key}={json.dumps(ON_THE_WAY[key])}"
    run = make(HIKING, "distill.method=logits_kd", "teacher.kind=mix", asked)
    run.distill()
    assert sum(line.endswith("hiking: running") for line in run.said) == 2
    (kept,) = History(remembered).read()
    assert kept.settings[f"distill.{key}"] == ON_THE_WAY[key]
    assert kept.features["student_layers"] == 1 and kept.teacher is not None


def test_settings_are_what_the_method_listens_to():
    plain = settings_of(DistillConfig(method="finetune"), None)
    assert "teacher.kind" not in plain and "distill.temperature" not in plain
    assert "distill.transfer" not in plain  # it has its own texts
    assert plain == settings_of(DistillConfig(method="finetune", gamma2=0.7), None)
    taught = settings_of(DistillConfig(method="meta", gamma2=0.7), "meta")
    assert taught["distill.gamma2"] == 0.7 and taught["teacher.kind"] == "meta"
    assert not any("intermediate" in key for key in taught)
    assert "distill.intermediate.learning_rate" in settings_of(
        DistillConfig(schedule="two_stage"), "meta"
    )
    assert not any("eval" in key or key.endswith("backend") for key in taught)
    # Of one generation the anchor holds nothing; kinds of teacher are values, and no keys.
    assert settings_of(DistillConfig(anchor=0.25), "meta")["distill.anchor"] == 0.5
    held = settings_of(DistillConfig(anchor=0.25, anchors={"mix": 0.5}), "meta")
    assert held["distill.anchor"] == 0.25 and held["distill.anchors"] == {"mix": 0.5}
    pretrained = {
        "preset": "tiny-2l-128",
        "pretrain": {"texts": ["/home/me/x.txt"], "max_steps": 7},
    }
    chained = settings_of(DistillConfig(chain=[pretrained]), "meta")["distill.chain"]
    assert chained == [{"preset": "tiny-2l-128", "pretrain": {"max_steps": 7}}]
    # The layers that a student copies, whichever they are.
    copied = DistillConfig(layer_map=[0, 2])
    assert settings_of(copied, "meta", [0, 2])["distill.layer_map"] == "copied"
    assert settings_of(copied, "meta", [1, 2])["distill.layer_map"] == [0, 2]


def test_runs_at_the_same_time_both_land(tmp_path):
    path = tmp_path / "runs.sqlite"
    code = """
import sys
from pathlib import Path
from metakd.pipeline.history import History, PastRun
history = History(Path(sys.argv[1]), print)
for seed in range(20):
    settings = {"distill.method": sys.argv[2]}
    history.add(PastRun("accuracy", {"a": 1.0}, settings, (seed, None), 0.5))
"""
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path), name], cwd=ROOT, stdout=subprocess.PIPE
        )
        for name in ("finetune", "meta")
    ]
    said = b"".join(writer.communicate(timeout=120)[0] for writer in writers)
    assert b"warning" not in said
    kept = {(one.settings["distill.method"], one.seeds[0]) for one in History(path).read()}
    assert len(kept) == 40


def broken_file(path: Path, how: str) -> Path:
    if how == "no database":
        path.write_bytes(b"not a database, but long enough for one " * 9)
    elif how == "folder":
        path.mkdir()
    elif how == "below a file":
        path.write_text("")
        return path / "runs.sqlite"
    else:
        with sqlite3.connect(path) as table:
            table.execute("CREATE TABLE students (other)")
            if how == "other version":
                table.execute("PRAGMA user_version = 99")
    return path


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("no database", "not a database"),
        ("folder", "unable to open"),
        ("below a file", "File exists"),
        ("other version", "has schema 99"),
        ("of another program", "has schema 0"),
    ],
)
def test_a_file_that_cannot_be_written_is_one_line(how, reason, tmp_path):
    path, said = broken_file(tmp_path / "runs.sqlite", how), []
    before = path.read_bytes() if path.is_file() else None
    opened = History(path, said.append)
    opened.add(past())
    opened.add(past(seed=2))
    assert len(said) == 1 and said[0].startswith("warning: ") and reason in said[0]
    assert before is None or path.read_bytes() == before
    if how != "below a file":
        with pytest.raises(CheckpointError, match=reason) as caught:
            opened.read()
        assert VARIABLE in caught.value.remedy


def test_a_locked_full_or_protected_file_is_one_line(tmp_path, monkeypatch):
    path, said = tmp_path / "runs.sqlite", []
    History(path).add(past())
    monkeypatch.setattr(history, "_PATIENCE", 0.05)
    with sqlite3.connect(path, isolation_level=None) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        History(path, said.append).add(past(seed=2))
        holder.execute("ROLLBACK")
    assert "locked" in said.pop()

    class Limited(History):
        pragma = ""

        @contextmanager
        def _opened(self):
            with super()._opened() as table:
                table.execute(self.pragma)
                yield table

    for pragma, reason in {"max_page_count = 1": "full", "query_only = 1": "readonly"}.items():
        Limited.pragma = f"PRAGMA {pragma}"
        long = {f"key{number}": "x" * 99 for number in range(400)}
        Limited(path, said.append).add(past(seed=3, **long))
        assert reason in said.pop()
    assert len(History(path).read()) == 1


def test_a_run_ends_well_whatever_becomes_of_its_row(make, remembered, monkeypatch):
    remembered.mkdir(parents=True)
    run = make(HIKING, "distill.method=finetune")
    run.distill()
    assert sum("not remembered" in line for line in run.said) == 1
    lesson, result = run.lesson_of("hiking"), {"validation": {"accuracy": 0.5}}
    monkeypatch.setenv(VARIABLE, str(remembered / "runs.sqlite"))
    run.history = History(history_file(), run.said.append)
    monkeypatch.setattr("metakd.pipeline.prior.count_parameters", lambda shape: 1 // 0)
    remember(run, lesson, 1, result, [], 1.0)
    assert "ZeroDivisionError" in run.said[-1]
    monkeypatch.undo()
    run.world = World(rank=1, size=2)  # the first one writes
    remember(run, lesson, 1, result, [], 1.0)
    assert not history_file() and run.history.read() == []


def test_where_it_is_kept(monkeypatch, tmp_path):
    for word in ("off", "OFF", "no", "false", "0"):
        monkeypatch.setenv(VARIABLE, word)
        assert history_file() is None
    History(None).add(past())
    assert History(None).read() == []
    monkeypatch.setenv(VARIABLE, "~/runs")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_file() == tmp_path / "runs"
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert history_file() == tmp_path / "cache" / "metakd" / "runs.sqlite"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert history_file() == tmp_path / ".cache" / "metakd" / "runs.sqlite"
    assert History(history_file()).read() == [] and not (tmp_path / ".cache").exists()


def test_tests_leave_the_user_s_history_alone():
    assert os.environ[VARIABLE] == "off"


# ---- What is suggested ---------------------------------------------------------------------------


def at(x: float, y: float) -> dict[str, float]:
    """Features whose log1p is this."""
    return {"x": expm1(x), "y": expm1(y)}


def test_the_nearest_situations_decide_by_what_settings_gained_in_each():
    """Three situations of two runs each, at (0, 0), (2, 0) and (0, 2); wanted is (2, 2). Seen from
    their mean, (2/3, 2/3), the cosines are -1, 1/sqrt(10), 1/sqrt(10): the first counts for nothing
    and the others for as much, so that x gains (10 - 4) / 2."""
    scores = {(0, 0): (0.1, 0.9), (2, 0): (0.8, 0.7), (0, 2): (0.6, 0.64)}
    known = [
        past(score, features=at(*place), method=name)
        for place, both in scores.items()
        for name, score in zip(("x", "y"), both, strict=True)
    ]
    evidence, (best, other) = weigh(known, [at(2, 2)])
    assert best.settings == {"distill.method": "x"} and best.gain == pytest.approx(3)
    assert (best.runs, best.situations) == (2, 2)
    assert other.gain == pytest.approx(-3)
    assert [one.similarity for one in evidence] == pytest.approx([10**-0.5] * 4)
    assert [one.score for one in evidence] == pytest.approx([80, 70, 64, 60])
    assert [one.gain for one in evidence] == pytest.approx([10, -10, 4, -4])
    # Of a student at (0, 0) the first counts for 1, the others for (1 - 1/sqrt(10)) / 2: with those
    # of the student at (2, 2) all three count for 1.
    _, (best, _) = weigh(known, [at(2, 2), at(0, 0)])
    assert best.settings == {"distill.method": "y"}
    assert best.gain == pytest.approx((80 - 10 + 4) / 3)


def test_the_same_situation_is_the_same_where_there_is_no_other():
    known = [past(0.5, method="x"), past(0.7, seed=2, method="x"), past(0.9, method="y")]
    evidence, choices = weigh(known, [{"a": 1.0}])
    assert [(one.similarity, one.runs) for one in evidence] == [(1, 1), (1, 2)]
    assert [choice.gain for choice in choices] == pytest.approx([30, -30])


def test_what_a_situation_has_not_seen_gained_nothing_there():
    near = [past(0.6, method="x"), past(0.5, method="y")]
    far = [past(0.9, method="z", features={"a": 9.0}), past(0.2, method="y", features={"a": 9.0})]
    _, choices = weigh(near + far, [{"a": 1.0}])
    # Seen from the mean of two, they lie in opposite directions.
    assert [choice.settings["distill.method"] for choice in choices] == ["x", "y"]
    assert weigh([past(0.6, method="x")], [{"a": 1.0}])[1] == []


def test_five_situations_count():
    places = [at(2, 2), *(at(3 + step, 3 - step / 2) for step in range(6))]
    evidence, _ = weigh([past(features=place, method="x") for place in places], [at(2, 2)])
    assert len(evidence) == 5 and evidence[0].similarity == 1


@pytest.fixture
def call(monkeypatch, capsys, source, tmp_path, remembered):
    """``call(*words)``: exit code, output and errors of ``metakd suggest`` of a tiny run."""
    config = write_config(source, tmp_path, "run")

    def ask(*words: str, path: Path = config):
        monkeypatch.setattr(sys, "argv", ["metakd", "suggest", str(path), HIKING, *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capsys.readouterr()

    return ask


def fill(path: Path, features: dict, *scores: tuple[float, dict]) -> None:
    opened = History(path)
    for seed, (score, settings) in enumerate(scores):
        one = past(score, seed, features, **{"method": "finetune", **settings})
        kind = {} if one.settings["distill.method"] == "finetune" else {"teacher.kind": "mix"}
        opened.add(replace(one, settings=one.settings | kind))


SLOW, FAST = {"training.learning_rate": 1e-4}, {"training.learning_rate": 0.02}


def test_too_little_history_leaves_the_defaults(call, make, remembered):
    run = make(HIKING)
    features = features_of(run, run.lesson_of("hiking"))
    fill(remembered, features, *[(0.5, SLOW)] * (ENOUGH - 1))
    code, out, _ = call("--apply")
    assert not code and "4 comparable past runs, a suggestion needs 5: the defaults" in out
    assert "5e-05" in out and "nothing to write" in out
    # Of another metric, or with other features, they are not to be compared.
    History(remembered).add(replace(past(0.9, 9, features, method="finetune"), metric="pearson"))
    History(remembered).add(past(0.9, 9, method="finetune"))
    History(remembered).add(past(0.9, 9, features, method="nobody knows it"))
    code, out, _ = call("--json")
    found = json.loads(out)
    assert found["comparable"] == 4 and found["choice"] is None and found["changes"] == {}
    assert found["settings"]["distill.training.learning_rate"] == 5e-5
    fill(remembered, features, *[(0.5, SLOW)] * ENOUGH)
    assert "no settings did better" in suggest(run).why[0]  # nothing else was tried


def test_a_suggestion_is_written_beside_the_configuration(call, make, remembered, tmp_path):
    run = make(HIKING)
    features = features_of(run, run.lesson_of("hiking"))
    impossible = {"method": "tinybert_kd", "layer_map": [7]}
    fill(remembered, features, *[(0.5, SLOW)] * 3, *[(0.75, FAST)] * 2, (0.9, impossible))
    code, out, _ = call("--json")
    found = json.loads(out)
    assert not code and found["comparable"] == 6
    assert found["choice"]["gain"] == pytest.approx(75 - (50 + 90) / 2)
    assert found["choice"]["runs"] == 2 and len(found["evidence"]) == 3
    assert found["changes"]["distill.training.learning_rate"] == [1e-3, 0.02]
    assert found["changes"]["distill.method"] == ["meta", "finetune"]
    assert "distill.training.num_train_epochs" in found["changes"]  # 3 by default, 1 here
    assert ["passed over" in line and "layer_map" in line for line in found["why"]] == [True]
    before = (tmp_path / "run.yaml").read_text()
    code, out, _ = call("--apply")
    place = tmp_path / "run.suggested.yaml"
    assert not code and str(place) in out and "+5.0 points" in out
    assert (tmp_path / "run.yaml").read_text() == before
    assert "# distill.training.learning_rate: 0.001 -> 0.02" in place.read_text().splitlines()
    config = load_config(str(place))
    assert config.distill.training.learning_rate == 0.02 and config.distill.method == "finetune"
    assert config.distill.domains == ["hiking"]  # the override of the command line
    assert config.data == run.config.data and config.teacher == run.config.teacher
    # What is there is left as it is; and who has taken it has what did best.
    written = place.read_text()
    code, _, err = call("--apply")
    assert code == 2 and "is there already" in err and place.read_text() == written
    code, out, _ = call("--json", path=place)
    found = json.loads(out)
    assert found["changes"] == {} and "has what did best" in found["why"][-1]
    assert not list((tmp_path / "run").glob("students/*"))  # nothing was trained


def test_a_key_that_came_later_stands_at_its_default(make, remembered):
    run = make(HIKING)
    features = features_of(run, run.lesson_of("hiking"))
    taught = {"method": "logits_kd", "temperature": 2.0}
    fill(remembered, features, *[(0.5, SLOW)] * 4, *[(0.6, taught)] * 2)
    whole = settings_of(DistillConfig(method="logits_kd", temperature=2.0), "mix")
    History(remembered).add(PastRun("accuracy", features, whole, (7, 7), 0.9))
    found = suggest(run)
    assert found.choice.runs == 3 and found.choice.settings == whole


def test_errors_are_those_of_other_commands(call, tmp_path, remembered):
    broken = tmp_path / "broken.yaml"
    broken.write_text(VALID + "\nnobody: 1\n")
    code, _, err = call(path=broken)
    assert code == 2 and err.startswith("metakd: ") and "remedy: " in err
    code, _, err = call(f"data.train={tmp_path / 'missing.jsonl'}")
    assert code == 3 and "missing.jsonl" in err
    code, _, err = call("distill.domains=[nowhere]")
    assert code == 2 and "nowhere" in err
    remembered.parent.mkdir()
    remembered.write_bytes(b"no database " * 40)
    code, _, err = call()
    assert code == 4 and "not a database" in err and VARIABLE in err
