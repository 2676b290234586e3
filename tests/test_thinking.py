"""The thinking switch of chat templates: explicit, recorded, and the same in every turn."""

import json
from typing import Any

import pytest
from conftest import CHATML, byte_tokenizer
from toys import PLAIN, prompt_ids, toy_engine

from ttspec.bench.manifest import describe
from ttspec.cli import main
from ttspec.decoding.engine import Engine
from ttspec.decoding.template import thinking_of
from ttspec.errors import OptionError

# As Qwen3's: on unless switched off; an answer's thoughts are left out once it is history.
HYBRID = (
    "{% for m in messages %}"
    "{% set said = m['content'] %}"
    "{% if m['role'] == 'assistant' and '</think>' in said %}"
    "{% set said = said.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + said + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think></think>' }}{% endif %}{% endif %}"
)
# As the small Qwen3.5: off unless switched on; the prompt opens the thoughts.
OPENING = (
    CHATML.removesuffix("{% endif %}")
    + "{% if enable_thinking is defined and enable_thinking %}{{ '<think>\n' }}{% else %}"
    "{{ '<think></think>' }}{% endif %}{% endif %}"
)
# As SmolLM3's: the system message says it too.
SYSTEM = (
    "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
    "{{ '<|im_start|>system\nReasoning: ' + ('think' if enable_thinking else 'no_think')"
    " + '<|im_end|>\n' }}" + CHATML
)
# As Granite's: another name.
RENAMED = HYBRID.replace("enable_thinking", "thinking")
SWITCHED = {"hybrid": (HYBRID, True), "opening": (OPENING, False), "system": (SYSTEM, True),
            "renamed": (RENAMED, True)}  # fmt: skip


def tokenizer_with(template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def engine_with(folder, template: str) -> Engine:
    engine = toy_engine(folder)
    engine.tokenizer.chat_template = template
    return engine


@pytest.mark.parametrize("which", SWITCHED)
def test_what_applies_is_what_was_asked_or_the_templates_default(which: str) -> None:
    template, default = SWITCHED[which]
    tokenizer = tokenizer_with(template)
    assert thinking_of(tokenizer) is default
    assert thinking_of(tokenizer, True) is True
    assert thinking_of(tokenizer, False) is False
    assert prompt_ids(tokenizer, "hi") == prompt_ids(tokenizer, "hi", thinking=default)
    assert prompt_ids(tokenizer, "hi") != prompt_ids(tokenizer, "hi", thinking=not default)


@pytest.mark.parametrize("template", [CHATML, CHATML + "{# <think> #}", None])
def test_a_switch_that_is_not_there_cannot_be_asked_for(template: str | None) -> None:
    tokenizer = tokenizer_with(template)  # type: ignore[arg-type]
    assert thinking_of(tokenizer) is None
    with pytest.raises(OptionError, match="no switch") as caught:
        thinking_of(tokenizer, False)
    assert "thinking is False" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 2


def test_a_system_message_that_settles_it_is_seen() -> None:
    template = SYSTEM.replace("if enable_thinking else", "if enable_thinking and not off else")
    told = "{% set off = messages[0]['content'] == '/no_think' %}"
    tokenizer = tokenizer_with(told + template)
    assert thinking_of(tokenizer, system="Be kind.") is True
    assert thinking_of(tokenizer, system="/no_think") is None
    with pytest.raises(OptionError, match="system message"):
        thinking_of(tokenizer, True, system="/no_think")


def test_a_raw_prompt_has_no_switch(toy_target_dir) -> None:
    engine = engine_with(toy_target_dir, HYBRID)
    assert engine.generate("hi", max_new_tokens=2, raw=True, **PLAIN)[0].stats.thinking is None
    with pytest.raises(OptionError, match="raw"):
        engine.generate("hi", max_new_tokens=2, raw=True, thinking=True)


@pytest.mark.parametrize("which", SWITCHED)
@pytest.mark.parametrize("asked", [None, True, False])
def test_every_turn_is_written_as_asked(toy_target_dir, which: str, asked: bool | None) -> None:
    template, default = SWITCHED[which]
    engine = engine_with(toy_target_dir, template)
    applied = default if asked is None else asked
    session = engine.session(thinking=asked, max_new_tokens=12, ignore_eos=True, learn=None)
    first, second = session.send("One."), session.send("Two?")
    assert (first.stats.thinking, second.stats.thinking) == (applied, applied)
    tokenizer = engine.tokenizer
    assert first.prompt_ids == prompt_ids(tokenizer, "One.", thinking=applied)
    said = [
        {"role": "user", "content": "One."},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "Two?"},
    ]
    whole = prompt_ids(tokenizer, said, thinking=applied)
    assert whole[-len(second.prompt_ids) :] == second.prompt_ids
    # What follows a template's answer, and an empty thought only where it was switched off.
    text = tokenizer.decode(second.prompt_ids)
    assert "Two?" in text
    if which != "system":
        on, off = ("<think>\n" if which == "opening" else "assistant\n"), "<think></think>"
        assert text.endswith(on if applied else off)
    (batched,) = [
        [chunk.result for _, chunk in engine.run(
            [["One.", "Two?"]], thinking=asked, max_new_tokens=12, ignore_eos=True, learn=None
        ) if chunk.result]
    ]  # fmt: skip
    assert [r.token_ids for r in batched if r] == [first.token_ids, second.token_ids]
    assert {r.stats.thinking for r in batched if r} == {applied}


def test_the_command_takes_the_switch_and_tells_what_applied(
    pair, toy_target_dir, tmp_path, capsys
) -> None:
    folder = tmp_path / "thinker"
    engine = toy_engine(toy_target_dir)
    engine.target.model.save_pretrained(folder)
    tokenizer_with(HYBRID).save_pretrained(folder)
    given = ["generate", "hi", "--target", str(folder), "--drafter", "none", "--dtype", "float32"]
    told = {}
    for flags in ((), ("--thinking",), ("--no-thinking",)):
        assert main([*given, "--max-new-tokens", "3", "--json", *flags]) == 0
        told[flags] = json.loads(capsys.readouterr().out)["stats"]
    assert [stats["thinking"] for stats in told.values()] == [True, True, False]
    counts = [stats["prompt_tokens"] for stats in told.values()]
    assert counts[0] == counts[1] < counts[2]
    assert main(["generate", "hi", *pair, "--no-thinking"]) == 2
    assert "no switch" in capsys.readouterr().err


def test_a_manifest_tells_the_mode_of_the_prompts(toy_target_dir) -> None:
    engine = engine_with(toy_target_dir, HYBRID)
    assert describe(engine, title="")["thinking"] is True
    engine.tokenizer.chat_template = CHATML
    assert describe(engine, title="")["thinking"] is None
