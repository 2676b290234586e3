"""A target's files, read: config first, then tokenizer and weights, on one device or over several.

Runs no code that came with the files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ttspec.errors import OptionError, ResourceError, TargetError
from ttspec.models.gptq import refuse_biases
from ttspec.models.packed import can_pack
from ttspec.models.quantised import (
    refuse_unsupported,
    require_package,
    require_plain,
    require_products,
    unpack_linears,
    unpacked_bytes,
    unpacking_options,
    unpacks_on_load,
)
from ttspec.models.source import Source
from ttspec.models.unsupported import softcap_of
from ttspec.models.weight_checks import (
    refuse_layers,
    require_finite_weights,
    require_size,
    require_whole,
)

if TYPE_CHECKING:
    from ttspec.models.gguf import GgufFile

DeviceMap = str | dict[str, Any]
"""\"auto\" spreads layers over all GPUs; or a device for each module, as accelerate takes it."""
TOKENIZERS = ("tokenizer.json", "*.model", "vocab.*", "tekken.json")
"""Files of which a folder has one at least."""
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
SIZES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
"""Bytes of an element by its name in a safetensors header; what is in neither has one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """A target whose config was read, and none of its weights."""

    source: Source
    config: Any
    gguf: GgufFile | None = None

    @property
    def quantised(self) -> bool:
        """Whether the weights in the files are packed."""
        return bool(getattr(self.config, "quantization_config", None))

    def nbytes(self, dtype: torch.dtype, device: torch.device) -> int:
        """Bytes of the weights once they are loaded in `dtype`, told from headers."""
        text, packed_head = self.config.get_text_config(), 0
        if device.type == "cpu" and can_pack(dtype):
            packed_head = text.vocab_size * text.hidden_size * dtype.itemsize
        if self.gguf:
            return packed_head + self.gguf.elements * dtype.itemsize
        if unpacks_on_load(self.config):
            return packed_head + unpacked_bytes(self.config, dtype)
        return packed_head + stored_bytes(self.source.path, None if self.quantised else dtype)

    def load(
        self, device: torch.device, dtype: torch.dtype, device_map: DeviceMap | None = None
    ) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model, on a device or spread as `device_map` says, and its tokenizer.

        Raises:
            TargetError: transformers cannot load them, or a drafter could not use them.
            ResourceError: A package is missing, or the GPUs are too small together.
        """
        path = self.source.path
        if device_map is not None:
            _check_map(device_map, self.gguf)
        if self.gguf:
            from ttspec.models.gguf import load_gguf

            return load_gguf(self.gguf, device, dtype)
        spread = device_map
        if self.quantised and device.type != "cpu":  # packed weights cannot be moved later
            require_package("accelerate", "a quantised target on a GPU")
            spread = spread or {"": device}
        options: dict[str, Any] = {} if spread is None else {"device_map": spread}
        if softcap_of(self.config):  # transformers 5.17's other attention drops the cap
            options["attn_implementation"] = "eager"
        # Of another shape than the config's, or missing: refused by name, rather than drawn.
        options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
        tokenizer = _tokenizer_in(path)
        try:
            if unpacks_on_load(self.config):
                place = torch.device("cpu") if device_map else device
                options |= unpacking_options(path, self.config, place)
            loaded: Any = _read_model(path, dtype=dtype, **options)
        except (TargetError, torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # configs of others raise whatever they like
            raise _not_loaded(path, error) from error
        model, found = loaded
        require_whole(path, found)
        if places := getattr(model, "hf_device_map", None):
            _refuse_places(f"{path} does not fit into the GPUs", places)
        if unpacks_on_load(self.config):
            unpack_linears(model, dtype)
        if self.quantised:
            require_plain(path, model)
            require_products(path, model, dtype)
        elif device_map is None:
            model = cast(PreTrainedModel, torch.nn.Module.to(model, device))
        require_finite_weights(path, model)
        return model, tokenizer


def _read_model(path: Path, **options: Any) -> Any:
    """The model by transformers, and what it found; of a folder, or of a `state_dict`."""
    options |= {"use_safetensors": True, "trust_remote_code": False}
    if "state_dict" not in options:
        return AutoModelForCausalLM.from_pretrained(path, **options)
    with torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(options["config"]))
    model, found = kind.from_pretrained(None, **options)
    refuse_biases(path, options["state_dict"], found["unexpected_keys"])
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model, found


def open_files(source: Source) -> Files:
    """Read a target's config.

    Raises:
        TargetError: transformers does not know it, it needs code of its own, its weights are
            quantised in a way that was not tried, or are far fewer than it asks for.
    """
    if source.origin == "gguf":
        from ttspec.models.gguf import read_gguf  # here, for the gguf package takes a while

        file = read_gguf(source.path)
        require_size(source.path, file.config, file.elements)
        return Files(source=source, config=file.config, gguf=file)
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        given = _require_json(source.path / name)
        if name == "config.json":
            _refuse_layers(source.path, given)
    try:
        config = AutoConfig.from_pretrained(source.path, trust_remote_code=False)
    except Exception as error:  # strict configs have errors of their own
        if "trust_remote_code" in str(error):
            raise TargetError(
                f"{source.path} is a model with Python code of its own (auto_map in config.json), "
                "which ttspec never runs.\nGive a model that transformers knows by itself."
            ) from error
        raise _not_loaded(source.path, error) from error
    refuse_unsupported(source.path, config)
    files = Files(source=source, config=config)
    if not files.quantised:
        require_size(source.path, config, sum(count for _, count in _stored(source.path)))
    return files


def _tokenizer_in(path: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # tokenizers of others raise whatever they like
        if not any(any(path.glob(pattern)) for pattern in TOKENIZERS):
            raise TargetError(
                f"{path} has no tokenizer: no {', '.join(TOKENIZERS)}.\n"
                "Copy or download the model's tokenizer files too."
            ) from error
        raise TargetError(
            f"{path}: its tokenizer cannot be loaded: {_reason(path, error)}\n"
            "Copy or download the model's tokenizer files again."
        ) from error
    add_template(tokenizer, path)
    return tokenizer


def add_template(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Give a tokenizer the chat template of `chat_template.json`, which processors alone read.

    Raises:
        TargetError: The file is damaged.
    """
    file = folder / "chat_template.json"
    if tokenizer.chat_template is not None or not file.is_file():
        return
    try:
        given = json.loads(file.read_text(encoding="utf-8-sig"))["chat_template"]
        if isinstance(given, list):  # several, each with its name
            given = {each["name"]: each["template"] for each in given}
    except (ValueError, KeyError, TypeError) as error:
        raise TargetError(
            f"{file.parent}: chat_template.json has no chat template: {error!r}.\n"
            'It is {"chat_template": TEXT}; mend it or delete it.'
        ) from error
    tokenizer.chat_template = given


def stored_bytes(folder: Path, dtype: torch.dtype | None = None) -> int:
    """Bytes of the tensors in a folder's safetensors, floating ones in `dtype` or as they are."""
    total = 0
    for name, count in _stored(folder):
        if name in FLOATS:
            total += count * (dtype.itemsize if dtype else FLOATS[name])
        else:
            total += count * SIZES.get(name, 1)
    return total


def _stored(folder: Path) -> Iterator[tuple[str, int]]:
    """Of each tensor in a folder's safetensors, the dtype by its name there, and its elements."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - it is no dict
                part = tensors.get_slice(key)
                yield part.get_dtype(), math.prod(part.get_shape())


def _not_loaded(path: Path, error: Exception) -> TargetError:
    return TargetError(
        f"{path} is not a causal language model that transformers can load: "
        f"{_reason(path, error)}\n"
        "Give a folder or hub id with config.json, a tokenizer and safetensors weights."
    )


def _reason(path: Path, error: Exception) -> str:
    """What transformers says, in a line."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    if isinstance(error, KeyError) and error.args:
        return f"it knows no {error.args[0]!r}{_where(path, error.args[0])}"
    reason = lines[0] if lines else repr(error)
    if reason.startswith(("Validation error", "Class validation error")) and lines[1:]:
        return "config.json: " + lines[1].partition(": ")[2]  # the line that names the key
    return reason


def _refuse_layers(path: Path, config: dict[str, Any]) -> None:
    """Refuse layers that the files cannot have, before transformers lists them."""
    try:
        with suppress(ValueError, OverflowError):  # no number: transformers says so
            refuse_layers(config, sum(1 for _ in _stored(path)))
    except TargetError as error:
        raise TargetError(f"{path}: {error}") from error


def _require_json(path: Path) -> dict[str, Any]:
    """A file's JSON object; refuses what transformers would pass over, as one that is no JSON."""
    try:
        given = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError):
        given = None
    if not isinstance(given, dict):
        raise TargetError(f"{path} is no JSON object.\nCopy or download it again.")
    return given


def _where(path: Path, value: object) -> str:
    """Which key of config.json has a value, if that can be told."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        inner = [part for part in config.values() if isinstance(part, dict)]
        pairs = [pair for part in (config, *inner) for pair in part.items()]
    except (OSError, ValueError, AttributeError):
        return ""
    return next((f" ({key} in config.json)" for key, given in pairs if given == value), "")


def _check_map(device_map: DeviceMap, gguf: GgufFile | None) -> None:
    """Refuse what cannot be, before anything is read."""
    if gguf:
        raise OptionError(
            "A GGUF file is loaded on one device; device_map was given.\n"
            "Leave it out, or use the model's safetensors."
        )
    if device_map != "auto" and not isinstance(device_map, dict):
        raise OptionError(
            f"device_map is {device_map!r}; allowed are auto and a dict of devices by module."
        )
    if isinstance(device_map, dict):
        _refuse_places(str(device_map), device_map)
    elif not torch.cuda.is_available():
        raise ResourceError(
            "device_map is auto, which spreads layers over GPUs, and torch finds none here.\n"
            "Leave it out."
        )
    require_package("accelerate", "device_map", "device-map")


def _refuse_places(what: str, places: dict[str, Any]) -> None:
    """Weights that come and go would be fetched anew for every token; all must stay."""
    kinds = {"cuda" if isinstance(p, int) else str(p).partition(":")[0] for p in places.values()}
    odd = sorted(kinds - {"cpu", "cuda"})
    if odd or len(kinds) > 1:
        raise ResourceError(
            f"{what}: weights would be on {' and '.join(sorted(kinds))}; all must be on GPUs, or "
            "all on the CPU.\nUse more GPUs, another dtype, a quantised target or a smaller one."
        )
