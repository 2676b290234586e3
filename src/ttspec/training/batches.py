"""Training examples and batches: which blocks of which answers a step teaches.

A step's batch is a function of the seed and the step, so that a resumed run goes on as if it had
never stopped.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from ttspec.errors import TrainingError


@dataclass(frozen=True, slots=True)
class Batch:
    """N dialogues with A blocks each."""

    ids: Tensor
    """int64 [N, L], padded on the right."""
    start: Tensor
    """int64 [N, A]: position of each block's known token."""
    tokens: Tensor
    """int64 [N, A]: that token."""
    labels: Tensor
    """int64 [N, A, G]: the tokens after it."""
    mask: Tensor
    """bool [N, A, G]: which of them belong to the same answer."""


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
    examples: list[Example],
    step: int,
    *,
    size: int,
    blocks: int,
    block: int,
    seed: int,
    device: torch.device,
) -> Batch:
    """The batch of a step.

    Args:
        examples: All of them.
        step: Counted over all epochs.
        size: Dialogues.
        blocks: Blocks a dialogue, their known tokens uniform among those whose next token is in
            the same answer (drafters.md 2d).
        block: Tokens in a block.
        seed: Of order and blocks.
        device: Where to put it.
    """
    per_epoch = -(-len(examples) // size)
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(len(examples), generator=_generator(seed, epoch)).tolist()
    # Dialogues of like length together, in groups, so that little is padding.
    group = size * 16
    at = place * size
    near = sorted(order[at - at % group :][:group], key=lambda i: len(examples[i][0]))
    chosen = near[at % group :][:size] or near[-size:]
    generator = _generator(seed, epoch, place)
    length = -(-max(len(examples[i][0]) for i in chosen) // 64) * 64
    ids = torch.zeros(len(chosen), length + block, dtype=torch.long)
    taught = torch.zeros_like(ids, dtype=torch.bool)
    for row, i in enumerate(chosen):
        tokens, spans = examples[i]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        for begin, end in spans:
            taught[row, begin:end] = True
    possible = (taught[:, :-1] & taught[:, 1:]).float()
    start = torch.multinomial(possible, blocks, replacement=True, generator=generator)
    offset = torch.arange(1, block)
    at_label = start[..., None] + offset
    row = torch.arange(len(chosen))[:, None, None]
    batch = Batch(
        ids=ids[:, :length],
        start=start,
        tokens=ids.gather(1, start),
        labels=ids[row, at_label],
        mask=taught[row, at_label].long().cumprod(-1).bool(),
    )
    made = {f.name: getattr(batch, f.name) for f in fields(Batch)}
    if device.type == "cuda":  # from pinned memory the copy does not hold up the host
        made = {name: tensor.pin_memory() for name, tensor in made.items()}
    return Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in made.items()})


def _generator(*seeds: int) -> torch.Generator:
    return torch.Generator().manual_seed(hash(seeds) & 0x7FFFFFFF)
