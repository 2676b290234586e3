"""Random drafters for the toy targets, and short ways to what many tests need."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttspec import load
from ttspec.config import DraftConfig
from ttspec.decoding.engine import Engine
from ttspec.drafters.base import Drafter, DraftState
from ttspec.drafters.dflash import DFlash
from ttspec.records import Proposal, Verification

VOCABULARY = 260
MASK = 259
CONFIG: dict[str, Any] = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "block_size": 5,
    "vocab_size": VOCABULARY,
    "num_target_layers": 4,
    "dflash_config": {"mask_token_id": MASK, "target_layer_ids": [0, 2]},
}


def toy_drafter(seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> DFlash:
    """A random DFlash drafter for the toy targets."""
    drafter = DFlash({**CONFIG, **config}, {})
    generator = torch.Generator().manual_seed(seed)
    drafter.weights = {
        name: (
            torch.ones(shape) if len(shape) == 1 else 0.2 * torch.randn(shape, generator=generator)
        ).to(dtype)
        for name, shape in drafter.shapes().items()
    }
    return drafter


def bound_drafter(seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> DFlash:
    """A toy drafter with a random embedding and head, and no target."""
    drafter = toy_drafter(seed, dtype, **config)
    generator = torch.Generator().manual_seed(seed + 1000)
    table = torch.randn(2, VOCABULARY, 64, generator=generator).to(dtype)
    drafter.bind(table[0], 0.3 * table[1], len(drafter.taps) * 64)
    return drafter


def toy_engine(folder: Path, drafter: DFlash | None = None, dtype: str = "float32") -> Engine:
    """A toy target with a drafter of its own."""
    return load(
        str(folder), drafter if drafter is not None else toy_drafter(), device="cpu", dtype=dtype
    )


def random_features(rows: int, tokens: int, width: int = 128, seed: int = 0) -> Tensor:
    """What a target's taps could give."""
    return torch.randn(rows, tokens, width, generator=torch.Generator().manual_seed(seed))


def verification(
    start: Sequence[int],
    fed: Tensor,
    logits: Tensor,
    features: Tensor,
    tokens: Tensor,
    accepted: Sequence[int],
    *,
    count: Sequence[int] | None = None,
    emitted: Sequence[int] | None = None,
    ended: Sequence[bool] | None = None,
) -> Verification:
    """A round's record; by default all rows have full proposals and emit accepted + 1."""
    rows, width = fed.shape
    return Verification(
        proposal=Proposal(
            tokens=fed[:, 1:],
            count=torch.tensor(count if count is not None else [width - 1] * rows),
        ),
        fed=fed,
        start=torch.tensor(start),
        logits=logits,
        features=features,
        tokens=tokens,
        accepted=torch.tensor(accepted),
        emitted=torch.tensor(emitted if emitted is not None else [a + 1 for a in accepted]),
        ended=torch.tensor(ended if ended is not None else [False] * rows),
    )


def chi_square(counts: Tensor, share: Tensor) -> float:
    """p-value of observed counts under the law `share`; cells expected under 5 times are pooled."""
    counts, share = counts.double().flatten(), share.double().flatten()
    expected = share / share.sum() * counts.sum()
    assert not counts[expected == 0].any(), "something impossible happened"
    big = expected >= 5
    counts = torch.cat([counts[big], counts[~big].sum()[None]])
    expected = torch.cat([expected[big], expected[~big].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(counts) - 1) / 2, dtype=torch.double)
    return float(torch.special.gammaincc(freedom, statistic / 2)) if len(counts) > 1 else 1.0


def total_variation(counts: Tensor, share: Tensor) -> float:
    """Half the L1 distance of observed shares from a law."""
    counts, share = counts.double().flatten(), share.double().flatten()
    return float((counts / counts.sum() - share / share.sum()).abs().sum() / 2)


class Parrot(Drafter):
    """Drafts a text that is known, with a mistake at every `wrong`th position; cannot learn."""

    kind, name, path = "parrot", "parrot", None
    taps = ()

    def __init__(self, script: Sequence[int], length: int = 5, wrong: int = 0) -> None:
        self.script, self.length, self.wrong = list(script), length, wrong
        self.config, self.weights = {}, {}

    def bind(self, embedding: Tensor, head: Tensor, taps_width: int) -> None:
        assert taps_width == 0

    def start(self, rows: int, slots: int, options: DraftConfig) -> DraftState:
        return DraftState({}, options)

    def extend(self, state, tokens, features, start, subset=None) -> None:
        pass

    def propose(self, state, pending, start, count, length, longest, choose) -> Proposal:
        script = torch.tensor(self.script + [0] * (length + 2))
        at = (start[:, None] + 1 + torch.arange(length)).clamp(max=len(script) - 1)
        tokens = script[at]
        if self.wrong:
            tokens = torch.where(at % self.wrong == 0, (tokens + 1) % 256, tokens)
        return Proposal(tokens=tokens, count=count)

    def replay(self, state, tokens, start, length, longest) -> Tensor:
        raise NotImplementedError

    def learnable(self, parameters: str) -> list[str]:
        return []
