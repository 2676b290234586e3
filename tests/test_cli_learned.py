"""`ttspec learned` and `ttspec adapt` as a user meets them."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import complaint, full_disk, make_drafter

from ttspec import load
from ttspec.cli import adapt, main
from ttspec.learning.versions import VersionStore, stores_in

LEARN = ["--learn.stride", "2", "--learn.lr", "3e-3", "--learn.blocks", "4"]
SAYS = ["--max-new-tokens", "130", "--ignore-eos", "--dtype", "float32", "--temperature", "0.9"]


@pytest.fixture(scope="module")
def models(toy_target_dir, tmp_path_factory) -> list[str]:
    drafter = make_drafter(tmp_path_factory.mktemp("drafter"))
    return ["--target", str(toy_target_dir), "--drafter", str(drafter), "--device", "cpu"]


@pytest.fixture(scope="module")
def kept(models, tmp_path_factory) -> Path:
    """What `adapt` learned is in `kept`, and its traffic beside it."""
    work = tmp_path_factory.mktemp("work")
    lines = [{"prompt": "hello there"}, {"messages": [{"role": "user", "content": "count to ten"}]}]
    (work / "traffic.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    keep = ["--learn.keep", str(work / "kept")]
    assert main(["adapt", str(work / "traffic.jsonl"), *models, *LEARN, *SAYS, *keep]) == 0
    return work


def learned(*words: object) -> int:
    return main(["learned", *map(str, words)])


def test_what_was_adapted_is_exported_bit_for_bit(kept: Path, models, capsys, tmp_path) -> None:
    """The export of the version and the version itself are one drafter."""
    folder = kept / "kept"
    assert learned("export", folder, "--out", tmp_path / "float", "--dtype", "auto") == 0
    assert "--drafter" in capsys.readouterr().err
    exported = load(models[1], str(tmp_path / "float"), device="cpu", dtype="float32").drafter
    (store,) = stores_in(folder)
    delta = VersionStore(store).current()[1]
    anchor = load(models[1], models[3], device="cpu", dtype="float32").drafter
    changed = delta.applied(anchor.weights)
    assert len(changed) > 5
    for name, weight in changed.items():
        assert exported.weights[name].equal(weight), name
        assert not weight.equal(anchor.weights[name]), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_version_is_exported_in_any_dtype(kept: Path, models, capsys, tmp_path, dtype) -> None:
    assert learned("export", kept / "kept", "--out", tmp_path / "new", "--dtype", dtype) == 0
    assert "is not the target that" not in capsys.readouterr().err
    (store,) = stores_in(kept / "kept")
    delta = VersionStore(store).current()[1]
    anchor = load(models[1], models[3], device="cpu", dtype="float32").drafter
    exported = load_file(tmp_path / "new" / "model.safetensors")
    assert {weight.dtype for weight in exported.values()} == {getattr(torch, dtype)}
    written = load(models[1], str(tmp_path / "new"), device="cpu", dtype="float32").drafter
    for name, weight in delta.applied(anchor.weights).items():
        if dtype != "bfloat16":  # there the anchor is rounded first, as it was for who learned
            assert written.weights[name].equal(weight.to(getattr(torch, dtype)).float()), name


def test_prompts_without_room_for_an_answer_are_left_out_and_counted(
    models, capsys, tmp_path
) -> None:
    work = tmp_path / "traffic.jsonl"
    long, short = ({"prompt": text} for text in ("z" * 2000, "hello there"))
    given = [str(work), *models, *LEARN, *SAYS, "--learn.keep", str(tmp_path / "kept")]
    work.write_text("".join(json.dumps(line) + "\n" for line in (short, long, short)))
    assert main(["adapt", *given]) == 0
    told = capsys.readouterr().err
    assert f"1 of 3 prompts of {work} teach nothing: they leave no room for an answer in" in told
    assert len(stores_in(tmp_path / "kept")) == 1
    work.write_text(json.dumps(long) + "\n")
    assert main(["adapt", *given]) == 2
    assert f"All prompts of {work} leave no room" in complaint(capsys)[0]


def test_an_export_for_a_target_that_has_changed_says_so(
    kept: Path, toy_target_dir, capsys, tmp_path
) -> None:
    changed = Path(shutil.copytree(toy_target_dir, tmp_path / "changed"))
    weights = load_file(changed / "model.safetensors")
    weights["lm_head.weight"] *= 1.1
    save_file(weights, changed / "model.safetensors", metadata={"format": "pt"})
    for number, (target, is_same) in enumerate(((toy_target_dir, True), (changed, False))):
        out = ["--out", tmp_path / str(number), "--target", target]
        assert learned("export", kept / "kept", *out) == 0
        assert ("is not the target that" not in capsys.readouterr().err) == is_same


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


def test_a_folder_may_have_any_name(kept: Path, capsys, tmp_path) -> None:
    """Brackets and colons mean something to rich."""
    folder = shutil.copytree(kept / "kept", tmp_path / "k[/]e[bold]p:bug:t")
    assert learned("list", folder) == 0
    assert "k[/]e[bold]p:bug:t" in "".join(capsys.readouterr().out.split())


def test_an_answer_that_is_too_short_to_keep_anything_says_so(models, capsys, tmp_path) -> None:
    keep = ["--learn.scope", "shared", "--learn.keep", str(tmp_path), "--max-new-tokens", "4"]
    assert main(["generate", "hello", *models, *keep]) == 0
    assert "Nothing new is kept" in capsys.readouterr().err
    assert learned("list", tmp_path) == 2
    assert "has no versions yet" in complaint(capsys)[0]


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
        (["--learn.keep", "new", "--rows", "0"], '"0" for --rows'),
        (["--learn.keep", "new", "--learn.scope", "session"], "one drafter for all requests"),
        (["--learn.keep", "new", "--drafter", "none"], "needs a drafter with weights"),
    ],
)
def test_adapt_says_what_it_needs(kept: Path, models, words, reason, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pair = models[:2] if "--drafter" in words else models
    assert main(["adapt", str(kept / "traffic.jsonl"), *pair, *words]) == 2
    assert reason in complaint(capsys)[0]


def test_too_little_traffic_writes_nothing_and_fails(kept: Path, models, capsys, tmp_path) -> None:
    few = [*SAYS[2:], "--max-new-tokens", "8", "--learn.keep", str(tmp_path / "few")]
    assert main(["adapt", str(kept / "traffic.jsonl"), *models, *LEARN, *few]) == 1
    told = capsys.readouterr().err
    assert "nothing was written" in told
    assert "blocks of 5 drafts were held out, and 16 are" in told
    assert "not kept" in told
    assert stores_in(tmp_path / "few") == []


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


def test_offline_no_clock_makes_updates_rare(kept: Path, capsys) -> None:
    assert learned("list", kept / "kept", "--json") == 0
    updates = json.loads(capsys.readouterr().out)["updates"]
    assert updates >= 50, "130 tokens in two rows are more than 100 rounds, and the stride is 2"


def test_a_disk_that_takes_no_version_is_not_called_too_little_traffic(
    kept: Path, models, capsys, tmp_path
) -> None:
    keep = ["--learn.keep", str(tmp_path / "kept")]
    with full_disk():
        assert main(["adapt", str(kept / "traffic.jsonl"), *models, *LEARN, *SAYS, *keep]) == 1
    *_, error, what = capsys.readouterr().err.splitlines()
    assert f"What was learned could not be written to {tmp_path / 'kept'}, and is lost" in error
    assert "--learn.keep" in what


def test_a_signal_to_end_keeps_what_was_learned(
    kept: Path, models, capsys, tmp_path, monkeypatch
) -> None:
    lines = [json.dumps({"prompt": f"count to {n}"}) for n in range(40)]
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    answers = adapt._new_answers

    def ended_by_a_signal(*given: object) -> Iterator[object]:
        for count, result in enumerate(answers(*given), 1):
            yield result
            if count == 8:
                os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(adapt, "_new_answers", ended_by_a_signal)
    keep = ["--learn.keep", str(tmp_path / "kept"), "--rows", "4"]
    before = signal.getsignal(signal.SIGTERM)
    assert main(["adapt", str(tmp_path / "many.jsonl"), *models, *LEARN, *SAYS, *keep]) == 130
    assert signal.getsignal(signal.SIGTERM) is before
    assert "makes a drafter of it" in capsys.readouterr().err
    assert len(stores_in(tmp_path / "kept")) == 1
