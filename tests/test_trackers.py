"""trackio and TensorBoard, read back by their own readers; which trackers a command line names, and
the guard that all of them are behind."""

import functools
import json
import os
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from exact import EXACT
from forks import assert_same_run, codes, finish, logs, start, start_ranks
from rows import read_rows

from fastsmooth.cli.config import resolve, without_idle
from fastsmooth.cli.flags import ConfigError
from fastsmooth.cli.parse import parse, resumed
from fastsmooth.runfolder.files import replace
from fastsmooth.runfolder.trackers import Trackers

FLAGS = [*EXACT, "--batchsize", "128", "--epochs", "2", "--log-every", "2"]
FLAGS += ["--checkpoint-every", "5"]
OURS = ("trackio", "tensorboard")
Told = list[tuple[int, dict[str, float]]]  # update, numbers by kind/key


def numbers(row: dict) -> dict[str, float]:
    found = {key: v for key, v in row.items() if isinstance(v, int | float)}
    return {f"{row['kind']}/{key}": v for key, v in found.items()}


def in_trackio(store: Path, name: str = "run", project: str = "fastsmooth") -> list[Told]:
    """What trackio's own storage reads back, of each run of the name."""
    from trackio import sqlite_storage

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sqlite_storage, "TRACKIO_DIR", store)
        read = sqlite_storage.SQLiteStorage
        runs = [run for run in read.get_run_records(project) if run["name"] == name]
        logs = [read.get_logs(project, name, run_id=run["id"]) for run in runs]
    return [
        [(row["step"], {k: v for k, v in row.items() if "/" in k}) for row in rows] for rows in logs
    ]


def in_tensorboard(out: Path) -> dict[tuple[str, int], list[float]]:
    """What TensorBoard's own reader shows, by name and update."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    found: dict[tuple[str, int], list[float]] = {}
    for tag in read.Tags()["scalars"]:
        for event in read.Scalars(tag):
            found.setdefault((tag, event.step), []).append(event.value)
    return found


def assert_told(name: str, out: Path, store: Path) -> None:
    """Every number of every row of metrics.jsonl, with its update, once, and then the summary."""
    rows = [(row["step"], numbers(row)) for row in read_rows(out)]
    summary = json.loads((out / "summary.json").read_text()) | {"kind": "summary"}
    rows.append((rows[-1][0], numbers(summary)))
    if name == "trackio":
        (told,) = in_trackio(store, out.name)
        assert sorted(told, key=str) == sorted(rows, key=str)
        return
    told = in_tensorboard(out)
    assert all(len(values) == 1 for values in told.values())
    expected = {(key, step): np.float32(v) for step, row in rows for key, v in row.items()}
    assert {place: np.float32(value) for place, (value,) in told.items()} == expected


def prepared(store: str, update: int | None = None, by: int = 0) -> None:
    """Rows go to trackio's `store` one by one, and a signal to this process after an update; called
    in the run's process."""
    os.environ["TRACKIO_DIR"] = store
    from fastsmooth.runfolder.trackers import trackio
    from fastsmooth.training import loop

    trackio.EVERY = 0.0
    after = loop.Run.after_update

    def stopped(self, point):
        if self.update == update:
            os.kill(os.getpid(), by)
        after(self, point)

    loop.Run.after_update = stopped


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("without") / "run"
    finish(FLAGS, out)
    return out


@pytest.fixture
def store(tmp_path, monkeypatch) -> Path:
    """Where trackio's runs go that this process has."""
    for name in OURS:
        pytest.importorskip(name)
    from trackio import fragments, sqlite_storage, utils

    place = tmp_path / "store"
    for module in (sqlite_storage, utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", place)
    assert fragments.local_inbox_dir().parent == place
    return place


def run(argv: list[str], out: Path, store: Path, code: int = 0, *stop: int) -> None:
    assert codes([start(argv, out, functools.partial(prepared, str(store), *stop))]) == [code], (
        logs(out)
    )


def test_a_killed_and_resumed_run_is_told_whole_and_once_and_is_the_same(
    tmp_path, store, undisturbed
):
    """The update after the last checkpoint had told a row, which is done again."""
    out = tmp_path / "run"
    flags = [*FLAGS, "--tracker", *OURS]
    run(flags, out, store, -signal.SIGKILL, 18, signal.SIGKILL)
    before = in_trackio(store)[0]
    assert before[-1][0] == 16 and ("step/step", 16) in in_tensorboard(out)
    known = json.loads((out / "trackio.json").read_text())
    run(["--resume"], out, store)
    assert_same_run(out, undisturbed)
    for name in OURS:
        assert_told(name, out, store)
    assert json.loads((out / "trackio.json").read_text()) == known
    lines = [line for line in logs(out).splitlines() if line.startswith(OURS)]
    assert lines == 2 * [
        f"trackio: run run of project fastsmooth in {store}; to look at it: trackio show --project "
        "fastsmooth",
        f"tensorboard: in {out}/tensorboard; to look at it: tensorboard --logdir {out}",
    ]
    assert "warning" not in logs(out) and "* " not in logs(out)


@pytest.mark.full
def test_a_tracker_that_a_resumed_run_gets_is_told_what_was_before(tmp_path, store, undisturbed):
    out, flags = tmp_path / "run", [*FLAGS, "--tracker", "tensorboard"]
    run(flags, out, store, 75, 18, signal.SIGTERM)
    told = {step for _, step in in_tensorboard(out)}
    assert told == {row["step"] for row in read_rows(out)} and 18 in told
    run(["--resume", "--tracker", *OURS], out, store)
    assert_same_run(out, undisturbed)
    for name in OURS:
        assert_told(name, out, store)


@pytest.mark.full
def test_of_several_processes_with_workers_the_first_tracks(tmp_path, store):
    out = tmp_path / "run"
    flags = [*FLAGS, "--tracker", *OURS, "--loader", "torch", "--workers", "1"]
    processes = start_ranks(flags, out, 2, functools.partial(prepared, str(store)))
    assert codes(processes) == [0, 0], logs(out)
    for name in OURS:
        assert_told(name, out, store)
    assert len(list((out / "tensorboard").iterdir())) == 1 and "warning" not in logs(out)


# The guard


class Fails:
    """A tracker that fails in one of its parts, and what it was told."""

    def __init__(self, part: str, error: BaseException):
        self.part, self.error, self.where = part, error, "somewhere"
        self.told: list[str] = []

    def _do(self, part: str) -> None:
        self.told.append(part)
        if part == self.part:
            raise self.error

    def begun(self, run) -> "Fails":
        self._do("start")
        return self

    def row(self, row) -> None:
        self._do("row")

    def finish(self, summary, update, exit_code) -> None:
        self._do("finish")


@pytest.mark.parametrize("part", ["start", "row", "finish"])
@pytest.mark.parametrize("error", [OSError(28, "full"), SystemExit(1)], ids=["error", "exit"])
def test_one_that_fails_is_one_warning_and_the_others_go_on(part, error, tmp_path, monkeypatch):
    fails, goes_on = Fails(part, error), Fails("", error)
    package = "fastsmooth.runfolder.trackers"
    for name, tracker in (("trackio", fails), ("tensorboard", goes_on)):
        module = types.SimpleNamespace(**{name.title(): tracker.begun})
        monkeypatch.setitem(sys.modules, f"{package}.{name}", module)
    (tmp_path / "metrics.jsonl").touch()
    said: list[str] = []
    trackers = Trackers(OURS, {}, tmp_path, said.append)
    trackers.start()
    for step in (1, 2):
        trackers.row("step", {"step": step, "lr": 0.1})
    trackers.finish({}, 0)
    (line,) = said
    assert line.startswith("trackio: ") and line.endswith(": going on without it")
    assert fails.told.count(part) == 1 and fails.told[-1] == part
    assert goes_on.told == ["start", "row", "row", "finish"]


@pytest.mark.parametrize("name", OURS)
def test_one_that_is_missing_is_one_warning_with_the_line_that_installs_it(
    name, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"fastsmooth.runfolder.trackers.{name}", raising=False)
    (tmp_path / "metrics.jsonl").touch()
    said: list[str] = []
    Trackers((name,), CONFIG, tmp_path, said.append).start()
    assert said == [
        f"--tracker {name}: {name} is not installed, so nothing is sent: pip install "
        f"'fastsmooth[{name}]'"
    ]


# Each by itself

CONFIG = {"wandb_project": "a b", "lr": 0.1}


def tracked(name: str, folder: Path, *updates: int, config=CONFIG, tells=9, end=True) -> Trackers:
    """The tracker of a run that wrote these updates to metrics.jsonl before, and tells one more."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"kind": "step", "step": step, "loss": 1 / step, "by": "name"} for step in updates]
    replace(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    trackers = Trackers((name,), config, folder, pytest.fail)
    trackers.start()
    trackers.row("step", {"step": tells, "loss": 0.5, "nan": float("nan"), "none": None})
    if end:
        trackers.finish({}, 1)
    return trackers


def test_two_runs_of_one_name_are_two_in_trackio_and_a_resumed_one_is_itself(tmp_path, store):
    told = [(9, {"step/step": 9, "step/loss": 0.5})]
    for folder in ("a", "b"):
        tracked("trackio", tmp_path / folder / "run")
    assert in_trackio(store, project="a b") == [told, told]
    tracked("trackio", tmp_path / "a" / "run", 3)  # 9 was after its last checkpoint
    third = (3, {"step/step": 3, "step/loss": 1 / 3})
    assert sorted(in_trackio(store, project="a b")) == sorted([told, [third, *told]])


def test_the_config_is_with_the_run_in_trackio_and_in_tensorboard(tmp_path, store):
    import trackio

    tracked("trackio", tmp_path / "run")
    tracked("trackio", tmp_path / "run", config=CONFIG | {"lr": 5.0})  # of the run, not of a part
    (run,) = trackio.Api().runs("a b")
    assert run.name == "run" and run.config["lr"] == 0.1
    tracked("tensorboard", tmp_path / "run")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    read.Reload()
    (event,) = read.Tensors("config/text_summary")
    assert b'"lr": 0.1' in event.tensor_proto.string_val[0]


def test_on_a_network_file_system_trackio_gets_files_that_it_takes_in_once(
    tmp_path, store, monkeypatch
):
    from trackio import fragments

    monkeypatch.setenv("TRACKIO_STORAGE_MODE", "jsonl")
    tracked("trackio", tmp_path / "run", 3)
    tracked("trackio", tmp_path / "run", 3, 4)
    assert not list(store.glob("*.db")) and fragments.import_inbox_dir() == 5
    (told,) = in_trackio(store, project="a b")
    assert sorted(step for step, _ in told) == [3, 4, 9]


def test_trackio_is_written_to_at_most_once_a_second(tmp_path, store, monkeypatch):
    from fastsmooth.runfolder.trackers import trackio

    now = 0.0
    monkeypatch.setattr(trackio.time, "monotonic", lambda: now)
    trackers = tracked("trackio", tmp_path / "run", end=False)

    def there() -> list[int]:
        return [step for told in in_trackio(store, project="a b") for step, _ in told]

    assert there() == []
    now = 1.5
    trackers.row("step", {"step": 10})
    assert there() == [9, 10]
    trackers.row("step", {"step": 11})
    assert there() == [9, 10]
    trackers.finish({}, 0)
    assert there() == [9, 10, 11]


def test_tensorboard_keeps_the_times_of_what_a_resumed_run_had_told(tmp_path, store):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def times() -> dict[int, float]:
        read = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
        read.Reload()
        return {event.step: event.wall_time for event in read.Scalars("step/step")}

    tracked("tensorboard", tmp_path / "run")
    before = times()
    tracked("tensorboard", tmp_path / "run", 3, 9, tells=12)
    assert times().keys() == {3, 9, 12} and times()[9] == before[9] < times()[3]
    tracked("tensorboard", tmp_path / "run", 9, tells=10)
    assert times().keys() == {9, 10} and times()[9] == before[9]


@pytest.mark.parametrize("name", OURS)
def test_a_store_that_is_removed_in_mid_run_is_one_warning(name, tmp_path, store, monkeypatch):
    from fastsmooth.runfolder.trackers import trackio

    monkeypatch.setattr(trackio, "EVERY", 0.0)
    trackers = tracked(name, tmp_path / "run", end=False)
    said: list[str] = []
    trackers._warn = said.append
    place = store if name == "trackio" else tmp_path / "run" / "tensorboard"
    for path in place.iterdir():
        path.unlink()
    for step in (10, 11):
        trackers.row("step", {"step": step})
    (line,) = said
    assert line.startswith(f"{name}: {place}") and "was removed: going on" in line


# Command lines


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("", ()),
        ("--tracker trackio", ("trackio",)),
        ("--tracker tensorboard wandb", ("tensorboard", "wandb")),
        ("--tracker wandb --wandb-mode offline", ("wandb",)),
        ("--tracker none", ()),
        ("--wandb-mode off", ()),
        ("--wandb-mode auto", ("wandb",)),
        ("--wandb-mode offline", ("wandb",)),
        ("--wandb-mode online --wandb-project p --wandb-entity e", ("wandb",)),
        ("--tracker trackio --wandb-mode off", ("trackio",)),
        ("--tracker trackio --tracker-project p", ("trackio",)),
    ],
)
def test_which_trackers_flags_name(flags, names):
    config = resolve(parse(flags.split()).given)
    assert config.trackers == names
    assert config.wandb_project == ("p" if "project" in flags else "fastsmooth")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--tracker none trackio", "--tracker none goes with no other"),
        ("--tracker trackio trackio", "names trackio more than once: give every tracker once"),
        ("--tracker trackio --wandb-mode offline", "--wandb-mode offline has no effect with --tra"),
        ("--tracker none --wandb-mode auto", "has no effect with --tracker none"),
        ("--tracker wandb --wandb-mode off", "names wandb, which --wandb-mode off leaves out"),
        (
            "--tracker-project x",
            "-project x has no effect with --tracker none: name wandb or track",
        ),
        ("--tracker tensorboard --tracker-project x", "has no effect with --tracker tensorboard"),
        ("--tracker trackio --wandb-entity x", "has no effect with --tracker trackio: name wandb"),
        ("--tracker tb", "--tracker tb: fastsmooth calls it tensorboard"),
        ("--tracker wandb,trackio", "choose from wandb, trackio, tensorboard, none"),
        ("--tensorboard", "fastsmooth calls it --tracker tensorboard"),
        ("--report-to wandb", "fastsmooth calls it --tracker"),
    ],
)
def test_what_has_no_meaning_is_refused_in_words(flags, said):
    with pytest.raises(ConfigError) as refusal:
        resolve(parse(flags.split()).given)
    assert said in str(refusal.value)


def test_of_a_saved_run_what_says_nothing_of_trackers_is_not_taken_over():
    """As --extend and fastsmooth.sweep do with its config."""
    saved = {"tracker": ("wandb",), "wandb_mode": "off", "wandb_project": "p", "lr": 0.2}
    assert without_idle(saved) == {"wandb_mode": "off", "lr": 0.2}
    saved |= {"wandb_mode": "offline"}
    assert without_idle(saved) == saved


@pytest.mark.parametrize(
    ("saved", "flags", "names"),
    [
        ({"wandb_mode": "off"}, "", ()),
        ({"wandb_mode": "off"}, "--tracker wandb", ("wandb",)),
        ({"wandb_mode": "off"}, "--wandb-mode offline", ("wandb",)),
        ({"wandb_mode": "offline"}, "", ("wandb",)),
        ({"wandb_mode": "offline"}, "--tracker trackio", ("trackio",)),
        ({"wandb_mode": "offline"}, "--wandb-mode off", ()),
        ({"tracker": ["wandb"]}, "--wandb-mode off", ()),
        ({"tracker": ["wandb"]}, "--tracker none", ()),
        ({"tracker": ["trackio"]}, "", ("trackio",)),
    ],
)
def test_which_trackers_a_resumed_run_has(saved, flags, names, tmp_path):
    """Runs from before there was --tracker too: their config.json holds none."""
    config = {k: v for k, v in resolve({}).to_json().items() if k not in ("tracker", "wandb_mode")}
    (tmp_path / "config.json").write_text(json.dumps(config | saved))
    given = parse(["--resume", "--out", str(tmp_path), *flags.split()]).given
    assert resumed(given).trackers == names


def test_a_file_of_flags_and_a_sweep_name_trackers(tmp_path):
    from fastsmooth.sweep import grid

    (tmp_path / "f.toml").write_text('tracker = ["trackio", "tensorboard"]\n')
    config = resolve(parse(["--config", str(tmp_path / "f.toml")]).given)
    assert config.trackers == ("trackio", "tensorboard")
    own = vars(grid.parser().parse_args(["--lr", "0.1", "0.2", "--tracker", "trackio", "wandb"]))
    runs = grid.grid_runs(own, {}, tmp_path)
    assert [parse(list(run.flags)).given["tracker"] for run in runs] == 2 * [("trackio", "wandb")]
