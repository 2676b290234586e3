"""What a server's requests taught is kept when it ends: each tenant's in a folder of its own."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from servers import running, until
from toys import make_kind, toy_engine, twin

from ttspec.config import GenerateConfig, LearnConfig
from ttspec.decoding.decoder import Decoder
from ttspec.decoding.engine import Engine
from ttspec.errors import ResourceError
from ttspec.learning.learner import Learner
from ttspec.learning.live_weights import LiveWeights
from ttspec.learning.versions import VersionStore, current_of, numbers_in, stores_in
from ttspec.serving.keys import add_key
from ttspec.serving.options import ServeOptions
from ttspec.serving.server import make_server


@pytest.fixture(scope="module")
def engine(toy_target_dir: Path) -> Engine:
    return Engine(twin(toy_engine(toy_target_dir).target), make_kind("dflash"))


def shared(folder: Path | None) -> LearnConfig:
    keep = None if folder is None else str(folder)
    return LearnConfig(scope="shared", stride=2, lr=3e-3, blocks=4, keep=keep)


def ask(client: httpx.Client, tokens: int, **body: Any) -> dict[str, Any]:
    asked = {"prompt": "hello there", "max_tokens": tokens, "seed": 5, "temperature": 0.9}
    response = client.post("/v1/completions", json={**asked, "return_token_ids": True, **body})
    assert response.status_code == 200, response.text
    found = response.json()
    told = found["metrics"]["ttspec"] if found["metrics"] else {}  # of a single answer only
    return {"ids": found["choices"][0]["token_ids"], **told}


def test_each_tenant_s_is_kept_apart_and_gone_on_from(engine, tmp_path, caplog) -> None:
    caplog.set_level("INFO", "ttspec.serving")
    path, kept = tmp_path / "keys", tmp_path / "kept"
    keys = {name: add_key(path, name) for name in ("alice", "bob", "carol")}
    first: dict[str, Any] = {}
    with running(engine, shared(kept), api_key_file=path) as (client, _):
        for name in ("alice", "bob", "alice"):
            client.headers["Authorization"] = f"Bearer {keys[name]}"
            told = ask(client, 140 if name == "alice" else 20)
            first.setdefault(name, told)
        (pair,) = kept.iterdir()
        theirs = VersionStore(pair / "tenant-carol")  # another process has it
        client.headers["Authorization"] = f"Bearer {keys['carol']}"
        response = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "no_room")
        assert str(tmp_path) not in response.text
        theirs.close()
    folders = {folder.name: numbers_in(folder) for folder in stores_in(kept)}
    assert folders == {"tenant-alice": [1]}, "of bob there was too little to judge"
    with running(engine, shared(kept), api_key_file=path) as (client, _):
        for name, wanted in (("bob", first["bob"]["rounds"]), ("alice", None)):
            client.headers["Authorization"] = f"Bearer {keys[name]}"
            told = ask(client, 20)
            assert told["ids"] == first["bob"]["ids"], "one seed, one text"
            if wanted:
                assert told["rounds"] == wanted, "bob drafts as on his first day"
            else:
                assert told["rounds"] < first["bob"]["rounds"], "alice's drafter knows this text"
    made = [record.fields for record in caplog.records if record.event == "rows"]
    assert {told["tenant"]: told["version"] for told in made[-2:]} == {"alice": 1, "bob": 0}


def test_an_update_of_one_drafter_is_counted_once_however_many_rows_it_taught(
    engine, tmp_path
) -> None:
    with running(engine, shared(tmp_path)) as (client, _):
        for _ in range(2):
            ask(client, 140, n=2)
        counted = client.get("/metrics").text.partition("\nttspec:learn_updates_total{")[2]
    (store,) = stores_in(tmp_path)
    made = current_of(store).manifest["updates"]  # type: ignore[union-attr]
    assert float(counted.split()[1]) == made > 10


@pytest.mark.parametrize("scope", ["shared", "request"])
def test_a_revert_is_counted_once_however_many_answers_met_it(engine, scope, monkeypatch) -> None:
    reverts, revert = [], Learner.revert
    monkeypatch.setattr(Learner, "revert", lambda *given: reverts.append(revert(*given)))
    never = torch.zeros(2, dtype=torch.bool)  # as if no gradient were finite
    monkeypatch.setattr(LiveWeights, "may_step", lambda live, _: never[: len(live.resting)])
    with running(engine, LearnConfig(scope=scope, stride=8, guard=0, publish="now")) as (client, _):
        for _ in range(2):
            ask(client, 140, n=2)
        counted = client.get("/metrics").text.partition("\nttspec:learn_reverts_total{")[2]
    assert float(counted.split()[1]) == len(reverts) > 1


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize(
    ("learn", "who"),
    [
        (None, "Nothing is learned."),
        (LearnConfig(), "Each request teaches a drafter of its own."),
        (LearnConfig(scope="session"), "Each conversation teaches a drafter of its own."),
        (shared(None), "All requests teach one drafter, which ends with the server."),
        (shared(Path("FOLDER")), "All requests teach one drafter, kept in FOLDER."),
    ],
)
def test_a_server_says_who_learns(engine, tmp_path, monkeypatch, learn, who, keys) -> None:
    monkeypatch.chdir(tmp_path)
    add_key(path := tmp_path / "keys", "alice")
    said: list[str] = []
    with running(engine, learn, said.append, api_key_file=path if keys else None):
        until(lambda: len(said) == 2)
    who = who.replace("requests", "requests of a tenant") if keys else who
    assert f" tokens. {who} To chat: " in said[1]


def test_without_keys_all_share_and_a_fault_loses_nothing(engine, tmp_path, monkeypatch) -> None:
    real, broken = Decoder.round, []

    def fails_once(decoder: Decoder, **options: Any) -> Any:
        if len(broken) == 1:
            broken.append(None)
            raise RuntimeError("the machine did something")
        return real(decoder, **options)

    monkeypatch.setattr(Decoder, "round", fails_once)
    with running(engine, shared(tmp_path)) as (client, _):
        before = ask(client, 140)
        ask(client, 140)  # enough to judge by
        broken.append(None)
        with pytest.raises(AssertionError, match="round_failed"):
            ask(client, 5)
        until(lambda: stores_in(tmp_path))
        (store,) = stores_in(tmp_path)
        assert (store.name, numbers_in(store)) == ("everyone", [1])
        after = ask(client, 140)
    assert after["ids"] == before["ids"]
    assert after["rounds"] < before["rounds"]


def test_a_server_that_lost_what_it_learned_does_not_exit_with_0(engine, monkeypatch) -> None:
    monkeypatch.setattr(Engine, "close", lambda _: False)
    config = GenerateConfig(context=300, max_new_tokens=1, learn=shared(None))
    options = ServeOptions(port=0, rows=1, context=300)
    server = make_server(engine.sibling, config, options, "toy", lambda _: None)
    with ThreadPoolExecutor(1) as thread:
        ended = thread.submit(server.run_to_the_end)
        until(lambda: server.worker.state == "ready")
        server.should_exit = True
        with pytest.raises(ResourceError, match="could not be written"):
            ended.result(30)
