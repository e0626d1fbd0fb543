"""Sweeps: what the runs are, that all of them are done whatever happens, and what is refused."""

import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from exact import EXACT
from rows import read_rows

from fastsmooth import train
from fastsmooth.cli.config import resolve
from fastsmooth.cli.flags import ConfigError
from fastsmooth.cli.parse import parse
from fastsmooth.runfolder.read import SavedRun, read_status
from fastsmooth.runfolder.write import TIMES
from fastsmooth.sweep import __main__ as sweep
from fastsmooth.sweep import critical, grid, machines, store

ROOT = Path(__file__).parent.parent
SHORT = [*EXACT, "--epochs", "1"]


def planned(*flags: str, out: Path = Path("nowhere")) -> list[store.Planned]:
    own_flags = grid.parser().parse_args(grid.expanded(flags))
    asked = vars(own_flags)
    own = {name: asked.pop(name) for name in list(asked) if name not in sweep.FIELDS}
    return grid.grid_runs(asked, own, out)


def refusal(capsys, *flags: str) -> str:
    """The one line with which the sweep refuses."""
    assert sweep.main([*flags]) == 2
    shown = capsys.readouterr()
    assert len(shown.err.splitlines()) == 1 and "Traceback" not in shown.err
    return shown.err


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """In every process: sums in another number of threads have other bits."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def call(out: Path, *flags: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "fastsmooth.sweep", "--out", str(out), *flags]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


# What the runs are


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("8..64x2", ["8", "16", "32", "64"]),
        ("8..100x2", ["8", "16", "32", "64"]),
        ("0..4+2", ["0", "2", "4"]),
        ("0.1..0.3+0.1", ["0.1", "0.2", "0.3"]),
        ("1e-3..1x10", ["0.001", "0.01", "0.1", "1"]),
        ("5..5x2", ["5"]),
        ("--lr=1..4x2", ["--lr", "1", "2", "4"]),
        ("../data", ["../data"]),
        ("a..b", ["a..b"]),
    ],
)
def test_ranges_are_written_out(word, values):
    assert grid.values_of(word) == values


@pytest.mark.parametrize("word", ["8..4x2", "8..64x1", "8..64x0.5", "0..8x2", "1..5+0"])
def test_ranges_that_do_not_grow_are_refused(word):
    with pytest.raises(ConfigError, match="not a range"):
        grid.values_of(word)


def test_a_grid_is_every_combination_with_the_seeds_of_each_together():
    runs = planned("--lr", "0.1", "0.2", "--batchsize", "8..32x2", "--seeds", "2")
    assert len(runs) == 12
    assert runs[0].name == "lr=0.1_batchsize=8_seed=0"
    assert runs[1].name == "lr=0.1_batchsize=8_seed=1"
    assert runs[-1].flags == ("--lr=0.2", "--batchsize=32", "--seed=1")
    assert runs[-1].differs == {"lr": 0.2, "batch_size": 32, "seed": 1}


def test_flags_are_left_out_of_combinations_in_which_they_have_no_effect():
    runs = planned("--optimizer", "sgd", "shb", "--beta", "0.5", "0.9")
    assert [run.flags for run in runs] == [
        ("--optimizer=sgd",),
        ("--optimizer=shb", "--beta=0.5"),
        ("--optimizer=shb", "--beta=0.9"),
    ]


def test_lists_and_switches_are_one_value():
    (run,) = planned("--mode", "critical", "--eps", "1", "0.5", "--drop-last")
    assert run.flags == ("--drop-last", "--mode=critical", "--eps", "1.0", "0.5")


def test_the_flags_of_a_run_are_those_that_train_understands():
    from fastsmooth.cli.config import resolve
    from fastsmooth.cli.parse import parse

    flags = [
        "--optimizer",
        "sgd",
        "nshb",
        "--lr",
        "0.1",
        "1e-05",
        "--steps",
        "3",
        "4",
        "--mode",
        "sampling",
        "--save-omega",
    ]
    for run in planned("--method", "lr", "batch", "exp", *flags):
        c = resolve(parse([*run.flags]).given)
        assert (c.steps, c.save_omega, c.mode) == ((3, 4), True, "sampling")
        assert all(getattr(c, name) == value for name, value in run.differs.items())


def test_tables_of_a_grid_file_are_added_up(tmp_path):
    file = tmp_path / "grid.toml"
    file.write_text(
        'epochs = 5\nbatch-size = "8..32x2"\n[[grid]]\nmethod = ["lr", "constant"]\nbatch_size = '
        "128\n"
        '[[grid]]\nmethod = "batch"\ndrop-last = true\n'
    )
    runs = planned("--grid", str(file), "--lr", "0.3")
    assert [run.flags[1:] for run in runs] == [
        ("--epochs=5", "--lr=0.3", "--batchsize=128"),
        ("--epochs=5", "--lr=0.3", "--batchsize=128"),
        ("--method=batch", "--epochs=5", "--lr=0.3", "--batchsize=8"),
        ("--method=batch", "--epochs=5", "--lr=0.3", "--batchsize=16"),
        ("--method=batch", "--epochs=5", "--lr=0.3", "--batchsize=32"),
    ]
    assert [run.flags[0] for run in runs] == ["--method=lr", "--method=constant"] + [
        "--drop-last"
    ] * 3


def test_equal_runs_are_done_once():
    assert len(planned("--lr", "0.1", "0.1", "1e-1")) == 1


def test_values_make_safe_folder_names():
    runs = planned(
        "--model",
        "torchvision/resnet18",
        "timm/../x",
        "--dataset",
        "folder",
        "--data-dir",
        "a/b",
        "--image-size",
        "32",
    )
    assert [run.name for run in runs] == ["model=torchvision-resnet18", "model=timm-..-x"]


def places(*folders: str) -> list[str]:
    """The flags of a sweep over these data folders."""
    return [
        "--dataset",
        "folder",
        "--image-size",
        "32",
        "--model",
        "resnet8",
        "--data-dir",
        *folders,
    ]


@pytest.mark.parametrize(
    "folders",
    [
        ("a-b_2", "a/b", "a-b"),
        ("a/b", "a-b", "a-b_2"),
        ("a-b", "a-b_2", "a-b_2_2", "a/b", "a b", "a:b"),
        ("Data", "data", "DATA"),
        ("stra\u00dfe", "STRASSE", "strasse"),
        ("\u00e9", "\u00c9"),
        tuple("x" * 200 + end for end in "abc"),
        # four bytes each: 255 are the most that a name has
        tuple("\U00020000" * 150 + end for end in "ab"),
        ("", "-", "/", "..", "."),
    ],
)
def test_no_two_runs_share_a_folder(folders, tmp_path):
    """Nor do they on a file system to which A and a are one letter."""
    runs = planned(*places(*(f"{tmp_path}{folder}" for folder in folders)))
    names = [run.name for run in runs]
    assert len(names) == len(folders)
    for run, folder in zip(runs, folders, strict=True):
        assert f"--data-dir={tmp_path}{folder}" in run.flags
        assert (
            len(f"{run.name}.log".encode()) <= 255
            and store.planned(run.name, [], {}).name == run.name
        )
    assert len({name.casefold() for name in names}) == len(folders)


def test_the_runs_of_a_sweep_keep_their_folders(tmp_path, monkeypatch):
    """Those that an earlier version named, and those of a sweep to which runs are added, wherever
    they come."""
    monkeypatch.setattr(sweep, "carry_out", lambda *args: 0)
    out, flags = tmp_path / "sweep", places("a/b", "a-b", "c")
    runs = planned(*flags)
    names = dict(
        zip((run.flags for run in runs), ["data-dir=a-b", "data-dir=a-b_1", "earlier"], strict=True)
    )
    out.mkdir()
    before = [
        {"name": names[run.flags], "flags": run.flags, "differs": run.differs} for run in runs
    ]
    (out / "sweep.json").write_text(json.dumps({"runs": before}))
    (out / "data-dir=a b").mkdir()  # somebody's
    for added in ([], ["c/d", "a b"], ["a_b", "A/B", "a-b_1"]):
        flags += added
        assert sweep.main(["--out", str(out), *flags]) == 0
        found = {run.flags: run.name for run in store.read_sweep(out)}
        assert names.items() <= found.items() and len(set(found.values())) == len(flags) - 7
        names = found
        assert "data-dir=a b" not in found.values()
    flags.reverse()
    assert sweep.main(["--out", str(out), *places(*flags[:-7])]) == 0
    assert {run.flags: run.name for run in store.read_sweep(out)} == names


# Refusals


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lr", "0.1"], "--out DIR is missing"),
        (["--out", "{}"], "give the flags of the runs"),
        (["--out", "{}", "--lr", "0"], "--lr"),
        (["--out", "{}", "--lr"], "--lr"),
        (["--out", "{}", "--method", "lr", "cosin"], "did you mean cosine"),
        (["--out", "{}", "--beta", "0.9"], "--beta has no effect in any"),
        (["--out", "{}", "--method", "beta", "--optimizer", "sgd", "shb"], "choose --optimizer"),
        (["--out", "{}", "--seed", "1", "--seeds", "2"], "--seed and --seeds"),
        (["--out", "{}", "--critical", "--mode", "normal"], "leave --mode out"),
        (["--out", "{}", "--resume"], "--resume"),
        (["--out", "{}", "--run", "0"], "sweep.json"),
        (["--out", "{}", "--lr", "1..50+0.001", "--seeds", "1000"], "over 100,000 runs"),
        (["--out", "{}", "--lr", "0..1000000+0.001"], "over 100,000 values"),
        (["--out", "{}", "--grid", "/nowhere.toml"], "No such file"),
        (["--out", "{}", "--lr", "9..1x2"], "not a range"),
        (["--out", "{}", "--jobs", "0", "--lr", "1"], "--jobs"),
        (["--out", "/proc/nowhere", "--lr", "0.1"], "/proc/nowhere"),
    ],
)
def test_bad_command_lines_are_one_line(flags, words, tmp_path, capsys):
    assert words in refusal(capsys, *(flag.format(tmp_path / "sweep") for flag in flags))
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("lr = [0.1", "not TOML"),
        ("lr = 'x'", "not a number"),
        ("colour = 3", "colour"),
        ("grid = 3", "[[grid]]"),
        ("grid = []", "[[grid]]"),
        ("jobs = 3", "belongs on the command line"),
        ("[lr]\nx = 1", "is a table"),
        ("lr = []", "lr"),
    ],
)
def test_bad_grid_files_are_one_line(content, words, tmp_path, capsys):
    file = tmp_path / "grid.toml"
    file.write_text(content)
    assert words in refusal(capsys, "--grid", str(file), "--out", str(tmp_path / "sweep"))


def test_a_folder_of_other_things_and_of_another_sweep_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "carry_out", lambda *args: 0)
    (tmp_path / "file").write_text("mine")
    assert "is not empty" in refusal(capsys, "--out", str(tmp_path), "--lr", "0.1")
    out = str(tmp_path / "sweep")
    assert sweep.main(["--out", out, "--lr", "0.1", "0.2"]) == 0
    before = (tmp_path / "sweep" / "sweep.json").read_text()
    assert "holds another sweep" in refusal(capsys, "--out", out, "--lr", "0.1", "0.3")
    assert (tmp_path / "sweep" / "sweep.json").read_text() == before
    # more of the same is welcome
    assert sweep.main(["--out", out, "--lr", "0.1", "0.2", "0.3"]) == 0
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    assert "is damaged" in refusal(capsys, "--out", out)


def test_two_sweeps_do_not_share_a_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "carry_out", lambda *args: 0)
    script = (
        "import sys, time; from fastsmooth.runfolder.write import lock; "
        "lock(__import__('pathlib').Path(sys.argv[1])); print(1, flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE
    )
    try:
        holder.stdout.readline()
        assert "another process" in refusal(capsys, "--out", str(tmp_path), "--lr", "0.1")
    finally:
        holder.kill()


# Doing the runs


def outcome(folder: Path) -> list[dict]:
    return [{key: v for key, v in row.items() if key not in TIMES} for row in read_rows(folder)]


def test_a_run_that_fails_is_reported_and_the_others_are_done(tmp_path):
    grid = tmp_path / "grid.toml"
    grid.write_text(
        '[[grid]]\nlr = [1e30, 0.1]\n[[grid]]\ndataset = "folder"\nlr = 0.1\ndata-dir = '
        '"/nowhere"\n'
    )
    process = call(tmp_path / "sweep", *SHORT, "--grid", str(grid), "--jobs", "1")
    shown, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    diverged, failed = errors.splitlines()
    assert diverged.startswith("diverged: lr=1e+30: the loss or its gradient is not finite")
    assert (
        failed.startswith("failed to start: dataset=folder")
        and "/nowhere: no such directory" in failed
    )
    assert "lr=0.1  test acc" in shown
    states = [
        result["state"] for result in json.loads((tmp_path / "sweep" / "results.json").read_text())
    ]
    assert states == ["diverged", "done", "failed to start"]
    assert not machines.unfinished(
        tmp_path / "sweep", store.read_sweep(tmp_path / "sweep")[0]
    )  # it would diverge again


def test_ctrl_c_saves_the_runs_and_the_same_command_goes_on(tmp_path):
    flags = [*EXACT, "--epochs", "60", "--lr", "0.1", "0.2", "--jobs", "2"]
    # a shell's background job ignores SIGINT, and so would the sweep that it starts
    heed = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = call(tmp_path / "sweep", *flags, start_new_session=True, preexec_fn=heed)
    folders = [tmp_path / "sweep" / f"lr={lr}" for lr in ("0.1", "0.2")]
    while not all((folder / "metrics.jsonl").exists() and read_rows(folder) for folder in folders):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in shown
    assert [read_status(folder)["state"] for folder in folders] == ["preempted"] * 2


def test_results_are_current_while_a_sweep_goes_on(tmp_path, monkeypatch):
    """At every look at the runs, once the clock allows; whoever kills the sweep finds what was
    done."""
    seen = watched_sweep(tmp_path, monkeypatch)
    assert (
        sweep.main(["--out", str(tmp_path / "sweep"), "--lr", "0.1", "0.2", "0.3", "--jobs", "1"])
        == 0
    )
    assert_current(seen)


def test_results_are_current_on_ray_too(tmp_path, monkeypatch):
    seen = watched_sweep(tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, "ray", fake_ray(tmp_path / "sweep", seen))
    assert sweep.main(["--out", str(tmp_path / "sweep"), "--lr", "0.1", "0.2", "0.3", "--ray"]) == 0
    assert_current(seen)


def assert_current(seen: list[tuple[list[str], list[str]]]) -> None:
    """(what results.json says, what the runs say) at every look."""
    assert len(seen) > 4 and all(told == real for told, real in seen[1:])
    assert ["done", "running", "not started"] in [told for told, _ in seen]


def status(folder: Path, state: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "status.json").write_text(json.dumps({"state": state}))
    if state == "done":
        (folder / "summary.json").write_text('{"final_test_acc": 0.5}')


def watched_sweep(tmp_path: Path, monkeypatch) -> list:
    """Runs that are begun at one look and done two looks later, and a clock by which two seconds
    pass between them."""
    out, seen, clock = tmp_path / "sweep", [], [0.0]

    def look(seconds: float) -> None:
        clock[0] += 2.0
        results = json.loads((out / "results.json").read_text())
        real = [read_status(out / entry["name"]).get("state", "not started") for entry in results]
        seen.append(([entry["state"] for entry in results], real))
        assert all(bool(entry["summary"]) == (entry["state"] == "done") for entry in results)

    class Process:
        def __init__(self, folder: Path):
            self.folder, self.looks = folder, 0
            status(folder, "running")

        def poll(self) -> int | None:
            self.looks += 1
            if self.looks < 3:
                return None
            status(self.folder, "done")
            return 0

    monkeypatch.setattr(machines, "start", lambda out, run, *rest: Process(out / run.name))
    monkeypatch.setattr(store.time, "sleep", look)
    monkeypatch.setattr(store.time, "monotonic", lambda: clock[0])
    return seen


def fake_ray(out: Path, seen: list) -> types.SimpleNamespace:
    """Ray with one worker, which begins the next run at each look."""

    def wait(tasks: list[int], timeout: float) -> tuple[list[int], list[int]]:
        if seen or (out / "results.json").exists():
            store.time.sleep(timeout)  # which looks
        runs = store.read_sweep(out)
        if read_status(out / runs[tasks[0]].name).get("state") == "running":
            status(out / runs[tasks[0]].name, "done")
            return tasks[:1], tasks[1:]
        status(out / runs[tasks[0]].name, "running")
        return [], tasks

    numbers = iter(range(10))
    remote = types.SimpleNamespace(remote=lambda *given: next(numbers))
    return types.SimpleNamespace(
        init=lambda *given, **named: None,
        cluster_resources=lambda: {},
        remote=lambda **named: lambda function: remote,
        wait=wait,
        get=lambda task: 0,
        shutdown=lambda: None,
        exceptions=types.SimpleNamespace(RayError=RuntimeError),
    )


def test_results_are_written_seldom_where_that_takes_long(tmp_path, monkeypatch):
    """And not at all where nothing has changed; a disk that is full now stops no run."""
    runs, written, now = planned("--lr", "0.1", "0.2"), [], [0.0]

    def write(path: Path, value) -> None:
        now[0] += 2.0
        written.append(now[0])
        if len(written) == 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_json", write)
    monkeypatch.setattr(store.time, "monotonic", lambda: now[0])
    results = store.Results(tmp_path, runs)
    for second in range(600):
        results.show()
        now[0] += 1.0
        if second % 20 == 0:
            status(tmp_path / runs[0].name, "running" if second % 40 else "preempted")
    assert 4 <= len(written) <= 600 / 100 + 1
    for _ in range(300):
        results.show()
        now[0] += 1.0
    before = len(written)
    for _ in range(300):
        results.show()
        now[0] += 1.0
    assert len(written) == before
    with pytest.raises(OSError, match="No space"):
        store.Results(tmp_path, runs).write(written.clear() or "not started")


@pytest.mark.full
def test_the_critical_batch_size_comes_with_a_sampled_variance(tmp_path):
    flags = [*EXACT, "--critical", "--batchsize", "32", "64", "--eps", "1.5", "--epochs", "12"]
    process = call(tmp_path / "sweep", *flags)
    shown, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    (curve,) = json.loads((tmp_path / "sweep" / "critical.json").read_text())["curves"]
    assert [b["batch_size"] for b in curve["batches"]] == [32, 64]
    best = next(b for b in curve["batches"] if b["batch_size"] == curve["best"])
    assert curve["c2_critical"] == pytest.approx(curve["best"] * 1.5**2 / 0.1)
    assert curve["c2_sampled"] > 0 and curve["c2_sampled_se"] > 0
    assert curve["sampled_step"] == best["steps"][0] - 1
    assert f"b* {curve['best']}" in shown and "c2_sampled" in shown


def crossed(folder: Path, step: int, *flags: str) -> SavedRun:
    """A finished run of --mode critical that was below eps 1 from an update on."""
    c = resolve(parse(["--mode", "critical", "--eps", "1", *flags]).given)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(c.to_json()))
    about = {"batch_size": c.batch_size, "seed": c.seed, "momentum": c.momentum}
    found = about | {
        "crossings": {"1": {"step": step, "samples": step * c.batch_size, "censored": False}}
    }
    return SavedRun(folder, c.to_json(), status={"state": "done"}, critical=found)


@pytest.mark.parametrize(
    "flags",
    [
        ["--optimizer", "nshb", "--criterion", "full-grad", "--bn", "eval"],
        ["--criterion", "full-grad", "--bn", "eval"],
        ["--track-noise", "every=50", "--bn", "frozen"],
        [
            "--optimizer",
            "shb",
            "--augment",
            "crop-flip",
            "--track-noise",
            "every=1ep",
            "--estimator",
            "micro-batch",
        ],
    ],
)
def test_the_noise_at_the_best_batch_can_be_sampled_however_crossings_were_found(flags, tmp_path):
    run = crossed(tmp_path / "run", 50, *flags)
    c = resolve(parse(list(critical.sampling_run(run, 50).flags)).given)
    assert (
        c.mode == "sampling"
        and c.steps == (49,)
        and c.track_noise is None
        and c.optimizer == run.config["optimizer"]
    )
    assert c.bn == ("eval" if flags == ["--criterion", "full-grad", "--bn", "eval"] else "train")


def test_the_noise_is_sampled_in_the_run_that_crossed_at_that_update(tmp_path):
    runs = [crossed(tmp_path / f"{seed}", 50 + seed, "--seed", f"{seed}") for seed in (3, 1, 2)]
    ((_, run),) = critical.sampling_runs(critical.analyse(runs), runs)
    assert {"--seed=1", "--steps"} < {*run.flags} and "50" in run.flags


def test_a_run_that_cannot_be_sampled_is_said_with_the_reason(tmp_path, monkeypatch, capsys):
    runs = [crossed(tmp_path / "run", 50)]

    def refused(out, runs, *_):
        (out / "logs").mkdir()
        (out / "logs" / f"{runs[0].name}.log").write_text(
            "fastsmooth: error: the batch is the whole training set\n"
        )

    monkeypatch.setattr(critical, "on_this_machine", refused)
    assert critical.sample_at_best(tmp_path, runs, {}, machines.Stop()) is True
    assert (
        capsys.readouterr().err
        == "failed to start: run: fastsmooth: error: the batch is the whole training set\n"
    )
    (curve,) = json.loads((tmp_path / "critical.json").read_text())["curves"]
    assert curve["best"] == 32 and curve["c2_sampled"] is None


@pytest.mark.parametrize(
    "received, failed, code", [("SIGTERM", False, 75), (None, True, 1), (None, False, 0)]
)
def test_how_the_runs_at_b_star_end_is_how_the_sweep_ends(
    received, failed, code, tmp_path, monkeypatch, capsys
):
    def done(out, runs, own, stop, results):
        for run in runs:
            crossed(out / run.name, 50)
            status(out / run.name, "done")
            (out / run.name / "critical.json").write_text('{"crossings": {}}')

    def sample(out, found, own, stop):
        stop.received = received
        return failed

    monkeypatch.setattr(sweep, "on_this_machine", done)
    monkeypatch.setattr(sweep, "sample_at_best", sample)
    assert sweep.main(["--out", str(tmp_path / "sweep"), "--critical", "--eps", "1"]) == code
    assert ("stopped by SIGTERM" in capsys.readouterr().out) == (code == 75)


# Slurm and Ray


@pytest.mark.full
def test_the_job_array_does_the_runs_and_queues_a_preempted_one_again(tmp_path):
    """bash checks the script; stand-ins for srun and scontrol run it, an array task at a time."""
    out, script, bin = tmp_path / "a sweep", tmp_path / "array.sh", tmp_path / "bin"
    flags = [*EXACT, "--epochs", "1", "--max-time", "600", "--lr", "0.1", "0.2"]
    options = ["--slurm", str(script), "--sbatch=--time=4:00:00", "--jobs", "3"]
    process = call(out, *flags, *options)
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert f"sbatch {script}" in shown
    subprocess.run(["bash", "-n", script], check=True)
    directives = [line for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --array=0-1%3" in directives and "#SBATCH --signal=USR1@120" in directives
    assert "#SBATCH --requeue" in directives and "#SBATCH --time=4:00:00" in directives
    bin.mkdir()
    for name, line in (
        ("srun", '"$@"'),
        ("scontrol", f'echo "$@" >> {shlex.quote(str(tmp_path / "queued"))}'),
    ):
        (bin / name).write_text(f"#!/bin/bash\n{line}\n")
        (bin / name).chmod(0o755)

    def task(number: int, before: str = "") -> int:
        env = os.environ | {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_JOB_ID": f"77{number}"}
        env["PATH"] = f"{before}{bin}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", script], env=env, capture_output=True, timeout=120
        ).returncode

    assert task(1) == 0
    assert read_status(out / "lr=0.2")["state"] == "done"
    assert not (tmp_path / "queued").exists()
    assert task(1) == 0  # nothing to do
    signalled = tmp_path / "signalled"
    signalled.mkdir()
    (signalled / "srun").write_text(  # as Slurm does: a signal to the job's step, once it trains
        '#!/bin/bash\n"$@" &\nuntil [ -s "'
        + str(out / "lr=0.1" / "status.json")
        + '" ]; do sleep 0.05; done\nkill -USR1 $!\nwait $!\n'
    )
    (signalled / "srun").chmod(0o755)
    code = task(0, f"{signalled}:")
    if code == 75:  # the signal may come after a run that is so short
        assert (tmp_path / "queued").read_text() == "requeue 770\n"
        assert read_status(out / "lr=0.1")["state"] == "preempted"
    assert task(0) == 0
    done = call(out)
    shown, errors = done.communicate(timeout=60)
    assert done.returncode == 0 and "2 of 2 runs are finished already" in shown, errors


def test_ray_does_the_same_runs(tmp_path):
    pytest.importorskip("ray")
    process = call(tmp_path / "sweep", *SHORT, "--lr", "0.05", "0.1", "--ray")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    for run in store.read_sweep(tmp_path / "sweep"):
        assert train.main([*run.flags, "--out", str(tmp_path / run.name)]) == 0
        assert outcome(tmp_path / "sweep" / run.name) == outcome(tmp_path / run.name)


def test_ray_that_is_not_installed_is_said_with_the_line_that_installs_it(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'fastsmooth[ray]'" in refusal(
        capsys, "--out", str(tmp_path / "s"), "--lr", "0.1", "--ray"
    )
