"""Weights & Biases at the edge: what arrives there, and that nothing it does reaches the run."""

import json
import os
import struct
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from exact import EXACT

from fastsmooth.log import TIMES, Tracker, read_rows, read_status
from fastsmooth.train import main

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
    """The entries of a LevelDB log: blocks of 32 KiB, pieces of (checksum, length, type), after wandb's 7-byte header."""
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


def recorded(out: Path) -> tuple[list[dict], dict, dict, int]:
    """(history, config, summary, exit code) in the file that an offline run leaves in its folder."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = out.glob("wandb/offline-run-*/run-*.wandb")
    history, config, summary, exit_code = [], {}, {}, None

    def entries(items) -> dict:
        return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

    for data in entries_of_log(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            history.append(entries(record.history.item))
        elif kind == "run":
            config |= entries(record.run.config.update)
        elif kind == "summary":
            summary |= entries(record.summary.update)
        elif kind == "exit":
            exit_code = record.exit.exit_code
    return history, config, summary, exit_code


def test_an_offline_run_holds_every_row_the_config_and_the_summary(tmp_path, without, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    out = tmp_path / "run"
    assert main([*FLAGS, "--out", str(out), "--wandb-mode", "auto"]) == 0
    assert results(out) == without
    deadline = time.monotonic() + 60  # wandb's own process may write the end of its file after finish() has returned
    while recorded(out)[3] is None and time.monotonic() < deadline:
        time.sleep(0.2)
    history, config, summary, exit_code = recorded(out)
    rows = read_rows(out)
    assert len(history) == len(rows) == 6
    for row, sent in zip(rows, history, strict=True):
        assert sent["update"] == row["step"]
        numbers = {f"{row['kind']}/{k}": v for k, v in row.items() if isinstance(v, int | float)}
        assert numbers and {key: sent[key] for key in numbers} == numbers
    assert config["method"] == "constant" and config["batch_size"] == 32 and config["lr"] == 0.1
    assert summary["final_test_acc"] == json.loads((out / "summary.json").read_text())["final_test_acc"]
    assert exit_code == 0


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
        summary = types.SimpleNamespace(update=call("summary"))
        return types.SimpleNamespace(log=call("log"), finish=call("finish"), summary=summary)

    return types.SimpleNamespace(init=init, Settings=lambda **kwargs: kwargs), calls


FAULTS = {
    "init": RuntimeError("no route\nto host"),
    "log": ConnectionError("gone"),
    "summary": ValueError("too large"),
    "finish": OSError(28, "No space left on device"),
}


@pytest.mark.parametrize("part", FAULTS)
def test_a_tracker_that_fails_is_one_warning_and_changes_nothing(part, tmp_path, without, monkeypatch, capsys):
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
        ("off", {"WANDB_API_KEY": "k"}, None),
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": "online"}, "online"),
        ("auto", {"WANDB_MODE": "disabled"}, None),
        ("offline", {"WANDB_API_KEY": "k"}, "offline"),
        ("online", {}, "online"),
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
    config = {"wandb_mode": flag, "wandb_project": "p", "wandb_entity": None, "seed": 0}
    Tracker(config, tmp_path / "run", pytest.fail).finish({}, 0)
    if mode is None:
        assert calls == []
        return
    assert calls[0][0] == "init" and calls[0][2]["mode"] == mode
    assert (os.environ["WANDB_ERROR_REPORTING"] == "false") == (mode == "offline")
