"""Teachers: single-domain, mixed, multi-task and the meta-teacher, one class for all four.

The meta-teacher minimises ``L_MT = mean_i(t_i CE_i + gamma1 L_DA_i)``: prototype scores weight the
classification loss, and a K-way domain head on the corrupted representation ``h_d(X) = tanh((E(X) +
DomEmb[k]) W + b)`` is taught *false* domain labels, so that its features carry no domain. A
multi-task teacher is the same encoder with K x M outputs, of which an example sees its own domain's
M. Sizes: B batch, H hidden width, K domains, M classes.

Source: Meta-KD section 3.2, equations 3-5.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from metakd.errors import CheckpointError, UnsupportedError
from metakd.method.recipe import PAPER, Recipe
from metakd.method.sources import check_finite, damaged, load_trained_classifier
from metakd.method.taps import Features, Taps, pool


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


class DomainLayer(nn.Module):
    """``h_d = tanh((E + DomEmb[k]) W + b)`` [B, H]: the domain-corrupted representation.

    Args:
        hidden: H.
        num_domains: K.
        tanh: False gives h_d before its tanh, which the release compares in L_TKD.
    """

    def __init__(self, hidden: int, num_domains: int, tanh: bool = True):
        super().__init__()
        self.tanh = tanh
        self.embedding = nn.Embedding(num_domains, hidden)
        self.dense = nn.Linear(hidden, hidden)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, embedding: Tensor, domain: Tensor) -> Tensor:
        """E(X) [B, H] and domain [B] to h_d [B, H]."""
        corrupted = self.dense(embedding.to(self.dense.weight.dtype) + self.embedding(domain))
        return torch.tanh(corrupted) if self.tanh else corrupted


def false_domains(
    domain: Tensor, num_domains: int, *, seed: int, always_false: bool = True
) -> Tensor:
    """A wrong domain for every example [N], uniform over the others and the same for the same seed.

    Args:
        domain: true domains [N].
        num_domains: K >= 2.
        seed: of the draw; use another one each epoch.
        always_false: False gives EasyTransfer's permutation of the true labels, which hits the
            truth by chance.

    Raises:
        ValueError: only one domain exists, so no label can be false.
    """
    if num_domains < 2:
        raise ValueError(f"num_domains: {num_domains}; domain corruption needs at least 2")
    generator = torch.Generator().manual_seed(seed)
    if not always_false:
        return domain[torch.randperm(len(domain), generator=generator)]
    return (domain + torch.randint(1, num_domains, domain.shape, generator=generator)) % num_domains


class Teacher(nn.Module):
    """An encoder classifier with what its kind adds, for training and, frozen, for teaching.

    Args:
        model: sequence classifier with M outputs (K x M for ``mtl``).
        kind: single, mix, mtl or meta.
        domains: names of the K domains.
        gamma1: weight of L_DA (meta only).
        recipe: paper or released form.
        withheld: domains it never sees; a multi-task teacher answers for them with the mean of its
            other heads.
        packed: run the encoder's layers on real tokens only.

    Raises:
        UnsupportedError: packed, in a recipe that counts padding.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kind: str,
        domains: list[str],
        gamma1: float = 0.2,
        recipe: Recipe = PAPER,
        withheld: Sequence[str] = (),
        packed: bool = False,
    ):
        super().__init__()
        check_packed(packed, recipe)
        self.model = model
        self.kind = kind
        self.domains = domains
        self.gamma1 = gamma1
        self.recipe = recipe
        self.withheld = list(withheld)
        seen = torch.tensor([name not in self.withheld for name in domains])  # [K]
        # Row k mixes the K heads into the answer for domain k.
        heads = torch.where(seen[:, None], torch.eye(len(domains)), seen / seen.sum())  # [K, K]
        self.register_buffer("head_mix", heads, persistent=False)
        self.num_classes = model.config.num_labels // (len(domains) if kind == "mtl" else 1)
        if kind == "meta":
            self.domain_layer = DomainLayer(
                model.config.hidden_size, len(domains), recipe.tanh_on_transfer
            )
            self.domain_classifier = nn.Linear(model.config.hidden_size, len(domains))
        self._taps = Taps(model, {"last_hidden"} if kind == "meta" else set(), packed)

    @property
    def trains_domain_loss(self) -> bool:
        """Is L_DA part of the loss?"""
        return (
            self.kind == "meta"
            and self.recipe.domain_loss
            and self.gamma1 > 0
            and len(self.domains) - len(self.withheld) > 1
        )

    def features(self, batch: dict[str, Tensor], taps: Taps | None = None) -> Features:
        """One forward pass: logits [B, M] of each example's own domain, h_d for a meta-teacher, and
        what ``taps`` adds."""
        features = (taps or self._taps)(batch)
        if self.kind == "mtl":
            logits = features.logits.unflatten(
                -1, (len(self.domains), self.num_classes)
            )  # [B, K, M]
            features.logits = torch.einsum(
                "bk,bkm->bm", self.head_mix[batch["domain"]].to(logits.dtype), logits
            )
        if self.kind == "meta" and features.last_hidden is not None:
            features.domain = self.domain_layer(
                pool(features, self.recipe.pooling), batch["domain"]
            )
        return features

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits [B, M] of each example's own domain."""
        return self.features(batch).logits

    def forward(self, batch: dict[str, Tensor]) -> StepOutput:
        """L_MT per example; ``batch`` carries labels [B], domain [B], and for meta t [B] and
        false_domain [B]."""
        features = self.features(batch)
        cross_entropy = F.cross_entropy(features.logits.float(), batch["labels"], reduction="none")
        terms = {"ce": cross_entropy}
        rows = cross_entropy
        if self.kind == "meta":
            # A cosine can fall below 0; a negative weight would teach the opposite of the label.
            score = batch["t"].clamp(min=0.0)
            rows = terms["ce_weighted"] = score * cross_entropy
            if self.trains_domain_loss:
                # The release's domain classifier has the tanh that its L_TKD lacks.
                corrupted = (
                    features.domain if self.domain_layer.tanh else torch.tanh(features.domain)
                )
                domain_logits = self.domain_classifier(corrupted).float()
                domain_loss = F.cross_entropy(
                    domain_logits, batch["false_domain"], reduction="none"
                )
                terms["domain_loss"] = domain_loss
                weight = score if self.recipe.score_weighs_domain_loss else 1.0
                rows = rows + self.gamma1 * weight * domain_loss
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
            "kind": self.kind,
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


class FrozenTeacher:
    """A trained teacher as the student sees it: no gradients, no dropout, only the features asked
    for.

    Args:
        teachers: one teacher, or several whose logits are averaged (MTN-KD).
        needs: the ``Features`` to collect; an ensemble gives logits only.
        own_stream: compute on a CUDA stream of its own, beside the student's forward pass, until
            ``Features.arrive``.
        packed: run the encoders' layers on real tokens only.

    Raises:
        ValueError: an ensemble is asked for more than logits, or a teacher without domain layer for
            h_d.
        UnsupportedError: a stream of its own without CUDA; packed, in a recipe that counts padding.
    """

    def __init__(
        self,
        teachers: list[Teacher],
        needs: frozenset[str],
        own_stream: bool = False,
        packed: bool = False,
    ):
        if len(teachers) > 1 and needs - {"logits"}:
            raise ValueError(
                "needs: an ensemble of teachers gives logits only, "
                f"not {sorted(needs - {'logits'})}"
            )
        if "domain" in needs and any(teacher.kind != "meta" for teacher in teachers):
            raise ValueError(
                f"needs: a {teachers[0].kind} teacher has no domain representation; "
                "use a meta-teacher"
            )
        self.teachers = teachers
        tapped = set(needs) - {"logits", "domain"} | (
            {"last_hidden"} if "domain" in needs else set()
        )
        for teacher in teachers:
            check_packed(packed, teacher.recipe)
        self._taps = [Taps(teacher.model, tapped, packed) for teacher in teachers]
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
        """Features of one batch, from the one teacher or, logits only, averaged over all."""
        if self._stream is None:
            return self._features(batch)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))  # for the batch
        with torch.cuda.stream(self._stream):
            features = self._features(batch)
        features.stream = self._stream
        return features

    def _features(self, batch: dict[str, Tensor]) -> Features:
        seen = [
            teacher.features(batch, taps)
            for teacher, taps in zip(self.teachers, self._taps, strict=True)
        ]
        first = seen[0]
        if len(seen) > 1:
            first.logits = torch.stack([features.logits.float() for features in seen]).mean(0)
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


def domain_loss_floor(num_domains: int) -> tuple[float, float]:
    """(ln K, ln (K - 1)): L_DA settles near the first; well below the second the domain leaks
    through."""
    return math.log(num_domains), math.log(max(num_domains - 1, 1))
