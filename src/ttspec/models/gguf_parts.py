"""A GGUF file, or all parts of one that was split: its metadata and its tensors, none unpacked."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, dequantize

from ttspec.errors import TargetError

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_NEWER = re.compile(r"(?P<type>\d+)\)? is not a valid GGMLQuantizationType")
_OTHERS = "Use a file of another type, such as Q4_K_M, Q8_0 or BF16."


def read_parts(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata by key, and readers' tensors by the file's names; their data is mapped, not read.

    `path` is a whole file, or any part of one, beside which the others are.

    Raises:
        TargetError: It is damaged, a part is missing, or a tensor is of a type that the installed
            package gguf cannot unpack.
    """
    meta, tensors = _read(path)
    count = int(meta.get("split.count", 1))
    if count > 1:
        meta, tensors = _read_all(path, count)
    _refuse_packings(path, tensors)
    return meta, tensors


def _read_all(path: Path, count: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """All parts together; the first one has the metadata."""
    named = _PART.fullmatch(path.name)
    if named is None or int(named["count"]) != count:
        raise TargetError(
            f"{path} is one of {count} parts, whose names must end as in -00001-of-{count:05}.gguf."
            "\nGive the parts the names that they were published with."
        )
    paths = [path.with_name(f"{named['stem']}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    for part in paths:
        if not part.is_file():
            raise TargetError(
                f"{path} is one of {count} parts, and {part.name} is not beside it.\n"
                "Copy or download that part too."
            )
    meta, tensors = {}, {}
    for number, part in enumerate(paths):
        own, found = _read(part)
        if (own.get("split.no"), own.get("split.count")) != (number, count):
            raise TargetError(
                f"{part} says that it is part {own.get('split.no')} (from 0) of "
                f"{own.get('split.count')}.\nCopy or download the parts again."
            )
        if twice := sorted(found.keys() & tensors.keys()):
            raise TargetError(
                f"{part} has {twice[0]}, which another part has too.\n"
                "Copy or download the parts again."
            )
        meta, tensors = {**own, **meta}, tensors | found
    whole = int(meta.get("split.tensors.count", len(tensors)))
    if len(tensors) != whole:
        raise TargetError(
            f"{path}: its parts have {len(tensors)} tensors together, and say that they have "
            f"{whole}.\nCopy or download the parts again."
        )
    return meta, tensors


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        reader = GGUFReader(path)
        meta = {key: field.contents() for key, field in reader.fields.items()}
    except (OSError, ValueError, IndexError, KeyError, OverflowError, MemoryError) as error:
        if newer := _NEWER.search(str(error)):
            raise TargetError(
                f"{path} has a tensor of type {newer['type']}, which the package gguf "
                f"{version('gguf')} does not know.\nInstall a newer gguf, or give another file: "
                "of type Q4_K_M, Q8_0 or BF16."
            ) from error
        raise TargetError(
            f"{path} is no complete GGUF file: {str(error).partition(chr(10))[0]}.\n"
            "Copy or download it again."
        ) from error
    return meta, {tensor.name: tensor for tensor in reader.tensors}


def _refuse_packings(path: Path, tensors: dict[str, Any]) -> None:
    """Refuse what could not be unpacked later, before anything else is read or fetched."""
    first: dict[GGMLQuantizationType, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(tensor.tensor_type, name)
    for kind, name in first.items():
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as error:
            raise TargetError(
                f"{path}: {name} is packed as {kind.name}, which the package gguf "
                f"{version('gguf')} cannot unpack.\n{_OTHERS}"
            ) from error
