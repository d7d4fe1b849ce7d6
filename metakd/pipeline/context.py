"""A run directory with its configuration, corpus and store: what all of its stages share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from rich.console import Console

from metakd.config import RunConfig, Stage, StudentConfig
from metakd.data.batches import Batch, Collate, collate
from metakd.data.corpus import Corpus, Split, load_corpus
from metakd.data.digests import content_key
from metakd.errors import ConfigError, DataError
from metakd.method.fit import check_models
from metakd.method.methods import METHODS
from metakd.method.recipe import RECIPES, Recipe
from metakd.models.adapters import base_of
from metakd.models.reader import Reader, open_reader, padding_of
from metakd.models.sources import load_config, why_not_alike
from metakd.pipeline.store import StageStore
from metakd.pipeline.table import ALL_DOMAINS
from metakd.pipeline.texts import part_of
from metakd.training.log import tell
from metakd.training.world import World

RESULTS = "0.1.0"
"""The first version whose stages came out as these do: raised where the same inputs give another
result, so that what an earlier version has finished is not built again for nothing."""


@contextmanager
def configured(block: str) -> Iterator[None]:
    """What a wrong value makes a library raise, as an error of the configuration."""
    try:
        yield
    except (OSError, ValueError) as error:
        remedy = f"correct {block} in the configuration"
        raise ConfigError(f"{block}: {str(error).splitlines()[0]}", remedy) from error


def _check_domains(corpus: Corpus) -> None:
    # Each domain gets a folder of its name, and is trained, chosen and scored on its own examples.
    problems = [
        f"domain {name!r} cannot name a folder"
        for name in corpus.domains
        # The only one may have it; `metakd.data.reading` refuses what would lead elsewhere.
        if name == ALL_DOMAINS and len(corpus.domains) > 1
    ]
    for title in ("train", "validation", "test"):
        split = getattr(corpus, title)
        present = set() if split is None else set(split.domain.tolist())
        problems += [
            f"domain {name!r} has no {title} examples"
            for number, name in enumerate(corpus.domains)
            if split is not None and number not in present
        ]
    if problems:
        raise DataError(
            "; ".join(problems),
            "give it some, leave the domain out, or rename it if it is called all; without "
            "data.validation a share of train is held out",
        )


@dataclass
class Context:
    """One run directory, and what everything in it shares.

    Args:
        config: the checked configuration.
        world: from ``join_world``.
        console: where the first rank talks.
        command: how the run was started; recorded with every stage.
        resume: see ``StageStore``.
        reshard: see ``engine.Saves``.
        last: the last stage that is asked for; what later ones alone use is not looked at.
        compared: the rows of a comparison are trained, and not the configured method.
    """

    config: RunConfig
    world: World = field(default_factory=World)
    console: Console = field(default_factory=Console)
    command: str = ""
    resume: str = "auto"
    reshard: bool = False
    last: Stage = "students"
    compared: bool = False

    @cached_property
    def folder(self) -> Path:
        """The run directory."""
        return Path(self.config.output_dir)

    @cached_property
    def recipe(self) -> Recipe:
        """Paper or released form of the method."""
        return RECIPES[self.config.form]

    @cached_property
    def reader(self) -> Reader:
        """How the teacher reads texts, and so do students that have no tokenizer of their own."""
        with configured("teacher.model"):
            return open_reader(self.config.teacher.model, self.config.data.max_length)

    def reader_of(self, student: StudentConfig) -> Reader:
        """How a student reads texts."""
        if student.model is None:
            return self.reader
        if student.model not in self._readers:
            with configured("student.model"):
                self._readers[student.model] = self._read_by(student.model)
        return self._readers[student.model]

    def _read_by(self, model: str) -> Reader:
        tokenizer = self.reader.tokenizer

        def alike() -> bool:
            with configured("student.model"):
                return why_not_alike(model, tokenizer) is None

        if not self.world.agree(self.world.on_first(alike)):
            return open_reader(model, self.config.data.max_length)
        shape = load_config(model)
        number = padding_of(model, shape, tokenizer)
        return Reader(tokenizer, number, self.reader.changed or number != shape.pad_token_id)

    def padding_inputs(self, student: StudentConfig | None = None) -> dict:
        """What a student's, or the teacher's, padding adds to the inputs of its stage, where it had
        to be put right."""
        reader = self.reader if student is None else self.reader_of(student)
        side = reader.tokenizer.padding_side
        return {"padding": [reader.pad_token_id, side]} if reader.changed else {}

    @cached_property
    def _readers(self) -> dict[str, Reader]:
        return {}

    @property
    def tokenizer(self):
        """The teacher's."""
        return self.reader.tokenizer

    @cached_property
    def collate(self) -> Collate:
        """Examples to a padded batch."""
        return self.collate_of(self.reader)

    def collate_of(self, reader: Reader) -> Collate:
        """Examples, as this reader reads them, to a padded batch."""
        return collate(reader.tokenizer, packed=self.config.packed)

    def corpus_of(self, reader: Reader) -> Corpus:
        """The corpus as this reader reads it, example by example the same."""
        if reader.tokenizer is self.tokenizer:
            return self.corpus
        source = reader.tokenizer.name_or_path
        if source not in self._read:
            name = hashlib.sha256(source.encode()).hexdigest()[:12]
            self._read[source] = self.world.one_by_one(
                lambda: self._load(reader, self.cache_root / "students" / name)
            )
        return self._read[source]

    @cached_property
    def _read(self) -> dict[str, Corpus]:
        return {}

    def _load(self, reader: Reader, cache: Path) -> Corpus:
        def say_once(text: str) -> None:
            if text not in self._doubts:
                self._doubts.add(text)
                self.say(text)

        return load_corpus(
            self.config.data, reader.tokenizer, seed=self.config.seed, cache=cache, say=say_once
        )

    @cached_property
    def _doubts(self) -> set[str]:
        return set()

    def remarks(self) -> list[str]:
        """What is said of the data each time that it is read."""
        said = [*self.corpus.doubts, *(f"data: {one}" for one in self.corpus.left_out)]
        others = (doubt for corpus in self._read.values() for doubt in corpus.doubts)
        return list(dict.fromkeys([*said, *others]))

    @cached_property
    def corpus(self) -> Corpus:
        """The tokenised corpus."""
        corpus = self.world.one_by_one(lambda: self._load(self.reader, self.cache_root))
        unknown = set(self.config.distill.domains or []) - set(corpus.domains)
        if unknown and self.last == "students":
            raise ConfigError(
                f"distill.domains: {', '.join(sorted(unknown))} not among "
                + ", ".join(corpus.domains),
                "correct the names",
            )
        if set(self.config.data.withhold) == set(corpus.domains):
            raise ConfigError(
                "data.withhold: names every domain, which leaves nothing to teach", "keep one"
            )
        if self.last != "prototypes":
            _check_domains(corpus)
        for one in corpus.left_out:
            self.say(f"data: {one}")
        students = self.last == "students"

        def longest(student: StudentConfig | None) -> tuple[Reader, Batch]:
            reader = self.reader if student is None else self.reader_of(student)
            apart = reader.tokenizer is not self.tokenizer
            train = (self.corpus_of(reader) if apart else corpus).train
            rows = torch.tensor(train.lengths).argsort()[[0, -1]].tolist()
            return reader, self.collate_of(reader)([train[row] for row in rows])

        check_models(
            self.config,
            self.tokenizer,
            corpus.label2id,
            self.recipe,
            students,
            longest,
            self.compared,
        )
        return corpus

    @cached_property
    def student_domains(self) -> list[str]:
        """The domains to make students for, or the one student for all."""
        if self.config.distill.one_student_for_all:
            return [ALL_DOMAINS]
        return self.config.distill.domains or self.corpus.domains

    @cached_property
    def store(self) -> StageStore:
        """The finished stages."""
        config = self.config
        data = config.data
        common = {
            "version": RESULTS,
            "data": data.inputs(),
            "content": self._content(
                *(data.train, data.validation, data.test, config.teacher.model, data.unlabelled),
                base_of(config.teacher.model),
            ),
            "seed": config.seed,
            "zero": config.zero,
            "precision": config.precision,
            "packed": config.packed,
            "deepspeed": config.deepspeed,
            "compat": config.form,
        }
        return StageStore(
            self.folder,
            self.world,
            common,
            self.command,
            self.say,
            resume=self.resume,
            reshard=self.reshard,
            keep=config.save_total_limit,
            look_ahead=self._look_at_data,
        )

    def _look_at_data(self) -> dict:
        """What every stage records of the corpus, which is refused, if it is, before a stage has
        begun."""
        left_out = self.corpus.left_out
        return {"left_out": [one._asdict() for one in left_out]} if left_out else {}

    @cached_property
    def _contents(self) -> dict[str | None, str]:
        return {}

    def content_of(self, model: str | None) -> str:
        """Digest of a student's pre-trained model, which is read once."""
        if model not in self._contents:
            base = None if model is None else base_of(model)
            self._contents[model] = self._content(model, base)
        return self._contents[model]

    def _content(self, *sources: str | None) -> str:
        """Digest of files and folders, which the first rank reads; a hub id names none and adds
        nothing."""

        def read() -> str:
            try:
                return content_key(*map(Path, filter(None, sources)))
            except OSError as error:
                cause = f"{error.filename}: {error.strerror}"
                raise DataError(cause, "give back the right to read it") from error

        key = self.world.agree(self.world.on_first(read))
        self.contents[tuple(filter(None, sources))] = key
        return key

    @cached_property
    def contents(self) -> dict[tuple[str, ...], str]:
        """The digests that were asked for, each of files and folders together."""
        return {}

    @property
    def teacher_kind(self) -> str | None:
        """The kind of teacher that the configured method learns from."""
        return METHODS[self.config.distill.method].teacher(self.config.teacher.kind)

    def say(self, text: str) -> None:
        """One line on the console, from the first rank only."""
        if self.world.is_main:
            tell(self.console, text)

    def settings(self, *blocks: str) -> dict:
        """Blocks of the configuration, as inputs of a stage."""
        return {block: getattr(self.config, block).inputs() for block in blocks}

    def part(self, split: Split, domain: str) -> Split:
        """The examples of a domain, or of ``all``."""
        return part_of(split, self.corpus, domain)

    @property
    def cache_root(self) -> Path:
        """Folder of what is kept between runs and can be made anew."""
        return self.folder / ".cache"
