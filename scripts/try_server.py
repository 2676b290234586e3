"""Use a running `ttspec serve` as others would: OpenAI's own client, and curl.

    ttspec serve --dtype float32 --port 8000
    python scripts/try_server.py --url http://127.0.0.1:8000

Needs openai and jsonschema. `--schemas 200` asks for so many answers of generated JSON schemas.
`--same` compares answers with `ttspec generate` (float32, the target's own pair). Exits with 1 when
anything is not as it should be.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import openai

MESSAGES: Any = [{"role": "user", "content": "Name two rivers and a mountain."}]


def streams(client: openai.OpenAI, model: str) -> None:
    """A stream has the text of the whole answer, and its usage."""
    options: Any = {"model": model, "messages": MESSAGES, "max_tokens": 24, "seed": 4}
    whole = client.chat.completions.create(**options)
    stream = client.chat.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content, (text, whole)
    last = chunks[-1].usage
    assert last
    assert whole.usage
    assert last.total_tokens == whole.usage.total_tokens


def choices_and_seeds(client: openai.OpenAI, model: str) -> None:
    """One seed, one text; the first of many choices is that of a single one."""
    options: Any = {"model": model, "messages": MESSAGES, "max_tokens": 16, "temperature": 0.9}
    one = client.chat.completions.create(**options, seed=1)
    many = client.chat.completions.create(**options, seed=1, n=3)
    other = client.chat.completions.create(**options, seed=2)
    texts = [choice.message.content for choice in many.choices]
    assert texts[0] == one.choices[0].message.content
    assert len(set(texts)) > 1
    assert other.choices[0].message.content != texts[0]


def refusals(client: openai.OpenAI, model: str) -> None:
    """Its errors are those that the client knows."""
    for options, error in (
        ({"model": "nothing"}, openai.NotFoundError),
        ({"temperature": 9.0}, openai.BadRequestError),
        ({"extra_body": {"echo": True}}, openai.BadRequestError),
    ):
        given: Any = {"model": model, "messages": MESSAGES, "max_tokens": 2, **options}
        try:
            client.chat.completions.create(**given)
        except error:
            continue
        raise AssertionError(f"{options} was not refused")


def completions(client: openai.OpenAI, model: str) -> None:
    """Texts and tokens as prompts; a stop text is left out."""
    found = client.completions.create(model=model, prompt=["1, 2, 3,", "a, b,"], max_tokens=8)
    assert [choice.index for choice in found.choices] == [0, 1]
    stopped = client.completions.create(model=model, prompt="1, 2, 3,", max_tokens=8, stop=",")
    assert "," not in stopped.choices[0].text


def curl(client: openai.OpenAI, model: str) -> None:
    """The line of the documentation."""
    url = f"{client.base_url}chat/completions"
    body = json.dumps({"model": model, "messages": MESSAGES, "max_tokens": 8})
    headers = ["-H", "Content-Type: application/json"]
    headers += ["-H", f"Authorization: Bearer {client.api_key}"]
    command = ["curl", "-sSf", url, *headers, "-d", body]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]


def same_as_generate(client: openai.OpenAI, model: str) -> None:
    """Tokens are those of `ttspec generate`, greedy and sampled."""
    for seed, temperature in ((1, 0.0), (2, 0.8), (3, 1.2)):
        command = [sys.executable, "-m", "ttspec.cli", "generate", MESSAGES[0]["content"], "--json"]
        command += ["--dtype", "float32", "--max-new-tokens", "32", "--seed", str(seed)]
        command += ["--temperature", str(temperature)]
        alone = subprocess.run(command, capture_output=True, text=True, check=True)
        found: Any = client.chat.completions.create(
            model=model,
            messages=MESSAGES,
            max_tokens=32,
            seed=seed,
            temperature=temperature,
            extra_body={"return_token_ids": True},
        )
        assert found.choices[0].token_ids == json.loads(alone.stdout)["token_ids"], (seed, alone)


def schemas(client: openai.OpenAI, model: str, count: int) -> dict[str, int]:
    """Answers to generated schemas are JSON of them, unless the limit cut them."""
    import jsonschema

    rng, counts = random.Random(0), {"valid": 0, "cut by the limit": 0}
    for number in range(count):
        schema = a_schema(rng)
        form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        found = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": f"Fill in: {json.dumps(schema)[:160]}"}],
            max_tokens=160,
            seed=number,
            temperature=1.0,
            response_format=form,
        )
        choice = found.choices[0]
        if choice.finish_reason == "length":
            counts["cut by the limit"] += 1
            continue
        jsonschema.validate(json.loads(choice.message.content or ""), schema)
        counts["valid"] += 1
    return counts


def a_schema(rng: random.Random) -> dict[str, Any]:
    """An object of one to three fields."""
    names = rng.sample(["name", "age", "tags", "city", "size", "on"], rng.randint(1, 3))
    required = rng.sample(names, rng.randint(1, len(names)))
    fields = {name: a_value(rng, 1) for name in names}
    schema: dict[str, Any] = {"type": "object", "properties": fields, "required": required}
    return schema | {"additionalProperties": False}


def a_value(rng: random.Random, depth: int) -> dict[str, Any]:
    """A schema of a value; the deeper, the simpler."""
    kinds: list[Callable[[], dict[str, Any]]] = [
        lambda: {"type": "string", "maxLength": rng.randint(1, 12)},
        lambda: {"type": "integer", "minimum": 0, "maximum": rng.randint(1, 5000)},
        lambda: {"type": "boolean"},
        lambda: {"enum": rng.sample(["red", "green", 1, 2.5, None, True], rng.randint(1, 4))},
        lambda: {"type": "string", "pattern": rng.choice(["^[a-z]{2,5}$", r"^\d{3}-\d{4}$"])},
    ]
    if depth < 3:
        kinds += [
            lambda: {"type": "array", "items": a_value(rng, depth + 1), "maxItems": 3},
            lambda: {"anyOf": [a_value(rng, depth + 1), a_value(rng, depth + 1)]},
            lambda: {
                "type": "object",
                "properties": {"x": a_value(rng, depth + 1)},
                "additionalProperties": False,
            },
        ]
    return rng.choice(kinds)()


def main() -> int:
    """Try everything; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", default="none")
    parser.add_argument("--schemas", type=int, default=0)
    parser.add_argument("--same", action="store_true")
    given = parser.parse_args()
    client = openai.OpenAI(base_url=f"{given.url}/v1", api_key=given.key, max_retries=0)
    model = client.models.list().data[0].id
    tries = [streams, choices_and_seeds, refusals, completions, curl]
    failed = 0
    for attempt in tries + [same_as_generate] * given.same:
        try:
            attempt(client, model)
        except Exception as error:
            failed += 1
            print(f"FAILED {attempt.__name__}: {error!r}")
        else:
            print(f"ok     {attempt.__name__}")
    if given.schemas:
        print("schemas:", schemas(client, model, given.schemas))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
