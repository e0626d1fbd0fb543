"""Per-sample norms layer by layer, and of models that do unusual things, beside one backward pass a
sample in float64."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsmooth.noise import persample
from fastsmooth.noise.persample import NotCovered, SampleNorms, alone, sample_norms

BATCH = 4

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


def normal(*shape: int) -> Tensor:
    return torch.randn(BATCH, *shape, dtype=torch.float64)


def target_of(model: nn.Module, x: Tensor) -> Tensor:
    """The loss is the mean square of the output."""
    with torch.no_grad():
        return torch.zeros_like(model(x))


def rows_of(model: nn.Module, x: Tensor) -> Tensor:
    """[B, P]: the gradient of each sample, out of one forward pass of them all."""
    params = [p for p in model.parameters() if p.requires_grad]
    losses = model(x).square().flatten(1).mean(1)
    grads = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in one]) for one in grads])


def norms_of(model: nn.Module, x: Tensor, **given) -> SampleNorms:
    return sample_norms(model, x, target_of(model, x), loss=F.mse_loss, **given)


def check(found: SampleNorms, rows: Tensor, rtol: float = 1e-10) -> None:
    mean = rows.mean(0)
    squares = rows.square().sum(1)
    for value, exact in (
        (torch.cat([g.flatten() for g in found.grads]), mean),
        (found.squares, squares),
        (found.noise, (rows - mean).square().sum(1)),
        (found.grad_square, mean.square().sum()),
    ):
        size = rtol * exact.abs().max().item()
        torch.testing.assert_close(value, exact.to(value.dtype), rtol=rtol, atol=size)


def disturbed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.double()


class Windows(nn.Module):
    """A layer over all windows of all samples at once: x is [B, windows, ...]."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


# Layers

LAYERS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (4, 11)),
    "conv1d same": (lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=3, groups=2), (4, 11)),
    "conv1d reflect": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 7)),
    "conv2d same": (lambda: nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(3, 1)), (4, 7, 6)),
    "conv3d": (
        lambda: nn.Conv3d(4, 6, (2, 3, 1), (2, 1, 3), (1, 2, 0), (2, 1, 1), groups=2),
        (4, 5, 6, 7),
    ),
    "conv3d same": (lambda: nn.Conv3d(2, 4, (2, 3, 4), padding="same", dilation=2), (2, 5, 4, 6)),
    "conv3d valid": (lambda: nn.Conv3d(2, 4, 2, padding="valid", bias=False), (2, 3, 4, 3)),
    "instance norm": (lambda: nn.InstanceNorm2d(3, affine=True), (3, 4, 5)),
    "instance norm, running": (
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        (3, 4, 5),
    ),
    "rms norm": (lambda: nn.RMSNorm((4, 5)), (2, 3, 4, 5)),
    "layer norm without bias": (lambda: nn.LayerNorm((4, 5), bias=False), (2, 4, 5)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (4, 7)),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer(name, training):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    model, x = disturbed(make()).train(training), normal(*shape)
    rows = rows_of(model.eval(), x)
    if name == "instance norm, running" and training:
        fresh = disturbed(nn.InstanceNorm2d(3, affine=True))
        fresh.load_state_dict(model.state_dict(), strict=False)
        rows = rows_of(fresh, x)
    found = norms_of(model.train(training), x)
    check(found, rows)
    assert found.how == ""


# The strides and sizes meet in every way that leaves lines of an image over, or none.
CONVS = [
    *(
        (lambda k=k, s=s, p=p, d=d: nn.Conv2d(4, 6, k, s, p, d, groups=2), (3, 4, 7, 6))
        for k, s, p, d in (
            *((3, 1, 1, 1), (3, 2, 1, 1), (3, 3, 0, 1), (2, 2, 0, 1), (3, 1, 2, 2), (3, 2, 3, 2)),
            *((1, 2, 0, 1), (5, 3, 2, 1), (7, 4, 3, 1), (2, 3, 1, 3), (6, 1, 0, 1)),
            *(((3, 1), (2, 1), (1, 0), (2, 1)), ((1, 3), (3, 2), (0, 2), 1)),
        )
    ),
    (lambda: nn.Conv2d(4, 6, 2, padding="same", dilation=3), (3, 4, 7, 6)),
    (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2), (3, 4, 7)),
    (lambda: nn.Conv3d(4, 6, (2, 3, 2), (1, 2, 3), (1, 1, 0), groups=2), (3, 4, 3, 6, 5)),
]


@pytest.mark.parametrize("number", range(len(CONVS)))
def test_a_convolution_of_windows(number):
    torch.manual_seed(0)
    make, shape = CONVS[number]
    model, x = disturbed(Windows(make())), normal(*shape)
    found = norms_of(model, x)
    check(found, rows_of(model, x))
    assert found.how == ""


NORMS = {
    "group": (lambda: nn.GroupNorm(2, 4), (3, 4, 5, 2)),
    "instance": (lambda: nn.InstanceNorm1d(4, affine=True), (3, 4, 5)),
    "batch": (lambda: nn.BatchNorm2d(4).eval(), (3, 4, 5, 2)),
    "layer": (lambda: nn.LayerNorm(4), (3, 5, 4)),
    "rms": (lambda: nn.RMSNorm(4), (3, 5, 4)),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_normalisation_of_windows(name):
    torch.manual_seed(0)
    make, shape = NORMS[name]
    model, x = disturbed(Windows(make())), normal(*shape)
    found = norms_of(model, x)
    check(found, rows_of(model, x))
    assert found.how == ""


TOKENS = {
    "some": [[1, 2, 3], [4, 2, 0], [0, 0, 5], [3, 3, 3]],
    "one in all": [[2, 2, 2]] * 4,
    "padding alone": [[0, 0, 0], [1, 0, 0], [0, 1, 1], [5, 5, 0]],
}


@pytest.mark.parametrize("padding", [None, 0, -1])
@pytest.mark.parametrize("name", TOKENS)
def test_an_embedding(name, padding):
    torch.manual_seed(0)
    model = disturbed(nn.Embedding(6, 3, padding_idx=padding))
    index = torch.tensor(TOKENS[name])
    for x in (index, index.T.contiguous().T):
        check(norms_of(model, x), rows_of(model, x))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_tokens(mode):
    torch.manual_seed(0)
    model = disturbed(nn.EmbeddingBag(6, 3, mode=mode, padding_idx=0))
    for name, rows in TOKENS.items():
        if name != "padding alone":
            x = torch.tensor(rows)
            check(norms_of(model, x), rows_of(model, x))


def test_a_small_noise_of_an_embedding_keeps_its_digits():
    """In float32, of samples whose tokens are the same and whose slopes differ by a millionth."""

    class Near(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.table(x[:, :3].long()) * x[:, 3:, None]

    torch.manual_seed(0)
    model = Near().double()
    tokens = torch.tensor([[1.0, 2.0, 1.0]]).expand(BATCH, 3)
    x = torch.cat([tokens, 1 + 1e-4 * torch.randn(BATCH, 1)], 1)
    rows = rows_of(model, x.double())
    away = (rows - rows.mean(0)).square().sum(1)
    assert away.max() < 1e-6 * rows.square().sum(1).min()
    found = norms_of(model.float(), x)
    assert torch.allclose(found.noise, away, rtol=0.02)


# Attention


class Attention(nn.Module):
    """`how` names what the attention is asked for."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        self.attention = nn.MultiheadAttention(6, 2, batch_first=how != "batch second")
        self.register_buffer("mask", torch.ones(5, 5, dtype=torch.bool).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        masks = {}
        if self.how == "causal":
            masks = {"attn_mask": self.mask}
        if self.how == "causal by name":
            masks = {"attn_mask": self.mask, "is_causal": True}
        if self.how == "padding":
            masks = {"key_padding_mask": x[..., 0] > 0.5}
        if self.how == "both":
            masks = {"key_padding_mask": -3 * x[..., 0].abs(), "attn_mask": -3 * self.mask.double()}
        needed = self.how in ("weights", "both")
        tokens = x.transpose(0, 1) if self.how == "batch second" else x
        y, weights = self.attention(tokens, tokens, tokens, need_weights=needed, **masks)
        y = y.transpose(0, 1) if self.how == "batch second" else y
        return torch.cat([y, weights], -1) if needed else y


@pytest.mark.parametrize(
    "how", ["weights", "causal", "causal by name", "padding", "both", "batch second"]
)
def test_attention(how):
    torch.manual_seed(0)
    model, x = disturbed(Attention(how)), normal(5, 6)
    x[..., 0, 0] = 0.0  # no sample has all of its tokens masked
    found = norms_of(model, x)
    check(found, rows_of(model, x))
    assert found.how == ""


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("layer", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_a_transformer_layer(layer, norm_first, training):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            given = {"dropout": 0.0, "batch_first": True, "norm_first": norm_first}
            self.layer = layer(6, 2, 8, **given)

        def forward(self, x: Tensor) -> Tensor:
            if layer is nn.TransformerEncoderLayer:
                return self.layer(x)
            return self.layer(x, x.flip(1) * 2)

    torch.manual_seed(0)
    model, x = disturbed(Whole()).train(training), normal(5, 6)
    found = norms_of(model, x)
    check(found, rows_of(model, x))
    assert found.how == ""


# BatchNorm without weights, dropout, and what a model keeps


@pytest.mark.parametrize("bn", ["frozen", "batch"])
def test_batch_statistics_without_weights(bn):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.Tanh())
    model, x = disturbed(model).train(), normal(3)
    with pytest.raises(NotCovered, match="mixes the samples"):
        norms_of(model, x)
    before = [b.clone() for b in model.buffers()]
    found = norms_of(model, x, bn=bn)
    h = model[0](x)
    mean, variance = h.mean(0), h.var(0, correction=0)
    if bn == "frozen":
        mean, variance = mean.detach(), variance.detach()
    # the shares of sample i: slopes of the mean loss at its row of h, on which all losses depend
    normal_h = (h - mean) / (variance + model[1].eps).sqrt()
    (slopes,) = torch.autograd.grad(normal_h.tanh().square().mean(), h)
    weights = slopes[:, :, None] * x[:, None] * BATCH
    check(found, torch.cat([weights.flatten(1), slopes * BATCH], 1))
    model.train(False)
    for b, old in zip(model.buffers(), before, strict=True):
        b.copy_(old)
    check(norms_of(model, x), rows_of(model, x))


def test_dropout_is_measured_as_it_falls_and_leaves_generator_and_buffers_alone():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 8), nn.Dropout(0.5), nn.InstanceNorm1d(1, track_running_stats=True)
    )
    model = nn.Sequential(nn.Unflatten(1, (1, 3)), model).double().train()
    x = normal(3)
    y = target_of(model, x)
    buffers = [b.clone() for b in model.buffers()]
    found = sample_norms(model, x, y, loss=F.mse_loss)  # the first looks at the model
    torch.manual_seed(1)
    found = sample_norms(model, x, y, loss=F.mse_loss)
    after = torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    torch.manual_seed(1)
    check(found, rows_of(model, x))
    assert torch.equal(after, torch.get_rng_state())  # as one forward pass leaves it
    torch.manual_seed(1)
    again = nn.Sequential(*model)
    first = sample_norms(again, x, y, loss=F.mse_loss)  # looked at with the generator aside
    assert torch.equal(first.squares, found.squares)


class Cached(nn.Module):
    """Keeps a table that it makes of a parameter from one call to the next, as LeViT does."""

    def __init__(self):
        super().__init__()
        self.bias, self.layer, self.kept = nn.Parameter(torch.randn(3)), nn.Linear(3, 3), {}

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.kept:
            self.kept["bias"] = self.bias.tanh()
        return self.layer(x) + self.kept["bias"] * x

    def train(self, mode: bool = True) -> "Cached":
        self.kept = {} if mode else self.kept
        return super().train(mode)


def test_what_a_model_keeps_from_call_to_call_is_not_met():
    torch.manual_seed(0)
    model, x = Cached().double().eval(), normal(3)
    rows = rows_of(model, x)
    with torch.enable_grad():
        model(x).sum().backward()  # and the graph of what is kept is gone
    kept = model.kept["bias"]
    for _ in range(2):
        check(sample_norms(model, x, torch.zeros_like(x), loss=F.mse_loss), rows)
        assert model.kept["bias"] is kept


def test_what_a_model_keeps_without_a_graph_is_said():
    model, x = Cached().double().eval(), normal(3)
    with pytest.raises(NotCovered, match=r"^bias takes no part .* call model.train\(\) and"):
        norms_of(model, x)  # looks at the shape of the output under torch.no_grad


# Parameters in unusual places


class Placed(nn.Module):
    def __init__(self, how: str):
        super().__init__()
        self.how, self.layer, self.other = how, nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        w, v = self.layer.weight, self.other.weight
        if self.how == "turned and as it is":
            return self.other(self.layer(x).tanh() @ w.T)
        if self.how == "turned by an attribute":
            return self.other(self.layer(x).tanh() @ w.mT.contiguous())
        if self.how == "another order":
            return self.other(self.layer(x.flip(0)).tanh().flip(0))
        if self.how == "own function":
            return self.other(Twice.apply(x, w) + self.layer(x))
        if self.how == "own function under vmap":
            return self.other(TwiceUnderVmap.apply(x, w) + self.layer.bias)
        if self.how == "own function alone":
            return self.other(Twice.apply(x, w) + self.layer.bias)
        if self.how == "a bias of two":
            return (
                F.linear(x, w, self.layer.bias)
                + F.linear(x.tanh(), v, self.layer.bias)
                + (self.other.bias * x)
            )
        if self.how == "set":
            y = self.other(self.layer(x))
            y = y.clone()
            y[:, 0] = self.layer.bias[0] * x[:, 1]
            return y
        if self.how == "standardised":
            return self.other(F.linear(x, w / w.norm() * v.sum(), self.layer.bias))
        if self.how == "fact":
            return self.other(self.layer(x) * w.detach().norm())
        assert self.how == "unused but for its value"
        with torch.no_grad():
            size = w.norm() + self.layer.bias.sum()
        return self.other(x * size)


class Twice(torch.autograd.Function):
    """A function that nothing but autograd sees."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return 2 * x @ w.T

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return 2 * dy @ w, 2 * dy.T @ x


class TwiceUnderVmap(Twice):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return 2 * x @ w.T

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)


PLACES = {
    "turned and as it is": True, "turned by an attribute": True, "another order": True,
    "own function": False, "own function alone": False, "own function under vmap": True,
    "a bias of two": True, "set": True, "standardised": True, "fact": True,
}  # fmt: skip


@pytest.mark.parametrize("how", PLACES)
def test_a_parameter_is_found_wherever_it_is_used(how):
    torch.manual_seed(0)
    model, x = disturbed(Placed(how)), normal(3)
    found = norms_of(model, x)
    check(found, rows_of(model, x))
    assert (found.how == "") == PLACES[how]


def test_a_parameter_of_which_only_the_value_is_used_takes_no_part():
    model, x = Placed("unused but for its value").double(), normal(3)
    with pytest.raises(NotCovered, match=r"^layer\.weight takes no part"):
        norms_of(model, x)
    model.layer.requires_grad_(False)
    check(norms_of(model, x), rows_of(model, x))


@pytest.mark.parametrize("frozen", ["layer", "other"])
def test_a_frozen_parameter_within_a_weight_that_is_made(frozen):
    torch.manual_seed(0)
    model, x = disturbed(Placed("standardised")), normal(3)
    model.get_submodule(frozen).requires_grad_(False)
    found = norms_of(model, x)
    check(found, rows_of(model, x))
    assert found.how == ""


def test_parameters_may_be_replaced_by_others_of_their_names():
    torch.manual_seed(0)
    model, x = disturbed(Placed("set")), normal(3)
    check(norms_of(model, x), rows_of(model, x))
    model.layer.bias = nn.Parameter(normal()[:3].clone())
    check(norms_of(model, x), rows_of(model, x))


class Wandering(nn.Module):
    """Takes another path where it is told to."""

    def __init__(self):
        super().__init__()
        self.scale, self.layer, self.path = nn.Parameter(torch.randn(3)), nn.Linear(3, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) * self.scale
        if self.path == 1:
            return y + self.layer(x)
        return y + self.layer.weight.sum() * x if self.path == 2 else y


@pytest.mark.parametrize("path", [1, 2])
def test_another_path_than_the_one_that_was_looked_at_is_refused(path):
    model, x = Wandering().double(), normal(3)
    norms_of(model, x)
    model.path = path
    with pytest.raises(NotCovered, match="used in another way than"):
        norms_of(model, x)


# Dtypes, and compiled models


class Tokens(nn.Module):
    """A class token before the others, positions, a layer scale."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm):
        super().__init__()
        self.embed = nn.Conv2d(3, 6, 2, stride=2)
        self.token, self.places = (nn.Parameter(torch.randn(1, n, 6)) for n in (1, 5))
        self.norm, self.mix = norm(6), nn.MultiheadAttention(6, 2, batch_first=True)
        self.scale, self.head = nn.Parameter(torch.randn(6)), nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        y = self.norm(x)
        x = x + self.scale * self.mix(y, y, y, need_weights=False)[0]
        return self.head(x[:, 0])


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)], ids=["float32", "bfloat16"]
)
def test_a_model_of_a_narrow_dtype(dtype, rtol, norm):
    torch.manual_seed(0)
    model = disturbed(Tokens(norm)).to(dtype)
    x = normal(3, 4, 4).to(dtype)
    found = norms_of(model, x)
    assert [g.dtype for g in found.grads] == [dtype] * len(found.grads) and found.how == ""
    assert found.squares.dtype == found.noise.dtype == torch.float64
    rows = rows_of(model.double(), x.double())
    mean, squares = rows.mean(0), rows.square().sum(1)
    torch.testing.assert_close(found.squares, squares, rtol=rtol, atol=0)
    away = (rows - mean).square().sum(1)
    torch.testing.assert_close(found.noise, away, rtol=rtol, atol=0)


@pytest.mark.parametrize("rule", [nn.Conv1d, nn.Conv3d, nn.Embedding, nn.GroupNorm])
def test_layers_of_bfloat16(rule):
    torch.manual_seed(0)
    sizes = {nn.Conv1d: (5,), nn.Conv3d: (3, 4, 5), nn.GroupNorm: (5,)}
    if rule is nn.Embedding:
        model, x = nn.Embedding(6, 3), torch.randint(6, (BATCH, 5))
    else:
        model = nn.GroupNorm(2, 4) if rule is nn.GroupNorm else rule(4, 6, 3, padding=1)
        x = normal(4, *sizes[rule]).bfloat16()
    model = model.bfloat16()
    found = norms_of(model, x)
    rows = rows_of(model.double(), x.double() if x.is_floating_point() else x)
    torch.testing.assert_close(found.squares, rows.square().sum(1), rtol=0.05, atol=0)


def test_a_compiled_model_with_a_class_token_goes_uncompiled():
    torch.manual_seed(0)
    model, x = disturbed(Tokens()), normal(3, 4, 4)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    y = torch.zeros(BATCH, 7, dtype=torch.float64)
    for _ in range(2):
        found = sample_norms(compiled, x, y, loss=F.mse_loss)
        check(found, rows_of(model, x))
    assert found.how == ""


# Written out


class Recurrent(nn.Module):
    """With an LSTM along the pixels of an image, so that gradients are written out; the slopes of
    the BatchNorm beside it are transposed."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.memory = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        slow = self.memory(x.flatten(2).mT)[0].contiguous()
        return slow * self.norm(self.conv(x)).flatten(2).mT


def test_one_sample_at_a_time_is_not_met_by_the_fault_of_batch_norm(monkeypatch):
    """PyTorch's BatchNorm on a CPU has wrong gradients for a batch of one whose slopes are
    transposed."""
    torch.manual_seed(0)
    model, x = disturbed(Recurrent()).eval(), normal(3, 2, 3)
    rows = rows_of(model, x)
    check(norms_of(model, x), rows)

    def no_vmap(*given):
        raise RuntimeError("not here")

    monkeypatch.setattr(alone, "by_vmap", no_vmap)
    persample.SEEN.clear()
    found = norms_of(model, x)
    check(found, rows)
    assert found.how


# What the first look at a model must not be misled by, or change


@pytest.mark.parametrize("bn", [None, "frozen"])
@pytest.mark.parametrize("size", [2, 3])
def test_a_dimension_may_have_the_size_of_the_few_samples_that_are_looked_at(size, bn):
    """Without bn their norms are looked at too, and are not those of samples."""

    class Second(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.transpose(0, 1)).transpose(0, 1)

    torch.manual_seed(0)
    model = Second().double()
    x = torch.randn(size, 5 - size, 4, dtype=torch.float64)  # 3 samples look at 2, 2 at 3
    for _ in range(2):
        check(norms_of(model, x, bn=bn), rows_of(model, x))


class Merging(nn.Module):
    """Folds a part of its weight into another in evaluation mode, as adapters do."""

    def __init__(self):
        super().__init__()
        self.layer, self.merged = nn.Linear(3, 3), False

    def train(self, mode: bool = True) -> "Merging":
        self.merged = not mode
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.dropout(x, training=self.training)) * (2 if self.merged else 1)


def test_what_a_model_does_when_its_mode_changes_is_not_done():
    torch.manual_seed(0)
    model, x = Merging().double().train(), normal(3)
    norms_of(model, x)
    assert not model.merged and model.training


def test_what_is_no_batch_of_tensors_is_refused():
    model, x = nn.Linear(3, 3).double(), normal(3)
    packed = nn.utils.rnn.pack_sequence([x, x[:2]])
    for given, why in (
        (packed, "the input is a PackedSequence, not a tensor"),
        (x[:1], "fewer than two samples"),
        (x[:0], "fewer than two samples"),
        (x[:, None][:, :0], r"the output \[2, 0, 3\] has no values"),
    ):
        with pytest.raises(NotCovered, match=why):
            sample_norms(model, given, torch.zeros(len(given)), loss=F.mse_loss)
