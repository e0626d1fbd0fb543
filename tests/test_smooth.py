"""fastsmooth.smooth beside scipy's quadrature, Monte Carlo and a loop as it was published."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats

from fastsmooth.smooth import __main__ as smooth
from fastsmooth.smooth import figures, graduated, noises, smoothing, study
from fastsmooth.smooth.__main__ import main
from fastsmooth.smooth.graduated import LANDSCAPES
from fastsmooth.smooth.noises import NOISES
from fastsmooth.smooth.smoothing import smooth_drop_wave, smooth_rastrigin

LAWS = {
    "normal": stats.norm(),
    "uniform": stats.uniform(-2, 4),
    "exponential": stats.expon(scale=1.5),
    "rayleigh": stats.rayleigh(),
    "pareto": stats.pareto(1),
    "cauchy": stats.cauchy(),
    "levy": stats.levy(),
}
LIGHT = [name for name, noise in NOISES.items() if noise.tails == "light"]
X = np.array([-4.3, -0.5, 0.0, 0.21, 3.7])


def expected(f, law, x, delta, shift=0.0):
    """E f(x - delta (u - shift)) over the density of u, in panels of less than one wave of f."""
    low, high = max(law.ppf(0), -9), min(law.ppf(1), 60)
    edges = np.linspace(low, high, 400 + int(20 * delta * (high - low)))
    at, weight = np.polynomial.legendre.leggauss(16)
    half = np.diff(edges)[:, None] / 2
    u = edges[:-1, None] + half * (1 + at)
    return float((f(x - delta * (u - shift)) * law.pdf(u) * weight * half).sum())


# --- the noises


@pytest.mark.parametrize("name", NOISES)
def test_characteristic_functions_are_those_of_the_distributions(name):
    t = np.array([0.05, 0.6, 1.9, 2.1, 5.0])
    exact = {
        "pareto": lambda: np.exp(1j * t) + 1j * t * special.exp1(-1j * t),
        "cauchy": lambda: np.exp(-t),
        "levy": lambda: np.exp(-np.sqrt(t)) * np.exp(1j * np.sqrt(t)),
    }.get(name, lambda: by_quadrature(LAWS[name], t))
    np.testing.assert_allclose(NOISES[name].characteristic(t), exact(), rtol=0, atol=1e-9)


def by_quadrature(law, t):
    ends = law.ppf(0) if law.ppf(0) > -9 else -9, min(law.ppf(1), 60)
    parts = [
        [integrate.quad(lambda u, s=s, g=g: law.pdf(u) * g(s * u), *ends, limit=400)[0] for s in t]
        for g in (math.cos, math.sin)
    ]
    return np.array(parts[0]) + 1j * np.array(parts[1])


@pytest.mark.parametrize("name", NOISES)
def test_draws_have_the_distribution_and_moments_are_its_own(name):
    draws = NOISES[name].draw(np.random.default_rng(0), (20_000,))
    assert stats.kstest(draws, LAWS[name].cdf).pvalue > 1e-3
    if name in LIGHT:
        assert (NOISES[name].mean, NOISES[name].variance) == pytest.approx(
            (LAWS[name].mean(), LAWS[name].var())
        )


def test_dawsons_integral_and_the_pareto_function_hold_far_out():
    t = np.geomspace(1e-6, 700, 500)
    np.testing.assert_allclose(noises.dawson(t), special.dawsn(t), rtol=0, atol=2e-15)
    exact = np.exp(1j * t) + 1j * t * special.exp1(-1j * t)
    np.testing.assert_allclose(noises.pareto(t), exact, rtol=0, atol=2e-14)


# --- smoothed functions


@pytest.mark.parametrize("name", LIGHT)
@pytest.mark.parametrize("delta", [0.05, 0.5])
def test_rastrigins_closed_form_is_the_expectation(name, delta):
    mean = NOISES[name].mean
    for shift in {0.0, mean}:
        found = smooth_rastrigin(X, delta, NOISES[name], shift)
        exact = [expected(smoothing.rastrigin, LAWS[name], x, delta, shift) for x in X]
        np.testing.assert_allclose(found.values, exact, rtol=1e-11)


@pytest.mark.parametrize("name", LIGHT)
@pytest.mark.parametrize("delta", [0.05, 0.5])
def test_the_drop_waves_quadrature_is_the_expectation(name, delta):
    for shift in {0.0, NOISES[name].mean}:
        found = smooth_drop_wave(X, delta, NOISES[name], shift)
        exact = [expected(smoothing.drop_wave, LAWS[name], x, delta, shift) for x in X]
        np.testing.assert_allclose(found.values, exact, rtol=0, atol=1e-12)
        assert found.error <= smoothing.TOLERANCE


@pytest.mark.parametrize("name", NOISES)
def test_draws_agree_within_four_standard_errors(name):
    u = NOISES[name].draw(np.random.default_rng(1), (200_000,))
    for delta in (0.05, 0.5):
        draws = smoothing.drop_wave(X[:, None] - delta * u)
        error = draws.std(axis=1) / math.sqrt(len(u))
        assert (
            abs(draws.mean(axis=1) - smooth_drop_wave(X, delta, NOISES[name], 0).values) < 4 * error
        ).all()


def test_a_tail_without_moments_has_its_exact_curve():
    """Cauchy noise of scale delta widens 1 / (4 + y^2) to (1 + delta / 2) / ((2 + delta)^2 +
    y^2)."""
    found = smooth_drop_wave(X, 2.0, NOISES["cauchy"], 0.0).values
    np.testing.assert_allclose(found, -2 * 2 / (16 + X**2), atol=1e-12)


def test_quadrature_that_does_not_settle_says_so():
    assert smooth_drop_wave(X, 100.0, NOISES["levy"], 0.0).error <= 1e-9
    few = smoothing.over_frequencies(X, 100.0, NOISES["pareto"], 64)
    assert abs(few - smooth_drop_wave(X, 100.0, NOISES["pareto"], 0.0).values).max() > 1e-9


@pytest.mark.parametrize("name", NOISES)
def test_no_smoothing_leaves_the_function(name):
    assert (smooth_rastrigin(X, 0, NOISES[name], 0).values == smoothing.rastrigin(X)).all()
    assert (smooth_drop_wave(X, 0, NOISES[name], 0).values == smoothing.drop_wave(X)).all()
    # and a little leaves it almost, by the formulas
    np.testing.assert_allclose(
        smooth_drop_wave(X, 1e-12, NOISES[name], 0).values, smoothing.drop_wave(X), atol=1e-4
    )
    if name in LIGHT:
        np.testing.assert_allclose(
            smooth_rastrigin(X, 1e-9, NOISES[name], 0).values, smoothing.rastrigin(X), atol=1e-6
        )


@pytest.mark.parametrize("delta", [0.25, 1.0, 3.0])
def test_noise_of_unit_variance_adds_delta_squared_to_x_squared(delta):
    """Rastrigin's waves of both signs cancel: f(x) + f(x + 1/2) is twice a square, but for a
    constant."""
    x = X + 0.5
    pair = (
        smooth_rastrigin(X, delta, NOISES["normal"], 0).values
        + smooth_rastrigin(x, delta, NOISES["normal"], 0).values
    )
    np.testing.assert_allclose(pair, X**2 + x**2 + 20 + 2 * delta**2, rtol=1e-13)


@pytest.mark.parametrize("name", [n for n in NOISES if n not in LIGHT])
def test_rastrigin_under_a_heavy_tail_is_undefined_and_no_number(name):
    found = smooth_rastrigin(X, 0.5, NOISES[name], 0)
    assert found.values is None and found.error is None and "undefined" in found.method
    assert smoothing.smooth_rastrigin_2d(X, 0.5, NOISES[name], 0).values is None


def test_centred_noise_does_not_move_the_minimum():
    x = np.linspace(-1, 1, 201)
    least = [
        x[smooth_rastrigin(x, 0.1, NOISES["exponential"], shift).values.argmin()]
        for shift in (0.0, 1.5)
    ]
    assert least[0] > 0.05 and abs(least[1]) < least[0] / 2


def test_two_dimensions():
    x = np.linspace(-1, 1, 5)
    one = smooth_rastrigin(x, 0.5, NOISES["rayleigh"], 0).values
    two = smoothing.smooth_rastrigin_2d(x, 0.5, NOISES["rayleigh"], 0).values
    assert two[1, 3] == one[1] + one[3]
    found = smoothing.smooth_drop_wave_2d(x, 0.3, NOISES["levy"], 0.0, 5000, seed=3)
    u = NOISES["levy"].draw(np.random.default_rng(3), (5000, 2))
    draws = smoothing.drop_wave(np.hypot(x[1] - 0.3 * u[:, 0], x[3] - 0.3 * u[:, 1]))
    assert found.values[1, 3] == pytest.approx(draws.mean())
    assert found.error >= draws.std(ddof=1) / math.sqrt(5000) * (1 - 1e-9)
    other = smoothing.smooth_drop_wave_2d(x, 0.3, NOISES["levy"], 0.0, 5000, seed=4)
    assert abs(found.values - other.values).max() < 4 * math.hypot(found.error, other.error)


# --- graduated optimization


PUBLISHED = {
    "rastrigin": lambda x: np.sum(x**2 - 10 * np.cos(2 * np.pi * x) + 10),
    "ackley": lambda x: (
        -20 * np.exp(-0.2 * np.sqrt(np.mean(x**2)))
        - np.exp(np.mean(np.cos(2 * np.pi * x)))
        + 20
        + np.e
    ),
    "drop_wave": lambda x: 1 - (1 + np.cos(12 * np.linalg.norm(x))) / (2 + 0.5 * np.sum(x**2)),
    "schwefel": lambda x: 418.9828872724337 * len(x) - np.sum(x * np.sin(np.sqrt(abs(x)))),
    "griewank": lambda x: (
        np.sum(x**2) / 4000 - np.prod(np.cos(x / np.sqrt(np.arange(1, len(x) + 1)))) + 1
    ),
}


def naive(f, x, lr, deltas, steps, noises):
    """Graduated optimization as published: a loop over perturbations and coordinates, two values of
    f for each."""
    values, h = [], graduated.STEP
    for delta in deltas:
        for _ in range(steps):
            total, draws = np.zeros_like(x), next(noises)
            for u in draws:
                for i in range(len(x)):
                    a, b = x + delta * u, x + delta * u
                    a[i] += h
                    b[i] -= h
                    total[i] += (f(a) - f(b)) / (2 * h)
            x = x - lr * delta * total / len(draws)
        values.append(f(x))
    return values


@pytest.mark.parametrize("name", LANDSCAPES)
def test_graduated_optimization_equals_the_published_loop(name):
    """With one lr for all: with the largest ones rounding grows from step to step."""
    f, deltas, seeds = replace(LANDSCAPES[name], lr=0.01), graduated.nice(1.0, 0.01, 3), range(2)
    start = graduated.starts(f, 7, seeds)
    found = graduated.descend(f, start, deltas, 2, graduated.normal(7, 5, seeds))
    for s in seeds:
        perturb = graduated.normal(7, 5, [s])
        noises = (perturb()[0].numpy() for _ in range(6))
        exact = naive(PUBLISHED[name], start[s].numpy(), f.lr, deltas, 2, noises)
        np.testing.assert_allclose(found[:, s], exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LANDSCAPES)
def test_gradients_are_autograds(name):
    x = graduated.starts(LANDSCAPES[name], 50, [0, 1]).requires_grad_()
    (exact,) = torch.autograd.grad(LANDSCAPES[name](x).sum(), x)
    # the differences of f round by eps f / h
    rounding = 1e-15 * LANDSCAPES[name](x).abs().max().item() / graduated.STEP
    np.testing.assert_allclose(
        LANDSCAPES[name].gradient(x.detach()), exact, rtol=1e-6, atol=1e-6 + 4 * rounding
    )


def test_every_function_is_least_at_zero():
    for name, f in LANDSCAPES.items():
        place = 420.96874635998202 if name == "schwefel" else 0.0
        assert f(torch.full((50,), place, dtype=torch.float64)).item() == pytest.approx(0, abs=1e-8)
        assert (f(graduated.starts(f, 50, range(4))) > 0).all()


def test_schedules_run_from_the_first_delta_to_the_last():
    for schedule in graduated.SCHEDULES.values():
        deltas = schedule(1.0, 0.01, 50)
        assert len(deltas) == 50 and deltas[0] == 1 and deltas[-1] == pytest.approx(0.01)
        assert schedule(0.5, 0.5, 1) == [0.5]
    assert np.diff(graduated.nice(1.0, 0.01, 50)) == pytest.approx(-0.99 / 49)
    geo = np.array(graduated.geo(1.0, 0.01, 50))
    assert geo[1:] / geo[:-1] == pytest.approx(0.01 ** (1 / 49))


def test_a_seed_is_the_same_alone_and_among_others_and_in_groups(monkeypatch):
    r = study.Request(seeds=3, rounds=2, steps=2, draws=20, dim_ego=6)
    together = study.all_seeds(r, "ackley", "geo", "graduated")
    monkeypatch.setattr(study, "BLOCK", 1)
    assert torch.allclose(study.all_seeds(r, "ackley", "geo", "graduated"), together, rtol=1e-12)
    assert len(set(together[0].tolist())) == 3


def test_without_noise_it_is_gradient_descent_from_the_same_start():
    f, deltas = LANDSCAPES["rastrigin"], [1.0, 0.5]
    x = graduated.starts(f, 5, [4])
    found = graduated.descend(f, x, deltas, 3, graduated.nothing(5, 100, [4]))
    for delta in [1.0] * 3 + [0.5] * 3:
        x = x - f.lr * delta * (2 * x + 20 * math.pi * (2 * math.pi * x).sin())
    assert found[-1].item() == pytest.approx(f(x).item(), rel=1e-6)


def test_smoothing_finds_what_plain_descent_does_not():
    r = study.Request(seeds=2, rounds=10, steps=20, draws=50, dim_ego=10)
    best = {
        m: study.all_seeds(r, "rastrigin", "nice", m).min(dim=0).values for m in graduated.DESCENTS
    }
    assert (best["graduated"] < best["plain"] / 3).all()


def test_a_result_is_mean_deviation_and_n_of_every_round():
    values = torch.tensor([[9.0, 5.0, 1.0], [4.0, 2.0, 6.0]])
    found = graduated.Descent("ackley", "geo", "plain", values).summary()
    assert found["best"] == [4, 2, 1] and found["n"] == 3
    assert (found["mean_best"], found["sd_best"]) == pytest.approx(
        (7 / 3, np.std([4, 2, 1], ddof=1))
    )
    assert found["mean_by_round"] == pytest.approx([5, 4]) and found[
        "sd_by_round"
    ] == pytest.approx([4, 2])
    assert (found["mean_last"], found["sd_last"]) == pytest.approx((4, 2))
    alone = graduated.Descent("ackley", "geo", "plain", values[:, :1]).summary()
    assert (
        alone["sd_best"] is None
        and alone["sd_last"] is None
        and alone["sd_by_round"] == [None, None]
    )


# --- the command line


FEW_NOISES = ["--noise", "uniform", "levy", "--delta", "0", "0.5", "--points", "41"]
FEW_STEPS = ["--rounds", "2", "--steps", "2", "--draws", "5", "--dim-ego", "6", "--seeds", "2"]


@pytest.fixture
def without_pdf(monkeypatch):
    """Most of the time of a figure goes into its PDF's fonts."""
    monkeypatch.setattr(
        figures, "save", lambda figure, stem: figure.savefig(stem.with_suffix(".svg"))
    )


def test_the_command_writes_figures_and_numbers(tmp_path, capsys):
    out = tmp_path / "a b" / "c"
    assert main(["--out", str(out), "--functions", "griewank", *FEW_NOISES, *FEW_STEPS]) == 0
    words = capsys.readouterr()
    assert "mean best" in words.out and "undefined" in words.out and not words.err
    found = json.loads((out / "smooth.json").read_text())
    assert len(found["smoothing"]["curves"]) == 2 * 2 * 2 and len(found["smoothing"]["x"]) == 41
    for c in found["smoothing"]["curves"]:
        assert c["law"] == NOISES[c["noise"]].law
        if (c["function"], c["tails"], c["delta"]) == ("rastrigin", "heavy", 0.5):
            assert c["values"] is None and "undefined" in c["method"]
        else:
            assert len(c["values"]) == 41 and c["error"] <= smoothing.TOLERANCE
    assert len(found["graduated"]["results"]) == 2 * 2 and found["graduated"]["deltas"]["geo"] == [
        1,
        0.01,
    ]
    names = {
        f"{stem}.{kind}" for stem in ("light", "heavy", "graduated") for kind in ("svg", "pdf")
    }
    assert {p.name for p in out.iterdir()} == names | {"smooth.json"}


def test_centred_skips_what_has_no_mean_and_two_dimensions_are_drawn(tmp_path, capsys, without_pdf):
    flags = ["--parts", "smoothing", "--noise", "rayleigh", "levy", "--delta", "0.5", "--dim", "2"]
    assert (
        main([*flags, "--points", "9", "--samples", "50", "--centred", "--out", str(tmp_path)]) == 0
    )
    assert "levy: skipped" in capsys.readouterr().out
    found = json.loads((tmp_path / "smooth.json").read_text())["smoothing"]["curves"]
    assert [c["noise"] for c in found] == ["rayleigh"] * 2 and np.shape(found[1]["values"]) == (
        9,
        9,
    )
    assert (tmp_path / "light.svg").exists() and not (tmp_path / "heavy.svg").exists()


def test_a_descent_that_overflows_is_null(tmp_path, without_pdf):
    flags = [
        "--parts",
        "graduated",
        "--functions",
        "rastrigin",
        "--delta-first",
        "1e100",
        *FEW_STEPS,
    ]
    assert main([*flags, "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "smooth.json").read_text())["graduated"]["results"]
    assert [r["sd_last"] for r in results if r["method"] == "plain"] == [None, None]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--noise", "levi"], "did you mean levy?"),
        (["--noise", "levy", "levy"], "more than once"),
        (["--delta", "-1"], "at least 0"),
        (["--delta", "nan"], "not a finite number"),
        (["--dim", "3"], "at most 2"),
        (["--centred", "--noise", "levy", "cauchy"], "no mean that could be removed"),
        (["--samples", "10"], "add --dim 2"),
        (["--dim", "2", "--points", "501"], "at most 500"),
        (
            ["--parts", "smoothing", "--seeds", "3"],
            "--seeds has no effect without the part graduated",
        ),
        (
            ["--parts", "graduated", "--delta", "1"],
            "--delta has no effect without the part smoothing",
        ),
        (["--delta-last", "2"], "exceeds --delta-first 1"),
        (["--rounds", "1"], "--rounds 1 has one delta"),
        (["--functions", "sphere"], "choose from"),
        (["--seedz", "3"], "did you mean --seed"),
    ],
)
def test_bad_flags_are_refused_in_one_line(flags, words, capsys):
    assert main(flags) == 2
    refused(capsys, words)


def refused(capsys, words):
    error = capsys.readouterr().err
    assert error.startswith("fastsmooth: error: ") and error.count("\n") == 1 and words in error


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["--out", str(tmp_path / "new")]) == 2
    refused(capsys, "pip install 'fastsmooth[plot]'")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["smooth.json", "heavy.svg"])
def test_results_that_are_there_are_never_overwritten(name, tmp_path, capsys):
    (tmp_path / name).write_text("of an earlier command")
    assert (
        main(
            ["--out", str(tmp_path), "--parts", "smoothing", "--noise", "normal", "--delta", "0.5"]
        )
        == 2
    )
    refused(capsys, f"has {name} already")
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "of an earlier command"


def test_ctrl_c_is_no_traceback(monkeypatch, tmp_path, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(smooth, "smoothing", interrupt)
    assert main(["--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("columns", [1, 4])
def test_the_legend_lies_within_the_figure(columns):
    """It was cut off on both sides of a figure of one panel."""
    figure, axes = figures.new_figure(1, columns)
    for label in ("nice, graduated", "nice, plain", "geo, graduated", "geo, plain"):
        axes[0, 0].plot([0, 1], label=label)
    figures.add_legend(figure, axes, 1.7)
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0


def test_a_folder_that_cannot_be_made_is_said(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file")]) == 2
    refused(capsys, "choose another folder")
