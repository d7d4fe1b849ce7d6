"""Which encoders can be teachers and students: ``python -m benchmarks.models [NAME...]``.

A tiny model of each architecture, with random weights, is the teacher of one epoch of each method
on a made-up corpus; its students have its own layers. Each ends with a student, whose logits of a
text alone and in a batch are compared, or with a refusal before anything is trained. Students are
exported to ONNX and compared with PyTorch on batches of several shapes. Writes
``docs/results/models.md``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from rich.console import Console

import metakd
from benchmarks.run import environment, heading
from metakd.demo import train_tokenizer, write_corpus
from metakd.deploy import Predictor
from metakd.deploy.engines import open_engine
from metakd.deploy.export import write_files
from metakd.errors import MetakdError
from metakd.pipeline.table import markdown_table

OUT = Path(__file__).resolve().parents[1] / "docs" / "results" / "models.md"
METHODS = ("logits_kd", "tinybert_kd", "minilmv2", "meta")
SHAPES = ((1, 1), (1, 512), (33, 7))
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
}
MODERN = {"num_hidden_layers": 6, "global_attn_every_n_layers": 3, "local_attention": 16}
DECODER = {"num_key_value_heads": 2}
TEACHERS: dict[str, tuple[str, dict]] = {
    "BERT": ("BertConfig", {}),
    "DeBERTa-v2": ("DebertaV2Config", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "MPNet": ("MPNetConfig", {"max_position_embeddings": 514}),
    "RoBERTa": ("RobertaConfig", {"max_position_embeddings": 514, "type_vocab_size": 1}),
    "XLM-R": ("XLMRobertaConfig", {"max_position_embeddings": 514, "type_vocab_size": 1}),
    "ModernBERT": ("ModernBertConfig", MODERN),
    "ELECTRA": ("ElectraConfig", {"embedding_size": 16}),
    "ALBERT": ("AlbertConfig", {"embedding_size": 16}),
    "DistilBERT": ("DistilBertConfig", {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}),
    "Llama": ("LlamaConfig", DECODER),
    "Qwen2": ("Qwen2Config", DECODER),
    "GPT-2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "FNet": ("FNetConfig", {"tpu_short_seq_length": 512}),
    "Longformer": ("LongformerConfig", {"max_position_embeddings": 514, "attention_window": 16}),
}
WITHOUT_PADDING = ("Llama", "Qwen2", "GPT-2")  # as their tokenizers are published
ABOUT = """# Models

Made by `python -m benchmarks.models`: a tiny model of each architecture with random weights, as
teacher and, with some of its layers, as student, on a CPU. A figure is the largest difference of a
logit, as a part of the largest: of a text alone and in a batch; of the ONNX file and PyTorch on
batches of 1 x 1, 1 x 512 and 33 x 7 tokens."""
STUDENTS = {
    "ModernBERT": {"layers": [1, 3, 5]},
    "ALBERT": {"preset": "tiny-2l-128"},  # its layers share their weights
}


def write_teacher(name: str, texts: list[str], folder: Path) -> None:
    """An encoder of an architecture in ``TEACHERS`` with its tokenizer."""
    tokenizer = train_tokenizer(texts, vocab_size=SIZES["vocab_size"])
    pad = tokenizer.pad_token_id
    kind, options = TEACHERS[name]
    ends = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    if name in WITHOUT_PADDING:
        tokenizer.eos_token, tokenizer.pad_token, pad = tokenizer.sep_token, None, None
    config = getattr(transformers, kind)(**SIZES | {"pad_token_id": pad} | ends | options)
    torch.manual_seed(0)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def settings(teacher: Path, corpus: Path, name: str, method: str) -> dict:
    """A run of one student for one epoch."""
    files = {key: str(corpus / f"{key}.jsonl") for key in ("train", "validation", "test")}
    once = {"num_train_epochs": 1, "learning_rate": 1e-3}
    return {
        "output_dir": str(teacher.with_name(f"{teacher.name}-run")),
        "data": {"max_length": 24, **files},
        "teacher": {"model": str(teacher), "training": once},
        "student": STUDENTS.get(name, {"layers": [1]}),
        "distill": {
            "method": method,
            "domains": ["hiking"],
            "relation_heads": 4,
            "training": once,
        },
        "report_to": ["jsonl"],
    }


def company(folder: Path, texts: list[str]) -> float:
    """The largest difference of a logit, as a part of the largest, alone and in a batch."""
    predictor = Predictor(folder, engine="eager", device="cpu")
    return apart(predictor.logits(texts), np.concatenate([predictor.logits([t]) for t in texts]))


def apart(first: np.ndarray, second: np.ndarray) -> float:
    """The largest difference, as a part of the largest value."""
    return float(np.abs(first - second).max() / np.abs(first).max())


def parity(folder: Path, scratch: Path) -> float:
    """The largest difference of a logit of the exported model on batches of ``SHAPES``, the last
    with padding, as a part of the largest."""
    model = Predictor(folder, engine="eager", device="cpu").engine.model
    write_files(model, scratch)
    engines = open_engine("eager", folder), open_engine("onnx", scratch)
    worst = 0.0
    for batch, length in SHAPES:
        generator = np.random.default_rng(batch * length)
        filled = {name: np.zeros((batch, length), np.int64) for name in engines[1].inputs}
        filled["input_ids"][:] = generator.integers(10, 200, (batch, length))
        lengths = generator.integers(1, length + 1, (batch, 1)) if batch > 1 else length
        filled["attention_mask"][:] = np.arange(length) < lengths
        filled["input_ids"][filled["attention_mask"] == 0] = model.config.pad_token_id or 0
        answers = [engine({n: filled[n] for n in engine.inputs}) for engine in engines]
        worst = max(worst, apart(*answers))
    return worst


def said(work: Callable[[], float | str]) -> str:
    """What came of it: a figure, or the reason why not."""
    try:
        found = work()
    except MetakdError as error:
        return "refused: " + error.cause.splitlines()[-1].strip().split("; ")[0]
    return found if isinstance(found, str) else f"{found:.0e}"


def rows_of(name: str, corpus: Path, texts: list[str], folder: Path) -> list[list[str]]:
    """A row of the table for each method."""
    teacher = folder / name.lower()
    write_teacher(name, texts, teacher)
    rows = []
    for method in METHODS:
        students: list[Path] = []

        def train(method=method, students=students) -> str:
            result = metakd.run(
                settings(teacher, corpus, name, method), console=Console(quiet=True)
            )
            students += [place for places in result.students.values() for place in places]
            return "works"

        row = [name, method, said(train), "", ""]
        if students:
            row[3] = said(lambda students=students: company(students[0], texts[:16]))
        if students and method == METHODS[0]:
            row[4] = said(lambda students=students: parity(students[0], folder / f"{name}-onnx"))
        rows.append([cell.replace(str(folder) + "/", "") for cell in row])
    return rows


def main() -> None:
    """Print the table, and write it where all architectures are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    names = parser.parse_args().names or list(TEACHERS)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_corpus(folder / "corpus", train=12, validation=4, test=6)
        lines = (folder / "corpus" / "train.jsonl").read_text().splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        for name in names:
            since = time.perf_counter()
            rows += rows_of(name, folder / "corpus", texts, folder)
            print(f"{name}: {time.perf_counter() - since:.0f} s", flush=True)
    columns = ["teacher", "method", "outcome", "alone and in a batch", "ONNX and PyTorch"]
    table = markdown_table(columns, rows)
    print(table)
    if set(names) == set(TEACHERS):
        about = "\n".join(heading(environment("cpu", torch.get_num_threads())))
        OUT.write_text(f"{ABOUT}\n\n{about}\n\n{table}\n")


if __name__ == "__main__":
    main()
