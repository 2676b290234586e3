"""MTP heads: those of targets' own files, on hybrids too, and what they agree with."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_layers as theirs
from conftest import SHAPE, byte_tokenizer
from hybrids import random_hybrid, write_with_head
from safetensors.torch import load_file, save_file
from test_conformance import drafted
from torch import Tensor
from toys import PLAIN, SLOTS, parrot, plain
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4MoeConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from ttspec import LearnConfig, load
from ttspec.cli import main
from ttspec.config import DraftConfig
from ttspec.decoding.engine import Engine
from ttspec.decoding.loading import find_drafter
from ttspec.drafters.checkpoint import load_drafter
from ttspec.drafters.export import export_drafter
from ttspec.drafters.mtp import Mtp
from ttspec.errors import CheckpointError
from ttspec.models.target import find_target

HYBRIDS = ("qwen3_5", "qwen3_next", "qwen3_5_moe")
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
COMPRESSED = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
NUMBERED: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "glm4_moe": (Glm4MoeConfig, {**SHAPE, **ROUTED, "n_group": 1, "topk_group": 1}),
    "deepseek_v3": (
        DeepseekV3Config,
        {**SHAPE, **ROUTED, **COMPRESSED, "head_dim": 8, "n_group": 2, "topk_group": 1},
    ),
}
"""Families whose head is called as the layer after the last one."""
FAMILIES = (*HYBRIDS, *NUMBERED)
QUICK = [
    pytest.param(f, marks=[] if f in ("qwen3_5", "deepseek_v3") else pytest.mark.slow)
    for f in FAMILIES
]
PROMPT = "the quick brown fox"
NOW = LearnConfig(stride=1, lr=3e-3, supervision="block", blocks=2)
WHOLE = DraftConfig(copy=False)
OPTIONS = {"max_new_tokens": 24, "seed": 5, "ignore_eos": True, "draft": WHOLE}


def random_target(family: str) -> PreTrainedModel:
    if family in HYBRIDS:
        return random_hybrid(family)
    kind, config = NUMBERED[family]
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return AutoModelForCausalLM.from_config(kind(**config), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Targets with a head in their files, by family."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        for family in FAMILIES:
            model = random_target(family)
            if family in NUMBERED:
                ignore(patch, model)
            made[family] = write_with_head(tmp_path_factory.mktemp(family), model)
    return made


def ignore(patch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
    """Let transformers pass over layer 4, as over layers 46, 61 and 92 of published ones."""
    patch.setattr(type(model), "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.4\."])


@pytest.fixture(autouse=True)
def passes_over_heads(monkeypatch) -> None:
    for family in NUMBERED:
        ignore(monkeypatch, random_target(family))


def with_own(folders: dict[str, Path], family: str) -> Engine:
    return load(str(folders[family]), "mtp", device="cpu", dtype="float32")


def text_of(engine: Engine, count: int = 30) -> tuple[Tensor, Tensor]:
    """A text, and what the target's taps say of it."""
    ids = torch.randint(0, 256, (1, count), generator=torch.Generator().manual_seed(3))
    begin = torch.zeros(1, dtype=torch.long)
    _, features = engine.target.forward(engine.target.cache(1, SLOTS, count), ids, begin, 0)
    return ids, features


def chain_of(engine: Engine, ids: Tensor, features: Tensor, start: int) -> Tensor:
    """Logits [G, V] that are drafted after `start` tokens, where drafts go on with the text."""
    state = engine.drafter.start(1, SLOTS, WHOLE)
    engine.drafter.extend(state, ids[:, :start], features[:, :start], torch.zeros(1, dtype=int))
    script = ids[:, start + 1 :]
    return drafted(engine.drafter, state, [int(ids[0, start])], [start], script)[0][0]


# Agreement.


@pytest.mark.skipif(not hasattr(theirs, "MtpModel"), reason="transformers before 5.24")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_chain_says_what_transformers_layer_says_of_its_own_state(folders, family: str):
    """Its `MtpModel` steps through one layer for each token; here one layer is fed its state."""
    from transformers.cache_utils import MtpCache

    engine = with_own(folders, family)
    model = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32)
    model.config.num_mtp_layers = 1
    if family in HYBRIDS:  # whose configs do not say it
        model.config.mtp_layer_types = ["full_attention"]
    head = theirs.MtpModel(model, 1).eval()
    own = dict(engine.drafter.weights)
    names = {
        "pre_fc_norm_embedding": "layers.0.enorm",
        "pre_fc_norm_hidden": "layers.0.hnorm",
        "fc": "layers.0.eh_proj",
        "norm": "layers.0.post_norm",
        "layers.0": "layers.0.mtp_block",
    }
    renamed = {}
    for name, weight in own.items():
        old = next(n for n in names if name.startswith(n + "."))
        renamed[names[old] + name.removeprefix(old)] = weight
    report = head.load_state_dict(renamed, strict=False)
    assert not report.unexpected_keys
    assert not any(n.startswith("layers.") for n in report.missing_keys)
    ids, features = text_of(engine)
    for start in (6, 8, 14):
        cache, hidden, wanted = MtpCache(config=head.config), features[:, :start], []
        for step in range(engine.drafter.length):
            token = ids[:, 1 : start + 1] if not step else ids[:, start + step : start + step + 1]
            position = (
                torch.arange(1, start + 1)[None] if not step else torch.tensor([[start + step]])
            )
            with torch.no_grad():
                hidden = head.forward_layer(0, hidden, position, cache, input_ids=token)
            hidden = hidden[:, -1:]
            wanted.append(hidden[0] @ engine.target.head.T)
        found = chain_of(engine, ids, features, start)
        torch.testing.assert_close(found, torch.cat(wanted), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not hasattr(theirs, "MtpModel"), reason="transformers before 5.24")
@pytest.mark.parametrize("family", NUMBERED)
def test_drafts_are_those_of_transformers_own_generate(folders, monkeypatch, family: str):
    model = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32)
    seen, forward = [], theirs.MtpModel.forward

    def watched(self, *args: Any, full_input_ids: Tensor, **given: Any):
        out = forward(self, *args, full_input_ids=full_input_ids, **given)
        seen.append((full_input_ids[0], out[1][0, 0]))
        return out

    monkeypatch.setattr(theirs.MtpModel, "forward", watched)
    prompt = torch.tensor([[*PROMPT.encode()]])
    with torch.no_grad():
        text = model.generate(
            prompt, use_mtp=True, max_new_tokens=10, do_sample=False, eos_token_id=None
        )
    engine = with_own(folders, family)
    begin = torch.zeros(1, dtype=torch.long)
    cache = engine.target.cache(1, SLOTS)
    _, features = engine.target.forward(cache, text, begin, 0)
    assert len(seen) > 3
    for ids, logits in seen:
        start = len(ids) - 1
        assert torch.equal(ids, text[0, : start + 1])
        padded = torch.cat([text, text], dim=1)
        found = chain_of(engine, padded, features, start)[0]
        torch.testing.assert_close(found, logits, atol=1e-4, rtol=1e-4)
    result = engine.generate([prompt[0].tolist()], temperature=0.0, learn=None, **OPTIONS)[0]
    assert result.token_ids[:10] == text[0, prompt.shape[1] :].tolist()


# On its own target.


@pytest.mark.parametrize("family", QUICK)
def test_texts_are_those_of_plain_decoding_while_the_head_learns(folders, family: str):
    engine = with_own(folders, family)
    assert isinstance(engine.drafter, Mtp)
    assert engine.drafter.taps == (4,)
    target = {n: p.clone() for n, p in engine.target.model.state_dict().items()}
    prompts, kept = [PROMPT, "a"], 0
    low_rank = replace(NOW, weights="lora", rank=2)
    for temperature, arms in ((0.0, (None, NOW)), (1.2, (low_rank,))):
        options = {**OPTIONS, "temperature": temperature, "max_new_tokens": 12}
        wanted = [r.token_ids for r in engine.generate(prompts, **{**options, **PLAIN})]
        for learn in arms:
            results = engine.generate(prompts, learn=learn, **options)
            assert [r.token_ids for r in results] == wanted
            assert all((r.stats.updates > 0) == bool(learn) for r in results)
            kept += sum(r.accepted for result in results for r in result.rounds)
    assert kept
    left = engine.target.model.state_dict()
    assert all(torch.equal(target[n], left[n]) for n in target)


@pytest.mark.parametrize("family", ["qwen3_5", "glm4_moe"])
def test_what_a_head_learned_goes_back_under_its_targets_names(folders, tmp_path, family: str):
    engine = with_own(folders, family)
    session = engine.session(max_new_tokens=24, learn=LearnConfig(stride=1, scope="session"))
    session.send(PROMPT)
    learned = session.learned()
    export_drafter(learned, engine.target, "published", tmp_path / "out", dtype="float32")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(folders[family] / "model.safetensors")
    assert stored.keys() == {n for n in before if n.startswith(("mtp.", "model.layers.4."))}
    assert all(stored[n].shape == before[n].shape for n in stored)
    moved = [n for n in stored if not torch.equal(stored[n], before[n])]
    assert any("self_attn" in n for n in moved)
    # Laid over the target's own files it is the target's head.
    folder = tmp_path / "target"
    folder.mkdir()
    for file in folders[family].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    save_file(before | stored, folder / "model.safetensors", {"format": "pt"})
    again = load(str(folder), "mtp", device="cpu", dtype="float32").drafter
    for name, weight in learned.weights.items():
        assert torch.equal(again.weights[name], weight), name


@pytest.mark.parametrize("form", ["published", "speculators"])
@pytest.mark.parametrize("family", QUICK)
def test_an_export_drafts_what_the_head_drafts(folders, tmp_path, family: str, form: str):
    engine = with_own(folders, family)
    export_drafter(engine.drafter, engine.target, form, tmp_path / "out", dtype="auto")
    again = load_drafter("again", tmp_path / "out")
    assert again.kind == "mtp"
    assert again.length == engine.drafter.length
    other = load(str(folders[family]), again, device="cpu", dtype="float32")
    ids, features = text_of(engine)
    assert torch.equal(chain_of(engine, ids, features, 9), chain_of(other, ids, features, 9))


def test_a_head_that_is_always_right_is_always_accepted(folders):
    """On a hybrid: states follow the rows that its drafts were read in."""
    engine = with_own(folders, "qwen3_5")
    whole = plain(engine, PROMPT, **{**OPTIONS, "temperature": 0.0})
    led = parrot(engine, whole, length=3)
    result = led.generate(PROMPT, temperature=0.0, learn=None, **OPTIONS)[0]
    assert result.token_ids == whole.token_ids
    assert all(r.accepted == r.proposed for r in result.rounds)


# Which head.


def test_auto_is_the_targets_own_head(folders, toy_target_dir):
    engine = load(str(folders["qwen3_5"]), device="cpu", dtype="float32")
    assert engine.drafter.kind == "mtp"
    assert engine.drafter.name == "mtp"
    assert load(str(toy_target_dir), device="cpu", dtype="float32").drafter is None


def refusal(target: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(target, "mtp", device="cpu", dtype="float32")
    assert str(caught.value).count("\n") == 1
    return str(caught.value)


def changed(folders: dict[str, Path], to: Path, change) -> Path:
    """A copy of the Qwen3.5 target with other tensors."""
    to.mkdir()
    for file in folders["qwen3_5"].iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    save_file(
        change(load_file(to / "model.safetensors")), to / "model.safetensors", {"format": "pt"}
    )
    return to


def test_what_cannot_be_a_head_is_refused_in_two_lines(folders, toy_target_dir, tmp_path):
    assert "has no MTP head" in refusal(str(toy_target_dir))
    engine = with_own(folders, "qwen3_5")
    assert "no folder of the target" in refusal((engine.target.model, byte_tokenizer()))
    second = {f"mtp.layers.1.{n}": torch.ones(4) for n in ("a", "b")}
    several = changed(folders, tmp_path / "several", lambda w: w | second)
    assert "2 layers" in refusal(str(several))
    lacks = changed(
        folders, tmp_path / "lacks", lambda w: {n: x for n, x in w.items() if n != "mtp.fc.weight"}
    )
    assert "lacks fc.weight" in refusal(str(lacks))
    told: list[str] = []
    left = load(str(several), device="cpu", dtype="float32", notify=told.append)
    assert left.drafter is None
    assert any("2 layers" in text for text in told)


def test_a_head_of_a_family_that_was_not_tried_is_refused_by_its_name(toy_target_dir, tmp_path):
    folder = tmp_path / "target"
    folder.mkdir()
    for file in toy_target_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["model.mtp.norm.weight"] = torch.ones(64)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    target = find_target(str(folder))
    with pytest.raises(CheckpointError, match=r"\(llama\) has an MTP head of a family"):
        find_drafter("mtp", target=target)


def test_doctor_and_generate_take_the_targets_own_head(folders, capsys):
    target = str(folders["qwen3_5"])
    assert main(["doctor", target, "mtp", "--dtype", "float32", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["drafter"]["kind"] == "mtp"
    flags = ["--target", target, "--drafter", "mtp", "--dtype", "float32", "--raw", "--json"]
    assert main(["generate", PROMPT, *flags, "--max-new-tokens", "12", "--temperature", "0"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["stats"]["rounds"] > 0
