"""Where an engine comes from: names, folders and options to a target and a drafter.

`load` is `ttspec.load`; commands call it by their `--target` and `--drafter`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ttspec.decoding.engine import Engine, Notify, require_drafter
from ttspec.decoding.memory_forecast import SMALLER_WEIGHTS, drafter_weight_bytes, require_weights
from ttspec.drafters.base import Drafter
from ttspec.drafters.checkpoint import BUNDLED, DEFAULT_DRAFTERS, load_drafter, load_native_head
from ttspec.drafters.ngram import Ngram
from ttspec.errors import CheckpointError, OptionError, ResourceError, TargetError
from ttspec.models.loading import DeviceMap, Files
from ttspec.models.source import resolve
from ttspec.models.target import Target, find_target, load_target, wrap_target


def load(
    target: str | Path | tuple[PreTrainedModel, PreTrainedTokenizerBase] = "smollm2-135m",
    drafter: str | Path | Drafter | None = "auto",
    *,
    device: str = "auto",
    dtype: str = "auto",
    compile: bool = False,
    device_map: DeviceMap | None = None,
    notify: Notify | None = None,
) -> Engine:
    """Load a target and a drafter.

    Args:
        target: Built-in name, local folder, .gguf file, hub id, or a loaded (model, tokenizer) of
            transformers, which is left in evaluation mode and asks for no gradients.
        drafter: Built-in name, local folder, hub id or a drafter; "ngram" copies from the text;
            "mtp" is the target's own head; "auto" is the bundled one for the target, else its own
            head, if there is one; "none" or None is plain decoding.
        device: "auto", "cpu" or "cuda".
        dtype: "auto", "float32", "bfloat16" or "float16". A loaded target stays where it is, and as
            it is: what is given is compared.
        compile: On a GPU, let torch compile a round's models when they are first run: a minute or
            two, most of it once (a cache on disk), for a third less time a round.
        device_map: "auto" spreads a target that fits no single GPU over all; or a device for each
            of its modules. The drafter goes where the embedding is.
        notify: Told what takes long, and what may not fit into memory.

    Raises:
        TargetError, CheckpointError, ResourceError, OptionError: See their messages.
    """
    target = str(target) if isinstance(target, Path) else target
    drafter = str(drafter) if isinstance(drafter, Path) else drafter
    _require_target(target)
    if not isinstance(drafter, str):
        require_drafter(drafter)
    place = device_of(device)
    kind = dtype_of(dtype, place)
    if isinstance(target, str):
        files = find_target(target, notify)
        drafter = _drafter_for(drafter, files.source.name, files, notify)
        loaded = _read(files, drafter, place, kind, device_map, notify)
    else:
        loaded = wrap_target(*target)
        _require_as_loaded(loaded, device, dtype, device_map)
        drafter = _drafter_for(drafter, loaded.name, None, notify)
    engine = Engine(loaded, drafter)
    engine.compile, engine.notify = _compiles(loaded, compile, notify), notify
    return engine


def _require_target(target: object) -> None:
    """Refuse what is neither a name nor a loaded pair."""
    match target:
        case str() | (PreTrainedModel(), PreTrainedTokenizerBase()):
            return
    given = type(target).__name__
    if isinstance(target, tuple):
        given += f" of {', '.join(type(part).__name__ for part in target)}"
    raise OptionError(
        f"target is a {given}; allowed are a name, a folder, a hub id and a loaded (model, "
        "tokenizer) of transformers.\nOf a model in a wrapper give what is inside, as "
        "peft_model.base_model.model."
    )


def _drafter_for(
    given: str | Drafter | None, target: str, files: Files | None, notify: Notify | None
) -> Drafter | None:
    """The drafter that was asked for, of a target of this name; `auto` is its usual one."""
    if given == "auto":
        given = DEFAULT_DRAFTERS.get(target) or _native_if_any(files, notify)
    return find_drafter(given, notify, files) if isinstance(given, str) else given


def _compiles(target: Target, asked: bool, notify: Notify | None) -> bool:
    """Whether rounds are compiled, if that was asked; says where they are not, or not captured."""
    on_gpu, notices = target.model.device.type == "cuda", list[str]()
    if asked and target.is_split:
        notices.append("compile is for one GPU; a target on several is not compiled.")
    elif on_gpu and not target.can_capture:
        notices.append(
            "the target is a mixture whose experts wait for the host on this GPU: rounds are "
            "neither captured nor compiled, and slow. With bfloat16 GPUs of compute "
            "capability 9 and 10 need not."
        )
    if asked and not on_gpu:
        notices.append("compile is for a GPU; on a CPU nothing is compiled.")
    for notice in notices:
        if notify:
            notify(notice)
    return asked and not target.is_split and (target.can_capture or not on_gpu)


def _require_as_loaded(
    target: Target, device: str, dtype: str, device_map: DeviceMap | None
) -> None:
    """Refuse a loaded target without its weights, and options that would have it be another."""
    if any(parameter.is_meta for parameter in target.model.parameters()):
        raise TargetError(
            "Some of the target's weights are on the device meta: they were not loaded, or are "
            "offloaded.\nLoad them into memory; device_map of ttspec.load spreads them over GPUs."
        )
    found = {"device": target.device.type, "dtype": str(target.dtype).removeprefix("torch.")}
    for name, given in (("device", device), ("dtype", dtype)):
        if given not in ("auto", found[name]):
            raise OptionError(
                f"{name} is {given}, and the target is loaded already, with {found[name]}.\n"
                "Load it so, or leave the option out."
            )
    if device_map is not None:
        raise OptionError("device_map is given, and the target is loaded already.\nLeave it out.")


def _read(
    files: Files,
    drafter: Drafter | None,
    place: torch.device,
    kind: torch.dtype,
    device_map: DeviceMap | None,
    notify: Notify | None,
) -> Target:
    """The target's weights, if there is room for them and the drafter's."""
    places, split = [place], device_map is not None
    if split and place.type == "cuda":
        places = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    more = drafter_weight_bytes(drafter, kind)
    if drafter and place.type == "cpu" and all(w.dtype == kind for w in drafter.weights.values()):
        more = 0  # it is there already, and stays as it is
    need = files.nbytes(kind, place)
    short = require_weights(need, more, places, name=files.source.name, split=split)
    if short and notify:
        notify(short)
    try:
        return load_target(files, device=place, dtype=kind, device_map=device_map)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise ResourceError(
            f"The weights of {files.source.name} do not fit into memory.\n{SMALLER_WEIGHTS}"
        ) from error


def find_drafter(
    name: str, notify: Notify | None = None, target: Files | None = None
) -> Drafter | None:
    """A drafter by built-in name, local folder or hub id; None for "none".

    "mtp" is the head in the files of `target`.

    Raises:
        CheckpointError: There is none, or its files are not what they should be.
    """
    if name == "none":
        return None
    if name == "mtp":
        return _native(target)
    return Ngram() if name == "ngram" else load_drafter(name, drafter_folder(name, notify))


def _native(target: Files | None) -> Drafter:
    if target is None or target.gguf:
        what = "the target is a GGUF file" if target else "no folder of the target is known here"
        raise CheckpointError(
            f"drafter is mtp, the head in the target's own files, and {what}.\n"
            "Give the target's folder or hub id, or another drafter."
        )
    if head := _read_native(target):
        return head
    raise CheckpointError(
        f"drafter is mtp, and {target.source.name} has no MTP head in its files.\n"
        "Train one with `ttspec train --kind mtp`, or give another drafter."
    )


def _native_if_any(target: Files | None, notify: Notify | None) -> Drafter | None:
    """The same for `auto`: a head that cannot be read is a notice, and left."""
    try:
        return _read_native(target) if target and not target.gguf else None
    except CheckpointError as error:
        if notify:
            notify(f"{str(error).splitlines()[0]} It is not used.")
        return None


def _read_native(target: Files) -> Drafter | None:
    return load_native_head(target.source.path, target.config.get_text_config())


def drafter_folder(name: str, notify: Notify | None = None) -> Path:
    """Where a drafter's files are: a built-in name, a local folder or a hub id.

    Raises:
        CheckpointError: There is none.
    """
    if name and (BUNDLED / name).is_dir():
        return BUNDLED / name
    try:
        found = resolve(name, notify=notify)
        if found.origin == "gguf":
            raise TargetError(f"{name} is a GGUF file, and no drafter is read from one.")
        return found.path
    except (TargetError, ResourceError) as error:
        bundled = sorted(path.name for path in BUNDLED.iterdir() if path.is_dir())
        built_in = ", ".join(["mtp", "ngram", "none", *bundled])
        first = str(error).splitlines()[0]
        kind = CheckpointError if isinstance(error, TargetError) else ResourceError
        raise kind(
            f"{first}\nGive a drafter's folder, a hub id, or a built-in one: {built_in}."
        ) from error


def device_of(name: str) -> torch.device:
    """A device by option: "auto", "cpu" or "cuda"."""
    if name not in ("auto", "cpu", "cuda"):
        raise OptionError(f"device is {name!r}; allowed are auto, cpu and cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ResourceError("device is cuda, but torch finds no CUDA device here.\nUse cpu.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """A dtype by option; "auto" is bfloat16 where the hardware has it."""
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto":
        native = device.type == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)
        return torch.bfloat16 if native else torch.float32
    if name not in list(kinds):  # what is given may have no hash
        raise OptionError(f"dtype is {name!r}; allowed are auto, {', '.join(kinds)}.")
    return kinds[name]
