"""Texts to labels, fast: ``Predictor("students/.../books")(["a fine book"])``.

Texts are tokenised together, sorted by length and run in batches of about as many tokens each, so
that next to nothing is spent on padding; answers come back in the order of the texts. Who
serves what ``export_onnx`` has made needs no torch for it, see ``known``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from metakd.config.places import meant
from metakd.deploy.engines import Engine, open_engine, why_not
from metakd.deploy.formats import ENGINES, ONNX_FILES
from metakd.deploy.known import Shape, ask, look_up
from metakd.environment import has_cuda
from metakd.errors import CheckpointError, DataError, UnsupportedError, listing
from metakd.method.tasks import Answer, Task, task_of
from metakd.models.inputs import SAME, SIDES, Inputs, differing, knows_words, see_that_it_pads
from metakd.pipeline.published import check_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Text = str | tuple[str, str]

# Fastest first, of those that answer as the trained model does: int8 has to be asked for.
FASTEST = (("cuda", "cudagraph"), ("cuda", "onnx"), ("cpu", "onnx"), ("cpu", "eager"))

BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
_STUDENTS_SHOWN = 8
_EXACT = ("eager", "compile", "cudagraph", "onnx")  # of the engines, those that do not round
_SORTED_AT_ONCE = 8192  # texts; bounds the memory of a long list


class Predictor:
    """A student, or any sequence classifier that was saved with its tokenizer, ready to serve, from
    several threads at once if need be.

    Args:
        folder: the student's folder, or what ``export_onnx`` made of it.
        engine: one of ``formats.ENGINES``; ``auto`` takes the fastest that is here and gives the
            labels of the trained model.
        device: ``cpu`` or ``cuda``; None takes a GPU where there is one.
        threads: on a CPU; None leaves the library's choice, every core.
        batch_tokens: tokens of a batch, padding included; None takes what suits the device.
        max_length: tokens of a text that are read; None reads as many as the tokenizer's
            ``model_max_length`` says, for a student those it was trained on. Never more than the
            model has positions for.

    Raises:
        ConfigError: there is no such engine.
        UnsupportedError: the engine cannot run this model here, with the reason.
        CheckpointError: the folder holds no classifier with its tokenizer, or a damaged one, or one
            that was changed since its run published it.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        engine: str = "auto",
        device: str | None = None,
        threads: int | None = None,
        batch_tokens: int | None = None,
        max_length: int | None = None,
    ):
        folder, asked = Path(folder), engine
        device, engine = _choose(folder, device, engine)
        self.tokenizer, self.shape = _read(folder, weights=engine not in ONNX_FILES)
        with suppress(ValueError):  # without any, as long as the model does not look for one
            see_that_it_pads(str(folder), self.tokenizer)
        self.labels, self.task = self.shape.labels, _task(self.shape)

        def opened(name: str) -> Engine:
            found = open_engine(name, folder, device=device, threads=threads)
            if self.shape.pad_token_id is None and hasattr(found, "model"):
                found.model.config.pad_token_id = self.tokenizer.pad_token_id or 0
            return found

        self.engine, self.engine_name = opened(engine), engine
        self._batch_tokens = batch_tokens or BATCH_TOKENS[device]
        longest = max_length or self.tokenizer.model_max_length
        self._max_length = min(longest, self.shape.positions or longest)
        self._padding = self._find_padding()
        if self._padding is None and self.engine.padded_shape(1, 1) != (1, 1):
            if asked == engine:
                raise UnsupportedError(
                    f"engine {engine}: fills batches up, and what this model says of a text "
                    "depends on the padding beside it",
                    "use engine eager",
                )
            del self.engine
            self.engine, self.engine_name = opened("eager"), "eager"

    def _find_padding(self) -> tuple[int, str] | None:
        """Token and side under which an answer does not depend on the texts beside it, which the
        tokenizer then has, for who saves it; None where there is no such padding, so that only
        texts of one length can share a batch."""
        size = self.shape.vocab_size
        known = self.tokenizer.pad_token_id, self.shape.pad_token_id, 0
        numbers = [n for n in dict.fromkeys(known) if n is not None and 0 <= n < size]
        if self.engine_name not in _EXACT:
            return numbers[0], self.tokenizer.padding_side
        names, limit = self.engine.inputs, self._max_length
        for side in SIDES:
            for pad in numbers:
                found = differing(self.engine.plainly, self.tokenizer, names, pad, side, limit)
                if found < SAME:
                    self.tokenizer.padding_side = side
                    return pad, side
        return None

    def __call__(self, texts: Sequence[Text]) -> list[Answer]:
        """The class of each text, a ``Prediction``; where the model's task is another, its classes,
        ``Labels``, or its number, ``Value``. Of two texts each where they are pairs.

        Raises:
            DataError: something among them is no text.
        """
        return list(self.task.answers(self.logits(texts).astype(np.float64), self.labels))

    def with_model(self, model: PreTrainedModel) -> Predictor:
        """The same, running another PyTorch model.

        Raises:
            ValueError: the engine is not ``eager``; the others hold what they have made of theirs.
        """
        if self.engine_name != "eager":
            raise ValueError(f"engine: {self.engine_name} keeps its model, use eager")
        other = copy.copy(self)
        other.engine = copy.copy(self.engine)
        other.engine.model = model
        return other

    def logits(self, texts: Sequence[Text]) -> np.ndarray:
        """Logits [N, M] of N texts, float32.

        Raises:
            DataError: something among them is no text.
        """
        check_texts(texts)
        logits = np.empty((len(texts), len(self.labels)), np.float32)
        for start in range(0, len(texts), _SORTED_AT_ONCE):
            part = slice(start, start + _SORTED_AT_ONCE)
            self._run(texts[part], logits[part])
        return logits

    def batches(self, texts: Sequence[Text]) -> Iterator[Inputs]:
        """What the engine is given for N texts, longest first.

        Raises:
            DataError: something among them is no text.
        """
        check_texts(texts)
        return (batch for _, batch in self._batches(texts))

    def _run(self, texts: Sequence[Text], logits: np.ndarray) -> None:
        for rows, batch in self._batches(texts):
            logits[rows] = self.engine(batch)[: len(rows)]

    def _batches(self, texts: Sequence[Text]) -> Iterator[tuple[np.ndarray, Inputs]]:
        """Padded batches, and which of the texts are in each."""
        tokens = self.tokenizer(
            list(texts), truncation=True, max_length=self._max_length, return_attention_mask=False
        )
        lengths = np.array([max(1, len(ids)) for ids in tokens["input_ids"]])
        order = np.argsort(lengths, kind="stable")
        while len(order):
            # As many of the longest as fit: those left behind are never longer.
            longest = int(lengths[order[-1]])
            count = self.engine.texts_at_once(self._batch_tokens, longest)
            if self._padding is None:
                count = min(count, int((lengths[order] == longest).sum()))
            rows, order = order[-count:], order[:-count]
            yield rows, self._pad(tokens, lengths, rows)

    def _pad(self, tokens: dict, lengths: np.ndarray, rows: np.ndarray) -> Inputs:
        shape = self.engine.padded_shape(len(rows), int(lengths[rows].max()))
        batch = {name: np.zeros(shape, np.int64) for name in self.engine.inputs}
        pad, side = self._padding or (0, "right")  # of one length: nothing is filled up
        batch["input_ids"][:] = pad
        batch["attention_mask"][len(rows) :, 0] = 1  # rows that only fill up see something, too
        for place, row in enumerate(rows):
            # A text in which the tokenizer finds nothing is one token of padding.
            found = {name: tokens[name][row] for name in batch.keys() & tokens.keys()}
            for name, values in (found | {"attention_mask": [1] * lengths[row]}).items():
                start = 0 if side == "right" else shape[1] - len(values)
                batch[name][place, start : start + len(values)] = values
        return batch


def _read(folder: Path, weights: bool) -> tuple[PreTrainedTokenizerBase, Shape]:
    """Tokenizer and shape; of a stage of a run, after its files were compared with what was
    published, with or without its weights."""
    remedy = "give the folder of a student, or of its export, with its tokenizer"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder{meant(folder)}", remedy)
    if inside := sorted(folder.glob("students/*/*/config.json")):
        listed = listing([str(file.parent) for file in inside], _STUDENTS_SHOWN)
        raise CheckpointError(f"{folder}: is a run with several models", f"give {listed}")
    check_folder(folder, weights=weights)
    try:
        tokenizer, shape = (None if weights else look_up(folder)) or ask(folder)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0].removeprefix(f"{folder}: ")
        raise CheckpointError(f"{folder}: {reason}", remedy) from error
    if not knows_words(tokenizer):
        raise CheckpointError(f"{folder}: holds no tokenizer", remedy)
    if wrong := _task(shape).misfit(len(shape.labels)):
        raise CheckpointError(f"{folder}: its model has {wrong}", remedy)
    return tokenizer, shape


def task_at(folder: str | Path) -> Task:
    """What the model of a folder is for.

    Raises:
        CheckpointError: the folder holds no classifier with its tokenizer, or a damaged one.
    """
    return _task(_read(Path(folder), weights=False)[1])


def _task(shape: Shape) -> Task:
    return task_of(shape.problem_type, len(shape.labels))


def _choose(folder: Path, device: str | None, engine: str) -> tuple[str, str]:
    """Device and engine, where they are left open."""
    if engine != "auto":
        return device or ("cuda" if has_cuda() else "cpu"), engine
    for on, name in FASTEST:
        if device in (None, on) and why_not(name, folder, on) is None:
            return on, name
    return device or "cpu", ENGINES[0]


def check_texts(texts: Sequence[Text]) -> None:
    """
    Raises:
        DataError: they are neither all texts nor all pairs of texts.
    """
    if isinstance(texts, str):
        raise DataError("texts: is one text, not a list of texts", "write [text]")
    pairs = len(texts) > 0 and not isinstance(texts[0], str)
    for number, text in enumerate(texts):
        parts = text if pairs and isinstance(text, tuple) and len(text) == 2 else (text,)
        if len(parts) != 1 + pairs or not all(map(_is_text, parts)):
            wanted = "a pair of texts" if pairs else "a text"
            raise DataError(f"texts[{number}]: {text!r:.60} is not {wanted}", "correct it")


def _is_text(value) -> bool:
    """Half of a surrogate pair, as Python makes of a byte that is no UTF-8, is no character."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)
