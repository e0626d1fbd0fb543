"""Per-sample gradient norms beside the obvious: one backward pass a sample, in float64."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastsmooth import models
from fastsmooth.kernels.persample_noise import persample_noise_ref
from fastsmooth.kernels.update import Rule
from fastsmooth.noise.persample import NotCovered, layers, sample_norms, training_norms

CLASSES = 7

# one of the small networks has an even kernel on purpose
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


class Layers(nn.Module):
    """What the networks of the zoo lack: even kernels, "same" padding, dilation, groups, LayerNorm,
    tokens."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
        self.b = nn.Conv2d(6, 8, 4, padding="same", groups=2, bias=False)
        self.c = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular", groups=8)
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Linear(8, 5)
        self.head = nn.Linear(5, CLASSES, bias=False)

    def forward(self, x):
        x = self.c(F.relu(self.b(F.relu(self.a(x))))).flatten(2).mT  # [B, T, 8]
        return self.head(F.gelu(self.mix(self.norm(x))).mean(dim=1))


MODELS = {
    "resnet8": lambda: models.build("resnet8", CLASSES),
    "resnet8, GroupNorm": lambda: models.build("resnet8", CLASSES, "group"),
    "bottleneck": lambda: models.CifarResNet(models.Bottleneck, [1, 1], [4, 6], CLASSES),
    "wide": lambda: models.WideResNet(10, 1, CLASSES),
    "mobilenetv2": lambda: models.build("mobilenetv2", CLASSES),
    "layers": Layers,
}


def model_and_batch(name: str, dtype: torch.dtype, size: int = 5, side: int = 9):
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))  # norms begin as the identity
    return model, torch.randn(size, 3, side, side, dtype=dtype), torch.randint(CLASSES, (size,))


def rows_of(model, x, y) -> torch.Tensor:
    """[B, P]: the gradient of each sample, from a batch of its own."""
    params = list(model.parameters())
    grads = [
        torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), params)
        for i in range(len(y))
    ]
    return torch.stack([torch.cat([g.flatten() for g in one]) for one in grads])


@pytest.mark.parametrize("kernels", ["native", "reference"])
@pytest.mark.parametrize("name", MODELS)
def test_norms_are_those_of_one_backward_pass_a_sample(name, kernels, monkeypatch):
    if kernels == "reference":
        monkeypatch.setattr("fastsmooth.kernels.backend.choose", lambda device, dtype: kernels)
    model, x, y = model_and_batch(name, torch.float64)
    found, rows = sample_norms(model, x, y), rows_of(model, x, y)
    mean = rows.mean(dim=0)
    assert torch.allclose(
        torch.cat([g.flatten() for g in found.grads]), mean, rtol=1e-10, atol=1e-13
    )
    for value, exact in (
        (found.squares, rows.square().sum(1)),
        (found.inner, rows @ mean),
        (found.noise, (rows - mean).square().sum(1)),
        (found.grad_square, mean.square().sum()),
    ):
        assert torch.allclose(value, exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["resnet8, GroupNorm", "layers"])
def test_float32_keeps_six_digits_of_the_norms(name):
    model, x, y = model_and_batch(name, torch.float32)
    squares = sample_norms(model, x, y).squares
    exact = rows_of(model.double(), x.double(), y).square().sum(1)
    assert torch.allclose(squares.sqrt(), exact.sqrt(), rtol=1e-6)


def test_norms_alone_are_the_same(monkeypatch):
    """In plain PyTorch they go through Gram matrices where pixels are few."""
    model, x, y = model_and_batch("resnet8", torch.float64, side=4)
    whole = sample_norms(model, x, y)
    for kernels in ("native", "reference"):
        monkeypatch.setattr(
            "fastsmooth.kernels.backend.choose", lambda device, dtype, name=kernels: name
        )
        alone = sample_norms(model, x, y, noise=False)
        assert alone.noise is None
        assert torch.allclose(alone.squares, whole.squares, rtol=1e-12)


def test_the_noise_is_that_of_the_fused_kernel_over_materialised_rows():
    model, x, y = model_and_batch("resnet8", torch.float64)
    G = rows_of(model, x, y)
    still = Rule(*torch.zeros(6, dtype=torch.float64))
    kernel = persample_noise_ref(G, torch.zeros_like(G[0]), None, still, mixed=False)
    found = sample_norms(model, x, y)
    assert torch.allclose(found.noise, kernel.noise, rtol=1e-10)
    assert torch.allclose(found.squares, kernel.squares, rtol=1e-10)


def test_the_model_is_left_as_it_was():
    model, x, y = model_and_batch("resnet8", torch.float32)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    sample_norms(model, x, y)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


FROZEN = ["a.weight", "b.weight", "c.bias", "norm.weight", "norm.bias", "mix.weight", "mix.bias"]


@pytest.mark.parametrize(
    "frozen", [["mix.weight", "mix.bias"], *([name] for name in FROZEN)], ids=" ".join
)
def test_frozen_parameters_take_no_part(frozen):
    model, x, y = model_and_batch("layers", torch.float64)
    all_of_it = sample_norms(model, x, y).squares
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    params = [p for p in model.parameters() if p.requires_grad]
    exact = []
    for i in range(len(y)):
        grads = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), params)
        exact.append(sum(g.square().sum() for g in grads))
    found = sample_norms(model, x, y)
    assert len(found.grads) == len(params)
    assert torch.allclose(found.squares, torch.stack(exact), rtol=1e-12)
    assert (found.squares < all_of_it).all()


class Unusual(nn.Module):
    """Parameters that are used otherwise than by a layer of their own, in the ways that `how`
    names."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.layer = how, nn.Linear(12, CLASSES)
        shapes = {
            "scale": (CLASSES, 1), "unused": (1,), "listed": (CLASSES, 1), "cut": (1, CLASSES, 3),
            "turned": (CLASSES, CLASSES), "tied": (CLASSES, 12), "bias": (CLASSES,),
            "token": (1, 1, 12), "made": (CLASSES, 12), "table": (5, CLASSES),
        }  # fmt: skip
        self.scale = nn.Parameter(torch.randn(shapes[how])) if how in shapes else None
        self.attention = None
        if how in ("attention", "cross"):
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
            self.head = nn.Linear(6, CLASSES)
        self.memory = nn.LSTM(CLASSES, CLASSES, batch_first=True) if how == "memory" else None
        self.slope = nn.PReLU(CLASSES) if how == "prelu" else None
        if how == "normed":
            self.layer = nn.utils.parametrizations.weight_norm(self.layer)

    def forward(self, x):
        x = x.flatten(1)
        if self.attention is not None:
            tokens = x.unflatten(1, (2, 6))
            query = tokens if self.how == "attention" else tokens[:, :1]
            return self.head(self.attention(query, tokens, tokens)[0][:, 0]) + self.layer(x)
        if self.how == "twice":
            return self.layer(x) + self.layer(2 * x)
        if self.how == "folded":
            return self.layer(x.repeat(2, 1))[: len(x)]
        if self.how == "windows":
            return (
                self.layer(x.unflatten(1, (4, 3)).repeat(1, 1, 4).flatten(0, 1))
                .unflatten(0, (len(x), 4))
                .sum(1)
            )
        if self.how == "token":
            tokens = torch.cat([self.scale.expand(len(x), -1, -1), x[:, None]], dim=1)
            return self.layer(tokens).tanh().sum(1)
        if self.how == "tied":
            return self.layer(x + F.linear(x, self.scale).tanh() @ self.scale)
        if self.how == "made":
            weight = (self.scale - self.scale.mean(1, keepdim=True)) / self.scale.std()
            return F.linear(x, weight) + self.layer(x)
        if self.how == "bias":
            return F.linear(x, self.layer.weight, torch.cat([self.scale[:3], self.layer.bias[3:]]))
        y = self.layer(x)
        if self.how == "scale":
            return y * self.scale[:, 0]
        if self.how == "listed":
            return y * torch.cat([self.scale])[:, 0]
        if self.how == "turned":
            return y @ self.scale.T
        if self.how == "cut":
            return y + y * self.scale.softmax(dim=1)[0, :, 1]
        if self.how == "table":
            return y + self.scale[torch.tensor([0, 3, 3])].sum(0) * y.tanh()
        if self.how == "prelu":
            return self.slope(y)
        return self.memory(y[:, None])[0][:, 0] if self.how == "memory" else y


UNUSUAL = [
    "scale", "listed", "cut", "turned", "tied", "made", "bias", "token", "table", "prelu",
    "normed", "attention", "cross", "twice", "folded", "windows", "memory",
]  # fmt: skip


def unusual(how: str):
    torch.manual_seed(0)
    x = torch.randn(3, 3, 2, 2, dtype=torch.float64)
    return Unusual(how).double(), x, torch.tensor([0, 1, 2])


def matches(found, rows, rtol=1e-12):
    mean = rows.mean(dim=0)
    for value, exact in (
        (torch.cat([g.flatten() for g in found.grads]), mean),
        (found.squares, rows.square().sum(1)),
        (found.noise, (rows - mean).square().sum(1)),
        (torch.stack(list(found.layers.values())).sum(0)[0], rows.square().sum(1)),
    ):
        torch.testing.assert_close(value, exact, rtol=rtol, atol=1e-13)


@pytest.mark.parametrize("how", UNUSUAL)
def test_parameters_may_be_used_in_any_way(how):
    model, x, y = unusual(how)
    found = sample_norms(model, x, y)
    matches(found, rows_of(model, x, y))
    assert bool(found.how) == (how == "memory")  # else nothing of size B x parameters


@pytest.mark.parametrize("how", ["scale", "tied", "cross", "memory", "made"])
def test_norms_may_be_written_out_a_few_samples_at_a_time(how, monkeypatch):
    monkeypatch.setattr("fastsmooth.noise.persample.LIFTED_BYTES", 0)
    monkeypatch.setattr("fastsmooth.noise.persample.alone.ROWS_BYTES", 2000)
    model, x, y = unusual(how)
    found = sample_norms(model, x, y)
    matches(found, rows_of(model, x, y))
    # by a rule that takes the rows of a weight back to what it is made of, nothing is once a sample
    assert ("once a sample" in found.how) == (how not in ("memory", "made"))


def test_a_parameter_without_a_part_is_refused_by_name():
    model, x, y = unusual("unused")
    with pytest.raises(NotCovered, match="scale takes no part in the forward pass: freeze it"):
        sample_norms(model, x, y)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, CLASSES)

    def forward(self, x):
        return self.layer(x.flatten(1) - x.flatten(1).mean(dim=0))


def test_a_model_that_mixes_its_samples_is_refused():
    x, y = torch.randn(4, 3, 2, 2), torch.arange(4)
    with pytest.raises(NotCovered, match="its samples mix"):
        sample_norms(Mixed(), x, y)


def trained(name: str):
    """As model_and_batch, in training mode."""
    model, x, y = model_and_batch(name, torch.float64)
    return model.train(), x, y


@pytest.mark.parametrize("name", ["resnet8", "mobilenetv2"])
def test_shares_of_a_batch_with_statistics_have_its_gradient_as_their_mean(name):
    model, x, y = trained(name)
    before = {key: b.clone() for key, b in model.named_buffers()}
    found = sample_norms(model, x, y, bn="batch")
    assert all(torch.equal(b, before[key]) for key, b in model.named_buffers())
    grads = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    for a, b in zip(found.grads, grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    mean_square = found.squares.mean() - found.noise.mean()  # of the mean of the shares
    assert torch.allclose(mean_square, sum(g.square().sum() for g in grads), rtol=1e-9)
    assert torch.allclose(found.inner.mean(), found.grad_square, rtol=1e-9)


def test_frozen_statistics_are_constants():
    """Beside the same network in evaluation mode, its running statistics set to those of the
    batch."""
    model, x, y = trained("resnet8")
    found = sample_norms(model, x, y, bn="frozen")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(set_statistics)
    rows = rows_of_batch(model.eval(), x, y)
    assert torch.allclose(found.squares, rows.square().sum(1), rtol=1e-10)
    assert torch.allclose(found.noise, (rows - rows.mean(0)).square().sum(1), rtol=1e-10)
    assert torch.allclose(
        torch.cat([g.flatten() for g in found.grads]), rows.mean(0), rtol=1e-8, atol=1e-12
    )


def set_statistics(module, inputs):
    with torch.no_grad():
        variance, mean = torch.var_mean(inputs[0], (0, 2, 3), correction=0)
        module.running_mean, module.running_var = mean, variance


def rows_of_batch(model, x, y):
    """[B, P]: the gradient of each sample's loss within one forward pass of the whole batch."""
    losses = F.cross_entropy(model(x), y, reduction="none")
    params = list(model.parameters())
    grads = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in one]) for one in grads])


def test_a_small_noise_around_a_large_mean_keeps_its_digits():
    """In float32, where ||g_i||^2 - 2 <g_i, g> + ||g||^2 has none left."""
    model, x, y = model_and_batch("resnet8, GroupNorm", torch.float64)
    x = x[:1] + 1e-4 * torch.randn_like(x)
    y = y[:1].expand(len(x))
    exact = sample_norms(model, x, y)
    assert (
        exact.noise < 2e-5 * exact.grad_square
    ).all() and exact.noise.min() < 1e-6 * exact.grad_square
    found = sample_norms(model.float(), x.float(), y)
    assert torch.allclose(found.noise, exact.noise, rtol=0.05)


def test_batch_statistics_and_a_batch_of_one_are_refused():
    model, x, y = model_and_batch("resnet8", torch.float32)
    with pytest.raises(NotCovered, match="two or more"):
        sample_norms(model, x[:1], y[:1])
    with pytest.raises(
        NotCovered, match=r"norm.weight: BatchNorm with batch statistics mixes the samples"
    ):
        sample_norms(model.train(), x, y)


def test_a_compiled_model_gives_the_same_in_one_graph():
    model, x, y = model_and_batch("resnet8", torch.float32)
    exact = sample_norms(model, x, y)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):  # the second time as compiled the first
        found = sample_norms(compiled, x, y)
        for a, b in ((found.squares, exact.squares), (found.noise, exact.noise)):
            assert torch.allclose(a, b, rtol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# Where the samples are


class TimeFirst(nn.Module):
    """Takes [B, T, 4] and works on [T, B, 4], as recurrent and attention layers do without
    batch_first."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(F.gelu(self.mix(x.transpose(0, 1))).mean(dim=0))


class Transposed(nn.Module):
    """Takes [T, B, 4]: the batch is not the first dimension of its input."""

    def __init__(self):
        super().__init__()
        self.mix, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(F.gelu(self.mix(x)).mean(dim=0))


@pytest.mark.parametrize("size", [2, 3, 6])
def test_a_batch_that_is_not_the_first_dimension_is_refused_where_the_sizes_agree(size):
    torch.manual_seed(0)
    x, y = torch.randn(size, size, 4), torch.randint(CLASSES, (size,))
    with pytest.raises(NotCovered, match="the output for one sample is"):
        sample_norms(Transposed(), x, y)


@pytest.mark.parametrize("size", [2, 3, 6])
def test_samples_may_be_in_another_dimension_inside(size):
    torch.manual_seed(0)
    model, x = TimeFirst().double(), torch.randn(size, size, 4, dtype=torch.float64)
    y = torch.randint(CLASSES, (size,))
    matches(sample_norms(model, x, y), rows_of(model, x, y))


def test_a_batch_first_model_is_accepted_whatever_its_other_sizes():
    for size, tokens in ((2, 2), (3, 2), (2, 3), (6, 6)):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(4, 5), nn.GELU(), nn.Flatten(), nn.Linear(5 * tokens, CLASSES)
        ).double()
        x, y = torch.randn(size, tokens, 4, dtype=torch.float64), torch.randint(CLASSES, (size,))
        expected = rows_of(model, x, y)
        found = sample_norms(model, x, y)
        torch.testing.assert_close(found.squares, expected.square().sum(1), rtol=1e-9, atol=0)


def test_the_look_at_the_layout_leaves_no_trace():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, affine=False),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.LazyLinear(CLASSES),
    )
    x, y = torch.randn(6, 3, 8, 8), torch.randint(CLASSES, (6,))
    model(x)
    before, state = [b.clone() for b in model.buffers()], torch.get_rng_state()
    sample_norms(model.eval(), x, y)
    model.train()
    sample_norms(model, x, y, bn="frozen")
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))
    torch.set_rng_state(state)
    first = sample_norms(model, x, y, bn="frozen").loss
    torch.set_rng_state(state)
    assert sample_norms(model, x, y, bn="frozen").loss == first


def test_a_model_of_one_output_is_refused():
    x, y = torch.randn(6, 4), torch.zeros(6, dtype=torch.int64)
    with pytest.raises(NotCovered, match="one class"):
        sample_norms(nn.Linear(4, 1), x, y)


# Precision


class Tokens(nn.Module):
    """A small vision transformer: patches, a token of its own, places, two blocks."""

    def __init__(self):
        super().__init__()
        self.patch, self.norm = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16)
        self.own = nn.Parameter(torch.zeros(1, 1, 16))
        self.place = nn.Parameter(0.02 * torch.randn(1, 5, 16))
        block = nn.TransformerEncoderLayer(
            16, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.ModuleList([copy.deepcopy(block) for _ in range(2)])
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        x = self.patch(x).flatten(2).mT
        x = torch.cat([self.own.expand(len(x), -1, -1), x], dim=1) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


MIXED = {
    "GroupNorm": lambda: models.build("resnet8", CLASSES, "group").train(),
    "BatchNorm, evaluation mode": lambda: models.build("resnet8", CLASSES).eval(),
    "tokens": lambda: Tokens().train(),
}


def of_samples(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """||g_i||^2 and ||g_i - g||^2 of the rows g_i [B, P]."""
    return rows.square().sum(1), (rows - rows.mean(0)).square().sum(1)


def errors(found, exact) -> list[float]:
    """Root mean squares over the samples of the relative errors of norms and deviations, and the
    relative error of the sum of squared deviations, of which C2 is made."""
    roots = [((a / b).sqrt() - 1).square().mean().sqrt() for a, b in zip(found, exact, strict=True)]
    return [e.item() for e in (*roots, (found[1].sum() / exact[1].sum() - 1).abs())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MIXED)
def test_under_autocast_norms_are_as_right_as_those_of_one_pass_a_sample(name, dtype):
    """Beside float64: no further off than plain PyTorch's, which are some 1e-2."""
    torch.manual_seed(0)
    model, x, y = MIXED[name](), torch.randn(16, 3, 8, 8), torch.randint(CLASSES, (16,))
    exact = of_samples(rows_of(copy.deepcopy(model).double(), x.double(), y))
    x = x.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = sample_norms(model, x, y)
        plain = of_samples(rows_of(model, x, y).double())
    assert {g.dtype for g in found.grads} == {torch.float32} and not found.how
    own, theirs = errors((found.squares, found.noise), exact), errors(plain, exact)
    assert all(1e-4 < e < 2e-2 for e in own)
    assert all(a < 1.05 * b + 1e-4 for a, b in zip(own, theirs, strict=True))


@pytest.mark.parametrize("bn", ["batch", "frozen"])
def test_shares_of_a_batch_with_statistics_are_measured_under_autocast(bn):
    torch.manual_seed(0)
    model = models.build("resnet8", CLASSES)
    x, y = torch.randn(24, 3, 16, 16), torch.randint(CLASSES, (24,))
    exact = sample_norms(copy.deepcopy(model).double(), x.double(), y, bn=bn)
    with torch.autocast("cpu", torch.bfloat16):
        found = sample_norms(model, x, y, bn=bn)
    own = errors((found.squares, found.noise), (exact.squares, exact.noise))
    assert 1e-4 < own[0] < 1e-2 and own[1] < 1e-2 and own[2] < 1e-2


def test_a_float64_model_is_measured_in_float64_under_autocast():
    model, x, y = model_and_batch("resnet8, GroupNorm", torch.float64)
    exact = sample_norms(model, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        found = sample_norms(model, x, y)
    torch.testing.assert_close(found.noise, exact.noise, rtol=1e-12, atol=0)


class LeavesAutocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(12, 20), nn.Linear(20, CLASSES)

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.b(self.a(x.flatten(1)).tanh())


def test_what_leaves_autocast_is_measured_in_float32():
    torch.manual_seed(0)
    model, x, y = LeavesAutocast(), torch.randn(6, 3, 2, 2), torch.randint(CLASSES, (6,))
    exact = sample_norms(copy.deepcopy(model).double(), x.double(), y)
    with torch.autocast("cpu", torch.bfloat16):
        found = sample_norms(model, x, y)
    torch.testing.assert_close(found.noise, exact.noise, rtol=1e-5, atol=0)
    for own, theirs in zip(found.grads, exact.grads, strict=True):
        torch.testing.assert_close(own, theirs.float(), rtol=1e-4, atol=1e-6)


def test_the_precision_reaches_every_product_of_weights(monkeypatch):
    given, shares = [], layers.weight_shares
    monkeypatch.setattr(layers, "weight_shares", lambda *a: (given.append(a[-1]), shares(*a))[1])
    x, y = torch.randn(3, 3, 9, 9), torch.arange(3)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(196, CLASSES))
    volume = nn.Sequential(
        nn.Unflatten(1, (1, 3)),
        nn.Conv3d(1, 2, 3),
        nn.Flatten(2),
        nn.Conv1d(2, 2, 1),
        nn.Flatten(),
        nn.Linear(98, CLASSES),
    )
    for net in (model, volume):
        sample_norms(net, x, y)  # which looks at the model first
        for how in ({}, {"precision": "tf32"}, {"precision": "ieee"}):
            given.clear()
            sample_norms(net, x, y, **how)
            # two convolutions or three, the linear layer; the deep one a product a tap
            assert set(given) == {how.get("precision", "tf32x3")}
            assert len(given) == (2 if net is model else 5)
        given.clear()
        training_norms(net, x, y, precision="tf32")
        assert set(given) == {"tf32"}
    with pytest.raises(ValueError, match="precision 'bf16': choose from ieee, tf32, tf32x3"):
        sample_norms(model, x, y, precision="bf16")


# As a pass of training


def test_a_pass_that_trains_moves_the_statistics_and_draws_as_an_ordinary_one():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4, affine=False),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4, momentum=0.3),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )
    x, y = 2 + torch.randn(6, 3, 8, 8), torch.randint(CLASSES, (6,))
    plain = copy.deepcopy(model)
    for _ in range(3):
        state = torch.get_rng_state()
        expected = plain(x)
        loss = F.cross_entropy(expected, y)
        grads = torch.autograd.grad(loss, list(plain.parameters()))
        drawn = torch.get_rng_state()
        torch.set_rng_state(state)
        found, output = training_norms(model, x, y, bn="batch")
        assert torch.equal(torch.get_rng_state(), drawn)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(found.loss, loss)
        for own, theirs in zip(found.grads, grads, strict=True):
            torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-6)
        for (key, own), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
            assert torch.equal(own, theirs), key
    assert model[1].num_batches_tracked == 3


def test_gradients_that_are_written_out_are_no_pass_of_training():
    model, x, y = unusual("memory")
    with pytest.raises(NotCovered, match="the gradients of samples are written out: "):
        training_norms(model, x, y)
