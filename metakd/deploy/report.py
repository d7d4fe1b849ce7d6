"""``metakd report``: a run as one page, for people (HTML, Markdown) and programs (JSON).

``run_folder`` reads the run, ``facts`` works out what is known of it, ``sections`` puts that in
words and tables; here it is written down, and the students' cards with it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from metakd.deploy.extra import need
from metakd.deploy.facts import gather
from metakd.deploy.run_folder import RunFolder, read_run
from metakd.deploy.sections import Section, headline, sections
from metakd.deploy.speedup import model_of
from metakd.environment import machine
from metakd.errors import ConfigError
from metakd.pipeline.card import Measured, write_card
from metakd.pipeline.table import ALL_DOMAINS, AVERAGE, plain, shape_of

_TEMPLATE = "report.html.jinja"


def write_report(run: Path, out: Path | None = None, command: str = "") -> list[Path]:
    """Write ``report.html``, ``report.md`` and ``report.json``, and the cards of the students anew.

    Args:
        run: the run's ``output_dir``.
        out: folder for the report; the run's by default.
        command: that asked for it.

    Returns:
        The three files.

    Raises:
        ConfigError: the folder is no run, or a file cannot be written.
        CheckpointError: a file of the run cannot be read.
        UnsupportedError: matplotlib or Jinja is missing.
    """
    found = read_run(run)
    facts = gather(found, command)
    parts = sections(facts)
    texts = {
        "html": html(facts, parts),
        "md": markdown(facts, parts),
        "json": json.dumps(facts, indent=1, allow_nan=False),
    }
    out = out or run
    try:
        out.mkdir(parents=True, exist_ok=True)
        for suffix, text in texts.items():
            (out / f"report.{suffix}").write_text(text, encoding="utf-8")
    except OSError as error:
        remedy = "make room, or give the right to write there; --out FOLDER moves the report"
        raise ConfigError(str(error), remedy) from error
    try:
        _rewrite_cards(found, facts)
    except OSError as error:
        raise ConfigError(
            f"the report is written to {out}, but not all cards of its students: {error}",
            f"make room, or give the right to write in {run}",
        ) from error
    return [out / f"report.{suffix}" for suffix in texts]


def markdown(facts: dict, parts: Sequence[Section]) -> str:
    """The report as Markdown, without its plots."""
    lines = [f"# Report of {plain(facts['run'])}", plain(headline(facts))]
    lines += [f"> **Warning.** {plain(warning['text'])}" for warning in facts["warnings"]]
    for part in parts:
        lines += [f"## {part.title}", *part.markdown()]
    return "\n\n".join(lines) + "\n"


def html(facts: dict, parts: Sequence[Section]) -> str:
    """The report as one page that needs nothing else."""
    need("jinja2")
    from jinja2 import Environment, PackageLoader

    environment = Environment(
        loader=PackageLoader("metakd.deploy", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE).render(
        facts=facts, headline=headline(facts), parts=parts
    )


def _rewrite_cards(run: RunFolder, facts: dict) -> None:
    comparison, latency = facts["comparison"], facts["latency"]
    for stage in run.of_kind("student"):
        # Without weights there is no model; without its origin the card was written before that was
        # kept, and says more than could be said now.
        if not stage.record["kept"] or "origin" not in stage.result:
            continue
        column = AVERAGE if stage.domain == ALL_DOMAINS else stage.domain
        spread = comparison["summary"].get(stage.row, {}).get(column) if comparison else None
        rows = []
        if latency:
            model = model_of(latency, stage.kind, shape_of(stage.row))
            own = model is not None and latency["models"][model].get("role")
            rows = [row for row in latency["rows"] if own and row["model"] == model]
        least = min((row["batch"] for row in rows), default=None)
        measured = Measured(
            spread=spread and {"split": comparison["split"], **spread},
            latency=[row for row in rows if row["batch"] == least],
            device=machine(latency["environment"]) if latency else "",
            formats=stage.export["formats"] if stage.export else {},
        )
        write_card(stage.folder, stage.result, stage.record["command"], measured)
