"""Adapters (LoRA and its kin): a folder that holds one stands for its base model with the adapter
merged into its weights.
"""

from __future__ import annotations

import json
import warnings
from importlib.util import find_spec
from pathlib import Path

from transformers import PreTrainedModel

DESCRIBED = "adapter_config.json"
INSTALL = "pip install metakd[adapters]"


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
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the head that is left out
            adapted = PeftModel.from_pretrained(
                model, source, ignore_mismatched_sizes=True, use_safetensors=True
            )
        return adapted.merge_and_unload(safe_merge=True)
    except Exception as error:  # files with something wrong make libraries raise anything
        said = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{source}: its adapter cannot be merged: {type(error).__name__}: {said}"
        ) from error
