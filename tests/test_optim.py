"""The five update forms against torch.optim.SGD, plain float64 loops and closed forms."""

import copy
import io
import math
import re

import pytest
import torch

from fastsmooth import optim
from fastsmooth.forms import FORMS
from fastsmooth.kernels import backend, update
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.03])
def test_nesterov_is_that_of_torch_and_goes_on_in_it(weight_decay, dtype):
    mine, theirs = parameters(dtype), parameters(dtype)
    ours = NoisySGD(mine, "nesterov", 0.1, 0.9, weight_decay=weight_decay)
    options = {"momentum": 0.9, "weight_decay": weight_decay, "nesterov": True}
    reference = torch.optim.SGD(theirs, lr=0.1, **options)
    error = 1e-6 if dtype == torch.float32 else 1e-14
    tolerance = {"rtol": error, "atol": error}
    for step, (lr, beta) in enumerate(CHANGING[:20]):
        ours.set_point(Point(lr, 1, beta))
        for group in reference.param_groups:
            group["lr"], group["momentum"] = lr, beta
        for params, optimizer in ((mine, ours), (theirs, reference)):
            set_grads(params, step, dtype)
            optimizer.step()
        for x, y in zip(mine, theirs, strict=True):
            torch.testing.assert_close(x, y, **tolerance)
    followed = torch.optim.SGD(mine, lr=0.5)  # to be overwritten by what it loads
    followed.load_state_dict(copy.deepcopy(ours.state_dict()))
    for params, optimizer in ((mine, followed), (theirs, reference)):
        set_grads(params, 20, dtype)
        optimizer.step()
    for x, y in zip(mine, theirs, strict=True):
        torch.testing.assert_close(x, y, **tolerance)


def test_nu_changes_in_place_with_the_point():
    params, beta = parameters(torch.float64), 0.9
    optimizer = NoisySGD(params, "qhm", 0.1, beta, nu=0.9)
    given = gradients(0, torch.float64)
    for nu in (None, 0.3, 0.7):
        optimizer.set_point(Point(0.1, 1, beta, nu))
        share = 1 - beta * (0.9 if nu is None else nu)
        for direction, g in zip(optimizer.directions(given), given, strict=True):
            torch.testing.assert_close(direction, share * g, rtol=1e-14, atol=0)
    set_grads(params, 0, torch.float64)
    before = copies(params)
    optimizer.step()
    for p, start, g in zip(params, before, given, strict=True):
        torch.testing.assert_close(p.detach(), start - 0.1 * (1 - beta * 0.7) * g)


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
                elif form == "nesterov":
                    memory[i] = b * memory[i] + slope
                    m = slope + b * memory[i]
                else:
                    memory[i] = b * memory[i] + (1 - b) * slope
                    m = (1 - nu) * slope + nu * memory[i]
                values[i] = x - eta * m
        ends.append(torch.tensor(values, dtype=dtype).reshape(start.shape))
    return ends


@pytest.mark.parametrize("weight_decay", [0.0, 0.03])
@pytest.mark.parametrize(
    "form, nu", [("sgd", 1.0), ("shb", 1.0), ("nshb", 1.0), ("qhm", 0.7), ("nesterov", 1.0)]
)
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
    share = {"sgd": 1.0, "shb": 1.0, "nshb": 1 - beta, "qhm": 1 - nu * beta}
    share = (share | {"nesterov": 1 + beta})[form]
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


@pytest.mark.parametrize("form", ["shb", "nshb", "qhm", "nesterov"])
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
        assert len(held) == (0 if form == "sgd" else len(params))

        found = optimizer.directions()
        given = optimizer.directions(copies(p.grad for p in params))
        assert equal(params, points) and equal([p.grad for p in params], grads)
        assert equal(buffers(optimizer, params), held)
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
    assert optimizer.directions() == [] and equal(params, parameters())
    assert optimizer.sq_norms is None and optimizer.partial_norms is None
    params[3].grad = gradients(0)[3]
    optimizer.step()
    start = parameters()
    assert [
        i for i, (p, q) in enumerate(zip(params, start, strict=True)) if not torch.equal(p, q)
    ] == [3]
    assert len(optimizer.directions()) == 1
    assert not any(m.any() for m in buffers(optimizer, params[:3] + params[4:]))
    torch.testing.assert_close(
        optimizer.sq_norms[0], params[3].grad.double().square().sum(), rtol=1e-6, atol=0
    )


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


# Memory that stays where it is


def addresses(tensors):
    return [t.data_ptr() for t in tensors]


@pytest.mark.parametrize("form", FORMS)
def test_buffers_are_made_with_the_optimizer_for_what_wants_a_gradient(form):
    params = parameters()
    params[1].requires_grad_(False)
    optimizer = NoisySGD(params[:4], form, 0.1, momentum_of(form))
    optimizer.add_param_group({"params": params[4:]})
    held = buffers(optimizer, params)
    assert len(held) == (0 if form == "sgd" else len(params) - 1) and params[1] not in (
        optimizer.state
    )
    assert not any(m.any() for m in held)
    places = addresses(held)
    for step in range(3):
        set_grads(params, step)
        params[1].grad = None
        optimizer.step()
    assert addresses(buffers(optimizer, params)) == places


def test_a_parameter_that_wants_a_gradient_later_is_moved_too():
    params = parameters()
    params[3].requires_grad_(False)
    optimizer, start = NoisySGD(params, "shb", 0.1, 0.9), copies(params)
    set_grads(params, 0)
    params[3].grad = None
    optimizer.step()
    assert torch.equal(params[3], start[3])
    params[3].requires_grad_()
    set_grads(params, 1)
    optimizer.step()
    expected = start[3] - torch.tensor(0.1) * gradients(1)[3]
    torch.testing.assert_close(params[3].detach(), expected, rtol=1e-6, atol=1e-7)


def test_a_loaded_state_lies_where_the_buffers_were_and_keeps_their_digits():
    """Those of bfloat16 parameters too, which torch would round."""

    def made(seed):
        params = [p.detach().bfloat16().requires_grad_() for p in parameters(seed=seed)]
        return params, NoisySGD(params, "shb", 0.1, 0.9)

    mine, first = made(0)
    for step in range(3):
        set_grads(mine, step, torch.bfloat16)
        first.step()
    theirs, second = made(1)
    places = addresses(buffers(second, theirs))
    set_grads(theirs, 7, torch.bfloat16)
    second.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert equal(buffers(second, theirs), buffers(first, mine))
    assert addresses(buffers(second, theirs)) == places
    empty = NoisySGD(theirs, "sgd", 0.1).state_dict()
    second.load_state_dict(empty)
    assert not any(m.any() for m in buffers(second, theirs))
    assert addresses(buffers(second, theirs)) == places


@pytest.mark.parametrize("steps", [0, 5])
def test_the_state_of_torch_sgd_goes_on_here_with_the_same_bits(steps):
    mine, theirs = parameters(), parameters()
    reference = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, weight_decay=0.01)
    for step in range(steps):
        set_grads(theirs, step)
        reference.step()
    with torch.no_grad():
        for p, q in zip(mine, theirs, strict=True):
            p.copy_(q)
    ours = NoisySGD(mine, "shb", 0.5, 0.1)
    ours.load_state_dict(copy.deepcopy(reference.state_dict()))
    for step in range(steps, steps + 5):
        set_grads(mine, step)
        set_grads(theirs, step)
        ours.step()
        reference.step()
        assert equal(mine, theirs), step


@pytest.mark.parametrize("change", [torch.nn.Module.double, torch.nn.Module.bfloat16,
                                    lambda m: m.to(memory_format=torch.channels_last)])  # fmt: skip
def test_the_momentum_follows_parameters_that_get_another_dtype_or_order(change):
    def after(model, optimizer, changes):
        for step in range(6):
            if step == 3:
                for each in changes:
                    each(model)
            for i, p in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(100 * step + i)
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            optimizer.step()
        return [p.detach().double() for p in model.parameters()]

    ends = []
    for ours in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 5, 3)
        if ours:
            optimizer = NoisySGD(model.parameters(), "shb", 0.01, 0.9)
            ends.append(after(model, optimizer, [change]))
        else:
            optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
            ends.append(after(model, optimizer, []))
    rounding = 0.02 if change is torch.nn.Module.bfloat16 else 1e-6
    for x, y in zip(*ends, strict=True):
        torch.testing.assert_close(x, y, rtol=rounding, atol=rounding)


def test_parameters_that_move_in_memory_are_still_those_that_step_moves():
    mine, theirs = parameters(), parameters()
    ours = NoisySGD(mine, "shb", 0.1, 0.9)
    reference = torch.optim.SGD(theirs, lr=0.1, momentum=0.9)
    kept = []
    for step in range(6):
        if step % 2:
            for p in mine:
                kept.append(p.data)
                p.data = p.data.clone()
        elif step == 4:  # back where they were
            for p, q in zip(mine, kept, strict=False):
                q.copy_(p.data)
                p.data = q
        set_grads(mine, step)
        set_grads(theirs, step)
        ours.step()
        reference.step()
        assert equal(mine, theirs), step


def test_the_momentum_is_the_one_that_moved_where_a_parameter_comes_back():
    """To the memory that it had, from another dtype."""
    p = torch.ones(40, requires_grad=True)
    optimizer, memory = NoisySGD([p], "shb", 0.25, 0.5), p.data
    expected, m = 1.0, 0.0
    for step in range(6):
        if step == 2:
            p.data = p.data.double()
        elif step == 4:
            memory.copy_(p.data)
            p.data = memory
        p.grad = torch.ones_like(p)
        optimizer.step()
        m = 0.5 * m + 1.0
        expected -= 0.25 * m
        assert (p == expected).all(), step


def test_a_step_over_some_of_the_parameters_leaves_the_others():
    """Whichever they are, in every order and more often than plans are kept."""
    mine, theirs = parameters(), parameters()
    ours = NoisySGD(mine, "shb", 0.1, 0.9)
    reference = torch.optim.SGD(theirs, lr=0.1, momentum=0.9)
    for step in range(40):
        for params in (mine, theirs):
            set_grads(params, step)
            for i, p in enumerate(params):
                if not (step * 37 + 11) >> i & 1:
                    p.grad = None
        ours.step()
        reference.step()
        assert equal(mine, theirs), step


@pytest.mark.parametrize("count", [1, 2, 6, 8, 9])
def test_what_was_planned_is_kept_for_some_choices_of_parameters(count, monkeypatch):
    """Those of late: more than so many in turn are planned at every step."""
    made = []
    plan = optim.Plan
    monkeypatch.setattr(optim, "Plan", lambda *given: made.append(given) or plan(*given))
    params = [torch.zeros(3, requires_grad=True) for _ in range(count)]
    optimizer = NoisySGD(params, "shb", 0.1, 0.9)
    for step in range(4 * count):
        for i, p in enumerate(params):
            p.grad = torch.ones_like(p) if i == step % count else None
        optimizer.step()
    assert len(made) == (count if count <= optim.WORKS else 4 * count)


# What a captured step needs


@pytest.fixture
def launches(monkeypatch):
    """The launches of the updates that are done, to be done again."""
    found = []
    for name, function in update.IMPLEMENTATIONS.items():

        def launch(*given, function=function):
            found.append(lambda: function(*given))
            function(*given)

        monkeypatch.setitem(update.IMPLEMENTATIONS, name, launch)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_a_step_that_is_launched_again_heeds_set_point_at_once(form, launches):
    """Nothing of lr and momentum lives in Python: one record goes through all points."""
    mine, theirs = parameters(), parameters()
    groups = [{"params": mine[:2], "weight_decay": 0.03}, {"params": mine[2:]}]
    others = [{"params": theirs[:2], "weight_decay": 0.03}, {"params": theirs[2:]}]
    recorded, ordinary = (NoisySGD(g, form, 0.1, momentum_of(form), 0.7) for g in (groups, others))
    grads = [torch.zeros_like(p) for p in mine]
    for step, (lr, beta) in enumerate(CHANGING):
        for optimizer in (recorded, ordinary):
            optimizer.set_point(Point(lr, 1, beta))
        for g, value in zip(grads, gradients(step), strict=True):
            g.copy_(value)
        if step == 0:
            for p, g in zip(mine, grads, strict=True):
                p.grad = g
            recorded.step()
            tape = list(launches)
            assert len(tape) == 2
        else:
            for again in tape:
                again()
        set_grads(theirs, step)
        ordinary.step()
        assert equal(mine, theirs), step
        assert torch.equal(recorded.sq_norms, ordinary.sq_norms)


def test_what_schedulers_write_into_the_groups_is_heeded_by_the_next_step():
    mine, theirs = parameters(), parameters()
    ours = NoisySGD(mine, "shb", 0.1, 0.9)
    reference = torch.optim.SGD(theirs, lr=0.1, momentum=0.9)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.7) for o in (ours, reference)]
    for step in range(5):
        set_grads(mine, step)
        set_grads(theirs, step)
        for optimizer, schedule in zip((ours, reference), schedules, strict=True):
            optimizer.step()
            schedule.step()
        assert equal(mine, theirs), step


def test_a_step_that_is_captured_is_settled_before_it_is_launched(monkeypatch):
    """While a graph is captured nothing runs and nothing can be copied, new coefficients either."""
    mine, theirs = parameters(), parameters()
    ours, ordinary = NoisySGD(mine, "shb", 0.1, 0.9), NoisySGD(theirs, "shb", 0.1, 0.9)
    for params, optimizer in ((mine, ours), (theirs, ordinary)):
        set_grads(params, 0)
        optimizer.step()
        set_grads(params, 1)
        optimizer.param_groups[0]["lr"] = 0.02
    tape = []
    with monkeypatch.context() as patch:
        patch.setattr(backend, "capturing", lambda device: True)
        for name, function in update.IMPLEMENTATIONS.items():
            patch.setitem(
                update.IMPLEMENTATIONS,
                name,
                lambda *given, function=function: tape.append((function, given)),
            )
        before = copies(mine)
        ours.step()
    assert equal(mine, before)
    ((function, given),) = tape
    (numbers,) = (x for x in given if isinstance(x, update.Rule))
    assert numbers.lr.item() == 0.1
    ours.settle()
    assert numbers.lr.item() == 0.02
    function(*given)
    ordinary.step()
    assert equal(mine, theirs) and torch.equal(ours.sq_norms, ordinary.sq_norms)


def test_norms_are_kept_in_parts_in_one_place_and_asked_for_as_a_sum_of_their_own():
    params = parameters()
    optimizer = NoisySGD([{"params": params[:2]}, {"params": params[2:]}], "shb", 0.1, 0.9)
    assert optimizer.sq_norms is None and optimizer.partial_norms is None
    set_grads(params, 0)
    optimizer.step()
    parts, first = optimizer.partial_norms, optimizer.sq_norms
    held = first.clone()
    assert parts.shape[1:] == (2,) and first.shape == (2,) and first.dtype == torch.float64
    assert torch.equal(parts.sum(dim=0), first)
    set_grads(params, 1)
    optimizer.step()
    assert optimizer.partial_norms is parts and torch.equal(first, held)
    assert not torch.equal(optimizer.sq_norms, held)
    before = optimizer.sq_norms
    with optimizer.kept():
        for step in range(3):
            set_grads(params, 7 + step)
            if step < 2:
                params[step].grad = None
            optimizer.step()
        assert not torch.equal(optimizer.sq_norms, before)
    assert optimizer.partial_norms is parts and torch.equal(optimizer.sq_norms, before)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_kept_goes_on_as_if_nothing_had_been(form, launches):
    """Parameters apart: lr and momentum are what they were where the kernels read them, too."""
    params = parameters()
    optimizer = NoisySGD(params, form, 0.1, momentum_of(form), 0.7)
    set_grads(params, 0)
    optimizer.step()
    (again,) = launches
    points, held = copies(params), copies(buffers(optimizer, params))
    places = addresses(buffers(optimizer, params))
    with optimizer.kept():
        optimizer.set_point(Point(3.0, 1, 0.1 if held else 0.0))
        for step in range(3):
            set_grads(params, 5 + step)
            optimizer.step()
    assert equal(buffers(optimizer, params), held)
    assert addresses(buffers(optimizer, params)) == places
    ends = []
    for way in (lambda: again(), optimizer.step):
        with torch.no_grad():
            for p, point in zip(params, points, strict=True):
                p.copy_(point)
            for m, value in zip(buffers(optimizer, params), held, strict=True):
                m.copy_(value)
        set_grads(params, 0)
        for p, g in zip(params, gradients(0), strict=True):
            p.grad = g
        way()
        ends.append(copies(params))
    assert equal(*ends)


# Along the mean of several gradients


def noisy_parts(params, K, ratio=1.0):
    generator = torch.Generator().manual_seed(K)

    def randn(p):
        return torch.randn(p.shape, generator=generator)

    means = [randn(p) for p in params]
    return [
        [(x + ratio * randn(p)).to(p.dtype) for x, p in zip(means, params, strict=True)]
        for _ in range(K)
    ]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("K, ratio", [(2, 1.0), (4, 1e-3), (8, 1e-6)])
def test_a_step_along_the_mean_moves_as_the_mean_would_and_knows_the_noise(form, K, ratio):
    """Over groups of their own lr, parameters of several dtypes, one of them frozen."""
    params = parameters()
    params[2:3] = [torch.randn(40, dtype=torch.float64).requires_grad_()]
    params[1].requires_grad_(False)
    wanted = [p for p in params if p.requires_grad]
    twins = [p.detach().double().clone().requires_grad_() for p in wanted]
    groups = [{"params": params[:4], "lr": 0.3, "weight_decay": 0.03}, {"params": params[4:]}]
    others = [{"params": twins[:3], "lr": 0.3, "weight_decay": 0.03}, {"params": twins[3:]}]
    ours, exact = (NoisySGD(g, form, 0.1, momentum_of(form), 0.7) for g in (groups, others))
    for _ in range(3):
        parts = noisy_parts(wanted, K, ratio)
        G = [torch.stack([part[i].double() for part in parts]) for i in range(len(wanted))]
        for q, g in zip(twins, G, strict=True):
            q.grad = g.mean(dim=0)
        exact.step()
        noise, squares = ours.step_along_mean(parts)
        deviations = sum((g - g.mean(dim=0)).square().flatten(1).sum(dim=1) for g in G)
        torch.testing.assert_close(noise, deviations, rtol=1e-6, atol=0)
        torch.testing.assert_close(
            squares, sum(g.square().flatten(1).sum(dim=1) for g in G), rtol=1e-6, atol=0
        )
        torch.testing.assert_close(ours.sq_norms, exact.sq_norms, rtol=1e-6, atol=0)
    for p, q in zip(wanted, twins, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in params)


def test_a_step_along_the_mean_shares_buffers_and_norms_with_an_ordinary_one():
    mine, theirs = parameters(), parameters()
    ours, ordinary = NoisySGD(mine, "shb", 0.1, 0.9), NoisySGD(theirs, "shb", 0.1, 0.9)
    places = addresses(buffers(ours, mine))
    for step in range(4):
        set_grads(theirs, step)
        ordinary.step()
        if step % 2:
            set_grads(mine, step)
            ours.step()
        else:
            ours.step_along_mean([gradients(step), gradients(step)])
        if step == 0:
            parts = ours.partial_norms
        assert equal(mine, theirs) and ours.partial_norms is parts, step
    assert addresses(buffers(ours, mine)) == places


def test_a_step_along_the_mean_refuses_what_does_not_fit():
    params = parameters()
    optimizer = NoisySGD(params, "shb", 0.1, 0.9)
    whole = gradients(0)
    for parts, words in [
        ([whole], "1 gradients a parameter"),
        ([], "0 gradients a parameter"),
        ([whole] * 9, "9 gradients a parameter"),
        ([whole, whole[:-1]], f"{len(whole)} and {len(whole) - 1} gradients"),
        ([whole, [*whole[:-1], torch.zeros(3)]], r"\[3\]"),
    ]:
        with pytest.raises(ValueError, match=words):
            optimizer.step_along_mean(parts)
    assert equal(params, parameters()) and optimizer.sq_norms is None


# Noise at a frozen iterate


@pytest.mark.parametrize("beta", [0.5, 0.9])
@pytest.mark.parametrize(
    "form, nu",
    [("sgd", 1.0), ("shb", 1.0), ("nshb", 1.0), ("qhm", 0.3), ("qhm", 0.7), ("nesterov", 1.0)],
)
def test_search_direction_noise_at_a_frozen_iterate_has_its_closed_form(form, nu, beta):
    """E||m_t - G||^2 over independent coordinates with gradient G and noise of variance s^2."""
    coordinates, s, full = 30_000, 1.5, 0.8
    square = {
        "sgd": s**2,
        "nshb": s**2 * (1 - beta) / (1 + beta),
        "qhm": s**2 * ((1 - nu * beta) ** 2 + nu**2 * beta**2 * (1 - beta) / (1 + beta)),
        "shb": s**2 / (1 - beta**2) + (beta / (1 - beta)) ** 2 * full**2,
        "nesterov": s**2 * ((1 + beta) ** 2 + beta**4 / (1 - beta**2))
        + (beta / (1 - beta)) ** 2 * full**2,
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
