"""Ways to run a sequence classifier: one class per engine, one call for all.

An engine takes a padded batch, ``{"input_ids": [B, L], "attention_mask": [B, L], ...}`` of int64
NumPy arrays, and returns logits [B, M] as float32. ``why_not`` says why an engine cannot run a
folder here, ``open_engine`` opens one; nothing falls back to another. Those that run PyTorch are in
``eager``, so that who runs another need not wait for it.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from metakd.deploy.extra import INSTALL, absent
from metakd.deploy.formats import ONNX_FILES, ONNX_FOLDER
from metakd.environment import has_cuda
from metakd.errors import CheckpointError, ConfigError, UnsupportedError
from metakd.models.inputs import Inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_device(device: str) -> None:
    """See that there is such a device.

    Raises:
        ConfigError: it is neither cpu nor cuda.
        UnsupportedError: there is no CUDA device.
    """
    if device not in _PROVIDERS:
        raise ConfigError(f"device: {device} is neither cpu nor cuda", "name one of these")
    if device == "cuda" and not has_cuda():
        raise UnsupportedError(_NO_CUDA, "use the CPU: device cpu")


def why_not(engine: str, folder: Path, device: str) -> str | None:
    """Why this engine cannot run this folder's model on this device (cpu or cuda); None if it
    can."""
    if device == "cuda" and not has_cuda():
        return _NO_CUDA
    if engine not in ONNX_FILES:
        if not (folder / "model.safetensors").exists():
            return f"{folder} holds no model.safetensors"
        if engine == "cudagraph" and device != "cuda":
            return "CUDA graphs need a CUDA device"
        return None
    if reason := absent("onnxruntime"):
        return f"{reason}: {INSTALL}"
    import onnxruntime

    provider = _PROVIDERS[device]
    if provider not in onnxruntime.get_available_providers():
        return f"this onnxruntime has no {provider}: pip install onnxruntime-gpu"
    if onnx_file(engine, folder) is None:
        option = engine.removeprefix("onnx").replace("-", " --")
        return f"{folder} is not exported: metakd export {folder} --to onnx{option}"
    return None


def onnx_file(engine: str, folder: Path) -> Path | None:
    """Where the exported model of a student's folder, or of its export, is."""
    places = (folder / ONNX_FOLDER / ONNX_FILES[engine], folder / ONNX_FILES[engine])
    return next(filter(Path.exists, places), None)


def open_engine(
    engine: str, folder: Path, *, device: str = "cpu", threads: int | None = None
) -> Engine:
    """Open a folder's model.

    Args:
        engine: one of ``formats.ENGINES``, or ``onnx-fp16``.
        folder: a student or teacher, or what ``export`` made of it.
        device: cpu or cuda.
        threads: on a CPU; None leaves the library's choice.

    Raises:
        ConfigError: there is no such engine or device.
        UnsupportedError: it cannot run this model here, with the reason.
        CheckpointError: the model is damaged.
    """
    if engine not in _HOME:
        raise ConfigError(f"engine: {engine} is not among {', '.join(_HOME)}", "name another")
    check_device(device)
    if reason := why_not(engine, folder, device):
        raise UnsupportedError(f"engine {engine}: {reason}", "name another engine")
    module, name = _HOME[engine]
    return getattr(import_module(module), name)(engine, folder, device, threads)


class Engine:
    """A model that is ready to run.

    Attributes:
        inputs: names of what the model reads, a subset of what a tokenizer makes.
        model: what runs, where that is PyTorch; other engines have none.
    """

    inputs: frozenset[str]
    model: PreTrainedModel

    def __call__(self, batch: Inputs) -> np.ndarray:
        """Logits [B, M], float32."""
        raise NotImplementedError

    def plainly(self, batch: Inputs) -> np.ndarray:
        """Logits [B, M], float32, without anything that is made once for a shape."""
        return self(batch)

    def padded_shape(self, batch: int, length: int) -> tuple[int, int]:
        """The shape, at least as large, in which the engine would rather have a batch."""
        return batch, length

    def texts_at_once(self, tokens: int, length: int) -> int:
        """How many texts of up to ``length`` tokens make a batch of at most ``tokens``, padding
        included; at least one."""
        return max(1, tokens // self.padded_shape(1, length)[1])


class OnnxEngine(Engine):
    """ONNX Runtime on an exported file."""

    def __init__(self, name: str, folder: Path, device: str, threads: int | None):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # what it says below that is for its own developers
        if threads is not None:
            options.intra_op_num_threads = threads
            options.inter_op_num_threads = 1
        file = onnx_file(name, folder)
        # TF32 rounds the products of what is said to be fp32.
        provider = (_PROVIDERS[device], {"use_tf32": "0"} if device == "cuda" else {})
        try:
            self._session = onnxruntime.InferenceSession(str(file), options, providers=[provider])
        except Exception as error:  # ONNX Runtime's own kinds have no common parent
            first = str(error).splitlines()[0]
            raise CheckpointError(f"{file}: {first}", "export the student again") from error
        if self._session.get_providers()[0] != _PROVIDERS[device]:  # it falls back in silence
            raise UnsupportedError(
                f"engine {name}: {_PROVIDERS[device]} cannot start here",
                "see that the libraries that onnxruntime-gpu names are installed",
            )
        self.inputs = frozenset(value.name for value in self._session.get_inputs())

    def __call__(self, batch: Inputs) -> np.ndarray:
        [logits] = self._session.run(None, {name: batch[name] for name in self.inputs})
        return logits.astype(np.float32, copy=False)


_NO_CUDA = "there is no CUDA device"
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_HOME = {
    "eager": ("metakd.deploy.eager", "EagerEngine"),
    "compile": ("metakd.deploy.eager", "CompiledEngine"),
    "cudagraph": ("metakd.deploy.eager", "GraphEngine"),
    **dict.fromkeys(ONNX_FILES, (__name__, "OnnxEngine")),
}
