"""What each kind of drafter trains on, what training leaves behind, and going on with one."""

import json
from pathlib import Path

import pytest
import torch
from conftest import SHAPE, byte_tokenizer
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ttspec import load
from ttspec.decoding.engine import Engine
from ttspec.drafters.base import Drafter
from ttspec.drafters.checkpoint import load_drafter, save_drafter
from ttspec.drafters.export import export_drafter
from ttspec.errors import OptionError
from ttspec.training import train as training
from ttspec.training.answers import write_answers
from ttspec.training.batches import Batch, MaskedRows, masked_rows, read_examples
from ttspec.training.config import TrainConfig
from ttspec.training.recipes import RECIPES, frequent_tokens
from ttspec.training.train import Progress, fit

KINDS = ["dspark", "dflash", "domino", "dflash2", "jetspec", "eagle3", "mtp", "pard", "causal"]
MADE = {"jetspec": "dflash"}
"""Kinds whose drafter is of another kind."""
MORE = {kind: {"epochs": 40} for kind in ("dflash", "jetspec", "domino")}
"""A mask that knows the token before only as another mask learns slowly; so does a GRU."""
DRAFTED = 120
"""Of 260 tokens, by EAGLE-3."""
TINY = {
    "epochs": 20,
    "layers": 2,
    "block": 4,
    "batch": 4,
    "anchors": 32,
    "lr": 1e-2,
    "draft_vocabulary": DRAFTED,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A target of six layers without attention: the next token hangs on the last one alone."""
    path = tmp_path_factory.mktemp("target")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": 6}))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    model.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def engine(folder) -> Engine:
    return load(str(folder), None, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def answers(engine, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    dialogues = [[f"number {n}"] for n in range(8)]
    options = {"max_answer": 40, "max_length": 120, "temperature": 0.5, "rows": 8}
    write_answers(engine, dialogues, out, TrainConfig(prompts=out, out=out, **options))
    return out


def config(out: Path, kind: str, **changes) -> TrainConfig:
    return TrainConfig(
        prompts=Path("-"), out=out, kind=kind, **{**TINY, **MORE.get(kind, {}), **changes}
    )


class Runs(dict[str, tuple[Path, list[Progress]]]):
    """By kind: the drafter's folder and the reports; each is trained when it is first asked for."""

    def __init__(self, engine: Engine, answers: Path, folders: pytest.TempPathFactory) -> None:
        self.given = engine.target, answers, folders

    def __missing__(self, kind: str) -> tuple[Path, list[Progress]]:
        (target, answers, folders), seen = self.given, list[Progress]()
        options = config(folders.mktemp(kind) / "out", kind)
        self[kind] = fit(target, options, [answers], seen.append), seen
        return self[kind]


@pytest.fixture(scope="module")
def runs(engine, answers, tmp_path_factory) -> Runs:
    return Runs(engine, answers, tmp_path_factory)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def drafts_a_round(engine: Engine, drafter: Drafter) -> float:
    given = load((engine.target.model, engine.tokenizer), drafter)
    results = given.generate(
        [f"another prompt {n}" for n in range(6)],
        max_new_tokens=40,
        temperature=0.5,
        seed=1,
        learn=None,
        ignore_eos=True,
    )
    accepted = sum(r.accepted for result in results for r in result.rounds)
    return accepted / sum(len(result.rounds) for result in results)


# Training.


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls_and_the_drafter_is_better_than_an_untrained_one(
    runs, engine, answers, tmp_path, kind
):
    folder, steps = runs[kind]
    assert steps[-1].loss < 0.75 * steps[0].loss
    assert len(steps[-1].accuracy) == (1 if kind == "causal" else 3)
    examples = read_examples([answers], 120)
    fresh = RECIPES[kind](engine.target, config(tmp_path, kind)).new(examples)
    trained = load_drafter("trained", folder)
    assert trained.kind == MADE.get(kind, kind)
    assert trained.config == json.loads(json.dumps(fresh.config))
    assert trained.length == fresh.length == (5 if kind == "causal" else 3)
    kept = [drafts_a_round(engine, drafter) for drafter in (fresh, trained)]
    assert kept[1] > 2 * kept[0], kept


def test_training_leaves_the_target_as_it_was(runs, engine, folder):
    """In float32 on the CPU a cast copies nothing, and a draft model's layers are the target's."""
    assert runs["pard"]
    assert runs["causal"]
    model = engine.target.model.state_dict()
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == model.keys()
    for name, weight in stored.items():
        assert torch.equal(model[name], weight), name


class Stop(Exception):
    pass


@pytest.mark.parametrize(
    "kind", [KINDS[0], *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS[1:])]
)
def test_training_that_was_interrupted_ends_with_the_same_weights(
    runs, engine, answers, tmp_path, monkeypatch, kind
):
    monkeypatch.setattr(training, "SAVE_EVERY", 0.0)

    def stop(progress: Progress) -> None:
        if progress.done > 0.4:
            raise Stop

    with pytest.raises(Stop):
        fit(engine.target, config(tmp_path, kind), [answers], stop)
    assert not (tmp_path / "drafter").exists()
    again = fit(engine.target, config(tmp_path, kind, resume=True), [answers], lambda _: None)
    wanted, found = weights(runs[kind][0]), weights(again)
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight), name


# What is written.


def read(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def test_eagle3_is_written_as_others_read_it(runs):
    """vLLM reads ids at the top level as we do, and nested ones a layer early."""
    folder, _ = runs["eagle3"]
    written = read(folder)
    assert written["eagle_aux_hidden_state_layer_ids"] == [2, 3, 3]  # of six layers
    assert "eagle_config" not in written
    assert load_drafter("d", folder).taps == (2, 3, 3)
    tensors = weights(folder)
    assert tensors["d2t"].shape == (DRAFTED,)
    assert tensors["d2t"].dtype == torch.int64
    used = tensors["d2t"] + torch.arange(DRAFTED)
    assert tensors["t2d"].nonzero()[:, 0].tolist() == used.tolist()
    assert "lm_head.weight" not in tensors
    assert written["ttspec"]["rebuilt"] == ["lm_head.weight"]


@pytest.mark.parametrize("kind", ["pard", "causal"])
def test_a_draft_model_is_written_without_the_targets_tables_and_without_its_path(
    runs, engine, folder, kind
):
    where, _ = runs[kind]
    written = read(where)
    assert "_name_or_path" in engine.target.config.to_dict(), "the test would prove nothing"
    assert "_name_or_path" not in written
    assert str(folder) not in (where / "config.json").read_text()
    assert ("pard_token" in written) == (written.get("spd_type") == "pard") == (kind == "pard")
    assert written["ttspec"]["layers_of_target"] == [0, 5]
    tables = ["model.embed_tokens.weight", "lm_head.weight"]
    assert written["ttspec"]["rebuilt"] == tables
    assert not weights(where).keys() & set(tables)
    given = (engine.target.model, engine.tokenizer)
    drafter = load(given, load_drafter("d", where)).drafter
    assert torch.equal(drafter.weights[tables[0]], engine.target.embedding)
    assert torch.equal(drafter.weights[tables[1]], engine.target.head)


# Going on with a drafter.


@pytest.mark.parametrize("kind", KINDS)
def test_init_goes_on_with_a_drafter_of_the_same_kind(runs, engine, answers, tmp_path, kind):
    """Steps too small to matter leave its weights, its map and its loss."""
    start, steps = runs[kind]
    seen: list[Progress] = []
    options = {"init": str(start), "lr": 1e-9, "epochs": 5, "seed": 4}
    found = fit(engine.target, config(tmp_path, kind, **options), [answers], seen.append)
    wanted, went_on = weights(start), weights(found)
    assert went_on.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(went_on[name], weight, atol=1e-6, rtol=0)
    assert read(found) == read(start)
    assert seen[0].loss < 0.5 * (steps[0].loss + steps[-1].loss)


def test_init_goes_on_with_a_head_of_its_own_too(runs, engine, answers, tmp_path):
    start, _ = runs["eagle3"]
    tensors, given = weights(start), read(start)
    rows = engine.target.head[tensors["d2t"] + torch.arange(DRAFTED)]
    del given["ttspec"]["rebuilt"]
    save_drafter(tmp_path / "headed", given, {**tensors, "lm_head.weight": rows})
    changed = config(tmp_path / "run", "eagle3", init=str(tmp_path / "headed"), epochs=5)
    head = weights(fit(engine.target, changed, [answers], lambda _: None))["lm_head.weight"].float()
    assert torch.cosine_similarity(head, rows, dim=1).min() > 0.7
    assert (head - rows).abs().max() > 0.01


@pytest.mark.parametrize(("kind", "other"), [("pard", "eagle3"), ("causal", "pard")])
def test_init_with_a_drafter_of_another_kind_is_refused(
    runs, engine, answers, tmp_path, kind, other
):
    options = config(tmp_path / "out", kind, init=str(runs[other][0]))
    with pytest.raises(OptionError, match=f"kind {other}; kind is {kind}") as caught:
        fit(engine.target, options, [answers], lambda _: None)
    assert len(str(caught.value).splitlines()) == 2
    assert not (tmp_path / "out" / "drafter").exists()


def test_init_goes_on_with_a_draft_model_that_has_tables_of_its_own(
    runs, engine, answers, tmp_path
):
    given = load((engine.target.model, engine.tokenizer), load_drafter("d", runs["pard"][0]))
    export_drafter(given.drafter, given.target, "published", tmp_path / "whole", dtype="float32")
    options = {"init": str(tmp_path / "whole"), "epochs": 5}
    found = fit(
        engine.target, config(tmp_path / "out", "pard", **options), [answers], lambda _: None
    )
    load_drafter("d", found)


# Masks after every token.


SPANS = [[(3, 9), (20, 26)], [(2, 5)], [(4, 17)]]


def masked(spans=SPANS, *, depth=4, keep=0.5, least=0.25, count=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 256, (len(spans), count), generator=generator)
    is_answer = torch.zeros_like(ids, dtype=torch.bool)
    for row, places in enumerate(spans):
        for begin, end in places:
            is_answer[row, begin:end] = True
    batch = Batch(ids, is_answer, generator, [*range(len(spans))])
    return batch, masked_rows(batch, depth, keep, least)


def chains(rows: MaskedRows, row: int, count: int) -> dict[int, list[int]]:
    """By anchor, the depths of its masks, in ascending order."""
    found: dict[int, list[int]] = {}
    for i in range(count, rows.ids.shape[1]):
        if rows.has_label[row, i]:
            d = int(rows.depth[row, i])
            found.setdefault(int(rows.position[row, i]) - d, []).append(d)
    return {anchor: sorted(depths) for anchor, depths in found.items()}


def test_rows_see_what_they_may():
    batch, rows = masked()
    n, count = batch.ids.shape
    total = rows.ids.shape[1]
    padding = 0
    for row in range(n):
        depth, position = rows.depth[row].tolist(), rows.position[row].tolist()
        assert depth[:count] == [0] * count
        assert position[:count] == list(range(count))
        for i in range(total):
            seen = set(rows.seen[row, i].nonzero()[:, 0].tolist())
            if i < count:
                assert seen == set(range(i + 1))
                continue
            if not rows.has_label[row, i]:
                assert seen == {i}
                padding += 1
                continue
            d, anchor = depth[i], position[i] - depth[i]
            assert 1 <= d < 4
            before = {
                j
                for j in range(count, total)
                if rows.has_label[row, j] and depth[j] <= d and position[j] - depth[j] == anchor
            }
            assert len(before) == d  # its own, and the whole chain before it
            assert seen == set(range(anchor + 1)) | before
    assert padding


def test_what_is_taught_stands_in_an_answer_and_so_does_the_token_after():
    batch, rows = masked()
    n, count = batch.ids.shape
    for row in range(n):
        within = {t for begin, end in SPANS[row] for t in range(begin, end - 1)}
        assert set(rows.has_label[row, :count].nonzero()[:, 0].tolist()) == within
        assert torch.equal(rows.ids[row, :count], batch.ids[row])
        for i in rows.has_label[row].nonzero()[:, 0].tolist():
            place, anchor = (
                int(rows.position[row, i]),
                int(rows.position[row, i] - rows.depth[row, i]),
            )
            assert any(begin <= anchor and place + 1 < end for begin, end in SPANS[row])
            assert rows.ids[row, i] == batch.ids[row, place]


def test_each_depth_keeps_its_share_of_the_one_before_down_to_the_least():
    """Of 200 anchors; near the end of the answer a chain has less room."""
    _, rows = masked([[(5, 206)]], depth=6, count=210)
    found = chains(rows, 0, 210)
    for depths in found.values():
        assert depths == list(range(1, len(depths) + 1))
    for d, share in enumerate([0.5, 0.25, 0.25, 0.25, 0.25], 1):
        kept = sum(d in depths for depths in found.values())
        assert 200 * share - d <= kept <= 200 * share
    _, again = masked([[(5, 206)]], depth=6, count=210)
    _, other = masked([[(5, 206)]], depth=6, count=210, seed=1)
    assert chains(again, 0, 210) == found
    assert chains(other, 0, 210) != found


def test_everything_is_kept_where_nothing_is_to_be_dropped():
    _, rows = masked([[(3, 9)]], keep=1.0)
    assert chains(rows, 0, 30) == {3: [1, 2, 3], 4: [1, 2, 3], 5: [1, 2], 6: [1]}


def test_no_chain_reaches_into_the_next_answer():
    _, rows = masked([[(3, 6), (9, 14)]], depth=8, keep=1.0)
    for anchor, depths in chains(rows, 0, 30).items():
        assert depths == list(range(1, len(depths) + 1)), anchor


def test_a_depth_of_1_is_no_masks():
    batch, rows = masked(depth=1)
    assert torch.equal(rows.ids, batch.ids)
    assert not rows.depth.any()
    assert torch.equal(rows.seen, torch.ones(30, 30).tril().bool().expand(3, -1, -1))


# The draft vocabulary.


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        (1, [7]),
        (2, [4, 7]),  # 4 and 9 are as frequent
        (3, [4, 7, 9]),
        (4, [2, 4, 7, 9]),
        (6, [0, 1, 2, 4, 7, 9]),  # 0 and 1 are in no answer
        (12, list(range(12))),
    ],
)
def test_the_most_frequent_tokens_of_the_answers_are_drafted(size, wanted):
    examples = [([1, 1, 1, 1, 7, 9, 4, 7], [(4, 8)]), ([0, 7, 4, 11, 9, 2], [(1, 3), (4, 6)])]
    assert frequent_tokens(examples, size, 12).tolist() == wanted
