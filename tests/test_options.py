"""Options: which there are, and what is refused."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import complaint

from ttspec.bench.arms import parse_arms
from ttspec.cli import WRONG_INPUT, main
from ttspec.config import DraftConfig, GenerateConfig, LearnConfig
from ttspec.errors import OptionError

KINDS = {"learn": LearnConfig, "draft": DraftConfig}


@pytest.mark.parametrize(
    ("name", "value"), [("parameters", "mlp"), ("loss", "split"), ("supervision", "all")]
)
def test_a_value_that_is_gone_is_refused_with_those_that_stayed(name: str, value: str, capsys):
    with pytest.raises(OptionError, match=rf"learn\.{name} is '{value}'; allowed is "):
        LearnConfig(**{name: value})
    with pytest.raises(OptionError, match="allowed are"):
        parse_arms(f"learn[{name}={value}]")
    assert main(["generate", "hello", f"--learn.{name}", value]) == WRONG_INPUT
    assert f"--learn.{name}" in complaint(capsys)[0]


def test_a_name_that_never_was_an_option_is_refused_with_those_there_are() -> None:
    with pytest.raises(OptionError, match=r"learn\.speed is no option; options are stride, "):
        LearnConfig(speed=3)  # type: ignore[call-arg]
    with pytest.raises(OptionError, match=r"speed is no option of learn; options are length, "):
        parse_arms("learn[speed=3]")
    with pytest.raises(OptionError, match=r"\nIs stride meant\? Options stand in brackets"):
        parse_arms("learn[strid=3]")


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"learn": False}, "learn is False; allowed is a LearnConfig or None."),
        ({"learn": {"stride": 4}}, "learn is {'stride': 4}; allowed is a LearnConfig or None."),
        ({"max_new_tokens": 8.0}, "max_new_tokens is 8.0; allowed is a whole number (int64)."),
        ({"max_new_tokens": True}, "max_new_tokens is True; allowed is a whole number (int64)."),
        (
            {"top_k": 2**63},
            "top_k is 9223372036854775808; allowed is a whole number (int64) or None.",
        ),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"temperature": "0.5"}, "temperature is '0.5'; allowed is a number or None."),
        ({"seed": "a"}, "seed is 'a'; allowed is a whole number (int64) or None."),
        ({"raw": 1}, "raw is 1; allowed is True or False."),
        ({"stop": "END"}, "stop is 'END'; allowed is a list of texts, none of them empty."),
        ({"stop": None}, "stop is None; allowed is a list of texts, none of them empty."),
        ({"stop": [3]}, "stop is [3]; allowed is a list of texts, none of them empty."),
        ({"acceptance": "typical"}, "acceptance is 'typical'; allowed is invariant, rejection."),
        ({"max_tokens": 8}, "max_tokens is no option; options are max_new_tokens, temperature"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(options: dict[str, Any], allowed: str) -> None:
    with pytest.raises(OptionError) as caught:
        GenerateConfig(**options)
    assert str(caught.value).startswith(allowed)


def test_an_option_as_others_call_it_is_answered_with_its_name_here() -> None:
    with pytest.raises(OptionError, match=r"\nIs max_new_tokens meant\?$"):
        GenerateConfig(max_tokens=8)  # type: ignore[call-arg]
    with pytest.raises(OptionError, match=r"deterministic\.$"):
        GenerateConfig(echo=True)  # type: ignore[call-arg]


def test_numbers_of_numpy_and_lists_of_stop_texts_are_taken() -> None:
    config = GenerateConfig(temperature=np.float32(0.5), stop=["a", "b"])  # type: ignore[arg-type]
    assert config.sampling({}).temperature == 0.5


def test_a_list_that_changes_later_changes_no_options() -> None:
    words: list[Any] = ["END"]
    config = GenerateConfig(stop=words, bad_words=words)  # type: ignore[arg-type]
    words.append(5)
    assert config.stop == config.bad_words == ("END",)


def test_the_papers_preset_is_what_it_was() -> None:
    assert LearnConfig.paper() == LearnConfig(
        stride=10,
        weights="full",
        lr=1e-4,
        supervision="block",
        blocks=1,
        decay=4.0,
        beta1=0.9,
        beta2=0.999,
        publish="stride",
        guard=0,
        loss="kl",
        parameters="full",
        scope="request",
    )


def test_the_docs_say_what_keeps_every_option() -> None:
    text = (Path(__file__).parent.parent / "docs" / "options.md").read_text()
    for group, record in KINDS.items():
        for field in fields(record):
            assert f"| `{group}.{field.name}` |" in text, field.name
