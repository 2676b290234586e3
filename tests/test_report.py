"""Run folders, plots and the HTML page, from invented rounds; no model runs."""

import json
import random
import re
from pathlib import Path

import pytest

from ttspec.bench.figures import position_figure
from ttspec.bench.plot_style import to_svg
from ttspec.bench.report import write_report
from ttspec.bench.results import Arm
from ttspec.bench.sentences import demo_sentences, demo_table
from ttspec.bench.store import read_run, write_run
from ttspec.errors import DataError
from ttspec.records import Result, Round, summarise

USER = "Is 1 < 2 && 2 > 1? <script>alert(1)</script>"
ANSWER = 'Yes: <b>1 < 2</b> & "2 > 1".'
SECONDS = {"plain": (0.0, 0.02, 0.0), "static": (0.004, 0.024, 0.0)}


def rounds_from(arm: str, start: int, tokens: int, rng: random.Random) -> list[Round]:
    rounds, position = [], start
    while position < start + tokens:
        gain = {"plain": 0.0, "static": 0.5, "learn-session": 0.5 + position / 6000}[arm]
        accepted = 0
        while arm != "plain" and accepted < 7 and rng.random() < gain:
            accepted += 1
        rounds.append(
            Round(
                position=position,
                proposed=0 if arm == "plain" else 7,
                accepted=accepted,
                emitted=accepted + 1,
                updates=int(arm == "learn-session" and len(rounds) % 4 == 3),
                seconds=SECONDS.get(arm, (0.004, 0.024, 0.003)),
            )
        )
        position += accepted + 1
    return rounds


def made_up_arm(name: str, turns: int = 6, user: str = USER, answer: str = ANSWER) -> Arm:
    arm, rng, position = Arm(name=name), random.Random(name), 0
    for number in range(turns):
        rounds = rounds_from(name, position + 1, 250, rng)
        emitted = sum(r.emitted for r in rounds)
        ids = [(number * 7919 + i * 31) % 997 for i in range(emitted + 1)]
        waits = [0.05, *(sum(r.seconds) for r in rounds)]
        stats = summarise(rounds, token_ids=ids, prompt_tokens=9, seed=0, seconds=1.0, reverts=2)
        arm.finish(
            user,
            Result(text=answer, token_ids=ids, finish_reason="length", stats=stats, rounds=rounds),
            waits,
        )
        position += emitted + 1
    return arm


@pytest.fixture
def arms() -> list[Arm]:
    return [made_up_arm(name) for name in ("plain", "static", "learn-session")]


@pytest.fixture
def folder(tmp_path: Path, arms: list[Arm]) -> Path:
    manifest = {"title": "a <run>", "command": "ttspec demo --seed 0", "seed": 0}
    write_run(tmp_path, manifest, arms)
    return tmp_path


def test_a_run_folder_gives_back_what_was_written(folder: Path, arms: list[Arm]) -> None:
    manifest, found = read_run(folder)
    assert manifest["title"] == "a <run>"
    assert [arm.name for arm in found] == [arm.name for arm in arms]
    for mine, theirs in zip(arms, found, strict=True):
        assert theirs.token_ids == mine.token_ids
        assert [r.emitted for r in theirs.rounds] == [r.emitted for r in mine.rounds]
        assert demo_table([theirs]) == demo_table([mine])
        assert theirs.turns[0].result.stats.reverts == 2


def test_rounds_are_json_lines_with_the_names_of_the_design_page(folder: Path) -> None:
    first = json.loads((folder / "rounds.jsonl").read_text().splitlines()[0])
    assert {"arm", "request", "round", "position", "proposed", "accepted", "emitted"} < set(first)
    assert set(first["milliseconds"]) == {"draft", "verify", "learn"}


def test_the_report_is_drawn_from_the_stored_rounds_alone(folder: Path) -> None:
    page = write_report(folder)
    assert page == folder / "report" / "index.html"
    assert (folder / "report" / "acceptance.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "<svg" in page.read_text(encoding="utf-8")


def test_the_page_loads_nothing_from_anywhere(folder: Path) -> None:
    page = write_report(folder).read_text(encoding="utf-8")
    links = re.findall(r"""(?:src|href)\s*=\s*["']?(.)""", page) + re.findall(r"url\((.)", page)
    assert set(links) <= {"#"}
    assert "@import" not in page
    assert "<script" not in page
    assert "<link" not in page


def test_texts_from_models_and_users_are_escaped(folder: Path) -> None:
    page = write_report(folder).read_text(encoding="utf-8")
    assert "alert(1)&lt;/script&gt;" in page
    assert "&lt;b&gt;1 &lt; 2&lt;/b&gt; &amp;" in page
    assert "<title>a &lt;run&gt;</title>" in page


def test_the_plot_follows_the_page_from_light_to_dark(arms: list[Arm]) -> None:
    svg = to_svg(position_figure(arms), "")
    assert svg.startswith("<svg")
    assert "var(--ink)" in svg
    assert "var(--learn-session)" in svg
    assert "learn-session" in svg
    assert "<metadata" not in svg


def test_drawing_leaves_the_settings_of_matplotlib_alone(arms: list[Arm]) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    to_svg(position_figure(arms), "")
    assert dict(matplotlib.rcParams) == before


def test_the_table_compares_the_arms_with_plain_decoding(arms: list[Arm]) -> None:
    rows = {name: list(cells) for name, *cells in demo_table(arms).rows}
    assert rows["speed against plain"][0] == "1.00x"
    assert rows["acceptance length"][0] == "1.00"
    assert rows["updates"][:2] == ["0", "0"]
    assert rows["text"][0] == "–"
    assert rows["text"][1].startswith("differs at")


def test_a_text_that_is_the_same_is_said_to_be_so() -> None:
    a, b = made_up_arm("plain", turns=1), made_up_arm("plain", turns=1)
    assert a.first_difference(b) is None
    b.turns[0].result.token_ids[5] += 1
    assert a.first_difference(b) == 5


def test_findings_say_what_copying_and_learning_brought(arms: list[Arm]) -> None:
    _, copying, learning = arms
    copying.name, learning.name = "static-copy", "default"
    late, speed = demo_sentences(arms)
    assert late.startswith("Learning: after token 1,024 a target forward yields ")
    accepted = learning.acceptance(1024), copying.acceptance(1024)
    assert f"{accepted[0]:.2f} tokens, without it {accepted[1]:.2f}." in late
    ratio = learning.tokens_per_second / copying.tokens_per_second
    assert speed == f"Learning: {ratio:.2f} times the speed without it, everything counted."
    assert demo_sentences(arms[:2]) == []
    arms[0].name = "static"
    assert demo_sentences(arms[:2])[0].startswith("Copying: ")
    arms[0].name = "default"  # it made no updates
    (rests,) = demo_sentences(arms[:2])
    assert rests.startswith("Learning: no update, ")


def test_an_arm_without_rounds_still_makes_a_page(tmp_path: Path) -> None:
    arms = [Arm(name="plain"), Arm(name="something-else")]
    write_run(tmp_path, {"title": "empty", "arms": [arm.name for arm in arms]}, arms)
    assert "something-else" in write_report(tmp_path).read_text(encoding="utf-8")


def test_a_damaged_run_folder_is_refused(folder: Path) -> None:
    (folder / "rounds.jsonl").write_text('{"arm": "plain"}\n')
    with pytest.raises(DataError, match="line 1 is damaged"):
        write_report(folder)
    with pytest.raises(DataError, match=r"manifest\.json"):
        write_report(folder / "nowhere")


TABLES = ("temperature-0.7", "temperature-0")


def test_the_results_say_what_the_committed_runs_say() -> None:
    import headline

    text = (headline.ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert {folder.name for folder in headline.RESULTS.iterdir()} == set(TABLES)
    assert [text.count(headline.BEGIN.format(name)) for name in TABLES] == [1, 1]
    assert headline.pasted(text) == text, "python benchmarks/headline.py paste"


@pytest.mark.parametrize("name", TABLES)
def test_a_changed_figure_shows_in_the_results(tmp_path: Path, name: str) -> None:
    import headline

    folder = tmp_path / name
    folder.mkdir()
    summary = (headline.RESULTS / folder.name / "summary.json").read_text(encoding="utf-8")
    value = json.loads(summary)["arms"]["dflash: static"]["stretches"]["past 1,024"]["value"]
    changed = summary.replace(str(value), "9.8765")
    assert changed != summary
    (folder / "summary.json").write_text(changed)
    text = (headline.ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert "| 9.877 |" in headline.pasted(text, tmp_path)


@pytest.mark.parametrize("name", TABLES)
def test_a_changed_figure_in_the_results_is_put_right(name: str) -> None:
    import headline

    text = (headline.ROOT / "docs/results.md").read_text(encoding="utf-8")
    before, mark, after = text.partition(headline.BEGIN.format(name))
    for figure in re.findall(r"\d\.\d{3}", after.partition(headline.END)[0]):
        assert headline.pasted(before + mark + after.replace(figure, "9.999", 1)) == text


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_ratios_in_the_prose_stand_in_a_table(page: str) -> None:
    import headline

    text = (headline.ROOT / "docs/results.md").read_text(encoding="utf-8")
    ratio = r"\d\.\d{3} \[\d\.\d{3},\s+\d\.\d{3}\]"
    tables, prose = "", text
    for name in TABLES:
        inside = prose.partition(headline.BEGIN.format(name))[2].partition(headline.END)[0]
        tables, prose = tables + inside, prose.replace(inside, "")
    if page == "README.md":
        prose = (headline.ROOT / page).read_text(encoding="utf-8")
    said = [" ".join(found.split()) for found in re.findall(ratio, prose)]
    assert len(said) > 3
    assert [one for one in said if one not in tables] == []


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_the_pictures_of_the_pages_are_committed(page: str) -> None:
    import headline

    text = (headline.ROOT / page).read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert pictures
    assert all(((headline.ROOT / page).parent / path).is_file() for path in pictures)


def test_no_time_is_kept_of_runs_that_shared_a_device() -> None:
    import headline

    for path in headline.RESULTS.glob("*/summary.json"):
        text = path.read_text(encoding="utf-8")
        assert "--out /" not in text, "a path of a machine"
        summary = json.loads(text)
        for one in (*summary["arms"].values(), *summary["pairs"]):
            assert not one.keys() & set(headline.TIMES)
        size = sum(file.stat().st_size for file in path.parent.iterdir())
        assert size <= 1 << 20


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("dflash-512-learn", "Qwen3-8B + DFlash-b16, 512"),
        ("dflash-16k", "Qwen3-8B + DFlash-b16, 16,384"),
        ("eagle3-512", "Llama-3.1-8B + EAGLE-3, 512"),
    ],
)
def test_the_speeds_in_the_results_are_those_of_the_committed_runs(name: str, row: str) -> None:
    root = Path(__file__).parents[1]
    run = json.loads((root / f"docs/results/gpu/{name}.json").read_text(encoding="utf-8"))
    stages = {stage["stage"].split(" of ")[0]: stage for stage in run["stages"]}
    step, draft, verify = (stages[s]["seconds"] for s in ("plain step", "draft", "verify"))
    text = (root / "docs/older-results.md").read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {row} |"))
    wanted = (
        f"{1000 * step:.2f} ms",
        f"{stages['plain step']['ratio']:.0%}".replace("%", " %"),
        f"{1000 * draft:.2f} ms",
        f"{1000 * verify:.2f} ms",
        f"{verify / step:.2f}",
        f"{draft / verify:.0%}".replace("%", " %"),
    )
    cells = [cell.strip().partition(" (")[0] for cell in line.split("|")[2:-1]]
    assert cells == list(wanted)
