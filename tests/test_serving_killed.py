"""A real `ttspec serve` that is told to end while it loads, or killed while it learns."""

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from servers import complete, until
from toys import plain, toy_engine

from ttspec.learning.versions import numbers_in, read_version, stores_in

SERVE = """
import sys
from ttspec.cli import main
from ttspec.learning import keeper
keeper.SECONDS = 1.0  # not 60
sys.exit(main(["serve", *sys.argv[1:]]))
"""
OPTIONS = ("--port=0", "--rows=2", "--context=400", "--draft.no-adaptive", "--learn.scope=shared")

SAMPLED = {"seed": 5, "temperature": 0.7, "ignore_eos": True}


@contextmanager
def serving(pair: list[str], kept: Path) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A server in a process of its own, ready, and a client of it."""
    command = [sys.executable, "-c", SERVE, *pair, *OPTIONS, "--learn.lr=3e-3", "--learn.stride=2"]
    paths = os.pathsep.join(filter(None, sys.path))
    with subprocess.Popen(
        [*command, "--learn.blocks=4", f"--learn.keep={kept}"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        try:
            address = process.stdout.readline().split()[2]
            said = iter(process.stdout.readline, "")  # also of what a kill left half written
            assert any(line.startswith("Ready") for line in said)
            with httpx.Client(base_url=address, timeout=120) as client:
                yield process, client
        finally:
            process.kill()


def ask(client: httpx.Client, prompt: list[int]) -> dict[str, Any]:
    """An answer of 60 tokens, and in how many rounds it was written."""
    response = complete(client, prompt=prompt, max_tokens=60, return_token_ids=True, **SAMPLED)
    assert response.status_code == 200, response.text
    found = response.json()
    cached = found["usage"]["prompt_tokens_details"]["cached_tokens"]
    return {**found["choices"][0], **found["metrics"]["ttspec"], "cached": cached}


@contextmanager
def teaching(client: httpx.Client, prompt: list[int]) -> Iterator[None]:
    """One request after the other, until the server is gone."""

    def teach() -> None:
        with suppress(httpx.TransportError):
            while True:
                ask(client, prompt)

    thread = threading.Thread(target=teach)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def newest(kept: Path) -> int:
    """The number of the newest version that is there."""
    return max((number for store in stores_in(kept) for number in numbers_in(store)), default=0)


@pytest.mark.slow
def test_what_was_kept_outlives_kills_and_is_gone_on_from(toy_target_dir, pair, tmp_path) -> None:
    engine, rng, kept = toy_engine(toy_target_dir), random.Random(22), tmp_path / "kept"
    hello, more = engine.tokenizer.encode("hello"), engine.tokenizer.encode(" and then?")
    rounds, before = list[int](), 0
    for _ in range(3):
        with serving(pair, kept) as (process, client):
            first = ask(client, hello)
            rounds.append(first["rounds"])
            later = [*hello, *first["token_ids"], *more]
            second = ask(client, later)
            assert second["cached"] >= len(hello) + 59, "the conversation has come back"
            wanted = plain(engine, later, max_new_tokens=60, **SAMPLED)
            assert second["token_ids"] == wanted.token_ids
            with teaching(client, later):
                until(lambda n=before: newest(kept) > n, 120)
                time.sleep(rng.uniform(0, 1))  # in the middle of learning, perhaps of writing
                said = newest(kept)
                process.kill()
        (store,) = stores_in(kept)
        for number in numbers_in(store):  # whole, by its checksums
            read_version(store / f"{number:08}").delta()
        if before:
            parent = read_version(store / f"{before + 1:08}").manifest["parent"]
            assert parent == before, "it went on from the newest one"
        before = newest(kept)
        assert before >= said, "what was on the disk is there"
    assert max(rounds[1:]) < rounds[0], "it drafts with what was learned"


LOADING = """
import sys
import torch
import ttspec
from ttspec.cli import main

def load(*args, **options):
    while True:
        torch.ones(500, 500) @ torch.ones(500, 500)

ttspec.load = load
sys.exit(main(["serve", "--port=0"]))
"""


@pytest.mark.slow
def test_told_to_end_while_it_loads_it_exits_with_0() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LOADING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("Listening")
        process.terminate()
        assert process.wait(30) == 0
        assert "terminate called" not in process.stderr.read()
