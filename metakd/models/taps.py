"""Taps: read queries, keys, values, hidden states and embeddings out of an encoder while it runs.

Works for every encoder that goes through transformers' attention interface, under SDPA. Nothing is
asked of the model (no ``output_attentions``, which would force eager attention and [B, A, L, L]
maps): layers are hooked, and an attention function of our own notes its inputs and hands them on to
SDPA.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AttentionInterface,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from metakd.functional import masked_mean
from metakd.models.inputs import input_names
from metakd.models.packing import PACKING_KEYWORD, Packing, Unpacked, check_packable
from metakd.models.sources import small, unallocated, wide

TAPPED_SDPA = "metakd_sdpa"
_NO_INTERFACE = (
    "model {} does not use transformers' attention interface, through which queries and keys are "
    "read"
)
ATTENTION_INPUTS = frozenset({"query", "key", "value"})
TAPPED = ATTENTION_INPUTS | {"embedding", "hidden", "last_hidden", "attribution"}
"""What can be asked for. ``attribution`` is not read but computed by who asks for it, from logits
and an ``embedding`` that they can be differentiated by."""

# Who records what during the forward pass in hand. A model may carry hooks of several Taps; only
# the one that called it records, and a recomputed forward (activation checkpointing) records
# nothing.
_recording: contextvars.ContextVar[tuple[Taps, Features] | None] = contextvars.ContextVar(
    "metakd_taps", default=None
)

# Models that run our attention function: the name of their own, and the Taps that still need ours.
_tapped_models: WeakKeyDictionary[PreTrainedModel, tuple[str, WeakSet[Taps]]] = WeakKeyDictionary()


class Span(NamedTuple):
    """Which pairs of tokens a layer's attention sees, padding aside."""

    causal: bool = False  # a token sees those before it, and itself
    window: int | None = None  # and only those at this distance, or less


class NotShownError(ValueError):
    """An architecture that does not show what is asked for, whatever its weights."""


def model_inputs(batch: dict[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """The part of a batch that a model takes."""
    return {name: batch[name] for name in input_names(model.config) if name in batch}


def classifier(model: PreTrainedModel) -> Callable[[dict[str, Tensor]], Tensor]:
    """From a batch to the logits [B, M] of a model."""
    return lambda batch: model(**model_inputs(batch, model)).logits


@dataclass
class Features:
    """What one forward pass of an encoder showed; only what was asked for is filled in.

    B batch, L length, H hidden width, A heads, D head width, M classes, T teachers.
    """

    mask: Tensor  # [B, L], 1 for real tokens
    logits: Tensor | None = None  # [B, M]
    votes: Tensor | None = None  # [B, T, M], the logits of each of T teachers
    gate: Tensor | None = None  # [B, T], how much each of them is listened to
    embedding: Tensor | None = None  # [B, L, H], the input of the first layer
    hidden: Sequence[Tensor] = field(default_factory=list)  # per layer [B, L, H]
    last_hidden: Tensor | None = None  # [B, L, H], after a final norm where the model has one
    attribution: Tensor | None = None  # [B, L, V], what V functions of the logits owe each token
    query: Sequence[Tensor] = field(default_factory=list)  # per layer [B, A, L, D]
    key: Sequence[Tensor] = field(default_factory=list)  # per layer [B, A, L, D]
    value: Sequence[Tensor] = field(default_factory=list)  # per layer [B, A, L, D]
    spans: list[Span] = field(default_factory=list)  # per layer, with the queries
    domain: Tensor | None = None  # [B, H], the domain-corrupted representation h_d
    stream: torch.cuda.Stream | None = None  # that computes them, if not the current one
    packing: Packing | None = None  # under which the layers ran, if they ran packed

    def __post_init__(self):
        if packing := self.packing:
            self.hidden = Unpacked(packing, packing.unpack)
            self.query, self.key, self.value = (
                Unpacked(packing, packing.unpack_heads) for _ in range(3)
            )

    def of_layer(self, number: int, needs: Iterable[str]) -> Features:
        """These of one layer alone; number 0 is the embedding's."""
        part = Features(mask=self.mask, embedding=None if number else self.embedding)
        for name in (ATTENTION_INPUTS | {"hidden"}).intersection(needs) if number else ():
            setattr(part, name, [getattr(self, name)[number - 1]])
        return part

    def detach(self) -> None:
        """Let go of the graph that made them."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.detach())
            elif isinstance(value, Unpacked):
                value.detach()
            elif isinstance(value, list) and name != "spans":
                value[:] = [states.detach() for states in value]

    def arrive(self) -> None:
        """Makes the current CUDA stream wait for them."""
        if self.stream is None:
            return
        current = torch.cuda.current_stream(self.mask.device)
        current.wait_stream(self.stream)
        for value in vars(self).values():
            if isinstance(value, Unpacked):
                value = value.held()
            for tensor in value if isinstance(value, list) else [value]:
                if isinstance(tensor, Tensor):
                    # Allocated on the other stream: not to be reused before this one is through.
                    tensor.record_stream(current)
        self.stream = None


def _tapped_sdpa(module, query, key, value, attention_mask, **kwargs):
    packing = kwargs.pop(PACKING_KEYWORD, None)
    attend = sdpa_attention_forward if packing is None else packing.attend
    taps, features = _recording.get() or (None, None)
    if taps is not None and taps.needs & ATTENTION_INPUTS:
        features.query.append(query)
        # Grouped-query models hold fewer key heads; the losses compare head with head.
        groups = query.shape[1] // key.shape[1]
        features.key.append(key.repeat_interleave(groups, dim=1) if groups > 1 else key)
        features.value.append(value.repeat_interleave(groups, dim=1) if groups > 1 else value)
        features.spans.append(_span(module, attention_mask, kwargs))
    return attend(module, query, key, value, attention_mask, **kwargs)


def _span(module: nn.Module, mask: Tensor | None, options: dict) -> Span:
    if mask is not None and mask.is_floating_point() and mask.shape[-2] > 1:
        raise NotShownError(
            f"{type(module).__name__} adds numbers of its own to the scores, which are not queries "
            "times keys then"
        )
    # As flash attention counts: the first distance that is not seen.
    window = options.get("sliding_window")
    causal = options.get("is_causal", getattr(module, "is_causal", False))
    return Span(bool(causal), None if window is None else window - 1)


AttentionInterface.register(TAPPED_SDPA, _tapped_sdpa)
# Without a mask function of the same name transformers drops the padding mask without a word.
AttentionMaskInterface.register(TAPPED_SDPA, sdpa_mask)


@contextmanager
def _recorded_by(taps: Taps, features: Features) -> Iterator[None]:
    token = _recording.set((taps, features))
    try:
        yield
    finally:
        _recording.reset(token)


class Taps:
    """Runs an encoder and returns its ``Features``.

    Args:
        model: any transformers encoder, bare or with a classification head.
        needs: the ``Features`` to collect, of ``TAPPED``.
        packed: run the layers on real tokens only. Features keep their shapes and, at real tokens,
            their values; at padding ``hidden``, queries, keys and values are zero.

    Raises:
        ValueError: the model's stack of layers cannot be found, it does not use the attention
            interface, or its layers cannot run packed.
    """

    def __init__(
        self, model: PreTrainedModel, needs: frozenset[str] | set[str], packed: bool = False
    ):
        if unknown := set(needs) - TAPPED:
            raise ValueError(f"needs: {sorted(unknown)} cannot be tapped")
        self.model = model
        self.needs = frozenset(needs)
        self.packed = packed
        self._handles = []
        shown = self.needs & {"embedding", "hidden", "attribution"}
        layers = encoder_layers(model) if packed or shown else None
        if packed:
            check_packable(model, layers)
        if packed or self.needs & ATTENTION_INPUTS:
            own = model.config._attn_implementation
            with suppress(ValueError):  # of some, which say so; others keep their own
                model.set_attn_implementation(TAPPED_SDPA)
            if model.config._attn_implementation != TAPPED_SDPA:
                raise NotShownError(_NO_INTERFACE.format(type(model).__name__))
            _, readers = _tapped_models.setdefault(model, (own, WeakSet()))
            readers.add(self)
        if layers is not None:
            first = layers[0].register_forward_pre_hook(self._note_embedding, with_kwargs=True)
            self._handles += [
                first,
                *(layer.register_forward_hook(self._note_hidden) for layer in layers),
            ]
        if packed:  # after the hooks above: they see padded embeddings and packed hidden states
            self._first = layers[0]
            self._handles += [
                *(
                    layer.register_forward_pre_hook(self._pack, with_kwargs=True)
                    for layer in layers
                ),
                layers[-1].register_forward_hook(self._unpack),
            ]
        if "last_hidden" in self.needs:
            self._handles.append(model.base_model.register_forward_hook(self._note_last_hidden))

    def __call__(self, batch: dict[str, Tensor], embedding: Tensor | None = None) -> Features:
        """Forward the model's part of ``batch``; logits are kept if the model has any.

        Args:
            batch: its inputs.
            embedding: [B, L, H] that enters the first layer in place of the model's own, where
                ``attribution`` is asked for.
        """
        packing = Packing.of(batch) if self.packed else None
        features = Features(mask=batch["attention_mask"], packing=packing, embedding=embedding)
        recording = _recorded_by(self, features)
        with recording, self._recomputed_packed(features), self._attending():
            output = self.model(**model_inputs(batch, self.model))
        features.logits = getattr(output, "logits", None)
        self._see_that_all_is_there(features)
        return features

    def _see_that_all_is_there(self, features: Features) -> None:
        name = type(self.model).__name__
        if self.needs & ATTENTION_INPUTS and not features.query:
            raise NotShownError(_NO_INTERFACE.format(name))
        if ("hidden" in self.needs and not features.hidden) or (
            self.needs & {"embedding", "attribution"} and features.embedding is None
        ):
            raise NotShownError(
                f"model {name} runs its layers in a way that shows no hidden states"
            )

    def check(self) -> Features:
        """See that a model shows what is asked for, its weights and the text being anything; leaves
        gradients behind.

        Raises:
            NotShownError: it does not.
            Exception: it does not run.
        """
        device = next(self.model.parameters()).device
        ids = torch.ones(1, 8, dtype=torch.long, device=device)
        features, twice = Features(mask=ids), "attribution" in self.needs
        with torch.set_grad_enabled(twice), self._attending(), _recorded_by(self, features):
            # A mask would be looked into, and may have no values.
            logits = self.model(input_ids=ids).logits
        self._see_that_all_is_there(features)
        if twice:
            self._see_a_second_derivative(logits, features.embedding)
        return features

    @torch.enable_grad()
    def _see_a_second_derivative(self, logits: Tensor, embedding: Tensor) -> None:
        try:
            (slope,) = torch.autograd.grad(logits.sum(), embedding, create_graph=True)
            # All the way, to weights: what leads to the embedding alone would leave out, without
            # a word, a function that can be differentiated but once.
            slope.square().sum().backward()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            if "derivative" not in reason and "differentiate" not in reason:
                raise  # of this device, or this text
            raise NotShownError(
                f"model {type(self.model).__name__} has no second derivative: {reason}"
            ) from error

    def _attending(self) -> AbstractContextManager:
        """Fused attention has no second derivative, which a model that is trained needs of it."""
        if "attribution" in self.needs and any(p.requires_grad for p in self.model.parameters()):
            return sdpa_kernel(SDPBackend.MATH)
        return nullcontext()

    def remove(self) -> None:
        """Take the hooks out; the last Taps to go gives the model its own attention function
        back."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        own, readers = _tapped_models.get(self.model, (None, ()))
        if self in readers:
            readers.discard(self)
            if not readers:
                self.model.set_attn_implementation(own)
                del _tapped_models[self.model]

    @contextmanager
    def _recomputed_packed(self, features: Features) -> Iterator[None]:
        """Some transformers (5.17, not 5.23) checkpoint a layer together with its hooks, which must
        find the packing again when the layer is recomputed."""
        # Not the features: what recomputes a layer hangs in the graph that made them.
        mask, packing = features.mask, features.packing
        own = {
            layer: layer._gradient_checkpointing_func
            for layer in (encoder_layers(self.model) if self.packed else ())
            if getattr(layer, "gradient_checkpointing", False)
        }

        def remembering(checkpoint: Callable) -> Callable:
            def checkpointed(layer, *args):
                def run(*args):
                    if _recording.get() is not None:
                        return layer(*args)
                    nobodys = Features(mask=mask, packing=packing)
                    with _recorded_by(self, nobodys):
                        return layer(*args)

                return checkpoint(run, *args)

            return checkpointed

        for layer, checkpoint in own.items():
            layer._gradient_checkpointing_func = remembering(checkpoint)
        try:
            yield
        finally:
            for layer, checkpoint in own.items():
                layer._gradient_checkpointing_func = checkpoint

    def _features(self, kind: str) -> Features | None:
        taps, features = _recording.get() or (None, None)
        return features if taps is self and kind in self.needs else None

    def _packing(self) -> Packing | None:
        taps, features = _recording.get() or (None, None)
        return features.packing if taps is self else None

    def _pack(self, layer, args, kwargs):
        if packing := self._packing():
            return packing.layer_inputs(args, kwargs, first=layer is self._first)
        return None

    def _unpack(self, _module, _args, output):
        if not (packing := self._packing()):
            return None
        if isinstance(output, Tensor):
            return packing.unpack(output)
        return packing.unpack(output[0]), *output[1:]

    def _note_embedding(self, _module, args, kwargs):
        states = args[0] if args else kwargs["hidden_states"]
        if features := self._features("attribution"):
            if features.embedding is None:
                learns = states.requires_grad
                features.embedding = states if learns else states.detach().requires_grad_()
            if args:
                return (features.embedding, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": features.embedding}
        if features := self._features("embedding"):
            features.embedding = states
        return None

    def _note_hidden(self, _module, _args, output):
        if features := self._features("hidden"):
            features.hidden.append(output if isinstance(output, Tensor) else output[0])

    def _note_last_hidden(self, _module, _args, output):
        if features := self._features("last_hidden"):
            features.last_hidden = output[0]


def why_not_shown(shape: PretrainedConfig, needs: frozenset[str]) -> str | None:
    """Why these features cannot be read out of a classifier of this shape, asked without its
    weights; None if they can."""
    shown = _shown(shape, needs)
    return shown if isinstance(shown, str) else None


def attention_spans(shape: PretrainedConfig) -> tuple[Span, ...]:
    """What each layer of a classifier of this shape sees, asked without its weights; nothing where
    that is not shown."""
    shown = _shown(shape, frozenset({"query"}))
    spans = () if shown is None or isinstance(shown, str) else tuple(shown.spans)
    if len(spans) != shape.num_hidden_layers:  # those of a shallow one stand for all, if all agree
        spans = spans[:1] * shape.num_hidden_layers if len(set(spans)) == 1 else ()
    return spans


def _shown(shape: PretrainedConfig, needs: frozenset[str]) -> Features | str | None:
    """What it shows, why it does not, or None where that cannot be found out."""
    question = shape.to_json_string(), needs
    if question not in _answered:
        try:
            _answered[question] = _tried(unallocated(shape), needs) or _tried(small(shape), needs)
        except ValueError as error:
            _answered[question] = str(error)
    return _answered[question]


_answered: dict[tuple, Features | str | None] = {}  # each costs a model


def _tried(model: PreTrainedModel | None, needs: frozenset[str]) -> Features | None:
    """What it shows, if it runs. Raises NotShownError if it runs, and does not show what is asked
    for."""
    if model is None:
        return None
    taps = Taps(model, needs)
    try:
        return taps.check()
    except NotShownError:
        raise
    except Exception:  # of its own, where it has to look at values that are not there
        return None
    finally:
        taps.remove()


def why_not_run(
    shape: PretrainedConfig, needs: frozenset[str], packed: bool, batch: dict[str, Tensor]
) -> str | None:
    """Why a classifier of this shape, small and with weights that were drawn, does not run on a
    batch while these features are read; None if it does, or is too large to be made quickly."""
    question = shape.to_json_string(), needs, packed, batch["attention_mask"].sum(1)
    if (key := str(question)) not in _tried_out:
        _tried_out[key] = _why_not_run(shape, needs, packed, batch)
    return _tried_out[key]


_tried_out: dict[str, str | None] = {}  # each costs a model


def _why_not_run(
    shape: PretrainedConfig, needs: frozenset[str], packed: bool, batch: dict[str, Tensor]
) -> str | None:
    length = batch["input_ids"].shape[1]
    if (model := wide(shape)) is None:
        return None
    try:
        taps = Taps(model, needs, packed)
        with torch.no_grad():
            logits = taps(batch).logits
    except Exception as error:  # architectures raise anything
        first = (str(error).splitlines() or [""])[0]
        kind = type(error).__name__
        return f"cannot run a text of {length} tokens: {kind}: {first}"
    return None if logits.isfinite().all() else f"a text of {length} tokens gives no finite logits"


def encoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The stack of transformer layers, whatever the architecture calls it.

    Raises:
        ValueError: no list of ``num_hidden_layers`` modules exists (for example layers that share
            weights).
    """
    depth = model.config.num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise NotShownError(
        f"model {type(model).__name__} has no list of its {depth} layers: they share weights, or "
        "stand apart"
    )


def pool(features: Features, rule: str) -> Tensor:
    """E(X) [B, H] in at least fp32: one vector per example from the last hidden state.

    Args:
        features: with ``last_hidden`` [B, L, H].
        rule: ``masked_mean`` over real tokens (the paper), or ``all_but_first``: padding and the
            closing token count and only the first token is left out (EasyTransfer's release).
    """
    if rule == "masked_mean":
        return masked_mean(features.last_hidden, features.mask)
    everything = torch.ones_like(features.mask)
    everything[:, 0] = 0
    return masked_mean(features.last_hidden, everything)
