"""--micro-batch auto: what is found, that nothing moves meanwhile, and that a run keeps it."""

import functools
import json
import os

import pytest
import torch
from exact import EXACT
from forks import assert_same_bits, codes, final_state, logs, start_ranks
from rows import read_rows
from said import refused, said
from torch import nn

from fastsmooth import models
from fastsmooth.cli.config import resolve
from fastsmooth.cli.flags import ConfigError
from fastsmooth.cli.parse import parse
from fastsmooth.optim import NoisySGD
from fastsmooth.ranks import Ranks
from fastsmooth.runfolder.write import TIMES
from fastsmooth.train import main
from fastsmooth.training import fitting, step
from fastsmooth.training.ending import ran_out_of_memory
from fastsmooth.training.objective import Objective
from fastsmooth.training.plan import make_plan

LINE = ["--batchsize", "400", "--epochs", "1", "--seed", "5"]


def limit_forward(samples: int, kind: str = "") -> None:
    """A forward pass in training mode of more samples runs out of memory."""
    forward = step.Step._plain_forward

    fitting.TRIED.add("cpu")

    def limited(self, x, y, *more):
        if len(y) > samples and self.model.training:
            if kind:
                raise {"python": MemoryError(), "gpu": torch.OutOfMemoryError("CUDA"),
                       "onednn": RuntimeError("could not create a primitive")}[kind]  # fmt: skip
            torch.empty(1 << 60, dtype=torch.uint8)
        return forward(self, x, y, *more)

    step.Step._plain_forward = limited


@pytest.fixture
def limited(monkeypatch):
    """Call it with a number of samples."""
    monkeypatch.setattr(step.Step, "_plain_forward", step.Step._plain_forward)  # put back later
    monkeypatch.setattr(fitting, "TRIED", {*fitting.TRIED})
    return limit_forward


def run(out, *flags):
    done = said(main, [*EXACT, *LINE, *flags, "--out", str(out)])
    assert done.code == 0, done.err
    return done.out.splitlines()


def same_training(a, b):
    """But for what the two say of how the number was found."""
    states = [final_state(out) for out in (a, b)]
    for state in states:
        for name in ("metrics_bytes", "epoch_seconds", "made_with"):
            state.pop(name)
        state["last_epoch"] = {k: v for k, v in state["last_epoch"].items() if k not in TIMES}
    assert_same_bits(*states)
    rows = [[{k: v for k, v in r.items() if k not in TIMES} for r in read_rows(o)] for o in (a, b)]
    assert rows[0] == rows[1]


# What is found


@pytest.mark.parametrize(
    ("share", "most", "found"),
    [(128, 128, 128), (128, 127, 64), (100, 30, 25), (100, 24, 13), (7, 3, 2), (1, 1, 1)],
)  # fmt: skip
def test_the_first_of_the_halves_that_fits_is_taken(share, most, found):
    tried = []
    fits = lambda n: tried.append(n) or n <= most  # noqa: E731
    assert fitting.what_fits(share, fits, lambda n: False) == found
    assert tried[-1] == found and all(n > most for n in tried[:-1])
    assert tried == sorted(tried, reverse=True)


def test_parts_that_would_leave_one_sample_alone_are_passed_over():
    alone = lambda n: 33 % n == 1  # noqa: E731
    assert fitting.what_fits(33, lambda n: n <= 16, alone) == 9
    with pytest.raises(ConfigError, match=r"not even 2 samples fit in memory.*norm group"):
        fitting.what_fits(32, lambda n: False, lambda n: n == 1)
    with pytest.raises(ConfigError, match="not even 1 sample fits in memory together: use a small"):
        fitting.what_fits(32, lambda n: False, lambda n: False)


@pytest.mark.parametrize(
    ("flags", "processes", "expected"),
    [
        (["--batchsize", "100"], 1, (100, 8)),
        (["--batchsize", "100"], 3, (34, 8)),
        (["--method", "batch", "--batchsize", "50", "--decay-epoch", "5"], 1, (200, 8)),
        (["--method", "batch", "--batchsize", "50", "--budget", "updates=9"], 1, (50, 8)),
        # by pixels: 64^2 * 32 < 96^2 * 32, and the batch has grown by then
        (["--dataset", "folder", "--image-size", "64 @0, 96 @50%", "--epochs", "4"], 1, (32, 96)),
    ],
)
def test_the_batch_that_is_tried_is_the_largest_of_the_run(flags, processes, expected):
    class Images:
        size, channels = 8, 3

    plan = make_plan(resolve(parse(flags).given), 1437)
    share, shape = fitting.largest_share(plan, Images, processes)
    assert (share, shape) == (expected[0], (expected[0], 3, expected[1], expected[1]))


def test_what_counts_as_memory_that_ran_out():
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("could not create a primitive"),
    ):
        assert ran_out_of_memory(error, torch)
    assert not ran_out_of_memory(RuntimeError("shapes do not match"), torch)


class Restless(nn.Module):
    """Dropout, BatchNorm and a buffer of its own that every pass moves."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5))
        self.head = nn.Linear(8, 10)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.passes += 1
        return self.head(self.body(x).mean(dim=(2, 3)))


@pytest.mark.parametrize("most", [9, 2])
def test_nothing_moves_while_it_is_tried(most, limited):
    limited(most)
    torch.manual_seed(1)
    model = Restless().eval()
    optimizer = NoisySGD(model.parameters(), "shb", 0.1, 0.9)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    trial = fitting.Trial(model, optimizer, (9, 3, 8, 8), "fp32", None, Objective())
    assert [trial.fits(n) for n in (9, 5, 2)] == [n <= most for n in (9, 5, 2)]
    assert_same_bits(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(not m.any() for s in optimizer.state.values() for m in s.values())


def test_an_error_that_is_none_of_memory_is_not_swallowed():
    model = Restless()
    optimizer = NoisySGD(model.parameters(), "sgd", 0.1)
    trial = fitting.Trial(model, optimizer, (4, 5, 8, 8), "fp32", None, Objective())
    with pytest.raises(RuntimeError, match="channels"):
        trial.fits(4)


def test_several_processes_take_what_fits_in_all():
    class Others(Ranks):
        def gather(self, value):
            return [value, 16, 64]

    assert fitting.smallest_of(Others(), 64, 64) == 16
    assert fitting.smallest_of(Ranks(), 64, 64) is None
    assert fitting.smallest_of(Ranks(), 32, 64) == 32


# What a run does


@pytest.mark.parametrize(
    "kind", ["", *(pytest.param(k, marks=pytest.mark.full) for k in ("python", "gpu", "onednn"))]
)
def test_a_batch_that_does_not_fit_is_cut_as_by_hand(kind, tmp_path, limited):
    by_hand = run(tmp_path / "hand", "--micro-batch", "100")
    limited(120, kind)
    lines = run(tmp_path / "auto", "--micro-batch", "auto")
    assert "micro-batch 100: 400 samples do not fit in memory together" in lines
    assert any("BatchNorm sees 100 samples at a time" in line for line in by_hand)
    assert any("BatchNorm sees 100 samples at a time" in line for line in lines)
    same_training(tmp_path / "auto", tmp_path / "hand")
    config, env = (
        json.loads((tmp_path / "auto" / f).read_text()) for f in ("config.json", "env.json")
    )
    assert (config["micro_batch"], env["micro_batch"]) == ("auto", 100)
    assert final_state(tmp_path / "auto")["made_with"]["micro_batch"] == 100


def test_a_processor_is_not_tried(tmp_path):
    lines = run(tmp_path / "run", "--micro-batch", "auto")
    assert "--micro-batch auto: whole batches, since what fits is tried on a GPU alone" in lines
    assert final_state(tmp_path / "run")["made_with"]["micro_batch"] is None


def test_a_batch_that_fits_is_not_cut(tmp_path, limited):
    limited(400)
    line = ["--measure", "step", "--track-noise", "every=2", "--norm", "group"]
    run(tmp_path / "plain", *line)
    lines = run(tmp_path / "auto", *line, "--micro-batch", "auto")
    said_of_it = "--micro-batch auto: the largest batch fits in memory (400 samples together)"
    assert said_of_it in lines
    same_training(tmp_path / "auto", tmp_path / "plain")
    state = final_state(tmp_path / "auto")
    assert state["made_with"]["micro_batch"] is None and state["made_with"]["measure"] == "step"


def test_a_batch_that_is_cut_cannot_measure_as_its_step(tmp_path, limited):
    limited(200)
    line = [*LINE, "--micro-batch", "auto", "--norm", "group", "--track-noise", "every=2"]
    words = refused(main, [*line, "--measure", "step", "--out", str(tmp_path / "run")])
    assert words == "--measure step: --micro-batch cuts the batch: use --measure apart"


@pytest.mark.parametrize("most", [120, pytest.param(1000, marks=pytest.mark.full)])
def test_a_run_that_goes_on_keeps_what_was_found(most, tmp_path, limited, monkeypatch):
    limited(most)
    line = [*EXACT, *LINE, "--epochs", "2", "--micro-batch", "auto"]
    assert main([*line, "--out", str(tmp_path / "whole")]) == 0
    out = tmp_path / "halves"
    assert main([*line, "--max-time", "0.001", "--out", str(out)]) == 75
    # more memory than before, or less, and nothing is tried again
    monkeypatch.setattr(fitting, "what_fits", None)
    resumed = said(
        main, ["--resume", "--micro-batch", "auto", "--max-time", "90", "--out", str(out)]
    )
    assert resumed.code == 0 and "going on with" not in resumed.err
    same_training(out, tmp_path / "whole")


def test_another_number_may_be_given_to_a_run_that_goes_on(tmp_path, limited):
    limited(120)
    out = tmp_path / "run"
    line = [*EXACT, *LINE, "--micro-batch", "auto", "--max-time", "0.001", "--out", str(out)]
    assert main(line) == 75
    resumed = said(main, ["--resume", "--micro-batch", "50", "--max-time", "90", "--out", str(out)])
    assert resumed.code == 0 and "--micro-batch 50 instead of 100" in resumed.err


def test_memory_that_runs_out_later_names_a_smaller_number(tmp_path, monkeypatch, limited):
    limited(120)
    advance = step.Step.update

    def later(self):
        raise MemoryError

    monkeypatch.setattr(step.Step, "update", later)
    line = [*EXACT, *LINE, "--out", str(tmp_path / "run"), "--micro-batch", "auto"]
    done = said(main, line)
    monkeypatch.setattr(step.Step, "update", advance)
    assert done.code == 2 and done.err == (
        "fastsmooth: error: out of memory in main memory at batch 400, of which 100 samples "
        "together did fit before the run: give --micro-batch 50, with --resume too, or lower "
        "--batchsize\n"
    )
    done = said(main, [*LINE, "--out", str(tmp_path / "plain")])
    assert done.code == 2 and "--micro-batch auto finds how many fit" in done.err


def of_one_feature(classes: int, channels: int) -> nn.Module:
    """BatchNorm over 1 x 1 features, which cannot train on one sample."""
    return nn.Sequential(
        nn.Conv2d(channels, 8, 8), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, classes)
    )


def test_no_sample_is_left_alone_before_batchnorm(tmp_path, limited, monkeypatch):
    monkeypatch.setitem(models.BUILDERS, "of one feature", of_one_feature)
    limited(20)
    # 33 = 17 + 16, but the last batch of an epoch, 1437 % 33 = 18, is 17 + 1
    lines = run(
        *(tmp_path / "run", "--batchsize", "33", "--model", "of one feature"),
        *("--micro-batch", "auto"),
    )
    assert "micro-batch 9: 33 samples do not fit in memory together" in lines


def test_two_processes_take_the_smaller_number(tmp_path):
    flags = [*LINE, "--norm", "group", "--micro-batch", "auto"]
    out = tmp_path / "run"
    processes = start_ranks(flags, out, 2, functools.partial(limit_by_rank, 120, 60))
    assert codes(processes) == [0, 0], logs(out)
    assert "micro-batch 50: 200 samples do not fit in memory together" in logs(out)


def limit_by_rank(first: int, second: int) -> None:
    limit_forward(first if os.environ["RANK"] == "0" else second)


def test_sync_bn_wants_the_whole_batch():
    words = refused(main, ["--sync-bn", "--micro-batch", "auto"])
    assert words.startswith("--sync-bn wants the whole batch at once, --micro-batch cuts it")
