"""What a Python program may have set or hand over: torch's modes, and arguments of other kinds."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from test_conformance import engine_of
from toys import make_kind, toy_engine
from transformers import AutoModelForCausalLM

import ttspec
from ttspec.config import DraftConfig, LearnConfig
from ttspec.decoding.engine import Engine
from ttspec.errors import DataError, OptionError, TargetError

OPTIONS: dict[str, Any] = {"max_new_tokens": 24, "ignore_eos": True, "temperature": 0.9, "seed": 5}
LEARN = LearnConfig(stride=1, lr=3e-3)
SHARED = LearnConfig(scope="shared", stride=1, lr=3e-3)
Mode = Callable[[], AbstractContextManager[Any]]


@pytest.fixture(scope="module")
def target(toy_target_dir):
    return toy_engine(toy_target_dir).target


def autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("learn", [None, LEARN, SHARED], ids=["static", "request", "shared"])
@pytest.mark.parametrize("mode", [torch.inference_mode, autocast])
def test_a_mode_of_the_caller_changes_nothing(target, mode: Mode, learn: LearnConfig | None):
    engine = engine_of(target, "dflash")
    wanted = engine.generate("hello there", learn=None, **OPTIONS)[0].token_ids
    chunks, found = engine.stream("hello there", learn=learn, **OPTIONS), list[int]()
    for inside in (True, False) * len(wanted):  # a stream's reader may come and go
        with mode() if inside else nullcontext():
            found += getattr(next(chunks, None), "token_ids", ())
    assert found == wanted
    for inside in (True, False):  # with the caches of before
        with mode() if inside else nullcontext():
            assert engine.generate("hello there", learn=learn, **OPTIONS)[0].token_ids == wanted


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_of_torch_is_refused(target, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        with pytest.raises(OptionError, match="set_default_dtype"):
            engine_of(target, "dflash").generate("hello there", learn=LEARN, **OPTIONS)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("given", [5, None, b"x", ("a",), ("a", "b"), ("a", "b", "c")])
def test_what_is_no_target_is_refused(given: Any) -> None:
    with pytest.raises(OptionError, match=f"target is a {type(given).__name__}(;| of .*;) allowed"):
        ttspec.load(given)


@pytest.mark.parametrize("option", ["device", "dtype"])
def test_a_loaded_target_is_not_said_to_be_another(target, option: str) -> None:
    given = target.model, target.tokenizer
    with pytest.raises(OptionError, match=f"^{option} is 'nonsense'; allowed"):
        ttspec.load(given, None, **{option: "nonsense"})
    assert ttspec.load(given, None, device="cpu", dtype="float32").target.dtype == torch.float32
    with pytest.raises(OptionError, match="bfloat16, and the target is loaded already, with float"):
        ttspec.load(given, None, dtype="bfloat16")


def test_what_is_in_a_tuple_that_is_no_target_is_said(target) -> None:
    compiled = torch.compile(target.model)
    with pytest.raises(OptionError, match=r"tuple of OptimizedModule, .*\n.*what is inside"):
        ttspec.load((compiled, target.tokenizer))


def test_a_loaded_model_without_head_or_weights_is_refused(target) -> None:
    with pytest.raises(TargetError, match=r"LlamaModel has no head.*\n.*AutoModelForCausalLM"):
        ttspec.load((target.model.model, target.tokenizer), None)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(target.model.config)
    with pytest.raises(TargetError, match="on the device meta"):
        ttspec.load((empty, target.tokenizer), None)


def test_a_loaded_model_needs_no_generation_config(toy_target_dir, target) -> None:
    model = AutoModelForCausalLM.from_pretrained(toy_target_dir, dtype=torch.float32)
    model.generation_config = None
    found = ttspec.load((model, target.tokenizer), None).generate("hello there", **OPTIONS)
    wanted = engine_of(target, "ngram").generate("hello there", learn=None, **OPTIONS)
    assert found[0].token_ids == wanted[0].token_ids


@pytest.mark.parametrize("which", ["dflash", "eagle3", "causal", "mtp"])
def test_engines_of_one_drafter_and_of_one_target_leave_each_other_alone(
    toy_target_dir, which: str
) -> None:
    static: dict[str, Any] = OPTIONS | {"learn": None, "draft": ttspec.DraftConfig(adaptive=False)}
    drafter = make_kind(which)
    engine = ttspec.load(toy_target_dir, drafter, device="cpu", dtype="float32")
    wanted = engine.generate("hello there", **static)[0]
    for other in (
        ttspec.load(toy_target_dir, drafter, device="cpu", dtype="bfloat16"),
        ttspec.Engine(engine.target, make_kind("eagle3-layers")),  # reads other hidden states
    ):
        other.generate("hello there", **static)
        engine._spare = None  # a new decoder asks target and drafter anew
        found = engine.generate("hello there", **static)[0]
        assert found.token_ids == wanted.token_ids
        assert [r.accepted for r in found.rounds] == [r.accepted for r in wanted.rounds]


@pytest.mark.parametrize("which", ["causal", "mtp"])
def test_threads_draft_with_one_model_of_transformers(target, which: str) -> None:
    """torch puts the weights of a call into the module itself."""
    engine, prompts = engine_of(target, which), ["hello there", "another", "and a third"]
    options = OPTIONS | {"learn": LEARN, "draft": DraftConfig(adaptive=False)}  # not by the clock

    def answer(prompt: str) -> tuple[list[int], list[int]]:
        result = engine.generate(prompt, **options)[0]
        return result.token_ids, [r.accepted for r in result.rounds]

    wanted = [answer(prompt) for prompt in prompts]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(len(prompts)) as pool:
            assert list(pool.map(answer, prompts * 2)) == wanted * 2
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("which", ["causal", "pard2", "mtp", "mtp-experts"])
def test_a_model_of_transformers_holds_no_weights_beside_the_drafters(target, which: str) -> None:
    drafter: Any = engine_of(target, which).drafter
    assert drafter.module.state_dict().keys() & drafter.weights.keys()
    assert sum(p.numel() for p in drafter.module.parameters()) == 0


@pytest.mark.parametrize("given", [5, True, ["ngram"], b"ngram"])
def test_what_is_no_drafter_is_refused_before_the_target_is_read(given: Any) -> None:
    with pytest.raises(OptionError, match=f"drafter is a {type(given).__name__}; allowed"):
        ttspec.load("no-such-folder", given)


def test_a_drafter_of_an_engine_is_no_name(engine) -> None:
    with pytest.raises(OptionError, match="drafter is a str; allowed"):
        engine.with_drafter("ngram")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"seeds": [1]}, "seeds is \\[1\\]; allowed is a list of 2"),
        ({"seeds": 1}, "seeds is 1; allowed is a list of 2"),
        ({"seeds": [1, -1]}, "seed is -1; allowed"),
        ({"seeds": [1, "2"]}, "seed is '2'; allowed"),
        ({"rows": "2"}, "rows is '2'; allowed"),
        ({"rows": 1.5}, "rows is 1.5; allowed"),
        ({"quota": 0}, "quota is 0; allowed"),
    ],
)
def test_options_of_a_run_are_looked_at(engine, options: dict[str, Any], told: str) -> None:
    with pytest.raises(OptionError, match=told):
        engine.generate(["hello", "there"], **options)


@pytest.mark.parametrize("dialogues", ["hello", ["hello", "there"], [["hello"], []]])
def test_a_text_is_no_dialogue(engine, dialogues: Any) -> None:
    with pytest.raises(DataError, match="a list of lists of turns"):
        list(engine.run(dialogues))


@pytest.mark.parametrize("tokens", [[True, False], [1, 2.5], list(np.array([1, 2]))])
def test_tokens_are_whole_numbers_of_python(engine, tokens: Any) -> None:
    with pytest.raises(DataError, match="A prompt has the token"):
        engine.generate(tokens)


def test_an_engine_says_what_it_is(engine) -> None:
    assert repr(engine).startswith(f"Engine(target {engine.target.name}, drafter ")
    assert repr(engine).endswith("float32 on cpu)")
    assert "drafter none," in repr(Engine(engine.target, None))
