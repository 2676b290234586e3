"""What a Python program may have set or hand over: torch's modes, and arguments of other kinds."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from test_conformance import engine_of
from toys import toy_engine

import ttspec
from ttspec.config import LearnConfig
from ttspec.decoding.engine import Engine
from ttspec.errors import DataError, OptionError

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
    with pytest.raises(OptionError, match=f"target is a {type(given).__name__}; allowed"):
        ttspec.load(given)


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
