"""What every loss with rows must do (edges, masks, weights, dtypes, backends), and the logit and
hidden-state losses."""

import inspect
import math
import re

import numpy as np
import pytest
import torch
from losses import CASES, LENGTH, ROWS, TRITON_CASES, leaves, like, with_grad
from torch.nn import functional as F

import metakd
import metakd.functional
from metakd import ops
from metakd.errors import UnsupportedError

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
# Triton's interpreter takes seconds for an attention map.
every_case_everywhere = pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name) for name, case in CASES.items()]
    + [
        pytest.param(case, id=name, marks=[pytest.mark.deep] if case.compares_maps else [])
        for name, case in TRITON_CASES.items()
    ],
)


def gradients(loss, student):
    return torch.autograd.grad(loss, leaves(student))


# Gradients


@every_case
def test_gradcheck(case):
    student, teacher, options = case.inputs(rows=2, length=3)
    mask = case.mask(rows=2, length=3)
    mask.view(-1)[-1] = False
    inputs = [tensor.requires_grad_() for tensor in leaves(student)]
    parameters = [name for name in ("projection", "bias", "shares") if name in options]
    for name in parameters:
        options[name] = [tensor.requires_grad_() for tensor in leaves(options[name])]
        if len(options[name]) == 1:
            (options[name],) = options[name]
        inputs += leaves(options[name])

    def rows(*tensors):
        return case.run(
            like(student, list(tensors[: len(leaves(student))])),
            teacher,
            options,
            mask,
            reduction="none",
        )

    assert torch.autograd.gradcheck(rows, inputs)
    if case.backend != "cpp":  # differentiable once
        assert torch.autograd.gradgradcheck(rows, inputs, fast_mode=True)


# Edges


@every_case
def test_masked_garbage_has_no_effect_at_all(case):
    student, teacher, options = case.inputs()
    mask = case.mask()
    hidden = (0, slice(4, None)) if case.tokens else (0,)
    mask[hidden] = False

    def spoil(tensor, value):
        # tokens are the second but last dimension of what has tokens
        tensor = tensor.clone()
        tensor[0, ..., 4:, :] = value
        return tensor

    results = []
    for value in (0.0, math.nan, math.inf, -math.inf):
        if case.tokens:
            sides = [
                like(side, [spoil(x, value) for x in leaves(side)]) for side in (student, teacher)
            ]
        else:
            sides = [side.clone() for side in (student, teacher)]
            for side in sides:
                side[0] = value
        own = with_grad(sides[0])
        loss = case.run(own, sides[1], options, mask)
        results.append((loss, *gradients(loss, own)))
        for gradient in results[-1][1:]:
            assert (gradient[0, ..., 4:, :] if case.tokens else gradient[0]).eq(0).all()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    assert all(value.isfinite().all() for value in results[0])


@every_case
def test_all_masked_is_zero_with_zero_gradients(case):
    student, teacher, options = case.inputs()
    own = with_grad(student)
    for mask in (case.mask(False), case.mask(False).long()):
        loss = case.run(own, teacher, options, mask)
        assert loss.item() == 0.0
        assert all(gradient.eq(0).all() for gradient in gradients(loss, own))


@every_case
def test_no_rows_is_zero_with_empty_gradients(case):
    student, teacher, options = case.inputs(rows=0)
    own = with_grad(student)
    for mask in (None, case.mask(rows=0)):
        loss = case.run(own, teacher, options, mask)
        assert loss.item() == 0.0
        for tensor, gradient in zip(leaves(own), gradients(loss, own)):
            assert gradient.shape == tensor.shape


@every_case
def test_nan_in_a_real_row_is_never_dropped(case):
    for side in (0, 1):
        inputs = case.inputs()
        leaves(inputs[side])[-1][1].view(-1)[0] = math.nan
        rows = case.run(*inputs, case.mask(), reduction="none")
        assert rows.isnan().tolist() == [False, True, False]


# Cases without tokens have nothing to pad, and mean_over="all" counts padding by definition.
PADDED = [
    name
    for name, case in CASES.items()
    if case.tokens and not name.startswith(("score all", "prob heads"))
]


@pytest.mark.parametrize("name", PADDED)
def test_padding_changes_nothing(name):
    case = CASES[name]
    student, teacher, options = case.inputs()
    mask = case.mask()
    mask[:, 4:] = False
    short = [like(side, [x[..., :4, :] for x in leaves(side)]) for side in (student, teacher)]
    torch.testing.assert_close(case.run(*short, options), case.run(student, teacher, options, mask))


# Rows, weights and reductions


@every_case
def test_mean_divides_by_rows_not_by_weights(case):
    inputs = case.inputs()
    own = with_grad(inputs[0])
    mask = case.mask()
    mask[1] = False
    weight = torch.tensor([0.5, math.nan, 3.0], dtype=torch.float64)
    rows = case.run(*inputs, mask, reduction="none")
    assert rows.shape == (ROWS,) and rows[1] == 0
    weighted = 0.5 * rows[0] + 3.0 * rows[2]
    loss = case.run(own, *inputs[1:], mask, weight=weight)
    torch.testing.assert_close(loss, weighted / 2)
    assert all(gradient.isfinite().all() for gradient in gradients(loss, own))
    torch.testing.assert_close(case.run(*inputs, mask, weight=weight, reduction="sum"), weighted)
    torch.testing.assert_close(case.run(*inputs), case.run(*inputs, reduction="none").mean())


@every_case
def test_permuted_weights_change_the_gradient(case):
    student, teacher, options = case.inputs()
    own, results = with_grad(student), []
    for order in ([0, 1, 2], [2, 0, 1]):
        weight = torch.tensor([0.1, 1.0, 2.0], dtype=torch.float64)[order]
        results.append(gradients(case.run(own, teacher, options, weight=weight), own))
    assert not any(torch.allclose(a, b) for a, b in zip(*results))


@every_case_everywhere
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_a_weight_of_zero_leaves_a_row_out(case, masked):
    """Its infinite loss too, of which zero times is NaN; a mean still counts it."""
    student, teacher, options = case.inputs()
    mask = case.mask()
    mask[2] = not masked
    weight = torch.tensor([2.0, 0.0, 0.5], dtype=case.dtype)
    hidden = mask.clone()
    hidden[1] = False
    wanted = case.run(student, teacher, options, hidden, weight=weight, reduction="none")
    learned = [x.requires_grad_() for x in leaves(options.get("projection", ()))]
    for value in (math.nan, math.inf, -math.inf)[: 1 if case.backend == "triton" else 3]:
        for tensor in (*leaves(student), *leaves(teacher)):
            tensor[1] = value
        own = with_grad(student)
        given = mask if masked else None
        rows = case.run(own, teacher, options, given, weight=weight, reduction="none")
        torch.testing.assert_close(rows, wanted)
        found = torch.autograd.grad(rows.sum(), [*leaves(own), *learned])
        assert all(gradient.isfinite().all() for gradient in found)
        assert all(gradient[1].eq(0).all() for gradient in found[: len(leaves(own))])
    loss = case.run(student, teacher, options, given, weight=weight)
    torch.testing.assert_close(loss, wanted.sum() / (2 if masked else 3))


def test_a_weight_that_learns_gets_the_rows_loss():
    student, teacher, options = CASES["soft_kl"].inputs()
    rows = metakd.soft_kl(student, teacher, reduction="none", **options)
    weight = torch.zeros(ROWS, dtype=torch.float64, requires_grad=True)
    loss = metakd.soft_kl(student, teacher, weight=weight, reduction="sum", **options)
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], rows)


@every_case_everywhere
def test_sums_of_uneven_parts_are_the_mean_of_the_whole(case):
    """Divided by the rows that are not masked, whose number everyone can count."""
    student, teacher, options = case.inputs(rows=4)
    mask = case.mask(rows=4)
    if case.tokens:
        mask[:, 4:], mask[3, 1:] = False, False
    mask[2] = False
    weight = torch.tensor([0.2, 1.0, 3.0, 4.0], dtype=case.dtype)
    whole = with_grad(student)
    mean = case.run(whole, teacher, options, mask, weight=weight)
    mean.backward()
    count = (mask.any(1) if case.tokens else mask).sum()
    assert count == 3
    own, sums = with_grad(student), []
    for part in (slice(0, 1), slice(1, 4)):
        sides = [like(side, [x[part] for x in leaves(side)]) for side in (own, teacher)]
        shares = {name: options[name][part] for name in ("shares",) if name in options}
        given = {"weight": weight[part], "reduction": "sum"}
        loss = case.run(*sides, options | shares, mask[part], **given) / count
        loss.backward()
        sums.append(loss.detach())
    torch.testing.assert_close(sum(sums), mean.detach(), rtol=1e-6, atol=0.0)
    for found, wanted in zip(leaves(own), leaves(whole)):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-6, atol=1e-7)


# Integers and numbers

REST = {
    "linear_soft_kl": lambda **extra: metakd.linear_soft_kl(
        torch.zeros(3, 4), torch.zeros(5, 4), torch.zeros(3, 5), divergence="jsd", **extra
    ),
    "class_prototypes": lambda **extra: metakd.class_prototypes(
        *(torch.zeros(3, 4), torch.zeros(3).long(), torch.zeros(3).long()),
        **{"num_domains": 2, "num_classes": 2, **extra},
    ),
    "prototype_score": lambda **extra: metakd.prototype_score(
        *(torch.zeros(3, 4), torch.zeros(2, 2, 4), torch.ones(2, 2).long()),
        *(torch.zeros(3).long(), torch.zeros(3).long()),
        **extra,
    ),
    "attention_score_norm": lambda **extra: metakd.attention_score_norm(
        torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), **extra
    ),
}


def called(loss, **extra):
    """The loss on small inputs that suit it, with these arguments."""
    if loss in REST:
        return REST[loss](**extra)
    case = next(case for case in CASES.values() if case.loss == loss)
    student, teacher, options = case.inputs()
    return case.run(student, teacher, options | extra)


def arguments(kind):
    """Of all losses, those that are of this kind by their annotation."""
    return [
        (loss, name)
        for loss in metakd.functional.__all__
        for name, parameter in inspect.signature(getattr(metakd, loss)).parameters.items()
        if parameter.annotation in (kind, f"{kind} | None")
    ]


@pytest.mark.parametrize(("loss", "name"), arguments("int"))
def test_an_integer_is_one(loss, name):
    # Gram matrices know no window.
    form = {"form": "tiled"} if (loss, name) == ("attention_score_mse", "window") else {}
    called(loss, **form, **{name: 1})
    called(loss, **form, **{name: np.int64(1)})
    for value in (True, 1.0, "1", torch.tensor(1)):
        with pytest.raises(
            ValueError, match=rf"{name} must be an integer.*{re.escape(str(value))}"
        ):
            called(loss, **form, **{name: value})
    least = {"ignore_index": None, "window": 0}.get(name, 1)
    if least is not None:
        with pytest.raises(ValueError, match=f"{name} must be an integer.* got {least - 1}"):
            called(loss, **form, **{name: least - 1})


@pytest.mark.parametrize(("loss", "name"), arguments("float"))
def test_a_number_is_no_boolean(loss, name):
    labels = {"label": torch.zeros(3).long()} if name == "hard_weight" else {}
    called(loss, **labels, **{name: 0.5})
    with pytest.raises(ValueError, match=rf"{name} must be .*, got True"):
        called(loss, **labels, **{name: True})


# Dtypes, devices, backends


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_is_computed_in_float32(case, dtype):
    student, _, options = case.inputs(dtype=dtype)
    if "projection" in options:
        pytest.skip("a projection runs in the dtype of the student, as a linear layer does")
    teacher = case.inputs(dtype=torch.float32, seed=1)[1]
    own = with_grad(student)
    rows = case.run(own, teacher, options, reduction="none")
    exact = with_grad(like(student, [x.float() for x in leaves(student)]))
    expected = case.run(exact, teacher, options, reduction="none")
    assert rows.dtype == torch.float32 and torch.equal(rows, expected)
    for mine, wanted in zip(gradients(rows.sum(), own), gradients(expected.sum(), exact)):
        assert mine.dtype == dtype and torch.equal(mine, wanted.to(dtype))


@every_case
def test_autocast_has_no_say(case):
    inputs = case.inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = case.run(*inputs)
    assert torch.equal(inside, case.run(*inputs))


@every_case
def test_strides_do_not_matter(case):
    student, teacher, options = case.inputs()
    turned = [
        like(side, [x.mT.contiguous().mT for x in leaves(side)]) for side in (student, teacher)
    ]
    torch.testing.assert_close(case.run(*turned, options), case.run(student, teacher, options))


@every_case
def test_nothing_synchronises_with_the_host(case):
    """Tensors on the meta device have no values: reading one on the host raises."""
    if case.backend == "cpp":
        pytest.skip("C++ has no kernels for the meta device")

    def meta(value):
        if isinstance(value, torch.Tensor):
            return value.to("meta")
        return like(value, [meta(x) for x in value]) if isinstance(value, (list, tuple)) else value

    student, teacher, options = case.inputs()
    own = with_grad(meta(student))
    options = {name: meta(value) for name, value in options.items()}
    loss = case.run(own, meta(teacher), options, meta(case.mask()), weight=meta(torch.ones(ROWS)))
    assert loss.device.type == "meta" and len(gradients(loss, own)) == len(leaves(own))


def _compares_mean_maps(case, student, teacher):
    maps = case.loss in ("attention_kl", "attention_prob_mse")
    return maps and student[0].shape[1] != teacher[0].shape[1]


@every_case
def test_backends_are_never_replaced_silently(case):
    inputs = case.inputs()
    for backend in ops.IMPLEMENTS:
        reason = ops.why_not(case.op, backend, "cpu", torch.float64)
        if reason is not None:
            with pytest.raises(UnsupportedError, match=re.escape(reason)):
                case.run(*inputs, backend=backend)
        elif backend in ops.NAMESPACES and _compares_mean_maps(case, *inputs[:2]):
            with pytest.raises(UnsupportedError, match=r"differ in number"):
                case.run(*inputs, backend=backend)
        else:
            torch.testing.assert_close(case.run(*inputs, backend=backend), case.run(*inputs))
    with pytest.raises(ValueError, match=r"backend .*'cuda'"):
        case.run(*inputs, backend="cuda")


def test_backend_table():
    assert ops.select("soft_kl", "auto", "meta") == "eager"
    assert ops.select("masked_mean", "auto", "meta") == "reference"
    assert ops.why_not("soft_kl", "reference", "cpu") is None
    assert "'eager' does not implement masked_mean" in ops.why_not("masked_mean", "eager", "cpu")
    assert "does not implement" in ops.why_not("masked_mean", "cpp", "cuda")
    assert ops.why_not("attention_kl", "reference", "cpu", head=129) is None
    if ops.why_not("attention_kl", "triton", "cpu", head=128) is None:
        assert "up to 128 wide" in ops.why_not("attention_kl", "triton", "cpu", head=129)
    with pytest.raises(ValueError, match="'soft_k'"):
        ops.why_not("soft_k", "reference", "cpu")
    assert {*ops.OPS, "attention_score_norm", "sigmoid_kl"} == set(metakd.functional.__all__)
    assert set(metakd.functional.__all__) < set(metakd.__all__)


@every_case
def test_refusals_common_to_all(case):
    student, teacher, options = case.inputs()
    with pytest.raises(ValueError, match=r"teacher.* requires grad"):
        case.run(student, with_grad(teacher), options)
    with pytest.raises(ValueError, match=r"reduction .*'average'"):
        case.run(student, teacher, options, reduction="average")
    with pytest.raises(ValueError, match=r"weight .*\[2\]"):
        case.run(student, teacher, options, weight=torch.ones(2))
    with pytest.raises(ValueError, match=r"mask must be boolean or integer.*float32"):
        case.run(student, teacher, options, case.mask().float())
    with pytest.raises(
        ValueError, match=r"mask must have shape .*\[3, 6, 1\]|mask must have shape .*\[3, 1\]"
    ):
        case.run(student, teacher, options, case.mask()[..., None])
    with pytest.raises(ValueError, match="int64"):
        case.run(like(student, [x.long() for x in leaves(student)]), teacher, options)
    with pytest.raises(ValueError, match=r"teacher.* on cpu .*meta"):
        case.run(student, like(teacher, [x.to("meta") for x in leaves(teacher)]), options)


# Logits

KL_P_Q = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
KL_Q_P = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
KL_P_M = 0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375)
KL_Q_M = 0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [("soft_kl", KL_P_Q), ("soft_reverse_kl", KL_Q_P), ("soft_jsd", (KL_P_M + KL_Q_M) / 2)],
)
def test_logits_by_hand(loss, expected):
    """Teacher (3/4, 1/4), student (1/2, 1/2), at temperature 1 and, scaled up, at 4."""
    student = torch.tensor([[2.0, 2.0]], dtype=torch.float64)
    teacher = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    compute = getattr(metakd, loss)
    assert compute(student, teacher).item() == pytest.approx(expected)
    scaled = compute(4 * student, 4 * teacher, temperature=4.0)
    assert scaled.item() == pytest.approx(16 * expected)
    plain = compute(4 * student, 4 * teacher, temperature=4.0, scale_by_temperature=False)
    assert plain.item() == pytest.approx(expected)


def test_soft_kl_is_pytorchs():
    student, teacher = torch.randn(4, 3, 7), torch.randn(4, 3, 7)
    expected = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)
    rows = metakd.soft_kl(student, teacher, reduction="none")
    assert rows.shape == (4, 3)
    torch.testing.assert_close(rows, expected)


LOGIT_LOSSES = [("soft_kl", {}), ("soft_reverse_kl", {}), ("soft_jsd", {"beta": 0.2})]


@pytest.mark.parametrize(("loss", "options"), LOGIT_LOSSES)
def test_masked_classes_give_the_exact_limit(loss, options):
    """-inf on both sides is the same as leaving the class out, in value and gradient."""
    compute = getattr(metakd, loss)
    student = torch.randn(3, 4, dtype=torch.float64)
    teacher = torch.randn(3, 4, dtype=torch.float64)
    wall = torch.full((3, 2), -math.inf, dtype=torch.float64)
    short = student.clone().requires_grad_()
    long = torch.cat([student, wall], 1).requires_grad_()
    expected = compute(short, teacher, temperature=2.0, **options)
    value = compute(long, torch.cat([teacher, wall], 1), temperature=2.0, **options)
    torch.testing.assert_close(value, expected, rtol=1e-14, atol=0.0)
    (gradient,) = torch.autograd.grad(value, long)
    assert gradient[:, 4:].eq(0).all()
    torch.testing.assert_close(gradient[:, :4], torch.autograd.grad(expected, short)[0])


@pytest.mark.parametrize(("loss", "options"), LOGIT_LOSSES)
def test_one_sided_minus_infinity(loss, options):
    """A class only the side that weighs it lacks: finite where the limit is, infinite where it is
    not."""
    compute = getattr(metakd, loss)
    open_, shut = torch.zeros(1, 2), torch.tensor([[0.0, -math.inf]])
    for student, teacher in ((open_, shut), (shut, open_)):
        student = student.clone().requires_grad_()
        value = compute(student, teacher, **options)
        infinite = {"soft_kl": teacher is open_, "soft_reverse_kl": teacher is shut}.get(
            loss, False
        )
        assert value.isinf() if infinite else value.isfinite()
        if not infinite:
            assert torch.autograd.grad(value, student)[0].isfinite().all()


@pytest.mark.parametrize("temperature", [0.05, 20.0])
@pytest.mark.parametrize(("loss", "options"), LOGIT_LOSSES)
def test_outliers_stay_finite(loss, options, temperature):
    student = (40 * torch.randn(8, 9)).requires_grad_()
    value = getattr(metakd, loss)(
        student, 40 * torch.randn(8, 9), temperature=temperature, **options
    )
    assert value.isfinite() and torch.autograd.grad(value, student)[0].isfinite().all()


def shared(teachers, shares, student=((3.0, 1.0),), **options):
    """Rows and gradients of ``mixture_kl``, of odds."""
    own, told, heard = (
        torch.tensor(values, dtype=torch.float64) for values in (student, teachers, shares)
    )
    own, heard = own.log().requires_grad_(), heard.requires_grad_()
    rows = metakd.mixture_kl(own, told.log(), heard, reduction="none", **options)
    return rows, *torch.autograd.grad(rows.sum(), (own, heard))


def test_a_mixture_by_hand():
    """Teachers (3/4, 1/4) and (1/4, 3/4) of two classes, student (3/4, 1/4)."""
    teachers = [[[3.0, 1.0], [1.0, 3.0]]]
    rows, by_student, by_share = shared(teachers, [[0.5, 0.5]])
    assert rows.item() == pytest.approx(KL_Q_P)  # of (1/2, 1/2)
    # q - p, and sum_c p_mc (log p_c - log q_c + 1).
    assert by_student[0].tolist() == pytest.approx([0.25, -0.25])
    logs = math.log(0.5 / 0.75) + 1, math.log(0.5 / 0.25) + 1
    each = [0.75 * logs[0] + 0.25 * logs[1], 0.25 * logs[0] + 0.75 * logs[1]]
    assert by_share[0].tolist() == pytest.approx(each)
    # Odds to the power of 4, softened by 4, are these again.
    hot = [[[81.0, 1.0], [1.0, 81.0]]]
    scaled = shared(hot, [[0.5, 0.5]], [[81.0, 1.0]], temperature=4.0)
    assert scaled[0].item() == pytest.approx(16 * KL_Q_P)
    assert scaled[1][0].tolist() == pytest.approx([1.0, -1.0])


def test_a_mixture_is_not_the_mean_of_logits():
    """Of teachers that are sure of different classes it has two, and that mean a third."""
    teachers = torch.tensor([[[9.0, 0.0, 8.0], [0.0, 9.0, 8.0]]])
    shares = torch.tensor([[0.5, 0.5]])
    mixed = teachers.softmax(-1).mean(1).log()
    assert metakd.mixture_kl(mixed, teachers, shares).item() == pytest.approx(0.0, abs=1e-6)
    assert mixed.argmax() != 2 and teachers.mean(1).argmax() == 2
    one = torch.tensor([[0.0, 1.0]])
    student = torch.randn(1, 3)
    alone = metakd.mixture_kl(student, teachers, one)
    torch.testing.assert_close(alone, metakd.soft_kl(student, teachers[:, 1]))


def test_who_is_not_heard_in_a_mixture_and_classes_that_nobody_has():
    """A share of 0 and classes without mass, on one side and on both: finite, gradients too."""
    for share in (0.0, 1e-40):
        rows, *gradients = shared([[[3.0, 1.0, 0.0], [0.0, 4.0, 0.0]]], [[1 - share, share]],
                                  [[2.0, 2.0, 0.0]])  # fmt: skip
        assert rows.item() == pytest.approx(KL_P_Q)
        assert all(gradient.isfinite().all() for gradient in gradients)
    rows, *_ = shared([[[3.0, 1.0], [1.0, 1.0]]], [[0.5, 0.5]], [[1.0, 0.0]])
    assert rows.isinf().all()


def test_masked_shares_have_no_effect():
    shares = torch.tensor([[0.5, 0.5], [math.nan, math.inf]], requires_grad=True)
    student, teachers = torch.randn(2, 3), torch.randn(2, 2, 3)
    loss = metakd.mixture_kl(student, teachers, shares, mask=torch.tensor([True, False]))
    torch.testing.assert_close(loss, metakd.mixture_kl(student[:1], teachers[:1], shares[:1]))
    assert torch.autograd.grad(loss, shares)[0].isfinite().all()


@pytest.mark.parametrize(
    ("teacher", "shares", "message"),
    [
        ((2, 4), (2, 1), r"teacher must have shape \[2, M, 3\]"),
        ((2, 2, 4), (2, 2), r"teacher must have shape \[2, M, 3\]"),
        ((2, 0, 3), (2, 0), "teacher must have M >= 1"),
        ((2, 2, 3), (2, 3), r"shares must have shape \[2, 2\], got \[2, 3\]"),
    ],
)
def test_mixture_refusals(teacher, shares, message):
    with pytest.raises(ValueError, match=message):
        metakd.mixture_kl(torch.zeros(2, 3), torch.zeros(teacher), torch.zeros(shares))


def test_jsd_limits():
    student = torch.randn(5, 6, dtype=torch.float64)
    teacher = torch.randn(5, 6, dtype=torch.float64)
    forward, reverse = metakd.soft_kl(student, teacher), metakd.soft_reverse_kl(student, teacher)
    assert metakd.soft_jsd(student, teacher, beta=0.0) == forward
    assert metakd.soft_jsd(student, teacher, beta=1.0) == reverse
    small = 1e-6
    near_forward = metakd.soft_jsd(student, teacher, beta=small) / small
    near_reverse = metakd.soft_jsd(student, teacher, beta=1 - small) / small
    torch.testing.assert_close(near_forward, forward, rtol=1e-4, atol=0.0)
    torch.testing.assert_close(near_reverse, reverse, rtol=1e-4, atol=0.0)
    swapped = metakd.soft_jsd(teacher, student, beta=0.7)
    torch.testing.assert_close(metakd.soft_jsd(student, teacher, beta=0.3), swapped)


@pytest.mark.parametrize(
    ("loss", "student", "options", "message"),
    [
        ("soft_kl", (2, 3), {"temperature": 0.0}, r"temperature .* 0\.0"),
        ("soft_kl", (2, 3), {"temperature": math.nan}, "temperature .* nan"),
        ("soft_kl", (2, 3), {"temperature": "2"}, "temperature .* '2'"),
        ("soft_jsd", (2, 3), {"beta": 1.5}, r"beta .* 1\.5"),
        ("soft_kl", (3,), {}, r"student .*\[3\]"),
        ("soft_kl", (2, 0), {}, r"student .*\[2, 0\]"),
        ("soft_kl", (2, 4), {}, r"vocab_size is needed .*\(4, 3\)"),
        ("soft_kl", (3, 3), {}, r"teacher .*\[3, C\].*\[2, 3\]"),
    ],
)
def test_logit_refusals(loss, student, options, message):
    with pytest.raises(ValueError, match=message):
        getattr(metakd, loss)(torch.zeros(student), torch.zeros(2, 3), **options)


# Hidden states


def test_hidden_mse_by_hand():
    """Two layers, second token of the second example masked: ((1 + 4) / 2 + 0.25, 9 + 0.25)."""
    student = torch.tensor([[[0.0], [0.0]], [[0.0], [50.0]]])
    teacher = torch.tensor([[[1.0], [2.0]], [[3.0], [9.0]]])
    mask = torch.tensor([[1, 1], [1, 0]])
    layers = [student, student + 0.5], [teacher, student]
    rows = metakd.hidden_mse(*layers, mask=mask, reduction="none")
    assert rows.tolist() == [2.75, 9.25]


def test_hidden_mse_projects_the_student():
    student, teacher = torch.randn(2, LENGTH, 3), torch.randn(2, LENGTH, 5)
    projection, bias = torch.randn(3, 5), torch.randn(5)
    loss = metakd.hidden_mse(student, teacher, projection=projection, bias=bias)
    torch.testing.assert_close(loss, F.mse_loss(student @ projection + bias, teacher))


def test_masked_tokens_leave_projection_and_bias_alone():
    projection = torch.randn(3, 5, requires_grad=True)
    bias = torch.randn(5, requires_grad=True)
    student = torch.full((2, 4, 3), math.nan)
    loss = metakd.hidden_mse(
        student,
        torch.randn(2, 4, 5),
        projection=projection,
        bias=bias,
        mask=torch.zeros(2, 4, dtype=torch.bool),
    )
    assert all(gradient.eq(0).all() for gradient in torch.autograd.grad(loss, (projection, bias)))


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        ([], [], {}, "student .* got 0"),
        ([(2, 4, 3)], [(2, 4, 3)] * 2, {}, r"teacher .*\(1\), got 2"),
        ([(2, 4, 3)], [(2, 4, 5)], {}, r"projection .*\(3, 5\)"),
        ([(2, 4, 3)], [(2, 4, 5)], {"projection": (5, 3)}, r"projection\[0\] .*\[3, 5\].*\[5, 3\]"),
        ([(2, 4, 3)], [(2, 4, 3)], {"bias": (4,)}, r"bias\[0\] .*\[3\].*\[4\]"),
        ([(2, 4, 3), (2, 5, 3)], [(2, 4, 3)] * 2, {}, r"student\[1\] .*\[2, 5, 3\]"),
        ([(2, 4, 3)], [(2, 3)], {}, r"teacher\[0\] .*\[2, 3\]"),
    ],
)
def test_hidden_refusals(student, teacher, options, message):
    sides = [[torch.zeros(shape) for shape in side] for side in (student, teacher)]
    with pytest.raises(ValueError, match=message):
        metakd.hidden_mse(*sides, **{name: torch.zeros(shape) for name, shape in options.items()})


def test_masked_mean():
    hidden = torch.tensor([[[1.0], [3.0], [math.nan]], [[5.0], [6.0], [7.0]]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    mean = metakd.masked_mean(hidden, mask)
    assert mean.tolist() == [[2.0], [0.0]]
    (gradient,) = torch.autograd.grad(mean.sum(), hidden)
    assert gradient.squeeze(-1).tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]
    assert metakd.masked_mean(hidden.bfloat16(), mask).dtype == torch.bfloat16
    assert metakd.masked_mean(hidden, mask.bool() | True).isnan().tolist() == [[True], [False]]
    double = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda states: metakd.masked_mean(states, mask), double)
    with pytest.raises(ValueError, match=r"mask .*\[2, 3\].*\[2, 2\]"):
        metakd.masked_mean(hidden, mask[:, :2])
