"""`ttspec learned` and `ttspec adapt` as a user meets them."""

import json
from pathlib import Path

import pytest
import torch
from toys import complaint, make_drafter

from ttspec import load
from ttspec.cli import main
from ttspec.learning.versions import VersionStore, stores_in

LEARN = ["--learn.stride", "2", "--learn.lr", "3e-3", "--learn.blocks", "4"]
SAYS = ["--max-new-tokens", "130", "--ignore-eos", "--dtype", "float32", "--temperature", "0.9"]


@pytest.fixture(scope="module")
def models(toy_target_dir, tmp_path_factory) -> list[str]:
    drafter = make_drafter(tmp_path_factory.mktemp("drafter"))
    return ["--target", str(toy_target_dir), "--drafter", str(drafter), "--device", "cpu"]


@pytest.fixture(scope="module")
def kept(models, tmp_path_factory) -> Path:
    """A folder that `adapt` wrote a version into, and the drafter beside it."""
    work = tmp_path_factory.mktemp("work")
    lines = [{"prompt": "hello there"}, {"messages": [{"role": "user", "content": "count to ten"}]}]
    (work / "traffic.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = ["--out", str(work / "out"), "--learn.keep", str(work / "kept")]
    assert main(["adapt", str(work / "traffic.jsonl"), *models, *LEARN, *SAYS, *out]) == 0
    return work


def learned(*words: object) -> int:
    return main(["learned", *map(str, words)])


def test_what_was_adapted_is_exported_bit_for_bit(kept: Path, models, capsys, tmp_path) -> None:
    """The folder of `adapt`, the export of the version and the version itself are one drafter."""
    folder = kept / "kept"
    assert learned("export", folder, "--out", tmp_path / "float", "--dtype", "auto") == 0
    assert "--drafter" in capsys.readouterr().err
    exported = load(models[1], str(tmp_path / "float"), device="cpu", dtype="float32").drafter
    (store,) = stores_in(folder)
    delta = VersionStore(store).current()[1]
    anchor = load(models[1], models[3], device="cpu", dtype="float32").drafter
    changed, adapted = delta.applied(anchor.weights), load(models[1], str(kept / "out"))
    assert len(changed) > 5
    for name, weight in changed.items():
        assert exported.weights[name].equal(weight), name
        assert not weight.equal(anchor.weights[name]), name
        rounded = adapted.drafter.weights[name].to(torch.bfloat16)
        assert rounded.equal(weight.to(torch.bfloat16)), name


def test_versions_are_listed_shown_and_reverted(kept: Path, capsys) -> None:
    folder = kept / "kept"
    assert learned("list", folder, "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["number"] == 1
    assert listed["current"] is True
    accepted = listed["held_out"]["accepted"]
    assert accepted["version"] >= accepted["anchor"]
    assert learned("show", folder) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["learn"]["stride"] == 2
    assert "keep" not in shown["learn"] or shown["learn"]["keep"] is None
    assert learned("list", folder) == 0
    assert "1 *" in capsys.readouterr().out
    assert learned("revert", folder, "--to", "anchor") == 0
    assert learned("list", folder) == 0
    told = capsys.readouterr()
    assert "own weights draft next" in told.out
    assert "1 *" not in told.out
    assert learned("show", folder) == 2
    assert learned("show", folder, "--version", "1") == 0
    assert learned("revert", folder, "--to", "1") == 0
    capsys.readouterr()
    assert learned("show", folder) == 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["list", "nowhere"], "There is no folder nowhere"),
        (["list", "."], "has no versions"),
        (["show", "KEPT", "--version", "7"], "has no version 7"),
        (["revert", "KEPT", "--to", "7"], "has no version 7"),
        (["revert", "KEPT", "--to", "soon"], "allowed are a version's number and anchor"),
        (["export", "KEPT", "--out", "KEPT"], "is not empty"),
        (["show", "KEPT", "--tenant", "acme"], "has no versions of tenant 'acme'"),
    ],
)
def test_nonsense_is_answered(kept: Path, words, reason, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = [str(kept / "kept") if word == "KEPT" else word for word in words]
    assert learned(*given) == 2
    assert reason in complaint(capsys)[0]


def test_of_several_tenants_one_must_be_named(kept: Path, models, capsys, tmp_path) -> None:
    from shutil import copytree

    folder = tmp_path / "kept"
    copytree(kept / "kept", folder)
    (store,) = stores_in(folder)
    copytree(store, store.with_name("tenant-acme"))
    assert learned("show", folder) == 2
    assert "--tenant" in complaint(capsys)[1]
    assert learned("show", store.with_name("tenant-acme")) == 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--rows", "2"], "adapt would keep nothing"),
        (["--out", "new", "--rows", "0"], "--rows is 0"),
        (["--out", "new", "--learn.scope", "session"], "one drafter for all requests"),
        (["--out", "new", "--drafter", "none"], "needs a drafter with weights"),
    ],
)
def test_adapt_says_what_it_needs(kept: Path, models, words, reason, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair = models[:2] if "--drafter" in words else models
    assert main(["adapt", str(kept / "traffic.jsonl"), *pair, *words]) == 2
    assert reason in complaint(capsys)[0]


def test_too_little_traffic_writes_nothing_and_fails(kept: Path, models, capsys, tmp_path) -> None:
    few = [*SAYS[2:], "--max-new-tokens", "8", "--out", str(tmp_path / "out")]
    assert main(["adapt", str(kept / "traffic.jsonl"), *models, *LEARN, *few]) == 1
    assert "nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_text_of_a_run_is_read_and_not_written_again(kept: Path, models, capsys, tmp_path):
    run = [
        "bench",
        "run",
        "--suite",
        str(kept / "traffic.jsonl"),
        "--arms",
        "plain",
        "--ignore-eos",
    ]
    run += ["--max-new-tokens", "130", "--dtype", "float32", "--out", str(tmp_path / "run")]
    assert main([*run, *models]) == 0
    words = [*models, *LEARN, "--dtype", "float32", "--learn.keep", str(tmp_path / "kept")]
    assert main(["adapt", str(tmp_path / "run"), *words]) == 0
    assert "recorded tokens are what the target draws" in capsys.readouterr().err
    assert len(stores_in(tmp_path / "kept")) == 1
