"""What is compiled before it is captured: the same values, and one compilation for all layers."""

import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch._functorch.config
from conftest import byte_tokenizer
from hybrids import KINDS, random_hybrid
from test_conformance import engine_of
from test_recurrent import run as rolled_back
from torch._dynamo.utils import counters
from toys import bound_drafter, toy_engine, verification

from ttspec import compiled
from ttspec.config import DraftConfig, LearnConfig
from ttspec.decoding import stages
from ttspec.decoding.engine import Engine
from ttspec.drafters import context
from ttspec.learning.memory import MemoryRows, TextMemory, feature_width
from ttspec.learning.replay_buffer import ReplayBuffer
from ttspec.models import layers
from ttspec.models.attention import use_folded_attention
from ttspec.models.capture import Graphs
from ttspec.models.target import Target, wrap_target

PROMPTS = ["hello there", "count to ten, please"]
FIRST = ("qwen3_5", "qwen3_5_moe")
COMPILED = [pytest.param(kind, marks=() if kind in FIRST else pytest.mark.slow) for kind in KINDS]
"""Hybrids; the compiler takes seconds for each, so two of them are always run."""


class Compiled(Graphs):
    """`Graphs` that compiles what it would capture, and runs it."""

    def __init__(self, device, *, compile=False) -> None:
        super().__init__(device, compile=compile)
        self.on = True

    def __call__(self, work, *key, compile=True, changes=(), first=False):
        with compiled.compiling() if compile else nullcontext():
            return work(*key)


@pytest.fixture
def quick(monkeypatch):
    """The compiler's front alone: what it cannot follow is an error, and nothing is translated."""
    real = torch.compile
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(
        torch,
        "compile",
        lambda f, **options: real(f, backend="aot_eager", fullgraph=True, **options),
    )
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "which", ["none", "dflash", "dflash-unusual", "eagle3", "eagle3-layers", "pard"]
)
def test_compiled_rounds_say_the_same_and_layers_share_their_code(
    toy_target_dir, which, monkeypatch, quick
):
    target = toy_engine(toy_target_dir, dtype="bfloat16").target
    first = assert_compiled_says_the_same(target, which, monkeypatch)
    # The target's layers, again for prompts of any length; the drafter's; the draw over each of
    # two widths at most; for one token and for any number of them who ends; what EAGLE-3 makes
    # context, of all rows and of one; and what moves the rows on without the host.
    most = 5 + 4 * (which != "none") + ("eagle3" in which) + 3 * (which == "eagle3-layers")
    assert 0 < first <= most, counters["stats"]


def assert_compiled_says_the_same(target: Target, which: str, monkeypatch) -> int:
    """Texts are those of rounds that are not; how many graphs there are, with longer caches too."""

    def say(new: int = 16) -> list[list[int]]:
        """The first tokens of answers that may have so many."""
        engine = engine_of(target, which) if which != "none" else Engine(target, None)
        said: list[list[int]] = [[], []]
        options = {"max_new_tokens": new, "ignore_eos": True, "learn": None}
        run = engine.run([[p] for p in PROMPTS], draft=DraftConfig(copy=False), **options)
        for index, chunk in run:
            said[index] += chunk.token_ids
            if min(map(len, said)) >= 16:
                break
        run.close()
        return [tokens[:16] for tokens in said]

    plain = say()
    monkeypatch.setattr(stages, "Graphs", Compiled)
    # As on a GPU, where attention reads what is seen.
    monkeypatch.setattr(context, "reach_to_see", lambda length, keys: None)
    assert say() == plain
    first = counters["stats"]["unique_graphs"]
    say(600)  # longer caches are the same code
    assert counters["stats"]["unique_graphs"] == first
    return first


@pytest.mark.parametrize("which", ["dflash", "none"])
@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_rounds_of_hybrids_say_the_same(kind, which, monkeypatch, quick):
    model = random_hybrid(kind).to(torch.bfloat16)
    use_folded_attention(model)
    target = wrap_target(model, byte_tokenizer())
    first = assert_compiled_says_the_same(target, which, monkeypatch)
    # As above, but a second kind of layers for that of prompts, and each for each of two widths.
    assert 0 < first <= 5 + 5 * (which != "none"), counters["stats"]


WIDTHS = (1, 4)


@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_rows_rolled_back_are_as_if_read_at_once(kind, monkeypatch, quick):
    """Rows that come, go, rest and are cut back; each kind of layer is compiled once a width."""
    model = random_hybrid(kind)
    use_folded_attention(model)
    monkeypatch.setattr("ttspec.models.target.has_kernel", lambda dtype: True)
    assert rolled_back(wrap_target(model, byte_tokenizer()), 3, 30, WIDTHS) < 1e-4
    assert counters["stats"]["unique_graphs"] == 2 * len(WIDTHS)


@pytest.mark.slow
def test_layers_of_hybrids_translated_to_machine_code(monkeypatch) -> None:
    """The same, whole: minutes on a CPU."""
    torch._dynamo.reset()
    model = random_hybrid("qwen3_5")
    use_folded_attention(model)
    monkeypatch.setattr("ttspec.models.target.has_kernel", lambda dtype: True)
    assert rolled_back(wrap_target(model, byte_tokenizer()), 3, 60, WIDTHS) < 1e-4


def test_merged_projections_are_the_same_weights(toy_target_dir, monkeypatch):
    monkeypatch.setattr("ttspec.models.target.pack_linears", lambda _: None)  # as on a GPU
    target = toy_engine(toy_target_dir).target
    before = {n: p.clone() for n, p in target.model.named_parameters()}
    [attention, mlp] = layers.merge_linears(target.model.base_model.layers[0])
    assert [len(attention.slices), len(mlp.slices)] == [3, 2]
    for name, parameter in target.model.named_parameters():
        assert torch.equal(parameter, before[name])
    states = torch.randn(2, 3, attention.weight.shape[1])
    for name, part in attention.slices.items():
        torch.testing.assert_close(part(states), getattr(attention.parent, name)(states))
    assert attention.states is states
    other = torch.randn_like(states)
    q = attention.slices["q_proj"]
    torch.testing.assert_close(q(other), attention.parent.q_proj(other))


def test_compiled_code_keeps_the_same(quick) -> None:
    """Rings, blocks and pages after rounds of many widths, some of which copied or rested."""

    def kept() -> list[torch.Tensor]:
        torch.manual_seed(1)
        drafter, rows = bound_drafter(), 3
        size, width = len(drafter.embedding), feature_width(drafter)
        config = LearnConfig(scope="shared", supervision="hindsight", blocks=3)
        memory, start = TextMemory(drafter, pages=7), torch.tensor([5, 9, 0])
        writer, buffer, found = MemoryRows(memory, rows), None, list[torch.Tensor]()
        for number in range(40):
            tokens = (1, 2, 4, 7)[number % 4]
            fed = torch.randint(size, (rows, tokens))
            emitted = torch.randint(0, tokens + 1, (rows,))
            logits, features = torch.randn(rows, tokens, size), torch.randn(rows, tokens, width)
            v = verification(start, fed, logits, features, fed + 1, [0] * rows, emitted=emitted)
            proposal = replace(
                v.proposal, before=torch.randn(rows, width), copied=torch.rand(rows) < 0.3
            )
            v, start = replace(v, proposal=proposal), start + emitted
            buffer = buffer or ReplayBuffer(config, rows, 4, v, features=True)
            buffer.absorb(v)
            if number % 3 == 0:
                some = torch.arange(rows) if number % 2 else torch.tensor([1])
                writer.write(**buffer.newest_text(writer.end[some], some, 16))
            batch = buffer.newest()
            found += [batch.tokens, batch.start, batch.logits, batch.mask, batch.before]
        texts = memory.read(torch.arange(7), 4)
        judged = texts.judged
        assert judged.sum() > 100
        return [*found, judged, texts.held_out, writer.end, texts.p[judged].sort(-1)[0]]

    with torch.no_grad():
        usual = kept()
        with compiled.compiling():
            for one, other in zip(usual, kept(), strict=True):
                assert torch.equal(one, other)
    # Blocks, tokens of one and of more, three tables, texts of three rows and of one, and pages:
    # not again for each width.
    assert counters["stats"]["unique_graphs"] <= 12, counters["stats"]


SUMS = """
import sys
import torch
from ttspec.compiled import compiled_once, compiling

@compiled_once
def sums(x, n, table, rows):
    return x[:n].sum() + table.unflatten(0, (rows.shape[0], -1)).sum()

with torch.no_grad(), compiling():
    print(sums(torch.ones(6), int(sys.argv[1]), torch.zeros(12), torch.zeros(3)).item())
"""


@pytest.mark.slow
def test_a_second_process_is_not_given_code_of_other_sizes(tmp_path) -> None:
    """Of x[:9], which is all of x; see findings/torch_compile_cache_shapes.sh."""
    kept = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for n, total in ((9, "6.0"), (4, "4.0")):
        command = [sys.executable, "-c", SUMS, str(n)]
        done = subprocess.run(command, capture_output=True, text=True, env=kept)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [total]
