"""What training takes in memory, told before it is taken."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ttspec.decoding.memory_forecast import free_memory, mib
from ttspec.errors import ResourceError
from ttspec.models.target import Target
from ttspec.training.config import TrainConfig

LESS = "Use a smaller --batch, --anchors or --max-length, or more memory."


def step_bytes(target: Target, config: TrainConfig, longest: int) -> int:
    """Bytes of a step at its height: what the target reads and what is said of it.

    Every state between layers of `config.batch` dialogues of `longest` tokens; and logits of the
    target, logits of the drafter and their gradient, of all that is drafted.
    """
    text, size = target.config, target.dtype.itemsize
    states = (int(text.num_hidden_layers) + 1) * int(text.hidden_size)
    drafted = longest
    if config.kind not in ("pard", "causal"):
        drafted = min(config.anchors, longest) * max(config.block - 1, 1)
    tensors = {"domino": 5, "dspark": 5, "dflash2": 6}.get(
        config.kind, 3
    )  # a second head adds its own
    logits = tensors * int(text.vocab_size) * drafted
    return config.batch * size * (longest * states + logits)


def step_notice(target: Target, config: TrainConfig) -> str | None:
    """What should be told before hours are spent on answers: a step may not fit."""
    need, free = step_bytes(target, config, config.max_length), free_memory(target.device)
    if free is None or need <= free:
        return None
    return (
        f"A step on {config.batch} dialogues of {config.max_length:,} tokens takes {mib(need)}; "
        f"{target.device.type}: {mib(free)} free. It will do if answers are shorter. {LESS}"
    )


def require_training(
    target: Target, config: TrainConfig, trained: Iterable[Tensor], longest: int
) -> int:
    """Refuse training that does not fit, before anything of it is made.

    `longest` are the tokens of the longest example.

    Returns:
        The bytes that it takes.

    Raises:
        ResourceError: There is less memory than it takes.
    """
    free = free_memory(target.device)
    masters = 16 * sum(w.numel() for w in trained)  # float32, with gradients and two moments
    step = step_bytes(target, config, longest)
    if free is None or masters + step <= free:
        return masters + step
    raise ResourceError(
        f"Training takes {mib(masters + step)} (weights and moments {mib(masters)}, a step on "
        f"{config.batch} dialogues of up to {longest:,} tokens {mib(step)}); {target.device.type}: "
        f"{mib(free)} free.\n{LESS}"
    )
