"""The CUDA kernels of attention_score_mse and hidden_mse where there is no GPU, on the device of
emulator/ (see test_cuda_emulated.py). Against the reference in float64, within the budgets of
``metakd.verify``.

Legend: n layers of a call, B batch, A heads, L length, D head size, W = D_s + D_t, H hidden size;
``_s`` student, ``_t`` teacher.
"""

import ctypes
import math
from dataclasses import dataclass, replace

import pytest
import torch
from oracle import SABOTAGES
from test_cuda_emulated import DTYPES, DeviceError, build
from torch import Tensor

from metakd import reference
from metakd.verify import Finding, judge

HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
BROKEN = ("nothing", "block_sync", "cluster_sync", "bytes_wait", "remote_bytes_wait", "copies_wait")
SHARED = 227 << 10  # bytes that a block of sm_90 may have
ROLES = ("query", "key")
MODELS = ("s", "t")

every_form = pytest.mark.parametrize("guard", [0.0, math.inf], ids=["gram", "tiles"])


class Run(ctypes.Structure):
    """Field by field the struct Run of emulator/emulated.h."""

    _fields_ = [("broken", ctypes.c_int64), ("seed", ctypes.c_uint64)]


# attention_score_mse


class ScoreCall(ctypes.Structure):
    """Field by field the struct Call of emulator/attention_score_mse.cpp."""

    _fields_ = [
        ("layers", ctypes.c_int64 * 4 * 6 * 16),
        ("mask", ctypes.c_void_p * 2),
        *((name, ctypes.c_int64 * 2) for name in ("mask_stride_b", "mask_stride_l")),
        *((name, ctypes.c_void_p) for name in ("heads", "gram", "tiled", "norm_t", "dheads")),
        ("dheads_stride", ctypes.c_int64 * 3),
        *((name, ctypes.c_int64) for name in ("n", "batch", "heads_count", "length")),
        *((name, ctypes.c_int64 * 2) for name in ("size", "dtype")),
        ("scale", ctypes.c_double * 2),
        ("guard", ctypes.c_double),
        ("reach", ctypes.c_int64 * 2),
        *((name, ctypes.c_int64) for name in ("gram_form", "backward")),
        *((name, ctypes.c_int64) for name in ("limit", "rows", "stages", "panel")),
        ("run", Run),
    ]


@pytest.fixture(scope="session")
def scores(tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulator"), "attention_score_mse", ScoreCall)


@dataclass(frozen=True)
class Pairs:
    """Arguments of the operators: per layer query_s, key_s, query_t, key_t, each [B, A, L, D]."""

    layers: list[tuple[Tensor, Tensor, Tensor, Tensor]]
    query_mask: Tensor | None  # [B, L]
    key_mask: Tensor | None
    dheads: Tensor  # [n, B, A]
    reach: reference.Reach = reference.EVERYWHERE

    def scale(self, model: int) -> float:
        return self.layers[0][2 * model].shape[-1] ** -0.5

    def with_layers(self, change) -> "Pairs":
        return replace(self, layers=[tuple(change(x) for x in layer) for layer in self.layers])


def pairs_of(
    shape: tuple[int, int, int] = (2, 2, 70),
    sizes: tuple[int, int] = (26, 64),
    dtypes: tuple[torch.dtype, torch.dtype] = (HALF, HALF),
    layers: int = 1,
    masked: bool = True,
    close: float | None = None,
    reach: reference.Reach = reference.EVERYWHERE,
    seed: int = 0,
) -> Pairs:
    """Views [B, A, L, D] of [B, L, A, D]. ``close``: how far the student is from the teacher, whose
    size it has then."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, length = shape

    def rand(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=DOUBLE)

    def heads_of(size: int) -> Tensor:
        x = rand(batch, length, heads, size)
        x[:, length // 2 : length // 2 + 1] *= 4  # an outlier
        return x

    found = []
    for _ in range(layers):
        teacher = [heads_of(sizes[1]) for _ in ROLES]
        if close is None:
            student = [heads_of(sizes[0]) for _ in ROLES]
        else:
            student = [x + close * rand(*x.shape) for x in teacher]
        quantised = [x.to(dtypes[0]) for x in student] + [x.to(dtypes[1]) for x in teacher]
        found.append(tuple(x.transpose(1, 2) for x in quantised))
    masks = [None, None]
    if masked:
        masks = [torch.rand(batch, length, generator=generator) < 0.8 for _ in ROLES]
        for role, mask in enumerate(masks):
            mask[:, :1] = True
            for layer in found:
                for x in layer[role::2]:
                    x.transpose(1, 2)[~mask] = math.nan
    accumulator = DOUBLE if DOUBLE in dtypes else SINGLE
    dheads = rand(layers, batch, heads).to(accumulator)
    return Pairs(found, *masks, dheads, reach)


@dataclass(frozen=True)
class Forward:
    heads: Tensor  # [n, B, A]
    gram: Tensor  # [n, B, A, 2, W or 0, D_s]
    tiled: Tensor  # [n, B, A]
    plan: tuple[int, int, int]


def score_call(library, pairs: Pairs, guard, limit, seed, broken, **written) -> ScoreCall:
    query_s, _, query_t, _ = pairs.layers[0]
    batch, heads, length, _ = query_s.shape
    request = ScoreCall(
        n=len(pairs.layers),
        batch=batch,
        heads_count=heads,
        length=length,
        guard=guard,
        gram_form=guard < math.inf,
        limit=limit,
        run=Run(BROKEN.index(broken), seed),
    )
    request.reach[:] = [length if x is None else min(x, length) for x in pairs.reach]
    gradients = written.pop("gradients", None)
    for i, layer in enumerate(pairs.layers):
        query_s, key_s, query_t, key_t = layer
        own = () if gradients is None else gradients[i]
        for j, x in enumerate((query_s, query_t, key_s, key_t, *own)):
            request.layers[i][j][:] = [x.data_ptr(), *x.stride()[:3]]
    for role, mask in enumerate((pairs.query_mask, pairs.key_mask)):
        if mask is not None:
            request.mask[role] = mask.data_ptr()
            request.mask_stride_b[role], request.mask_stride_l[role] = mask.stride()
    for model, x in enumerate((query_s, query_t)):
        request.size[model] = x.shape[-1]
        request.dtype[model] = DTYPES.index(x.dtype)
        request.scale[model] = pairs.scale(model)
    for name, tensor in written.items():
        setattr(request, name, tensor.data_ptr())
    if "dheads" in written:
        request.backward = True
        request.dheads_stride[:] = written["dheads"].stride()
    if error := library.attention_score_mse_emulated(request):
        raise DeviceError(error.decode())
    return request


def forward(
    library, pairs: Pairs, guard=0.0, norm_t=None, limit=SHARED, seed=0, broken="nothing"
) -> Forward:
    n, (batch, heads, _, size) = len(pairs.layers), pairs.layers[0][0].shape
    width = size + pairs.layers[0][2].shape[-1] if guard < math.inf else 0
    found = {
        "heads": torch.full((n, batch, heads), math.nan, dtype=pairs.dheads.dtype),
        "gram": torch.full((n, batch, heads, 2, width, size), math.nan, dtype=pairs.dheads.dtype),
        "tiled": torch.zeros((n, batch, heads), dtype=torch.bool),
    }
    given = {} if norm_t is None else {"norm_t": norm_t}
    request = score_call(library, pairs, guard, limit, seed, broken, **found, **given)
    return Forward(**found, plan=(request.rows, request.stages, request.panel))


def backward(
    library, pairs: Pairs, saved: Forward, guard=0.0, limit=SHARED, seed=0, broken="nothing"
) -> list[Tensor]:
    """d query_s per layer, then d key_s per layer."""
    gradients = [
        tuple(torch.empty_like(x).fill_(math.nan) for x in layer[:2]) for layer in pairs.layers
    ]
    given = {"gram": saved.gram, "tiled": saved.tiled, "dheads": pairs.dheads}
    score_call(library, pairs, guard, limit, seed, broken, gradients=gradients, **given)
    return [gradient for role in zip(*gradients) for gradient in role]


def results(library, pairs: Pairs, guard=0.0, **options) -> dict[str, Tensor]:
    saved = forward(library, pairs, guard, **options)
    options.pop("norm_t", None)
    gradients = backward(library, pairs, saved, guard, **options)
    n = len(pairs.layers)
    found = {"heads": saved.heads.flatten()}
    for role, name in enumerate(ROLES):
        stacked = torch.stack(gradients[role * n : (role + 1) * n])
        found[f"d {name}"] = stacked.flatten(0, 2).flatten(1)
    return found


def wanted(pairs: Pairs, form: str, dtype=None, student_only=False) -> dict[str, Tensor]:
    """What the reference makes of it, a head at a time, in the inputs' own dtypes or in another;
    ``student_only``: of a teacher whose scores are 0, whose sum of squares and gradient are the
    size of what is summed."""
    found = []
    for layer, dheads in zip(pairs.layers, pairs.dheads):
        tensors = [
            (x if dtype is None else x.to(dtype)).detach().flatten(0, 1)[:, None] for x in layer
        ]
        if student_only:
            tensors[2:] = [torch.zeros_like(x) for x in tensors[2:]]
        leaves = [x.clone().requires_grad_() for x in tensors[:2]]
        masks = [
            None if mask is None else mask.repeat_interleave(dheads.shape[1], 0)
            for mask in (pairs.query_mask, pairs.key_mask)
        ]
        mean = reference.attention_score_mse(
            tuple(leaves), tuple(tensors[2:]), *masks, pairs.reach, mean_over="all", form=form
        )
        heads = mean * float(tensors[0].shape[2]) ** 2
        gradients = torch.autograd.grad(heads, leaves, dheads.flatten().to(heads))
        found.append((heads.detach(), *(x.flatten(1) for x in gradients)))
    names = ("heads", *(f"d {role}" for role in ROLES))
    return {name: torch.cat(x) for name, x in zip(names, zip(*found))}


def findings(pairs: Pairs, found: dict[str, Tensor], guard=0.0) -> list[Finding]:
    form = "gram" if guard < math.inf else "tiled"
    eager, exact = wanted(pairs, form), wanted(pairs, "tiled", DOUBLE)
    if pairs.dheads.dtype == DOUBLE:
        rough = wanted(pairs.with_layers(lambda x: x.to(SINGLE)), form)
        fine = wanted(pairs.with_layers(lambda x: x.to(SINGLE)), "tiled", DOUBLE)
        scale = 32 * torch.finfo(DOUBLE).eps / torch.finfo(SINGLE).eps
        eager = {name: exact[name] + scale * (rough[name] - fine[name]) for name in exact}
    # Gram sums are of the size of each side's own; differences of scores of their own.
    size = {name: 0.0 for name in exact}
    if form == "gram":
        alone = wanted(pairs, "tiled", DOUBLE, student_only=True)
        size = {
            name: 2 * x.flatten(1).abs().amax(1) if x.dim() > 1 else 2 * x
            for name, x in alone.items()
        }
    return [
        judge(name, value, eager[name], exact[name], size[name]) for name, value in found.items()
    ]


def check(library, pairs: Pairs, guard=0.0, **options) -> None:
    for finding in findings(pairs, results(library, pairs, guard, **options), guard):
        assert finding.passed, finding


# D of both sides, L, dtypes: sizes around 16, 32 and 64, the paper's, the widest; every dtype
SCORES = [
    ((26, 64), 70, (HALF, HALF)),
    ((26, 64), 130, (torch.float16, torch.float16)),
    ((26, 64), 65, (SINGLE, SINGLE)),
    ((26, 64), 40, (DOUBLE, DOUBLE)),
    ((1, 3), 7, (HALF, HALF)),
    ((33, 16), 63, (torch.float16, torch.float16)),
    ((64, 80), 64, (HALF, HALF)),
    ((96, 8), 1, (HALF, HALF)),
    ((128, 128), 66, (HALF, HALF)),
    ((128, 128), 33, (SINGLE, SINGLE)),
    ((100, 128), 20, (DOUBLE, SINGLE)),
    ((16, 24), 50, (SINGLE, HALF)),
    ((24, 16), 50, (HALF, torch.float16)),
]


@every_form
@pytest.mark.parametrize(("sizes", "length", "dtypes"), SCORES, ids=str)
def test_scores(scores, guard, sizes, length, dtypes):
    check(scores, pairs_of((2, 2, length), sizes, dtypes), guard)


@every_form
def test_scores_of_layers_without_masks(scores, guard):
    check(scores, pairs_of((1, 3, 66), (8, 12), layers=3, masked=False), guard)


@every_form
def test_scores_of_one_model_only(scores, guard):
    """Of a teacher that is all zeros, and of a student that is."""
    pairs = pairs_of((1, 2, 40), (16, 24))
    for zeroed in (0, 2):
        layer = list(pairs.layers[0])
        layer[zeroed] = torch.zeros_like(layer[zeroed])
        check(scores, replace(pairs, layers=[tuple(layer)]), guard)


def test_long_scores(scores):
    """More rows than a block of the backward takes."""
    for length in (513, 1100):
        check(scores, pairs_of((1, 1, length), (8, 5)), 0.0)
    check(scores, pairs_of((1, 1, 513), (8, 5)), math.inf)


@pytest.mark.parametrize("length", [1, 64, 65, 150])
def test_causal_scores(scores, length):
    check(scores, pairs_of((2, 2, length), (26, 40), reach=(None, 0)), math.inf)


# Edges of the windows around those of the tiles (32) and blocks (64).
@pytest.mark.parametrize(
    "reach", [(0, 0), (1, 1), (31, 0), (64, 65), (33, None), (200, 200)], ids=str
)
@pytest.mark.parametrize("length", [1, 65, 150])
def test_scores_in_a_window(scores, length, reach):
    check(scores, pairs_of((1, 2, length), (26, 40), reach=reach), math.inf)


def test_long_scores_in_a_window(scores):
    """More queries than a block of the forward takes."""
    check(scores, pairs_of((1, 1, 600), (8, 5), reach=(40, 3)), math.inf)


@every_form
@pytest.mark.parametrize("kilobytes", [99, 163])
def test_scores_in_less_shared_memory(scores, guard, kilobytes):
    plans = []
    for sizes, dtype in (((26, 64), HALF), ((128, 128), HALF), ((128, 128), SINGLE)):
        pairs = pairs_of((1, 1, 70), sizes, (dtype, dtype))
        check(scores, pairs, guard, limit=kilobytes << 10)
        plans.append(forward(scores, pairs, guard, limit=kilobytes << 10).plan)
    assert len(set(plans)) > 1


def test_scores_that_do_not_fit(scores):
    with pytest.raises(DeviceError, match="too little shared memory"):
        forward(scores, pairs_of((1, 1, 9), (128, 128), (DOUBLE, DOUBLE)), limit=99 << 10)


def test_the_guard_chooses_head_by_head(scores):
    pairs = pairs_of((2, 2, 70), (16, 16), (SINGLE, SINGLE), close=0.5)
    near = pairs_of((2, 2, 70), (16, 16), (SINGLE, SINGLE), close=1e-4)  # of the same teacher
    for own, other in zip(pairs.layers[0][:2], near.layers[0][:2]):
        own[:, 0] = other[:, 0]
    teacher = near.layers[0][2:]
    pairs = replace(pairs, layers=[(*pairs.layers[0][:2], *teacher)])
    saved = forward(scores, pairs, 1e-5)
    assert saved.tiled.tolist() == [[[True, False]] * 2]
    never, always = (forward(scores, pairs, guard) for guard in (0.0, math.inf))
    assert not never.tiled.any() and always.tiled.all()
    assert always.gram.shape == (1, 2, 2, 2, 0, 16)
    assert torch.equal(saved.gram, never.gram)
    assert torch.equal(saved.heads, torch.where(saved.tiled, always.heads, never.heads))
    gradients = [backward(scores, pairs, x, 1e-5) for x in (saved, never)]
    tiles = backward(scores, pairs, always, math.inf)
    for mixed, plain, exact in zip(*gradients, tiles):
        assert torch.equal(mixed[:, 0], exact[:, 0]) and torch.equal(mixed[:, 1], plain[:, 1])
    exact = wanted(pairs, "tiled", DOUBLE)["heads"].view(2, 2)[:, 0]
    error = [(x.heads[0, :, 0] / exact - 1).abs().max() for x in (saved, never)]
    assert error[0] < 1e-4 < error[1]


def test_the_guard_compares_with_both_norms(scores):
    pairs = pairs_of((2, 3, 20), (8, 8), (SINGLE, SINGLE), close=0.3)
    teacher = replace(pairs, layers=[(*pairs.layers[0][2:], *pairs.layers[0][:2])])
    norms = [wanted(x, "tiled", DOUBLE, student_only=True)["heads"] for x in (pairs, teacher)]
    ratio = wanted(pairs, "tiled", DOUBLE)["heads"] / sum(norms)
    for guard in ratio.sort().values.unfold(0, 2, 1).mean(1).tolist():
        assert torch.equal(forward(scores, pairs, guard).tiled.flatten(), ratio < guard)


@pytest.mark.parametrize("dtype", [HALF, torch.float16])
@pytest.mark.parametrize(("guard", "close"), [(0.0, 0.003), (math.inf, None)])
def test_pieces_lose_nothing(scores, guard, close, dtype):
    """On average a gradient is as exact as eager's, which computes in float32."""
    pairs = pairs_of((1, 2, 200), (64, 64), (dtype, dtype), close=close, masked=False)
    found = findings(pairs, results(scores, pairs, guard), guard)
    for finding in found[1:]:
        assert finding.mean_error < 1.05 * finding.eager_mean_error, finding


@pytest.mark.parametrize("dtype", [HALF, torch.float16, SINGLE])
def test_a_close_student_in_gram_form(scores, dtype):
    """1 % away: loss and gradient are what is left of numbers 10000 and 100 times their size."""
    check(scores, pairs_of((1, 2, 100), (32, 32), (dtype, dtype), close=0.01, masked=False), 0.0)


@pytest.mark.parametrize("sizes", [(26, 64), (128, 128)])
def test_a_given_norm_is_used(scores, sizes):
    pairs = pairs_of((2, 2, 70), sizes)
    teacher_only = pairs.with_layers(torch.clone)
    for layer in teacher_only.layers:
        layer[0].zero_()
    norm = forward(scores, teacher_only).heads
    check(scores, pairs, 0.0, norm_t=norm)
    one, other = (forward(scores, pairs, norm_t=x) for x in (norm, 2 * norm))
    assert torch.equal(one.gram, forward(scores, pairs).gram)
    torch.testing.assert_close(other.heads - one.heads, norm)


@every_form
def test_layouts_of_scores(scores, guard):
    """Contiguous heads, an expanded teacher, odd addresses, tensors that differ in strides."""
    pairs = pairs_of((2, 3, 40), (26, 24), layers=2)
    query_s, key_s, query_t, key_t = pairs.layers[0]
    shifted = torch.empty(key_t.numel() + 8, dtype=HALF)[3:][: key_t.numel()].view(key_t.shape)
    odd = torch.empty(2, 3, 40, 27, dtype=HALF)[..., 1:]
    first = (
        query_s.contiguous(),
        odd.copy_(key_s),
        query_t[:, :1].expand(2, 3, 40, 24),
        shifted.copy_(key_t),
    )
    dheads = torch.randn(2, 1, 3).expand(2, 2, 3)
    check(scores, replace(pairs, layers=[first, pairs.layers[1]], dheads=dheads), guard)


@every_form
def test_hidden_rows_of_scores(scores, guard):
    """An example without real keys is 0; gradients of hidden rows are exactly 0."""
    pairs = pairs_of((3, 2, 70), (26, 40))
    pairs.key_mask[1] = False
    for x in pairs.layers[0][1::2]:
        x[1] = math.nan
    saved = forward(scores, pairs, guard)
    assert saved.heads.isfinite().all() and (saved.heads[:, 1] == 0).all()
    dquery, dkey = backward(scores, pairs, saved, guard)
    for gradient, mask in ((dquery, pairs.query_mask), (dkey, pairs.key_mask)):
        assert gradient.isfinite().all()
        assert (gradient.transpose(1, 2)[~mask] == 0).all()
    assert (dquery[1] == 0).all()


@every_form
def test_nan_stays_in_its_head(scores, guard):
    clean = pairs_of((2, 3, 70), (26, 40), layers=2, masked=False)
    expected = results(scores, clean, guard)
    for place in range(4):
        pairs = clean.with_layers(torch.clone)
        pairs.layers[1][place][1, 2, 69, 3] = math.nan
        for name, found in results(scores, pairs, guard).items():
            spoilt = found.flatten(1).isnan().any(1) if found.dim() > 1 else found.isnan()
            assert spoilt.nonzero().tolist() == [[11]], (place, name)
            assert torch.equal(found[:11], expected[name][:11])


@every_form
def test_hidden_rows_of_a_spoilt_head(scores, guard):
    pairs = pairs_of((1, 1, 70), (26, 40))
    real = pairs.key_mask[0].nonzero()[-1]
    pairs.layers[0][1][0, 0, real] = math.nan
    saved = forward(scores, pairs, guard)
    dquery, dkey = backward(scores, pairs, saved, guard)
    assert saved.heads.isnan().all()
    for gradient, mask in ((dquery, pairs.query_mask), (dkey, pairs.key_mask)):
        assert gradient[0, 0][mask[0]].isnan().any() and (gradient[0, 0][~mask[0]] == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_queries_without_keys(scores, value):
    """Differences of scores that nobody sees count nothing, whatever the query holds."""
    pairs = pairs_of((1, 2, 70), (26, 40))
    pairs.key_mask[:] = False
    pairs.layers[0][0][:] = value
    assert (forward(scores, pairs, math.inf).heads == 0).all()


@pytest.mark.parametrize("guard", [0.0, 0.5, math.inf])
def test_no_scores(scores, guard):
    saved = forward(scores, pairs_of((2, 2, 0)), guard)
    assert (saved.heads == 0).all() and (saved.gram == 0).all()


@every_form
@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_padding_changes_no_bit(scores, guard, dtype):
    pairs = pairs_of((2, 2, 70), (26, 64), (dtype, dtype))
    padded = replace(
        pairs.with_layers(
            lambda x: torch.nn.functional.pad(
                x.transpose(1, 2), (0, 0, 0, 0, 0, 130), value=math.nan
            ).transpose(1, 2)
        ),
        query_mask=torch.nn.functional.pad(pairs.query_mask, (0, 130)),
        key_mask=torch.nn.functional.pad(pairs.key_mask, (0, 130)),
    )
    saved, longer = (forward(scores, x, guard) for x in (pairs, padded))
    assert torch.equal(saved.heads, longer.heads) and torch.equal(saved.gram, longer.gram)
    short, long = (backward(scores, x, y, guard) for x, y in ((pairs, saved), (padded, longer)))
    for own, other in zip(short, long):
        assert torch.equal(own, other[:, :, :70]) and (other[:, :, 70:] == 0).all()


@every_form
def test_any_order_gives_the_same_scores(scores, guard):
    pairs = pairs_of((1, 2, 150), (26, 64))
    first = results(scores, pairs, guard)
    for seed in range(1, 5):
        again = results(scores, pairs, guard, seed=seed)
        assert all(torch.equal(first[name], again[name]) for name in first), seed


@every_form
@pytest.mark.parametrize("broken", ["block_sync", "copies_wait"])
def test_a_broken_barrier_is_seen_in_scores(scores, guard, broken):
    pairs = pairs_of((1, 2, 150), (26, 64))
    try:
        found = results(scores, pairs, guard, broken=broken)
    except DeviceError:
        return
    assert not all(finding.passed for finding in findings(pairs, found, guard))


@every_form
def test_wrong_scores_are_seen(scores, guard):
    pairs = pairs_of((2, 2, 70))
    found = results(scores, pairs, guard)
    for sabotage, spoil in SABOTAGES.items():
        spoilt = {name: spoil(value) for name, value in found.items()}
        for finding in findings(pairs, spoilt, guard):
            assert not finding.passed, f"{sabotage} went unseen: {finding}"


# hidden_mse


class HiddenCall(ctypes.Structure):
    """Field by field the struct Call of emulator/hidden_mse.cpp."""

    _fields_ = [
        ("layers", ctypes.c_int64 * 10 * 32),
        ("mask", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("mask_stride_b", "mask_stride_l")),
        *((name, ctypes.c_void_p) for name in ("rows", "drows")),
        ("drows_stride", ctypes.c_int64 * 2),
        *((name, ctypes.c_int64) for name in ("n", "batch", "length")),
        ("dtype", ctypes.c_int64 * 2),
        ("backward", ctypes.c_int64),
        ("run", Run),
    ]


@pytest.fixture(scope="session")
def hidden(tmp_path_factory):
    return build(tmp_path_factory.mktemp("emulator"), "hidden_mse", HiddenCall)


@dataclass(frozen=True)
class States:
    student: list[Tensor]  # n of [B, L, H]
    teacher: list[Tensor]
    mask: Tensor | None  # [B, L]
    drows: Tensor  # [n, B]


def states_of(
    shape: tuple[int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype] = (HALF, HALF),
    layers: int = 2,
    masked: bool = True,
    seed: int = 0,
) -> States:
    generator = torch.Generator().manual_seed(seed)

    def rand(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=DOUBLE)

    sides = [[(rand(*shape) * 3).to(dtype) for _ in range(layers)] for dtype in dtypes]
    mask = None
    if masked:
        mask = torch.rand(shape[:2], generator=generator) < 0.7
        for x in (*sides[0], *sides[1]):
            x[~mask] = math.nan
    accumulator = DOUBLE if DOUBLE in dtypes else SINGLE
    return States(*sides, mask, rand(layers, shape[0]).to(accumulator))


def hidden_results(
    library, states: States, seed=0, broken="nothing", like=torch.empty_like
) -> dict[str, Tensor]:
    """``like(student)`` is where a gradient goes."""
    first = states.student[0]
    rows = torch.full(states.drows.shape, math.nan, dtype=states.drows.dtype)
    gradients = [like(x).fill_(math.nan) for x in states.student]
    for is_backward in (False, True):
        request = HiddenCall(
            rows=rows.data_ptr(),
            drows=states.drows.data_ptr(),
            n=len(states.student),
            batch=first.shape[0],
            length=first.shape[1],
            backward=is_backward,
            run=Run(BROKEN.index(broken), seed),
        )
        for i, tensors in enumerate(zip(states.student, states.teacher, gradients)):
            places = [y for x in tensors for y in (x.data_ptr(), *x.stride()[:2])]
            request.layers[i][:] = [*places, tensors[0].shape[2]]
        if states.mask is not None:
            request.mask = states.mask.data_ptr()
            request.mask_stride_b, request.mask_stride_l = states.mask.stride()
        request.drows_stride[:] = states.drows.stride()
        request.dtype[:] = [DTYPES.index(x[0].dtype) for x in (states.student, states.teacher)]
        if error := library.hidden_mse_emulated(request):
            raise DeviceError(error.decode())
    found = {f"d student {i}": x.flatten(1) for i, x in enumerate(gradients)}
    return {"rows": rows.flatten(), **found}


def hidden_wanted(states: States, dtype=None) -> dict[str, Tensor]:
    rows, gradients = [], {}
    for i, tensors in enumerate(zip(states.student, states.teacher)):
        student, teacher = (x if dtype is None else x.to(dtype) for x in tensors)
        leaf = student.detach().clone().requires_grad_()
        row = reference.hidden_mse([leaf], [teacher], states.mask)
        (gradient,) = torch.autograd.grad(row, leaf, states.drows[i].to(row))
        rows.append(row.detach())
        gradients[f"d student {i}"] = gradient.flatten(1)
    return {"rows": torch.cat(rows), **gradients}


def hidden_findings(states: States, found: dict[str, Tensor]) -> list[Finding]:
    eager, exact = hidden_wanted(states), hidden_wanted(states, DOUBLE)
    return [judge(name, value, eager[name], exact[name], 0.0) for name, value in found.items()]


def check_hidden(library, states: States) -> None:
    for finding in hidden_findings(states, hidden_results(library, states)):
        assert finding.passed, finding


@pytest.mark.parametrize(
    "dtypes",
    [
        (HALF, HALF),
        (torch.float16, torch.float16),
        (SINGLE, SINGLE),
        (DOUBLE, DOUBLE),
        (SINGLE, HALF),
        (torch.float16, SINGLE),
        (SINGLE, DOUBLE),
    ],
    ids=str,
)
def test_hidden_states(hidden, dtypes):
    for shape in ((2, 70, 768), (3, 33, 312), (2, 5, 30), (1, 1, 1), (2, 32, 520)):
        check_hidden(hidden, states_of(shape, dtypes))
    check_hidden(hidden, states_of((2, 40, 64), dtypes, layers=5, masked=False))


def test_layouts_of_hidden_states(hidden):
    """Layers that differ in width and strides, odd addresses, expanded tensors."""
    states = states_of((2, 40, 64), layers=4)
    odd = torch.empty(2, 40, 65, dtype=HALF)[..., 1:]
    students = [
        states.student[0].transpose(0, 1).contiguous().transpose(0, 1),
        odd.copy_(states.student[1]),
        states.student[2][..., :23],
        states.student[3],
    ]
    teachers = [
        *states.teacher[:2],
        states.teacher[2][..., 8:31],
        states.teacher[3][:1].expand(2, 40, 64),
    ]
    mask = states.mask.clone()
    mask[1] &= mask[0]  # what is expanded is real there
    drows = torch.randn(1, 2).expand(4, 2)
    check_hidden(hidden, States(students, teachers, mask, drows))


@pytest.mark.parametrize("width", [60, 64])
def test_gradients_of_hidden_states_in_other_places(hidden, width):
    """Addresses that do not allow wide stores, and neighbours that must stay as they are."""
    states = states_of((2, 40, 64))
    narrower = [[x[..., :width] for x in side] for side in (states.student, states.teacher)]
    states = replace(states, student=narrower[0], teacher=narrower[1])
    expected = hidden_results(hidden, states)
    for gap in (8, 1):
        buffers = []

        def like(x, gap=gap, buffers=buffers):
            buffers.append(torch.full((*x.shape[:2], 64 + gap), 7.0, dtype=x.dtype))
            return buffers[-1][..., gap : gap + width]

        found = hidden_results(hidden, states, like=like)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        for buffer in buffers:
            assert (buffer[..., :gap] == 7).all() and (buffer[..., gap + width :] == 7).all()


def test_hidden_examples_of_padding(hidden):
    states = states_of((2, 70, 64))
    states.mask[1] = False
    found = hidden_results(hidden, states)
    assert found["rows"][1::2].tolist() == [0.0, 0.0] and (found["rows"][::2] > 0).all()
    for i in range(2):
        gradient = found[f"d student {i}"].view(2, 70, 64)
        assert gradient.isfinite().all() and (gradient[~states.mask] == 0).all()
    empty = states_of((2, 0, 64))
    assert (hidden_results(hidden, empty)["rows"] == 0).all()


def test_padding_changes_no_bit_of_hidden_states(hidden):
    states = states_of((2, 70, 64))
    pad = torch.nn.functional.pad
    longer = States(
        *(
            [pad(x, (0, 0, 0, 3000), value=math.nan) for x in side]
            for side in (states.student, states.teacher)
        ),
        pad(states.mask, (0, 3000)),
        states.drows,
    )
    found, padded = (hidden_results(hidden, x) for x in (states, longer))
    assert torch.equal(found.pop("rows"), padded.pop("rows"))
    for name, gradient in found.items():
        other = padded[name].view(2, 3070, 64)
        assert torch.equal(gradient.view(2, 70, 64), other[:, :70]) and (other[:, 70:] == 0).all()


def test_nan_stays_in_its_example(hidden):
    clean = states_of((3, 70, 64), masked=False)
    expected = hidden_results(hidden, clean)
    for side in ("student", "teacher"):
        states = replace(clean, **{side: [x.clone() for x in getattr(clean, side)]})
        getattr(states, side)[1][2, 69, 63] = math.nan
        found = hidden_results(hidden, states)
        assert found["rows"].isnan().tolist() == [False] * 5 + [True]
        assert torch.equal(found["rows"][:5], expected["rows"][:5])
        assert found["d student 1"].isnan().sum() == 1


def test_any_order_gives_the_same_hidden_mse(hidden):
    states = states_of((2, 70, 768))
    first = hidden_results(hidden, states)
    for seed in range(1, 4):
        again = hidden_results(hidden, states, seed=seed)
        assert all(torch.equal(first[name], again[name]) for name in first), seed


def test_a_broken_barrier_is_seen_in_hidden_states(hidden):
    states = states_of((2, 70, 64))
    try:
        found = hidden_results(hidden, states, broken="block_sync")
    except DeviceError:
        return
    assert not all(finding.passed for finding in hidden_findings(states, found))


def test_wrong_hidden_mse_is_seen(hidden):
    states = states_of((3, 40, 64), (SINGLE, SINGLE))
    found = hidden_results(hidden, states)
    for sabotage, spoil in SABOTAGES.items():
        spoilt = {name: spoil(value) for name, value in found.items()}
        for finding in hidden_findings(states, spoilt):
            assert not finding.passed, f"{sabotage} went unseen: {finding}"
