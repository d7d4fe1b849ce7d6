"""The configuration of a run: its blocks, how it is read and checked, what DeepSpeed is told.

Imports no torch.
"""

from metakd.config.blocks import (
    DataConfig,
    DistillConfig,
    PretrainConfig,
    PrototypeConfig,
    StudentConfig,
    TeacherConfig,
    TermWeights,
    TrainingConfig,
)
from metakd.config.checks import Stage
from metakd.config.loading import load_config
from metakd.config.run import CompareConfig, CompareRow, RunConfig, Sharding, row_label

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
