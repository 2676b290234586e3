"""What a drafter learned, as a file: only the change, and of which weights it is one.

Low-rank changes are written as their factors, `{name}.down` and `{name}.up`; of weights that
learned themselves the file has the float32 differences. Pickles are never read.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ttspec.config import LearnConfig
from ttspec.drafters.base import Drafter
from ttspec.drafters.checkpoint import BUNDLED, PICKLES
from ttspec.drafters.layers import DOWN, UP, Weights, multiplied_out
from ttspec.errors import CheckpointError, OptionError, require_writable, writing
from ttspec.learning.live_weights import resolve_learn_config

SUFFIX, FORMAT = ".safetensors", "1"
AT, EXACT = ".at", ".exact"
"""After a weight's name: where the anchor plus the difference is not what it was, in float32, as
with a weight that nearly vanished; and what it was."""
_MAGIC = (b"PK\x03\x04", b"\x80")
"""How pickles begin, in torch's archive or by themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A change of a drafter's weights."""

    path: Path
    drafter: str
    """What `--drafter` calls the weights that it is a change of."""
    kind: str
    sha256: str
    learn: str
    """The `LearnConfig` that made it, as JSON."""
    changes: dict[str, Tensor]

    def require(self, drafter: Drafter | None) -> None:
        """Refuse a drafter that it does not belong to.

        Raises:
            OptionError: There is no drafter.
            CheckpointError: Its kind or its weights are others, or the file does not fit them.
        """
        if drafter is None:
            raise OptionError(
                f"{self.path} is a change of the drafter {self.drafter}; the engine has none.\n"
                "Load it with that drafter."
            )
        if drafter.kind != self.kind:
            raise CheckpointError(
                f"{self.path} is a change of a {self.kind} drafter; {drafter.name} is of kind "
                f"{drafter.kind}.\nGive the drafter it was learned with: {self.drafter}."
            )
        if weights_sha256(drafter.weights) != self.sha256:
            raise CheckpointError(
                f"{self.path} is a change of other weights than those of {drafter.name} (sha256 "
                f"{self.sha256[:12]}).\nGive the drafter it was learned with: {self.drafter}."
            )
        for name, change in self.changes.items():
            if not self._fits(name, change, drafter.weights):
                raise CheckpointError(
                    f"{self.path}: {name} {list(change.shape)} has no place in {drafter.name}.\n"
                    "The file is damaged: give another one."
                )

    def _fits(self, name: str, change: Tensor, weights: Weights) -> bool:
        of, dot, end = name.rpartition(".")
        if dot + end in (DOWN, UP):
            matrix = weights.get(of + ".weight")
            down, up = self.changes.get(of + DOWN), self.changes.get(of + UP)
            if matrix is None or down is None or up is None:
                return False
            if not matrix.dim() == down.dim() == up.dim() == 2:
                return False
            return down.shape == (up.shape[1], matrix.shape[1]) and len(up) == len(matrix)
        if dot + end in (AT, EXACT):
            weight = weights.get(of)
            at, exact = self.changes.get(of + AT), self.changes.get(of + EXACT)
            if weight is None or at is None or exact is None or of not in self.changes:
                return False
            inside = bool(((at >= 0) & (at < weight.numel())).all())
            return inside and at.dim() == 1 and at.shape == exact.shape
        return name in weights and weights[name].shape == change.shape

    def applied(self, weights: Weights) -> dict[str, Tensor]:
        """The weights that it changes, float32, with the change in them."""
        whole: dict[str, Tensor] = {}
        for name, change in self.changes.items():
            if name.endswith(UP):
                of = name.removesuffix(UP)
                anchor, down = weights[of + ".weight"].float(), self.changes[of + DOWN]
                factors = {name: change.to(anchor), of + DOWN: down.to(anchor)}
                whole |= multiplied_out({of + ".weight": anchor, **factors})
            elif not name.endswith((DOWN, AT, EXACT)):
                new = weights[name].float()
                flat = (new + change.to(new)).flatten()
                if name + AT in self.changes:
                    at = self.changes[name + AT].to(flat.device)
                    flat[at] = self.changes[name + EXACT].to(flat)
                whole[name] = flat.view_as(new)
        return whole

    def changed(self, drafter: Drafter | None) -> Drafter:
        """A drafter of its own, with the change in its weights.

        Raises:
            OptionError, CheckpointError: See `require`.
        """
        self.require(drafter)
        assert drafter is not None
        whole = {n: w.to(drafter.weights[n]) for n, w in self.applied(drafter.weights).items()}
        new = copy.copy(drafter)
        new.weights = {**drafter.weights, **whole}
        return new

    def start(self, drafter: Drafter, learn: LearnConfig | None) -> dict[str, Tensor] | None:
        """Where copies that learn so begin; None where the drafter itself must have the change."""
        if learn is None:
            return None
        learn = resolve_learn_config(learn, drafter, rows=1)
        if learn.weights == "lora":
            own = drafter.changes(learn.parameters, learn.rank)
            return dict(self.changes) if _shapes(own) == _shapes(self.changes) else None
        names, whole = drafter.learnable(learn.parameters), self.applied(drafter.weights)
        if not whole.keys() <= set(names):
            return None
        return {n: whole.get(n, drafter.weights[n]) for n in names}


def _shapes(tensors: Weights) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def difference(new: Weights, old: Weights) -> dict[str, Tensor]:
    """What `Delta.applied` adds to `old` to give `new`, bit for bit where both are float32."""
    changes = {}
    for name, weight in new.items():
        weight, anchor = weight.detach().float(), old[name].float()
        changes[name] = weight - anchor
        inexact = (anchor + changes[name] != weight).flatten().nonzero()[:, 0]
        if len(inexact):
            changes[name + AT], changes[name + EXACT] = inexact, weight.flatten()[inexact]
    return changes


def weights_sha256(weights: Weights) -> str:
    """Of names and values. Of bfloat16 values, which are the same loaded in float32 or bfloat16."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        weight = weights[name].detach()
        if weight.is_floating_point():
            weight = weight.to(torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {list(weight.shape)} ".encode())
        digest.update(weight.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def require_new(path: Path) -> None:
    """Refuse to write over anything.

    Raises:
        OptionError: There is something at `path`.
        OSError: It cannot be written.
    """
    if path.exists() or path.is_symlink():
        what = "a folder" if path.is_dir() else "a file"
        raise OptionError(f"{path} is {what}; nothing was written.\nGive a new file's name.")
    require_writable(path)


def write_delta(
    path: Path, drafter: Drafter, learn: LearnConfig, changes: Mapping[str, Tensor]
) -> None:
    """Write a change of a drafter's weights.

    Args:
        path: New; ends in .safetensors.
        drafter: With the weights that it is a change of.
        learn: How it was learned.
        changes: Low-rank factors, or what `difference` gives.

    Raises:
        OptionError: The name ends otherwise, or there is something at `path`.
    """
    if path.suffix != SUFFIX:
        raise OptionError(f"{path} does not end in {SUFFIX}.\nGive a new file's name that does.")
    require_new(path)
    metadata = delta_metadata(drafter, learn)
    tensors = {n: w.detach().to("cpu", copy=True).contiguous() for n, w in changes.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with writing(path):
            save_file(tensors, partial, metadata=metadata)
        partial.chmod(0o644)  # findings/safetensors_0_8_replaces_files.sh
        path.touch(exist_ok=False)  # it is ours, or there is an error
        partial.replace(path)
    except FileExistsError:
        require_new(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def delta_metadata(drafter: Drafter, learn: LearnConfig) -> dict[str, str]:
    """What the file of a change says of it: arguments as in `write_delta`."""
    return {
        "format": "pt",
        "ttspec_delta": FORMAT,
        "kind": drafter.kind,
        "drafter": _name(drafter),
        "sha256": weights_sha256(drafter.weights),
        "learn": json.dumps(asdict(replace(learn, keep=None)), sort_keys=True),
    }


def read_delta(path: Path) -> Delta:
    """Read a change of a drafter's weights.

    Raises:
        CheckpointError: There is no such file, or it is a pickle, damaged or something else.
    """
    advice = f"Give a {SUFFIX} file that --save-drafter wrote."
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, so a whole drafter.\nUse --drafter {path}")
    if not path.is_file():
        raise CheckpointError(f"There is no such file: {path}.\n{advice}")
    with path.open("rb") as file:
        pickled = file.read(4).startswith(_MAGIC)
    if pickled or path.suffix in PICKLES:
        raise CheckpointError(f"{path} is a pickle, which can run code and is not read.\n{advice}")
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            changes = {n: opened.get_tensor(n).clone() for n in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or truncated: {error}.\nCopy or write it again."
        ) from error
    version = metadata.get("ttspec_delta")
    if version != FORMAT:
        what = f"of format {version}" if version else "no change that --save-drafter wrote"
        raise CheckpointError(
            f"{path} is {what}; this ttspec reads format {FORMAT}.\n"
            "A whole checkpoint's folder goes to --drafter."
        )
    keys = ("kind", "drafter", "sha256", "learn")
    missing = [key for key in keys if key not in metadata]
    unusable = [n for n, w in changes.items() if not _is_usable(n, w)]
    if missing or unusable or not changes:
        what = f"does not say its {missing[0]}" if missing else "holds no usable values"
        what += f": {unusable[0]}" if unusable else ""
        raise CheckpointError(f"{path} {what}.\nThe file is damaged: give another one.")
    return Delta(path=path, changes=changes, **{key: metadata[key] for key in keys})


def _is_usable(name: str, change: Tensor) -> bool:
    if name.endswith(AT):
        return change.dtype == torch.int64
    return change.dtype == torch.float32 and bool(change.isfinite().all())


def _name(drafter: Drafter) -> str:
    """What `--drafter` takes, from whatever folder it is asked."""
    folder = drafter.path
    if folder and folder.parent != BUNDLED and Path(drafter.name).expanduser().is_dir():
        return str(folder.resolve())
    return drafter.name
