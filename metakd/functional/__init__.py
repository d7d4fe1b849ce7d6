"""The door: one documented function per loss. It checks, picks a backend, and reduces.

Every loss is computed as **rows** (one value per token or example) before anything else happens to
it; weights, masks and the reduction are ordinary PyTorch above the rows, so that a weight per
example reaches every term. Common to all:

- ``student`` and ``teacher`` may differ in floating dtype. Half precision is computed in float32,
  doubles stay double; autocast has no say inside. A teacher that requires grad is refused.
- Masks are boolean or integer, True or non-zero = real. A masked row or token has exactly zero
  effect, whatever it holds. A NaN in a real one gives NaN.
- A weight of 0 leaves a row out, gradient included, whatever it holds. A weight that requires grad
  keeps it, because its own gradient is the row's loss.
- ``reduction="mean"`` divides the sum of weighted rows by the **number of rows that are not
  masked** (at least 1), not by the sum of the weights: rows of weight 0 are counted. An example
  without a single real token is a masked row. No rows at all give 0.0.
- The mean of a batch is not the mean of its parts' means. Under gradient accumulation use
  ``reduction="sum"`` and divide by the rows of the whole step: tokens for the logit losses,
  examples for the others; docs/losses.md counts them for each loss.
- ``backend``: ``auto`` may choose; an explicit name runs as asked or raises ``UnsupportedError``
  with the reason.
- Nothing synchronises with the host: indices out of range raise for CPU tensors only, where looking
  is free.

One module per family: ``logits`` (whose way to the backends is ``soft``), ``hidden``,
``attention``, ``prototypes``; what they share is in ``checks``. They import torch, ``metakd.ops``
and ``metakd.reference``. Sizes: N rows, C classes, B batch, L length, H hidden size, A heads, D
head size, K domains, M classes of the task.
"""

from metakd.functional.attention import (
    attention_kl,
    attention_prob_mse,
    attention_score_mse,
    attention_score_norm,
    relation_kl,
)
from metakd.functional.hidden import hidden_mse, masked_mean
from metakd.functional.logits import (
    linear_soft_kl,
    mixture_kl,
    sigmoid_kl,
    soft_jsd,
    soft_kl,
    soft_reverse_kl,
)
from metakd.functional.prototypes import class_prototypes, domain_expertise, prototype_score

__all__ = [
    "attention_kl",
    "attention_prob_mse",
    "attention_score_mse",
    "attention_score_norm",
    "class_prototypes",
    "domain_expertise",
    "hidden_mse",
    "linear_soft_kl",
    "masked_mean",
    "mixture_kl",
    "prototype_score",
    "relation_kl",
    "sigmoid_kl",
    "soft_jsd",
    "soft_kl",
    "soft_reverse_kl",
]
