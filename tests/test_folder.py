"""Trees of image files, ImageNet's among them: read as torchvision reads them, and one line for
whatever is wrong."""

import functools
import os
import shutil
import struct
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from images import CPU, LOADERS, encoded, every_batch, noise, one_line, opened, solid, tree
from PIL import Image
from torchvision import transforms as T
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional as TF

from fastsmooth.cli.config import resolve
from fastsmooth.data import DataError, augment, images, open_data, sets
from fastsmooth.data.files import Paths
from fastsmooth.data.layouts import trees
from fastsmooth.data.order import in_order, permutation

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet


def good_tree(root: Path) -> Path:
    names = [
        f"{split}/{name}/{k}.png"
        for split in ("train", "val")
        for name in ("cat", "dog")
        for k in (1, 2)
    ]
    return tree(root, {name: noise() for name in names})


def opened_folder(root: Path, loader: str = "resident", workers: int = 0, **given):
    return opened(loader, workers, dataset="folder", data_dir=str(root), **given)


def refusal(root: Path, loader: str, workers: int, **given) -> str:
    """What is said of a folder that cannot be read from end to end; never more than one line."""
    with pytest.raises(DataError) as error:
        data = opened_folder(root, loader, workers, **given)
        for split in (data.train, data.test):
            every_batch(split)
    return one_line(error)


every_loader = pytest.mark.parametrize(("loader", "workers"), LOADERS)
plain_loaders = pytest.mark.parametrize("loader", ["resident", "torch"])


@plain_loaders
@pytest.mark.parametrize("held_out", ["val", "test"])
def test_a_folder_is_read_class_by_class_with_val_or_test_beside_it(tmp_path, loader, held_out):
    files = {
        f"train/{name}/{k}.png": noise()
        for name, k in [("b", 2), ("b", 1), ("a", 9), ("c", 1), ("c", "deep/0")]
    }
    files |= {f"{held_out}/c/1.png": noise(), f"{held_out}/a/1.png": noise()}
    tree(tmp_path, files | {"train/a/notes.txt": b"no image", "train/README": b"no class"})
    data = opened_folder(tmp_path, loader)
    assert (data.classes, data.size, len(data.train), len(data.test)) == (3, 32, 5, 2)
    names = {"train": ["a/9", "b/1", "b/2", "c/1", "c/deep/0"], held_out: ["a/1", "c/1"]}
    for part, split in [(data.train, "train"), (data.test, held_out)]:
        ((x, y),) = part.batches([torch.arange(len(part))])
        images = [files[f"{split}/{name}.png"] for name in names[split]]
        expected = [T.Normalize(MEAN, STD)(T.ToTensor()(image)) for image in images]
        assert torch.equal(x, torch.stack(expected))
        assert y.tolist() == ["abc".index(name[0]) for name in names[split]]


def test_val_goes_before_test_and_imagenet_wants_val(tmp_path):
    good_tree(tmp_path)
    tree(tmp_path, {"test/cat/1.png": noise()})
    assert len(opened_folder(tmp_path).test) == 4
    (tmp_path / "val").rename(tmp_path / "other")
    assert len(opened_folder(tmp_path).test) == 1
    with pytest.raises(DataError) as error:
        opened("torch", dataset="imagenet", data_dir=str(tmp_path))
    assert "has no val/" in one_line(error)


@pytest.mark.parametrize("size", [(32, 32), (40, 60), (60, 40), (9, 50), (16, 16)])
def test_files_of_any_size_are_brought_to_the_size_of_the_run(tmp_path, size):
    files = good_tree(tmp_path) / "train" / "cat" / "1.png"
    image = noise(size)
    image.save(files)
    view = T.Compose([T.Resize(24), T.CenterCrop(24), T.ToTensor(), T.Normalize(MEAN, STD)])
    for loader in ("resident", "torch"):
        ((x, _),) = opened_folder(tmp_path, loader, image_size=24).train.batches(
            [torch.tensor([0])]
        )
        assert torch.equal(x[0], view(image))


@plain_loaders
def test_a_folder_that_is_not_there_is_named(tmp_path, loader):
    message = refusal(tmp_path / "nowhere", loader, 0)
    assert str(tmp_path / "nowhere") in message and "no such directory" in message


@plain_loaders
@pytest.mark.parametrize(
    ("missing", "named"), [("train", "has no train/"), ("val", "has no val/ or test/")]
)
def test_a_folder_without_train_or_without_a_test_split_is_refused(
    tmp_path, loader, missing, named
):
    (good_tree(tmp_path) / missing).rename(tmp_path / "other")
    message = refusal(tmp_path, loader, 0)
    assert str(tmp_path) in message and named in message


@plain_loaders
def test_a_folder_without_two_classes_is_refused(tmp_path, loader):
    tree(tmp_path, {"train/1.png": noise(), "val/1.png": noise()})
    assert f"{tmp_path / 'train'} has 0 class folders" in refusal(tmp_path, loader, 0)
    tree(tmp_path, {"train/cat/1.png": noise(), "val/cat/1.png": noise()})
    assert f"{tmp_path / 'train'} has 1 class folders" in refusal(tmp_path, loader, 0)


@plain_loaders
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_images_is_refused(tmp_path, loader, split):
    files = {"train/cat/1.png": noise(), "train/dog/1.png": noise(), "val/cat/1.png": noise()}
    tree(tmp_path, {name: image for name, image in files.items() if not name.startswith(split)})
    tree(tmp_path, {f"{split}/cat": None, f"{split}/dog": None})
    assert f"{tmp_path / split} has no images" in refusal(tmp_path, loader, 0)


@plain_loaders
def test_a_class_folder_that_is_empty_is_refused_by_name(tmp_path, loader):
    tree(good_tree(tmp_path), {"train/cow": None, "train/ewe/notes.txt": b"none yet"})
    assert (
        f"{tmp_path / 'train' / 'cow'} has no images (nor 1 more): put some there or remove"
        in refusal(tmp_path, loader, 0)
    )


HIDDEN = (
    ".ipynb_checkpoints/0.png", "cat/.ipynb_checkpoints/0-checkpoint.png", "cat/._1.png",
    ".DS_Store", "cat/.DS_Store",
    "Thumbs.db", "cat/Thumbs.db", "dog/desktop.ini", "__MACOSX/cat/._1.png", "__MACOSX/0.png",
    "lost+found/0.png", "@eaDir/0.png",
    "cat/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg", ".git/0.png", "#recycle/0.png", "$RECYCLE.BIN/0.png",
    ".Trash-1000/files/0.png",
    "System Volume Information/0.png",
)  # fmt: skip


@plain_loaders
@pytest.mark.parametrize("split", ["train", "val"])
def test_what_is_hidden_or_belongs_to_a_system_is_no_class_and_no_image(tmp_path, loader, split):
    """The classes and images are those that torchvision's ImageFolder finds where none of it is."""
    good_tree(tmp_path / "clean")
    clean = ImageFolder(str(tmp_path / "clean" / split))
    root = tmp_path / "littered"
    shutil.copytree(tmp_path / "clean", root)
    tree(
        root,
        {f"{split}/{name}": noise() if name.endswith(("png", "jpg")) else b"x" for name in HIDDEN},
    )
    tree(root, {f"{split}/.hidden": None})
    data = opened_folder(root, loader)
    part = {"train": data.train, "val": data.test}[split]
    ((x, labels),) = part.batches([torch.arange(len(part))])
    assert data.classes == len(clean.classes) == 2 and labels.tolist() == clean.targets
    view = T.Compose([T.ToTensor(), T.Normalize(MEAN, STD)])
    assert torch.equal(x, torch.stack([view(image) for image, _ in clean]))


def test_linked_folders_are_followed_as_torchvision_follows_them(tmp_path):
    root = good_tree(tmp_path / "tree")
    tree(
        tmp_path,
        {"elsewhere/7.png": noise(), "elsewhere/deep/8.png": noise(), "fox/9.png": noise()},
    )
    (root / "train/cat/linked").symlink_to(tmp_path / "elsewhere")
    (root / "train/dog/linked").symlink_to(tmp_path / "elsewhere")  # twice: no loop
    (root / "train/dog/again").symlink_to("../cat/linked")
    for split in ("train", "val"):
        (root / split / "fox").symlink_to(tmp_path / "fox")
    expected = ImageFolder(str(root / "train"))
    found = trees.split_tree(SimpleNamespace(data_dir=str(root), dataset="folder")).train
    assert sorted(zip(found.files.names, found.labels.tolist(), strict=True)) == sorted(
        expected.samples
    )
    assert len(found) == 11 and found.labels.tolist() == sorted(expected.targets)


def remarks(root: Path) -> list[str]:
    lines: list[str] = []
    open_data(
        resolve({"dataset": "folder", "data_dir": str(root), "loader": "torch", "workers": 0}),
        CPU,
        lines.append,
    )
    return lines


def test_a_class_that_is_never_tested_and_images_in_no_class_are_said_by_name(tmp_path):
    assert remarks(good_tree(tmp_path)) == []
    tree(tmp_path, {"train/cow/1.png": noise()})
    assert remarks(tmp_path) == [
        f"{tmp_path / 'val'} has no images of class 'cow': they are never tested"
    ]
    tree(
        tmp_path,
        {
            "train/ewe/1.png": noise(),
            "val/ewe": None,
            "train/1.png": noise(),
            "train/.2.png": noise(),
        },
    )
    tree(tmp_path, {"val/wolf/notes.txt": b"a folder of val alone, without images"})
    assert remarks(tmp_path) == [
        f"{tmp_path / 'val'} has no images of class 'cow' (nor 1 more): they are never tested",
        f"{tmp_path / 'train'}: images that lie in no class folder are left out: 1",
    ]


@plain_loaders
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_class_folders_is_told_so(tmp_path, loader, split):
    for path in (good_tree(tmp_path) / split).glob("*/*"):
        path.rename(tmp_path / split / f"{path.parent.name}-{path.name}")
        if not any(path.parent.iterdir()):
            path.parent.rmdir()
    message = refusal(tmp_path, loader, 0)
    assert f"its images lie there without them: sort them into {tmp_path / split}/CLASS/" in message


@plain_loaders
def test_a_class_that_only_the_test_split_has_is_refused(tmp_path, loader):
    tree(good_tree(tmp_path), {"val/wolf/1.png": noise()})
    message = refusal(tmp_path, loader, 0)
    assert str(tmp_path / "val") in message and "'wolf'" in message
    (tmp_path / "val/wolf").rename(tmp_path / "val/CAT")
    assert "a class folder 'CAT' that train/ has not (it has 'cat')" in refusal(tmp_path, loader, 0)


def palette() -> Image.Image:
    image = Image.new("P", (32, 32), 1)
    image.putpalette([0, 0, 0, 50, 100, 150])
    return image


@plain_loaders
@pytest.mark.parametrize(
    ("name", "image", "colour"),
    [
        ("grey.png", solid(77, mode="L"), (77, 77, 77)),
        ("grey.jpg", solid(77, mode="L"), (77, 77, 77)),
        ("alpha.png", solid((50, 100, 150, 20), mode="RGBA"), (50, 100, 150)),
        ("grey-alpha.png", solid((77, 20), mode="LA"), (77, 77, 77)),
        ("palette.png", palette(), (50, 100, 150)),
        ("bit.png", solid(1, mode="1"), (255, 255, 255)),
        ("print.tif", solid((0, 51, 255, 0), mode="CMYK"), (255, 204, 0)),
        ("print.jpg", solid((0, 0, 0, 255), mode="CMYK"), (0, 0, 0)),
        ("upper.JPEG", solid((77, 77, 77)), (77, 77, 77)),
        ("map.bmp", solid((50, 100, 150)), (50, 100, 150)),
        ("anymap.ppm", solid((50, 100, 150)), (50, 100, 150)),
    ],
)
def test_images_of_every_colour_mode_are_read_as_rgb(tmp_path, loader, name, image, colour):
    tree(good_tree(tmp_path), {f"train/cat/0-{name}": image})
    ((x, _),) = opened_folder(tmp_path, loader).train.batches([torch.tensor([0])])
    expected = TF.normalize(TF.to_tensor(solid(colour)), MEAN, STD)
    assert torch.equal(x[0], expected)


@functools.cache
def bomb(width: int, height: int) -> bytes:
    """A valid PNG of one bit a pixel, all black: a few kilobytes for any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    row = bytes(1 + (width + 7) // 8)
    press = zlib.compressobj(1)
    data = b"".join([*(press.compress(row * 100) for _ in range(height // 100)), press.flush()])
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


BAD_FILES = {
    "cut-short.jpg": (encoded(noise((64, 64)), "JPEG")[:900], "truncated"),
    "cut-short.png": (encoded(noise((64, 64)), "PNG")[:900], "truncated"),
    "no-bytes.png": (b"", "not an image"),
    "words.jpg": (b"<html>404 not found</html>\n" * 20, "not an image"),
    "header-only.jpg": (encoded(noise(), "JPEG")[:20], "remove"),
    "damaged.png": (encoded(noise(), "PNG").replace(b"IDAT", b"IDAX"), "remove"),
    "over-twice-the-limit.png": (bomb(20_000, 20_000), "too large"),
    "just-over-the-limit.png": (bomb(12_000, 10_000), "too large"),
}


@every_loader
@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_file_that_cannot_be_read_is_named(tmp_path, loader, workers, name):
    content, reason = BAD_FILES[name]
    tree(good_tree(tmp_path), {f"train/dog/{name}": content})
    message = refusal(tmp_path, loader, workers)
    assert str(tmp_path / "train" / "dog" / name) in message
    assert reason in message or (
        loader == "threads" and "corrupted: remove or replace it" in message
    )
    assert message.endswith("; or serve it black with --on-bad-image zeros")


@every_loader
def test_a_broken_link_is_named(tmp_path, loader, workers):
    link = good_tree(tmp_path) / "val" / "cat" / "link.png"
    link.symlink_to(tmp_path / "gone.png")
    message = refusal(tmp_path, loader, workers)
    assert str(link) in message and "No such file" in message


@every_loader
def test_a_decoder_that_fails_in_its_own_way_is_one_line_too(tmp_path, loader, workers):
    # Pillow goes by the content: this "PNG" is a Blizzard texture, whose decoder raises an error of
    # its own
    content = bytearray(encoded(noise().convert("P"), "BLP"))
    content[4:8] = b"\xff\xff\xff\xff"  # the compression
    tree(good_tree(tmp_path), {"train/dog/texture.png": bytes(content)})
    assert str(tmp_path / "train" / "dog" / "texture.png") in refusal(tmp_path, loader, workers)


@every_loader
def test_the_first_of_many_bad_files_is_the_one_that_is_named(tmp_path, loader, workers):
    tree(good_tree(tmp_path), {f"val/dog/{k}.png": b"bad" for k in (3, 4, 5)})
    with pytest.raises(DataError) as error:
        test = opened_folder(tmp_path, loader, workers).test
        list(test.batches(in_order(len(test), 2)))
    assert str(tmp_path / "val" / "dog" / "3.png") in one_line(error)
    assert loader == "resident" or "(2 more cannot be read)" in one_line(error)


@pytest.mark.parametrize(("loader", "workers"), LOADERS[1:])
def test_a_loader_that_met_a_bad_file_can_be_used_again(tmp_path, loader, workers):
    # its header is good
    tree(good_tree(tmp_path), {"train/dog/3.png": BAD_FILES["cut-short.png"][0]})
    train = opened_folder(tmp_path, loader, workers).train
    for _ in range(2):
        with pytest.raises(DataError) as error:
            list(train.batches(in_order(len(train), 1)))
        assert str(tmp_path / "train" / "dog" / "3.png") in one_line(error)
        batches = list(train.batches(in_order(4, 2)))
        assert [y.tolist() for _, y in batches] == [[0, 0], [1, 1]]


@every_loader
def test_a_file_name_that_holds_a_line_break_is_named_on_one_line(tmp_path, loader, workers):
    tree(good_tree(tmp_path), {"train/dog/two\nlines\r.png": b"bad"})
    assert "two lines .png" in refusal(tmp_path, loader, workers)


@every_loader
def test_a_file_name_that_is_not_utf8_is_read_and_named(tmp_path, loader, workers):
    good_tree(tmp_path)
    name = os.fsencode(tmp_path) + b"/train/cat/0\xff\xfe.png"
    try:
        with open(name, "wb") as file:
            file.write(encoded(solid((50, 100, 150)), "PNG"))
    except OSError:
        pytest.skip("this file system wants UTF-8")
    ((x, _),) = opened_folder(tmp_path, loader, workers).train.batches([torch.tensor([0, 1])])
    assert torch.equal(x[0], TF.normalize(TF.to_tensor(solid((50, 100, 150))), MEAN, STD))
    with open(name, "wb"):
        pass  # now it is empty
    assert os.fsdecode(name) in refusal(tmp_path, loader, workers)


def test_reading_files_in_threads_leaves_the_list_of_warning_filters_alone(cifar_folder):
    paths = tuple(map(str, sorted(cifar_folder.glob("train/*/*.png"))))
    before = list(warnings.filters)
    images.decode_all(
        images.Split(np.zeros(len(paths), np.int64), files=Paths(paths)),
        32,
        images.Split.image,
        pytest.fail,
    )
    assert warnings.filters == before


def test_the_fingerprint_tells_data_sets_apart_but_not_where_they_are(tmp_path):
    first, second = (good_tree(tmp_path / name) for name in ("here", "there"))
    prints = [opened_folder(root, "torch").fingerprint for root in (first, second)]
    assert prints[0] == prints[1]
    (second / "train" / "cat" / "1.png").rename(second / "train" / "cat" / "7.png")
    prints.append(opened_folder(second, "torch").fingerprint)
    (second / "train" / "cat" / "7.png").rename(second / "train" / "dog" / "7.png")
    prints.append(opened_folder(second, "torch").fingerprint)
    digits = sets.digits(None)
    prints.append(digits.fingerprint())
    digits.train.pixels[3, 3, 3, 0] += 1
    prints.append(digits.fingerprint())
    digits.test.labels[0] += 1
    prints.append(digits.fingerprint())
    assert len(set(prints)) == len(prints) - 1


def test_imagenet_is_tested_on_torchvisions_central_crop(imagenet_folder):
    data = opened("torch", 2, dataset="imagenet", data_dir=str(imagenet_folder))
    paths = sorted(imagenet_folder.glob("val/*/*"))
    grey = [i for i, path in enumerate(paths) if Image.open(path).mode == "L"]
    assert (data.classes, data.size, len(data.train), len(data.test), len(grey)) == (
        128,
        224,
        128,
        128,
        3,
    )
    index = torch.tensor([*grey, *range(0, 128, 8)])
    view = T.Compose([T.Resize(256), T.CenterCrop(224), T.ToTensor(), T.Normalize(MEAN, STD)])
    got = data.test.batches(index.split(8))
    x, y = (torch.cat(parts) for parts in zip(*got, strict=True))
    assert torch.equal(y, index)
    for ours, i in zip(x, index.tolist(), strict=True):
        assert torch.equal(ours, view(Image.open(paths[i]).convert("RGB"))), paths[i]


def test_imagenet_is_trained_on_torchvisions_random_crop_of_the_same_numbers(
    imagenet_folder, monkeypatch
):
    data = opened("torch", 2, dataset="imagenet", data_dir=str(imagenet_folder), seed=3)
    paths = sorted(imagenet_folder.glob("train/*/*"))
    grey = [i for i, path in enumerate(paths) if Image.open(path).mode == "L"]
    index = torch.tensor([*grey, *permutation(3, 1, 128)[:29].tolist()])
    params = augment.draw("resized-crop-flip", 224, 3, 1, index)
    got = data.train.batches(index.split(16), epoch=1)
    x, y = (torch.cat(parts) for parts in zip(*got, strict=True))
    assert torch.equal(y, index)
    for ours, i, row in zip(x, index.tolist(), params, strict=True):
        image = Image.open(paths[i]).convert("RGB")
        width, height = torch.tensor([image.size]).T
        (box,) = augment.crop_boxes(width, height, row[None, 1:]).tolist()
        monkeypatch.setattr(
            T.RandomResizedCrop, "get_params", staticmethod(lambda *_, box=box: box)
        )
        pipeline = [T.RandomResizedCrop(224), T.RandomHorizontalFlip(row[0].item()), T.ToTensor()]
        assert torch.equal(ours, T.Compose([*pipeline, T.Normalize(MEAN, STD)])(image)), paths[i]
