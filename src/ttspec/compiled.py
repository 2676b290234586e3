"""Functions that torch compiles for a GPU: many small operations become few kernels.

Compiling takes seconds, so only what is captured and run many times is compiled, and one piece of
code serves all layers of a model. Results differ from the uncompiled ones by rounding only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from typing import Any, TypeVar, cast
from unittest.mock import patch

import torch

F = TypeVar("F", bound=Callable[..., Any])
SHAPES = 64
"""Shapes that one function may be compiled for: row counts, draft lengths, kinds of layers."""
_on = False


@contextmanager
def compiling() -> Iterator[None]:
    """Within, functions marked with `compiled` run as compiled code."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # only for those who compile

    global _on
    before, _on = _on, True
    try:
        # A layer knows its number; without the second setting each would be compiled for itself.
        settings = torch._dynamo.config.patch(
            recompile_limit=SHAPES, allow_unspec_int_on_nn_module=True
        )
        # Caches on disk keep the conditions of an entry as one line, joined by "and": one with an
        # "or" in it would part that line (findings/torch_compile_cache_shapes.sh).
        whole = patch.object(ShapeEnv, "produce_guards", _in_parentheses(ShapeEnv.produce_guards))
        with settings, whole, warnings.catch_warnings():
            # Where few rows are reduced over a vocabulary; nothing that a user could change.
            warnings.filterwarnings("ignore", r"\s*Online softmax is disabled", UserWarning)
            # transformers' experts ask so which torch this is.
            cached = r"Dynamo detected a call to a `functools\.lru_cache`"
            warnings.filterwarnings("ignore", cached, UserWarning)
            yield
    finally:
        _on = before


def is_compiling() -> bool:
    """Whether `compiled` functions run as compiled code now.

    Not where gradients are recorded: to compile their way back takes half a minute and gains a
    fifth (docs/experiments.md).
    """
    return _on and not torch.is_grad_enabled()


def compiles_without_gradients() -> bool:
    """Whether they do so where no gradient is recorded, as inside of what makes its own."""
    return _on


def of_any_size(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """The tensor, of which compiled code shall not mind how long it is in `dim`."""
    if _on:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return tensor


def compiled(function: F) -> F:
    """Mark a function of tensors to be compiled, one time per shape, where `compiling` says so."""
    return _marked(function, any_size=False, dims={})


def compiled_once(function: F) -> F:
    """The same, but for all shapes at once, numbers too: of few operations.

    What has many takes the compiler four times as long if nothing about a shape is known, and code
    of 0, 1 and more elements, and of two sizes that are the same, is still apart.
    """
    return _marked(function, any_size=True, dims={})


def compiled_for_any(**dims: int) -> Callable[[F], F]:
    """The same as `compiled`, but one code serves all sizes of a dimension; that of 1 has its own.

    Args:
        **dims: Of which argument, a tensor or None, which dimension.
    """
    return lambda function: _marked(function, any_size=False, dims=dims)


def _marked(function: F, *, any_size: bool, dims: dict[str, int]) -> F:
    fast: Any = None
    names = list(signature(function).parameters)
    places = [(names.index(name), name, dim) for name, dim in dims.items()]

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal fast
        if not is_compiling():
            return function(*args, **kwargs)
        if fast is None:  # the compiler takes a second to load
            fast = torch.compile(function, dynamic=any_size)
        for place, name, dim in places:
            given = args[place] if place < len(args) else kwargs.get(name)
            if given is not None:
                of_any_size(given, dim)
        return fast(*args, **kwargs)

    return cast(F, run)


def _in_parentheses(conditions: Callable[..., list[str]]) -> Callable[..., list[str]]:
    return lambda *args, **kwargs: [f"({one})" for one in conditions(*args, **kwargs)]
