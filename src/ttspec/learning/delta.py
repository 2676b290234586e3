"""What a drafter learned as a change of its weights, and of which weights it is one.

Low-rank changes are their factors, `{name}.down` and `{name}.up`; of weights that learned
themselves there are the float32 differences.
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from ttspec.config import LearnConfig
from ttspec.drafters.base import Drafter
from ttspec.drafters.checkpoint import BUNDLED
from ttspec.drafters.layers import DOWN, UP, Weights, multiplied_out
from ttspec.errors import CheckpointError

AT, EXACT = ".at", ".exact"
"""After a weight's name: where the anchor plus the difference is not what it was, in float32, as
with a weight that nearly vanished; and what it was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A change of a drafter's weights."""

    path: Path
    drafter: str
    """What `--drafter` calls the weights that it is a change of."""
    sha256: str
    """Of those weights."""
    learn: str
    """The `LearnConfig` that made it, as JSON."""
    changes: dict[str, Tensor]

    def require(self, drafter: Drafter | None) -> Drafter:
        """The drafter, if it belongs to its weights.

        Raises:
            CheckpointError: There is none, or its weights are others.
        """
        if drafter is None or weights_sha256(drafter.weights) != self.sha256:
            raise CheckpointError(
                f"{self.path} is a change of other weights than those of "
                f"{drafter.name if drafter else 'none'} (sha256 {self.sha256[:12]}).\n"
                f"Give the drafter it was learned with: {self.drafter}."
            )
        return drafter

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
        """A drafter of its own, with the change in its weights; raises as `require`."""
        drafter = self.require(drafter)
        whole = {n: w.to(drafter.weights[n]) for n, w in self.applied(drafter.weights).items()}
        new = copy.copy(drafter)
        new.weights = {**drafter.weights, **whole}
        return new

    def start(self, drafter: Drafter, learn: LearnConfig) -> dict[str, Tensor] | None:
        """Where copies begin that learn as a resolved config says; None where they cannot."""
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


def delta_metadata(drafter: Drafter, learn: LearnConfig) -> dict[str, str]:
    """What the file of a change says of it: of `drafter` as it was, and how it learned."""
    return {
        "format": "pt",
        "ttspec_delta": "1",
        "kind": drafter.kind,
        "drafter": _name(drafter),
        "sha256": weights_sha256(drafter.weights),
        "learn": json.dumps(asdict(replace(learn, keep=None)), sort_keys=True),
    }


def read_delta(path: Path) -> Delta:
    """A change of a drafter's weights, from a file that is as it was written."""
    with safe_open(path, framework="pt") as opened:
        about = opened.metadata()
        changes = {n: opened.get_tensor(n).clone() for n in opened.keys()}  # noqa: SIM118
    said = {key: about[key] for key in ("drafter", "sha256", "learn")}
    return Delta(path=path, changes=changes, **said)


def _name(drafter: Drafter) -> str:
    """What `--drafter` takes, from whatever folder it is asked."""
    folder = drafter.path
    if folder and folder.parent != BUNDLED and Path(drafter.name).expanduser().is_dir():
        return str(folder.resolve())
    return drafter.name
