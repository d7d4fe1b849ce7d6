"""Students at work: exports answer as the model they were made from, engines and the predictor as
plain PyTorch does, and what is timed is what is said to be."""

import io
import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import BUILDERS
from tokenizers import Tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    PreTrainedTokenizerFast,
    pipeline,
)

from metakd import cli, demo
from metakd.data.digests import entry_of
from metakd.deploy import Predictor, engines, export_onnx, formats, latency, smoothing
from metakd.deploy import export as exporting
from metakd.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ParityError,
    UnsupportedError,
)
from metakd.method.tasks import SINGLE_LABEL
from metakd.models.inputs import input_names

pytest.importorskip("onnxruntime", reason="the extra 'deploy' is not installed")
pytest.importorskip("onnxscript", reason="the extra 'deploy' is not installed")

DEEP = pytest.mark.deep
RECORD = {"result": {"validation": {}}, "kept": True, "seconds": 1.0, "world_size": 1}
TEXTS = demo.made_up_texts(40)
LABELS = ("bad", "good")


def plain(folder, texts) -> np.ndarray:
    """Logits of one text at a time, unpadded, by transformers alone."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    with torch.no_grad():
        return np.concatenate(
            [
                model(**tokenizer(text, return_tensors="pt", truncation=True)).logits.numpy()
                for text in texts
            ]
        )


def random_student(folder: Path) -> Path:
    """A folder as training leaves it, but for random weights."""
    tokenizer = demo.train_tokenizer(TEXTS, 600)
    shape = BertConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,  # answers that differ from text to text
        id2label=dict(enumerate(LABELS)),
        label2id={label: number for number, label in enumerate(LABELS)},
    )
    AutoModelForSequenceClassification.from_config(shape).save_pretrained(folder)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    torch.manual_seed(0)
    return random_student(tmp_path_factory.mktemp("work") / "student")


@pytest.fixture(scope="module")
def exported(student):
    """The report of an export of ``student`` in every format, which stays in its folder."""
    labels = [LABELS[number] for number in plain(student, TEXTS).argmax(1)]
    # Random weights have texts on the border, which trained ones hardly have.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "LEAST_AGREEMENT", 0.9)
        return export_onnx(student, TEXTS, labels=labels, data="made up", int8=True, fp16=True)


class TestExport:
    def test_every_format_answers_as_the_model(self, exported):
        checked = dict(exported["checked"])
        assert any("compared on 40 texts" in remark for remark in checked.pop("remarks"))
        assert checked == {"examples": 40, "data": "made up", "accuracy": 1.0}
        fp32, int8, fp16 = (exported["formats"][name] for name in formats.ONNX_FILES.values())
        assert fp32["max_logit_error"] < 1e-5 and fp32["accuracy"] == 1.0
        assert 0 < fp16["max_logit_error"] < 0.05 and fp16["bytes"] < fp32["bytes"]
        assert int8["max_logit_error"] > 0 and int8["accuracy"] == int8["label_agreement"] >= 0.9
        assert int8["activations"] == "static" and int8["labels_by_batch"] == 0.0

    def test_what_int8_says_of_a_text_depends_on_its_batch_or_not(
        self, student, exported, tmp_path, monkeypatch
    ):
        import onnx

        monkeypatch.setattr(exporting, "LEAST_AGREEMENT", 0.9)
        place = tmp_path / "dynamic"
        report = export_onnx(student, TEXTS, int8=True, activations="dynamic", out=place)
        int8 = report["formats"]["model_int8.onnx"]
        assert int8["activations"] == "dynamic" and 0 <= int8["labels_by_batch"] <= 0.1
        moved, ranges = {}, {}
        for name, folder in {"static": student, "dynamic": place}.items():
            predictor = Predictor(folder, engine="onnx-int8")
            alone = np.concatenate([predictor.logits([text]) for text in TEXTS])
            moved[name] = np.abs(alone - predictor.logits(TEXTS)).max()
            nodes = onnx.load(engines.onnx_file("onnx-int8", folder)).graph.node
            ranges[name] = [node.op_type for node in nodes].count("DynamicQuantizeLinear")
        assert moved["static"] < 1e-5 < 1e-3 < moved["dynamic"]
        assert ranges["static"] == 0 < ranges["dynamic"]
        with pytest.raises(ConfigError, match="'fixed' is neither static nor dynamic"):
            export_onnx(student, TEXTS, int8=True, activations="fixed", out=place)

    def test_int8_holds_matrices_in_a_byte_and_embeddings_in_two(self, student, exported):
        import onnx

        graph = onnx.load(engines.onnx_file("onnx-int8", student)).graph
        wide = [t.data_type for t in graph.initializer if len(t.dims) == 2 and min(t.dims) > 1]
        assert wide.count(onnx.TensorProto.FLOAT16) == 3
        assert wide.count(onnx.TensorProto.INT8) == 2 * 6 + 2  # layers, pooler, classifier
        assert len(wide) == 3 + 2 * 6 + 2

    def test_a_channel_that_stands_out(self):
        """What smoothing is for: its range must not cost the other channels theirs."""

        def error(model, inputs):
            def step(values, dim):
                scale = values.abs().amax(dim, keepdim=True) / 127
                return (values / scale).round() * scale

            linear = model[0]
            scaled = inputs * getattr(linear, "inverse", 1.0)
            rough = step(scaled, (0, 1)) @ step(linear.weight, 1).T + linear.bias
            return (rough - plain(inputs)).abs().mean()

        plain = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))[
            :1
        ]
        inputs = torch.randn(64, 16) * torch.where(torch.arange(16) == 3, 50.0, 1.0)
        with torch.no_grad():
            smooth, plan = smoothing.smoothed(plain, lambda model: model(inputs))
            torch.testing.assert_close(smooth(inputs), plain(inputs))
            assert plan == [((8, 16), True)]
            assert error(smooth, inputs) < 0.4 * error(plain, inputs)

    def test_layers_that_read_the_same_share_a_scale_and_wide_ones_stay(self):
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.key, self.query, self.out = (torch.nn.Linear(4, 4) for _ in range(3))

            def forward(self, inputs):
                hidden = self.key(inputs) + self.query(inputs)
                hidden[0] *= 1000
                return self.out(hidden)

        inputs = torch.randn(8192, 4)
        with torch.no_grad():
            smooth, plan = smoothing.smoothed(Model(), lambda model: model(inputs))
        torch.testing.assert_close(smooth.key.inverse, smooth.query.inverse)
        assert [bears for _, bears in plan] == [True, True, False]
        assert type(smooth.out) is torch.nn.Linear

    def test_what_lies_beside_the_model_is_enough_to_serve(self, student, exported, tmp_path):
        alone = (student / "onnx").rename(tmp_path / "served")
        try:
            predictor = Predictor(alone, device="cpu")
            assert predictor.engine_name == "onnx"
            assert {answer.label for answer in predictor(TEXTS)} <= set(LABELS)
            assert json.loads((alone / "export.json").read_text()) == exported
        finally:
            alone.rename(student / "onnx")

    @pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=[] if name in ("roberta", "modernbert") else [DEEP])
            for name in BUILDERS
        ],
    )
    def test_architectures(self, tmp_path, name):
        model = BUILDERS[name]().eval()
        exporting.write_files(model, tmp_path / "onnx")
        engine = engines.open_engine("onnx", tmp_path)
        assert engine.inputs == input_names(model.config)
        ids = np.random.default_rng(0).integers(2, 50, (5, 17))
        mask = (np.arange(17) < np.array([[17], [9], [1], [4], [16]])).astype(np.int64)
        batch = {"input_ids": ids * mask, "attention_mask": mask}
        batch["token_type_ids"] = np.zeros_like(ids)
        with torch.no_grad():
            inputs = {name: torch.from_numpy(batch[name]) for name in engine.inputs}
            wanted = model(**inputs).logits.numpy()
        np.testing.assert_allclose(engine(batch), wanted, atol=1e-5)

    def test_a_file_that_answers_otherwise_is_not_published(self, student, tmp_path, monkeypatch):
        def spoil(model, folder, **options):
            with torch.no_grad():
                model.classifier.bias += 0.01
                write_files(model, folder, **options)
                model.classifier.bias -= 0.01

        write_files = exporting.write_files
        monkeypatch.setattr(exporting, "write_files", spoil)
        with pytest.raises(ParityError, match=r"model\.onnx: logits differ by up to 1\.0e-02"):
            export_onnx(student, TEXTS, out=tmp_path / "onnx")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("engine", "parity", "good"),
        [
            ("onnx", {"max_logit_error": 1e-5, "label_agreement": 1.0}, True),
            ("onnx", {"max_logit_error": math.nan, "label_agreement": 1.0}, False),
            ("onnx-int8", {"max_logit_error": 0.5, "label_agreement": 0.995}, True),
            ("onnx-int8", {"max_logit_error": 1e-5, "label_agreement": 0.98}, False),
            ("onnx-fp16", {"max_logit_error": math.nan, "label_agreement": 0.5}, False),
        ],
    )
    def test_limits(self, engine, parity, good):
        if good:
            exporting._check("file", engine, parity, 200)
        else:
            with pytest.raises(ParityError):
                exporting._check("file", engine, parity, 200)

    def test_only_an_export_is_replaced(self, student, exported, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        for place in (tmp_path, student, tmp_path / "notes.txt"):
            with pytest.raises(ConfigError, match=r"holds other files|is no folder"):
                export_onnx(student, TEXTS, out=place)
        assert (tmp_path / "notes.txt").read_text() == "mine"
        again = export_onnx(student, TEXTS, out=student / "onnx" / ".." / "onnx" / "nested")
        assert again["formats"].keys() == {"model.onnx"}
        shutil.rmtree(student / "onnx" / "nested")

    def test_a_damaged_file(self, student, exported, tmp_path):
        shutil.copytree(student / "onnx", tmp_path / "onnx")
        (tmp_path / "onnx" / "model.onnx").write_bytes(b"no model")
        with pytest.raises(CheckpointError, match=r"model\.onnx"):
            Predictor(tmp_path / "onnx", engine="onnx", device="cpu")

    def test_texts_and_labels_are_checked(self, student):
        with pytest.raises(DataError, match="no texts"):
            export_onnx(student, [])
        with pytest.raises(DataError, match="'ugly' is not among the model's: 'bad', 'good'"):
            export_onnx(student, TEXTS[:1], labels=["ugly"])
        with pytest.raises(DataError, match="3 texts and 2 labels"):
            export_onnx(student, TEXTS[:3], labels=["good", "bad"])

    def test_labels_are_checked_before_anything_is_exported(self, student, tmp_path, monkeypatch):
        monkeypatch.setattr(exporting, "write_files", lambda *_, **__: pytest.fail("exported"))
        with pytest.raises(DataError, match="'ugly'"):
            export_onnx(student, TEXTS[:2], labels=["good", "ugly"], out=tmp_path / "onnx")

    def test_of_a_thousand_labels_an_error_names_a_few(self):
        known = [f"label {number}" for number in range(1000)]
        assert (
            exporting._encoded(SINGLE_LABEL, known, known[::-1], 1000).tolist()
            == list(range(1000))[::-1]
        )
        with pytest.raises(DataError, match=r"'label 11' and 988 more") as raised:
            exporting._encoded(SINGLE_LABEL, known, ["ugly"], 1)
        assert len(raised.value.cause) < 300

    def test_without_the_package_the_remedy_is_the_extra(self, student, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxscript", None)
        with pytest.raises(UnsupportedError, match="onnxscript is not installed") as raised:
            export_onnx(student, TEXTS, out=tmp_path / "onnx")
        assert raised.value.remedy == "pip install 'metakd[deploy]'"
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        assert engines.why_not("onnx", student, "cpu").endswith("pip install 'metakd[deploy]'")


class TestPredictor:
    # Every text alone; mixed batches. A batch of one is compiled by itself and takes as long again.
    @pytest.mark.parametrize(
        ("engine", "batch_tokens"),
        [*product(["auto", "eager", "onnx"], [1, 200]), ("compile", 200)],
    )
    def test_answers_are_those_of_single_texts(self, student, exported, engine, batch_tokens):
        texts = [*TEXTS[:7], "good", " ".join(TEXTS)]  # the last is longer than the model reads
        found = Predictor(student, engine=engine, device="cpu", batch_tokens=batch_tokens)
        np.testing.assert_allclose(found.logits(texts), plain(student, texts), atol=1e-5)

    def test_agrees_with_a_pipeline(self, student):
        classify = pipeline("text-classification", str(student), device="cpu", truncation=True)
        for found, wanted in zip(Predictor(student)(TEXTS), classify(TEXTS), strict=True):
            assert found.label == wanted["label"]
            assert found.score == pytest.approx(wanted["score"], abs=1e-5)

    def test_pairs(self, student):
        pairs = [(TEXTS[0], TEXTS[1]), ("good", "bad")]
        model = AutoModelForSequenceClassification.from_pretrained(student)
        predictor = Predictor(student, engine="eager")
        for pair, logits in zip(pairs, predictor.logits(pairs), strict=True):
            inputs = predictor.tokenizer(*pair, return_tensors="pt", truncation=True)
            assert inputs["token_type_ids"].any()
            with torch.no_grad():
                wanted = model(**inputs).logits[0]
            np.testing.assert_allclose(logits, wanted, atol=1e-5)

    def test_positions_behind_the_padding(self, student, tmp_path):
        model = BUILDERS["roberta"]()  # 20 positions, of which the padding has the first
        model.save_pretrained(tmp_path)
        tokenizer = demo.train_tokenizer(TEXTS, 50)  # without a limit of its own
        tokenizer.save_pretrained(tmp_path)
        assert Predictor(tmp_path, engine="eager").logits([" ".join(TEXTS)]).shape == (1, 2)

    def test_a_very_long_text(self, student, exported):
        long = " ".join(TEXTS[number % len(TEXTS)] for number in range(1000))
        assert len(long.split()) > 10_000
        for engine in ("eager", "onnx"):
            found = Predictor(student, engine=engine, device="cpu").logits([long, "good"])
            np.testing.assert_allclose(found, plain(student, [long, "good"]), atol=1e-5)

    def test_a_tokenizer_without_padding_or_special_tokens(self, student, tmp_path):
        shutil.copytree(student, tmp_path / "bare", ignore=shutil.ignore_patterns("onnx", "tok*"))
        state = json.loads((student / "tokenizer.json").read_text()) | {"post_processor": None}
        rust = Tokenizer.from_str(json.dumps(state))
        PreTrainedTokenizerFast(tokenizer_object=rust).save_pretrained(tmp_path / "bare")
        predictor = Predictor(tmp_path / "bare", engine="eager", device="cpu")
        assert predictor.tokenizer.pad_token_id is None
        texts = [TEXTS[0], "good", "", TEXTS[1]]  # nothing at all is in the third
        together = predictor.logits(texts)
        alone = np.concatenate([predictor.logits([text]) for text in texts])
        assert np.isfinite(together).all()
        np.testing.assert_allclose(together, alone, atol=1e-5)

    def test_letters_of_all_kinds(self, student, exported):
        texts = ["日本語の本", "كتاب جيد", "naïve café 🎉", "e\u0301 \u202e\u2028", "\x1b[31m\x07"]
        for engine in ("eager", "onnx"):
            found = Predictor(student, engine=engine, device="cpu").logits(texts)
            np.testing.assert_allclose(found, plain(student, texts), atol=1e-5)

    def test_from_several_threads(self, student, exported):
        """From the first call on, which is when a tokenizer is set up."""
        wanted = plain(student, TEXTS)
        with ThreadPoolExecutor(4) as threads:
            for engine in ("eager", "onnx", "eager", "onnx"):
                predictor = Predictor(student, engine=engine, device="cpu")
                for found in threads.map(predictor.logits, [TEXTS] * 4):
                    np.testing.assert_allclose(found, wanted, atol=1e-5)

    def test_batches_hold_little_padding(self, student, monkeypatch):
        predictor = Predictor(student, engine="eager", batch_tokens=256)
        run, seen = predictor.engine, []
        call = type(run).__call__
        monkeypatch.setattr(
            type(run), "__call__", lambda e, b: (seen.append(b["attention_mask"]), call(e, b))[1]
        )
        predictor.logits(TEXTS)
        assert sum(map(len, seen)) == len(TEXTS)
        assert all(mask.size <= 256 for mask in seen)
        assert sum(mask.sum() for mask in seen) > 0.9 * sum(mask.size for mask in seen)

    def test_only_an_eager_engine_takes_another_model(self, student, exported):
        eager = Predictor(student, engine="eager")
        other = AutoModelForSequenceClassification.from_pretrained(student)
        torch.nn.init.zeros_(other.classifier.weight)
        changed = eager.with_model(other.eval())
        assert not np.allclose(changed.logits(TEXTS[:2]), eager.logits(TEXTS[:2]))
        with pytest.raises(ValueError, match="onnx keeps its model"):
            Predictor(student, engine="onnx", device="cpu").with_model(other)

    def test_nothing_in_nothing_out(self, student):
        assert Predictor(student)([]) == []

    @pytest.mark.parametrize(
        ("texts", "place"),
        [
            ("one text", "texts: is one text"),
            (["good", 7], r"texts\[1\]: 7 is not a text"),
            ([("a", "b"), "c"], r"texts\[1\]: 'c' is not a pair"),
            (["a", None], r"texts\[1\]: None"),
            (["a", "b\udcff"], r"texts\[1\]: 'b\\udcff'"),
        ],
    )
    def test_what_is_no_text(self, student, texts, place):
        with pytest.raises(DataError, match=place):
            Predictor(student)(texts)

    def test_refusals(self, student, tmp_path):
        with pytest.raises(ConfigError, match="fast is not among eager"):
            Predictor(student, engine="fast")
        with pytest.raises(ConfigError, match="cuda:0 is neither cpu nor cuda"):
            Predictor(student, device="cuda:0")
        with pytest.raises(CheckpointError, match="no such folder"):
            Predictor(tmp_path / "nowhere")
        with pytest.raises(UnsupportedError, match="CUDA graphs need a CUDA device"):
            Predictor(student, engine="cudagraph", device="cpu")
        bare = tmp_path / "bare"
        Predictor(student).tokenizer.save_pretrained(bare)
        (bare / "config.json").write_text((student / "config.json").read_text())
        with pytest.raises(
            UnsupportedError, match=r"bare is not exported: metakd export .* --int8"
        ):
            Predictor(bare, engine="onnx-int8")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    @pytest.mark.parametrize("engine", ["auto", "eager", "onnx"])
    def test_no_gpu(self, student, engine):
        with pytest.raises(UnsupportedError, match="there is no CUDA device") as raised:
            Predictor(student, engine=engine, device="cuda")
        assert "device cpu" in raised.value.remedy

    def test_folders_that_hold_no_classifier_with_its_tokenizer(self, student, tmp_path):
        def copy(name: str):
            return shutil.copytree(student, tmp_path / name, ignore=shutil.ignore_patterns("onnx"))

        wordless = copy("wordless")
        for file in wordless.glob("tokenizer*"):
            file.unlink()
        damaged = copy("damaged")
        (damaged / "tokenizer.json").write_text('{"version": "1.0"}')
        regression = copy("regression")
        config = json.loads((student / "config.json").read_text())
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        (regression / "config.json").write_text(json.dumps(config))
        for folder, said in (
            (wordless, "holds no tokenizer"),
            (damaged, "damaged: its files cannot be used: KeyError"),
            (regression, "one output"),
        ):
            with pytest.raises(CheckpointError, match=said) as raised:
                Predictor(folder, device="cpu")
            assert "with its tokenizer" in raised.value.remedy

    @pytest.mark.gpu
    @pytest.mark.parametrize("engine", ["eager", "compile", "cudagraph"])
    def test_on_a_gpu(self, student, engine):
        found = Predictor(student, engine=engine, device="cuda", batch_tokens=256)
        for texts in (TEXTS, TEXTS[:5]):  # the second time, graphs are replayed
            np.testing.assert_allclose(found.logits(texts), plain(student, texts), atol=1e-3)


@pytest.fixture
def call(monkeypatch, capsys):
    """``call("predict", folder, ...)``: exit code, output and errors of that command."""

    def run(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["metakd", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, *capsys.readouterr()

    return run


class TestLatency:
    @pytest.mark.parametrize("n", [6, 40, 999, 3000])
    def test_the_interval_of_the_median_holds_it_95_times_of_100(self, n):
        draw = np.random.default_rng(n).exponential
        inside = 0
        for _ in range(400):
            low, high = latency.median_interval(draw(size=n))
            inside += low <= math.log(2) <= high
        assert inside >= 0.92 * 400

    def test_five_calls_give_no_interval(self):
        assert latency.median_interval([1.0] * 5) is None

    def test_percentiles_need_calls_beyond_them(self):
        few = latency.describe_times([0.001] * 5)
        assert few["calls"] == 5 and few["p50_ms"] == 1.0 and few["p50_ci95_ms"] is None
        assert few["p90_ms"] is few["p99_ms"] is None
        many = latency.describe_times(np.arange(1, 201) / 1000)
        assert [many[f"p{p}_ms"] for p in (50, 90, 95, 99)] == [100.5, 180.0, 190.0, 198.0]

    @pytest.mark.parametrize(
        ("times", "seconds", "enough"),
        [
            ([1e-3] * 300, 5.0, True),  # precise
            ([1e-3] * 100, 5.0, False),  # precise, but too few for a 99th percentile
            ([1e-3, 2e-3] * 150, 5.0, False),  # the median lies anywhere between
            ([0.5] * 11, 5.0, True),  # the time is used up
            ([3.0] * 3, 5.0, False),  # five calls at least
            ([30.0] * 2, 5.0, True),  # except for very long ones
        ],
    )
    def test_when_it_stops(self, times, seconds, enough):
        assert latency._known(times, seconds) is enough

    def test_flops_are_those_of_the_matrices(self, student):
        layers, hidden, length = 2, 32, 16
        linear = length * layers * (4 * hidden**2 + 2 * hidden * 64)
        attention = layers * 2 * length**2 * hidden
        head = hidden**2 + 2 * hidden  # pooler and classifier, of one token
        assert latency.flops_of_text(student, length) == 2 * (linear + attention + head)

    # Each engine of each model is measured in a process of its own.
    @pytest.mark.parametrize("engines", [["onnx"], pytest.param(["eager", "onnx"], marks=DEEP)])
    def test_a_run_side_by_side(self, student, tmp_path, call, engines):
        others = ("novels-as-tiny-s1/novels", "novels-s1/novels", "novels-s1/poems")
        for place in ("teachers/meta-s1", *(f"students/{other}" for other in others)):
            shutil.copytree(student, tmp_path / "run" / place)
            (tmp_path / "run" / place / "stage.json").write_text(json.dumps(RECORD))
        words = "--batch 2 --length 8 --length 500 --device cpu --seconds 0"
        words += "".join(f" --engine {engine}" for engine in engines)
        code, out, _ = call("latency", tmp_path / "run", *words.split())
        assert code == 0
        result = json.loads((tmp_path / "run" / "latency.json").read_text())
        models = [(m, about["role"], about["shape"]) for m, about in result["models"].items()]
        assert models == [
            ("teacher", "teacher", ""),
            ("student", "student", ""),
            ("student as tiny", "student", "tiny"),
        ]
        assert [(row["model"], row["engine"], row["length"]) for row in result["rows"]] == [
            (model, engine, 8) for model in result["models"] for engine in engines
        ]
        for row in result["rows"]:
            assert row["batch"] == 2 and row["calls"] >= 5 and row["p50_ms"] > 0
            assert row["max_logit_error"] < 1e-5 and row["peak_memory_bytes"] > 2**20
            assert row["flops"] == 2 * latency.flops_of_text(student, 8)
        assert {row["length"] for row in result["tokenising"]} == {8, 500}
        # Nobody has 500 positions, which costs nobody another cell.
        assert len(result["absent"]) == len(result["rows"])
        assert all("64 positions" in absent["reason"] for absent in result["absent"])
        assert (tmp_path / "run" / "latency.md").read_text() in out

    def test_what_computes_something_else_has_no_speed(self):
        class Engine:
            engine, model = "onnx", latency.Model("m", None, "m")

        with pytest.raises(ParityError, match="m: onnx computes logits that differ by"):
            latency._error(np.array([[1.0, 2.0]]), np.array([[1.0, 2.1]]), Engine)
        with pytest.raises(ParityError):
            latency._error(np.array([[math.nan]]), np.array([[1.0]]), Engine)

    def test_no_model(self, tmp_path):
        with pytest.raises(ConfigError, match="no folder of a model, no run"):
            latency.measure_latency([str(tmp_path)])

    def test_no_such_device(self, student):
        with pytest.raises(ConfigError, match="gpu is neither cpu nor cuda"):
            latency.measure_latency([str(student)], device="gpu")
        if not torch.cuda.is_available():
            with pytest.raises(UnsupportedError, match="no CUDA device"):
                latency.measure_latency([str(student)], device="cuda")

    def test_positions_behind_the_padding(self, tmp_path):
        BUILDERS["roberta"]().save_pretrained(tmp_path)  # 20 positions, the padding has the first
        bench = latency._EngineBench("eager", tmp_path, "cpu", 1)
        assert bench.open_cell(2, 19).shape == (2, 2)
        with pytest.raises(UnsupportedError, match="19 positions"):
            bench.open_cell(2, 20)

    def test_this_folder_has_a_name(self, student, tmp_path, monkeypatch):
        monkeypatch.chdir(student)
        [model] = latency._find_models(["."], tmp_path)
        assert model.name == "student"

    def test_what_a_run_has_replaced_is_not_measured(self, student, tmp_path):
        for name in (".gone-novels", "novels"):
            place = tmp_path / "run" / "students" / "meta-s1-t1" / name
            shutil.copytree(student, place, ignore=shutil.ignore_patterns("onnx"))
            (place / "stage.json").write_text(json.dumps(RECORD))
        [model] = latency._find_models([str(tmp_path / "run")], tmp_path)
        assert (model.role, model.folder.name) == ("student", "novels")

    def test_a_place_that_cannot_be_written_to(self, tmp_path):
        known = {"device": "CPU", "threads": 2, "date": "2026-01-02", "versions": {"torch": "2"}}
        nothing = {"rows": [], "tokenising": [], "absent": []}
        model = {"layers": 2, "hidden": 8, "parameters": 300, "bytes": {}}
        result = {"environment": known, "command": "", "models": {"m": model}, **nothing}
        assert "CPU, 2 threads" in latency.write_latency(result, tmp_path)
        (tmp_path / "latency.md").unlink()
        (tmp_path / "latency.md").mkdir()
        with pytest.raises(ConfigError, match=r"latency\.md"):
            latency.write_latency(result, tmp_path)


class TestCommands:
    def test_jsonl_in_jsonl_out(self, student, exported, tmp_path, call):
        lines = [{"text": text, "label": "", "domain": "a/b"} for text in TEXTS[:5]]  # unread
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert call("predict", student, "--input", source, "--output", target)[0] == 0
        answers = [json.loads(line) for line in target.read_text().splitlines()]
        assert [answer["text"] for answer in answers] == TEXTS[:5]
        wanted = Predictor(student)(TEXTS[:5])
        assert [answer["prediction"] for answer in answers] == [w.label for w in wanted]

    def test_what_is_served_as_onnx_needs_no_other_weights(self, student, exported, tmp_path):
        folder = shutil.copytree(student, tmp_path / "student")
        files = {}
        for path in student.iterdir():
            if path.is_file():
                with path.open("rb") as file:
                    files[path.name] = entry_of(file)
        (folder / "stage.json").write_text(json.dumps(RECORD | {"files": files}))
        wanted = Predictor(folder, engine="onnx").logits(TEXTS[:3])
        (folder / "model.safetensors").unlink()
        assert np.array_equal(Predictor(folder, engine="onnx").logits(TEXTS[:3]), wanted)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: is missing"):
            Predictor(folder, engine="eager")
        (folder / "tokenizer_config.json").write_text("{}")
        with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: has 2 bytes"):
            Predictor(folder, engine="onnx")

    def test_one_text(self, student, call):
        code, out, _ = call("predict", student, TEXTS[0])
        [answer] = Predictor(student)(TEXTS[:1])
        assert code == 0
        assert json.loads(out) == {
            "text": TEXTS[0],
            "prediction": answer.label,
            "score": pytest.approx(answer.score),
        }

    def test_an_empty_text_is_refused_wherever_it_comes_from(self, student, tmp_path, call):
        (tmp_path / "texts.jsonl").write_text('{"text": " "}\n')
        code, _, err = call("predict", student, "a fine book", " ")
        assert code == 3 and "TEXT 2: empty text" in err
        code, _, err = call("predict", student, "--input", tmp_path / "texts.jsonl")
        assert code == 3 and "texts.jsonl:1:text: empty text" in err

    def test_a_run_names_its_students(self, tmp_path, call):
        for domain in ("books", "dvd"):
            place = tmp_path / "shop" / "students" / "meta-s1" / domain
            place.mkdir(parents=True)
            (place / "config.json").write_text("{}")
        code, _, err = call("predict", tmp_path / "shop", "a fine book")
        assert code == 4 and "is a run" in err and f"give {place.with_name('books')}, " in err
        code, _, err = call("predict", tmp_path / "shp", "a fine book")
        assert code == 4 and "there is no such folder; did you mean 'shop'?" in err

    def test_lines_of_a_text_file(self, student, tmp_path, call):
        (tmp_path / "texts.txt").write_text("".join(f"{text}\n" for text in TEXTS[:3]))
        code, out, _ = call("predict", student, "--input", tmp_path / "texts.txt")
        assert code == 0
        assert [json.loads(line)["text"] for line in out.splitlines()] == TEXTS[:3]

    def test_export(self, student, tmp_path, call):
        lines = [
            {"text": text, "label": "good", "domain": "ab"[n % 2]} for n, text in enumerate(TEXTS)
        ]
        data, out = tmp_path / "data.jsonl", tmp_path / "exported"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        code, shown, _ = call("export", student, "--data", data, "--domain", "b", "--out", out)
        assert code == 0 and "model.onnx" in shown and "20 texts" in shown
        report = json.loads((out / "export.json").read_text())
        good = [row == 1 for row in plain(student, TEXTS[1::2]).argmax(1)]
        assert report["checked"]["accuracy"] == pytest.approx(np.mean(good))
        code, _, said = call("export", student, "--data", data, "--domain", "c", "--out", out)
        assert code == 3 and "no texts of domain c" in said

    def test_what_an_export_cannot_tell_is_said(self, student, tmp_path, call):
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        _, shown, _ = call("export", student, "--data", data, "--out", tmp_path / "few")
        remark = "compared on 40 texts, each of them 2.5% of the agreement: give at least 100"
        assert f"warning: {remark}" in " ".join(shown.split())
        report = json.loads((tmp_path / "few" / "export.json").read_text())
        assert report["checked"]["remarks"][-1] == remark

    def test_int8_needs_texts_to_be_judged_by(self, student, tmp_path, call, monkeypatch):
        """Where nobody gave any, int8 that does not answer alike is left out, and fp32 is there."""
        monkeypatch.setattr(exporting, "LEAST_AGREEMENT", 1.1)
        out = tmp_path / "made-up"
        code, shown, _ = call("export", student, "--int8", "--out", out)
        report = json.loads((out / "export.json").read_text())
        assert code == 0 and list(report["formats"]) == ["model.onnx"]
        assert not list(out.glob("model_int8*")) and (out / "model.onnx").exists()
        remarks = " ".join(report["checked"]["remarks"])
        assert "labels are PyTorch's" in remarks and "left out" in remarks
        assert "--data FILE gives texts like those to be served" in " ".join(shown.split())
        data = tmp_path / "data.jsonl"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        words = ("--int8", "--data", data, "--out", tmp_path / "nothing")
        assert call("export", student, *words)[0] == 7 and not (tmp_path / "nothing").exists()

    def test_pairs(self, student, tmp_path, call):
        """A model of pairs, as of MNLI, with labels that JSON has to escape."""
        names = ['entails, "surely"', "neutral\nor so", "contradicts\\"]
        folder = tmp_path / "nli"
        shutil.copytree(student, folder, ignore=shutil.ignore_patterns("onnx"))
        config = BertConfig.from_pretrained(student)
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in config.id2label.items()}
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
        pairs = list(zip(TEXTS[:20], TEXTS[20:]))
        lines = [{"p": one, "h": two, "label": names[1], "domain": "x"} for one, two in pairs]
        data, out = tmp_path / "pairs.jsonl", tmp_path / "out.jsonl"
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        columns = ("--text", "p", "--text-pair", "h")
        assert call("export", folder, "--data", data, *columns)[0] == 0
        for engine in ("onnx", "eager"):
            words = ("--input", data, *columns, "--output", out, "--engine", engine)
            assert call("predict", folder, *words)[0] == 0
            answers = [json.loads(line) for line in out.read_text().splitlines()]
            assert [(a["text"], a["text_pair"]) for a in answers] == pairs
            wanted = Predictor(folder, engine="eager", device="cpu")(pairs)
            assert [answer["prediction"] for answer in answers] == [w.label for w in wanted]

    def test_nothing_to_read(self, student, tmp_path, call):
        for name, content in (("a.jsonl", ""), ("a.csv", "text,label\n"), ("a.tsv", "\n\n")):
            (tmp_path / name).write_text(content)
            for words in (["predict", student, "--input"], ["export", student, "--data"]):
                code, _, said = call(*words, tmp_path / name)
                assert code == 3 and name in said and "`data` block" not in said

    def test_a_place_that_is_not_there_is_told_before_the_work(self, student, tmp_path, call):
        target = tmp_path / "none" / "out.jsonl"
        code, _, said = call("predict", tmp_path / "no student", "text", "--output", target)
        assert code == 2 and "none/out.jsonl: there is no such folder" in said

    def test_a_terminal_that_lacks_letters(self, student, monkeypatch):
        latin = io.TextIOWrapper(io.BytesIO(), "latin-1")
        monkeypatch.setattr(sys, "stdout", latin)
        monkeypatch.setattr(sys, "argv", ["metakd", "predict", str(student), "日本 é"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        assert json.loads(latin.buffer.getvalue())["text"] == "日本 é"

    def test_a_reader_that_has_seen_enough(self, student, tmp_path):
        source = tmp_path / "in.jsonl"
        lines = [json.dumps({"text": TEXTS[0]}) + "\n"] * 1200
        source.write_text("".join(lines))
        command = [sys.executable, "-m", "metakd", "predict", str(student), "--input", str(source)]
        root = Path(__file__).resolve().parents[1]
        with subprocess.Popen(
            [*command, "--engine", "eager", "--device", "cpu"],
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": root},
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        ) as process:
            process.stdout.readline()
            process.stdout.close()
            said = process.stderr.read().decode()
        assert process.returncode == 0 and "Broken pipe" not in said, said

    def test_names_with_brackets_are_shown_as_they_are(self, student, tmp_path, call):
        data = tmp_path / "data[b].jsonl"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:3]))
        code, shown, _ = call("export", student, "--data", data, "--out", tmp_path / "onnx")
        assert code == 0 and "data[b].jsonl" in "".join(shown.split())

    def test_refusals(self, student, tmp_path, call):
        for words, code, said in (
            (["predict", student], 2, "either TEXT or --input"),
            (["predict", tmp_path / "none", "text"], 4, "no such folder"),
            (["export", student, "--to", "h5"], 2, "'h5' is not known"),
            (["latency", student, "--engine", "warp"], 2, "warp unknown"),
        ):
            ended, _, err = call(*words)
            assert ended == code and said in err and "remedy: " in err
