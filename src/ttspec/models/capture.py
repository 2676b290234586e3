"""A forward of fixed shapes, captured once as a CUDA graph and replayed.

Launching the kernels of one decoding step from Python takes longer than running them. A capture
belongs to one cache: it holds its addresses.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ttspec.rowcache import RowCache

Forward = Callable[[RowCache, Tensor, Tensor, int], tuple[Tensor | None, Tensor]]


class Captured:
    """One graph per (rows, tokens, reach), made when the shape is first seen."""

    def __init__(self, cache: RowCache, forward: Forward) -> None:
        """Capture calls of `forward` on `cache`."""
        self.cache = cache
        self._forward = forward
        self._graphs: dict[tuple[int, int, int], tuple] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, tokens: Tensor, start: Tensor, reach: int) -> tuple[Tensor, Tensor]:
        """As the forward; the results are overwritten by the next call of the same shape."""
        key = (tokens.shape[0], tokens.shape[1], reach)
        if key not in self._graphs:
            self._graphs[key] = self._capture(tokens.clone(), start.clone(), reach)
        graph, own_tokens, own_start, logits, features = self._graphs[key]
        own_tokens.copy_(tokens)
        own_start.copy_(start)
        graph.replay()
        return logits, features

    def _capture(self, tokens: Tensor, start: Tensor, reach: int) -> tuple:
        # Warm-up on a side stream, as CUDA graphs ask for; it writes only what the replay rewrites.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._forward(self.cache, tokens, start, reach)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits, features = self._forward(self.cache, tokens, start, reach)
        return graph, tokens, start, logits, features
