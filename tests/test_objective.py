"""What a run minimises and tells of the test images: the losses beside timm's, the five likeliest
classes beside its accuracy, and what is said of them."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from images import noise, tree
from rows import read_rows
from said import refused, said
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy
from timm.utils import accuracy
from torch.nn import functional as F

from fastsmooth import data, models, sharpness
from fastsmooth.cli.config import resolve
from fastsmooth.data.order import permutation
from fastsmooth.noise.losses import mean_loss
from fastsmooth.optim import NoisySGD
from fastsmooth.ranks import Ranks
from fastsmooth.train import main
from fastsmooth.training import measuring
from fastsmooth.training.objective import Objective, among_likeliest, objective_of
from fastsmooth.training.step import Step

CPU = torch.device("cpu")
CLASSES = 7
LOSSES = {
    "bce": ({"loss": "bce"}, BinaryCrossEntropy(smoothing=0.0)),
    # timm's default
    "bce smoothed": ({"loss": "bce", "label_smoothing": 0.1}, BinaryCrossEntropy()),
    "smoothed": ({"label_smoothing": 0.1}, LabelSmoothingCrossEntropy(0.1)),
    "plain": ({}, torch.nn.CrossEntropyLoss()),
}


def batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(11, CLASSES, generator=numbers, dtype=torch.float64)
    return logits, torch.randint(CLASSES, (11,), generator=numbers)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_gradients_are_those_of_timm(name):
    flags, theirs = LOSSES[name]
    ours = objective_of(resolve(flags), CPU).training
    logits, y = batch()
    slopes = []
    for loss in (ours, theirs):
        x = logits.clone().requires_grad_()
        value = loss(x, y)
        slopes.append((value.detach(), torch.autograd.grad(value, x)[0]))
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_means_of_what_single_samples_have(name):
    loss = objective_of(resolve(LOSSES[name][0]), CPU).training
    logits, y = batch()
    alone = torch.stack([loss(x[None], t[None]) for x, t in zip(logits, y, strict=True)])
    torch.testing.assert_close(loss(logits, y, reduction="none"), alone, rtol=1e-12, atol=0)
    torch.testing.assert_close(mean_loss(loss, logits, y), alone.mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_label_and_its_share_of_one_are_the_same_target(name):
    loss = objective_of(resolve(LOSSES[name][0]), CPU).training
    logits, y = batch()
    shares = F.one_hot(y, CLASSES).double()
    torch.testing.assert_close(loss(logits, shares), loss(logits, y), rtol=1e-12, atol=0)


def test_smoothing_of_mixed_labels_is_the_mixture_of_smoothed_ones():
    """As timm's mixup makes its targets."""
    logits, y = batch()
    _, other = batch(1)
    share = torch.tensor(0.3, dtype=torch.float64)
    mixed = share * F.one_hot(y, CLASSES) + (1 - share) * F.one_hot(other, CLASSES)
    for flags in ({"label_smoothing": 0.1}, {"loss": "bce", "label_smoothing": 0.1}):
        loss = objective_of(resolve(flags), CPU).training
        apart = share * loss(logits, y) + (1 - share) * loss(logits, other)
        torch.testing.assert_close(loss(logits, mixed), apart, rtol=1e-12, atol=0)


def test_tests_are_by_plain_cross_entropy_whatever_is_minimised():
    for flags, _ in LOSSES.values():
        assert objective_of(resolve(flags), CPU).testing is F.cross_entropy


def test_a_run_trains_on_its_loss_and_is_tested_by_cross_entropy(tmp_path):
    """One update at a tiny lr, so that both are known of the weights at the beginning."""
    flags = ["--loss", "bce", "--label-smoothing", "0.1", "--lr", "1e-30", "--top5"]
    flags += ["--budget", "updates=1", "--batchsize", "1437", "--norm", "group"]
    shown = said(main, [*flags, "--out", str(tmp_path / "run")])
    assert shown.code == 0, shown
    c = resolve({"norm": "group"})
    torch.manual_seed(0)
    images = data.open_data(c, CPU)
    model = models.build("resnet8", 10, "group")
    (x, y), (tx, ty) = (
        next(iter(part.batches([torch.arange(len(part))]))) for part in (images.train, images.test)
    )
    with torch.no_grad():
        logits, tested = model(x), model.eval()(tx)
    (row,) = (row for row in read_rows(tmp_path / "run") if row["kind"] == "epoch")
    assert row["train_loss"] == pytest.approx(BinaryCrossEntropy()(logits, y).item(), rel=1e-5)
    assert row["test_loss"] == pytest.approx(F.cross_entropy(tested, ty).item(), rel=1e-5)
    first, fifth = (share.item() / 100 for share in accuracy(tested, ty, (1, 5)))
    assert row["test_acc"] == pytest.approx(first) and row["test_top5"] == pytest.approx(fifth)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["final_test_top5"] == row["test_top5"] > row["test_acc"]
    assert "binary cross-entropy of each class with label smoothing 0.1" in shown.out
    assert f"top-5 {fifth:.2%}" in shown.out
    assert f"within the five likeliest {fifth:.2%} in the end" in shown.out
    # and what measures saved runs says which loss it takes
    shown = said(sharpness.main, [str(tmp_path / "run"), "--samples", "128", "--n-iters", "1"])
    assert shown.code == 0 and "its sharpness is that of cross-entropy" in shown.err, shown
    (entry,) = json.loads((tmp_path / "run" / "sharpness.json").read_text())["results"]
    assert entry["loss"] == "cross-entropy"


def test_the_five_likeliest_classes_are_counted_as_timm_counts():
    for seed in range(5):
        logits, y = batch(seed)
        (share,) = accuracy(logits, y, (5,))
        assert among_likeliest(logits, y, 5).item() == pytest.approx(share.item() * 11 / 100)
    assert among_likeliest(torch.eye(9), torch.arange(9), 5) == 9
    assert among_likeliest(-torch.eye(9), torch.arange(9), 5) == 0


@pytest.mark.parametrize("top5", [False, True])
def test_an_evaluation_counts_every_image_once(top5):
    c = resolve({})
    images = data.open_data(c, CPU)
    model = models.build("resnet8", 10)
    step = Step(model, NoisySGD(model.parameters(), "sgd", 0.1), CPU, "fp32", False, top5=top5)
    batches = lambda size: images.test.batches(torch.arange(360).split(size))  # noqa: E731
    found = step.evaluate(batches(77))
    whole = step.evaluate(batches(360))
    assert found[1:] == whole[1:] and math.isclose(found.loss, whole.loss, rel_tol=1e-5)
    assert (found.top5 is not None) == top5


def test_without_the_flag_no_row_has_the_column(tmp_path):
    assert main(["--budget", "updates=1", "--out", str(tmp_path / "run")]) == 0
    (row,) = (row for row in read_rows(tmp_path / "run") if row["kind"] == "epoch")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for found in (row, summary):
        assert not [name for name in found if "top5" in name or "ema" in name]


def test_four_classes_have_no_five_likeliest(tmp_path):
    folder = tmp_path / "images"
    places = [(s, k, i) for s in ("train", "test") for k in range(4) for i in range(3)]
    tree(folder, {f"{s}/{k}/{i}.png": noise((8, 8)) for s, k, i in places})
    message = refused(main, ["--data-dir", str(folder), "--top5", "--out", str(tmp_path / "run")])
    assert message.startswith("--top5: folder has 4 classes"), message
    assert not (tmp_path / "run").exists()


def test_the_function_that_is_measured_is_named_and_is_the_one_that_trains():
    c = resolve({"loss": "bce", "label_smoothing": 0.2, "norm": "group"})
    model = models.build("resnet8", 10, "group")
    optimizer = NoisySGD(model.parameters(), "sgd", 0.1)
    step = Step(model, optimizer, CPU, "fp32", False, objective=objective_of(c, CPU))
    x, y = torch.randn(6, 3, 8, 8), torch.arange(6)
    expected = BinaryCrossEntropy(smoothing=0.2)(model(x), y)
    torch.testing.assert_close(step.measured_loss(x, y), expected)

    run = SimpleNamespace(config=c, plan=SimpleNamespace(images=1437), step=step, ranks=Ranks())
    words = measuring.function_measured(run, 100)
    assert words.startswith(
        "mean binary cross-entropy of each class with label smoothing 0.2 over the 1,437"
    )


def test_the_noise_of_the_smoothed_loss_is_measured(tmp_path):
    """C2 of --track-noise beside gradients of single samples by autograd, of the loss that
    trains."""
    flags = ["--loss", "bce", "--label-smoothing", "0.1", "--norm", "group", "--batchsize", "16"]
    flags += ["--track-noise", "every=1", "--budget", "updates=1"]
    assert main([*flags, "--out", str(tmp_path / "run")]) == 0
    (row,) = (row for row in read_rows(tmp_path / "run") if row["kind"] == "measure")
    torch.manual_seed(0)
    c = resolve({"norm": "group", "batch_size": 16})
    images = data.open_data(c, CPU)
    model = models.build("resnet8", 10, "group")
    index = permutation(0, 0, 1437)[:16]
    x, y = next(iter(images.train.batches([index], 0)))
    rows = []
    for i in range(16):
        loss = BinaryCrossEntropy()(model(x[i : i + 1]), y[i : i + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in grads]).double())
    stacked = torch.stack(rows)
    distances = (stacked - stacked.mean(0)).square().sum(1)
    # without replacement from 1437: SPEC's correction is (n - 1) / n
    c2 = distances.sum().item() / 15 * 1436 / 1437
    assert row["c2_sampled"] == pytest.approx(c2, rel=1e-4)
    assert row["grad_norm"] == pytest.approx(stacked.mean(0).norm().item(), rel=1e-4)


def test_the_loss_of_a_step_is_plain_cross_entropy_where_no_flag_says_otherwise():
    assert objective_of(resolve({}), CPU) == Objective()
    assert resolve({}).loss_in_words == "cross-entropy"
