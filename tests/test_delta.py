"""What was learned, as a file that a later session goes on from."""

import io
import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toys import complaint, make_drafter, make_kind, toy_engine, twin

from ttspec.cli import main
from ttspec.config import DraftConfig, LearnConfig
from ttspec.decoding.engine import Engine
from ttspec.decoding.history import ChatHistory
from ttspec.decoding.session import Session
from ttspec.errors import CheckpointError, OptionError, TtspecError
from ttspec.learning.delta import Delta, difference, read_delta, weights_sha256

FULL = LearnConfig(stride=1, lr=1e-2, scope="session", blocks=2, guard=0)
LORA = replace(FULL, weights="lora", rank=3)
LEARNS = {"full": FULL, "lora": LORA}
SAID = {
    "seed": 3,
    "temperature": 0.9,
    "max_new_tokens": 30,
    "context": 200,
    "ignore_eos": True,
    "draft": DraftConfig(copy=False),
}


@pytest.fixture(scope="module")
def target(toy_target_dir):
    return toy_engine(toy_target_dir).target


@pytest.fixture(scope="module")
def saved(target, tmp_path_factory) -> Callable[[str, str], tuple[Session, Path]]:
    """A session that has learned, and what it wrote; by kind of drafter and of learning."""
    known: dict[tuple[str, str], tuple[Session, Path]] = {}

    def make(which: str, how: str) -> tuple[Session, Path]:
        if (which, how) not in known:
            session = fresh(target, which).session(learn=LEARNS[how], **SAID)
            session.send("hello there")
            path = tmp_path_factory.mktemp("deltas") / "new" / f"{which}-{how}.safetensors"
            session.save(path)
            known[which, how] = session, path
        return known[which, how]

    return make


def fresh(target, which: str) -> Engine:
    return Engine(twin(target), make_kind(which))


def live(session: Session) -> dict[str, torch.Tensor]:
    """The weights that draft, after a turn in which nothing was learned any more."""
    return session.learned().weights


def first(session: Session, text: str = "and then?") -> list[tuple[int, int]]:
    """Rounds of a first answer, with learning going on."""
    return [(r.proposed, r.accepted) for r in session.send(text).rounds]


def begun(session: Session) -> dict[str, torch.Tensor]:
    """The live weights before the first round."""
    stream = session.stream("anything")
    next(stream)
    state = session._scheduler.decoder.state
    return {n: w.clone() for n, w in state.weights.items()}


# There and back.


@pytest.mark.parametrize("how", LEARNS)
@pytest.mark.parametrize("which", ["dflash", "eagle3", "causal"])
def test_a_resumed_session_drafts_with_the_bits_that_the_saved_one_had(
    target, saved, which: str, how: str
):
    session, path = saved(which, how)
    resumed = begun(fresh(target, which).session(resume=path, learn=LEARNS[how], **SAID))
    anchor, wanted = session.engine.drafter.weights, session._scheduler.decoder.state.weights
    assert resumed.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(resumed[name], weight), name
    moved = [
        n for n, w in resumed.items() if n not in anchor or not w.view(-1).equal(anchor[n].view(-1))
    ]
    assert len(moved) >= len(session._scheduler.decoder.learner.weights.anchor) > 3


@pytest.mark.parametrize("how", LEARNS)
def test_its_first_proposals_are_those_of_the_live_session(target, saved, how: str):
    """One question in a new conversation, drafted by what one learned and by what was saved."""
    _, path = saved("dflash", how)
    still = replace(LEARNS[how], stride=1000)
    session = fresh(target, "dflash").session(learn=LEARNS[how], **SAID)
    session.send("hello there")
    learner = session._scheduler.decoder.learner
    learner.config = still
    # A new conversation, what it knows.
    session._scheduler.decoder.rows.lengths[0] = session.conversation.turn = 0
    template = session.engine.chat_template(session.config)
    session._history, ids = ChatHistory(template), ChatHistory(template).ask("and then?")
    session.conversation.request = replace(session.conversation.request, ids=ids)
    session._scheduler.decoder.rows.tokens[0] = []
    resumed = fresh(target, "dflash").session(resume=path, learn=still, **SAID)
    static = fresh(target, "dflash").session(learn=None, **SAID)
    wanted = first(session)
    assert first(resumed) == wanted
    assert first(static) != wanted


def test_the_difference_of_weights_gives_them_back_bit_for_bit():
    old = torch.randn(1000) * 10.0 ** torch.arange(-5, 5).repeat(100)
    new = {"w": old + torch.randn(1000), "v": old * 1.5, "z": torch.full((1000,), 1e-9)}
    olds = dict.fromkeys(new, old)
    changes = difference(new, olds)
    assert "z.at" in changes, "no hard case was tried"
    assert "v.at" not in changes
    delta = Delta(path=Path(), drafter="", kind="", sha256="", learn="", changes=changes)
    back = delta.applied(olds)
    assert all(torch.equal(back[n], w) for n, w in new.items())


@pytest.mark.parametrize("how", LEARNS)
@pytest.mark.parametrize(
    "learn",
    [
        None,
        replace(FULL, parameters="last"),
        replace(LORA, rank=2),
        replace(LORA, parameters="last"),
        FULL,
    ],
    ids=["static", "full, last", "other rank", "other matrices", "full"],
)
def test_where_copies_cannot_begin_there_the_drafter_is_multiplied_out(
    target, saved, how: str, learn: LearnConfig | None
):
    session, path = saved("dflash", how)
    engine = fresh(target, "dflash")
    resumed = engine.session(resume=path, learn=learn, **SAID)
    stream = resumed.stream("anything")
    next(stream)
    found = resumed.learned().weights
    for name, weight in session.learned().weights.items():
        torch.testing.assert_close(found[name], weight, atol=1e-6, rtol=1e-5)
    kept = engine.drafter.weights
    assert all(torch.equal(w, make_kind("dflash").weights[n]) for n, w in kept.items())


@pytest.mark.parametrize("how", LEARNS)
def test_the_text_stays_that_of_plain_decoding(target, saved, how: str):
    _, path = saved("eagle3", how)
    options = {**SAID, "temperature": 0.7}
    plainly = {**options, "learn": None, "draft": DraftConfig(length=0)}
    plain = fresh(target, "eagle3").session(**plainly)
    wanted = plain.send("tell me").token_ids
    for learn in (LEARNS[how], None, FULL):
        session = fresh(target, "eagle3").session(resume=path, learn=learn, **options)
        assert session.send("tell me").token_ids == wanted


@pytest.mark.parametrize(("how", "learn"), [("full", FULL), ("lora", LORA), ("lora", FULL)])
def test_what_is_reset_begins_there_again_and_what_is_reverted_at_the_anchor(
    target, saved, how: str, learn: LearnConfig
):
    _, path = saved("dflash", how)
    session = fresh(target, "dflash").session(
        resume=path, learn=replace(learn, scope="request"), **SAID
    )
    start = begun(session)
    session.send("something to learn")
    moved = session._scheduler.decoder.state.weights
    assert any(not torch.equal(w, start[n]) for n, w in moved.items())
    next(session.stream("a second turn, which forgets the first"))
    assert all(torch.equal(w, start[n]) for n, w in moved.items())
    learner = session._scheduler.decoder.learner
    learner.revert(0)
    for name, weight in learner.weights.published.items():
        assert torch.equal(weight[0], learner.weights.anchor[name]), name


@pytest.mark.parametrize("how", LEARNS)
@pytest.mark.parametrize("learn", [LORA, replace(LORA, rank=2)], ids=["same", "multiplied out"])
def test_a_resumed_session_can_be_saved_again(target, saved, tmp_path, how: str, learn):
    _, path = saved("dflash", how)
    session = fresh(target, "dflash").session(resume=path, learn=learn, **SAID)
    session.send("more to learn")
    session.save(tmp_path / "second.safetensors")
    third = fresh(target, "dflash").session(
        resume=tmp_path / "second.safetensors", learn=None, **SAID
    )
    next(third.stream("anything"))
    for name, weight in session.learned().weights.items():
        torch.testing.assert_close(third.learned().weights[name], weight, atol=1e-6, rtol=1e-5)


def test_an_update_under_way_is_saved_too(target, tmp_path):
    learn = replace(FULL, stride=3, publish="stride")
    session = fresh(target, "dflash").session(learn=learn, **SAID)
    session.send("hello there")
    learner = session._scheduler.decoder.learner
    assert learner._pending is not None
    before = {n: w.clone() for n, w in session.learned().weights.items()}
    session.save(tmp_path / "d.safetensors")
    resumed = begun(
        fresh(target, "dflash").session(resume=tmp_path / "d.safetensors", learn=learn, **SAID)
    )
    after = session._scheduler.decoder.state.weights
    assert all(torch.equal(w, after[n]) for n, w in resumed.items())
    assert any(not torch.equal(w[0], before[n]) for n, w in learner.weights.published.items())


def test_the_file_says_what_it_is(saved):
    session, path = saved("dflash", "lora")
    with safe_open(path, framework="pt") as opened:
        about, names = opened.metadata(), set(opened.keys())
    matrices = session.engine.drafter.matrices("full")
    assert names == {n + end for n in matrices for end in (".down", ".up")}
    assert about["ttspec_delta"] == "1"
    assert (about["kind"], about["drafter"]) == ("dflash", "dflash")
    assert about["sha256"] == weights_sha256(session.engine.drafter.weights)
    assert LearnConfig(**json.loads(about["learn"])) == replace(LORA, beta1=0.0)
    assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_checksum_is_that_of_values_in_any_dtype_and_file():
    weights = make_kind("eagle3").weights
    narrow = {n: w.bfloat16() if w.is_floating_point() else w for n, w in weights.items()}
    assert weights_sha256(weights) == weights_sha256(narrow)
    for name in ("fc.weight", "d2t"):
        other = {**weights, name: weights[name].clone()}
        other[name].view(-1)[-1] += 1
        assert weights_sha256(other) != weights_sha256(weights), name


# What is refused.


def refused(kind: type[TtspecError], do: Callable) -> str:
    with pytest.raises(kind) as caught:
        do()
    assert len(str(caught.value).splitlines()) == 2
    return str(caught.value)


def test_a_change_of_another_drafter_is_refused(target, saved):
    _, path = saved("dflash", "lora")
    said = refused(CheckpointError, lambda: fresh(target, "eagle3").session(resume=path))
    assert "of kind eagle3" in said
    other = Engine(twin(target), make_kind("dflash", seed=1))
    assert "other weights" in refused(CheckpointError, lambda: other.session(resume=path))
    learned = saved("dflash", "full")[0].learned()  # its folder would be the anchor's
    other = Engine(twin(target), learned)
    assert "other weights" in refused(CheckpointError, lambda: other.session(resume=path))
    none = Engine(twin(target), None)
    assert "has none" in refused(OptionError, lambda: none.session(resume=path))


def test_a_shared_drafter_goes_on_from_nothing(target, saved):
    _, path = saved("dflash", "lora")
    engine = fresh(target, "dflash")
    learn = replace(LORA, scope="shared")
    assert "shared" in refused(OptionError, lambda: engine.session(resume=path, learn=learn))


def test_nothing_is_overwritten_and_nothing_is_saved_before_a_turn(target, saved, tmp_path):
    session, path = saved("dflash", "lora")
    whole = path.read_bytes()
    assert "nothing was written" in refused(OptionError, lambda: session.save(path))
    assert "nothing was written" in refused(
        OptionError,
        lambda: session.save((tmp_path / "f.safetensors", (tmp_path / "f.safetensors").mkdir())[0]),
    )
    assert path.read_bytes() == whole
    assert "does not end in" in refused(OptionError, lambda: session.save(tmp_path / "d.bin"))
    for learn in (LORA, None):
        new = fresh(target, "dflash").session(learn=learn, **SAID)
        if learn is None:
            new.send("hello")
        assert "nothing" in refused(
            OptionError, lambda new=new: new.save(tmp_path / "d.safetensors")
        )
    assert not (tmp_path / "d.safetensors").exists()


def changed(path: Path, to: Path, about: dict[str, str | None] | None = None, **tensors) -> Path:
    """A copy of a delta with some metadata and tensors replaced, or left out."""
    with safe_open(path, framework="pt") as opened:
        said = {**opened.metadata(), **(about or {})}
    kept = {**load_file(path), **{n.replace("__", "."): w for n, w in tensors.items()}}
    save_file(
        {n: w for n, w in kept.items() if w is not None},
        to,
        metadata={k: v for k, v in said.items() if v is not None},
    )
    return to


def damages(path: Path, to: Path) -> dict[str, tuple[Path, str]]:
    """Files that are no delta, and a word of why."""
    up = "layers.0.mlp.up_proj.up"
    name = {"wide": up.replace(".", "__"), "norm": "norm__weight"}
    for file, content in {
        "cut": path.read_bytes()[:-7],
        "empty": b"",
        "text": b"this is a text\n",
        "pickle": pickle.dumps({"a": 1}),
    }.items():
        (to / f"{file}.safetensors").write_bytes(content)
    torch.save({"a": torch.ones(1)}, to / "torch.safetensors")
    (to / "weights.pt").write_bytes(b"")
    own = load_file(path)
    return {
        "cut": (to / "cut.safetensors", "damaged"),
        "empty": (to / "empty.safetensors", "damaged"),
        "text": (to / "text.safetensors", "damaged"),
        "pickle": (to / "pickle.safetensors", "is a pickle"),
        "torch's pickle": (to / "torch.safetensors", "is a pickle"),
        "a pickle's name": (to / "weights.pt", "is a pickle"),
        "missing": (to / "nowhere.safetensors", "no such file"),
        "future": (changed(path, to / "1.safetensors", {"ttspec_delta": "2"}), "of format 2"),
        "a checkpoint": (changed(path, to / "2.safetensors", {"ttspec_delta": None}), "--drafter"),
        "no checksum": (changed(path, to / "3.safetensors", {"sha256": None}), "sha256"),
        "not finite": (
            changed(path, to / "4.safetensors", **{name["wide"]: own[up] * torch.inf}),
            up,
        ),
        "shape": (
            changed(path, to / "5.safetensors", **{name["wide"]: own[up].mT.contiguous()}),
            "layers.0.mlp.up_proj",
        ),
        "half": (changed(path, to / "6.safetensors", **{name["wide"]: None}), "has no place"),
        "stranger": (
            changed(path, to / "7.safetensors", stranger__weight=torch.ones(3)),
            "stranger.weight",
        ),
        "dtype": (changed(path, to / "8.safetensors", **{name["wide"]: own[up].half()}), up),
    }


def test_a_file_that_is_no_delta_is_refused(target, saved, tmp_path):
    _, path = saved("dflash", "lora")
    engine = fresh(target, "dflash")
    for what, (file, words) in damages(path, tmp_path).items():
        said = refused(CheckpointError, lambda file=file: engine.session(resume=file))
        assert words in said, what
        assert file.name in said, what


def test_places_outside_a_weight_are_refused(target, saved, tmp_path):
    _, path = saved("dflash", "full")
    bad = {
        "norm__weight__at": torch.tensor([64]),
        "norm__weight__exact": torch.tensor([1.0]),
    }
    file = changed(path, tmp_path / "d.safetensors", **bad)
    engine = fresh(target, "dflash")
    assert "norm.weight." in refused(CheckpointError, lambda: engine.session(resume=file))


# The commands.


def said(flags: list[str], command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand then?\n"))
    asked = [command, *(["hello"] if command == "generate" else []), *flags]
    return main([*asked, "--max-new-tokens", "12", "--seed", "1", "--ignore-eos"])


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_the_commands_save_a_change_and_go_on_from_it(
    pair, capsys, monkeypatch, tmp_path, command: str
):
    path = tmp_path / "d.safetensors"
    learn = ["--learn.stride", "1", "--learn.weights", "lora"]
    assert said([*pair, *learn], command, monkeypatch) == 0
    text = capsys.readouterr().out
    assert said([*pair, *learn, "--save-drafter", str(path)], command, monkeypatch) == 0
    out, err = capsys.readouterr()
    assert out == text
    assert f"--resume-drafter {path}" in err
    delta = read_delta(path)
    assert delta.drafter == pair[pair.index("--drafter") + 1]
    unnamed = [f for f in pair if f != "--drafter" and f != delta.drafter]  # the file names it
    for flags in ([*pair, *learn], [*unnamed, *learn], [*unnamed, "--no-learn"]):
        assert said([*flags, "--resume-drafter", str(path)], command, monkeypatch) == 0
        assert capsys.readouterr().out == text
    assert said([*pair, "--save-drafter", str(path)], command, monkeypatch) == 2
    assert "nothing was written" in complaint(capsys)[0]


def test_the_commands_refuse_what_contradicts(pair, capsys, monkeypatch, tmp_path, saved):
    folder = make_drafter(tmp_path / "d")
    at = pair.index("--drafter")
    unnamed = [*pair[:at], *pair[at + 2 :]]
    _, path = saved("dflash", "lora")
    (tmp_path / "p.pt").write_bytes(pickle.dumps(1))
    for flags, words in (
        ([*pair, "--resume-drafter", str(folder)], "is a folder"),
        ([*unnamed, "--drafter", "none", "--resume-drafter", str(path)], "--drafter none"),
        ([*pair, "--resume-drafter", str(path)], "other weights"),
        ([*unnamed, "--drafter", "ngram", "--resume-drafter", str(path)], "of kind ngram"),
        ([*pair, "--resume-drafter", str(tmp_path / "p.pt")], "is a pickle"),
        ([*pair, "--resume-drafter", str(tmp_path / "nowhere")], "no such file"),
    ):
        assert said(flags, "generate", monkeypatch) == 2, words
        assert words in complaint(capsys)[0], flags
