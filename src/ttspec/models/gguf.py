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
from gguf import MODEL_ARCH_NAMES, GGUFReader, dequantize, get_tensor_name_map
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.initialization import no_init_weights
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ttspec.errors import TargetError

CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,  # and Mistral, which says it is one
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3moe": Qwen3MoeConfig,
}
"""What is read, by the file's general.architecture."""
SHAPES = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
"""Config entries by what a file calls them."""
EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
READ = {
    *SHAPES,
    *EXPERTS,
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",  # says how it was made
    "vocab_size",  # the embedding has as many rows
    "tensor_data_layout",  # says how q and k lie, which is always so for a Llama
}
"""Keys that are understood; another one of the architecture's could change the text."""
ROPE_FACTORS = "rope_freqs.weight"
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""Of every Llama 3.1 to 3.3 published; the file has the factors that they make."""
LLAMA_3_CONTEXT = 8192
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "gpt-2": None,  # ByteLevel's own
    "smollm": None,
    "llama-bpe": _WORDS.replace("DIGITS", "{1,3}"),
    "qwen2": _WORDS.replace("DIGITS", ""),
    "deepseek-r1-qwen": _WORDS.replace("DIGITS", ""),
}
"""How text is cut before its tokens are merged, by tokenizer.ggml.pre: as the models publish it."""
CONTROL, OWN_WORD = 3, 4
"""Values of tokenizer.ggml.token_type: special tokens, and words that are never cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """A file whose header was read and understood, and none of its weights."""

    path: Path
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
            TargetError: A tensor is missing, of another shape or packed in an unknown way, or the
                file holds one that the model has no place for.
        """
        with torch.device("meta"):
            wanted = AutoModelForCausalLM.from_config(self.config).state_dict()
        kind = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}[self.architecture]
        names = get_tensor_name_map(kind, int(self.config.num_hidden_layers))
        left = self.tensors.keys() - {ROPE_FACTORS}
        for key, like in wanted.items():
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
            if self.architecture == "llama" and ("q_proj" in key or "k_proj" in key):
                # A Llama's file interleaves the halves of each head for its own RoPE.
                half = int(self.config.head_dim) // 2
                weight = weight.unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)
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
        """One tensor as float32."""
        tensor = self.tensors.get(name)
        if tensor is None:
            raise TargetError(f"{self.path} has no tensor {name}.\nFetch the file again.")
        try:
            return torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        except NotImplementedError as error:
            raise TargetError(
                f"{self.path}: {name} is packed as {tensor.tensor_type.name}, which the package "
                "gguf cannot unpack.\nUse a file of another type, such as Q4_K_M, Q8_0 or BF16."
            ) from error


def read_gguf(path: Path) -> GgufFile:
    """Read a file's header.

    Raises:
        TargetError: It is damaged, or of a model that is not understood in full.
    """
    try:
        reader = GGUFReader(path)
        meta = {key: field.contents() for key, field in reader.fields.items()}
    except (OSError, ValueError, IndexError, KeyError, OverflowError) as error:
        raise TargetError(
            f"{path} is no complete GGUF file: {str(error).partition(chr(10))[0]}.\n"
            "Copy or download it again."
        ) from error
    architecture = str(meta.get("general.architecture"))
    if architecture not in CONFIGS:
        raise TargetError(
            f"{path} is a GGUF file of {architecture!r}; read are {', '.join(CONFIGS)}.\n"
            "Use the model's safetensors instead."
        )
    if int(meta.get("split.count", 1)) > 1:
        raise TargetError(
            f"{path} is one of {meta['split.count']} parts.\n"
            "Make one file of them with llama.cpp's llama-gguf-split --merge."
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    try:
        config = _config(path, meta, tensors)
    except KeyError as error:
        raise TargetError(
            f"{path} does not say {error.args[0]}.\nFetch the file again, or use safetensors."
        ) from error
    return GgufFile(path=path, meta=meta, tensors=tensors, config=config)


def load_gguf(
    file: GgufFile, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with its weights unpacked into `dtype` on `device`, and its tokenizer.

    Raises:
        TargetError: Weights or tokenizer are not understood in full.
    """
    tokenizer = gguf_tokenizer(file)
    with torch.device(device), no_init_weights():
        model = AutoModelForCausalLM.from_config(file.config, dtype=dtype)
    model.tie_weights()  # no_init_weights leaves it out
    places = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in file.weights():
            places[name].copy_(weight)
    get = file.meta.get
    ends = [get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    model.generation_config.eos_token_id = sorted({int(end) for end in ends if end is not None})
    return model, tokenizer


def convert(path: Path, folder: Path) -> None:
    """Write a GGUF file as a Hugging Face folder, in bfloat16.

    Raises:
        TargetError: See `read_gguf` and `load_gguf`.
    """
    file = read_gguf(path)
    weights = {name: w.to(torch.bfloat16).contiguous() for name, w in file.weights()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    file.config.save_pretrained(folder)
    gguf_tokenizer(file).save_pretrained(folder)


def _config(path: Path, meta: dict[str, Any], tensors: dict[str, Any]) -> PreTrainedConfig:
    """A transformers config that says all that the file's keys say."""
    architecture = meta["general.architecture"]
    own = {
        key.removeprefix(f"{architecture}."): value
        for key, value in meta.items()
        if key.startswith(f"{architecture}.")
    }
    known = READ if architecture == "qwen3moe" else READ - EXPERTS.keys()
    odd = sorted(key for key in own.keys() - known if own[key] not in (0, False, None))
    if odd:
        raise TargetError(
            f"{path} sets {architecture}.{odd[0]} = {own[odd[0]]!r}, which ttspec does not read "
            "from GGUF files.\nUse the model's safetensors instead."
        )
    values = {name: own[key] for key, name in SHAPES.items()}
    heads = own["attention.head_count"]
    size = int(own.get("attention.key_length", own["embedding_length"] // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if int(own.get(key, size)) != size:
            raise TargetError(
                f"{path} sets {architecture}.{key} = {own[key]}, and its heads have {size}.\n"
                "Use the model's safetensors instead."
            )
    if architecture != "qwen2":  # which has none of its own
        values["head_dim"] = size
    if architecture == "qwen3moe":
        values |= {name: own[key] for key, name in EXPERTS.items()}
        values["norm_topk_prob"] = True  # llama.cpp always does
    kind = CONFIGS[architecture]
    values |= {
        "architectures": [kind.__name__.replace("Config", "ForCausalLM")],
        "dtype": "bfloat16",
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "num_key_value_heads": own.get("attention.head_count_kv", heads),
        "rope_parameters": _rope(path, own, tensors.get(ROPE_FACTORS), size),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
    }
    return kind(**values)


def _rope(path: Path, own: dict[str, Any], factors: Any, size: int) -> dict[str, Any]:
    """Rotary positions: base, and the scaling that the file's keys or factors say."""
    base = float(own.get("rope.freq_base", 10000.0))
    kind = own.get("rope.scaling.type") or "none"
    if kind in ("linear", "yarn"):
        rope = {"rope_type": kind, "rope_theta": base, "factor": own["rope.scaling.factor"]}
        if kind == "yarn":
            context = own["rope.scaling.original_context_length"]
            rope["original_max_position_embeddings"] = context
        return rope
    if kind != "none":
        raise TargetError(
            f"{path} scales its rotary positions by {kind!r}; read are linear and yarn.\n"
            "Use the model's safetensors instead."
        )
    if factors is None:
        return {"rope_type": "default", "rope_theta": base}
    found = torch.tensor(dequantize(factors.data, factors.tensor_type)).flatten()
    rope = {
        "rope_type": "llama3",
        "rope_theta": base,
        "factor": float(found.max()),
        "original_max_position_embeddings": LLAMA_3_CONTEXT,
        **LLAMA_3,
    }
    if not torch.allclose(found, llama3_factors(rope, size), rtol=1e-3):
        raise TargetError(
            f"{path} has rotary factors in {ROPE_FACTORS} that are not Llama 3.1's.\n"
            "Use the model's safetensors instead."
        )
    return rope


def llama3_factors(rope: dict[str, Any], size: int) -> Tensor:
    """What Llama 3.1 divides each rotary frequency of a head by, float32 [size / 2]."""
    waves = 2 * torch.pi * rope["rope_theta"] ** (torch.arange(0, size, 2) / size)
    turns = rope["original_max_position_embeddings"] / waves
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / rope["factor"] + smooth)


def gguf_tokenizer(file: GgufFile) -> PreTrainedTokenizerBase:
    """The tokenizer, from the file or, where it cannot be told, from tokenizer.json beside it.

    Raises:
        TargetError: It cannot be told, and none lies there.
    """
    get = {k.removeprefix("tokenizer.ggml."): v for k, v in file.meta.items()}.get
    tokens = get("tokens") or []
    model, pre = get("model"), get("pre") or "no tokenizer.ggml.pre"
    if model != "gpt2" or pre not in SPLITS or not get("merges"):
        return _tokenizer_beside(file, tokens, f"{model!r}, {pre!r}")
    merges = [tuple(merge.split(" ")) for merge in get("merges", ())]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = _cuts(pre)
    if "qwen" in pre:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    types = list(zip(tokens, get("token_type") or [], strict=False))
    backend.add_special_tokens([token for token, kind in types if kind == CONTROL])
    words = [token for token, kind in types if kind == OWN_WORD]
    backend.add_tokens([AddedToken(word, normalized=False) for word in words])
    roles = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}
    ids = {role: get(f"{name}_token_id") for name, role in roles.items()}
    special = {f"{role}_token": tokens[i] for role, i in ids.items() if i is not None}
    if get("add_bos_token", pre == "llama-bpe") and "bos_token" in special:
        bos = special["bos_token"]
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, ids["bos"])]
        )
    template = file.meta.get("tokenizer.chat_template")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special, chat_template=template)


def _cuts(pre: str) -> pre_tokenizers.PreTokenizer:
    if pre == "smollm":
        first = pre_tokenizers.Digits(individual_digits=True)
    elif SPLITS[pre] is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        first = pre_tokenizers.Split(Regex(SPLITS[pre]), behavior="isolated")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre == "smollm")
    return pre_tokenizers.Sequence([first, last])


def _tokenizer_beside(file: GgufFile, tokens: list[str], said: str) -> PreTrainedTokenizerBase:
    """The model's own, if it lies there and has the same tokens."""
    folder = file.path.parent
    if not (folder / "tokenizer.json").is_file():
        raise TargetError(
            f"{file.path} has a tokenizer ({said}) that ttspec does not build; it does "
            f"{', '.join(SPLITS)}.\nPut the model's tokenizer.json and tokenizer_config.json "
            "beside it."
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    theirs = tokenizer.get_vocab()
    odd = sum(i >= len(tokens) or tokens[i] != token for token, i in theirs.items())
    if odd > len(theirs) // 100:  # a file may spell its spare tokens otherwise
        raise TargetError(
            f"{folder / 'tokenizer.json'} gives {odd:,} of {len(theirs):,} tokens other ids than "
            f"{file.path.name}.\nPut the tokenizer of the same model there."
        )
    if tokenizer.chat_template is None:
        tokenizer.chat_template = file.meta.get("tokenizer.chat_template")
    return tokenizer
