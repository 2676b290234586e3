"""Drafters against logits that their authors' own code computed.

By `scripts/make_goldens.py`, `scripts/make_authors_goldens.py` and `scripts/make_vllm_goldens.py`.
"""

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from toys import SLOTS, taught, verification

from ttspec.config import DraftConfig
from ttspec.drafters.base import Drafter, DraftState
from ttspec.drafters.blocks import Blocks
from ttspec.drafters.checkpoint import load_drafter
from ttspec.drafters.dflash import DFlash
from ttspec.drafters.dflash2 import DFlash2
from ttspec.drafters.dspark import DSpark
from ttspec.drafters.eagle3 import Eagle3
from ttspec.drafters.mtp import Mtp

GOLDENS = Path(__file__).parent / "goldens"
EAGLE3 = sorted(p.name for p in GOLDENS.glob("eagle3-*"))
PEAGLE = sorted(p.name for p in GOLDENS.glob("peagle-*"))
DFLASH = sorted(p.name for p in GOLDENS.glob("dflash-*"))
DFLASH2 = sorted(p.name for p in GOLDENS.glob("dflash2-*"))
DOMINO = sorted(p.name for p in GOLDENS.glob("domino-*"))
DSPARK = sorted(p.name for p in GOLDENS.glob("dspark-*"))
JETSPEC = sorted(p.name for p in GOLDENS.glob("jetspec-*"))
MTP = sorted(p.name for p in GOLDENS.glob("mtp-*"))
BLOCKS = sorted(p.name for p in GOLDENS.glob("speculators-d*"))
TAUGHT = sorted(p.name for p in GOLDENS.glob("speculators-mtp-*"))
LAYERS = {"eagle3": 8, "peagle": 8, "dflash": 4, "dflash2": 4, "domino": 4, "dspark": 4, "mtp": 2}
"""Of a target whose hidden states 2, 4 and 5 are EAGLE-3's default."""
PROMPT, ACCEPTED = 9, (2, 0, 4)
"""Of EAGLE-3; a DFlash golden brings its own."""


def golden(name: str, to: Path) -> tuple[Drafter, dict[str, Tensor]]:
    """A bound drafter and what is expected of it."""
    expected = load_file(GOLDENS / name / "expected.safetensors")
    for file in ("config.json", "model.safetensors"):  # a drafter's folder holds nothing else
        shutil.copy(GOLDENS / name / file, to)
    drafter = load_drafter(name, to)
    random = torch.randn(2, 260, 32, generator=torch.Generator().manual_seed(0))
    embedding, head = expected.get("embedding", random[0]), expected.get("head", random[1])
    drafter.bind(embedding, head, LAYERS[drafter.kind])
    return drafter, expected


def read_prompt(drafter: Drafter, expected: dict[str, Tensor], length: int) -> DraftState:
    """A state whose one row has read the first `length` tokens."""
    state = drafter.start(1, SLOTS, DraftConfig())
    tokens, features = expected["tokens"][None, :length], expected["features"][None, :length]
    drafter.extend(state, tokens, features, torch.zeros(1, dtype=torch.long))
    return state


def propose(drafter: Drafter, state: DraftState, tokens: Tensor, start: int) -> Tensor:
    """Logits [G, V] that are chosen from when each choice is what `tokens` say."""
    seen: list[Tensor] = []

    def choose(logits: Tensor, first: int) -> tuple[Tensor, None]:
        seen.append(logits[0])
        at = start + 1 + first
        return tokens[None, at : at + logits.shape[1]], None

    count = torch.tensor([drafter.length])
    begin = torch.tensor([start])
    drafter.propose(state, tokens[[start]], begin, count, drafter.length, start, choose)
    return torch.cat(seen)


def absorb(
    drafter: Drafter, state: DraftState, expected: dict[str, Tensor], start: int, accepted: int
) -> None:
    """A round's tokens; what was rejected comes with features that must not be seen again."""
    at = torch.arange(start, start + drafter.length + 1)
    kept = at <= start + accepted
    at = at.clamp(max=len(expected["features"]) - 1)
    features = expected["features"][at] + 9 * ~kept[:, None]
    fed = torch.where(kept, expected["tokens"][at], (expected["tokens"][at] + 7) % 259)
    nothing = torch.zeros(1, len(at), 260)
    drafter.absorb(
        state, verification([start], fed[None], nothing, features[None], fed[None], [accepted])
    )


@pytest.mark.parametrize("name", EAGLE3)
def test_eagle3_taught_over_a_sequence_says_what_speculators_says(tmp_path, name):
    drafter, expected = golden(name, tmp_path)
    assert isinstance(drafter, Eagle3)
    assert drafter.taps == ((2, 5) if drafter.layers > 1 else (2, 4, 5))
    steps, count, _ = expected["logits"].shape
    features = torch.nn.functional.pad(expected["features"], (0, 0, 0, steps))[None]
    with torch.no_grad():
        tokens, start = expected["tokens"][None, : count + steps], torch.arange(1, count + 1)[None]
        states = taught(drafter, features, tokens, start, steps)[0]
        logits = drafter.logits(states).transpose(0, 1)
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [*EAGLE3, *PEAGLE])
def test_eagle3_drafting_in_rounds_says_what_speculators_says(tmp_path, name):
    drafter, expected = golden(name, tmp_path)
    assert drafter.draft_ids is not None
    assert drafter.length == len(expected["logits"])
    state, start = read_prompt(drafter, expected, PROMPT), PROMPT
    for accepted in ACCEPTED:
        logits = propose(drafter, state, expected["tokens"], start)
        wanted = expected["logits"][:, start - 1]
        torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=0)
        wide = drafter.widen(logits)
        assert torch.equal(wide[:, drafter.draft_ids], logits)
        assert (wide == -math.inf).sum() == wide.numel() - logits.numel()
        absorb(drafter, state, expected, start, accepted)
        start += accepted + 1


@pytest.mark.parametrize("size", [1, 4, 9])
@pytest.mark.parametrize(
    "name",
    [*EAGLE3, *PEAGLE, *DFLASH, *DFLASH2, *DOMINO, *DSPARK, *JETSPEC, *MTP, *TAUGHT, *BLOCKS],
)
def test_a_prompt_read_in_parts_gives_the_same_logits(tmp_path, name, size):
    drafter, expected = golden(name, tmp_path)
    whole = propose(drafter, read_prompt(drafter, expected, PROMPT), expected["tokens"], PROMPT)
    state = drafter.start(1, SLOTS, DraftConfig())
    for first in range(0, PROMPT, size):
        part = slice(first, min(first + size, PROMPT))
        tokens, features = expected["tokens"][None, part], expected["features"][None, part]
        drafter.extend(state, tokens, features, torch.tensor([first]))
    parts = propose(drafter, state, expected["tokens"], PROMPT)
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", DFLASH)
def test_dflash_drafting_in_rounds_says_what_its_authors_package_says(tmp_path, name):
    drafter, expected = golden(name, tmp_path)
    state = read_prompt(drafter, expected, int(expected["start"][0]))
    rounds = zip(*(expected[k].tolist() for k in ("start", "pending", "accepted")), strict=True)
    for number, (start, pending, accepted) in enumerate(rounds):
        assert pending == expected["tokens"][start]
        logits = propose(drafter, state, expected["tokens"], start)
        torch.testing.assert_close(logits, expected["logits"][number], atol=1e-4, rtol=0)
        absorb(drafter, state, expected, start, accepted)
    assert expected["accepted"].tolist() == list(ACCEPTED)


@pytest.mark.parametrize("name", DFLASH2)
def test_dflash2_draws_from_what_its_authors_package_draws_from(tmp_path, name):
    drafter, expected = golden(name, tmp_path)
    assert isinstance(drafter, DFlash2)
    state = read_prompt(drafter, expected, int(expected["start"][0]))
    rounds = zip(*(expected[k].tolist() for k in ("start", "accepted")), strict=True)
    for number, (start, accepted) in enumerate(rounds):
        text = torch.cat([expected["tokens"][: start + 1], expected["drafts"][number]])
        logits = propose(drafter, state, text, start)
        among, q = expected["candidates"][number], expected["q"][number]
        torch.testing.assert_close(logits.softmax(-1).gather(-1, among), q, atol=1e-4, rtol=0)
        assert (logits == -math.inf).sum(-1).eq(logits.shape[-1] - among.shape[-1]).all()
        blocks = Blocks(text[None, [start]], torch.tensor([[start]]), drafter.length, start)
        alone = drafter.logits(drafter.states(state, blocks))[0, 0]
        torch.testing.assert_close(alone, expected["logits"][number], atol=1e-4, rtol=0)
        absorb(drafter, state, expected, start, accepted)
    assert expected["accepted"].tolist() == list(ACCEPTED)


@pytest.mark.parametrize("name", [*DOMINO, *DSPARK, *JETSPEC])
def test_drafting_in_rounds_says_what_its_authors_code_says(tmp_path, name):
    drafter, expected = golden(name, tmp_path)
    assert drafter.kind == ("dflash" if name in JETSPEC else name.split("-")[0])
    assert isinstance(drafter, DFlash)
    assert all(drafter.causal) == (name in JETSPEC)
    confident = isinstance(drafter, DSpark) and drafter.confident
    assert confident == ("confidence" in expected)
    state = read_prompt(drafter, expected, int(expected["start"][0]))
    for number, (start, accepted) in enumerate(
        zip(expected["start"].tolist(), ACCEPTED, strict=True)
    ):
        text = torch.cat([expected["tokens"][: start + 1], expected["drafts"][number]])
        logits = propose(drafter, state, text, start)
        torch.testing.assert_close(logits, expected["logits"][number], atol=1e-4, rtol=0)
        assert torch.equal(logits.argmax(-1), expected["drafts"][number])
        if confident:
            blocks = Blocks(text[None, [start]], torch.tensor([[start]]), drafter.length, start)
            states = drafter.states(state, blocks)
            said = drafter.confidence(state.weights, states, text[None, None, start:])
            torch.testing.assert_close(
                said[0, 0], expected["confidence"][number], atol=1e-4, rtol=0
            )
        absorb(drafter, state, expected, start, accepted)
    assert expected["accepted"].tolist() == list(ACCEPTED)


@pytest.mark.parametrize("name", MTP)
def test_an_mtp_head_drafting_in_rounds_says_what_vllms_engine_says(tmp_path, name):
    drafter, expected = golden(name, tmp_path)
    assert isinstance(drafter, Mtp)
    state = read_prompt(drafter, expected, int(expected["start"][0]))
    rounds = zip(*(expected[k].tolist() for k in ("start", "accepted")), strict=True)
    alike = 1 if "glm" in name else drafter.length  # see the script: it feeds back another state
    for number, (start, accepted) in enumerate(rounds):
        text = torch.cat([expected["tokens"][: start + 1], expected["drafts"][number]])
        logits, wanted = propose(drafter, state, text, start), expected["logits"][number]
        torch.testing.assert_close(logits[:alike], wanted[:alike], atol=1e-4, rtol=0)
        assert torch.equal(logits.argmax(-1)[:alike], expected["drafts"][number, :alike])
        absorb(drafter, state, expected, start, accepted)
    assert expected["accepted"].tolist() == [2, 0, 3]


@pytest.mark.parametrize("name", TAUGHT)
def test_the_first_drafts_of_an_mtp_head_are_those_that_speculators_teaches(tmp_path, name):
    drafter, expected = golden(name, tmp_path)
    assert isinstance(drafter, Mtp)
    features, tokens = expected["features"][None], expected["tokens"][None]
    with torch.no_grad():
        starts = torch.arange(1, len(expected["logits"]) + 1)[None]
        states = taught(drafter, features, tokens[:, :-1], starts, 1)[0, :, 0]
    torch.testing.assert_close(drafter.logits(states), expected["logits"], atol=1e-4, rtol=0)
    state, start = read_prompt(drafter, expected, PROMPT), PROMPT
    for accepted in ACCEPTED:
        logits = propose(drafter, state, expected["tokens"], start)
        torch.testing.assert_close(logits[0], expected["logits"][start - 1], atol=1e-4, rtol=0)
        absorb(drafter, state, expected, start, min(accepted, drafter.length))
        start += min(accepted, drafter.length) + 1


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_say_what_speculators_says_of_blocks_whose_tokens_are_known(tmp_path, name):
    drafter, expected = golden(name, tmp_path)
    assert isinstance(drafter, DFlash)
    assert drafter.kind in name
    state, text = read_prompt(drafter, expected, int(expected["start"][0])), expected["tokens"]
    for number, (start, accepted) in enumerate(
        zip(expected["start"].tolist(), ACCEPTED, strict=True)
    ):
        logits = propose(drafter, state, text, start)
        torch.testing.assert_close(logits, expected["logits"][number], atol=1e-4, rtol=0)
        if isinstance(drafter, DSpark) and "confidence" in expected:
            blocks = Blocks(text[None, [start]], torch.tensor([[start]]), drafter.length, start)
            states, known = drafter.states(state, blocks), text[None, None, start:]
            said = drafter.confidence(state.weights, states, known[..., : drafter.length + 1])
            torch.testing.assert_close(
                said[0, 0], expected["confidence"][number], atol=1e-4, rtol=0
            )
        absorb(drafter, state, expected, start, accepted)
