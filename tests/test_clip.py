"""--clip-norm beside torch's clip_grad_norm_, --decay-weights-only beside torch.optim.SGD with
groups."""

import json

import pytest
import torch
from rows import read_rows
from said import refused, said
from torch import nn
from torch.nn import functional as F

from fastsmooth import data, models
from fastsmooth.cli.config import ConfigError, resolve
from fastsmooth.noise import gradients
from fastsmooth.optim import NoisySGD
from fastsmooth.schedule import Point
from fastsmooth.train import main
from fastsmooth.training.build import parameter_groups
from fastsmooth.training.step import Step
from fastsmooth.training.update import Update

CPU = torch.device("cpu")
MAX = 2.6


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 5),
    )  # fmt: skip


def batches(count: int):
    numbers = torch.Generator().manual_seed(1)
    for k in range(count):  # the gradients of some are longer than MAX
        x = torch.randn(8, 3, 4, 4, generator=numbers) * (2 if k % 2 else 0.02)
        yield x, torch.randint(5, (8,), generator=numbers)


@pytest.mark.parametrize("micro", [None, 4])
def test_clipping_is_that_of_torch_and_the_rows_have_the_norm_before(micro):
    model, plain = network(), network()
    optimizer = NoisySGD(model.parameters(), "shb", 0.1, 0.9, weight_decay=0.01)
    step = Step(model, optimizer, CPU, "fp32", False, micro, clip_norm=MAX)
    update = Update(step, CPU, [])
    theirs = torch.optim.SGD(plain.parameters(), 0.1, 0.9, weight_decay=0.01)
    longer = 0
    for x, y in batches(6):
        assert step.parts_apart(8) == 1
        update((x, y), 8)
        theirs.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), MAX)
        longer += bool(norm > MAX)
        theirs.step()
        square, direction = update.kept.squared_norms.tolist()
        assert square == pytest.approx(norm.item() ** 2, rel=1e-4)
        buffers = [theirs.state[p]["momentum_buffer"] for p in plain.parameters()]
        assert direction == pytest.approx(sum(b.square().sum().item() for b in buffers), rel=1e-4)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert 0 < longer < 6  # both kinds were there


def test_a_clipped_update_has_the_bits_of_torch():
    model, plain = network(), network()
    optimizer = NoisySGD(model.parameters(), "shb", 0.1, 0.9)
    step = Step(model, optimizer, CPU, "fp32", False, clip_norm=MAX)
    theirs = torch.optim.SGD(plain.parameters(), 0.1, 0.9)
    for x, y in batches(4):
        step.gradient(x, y)
        step.update()
        theirs.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), MAX)
        theirs.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_measured_step_is_clipped_and_its_norms_are_those_of_the_whole_gradient():
    model = network()
    optimizer = NoisySGD(model.parameters(), "sgd", 0.1)
    step = Step(model, optimizer, CPU, "fp32", False, clip_norm=1e-3)
    update = Update(step, CPU, [])
    x, y = list(batches(2))[1]
    update((x, y), 8, measured=True)
    whole = gradients.norm(step.norms.grads)
    assert whole > 0.1
    assert step.norms.grad_square.item() == pytest.approx(whole.item() ** 2, rel=1e-4)
    square, direction = update.kept.squared_norms.tolist()
    assert square == pytest.approx(whole.item() ** 2, rel=1e-4)
    assert direction == pytest.approx(1e-6, rel=1e-2)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_is_noticed(bad):
    model = network()
    step = Step(model, NoisySGD(model.parameters(), "sgd", 0.1), CPU, "fp32", False, clip_norm=MAX)
    update = Update(step, CPU, [])
    x, y = next(batches(1))

    def spoil() -> None:
        model[4].weight.grad[0, 0] = bad

    update((x, y), 8)
    assert update.kept.bad_update == 0
    update((x, y), 8, None, spoil)
    assert update.kept.bad_update == 2


def test_rows_of_a_clipped_run(tmp_path):
    """delta is null; grad_norm is what it would be, direction_norm is at most the limit."""
    flags = ["--clip-norm", "0.05", "--budget", "updates=6", "--log-every", "1", "--norm", "group"]
    flags += ["--track-noise", "every=2", "--batchsize", "64", "--loss", "cross-entropy"]
    shown = said(main, [*flags, "--out", str(tmp_path / "run")])
    assert shown.code == 0, shown
    rows = read_rows(tmp_path / "run")
    assert all(row["delta"] is None for row in rows)
    steps = [row for row in rows if row["kind"] == "step"]
    assert all(row["grad_norm"] > 0.05 > 0.999 * row["direction_norm"] > 0.049 for row in steps)
    measured = {row["step"]: row for row in rows if row["kind"] == "measure"}
    assert sorted(measured) == [0, 2, 4]
    for update, row in measured.items():
        assert row["delta_measured"] is None and row["c2_sampled"] > 0
        # the gradient that was measured is the one that was then clipped
        assert row["grad_norm"] == pytest.approx(steps[update]["grad_norm"], rel=1e-4)
    assert "C2 is of the gradient before it is clipped" in shown.out
    assert "delta is not given" in shown.out and "--clip-norm" in shown.out
    assert "delta 0" not in shown.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--clip-norm 1 --mode sampling", "--mode sampling is of updates along"),
        ("--clip-norm 0", "--clip-norm: 0 is out of range"),
        ("--clip-norm 1 --track-noise every=2 --quantities cabs", "--quantities cabs is a rule"),
        ("--decay-weights-only", "--decay-weights-only has no effect without --weight-decay"),
    ],
)
def test_refusals(flags, message, tmp_path):
    assert refused(main, [*flags.split(), "--out", str(tmp_path / "run")]).startswith(message)
    assert not (tmp_path / "run").exists()


def test_a_plan_has_no_delta_where_there_is_none():
    shown = said(main, ["--clip-norm", "1", "--plan", "--json", "--epochs", "2"])
    assert [json.loads(line)["delta"] for line in shown.out.splitlines()] == [None, None]
    shown = said(main, ["--clip-norm", "1", "--plan", "--epochs", "2"])
    assert shown.code == 0 and "delta is not given" in shown.out and "in units of" not in shown.out
    assert shown.out.splitlines()[1].split() == ["0-1", "0.1", "32", "0", "-", "90"]


def test_delta_is_of_plain_updates_alone():
    assert resolve({}).plain_update
    for flags in ({"sam": "rho=0.1"}, {"clip_norm": 1.0}, {"mixup": 0.2}, {"cutmix": 1.0}):
        assert not resolve(flags).plain_update
    with pytest.raises(ConfigError):
        resolve({"sam": "rho=0.1", "mode": "critical"})


def test_published_constants_are_of_plain_cross_entropy():
    """Another loss has another C2."""
    published = {"dataset": "cifar100"}
    assert resolve(published).c2 == 1280
    for flags in ({"label_smoothing": 0.1}, {"loss": "bce"}):
        assert resolve(published | flags).assumed == ("c2",)


# Weight decay of weights alone

DECAYING = {"weight_decay": 0.3, "decay_weights_only": True}


def groups_by_hand(model: nn.Module) -> list[dict]:
    by_kind = {True: [], False: []}
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            is_weight = isinstance(module, nn.Conv2d | nn.Linear) and name == "weight"
            by_kind[is_weight].append(p)
    return [{"params": by_kind[True]}, {"params": by_kind[False], "weight_decay": 0.0}]


@pytest.mark.parametrize("micro", [None, 4])
def test_norms_and_biases_do_not_decay(micro):
    """Beside torch.optim.SGD with such groups; also where the update takes gradients of parts."""
    model, plain = network(), network()
    groups = parameter_groups(resolve(DECAYING), model)
    optimizer = NoisySGD(groups, "shb", 0.1, 0.9, weight_decay=0.3)
    step = Step(model, optimizer, CPU, "fp32", False, micro)
    theirs = torch.optim.SGD(groups_by_hand(plain), 0.1, 0.9, weight_decay=0.3)
    for x, y in batches(5):
        assert step.parts_apart(8) == (1 if micro is None else 2)
        step.gradient(x, y)
        step.update()
        theirs.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        theirs.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert micro or torch.equal(p, q)


def test_the_gradient_of_parts_is_shown_at_its_parameter():
    model, plain = network(), network()
    optimizer = NoisySGD(parameter_groups(resolve(DECAYING), model), "sgd", 0.1, weight_decay=0.3)
    step = Step(model, optimizer, CPU, "fp32", False, 4)
    x, y = next(batches(1))
    step.gradient(x, y)
    step.show_gradient()
    F.cross_entropy(plain(x), y).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_every_parameter_is_in_one_group():
    for name in ("resnet8", "mobilenetv2"):
        model = models.build(name, 10)
        ours, theirs = parameter_groups(resolve(DECAYING), model), groups_by_hand(model)
        for one, other in zip(ours, theirs, strict=True):
            assert set(one["params"]) == set(other["params"])
        assert parameter_groups(resolve({}), model) == [{"params": list(model.parameters())}]


def test_directions_are_in_the_order_of_the_model():
    """The noise of a direction is a difference of gradients, which are in that order."""
    model = network()
    optimizer = NoisySGD(
        parameter_groups(resolve(DECAYING), model), "shb", 0.1, 0.9, weight_decay=0.3
    )
    params = list(model.parameters())
    grads = [torch.randn_like(p) for p in params]
    found = gradients.directions(optimizer, grads, params)
    for p, g, m in zip(params, grads, found, strict=True):
        torch.testing.assert_close(m, g + 0.3 * p if p.ndim > 1 else g)


def test_the_noise_of_directions_counts_the_decay_of_weights_alone(tmp_path):
    """For SGD m - g is what decays, whatever the batch: the norms that noise.json has beside those
    of the noise differ by it."""
    flags = ["--mode", "sampling", "--steps", "0", "--draws", "2", "--norm", "group"]
    flags += ["--weight-decay", "0.5", "--decay-weights-only", "--save-omega", "--batchsize", "700"]
    assert main([*flags, "--out", str(tmp_path / "run")]) == 0
    import numpy as np

    c = resolve({"norm": "group"})
    torch.manual_seed(0)
    images = data.open_data(c, CPU)
    model = models.build("resnet8", 10, "group")
    x, y = next(iter(images.train.batches([torch.arange(1437)])))
    F.cross_entropy(model(x), y).backward()
    (point,) = json.loads((tmp_path / "run" / "noise.json").read_text())["points"]
    full = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert point["full_grad_norm"] == pytest.approx(full.norm().item(), rel=1e-4)
    decayed = torch.cat([(0.5 * p * (p.ndim > 1)).flatten() for p in model.parameters()]).detach()
    for omega, noise in zip(
        np.load(tmp_path / "run" / "omega-0.npy"), point["grad_noise_norms"], strict=True
    ):
        rest = torch.from_numpy(omega) - decayed
        assert rest.norm().item() == pytest.approx(noise, rel=1e-3)
        assert noise < 0.9 * torch.from_numpy(omega).norm().item()


def test_a_checkpoint_without_the_groups_is_refused_in_words(tmp_path):
    flags = ["--weight-decay", "0.01", "--optimizer", "shb", "--batchsize", "256"]
    out = tmp_path / "run"
    assert main([*flags, "--budget", "updates=2", "--out", str(out)]) == 0
    (out / "status.json").unlink()  # as if it had been stopped
    message = refused(main, ["--resume", "--decay-weights-only", "--out", str(out)])
    assert "was started without --decay-weights-only" in message
    saved = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(saved | {"decay_weights_only": True}))
    message = said(main, ["--resume", "--out", str(out)])
    assert message.code == 2 and "the checkpoint is not of this run" in message.err, message
    assert "parameter groups" in message.err


def test_lr_and_momentum_are_the_same_in_both_groups():
    model = network()
    optimizer = NoisySGD(parameter_groups(resolve(DECAYING), model), "shb", 0.1, 0.9, 0.5, 0.3)
    optimizer.set_point(Point(0.01, 8, 0.5))
    assert [(g["lr"], g["momentum"]) for g in optimizer.param_groups] == [(0.01, 0.5)] * 2
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]
