"""vLLM's own draft module: what was learned goes into it in place, and from it onto the disk.

Whoever holds a parameter, a CUDA graph or compiled code, sees it: no tensor moves. What is shared
with the target, embedding and head, is never given, for then the text would change.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ttspec.config import LearnConfig
from ttspec.drafters.base import Drafter
from ttspec.drafters.checkpoint import PICKLES, canonical
from ttspec.drafters.layers import Weights, multiplied_out
from ttspec.learning.memory_learner import MemoryLearner

TABLES = ("embed_tokens", "lm_head", "d2t", "t2d")
"""In names of tensors that never learn, and that vLLM may share with the target."""


def learned_names(drafter: Drafter, learn: LearnConfig) -> list[str]:
    """Published names of what learns, as it is given to vLLM; `learn` is resolved."""
    names = drafter.learnable(learn.parameters)
    if learn.weights != "full":
        names = [name + ".weight" for name in drafter.matrices(learn.parameters)]
    return [n for n in names if not any(table in n for table in TABLES)]


def learned_weights(learner: MemoryLearner, learned: Weights) -> dict[str, Tensor]:
    """What of a learner drafts, or what it learned, by published name, changes multiplied out."""
    if learner.config.weights != "full":
        learned = multiplied_out({**learner.drafter.weights, **learned})
    return {name: learned[name] for name in learned_names(learner.drafter, learner.config)}


def load_in_place(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a module of vLLM new weights, of which it makes what it runs with.

    DFlash makes new fused tensors of them at every load. A captured graph would read the old ones
    on: so the new values go into the old tensors.
    """
    held = [(part, dict(_plain_tensors(part))) for part in module.modules()]
    module.load_weights(weights.items())  # type: ignore[operator]
    for part, before in held:
        for name, new in _plain_tensors(part):
            old = before.get(name)
            if old is not None and old is not new and old.shape == new.shape:
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)
                setattr(part, name, old)


def _plain_tensors(part: nn.Module) -> list[tuple[str, Tensor]]:
    """Tensors that are attributes, neither parameters nor buffers."""
    return [(n, t) for n, t in vars(part).items() if isinstance(t, Tensor)]


def flat(weights: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """One row of them all, as ranks send it."""
    return torch.cat([w.to(dtype).flatten() for w in weights.values()])


def unflattened(row: Tensor, names: Sequence[str], shapes: Mapping[str, Any]) -> dict[str, Tensor]:
    """The opposite of `flat`."""
    parts = row.split([torch.Size(shapes[n]).numel() for n in names])
    return {n: part.view(shapes[n]) for n, part in zip(names, parts, strict=True)}


def save_learned(source: Path, kind: str, learned: Mapping[str, Tensor], folder: Path) -> None:
    """Write a drafter's folder again, with what it learned; whole, or not at all.

    Args:
        source: The drafter that the engine was started with.
        kind: Of drafter.
        learned: On the CPU, by published name, in the dtype to write.
        folder: Must not be there.

    Raises:
        OSError: It is there, the disk is full, or it may not be written to.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for file in sorted(source.iterdir()):
            if file.suffix == ".safetensors":
                tensors = load_file(file)
                for key in tensors:
                    tensors[key] = learned.get(canonical(kind, key), tensors[key]).contiguous()
                save_file(tensors, part / file.name, metadata={"format": "pt"})
                (part / file.name).chmod(0o644)  # written for its owner alone
            elif file.is_file() and file.suffix not in PICKLES:
                shutil.copyfile(file, part / file.name)
        part.chmod(0o755)  # made for its owner alone
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


class Saver:
    """Writes learned drafters beside the steps, one at a time."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        """`warn` is told what was not written, and why."""
        self._warn, self._thread = warn, threading.Thread()
        self.told = ""
        """Of the last one, for an operator: where it is, or why it is not there."""

    def save(self, source: Path, kind: str, learned: Mapping[str, Tensor], folder: Path) -> None:
        """Begin to write; arguments as of `save_learned`."""
        if self._thread.is_alive():
            return self._warn(f"nothing in {folder}: it still writes another")
        self.told = f"not yet in {folder}"

        def write() -> None:
            try:
                save_learned(source, kind, learned, folder)
                self.told = str(folder.absolute())
            except Exception as error:
                self.told = f"nothing in {folder}: {error}"
                self._warn(self.told)

        self._thread = threading.Thread(target=write, daemon=True)
        self._thread.start()
        return None

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread.is_alive():
            self._thread.join()
