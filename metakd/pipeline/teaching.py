"""The second stage: teachers, one or one for each domain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from metakd.config import TrainingConfig
from metakd.data.corpus import Split
from metakd.method.kinds import TEACHER_KINDS
from metakd.method.teachers import Teacher
from metakd.models.sources import load_classifier
from metakd.pipeline.context import configured
from metakd.pipeline.scores import PrototypeStage
from metakd.pipeline.table import ALL_DOMAINS
from metakd.training.engine import fit, seed_everything
from metakd.training.log import RunLog
from metakd.training.saves import Saves
from metakd.training.scoring import evaluate
from metakd.training.settings import recompute_activations


@dataclass
class TeacherStage(PrototypeStage):
    """``<output_dir>/teachers/<kind>-s<seed>[/<domain>]/``: ``save_pretrained``, the domain parts
    beside it."""

    def _taught_part(self, split: Split, domain: str) -> Split:
        return self.part(split.select(self.is_taught(split).nonzero().flatten()), domain)

    def open_log(self, folder: Path) -> RunLog:
        """What a training in this folder is logged to."""
        return RunLog(folder, self.config.report_to, self.console, active=self.world.is_main)

    def score(
        self, classify: Callable, split: Split, training: TrainingConfig, one_by_one: bool = False
    ) -> dict:
        """See ``evaluate``."""
        return evaluate(
            classify,
            split,
            self.collate,
            domains=self.corpus.domains,
            num_classes=len(self.corpus.label2id),
            batch_size=training.per_device_eval_batch_size,
            world=self.world,
            one_by_one=one_by_one,
        )

    def teach(self, kind: str | None = None, seed: int | None = None) -> list[Path]:
        """Train the teacher(s) of one kind; returns their folders: one, or one per domain for
        ``single``."""
        kind = kind or self.config.teacher.kind
        seed = self.config.seed if seed is None else seed
        place = self.folder / "teachers" / f"{kind}-s{seed}"
        places = {place: ALL_DOMAINS}
        if TEACHER_KINDS[kind].per_domain:
            places = {
                place / name: name
                for name in self.corpus.domains
                if name not in self.config.data.withhold
            }
        teacher = self.config.teacher.inputs("kind")
        for place, domain in places.items():
            inputs = {
                "stage": "teacher",
                "teacher": teacher,
                "kind": kind,
                "teacher_seed": seed,
                "domain": domain,
            }
            if TEACHER_KINDS[kind].by_score:
                inputs |= self.settings("prototypes")
            self.store.get(
                place,
                inputs,
                lambda folder, saves, domain=domain: self._build_teacher(
                    folder, saves, kind, domain, seed
                ),
            )
        return list(places)

    def _build_teacher(self, folder: Path, saves: Saves, kind: str, domain: str, seed: int) -> dict:
        config, corpus, rules = self.config.teacher, self.corpus, TEACHER_KINDS[kind]
        seed_everything(seed)
        outputs = len(corpus.label2id) * len(corpus.domains) if rules.head_per_domain else None
        with configured("teacher.model"):
            model = load_classifier(config.model, corpus.label2id, outputs)
        teacher = Teacher(
            model,
            kind,
            corpus.domains,
            config.gamma1,
            self.recipe,
            self.config.data.withhold,
            self.config.packed,
        )
        recompute_activations(model, [config.training])
        train = self._taught_part(self.scored_train() if rules.by_score else corpus.train, domain)
        validation = self._taught_part(corpus.validation, domain)
        result = {}

        def conclude() -> None:
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
                title=f"teacher {kind}",
                seed=seed,
                columns=lambda epoch: rules.columns(teacher, train.domain, seed=seed, epoch=epoch),
                score=lambda: self.score(teacher.logits, validation, config.training),
                conclude=conclude,
                saves=saves,
            )
        result |= {"validation": best, **rules.marks(teacher)}
        if self.world.is_main:
            teacher.float().save(folder, self.tokenizer)
        return result
