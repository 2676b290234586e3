"""What all requests of a tenant taught, kept on disk and gone on from; whose texts teach what."""

from pathlib import Path

import pytest
from toys import make_kind, toy_engine, twin

from ttspec.config import GenerateConfig, LearnConfig
from ttspec.decoding.conversation import Request
from ttspec.decoding.engine import Engine
from ttspec.decoding.scheduler import Scheduler
from ttspec.errors import OptionError, ResourceError
from ttspec.learning.keeper import Evaluation
from ttspec.learning.live_weights import LiveWeights
from ttspec.learning.versions import numbers_in, stores_in

PROMPTS = ["hello there", "count to ten, please"]
SHARED = {"scope": "shared", "stride": 2, "lr": 3e-3, "blocks": 4}


@pytest.fixture(scope="module")
def target(toy_target_dir):
    return toy_engine(toy_target_dir).target


def fresh(target, which: str = "dflash") -> Engine:
    engine = Engine(twin(target), make_kind(which))
    engine.told = []
    engine.notify = engine.told.append
    return engine


def say(engine: Engine, learn: LearnConfig | None, prompts=PROMPTS, **options):
    options = {"max_new_tokens": 130, "seed": 5, "temperature": 0.9, **options}
    return engine.generate(prompts, ignore_eos=True, learn=learn, **options)


def rounds(results) -> list[list[tuple[int, int]]]:
    return [[(r.position, r.accepted) for r in result.rounds] for result in results]


def live(engine: Engine) -> LiveWeights:
    (found,) = engine._shared_weights._live.values()
    return found


# Kept.


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_learning_goes_on_from_the_bits_that_were_kept(target, tmp_path, weights: str) -> None:
    learn = LearnConfig(**SHARED, keep=str(tmp_path), weights=weights)
    engine = fresh(target)
    say(engine, learn)
    weights_then = {n: w.clone() for n, w in live(engine).learned.items()}
    keeper = live(engine).keeper
    engine.close()
    assert keeper.evaluation.is_kept, keeper.evaluation
    assert engine.told == []
    (store,) = stores_in(tmp_path)
    assert numbers_in(store) == [1]
    again = fresh(target)
    decoder = again.decoder(GenerateConfig(learn=learn), 1, 5, sessions=False)
    for name, weight in decoder.learner.weights.master.items():
        assert weight.equal(weights_then[name]), name
    again.close()
    few = {"max_new_tokens": 30}
    better, static = say(fresh(target), learn, **few), say(fresh(target), None, **few)
    assert [r.token_ids for r in better] == [r.token_ids for r in static]
    assert sum(map(len, rounds(better))) < sum(map(len, rounds(static))), "it knows this text"


@pytest.fixture(scope="module")
def kept(target, tmp_path_factory) -> Path:
    """A folder with two versions of a tenant."""
    folder = tmp_path_factory.mktemp("kept")
    engine = fresh(target)
    engine.drafter.name = str(folder)  # replaced by the commands' own
    learn = LearnConfig(**SHARED, keep=str(folder))
    say(engine, learn, tenant="acme")
    keeper = live(engine).keeper
    assert keeper.make_version()
    keeper.writer.flush()
    keeper.evaluation = Evaluation(0)
    keeper._news = True
    engine.close()
    (store,) = stores_in(folder)
    assert numbers_in(store) == [1, 2]
    return folder


def test_an_engine_that_is_used_has_its_folder_alone(target, kept: Path) -> None:
    learn = LearnConfig(**SHARED, keep=str(kept))
    first, second = fresh(target), fresh(target)
    say(first, learn, tenant="acme", max_new_tokens=2)
    with pytest.raises(ResourceError, match="is in use"):
        say(second, learn, tenant="acme", max_new_tokens=2)
    say(second, learn, tenant="other", max_new_tokens=2)
    first.close()
    second.close()
    say(second, learn, tenant="acme", max_new_tokens=2)
    second.close()


def test_other_weights_than_those_that_were_kept_are_refused(target, kept: Path) -> None:
    learn = LearnConfig(**SHARED, keep=str(kept), weights="lora", rank=3)
    with pytest.raises(OptionError, match=r"learn.rank 3 .*\n.*learned show"):
        say(fresh(target), learn, tenant="acme")


def test_keep_is_for_shared_weights_only() -> None:
    for scope in ("request", "session"):
        with pytest.raises(OptionError, match=r"learn.keep is 'here'; allowed is a folder, with"):
            LearnConfig(scope=scope, keep="here")


# Never worse.


def test_worse_weights_are_not_kept_and_the_reason_is_told(target, tmp_path: Path) -> None:
    engine = fresh(target)
    say(engine, LearnConfig(**SHARED, keep=str(tmp_path)))
    weights = live(engine)
    for name, learned in weights.learned.items():  # the other way from the anchor
        learned.copy_(weights.anchor[name] - 3 * (learned - weights.anchor[name]))
    weights.publish(anchor=True)  # what is judged is what would be kept, not what drafts
    engine.close()
    found = weights.keeper.evaluation
    assert found.live < found.anchor
    assert found.blocks > 16
    (told,) = engine.told
    assert "is not kept" in told
    assert f"the anchor {found.anchor:.3f}" in told
    assert stores_in(tmp_path) == []


@pytest.mark.parametrize(
    ("blocks", "figures", "good"),
    [
        (16, (1.0, 0.9, 0.9), True),
        (15, (1.0, 0.9, 0.9), False),
        (99, (1.0, 1.01, 0.9), False),
        (99, (1.0, 0.9, 1.01), False),
        (99, (1.0, 1.0, 1.0), True),
    ],
)
def test_a_version_must_be_behind_neither(blocks: int, figures, good: bool) -> None:
    assert Evaluation(blocks, *figures).is_kept is good


# Whose text.


@pytest.mark.parametrize("keeps", [False, True])
def test_what_one_tenant_asks_changes_no_draft_of_another(target, tmp_path, keeps: bool) -> None:
    def learn(folder: str) -> LearnConfig:
        return LearnConfig(**SHARED, keep=str(tmp_path / folder) if keeps else None)

    few = {"max_new_tokens": 30}
    alone = rounds(say(fresh(target), learn("alone"), tenant="b", **few))
    both, ours = fresh(target), learn("both")
    first = rounds(say(both, ours, tenant="a", **few))
    again = rounds(say(both, ours, tenant="a", **few))
    assert first == alone, "the same requests, and nothing was learned before"
    assert again != alone, "a drafts with what a taught"
    assert rounds(say(both, ours, **few)) == alone, "who names no tenant is none of them"
    assert rounds(say(both, ours, tenant="b", **few)) == alone
    assert rounds(say(both, ours, **few)) != alone, "requests that name no tenant share"
    both.close()


def test_a_batch_of_shared_weights_refuses_another_tenant(target) -> None:
    engine = fresh(target)
    config = GenerateConfig(learn=LearnConfig(**SHARED), tenant="a", max_new_tokens=4, seed=0)
    scheduler = Scheduler(engine.decoder(config, 2, 5, sessions=False), config)
    scheduler.add_request(Request(ids=[1, 2, 3], seed=0))
    scheduler.add_request(Request(ids=[1, 2, 3], seed=0, tenant="a"))
    with pytest.raises(OptionError, match=r"is of tenant 'b', and all rows .* tenant 'a'"):
        scheduler.add_request(Request(ids=[1, 2, 3], seed=0, tenant="b"))


def test_rows_that_learn_for_themselves_take_any_tenant(target) -> None:
    """A row's weights are its request's: side by side, b drafts as it does alone."""
    learn = LearnConfig(stride=2, lr=3e-3, blocks=4)

    def run(tenants: dict[str, str]) -> dict[str, list]:
        engine = fresh(target)
        config = GenerateConfig(learn=learn, max_new_tokens=40, seed=0, ignore_eos=True)
        scheduler = Scheduler(engine.decoder(config, 2, 20, sessions=False), config)
        asked = {
            scheduler.add_request(Request(ids=list(text.encode()), seed=0, tenant=who)): who
            for who, text in tenants.items()
        }
        found: dict[str, list] = {}
        while scheduler.has_unfinished():
            for request, chunk in scheduler.step():
                if chunk.result:
                    found[asked[request]] = [(r.position, r.accepted) for r in chunk.result.rounds]
        return found

    assert run({"b": "hello there"})["b"] == run({"a": "count to ten", "b": "hello there"})["b"]
