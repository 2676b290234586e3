"""How draft logits become drafted tokens, from what q they were drawn, and copies beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ttspec.decoding.penalties import RowPenalties
from ttspec.decoding.rows import Processors, RoundInputs
from ttspec.drafters.base import Drafter
from ttspec.records import Proposal
from ttspec.sampling import SamplingTensors, draft, pick


@dataclass(frozen=True, slots=True)
class DraftSampler:
    """What a drafter calls to turn logits into tokens of the target's vocabulary."""

    sampling: SamplingTensors
    drafter: Drafter
    rows: RoundInputs
    vocabulary: int
    """Of the target."""
    noise: Tensor | None
    """The target's own noise where sampling is drafter-invariant, [B, G or more, V_draft], or of V
    tokens where drafts are penalised: with the same noise both agree more often. None where drafts
    are greedy or have noise of their own."""
    penalties: RowPenalties | None = None
    """The target's own, which make drafts likelier to be kept. They know the pending token."""
    processors: Processors = field(default_factory=Processors)
    longest: int = 0
    """The largest start of a row, known on the host."""
    ready: Callable[[], None] = lambda: None
    """Called before the noise is looked at for the first time."""

    def __call__(self, logits: Tensor, first: int) -> tuple[Tensor, Tensor | None]:
        """Choose some drafts of every row.

        Args:
            logits: [B, g, V_draft] of the drafter.
            first: Place of the first of them in the proposal.

        Returns:
            Tokens int64 [B, g], and q float32 [B, g, V_draft] that they were drawn from, or [B, g,
            V] where drafts are penalised; None is one-hot.
        """
        if first == 0:
            self.ready()
        if self.penalties is None:
            return self._choose(logits, first, self.drafter.draft_ids)
        # One after the other, though drafted at once: each is penalised for those before it.
        chosen = []
        for column, one in enumerate(self.drafter.widen(logits.float()).split(1, dim=1), first):
            at = self.rows.start + 1 + column
            penalised = self.penalties(one, at, self.longest + 1 + column, self.processors)
            chosen.append(self._choose(penalised, column, None))
            self.penalties.write(chosen[-1][0], at)
        tokens, q = zip(*chosen, strict=True)
        return torch.cat(tokens, 1), None if q[0] is None else torch.cat(q, 1)

    def _choose(
        self, logits: Tensor, first: int, ids: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The same without penalties; `ids` int64 [V_draft] are the tokens of the logits."""
        width, q = logits.shape[1], None
        if self.sampling.temperature is None:
            tokens = pick(logits, None, self.sampling)
        elif self.noise is not None:
            tokens = pick(logits, self.noise[:, first : first + width], self.sampling)
        else:
            column = torch.arange(first, first + width, device=logits.device)
            key, which = self.rows.noise_key, self.vocabulary if ids is None else ids
            tokens, q = draft(logits, self.sampling, key, self.rows.number, column, which)
        return (tokens if ids is None else ids[tokens]), q

    def over_all(self, drafts: Proposal) -> Proposal:
        """A proposal of tokens chosen here, with its q [B, G, V] of all of the target's tokens."""
        if drafts.q is None or self.penalties is not None:
            return drafts
        return replace(drafts, q=self.drafter.widen(drafts.q, 0.0))


def with_copies(drafts: Proposal, rows: RoundInputs, length: int, most: Tensor) -> Proposal:
    """Copies instead of drafts, in the rows that copy.

    Args:
        drafts: Of every row; none where the drafter was not run.
        rows: Has the copies.
        length: Width of the copies, at least 1.
        most: int64 [B], tokens that a row may propose.

    Returns:
        A proposal as wide as the wider of both. A copy is one-hot: it was drawn from a point mass.
    """
    copied, width = rows.copied > 0, max(length, drafts.tokens.shape[1])
    drafted = F.pad(drafts.tokens, (0, width - drafts.tokens.shape[1]))
    copies = F.pad(rows.copies[:, :length], (0, width - length))
    # In order in memory, as drafts are: or what verifies them would be compiled for both.
    tokens, q = torch.where(copied[:, None], copies, drafted).contiguous(), drafts.q
    if q is not None:
        q = F.pad(q, (0, 0, 0, width - q.shape[1])).masked_fill(copied[:, None, None], 0.0)
        q.scatter_add_(-1, tokens[..., None], copied[:, None, None].expand(-1, width, 1).to(q))
    count = torch.where(copied, rows.copied.minimum(most), drafts.count)
    return Proposal(tokens=tokens, count=count, q=q, before=drafts.before, copied=copied)
