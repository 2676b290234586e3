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
    **dict.fromkeys(("DraftConfig", "GenerateConfig", "LearnConfig"), "config"),
    **dict.fromkeys(("Chunk", "Result", "Round", "Stats"), "records"),
    "Engine": "decoding.engine",
    "Session": "decoding.session",
    "load": "decoding.loading",
}
"""Where names are, except errors."""

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
    if name not in __all__:
        raise AttributeError(f"module 'ttspec' has no attribute {name!r}")
    return getattr(import_module(f"ttspec.{_HOMES.get(name, 'errors')}"), name)
