"""Rounds whose outcome is forced, on random weights: only their speed means anything.

A round does all that it does otherwise, acceptance included; what is kept then comes from a
schedule that was told beforehand. The ordinary round knows nothing of it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import shapes
import torch
from cyclopts import Parameter
from torch import Tensor

from ttspec.cli.options import ModelFlags
from ttspec.config import GenerateConfig
from ttspec.decoding.decoder import Decoder
from ttspec.decoding.engine import Engine
from ttspec.decoding.loading import device_of, dtype_of
from ttspec.drafters.base import Drafter
from ttspec.errors import OptionError, ResourceError
from ttspec.models.target import Target
from ttspec.records import Proposal
from ttspec.sampling import SamplingTensors


class RandomEngine(Engine):
    """An engine on random weights. It never copies: only drafts are kept as the schedule says."""

    def __init__(
        self, target: Target, drafter: Drafter, pair: shapes.PairShapes, schedule: list[int]
    ) -> None:
        """`schedule` has drafts kept a round, in turn."""
        super().__init__(target, drafter)
        self.make_decoder = partial(ForcedDecoder, schedule=schedule)
        self.random_weights = {
            "shapes": pair.name,
            "sha256": pair.sha256,
            "layers": pair.layers,
            "accept": schedule,
        }

    def decoder(self, config: GenerateConfig, *args: Any, **options: Any) -> Decoder:
        """As an engine's, without copies."""
        return super().decoder(
            replace(config, draft=replace(config.draft, copy=False)), *args, **options
        )


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
) -> RandomEngine:
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
        engine = RandomEngine(target, drafter, pair, schedule)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(
            f"The weights of {name} do not fit into memory.\n"
            f"Give fewer layers, as in {shapes.names()[0]}:layers=2."
        ) from error
    engine.compile = compile
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


def label(settings: Mapping[str, Any]) -> str:
    """What every output on random weights says; nothing of one on real weights."""
    if not (found := settings.get("random_weights")):
        return ""
    return f"random weights, acceptance forced to {', '.join(map(str, found['accept']))}"


def notice(settings: Mapping[str, Any]) -> str:
    """The same for people who do not know what that means."""
    if not (found := settings.get("random_weights")):
        return ""
    return (
        f"No checkpoint was loaded: {label(settings)} drafts a round, in turn, "
        f"in the shapes of {found['shapes']}, {found['layers']} target layers. Speed means "
        "something here; acceptance and text do not."
    )


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ShapeFlags:
    """A pair of models, or published shapes without weights."""

    models: ModelFlags = field(default_factory=ModelFlags)
    random_weights: str | None = None
    """Instead of a pair: random weights in the shapes of qwen3-8b+dflash, llama-3.1-8b+eagle3,
    llama-3.1-8b+pard or TARGET_CONFIG.json,DRAFTER_CONFIG.json; fewer target layers as in
    qwen3-8b+dflash:layers=2. Acceptance is then forced, and all output says so."""
    accept: str | None = None
    """With random weights: drafts kept a round, in turn, as in 3,2,4."""

    def load(self, notify: Callable[[str], None]) -> Engine:
        """Load the pair, or make it."""
        if self.random_weights is None:
            if self.accept is not None:
                raise OptionError(
                    "--accept was given without --random-weights: only there is it forced.\n"
                    "Drop it."
                )
            return self.models.load(notify)
        for name in ("target", "drafter", "device_map"):
            if getattr(self.models, name) != getattr(ModelFlags, name):
                flag = name.replace("_", "-")
                raise OptionError(
                    f"--random-weights was given together with --{flag}.\nDrop one of the two."
                )
        if self.accept is None:
            raise OptionError(
                "--random-weights needs --accept, for random models agree on nothing.\n"
                "Give the drafts kept a round, in turn, as in --accept 3,2,4."
            )
        notify(f"Making random weights in the shapes of {self.random_weights}.")
        models = self.models
        models.set_up()
        where = {"device": models.device, "dtype": models.dtype, "compile": models.compile}
        engine = load_random(self.random_weights, self.accept, **where)
        notify(notice({"random_weights": engine.random_weights}))
        return engine
