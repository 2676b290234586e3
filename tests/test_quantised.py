"""Quantised checkpoints that transformers loads by itself: those that were tried, and no others."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SHAPE, byte_tokenizer
from safetensors.torch import save_file
from torch import nn
from toys import PLAIN, toy_drafter
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, LlamaForCausalLM

from ttspec import load
from ttspec.decoding.engine import Engine
from ttspec.errors import ResourceError, TargetError
from ttspec.models import loading
from ttspec.models import quantised as quantised_models
from ttspec.models.layers import merge_linears
from ttspec.models.packed import unpacked
from ttspec.models.target import find_target

PLACE = {"device": "cpu", "dtype": "float32"}


def says(folder: Path, source: Path, **quantisation) -> str:
    """A copy of a folder whose config says that it is quantised."""
    shutil.copytree(source, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": quantisation}
    path.write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("method", ["quanto", "eetq", "gguf", "auto-round"])
def test_a_method_that_is_not_read_is_refused_by_name(toy_target_dir, tmp_path, method: str):
    name = says(tmp_path / "q", toy_target_dir, quant_method=method, bits=4)
    with pytest.raises(TargetError, match=f"quantised by {method}, which is not read") as caught:
        load(name, None, **PLACE)
    given, _ = str(caught.value).splitlines()
    assert "fp8" in given


def torchao_settings(name: str, **data) -> dict:
    """What torchao writes into config.json."""
    return {"default": {"_type": name, "_version": 2, "_data": data}}


def test_what_of_torchao_was_not_tried_is_refused_by_name(toy_target_dir, tmp_path):
    given = torchao_settings("NVFP4DynamicActivationNVFP4WeightConfig")
    name = says(tmp_path / "q", toy_target_dir, quant_method="torchao", quant_type=given)
    with pytest.raises(TargetError, match=r"torchao's NVFP4Dynamic.*was not tried"):
        load(name, None, **PLACE)


def test_a_quantised_cache_is_refused(toy_target_dir, tmp_path):
    given = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}
    with pytest.raises(TargetError, match="kv_cache_scheme"):
        load(says(tmp_path / "q", toy_target_dir, **given), None, **PLACE)


def test_eight_bits_of_bitsandbytes_are_refused_for_their_reason(toy_target_dir, tmp_path):
    """Measured: in float32 a token's logits differ by 0.2 with the tokens read beside it."""
    given = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(TargetError, match="depend on the tokens read with it"):
        load(says(tmp_path / "q", toy_target_dir, **given), None, **PLACE)


@pytest.mark.parametrize("method", ["torchao", "bitsandbytes"])
def test_a_missing_package_is_said(toy_target_dir, tmp_path, monkeypatch, method: str):
    monkeypatch.setattr(quantised_models, "find_spec", lambda _: None)
    given = {"quant_method": method, "load_in_4bit": True}
    with pytest.raises(ResourceError, match=rf"package {method}.*\n.*ttspec\[quantised\]"):
        load(says(tmp_path / "q", toy_target_dir, **given), None, **PLACE)


TORCHAO = {
    "torchao": "Int8WeightOnlyConfig",
    "torchao float8": "Float8WeightOnlyConfig",
    "torchao, activations too": "Int8DynamicActivationInt8WeightConfig",
}


def quantised(which: str, source: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The toy target, packed and saved as its users do."""
    if which in TORCHAO:
        pytest.importorskip("torchao")
        from torchao import quantization
        from transformers import TorchAoConfig

        config = TorchAoConfig(getattr(quantization, TORCHAO[which])())
    else:
        pytest.importorskip("bitsandbytes")
        pytest.importorskip("accelerate")
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, quantization_config=config)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("which", ["torchao", "torchao float8", "bitsandbytes"])
def test_a_quantised_target_says_what_it_says_alone(which: str, toy_target_dir, tmp_path: Path):
    folder = quantised(which, toy_target_dir, tmp_path / "q")
    engine: Engine = load(str(folder), toy_drafter(), **PLACE)
    target = engine.target
    assert (target.dtype, target.head.dtype) == (torch.float32, torch.float32)
    assert type(target.embedding) is torch.nn.Parameter
    whole = LlamaForCausalLM.from_pretrained(toy_target_dir)
    assert type(target.model.model.layers[0].mlp.up_proj.weight) is not torch.nn.Parameter
    assert merge_linears(target.model.model.layers[0]) == []
    ids = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(0))
    zero = torch.zeros(1, dtype=torch.long)
    logits = target.forward(target.cache(1, 32), ids, zero, 0)[0]
    with torch.no_grad():  # packed it is another model, and yet much the same
        error = (logits - whole(input_ids=ids).logits).abs().mean()
    assert 0 < error < (0.4 if which in TORCHAO else 2.0)
    cache, alone = target.cache(1, 32), []
    for at in range(24):
        alone.append(target.forward(cache, ids[:, at : at + 1], zero + at, at)[0])
    torch.testing.assert_close(torch.cat(alone, 1), logits, atol=2e-4, rtol=0)
    options = {"max_new_tokens": 24, "ignore_eos": True}
    plain = engine.generate([[1, 2, 3]], **options, **PLAIN)[0].token_ids
    assert engine.generate([[1, 2, 3]], **options)[0].token_ids == plain
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    weights = loading.stored_bytes(folder)
    assert 0.8 * stored < weights <= stored
    assert weights <= target.nbytes < 1.2 * stored


@pytest.mark.filterwarnings("ignore")
def test_weights_whose_activations_would_be_rounded_are_unpacked(toy_target_dir, tmp_path: Path):
    """Rounded anew each time, by what the last bits of sums are, texts would be others."""
    folder = quantised("torchao, activations too", toy_target_dir, tmp_path / "q", torch.bfloat16)
    engine = load(str(folder), toy_drafter(), **PLACE)
    plain = load(str(toy_target_dir), None, **PLACE).target
    assert engine.target.nbytes == plain.nbytes
    ours, theirs = (
        unpacked(target.model.model.layers[1].mlp.up_proj.weight)
        for target in (engine.target, plain)
    )
    assert ours.dtype == torch.float32
    assert 0 < (ours - theirs).abs().mean() / theirs.abs().mean() < 0.02
    options = {"max_new_tokens": 48, "ignore_eos": True}
    text = engine.generate([[1, 2, 3]], **options, **PLAIN)[0].token_ids
    assert engine.generate([[1, 2, 3]], **options)[0].token_ids == text


@pytest.mark.filterwarnings("ignore")
def test_weights_that_do_not_multiply_the_dtype_are_refused(toy_target_dir, tmp_path: Path):
    folder = quantised("torchao float8", toy_target_dir, tmp_path / "q", torch.bfloat16)
    with pytest.raises(TargetError, match=r"packed in bfloat16.*float32(.|\n)*--dtype bfloat16"):
        load(str(folder), None, **PLACE)
    assert load(str(folder), None, device="cpu", dtype="bfloat16").target.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_embedding_is_refused(toy_target_dir, tmp_path: Path):
    folder = quantised("torchao", toy_target_dir, tmp_path / "q")
    engine = load(str(folder), None, **PLACE)
    packed = engine.target.model.model.layers[0].mlp.up_proj.weight
    engine.target.model.lm_head.weight = packed
    with pytest.raises(TargetError, match="quantised output head"):
        quantised_models.require_plain(folder, engine.target.model)


FP8 = torch.float8_e4m3fn
"""Numbers up to 448."""
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
"""Numbers of four bits, the first one their sign."""


def fp8_blocks(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """As DeepSeek and Qwen publish them: a scale for each block of 32 x 32."""
    blocks = weight.view(weight.shape[0] // 32, 32, -1, 32)
    scale = blocks.abs().amax((1, 3)) / 448
    packed = (blocks / scale[:, None, :, None]).view(weight.shape).to(FP8)
    return {"weight": packed, "weight_scale_inv": scale}


def fp8_rows(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """As llm-compressor writes FP8_DYNAMIC: a scale for each output."""
    scale = weight.abs().amax(1, keepdim=True) / 448
    return {"weight": (weight / scale).to(FP8), "weight_scale": scale}


def int4_groups(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """As llm-compressor writes W4A16: a scale for 32 inputs, eight of them in a number."""
    groups = weight.view(weight.shape[0], -1, 32)
    scale = groups.abs().amax(-1) / 7
    codes = (groups / scale[..., None]).round().view(weight.shape).int() + 8
    shifts = torch.arange(0, 32, 4)
    packed = (codes.view(weight.shape[0], -1, 8) << shifts).sum(-1, dtype=torch.int32)
    shape = torch.tensor(weight.shape)
    return {"weight_packed": packed, "weight_scale": scale, "weight_shape": shape}


def compressed(form: str, activations: dict | None, **weights) -> dict:
    """What llm-compressor writes into config.json."""
    own = {"dynamic": False, "symmetric": True, **weights}
    group = {"weights": own, "targets": ["Linear"], "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


TOKEN = {"dynamic": True, "symmetric": True, "num_bits": 8, "type": "float", "strategy": "token"}
FORMATS = {
    "fp8": (
        fp8_blocks,
        {"quant_method": "fp8", "weight_block_size": [32, 32]},
        "accelerate",
    ),
    "compressed-tensors, float8": (
        fp8_rows,
        compressed("float-quantized", TOKEN, num_bits=8, type="float", strategy="channel"),
        "compressed_tensors",
    ),
    "compressed-tensors, int4": (
        int4_groups,
        compressed("pack-quantized", None, num_bits=4, type="int", strategy="group", group_size=32),
        "compressed_tensors",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("which", FORMATS)
def test_packed_weights_are_unpacked_and_nothing_of_the_packing_is_left(
    which: str, toy_target_dir, tmp_path: Path
):
    pack, settings, package = FORMATS[which]
    pytest.importorskip(package)
    whole = LlamaForCausalLM.from_pretrained(toy_target_dir)
    linear = [n for n, m in whole.model.named_modules() if isinstance(m, nn.Linear)]
    stored = {n: w.contiguous() for n, w in whole.state_dict().items()}
    for name in (f"model.{n}" for n in linear):
        parts = pack(stored.pop(f"{name}.weight"))
        stored |= {f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    folder = Path(says(tmp_path / "q", toy_target_dir, **settings))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    target = load(str(folder), None, **PLACE).target
    for name in linear:
        module = target.model.model.get_submodule(name)
        before = whole.model.get_submodule(name).weight
        error = (unpacked(module.weight) - before).abs().mean() / before.abs().mean()
        assert 0 < error < (0.15 if "int4" in which else 0.04)
        assert "forward" not in vars(module)
        assert not module._forward_pre_hooks
        assert [n for n, _ in module.named_parameters()] == ["weight"]
    plain = load(str(toy_target_dir), None, **PLACE).target
    assert target.nbytes == plain.nbytes
    kind = torch.float32, torch.device("cpu")
    told, expected = (find_target(str(f)).nbytes(*kind) for f in (folder, toy_target_dir))
    assert told == expected
    with torch.no_grad():
        for name in linear:
            module = target.model.model.get_submodule(name)
            whole.model.get_submodule(name).weight.copy_(unpacked(module.weight))
        ids = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(0))
        logits = target.forward(target.cache(1, 32), ids, torch.zeros(1, dtype=torch.long), 0)[0]
        torch.testing.assert_close(logits, whole(input_ids=ids).logits, atol=2e-4, rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_in_four_bits_are_unpacked(tmp_path: Path, dtype: torch.dtype):
    """As gpt-oss is published: 32 numbers have one power of two in common."""
    config = GptOssConfig(
        **SHAPE | {"layer_types": ["sliding_attention", "full_attention"] * 2, "dtype": "bfloat16"},
        sliding_window=9,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GptOssForCausalLM(config)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    stored, wanted = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    noise = torch.Generator().manual_seed(1)
    for name, weight in model.state_dict().items():
        if not name.endswith("_proj") or "experts" not in name:
            stored[name] = weight.contiguous()
            continue
        experts, inputs, outputs = weight.shape
        shape = experts, outputs, inputs // 32, 32
        codes = torch.randint(0, 16, shape, generator=noise, dtype=torch.uint8)
        powers = torch.randint(-6, -3, shape[:3], generator=noise)
        stored[f"{name}_blocks"] = codes[..., ::2] | codes[..., 1::2] << 4
        stored[f"{name}_scales"] = (powers + 127).to(torch.uint8)
        signed = torch.cat([E2M1, -E2M1])[codes.long()] * 2.0 ** powers[..., None]
        wanted[name] = signed.reshape(experts, outputs, inputs).transpose(1, 2)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    given = json.loads((tmp_path / "config.json").read_text())
    given["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (tmp_path / "config.json").write_text(json.dumps(given))
    name = str(dtype).removeprefix("torch.")
    engine = load(str(tmp_path), None, device="cpu", dtype=name)
    weights = dict(engine.target.model.named_parameters())
    assert {weight.dtype for weight in weights.values()} == {dtype}
    for name, weight in wanted.items():
        assert torch.equal(weights[name].float(), weight)
    options = {"max_new_tokens": 6, "ignore_eos": True}
    assert len(engine.generate([[1, 2, 3]], **options)[0].token_ids) == 6
