"""What a server learned is kept as ttspec's own engine keeps it. No vLLM here."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_steps import (  # noqa: F401
    LEARN,
    feed,
    learner_of,
    prompt_step,
    recorded,
    target,
)
from safetensors.torch import load_file, save_file
from toys import bound_kind

from ttspec.cli import main
from ttspec.decoding.shared_weights import fingerprint as of_engine
from ttspec.errors import CheckpointError, OptionError, ResourceError
from ttspec.learning.keeper import tenants_weights
from ttspec.learning.versions import VersionStore, stores_in
from ttspec.vllm.kept import known_target
from ttspec.vllm.settings import Settings
from ttspec.vllm.status import figures, is_never_accepted, why_never_accepted
from ttspec.vllm.steps import EngineLearner


def test_a_server_begins_where_the_last_one_ended(
    target,  # noqa: F811
    recorded,  # noqa: F811
    toy_target_dir,
    tmp_path,
    capsys,
) -> None:
    found = recorded("eagle3", tokens=150)
    assert found.drafter is not None
    drafter, said = found.drafter, []
    learn = replace(LEARN, keep=str(tmp_path / "kept"))

    def serve(engine: int = 0) -> EngineLearner:
        known, tenant = known_target(toy_target_dir, tied=False), f"engine-{engine}"
        live = tenants_weights(
            learn, drafter, lambda: known, tenant if engine else None, said.append
        )
        settings = Settings(rows=1, tokens=200, share=1.0, learn=learn)
        length = found.rounds[0].proposal.tokens.shape[1]
        learner = EngineLearner(settings, drafter, length, lambda _: None, live=live)
        learner.rounds_an_update = 2
        return learner

    first = serve()
    with pytest.raises(ResourceError, match="in use"):
        serve()
    serve(engine=1).shared.keeper.close()  # another engine's own
    first.absorb(prompt_step(found))
    feed(first, found, [0])
    learned = {n: w.clone() for n, w in first.shared.learned().items()}
    assert figures(first)["kept"] == 0
    first.shared.keeper.close()
    assert figures(first)["kept"] == 1, said
    second = serve()
    for name, weight in second.shared.learned().items():
        assert torch.equal(weight, learned[name])
        assert not torch.equal(weight, drafter.weights[name])
    second.shared.keeper.close()
    store = next(s for s in stores_in(tmp_path / "kept") if s.name == "everyone")
    version, delta = VersionStore(store).current()
    assert version.manifest["target"]["sha256"] == of_engine(target)
    delta.require(drafter)
    assert main(["learned", "list", str(store)]) == 0
    assert "1 *" in capsys.readouterr().out


def test_a_target_is_known_by_its_files_as_by_its_weights(target, toy_target_dir, tmp_path) -> None:  # noqa: F811
    known = of_engine(target)
    assert known_target(toy_target_dir, tied=False)["sha256"] == known
    tensors = load_file(next(toy_target_dir.glob("*.safetensors")))
    names = sorted(tensors)
    for part in (0, 1):  # several files, and a head that is written although it is tied
        some = {n: tensors[n] for n in names[part::2]}
        save_file(some, tmp_path / f"model-{part}.safetensors")
    save_file({"lm_head.weight": torch.ones(2, 2)}, tmp_path / "tied.safetensors")
    if "lm_head.weight" not in tensors:
        assert known_target(tmp_path, tied=True)["sha256"] == known
    assert known_target(tmp_path, tied=False)["sha256"] != known
    with pytest.raises(CheckpointError, match=r"and learn\.keep needs"):
        known_target(tmp_path / "nowhere", tied=False)


def test_where_no_draft_is_accepted_one_line_says_why() -> None:
    def status(rounds: int, length: float) -> dict[str, float]:
        return {"verified_rounds": rounds, "acceptance_length": length}

    assert not is_never_accepted(status(199, 1.0))
    assert not is_never_accepted(status(200, 1.3))
    assert is_never_accepted(status(200, 1.01))
    assert "200 rounds" in why_never_accepted(status(200, 1.0), 0.1)
    assert "hardly this target's" in why_never_accepted(status(200, 1.0), 0.1)
    said = why_never_accepted(status(900, 1.0), 0.8)
    assert "expects 0.8 a round: vLLM runs it in another way" in said


def test_what_should_be_accepted_comes_from_what_is_held_out(recorded) -> None:  # noqa: F811
    found = recorded("eagle3", tokens=150)
    learner, _ = learner_of(found, rows=1)
    assert learner.shared.expected_drafts() is None
    learner.absorb(prompt_step(found))
    feed(learner, found, [0])
    learner.forget(["request-0"])
    expected = learner.shared.expected_drafts()
    assert expected is not None
    assert 0 < expected < learner.shared.memory_trainer.length


def test_a_folder_of_versions_that_is_a_file_is_refused(tmp_path: Path, toy_target_dir) -> None:
    (tmp_path / "file").touch()
    learn = replace(LEARN, keep=str(tmp_path / "file"))
    known = known_target(toy_target_dir, tied=False)
    with pytest.raises(OptionError, match="file in its place"):
        tenants_weights(learn, bound_kind("eagle3"), lambda: known, None, print)
