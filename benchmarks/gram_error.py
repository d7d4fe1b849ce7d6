"""What the Gram form of attention_score_mse loses: ``python -m benchmarks.gram_error``.

Students at a falling distance from their teacher, float32, errors of value and gradient against
float64 by form and backend, relative to the exact value and to the largest exact gradient. Prints
the table of ``docs/results/gram-error.txt``.
"""

from __future__ import annotations

import torch

import metakd
from benchmarks.run import environment, heading
from metakd import ops

SHAPE, DISTANCES = (2, 4, 300, 32), (1.0, 0.1, 1e-2, 1e-3, 1e-4)


def errors(student, teacher, exact, **options) -> tuple[float, float]:
    """Of the value and of the gradient."""
    own = [x.float().requires_grad_() for x in student]
    loss = metakd.attention_score_mse(own, [x.float() for x in teacher], **options)
    found = [loss.detach(), *torch.autograd.grad(loss, own)]
    gaps = [(mine - right).abs().max() / right.abs().max() for mine, right in zip(found, exact)]
    return float(gaps[0]), float(max(gaps[1:]))


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    forms = {"reference, tiled": {"backend": "reference", "form": "tiled"}}
    forms["reference, gram"] = {"backend": "reference", "form": "gram"}
    for backend in ("cpp", "triton"):
        if ops.why_not("attention_score_mse", backend, device, torch.float32) is None:
            for form in ("tiled", "gram", "auto"):
                forms[f"{backend}, {form}"] = {"backend": backend, "form": form}
    print(*heading(environment(device, torch.get_num_threads())), sep="\n")
    print(f"float32, shape {list(SHAPE)} on both sides")
    print("distance: noise added to the teacher's queries and keys, of their own size 1\n")
    columns = "".join(f"{name:>22}" for name in forms)
    print(
        f"{'distance':>8} {'loss':>10}{columns}\n{'':19}" + f"{'value / gradient':>22}" * len(forms)
    )
    for distance in DISTANCES:
        teacher = [torch.randn(SHAPE, dtype=torch.float64).to(device) for _ in "qk"]
        student = [x + distance * torch.randn_like(x) for x in teacher]
        # What float32 holds of the inputs is what every form gets.
        teacher, student = ([x.float().double() for x in side] for side in (teacher, student))
        own = [x.requires_grad_() for x in student]
        loss = metakd.attention_score_mse(own, teacher, backend="reference", form="tiled")
        exact = [loss.detach(), *torch.autograd.grad(loss, own)]
        cells = [errors([x.detach() for x in own], teacher, exact, **how) for how in forms.values()]
        row = "".join(f"{value:>12.1e} /{gradient:>8.1e}" for value, gradient in cells)
        print(f"{distance:>8g} {float(exact[0]):>10.1e}{row}")


if __name__ == "__main__":
    main()
