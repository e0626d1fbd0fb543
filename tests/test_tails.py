"""Noise statistics beside scipy and numpy on the same coordinates, and beside laws whose tail index
is known."""

import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from fastsmooth.noise.tails import LEVELS, QQ, SHARES, NoiseStatistics

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SINGLE = ("mean", "variance", "skewness", "excess_kurtosis", "ks_distance")


def summary_of(*draws, device: str = "cpu") -> dict:
    """Of one-dimensional draws, each observed as one tensor; as a reader of JSON gets it."""
    statistics = NoiseStatistics(len(draws[0]), torch.device(device))
    for draw in draws:
        statistics.observe([torch.as_tensor(draw, device=device)])
    return json.loads(json.dumps(statistics.summary(), allow_nan=False))


def heavy(n: int, seed: int = 0, dtype=np.float64) -> np.ndarray:
    """Skewed, heavy-tailed coordinates of both signs over many octaves."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(n) * np.exp(1.2 * rng.standard_normal(n)) + 0.3).astype(dtype)


def estimates(summary: dict) -> list[dict]:
    """Every {"value", "error", "draws_mean", "draws_error", "draws"} of a summary."""
    return [
        *(summary[name] for name in SINGLE),
        *summary["quantiles"],
        *summary["hill"],
        *summary["log_moment"].values(),
    ]


# Moments


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [2, 1001, 300_001])  # the last fills several blocks
def test_moments_are_those_of_scipy(n, dtype, device):
    x = heavy(n, seed=n, dtype=dtype)
    found, exact = summary_of(x, device=device), stats.describe(x.astype(np.float64), ddof=0)
    assert found["count"] == n
    for name, value in (
        ("mean", exact.mean),
        ("variance", exact.variance),
        ("skewness", exact.skewness),
        ("excess_kurtosis", exact.kurtosis),
    ):
        assert found[name]["value"] == pytest.approx(value, rel=1e-10, abs=1e-12), name


@pytest.mark.parametrize("offset", [0.0, 2.0**30, -(2.0**36)])
def test_a_mean_far_above_the_deviation_cancels_nothing(offset):
    """Multiples of 2^-16 stay exact beside the offset, so only the mean may change. Stored means of
    draws are rounded, which costs a relative epsilon |mean| / deviation; raw power sums would lose
    its square and more."""
    x = np.round(heavy(50_000) * 2**10) / 2**16
    draws = [x, x[::-1] / 2, 2 * x]
    pooled = np.concatenate(draws)
    found = summary_of(*(d + offset for d in draws))
    loss = 1e-12 + 4 * np.finfo(np.float64).eps * abs(offset) / pooled.std()
    assert found["mean"]["value"] - offset == pytest.approx(
        pooled.mean(), abs=1e-15 * abs(offset) + 1e-14
    )
    assert found["variance"]["value"] == pytest.approx(pooled.var(), rel=loss)
    assert found["skewness"]["value"] == pytest.approx(stats.skew(pooled), rel=loss)
    assert found["excess_kurtosis"]["value"] == pytest.approx(stats.kurtosis(pooled), rel=loss)


def test_a_mean_far_below_the_deviation_is_found():
    x = heavy(100_000)
    x = np.concatenate([x, -x, np.full(1000, 1e-9)])
    exact = math.fsum(x) / len(x)
    assert summary_of(x)["mean"]["value"] == pytest.approx(exact, abs=1e-16 * np.std(x))
    assert exact == pytest.approx(5e-12, rel=0.01)


def test_draws_whose_means_differ_merge_to_the_moments_of_all():
    draws = [heavy(5000, seed) * 10.0**-seed + 100 * seed for seed in range(4)]
    found, exact = summary_of(*draws), stats.describe(np.concatenate(draws), ddof=0)
    assert found["mean"]["value"] == pytest.approx(exact.mean, rel=1e-13)
    assert found["variance"]["value"] == pytest.approx(exact.variance, rel=1e-12)
    assert found["skewness"]["value"] == pytest.approx(exact.skewness, rel=1e-11)
    assert found["excess_kurtosis"]["value"] == pytest.approx(exact.kurtosis, rel=1e-11)


def test_several_draws_and_all_at_once_are_the_same():
    draws = [heavy(4321, seed) for seed in range(5)]
    many, one = summary_of(*draws), summary_of(np.concatenate(draws))
    assert many["histogram"] == one["histogram"]
    for a, b in zip(estimates(many), estimates(one), strict=True):
        assert a["value"] == pytest.approx(b["value"], rel=1e-11)
    assert (many["draws"], one["draws"]) == (5, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_does_not_matter_how_coordinates_are_split_into_tensors(dtype):
    x = torch.from_numpy(heavy(300_000)).to(dtype)
    whole = NoiseStatistics(len(x), x.device)
    whole.observe([x])
    split = NoiseStatistics(len(x), x.device)
    shapes = [(1,), (131_071,), (0,), (), (2, 3, 5), (7, 11), (140_000,), (28_820,)]
    split.observe(
        [p.view(s) for p, s in zip(x.split([math.prod(s) for s in shapes]), shapes, strict=True)]
    )
    transposed = NoiseStatistics(len(x), x.device)
    transposed.observe([x.view(600, 500).T.contiguous().T])
    assert whole.summary() == split.summary() == transposed.summary()


# The histogram


@pytest.mark.parametrize("device", DEVICES)
def test_histogram_counts_every_coordinate_in_its_bin(device):
    rng = np.random.default_rng(1)
    x = (10 ** rng.uniform(-30, 10, 20_000) * rng.choice([-1, 1], 20_000, p=[0.3, 0.7])).astype(
        np.float32
    )
    edges = np.float32(2.0) ** np.arange(-20, 20)
    x = np.concatenate([x, edges, -edges, [0, -0.0, 1e-45, 3e38, -3e38]]).astype(np.float32)
    found = summary_of(x, device=device)
    bins = found["histogram"]["edges"]
    assert found["zeros"] == 3
    assert np.log2(np.array(bins[1:]) / bins[:-1]).max() < 0.17
    nonzero = x[np.abs(x) > 1e-44].astype(np.float64)
    for side, part in (("positive", nonzero[nonzero > 0]), ("negative", -nonzero[nonzero < 0])):
        assert found["histogram"][side] == np.histogram(part, bins)[0].tolist()
    assert bins[0] <= np.abs(nonzero).min() < bins[1]
    assert bins[-2] <= np.abs(nonzero).max() < bins[-1]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e9])
def test_quantiles_are_within_the_stated_bound(scale):
    draws = [heavy(30_011, seed) * scale for seed in range(3)]
    found = summary_of(*draws)
    assert found["quantile_relative_error"] < 0.008
    assert [q["level"] for q in found["quantiles"]] == list(LEVELS)
    for q in found["quantiles"]:
        exact = np.quantile(np.concatenate(draws), q["level"], method="inverted_cdf")
        assert abs(q["value"] - exact) <= found["quantile_relative_error"] * abs(exact)


def test_quantiles_of_few_coordinates_are_the_order_statistics():
    x = np.array([-3.0, -1.0, 2.0, 40.0])
    found = {q["level"]: q["value"] for q in summary_of(x)["quantiles"]}
    for level, exact in ((0.001, -3), (0.25, -3), (0.5, -1), (0.75, 2), (0.95, 40), (0.999, 40)):
        assert found[level] == pytest.approx(exact, rel=0.0079)


def test_quantiles_of_an_even_density_are_far_closer_than_a_bin():
    x = np.random.default_rng(10).uniform(-1, 1, 200_000)
    for q in summary_of(x)["quantiles"]:
        assert q["value"] == pytest.approx(np.quantile(x, q["level"]), abs=3e-4)


def test_qq_of_a_normal_law_is_straight_and_of_a_heavy_one_bends_outwards():
    rng = np.random.default_rng(2)
    x = 1e-4 * rng.standard_normal(1_000_000)
    qq = summary_of(x)["qq"]
    assert qq["normal"] == pytest.approx(np.linspace(-4, 4, 41))
    exact = np.quantile(x, stats.norm.cdf(qq["normal"]), method="inverted_cdf") / x.std()
    assert np.abs(qq["observed"] / exact - 1).max() <= 0.0079
    inner = slice(5, 36)  # between -3 and 3 a million coordinates leave little to chance
    assert qq["observed"][inner] == pytest.approx(qq["normal"][inner], abs=0.04)
    bent = summary_of(rng.standard_t(3, 100_000))["qq"]["observed"]
    assert bent[0] < -5.5 and bent[-1] > 5.5
    assert len(QQ) == 41


@pytest.mark.parametrize(
    ("law", "close"),
    [
        (lambda rng: rng.standard_normal(100_000), 0.01),
        (lambda rng: rng.laplace(0.4, 2.0, 100_000), 0.01),
        (lambda rng: rng.exponential(1e-6, 100_000), 0.01),
        (lambda rng: np.where(rng.random(100_000) < 0.3, 0.0, rng.standard_normal(100_000)), 0.01),
        # bins half a deviation wide: the bound says so
        (lambda rng: 50 + rng.standard_normal(100_000), 0.5),
        (
            lambda rng: rng.choice([-1, 1], 100_000, p=[0.3, 0.7]) * rng.uniform(1, 1.2, 100_000),
            0.01,
        ),
    ],
)
def test_ks_distance_is_that_of_scipy_within_the_stated_bound(law, close):
    x = law(np.random.default_rng(3)).astype(np.float32).astype(np.float64)
    found = summary_of(x)["ks_distance"]
    exact = stats.kstest(x, stats.norm(x.mean(), x.std()).cdf).statistic
    assert found["value"] - 1e-9 <= exact <= found["value"] + found["bound"] + 1e-9
    assert 0 < found["bound"] < close


# Tail indices


@pytest.mark.parametrize("alpha", [0.8, 1.5, 3.0])
def test_hill_finds_the_index_of_pareto_samples(alpha):
    rng = np.random.default_rng(4)
    x = (
        1e-3
        * stats.pareto.rvs(alpha, size=400_000, random_state=rng)
        * rng.choice([-1, 1], 400_000)
    )
    found = summary_of(*x.reshape(4, -1))
    assert [h["share"] for h in found["hill"]] == list(SHARES)
    for hill in found["hill"]:
        assert abs(hill["value"] - alpha) < 4 * hill["error_if_independent"]
        assert hill["error_if_independent"] == pytest.approx(hill["value"] / math.sqrt(hill["k"]))
        assert 0.2 < hill["error"] / hill["error_if_independent"] < 2.5  # three degrees of freedom
        assert 0.9 * hill["share"] * len(x) < hill["k"] <= hill["share"] * len(x)


def test_hill_is_that_of_the_sorted_magnitudes():
    x = heavy(50_000, dtype=np.float32)
    x[::7] = 0.0  # a share is of the others
    ordered = np.sort(np.abs(x[x != 0]).astype(np.float64))[::-1]
    for hill in summary_of(x)["hill"]:
        k = hill["k"]
        assert ordered[k - 1] >= hill["threshold"] > ordered[k]
        mantissa, exponent = math.frexp(hill["threshold"])
        # the edge below has eight significant bits, too
        lower = math.ldexp(mantissa * 256 - 1, exponent - 8)
        assert k <= hill["share"] * len(ordered) < np.count_nonzero(ordered >= lower)
        exact = 1 / np.mean(np.log(ordered[:k] / hill["threshold"]))
        assert hill["value"] == pytest.approx(exact, abs=0.05 * hill["error_if_independent"])


@pytest.mark.parametrize("alpha", [1.2, 1.5, 1.8, 2.0])
def test_log_moments_find_the_index_of_stable_samples(alpha):
    draws, n = 20, 20_000
    rng = np.random.default_rng(5)
    x = stats.levy_stable.rvs(alpha, 0, scale=3e-5, size=(draws, n), random_state=rng)
    found = summary_of(*x)["log_moment"]
    assert abs(found["alpha"]["value"] - alpha) < 4 * found["alpha"]["error"]
    assert found["alpha"]["error"] < 0.02
    assert found["inverse_square"]["value"] == pytest.approx(found["alpha"]["value"] ** -2)
    logs = np.log(np.abs(x).ravel())
    assert found["inverse_square"]["value"] == pytest.approx(
        6 / np.pi**2 * logs.var() - 0.5, abs=2e-5
    )
    # independent coordinates: the spread over draws is what the fourth moment of the logs says, up
    # to 20 draws' chance
    theory = (
        6 / np.pi**2 * np.sqrt((((logs - logs.mean()) ** 4).mean() - logs.var() ** 2) / logs.size)
    )
    assert 0.5 < found["inverse_square"]["error"] / theory < 1.7


def test_log_moments_above_two_and_without_an_index_stand_as_they_are():
    rng = np.random.default_rng(6)
    even = summary_of(rng.uniform(-1, 1, 100_000))["log_moment"]
    # Var log |U| = 1
    assert even["alpha"]["value"] == pytest.approx((6 / np.pi**2 - 0.5) ** -0.5, abs=0.25)
    flat = summary_of(rng.choice([-1, 1], 10_000) * rng.uniform(1, 2, 10_000))["log_moment"]
    assert flat["inverse_square"]["value"] < 0
    assert flat["alpha"] == {
        "value": None,
        "error": None,
        "draws_mean": None,
        "draws_error": None,
        "draws": 0,
    }


def test_zeros_are_counted_and_leave_the_tail_indices_alone():
    x = heavy(20_000)
    with_zeros = np.concatenate([np.zeros(5000), x, -np.zeros(2000)])
    found, without = summary_of(with_zeros), summary_of(x)
    assert (found["zeros"], without["zeros"]) == (7000, 0)
    assert found["count"] == 27_000
    assert found["histogram"] == without["histogram"]
    for a, b in zip(found["hill"], without["hill"], strict=True):
        assert a == b
    assert found["log_moment"] == without["log_moment"]
    assert found["quantiles"] != without["quantiles"]


# Errors


def test_errors_are_the_spread_of_the_estimates_of_single_draws():
    draws = [heavy(3000, seed) for seed in range(6)]
    found, single = summary_of(*draws), [summary_of(d) for d in draws]
    for pooled, *alone in zip(estimates(found), *map(estimates, single), strict=True):
        values = [a["value"] for a in alone]
        assert pooled["draws_mean"] == pytest.approx(np.mean(values))
        assert pooled["draws_error"] == pytest.approx(stats.sem(values))
        assert pooled["draws"] == 6
    assert found["mean"]["error"] == pytest.approx(stats.sem([d.mean() for d in draws]), rel=1e-9)


@pytest.mark.parametrize("count", [2, 5, 75])
def test_errors_of_pooled_values_are_those_of_the_jackknife(count):
    """75 draws fall into 32 groups, of two or three draws each."""
    draws = [heavy(500, seed) * (1 + seed % 3) for seed in range(count)]
    found = summary_of(*draws)
    groups = [[draws[i] for i in range(g, count, 32)] for g in range(min(count, 32))]
    without = [
        np.concatenate([d for j, others in enumerate(groups) if j != i for d in others])
        for i in range(len(groups))
    ]
    for name, exact in (
        ("variance", np.var),
        ("skewness", stats.skew),
        ("excess_kurtosis", stats.kurtosis),
    ):
        values = np.array([exact(x) for x in without])
        error = math.sqrt((len(values) - 1) * values.var())
        assert found[name]["error"] == pytest.approx(error, rel=1e-9)
        assert found[name]["value"] == pytest.approx(exact(np.concatenate(draws)), rel=1e-9)
    ranked = [np.quantile(x, 0.95, method="inverted_cdf") for x in without]
    q = found["quantiles"][LEVELS.index(0.95)]
    assert q["error"] == pytest.approx(
        math.sqrt((len(ranked) - 1) * np.var(ranked)),
        abs=0.008 * q["value"] * math.sqrt(len(ranked)),
    )


def test_errors_hold_for_coordinates_that_vary_together():
    """Each draw has a scale and a shift of its own: errors that took coordinates for independent
    would be far too small."""
    rng = np.random.default_rng(7)
    n, draws = 1000, 6
    summaries = []
    for _ in range(30):
        x = rng.standard_normal((draws, n)) * rng.uniform(
            0.5, 1.5, (draws, 1)
        ) + 0.1 * rng.standard_normal((draws, 1))
        summaries.append(summary_of(*x))
    independent = {
        "mean": 1,
        "variance": math.sqrt(2),
        "quantile": 1.4,
    }  # about, over sqrt(n draws), for the normal law
    for name, factor in independent.items():
        found = [s["quantiles"][5] if name == "quantile" else s[name] for s in summaries]
        spread = np.std([f["value"] for f in found])
        stated = np.sqrt(np.mean([f["error"] ** 2 for f in found]))
        assert 0.7 < stated / spread < 1.4
        assert stated > 2.5 * factor / math.sqrt(n * draws)


def test_the_error_of_a_pooled_kurtosis_is_not_that_of_the_mean_over_draws():
    """Normal draws of many scales: no single draw has kurtosis, all together have, and how much is
    known less well."""
    rng = np.random.default_rng(9)
    scales = np.exp(0.5 * rng.standard_normal(32))
    found = summary_of(*(rng.standard_normal((32, 2000)) * scales[:, None]))["excess_kurtosis"]
    mixture = 3 * np.mean(scales**4) / np.mean(scales**2) ** 2 - 3
    assert found["value"] == pytest.approx(mixture, rel=0.05)
    assert abs(found["draws_mean"]) < 4 * found["draws_error"] < 0.1
    assert found["error"] > 0.2


def test_a_single_draw_has_no_errors():
    found = summary_of(heavy(1000))
    assert found["draws"] == 1
    for estimate in estimates(found):
        assert estimate["error"] is estimate["draws_error"] is None
        assert estimate["draws_mean"] == estimate["value"] is not None


# Edges


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.0, 0.3, -7e5])
def test_constant_vectors_have_no_shape(value, dtype):
    # in blocks and draws for which sum(count mean) / count is not 0.3
    x = np.full(262_221, value, dtype=dtype)
    found = summary_of(x, x, x)
    assert found["mean"]["value"] == float(dtype(value))
    assert found["variance"] == {
        "value": 0.0,
        "error": 0.0,
        "draws_mean": 0.0,
        "draws_error": 0.0,
        "draws": 3,
    }
    for name in ("skewness", "excess_kurtosis", "ks_distance"):
        assert found[name]["value"] is None
        assert found[name]["draws"] == 0
    assert found["qq"] is None
    assert all(h["value"] is None and h["k"] == 0 for h in found["hill"])
    assert found["log_moment"]["alpha"]["value"] is None
    assert found["zeros"] == (786_663 if value == 0 else 0)
    assert all(q["value"] == pytest.approx(value, rel=0.0079, abs=0) for q in found["quantiles"])
    counts = found["histogram"]
    assert sum(counts["negative"]) + sum(counts["positive"]) + found["zeros"] == 786_663


@pytest.mark.parametrize("scale", [1e-38, 3.4e38])
def test_the_ends_of_the_range_of_float32_are_covered(scale):
    x = np.random.default_rng(8).uniform(-1, 1, 10_000) * scale
    found = summary_of(x)
    assert found["variance"]["value"] == pytest.approx(x.var(), rel=1e-12)
    for q in found["quantiles"]:
        exact = np.quantile(x, q["level"], method="inverted_cdf")
        assert abs(q["value"] - exact) <= found["quantile_relative_error"] * abs(exact) + 2.0**-133


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e39, -1e39])
def test_what_is_not_finite_is_refused_with_the_number_of_the_draw(bad):
    x = torch.from_numpy(heavy(200_000))
    statistics = NoiseStatistics(len(x), x.device)
    statistics.observe([x])
    before = statistics.summary()
    broken = x.clone()
    broken[-1] = bad
    with pytest.raises(FloatingPointError, match="draw 1 has coordinates that are not finite"):
        statistics.observe([broken[:5], broken[5:]])
    assert statistics.summary() == before
    assert torch.isnan(broken[-1]) or broken[-1] == bad  # the caller's tensor is left alone
    assert torch.equal(broken[:-1], x[:-1])


def test_another_number_of_coordinates_and_no_draw_are_refused():
    statistics = NoiseStatistics(10, torch.device("cpu"))
    with pytest.raises(ValueError, match="draw 0 has 11 coordinates, not 10"):
        statistics.observe([torch.zeros(10), torch.zeros(())])
    with pytest.raises(ValueError, match="no draw"):
        statistics.summary()
