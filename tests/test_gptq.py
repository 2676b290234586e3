"""GPTQ and AWQ checkpoints: packed here number by number, unpacked as they are loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SHAPE, byte_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys import PLAIN, toy_drafter
from transformers import LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from ttspec import load
from ttspec.errors import TargetError
from ttspec.models.packed import unpacked
from ttspec.models.target import find_target

PLACE = {"device": "cpu", "dtype": "float32"}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs each four bits of AWQ's numbers hold, the lowest first."""


def words(codes: list[int], bits: int) -> list[int]:
    """Codes in int32 numbers, the first in the lowest bits."""
    size = 32 // bits
    found = []
    for at in range(0, len(codes), size):
        word = sum(code << bits * i for i, code in enumerate(codes[at : at + size]))
        found.append((word + 2**31) % 2**32 - 2**31)  # a stored -1 borrows, as in gptqmodel
    return found


def packed(
    weight: Tensor,
    method: str,
    *,
    bits: int = 4,
    size: int = 32,
    is_shuffled: bool = False,
    is_less_one: bool = True,
) -> tuple[dict[str, Tensor], Tensor]:
    """The parts of a weight [out, in], and what they mean.

    Args:
        weight: What is rounded.
        method: gptq or awq.
        bits: Of a code.
        size: Inputs of a group.
        is_shuffled: Whether neighbouring inputs are of different groups.
        is_less_one: Whether zero points are stored less one.
    """
    out, inputs = weight.shape
    most = 2**bits - 1
    shuffled = torch.randperm(inputs, generator=torch.Generator().manual_seed(3))
    told = (shuffled if is_shuffled else torch.arange(inputs)) // size
    count = int(told.max()) + 1
    codes, meant = torch.zeros(out, inputs, dtype=torch.long), torch.zeros(out, inputs)
    scales, zeros = torch.zeros(count, out), torch.zeros(count, out, dtype=torch.long)
    for group in range(count):
        part = weight[:, told == group]
        low, high = part.amin(1), part.amax(1)
        scale = ((high - low).clamp(min=1e-4) / most).half().float()
        zero = (-low / scale).round().clamp(0, most)
        code = (part / scale[:, None] + zero[:, None]).round().clamp(0, most)
        codes[:, told == group] = code.long()
        meant[:, told == group] = (code - zero[:, None]) * scale[:, None]
        scales[group], zeros[group] = scale, zero.long()
    stored = zeros - 1 if method == "gptq" and is_less_one else zeros
    if method == "awq":
        turn = torch.tensor([8 * i + j for i in range(out // 8) for j in AWQ_ORDER])
        rows = [words(row, 4) for row in codes.T[:, turn].tolist()]
        stored = stored[:, turn]
    else:
        rows = torch.tensor([words(row, bits) for row in codes.tolist()]).T.tolist()
    parts = {
        "qweight": torch.tensor(rows, dtype=torch.int32),
        "qzeros": torch.tensor([words(row, bits) for row in stored.tolist()], dtype=torch.int32),
        "scales": scales.half(),
    }
    if is_shuffled:
        parts["g_idx"] = told.int()
    return {part: tensor.contiguous() for part, tensor in parts.items()}, meant


def write(folder: Path, source: Path, settings: dict, **how) -> dict[str, Tensor]:
    """A packed copy of a folder, and what its weights mean."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    stored = load_file(source / "model.safetensors")
    meant = dict[str, Tensor]()
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        parts, meant[name] = packed(stored.pop(name).float(), settings["quant_method"], **how)
        own = name.removesuffix(".weight")
        stored |= {f"{own}.{part}": tensor for part, tensor in parts.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    return meant


GATE = "model.layers.1.mlp.gate_proj"
KINDS = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 32}, {}),
    "gptq, act order": (
        {"quant_method": "gptq", "bits": 4, "desc_act": True},
        {"is_shuffled": True},
    ),
    "gptq v2": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
        {"is_less_one": False},
    ),
    "gptq, 8 bits": ({"quant_method": "gptq", "bits": 8}, {"bits": 8}),
    "gptq, 2 bits": ({"quant_method": "gptq", "bits": 2}, {"bits": 2}),
    "awq": ({"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"}, {}),
    "awq of gptqmodel": (  # zero points are there nevertheless, all of them 8
        {"quant_method": "awq", "bits": 4, "zero_point": False, "checkpoint_format": "gemm"},
        {},
    ),
    "awq, old": ({"quant_method": "awq", "w_bit": 4, "version": "GEMM"}, {"size": 16}),
}


@pytest.mark.parametrize("which", KINDS)
def test_each_weight_is_what_its_parts_mean(which: str, toy_target_dir: Path, tmp_path: Path):
    settings, how = KINDS[which]
    meant = write(tmp_path / "q", toy_target_dir, settings, **how)
    whole = LlamaForCausalLM.from_pretrained(toy_target_dir)
    before = dict(whole.named_parameters())
    engine = load(str(tmp_path / "q"), toy_drafter(), **PLACE)
    for name, weight in meant.items():
        own = engine.target.model.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(unpacked(own.weight), weight)
        assert unpacked(own.weight).is_contiguous()  # as the fused kernels read it
        error = (weight - before[name]).abs().mean() / before[name].abs().mean()
        assert 0 < error < {"2": 0.6, "8": 0.01}.get(which[6:7], 0.15)
    told, expected = (
        find_target(str(place)).nbytes(torch.float32, torch.device("cpu"))
        for place in (tmp_path / "q", toy_target_dir)
    )
    assert told == expected
    assert engine.target.nbytes == load(str(toy_target_dir), None, **PLACE).target.nbytes
    options = {"max_new_tokens": 32, "ignore_eos": True}
    text = engine.generate([[1, 2, 3]], **options, **PLAIN)[0].token_ids
    assert engine.generate([[1, 2, 3]], **options)[0].token_ids == text


def test_experts_are_unpacked_one_by_one_and_then_merged(tmp_path: Path):
    config = Qwen3MoeConfig(
        **SHAPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, mlp_only_layers=[0]
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "whole")
    byte_tokenizer().save_pretrained(tmp_path / "whole")
    meant = write(tmp_path / "q", tmp_path / "whole", KINDS["awq"][0])
    weights = dict(load(str(tmp_path / "q"), None, **PLACE).target.model.named_parameters())
    for at in range(4):
        own = [meant[f"model.layers.1.mlp.experts.{at}.{n}_proj.weight"] for n in ("gate", "up")]
        assert torch.equal(weights["model.layers.1.mlp.experts.gate_up_proj"][at], torch.cat(own))


@pytest.mark.parametrize("stored", [7, 8])
def test_zero_points_of_a_symmetric_file_may_be_stored_as_they_are(
    stored: int, toy_target_dir: Path, tmp_path: Path
):
    """Some say "gptq", where they are stored less one, and have 8 in the middle of 16 codes."""
    write(tmp_path / "q", toy_target_dir, KINDS["gptq"][0] | {"sym": True})
    file = tmp_path / "q" / "model.safetensors"
    parts = load_file(file)
    parts |= {
        key: torch.full_like(tensor, words([stored] * 8, 4)[0])
        for key, tensor in parts.items()
        if key.endswith(".qzeros")
    }
    save_file(parts, file, metadata={"format": "pt"})
    module = load(str(tmp_path / "q"), None, **PLACE).target.model.get_submodule(GATE)
    first = int(parts[f"{GATE}.qweight"][0, 0]) & 15
    assert unpacked(module.weight)[0, 0] == (first - 8) * parts[f"{GATE}.scales"][0, 0].float()


def test_generation_settings_are_read(toy_target_dir: Path, tmp_path: Path):
    write(tmp_path / "q", toy_target_dir, KINDS["gptq"][0])
    given = {"eos_token_id": [7, 258], "temperature": 0.25, "do_sample": True}
    (tmp_path / "q" / "generation_config.json").write_text(json.dumps(given))
    target = load(str(tmp_path / "q"), None, **PLACE).target
    assert {7, 258} <= set(target.ends)
    assert target.defaults["temperature"] == 0.25


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"quant_method": "gptq", "bits": 3}, "3 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_p"}, "format gptq_p"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "is_marlin_format"),
        ({"quant_method": "gptq", "bits": 4, "pack_dtype": "int16"}, "pack_dtype int16"),
        ({"quant_method": "gptq", "bits": 4, "rotation": "hadamard"}, "rotation hadamard"),
        ({"quant_method": "awq", "bits": 8}, "8 bits"),
        ({"quant_method": "awq", "bits": 4, "version": "GEMV"}, "format gemv"),
    ],
)
def test_what_is_not_unpacked_right_is_refused_by_name(
    settings: dict, what: str, toy_target_dir: Path, tmp_path: Path
):
    shutil.copytree(toy_target_dir, tmp_path / "q")
    path = tmp_path / "q" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    with pytest.raises(TargetError, match=f"with {what}, which is not read(.|\n)*without quant"):
        load(str(tmp_path / "q"), None, **PLACE)


DAMAGE = {
    "zero points are missing": (f"{GATE}.qzeros", None),
    "scales alone": ("model.layers.1.mlp.act.scales", torch.ones(64)),
    "scales of other groups": (f"{GATE}.scales", torch.ones(3, 128)),
    "scales of one number": (f"{GATE}.scales", torch.ones(1)),
    "an order that is too short": (f"{GATE}.g_idx", torch.zeros(32, dtype=torch.int32)),
    "a group that is not there": (f"{GATE}.g_idx", torch.full((64,), 2, dtype=torch.int32)),
    "packed in bytes": (f"{GATE}.qweight", torch.zeros(8, 128, dtype=torch.uint8)),
    "a bias that counts": (f"{GATE}.bias", torch.ones(128)),
    "an infinite scale": (f"{GATE}.scales", torch.full((2, 128), torch.inf)),
}


@pytest.mark.parametrize("which", DAMAGE)
def test_parts_that_do_not_fit_are_named(which: str, toy_target_dir: Path, tmp_path: Path):
    write(tmp_path / "q", toy_target_dir, KINDS["gptq"][0])
    file = tmp_path / "q" / "model.safetensors"
    name, value = DAMAGE[which]
    stored = {key: tensor for key, tensor in load_file(file).items() if key != name}
    save_file(stored | ({} if value is None else {name: value}), file, metadata={"format": "pt"})
    with pytest.raises(TargetError, match=name if "act" in name else "layers.1.mlp.gate_proj"):
        load(str(tmp_path / "q"), None, **PLACE)


def test_biases_of_zeros_are_passed_over(toy_target_dir: Path, tmp_path: Path):
    """AutoGPTQ wrote one for every module."""
    meant = write(tmp_path / "q", toy_target_dir, KINDS["gptq"][0])
    file = tmp_path / "q" / "model.safetensors"
    zero = {f"{GATE}.bias": torch.zeros(128)}
    save_file(load_file(file) | zero, file, metadata={"format": "pt"})
    module = load(str(tmp_path / "q"), None, **PLACE).target.model.get_submodule(GATE)
    assert module.bias is None
    assert torch.equal(unpacked(module.weight), meant[f"{GATE}.weight"])
