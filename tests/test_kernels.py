"""Every kernel in each of its implementations against float64: Triton (interpreted where there is
no GPU), C++, PyTorch.

A result may be at most twice as far from float64 as plain PyTorch in the kernel's own precision, or
two roundings.
"""

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


def moved(implementation, form, params, grads, buffers, decay=0.0):
    params, buffers = copies(params), copies(buffers)
    squares = update.IMPLEMENTATIONS[implementation](
        params, grads, buffers, *rule(form, decay=decay)
    )
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
    update.IMPLEMENTATIONS[implementation]([p], [g], buffers, *rule(form, beta=0.0))
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
    update.IMPLEMENTATIONS[implementation]([p], [g], [m], *rule("shb"))
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
def test_persample_noise_has_the_float64_values(implementation, B, P):
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
