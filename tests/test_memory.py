"""The memory estimate against the tensors of real models."""

import deepspeed
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from metakd.config import RunConfig
from metakd.errors import ConfigError
from metakd.pipeline.memory import (
    BYTES,
    STAGES,
    count_embeddings,
    count_parameters,
    estimate,
    estimate_frozen,
    memory_table,
)
from metakd.training.world import join_world

SHAPE = {"batch": 4, "length": 16, "layers": 2, "hidden": 32, "heads": 4}
FROZEN = {name: value for name, value in SHAPE.items() if name != "heads"}
TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def plan(parameters=1000, zero=0, offload=False, dtype="fp32", world_size=1):
    return estimate(
        parameters, zero=zero, offload=offload, dtype=dtype, world_size=world_size, **SHAPE
    )


def size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def moments(optimizer, parameters: int) -> int:
    """Bytes of Adam's two moments, without the step counts."""
    states = [value for state in optimizer.state.values() for value in state.values()]
    counted = size(tensor for tensor in states if tensor.numel() > 1)
    steps = sum(tensor.numel() == 1 for tensor in states)
    assert counted + 4 * steps >= 8 * parameters
    return counted


def test_the_parameters_are_counted_without_allocating_them(tiny_bert):
    model = tiny_bert()
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert count_parameters(model.config) == expected
    # 1.9 TB, were they real
    assert count_parameters(BertConfig(hidden_size=98304, num_attention_heads=96)) > 4e11


def test_plain_training_is_counted_to_the_byte(tiny_bert, make_batch):
    model, batch = tiny_bert().train(), make_batch()
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=batch["input_ids"], labels=batch["labels"]).loss.backward()
    optimizer.step()
    parameters = count_parameters(model.config)
    planned = plan(parameters)
    assert planned.weights == size(model.parameters())
    assert planned.gradients == size(parameter.grad for parameter in model.parameters())
    assert planned.optimizer == moments(optimizer, parameters)


# What DeepSpeed calls its fp32 copy: without ZeRO in half precision, and with it.
COPIES = {
    "FP16_UnfusedOptimizer": "fp32_groups",
    "DeepSpeedZeroOptimizer": "single_partition_of_fp32_groups",
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("zero", [0, 1, 2])
def test_deepspeed_s_tensors_are_counted_to_the_byte(make_batch, zero, dtype):
    join_world()
    # Every size a multiple of what DeepSpeed pads to, and one group, as in a flat buffer.
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=16,
            num_labels=4,
        )
    )
    batch = make_batch()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": zero},
            "bf16": {"enabled": dtype == "bf16"},
        },
    )
    loss = engine(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    engine.backward(loss)
    parameters = count_parameters(model.config)
    planned = plan(parameters, zero=zero, dtype=dtype)
    if zero == 0:
        assert planned.gradients == size(parameter.grad for parameter in model.parameters())
    engine.step()
    assert planned.weights == size(model.parameters())
    held = engine.optimizer
    groups = getattr(held, COPIES.get(type(held).__name__, ""), [])
    copies = [
        tensor for group in groups for tensor in (group if isinstance(group, list) else [group])
    ]
    inner = getattr(held, "optimizer", held)
    assert planned.optimizer == size(copies) + moments(inner, parameters)
    engine.destroy()


@pytest.mark.parametrize("dtype", BYTES)
def test_weights_follow_the_dtype(dtype):
    assert torch.empty(0, dtype=TORCH[dtype]).element_size() == BYTES[dtype]
    assert plan(dtype=dtype).weights == 1000 * BYTES[dtype]


def test_each_stage_shards_one_thing_more():
    planned = [plan(zero=stage, dtype="bf16", world_size=4) for stage in STAGES]
    assert [memory.optimizer for memory in planned] == [12_000, 3_000, 3_000, 3_000]
    assert [memory.gradients for memory in planned] == [2_000, 2_000, 500, 500]
    assert [memory.weights for memory in planned] == [2_000, 2_000, 2_000, 500]
    assert plan(1001, zero=3, world_size=4).weights == 4 * 251  # padded to whole parts


def test_offload_moves_bytes_to_the_host():
    near, far = plan(zero=2, dtype="bf16"), plan(zero=2, dtype="bf16", offload=True)
    assert far.optimizer == 0 and far.host == near.optimizer + 4 * 1000  # fp32 gradients beside it
    assert far.weights == near.weights
    whole = plan(zero=3, dtype="bf16", offload=True)
    assert whole.weights == 0 and whole.host == far.host + 2000


def test_a_frozen_teacher_has_no_state():
    options = {"dtype": "bf16", "world_size": 2, **FROZEN}
    whole = estimate_frozen(1000, zero=0, offload=False, **options)
    assert (whole.weights, whole.gradients, whole.optimizer) == (2000, 0, 0)
    assert estimate_frozen(1000, zero=3, offload=False, **options).weights == 1000
    away = estimate_frozen(1000, zero=3, offload=True, **options)
    assert (away.weights, away.host) == (0, 1000)


def test_checkpointing_keeps_one_layer_and_the_inputs_of_all():
    options = {"zero": 0, "offload": False, "dtype": "fp32", "world_size": 1}
    whole = [estimate(1, **options, **SHAPE | {"layers": n}).activations for n in (1, 8)]
    kept = estimate(1, **options, **SHAPE | {"layers": 8}, checkpointing=True).activations
    tokens = SHAPE["batch"] * SHAPE["length"]
    assert kept == whole[0] + 8 * 4 * tokens * SHAPE["hidden"] < whole[1] / 3


def test_the_activations_are_about_what_a_step_keeps():
    """Counted by the tensors that autograd saves in one forward pass of plain BERT, without the
    attention dropout that makes a CPU's SDPA keep its maps."""
    layers, hidden, heads, length, batch = 3, 64, 4, 32, 8
    shape = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=50,
            intermediate_size=4 * hidden,
            attention_probs_dropout_prob=0.0,
            attn_implementation="sdpa",
            **shape,
        )
    ).train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(torch.randint(50, (batch, length)))
    counted = sum(nbytes for nbytes, _ in kept.values())
    planned = estimate(
        1,
        zero=0,
        offload=False,
        dtype="fp32",
        world_size=1,
        batch=batch,
        length=length,
        layers=layers,
        hidden=hidden,
        heads=heads,
    ).activations
    assert 0.9 * planned < counted < 1.2 * planned


def test_the_table_of_a_configuration(tiny_bert, tmp_path):
    tiny_bert(layers=4).save_pretrained(tmp_path)
    config = RunConfig(
        output_dir="unused",
        data={"train": "unused", "max_length": 16},
        teacher={"model": str(tmp_path)},
        student={"layers": [0, 2]},
        zero=1,
        bf16=True,
    )
    table = memory_table(config, 2)
    assert table["counted for"] == "2 processes, bf16"
    parameters = count_parameters(tiny_bert(layers=2).config)
    planned = estimate(
        parameters,
        zero=1,
        offload=False,
        dtype="bf16",
        world_size=2,
        **SHAPE | {"batch": 32},
    )
    assert table["student training, ZeRO 1 (configured)"] == str(planned)
    rows = [{"method": "finetune", "student": {"layers": [0], "freeze_embeddings": True}}]
    compared = RunConfig(**config.model_dump(exclude={"compare"}), compare={"rows": rows})
    assert "training of layers-0-frozen, ZeRO 2" in memory_table(compared, 2)
    # One process has nothing to share: one row will do.
    table = memory_table(config, 1)
    assert [name for name in table if name.startswith("student training,")] == [
        "student training, any ZeRO stage"
    ]
    with pytest.raises(ConfigError, match="nowhere"):
        memory_table(
            config.model_copy(
                update={"teacher": config.teacher.model_copy(update={"model": "nowhere/x/y"})}
            ),
            1,
        )


def test_frozen_parameters_have_neither_gradient_nor_moments():
    options = {"offload": False, "dtype": "bf16", "world_size": 2, **SHAPE}
    for zero in range(4):
        whole = estimate(1000, zero=zero, frozen=400, **options)
        trained = estimate(600, zero=zero, **options)
        assert whole.weights == 2 * (500 if zero == 3 else 1000)
        assert (whole.gradients, whole.optimizer) == (trained.gradients, trained.optimizer)
    shape = BertConfig(vocab_size=50, hidden_size=12, num_hidden_layers=1)
    assert count_embeddings(shape) == 50 * 12
