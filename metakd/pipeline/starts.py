"""What students of a preset begin as, where ``student.pretrain`` asks for it: general distillation,
for which no label and no teacher of a task is needed.

``L = mean_i (L_embd + L_hidn + L_attn)_i`` against the pre-trained encoder, with the weights and
the layer map of ``distill``.

Source: Jiao et al. 2020 (TinyBERT), section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from operator import attrgetter
from pathlib import Path

import torch

from metakd.config import PretrainConfig, StudentConfig
from metakd.config.places import meant
from metakd.data.batches import Collate, prefetch
from metakd.data.corpus import Split, load_texts
from metakd.errors import ConfigError
from metakd.method.balance import SAMPLED, balanced
from metakd.method.methods import GENERAL
from metakd.method.objective import Distillation
from metakd.method.terms import Term
from metakd.models.student import fresh_encoder
from metakd.pipeline.context import configured
from metakd.pipeline.lessons import Asked, TeacherOutputs, attention_inputs
from metakd.pipeline.teacher_cache import signals_of
from metakd.pipeline.teaching import TeacherStage
from metakd.training.engine import fit, seed_everything
from metakd.training.saves import Saves
from metakd.training.settings import recompute_activations
from metakd.training.world import World

_OF_DISTILL = (*GENERAL.keys, "backend", "balance")


@dataclass
class StartStage(TeacherStage):
    """``<output_dir>/starts/<preset>-s<seed>/``: an encoder without a head, for ``AutoModel``, with
    its tokenizer. All students of the preset begin as it, whatever their seed.

    Args:
        starts_of: the run whose starts serve this one, in place of its own.
    """

    starts_of: StartStage | None = field(default=None, repr=False)

    @cached_property
    def outputs(self) -> TeacherOutputs:
        """What is asked of the teachers, and kept."""
        return TeacherOutputs(self)

    def move_to(self, world: World) -> None:
        """Go on with these processes; what was found before is looked up again."""
        self.world = self.store.world = world
        if self.starts_of is not None:
            self.starts_of.move_to(world)
        self.store.forget()
        self.outputs.forget()

    def pretrain(self) -> list[Path]:
        """Make what all students of the configuration begin as; returns the folders.

        Raises:
            ConfigError: none of them is to be pretrained.
        """
        students = [one for one in self.config.students.values() if one.pretrain]
        if not students:
            raise ConfigError(
                "student.pretrain: is not given, nor by a row of compare.rows",
                "give it to a preset, as in student: {preset: tiny-2l-128, pretrain: {}}",
            )
        self.outputs.foresee([], self.foresee_starts(students))
        return list(dict.fromkeys(filter(None, map(self.start, students))))

    def foresee_starts(self, students: Iterable[StudentConfig]) -> list[Asked]:
        """Look at the starts of these students before anything is computed, those that are there
        left out; returns what is to be kept of the encoder.

        Raises:
            ConfigError: there is no such file of texts.
            DataError: something is wrong with the texts.
        """
        if self.starts_of is not None:
            self.starts_of.outputs.foresee([], self.starts_of.foresee_starts(students))
            return []
        asked = []
        # Once: later on, groups of processes ask, and not all together.
        for student in students:
            if student.pretrain is None or student.preset in self._foreseen:
                continue
            self._foreseen.add(student.preset)
            pretrain = student.pretrain
            for file in pretrain.texts:
                if not Path(file).is_file():
                    raise ConfigError(
                        f"student.pretrain.texts: {file}: no such file{meant(Path(file))}",
                        "correct the path",
                    )
            if self.store.may_build and not self.store.has(*self._start_stage(student)):
                self._texts_beside(pretrain)
                if pretrain.cache_teacher != "none":
                    asked.append(self._asked_of_encoder(student))
        return asked

    def start(self, student: StudentConfig) -> Path | None:
        """The folder of what a student begins as, made if it is not there; None where its weights
        are not pretrained here."""
        if student.pretrain is None:
            return None
        owner = self.starts_of or self
        place, inputs = owner._start_stage(student)
        owner.store.get(place, inputs, partial(owner._build_start, student))
        return place

    def checked_start(self, student: StudentConfig) -> Path | None:
        """As ``start``, about to be read, see ``StageStore.checked``."""
        place = self.start(student)
        return None if place is None else (self.starts_of or self).store.checked(place)

    def start_inputs(self, student: StudentConfig) -> dict:
        """What its start adds to the inputs of a student."""
        if student.pretrain is None:
            return {}
        owner = self.starts_of or self
        return {"start": owner.store.digest(owner._start_stage(student)[1])}

    def start_facts(self, student: StudentConfig) -> dict:
        """What is known of the start of a student, which has been made; nothing without one."""
        if (place := self.start(student)) is None:
            return {}
        return {"start": (self.starts_of or self).store.result(place)}

    def _start_stage(self, student: StudentConfig) -> tuple[Path, dict]:
        distill = self.config.distill.towards(student)
        # As ``Block.inputs`` has it: what came later is said where it is not as it was before.
        settled = distill.inputs()
        said = [key for key in _OF_DISTILL if key.split(".")[0] in settled]
        inputs = {
            "stage": "start",
            "student": student.start_inputs(),
            "texts": [self.content_of(file) for file in _pretraining(student).texts],
            "encoder": self.config.teacher.model,
            "distill": {key: attrgetter(key)(distill) for key in said},
            **self.padding_inputs(),
            **attention_inputs(self._start_terms(student)),
        }
        return self.folder / "starts" / f"{student.preset}-s{self.config.seed}", inputs

    @cached_property
    def _foreseen(self) -> set[str | None]:
        return set()

    @cached_property
    def _texts_read(self) -> dict[tuple[str, ...], Split]:
        return {}

    def _texts_beside(self, pretrain: PretrainConfig) -> Split | None:
        """Those of the files, tokenised; read once."""
        files = tuple(pretrain.texts)
        if files and files not in self._texts_read:
            self._texts_read[files] = self.world.one_by_one(
                lambda: load_texts(
                    files,
                    self.config.data,
                    self.tokenizer,
                    self.corpus.label2id,
                    cache=self.cache_root,
                    say=self.say,
                )
            )
        return self._texts_read.get(files)

    def _start_parts(self, student: StudentConfig) -> dict[str, Split]:
        """All that a start learns from, by where it is from."""
        corpus, beside = self.corpus, self._texts_beside(_pretraining(student))
        known = {"train": corpus.train, "unlabelled": corpus.unlabelled}
        parts = {name: replace(split, columns={}) for name, split in known.items() if split}
        if beside is not None:
            first = max(int(part.index.max()) for part in parts.values()) + 1
            parts["texts"] = replace(beside, index=beside.index + first)
        return parts

    def _start_texts(self, student: StudentConfig) -> Split:
        return Split.joined(list(self._start_parts(student).values()))

    def _asked_of_encoder(self, student: StudentConfig) -> Asked:
        depth = self.outputs.taught.num_hidden_layers
        signals = signals_of(self._start_terms(student), False, depth)
        place = f"encoder/{student.preset}"
        return Asked(place, partial(self._start_texts, student), signals)

    def _start_terms(self, student: StudentConfig) -> list[Term]:
        distill = self.config.distill.towards(student)
        return self.outputs.terms_of(GENERAL, student, distill, self.outputs.taught)

    def _build_start(self, student: StudentConfig, folder: Path, saves: Saves) -> dict:
        config, pretrain = self.config, _pretraining(student)
        parts = self._start_parts(student)
        texts, terms = Split.joined(list(parts.values())), self._start_terms(student)
        self._warn_of_scored_texts(parts.get("texts"))
        if pretrain.cache_teacher == "none":
            service = self.outputs.service([], config.teacher.model)
            needs = frozenset[str]().union(*(term.needs for term in terms))
            showing, pad = service.showing(needs, config.distill.teacher_stream), self.collate
        else:
            asked = self._asked_of_encoder(student)
            kept = self.outputs.keep(asked.place, encoder=config.teacher.model)
            answers = kept.teacher(asked.signals)
            showing, pad = nullcontext(answers), answers.collate(self.collate)
        seed_everything(config.seed)
        with configured("student"):
            model = fresh_encoder(student.preset, self.tokenizer, config.data.max_length)
        module = Distillation(
            model,
            terms,
            teacher_hidden=self.outputs.taught.hidden_size,
            recipe=self.recipe,
            packed=config.packed,
            task=texts.task,
        )
        recompute_activations(model, [pretrain])
        with self.open_log(folder) as log, showing as teacher:
            if config.distill.balance != "none":
                module.restrict(self.balanced(terms, texts, pad, teacher))
            fit(
                module,
                texts,
                pad,
                config=config,
                training=pretrain,
                sharding=config.sharding(student),
                world=self.world,
                log=log,
                teacher=teacher,
                saves=saves,
                seed=config.seed,
                title=f"start of {student.preset}",
            )
        model = module.detach().float()
        if self.world.is_main:
            model.config.dtype = torch.float32
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        return {
            "preset": student.preset,
            "encoder": Path(config.teacher.model).name,
            "files": [Path(file).name for file in pretrain.texts],
            "texts": {name: len(part) for name, part in parts.items()},
        }

    def _warn_of_scored_texts(self, beside: Split | None) -> None:
        """Of the files: those of the corpus were looked at when it was read."""
        corpus = self.corpus
        scored = [split for split in (corpus.validation, corpus.test) if split is not None]
        known = {tuple(ids) for split in scored for ids in split.input_ids}
        found = sum(tuple(ids) in known for ids in beside.input_ids) if beside else 0
        if found:
            self.say(
                f"warning: student.pretrain.texts: {found} of {len(beside)} are texts of "
                "validation or test, of which students are scored; leave them out"
            )

    def balanced(
        self, terms: Sequence[Term], texts: Split, pad: Collate, teacher: Callable
    ) -> list[Term]:
        """The terms with scales, measured on a sample of the texts by every process alike."""
        drawn = torch.randperm(
            len(texts), generator=torch.Generator().manual_seed(self.config.seed)
        )
        size = self.config.distill.training.per_device_train_batch_size
        rows = [part.tolist() for part in drawn[:SAMPLED].split(size)]
        batches = prefetch((pad([texts[i] for i in part]) for part in rows), self.world.device)
        return self.world.agree(balanced(terms, ((teacher(batch), batch) for batch in batches)))


def _pretraining(student: StudentConfig) -> PretrainConfig:
    assert student.pretrain is not None, "asked of students with a start alone"
    return student.pretrain
