"""Rounds whose outcome is forced, on random weights: only their speed means anything.

A round does all that it does otherwise, acceptance included; what is kept then comes from a
schedule that was told beforehand. The ordinary round knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ttspec.decoding.decoder import Decoder
from ttspec.decoding.engine import Engine
from ttspec.decoding.loading import device_of, dtype_of
from ttspec.errors import OptionError, ResourceError
from ttspec.models import shapes
from ttspec.records import Proposal
from ttspec.sampling import SamplingTensors


class ForcedDecoder(Decoder):
    """Keeps as many drafts as a schedule says.

    In round n, row r keeps schedule[(n + r) mod its length] drafts, or as many as there are: rows
    are out of step, as they are where acceptance is real. The drafts that are kept are emitted,
    so that the text is the one whose keys and values the caches hold.
    """

    def __init__(self, *args: Any, schedule: Sequence[int], **options: Any) -> None:
        """Args and options are a `Decoder`'s; `schedule` has drafts kept a round."""
        super().__init__(*args, **options)
        device = self.target.device
        # Made here and never replaced: a captured graph reads them where they are.
        self._schedule = torch.tensor(list(schedule), device=device)
        self._offset = torch.arange(self.rows.count, device=device)

    def accept(
        self, logits: Tensor, proposal: Proposal, noise: Tensor | None, sampling: SamplingTensors
    ) -> tuple[Tensor, Tensor]:
        """As many as the schedule says."""
        _, tokens = super().accept(logits, proposal, noise, sampling)
        turn = (self.rows.inputs.number + self._offset) % len(self._schedule)
        kept = self._schedule[turn].minimum(proposal.count)
        length = proposal.tokens.shape[1]
        is_kept = torch.arange(length, device=kept.device) < kept[:, None]
        drafted = torch.where(is_kept, proposal.tokens, tokens[:, :length])
        return kept, torch.cat([drafted, tokens[:, length:]], dim=1)


def load_random(
    name: str,
    accept: str | Sequence[int],
    *,
    device: str = "auto",
    dtype: str = "auto",
    compile: bool = False,
) -> Engine:
    """A pair of published shapes with random weights, whose acceptance is forced.

    Args:
        name: A named pair, or two config files; see `shapes.find_shapes`.
        accept: Drafts kept a round, in turn: (3, 2, 4), or "3,2,4".
        device: "auto", "cpu" or "cuda".
        dtype: "auto", "float32", "bfloat16" or "float16".
        compile: As in `engine.load`.

    Returns:
        An engine; its `random_weights` says what every output must say. Prompts are token lists.

    Raises:
        OptionError: There is no such pair, or the schedule is none.
        TargetError, CheckpointError: The shapes are of a kind that cannot be run.
        ResourceError: The weights do not fit into memory.
    """
    schedule = parse_schedule(accept)
    pair = shapes.find_shapes(name)
    drafter = shapes.bare_drafter(pair)
    if max(schedule) > drafter.length:
        raise OptionError(
            f"--accept has {max(schedule)}, and the drafter of {name} drafts {drafter.length} "
            f"tokens a round.\nAllowed is 0 to {drafter.length}."
        )
    place = device_of(device)
    kind = dtype_of(dtype, place)
    try:
        target = shapes.random_target(pair, place, kind)
        shapes.give_weights(drafter, place, kind)
        engine = Engine(target, drafter)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(
            f"The weights of {name} do not fit into memory.\n"
            f"Give fewer layers, as in {shapes.names()[0]}:layers=2."
        ) from error
    engine.compile = compile
    engine.make_decoder = partial(ForcedDecoder, schedule=schedule)
    engine.random_weights = {
        "shapes": pair.name,
        "sha256": pair.sha256,
        "layers": pair.layers,
        "accept": schedule,
    }
    return engine


def parse_schedule(given: str | Sequence[int]) -> list[int]:
    """Drafts kept a round, in turn.

    Raises:
        OptionError: It is no list of whole numbers from 0 up.
    """
    parts = given.split(",") if isinstance(given, str) else given
    try:
        schedule = [int(part) for part in parts]
    except ValueError:
        schedule = []
    if not schedule or min(schedule) < 0:
        raise OptionError(
            f"--accept is {given!r}; allowed are whole numbers from 0 up, as in 3,2,4.\n"
            "They are the drafts kept a round, in turn."
        )
    return schedule
