"""A student as ONNX, for runtimes without PyTorch: ``export_onnx``.

The graph comes from ``torch.export`` with dynamic batch and length, attention as ONNX's own
operator. int8 is ONNX Runtime's quantisation of the matrix products (``int8``), after ``smoothing``
has fitted the layers to it; embeddings are kept in half precision. fp16 is for GPUs. Every file is
compared with PyTorch on texts before anything is published; one that answers otherwise is an error.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from metakd.data.labels import Label
from metakd.deploy.engines import Inputs
from metakd.deploy.extra import need
from metakd.deploy.formats import (
    EXPORT_REPORT,
    INT8_ENGINE,
    LEAST_AGREEMENT,
    LOGIT_TOLERANCE,
    ONNX_FILES,
    ONNX_FOLDER,
)
from metakd.deploy.int8 import fix_ranges, quantise
from metakd.deploy.known import note
from metakd.deploy.predictor import Predictor, Text
from metakd.deploy.smoothing import smoothed
from metakd.environment import environment
from metakd.errors import ConfigError, DataError, ParityError, UnsupportedError, listing
from metakd.method.tasks import Task
from metakd.models.inputs import input_names
from metakd.pipeline.doubts import one_label

ACTIVATIONS = ("static", "dynamic")

OPSET = 23
"""The first with an attention operator."""

_LABELS_SHOWN = 12
_ENOUGH = 100  # texts, of which one is a hundredth of the agreement
_ALONE = 200  # texts that int8 is asked for one by one, too
_FITTED_TO = 200  # texts; int8 is fitted to their activations, not to their labels
# protobuf's limit, less room for the graph; beyond it weights go to a file beside
_LARGEST_FILE = 2**31 - 2**24


def export_onnx(
    folder: str | Path,
    texts: Sequence[Text],
    *,
    labels: Sequence[Label] | None = None,
    data: str = "",
    int8: bool = False,
    fp16: bool = False,
    out: str | Path | None = None,
    command: str = "",
    made_up: bool = False,
    activations: str | None = None,
) -> dict:
    """Export a sequence classifier and compare the exported files with it.

    Args:
        folder: the student, saved with its tokenizer.
        texts: what to compare on; the more like the texts to be served, the better.
        labels: of the texts, to score the exports as well: a class of each, or a tuple of classes,
            or a number, as the model's task has them.
        data: what the texts are; recorded.
        int8: write a quantised model beside the fp32 one.
        fp16: write a half-precision model beside it.
        out: receives the files; by default ``folder/onnx``.
        command: recorded.
        made_up: the texts are not like those to be served: say so, and leave out a smaller format
            that does not answer as PyTorch does, instead of publishing nothing.
        activations: how int8 rounds them: ``static``, in ranges that are fixed to those of the
            texts, so that answers do not depend on what else is in a batch; ``dynamic``, in ranges
            found in each batch. None: static, unless the texts are made up.

    Returns:
        The content of ``export.json``: for each file its size, its largest and mean logit error,
        the share of texts with PyTorch's label, and its score where there are labels; of int8
        also how activations are rounded, and the share of labels that depend on the other texts of
        a batch; remarks on what the comparison cannot tell; and what ``known.note`` notes.

    Raises:
        ParityError: a file answers otherwise than PyTorch does; nothing is published then.
        UnsupportedError: a package is missing, or the model cannot be exported.
        CheckpointError: the folder holds no model, or a damaged one.
        DataError: there are no texts, or not a label for each, or one that is not the model's.
        ConfigError: there are no such activations, or no int8 to have them; ``out`` holds
            something else than an export, or cannot be written.
    """
    if activations and not int8:
        raise ConfigError("activations: are those of int8", "ask for int8, or leave them out")
    activations = activations or ("dynamic" if made_up else "static")
    if activations not in ACTIVATIONS:
        ways = " nor ".join(ACTIVATIONS)
        raise ConfigError(f"activations: {activations!r} is neither {ways}", "name one of these")
    if not texts:
        raise DataError("there are no texts to compare the export on", "give some")
    folder = Path(folder)
    out = (folder / ONNX_FOLDER if out is None else Path(out)).resolve()
    _check_place(out)
    trained = Predictor(folder, engine="eager", device="cpu")
    gold = None
    if labels is not None:
        gold = _encoded(trained.task, trained.labels, labels, len(texts))
    building, gone = (out.with_name(f".{state}-{out.name}") for state in ("tmp", "gone"))
    try:
        shutil.rmtree(building, ignore_errors=True)
        few = texts[:: -(-len(texts) // _FITTED_TO)]
        write_files(
            trained.engine.model,
            building,
            int8=int8,
            fp16=fp16,
            run=lambda model: trained.with_model(model).logits(few),
            batches=trained.batches(few) if activations == "static" else None,
        )
        trained.tokenizer.save_pretrained(building)
        report = {
            "source": str(folder),
            "command": command,
            "opset": OPSET,
            "environment": environment("cpu", torch.get_num_threads()),
            **_compare(building, trained, texts, gold, data, made_up, activations),
            "known": note(folder, building),
        }
        (building / EXPORT_REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if out.exists():
            shutil.rmtree(gone, ignore_errors=True)
            out.rename(gone)
        building.rename(out)
    except OSError as error:
        cause = f"{out}: {error.strerror or error}"
        raise ConfigError(cause, "make room, or give another out") from error
    finally:
        for left in (building, gone):
            shutil.rmtree(left, ignore_errors=True)
    return report


def _check_place(out: Path) -> None:
    """What is there is replaced as a whole, which must not hit anything but an export."""
    if out.is_dir() and not (out / EXPORT_REPORT).exists() and any(out.iterdir()):
        raise ConfigError(f"{out}: holds other files than an export", "give another place")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is no folder", "give another place")


def write_files(
    model: PreTrainedModel,
    folder: Path,
    *,
    int8: bool = False,
    fp16: bool = False,
    run: Callable[[PreTrainedModel], object] | None = None,
    batches: Iterable[Inputs] | None = None,
) -> None:
    """Write a model's ONNX files and its configuration into a new folder; compares nothing.

    Args:
        model: in eval mode.
        folder: made.
        int8: write a quantised model beside the fp32 one.
        fp16: write a half-precision model beside it.
        run: runs a model on texts like those it will serve, so that int8 can be fitted to them;
            None quantises every layer as it is.
        batches: of such texts, to which int8's ranges of activations are fixed; None finds them
            in each batch that is served.

    Raises:
        UnsupportedError: a package is missing, or the model cannot be exported.
    """
    need("onnx", "onnxruntime", "onnxscript")
    folder.mkdir(parents=True)
    fp32 = folder / ONNX_FILES["onnx"]
    _write_onnx(model, fp32)
    if int8:
        _write_int8(model, fp32, folder / ONNX_FILES[INT8_ENGINE], run, batches)
    if fp16:
        _halve(fp32, folder / ONNX_FILES["onnx-fp16"])
    model.config.save_pretrained(folder)


def _write_onnx(model: PreTrainedModel, file: Path) -> None:
    names = sorted(input_names(model.config))
    # Neither size may be 1, which torch.export would take for fixed.
    example = {name: torch.ones(2, 8, dtype=torch.long) for name in names}
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    with _quiet():
        try:
            torch.onnx.export(
                model,
                (),
                str(file),
                kwargs=example,
                input_names=names,
                output_names=["logits"],
                dynamic_shapes={name: {0: "batch", 1: "length"} for name in names},
                opset_version=OPSET,
                dynamo=True,
                # The optimiser makes rotary operators of a form that ONNX Runtime refuses.
                optimize=not getattr(model.config, "rope_parameters", None),
                external_data=size > _LARGEST_FILE,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            found: BaseException = error
            while found.__cause__ is not None:
                found = found.__cause__
            reason = f"{type(found).__name__}: {(str(found).splitlines() or [''])[0]}"
            raise UnsupportedError(
                f"{type(model).__name__} cannot be exported: torch.export cannot follow its "
                f"forward pass for batches of any size ({reason})",
                "serve it with engine eager or compile",
            ) from error


def _write_int8(
    model: PreTrainedModel,
    fp32: Path,
    int8: Path,
    run: Callable[[PreTrainedModel], object] | None,
    batches: Iterable[Inputs] | None,
) -> None:
    plan: list = []
    if run is not None:
        model, plan = smoothed(model, run)
        _write_onnx(model, int8)
    with _quiet():
        quantise(fp32 if run is None else int8, int8, plan)
        if batches is not None:
            fix_ranges(int8, batches)


def _halve(fp32: Path, fp16: Path) -> None:
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with _quiet():
        model = convert_float_to_float16(onnx.load(fp32), keep_io_types=True)
        onnx.save(model, fp16)


@contextlib.contextmanager
def _quiet():
    """Exporter and quantiser tell much that a user can do nothing about."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _compare(
    built: Path,
    trained: Predictor,
    texts: Sequence[Text],
    gold: torch.Tensor | None,
    data: str,
    made_up: bool,
    activations: str,
) -> dict:
    wanted, task = trained.logits(texts), trained.task
    answers = task.answers(wanted.astype(np.float64), trained.labels)
    remarks = _remarks([answer.fields()["prediction"] for answer in answers])
    if made_up:
        remarks.append(f"compared on {data}: --data FILE gives texts like those to be served")

    def score(logits: np.ndarray) -> float | None:
        return None if gold is None else task.score(gold, torch.from_numpy(logits))

    formats: dict[str, dict] = {}
    for engine, name in ONNX_FILES.items():
        if not (built / name).exists():
            continue
        exported = Predictor(built, engine=engine, device="cpu")
        found = exported.logits(texts)
        errors = np.abs(found - wanted)
        formats[name] = {
            "bytes": sum(file.stat().st_size for file in built.glob(f"{name}*")),
            "max_logit_error": float(errors.max()),
            "mean_logit_error": float(errors.mean()),
            "label_agreement": float(task.alike(found, wanted).mean()),
            task.metric: score(found),
        }
        try:
            _check(name, engine, formats[name], len(texts))
        except ParityError as error:
            if not made_up or engine == "onnx":
                raise
            remarks.append(f"{error.cause}: left out")
            del formats[name]
            for file in built.glob(f"{name}*"):
                file.unlink()
            continue
        if engine == INT8_ENGINE:
            few = texts[:_ALONE]
            alone = np.concatenate([exported.logits([text]) for text in few])
            moved = int((~task.alike(alone, found[: len(few)])).sum())
            formats[name] |= {"activations": activations, "labels_by_batch": moved / len(few)}
            if moved:
                why = "rounding at a border differs"
                if activations == "dynamic":
                    why = (
                        "activations are rounded with one scale for all of it: --activations "
                        "static fixes it"
                    )
                remarks.append(
                    f"{name}: {moved} of {len(few)} labels depend on what else is in the batch, "
                    f"since {why}"
                )
    checked = {"examples": len(texts), "data": data, task.metric: score(wanted)}
    return {"checked": checked | {"remarks": remarks}, "formats": formats}


def _remarks(answers: Sequence[object]) -> list[str]:
    """What a comparison on these texts cannot tell."""
    found = [one_label(answers)]
    if len(answers) < _ENOUGH:
        found.append(
            f"compared on {len(answers)} texts, each of them {1 / len(answers):.1%} of the "
            f"agreement: give at least {_ENOUGH}"
        )
    return list(filter(None, found))


def _encoded(task: Task, known: Sequence[str], labels: Sequence[Label], texts: int) -> torch.Tensor:
    """The labels of N texts, [N] or [N, M]."""
    if len(labels) != texts:
        raise DataError(f"there are {texts} texts and {len(labels)} labels", "correct the data")
    number = {label: place for place, label in enumerate(known)}
    for name in (name for label in labels for name in task.classes_of(label)):
        if name not in number:
            listed = listing(list(map(repr, known)), _LABELS_SHOWN)
            raise DataError(
                f"label {name!r} is not among the model's: {listed}", "correct the data"
            )
    try:
        return task.encode(labels, number)
    except (ValueError, TypeError) as error:
        cause = f"labels such as {labels[0]!r:.60} are none of a model where {task.line}"
        raise DataError(cause, "correct the data") from error


def _check(name: str, engine: str, parity: dict, examples: int) -> None:
    error, agreement = parity["max_logit_error"], parity["label_agreement"]
    if engine == "onnx":
        # NaN is no agreement either.
        good = error <= LOGIT_TOLERANCE
        found = f"logits differ by up to {error:.1e} from PyTorch's, more than {LOGIT_TOLERANCE:g}"
    else:
        good = agreement >= LEAST_AGREEMENT
        found = (
            f"{agreement:.1%} of {examples} labels are PyTorch's, less than {LEAST_AGREEMENT:.0%}"
        )
    if not good:
        raise ParityError(f"{name}: {found}", "serve another format; nothing was written")
