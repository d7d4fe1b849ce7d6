"""metakd: knowledge distillation across domains, and its losses as plain functions.

``metakd.soft_kl`` and its siblings are the functions of ``metakd.functional``; ``metakd.run``,
``metakd.compare`` and ``metakd.load_config`` are the command line's work in Python, see
``metakd.front``. They are looked up on first use, so that ``import metakd`` (and with it a command
line that refuses a wrong configuration) does not wait for torch.
"""

from importlib import import_module

__version__ = "0.2.0"

_HOME = {
    "metakd.functional": (
        "soft_kl",
        "soft_reverse_kl",
        "soft_jsd",
        "sigmoid_kl",
        "linear_soft_kl",
        "mixture_kl",
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
    ),
    "metakd.front": ("load_config", "run", "compare", "Result"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'metakd' has no attribute {name!r}")
    found = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
