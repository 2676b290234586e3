"""Quantised checkpoints that transformers loads by itself: those that were tried, and no others."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer
from toys import PLAIN, toy_drafter
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from ttspec import load
from ttspec.decoding.engine import Engine
from ttspec.errors import ResourceError, TargetError
from ttspec.models import loading
from ttspec.models.layers import merge_linears

PLACE = {"device": "cpu", "dtype": "float32"}


def says(folder: Path, source: Path, **quantisation) -> str:
    """A copy of a folder whose config says that it is quantised."""
    shutil.copytree(source, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": quantisation}
    path.write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors", "mxfp4", "gguf"])
def test_a_method_that_was_not_tried_is_refused_by_name(toy_target_dir, tmp_path, method: str):
    name = says(tmp_path / "q", toy_target_dir, quant_method=method, bits=4)
    with pytest.raises(TargetError, match=f"quantised by {method}, which was not tried") as caught:
        load(name, None, **PLACE)
    assert len(str(caught.value).splitlines()) == 2


def test_eight_bits_of_bitsandbytes_are_refused_for_their_reason(toy_target_dir, tmp_path):
    """Measured: in float32 a token's logits differ by 0.2 with the tokens read beside it."""
    given = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(TargetError, match="depend on the tokens read with it"):
        load(says(tmp_path / "q", toy_target_dir, **given), None, **PLACE)


@pytest.mark.parametrize("method", ["torchao", "bitsandbytes"])
def test_a_missing_package_is_said(toy_target_dir, tmp_path, monkeypatch, method: str):
    monkeypatch.setattr(loading, "find_spec", lambda _: None)
    given = {"quant_method": method, "load_in_4bit": True}
    with pytest.raises(ResourceError, match=rf"package {method}.*\n.*ttspec\[quantised\]"):
        load(says(tmp_path / "q", toy_target_dir, **given), None, **PLACE)


def quantised(which: str, source: Path, folder: Path) -> Path:
    """The toy target, packed and saved as its users do."""
    if which == "torchao":
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes")
        pytest.importorskip("accelerate")
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, quantization_config=config
    )
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("which", ["torchao", "bitsandbytes"])
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
    assert 0 < error < (0.1 if which == "torchao" else 2.0)
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


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_embedding_is_refused(toy_target_dir, tmp_path: Path):
    folder = quantised("torchao", toy_target_dir, tmp_path / "q")
    engine = load(str(folder), None, **PLACE)
    packed = engine.target.model.model.layers[0].mlp.up_proj.weight
    engine.target.model.lm_head.weight = packed
    with pytest.raises(TargetError, match="quantised output head"):
        loading._require_plain(folder, engine.target.model)
