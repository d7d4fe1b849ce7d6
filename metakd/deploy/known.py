"""Tokenizer and shape of a folder, asked of transformers or known from its export: whoever serves
from ONNX, by the same version and from the same files, need not wait for ``AutoConfig`` and
``AutoTokenizer``, which import torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metakd.deploy.formats import EXPORT_REPORT, ONNX_FOLDER
from metakd.models.adapters import base_of
from metakd.models.inputs import positions

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# From these transformers finds the shape, and which of its tokenizers it is.
_READ = ("config.json", "tokenizer_config.json", "tokenizer.json")


@dataclass(frozen=True)
class Shape:
    """What serving has to know of a model's configuration.

    Args:
        labels: names of the outputs, in order.
        problem_type: see ``method.tasks``.
        vocab_size: tokens that it knows.
        pad_token_id: that its configuration names.
        positions: tokens that it has positions for, None where there is no limit.
    """

    labels: list[str]
    problem_type: str | None
    vocab_size: int
    pad_token_id: int | None
    positions: int | None

    @classmethod
    def of(cls, config: PretrainedConfig) -> Shape:
        """That of a configuration."""
        labels = [config.id2label[number] for number in range(config.num_labels or 0)]
        size = getattr(config, "vocab_size", 0)
        rest = config.problem_type, size, config.pad_token_id, positions(config)
        return cls(labels, *rest)


def ask(folder: Path) -> tuple[PreTrainedTokenizerBase, Shape]:
    """Tokenizer and shape of a folder, from transformers.

    Raises:
        ValueError: one of them cannot be used.
        OSError: there is none.
    """
    # Here and not above, since torch and transformers take seconds to import.
    from metakd.models.sources import load_config, load_tokenizer

    return load_tokenizer(str(folder)), Shape.of(load_config(str(folder)))


def note(*folders: Path) -> dict[str, Any]:
    """What ``ask`` finds in these folders, for the report of an export."""
    made = {}
    for folder in folders:
        tokenizer, shape = ask(folder)
        made[_digest(folder)] = {"tokenizer": type(tokenizer).__name__, "shape": asdict(shape)}
    return {"transformers": metadata.version("transformers"), "made": made}


def look_up(folder: Path) -> tuple[PreTrainedTokenizerBase, Shape] | None:
    """Tokenizer and shape of an exported folder, or of its export, without torch; None where they
    have to be asked for: nobody has noted them, or they were other files, or another version."""
    try:
        places = (folder / ONNX_FOLDER / EXPORT_REPORT, folder / EXPORT_REPORT)
        noted = json.loads(next(filter(Path.exists, places)).read_text("utf-8"))["known"]
        made = noted["made"][_digest(folder)]
        if noted["transformers"] != metadata.version("transformers") or base_of(str(folder)):
            return None
        import transformers

        kind = getattr(transformers, made["tokenizer"])
        # A file names it: nothing but a tokenizer of transformers' own.
        if not issubclass(kind, transformers.PreTrainedTokenizerBase):
            return None
        return kind.from_pretrained(str(folder), trust_remote_code=False), Shape(**made["shape"])
    except Exception:  # who asks is told what is wrong with the folder
        return None


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in _READ:
        file = folder / name
        content = file.read_bytes() if file.exists() else b""
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()
