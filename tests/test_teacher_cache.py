"""Kept teacher outputs: the same features and losses as from the teacher, asked once; limits,
damage, full disks, several processes, going on after a stop."""

import errno
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from processes import run_ranks
from rich.console import Console
from safetensors.torch import load_file
from tiny_runs import assert_same_bits, distil_until_stopped, losses, rows_of, write_config
from transformers import BertConfig

from metakd.config import DistillConfig, load_config
from metakd.data.cache import Draft, TensorCache
from metakd.data.corpus import Split, Tokens
from metakd.errors import CheckpointError, ConfigError
from metakd.method.attribution import Attribution
from metakd.method.methods import build_terms
from metakd.method.teachers import FrozenTeacher, Teacher
from metakd.models.packing import real_tokens
from metakd.models.taps import Features
from metakd.pipeline import compare as comparison
from metakd.pipeline import lessons, students, teacher_cache
from metakd.pipeline.stages import Run
from metakd.pipeline.teacher_cache import KeptOutputs, Signal, bytes_of, is_kept, signals_of
from metakd.training.world import World, join_world

DOMAINS = ["a", "b", "c"]
LAYERS = 3
SCORED = Attribution(2, 20, views="classes")
EVERYTHING = frozenset(
    {Signal(name) for name in ("logits", "domain", "embedding")}
    | {Signal("attribution", how=SCORED)}
    | {
        Signal(name, layer)
        for name in ("hidden", "query", "key", "value")
        for layer in range(LAYERS)
    }
)


def make_split(examples=11) -> Split:
    """Random tokens; the index has gaps, as after a held-out validation split."""
    lengths = 3 + torch.arange(examples) % 7
    total = int(lengths.sum())
    return Split(
        Tokens(torch.randint(1, 50, (total,), dtype=torch.int32), lengths),
        torch.randint(2, (examples,)),
        torch.arange(examples) % 3,
        3 * torch.arange(examples) + 1,
        Tokens(torch.zeros(total, dtype=torch.int32), lengths),
    )


def padded(examples, marked=False) -> dict[str, torch.Tensor]:
    """A batch, with or without the positions of its real tokens."""
    width = max(len(example["input_ids"]) for example in examples)

    def pad(values):
        return values + [0] * (width - len(values))

    batch = {
        name: torch.tensor([pad(example[name]) for example in examples])
        for name in ("input_ids", "token_type_ids")
    }
    batch["attention_mask"] = torch.tensor([pad([1] * len(e["input_ids"])) for e in examples])
    if marked:
        batch["real_tokens"] = real_tokens(batch["attention_mask"])
    return batch | {
        name: torch.stack([example[name] for example in examples])
        for name in ("labels", "domain", "index")
    }


class Scene:
    """A meta-teacher of three layers, examples, and what is kept of them; counts examples shown."""

    def __init__(self, tiny_bert, folder: Path):
        self.teacher = Teacher(tiny_bert(layers=LAYERS), "meta", DOMAINS)
        needs = frozenset(s.feature for s in EVERYTHING)
        self.frozen = FrozenTeacher([self.teacher], needs, attribution=SCORED)
        self.split, self.root = make_split(), folder / ".cache"
        self.weights = folder / "teacher"
        self.weights.mkdir()
        (self.weights / "model.safetensors").write_bytes(b"weights")
        self.said, self.shown = [], 0

    def show(self, batch) -> Features:
        self.shown += len(batch["labels"])
        return self.frozen(batch)

    def kept(self, **settings) -> KeptOutputs:
        return KeptOutputs(
            self.root,
            "teachers/meta-s1/all",
            [self.weights],
            settings,
            self.split,
            LAYERS,
            World(),
            self.said.append,
        )

    def make(self, signals=EVERYTHING, collate=padded) -> KeptOutputs:
        kept = self.kept()
        assert kept.missing(signals) == signals
        kept.make(signals, self.show, collate, batch_size=4)
        self.said.clear()
        return kept


@pytest.fixture
def scene(tiny_bert, tmp_path):
    return Scene(tiny_bert, tmp_path)


# Features


@pytest.mark.parametrize("marked", [False, True])
def test_features_are_those_of_the_teacher(scene, marked):
    def collate(examples):
        return padded(examples, marked)

    kept = scene.make(collate=collate)
    taught = kept.teacher(EVERYTHING)
    rows = [7, 0, 10, 3, 4]  # another batch than any that was kept
    batch = taught.collate(collate)([scene.split[row] for row in rows])
    seen, expected = taught(batch), scene.frozen(batch)
    for name in ("logits", "domain"):
        torch.testing.assert_close(getattr(seen, name), getattr(expected, name))
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(seen.embedding[real], expected.embedding[real])
    assert not seen.embedding[~real].any()
    torch.testing.assert_close(seen.attribution, expected.attribution, rtol=1e-5, atol=1e-6)
    for layer in range(LAYERS):
        torch.testing.assert_close(seen.hidden[layer][real], expected.hidden[layer][real])
        for name in ("query", "key", "value"):
            own, theirs = getattr(seen, name)[layer], getattr(expected, name)[layer]
            assert own.shape == theirs.shape and own.dtype == theirs.dtype
            torch.testing.assert_close(own.transpose(1, 2)[real], theirs.transpose(1, 2)[real])
            assert not own.transpose(1, 2)[~real].any()
    assert not seen.logits.requires_grad


def test_each_example_is_shown_once_and_found_again(scene):
    scene.make()
    assert scene.shown == len(scene.split)
    again = scene.kept()
    assert not again.missing(EVERYTHING) and scene.said == []
    # Another run finds some of it, and makes the rest in a pass of its own.
    (again.folder / "hidden-1.safetensors").unlink()
    later = scene.kept()
    assert later.missing(EVERYTHING) == {Signal("hidden", 1)}


def test_files_are_plain_safetensors_of_their_owner_alone(scene):
    kept = scene.make()
    tokens = int(scene.split.input_ids.lengths.sum())
    files = sorted(kept.folder.iterdir())
    assert {file.name for file in files} == {f"{signal}.safetensors" for signal in EVERYTHING}
    assert load_file(kept.folder / "query-0.safetensors")["values"].shape == (tokens, 4, 8)
    assert load_file(kept.folder / "logits.safetensors")["values"].shape == (11, 2)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (scene.root, kept.folder, *files)]
    assert modes == [0o700] * 2 + [0o600] * len(files)
    values = sum(load_file(file)["values"].nbytes for file in files)
    shape = scene.teacher.model.config
    assert values == bytes_of(EVERYTHING, scene.split, shape, classes=2, itemsize=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_as_it_is(scene, dtype):
    scene.teacher.to(dtype)
    taught = scene.make().teacher(EVERYTHING)
    batch = taught.collate(padded)([scene.split[row] for row in range(4)])
    features = taught(batch)
    assert features.logits.dtype == features.hidden[2].dtype == features.query[0].dtype == dtype


def test_the_same_bits_are_made_again(scene):
    first = scene.make()
    before = {path.name: path.read_bytes() for path in first.folder.iterdir()}
    shutil.rmtree(first.folder)
    assert {p.name: p.read_bytes() for p in scene.make().folder.iterdir()} == before


# Keys


def _another_weight(scene):
    (scene.weights / "model.safetensors").write_bytes(b"others")


def _another_token(scene):
    scene.split.input_ids.flat[5] += 1


def _another_domain(scene):
    scene.split.domain[0] = 2


def _another_order(scene):
    scene.split.index = scene.split.index.flip(0)


@pytest.mark.parametrize(
    "change", [_another_weight, _another_token, _another_domain, _another_order]
)
def test_outputs_of_others_are_not_used(scene, change):
    scene.make()
    change(scene)
    assert scene.kept().missing(EVERYTHING) == EVERYTHING
    assert scene.said == []


def test_other_settings_are_other_outputs(scene):
    scene.make()
    assert scene.kept(precision="bf16").missing(EVERYTHING) == EVERYTHING


def test_labels_and_weights_of_examples_do_not_matter(scene):
    scene.make()
    scene.split.labels[:] = 0
    scene.split = scene.split.with_column("t", torch.rand(len(scene.split)))
    assert not scene.kept().missing(EVERYTHING)


def test_labels_matter_where_a_teacher_is_asked_about_them(scene):
    by_label = Signal("attribution", how=Attribution())
    scene.frozen = FrozenTeacher(
        [scene.teacher], frozenset({"attribution"}), attribution=by_label.how
    )
    scene.make(frozenset({by_label}))
    assert not scene.kept().missing({by_label})
    scene.split.labels[3] = 1 - scene.split.labels[3]
    assert scene.kept().missing({by_label}) == {by_label}


# Damage


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def _longer(path):
    path.write_bytes(path.read_bytes() + bytes(16))


def _other_shape(path):
    path.write_bytes(path.read_bytes().replace(b'"shape": [11, 2]', b'"shape": [11, 3]'))


def _linked(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


DAMAGE = {
    "a bit": (_flip, "damaged"),
    "cut": (lambda path: os.truncate(path, path.stat().st_size - 8), "damaged"),
    "longer": (_longer, "damaged"),
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "zeros": (lambda path: path.write_bytes(bytes(400)), "damaged"),
    "no header": (lambda path: path.write_bytes(b"\xff" * 400), "damaged"),
    "another shape": (_other_shape, "damaged"),
    "writable by others": (lambda path: path.chmod(0o666), "another user could have written it"),
    "a link": (_linked, "made anew"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "made anew"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_damaged_is_named_and_made_anew(scene, kind):
    signals = frozenset({Signal("logits"), Signal("hidden", 0)})
    kept = scene.make(signals)
    damage, words = DAMAGE[kind]
    damage(kept.folder / "logits.safetensors")
    again = scene.kept()
    assert again.missing(signals) == {Signal("logits")}
    [line] = scene.said
    assert words in line and "logits" in line
    if kind == "a folder":
        with pytest.raises(CheckpointError, match="directory"):
            again.make(frozenset({Signal("logits")}), scene.show, padded, batch_size=4)
        return
    again.make(frozenset({Signal("logits")}), scene.show, padded, batch_size=4)
    assert not scene.kept().missing(signals)


def test_an_unfinished_file_is_not_believed(scene, monkeypatch):
    logits = frozenset({Signal("logits")})
    monkeypatch.setattr(Draft, "publish", lambda self: None)
    monkeypatch.setattr(Draft, "discard", lambda self: None)  # as after a kill
    kept = scene.kept()
    kept.missing(logits)
    with pytest.raises(CheckpointError, match="logits cannot be read back"):
        kept.make(logits, scene.show, padded, batch_size=4)
    assert [path.name for path in kept.folder.iterdir()] == [".tmp-logits.safetensors"]
    monkeypatch.undo()
    assert scene.kept().missing(logits) == logits
    scene.make(logits)
    assert [path.name for path in kept.folder.iterdir()] == ["logits.safetensors"]


class FullDisk:
    """Writes of any process fail after so many."""

    def __init__(self, monkeypatch, call: str, after: int):
        do, self.left = getattr(os, call), after

        def failing(*arguments):
            self.left -= 1
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return do(*arguments)

        monkeypatch.setattr(os, call, failing)


@pytest.mark.parametrize(
    "call, after", [("posix_fallocate", 0), ("posix_fallocate", 2), ("pwrite", 0), ("pwrite", 50)]
)
def test_a_full_disk_leaves_nothing(scene, monkeypatch, call, after):
    FullDisk(monkeypatch, call, after)
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        scene.kept().make(EVERYTHING, scene.show, padded, batch_size=4)
    assert caught.value.exit_code == 4 and "make room" in caught.value.remedy
    assert list((scene.root / "teachers" / "meta-s1" / "all").iterdir()) == []
    if call == "posix_fallocate":
        assert scene.shown == 4  # before more than one batch was computed
    monkeypatch.undo()
    scene.make()


def test_a_cache_in_a_folder_of_others_is_refused(scene, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(CheckpointError, match="not a folder of this user's"):
        scene.kept().make(EVERYTHING, scene.show, padded, batch_size=4)


def test_a_large_write_may_take_several_calls(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, place: pwrite(file, data[:7], place))
    values = torch.randn(5, 3)
    cache = TensorCache(tmp_path / "c", print)
    draft = cache.draft("x", "key", values.dtype, values.shape)
    draft.reserve()
    draft.write(2, values[2:])
    draft.write(0, values[:2])
    draft.close()
    assert cache.get("x", "key", mapped=True) is None
    draft.publish()
    assert torch.equal(cache.get("x", "key", mapped=True)[0][Draft.TENSOR], values)
    assert torch.equal(cache.get("x", "key")[0][Draft.TENSOR], values)


# What is asked for


def test_only_matched_layers_are_kept():
    def signals(method, **keys):
        config = DistillConfig(method=method, **keys)
        terms = build_terms(config, student_layers=2, teacher_layers=6)
        return {str(s) for s in signals_of(terms, method == "meta", 6)}

    matched = {f"{name}-{layer}" for name in ("hidden", "query", "key") for layer in (2, 5)}
    assert signals("meta") == matched | {"embedding", "domain", "logits"}
    assert signals("tinybert_kd") == matched | {"embedding", "logits"}
    assert signals("minilmv2") == {"query-5", "key-5", "value-5", "logits"}
    assert signals("logits_kd") == signals("mtn_kd") == {"logits"}
    assert signals("gated_kd") == {"votes"}
    off = {"embedding": 0, "attention": 0, "prediction": 0}
    assert signals("meta", terms=off, gamma2=0.0) == {"hidden-2", "hidden-5", "logits"}


def test_what_each_mode_keeps():
    answers, more = [frozenset({Signal(name)}) for name in ("logits", "votes")], EVERYTHING
    assert [is_kept(s, mode) for mode in ("none", "logits", "all") for s in (*answers, more)] == [
        *(False, False, False),
        *(True, True, False),
        *(True, True, True),
    ]


# Runs


@pytest.fixture
def asked(monkeypatch) -> list[int]:
    """Examples of each forward pass of a teacher that teaches."""
    counts: list[int] = []
    answer = FrozenTeacher.__call__

    def counted(self, batch):
        counts.append(len(batch["labels"]))
        return answer(self, batch)

    monkeypatch.setattr(FrozenTeacher, "__call__", counted)
    return counts


TWO_EPOCHS = [
    "distill.training.num_train_epochs=2",
    "distill.training.per_device_train_batch_size=4",
]
METHODS = {
    "meta": [],
    "packed": ["packed=true"],
    "bf16": ["bf16=true"],
    "accumulated, not grouped": [
        "distill.training.gradient_accumulation_steps=2",
        "distill.training.group_by_length=false",
        "distill.terms.hard_label=0.5",
    ],
    "one for all": ["distill.one_student_for_all=true"],
    "tinybert_kd, multi-task": ["distill.method=tinybert_kd", "teacher.kind=mtl"],
    "tinybert_kd, single": ["distill.method=tinybert_kd", "teacher.kind=single"],
    "logits_kd": ["distill.method=logits_kd", "teacher.kind=mix"],
    "mtn_kd": ["distill.method=mtn_kd", "teacher.training.num_train_epochs=8"],
    "gated_kd": ["distill.method=gated_kd", "teacher.training.num_train_epochs=8"],
    "minilmv2": ["distill.method=minilmv2", "distill.relation_heads=4", "teacher.kind=mix"],
    "two stages": ["distill.schedule=two_stage", "distill.intermediate.num_train_epochs=1"],
    "ad_kd": ["distill.method=ad_kd", "teacher.kind=mix", "distill.attribution_top=20"],
}


# What others show as well: logits alone, heads to choose from, several batches a step.
AGAIN = ("logits_kd", "tinybert_kd, multi-task", "accumulated, not grouped")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.deep] if name in AGAIN else []) for name in METHODS],
)
def test_losses_are_those_of_the_live_teacher(make, asked, name):
    options = [*TWO_EPOCHS, *METHODS[name]]
    if name != "one for all":
        options.append("distill.domains=[hiking]")
    [place] = make(*options).distill()
    live = losses(place)
    assert asked
    asked.clear()
    run = make(*options, "distill.cache_teacher=all")
    assert run.distill() == [place]
    examples = len(run.corpus.train) if name == "one for all" else 12
    assert sum(asked) == examples
    assert any("teacher outputs of" in line for line in run.said)
    cached, rtol = losses(place), 3e-2 if name == "bf16" else 2e-5
    assert live.keys() == cached.keys()
    for stage, values in cached.items():
        assert len(values) == len(live[stage]) >= 3
        # A divergence of nearly equal distributions is as exact as they are, numbers below 1 in
        # float32, and not as itself.
        torch.testing.assert_close(
            torch.tensor(values), torch.tensor(live[stage]), rtol=rtol, atol=1e-7
        )


def test_a_teacher_is_asked_once_for_all_students_and_seeds(make, asked, monkeypatch):
    rows = "[{method: logits_kd, teacher: mix}, {method: tinybert_kd, teacher: mix}]"
    options = [
        *TWO_EPOCHS,
        f"compare.rows={rows}",
        "compare.seeds=[1,2]",
        "compare.teacher_seeds=1",
        "distill.domains=[hiking]",
    ]
    run = make(*options, "distill.cache_teacher=all")
    comparison.compare(run)
    assert sum(asked) == 12  # of 2 x 2 students with 2 epochs each
    # A student to come needs no teacher on the device.
    for module in (students, lessons):
        monkeypatch.setattr(module, "TeacherService", None)
    more = make(*options, "distill.cache_teacher=all", "compare.seeds=[1,2,3]")
    comparison.compare(more)
    assert sum(asked) == 12


def test_ahead_of_time(make, asked):
    run = make(*TWO_EPOCHS, "distill.cache_teacher=all")
    places = run.cache()
    assert [p.relative_to(run.folder).as_posix() for p in places] == [
        f".cache/teachers/meta-s42/{domain}" for domain in run.corpus.domains
    ]
    assert sum(asked) == 48
    assert not (run.folder / "students").exists()
    make(*TWO_EPOCHS, "distill.cache_teacher=all").distill()
    assert sum(asked) == 48


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["distill.cache_teacher=logits"],
        ["distill.method=finetune", "distill.cache_teacher=all"],
    ],
)
def test_nothing_to_keep_is_said(make, options):
    with pytest.raises(ConfigError, match="keeps nothing of what"):
        make(*options).cache()


def test_logits_alone_serve_the_second_stage(make, asked):
    options = [
        *TWO_EPOCHS,
        "distill.domains=[hiking]",
        "distill.schedule=two_stage",
        "distill.intermediate.num_train_epochs=1",
        "distill.cache_teacher=logits",
    ]
    run = make(*options)
    run.distill()
    assert sum(asked) == 12 + 12  # kept, and the epoch of the first stage
    assert any("asks for more than logits, so its teacher runs" in line for line in run.said)
    files = [path.name for path in (run.folder / ".cache" / "teachers").rglob("*.safetensors")]
    assert files == ["logits.safetensors"]


def test_digests_change_where_results_can(make):
    def stamps(run):
        [place] = run.distill()
        return (place / "stage.json").stat().st_mtime_ns, *run.teach()

    hiking = "distill.domains=[hiking]"
    first = stamps(make(hiking))
    # A joint method asks for more than logits: nothing is served from the cache.
    for same in ("distill.cache_limit_gib=3", "distill.cache_teacher=logits"):
        assert stamps(make(hiking, same)) == first
    cached = stamps(make(hiking, "distill.cache_teacher=all"))
    assert cached[0] != first[0] and cached[1] == first[1]
    again = stamps(make(hiking, "distill.cache_teacher=all", "distill.cache_limit_gib=3"))
    assert again == cached


def test_the_limit_is_checked_before_anything_is_computed(make, monkeypatch):
    tight = ["distill.cache_teacher=all", "distill.cache_limit_gib=1e-6"]
    for start in (Run.distill, Run.cache, Run.evaluate, comparison.compare):
        run = make(*tight)
        with pytest.raises(
            ConfigError, match=r"takes about 0\.0\d+ GiB in .*, distill.cache_limit"
        ):
            start(run)
        assert not (run.folder / "teachers").exists()
        assert not (run.folder / "prototypes").exists()


@pytest.mark.parametrize(
    "layers, hidden, device, per_token, passes, tokens, wanted",
    [
        (6, 384, "cpu", 2 * 384 * 10, 3, 3e5, True),  # MiniLM to three layers, bf16
        (12, 768, "cpu", 2 * 768 * 13, 3, 1e5, True),
        (12, 768, "cuda", 2 * 768 * 13, 3, 1e5, False),  # computed faster than read
        (12, 768, "cuda", 0.03, 3, 1e6, True),  # logits
        (2, 32, "cpu", 4 * 32 * 4, 3, 1e5, False),
        (6, 384, "cpu", 2 * 384 * 10, 1.9, 1e6, False),  # one pass makes it, hardly one reads it
        (6, 384, "cpu", 2 * 384 * 10, 3, 1e6 * 4, False),  # 30 GB that nobody has asked for
    ],
)
def test_it_pays_where_reading_is_quicker_than_asking(
    layers, hidden, device, per_token, passes, tokens, wanted
):
    shape = BertConfig(num_hidden_layers=layers, hidden_size=hidden)
    size = int(per_token * tokens)
    assert teacher_cache.pays(size, int(tokens), shape, passes, device) is wanted


AUTO = ["distill.cache_teacher=auto", "distill.domains=[hiking]"]


@pytest.mark.parametrize(
    "options, kept",
    [
        ([*TWO_EPOCHS, "distill.method=logits_kd"], True),
        (["distill.method=logits_kd"], False),  # one epoch
        ([*TWO_EPOCHS, "distill.method=logits_kd", "distill.training.max_steps=2"], False),
        ([*TWO_EPOCHS], False),  # so small a teacher is quicker than the disk
        ([*TWO_EPOCHS, "distill.method=logits_kd", "distill.cache_limit_gib=1e-9"], False),
    ],
)
def test_left_to_itself_it_is_either_all_or_none(make, asked, options, kept):
    run = make(*options, *AUTO)
    [place] = run.distill()
    written = (place / "stage.json").stat().st_mtime_ns
    assert any("teacher outputs of" in line for line in run.said) is kept
    said = "all" if kept else "none"
    assert make(*options, *AUTO[1:], f"distill.cache_teacher={said}").distill() == [place]
    assert (place / "stage.json").stat().st_mtime_ns == written


def test_left_to_itself_it_keeps_nothing_that_changes(make):
    run = make(*TWO_EPOCHS, "distill.method=logits_kd", *AUTO)
    run.tokenizer.padding_side = "left"
    run.distill()
    assert not (run.folder / ".cache" / "teachers").exists()


def test_what_pads_on_the_left_is_not_kept(make):
    run = make("distill.cache_teacher=all")
    run.tokenizer.padding_side = "left"
    with pytest.raises(ConfigError, match="pads on the left"):
        run.distill()
    assert not (run.folder / "teachers").exists()


@pytest.mark.parametrize("method", ["meta", "gated_kd"])
def test_the_estimate_is_the_size(make, method):
    options = ["distill.cache_teacher=all", "distill.domains=[hiking,novels]"]
    options += [f"distill.method={method}", "teacher.ensemble=2"]
    places = make(*options).cache()
    values = [
        load_file(file)["values"].nbytes for place in places for file in place.glob("*.safetensors")
    ]
    with pytest.raises(ConfigError):
        make(*options, f"distill.cache_limit_gib={(sum(values) - 1) / 2**30!r}").cache()
    assert make(*options, f"distill.cache_limit_gib={sum(values) / 2**30!r}").cache() == places


def test_damage_between_runs_is_repaired_with_the_same_bits(make, asked):
    options = [*TWO_EPOCHS, "distill.domains=[hiking]", "distill.cache_teacher=all"]
    run = make(*options)
    [place] = run.distill()
    expected = load_file(place / "model.safetensors")
    file = run.folder / ".cache" / "teachers" / "meta-s42" / "hiking" / "key-1.safetensors"
    _flip(file)
    shutil.rmtree(place)
    asked.clear()
    again = make(*options)
    again.distill()
    assert any("key-1.safetensors: damaged; made anew" in line for line in again.said)
    assert sum(asked) == 12
    seen = load_file(place / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in seen.items())


@pytest.mark.parametrize("lost", [False, True])
def test_a_stopped_run_ends_with_the_same_bits(make, monkeypatch, lost):
    options = [*TWO_EPOCHS, "distill.domains=[hiking]", "distill.cache_teacher=all"]
    [whole] = make(*options, output="whole").distill()
    run = make(*options, output="stopped")
    run.teach()
    distil_until_stopped(run, monkeypatch)
    if lost:
        shutil.rmtree(run.folder / ".cache" / "teachers")
    resumed = make(*options, output="stopped")
    [place] = resumed.distill()
    assert any("going on from checkpoint" in line for line in resumed.said)
    assert_same_bits(whole, place)
    logged = [[r["loss"] for r in rows_of(p / "log.jsonl") if "loss" in r] for p in (whole, place)]
    assert logged[0] == logged[1] and len(logged[0]) == 6


# Two processes


def worker(source: Path, folder: Path) -> None:
    """Students with a live and with a cached teacher, and a disk that is full for one process."""
    world = join_world()
    if world.is_main:
        write_config(source, folder, "run")
    world.barrier()

    def make(*options: str) -> Run:
        config = load_config(
            str(folder / "run.yaml"),
            [
                *TWO_EPOCHS,
                "distill.domains=[hiking]",
                "teacher.training.per_device_eval_batch_size=5",
                *options,
            ],
        )
        return Run(config, world, Console(quiet=True))

    asked = []
    answer = FrozenTeacher.__call__

    def counted(self, batch):
        asked.extend(batch["index"].tolist())
        return answer(self, batch)

    FrozenTeacher.__call__ = counted
    seen = {}
    for name, options in {"live": [], "cached": ["distill.cache_teacher=all"]}.items():
        asked.clear()
        run = make(*options)
        [place] = run.distill()
        everyone = world.gather(list(asked))
        seen[name] = [losses(place), everyone]
    shutil.rmtree(run.folder / ".cache" / "teachers") if world.is_main else None
    world.barrier()
    if world.rank == 1:

        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        os.pwrite = full
    told = None
    try:
        make("distill.cache_teacher=all").cache()
    except CheckpointError as error:
        told = error.cause
    seen["told"] = world.gather(told)
    seen["left"] = [path.name for path in (run.folder / ".cache" / "teachers").rglob("*.*")]
    if world.is_main:
        (folder / "seen.json").write_text(json.dumps(seen))


def test_two_processes_share_the_work_and_the_files(source, tmp_path):
    run_ranks(2, worker, source, tmp_path)
    seen = json.loads((tmp_path / "seen.json").read_text())
    [live], [cached] = (seen[name][0].values() for name in ("live", "cached"))
    torch.testing.assert_close(torch.tensor(cached), torch.tensor(live), rtol=2e-5, atol=1e-8)
    # Batches of 5, 5 and 2: the last is shown to both, as each must run as many.
    asked = seen["cached"][1]
    assert [len(rows) for rows in asked] == [7, 7]
    assert len(set().union(*asked)) == 12 and len(set(asked[0]) & set(asked[1])) == 2
    assert len(seen["told"]) == 2 and all("No space left" in line for line in seen["told"])
    assert seen["left"] == []
