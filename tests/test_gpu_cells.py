"""The cells for a GPU, on the CPU: that each runs, that what is wrong or fails is told, and that
nothing stops the others. No test looks at how long anything takes."""

import io
import json
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import gpu_cells
from benchmarks.gpu import events, images, kernels, machine, product, runs
from benchmarks.gpu.cell import Cell
from benchmarks.gpu.events import Kernel
from benchmarks.gpu.lanes import Here, Lane, call, race
from benchmarks.gpu.peers import ResidentLoop
from benchmarks.gpu_cells import CELLS, RUNS, CellRow
from fastsmooth.optim import NoisySGD


@pytest.fixture(autouse=True)
def as_a_process_of_its_own():
    """What cells set for the whole process is taken back."""
    multiply, convolve = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = multiply.fp32_precision, convolve.fp32_precision, torch.backends.cudnn.benchmark
    yield
    multiply.fp32_precision, convolve.fp32_precision, torch.backends.cudnn.benchmark = before


@pytest.fixture
def told(tmp_path):
    """(a dry cell, its rows)."""
    rows = []
    return Cell("some", True, tmp_path, tmp_path, rows.append), rows


def archive(path, names, size):
    """A tar of random JPEGs."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for name in names:
            pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG")
            member = tarfile.TarInfo(name)
            member.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(member, buffer)


# Every cell, in its tiny form


@pytest.mark.parametrize("name", [row.name for row in (*CELLS, *RUNS)])
def test_a_cell_runs_to_its_end_and_finds_nothing_wrong(name, tmp_path):
    photographs = [f"imagenet-128/{part}/n{k}/{k}.JPEG" for part in ("train", "val") for k in "12"]
    archive(tmp_path / "imagenet-128.tar", photographs, 40)
    rows = []
    assert gpu_cells.work(name, True, tmp_path, tmp_path, [], rows.append) == 0
    assert {row["bench"] for row in rows} == {f"gpu_{name}"}
    assert rows[-1]["case"] == "cell" and rows[-1]["done"] is True
    assert not [row for row in rows if "failed" in row or row.get("right") is False]
    assert len([row for row in rows if "skipped" not in row]) > 1
    for row in rows:
        assert json.loads(json.dumps(row)) == row
        if "p20_s" in row:
            assert 0 < row["p20_s"] <= row["median_s"] <= row["p80_s"] and row["rounds"] > 1
            assert row["variant"] != row["ratio_to"] or row["ratio"] == 1


def test_every_alarm_leaves_room_for_the_next_and_names_are_used_once():
    assert len({row.name for row in (*CELLS, *RUNS)}) == len(CELLS) + len(RUNS)
    assert all(gpu_cells.GRACE < row.seconds <= gpu_cells.LIMIT / 3 for row in CELLS)


def test_the_page_has_every_cell_with_its_alarm_and_what_it_decides():
    page = (gpu_cells.ROOT / "docs" / "benchmarks.md").read_text()
    for row in (*CELLS, *RUNS):
        assert f"| {row.name} | {row.seconds} | {row.decides} |" in page


# What is wrong, and what fails


def test_a_kernel_that_is_wrong_is_told_and_the_others_are_checked(told, monkeypatch):
    cell, rows = told
    update = kernels.update
    monkeypatch.setattr(kernels, "update", lambda p, g, *rest: update(p, [2 * t for t in g], *rest))
    kernels.right(cell)
    wrong = {row["case"] for row in rows if row.get("right") is False}
    assert wrong == {
        row["case"]
        for row in rows
        if row["case"].startswith("update/") and "/K" not in row["case"] and "errors" in row
    }
    assert len(wrong) == 10 and cell.failed
    assert any(row["case"].startswith("augment/") and row["right"] for row in rows)


def test_a_kernel_that_gives_nan_is_wrong(told):
    cell, rows = told
    kernels.verdict(cell, "some", {"p": 0.0, "m": float("nan")}, 1.0)
    assert rows[0]["right"] is False and cell.failed


def test_an_optimizer_that_goes_astray_is_told(told, monkeypatch):
    cell, rows = told
    monkeypatch.setitem(kernels.OPTIMIZERS, "ours", lambda p: NoisySGD(p, "shb", 0.05, 0.9))
    kernels.update_times(cell)
    failed = [row["variant"] for row in rows if "failed" in row]
    assert failed == ["ours", "ours, captured"] and cell.failed


def test_bits_that_differ_are_told(told, monkeypatch):
    cell, rows = told

    def state(out):
        weight, other = torch.ones(3), out.name.endswith("captured")
        momentum = torch.full((3,), 1 + 1e-7 * other)
        return {"model": {"weight": weight}, "optimizer": {"state": {0: {"momentum": momentum}}}}

    monkeypatch.setattr(runs, "do", lambda *given, code=0: None)
    monkeypatch.setattr(runs, "read", lambda *given: {})
    monkeypatch.setattr(product, "last_state", state)
    runs.same_bits(cell, "resnet8", "off", interrupted=True)
    assert [(row["compared"], row["differing"], row["right"]) for row in rows] == [
        (["eager", "eager again"], [], True),
        (["eager", "captured"], ["momentum 0"], False),
        (["captured", "captured, interrupted"], ["momentum 0"], False),
    ]
    assert cell.failed


def test_a_run_that_notices_nothing_is_told(told, monkeypatch):
    cell, rows = told
    monkeypatch.setattr(runs, "NOT_FINITE", 1.0)
    runs.not_finite(cell)
    assert rows[-1]["right"] is False and cell.failed


def test_a_part_that_fails_is_a_row_and_stops_nothing(told, capsys):
    cell, rows = told
    with cell.part("this", variant="that"):
        raise RuntimeError("two\nlines")
    assert rows == [
        {
            "bench": "gpu_some",
            "case": "this",
            "variant": "that",
            "failed": "RuntimeError: two lines",
        }
    ]
    assert cell.failed and "Traceback" in capsys.readouterr().err


# Runs that stop where they are told


def trainer(*flags):
    given = ["--dataset", "cifar100", "--model", "resnet8", "--device", "cpu", "--batchsize", "4"]
    return product.Trainer([*given, "--lr", "0.01", *flags], images.random_images(80, tests=4))


def test_a_run_makes_the_updates_it_is_told_to_and_no_more():
    run = trainer()
    assert [run.advance(n) for n in (1, 3, 20)] == [1, 3, 20] and run.run.update == 24
    seen = []
    run.call(lambda: seen.append(run.run.update))
    assert seen == [24] and run.run.epoch == 1
    run.close()
    assert run.code == 75 and not run.out.exists()


def test_a_run_that_is_refused_or_ends_says_so():
    with pytest.raises(RuntimeError, match="ended with code 2"):
        trainer("--loader", "dali", "--workers", "1", "--method", "power")
    run = trainer("--epochs", "1")
    with pytest.raises(RuntimeError, match=r"code 0 at update 20$"):
        run.advance(21)
    run.close()
    run = trainer("--lr", "1e9")
    with pytest.raises(RuntimeError, match=r"code 3 at update .*: the loss or its gradient is not"):
        run.advance(20)
    run.close()


# Loops side by side


@pytest.mark.full
def test_a_lane_answers_from_a_process_of_its_own_and_says_what_fails(capfd):
    lane = Lane()
    try:
        lane.ask("begin", ResidentLoop, "resnet8", 4, 20, "cpu")
        assert len(lane.answer()) == 4
        seconds, updates = call(lane, "window", 2)
        assert seconds > 0 and updates == 2
        assert call(lane, "facts") == {"differs": ResidentLoop.differs}
        with pytest.raises(RuntimeError, match="ModelError: --model resnet9"):
            call(lane, "begin", ResidentLoop, "resnet9", 4, 20, "cpu")
    finally:
        lane.close()
    assert not lane.process.is_alive() and capfd.readouterr().out == ""


class Counted:
    """A loop that fails after so many updates."""

    device, lead = torch.device("cpu"), 0

    def __init__(self, limit):
        self.left = limit

    def advance(self, updates):
        self.left -= updates
        if self.left < 0:
            raise ValueError("no more")
        time.sleep(1e-4)
        return updates

    def close(self):
        pass


def test_a_lane_that_fails_leaves_the_race_to_the_others():
    lanes = {"short": Here(), "long": Here()}
    firsts = {
        name: call(lane, "begin", Counted, limit)
        for (name, lane), limit in zip(lanes.items(), (6, 10**9), strict=True)
    }
    failed = []
    found = race(lanes, firsts, 1e-3, 3, lambda name, error: failed.append((name, str(error))))
    assert failed == [("short", "ValueError: no more")]
    assert list(found) == ["long"] and len(found["long"].windows) == 3


def turned(image, flip):
    return image.flip(1) if flip else image


def test_the_resident_loop_crops_and_flips_each_image_within_its_border():
    torch.manual_seed(0)
    loop = ResidentLoop("resnet8", 4, 6, "cpu")
    epoch = loop.epoch()
    assert epoch.shape == (6, 32, 32, 3)
    ways = []
    for image, padded in zip(epoch, loop.padded, strict=True):
        crops = [padded[y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
        flips = [
            flip for crop in crops for flip in (0, 1) if torch.equal(image, turned(crop, flip))
        ]
        ways += flips
    assert len(ways) == 6 and set(ways) == {0, 1}
    sizes = [len(next(loop.batches)[1]) for _ in range(5)]
    assert sizes == [4] * 5  # the last two of each epoch are dropped


# Kernels as they follow each other


def test_a_timeline_has_the_gaps_between_kernels_that_may_overlap(told):
    cell, rows = told
    seen = [Kernel("a", 0, 10), Kernel("b", 5, 10), Kernel("a", 20, 4), Kernel("c", 21, 1)]
    machine.tell_timeline(cell, "some", seen, 2, {"flags": "x"})
    whole, *longest = rows
    assert (whole["span_us"], whole["busy_us"], whole["gaps_us"]) == (12, 9.5, 2.5)
    assert whole["gaps"] == [{"us": 5.0, "after": "b", "before": "a"}]
    assert whole["kernels_an_update"] == 2 and whole["flags"] == "x"
    assert [(row["kernel"], row["us"], row["calls"]) for row in longest] == [
        ("a", 7, 1),
        ("b", 5, 0.5),
        ("c", 0.5, 0.5),
    ]


def test_windows_take_turns_and_each_variant_has_as_many():
    order = []
    steps = {name: lambda name=name: order.append(name) for name in "ab"}

    def clock(device, step, count):
        step()
        return 1.0

    found = events.measure(torch.device("cpu"), steps, clock, seconds=1e-9, rounds=3, most=5)
    assert "".join(order[-6:]) == "abbaab"
    assert [len(m.windows) for m in found.values()] == [3, 3]


# The process that starts the cells


def script(code):
    return [sys.executable, "-c", code]


ROW = "import json; print(json.dumps({'case': 'cell', 'done': True}), flush=True); "
SCRIPTS = {
    "header": ROW,
    "good": ROW,
    "bad": ROW + "raise SystemExit(1)",
    "dead": ROW + "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    # with a child that holds the pipe and would outlive it
    "stuck": ROW + "import subprocess, time; subprocess.Popen(['sleep', '77777']); time.sleep(99)",
}


def carried_out(names, tmp_path, monkeypatch, seconds=20):
    monkeypatch.setattr(gpu_cells, "command_of", lambda name, *rest: script(SCRIPTS[name]))
    chosen = [CellRow(name, 2 if name == "stuck" else seconds, "", "") for name in names]
    code = gpu_cells.carry_out(chosen, False, True, tmp_path, tmp_path, "some")
    (file,) = tmp_path.glob("*_gpu_check.jsonl")
    return code, [json.loads(line) for line in file.read_text().splitlines()]


def test_a_cell_that_fails_hangs_or_dies_stops_no_other(tmp_path, monkeypatch, capfd):
    names = ("bad", "dead", "stuck", "good")
    monkeypatch.setattr(gpu_cells, "GRACE", 1)
    code, rows = carried_out(names, tmp_path, monkeypatch)
    assert code == 1 and len([row for row in rows if row.get("done")]) == 5
    assert [(row["bench"], row["failed"]) for row in rows if "failed" in row] == [
        ("gpu_dead", "ended by SIGSEGV"),
        ("gpu_stuck", "stopped after 2 s"),
    ]
    printed = capfd.readouterr()
    assert [json.loads(line) for line in printed.out.splitlines()] == rows
    assert "bad, dead, stuck: something failed" in printed.err
    alive = subprocess.run(["pgrep", "-f", "sleep 77777"], capture_output=True, text=True)
    assert alive.stdout == ""


def test_cells_that_are_well_end_with_code_0_and_rows_are_never_written_over(tmp_path, monkeypatch):
    assert carried_out(["good"], tmp_path, monkeypatch)[0] == 0
    code, rows = carried_out(["good", "good"], tmp_path, monkeypatch)
    assert code == 0 and len(rows) == 2 + 3


def test_cells_for_which_no_time_is_left_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_cells, "LIMIT", 0)
    code, rows = carried_out(["good"], tmp_path, monkeypatch)
    assert code == 1 and rows[-1] == {
        "bench": "gpu_good",
        "case": "cell",
        "failed": "no time was left",
    }


def test_without_a_gpu_nothing_is_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setitem(SCRIPTS, "header", "raise SystemExit(2)")
    code, rows = carried_out(["good"], tmp_path, monkeypatch)
    assert code == 2 and rows == [] and "sees no GPU" in capfd.readouterr().err


def test_a_cell_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu_cells.main(["ceilings", "celings"])
    assert "no cell celings" in capsys.readouterr().err


@pytest.mark.full
def test_a_dry_cell_by_the_command_line_has_a_header_and_rows_alone_on_stdout(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu_cells",
        "runs",
        "--dry",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=gpu_cells.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    header, *rows = map(json.loads, done.stdout.splitlines())
    assert header["versions"]["torch"] == torch.__version__ and "driver" in header["machine"]
    assert header["command"] == f"python -m benchmarks.gpu_cells runs --dry --out {tmp_path}"
    assert header["commit"]
    assert {row["bench"] for row in rows} == {"gpu_runs"}
    (file,) = tmp_path.glob("*.jsonl")
    assert file.read_text() == done.stdout
    assert "final test accuracy" in next(tmp_path.glob("*.log")).read_text()


def test_the_images_of_archives_are_read_in_the_order_of_a_folder(tmp_path):
    names = [
        f"cifar100-12k/{part}/{label}/{k}.png"
        for part in ("train", "test")
        for label in ("b", "a")
        for k in range(2)
    ]
    archive(tmp_path / "cifar100-12k.tar", names, 32)
    found = images.part_of_cifar(tmp_path)
    assert found.classes == ("a", "b")
    assert found.train.labels.tolist() == found.test.labels.tolist() == [0, 0, 1, 1]
    assert found.train.pixels.shape == (4, 32, 32, 3) and found.train.pixels.dtype == np.uint8
    assert images.whole_cifar(tmp_path) is None
