"""--measure step: a measurement that is the step of training itself, beside the plain step."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from exact import EXACT
from forks import assert_same_run
from images import epoch_batches
from rows import read_rows
from torch import nn

from fastsmooth import models
from fastsmooth.cli.config import resolve
from fastsmooth.cli.flags import ConfigError
from fastsmooth.cli.parse import parse
from fastsmooth.data import open_data
from fastsmooth.noise.persample import sample_norms
from fastsmooth.optim import NoisySGD
from fastsmooth.train import main
from fastsmooth.training import joining, modes
from fastsmooth.training.joining import Facts, choose_measure, difference
from fastsmooth.training.step import Step, casting

CPU = torch.device("cpu")
GROUP = ["--norm", "group"]
BATCH = ["--bn", "batch"]


def images(size: int):
    data = open_data(resolve({}), CPU)
    index = next(iter(epoch_batches(0, 0, len(data.train), size)))
    return next(iter(data.train.batches([index], 0)))


def with_dropout(classes: int, norm: str = "batch") -> nn.Module:
    model = models.build("resnet8", classes, norm)
    model.head = nn.Sequential(nn.Dropout(0.3), model.head)
    return model


MODELS = {
    "group": (lambda: models.build("resnet8", 10, "group"), None, "fp32"),
    "batch": (lambda: models.build("resnet8", 10), "batch", "fp32"),
    "depthwise": (lambda: models.build("mobilenetv2", 10), "batch", "fp32"),
    "dropout": (lambda: with_dropout(10), "batch", "fp32"),
    "bf16": (lambda: models.build("resnet8", 10), "batch", "bf16"),
}


def stepped(model: nn.Module, bn: str | None, precision: str) -> Step:
    return Step(model, NoisySGD(model.parameters(), "sgd", 0.1), CPU, precision, False, bn=bn)


@pytest.mark.parametrize("name", MODELS)
def test_a_measured_step_is_the_plain_step_and_leaves_the_norms(name):
    make, bn, precision = MODELS[name]
    torch.manual_seed(0)
    model = make()
    plain, measured = (stepped(copy.deepcopy(model), bn, precision) for _ in range(2))
    x, y = images(24)
    x = x.to(plain.dtype)
    for _ in range(2):
        state = torch.get_rng_state()
        loss, correct = plain.gradient(x, y)
        drawn = torch.get_rng_state()
        torch.set_rng_state(state)
        with casting(CPU, precision):
            expected = sample_norms(measured.model, x, y, bn=bn)
        torch.set_rng_state(state)
        own_loss, own_correct = measured.measured_gradient(x, y)
        assert torch.equal(torch.get_rng_state(), drawn)
        rounding = 1e-5 if precision == "fp32" else 3e-2
        torch.testing.assert_close(own_loss, loss, rtol=rounding, atol=0)
        assert own_loss.dtype == loss.dtype and own_correct == correct
        pairs = list(zip(plain.model.parameters(), measured.model.parameters(), strict=True))
        assert all(q.grad.dtype == q.dtype and q.grad.shape == q.shape for _, q in pairs)
        own, expected_grad = (
            torch.cat([p.grad.flatten() for p in ps]) for ps in zip(*pairs, strict=True)
        )
        assert (expected_grad - own).norm() <= rounding * own.norm()
        # the statistics move in the same bits, and are counted
        for (key, a), b in zip(plain.model.named_buffers(), measured.model.buffers(), strict=True):
            assert torch.equal(a, b), key
        torch.testing.assert_close(measured.norms.noise, expected.noise)
        torch.testing.assert_close(measured.norms.squares, expected.squares)
        torch.testing.assert_close(measured.norms.grad_square, expected.grad_square)


# Whole runs


def run(out, *flags: str, code: int = 0):
    base = [*EXACT, "--log-every", "10", "--optimizer", "shb", "--lr", "0.02"]
    assert main([*base, *flags, "--out", str(out)]) == code
    return out


def rows(out, kind: str) -> list[dict]:
    return [row for row in read_rows(out) if row["kind"] == kind]


@pytest.mark.parametrize("flags", [GROUP, BATCH], ids=" ".join)
def test_a_run_with_measured_steps_is_the_run_apart_but_for_rounding(flags, tmp_path):
    line = [*flags, "--track-noise", "every=3", "--budget", "updates=20"]
    apart, step = (run(tmp_path / m, *line, "--measure", m) for m in ("apart", "step"))
    plain = run(tmp_path / "plain", "--budget", "updates=20", *(flags if flags is GROUP else []))
    found, expected = rows(step, "measure"), rows(apart, "measure")
    assert [r["step"] for r in found] == [r["step"] for r in expected] == [0, 3, 6, 9, 12, 15, 18]
    for key in ("samples", "se_over", "estimator", "bn", "precision", "epoch", "batch_size", "lr"):
        assert [r[key] for r in found] == [r[key] for r in expected], key
    for key in ("c2_sampled", "c2_sampled_se", "grad_norm", "k2", "delta_measured"):
        # the first at the same parameters, the others where rounding has led
        assert found[0][key] == pytest.approx(expected[0][key], rel=1e-6), key
        assert [r[key] for r in found] == pytest.approx([r[key] for r in expected], rel=1e-2), key
    for kind, keys in (
        ("step", ["train_loss", "grad_norm", "direction_norm"]),
        ("epoch", ["train_loss", "test_loss"]),
    ):
        for key in keys:
            with_, without = ([r[key] for r in rows(out, kind)] for out in (step, plain))
            assert len(with_) == {"step": 2, "epoch": 1}[kind]
            assert with_ == pytest.approx(without, rel=1e-2), (kind, key)
    assert [r["train_acc"] for r in rows(step, "step")] == [
        r["train_acc"] for r in rows(plain, "step")
    ]
    models_ = [
        torch.load(max((out / "checkpoints").glob("*.pt")), weights_only=True)["model"]
        for out in (step, plain)
    ]
    for key, value in models_[1].items():
        torch.testing.assert_close(models_[0][key], value, rtol=1e-2, atol=1e-3, msg=key)
        assert value.is_floating_point() or torch.equal(models_[0][key], value)


@pytest.mark.parametrize("flags", [GROUP, BATCH], ids=" ".join)
def test_an_interrupted_run_ends_in_the_bits_of_one_that_was_not(flags, tmp_path):
    line = [*flags, "--track-noise", "every=4", "--measure", "step", "--budget", "updates=60"]
    line += ["--checkpoint-every", "7", "--method", "hybrid", "--decay-epoch", "1"]
    whole = run(tmp_path / "whole", *line)
    parted = run(tmp_path / "parted", *line, "--max-time", "0.001", code=75)
    for _ in range(3):
        main(["--resume", "--out", str(parted), "--max-time", "0.001"])
    assert main(["--resume", "--out", str(parted), "--max-time", "1h"]) == 0
    assert len(rows(whole, "measure")) == 15
    assert_same_run(parted, whole)


def test_a_measured_step_makes_no_other_pass(tmp_path, monkeypatch):
    def fails(*given, **more):
        raise AssertionError("a measurement beside the update")

    monkeypatch.setattr("fastsmooth.noise.online.NoiseTracker.measure", fails)
    out = run(tmp_path / "run", *GROUP, "--track-noise", "every=1", "--measure", "step", *SHORT)
    # the last batch of the epoch has 29 samples
    assert [r["step"] for r in rows(out, "measure")] == list(range(46))


SHORT = ["--budget", "updates=46"]


def test_what_auto_chose_is_said_and_kept(tmp_path, capsys):
    line = [*GROUP, "--track-noise", "every=20", "--budget", "updates=25"]
    kept = {}
    for name, flags in (("auto", []), ("step", ["--measure", "step"]), ("none", [])):
        out = run(tmp_path / name, *(line if name != "none" else line[4:]), *flags)
        kept[name] = json.loads((out / "env.json").read_text())["measure"]
    assert kept == {"auto": "apart", "step": "step", "none": None}
    said = capsys.readouterr().out
    assert said.count("; by the update itself, whose sums are in another order") == 1
    assert "noise measured 2 times, each by the update itself" in said
    newest = max((tmp_path / "auto" / "checkpoints").glob("*.pt"))
    assert torch.load(newest, weights_only=True)["made_with"]["measure"] == "apart"


def test_a_gradient_that_is_not_finite_ends_the_run(tmp_path, capsys):
    line = ["--epochs", "2", *GROUP, "--track-noise", "every=1", "--measure", "step"]
    run(tmp_path / "run", *line, "--lr", "1e18", code=3)
    error = capsys.readouterr().err
    assert "not finite at update" in error and len(error.splitlines()) == 1


# What is in the way


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--track-noise every=5", "the micro-batch estimator takes gradients of parts"),
        ("--track-noise every=5 --bn eval", "--bn eval measures another gradient"),
        ("--track-noise every=5 --bn frozen", "--bn frozen measures another gradient"),
        ("--track-noise every=5 --norm group --micro-batch 16", "--micro-batch cuts the batch"),
        ("", "--measure has no effect without --track-noise"),
    ],
)
def test_a_step_that_cannot_be_is_refused_in_one_line(flags, words, tmp_path, capsys):
    argv = [*flags.split(), "--measure", "step", "--out", str(tmp_path / "run")]
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line and (not flags or "use --measure apart" in line)
    assert not (tmp_path / "run").exists()


class Averaged(nn.Module):
    """Keeps a running mean of its outputs in training, which no measuring pass knows of."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 10, 8)
        self.norm = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)

    def forward(self, x):
        return self.layer(self.norm(x)).flatten(1)


class Noisy(nn.Module):
    """Draws once for the batch, and once for every sample where it sees one at a time."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(192, 10), nn.Parameter(torch.ones(10))

    def forward(self, x):
        y = self.layer(x.flatten(1)) * self.scale
        return y + torch.randn(10) if self.training else y


@pytest.mark.parametrize(
    "make, bn, compiled, why",
    [
        (lambda: models.build("resnet8", 10, "group"), None, True, ""),
        (lambda: models.build("resnet8", 10), "batch", True, ""),
        (lambda: with_dropout(10, "group"), None, False, ""),
        (lambda: with_dropout(10, "group"), None, True, "are others once it is compiled"),
        (Averaged, None, False, "keeps other statistics"),
        (Noisy, None, False, "draws other random numbers"),
    ],
)
def test_a_pass_that_is_another_is_seen(make, bn, compiled, why):
    torch.manual_seed(0)
    model, (x, y) = make(), images(16)
    before = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = difference(model, x, y, bn, compiled)
    assert why in found if why else not found
    assert all(torch.equal(a, model.state_dict()[key]) for key, a in before[0].items())
    assert torch.equal(torch.get_rng_state(), before[1]) and model.training


@pytest.mark.parametrize(
    "flags, device, why, processes, measure",
    [
        ("", "cuda", "", 1, "step"),
        ("", "cpu", "", 1, "apart"),
        ("", "mps", "", 1, "apart"),
        ("--deterministic", "cuda", "", 1, "apart"),
        ("--deterministic --measure step", "cuda", "", 1, "step"),
        ("--measure apart", "cuda", "", 1, "apart"),
        ("--measure step", "cpu", "", 1, "step"),
        ("", "cuda", "it differs", 1, "apart"),
        ("", "cuda", "", 2, "apart"),
        ("--micro-batch 8", "cuda", "", 1, "apart"),
    ],
)
def test_auto_is_a_step_on_a_gpu_where_nothing_is_in_the_way(
    flags, device, why, processes, measure, monkeypatch
):
    monkeypatch.setattr(joining, "difference", lambda *given: why)
    c = resolve(parse([*GROUP, "--track-noise", "every=5", *flags.split()]).given)
    x = SimpleNamespace(device=torch.device(device))
    chosen, words = choose_measure(Facts(c, "per-sample", processes), None, x, None, False)
    assert chosen == measure
    asked = "step" in flags or measure == "step"
    assert bool(words) == (
        device == "cuda" and not asked and "apart" not in flags and "--deterministic" not in flags
    )
    if why or processes > 1:
        named = resolve(parse([*GROUP, "--track-noise", "every=5", "--measure", "step"]).given)
        with pytest.raises(ConfigError, match=r"--measure step: .*: use --measure apart"):
            choose_measure(Facts(named, "per-sample", processes), None, x, None, False)


# Precision


def test_a_bf16_run_is_measured_with_bf16_operands(tmp_path):
    line = [*GROUP, "--track-noise", "every=1", "--budget", "updates=1"]
    found = {}
    for precision in ("fp32", "bf16"):
        for measure in ("apart", "step"):
            out = run(
                tmp_path / f"{precision} {measure}",
                *line,
                "--precision",
                precision,
                "--measure",
                measure,
            )
            (found[precision, measure],) = rows(out, "measure")
            assert found[precision, measure]["precision"] == precision
            assert found[precision, measure]["precision_suffices"] is True
    for measure in ("apart", "step"):
        exact = found["fp32", measure]["c2_sampled"]
        # rounded, and no further off than that (docs/measure.md)
        assert found["bf16", measure]["c2_sampled"] == pytest.approx(exact, rel=5e-3)
        assert found["bf16", measure]["c2_sampled"] != exact


def test_parts_of_a_bf16_run_are_in_bf16_too(tmp_path):
    line = ["--track-noise", "every=1", "--budget", "updates=1", "--estimator", "micro-batch"]
    found = []
    for precision in ("fp32", "bf16"):
        out = run(tmp_path / precision, *line, "--precision", precision)
        found += rows(out, "measure")
    assert [row["precision"] for row in found] == ["fp32", "bf16"]
    fp32, bf16 = (row["c2_sampled"] for row in found)
    assert bf16 == pytest.approx(fp32, rel=0.05) and bf16 != fp32


@pytest.mark.parametrize("precision, suffices", [("bf16", False), ("fp32", True)])
def test_a_noise_below_the_rounding_of_its_operands_is_told_once(
    precision, suffices, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(modes, "LEAST_NOISE", 1e9)
    line = [*GROUP, "--track-noise", "every=1", "--budget", "updates=3", "--precision", precision]
    out = run(tmp_path / "run", *line)
    assert [row["precision_suffices"] for row in rows(out, "measure")] == [suffices] * 3
    said = capsys.readouterr().err.splitlines()
    assert len(said) == (0 if suffices else 1)
    assert suffices or "less than bf16 products resolve" in said[0]


def test_where_the_precision_no_longer_suffices():
    track = modes.TrackNoise(None, "apart", "", 1)
    live = SimpleNamespace(update=0, ranks=SimpleNamespace(leader=False))

    def judged(noise: float, precision: str, samples: int = 1) -> bool:
        values = {"c2_sampled": noise, "grad_norm": 2.0}
        return track.judged(live, values, precision, samples)["precision_suffices"]

    for precision in ("bf16", "tf32"):
        assert judged(4.001e-3, precision) and not judged(3.999e-3, precision)
        # of parts of 8 samples the noise is an eighth
        assert judged(3.3e-2, precision, 8) and not judged(3.1e-2, precision, 8)
    assert judged(0.0, "fp32") and judged(0.0, "tf32x3")
