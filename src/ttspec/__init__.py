"""Speculative decoding whose drafter learns while it generates.

Names are imported when they are first used, so that `ttspec --help` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ttspec.config import DraftConfig, GenerateConfig, LearnConfig
    from ttspec.decoding.engine import Engine
    from ttspec.decoding.loading import load
    from ttspec.decoding.session import Session
    from ttspec.errors import (
        CheckpointError,
        DataError,
        OptionError,
        ResourceError,
        TargetError,
        TrainingError,
        TtspecError,
    )
    from ttspec.records import Chunk, Result, Round, Stats

_HOMES = {
    "ttspec.config": ("DraftConfig", "GenerateConfig", "LearnConfig"),
    "ttspec.decoding.engine": ("Engine",),
    "ttspec.decoding.loading": ("load",),
    "ttspec.decoding.session": ("Session",),
    "ttspec.errors": (
        "CheckpointError",
        "DataError",
        "OptionError",
        "ResourceError",
        "TargetError",
        "TrainingError",
        "TtspecError",
    ),
    "ttspec.records": ("Chunk", "Result", "Round", "Stats"),
}

__all__ = [
    "CheckpointError",
    "Chunk",
    "DataError",
    "DraftConfig",
    "Engine",
    "GenerateConfig",
    "LearnConfig",
    "OptionError",
    "ResourceError",
    "Result",
    "Round",
    "Session",
    "Stats",
    "TargetError",
    "TrainingError",
    "TtspecError",
    "load",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'ttspec' has no attribute {name!r}")
