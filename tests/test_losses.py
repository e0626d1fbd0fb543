"""Losses that are means over samples beside one backward pass a sample, and losses that are not."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastsmooth.noise import estimators
from fastsmooth.noise.gradients import full_gradient
from fastsmooth.noise.losses import NotCovered, mean_loss
from fastsmooth.noise.online import NoiseTracker
from fastsmooth.noise.persample import sample_norms
from fastsmooth.optim import NoisySGD
from fastsmooth.schedule import Point

SIZE, CLASSES = 9, 4


def huber_by_hand(output, target):
    """A value a sample, and no reduction at all."""
    return F.smooth_l1_loss(output, target, reduction="none").mean(dim=1)


def focal(output, target, reduction="mean"):
    log_p = -F.cross_entropy(output, target, reduction="none")
    values = -((1 - log_p.exp()) ** 2) * log_p
    return values.mean() if reduction == "mean" else values


def any_keywords(output, target, **options):
    return F.cross_entropy(output, target, **options)


class Rooted(nn.Module):
    """A module of one's own with a reduction."""

    reduction = "mean"

    def forward(self, output, target):
        values = (1 + F.mse_loss(output, target, reduction="none").sum(1)).sqrt()
        return values.mean() if self.reduction == "mean" else values


LABELS = torch.arange(SIZE) % CLASSES
SOFT = torch.softmax(torch.randn(SIZE, CLASSES, dtype=torch.float64).mul(2), dim=1)
NUMBERS = torch.randn(SIZE, CLASSES, dtype=torch.float64)
COVERED = {
    "cross_entropy": (F.cross_entropy, LABELS),
    "class probabilities": (F.cross_entropy, SOFT),
    "label smoothing": (functools.partial(F.cross_entropy, label_smoothing=0.1), LABELS),
    "smoothed probabilities": (functools.partial(F.cross_entropy, label_smoothing=0.2), SOFT),
    "CrossEntropyLoss": (nn.CrossEntropyLoss(), LABELS),
    "CrossEntropyLoss, smoothed": (nn.CrossEntropyLoss(label_smoothing=0.1), LABELS),
    "CrossEntropyLoss, none": (nn.CrossEntropyLoss(reduction="none"), LABELS),
    "mse_loss": (F.mse_loss, NUMBERS),
    "MSELoss": (nn.MSELoss(), NUMBERS),
    "L1Loss": (nn.L1Loss(), NUMBERS),
    "binary cross-entropy": (F.binary_cross_entropy_with_logits, SOFT),
    "a value a sample": (huber_by_hand, NUMBERS),
    "with a reduction": (focal, LABELS),
    "with any keywords": (any_keywords, LABELS),
    "module of one's own": (Rooted(), NUMBERS),
}


def network(outputs: int = CLASSES, flat: bool = False) -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten()]
    layers += [nn.Linear(36, outputs)] + ([nn.Flatten(0)] if flat else [])
    return nn.Sequential(*layers).double()


def inputs() -> torch.Tensor:
    return torch.randn(SIZE, 3, 5, 5, generator=torch.Generator().manual_seed(2)).double()


def rows_of(model, loss, x, y) -> torch.Tensor:
    """[B, P]: the gradient of each sample's loss, from a batch of its own."""
    rows = []
    for i in range(len(x)):
        value = loss(model(x[i : i + 1]), y[i : i + 1]).mean()
        grads = torch.autograd.grad(value, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def check(model, loss, x, y):
    rows = rows_of(model, loss, x, y)
    mean = rows.mean(dim=0)
    norms = sample_norms(model, x, y, loss=loss)
    torch.testing.assert_close(norms.squares, rows.square().sum(1), rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(norms.noise, (rows - mean).square().sum(1), rtol=1e-9, atol=1e-14)
    flat = torch.cat([g.flatten() for g in norms.grads])
    torch.testing.assert_close(flat, mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(norms.loss, loss(model(x), y).mean().detach(), rtol=1e-12, atol=0)

    variance = (rows - mean).square().sum().item() / (len(x) - 1)
    c2 = estimators.per_sample(norms.noise)
    assert c2.value == pytest.approx(variance, rel=1e-9) and c2.error > 0
    parts = [(x[:4], y[:4]), (x[4:], y[4:])]
    full = torch.cat([g.flatten() for g in full_gradient(model, parts, loss=loss)])
    torch.testing.assert_close(full, mean, rtol=1e-9, atol=1e-12)

    optimizer = NoisySGD(model.parameters(), "sgd", 0.1)
    for estimator in ("per-sample", "micro-batch"):
        tracker = NoiseTracker(
            model, optimizer, samples=1000, every=1, loss=loss, estimator=estimator
        )
        row = tracker(x, y, Point(0.1, len(x), 0.0))
        assert row["grad_norm"] == pytest.approx(mean.norm().item(), rel=1e-9)
        if estimator == "per-sample":
            assert row["c2_sampled"] == pytest.approx(variance * 999 / 1000, rel=1e-9)
    halves = [rows[index].mean(0) for index in torch.arange(len(x)).tensor_split(4)]
    sizes = [len(part) for part in torch.arange(len(x)).tensor_split(4)]
    between = sum(m * (h - mean).square().sum() for m, h in zip(sizes, halves, strict=True)) / 3
    assert row["c2_sampled"] == pytest.approx(between.item() * 999 / 1000, rel=1e-9)


@pytest.mark.parametrize("name", COVERED)
def test_norms_and_variance_are_those_of_one_backward_pass_a_sample(name):
    loss, y = COVERED[name]
    reduction = getattr(loss, "reduction", None)
    check(network(), loss, inputs(), y)
    assert getattr(loss, "reduction", None) == reduction  # a module has its own back


def test_outputs_of_one_number_a_sample():
    check(network(1, flat=True), F.mse_loss, inputs(), NUMBERS[:, 0])
    check(network(1), nn.MSELoss(), inputs(), NUMBERS[:, :1])


def test_several_values_a_sample_are_averaged_as_the_mean_does():
    torch.manual_seed(0)
    output, target = torch.randn(5, CLASSES, 3, 2), torch.randint(CLASSES, (5, 3, 2))
    expected = F.cross_entropy(output, target)
    assert mean_loss(F.cross_entropy, output, target) == expected
    values = functools.partial(F.cross_entropy, reduction="none")
    torch.testing.assert_close(mean_loss(values, output, target), expected)


def weighted(output, target, reduction="mean"):
    return F.cross_entropy(
        output, target, torch.tensor([1.0, 2, 3, 4]).double(), reduction=reduction
    )


def contrastive(output, target):
    """Each sample beside all others of the batch."""
    return F.cross_entropy(output @ output.T, torch.arange(len(output)), reduction="none")


class Constant(nn.Module):
    """A module that gives one number and has no reduction."""

    def forward(self, output, target):
        return F.cross_entropy(output, target)


REFUSED = {
    "a sum": (nn.CrossEntropyLoss(reduction="sum"), LABELS, "a sum, or a mean weighted"),
    "class weights": (
        nn.CrossEntropyLoss(torch.tensor([1.0, 2, 3, 4]).double()),
        LABELS,
        "class weights",
    ),
    "class weights inside": (weighted, LABELS, "the loss weighted gives .* class weights"),
    "ignore_index": (nn.CrossEntropyLoss(ignore_index=2), LABELS, "ignore_index"),
    "ignored by default": (
        F.cross_entropy,
        LABELS.masked_fill(LABELS == 1, -100),
        "the loss cross_entropy gives",
    ),
    "no reduction": (
        lambda output, target: F.cross_entropy(output, target),
        LABELS,
        'one number for the whole batch and has no reduction: .* reduction="none"',
    ),
    "a module without one": (Constant(), LABELS, "the loss Constant .* has no reduction"),
    "a deaf reduction": (
        lambda output, target, reduction=None: F.cross_entropy(output, target),
        LABELS,
        r"gives \[\] for \d samples, not \[\d\]",
    ),
    "batch last": (
        lambda output, target: F.mse_loss(output, target, reduction="none").T,
        NUMBERS,
        r"gives \[4, \d\] for \d samples",
    ),
    "mixing": (contrastive, LABELS, "another value in another batch"),
    # outputs [9, 1] less targets [9] are [9, 9]
    "broadcast": (F.mse_loss, NUMBERS[:, 0], "another value in another batch"),
    "batchmean": (nn.KLDivLoss(reduction="batchmean"), SOFT, "not the mean over the samples"),
    "no tensor": (lambda output, target: 1.0, LABELS, "gives a float, not a tensor"),
}


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_mean_over_samples_is_refused_in_words(name):
    loss, y, words = REFUSED[name]
    reduction = getattr(loss, "reduction", None)
    model, x = network(1 if name == "broadcast" else CLASSES), inputs()
    optimizer = NoisySGD(model.parameters(), "sgd", 0.1)
    tracker = NoiseTracker(model, optimizer, samples=100, every=1, loss=loss)
    for measure in (
        lambda: sample_norms(model, x, y, loss=loss),
        lambda: full_gradient(model, [(x, y)], loss=loss),
        lambda: tracker(x, y, Point(0.1, SIZE, 0.0)),
    ):
        with pytest.raises(NotCovered, match=words):
            measure()
    assert getattr(loss, "reduction", None) == reduction


def test_a_module_has_its_reduction_back_after_an_error():
    loss = nn.CrossEntropyLoss()
    loss.register_forward_pre_hook(
        lambda module, given: (
            (_ for _ in ()).throw(KeyError) if module.reduction == "none" else None
        )
    )
    with pytest.raises(KeyError):
        mean_loss(loss, torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))
    assert loss.reduction == "mean"


def test_a_model_that_gives_several_tensors_is_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(x), x

    with pytest.raises(NotCovered, match="gives a tuple, not a tensor"):
        sample_norms(Two(), torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))


def test_a_penalty_on_the_weights_in_the_loss_is_refused():
    model = network()

    def penalised(output, target):
        penalty = sum(p.square().sum() for p in model.parameters())
        return F.cross_entropy(output, target, reduction="none") + 0.01 * penalty

    with pytest.raises(NotCovered, match="is used by square"):
        sample_norms(model, inputs(), LABELS, loss=penalised)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_reason_to_refuse(dtype):
    torch.manual_seed(0)
    for size, classes in ((2, 3), (1000, 1000), (4097, 10)):
        output, target = 30 * torch.randn(size, classes), torch.randint(classes, (size,))
        soft = torch.softmax(3 * torch.randn(size, classes), dim=1)
        for loss, y in (
            (F.cross_entropy, target),
            (F.cross_entropy, soft.to(dtype)),
            (nn.CrossEntropyLoss(label_smoothing=0.1), target),
            (F.mse_loss, soft.to(dtype)),
        ):
            assert mean_loss(loss, output.to(dtype), y).isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_of_classes_are_found_in_half_precision_too(dtype):
    torch.manual_seed(0)
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.2], dtype=dtype))
    output, y = torch.randn(32, 3).to(dtype), torch.arange(32) % 3
    with pytest.raises(NotCovered, match="weighted by class weights"):
        mean_loss(loss, output, y)
    same = nn.CrossEntropyLoss()
    assert mean_loss(same, output, y) == same(output, y)


def test_what_is_not_finite_is_not_called_a_wrong_loss():
    output, target = torch.full((6, 3), torch.nan), torch.zeros(6, dtype=torch.int64)
    assert mean_loss(F.cross_entropy, output, target).isnan()


def test_one_ignored_target_among_many_is_found():
    torch.manual_seed(0)
    output, target = torch.randn(20_000, 3), torch.randint(3, (20_000,))
    target[7] = -100
    with pytest.raises(NotCovered, match="ignore_index"):
        mean_loss(F.cross_entropy, output, target)
