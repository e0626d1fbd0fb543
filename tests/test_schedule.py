"""Schedules against torch schedulers, published tables and theory."""

import itertools
import math
import random
import re
from functools import partial

import numpy as np
import pytest
import torch
from lrs import torch_lrs

from fastsmooth import schedule
from fastsmooth.cli.config import resolve
from fastsmooth.schedule import METHODS, Method, Point, Schedule, Smoothing, balance, stepped_batch
from fastsmooth.training.plan import make_schedule

EPOCHS = 200
CIFAR = 50_000  # training images
CHANGES = (40, 80, 120, 160)

# ResNet-18 on CIFAR-100, lr 0.1 and beta 0.9: (C^2, K^2) as published; qhm takes those of nshb.
CONSTANTS = {
    "sgd": (1280.0, 1.0),
    "shb": (25.318, 1.77**2),
    "nshb": (128.0, 4.5**2),
    "qhm": (128.0, 4.5**2),
}
MOMENTUM_FORMS = [("shb", "v3", 1.0), ("nshb", "v1", 1.0), ("nshb", "v3", 1.0), ("qhm", "v3", 0.7)]
SOLVED = ("beta", "lr-beta", "beta-batch", "lr-batch")


def plain(method, batch=32, epochs=EPOCHS, **options):
    """A schedule of plain SGD with unit C."""
    return Schedule(method, epochs=epochs, lr=0.1, batch_size=batch, **options)


def momentum(method, optimizer="shb", form="v1", nu=1.0, batch=128, epochs=EPOCHS, **options):
    """A schedule of a momentum optimizer with the published constants."""
    c2, k2 = CONSTANTS[optimizer]
    noise = {"c2": c2, "k2": k2, "nu": nu, "version": form if optimizer == "nshb" else None}
    start = {"lr": 0.1, "batch_size": batch, "momentum": 0.9}
    if METHODS[method].uses == "milestones":
        options |= {"milestones": range(40, epochs, 40)}
    return Schedule(method, epochs=epochs, optimizer=optimizer, **start, **noise, **options)


def agrees(value, printed):
    """True where `value` rounds to the decimal number `printed`."""
    decimals = len(printed.partition(".")[2])
    return abs(value - float(printed)) <= 0.5 * 10**-decimals * (1 + 1e-9)


# The methods of P1


def test_the_solved_methods_are_those_of_the_papers():
    assert set(SOLVED) == schedule.SOLVED


def test_constant_never_changes():
    assert set(plain("constant").points()) == {Point(0.1, 32, 0.0)}


SCHEDULERS = torch.optim.lr_scheduler
TORCH = {
    "lr": ("lr", {}, lambda o: SCHEDULERS.StepLR(o, 40, 0.707106781186548)),
    "hybrid": ("hybrid", {}, lambda o: SCHEDULERS.StepLR(o, 40, 0.866025403784439)),
    "poly 0.9": ("poly", {"power": 0.9}, lambda o: SCHEDULERS.PolynomialLR(o, EPOCHS, 0.9)),
    "poly 0.5": ("poly", {"power": 0.5}, lambda o: SCHEDULERS.PolynomialLR(o, EPOCHS, 0.5)),
    "poly 4": ("poly", {"power": 4.0}, lambda o: SCHEDULERS.PolynomialLR(o, EPOCHS, 4.0)),
    "cosine": ("cosine", {}, lambda o: SCHEDULERS.CosineAnnealingLR(o, EPOCHS)),
    "step": (
        "step",
        {"milestones": (60, 120, 160), "factor": 0.2},
        lambda o: SCHEDULERS.MultiStepLR(o, [60, 120, 160], 0.2),
    ),
    "step at the ends": (
        "step",
        {"milestones": [1, 2, 199]},
        lambda o: SCHEDULERS.MultiStepLR(o, [1, 2, 199]),
    ),
    "exp": ("exp", {"gamma": 0.9}, lambda o: SCHEDULERS.ExponentialLR(o, 0.9)),
    "exp 0.99": ("exp", {"gamma": 0.99}, lambda o: SCHEDULERS.ExponentialLR(o, 0.99)),
}


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("case", TORCH)
def test_learning_rate_of_every_epoch_is_that_of_the_torch_scheduler(case, shifted):
    method, options, make = TORCH[case]
    ours = [p.lr for p in plain(method, shifted=shifted, **options).points()]
    # torch multiplies step by step; only cosine's recursion loses digits as its factors cancel
    absolute = EPOCHS * 0.1 * 2.0**-53 if method == "cosine" else 0.0
    assert ours == pytest.approx(torch_lrs(make, EPOCHS), rel=1e-12, abs=absolute)


@pytest.mark.parametrize("epochs", [1, 7, 37, 300])
def test_poly_and_cosine_span_the_epochs_of_the_run(epochs):
    for method, make in [
        ("poly", lambda o: SCHEDULERS.PolynomialLR(o, epochs, 0.9)),
        ("cosine", lambda o: SCHEDULERS.CosineAnnealingLR(o, epochs)),
    ]:
        ours = [p.lr for p in plain(method, epochs=epochs).points()]
        assert ours == pytest.approx(
            torch_lrs(make, epochs), rel=1e-12, abs=epochs * 0.1 * 2.0**-53
        )


PUBLISHED_LRS = {
    ("lr", 0.9): {0: "0.1", 39: "0.1", 40: "0.0707107", 79: "0.0707107", 80: "0.05", 119: "0.05",
                  120: "0.0353553", 159: "0.0353553", 160: "0.025", 199: "0.025"},
    ("hybrid", 0.9): {0: "0.1", 40: "0.0866025", 80: "0.075", 120: "0.0649519", 160: "0.05625"},
    ("batch", 0.9): {0: "0.1", 40: "0.1", 199: "0.1"},
    ("poly", 0.9): {1: "0.0995499", 40: "0.0818052", 100: "0.0535887", 160: "0.0234924",
    199: "0.000849323"},
    ("poly", 0.5): {100: "0.0707107", 199: "0.00707107"},
    ("cosine", 0.9): {40: "0.0904508", 100: "0.05", 160: "0.00954915", 199: "0.00000617"},
    ("exp", 0.9): {40: "0.00147809", 100: "0.000002656"},
}  # fmt: skip


@pytest.mark.parametrize("method, power", PUBLISHED_LRS)
def test_learning_rates_are_those_of_the_published_table(method, power):
    s = plain(method, power=power)
    for epoch, printed in PUBLISHED_LRS[method, power].items():
        assert agrees(s(epoch).lr, printed), (epoch, s(epoch).lr, printed)


@pytest.mark.parametrize("method", ["lr", "poly", "cosine", "exp"])
def test_methods_of_the_learning_rate_leave_the_batch_alone(method):
    assert {(p.batch_size, p.momentum) for p in plain(method).points()} == {(32, 0.0)}


STAGES = {
    ("batch", 32): [32, 64, 128, 256, 512],
    ("batch", 16): [16, 32, 64, 128, 256],
    ("hybrid", 32): [32, 48, 72, 108, 162],
}


@pytest.mark.parametrize("method, batch", STAGES)
def test_batch_grows_at_the_epochs_at_which_the_learning_rate_decays(method, batch):
    batches = [p.batch_size for p in plain(method, batch).points()]
    assert batches == [b for b in STAGES[method, batch] for _ in range(40)]
    assert tuple(e for e in range(1, EPOCHS) if batches[e] != batches[e - 1]) == CHANGES


@pytest.mark.parametrize("method, batch", STAGES)
def test_shifted_batch_grows_one_epoch_late_as_the_published_code_did(method, batch):
    batches = [p.batch_size for p in plain(method, batch, shifted=True).points()]
    assert [batches.count(b) for b in STAGES[method, batch]] == [41, 40, 40, 40, 39]


def published_loop(method, batch, epochs, decay_epoch, rate):
    """(lr, batch) of every epoch as the CIFAR trainer of arXiv 2311.08745 sets them, with torch's
    own schedulers.

    `rate` is its --power. Of its two fixed spans of 200 epochs ours are --epochs.
    """
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scheduler = {
        "lr": lambda: SCHEDULERS.StepLR(optimizer, decay_epoch, 0.707106781186548),
        "hybrid": lambda: SCHEDULERS.StepLR(optimizer, decay_epoch, 0.866025403784439),
        "cosine": lambda: SCHEDULERS.CosineAnnealingLR(optimizer, epochs),
        "poly": lambda: SCHEDULERS.PolynomialLR(optimizer, epochs, rate),
        "exp": lambda: SCHEDULERS.ExponentialLR(optimizer, rate),
    }.get(method, lambda: None)()
    increase = {"batch": 2, "hybrid": 1.5}.get(method)
    found = []
    for epoch in range(epochs):
        found.append((optimizer.param_groups[0]["lr"], batch))
        optimizer.step()
        if scheduler:
            scheduler.step()
        if increase and epoch % decay_epoch == 0 and epoch != 0:
            batch = int(batch * increase)
    return found


STARTS = (1, 2, 3, 7, 15, 32, 100, 333)


@pytest.mark.parametrize("method", ["constant", "lr", "batch", "hybrid", "poly", "cosine", "exp"])
def test_shifted_methods_are_the_published_loop_for_any_batch_and_any_epochs(method):
    for epochs, decay_epoch in ((200, 40), (50, 1), (61, 7), (1, 1)):
        for start in STARTS if method in ("batch", "hybrid") else (32,):
            options = {"decay_epoch": decay_epoch, "power": 0.8, "gamma": 0.8, "shifted": True}
            ours = list(plain(method, start, epochs, **options).points())
            lrs, batches = zip(
                *published_loop(method, start, epochs, decay_epoch, 0.8), strict=True
            )
            # a batch of 50 doublings is above what a schedule goes to, and above any data set
            assert [p.batch_size for p in ours] == [min(b, schedule.MOST) for b in batches], (
                start,
                epochs,
            )
            assert [p.lr for p in ours] == pytest.approx(
                lrs, rel=1e-12, abs=epochs * 0.1 * 2.0**-53
            )


def test_a_batch_of_7_grows_to_15_as_published_and_to_16_where_delta_is_matched():
    def grows(**options):
        return [p.batch_size for p in plain("hybrid", 7, 4, decay_epoch=1, **options).points()]

    assert grows(shifted=True) == [7, 7, 10, 15]
    assert grows() == [7, 10, 15, 23]


def test_decay_epoch_moves_every_change():
    for method in ("lr", "batch", "hybrid"):
        points = list(plain(method, epochs=20, decay_epoch=7).points())
        assert [e for e in range(1, 20) if points[e] != points[e - 1]] == [7, 14], method


def test_lr_and_batch_and_hybrid_smooth_equally_at_every_epoch():
    for batch in (32, 128):
        runs = [plain(method, batch) for method in ("lr", "batch", "hybrid")]
        for epoch in range(EPOCHS):
            # SGD's delta = lr C / sqrt(b) with C = 1, written out rather than taken from the code
            by_hand = [p.lr / math.sqrt(p.batch_size) for p in (s(epoch) for s in runs)]
            expected = 0.1 / math.sqrt(batch) * 2 ** -(epoch // 40 / 2)
            assert by_hand == pytest.approx([expected] * 3, rel=1e-12), epoch
            assert [s.delta(s(epoch)) for s in runs] == pytest.approx([expected] * 3, rel=1e-12), (
                epoch
            )


def test_delta_ends_at_a_quarter_of_its_start():
    for method in ("lr", "batch", "hybrid"):
        s = plain(method)
        assert s.delta(s(199)) == pytest.approx(s.delta(s(0)) / 4, rel=1e-12)


UPDATES = [  # method, first batch, shifted as published, updates in 200 epochs
    ("constant", 32, True, 312_600),
    ("constant", 128, True, 78_200),
    ("batch", 32, True, 122_665),
    ("hybrid", 32, True, 164_134),
    ("batch", 16, True, 245_209),
    ("constant", 32, False, 312_600),
    ("batch", 32, False, 40 * (1563 + 782 + 391 + 196 + 98)),
    ("hybrid", 32, False, 40 * (1563 + 1042 + 695 + 463 + 309)),
    ("batch", 16, False, 40 * (3125 + 1563 + 782 + 391 + 196)),
]


@pytest.mark.parametrize("method, batch, shifted, expected", UPDATES)
def test_updates_in_200_epochs(method, batch, shifted, expected):
    s = plain(method, batch, shifted=shifted)
    assert sum(s.updates(CIFAR)) == expected
    assert s.updates(CIFAR) == [len(range(0, CIFAR, p.batch_size)) for p in s.points()]


def test_updates_without_the_partial_batch_use_whole_batches_alone():
    s = plain("hybrid")
    whole = s.updates(CIFAR, drop_last=True)
    for updates, point in zip(whole, s.points(), strict=True):
        assert updates * point.batch_size <= CIFAR < (updates + 1) * point.batch_size
    assert (
        plain("constant", 1).updates(7, drop_last=True)
        == plain("constant", 1).updates(7)
        == [7] * EPOCHS
    )


# The degree of smoothing


# as published: batch -> delta of SGD, SHB, NSHB v3, NSHB v1 at lr 0.1, beta 0.9, ResNet-18
DELTA = {
    8: ("1.265", "2.278", "1.265", "1.155"),
    32: (".6325", "1.795", ".6325", ".9087"),
    128: (".3162", "1.652", ".3162", ".8358"),
    512: (".1581", "1.615", ".1581", ".8165"),
    1024: (".1118", "1.608", ".1118", ".8133"),
    8192: (".0395", "1.603", ".0395", ".8104"),
}


@pytest.mark.parametrize("batch", DELTA)
def test_delta_is_that_of_the_published_constants(batch):
    sgd = Smoothing("sgd", 1280.0)
    shb = Smoothing("shb", *CONSTANTS["shb"])
    nshb_v3 = Smoothing("nshb", *CONSTANTS["nshb"])
    nshb_v1 = Smoothing("nshb", *CONSTANTS["nshb"], version="v1")
    found = [
        s.degree(0.1, batch, beta)
        for s, beta in [(sgd, 0.0), (shb, 0.9), (nshb_v3, 0.9), (nshb_v1, 0.9)]
    ]
    for value, printed in zip(found, DELTA[batch], strict=True):
        assert agrees(value, printed), (value, printed)
    assert found[2] == pytest.approx(found[0], rel=1e-12)  # 128 / (1 - 0.9) = 1280


@pytest.mark.parametrize(
    "beta, printed", [(0.0, "0"), (0.5, "1.5"), (0.9, "81.9"), (0.99, "9801.99")]
)
def test_growth_of_shb_is_beta_over_one_minus_beta_squared_plus_beta(beta, printed):
    growth = Smoothing("shb", c2=0.0, k2=1.0).noise(1, beta)
    assert growth == pytest.approx(float(printed), rel=1e-12)
    assert growth == pytest.approx(beta * (beta**2 - beta + 1) / (1 - beta) ** 2, rel=1e-12)
    only_variance = Smoothing("shb", c2=3.0, k2=0.0).noise(7, beta)
    assert only_variance == pytest.approx((1 + growth) * 3 / 7, rel=1e-12)


@pytest.mark.parametrize("optimizer, form, nu", MOMENTUM_FORMS)
def test_without_momentum_every_form_smooths_like_sgd(optimizer, form, nu):
    s = Smoothing(optimizer, 7.0, 5.0, nu, form if optimizer == "nshb" else None)
    assert s.degree(0.3, 11, 0.0) == pytest.approx(0.3 * math.sqrt(7 / 11), rel=1e-14)


def test_qhm_lies_between_sgd_and_nshb():
    def delta(optimizer, **nu):
        return Smoothing(optimizer, 7.0, **nu).degree(0.1, 32, 0.9)

    assert delta("qhm", nu=0.0) == pytest.approx(delta("sgd"), rel=1e-14)
    assert delta("qhm", nu=1.0) == pytest.approx(delta("nshb"), rel=1e-14)
    assert delta("sgd") < delta("qhm", nu=0.3) < delta("qhm", nu=0.6) < delta("nshb")


def test_shb_and_nshb_v1_keep_a_floor_at_any_batch_and_v3_does_not():
    k = 1.77
    shb = Smoothing("shb", 25.318, k**2).degree(0.1, 10**15, 0.9)
    assert shb == pytest.approx(0.1 * math.sqrt(81.9) * k, rel=1e-9)
    assert Smoothing("nshb", 128.0, 4.5**2, version="v1").degree(0.1, 10**15, 0.9) == pytest.approx(
        0.1 * 2 * 0.9 * 4.5
    )
    assert Smoothing("nshb", 128.0, 4.5**2).degree(0.1, 10**15, 0.9) < 1e-6


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9, 0.99])
def test_critical_factor_has_all_its_published_shapes(beta):
    shb = Smoothing("shb").critical_factor(beta)
    growth = (beta / (1 - beta)) ** 2 + beta
    assert shb == pytest.approx((beta**2 - beta + 1) / (beta * (1 - beta) ** 2), rel=1e-12)
    assert shb == pytest.approx(growth / beta**2, rel=1e-12)
    assert Smoothing("nshb").critical_factor(beta) == pytest.approx(1 / (1 - beta), rel=1e-12)
    assert Smoothing("sgd").critical_factor(beta) == 1
    assert Smoothing("qhm", nu=0.0).critical_factor(beta) == 1
    assert Smoothing("qhm", nu=1.0).critical_factor(beta) == pytest.approx(
        1 / (1 - beta), rel=1e-12
    )
    assert Smoothing("qhm", nu=0.4).critical_factor(beta) == pytest.approx(
        1 + 0.4 * beta / (1 - beta), rel=1e-12
    )


@pytest.mark.parametrize(
    "optimizer, critical_batch, printed",
    [("sgd", 2**9, "1280"), ("shb", 2**10, "25.3187"), ("nshb", 2**9, "128")],
)
def test_critical_batch_gives_the_published_gradient_variance(optimizer, critical_batch, printed):
    kappa = Smoothing(optimizer).critical_factor(0.9)
    assert agrees(critical_batch * 0.5**2 / (kappa * 0.1), printed)


def test_shb_variance_predicts_the_critical_batches_of_the_other_thresholds():
    kappa = Smoothing("shb").critical_factor(0.9)
    assert agrees(kappa, "101.11")
    for eps, drawn, printed in [(0.7, 2**9, "522"), (1.0, 2**8, "256")]:
        bound = kappa * 0.1 * (1024 * 0.25 / (kappa * 0.1)) / eps**2
        assert agrees(bound, printed)
        assert 2 ** round(math.log2(bound)) == drawn


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shifted", [False, True])
def test_batch_is_a_whole_number_and_delta_belongs_to_it(method, shifted):
    for batch in (3, 50, 128):
        s = momentum(method, batch=batch, epochs=61, decay_epoch=7, shifted=shifted)
        for p in s.points():
            assert type(p.batch_size) is int and p.batch_size >= batch
            growth = p.momentum * (p.momentum**2 - p.momentum + 1) / (1 - p.momentum) ** 2
            by_hand = p.lr * math.sqrt((1 + growth) * 25.318 / p.batch_size + growth * 1.77**2)
            assert s.delta(p) == pytest.approx(by_hand, rel=1e-12)


# The methods that solve for a target delta


GOLDEN = {  # the original recursion at ResNet-18, b 128, power 0.9
    ("shb", "beta", "momentum"): {
        1: ".8996",
        50: ".8739",
        100: ".8270",
        150: ".7130",
        180: ".4818",
        190: ".2583",
    },
    ("shb", "beta", "delta"): {0: "1.65", 100: ".889", 190: ".121"},
    ("shb", "lr-beta", "lr"): {50: ".08792", 100: ".07337", 199: ".01256"},
    ("shb", "lr-beta", "momentum"): {100: ".8679", 190: ".6960", 199: ".4669"},
    ("shb", "beta-batch", "batch_size"): {50: "165", 100: "237", 150: "439", 199: "8112"},
    ("shb", "beta-batch", "momentum"): {100: ".8292", 199: ".0202"},
    ("shb", "lr-batch", "batch_size"): {50: "165", 100: "237", 150: "439", 199: "8112"},
    ("nshb", "beta", "momentum"): {50: ".6923", 100: ".4758", 150: ".2405", 180: ".0482"},
}


@pytest.mark.parametrize("optimizer, method, quantity", GOLDEN)
def test_shifted_schedules_take_the_published_values(optimizer, method, quantity):
    s = momentum(method, optimizer, shifted=True)
    for epoch, printed in GOLDEN[optimizer, method, quantity].items():
        value = s.delta(s(epoch)) if quantity == "delta" else getattr(s(epoch), quantity)
        assert agrees(value, printed), (epoch, value, printed)


GOLDEN_LR_BATCH = {
    "shb": {50: ".07784", 100: ".05459", 150: ".02974", 199: ".001627"},
    "nshb": {100: ".0546", 199: ".001627"},
}


@pytest.mark.parametrize("optimizer", GOLDEN_LR_BATCH)
def test_shifted_lr_batch_takes_the_published_rates(optimizer):
    s = momentum("lr-batch", optimizer, shifted=True)
    for epoch, printed in GOLDEN_LR_BATCH[optimizer].items():
        assert agrees(s(epoch).lr, printed), epoch


def test_shifted_momentum_is_zero_where_it_is_published_as_zero():
    assert momentum("beta", "shb", shifted=True)(199).momentum == 0
    assert momentum("beta", "nshb", shifted=True)(190).momentum == 0


def published_recursion(method, optimizer, b, epochs, power):
    """(lr, batch, beta) of every epoch as the trainer of arXiv 2402.02325 sets them: what epoch m
    leaves for the next.

    The batch is a fraction, of which the loader serves int(). Its NSHB lr-batch forgot to set the
    rate that it had found.
    """
    c2, k2 = CONSTANTS[optimizer]
    lr, beta, start, found = 0.1, 0.9, b, []

    def delta(lr, b, beta):
        if optimizer == "shb":
            growth = beta * (beta**2 - beta + 1) / (1 - beta) ** 2
            return lr * math.sqrt(c2 / b + growth * (c2 / b + k2))
        return lr * math.sqrt(c2 / b + 4 * beta**2 * (c2 / b + k2))

    for m in range(epochs):
        found.append((lr, int(b), beta))
        if m == epochs - 1:
            return found
        target = ((epochs - m) / (epochs - (m - 1))) ** power * delta(lr, b, beta)
        if method == "lr-beta":
            lr = lr * ((epochs - m) / (epochs - (m - 1))) ** (power / 2)
        if method.endswith("batch"):
            b = b * ((epochs - (m - 1)) / (epochs - m)) ** (power * schedule.BALANCE[start])
        if method == "lr-batch":
            lr = target / delta(1, b, beta)
            continue
        u = (target**2 - lr**2 * c2 / b) / (lr**2 * (k2 + c2 / b))
        if optimizer == "nshb":
            beta = math.sqrt(max(u / 4, 0))
        else:
            roots = np.roots([1, -(1 + u), 1 + 2 * u, -u])
            beta = max(
                0, max(r.real for r in roots if abs(r.imag) < 1e-9 and r.real <= beta + 1e-9)
            )


@pytest.mark.parametrize("optimizer", ["shb", "nshb"])
@pytest.mark.parametrize("method", SOLVED)
def test_every_shifted_epoch_follows_the_published_recursion(method, optimizer):
    cases = itertools.product(
        (16, 32, 64, 128, 256, 512, 1024) if "batch" in method else (16, 128), (37, 200), (0.9, 1.0)
    )
    for batch, epochs, power in cases:
        s = momentum(method, optimizer, batch=batch, epochs=epochs, power=power, shifted=True)
        ours, theirs = (
            list(s.points()),
            published_recursion(method, optimizer, batch, epochs, power),
        )
        assert [p.batch_size for p in ours] == [b for _, b, _ in theirs], (batch, epochs, power)
        assert [p.lr for p in ours] == pytest.approx([lr for lr, _, _ in theirs], rel=1e-11)
        assert [p.momentum for p in ours] == pytest.approx(
            [beta for _, _, beta in theirs], abs=1e-7
        )


@pytest.mark.parametrize("power", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("method", SOLVED)
@pytest.mark.parametrize("optimizer, form, nu", MOMENTUM_FORMS)
def test_delta_decays_as_the_theory_asks_wherever_momentum_is_left(
    optimizer, form, nu, method, power
):
    s = momentum(method, optimizer, form, nu, power=power)
    first, followed = s.delta(s.start), 0
    assert s(0) == s.start
    for epoch, p in enumerate(s.points()):
        goal = first * ((EPOCHS - epoch) / EPOCHS) ** power
        assert s.target(epoch) == pytest.approx(goal, rel=1e-12)
        floor = s.smoothing.degree(p.lr, p.batch_size, 0.0)
        if method != "lr-batch" and floor > goal:
            assert p.momentum == 0 and s.delta(p) == floor
        else:
            followed += 1
            assert s.delta(p) == pytest.approx(goal, rel=1e-12), epoch
    assert followed == EPOCHS if method == "lr-batch" else followed > 100


@pytest.mark.parametrize("method", SOLVED)
def test_solved_methods_change_what_their_name_says_and_nothing_else(method):
    points = list(momentum(method).points())
    moved = {
        "lr": len({p.lr for p in points}) > 1,
        "batch": len({p.batch_size for p in points}) > 1,
        "beta": len({p.momentum for p in points}) > 1,
    }
    assert {name for name, changed in moved.items() if changed} == set(method.split("-"))
    for now, then in itertools.pairwise(points):
        assert (
            then.lr <= now.lr
            and then.batch_size >= now.batch_size
            and then.momentum <= now.momentum
        )


@pytest.mark.parametrize("method", ["beta", "lr-beta", "beta-batch"])
def test_shb_momentum_is_the_root_of_the_published_cubic(method):
    c2, k2 = CONSTANTS["shb"]
    s, solved = momentum(method), 0
    for epoch in range(1, EPOCHS):
        p, delta = s(epoch), s.target(epoch)
        u = (delta**2 - p.lr**2 * c2 / p.batch_size) / (p.lr**2 * (k2 + c2 / p.batch_size))
        if u <= 0:
            assert p.momentum == 0
            continue
        roots = np.roots([1, -(1 + u), 1 + 2 * u, -u])
        real = [
            r.real for r in roots if abs(r.imag) < 1e-9 and 0 <= r.real <= s.start.momentum + 1e-9
        ]
        assert p.momentum == pytest.approx(max(real), abs=1e-9), epoch
        solved += 1
    assert solved > 190


@pytest.mark.parametrize("method", ["beta", "lr-beta", "beta-batch"])
def test_nshb_v3_momentum_has_its_closed_form(method):
    s, power = momentum(method, "nshb", "v3"), 0.9
    for epoch in range(EPOCHS):
        p = s(epoch)
        decay = ((EPOCHS - epoch) / EPOCHS) ** power
        rest = p.lr**2 * (1 - 0.9) * 128 / (decay**2 * 0.1**2 * p.batch_size)  # 1 - beta'
        assert p.momentum == pytest.approx(max(0.0, 1 - rest), abs=1e-12), epoch


@pytest.mark.parametrize("method", ["beta", "lr-beta", "beta-batch"])
def test_nshb_v1_momentum_has_its_closed_form(method):
    c2, k2 = CONSTANTS["nshb"]
    s = momentum(method, "nshb", "v1")
    for epoch in range(1, EPOCHS):
        p = s(epoch)
        variance = c2 / p.batch_size
        square = ((s.target(epoch) / p.lr) ** 2 - variance) / (4 * (k2 + variance))
        assert p.momentum == pytest.approx(math.sqrt(max(0.0, square)), abs=1e-9), epoch


def test_bisection_returns_the_ends_where_no_momentum_fits():
    s = Smoothing("shb", *CONSTANTS["shb"])
    assert s.solve_momentum(s.degree(0.1, 128, 0.0) / 2, 0.1, 128, 0.9) == 0
    assert s.solve_momentum(s.degree(0.1, 128, 0.9) * 2, 0.1, 128, 0.9) == 0.9
    assert s.solve_momentum(s.degree(0.1, 128, 0.6), 0.1, 128, 0.9) == pytest.approx(0.6, rel=1e-13)


@pytest.mark.parametrize("batch, last", [(16, 8174), (128, 8112), (256, 8196), (1024, 8152)])
def test_shifted_batch_ends_where_it_was_published_to_end(batch, last):
    assert momentum("beta-batch", batch=batch, shifted=True)(199).batch_size == last


def test_shifted_batch_ends_near_8192_from_any_start():
    for batch in (1, 2, 3, 10, 16, 32, 64, 100, 128, 200, 256, 512, 700, 1024, 4096):
        last = momentum("lr-batch", batch=batch, shifted=True)(199).batch_size
        assert last == pytest.approx(8192, rel=0.01), batch
    assert balance(8192) == 0
    assert momentum("lr-batch", batch=10_000)(199).batch_size == 10_000


# How it is made


class Alike:
    """A nu that is 0.5 at every epoch, whose name is the same in every process."""

    def __call__(self, epoch: int) -> float:
        return 0.5

    def __repr__(self) -> str:
        return "0.5 at every epoch"


def test_a_schedule_has_the_defaults_of_the_command_line():
    c = resolve({})
    mine = Schedule(c.method, epochs=c.epochs, lr=c.lr, batch_size=c.batch_size)
    theirs = make_schedule(c, None)
    for name in ("decay_epoch", "power", "gamma", "shifted", "start", "smoothing"):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert mine == theirs


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"method": "hybird"}, "method 'hybird': did you mean hybrid?"),
        ({"method": "exponential"}, "method 'exponential': fastsmooth calls it exp"),
        ({"method": 3}, "method 3: choose from constant, "),
        ({"optimizer": "sgdm"}, "form 'sgdm': fastsmooth calls it shb"),
        ({"optimizer": "adam"}, "form 'adam': fastsmooth calls it --optimizer torch/Adam"),
        ({"optimizer": "nshb", "version": "v2"}, "nshb has no bound of version 'v2'"),
        ({"momentum": 0.9}, "optimizer sgd has no momentum"),
        ({"optimizer": "shb", "momentum": 1.0}, "momentum 1.0 is out of range"),
        ({"method": "beta"}, "method beta lowers the momentum"),
        ({"epochs": 0}, "epochs 0 is out of range"),
        ({"lr": math.nan}, "lr nan is out of range"),
        ({"batch_size": 0}, "batch_size 0 is out of range"),
        ({"decay_epoch": 0}, "decay_epoch 0 is out of range"),
        ({"power": 0.0}, "power 0.0 is out of range"),
        ({"gamma": 1.1}, "gamma 1.1 is out of range"),
        ({"images": 0}, "images 0 is out of range"),
        ({"c2": -1.0}, "c2 -1.0 is out of range"),
        ({"k2": math.nan}, "k2 nan is out of range"),
        ({"optimizer": "qhm", "nu": 2.0}, "nu 2.0 is out of range"),
        ({"nu": Alike()}, "optimizer sgd has no nu"),
        (
            {"method": "beta", "optimizer": "nesterov", "momentum": 0.9},
            "method beta is solved for delta, and no noise bound is published for nesterov",
        ),
        ({"method": "lr-batch", "optimizer": "torch/Adam"}, "is published for torch/Adam"),
        ({"optimizer": "nesterov", "version": "v1"}, "no noise bound is published for nesterov"),
    ],
    ids=str,
)
def test_what_no_schedule_can_be_made_of_is_refused_in_words(wrong, words):
    right = {"method": "constant", "epochs": 3, "lr": 0.1, "batch_size": 8}
    with pytest.raises(ValueError, match=re.escape(words)):
        Schedule(**(right | wrong))


# Where no bound is published, and where nu changes


@pytest.mark.parametrize("optimizer", ["nesterov", "torch/AdamW", "timm/lamb", "mine.py:Best"])
def test_without_a_bound_there_is_neither_delta_nor_kappa(optimizer):
    momentum = 0.9 if optimizer == "nesterov" else 0.0
    s = Schedule("hybrid", epochs=10, lr=0.1, batch_size=8, optimizer=optimizer, momentum=momentum)
    assert s(9) == Point(0.1 * math.sqrt(0.75) ** 4, 40, momentum)
    assert s.delta(s(0)) is None and s.largest_miss() is None
    assert s.smoothing.degree(0.1, 8, 0.9) is None
    assert s.smoothing.critical_factor(0.9) is None


def test_delta_follows_a_nu_that_changes():
    def nu(epoch):
        return 0.9 if epoch < 2 else 0.4

    given = {"epochs": 4, "lr": 0.1, "batch_size": 8, "optimizer": "qhm", "momentum": 0.9}
    s = Schedule("constant", nu=nu, **given)
    assert [p.nu for p in s.points()] == [0.9, 0.9, 0.4, 0.4]
    for p in s.points():
        expected = 0.1 * math.sqrt((1 + p.nu * 0.9 / 0.1) / 8)
        assert s.delta(p) == pytest.approx(expected, rel=1e-14)
    fixed = Schedule("constant", nu=0.9, **given)
    assert fixed(0) == Point(0.1, 8, 0.9) and fixed.delta(fixed(0)) == s.delta(s(0))


@pytest.mark.parametrize("method", ["lr-beta", "beta-batch", "lr-batch"])
def test_what_is_solved_is_solved_with_the_nu_of_its_epoch(method):
    s = Schedule(
        method, epochs=8, lr=0.1, batch_size=8, optimizer="qhm", momentum=0.9,
        nu=lambda epoch: 0.9 - 0.05 * epoch,
    )  # fmt: skip
    met = 0
    for epoch, p in enumerate(s.points()):
        if 0 < p.momentum < 0.9 or method == "lr-batch":
            bound = (1 + p.nu * p.momentum / (1 - p.momentum)) / p.batch_size
            assert p.lr * math.sqrt(bound) == pytest.approx(s.target(epoch), rel=1e-9), epoch
            met += 1
    assert met >= 4


# What a schedule costs


def test_momentum_is_what_plain_bisection_finds_to_the_last_bit():
    rng = random.Random(0)
    for case in range(400):
        optimizer, form = rng.choice([("shb", "v3"), ("nshb", "v1"), ("nshb", "v3"), ("qhm", "v3")])
        c2, k2 = 10 ** rng.uniform(-6, 6), rng.choice([0.0, 10 ** rng.uniform(-6, 6)])
        s = Smoothing(
            optimizer, c2, k2, rng.uniform(0.01, 1), form if optimizer == "nshb" else None
        )
        lr, batch = 10 ** rng.uniform(-4, 2), rng.randint(1, 10_000)
        high = highest = rng.choice([0.9, 0.5, 0.99, 1 - 10 ** -rng.uniform(1, 15)])
        least, most = s.degree(lr, batch, 0.0), s.degree(lr, batch, highest)
        target, low = least + (most - least) * 10 ** -rng.uniform(0, 12), 0.0
        if not least < target < most:
            continue
        while low < (middle := (low + high) / 2) < high:
            low, high = (middle, high) if s.degree(lr, batch, middle) < target else (low, middle)
        assert s.solve_momentum(target, lr, batch, highest) == low, case


@pytest.mark.parametrize("optimizer, form, nu", MOMENTUM_FORMS)
def test_momentum_is_solved_with_few_values_of_delta(optimizer, form, nu, monkeypatch):
    values, degree = [], Smoothing.degree
    monkeypatch.setattr(Smoothing, "degree", lambda *given: values.append(1) or degree(*given))
    s = momentum("lr-beta", optimizer, form, nu)
    assert len(list(s.points())) == EPOCHS
    assert len(values) < 30 * EPOCHS  # bisection alone takes 55


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shifted", [False, True])
def test_stages_are_the_batches_of_all_epochs_without_solving_any(method, shifted, monkeypatch):
    def never(*_):
        raise AssertionError("solved")

    for batch, images, epochs in (
        (3, None, 61),
        (50, 1437, 200),
        (128, 50_000, 1),
        (1024, 50_000, 997),
    ):
        if epochs == 1 and METHODS[method].uses == "milestones":
            continue  # which has room for none
        s = momentum(
            method, batch=batch, epochs=epochs, decay_epoch=7, images=images, shifted=shifted
        )
        expected = [
            (len(list(alike)), size)
            for size, alike in itertools.groupby(p.batch_size for p in s.points())
        ]
        with monkeypatch.context() as patch:
            patch.setattr(Smoothing, "solve_momentum", never)
            assert list(s.stages()) == expected
            assert s.updates(5000) == [-(-5000 // size) for n, size in expected for _ in range(n)]
            s.largest_miss()


# Where a schedule cannot follow


def test_largest_miss_finds_where_momentum_alone_saturates():
    s = momentum("beta", batch=16, shifted=True)
    epoch, target, reached = s.largest_miss()
    assert epoch == 199 and agrees(target, "0.031") and agrees(reached, "0.126")
    # the floor of plain SGD
    assert reached == pytest.approx(0.1 * math.sqrt(25.318 / 16), rel=1e-12)
    first = next(e for e in range(EPOCHS) if s(e).momentum == 0)
    assert abs(first - 191) <= 1


def test_largest_miss_is_none_where_the_target_is_met():
    for s in [
        momentum("lr-beta"),
        momentum("lr-batch"),
        plain("hybrid"),
        plain("batch"),
        plain("poly"),
        plain("constant"),
    ]:
        assert s.largest_miss() is None, s.method


def test_largest_miss_reports_the_late_batches_of_the_published_code():
    epoch, target, reached = plain("batch", shifted=True).largest_miss()
    assert epoch in CHANGES
    assert reached / target == pytest.approx(math.sqrt(2), rel=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_batch_never_exceeds_the_data_set(method):
    images = 1437
    s = momentum(method, images=images)
    # 648 = 128 * 1.5^4
    growing = ("batch", "beta-batch", "lr-batch", "batch-poly", "exp-batch", "seesaw", "growth")
    grows_to = dict.fromkeys(growing, images) | {"hybrid": 648}
    assert max(p.batch_size for p in s.points()) == grows_to.get(method, 128)


def test_a_batch_capped_by_the_data_set_is_reported_as_a_miss():
    s = plain("batch", 128, images=1437)
    assert [s(e).batch_size for e in (119, 120, 159, 160, 199)] == [512, 1024, 1024, 1437, 1437]
    epoch, target, reached = s.largest_miss()
    assert epoch == 160
    assert reached / target == pytest.approx(math.sqrt(2048 / 1437), rel=1e-12)


def test_momentum_takes_up_what_a_capped_batch_leaves():
    s = momentum("beta-batch", images=1437)
    free = momentum("beta-batch")
    capped = [e for e in range(EPOCHS) if free(e).batch_size > 1437]
    assert len(capped) > 5
    for epoch in capped:
        p = s(epoch)
        assert p.batch_size == 1437
        if p.momentum > 0:
            assert p.momentum < free(epoch).momentum
            assert s.delta(p) == pytest.approx(s.target(epoch), rel=1e-12)


@pytest.mark.parametrize("epoch", [-1, 3])
def test_an_epoch_that_there_is_not_is_refused(epoch):
    with pytest.raises(ValueError, match=f"epoch {epoch} is none of 0 to 2"):
        Schedule("hybrid", epochs=3, lr=0.1, batch_size=8)(epoch)


def test_every_method_of_steps_says_where_it_misses_its_target(monkeypatch):
    triple = Method(batch=partial(stepped_batch, factor=3), uses="decay_epoch")
    monkeypatch.setitem(METHODS, "triple", triple)
    given = {"epochs": 3, "lr": 0.1, "batch_size": 512, "decay_epoch": 1, "images": 600}
    assert Schedule("triple", **given).largest_miss() == pytest.approx(
        (2, 0.00221, 0.00408), rel=0.01
    )
    assert Schedule("lr", **given).largest_miss() is None
