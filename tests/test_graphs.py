"""Captured updates, on a CPU: recorded on a tape and played again, they end in the bits of ordinary
ones. What a GPU does with them is in test_gpu.py."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from forks import assert_same_run, final_state, finish
from rows import read_rows
from tape import HostRead, TapeRecorder, on_tapes
from torch import nn

from fastsmooth import models
from fastsmooth.cli.config import resolve
from fastsmooth.cli.parse import parse
from fastsmooth.data.stream import Batch
from fastsmooth.kernels import tally
from fastsmooth.noise.instrument import Instrument
from fastsmooth.train import main
from fastsmooth.training import build, graphs, loop, modes
from fastsmooth.training import device as machine
from fastsmooth.training.clock import Clock
from fastsmooth.training.graphs import Graphs, Kind, Pace
from fastsmooth.training.plan import make_plan

STEP = ["--measure", "step", "--track-noise"]
HYBRID = ["--method", "hybrid", "--decay-epoch", "1"]
RUNS = {
    "sgd, exp": ["--method", "exp"],
    "shb, hybrid": ["--optimizer", "shb", "--lr", "0.02", *HYBRID],
    "nshb, beta-batch": ["--optimizer", "nshb", "--method", "beta-batch"],
    "qhm, cosine": ["--optimizer", "qhm", "--method", "cosine", "--weight-decay", "1e-3"],
    "lr and batch": ["--method", "lr-batch", "--optimizer", "shb", "--c2", "50", "--k2", "4"],
    "augmented, group norm": ["--augment", "crop-flip-rotate", "--norm", "group", *HYBRID],
    "warm-up": ["--warmup", "60", "--method", "step", "--milestones", "2", "--optimizer", "shb"],
    "batches that change within epochs": [
        *(
            "--schedule",
            "lr: 0 @0 -> 0.05 @2; batch: 64 @0, 40 @0.5, 64 @1.4; beta: 0.5 @0, 0.9 @9up",
        ),
        *("--optimizer", "shb"),
    ],
    "drop last": ["--drop-last", "--method", "poly", "--power", "0.5"],
    "micro-batches": ["--micro-batch", "16", *HYBRID],
    "threads": ["--loader", "threads", "--augment", "crop-flip", "--chunk", "100", *HYBRID],
    "dropout": ["--model", "with dropout", "--optimizer", "shb"],
    "bf16": ["--precision", "bf16", "--optimizer", "shb", "--budget", "updates=11"],
    "bf16, threads": ["--precision", "bf16", "--loader", "threads", "--budget", "updates=11"],
    "critical": ["--mode", "critical", "--eps", "1.5", "1e-9", "--min-epochs", "0"],
    "critical, root mean square": [
        *("--mode", "critical", "--eps", "2.2", "1e-9", "--criterion", "rms-norm"),
        *("--min-epochs", "1", "--optimizer", "nshb"),
    ],
    "critical, full gradients": [
        *("--mode", "critical", "--criterion", "full-grad", "--eps", "1e-6", "--bn", "eval"),
        *("--full-grad-every", "7", "--min-epochs", "0"),
    ],
    "sampling": [
        *("--mode", "sampling", "--steps", "12", "40", "--draws", "2", "--bn", "eval"),
        *("--checkpoint-every", "7"),
    ],
    "sampling, histories": [
        *("--mode", "sampling", "--steps", "30", "--draws", "2", "--optimizer", "shb"),
        *("--checkpoint-every", "7"),
    ],
    "per-sample": ["--track-noise", "every=7", "--norm", "group", *HYBRID],
    "parts of a batch": ["--track-noise", "every=7", "--optimizer", "qhm", *HYBRID],
    "measured steps": [*STEP, "every=2", "--norm", "group", "--optimizer", "shb", *HYBRID],
    "measured steps, batch statistics": [*STEP, "every=3", "--bn", "batch", *HYBRID],
    "measured steps alone": [*STEP, "every=1", "--norm", "group", "--method", "exp"],
    "measured steps, dropout": [*STEP, "every=2", "--bn", "batch", "--model", "with dropout"],
    "measured steps, bf16": [
        *(*STEP, "every=2", "--bn", "batch", "--precision", "bf16", "--budget", "updates=16"),
        *("--optimizer", "nshb", "--batchsize", "32"),
    ],
    "measured steps, threads": [
        *(*STEP, "every=2", "--norm", "group", "--loader", "threads", "--augment", "crop-flip"),
        *("--chunk", "100"),
    ],
    "measured steps, tokens": [*STEP, "every=2", "--model", "of tokens"],
    "GSAM, clipped, averaged": [
        *("--sam", "rho=0.1,alpha=0.2", "--clip-norm", "0.5", "--ema", "0.9", "--top5"),
        *("--loss", "bce", "--label-smoothing", "0.1", "--optimizer", "shb", "--batchsize", "64"),
        *("--weight-decay", "1e-3", "--decay-weights-only"),
    ],
    "measured steps, clipped": [*STEP, "every=2", "--norm", "group", "--clip-norm", "0.5"],
}
# of which each has what no other here has; the rest with --full
QUICK = [
    "shb, hybrid", "warm-up", "micro-batches", "threads", "dropout", "bf16", "critical", "sampling",
    "per-sample", "measured steps", "measured steps, batch statistics", "measured steps, tokens",
    "GSAM, clipped, averaged", "batches that change within epochs",
]  # fmt: skip
full = pytest.mark.full


@pytest.fixture
def recorders(monkeypatch) -> list[TapeRecorder]:
    """Those that runs with --graphs on make."""
    made: list[TapeRecorder] = []

    def recorder(*arguments) -> TapeRecorder:
        made.append(TapeRecorder(*arguments))
        return made[-1]

    monkeypatch.setattr(build, "CudaRecorder", recorder)
    monkeypatch.setitem(models.BUILDERS, "with dropout", with_dropout)
    monkeypatch.setitem(models.BUILDERS, "of tokens", of_tokens)
    monkeypatch.setattr(machine, "choose_graphs", lambda c, *others: c.graphs)
    return made


def with_dropout(classes: int, channels: int) -> nn.Module:
    model = models.build("resnet8", classes, channels=channels)
    model.head = nn.Sequential(nn.Dropout(0.3), model.head)
    return model


class Tokens(nn.Module):
    """Patches with places, whose parameters are one a sample while it is measured."""

    def __init__(self, classes: int, channels: int):
        super().__init__()
        self.patch, self.place = (
            nn.Conv2d(channels, 8, 4, 4),
            nn.Parameter(0.1 * torch.randn(1, 4, 8)),
        )
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, classes)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).mT + self.place
        return self.head(self.norm(tokens.tanh()).mean(dim=1))


def of_tokens(classes: int, channels: int) -> nn.Module:
    return Tokens(classes, channels)


def run(out: Path, *flags: str, code: int = 0) -> Path:
    length = [] if "--budget" in flags else ["--epochs", "3"]
    base = ["--batchsize", "64", *length, "--device", "cpu", "--log-every", "10"]
    assert main([*base, *flags, "--out", str(out)]) == code
    return out


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=full) for n in RUNS])
def test_replayed_updates_end_in_the_bits_of_ordinary_ones(name, tmp_path, recorders):
    ordinary = run(tmp_path / "off", *RUNS[name], "--graphs", "off")
    assert not recorders
    replayed = run(tmp_path / "on", *RUNS[name], "--graphs", "on")
    assert_same_run(replayed, ordinary)
    (recorder,) = recorders
    summary = json.loads((replayed / "summary.json").read_text())
    assert summary["captured_graphs"] == len(recorder.tapes) > 0
    assert sum(tape.replays for tape in recorder.tapes) >= 9
    if name.startswith("measured steps"):
        every = int(RUNS[name][len(STEP)].removeprefix("every="))
        measured = [row for row in read_rows(replayed) if row["kind"] == "measure"]
        # at 64 samples, or all at one size: the first measured update as it is, the others replayed
        assert len(measured) > 7 and len(recorder.tapes) >= (2 if every > 1 else 1)


def test_every_size_that_lasts_is_captured_once_and_two_are_kept(tmp_path, recorders):
    out = run(tmp_path / "on", *HYBRID, "--epochs", "4", "--graphs", "on")
    sizes = {row["batch_size"] for row in read_rows(out)}
    (recorder,) = recorders
    assert len(recorder.tapes) == len(sizes) == 4
    assert [not tape.calls for tape in recorder.tapes] == [True, True, True, True]  # all given up
    assert recorder.most_alive == 2


@pytest.mark.parametrize(
    "name",
    [
        "measured steps",
        *(pytest.param(n, marks=full) for n in ("shb, hybrid", "measured steps, batch statistics")),
    ],
)
def test_an_interrupted_run_goes_on_in_the_same_bits(name, tmp_path, recorders):
    flags = [*RUNS[name], "--graphs", "on", "--checkpoint-every", "5"]
    whole = run(tmp_path / "whole", *flags)
    parted = run(tmp_path / "parted", *flags, "--max-time", "0.8", code=75)
    assert main(["--resume", "--out", str(parted), "--max-time", "1h"]) == 0
    assert_same_run(parted, whole)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param([], id="one part"),
        pytest.param(["--norm", "group", "--micro-batch", "8"], id="parts", marks=full),
    ],
)
def test_two_processes_replay_their_exchange(flags, tmp_path):
    """Shares of 32; the last batch of an epoch has unequal ones and is done as it is."""
    argv = ["--batchsize", "64", "--epochs", "2", "--device", "cpu", "--optimizer", "shb"]
    argv += ["--method", "exp", "--lr", "0.02", *flags]
    for how in ("off", "on"):
        finish([*argv, "--graphs", how], tmp_path / how, 2, on_tapes)
    assert json.loads((tmp_path / "on" / "summary.json").read_text())["captured_graphs"] == 1
    assert_same_run(tmp_path / "on", tmp_path / "off")


class LooksAtGradients(Instrument):
    """Every fifth update, by an eager one between replays."""

    name = "looks"
    wants_gradient = True

    def due(self, live) -> bool:
        return live.update % 5 == 0

    def before_update(self, live, x, y, point):
        grads = [p.grad for p in live.model.parameters()]
        return {"c2_sampled": sum(g.double().square().sum() for g in grads).item()}


def test_an_instrument_that_is_due_finds_the_gradient_of_the_batch(
    tmp_path, recorders, monkeypatch
):
    monkeypatch.setattr(modes, "INSTRUMENTS", (lambda parts: LooksAtGradients(),))
    monkeypatch.setattr(build, "INSTRUMENTS", (lambda parts: LooksAtGradients(),))
    outs = [run(tmp_path / g, *HYBRID, "--graphs", g) for g in ("off", "on")]
    assert_same_run(*outs)
    assert recorders[0].tapes


# What a tape finds


class Reads(Instrument):
    name = "reads"

    def observe(self, kept: tally.State) -> None:
        kept.updates.item()


class Counts(Instrument):
    """Keeps the number of updates in Python."""

    name = "counts"

    def __init__(self) -> None:
        self.count, self.seen = 0, torch.zeros((), dtype=torch.int64)

    def observe(self, kept: tally.State) -> None:
        self.count += 1
        self.seen.fill_(self.count)

    def state_dict(self) -> dict:
        return {"seen": self.seen}


def test_a_read_by_the_host_ends_a_run_that_asks_for_graphs(
    tmp_path, recorders, monkeypatch, capsys
):
    monkeypatch.setattr(build, "INSTRUMENTS", (lambda parts: Reads(),))
    run(tmp_path / "on", "--graphs", "on", code=2)
    assert "--graphs on: an update of 64 samples cannot be captured" in capsys.readouterr().err
    monkeypatch.setattr(build, "CudaRecorder", TapeRecorder)
    with pytest.raises(HostRead):
        TapeRecorder().record(lambda: torch.ones(()).item())


def test_a_number_kept_in_python_shows(tmp_path, recorders, monkeypatch):
    monkeypatch.setattr(build, "INSTRUMENTS", (lambda parts: Counts(),))
    outs = [run(tmp_path / g, "--graphs", g) for g in ("off", "on")]
    seen = [final_state(out)["instruments"]["counts"]["seen"].item() for out in outs]
    assert seen[0] == 69 > seen[1]


# Which updates are captured


class Counting:
    """An update that is counted, and a recorder that may have no room."""

    def __init__(self, room: bool = True, fails: str = ""):
        self.room, self.fails, self.done = room, fails, []
        self.step = SimpleNamespace(dtype=torch.float32, norms=None)

    def __call__(
        self, images, size, cursor=None, before_update=lambda: None, measured=False
    ) -> None:
        before_update()
        self.step.norms = object() if measured else None
        self.done.append((size, "measured") if measured else size)

    def warm(self, update) -> None:
        self.done.append("warm")
        update()

    def fits(self) -> bool:
        return self.room

    def record(self, update):
        done, self.done = self.done, []
        update()  # captured, so not done
        (captured,), self.done = self.done, done
        if self.fails == "all" or (self.fails and isinstance(captured, tuple)):
            raise RuntimeError("operation not permitted when stream is capturing")
        self.done.append("record")
        return self

    def replay(self) -> None:
        self.done.append("replay")

    def reset(self) -> None:
        self.done.append("reset")


class Source:
    cursor = torch.zeros((), dtype=torch.int64)

    def ahead(self, count, dtype):
        return torch.empty(count), torch.empty(count)


def doing(fake: Counting, sizes: list[int], wanted: set[int], strict: bool = False) -> list:
    """What is done of updates of these sizes, of which negative ones are measured."""
    kinds = frozenset(Kind(abs(size), size < 0) for size in wanted)
    does = Graphs(fake, kinds, 1, fake, strict, Clock())
    for size in sizes:
        does(Batch(Source(), abs(size), abs(size)), measured=size < 0)
        assert (fake.step.norms is not None) == (size < 0)
    return fake.done


def test_the_first_update_of_a_size_is_done_as_it_is_and_the_second_captured():
    assert doing(Counting(), [8, 8, 3, 8], {8}) == ["warm", 8, "record", "replay", 3, "replay"]


def test_the_graph_that_the_schedule_has_left_is_given_back_first():
    done = doing(Counting(), [1, 1, 2, 2, 3, 3, 2], {1, 2, 3})
    assert [word for word in done if isinstance(word, str) and word != "warm"] == [
        *("record", "replay", "record", "replay", "reset", "record", "replay", "replay")
    ]


def test_measured_updates_have_graphs_of_their_own_and_two_are_kept_in_all():
    """One a size of each kind; those of the size before are given back first, in their order."""
    assert doing(Counting(), [-8, 8, 8, -8, 8, -8], {8, -8}) == [
        *("warm", (8, "measured"), "warm", 8, "record", "replay", "record", "replay"),
        *("replay", "replay"),
    ]
    done = doing(Counting(), [-1, -1, 1, 1, -2, 2, 2, -2, 2, -2], {1, -1, 2, -2})
    assert [word for word in done if word in ("record", "reset", "replay")] == [
        *("record", "replay", "record", "replay"),
        *("reset", "record", "replay", "reset", "record", "replay", "replay", "replay"),
    ]
    # where none lasts, they are done as they are
    assert doing(Counting(), [-8, -8, 8, 8], {8})[:2] == [(8, "measured")] * 2


def test_measured_updates_are_captured_where_enough_of_them_last(tmp_path, recorders):
    """Of 66 updates of 64 samples 22 are measured, or two; three are asked for."""
    for every, captured in ((3, 2), (40, 1)):
        flags = [*STEP, f"every={every}", "--norm", "group", "--graphs", "on"]
        out = run(tmp_path / str(every), *flags)
        assert json.loads((out / "summary.json").read_text())["captured_graphs"] == captured


def test_room_is_left_for_the_update_that_takes_most(monkeypatch):
    peaks = iter([700, 300])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    recorder = graphs.CudaRecorder(torch.device("cuda"), lambda: None)
    for _ in range(2):
        recorder.warm(lambda: None)
    assert recorder.needed == 600


def test_what_a_replay_leaves_is_what_its_capture_left():
    fake = Counting()
    does = Graphs(fake, frozenset({Kind(4, True), Kind(8, True)}), 1, fake, False, Clock())
    left: dict[int, list] = {4: [], 8: []}
    for size in (4, 4, 8, 8, 4, 8):
        does(Batch(Source(), size, size), measured=True)
        left[size].append(fake.step.norms)
    assert left[4][1] is left[4][2] and left[8][1] is left[8][2]
    assert left[4][1] is not left[8][1] and left[4][0] is not left[4][1]


def test_a_measured_update_that_cannot_be_captured_leaves_the_others_captured(capsys):
    fake = Counting(fails="measured")
    assert doing(fake, [-8, -8, -8, 8, 8], {8, -8}) == [
        *("warm", (8, "measured"), (8, "measured"), (8, "measured")),
        *("warm", 8, "record", "replay"),
    ]
    (line,) = capsys.readouterr().err.splitlines()
    assert "no more measured updates are captured as CUDA graphs: at 8 samples, " in line


@pytest.mark.parametrize("fake", [Counting(room=False), Counting(fails="all")])
def test_without_room_or_where_a_capture_fails_updates_are_done_as_they_are(fake, capsys):
    assert doing(fake, [8, 8, 8], {8}) == ["warm", 8, 8, 8]
    said = capsys.readouterr().err.splitlines()
    assert (
        len(said) == 1 and "no more updates are captured as CUDA graphs: at 8 samples, " in said[0]
    )


def test_shares_of_unequal_size_are_done_as_they_are():
    fake = Counting()
    does = Graphs(fake, frozenset({Kind(9, False)}), 2, fake, False, Clock())
    for _ in range(3):
        does(Batch(Source(), 5, 9))
    assert fake.done == [9, 9, 9]


def test_auto_captures_small_batches_that_last():
    assert (graphs.LEAST, graphs.LARGEST) == (200, 256)


@pytest.mark.parametrize("flags", [[], ["--budget", "updates=450"], ["--drop-last"]])
def test_sizes_that_last_are_those_of_a_count_batch_by_batch(flags):
    given = ["--dataset", "cifar100", "--method", "beta-batch", "--optimizer", "shb", "--lr", "0.1"]
    if "--budget" not in flags:
        given += ["--epochs", "40"]
    plan = make_plan(resolve(parse([*given, *flags]).given), 5000)
    counted: Counter[int] = Counter()
    done = samples = 0
    for epoch in range(plan.config.epochs):
        size, left = plan.schedule.batch_size(epoch), 5000
        while left >= (size if plan.config.drop_last else 1) and not plan.spent(done, samples):
            counted[size] += left >= size
            done, samples, left = done + 1, samples + min(size, left), left - size
    wanted = {size for size, count in counted.items() if count >= 30 and size <= 200}
    assert plan.lasting(30, 200) == wanted
    assert 1 < len(wanted) < len(counted) or "--budget" in flags


class Event:
    """What the host waits for, in the order in which the device passes it."""

    waited: ClassVar[list[int]] = []
    made = 0

    def __init__(self) -> None:
        Event.made += 1
        self.number = Event.made

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        Event.waited.append(self.number)


def test_the_host_is_at_most_sixteen_updates_ahead(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    pace = Pace(torch.device("cuda"))
    for update in range(1, 81):
        pace.keep(update)
        # of the updates up to `update` the device has done all up to the last event waited for
        assert update - 8 * len(Event.waited) <= 16 - 1
    assert Event.waited == list(range(1, 10))


def test_a_gpu_tests_as_many_pixels_at_a_time_as_2000_images_of_32():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    sizes = [loop.test_batch_size(cuda, side) for side in (8, 32, 64, 224)]
    assert sizes == [32000, 2000, 500, 250] and loop.test_batch_size(cpu, 32) == 250
