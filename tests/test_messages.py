"""Prompts as data sets have them: one parser for suites and for training."""

import codecs
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from ttspec.bench.suites import load_suite, text_of
from ttspec.decoding.messages import as_messages
from ttspec.errors import DataError
from ttspec.training.answers import read_dialogues

USER = {"role": "user", "content": "hi"}
SYSTEM = {"role": "system", "content": "Be kind."}
ANSWER = {"role": "assistant", "content": "Yes?"}
MORE = {"role": "user", "content": "more"}
PARTS = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
CALL = {"type": "function", "id": "a", "function": {"name": "look", "arguments": '{"at": 1}'}}
CALLED = {**CALL, "function": {"name": "look", "arguments": {"at": 1}}}
TOOL = {"role": "tool", "content": "rain", "tool_call_id": "a"}

# A row, what a suite asks, and what training asks.
ROWS: dict[str, tuple[Any, list[Any], list[Any]]] = {
    "a text": ({"prompt": "hi"}, ["hi"], ["hi"]),
    "a text, and nothing else": ({"prompt": "hi", "messages": None}, ["hi"], ["hi"]),
    "turns": ({"turns": ["hi", "more"]}, ["hi", "more"], ["hi", "more"]),
    "messages": ({"messages": [SYSTEM, USER]}, [[SYSTEM, USER]], [[SYSTEM, USER]]),
    "parts": (
        {"messages": [{"role": "user", "content": PARTS}]},
        [[{"role": "user", "content": "a b"}]],
        ["a b"],
    ),
    "a talk": ({"messages": [USER, ANSWER, MORE]}, [[USER, ANSWER, MORE]], ["hi", "more"]),
    "a begun answer": ({"messages": [USER, ANSWER]}, [[USER, ANSWER]], ["hi"]),
    "a developer": (
        {"messages": [{**SYSTEM, "role": "developer"}, USER]},
        [[{**SYSTEM, "role": "developer"}, USER]],
        [[{**SYSTEM, "role": "developer"}, USER]],
    ),
    "a tool's answer": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, TOOL]},
        [[USER, {"role": "assistant", "content": "", "tool_calls": [CALLED]}, TOOL]],
        ["hi"],
    ),
    "UltraChat": (
        {"prompt": "hi", "prompt_id": "x", "messages": [USER, ANSWER, MORE, ANSWER]},
        ["hi", "more"],
        ["hi", "more"],
    ),
    "TRL": ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, [[SYSTEM, USER]], [[SYSTEM, USER]]),
    "ShareGPT": (
        {
            "id": "x",
            "conversations": [
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "Yes?"},
                {"from": "human", "value": "more"},
                {"from": "gpt", "value": "No."},
            ],
        },
        ["hi", "more"],
        ["hi", "more"],
    ),
    "ShareGPT with a system": (
        {
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "Yes?"},
            ]
        },
        [[SYSTEM, USER]],
        [[SYSTEM, USER]],
    ),
    "conversations of messages": ({"conversations": [USER, ANSWER]}, ["hi"], ["hi"]),
}


def files(folder: Path, rows: list[Any]) -> dict[str, Path]:
    """The same rows as people save them."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    made = {
        "lines": lines.encode(),
        "windows lines": lines.replace("\n", "\r\n").encode(),
        "marked": codecs.BOM_UTF8 + lines.encode(),
        "utf-16": codecs.BOM_UTF16_LE + lines.encode("utf-16-le"),
        "a list": json.dumps(rows, indent=1).encode(),
        "a marked list": codecs.BOM_UTF8 + json.dumps(rows).encode(),
    }
    for name, data in made.items():
        (folder / name).write_bytes(data)
    return {name: folder / name for name in made}


@pytest.mark.parametrize("which", ROWS)
def test_a_row_is_the_same_request_for_suites_and_training(tmp_path: Path, which: str) -> None:
    row, asked, taught = ROWS[which]
    for path in files(tmp_path, [row, {"prompt": "é"}]).values():
        assert load_suite(str(path)).requests == [asked, ["é"]], path.name
        assert read_dialogues(path) == [taught, ["é"]], path.name
    assert all(isinstance(text_of(turn), str) for turn in asked)


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": []},
        {"conversations": [{"from": "gpt", "value": "x"}]},
        {"conversations": [{"from": "somebody", "value": "x"}]},
        {"conversations": "x"},
        {"prompt": []},
        {"prompt": [SYSTEM]},
        {"prompt": "hi", "messages": [SYSTEM]},
        {"prompt": "hi", "conversations": [USER]},
        {"messages": [{"role": "pirate", "content": "x"}]},
        {"messages": [{"content": "x"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": 3}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        {"messages": [USER, {"role": "assistant", "content": ""}]},
        {"messages": "x"},
        {"messages": [None]},
        {"prompt": "half \ud800"},
        ["x"],
        3,
    ],
    ids=str,
)
def test_what_is_no_request_is_refused_by_its_line(tmp_path: Path, row: Any) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"prompt": "good"}}\n{json.dumps(row)}\n')
    for read in (lambda: load_suite(str(path)), lambda: read_dialogues(path)):
        with pytest.raises(DataError) as caught:
            read()
        assert f"{path}, line 2" in str(caught.value)
        assert len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": " "}, "prompt is ' '"),
        ({"turns": ["hi", ""]}, "turns is ['hi', '']"),
        ({"messages": [SYSTEM]}, "messages is [{'role': 'system'"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "an answer that is begun"),
    ],
)
def test_what_is_no_request_is_shown(tmp_path: Path, row: Any, told: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(DataError) as caught:
        read_dialogues(path)
    assert told in str(caught.value)


def test_a_row_of_any_depth_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.jsonl"
    for depth in range(800, 1000):  # Python's limit counts who calls, too
        path.write_text('{"prompt": "a", "x": ' + "[" * depth + "]" * depth + "}")
        with contextlib.suppress(DataError):
            assert read_dialogues(path) == [["a"]]


def test_a_suite_asks_nothing_that_the_target_should_write(tmp_path: Path) -> None:
    path = tmp_path / "null.jsonl"
    path.write_text('{"turns": [null, "hi"]}\n')
    assert read_dialogues(path) == [[None, "hi"]]
    with pytest.raises(DataError, match="null"):
        load_suite(str(path))


def test_arguments_that_are_no_json_stay_a_text() -> None:
    odd = {**CALL, "function": {"name": "look", "arguments": "{half"}}
    asked = as_messages([USER, {"role": "assistant", "content": "", "tool_calls": [odd]}])
    assert asked[1]["tool_calls"] == [odd]
