"""Disks that are full, files that are damaged, trackers that fail, networks that must not be asked,
and a long run."""

import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import saboteurs
from exact import EXACT
from forks import (
    assert_same_bits,
    assert_same_run,
    codes,
    final_state,
    finish,
    logs,
    saved_steps,
    start,
    without_times,
)
from rows import read_rows

from fastsmooth.runfolder.checkpoint import CheckpointError, Checkpoints
from fastsmooth.runfolder.read import read_status

BASE = [*EXACT, "--batchsize", "40", "--epochs", "2", "--checkpoint-every", "7", "--log-every", "5"]
HYBRID = [*BASE, "--method", "hybrid", "--decay-epoch", "1"]


def stopped_run(out: Path, after: int = 30) -> None:
    """A run that saved itself after an update, and is to be gone on with."""
    assert codes([start(HYBRID, out, functools.partial(saboteurs.stop_after, after))]) == [75], (
        logs(out)
    )


# Damaged checkpoints


def damages(rng: random.Random, data: bytes, manifest: bytes, older: bytes, number: int):
    """(name, data, manifest): as they were, but for one damage."""

    def flipped(text: bytes, low: int, high: int) -> bytes:
        place = rng.randrange(low, min(high, len(text)))
        return text[:place] + bytes([text[place] ^ (1 << rng.randrange(8))]) + text[place + 1 :]

    kinds = [
        lambda: ("a bit of the header", flipped(data, 0, 512), manifest),
        lambda: ("a bit of the data", flipped(data, 512, len(data) - 512), manifest),
        lambda: ("a bit of the end", flipped(data, len(data) - 512, len(data)), manifest),
        lambda: ("a bit of the manifest", data, flipped(manifest, 0, len(manifest))),
        lambda: ("the size in the manifest", data, manifest.replace(b'"bytes": ', b'"bytes": 1')),
        lambda: ("cut short", data[: rng.randrange(len(data))], manifest),
        lambda: ("the manifest cut short", data, manifest[: rng.randrange(len(manifest))]),
        lambda: ("longer", data + rng.randbytes(rng.randrange(1, 99)), manifest),
        lambda: ("another one's", older, manifest),
        lambda: ("zeros in it", data[:4096] + bytes(4096) + data[8192:], manifest),
        lambda: ("empty", b"", manifest),
        lambda: ("the manifest empty", data, b""),
    ]
    for case in range(number):
        yield kinds[case % len(kinds)]()


def test_a_damaged_checkpoint_is_passed_over(tmp_path, cases):
    stopped_run(tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    newest, older = saved_steps(tmp_path / "run")[::-1]
    data, manifest = ((folder / f"ckpt-{newest}.{end}").read_bytes() for end in ("pt", "json"))
    expected = Checkpoints(folder, pytest.fail)._read(older)
    number = cases("a checkpoint damaged, the one before taken", 60, 24)
    for name, wrong_data, wrong_manifest in damages(
        random.Random(1), data, manifest, (folder / f"ckpt-{older}.pt").read_bytes(), number
    ):
        (folder / f"ckpt-{newest}.pt").write_bytes(wrong_data)
        (folder / f"ckpt-{newest}.json").write_bytes(wrong_manifest)
        said: list[str] = []
        state = Checkpoints(folder, said.append).load()
        assert state["update"] == older, name
        assert_same_bits(state, expected, name)
        (line,) = said
        assert f"ckpt-{newest}.pt is damaged" in line and "\n" not in line


def test_a_run_goes_on_from_the_checkpoint_before(tmp_path, cases):
    cases("a checkpoint damaged, the whole run", 1, 1)
    finish(HYBRID, tmp_path / "undisturbed")
    stopped_run(tmp_path / "run")
    newest = saved_steps(tmp_path / "run")[-1]
    path = tmp_path / "run" / "checkpoints" / f"ckpt-{newest}.pt"
    path.write_bytes(path.read_bytes()[:-1])
    finish(["--resume"], tmp_path / "run")
    assert logs(tmp_path / "run").count("fastsmooth: warning:") == 1
    assert_same_run(tmp_path / "run", tmp_path / "undisturbed")


def test_no_valid_checkpoint_is_an_error(tmp_path, cases):
    cases("all checkpoints damaged", 1, 1)
    stopped_run(tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("*.pt"):
        path.write_bytes(path.read_bytes()[1:])
    with pytest.raises(CheckpointError):
        Checkpoints(tmp_path / "run" / "checkpoints", lambda line: None).load()
    (tmp_path / "run.log").unlink()
    assert codes([start(["--resume"], tmp_path / "run")]) == [2]
    (last,) = [line for line in logs(tmp_path / "run").splitlines() if "error" in line]
    assert "none of its 2 checkpoints is valid" in last


# Disks


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, cases):
    """Files that cannot grow beyond ten sizes, from the third save on: in the middle of the run a
    warning, at its end 74."""
    finish(HYBRID, tmp_path / "undisturbed")
    size = (
        (
            tmp_path
            / "undisturbed"
            / "checkpoints"
            / f"ckpt-{saved_steps(tmp_path / 'undisturbed')[0]}.pt"
        )
        .stat()
        .st_size
    )
    sizes = [8192 + k * (size - 8192) // 10 for k in range(10)]
    for k, limit in enumerate(sizes[:: 10 // cases("a full disk, at ten sizes", 10, 2)]):
        out = tmp_path / f"{k}"
        assert codes([start(HYBRID, out, functools.partial(saboteurs.limit_files, limit, 2))]) == [
            74
        ], logs(out)
        lines = logs(out).splitlines()
        errors = [line for line in lines if line.startswith("fastsmooth: ")]
        assert (
            errors[-1].startswith("fastsmooth: error: cannot write")
            and "File too large" in errors[-1]
        )
        assert (
            all(
                re.match("fastsmooth: warning: no (checkpoint|(best|last) weights) at", line)
                for line in errors[:-1]
            )
            and len(errors) > 2
        )
        assert (
            saved_steps(out) == [7, 14]
            and Checkpoints(out / "checkpoints", pytest.fail).load()["update"] == 14
        )
        assert not list((out / "checkpoints").glob(".*"))
        assert read_status(out)["state"] == "failed"
        finish(["--resume"], out)
        assert_same_run(out, tmp_path / "undisturbed")


@pytest.mark.parametrize("what", ["metrics.jsonl", "stdout"])
def test_dev_full(what, tmp_path, cases):
    """The rows are what a run is for; its lines may be lost."""
    if cases("/dev/full as metrics.jsonl and as stdout", 1, 0) == 0:
        pytest.skip("with --full")
    stopped_run(tmp_path / "run")
    rows = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    command = [sys.executable, "-m", "fastsmooth.train", "--resume", "--out", str(tmp_path / "run")]
    if what == "metrics.jsonl":
        (tmp_path / "run" / what).rename(tmp_path / "kept")
        (tmp_path / "run" / what).symlink_to("/dev/full")
        done = subprocess.run(command, capture_output=True, text=True)
        assert (
            done.returncode == 2
            and "metrics.jsonl: it is a pipe, a socket or a device" in done.stderr
        )
        assert len(done.stderr.splitlines()) == 1
        (tmp_path / "run" / what).unlink()
        (tmp_path / "kept").rename(tmp_path / "run" / what)
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == rows
        finish(["--resume"], tmp_path / "run")
    else:
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert (done.returncode, done.stderr) == (0, "")
    assert read_status(tmp_path / "run")["state"] == "done"


# Trackers

NAMES = ("wandb", "trackio", "tensorboard")
BREAKS = (
    "its package missing", "its package broken", "its own part killed", "its folder gone",
    "its disk full",
)  # fmt: skip
FEW = {  # of the default tests
    ("wandb", "its package missing"), ("wandb", "its package broken"),
    ("trackio", "its disk full"), ("tensorboard", "its folder gone"),
}  # fmt: skip


def break_tracker(name: str, how: str, store: str) -> None:
    """What may happen to a tracker; called in the run's process."""
    import types

    os.environ["TRACKIO_DIR"] = store
    if how == "its package missing":
        sys.modules[name] = None
        return
    if how == "its package broken":

        class Broken(types.ModuleType):
            def __getattr__(self, name):
                raise SystemError("half installed")

        sys.modules[name] = Broken(name)
        return
    from fastsmooth.runfolder.trackers import trackio
    from fastsmooth.training import loop

    trackio.EVERY = 0.0
    after = loop.Run.after_update

    def broken(self, point):
        after(self, point)
        if self.update == 10:
            folder = Path(store) if name == "trackio" else self.folder.path / name
            if how == "its folder gone":
                shutil.rmtree(folder, ignore_errors=True)
                folder.write_text("a file in the way")
            elif name == "wandb":
                break_wandb(how, folder)
            else:
                break_writer(name, killed if "killed" in how else without_room)

    loop.Run.after_update = broken


def break_wandb(how: str, folder: Path) -> None:
    if "killed" in how:
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        for child in children:
            os.kill(int(child), signal.SIGKILL)
        return
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    for path in folder.rglob("*.wandb"):
        with path.open("ab") as file:
            file.truncate(1 << 20)


def break_writer(name: str, by) -> None:
    """Have what writes the rows of trackio or TensorBoard, neither of which has a process or a
    thread of its own, go through `by`."""
    if name == "trackio":
        from trackio.sqlite_storage import SQLiteStorage

        SQLiteStorage.bulk_log = staticmethod(by(SQLiteStorage.bulk_log))
    else:
        from tensorboard.summary.writer.record_writer import RecordWriter

        RecordWriter.flush = by(RecordWriter.flush)


def killed(write):
    """A write that is cut off in the middle."""

    def cut(*args, **kwargs):
        write(*args, **kwargs)
        raise SystemExit(1)

    return cut


def without_room(write):
    """A write during which no file can grow."""

    def limited(*args, **kwargs):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))
        try:
            return write(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.fixture(scope="module")
def untracked(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("untracked") / "run"
    finish(HYBRID, out)
    return out


@pytest.mark.parametrize("how", BREAKS)
@pytest.mark.parametrize("name", NAMES)
def test_a_broken_tracker_changes_nothing(name, how, tmp_path, cases, untracked):
    if "package" not in how:
        pytest.importorskip(name)
    if cases("three trackers broken in five ways", 1, (name, how) in FEW) == 0:
        pytest.skip("with --full")
    out, store = tmp_path / "run", str(tmp_path / "store")
    argv = [*HYBRID, "--tracker", name]
    finish(argv, out, prepare=functools.partial(break_tracker, name, how, store))
    assert without_times(read_rows(out)) == without_times(read_rows(untracked))
    assert_same_bits(final_state(out), final_state(untracked))
    assert read_status(out)["state"] == "done"
    said = [line for line in logs(out).splitlines() if line.startswith("fastsmooth: ")]
    # wandb's own process does not tell that its disk is full
    assert len(said) == ((name, how) != ("wandb", "its disk full")), said
    assert all(line.startswith("fastsmooth: warning: ") and name in line for line in said)
    assert "Traceback" not in logs(out)


# The network


def test_nothing_is_asked_of_the_network(tmp_path, cases):
    """Not one internet address in what the kernel is asked, by the run, its threads and its
    children."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    for name in NAMES:
        pytest.importorskip(name)
    if cases("no network: a run, a report, a run with all trackers", 3, 0) == 0:
        pytest.skip("with --full")
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "RANK", "WORLD"))
    }
    # of the Hub, which trackio.init would ask whose it is
    environment |= {"TRACKIO_DIR": str(tmp_path / "store"), "HF_TOKEN": "hf_none"}
    run = ["-m", "fastsmooth.train", "--epochs", "1", "--out"]
    for line in (
        [*run, str(tmp_path / "run")],
        ["-m", "fastsmooth.report", str(tmp_path / "run"), "--out", str(tmp_path / "report")],
        [*run, str(tmp_path / "tracked"), "--tracker", *NAMES],
    ):
        trace = tmp_path / "trace"
        command = [
            "strace",
            "-f",
            "-qq",
            "-e",
            "trace=connect,sendto,sendmsg,sendmmsg",
            "-o",
            str(trace),
            sys.executable,
            *line,
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        asked = [call for call in trace.read_text().splitlines() if "AF_INET" in call]
        # wandb's own process is spoken to on the loopback
        assert [
            call for call in asked if 'inet_addr("127.0.0.1")' not in call and '"::1"' not in call
        ] == []


# A long run


def test_a_long_run_keeps_its_memory_threads_and_files(tmp_path, cases):
    updates = cases("a soak: updates", 20_000, 1_000)
    argv = [
        *EXACT,
        "--batchsize",
        "8",
        "--budget",
        f"updates={updates}",
        "--checkpoint-every",
        "500",
        "--log-every",
        "100",
    ]
    argv += ["--model", "resnet8", "--track-noise", "every=200", "--augment", "crop-flip"]
    sabotage = functools.partial(
        saboteurs.watch_resources, str(tmp_path / "watched"), max(updates // 40, 20)
    )
    assert codes([start(argv, tmp_path / "run", sabotage)], 600) == [0], logs(tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "watched").read_text().splitlines()]
    first, last = rows[len(rows) // 2], rows[-1]  # what is made once is made by then
    assert last[1] - first[1] < 8_000, (
        f"{(last[1] - first[1]) / 1e3:.1f} MB more after {updates} updates"
    )
    assert last[2:] == first[2:]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 4
