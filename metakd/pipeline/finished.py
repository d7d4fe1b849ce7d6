"""A run that is finished and unchanged: what it came to, known without its models.

``.cache/finished.json`` is noted by an evaluation: what decided the scores (settings, contents of
files, versions, metakd's own code), the stages that were asked for, and what was found and said. As
long as all of it is as it was, and every stage has the files that it was published with, a run need
not score its models again; where anything differs, it does, and says what there is to say. Imports
neither torch nor transformers nor DeepSpeed.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metakd.config import RunConfig
from metakd.data.digests import content_key
from metakd.environment import has_cuda, versions
from metakd.errors import MetakdError
from metakd.extension import sources_digest
from metakd.pipeline.published import check_files, read_record

if TYPE_CHECKING:
    from metakd.pipeline.stages import Run

_PLACE = Path(".cache", "finished.json")
_DECIDE = (
    *("torch", "transformers", "tokenizers", "safetensors", "deepspeed", "peft", "triton"),
    *("numpy", "scipy", "scikit-learn", "datasets", "pyarrow"),
)
_CODE = (".py", ".so", ".pyd")


@dataclass(frozen=True)
class Finished:
    """What a run came to.

    Args:
        scores: see ``Run.evaluate``.
        domains: of the corpus.
        students: folders of the configured students, within the run directory.
    """

    scores: dict[str, Any]
    domains: list[str]
    students: list[str]


def note(run: Run, found: Finished) -> None:
    """Remember what was found, for ``look_up``; of a run of several processes, or with a model or
    data of the hub, which may change there, nothing.

    Args:
        run: that has just been evaluated.
        found: what it came to.
    """
    sources = [(given, key) for given, key in run.contents.items() if given]
    here = all(Path(source).exists() for given, _ in sources for source in given)
    if run.world.size > 1 or not here:
        return
    # Once more, as a run asks that builds nothing: these are its stages, and what it says of them.
    said, again = run.remarks(), copy.copy(run)
    again.store = run.store.afresh(said.append)
    if run.teacher_kind:
        again.ensemble(run.teacher_kind, run.config.seed)
    again.students()
    stages = {
        place.relative_to(run.folder).as_posix(): digest
        for place, digest in again.store.asked().items()
    }
    noted = {"decided": _decided(run.config), "sources": sources, "stages": stages, "said": said}
    place = run.folder / _PLACE
    aside = place.with_suffix(f".{os.getpid()}")
    with suppress(OSError):  # a shortcut, and nothing else
        place.parent.mkdir(exist_ok=True)
        text = json.dumps({**noted, **asdict(found)})
        aside.write_text(f"{content_key(text)}\n{text}", encoding="utf-8")
        aside.replace(place)


def look_up(config: RunConfig, say: Callable[[str], None]) -> Finished | None:
    """What a run of this configuration came to, if it is finished and unchanged; None where it has
    to be opened, whatever the reason. Says what a run says that builds nothing, and writes
    ``evaluation.json``."""
    folder = Path(config.output_dir)
    if not (folder / _PLACE).is_file() or os.environ.get("WORLD_SIZE", "1") != "1":
        return None
    try:
        own, _, text = (folder / _PLACE).read_text(encoding="utf-8").partition("\n")
        noted = json.loads(text)
        same = own == content_key(text) and noted["decided"] == _decided(config)
        same = same and all(content_key(*map(Path, g)) == key for g, key in noted["sources"])
        if not same or not all(_holds(folder / p, key) for p, key in noted["stages"].items()):
            return None
        found = Finished(*(noted[name] for name in Finished.__dataclass_fields__))
        write(folder, found.scores)
        said = noted["said"]
    except (MetakdError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    for text in said:
        say(text)
    return found


def write(folder: Path, scores: dict[str, Any]) -> None:
    """``evaluation.json`` of a run directory."""
    (folder / "evaluation.json").write_text(json.dumps(scores, indent=1))


def _holds(place: Path, digest: str) -> bool:
    """Is this stage there, built from these inputs, with the files that it was published with?"""
    record = read_record(place, "inputs", "kept", "seconds", "result")
    check_files(place, record)
    return record.get("inputs") == digest and record["kept"]


def _decided(config: RunConfig) -> dict[str, Any]:
    """All that decides what a run comes to, beside the contents of files."""
    own = Path(__file__).parents[1]
    code = sorted(file for file in own.rglob("*") if file.suffix in _CODE)
    settings = config.model_dump(mode="json", exclude={"output_dir"})
    return {
        # As JSON has it, with which it is compared.
        "settings": json.loads(json.dumps(settings)),
        "versions": versions(*_DECIDE),
        "code": content_key(*(part for file in code for part in (str(file), file))),
        "kernels": sources_digest(),
        "cuda": has_cuda(),
    }
