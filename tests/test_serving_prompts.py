"""From bodies to prompts and grammars, thoughts apart, and the command line of `ttspec serve`."""

import copy
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHATML
from hypothesis import given
from hypothesis import strategies as st
from servers import SCHEMA
from transformers import LlamaForCausalLM, LogitsProcessor

from ttspec.cli import main, serve
from ttspec.config import GenerateConfig
from ttspec.decoding.conversation import Request
from ttspec.decoding.engine import Engine
from ttspec.decoding.scheduler import Scheduler
from ttspec.serving.errors import ApiError
from ttspec.serving.grammar import Grammars
from ttspec.serving.prompts import PromptRenderer
from ttspec.serving.reasoning import ReasoningParser
from ttspec.serving.schema import ChatRequest, ResponseFormat
from ttspec.serving.usage import speculative_decoding

TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
THINKS = CHATML.replace("assistant\n' }}", "assistant\n' + ('<think>\n' if thinking else '') }}")
CALLS = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + CHATML


def writer(engine: Engine, template: str) -> PromptRenderer:
    other = engine.sibling()
    other.tokenizer = copy.deepcopy(engine.tokenizer)
    other.tokenizer.chat_template = template
    return PromptRenderer(other)


def body(**given: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "hi"}], **given})


def text_of(engine: Engine, ids: list[int]) -> str:
    return str(engine.tokenizer.decode(ids))


SAID = "\n<think>\n a <b, </thin or so \n</think>\n\n the answer, </think> "


@given(st.lists(st.integers(0, len(SAID))))
def test_thoughts_come_apart_however_the_text_is_cut(cuts) -> None:
    splitter = ReasoningParser(marks=True, begun=False)
    pairs = pairwise([0, *sorted(cuts), len(SAID)])
    parts = [splitter.push(SAID[a:b]) for a, b in pairs] + [splitter.push("", final=True)]
    thoughts, answer = ("".join(part[i] for part in parts) for i in (0, 1))
    assert thoughts == "a <b, </thin or so"
    assert answer == "the answer, </think> "


def test_an_answer_without_thoughts_and_a_thought_that_does_not_end() -> None:
    assert ReasoningParser(marks=False, begun=False).push(" <think>") == ("", " <think>")
    plain = ReasoningParser(marks=True, begun=False)
    assert plain.push(" <th") == ("", "")
    assert plain.push("e", final=True) == ("", " <the")
    cut = ReasoningParser(marks=True, begun=True)
    assert cut.push("one two ") == ("one two", "")
    assert cut.push("three", final=True) == (" three", "")


def test_a_prompt_that_opens_a_thought_is_noticed(engine) -> None:
    thinks = writer(engine, "{# </think> #}" + THINKS)
    on = thinks.chat(body(chat_template_kwargs={"enable_thinking": True}))
    off = thinks.chat(body(chat_template_kwargs={"enable_thinking": False}))
    assert (on.marks_reasoning, on.begins_in_reasoning, on.thinking) == (True, True, True)
    assert (off.begins_in_reasoning, off.thinking) == (False, False)
    assert text_of(engine, on.prompts[0]).endswith("assistant\n<think>\n")
    with pytest.raises(ApiError, match="no switch"):
        writer(engine, CHATML).chat(body(chat_template_kwargs={"enable_thinking": True}))


def test_tools_are_written_by_the_template_or_refused(engine) -> None:
    asked = body(tools=[TOOL])
    assert '"look_up"' in text_of(engine, writer(engine, CALLS).chat(asked).prompts[0])
    silent = writer(engine, CALLS).chat(body(tools=[TOOL], tool_choice="none")).prompts[0]
    assert "look_up" not in text_of(engine, silent)
    user = {"type": "function", "function": {"name": "user"}}  # a word of the template's own
    for tools in (asked, body(tools=[user])):
        with pytest.raises(ApiError, match="no place for tools"):
            writer(engine, CHATML).chat(tools)


class Masked(LogitsProcessor):
    """Lets transformers write what a grammar allows, asked anew about the whole text each time."""

    def __init__(self, grammars: Grammars, form: ResponseFormat, prompt: int) -> None:
        self.grammars, self.form, self.prompt = grammars, form, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        bitmask = torch.full((1, -(-scores.shape[1] // 32)), -1, dtype=torch.int32)
        text = input_ids[0, self.prompt :].tolist()
        self.grammars.mask(self.form).fill(bitmask, text, [])
        token = torch.arange(scores.shape[1])
        allowed = bitmask[0, token // 32] >> (token % 32) & 1
        return scores.masked_fill(allowed == 0, -torch.inf)


def test_greedy_json_is_what_transformers_writes_under_the_same_grammar(
    engine, toy_target_dir
) -> None:
    asked = body(
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    )
    written = PromptRenderer(engine).chat(asked)
    (ids,) = written.prompts
    grammars = Grammars(engine.tokenizer, 260, engine.target.ends)
    model = LlamaForCausalLM.from_pretrained(toy_target_dir).eval()
    assert asked.response_format
    wanted = model.generate(
        torch.tensor([ids]),
        logits_processor=[Masked(grammars, asked.response_format, len(ids))],
        max_new_tokens=100,
        do_sample=False,
        pad_token_id=256,
    )[0, len(ids) :].tolist()
    config = GenerateConfig(max_new_tokens=100, context=300)
    scheduler = Scheduler(engine.decoder(config, 2, len(ids), sessions=True), config)
    scheduler.add_request(Request(ids=ids, seed=0, mask=written.mask))
    result = None
    while scheduler.has_unfinished():
        for _, chunk in scheduler.step():
            result = chunk.result or result
    assert result is not None
    assert result.token_ids == wanted
    assert set(json.loads(result.text)) == {"on", "n"}


def test_figures_without_drafts_are_zero() -> None:
    told = speculative_decoding([], 3, detailed=True)
    assert told["acceptance_histogram"] == [0, 0, 0, 0]
    assert told["num_spec_steps"] == told["num_draft_tokens"] == 0
    assert told["per_step_accepted"] == []


def test_the_command_refuses_what_is_not_safe_and_makes_keys(tmp_path, capsys) -> None:
    assert main(["serve", "--host", "0.0.0.0"]) == 2
    assert "there are no API keys" in capsys.readouterr().err
    assert main(["serve", "--add-key", "alice"]) == 2
    path = tmp_path / "keys"
    assert main(["serve", "--api-key-file", str(path), "--add-key", "alice"]) == 0
    key = capsys.readouterr().out.strip()
    assert key.startswith("sk-")
    assert key not in path.read_text()
    path.write_text("nothing\n")
    assert main(["serve", "--api-key-file", str(path)]) == 2
    assert main(["serve", "--rows", "0"]) == 2


def test_a_server_goes_on_where_nobody_can_read_what_it_says(monkeypatch) -> None:
    full = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", full)
    serve._show("Ready")
    monkeypatch.undo()
    with pytest.raises(OSError, match="No space left"):
        full.close()


def test_a_pair_that_cannot_be_loaded_ends_the_server_with_its_error(tmp_path, capsys) -> None:
    assert main(["serve", str(tmp_path / "nothing"), "--port", "0"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("vocabulary", [260, 288])
def test_a_mask_has_as_many_bits_as_the_target_has_tokens(engine, vocabulary) -> None:
    form = ResponseFormat(type="json_object")
    mask = Grammars(engine.tokenizer, vocabulary, engine.target.ends).mask(form)
    bitmask = torch.full((1, -(-vocabulary // 32)), -1, dtype=torch.int32)
    mask.fill(bitmask, [], [])
    token = torch.arange(vocabulary)
    allowed = (bitmask[0, token // 32] >> (token % 32) & 1).nonzero().flatten().tolist()
    assert engine.tokenizer.decode(allowed) == "{"
