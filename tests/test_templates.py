"""Chat templates refuse and forget what they like; a user is told, never by a traceback."""

import json
from typing import Any

import pytest
from conftest import CHATML, byte_tokenizer
from toys import make_kind, prompt_ids, twin

from ttspec.cli import main
from ttspec.config import GenerateConfig
from ttspec.decoding.engine import Engine
from ttspec.decoding.template import thinking_of
from ttspec.errors import DataError, OptionError, TtspecError
from ttspec.models.loading import add_template

REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported.') }}"
    "{% endif %}" + CHATML
)
FORGETS_SYSTEM = CHATML.replace(
    "{{ '<|im_start|>' +", "{% if message['role'] != 'system' %}{{ '<|im_start|>' +"
).replace("'<|im_end|>\n' }}", "'<|im_end|>\n' }}{% endif %}")
NEEDS_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ raise_exception('Begin with system') }}{% endif %}"
    + CHATML
)
PARTS = CHATML.replace(
    "+ message['content'] + '<|im_end|>\n' }}",
    "}}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ '<|im_end|>\n' }}",
)
STRICT_PARTS = PARTS.replace(
    "{% for part", "{% if message['content'] is string %}{{ 1 / 0 }}{% endif %}{% for part"
)
BROKEN = {
    "needs tools": "{{ tools | length }}" + CHATML,
    "needs a name": CHATML.replace("message['role'] +", "message['role'] + message['name'] +"),
    "needs a date": "{{ date.upper() }}" + CHATML,
    "no jinja": "{% for message in messages %}",
    "an unknown filter": "{{ messages | yesterday }}",
    "arithmetic": "{{ 1 / 0 }}",
    "endless": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "out of bounds": "{{ messages[7]['content'].strip() }}",
    "not allowed": "{{ messages.__class__.__mro__ }}",
    "no user": "{% for m in messages %}{{ m['role'] }}{% endfor %}",
}


def tokenizer_with(template: str | None) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def written(template: str | None, prompt: Any, **options: Any) -> str:
    tokenizer = tokenizer_with(template)
    return tokenizer.decode(prompt_ids(tokenizer, prompt, **options))


def told(error: BaseException) -> str:
    assert len(str(error).splitlines()) == 2, str(error)
    return str(error)


def test_a_refused_system_message_is_one_clear_error() -> None:
    with pytest.raises(OptionError, match="system") as caught:
        written(REFUSES_SYSTEM, "hi", system="Be kind.")
    assert "System role not supported" in told(caught.value)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]
    with pytest.raises(OptionError, match="System role not supported"):
        written(REFUSES_SYSTEM, messages)
    assert written(REFUSES_SYSTEM, "hi") == written(CHATML, "hi")


@pytest.mark.parametrize("how", [{"raw": True}, {}], ids=["raw", "no template"])
def test_a_system_message_is_never_dropped(how) -> None:
    with pytest.raises(OptionError, match="system message") as caught:
        written(CHATML if how else None, "hi", system="Be kind.", **how)
    told(caught.value)
    with pytest.raises(OptionError, match="leaves out what messages of role system"):
        written(FORGETS_SYSTEM, "hi", system="Be kind.")
    assert "Be kind." in written(CHATML, "hi", system="Be kind.")
    with pytest.raises(OptionError, match="raw"):
        GenerateConfig(raw=True, system="Be kind.")


def test_a_template_that_needs_a_system_message_gets_the_one_that_is_given() -> None:
    assert "Be kind." in written(NEEDS_SYSTEM, "hi", system="Be kind.")
    with pytest.raises(DataError, match="Begin with system"):
        written(NEEDS_SYSTEM, "hi")


@pytest.mark.parametrize("which", BROKEN)
def test_a_template_that_fails_says_why(which: str) -> None:
    tokenizer = tokenizer_with(BROKEN[which])
    with pytest.raises(TtspecError) as caught:
        prompt_ids(tokenizer, "hi")
    assert "chat template" in told(caught.value)
    assert "--raw" in str(caught.value)
    assert thinking_of(tokenizer) is None
    assert prompt_ids(tokenizer, "hi", raw=True) == tokenizer("hi")["input_ids"]
    assert prompt_ids(tokenizer, [1, 2]) == [1, 2]


@pytest.mark.parametrize("template", [PARTS, STRICT_PARTS], ids=["forgets", "fails"])
def test_a_template_that_reads_parts_is_given_parts(template: str) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes?"}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    texts = ["Be kind.", "hi", "Yes?", "ab"]
    as_text = [{**m, "content": t} for m, t in zip(messages, texts, strict=True)]
    assert written(template, messages) == written(CHATML, as_text)
    assert written(template, "hi", system="No.") == written(CHATML, "hi", system="No.")
    assert written(CHATML, messages) == written(CHATML, as_text)


def test_a_developer_is_the_system_where_the_template_knows_no_such_role() -> None:
    knows = "{% for m in messages %}{% if m['role'] not in ROLES %}{{ raise_exception('role') }}"
    knows += "{% endif %}{% endfor %}" + CHATML
    old, new = (knows.replace("ROLES", str(r)) for r in (["system", "user"], ["developer", "user"]))
    said = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "hi"}]
    assert written(old, said) == written(CHATML, "hi", system="Be kind.")
    assert written(new, said).startswith("<|im_start|>developer\nBe kind.")
    with pytest.raises(OptionError, match="System role not supported"):
        written(REFUSES_SYSTEM.replace("== 'system'", "!= 'user'"), said)


TOOLS = CHATML.replace(
    "+ '<|im_end|>",
    "+ (message.tool_calls[0].function.arguments.place or '' if message.tool_calls else '')"
    " + '<|im_end|>",
)


def test_tool_calls_and_answers_are_the_templates() -> None:
    call = {"type": "function", "id": "a", "function": {"name": "weather"}}
    call["function"]["arguments"] = json.dumps({"place": "Oslo"})
    said = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "yes", "tool_call_id": "a"},
    ]
    text = written(TOOLS, said)
    assert "assistant\nOslo<|im_end|>" in text
    assert text.endswith("<|im_start|>tool\nyes<|im_end|>\n<|im_start|>assistant\n")
    forgets = TOOLS.replace(
        "message['content'] +", "(message['content'] if message.role != 'tool' else '') +"
    )
    with pytest.raises(DataError, match="leaves out what messages of role tool"):
        written(forgets, said)


def test_arguments_of_calls_are_an_object_or_a_text_as_the_template_wants_them() -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "Oslo"}}}
    said = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "user", "content": "And?"},
    ]
    joins = CHATML.replace(
        "+ '<|im_end|>",
        "+ (message.tool_calls[0].function.arguments + '!' if message.tool_calls else '')"
        " + '<|im_end|>",
    )
    for arguments in ({"at": "Oslo"}, '{"at": "Oslo"}'):
        call["function"]["arguments"] = arguments
        assert 'assistant\n{"at": "Oslo"}!<|im_end|>' in written(joins, said)


def test_each_role_is_given_as_the_template_reads_it() -> None:
    """As Mistral Small 3.1's, which takes the system message as parts and others as text."""
    mixed = CHATML.replace(
        "message['content'] +",
        "(message['content'][0]['text'] if message['role'] == 'system' else message['content']) +",
    )
    assert written(mixed, "hi", system="Be kind.") == written(CHATML, "hi", system="Be kind.")


def test_a_begun_answer_is_gone_on_with() -> None:
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, "}]
    assert written(CHATML, said).endswith("<|im_start|>assistant\nWell, ")
    assert written(PARTS, said) == written(CHATML, said)
    drops = CHATML.replace("message['content'] +", "message['content'].split(',')[-1] +")
    with pytest.raises(DataError, match="chat template cannot write"):
        written(drops, said)


@pytest.mark.parametrize("prompt", ["half \ud83d", [{"role": "user", "content": "\udcff"}]])
def test_what_is_no_character_is_refused(prompt: Any) -> None:
    for raw in (True, False) if isinstance(prompt, str) else (False,):
        with pytest.raises(DataError, match="no character") as caught:
            written(CHATML, prompt, raw=raw)
        told(caught.value)


def test_later_turns_fail_as_clearly_and_the_session_goes_on(typist) -> None:
    """A template may refuse a turn that it cannot take after what was said."""
    alternates = (
        "{% for m in messages %}{% if m['content'] == 'no' %}{{ raise_exception('Not that.') }}"
        "{% endif %}{% endfor %}" + CHATML
    )
    target = twin(typist.target)
    target.tokenizer = tokenizer_with(alternates)
    engine = Engine(target, make_kind("dflash"))
    session = engine.session(max_new_tokens=6, context=200, learn=None)
    first = session.send("hi")
    with pytest.raises(DataError, match="Not that"):
        session.send("no")
    said = ["hi", first.text, "yes"]
    roles = ["user", "assistant", "user"]
    messages = [{"role": r, "content": t} for r, t in zip(roles, said, strict=True)]
    second = session.send("yes")
    assert second.token_ids == engine.generate([messages], max_new_tokens=6)[0].token_ids


@pytest.mark.parametrize("value", [CHATML, [{"name": "default", "template": CHATML}]])
def test_a_template_in_a_file_of_its_own_is_found(tmp_path, value) -> None:
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": value}))
    tokenizer = tokenizer_with(None)
    add_template(tokenizer, tmp_path)
    assert prompt_ids(tokenizer, "hi", system="No.") == prompt_ids(
        tokenizer_with(CHATML), "hi", system="No."
    )
    (tmp_path / "chat_template.json").write_text("{")
    add_template(tokenizer, tmp_path)  # it has one, which counts
    with pytest.raises(TtspecError, match=r"chat_template\.json"):
        add_template(tokenizer_with(None), tmp_path)


def test_commands_say_it_in_two_lines(pair, toy_target_dir, tmp_path, capsys) -> None:
    import shutil

    folder = tmp_path / "target"
    shutil.copytree(toy_target_dir, folder)
    tokenizer = byte_tokenizer()
    for template, flags in (
        (REFUSES_SYSTEM, ["--system", "Be kind."]),
        (None, ["--system", "Be kind."]),
        (CHATML, ["--system", "Be kind.", "--raw"]),
        (BROKEN["needs tools"], []),
    ):
        for file in folder.glob("*template*"):
            file.unlink()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        given = ["generate", "hi", "--target", str(folder), "--drafter", "none", *flags]
        assert main([*given, "--dtype", "float32", "--max-new-tokens", "2"]) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert "ttspec: error: " in error
