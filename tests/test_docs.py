"""README.md and docs/ say what is so: command lines, their output, Python, flags, links, files.

A page has fences of these kinds, and no others:

    sh       command lines; a line that ends in \\ goes on in the next
    console  "$ " and a command line, then what it printed; a line "..." stands for lines left out
    python   run in order, a page at a time, with the names that `names_of_a_page` gives
    toml     a file whose name is the comment in its first line
    bash     a script
    text     anything else

What stands in the text as `python -m ...`, `make ...` or the like is a command line too, unless it
has "..." or "<" in it.
"""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from fastsmooth.names import FLAGS as OTHER_TRAINERS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = (
    "train", "evaluate", "predict", "prepare", "sweep", "sharpness", "export", "report", "smooth",
)  # fmt: skip
KINDS = {"sh", "console", "python", "toml", "bash", "text"}
PROGRAMS = ("python ", "fastsmooth ", "torchrun ", "make ", "pip ", "bash ")
THEIRS = {"photos", "other", "runs/things"}  # folders of whoever reads it, and what came of them
# each is run by test_examples.py
EXAMPLES = {path.read_text() for path in (ROOT / "examples").glob("*.py")}
READERS = {"ls", "cat", "tail", "grep"}  # of the folder that a command before them has made
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*")
# Flags that the pages name of other programs.
FOREIGN = {
    *("--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"),  # torchrun
    *("--signals-to-handle", "--shutdown-timeout"),
    *("--project", "--space-id", "--logdir"),  # trackio, tensorboard
    *(
        "--nodes",
        "--ntasks-per-node",
        "--gpus-per-node",
        "--signal",
        "--requeue",
        "--time",
    ),  # Slurm
    "--full",  # of the tests
    *("--smoothing", "--bce-sum", "--jsd-loss", "--naflex-loader", "--train-img-sizes"),  # train.py
    *("--mixup-off-epoch", "--aug-repeats", "--aug-splits"),
    *("--grad-accum-steps", "--amp", "--model-ema", "--channels-last", "--torchcompile"),
    *("--grad-checkpointing", "--opt", "--clip-grad"),
}
# Flags of other trainers that a page names to say how they are answered.
ANSWERED = {"--wd", "--amp", "--swa", "--lr-milestones", "--accum-iter"}


@dataclasses.dataclass(frozen=True)
class Block:
    page: Path
    line: int  # of its fence, from 1
    kind: str
    text: str


@dataclasses.dataclass(frozen=True)
class CommandLine:
    block: Block
    words: tuple[str, ...]
    printed: str  # "" where the page does not show it

    def __str__(self) -> str:
        return f"{self.block.page.name}:{self.block.line}:{' '.join(self.words)}"

    @property
    def errs(self) -> bool:
        return self.printed.startswith("fastsmooth: error: ")

    @property
    def command(self) -> str | None:
        """Which of COMMANDS, "" for the one that lists them, None for another program."""
        return invoked(self.words)[0]

    @property
    def flags(self) -> list[str]:
        return invoked(self.words)[1]


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    kind, first, inside = None, 0, []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if not line.startswith("```"):
            inside.append(line)
        elif kind is None:
            kind, first, inside = line[3:], number, []
        else:
            found.append(Block(page, first, kind, "\n".join(inside)))
            kind = None
    assert kind is None, f"{page.name}: the fence of line {first} is not closed"
    return found


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def command_lines(block: Block) -> Iterator[CommandLine]:
    text = block.text.replace("\\\n", " ")
    if block.kind == "sh":
        for line in text.splitlines():
            yield CommandLine(block, tuple(shlex.split(line, comments=True)), "")
    elif block.kind == "console":
        for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
            line, _, printed = part.partition("\n")
            yield CommandLine(block, tuple(shlex.split(line)), printed.strip("\n"))


def inline_lines(page: Path) -> Iterator[CommandLine]:
    for span in re.findall(r"`([^`]+)`", prose(page)):
        if span.startswith(PROGRAMS) and "..." not in span and "<" not in span:
            yield CommandLine(Block(page, 0, "inline", span), tuple(shlex.split(span)), "")


def invoked(words: tuple[str, ...]) -> tuple[str | None, list[str]]:
    """(one of COMMANDS, its flags); "" where the command that lists them is meant, None for another
    program."""
    line = list(words)
    if line[0] == "torchrun":
        line = ["python", *line[line.index("-m") :]]
    if line[:3] == ["python", "-m", "fastsmooth"] or line[0] == "fastsmooth":
        rest = line[3:] if line[0] == "python" else line[1:]
        return (rest[0], rest[1:]) if rest[0] in COMMANDS else ("", rest)
    if line[:2] == ["python", "-m"] and line[2].startswith("fastsmooth."):
        return line[2].removeprefix("fastsmooth."), line[3:]
    return None, line


BLOCKS = [block for page in PAGES for block in blocks(page)]
LINES = [line for block in BLOCKS for line in command_lines(block)]
LINES += [line for page in PAGES for line in inline_lines(page)]


def run(flags: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """python -m fastsmooth, in a folder, on the code that is tested."""
    command = [sys.executable, "-m", "fastsmooth", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@cache
def help_of(command: str) -> str:
    asked = [command, "--help", *["all"] * (command in ("train", "sweep"))]
    return run(asked, ROOT).stdout


def flags_in(text: str) -> set[str]:
    return {flag.replace("_", "-") for flag in FLAG.findall(text)}


@cache
def flags_of(command: str) -> frozenset[str]:
    return frozenset(flags_in(help_of(command)))


@cache
def flags_of_others() -> frozenset[str]:
    """Of the benchmarks and the scripts."""
    sources = [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("scripts/*.py")]
    found = [flag for path in sources for flag in re.findall(r'"(--[a-z-]+)"', path.read_text())]
    for path in ROOT.glob("benchmarks/*.sh"):  # those that it compares its arguments with
        found += re.findall(r"= (--[a-z-]+) \]", path.read_text())
    return frozenset(found)


def write_files(page: Path, folder: Path) -> None:
    """The files that the page shows."""
    for block in blocks(page):
        if block.kind == "toml":
            name = block.text.splitlines()[0].removeprefix("# ")
            (folder / name).write_text(block.text)


def test_every_fence_says_what_it_is():
    assert {block.kind for block in BLOCKS} <= KINDS


# Command lines


@pytest.mark.parametrize("line", [line for line in LINES if line.command is not None], ids=str)
def test_a_command_line_is_one(line, tmp_path):
    """Of train and sweep what the flags mean together, by --plan; of the others the flags."""
    write_files(line.block.page, tmp_path)
    for flag in flags_in(" ".join(line.flags)):
        assert line.errs or not line.command or flag in flags_of(line.command), flag
    only_read = {"--plan", "--help", "--doctor", "--check-data"} & set(line.flags)
    last = "--plan" if line.command in ("train", "sweep") else "--help"
    if only_read & {"--doctor", "--check-data"}:  # which look at the machine and at images
        last = "--help"
    more = [] if only_read & {"--plan", "--help"} or line.errs else [last]
    done = run([*filter(None, [line.command]), *line.flags, *more], tmp_path)
    assert done.returncode == (2 if line.errs else 0), done.stderr
    if not more and line.printed:
        assert shows(line.printed, done.stdout + done.stderr)


def shows(printed: str, whole: str) -> bool:
    """Whether `printed` is `whole`, but for the lines that "..." stands for."""
    parts = (
        re.escape(line) + "\n" if line != "..." else "(.*\n)*?" for line in printed.split("\n")
    )
    return re.fullmatch("".join(parts), whole) is not None


@pytest.mark.parametrize("line", [line for line in LINES if line.command is None], ids=str)
def test_a_line_of_another_program_is_right(line):
    program, *rest = line.words
    flags = flags_in(" ".join(rest))
    if program == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.M)
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = project["optional-dependencies"]
        named = re.findall(r"\[(.*)\]", " ".join(rest))
        assert all(name in extras for part in named for name in part.split(","))
    elif program == "python":
        path = rest[1].replace(".", "/") + ".py" if rest[0] == "-m" else rest[0]
        assert (ROOT / path).is_file() and flags <= flags_of_others()
    elif program == "bash":
        assert (ROOT / rest[0]).is_file()
    else:
        assert program in READERS


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.kind == "bash"], ids=lambda b: b.page.name
)
def test_a_script_is_one(block):
    done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert flags_in(block.text) <= flags_of("train") | FOREIGN


@pytest.mark.full
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_does_with_the_digits_can_be_done(page, tmp_path):
    """Every command of the page's blocks, one after the other, in an empty folder."""
    write_files(page, tmp_path)
    for line in LINES:
        # --watch goes on until Ctrl-C
        elsewhere = ({"--dataset", "--slurm", "--ray", "--watch"} | THEIRS) & set(line.flags)
        shown = line.block.page == page and line.block.kind != "inline"
        if shown and line.command and not line.errs and not elsewhere:
            done = run([line.command, *line.flags], tmp_path)
            stopped = "--max-time" in line.flags and "--resume" not in line.flags
            assert done.returncode in ((0, 75) if stopped else (0,)), (line, done.stderr)


# Python


def names_of_a_page() -> dict[str, object]:
    """What the Python of a page may take for granted: imports, a model, images and a loader."""
    import torch
    from torch.nn import functional as F
    from torch.utils.data import DataLoader, TensorDataset

    import fastsmooth as fs

    torch.manual_seed(0)
    train = TensorDataset(torch.randn(600, 3, 8, 8), torch.randint(10, (600,)))
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.GroupNorm(2, 8), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(512, 10),
    )  # fmt: skip

    def loader(batch_size: int) -> DataLoader:
        return DataLoader(train, batch_size, shuffle=True)

    return {"torch": torch, "F": F, "fs": fs, "model": model, "train": train, "loader": loader}


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(b.kind == "python" for b in blocks(p))], ids=lambda p: p.name
)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = names_of_a_page()
    for block in blocks(page):
        if block.kind == "python" and block.text + "\n" not in EXAMPLES:
            short = block.text
            if "range(200)" in short:  # a training of 200 epochs
                short = short.replace("epochs=200", "epochs=2").replace("range(200)", "range(2)")
            exec(compile("\n" * block.line + short, str(page), "exec"), names)


# Flags, links, files


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_that_is_named_exists(page):
    known = set().union(*map(flags_of, COMMANDS)) | flags_of_others() | FOREIGN | ANSWERED
    assert flags_in(prose(page)) <= known
    assert all(any(flag in row.split() for row in OTHER_TRAINERS) for flag in ANSWERED)


def slugs(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.*)", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


LINKS = [
    (page, target)
    for page in PAGES
    for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose(page))
    if not target.startswith("https://")
]


@pytest.mark.parametrize(
    "page, target", LINKS, ids=[f"{page.name}:{target}" for page, target in LINKS]
)
def test_a_link_leads_somewhere(page, target):
    path, _, anchor = target.partition("#")
    there = page.parent / path if path else page
    assert there.exists()
    assert not anchor or anchor in slugs(there)


def test_the_readme_is_short_and_leads_to_every_page():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert 80 <= len(lines) <= 110
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in "\n".join(lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_short(page):
    """But for tables, pictures and what was printed."""
    for line in prose(page).splitlines():
        assert len(line) <= 100 or line.startswith(("|", "![")), line
    for block in blocks(page):
        for line in block.text.splitlines():
            typed = block.kind not in ("console", "text") or line.startswith("$ ")
            assert len(line) <= 100 or not typed, line


def test_the_tree_that_is_drawn_has_no_file_that_is_gone():
    tree = next(b.text for b in blocks(ROOT / "docs" / "architecture.md") if b.kind == "text")
    there = {path.name for path in ROOT.rglob("*") if ".venv" not in path.parts}
    drawn = set(re.findall(r"[\w.]+\.(?:py|cpp|css|sh|md)\b", tree))
    assert drawn and not drawn - there
