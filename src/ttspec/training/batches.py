"""Training examples and batches: which blocks of which answers a step teaches.

A step's batch is a function of the seed and the step, so that a resumed run goes on as if it had
never stopped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ttspec.errors import TrainingError


@dataclass(frozen=True, slots=True)
class Batch:
    """N dialogues."""

    ids: Tensor
    """int64 [N, L], padded on the right."""
    is_answer: Tensor
    """bool [N, L], on the CPU: which tokens are the target's answers."""
    generator: torch.Generator
    """For what else is drawn at random; on the CPU."""
    chosen: list[int]
    """Which of the examples these are."""


@dataclass(frozen=True, slots=True)
class Anchors:
    """A blocks of each dialogue."""

    start: Tensor
    """int64 [N, A]: position of each block's known token."""
    tokens: Tensor
    """int64 [N, A]: that token."""
    labels: Tensor
    """int64 [N, A, G]: the tokens after it."""
    mask: Tensor
    """bool [N, A, G]: which of them belong to the same answer."""

    @property
    def text(self) -> Tensor:
        """int64 [N, A, G+1]: the known token and those after it."""
        return torch.cat([self.tokens[..., None], self.labels], dim=-1)


@dataclass(frozen=True, slots=True)
class MaskedRows:
    """A dialogue's tokens, and behind them masks that stand for tokens after an anchor."""

    ids: Tensor
    """int64 [N, R]: the dialogue's token at each row's position."""
    position: Tensor
    """int64 [N, R]."""
    depth: Tensor
    """int64 [N, R]: 0 for a token, d for the d-th mask after an anchor."""
    seen: Tensor
    """bool [N, R, R]: what each row attends to."""
    has_label: Tensor
    """bool [N, R]: rows whose next token is learned."""


class Example(NamedTuple):
    """A dialogue that was answered."""

    ids: list[int]
    answers: list[tuple[int, int]]
    """Where they are: [start, end), end tokens included."""


def read_examples(answers: list[Path], max_length: int) -> list[Example]:
    """Examples from files of `write_answers`, cut to `max_length` tokens, in order of dialogues.

    Raises:
        TrainingError: None of them can be learned from.
    """
    lines = [line for path in answers for line in path.read_text(encoding="utf-8").split("\n")]
    records = sorted((json.loads(line) for line in lines if line), key=lambda r: r["n"])
    examples: list[Example] = []
    for record in records:
        spans = [(b, min(e, max_length)) for b, e in record["spans"] if b < max_length - 1]
        if any(e - b > 1 for b, e in spans):
            examples.append(Example(record["ids"][:max_length], spans))
    if not examples:
        raise TrainingError("No answer has two tokens or more.\nGive other prompts.")
    return examples


@dataclass(frozen=True, slots=True)
class Batches:
    """The batches of a run: `size` dialogues each, in an order of `seed`."""

    examples: list[Example]
    size: int
    seed: int
    device: torch.device

    @property
    def per_epoch(self) -> int:
        """Batches in which every example is once."""
        return -(-len(self.examples) // self.size)

    def chosen(self, step: int) -> list[int]:
        """Which examples the batch of a step has; steps are counted over all epochs."""
        epoch, place = divmod(step, self.per_epoch)
        order = torch.randperm(len(self.examples), generator=_generator(self.seed, epoch)).tolist()
        # Dialogues of like length together, in groups, so that little is padding.
        group = self.size * 16
        at = place * self.size
        near = sorted(order[at - at % group :][:group], key=lambda i: len(self.examples[i].ids))
        return near[at % group :][: self.size] or near[-self.size :]

    def at(self, step: int) -> Batch:
        """The batch of a step."""
        chosen = self.chosen(step)
        length = -(-max(len(self.examples[i].ids) for i in chosen) // 64) * 64
        ids = torch.zeros(len(chosen), length, dtype=torch.long)
        is_answer = torch.zeros_like(ids, dtype=torch.bool)
        for row, i in enumerate(chosen):
            example = self.examples[i]
            ids[row, : len(example.ids)] = torch.tensor(example.ids)
            for begin, end in example.answers:
                is_answer[row, begin:end] = True
        draws = _generator(self.seed, *divmod(step, self.per_epoch))
        return Batch(to_device(ids, self.device), is_answer, draws, chosen)


def anchors(batch: Batch, blocks: int, length: int) -> Anchors:
    """Blocks of 1 + `length` tokens at random places.

    Their known tokens are uniform among those whose next token is in the same answer (drafters.md
    2d).
    """
    is_answer = F.pad(batch.is_answer, (0, length + 1))
    possible = (is_answer[:, :-1] & is_answer[:, 1:]).float()
    start = torch.multinomial(possible, blocks, replacement=True, generator=batch.generator)
    at = start[..., None] + torch.arange(1, length + 1)
    row = torch.arange(len(is_answer))[:, None, None]
    mask = is_answer[row, at].long().cumprod(-1).bool()
    ids = F.pad(batch.ids, (0, length + 1))
    start, at, row, mask = (to_device(x, ids.device) for x in (start, at, row, mask))
    return Anchors(start=start, tokens=ids.gather(1, start), labels=ids[row, at], mask=mask)


def masked_rows(batch: Batch, depth: int, keep: float, least: float) -> MaskedRows:
    """All tokens, and masks by conditional drop (drafters.md 3d).

    Mask d after an anchor is kept for a share max(keep^d, least) of the anchors, and only where
    mask d - 1 is, so that every chain is whole. It sees the tokens up to its anchor and the masks
    between. An anchor is a token of an answer whose next token is in the same answer. `depth` rows
    predict after an anchor, its own included; 1 is no masks.
    """
    device = batch.ids.device
    is_answer = F.pad(batch.is_answer, (0, depth + 1))
    n, count = batch.ids.shape
    parts = []
    for row in range(n):
        possible = (is_answer[row, :-1] & is_answer[row, 1:]).nonzero()[:, 0]
        mixed = possible[torch.randperm(len(possible), generator=batch.generator)]
        chain = []
        for d in range(1, depth):
            anchor = mixed[: int(len(mixed) * max(keep**d, least))]
            whole = is_answer[row, anchor[:, None] + torch.arange(d + 2)].all(-1)
            chain.append((anchor[whole], d))
        anchor = torch.cat([a for a, _ in chain]) if chain else possible[:0]
        deep = [torch.full_like(a, d) for a, d in chain]
        parts.append((anchor, torch.cat(deep) if deep else anchor))
    width = -(-max(len(a) for a, _ in parts) // 64) * 64
    # What pads the masks has an anchor of its own, before everything: it sees itself alone.
    anchor = torch.arange(-1, -1 - width, -1).repeat(n, 1)
    deep = torch.ones_like(anchor)
    for row, (a, d) in enumerate(parts):
        anchor[row, : len(a)], deep[row, : len(a)] = a, d
    index = torch.arange(count).expand(n, -1)
    anchor = to_device(torch.cat([index, anchor], dim=1), device)
    deep = to_device(torch.cat([torch.zeros_like(index), deep], dim=1), device)
    position = (anchor + deep).clamp(min=0)
    real = deep == 0
    seen = real[:, None] & (position[:, None] <= anchor[..., None])
    own = (anchor[:, None] == anchor[..., None]) & (deep[:, None] <= deep[..., None])
    first = batch.is_answer & F.pad(batch.is_answer, (0, 1))[:, 1:]
    has_label = torch.cat([to_device(first, device), anchor[:, count:] >= 0], dim=1)
    return MaskedRows(
        ids=batch.ids.gather(1, position.clamp(max=count - 1)),
        position=position,
        depth=deep,
        seen=seen | (own & ~real[:, None]),
        has_label=has_label,
    )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; from pinned memory a copy does not hold up the host."""
    pinned = tensor.pin_memory() if device.type == "cuda" and not tensor.is_cuda else tensor
    return pinned.to(device, non_blocking=True)


def _generator(*seeds: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(seeds) & 0x7FFFFFFF)
