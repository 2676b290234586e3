"""DFlash: its files, and how damaged ones are refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys import MASK, toy_drafter, toy_engine

from ttspec.drafters.checkpoint import load_drafter, save_drafter
from ttspec.drafters.dflash import DFlash
from ttspec.errors import CheckpointError

QWEN3_8B = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 5,
    "num_target_layers": 36,
    "block_size": 16,
    "layer_types": ["full_attention"] * 5,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-06,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "dflash_config": {"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]},
}


def test_the_published_qwen3_8b_config_maps_on_the_published_tensors():
    drafter = DFlash(QWEN3_8B, {})
    shapes = drafter.shapes()
    assert len(shapes) == 58
    assert sum(math.prod(shape) for shape in shapes.values()) == 1_048_626_432
    assert shapes["fc.weight"] == (4096, 5 * 4096)
    assert shapes["layers.4.self_attn.k_proj.weight"] == (1024, 4096)
    assert shapes["layers.0.self_attn.q_norm.weight"] == (128,)
    assert not {"embed_tokens.weight", "lm_head.weight"} & shapes.keys()
    assert drafter.length == 15
    assert drafter.taps == (2, 10, 18, 26, 34)
    assert drafter.theta == 1e6


def write(folder: Path, *, shard: str = "5GB", **config) -> Path:
    drafter = toy_drafter(**config)
    save_drafter(folder, drafter.config, drafter.weights, shard)
    return folder


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_a_checkpoint_comes_back_as_it_was_written(tmp_path, shard: str):
    folder = write(tmp_path / "d", shard=shard)
    files = list(folder.glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "40KB")
    assert len(files) == 1 or (folder / "model.safetensors.index.json").is_file()
    drafter, original = load_drafter("back", folder), toy_drafter()
    assert drafter.kind == "dflash"
    assert drafter.name == "back"
    assert dict(drafter.config) == dict(original.config)
    assert drafter.weights.keys() == original.weights.keys()
    assert all(torch.equal(drafter.weights[n], w) for n, w in original.weights.items())


def test_bfloat16_weights_come_back_as_bits(tmp_path):
    original = toy_drafter(dtype=torch.bfloat16)
    save_drafter(tmp_path / "d", original.config, original.weights)
    drafter = load_drafter("d", tmp_path / "d")
    assert all(torch.equal(drafter.weights[n], w) for n, w in original.weights.items())
    assert {w.dtype for w in drafter.weights.values()} == {torch.bfloat16}


def test_names_with_a_prefix_or_of_the_other_publishers_are_understood(tmp_path):
    folder = write(tmp_path / "d")
    weights = load_file(folder / "model.safetensors")
    other = {
        "fc.weight": "encoder.fc.weight",
        "hidden_norm.weight": "encoder.output_norm_enc.weight",
    }
    renamed = {other.get(n, f"model.{n}"): w for n, w in weights.items()}
    save_file(renamed, folder / "model.safetensors")
    assert load_drafter("d", folder).weights.keys() == weights.keys()


def test_a_checkpoint_is_never_overwritten(tmp_path):
    folder = write(tmp_path / "d")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        write(folder)


def edit_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors")


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in {**config, **changes}.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def drop(name: str):
    return lambda weights: {n: w for n, w in weights.items() if n != name}


def put(name: str, value: Tensor):
    return lambda weights: {**weights, name: value}


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pickle_only(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


NAN = torch.full((64,), math.nan)
DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "safetensors"),
    "pickle only": (pickle_only, "pytorch_model.bin"),
    "truncated": (truncate, "model.safetensors"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "a web page": (
        lambda f: (f / "model.safetensors").write_text("<html>not found</html>" * 50),
        "model.safetensors",
    ),
    "not JSON": (lambda f: (f / "config.json").write_text("{'a': 1"), "config.json"),
    "not an object": (lambda f: (f / "config.json").write_text("[1, 2]"), "config.json"),
    "not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json"),
    "unknown kind": (
        lambda f: edit_config(f, architectures=["Eagle9"], dflash_config=...),
        "Eagle9",
    ),
    "no kind": (lambda f: edit_config(f, architectures=..., dflash_config=...), "config.json"),
    "odd kind": (lambda f: edit_config(f, architectures=5, dflash_config=...), "config.json"),
    "no hidden size": (lambda f: edit_config(f, hidden_size=...), "hidden_size"),
    "no mask token": (lambda f: edit_config(f, dflash_config={}), "mask_token_id"),
    "odd dflash_config": (lambda f: edit_config(f, dflash_config="yes"), "config.json"),
    "odd number": (lambda f: edit_config(f, hidden_size="wide"), "wide"),
    "no heads": (lambda f: edit_config(f, num_attention_heads=0, head_dim=...), "config.json"),
    "heads that do not divide": (lambda f: edit_config(f, num_key_value_heads=3), "config.json"),
    "too few layer types": (
        lambda f: edit_config(f, layer_types=["full_attention"]),
        "layer_types",
    ),
    "a block of one": (lambda f: edit_config(f, block_size=1), "block_size"),
    "missing tensor": (lambda f: edit_weights(f, drop("norm.weight")), "norm.weight"),
    "extra tensor": (lambda f: edit_weights(f, put("lm_head.weight", NAN)), "lm_head.weight"),
    "wrong shape": (
        lambda f: edit_weights(f, put("hidden_norm.weight", torch.ones(65))),
        "hidden_norm.weight",
    ),
    "NaN": (lambda f: edit_weights(f, put("norm.weight", NAN)), "norm.weight"),
    "infinity": (lambda f: edit_weights(f, put("norm.weight", torch.ones(64) / 0)), "norm.weight"),
    "more layers than tensors": (
        lambda f: edit_config(f, num_hidden_layers=3),
        "layers.2.",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_two_lines_that_name_the_cause(tmp_path, damage):
    folder = write(tmp_path / "drafter")
    hurt, named = DAMAGES[damage]
    hurt(folder)
    with pytest.raises(CheckpointError) as caught:
        load_drafter("drafter", folder)
    message = str(caught.value)
    assert named in message
    assert str(folder) in message
    assert len(message.splitlines()) <= 2


def test_a_missing_shard_is_refused_by_the_name_of_a_missing_tensor(tmp_path):
    folder = write(tmp_path / "d", shard="40KB")
    sorted(folder.glob("*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match="lacks"):
        load_drafter("d", folder)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"hidden_size": 32, "head_dim": 16}, "hidden size of 32"),
        ({"vocab_size": 999}, "vocabulary of 999"),
        ({"dflash_config": {"mask_token_id": 4000, "target_layer_ids": [0, 2]}}, "4000"),
        ({"dflash_config": {"mask_token_id": MASK, "target_layer_ids": [0, 9]}}, "layer 9"),
    ],
    ids=["hidden size", "vocabulary", "mask token", "taps"],
)
def test_the_drafter_of_another_target_is_refused(toy_target_dir, config, named):
    with pytest.raises(CheckpointError) as caught:
        toy_engine(toy_target_dir, toy_drafter(**config))
    assert named in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2
