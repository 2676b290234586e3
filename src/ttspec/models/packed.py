"""Linear modules whose weights lie on a CPU as oneDNN's products read them.

torch lays a weight out anew in every product in bfloat16, and leaves float32 to MKL, which is slow
on CPUs of others than Intel. Packed once, a product is the faster one, of any number of tokens
(docs/experiments.md; `torch.utils.mkldnn`, which is public, gains nothing in bfloat16 and half as
much in float32). torch's own compiler packs weights by the same operators, which are private:
where they are missing or do something else, weights stay as they are.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

TOKENS = 16
"""Of the products for which the layout is chosen; it serves others nearly as well."""
DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Module):
    """Does what a linear module did whose weight it has taken over, without gradients."""

    def __init__(self, linear: nn.Linear | PackedLinear, *, keeps_weight: bool = False) -> None:
        """Pack a module's weight; `keeps_weight` has others read it as it was, too."""
        super().__init__()
        packed = _pack(linear.weight.detach())
        self.weight = linear.weight if keeps_weight else nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias
        self.register_buffer("packed", packed if keeps_weight else None, persistent=False)
        if keeps_weight:
            self.weight.packed = packed  # type: ignore[attr-defined]

    def forward(self, states: Tensor) -> Tensor:
        """X [..., in] to [..., out]."""
        packed = self.weight if self.packed is None else self.packed
        return _product(states, cast(Tensor, packed), self.bias)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = unpacked(destination[f"{prefix}weight"])


def head_product(states: Tensor, head: Tensor) -> Tensor:
    """Scores [..., V] of states [..., H], by the packed head where no gradient is asked for."""
    packed = getattr(head, "packed", None)
    if packed is None or states.requires_grad:
        return F.linear(states, head)
    return _product(states, packed, None)


def pack_linears(model: PreTrainedModel) -> None:
    """Pack the weights of a model's linear modules, where that can be done.

    Each takes the place of what it was made of. Of the output head both stay: drafters read it.
    """
    head = model.get_output_embeddings()
    # Whoever keeps no list of linear modules lets each weight go once it is packed.
    for parent in [m for m in model.modules() if type(m) is not nn.Linear]:
        own = {n: m for n, m in parent.named_children() if type(m) is nn.Linear}
        for name in [n for n, m in own.items() if is_packable(m.weight)]:
            linear = own.pop(name)
            setattr(parent, name, PackedLinear(linear, keeps_weight=linear is head))
            del linear
            _give_back_memory()


def _give_back_memory() -> None:
    """Let glibc return what was freed: holes between weights, into which no packed one fits."""
    with suppress(AttributeError, OSError, TypeError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


def is_packable(weight: Tensor) -> bool:
    """Whether a weight is one that oneDNN packs here."""
    return type(weight) is nn.Parameter and weight.is_cpu and can_pack(weight.dtype)


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether torch packs weights of a dtype on this CPU, and multiplies by them."""
    if dtype not in DTYPES or torch.cpu.get_capabilities().get("architecture") != "x86_64":
        return False  # elsewhere oneDNN calls other libraries, and was not tried
    weight = torch.linspace(-1, 1, 48 * 32).view(48, 32).to(dtype)
    states = torch.linspace(-1, 1, 3 * 32).view(3, 32).to(dtype)
    try:
        packed = _pack(weight)
        found = _product(states, packed, None)
        same = torch.equal(unpacked(packed), weight)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return same and torch.allclose(found, F.linear(states, weight), rtol=2e-2, atol=1e-3)


def unpacked(weight: Tensor) -> Tensor:
    """The weight as it was before it was packed, if it was."""
    return weight.to_dense() if weight.is_mkldnn else weight


def _pack(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, TOKENS)


def _product(states: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(states, packed, bias, "none", [], "")
