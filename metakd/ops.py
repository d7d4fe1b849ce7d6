"""The contracts: which backend computes which operation, on which device, and why not.

``reference`` (eager PyTorch) implements every operation. ``cpp`` (``metakd._C``) and ``triton``
(``metakd.kernels``) are names only: they implement nothing in this version, and say so when asked
for. A backend that gains an operation gets a line in ``IMPLEMENTS``; ``auto`` then takes it in the
order of ``AUTO_ORDER``. Imports torch and ``metakd.errors``; kernels would be imported at run time
only.
"""

from __future__ import annotations

import torch

from metakd.errors import UnsupportedError

OPS = (
    "soft_kl",
    "soft_reverse_kl",
    "soft_jsd",
    "hidden_mse",
    "masked_mean",
    "attention_score_mse",
    "attention_kl",
    "attention_prob_mse",
    "relation_kl",
    "class_prototypes",
    "prototype_score",
    "domain_expertise",
)

IMPLEMENTS: dict[str, frozenset[str]] = {
    "reference": frozenset(OPS),
    "cpp": frozenset(),
    "triton": frozenset(),
}

# What "auto" tries, best first; any other device takes the reference.
AUTO_ORDER: dict[str, tuple[str, ...]] = {
    "cpu": ("cpp", "reference"),
    "cuda": ("triton", "cpp", "reference"),
}


def why_not(op: str, backend: str, device: torch.device | str) -> str | None:
    """Why ``backend`` cannot compute ``op`` on ``device``, or None if it can.

    Args:
        op: name of the operation, one of ``OPS``.
        backend: ``reference``, ``cpp`` or ``triton``.
        device: where the tensors are.

    Raises:
        ValueError: unknown ``op`` or ``backend``.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    if backend not in IMPLEMENTS:
        raise ValueError(f"backend must be one of auto, {', '.join(IMPLEMENTS)}, got {backend!r}")
    if op not in IMPLEMENTS[backend]:
        kind = torch.device(device).type
        return f"backend {backend!r} does not implement {op} in this version (device {kind})"
    return None


def select(op: str, backend: str, device: torch.device | str) -> str:
    """The backend that computes ``op`` on ``device``.

    Args:
        op: name of the operation, one of ``OPS``.
        backend: ``auto`` may choose; a name runs as asked or raises, it is never replaced silently.
        device: where the tensors are.

    Raises:
        ValueError: unknown ``op`` or ``backend``.
        UnsupportedError: the named backend cannot compute ``op`` here; the message says why.
    """
    if backend == "auto":
        order = AUTO_ORDER.get(torch.device(device).type, ("reference",))
        return next(name for name in order if why_not(op, name, device) is None)
    reason = why_not(op, backend, device)
    if reason is not None:
        raise UnsupportedError(reason, "use backend='auto' or backend='reference'")
    return backend
