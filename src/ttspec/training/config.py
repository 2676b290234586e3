"""How a drafter is trained: the options of `ttspec train`. Imports no torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ttspec.errors import OptionError

Kind = Literal[
    "dflash", "dflash2", "domino", "dspark", "jetspec", "eagle3", "mtp", "pard", "causal"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How a drafter is trained."""

    prompts: Path
    """JSON lines: {"prompt"}, {"turns"} (null: the target writes the turn), {"messages"} or
    {"conversations"}."""
    out: Path
    """Folder for answers, state and drafter; new, or an interrupted run's with --resume."""
    kind: Kind = "dflash"
    """Drafter to train; causal is a plain draft model, the target with fewer layers."""
    init: str | None = None
    """Go on training this drafter of the kind: a built-in name or a folder."""
    max_length: int = 768
    """Tokens of a training dialogue at most."""
    max_answer: int = 512
    """Tokens of an answer at most."""
    minutes: float | None = None
    """Stop training after this long; left out, all epochs are trained."""
    epochs: int = 6
    """Passes over the answers at most."""
    layers: int | None = None
    """Draft layers; left out, 3 for dflash and its kin, 6 of the target's for pard and causal, else
    1."""
    block: int = 8
    """Tokens drafted in training, and the known one."""
    taps: int | None = None
    """dflash and its kin: hidden states of the target that are read; left out, one per layer."""
    draft_vocabulary: int = 32000
    """eagle3: how many tokens it can draft, the most frequent of the answers."""
    batch: int = 32
    """Dialogues a step."""
    anchors: int = 64
    """All but pard and causal: blocks a dialogue and step."""
    rows: int | None = None
    """Dialogues answered side by side; left out, 32, or as many of them as fit into memory."""
    lr: float | None = None
    """Peak learning rate of AdamW; left out, 6e-4, and 3e-4 for mtp."""
    temperature: float = 0.8
    """Of the answers."""
    seed: int = 0
    """Of answers, initial weights, order and anchors."""
    resume: bool = False
    """Go on where a run with this folder stopped."""

    def __post_init__(self) -> None:
        def check(names: str, allowed: str, ok: Callable[[Any], bool]) -> None:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not ok(value):
                    raise OptionError(f"{name} is {value!r}; allowed is {allowed}.")

        check("epochs batch anchors rows layers taps", "1 or more", lambda n: n >= 1)
        check("max_length max_answer block draft_vocabulary", "2 or more", lambda n: n >= 2)
        check("minutes lr", "above 0", lambda x: 0 < x < math.inf)
        check("temperature", "0 (greedy) or more", lambda x: 0 <= x < math.inf)
        check("seed", "from 0 to 2**63 - 1", lambda n: 0 <= n < 2**63)
