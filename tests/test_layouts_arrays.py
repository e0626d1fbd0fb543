"""Data sets of arrays: an .npz as MedMNIST, Keras and others save it, and what torchvision
downloads; read as their own packages read them, and one line for whatever is wrong."""

import bz2
import io
import json
import os
import pickle
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from images import CPU, LOADERS, every_batch, noise, one_line, opened, tree
from PIL import Image
from said import refused, said
from torchvision import datasets
from torchvision import transforms as T
from torchvision.datasets import utils

from fastsmooth.cli import facts
from fastsmooth.cli.config import fitted, resolve
from fastsmooth.data import DataError, augment, memory, open_data, read_set, usual_side
from fastsmooth.data.layouts import arrays, common, zoo
from fastsmooth.data.layouts.common import held_out
from fastsmooth.kernels import native
from fastsmooth.train import main

every_loader = pytest.mark.parametrize(("loader", "workers"), LOADERS)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> None:
    native.library()  # which is kept there too, and takes long to be built
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def pixels(n: int, *sides: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *sides), dtype=np.uint8)


def labels(n: int, classes: int = 3) -> np.ndarray:
    return np.arange(n) % classes


def medmnist_arrays(*sides: int, column: bool = True) -> dict[str, np.ndarray]:
    """As MedMNIST has them, of 12, 6 and 9 images."""
    found = {}
    for seed, (split, n) in enumerate((("train", 12), ("val", 6), ("test", 9))):
        found[f"{split}_images"] = pixels(n, *sides, seed=seed)
        found[f"{split}_labels"] = labels(n)[:, None] if column else labels(n)
    return found


def saved(root: Path, name: str = "some.npz", **given: np.ndarray) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(root / name, **given)
    return root


def read(root: Path, **given):
    return read_set(resolve({"dataset": "npz", "data_dir": str(root), **given}))


def served(split, index: list[int]) -> torch.Tensor:
    return next(split.batches([torch.tensor(index)]))[0]


# .npz


@pytest.mark.full  # its package takes seconds to be imported
@pytest.mark.parametrize("flag", ["pathmnist", "bloodmnist", "pneumoniamnist"])
@pytest.mark.parametrize("size", [28, 64])
def test_medmnist_is_read_as_its_own_package_reads_it(tmp_path, flag, size):
    medmnist = pytest.importorskip("medmnist")
    info = medmnist.INFO[flag]
    sides = (size, size, 3) if info["n_channels"] == 3 else (size, size)
    name = f"{flag}.npz" if size == 28 else f"{flag}_{size}.npz"
    saved(tmp_path, name, **medmnist_arrays(*sides))
    data = opened(dataset="npz", data_dir=str(tmp_path), image_size=size)
    images = read(tmp_path)
    theirs = getattr(medmnist, info["python_class"])
    for split, ours in (("train", data.train), ("test", data.test)):
        dataset = theirs(split=split, root=str(tmp_path), size=size)
        for i in range(len(ours)):
            image, label = dataset[i]
            expected = T.Normalize(images.mean, images.std)(T.ToTensor()(image))
            ((x, y),) = ours.batches([torch.tensor([i])])
            assert torch.equal(x[0], expected) and y.tolist() == label.tolist()


FORMS = {  # how people name and shape them: arrays of 12 training and 9 test images
    "medmnist": lambda a: a,
    "keras": lambda a: {
        "x_train": a["train_images"], "y_train": a["train_labels"][:, 0],
        "x_test": a["test_images"], "y_test": a["test_labels"][:, 0],
    },
    "val alone": lambda a: {k.replace("test", "valid"): v for k, v in a.items() if "val" not in k},
    "channels first": lambda a: {k: v[:, None] if v.ndim == 3 else v for k, v in a.items()},
    "channels last": lambda a: {k: v[..., None] if v.ndim == 3 else v for k, v in a.items()},
    "one-hot": lambda a: {k: np.eye(3)[v[:, 0]] if v.ndim == 2 else v for k, v in a.items()},
    "words": lambda a: {k: np.array(list("abc"))[v[:, 0]] if v.ndim == 2 else v
        for k, v in a.items()},
    "floats": lambda a: {k: v.astype(np.float32) / 255 if v.ndim == 3 else v.astype(float)
        for k, v in a.items()},
    "products": lambda a: {k: v * np.float32(1 / 255) if v.ndim == 3 else v for k, v in a.items()},
    "halves": lambda a: {k: (v / 255).astype(np.float16) if v.ndim == 3 else v
        for k, v in a.items()},
    "integers": lambda a: {k: v.astype(np.int64) for k, v in a.items()},
    "large floats": lambda a: {k: v.astype(np.float64) for k, v in a.items()},
    "columns first": lambda a: {k: np.asfortranarray(v) for k, v in a.items()},
    "big endian": lambda a: {k: v.astype(">u2") for k, v in a.items()},
    "capitals": lambda a: {
        k.replace("images", "X").replace("labels", "Y"): v for k, v in a.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_the_same_images_is_the_same_set(tmp_path, form):
    given = medmnist_arrays(20, 20)
    images = read(saved(tmp_path, **FORMS[form](given)))
    for split, name in ((images.train, "train"), (images.test, "test")):
        assert split.pixels.dtype == np.uint8 and split.pixels.flags.c_contiguous
        assert np.array_equal(split.pixels[..., 0], given[f"{name}_images"])
        assert split.pixels.shape[3] == 1 and split.labels.dtype == np.int64
        assert split.labels.tolist() == given[f"{name}_labels"][:, 0].tolist()
    assert images.classes == (("a", "b", "c") if form == "words" else ("0", "1", "2"))
    assert ("left out: val_" in images.about.lower()) == (form not in ("keras", "val alone"))
    assert not images.remarks
    reference = given["train_images"].astype(np.float64) / 255
    assert np.allclose([*images.mean, *images.std], [reference.mean(), reference.std()], rtol=1e-13)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 1, 2)])
def test_colours_may_come_first_or_last(tmp_path, order):
    given = medmnist_arrays(20, 16, 3)
    turned = {k: v.transpose(order) if v.ndim == 4 else v for k, v in given.items()}
    images = read(saved(tmp_path, **turned))
    assert np.array_equal(images.train.pixels, given["train_images"])
    assert np.array_equal(images.test.pixels, given["test_images"])


def test_the_mean_and_the_deviation_are_of_each_channel(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "AT_ONCE", 5 * 9 * 7 * 3)  # in parts, the last of which is short
    given = medmnist_arrays(9, 7, 3)
    given["train_images"][..., 2] = 77
    images = read(saved(tmp_path, **given))
    mean, std = (
        f(given["train_images"].astype(np.float64) / 255, axis=(0, 1, 2)) for f in (np.mean, np.std)
    )
    assert np.allclose(images.mean, mean, rtol=1e-13)
    assert np.allclose(images.std[:2], std[:2], rtol=1e-12) and images.std[2] == 1


@every_loader
def test_every_loader_serves_the_pixels_of_an_npz_brought_to_a_size(tmp_path, loader, workers):
    given = medmnist_arrays(40, 52, 3)
    saved(tmp_path, **given)
    options = dict(dataset="npz", data_dir=str(tmp_path), image_size=24, augment="crop-flip")
    data, resident = opened(loader, workers, **options), opened(**options)
    images = read(tmp_path)
    view = T.Compose(
        [T.Resize(24), T.CenterCrop(24), T.ToTensor(), T.Normalize(images.mean, images.std)]
    )
    expected = torch.stack([view(Image.fromarray(image)) for image in given["test_images"]])
    assert torch.equal(served(data.test, list(range(9))), expected)
    for epoch in (None, 1):
        pairs = zip(every_batch(data.train, 5, 0, epoch), every_batch(resident.train, 5, 0, epoch),
            strict=True)  # fmt: skip
        assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


@pytest.mark.parametrize(
    ("sides", "side", "size"),
    [((28, 28), 28, 28), ((64, 80, 3), 64, 64), ((6, 9), 6, 8), ((96, 96), 96, 96),
     ((100, 130), 100, 96), ((300, 260), 260, 224)],
)  # fmt: skip
def test_the_size_of_the_run_follows_from_that_of_the_arrays(tmp_path, sides, side, size):
    root = saved(tmp_path, **medmnist_arrays(*sides))
    images, c = read(root), resolve({"dataset": "npz", "data_dir": str(root)})
    assert usual_side(images) == side
    settled = fitted(c, side)
    assert (settled.image_size, settled.augment) == (size, "crop-flip")
    assert served(open_data(settled, CPU).test, [0]).shape[2:] == (size, size)


def test_a_share_of_arrays_without_a_split_is_held_out_by_their_place(tmp_path):
    x, y = pixels(50, 12, 12), labels(50)
    root = saved(tmp_path, X=x, y=y)
    images = read(root, val_share=0.2)
    test = held_out([str(i) for i in range(50)], 0.2)
    assert 0 < test.sum() < 25
    for split, at in ((images.train, ~test), (images.test, test)):
        assert np.array_equal(split.pixels[..., 0], x[at]) and np.array_equal(split.labels, y[at])
    more = saved(tmp_path / "more", images=pixels(60, 12, 12), labels=labels(60))
    kept = read(more, val_share=0.2)
    assert np.array_equal(kept.test.labels[: test.sum()], y[test])
    saved(tmp_path / "train", train_images=x, train_labels=y)
    assert read(tmp_path / "train", val_share=0.2).fingerprint() == images.fingerprint()


def test_labels_with_gaps_are_the_classes_that_occur(tmp_path):
    given = medmnist_arrays(12, 12)
    given = {k: np.array([0, 3, 7])[v] if "labels" in k else v for k, v in given.items()}
    images = read(saved(tmp_path, **given))
    assert images.classes == ("0", "3", "7") and set(images.train.labels) == {0, 1, 2}
    assert images.remarks == (
        f"{tmp_path / 'some.npz'}: no image has the label 1 (nor 4 others): the classes are the 3 "
        "labels that occur",
    )


def test_the_file_itself_is_data_dir_where_there_are_several(tmp_path):
    saved(tmp_path, "a.npz", **medmnist_arrays(12, 12))
    saved(tmp_path, "b.npz", **medmnist_arrays(14, 14))
    (tmp_path / "b.npz").rename(tmp_path / "b.NPZ")
    given = {"data_dir": str(tmp_path / "b.NPZ")}  # recognised
    found = read_set(resolve(given))
    assert found.layout == "npz" and found.train.pixels.shape[1:] == (14, 14, 1)
    assert found.about.startswith("--dataset npz: one .npz; b.NPZ: train_images and test_images")
    with pytest.raises(
        DataError, match=r"holds 2 files .npz, such as a.npz and b.NPZ: give the pa"
    ):
        read_set(resolve({"data_dir": str(tmp_path)}))


def test_check_data_counts_the_arrays(tmp_path):
    saved(tmp_path, **medmnist_arrays(20, 24, 3))
    found = said(main, ["--check-data", "--data-dir", str(tmp_path)])
    assert found.code == 0 and not found.err, found
    lines = found.out.splitlines()
    assert lines[0] == (
        "--dataset npz: one .npz; some.npz: train_images and test_images of 24x20 pixels, 3 "
        "channels, left out: val_images, val_labels"
    )
    assert lines[1].startswith(
        "npz: 12 train and 9 test images, 3 classes, 0 bad; all 24x20 pixels"
    )


# What is wrong with an .npz


def without(given: dict, *names: str) -> dict:
    return {k: v for k, v in given.items() if k not in names}


def raw(name: str, header: str, content: bytes = b"", size: int | None = None) -> bytes:
    """An archive of one array with this header; `size` bytes are declared in its directory."""
    text = header.ljust(117).encode() + b"\n"
    array = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, array)
        given = medmnist_arrays(12, 12)
        for key in without(given, name.removesuffix(".npy")):
            member = io.BytesIO()
            np.save(member, given[key])
            archive.writestr(f"{key}.npy", member.getvalue())
    made = buffer.getvalue()
    if size is not None:  # of the first member, in the directory at the end
        at = made.index(b"PK\x01\x02") + 24
        made = made[:at] + size.to_bytes(4, "little") + made[at + 4 :]
    return made


BASE = medmnist_arrays(12, 12)
TRAIN, Y = BASE["train_images"], BASE["train_labels"]
UINT8 = "{'descr': '|u1', 'fortran_order': False, 'shape': (%s), }"
# what the folder holds, and what is said
FAULTS = {
    "no labels": (without(BASE, "train_labels"), "has no labels of train_images: wanted one .npz"),
    "no labels to test on": (without(BASE, "test_labels"), "has no labels of test_images"),
    "labels alone": (without(BASE, "train_images"), "holds no training images: wanted one .npz"),
    "test alone": ({"x_test": TRAIN, "y_test": Y}, "holds no training images"),
    "other names": ({"arr_0": TRAIN, "arr_1": Y}, "it has arr_0, arr_1"),
    "nothing": ({}, "holds no training images"),
    "two of one kind": (BASE | {"x_train": TRAIN}, "and x_train could both be the train images"),
    "fewer labels": (BASE | {"train_labels": Y[:-1]}, "has 11 labels for the 12 images"),
    "one label": (BASE | {"train_labels": np.array(3)}, "has one number for the 12 images"),
    "pickled images": (
        BASE | {"train_images": np.array([{}] * 12, object)},
        "train_images holds pickled Python objects, which are never loaded",
    ),
    "pickled labels": (
        BASE | {"train_labels": np.array(list("abc") * 4, object)},
        "train_labels holds pickled Python objects",
    ),
    "normalised": (BASE | {"train_images": TRAIN / 255 - 0.5}, "without normalisation"),
    "fractions": (BASE | {"train_images": (TRAIN + 0.5) / 256}, "has the value 0."),
    "not finite": (BASE | {"train_images": np.full(TRAIN.shape, np.nan)}, "has the value nan"),
    "16 bits": (BASE | {"train_images": TRAIN.astype(np.uint16) * 257}, "of uint16 has the value"),
    "complex": (BASE | {"train_images": TRAIN.astype(complex)}, "is of complex128, not of numbers"),
    "multi-label": (
        BASE | {"train_labels": np.tile([1, 0, 1, 0], (12, 1))},
        "marks 2 of 4 labels for image 0: only images of one class each",
    ),
    "no label of 14": (
        BASE | {"train_labels": np.zeros((12, 14), int)}, "marks 0 of 14 labels for image 0",
    ),
    "several numbers": (BASE | {"train_labels": np.tile([4, 7], (12, 1))}, "2 numbers an image"),
    "measures": (BASE | {"train_labels": Y + 0.25}, "has the value 0.25: classes are whole"),
    "no measure": (BASE | {"train_labels": Y * np.nan}, "has the value nan"),
    "times": (BASE | {"train_labels": Y.astype("M8[s]")}, "is of datetime64[s]: give whole"),
    "negative": (BASE | {"train_labels": Y - 1}, "has the label -1: classes are numbered from 0"),
    "huge": (BASE | {"train_labels": Y + 1e300}, "has the label 1000"),
    "words and numbers": (
        BASE | {"train_labels": np.array(list("abc") * 4)}, "of one split are numbers, of the",
    ),
    "volumes": (
        {k: pixels(len(v), 12, 12, 12) if "images" in k else v for k, v in BASE.items()},
        "train_images has volumes of 12x12x12: only images in two dimensions",
    ),
    "volumes of colours": (BASE | {"train_images": pixels(12, 9, 9, 9, 3)}, "volumes of 9x9x9"),
    "2 channels": (BASE | {"train_images": pixels(12, 2, 20, 20)}, "has 2 channels: images have 1"),
    "4 channels": (BASE | {"train_images": pixels(12, 20, 20, 4)}, "has 4 channels: images have 1"),
    "100 channels": (BASE | {"train_images": pixels(12, 20, 20, 100)}, "has 100 channels"),
    "rows": (BASE | {"train_images": pixels(12, 784)}, "has 784 numbers an image: reshape it to"),
    "numbers": (BASE | {"train_images": pixels(12)}, "has one number an image"),
    "empty": (BASE | {"train_images": pixels(0, 12, 12), "train_labels": Y[:0]}, "is empty"),
    "no width": (BASE | {"train_images": pixels(12, 12, 0)}, "train_images is empty"),
    "other sizes": (
        BASE | {"test_images": pixels(9, 14, 12)},
        "has images of 12x12 pixels, one channel, test_images of 12x14 pixels, one channel",
    ),
    "one class": (
        {k: v * 0 if "labels" in k else v for k, v in BASE.items()}, "has images of 1 classes",
    ),
    "a class to test on alone": (
        BASE | {"test_labels": BASE["test_labels"] + 1}, "no training images of class '3'",
    ),
    "all alike": (
        {k: v * 0 + 9 if "images" in k else v for k, v in BASE.items()}, "are alike",
    ),
    "no split": ({"x": TRAIN, "y": Y}, "hold some out with --val-share 0.1"),
    "no zip": (b"\x93NUMPY no archive", "not a .npz that can be read (File is not a zip file)"),
    "a pickle": (pickle.dumps(BASE), "not a .npz that can be read"),
    "an empty file": (b"", "not a .npz that can be read"),
    "no array": (raw("train_images.npy", "no header"), "not a .npz that can be read ("),
    "a negative shape": (raw("train_images.npy", UINT8 % "-12, 12, 12"), "is not as long as its"),
    "a short array": (raw("train_images.npy", UINT8 % "12, 12, 12", b"x"), "(1 bytes, not 1,728)"),
    "a long array": (raw("train_images.npy", UINT8 % "1, 8, 8", bytes(99)), "(99 bytes, not 64)"),
    "a false directory": (
        raw("train_images.npy", UINT8 % "12, 12, 12", bytes(9), 128 + 1728), "that can be read (",
    ),
    "a header that is code": (
        raw("train_images.npy", "__import__('os').abort()"), "not a .npz that can be read (",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_an_npz_is_named_in_one_line(tmp_path, fault):
    content, words = FAULTS[fault]
    path = tmp_path / "some.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez_compressed(path, **content)
    with pytest.raises(DataError) as error:
        read(tmp_path)
    message = one_line(error)
    assert words in message and str(tmp_path) in message and ": " in message


@pytest.mark.parametrize("cut", [0.3, 0.9, 0.999])
def test_a_truncated_or_damaged_npz_is_refused(tmp_path, cut):
    path = saved(tmp_path, **BASE) / "some.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * cut)])
    with pytest.raises(DataError, match=r"some.npz: not a .npz that can be read \("):
        read(tmp_path)
    at = int(len(whole) * cut / 4)  # inside the first array
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    with pytest.raises(DataError, match=r"some.npz: not a .npz that can be read \("):
        read(tmp_path)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    """100 GB of zeros, or what would not fit here: neither is read."""
    n = 10**8
    header = UINT8 % f"{n}, 32, 32"
    made = raw("train_images.npy", header, b"", 0xFFFFFFFF)
    (tmp_path / "some.npz").write_bytes(made)
    with pytest.raises(DataError, match="is not as long as its header says"):
        read(tmp_path)
    saved(tmp_path, **BASE)
    monkeypatch.setattr(memory, "free_memory", lambda device: 4000)
    monkeypatch.setattr(arrays, "unpacked", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(DataError) as error:
        read(tmp_path)
    assert "would take 0.0 GB of memory, of which 0.0 GB are free: keep fewer" in one_line(error)


def test_what_is_free_counts_what_the_system_only_keeps(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable:  7 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    assert memory.free_memory(CPU) == 7 * 1024
    for content in ("MemTotal: 9 kB\n", "MemAvailable: much kB\n"):
        (tmp_path / "meminfo").write_text(content)
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        assert memory.free_memory(CPU) == pytest.approx(free, rel=0.5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (BASE, "some.npz has test_images to test on already: leave --val-share out"),
        ({"x": TRAIN[:3], "y": Y[:3]}, "leaves no test images: give another share"),
    ],
    ids=["split", "few"],
)
def test_a_share_that_cannot_be_is_refused(tmp_path, given, words):
    with pytest.raises(DataError) as error:
        read(saved(tmp_path, **given), val_share=1e-9)
    assert words in one_line(error)


def test_a_folder_without_or_with_several_npz_and_a_pipe_are_refused_by_the_command(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("none").mkdir()
    os.mkfifo("pipe.npz")
    saved(Path("two"), "a.npz", **BASE)
    saved(Path("two"), "b.npz", **BASE)
    run = ["--dataset", "npz", "--epochs", "1", "--out", "run", "--data-dir"]
    for root, words in (
        ("none", "--data-dir none holds no .npz: give the folder of one, or its path"),
        ("two", "--data-dir two holds 2 files .npz, such as a.npz and b.npz: give the path"),
        ("nowhere", "--data-dir nowhere: no such directory"),
        ("pipe.npz", "it is a pipe, a socket or a device, not a file"),
    ):
        assert words in refused(main, [*run, root])
    message = refused(main, [*run, "two/a.npz", "--augment", "resized-crop-flip"])
    assert message == "--augment resized-crop-flip needs image files: npz has none"
    assert "--on-bad-image has no effect" in refused(main, [*run, "two", "--on-bad-image", "zeros"])
    assert not Path("run").exists()


# torchvision/NAME


def idx(array: np.ndarray) -> bytes:
    """A file of the MNIST family."""
    kind = {"uint8": 8, "int32": 12}[array.dtype.name]
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return (
        bytes([0, 0, kind, array.ndim])
        + sizes
        + array.astype(array.dtype.newbyteorder(">")).tobytes()
    )


def written(path: Path, content: bytes | str) -> str:
    """The MD5 sum of a new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return utils.calculate_md5(path)


X, XT = pixels(12, 28, 28, seed=1), pixels(6, 28, 28, seed=2)


def of_idx(root: Path, name: str, train: str = "{}", test: str = "{}", first: int = 0) -> None:
    for form, x in ((train, X), (test, XT)):
        y = labels(len(x)).astype(np.uint8) + first
        written(root / name / "raw" / form.format("images-idx3-ubyte"), idx(x))
        written(root / name / "raw" / form.format("labels-idx1-ubyte"), idx(y.astype(np.uint8)))


def mnist(root: Path, name: str = "MNIST") -> None:
    of_idx(root, name, "train-{}", "t10k-{}")


def qmnist(root: Path, patch) -> None:
    for split, x in (("train", X), ("test", XT)):
        y = np.zeros((len(x), 8), np.int32)
        y[:, 0], y[:, 1] = labels(len(x)), 7
        written(root / f"QMNIST/raw/qmnist-{split}-images-idx3-ubyte", idx(x))
        written(root / f"QMNIST/raw/qmnist-{split}-labels-idx2-int", idx(y))


def usps(root: Path, patch) -> None:
    for name, x in (("usps.bz2", X), ("usps.t.bz2", XT)):
        lines = (
            f"{y + 1} " + " ".join(f"{i + 1}:{v / 127.5 - 1:.6f}" for i, v in enumerate(row))
            for y, row in zip(labels(len(x)), x[:, :16, :16].reshape(len(x), -1), strict=True)
        )
        written(root / name, bz2.compress("\n".join(lines).encode()))


def svhn(root: Path, patch) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    files = {}
    for split, x in (("train", X), ("test", XT)):
        y = labels(len(x))[:, None].astype(np.uint8)
        y[y == 0] = 10
        shown = np.stack([x, 255 - x, x // 2], axis=3)[:, :24, :24]  # [n, H, W, C]
        root.mkdir(exist_ok=True)
        path = root / f"{split}_32x32.mat"
        scipy_io.savemat(path, {"X": shown.transpose(1, 2, 3, 0), "y": y})
        url, name, _ = datasets.SVHN.split_list[split]
        files[split] = [url, name, utils.calculate_md5(path)]
    patch.setattr(datasets.SVHN, "split_list", files)


def stl10(root: Path, patch) -> None:
    lists = []
    for split, n in (("train", 12), ("test", 6)):
        x, y = pixels(n, 3, 96, 96), (labels(n) + 1).astype(np.uint8)
        folder = root / "stl10_binary"
        lists.append(
            [
                [f"{split}_X.bin", written(folder / f"{split}_X.bin", x.tobytes())],
                [f"{split}_y.bin", written(folder / f"{split}_y.bin", y.tobytes())],
            ]
        )
    written(root / "stl10_binary/class_names.txt", "airplane\nbird\ncar\n")
    patch.setattr(datasets.STL10, "train_list", lists[0])
    patch.setattr(datasets.STL10, "test_list", lists[1])


def semeion(root: Path, patch) -> None:
    rows = [
        " ".join(map(str, [*(x[:16, :16] > 99).astype(int).ravel(), *np.eye(10, dtype=int)[y]]))
        for x, y in zip(X, labels(12), strict=True)
    ]
    patch.setattr(datasets.SEMEION, "md5_checksum", written(root / "semeion.data", "\n".join(rows)))


def fer2013(root: Path, patch) -> None:
    rows = ["emotion,pixels,Usage"]
    for usage, n in (("Training", 12), ("PublicTest", 3), ("PrivateTest", 3)):
        rows += [
            f"{y},{' '.join(map(str, x.ravel()))},{usage}"
            for x, y in zip(pixels(n, 48, 48), labels(n), strict=True)
        ]
    md5 = written(root / "fer2013/fer2013.csv", "\n".join(rows))
    resources = {key: ("fer2013.csv", md5) for key in datasets.FER2013._RESOURCES}
    patch.setattr(datasets.FER2013, "_RESOURCES", resources)


def flowers(root: Path, patch) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    folder = root / "flowers-102"
    tree(folder, {f"jpg/image_{i:05d}.jpg": noise((40, 30)) for i in range(1, 20)})
    scipy_io.savemat(folder / "imagelabels.mat", {"labels": labels(19)[None] + 1})
    ids = {"trnid": [[9, 1, 2, 3, 4, 5]], "valid": [[6, 7, 8]], "tstid": [list(range(10, 20))]}
    scipy_io.savemat(folder / "setid.mat", ids)
    found = dict(datasets.Flowers102._file_dict)
    for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat")):
        found[key] = (name, utils.calculate_md5(folder / name))
    patch.setattr(datasets.Flowers102, "_file_dict", found)


def cars(root: Path, patch) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    kind = [("class", int), ("fname", "O")]
    for split, where in (
        ("train", "devkit/cars_train_annos"),
        ("test", "cars_test_annos_withlabels"),
    ):
        rows = [(y + 1, f"{i:05d}.jpg") for i, y in enumerate(labels(6).tolist())]
        tree(folder, {f"cars_{split}/{name}": noise((30, 30)) for _, name in rows})
        scipy_io.savemat(folder / f"{where}.mat", {"annotations": np.array(rows, kind)})
    names = np.array(["Audi", "BMW", "Mini"], object)
    scipy_io.savemat(folder / "devkit/cars_meta.mat", {"class_names": names})


def folders(root: Path, *splits: str, names: str = "abc", form: str = "{}.jpg") -> None:
    """Class folders of 4 images, of 2 in the last of several splits."""
    for k, split in enumerate(splits):
        count = 2 if k and k == len(splits) - 1 else 4
        files = {
            f"{n}/{form.format(i)}": noise((30, 34)) for n in names for i in range(1, count + 1)
        }
        tree(root / split, files)


def food(root: Path, patch) -> None:
    folders(root, "food-101/images")
    for split, at in (("train", (3, 1)), ("test", (2, 4))):
        rows = {n: [f"{n}/{i}" for i in at] for n in "cab"}
        written(root / f"food-101/meta/{split}.json", json.dumps(rows))


def dtd(root: Path, patch) -> None:
    folders(root, "dtd/dtd/images")
    for split, at in (("train", (3, 1)), ("val", (2,)), ("test", (4,))):
        rows = [f"{n}/{i}.jpg" for n in "cab" for i in at]
        written(root / f"dtd/dtd/labels/{split}1.txt", "\n".join(rows))


def aircraft(root: Path, patch) -> None:
    folder = root / "fgvc-aircraft-2013b/data"
    tree(folder, {f"images/{i:07d}.jpg": noise((40, 30)) for i in range(12)})
    written(folder / "variants.txt", "707 a\nA380\nF-16\n")
    for split, at in (("trainval", range(8)), ("test", range(8, 12))):
        rows = [f"{i:07d} {('707 a', 'A380', 'F-16')[i % 3]}" for i in at]
        written(folder / f"images_variant_{split}.txt", "\n".join(rows))


def pets(root: Path, patch) -> None:
    folder = root / "oxford-iiit-pet"
    for split, at in (("trainval", range(6)), ("test", range(6, 9))):
        rows = [f"{('Abyssinian', 'basset_hound')[i % 2]}_{i} {i % 2 + 1} 1 1" for i in at]
        tree(folder, {f"images/{row.split()[0]}.jpg": noise((30, 40)) for row in rows})
        written(folder / f"annotations/{split}.txt", "\n".join(rows))


def gtsrb(root: Path, patch) -> None:
    folder = root / "gtsrb/GTSRB"
    folders(folder, "Training", names=("00000", "00001", "00002"), form="{}.ppm")
    tree(folder, {f"Final_Test/Images/{i:05d}.ppm": noise((25, 27)) for i in range(4)})
    rows = ["Filename;Width;ClassId", *(f"{i:05d}.ppm;27;{i % 3}" for i in range(4))]
    written(root / "gtsrb/GT-final_test.csv", "\n".join(rows))


def clevr(root: Path, patch) -> None:
    folder = root / "clevr/CLEVR_v1.0"
    for split, n in (("train", 8), ("val", 4)):
        files = [f"CLEVR_{split}_{i:06d}.png" for i in range(n)]
        tree(folder / "images" / split, {name: noise((48, 32)) for name in files})
        scenes = [
            {"image_filename": name, "objects": [0] * (3 + i % 2)} for i, name in enumerate(files)
        ]
        text = json.dumps({"scenes": scenes})
        written(folder / f"scenes/CLEVR_{split}_scenes.json", text)


def sun(root: Path, patch) -> None:
    for name in ("a/abbey", "b/bar/indoor"):
        tree(root / "SUN397" / name, {f"sun_{name[0]}{i}.jpg": noise((30, 30)) for i in range(9)})
    written(root / "SUN397/ClassName.txt", "/a/abbey\n/b/bar/indoor\n")


def caltech256(root: Path, patch) -> None:
    for y, name in enumerate(("001.ak47", "002.flag")):
        folder = root / "caltech256/256_ObjectCategories" / name
        tree(folder, {f"{y + 1:03d}_{i:04d}.jpg": noise((30, 30)) for i in range(1, 9)})


def caltech101(root: Path, patch) -> None:
    folder = root / "caltech101/101_ObjectCategories"
    folders(folder, ".", names=("BACKGROUND_Google", "Faces", "ant"), form="image_{:04d}.jpg")
    noise((30, 30)).convert("L").save(folder / "ant/image_0002.jpg")  # some are grey
    tree(folder, {f"ant/image_{i:04d}.jpg": noise((30, 30)) for i in range(5, 12)})


# by name: what makes it, and its default augmentation
ZOO = {
    "MNIST": (lambda root, patch: mnist(root), "none"),
    "FashionMNIST": (lambda root, patch: mnist(root, "FashionMNIST"), "crop-flip"),
    "KMNIST": (lambda root, patch: mnist(root, "KMNIST"), "none"),
    "EMNIST-letters": (
        lambda root, patch: of_idx(
            root, "EMNIST", "emnist-letters-train-{}", "emnist-letters-test-{}", 1
        ),
        "none",
    ),
    "QMNIST": (qmnist, "none"),
    "USPS": (usps, "none"),
    "SVHN": (svhn, "none"),
    "STL10": (stl10, "crop-flip"),
    "SEMEION": (semeion, "none"),
    "FER2013": (fer2013, "crop-flip"),
    "Flowers102": (flowers, ""),
    "OxfordIIITPet": (pets, ""),
    "Food101": (food, ""),
    "DTD": (dtd, ""),
    "FGVCAircraft": (aircraft, ""),
    "StanfordCars": (cars, ""),
    "GTSRB": (gtsrb, "none"),
    "Country211": (lambda root, patch: folders(root / "country211", "train", "test"), ""),
    "RenderedSST2": (
        lambda root, patch: folders(
            root / "rendered-sst2", "train", "test", names=("negative", "positive"), form="{}.png"
        ),
        "none",
    ),
    "Imagenette": (
        lambda root, patch: folders(
            root / "imagenette2", "train", "val", names=("n01440764", "n02102040"), form="{}.jpeg"
        ),
        "",
    ),
    "CLEVRClassification": (clevr, ""),
    "EuroSAT": (
        lambda root, patch: folders(root / "eurosat", "2750", names=("Forest", "River")),
        "",
    ),
    "SUN397": (sun, ""),
    "Caltech101": (caltech101, ""),
    "Caltech256": (caltech256, ""),
}
CALLED = {  # the classes as torchvision calls them
    "MNIST": ("0 - zero", "1 - one", "2 - two"),
    "EMNIST-letters": ("a", "b", "c"),
    "Imagenette": ("tench, Tinca tinca", "English springer, English springer spaniel"),
    "OxfordIIITPet": ("Abyssinian", "Basset Hound"),
    "StanfordCars": ("Audi", "BMW", "Mini"),
    "Caltech101": ("Faces", "ant"),
    "SVHN": ("0", "1", "2"),
    "CLEVRClassification": ("3", "4"),
}


def test_every_row_of_the_zoo_is_tried_here():
    others = {f"EMNIST-{part}" for part in datasets.EMNIST.splits if part != "letters"}
    assert ZOO.keys() | others == zoo.ROWS.keys()
    files = {name for name, row in zoo.ROWS.items() if row.files}
    assert files == facts.PHOTOGRAPHS
    assert {name.partition("-")[0] for name in zoo.ROWS} >= facts.HANDED


def theirs(name: str, given: dict, root: Path):
    download = {} if name == "FER2013" else {"download": False}
    return getattr(datasets, name.partition("-")[0])(str(root), **given, **download)


def as_set(pairs) -> list[tuple[int, bytes]]:
    """(label, pixels) of images, in an order of their own."""
    return sorted((int(label), image.tobytes()) for image, label in pairs)


@pytest.mark.parametrize("name", ZOO)
def test_a_data_set_of_torchvision_has_its_items(tmp_path, monkeypatch, name):
    """Bit for bit, whatever order torchvision has them in."""
    make, kind = ZOO[name]
    make(tmp_path, monkeypatch)
    row = zoo.ROWS[name]
    share = {} if row.test is not None else {"val_share": 0.3}
    c = resolve({"dataset": f"torchvision/{name}", "data_dir": str(tmp_path), **share})
    assert c.augment == kind
    images = read_set(c)
    side = usual_side(images)
    c = fitted(c, side)
    data = open_data(c, CPU, images=images)
    view = T.Compose(
        [
            lambda image: image.convert("RGB") if row.files else image,
            lambda image: augment.evaluation_view(image, c.augment, c.image_size),
            T.ToTensor(),
            T.Normalize(images.mean, images.std),
        ]
    )
    ours, expected = [], []
    for split, given in ((data.train, row.train), (data.test, row.test)):
        index = torch.arange(len(split))
        x, y = next(split.batches([index]))
        ours.append([(i, images.classes[k]) for i, k in zip(x.numpy(), y.tolist(), strict=True)])
        if given is not None:
            dataset = theirs(name, given, tmp_path)
            expected.append([dataset[i] for i in range(len(dataset))])
    if len(expected) == 1:
        ours = [ours[0] + ours[1]]
        assert len(data.train) > len(data.test) > 0
    for found, items in zip(ours, expected, strict=True):
        wanted = [(view(image).numpy(), label) for image, label in items]
        assert as_set(found) == as_set(wanted)
        if row.files is None and len(expected) == 2:  # an array's order is its own
            assert [label for _, label in found] == [str(label) for _, label in wanted]
    assert data.class_names == CALLED.get(name, data.class_names)
    assert images.about.startswith(f"torchvision.datasets.{name.partition('-')[0]}")
    if row.files:
        assert images.mean == common.IMAGENET_MEAN
        root = os.path.abspath(tmp_path)
        names = [os.path.relpath(path, root) for path in images.train.files.names]
        assert list(zip(images.train.labels.tolist(), names, strict=True)) == sorted(
            zip(images.train.labels.tolist(), names, strict=True)
        )
    else:
        assert images.mean != common.IMAGENET_MEAN
        assert data.channels == (3 if name in ("SVHN", "STL10") else 1)


def test_a_run_on_a_set_of_torchvision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mnist(Path("data"))
    flags = ["--dataset", "torchvision/MNIST", "--model", "resnet8", "--epochs", "1"]
    found = said(main, [*flags, "--device", "cpu", "--batchsize", "4"])
    assert found.code == 0 and not found.err, found
    lines = found.out.splitlines()
    assert lines[0].startswith("torchvision/MNIST: 12 training and 6 test images, loader resident")
    assert (
        "torchvision.datasets.MNIST: train=True and train=False, 28x28 pixels, one channel" in lines
    )
    assert "3 classes, images brought to 28x28 pixels, no augmentation" in lines
    (folder,) = Path("runs").iterdir()
    assert folder.name.endswith("-torchvision-MNIST-constant")
    assert said(main, ["--check-data", *flags[:2], "--data-dir", "data"]).code == 0
    assert said(main, ["--resume", "--out", str(folder)]).code == 0


def test_photographs_of_torchvision_are_cropped_and_a_bad_one_is_served_black(
    tmp_path, monkeypatch
):
    folders(tmp_path / "eurosat", "2750", names=("Forest", "River"))
    for path in (tmp_path / "eurosat/2750").rglob("*.jpg"):
        noise((90, 120)).save(path)
    (tmp_path / "eurosat/2750/Forest/3.jpg").write_bytes(b"no image")
    given = dict(dataset="torchvision/EuroSAT", data_dir=str(tmp_path), val_share=0.3)
    assert resolve(given | {"image_size": 80}).augment == "resized-crop-flip"
    with pytest.raises(DataError, match=r"Forest/3.jpg: not an image that can be read"):
        opened("threads", 1, **given, image_size=80)
    data = opened("threads", 1, **given, image_size=80, on_bad_image="zeros")
    for split in (data.train, data.test):
        every_batch(split, epoch=1)
    assert len(data.bad.reasons) == 1


# What is wrong with a set of torchvision


def of_torchvision(name: str, root: Path, **given):
    return read_set(resolve({"dataset": f"torchvision/{name}", "data_dir": str(root), **given}))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mnist", "did you mean torchvision/MNIST?"),
        ("FashonMNIST", "did you mean torchvision/FashionMNIST?"),
        ("flowers-102", "did you mean torchvision/Flowers102?"),
        ("EMNIST", "name one of its parts, such as torchvision/EMNIST-balanced"),
        ("CIFAR10", "is not read: use --dataset cifar10"),
        ("Omniglot", "have no class in common"),
        ("CelebA", "its images have several labels each"),
        ("VOCDetection", "its images have no classes: choose from MNIST, "),
        ("Sintel", "its images have no classes: choose from MNIST, "),
        ("ResNet", "--dataset torchvision/ResNet: not a data set that is read: there are MNIST, "),
        ("../x", "there are MNIST, "),
        ("", "there are MNIST, "),
    ],
)
def test_what_is_no_set_of_torchvision_is_refused_with_what_may_have_been_meant(
    tmp_path, name, words
):
    with pytest.raises(DataError) as error:
        of_torchvision(name, tmp_path)
    assert words in one_line(error) and "  " not in one_line(error)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def offline(monkeypatch) -> list[str]:
    """No address answers; those that were asked for."""
    asked = []

    def refuse(request, *_, **__):
        asked.append(getattr(request, "full_url", request))
        raise urllib.error.URLError(OSError(101, "Network is unreachable"))

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    return asked


@pytest.mark.parametrize(
    "name", ["MNIST", "SVHN", "STL10", "USPS", "Flowers102", "EMNIST-digits", "Food101", "EuroSAT"]
)
def test_a_set_that_is_not_there_and_cannot_be_downloaded_says_what_to_put_where(
    tmp_path, offline, name
):
    share = {"val_share": 0.1} if zoo.ROWS[name].test is None else {}
    with pytest.raises(DataError) as error:
        of_torchvision(name, tmp_path / "data", **share)
    message = one_line(error)
    assert message.startswith(f"--dataset torchvision/{name}: {tmp_path}/data has no sound copy of")
    assert "cannot be downloaded (" in message and "unreachable" in message and offline
    assert message.endswith(f": put {zoo.ROWS[name].holds} into {tmp_path}/data")


def test_sets_that_nobody_may_download_say_so_too(tmp_path, offline):
    pytest.importorskip("scipy.io")
    for name, words in (
        ("StanfordCars", "cannot be downloaded anymore"),
        ("FER2013", "kaggle.com"),
    ):
        with pytest.raises(DataError) as error:
            of_torchvision(name, tmp_path)
        assert words in one_line(error) and "put " in one_line(error) and not offline


def test_files_of_another_checksum_are_fetched_again_or_refused(tmp_path, monkeypatch, offline):
    svhn(tmp_path, monkeypatch)
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"no sound copy of it \(Dataset not found or corrupted"):
        of_torchvision("SVHN", tmp_path)
    assert offline and path.exists()


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    svhn(tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(DataError) as error:
        of_torchvision("SVHN", tmp_path)
    assert one_line(error).startswith("torchvision/SVHN is read with scipy")


def damaged(name: str, content: bytes) -> dict[str, bytes]:
    return {f"MNIST/raw/{name}": content}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (damaged("train-images-idx3-ubyte", b"\0\0\x08\x03\0\0\0\x0c"), "cannot be read by"),
        (damaged("train-images-idx3-ubyte", b""), "cannot be read by torchvision"),
        (damaged("train-labels-idx1-ubyte", idx(X)), "x should have 1 dimension"),
        (damaged("train-labels-idx1-ubyte", idx(np.zeros(5, np.uint8))), "5 labels for 12 images"),
        (damaged("train-images-idx3-ubyte", idx(pixels(0, 28, 28))), "cannot be read by"),
        (damaged("train-labels-idx1-ubyte", idx(np.full(12, 7, np.uint8))), "no training images"),
        (damaged("t10k-labels-idx1-ubyte", idx(np.full(6, 9, np.uint8))), "class '9'"),
    ],
    ids=["cut", "empty", "images for labels", "fewer labels", "none", "other classes", "new class"],
)
def test_damaged_files_of_a_set_are_one_line(tmp_path, files, words):
    mnist(tmp_path)
    tree(tmp_path, files)
    with pytest.raises(DataError) as error:
        of_torchvision("MNIST", tmp_path)
    assert words in one_line(error)


def test_a_share_is_for_sets_without_a_split(tmp_path, monkeypatch):
    mnist(tmp_path)
    with pytest.raises(DataError) as error:
        of_torchvision("MNIST", tmp_path, val_share=0.1)
    assert one_line(error) == (
        "torchvision/MNIST is split into training and test images already: leave --val-share out"
    )
    semeion(tmp_path, monkeypatch)
    with pytest.raises(DataError) as error:
        of_torchvision("SEMEION", tmp_path)
    assert one_line(error).startswith("torchvision/SEMEION has one split, and no split into")


def test_the_command_refuses_them_in_one_line(tmp_path, monkeypatch, offline):
    monkeypatch.chdir(tmp_path)
    mnist(Path("data"))
    run = ["--epochs", "1", "--out", "run", "--dataset"]
    for name, flags, words in (
        ("torchvision/mnits", [], "did you mean torchvision/MNIST?"),
        ("torchvision/KMNIST", [], "cannot be downloaded"),
        ("torchvision/MNIST", ["--augment", "resized-crop-flip"], "needs image files"),
        ("torchvision/MNIST", ["--on-bad-image", "zeros"], "--on-bad-image has no effect"),
        ("torchvision/MNIST", ["--loader", "dali", "--augment", "resized-crop-flip"], "files"),
    ):
        assert words in refused(main, [*run, name, *flags])
    assert not Path("run").exists()


def test_two_processes_do_not_download_at_the_same_time(tmp_path):
    seen = []

    def hold() -> None:
        with zoo.alone(tmp_path):
            seen.append("in")
            assert seen.count("in") == seen.count("out") + 1
            time.sleep(0.05)
            seen.append("out")

    threads = [threading.Thread(target=hold) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["in", "out"] * 3
