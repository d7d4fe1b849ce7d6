"""Relations of domains: the network worked by hand, its prototypes, and who trains it."""

import math
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from processes import run_ranks
from rich.console import Console
from test_method_objective import Scene
from tiny_runs import (
    assert_goes_on_to_the_same_bits,
    losses,
    rows_of,
    write_config,
)

from metakd.config import DistillConfig, load_config
from metakd.method.methods import FIXED, METHODS, TRAINED, build_terms
from metakd.method.objective import Distillation
from metakd.method.relations import PACE, Relations
from metakd.models.taps import Features
from metakd.pipeline.stages import Run
from metakd.training.world import join_world

ALL = "distill.one_student_for_all=true"
EVERY_WEIGHT = "deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"
ROWS = [name for name, method in METHODS.items() if method.by_relation]


def knowing(relations: Relations, prototypes: torch.Tensor, known=None) -> Relations:
    relations.prototypes.copy_(prototypes)
    relations.known.copy_(torch.tensor(known or [True] * prototypes.shape[1]))
    return relations


@torch.no_grad()
def lively(relations: Relations) -> Relations:
    """With scores of both signs, without which a complete graph weighs all domains alike."""
    relations.attend_out.copy_(torch.tensor([1.0, -1.0])[:, None])
    relations.project_out.mul_(10)
    return relations


def softmax(scores: list[float]) -> list[float]:
    powers = [math.exp(score) for score in scores]
    return [power / sum(powers) for power in powers]


def elu(x: float) -> float:
    return x if x > 0 else math.exp(x) - 1


def attended(projected: list[list[float]], a: list[float]) -> list[list[float]]:
    """Of each domain, from W x of all."""
    width, domains, found = len(projected[0]), range(len(projected)), []
    for d in domains:
        raw = [
            sum(a[c] * projected[d][c] + a[width + c] * projected[j][c] for c in range(width))
            for j in domains
        ]
        shares = softmax([x if x > 0 else 0.2 * x for x in raw])
        sums = [sum(shares[j] * projected[j][c] for j in domains) for c in range(width)]
        found.append([elu(x) for x in sums])
    return found


def by_hand(net: Relations) -> list[list[float]]:
    """r [N, K] in plain numbers, one after the other."""
    p = net.prototypes.tolist()
    domains, width, weights = range(len(p[0])), range(len(p[0][0])), []

    def bilinear(x, matrix, y):
        return sum(x[a] * matrix[a][b] * y[b] for a in width for b in width)

    for layer, own in enumerate(p):
        chosen = []
        for d in domains:
            alike = softmax([bilinear(own[d], net.reference[layer].tolist(), o) for o in own])
            q = [sum(alike[j] * own[j][c] for j in domains) for c in width]
            below = [p[m][d] for m in range(layer + 1)]
            close = softmax([bilinear(x, net.compare[layer][d].tolist(), q) for x in below])
            chosen.append([sum(s * x[c] for s, x in zip(close, below)) for c in width])
        joined: list[list[float]] = [[] for _ in domains]
        for head, matrix in enumerate(net.project[layer].tolist()):
            projected = [[sum(x[a] * matrix[a][c] for a in width) for c in width] for x in chosen]
            for d, out in enumerate(attended(projected, net.attend[layer, head, :, 0].tolist())):
                joined[d] += out
        out = net.project_out[layer, 0, :, 0].tolist()
        projected = [[sum(x * w for x, w in zip(row, out))] for row in joined]
        scores = attended(projected, net.attend_out[layer, 0, :, 0].tolist())
        weights.append([len(p[0]) * share for share in softmax([score for [score] in scores])])
    return weights


def test_weights_by_hand_of_two_domains_and_two_layers():
    net = lively(Relations(hidden=3, layers=1, num_domains=2, heads=2))
    weights = knowing(net, torch.randn(2, 2, 3))().detach()
    torch.testing.assert_close(weights, torch.tensor(by_hand(net)), rtol=1e-5, atol=1e-6)
    assert ((weights - 1).abs() > 1e-3).all()


def test_weights_of_the_domains_seen_have_the_mean_one():
    net = Relations(hidden=8, layers=2, num_domains=4)
    with torch.no_grad():
        assert torch.equal(net(), torch.ones(3, 4))
        for known in ([True, False, True, True], [True, True, True, True]):
            weights = knowing(net, torch.randn(3, 4, 8), known)()
            mine = torch.tensor(known)
            torch.testing.assert_close(weights[:, mine].sum(1), torch.full((3,), float(sum(known))))
            assert torch.equal(weights[:, ~mine], torch.ones(3, 4 - sum(known)))
        only = knowing(net, torch.randn(3, 4, 8), [False, False, True, False])()
        assert torch.equal(only, torch.ones(3, 4))


def test_a_domain_that_was_not_seen_changes_no_weight():
    net, prototypes = Relations(hidden=8, layers=1, num_domains=3), torch.randn(2, 3, 8)
    with torch.no_grad():
        before = knowing(net, prototypes, [True, True, False])()
        prototypes[:, 2] = 1e3
        assert torch.equal(knowing(net, prototypes, [True, True, False])(), before)


# Prototypes


def shown(rows: int = 4, length: int = 5, hidden: int = 8, layers: int = 2) -> Features:
    mask = (torch.arange(length) < torch.tensor([5, 3, 2, 4])[:rows, None]).long()
    features = Features(mask=mask, embedding=torch.randn(rows, length, hidden))
    features.hidden = list(torch.randn(layers, rows, length, hidden))
    return features


def means(features: Features, domain: list[int], wanted: int) -> torch.Tensor:
    """[N, H] of one domain, text by text, without padding."""
    lengths = features.mask.sum(1).tolist()
    rows = [row for row, own in enumerate(domain) if own == wanted]
    return torch.stack(
        [
            torch.stack([states[row, : lengths[row]].mean(0) for row in rows]).mean(0)
            for states in (features.embedding, *features.hidden)
        ]
    )


def test_prototypes_are_running_means_of_real_tokens():
    net, first, second = Relations(hidden=8, layers=2, num_domains=3), shown(), shown()
    domain = [0, 2, 0, 0]
    net.note(first, torch.tensor(domain))
    assert not net.known.any(), "a step has the same weights throughout"
    net.settle()
    net.settle()  # nothing was noted
    assert net.known.tolist() == [True, False, True]
    for k in (0, 2):
        torch.testing.assert_close(net.prototypes[:, k], means(first, domain, k))
    old = net.prototypes.clone()
    net.note(second, torch.tensor([1, 1, 0, 1]))
    net.settle()
    wanted = (1 - PACE) * old[:, 0] + PACE * means(second, [1, 1, 0, 1], 0)
    torch.testing.assert_close(net.prototypes[:, 0], wanted)
    torch.testing.assert_close(net.prototypes[:, 1], means(second, [1, 1, 0, 1], 1))
    assert torch.equal(net.prototypes[:, 2], old[:, 2])


def test_micro_batches_of_a_step_count_as_one():
    whole, halves = (Relations(hidden=8, layers=2, num_domains=2) for _ in range(2))
    features, domain = shown(), torch.tensor([0, 1, 1, 1])
    whole.note(features, domain)
    for part in (slice(0, 1), slice(1, 4)):
        half = Features(mask=features.mask[part], embedding=features.embedding[part])
        half.hidden = [states[part] for states in features.hidden]
        halves.note(half, domain[part])
    whole.settle()
    halves.settle()
    torch.testing.assert_close(halves.prototypes, whole.prototypes)


def test_a_text_that_is_not_finite_leaves_the_prototypes():
    net, features = Relations(hidden=8, layers=2, num_domains=2), shown()
    net.note(features, torch.tensor([0, 0, 1, 1]))
    net.settle()
    before = net.prototypes.clone()
    features.hidden[1][0, 0, 0] = torch.nan
    net.note(features, torch.tensor([0, 0, 1, 1]))
    net.settle()
    assert torch.equal(net.prototypes, before)


def test_prototypes_stay_exact_where_weights_are_halves():
    net = knowing(Relations(hidden=8, layers=2, num_domains=2), torch.randn(3, 2, 8))
    exact = net.prototypes.clone()
    net.bfloat16()
    assert torch.equal(net.prototypes, exact) and net.project.dtype == torch.bfloat16
    assert net().dtype == torch.float32


# The objective


@pytest.fixture
def scene(tiny_bert, make_batch):
    return Scene(tiny_bert, make_batch())


def related(scene: Scene, by_relation: str | None, **changes) -> Distillation:
    config = DistillConfig(method="tinybert_kd", **changes)
    terms = build_terms(config, student_layers=2, teacher_layers=4)
    torch.manual_seed(1)  # of the projections
    return scene.distillation(terms, weigh_by_expertise=False, by_relation=by_relation)


def test_the_objective_weights_each_layer_by_domain(scene):
    plain, module = related(scene, None), related(scene, FIXED)
    expected = plain(scene.batch, scene.taught)
    output = module(scene.batch, scene.taught)
    torch.testing.assert_close(output.rows, expected.rows)
    weights = torch.tensor([[0.5, 1.0, 2.0], [0.0, 3.0, 1.0], [1.5, 0.5, 1.0]])
    module.relations.forward = lambda: weights
    output = module(scene.batch, scene.taught)
    seen, rows = scene.seen(), torch.zeros(4)
    for term in module.terms:
        projection = module.projections.get(term.projected)
        if term.first_layer is None:
            rows += term.rows(seen, scene.taught, scene.batch, projection)
            continue
        for layer, part in enumerate(term.by_layer(), term.first_layer):
            own = seen.of_layer(layer, part.needs)
            loss = part.rows(own, scene.taught, scene.batch, projection)
            rows += weights[layer, scene.batch["domain"]] * loss
    torch.testing.assert_close(output.rows, rows)
    for term in module.terms:  # logged as they are, and as they count
        torch.testing.assert_close(output.terms[term.name], expected.terms[term.name])
    assert output.terms["prediction_weighted"] == output.terms["prediction"]
    assert output.terms["hidden_weighted"] != output.terms["hidden"]
    assert torch.equal(output.terms["relations"], weights)


def test_balanced_layers_keep_their_scales(scene):
    """Weights of one change nothing, whatever else divides the layers."""
    scales = {"embedding": (2.0,), "hidden": (3.0, 5.0), "attention": (7.0, 11.0)}
    found = []
    for by_relation in (None, FIXED):
        module = related(scene, by_relation)
        for term in module.terms:
            object.__setattr__(term, "scales", scales.get(term.name, ()))
        found.append(module(scene.batch, scene.taught).rows)
    torch.testing.assert_close(found[1], found[0])


def test_packed_students_have_the_same_prototypes_and_losses(scene):
    found = []
    for packed in (False, True):
        module = related(scene, FIXED)
        lively(module.relations).eval()
        module.packed = packed
        module.restrict(module.terms)
        for _ in range(2):
            output = module(scene.batch, scene.taught)
            module.settle()
        found.append((output.rows, module.relations.prototypes))
        module.detach()
    torch.testing.assert_close(found[1], found[0])


def step(module: Distillation, scene: Scene, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    module(scene.batch, scene.taught).rows.mean().backward()
    optimizer.step()
    module.settle()


@pytest.mark.parametrize("by_relation", [TRAINED, FIXED])
def test_who_trains_the_network(scene, by_relation):
    module = related(scene, by_relation)
    lively(module.relations)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    before = {name: value.clone() for name, value in module.relations.named_parameters()}
    for _ in range(2):  # the first has no prototypes yet
        step(module, scene, optimizer)
    after = dict(module.relations.named_parameters())
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == (set(before) if by_relation == TRAINED else set())
    assert module.relations.known.all()
    assert not any("relations" in name for name in module.detach().state_dict())


def test_training_by_the_weighted_loss_prefers_what_is_easy():
    """Of two domains that of the smaller loss gains weight: d/dz_d = r_d (L_d - mean)."""
    net = knowing(lively(Relations(hidden=8, layers=0, num_domains=2)), torch.randn(1, 2, 8))
    optimizer, hard = torch.optim.SGD(net.parameters(), lr=0.3), torch.tensor([1.0, 3.0])
    before = net()[0].detach()
    for _ in range(20):
        optimizer.zero_grad()
        (net()[0] * hard).mean().backward()
        optimizer.step()
    after = net()[0].detach()
    assert after[0] > before[0] + 0.01 and after[1] < before[1] - 0.01


def test_scores_of_one_sign_weigh_all_domains_alike_and_teach_the_network_nothing():
    """What a domain asks for is added to its scores of all others, and a softmax does not see it:
    only where LeakyReLU bends in between can domains differ."""
    net = knowing(lively(Relations(hidden=8, layers=2, num_domains=4)), torch.randn(3, 4, 8))
    pull, steepest = torch.rand(3, 4), []
    for sign in (True, False):
        if not sign:
            with torch.no_grad():
                net.attend_out.zero_()
        net.zero_grad()
        weights = net()
        (weights * pull).sum().backward()
        steepest.append(max(parameter.grad.abs().max() for parameter in net.parameters()))
        assert ((weights - 1).abs().max() > 0.01) == sign
    torch.testing.assert_close(weights.detach(), torch.ones(3, 4))
    assert steepest[1] < 1e-5 < 1e-3 < steepest[0]
    net.dropout = 0.1  # noise, which says nothing of a domain
    assert (net() - 1).abs().max() > 0.01
    torch.testing.assert_close(net.eval()().detach(), torch.ones(3, 4))


# Runs


def make_lively(patch: pytest.MonkeyPatch) -> None:
    """Networks are lively from here on, and the prototypes of tiny students, which are nearly the
    same of every domain, as far apart as those that are drawn."""
    draw, shares = Relations.__init__, Relations._shares

    def drawn_lively(self, *sizes, **options):
        draw(self, *sizes, **options)
        lively(self)

    def of_the_centred(self, prototypes):
        return shares(self, 20 * (prototypes - prototypes.mean(1, keepdim=True)))

    patch.setattr(Relations, "__init__", drawn_lively)
    patch.setattr(Relations, "_shares", of_the_centred)


@pytest.fixture
def alive(monkeypatch):
    make_lively(monkeypatch)


@pytest.mark.parametrize("name", ROWS)
def test_a_student_of_all_domains(make, name, alive):
    options = [f"distill.method={name}", "distill.training.per_device_train_batch_size=8", ALL]
    run = make(*options)
    [place] = run.distill()
    steps = [row for row in rows_of(place / "log.jsonl") if row["split"] == "train"]
    assert steps[0]["relations_std"] == 0
    for row in steps[1:]:
        for layer in row["relations"]:
            assert sum(layer) == pytest.approx(4)
    assert max(row["relations_std"] for row in steps) > 1e-3
    assert not any("of one domain" in line for line in run.said)
    [cached] = make(*options, "distill.cache_teacher=all").distill()
    kept = torch.tensor(losses(cached)["."])
    torch.testing.assert_close(
        kept, torch.tensor([row["loss"] for row in steps]), rtol=1e-4, atol=0
    )


def test_of_one_domain_nothing_is_weighted(make, alive):
    options = ["distill.domains=[hiking]", "distill.training.per_device_train_batch_size=4"]
    found = []
    for name in ("tinybert_kd", *ROWS):
        run = make(f"distill.method={name}", "teacher.kind=mix", *options)
        [place] = run.distill()
        found.append(torch.tensor(losses(place)["."]))
        assert any("of one domain" in line for line in run.said) == (name in ROWS)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


@pytest.mark.parametrize(
    "options",
    [
        ["student.zero=2", "bf16=true", "distill.training.gradient_accumulation_steps=2"],
        ["student.zero=3", EVERY_WEIGHT],
        # Frozen ones are kept elsewhere.
        ["student.zero=3", EVERY_WEIGHT, "distill.method=hrkd_random"],
        ["distill.schedule=two_stage", "distill.intermediate.num_train_epochs=1"],
    ],
)
def test_a_stopped_student_ends_with_the_same_bits(make, monkeypatch, alive, options):
    options = ["distill.method=hrkd", "teacher.kind=mix", ALL, *options]
    options += ["distill.training.per_device_train_batch_size=4"]
    whole, again = assert_goes_on_to_the_same_bits(make, monkeypatch, options, looks=3)
    assert losses(whole) == losses(again)


SHARDED = {
    "replicated": [],
    "gradients sharded": ["student.zero=2"],
    "all sharded": ["student.zero=3", EVERY_WEIGHT],
}


def worker(source: Path, folder: Path) -> None:
    """A student in every variant, by the processes of this world."""
    world = join_world()
    with pytest.MonkeyPatch.context() as patch:
        make_lively(patch)
        if world.is_main:
            write_config(source, folder, "two")
        world.barrier()
        for number, options in enumerate(SHARDED.values()):
            config = load_config(str(folder / "two.yaml"), [*STUDENT, *options])
            [place] = Run(config, world, Console(quiet=True)).distill()
            if world.is_main:
                shutil.copytree(place, folder / str(number))
            world.barrier()


STUDENT = [
    "distill.method=hrkd",
    "teacher.kind=mix",
    "teacher.training.per_device_train_batch_size=4",
    "distill.training.per_device_train_batch_size=4",
    "distill.training.max_steps=8",
    "distill.training.num_train_epochs=2",
    ALL,
]


def test_two_processes_equal_one_at_every_stage_of_zero(source, tmp_path, make, alive):
    run_ranks(2, worker, source, tmp_path)
    accumulated = [
        f"{block}.training.gradient_accumulation_steps=2" for block in ("teacher", "distill")
    ]
    [place] = make(*STUDENT, *accumulated, output="one").distill()
    steps = [row for row in rows_of(place / "log.jsonl") if row["split"] == "train"]
    assert len(steps) == 8 and max(row["relations_std"] for row in steps) > 1e-3
    for number, name in enumerate(SHARDED):
        log = tmp_path / str(number) / "log.jsonl"
        found = [row for row in rows_of(log) if row["split"] == "train"]
        # A sum over processes rounds otherwise than one, and AdamW makes the most of it where a
        # gradient is near zero: on AVX2 1.3e-4 of one weight by the seventh step, 0 of most.
        for key, (until, rtol) in product(("loss", "relations"), ((4, 2e-5), (8, 5e-4))):
            torch.testing.assert_close(
                *(torch.tensor([row[key] for row in rows[:until]]) for rows in (found, steps)),
                rtol=rtol,
                atol=1e-5,
                msg=lambda text, name=name, key=key: f"{name}, {key}: {text}",
            )
