"""What keeps the plugin from learning in vLLM, and how weights get in and out. No vLLM here."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from toys import bound_kind

from ttspec.config import LearnConfig
from ttspec.errors import OptionError
from ttspec.vllm import hooks, plugin, v1, v2
from ttspec.vllm.module import flat, learned_names, load_in_place, unflattened
from ttspec.vllm.settings import Settings
from ttspec.vllm.v1 import teaches
from ttspec.vllm.verified import EngineStep
from ttspec.vllm.workers import asked_of


def source_tree(folder: Path, version: str = "0.33.0") -> Path:
    """Files that have every hook of the table, and nothing else."""
    (folder / "_version.py").parent.mkdir(parents=True, exist_ok=True)
    (folder / "_version.py").write_text(f"__version__ = version = '{version}'\n")
    owners: dict[str, dict[str, list[hooks.Hook]]] = {}
    for hook in {h for table in hooks.HOOKS.values() for h in table}:
        owners.setdefault(hook.file, {}).setdefault(hook.owner, []).append(hook)
    for name, classes in owners.items():
        text = ""
        for owner, methods in classes.items():
            text += f"class {owner}:\n"
            for m in methods:
                text += f"    def {m.name}(self, {', '.join(m.arguments)}): ...\n"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_an_engine_with_all_hooks_of_a_known_version_fits(tmp_path: Path) -> None:
    folder = source_tree(tmp_path)
    assert hooks.version_of(folder) == "0.33.0"
    assert hooks.unknown_version("0.33.0") is None
    assert hooks.missing_hooks(folder, "V1") == hooks.missing_hooks(folder, "V2") == []


@pytest.mark.parametrize("version", ["0.34.0", "0.25.1", "0.3", "0.330", "1.30.0", "dev", ""])
def test_another_version_does_not_fit(version: str) -> None:
    assert "is not one of 0.26 to 0.33" in (hooks.unknown_version(version) or "")


@pytest.mark.parametrize("version", ["0.26.0", "0.27.1", "0.30.0.post1", "0.32.0+cpu", "0.33"])
def test_versions_from_the_oldest_to_the_newest_fit(version: str) -> None:
    assert hooks.unknown_version(version) is None


def test_a_missing_method_or_argument_is_named(tmp_path: Path) -> None:
    folder = source_tree(tmp_path)
    file = folder / hooks.V1_FILE
    file.write_text(file.read_text().replace("_sample(self, logits, ", "_sample(self, scores, "))
    assert hooks.missing_hooks(folder, "V1") == [
        "argument logits of GPUModelRunner._sample in vllm/v1/worker/gpu_model_runner.py"
    ]
    (folder / hooks.V2_SPECULATOR).unlink()
    assert hooks.missing_hooks(folder, "V2") == [
        "BaseSpeculator.propose in vllm/v1/worker/gpu/spec_decode/speculator.py"
    ]


def config(**changes: object) -> SimpleNamespace:
    """The parts of a `VllmConfig` that are asked."""
    speculative = {"method": "eagle3", "draft_model_config": SimpleNamespace(quantization=None)}
    parallel = {"pipeline_parallel_size": 1}
    top = {"lora_config": None, "model_config": SimpleNamespace()}
    for name, value in changes.items():
        table = next((t for t in (parallel, top) if name in t), speculative)
        (parallel if name.startswith(("prefill", "enable_batch")) else table)[name] = value
    return SimpleNamespace(
        speculative_config=SimpleNamespace(**speculative),
        parallel_config=SimpleNamespace(**parallel),
        **top,
    )


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("method", "ngram", "ngram drafts otherwise"),
        ("rejection_sample_method", "fly", "lossy"),
        ("draft_model_config", SimpleNamespace(quantization="fp8"), "quantised"),
        ("use_heterogeneous_vocab", True, "another vocabulary"),
        ("disable_padded_drafter_batch", True, "verdicts"),
        ("lora_config", object(), "LoRA"),
        ("pipeline_parallel_size", 2, "pipeline stage"),
        ("prefill_context_parallel_size", 2, "context parallelism"),
        ("enable_batch_sharded_sampling", True, "splits the logits"),
        ("model_config", SimpleNamespace(enable_sleep_mode=True), "sleep mode"),
        ("model_config", SimpleNamespace(uses_mrope=True), "several dimensions"),
    ],
)
def test_where_it_must_not_learn_one_sentence_says_why(name, value, reason) -> None:
    assert hooks.unfit_config(config()) is None
    said = hooks.unfit_config(config(**{name: value}))
    assert said is not None
    assert reason in said


def test_without_a_drafter_there_is_nothing_to_learn() -> None:
    nothing = SimpleNamespace(speculative_config=None, parallel_config=None)
    assert "--speculative-config" in (hooks.unfit_config(nothing) or "")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"row": 3}, "ttspec.row is no setting"),
        ({"rows": 0}, "ttspec.rows is 0"),
        ({"share": 0}, "ttspec.share is 0"),
        ({"tokens": "many"}, "ttspec.tokens is 'many'"),
        ({"learn": {"lr": -1}}, "learn.lr is -1"),
        ({"learn": {"speed": 1}}, "learn.speed is no option"),
        ({"learn": {"scope": "request"}}, "allowed is shared"),
        ({"learn": 3}, "ttspec.learn is 3"),
        ({"learn": False}, "ttspec.learn is False"),
        ({"rows": True}, "ttspec.rows is True"),
        ({"share": True}, "ttspec.share is True"),
        ({"learn": {"supervision": "block"}}, "allowed is hindsight"),
        ("yes", "ttspec is 'yes'; allowed is a table"),
    ],
)
def test_a_wrong_setting_is_named(given, said: str) -> None:
    with pytest.raises(OptionError, match=re.escape(said)):
        Settings.of(given)


@pytest.mark.parametrize(
    ("additional", "asked"),
    [({}, None), (None, None), ({"ttspec": False}, None), ({"ttspec": {}}, {}), ({"a": 1}, None)],
)
def test_only_who_asked_for_ttspec_gets_it(additional, asked) -> None:
    assert asked_of(SimpleNamespace(additional_config=additional)) == asked
    assert Settings.of(True) == Settings.of({})


def test_settings_are_no_larger_than_the_engine() -> None:
    settings = Settings.of({"rows": 4, "learn": {"stride": 3}}).for_engine(2, 512)
    assert (settings.rows, settings.tokens, settings.learn.stride) == (2, 512, 3)


def test_only_plain_requests_that_did_not_refuse_teach() -> None:
    def sampling(**extra):
        return SimpleNamespace(structured_outputs=None, extra_args=None, **extra)

    assert teaches(sampling(), None, False)
    assert not teaches(None, None, False)
    assert not teaches(sampling(), object(), False)
    assert not teaches(sampling(), None, True)
    refuses, grammar = sampling(), sampling()
    refuses.extra_args, grammar.structured_outputs = {"ttspec": 0}, object()
    assert not teaches(refuses, None, False)
    assert not teaches(grammar, None, False)


def hooked(runner: SimpleNamespace, learning: SimpleNamespace, front_end) -> list[hooks.Replaced]:
    """The hooks of a front end, in place."""
    found = front_end.hooks_of(runner, learning)
    for hook in found:
        hook.replace()
    return found


class Runner:
    """As much of both model runners as is replaced."""

    def __init__(self) -> None:
        self.speculator = type("Speculator", (), {"propose": lambda *_, **__: "drafts"})()
        self.rejection_sampler = "vLLM's"

    def called(self, *_: object, **__: object) -> None: ...

    _update_states = _sample = propose_draft_token_ids = called
    finish_requests = add_requests = sample = called


@pytest.mark.parametrize("front_end", [v1, v2])
def test_nothing_is_in_place_while_learning_is_paused_or_has_ended(monkeypatch, front_end) -> None:
    learning = plugin.WorkerLearning.__new__(plugin.WorkerLearning)
    learning.runner, learning._hooks_of, learning._hooks = Runner(), front_end.hooks_of, []
    learning.log, learning.rank, learning.state = SimpleNamespace(warning=print), 0, "learning"
    learning._all_learn = learning._sends = False
    monkeypatch.setattr(learning, "write_status", lambda: None)
    owners = learning.runner, learning.runner.speculator
    before = [dict(vars(owner)) for owner in owners]

    def in_place() -> int:
        now = [dict(vars(owner)) for owner in owners]
        return sum(len(n.items() ^ b.items()) > 0 for n, b in zip(now, before, strict=True))

    learning._hook()
    assert in_place()
    learning.pause()
    assert learning.state == "paused"
    assert not in_place()
    learning.resume()
    learning.resume()
    assert in_place()
    learning.stop("it failed")
    assert not in_place()
    learning._all_learn = True  # others go on, and ask this rank at each step they count
    learning.resume()
    assert learning.state == "off"
    assert in_place()
    learning.stop("it failed again")
    assert in_place()
    learning.pause()
    assert not in_place()


def test_v2_does_not_let_requests_teach_that_it_did_not_see_come() -> None:
    runner, learning = Runner(), SimpleNamespace(run=lambda work: None)
    in_place = hooked(runner, learning, v2)

    def come(*ids: str) -> None:
        sampling = SimpleNamespace(extra_args=None, structured_outputs=None)
        new = {"sampling_params": sampling, "lora_request": None}
        new |= {"mm_features": [], "prompt_embeds": None}
        requests = [SimpleNamespace(req_id=name, **new) for name in ids]
        runner.add_requests(SimpleNamespace(scheduled_new_reqs=requests))

    come("a", "b", "_made up")
    runner.finish_requests(SimpleNamespace(finished_req_ids={"b"}, preempted_req_ids=None))
    assert [name for name in ("a", "b", "_made up") if learning.may_teach(name)] == ["a"]
    for hook in in_place:
        hook.put_back()
    come("c")
    hooked(runner, learning, v2)
    come("d")
    assert [name for name in "abcd" if learning.may_teach(name)] == ["d"]


def test_v2_tells_of_steps_that_were_sampled_and_of_no_others() -> None:
    steps: list[EngineStep] = []

    def propose(input_batch, last_hidden_states, aux_hidden_states, num_sampled, dummy_run=False):
        return "drafts"

    learner = SimpleNamespace(absorb=lambda make: steps.append(make()))
    learning = SimpleNamespace(
        is_reading=False,
        run=lambda work: work(learner),
        end_step=lambda drafts: None,
    )
    runner = SimpleNamespace(
        finish_requests=None,
        add_requests=None,
        sample=lambda *given: given,
        speculator=SimpleNamespace(propose=propose),
        rejection_sampler=None,
    )
    hooked(runner, learning, v2)
    batch = SimpleNamespace(
        num_reqs=2,
        req_ids=["a", "b"],
        query_start_loc_np=np.array([0, 4, 9, 9]),
        num_draft_tokens_per_req=np.array([3, 0, 0]),
        seq_lens_cpu_upper_bound=torch.tensor([14, 5, 0]),
        input_ids=torch.arange(9),
        positions=torch.arange(9),
    )
    emitted, features = torch.tensor([2, 1]), [torch.zeros(9, 4)]
    runner.speculator.propose(batch, "hidden", features, emitted)  # warms up: nothing was sampled
    for options in ({}, {"dummy_run": True}, {"num_sampled": emitted}):
        runner.sample("hidden", batch)
        given = (batch, "hidden", features, emitted)[: 4 - ("num_sampled" in options)]
        assert runner.speculator.propose(*given, **options) == "drafts"
    assert len(steps) == 2
    for step in steps:
        assert (step.ids, step.bounds, step.drafts) == (["a", "b"], [0, 4, 9], [3, 0])
        assert step.ends[:2].tolist() == [14, 5]
        assert step.emitted is emitted
        assert step.features is features


def test_v1_tells_of_its_steps_however_their_arguments_are_given() -> None:
    steps: list[EngineStep] = []
    said: list[list[int]] = []

    def propose(scheduler_output, sampled_token_ids, aux_hidden_states, spec_decode_metadata):
        return "drafts"

    learner = SimpleNamespace(absorb=lambda make: steps.append(make()))
    learning = SimpleNamespace(run=lambda work: work(learner), end_step=said.append)
    runner = SimpleNamespace(
        _update_states=None,
        _sample=None,
        propose_draft_token_ids=propose,
        input_batch=SimpleNamespace(num_reqs=2, req_ids=["a", "b", "gone"]),
        optimistic_seq_lens_cpu=torch.tensor([14, 5, 0]),
        input_ids=SimpleNamespace(gpu=torch.arange(9)),
        _get_positions=torch.arange,
    )
    hooked(runner, learning, v1)
    scheduled = SimpleNamespace(num_scheduled_tokens={"b": 5, "a": 4})
    sampled, features = torch.tensor([[7, 8, -1], [9, -1, -1]]), [torch.zeros(9, 4)]
    for metadata in (SimpleNamespace(num_draft_tokens=[3, 0]), None):
        given = (scheduled, sampled, features)
        assert runner.propose_draft_token_ids(*given, spec_decode_metadata=metadata) == "drafts"
    assert said == [[3, 0], []]
    assert [step.drafts for step in steps] == [[3, 0], [0, 0]]
    for step in steps:
        assert (step.ids, step.bounds) == (["a", "b"], [0, 4, 9])
        assert step.ends[:2].tolist() == [14, 5]
        assert step.emitted.tolist() == [2, 1]
        assert len(step.positions) == 9
        assert step.features is features


class Fused(nn.Module):
    """Makes one tensor of its weights at every load, as vLLM's DFlash does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.weight = nn.Parameter(torch.zeros(2, 3))
        self.inner.fused = torch.zeros(4, 3)

    @torch.no_grad()
    def load_weights(self, weights) -> None:
        for name, weight in weights:
            self.get_parameter(name).copy_(weight)
        self.inner.fused = self.inner.weight.detach().repeat(2, 1)


def test_new_weights_reach_the_tensors_that_a_graph_has_captured() -> None:
    module = Fused()
    weight, fused = module.inner.weight.data_ptr(), module.inner.fused.data_ptr()
    new = torch.arange(6.0).view(2, 3)
    load_in_place(module, {"inner.weight": new})
    assert module.inner.weight.data_ptr() == weight
    assert module.inner.fused.data_ptr() == fused
    assert torch.equal(module.inner.fused, torch.cat([new, new]))


@pytest.mark.parametrize("which", ["eagle3", "dflash", "causal"])
def test_tables_that_are_the_targets_are_never_given_to_vllm(which: str) -> None:
    drafter = bound_kind(which)
    for weights in ("full", "lora"):
        names = learned_names(drafter, LearnConfig(weights=weights, parameters="full"))
        assert names
        assert all(n in drafter.weights for n in names)
        assert not any("embed_tokens" in n or "lm_head" in n or "d2t" in n for n in names)


def test_ranks_send_weights_as_one_row() -> None:
    weights = {"a": torch.randn(2, 3), "b": torch.randn(4)}
    shapes = {n: tuple(w.shape) for n, w in weights.items()}
    back = unflattened(flat(weights, torch.float32), list(weights), shapes)
    assert all(torch.equal(back[n], w) for n, w in weights.items())


@pytest.mark.slow
def test_ttspec_and_its_entry_point_import_no_vllm() -> None:
    code = "import ttspec, ttspec.vllm, ttspec.vllm.steps, sys; print('vllm' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert out.stdout.split() == [b"False"]
