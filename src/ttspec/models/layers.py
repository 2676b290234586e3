"""The decoder layers of a transformers model as compiled code: one compilation for all of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from inspect import unwrap
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttspec.compiled import compiled, of_any_size
from ttspec.rowcache import LayerCache, RowCache

MERGED = (
    ("q_proj", "k_proj", "v_proj"),
    ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b"),
    ("in_proj_qkvz", "in_proj_ba"),
    ("gate_proj", "up_proj"),
)
"""Projections that read the same states in the models we know: each group is one product."""


class MergedLinear:
    """Linear modules whose weights lie in one table, so that one product does for all of them.

    Their parameters become views of the table: the model is the same, and takes no more memory.
    """

    def __init__(self, parent: nn.Module, names: tuple[str, ...]) -> None:
        self.parent = parent
        modules = [cast(nn.Linear, getattr(parent, name)) for name in names]
        with torch.no_grad():
            self.weight = torch.cat([m.weight.data for m in modules])
            biases = [m.bias.data for m in modules if m.bias is not None]
            self.bias = torch.cat(biases) if biases else None
            ends = [0]
            for module in modules:
                ends.append(ends[-1] + module.out_features)
                module.weight.data = self.weight[ends[-2] : ends[-1]]
        spans = zip(names, pairwise(ends), strict=True)
        self.slices = {name: MergedSlice(self, begin, end) for name, (begin, end) in spans}
        self.states: Tensor | None = None
        self.out: Tensor | None = None

    def outputs(self, begin: int, end: int, states: Tensor) -> Tensor:
        """What one of the modules makes of states; the product is made for the first that asks."""
        if self.states is not states:
            self.states, self.out = states, F.linear(states, self.weight, self.bias)
        assert self.out is not None
        return self.out[..., begin:end]


class MergedSlice(nn.Module):
    """Stands in for one of the modules that were merged."""

    def __init__(self, merged: MergedLinear, begin: int, end: int) -> None:
        super().__init__()
        self.merged, self.place = merged, (begin, end)

    def forward(self, states: Tensor) -> Tensor:
        """What the module would make of states."""
        return self.merged.outputs(*self.place, states)


def merge_linears(layer: nn.Module) -> list[MergedLinear]:
    """The projections of a layer that may be one product."""
    found = []
    for module in layer.modules():
        for names in MERGED:
            ours = [getattr(module, name, None) for name in names]
            # A weight that is packed keeps another type under the same module.
            linears = [m for m in ours if type(m) is nn.Linear and type(m.weight) is nn.Parameter]
            alike = len({(m.in_features, m.bias is None) for m in linears}) == 1
            if alike and len(linears) == len(names):
                found.append(MergedLinear(module, names))
    return found


@contextmanager
def compiled_layers(
    model: nn.Module, merged: list[list[MergedLinear]], cache: RowCache, keyword: str
) -> Iterator[None]:
    """Within, the model's decoder layers, in `layers`, run as compiled code.

    `cache` holds keys and values of every layer already, and all slots are aimed at; `keyword` is
    what a layer's forward calls it. `merged` is of each layer, from `merge_linears`.
    """
    layers = list(model.layers)  # type: ignore[arg-type]
    # transformers hooks attention to record it, which cannot be compiled; a graph runs no hook.
    inner = [m for layer in layers for m in layer.modules() if m is not layer]
    hooks = [(m, m._forward_hooks) for m in inner if m._forward_hooks]
    for module, _ in hooks:
        module._forward_hooks = OrderedDict()
    replaced = []
    for index, layer in enumerate(layers):
        layer.forward = partial(_forward, layer, merged[index], keyword, cache.layer(index))
        for group in merged[index]:
            for name, part in group.slices.items():
                replaced.append((group.parent, name, getattr(group.parent, name)))
                setattr(group.parent, name, part)
    try:
        yield
    finally:
        for parent, name, module in replaced:
            setattr(parent, name, module)
        for layer in layers:
            del layer.forward
        for module, own in hooks:
            module._forward_hooks = own


def _forward(
    layer: nn.Module,
    merged: list[MergedLinear],
    keyword: str,
    own: Any,
    hidden: Tensor,
    /,
    **given: Any,
) -> Any:
    if isinstance(own, LayerCache) and not own.is_all:
        _of_any_width((hidden, own.slot, *given.values()))
    out = _layer(layer, hidden, {**given, keyword: own})
    for group in merged:
        group.states = group.out = None
    return out


@compiled
def _layer(layer: nn.Module, hidden: Tensor, given: dict[str, Any]) -> Any:
    return unwrap(type(layer).forward)(layer, hidden, **given)


def _of_any_width(value: Any) -> None:
    """Mark states, angles and what is seen, so that one code serves pieces of all lengths."""
    if isinstance(value, Tensor):
        of_any_size(value, 2 if value.dim() > 3 else 1)
    elif isinstance(value, tuple):
        for part in value:
            _of_any_width(part)
