"""The layers of the package: imports point down only, and what must start fast imports no torch."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What each part may import of the others; all may say something, by messages and terminal.
ALLOWED = {
    # what it exports, each loaded when it is asked for
    "__init__": {
        "schedule", "optim", "noise", "models", "data", "cli", "names", "trained", "driving",
        "report",
    },
    "__main__": {"names"},
    "terminal": set(),
    "messages": set(),
    "processors": set(),
    "names": set(),
    "forms": {"names"},
    "places": set(),
    "course": {"names", "places"},
    "schedule": {"forms", "names", "places", "course"},
    "ranks": set(),
    "figures": set(),
    "runfolder": set(),
    "owncode": {"names", "runfolder"},
    "models": {"names", "owncode"},
    "freezing": {"models", "names"},
    "optim": {"forms", "schedule", "kernels"},
    "foreign": {"optim", "schedule", "kernels", "names", "owncode"},
    # the last two to examine them
    "cli": {
        "forms", "schedule", "course", "runfolder", "names", "owncode", "processors", "data",
        "kernels",
    },
    "data": {"kernels", "runfolder", "processors", "names"},
    "noise": {"kernels", "schedule", "ranks", "optim", "foreign", "names"},
    "adapters": {"noise", "schedule", "cli"},
    "driving": {"data", "optim", "schedule"},
    "training": {
        "noise", "data", "optim", "foreign", "owncode", "models", "schedule", "course", "places",
        "figures", "ranks", "cli", "runfolder", "kernels", "processors", "freezing",
    },
    "train": {"training", "ranks", "cli", "runfolder", "processors"},
    "prepare": {"data", "cli", "runfolder", "processors"},
    "trained": {"data", "runfolder", "inference"},
    "inference": {"owncode", "data", "models", "cli", "runfolder", "trained", "processors"},
    "evaluation": {"training", "inference", "trained", "data", "cli", "runfolder", "names"},
    "evaluate": {"evaluation", "inference", "trained", "data", "models", "cli", "runfolder"},
    "predict": {"evaluate", "inference", "trained", "data", "models", "cli", "runfolder"},
    "saved": {"noise", "data", "models", "cli", "runfolder", "processors", "freezing"},
    "sharpness": {"saved", "noise", "cli", "runfolder"},
    "export": {"trained", "models", "data", "report", "schedule", "cli", "runfolder"},
    "sweep": {"cli", "forms", "runfolder", "schedule", "processors"},
    "smooth": {"figures", "cli", "runfolder", "processors"},
    "report": {"figures", "cli", "forms", "names", "runfolder", "schedule", "sweep"},
}  # fmt: skip


def parts_imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = (
                [node.module]
                if node.module != "fastsmooth"
                else [f"fastsmooth.{a.name}" for a in node.names]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("fastsmooth.")}
    return found - {"__version__"}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "fastsmooth").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_point_down_only(path):
    part = path.relative_to(ROOT / "fastsmooth").parts[0].removesuffix(".py")
    assert parts_imported(path) <= ALLOWED[part] | {part, "messages", "terminal"}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda p: p.name)
def test_kernels_import_nothing_of_the_package_but_kernels(path):
    # a command
    assert parts_imported(path) <= {"kernels"} | ({"messages"} if path.name == "aot.py" else set())
    # it would hide other packages of that name
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_every_part_is_named_in_the_architecture():
    page = (ROOT / "docs" / "architecture.md").read_text()
    for path in (*(ROOT / "fastsmooth").rglob("*.py"), *(ROOT / "kernels").glob("*.py")):
        if path.name != "__init__.py":
            assert path.name in page, path


# Command lines that end before any work: each command's --help, a flag that it refuses, a plan.
QUICK = [
    ("train", "--help", 0),
    ("train", "--plan", 0),
    ("train", "--lr nan", 2),
    ("evaluate", "--help", 0),
    ("evaluate", "", 2),
    ("evaluate", "RUN --split val", 2),
    ("predict", "--help", 0),
    ("predict", "RUN", 2),
    ("predict", "RUN a.jpg --top 0", 2),
    ("predict", "RUN a.jpg --csv --json", 2),
    ("prepare", "--help", 0),
    ("prepare", "--data-dir IN --out OUT", 2),
    ("prepare", "--data-dir IN --out OUT --short-side 0", 2),
    ("prepare", "--data-dir IN --out IN/OUT --short-side 256", 2),
    ("prepare", "--data-dir IN --out OUT --short-side 256 --dataset cifar10", 2),
    ("sweep", "--help", 0),
    ("sweep", "--out o --lr nan", 2),
    ("report", "--help", 0),
    ("report", "--outt o", 2),
    ("report", "RUNS --table --csv", 2),
    ("report", "RUNS --watch --out o", 2),
    ("sharpness", "--help", 0),
    ("sharpness", "RUN --algorithm avg_l2", 2),
    ("export", "--help", 0),
    ("export", "RUN --to safetensors --push OWNER/NAME", 2),
    ("export", "RUN --to hub", 2),
    ("smooth", "--help", 0),
    ("smooth", "--noise levi", 2),
]


@pytest.mark.parametrize(("command", "flags", "exit_code"), QUICK)
def test_flags_are_refused_before_torch_is_imported(command, flags, exit_code, tmp_path):
    code = (
        "import sys\nfrom fastsmooth.__main__ import main\n"
        f"assert main({[command, *flags.split()]}) == {exit_code}\n"
        "assert 'torch' not in sys.modules"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_nothing_names_a_method_outside_the_tables():
    """No `if method ==` chains: a method is one function in schedule.METHODS."""
    for path in (ROOT / "fastsmooth").rglob("*.py"):
        if path.name not in ("config.py", "schedule.py"):
            assert "method ==" not in path.read_text(), path
