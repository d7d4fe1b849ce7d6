"""The configuration of a run: its blocks, how it is read and checked, what DeepSpeed is told.

Imports no torch.
"""

from metakd.config.blocks import (
    CompareConfig,
    CompareRow,
    DataConfig,
    DistillConfig,
    PretrainConfig,
    PrototypeConfig,
    RunConfig,
    Sharding,
    StudentConfig,
    TeacherConfig,
    TermWeights,
    TrainingConfig,
    row_label,
)
from metakd.config.checks import Stage
from metakd.config.loading import load_config

__all__ = [
    "CompareConfig",
    "CompareRow",
    "DataConfig",
    "DistillConfig",
    "PretrainConfig",
    "PrototypeConfig",
    "RunConfig",
    "Sharding",
    "Stage",
    "StudentConfig",
    "TeacherConfig",
    "TermWeights",
    "TrainingConfig",
    "load_config",
    "row_label",
]
