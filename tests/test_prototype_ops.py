"""Prototypes, prototype scores and domain expertise: hand-computed cells, empty cells, refusals."""

import math
from dataclasses import replace

import pytest
import torch
from oracle import DEVICE, assert_sensitive, backend_dtypes, check_op, where_parallel
from torch.nn import functional as F

import metakd
from metakd.errors import UnsupportedError
from metakd.verify import weight_cases

EMBEDDING = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 4.0], [2.0, 2.0]], dtype=torch.float64)
DOMAIN = torch.tensor([0, 0, 1, 2])
LABEL = torch.tensor([1, 1, 1, 0])


def cells():
    return metakd.class_prototypes(EMBEDDING, DOMAIN, LABEL, num_domains=3, num_classes=2)


def score(prototypes, counts, **options):
    return metakd.prototype_score(EMBEDDING, prototypes, counts, DOMAIN, LABEL, **options)


def test_prototypes_by_hand():
    prototypes, counts = cells()
    assert counts.tolist() == [[0, 2], [0, 1], [1, 0]]
    assert prototypes.tolist() == [[[0, 0], [0.5, 0.5]], [[0, 0], [3, 4]], [[2, 2], [0, 0]]]


def test_nan_stays_in_its_cell():
    embedding = EMBEDDING.clone()
    embedding[2, 0] = math.nan
    prototypes, _ = metakd.class_prototypes(embedding, DOMAIN, LABEL, num_domains=3, num_classes=2)
    assert prototypes.isnan().nonzero().tolist() == [[1, 1, 0]]
    t = metakd.prototype_score(embedding, *cells(), DOMAIN, LABEL)
    assert t.isnan().tolist() == [False, False, True, False]


def test_score_by_hand():
    """Example 0: own cell (1, 1)/2 at 45 degrees, the only other cell of class 1 is (3, 4), cosine
    0.6."""
    t = score(*cells(), alpha=0.3)
    assert t[0].item() == pytest.approx(0.3 * math.sqrt(0.5) + 0.7 * 0.6)
    assert t[2].item() == pytest.approx(0.3 * 1.0 + 0.7 * 7 / (5 * math.sqrt(2)))
    # Example 3 is alone in its class: no other cell, and its own cosine has full weight.
    assert t[3].item() == pytest.approx(1.0)


def test_zeta_counts_only_cells_that_exist():
    """Four domains, one of them without the class: zeta is (1 - alpha) / 2, not / 3."""
    prototypes = torch.randn(4, 1, 3, dtype=torch.float64)
    counts = torch.tensor([[5], [1], [0], [2]])
    embedding = torch.randn(1, 3, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.int64)
    t = metakd.prototype_score(embedding, prototypes, counts, zero, zero, alpha=0.4)
    cosine = F.cosine_similarity(embedding, prototypes[:, 0])
    torch.testing.assert_close(t, 0.4 * cosine[:1] + 0.3 * (cosine[1] + cosine[3])[None])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_missing_own_cell_leaves_the_others_at_full_weight(alpha):
    prototypes, counts = cells()
    counts[0, 1] = 0
    assert score(prototypes, counts, alpha=alpha)[0].item() == pytest.approx(0.6)
    assert score(prototypes, torch.zeros_like(counts), alpha=alpha).eq(0).all()


def test_center_is_subtracted_from_both():
    prototypes, counts = cells()
    center = EMBEDDING.mean(0)
    shifted = metakd.prototype_score(EMBEDDING - center, prototypes - center, counts, DOMAIN, LABEL)
    torch.testing.assert_close(score(prototypes, counts, center=center), shifted)
    assert not torch.allclose(score(prototypes, counts), shifted)


def test_expertise_by_hand():
    """A sure and right teacher gives (1 + t) / 2; p = 1/2 gives (1 + t) / (exp(1/4) + 1)."""
    logits = torch.tensor([[0.0, 100.0], [3.0, 3.0]], dtype=torch.float64)
    t = torch.tensor([0.5, 0.2], dtype=torch.float64)
    weight = metakd.domain_expertise(logits, torch.tensor([1, 0]), t)
    assert weight.tolist() == pytest.approx([0.75, 1.2 / (math.exp(0.25) + 1)])


def test_gradients():
    prototypes, counts = cells()
    embedding = EMBEDDING.clone().requires_grad_()
    center = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    check = torch.autograd.gradcheck
    options = {"num_domains": 3, "num_classes": 2}
    assert check(lambda e: metakd.class_prototypes(e, DOMAIN, LABEL, **options)[0], embedding)
    prototypes = (prototypes + 0.1).requires_grad_()
    assert check(
        lambda e, p, c: metakd.prototype_score(e, p, counts, DOMAIN, LABEL, center=c),
        (embedding, prototypes, center),
    )
    logits, t = (
        torch.randn(4, 2, dtype=torch.float64),
        torch.rand(4, dtype=torch.float64, requires_grad=True),
    )
    assert check(lambda t: metakd.domain_expertise(logits, LABEL, t), t)


def test_dtypes_and_no_rows():
    prototypes, counts = metakd.class_prototypes(
        EMBEDDING.bfloat16(), DOMAIN, LABEL, num_domains=3, num_classes=2
    )
    assert prototypes.dtype == torch.float32
    t = metakd.prototype_score(EMBEDDING.half(), prototypes, counts, DOMAIN, LABEL)
    assert t.dtype == torch.float32
    none = torch.zeros(0, dtype=torch.int64)
    assert metakd.prototype_score(EMBEDDING[:0], *cells(), none, none).shape == (0,)
    empty, counts = metakd.class_prototypes(EMBEDDING[:0], none, none, num_domains=2, num_classes=2)
    assert empty.eq(0).all() and counts.eq(0).all()
    assert metakd.domain_expertise(torch.zeros(0, 2), none, torch.zeros(0)).shape == (0,)


def test_indices_are_not_read_on_a_device():
    """On CPU a wrong index raises; elsewhere looking would synchronise, so nothing is looked at."""
    embedding, index = (
        torch.empty(4, 2, device="meta"),
        torch.empty(4, dtype=torch.int64, device="meta"),
    )
    prototypes, counts = metakd.class_prototypes(
        embedding, index, index, num_domains=3, num_classes=2
    )
    t = metakd.prototype_score(embedding, prototypes, counts, index, index)
    assert metakd.domain_expertise(torch.empty(4, 2, device="meta"), index, t).shape == (4,)


REFUSALS = [
    (
        lambda: metakd.class_prototypes(EMBEDDING, DOMAIN, LABEL, num_domains=2, num_classes=2),
        r"domain .*0\.\.1, got 2",
    ),
    (
        lambda: metakd.class_prototypes(EMBEDDING, DOMAIN, LABEL - 1, num_domains=3, num_classes=2),
        "label .* got -1",
    ),
    (
        lambda: metakd.class_prototypes(EMBEDDING, DOMAIN[:3], LABEL, num_domains=3, num_classes=2),
        r"domain .*\[3\]",
    ),
    (
        lambda: metakd.class_prototypes(
            EMBEDDING, DOMAIN.int(), LABEL, num_domains=3, num_classes=2
        ),
        "domain .*int32",
    ),
    (
        lambda: metakd.class_prototypes(EMBEDDING, DOMAIN, LABEL, num_domains=0, num_classes=2),
        "num_domains .* 0",
    ),
    (lambda: score(*cells(), alpha=2.0), r"alpha .* 2\.0"),
    (lambda: score(cells()[0][..., :1], cells()[1]), r"prototypes .*\[3, 2, 1\]"),
    (lambda: score(cells()[0], cells()[1][:2]), r"counts .*\[2, 2\]"),
    (lambda: score(*cells(), center=torch.zeros(3)), r"center .*\[3\]"),
    (lambda: metakd.domain_expertise(EMBEDDING, LABEL + 1, LABEL.double()), "label .* got 2"),
    (lambda: metakd.domain_expertise(EMBEDDING, LABEL, torch.zeros(3)), r"t .*\[3\]"),
    (
        lambda: metakd.domain_expertise(EMBEDDING.clone().requires_grad_(), LABEL, LABEL.double()),
        "requires grad",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSALS)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Compiled backends

OPERATIONS = ("class_prototypes", "prototype_score", "domain_expertise")
every_dtype = pytest.mark.parametrize(("backend", "dtype"), backend_dtypes("prototype_score"))
every_backend = pytest.mark.parametrize(
    ("backend", "dtype"), backend_dtypes("prototype_score", dtypes=(torch.float32,))
)


@every_dtype
@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (50, 33, 4, 3), (300, 384, 5, 2)])
def test_every_dtype(op, backend, dtype, sizes):
    check_op(weight_cases(*sizes)[op], backend, dtype)


@pytest.mark.parametrize(
    ("backend", "dtype"), backend_dtypes("class_prototypes", ("triton",), (torch.float32,))
)
@pytest.mark.parametrize("rows", [7, 2, 50])  # a ragged last part; empty ones; one part
def test_cells_are_summed_in_parts(backend, dtype, rows, monkeypatch):
    from metakd.kernels import prototypes

    monkeypatch.setattr(prototypes, "PART_ROWS", rows)
    monkeypatch.setattr(prototypes, "MOST_SUMS", 20 * 12)
    check_op(weight_cases(50, 33, 4, 3)["class_prototypes"], backend, dtype)


@pytest.mark.parametrize("op", OPERATIONS)
def test_the_check_can_fail(op):
    case = weight_cases(40, 24, 4, 3)[op]
    if op == "prototype_score":
        case.fixed["counts"].clamp_(min=1)
    assert_sensitive(case, torch.float32)


@every_backend
def test_without_a_center(backend, dtype):
    case = weight_cases(50, 33, 4, 3)["prototype_score"]
    tensors = {name: x for name, x in case.tensors.items() if name != "center"}
    check_op(replace(case, tensors=tensors), backend, dtype)


@every_backend
def test_compiled_nan_stays_in_its_cell(backend, dtype):
    case = weight_cases(50, 33, 4, 3)["class_prototypes"].quantised(dtype).moved(DEVICE)
    domain, label = case.fixed["domain"], case.fixed["label"]
    embedding = case.tensors["embedding"]
    embedding[7, 3] = math.nan
    prototypes, counts = metakd.class_prototypes(
        embedding, domain, label, num_domains=4, num_classes=3, backend=backend
    )
    assert prototypes.isnan().nonzero().tolist() == [[int(domain[7]), int(label[7]), 3]]
    wanted = torch.bincount(domain * 3 + label, minlength=12).view(4, 3)
    assert counts.dtype == torch.int64 and torch.equal(counts, wanted)
    t = metakd.prototype_score(
        embedding, torch.ones_like(prototypes), counts, domain, label, backend=backend
    )
    assert t.isnan().nonzero().tolist() == [[7]]


@where_parallel("prototype_score")
def test_same_bits_every_time(backend, dtype):
    for op, case in weight_cases(70, 65, 3, 2).items():
        moved = case.quantised(dtype).moved(DEVICE)
        first = moved.results(backend)["rows"]
        assert all(torch.equal(moved.results(backend)["rows"], first) for _ in range(2)), op


@every_backend
def test_weights_are_constants_to_a_compiled_backend(backend, dtype):
    embedding = EMBEDDING.float().to(DEVICE).requires_grad_()
    index = DOMAIN.to(DEVICE), LABEL.to(DEVICE)
    sizes = {"num_domains": 3, "num_classes": 2}
    with pytest.raises(UnsupportedError, match=f"{backend!r} computes no gradient"):
        metakd.class_prototypes(embedding, *index, **sizes, backend=backend)
    with torch.no_grad():
        metakd.class_prototypes(embedding, *index, **sizes, backend=backend)
    assert metakd.class_prototypes(embedding, *index, **sizes)[0].requires_grad
