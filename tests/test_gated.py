"""Teachers that are listened to as a gate says: its loss by hand, what it reads and learns,
runs."""

import math

import pytest
import torch
from processes import run_command, run_ranks
from safetensors.torch import load_file
from tiny_runs import (
    assert_goes_on_to_the_same_bits,
    losses,
    rows_of,
    write_config,
)
from torch.nn.functional import one_hot

from metakd.config import DistillConfig
from metakd.method.gate import Gate, entropy, mixture_divergence
from metakd.method.methods import build_terms
from metakd.method.objective import Distillation
from metakd.method.tasks import TASKS
from metakd.method.teachers import FrozenTeacher, Teacher
from metakd.method.terms import GatedTerm
from metakd.models.taps import Features

ONE, MANY, NUMBER = (TASKS[name] for name in ("single_label", "multi_label", "regression"))


def odds(values) -> torch.Tensor:
    return torch.tensor(values).log()


# The term


def test_its_loss_by_hand():
    """Two teachers (3/4, 1/4) and (1/4, 3/4), heard alike by a student of (3/4, 1/4)."""
    mask = torch.ones(1, 1)
    seen = Features(mask, logits=odds([[9.0, 1.0]]), gate=torch.tensor([[0.5, 0.5]]))
    taught = Features(mask, votes=odds([[[9.0, 1.0], [1.0, 9.0]]]))
    kl = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    for options, scale in (({}, 4), ({"scale_by_temperature": False}, 1)):
        term = GatedTerm(temperature=2.0, entropy=0.3, **options)
        rows = term.rows(seen, taught, {}, None)
        assert rows.tolist() == pytest.approx([scale * kl - 0.3 * math.log(2)])


def test_entropy_of_shares():
    shares = torch.tensor([[0.25, 0.75], [1.0, 0.0]], requires_grad=True)
    found = entropy(shares)
    expected = [-0.25 * math.log(0.25) - 0.75 * math.log(0.75), 0.0]
    assert found.tolist() == pytest.approx(expected)
    assert torch.autograd.grad(found.sum(), shares)[0].isfinite().all()


def test_of_several_classes_each_is_mixed_by_itself():
    student, votes = torch.randn(4, 3), torch.randn(4, 2, 3)
    shares = torch.rand(4, 2).softmax(-1)
    q = (student / 2).sigmoid()
    p = (shares[:, :, None] * (votes / 2).sigmoid()).sum(1)
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    found = mixture_divergence(MANY, student, votes, shares, temperature=2.0)
    torch.testing.assert_close(found, 4 * kl.mean(-1))


def test_numbers_have_no_mixture():
    config = DistillConfig(method="gated_kd")
    with pytest.raises(ValueError, match="gated: regression has no probabilities to mix"):
        build_terms(config, student_layers=2, teacher_layers=2, task=NUMBER)


def test_the_settings_reach_the_term():
    config = DistillConfig(method="gated_kd", gate_entropy=0.7, temperature=3.0)
    [term] = build_terms(config, student_layers=2, teacher_layers=2)
    assert (term.entropy, term.temperature, term.needs) == (0.7, 3.0, {"votes"})
    assert not term.compares_tokens


# The gate


@pytest.mark.parametrize("task", [ONE, MANY])
def test_shares_are_the_equation(task):
    gate, pooled, votes = Gate(5, 3, 2, task, 0.5).eval(), torch.randn(4, 5), torch.randn(4, 3, 2)
    told = votes.softmax(-1)
    if task is MANY:
        told = torch.stack([votes.sigmoid(), 1 - votes.sigmoid()], -1)
    read = torch.cat([pooled, told.flatten(1)], 1)
    inner = (read @ gate.first.weight.T + gate.first.bias).clamp(min=0)
    assert inner.shape == (4, 128)
    expected = (inner @ gate.second.weight.T + gate.second.bias).softmax(-1)
    torch.testing.assert_close(gate(pooled, votes), expected)
    assert not torch.allclose(gate.train()(pooled, votes), expected), "dropout"


class Scene:
    """Two teachers of two domains' texts: of its own each thinks as the student does, of others it
    is sure of the class that the student finds less likely."""

    def __init__(self, tiny_bert, make_batch, **options):
        self.batch = make_batch(rows=12, domains=2)
        self.student = tiny_bert()
        self.module = Distillation(
            self.student, [GatedTerm(**options)], num_domains=2, num_teachers=2
        )
        tokens = {n: self.batch[n] for n in ("input_ids", "attention_mask", "token_type_ids")}
        own = self.student(**tokens).logits.detach()
        other = 20.0 * one_hot(own.argmin(-1), 2)
        self.domain = self.batch["domain"]
        right = torch.stack([self.domain == 0, self.domain == 1], 1)[:, :, None]
        self.votes = torch.where(right, own[:, None], other[:, None])

    def output(self):
        return self.module(self.batch, Features(self.batch["attention_mask"], votes=self.votes))

    def own_share(self) -> torch.Tensor:
        """[B], of the teacher of the text's domain."""
        shares = []
        handle = self.module.gate.register_forward_hook(lambda *seen: shares.append(seen[2]))
        self.output()
        handle.remove()
        return shares[0].detach().gather(1, self.domain[:, None])[:, 0]


@pytest.mark.parametrize("entropy_bonus", [0.0, 100.0])
def test_the_gate_learns_whom_to_listen_to(tiny_bert, make_batch, entropy_bonus):
    """The teacher that the student can follow; with a bonus that outweighs it, both."""
    scene = Scene(tiny_bert, make_batch, entropy=entropy_bonus)
    before = scene.own_share()
    assert 0.3 < before.mean() < 0.7
    optimizer = torch.optim.Adam(scene.module.gate.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        scene.output().rows.mean().backward()
        optimizer.step()
    found = scene.own_share()
    if entropy_bonus:
        torch.testing.assert_close(found, torch.full((12,), 0.5), rtol=0, atol=0.1)
    else:
        assert found.min() > 0.8


def test_student_and_gate_learn_from_one_loss_and_only_the_student_is_kept(tiny_bert, make_batch):
    scene = Scene(tiny_bert, make_batch)
    output = scene.output()
    output.rows.mean().backward()
    for weight in (*scene.module.gate.parameters(), scene.student.classifier.weight):
        assert weight.grad.abs().sum() > 0
    shares = output.terms["gate_shares"]
    torch.testing.assert_close(shares.sum(1), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(shares.diagonal().sum(), scene.own_share().mean())
    assert 0 < output.terms["gate_entropy"] <= math.log(2)
    kept = scene.module.detach()
    assert kept is scene.student and not any("gate" in name for name in kept.state_dict())


def test_the_student_does_not_learn_to_please_its_gate(tiny_bert, make_batch):
    """The gate reads the student, which feels nothing of it: by the entropy alone it learns
    nothing."""
    scene = Scene(tiny_bert, make_batch, entropy=1.0)
    scene.votes = scene.votes.mean(1, keepdim=True).expand(-1, 2, -1)  # whoever is heard
    scene.output().rows.mean().backward()
    felt = scene.student.bert.embeddings.word_embeddings.weight.grad
    scene.student.zero_grad()
    scene.module.terms = [GatedTerm(entropy=0.0)]
    scene.output().rows.mean().backward()
    assert torch.equal(felt, scene.student.bert.embeddings.word_embeddings.weight.grad)


def test_votes_are_the_logits_of_each(tiny_bert, make_batch):
    trio, batch = [Teacher(tiny_bert(), "single", ["a", "b", "c"]) for _ in range(3)], make_batch()
    seen = FrozenTeacher(trio, frozenset({"votes"}))(batch)
    for number, teacher in enumerate(trio):
        torch.testing.assert_close(seen.votes[:, number], teacher.logits(batch))
    torch.testing.assert_close(seen.logits, seen.votes.mean(1))
    assert FrozenTeacher(trio, frozenset({"logits"}))(batch).votes is None


# Runs

# Two teachers, with something to say.
RUN = ["distill.method=gated_kd", "data.withhold=[novels,software]",
       "teacher.training.num_train_epochs=6"]  # fmt: skip
HIKING = ["distill.domains=[hiking]", "distill.training.per_device_train_batch_size=4"]


def test_a_run_says_who_was_listened_to(make):
    run = make(*RUN, "distill.one_student_for_all=true",
               "distill.training.per_device_train_batch_size=16")  # fmt: skip
    [place] = run.distill()
    steps = [row for row in rows_of(place / "log.jsonl") if row["split"] == "train"]
    for row in steps:
        shares = torch.tensor(row["gate_shares"])
        assert shares.shape == (4, 2) and shares.sum().item() == pytest.approx(1.0)
        assert 0 < row["gate_entropy"] <= math.log(2) + 1e-6
    weights = load_file(place / "model.safetensors")
    assert not any("gate" in name for name in weights)


def test_a_stopped_run_ends_with_the_same_bits(make, monkeypatch):
    """Its gate, with dropout, is in the checkpoint."""
    options = [*RUN, *HIKING, "distill.training.num_train_epochs=2",
               "distill.temperature_schedule=gradient"]  # fmt: skip
    whole, again = assert_goes_on_to_the_same_bits(make, monkeypatch, options)
    told = ("loss", "gate_shares", "temperature")
    seen = [[[row[n] for n in told] for row in rows_of(p / "log.jsonl") if "loss" in row]
            for p in (whole, again)]  # fmt: skip
    assert seen[0] == seen[1] and len(seen[0]) == 6


def test_at_every_zero_stage(make):
    """Of the student alone, so that the teachers are the same."""
    every_weight = "deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"
    options = [*RUN, *HIKING, "distill.training.gradient_accumulation_steps=2", every_weight]
    seen = []
    for zero in (0, 2, 3):
        [place] = make(*options, f"student.zero={zero}").distill()
        seen.append(torch.tensor(losses(place)["."]))
        torch.testing.assert_close(seen[-1], seen[0], rtol=0, atol=1e-5)
    assert len(seen[0]) == 2


def test_two_processes_equal_one(source, tmp_path):
    """At one temperature, which moves with the losses of both."""
    options = [*RUN, *HIKING, "distill.gate_dropout=0", "distill.temperature_schedule=gradient",
               "distill.terms.hard_label=1", "distill.training.num_train_epochs=2"]  # fmt: skip
    for processes in (1, 2):
        sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3 - processes}
        path = write_config(source, tmp_path, f"{processes}")
        blocks = [f"{block}.training.{key}={value}" for block in ("teacher", "distill")
                  for key, value in sizes.items()]  # fmt: skip
        run_ranks(processes, run_command, "distill", path, *options, *blocks)
    place = "students/gated_kd-from-single-s42/hiking/log.jsonl"
    seen = [[row for row in rows_of(tmp_path / n / place) if "loss" in row] for n in ("1", "2")]
    assert len(seen[0]) == len(seen[1]) == 4
    for one, two in zip(*seen):
        for name in ("loss", "temperature", "gate_entropy"):
            assert two[name] == pytest.approx(one[name], abs=1e-5)
        torch.testing.assert_close(
            torch.tensor(two["gate_shares"]), torch.tensor(one["gate_shares"]), rtol=0, atol=1e-5
        )
    assert len({row["temperature"] for row in seen[0]}) > 1
