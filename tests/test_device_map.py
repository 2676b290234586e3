"""A target over several devices: what is refused, and that every tensor is moved to its layer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHAPE, byte_tokenizer
from hybrids import random_hybrid
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from toys import LEARN, toy_drafter, toy_engine
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from ttspec import load
from ttspec.cli import main
from ttspec.config import GenerateConfig
from ttspec.decoding import stages
from ttspec.errors import OptionError, ResourceError
from ttspec.models import quantised
from ttspec.models.attention import use_folded_attention
from ttspec.models.capture import Graphs
from ttspec.models.loading import _refuse_places
from ttspec.models.target import Target, wrap_target

CPU, META = torch.device("cpu"), torch.device("meta")
WINDOWED = {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 9}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "two masks": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SHAPE, **WINDOWED, use_sliding_window=True, max_window_layers=0)
    ),
    "recurrent": lambda: random_hybrid("qwen3_5"),
}


def moved(given, device: str):
    if isinstance(given, torch.Tensor):
        return given.to(device)
    if isinstance(given, tuple | list):
        return type(given)(moved(part, device) for part in given)
    if isinstance(given, dict):
        return {name: moved(part, device) for name, part in given.items()}
    return given


def put(module: nn.Module, device: str, mode: FakeTensorMode) -> None:
    """On a device without memory, where what it is given is moved to, as accelerate's hooks do."""
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for name, tensor in store.items():
                if tensor is None:
                    continue
                with mode:
                    bare = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                store[name] = nn.Parameter(bare, False) if store is part._parameters else bare
    module.register_forward_pre_hook(
        lambda _, args, options: (moved(args, device), moved(options, device)), with_kwargs=True
    )


def split(which: str, first: str, second: str, mode: FakeTensorMode) -> Target:
    """Embedding and half of the layers on one device, the others and the head on another."""
    model = MODELS[which]()
    use_folded_attention(model)
    body = model.model
    for module in (body.embed_tokens, body.rotary_emb, *body.layers[:2]):
        put(module, first, mode)
    for module in (*body.layers[2:], body.norm, model.lm_head):
        put(module, second, mode)
    model.hf_device_map = {"model.embed_tokens": first, "lm_head": second}
    return wrap_target(model, byte_tokenizer())


@pytest.mark.parametrize("which", MODELS)
@pytest.mark.parametrize(("first", "second"), [("cpu", "meta"), ("meta", "cpu")])
def test_every_tensor_is_where_its_layer_is(which: str, first: str, second: str):
    """Fake tensors compute nothing, but refuse to meet on two devices."""
    mode = FakeTensorMode()
    target = split(which, first, second, mode)
    target.taps = (1, 3, 4)
    home, away = torch.device(first), torch.device(second)
    assert target.device == home
    assert target.is_split
    with mode:
        assert target.head.device == home
        cache = target.cache(2, 64, 5)
        tokens = torch.zeros(2, 5, dtype=torch.long, device=home)
        start = torch.zeros(2, dtype=torch.long, device=home)
        rows = torch.arange(2, device=home).flip(0)
        for subset, count in ((None, None), (rows, 1), (rows[:1], 0)):
            part = slice(None) if subset is None else slice(len(subset))
            logits, features = target.forward(
                cache, tokens[part], start[part], 0, subset=subset, logits=count
            )
            target.forward(cache, tokens[part], start[part], 0, subset=subset, counts=start[part])
            assert features.device == home
            assert logits is None or logits.device == home
            for device, aimed in cache._by_device.items():
                assert all(t is None or t.device == device for t in aimed)
            assert set(cache._by_device) == {keys.device for keys in cache.keys.values()}
        places = [home, home, away, away]
        kept = {i: keys.device for i, keys in cache.keys.items()}
        kept |= {i: own.state.device for i, own in getattr(cache, "states", {}).items()}
        assert [kept[i] for i in range(4)] == places
        features, last = target.read(tokens)
        assert (features.device, last.device, target.compute_logits(last).device) == (
            home,
            home,
            home,
        )


def test_a_split_target_is_not_captured(toy_target_dir: Path, monkeypatch):
    engine = toy_engine(toy_target_dir)
    captured = []

    class Told(Graphs):
        def __init__(self, device: torch.device, **options):
            captured.append(device.type)
            super().__init__(CPU, **options)

    monkeypatch.setattr(stages, "Graphs", Told)
    monkeypatch.setattr(Target, "device", META)
    for places in ({"": 0}, {"model.embed_tokens": 0, "lm_head": 1}):
        engine.target.model.hf_device_map = places
        engine.decoder(GenerateConfig(learn=None), 1, 4, sessions=False)
    assert captured == ["meta", "cpu"]


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ({"model": 0, "lm_head": "disk"}, "cuda and disk"),
        ({"model": 0, "lm_head": "cpu"}, "cpu and cuda"),
        ({"": "meta"}, "on meta"),
    ],
)
def test_weights_that_come_and_go_are_refused_by_name(toy_target_dir: Path, places, words: str):
    with pytest.raises(ResourceError, match=words) as caught:
        load(str(toy_target_dir), None, device="cpu", device_map=places)
    assert "Use more GPUs" in str(caught.value)


@pytest.mark.parametrize("places", [{"": 0}, {"a": "cuda:0", "b": 1}, {"": "cpu"}])
def test_weights_that_stay_are_no_obstacle(places: dict):
    _refuse_places("it", places)


def test_what_is_missing_is_said(toy_target_dir: Path, monkeypatch, capsys):
    place = {"device": "cpu", "dtype": "float32"}
    monkeypatch.setattr(quantised, "find_spec", lambda _: None)
    with pytest.raises(ResourceError, match=r"accelerate.*\n.*ttspec\[device-map\]"):
        load(str(toy_target_dir), None, **place, device_map={"": "cpu"})
    with pytest.raises(OptionError, match="device_map is 'balanced'"):
        load(str(toy_target_dir), None, **place, device_map="balanced")
    model = LlamaForCausalLM.from_pretrained(toy_target_dir)
    with pytest.raises(OptionError, match="loaded already"):
        load((model, byte_tokenizer()), None, **place, device_map={"": "cpu"})
    if not torch.cuda.is_available():
        command = ["generate", "Hi", "--target", str(toy_target_dir), "--device-map", "auto"]
        assert main([*command, "--drafter", "none"]) in (1, 2)
        assert "finds none here" in capsys.readouterr().err


def halves(*places: int | str) -> dict[str, int | str]:
    """A device map by hand: embedding and half of the layers here, the rest and the head there."""
    first = ["model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1"]
    second = ["model.layers.2", "model.layers.3", "model.norm", "lm_head"]
    return dict.fromkeys(first, places[0]) | dict.fromkeys(second, places[-1])


def answers(folder: Path, drafter: str, device: str, device_map: Any) -> list[Any]:
    """Texts, acceptance and updates of two rows, float32; the number of devices last."""
    drafters = {"plain": None, "copy": str(folder), "learning": toy_drafter()}
    place: dict[str, Any] = {"device": device, "dtype": "float32", "device_map": device_map}
    engine = load(str(folder), drafters[drafter], **place)
    learn = LEARN if drafter == "learning" else {"learn": None}
    results = engine.generate([[1, 2, 3] * 20, [7, 8]], max_new_tokens=100, **learn)
    counts = [(r.token_ids, r.stats.acceptance_length, r.stats.updates) for r in results]
    return [*counts, len(set(getattr(engine.target.model, "hf_device_map", {"": 0}).values()))]


@pytest.mark.parametrize("places", [{"": "cpu"}, halves("cpu")])
def test_a_map_of_one_device_says_the_same_text(toy_target_dir: Path, places: dict[str, str]):
    pytest.importorskip("accelerate")
    (*mapped, devices), (*plain, _) = (
        answers(toy_target_dir, "learning", "cpu", place) for place in (places, None)
    )
    assert mapped == plain
    assert devices == 1


@pytest.mark.gpu
@pytest.mark.parametrize("places", [halves(0, 1), "auto"])
@pytest.mark.parametrize("drafter", ["plain", "copy", "learning"])
def test_a_target_split_over_two_gpus_says_the_same_text(
    toy_target_dir: Path, drafter: str, places: Any
):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    (*split, devices), (*whole, _) = (
        answers(toy_target_dir, drafter, "cuda", place) for place in (places, None)
    )
    assert split == whole
    assert devices == 2 or places == "auto"  # which may find that one has room for all
