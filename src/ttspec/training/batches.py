"""Training examples and batches: which blocks of which answers a step teaches.

A step's batch is a function of the seed and the step, so that a resumed run goes on as if it had
never stopped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ttspec.errors import TrainingError


@dataclass(frozen=True, slots=True)
class Batch:
    """N dialogues."""

    ids: Tensor
    """int64 [N, L], padded on the right."""
    taught: Tensor
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
    taught: Tensor
    """bool [N, R]: rows whose next token is learned."""


Example = tuple[list[int], list[tuple[int, int]]]
"""Tokens of a dialogue, and where its answers are."""


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
            examples.append((record["ids"][:max_length], spans))
    if not examples:
        raise TrainingError("No answer has two tokens or more.\nGive other prompts.")
    return examples


def make_batch(
    examples: list[Example], step: int, *, size: int, seed: int, device: torch.device
) -> Batch:
    """The batch of a step, counted over all epochs: `size` dialogues in an order of `seed`."""
    chosen = chosen_examples(examples, step, size=size, seed=seed)
    length = -(-max(len(examples[i][0]) for i in chosen) // 64) * 64
    ids = torch.zeros(len(chosen), length, dtype=torch.long)
    taught = torch.zeros_like(ids, dtype=torch.bool)
    for row, i in enumerate(chosen):
        tokens, spans = examples[i]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        for begin, end in spans:
            taught[row, begin:end] = True
    epoch, place = divmod(step, -(-len(examples) // size))
    return Batch(_to_device(ids, device), taught, _generator(seed, epoch, place), chosen)


def chosen_examples(examples: list[Example], step: int, *, size: int, seed: int) -> list[int]:
    """Which examples the batch of a step has."""
    epoch, place = divmod(step, -(-len(examples) // size))
    order = torch.randperm(len(examples), generator=_generator(seed, epoch)).tolist()
    # Dialogues of like length together, in groups, so that little is padding.
    group = size * 16
    at = place * size
    near = sorted(order[at - at % group :][:group], key=lambda i: len(examples[i][0]))
    return near[at % group :][:size] or near[-size:]


def anchors(batch: Batch, blocks: int, length: int) -> Anchors:
    """Blocks of 1 + `length` tokens at random places.

    Their known tokens are uniform among those whose next token is in the same answer (drafters.md
    2d).
    """
    taught = F.pad(batch.taught, (0, length + 1))
    possible = (taught[:, :-1] & taught[:, 1:]).float()
    start = torch.multinomial(possible, blocks, replacement=True, generator=batch.generator)
    at = start[..., None] + torch.arange(1, length + 1)
    row = torch.arange(len(taught))[:, None, None]
    mask = taught[row, at].long().cumprod(-1).bool()
    ids = F.pad(batch.ids, (0, length + 1))
    start, at, row, mask = (_to_device(x, ids.device) for x in (start, at, row, mask))
    return Anchors(start=start, tokens=ids.gather(1, start), labels=ids[row, at], mask=mask)


def masked_rows(batch: Batch, depth: int, keep: float, least: float) -> MaskedRows:
    """All tokens, and masks by conditional drop (drafters.md 3d).

    Mask d after an anchor is kept for a share max(keep^d, least) of the anchors, and only where
    mask d - 1 is, so that every chain is whole. It sees the tokens up to its anchor and the masks
    between. An anchor is a token of an answer whose next token is in the same answer.

    Args:
        batch: Dialogues.
        depth: Rows that predict after an anchor, its own included; 1 is no masks.
        keep: Share kept from one depth to the next.
        least: The smallest share.
    """
    device = batch.ids.device
    taught = F.pad(batch.taught, (0, depth + 1))
    n, count = batch.ids.shape
    parts = []
    for row in range(n):
        possible = (taught[row, :-1] & taught[row, 1:]).nonzero()[:, 0]
        mixed = possible[torch.randperm(len(possible), generator=batch.generator)]
        chain = []
        for d in range(1, depth):
            anchor = mixed[: int(len(mixed) * max(keep**d, least))]
            whole = taught[row, anchor[:, None] + torch.arange(d + 2)].all(-1)
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
    anchor = _to_device(torch.cat([index, anchor], dim=1), device)
    deep = _to_device(torch.cat([torch.zeros_like(index), deep], dim=1), device)
    position = (anchor + deep).clamp(min=0)
    real = deep == 0
    seen = real[:, None] & (position[:, None] <= anchor[..., None])
    own = (anchor[:, None] == anchor[..., None]) & (deep[:, None] <= deep[..., None])
    first = batch.taught & F.pad(batch.taught, (0, 1))[:, 1:]
    learned = torch.cat([_to_device(first, device), anchor[:, count:] >= 0], dim=1)
    return MaskedRows(
        ids=batch.ids.gather(1, position.clamp(max=count - 1)),
        position=position,
        depth=deep,
        seen=seen | (own & ~real[:, None]),
        taught=learned,
    )


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; from pinned memory a copy does not hold up the host."""
    pinned = tensor.pin_memory() if device.type == "cuda" and not tensor.is_cuda else tensor
    return pinned.to(device, non_blocking=True)


def _generator(*seeds: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(seeds) & 0x7FFFFFFF)
