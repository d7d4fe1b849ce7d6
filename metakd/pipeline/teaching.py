"""The second stage: teachers, one or one for each domain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from metakd.config import TrainingConfig
from metakd.data.corpus import Split, folds_of
from metakd.errors import ConfigError
from metakd.method.kinds import TEACHER_KINDS
from metakd.method.teachers import Teacher
from metakd.models.reader import Reader
from metakd.models.sources import load_classifier
from metakd.pipeline.context import configured
from metakd.pipeline.scores import PrototypeStage
from metakd.pipeline.table import ALL_DOMAINS
from metakd.training.engine import fit, seed_everything
from metakd.training.log import RunLog
from metakd.training.saves import Saves
from metakd.training.scoring import evaluate, logits_of
from metakd.training.settings import recompute_activations

_ENSEMBLE_STRIDE = 1000  # from the seed of a teacher to that of the next of its ensemble
_OPINIONS = "opinions.safetensors"


class Fold(NamedTuple):
    """One of several teachers, each of which leaves out a part of the examples."""

    number: int  # from 0
    of: int

    @property
    def title(self) -> str:
        """To go with the name of its teacher."""
        return f"-fold{self.number + 1}of{self.of}"


@dataclass
class TeacherStage(PrototypeStage):
    """``<output_dir>/teachers/<kind>-s<seed>[/<domain>]/``: ``save_pretrained``, the domain parts
    beside it. ``<kind>-s<seed>-fold<n>of<k>[/<domain>]/``: the logits of what it has not seen, and
    no weights."""

    def _taught_part(self, split: Split, domain: str) -> Split:
        return self.part(split.select(self.is_taught(split).nonzero().flatten()), domain)

    def open_log(self, folder: Path) -> RunLog:
        """What a training in this folder is logged to."""
        return RunLog(folder, self.config.report_to, self.console, active=self.world.is_main)

    def score(
        self,
        classify: Callable,
        split: Split,
        training: TrainingConfig,
        one_by_one: bool = False,
        reader: Reader | None = None,
    ) -> dict:
        """See ``evaluate``; ``reader`` of the split, the teacher's by default."""
        return evaluate(
            classify,
            split,
            self.collate_of(reader or self.reader),
            domains=self.corpus.domains,
            num_classes=len(self.corpus.label2id),
            batch_size=training.per_device_eval_batch_size,
            world=self.world,
            one_by_one=one_by_one,
        )

    def logits(
        self,
        classify: Callable,
        split: Split,
        training: TrainingConfig,
        reader: Reader | None = None,
    ) -> Tensor:
        """See ``logits_of``; ``reader`` of the split, the teacher's by default."""
        return logits_of(
            classify,
            split,
            self.collate_of(reader or self.reader),
            num_classes=len(self.corpus.label2id),
            batch_size=training.per_device_eval_batch_size,
            world=self.world,
        )

    def teach(self, kind: str | None = None, seed: int | None = None) -> list[Path]:
        """Train the teacher(s) of one kind; returns their folders: one, or one per domain for
        ``single``."""
        kind = kind or self.config.teacher.kind
        return list(self._teach(kind, self.config.seed if seed is None else seed))

    def ensemble(self, kind: str, seed: int) -> list[list[Path]]:
        """The folders of ``teacher.ensemble`` teachers, as ``teach`` returns those of each."""
        count = self.config.teacher.ensemble
        return [self.teach(kind, seed + number * _ENSEMBLE_STRIDE) for number in range(count)]

    def opinions(self, kind: str, seed: int, domain: str = ALL_DOMAINS) -> Tensor | None:
        """What ``teacher.folds`` teachers that have not seen them think of the training examples:
        logits [N, M], the mean over the ensemble; not a number for an example that the teacher has
        not learned from, of which it may speak itself. None without folds.

        Args:
            kind: of teacher.
            seed: of the first of its ensemble.
            domain: that of a teacher of one domain.
        """
        folds, members = self.config.teacher.folds, self.config.teacher.ensemble
        if folds is None:
            return None
        train, classes = self.corpus.train, len(self.corpus.label2id)
        position = torch.full((int(train.index.max()) + 1,), -1)
        position[train.index] = torch.arange(len(train))
        found = torch.full((len(train), classes), torch.nan)
        for number in range(folds):
            seeds = [seed + member * _ENSEMBLE_STRIDE for member in range(members)]
            places = [self._teach(kind, member, Fold(number, folds), domain) for member in seeds]
            for parts in zip(*places, strict=True):
                kept = [load_file(self.store.checked(place) / _OPINIONS) for place in parts]
                found[position[kept[0]["index"]]] = torch.stack([k["logits"] for k in kept]).mean(0)
        return found

    def _teach(
        self, kind: str, seed: int, fold: Fold | None = None, only: str = ALL_DOMAINS
    ) -> dict[Path, str]:
        """The folders of the teachers, of all domains or only this one, and of what domain each
        is; of a kind that is not trained there are none."""
        if TEACHER_KINDS[kind].in_data:
            return {}
        place = self.folder / "teachers" / f"{kind}-s{seed}{fold.title if fold else ''}"
        places = {place: ALL_DOMAINS}
        if TEACHER_KINDS[kind].per_domain:
            places = {
                place / name: name
                for name in self.corpus.domains
                if name not in self.config.data.withhold and only in (name, ALL_DOMAINS)
            }
        for place, domain in places.items():
            inputs = {
                "stage": "teacher",
                "teacher": self.config.teacher.inputs("kind", "ensemble", "folds"),
                "kind": kind,
                "teacher_seed": seed,
                "domain": domain,
                **({"fold": fold} if fold else {}),
                **self.padding_inputs(),
            }
            if TEACHER_KINDS[kind].by_score:
                inputs |= self.settings("prototypes")
            self.store.get(
                place,
                inputs,
                lambda folder, saves, domain=domain: self._build_teacher(
                    folder, saves, kind, domain, seed, fold
                ),
            )
        return places

    def _build_teacher(
        self, folder: Path, saves: Saves, kind: str, domain: str, seed: int, fold: Fold | None
    ) -> dict:
        config, corpus, rules = self.config.teacher, self.corpus, TEACHER_KINDS[kind]
        seed_everything(seed)
        outputs = len(corpus.label2id) * len(corpus.domains) if rules.head_per_domain else None
        with configured("teacher.model"):
            model = load_classifier(
                config.model,
                corpus.label2id,
                outputs,
                corpus.task.problem_type,
                self.reader.pad_token_id,
            )
        teacher = Teacher(
            model,
            kind,
            corpus.domains,
            config.gamma1,
            self.recipe,
            self.config.data.withhold,
            self.config.packed,
            corpus.task,
        )
        if remark := rules.remark(teacher):
            self.say(f"teacher {kind}: {remark}")
        recompute_activations(model, [config.training])
        train = self._taught_part(self.scored_train() if rules.by_score else corpus.train, domain)
        validation = self._taught_part(corpus.validation, domain)
        unseen = train
        if fold:
            number = folds_of(train, fold.of, self.config.seed)
            unseen = train.select((number == fold.number).nonzero().flatten())
            train = train.select((number != fold.number).nonzero().flatten())
            if not len(train) or not len(unseen):
                raise ConfigError(
                    f"teacher.folds: {fold.of} are too many for {len(number)} examples of {domain}",
                    "use fewer, or leave it out",
                )
        result, opinions = {}, {}

        def conclude() -> None:
            if fold:
                opinions["logits"] = self.logits(teacher.logits, unseen, config.training)
                opinions["index"] = unseen.index
            if corpus.test is not None:
                part = self.part(corpus.test, domain)
                result["test"] = self.score(teacher.logits, part, config.training, True)

        with self.open_log(folder) as log:
            best = fit(
                teacher,
                train,
                self.collate,
                config=self.config,
                training=config.training,
                sharding=self.config.sharding(config),
                world=self.world,
                log=log,
                title=f"teacher {kind}"
                + (f", fold {fold.number + 1} of {fold.of}" if fold else ""),
                seed=seed,
                columns=lambda epoch: rules.columns(teacher, train.domain, seed=seed, epoch=epoch),
                score=lambda: self.score(teacher.logits, validation, config.training),
                conclude=conclude,
                saves=saves,
            )
        result |= {"validation": best, **rules.marks(teacher)}
        if not self.world.is_main:
            return result
        if fold:
            save_file(opinions, folder / _OPINIONS)
        else:
            teacher.float().save(folder, self.tokenizer)
        return result
