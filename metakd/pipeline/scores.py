"""The first stage: prototypes of the pre-trained encoder, and scores t of the examples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from metakd.data.batches import prefetch
from metakd.data.corpus import Split
from metakd.method.prototypes import Prototypes, describe_scores, embed
from metakd.method.teachers import Teacher
from metakd.models.sources import load_config, load_encoder
from metakd.models.taps import pool
from metakd.pipeline.context import Context, configured
from metakd.pipeline.serving import TeacherService
from metakd.training.saves import Saves
from metakd.training.scoring import logits_of


@dataclass
class PrototypeStage(Context):
    """``<output_dir>/prototypes/``: p[k, m] and the scores t of the training examples."""

    def is_taught(self, split: Split) -> Tensor:
        """[N], False for examples of domains that are withheld from prototypes and teachers."""
        withheld = [self.corpus.domains.index(name) for name in self.config.data.withhold]
        return ~torch.isin(split.domain, torch.tensor(withheld, dtype=torch.long))

    def prototypes(self) -> Path:
        """Prototypes of the pre-trained encoder, and the score t of every training example."""
        place = self.folder / "prototypes"
        inputs = {
            "stage": "prototypes",
            **self.settings("prototypes"),
            "encoder": self.config.teacher.model,
            **self.padding_inputs(),
        }
        self.store.get(place, inputs, self._build_prototypes)
        return place

    def _build_prototypes(self, folder: Path, _saves: Saves) -> dict:
        # Nothing to go on from: a pass over the data at inference speed.
        train, unlabelled = self.corpus.train, self.corpus.unlabelled
        embedding = self._embed(train)
        around = None if unlabelled is None else self._embed(unlabelled)
        if not self.world.is_main:
            return {}
        task, outputs = self.corpus.task, len(self.corpus.label2id)
        # A text of several classes counts for each of them.
        rows, cells = task.cells(train.labels)
        taught = self.is_taught(train)[rows]
        fitted = Prototypes.fit(
            embedding[rows[taught]],
            train.domain[rows[taught]],
            cells[taught],
            num_domains=len(self.corpus.domains),
            num_classes=task.num_cells(outputs),
            alpha=self.config.prototypes.alpha,
            rescale=self.config.prototypes.rescale,
            recipe=self.recipe,
        )
        fitted.save(folder)
        in_cells = fitted.score(embedding[rows], train.domain[rows], cells)
        score = in_cells.new_zeros(len(train)).scatter_reduce(
            0, rows, in_cells, "mean", include_self=False
        )
        scores = {"t": score.contiguous()}
        if unlabelled is not None:
            scores["unlabelled"] = _scores_by_cell(
                fitted, around, unlabelled, task.num_cells(outputs)
            )
        save_file(scores, folder / "scores.safetensors")
        described = describe_scores(score, report=lambda text: self.say(f"warning: {text}"))
        self.say(
            f"prototypes: t mean {described['mean']:.4f}, standard deviation {described['std']:.4f}"
        )
        return described

    def _embed(self, split: Split) -> Tensor:
        """E(X) [N, H] of the pre-trained encoder on the CPU; ranks share the work."""
        in_shards = self.config.sharding(self.config.teacher).zero == 3
        # The released form's mean counts padding, which depends on how texts share batches.
        if in_shards and self.recipe.pooling == "masked_mean":
            return self._embed_in_shards(split)
        with configured("teacher.model"):
            encoder = load_encoder(self.config.teacher.model)
        encoder.to(self.world.device)
        order = torch.tensor(split.lengths).argsort()
        chunks = order.split(self.config.teacher.training.per_device_eval_batch_size)
        own = chunks[self.world.rank :: self.world.size]
        embedding = torch.zeros(len(split), encoder.config.hidden_size)
        if own:
            batches = (self.collate([split[row] for row in rows.tolist()]) for rows in own)
            seen = embed(encoder, prefetch(batches, self.world.device), self.recipe)
            embedding[torch.cat(own)] = seen.to(embedding)
        self.world.add_up(embedding)
        return embedding

    def _embed_in_shards(self, split: Split) -> Tensor:
        """The same of an encoder that no device holds whole."""
        source = self.config.teacher.model
        with configured("teacher.model"):
            width = load_config(source).hidden_size
            service = TeacherService(
                [source], self.config, self.recipe, self.world, Teacher.pretrained
            )
        with service.showing(frozenset({"last_hidden"})) as show:
            return logits_of(
                lambda batch: pool(show(batch), self.recipe.pooling),
                split,
                self.collate,
                num_classes=width,
                batch_size=self.config.teacher.training.per_device_eval_batch_size,
                world=self.world,
            )

    def scores(self) -> dict[str, Tensor]:
        """Of training examples ``t`` [N], of unlabelled texts ``unlabelled`` [N, C] by cell."""
        return load_file(self.store.checked(self.prototypes()) / "scores.safetensors")

    def scored_train(self) -> Split:
        """The training examples with their scores."""
        return self.corpus.train.with_column("t", self.scores()["t"])


def _scores_by_cell(fitted: Prototypes, embedding: Tensor, split: Split, cells: int) -> Tensor:
    """The scores t that texts would have in each cell [N, C]."""
    ones = torch.ones_like(split.domain)
    found = [fitted.score(embedding, split.domain, number * ones) for number in range(cells)]
    return torch.stack(found, 1)
