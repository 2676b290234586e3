"""Targets: transformers' own numbers, its generation config, and refusals by name."""

import json
from pathlib import Path

import pytest
import torch
from conftest import SHAPE, byte_tokenizer
from torch import Tensor
from toys import toy_engine
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ttspec import DraftConfig, load
from ttspec.errors import TargetError
from ttspec.models.attention import NAME, folded_attention
from ttspec.models.target import Target, wrap_target
from ttspec.models.unsupported import attention_windows

PLAIN = {"learn": None, "draft": DraftConfig(length=0)}
WINDOWED = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=9)),
    "qwen3, two of four layers": lambda: Qwen3ForCausalLM(
        Qwen3Config(
            **SHAPE,
            use_sliding_window=True,
            sliding_window=9,
            layer_types=["full_attention", "sliding_attention"] * 2,
        )
    ),
    "qwen3, window switched off": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SHAPE, use_sliding_window=False, sliding_window=9)
    ),
}


def made(make, seed: int = 0) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


def llama(**changes) -> PreTrainedModel:
    return made(lambda: LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes})))


def text(seed: int, length: int) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def forward(target: Target, ids: list[list[int]], parts: tuple[int, ...]) -> Tensor:
    """Logits of whole rows, read through the row cache in parts."""
    cache, at, out = target.cache(len(ids), 128), 0, []
    for size in parts:
        tokens = torch.tensor([row[at : at + size] for row in ids])
        start = torch.full((len(ids),), at)
        out.append(target.forward(cache, tokens, start, at)[0])
        at += size
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("kind", WINDOWED)
def test_sliding_windows_are_those_of_transformers(kind: str):
    model = made(WINDOWED[kind])
    ids = [text(1, 40), text(2, 40)]
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor(ids), use_cache=False).logits
    target = wrap_target(model, byte_tokenizer())
    assert (9 in target.windows) == ("off" not in kind)
    for parts in ((40,), (25, 1, 6, 8)):
        torch.testing.assert_close(forward(target, ids, parts), wanted, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", WINDOWED)
def test_windowed_targets_generate_as_transformers_does(kind: str):
    model = made(WINDOWED[kind])
    ids = text(3, 20)
    wanted = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, 20), max_new_tokens=24, do_sample=False
    )[0, 20:].tolist()
    engine = load((model, byte_tokenizer()), None)
    assert engine.generate([ids], max_new_tokens=24)[0].token_ids == wanted


@pytest.mark.parametrize("folder", ["toy_target_dir", "toy_qwen_dir"])
def test_greedy_text_is_that_of_transformers_generate(folder: str, request):
    engine = toy_engine(request.getfixturevalue(folder))
    model = type(engine.target.model).from_pretrained(request.getfixturevalue(folder))
    for seed in range(3):
        ids = text(seed, 12 + seed)
        wanted = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            max_new_tokens=40,
            do_sample=False,
        )[0, len(ids) :].tolist()
        for options in (PLAIN, {}):
            assert engine.generate([ids], max_new_tokens=40, **options)[0].token_ids == wanted


@pytest.mark.parametrize("folder", ["toy_target_dir", "toy_qwen_dir"])
def test_features_are_the_hidden_states_of_the_taps(folder: str, request):
    target = toy_engine(request.getfixturevalue(folder)).target
    ids = torch.tensor([text(1, 15)])
    with torch.no_grad():
        states = target.model(
            input_ids=ids, use_cache=False, output_hidden_states=True
        ).hidden_states
    for taps in ((1, 3), (0,), (4, 2, 1)):
        target.taps = taps
        wanted = torch.cat([states[i] for i in taps], dim=-1)
        cache, zero = target.cache(1, 32), torch.zeros(1, dtype=torch.long)
        features = target.forward(cache, ids, zero, 0)[1]
        torch.testing.assert_close(features, wanted, atol=2e-4, rtol=0)
        read, last = target.read(ids)
        torch.testing.assert_close(read, wanted, atol=2e-4, rtol=0)
        with torch.no_grad():
            logits = target.model(input_ids=ids).logits
        torch.testing.assert_close(last @ target.head.T, logits, atol=2e-4, rtol=0)
        # and without the head the features are the same
        none, same = target.forward(target.cache(1, 32), ids, zero, 0, logits=0)
        assert none is None or none.shape[1] == 1
        torch.testing.assert_close(same, features)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize("width", [1, 5])
def test_folded_attention_is_sdpa(heads: tuple[int, int], width: int):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, heads[0], width, 16, generator=generator)
    key, value = torch.randn(2, 3, heads[1], 21, 16, generator=generator)
    mask = torch.rand(3, 1, width, 21, generator=generator) < 0.5
    mask[..., 0] = True
    module = torch.nn.Module()
    module.num_key_value_groups = heads[0] // heads[1]
    module.is_causal = True
    wanted = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)[0]
    found = folded_attention(module, query, key, value, mask, scaling=0.3)[0]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_loaded_target_uses_folded_attention(toy_target_dir):
    assert toy_engine(toy_target_dir).target.model.config._attn_implementation == NAME


def test_a_model_with_eager_attention_says_the_same_or_is_refused(toy_target_dir):
    model = LlamaForCausalLM.from_pretrained(toy_target_dir, attn_implementation="eager")
    ids = text(1, 20)
    try:
        engine = load((model, byte_tokenizer()), None)
    except TargetError:
        return
    wanted = toy_engine(toy_target_dir).generate([ids], max_new_tokens=20, **PLAIN)[0].token_ids
    assert engine.generate([ids], max_new_tokens=20)[0].token_ids == wanted


# Generation config.


def with_generation(**entries) -> PreTrainedModel:
    model = llama()
    for name, value in entries.items():
        setattr(model.generation_config, name, value)
    return model


def test_every_end_token_ends_an_answer():
    ids = text(5, 10)
    free = load((llama(), byte_tokenizer()), None).generate([ids], max_new_tokens=20)[0].token_ids
    for at in (3, 7):
        model = with_generation(eos_token_id=[258, free[at]])
        target = wrap_target(model, byte_tokenizer())
        assert set(target.ends) == {258, free[at]}
        result = load((model, byte_tokenizer()), None).generate([ids], max_new_tokens=20)[0]
        assert result.token_ids == free[: free.index(free[at]) + 1]
        assert result.finish_reason == "eos"


def test_the_tokenizers_end_token_is_one_too():
    assert wrap_target(with_generation(eos_token_id=7), byte_tokenizer()).ends == (7, 258)


def test_sampling_defaults_are_those_of_the_generation_config():
    entries = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05}
    target = wrap_target(with_generation(**entries), byte_tokenizer())
    given = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05}
    assert given.items() <= target.defaults.items()


def test_without_do_sample_the_default_is_greedy():
    target = wrap_target(with_generation(temperature=0.6, top_p=0.9), byte_tokenizer())
    greedy = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    assert greedy.items() <= target.defaults.items()


def test_do_sample_alone_means_temperature_1():
    target = wrap_target(with_generation(do_sample=True), byte_tokenizer())
    assert target.defaults["temperature"] == 1.0


def test_defaults_hold_until_an_option_says_otherwise():
    ids = text(5, 10)
    hot = load((with_generation(do_sample=True, temperature=1.5), byte_tokenizer()), None)
    greedy = load((llama(), byte_tokenizer()), None)
    options = {"max_new_tokens": 12, "seed": 4, "ignore_eos": True}
    plain = greedy.generate([ids], **options)[0].token_ids
    assert hot.generate([ids], **options)[0].token_ids != plain
    assert hot.generate([ids], temperature=0.0, **options)[0].token_ids == plain
    wanted = greedy.generate([ids], temperature=1.5, **options)[0].token_ids
    assert hot.generate([ids], **options)[0].token_ids == wanted


@pytest.mark.parametrize(
    "entry",
    [
        {"encoder_repetition_penalty": 1.1},
        {"sequence_bias": [[[3, 4], 1.0]]},
        {"num_beams": 4},
        {"typical_p": 0.9},
        {"guidance_scale": 1.5},
        {"forced_eos_token_id": 3},
    ],
    ids=str,
)
def test_what_is_not_implemented_is_refused_by_name(entry: dict):
    with pytest.raises(TargetError) as caught:
        wrap_target(with_generation(**entry), byte_tokenizer())
    assert next(iter(entry)) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize(
    "entry",
    [
        {"repetition_penalty": 1.0},
        {"num_beams": 1},
        {"no_repeat_ngram_size": 0},
        {"typical_p": 1.0},
    ],
    ids=str,
)
def test_entries_that_change_nothing_are_no_obstacle(entry: dict):
    wrap_target(with_generation(**entry), byte_tokenizer())


def test_a_fresh_generation_config_is_no_obstacle():
    model = llama()
    model.generation_config = GenerationConfig()
    assert wrap_target(model, byte_tokenizer()).ends == (258,)


# Refusals.


def saved(folder: Path, **config) -> Path:
    Qwen3Config(**SHAPE).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_hybrid_layers_are_refused_by_name():
    model = made(lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)))
    model.config.layer_types = ["linear_attention", "full_attention"] * 2
    with pytest.raises(TargetError, match="linear_attention"):
        wrap_target(model, byte_tokenizer())


def test_a_state_space_model_is_refused():
    config = MambaConfig(vocab_size=260, hidden_size=32, num_hidden_layers=2)
    with pytest.raises(TargetError, match="cannot be rolled back") as caught:
        attention_windows(config)
    assert len(str(caught.value).splitlines()) <= 2


def test_a_tokenizer_larger_than_the_model_is_refused():
    model = llama(vocab_size=200, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with pytest.raises(TargetError, match=r"260 tokens.*200"):
        wrap_target(model, byte_tokenizer())
