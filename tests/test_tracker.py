"""Weights & Biases at the edge: what arrives there, and that nothing it does reaches the run."""

import json
import os
import signal
import struct
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from exact import EXACT
from rows import read_rows

from fastsmooth.runfolder.read import read_status
from fastsmooth.runfolder.trackers import Trackers
from fastsmooth.runfolder.write import TIMES
from fastsmooth.train import main
from fastsmooth.training import loop

FLAGS = [*EXACT, "--epochs", "2", "--log-every", "20"]


def results(out: Path) -> list[dict]:
    """The rows of a run but for times."""
    return [{key: v for key, v in row.items() if key not in TIMES} for row in read_rows(out)]


@pytest.fixture(scope="module")
def without(tmp_path_factory) -> list[dict]:
    """The rows of the run that no tracker watches."""
    out = tmp_path_factory.mktemp("without") / "run"
    assert main([*FLAGS, "--out", str(out)]) == 0
    return results(out)


def entries_of_log(data: bytes) -> Iterator[bytes]:
    """The entries of a LevelDB log: blocks of 32 KiB, pieces of (checksum, length, type), after
    wandb's 7-byte header."""
    at, entry = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        entry += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole entry, or the last piece of one
            yield entry
            entry = b""


class Recorded(NamedTuple):
    """What is in the file of an offline run."""

    history: list[dict]
    config: dict
    summary: dict
    exit_code: int | None
    id: str
    resumes: (
        bool | None
        # whether it is to be added to what is there of its id; None where this wandb does not write
        # it
    )
    axes: dict[str, str]  # the x axis of each metric that was defined


def recorded(path: Path) -> Recorded:
    from wandb.proto.wandb_internal_pb2 import Record

    history, config, summary, exit_code, about, axes = [], {}, {}, None, None, {}

    def entries(items) -> dict:
        return {
            item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items
        }

    for data in entries_of_log(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            history.append(entries(record.history.item))
        elif kind == "run":
            config |= entries(record.run.config.update)
            about = record.run
        elif kind == "metric":
            axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "summary":
            summary |= entries(record.summary.update)
        elif kind == "exit":
            exit_code = record.exit.exit_code
    return Recorded(
        history,
        config,
        summary,
        exit_code,
        about and about.run_id,
        getattr(about, "resume", None),
        axes,
    )


def parts_of(out: Path) -> list[Recorded]:
    """The parts of an offline run in its folder, in their order, once wandb's own process has
    written all of them."""
    paths = sorted(out.glob("wandb/offline-run-*/run-*.wandb"))
    deadline = time.monotonic() + 60  # it may write the end of its file after finish() has returned
    while any(recorded(path).exit_code is None for path in paths) and time.monotonic() < deadline:
        time.sleep(0.2)
    return [recorded(path) for path in paths]


def test_an_offline_run_holds_every_row_the_config_and_the_summary(tmp_path, without, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    out = tmp_path / "run"
    assert main([*FLAGS, "--out", str(out), "--wandb-mode", "auto"]) == 0
    assert results(out) == without
    (part,) = parts_of(out)
    assert len(read_rows(out)) == 6
    assert_sent(part.history, read_rows(out))
    assert (
        part.config["method"] == "constant"
        and part.config["batch_size"] == 32
        and part.config["lr"] == 0.1
    )
    assert (
        part.summary["final_test_acc"]
        == json.loads((out / "summary.json").read_text())["final_test_acc"]
    )
    assert part.exit_code == 0
    assert part.axes["*"] == "update"  # of every metric: wandb's own count of rows is none of ours


def assert_sent(history: list[dict], rows: list[dict]) -> None:
    """Every number of every row was sent, and its update."""
    for row, sent in zip(rows, history, strict=True):
        assert sent["update"] == row["step"]
        numbers = {f"{row['kind']}/{k}": v for k, v in row.items() if isinstance(v, int | float)}
        assert numbers and {key: sent[key] for key in numbers} == numbers


def test_a_resumed_offline_run_is_one_run_that_one_command_sends(
    tmp_path, without, monkeypatch, capsys
):
    """Two parts of one id, the second to be added to the first; the command that the run names
    finds both."""
    pytest.importorskip("wandb")
    out, after = tmp_path / "a run's" / "run", loop.Run.after_update
    flags = ["--out", str(out), "--wandb-mode", "offline"]

    def stopped(self, point):
        after(self, point)
        self.stop_asked = lambda: signal.SIGTERM if self.update >= 60 else 0

    with monkeypatch.context() as sabotage:
        sabotage.setattr(loop.Run, "after_update", stopped)
        assert main([*FLAGS, *flags]) == 75
    assert main(["--resume", *flags]) == 0
    assert results(out) == without
    first, second = parts_of(out)
    assert first.id == second.id and json.loads((out / "wandb.json").read_text()) == {
        "id": first.id
    }
    assert {first.resumes, second.resumes} <= {True, None}
    assert_sent(first.history + second.history, read_rows(out))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("wandb: ")]
    assert len(lines) == 2 and lines[0] == lines[1] and f"offline, in {out / 'wandb'};" in lines[0]
    command = lines[0].partition("; to send it: wandb ")[2]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB")}
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m wandb {command} --dry-run"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0 and done.stderr.count(f"run-{first.id}.wandb") == 2, done.stderr


def fake_wandb(**faults):
    """A stand-in for wandb whose parts fail as asked, and what was asked of it."""
    calls: list[tuple] = []

    def call(name):
        def method(*args, **kwargs):
            calls.append((name, args, kwargs))
            if name in faults:
                raise faults[name]

        return method

    def init(**kwargs):
        call("init")(**kwargs)
        methods = {name: call(name) for name in ("log", "finish", "define_metric")}
        at = {
            "dir": f"{kwargs['dir']}/wandb/offline-run-1-{kwargs['id']}/files",
            "url": f"https://wandb/{kwargs['id']}",
        }
        Path(at["dir"]).mkdir(parents=True, exist_ok=True)
        return types.SimpleNamespace(
            summary=types.SimpleNamespace(update=call("summary")), **methods, **at
        )

    return types.SimpleNamespace(init=init, Settings=lambda **kwargs: kwargs), calls


FAULTS = {
    "init": RuntimeError("no route\nto host"),
    "log": ConnectionError("gone"),
    "summary": ValueError("too large"),
    "finish": OSError(28, "No space left on device"),
}


@pytest.mark.parametrize("part", FAULTS)
def test_a_tracker_that_fails_is_one_warning_and_changes_nothing(
    part, tmp_path, without, monkeypatch, capsys
):
    module, _ = fake_wandb(**{part: FAULTS[part]})
    monkeypatch.setitem(sys.modules, "wandb", module)
    out = tmp_path / "run"
    assert main([*FLAGS, "--out", str(out), "--wandb-mode", "online"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastsmooth: warning: wandb: ")
    assert results(out) == without
    assert read_status(out)["state"] == "done"


def test_a_missing_wandb_is_one_warning(tmp_path, without, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    out = tmp_path / "run"
    assert main([*FLAGS, "--out", str(out), "--wandb-mode", "offline"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install 'fastsmooth[wandb]'" in line
    assert results(out) == without


def test_a_run_that_does_not_end_well_is_not_marked_as_done(tmp_path, monkeypatch):
    module, calls = fake_wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    flags = ["--out", str(tmp_path / "run"), "--wandb-mode", "offline", "--max-time", "1e-3"]
    assert main([*FLAGS, *flags]) == 75
    assert calls[-1][0] == "finish" and calls[-1][2]["exit_code"] != 0


@pytest.mark.parametrize(
    ("flag", "environment", "mode"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": "online"}, "online"),
        ("auto", {"WANDB_MODE": "disabled"}, None),
        ("offline", {"WANDB_API_KEY": "k"}, "offline"),
        ("online", {}, "online"),
        (None, {}, "offline"),
    ],
)
def test_where_the_rows_go(flag, environment, mode, tmp_path, monkeypatch):
    """Nothing leaves the machine unless a key, WANDB_MODE or the flag says so."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_ERROR_REPORTING"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "true")
    module, calls = fake_wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    tracker = tracked(tmp_path / "run", flag)
    where_told = tracker.where
    tracker.finish({}, 0)
    if mode is None:
        assert (
            calls == [] and tracker.where == [] and not (tmp_path / "run" / "wandb.json").exists()
        )
        return
    assert calls[0][0] == "init" and calls[0][2]["mode"] == mode
    known = json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]
    where = (
        f"offline, in {tmp_path}/run/wandb; to send it: wandb sync "
        f"{tmp_path}/run/wandb/offline-run-*"
    )
    assert where_told == [f"wandb: {where if mode == 'offline' else 'https://wandb/' + known}"]
    assert (os.environ["WANDB_ERROR_REPORTING"] == "false") == (mode == "offline")


def tracked(folder: Path, mode: str | None = "online", warn=pytest.fail) -> Trackers:
    """The tracker of the run with seed 0 in this folder, which is there, after its start."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").touch()
    config = {"wandb_mode": mode, "wandb_project": "p", "wandb_entity": None, "seed": 0}
    trackers = Trackers(("wandb",), config, folder, warn)
    trackers.start()
    return trackers


def test_two_runs_of_one_name_and_seed_are_two_and_a_resumed_one_is_itself(tmp_path, monkeypatch):
    """With one id the second would be written into the first, online."""
    module, calls = fake_wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    folders = [tmp_path / name / "run" for name in "abcabc"]
    for folder in folders:
        tracked(folder)
    given = [kwargs for name, _, kwargs in calls if name == "init"]
    ids = [kwargs["id"] for kwargs in given]
    assert ids[:3] == ids[3:] and len(set(ids)) == 3
    assert all(kwargs["resume"] == "allow" and kwargs["name"] == "run" for kwargs in given)
    assert ("define_metric", ("*",), {"step_metric": "update"}) in calls


def test_a_run_that_wandb_did_not_know_is_told_whole_and_another_one_from_there_on(
    tmp_path, monkeypatch
):
    module, calls = fake_wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 3, "lr": 0.5}\n{"kind": 1}\n')
    for _ in range(2):
        tracked(tmp_path).row("step", {"step": 4, "lr": 0.25})
    told = [args[0] for name, args, _ in calls if name == "log"]
    assert [row["update"] for row in told] == [3, 4, 4] and told[0]["step/lr"] == 0.5


@pytest.mark.parametrize("part", ["init", "define_metric", "log"])
def test_where_the_first_start_fails_a_resumed_run_tells_the_rows_before(
    part, tmp_path, monkeypatch
):
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind": "step", "step": 3, "lr": 0.5}\n{"kind": "step", "step": 4, "lr": 0.5}\n'
    )
    said: list[str] = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(**{part: ConnectionError("gone")})[0])
    tracked(tmp_path, warn=said.append)
    assert len(said) == 1 and not (tmp_path / "wandb.json").exists()
    module, calls = fake_wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    for _ in range(2):
        tracked(tmp_path)
    assert [args[0]["update"] for name, args, _ in calls if name == "log"] == [3, 4]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"id": 3}', b'{"id": "../x"}', b'{"id": ""}', None]
)
def test_a_damaged_id_is_replaced_by_a_new_one(content, tmp_path, monkeypatch):
    module, calls = fake_wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    tracked(tmp_path / "run")
    path = tmp_path / "run" / "wandb.json"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    tracked(tmp_path / "run")
    tracked(tmp_path / "run")
    first, second, third = (kwargs["id"] for name, _, kwargs in calls if name == "init")
    assert first != second == third and len(second) == 16


@pytest.mark.parametrize("what", ["the id cannot be kept", "the axis is refused"])
def test_a_tracker_that_cannot_begin_is_one_warning(what, tmp_path, monkeypatch):
    module, _ = fake_wandb(
        **({"define_metric": ValueError("no\nsuch axis")} if "axis" in what else {})
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    said: list[str] = []
    if "id" in what:
        (tmp_path / "wandb.json").mkdir()
    tracker = tracked(tmp_path, warn=said.append)
    tracker.row("step", {"step": 1})
    assert len(said) == 1 and "going on without it" in said[0] and tracker.where == []
