"""Teacher outputs kept on the disk: a frozen teacher is asked once about each training example, and
not again in each epoch of each student and seed.

It may be, because nothing that a teacher sees changes between epochs: batches are cut and padded
otherwise, which moves its answers by rounding alone, while texts, domains and weights stay, and
its dropout is off. What would change is refused: ``compat: easytransfer``, whose dropout is on, and
tokenizers that pad on the left, where positions follow the padding. (False domain labels are drawn
anew each epoch as well, for the training of teachers only.)

One file per signal, unpadded: a row per real token or per example, of all examples one after the
other, so that a batch is a few slices. Files are keyed by all that decides their content and
verified as a whole before use (``metakd.data.cache``). Slices are taken with the batch, ahead of
the loop, so that they travel to the device as the batch does.

Sizes: N examples, T their real tokens, B and L of a batch, H hidden width, A heads, D head width,
M classes, V views of ``Attribution``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig

from metakd.data.batches import Batch, Collate
from metakd.data.cache import Draft, TensorCache, private_folder
from metakd.data.corpus import Split
from metakd.data.digests import content_key
from metakd.errors import CheckpointError
from metakd.method.attribution import Attribution
from metakd.method.terms import ANSWERS, Term
from metakd.models.adapters import DESCRIBED, base_of
from metakd.models.packing import Packing, real_tokens
from metakd.models.taps import ATTENTION_INPUTS, Features
from metakd.training.scoring import in_turns
from metakd.training.world import World

FORMAT = 1  # of the files: a change makes all of them anew
GIB = 2**30
_BY_LAYER = ATTENTION_INPUTS | {"hidden"}
_BY_EXAMPLE = ANSWERS | {"domain"}


class Signal(NamedTuple):
    """One tensor that a teacher shows of every example."""

    feature: str  # of ``Features``
    layer: int | None = None  # 0-based, of a feature that comes per layer
    how: Attribution | None = None  # of scores of tokens

    def __str__(self) -> str:
        told = (self.feature, self.layer, self.how)
        return "-".join(str(part) for part in told if part is not None)


LOGITS = Signal("logits")


def signals_of(terms: Iterable[Term], by_expertise: bool, depth: int) -> frozenset[Signal]:
    """What these terms ask a teacher for.

    Args:
        terms: trained together.
        by_expertise: is there a lambda, which reads the teacher's logits?
        depth: layers of the teacher.
    """
    found = {LOGITS} if by_expertise else set()
    for term in terms:
        for feature in term.needs:
            layers = [n % depth for n in term.layers] if feature in _BY_LAYER else [None]
            how = term.attribution if feature == "attribution" else None
            found |= {Signal(feature, layer, how) for layer in layers}
    return frozenset(found)


def is_kept(signals: frozenset[Signal], mode: str) -> bool:
    """Are all of them kept under this ``distill.cache_teacher``?"""
    return mode == "all" or (mode == "logits" and all(s.feature in ANSWERS for s in signals))


def bytes_of(
    signals: Iterable[Signal],
    split: Split,
    shape: PretrainedConfig,
    classes: int,
    itemsize: int,
    teachers: int = 1,
) -> int:
    """Size of these signals: per real token H values of the embedding and of each hidden layer and
    A D of the queries, keys or values of each; per example M logits, of each teacher where they are
    votes, and H of h_d. Scores of tokens are V numbers a token, in fp32.

    Args:
        signals: to keep.
        split: the examples.
        shape: of the teacher.
        classes: M.
        itemsize: bytes of a value.
        teachers: how many they are.
    """
    head = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    widths = dict.fromkeys(ATTENTION_INPUTS, shape.num_attention_heads * head)
    widths |= {"logits": classes, "votes": teachers * classes}
    tokens = int(split.input_ids.lengths.sum())

    def of(signal: Signal) -> int:
        if signal.how is not None:
            return tokens * signal.how.count(classes) * max(itemsize, 4)
        rows = len(split) if signal.feature in _BY_EXAMPLE else tokens
        return rows * widths.get(signal.feature, shape.hidden_size) * itemsize

    return sum(map(of, signals))


# For ``auto``, deliberately coarse: what decides must not differ from one run to the next on a
# machine, as a measurement would, since students of a live and of a kept teacher differ by
# rounding.
_READ = 1e9  # bytes a second
_COMPUTE = {"cpu": 2e11, "cuda": 2e14}  # operations a second of a teacher's forward pass
_MOST_GIB = 4.0  # that nobody has asked for


def pays(size: int, tokens: int, shape: PretrainedConfig, passes: float, device: str) -> bool:
    """Are these outputs read faster than they are computed, and often enough?

    Args:
        size: bytes of them, see ``bytes_of``.
        tokens: of the texts that they are of, times the teachers.
        shape: of the teacher; what its layers compute is taken for 2 x 12 x layers x H^2 a token.
        passes: over the texts, the first of which makes them.
        device: ``cpu`` or ``cuda``.
    """
    operations = 24 * shape.num_hidden_layers * shape.hidden_size**2 * tokens
    faster = size / _READ < operations / _COMPUTE.get(device, _COMPUTE["cuda"])
    return passes >= 2 and faster and size <= _MOST_GIB * GIB


class CachedTeacher:
    """Stands where a ``FrozenTeacher`` stands: from a batch to its ``Features``.

    Args:
        split: the examples.
        kept: rows of each signal, [T, ...] or [N, ...], memory-mapped.
        depth: layers of the teacher.
    """

    def __init__(self, split: Split, kept: dict[Signal, Tensor], depth: int):
        self._kept = kept
        self._depth = depth
        self._lengths = split.input_ids.lengths
        self._ends = self._lengths.cumsum(0)
        self._rows = torch.full((int(split.index.max()) + 1,), -1)  # by the index of an example
        self._rows[split.index] = torch.arange(len(split))

    def collate(self, collate: Collate) -> Collate:
        """As ``collate``, with the teacher's signals in the batch."""

        def with_signals(examples: list[dict]) -> Batch:
            batch = collate(examples)
            if "real_tokens" not in batch:
                batch["real_tokens"] = real_tokens(batch["attention_mask"])
            rows = self._rows[batch["index"]]
            ends = self._ends[rows].tolist()
            starts = (self._ends - self._lengths)[rows].tolist()
            for signal, values in self._kept.items():
                batch[_column(signal)] = (
                    values[rows]
                    if signal.feature in _BY_EXAMPLE
                    else torch.cat([values[start:end] for start, end in zip(starts, ends)])
                )
            return batch

        return with_signals

    def __call__(self, batch: Batch) -> Features:
        """Features of a batch that ``collate`` has made; zero at padding."""
        packing = Packing(batch["real_tokens"], batch["attention_mask"])
        features = Features(mask=batch["attention_mask"], packing=packing)
        for signal in self._kept:
            if signal.feature in _BY_EXAMPLE:
                setattr(features, signal.feature, batch[_column(signal)])
            elif signal.layer is None:
                setattr(features, signal.feature, packing.unpack(batch[_column(signal)][None]))
        for layer in range(self._depth):
            # A layer that no term asks for keeps its place, empty.
            features.hidden.append(_packed(batch, Signal("hidden", layer)))
            for feature in ATTENTION_INPUTS:
                states = _packed(batch, Signal(feature, layer))  # [1, t, A, D]
                getattr(features, feature).append(
                    None if states is None else states.transpose(1, 2)
                )
        return features


def _column(signal: Signal) -> str:
    return f"teacher.{signal}"


def _packed(batch: Batch, signal: Signal) -> Tensor | None:
    rows = batch.get(_column(signal))
    return None if rows is None else rows[None]


class KeptOutputs:
    """What one teacher, or several together, say of one set of examples.

    Args:
        root: folder of the caches, for its owner alone.
        place: where below it.
        teachers: their folders.
        settings: what else decides the content, as JSON values.
        split: the examples.
        depth: layers of the teacher.
        world: every rank calls every method.
        say: told in a line what was not used, and what was made.
    """

    def __init__(
        self,
        root: Path,
        place: str,
        teachers: Sequence[Path],
        settings: dict,
        split: Split,
        depth: int,
        world: World,
        say: Callable[[str], None],
    ):
        self.folder = root / place
        self._root = root
        self._split = split
        self._depth = depth
        self._world = world
        self._say = say
        self._cache = TensorCache(self.folder, say)
        described = json.dumps({"format": FORMAT, **settings}, sort_keys=True)
        weights = chain.from_iterable(map(_weights, teachers))
        self._key = content_key(described, *_content(split), *weights)
        self._found: dict[Signal, Tensor] = {}

    def missing(self, signals: Iterable[Signal]) -> frozenset[Signal]:
        """Those of the signals that a rank does not find whole and made from the same."""
        for signal in sorted(set(signals) - self._found.keys(), key=str):
            if found := self._cache.get(str(signal), self._key_of(signal), mapped=True):
                self._found[signal] = found[0][Draft.TENSOR]
        lacking = frozenset(signals) - self._found.keys()
        return lacking.union(*self._world.gather(lacking))

    def make(
        self,
        signals: frozenset[Signal],
        show: Callable[[Batch], Features],
        collate: Collate,
        batch_size: int,
    ) -> None:
        """Ask the teacher about every example once; ranks share the work.

        Args:
            signals: to keep.
            show: from a batch to these features.
            collate: examples to a padded batch.
            batch_size: examples a batch.

        Raises:
            CheckpointError: the files cannot be written; none stays that is not whole.
        """
        since = time.perf_counter()
        drafts: dict[Signal, Draft] = {}
        try:
            for rows, batch in in_turns(self._split, collate, batch_size, self._world):
                shown = _shown(signals, show(batch), batch)
                if not drafts:
                    drafts = {signal: self._draft(signal, shown[signal]) for signal in shown}
                    self._reserve(drafts.values())
                with self._together():
                    self._write(drafts, rows, shown)
            with self._together():
                for draft in drafts.values():
                    draft.close()
            with self._together():
                for draft in drafts.values() if self._world.is_main else ():
                    draft.publish()
        finally:
            for draft in drafts.values():
                draft.discard()
        if lost := self.missing(signals):
            raise CheckpointError(
                f"{self.folder}: {', '.join(sorted(map(str, lost)))} cannot be read back",
                "every process must see output_dir under the same path",
            )
        size = sum(draft.nbytes for draft in drafts.values()) / GIB
        self._say(
            f"{self.folder}: teacher outputs of {len(self._split)} examples kept, {size:.3g} GiB, "
            f"{time.perf_counter() - since:.0f} s"
        )

    def teacher(self, signals: Iterable[Signal]) -> CachedTeacher:
        """What takes the teacher's place for these signals, none of which may be missing."""
        kept = {signal: self._found[signal] for signal in sorted(signals, key=str)}
        return CachedTeacher(self._split, kept, self._depth)

    def _key_of(self, signal: Signal) -> str:
        reads_labels = signal.how is not None and signal.how.reads_labels
        labels = [self._split.labels.numpy().tobytes()] if reads_labels else []
        return content_key(self._key, str(signal), *labels)

    def _draft(self, signal: Signal, shown: Tensor) -> Draft:
        """Sizes and dtype as the first batch shows them."""
        by_example = signal.feature in _BY_EXAMPLE
        rows = len(self._split) if by_example else int(self._split.input_ids.lengths.sum())
        shape = (rows, *shown.shape[1:])
        return self._cache.draft(str(signal), self._key_of(signal), shown.dtype, shape)

    def _write(
        self, drafts: dict[Signal, Draft], rows: Tensor, shown: dict[Signal, Tensor]
    ) -> None:
        lengths = self._split.input_ids.lengths
        starts = (lengths.cumsum(0) - lengths)[rows].tolist()
        for signal, values in shown.items():
            if signal.feature in _BY_EXAMPLE:
                places, parts = rows.tolist(), values.split(1)
            else:
                places, parts = starts, values.split(lengths[rows].tolist())
            for place, part in zip(places, parts, strict=True):
                drafts[signal].write(place, part)

    def _reserve(self, drafts: Iterable[Draft]) -> None:
        with self._together():
            if self._world.is_main:
                private_folder(self._root)
                for draft in drafts:
                    draft.reserve()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Every rank changes files; where one of them cannot, all raise."""
        problem = failed = None
        try:
            yield
        except OSError as error:
            problem = f"{self.folder}: {error.strerror or error}, teacher outputs are not kept"
            failed = error
        if told := next(filter(None, self._world.gather(problem)), None):
            remedy = "make room, or give back the rights, then give the same command again"
            cache = "or set distill.cache_teacher: none"
            raise CheckpointError(told, f"{remedy}; {cache}") from failed


def _shown(signals: Iterable[Signal], features: Features, batch: Batch) -> dict[Signal, Tensor]:
    """Rows of each signal on the CPU: [t, ...] of the batch's real tokens, or [B, ...]."""
    index = batch["real_tokens"] if "real_tokens" in batch else real_tokens(features.mask)
    found = {}
    for signal in sorted(signals, key=str):
        value = getattr(features, signal.feature)
        if signal.layer is not None:
            value = value[signal.layer]
        if signal.feature in ATTENTION_INPUTS:
            value = value.transpose(1, 2)  # [B, L, A, D]
        if signal.feature not in _BY_EXAMPLE:
            value = value.flatten(0, 1)[index]
        found[signal] = value.cpu()
    return found


def _content(split: Split) -> list[bytes]:
    """All that a teacher sees of the examples, and how batches name them."""
    kinds = split.token_type_ids
    tensors = [split.input_ids.flat, split.input_ids.lengths, split.domain, split.index]
    tensors += [] if kinds is None else [kinds.flat]
    return [tensor.numpy().tobytes() for tensor in tensors]


def _weights(folder: Path) -> list[Path]:
    """The files of a teacher that decide what it says."""
    files = [*sorted(folder.glob("*.safetensors")), folder / "config.json", folder / "metakd.json"]
    if base := base_of(str(folder)):
        files += [folder / DESCRIBED, *_weights(Path(base))]
    return files
