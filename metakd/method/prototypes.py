"""Prototypes and prototype scores: how much of each example transfers between domains.

``p[k, m] = mean of E(X_i) over domain k and class m`` from the pre-trained encoder (not
fine-tuned), on the training split; ``t_i = alpha cos(E(X_i), p[k, y_i]) + zeta sum over k' != k of
cos(E(X_i), p[k', y_i])``. Sizes: N examples, K domains, M classes, H hidden width, B batch, L
length.

Source: Meta-KD section 3.1, equations 1-2. The rescaling options are ours: raw t of a BERT-like
encoder is almost constant (0.97-0.99), which makes the weighting nearly a no-op.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from metakd.functional import class_prototypes, prototype_score
from metakd.method.recipe import FLAT_SCORES, PAPER, Recipe
from metakd.models.taps import Taps, pool


@torch.no_grad()
def embed(
    model: PreTrainedModel, batches: Iterable[dict[str, Tensor]], recipe: Recipe = PAPER
) -> Tensor:
    """E(X) of every example, in the order of the batches: [N, H] fp32 on the CPU. The model is left
    in eval mode."""
    model.eval()
    taps = Taps(model, {"last_hidden"})
    try:
        return torch.cat([pool(taps(batch), recipe.pooling).float().cpu() for batch in batches])
    finally:
        taps.remove()


@dataclass
class Prototypes:
    """Class x domain prototypes with what is needed to score any example against them.

    ``rescale`` maps raw t with statistics of the training corpus: ``none``; ``center`` (the corpus
    mean is subtracted from embeddings and prototypes before the cosines); ``minmax`` to [0, 1];
    ``zscore`` to 0.5 + z / 6 clipped to [0, 1], which puts three standard deviations at the ends.
    """

    vectors: Tensor  # [K, M, H]
    counts: Tensor  # [K, M]; the easytransfer recipe has M = 1
    center: Tensor | None  # [H]
    alpha: float
    rescale: str
    recipe: Recipe
    raw_range: tuple[float, float, float, float] = (
        0.0,
        1.0,
        0.5,
        1.0,
    )  # min, max, mean, std of raw t

    @classmethod
    def fit(
        cls,
        embedding: Tensor,
        domain: Tensor,
        label: Tensor,
        *,
        num_domains: int,
        num_classes: int,
        alpha: float = 0.5,
        rescale: str = "none",
        recipe: Recipe = PAPER,
    ) -> Prototypes:
        """Prototypes of a training corpus.

        Args:
            embedding: E(X) [N, H] of the pre-trained encoder.
            domain: [N] in 0..K-1.
            label: [N] in 0..M-1.
            num_domains: K; a domain without examples gets no prototype and drops out of every sum.
            num_classes: M.
            alpha: weight of the own domain.
            rescale: none, center, minmax or zscore.
            recipe: the paper's form, or the released one (one centroid per domain).
        """
        cells, cell_label = (
            (num_classes, label) if recipe.prototype_per_class else (1, torch.zeros_like(label))
        )
        vectors, counts = class_prototypes(
            embedding, domain, cell_label, num_domains=num_domains, num_classes=cells
        )
        center = embedding.mean(0) if rescale == "center" else None
        alpha = alpha if recipe.alpha is None else recipe.alpha
        fitted = cls(vectors, counts, center, alpha, rescale, recipe)
        raw = fitted._raw_score(embedding, domain, label)
        fitted.raw_range = (
            raw.min().item(),
            raw.max().item(),
            raw.mean().item(),
            raw.std(correction=0).item(),
        )
        return fitted

    def score(self, embedding: Tensor, domain: Tensor, label: Tensor) -> Tensor:
        """t [N] of examples with E(X) [N, H], domain [N] and gold label [N]."""
        raw = self._raw_score(embedding, domain, label)
        low, high, mean, std = self.raw_range
        if self.rescale == "minmax":
            return ((raw - low) / max(high - low, 1e-12)).clamp(0.0, 1.0)
        if self.rescale == "zscore":
            return (0.5 + (raw - mean) / (6.0 * max(std, 1e-12))).clamp(0.0, 1.0)
        return raw

    def _raw_score(self, embedding: Tensor, domain: Tensor, label: Tensor) -> Tensor:
        if not self.recipe.prototype_per_class:
            label = torch.zeros_like(label)
        if self.recipe.sum_of_cosines:
            return prototype_score(
                embedding,
                self.vectors,
                self.counts,
                domain,
                label,
                alpha=self.alpha,
                center=self.center,
            )
        return self._score_against_mean_centroid(embedding, domain)

    def _score_against_mean_centroid(self, embedding: Tensor, domain: Tensor) -> Tensor:
        centroids = self.vectors[:, 0]  # [K, H]
        if self.center is not None:
            embedding, centroids = embedding - self.center, centroids - self.center
        exists = (self.counts[:, 0] > 0).to(centroids.dtype)  # [K]
        others = exists.expand(len(centroids), -1) * (
            1 - torch.eye(len(centroids), device=exists.device)
        )
        mean_of_others = others @ centroids / others.sum(1, keepdim=True).clamp(min=1)  # [K, H]
        own = F.cosine_similarity(embedding, centroids[domain], dim=-1)
        other = F.cosine_similarity(embedding, mean_of_others[domain], dim=-1)
        return self.alpha * own + (1 - self.alpha) * other

    def save(self, folder: Path) -> None:
        """Write ``prototypes.safetensors`` and ``prototypes.json``."""
        tensors = {"vectors": self.vectors.contiguous(), "counts": self.counts.contiguous()}
        if self.center is not None:
            tensors["center"] = self.center
        save_file(tensors, folder / "prototypes.safetensors")
        meta = {"alpha": self.alpha, "rescale": self.rescale, "raw_range": self.raw_range}
        (folder / "prototypes.json").write_text(json.dumps(meta, indent=1))

    @classmethod
    def load(cls, folder: Path, recipe: Recipe = PAPER) -> Prototypes:
        """Read what ``save`` wrote."""
        tensors = load_file(folder / "prototypes.safetensors")
        meta = json.loads((folder / "prototypes.json").read_text())
        return cls(
            tensors["vectors"],
            tensors["counts"],
            tensors.get("center"),
            meta["alpha"],
            meta["rescale"],
            recipe,
            tuple(meta["raw_range"]),
        )


def describe_scores(score: Tensor, *, report: Callable[[str], None] = warnings.warn) -> dict:
    """Mean, spread and 10-bin histogram of t [N]; reports when t is nearly constant."""
    std = score.std(correction=0).item()
    if std < FLAT_SCORES:
        report(
            f"prototype scores are nearly constant (standard deviation {std:.4f} < {FLAT_SCORES}): "
            "the weighting does next to nothing; try prototypes.rescale: center, minmax or zscore"
        )
    counts, edges = torch.histogram(score.float().cpu(), bins=10)
    return {
        "mean": score.mean().item(),
        "std": std,
        "min": score.min().item(),
        "max": score.max().item(),
        "histogram": {
            "edges": [round(e, 4) for e in edges.tolist()],
            "counts": counts.int().tolist(),
        },
    }
