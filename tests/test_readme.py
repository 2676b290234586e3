"""The pages that strangers read: their commands run, and what they name exists."""

import contextlib
import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from conftest import SHAPE, byte_tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import ttspec
from ttspec.bench.arms import parse_arms
from ttspec.cli import COMMANDS, app, main
from ttspec.cli.check import tie_margin
from ttspec.decoding.engine import Engine

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "findings/README.md"]
PAGES += sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))
LOG = "docs/experiments.md"
"""Says what was true at the time, with the names of the time."""
NOW = [page for page in PAGES if page != LOG]
GROUPS = {
    "bench": ("run", "report", "compare", "replay"),
    "learned": ("list", "show", "export", "revert"),
}
OTHERS = {
    "--no-deps",  # pip
    "--per-request-spec-decode-metrics",  # vllm serve
    "--model",  # vllm serve
    "--additional-config",
    "--speculative-config",
    "--worker-extension-cls",
    "--small",  # benchmarks/headline.py
    "--random-weights",  # benchmarks/roofline.py
    "--accept",
    "--help",
}
"""Options of other programs than `ttspec`."""
SMALL = {
    "generate": ["--max-new-tokens", "8"],
    "chat": ["--max-new-tokens", "8"],
    "check": ["--max-new-tokens", "8"],
    "demo": ["--tokens", "30", "--out", "runs/demo"],
    "bench run": ["--requests", "2", "--max-new-tokens", "8", "--dtype", "float32"],
    "train": ["--max-length", "48", "--max-answer", "16", "--epochs", "1", "--batch", "2"],
}
"""What keeps a command short, by its name."""


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    every = re.findall(r"^```(\w*)\n(.*?)^```$", text_of(page), re.M | re.S)
    return [block for found, block in every if found == language]


def shell_lines(page: str) -> list[list[str]]:
    """The words of every command line of a page, comments apart."""
    lines = "".join(blocks(page, "sh")).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def ttspec_lines(page: str) -> list[list[str]]:
    return [words[1:] for words in shell_lines(page) if words[0] == "ttspec"]


def name_of(words: list[str]) -> str:
    """`generate`, `bench run` and so on."""
    return " ".join(words[: 2 if words[0] in ("bench", "vllm") else 1])


def headings(page: Path) -> set[str]:
    """The anchors that a page's headings make."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


# Names


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        assert there.exists(), link
        if anchor:
            assert anchor in headings(there), link


@pytest.mark.parametrize("page", NOW)
def test_paths_exist(page: str) -> None:
    rooms = "src|docs|tests|scripts|benchmarks|findings"
    for path in re.findall(rf"(?<![\w./])((?:{rooms})/[\w./*+-]*\w)", text_of(page)):
        if not re.search(r"\b(NAME|PATH|FILE)\b", path):
            assert list(ROOT.glob(path)), path


def test_the_map_of_the_rooms_names_files_that_exist() -> None:
    (rooms,) = re.findall(r"^src/ttspec/\n.*?^```$", text_of("docs/how-it-works.md"), re.M | re.S)
    named = re.findall(r"\b[a-z][a-z0-9_]*\.py\b", rooms)
    assert len(named) > 30
    there = {path.name for path in (ROOT / "src").rglob("*.py")}
    assert [name for name in named if name not in there] == []


@pytest.fixture(scope="module")
def options() -> set[str]:
    """Every option of every command."""
    found = set(OTHERS)
    every = [[name] for name in COMMANDS] + [
        [group, name] for group, names in GROUPS.items() for name in names
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "400")  # no name is broken
        for command in every:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                assert main([*command, "--help"]) == 0
            found |= set(re.findall(r"--[a-z][\w.-]*\w", out.getvalue()))
    return found


@pytest.mark.parametrize("page", NOW)
def test_options_exist(page: str, options: set[str]) -> None:
    text = re.sub(r"--(draft|learn)\.OPTION", "", text_of(page))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9.-]*[a-z0-9]", text))
    assert sorted(named - options) == []


@pytest.mark.parametrize("page", NOW)
def test_commands_are_understood(page: str) -> None:
    makefile = text_of("Makefile")
    for words in shell_lines(page):
        if words[0] == "make":
            assert f"\n{words[1]}: " in makefile, words
        elif words[0] == "ttspec":
            app.parse_args(words[1:], exit_on_error=False, print_error=False)
            if "--arms" in words:
                assert parse_arms(words[words.index("--arms") + 1])
        else:
            assert words[:2] == ["pip", "install"], words


def test_options_in_brackets_exist() -> None:
    for page in NOW:
        for arm in re.findall(r"`((?:static|learn)[a-z-]*\[[^]`]*\])`", text_of(page)):
            assert parse_arms(arm)


# The README


def test_the_readme_is_short() -> None:
    lines = text_of("README.md").splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 110] == []


def test_the_commands_of_the_readme_run(pair, monkeypatch, tmp_path, capsys) -> None:
    """All of them, in order, on a toy pair in an empty folder; training needs a deeper toy."""
    monkeypatch.chdir(tmp_path)
    run_all([w for w in ttspec_lines("README.md") if w[0] not in ("train", "export")], pair)
    assert (tmp_path / "runs/mine/report/index.html").is_file()
    assert (tmp_path / "learned/config.json").is_file()
    assert "acceptance" in capsys.readouterr().out


def test_the_readme_trains_and_exports(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        deep = LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": 6}))
    deep.save_pretrained("deep")
    byte_tokenizer().save_pretrained("deep")
    prompts = [json.dumps({"prompt": text}) for text in ("hello", "count to ten", "a b c", "why")]
    Path("prompts.jsonl").write_text("\n".join(prompts) + "\n")
    lines = [w for w in ttspec_lines("README.md") if w[0] in ("train", "export")]
    assert len(lines) == 2
    run_all(lines, ["--target", "deep", "--drafter", "none"])
    assert (tmp_path / "for-vllm/config.json").is_file()


def run_all(lines: list[list[str]], pair: list[str]) -> None:
    """Run command lines on a toy pair, few tokens each."""
    _, target, _, drafter, *_ = pair
    assert lines
    for words in lines:
        filled = [{"TARGET": target, "DRAFTER": drafter}.get(word, word) for word in words]
        filled += SMALL.get(name_of(words), [])
        if words[0] in ("generate", "chat", "check", "demo") and "--target" not in words:
            filled += pair
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO("hello\n"))
            code = main(filled)
        assert code == 0 or (words[0] == "doctor" and code == 1), words  # a toy may get warnings


@pytest.mark.parametrize("page", ["README.md", "docs/learning.md"])
def test_python_blocks_run(page: str, pair, monkeypatch, capsys) -> None:
    _, target, _, drafter, *_ = pair
    load = ttspec.load
    monkeypatch.setattr(ttspec, "load", lambda name: load(target, drafter, dtype="float32"))
    found = blocks(page, "python")
    assert found
    for block in found:
        exec(re.sub(r"max_new_tokens=\d+", "max_new_tokens=12", block), {})
    assert capsys.readouterr().out


def gaps(engine: Engine, prompt: str, answer: str) -> Tensor:
    """By how much each token of an answer, its end too, is less likely than the likeliest one."""
    chat = engine.tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
    )
    said = [*engine.tokenizer(answer)["input_ids"], engine.tokenizer.eos_token_id]
    with torch.no_grad():
        logits = engine.target.model(torch.tensor([[*chat, *said]])).logits[0, -len(said) - 1 : -1]
    return logits.amax(-1) - logits.gather(-1, torch.tensor(said)[:, None])[:, 0]


@pytest.mark.slow
@pytest.mark.weights
def test_the_first_command_prints_what_the_readme_says(smollm2_dir, capsys) -> None:
    """Every word; in bfloat16 rounding may choose between two that are as likely."""
    words = ttspec_lines("README.md")[0]
    assert main(words) == 0
    printed = capsys.readouterr().out.strip()
    shown = next(b for b in blocks("README.md", "") if "tokens/s" in b)
    *answer, figures = shown.strip().splitlines()
    assert printed.split()[:10] == " ".join(answer).split()[:10]
    engine = ttspec.load("smollm2-135m", None, dtype="float32")
    for text in (printed, " ".join(answer)):
        assert gaps(engine, words[1], text).max() < tie_margin("bfloat16")
    assert len(gaps(engine, words[1], " ".join(answer))) == int(figures.split()[0])
    wrong = printed.replace("salty", "sweet", 1)
    assert gaps(engine, words[1], wrong).max() > 3 * tie_margin("bfloat16")
    copied = r"\d+ tokens · \d+ copied · [\d.]+ tokens/s · acceptance length .*updates"
    assert re.fullmatch(copied, figures)


@pytest.mark.slow
@pytest.mark.weights
def test_the_python_of_the_readme_runs(smollm2_dir, capsys) -> None:
    for block in blocks("README.md", "python"):
        exec(block, {})
    assert capsys.readouterr().out


# Its figures


def rows(page: str) -> dict[str, list[str]]:
    """The cells of every table row of a page, by the first cell."""
    lines = [line for line in text_of(page).splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in cells}


@pytest.mark.parametrize("kind", ["DFlash", "EAGLE-3", "PARD"])
def test_acceptance_in_the_readme_is_that_of_the_committed_runs(kind: str) -> None:
    path = ROOT / "docs/results/headline/temperature-0.7/summary.json"
    summary = json.loads(path.read_text(encoding="utf-8"))
    name, past, little = kind.lower().replace("-", ""), "past 1,024", None
    values = {
        arm.partition(": ")[2]: one["stretches"][past]["value"]
        for arm, one in summary["arms"].items()
        if arm.startswith(f"{name}: ")
    }
    cures = {arm: value for arm, value in values.items() if arm.startswith("static-")}
    best = max(cures, key=lambda arm: cures[arm])
    (learning,) = (value for arm, value in values.items() if arm.startswith("learn"))
    (pair,) = (
        one["stretches"]
        for one in summary["pairs"]
        if one["arm"].startswith(f"{name}: learn") and one["against"] == f"{name}: {best}"
    )
    little = next(stretch for stretch in pair if "little" in stretch)
    wanted = [f"{value:.3f}" for value in (values["static"], cures[best], learning)]
    wanted += [interval(pair[stretch]["ratio"], 3) for stretch in (past, little)]
    assert rows("README.md")[kind] == wanted


@pytest.mark.parametrize(
    ("where", "file"),
    [
        ("SmolLM2-135M, DFlash (bundled)", "smollm2-135m-dflash-one-text"),
        ("SmolLM2-135M, EAGLE-3 (bundled)", "smollm2-135m-eagle3-one-text"),
        ("Qwen2.5-Coder-0.5B, EAGLE-3", "qwen2.5-coder-0.5b-eagle3-one-text"),
        ("Qwen2.5-Coder-0.5B, DFlash", "qwen2.5-coder-0.5b-dflash-one-text"),
    ],
)
def test_speed_in_the_readme_is_that_of_the_committed_runs(where: str, file: str) -> None:
    report = text_of(f"docs/results/policy/speed-{file}.txt")
    found = re.findall(r"^(\S+) +([\d.]+) \[[\d., ]+\] +\d+  ", report, re.M)
    speeds = {arm: f"{round(float(speed)):,}" for arm, speed in found}
    arms = ("plain", "ngram", "static", "static-copy", "default")
    assert rows("README.md")[where] == [speeds[arm] for arm in arms]


def test_speed_in_the_results_is_that_of_the_committed_runs() -> None:
    arms = {"low-rank changes": "[weights=lora]", "window 512, 16 blocks": "[window=512,blocks=16]"}
    found = {k: v for k, v in rows("docs/results.md").items() if v[-1].startswith("`speed")}
    assert len(found) == 8
    for where, (plain, static, learning, *ratios, file) in found.items():
        count, _, which = where.split(", ", 2)
        ((_, run),) = json.loads(text_of(f"docs/results/gpu/{file.strip('`')}")).items()
        measured = run[count]["arms"]
        learned = measured["learn-session" + arms.get(which, "")]
        everything = (measured.get("plain"), measured["static"], learned)
        speeds = [
            f"{arm['all']['tokens_per_second']['value']:,.0f}" if arm else "–" for arm in everything
        ]
        assert [plain, static, learning] == speeds, where
        stretches = (learned[stretch]["against static"] for stretch in ("all", "past_1000"))
        assert ratios == [interval(ratio, 2) for ratio in stretches], where


def interval(ratio: dict[str, float] | None, places: int) -> str:
    if ratio is None:
        return ""
    text = f"{ratio['value']:.{places}f}"
    if ratio["low"] is None:
        return text
    return text + f" [{ratio['low']:.{places}f}, {ratio['high']:.{places}f}]"


def test_figures_of_the_readme_stand_in_the_results() -> None:
    text = re.sub(r"^```.*?^```$", "", text_of("README.md"), flags=re.M | re.S)
    text = re.sub(r"\]\([^)]*\)|arXiv [\d.]+|Python [\d.]+|temperature [\d.]+", "", text)
    text = text.replace("Apache-2.0", "")
    results = text_of("docs/results.md")
    assert [n for n in re.findall(r"\d+\.\d+", text) if n not in results] == []
