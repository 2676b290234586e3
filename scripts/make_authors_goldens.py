"""Write goldens of drafters whose authors publish their code as a repository, not as a package.

    python3.11 -m venv golden-authors
    golden-authors/bin/pip install torch==2.13.0  # the CPU build
    golden-authors/bin/pip install transformers==5.10.2 safetensors==0.7.0 numpy==2.4.4
    golden-authors/bin/pip install pyyaml tqdm
    git clone https://github.com/deepseek-ai/DeepSpec DeepSpec
    git -C DeepSpec checkout afdfa7c9382a3341a3e6f17756dd816da79f132c
    PYTHONPATH=DeepSpec golden-authors/bin/python scripts/make_authors_goldens.py dspark
    git clone https://github.com/hao-ai-lab/JetSpec JetSpec
    git -C JetSpec checkout 2c7b3fae75690dfe9a188a37d7fdfd43ee0e032f
    PYTHONPATH=JetSpec golden-authors/bin/python scripts/make_authors_goldens.py jetspec
    git clone https://github.com/sgl-project/SpecForge SpecForge
    git -C SpecForge checkout a6b6b0230009d15ec2a97a57384e6f53f0f96946
    PYTHONPATH=SpecForge golden-authors/bin/python scripts/make_authors_goldens.py domino

Nothing of theirs is patched. Run twice, the files have the same bytes.

DSpark, dspark-*: the model and its Markov head are DeepSpec's, called as its evaluator calls them;
that one wants a whole target. JetSpec, jetspec-*: its authors' draft head, called as their adapter
does, one pass over masks. Domino, domino-*: SpecForge's model, called as its `spec_generate` does;
its own loop leaves out the last row of a block whose first row predicts, so that logits are those
of its head over the tokens that the loop chose. Drafts are the likeliest tokens. Features of three
rounds:

    features [T, W]             target taps, by position
    tokens [T+1]                prompt, then what three rounds committed, then the pending token
    start, accepted [3]         position of each round's pending token, drafts that were kept
    drafts, logits [3, G(, V)]
    confidence [3, G]           DSpark's, logits, where there is a head
    embedding, head [V, H]      of the target, where the drafter has none
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from make_goldens import (
    ACCEPTED,
    BLOCK,
    LAYER,
    MASK,
    PROMPT,
    VOCABULARY,
    random_weights,
    write_family,
)
from torch import Tensor, nn

DSPARK = {
    "vanilla": {"confidence_head_with_markov": True, "enable_confidence_head": True},
    "gated": {"confidence_head_with_markov": False, "enable_confidence_head": True},
    "rnn": {"enable_confidence_head": False},
    "dflash": {"enable_confidence_head": False, "markov_rank": 0},
}
DOMINO: dict[str, dict[str, object]] = {
    "plain": {},
    "prefix": {"pure_draft_prefix_len": 1},
    "shifted": {"pure_draft_prefix_len": 1, "shift_label": True},
}
BODY = {
    "num_hidden_layers": 2,
    "num_target_layers": 4,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "tie_word_embeddings": False,
    **LAYER,
}


@torch.no_grad()
def make_dspark(folder: Path, variant: str, generator: torch.Generator) -> dict[str, Tensor]:
    """The checkpoint of one variant; what is expected of it."""
    from deepspec.modeling.dspark.qwen3 import Qwen3DSparkModel
    from transformers import Qwen3Config

    config = Qwen3Config(
        **{
            "architectures": ["Qwen3DSparkModel"],
            "block_size": BLOCK - 1,
            "layer_types": ["full_attention", "full_attention"],
            "markov_head_type": "vanilla" if variant == "dflash" else variant,
            "markov_rank": 8,
            "mask_token_id": MASK,
            "num_anchors": 16,
            "target_layer_ids": [0, 2],
            **BODY,
            **DSPARK[variant],
        }
    )
    model = Qwen3DSparkModel(config)
    weights = random_weights(model.state_dict(), generator)
    weights["lm_head.weight"] = 1.5 * weights["lm_head.weight"]
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    model = Qwen3DSparkModel.from_pretrained(folder, attn_implementation="sdpa").eval()

    def draft(block: Tensor, positions: Tensor, features: Tensor, cache: object) -> list[Tensor]:
        states = model._forward_backbone(
            position_ids=positions,
            noise_embedding=model.embed_tokens(block),
            target_hidden_states=features,
            past_key_values=cache,
            use_cache=True,
            is_causal=False,
        )
        drafts, logits = model.sample_draft_tokens(
            model.compute_logits(states), first_prev_token_ids=block[:, 0], hidden_states=states
        )
        if model.confidence_head is None:
            return [drafts, logits]
        before = torch.cat([block[:, :1], drafts[:, :-1]], dim=1)
        return [drafts, logits, model.predict_confidence_step(states, before)]

    return rounds(draft, model.block_size, generator)


@torch.no_grad()
def make_jetspec(folder: Path, variant: str, generator: torch.Generator) -> dict[str, Tensor]:  # noqa: ARG001
    """The checkpoint of JetSpec's own draft head; what is expected of it."""
    from jetspec.models.draft_head import DFlashDraftModel

    own = {"causal_head": True, "mask_token_id": MASK, "target_layer_ids": [0, 2]}
    model = made(DFlashDraftModel, own, folder, generator)
    embedding, head = torch.randn(2, VOCABULARY, LAYER["hidden_size"], generator=generator)
    head = 0.3 * head

    def draft(block: Tensor, positions: Tensor, features: Tensor, cache: object) -> list[Tensor]:
        states = model(
            position_ids=positions,
            noise_embedding=nn.functional.embedding(block, embedding),
            target_hidden=features,
            past_key_values=cache,
            use_cache=True,
        )
        logits = nn.functional.linear(states[:, 1:], head)
        return [logits.argmax(-1), logits]

    tables = {"embedding": embedding.contiguous(), "head": head}
    return {**tables, **rounds(draft, model.block_size, generator)}


def made(kind: Any, own: dict[str, object], folder: Path, generator: torch.Generator) -> Any:
    """A model of DFlash's family with random weights, as it is saved and read."""
    from transformers import Qwen3Config

    names = {"architectures": [kind.__name__], "block_size": BLOCK, "dflash_config": own}
    model = kind(Qwen3Config(**names, **BODY))
    model.load_state_dict(random_weights(model.state_dict(), generator))
    model.save_pretrained(folder)
    return kind.from_pretrained(folder, attn_implementation="sdpa").eval()


def rounds(draft: Callable, block_size: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A prompt and three rounds of a drafter of two taps, whose drafts are partly kept."""
    from transformers import DynamicCache

    produced, width = sum(ACCEPTED) + len(ACCEPTED), 2 * LAYER["hidden_size"]
    features = torch.randn(PROMPT + produced, width, generator=generator)
    tokens = torch.randint(MASK, (PROMPT + produced + 1,), generator=generator)
    cache, start, known = DynamicCache(), PROMPT, 0
    starts, told = [], []
    for accepted in ACCEPTED:
        block = torch.full((1, block_size), MASK)
        block[:, 0] = tokens[start]
        positions = torch.arange(known, start + block_size)[None]
        told.append(draft(block, positions, features[None, known:start], cache))
        cache.crop(start)
        starts.append(start)
        tokens[start + 1 : start + 1 + accepted] = told[-1][0][0, :accepted]
        known, start = start, start + accepted + 1
    named = zip(("drafts", "logits", "confidence"), zip(*told, strict=True), strict=False)
    return {
        "features": features,
        "tokens": tokens,
        "start": torch.tensor(starts),
        "accepted": torch.tensor(ACCEPTED),
        **{name: torch.cat(each) for name, each in named},
    }


@torch.no_grad()
def make_domino(folder: Path, variant: str, generator: torch.Generator) -> dict[str, Tensor]:
    """The checkpoint of one variant; what is expected of it."""
    from specforge.modeling.draft.domino import DominoDraftModel

    own = {"mask_token_id": MASK, "target_layer_ids": [0, 2], "projector_type": "domino"}
    own |= {"emb_dim": 8, "gru_hidden_dim": 12, **DOMINO[variant]}
    model = made(DominoDraftModel, own, folder, generator)
    embedding, head = torch.randn(2, VOCABULARY, LAYER["hidden_size"], generator=generator)
    target = nn.Module()
    target.model, target.lm_head = nn.Module(), nn.Linear(1, 1, bias=False)
    target.model.embed_tokens = nn.Embedding.from_pretrained(embedding)
    target.lm_head.weight = nn.Parameter(0.3 * head)

    def draft(block: Tensor, positions: Tensor, features: Tensor, cache: object) -> list[Tensor]:
        states = model(
            position_ids=positions,
            noise_embedding=target.model.embed_tokens(block),
            target_hidden=features,
            past_key_values=cache,
            use_cache=True,
        )
        drafts = model._sample_draft_tokens(target, states, block)
        read = torch.cat([block[:, :1], drafts], dim=1)
        logits = model.apply_logits_head(
            target.lm_head(states)[:, None],
            prev_token_embeddings=target.model.embed_tokens(read)[:, None],
            hidden_states=states[:, None],
        )[:, 0]
        logits = logits if model.shift_label else logits[:, 1:]
        last = logits[:, drafts.shape[1] :].argmax(-1)  # of the row that its loop leaves out
        return [torch.cat([drafts, last], dim=1), logits]

    tables = {"embedding": embedding.contiguous(), "head": 0.3 * head}
    return {**tables, **rounds(draft, model.block_size, generator)}


FAMILIES = {
    "dspark": (DSPARK, make_dspark),
    "jetspec": (("plain",), make_jetspec),
    "domino": (DOMINO, make_domino),
}

if __name__ == "__main__":
    write_family(FAMILIES, __doc__)
