"""What is said fits the terminal: no word is broken, what matters least goes first, and what is
redirected keeps everything."""

import fcntl
import os
import pty
import random
import struct
import termios
import textwrap

import pytest
from said import said, screen, seen

from fastsmooth import __main__ as every
from fastsmooth import sharpness, train
from fastsmooth.cli.progress import Progress
from fastsmooth.report import __main__ as report
from fastsmooth.smooth import __main__ as smooth
from fastsmooth.sweep import __main__ as sweep
from fastsmooth.sweep import store
from fastsmooth.sweep import table as tables
from fastsmooth.terminal import Fields, Table, cells, columns, wrapped

WIDTHS = [60, 80, 100, 120]


# The parts


def test_lines_are_wrapped_as_textwrap_does_it():
    rng = random.Random(0)
    for _ in range(300):
        line = " ".join("x" * rng.choice([1, 2, 3, 5, 9, 40]) for _ in range(rng.randint(1, 30)))
        room = rng.randint(10, 70)
        expected = textwrap.wrap(
            line, room, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
        )
        assert wrapped(line, room) == expected
    assert (
        wrapped("a  b   c", 6) == ["a  b", "   c"]
        and wrapped("a  b", None) == ["a  b"]
        and wrapped("", 5) == [""]
    )


def test_letters_of_east_asia_take_two_columns():
    name = "画像の名前"
    assert cells(name) == 10 and cells("e\u0301") == 1
    assert wrapped(f"{name} {name}", 20, indent=2) == [name, f"  {name}"]


def test_fields_are_left_out_in_their_order_and_stay_out():
    fields = Fields(("b", "a"))
    line = {"a": "aaaa", "b": "bbbb", "c": "cccc", "d": ""}
    assert fields.line(line, None) == "aaaa  bbbb  cccc"
    assert fields.line(line, 16) == "aaaa  bbbb  cccc"
    assert fields.line(line, 15) == "aaaa  cccc"
    assert fields.line(line, 100) == "aaaa  cccc"
    assert fields.line(line, 3) == "cccc"  # what is not among them stays


def test_a_table_keeps_its_columns_below_each_other():
    table = Table({"name": "<6", "one": ">5", "two": ">5"}, ("one",))
    assert [table.heading(20), table.row(["a", "1", "2"], 20)] == [
        "name      one    two",
        "a           1      2",
    ]
    assert [table.heading(15), table.row(["a", "1", "2"], 15)] == ["name      two", "a           2"]


def test_the_width_is_that_of_the_terminal(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    master, slave = pty.openpty()
    with open(slave, "w") as stream, open(os.devnull, "w") as elsewhere:
        assert columns(stream) == 80  # it does not say
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 57, 0, 0))
        assert columns(stream) == 57
        monkeypatch.setenv("COLUMNS", "33")
        assert columns(stream) == 33
        monkeypatch.setenv("COLUMNS", "many")
        assert columns(stream) == 80
        assert columns(elsewhere) is None and columns(None) is None
    os.close(master)


# The commands


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a long name, as a person has it."""
    out = tmp_path_factory.mktemp("run") / "20261126-101500-digits-exp"
    assert said(train.main, ["--epochs", "1", "--max-time", "1e-3", "--out", str(out)]).code == 75
    return str(out)


@pytest.mark.parametrize("width", WIDTHS)
def test_the_lines_of_a_run_fit(width):
    flags = [
        "--method",
        "exp",
        "--optimizer",
        "nshb",
        "--lr",
        "0.01",
        "--epochs",
        "2",
        "--batchsize",
        "256",
    ]
    found = seen(train.main, [*flags, "--out", "run"], width)
    assert found.code == 0 and found.widest <= width
    epochs = [line for line in found.lines if line.startswith("epoch ")]
    assert len(epochs) == 2 and all("test acc" in line and "train loss" in line for line in epochs)
    assert ("lr 0.009" in epochs[1], "images/s" in epochs[1], "delta" in epochs[1]) == (
        True,
        False,
        width >= 100,
    )
    words = " ".join(found.lines).split()
    assert "1,797 handwritten digits of 8x8 pixels, shipped with fastsmooth" in " ".join(words)
    assert "━" in found.raw


PRINTED = {
    "the help of train": (train.main, ["--help"]),
    "the help of a sweep": (sweep.main, ["--help"]),
    "the help of sharpness": (sharpness.main, ["--help"]),
    "the help of a report": (report.main, ["--help"]),
    "the help of smooth": (smooth.main, ["--help"]),
    "the commands": (every.main, []),
    "the runs of a sweep": (
        sweep.main,
        ["--plan", "--out", "s", "--method", "lr", "hybrid", "--batchsize", "8..64x2"],
    ),
    "the machine": (train.main, ["--doctor"]),
    "a refusal": (train.main, ["--lr", "0.1", "0.2"]),
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", PRINTED)
def test_what_is_printed_has_the_same_words_at_every_width(name, width, monkeypatch):
    """Those that it has in a file: no word is broken, none is lost."""
    if name == "the machine":
        from fastsmooth.cli import doctor

        monkeypatch.setattr(doctor, "EXTRAS", ())
        monkeypatch.setattr(doctor, "memory", lambda: doctor.Row("memory", "some"))
        monkeypatch.setattr(doctor, "gigabytes", lambda size: "1 GB")
    main, argv = PRINTED[name]
    found, whole = seen(main, argv, width), said(main, argv)
    assert found.code == whole.code and found.widest <= width
    assert " ".join(found.lines).split() == (whole.out + whole.err).split()


def test_the_plan_and_sharpness_leave_out_what_matters_least(run):
    plan = {
        width: seen(train.main, ["--plan", "--dataset", "cifar100", "--method", "hybrid"], width)
        for width in (60, 80)
    }
    assert plan[60].widest <= 60 and plan[80].widest <= 80
    assert plan[60].lines[0].split() == ["epochs", "lr", "batch", "momentum", "delta"]
    assert plan[80].lines[0].split() == ["epochs", "lr", "batch", "momentum", "delta", "updates"]
    measured = ["--samples", "4", "--batch", "2", "--n-iters", "1"]
    narrow = seen(sharpness.main, [run, *measured], len(run) + 40)
    wide = seen(sharpness.main, [run, *measured], 300)
    assert (
        narrow.lines[-3].split()[:3] == ["run", "rho", "sharpness"]
        and "clean loss" not in narrow.lines[-3]
    )
    assert wide.lines[-3].split() == [
        "run",
        "update",
        "rho",
        "sharpness",
        "error",
        "increase",
        "clean",
        "loss",
    ]


@pytest.mark.parametrize(
    "argv",
    [
        ["--plan"],
        ["--plan", "--json"],
        ["--help"],
        ["--epochs", "1", "--out", "run", "--batchsize", "256"],
    ],
)
def test_what_is_redirected_keeps_everything(argv, monkeypatch):
    import shutil

    monkeypatch.setenv("COLUMNS", "40")
    narrow = said(train.main, argv)
    shutil.rmtree("run", ignore_errors=True)
    monkeypatch.setenv("COLUMNS", "400")
    wide = said(train.main, argv)
    assert narrow.code == wide.code == 0
    assert [line.split()[:6] for line in narrow.out.splitlines()] == [
        line.split()[:6] for line in wide.out.splitlines()
    ]
    epochs = [line for line in narrow.out.splitlines() if line.startswith("epoch ")]
    assert all("images/s" in line and "test loss" in line and "delta" in line for line in epochs)


def test_json_is_never_wrapped():
    found = seen(train.main, ["--plan", "--json"], 60)
    assert len([line for line in found.lines if line]) == 15 and found.widest > 60


def test_the_table_of_a_sweep_fits_and_breaks_no_name(tmp_path):
    pytest.importorskip("rich")
    names = [f"method=lr-batch_optimizer=nshb_lr=0.{k}_batchsize=128_seed={k}" for k in range(3)]
    runs = [store.Planned(name, (), {}) for name in names]

    def show(argv: list[str]) -> int:
        table = tables.Table(tmp_path, runs, 0)
        table.show(runs)
        assert table.live is not None
        table.close()
        return 0

    for width in WIDTHS:
        found = seen(show, [], width)
        assert found.widest <= width and "failed" in found.raw and "start" in found.raw
        assert all(f"seed={k} " in found.raw for k in range(3)) and "…" not in found.raw


def test_the_bar_fits_from_its_first_frame_to_its_last(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr("fastsmooth.cli.progress.BAR_EVERY", -1.0)

    class Point:
        lr, batch_size = 0.0123456789, 123_456

    def show(argv: list[str]) -> int:
        progress = Progress(1000, 50_000, 50_000_000, 0, "this CPU")
        for k in range(3):
            progress.update(1_000_000 * (k + 1), 20 * k, Point(), 12.345)
            progress.bar.refresh()
        progress.close()
        return 0

    for width in (40, *WIDTHS):
        found = seen(show, [], width)
        assert found.widest <= width
        assert "epoch 41/1000" in found.raw and "…" not in found.raw  # nothing is cut by rich
        assert ("lr 0.01235" in found.raw) == (width >= 80)


def test_a_warning_beside_the_bar_keeps_its_letters_and_its_stream(tmp_path, capsys):
    pytest.importorskip("rich")
    from fastsmooth.messages import warn

    def show(argv: list[str]) -> int:
        progress = Progress(2, 10, 20, 0, "this CPU")
        warn("café")
        progress.close()
        return 0

    assert "fastsmooth: warning: café" in seen(show, [], 80).lines
    assert screen("a\r\nb\x1b[1Ac")[0] == ["ac", "b"]  # as terminals do
