"""Every kernel in each of its implementations against float64: Triton (interpreted where there is
no GPU), C++, PyTorch.

A result may be at most twice as far from float64 as plain PyTorch in the kernel's own precision, or
two roundings.
"""

import weakref

import pytest
import torch
from implementations import DEVICE, every_implementation, needs_cxx

from fastsmooth.kernels import backend, native, persample_noise, update
from fastsmooth.kernels.update import Rule

LR, BETA, NU = 0.1, 0.9, 0.7
FORMS = ("sgd", "shb", "nshb", "qhm")  # by the definitions in the papers; the kernels know no name
SHAPES = [(3, 5, 7), (1,), (), (129,), (0, 4), (8192,), (8193,), (20001,), (1023,), (64, 3, 3, 3)]
DTYPES = [torch.float32, torch.bfloat16]

pytestmark = pytest.mark.usefixtures("poisoned_memory")
every_form = pytest.mark.parametrize("form", FORMS)


def rule(form, beta=BETA, decay=0.0, device=DEVICE):
    """(the coefficients of a form, whether its direction is mixed), for a kernel."""
    alpha = 1.0 if form == "shb" else 1 - beta
    fresh, kept = {"sgd": (1.0, 0.0), "qhm": (1 - NU, NU)}.get(form, (0.0, 1.0))
    numbers = (LR, beta, alpha, fresh, kept, decay)
    return Rule(*(backend.scalar(value, device) for value in numbers)), form == "qhm"


def operands(form):
    """The same as the registered operators take it."""
    found, mixed = rule(form)
    return list(found), mixed


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def definition(form, p, g, m, decay):
    """(p, m, direction) after a step, in float64, by the definitions in the papers."""
    p, g = p.double(), g.double()
    u = g + decay * p
    if form == "sgd":
        return p - LR * u, None, u
    m = BETA * m.double() + (u if form == "shb" else (1 - BETA) * u)
    direction = (1 - NU) * u + NU * m if form == "qhm" else m
    return p - LR * direction, m, direction


def distance(found, exact):
    """The largest error relative to the largest value."""
    if not exact.numel():
        return 0.0
    return ((found.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-300)).item()


def assert_as_exact_as_torch(found, exact, plain):
    """`plain` is PyTorch's own result in the precision of `found`."""
    roundings = torch.finfo(found.dtype if found.dtype == torch.bfloat16 else torch.float32).eps
    assert found.isfinite().all()
    assert distance(found, exact) <= max(2 * distance(plain, exact), roundings)


# Update


def tensors(dtype=torch.float32, form="shb", shapes=SHAPES):
    params = [randn(*s, dtype=dtype, seed=i) for i, s in enumerate(shapes)]
    grads = [randn(*s, dtype=dtype, seed=100 + i) for i, s in enumerate(shapes)]
    buffers = [
        randn(*s, dtype=backend.buffer_dtype(dtype), seed=200 + i) for i, s in enumerate(shapes)
    ]
    return params, grads, buffers if form != "sgd" else []


def copies(ts):
    return [t.clone() for t in ts]


def stepped(implementation, params, grads, buffers, numbers, mixed):
    """A step in place; its sums [2]."""
    return update.Plan(params, buffers, mixed, implementation)(grads, numbers).sum(dim=0)


def moved(implementation, form, params, grads, buffers, decay=0.0):
    params, buffers = copies(params), copies(buffers)
    squares = stepped(implementation, params, grads, buffers, *rule(form, decay=decay))
    return params, buffers, squares


@every_form
@every_implementation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", [0.0, 0.03])
def test_update_follows_the_definition(implementation, form, dtype, decay):
    params, grads, buffers = tensors(dtype, form)
    after, momenta, squares = moved(implementation, form, params, grads, buffers, decay)
    plain = moved("reference", form, params, grads, buffers, decay)
    totals = torch.zeros(2, dtype=torch.float64)
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        exact_p, exact_m, direction = definition(form, p, g, buffers[i] if buffers else None, decay)
        assert_as_exact_as_torch(after[i], exact_p, plain[0][i])
        if form != "sgd":
            assert_as_exact_as_torch(momenta[i], exact_m, plain[1][i])
        totals += torch.stack([g.double().square().sum(), direction.square().sum()]).cpu()
    torch.testing.assert_close(squares.cpu(), totals, rtol=1e-6, atol=0)


@every_form
@every_implementation
def test_update_without_momentum_is_plain_descent(implementation, form):
    p, g, m = randn(3000), randn(3000, seed=1), torch.full((3000,), 5.0, device=DEVICE)
    expected = p.double() - LR * g.double()
    buffers = [m] if form != "sgd" else []
    stepped(implementation, [p], [g], buffers, *rule(form, beta=0.0))
    assert distance(p, expected) < 1e-6


@every_form
@every_implementation
def test_update_takes_float64(implementation, form):
    params, grads, buffers = tensors(torch.float64, form)
    after, momenta, _ = moved(implementation, form, params, grads, buffers, 0.03)
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        exact_p, exact_m, _ = definition(form, p, g, buffers[i] if buffers else None, 0.03)
        assert distance(after[i], exact_p) < 1e-15
        if form != "sgd":
            assert distance(momenta[i], exact_m) < 1e-15


@every_form
@needs_cxx
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_cxx_has_the_bits_of_plain_pytorch(form, dtype):
    """Every rounding the same, to bfloat16 too."""
    given = tensors(dtype, form)
    found, plain = (moved(name, form, *given, 0.03) for name in ("native", "reference"))
    for x, y in zip(found[0] + found[1], plain[0] + plain[1], strict=True):
        assert torch.equal(x, y)


@every_implementation
@pytest.mark.parametrize("offset", [0, 1])
def test_update_stays_inside_its_tensors(implementation, offset):
    """Parameters, gradient and momentum in the middle of larger memory, aligned to 16 bytes and
    not."""
    size = 8193
    memory = [torch.full((16 + size + 16,), 7.0, device=DEVICE) for _ in range(3)]
    p, g, m = (x[16 + offset : 16 + offset + size] for x in memory)
    for x, seed in zip((p, g, m), (1, 2, 3), strict=True):
        x.copy_(randn(size, seed=seed))
    before = memory[1].clone()
    exact_p, _, _ = definition("shb", p.clone(), g.clone(), m.clone(), 0.0)
    stepped(implementation, [p], [g], [m], *rule("shb"))
    assert distance(p, exact_p) < 1e-6
    assert torch.equal(memory[1], before)
    for x in (memory[0], memory[2]):
        assert (x[: 16 + offset] == 7).all() and (x[16 + offset + size :] == 7).all()


@every_implementation
@every_form
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_update_passes_on_what_is_not_finite_and_nothing_else(implementation, form, bad):
    params, grads, buffers = tensors(torch.float32, form, [(2000,), (5,)])
    grads[0][1234] = bad
    after, momenta, squares = moved(implementation, form, params, grads, buffers)
    for found in [after[0], *momenta[:1]]:
        assert not found[1234].isfinite()
        assert found.isfinite().sum() == 1999
    assert after[1].isfinite().all()
    assert not squares.isfinite().any()


@every_implementation
@every_form
def test_update_repeats_its_bits(implementation, form):
    given = tensors(torch.float32, form)
    first, second = moved(implementation, form, *given), moved(implementation, form, *given)
    assert torch.equal(first[2], second[2])
    assert all(
        torch.equal(x, y) for x, y in zip(first[0] + first[1], second[0] + second[1], strict=True)
    )


def at_threads(count, function):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


@needs_cxx
def test_the_number_of_threads_changes_no_bit():
    given = tensors(shapes=[(300_000,), (70_001,)])
    G, p, m = randn(5, 30_001), randn(30_001, seed=1), randn(30_001, seed=2)

    def both():
        params, buffers, squares = moved("native", "shb", *given)
        x, v = p.clone(), m.clone()
        return [
            *params,
            *buffers,
            squares,
            x,
            v,
            *persample_noise.persample_noise(G, x, v, *rule("qhm")),
        ]

    for found, expected in zip(at_threads(3, both), at_threads(1, both), strict=True):
        assert torch.equal(found, expected)


def test_update_serves_each_dtype_and_each_order_of_memory():
    p = randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    # the gradient's values are in another order
    g, m = randn(8, 4, 3, 3, seed=1), torch.zeros_like(p)
    q, h, n = (
        randn(33, dtype=torch.bfloat16, seed=2),
        randn(33, dtype=torch.bfloat16, seed=3),
        randn(33, seed=4),
    )
    exact = [definition("shb", *given, 0.0)[0] for given in ((p, g, m), (q, h, n))]
    squares = update.update([p, q], [g, h], [m, n], *rule("shb"))
    assert distance(p, exact[0]) < 1e-6 and distance(q, exact[1]) < 0.01
    torch.testing.assert_close(
        squares[0], g.double().square().sum() + h.double().square().sum(), rtol=1e-6, atol=0
    )


def test_update_refuses_what_does_not_fit():
    p, g, m = randn(4), randn(4), randn(4)
    gaps = torch.zeros(4, 2, device=DEVICE)[:, 0]
    for params, grads, buffers, form, words in [
        ([], [], [], "sgd", "0 parameters"),
        ([p], [g, g], [m], "shb", "2 gradients"),
        ([p, p], [g, g], [m], "shb", "1 buffers"),
        ([p], [g], [], "qhm", "needs buffers"),
        ([p], [randn(5)], [m], "shb", r"\[5\]"),
        ([p], [g], [randn(3)], "shb", r"\[3\]"),
        ([p], [g.double()], [m], "shb", "float64"),
        ([p], [g], [m.bfloat16()], "shb", "bfloat16"),
        ([gaps], [g], [m], "shb", "dense"),
    ]:
        with pytest.raises(ValueError, match=words):
            update.update(params, grads, buffers, *rule(form))


# Along the mean of K gradients


def gradients_of_parts(K, dtype=torch.float32, shapes=SHAPES, ratio=1.0):
    """K lists of gradients, whose noise is `ratio` times their mean."""
    means = [randn(*s, seed=100 + i).double() for i, s in enumerate(shapes)]
    return [
        [
            (x + ratio * randn(*x.shape, seed=300 + 50 * k + i)).to(dtype)
            for i, x in enumerate(means)
        ]
        for k in range(K)
    ]


def along_mean(implementation, form, params, parts, buffers, decay=0.0):
    """(params, buffers, sums [2], noise, squares) after a step."""
    params, buffers = copies(params), copies(buffers)
    numbers, mixed = rule(form, decay=decay)
    plan = update.Plan(params, buffers, mixed, implementation)
    sums, *measured = plan.along_mean(parts, numbers)
    return params, buffers, sums.sum(dim=0), *measured


def check_parts(implementation, form, params, parts, buffers, decay, tolerance=1e-6):
    """Parameters and momentum as exact as plain PyTorch, all sums over them to `tolerance`."""
    after, momenta, *found = along_mean(implementation, form, params, parts, buffers, decay)
    totals = [0.0, 0.0, 0.0]
    for i, p in enumerate(params):
        G = torch.stack([part[i].flatten() for part in parts])
        m = buffers[i].flatten() if buffers else None
        exact, plain = (f(form, G, p.flatten(), m, decay) for f in (exact_noise, plain_noise))
        assert_as_exact_as_torch(after[i].flatten(), exact[0], plain[0])
        if buffers:
            assert_as_exact_as_torch(momenta[i].flatten(), exact[1], plain[1])
        noise, squares, sums = exact[2]
        totals = [t + x for t, x in zip(totals, (sums[:2], noise, squares), strict=True)]
    for x, exact in zip(found, totals, strict=True):
        assert x.dtype == torch.float64
        torch.testing.assert_close(x, exact, rtol=tolerance, atol=0)


def leave_to_full(request: pytest.FixtureRequest, slow: bool) -> None:
    """Skip a case that takes Triton's interpreter seconds, and others of its kind stand for."""
    if slow and not request.config.getoption("--full"):
        pytest.skip("with --full")


@every_form
@every_implementation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [2, 4, 8])
def test_a_step_along_the_mean_of_parts_follows_the_definition(
    implementation, form, dtype, K, request
):
    leave_to_full(request, K > 2 and implementation == "triton" and form not in ("shb", "qhm"))
    params, _, buffers = tensors(dtype, form)
    check_parts(implementation, form, params, gradients_of_parts(K, dtype), buffers, 0.03)


@every_implementation
@pytest.mark.parametrize("K", [3, 5, 6, 7])
def test_any_number_of_parts_up_to_eight_will_do(implementation, K):
    params, _, buffers = tensors(shapes=[(8193,), (7,)])
    parts = gradients_of_parts(K, shapes=[(8193,), (7,)])
    check_parts(implementation, "shb", params, parts, buffers, 0.0)


@every_implementation
@pytest.mark.parametrize("K", [2, 4, 8])
@pytest.mark.parametrize("ratio", [1e-3, 1e-6])
def test_parts_that_hardly_differ_keep_the_digits_of_their_noise(implementation, K, ratio):
    """Float32 holds eight steps of a noise a millionth of the mean: of squares less the square of
    the mean nothing would be right."""
    params, _, buffers = tensors(shapes=[(5000,), (3,)])
    parts = gradients_of_parts(K, shapes=[(5000,), (3,)], ratio=ratio)
    check_parts(implementation, "shb", params, parts, buffers, 0.0)


@every_form
@every_implementation
@pytest.mark.parametrize("K", [2, 8])
def test_parts_may_be_float64(implementation, form, K, request):
    leave_to_full(request, K > 2 and implementation == "triton" and form != "qhm")
    params, _, buffers = tensors(torch.float64, form)
    parts = gradients_of_parts(K, torch.float64)
    after, momenta, _, noise, squares = along_mean(
        implementation, form, params, parts, buffers, 0.03
    )
    exact_norms = [0.0, 0.0]
    for i, p in enumerate(params):
        G = torch.stack([part[i].flatten() for part in parts])
        m = buffers[i].flatten() if buffers else None
        exact_p, exact_m, (exact_n, exact_s, _) = exact_noise(form, G, p.flatten(), m, 0.03)
        assert distance(after[i].flatten(), exact_p) < 1e-14
        if buffers:
            assert distance(momenta[i].flatten(), exact_m) < 1e-14
        exact_norms = [exact_norms[0] + exact_n, exact_norms[1] + exact_s]
    for x, exact in zip((noise, squares), exact_norms, strict=True):
        torch.testing.assert_close(x, exact, rtol=1e-12, atol=0)


@every_implementation
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("K", [2, 8])
def test_a_step_along_the_mean_stays_inside_its_tensors(implementation, offset, K):
    size = 8193
    memory = [torch.full((16 + size + 16,), 7.0, device=DEVICE) for _ in range(2 + K)]
    p, m, *gs = (x[16 + offset : 16 + offset + size] for x in memory)
    for x, seed in zip((p, m, *gs), range(2 + K), strict=True):
        x.copy_(randn(size, seed=seed))
    before = copies(memory[2:])
    exact_p, exact_m, exact = exact_noise("shb", torch.stack(gs), p.clone(), m.clone(), 0.0)
    numbers, mixed = rule("shb")
    plan = update.Plan([p], [m], mixed, implementation)
    _, noise, _ = plan.along_mean([[g] for g in gs], numbers)
    assert distance(p, exact_p) < 1e-6 and distance(m, exact_m) < 1e-6
    torch.testing.assert_close(noise, exact[0], rtol=1e-6, atol=0)
    assert all(torch.equal(x, y) for x, y in zip(memory[2:], before, strict=True))
    for x in memory[:2]:
        assert (x[: 16 + offset] == 7).all() and (x[16 + offset + size :] == 7).all()


@every_implementation
@every_form
def test_equal_parts_make_the_step_of_one_gradient_and_no_noise(implementation, form):
    params, grads, buffers = tensors(form=form)
    one = moved(implementation, form, params, grads, buffers, 0.03)
    after, momenta, sums, noise, squares = along_mean(
        implementation, form, params, [grads] * 4, buffers, 0.03
    )
    for x, y in zip(after + momenta, one[0] + one[1], strict=True):
        assert torch.equal(x, y)
    assert not noise.any() and (squares == squares[0]).all()
    torch.testing.assert_close(sums, one[2], rtol=1e-7, atol=0)


@every_implementation
def test_a_part_that_is_not_finite_spoils_its_place_and_the_sums_alone(implementation):
    params, _, buffers = tensors(shapes=[(2000,), (5,)])
    parts = gradients_of_parts(4, shapes=[(2000,), (5,)])
    parts[2][0][1234] = float("inf")
    after, momenta, sums, noise, squares = along_mean(implementation, "shb", params, parts, buffers)
    for found in (after[0], momenta[0]):
        assert not found[1234].isfinite() and found.isfinite().sum() == 1999
    assert after[1].isfinite().all()
    assert not sums.isfinite().any() and not noise.isfinite().any()
    assert [k for k in range(4) if not squares[k].isfinite()] == [2]


@every_implementation
@pytest.mark.parametrize("K", [2, 8])
def test_a_step_along_the_mean_repeats_its_bits(implementation, K):
    params, _, buffers = tensors()
    given = implementation, "qhm", params, gradients_of_parts(K), buffers
    first, second = along_mean(*given), along_mean(*given)
    for x, y in zip([*first[0], *first[1], *first[2:]], [*second[0], *second[1], *second[2:]],
                    strict=True):  # fmt: skip
        assert torch.equal(x, y)


@needs_cxx
@pytest.mark.parametrize("K", [2, 4, 8])
def test_the_number_of_threads_changes_no_bit_of_a_step_along_the_mean(K):
    shapes = [(150_000,), (70_001,)]
    params, _, buffers = tensors(shapes=shapes)
    given = "native", "shb", params, gradients_of_parts(K, shapes=shapes), buffers

    def all_of_it():
        after, momenta, *found = along_mean(*given)
        return [*after, *momenta, *found]

    for found, expected in zip(at_threads(2, all_of_it), at_threads(1, all_of_it), strict=True):
        assert torch.equal(found, expected)


# Plans


@pytest.fixture
def recorded(monkeypatch):
    """Every launch of an update, and the function that does it again: it is not done here."""
    launches = []
    for name, function in update.IMPLEMENTATIONS.items():
        monkeypatch.setitem(
            update.IMPLEMENTATIONS,
            name,
            lambda *given, function=function: launches.append((function, given)),
        )
    return launches


def table_of(given):
    return next(x for x in given if isinstance(x, update.Table))


def again(launches):
    for function, given in launches:
        function(*given)


@every_implementation
def test_a_plan_goes_on_where_gradients_lie_elsewhere_at_every_step(implementation):
    """At more places than it keeps tables of, and at places that it has seen before."""
    params, _, buffers = tensors(shapes=[(129,), (5, 3)])
    expected, momenta = [p.double() for p in params], [m.double() for m in buffers]
    numbers, mixed = rule("shb")
    plan, kept = update.Plan(params, buffers, mixed, implementation), []
    for step in range(update.TABLES + 12):
        if step % 4 == 3:
            grads = kept[step // 2]
            for g in grads:
                g.mul_(-0.5)
        else:
            grads = [randn(*p.shape, seed=1000 + step) for p in params]
        kept.append(grads)
        plan(grads, numbers)
        for i, g in enumerate(grads):
            expected[i], momenta[i], _ = definition("shb", expected[i], g, momenta[i], 0.0)
    for p, exact in zip(params, expected, strict=True):
        assert distance(p, exact) < 1e-5


@every_implementation
def test_a_plan_overwrites_its_sums(implementation):
    (p,), (g,), (m,) = tensors(shapes=[(20_001,)])
    numbers, mixed = rule("shb")
    plan = update.Plan([p], [m], mixed, implementation)
    first = plan([g], numbers)
    before = first.clone()
    second = plan([2 * g], numbers)
    assert second.data_ptr() == first.data_ptr() and second.dtype == torch.float64
    torch.testing.assert_close(second[:, 0], 4 * before[:, 0], rtol=1e-6, atol=0)
    third, _, _ = plan.along_mean([[g], [g]], numbers)
    assert third.data_ptr() == first.data_ptr()
    torch.testing.assert_close(third[:, 0], before[:, 0], rtol=1e-6, atol=0)


@every_implementation
def test_a_gradient_in_another_order_is_taken_in_the_order_of_its_parameter(implementation):
    """Wherever it and its copy lie, at this step and at the next."""
    p = randn(8, 4, 3, 3).to(memory_format=torch.channels_last)
    q, m, exact = randn(5), torch.zeros_like(p), p.double()
    memory = [torch.empty(p.numel(), device=DEVICE) for _ in range(2)]
    h = torch.zeros(5, device=DEVICE)
    numbers, mixed = rule("nshb", beta=0.0)
    plan = update.Plan([p, q], [m, torch.zeros_like(q)], mixed, implementation)
    for step in range(6):
        g = memory[step % 2].view(p.shape)  # not p's order
        g.copy_(randn(*p.shape, seed=step))
        plan([g, h], numbers)
        exact = exact - LR * g.double()
        plan.along_mean([[g, h], [-g, h]], numbers)
    assert distance(p, exact) < 1e-5


def test_a_launch_is_looked_up_at_every_step_and_can_be_done_again(recorded):
    """On the same memory: with the gradients and the rule that are there by then."""
    (p,), (g,), (m,) = tensors(shapes=[(129,)])
    numbers, mixed = rule("shb")
    start, plan = p.clone(), update.Plan([p], [m], mixed)
    sums = plan([g], numbers)
    assert len(recorded) == 1 and torch.equal(p, start)
    for step in range(3):
        g.copy_(randn(129, seed=step))
        numbers.lr.mul_(0.5)
        _, exact_m, direction = definition("shb", p, g, m, 0.0)
        exact_p = p.double() - numbers.lr.to(DEVICE) * direction
        again(recorded)
        assert distance(p, exact_p) < 1e-6 and distance(m, exact_m) < 1e-6
        torch.testing.assert_close(sums.sum(dim=0)[0], g.double().square().sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("K", [1, 3])
def test_a_captured_step_reads_its_table_once_it_is_settled(recorded, monkeypatch, K):
    """While a graph is captured nothing is copied to the device and nothing runs; and what is made
    then is memory that the graph writes over, so the table's is made before."""
    params, _, buffers = tensors(shapes=[(129,), (5, 3)])
    numbers, mixed = rule("shb")
    plan = update.Plan(params, buffers, mixed)
    parts = gradients_of_parts(K, shapes=[(129,), (5, 3)])

    def step(parts):
        plan(parts[0], numbers) if K == 1 else plan.along_mean(parts, numbers)

    def capture():
        with monkeypatch.context() as patch:
            patch.setattr(backend, "capturing", lambda device: True)
            step(parts)

    with pytest.raises(RuntimeError, match="a step like it has to come before"):
        capture()
    step(gradients_of_parts(K, shapes=[(129,), (5, 3)]))
    made = {tensor.data_ptr() for tensor in plan._spare.values()}
    recorded.clear()
    assert not plan.captured
    capture()
    assert plan.captured
    (captured,) = recorded
    rows = table_of(captured[1]).rows
    assert made == {rows.data_ptr()}
    unsettled = rows.clone()
    monkeypatch.undo()
    plan.settle()
    assert not torch.equal(rows, unsettled)
    held = rows.clone()
    plan.settle()  # nothing is left to do
    for seed in range(2 * update.TABLES):  # the tables of other steps take the place of none
        plan([randn(*p.shape, seed=seed) for p in params], Rule(*(0 * x for x in numbers)))
    plan_params, starts, momenta = plan.params, copies(params), copies(buffers)
    again([captured])
    assert torch.equal(rows, held)
    for i, p in enumerate(plan_params):
        mean = torch.stack([part[i].double() for part in parts]).mean(dim=0)
        exact_p, exact_m, _ = definition("shb", starts[i], mean, momenta[i], 0.0)
        assert distance(p, exact_p) < 1e-6 and distance(buffers[i], exact_m) < 1e-6


@pytest.mark.parametrize("seen_before", [True, False])
def test_what_a_graph_reads_outlives_the_tables_of_other_steps(recorded, monkeypatch, seen_before):
    """The graph itself holds no tensor. The others are given up in time."""
    (p,), (g,), (m,) = tensors(shapes=[(129,)])
    numbers, mixed = rule("shb")
    plan = update.Plan([p], [m], mixed)
    plan([g if seen_before else g.clone()], numbers)
    with monkeypatch.context() as patch:
        patch.setattr(backend, "capturing", lambda device: True)
        plan([g], numbers)
    plan.settle()
    rows = weakref.ref(table_of(recorded[-1][1]).rows)
    plan([-g], numbers)
    other = weakref.ref(table_of(recorded[-1][1]).rows)
    recorded.clear()
    for seed in range(2 * update.TABLES):
        plan([randn(129, seed=seed)], numbers)
    recorded.clear()
    assert other() is None
    assert rows().tolist() == [[129, p.data_ptr(), m.data_ptr(), g.data_ptr()]]


def test_what_triton_has_compiled_is_launched_without_asking_it_again(monkeypatch):
    calls = []

    class Kernel:
        def __init__(self, name, makes=None):
            self.name, self.makes = name, makes

        def __getitem__(self, grid):
            def launch(*arguments, **options):
                calls.append((self.name, grid, arguments))
                return self.makes

            return launch

    monkeypatch.setattr(update, "_update_kernel", Kernel("jit", Kernel("compiled")))
    monkeypatch.setattr(update, "_compiled", {})
    params, grads, buffers = tensors(shapes=[(20_001,), (5,)])
    numbers, mixed = rule("shb")
    plan = update.Plan(params, buffers, mixed, "triton")
    for _ in range(3):
        plan(grads, numbers)
    plan.along_mean([grads, grads], numbers)
    plan.along_mean([grads, grads], numbers)
    plan([g.view(-1)[1:].new_zeros(g.numel() + 1)[1:].view(g.shape) for g in grads], numbers)
    names = [name for name, _, _ in calls]
    assert names == ["jit", "compiled", "compiled", "jit", "compiled", "jit"]  # the last unaligned
    one, two = calls[0][1:], calls[1][1:]
    assert one[0] == two[0] == (4, 1, 1)  # 8,192 parameters a program
    assert all(x is y or x == y for x, y in zip(one[1], two[1], strict=True))


def test_plans_refuse_what_does_not_fit():
    p, g, m = randn(4), randn(4), randn(4)
    numbers, mixed = rule("shb")
    with pytest.raises(ValueError, match="plans of their own"):
        update.Plan([p, p.double()], [m, m.double()], mixed)
    with pytest.raises(ValueError, match="0 parameters"):
        update.Plan([], [], mixed)
    plan = update.Plan([p], [m], mixed)
    for K in (0, 1, 9):
        with pytest.raises(ValueError, match=f"{K} gradients a parameter"):
            plan.along_mean([[g]] * K, numbers)
    for parts, words in [
        ([[g], [g, g]], "2 gradients"),
        ([[g], []], "0 gradients"),
        ([[g], [randn(5)]], r"\[5\]"),
        ([[g], [g.double()]], "float64"),
        ([[g], [torch.empty(4, device="meta")]], "on meta"),
    ]:
        with pytest.raises(ValueError, match=words):
            plan.along_mean(parts, numbers)
    with pytest.raises(ValueError, match="0 gradients"):
        plan([], numbers)


# Persample_noise


def exact_noise(form, G, p, m, decay):
    """As persample_noise in float64, by its definition."""
    rows = G.double()
    mean = rows.mean(dim=0)
    after, momentum, direction = definition(form, p, mean, m, decay)
    sums = torch.stack([mean @ mean, direction @ direction, direction @ mean])
    return after, momentum, ((rows - mean).square().sum(dim=1), rows.square().sum(dim=1), sums)


def plain_noise(form, G, p, m, decay):
    """What plain PyTorch in G's arithmetic makes of the same definition."""
    rows = G.float()
    mean = rows.mean(dim=0)
    u = mean + decay * p.float()
    momentum = direction = u
    if form != "sgd":
        momentum = direction = BETA * m + (u if form == "shb" else (1 - BETA) * u)
    if form == "qhm":
        direction = (1 - NU) * u + NU * momentum
    sums = torch.stack([mean @ mean, direction @ direction, direction @ mean])
    after = (p.float() - LR * direction).to(p.dtype)
    return after, momentum, ((rows - mean).square().sum(dim=1), rows.square().sum(dim=1), sums)


def noisy(implementation, form, G, p, m, decay=0.0):
    p, m = p.clone(), None if m is None else m.clone()
    return p, m, persample_noise.IMPLEMENTATIONS[implementation](G, p, m, *rule(form, decay=decay))


def rows_and_vectors(B, P, form="shb", dtype=torch.float32, p_dtype=torch.float32):
    G = (randn(B, P) + randn(P, seed=1)).to(dtype)
    return G, randn(P, dtype=p_dtype, seed=2), randn(P, seed=3) if form != "sgd" else None


SIZES = [(B, P) for B in (2, 3, 8, 63, 64, 257) for P in (1, 7, 1023, 1024)] + [
    (2, 100_003),
    (8, 100_003),
    (257, 5003),
]


def check_noise(implementation, form, G, p, m, decay):
    after, momentum, found = noisy(implementation, form, G, p, m, decay)
    exact, plain = exact_noise(form, G, p, m, decay), plain_noise(form, G, p, m, decay)
    assert_as_exact_as_torch(after, exact[0], plain[0])
    if form != "sgd":
        assert_as_exact_as_torch(momentum, exact[1], plain[1])
    for x, y, z in zip(found, exact[2], plain[2], strict=True):
        assert x.dtype == torch.float64
        assert_as_exact_as_torch(x, y, z)


@every_implementation
@pytest.mark.parametrize("B, P", SIZES)
def test_persample_noise_has_the_float64_values(implementation, B, P, request):
    leave_to_full(request, implementation == "triton" and (B, P) == (2, 100003))
    check_noise(implementation, "shb", *rows_and_vectors(B, P), 0.03)


@every_form
@every_implementation
@pytest.mark.parametrize("B, P", [(3, 1023), (64, 1024), (257, 1000)])
@pytest.mark.parametrize(
    "dtype, p_dtype",
    [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
def test_persample_noise_has_every_form_and_dtype(implementation, form, B, P, dtype, p_dtype):
    check_noise(implementation, form, *rows_and_vectors(B, P, form, dtype, p_dtype), 0.0)


@every_implementation
@pytest.mark.parametrize("B, P", [(3, 1023), (257, 70)])
def test_persample_noise_takes_float64(implementation, B, P):
    G, p, m = (t.double() for t in rows_and_vectors(B, P))
    after, momentum, found = noisy(implementation, "qhm", G, p, m, 0.03)
    exact = exact_noise("qhm", G, p, m, 0.03)
    for x, y in zip([after, momentum, *found], [*exact[:2], *exact[2]], strict=True):
        assert distance(x, y) < 1e-13


@every_implementation
@pytest.mark.parametrize("B", [2, 64, 257])
def test_small_deviations_from_a_large_mean_keep_their_digits(implementation, B):
    """Mean 1e4, deviations 1e-2, of which float32 holds ten steps: E[x^2] - E[x]^2 would have none
    right."""
    G = 1e4 + 1e-2 * randn(B, 5000)
    p, m = randn(5000), randn(5000)
    found = noisy(implementation, "shb", G, p, m)[2]
    exact = exact_noise("shb", G, p, m, 0.0)[2]
    torch.testing.assert_close(found.noise, exact[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(found.squares, exact[1], rtol=1e-6, atol=0)


@every_implementation
@pytest.mark.parametrize("B", [4, 257])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_spoils_its_column_and_its_sums_alone(implementation, B, bad):
    G, p, m = rows_and_vectors(B, 700)
    for row in (0, B - 1):
        rows = G.clone()
        rows[row, 333] = bad
        after, momentum, found = noisy(implementation, "shb", rows, p, m)
        for vector in (after, momentum):
            assert not vector[333].isfinite() and vector.isfinite().sum() == 699
        assert not found.noise.isfinite().any()  # the mean of that column is in every deviation
        assert not found.squares[row].isfinite() and found.squares.isfinite().sum() == B - 1
        assert not found.sums.isfinite().any()


@every_implementation
@pytest.mark.parametrize("B, P", [(8, 5000), (257, 300)])
def test_persample_noise_repeats_its_bits(implementation, B, P):
    G, p, m = rows_and_vectors(B, P)
    first, second = (noisy(implementation, "qhm", G, p, m) for _ in range(2))
    for x, y in zip([*first[:2], *first[2]], [*second[:2], *second[2]], strict=True):
        assert torch.equal(x, y)


@every_implementation
@pytest.mark.parametrize("B", [5, 257])
@pytest.mark.parametrize("offset", [0, 1])
def test_persample_noise_stays_inside_its_tensors(implementation, B, offset):
    P = 333
    memory = [torch.full((16 + size + 16,), 7.0, device=DEVICE) for size in (B * P, P, P)]
    G, p, m = (x[16 + offset : len(x) - 16 + offset] for x in memory)
    for x, seed in zip((G, p, m), (1, 2, 3), strict=True):
        x.copy_(randn(len(x), seed=seed))
    before = memory[0].clone()
    G = G.view(B, P)
    exact_p, _, exact = exact_noise("shb", G, p, m, 0.0)
    found = persample_noise.IMPLEMENTATIONS[implementation](G, p, m, *rule("shb"))
    assert distance(p, exact_p) < 1e-6 and distance(found.noise, exact[0]) < 1e-6
    assert torch.equal(memory[0], before)
    for x in memory[1:]:
        assert (x[: 16 + offset] == 7).all() and (x[16 + offset + P :] == 7).all()


@every_form
def test_persample_noise_moves_as_update_does_along_the_mean(form):
    G, p, m = rows_and_vectors(6, 4001, form)
    q, n = p.clone(), None if m is None else m.clone()
    found = persample_noise.persample_noise(G, p, m, *rule(form, decay=0.01))
    mean = G.double().mean(dim=0).float()
    squares = update.update([q], [mean], [] if n is None else [n], *rule(form, decay=0.01))
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.sums[:2], squares, rtol=1e-5, atol=0)
    # sum ||G_i||^2 = sum ||G_i - mean||^2 + B ||mean||^2
    total = found.noise.sum() + len(G) * found.sums[0]
    torch.testing.assert_close(found.squares.sum(), total, rtol=1e-6, atol=0)


def test_persample_noise_refuses_what_does_not_fit():
    G, p, m = rows_and_vectors(4, 6)
    for given, words in [
        ((G[:1], p, m, "shb"), "at least two rows"),
        ((G[0], p, m, "shb"), "at least two rows"),
        ((G, p[:5], m, "shb"), "are \\[6\\]"),
        ((G, p, m[:5], "shb"), "are \\[6\\]"),
        ((G, p, None, "qhm"), "needs buffers"),
        ((G.t().contiguous().t(), p, m, "shb"), "contiguous"),
        ((G, randn(12)[::2], m, "shb"), "contiguous"),
        ((G.double(), p, m, "shb"), "float64"),
        ((G, p, m.double(), "shb"), "float64"),
        ((G.half(), p, m, "shb"), "float16"),
        ((G, p.double(), m.double(), "shb"), "must be torch.float64"),
    ]:
        *arguments, form = given
        with pytest.raises(ValueError, match=words):
            persample_noise.persample_noise(*arguments, *rule(form))


# As operators of PyTorch


def test_the_operators_are_registered_as_pytorch_expects():
    params, grads, buffers = tensors(shapes=[(5, 3), (7,)])
    torch.library.opcheck(
        torch.ops.fastsmooth.update.default, (params, grads, buffers, *operands("shb"))
    )
    torch.library.opcheck(
        torch.ops.fastsmooth.update.default, (params, grads, [], *operands("sgd"))
    )
    G, p, m = rows_and_vectors(3, 40)
    torch.library.opcheck(torch.ops.fastsmooth.persample_noise.default, (G, p, m, *operands("qhm")))
    torch.library.opcheck(
        torch.ops.fastsmooth.persample_noise.default, (G, p, None, *operands("sgd"))
    )


def test_autograd_sees_that_the_kernels_change_their_tensors():
    """A gradient that would need the value before the step is refused, not wrong."""
    w, m = randn(6, seed=1).requires_grad_(), torch.zeros(6, device=DEVICE)
    kept = (w**3).sum()
    with torch.no_grad():
        update.update([w], [torch.ones_like(w)], [m], *rule("shb"))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()
    p, version = randn(6), m._version
    persample_noise.persample_noise(randn(3, 6), p, m, *rule("shb"))
    assert p._version and m._version > version


def test_a_whole_training_step_compiles_once_for_every_lr_and_batch():
    """Forward, gradient and update in one graph without a break."""
    weights = [randn(16, 8, seed=1), randn(4, 16, seed=2)]
    buffers = [torch.zeros_like(w) for w in weights]
    numbers, mixed = rule("shb")
    compilations = 0

    def counting(graph, inputs):
        nonlocal compilations
        compilations += 1
        return graph.forward

    def loss(weights, x, y):
        return torch.nn.functional.cross_entropy(torch.relu(x @ weights[0].t()) @ weights[1].t(), y)

    def step(x, y):
        grads, value = torch.func.grad_and_value(loss)(weights, x, y)
        return value, update.update(weights, grads, buffers, numbers, mixed)

    compiled = torch.compile(step, backend=counting, dynamic=True, fullgraph=True)
    expected = [w.double() for w in weights]
    momenta = [torch.zeros_like(w) for w in expected]
    for number in range(20):
        numbers.lr.fill_(0.1 / (1 + number))
        batch = 3 + number % 10
        x, y = randn(batch, 8, seed=number), torch.arange(batch, device=DEVICE) % 4
        compiled(x, y)
        grads = torch.func.grad(loss)(expected, x.double(), y)
        momenta = [BETA * m + g for m, g in zip(momenta, grads, strict=True)]
        expected = [w - numbers.lr.item() * m for w, m in zip(expected, momenta, strict=True)]
    assert compilations == 1
    for w, exact in zip(weights, expected, strict=True):
        assert distance(w, exact) < 1e-5


# The choice of the implementation


def test_the_device_and_dtype_choose_the_implementation(monkeypatch):
    monkeypatch.setattr(native, "library", lambda: object())
    assert backend.choose(torch.device("cuda"), torch.float32) == "triton"
    assert backend.choose(torch.device("cpu"), torch.bfloat16) == "native"
    assert backend.choose(torch.device("cpu"), torch.float16) == "reference"
    assert backend.choose(torch.device("mps"), torch.float32) == "reference"
    monkeypatch.setattr(native, "library", lambda: None)
    assert backend.choose(torch.device("cpu"), torch.float32) == "reference"


@pytest.fixture
def fresh_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    yield tmp_path
    native.library.cache_clear()


def test_without_a_compiler_the_reference_runs_and_says_so_once(monkeypatch, fresh_cache):
    monkeypatch.setenv("PATH", str(fresh_cache))
    monkeypatch.delenv("CXX", raising=False)
    p, g = randn(4).cpu(), randn(4).cpu()
    expected = p - LR * g
    with pytest.warns(UserWarning, match=r"no C\+\+ compiler found"):
        update.update([p], [g], [], *rule("sgd", device=torch.device("cpu")))
    torch.testing.assert_close(p, expected)
    # a second warning would fail the test
    update.update([p], [g], [], *rule("sgd", device=torch.device("cpu")))


def test_a_compiler_that_fails_is_named(monkeypatch, fresh_cache):
    failing = fresh_cache / "cc-broken"
    failing.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit 0\necho "no such luck" >&2\nexit 1\n'
    )
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    with pytest.raises(native.BuildError, match="cc-broken: no such luck"):
        native.build()
