"""The layers of the package: imports point down only, and what must start fast imports no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What each part may import of the others; all may say something, by messages and terminal.
ALLOWED = {
    "__init__": set(),
    "__main__": {"names"},
    "terminal": set(),
    "messages": set(),
    "processors": set(),
    "names": set(),
    "forms": {"names"},
    "schedule": {"forms"},
    "ranks": set(),
    "figures": set(),
    "runfolder": set(),
    "models": {"names"},
    "optim": {"forms", "kernels"},
    # the last two to examine them
    "cli": {"forms", "schedule", "runfolder", "names", "processors", "data", "kernels"},
    "data": {"kernels", "runfolder", "processors"},
    "noise": {"kernels", "schedule", "ranks", "optim"},
    "training": {
        "noise", "data", "optim", "models", "schedule", "ranks", "cli", "runfolder", "kernels",
        "processors",
    },
    "train": {"training", "noise", "data", "models", "ranks", "cli", "runfolder", "processors"},
    "sharpness": {"noise", "data", "models", "cli", "runfolder", "processors"},
    "sweep": {"cli", "forms", "runfolder", "schedule", "processors"},
    "smooth": {"cli", "runfolder", "processors"},
    "report": {"figures", "cli", "forms", "runfolder", "schedule", "sweep"},
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


def test_flags_are_refused_before_torch_is_imported():
    code = (
        "import sys\nfrom fastsmooth.train import main\nassert main({argv}) == {code}\nassert "
        "'torch' not in sys.modules"
    )
    for argv, exit_code in ((["--help"], 0), (["--plan"], 0), (["--lr", "nan"], 2)):
        command = [sys.executable, "-c", code.format(argv=argv, code=exit_code)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_nothing_names_a_method_outside_the_tables():
    """No `if method ==` chains: a method is one function in schedule.METHODS."""
    for path in (ROOT / "fastsmooth").rglob("*.py"):
        if path.name not in ("config.py", "schedule.py"):
            assert "method ==" not in path.read_text(), path
