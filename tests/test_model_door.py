"""Models as people have them: what makes answers depend on a text's company is put right or
refused, models are tried out before anything is trained, students may read other tokens than
teachers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from oracle import backend_dtypes
from processes import run_ranks
from rich.console import Console
from tiny_runs import losses, rows_of, write_config, write_rows
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DebertaV2Config,
    PreTrainedModel,
    T5Config,
)

import metakd
from benchmarks import models
from metakd.config import DistillConfig, StudentConfig
from metakd.config import load_config as read_config
from metakd.deploy import Predictor
from metakd.deploy.export import write_files
from metakd.errors import ConfigError
from metakd.method.terms import AttentionTerm, Setup
from metakd.models.reader import SAME, open_reader
from metakd.models.sources import (
    load_classifier,
    load_config,
    load_encoder,
    small,
    why_not_alike,
)
from metakd.models.student import keep_layers, student_shape
from metakd.models.taps import Taps, attention_spans, why_not_run
from metakd.pipeline.stages import Run
from metakd.training.world import join_world

TEXTS = [f"a good one number{i}, and not at all what somebody would have thought" for i in range(9)]
COMPANY = ["a good one", TEXTS[0], "one"]
STEPS = "distill.training={num_train_epochs: 4, learning_rate: 1e-3}"
LOGITS = ("distill.method=logits_kd", "distill.domains=[hiking]", STEPS)
WHOLE_TEXTS = (  # what meta compares of them
    "distill.terms={embedding: 0, hidden: 0, attention: 0}",
    "distill.domains=[hiking]",
    STEPS,
)


# Company


def test_a_tokenizer_without_padding_gets_one(tmp_path):
    models.write_teacher("Llama", TEXTS, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token is None
    tokenizer, number, changed = open_reader(str(tmp_path), 24)
    assert tokenizer.pad_token == "[SEP]" and number == tokenizer.pad_token_id and changed


def disagreement(model, tokenizer) -> float:
    """Between the logits of texts alone and in a batch, as a part of the largest."""
    with torch.no_grad():
        together = model(**tokenizer(COMPANY, padding=True, return_tensors="pt")).logits
        alone = [model(**tokenizer([text], return_tensors="pt")).logits for text in COMPANY]
    return float((torch.cat(alone) - together).abs().max() / together.abs().max())


@pytest.mark.parametrize("name, side", [("Llama", "right"), ("GPT-2", "left")])
def test_padding_of_another_token_or_side_is_put_right(tmp_path, name, side):
    """A Llama classifier whose configuration names another padding token than its tokenizer reads
    the padding; GPT-2 with padding on the left counts positions from there."""
    models.write_teacher(name, TEXTS, tmp_path)
    shape, tokenizer = AutoConfig.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    shape.pad_token_id = 5 if side == "right" else 0
    tokenizer.pad_token, tokenizer.padding_side = "[PAD]", side
    for part in (shape, tokenizer):
        part.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    assert disagreement(plain, tokenizer) > 0.01
    reader = open_reader(str(tmp_path), 24)
    reader.tokenizer.model_input_names = ["input_ids", "attention_mask"]
    model = load_classifier(str(tmp_path), {"a": 0, "b": 1}, pad_token_id=reader.pad_token_id)
    assert disagreement(model.eval(), reader.tokenizer) < SAME


def test_a_model_without_a_mask_is_refused(make, tmp_path):
    models.write_teacher("FNet", TEXTS, tmp_path / "fnet")
    with pytest.raises(ConfigError, match=r"teacher\.model: .*fnet model says .* on the padding"):
        make(f"teacher.model={tmp_path / 'fnet'}").distill()


def test_a_rotary_teacher_that_came_padded_on_the_left_pads_on_the_right(tmp_path):
    """Which it does not mind, and its students with absolute positions do."""
    models.write_teacher("Llama", TEXTS, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(tmp_path)
    assert open_reader(str(tmp_path), 24).tokenizer.padding_side == "right"


def test_an_export_that_tells_types_apart_whose_tokenizer_makes_none(tmp_path):
    """As a preset's of a RoBERTa."""
    models.write_teacher("BERT", TEXTS, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    write_files(AutoModelForSequenceClassification.from_pretrained(tmp_path), tmp_path / "onnx")
    tokenizer.save_pretrained(tmp_path / "onnx")
    assert len(Predictor(tmp_path / "onnx", engine="onnx")(TEXTS)) == len(TEXTS)


def test_texts_that_are_cut_short_are_padded_rightly_too(tmp_path):
    """Cut alike, a short and a long one would tell nothing of padding."""
    models.write_teacher("Llama", TEXTS, tmp_path)
    shape, tokenizer = AutoConfig.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    shape.pad_token_id, tokenizer.pad_token = 8, "[PAD]"
    for part in (shape, tokenizer):
        part.save_pretrained(tmp_path)
    predictor = Predictor(tmp_path, engine="eager", max_length=3)
    alone, together = predictor.logits(["a"]), predictor.logits(["a", TEXTS[0]])
    torch.testing.assert_close(torch.tensor(together[0]), torch.tensor(alone[0]))


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "FNet"])
def test_whatever_is_served_answers_alike_in_company(tmp_path, name):
    """Others' classifiers: no padding token, the wrong one, padding on the left, no mask."""
    models.write_teacher(name, TEXTS, tmp_path)
    assert models.company(tmp_path, TEXTS + COMPANY) < 1e-6
    shape, tokenizer = AutoConfig.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    shape.pad_token_id = 5
    tokenizer.pad_token, tokenizer.padding_side = "[PAD]", "left"
    for part in (shape, tokenizer):
        part.save_pretrained(tmp_path)
    assert models.company(tmp_path, TEXTS + COMPANY) < 1e-6


# Tried out before anything is trained


def test_a_model_that_does_not_run_is_refused_at_once(make, tmp_path, source):
    shape = T5Config(
        **{"vocab_size": 300, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    )
    AutoModelForSequenceClassification.from_config(shape).save_pretrained(tmp_path / "t5")
    AutoTokenizer.from_pretrained(source / "encoder").save_pretrained(tmp_path / "t5")
    run = make(f"teacher.model={tmp_path / 't5'}", "student={preset: tiny-2l-128}", *LOGITS)
    with pytest.raises(ConfigError, match=r"teacher\.model: cannot run a text of \d+ tokens: "):
        run.distill()
    assert not (run.folder / "teachers").exists()


@pytest.mark.parametrize("name", ["DistilBERT", "RoBERTa"])
def test_token_types_go_to_models_that_tell_them_apart(make, tmp_path, source, name):
    """The teacher's tokenizer makes two types of a pair; these students know one, or none."""
    models.write_teacher(name, TEXTS, tmp_path / "student")
    AutoTokenizer.from_pretrained(source / "encoder").save_pretrained(tmp_path / "student")
    rows = rows_of(source / "corpus" / "train.jsonl")
    pairs = [row | {"second": other["text"]} for row, other in zip(rows, reversed(rows))]
    options = [
        f"data.{part}={write_rows(tmp_path / f'{part}.jsonl', pairs[start::3])}"
        for start, part in enumerate(("train", "validation", "test"))
    ]
    run = make(
        *options, "data.text_pair=second", f"student={{model: {tmp_path / 'student'}}}", *LOGITS
    )
    assert "token_type_ids" in run.collate([run.corpus.train[0]])
    [folder] = run.distill()
    assert len(Predictor(folder, engine="eager")([("one", "two"), ("three", "four")])) == 2


def longest_of(tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.full((1, tokens), 7)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_a_preset_has_positions_for_long_texts():
    student = StudentConfig(preset="tiny-2l-128")
    shape = student_shape(student, AutoConfig.for_model("bert", vocab_size=90), 600)
    assert why_not_run(shape, frozenset({"hidden"}), False, longest_of(600)) is None


def test_a_model_that_is_too_large_to_be_tried_out_is_not_refused_for_it():
    shape = DebertaV2Config(vocab_size=300_000, pooler_hidden_size=768)
    assert (
        small(shape) is not None and why_not_run(shape, frozenset(), False, longest_of(9)) is None
    )


def test_a_tokenizer_that_cannot_be_read_is_not_taken_for_the_teachers(make, source, tmp_path):
    shutil.copytree(source / "small", tmp_path / "cut")
    file = tmp_path / "cut" / "tokenizer.json"
    file.write_text(file.read_text()[:-40])
    with pytest.raises(ConfigError, match=r"student\.model: .*cut: its files cannot be used"):
        make(f"student={{model: {tmp_path / 'cut'}}}", *LOGITS).distill()


# Layers


def test_modernbert_from_its_second_layer(tmp_path):
    """The README's layers: the first of a ModernBERT has no norm before its attention."""
    models.write_teacher("ModernBERT", TEXTS, tmp_path)
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    student = keep_layers(whole, [1, 3, 5])
    taught = whole.state_dict()
    for name, value in student.state_dict().items():
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            parts[2] = str([1, 3, 5][int(parts[2])])
        assert torch.equal(value, taught[".".join(parts)])
    assert student.config.layer_types == [whole.config.layer_types[n] for n in (1, 3, 5)]
    again = keep_layers(whole, [1, 0])  # whose second has a norm, as it is made
    assert torch.equal(again.model.layers[1].attn_norm.weight, torch.ones(32))


@pytest.mark.parametrize("name, method", [("ModernBERT", "meta"), ("Llama", "tinybert_kd")])
def test_whole_runs(source, tmp_path, name, method):
    """All of them: python -m benchmarks.models."""
    models.write_teacher(name, TEXTS, tmp_path / "teacher")
    settings = models.settings(tmp_path / "teacher", source / "corpus", name, method)
    result = metakd.run(settings, console=Console(quiet=True))
    [[student]] = result.students.values()
    assert models.company(student, TEXTS) < 1e-5
    if name == "Llama":
        assert models.parity(student, tmp_path / "onnx") < 1e-5


# What layers attend to


def attentive(kind: str, layers: int) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 32}
    options = {"vocab_size": 99, "num_hidden_layers": layers, "pad_token_id": 0, **sizes}
    own = {
        "ModernBertConfig": {"local_attention": 12, "global_attn_every_n_layers": 2},
        "LlamaConfig": {"num_key_value_heads": 2},
        "MistralConfig": {"num_key_value_heads": 2, "sliding_window": 7},
    }
    config = getattr(transformers, kind)(**options, **own[kind], initializer_range=0.3)
    return AutoModelForSequenceClassification.from_config(config).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["ModernBertConfig", "LlamaConfig", "MistralConfig"])
@pytest.mark.parametrize(
    "backend, _dtype",
    backend_dtypes("attention_kl", ("reference", "cpp", "triton"), [torch.float32]),
)
def test_attention_terms_count_what_both_models_attend_to(kind, backend, _dtype):
    """Against loops over eager maps, which are zero where a layer does not look."""
    torch.manual_seed(0)
    student, teacher = attentive(kind, 3), attentive(kind, 4)
    ids = torch.randint(2, 99, (2, 24))
    mask = torch.ones_like(ids)
    ids[1, 17:] = mask[1, 17:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    maps = []
    for model in (student, teacher):
        model.set_attn_implementation("eager")
        maps.append([m.double() for m in model(**batch, output_attentions=True).attentions])
        model.set_attn_implementation("sdpa")
    own, taught = (Taps(model, {"query", "key"})(batch) for model in (student, teacher))
    matched = [0, 2, 3]  # of ModernBERT: 0 and 2 see everything, 1 and 3 a window
    spans = attention_spans(student.config), attention_spans(teacher.config)
    for form in ("scores", "probabilities"):
        config = DistillConfig(attention=form, layer_map=matched, backend=backend)
        term = AttentionTerm.configured(1.0, config, Setup(3, 4, spans=lambda: spans))
        assert (term.remark is not None) == (kind == "ModernBertConfig")
        found = term.rows(own, taught, batch, None)
        expected = torch.zeros(2, dtype=torch.float64)
        for layer, other in enumerate(matched):
            pair = [maps[0][layer], maps[1][other]]
            real = mask[:, None, :, None] * mask[:, None, None, :]
            seen = (pair[0] > 0) & (pair[1] > 0) & (real == 1)
            if form == "scores":
                states = (
                    (own.query[layer], own.key[layer]),
                    (taught.query[other], taught.key[other]),
                )
                pair = [q.double() @ k.double().mT * q.shape[-1] ** -0.5 for q, k in states]
            elif not torch.equal(pair[0] > 0, pair[1] > 0):  # maps of what both see
                pair = [
                    (m * seen) / (m * seen).sum(-1, keepdim=True).clamp(min=1e-30) for m in pair
                ]
            gaps = (pair[0] - pair[1]).square().where(seen, 0.0)
            expected += gaps.sum((1, 2, 3)) / seen.sum((1, 2, 3))
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


def test_scores_with_a_bias_of_their_own_are_refused():
    taps = Taps(attentive("LlamaConfig", 1), {"query"})
    bias = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="adds numbers of its own to the scores"):
        taps({"input_ids": torch.ones(1, 8, dtype=torch.long), "attention_mask": bias})


# Other tokens


@pytest.fixture(scope="module")
def renumbered(source, tmp_path_factory) -> Path:
    """The small encoder with other numbers for the same tokens."""
    folder = tmp_path_factory.mktemp("renumbered")
    tokenizer = AutoTokenizer.from_pretrained(source / "small")
    tokenizer.save_pretrained(folder)
    state = json.loads((folder / "tokenizer.json").read_text())
    words = state["model"]["vocab"]
    number = torch.arange(len(words))
    number[5:] = number[5:].flip(0)  # the special tokens stay
    state["model"]["vocab"] = {word: int(number[place]) for word, place in words.items()}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    model = AutoModel.from_pretrained(source / "small")
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[number] = table[: len(words)].clone()
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "options",
    [LOGITS, (*LOGITS, "distill.cache_teacher=logits"), WHOLE_TEXTS],
    ids=["logits", "cached", "meta"],
)
def test_a_student_that_has_other_numbers_for_its_tokens_learns_the_same(
    make, source, renumbered, options
):
    seen, vocabularies = [], []
    for model in (source / "small", renumbered):
        run = make(f"student={{model: {model}}}", *options)
        [folder] = run.distill()
        seen.append(losses(run.folder / "students"))
        vocabularies.append(AutoTokenizer.from_pretrained(folder).get_vocab())
        scores = run.evaluate()["students"]
        assert scores["hiking"].items() <= run.store.result(folder)["test"].items()
    [[(_, alike)], [(_, apart)]] = (each.items() for each in seen)
    assert apart == pytest.approx(alike, rel=1e-5) and len(alike) > 1
    assert vocabularies[0] != vocabularies[1]
    assert vocabularies[1] == AutoTokenizer.from_pretrained(renumbered).get_vocab()


def test_a_comparison_asks_for_what_its_rows_compare(make, source, renumbered):
    """And not for what the configured method, which none of them is, would."""
    rows = "compare={rows: [{method: finetune}], seeds: [1]}"
    run = make(f"student={{model: {renumbered}}}", rows, "distill.domains=[hiking]")
    with pytest.raises(ConfigError, match="embedding compares token with token"):
        run.distill()
    result = metakd.compare(run.config, console=Console(quiet=True))
    assert list(result.scores) == ["finetune"]


def test_a_decoder_teaches_an_encoder(make, source, tmp_path):
    """Each with its own tokenizer; what the teacher knows of whole texts is compared."""
    texts = [row["text"] for row in rows_of(source / "corpus" / "train.jsonl")]
    models.write_teacher("Llama", [text[::-1] for text in texts], tmp_path / "llama")
    run = make(
        f"teacher.model={tmp_path / 'llama'}",
        f"student={{model: {source / 'small'}}}",
        *WHOLE_TEXTS,
    )
    [folder] = run.distill()
    assert AutoConfig.from_pretrained(folder).model_type == "bert"
    assert models.company(folder, TEXTS) < 1e-5
    [logged] = losses(run.folder / "students").values()
    assert logged[-1] < logged[0]


SHARDINGS = (
    [],
    ["teacher.zero=3", "deepspeed={zero_optimization: {stage3_param_persistence_threshold: 0}}"],
)


def taught_by_two(source: Path, folder: Path) -> None:
    """A decoder's student that reads with its own tokenizer, the teacher whole and in shards."""
    world = join_world()
    for number, options in enumerate(SHARDINGS):
        if world.is_main:
            write_config(source, folder, str(number))
        world.barrier()
        models_of = [f"teacher.model={folder / 'llama'}", f"student={{model: {source / 'small'}}}"]
        config = read_config(
            str(folder / f"{number}.yaml"), [*models_of, *WHOLE_TEXTS, "bf16=true", *options]
        )
        Run(config, world, Console(quiet=True)).distill()


def test_a_decoder_in_shards_teaches_the_same(source, tmp_path):
    """Two processes, bf16, ZeRO-3."""
    texts = [row["text"] for row in rows_of(source / "corpus" / "train.jsonl")]
    models.write_teacher("Llama", [text[::-1] for text in texts], tmp_path / "llama")
    run_ranks(2, taught_by_two, source, tmp_path)
    whole, sharded = (list(losses(tmp_path / name / "students").values()) for name in "01")
    assert sharded == [pytest.approx(each, rel=1e-2) for each in whole] and len(whole[0]) > 1


# Adapters


@pytest.mark.parametrize("name", ["BERT", "Llama"])
def test_an_adapter_is_merged_into_its_base(tmp_path, make, source, monkeypatch, name):
    peft = pytest.importorskip("peft", reason="the extra 'adapters' is not installed")
    models.write_teacher(name, TEXTS, tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    wanted = peft.LoraConfig(r=4, task_type="SEQ_CLS", init_lora_weights=False)
    tuned = peft.get_peft_model(model, wanted).eval()
    tuned.save_pretrained(adapter := str(tmp_path / "adapter"))
    ids = torch.arange(10, 20)[None]
    labels = {"negative": 0, "positive": 1}
    expected = tuned(input_ids=ids).logits
    loaded = load_classifier(adapter, labels, pad_token_id=0).eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected)
    assert all(value.requires_grad for value in loaded.parameters())  # peft freezes what it wraps
    encoded = load_encoder(adapter).eval()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(encoded, loaded.base_model(input_ids=ids).last_hidden_state)
    assert load_classifier(adapter, labels | {"neutral": 2}).config.num_labels == 3
    if name == "Llama":
        run = make(f"teacher.model={adapter}", "student={preset: tiny-2l-128}", *LOGITS)
        assert [AutoConfig.from_pretrained(f).model_type for f in run.teach()] == ["llama"]
    monkeypatch.setattr("metakd.models.adapters.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"peft is needed: pip install 'metakd\[adapters\]'"):
        load_encoder(adapter)


@pytest.mark.parametrize("task", [None, "FEATURE_EXTRACTION", "CAUSAL_LM"])
def test_adapters_that_were_trained_for_something_else(tmp_path, task):
    """On the bare model, or to write texts: the weights are what counts."""
    peft = pytest.importorskip("peft", reason="the extra 'adapters' is not installed")
    name, auto = ("Llama", AutoModelForCausalLM) if task == "CAUSAL_LM" else ("BERT", AutoModel)
    models.write_teacher(name, TEXTS, tmp_path / "base")
    wanted = peft.LoraConfig(r=4, task_type=task, init_lora_weights=False)
    if task is None:
        wanted.target_modules = {"query"}
    tuned = peft.get_peft_model(auto.from_pretrained(tmp_path / "base"), wanted).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(10, 20)[None]
    expected = tuned(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    found = load_encoder(str(tmp_path / "adapter")).eval()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(found, expected)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    peft = pytest.importorskip("peft", reason="the extra 'adapters' is not installed")
    for name in ("BERT", "Llama"):
        models.write_teacher(name, TEXTS, tmp_path / name)
    model = AutoModel.from_pretrained(tmp_path / "BERT")
    peft.get_peft_model(model, peft.LoraConfig(r=4)).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace(str(tmp_path / "BERT"), str(tmp_path / "Llama")))
    with pytest.raises(ValueError, match=r"adapter: its adapter cannot be merged into Llama"):
        load_encoder(str(tmp_path / "adapter"))
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "a.bin")
    with pytest.raises(ValueError, match=r"holds a\.bin and no safetensors"):
        load_encoder(str(tmp_path / "adapter"))


def test_an_adapter_reads_the_tokens_of_its_base(tmp_path, source):
    models.write_teacher("BERT", [text[::-1] for text in TEXTS], tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    described = {"base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(described))
    taught = AutoTokenizer.from_pretrained(source / "encoder")
    assert "has a vocabulary of" in why_not_alike(str(tmp_path / "adapter"), taught)


def test_an_adapter_that_names_no_base_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no base_model_name_or_path"):
        load_config(str(tmp_path))
