"""GGUF files: a model, its end tokens and its tokenizer out of one file, for what was checked.

transformers reads GGUF files too, but drops what it does not know without a word: Llama 3.1's
rotary factors, a head size of its own, YaRN, digits split one by one. Here everything in the file
that bears on the text is either understood or refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH_NAMES, dequantize, get_tensor_name_map
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ttspec.errors import TargetError
from ttspec.models.gguf_config import ROPE_FACTORS, config_of, sampling_defaults_of
from ttspec.models.gguf_parts import read_parts
from ttspec.models.gguf_tokenizer import end_tokens, gguf_tokenizer
from ttspec.models.weight_checks import require_finite


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """A file whose header was read and understood, and none of its weights."""

    path: Path
    """The file as it was given; one of its parts where it is split."""
    meta: dict[str, Any]
    tensors: dict[str, Any]
    """Readers' tensors by the file's names; their data is mapped, not read."""
    config: PreTrainedConfig

    @property
    def architecture(self) -> str:
        """As the file calls it."""
        return self.meta["general.architecture"]

    @property
    def elements(self) -> int:
        """Weights once they are unpacked."""
        return sum(int(t.n_elements) for name, t in self.tensors.items() if name != ROPE_FACTORS)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight by transformers' name, float32 [as transformers has it], one at a time.

        Raises:
            TargetError: A tensor is missing, of another shape or no numbers, or the file holds one
                that the model has no place for.
        """
        with torch.device("meta"):
            expected = AutoModelForCausalLM.from_config(self.config).state_dict()
        kind = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}[self.architecture]
        names = get_tensor_name_map(kind, int(self.config.num_hidden_layers))
        left = self.tensors.keys() - {ROPE_FACTORS}
        for key, like in expected.items():
            if key == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            if key.endswith("experts.gate_up_proj"):
                block = f"blk.{key.split('.')[2]}"
                own = [f"{block}.ffn_gate_exps.weight", f"{block}.ffn_up_exps.weight"]
            elif key.endswith("experts.down_proj"):
                own = [f"blk.{key.split('.')[2]}.ffn_down_exps.weight"]
            else:
                own = [names.get_name(key, try_suffixes=(".weight", ".bias")) or key]
            weight = torch.cat([self._unpacked(name) for name in own], dim=-2 if own[1:] else 0)
            left -= set(own)
            require_finite(self.path, own[0], weight)
            if self.architecture == "llama" and ("q_proj" in key or "k_proj" in key):
                # A Llama's file interleaves the halves of each head for its own RoPE.
                half = int(self.config.head_dim) // 2
                weight = weight.unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)
            if self.architecture == "gemma3" and key.endswith("norm.weight"):
                weight -= 1  # a Gemma's norm multiplies by 1 + weight; its file has that sum
            if weight.shape != like.shape:
                raise TargetError(
                    f"{self.path}: {own[0]} makes {list(weight.shape)}, the model has "
                    f"{list(like.shape)}.\nThe file is damaged or of another model; fetch it again."
                )
            yield key, weight
        if left:
            raise TargetError(
                f"{self.path} holds {min(left)}, for which transformers' {self.architecture} has "
                "no place.\nUse the model's safetensors instead."
            )

    def _unpacked(self, name: str) -> Tensor:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise TargetError(f"{self.path} has no tensor {name}.\nFetch the file again.")
        return torch.tensor(dequantize(tensor.data, tensor.tensor_type))


def read_gguf(path: Path) -> GgufFile:
    """Read a file's header, or those of all its parts.

    Raises:
        TargetError: It is damaged or not complete, packed in a way that cannot be unpacked, or of
            a model that is not understood in full.
    """
    meta, tensors = read_parts(path)
    try:
        config = config_of(path, meta, tensors)
    except KeyError as error:
        raise TargetError(
            f"{path} does not say {error.args[0]}.\nFetch the file again, or use safetensors."
        ) from error
    sampling_defaults_of(path, meta)  # refuses
    return GgufFile(path=path, meta=meta, tensors=tensors, config=config)


def load_gguf(
    file: GgufFile, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with its weights unpacked into `dtype` on `device`, and its tokenizer.

    Raises:
        TargetError: Weights or tokenizer are not understood in full.
    """
    tokenizer = gguf_tokenizer(file.path, file.meta)
    with torch.device(device), no_init_weights():
        model = AutoModelForCausalLM.from_config(file.config, dtype=dtype)
    model.tie_weights()  # no_init_weights leaves it out
    places = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in file.weights():
            places[name].copy_(weight)
    model.generation_config.eos_token_id = end_tokens(file.meta, tokenizer)
    for name, value in sampling_defaults_of(file.path, file.meta).items():
        setattr(model.generation_config, name, value)
    return model, tokenizer


def convert(path: Path, folder: Path) -> None:
    """Write a GGUF file as a Hugging Face folder, in bfloat16.

    Raises:
        TargetError: See `read_gguf` and `load_gguf`.
    """
    file = read_gguf(path)
    weights = {name: w.to(torch.bfloat16).contiguous() for name, w in file.weights()}
    made = folder / "model.safetensors"
    save_file(weights, made, metadata={"format": "pt"})
    made.chmod(0o644)  # findings/safetensors_0_8_replaces_files.sh
    file.config.save_pretrained(folder)
    gguf_tokenizer(file.path, file.meta).save_pretrained(folder)
