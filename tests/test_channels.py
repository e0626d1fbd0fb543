"""Images of one channel: they stay so in every loader, in the kernel and in the models that take
them, with the bits that torchvision's transforms make of grey images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from images import CPU, LOADERS, every_batch, opened
from implementations import DEVICE, every_implementation
from PIL import Image
from said import refused, said
from torchvision import transforms as T
from torchvision.transforms import functional as TF

import fastsmooth as fs
from fastsmooth import models, sharpness
from fastsmooth.cli.config import resolve
from fastsmooth.data import augment as drawing
from fastsmooth.data import open_data, read_set, sets
from fastsmooth.data.chunks import normalisation
from fastsmooth.data.layouts.arrays import moments
from fastsmooth.kernels import augment as kernel
from fastsmooth.train import main

every_loader = pytest.mark.parametrize(("loader", "workers"), LOADERS)


def grey(path: Path, size: tuple[int, int] = (28, 28), n: int = 48) -> dict[str, np.ndarray]:
    """Images whose mean tells their class, saved as MedMNIST saves them."""
    rng = np.random.default_rng(n)
    arrays = {}
    for split, count in (("train", n), ("test", n // 4)):
        labels = np.arange(count) % 3
        pixels = rng.integers(0, 100, (count, *size)) + 70 * labels[:, None, None]
        arrays |= {f"{split}_images": pixels.astype(np.uint8), f"{split}_labels": labels[:, None]}
    path.mkdir(exist_ok=True)
    np.savez(path / "grey.npz", **arrays)
    return arrays


# The kernel


@pytest.fixture
def chosen(implementation, monkeypatch):
    """kernels.augment.augment with this implementation."""
    monkeypatch.setattr(kernel.backend, "choose", lambda device, dtype: implementation)
    return kernel.augment


def stored(count: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    shape = count, size, size, 1
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(DEVICE)


@pytest.mark.usefixtures("poisoned_memory")
@every_implementation
@pytest.mark.parametrize("size", [8, 33])
@pytest.mark.parametrize("moved", [True, False])
def test_a_batch_of_one_channel_has_torchvisions_bits(chosen, size, moved):
    count, border = 10, drawing.padding(size)
    pixels = stored(count, size)
    params = drawing.draw("crop-flip-rotate", size, 5, 2, torch.arange(count))
    moves = drawing.moves("crop-flip-rotate", size, params).to(DEVICE) if moved else None
    rows = torch.tensor([3, 0, 9, 3, 7], device=DEVICE)
    table = normalisation((0.4,), (0.3,), DEVICE)
    found = chosen(pixels, rows, moves, table)
    assert found.shape == (5, size, size, 1) and found.is_contiguous()
    for got, i in zip(found.cpu(), rows.tolist(), strict=True):
        image = Image.fromarray(pixels[i, ..., 0].cpu().numpy())
        if moved:
            top, left, flip, angle = params[i].tolist()
            image = TF.crop(TF.pad(image, border), int(top), int(left), size, size)
            image = TF.hflip(image) if flip else image
            image = image.rotate(angle, Image.Resampling.NEAREST, fillcolor=0)
        expected = T.Normalize((0.4,), (0.3,))(T.ToTensor()(image))
        assert torch.equal(got, expected.permute(1, 2, 0)), i
    halved = chosen(pixels, rows, moves, table.bfloat16())
    assert halved.dtype == torch.bfloat16 and torch.equal(halved, found.bfloat16())


@pytest.mark.usefixtures("poisoned_memory")
@every_implementation
def test_one_channel_is_three_alike_and_comes_with_its_labels_from_a_cursor(chosen):
    pixels = stored(9, 33)
    params = drawing.draw("crop-flip", 33, 1, 0, torch.arange(9))
    moves = drawing.moves("crop-flip", 33, params).to(DEVICE)
    order, labels = torch.arange(9, device=DEVICE).flip(0), torch.arange(9, device=DEVICE) * 5
    table = normalisation((0.4,), (0.3,), DEVICE)
    found = []
    for channels in (1, 3):
        out = torch.empty(4, 33, 33, channels, device=DEVICE)
        out_labels = torch.empty(4, dtype=torch.int64, device=DEVICE)
        cursor = torch.tensor(3, device=DEVICE)
        several, rows = pixels.expand(-1, -1, -1, channels).contiguous(), table.repeat(channels, 1)
        chosen(several, order, moves, rows, out, cursor, labels, out_labels)
        assert out_labels.tolist() == [25, 20, 15, 10]
        found.append(out)
    assert torch.equal(found[0].expand(-1, -1, -1, 3), found[1])


def test_pixels_and_a_table_of_other_channels_are_refused():
    pixels, table = stored(2, 8), normalisation((0.4,), (0.3,), DEVICE)
    kernel.augment(pixels, None, None, table)
    for wrong in (table.repeat(3, 1), table.repeat(2, 1)):
        with pytest.raises(ValueError, match="wanted contiguous"):
            kernel.augment(pixels, None, None, wrong)
    with pytest.raises(ValueError, match=r"^pixels \[2, 8, 8, 3\]"):
        kernel.augment(pixels.expand(-1, -1, -1, 3).contiguous(), None, None, table)


# The loaders


@every_loader
@pytest.mark.parametrize("kind", ["none", "crop-flip", "crop-flip-rotate"])
def test_every_loader_serves_one_channel_as_torchvision_would(tmp_path, loader, workers, kind):
    arrays = grey(tmp_path)
    given = dict(dataset="npz", data_dir=str(tmp_path), image_size=28, augment=kind, seed=3)
    data = opened(loader, workers, **given)
    assert data.channels == 1
    mean, std = moments(arrays["train_images"][..., None])
    index = torch.tensor([5, 47, 0, 5])
    for epoch in (None, 2):
        ((x, y),) = data.train.batches([index], epoch)
        assert x.shape == (4, 1, 28, 28) and y.tolist() == [2, 2, 0, 2]
        drawn = drawing.draw(kind, 28, 3, 2, index) if kind != "none" else None
        for k, i in enumerate(index.tolist()):
            image = Image.fromarray(arrays["train_images"][i])
            if epoch is not None and drawn is not None:
                image = drawing.crop_flip_rotate(image, drawn[k].tolist(), 28)
            expected = T.Normalize(mean, std)(T.ToTensor()(image))
            if loader == "dali" and kind == "crop-flip-rotate" and epoch is not None:
                # its angles round otherwise, at a few pixels
                assert (x[k] != expected).float().mean() < 0.02
            else:
                assert torch.equal(x[k], expected)


@every_loader
@pytest.mark.parametrize("size", [(40, 40), (30, 52), (52, 30)])
def test_pixels_of_another_size_are_brought_to_that_of_the_run_once(
    tmp_path, loader, workers, size
):
    arrays = grey(tmp_path, size)
    data = opened(loader, workers, dataset="npz", data_dir=str(tmp_path), image_size=24)
    mean, std = moments(arrays["train_images"][..., None])
    view = T.Compose([T.Resize(24), T.CenterCrop(24), T.ToTensor(), T.Normalize(mean, std)])
    for split, pixels in ((data.train, arrays["train_images"]), (data.test, arrays["test_images"])):
        ((x, _),) = split.batches([torch.arange(len(pixels))])
        assert torch.equal(x, torch.stack([view(Image.fromarray(image)) for image in pixels]))


def test_three_channels_stay_three_and_the_digits_are_what_they_were(tmp_path):
    data = opened()
    images = sets.digits(None)
    assert data.channels == 3 and images.mean == (images.mean[0],) * 3
    ((x, _),) = data.test.batches([torch.arange(360)])
    assert x.shape == (360, 3, 8, 8) and torch.equal(x[:, 0], x[:, 2])


@every_loader
def test_torchvisions_networks_are_given_the_channel_three_times(tmp_path, loader, workers):
    grey(tmp_path)
    given = dict(dataset="npz", data_dir=str(tmp_path), image_size=28, augment="crop-flip")
    one = opened(loader, workers, **given, model="resnet8")
    three = opened(loader, workers, **given, model="torchvision/resnet18")
    assert (one.channels, three.channels) == (1, 3) and one.fingerprint == three.fingerprint
    assert three.about.endswith("; one channel, repeated as the 3 that torchvision/resnet18 takes")
    for a, b in zip(
        every_batch(one.train, epoch=1), every_batch(three.train, epoch=1), strict=True
    ):
        assert torch.equal(a[0].expand(-1, 3, -1, -1), b[0]) and torch.equal(a[1], b[1])


def test_the_resident_loader_is_chosen_by_the_bytes_of_one_channel(tmp_path, monkeypatch):
    grey(tmp_path)  # 60 images of 784 bytes: 47 kB
    monkeypatch.setattr("fastsmooth.data.free_memory", lambda device: 150_000)
    given = dict(dataset="npz", data_dir=str(tmp_path), image_size=28)
    assert opened("auto", **given, model="resnet8").loader == "resident"
    assert opened("auto", **given, model="torchvision/resnet18").loader != "resident"


def test_the_librarys_data_has_the_channels_of_the_images(tmp_path):
    grey(tmp_path, (70, 70))
    # 64 pixels, for which a run would take torchvision's network
    data = fs.open_data("npz", tmp_path, image_size=70)
    assert data.channels == 1 and data.size == 70
    x, _ = next(data.test.batches([torch.arange(2)]))
    assert fs.build_model("resnet8", data.classes, channels=data.channels)(x).shape == (2, 3)


# The models


@pytest.mark.parametrize("name", ["resnet8", "resnet50", "wrn-28-10", "mobilenetv2"])
def test_our_networks_take_one_channel(name):
    with torch.device("meta"):
        model, usual = models.build(name, 7, channels=1), models.build(name, 7)
        assert model(torch.empty(2, 1, 32, 32)).shape == (2, 7)
    shapes = [{key: value.shape for key, value in m.state_dict().items()} for m in (model, usual)]
    others = [key for key, shape in shapes[0].items() if shape != shapes[1][key]]
    assert len(others) == 1 and shapes[0][others[0]][1] == 1


def test_a_model_that_takes_three_channels_says_so(monkeypatch):
    with pytest.raises(models.ModelError, match="takes images of 3 channels, these have 1"):
        models.build("torchvision/resnet18", 7, channels=1)
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = models.build("timm/resnet18", 7, channels=1)
        assert model(torch.empty(2, 1, 32, 32)).shape == (2, 7)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, num_classes: None)
    with pytest.raises(models.ModelError, match="cannot be built for images of 1 channel "):
        models.build("timm/resnet18", 7, channels=1)
    models.build("timm/resnet18", 7)


# A run


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grey(tmp_path / "images")
    return [
        "--data-dir", "images", "--model", "resnet8", "--device", "cpu", "--batchsize", "16",
        "--out", "run",
    ]  # fmt: skip


def state(folder: str) -> dict[str, torch.Tensor]:
    last = max(Path(folder, "checkpoints").glob("*.pt"))
    return torch.load(last, weights_only=True)["model"]


def test_a_run_on_one_channel_trains_goes_on_and_is_measured(run):
    whole = said(main, [*run[:-1], "whole", "--epochs", "2", "--track-noise", "every=2"])
    assert whole.code == 0 and not whole.err, whole
    line = "grey.npz: train_images and test_images of 28x28 pixels, one channel"
    assert f"--dataset npz: one .npz; {line}" in whole.out.splitlines()
    assert "28: chosen for images whose shorter side has 28 pixels" in whole.out
    flags = ["--epochs", "2", "--track-noise", "every=2"]
    halted = said(main, [*run, *flags, "--max-time", "1e-9"])
    assert halted.code == 75, halted
    saved = json.loads(Path("run/config.json").read_text())
    assert (saved["dataset"], saved["image_size"], saved["augment"]) == ("npz", 28, "crop-flip")
    assert said(main, ["--resume", "--out", "run", "--max-time", "1h"]).code == 0
    ended, again = state("whole"), state("run")
    assert ended["stem.weight"].shape[1] == 1
    assert all(torch.equal(ended[name], again[name]) for name in ended)
    measured = said(sharpness.main, ["run", "--samples", "16", "--batch", "8", "--device", "cpu"])
    assert measured.code == 0 and Path("run/sharpness.json").exists(), measured
    assert fs.load_run("run").config["dataset"] == "npz"


@pytest.mark.parametrize(
    "flags",
    [
        ["--mode", "sampling", "--steps", "1", "--draws", "2"],
        ["--mode", "critical", "--epochs", "2", "--eps", "50", "--criterion", "full-grad"],
        ["--epochs", "1", "--norm", "group", "--track-noise", "every=2", "--quantities", "snr"],
    ],
    ids=lambda flags: flags[1],
)
def test_every_mode_measures_on_one_channel(run, flags):
    found = said(main, [*run, *flags])
    assert found.code == 0 and not found.err, found


def test_a_run_of_torchvisions_network_says_what_it_is_given(run):
    flags = [*run, "--epochs", "1", "--max-time", "1e-9", "--image-size", "32"]
    found = said(main, [*flags, "--model", "torchvision/shufflenet_v2_x0_5"])
    assert found.code == 75, found
    assert "one channel, repeated as the 3 that torchvision/shufflenet_v2_x0_5 takes" in found.out


def test_arrays_that_were_recognised_are_no_photographs_at_any_size(run):
    flags = [*run, "--epochs", "1", "--max-time", "1e-9", "--image-size", "72"]
    assert said(main, flags).code == 75
    saved = json.loads(Path("run/config.json").read_text())
    assert (saved["image_size"], saved["augment"]) == (72, "crop-flip")
    message = refused(main, [*flags[:-4], "--augment", "resized-crop-flip", "--out", "other"])
    assert message == "--augment resized-crop-flip needs image files: npz has none"


def test_a_set_of_one_channel_tells_itself_from_one_of_three(tmp_path):
    arrays = grey(tmp_path / "a")
    (tmp_path / "b").mkdir()
    tripled = {k: v[..., None].repeat(3, -1) if v.ndim == 3 else v for k, v in arrays.items()}
    np.savez(tmp_path / "b" / "rgb.npz", **tripled)
    one, three = (
        read_set(resolve({"dataset": "npz", "data_dir": str(tmp_path / name)})) for name in "ab"
    )
    assert one.mean * 3 == three.mean and one.std * 3 == three.std
    assert one.fingerprint() != three.fingerprint()
    c = resolve({"dataset": "npz", "data_dir": str(tmp_path / "b"), "image_size": 28})
    assert open_data(c, CPU).channels == 3
