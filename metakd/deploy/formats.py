"""Names that everything in ``deploy`` shares: engines, exported files, and what is asked of them.

Imports nothing, so that a command line or a report that names them needs no torch.
"""

ENGINES = ("eager", "compile", "cudagraph", "onnx", "onnx-int8")
INT8_ENGINE = "onnx-int8"
"""The only one whose answers differ: never compared as if it ran the same model."""

TOKENISING = "tokenising"
"""Stands in an engine's place where latencies of tokenising are told beside the engines'."""

ONNX_FOLDER = "onnx"
"""Where a student's folder keeps its exports."""

ONNX_FILES = {
    "onnx": "model.onnx",
    INT8_ENGINE: "model_int8.onnx",
    "onnx-fp16": "model_fp16.onnx",
}
"""Engine -> file, named as other tools name them."""

EXPORT_REPORT = "export.json"

LOGIT_TOLERANCE = 1e-4
"""Largest difference of a logit between the exported fp32 model and PyTorch."""

LEAST_AGREEMENT = 0.99
"""Share of the texts that int8 and fp16 must give the label that PyTorch gives them."""
