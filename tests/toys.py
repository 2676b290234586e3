"""Random drafters for the toy targets, and short ways to what many tests need."""

import resource
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ttspec import load
from ttspec.config import DraftConfig, LearnConfig
from ttspec.decoding.engine import Engine
from ttspec.decoding.history import ChatHistory
from ttspec.decoding.template import ChatTemplate
from ttspec.decoding.text import TextStream
from ttspec.drafters.base import Drafter, DraftState
from ttspec.drafters.blocks import Blocks
from ttspec.drafters.checkpoint import make_drafter as make_drafter_of
from ttspec.drafters.checkpoint import save_drafter
from ttspec.drafters.context import context_of_texts
from ttspec.drafters.dflash import DFlash
from ttspec.errors import TargetError
from ttspec.learning.learner import Learner
from ttspec.learning.replay_buffer import ReplayBuffer
from ttspec.models.packed import PackedLinear
from ttspec.models.source import resolve
from ttspec.models.target import Target
from ttspec.records import Proposal, ReplayBatch, Result, Verification

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


SLIDING = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
}
BODY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
}
EAGLE3 = {
    **BODY,
    "architectures": ["LlamaForCausalLMEagle3"],
    "num_hidden_layers": 1,
    "draft_vocab_size": 120,
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 3]},
    "ttspec": {"length": 4},
}
PEAGLE: dict[str, Any] = {
    **EAGLE3,
    "architectures": ["PEagleDraftModel"],
    "mask_token_id": MASK,
    "num_hidden_layers": 2,
}
UNUSUAL: dict[str, Any] = {
    "attention_bias": True,
    "embed_scale": 2.0,
    "final_logit_softcapping": 20.0,
    "hidden_act": "gelu_pytorch_tanh",
    "is_neox_style": False,
    "logit_scale": 0.5,
    "mlp_bias": True,
    "partial_rotary_factor": 0.5,
}
"""What a layer may do otherwise than most."""
MODEL = {**BODY, "model_type": "llama", "num_hidden_layers": 2, "ttspec": {"length": 4}}
PARD = {**MODEL, "architectures": ["LlamaForCausalLM"], "pard_token": MASK, "spd_type": "pard"}
DSPARK = {
    **CONFIG,
    "architectures": ["Qwen3DSparkModel"],
    "block_size": 4,
    "confidence_head_with_markov": True,
    "markov_head_type": "vanilla",
    "markov_rank": 8,
}
DOMINO_HEAD: dict[str, Any] = {
    **CONFIG["dflash_config"],
    "emb_dim": 8,
    "gru_hidden_dim": 12,
    "projector_type": "domino",
}
SHIFTED = {**DOMINO_HEAD, "pure_draft_prefix_len": 1, "shift_label": True}
DOMINO = {**CONFIG, "architectures": ["DominoDraftModel"], "dflash_config": DOMINO_HEAD}
DFLASH2 = {
    **CONFIG,
    "architectures": ["DFlash2DraftModel"],
    "conv_group_size": 16,
    "conv_kernel_size": 2,
    "selector_rank": 8,
    "selector_top_k": 120,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "dflash": ("dflash", CONFIG),
    "dflash-sliding": ("dflash", {**CONFIG, **SLIDING}),
    "dflash-unusual": ("dflash", {**CONFIG, **UNUSUAL}),
    "jetspec": (
        "dflash",
        {**CONFIG, "dflash_config": {**CONFIG["dflash_config"], "causal_head": True}},
    ),
    "dspark": ("dspark", {**DSPARK, "enable_confidence_head": True}),
    "dspark-gated": (
        "dspark",
        {**DSPARK, **SLIDING, **UNUSUAL, "markov_head_type": "gated"},
    ),
    "dspark-rnn": (
        "dspark",
        {
            **DSPARK,
            "block_size": 5,
            "draft_vocab_size": 120,
            "markov_head_type": "rnn",
            "sample_from_anchor": False,
        },
    ),
    "domino": ("domino", DOMINO),
    "domino-shifted": ("domino", {**DOMINO, **SLIDING, "dflash_config": SHIFTED}),
    "dflash2": ("dflash2", DFLASH2),
    "dflash2-sliding": (
        "dflash2",
        {**DFLASH2, **SLIDING, "conv_kernel_size": 3, "sample_from_anchor": True, "block_size": 4},
    ),
    "eagle3": ("eagle3", EAGLE3),
    "eagle3-unusual": (
        "eagle3",
        {**EAGLE3, **UNUSUAL, "layer_types": ["sliding_attention"], "sliding_window": 8},
    ),
    "eagle3-layers": (
        "eagle3",
        {
            **EAGLE3,
            "num_hidden_layers": 2,
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3]},
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 8,
        },
    ),
    "eagle3-normed-residual": ("eagle3", {**EAGLE3, "norm_before_residual": True}),
    "eagle3.1": ("eagle3", {**EAGLE3, "fc_norm": True, "norm_output": True}),
    "eagle3-norm-before-fc": ("eagle3", {**EAGLE3, "norm_before_fc": True}),
    "eagle3-qk-norm": (
        "eagle3",
        {**EAGLE3, "architectures": ["Eagle3Qwen3ForCausalLM"], "draft_vocab_size": VOCABULARY},
    ),
    "peagle": ("peagle", PEAGLE),
    "peagle-sliding": (
        "peagle",
        {**PEAGLE, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    ),
    "pard": ("pard", PARD),
    "pard-qwen3": ("pard", {**PARD, "model_type": "qwen3", "tie_word_embeddings": True}),
    "pard2": (
        "pard",
        {
            **PARD,
            "spd_type": "pard2",
            "pard2": True,
            "pard2_target_dim": 192,
            "pard2_target_layers": [-1, -2, 1],
        },
    ),
    "mtp": ("mtp", {**MODEL, "architectures": ["MTPDraftModel"], "num_hidden_layers": 4}),
    "mtp-gated": (
        "mtp",
        {
            **BODY,
            "architectures": ["MTPDraftModel"],
            "model_type": "qwen3_5_text",
            "num_hidden_layers": 4,
            "rope_theta": None,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
            "ttspec": {"length": 4},
        },
    ),
    "mtp-experts": (
        "mtp",
        {
            **BODY,
            "architectures": ["MTPDraftModel"],
            "model_type": "glm4_moe",
            "num_hidden_layers": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "ttspec": {"length": 4},
        },
    ),
    "causal": ("causal", MODEL),
    "causal-qwen2": ("causal", {**MODEL, "model_type": "qwen2"}),
}
"""Drafters for the toy targets, by the name that tests show: kind and config.json."""


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Weights large enough to matter; norms around 1, and a vocabulary map."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        if name == "d2t":
            ids = torch.randperm(VOCABULARY, generator=generator)[: shape[0]].sort().values
            return ids - torch.arange(shape[0])
        values = torch.randn(shape, generator=generator)
        return 1 + 0.1 * values if len(shape) == 1 else 0.2 * values

    return {name: draw(name, shape) for name, shape in shapes.items()}


def make_kind(which: str, seed: int = 0, **config: Any) -> Drafter:
    """A random drafter of `CONFIGS`."""
    kind, base = CONFIGS[which]
    drafter = make_drafter_of(kind, {**base, **config})
    drafter.weights = random_weights(drafter.shapes(), seed)
    return drafter


def bound_kind(which: str, seed: int = 0, **config: Any) -> Drafter:
    """The same with a random embedding and head, and no target."""
    drafter = make_kind(which, seed, **config)
    generator = torch.Generator().manual_seed(seed + 1000)
    table = torch.randn(2, VOCABULARY, 64, generator=generator)
    drafter.bind(table[0], 0.3 * table[1], 4)
    return drafter


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
    drafter.bind(table[0], 0.3 * table[1], 4)
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
    start: Sequence[int] | Tensor,
    fed: Tensor,
    logits: Tensor,
    features: Tensor,
    tokens: Tensor,
    accepted: Sequence[int],
    *,
    count: Sequence[int] | None = None,
    emitted: Sequence[int] | Tensor | None = None,
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
        start=torch.as_tensor(start),
        logits=logits,
        features=features,
        tokens=tokens,
        accepted=torch.tensor(accepted),
        emitted=torch.as_tensor([a + 1 for a in accepted] if emitted is None else emitted),
        ended=torch.tensor(ended if ended is not None else [False] * rows),
    )


def taught(drafter, features: Tensor, ids: Tensor, start: Tensor, length: int) -> Tensor:
    """What a drafter's head reads of blocks of whole texts int64 [N, L], as in training."""
    row, count = torch.arange(len(ids))[:, None], ids.shape[1]
    at = (start[..., None] + torch.arange(length + 1)).clamp(max=count - 1)
    text, mask = ids[row[..., None], at], torch.ones(*start.shape, length, dtype=torch.bool)
    lesson = ReplayBatch.of(text, start, features[row, start - 1], mask)
    context = context_of_texts(drafter, drafter.weights, ids, features, DraftConfig(), length)
    return drafter.replayed(context, lesson, Blocks(text[..., 0], start, length, count))


def replay_batch(tokens: Any, start: Any, before: Tensor | None = None) -> ReplayBatch:
    """Blocks to draft again; all their rows teach nothing in particular.

    Args:
        tokens: int64 [B, A, length + 1], or [B, A] where only the pending token matters.
        start: int64 [B, A].
        before: [B, A, W] features of the token before.
    """
    tokens, start = torch.as_tensor(tokens), torch.as_tensor(start)
    if tokens.dim() == 2:
        tokens = torch.cat([tokens[..., None], tokens.new_zeros(*tokens.shape, G)], dim=-1)
    length = tokens.shape[2] - 1
    return ReplayBatch(
        tokens=tokens,
        start=start,
        before=before,
        logits=torch.zeros(*start.shape, length, VOCABULARY),
        mask=torch.ones(*start.shape, length, dtype=torch.bool),
        fresh=torch.ones(start.shape, dtype=torch.bool),
        count=torch.full((len(start),), start.shape[1]),
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
        self.config, self.weights, self.interpretation = {}, {}, {}

    def bind(self, embedding, head, layers, tokenizer=None) -> None:
        pass

    def start(self, rows: int, slots: int, options: DraftConfig) -> DraftState:
        return DraftState({}, options)

    def extend(self, state, tokens, features, start, subset=None, counts=None) -> None:
        pass

    def propose(self, state, pending, start, count, length, longest, choose) -> Proposal:
        script = torch.tensor(self.script + [0] * (length + 2))
        at = (start[:, None] + 1 + torch.arange(length)).clamp(max=len(script) - 1)
        tokens = script[at]
        if self.wrong:
            tokens = torch.where(at % self.wrong == 0, (tokens + 1) % 256, tokens)
        return Proposal(tokens=tokens, count=count)

    def _replay(self, state, batch, length, longest) -> Tensor:
        raise NotImplementedError

    def learnable(self, parameters: str) -> list[str]:
        return []


# What drafters are asked for.

SLOTS = 64


def greedy(logits: Tensor, _: int) -> tuple[Tensor, Tensor | None]:
    return logits.argmax(-1), None


class Watch:
    """A `choose` that remembers the logits of a whole proposal, over the target's vocabulary.

    It draws the script, if there is one.
    """

    def __init__(self, drafter: Drafter, script: Tensor | None = None) -> None:
        self.drafter, self.script = drafter, script

    def __call__(self, logits: Tensor, first: int) -> tuple[Tensor, Tensor | None]:
        logits = self.drafter.widen(logits)
        self.logits = torch.cat([self.logits, logits], dim=1) if first else logits
        if self.script is None:
            return greedy(logits, first)
        return self.script[:, first : first + logits.shape[1]], None


def context(
    drafter: DFlash, lengths: list[int], options: DraftConfig | None = None, seed: int = 0
) -> DraftState:
    """A state whose rows have read `lengths` tokens each."""
    state = drafter.start(len(lengths), SLOTS, options or DraftConfig())
    features = random_features(len(lengths), max(lengths), seed=seed)
    start = torch.zeros(len(lengths), dtype=torch.long)
    drafter.extend(state, torch.zeros(features.shape[:2], dtype=torch.long), features, start)
    return state


def logits_of(drafter: DFlash, state: DraftState, pending: list[int], start: list[int]) -> Tensor:
    """Draft logits [B, G, V] that `propose` chooses from."""
    watch = Watch(drafter)
    drafter.propose(
        state,
        torch.tensor(pending),
        torch.tensor(start),
        torch.full((len(start),), drafter.length),
        drafter.length,
        max(start),
        watch,
    )
    return watch.logits


# What learners are given.

G = 4
NOW = LearnConfig(stride=1, blocks=1, supervision="block", lr=1e-3)
"""An update after every round, on that round."""


def make_learner(
    rows: int, config: LearnConfig = NOW, drafter: DFlash | None = None
) -> tuple[Learner, DFlash, DraftState]:
    drafter = drafter or bound_drafter()
    state = drafter.start(rows, 128, DraftConfig())
    features = random_features(rows, 8).to(drafter.embedding.dtype)
    features[:] = features[:1]  # a row's context does not depend on its index
    start = torch.zeros(rows, dtype=torch.long)
    drafter.extend(state, torch.zeros(rows, 8, dtype=torch.long), features, start)
    return Learner(config, drafter, state, rows, G), drafter, state


def learn_from(learner: Learner, v: Verification, longest: int) -> list[bool]:
    """Give a learner a round, and commit it."""
    learner.keep(v, longest)
    emitted = dict(enumerate(v.emitted.tolist()))
    return learner.absorb(longest, emitted, drafted=True, kept=True, ahead=0)


def fake_round(
    number: int,
    rows: int,
    *,
    emitted: Sequence[int] | None = None,
    same: bool = False,
    dtype: torch.dtype = torch.float32,
    **facts,
) -> Verification:
    """Round `number` at position 8 + number, with target logits of its own for every row."""
    generator = torch.Generator().manual_seed(number)
    drawn = 1 if same else rows
    logits = 3 * torch.randn(drawn, G + 1, VOCABULARY, generator=generator).to(dtype)
    features = torch.randn(drawn, G + 1, 128, generator=generator).to(dtype)
    fed = torch.randint(0, 256, (drawn, G + 1), generator=generator)
    expand = (x.expand(rows, *x.shape[1:]).clone() for x in (logits, features, fed))
    logits, features, fed = expand
    return verification(
        [8 + number] * rows,
        fed,
        logits,
        features,
        fed,
        [0] * rows,
        emitted=emitted or [1] * rows,
        **facts,
    )


def take(buffer: ReplayBuffer) -> ReplayBatch:
    """The newest batch, which is then no longer new."""
    batch = buffer.newest()
    buffer.mark_used()
    return batch


def new_text(stream: TextStream, *, final: bool = False) -> str:
    """What a stream has to show since this was asked last."""
    new = stream.peek(final=final)
    stream.skip(len(new))
    return new


# What decoding is asked for.

PLAIN = {"learn": None, "draft": DraftConfig(length=0)}
LEARN = {"learn": LearnConfig(stride=1, lr=3e-3, scope="session")}


def plain(engine: Engine, prompt, **options) -> Result:
    return engine.generate(prompt, **{**options, **PLAIN})[0]


def prompt_ids(tokenizer, prompt, **options) -> list[int]:
    """Tokens of a first prompt, as a chat template of these options writes it."""
    return ChatHistory(ChatTemplate(tokenizer, **options)).ask(prompt)


def prefill(decoder, *given) -> list[int]:
    """Read prompts at one go, as `PromptReader.begin` is told; the first token of each answer."""
    reading = decoder.prompts.begin(*given)
    while not reading.is_read:
        decoder.prompts.read_chunk(reading)
    return reading.first_tokens


def parrot(engine: Engine, result: Result, *, length: int = 5, wrong: int = 0) -> Engine:
    """The same target with a drafter that knows the answer."""
    drafter = Parrot(result.prompt_ids + result.token_ids, length, wrong)
    return Engine(twin(engine.target), drafter)


def twin(target: Target) -> Target:
    """A target of the same model with taps of its own."""
    kept = (
        "model",
        "tokenizer",
        "name",
        "path",
        "origin",
        "context",
        "ends",
        "defaults",
        "windows",
    )
    return Target(**{name: getattr(target, name) for name in kept})


def repack_head(target: Target) -> None:
    """Let the target's head be what its weight is now, if that was packed."""
    head = target.model.get_output_embeddings()
    if isinstance(head, PackedLinear):
        target.model.set_output_embeddings(PackedLinear(head, keeps_weight=True))


def finish(chunks) -> tuple[str, list[int], Result]:
    chunks = list(chunks)
    assert chunks[-1].result is not None
    assert not any(chunk.result for chunk in chunks[:-1])
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    return "".join(chunk.text for chunk in chunks), tokens, chunks[-1].result


def assert_goes_on(engine: Engine, before: list[int], result: Result) -> None:
    """A greedy turn is what plain decoding says after the tokens so far."""
    ids = [*before[:-1], *result.prompt_ids]
    assert result.prompt_ids[0] == before[-1]
    fresh = plain(engine, [ids], max_new_tokens=len(result.token_ids), temperature=0.0)
    assert fresh.token_ids == result.token_ids


def assert_is_fresh(engine: Engine, said: Sequence[str], result: Result, **options: Any) -> None:
    """A greedy turn is what a fresh request with the whole conversation says.

    `said` are texts of the user and of the target in turn, the user's last.
    """
    roles = ["user", "assistant"] * len(said)
    messages = [{"role": r, "content": text} for r, text in zip(roles, said, strict=False)]
    fresh = plain(engine, [messages], **options, max_new_tokens=len(result.token_ids) or 1)
    assert fresh.token_ids == result.token_ids


# What commands are given.

DRAFTER = {
    "architectures": ["DFlashDraftModel"],
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 260,
    "num_target_layers": 4,
    "dflash_config": {"block_size": 6, "mask_token_id": 259, "target_layer_ids": [1, 2]},
}


def make_drafter(folder: Path, **changes: object) -> Path:
    """A random drafter for the toy target, or, with changes, for another one."""
    config = DRAFTER | changes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shapes = DFlash(config, {}).shapes()
        weights = {
            n: torch.ones(s) if len(s) == 1 else torch.randn(s) * 0.1 for n, s in shapes.items()
        }
    save_drafter(folder, config, weights)
    return folder


def complaint(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines on standard error, where standard output has none."""
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err.splitlines()


def refused(name: str, kind: type[Exception] = TargetError) -> str:
    with pytest.raises(kind) as caught:
        resolve(name)
    message = str(caught.value)
    assert message.count("\n") == 1, "an error has two lines"
    return message


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "model"))


@contextmanager
def little_memory(more: int) -> Iterator[None]:
    """The process may take so many bytes more, or it has a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def full_disk(size: int = 20_000) -> Iterator[None]:
    """The system lets no file of this process grow beyond a size."""
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def update_on(learner: Learner, batch: ReplayBatch, longest: int) -> list[bool]:
    """One step on a batch whose largest start is `longest`, published at once; rows updated."""
    learner._batch = batch
    learner._distil(longest)
    learner._step_weights()
    learner._pending = learner._report
    return learner.publish()
