"""What students are for: export, serving, latency, and the report of a run."""

from importlib import import_module

_HOME = {
    "Predictor": "predictor",
    "export_onnx": "export",
    "task_at": "predictor",
}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'metakd.deploy' has no attribute {name!r}")
    return getattr(import_module(f"metakd.deploy.{_HOME[name]}"), name)
