"""Matrices of a drafter that vLLM packs on a CPU. No vLLM here: its ways, as its sources say."""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from ttspec.errors import TtspecError
from ttspec.vllm.packing import Packing, keep_matrices

COPIES: dict[int, Tensor] = {}
"""Packed copies as oneDNN holds them, by address."""


class Handler:
    """vLLM's `CPUDNNLGEMMHandler`."""

    def __init__(self, weight: Tensor) -> None:
        address = max(COPIES, default=0) + 1
        COPIES[address] = weight.clone()
        self.handler_tensor = torch.tensor(address)

    def __del__(self) -> None:
        del COPIES[int(self.handler_tensor)]


def in_onednn(layer: nn.Module) -> Callable[..., Tensor]:
    handler = Handler(layer.weight.detach())
    return lambda x, weight, bias: x @ COPIES[int(handler.handler_tensor)].T


def in_tensors(layer: nn.Module) -> Callable[..., Tensor]:
    packed, n, bias_of_kernel = layer.weight.detach().T.contiguous(), layer.weight.shape[0], None
    return lambda x, weight, bias: (x @ packed)[..., :n] + (bias_of_kernel or 0)


def not_packed(layer: nn.Module) -> Callable[..., Tensor]:
    return nn.functional.linear


def in_an_unknown_way(layer: nn.Module) -> Callable[..., Tensor]:
    packed = SimpleNamespace(weight=layer.weight)
    return lambda x, weight, bias: x @ packed.weight.T


@pytest.fixture
def utils(monkeypatch) -> SimpleNamespace:
    """vLLM's module that packs; `way` is how."""
    there = SimpleNamespace(way=in_onednn, kept=[])

    def dispatch(layer: nn.Module, remove_weight: bool) -> None:
        layer.cpu_linear = there.way(layer)
        there.kept.append(not remove_weight)
        if remove_weight:
            layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)

    there.dispatch_cpu_unquantized_gemm = dispatch
    layers = SimpleNamespace(utils=there)
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers", layers)
    return there


def module_of(utils: SimpleNamespace) -> nn.ModuleDict:
    """A layer that learns and a table that does not, both packed."""
    parts = {"fc": nn.Linear(3, 2, bias=False), "lm_head": nn.Linear(3, 5, bias=False)}
    module = nn.ModuleDict(parts)
    for part in parts.values():
        utils.dispatch_cpu_unquantized_gemm(part, remove_weight=False)
    return module


@pytest.mark.parametrize("way", [in_onednn, in_tensors, not_packed])
def test_written_weights_reach_who_holds_the_function_that_multiplies(utils, way) -> None:
    utils.way = way
    module = module_of(utils)
    packing, held = Packing(module), module["fc"].cpu_linear  # as compiled code holds it
    table, copies = module["lm_head"].cpu_linear, len(COPIES)
    x, weight = torch.randn(4, 3), module["fc"].weight
    for number in (2.0, 3.0):
        weight.data.fill_(number)
        packing.renew()
        assert module["fc"].cpu_linear is held
        torch.testing.assert_close(held(x, weight, None), x @ weight.T)
        assert len(COPIES) == copies  # old ones are freed
    assert module["lm_head"].cpu_linear is table
    del module, packing, held, table
    assert not COPIES


def test_a_way_that_is_not_known_is_refused(utils) -> None:
    utils.way = in_an_unknown_way
    module = module_of(utils)
    with pytest.raises(TtspecError, match="packs matrices in a SimpleNamespace"):
        Packing(module)


def test_where_nothing_is_packed_vllm_is_not_asked() -> None:
    Packing(nn.Linear(3, 2)).renew()


@pytest.mark.parametrize("fails", [False, True])
def test_only_a_drafters_matrices_stay_beside_their_copies(utils, fails: bool) -> None:
    def load_model(target: str) -> None:
        utils.dispatch_cpu_unquantized_gemm(nn.Linear(3, 2), remove_weight=True)
        if fails:
            raise OSError(target)

    proposer = SimpleNamespace(load_model=load_model)
    keep_matrices(proposer)
    with pytest.raises(OSError, match="target") if fails else nullcontext():
        proposer.load_model("target")
    utils.dispatch_cpu_unquantized_gemm(nn.Linear(3, 2), remove_weight=True)  # the target's
    assert utils.kept == [True, False]
