"""What a server learned is kept as ttspec's own engine keeps it. No vLLM here."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_vllm_steps import LEARN, PROMPTS, feed, prompt_step, record, target  # noqa: F401
from toys import bound_kind

from ttspec.cli import main
from ttspec.decoding.shared import fingerprint as of_engine
from ttspec.errors import CheckpointError, OptionError, ResourceError
from ttspec.learning.versions import VersionStore, stores_in
from ttspec.vllm.kept import fingerprint, kept_weights
from ttspec.vllm.settings import Settings
from ttspec.vllm.status import figures, why_nothing_is_accepted
from ttspec.vllm.steps import EngineLearner


def test_a_server_begins_where_the_last_one_ended(
    target,  # noqa: F811
    toy_target_dir,
    monkeypatch,
    tmp_path,
    capsys,
) -> None:
    found = record("eagle3", target, PROMPTS[:1], monkeypatch, tokens=150)
    assert found.drafter is not None
    drafter, said = found.drafter, []
    learn = replace(LEARN, keep=str(tmp_path / "kept"))

    def serve(engine: int = 0) -> EngineLearner:
        live = kept_weights(
            learn, drafter, toy_target_dir, tied=False, engine=engine, notify=said.append
        )
        settings = Settings(rows=1, tokens=200, share=1.0, learn=learn)
        length = found.rounds[0].proposal.tokens.shape[1]
        return EngineLearner(settings, drafter, length, lambda _: None, live=live)

    first = serve()
    with pytest.raises(ResourceError, match="in use"):
        serve()
    serve(engine=1).learner.keeper.close()  # another engine's own
    first.absorb(prompt_step(found))
    feed(first, found, [0])
    learned = {n: w.clone() for n, w in first.learner.learned(0).items()}
    assert figures(first)["kept"] == 0
    first.learner.keeper.close()
    assert figures(first)["kept"] == 1, said
    second = serve()
    for name, weight in second.learner.learned(0).items():
        assert torch.equal(weight, learned[name])
        assert not torch.equal(weight, drafter.weights[name])
    second.learner.keeper.close()
    store = next(s for s in stores_in(tmp_path / "kept") if s.name == "everyone")
    version, delta = VersionStore(store).current()
    assert version.manifest["target"]["sha256"] == of_engine(target)
    delta.require(drafter)
    assert main(["learned", "list", str(store)]) == 0
    assert "1 *" in capsys.readouterr().out


def test_a_target_is_known_by_its_files_as_by_its_weights(target, toy_target_dir, tmp_path) -> None:  # noqa: F811
    known = of_engine(target)
    assert fingerprint(toy_target_dir, tied=False) == known
    tensors = load_file(next(toy_target_dir.glob("*.safetensors")))
    names = sorted(tensors)
    for part in (0, 1):  # several files, and a head that is written although it is tied
        some = {n: tensors[n] for n in names[part::2]}
        save_file(some, tmp_path / f"model-{part}.safetensors")
    save_file({"lm_head.weight": torch.ones(2, 2)}, tmp_path / "tied.safetensors")
    if "lm_head.weight" not in tensors:
        assert fingerprint(tmp_path, tied=True) == known
    assert fingerprint(tmp_path, tied=False) != known
    with pytest.raises(CheckpointError, match=r"and learn\.keep needs"):
        fingerprint(tmp_path / "nowhere", tied=False)


@pytest.mark.parametrize(
    ("rounds", "length", "expected", "said"),
    [
        (199, 1.0, 0.0, None),
        (200, 1.3, 0.0, None),
        (200, 1.0, 0.0, "hardly this target's"),
        (900, 1.01, 2.4, "expects 2.4 drafts a comparison: vLLM runs it in another way"),
    ],
)
def test_where_no_draft_is_accepted_one_line_says_why(rounds, length, expected, said) -> None:
    status = {"verified_rounds": rounds, "acceptance_length": length}
    why = why_nothing_is_accepted(status, expected)
    assert (why is None) if said is None else (said in why and f"{rounds} rounds" in why)


def test_a_folder_of_versions_that_is_a_file_is_refused(tmp_path: Path, toy_target_dir) -> None:
    (tmp_path / "file").touch()
    learn = replace(LEARN, keep=str(tmp_path / "file"))
    with pytest.raises(OptionError, match="file in its place"):
        kept_weights(
            learn, bound_kind("eagle3"), toy_target_dir, tied=False, engine=0, notify=print
        )
