"""Options: which there are, and what old names say."""

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from toys import complaint

from ttspec.bench.arms import parse_arms
from ttspec.cli import WRONG_INPUT, main
from ttspec.config import OLD_OPTIONS, DraftConfig, LearnConfig
from ttspec.errors import OptionError

KINDS = {"learn": LearnConfig, "draft": DraftConfig}
NEW_NAMES = {"learn.rows": "learn.supervision", "draft.gate": "draft.adaptive"}


@pytest.mark.parametrize("old", OLD_OPTIONS)
def test_an_old_option_says_what_became_of_it(old: str, capsys) -> None:
    group, name = old.split(".")
    asked = {
        "new": lambda: KINDS[group](**{name: 1}),
        "changed": lambda: replace(KINDS[group](), **{name: 1}),
        "arm": lambda: parse_arms(f"learn-session[{name}=1]"),
    }
    for how, ask in asked.items():
        with pytest.raises(OptionError, match="^" + re.escape(f"{old} {OLD_OPTIONS[old]}")) as told:
            ask()
        assert NEW_NAMES.get(old, "docs/options.md") in str(told.value), how
    for given in ([f"--{old}", "1"], [f"--{old}=1"], [f"--{old}"]):
        assert main(["generate", "hello", *given]) == WRONG_INPUT
        first, second = complaint(capsys)
        assert first == f"ttspec: error: --{old} {OLD_OPTIONS[old]}"
        assert second == "Try: ttspec generate --help"


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


def test_the_docs_say_what_keeps_every_option_and_why_every_old_one_went() -> None:
    text = (Path(__file__).parent.parent / "docs" / "options.md").read_text()
    for group, record in KINDS.items():
        for field in fields(record):
            assert f"| `{group}.{field.name}` |" in text, field.name
    for old in OLD_OPTIONS:
        assert f"| `{old}` |" in text, old
