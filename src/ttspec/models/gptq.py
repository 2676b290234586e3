"""GPTQ and AWQ checkpoints, unpacked as they are read.

transformers reads them by gptqmodel alone, whose kernels want a GPU and a newer torch. A weight is
(code - zero point) x scale, with a zero point and a scale for each group of inputs and each output.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ttspec.errors import TargetError

METHODS = ("gptq", "awq")
"""quant_method of what is read here."""
BITS = {"gptq": (2, 4, 8), "awq": (4,)}
FORMATS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
"""How codes lie in int32 numbers. "gptq" stores zero points less one, "gptq_v2" as they are."""
PARTS = ("qweight", "qzeros", "scales", "g_idx")
NIBBLES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where AWQ keeps eight neighbouring outputs: the first in the lowest four bits, the second in the
fifth lowest."""
_PLAIN = "Give the model without quantisation, or packed in another way (docs/drafters.md)."


def refuse_format(path: Path, method: str, given: dict[str, Any]) -> None:
    """Refuse what config.json says of a GPTQ or AWQ checkpoint that is not unpacked right.

    Raises:
        TargetError: Names the entry.
    """
    form, bits = _format(given, method), given.get("bits", given.get("w_bit", 4))
    odd = {
        f"format {form}": form not in FORMATS[method],
        f"{bits} bits": bits not in BITS[method],
        "is_marlin_format": given.get("is_marlin_format"),
        f"pack_dtype {given.get('pack_dtype')}": given.get("pack_dtype", "int32") != "int32",
        "an adapter": given.get("adapter"),
        f"rotation {given.get('rotation')}": given.get("rotation"),
    }
    for what in (name for name, is_so in odd.items() if is_so):
        read = f"{' and '.join(FORMATS[method])} of {', '.join(map(str, BITS[method]))} bits"
        raise TargetError(
            f"{path} is quantised by {method} with {what}, which is not read; read are {read}.\n"
            f"{_PLAIN}"
        )


def unpacked_weights(
    path: Path, method: str, given: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """All tensors of a folder by transformers' names, each read when it is first indexed.

    `method` is one of `METHODS`, `given` the folder's quantization_config. Packed weights are
    unpacked on `device`, into float32 [out, in].

    Raises:
        TargetError: A weight's parts are missing or do not fit each other.
    """
    stored = {key: file for file in _files(path) for key in file.keys()}  # noqa: SIM118
    names = [key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")]
    parts = {f"{name}.{part}" for name in names for part in PARTS}
    for key in stored.keys() - parts:
        if key.rpartition(".")[2] in PARTS:
            raise TargetError(f"{path} has {key}, but no packed weight beside it.\n{_PLAIN}")
    found: dict[str, Any] = {k: stored[k].get_slice(k) for k in stored.keys() - parts}
    is_less_one, is_symmetric = _format(given, method) == "gptq", bool(given.get("sym"))
    for name in names:
        own = {part: stored[k] for part in PARTS if (k := f"{name}.{part}") in stored}
        bits = _bits(path, name, own, method)
        weight = PackedWeight(name, own, bits, method == "awq", is_less_one, is_symmetric, device)
        found[f"{name}.weight"] = weight
    return found


def refuse_biases(path: Path, weights: dict[str, Any], unexpected: Iterable[str]) -> None:
    """Refuse biases that the model has no place for. Old packers wrote one of zeros everywhere.

    Raises:
        TargetError: One of them is not zero.
    """
    for name in sorted(unexpected):
        if name.endswith(".bias") and name in weights and weights[name][...].any():
            raise TargetError(
                f"{path} holds {name}, for which the model has no place, and which is not zero.\n"
                f"{_PLAIN}"
            )


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight that is read and unpacked when it is indexed, as transformers does it once."""

    name: str
    parts: dict[str, Any]
    """Open files by part."""
    bits: int
    is_awq: bool
    is_less_one: bool
    is_symmetric: bool
    device: torch.device

    def __getitem__(self, index: Any) -> Tensor:
        """Float32 [out, in], or a part of it."""
        read = {p: f.get_tensor(f"{self.name}.{p}").to(self.device) for p, f in self.parts.items()}
        groups = read.pop("g_idx", None)
        if self.is_awq:
            return unpack_awq(**read)[index]
        is_less_one, bits = self.is_less_one, self.bits
        # Some say "gptq" and store them as they are (vllm-project/vllm pull request 38966). Where
        # all are the middle, which is what symmetric means, that can be told.
        if self.is_symmetric and (_codes(read["qzeros"], bits) == 1 << bits - 1).all():
            is_less_one = False
        return unpack_gptq(**read, g_idx=groups, bits=bits, is_less_one=is_less_one)[index]


def unpack_gptq(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    *,
    bits: int,
    is_less_one: bool,
) -> Tensor:
    """A weight that GPTQ packed.

    Args:
        qweight: int32 [in x bits / 32, out].
        qzeros: int32 [groups, out x bits / 32].
        scales: [groups, out].
        g_idx: int [in], the group of each input; None where they follow each other.
        bits: Of a code.
        is_less_one: Whether zero points are stored less one.

    Returns:
        float32 [out, in].
    """
    if is_less_one:  # in the whole number, as it was taken off: where a zero point was 0 it carries
        qzeros = qzeros + sum(1 << shift for shift in range(0, 32, bits))
    codes, zeros = _codes(qweight.T, bits), _codes(qzeros, bits).T
    return _scaled(codes, zeros, scales.T, g_idx)


def unpack_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """A weight float32 [out, in] that AWQ packed in its format "gemm", four bits a code.

    Of `qweight` int32 [in, out / 8], `qzeros` int32 [groups, out / 8] and `scales` [groups, out].
    """
    codes, zeros = (
        _codes(packed, 4).unflatten(1, (-1, 8))[..., NIBBLES].flatten(1).T.contiguous()
        for packed in (qweight, qzeros)
    )
    return _scaled(codes, zeros, scales.T, None)


def _codes(packed: Tensor, bits: int) -> Tensor:
    """The codes in int32 numbers [N, M], the lowest bits first: uint8 [N, M x 32 / bits]."""
    by_byte = packed.contiguous().view(torch.uint8)  # lowest first on all machines that torch knows
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return (by_byte[..., None] >> shifts).bitwise_and_((1 << bits) - 1).flatten(1)


def _scaled(codes: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor | None) -> Tensor:
    """Codes [out, in] less their zero points, times their scales: both [out, groups]."""
    size = codes.shape[1] // scales.shape[1]
    zeros, scales = zeros.float()[..., None], scales.float()[..., None]
    in_order = torch.arange(codes.shape[1], device=codes.device) // size
    if groups is None or torch.equal(groups, in_order.to(groups.dtype)):
        parts = codes.unflatten(1, (-1, size)).float()
        return parts.sub_(zeros).mul_(scales).flatten(1)
    groups = groups.long()
    return codes.float().sub_(zeros[:, groups, 0]).mul_(scales[:, groups, 0])


def _format(given: dict[str, Any], method: str) -> str:
    """How a checkpoint says that its codes lie."""
    names = ("checkpoint_format", "format", "version")
    said = [given[name] for name in names if isinstance(given.get(name), str)]
    return said[0].lower() if said else FORMATS[method][0]


def _files(path: Path) -> list[Any]:
    """A folder's weights, open and not read."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = sorted(file.name for file in path.glob("*.safetensors"))
    return [safe_open(path / name, framework="pt") for name in names]


def _bits(path: Path, name: str, parts: dict[str, Any], method: str) -> int:
    """Bits of a code, told from shapes, since some modules may have others than the config says.

    Raises:
        TargetError: Shapes do not fit each other, or the groups of inputs.
    """
    slices = {part: file.get_slice(f"{name}.{part}") for part, file in parts.items()}
    shapes = {part: list(own.get_shape()) for part, own in slices.items()}
    if missing := {"qweight", "qzeros", "scales"} - shapes.keys():
        raise TargetError(f"{path} has no tensor {name}.{min(missing)}.\nDownload the model again.")
    kinds = {slices[part].get_dtype() for part in ("qweight", "qzeros")}
    for bits in BITS[method] if kinds == {"I32"} and len(shapes["scales"]) == 2 else ():
        (groups, out), size = shapes["scales"], 32 // bits
        rows, columns = shapes["qweight"][0], out if method == "gptq" else out // size
        inputs = rows * size if method == "gptq" else rows
        expected = {"qweight": [rows, columns], "qzeros": [groups, out // size]}
        if out % size or shapes | expected != shapes:
            continue
        fits = inputs % groups == 0
        if "g_idx" in parts:
            order = parts["g_idx"].get_tensor(f"{name}.g_idx")
            fits = len(order) == inputs and 0 <= int(order.min()) <= int(order.max()) < groups
        if fits:
            return bits
    told = ", ".join(f"{part} {shape}" for part, shape in shapes.items())
    raise TargetError(
        f"{path} packs {name} in a way that is not read as {method}: {told}.\n{_PLAIN}"
    )
