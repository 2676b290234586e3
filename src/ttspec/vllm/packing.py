"""A drafter's matrices on a CPU, where vLLM multiplies by packed copies of them.

vLLM packs each matrix once, drops it, and gives the layer a function that holds the packed copy.
Here the matrix stays, and is packed again whenever it was written. Compiled code has taken what the
function holds as its own, so that is exchanged, and the function stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ttspec.errors import TtspecError
from ttspec.vllm.module import TABLES


def keep_matrices(proposer: Any) -> None:
    """Let a drafter's matrices stay beside their packed copies; before the models are loaded."""
    from vllm.model_executor.layers import utils  # type: ignore[import-not-found]

    load_model, pack = proposer.load_model, utils.dispatch_cpu_unquantized_gemm

    def pack_and_keep(layer: nn.Module, remove_weight: bool) -> None:  # noqa: ARG001
        pack(layer, remove_weight=False)

    def load_and_keep(*args: Any, **kwargs: Any) -> None:
        utils.dispatch_cpu_unquantized_gemm = pack_and_keep
        try:
            load_model(*args, **kwargs)
        finally:
            utils.dispatch_cpu_unquantized_gemm = pack

    proposer.load_model = load_and_keep


class Packing:
    """The packed copies of a draft module's matrices; none but on a CPU."""

    def __init__(self, module: nn.Module) -> None:
        """Find the layers that have one, but for tables, which never change.

        Raises:
            TtspecError: A copy is held in a way that is not known, so it could not be exchanged.
        """
        self._layers: list[Any] = [
            layer
            for name, layer in module.named_modules()
            if held_by(getattr(layer, "cpu_linear", None)) and not any(t in name for t in TABLES)
        ]
        for held in (held for layer in self._layers for held in held_by(layer.cpu_linear)):
            if not is_known(held):
                raise TtspecError(f"this vLLM packs matrices in a {type(held).__name__}")

    def renew(self) -> None:
        """Pack all again, since they were written."""
        if not self._layers:
            return
        from vllm.model_executor.layers import utils  # type: ignore[import-not-found]

        for layer in self._layers:
            multiply = layer.cpu_linear
            utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
            for old, new in zip(held_by(multiply), held_by(layer.cpu_linear), strict=True):
                exchange(old, new)
            layer.cpu_linear = multiply


def held_by(multiply: Callable[..., Any] | None) -> list[Any]:
    """What a layer's function has taken from where it was made: packed copies among it."""
    return [cell.cell_contents for cell in getattr(multiply, "__closure__", None) or ()]


def is_known(held: Any) -> bool:
    """Whether `exchange` knows what to do with it."""
    return hasattr(held, "handler_tensor") or isinstance(held, Tensor | int | None)


def exchange(old: Any, new: Any) -> None:
    """Let `old` be the copy that `new` is: a tensor, or oneDNN's, known by its address."""
    if isinstance(old, Tensor):
        old.copy_(new)
    elif hasattr(old, "handler_tensor"):
        # Each frees at its end the copy whose address it has then.
        address = int(old.handler_tensor)
        old.handler_tensor.copy_(new.handler_tensor)
        new.handler_tensor.fill_(address)
