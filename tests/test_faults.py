"""Some cases of every part of ``make faults``; and that its model of a disk sees broken protocols.

The harness forks before anything computes with several threads, so it runs in a process of its own.
"""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from crash_model import Model, Recorder, materialise
from faults import STORIES, PARTS, _found_wrongly, record

from metakd.training import checkpoint

TOOL = Path(__file__).with_name("faults.py")
# Starting a launcher twice takes half a minute: the whole run does that.
QUICK = [part for part in PARTS if part not in ("launchers", "hangs")]


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> str:
    joined = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    fresh = {name: value for name, value in os.environ.items() if name not in joined}
    fresh["TMPDIR"] = str(tmp_path_factory.mktemp("faults"))
    command = [sys.executable, str(TOOL), "--quick"]
    command += [word for part in QUICK for word in ("--only", part)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, env=fresh)
    return done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize("part", QUICK)
def test_faults(told, part):
    result = re.search(rf"^{part}: (\d+) cases, (\d+) failures", told, re.MULTILINE)
    assert result, told
    assert int(result[1]) > 0 and int(result[2]) == 0, told
