"""A tiny training run, end to end: answers, loss, resume, refusals, and what is a label."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import SHAPE, byte_tokenizer
from safetensors.torch import load_file
from toys import copy_of, toy_engine
from transformers import LlamaConfig, LlamaForCausalLM

from ttspec import load
from ttspec.decoding.engine import Engine
from ttspec.errors import DataError, OptionError, TrainingError
from ttspec.training import train as training
from ttspec.training.answers import read_dialogues, write_answers
from ttspec.training.batches import Batches, anchors, read_examples
from ttspec.training.config import TrainConfig
from ttspec.training.recipes import RECIPES
from ttspec.training.train import Progress, Trainer, train

PROMPTS = [
    {"prompt": "hello there"},
    {"turns": ["count to ten", "and on"]},
    {"turns": ["first", None]},
    {"turns": [None, "then"]},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "no"}]},
    *({"prompt": f"number {n}"} for n in range(7)),
]
TINY = {
    "max_length": 120,
    "max_answer": 30,
    "epochs": 30,
    "layers": 2,
    "block": 4,
    "batch": 6,
    "anchors": 32,
    "rows": 5,
    "lr": 1e-2,
    "temperature": 0.5,
}


def speaker() -> LlamaForCausalLM:
    """A target of six layers without attention: the next token hangs on the last one alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": 6}))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
        model.lm_head.weight[258] *= 2  # answers end now and then
    return model


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load((speaker(), byte_tokenizer()), None)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, PROMPTS)) + "\n\n")
    return path


def config(prompts: Path, out: Path, **changes) -> TrainConfig:
    return TrainConfig(prompts=prompts, out=out, **{**TINY, **changes})


@pytest.fixture(scope="module")
def run(engine, prompts, tmp_path_factory) -> tuple[Path, list[Progress]]:
    out = tmp_path_factory.mktemp("run") / "out"
    seen: list[Progress] = []
    train(engine, config(prompts, out), seen.append)
    return out, seen


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "drafter" / "model.safetensors")


def records(out: Path) -> list[dict]:
    lines = (out / "answers.jsonl").read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda r: r["n"])


def test_the_loss_falls_and_progress_goes_from_0_to_1(run):
    steps = [p for p in run[1] if p.stage == "training"]
    assert steps[-1].loss < 0.75 * steps[0].loss
    assert steps[-1].accuracy[0] > steps[0].accuracy[0]
    assert all(len(p.accuracy) == 3 for p in steps)
    answers = [p.done for p in run[1] if p.stage == "answers"]
    assert answers == sorted(answers)
    assert answers[-1] == 1.0
    assert [p.done for p in steps] == sorted(p.done for p in steps)


def test_answers_of_one_target_teach_no_drafter_of_another(engine, run, prompts) -> None:
    out = run[0]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = Engine(replace(engine.target, name="other"), None)
    with pytest.raises(OptionError, match="not 'other, 6 layers of"):
        train(other, config(prompts, out, resume=True))
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_it_is_told_how_many_prompts_teach_nothing(engine, tmp_path, monkeypatch) -> None:
    told, seen, out = list[str](), list[Progress](), tmp_path / "out"
    monkeypatch.setattr(engine, "notify", told.append)
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, [*PROMPTS, {"prompt": "long " * 200}])))
    train(engine, config(path, out), seen.append)
    taught = {row["n"] for row in records(out) if row["spans"]}
    assert len(PROMPTS) not in taught
    lines = [line for line in told if "teach nothing" in line]
    assert [line.split(" prompts")[0] for line in lines] == [
        f"{len(PROMPTS) + 1 - len(taught)} of {len(PROMPTS) + 1}"
    ]
    assert max(p.done for p in seen if p.stage == "answers") == 1.0


def test_nothing_is_learned_from_a_gradient_that_is_not_finite(
    engine, run, prompts, tmp_path, monkeypatch
):
    examples = read_examples([run[0] / "answers.jsonl"], 120)
    trainer = Trainer(engine.target, config(prompts, tmp_path), examples)
    before = {n: w.detach().clone() for n, w in trainer.masters.items()}
    batch = Batches(examples, 2, 0, engine.target.device).at(0)
    with monkeypatch.context() as patch:
        loss = type(trainer.recipe).loss
        patch.setattr(
            type(trainer.recipe),
            "loss",
            lambda self, drafter, batch: tuple(x * math.nan for x in loss(self, drafter, batch)),
        )
        for step in range(10):
            trainer.step(batch, 0.5)
            if step < 9:
                trainer.check()
        with pytest.raises(TrainingError, match="finite in the last 10"):
            trainer.check()
    assert all(torch.equal(w, before[n]) for n, w in trainer.masters.items())
    trainer.step(batch, 0.5)
    trainer.check()
    assert math.isfinite(trainer.loss)
    assert not all(torch.equal(w, before[n]) for n, w in trainer.masters.items())


def test_a_card_of_facts_lies_beside_the_drafter(run):
    facts = json.loads((run[0] / "drafter" / "training.json").read_text())
    assert facts["dialogues"] == len(records(run[0]))
    assert facts["steps"] == 30 * -(-facts["dialogues"] // 6)
    assert facts["config"]["seed"] == 0


# Answers.


def test_answers_are_what_the_target_says_and_turns_of_null_are_its_own(run, engine):
    found = {r["n"]: r for r in records(run[0])}
    assert set(found) == set(range(len(PROMPTS)))
    written = 0
    for n, record in found.items():
        ids, spans = record["ids"], record["spans"]
        text = engine.tokenizer.decode(ids)
        for begin, end in spans:
            said = engine.tokenizer.decode(ids[:begin])
            assert said.endswith("<|im_start|>assistant\n"), n
            assert 0 < end - begin <= TINY["max_answer"]
            assert end == len(ids) or ids[end - 1] in engine.target.ends
        assert spans == sorted(spans)
        assert not spans or spans[-1][1] == len(ids)
        first = PROMPTS[n].get("prompt") or (PROMPTS[n].get("turns") or ["hi"])[0]
        if first and spans:
            assert f"<|im_start|>user\n{first}<|im_end|>" in text
        if first is None and spans:
            written += 1
            assert text.startswith("<|im_start|>user\n")
            assert text.index("<|im_end|>") > len("<|im_start|>user\n")
    assert written, "no turn was written by the target: the test would prove too little"


def test_an_answer_does_not_depend_on_the_batch(run, engine, tmp_path):
    """Rows only share the work; each dialogue has noise of its own."""
    out = tmp_path / "answers.jsonl"
    dialogues = [["hello there"], ["count to ten", "and on"]]
    write_answers(engine, dialogues, out, config(out, out, rows=1))
    alone = {r["n"]: r for r in map(json.loads, out.read_text().splitlines())}
    batch = {r["n"]: r for r in records(run[0])}
    assert alone == {n: batch[n] for n in alone}


def test_answers_in_the_file_are_not_written_again(run, engine, tmp_path):
    out = tmp_path / "answers.jsonl"
    out.write_text((run[0] / "answers.jsonl").read_text())
    before = out.read_bytes()
    write_answers(engine, read_dialogues_of(run), out, config(out, out, rows=4))
    assert out.read_bytes() == before


def read_dialogues_of(run) -> list:
    path = run[0].parent / "again.jsonl"
    path.write_text("\n".join(map(json.dumps, PROMPTS)))
    return read_dialogues(path)


# Resume.


class Stop(Exception):
    pass


@pytest.mark.parametrize("stage", ["answers", pytest.param("training", marks=pytest.mark.slow)])
def test_a_run_that_was_interrupted_ends_with_the_same_drafter(
    run, engine, prompts, tmp_path, monkeypatch, stage
):
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)
    out = tmp_path / "out"

    def stop(progress: Progress) -> None:
        if progress.stage == stage and progress.done > 0.4:
            raise Stop

    with pytest.raises(Stop):
        train(engine, config(prompts, out), stop)
    assert not (out / "drafter").exists()
    train(engine, config(prompts, out, resume=True))
    assert records(out) == records(run[0])
    wanted, found = weights(run[0]), weights(out)
    assert all(torch.equal(found[n], w) for n, w in wanted.items())


def test_a_half_written_answer_is_written_again(run, engine, tmp_path):
    out = tmp_path / "answers.jsonl"
    lines = (run[0] / "answers.jsonl").read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:-1]) + lines[-1][:20])
    write_answers(engine, read_dialogues_of(run), out, config(out, out, rows=4))
    assert sorted(out.read_text().splitlines()) == sorted("".join(lines).splitlines())


def test_a_finished_run_can_be_resumed_to_nothing(run, engine, prompts):
    def card() -> dict[str, object]:
        found = json.loads((run[0] / "drafter" / "training.json").read_text())
        return {name: found[name] for name in ("steps", "loss", "accuracy")}

    before, known = weights(run[0]), card()
    train(engine, config(prompts, run[0], resume=True))
    assert card() == known
    assert all(torch.equal(weights(run[0])[n], w) for n, w in before.items())


# Refusals.


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("run.json", b"{"),
        ("run.json", b"[1]"),
        ("answers.jsonl", b'{"n": 0}\n'),
        ("answers.jsonl", b"\0\0\0\n"),
        ("state.safetensors", b"\0" * 40),
        ("state.safetensors", b""),
    ],
)
def test_a_damaged_file_of_a_run_is_named_with_what_to_do(
    run, engine, prompts, tmp_path, file, content
):
    out = copy_of(run[0], tmp_path)
    (out / file).write_bytes(content)
    with pytest.raises(DataError, match=f"{file}.* is damaged") as caught:
        train(engine, config(prompts, out, resume=True))
    assert str(caught.value).count("\n") == 1


def test_a_kill_while_a_folder_is_taken_leaves_it_free(engine, prompts, tmp_path, monkeypatch):
    """What a run is of stands in its folder as a whole or not at all."""
    monkeypatch.setattr(Path, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(engine, config(prompts, tmp_path / "out"))
    monkeypatch.undo()
    monkeypatch.setattr("ttspec.training.train.write_answers", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(engine, config(prompts, tmp_path / "out"))


def test_a_used_folder_needs_resume(run, engine, prompts, tmp_path):
    with pytest.raises(OptionError, match="resume"):
        train(engine, config(prompts, run[0]))
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(OptionError, match="not empty"):
        train(engine, config(prompts, tmp_path))


@pytest.mark.parametrize(
    "change", [{"layers": 3}, {"lr": 1e-3}, {"seed": 4}, {"max_length": 90}], ids=str
)
def test_a_run_is_not_resumed_under_other_options(run, engine, prompts, change):
    with pytest.raises(OptionError) as caught:
        train(engine, config(prompts, run[0], resume=True, **change))
    assert next(iter(change)) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[1]",
        '"text"',
        "{}",
        '{"prompt": null}',
        '{"prompt": 5}',
        '{"turns": []}',
        '{"turns": ["a", 3]}',
        '{"turns": "abc"}',
        '{"turns": {"a": 1}}',
        '{"messages": []}',
        '{"messages": [{"role": "assistant", "content": "x"}]}',
        '{"messages": [{"role": "user"}]}',
        '{"messages": "hello"}',
    ],
)
def test_a_line_that_is_no_prompt_is_refused_by_its_number(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "good"}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        read_dialogues(path)
    assert f"{path}, line 2" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b"\xff\xfe{"], ids=str)
def test_a_file_without_prompts_is_refused(tmp_path, content):
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_dialogues(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


def test_a_folder_is_free_after_bad_prompts(engine, prompts, tmp_path):
    with pytest.raises(DataError):
        train(engine, config(tmp_path / "missing.jsonl", tmp_path / "out"))
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize(
    "change", [{"layers": 0}, {"block": 1}, {"lr": 0.0}, {"batch": 0}], ids=str
)
def test_options_that_cannot_be_are_refused(engine, prompts, tmp_path, change):
    with pytest.raises(OptionError):
        train(engine, config(prompts, tmp_path / "out", **change))


def test_a_target_of_few_layers_is_refused(toy_target_dir, prompts, tmp_path):
    target = toy_engine(toy_target_dir).target
    with pytest.raises(OptionError, match=r"has 4 layers; .* of 5 or more"):
        RECIPES["dflash"](target, config(prompts, tmp_path))


def test_answers_of_one_token_teach_nothing(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps({"n": 0, "ids": [1, 2, 3], "spans": [[2, 3]]}))
    with pytest.raises(TrainingError):
        read_examples([path], 100)


# What the target says of the examples.


@pytest.mark.parametrize("room", [True, False])
def test_the_target_reads_each_example_once_where_its_states_fit(
    run, engine, prompts, tmp_path, monkeypatch, room
):
    if not room:
        monkeypatch.setattr("ttspec.training.states.free_memory", lambda _: 0)
    examples = read_examples([run[0] / "answers.jsonl"], 120)
    trainer = Trainer(engine.target, config(prompts, tmp_path), examples)
    seen, read = [], type(engine.target).read
    monkeypatch.setattr(
        type(engine.target), "read", lambda self, ids: seen.append(len(ids)) or read(self, ids)
    )
    per_epoch = trainer.batches.per_epoch
    for step in range(per_epoch, 3 * per_epoch):  # as if it had been interrupted
        batch = trainer.batches.at(step)
        for taps in ((), trainer.drafter.taps[::-1]):
            found = trainer.recipe.states.of(batch, taps)
            engine.target.taps = taps
            wanted = read(engine.target, batch.ids)
            for row, i in enumerate(batch.chosen):
                for a, b in zip(found, wanted, strict=True):
                    here = slice(len(examples[i][0]))
                    torch.testing.assert_close(a[row, here], b[row, here])
    assert sum(seen) == len(examples) * (1 if room else 4)


# Batches.


def test_blocks_begin_at_answer_tokens_that_another_follows_and_labels_are_of_the_answer(run):
    examples = read_examples([run[0] / "answers.jsonl"], 100)
    by_ids = {tuple(ids): spans for ids, spans in examples}
    batches, seen = Batches(examples, 4, 1, torch.device("cpu")), set()
    for step in range(6):
        batch = batches.at(step)
        blocks = anchors(batch, 32, 4)
        for row, ids in enumerate(batch.ids.tolist()):
            (spans,) = [s for given, s in by_ids.items() if ids[: len(given)] == list(given)]
            seen.add(str(ids))
            for a, start in enumerate(blocks.start[row].tolist()):
                (span,) = [(b, e) for b, e in spans if b <= start < e]
                assert start + 1 < span[1]
                assert blocks.tokens[row, a] == ids[start]
                for j in range(4):
                    at = start + 1 + j
                    assert bool(blocks.mask[row, a, j]) == (at < span[1])
                    if at < span[1]:
                        assert blocks.labels[row, a, j] == ids[at]
    assert len(seen) == len(examples)  # an epoch sees every dialogue


def test_the_batch_of_a_step_is_always_the_same(run):
    examples = read_examples([run[0] / "answers.jsonl"], 100)
    given = Batches(examples, 4, 1, torch.device("cpu"))
    batches = [given.at(step) for step in (3, 3, 4)]
    one, again, other = (anchors(batch, 8, 4) for batch in batches)
    assert torch.equal(one.start, again.start)
    assert torch.equal(batches[0].ids, batches[1].ids)
    assert torch.equal(batches[0].is_answer, batches[1].is_answer)
    assert one.start.shape != other.start.shape or not torch.equal(one.start, other.start)
