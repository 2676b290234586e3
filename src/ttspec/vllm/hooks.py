"""What the plugin takes hold of in vLLM, by version; and where it must not learn.

The table was read in the sources of the versions named. It is compared with the sources that are
installed, before anything is wrapped: a name or an argument that is missing is said by name.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

VERSIONS = ("0.26", "0.32", "0.33")
"""Whose hooks are known; the third number may be any."""
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


V1_FILE, V2_FILE = "v1/worker/gpu_model_runner.py", "v1/worker/gpu/model_runner.py"
V2_SPECULATOR = "v1/worker/gpu/spec_decode/speculator.py"
WORKERS = (
    Hook("v1/worker/worker_base.py", "WorkerWrapperBase", "init_device"),
    Hook("v1/worker/worker_base.py", "WorkerBase", "compile_or_warm_up_model"),
    Hook("v1/worker/worker_base.py", "WorkerBase", "shutdown"),
)
HOOKS: dict[str, tuple[Hook, ...]] = {
    "V1": (
        *WORKERS,
        Hook(V1_FILE, "GPUModelRunner", "load_model"),
        Hook(V1_FILE, "GPUModelRunner", "get_draft_model"),
        Hook(V1_FILE, "GPUModelRunner", "_get_positions", ("num_tokens",)),
        Hook(V1_FILE, "GPUModelRunner", "_update_states", ("scheduler_output",)),
        Hook(V1_FILE, "GPUModelRunner", "_sample", ("logits", "spec_decode_metadata")),
        Hook(
            V1_FILE,
            "GPUModelRunner",
            "propose_draft_token_ids",
            ("scheduler_output", "sampled_token_ids", "aux_hidden_states", "spec_decode_metadata"),
        ),
    ),
    "V2": (
        *WORKERS,
        Hook(V2_FILE, "GPUModelRunner", "load_model"),
        Hook(V2_FILE, "GPUModelRunner", "get_draft_model"),
        Hook(V2_FILE, "GPUModelRunner", "finish_requests", ("scheduler_output",)),
        Hook(V2_FILE, "GPUModelRunner", "add_requests", ("scheduler_output",)),
        Hook(V2_FILE, "GPUModelRunner", "sample", ("hidden_states", "input_batch")),
        Hook(
            "v1/worker/gpu/spec_decode/rejection_sampler.py",
            "RejectionSampler",
            "__call__",
            ("logits", "input_batch", "draft_logits"),
        ),
        Hook(
            V2_SPECULATOR,
            "BaseSpeculator",
            "propose",
            ("input_batch", "aux_hidden_states", "num_sampled", "dummy_run"),
        ),
    ),
}
"""By model runner."""


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
    if any(version == known or version.startswith(known + ".") for known in VERSIONS):
        return None
    return f"vLLM {version or 'of no version'} is not one of {', '.join(VERSIONS)}"


def missing_hooks(folder: Path, runner: str) -> list[str]:
    """What the installed vLLM has not, of what one of its two model runners must have."""
    found: list[str] = []
    for hook in HOOKS[runner]:
        arguments = _arguments(folder / hook.file, hook)
        if arguments is None:
            found.append(str(hook))
        found += [
            f"argument {a} of {hook}" for a in hook.arguments if arguments and a not in arguments
        ]
    return found


def _arguments(file: Path, hook: Hook) -> list[str] | None:
    """Names of a method's arguments, in the source; None if there is no such method."""
    if not file.is_file():
        return None
    for owner in ast.parse(file.read_text("utf-8")).body:
        if isinstance(owner, ast.ClassDef) and owner.name == hook.owner:
            for method in owner.body:
                if isinstance(method, ast.FunctionDef) and method.name == hook.name:
                    given = method.args
                    return [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return None


def unfit_config(config: Any) -> str | None:
    """Why an engine of this `VllmConfig` must not learn; None if it may.

    What a version of vLLM does not have yet, or no more, is not asked of it.
    """
    speculative, parallel = config.speculative_config, config.parallel_config
    if speculative is None:
        return "there is no --speculative-config, so no drafter"
    if speculative.method not in METHODS:
        return f"method {speculative.method} drafts otherwise than {', '.join(METHODS)}"
    model = speculative.draft_model_config
    found: Iterable[tuple[bool, str]] = (
        (
            getattr(speculative, "rejection_sample_method", "standard") != "standard",
            "rejection_sample_method is not standard: it is lossy",
        ),
        (
            bool(getattr(model, "quantization", None)),
            "the drafter is quantised: its weights cannot be written in place",
        ),
        (
            bool(getattr(speculative, "use_heterogeneous_vocab", False)),
            "the drafter has another vocabulary than the target",
        ),
        (
            bool(getattr(speculative, "disable_padded_drafter_batch", False)),
            "disable_padded_drafter_batch hides the verdicts",
        ),
        (config.lora_config is not None, "LoRA changes the target request by request"),
        (parallel.pipeline_parallel_size > 1, "of pipeline stages, none has embedding and head"),
        (
            getattr(parallel, "prefill_context_parallel_size", 1) > 1,
            "prefill context parallelism splits the features",
        ),
        (
            bool(getattr(parallel, "enable_batch_sharded_sampling", None)),
            "batch-sharded sampling splits the logits",
        ),
        (
            bool(getattr(config.model_config, "enable_sleep_mode", False)),
            "sleep mode may drop the drafter's weights",
        ),
        (
            bool(getattr(config.model_config, "uses_mrope", False)),
            "the target counts positions in several dimensions",
        ),
    )
    return next((reason for unfit, reason in found if unfit), None)
