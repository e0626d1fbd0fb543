"""What is shipped: the wheel's files, and that the files about the package agree with it."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml

from fastsmooth import __version__

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
# of the kernels' folder, what is about the source and no part of the package
LEFT_OUT = {"fastsmooth/kernels/README.md"}


def shipped() -> set[str]:
    """Every file of the two folders, by the path that it has in the wheel."""
    folders = {"fastsmooth": ROOT / "fastsmooth", "fastsmooth/kernels": ROOT / "kernels"}
    return {
        f"{inside}/{path.relative_to(folder).as_posix()}"
        for inside, folder in folders.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    } - LEFT_OUT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of the checkout, built in a copy so that nothing built before gets in."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("fastsmooth", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import setuptools.build_meta as build; build.build_wheel('dist')"
    done = subprocess.run(
        [sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (made,) = (copy / "dist").glob("*.whl")
    return made


def test_the_wheel_holds_every_file_of_the_package_and_no_other(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = Parser().parsestr(
            archive.read(f"fastsmooth-{__version__}.dist-info/METADATA").decode()
        )
    about = {name for name in names if name.startswith(f"fastsmooth-{__version__}.dist-info/")}
    assert names - about == shipped()
    assert {"fastsmooth/py.typed", "fastsmooth/kernels/py.typed"} < names
    licences = metadata.get_all("License-File")
    assert licences == ["LICENSE", "fastsmooth/data/digits.LICENSE.txt"]
    assert {f"fastsmooth-{__version__}.dist-info/licenses/{name}" for name in licences} < about
    assert metadata["License-Expression"] == "MIT"


def test_the_wheel_trains_away_from_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    run = (
        "import sys, fastsmooth.__main__ as command, fastsmooth.kernels.native as native; "
        "print(native.__file__); sys.exit(command.main(sys.argv[1:]))"
    )
    argv = ["train", "--method", "exp", "--epochs", "1", "--out", "run"]
    done = subprocess.run(
        [sys.executable, "-c", run, *argv],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site" / "fastsmooth" / "kernels"))
    assert (tmp_path / "run" / "summary.json").is_file()


def test_the_changelog_and_the_citation_name_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} < cited.keys()
    assert (cited["version"], cited["license"]) == (__version__, PYPROJECT["project"]["license"])
    papers = [reference["identifiers"][0]["value"] for reference in cited["references"]]
    assert papers == ["arXiv:2311.08745", "arXiv:2402.02325"]
    sections = re.findall(r"^## \[(.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[:2] == ["Unreleased", __version__]


def test_every_claimed_python_and_the_oldest_torch_are_tested():
    classifiers = PYPROJECT["project"]["classifiers"]
    claimed = [c.rpartition(" ")[2] for c in classifiers if ":: Python :: 3." in c]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["test"]
    matrix = job["strategy"]["matrix"]
    assert claimed == matrix["python"] == PYTHONS
    assert PYPROJECT["project"]["requires-python"] == f">={PYTHONS[0]}"
    (oldest,) = matrix["include"]
    for needed in PYPROJECT["project"]["dependencies"][:2]:
        assert f"'{needed.replace('>=', '==')}.*'" in oldest["torch"]
    assert [step["run"].split()[:2] for step in job["steps"] if "run" in step][-1] == [
        "make",
        "test",
    ]


def test_hooks_run_the_tools_of_the_environment():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    pinned = {
        need.partition("==")[0]
        for need in PYPROJECT["project"]["optional-dependencies"]["test"]
        if "==" in need
    }
    called = [hook["entry"].split()[:3] for hook in local["hooks"]]
    assert all(call[:2] == [".venv/bin/python", "-m"] for call in called)
    assert {call[2] for call in called} == pinned == {"ruff", "mypy"}
