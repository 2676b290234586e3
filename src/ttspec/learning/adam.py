"""Adam's step of all copies of the weights that learn, decided on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EPSILON = 1e-8
BLOCK, WARPS = 1024, 4
"""Weights of one program of the kernel, and its warps."""


class Adam:
    """As torch does it, one parameter per copy: off a GPU."""

    def __init__(
        self,
        master: Tensor,
        gradient: Tensor,
        rate: float | Tensor,
        betas: tuple[float, float],
        *,
        mean: Tensor | None = None,
    ) -> None:
        """Of float32 tables [copies, size]; `rate` may be a tensor that changes."""
        self._master, self._mean = master, mean
        self._optimisers = list[torch.optim.Adam]()
        for weights, slope in zip(master, gradient, strict=True):
            weights.grad = slope
            self._optimisers.append(torch.optim.Adam([weights], rate, betas, EPSILON, fused=True))
        self.nbytes = 2 * master.nbytes
        """Of its moments."""

    def step(self, steps: Tensor, scale: Tensor, count: Tensor, weight: Tensor) -> None:  # noqa: ARG002
        """As `FusedAdam.step`; torch counts the steps itself."""
        skipped, divisors = (~steps).float().unbind(), (1 / scale).expand(len(steps)).unbind()
        for optimiser, skip, divisor in zip(self._optimisers, skipped, divisors, strict=True):
            # As a gradient scaler does: fused Adam divides, and skips.
            optimiser.found_inf, optimiser.grad_scale = skip, divisor  # type: ignore[attr-defined]
            optimiser.step()
        if self._mean is not None:
            self._mean.lerp_(self._master, (weight * steps)[:, None])

    def reset(self, copy: int) -> None:
        """Forget a copy's moments."""
        for state in self._optimisers[copy].state.values():
            for moment in state.values():
                moment.zero_()


class FusedAdam:
    """One pass over all that a step reads and writes, in one kernel for all copies.

    torch's own would write the scaled gradients too, and a first moment that nothing remembers;
    the mean of the weights and what drafts would be passes of their own.
    """

    def __init__(
        self,
        master: Tensor,
        gradient: Tensor,
        rate: float | Tensor,
        betas: tuple[float, float],
        *,
        mean: Tensor | None = None,
        published: Tensor | None = None,
    ) -> None:
        """Of tables [copies, size], float32 but for gradients and what is published at once."""
        from ttspec.learning import step_kernels

        self._kernel: Any = step_kernels.adam
        self._betas, self._rate, self._published = betas, rate, published
        self._master, self._gradient, self._mean = master, gradient, mean
        self._first = torch.zeros_like(master) if betas[0] else None
        self._second = torch.zeros_like(master)
        self.nbytes = self._second.nbytes * (2 if betas[0] else 1)
        """Of its moments."""

    def step(self, steps: Tensor, scale: Tensor, count: Tensor, weight: Tensor) -> None:
        """Move some copies.

        Args:
            steps: bool [copies], which.
            scale: float32 [copies] or [1], of their gradients.
            count: float32 [copies], their steps, with this one.
            weight: float32 [copies], that of the new weights in the mean.
        """
        first, second = (1 - beta ** count.double() for beta in self._betas)
        numbers = [steps, scale, self._rate / first, second.rsqrt(), weight]
        master, size = self._master, self._master.shape[1]
        with torch.cuda.device_of(master):  # Triton launches on the current one
            self._kernel[(-(-size // BLOCK), len(master))](
                self._gradient,
                master,
                master if self._first is None else self._first,
                self._second,
                master if self._mean is None else self._mean,
                master if self._published is None else self._published,
                torch.stack([x.float().expand_as(steps) for x in numbers], 1),
                size,
                *self._betas,
                EPSILON,
                has_first=self._first is not None,
                has_mean=self._mean is not None,
                publishes=self._published is not None,
                block=BLOCK,
                num_warps=WARPS,
            )

    def reset(self, copy: int) -> None:
        """Forget a copy's moments."""
        for moment in (self._second, self._first):
            if moment is not None:
                moment[copy] = 0
