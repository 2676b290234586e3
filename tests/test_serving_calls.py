"""Calls of tools come apart from the answer, whole and streamed; what is no call stays text."""

import copy
import json
from itertools import pairwise
from typing import Any

import httpx
from conftest import CHATML
from hypothesis import given
from hypothesis import strategies as st
from servers import HELLO, events, running

from ttspec.decoding.engine import Engine
from ttspec.serving.reasoning import ReasoningParser
from ttspec.serving.tool_calls import ToolCallParser

MARKED = (
    "{% for tool in tools or [] %}<tool_call>{{ tool | tojson }}</tool_call>{% endfor %}" + CHATML
)
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("look_up", "add")
]
SAID = (
    "I look. \n<tool_call>\n"
    '{"name": "look_up", "arguments": {"word": "Möwe </tool"}}\n</tool_call>\n<tool_call>'
    '{"name": "add", "arguments": {}}</tool_call> \n'
)


def split(text: str, cuts: list[int], tools: Any = ("look_up", "add")) -> tuple[str, list[Any]]:
    splitter, said, calls = ToolCallParser(tools), "", []
    for a, b in pairwise([0, *sorted(cuts), len(text)]):
        new, found = splitter.push(text[a:b])
        said, calls = said + new, calls + found
    new, found = splitter.push("", final=True)
    return said + new, [call["function"] for call in calls + found]


@given(st.lists(st.integers(0, len(SAID))))
def test_calls_come_apart_however_the_text_is_cut(cuts) -> None:
    said, calls = split(SAID, cuts)
    assert said == "I look."
    assert [call["name"] for call in calls] == ["look_up", "add"]
    assert json.loads(calls[0]["arguments"]) == {"word": "Möwe </tool"}


@given(st.data())
def test_what_is_no_call_stays_as_it_is(data) -> None:
    for text in (
        "a <tool_call>{nonsense}</tool_call> b ",
        'a <tool_call>{"name": "rm", "arguments": {}}</tool_call>',
        'a <tool_call>{"name": "add", "arguments": 5}</tool_call>',
        "a < b <tool_cal",
        "one <tool_call> two",
        " \n ",
    ):
        cuts = data.draw(st.lists(st.integers(0, len(text))))
        assert split(text, cuts) == (text, [])
    assert split(SAID, [], ()) == (SAID, [])
    assert split(SAID + "  and\n more ", [3])[0] == "I look.and\n more "


def test_a_call_without_its_closing_mark_counts_at_the_end() -> None:
    said, calls = split('<tool_call>{"name": "add", "arguments": {"a": 1}}', [3])
    assert (said, calls[0]["arguments"]) == ("", '{"a": 1}')


def ask(client: httpx.Client, **body: Any) -> Any:
    asked = {"messages": HELLO, "max_tokens": 6, "tools": TOOLS, "stop": "never", **body}
    if body.get("stream"):
        with client.stream("POST", "/v1/chat/completions", json=asked) as response:
            return [event["choices"][0] for event in events(response)]
    response = client.post("/v1/chat/completions", json=asked)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def test_a_server_tells_calls_as_openai_does(engine: Engine, monkeypatch) -> None:
    said = {"text": SAID}

    def written(splitter: Any, text: str, *, final: bool = False) -> tuple[str, str]:
        return "", said["text"] if final else ""

    marked = engine.sibling()
    marked.tokenizer = copy.deepcopy(engine.tokenizer)
    marked.tokenizer.chat_template = MARKED
    with running(marked) as (client, _):
        monkeypatch.setattr(ReasoningParser, "push", written)  # what the target wrote
        monkeypatch.setattr("ttspec.serving.usage.finish_reason", lambda _: "stop")
        whole = ask(client)
        assert whole["finish_reason"] == "tool_calls"
        assert whole["message"]["content"] == "I look."
        calls = whole["message"]["tool_calls"]
        assert [call["function"]["name"] for call in calls] == ["look_up", "add"]
        assert len({call["id"] for call in calls}) == 2
        *parts, last = ask(client, stream=True)
        assert last["finish_reason"] == "tool_calls"
        streamed = [call for part in [*parts, last] for call in part["delta"].get("tool_calls", [])]
        assert [call.pop("index") for call in streamed] == [0, 1]
        assert [call["function"] for call in streamed] == [call["function"] for call in calls]

        said["text"] = "Nothing to call."
        plain = ask(client)
        assert plain["finish_reason"] == "stop"
        assert plain["message"] == {**plain["message"], "content": said["text"]}
        assert "tool_calls" not in plain["message"]
