"""Drafters on disk: what is understood, and how what is not is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys import (
    CONFIGS,
    MASK,
    VOCABULARY,
    bound_kind,
    greedy,
    little_memory,
    make_kind,
    random_features,
    toy_drafter,
    toy_engine,
)

from ttspec.config import DraftConfig
from ttspec.drafters.base import Drafter
from ttspec.drafters.checkpoint import load_drafter, read_config, save_drafter
from ttspec.errors import CheckpointError

KINDS = ["dflash", "eagle3", "pard", "causal"]
EVERY = list(CONFIGS)
MANY = [*KINDS, "eagle3.1", "eagle3-qk-norm", "pard-qwen3", "pard2"]
"""Whose files are damaged: each kind, and variants with tensors of their own."""
FULL = {"draft_vocab_size": VOCABULARY}
PART = {"draft_vocab_size": 120}


def write(folder: Path, which: str = "dflash", *, shard: str = "5GB", **config: Any) -> Path:
    drafter = make_kind(which, **config)
    save_drafter(folder, drafter.config, drafter.weights, shard)
    return folder


def edit_weights(
    folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> dict[str, Tensor]:
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors")
    return weights


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in {**config, **changes}.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def drop(name: str):
    return lambda weights: {n: w for n, w in weights.items() if n != name}


def put(name: str, value: Tensor):
    return lambda weights: {**weights, name: value}


def rename(change: Callable[[str], str]):
    return lambda weights: {change(n): w for n, w in weights.items()}


def refusal(folder: Path) -> str:
    """What is said of a folder: two lines that name it."""
    with pytest.raises(CheckpointError) as caught:
        load_drafter("drafter", folder)
    message = str(caught.value)
    assert str(folder) in message
    assert len(message.splitlines()) == 2, message
    return message


def bound(drafter: Drafter, layers: int = 4) -> Drafter:
    """Bound to a random embedding and head of the toy targets' size."""
    table = torch.randn(2, VOCABULARY, 64, generator=torch.Generator().manual_seed(1000))
    drafter.bind(table[0], 0.3 * table[1], layers)
    return drafter


def proposal_logits(
    drafter: Drafter, options: DraftConfig | None = None, first: int = 0, count: int = 30
) -> Tensor:
    """Draft logits [G, V] after `count` tokens from position `first`."""
    state = drafter.start(1, first + count + 20, options or DraftConfig())
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(256, (1, count + 1), generator=generator)
    features = random_features(1, count, len(drafter.taps) * 64)
    drafter.extend(state, tokens[:, :-1], features, torch.tensor([first]))
    seen: list[Tensor] = []

    def choose(logits: Tensor, index: int):
        seen.append(logits[0])
        return greedy(torch.zeros_like(logits), index)

    start, length = torch.tensor([first + count]), torch.tensor([drafter.length])
    drafter.propose(state, tokens[:, -1], start, length, drafter.length, first + count, choose)
    return torch.cat(seen)


# What comes back.


@pytest.mark.parametrize("which", EVERY)
@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_a_checkpoint_comes_back_as_it_was_written(tmp_path, which: str, shard: str):
    folder = write(tmp_path / "d", which, shard=shard)
    files = list(folder.glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "40KB")
    assert len(files) == 1 or (folder / "model.safetensors.index.json").is_file()
    drafter, original = load_drafter("back", folder), make_kind(which)
    assert drafter.kind == original.kind
    assert drafter.name == "back"
    assert drafter.path == folder
    assert dict(drafter.config) == dict(original.config)
    assert drafter.weights.keys() == original.weights.keys()
    assert all(torch.equal(drafter.weights[n], w) for n, w in original.weights.items())
    logits = proposal_logits(bound(drafter))
    torch.testing.assert_close(logits, proposal_logits(bound_kind(which)), atol=0, rtol=0)


@pytest.mark.parametrize("which", MANY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_come_back_as_bits(tmp_path, which, dtype):
    original = make_kind(which)
    halves = {n: w.to(dtype) if n != "d2t" else w for n, w in original.weights.items()}
    save_drafter(tmp_path / "d", original.config, halves)
    drafter = load_drafter("d", tmp_path / "d")
    assert all(torch.equal(drafter.weights[n], w) for n, w in halves.items())
    assert all(w.dtype == halves[n].dtype for n, w in drafter.weights.items())
    floating = {w.dtype for w in bound(drafter).weights.values() if w.is_floating_point()}
    assert floating == {torch.float32}


def test_a_checkpoint_is_never_overwritten(tmp_path):
    folder = write(tmp_path / "d")
    with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
        write(folder)
    assert len(str(caught.value).splitlines()) == 2


# Names.


def published(which: str, style: str) -> Callable[[str], str]:
    """Another publisher's name for a canonical one."""
    dflash = {"fc.": "encoder.fc.", "hidden_norm.": "encoder.output_norm_enc."}
    aux = {f"fc_norm.{i}.": f"aux_norm_{w}." for i, w in enumerate(("low", "mid", "high"))}
    table = {
        "prefix": {"": "model."},
        "layers": {"midlayer.": "layers.0."},
        "both": {"midlayer.": "model.layers.0.", "": "model."},
        "other": dflash if which.startswith("dflash") else aux,
    }[style]

    def name(plain: str) -> str:
        if plain in ("d2t", "t2d", "lm_head.weight"):  # never inside the model
            return plain
        start = next((s for s in table if plain.startswith(s)), None)
        return plain if start is None else table[start] + plain.removeprefix(start)

    return name


@pytest.mark.parametrize(
    ("which", "style"),
    [
        *((which, "prefix") for which in EVERY if which.startswith(("eagle3", "dflash"))),
        *((which, style) for which in EVERY if "eagle3" in which for style in ("layers", "both")),
        ("dflash", "other"),
        ("eagle3.1", "other"),
    ],
)
def test_other_names_of_the_same_tensors_are_understood(tmp_path, which, style):
    folder = write(tmp_path / "d", which)
    plain = load_drafter("d", folder)
    renamed = edit_weights(folder, rename(published(which, style)))
    assert renamed.keys() != plain.weights.keys()
    drafter = load_drafter("d", folder)
    assert drafter.kind == plain.kind
    assert drafter.weights.keys() == plain.weights.keys()
    assert torch.equal(proposal_logits(bound(drafter)), proposal_logits(bound(plain)))


def test_a_tensor_under_two_of_its_names_is_refused(tmp_path):
    folder = write(tmp_path / "d", "eagle3")
    edit_weights(folder, put("model.norm.weight", torch.ones(64)))
    assert "norm.weight" in refusal(folder)


@pytest.mark.parametrize(
    ("which", "flag", "names"),
    [
        ("eagle3.1", "fc_norm", ["fc_norm.0.weight"]),
        ("eagle3-norm-before-fc", "norm_before_fc", ["input_norm.weight"]),
        ("eagle3-qk-norm", "architectures", ["midlayer.self_attn.q_norm.weight"]),
    ],
)
def test_a_variant_that_the_config_does_not_mention_shows_in_its_tensors(
    tmp_path, which, flag, names
):
    folder = write(tmp_path / "d", which)
    wanted = proposal_logits(bound(load_drafter("d", folder)))
    edit_config(folder, **{flag: ...})
    drafter = load_drafter("d", folder)
    assert set(names) <= drafter.weights.keys()
    assert torch.equal(proposal_logits(bound(drafter)), wanted)


# Tables: heads, embeddings and vocabulary maps.


@pytest.mark.parametrize("which", ["pard-qwen3", "causal"])
def test_a_tied_head_that_is_shipped_all_the_same_is_tolerated(tmp_path, which):
    folder = write(tmp_path / "d", which, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    wanted = proposal_logits(bound(load_drafter("d", folder)))
    edit_weights(folder, lambda w: {**w, "lm_head.weight": w["model.embed_tokens.weight"].clone()})
    assert torch.equal(proposal_logits(bound(load_drafter("d", folder))), wanted)


def test_the_head_that_an_eagle3_head_ships_is_its_own_though_the_config_says_tied(tmp_path):
    folder = write(tmp_path / "d", "eagle3", tie_word_embeddings=True)
    drafter = bound(load_drafter("d", folder))
    assert torch.equal(drafter.head, drafter.weights["lm_head.weight"])


@pytest.mark.parametrize("size", [..., VOCABULARY], ids=["not given", "all"])
@pytest.mark.parametrize("zeros", [False, True], ids=["no d2t", "d2t of zeros"])
def test_a_full_vocabulary_needs_no_map(tmp_path, size, zeros):
    folder = write(tmp_path / "d", "eagle3", draft_vocab_size=VOCABULARY)
    edit_config(folder, draft_vocab_size=size, architectures=["LlamaForCausalLM"])
    if zeros:
        edit_weights(folder, put("d2t", torch.zeros(VOCABULARY, dtype=torch.long)))
    drafter = bound(load_drafter("d", folder))
    assert drafter.kind == "eagle3"
    assert drafter.draft_ids is None
    assert proposal_logits(drafter).shape == (4, VOCABULARY)


@pytest.mark.parametrize("which", ["eagle3", "dflash"])
def test_d2t_holds_offsets_not_tokens(tmp_path, which):
    folder = write(tmp_path / "d", which, **PART)
    d2t = load_file(folder / "model.safetensors")["d2t"]
    drafter = bound(load_drafter("d", folder))
    assert torch.equal(drafter.draft_ids, d2t + torch.arange(120))
    assert proposal_logits(drafter).shape == (4, 120)


@pytest.mark.parametrize("which", ["eagle3", "dflash"])
def test_tables_that_speculators_copies_into_the_file_are_used(tmp_path, which):
    folder = write(tmp_path / "d", which, **PART)
    table = torch.randn(VOCABULARY, 64)

    def copies(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        ids = weights["d2t"] + torch.arange(120)
        t2d = torch.zeros(VOCABULARY, dtype=torch.bool).index_fill(0, ids, True)
        return {**weights, "embed_tokens.weight": table, "t2d": t2d}

    edit_weights(folder, copies)
    drafter = bound(load_drafter("d", folder))
    assert torch.equal(drafter.embedding, table)
    assert torch.equal(drafter.head, drafter.weights["lm_head.weight"])


def t2d_of(weights: dict[str, Tensor], flip: int | None = None) -> dict[str, Tensor]:
    ids = weights["d2t"] + torch.arange(len(weights["d2t"]))
    t2d = torch.zeros(VOCABULARY, dtype=torch.bool).index_fill(0, ids, True)
    if flip is not None:
        t2d[flip] = ~t2d[flip]
    return {**weights, "t2d": t2d}


def shift(where: int, by: int):
    """Move one draft token's target."""

    def change(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        d2t = weights["d2t"].clone()
        d2t[where] += by
        return {**weights, "d2t": d2t}

    return change


def twice(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    d2t = weights["d2t"].clone()
    d2t[1] = d2t[0] - 1
    return {**weights, "d2t": d2t}


def swapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    ids = weights["d2t"] + torch.arange(120)
    ids[:2] = ids[:2].flip(0)
    return {**weights, "d2t": ids - torch.arange(120)}


MAPS = {
    "past the vocabulary": (shift(-1, 1000), "d2t"),
    "below zero": (shift(0, -1000), "d2t"),
    "duplicate": (twice, "d2t"),
    "out of order": (swapped, "d2t"),
    "tokens, not offsets": (lambda w: {**w, "d2t": w["d2t"] + torch.arange(120)}, "d2t"),
    "missing": (drop("d2t"), "d2t"),
    "too short": (lambda w: {**w, "d2t": w["d2t"][:119]}, "d2t"),
    "of floats": (lambda w: {**w, "d2t": w["d2t"].float()}, "d2t"),
    "of a t2d that says more": (lambda w: t2d_of({**w}, _outside(w)), "t2d"),
    "of a t2d that says less": (lambda w: t2d_of({**w}, int(w["d2t"][0])), "t2d"),
    "of a t2d of another size": (
        lambda w: {**w, "t2d": torch.ones(VOCABULARY + 1, dtype=torch.bool)},
        "t2d",
    ),
}


def _outside(weights: dict[str, Tensor]) -> int:
    ids = (weights["d2t"] + torch.arange(120)).tolist()
    return next(i for i in range(VOCABULARY) if i not in ids)


@pytest.mark.parametrize("which", ["eagle3", "dflash"])
@pytest.mark.parametrize("damage", MAPS)
def test_a_vocabulary_map_that_cannot_be_is_refused(tmp_path, which, damage):
    change, named = MAPS[damage]
    folder = write(tmp_path / "d", which, **PART)
    edit_weights(folder, t2d_of)
    load_drafter("d", folder)
    edit_weights(folder, change)
    if damage not in ("missing", "too short") and named == "d2t":
        edit_weights(folder, drop("t2d"))
    message = refusal(folder)
    assert named in message
    assert damage == "missing" or "model.safetensors" in message


@pytest.mark.parametrize("size", [0, -1, 121, VOCABULARY + 1])
@pytest.mark.parametrize("which", ["eagle3", "dflash"])
def test_a_draft_vocabulary_that_cannot_be_is_refused(tmp_path, which, size):
    folder = write(tmp_path / "d", which, **PART)
    edit_config(folder, draft_vocab_size=size)
    refusal(folder)


# Damaged tensors, one after the other.


def half(value: float):
    def change(w: Tensor) -> Tensor:
        w = w.clone()
        w.view(-1)[-1] = value
        return w

    return change


HARM: dict[str, Callable[[Tensor], Tensor]] = {
    "longer": lambda w: torch.cat([w, w[:1]]),
    "one dimension more": lambda w: w[None],
    "NaN": half(math.nan),
    "infinity": half(math.inf),
    "minus infinity": half(-math.inf),
    "integers": lambda w: (100 * w).to(torch.int8),
    "longs": lambda w: (100 * w).long(),
    "eight bits": lambda w: w.to(torch.float8_e4m3fn),
}


# What a value or a dtype may be depends neither on the tensor nor on the variant; shapes do.
@pytest.mark.parametrize(
    ("which", "harm"), [(w, h) for w in MANY for h in HARM if w in KINDS or h in ("longer", "NaN")]
)
def test_a_bad_tensor_is_refused_with_its_file_and_name(tmp_path, which, harm):
    folder = write(tmp_path / "d", which)
    weights = load_file(folder / "model.safetensors")
    every = which in KINDS and harm == "longer"
    for name, weight in list(weights.items())[:: 1 if every else 3]:
        if name == "d2t":
            continue
        save_file({**weights, name: HARM[harm](weight)}, folder / "model.safetensors")
        assert f"{folder / 'model.safetensors'}: {name} " in refusal(folder)


@pytest.mark.parametrize("which", MANY)
def test_a_missing_tensor_is_refused_by_its_name(tmp_path, which):
    folder = write(tmp_path / "d", which)
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        save_file(drop(name)(weights), folder / "model.safetensors")
        if name == "lm_head.weight" and which == "eagle3-qk-norm":
            load_drafter("d", folder)  # of the whole vocabulary: the target's
        elif name in ("fc.weight", "lm_head.weight", "midlayer.self_attn.q_norm.weight"):
            refusal(folder)  # what is missing decides the kind or the variant
        else:
            assert f"{folder} lacks {name} " in refusal(folder)


@pytest.mark.parametrize("which", MANY)
@pytest.mark.parametrize("more", ["extra.weight", "layers.9.mlp.up_proj.weight", "fc.bias"])
def test_a_tensor_that_has_no_place_is_refused_by_its_name(tmp_path, which, more):
    folder = write(tmp_path / "d", which)
    edit_weights(folder, put(more, torch.ones(64)))
    message = refusal(folder)
    assert f"{folder / 'model.safetensors'}: {more} " in message


def test_a_missing_shard_is_refused_by_the_name_of_a_missing_tensor(tmp_path):
    for which in KINDS:
        folder = write(tmp_path / which, which, shard="40KB")
        sorted(folder.glob("*.safetensors"))[1].unlink()
        assert "lacks" in refusal(folder)


# Damaged files.


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def break_header(folder: Path, at: int, value: bytes) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(bytes(data))


def pickle_only(folder: Path, name: str = "pytorch_model.bin") -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / name)
    (folder / "model.safetensors").unlink()


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "not JSON": (lambda f: (f / "config.json").write_text("{'a': 1"), "config.json"),
    "half a config": (
        lambda f: (f / "config.json").write_text((f / "config.json").read_text()[:80]),
        "config.json",
    ),
    "empty config": (lambda f: (f / "config.json").write_text(""), "config.json"),
    "config of nothing": (lambda f: (f / "config.json").write_text("{}"), "config.json"),
    "a list": (lambda f: (f / "config.json").write_text("[1, 2]"), "config.json"),
    "not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "safetensors"),
    "truncated": (truncate, "model.safetensors"),
    "cut in the header": (
        lambda f: (f / "model.safetensors").write_bytes(
            (f / "model.safetensors").read_bytes()[:100]
        ),
        "model.safetensors",
    ),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "header of no length": (lambda f: break_header(f, 0, bytes(8)), "model.safetensors"),
    "endless header": (lambda f: break_header(f, 0, b"\xff" * 8), "model.safetensors"),
    "header that is no JSON": (lambda f: break_header(f, 8, b"[[[["), "model.safetensors"),
    "header that is no text": (lambda f: break_header(f, 12, b"\xff\xfe"), "model.safetensors"),
    "a web page": (
        lambda f: (f / "model.safetensors").write_text("<html>not found</html>" * 50),
        "model.safetensors",
    ),
    "pickle only": (pickle_only, "pytorch_model.bin"),
}


@pytest.mark.parametrize("which", KINDS)
@pytest.mark.parametrize("damage", FILES)
def test_a_damaged_file_is_refused_in_two_lines_that_name_it(tmp_path, which, damage):
    folder = write(tmp_path / "d", which)
    hurt, named = FILES[damage]
    hurt(folder)
    assert named in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "a.pth", "b.ckpt", "c.pkl"])
def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path, monkeypatch, name):
    folder = write(tmp_path / "d", "eagle3")
    weights = load_file(folder / "model.safetensors")
    pickle_only(folder, name)
    line = refusal(folder).splitlines()[1]
    command = line.partition('python -c "')[2].removesuffix('"')
    monkeypatch.chdir(folder)
    exec(command)
    assert load_drafter("d", folder).weights.keys() == weights.keys()


def test_the_pickle_that_holds_a_missing_tensor_is_pointed_at(tmp_path):
    folder = write(tmp_path / "d", "pard2")
    projection = load_file(folder / "model.safetensors")["target_proj.weight"]
    edit_weights(folder, drop("target_proj.weight"))
    torch.save({"target_proj.weight": projection}, folder / "warp_model.bin")
    message = refusal(folder)
    assert "target_proj.weight" in message
    assert "warp_model.bin" in message


# Configs.

NEEDED = {
    "eagle3": [
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
        "rms_norm_eps",
        "vocab_size",
    ],
    "dflash": [
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "rms_norm_eps",
        "vocab_size",
        "block_size",
        "mask_token_id",
    ],
    "pard": ["hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "pard_token"],
    "pard2": ["pard2_target_dim", "pard2_target_layers", "pard_token"],
    "causal": ["hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "model_type"],
}


@pytest.mark.parametrize(
    ("which", "key"), [(which, key) for which, keys in NEEDED.items() for key in keys]
)
def test_a_config_without_a_key_is_refused(tmp_path, which, key):
    folder = write(tmp_path / "d", which)
    if key == "mask_token_id":
        edit_config(folder, dflash_config={"target_layer_ids": [0, 2]})
    else:
        edit_config(folder, **{key: ...})
    message = refusal(folder)
    if which in ("eagle3", "dflash", "pard2") or key == "pard_token":
        assert f"'{key}' is missing" in message
        assert "config.json" in message


@pytest.mark.parametrize(
    ("which", "changes", "named"),
    [
        ("dflash", {"dflash_config": "yes"}, "config.json"),
        ("dflash", {"layer_types": ["full_attention"]}, "layer_types"),
        ("dflash", {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ("dflash", {"block_size": 1}, "block_size"),
        ("eagle3", {"sample_from_anchor": True}, "sample_from_anchor"),
        ("dflash", {"attention_sink_bias": True}, "attention_sink_bias"),
        ("dflash", {"add_swa_attention_sink_bias": True}, "add_swa_attention_sink_bias"),
        ("eagle3", {"attention_value_scale": 0.5}, "attention_value_scale"),
        ("eagle3", {"norm_before_fc": True, "fc_norm": True}, "fc_norm"),
        ("eagle3", {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2]}}, "fc.weight"),
        ("eagle3", {"ttspec": {"length": -1}}, "a round has -1 drafts"),
        ("eagle3", {"num_aux_hidden_states": 4}, "num_aux_hidden_states is 4"),
        ("eagle3", {"eagle_config": "yes"}, "config.json"),
        ("eagle3", {"transformer_layer_config": "yes"}, "config.json"),
        ("causal", {"architectures": ["Eagle9"], "model_type": "eagle9"}, "Eagle9"),
        ("causal", {"architectures": 5, "model_type": ...}, "5"),
        ("causal", {"model_type": ["llama"]}, "config.json"),
        ("causal", {"model_type": "vit"}, "config.json"),
        ("pard2", {"pard2_target_layers": 3}, "config.json"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_config_that_asks_for_what_there_is_not_is_refused(tmp_path, which, changes, named):
    folder = write(tmp_path / "d", which)
    edit_config(folder, **changes)
    message = refusal(folder)
    assert named in message


@pytest.mark.parametrize("which", ["dflash", "eagle3", "pard-qwen3", "causal"])
def test_layers_that_no_file_can_hold_are_refused_before_they_take_memory(tmp_path, which):
    folder = write(tmp_path / "d", which)
    edit_config(folder, num_hidden_layers=10**9)
    with little_memory(2**30):
        message = refusal(folder)
    assert "num_hidden_layers is 1,000,000,000; the files hold" in message


def test_the_number_of_layers_that_do_not_slide_takes_no_memory(tmp_path):
    folder = write(tmp_path / "d", "dflash")
    sliding = {"use_sliding_window": True, "sliding_window": 8, "layer_types": ...}
    edit_config(folder, **sliding, max_window_layers=10**9)
    with little_memory(2**30):
        assert load_drafter("toy", folder).layers == 2


def test_attention_sinks_inside_dflash_config_are_refused(tmp_path):
    own = {"mask_token_id": MASK, "target_layer_ids": [0, 2], "attention_sink_bias": True}
    folder = write(tmp_path / "d")
    edit_config(folder, dflash_config=own)
    assert "attention_sink_bias" in refusal(folder)


@pytest.mark.parametrize(
    ("which", "changes", "named"),
    [
        ("dflash", {"architectures": ["Gemma4DSparkModel"]}, "DSpark on layers of another family"),
        ("dflash", {"architectures": ["DSparkV41DraftModel"]}, "DSpark on layers"),
    ],
)
def test_a_relative_is_refused_by_its_name(tmp_path, which, changes, named):
    folder = write(tmp_path / "d", which)
    edit_config(folder, **changes)
    assert named in refusal(folder)


@pytest.mark.parametrize(
    ("name", "shape", "key"),
    [
        ("mask_hidden", (1, 1, 192), "mask_token_id"),
        ("model.mask_hidden", (1, 192), "ptd_token_id"),
    ],
)
def test_p_eagle_is_known_by_its_mask_hidden(tmp_path, name, shape, key):
    folder = write(tmp_path / "d", "eagle3")
    mask = torch.arange(192.0)
    edit_weights(folder, put(name, mask.view(shape)))
    assert "mask_token_id" in refusal(folder)
    edit_config(folder, **{key: MASK})
    drafter = load_drafter("d", folder)
    assert drafter.kind == "peagle"
    assert torch.equal(drafter.weights["mask_hidden"], mask.view(1, 1, 192))


# Taps.


@pytest.mark.parametrize(
    ("top", "nested", "taps"),
    [
        (None, [1, 15, 28], (2, 16, 29)),
        (None, [2, 16, 29], (2, 16, 29)),
        (None, [3, 10, 20], (4, 11, 21)),
        ([1, 15, 28], None, (2, 16, 29)),
        ([2, 16, 29], None, (2, 16, 29)),
        ([3, 10, 20], None, (3, 10, 20)),
        ([2, 16, 29], [1, 15, 28], (2, 16, 29)),
        (None, None, (2, 16, 29)),
        ([], None, (2, 16, 29)),
    ],
)
def test_eagle3_layer_ids_that_begin_with_1_leave_a_layer_and_others_enter_it(top, nested, taps):
    key = "eagle_aux_hidden_state_layer_ids"
    drafter = make_kind("eagle3", eagle_config=nested and {key: nested}, **{key: top})
    assert bound(drafter, 32).taps == taps
    assert "layer" in drafter.interpretation["taps"]


@pytest.mark.parametrize(
    ("config", "taps"),
    [
        ({"dflash_config": {"mask_token_id": MASK, "target_layer_ids": [1, 9]}}, (2, 10)),
        ({"dflash_config": {"mask_token_id": MASK}, "num_target_layers": 36}, (2, 34)),
        (
            {"mask_token_id": MASK, "dflash_config": None, "aux_hidden_state_layer_ids": [2, 10]},
            (2, 10),
        ),
    ],
)
def test_dflash_layer_ids_leave_a_layer_but_those_of_speculators_enter_it(config, taps):
    assert bound(make_kind("dflash", **config), 36).taps == taps


# Rotation.


@pytest.mark.parametrize("which", EVERY)
def test_the_rope_base_can_be_overridden(which):
    drafter = bound_kind(which)
    own = proposal_logits(drafter)
    same = proposal_logits(drafter, DraftConfig(rope_base=10000.0))
    torch.testing.assert_close(same, own, atol=1e-5, rtol=0)
    other = proposal_logits(drafter, DraftConfig(rope_base=1e6))
    assert not torch.allclose(other, own, atol=1e-2)


@pytest.mark.parametrize("which", EVERY)
def test_positions_are_not_limited_by_max_position_embeddings(which):
    candidates = {"selector_top_k": VOCABULARY} if which.startswith("dflash2") else {}
    drafter = bound_kind(which, max_position_embeddings=2048, **candidates)
    options = DraftConfig(window=12)  # what is before the first token is not looked at
    near = proposal_logits(drafter, options, first=100)
    far = proposal_logits(drafter, options, first=3000)
    assert near.std() > 0.1
    torch.testing.assert_close(far, near, atol=5e-3, rtol=0)


# Another target.


@pytest.mark.parametrize(
    ("which", "config", "named"),
    [
        ("dflash", {"hidden_size": 32, "head_dim": 16}, "hidden size of 32"),
        ("dflash", {"vocab_size": 999}, "vocabulary of 999"),
        ("dflash", {"dflash_config": {"mask_token_id": 4000, "target_layer_ids": [0]}}, "4000"),
        ("dflash", {"dflash_config": {"mask_token_id": -1, "target_layer_ids": [0]}}, "-1"),
        ("dflash", {"dflash_config": {"mask_token_id": MASK, "target_layer_ids": [0, 9]}}, "10"),
        ("eagle3", {"hidden_size": 32}, "hidden size of 32"),
        ("eagle3", {"target_hidden_size": 32}, "hidden size of 32"),
        ("eagle3", {"hidden_size": 32, "target_hidden_size": 64}, "32 wide"),
        ("eagle3", {"vocab_size": 999}, "vocabulary of 999"),
        ("eagle3", {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 5, 6]}}, "[2, 5, 6]"),
        ("pard", {"vocab_size": 999}, "vocabulary of 999"),
        ("pard", {"pard_token": 4000}, "4000"),
        ("pard", {"pard_token": -1}, "-1"),
        ("pard2", {"pard2_target_dim": 128}, "width of 128"),
        ("pard2", {"pard2_target_layers": [-1, -2, 9]}, "9"),
        ("pard2", {"pard2_target_layers": [-1, -2, -9]}, "-4"),
        ("causal", {"vocab_size": 999}, "vocabulary of 999"),
    ],
)
def test_the_drafter_of_another_target_is_refused(toy_target_dir, which, config, named):
    with pytest.raises(CheckpointError) as caught:
        toy_engine(toy_target_dir, make_kind(which, **config))
    message = str(caught.value)
    assert named in message
    assert f"Drafter {make_kind(which).name}" in message
    assert len(message.splitlines()) == 2


def test_a_config_is_read_as_it_is(tmp_path):
    folder = write(tmp_path / "d", "eagle3")
    assert read_config(folder) == CONFIGS["eagle3"][1]
    assert toy_drafter().weights.keys() == make_kind("dflash").weights.keys()
