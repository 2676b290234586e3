"""Random targets whose layers are gated delta nets, but for the last."""

from pathlib import Path

import torch
from conftest import SHAPE, byte_tokenizer
from safetensors.torch import load_file, save_file
from toys import random_weights
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)
from transformers.models.olmo_hybrid import OlmoHybridConfig

from ttspec.drafters.checkpoint import make_drafter
from ttspec.drafters.mtp_names import published_names, unstacked

DENSE = SHAPE | {
    "max_position_embeddings": 2048,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}
MIXTURE = DENSE | {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
KINDS = {
    "qwen3_5": (Qwen3_5TextConfig, DENSE),
    "qwen3_next": (Qwen3NextConfig, MIXTURE),
    "qwen3_5_moe": (Qwen3_5MoeTextConfig, MIXTURE),
    "olmo_hybrid": (OlmoHybridConfig, DENSE),
}


def random_hybrid(kind: str) -> PreTrainedModel:
    """A random model that remembers for long: its states matter."""
    make, config = KINDS[kind]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(make(**config), dtype=torch.float32).eval()
        for name, weight in model.named_parameters():
            if name.endswith("A_log"):
                weight.uniform_(0.01, 0.2).log_()
            elif name.endswith("dt_bias"):
                weight.normal_()
            elif "conv1d" in name:
                weight.normal_(0, 0.5)
        model.lm_head.weight.mul_(0.5)
    return model


def write_with_head(folder: Path, model: PreTrainedModel) -> Path:
    """A target's folder whose files hold a random MTP head too, under its family's names."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    config = model.config.get_text_config().to_dict()
    shapes = make_drafter("mtp", {**config, "architectures": ["MTP"]}).shapes()
    head = published_names(config, unstacked(random_weights(shapes, 5)))
    weights = load_file(folder / "model.safetensors")
    assert not head.keys() & weights.keys()
    head = {n: w.contiguous().clone() for n, w in head.items()}
    save_file(weights | head, folder / "model.safetensors", {"format": "pt"})
    return folder
