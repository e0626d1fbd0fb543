"""fastsmooth.smooth beside scipy's quadrature, Monte Carlo and a loop as it was published."""

import base64
import io
import json
import math
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import integrate, special, stats

from fastsmooth.figures import pdf, svg
from fastsmooth.figures.chart import Picture, Text, ramp, text_width
from fastsmooth.figures.grid import draw_grid
from fastsmooth.smooth import figures, graduated, noises, objectives, smoothing, study
from fastsmooth.smooth.__main__ import main
from fastsmooth.smooth.noises import NOISES
from fastsmooth.smooth.objectives import OBJECTIVES
from fastsmooth.smooth.request import Request
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


# The noises


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


# Smoothed functions


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


# Graduated optimization


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
    values, h = [], objectives.STEP
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


@pytest.mark.parametrize("name", OBJECTIVES)
def test_graduated_optimization_equals_the_published_loop(name):
    """With one lr for all: with the largest ones rounding grows from step to step."""
    f, deltas, seeds = replace(OBJECTIVES[name], lr=0.01), objectives.nice(1.0, 0.01, 3), range(2)
    start = graduated.starts(f, 7, seeds)
    found = graduated.descend(f, start, deltas, 2, graduated.normal(7, 5, seeds))
    for s in seeds:
        perturb = graduated.normal(7, 5, [s])
        noises = (perturb()[0].numpy() for _ in range(6))
        exact = naive(PUBLISHED[name], start[s].numpy(), f.lr, deltas, 2, noises)
        np.testing.assert_allclose(found[:, s], exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_autograds(name):
    x = graduated.starts(OBJECTIVES[name], 50, [0, 1]).requires_grad_()
    (exact,) = torch.autograd.grad(OBJECTIVES[name](x).sum(), x)
    # the differences of f round by eps f / h
    rounding = 1e-15 * OBJECTIVES[name](x).abs().max().item() / objectives.STEP
    np.testing.assert_allclose(
        OBJECTIVES[name].gradient(x.detach()), exact, rtol=1e-6, atol=1e-6 + 4 * rounding
    )


def test_every_function_is_least_at_zero():
    for name, f in OBJECTIVES.items():
        place = 420.96874635998202 if name == "schwefel" else 0.0
        assert f(torch.full((50,), place, dtype=torch.float64)).item() == pytest.approx(0, abs=1e-8)
        assert (f(graduated.starts(f, 50, range(4))) > 0).all()


def test_schedules_run_from_the_first_delta_to_the_last():
    for schedule in objectives.SCHEDULES.values():
        deltas = schedule(1.0, 0.01, 50)
        assert len(deltas) == 50 and deltas[0] == 1 and deltas[-1] == pytest.approx(0.01)
        assert schedule(0.5, 0.5, 1) == [0.5]
    assert np.diff(objectives.nice(1.0, 0.01, 50)) == pytest.approx(-0.99 / 49)
    geo = np.array(objectives.geo(1.0, 0.01, 50))
    assert geo[1:] / geo[:-1] == pytest.approx(0.01 ** (1 / 49))


def test_a_seed_is_the_same_alone_and_among_others_and_in_groups(monkeypatch):
    r = Request(seeds=3, rounds=2, steps=2, draws=20, dim_ego=6)
    together = study.all_seeds(r, "ackley", "geo", "graduated")
    monkeypatch.setattr(study, "BLOCK", 1)
    assert torch.allclose(study.all_seeds(r, "ackley", "geo", "graduated"), together, rtol=1e-12)
    assert len(set(together[0].tolist())) == 3


def test_without_noise_it_is_gradient_descent_from_the_same_start():
    f, deltas = OBJECTIVES["rastrigin"], [1.0, 0.5]
    x = graduated.starts(f, 5, [4])
    found = graduated.descend(f, x, deltas, 3, graduated.nothing(5, 100, [4]))
    for delta in [1.0] * 3 + [0.5] * 3:
        x = x - f.lr * delta * (2 * x + 20 * math.pi * (2 * math.pi * x).sin())
    assert found[-1].item() == pytest.approx(f(x).item(), rel=1e-6)


def test_smoothing_finds_what_plain_descent_does_not():
    r = Request(seeds=2, rounds=10, steps=20, draws=50, dim_ego=10)
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


# The command line


FEW_NOISES = ["--noise", "uniform", "levy", "--delta", "0", "0.5", "--points", "41"]
FEW_STEPS = ["--rounds", "2", "--steps", "2", "--draws", "5", "--dim-ego", "6", "--seeds", "2"]


@pytest.fixture
def without_pdf(monkeypatch):
    """Most of the time of a figure goes into its PDF's fonts."""
    monkeypatch.setattr(pdf, "available", lambda: False)


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


def test_without_matplotlib_the_svg_is_written_and_one_line_says_what_to_install(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["--out", str(tmp_path), "--parts", "smoothing", *FEW_NOISES]) == 0
    error = capsys.readouterr().err
    assert error == (
        "fastsmooth: no PDF figures without matplotlib: pip install 'fastsmooth[plot]'\n"
    )
    assert {p.name for p in tmp_path.iterdir()} == {"light.svg", "heavy.svg", "smooth.json"}


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

    monkeypatch.setattr(study, "smoothing", interrupt)
    assert main(["--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == ""


# The figures


def drawn(monkeypatch, draw, *args):
    """The grid that a function of figures saves, and its drawing."""
    grids = []
    monkeypatch.setattr(figures, "save", lambda grid, r: grids.append(grid))
    draw(*args)
    (grid,) = grids
    return grid, draw_grid(grid)


def descents(r, value=1.0):
    values = torch.linspace(3 * value, value, r.rounds).double()[:, None] * torch.tensor([0.5, 1.5])
    return [
        graduated.Descent(f, s, m, values)
        for f in r.functions
        for s in r.schedules
        for m in graduated.DESCENTS
    ]


@pytest.mark.parametrize("functions", [("ackley",), tuple(OBJECTIVES)])
def test_all_text_lies_within_the_figure(functions, monkeypatch):
    """The legend of a figure of one panel was cut off on both sides."""
    r = Request(functions=functions, rounds=4)
    grid, drawing = drawn(monkeypatch, figures.draw_graduated, r, descents(r))
    words = [shape for shape in drawing.shapes if isinstance(shape, Text)]
    for word in words:
        share = {"start": 0, "middle": 0.5, "end": 1}[word.anchor]
        left = word.x - share * text_width(word.text, word.size)
        assert left >= 0 and left + text_width(word.text, word.size) <= drawing.width, word
        assert 0 < word.y < drawing.height, word
    assert {grid.title, *(look.label for look in grid.legend)} <= {word.text for word in words}


def test_a_descent_is_drawn_as_its_mean_and_range(monkeypatch):
    r = Request(functions=("ackley",), rounds=3, schedules=("geo",))
    grid, _ = drawn(monkeypatch, figures.draw_graduated, r, descents(r, 2.0))
    graduated_curve, plain = grid.rows[0][0].curves
    assert graduated_curve.line == ((1, 6.0), (2, 4.0), (3, 2.0))
    assert graduated_curve.band == ((1, 3.0, 9.0), (2, 2.0, 6.0), (3, 1.0, 3.0))
    assert not graduated_curve.dash and plain.dash and plain.color == graduated_curve.color


def test_what_overflowed_is_left_out_of_a_figure(monkeypatch):
    r = Request(functions=("ackley",), rounds=2, schedules=("geo",))
    for value in (math.inf, math.nan):
        grid, drawing = drawn(monkeypatch, figures.draw_graduated, r, descents(r, value))
        assert all(not curve.line and not curve.band for curve in grid.rows[0][0].curves)
        assert "nan" not in svg.svg_file(drawing) and "inf" not in svg.svg_file(drawing)


def test_undefined_functions_are_said_to_be_so_and_the_others_are_not(monkeypatch):
    r = Request(noise=("cauchy", "levy"), delta=(0.0, 0.5), points=11)
    grid, drawing = drawn(monkeypatch, figures.draw_smoothing, r, list(study.smoothing(r)))
    rastrigin, drop_wave = grid.rows
    assert all(panel.note and len(panel.curves) == 2 for panel in rastrigin)  # f, and f of delta 0
    assert all(not panel.note and len(panel.curves) == 3 for panel in drop_wave)
    shown = [shape.text for shape in drawing.shapes if isinstance(shape, Text)]
    assert shown.count("undefined for δ > 0:") == 2


VALUES = np.array([[0.0, 10.0], [20.0, 30.0]])  # [x1, x2]
PLACED = (85, 255, 0, 170)  # x1 to the right and x2 upwards: the first row is the largest x2


def test_a_map_has_every_value_in_its_place():
    assert tuple(figures.levels(VALUES, 0.0, 30.0)) == PLACED
    assert tuple(figures.levels(np.full((2, 2), 7.0), 7.0, 7.0)) == (0, 0, 0, 0)
    assert figures.levels(None, 0.0, 1.0) == b""


def test_a_picture_has_the_colours_of_its_levels_in_svg_and_in_pdf():
    palette = ramp()
    assert palette[:3].hex() == "440154" and palette[-3:].hex() == "fde725"
    colors = [tuple(palette[3 * level : 3 * level + 3]) for level in PLACED]
    colors = [*colors, *colors[:2]]  # two columns, three rows
    picture = Picture(10, 20, 80, 60, 2, bytes((*PLACED, *PLACED[:2])))
    (data,) = re.findall(r'base64,([^"]+)', svg.element(picture))
    image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
    assert [image.getpixel((i % 2, i // 2)) for i in range(6)] == colors and image.size == (2, 3)

    axes = pytest.importorskip("matplotlib.figure").Figure().add_axes((0, 0, 1, 1))
    pdf.add(axes, picture, 0)
    (image,) = axes.images
    assert [tuple(pixel) for row in image.get_array() for pixel in row] == colors
    assert image.get_extent() == [10, 90, 80, 20]


def test_rows_of_maps_have_a_colour_bar_and_undefined_ones_none(monkeypatch):
    r = Request(noise=("levy",), delta=(0.5,), points=9, dim=2, samples=50)
    grid, drawing = drawn(monkeypatch, figures.draw_smoothing, r, list(study.smoothing(r)))
    (rastrigin,), (drop_wave,) = grid.rows
    assert rastrigin.note and not rastrigin.levels and len(drop_wave.levels) == 81
    pictures = [shape for shape in drawing.shapes if isinstance(shape, Picture)]
    assert [(p.columns, len(p.levels)) for p in pictures] == [(9, 81), (1, 256)]
    assert pictures[1].x > pictures[0].x + pictures[0].width


def test_a_folder_that_cannot_be_made_is_said(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file")]) == 2
    refused(capsys, "choose another folder")
