"""A user's own DeepSpeed JSON: which keys it may hold, and what each ``"auto"`` stands for.

DeepSpeed checks the keys inside its pydantic blocks but not those at the top of the file, nor those
of the blocks it reads by hand: ``zero_optimisation`` trains at stage 0 without a word. Here every
key at every level stands in one table, ``SCHEMA``, with its type, range and choices, and a test
compares that table with the installed DeepSpeed. What DeepSpeed knows but this toolkit would
ignore, or do otherwise, is in the table too, with the reason why it is refused.

How the two functions are meant to be used:

1. ``check_deepspeed(raw)`` when the configuration is read. It needs nothing but the JSON.
2. ``resolve_deepspeed(raw, values)`` when batch sizes, world size and model are known. ``values``
   holds this toolkit's own settings under DeepSpeed's dotted names, as many as there are:

   =============================================== ===============================================
   ``train_micro_batch_size_per_gpu``              ``per_device_train_batch_size``
   ``gradient_accumulation_steps``                 the same
   ``gradient_clipping``                           ``max_grad_norm``
   ``fp16.enabled``, ``bf16.enabled``              ``fp16``, ``bf16``
   ``zero_optimization.stage``                     ``zero``
   ``zero_optimization.offload_optimizer.device``  ``none`` or ``cpu``; ``offload_param`` alike
   ``optimizer.type``                              ``AdamW``
   ``optimizer.params.lr``, ``.weight_decay``      ``learning_rate``, ``weight_decay``
   ``optimizer.params.betas``, ``.eps``            of the optimizer that is built
   ``scheduler.type``                              ``WarmupDecayLR`` (linear), ``WarmupLR``
                                                   (constant)
   ``scheduler.params.warmup_num_steps``           warm-up in steps
   ``scheduler.params.total_num_steps``            steps of the run
   ``world_size``, ``hidden_size``                 two facts that no key of DeepSpeed holds
   =============================================== ===============================================

   The result is complete: hand it to ``deepspeed.initialize`` together with the optimizer and the
   scheduler that were built. DeepSpeed then ignores the blocks ``optimizer`` and ``scheduler``,
   which is why they are compared with ``values`` and may not say anything else.

Imports the standard library and ``metakd.errors`` only, so that a wrong file is refused at once.

Source: the rules for ``"auto"`` are those of ``transformers.integrations.deepspeed``.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from metakd.errors import ConfigError

AUTO = "auto"
_REMEDY = "Correct the DeepSpeed configuration; nothing was run."
_KNOWN_SHOWN = 12
_BUILT_HERE = ("optimizer.", "scheduler.")  # blocks that DeepSpeed ignores once it is given both


@dataclass(frozen=True)
class Value:
    """What a key may hold.

    Args:
        kind: bool, int, float, str or list.
        least: smallest number.
        most: largest number.
        choices: all values there are.
        items: of a list, the type of its items.
        ours: name of this toolkit's own setting of the same meaning; such a key may be ``"auto"``.
    """

    kind: type
    least: float | None = None
    most: float | None = None
    choices: tuple = ()
    items: type = str
    ours: str | None = None

    def fault(self, value: Any) -> str | None:
        """Why ``value`` is refused, None if it is right."""
        if value == AUTO and AUTO not in self.choices:
            return None if self.ours else '"auto" has no rule here, write a value'
        if self.choices:
            fits = any(value == choice and type(value) is type(choice) for choice in self.choices)
            return None if fits else f"must be {' or '.join(map(json.dumps, self.choices))}"
        if self.kind is list:
            fits = isinstance(value, list) and all(_is(item, self.items) for item in value)
            return None if fits else f"must be a list of {_NAMES[self.items][1]}"
        if not _is(value, self.kind):
            return f"must be {_NAMES[self.kind][0]}{_how_to_write(value, self.kind)}"
        if self.least is not None and value < self.least:
            return f"must be at least {self.least:g}"
        if self.most is not None and value > self.most:
            return f"must be at most {self.most:g}"
        return None


@dataclass(frozen=True)
class Refused:
    """A key that DeepSpeed knows and this toolkit has no use for, with the reason."""

    reason: str


_NAMES = {
    bool: ("true or false", "true and false"),
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("a text", "texts"),
}


def _is(value: Any, kind: type) -> bool:
    if kind in (bool, str):
        return isinstance(value, kind)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    finite = abs(value) < float("inf")  # False for NaN as well
    return finite and (kind is float or value == int(value))  # 5e8 is how people write a size


def _how_to_write(value: Any, kind: type) -> str:
    """Inline YAML reads 5e-5 as a word, for want of a dot."""
    try:
        number = float(value) if isinstance(value, str) and kind in (int, float) else None
    except ValueError:
        return ""
    return "" if number is None else ", in YAML without quotes and with a dot, as in 5.0e-5"


_SWITCH = Value(bool)
_COUNT = Value(int, least=1)
_SIZE = Value(int, least=0)
_TEXT = Value(str)
_NAMES_OF_MODULES = Value(list)
_DTYPE = Value(str, choices=("fp32", "fp16", "bf16"))
_SHARE = Value(float, least=0, most=1)
_DEVICE = Value(str, choices=("none", "cpu", "nvme"), ours="offload")

_REPORTS = Refused("training writes its own logs, see report_to")
_LOADING = Refused("batches are made here, each example once per epoch, and not by DeepSpeed")
_CHECKPOINTS = Refused("checkpoints are written and verified here, not by DeepSpeed alone")
_REMOVED = Refused("DeepSpeed has removed it")
_ENCODERS = Refused("it is for models other than the encoders trained here")
_ONE_AXIS = Refused("processes share the data here, never a layer or a sequence")
_COMPILE = Refused("the engine is not compiled here, so it would have no effect")

SCHEMA: dict[str, Any] = {
    "train_batch_size": Value(
        int, least=1, ours="train_batch_size (micro-batch x accumulation x processes)"
    ),
    "train_micro_batch_size_per_gpu": Value(int, least=1, ours="per_device_train_batch_size"),
    "gradient_accumulation_steps": Value(int, least=1, ours="gradient_accumulation_steps"),
    # The loss is divided by the examples of the step on the strength of these two.
    "managed_gradient_accumulation": Value(bool, choices=(True,)),
    "gradient_allreduce_op": Value(str, choices=("mean",)),
    "gradient_clipping": Value(float, least=0, ours="max_grad_norm"),
    "prescale_gradients": _SWITCH,
    "gradient_predivide_factor": Value(float, least=1),
    "communication_data_type": _DTYPE,
    "disable_allgather": _SWITCH,
    "zero_allow_untested_optimizer": _SWITCH,
    "zero_force_ds_cpu_optimizer": _SWITCH,
    "steps_per_print": _COUNT,
    "wall_clock_breakdown": _SWITCH,
    "memory_breakdown": _SWITCH,
    "dump_state": _SWITCH,
    "disable_python_gc": _SWITCH,
    "vocabulary_size": _COUNT,
    "log_level": Value(str, choices=("debug", "info", "warning", "error", "critical")),
    "fp16": {
        "enabled": Value(bool, ours="fp16"),
        "auto_cast": _SWITCH,
        "loss_scale": Value(float, least=0),
        "initial_scale_power": _SIZE,
        "loss_scale_window": _COUNT,
        "hysteresis": _COUNT,
        "consecutive_hysteresis": _SWITCH,
        "min_loss_scale": _COUNT,
        "fp16_master_weights_and_grads": _SWITCH,
    },
    "bf16": {
        "enabled": Value(bool, ours="bf16"),
        "immediate_grad_update": _SWITCH,
        "check_grad_overflow": _SWITCH,
        "bf16_master_weights_and_grads": _SWITCH,
        "bf16_optimizer_states": _SWITCH,
    },
    "data_types": {
        "grad_accum_dtype": _DTYPE,
        "param_dtype": _DTYPE,
        "buffer_dtype": _DTYPE,
        "keep_in_fp32_modules": Value(list),
    },
    "optimizer": {
        "type": Value(str, choices=("AdamW",), ours="optimizer"),
        "params": {
            "lr": Value(float, least=0, ours="learning_rate"),
            "betas": Value(list, items=float, ours="betas"),
            "eps": Value(float, least=0, ours="eps"),
            "weight_decay": Value(float, least=0, ours="weight_decay"),
        },
        "legacy_fusion": Refused("it is for LAMB, and training uses AdamW"),
    },
    "scheduler": {
        "type": Value(str, choices=("WarmupLR", "WarmupDecayLR"), ours="lr_scheduler_type"),
        "params": {
            "warmup_min_lr": Value(float, choices=(0, 0.0), ours="warmup_min_lr"),
            "warmup_max_lr": Value(float, least=0, ours="learning_rate"),
            "warmup_num_steps": Value(int, least=0, ours="warmup_steps"),
            "warmup_type": Value(str, choices=("linear",)),
            "total_num_steps": Value(int, least=1, ours="steps of the run"),
        },
    },
    "zero_optimization": {
        "stage": Value(int, choices=(0, 1, 2, 3), ours="zero"),
        "contiguous_gradients": _SWITCH,
        "reduce_scatter": _SWITCH,
        "reduce_bucket_size": Value(int, least=1, ours="hidden_size"),
        "use_multi_rank_bucket_allreduce": _SWITCH,
        "allgather_partitions": _SWITCH,
        "allgather_bucket_size": _SIZE,
        "overlap_comm": _SWITCH,
        # Without the norm DeepSpeed cannot clip, and training always clips.
        "compute_grad_norm": Value(bool, choices=(True,)),
        "load_from_fp32_weights": _SWITCH,
        "elastic_checkpoint": _CHECKPOINTS,
        "offload_param": {
            "device": _DEVICE,
            "nvme_path": _TEXT,
            "buffer_count": _SIZE,
            "buffer_size": _SIZE,
            "max_in_cpu": _SIZE,
            "pin_memory": _SWITCH,
        },
        "offload_optimizer": {
            "device": _DEVICE,
            "nvme_path": _TEXT,
            "buffer_count": _SIZE,
            "pin_memory": _SWITCH,
            "pipeline_read": _SWITCH,
            "pipeline_write": _SWITCH,
            "fast_init": _SWITCH,
            "ratio": _SHARE,
            "super_offload": _SWITCH,
            "cpuadam_cores_perc": _SHARE,
        },
        "zenflow": Refused("it updates weights out of step with the gradients"),
        "sub_group_size": _SIZE,
        "cpu_offload_param": Refused("DeepSpeed has renamed it: offload_param"),
        "cpu_offload_use_pin_memory": Refused(
            "DeepSpeed has renamed it: pin_memory in offload_param or offload_optimizer"
        ),
        "cpu_offload": Refused("DeepSpeed has renamed it: offload_optimizer"),
        "stage3_prefetch_bucket_size": Value(int, least=0, ours="hidden_size"),
        "stage3_param_persistence_threshold": Value(int, least=0, ours="hidden_size"),
        "stage3_model_persistence_threshold": _SIZE,
        "stage3_max_live_parameters": _SIZE,
        "stage3_max_reuse_distance": _SIZE,
        "stage3_gather_16bit_weights_on_model_save": _SWITCH,
        "stage3_gather_fp16_weights_on_model_save": Refused(
            "DeepSpeed has renamed it: stage3_gather_16bit_weights_on_model_save"
        ),
        "stage3_module_granularity_threshold": _SIZE,
        "stage3_use_all_reduce_for_fetch_params": _SWITCH,
        "stage3_allgather_sequential": _SWITCH,
        "ignore_unused_parameters": _SWITCH,
        "legacy_stage1": _SWITCH,
        "round_robin_gradients": _SWITCH,
        "parameter_alignment": _SWITCH,
        "zero_hpz_partition_size": _SIZE,
        "zero_quantized_weights": _SWITCH,
        "zero_quantized_nontrainable_weights": _SWITCH,
        "zero_quantized_gradients": _SWITCH,
        "memory_efficient_linear": _SWITCH,
        "pipeline_loading_checkpoint": _CHECKPOINTS,
        "override_module_apply": _SWITCH,
        "log_trace_cache_warnings": _SWITCH,
        "enable_sanity_checks": _SWITCH,
        "save_muon_momentum_buffer_in_memory": Refused("it is for Muon, and training uses AdamW"),
        "leaf_module": {
            "classes": _NAMES_OF_MODULES,
            "names": _NAMES_OF_MODULES,
            "name_suffixes": _NAMES_OF_MODULES,
        },
        "mics_shard_size": _REMOVED,
        "mics_hierarchical_params_gather": _REMOVED,
        "zeropp_loco_param": _REMOVED,
    },
    "aio": {
        "block_size": _COUNT,
        "queue_depth": _COUNT,
        "intra_op_parallelism": _COUNT,
        "single_submit": _SWITCH,
        "overlap_events": _SWITCH,
        "use_gds": _SWITCH,
    },
    "flops_profiler": {
        "enabled": _SWITCH,
        "recompute_fwd_factor": Value(float, least=0),
        "profile_step": _COUNT,
        "module_depth": Value(int, least=-1),
        "top_modules": _COUNT,
        "detailed": _SWITCH,
        "output_file": _TEXT,
    },
    "comms_logger": {
        "enabled": _SWITCH,
        "prof_all": _SWITCH,
        "prof_ops": _NAMES_OF_MODULES,
        "verbose": _SWITCH,
        "debug": _SWITCH,
    },
    "timers": {"throughput": {"enabled": _SWITCH, "synchronized": _SWITCH}},
    "bfloat16": Refused("DeepSpeed has renamed it: bf16"),
    "torch_autocast": Refused("precision is bf16 or fp16, at the top of the configuration"),
    "activation_checkpointing": Refused(
        "it acts on models that call DeepSpeed's own checkpoint function, and encoders do not"
    ),
    "checkpoint": _CHECKPOINTS,
    "datastates_ckpt": _CHECKPOINTS,
    "dataloader_drop_last": _LOADING,
    "data_efficiency": _LOADING,
    "curriculum_learning": _LOADING,
    "tensorboard": _REPORTS,
    "wandb": _REPORTS,
    "csv_monitor": _REPORTS,
    "comet": _REPORTS,
    "compile": _COMPILE,
    "graph_harvesting": _COMPILE,
    "autotuning": Refused("it starts training over and over by itself, from DeepSpeed's launcher"),
    "hybrid_engine": _ENCODERS,
    "expert_parallel": _ENCODERS,
    "use_data_before_expert_parallelism": _ENCODERS,
    "inference": _ENCODERS,
    "weight_quantization": _ENCODERS,
    "sparse_attention": _REMOVED,
    "sparse_gradients": _REMOVED,
    "elasticity": _REMOVED,
    "nebula": _REMOVED,
    "compression_training": _REMOVED,
    "amp": _REMOVED,
    "quantize_training": _REMOVED,
    "eigenvalue": _REMOVED,
    "progressive_layer_drop": _REMOVED,
    "pipeline": _ONE_AXIS,
    "tensor_parallel": _ONE_AXIS,
    "sequence_parallel_size": _ONE_AXIS,
    "seq_parallel_communication_data_type": _ONE_AXIS,
}


def check_deepspeed(raw: dict) -> list[str]:
    """All problems of a DeepSpeed configuration, ``key.of.block: reason (got value)`` each.

    Reported are unknown keys at every level with the key that was probably meant, refused ones with
    the reason, wrong types, values out of range, ``"auto"`` where nothing could fill it, and keys
    that contradict each other. Keys inside a misspelt block are checked as well.

    Args:
        raw: the parsed JSON.
    """
    if not isinstance(raw, dict):
        return [f"must hold keys with values (got {_shown(raw)})"]
    problems = list(_faults(raw, SCHEMA, ""))
    return problems or list(_contradictions(raw))


def contradictions(raw: dict, values: dict[str, Any]) -> list[str]:
    """What a checked configuration says otherwise than ``values``, naming both keys and values.

    Args:
        raw: the parsed JSON, without a problem of ``check_deepspeed``.
        values: as for ``resolve_deepspeed``, or as many of them as are known.
    """
    fixed = _fixed(values)
    return [
        f"{path}: is {_shown(block[key])}, but {known.ours} is {_shown(fixed[path])}; "
        'write "auto", or the same value in both'
        for path, block, key, known in _leaves(raw, SCHEMA, "")
        if path in fixed and block[key] not in (AUTO, fixed[path])
    ] + list(_without_zero(raw, values))


def _without_zero(raw: dict, values: dict[str, Any]) -> Iterator[str]:
    """Keys about precision that DeepSpeed has at ZeRO 1 to 3 only."""
    if values.get("zero_optimization.stage") != 0:
        return
    asked = {
        f"{name}.{key}": f"is {value}"
        for name in ("fp16", "bf16")
        for key, value in raw.get(name, {}).items()
        if value is True and key.endswith(("_master_weights_and_grads", "_optimizer_states"))
    }
    halves = [name for name in ("fp16", "bf16") if values.get(f"{name}.enabled", False)]
    dtype = halves[0] if halves else "fp32"
    summed = raw.get("data_types", {}).get("grad_accum_dtype", dtype)
    if summed != dtype:
        asked["data_types.grad_accum_dtype"] = f"is {summed}, beside {dtype}"
    for path, said in asked.items():
        yield f"{path}: {said}, which needs zero of 1 to 3 (got 0)"


def resolve_deepspeed(raw: dict, values: dict[str, Any]) -> dict:
    """A complete copy of ``raw``: every ``"auto"`` is filled, what it leaves out comes from
    ``values``.

    An ``"auto"`` becomes the value of the same key in ``values``; beyond those, with H for
    ``hidden_size``: ``train_batch_size`` is micro-batch x accumulation x ``world_size``,
    ``reduce_bucket_size`` H^2, ``stage3_prefetch_bucket_size`` int(0.9 H^2),
    ``stage3_param_persistence_threshold`` 10 H, ``warmup_min_lr`` 0, ``warmup_max_lr`` the
    learning rate, and ``warmup_num_steps`` at least 1.

    Args:
        raw: the parsed JSON; left as it is.
        values: this toolkit's own settings by DeepSpeed's dotted key, ``world_size`` (processes)
            and ``hidden_size`` (H); see the module's table.

    Returns:
        Plain JSON values. Keys of ``values`` that ``raw`` leaves out are added, except those of
        ``optimizer`` and ``scheduler``; integers written as 5e8 are integers.

    Raises:
        ConfigError: with every problem of ``check_deepspeed``; or with every ``"auto"`` that
            neither ``values`` nor a rule fills and every value that contradicts ``values``, naming
            both keys and both values.
    """
    if problems := check_deepspeed(raw):
        raise _error(problems)
    problems = contradictions(raw, values)
    fills = _fixed(values) | _fills(values)
    resolved = copy.deepcopy(raw)
    for path, block, key, known in _leaves(resolved, SCHEMA, ""):
        value = block[key]
        if value == AUTO and known.ours:
            if path in fills:
                block[key] = fills[path]
            else:
                problems.append(
                    f'{path}: "auto" needs {known.ours}, which is not known here, write a value'
                )
        elif known.kind is int and isinstance(value, float):
            block[key] = int(value)
    if problems:
        raise _error(problems)
    for path, value in values.items():
        if path not in ("world_size", "hidden_size") and not path.startswith(_BUILT_HERE):
            _put_where_missing(resolved, path, value)
    if problems := list(_contradictions(resolved)):
        raise _error(problems)
    return resolved


def _fixed(values: dict[str, Any]) -> dict[str, Any]:
    """What a key of the JSON must be where it says anything but ``"auto"``."""
    fixed = {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
    batch = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "world_size")
    if all(key in values for key in batch):
        micro, accumulated, processes = (values[key] for key in batch)
        fixed["train_batch_size"] = micro * accumulated * processes
    if "optimizer.params.lr" in values:
        fixed["scheduler.params.warmup_max_lr"] = values["optimizer.params.lr"]
    if "scheduler.params.warmup_num_steps" in values:
        # DeepSpeed refuses a warm-up of no steps.
        steps = max(1, values["scheduler.params.warmup_num_steps"])
        fixed["scheduler.params.warmup_num_steps"] = steps
    return fixed


def _fills(values: dict[str, Any]) -> dict[str, Any]:
    """What ``"auto"`` becomes where any other value would do as well."""
    fills: dict[str, Any] = {"scheduler.params.warmup_min_lr": 0}
    if "hidden_size" in values:
        hidden = values["hidden_size"]
        fills["zero_optimization.reduce_bucket_size"] = hidden * hidden
        fills["zero_optimization.stage3_prefetch_bucket_size"] = int(0.9 * hidden * hidden)
        fills["zero_optimization.stage3_param_persistence_threshold"] = 10 * hidden
    return fills


def _put_where_missing(tree: dict, path: str, value: Any) -> None:
    *blocks, key = path.split(".")
    for block in blocks:
        tree = tree.setdefault(block, {})
    tree.setdefault(key, value)


def _leaves(block: dict, schema: dict, prefix: str) -> Iterator[tuple[str, dict, str, Value]]:
    """(dotted key, block, key, what it may hold) of every value of a checked configuration."""
    for key, value in block.items():
        known = schema[key]
        if isinstance(known, dict):
            yield from _leaves(value, known, f"{prefix}{key}.")
        else:
            yield prefix + key, block, key, known


def _faults(block: dict, schema: dict, prefix: str) -> Iterator[str]:
    for name, value in block.items():
        key, path = str(name), f"{prefix}{name}"
        known = schema.get(key)
        if key not in schema:
            meant = _meant(key, schema, block)
            yield f"{path}: unknown key, {_hint(key, meant, schema)} (got {_shown(value)})"
            known = schema.get(meant)
        if isinstance(known, Refused):
            yield f"{path}: is refused: {known.reason}"
        elif isinstance(known, dict):
            if isinstance(value, dict):
                yield from _faults(value, known, f"{path}.")
            else:
                yield f"{path}: must hold keys with values (got {_shown(value)})"
        elif known is not None and (fault := known.fault(value)):
            yield f"{path}: {fault} (got {_shown(value)})"


def _meant(key: str, schema: dict, block: dict) -> str | None:
    free = [k for k, known in schema.items() if k not in block and not isinstance(known, Refused)]
    return next(iter(difflib.get_close_matches(key, free, n=1)), None)


def _hint(key: str, meant: str | None, schema: dict) -> str:
    if meant:
        return f"did you mean {meant}?"
    places = _places(SCHEMA, "")
    if close := difflib.get_close_matches(key, places, n=1):
        return f"did you mean {' or '.join(places[close[0]])}?"
    known = [k for k, value in schema.items() if not isinstance(value, Refused)]
    return f"known here: {', '.join(known[:_KNOWN_SHOWN])}" + ", ..." * (len(known) > _KNOWN_SHOWN)


def _places(schema: dict, prefix: str) -> dict[str, list[str]]:
    """Each key's dotted places."""
    found: dict[str, list[str]] = {}
    for key, known in schema.items():
        if not isinstance(known, Refused):
            found.setdefault(key, []).append(prefix + key)
        if isinstance(known, dict):
            for inner, places in _places(known, f"{prefix}{key}.").items():
                found.setdefault(inner, []).extend(places)
    return found


def _contradictions(raw: dict) -> Iterator[str]:
    """Keys that are right by themselves and wrong together."""
    zero = raw.get("zero_optimization", {})
    block = "zero_optimization"
    stage = zero.get("stage", AUTO)  # what the file leaves out, the configuration may say
    if raw.get("fp16", {}).get("enabled") is True and raw.get("bf16", {}).get("enabled") is True:
        yield "fp16.enabled and bf16.enabled are both true: give one"
    for name, needed in (("offload_optimizer", 1), ("offload_param", 3)):
        offload = zero.get(name, {})
        device, path = offload.get("device", "none"), f"{block}.{name}"
        if device not in ("none", AUTO) and stage != AUTO and stage < needed:
            yield f"{path}.device: {device} needs {block}.stage {needed} or more (got {stage})"
        if device == "nvme" and "nvme_path" not in offload:
            yield f"{path}.nvme_path: required key is missing, since device is nvme"
    for key, neutral in (("ratio", 1), ("super_offload", False)):
        value = zero.get("offload_optimizer", {}).get(key, neutral)
        if value != neutral and stage not in (3, AUTO):
            yield f"{block}.offload_optimizer.{key}: {value} needs {block}.stage 3 (got {stage})"


def _error(problems: list[str]) -> ConfigError:
    if len(problems) == 1:
        return ConfigError(f"deepspeed: {problems[0]}", _REMEDY)
    lines = "\n  ".join(problems)
    return ConfigError(f"deepspeed: {len(problems)} problems:\n  {lines}", _REMEDY)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
