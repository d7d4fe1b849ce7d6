"""Teachers: an encoder classifier with what its kind (``method.kinds``) adds, and what a student
is shown of it.

Sizes: B batch, H hidden width, K domains, M classes.

Source: Meta-KD section 3.2, equations 3-5.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from metakd.errors import CheckpointError, UnsupportedError
from metakd.method.attribution import Attribution
from metakd.method.kinds import ASSISTANT, ENCODER, TEACHER_KINDS, TeacherKind
from metakd.method.recipe import PAPER, Recipe
from metakd.method.tasks import SINGLE_LABEL, Task
from metakd.method.terms import ANSWERS
from metakd.models.sources import check_finite, damaged, load_encoder, load_trained_classifier
from metakd.models.taps import TAPPED, Features, Taps


class StepOutput(NamedTuple):
    """What a module under training returns: one loss per example, and each term's mean for the
    log. A tuple, so that DeepSpeed finds the tensors in it (ZeRO-3 gathers weights by them)."""

    rows: Tensor  # [B]
    terms: dict[str, Tensor]  # detached scalars, or shares [bins], on the device


def check_packed(packed: bool, recipe: Recipe) -> None:
    """Raises UnsupportedError where padding, which packed layers never see, has a say."""
    if packed and (recipe.pooling != "masked_mean" or recipe.attention_mean != "real"):
        raise UnsupportedError(
            "packed batches: the released form averages over padding too",
            "leave out packed, or use compat: paper",
        )


class Teacher(nn.Module):
    """An encoder classifier with what its kind adds, for training and, frozen, for teaching.

    Args:
        model: sequence classifier with M outputs (K x M where the kind has a head per domain).
        kind: a name in ``TEACHER_KINDS``, or one that is not among them.
        domains: names of the K domains.
        gamma1: weight of L_DA, where the kind has it.
        recipe: paper or released form.
        withheld: domains it never sees; a multi-task teacher answers for them with the mean of its
            other heads.
        packed: run the encoder's layers on real tokens only.
        task: what labels mean, where it is trained.

    Raises:
        UnsupportedError: packed, in a recipe that counts padding.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kind: str | TeacherKind,
        domains: list[str],
        gamma1: float = 0.2,
        recipe: Recipe = PAPER,
        withheld: Sequence[str] = (),
        packed: bool = False,
        task: Task = SINGLE_LABEL,
    ):
        super().__init__()
        check_packed(packed, recipe)
        self.model = model
        self.task = task
        self.kind = TEACHER_KINDS[kind] if isinstance(kind, str) else kind
        self.domains = domains
        self.gamma1 = gamma1
        self.recipe = recipe
        self.withheld = list(withheld)
        heads = len(domains) if self.kind.head_per_domain else 1
        self.num_classes = model.config.num_labels // heads
        for name, part in self.kind.parts(self).items():
            self.add_module(name, part)
        self._taps = Taps(model, self.kind.needs, packed)

    @property
    def num_taught(self) -> int:
        """How many of the domains it sees in training."""
        return len(self.domains) - len(self.withheld)

    def features(
        self, batch: dict[str, Tensor], taps: Callable[[dict[str, Tensor]], Features] | None = None
    ) -> Features:
        """One forward pass: logits [B, M] of each example's own domain, what else its kind shows,
        and what ``taps`` adds."""
        features = (taps or self._taps)(batch)
        self.kind.answer(self, features, batch)
        return features

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits [B, M] of each example's own domain."""
        return self.features(batch).logits

    def forward(self, batch: dict[str, Tensor]) -> StepOutput:
        """The loss of its kind per example; ``batch`` carries labels, domain [B], t [B] where
        the kind reads scores, and the kind's own columns."""
        rows, terms = self.kind.loss(self, self.features(batch), batch)
        return StepOutput(rows, {name: value.detach().mean() for name, value in terms.items()})

    def _domain_parts(self) -> dict[str, Tensor]:
        return {
            name: value
            for name, value in self.state_dict().items()
            if not name.startswith("model.")
        }

    def save(self, folder: Path, tokenizer) -> None:
        """Write the classifier with ``save_pretrained``, the domain parts beside it, and
        ``metakd.json``."""
        self.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if parts := self._domain_parts():
            save_file(
                {name: value.contiguous() for name, value in parts.items()},
                folder / "domain.safetensors",
            )
        described = {
            "kind": self.kind.name,
            "domains": self.domains,
            "gamma1": self.gamma1,
            "withheld": self.withheld,
        }
        (folder / "metakd.json").write_text(json.dumps(described, indent=1))

    @classmethod
    def load(cls, folder: Path, recipe: Recipe = PAPER) -> Teacher:
        """Read what ``save`` wrote.

        Raises:
            CheckpointError: the folder holds no teacher of ours, or a damaged one: a description
                that cannot be read, or weights that are missing, of another shape or not finite.
        """
        try:
            described = json.loads((folder / "metakd.json").read_text())
            if described["kind"] not in TEACHER_KINDS:
                raise CheckpointError(
                    f"{folder}: there is no kind of teacher called {described['kind']!r} here",
                    f"known are {', '.join(TEACHER_KINDS)}; import what adds it first",
                )
            model = load_trained_classifier(folder)
            teacher = cls(
                model,
                described["kind"],
                described["domains"],
                described["gamma1"],
                recipe,
                described["withheld"],
            )
            teacher._load_domain_parts(folder / "domain.safetensors")
        except FileNotFoundError:
            raise CheckpointError(
                f"{folder}: no teacher here (metakd.json is missing)", "run `metakd teach` first"
            ) from None
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            raise damaged(folder, error) from error
        return teacher

    @classmethod
    def pretrained(cls, source: str | Path, recipe: Recipe = PAPER) -> Teacher:
        """The encoder that teachers begin as, without a head: it shows all but logits.

        Raises:
            ValueError, OSError: see ``load_encoder``.
        """
        return cls(load_encoder(str(source)), ENCODER, [], recipe=recipe)

    @classmethod
    def assistant(cls, folder: Path, recipe: Recipe = PAPER) -> Teacher:
        """A finished student that teaches another; it was trained with its dropout, and teaches
        without.

        Raises:
            CheckpointError: the folder is damaged.
        """
        try:
            model = load_trained_classifier(folder)
        except (OSError, ValueError) as error:
            raise damaged(folder, error) from error
        return cls(model, ASSISTANT, [], recipe=replace(recipe, teacher_dropout=False))

    def _load_domain_parts(self, file: Path) -> None:
        wanted = self._domain_parts()
        if not wanted:
            return
        stored = load_file(file) if file.exists() else {}
        if missing := wanted.keys() - stored.keys():
            raise ValueError(f"{file.name}: {', '.join(sorted(missing))} missing")
        for name, tensor in wanted.items():
            if stored[name].shape != tensor.shape:
                raise ValueError(
                    f"{file.name}: {name} is {tuple(stored[name].shape)}, "
                    f"the encoder and domains make it {tuple(tensor.shape)}"
                )
        check_finite(file, stored)
        self.load_state_dict(stored, strict=False)


def told(batch: dict[str, Tensor]) -> Features:
    """Stands where a ``FrozenTeacher`` stands, and says what batches carry of one elsewhere: logits
    ``soft`` [B, M]."""
    return Features(mask=batch["attention_mask"], logits=batch["soft"])


class FrozenTeacher:
    """A trained teacher as the student sees it: no gradients, no dropout, only the features asked
    for.

    Args:
        teachers: one teacher, or several whose logits are averaged; ``votes`` are those of each,
            what else is asked for is that of the first.
        needs: the ``Features`` to collect.
        own_stream: compute on a CUDA stream of its own, beside the student's forward pass, until
            ``Features.arrive``.
        packed: run the encoders' layers on real tokens only.
        attribution: how tokens are scored, where ``needs`` has that; batches have labels then.

    Raises:
        ValueError: a teacher is asked for what its kind does not show.
        UnsupportedError: a stream of its own without CUDA; packed, in a recipe that counts padding.
    """

    def __init__(
        self,
        teachers: list[Teacher],
        needs: frozenset[str],
        own_stream: bool = False,
        packed: bool = False,
        attribution: Attribution | None = None,
    ):
        own = needs - TAPPED - ANSWERS
        if lacking := own - teachers[0].kind.shows:
            able = [name for name, kind in TEACHER_KINDS.items() if lacking <= kind.shows]
            raise ValueError(
                f"needs: a {teachers[0].kind.name} teacher does not show {sorted(lacking)}; "
                f"use one of kind {' or '.join(able)}"
            )
        self.teachers = teachers
        self._attribution = attribution if "attribution" in needs else None
        self._votes = "votes" in needs
        for teacher in teachers:
            check_packed(packed, teacher.recipe)
        first = needs & TAPPED | (teachers[0].kind.needs if own else set())
        self._taps = [
            Taps(teacher.model, set() if number else first, packed)
            for number, teacher in enumerate(teachers)
        ]
        for teacher in teachers:
            teacher.requires_grad_(False)
            # The release taught with dropout on; reproduced only when asked for by its recipe.
            teacher.train(teacher.recipe.teacher_dropout)
        self._stream = None
        if own_stream:
            device = next(teachers[0].parameters()).device
            if device.type != "cuda":
                raise UnsupportedError(
                    f"a stream of the teacher's own needs CUDA, the teacher is on {device}",
                    "leave out distill.teacher_stream",
                )
            self._stream = torch.cuda.Stream(device)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> Features:
        """Features of one batch."""
        if self._stream is None:
            return self._features(batch)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))  # for the batch
        with torch.cuda.stream(self._stream):
            features = self._features(batch)
        features.stream = self._stream
        return features

    def _features(self, batch: dict[str, Tensor]) -> Features:
        how = self._attribution

        def show(embedding: Tensor | None = None) -> Features:
            return self.teachers[0].features(batch, partial(self._taps[0], embedding=embedding))

        with torch.set_grad_enabled(how is not None):
            first = show()
        others = zip(self.teachers[1:], self._taps[1:], strict=True)
        seen = [first, *(teacher.features(batch, taps) for teacher, taps in others)]
        logits = first.logits
        if len(seen) > 1:
            logits = torch.stack([features.logits.float() for features in seen]).mean(0)
        if self._votes:
            first.votes = torch.stack([features.logits for features in seen], 1)
        if how is not None:
            labels = how.task.presumed(batch["labels"], logits)
            with torch.enable_grad():
                first.attribution = how.scores(first, show, labels, is_student=False)
        first.logits = logits
        if how is not None:
            first.detach()
        return first

    def __enter__(self) -> FrozenTeacher:
        return self

    def __exit__(self, *_exception) -> None:
        """Take the hooks out of the teachers."""
        self.remove()

    def remove(self) -> None:
        """Take the hooks out of the teachers."""
        for taps in self._taps:
            taps.remove()
