"""Checkpoints, rows and times: what a run folder promises."""

import json
import random
import threading
import time

import pytest
import torch
from rows import read_rows

from fastsmooth.cli.progress import span
from fastsmooth.runfolder.checkpoint import CheckpointError, Checkpoints
from fastsmooth.runfolder.write import RunFolder, RunFolderError, claim
from fastsmooth.training.clock import Clock


def state(value: float) -> dict:
    return {"weights": torch.full((50,), value), "step": value, "list": [1, 2.5, "x", None]}


def saved(tmp_path, *steps: int) -> tuple[Checkpoints, list[str]]:
    warnings: list[str] = []
    checkpoints = Checkpoints(tmp_path / "checkpoints", warnings.append)
    for step in steps:
        checkpoints.save(step, state(float(step)))
    return checkpoints, warnings


def test_the_last_two_checkpoints_are_kept_and_the_newest_is_loaded(tmp_path):
    checkpoints, warnings = saved(tmp_path, 5, 10, 15)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "ckpt-10.json", "ckpt-10.pt", "ckpt-15.json", "ckpt-15.pt",
    ]  # fmt: skip
    loaded = checkpoints.load()
    assert torch.equal(loaded["weights"], state(15.0)["weights"]) and loaded["list"] == [
        1,
        2.5,
        "x",
        None,
    ]
    assert warnings == []


def test_no_damage_is_loaded_silently(tmp_path):
    """Bits flipped and files cut at random places in data and manifest: always the one before, with
    one warning."""
    rng = random.Random(0)
    directory = tmp_path / "checkpoints"
    saved(tmp_path, 1, 2)
    whole = {p: p.read_bytes() for p in directory.iterdir()}
    for trial in range(60):
        for path, data in whole.items():
            path.write_bytes(data)
        path = directory / ("ckpt-2.json" if trial % 3 == 0 else "ckpt-2.pt")
        data = bytearray(whole[path])
        if trial % 2:
            data = data[: rng.randrange(len(data))]
        else:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        warnings: list[str] = []
        loaded = Checkpoints(directory, warnings.append).load()
        # a flipped bit in the manifest's byte count or white space changes nothing that is relied
        # on
        harmless = path.name.endswith("json") and loaded["step"] == 2.0
        assert harmless or (loaded["step"] == 1.0 and len(warnings) == 1), trial


def test_nothing_valid_is_an_error_and_nothing_at_all_is_none(tmp_path):
    assert saved(tmp_path)[0].load() is None
    checkpoints, warnings = saved(tmp_path, 1, 2)
    for path in (tmp_path / "checkpoints").glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints is valid"):
        checkpoints.load()
    assert len(warnings) == 2


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    """Even one whose sum is right: torch.load takes plain tensors only."""
    import hashlib
    import pickle

    class Attack:
        def __reduce__(self):
            return (print, ("code ran",))

    checkpoints, warnings = saved(tmp_path, 1)
    for data in (pickle.dumps({"x": Attack()}), pickle.dumps(Attack(), protocol=2)):
        (tmp_path / "checkpoints" / "ckpt-2.pt").write_bytes(data)
        manifest = {"step": 2, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        (tmp_path / "checkpoints" / "ckpt-2.json").write_text(json.dumps(manifest))
        assert checkpoints.load()["step"] == 1.0
    assert len(warnings) == 2


def test_what_an_interrupted_save_left_is_removed(tmp_path):
    checkpoints, _ = saved(tmp_path, 1)
    for name in (".ckpt-2.pt.0123abcd.tmp", "ckpt-2.pt"):
        (tmp_path / "checkpoints" / name).write_bytes(b"half")
    checkpoints.clean()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "ckpt-1.json",
        "ckpt-1.pt",
    ]
    assert checkpoints.load()["step"] == 1.0


def test_a_failed_save_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    checkpoints, _ = saved(tmp_path, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError):
        checkpoints.save(2, state(2.0))
    monkeypatch.undo()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "ckpt-1.json",
        "ckpt-1.pt",
    ]
    assert checkpoints.load()["step"] == 1.0


def test_rows_survive_a_rewind_up_to_the_checkpoint(tmp_path):
    folder = RunFolder.create(tmp_path / "run", {"lr": 0.1}, {})
    folder.row("step", {"step": 1, "train_loss": 0.5})
    size = folder.sync()
    folder.row("step", {"step": 2, "train_loss": float("nan")})
    assert [r["train_loss"] for r in read_rows(tmp_path / "run")] == [0.5, None]
    folder.rewind(size)
    folder.row("step", {"step": 2, "train_loss": 0.25})
    folder.close()
    assert [r["train_loss"] for r in read_rows(tmp_path / "run")] == [0.5, 0.25]
    with pytest.raises(RunFolderError, match="shorter"):
        RunFolder(tmp_path / "run").rewind(10_000)


def test_a_torn_last_row_is_dropped_by_the_rewind(tmp_path):
    folder = RunFolder.create(tmp_path / "run", {}, {})
    folder.row("step", {"step": 1})
    size = folder.sync()
    folder.close()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "st')
    folder = RunFolder(tmp_path / "run")
    folder.rewind(size)
    folder.row("step", {"step": 2})
    assert [r["step"] for r in read_rows(tmp_path / "run")] == [1, 2]


def sharpness_row(step: int) -> str:
    return json.dumps({"kind": "measure", "step": step, "sharpness": 0.5}) + "\n"


def test_what_was_measured_of_a_checkpoint_survives_a_rewind(tmp_path):
    """Wherever it lies among rows of updates that are done again, and as often as the run goes back
    to that checkpoint."""
    path = tmp_path / "run" / "metrics.jsonl"
    folder = RunFolder.create(tmp_path / "run", {}, {})
    folder.row("step", {"step": 1})
    size = folder.sync()
    folder.row("step", {"step": 2, "note": "no sharpness here"})
    folder.close()
    for step in (1, 2):
        with path.open("a") as file:
            file.write(sharpness_row(step) + json.dumps({"kind": "step", "step": 3}) + "\n")
    with path.open("a") as file:
        file.write(sharpness_row(3)[:-2])  # torn
    first = path.read_bytes()[:size]
    for _ in range(3):
        folder = RunFolder(tmp_path / "run")
        folder.rewind(size)
        folder.row("step", {"step": 2})
        folder.close()
        assert path.read_bytes().startswith(first)
        assert [row["step"] for row in read_rows(tmp_path / "run")] == [1, 1, 2, 2]
        assert [row["kind"] for row in read_rows(tmp_path / "run")] == [
            "step",
            "measure",
            "measure",
            "step",
        ]


def test_what_only_looks_like_a_later_row_does_not(tmp_path):
    folder = RunFolder.create(tmp_path / "run", {}, {})
    lines = [
        b'"sharpness"\n',
        b'["sharpness"]\n',
        b'{"kind": "step", "x": "sharpness"}\n',
        b'{"sharpness": \n',
        b'{"sharpness": 1}',
    ]
    for line in lines:
        (tmp_path / "run" / "metrics.jsonl").write_bytes(line)
        folder.rewind(0)
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == b""


def test_a_rewind_that_fails_loses_no_row(tmp_path, monkeypatch):
    folder = RunFolder.create(tmp_path / "run", {}, {})
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text('{"kind": "step", "step": 1}\n{"kind": "step", "step": 2}\n' + sharpness_row(1))
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError):
        folder.rewind(28)
    assert path.read_bytes() == before


def test_a_claimed_folder_is_claimed_once(tmp_path):
    """By 16 at once, beside folders and files of the names that come next."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "run").mkdir()
    (tmp_path / "runs" / "run-3").write_text("")
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(claim(tmp_path / "runs" / "run")))
        for _ in range(16)
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    names = sorted(path.name for path in found)
    assert names == sorted(f"run-{k}" for k in range(2, 19) if k != 3) and all(
        path.is_dir() for path in found
    )
    with pytest.raises(RunFolderError, match="choose another folder"):
        claim(tmp_path / "runs" / "run-3" / "run")


def test_an_empty_folder_is_taken_and_a_full_one_is_not(tmp_path):
    (tmp_path / "empty").mkdir()
    RunFolder.create(tmp_path / "empty", {}, {}).close()
    with pytest.raises(RunFolderError, match="exists"):
        RunFolder.create(tmp_path / "empty", {}, {})


def test_the_clock_gives_each_second_to_one_part(monkeypatch):
    now = [0.0]
    waits = []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock(lambda: waits.append(1))
    now[0] = 5.0  # before any part runs: nobody's
    with clock.measure("train"):
        now[0] += 3.0
        with clock.measure("eval"):
            now[0] += 10.0
        now[0] += 1.0
        assert clock.read("train") == 4.0
    now[0] += 100.0
    assert clock.seconds == {"train": 4.0, "eval": 10.0} and len(waits) >= 5


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.4, "0 s"),
        (42, "42 s"),
        (150, "2.5 min"),
        (3120, "52 min"),
        (12_600, "3.5 h"),
        (600_000, "6.9 days"),
    ],
)
def test_lengths_of_time_are_for_people(seconds, words):
    assert span(seconds) == words
