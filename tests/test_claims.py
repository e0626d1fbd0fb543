"""The rules by which the papers' claims are judged: what the data cannot decide is never a pass."""

import importlib.util
import sys
from pathlib import Path

import pytest
from test_critical import run

from fastsmooth.sweep.critical import analyse

SPEC = importlib.util.spec_from_file_location(
    "claims", Path(__file__).parent.parent / "scripts" / "claims.py"
)
claims = importlib.util.module_from_spec(SPEC)
sys.modules["claims"] = claims  # which dataclasses look up
SPEC.loader.exec_module(claims)


@pytest.mark.parametrize(
    "value, error, expected",
    [
        (1.0, 0.1, "holds"),
        (1.0, 0.6, "is not resolved"),
        (-1.0, 0.1, "fails"),
        (0.0, 0.0, "is not resolved"),
    ],
)
def test_a_comparison_is_decided_by_two_standard_errors(value, error, expected):
    assert claims.above(value, error) == claims.below(-value, error) == expected


def curve(steps: dict[int, tuple[int, ...]], **extra):
    runs = [
        run(b, {"0.9": t}, seed, optimizer="sgd", **extra)
        for b, ts in steps.items()
        for seed, t in enumerate(ts)
    ]
    return analyse(runs)[0]


def test_a_curve_is_not_convex_by_a_large_error_alone():
    """N is 260, 116, 130, 134, 250 thousand, once with a spread of 1 % and once with one seed far
    off."""
    sharp = {
        32: (8100, 8150),
        64: (1800, 1820),
        128: (1010, 1020),
        256: (700, 710),
        512: (900, 910),
    }
    assert claims.convex(curve(sharp)) == "holds"
    assert claims.convex(curve(sharp | {128: (1010, 4000)})) != "holds"
    assert claims.convex(curve(sharp | {128: (4000, 4010)})) == "fails"


def test_censored_batches_decide_nothing():
    runs = [
        run(b, {"0.9": 100 * 512 // b}, seed, optimizer="sgd")
        for b in (64, 128, 256, 512)
        for seed in (0, 1)
    ]
    for r in runs[-2:]:
        r.critical["crossings"]["0.9"]["censored"] = True
    (found,) = analyse(runs)
    assert claims.convex(found) == "is not resolved" and found.censored == [512]


def test_a_batch_without_a_mean_between_others_decides_nothing():
    """Without it the differences are not over equal steps of log b."""
    steps = {
        32: (8100, 8150),
        64: (1800, 1820),
        128: (1010, 1020),
        256: (700, 710),
        512: (900, 910),
    }
    assert claims.convex(curve(steps)) == "holds"
    assert claims.convex(curve(steps | {128: (1010, None)})) == "is not resolved"
    # the four that are left are in one piece
    assert claims.convex(curve(steps | {512: (900, None)})) == "holds"


def test_b_star_on_one_batch_for_all_thresholds_does_not_fall():
    assert claims.falling([64, 64]) == "is not resolved"
    assert claims.falling([128, 64]) == "holds" and claims.falling([64, 128]) == "fails"
