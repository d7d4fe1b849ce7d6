"""The user's DeepSpeed JSON: refused with every problem at once, and what "auto" stands for.

The table of known keys is compared with the installed DeepSpeed, so that it cannot fall behind.
"""

import copy
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from metakd.config.deepspeed import AUTO, SCHEMA, Refused, Value, check_deepspeed, resolve_deepspeed
from metakd.errors import ConfigError

# As people copy it from Hugging Face's documentation: every key that may be "auto" there.
FAMILIAR = {
    "fp16": {"enabled": AUTO, "loss_scale": 0, "loss_scale_window": 1000, "min_loss_scale": 1},
    "bf16": {"enabled": AUTO},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": AUTO, "betas": AUTO, "eps": AUTO, "weight_decay": AUTO},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": AUTO,
            "warmup_max_lr": AUTO,
            "warmup_num_steps": AUTO,
            "total_num_steps": AUTO,
        },
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": AUTO,
        "stage3_prefetch_bucket_size": AUTO,
        "stage3_param_persistence_threshold": AUTO,
        "stage3_max_live_parameters": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": AUTO,
    "gradient_clipping": AUTO,
    "train_batch_size": AUTO,
    "train_micro_batch_size_per_gpu": AUTO,
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
}
OURS = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 3,
    "gradient_clipping": 1.0,
    "fp16.enabled": False,
    "bf16.enabled": True,
    "zero_optimization.stage": 3,
    "optimizer.type": "AdamW",
    "optimizer.params.lr": 2e-5,
    "optimizer.params.betas": (0.9, 0.999),
    "optimizer.params.eps": 1e-8,
    "optimizer.params.weight_decay": 0.01,
    "scheduler.type": "WarmupDecayLR",
    "scheduler.params.warmup_num_steps": 0,
    "scheduler.params.total_num_steps": 50,
    "world_size": 2,
    "hidden_size": 384,
}


def only(path: str, value) -> dict:
    """A configuration of one key, dotted."""
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


# Checking

UNKNOWN = {
    # DeepSpeed itself trains at stage 0 without a word
    "zero_optimisation": ({"stage": 2}, "did you mean zero_optimization?"),
    "train_batchsize": (8, "did you mean train_batch_size?"),
    "overlap_comm": (True, "did you mean zero_optimization.overlap_comm?"),
    "zero_optimization.overlap_com": (True, "did you mean overlap_comm?"),
    "zero_optimization.offload_optimizer.devise": ("cpu", "did you mean device?"),
    "zero_optimization.prefetch_bucket_size": (5, "did you mean stage3_prefetch_bucket_size?"),
    "fp16.loss_scal": (0, "did you mean loss_scale?"),
    "bf16.enable": (True, "did you mean enabled?"),
    "bf16.zzz": (1, "known here: enabled, immediate_grad_update"),
    "optimizer.params.weight_decai": (0.1, "did you mean weight_decay?"),
    "scheduler.params.warmup_steps": (9, "did you mean warmup_num_steps?"),
    "timers.throughput.synchronised": (True, "did you mean synchronized?"),
}


@pytest.mark.parametrize("path", UNKNOWN)
def test_unknown_keys_are_reported_at_every_level(path):
    value, hint = UNKNOWN[path]
    (line,) = check_deepspeed(only(path, value))
    assert line.startswith(f"{path}: unknown key, {hint}") and line.endswith(f"(got {value!r})")


def test_keys_inside_a_misspelt_block_are_checked_too():
    raw = {"zero_optimisation": {"stage": 7, "overlap_com": True}}
    found = [line.split(":")[0] for line in check_deepspeed(raw)]
    inside = ["zero_optimisation.stage", "zero_optimisation.overlap_com"]
    assert found == ["zero_optimisation", *inside]


WRONG = {
    "zero_optimization": (True, "must hold keys with values"),  # a form that DeepSpeed deprecates
    "zero_optimization.stage": (4, "must be 0 or 1 or 2 or 3"),
    "zero_optimization.offload_optimizer.device": (
        "gpu",
        'must be "none" or "cpu" or "nvme"',
    ),
    "zero_optimization.offload_optimizer.ratio": (1.5, "must be at most 1"),
    "zero_optimization.reduce_bucket_size": (0, "must be at least 1"),
    "zero_optimization.sub_group_size": (1.5, "must be an integer"),
    "zero_optimization.overlap_comm": ("true", "must be true or false"),
    "zero_optimization.contiguous_gradients": (AUTO, '"auto" has no rule here'),
    "zero_optimization.leaf_module": ({"names": "a"}, "must be a list of texts"),
    "zero_optimization.compute_grad_norm": (False, "must be true"),
    "gradient_clipping": (float("nan"), "must be a number"),
    "train_batch_size": (True, "must be an integer"),
    "steps_per_print": (float("inf"), "must be an integer"),
    "fp16.loss_scale": (None, "must be a number"),
    "optimizer.type": ("Lamb", 'must be "AdamW"'),
    # How YAML reads 5e-5
    "optimizer.params.lr": ("5e-5", "must be a number, in YAML without quotes and with a dot"),
    "optimizer.params.betas": ([0.9, "x"], "must be a list of numbers"),
    "scheduler.type": ("OneCycle", 'must be "WarmupLR" or "WarmupDecayLR"'),
    "scheduler.params.warmup_type": ("log", 'must be "linear"'),
    "gradient_allreduce_op": ("sum", 'must be "mean"'),
    "elasticity": ({"enabled": True}, "is refused: DeepSpeed has removed it"),
    "pipeline": ({"stages": 2}, "is refused: processes share the data"),
    "activation_checkpointing": ({"profile": True}, "is refused: it acts on models"),
    "torch_autocast": ({"enabled": True}, "is refused: precision is bf16 or fp16"),
    "zero_optimization.cpu_offload": (True, "is refused: DeepSpeed has renamed it"),
}


@pytest.mark.parametrize("path", WRONG)
def test_wrong_values(path):
    value, reason = WRONG[path]
    (line,) = check_deepspeed(only(path, value))
    assert line.startswith(path) and f": {reason}" in line


CONTRADICTIONS = {
    "fp16.enabled and bf16.enabled are both true": {
        "fp16": {"enabled": True},
        "bf16": {"enabled": True},
    },
    "zero_optimization.offload_param.device: cpu needs zero_optimization.stage 3": {
        "zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}
    },
    "zero_optimization.offload_optimizer.device: cpu needs zero_optimization.stage 1": {
        "zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}
    },
    "zero_optimization.offload_optimizer.ratio: 0.5 needs zero_optimization.stage 3": {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"ratio": 0.5}}
    },
    "zero_optimization.offload_param.nvme_path: required key is missing": {
        "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}
    },
}


@pytest.mark.parametrize("reason", CONTRADICTIONS)
def test_contradictions(reason):
    (line,) = check_deepspeed(CONTRADICTIONS[reason])
    assert line.startswith(reason)


def test_all_problems_at_once():
    raw = {"zero_optimisation": {}, "fp16": {"enabled": "yes"}, "steps_per_print": -1, "amp": {}}
    assert len(check_deepspeed(raw)) == 4
    with pytest.raises(ConfigError, match="4 problems") as caught:
        resolve_deepspeed(raw, OURS)
    assert caught.value.exit_code == 2 and caught.value.remedy
    assert check_deepspeed([1]) == ["must hold keys with values (got [1])"]


def test_what_people_write_is_right():
    assert check_deepspeed(FAMILIAR) == [] == check_deepspeed({})


def test_refused_without_importing_anything_heavy():
    code = (
        "import sys; from metakd.config.deepspeed import check_deepspeed\n"
        "assert check_deepspeed({'zero_optimisation': {}})\n"
        "sys.exit(bool({'torch', 'deepspeed', 'transformers'} & set(sys.modules)))\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=root)
    # Of the processor, which another process may hold.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 2


# Resolving


def test_auto_follows_the_rules_of_hugging_face():
    given = copy.deepcopy(FAMILIAR)
    resolved = resolve_deepspeed(FAMILIAR, OURS)
    assert given == FAMILIAR, "the caller's dictionary is left as it is"
    assert AUTO not in json.dumps(resolved)
    assert resolved["fp16"]["enabled"] is False and resolved["bf16"]["enabled"] is True
    assert resolved["train_batch_size"] == 4 * 3 * 2
    assert resolved["train_micro_batch_size_per_gpu"] == 4
    assert resolved["gradient_clipping"] == 1.0
    zero = resolved["zero_optimization"]
    assert zero["reduce_bucket_size"] == 384 * 384
    assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 384 * 384)
    assert zero["stage3_param_persistence_threshold"] == 3840
    assert zero["sub_group_size"] == 1_000_000_000 and isinstance(zero["sub_group_size"], int)
    betas = [0.9, 0.999]
    assert resolved["optimizer"]["params"] == {
        "lr": 2e-5,
        "betas": betas,
        "eps": 1e-8,
        "weight_decay": 0.01,
    }
    assert resolved["scheduler"]["params"] == {
        "warmup_min_lr": 0,
        "warmup_max_lr": 2e-5,
        "warmup_num_steps": 1,  # DeepSpeed refuses 0
        "total_num_steps": 50,
    }


def test_what_the_file_leaves_out_comes_from_the_configuration():
    resolved = resolve_deepspeed({"zero_optimization": {"overlap_comm": False}}, OURS)
    assert resolved["zero_optimization"] == {"overlap_comm": False, "stage": 3}
    assert resolved["bf16"] == {"enabled": True}
    assert resolved["train_micro_batch_size_per_gpu"] == 4
    # Built by the training loop, and facts that are no keys of DeepSpeed.
    assert not {"optimizer", "scheduler", "world_size", "hidden_size"} & set(resolved)


def test_every_contradiction_of_the_configuration_is_named_with_both_keys_and_values():
    raw = copy.deepcopy(FAMILIAR)
    raw["train_micro_batch_size_per_gpu"] = 16
    raw["train_batch_size"] = 23
    raw["zero_optimization"]["stage"] = 2
    del raw["zero_optimization"]["offload_param"]
    raw["optimizer"]["params"]["lr"] = 1e-3
    raw["scheduler"]["params"]["warmup_max_lr"] = 1e-4
    raw["bf16"]["enabled"] = False
    with pytest.raises(ConfigError, match="6 problems") as caught:
        resolve_deepspeed(raw, OURS)
    for line in (
        "train_micro_batch_size_per_gpu: is 16, but per_device_train_batch_size is 4",
        "train_batch_size: is 23, but train_batch_size (micro-batch x accumulation x processes) "
        "is 24",
        "zero_optimization.stage: is 2, but zero is 3",
        "optimizer.params.lr: is 0.001, but learning_rate is 2e-05",
        "scheduler.params.warmup_max_lr: is 0.0001, but learning_rate is 2e-05",
        "bf16.enabled: is False, but bf16 is True",
    ):
        assert line in caught.value.cause


def test_equal_values_and_free_sizes_contradict_nothing():
    raw = copy.deepcopy(FAMILIAR)
    raw["gradient_clipping"] = 1
    raw["optimizer"]["params"]["betas"] = [0.9, 0.999]
    raw["zero_optimization"]["reduce_bucket_size"] = 5e8
    resolved = resolve_deepspeed(raw, OURS)
    assert resolved["zero_optimization"]["reduce_bucket_size"] == 500_000_000


def test_auto_without_a_value_is_an_error():
    short = {k: v for k, v in OURS.items() if k not in ("hidden_size", "optimizer.params.eps")}
    with pytest.raises(ConfigError, match="4 problems") as caught:
        resolve_deepspeed(FAMILIAR, short)
    assert 'reduce_bucket_size: "auto" needs hidden_size' in caught.value.cause
    assert 'optimizer.params.eps: "auto" needs eps' in caught.value.cause


def test_a_stage_from_the_configuration_can_contradict_the_file():
    raw = {"zero_optimization": {"offload_param": {"device": "cpu"}}}
    with pytest.raises(ConfigError, match=r"stage 3 or more \(got 1\)"):
        resolve_deepspeed(raw, {"zero_optimization.stage": 1})


@pytest.mark.parametrize(
    ("raw", "precision", "line"),
    [
        ({"data_types": {"grad_accum_dtype": "fp32"}}, "bf16", "is fp32, beside bf16, which needs"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "fp32", "is bf16, beside fp32, which needs"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "bf16", "is True, which needs zero of"),
        ({"bf16": {"bf16_optimizer_states": True}}, "bf16", "is True, which needs zero of 1 to 3"),
        ({"fp16": {"fp16_master_weights_and_grads": True}}, "fp16", "is True, which needs zero of"),
    ],
)
def test_precisions_that_need_zero_are_refused_without_it(raw, precision, line):
    """DeepSpeed ends in an assertion, or in NotImplementedError."""
    halves = {f"{name}.enabled": name == precision for name in ("fp16", "bf16")}
    ((name, block),) = raw.items()
    (key,) = block
    with pytest.raises(ConfigError) as caught:
        resolve_deepspeed(raw, OURS | halves | {"zero_optimization.stage": 0})
    assert f"{name}.{key}: {line}" in caught.value.cause
    assert resolve_deepspeed(raw, OURS | halves | {"zero_optimization.stage": 1})


# The table against the installed DeepSpeed


class Spy(dict):
    """A configuration that notes which keys are asked for."""

    asked: set

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def keys(self):
        # DeepSpeed writes `key in config.keys()` as well.
        view = Spy(self)
        view.asked = self.asked
        return view


def spy(**content) -> Spy:
    made = Spy(content)
    made.asked = set()
    return made


def test_the_top_level_is_what_deepspeed_reads():
    from deepspeed.runtime import config as theirs

    raw = spy(train_micro_batch_size_per_gpu=1)
    theirs.DeepSpeedConfig(raw)
    asked = raw.asked
    assert "zero_optimization" in asked and len(asked) > 40
    assert asked <= set(SCHEMA), f"not in the table: {sorted(asked - set(SCHEMA))}"
    removed = {key for key, known in SCHEMA.items() if known is SCHEMA["elasticity"]}
    assert removed <= set(theirs._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    # Read outside DeepSpeedConfig or only beside another key.
    elsewhere = {"scheduler", "inference", "vocabulary_size", "bfloat16"}
    accepted = {key for key, known in SCHEMA.items() if not isinstance(known, Refused)}
    assert accepted - asked <= elsewhere


def test_blocks_that_deepspeed_reads_by_hand():
    from deepspeed.runtime import config as theirs

    names = ["activation_checkpointing", "flops_profiler", "aio", "data_types", "timers"]
    blocks = {name: spy() for name in names}
    theirs.DeepSpeedConfig(spy(train_micro_batch_size_per_gpu=1, **blocks))
    for name, block in blocks.items():
        if not isinstance(SCHEMA[name], Refused):
            assert set(SCHEMA[name]) == block.asked, name
    for name in ("optimizer", "scheduler"):
        block = spy(type="AdamW", params={})
        theirs.DeepSpeedConfig(spy(train_micro_batch_size_per_gpu=1, **{name: block}))
        assert block.asked == set(SCHEMA[name]), name


def test_scheduler_parameters_are_those_of_the_classes():
    import inspect

    from deepspeed.runtime import lr_schedules

    known = set()
    for name in SCHEMA["scheduler"]["type"].choices:
        known |= set(inspect.signature(getattr(lr_schedules, name)).parameters)
    assert set(SCHEMA["scheduler"]["params"]) == known - {"optimizer", "last_batch_iteration"}


def models():
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.leaf_module_config import DeepSpeedZeroLeafModuleConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    zero = SCHEMA["zero_optimization"]
    return {
        "fp16": (DeepSpeedFP16Config, SCHEMA["fp16"]),
        "bf16": (DeepSpeedBF16Config, SCHEMA["bf16"]),
        "zero_optimization": (DeepSpeedZeroConfig, zero),
        "offload_param": (DeepSpeedZeroOffloadParamConfig, zero["offload_param"]),
        "offload_optimizer": (DeepSpeedZeroOffloadOptimizerConfig, zero["offload_optimizer"]),
        "leaf_module": (DeepSpeedZeroLeafModuleConfig, zero["leaf_module"]),
        "comms_logger": (CommsLoggerConfig, SCHEMA["comms_logger"]),
        "throughput": (DeepSpeedThroughputTimerConfig, SCHEMA["timers"]["throughput"]),
    }


def test_blocks_hold_the_fields_of_deepspeed_s_models():
    from deepspeed.runtime.config import _REMOVED_ZERO_CONFIG_KEYS

    for name, (model, schema) in models().items():
        theirs = {field.alias or key for key, field in model.model_fields.items()}
        if name == "zero_optimization":
            theirs |= set(_REMOVED_ZERO_CONFIG_KEYS)
        assert set(schema) == theirs, name


# Of each kind something right, something at the edge and something wrong.
PROBES = (True, False, 0, 1, 2, 3, 4, -1, 0.5, 1.5, 2.5, 1e9, "x", "cpu", "nvme", [], ["a"], [1])


def test_what_the_table_accepts_deepspeed_accepts_and_defaults_are_right():
    checked = 0
    for name, (model, schema) in models().items():
        for key, field in model.model_fields.items():
            known = schema[field.alias or key]
            if not isinstance(known, Value):
                continue
            default = field.get_default(call_default_factory=True)
            if default is not None:
                assert known.fault(default) is None, f"{name}.{key}: default {default!r}"
            for probe in PROBES:
                if known.fault(probe) is None:
                    # Rules between fields are not the table's: these satisfy them.
                    others = {"stage": 3} if name == "zero_optimization" else {}
                    if key == "bf16_optimizer_states":
                        others = {"bf16_master_weights_and_grads": True}
                    if key == "compute_grad_norm":
                        others = {"stage": 1}
                    try:
                        model(**{**others, field.alias or key: probe})
                    except ValidationError as error:
                        pytest.fail(f"{name}.{key}: {probe!r} is refused: {error}")
                    checked += 1
    assert checked > 200


def test_a_resolved_configuration_is_one_that_deepspeed_takes():
    from deepspeed.runtime.config import DeepSpeedConfig

    raw = copy.deepcopy(FAMILIAR)
    resolved = resolve_deepspeed(raw, OURS | {"world_size": 1})
    theirs = DeepSpeedConfig(resolved)
    assert theirs.zero_config.stage == 3 and theirs.bfloat16_config.enabled
    assert (theirs.train_batch_size, theirs.gradient_accumulation_steps) == (12, 3)


def test_log_levels_and_data_types_are_deepspeed_s():
    from deepspeed.runtime.config import DtypeEnum, get_communication_data_type
    from deepspeed.utils.logging import log_levels

    assert set(SCHEMA["log_level"].choices) == set(log_levels)
    for name in SCHEMA["communication_data_type"].choices:
        dtype = get_communication_data_type({"communication_data_type": name})
        assert DtypeEnum(name).value == dtype
