"""Products of up to 32 tokens and a table, one Triton kernel each, with norms and sums (Hopper)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttspec.fused import PROCESSORS, launch

MOST = 32
"""Tokens of all rows; more were not tried."""
FEW = 8
"""Tokens up to which K is split among the warps of a program."""
WIDE = 2048
"""Inputs and outputs from which on a table is wide."""
RANK = 16
"""Rank of a change, at most."""
NARROWED = 256
"""Elements of K that are multiplied with a change's `down` at a time; programs are 8 at most."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """States that are yet to be divided by their root mean square, as an RMSNorm does."""

    values: Tensor
    """[tokens, width], times the norm's gain."""
    squares: Tensor
    """float32 [pieces, tokens or more], which add up to the squares of the states."""


class Change(NamedTuple):
    """A low-rank change of a table [outputs, width]: `up` times `down` is added to it."""

    down: Tensor
    """[rank, width], contiguous."""
    up: Tensor
    """[outputs, rank], contiguous."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a product is cut."""

    rows: int
    """Of the table, for each program."""
    share: int
    """Elements of K that a warp, or all of them, takes at a time."""
    splits: int = 1
    """Parts of K in a program, each for a warp of its own."""
    parts: int = 1
    """Parts of K, each for a program of its own."""
    stages: int = 1
    """Shares that are on their way at once."""
    warps: int = 4
    ahead: int = 4096
    """Elements of K, at most, that are fetched into the second-level cache before the wait."""
    held: int = 1
    """Programs that a processor has room for; counted for wide tables only."""


def _wide(rows: int, share: int, held: int, **more: int) -> Tiles:
    return Tiles(rows, share, held=held, ahead=256, **more)


_TALL = _wide(16, 128, 3, splits=4, stages=4)
_DEEP = _wide(64, 128, 2, stages=4)
_WIDE_FEW = {
    False: (
        _wide(16, 128, 2, splits=4, stages=5),
        *(_wide(32, 256, 5, parts=parts, stages=3, warps=2) for parts in (1, 2)),
        _TALL,
    ),
    True: (_wide(64, 256, 3, stages=3), _wide(32, 256, 5, stages=3, warps=2), _TALL),
}
"""Tiles for up to `FEW` tokens, by `gated`; the last are for any size."""
_PARTED = [
    replace(tiles, parts=parts)
    for tiles in (_wide(64, 256, 1, stages=3), _DEEP, _wide(64, 128, 3, stages=3))
    for parts in (1, 2, 3, 4)
]
_WIDE_MORE = {False: (*_PARTED, _DEEP), True: (*_PARTED[::4], _DEEP)}
"""The same for more tokens."""


class Products:
    """Products one after another, on one stream."""

    def __init__(self, eps: float, device: torch.device) -> None:
        """`eps`: of all norms."""
        self.eps = eps
        # How many parts of each block's sums are there; whoever is last sets it back to 0.
        self.ended = torch.zeros(1024, dtype=torch.int32, device=device)

    def scaled(self, x: Tensor, gain: Tensor) -> Scaled:
        """States [tokens, width], times a norm's gain [width]."""
        count, width = x.shape
        out = Scaled(torch.empty_like(x), _squares(x, 1))
        _kernels().scaled[(count,)](
            x,
            gain,
            out.values,
            out.squares,
            width=width,
            full=1 << (width - 1).bit_length(),
            num_warps=4,
            **launch(x),
        )
        return out

    def plain(
        self,
        x: Tensor | Scaled,
        *tables: Tensor,
        bias: Tensor | None = None,
        change: Change | None = None,
    ) -> Tensor:
        """States times a table, or up to three side by side.

        Args:
            x: [tokens, width]; normalised if scaled.
            tables: Each [outputs, width], contiguous; of several, outputs are whole blocks of 64.
            bias: [outputs of all].
            change: Of the first table.

        Returns:
            [tokens, outputs of all].
        """
        return self._run(x, *tables, bias=bias, changes=[change] if change else [])[0]

    def gated(
        self, x: Scaled, gate: Tensor, up: Tensor, *, changes: Sequence[Change] = ()
    ) -> Tensor:
        """The SiLU of normalised states times `gate`, times that of `up`.

        Args:
            x: [tokens, width].
            gate: [outputs, width], contiguous.
            up: As gate.
            changes: Of gate and up, of one rank; or none.

        Returns:
            [tokens, outputs].
        """
        return self._run(x, gate, up, gated=True, changes=changes)[0]

    def added(
        self,
        x: Tensor,
        table: Tensor,
        residual: Tensor,
        gain: Tensor,
        bias: Tensor | None = None,
        change: Change | None = None,
    ) -> tuple[Tensor, Scaled]:
        """States [tokens, width] times a table [outputs, width], a bias and a residual.

        Args:
            x: As it is, not to be normalised.
            table: Contiguous.
            residual: [tokens, outputs]; its rows may lie apart.
            gain: [outputs] of the norm that comes next.
            bias: [outputs].
            change: Of the table.

        Returns:
            The sum [tokens, outputs], and the same scaled.
        """
        changes = [change] if change else []
        return self._run(x, table, bias=bias, residual=residual, gain=gain, changes=changes)

    def _run(
        self,
        x: Tensor | Scaled,
        *tables: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        gain: Tensor | None = None,
        gated: bool = False,
        changes: Sequence[Change] = (),
    ) -> tuple[Tensor, Scaled]:
        states, squares = (x.values, x.squares) if isinstance(x, Scaled) else (x, None)
        count, width = states.shape
        ends = [0]
        for table in tables:
            ends.append(ends[-1] + len(table))
        outputs = ends[1] if gated else ends[-1]
        tiles = tiles_of(width, ends[-1], count, gated=gated)
        blocks, wide = -(-ends[-1] // tiles.rows), _padded(count)
        out = states.new_empty(count, outputs)
        then = out if residual is None else torch.empty_like(out)
        pieces = out if residual is None else _squares(states, blocks)
        scratch = out
        if tiles.parts > 1:
            size = blocks, tiles.parts, tiles.rows, wide
            scratch = states.new_empty(size, dtype=torch.float32)
        inner = _narrowed(states, changes) if changes else scratch
        _kernels().product[(blocks, tiles.parts)](
            states,
            tables[0],
            tables[min(1, len(tables) - 1)],
            tables[-1],
            states if bias is None else bias,
            states if squares is None else squares,
            states if residual is None else residual,
            states if gain is None else gain,
            out,
            then,
            pieces,
            scratch,
            self.ended,
            inner,
            changes[0].up if changes else states,
            changes[-1].up if changes else states,
            self.eps,
            changes[0].up.shape[1] if changes else 0,
            count,
            outputs,
            ends[1],
            ends[min(2, len(tables))],
            0 if residual is None else residual.stride(0),
            0 if squares is None else len(squares),
            tables=1 if gated else len(tables),
            width=width,
            normed=squares is not None,
            gated=gated,
            biased=bias is not None,
            added=residual is not None,
            changes=len(changes),
            ranks=inner.shape[1] if changes else 0,
            inner_parts=len(inner) if changes else 0,
            most_pieces=64 if squares is None else max(64, 1 << (len(squares) - 1).bit_length()),
            wide=wide,
            rows=tiles.rows,
            splits=tiles.splits,
            share=tiles.share,
            parts=tiles.parts,
            stages=tiles.stages,
            ahead=tiles.ahead,
            num_warps=tiles.warps,
            **launch(states),
        )
        return out, Scaled(then, pieces)


def _narrowed(states: Tensor, changes: Sequence[Change]) -> Tensor:
    """Parts [parts, ranks, tokens or more] of states [tokens, width] times `down` of each change.

    Each has as many of the ranks, 16 or more in all, which matrix units need.
    """
    (count, width), (rank, _) = states.shape, changes[0].down.shape
    rows = len(changes) * max(16 // len(changes), 1 << (rank - 1).bit_length())
    steps = -(-width // (NARROWED * 8))
    parts = -(-width // (NARROWED * steps))
    out = states.new_empty(parts, rows, _padded(count), dtype=torch.float32)
    _kernels().narrowed[(parts,)](
        states,
        changes[0].down,
        changes[-1].down,
        out,
        count,
        rank,
        tables=len(changes),
        width=width,
        wide=out.shape[2],
        rows=rows,
        share=NARROWED,
        steps=steps,
        num_warps=4,
        **launch(states),
    )
    return out


def tiles_of(width: int, rows: int, tokens: int, *, gated: bool) -> Tiles:
    """How to cut a product of states [tokens, width] and a table [rows, width]."""
    if min(width, rows) >= WIDE:
        return _tiles_of_wide(rows, tokens, gated=gated)
    if gated:  # all programs at once
        if 2 * rows < 64 * PROCESSORS and tokens <= FEW:
            return Tiles(32, 64, stages=6)
        high = rows > 64 * PROCESSORS
        return Tiles(128, 64, stages=6, warps=8) if high else Tiles(64, 64, stages=6)
    if width > 2048:  # all weights of a program are on their way before it waits
        return Tiles(64, 512, parts=-(-width // 512))
    if width > 1024:
        return Tiles(16, 128, splits=4, stages=3)
    if tokens <= FEW:
        return Tiles(16, 64, splits=4, stages=4)
    return Tiles(16, 128, stages=min(7, -(-width // 128)))


def is_wide(table: Tensor) -> bool:
    """Whether reading a table [outputs, inputs] takes longer than waiting for what it reads."""
    return min(table.shape) >= WIDE


def _tiles_of_wide(rows: int, tokens: int, *, gated: bool) -> Tiles:
    """Tiles whose programs fill the device once, else at most half of it, else those for any size.

    Half of it, since the next product's programs then all find room beside them. In between some
    processors get more of them than others, and the rest waits for those.
    """
    tried = (_WIDE_FEW if tokens <= FEW else _WIDE_MORE)[gated]
    filled = [-(-rows // tiles.rows) * tiles.parts / (PROCESSORS * tiles.held) for tiles in tried]
    for least, most in ((0.83, 1.0), (0.0, 0.5)):
        fitting = [share for share in filled if least <= share <= most]
        if fitting:
            return tried[filled.index(max(fitting))]
    return tried[-1]


def _padded(count: int) -> int:
    return max(8, 1 << (count - 1).bit_length())


def _squares(x: Tensor, pieces: int) -> Tensor:
    return x.new_empty(pieces, _padded(len(x)), dtype=torch.float32)


@cache
def _kernels() -> Any:
    from ttspec import product_kernels  # Triton is there only where torch can use a GPU

    return product_kernels
