"""How a drafter is trained. Knows no tensors."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal[
    "dflash", "dflash2", "domino", "dspark", "jetspec", "eagle3", "mtp", "pard", "causal"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How a drafter is trained."""

    prompts: Path
    """JSON lines: {"prompt"}, {"turns"}, {"messages"} or {"conversations"}."""
    out: Path
    """Folder for the answers, the state and the drafter."""
    kind: Kind = "dflash"
    """Drafter to train."""
    init: str | None = None
    """A drafter of this kind to go on training, instead of a new one."""
    max_length: int = 768
    """Tokens of a training dialogue at most."""
    max_answer: int = 512
    """Tokens of an answer at most."""
    minutes: float | None = None
    """Stop training after this long; None trains all epochs."""
    epochs: int = 6
    """Passes over the answers at most."""
    layers: int | None = None
    """Draft layers: None is 3 (DFlash and kin), or 6 of the target's (PARD, causal); others have
    one."""
    block: int = 8
    """Tokens drafted in training, and one: DFlash's block, PARD's masks, EAGLE-3's, MTP's steps."""
    taps: int | None = None
    """How many hidden states of the target DFlash and its kin read; None is one per layer."""
    draft_vocabulary: int = 32000
    """Tokens that EAGLE-3 drafts: the most frequent of the answers."""
    head: Literal["frozen", "trained"] = "frozen"
    """EAGLE-3's head: rows of the target's, or trained from them."""
    keep: float = 0.7
    """PARD: share of the masks of one depth that are kept at the next."""
    keep_least: float = 0.2
    """PARD: the smallest share."""
    batch: int = 32
    """Dialogues a step."""
    anchors: int = 64
    """All but PARD and causal: blocks a dialogue and step."""
    rows: int | None = None
    """Dialogues answered side by side; None is `ROWS`, or as many of them as fit into memory."""
    lr: float | None = None
    """Peak learning rate of AdamW, after a warm-up of 4 %, on a cosine to 0; None is the kind's."""
    clip: float = 1.0
    """Largest gradient norm."""
    decay: float = 4.0
    """DFlash and kin: row j weighs exp(-(j - 1) / decay)."""
    loss: Literal["ce", "kl"] = "kl"
    """Cross entropy to the tokens, as published, or KL to the target's distribution."""
    temperature: float = 0.8
    """Of the answers."""
    seed: int = 0
    """Of answers, initial weights, order and anchors."""
    resume: bool = False
    """Go on where a run with this folder stopped."""
