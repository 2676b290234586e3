"""The decoder layers of a transformers model as compiled code: one compilation for all of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from inspect import unwrap
from typing import Any

from torch import Tensor, nn

from ttspec.compiled import compiled
from ttspec.rowcache import LayerCache, RowCache


@contextmanager
def compiled_layers(model: nn.Module, cache: RowCache, word: str) -> Iterator[None]:
    """Within, the model's decoder layers run as compiled code; nothing of the model is changed.

    Args:
        model: Has its decoder layers in `layers`.
        cache: Holds keys and values of every layer already; all rows and slots are aimed at.
        word: What a layer's forward calls its cache.
    """
    layers = list(model.layers)  # type: ignore[arg-type]
    # transformers hooks attention to record it, which cannot be compiled; a graph runs no hook.
    inner = [m for layer in layers for m in layer.modules() if m is not layer]
    hooks = [(m, m._forward_hooks) for m in inner if m._forward_hooks]
    for module, _ in hooks:
        module._forward_hooks = OrderedDict()
    for index, layer in enumerate(layers):
        layer.forward = partial(_forward, layer, word, cache.layer(index))
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
        for module, own in hooks:
            module._forward_hooks = own


def _forward(layer: nn.Module, word: str, own: LayerCache, hidden: Tensor, /, **given: Any) -> Any:
    return _layer(layer, hidden, {**given, word: own})


@compiled
def _layer(layer: nn.Module, hidden: Tensor, given: dict[str, Any]) -> Any:
    return unwrap(type(layer).forward)(layer, hidden, **given)
