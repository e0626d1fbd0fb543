"""Names and words that others chose: none of their escape sequences reaches the terminal, wherever
they are shown."""

import ast
import json
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from images import noise, tree
from said import Said, said, screen, seen

from fastsmooth import __main__ as every
from fastsmooth import sharpness, train
from fastsmooth.cli import doctor
from fastsmooth.figures import pdf
from fastsmooth.kernels import native
from fastsmooth.report import __main__ as report
from fastsmooth.smooth import __main__ as smooth
from fastsmooth.sweep import __main__ as sweep
from fastsmooth.sweep import store
from fastsmooth.sweep import table as tables

ROOT = Path(__file__).parents[2]
# A colour, the title of the window, a link, a C1 sequence, text from right to left, letters without
# width, one step back.
FLAG = "a\x1b[31mR\x1b]0;owned\x07\x1b]8;;x\x07\x9b31m\u202e\u2066\u200b\x08FORGED"
NAME = FLAG + "\rFORGED\nFORGED\x85FORGED"  # of a file: it may have several lines


def assert_harmless(text: str) -> None:
    """Printable characters and line ends alone, no line begun by the name, and the name is there:
    it was shown."""
    bad = {c for c in text if not c.isprintable() and c != "\n"}
    assert not bad, (bad, text)
    assert not [line for line in text.splitlines() if line.startswith("FORGED")], text
    assert "FORGED" in text, text


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.parent / "cache"))
    monkeypatch.setattr(pdf, "available", lambda: False)
    return tmp_path


# What is shown of names

IMAGES = [
    "--dataset",
    "folder",
    "--data-dir",
    "images",
    "--batchsize",
    "2",
    "--epochs",
    "1",
    "--max-time",
    "1e-3",
]
RUN = ["--epochs", "1", "--max-time", "1e-3"]
RESNET8 = ["--model", "resnet8"]


def images(files: dict) -> None:
    good = {
        f"{split}/{name}/0.png": noise() for split in ("train", "val") for name in ("ant", NAME)
    }
    tree(Path("images"), good | files)


def class_in_val_alone() -> Said:
    images({f"val/b{NAME}/0.png": noise()})
    return said(train.main, [*IMAGES, "--out", "run"])


def bad_image(*flags: str) -> Said:
    images({f"train/ant/{NAME}.png": b"no image"})
    return said(train.main, [*IMAGES, *RESNET8, "--loader", "threads", "--out", "run", *flags])


def checked() -> Said:
    images({f"train/ant/{NAME}.png": b"no image"})
    return said(train.main, ["--check-data", "--dataset", "folder", "--data-dir", "images"])


def config(content: str) -> Said:
    Path(FLAG).write_text(content, encoding="utf-8")
    return said(train.main, ["--plan", "--config", FLAG])


def saved_sweep() -> None:
    """A sweep whose runs, states, reasons and logs somebody else wrote."""
    runs = [
        {"name": f"run{k}", "flags": [f"--model={NAME}"], "differs": {"model": NAME}}
        for k in range(3)
    ]
    tree(
        Path("s"),
        {"sweep.json": json.dumps({"runs": runs}).encode(), "logs/run2.log": NAME.encode()},
    )
    status = {"state": NAME, "reason": NAME}
    row = {"kind": "epoch", "epoch": 0, "test_acc": 0.5}
    for k in range(2):
        tree(
            Path("s", f"run{k}"),
            {"status.json": json.dumps(status if k else {"state": "done"}).encode()},
        )
        summary = {"final_test_acc": 0.5}
        files = {"config.json": {}, "summary.json": summary}
        tree(
            Path("s", f"run{k}"),
            {name: json.dumps(value).encode() for name, value in files.items()},
        )
        tree(Path("s", f"run{k}"), {"metrics.jsonl": json.dumps(row).encode() + b"\n"})


def swept() -> Said:
    saved_sweep()
    return said(sweep.main, ["--out", "s"])


def planned() -> Said:
    saved_sweep()
    return said(sweep.main, ["--out", "s", "--plan"])


def reported() -> Said:
    tree(
        Path("runs", NAME),
        {"config.json": b"{}", "status.json": json.dumps({"state": NAME}).encode()},
    )
    return said(report.main, ["runs", "--out", FLAG])


def no_run() -> Said:
    tree(Path("runs", NAME), {"config.json": b"{"})
    return said(report.main, ["runs", "--out", FLAG])


def tracked() -> Said:
    return said(
        train.main, [*RUN, "--wandb-mode", "offline", "--wandb-project", FLAG, "--out", "run"]
    )


def environment(**values: str) -> Callable[[pytest.MonkeyPatch], Said]:
    def examined(monkeypatch) -> Said:
        monkeypatch.setattr(doctor, "EXTRAS", ())
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        native.library.cache_clear()
        try:
            return said(train.main, ["--doctor", "--out", FLAG])
        finally:
            native.library.cache_clear()

    return examined


def broken_package(monkeypatch) -> Said:
    Path("matplotlib.py").write_text(f"raise RuntimeError({NAME!r})")
    monkeypatch.syspath_prepend(".")
    monkeypatch.setattr(
        doctor, "EXTRAS", [extra for extra in doctor.EXTRAS if extra.name == "matplotlib"]
    )
    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    return said(train.main, ["--doctor"])


def broken_tracker(monkeypatch) -> Said:
    wandb = types.ModuleType("wandb")
    wandb.Settings = dict

    def init(**_):
        raise RuntimeError(f"no project {NAME}")

    wandb.init = init
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return tracked()


def of_timm(monkeypatch) -> Said:
    timm = types.ModuleType("timm")
    timm.__version__, timm.is_model, timm.list_models = "1", lambda name: False, list
    monkeypatch.setitem(sys.modules, "timm", timm)
    return said(train.main, ["--model", f"timm/{FLAG}", "--out", "run"])


PLACES: dict[str, Callable[..., Said]] = {
    "a class that val alone has": class_in_val_alone,
    "an image that stops the run": bad_image,
    "an image that is served black": lambda: bad_image("--on-bad-image", "zeros"),
    "an image that --check-data lists": checked,
    "the folder of images": lambda: said(train.main, ["--dataset", "folder", "--data-dir", FLAG]),
    "a run folder": lambda: said(train.main, [*RUN, "--out", FLAG]),
    "a run folder that is none": lambda: said(train.main, ["--resume", "--out", FLAG]),
    "a file of flags with an unknown key": lambda: config(json.dumps(FLAG) + " = 1"),
    "a file of flags with a table": lambda: config(f"[{json.dumps(NAME)}]\nx = 1"),
    "a file of flags with a wrong value": lambda: config(f"method = {json.dumps(NAME)}"),
    "a file of flags that is none": lambda: config(f"lr = {FLAG}"),
    "a model": lambda: said(train.main, ["--model", FLAG, "--out", "run"]),
    "a model of torchvision": lambda: said(
        train.main, ["--model", f"torchvision/{FLAG}", "--out", "run"]
    ),
    "a model of timm": of_timm,
    "a planned model": lambda: said(train.main, ["--plan", "--model", FLAG]),
    "a flag": lambda: said(train.main, [f"--{NAME}"]),
    "a value": lambda: said(train.main, ["--method", NAME]),
    "a number": lambda: said(train.main, ["--lr", NAME]),
    "a stray word": lambda: said(train.main, ["--lr", "1", NAME]),
    "a flag of a sweep": lambda: said(sweep.main, ["--out", "s", f"--{NAME}"]),
    "values of the runs of a sweep": lambda: said(
        sweep.main, ["--out", "s", "--model", "resnet8", FLAG]
    ),
    "the folder of a sweep": lambda: said(sweep.main, ["--out", FLAG]),
    "the script of a sweep": lambda: said(
        sweep.main, ["--out", "s", "--lr", "1", "2", "--slurm", FLAG]
    ),
    "values of a sweep": lambda: said(
        sweep.main, ["--out", "s", "--plan", "--data-dir", FLAG, "--dataset", "cifar10"]
    ),
    "the runs of a saved sweep": planned,
    "states, reasons and logs of a saved sweep": swept,
    "a flag of sharpness": lambda: said(sharpness.main, ["run", f"--{NAME}"]),
    "a run without sharpness": lambda: said(sharpness.main, [FLAG, "--json"]),
    "runs and a page": reported,
    "a run that cannot be reported": no_run,
    "a report of nothing": lambda: said(report.main, [NAME]),
    "a flag of a report": lambda: said(report.main, ["runs", f"--{NAME}"]),
    "a flag of smooth": lambda: said(smooth.main, [f"--{NAME}"]),
    "a noise": lambda: said(smooth.main, ["--noise", NAME]),
    "a command": lambda: said(every.main, [NAME]),
    "a flag of no command": lambda: said(every.main, [f"--{NAME}"]),
    "a launcher": environment(WORLD_SIZE=FLAG, MASTER_ADDR=FLAG),
    "the machine": environment(
        PATH=FLAG, CXX=FLAG, OMP_NUM_THREADS=FLAG, CUDA_VISIBLE_DEVICES=FLAG, XDG_CACHE_HOME=FLAG
    ),
    "a package that is broken": broken_package,
    "a tracker that fails": broken_tracker,
}


@pytest.mark.parametrize("name", PLACES)
def test_a_name_is_shown_without_its_escape_sequences(name, monkeypatch, cases):
    cases("escape sequences in names", 1, 1)
    monkeypatch.setattr(sweep, "on_this_machine", lambda *_: None)
    place = PLACES[name]
    found = place(monkeypatch) if place.__code__.co_argcount else place()
    assert_harmless(found.out + found.err)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("stopped") / "run"
    assert said(train.main, [*RUN, "--out", str(out)]).code == 75
    return out


def test_sharpness_shows_the_name_of_a_run_without_its_escape_sequences(stopped, cases):
    cases("escape sequences in names", 1, 1)
    shutil.copytree(stopped, FLAG)
    found = said(sharpness.main, [FLAG, "--samples", "4", "--batch", "2", "--n-iters", "1"])
    assert found.code == 0
    assert_harmless(found.out + found.err)


# On a terminal


def test_a_bar_and_what_is_said_above_it_show_no_escape_sequence_of_a_name(cases):
    """The screen would refuse any that is not the bar's own; letters of elsewhere are as they
    are."""
    cases("escape sequences in names, on a terminal", 1, 1)
    pytest.importorskip("rich")
    images({f"train/ant/caf\u00e9 {NAME}.png": b"no image"})
    flags = [
        *IMAGES[:-2],
        *RESNET8,
        "--loader",
        "threads",
        "--on-bad-image",
        "zeros",
        "--out",
        f"{FLAG} [bold] :bug:",
    ]
    found = seen(train.main, flags, 80)
    text = "\n".join(found.lines)
    assert (
        found.code == 0 and "━" in found.raw and found.widest <= 80 + len(FLAG.encode("utf-8")) * 4
    )
    assert_harmless(text)
    assert "caf\u00e9" in text and "[bold] :bug:" in text


def test_the_table_of_a_sweep_shows_no_escape_sequence_of_a_state(cases):
    cases("escape sequences in names, on a terminal", 1, 1)
    pytest.importorskip("rich")
    saved_sweep()
    runs = store.read_sweep(Path("s"))

    def table(argv: list[str]) -> int:
        shown = tables.Table(Path("s"), runs, 0)
        shown.show(runs)
        shown.ended(runs[1])
        shown.close()
        return 0

    for columns in (60, 200):
        found = seen(table, [], columns)
        assert "at work" in found.raw and "run2" in found.raw
        assert_harmless("\n".join(found.lines))


def test_the_screen_refuses_what_is_not_the_bars_own():
    for foreign in ("\x1b]0;x\x07", "\x9b31m", "\u202e", "\x08"):
        with pytest.raises(AssertionError):
            screen(f"a{foreign}b")


# What Python says by itself

OTHERS = f"""
import logging, threading, warnings
from fastsmooth.messages import end_with
name = {NAME!r}

def fails():
    raise RuntimeError(name)

def main():
    warnings.warn(name)
    logging.getLogger("other").warning(name)
    thread = threading.Thread(target=fails)
    thread.start()
    thread.join()
    fails()

end_with(main)
"""


def test_warnings_log_records_and_tracebacks_of_others_show_no_escape_sequence(cases):
    cases("escape sequences in what others say", 1, 1)
    done = subprocess.run([sys.executable, "-c", OTHERS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert not {c for c in done.stderr if not c.isprintable() and c != "\n"}, done.stderr
    assert (
        done.stderr.startswith("fastsmooth: warning: a\\x1b[31mR")
        and done.stderr.count("Traceback") == 2
    )
    assert done.stderr.count("FORGED") >= 4 and "RuntimeError: a\\x1b[31mR" in done.stderr


def test_every_command_is_ended_by_the_one_function():
    """So that what Python says by itself goes its way too."""
    for path in [
        *ROOT.glob("fastsmooth/**/*.py"),
        *ROOT.glob("scripts/*.py"),
        ROOT / "kernels" / "aot.py",
    ]:
        text = path.read_text()
        if '__name__ == "__main__"' in text and path.name not in (
            "make_digits.py",
            "make_imagenet.py",
        ):
            assert "end_with(main)" in text, path


# Every place that prints

STREAMS = {"sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__"}
PRINTERS = {"print_help", "print_usage", "print_exc", "print_exception", "print_stack", "pprint"}
OTHERS_PRINT = {
    "print",
    "put",
    "messages.put",
    "os.write",
    "warnings.warn",
    "ArgumentParser",
    "argparse.ArgumentParser",
}
OF_RICH = {
    "Text",
    "TextColumn",
    "add_task",
    "add_column",
    "add_row",
    "Grid",
    "Panel",
    "print",
    "log",
    "rule",
}


def name_of(node: ast.AST) -> str:
    """sys.stderr.write of the expression, whatever it is called on: "?.write"."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{name_of(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"


def fixed(node: ast.AST) -> bool:
    """Whether an argument is what we wrote ourselves or has gone through printable()."""
    if isinstance(node, ast.Call):
        return name_of(node.func) in ("printable", "Text")  # Text is looked at itself
    return isinstance(node, ast.Constant)


def offences(source: str) -> list[str]:
    """The calls by which what others chose may be shown, by name."""
    tree_, found = ast.parse(source), []
    for node in (node for node in ast.walk(tree_) if isinstance(node, ast.Call)):
        name = name_of(node.func)
        base, _, last = name.rpartition(".")
        printed = name in OTHERS_PRINT or last in PRINTERS or base in ("logging", "logger")
        printed |= last in ("write", "writelines") and base in STREAMS
        printed |= last in ("exit", "SystemExit") and not all(map(is_code, node.args))
        words = [
            word.value for word in node.keywords if word.arg in ("description", "title", "status")
        ]
        if "from rich" in source and last in OF_RICH:
            printed |= not all(map(fixed, [*node.args, *words]))
        if "from rich" in source and last == "update":
            printed |= not all(map(fixed, words))
        found += [name] * printed
    return found


def is_code(node: ast.AST) -> bool:
    """Whether a process ends with it silently: a number, the name of one, or what a main()
    gives."""
    if isinstance(node, ast.Call):
        return name_of(node.func).rpartition(".")[2] == "main"
    return (
        node.id.isupper()
        if isinstance(node, ast.Name)
        else isinstance(getattr(node, "value", None), int)
    )


ALLOWED = {  # (file, call): why
    (
        "kernels/native.py",
        "warnings.warn",
    ): "kernels import nothing of the package; end_with's showwarning tells it",
    # In other people's loops, where warnings are Python's own: their filters and handlers decide.
    ("fastsmooth/adapters/common.py", "warnings.warn"): "of a callback in a host's training",
    ("fastsmooth/adapters/lightning.py", "logger.log_metrics"): "numbers, to the host's loggers",
    ("fastsmooth/adapters/timm.py", "logging.getLogger"): "the script's, which has its lines there",
    ("fastsmooth/driving.py", "warnings.warn"): "of a scheduler in a loop of one's own",
    ("fastsmooth/noise/online.py", "warnings.warn"): "of NoiseTracker in a loop of one's own",
    ("fastsmooth/report/runs.py", "warnings.warn"): "of load_runs; the command says it by warn()",
    ("fastsmooth/training/beginning.py", "logging.getLogger"): "to silence another library's",
    ("fastsmooth/training/beginning.py", "logger.setLevel"): "the same",
    ("kernels/aot.py", "argparse.ArgumentParser"): "only as the class that is derived from",
}
SOURCES = sorted(
    path for folder in ("fastsmooth", "kernels",
    "scripts") for path in (ROOT / folder).rglob("*.py")
    if path != ROOT / "fastsmooth" / "messages.py"
)  # fmt: skip


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_printed_but_by_messages(path):
    name = str(path.relative_to(ROOT))
    assert [call for call in offences(path.read_text()) if (name, call) not in ALLOWED] == []


@pytest.mark.parametrize(
    "line",
    [
        "print(name)",
        "sys.stdout.write(name)",
        "sys.stderr.writelines([name])",
        "os.write(1, name)",
        "warnings.warn(name)",
        "sys.exit(f'no {name}')",
        "raise SystemExit(name)",
        "p = argparse.ArgumentParser(description=name)",
        "p.print_help()",
        "traceback.print_exc()",
        "logging.warning(name)",
        "put(name, sys.stdout)",
        "from rich.console import Console\nconsole.print(name)",
        "from rich.text import Text\nText(name)",
        "from rich.table import Table\ntable.add_row(name)",
        "from rich.progress import Progress\nbar.update(task, description=name)",
        "from rich.progress import Progress\nbar.add_task(f'of {name}')",
    ],
)
def test_the_walk_finds(line):
    assert offences(line)


def test_the_walk_passes_what_is_fixed():
    assert not offences("sys.exit(2)\nsys.exit(main())\nsay(name)\nfile.write(name)")
    assert not offences(
        "from rich.text import Text\nText(printable(name))\nbar.add_task('begun', total=n)"
    )
