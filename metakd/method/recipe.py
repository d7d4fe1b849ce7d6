"""The two readings of the method: the paper's form, and the one that was released as EasyTransfer.

The released code departs from the paper in a dozen places. Each is a field here, so that the rest
of the package asks a named question ("is lambda on L_TKD?") and never which release it imitates.
Imports nothing of metakd.
"""

from __future__ import annotations

from dataclasses import dataclass

# Under this spread the scores are one constant for practical purposes, and t weights nothing.
FLAT_SCORES = 0.01


@dataclass(frozen=True)
class Recipe:
    """One field per place where the paper and the released code differ."""

    prototype_per_class: bool  # p[k, m], or one centroid per domain
    sum_of_cosines: bool  # other domains: sum of cosines, or cosine to the mean of their centroids
    alpha: float | None  # fixed by the release; None: from the config
    pooling: str  # see taps.pool
    score_weighs_domain_loss: bool  # t on CE + gamma1 L_DA, or on CE alone
    domain_loss: bool  # is L_DA trained at all
    false_label_always_false: bool  # or an in-batch permutation of the true ones
    tanh_on_transfer: bool  # L_TKD compares h_d after its tanh, or before it
    shared_projection: bool  # one projection for embeddings, hidden states and h_d
    attention_mean: str  # divisor of attention_score_mse: "real" tokens, or "all" positions
    expertise_on_transfer: bool  # lambda on L_TKD
    expertise_on_prediction_stage: bool  # lambda in the second of two stages
    classical_prediction: bool  # temperature T and T^2; or T = 1, divided by the number of classes
    teacher_dropout: bool  # the release left the teacher in training mode


PAPER = Recipe(
    prototype_per_class=True,
    sum_of_cosines=True,
    alpha=None,
    pooling="masked_mean",
    score_weighs_domain_loss=False,
    domain_loss=True,
    false_label_always_false=True,
    tanh_on_transfer=True,
    shared_projection=False,
    attention_mean="real",
    expertise_on_transfer=True,
    expertise_on_prediction_stage=True,
    classical_prediction=True,
    teacher_dropout=False,
)

EASYTRANSFER = Recipe(
    prototype_per_class=False,
    sum_of_cosines=False,
    alpha=0.5,
    pooling="all_but_first",
    score_weighs_domain_loss=True,
    domain_loss=False,
    false_label_always_false=False,
    tanh_on_transfer=False,
    shared_projection=True,
    attention_mean="all",
    expertise_on_transfer=False,
    expertise_on_prediction_stage=False,
    classical_prediction=False,
    teacher_dropout=True,
)

RECIPES = {"paper": PAPER, "easytransfer": EASYTRANSFER}
