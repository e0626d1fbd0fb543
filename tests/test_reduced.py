"""--decode reduced: JPEGs at a smaller scale where no more is wanted, beside the same in full."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from images import encoded, every_batch, noise, one_line, opened, solid, tree
from PIL import Image
from said import refused

from fastsmooth.data import DataError, augment, reduced
from fastsmooth.data.engines import dali
from fastsmooth.data.files import Paths
from fastsmooth.kernels import native
from fastsmooth.train import main

rng = np.random.default_rng(0)
WORST, MEAN = 7.0, 2.5  # of 255: what the module's figures say, and a little more


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    native.library()  # from the cache that is there: it takes long to build
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def slope(width: int, height: int, flat: bool) -> Image.Image:
    """A grey that grows from pixel to pixel, to the right and down."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray((20 + 0.2 * x + (0 if flat else 0.15) * y).astype(np.uint8))


def viewed(image: Image.Image, view: augment.View, size: int) -> np.ndarray:
    """The view of the whole image, float64 [size, size, 3], as the engines make it."""
    (top, left, height, width), (tall, wide), (down, right), _ = view
    part = image.convert("RGB").crop((left, top, left + width, top + height))
    part = part.resize((wide, tall), Image.Resampling.BILINEAR)
    return np.asarray(part.crop((right, down, right + size, down + size)), np.float64)


def views_of(image: Image.Image, size: int, count: int) -> list[augment.View]:
    """The view that is tested, and random ones."""
    at = torch.arange(count)
    width, height = (torch.full((count,), side) for side in image.size)
    drawn = augment.draw("resized-crop-flip", size, 3, 1, at)
    kinds = [("resized-crop-flip", None), ("none", None), ("resized-crop-flip", drawn)]
    return [
        view
        for kind, numbers in kinds
        for view in augment.views(kind, size, numbers, width, height).each(size)[
            : 1 if numbers is None else count
        ]
    ]


@pytest.mark.parametrize("extent", [(501, 375), (333, 500), (403, 397), (640, 427)])
@pytest.mark.parametrize("size", [16, 31, 64])
def test_a_view_lies_where_it_lies_in_the_whole_image(tmp_path, extent, size):
    """On a slope a shift of a quarter of a pixel of the view shows, whatever the filters do."""
    image = slope(*extent, flat=False)
    image.save(tmp_path / "0.jpg", quality=100)
    files = Paths([str(tmp_path / "0.jpg")])
    taken = set()
    for view in views_of(image, size, 12):
        k = reduced.factor(view)
        got = reduced.decoded(files, 0, lambda *_, view=view: view)
        if k == 1:
            assert got is None
            continue
        taken.add(k)
        away = np.asarray(got, np.float64) - viewed(image, view, size)
        (_, _, height, width), (tall, wide), *_ = view
        step = 0.2 * width / wide + 0.15 * height / tall  # of the view, from pixel to pixel
        inside = away[2:-2, 2:-2]
        assert abs(inside.mean()) < step / 4 and np.abs(inside).max() < 2 + step / 4
    assert taken and taken <= {2, 4, 8}


@pytest.mark.parametrize("k", reduced.FACTORS)
def test_a_smaller_scale_is_what_the_mean_of_its_pixels_is(tmp_path, k):
    """Blocks of k x k pixels averaged: what the box of a view is taken to be made of."""
    blocks = Image.fromarray(rng.integers(60, 200, (40, 56), dtype=np.uint8))
    image = blocks.resize((56 * k, 40 * k), Image.Resampling.NEAREST)
    image.save(tmp_path / "0.jpg", quality=100)
    view = [4 * k, 8 * k, 32 * k, 32 * k], [32, 32], [0, 0], 32
    got = reduced.decoded(Paths([str(tmp_path / "0.jpg")]), 0, lambda *_: view)
    expected = np.asarray(blocks, np.float64)[4:36, 8:40]
    assert np.abs(np.asarray(got, np.float64)[..., 0] - expected).max() <= 3


def test_the_scale_leaves_as_many_pixels_as_are_wanted():
    for box, scaled, k in [
        ((511, 900), (256, 256), 1),
        ((512, 512), (256, 256), 2),
        ((900, 511), (256, 256), 1),
        ((1023, 4000), (256, 256), 2),
        ((1024, 1024), (256, 256), 4),
        ((9000, 9000), (256, 256), 8),
        ((10, 10), (256, 256), 1),
    ]:
        assert reduced.factor(([0, 0, *box], list(scaled), [0, 0], 256)) == k


@pytest.fixture
def photos(imagenet_folder, tmp_path) -> Path:
    """Photographs of two classes."""
    names = sorted(entry.name for entry in (imagenet_folder / "train").iterdir())
    for split in ("train", "val"):
        for k, name in enumerate(names[:16]):
            to = tmp_path / "photos" / split / "ab"[k % 2]
            to.mkdir(parents=True, exist_ok=True)
            for path in (imagenet_folder / split / name).iterdir():
                shutil.copy(path, to)
    return tmp_path / "photos"


def batches(loader: str, root: Path, epoch: int | None, **given) -> torch.Tensor:
    given = {"dataset": "folder", "image_size": 64, "augment": "resized-crop-flip"} | given
    data = opened(loader, 0 if loader == "torch" else 2, data_dir=str(root), **given)
    ((x, _),) = every_batch(data.train, 64, epoch=epoch)
    std = torch.tensor((0.229, 0.224, 0.225))[:, None, None]
    return x * std * 255


@pytest.mark.parametrize("epoch", [None, 0, 1])
@pytest.mark.parametrize("size", [64, 128])
def test_photographs_differ_from_the_full_decode_by_what_is_stated(photos, epoch, size):
    full, less = (
        batches("threads", photos, epoch, image_size=size, decode=decode)
        for decode in ("full", "reduced")
    )
    away = (full - less).abs().mean((1, 2, 3))
    assert (away > 0.1).sum() >= 4  # else nothing was reduced
    assert away.max() < WORST and away[away > 0.1].mean() < MEAN


@pytest.mark.parametrize("kind", ["resized-crop-flip", "crop-flip-rotate"])
@pytest.mark.parametrize("epoch", [None, 0])
def test_all_loaders_give_the_same_pixels(photos, kind, epoch):
    kept = {
        loader: batches(loader, photos, epoch, image_size=48, augment=kind, decode="reduced")
        for loader in ("threads", "torch", "resident")
        if loader != "resident" or kind != "resized-crop-flip"
    }
    # a few are so small that torchvision decodes them in full, which may round otherwise
    first = kept.pop("threads")
    for other in kept.values():
        apart = (first - other).abs().amax((1, 2, 3))
        assert (apart == 0).sum() >= len(first) - 3 and apart.max() < 2


@pytest.mark.parametrize("loader", ["threads", "torch", "resident"])
def test_what_is_no_usual_jpeg_or_not_larger_than_wanted_keeps_its_bits(tmp_path, loader):
    picture = noise((20, 15)).resize((400, 300))
    print_ = picture.convert("CMYK")
    files = {
        "train/a/0.png": picture,
        "train/a/1.jpg": encoded(print_, "JPEG"),
        "train/a/2.jpg": encoded(noise((60, 50)), "JPEG"),
        "train/a/3.webp": picture,
        "train/b/0.png": picture.convert("L"),
        "val/a/0.png": solid(),
    }
    tree(tmp_path / "set", files)
    augments = ["crop-flip"] + ["resized-crop-flip"] * (loader != "resident")
    for kind in augments:
        full, less = (
            batches(loader, tmp_path / "set", None, image_size=32, augment=kind, decode=decode)
            for decode in ("full", "reduced")
        )
        assert torch.equal(full, less)
    tree(tmp_path / "set", {"train/a/4.jpg": encoded(picture, "JPEG", progressive=True)})
    full, less = (
        batches(loader, tmp_path / "set", None, image_size=32, augment="crop-flip", decode=d)
        for d in ("full", "reduced")
    )
    assert not torch.equal(full, less)  # the one that was added


@pytest.mark.parametrize("loader", ["threads", "torch"])
def test_a_file_that_is_damaged_or_replaced_is_named_as_without(tmp_path, loader):
    whole = encoded(noise((40, 30)).resize((400, 300)), "JPEG")
    names = [f"{split}/{c}/{k}.jpg" for split in ("train", "val") for c in "ab" for k in range(2)]
    root = tree(tmp_path / "set", dict.fromkeys(names, whole))
    (root / "train/b/1.jpg").write_bytes(whole[: len(whole) // 2])
    given = {"image_size": 32, "augment": "resized-crop-flip", "decode": "reduced"}
    with pytest.raises(DataError) as error:
        batches(loader, root, None, **given)
    assert str(root / "train/b/1.jpg") in one_line(error) and "truncated" in one_line(error)
    data = opened(loader, 1, dataset="folder", data_dir=str(root), **given)
    (root / "train/b/1.jpg").write_bytes(encoded(noise((200, 500)), "JPEG"))
    with pytest.raises(DataError) as error:
        every_batch(data.train)
    assert "200 x 500 pixels, which was 400 x 300 when the run began" in one_line(error)


def test_the_loader_line_says_so_and_auto_leaves_dali_out(tmp_path, monkeypatch):
    names = [f"{split}/{c}/0.jpg" for split in ("train", "val") for c in "ab"]
    root = tree(tmp_path / "set", dict.fromkeys(names, encoded(noise((80, 80)), "JPEG")))
    monkeypatch.setattr(dali, "available", lambda: True)
    given = {"dataset": "folder", "data_dir": str(root), "augment": "resized-crop-flip"}
    choice = opened("auto", 1, decode="reduced", **given).choice
    assert choice.startswith("loader threads: ") and "DALI decodes in full only" in choice
    assert choice.endswith("JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where no more is "
                           "wanted")  # fmt: skip
    assert "1/2" not in opened("threads", 1, **given).choice


def test_it_is_refused_where_it_would_do_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    given = ["--decode", "reduced"]
    folder = ["--dataset", "folder", "--data-dir", "set"]
    words = refused(main, [*folder, "--loader", "dali", *given])
    assert words.startswith("--decode has no effect with --loader dali: it needs --loader auto or")
    assert refused(main, given) == "--decode reduced needs image files: digits has none"


def test_a_run_is_not_gone_on_with_in_another_way_of_decoding(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [f"{split}/{c}/{k}.jpg" for split in ("train", "val") for c in "ab" for k in range(2)]
    tree(tmp_path / "set", dict.fromkeys(names, encoded(noise((80, 80)), "JPEG")))
    run = ["--dataset", "folder", "--data-dir", "set", "--image-size", "16", "--model", "resnet8"]
    run += ["--device", "cpu", "--epochs", "1", "-b", "4", "--out", "run", "--decode", "reduced"]
    assert main(run) == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["decode"] == "reduced"
    words = refused(main, ["--resume", "--out", "run", "--decode", "full"])
    assert "has --decode reduced, not full" in words


def test_jpegs_without_a_whole_number_of_blocks_are_read_to_their_edges(tmp_path):
    """The last pixels of a smaller image stand for fewer than k x k pixels of the whole."""
    for side in range(65, 81):
        buffer = io.BytesIO()
        image = slope(side, side + 3, flat=True)
        image.save(buffer, "JPEG", quality=100)
        (tmp_path / "0.jpg").write_bytes(buffer.getvalue())
        view = [0, 0, side + 3, side], [8, 8], [0, 0], 8
        got = reduced.decoded(Paths([str(tmp_path / "0.jpg")]), 0, lambda *_, v=view: v)
        away = np.asarray(got, np.float64) - viewed(image, view, 8)
        assert np.abs(away).max() < 2
