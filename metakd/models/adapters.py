"""Adapters (LoRA and its kin): a folder that holds one stands for its base model with the adapter
merged into its weights.
"""

from __future__ import annotations

import json
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open

from metakd.errors import install

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DESCRIBED, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
INSTALL = install("adapters")


def base_of(source: str) -> str | None:
    """Directory or hub id of the model that an adapter's folder goes with; None where no adapter
    is.

    Raises:
        ValueError: it names none.
    """
    file = Path(source) / DESCRIBED
    if not file.is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: is no description of an adapter ({error})") from error
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{file}: names no base_model_name_or_path; write there where its model is"
        )
    return base


def merged(model: PreTrainedModel, source: str) -> PreTrainedModel:
    """The model with the adapter of this folder in its weights; a head of the adapter's that has
    another number of classes is left out.

    Args:
        model: the base, loaded with its head.
        source: of the adapter, in safetensors.

    Raises:
        ValueError: it cannot be merged, or the package is missing that can.
    """
    if find_spec("peft") is None:
        raise ValueError(f"{source}: is an adapter, for which peft is needed: {INSTALL}")
    if not (Path(source) / WEIGHTS).is_file():
        raise ValueError(f"{source}: holds no {WEIGHTS}; save the adapter again, in safetensors")
    if any(hasattr(value, "ds_tensor") for value in model.parameters()):
        raise ValueError(f"{source}: an adapter cannot be merged into shards; save it merged")
    trained = {name: value.requires_grad for name, value in model.named_parameters()}
    cause: Exception | None = None
    for part in (model, model.base_model):  # trained with a head, or without
        try:
            fits = _merge(part, source)
        except Exception as error:  # files with something wrong make libraries raise anything
            cause = error
        else:
            if fits:
                for name, value in model.named_parameters():  # peft freezes all but the adapter
                    value.requires_grad_(trained.get(name, True))
                return model
    said = "some of its weights have no place there, or it lacks some"
    if cause is not None:
        said = f"{type(cause).__name__}: {(str(cause).splitlines() or [''])[0]}"
    raise ValueError(
        f"{source}: its adapter cannot be merged into {type(model).__name__}: {said}"
    ) from cause


def _merge(model: PreTrainedModel, source: str) -> bool:
    """Merge the adapter into a model, in place, if all of its weights belong there."""
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    config = PeftConfig.from_pretrained(source)
    if config.task_type != "SEQ_CLS":  # what else it was trained for is not asked of it
        config.task_type = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the head that is left out; others are asked for below
        adapted = PeftModel.from_pretrained(
            model, source, config=config, ignore_mismatched_sizes=True, use_safetensors=True
        )
    with safe_open(Path(source) / WEIGHTS, framework="pt") as stored:
        given = set(stored.keys())
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    known = wanted | get_peft_model_state_dict(adapted, save_embedding_layers=True).keys()
    lacking = {name for name in wanted - given if "lora_" in name}
    if fits := given <= known and not lacking:
        adapted.merge_and_unload(safe_merge=True)
    else:
        adapted.unload()
    return fits
