"""Folders as people have them: what a run says of one first, what it leaves to the images, and
models that want another size."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from images import encoded, noise, tree
from said import refused, said
from test_images import picture

from fastsmooth import data
from fastsmooth.cli.config import resolve
from fastsmooth.train import main

RUN = [
    "--dataset",
    "folder",
    "--data-dir",
    "images",
    "--device",
    "cpu",
    "--batchsize",
    "2",
    "--epochs",
    "1",
]
STOPPED = ["--max-time", "1e-9", "--out", "run"]  # after the first update


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def images(size: tuple[int, int], more: dict | None = None) -> None:
    """Two classes of four images of this size, and two to test on."""
    files = {f"train/{c}/{k}.png": noise(size) for c in "ab" for k in range(4)}
    tree(Path("images"), files | {f"val/{c}/0.png": noise(size) for c in "ab"} | (more or {}))


def saved() -> dict:
    return json.loads(Path("run/config.json").read_text())


# size of the images, flags: the size, the network and the augmentation of the run, and what is said
# of them
CHOICES = {
    "digits": ((8, 8), [], (8, "resnet20", "crop-flip"), "8 and resnet20"),
    "small": ((28, 30), [], (28, "resnet18", "crop-flip"), "28 and resnet18"),
    "photos": ((300, 260), [], (224, "torchvision/resnet34", "resized-crop-flip"),
        "224 and torchvision/resnet34"),
    "a size": ((300, 260), ["--image-size", "32"], (32, "resnet18", "crop-flip"), ""),
    "a network": (
        (100, 120), ["--model", "torchvision/mobilenet_v3_small"],
        (96, "torchvision/mobilenet_v3_small", "resized-crop-flip"), "96:",
    ),
    "a network for small images": ((300, 260), ["--model", "resnet8"],
        (64, "resnet8", "crop-flip"), "64:"),
    "all": (
        (300, 260), ["--model", "resnet8", "--image-size", "40", "--augment", "none"],
        (40, "resnet8", "none"), "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_size_and_network_are_what_the_images_call_for_and_are_said(name, cases):
    few = name not in ("photos", "small")  # large networks
    if cases("folders whose images say the size and the network", 1, int(few)) == 0:
        pytest.skip("with --full")
    size, flags, (pixels, network, augment), words = CHOICES[name]
    images(size)
    found = said(main, [*RUN, *flags, *STOPPED])
    assert found.code == 75 and not found.err, found
    assert (saved()["image_size"], saved()["model"], saved()["augment"]) == (
        pixels,
        network,
        augment,
    )
    lines = found.out.splitlines()
    assert lines[1].startswith(f"{network} (")
    chosen = [line for line in lines if "chosen for images" in line]
    assert len(chosen) == bool(words)
    if words:
        assert chosen[0].startswith(words) and f"shorter side has {min(size)} pixels" in chosen[0]
        assert chosen[0].endswith(
            "--image-size" if "--model" in flags else "--image-size and --model"
        )
    how = "no augmentation" if augment == "none" else f"augmented by {augment}"
    assert f"2 classes, images brought to {pixels}x{pixels} pixels, {how}" in lines
    # going on needs no images to decide, and no flags
    tree(
        Path("images"),
        {f"train/a/{k}.png": noise((500, 500)) for k in range(4)} if name == "a network" else {},
    )
    again = said(main, ["--resume", *STOPPED])
    assert (
        again.code in (0, 75) and saved()["image_size"] == pixels and "chosen for" not in again.out
    ), again


def test_the_usual_image_decides_and_not_one_that_cannot_be_read(here, cases):
    cases("folders whose images say the size and the network", 1, 1)
    images(
        (48, 90),
        {
            "train/a/0.png": noise((400, 500)),
            "train/a/1.png": noise((9, 9)),
            "train/b/9.png": b"no image",
        },
    )
    read = data.read_set(resolve({"dataset": "folder", "data_dir": "images"}))
    assert data.usual_side(read) == 48
    tree(Path("images"), {f"train/{c}/{k}.png": b"no image" for c in "ab" for k in (*range(4), 9)})
    with pytest.raises(
        data.DataError, match=r"images/train/a/0.png: not an image that can be read"
    ):
        data.usual_side(read)


def test_a_plan_opens_no_images_and_says_what_it_does_not_know(cases):
    cases("folders whose images say the size and the network", 1, 1)
    plan = ["--plan", "--dataset", "folder", "--data-dir", "nowhere", "--method", "hybrid"]
    found = said(main, plan)
    assert found.code == 0 and not found.err
    assert "the images, which --plan does not open, decide" in found.out and "None" not in found.out
    assert "does not open" not in said(main, [*plan, "--image-size", "32"]).out
    assert said(main, [*plan, "--json"]).code == 0


HAS_TIMM = importlib.util.find_spec("timm") is not None
OWN = {  # the model: its own size, and one that it cannot take
    "torchvision/vit_b_16": (224, 32),
    "torchvision/inception_v3": (299, 32),
    "torchvision/maxvit_t": (224, 96),
    "timm/vit_tiny_patch16_224": (224, 64),
    "timm/swin_tiny_patch4_window7_224": (224, 64),
    "torchvision/alexnet": (224, 32),
}


@pytest.mark.parametrize("model", OWN)
def test_a_model_that_cannot_take_the_size_names_its_own(model, cases):
    few = model in ("timm/vit_tiny_patch16_224", "torchvision/alexnet")
    if cases("models that cannot take the images' size", 1, int(few)) == 0:
        pytest.skip("with --full")
    if model.startswith("timm/") and not HAS_TIMM:
        pytest.skip("timm is not installed")
    own, size = OWN[model]
    images((size, size))
    message = refused(main, [*RUN, "--model", model, "--out", "run"])
    assert message.startswith(f"the model cannot take {size}x{size} images (") and message.endswith(
        f": use --image-size {own}"
    )
    assert not Path("run").exists()
    if not few:
        assert said(main, [*RUN, "--model", model, "--image-size", str(own), *STOPPED]).code == 75


def test_where_the_size_is_fixed_another_model_is_named(cases):
    cases("models that cannot take the images' size", 1, 1)
    message = refused(main, ["--model", "torchvision/alexnet", "--out", "run"])
    assert message.endswith(
        ": use another --model than torchvision/alexnet, which is made for 224x224"
    )


def test_a_class_that_is_never_tested_is_a_warning_of_the_run_and_of_check_data(cases):
    cases("folders as people have them", 1, 1)
    images(
        (32, 32),
        {
            "train/cow/0.png": noise(),
            "train/.ipynb_checkpoints/0.png": noise(),
            "val/.DS_Store": b"x",
        },
    )
    line = "fastsmooth: warning: images/val has no images of class 'cow': they are never tested\n"
    found = said(main, [*RUN, "--model", "resnet8", *STOPPED])
    assert (found.code, found.err) == (75, line)
    assert (
        "3 classes, images brought to 32x32 pixels" in found.out
        and "9 training and 2 test images" in found.out
    )
    checked = said(main, ["--check-data", *RUN])
    assert (
        checked.code == 0
        and checked.err.startswith(line)
        and "9 train and 2 test images, 3 classes" in checked.out
    )


def test_mixed_formats_and_sizes_are_measured_alike(cases):
    """The header of a JPEG, a PNG and a WebP say the size as PIL does."""
    cases("folders as people have them", 1, 1)
    kinds = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
    files = {
        f"{split}/{c}/{k}.{kinds[k]}": encoded(picture(70, 50), k)
        for split in ("train", "val")
        for c in "ab"
        for k in kinds
    }
    tree(Path("images"), files)
    read = data.read_set(resolve({"dataset": "folder", "data_dir": "images"}))
    assert (
        data.usual_side(read) == 50
        and torch.tensor(read.train.labels).tolist() == [0] * 3 + [1] * 3
    )
