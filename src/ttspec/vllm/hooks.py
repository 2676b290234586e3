"""What the plugin takes hold of in vLLM, by version, and how; and where it must not learn.

The table was read in the sources of the versions named. It is compared with the sources that are
installed, before anything is wrapped: a name or an argument that is missing is said by name.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

OLDEST, NEWEST = (0, 26), (0, 33)
"""Versions whose hooks are known, and all between; the third number may be any."""
METHODS = ("eagle3", "dflash", "draft_model")
"""`method` of a speculative config whose drafter can learn here."""


@dataclass(frozen=True, slots=True)
class Hook:
    """A method of vLLM, and the arguments that are asked of it by name."""

    file: str
    owner: str
    name: str
    arguments: tuple[str, ...] = ()

    def __str__(self) -> str:
        """How a message names it."""
        return f"{self.owner}.{self.name} in vllm/{self.file}"


def _in_file(file: str, *methods: str) -> tuple[Hook, ...]:
    """Hooks of one file, written as `Owner.method(argument, ...)`."""
    words = [re.findall(r"\w+", method) for method in methods]
    return tuple(Hook(file, owner, name, tuple(arguments)) for owner, name, *arguments in words)


V1_FILE, V2_FILE = "v1/worker/gpu_model_runner.py", "v1/worker/gpu/model_runner.py"
V2_SAMPLER = "v1/worker/gpu/spec_decode/rejection_sampler.py"
V2_SPECULATOR = "v1/worker/gpu/spec_decode/speculator.py"
WORKERS = _in_file(
    "v1/worker/worker_base.py",
    "WorkerWrapperBase.init_device()",
    "WorkerBase.compile_or_warm_up_model()",
    "WorkerBase.shutdown()",
)
HOOKS: dict[str, tuple[Hook, ...]] = {
    "V1": WORKERS
    + _in_file(
        V1_FILE,
        "GPUModelRunner.load_model()",
        "GPUModelRunner.get_draft_model()",
        "GPUModelRunner._get_positions(num_tokens)",
        "GPUModelRunner._update_states(scheduler_output)",
        "GPUModelRunner._sample(logits, spec_decode_metadata)",
        "GPUModelRunner.propose_draft_token_ids"
        "(scheduler_output, sampled_token_ids, aux_hidden_states, spec_decode_metadata)",
    ),
    "V2": WORKERS
    + _in_file(
        V2_FILE,
        "GPUModelRunner.load_model()",
        "GPUModelRunner.get_draft_model()",
        "GPUModelRunner.finish_requests(scheduler_output)",
        "GPUModelRunner.add_requests(scheduler_output)",
        "GPUModelRunner.sample(hidden_states, input_batch)",
    )
    + _in_file(V2_SAMPLER, "RejectionSampler.__call__(logits, input_batch, draft_logits)")
    + _in_file(
        V2_SPECULATOR,
        "BaseSpeculator.propose(input_batch, aux_hidden_states, num_sampled, dummy_run)",
    ),
}
"""By model runner."""


class Replaced:
    """An attribute of one of vLLM's objects, replaced until it is put back."""

    def __init__(self, owner: Any, name: str, new: Any) -> None:
        self._owner, self._name, self._new = owner, name, new
        self._before = vars(owner).get(name)

    def replace(self) -> None:
        """Let the new one be called."""
        vars(self._owner)[self._name] = self._new

    def put_back(self) -> None:
        """Let the owner be as it was; a method is its class's again."""
        del vars(self._owner)[self._name]
        if self._before is not None:
            vars(self._owner)[self._name] = self._before


def vllm_folder() -> Path | None:
    """Where vLLM is installed; nothing of it is imported."""
    spec = find_spec("vllm")
    places = spec.submodule_search_locations if spec else None
    return Path(next(iter(places))) if places else None


def version_of(folder: Path) -> str:
    """The version that vLLM's own files name; empty if they name none."""
    file = folder / "_version.py"
    text = file.read_text("utf-8") if file.is_file() else ""
    found = re.search(r"^__version__ = .*?'([^']+)'", text, re.MULTILINE)
    return found[1] if found else ""


def unknown_version(version: str) -> str | None:
    """Why a version is not one whose hooks are known; None if it is."""
    found = re.match(r"(\d+)\.(\d+)(?!\d)", version)
    if found and OLDEST <= (int(found[1]), int(found[2])) <= NEWEST:
        return None
    known = " to ".join(f"{first}.{second}" for first, second in (OLDEST, NEWEST))
    return f"vLLM {version or 'of no version'} is not one of {known}"


def missing_hooks(folder: Path, runner: str) -> list[str]:
    """What the installed vLLM has not, of what one of its two model runners must have."""
    methods = {file: _methods(folder / file) for file in {hook.file for hook in HOOKS[runner]}}
    found: list[str] = []
    for hook in HOOKS[runner]:
        arguments = methods[hook.file].get((hook.owner, hook.name))
        if arguments is None:
            found.append(str(hook))
        else:
            found += [f"argument {a} of {hook}" for a in hook.arguments if a not in arguments]
    return found


def _methods(file: Path) -> dict[tuple[str, str], set[str]]:
    """Names of the arguments of all methods in a source file, by class and method."""
    classes = ast.parse(file.read_text("utf-8")).body if file.is_file() else []
    return {
        (owner.name, method.name): {a.arg for a in ast.walk(method.args) if isinstance(a, ast.arg)}
        for owner in classes
        if isinstance(owner, ast.ClassDef)
        for method in owner.body
        if isinstance(method, ast.FunctionDef)
    }


def unfit_engine(config: Any, runner: str) -> str | None:
    """Why the engine that runs here, of this `VllmConfig`, must not learn; None if it may."""
    folder = vllm_folder()
    assert folder is not None
    if unknown := unknown_version(version_of(folder)):
        return unknown
    if missing := missing_hooks(folder, runner):
        return f"this vLLM has no {missing[0]}"
    return unfit_config(config)


def unfit_config(config: Any) -> str | None:
    """Why an engine of this `VllmConfig` must not learn; None if it may.

    What a version of vLLM does not have yet, or no more, is not asked of it.
    """
    speculative = config.speculative_config
    if speculative is None:
        return "there is no --speculative-config, so no drafter"
    if speculative.method not in METHODS:
        return f"method {speculative.method} drafts otherwise than {', '.join(METHODS)}"
    drafter, model = speculative.draft_model_config, config.model_config
    parallel = config.parallel_config
    fits: tuple[tuple[Any, str, Any, str], ...] = (
        (speculative, "rejection_sample_method", "standard", "rejection_sample_method is lossy"),
        (speculative, "use_heterogeneous_vocab", False, "the drafter has another vocabulary"),
        (speculative, "disable_padded_drafter_batch", False, "unpadded drafts hide the verdicts"),
        (drafter, "quantization", None, "a quantised drafter cannot be written in place"),
        (config, "lora_config", None, "LoRA changes the target request by request"),
        (parallel, "pipeline_parallel_size", 1, "no pipeline stage has embedding and head"),
        (parallel, "prefill_context_parallel_size", 1, "context parallelism splits the features"),
        (parallel, "enable_batch_sharded_sampling", False, "sharded sampling splits the logits"),
        (model, "enable_sleep_mode", False, "sleep mode may drop the drafter's weights"),
        (model, "uses_mrope", False, "the target counts positions in several dimensions"),
    )
    """Where, what, how it must be, and why."""
    for where, name, must_be, reason in fits:
        if getattr(where, name, must_be) not in (must_be, None):
            return f"{reason} ({name})"
    return None
