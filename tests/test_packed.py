"""A target's weights on a CPU, packed once for oneDNN: the same products, and no weight twice."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toys import toy_engine
from transformers import LlamaForCausalLM

from ttspec.decoding.shared_weights import fingerprint
from ttspec.models import packed
from ttspec.models.packed import PackedLinear, can_pack, head_product
from ttspec.models.target import Target, wrap_target

CPU = torch.device("cpu")


@pytest.fixture(params=["float32", "bfloat16"])
def target(toy_target_dir, request) -> Target:
    if not can_pack(getattr(torch, request.param)):
        pytest.skip(f"this CPU packs no {request.param}")
    return toy_engine(toy_target_dir, dtype=request.param).target


@pytest.fixture
def plain(toy_target_dir, target) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(toy_target_dir, dtype=target.dtype)


def test_every_projection_is_packed_and_the_head_is_there_as_it_was_too(target, plain):
    linears = [n for n, m in plain.named_modules() if type(m) is nn.Linear]
    found = {n: m for n, m in target.model.named_modules() if isinstance(m, PackedLinear)}
    assert list(found) == linears
    assert [n for n, m in found.items() if not m.weight.is_mkldnn] == ["lm_head"]
    assert torch.equal(target.head, plain.lm_head.weight)
    head = target.head.nbytes
    assert target.nbytes == head + sum(w.nbytes for w in [*plain.parameters(), *plain.buffers()])


@pytest.mark.parametrize("tokens", [1, 2, 7, 16, 100])
def test_a_product_is_what_a_linear_module_makes_of_the_weight(target, tokens):
    torch.manual_seed(0)
    linear = nn.Linear(96, 80, bias=True, dtype=target.dtype)
    states = torch.randn(2, tokens, 96, dtype=target.dtype)
    wanted = linear(states)
    found = PackedLinear(linear)(states)
    assert found.shape == wanted.shape
    # Rounded once at the end, a sum in another order is at most the next number.
    torch.testing.assert_close(found, wanted.detach(), rtol=2**-7, atol=2**-7)
    last = PackedLinear(linear, keeps_weight=True)(states[:, -1:])
    torch.testing.assert_close(last, wanted[:, -1:].detach(), rtol=2**-7, atol=2**-7)


def test_what_reads_weights_reads_them_as_they_were(target, plain):
    stored, wanted = target.model.state_dict(), plain.state_dict()
    assert stored.keys() == wanted.keys()
    assert all(torch.equal(stored[n], wanted[n]) for n in wanted)
    tokenizer = target.tokenizer
    assert fingerprint(target) == fingerprint(wrap_target(plain, tokenizer))


def refuses(*_: object) -> torch.Tensor:
    raise RuntimeError("not on this CPU")


def multiplies_otherwise(states: torch.Tensor, weight: torch.Tensor, _: None) -> torch.Tensor:
    return F.linear(states, weight.to_dense()) * 1.5


@pytest.mark.parametrize(
    ("name", "instead"), [("_pack", refuses), ("_product", refuses), ("_product", None)]
)
def test_where_torch_packs_none_or_multiplies_otherwise_weights_stay(
    toy_target_dir, target, monkeypatch, name, instead
):
    monkeypatch.setattr(packed, name, instead or multiplies_otherwise)
    can_pack.cache_clear()
    try:
        other = toy_engine(toy_target_dir, dtype=str(target.dtype).removeprefix("torch.")).target
    finally:
        can_pack.cache_clear()
    assert not any(isinstance(m, PackedLinear) for m in other.model.modules())


def test_other_dtypes_stay():
    assert not can_pack(torch.float16)
    assert not can_pack(torch.float64)


def test_a_drafters_scores_are_those_of_the_head_as_it_was(target):
    torch.manual_seed(0)
    states = torch.randn(7, target.head.shape[1], dtype=target.dtype)
    wanted = F.linear(states, target.head)
    torch.testing.assert_close(head_product(states, target.head), wanted, rtol=2**-7, atol=2**-7)
    learned = states.clone().requires_grad_()
    head_product(learned, target.head).sum().backward()
    assert learned.grad is not None
    assert torch.equal(head_product(states, target.head.clone()), wanted)  # another's, not packed
