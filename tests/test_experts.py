"""Mixtures on a GPU: which of them a captured graph can hold, and the texts of both kinds."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer
from hybrids import random_hybrid
from test_conformance import engine_of
from torch import nn

from ttspec import load
from ttspec.config import DraftConfig, SamplingConfig
from ttspec.decoding import stages
from ttspec.decoding.engine import Engine
from ttspec.diagnosis.families import build
from ttspec.models import experts
from ttspec.models.attention import use_folded_attention
from ttspec.models.target import Target, wrap_target

FAMILIES = ("qwen3-moe", "mixtral", "gpt-oss", "deepseek-v3", "qwen3.5-moe", "qwen3-next")


class OnGpu(nn.Module):
    """A mixture's experts, where they would be on a GPU: there is nothing but what is asked."""

    def __init__(self, how: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_experts, self.is_transposed = 4, False
        self.config = SimpleNamespace(_experts_implementation=how)
        self.weight: Any = SimpleNamespace(dtype=dtype, device=torch.device("cuda"))

    def parameters(self, recurse: bool = True) -> Any:
        return iter([self.weight])


@pytest.mark.parametrize(
    ("how", "dtype", "capability", "asks"),
    [
        ("grouped_mm", torch.bfloat16, (9, 0), False),
        ("grouped_mm", torch.bfloat16, (10, 0), False),
        ("grouped_mm", torch.bfloat16, (8, 0), True),
        ("grouped_mm", torch.bfloat16, (12, 0), True),
        ("grouped_mm", torch.float16, (9, 0), True),
        ("grouped_mm", torch.float32, (9, 0), True),
        ("batched_mm", torch.float32, (8, 0), False),
        ("eager", torch.bfloat16, (9, 0), True),
    ],
)
def test_the_host_is_asked_where_torch_has_no_kernel(monkeypatch, how, dtype, capability, asks):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert experts.asks_host(nn.Sequential(OnGpu(how, dtype))) is asks


def test_a_loop_of_a_models_own_asks_the_host() -> None:
    assert experts.asks_host(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_computes_experts_by_grouped_products(family: str) -> None:
    model = build(family)
    target = wrap_target(model, byte_tokenizer())
    assert target.is_mixture
    assert {e.config._experts_implementation for e in experts.experts_of(model)} == {"grouped_mm"}
    assert target.can_capture, "on a CPU there is nothing to ask"
    model.set_experts_implementation("eager")
    assert not target.can_capture


def test_rounds_that_no_graph_can_hold_are_called(monkeypatch) -> None:
    class Asked(Exception):
        """Says where graphs would have been."""

    def asked(place: torch.device, **_: Any) -> Any:
        raise Asked(place.type)

    monkeypatch.setattr(stages, "Graphs", asked)
    monkeypatch.setattr(Target, "device", torch.device("cuda"))
    target = wrap_target(build("qwen3-moe"), byte_tokenizer())
    options: dict[str, Any] = {"sampling": SamplingConfig(), "draft": DraftConfig(), "learn": None}
    spec = stages.DecoderSpec(rows=1, slots=64, **options)
    for can, place in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(Target, "can_capture", can)
        with pytest.raises(Asked, match=place):
            stages.RoundStages(target, None, spec, compile=False)


def test_who_wants_compiled_rounds_is_told(monkeypatch) -> None:
    model = build("qwen3-moe")
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    for how, compiles in (("grouped_mm", True), ("eager", False)):
        model.set_experts_implementation(how)
        said: list[str] = []
        engine = load((model, byte_tokenizer()), None, compile=True, notify=said.append)
        assert engine.compile is compiles
        assert [("wait for the host" in text) for text in said] == [True] * (not compiles)


@pytest.mark.gpu
@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral", "gpt-oss", "qwen3_5_moe"])
def test_mixtures_draft_on_a_gpu(family: str, dtype: torch.dtype, compiles: bool) -> None:
    """In float32 the text is plain decoding's; in two bytes rounds run, and many tokens agree."""
    model: Any = random_hybrid(family) if "_" in family else build(family)
    model = model.to(device="cuda", dtype=dtype)
    if family != "gpt-oss":
        use_folded_attention(model)
    target = wrap_target(model, byte_tokenizer())
    has_kernel = torch.cuda.get_device_capability()[0] in experts.WITH_KERNEL
    assert target.can_capture == (dtype == torch.bfloat16 and has_kernel)
    texts = []
    for which in ("none", "dflash"):
        engine = Engine(target, None) if which == "none" else engine_of(target, which)
        engine.compile = compiles and target.can_capture
        draft = DraftConfig(copy=False)
        options: dict[str, Any] = {"max_new_tokens": 48, "ignore_eos": True, "learn": None}
        texts += [r.token_ids for r in engine.generate([[7, 8, 9]], draft=draft, **options)]
    same = sum(a == b for a, b in zip(*texts, strict=True))
    assert same == 48 or dtype != torch.float32
    assert same > 0
