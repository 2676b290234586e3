"""What drafters must do, on targets whose states must go back: the newest kinds, and MTP's home."""

import pytest
import torch
from conftest import byte_tokenizer
from hybrids import DENSE, random_hybrid, write_with_head
from hybrids import KINDS as FAMILIES
from test_conformance import (
    LORA,
    MIXED,
    NOW,
    REBASE,
    SMALL,
    WHOLE,
    WINDOW,
    of_five_tokens,
    rounds_of_rows,
    written,
)
from test_replay import LEARN, live, replay, told
from toys import PLAIN, make_kind, twin
from transformers import AutoModelForCausalLM

import ttspec.bench.runner as runner
from ttspec.decoding.engine import Engine
from ttspec.models.target import Target, wrap_target

KINDS = ("mtp-gated", "dspark", "dflash2", "jetspec", "eagle3-layers")
ARMS = {"window": (NOW, WINDOW), "rebase": (NOW, REBASE), "low-rank changes": (LORA, WHOLE)}
OPTIONS = {"seed": 3, "temperature": 1.5, "ignore_eos": True}
LIMITS = [7, 20, 13]


@pytest.fixture(scope="module")
def target() -> Target:
    return wrap_target(random_hybrid("qwen3_5"), byte_tokenizer())


@pytest.fixture(scope="module")
def said(target) -> list[list[int]]:
    engine = Engine(twin(target), None)
    return [text for text, _ in rounds_of_rows(engine, MIXED, LIMITS, **OPTIONS, **PLAIN)]


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("which", KINDS)
def test_rows_that_learn_write_plain_text_and_accept_what_each_does_alone(target, said, which, arm):
    engine = Engine(twin(target), make_kind(which))
    learn, draft = ARMS[arm]
    options = {**OPTIONS, "learn": learn, "draft": draft}
    together = rounds_of_rows(engine, MIXED, LIMITS, **options)
    assert [text for text, _ in together] == said
    pairs = zip(MIXED, LIMITS, strict=True)
    assert together == [rounds_of_rows(engine, [p], [n], **options)[0] for p, n in pairs]
    rounds = [one for _, row in together for one in row]
    assert all(updated for _, _, updated in rounds)
    assert sum(accepted for _, accepted, _ in rounds) > 3


@pytest.fixture(scope="module")
def small() -> Engine:
    make, _ = FAMILIES["qwen3_5"]
    own = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "initializer_range": 0.5}
    own |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return of_five_tokens(AutoModelForCausalLM.from_config(make(**DENSE | SMALL | own)))


@pytest.mark.parametrize("which", ["mtp-gated", "dspark"])
def test_sampled_texts_follow_the_targets_law_while_the_drafter_learns(small, which):
    """By p / q, whose batches are of drafts that were rejected too."""
    assert written(small, which) > 1e-3


def test_a_replay_of_a_targets_own_head_does_round_for_round_what_the_run_did(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(runner.measure_all.__kwdefaults__, "warm_up", 0)
    folder, suite = tmp_path / "target", tmp_path / "mine.jsonl"
    folder.mkdir()
    write_with_head(folder, random_hybrid("qwen3_5"))
    suite.write_text('{"turns": ["one", "two"]}\n{"prompt": "c"}\n')
    pair = ["--target", str(folder), "--drafter", "mtp", "--dtype", "float32", "--device", "cpu"]
    arms, rows = f"static,learn-session[{LEARN}]", ["--rows", "2"]
    a = live(pair, suite, tmp_path / "a", arms, "--temperature", "0.7", *rows)
    assert replay(pair, a, tmp_path / "b", arms, *rows) == 0
    assert told(tmp_path / "b") == told(a)
    rounds = [one for (*_, each) in told(a).values() for one in each]
    assert sum(updates for *_, updates in rounds) > 3
    assert any(accepted for _, _, accepted, *_ in rounds)
