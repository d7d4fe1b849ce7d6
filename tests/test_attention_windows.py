"""Attention losses under a sliding window: every backend against whole masked maps in float64, and
what a window may not change."""

import itertools
import math
import time

import pytest
import torch
from features import learning, poison, states, step  # noqa: F401
from oracle import DEVICE, backend_dtypes, check_op

import metakd
from metakd import reference
from metakd.verify import attention_case

LOSSES = ("attention_score_mse", "attention_kl", "attention_prob_mse")
every_loss = pytest.mark.parametrize("loss", LOSSES)
every_backend = pytest.mark.parametrize(
    ("backend", "dtype"),
    backend_dtypes("attention_kl", ("reference", "cpp", "triton"), (torch.float32,)),
)


def whole_maps(loss, student, teacher, window, causal=False, query_mask=None, key_mask=None):
    """Rows of a loss as anyone would write it, over whole maps of float64."""
    _, _, length, _ = student[0].shape
    place = torch.arange(length, device=DEVICE)
    gap = place[:, None] - place
    seen = (gap <= window) & (gap >= (0 if causal else -window))
    seen = seen.expand(len(student[0]), 1, -1, -1)
    if query_mask is not None:
        seen = seen & query_mask[:, None, :, None]
    if key_mask is not None:
        seen = seen & key_mask[:, None, None, :]
    scores = [
        (q.double() @ k.double().mT * q.shape[-1] ** -0.5).masked_fill(~seen, 0.0)
        for q, k in (student, teacher)
    ]
    if loss == "attention_score_mse":
        if student[0].shape[1] != teacher[0].shape[1]:
            scores = [s.mean(1, keepdim=True) for s in scores]
        gaps, counted = (scores[0] - scores[1]).square(), seen
    else:
        maps = [s.masked_fill(~seen, -1e30).softmax(-1).masked_fill(~seen, 0.0) for s in scores]
        if student[0].shape[1] != teacher[0].shape[1]:
            maps = [m.mean(1, keepdim=True) for m in maps]
        gaps, counted = (maps[0] - maps[1]).square(), seen
        if loss == "attention_kl":
            logs = [m.masked_fill(~seen, 1.0).log() for m in maps]
            gaps, counted = maps[1] * (logs[1] - logs[0]), seen.any(-1)
    return gaps.sum((1, 2, 3)) / (gaps.shape[1] * counted.flatten(1).sum(1).clamp(min=1))


def assert_as_whole_maps(loss, student, teacher, backend, window, causal, masks):
    given = {"window": window, "causal": causal, **masks}
    found = step(getattr(metakd, loss), student, teacher, backend=backend, **given)

    def wanted(own, taught, reduction, **options):
        return whole_maps(loss, own, taught, **options)

    for mine, expected in zip(found, step(wanted, student, teacher, **given), strict=True):
        size = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(
            mine.double(), expected.double(), rtol=1e-5, atol=1e-5 * size + 1e-9, msg=str(given)
        )


def masks_of(kind, length):
    """Of two examples. Far apart: real queries that see keys in different places."""
    place = torch.arange(length, device=DEVICE)
    short = torch.tensor([[length], [max(1, 2 * length // 3)]], device=DEVICE)
    both = {
        "right padding": place < short,
        "left padding": place >= length - short,
        "far apart": place % 29 == 0,
    }
    if kind == "none":
        return {}
    keys = (place % 3 != 1) if kind == "far apart" else both[kind]
    return {"query_mask": both[kind].expand(2, length), "key_mask": keys.expand(2, length)}


# (L, window): around a vector, a panel (32) and a block of queries (48) of C++; the last one is
# longer than what a block takes of queries far apart.
SIZES = [(1, 0), (2, 1), (33, 0), (33, 31), (33, 32), (49, 1), (97, 33), (150, 48), (150, 1)]
# Of Triton's blocks: 32 queries meet 16 keys, in the gradient 16 meet 16. Its interpreter is slow.
TRITON_SIZES = [(33, 15)]


@every_loss
@every_backend
@pytest.mark.parametrize("kind", ["none", "right padding", "left padding", "far apart"])
def test_windows(loss, backend, dtype, kind):
    """``kind`` of masks."""
    sizes = {"cpp": SIZES, "triton": TRITON_SIZES, "reference": [(1, 0), (33, 31)]}[backend]
    for (length, window), causal in itertools.product(sizes, (False, True)):
        student, teacher = states(2, 1, length, 5), states(2, 1, length, 8, seed=1)
        masks = masks_of(kind, length)
        assert_as_whole_maps(loss, student, teacher, backend, window, causal, masks)


@every_loss
@pytest.mark.parametrize(("backend", "dtype"), backend_dtypes("attention_kl"))
def test_every_dtype(loss, backend, dtype):
    check_op(attention_case(loss, (2, 1, 40), window=9), backend, dtype)


@every_backend
def test_heads_that_differ_in_number(backend, dtype):
    student, teacher = states(2, 2, 20, 4), states(2, 3, 20, 4, seed=1)
    for loss, causal in itertools.product(LOSSES, (False, True)):
        chosen = backend if loss == "attention_score_mse" else "auto"  # mean maps: reference only
        assert_as_whole_maps(loss, student, teacher, chosen, 3, causal, {})


@every_loss
@pytest.mark.parametrize(("length", "window"), [(17, 0), (17, 1), (40, 17), (50, 16)])
@pytest.mark.parametrize(
    ("backend", "dtype"), backend_dtypes("attention_kl", ("triton",), (torch.float32,))
)
def test_windows_at_the_edges_of_blocks(loss, length, window, backend, dtype):
    student, teacher = states(1, 1, length, 5), states(1, 1, length, 8, seed=1)
    causal = window == 16
    assert_as_whole_maps(loss, student, teacher, backend, window, causal, {})


@every_loss
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("causal", [False, True])
def test_a_window_that_hides_nothing_changes_no_bit(loss, backend, causal):
    student, teacher = states(2, 2, 24, 4), states(2, 2, 24, 5, seed=1)
    options = {"backend": backend, "causal": causal}
    plain = step(getattr(metakd, loss), student, teacher, **options)
    for window in (23, 24, 2**40):
        found = step(getattr(metakd, loss), student, teacher, window=window, **options)
        assert all(torch.equal(mine, own) for mine, own in zip(found, plain))


def test_the_gram_form_needs_all_positions():
    student, teacher = states(2, 2, 24, 4), states(2, 2, 24, 5, seed=1)
    loss = metakd.attention_score_mse
    whole = loss(student, teacher, form="gram", window=23)
    assert whole == loss(student, teacher, form="gram")
    with pytest.raises(ValueError, match=r"form .*window within 24 positions.*'gram'"):
        loss(student, teacher, form="gram", window=22)


@every_loss
@pytest.mark.parametrize("window", [-1, True, 2.0, "3"])
def test_refusals(loss, window):
    sides = states(1, 1, 4, 2), states(1, 1, 4, 2, seed=1)
    with pytest.raises(ValueError, match=f"window .*{window!r}"):
        getattr(metakd, loss)(*sides, window=window)


def test_what_is_counted():
    """Scores of 1 against 0: the mean over the pairs that are seen is 1, over all what they are of
    them."""
    one, zero = (torch.full((1, 1, 5, 1), value, device=DEVICE) for value in (1.0, 0.0))
    mask = torch.tensor([[1, 1, 0, 1, 1]], device=DEVICE)
    for window, causal, pairs in ((0, False, 5), (1, False, 13), (1, True, 9), (3, True, 14)):
        options = {"window": window, "causal": causal, "backend": "reference"}
        loss = metakd.attention_score_mse((one, one), (zero, zero), **options)
        assert loss.item() == 1.0
        loss = metakd.attention_score_mse((one, one), (zero, zero), **options, mean_over="all")
        assert loss.item() == pytest.approx(pairs / 25)
        counts = [
            reference.count_pairs(5, own, None, (window, 0 if causal else window), "real")
            for own in (None, torch.ones(1, 5, dtype=torch.bool))
        ]
        assert counts == [pairs, pairs]
    # Tokens 0, 1 and 3, 4 see each other: 8 pairs, of 4 queries.
    reach = (1, 1)
    real = mask.bool().cpu()
    assert reference.count_pairs(5, real, real, reach, "real") == 8
    assert reference.count_queries(5, None, real, reach, "real") == 5
    assert reference.count_queries(5, None, real, (0, 0), "real") == 4


@every_loss
@pytest.mark.parametrize(
    ("backend", "dtype"), backend_dtypes("attention_kl", ("cpp",), (torch.float32,))
)
def test_work_follows_the_window(loss, backend, dtype):
    """8 times the tokens take about 8 times as long, where whole maps would take 64."""
    times = []
    for length in (512, 4096):
        student, teacher = states(1, 1, length, 16), states(1, 1, length, 16, seed=1)
        own = learning(student)
        best = math.inf
        for _ in range(3):
            start = time.process_time()
            value = getattr(metakd, loss)(own, teacher, window=16, backend=backend)
            torch.autograd.grad(value, own)
            best = min(best, time.process_time() - start)
        times.append(best)
    assert times[1] < 24 * times[0]
