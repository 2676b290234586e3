"""The commands as a user meets them: what they print, where, and how they exit."""

import errno
import gc
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toys import complaint, make_drafter

from ttspec.cli import COMMANDS, main, terminal
from ttspec.cli.options import DraftFlags, LearnFlags, SessionLearnFlags
from ttspec.cli.terminal import follow, low_acceptance, summary
from ttspec.config import DraftConfig, LearnConfig
from ttspec.errors import OptionError, require_writable
from ttspec.records import Chunk, Result, Round, summarise

# Help, versions and wrong arguments


def test_help_of_every_command_imports_no_heavy_library() -> None:
    script = """
import sys
from ttspec.cli import COMMANDS, main, terminal
for command in [[], *([name] for name in COMMANDS if name != "train")]:
    assert main([*command, "--help"]) == 0
assert main(["--version"]) == 0
heavy = {"torch", "transformers", "matplotlib", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for option in ("--learn.stride", "--draft.window", "--max-new-tokens", "--no-learn", "--json"):
        assert option in done.stdout
    assert "None" not in done.stdout  # nobody can type it


def test_the_first_page_of_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["generate"],
        ["generate", "hi", "there"],
        ["generate", "hi", "--dtype", "float63"],
        ["generate", "hi", "--max-new-tokens", "many"],
        ["generate", "hi", "--learn.strid", "2"],
        ["generate", "hi", "--learn.supervision", "all"],
        ["generate", "--nonsense"],
        ["generate", "hi", "--temperature", "-1"],
        ["generate", "hi", "--top-p", "1.5"],
        ["generate", "hi", "--max-new-tokens", "0"],
        ["generate", "hi", "--seed", "-1"],
        ["generate", "hi", "--stop", ""],
        ["generate", "hi", "--draft.length", "-1"],
        ["generate", "hi", "--learn.lr", "0"],
        ["generate", "hi", "--no-learn", "--learn.lr", "1e-4"],
        ["generate", "hi", "--threads", "0"],
        ["generate", "hi", "--threads", "100000"],
        ["generate", "hi", "--max-new-tokens", "1.5"],
        ["generate", "hi", "--suppress-tokens", "1.0"],
        ["bench", "run", "--out", "o", "--rows", "1.5"],
        ["chat", "--learn.stride", "0x10"],
        ["train", "--prompts", "p", "--out", "o", "--minutes", "nan"],
        ["train", "--prompts", "p", "--out", "o", "--lr", "-1"],
        ["train", "--prompts", "p", "--out", "o", "--block", "1"],
        ["train", "--prompts", "p", "--out", "o", "--temperature", "-1"],
        ["train", "--prompts", "p", "--out", "o", "--seed", "-5"],
        ["bench", "run", "--out", "o", "--arms", "learn[group=1]"],
        ["chat", "--temperature", "nan"],
        ["check", "--max-new-tokens", "0"],
        ["demo", "--tokens", "0"],
        ["demo", "--seed", "-1"],
    ],
    ids=" ".join,
)
def test_wrong_arguments_exit_with_2_in_two_lines(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    lines = complaint(capsys)
    assert 1 <= len(lines) <= 2
    assert lines[0].startswith("ttspec: error: ")


def test_a_typing_mistake_is_answered_with_the_right_name(capsys) -> None:
    assert main(["generate", "hi", "--learn.strid", "2"]) == 2
    first, second = complaint(capsys)
    assert "--learn.stride" in first
    assert second == "Try: ttspec generate --help"


def test_a_prompt_without_quotes_and_a_second_value_are_told_with_what_to_do(capsys) -> None:
    assert main(["generate", "why", "is", "it", "so"]) == 2
    first, second = complaint(capsys)
    assert "'is it so' was given" in first
    assert "in quotes" in second
    assert main(["generate", "why", "--stop", "A", "B"]) == 2
    assert "--stop A --stop B" in complaint(capsys)[1]


def test_help_says_how_flags_are_written_and_what_it_shows_is_understood(
    pair: list[str], capsys
) -> None:
    assert main(["generate", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    shown = ["--logit-bias.198=-5", "--logit-bias", '{"198": -5, "13": 2}']
    assert " or ".join((shown[0], f"{shown[1]} '{shown[2]}'")) in out
    assert "as in 11,12,198" in out
    for words in (shown[:1], shown[1:], ["--bad-words-ids", "11,12,198"]):
        assert main(["generate", "hi", *pair, "--max-new-tokens", "4", *words]) == 0


def test_a_number_that_is_not_whole_is_told_with_the_flag_and_what_is_allowed(capsys) -> None:
    assert main(["bench", "run", "--out", "o", "--rows", "1.5"]) == 2
    first, second = complaint(capsys)
    assert first.endswith("--rows: '1.5' was given; allowed is a whole number.")
    assert second == "Try: ttspec bench run --help"
    assert main(["generate", "hi", "--temperature", "hot"]) == 2
    assert complaint(capsys)[0].endswith("--temperature: 'hot' was given; allowed is a number.")
    assert main(["generate", "hi", "--logit-bias.a=5"]) == 2
    assert "names 'a', which is no number of a token." in complaint(capsys)[0]


def test_help_says_for_each_command_who_learns_by_default(capsys) -> None:
    """Where a server or `adapt` would be said to learn from each request, it is not so."""
    default = {"generate": "[default: request]", "chat": "[default: session]"}
    default |= {"serve": "left out, it is shared", "adapt": None}
    for command, wanted in default.items():
        assert main([command, "--help"]) == 0
        shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
        _, found, scope = shown.partition("--learn.scope")
        assert bool(found) == bool(wanted)
        about = scope.partition("--learn.guard")[0].lower()
        assert (wanted or "") in about
        assert wanted == default["generate"] or "default: request" not in about


# Wrong inputs


def test_commands_leave_what_was_loaded_out_of_full_collections(pair: list[str]) -> None:
    """Else each would hold up all rows, by half a second with a real model."""
    gc.unfreeze()
    assert main(["generate", "hello", *pair, "--max-new-tokens", "4"]) == 0
    assert gc.get_freeze_count() > 10_000
    gc.unfreeze()


def run_with(target: object, drafter: object) -> int:
    return main(["generate", "hi", "--target", str(target), "--drafter", str(drafter)])


def test_a_missing_target_or_drafter_is_a_wrong_input(toy_target_dir, tmp_path, capsys) -> None:
    assert run_with(tmp_path / "nowhere", "none") == 2
    assert len(complaint(capsys)) <= 2
    assert run_with(toy_target_dir, tmp_path / "nowhere") == 2
    assert len(complaint(capsys)) <= 2


def test_a_pickle_is_refused(toy_target_dir, tmp_path, capsys) -> None:
    folder = make_drafter(tmp_path / "d")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    assert run_with(toy_target_dir, folder) == 2
    lines = complaint(capsys)
    assert "pytorch_model.bin" in lines[0]
    assert len(lines) == 2


def test_standard_input_that_is_no_text_is_refused(pair, capsys, monkeypatch) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"\xff\xfe\xff"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["generate", "-", *pair]) == 2
    assert "UTF-8" in complaint(capsys)[0]


@pytest.mark.parametrize(
    "command",
    [
        ["demo", "--tokens", "8", "--out"],
        ["generate", "hello", "--max-new-tokens", "12", "--save-drafter"],
    ],
    ids=["demo", "folder"],
)
def test_a_full_disk_is_a_failed_job(command: list[str], pair, capsys, tmp_path) -> None:
    """The disk is real: the system lets no file of this process grow beyond a size."""
    place = tmp_path / "new"
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        assert main([*command, str(place), *pair]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err.splitlines()
    assert said[-2].startswith(f"ttspec: error: {place}")
    assert ": File too large" in said[-2]
    assert said[-1].startswith("Make room")


@pytest.mark.parametrize("command", [["demo"], ["bench", "run", "--arms", "plain"]])
def test_a_file_where_a_folder_belongs_is_a_wrong_input(command, pair, capsys, tmp_path) -> None:
    (tmp_path / "taken").touch()
    assert main([*command, "--out", str(tmp_path / "taken"), *pair]) == 2
    assert capsys.readouterr().err.endswith("File exists\nName a folder; this is a file.\n")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert main([*command, "--out", str(tmp_path / "link"), *pair]) == 2
    assert capsys.readouterr().err.endswith("this is a link that leads to no folder.\n")


@pytest.mark.parametrize(
    "command",
    [
        ["chat", "--save-drafter", "taken/new"],
        ["generate", "hi", "--save-drafter", "taken/new"],
        ["bench", "run", "--out", "taken/new"],
        ["export", "nowhere", "--out", "taken/new"],
    ],
)
def test_a_place_that_takes_nothing_is_told_before_the_work(
    command, capsys, monkeypatch, tmp_path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    assert main([*command, "--target", "./nowhere"]) == 2
    assert complaint(capsys)[0] == f"ttspec: error: {tmp_path / 'taken'}: File exists"


def test_a_folder_that_is_closed_to_this_user_takes_nothing(tmp_path, monkeypatch) -> None:
    require_writable(tmp_path / "not" / "there" / "yet")
    monkeypatch.setattr(os, "access", lambda *_: False)  # who may do all may write anywhere
    with pytest.raises(PermissionError, match=re.escape(str(tmp_path))):
        require_writable(tmp_path / "new")


def test_a_place_where_nothing_may_be_written_is_told(pair, capsys, monkeypatch, tmp_path) -> None:
    def shut(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "rounds.jsonl")

    monkeypatch.setattr("ttspec.bench.store.write_run", shut)
    assert main(["demo", *pair, "--tokens", "8", "--out", str(tmp_path)]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "ttspec: error: rounds.jsonl: Read-only file system"
    assert second == "Allow writing there, or name another place."


def test_a_drafter_that_is_nowhere_is_told_with_those_that_are(pair, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    _, target, *_ = pair
    assert main(["generate", "hi", "--target", target, "--drafter", "smollm2-135m-eagle"]) != 0
    assert "smollm2-135m-eagle3" in complaint(capsys)[-1]


# generate


def test_generate_prints_the_answer_and_nothing_else(pair, capsys) -> None:
    assert main(["generate", "hello", *pair, "--max-new-tokens", "12"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("\n")
    assert err == ""


def test_json_is_one_object_with_the_names_of_the_design_page(pair, capsys) -> None:
    options = ["--max-new-tokens", "24", "--seed", "3", "--temperature", "0.7", "--ignore-eos"]
    assert main(["generate", "hello", *pair, *options, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    answer = json.loads(out)
    assert set(answer) == {"text", "token_ids", "finish_reason", "stats"}
    assert answer["finish_reason"] == "length"
    assert len(answer["token_ids"]) == 24
    stats = answer["stats"]
    assert set(stats) == {
        "seed", "prompt_tokens", "emitted_tokens", "rounds", "acceptance_length", "accepted_at",
        "updates", "reverts", "seconds", "tokens_per_second", "seconds_in", "by_position",
        "repeated_8grams", "copied_rounds", "copied_tokens", "plain_rounds", "draft_lengths",
        "thinking", "reread_tokens",
    }  # fmt: skip
    assert stats["seed"] == 3
    assert set(stats["seconds_in"]) == {"draft", "verify", "learn"}
    assert set(stats["by_position"][0]) == {"from", "to", "rounds", "acceptance_length"}
    assert stats["updates"] > 0


def test_the_streamed_text_is_the_text_of_the_json(pair, capsys) -> None:
    options = ["generate", "hello", *pair, "--max-new-tokens", "40", "--ignore-eos"]
    assert main(options) == 0
    streamed = capsys.readouterr().out
    assert main([*options, "--json", "--no-learn"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] + "\n" == streamed


def test_a_dash_reads_standard_input(pair, capsys, monkeypatch) -> None:
    options = [*pair, "--max-new-tokens", "8", "--json"]
    assert main(["generate", "two\nlines", *options]) == 0
    given = json.loads(capsys.readouterr().out)
    monkeypatch.setattr(sys, "stdin", io.StringIO("two\nlines\n"))
    assert main(["generate", "-", *options]) == 0
    piped = json.loads(capsys.readouterr().out)
    assert piped["token_ids"] == given["token_ids"]
    assert piped["stats"]["prompt_tokens"] == given["stats"]["prompt_tokens"]


def test_flags_reach_the_generation(pair, capsys) -> None:
    base = ["generate", "hello", *pair, "--max-new-tokens", "30", "--ignore-eos", "--json"]
    answers = {}
    for flags in (
        (),
        ("--no-learn",),
        ("--learn.stride", "2"),
        ("--draft.length", "0"),
        ("--raw",),
    ):
        assert main([*base, *flags]) == 0
        answers[flags] = json.loads(capsys.readouterr().out)
    stats = {flags: answer["stats"] for flags, answer in answers.items()}
    assert stats["--no-learn",]["updates"] == 0
    assert stats["--learn.stride", "2"]["updates"] > stats[()]["updates"] > 0
    assert stats["--draft.length", "0"]["acceptance_length"] == 1
    assert stats["--raw",]["prompt_tokens"] < stats[()]["prompt_tokens"]
    first = answers["--no-learn",]["text"][:4]
    assert main([*base, "--stop", "never seen", "--stop", first]) == 0
    assert json.loads(capsys.readouterr().out)["finish_reason"] == "stop"


def test_a_drafter_that_hardly_helps_is_reported_with_the_way_to_look_closer(pair, capsys) -> None:
    options = ["--max-new-tokens", "90", "--ignore-eos"]
    assert main(["generate", "hello", *pair, *options, "--draft.no-adaptive"]) == 0
    assert "ttspec doctor" in capsys.readouterr().err
    assert main(["generate", "hello", *pair, *options, "--draft.length", "0"]) == 0
    assert capsys.readouterr().err == ""


def test_a_reader_that_leaves_early_ends_the_answer(pair, capsys, monkeypatch) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["generate", "hi", *pair, "--ignore-eos", "--max-new-tokens", "32"]) == 0
    assert capsys.readouterr().err == ""


def test_a_process_whose_reader_leaves_early_ends_without_a_word() -> None:
    """Python itself would complain when it flushes at exit."""
    script = """
import sys
from ttspec.cli import app, main
app.command(lambda: print("some text", flush=True), name="talk")
sys.exit(main(["talk"]))
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


# Interruptions


def stream_of(chunks: int, seen: list[BaseException]) -> Iterator[Chunk]:
    """A stream that ends as cancelled when it is interrupted, as the engine's do."""
    try:
        for _ in range(chunks):
            yield Chunk(text="x", token_ids=(1,), round=None)
    except KeyboardInterrupt as interrupt:
        seen.append(interrupt)
        stats = summarise([], token_ids=[1], prompt_tokens=1, seed=0, seconds=1.0)
        result = Result(text="x", token_ids=[1], finish_reason="cancelled", stats=stats)
        yield Chunk(text="", token_ids=(), round=None, result=result)


def test_an_interrupt_while_text_is_shown_cancels_the_stream() -> None:
    seen: list[BaseException] = []
    shown: list[Chunk] = []

    def show(chunk: Chunk) -> None:
        shown.append(chunk)
        if len(shown) == 3:
            raise KeyboardInterrupt

    assert follow(stream_of(9, seen), show).finish_reason == "cancelled"
    assert len(seen) == 1
    assert len(shown) == 4


def test_an_interrupted_command_exits_with_130(pair, capsys, monkeypatch) -> None:
    monkeypatch.setattr("ttspec.decoding.engine.Engine.stream", lambda *_, **__: interrupted())
    assert main(["generate", "hello", *pair]) == 130
    assert main(["generate", "hello", *pair, "--json"]) == 130
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["finish_reason"] == "cancelled"
    monkeypatch.setattr("ttspec.cli.options.ModelFlags.load", interrupted_load)
    assert main(["generate", "hello", *pair]) == 130


def interrupted() -> Iterator[Chunk]:
    stream = stream_of(9, [])
    yield next(stream)
    yield stream.throw(KeyboardInterrupt())  # type: ignore[attr-defined]


def interrupted_load(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


# chat


def talk(pair: list[str], lines: str, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return main(["chat", *pair, "--max-new-tokens", "10", "--ignore-eos", *flags])


def test_chat_answers_every_line_of_a_pipe(pair, capsys, monkeypatch) -> None:
    assert talk(pair, "hello\n\nagain\n/stats\n/quit\nnever\n", monkeypatch) == 0
    out, err = capsys.readouterr()
    assert "session: 2 turns · 20 tokens" in err
    assert out.endswith("\n")


def test_reset_begins_the_same_conversation_again(pair, capsys, monkeypatch) -> None:
    assert talk(pair, "hello\n", monkeypatch, "--seed", "1") == 0
    once = capsys.readouterr().out
    assert talk(pair, "hello\n/reset\nhello\n/stats\n", monkeypatch, "--seed", "1") == 0
    out, err = capsys.readouterr()
    assert out == once * 2
    assert "session: 1 turn " in err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "; what the drafter learned is forgotten."),
        (["--learn.scope", "shared"], "; what the drafter learned stays."),
        (["--no-learn"], "."),
        (["--drafter", "ngram"], "."),
    ],
)
def test_reset_says_what_happens_to_what_was_learned(
    pair, capsys, monkeypatch, flags: list[str], said: str
) -> None:
    pair = pair[:2] if "--drafter" in flags else pair
    assert talk(pair, "/reset\n", monkeypatch, *flags) == 0
    assert f"A new conversation begins{said}\n" in capsys.readouterr().err


def test_chat_says_what_is_full(pair, capsys, monkeypatch) -> None:
    talking = ["chat", *pair, "--ignore-eos", "--max-new-tokens", "999"]
    for flags, said in (
        (["--context", "40"], "--context gives more, up to 512 tokens."),
        ([], "The target's context is full"),
    ):
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        assert main([*talking, *flags]) == 0
        assert said in capsys.readouterr().err


def test_a_text_too_long_for_a_conversation_is_left_out_of_it(pair, capsys, monkeypatch) -> None:
    assert talk(pair, f"hello\n{'x' * 600}\nand\n", monkeypatch) == 0
    out, err = capsys.readouterr()
    assert "no place for that text, which is left out" in err
    assert "is full" not in err
    assert talk(pair, "hello\nand\n", monkeypatch) == 0
    first, _, rest = out.partition("\n\n")
    assert capsys.readouterr().out == f"{first}\n{rest}"


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_what_was_learned_is_saved_and_taken_up_again(
    pair, capsys, monkeypatch, tmp_path, command: str
) -> None:
    folder, flags = tmp_path / "learned", ["--learn.stride", "1", "--ignore-eos", "--seed", "1"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand then?\n"))
    said = ["hello"] if command == "generate" else []
    asked = [command, *said, *pair, "--max-new-tokens", "20", *flags]
    assert main(asked) == 0
    text = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand then?\n"))
    assert main([*asked, "--save-drafter", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert out == text
    assert f"--drafter {folder}" in err
    place = pair.index("--drafter") + 1
    before, after = (load_file(next(Path(d).glob("*.safetensors"))) for d in (pair[place], folder))
    moved = [name for name, w in after.items() if name in before and not w.equal(before[name])]
    assert "norm.weight" in moved
    again = [*pair[:place], str(folder), *pair[place + 1 :]]
    assert main(["generate", "hello", *again, "--max-new-tokens", "5"]) == 0
    capsys.readouterr()
    assert main([*asked, "--save-drafter", str(folder)]) == 2  # it is not overwritten
    assert "nothing was written" in complaint(capsys)[0]


def test_what_cannot_be_saved_where_it_should_stays_and_is_named(
    pair, capsys, monkeypatch, tmp_path
) -> None:
    """Another process has the place by the end of the conversation."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    place, real = tmp_path / "new", terminal.follow

    def taken_meanwhile(*given: Any) -> Result:
        place.write_text("another's")
        return real(*given)

    monkeypatch.setattr("ttspec.cli.generate.follow", taken_meanwhile)
    learns = ["--learn.stride", "1", "--max-new-tokens", "12", "--save-drafter", str(place)]
    assert main(["generate", "hello", *pair, *learns]) == 2
    *_, stays, error, _ = capsys.readouterr().err.splitlines()
    assert f"{place} is a file; nothing was written" in error
    assert place.read_text() == "another's"
    monkeypatch.undo()
    flag, folder = stays.partition(": ")[2].split()
    assert flag == "--drafter"
    again = [*pair[: pair.index(flag) + 1], folder, *pair[pair.index(flag) + 2 :]]
    assert main(["generate", "hello", *again, "--max-new-tokens", "4"]) == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--no-learn"], "--no-learn"), (["--drafter", "ngram"], "needs a drafter")],
)
def test_what_has_nothing_to_save_is_refused(pair, capsys, tmp_path, flags, words: str) -> None:
    mine = pair[: pair.index("--drafter")] if "--drafter" in flags else pair
    assert main(["generate", "hi", *mine, *flags, "--save-drafter", str(tmp_path / "new")]) == 2
    assert words in complaint(capsys)[0]
    assert not (tmp_path / "new").exists()


def test_unknown_commands_of_chat_are_not_sent_to_the_target(pair, capsys, monkeypatch) -> None:
    assert talk(pair, "/stats\n/exit\n", monkeypatch) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "Nothing was said yet." in err
    assert "/exit is no command" in err


# Flags and small things


def test_learning_flags_change_the_preset_only_where_they_are_given() -> None:
    assert LearnFlags().config() == LearnConfig()
    assert LearnFlags(preset="paper").config() == LearnConfig.paper()
    changed = LearnFlags(preset="paper", stride=3).config()
    assert changed == replace(LearnConfig.paper(), stride=3)
    assert SessionLearnFlags().config().scope == "session"
    assert SessionLearnFlags(scope="request").config().scope == "request"
    assert DraftFlags(window=64).config() == DraftConfig(window=64)


def test_no_learning_and_learning_options_contradict_each_other() -> None:
    assert SessionLearnFlags().config_if(False) is None
    with pytest.raises(OptionError, match=r"learn\.stride"):
        LearnFlags(stride=2).config_if(False)


def test_low_acceptance_needs_enough_rounds_with_drafts_to_be_said() -> None:
    def rounds(count: int, accepted: int = 0, **kind: object) -> list[Round]:
        one = Round(position=0, proposed=5, accepted=accepted, emitted=1 + accepted)
        return [one._replace(**kind)] * count

    assert low_acceptance(rounds(15)) is None
    assert "1.00 over 16 rounds" in str(low_acceptance(rounds(16)))
    assert low_acceptance(rounds(62) + rounds(1, 1)) is None
    assert "ttspec doctor" in str(low_acceptance(rounds(63) + rounds(1, 1)))
    assert low_acceptance(rounds(64, 1)) is None
    paused, copied = rounds(80, proposed=0, length=0), rounds(80, copied=True)
    assert low_acceptance(paused + copied) is None
    assert low_acceptance(paused + copied + rounds(64, 1)) is None


def test_a_summary_says_where_the_policy_drafted_nothing() -> None:
    plain = Round(position=1, proposed=0, accepted=0, emitted=1, length=0)
    drafted = Round(position=2, proposed=2, accepted=1, emitted=2, length=2)
    given = {"token_ids": [1] * 4, "prompt_tokens": 1, "seed": 0, "seconds": 2.0}
    line = "4 tokens · 2.0 tokens/s · acceptance length 1.50 · "
    assert summary(summarise([plain, drafted], **given)) == (  # type: ignore[arg-type]
        line + "no drafts in 1 of 2 rounds · 0 updates"
    )
    assert summary(summarise([drafted], **given)) == (  # type: ignore[arg-type]
        "4 tokens · 2.0 tokens/s · acceptance length 2.00 · 0 updates"
    )


def test_a_target_without_a_chat_template_is_named_unless_raw_is_asked_for(
    toy_target_dir, pair, capsys, monkeypatch, tmp_path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(toy_target_dir, bare, ignore=shutil.ignore_patterns("chat_template*"))

    def said(command: list[str], *flags: str, target: Path) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
        models = ["--target", str(target), *pair[2:], "--max-new-tokens", "4"]
        assert main([*command, *models, *flags]) == 0
        return capsys.readouterr().err

    for command in (["generate", "hello"], ["chat"]):
        assert said(command, target=bare).count("has no chat template") == 1
        assert "template" not in said(command, "--raw", target=bare)
        assert "template" not in said(command, target=toy_target_dir)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_standard_output_cannot_encode_ends_in_no_traceback(pair, monkeypatch, encoding):
    """The toy target writes bytes that are no text, which become a character beyond both."""

    def run(command: str, *flags: str, lines: str = "") -> str:
        shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", shown)
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        given = [*pair, "--max-new-tokens", "12", "--ignore-eos", "--temperature", "0", *flags]
        assert main([command, *(["-"] if command == "generate" else []), *given]) == 0
        shown.flush()
        return shown.buffer.getvalue().decode(encoding)

    text = json.loads(run("generate", "--json", lines="\ufeffhello\n"))["text"]
    assert "\ufffd" in text
    seen = text.encode(encoding, "replace").decode(encoding)
    assert "?" in seen
    assert run("generate", lines="hello") == seen + "\n"
    assert run("chat", lines="\ufeffhello\n") == seen + "\n"


def test_closed_streams_end_in_no_traceback(pair, monkeypatch) -> None:
    """Python has None for what was closed before it began."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["generate", "hello", *pair, "--max-new-tokens", "2"]) == 0
    assert main(["generate", "hello", "--target", "nowhere/at-all/ever"]) == 2


def test_a_package_that_does_not_fit_is_told_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    broken = 'raise RuntimeError("operator torchvision::nms does not exist")'
    (tmp_path / "torchvision/__init__.py").write_text(broken)
    (tmp_path / "torchvision-0.1.dist-info").mkdir()
    known = "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.1\n"
    (tmp_path / "torchvision-0.1.dist-info/METADATA").write_text(known)
    found = subprocess.run(
        [sys.executable, "-m", "ttspec.cli", "export", "nowhere", "--target", "x", "--out", "y"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(tmp_path)])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1
    assert len(found.stderr.splitlines()) == 2
    assert "operator torchvision::nms does not exist" in found.stderr
