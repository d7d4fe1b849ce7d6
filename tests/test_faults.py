"""Some cases of every part of ``make faults``; and that its model of a disk sees broken protocols.

The harness forks before anything computes with several threads, so it runs in a process of its own.
"""

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from crash_model import Change
from faults import PARTS, STORIES, Story, record, replay
from processes import unjoined

from metakd.training.checkpoint import Checkpoints

TOOL = Path(__file__).with_name("faults.py")
# Starting a launcher twice takes half a minute: the whole run does that.
QUICK = [part for part in PARTS if part not in ("launchers", "hangs")]


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> str:
    fresh = unjoined() | {"TMPDIR": str(tmp_path_factory.mktemp("faults"))}
    command = [sys.executable, str(TOOL), "--quick"]
    command += [word for part in QUICK for word in ("--only", part)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, env=fresh)
    return done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("part", QUICK)
def test_faults(told, part):
    result = re.search(rf"^{part}: (\d+) cases, (\d+) failures", told, re.MULTILINE)
    assert result, told
    assert int(result[1]) > 0 and int(result[2]) == 0, told


@pytest.mark.parametrize(
    "story, left_out",
    [
        # A file may be torn.
        ("three ranks", lambda change: change.kind == "sync"),
        # A whole file may have no name.
        ("three ranks", lambda change: change.kind == "sync_folder" and "/" in change.path),
        # A tag may have its old name, or a tag that was given up may be back.
        (
            "taken up from an older tag",
            lambda change: change == Change("sync_folder", "checkpoints"),
        ),
        # The folder of all tags may be gone.
        ("the only tag is saved again", lambda change: change == Change("sync_folder", ".")),
    ],
)
def test_the_model_sees_what_is_not_synced(tmp_path, story, left_out):
    draw = random.Random(1)
    whole = record(*STORIES[story], tmp_path / "recorded", draw)
    kept = [
        (change, after)
        for change, after in zip(whole.changes, whole.allowed[1:])
        if not left_out(change)
    ]
    less = Story([change for change, _ in kept], [{None}, *(after for _, after in kept)])
    # What was the last act's result must be found at the end, whoever the last change is by.
    less.allowed[-1] = whole.allowed[-1]
    assert any(problem for _, problem in replay(less, tmp_path, draw, samples=6, every=3))


def test_a_tag_that_is_replaced_is_never_away(tmp_path, monkeypatch):
    draw = random.Random(1)
    story = record(*STORIES["the only tag is saved again"], tmp_path / "recorded", draw)
    monkeypatch.setattr(Checkpoints, "_finish_renames", lambda self: None)
    assert any(problem for _, problem in replay(story, tmp_path, draw, samples=6))
