r"""Write the golden tensors of `tests/goldens`: toy drafters run by their authors' own packages.

Two environments, since the packages pin different versions of transformers. EAGLE-3:

    python3.11 -m venv /tmp/golden-eagle3
    /tmp/golden-eagle3/bin/pip install torch==2.13.0  # the CPU build
    /tmp/golden-eagle3/bin/pip install transformers==5.19.0 safetensors==0.8.0 numpy==2.4.6 \
        datasets==5.1.0 openai==3.57.0 loguru==0.7.3 pydantic==2.14.4 pydantic-settings==2.16.3 \
        huggingface-hub==2.4.0 aiohttp psutil protobuf httpx
    /tmp/golden-eagle3/bin/pip install --no-deps speculators==0.9.0 hs-connectors==0.9.0
    /tmp/golden-eagle3/bin/python scripts/make_goldens.py eagle3
    /tmp/golden-eagle3/bin/python scripts/make_goldens.py peagle
    /tmp/golden-eagle3/bin/python scripts/make_goldens.py speculators-mtp
    /tmp/golden-eagle3/bin/python scripts/make_goldens.py speculators-dflash
    /tmp/golden-eagle3/bin/python scripts/make_goldens.py speculators-dspark

DFlash:

    python3.11 -m venv /tmp/golden-dflash
    /tmp/golden-dflash/bin/pip install torch==2.13.0
    /tmp/golden-dflash/bin/pip install transformers==5.15.0 safetensors==0.8.0 numpy==2.4.6
    /tmp/golden-dflash/bin/pip install --no-deps dflash==0.1.0
    /tmp/golden-dflash/bin/python scripts/make_goldens.py dflash
    /tmp/golden-dflash/bin/python scripts/make_goldens.py dflash2

`--no-deps` leaves out what model code never imports (torchvision and torchaudio, data sets for
benchmarks). Nothing in the packages is patched. Run twice, the files have the same bytes; another
kind of processor may change the last bits of `logits`.

EAGLE-3, eagle3-*: the checkpoint is what `save_pretrained` of speculators wrote. It is read back
before use: by hand, since `from_pretrained` wants the target's weights too. `forward` of
`Eagle3DraftModel` does all steps itself (by flex attention, its default) and returns only tokens,
so a hook on its `lm_head` keeps the logits. It pads shifted tokens with zeros: K more rows follow
the T that are kept, then padding up to the block of flex attention (document -1, as in training).
No kept row sees these rows. Their features are zeros.

    features [T, W]     target taps of tokens 0 to T-1
    tokens [T+K+1]      row i of step j reads token i+1+j
    logits [K, T, D]    of the draft vocabulary; RoPE position i+j, teacher forced

P-EAGLE, peagle-*: the same, with one pass over all blocks. Of `generate_cod_sample_indices` a ratio
above 1 keeps every mask, so that nothing is random. Row i of step j is the j-th of the block whose
first row is i; what runs past the end is NaN.

MTP, speculators-mtp-*: the checkpoint is what `save_pretrained` of speculators wrote. Its `forward`
trains: the rows of a later step see that step's rows alone, where a drafted chain sees real ones.
So only its first step, the first draft after each token, can be compared.

    embedding, head [V, H]      of the target
    features [T, H]     the target's last hidden state of tokens 0 to T-1
    tokens [T+1]
    logits [T-1, V]     row i is drafted after tokens 0 to i+1

DFlash and DSpark of speculators, speculators-dflash-* and speculators-dspark-*: their `forward`
trains, too: blocks at three anchors, which only the loss mask allows, after the features before
each. It returns no logits, so what it hands to its metrics is kept. A block knows its tokens.

    embedding, head [V, H]      of the target
    features [T, W], tokens [T+1]
    start [3]                   position of each block's known token
    logits [3, G, V]            of the rows that predict
    confidence [3, G]           DSpark's, logits, where the anchor predicts

DFlash, dflash-*: the configs follow the two published styles (before and since transformers 5).
`dflash_generate` runs as it is, against a target that says what a script says: features by
position, and greedy tokens that accept so many drafts. A hook on the target's head keeps the
logits. Rejected tokens get features that must not be seen again.

    embedding, head [V, H]      of the target
    features [T, W]             target taps, by position
    tokens [T+1]                prompt, then what three rounds committed, then the pending token
    start, pending, accepted    [3] position and id of each round's pending token, drafts accepted
    logits [3, block-1, V]      of draft rows 1 to block-1

DFlash2, dflash2-*: the same at temperature 1, where the selector says what it draws from. The
target is certain, so that drafts are kept as the script says.

    logits [3, block-1, V]                  of the head alone
    drafts [3, block-1]                     as they were drawn
    candidates, q [3, block-1, k]           their ids, and what the drafts were drawn from
"""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

REPOSITORY = Path(__file__).resolve().parent.parent
VOCABULARY, DRAFT_VOCABULARY, MASK, BLOCK = 260, 100, 259, 5
TOKENS, STEPS = 24, 4  # of EAGLE-3
FLEX_BLOCK = 128  # flex attention reads whole blocks of rows
PROMPT, ACCEPTED = 12, (2, 0, 4)  # of DFlash
CERTAIN = 1e4  # logit of what a scripted target says

LAYER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # heads together are wider than the hidden state
    "rms_norm_eps": 0.01,  # large, so that a drafter that reads it wrongly shows
    "vocab_size": VOCABULARY,
}
LLAMA = {"model_type": "llama", "rope_theta": 500000.0}
QWEN3 = {"model_type": "qwen3", "rope_theta": 1000000.0}
EAGLE3 = {  # variant: transformer layer, options
    "plain": (LLAMA, {}),
    "norm-before-residual": (LLAMA, {"norm_before_residual": True, "aux": [2, 4, 5]}),
    "3.1": (LLAMA, {"fc_norm": True, "norm_output": True, "aux": [2, 4, 5]}),
    "norm-before-fc": (LLAMA, {"norm_before_fc": True, "aux": [2, 4, 5]}),
    "qwen3": (QWEN3, {"norm_before_residual": True, "aux": [2, 4, 5]}),
    "layers": ({**LLAMA, "num_hidden_layers": 3}, {"norm_before_residual": True, "aux": [2, 5]}),
}
DFLASH = {
    "full": {
        "block_size": BLOCK,
        "dflash_config": {"mask_token_id": MASK, "target_layer_ids": [0, 1, 2]},
        "layer_types": ["full_attention", "full_attention"],
        "rope_theta": 1000000,
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "sliding": {
        "dflash_config": {"block_size": BLOCK, "mask_token_id": MASK, "target_layer_ids": [0, 2]},
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_theta": 10000000, "rope_type": "default"},
        "sliding_window": 8,
        "use_sliding_window": True,
    },
}

SELECTOR = {
    "dflash_config": {
        "conv_group_size": 8,
        "conv_kernel_size": 2,
        "mask_token_id": MASK,
        "selector_rank": 8,
        "selector_top_k": 6,
        "target_layer_ids": [0, 2],
    },
    "layer_types": ["full_attention", "full_attention"],
    "rope_theta": 1000000,
}
DFLASH2 = {
    "plain": {"block_size": BLOCK, "is_causal": False},
    "sliding": {
        "block_size": BLOCK,
        "layer_types": ["sliding_attention", "sliding_attention"],
        "sliding_window": 8,
        "use_sliding_window": True,
    },
}


def random_weights(shapes: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Matrices of standard deviation 0.2, norms around 1."""
    weights = {k: torch.randn(v.shape, generator=generator) for k, v in sorted(shapes.items())}
    return {k: 1 + 0.3 * w if w.dim() == 1 else 0.2 * w for k, w in weights.items()}


def kept_outputs(module: nn.Module) -> list[Tensor]:
    """A list that grows by the module's output, without the row, at each call."""
    outputs: list[Tensor] = []
    module.register_forward_hook(lambda *call: outputs.append(call[-1][0].clone()))
    return outputs


@torch.no_grad()
def make_eagle3(
    folder: Path, layer: dict, options: dict, generator: torch.Generator, *, parallel: bool = False
) -> dict[str, Tensor]:
    """The checkpoint of one variant of EAGLE-3, or of P-EAGLE; what is expected of it."""
    from speculators import SpeculatorsConfig, VerifierConfig
    from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
    from speculators.models.peagle import PEagleDraftModel, PEagleSpeculatorConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from speculators.train.vocab_mapping import build_vocab_mappings_from_distribution

    options = dict(options)
    taps = len(options.get("aux") or "abc")
    kinds = Eagle3DraftModel, Eagle3SpeculatorConfig
    if parallel:
        kinds, options["mask_token_id"] = (PEagleDraftModel, PEagleSpeculatorConfig), MASK
    config = kinds[1](
        transformer_layer_config={"num_hidden_layers": 1, **LAYER, **layer},
        draft_vocab_size=DRAFT_VOCABULARY,
        eagle_aux_hidden_state_layer_ids=options.pop("aux", None),
        speculators_config=SpeculatorsConfig(
            algorithm="peagle" if parallel else "eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=STEPS)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path="toy/target", architectures=[]),
        ),
        **options,
    )
    model = kinds[0](config)
    parameters = {k: p.data for k, p in model.named_parameters()}
    model.load_state_dict(random_weights(parameters, generator), strict=False)
    counts = torch.randperm(VOCABULARY, generator=generator).tolist()
    d2t, t2d = build_vocab_mappings_from_distribution(
        dict(enumerate(counts)), DRAFT_VOCABULARY, VOCABULARY
    )
    model.load_vocab_mappings(t2d, d2t)
    model.save_pretrained(folder)
    (folder / "config.py").unlink()  # the package's source

    model = kinds[0](kinds[1].from_pretrained(folder)).eval()
    report = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not report.unexpected_keys, report
    assert all(name.startswith("verifier_") for name in report.missing_keys), report
    logits = kept_outputs(model.lm_head)
    features = torch.randn(TOKENS, taps * LAYER["hidden_size"], generator=generator)
    tokens = torch.randint(VOCABULARY, (TOKENS + STEPS + 1,), generator=generator)
    if parallel:
        from speculators.losses import resolve_loss_config

        loss_mask = torch.ones(1, TOKENS)
        loss_mask[0, 0] = 0  # a mask after it would have no first row
        model(
            hidden_states=features[None],
            input_ids=tokens[None, 1 : TOKENS + 1],
            document_ids=torch.zeros(1, TOKENS, dtype=torch.long),
            loss_mask=loss_mask,
            loss_config=resolve_loss_config("ce", "eager"),
            verifier_last_hidden_states=torch.zeros(1, TOKENS, LAYER["hidden_size"]),
            num_depths=STEPS,
            down_sample_ratio=2.0,
        )
        found = torch.full((STEPS, TOKENS, DRAFT_VOCABULARY), float("nan"))
        parts = logits[0].split([TOKENS - step for step in range(STEPS)])
        for step, part in enumerate(parts):
            found[step, : len(part)] = part
        return {"features": features, "tokens": tokens, "logits": found}
    rows = torch.arange(FLEX_BLOCK)
    model(
        hidden_states=nn.functional.pad(features, (0, 0, 0, FLEX_BLOCK - TOKENS))[None],
        input_ids=nn.functional.pad(tokens[1:], (0, FLEX_BLOCK - TOKENS - STEPS))[None],
        document_ids=torch.where(rows < TOKENS + STEPS, 0, -1)[None],
        position_ids=rows[None],
        ttt_steps=STEPS,
    )
    return {
        "features": features,
        "tokens": tokens,
        "logits": torch.stack(logits)[:, :TOKENS].contiguous(),
    }


@torch.no_grad()
def make_mtp(folder: Path, options: dict, generator: torch.Generator) -> dict[str, Tensor]:
    """The checkpoint of an MTP head of speculators; what is expected of its first drafts."""
    from speculators import SpeculatorsConfig, VerifierConfig
    from speculators.models.mtp import MTPDraftModel, MTPSpeculatorConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig

    config = MTPSpeculatorConfig(
        transformer_layer_config={**LAYER, **options},
        speculators_config=SpeculatorsConfig(
            algorithm="mtp",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=1)],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path="toy/target", architectures=[]),
        ),
    )
    model = MTPDraftModel(config).eval()
    del model.verifier_lm_head  # as where the verifier's weights are read
    shapes = {n: p for n, p in model.named_parameters() if n.startswith("mtp_layers.")}
    model.load_state_dict(random_weights(shapes, generator), strict=False)
    model.save_pretrained(folder)
    (folder / "config.py").unlink(missing_ok=True)  # the package's source
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    embedding, head = torch.randn(2, VOCABULARY, LAYER["hidden_size"], generator=generator)
    model.embed_tokens.weight.data, model.lm_head.weight.data = embedding, 0.3 * head
    features = torch.randn(TOKENS, LAYER["hidden_size"], generator=generator)
    tokens = torch.randint(VOCABULARY, (TOKENS + 1,), generator=generator)
    (logits,), _, _ = model(input_ids=tokens[None], hidden_states=features[None])
    tables = {"embedding": embedding.contiguous(), "head": 0.3 * head}
    return {**tables, "features": features, "tokens": tokens, "logits": logits[0].contiguous()}


@torch.no_grad()
def make_blocks(
    folder: Path, kind: str, options: dict, generator: torch.Generator
) -> dict[str, Tensor]:
    """The checkpoint of a DFlash or DSpark of speculators; what is expected of three blocks."""
    from importlib import import_module

    from speculators import SpeculatorsConfig, VerifierConfig
    from speculators.proposals.greedy import GreedyTokenProposalConfig

    package = import_module(f"speculators.models.{kind}")
    name = {"dflash": "DFlash", "dspark": "DSpark"}[kind]
    from_anchor = options.get("sample_from_anchor", False)
    config = getattr(package, f"{name}SpeculatorConfig")(
        transformer_layer_config={**LAYER, **QWEN3, "num_hidden_layers": 2},
        draft_vocab_size=VOCABULARY,
        block_size=BLOCK,
        mask_token_id=MASK,
        aux_hidden_state_layer_ids=[1, 3],
        speculators_config=SpeculatorsConfig(
            algorithm=kind,
            proposal_methods=[
                GreedyTokenProposalConfig(speculative_tokens=BLOCK - 1 + from_anchor)
            ],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path="toy/target", architectures=[]),
        ),
        **options,
    )
    config.transformer_layer_config._attn_implementation = "eager"
    model = getattr(package, f"{name}DraftModel")(config).eval()
    lent = ("embed_tokens.", "lm_head.", "verifier_")
    shapes = {n: p for n, p in model.named_parameters() if not n.startswith(lent)}
    model.load_state_dict(random_weights(shapes, generator), strict=False)
    model.save_pretrained(folder)
    (folder / "config.py").unlink(missing_ok=True)  # the package's source
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    embedding, head = torch.randn(2, VOCABULARY, LAYER["hidden_size"], generator=generator)
    head = 0.3 * head
    model.embed_tokens.weight.data, model.lm_head.weight.data = embedding, head
    model.verifier_lm_head.weight.data = head
    features = torch.randn(TOKENS, 2 * LAYER["hidden_size"], generator=generator)
    tokens = torch.randint(MASK, (TOKENS + 1,), generator=generator)
    start = PROMPT + torch.tensor([0, *(a + 1 for a in ACCEPTED[:-1])]).cumsum(0)
    told: list[tuple] = []
    core = import_module(f"speculators.models.{kind}.core")
    core.compute_metrics = lambda *given, **_: told.append(given) or (None, {})
    model(
        hidden_states=features[None],
        input_ids=tokens[None, :TOKENS],
        loss_mask=torch.zeros(1, TOKENS).index_fill(1, start, 1),
        verifier_last_hidden_states=torch.zeros(1, TOKENS, LAYER["hidden_size"]),
        document_ids=torch.zeros(1, TOKENS, dtype=torch.long),
        max_anchors=len(start),
    )
    logits = told[0][0].view(len(start), BLOCK, -1)
    expected = {"embedding": embedding.contiguous(), "head": head, "features": features}
    expected |= {"tokens": tokens, "start": start}
    expected["logits"] = (logits if from_anchor else logits[:, 1:]).contiguous()
    if from_anchor and kind == "dspark":
        expected["confidence"] = told[0][2].view(len(start), BLOCK)
    return expected


class ScriptedTarget(nn.Module):
    """A target whose features and greedy tokens are decided beforehand."""

    def __init__(
        self, layer_ids: list[int], features: Tensor, embedding: Tensor, head: Tensor
    ) -> None:
        from transformers import Qwen3Config

        super().__init__()
        self.config = Qwen3Config(num_hidden_layers=1)  # for its cache
        self.device = features.device
        self.layer_ids, self.features = layer_ids, features
        self.embedding = nn.Embedding.from_pretrained(embedding)
        self.lm_head = nn.Linear(*reversed(head.shape), bias=False)
        self.lm_head.weight.data = head
        self.script = iter((PROMPT - 1, *ACCEPTED))
        self.start, self.pending = [], []

    def get_input_embeddings(self) -> nn.Module:
        """The table that draft blocks are embedded with."""
        return self.embedding

    def forward(
        self, ids: Tensor, position_ids: Tensor, past_key_values, logits_to_keep: int = 0, **_
    ) -> SimpleNamespace:
        """Agree with as many tokens as the script says, then say something else."""
        self.start.append(position_ids[0, 0].item())
        self.pending.append(ids[0, 0].item())
        accepted = next(self.script)
        says = ids[0].roll(-1)
        says[accepted] = (says[accepted] + 7) % MASK
        features = self.features[position_ids[0]]
        features[accepted + 1 :] += 9
        parts = features[None].chunk(len(self.layer_ids), -1)
        states = {layer + 1: part for layer, part in zip(self.layer_ids, parts, strict=True)}
        row = torch.zeros(1, 1, len(says), 1)
        past_key_values.update(row, row, 0)  # only its length is looked at
        logits = CERTAIN * nn.functional.one_hot(says, VOCABULARY).float()[None]
        return SimpleNamespace(logits=logits[:, -logits_to_keep:], hidden_states=states)


def make_dflash(
    folder: Path, options: dict, generator: torch.Generator, *, second: bool = False
) -> dict[str, Tensor]:
    """The checkpoint of one variant of DFlash, or of DFlash2; what is expected of it."""
    from dflash.model import DFlash2DraftModel, DFlashDraftModel, dflash_generate
    from transformers import AutoConfig

    kind = DFlash2DraftModel if second else DFlashDraftModel
    config = {
        "architectures": [kind.__name__],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "dtype": "float32",
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "max_window_layers": 2,
        "model_type": "qwen3",
        "num_hidden_layers": 2,
        "num_target_layers": 4,
        "tie_word_embeddings": False,
        **LAYER,
        **options,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    shapes = kind(AutoConfig.from_pretrained(folder)).state_dict()
    weights = random_weights(shapes, generator)
    # As published; the package reads them by another name.
    weights = {n.replace("codebook.weight", "codebook"): w for n, w in weights.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})

    model, report = kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    assert not any(report.values()), report
    produced = sum(ACCEPTED) + len(ACCEPTED)
    width = len(model.target_layer_ids) * LAYER["hidden_size"]
    features = torch.randn(PROMPT + produced, width, generator=generator)
    embedding, head = torch.randn(2, VOCABULARY, LAYER["hidden_size"], generator=generator)
    head = 0.3 * head
    prompt = torch.randint(VOCABULARY - 1, (1, PROMPT), generator=generator)
    target = ScriptedTarget(model.target_layer_ids, features, embedding, head)
    logits = kept_outputs(target.lm_head)
    proposals: list[tuple[Tensor, ...]] = []
    if second:
        propose = model.propose
        model.propose = lambda *given: proposals.append(propose(*given)) or proposals[-1]
    options = {"stop_token_ids": None, "temperature": float(second)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokens = dflash_generate(model.eval(), target, prompt, produced + 1, **options)[0]
    assert len(tokens) == len(features) + 1
    drawn = zip(("drafts", "candidates", "q"), zip(*proposals, strict=True), strict=False)
    return {
        "embedding": embedding.contiguous(),
        "head": head,
        "features": features,
        "tokens": tokens.clone(),
        "start": torch.tensor(target.start[1:]),
        "pending": torch.tensor(target.pending[1:]),
        "accepted": torch.tensor(ACCEPTED),
        "logits": torch.stack(logits),
        **{name: torch.cat(parts) for name, parts in drawn},
    }


def write_family(families: dict, about: str) -> None:
    """Write the goldens of the family that the command names: of all variants, in order."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("family", choices=list(families), help="whose environment this is")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "tests" / "goldens")
    args = parser.parse_args()
    torch.set_num_threads(1)
    variants, make = families[args.family]
    for seed, variant in enumerate(variants):
        folder = args.out / f"{args.family}-{variant}"
        expected = make(folder, variant, torch.Generator().manual_seed(seed))
        save_file(expected, folder / "expected.safetensors")
        print(folder, {name: list(tensor.shape) for name, tensor in expected.items()})


PEAGLE = {
    "plain": ({**LLAMA, "num_hidden_layers": 2}, {"norm_before_residual": True, "aux": [2, 4, 5]}),
    "3.1": (LLAMA, {"fc_norm": True, "norm_output": True, "aux": [2, 4, 5]}),
}
MTP = {
    "qwen3": {"model_type": "qwen3", "num_hidden_layers": 2, "rope_theta": 1000000.0},
    "qwen3.5": {
        "model_type": "qwen3_5_text",
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    },
}
SPECULATORS = {
    "dflash": {"plain": {}},
    "dspark": {
        "vanilla": {"markov_rank": 8, "sample_from_anchor": True},
        "gated": {
            "markov_rank": 8,
            "markov_head_type": "gated",
            "sample_from_anchor": False,
            "enable_confidence_head": False,
        },
    },
}
FAMILIES = {  # variants, and what makes one
    "eagle3": (EAGLE3, lambda folder, name, noise: make_eagle3(folder, *EAGLE3[name], noise)),
    "peagle": (
        PEAGLE,
        lambda folder, name, noise: make_eagle3(folder, *PEAGLE[name], noise, parallel=True),
    ),
    "speculators-mtp": (MTP, lambda folder, name, noise: make_mtp(folder, MTP[name], noise)),
    "speculators-dflash": (
        SPECULATORS["dflash"],
        lambda folder, name, noise: make_blocks(
            folder, "dflash", SPECULATORS["dflash"][name], noise
        ),
    ),
    "speculators-dspark": (
        SPECULATORS["dspark"],
        lambda folder, name, noise: make_blocks(
            folder, "dspark", SPECULATORS["dspark"][name], noise
        ),
    ),
    "dflash": (DFLASH, lambda folder, name, noise: make_dflash(folder, DFLASH[name], noise)),
    "dflash2": (
        DFLASH2,
        lambda folder, name, noise: make_dflash(
            folder, {**SELECTOR, **DFLASH2[name]}, noise, second=True
        ),
    ),
}

if __name__ == "__main__":
    write_family(FAMILIES, __doc__)
