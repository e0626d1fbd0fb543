"""The critical batch size against the published table and against curves whose answer is known."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from fastsmooth.report.crossings import steps_curve
from fastsmooth.runfolder.read import SavedRun
from fastsmooth.sweep.critical import analyse

# T(b) decoded from the published figure (arXiv 2402.02325) of SHB, ResNet-18 on CIFAR-100, lr 0.1,
# beta 0.9, at eps 0.5, 0.7, 1.0 (None: not printed to the update)
PUBLISHED = {
    32: (701_150, 420_529, 229_675),
    64: (286_117, 168_976, 89_483),
    128: (138_214, 80_195, 41_635),
    256: (68_055, 39_053, 20_102),
    512: (32_228, 18_852, 10_100),
    1024: (15_982, 9_599, 5_314),
    2048: (8_846, 5_599, 3_206),
    4096: (6_136, 3_909, 2_372),
    8192: (5_949, 3_853, 2_286),
}


def run(batch: int, steps: dict[str, int | None], seed: int = 0, **settings) -> SavedRun:
    config = {
        "optimizer": "shb",
        "lr": 0.1,
        "beta": 0.9,
        "nu": 0.5,
        "model": "resnet18",
        "batch_size": batch,
        "seed": seed,
    }
    config |= settings
    crossings = {
        eps: {"step": t, "epoch": 0, "samples": batch * t} if t else None
        for eps, t in steps.items()
    }
    momentum = 0.0 if config["optimizer"] == "sgd" else config["beta"]
    found = {"batch_size": batch, "seed": seed, "momentum": momentum, "crossings": crossings}
    found |= {"grad_norm_max": 2.0 + seed, "grad_norm_rms": 1.5}
    return SavedRun(Path("run"), config, status={"state": "done"}, critical=found)


def published() -> list[SavedRun]:
    return [run(b, dict(zip(("0.5", "0.7", "1"), t, strict=True))) for b, t in PUBLISHED.items()]


def test_the_published_table_has_the_published_critical_batches_and_constant():
    half, seven, one = analyse(reversed(published()))
    assert [c.eps for c in (half, seven, one)] == [0.5, 0.7, 1.0]
    assert [c.best for c in (half, seven, one)] == [1024, 512, 256]
    # the constant of the published code is 25.318
    assert half.c2_critical == pytest.approx(25.3187, rel=1e-5)
    assert 522 < seven.batch_of(25.318) < 523  # the published squares are drawn at 2^9 and 2^8
    assert 255.9 < one.batch_of(25.318) < 256.1


def test_thresholds_are_told_apart_by_their_exact_values():
    """Also where six digits agree, and however the run that found them wrote them down."""
    runs = [
        run(8, {"0.5": 10, "0.50000001": 9, "1": 5}),
        run(16, {"0.5": 6, "0.50000001": 4, "1.0": 3}),
    ]
    found = analyse(runs)
    assert [curve.eps for curve in found] == [0.5, 0.50000001, 1.0]
    assert [[b.steps for b in curve.batches] for curve in found] == [
        [(10,), (6,)],
        [(9,), (4,)],
        [(5,), (3,)],
    ]
    labels = [steps_curve(curve, "black")[0].label for curve in found]
    assert labels == ["ε 0.5", "ε 0.50000001", "ε 1"]


def test_the_floor_of_the_published_minimum_is_flat_and_its_range_is_said():
    half = analyse(published())[0]
    assert half.bracket == (128, 1024)  # N at 64 is 12 %, at 2048 11 % above the smallest
    assert not half.at_edge
    assert half.c2_range == (pytest.approx(25.3187 / 8, rel=1e-5), pytest.approx(25.3187, rel=1e-5))


def test_a_minimum_at_the_end_of_what_was_tried_is_said_to_be_there():
    (curve,) = analyse([run(b, {"0.5": 1000}) for b in (8, 16, 32)])
    assert curve.best == 8
    assert curve.at_edge


def test_a_batch_that_one_seed_did_not_reach_has_no_mean_and_is_never_the_best():
    runs = [
        run(8, {"1": 100}),
        run(8, {"1": None}, seed=1),
        run(16, {"1": 90}),
        run(16, {"1": 110}, seed=1),
    ]
    (curve,) = analyse(runs)
    small, large = curve.batches
    assert (small.n, small.not_reached, small.sfo_mean) == (1, 1, None)
    assert (large.mean_steps, large.sfo_mean) == (100, 1600)
    assert large.sd_steps == pytest.approx(math.sqrt(200))
    assert large.sfo_sd == pytest.approx(16 * math.sqrt(200))
    assert curve.best == 16


def test_a_threshold_that_no_batch_reached_has_no_best():
    (curve,) = analyse([run(8, {"0.1": None})])
    assert (curve.best, curve.bracket, curve.c2_critical, curve.at_edge) == (
        None,
        None,
        None,
        False,
    )
    json.dumps(curve.to_json(), allow_nan=False)


def test_the_norm_bound_is_of_the_same_runs():
    (curve,) = analyse([run(8, {"1": 10}), run(8, {"1": 12}, seed=1)])
    assert curve.k2 == 9.0
    assert curve.k2_mean_square == pytest.approx(2.25)


def test_runs_that_differ_in_more_than_batch_and_seed_are_curves_of_their_own():
    runs = [
        run(8, {"1": 10}),
        run(8, {"1": 10}, optimizer="sgd"),
        run(8, {"1": 10}, lr=0.2),
        run(16, {"1": 10}),
    ]
    runs.append(run(16, {"1": 10}, out="elsewhere", loader="torch", workers=3))
    assert [len(c.batches) for c in analyse(runs)] == [2, 1, 1]
    assert [c.kappa for c in analyse(runs)] == pytest.approx([100 + 1 / 0.9, 1.0, 100 + 1 / 0.9])


@pytest.mark.parametrize(
    "critical",
    [
        {},
        {"crossings": []},
        {"crossings": {"x": None}, "batch_size": 8, "seed": 0, "momentum": 0.9},
        {
            "crossings": {"1": {"step": "9", "samples": 1}},
            "batch_size": 8,
            "seed": 0,
            "momentum": 0.9,
        },
        {"crossings": {"1": None}, "batch_size": 0, "seed": 0, "momentum": 0.9},
        {"crossings": {"1": None}, "batch_size": 8, "seed": True, "momentum": 0.9},
        {"crossings": {"1": None}, "batch_size": 8, "seed": 0, "momentum": 1.0},
    ],
)
def test_files_that_are_no_result_are_left_out(critical):
    broken = dataclasses.replace(run(8, {"1": 10}), critical=critical)
    assert analyse([broken]) == []


def test_an_unfinished_run_is_left_out():
    assert analyse([dataclasses.replace(run(8, {"1": 10}), status={"state": "running"})]) == []


def test_a_censored_seed_is_in_no_mean_and_its_batch_never_the_best():
    """Below eps at the first update that counts: T is at most that, so that N would be too small by
    who knows how much."""
    runs = [
        run(8, {"1": 100}),
        run(8, {"1": 120}, seed=1),
        run(16, {"1": 40}),
        run(16, {"1": 45}, seed=1),
    ]
    before = analyse(runs)[0]
    assert before.best == 16
    runs[2].critical["crossings"]["1"]["censored"] = True
    (curve,) = analyse(runs)
    small, large = curve.batches
    assert (large.sfo_mean, large.sfo_sd, large.reached, large.bounds, large.not_reached) == (
        None,
        None,
        [45],
        [40],
        0,
    )
    assert (curve.best, curve.censored, curve.bracket) == (8, [16], (8, 8)) and curve.at_edge
    assert small.sfo_mean == 880
    written = curve.to_json()
    assert written["censored"] == [16] and [b["censored"] for b in written["batches"]] == [0, 1]
