"""Recurrent layers on a GPU; without one the kernel runs under TRITON_INTERPRET=1, given Triton."""

from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer
from hybrids import random_hybrid
from toys import PLAIN, make_kind

from ttspec.config import LearnConfig
from ttspec.decoding.engine import Engine
from ttspec.models.attention import use_folded_attention
from ttspec.models.delta_rule import advance, advance_and_read, read_block
from ttspec.models.recurrent import LayerState
from ttspec.models.target import wrap_target

PROMPTS = ["hello there", "a", "the quick brown fox jumps over the dog", "count to ten"]
OPTIONS = {"max_new_tokens": 32, "seed": 5, "ignore_eos": True}
SIZES = [(3, 4, 2, 16, 16, 5, 5), (2, 4, 4, 24, 40, 8, 3), (2, 32, 16, 128, 128, 16, 16)]


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_kernel_says_what_the_reference_says(sizes):
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    rows, heads, key_heads, size, wide, width, tokens = sizes
    place = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    module: Any = SimpleNamespace(
        conv_dim=8,
        conv_kernel_size=4,
        num_k_heads=key_heads,
        num_v_heads=heads,
        head_k_dim=size,
        head_v_dim=wide,
    )
    own = LayerState.empty(module, rows, width, torch.zeros(1, device=place))
    own.state.normal_()
    own.keys.normal_().div_(own.keys.norm(dim=-1, keepdim=True))
    own.deltas.normal_()
    own.decays.copy_(-torch.rand(own.decays.shape))
    count = torch.tensor([width, 0, 2][:rows], device=place)
    start = torch.tensor([9, 0, 7][:rows], device=place)
    query, key = torch.randn(2, rows, key_heads, tokens, size, device=place)
    key = key / key.norm(dim=-1, keepdim=True)
    value = torch.randn(rows, tokens, heads, wide, device=place).transpose(1, 2)
    decay, beta = torch.rand(2, rows, heads, tokens, device=place)
    state = own.state.masked_fill((start == 0)[:, None, None, None], 0)
    advance(state, own.keys, own.deltas, own.decays, count)
    wanted = read_block(state, query, key, value, -decay, beta)
    deltas, rest = own.deltas.clone(), torch.arange(rows, device=place) == rows - 1
    of_rows = [count, start, rest]
    of_tokens = [part.transpose(1, 2) for part in (query, key, value, -decay, beta)]
    out = advance_and_read(own.state, own.deltas, [own.keys, own.decays], of_rows, of_tokens)
    torch.testing.assert_close(own.state, state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.transpose(1, 2), wanted[0], atol=1e-4, rtol=1e-4)
    deltas[:-1, :, :tokens] = wanted[1][:-1]
    torch.testing.assert_close(own.deltas, deltas, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_on_a_gpu_rounds_are_graphs_and_texts_plain_s(dtype, temperature):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    model = random_hybrid("qwen3_5").to("cuda", dtype)
    options = {**OPTIONS, "temperature": temperature, "learn": LearnConfig(stride=1, lr=3e-3)}
    drafter = make_kind("dflash")
    drafter.weights = {n: w.to("cuda", dtype) for n, w in drafter.weights.items()}
    engine = Engine(wrap_target(model, byte_tokenizer()), drafter)
    wanted = engine.generate(PROMPTS, **options | PLAIN)
    for _ in range(2):  # the second time with the caches and graphs of the first
        found = engine.generate(PROMPTS, **options)
        if dtype == torch.float32:
            assert [r.token_ids for r in found] == [r.token_ids for r in wanted]


@pytest.mark.gpu
def test_on_a_gpu_compiled_rounds_write_plain_s_text_if_it_is_deterministic():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    model = random_hybrid("qwen3_5").to("cuda", torch.bfloat16)
    use_folded_attention(model)
    drafter = make_kind("dflash")
    drafter.weights = {n: w.to("cuda", torch.bfloat16) for n, w in drafter.weights.items()}
    engine = Engine(wrap_target(model, byte_tokenizer()), drafter)
    engine.compile = True
    options = {**OPTIONS, "temperature": 0.7, "deterministic": True}
    wanted = engine.generate(PROMPTS, **options | PLAIN)
    found = engine.generate(PROMPTS, **options, learn=LearnConfig(stride=1, lr=3e-3))
    assert [r.token_ids for r in found] == [r.token_ids for r in wanted]
