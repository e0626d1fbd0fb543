"""Mixup and cutmix against torchvision's transforms.v2, given the numbers that are drawn here; the
laws of the numbers; and runs with every change of images on, which end in the same bits however
they are interrupted, replayed or shared."""

import json
import math
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from bounds import ks, ks_limit, share_limit
from exact import EXACT
from forks import assert_same_run, final_state, finish, saved_steps, start, start_ranks
from images import CPU, noise, tree
from rows import read_rows
from said import refused, said
from tape import TapeRecorder, on_tapes
from torch.nn import functional as F
from torchvision.transforms import v2

from fastsmooth import data, models
from fastsmooth.cli.config import resolve
from fastsmooth.data.order import permutation
from fastsmooth.optim import NoisySGD
from fastsmooth.train import main
from fastsmooth.training import build
from fastsmooth.training import device as machine
from fastsmooth.training.mixing import Mixer, drawn
from fastsmooth.training.objective import labels_of
from fastsmooth.training.step import Step

MIXED = ["--mixup", "0.4", "--cutmix", "1"]
CHANGED = ["--augment", "crop-flip", "--randaugment", "2,9", "--random-erasing", "0.4"]
ALL = [*CHANGED, *MIXED]


def batch(b: int, size: int = 8, channels: int = 3, classes: int = 5):
    generator = torch.Generator().manual_seed(b)
    x = torch.randn(b, channels, size, size, generator=generator)
    y = torch.randint(classes, (b,), generator=generator)
    return x.contiguous(memory_format=torch.channels_last), y


def by_torchvision(x, y, mixup, cutmix, place, epoch=0, seed=0, classes=5):
    """The batch that begins at this place, by v2.MixUp or v2.CutMix with the numbers drawn here."""
    mix = drawn(mixup, cutmix, x.shape[2], seed, epoch, place)
    if mix.own == mix.target and not any(mix.box):
        transform = v2.MixUp(num_classes=classes)
        transform.make_params = lambda inputs: {"lam": mix.own}
    else:
        transform = v2.CutMix(num_classes=classes)
        top, left, bottom, right = mix.box
        params = {"box": (left, top, right, bottom), "lam_adjusted": mix.target}
        transform.make_params = lambda inputs: params
    return transform(x, y)


# One batch


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.3, 0.0), (0.0, 1.0), (0.3, 1.0)])
@pytest.mark.parametrize(("b", "size", "channels"), [(1, 8, 3), (2, 9, 1), (64, 32, 3)])
def test_a_batch_is_mixed_as_torchvision_mixes_it(mixup, cutmix, b, size, channels):
    x, y = batch(b, size, channels)
    before = x.clone()
    mixer = Mixer(mixup, cutmix, 0, 5, CPU)
    for place in range(0, 12 * b, b):
        mixer.draw(0, place, size)
        expected = by_torchvision(x, y, mixup, cutmix, place)
        images, shares = mixer(x, y)
        assert torch.equal(images, expected[0]) and torch.equal(shares, expected[1])
        assert shares.dtype == torch.float32 and images.dtype == x.dtype
        assert images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, before)


@pytest.mark.parametrize("size", [8, 9, 32])
def test_a_box_is_the_one_that_torchvision_makes_of_its_share_and_centre(size, monkeypatch):
    """From the same generator: whether a batch is cut, the share, x and y."""
    cut, inputs = v2.CutMix(num_classes=5), [torch.empty(2, 3, size, size)]
    clipped = 0
    for place in range(300):
        numbers = np.random.RandomState(np.random.Philox(key=7, counter=[0, place, 3, 0]))
        share, centre = numbers.beta(0.8, 0.8), iter(numbers.randint(size, size=2).tolist())
        monkeypatch.setattr(cut._dist, "sample", lambda shape, share=share: share)
        with monkeypatch.context() as patched:
            patched.setattr(torch, "randint", lambda *_, c=centre, **__: torch.tensor([next(c)]))
            expected = cut.make_params(inputs)
        own, target, (top, left, bottom, right) = drawn(0.0, 0.8, size, 7, 3, place)
        assert ((left, top, right, bottom), target) == (expected["box"], expected["lam_adjusted"])
        assert own == 1.0
        clipped += bottom - top != right - left
    assert clipped > 50


def test_before_the_first_draw_nothing_is_mixed():
    x, y = batch(4)
    images, shares = Mixer(1.0, 1.0, 0, 5, CPU)(x, y)
    assert torch.equal(images, x) and torch.equal(shares, F.one_hot(y, 5).float())


def test_an_empty_share_of_a_batch_stays_empty():
    mixer = Mixer(1.0, 1.0, 0, 5, CPU)
    mixer.draw(0, 0, 8)
    images, shares = mixer(*batch(0))
    assert images.shape == (0, 3, 8, 8) and shares.shape == (0, 5)


def test_images_in_bfloat16_are_mixed_in_float32_and_rounded_once():
    x, y = batch(16)
    mixer = Mixer(1.0, 0.0, 0, 5, CPU)
    mixer.draw(0, 0, 8)
    rounded = x.bfloat16()
    assert torch.equal(mixer(rounded, y)[0], mixer(rounded.float(), y)[0].bfloat16())


def test_the_class_of_a_mixed_image_is_that_of_its_larger_share():
    y, mixer = torch.tensor([0, 1, 2, 3]), Mixer(1.0, 0.0, 0, 5, CPU)
    for place in range(20):
        mixer.draw(0, place, 8)
        larger = y if drawn(1.0, 0.0, 8, 0, 0, place).own > 0.5 else y.roll(1)
        assert torch.equal(labels_of(mixer(batch(4)[0], y)[1]), larger)


@pytest.mark.parametrize("micro_batch", [None, 8, 5])
def test_micro_batches_are_cut_from_the_mixed_batch(micro_batch):
    """The gradient is that of torchvision's mixed batch, by plain autograd."""
    torch.manual_seed(0)
    model = models.build("resnet8", 5, "group")
    params = list(model.parameters())
    x, y = batch(24, 16)
    mixer = Mixer(0.5, 0.5, 3, 5, CPU)
    optimizer = NoisySGD(params, "sgd", 0.1)
    step = Step(model, optimizer, CPU, "fp32", False, micro_batch, mixer=mixer)
    for place in range(3):
        mixer.draw(1, place, 16)
        mixed, shares = by_torchvision(x, y, 0.5, 0.5, place, epoch=1, seed=3)
        logits = model(mixed)
        expected = torch.autograd.grad(F.cross_entropy(logits, shares), params)
        loss, correct = step.gradient(x, y)
        step.show_gradient()
        for p, g in zip(params, expected, strict=True):
            assert torch.allclose(p.grad, g, rtol=1e-3, atol=1e-5)
        assert loss.item() == pytest.approx(F.cross_entropy(logits, shares).item(), rel=1e-5)
        assert correct == (logits.argmax(1) == shares.argmax(1)).sum()


# What is drawn


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_shares_have_the_law_of_beta(alpha):
    n = 4000
    shares = np.array([drawn(alpha, 0.0, 32, 0, 1, place).own for place in range(n)])
    theirs = np.random.default_rng(0).beta(alpha, alpha, n)
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(shares.mean() - 0.5) < 4.5 * math.sqrt(variance / n)
    squares = (shares - 0.5) ** 2
    assert abs(squares.mean() - variance) < 4.5 * squares.std() / math.sqrt(n)
    assert ks(shares, theirs) < ks_limit(n, n)


def test_cut_shares_have_the_law_of_torchvisions():
    n, inputs = 1500, [torch.empty(2, 3, 32, 32)]
    torch.manual_seed(0)
    theirs = [v2.CutMix(num_classes=2).make_params(inputs) for _ in range(n)]
    ours = [drawn(0.0, 1.0, 32, 0, 0, place) for place in range(n)]
    assert ks([m.target for m in ours], [p["lam_adjusted"] for p in theirs]) < ks_limit(n, n)
    for k, side in enumerate((1, 0, 3, 2)):  # theirs begins with x
        assert ks([m.box[side] for m in ours], [p["box"][k] for p in theirs]) < ks_limit(n, n)


def test_with_both_half_of_the_batches_are_cut():
    n = 4000
    mixes = [drawn(0.2, 1.0, 32, 0, 0, place) for place in range(n)]
    cut = np.array([mix.own == 1.0 for mix in mixes])
    assert abs(cut.mean() - 0.5) < share_limit(n)
    shares = np.array([mix.own for mix in mixes])[~cut]
    assert ks(shares, np.random.default_rng(1).beta(0.2, 0.2, n)) < ks_limit(len(shares), n)


def test_other_batches_epochs_and_seeds_have_other_numbers():
    n = 2000
    keys = [(0, 0), (0, 1), (1, 0), (2**62, 0)]
    shares = [[drawn(1.0, 0.0, 32, *key, place).own for place in range(n)] for key in keys]
    shares.append(shares[0][1:] + shares[0][:1])
    assert np.abs(np.corrcoef(shares) - np.eye(5)).max() < 6 / math.sqrt(n)
    assert drawn(0.3, 0.7, 32, 5, 6, 7) == drawn(0.3, 0.7, 32, 5, 6, 7)


@pytest.mark.parametrize("alpha", [1e-100, 1e-3, 1e3, 1e100])
def test_extreme_alphas_give_shares(alpha):
    for mixup, cutmix in ((alpha, 0.0), (0.0, alpha)):
        for place in range(50):
            mix = drawn(mixup, cutmix, 8, 2**63 - 1, 10**6, place)
            assert 0 <= mix.target <= 1 and 0 <= mix.own <= 1
            assert all(0 <= edge <= 8 for edge in mix.box)


# Runs


def run(out, *flags: str):
    length = [] if {"--epochs", "--budget"} & set(flags) else ["--epochs", "1"]
    base = [*EXACT, *length, "--batchsize", "128", "--device", "cpu", "--log-every", "1"]
    assert main([*base, *flags, "--out", str(out)]) == 0
    return out


def losses(out) -> list[float]:
    return [row["train_loss"] for row in read_rows(out) if row["kind"] == "step"]


@pytest.mark.parametrize("world", [1, 2])
def test_an_update_trains_on_the_mixed_shares_of_the_processes(world, tmp_path):
    """The loss of the first update, by plain PyTorch: each process mixes its share with itself, by
    the numbers of the batch."""
    argv = ["--budget", "updates=1", "--batchsize", "63", "--log-every", "1", "--norm", "group"]
    argv += MIXED
    finish(argv, tmp_path / "run", world)
    images = data.open_data(resolve({}), CPU)
    torch.manual_seed(0)
    model = models.build("resnet8", 10, "group")
    order = permutation(0, 0, 1437)[:63]
    total = torch.zeros(())
    for rank in range(world):
        x, y = next(images.train.batches([order[rank::world]]))
        mixed, shares = by_torchvision(x, y, 0.4, 1.0, 0, classes=10)
        total += F.cross_entropy(model(mixed), shares, reduction="sum")
    assert losses(tmp_path / "run")[0] == pytest.approx(total.item() / 63, rel=1e-5)


def test_every_batch_has_numbers_of_its_own_place(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(Mixer, "draw", lambda self, *place: asked.append(place))
    flags = ["--method", "batch", "--decay-epoch", "1", "--epochs", "2", "--batchsize", "400"]
    run(tmp_path / "run", *MIXED, *flags)
    sizes = [row["batch_size"] for row in epoch_rows(tmp_path / "run")]
    assert sizes[0] == 400 < sizes[1]
    assert asked == [(e, at, 8) for e in (0, 1) for at in range(0, 1437, sizes[e])]


def epoch_rows(out) -> list[dict]:
    return [row for row in read_rows(out) if row["kind"] == "epoch"]


def test_test_images_are_never_mixed_nor_changed(tmp_path):
    """A rate that moves no weight leaves the test loss of a run without."""
    flags = ["--lr", "1e-60", "--norm", "group"]
    plain, mixed = run(tmp_path / "plain", *flags), run(tmp_path / "mixed", *flags, *ALL)
    one, other = (epoch_rows(out)[0] for out in (plain, mixed))
    assert one["test_loss"] == other["test_loss"] and one["train_loss"] != other["train_loss"]


LOADED = {
    "resident": [],
    "threads": ["--loader", "threads", "--chunk", "100", "--workers", "1"],
    "torch": ["--loader", "torch", "--chunk", "50", "--workers", "0"],
}


def test_every_loader_ends_in_the_same_weights(tmp_path):
    few = ["--budget", "updates=4", *ALL]
    whole = run(tmp_path / "resident", *few)
    for name in ("threads", "torch"):
        other = run(tmp_path / name, *few, *LOADED[name])
        assert losses(other) == losses(whole)
        for key, value in final_state(whole)["model"].items():
            assert torch.equal(final_state(other)["model"][key], value), key


def killed(argv: list[str], out, world: int, after: int) -> None:
    """Start a run and kill it within an epoch, once it has saved update `after`."""
    processes = [start(argv, out)] if world == 1 else start_ranks(argv, out, world)
    until = time.monotonic() + 60
    while not out.exists() or not [s for s in saved_steps(out) if s >= after]:
        assert time.monotonic() < until
        time.sleep(0.005)
    for process in processes:
        os.kill(process.pid, signal.SIGKILL)
        process.join()


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        pytest.param(1, [], marks=pytest.mark.full),
        (1, [*LOADED["threads"], "--micro-batch", "64"]),
        (2, ["--micro-batch", "32"]),
    ],
    ids=["one process", "chunks and micro-batches", "two processes"],
)
def test_a_run_killed_within_an_epoch_goes_on_in_the_same_bits(world, flags, tmp_path):
    argv = [*EXACT, "--epochs", "2", "--batchsize", "128", "--checkpoint-every", "5", *ALL, *flags]
    argv += ["--optimizer", "shb", "--lr", "0.02", "--log-every", "3"]
    finish(argv, tmp_path / "whole", world)
    killed(argv, tmp_path / "parted", world, 5)
    assert saved_steps(tmp_path / "parted")[-1] % 12  # updates an epoch
    finish([*argv, "--resume"], tmp_path / "parted", world)
    assert_same_run(tmp_path / "parted", tmp_path / "whole")


@pytest.mark.parametrize(
    "flags",
    [
        ["--random-erasing", "0.5", *MIXED],  # by a cursor
        [*ALL, "--micro-batch", "64"],
        pytest.param([*ALL, *LOADED["threads"]], marks=pytest.mark.full),
    ],
    ids=["cursor", "no cursor", "threads"],
)
def test_replayed_updates_end_in_the_bits_of_ordinary_ones(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "CudaRecorder", TapeRecorder)
    monkeypatch.setattr(machine, "choose_graphs", lambda c, *others: c.graphs)
    outs = [run(tmp_path / graphs, *flags, "--graphs", graphs) for graphs in ("off", "on")]
    assert_same_run(*outs)
    assert json.loads((outs[1] / "summary.json").read_text())["captured_graphs"] > 0


@pytest.mark.full
def test_two_processes_replay_their_mixed_shares(tmp_path):
    argv = ["--batchsize", "64", "--epochs", "2", "--device", "cpu", *ALL]
    for how in ("off", "on"):
        finish([*argv, "--graphs", how], tmp_path / how, 2, on_tapes)
    assert json.loads((tmp_path / "on" / "summary.json").read_text())["captured_graphs"] == 1
    assert_same_run(tmp_path / "on", tmp_path / "off")


def test_images_of_several_sizes_are_mixed_at_their_size(tmp_path, monkeypatch):
    images = {f"{s}/{c}/{k}.png": noise() for s in ("train", "val") for c in "ab" for k in range(8)}
    folder = tree(tmp_path / "images", images)
    mixed = []

    class Seen(Mixer):
        def draw(self, epoch, place, size):
            super().draw(epoch, place, size)
            mixed.append([epoch, size])

        def __call__(self, x, y):
            mixed[-1].append(x.shape[2])
            return super().__call__(x, y)

    monkeypatch.setattr(build, "Mixer", Seen)
    flags = ["--dataset", "folder", "--data-dir", str(folder), "--model", "resnet8"]
    flags += ["--image-size", "16 @0, 24 @1", "--batchsize", "8", "--epochs", "2", *ALL]
    run(tmp_path / "run", *flags)
    assert mixed == [[0, 16, 16]] * 2 + [[1, 24, 24]] * 2


def test_a_mixed_run_says_what_its_numbers_are_of(tmp_path):
    line = ["--budget", "updates=1", "--out", str(tmp_path / "run"), "--batchsize", "256"]
    found = said(main, [*line, *ALL])
    assert found.code == 0
    assert "augmented by crop-flip, randaugment 2,9, random erasing 0.4" in found.out
    assert (
        "training batches are mixed by mixup 0.4 or cutmix 1, as often one as the other: "
        "train_loss and train_acc are of mixed images"
    ) in found.out
    shutil.rmtree(tmp_path / "run")
    found = said(main, line)
    assert "no augmentation" in found.out and "batches are mixed" not in found.out


# What is refused


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--mixup -1", "--mixup: -1 is out of range"),
        ("--cutmix inf", "--cutmix: inf is not a finite number"),
        ("--mixup 1e300", "--mixup: 1e300 cannot be computed with"),
        ("--mixup 0.2 --mode critical", "--mode critical measures the noise of independent"),
        ("--cutmix 1 --mode sampling --steps 3", "--mode sampling measures the noise of"),
        ("--cutmix 1 --track-noise every=5", "--track-noise every=5 measures the noise of"),
        ("--mixup 0.2 --batchsize 1", "--mixup mixes the images of a batch, and --batchsize 1 has"),
        ("--mixup-alpha 0.2", "fastsmooth calls it --mixup"),
        ("--cutmix-minmax 0.2", "fastsmooth has no --cutmix-minmax: --mixup X and --cutmix X"),
    ],
)
def test_what_has_no_meaning_is_refused_in_a_line(words, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert part in refused(main, words.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [{"mixup": 0.2}, {"cutmix": 1.0}])
def test_published_constants_are_of_batches_that_are_not_mixed(flags):
    assert resolve({"dataset": "cifar100"}).c2 == 1280
    assert resolve({"dataset": "cifar100"} | flags).c2 is None
