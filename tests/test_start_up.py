"""What a command loads before it does anything: start-up is most of a short answer's time."""

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from toys import make_drafter

ASKED = """
import json, sys
from ttspec.cli import main
try:
    code = main(json.loads(sys.argv[1]))
except SystemExit as error:
    code = error.code
print(json.dumps({"code": code or 0, "modules": sorted(sys.modules)}), file=sys.stderr)
"""
DRAWING = {"matplotlib", "fastapi", "starlette", "uvicorn", "IPython", "datasets", "sklearn"}
ROOMS = {"ttspec.training", "ttspec.bench", "ttspec.diagnosis", "ttspec.serving", "ttspec.vllm"}


def loaded(*command: str) -> set[str]:
    """Modules, and the packages they are in, that a command had imported at its end."""
    done = subprocess.run(
        [sys.executable, "-c", ASKED, json.dumps(command)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        check=True,
    )
    told = json.loads(done.stderr.strip().splitlines()[-1])
    assert told["code"] == 0, done.stderr
    return set(told["modules"])


@pytest.mark.parametrize("command", [("--help",), ("--version",)])
def test_help_loads_neither_torch_nor_a_command(command):
    modules = loaded(*command)
    assert "cyclopts" in modules
    heavy = {"torch", "transformers", "numpy", "huggingface_hub", "safetensors", "tokenizers"}
    renderers = {"markdown_it", "pygments", "rich.markdown", "rich.syntax"}
    assert not modules & (heavy | renderers | DRAWING | ROOMS)
    own = {name for name in modules if name.startswith("ttspec")}
    assert own <= {"ttspec", "ttspec.cli", "ttspec.errors", "ttspec.config"}


@pytest.mark.parametrize("command", ["generate", "chat", "train", "bench run", "bench replay"])
def test_help_of_a_command_loads_no_torch(command):
    modules = loaded(*command.split(), "--help")
    if command == "train":  # its options are a record of that room
        assert {m for m in modules if m.startswith("ttspec.training.")} == {
            "ttspec.training.config"
        }
        modules.remove("ttspec.training")
    assert not modules & ({"torch", "transformers", "numpy"} | DRAWING | ROOMS)


@pytest.mark.slow
def test_an_answer_loads_no_more_than_it_takes(toy_target_dir: Path, tmp_path: Path):
    """Beside what transformers loads for its own `generate`, which is most of it."""
    drafter = make_drafter(tmp_path / "drafter")
    flags = ["--target", str(toy_target_dir), "--drafter", str(drafter), "--max-new-tokens", "1"]
    modules = loaded("generate", "Hello", *flags)
    assert {"torch", "transformers", "ttspec.decoding.engine"} <= modules
    assert not modules & (DRAWING | ROOMS)
    assert not modules & {"gguf", "ttspec.models.gguf", "rich.markdown", "rich.live", "accelerate"}


@pytest.mark.parametrize("script", sorted(Path("benchmarks").glob("*.py")), ids=lambda s: s.stem)
def test_a_benchmark_finds_what_it_imports(script: Path) -> None:
    """What was moved or removed shows here, not when a GPU is waiting."""
    importlib.import_module(script.stem)


@pytest.mark.parametrize(
    "script",
    sorted(path for folder in ("benchmarks", "scripts") for path in Path(folder).glob("*.py")),
    ids=lambda s: s.stem,
)
def test_what_a_script_imports_from_ttspec_is_there(script: Path) -> None:
    """Inside of its functions, too."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ttspec"):
            exec(ast.unparse(node), {})
