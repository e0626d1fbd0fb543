"""examples/: each is short, runs with no arguments, and stands word for word in a page of docs/,
with what it prints."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# whose libraries take long to import; test_lightning.py and test_transformers.py run both
SLOW = {"lightning_callback.py", "transformers_trainer.py"}
PAGES = sorted((ROOT / "docs").glob("*.md"))
SHOWN = re.compile(r"^```python\n(.*?)^```$(?:\s*^```text\n(.*?)^```$)?", re.M | re.S)


def shown() -> dict[str, str]:
    """The Python of the pages, and what stands under it as printed."""
    return dict(found for page in PAGES for found in SHOWN.findall(page.read_text()))


def words(printed: str) -> list[str]:
    """Without the numbers, which depend on the machine."""
    return re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", "#", printed).split()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short_runs_and_stands_in_a_page(path, tmp_path, request):
    text = path.read_text()
    assert len(text.splitlines()) < 40
    assert text in shown()
    if path.name in SLOW and not request.config.getoption("--full"):
        pytest.skip("it runs with --full")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout, done.stderr
    assert words(done.stdout) == words(shown()[text])
