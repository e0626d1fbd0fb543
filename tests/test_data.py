"""The loaders give equal batches, whoever asks in whatever pieces; the digits are what their
licence says."""

import importlib.util
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from images import HAS_DALI, LOADERS, epoch_batches, every_batch, one_line, opened, solid, tree
from PIL import Image
from torchvision import transforms as T

from fastsmooth.data import DataError, sets
from fastsmooth.data.engines import dali

ROOT = Path(__file__).parents[1]


def assert_equal_batches(ours, theirs, other_pixels: float = 0) -> None:
    """`other_pixels` is the share of pixels that may differ."""
    for (x, y), (u, v) in zip(ours, theirs, strict=True):
        assert x.dtype == u.dtype == torch.float32 and y.dtype == v.dtype == torch.int64
        assert x.is_contiguous(memory_format=torch.channels_last) and x.stride() == u.stride()
        assert torch.equal(y, v) and (x != u).any(1).float().mean() <= other_pixels


@pytest.mark.parametrize("kind", ["none", "crop-flip", "crop-flip-rotate"])
@pytest.mark.parametrize("workers", [0, 2])
def test_both_loaders_give_equal_batches(kind, workers):
    resident = opened(augment=kind, seed=5)
    plain = opened("torch", workers, augment=kind, seed=5)
    for split, epoch in [("train", 0), ("train", 3), ("train", None), ("test", None)]:
        ours, theirs = (
            every_batch(getattr(data, split), 100, 5, epoch) for data in (resident, plain)
        )
        assert_equal_batches(ours, theirs)
        assert sum(len(y) for _, y in ours) == {"train": 1437, "test": 360}[split]
    augmented, as_stored = (
        torch.cat([x for x, _ in every_batch(resident.train, 100, 5, e)]) for e in (0, None)
    )
    assert torch.equal(augmented, as_stored) == (kind == "none")


@pytest.mark.parametrize("workers", [0, 2])
def test_both_loaders_give_equal_batches_of_decoded_files(cifar_folder, tmp_path, workers):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for name in ("apple", "bear", "bowl"):
            (tmp_path / split / name).symlink_to(cifar_folder / split / name)
    given = {"dataset": "folder", "data_dir": str(tmp_path), "augment": "crop-flip-rotate"}
    resident, plain = opened(**given), opened("torch", workers, **given)
    assert resident.fingerprint == plain.fingerprint
    for split, epoch in [("train", 1), ("test", None)]:
        ours, theirs = (
            every_batch(getattr(data, split), 70, 0, epoch) for data in (resident, plain)
        )
        assert_equal_batches(ours, theirs)


@pytest.mark.parametrize(("loader", "workers"), LOADERS)
def test_a_sample_looks_the_same_at_any_batch_size(loader, workers):
    train = opened(loader, workers, augment="crop-flip-rotate").train
    whole = every_batch(train, 1437, epoch=2)
    # where a rotation puts a pixel's centre on an edge between two, DALI's rounding may take the
    # other
    resident = every_batch(opened(augment="crop-flip-rotate").train, 1437, epoch=2)
    assert_equal_batches(whole, resident, other_pixels=0.0005 if loader == "dali" else 0)
    for batch_size in (10, 64, 1000):
        x, y = (
            torch.cat(parts) for parts in zip(*every_batch(train, batch_size, epoch=2), strict=True)
        )
        assert_equal_batches([(x.contiguous(memory_format=torch.channels_last), y)], whole)


@pytest.mark.parametrize(("loader", "workers"), LOADERS)
def test_an_epoch_looks_the_same_from_wherever_it_is_taken_up(loader, workers):
    train = opened(loader, workers, augment="crop-flip-rotate").train
    whole = every_batch(train, 100, epoch=3)
    rest = list(train.batches(epoch_batches(0, 3, len(train), 100, start=1100), 3))
    assert_equal_batches(rest, whole[11:])


@pytest.mark.parametrize(("loader", "workers"), LOADERS)
def test_every_epoch_augments_anew_and_the_same_epoch_alike(loader, workers):
    train = opened(loader, workers, augment="crop-flip-rotate").train
    first, second, again = (
        next(train.batches([torch.arange(200)], epoch))[0] for epoch in (0, 1, 0)
    )
    assert torch.equal(first, again)
    same = (first == second).flatten(1).all(1).float().mean()
    assert same < 0.1  # 1 in 18 shares offsets and flip, and then differs by the angle


@pytest.mark.parametrize(("loader", "workers"), LOADERS)
def test_a_pass_inside_another_pass_disturbs_neither(loader, workers):
    train = opened(loader, workers, augment="crop-flip").train
    outer_expected, inner_expected = (
        every_batch(train, 300, epoch=1),
        every_batch(train, 500, epoch=2),
    )
    outer = []
    for batch in train.batches(epoch_batches(0, 1, len(train), 300), 1):
        outer.append(batch)
        if len(outer) in (1, 3):
            assert_equal_batches(every_batch(train, 500, epoch=2), inner_expected)
    assert_equal_batches(outer, outer_expected)
    assert_equal_batches(every_batch(train, 300, epoch=1), outer_expected)


@pytest.mark.parametrize(("loader", "workers"), LOADERS)
def test_a_pass_that_was_abandoned_leaves_nothing_behind(loader, workers):
    train = opened(loader, workers).train
    expected = every_batch(train, 100, epoch=1)
    for stop in (1, 2, 9):
        list(itertools.islice(train.batches(epoch_batches(7, 0, len(train), 50), 0), stop))
        assert_equal_batches(every_batch(train, 100, epoch=1), expected)
    kept = train.batches(epoch_batches(7, 0, len(train), 50), 0)  # neither ended nor closed
    next(kept)
    assert_equal_batches(every_batch(train, 100, epoch=1), expected)


@pytest.mark.parametrize(("loader", "workers"), LOADERS)
def test_batches_hold_the_images_and_labels_that_were_asked_for(loader, workers):
    data = opened(loader, workers)
    images = sets.digits(None)
    index = torch.tensor([5, 0, 1436, 5])
    ((x, y),) = data.train.batches([index])
    for got, label, i in zip(x, y, index.tolist(), strict=True):
        expected = T.Normalize(images.mean, images.std)(
            T.ToTensor()(Image.fromarray(images.train.pixels[i]))
        )
        assert torch.equal(got, expected) and label == images.train.labels[i]


@pytest.mark.parametrize("installed", [False, True])
def test_the_resident_loader_is_chosen_where_the_images_fit(monkeypatch, tmp_path, installed):
    if installed and not HAS_DALI:
        pytest.skip("DALI is not installed")
    monkeypatch.setattr(dali, "available", lambda: installed)
    assert opened("auto").choice.startswith("loader resident: ")
    monkeypatch.setattr("fastsmooth.data.free_memory", lambda device: 800_000)
    # 0.345 MB of digits, and 0.32 MB allowed
    assert opened("auto").choice.startswith("loader threads: ")
    monkeypatch.setattr("fastsmooth.data.free_memory", lambda device: 900_000)
    assert opened("auto").choice.startswith("loader resident: ")
    tree(tmp_path, {"train/a/1.png": solid(), "train/b/1.png": solid(), "val/a/1.png": solid()})
    choice = opened("auto", dataset="imagenet", data_dir=str(tmp_path)).choice
    assert choice.startswith(f"loader {'dali' if installed else 'threads'}: ") and "crops" in choice
    assert ("pip install 'fastsmooth[dali]'" in choice) == (not installed)
    assert opened("threads").choice == "loader threads: as asked, 1 thread, chunks of 512"


def test_a_system_that_does_not_say_what_memory_is_free_still_trains(monkeypatch):
    def unknown(name):
        raise ValueError("unrecognized configuration name")  # as macOS answers SC_AVPHYS_PAGES

    monkeypatch.setattr(os, "sysconf", unknown)
    assert opened("auto").choice.startswith("loader resident: ")


@pytest.mark.parametrize("cuda", ["13.0", "12.8", None])
def test_dali_is_refused_in_one_line_that_names_the_package(monkeypatch, cuda):
    real = importlib.util.find_spec
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name.startswith("nvidia") else real(name)
    )
    with pytest.raises(DataError) as error:
        opened("dali")
    package = "nvidia-dali-cuda120" if cuda == "12.8" else "nvidia-dali-cuda130"
    wanted = f"--loader dali needs NVIDIA DALI: pip install {package}, or use --loader threads"
    assert one_line(error) == wanted


def test_dali_is_refused_where_there_is_none_to_install(monkeypatch):
    monkeypatch.setattr(dali, "available", lambda: False)
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(DataError) as error:
        dali.require()
    assert (
        "Linux" in one_line(error)
        and "--loader threads" in one_line(error)
        and "pip" not in one_line(error)
    )


def test_dali_is_not_refused_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    dali.require()


def test_every_fifth_digit_from_the_first_on_is_held_out():
    with np.load(ROOT / "fastsmooth" / "data" / "digits.npz") as file:
        images, labels = file["images"], file["labels"]
    assert images.shape == (1797, 8, 8) and images.min() == 0 and images.max() == 16
    shades = np.array([0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255])
    read = sets.digits(None)
    assert (len(read.train), len(read.test), len(read.classes)) == (1437, 360, 10)
    for split, picked in [
        (read.test, range(0, 1797, 5)),
        (read.train, [i for i in range(1797) if i % 5]),
    ]:
        assert split.labels.tolist() == labels[picked].tolist()
        assert np.array_equal(split.pixels, np.stack([shades[images[picked]]] * 3, axis=-1))


def test_digits_have_the_class_counts_of_the_uci_test_set():
    read = sets.digits(None)
    counts = sum(np.bincount(split.labels, minlength=10) for split in (read.train, read.test))
    assert counts.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_training_digits_are_normalised_to_mean_zero_and_deviation_one():
    x = torch.cat([x for x, _ in every_batch(opened().train)]).double()
    assert abs(x.mean()) < 1e-6 and abs(x.std(correction=0) - 1) < 1e-6


def test_digits_file_is_what_its_script_makes(tmp_path):
    expected = pytest.importorskip("sklearn.datasets").load_digits()
    spec = importlib.util.spec_from_file_location(
        "make_digits", ROOT / "scripts" / "make_digits.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    shipped, script.TARGET = script.TARGET, tmp_path / "digits.npz"
    script.main()
    assert script.TARGET.read_bytes() == shipped.read_bytes()
    with np.load(shipped) as file:
        assert np.array_equal(file["images"], expected.images) and np.array_equal(
            file["labels"], expected.target
        )


def test_digits_are_small_and_come_with_their_licence():
    folder = ROOT / "fastsmooth" / "data"
    assert (folder / "digits.npz").stat().st_size < 60_000
    licence = (folder / "digits.LICENSE.txt").read_text(encoding="utf-8")
    assert "CC BY 4.0" in licence and "Alpaydin" in licence and "10.24432/C50P49" in licence
