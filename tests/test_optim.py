"""The four update forms against torch.optim.SGD, plain float64 loops and closed forms."""

import copy
import io
import math
import re

import pytest
import torch

from fastsmooth.forms import FORMS
from fastsmooth.optim import NoisySGD
from fastsmooth.schedule import Point

SHAPES = [(3, 5, 7), (1,), (), (129,), (0, 4), (33, 17)]  # odd sizes, size one, no axis, nothing
CHANGING = [(0.1 / (1 + t), 0.9 - 0.02 * t) for t in range(30)]  # lr and momentum of every step
EPS32 = torch.finfo(torch.float32).eps


def parameters(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in SHAPES]


def gradients(step, dtype=torch.float32):
    """The same numbers for every optimizer that is at this step."""
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(s, generator=generator, dtype=dtype) for s in SHAPES]


def momentum_of(form, beta=0.9):
    """sgd takes none."""
    return beta if FORMS[form].has_buffer else 0.0


def set_grads(params, step, dtype=torch.float32):
    for p, g in zip(params, gradients(step, dtype), strict=True):
        p.grad = g


def equal(xs, ys):
    return all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def copies(tensors):
    return [t.detach().clone() for t in tensors]


def buffers(optimizer, params):
    return [optimizer.state[p]["momentum_buffer"] for p in params if p in optimizer.state]


# Torch.optim.SGD


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.03])
@pytest.mark.parametrize("form", ["sgd", "shb"])
def test_sgd_and_shb_have_the_bits_of_torch(form, weight_decay, foreach):
    mine, theirs = parameters(), parameters()
    ours = NoisySGD(mine, form, 0.1, momentum_of(form), weight_decay=weight_decay)
    reference = torch.optim.SGD(
        theirs,
        lr=0.1,
        momentum=0.9 if form == "shb" else 0.0,
        weight_decay=weight_decay,
        foreach=foreach,
    )
    for step, (lr, beta) in enumerate(CHANGING):
        ours.set_point(Point(lr, 1, beta))
        for group in reference.param_groups:
            group["lr"] = lr
            group["momentum"] = beta if form == "shb" else 0.0
        set_grads(mine, step)
        set_grads(theirs, step)
        ours.step()
        reference.step()
        assert equal(mine, theirs), step
    assert not equal(mine, parameters())
    if form == "shb":
        assert equal(buffers(ours, mine), buffers(reference, theirs))


def test_shb_state_goes_on_in_torch_sgd_with_the_same_bits():
    mine, theirs = parameters(), parameters()
    ours = NoisySGD(mine, "shb", 0.1, 0.9, weight_decay=0.01)
    for step in range(5):
        set_grads(mine, step)
        ours.step()
    with torch.no_grad():
        for p, q in zip(theirs, mine, strict=True):
            p.copy_(q)
    reference = torch.optim.SGD(theirs, lr=0.5, momentum=0.1)  # to be overwritten by what it loads
    reference.load_state_dict(copy.deepcopy(ours.state_dict()))
    for step in range(5, 12):
        set_grads(mine, step)
        set_grads(theirs, step)
        ours.step()
        reference.step()
        assert equal(mine, theirs), step


# The definitions


def plain_run(form, steps, lr, beta, nu, weight_decay, dtype=torch.float64):
    """The update rule one number at a time: parameters after `steps`, with lr and beta functions of
    the step."""
    ends = []
    for number, start in enumerate(parameters(dtype)):
        values = start.detach().flatten().tolist()
        memory = [0.0] * len(values)
        for step in range(steps):
            g = gradients(step, dtype)[number].flatten().tolist()
            eta, b = lr(step), beta(step)
            for i, x in enumerate(values):
                slope = g[i] + weight_decay * x
                if form == "sgd":
                    m = slope
                elif form == "shb":
                    m = memory[i] = b * memory[i] + slope
                elif form == "nshb":
                    m = memory[i] = b * memory[i] + (1 - b) * slope
                else:
                    memory[i] = b * memory[i] + (1 - b) * slope
                    m = (1 - nu) * slope + nu * memory[i]
                values[i] = x - eta * m
        ends.append(torch.tensor(values, dtype=dtype).reshape(start.shape))
    return ends


@pytest.mark.parametrize("weight_decay", [0.0, 0.03])
@pytest.mark.parametrize("form, nu", [("sgd", 1.0), ("shb", 1.0), ("nshb", 1.0), ("qhm", 0.7)])
def test_every_form_follows_its_definition(form, nu, weight_decay):
    params = parameters(torch.float64)
    optimizer = NoisySGD(params, form, 0.1, momentum_of(form), nu, weight_decay)
    for step, (lr, beta) in enumerate(CHANGING[:12]):
        optimizer.set_point(Point(lr, 1, beta))
        set_grads(params, step, torch.float64)
        optimizer.step()
    expected = plain_run(
        form,
        12,
        lambda t: CHANGING[t][0],
        lambda t: CHANGING[t][1],
        nu,
        weight_decay,
        torch.float64,
    )
    for mine, value in zip(params, expected, strict=True):
        torch.testing.assert_close(mine.detach(), value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_the_first_direction_comes_from_a_zero_buffer(form):
    params, nu, beta = parameters(torch.float64), 0.7, 0.9
    optimizer = NoisySGD(params, form, 0.1, momentum_of(form, beta), nu)
    share = {"sgd": 1.0, "shb": 1.0, "nshb": 1 - beta, "qhm": 1 - nu * beta}[form]
    given = gradients(0, torch.float64)
    for direction, g in zip(optimizer.directions(given), given, strict=True):
        torch.testing.assert_close(direction, share * g, rtol=1e-14, atol=0)


def finish(form, lr, beta, nu=1.0, steps=40):
    params = parameters(torch.float64)
    optimizer = NoisySGD(params, form, lr, momentum_of(form, beta), nu)
    for step in range(steps):
        set_grads(params, step, torch.float64)
        optimizer.step()
    return params


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99])
def test_shb_is_nshb_at_a_learning_rate_divided_by_one_minus_beta(beta):
    for x, y in zip(
        finish("shb", 0.01, beta), finish("nshb", 0.01 / (1 - beta), beta), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_qhm_is_sgd_at_nu_zero_and_nshb_at_nu_one():
    for nu, form in [(0.0, "sgd"), (1.0, "nshb")]:
        for x, y in zip(finish("qhm", 0.1, 0.9, nu), finish(form, 0.1, 0.9), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)
    assert not equal(finish("qhm", 0.1, 0.9, 0.5), finish("nshb", 0.1, 0.9))


@pytest.mark.parametrize("form", ["shb", "nshb", "qhm"])
def test_without_momentum_every_form_is_sgd(form):
    for x, y in zip(finish(form, 0.1, 0.0, 0.7), finish("sgd", 0.1, 0.0), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


# Changing the point


@pytest.mark.parametrize("form", FORMS)
def test_set_point_keeps_the_buffers(form):
    params = parameters()
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = NoisySGD(groups, form, 0.1, momentum_of(form))
    set_grads(params, 0)
    optimizer.step()
    held = buffers(optimizer, params)
    before = copies(held)
    assert len(held) == (0 if form == "sgd" else len(params))
    optimizer.set_point(Point(0.01, 32, 0.5))
    assert [(g["lr"], g["momentum"]) for g in optimizer.param_groups] == [(0.01, 0.5)] * 2
    assert equal(buffers(optimizer, params), before)
    assert all(now is then for now, then in zip(buffers(optimizer, params), held, strict=True))


@pytest.mark.parametrize("weight_decay", [0.0, 0.03])
@pytest.mark.parametrize("form", FORMS)
def test_directions_are_what_step_applies_and_change_nothing(form, weight_decay):
    params = parameters()
    optimizer = NoisySGD(params, form, 0.1, momentum_of(form), 0.7, weight_decay)
    for step, (lr, beta) in enumerate(CHANGING[:5]):
        optimizer.set_point(Point(lr, 1, beta))
        set_grads(params, step)
        points, grads = copies(params), copies(p.grad for p in params)
        held = copies(buffers(optimizer, params))
        assert len(held) == (0 if step == 0 or form == "sgd" else len(params))

        found = optimizer.directions()
        given = optimizer.directions(copies(p.grad for p in params))
        assert equal(params, points) and equal([p.grad for p in params], grads)
        assert equal(buffers(optimizer, params), held)
        assert len(optimizer.state) == len(held)  # no buffer was made either
        assert equal(found, given)
        assert not {t.data_ptr() for t in found if t.numel()} & {
            t.data_ptr()
            for t in [*params, *(p.grad for p in params), *buffers(optimizer, params)]
            if t.numel()
        }

        optimizer.step()
        assert equal(params, [x.add(m, alpha=-lr) for x, m in zip(points, found, strict=True)]), (
            step
        )
        assert equal([p.grad for p in params], grads)


def test_directions_take_other_gradients_than_those_of_the_parameters():
    params = parameters(torch.float64)
    optimizer = NoisySGD(params, "shb", 0.1, 0.5)
    set_grads(params, 0, torch.float64)
    optimizer.step()
    for p in params:
        p.grad = None
    found = optimizer.directions(gradients(7, torch.float64))
    expected = [
        0.5 * a + b
        for a, b in zip(gradients(0, torch.float64), gradients(7, torch.float64), strict=True)
    ]
    for mine, value in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, value, rtol=1e-14, atol=1e-15)
    assert all(p.grad is None for p in params)


def test_directions_pass_over_frozen_parameters():
    params = parameters()
    params[1].requires_grad_(False)
    optimizer = NoisySGD(params, "sgd", lr=0.1)
    given = [torch.full_like(p, i) for i, p in enumerate(params) if p.requires_grad]
    assert equal(optimizer.directions(given), given)


def test_directions_keep_the_order_of_all_groups():
    params = parameters()
    optimizer = NoisySGD([{"params": params[3:]}, {"params": params[:3]}], "sgd", 0.1)
    set_grads(params, 0)
    assert equal(optimizer.directions(), [p.grad for p in [*params[3:], *params[:3]]])


@pytest.mark.parametrize("form", FORMS)
def test_parameters_without_a_gradient_stay_as_they_are(form):
    params = parameters()
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = NoisySGD(groups, form, 0.1, momentum_of(form))
    optimizer.step()
    assert optimizer.directions() == [] and equal(params, parameters()) and not optimizer.state
    params[3].grad = gradients(0)[3]
    optimizer.step()
    start = parameters()
    assert [
        i for i, (p, q) in enumerate(zip(params, start, strict=True)) if not torch.equal(p, q)
    ] == [3]
    assert len(optimizer.directions()) == 1


def test_step_returns_the_loss_of_its_closure():
    p = torch.tensor([2.0], requires_grad=True)
    optimizer = NoisySGD([p], "sgd", 0.25)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4
    assert p.item() == 1


# Groups, norms, dtypes


@pytest.mark.parametrize("form", FORMS)
def test_sq_norms_are_those_of_the_gradient_and_the_direction_over_all_groups(form):
    params = parameters()
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = NoisySGD(groups, form, 0.1, momentum_of(form), 0.7, 0.05)
    for step in range(3):
        set_grads(params, step)
        directions = optimizer.directions()
        optimizer.step()
        expected = [
            sum(t.double().square().sum() for t in ts) for ts in (gradients(step), directions)
        ]
        torch.testing.assert_close(optimizer.sq_norms, torch.stack(expected), rtol=1e-6, atol=0)


def test_groups_keep_their_own_learning_rates():
    p, q = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    optimizer = NoisySGD([{"params": [p], "lr": 0.5}, {"params": [q], "lr": 0.25}], "sgd", 0.1)
    p.grad, q.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    assert p.tolist() == [-0.5] * 3 and q.tolist() == [-0.25] * 3
    optimizer.param_groups[1]["lr"] = 1.0
    optimizer.step()
    assert p.tolist() == [-1.0] * 3 and q.tolist() == [-1.25] * 3


def test_bfloat16_parameters_have_float32_momentum_that_small_gradients_move():
    p = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    optimizer = NoisySGD([p], "shb", 1e-3, 0.9)
    for _ in range(40):
        p.grad = torch.full_like(p, 2**-7)
        optimizer.step()
    (held,) = buffers(optimizer, [p])
    assert held.dtype == torch.float32
    torch.testing.assert_close(
        held, torch.full((3,), 2**-7 * (1 - 0.9**40) / 0.1), rtol=1e-6, atol=0
    )


# State


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_state_goes_on_with_the_same_bits(form):
    mine = parameters()
    first = NoisySGD(mine, form, 0.1, momentum_of(form), 0.7, 0.01)
    for step in range(5):
        set_grads(mine, step)
        first.step()
    first.set_point(Point(0.05, 32, 0.8))
    file = io.BytesIO()
    torch.save({"optimizer": first.state_dict(), "params": copies(mine)}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    theirs = [p.requires_grad_() for p in saved["params"]]
    second = NoisySGD(theirs, form, 0.9, momentum_of(form, 0.1), 0.2, 0.0)
    second.load_state_dict(saved["optimizer"])
    assert second.param_groups[0]["lr"] == 0.05 and second.param_groups[0]["nu"] == 0.7
    assert len(buffers(second, theirs)) == (0 if form == "sgd" else len(theirs))
    for step in range(5, 12):
        set_grads(mine, step)
        set_grads(theirs, step)
        first.step()
        second.step()
        assert equal(mine, theirs), step


@pytest.mark.parametrize(
    "wrong",
    [{"form": "adam"}, {"lr": -0.1}, {"lr": math.nan}, {"momentum": 1.0}, {"momentum": -0.1},
    {"nu": 1.1}, {"form": "sgd", "momentum": 0.9}, {"nu": -0.1}, {"weight_decay": -1.0}],
)  # fmt: skip
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError):
        NoisySGD(parameters(), **({"form": "qhm", "lr": 0.1} | wrong))


@pytest.mark.parametrize(
    "form, meant", [("sgdm", "calls it shb"), ("nsbh", "did you mean nshb?"), ("x", "choose from")]
)
def test_an_unknown_form_is_refused_with_what_may_have_been_meant(form, meant):
    with pytest.raises(ValueError, match=re.escape(f"form '{form}'") + ".*" + re.escape(meant)):
        NoisySGD(parameters(), form, 0.1)


# Noise at a frozen iterate


@pytest.mark.parametrize("beta", [0.5, 0.9])
@pytest.mark.parametrize(
    "form, nu", [("sgd", 1.0), ("shb", 1.0), ("nshb", 1.0), ("qhm", 0.3), ("qhm", 0.7)]
)
def test_search_direction_noise_at_a_frozen_iterate_has_its_closed_form(form, nu, beta):
    """E||m_t - G||^2 over independent coordinates with gradient G and noise of variance s^2."""
    coordinates, s, full = 30_000, 1.5, 0.8
    square = {
        "sgd": s**2,
        "nshb": s**2 * (1 - beta) / (1 + beta),
        "qhm": s**2 * ((1 - nu * beta) ** 2 + nu**2 * beta**2 * (1 - beta) / (1 + beta)),
        "shb": s**2 / (1 - beta**2) + (beta / (1 - beta)) ** 2 * full**2,
    }[form]
    generator = torch.Generator().manual_seed(3)
    x = torch.zeros(coordinates, dtype=torch.float64, requires_grad=True)
    optimizer = NoisySGD([x], form, 0.0, momentum_of(form, beta), nu)  # lr 0 freezes the iterate

    def noisy():
        return full + s * torch.randn(coordinates, generator=generator, dtype=torch.float64)

    for _ in range(20 if beta == 0.5 else 150):  # the start is forgotten to beta^150 = 1e-7
        x.grad = noisy()
        optimizer.step()
    (direction,) = optimizer.directions([noisy()])
    omega_squared = (direction - full) ** 2
    standard_error = omega_squared.std().item() / math.sqrt(coordinates)
    assert not x.any()
    assert standard_error < 0.01 * square
    assert abs(omega_squared.mean().item() - square) < 4 * standard_error
