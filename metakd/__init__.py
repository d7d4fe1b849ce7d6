"""metakd: knowledge distillation across domains, and its losses as plain functions.

``metakd.soft_kl`` and its siblings are the functions of ``metakd.functional``. They are looked up
on first use, so that ``import metakd`` (and with it a command line that refuses a wrong
configuration) does not wait for torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_LOSSES = (
    "soft_kl",
    "soft_reverse_kl",
    "soft_jsd",
    "linear_soft_kl",
    "hidden_mse",
    "masked_mean",
    "attention_score_mse",
    "attention_score_norm",
    "attention_kl",
    "attention_prob_mse",
    "relation_kl",
    "class_prototypes",
    "prototype_score",
    "domain_expertise",
)

__all__ = ["__version__", *_LOSSES]


def __getattr__(name: str):
    if name in _LOSSES:
        return getattr(import_module("metakd.functional"), name)
    raise AttributeError(f"module 'metakd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LOSSES})
