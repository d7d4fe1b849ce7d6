"""What the documents promise: the example runs, and each named test exists."""

import copy
import re
from pathlib import Path

import pytest
import torch

import metakd

ROOT = Path(__file__).resolve().parents[1]


def example(page: str, beginning: str) -> dict:
    """What the example of this page defines that begins so, run; its source as ``source``."""
    text = next(path for path in (ROOT / page, ROOT / "docs" / page) if path.exists())
    block = rf"```python\n({beginning}.*?)```"
    source = re.search(block, text.read_text(encoding="utf-8"), re.DOTALL).group(1)
    exec(compile(source, page, "exec"), found := {})
    return found | {"source": source}


def test_the_readme_example_learns(capsys):
    source = example("README.md", "import torch\n")["source"]
    assert len(source.splitlines()) == 15
    assert float(capsys.readouterr().out) < 1e-3


def test_every_test_named_in_the_method_exists():
    written = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/test_*.py"))
    method = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    named = re.findall(r"(?:::|`)(test_\w+)`", method)
    assert len(named) > 30
    assert [name for name in named if f"def {name}(" not in written] == []


def test_linked_files_exist():
    for page in (ROOT / "README.md", *ROOT.glob("docs/*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (page.parent / link).exists(), link


@pytest.fixture
def trainer_gradient(tmp_path):
    """``trainer_gradient(cls, size)``: the gradient of one step over six texts, ``size`` at a time,
    by a Trainer of this class."""
    pytest.importorskip("accelerate", reason="transformers.Trainer needs it")
    from transformers import (
        BertConfig,
        BertForTokenClassification,
        TrainerCallback,
        TrainingArguments,
    )

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        num_hidden_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.5,
    )
    teacher, student = BertForTokenClassification(config), BertForTokenClassification(config)
    texts = [
        {
            "input_ids": torch.randint(1, 50, (12,)),
            "attention_mask": (torch.arange(12) < length).long(),
            "labels": torch.randint(3, (12,)).where(torch.arange(12) < length, -100),
        }
        for length in (2, 4, 12, 10, 1, 4)
    ]

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **rest):
            self.found = torch.cat([p.grad.flatten() for p in model.parameters()])

    def gradient(cls, size):
        keep = Keep()
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=len(texts) // size,
            max_steps=1,
            max_grad_norm=0.0,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        model = copy.deepcopy(student)
        options = {"teacher": teacher, "train_dataset": texts, "callbacks": [keep]}
        cls(model, arguments, **options).train()
        return keep.found

    return gradient


def test_sums_over_micro_batches_are_the_big_batch():
    student, teacher = torch.nn.Linear(8, 5), torch.nn.Linear(8, 5).requires_grad_(False)
    inputs, mask = torch.randn(9, 8), torch.arange(9) != 4
    metakd.soft_kl(student(inputs), teacher(inputs), mask=mask).backward()
    wanted = student.weight.grad.clone()
    student.zero_grad()
    parts = [(inputs[part], mask[part]) for part in (slice(2), slice(2, 8), slice(8, 9))]
    example("losses.md", "import metakd\n\n\ndef")["accumulate"](student, teacher, parts)
    torch.testing.assert_close(student.weight.grad, wanted, rtol=3e-7, atol=3e-8)


def test_the_trainer_of_the_docs_accumulates_to_the_big_batch(trainer_gradient):
    trainer = example("losses.md", "import torch\n")["DistillationTrainer"]

    class Means(trainer):
        """Takes the mean of each micro-batch, and of them the mean."""

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            mean = super().compute_loss(model, inputs, return_outputs)
            return mean / self.args.gradient_accumulation_steps

    whole = trainer_gradient(trainer, 6)

    def off(cls):
        return ((trainer_gradient(cls, 2) - whole).norm() / whole.norm()).item()

    assert off(trainer) < 3e-7
    assert off(Means) > 0.1  # 0.20
