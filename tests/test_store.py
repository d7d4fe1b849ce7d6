"""Finished stages on the disk: what is taken up, what is refused, what is built again."""

import json

import pytest

from metakd.errors import CheckpointError
from metakd.pipeline.store import CHECKPOINTS, StageStore
from metakd.training.world import World


@pytest.fixture
def open_store(tmp_path):
    """``open_store(resume="auto")``: a store of the same run directory, as another start of the
    command would make it."""

    def build(**options) -> StageStore:
        return StageStore(tmp_path, World(), {}, "test", lambda text: None, **options)

    return build


def write_weights(folder, _saves):
    (folder / "weights").write_text("w")
    return {"score": 1}


def test_checkpoints_of_other_inputs_outlive_a_tag_that_is_not_among_them(open_store, tmp_path):
    def stopped(folder, _saves):
        tag = folder / CHECKPOINTS / "phase0-step00000500"
        tag.mkdir(parents=True)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_store().get(tmp_path / "teacher", {"learning_rate": 1}, stopped)
    with pytest.raises(CheckpointError, match="begun with other inputs"):
        resumed = open_store(resume="phase0-step00000500")
        resumed.get(tmp_path / "teacher", {"learning_rate": 2}, write_weights)
    assert (tmp_path / ".tmp-teacher" / CHECKPOINTS / "phase0-step00000500").is_dir()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"inputs": "x"}', '{"result": {'])
def test_a_damaged_record_is_named(open_store, tmp_path, content):
    open_store().get(tmp_path / "teacher", {}, write_weights)
    (tmp_path / "teacher" / "stage.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"teacher/stage\.json: is damaged") as refused:
        open_store().get(tmp_path / "teacher", {}, write_weights)
    assert str(tmp_path / "teacher") in refused.value.remedy


def test_files_that_were_not_kept_are_made_when_they_are_wanted(open_store, tmp_path):
    store, place = open_store(), tmp_path / "student"
    store.get(place, {}, write_weights, keep=False)
    assert not (place / "weights").exists()
    assert store.has(place, {}, keep=False) and not store.has(place, {})
    assert store.get(place, {}, write_weights) == {"score": 1}
    assert (place / "weights").exists() and json.loads((place / "stage.json").read_text())["kept"]
    for keep in (True, False):
        assert store.has(place, {}, keep) and not store.has(place, {"other": 1}, keep)
    # And what has its files serves whoever needs none.
    store.get(place, {}, lambda *_: pytest.fail("built again"), keep=False)
