"""ImageNet and Tiny ImageNet in the forms in which people have them: each gives what class folders
of the same images give, and one line for whatever is wrong."""

import gzip
import hashlib
import importlib.util
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from archives import ARCHIVES, tar_of
from images import CPU, LOADERS, one_line, tree
from said import refused, said
from torchvision.datasets import ImageFolder
from torchvision.models import ResNet18_Weights

from fastsmooth import data
from fastsmooth.cli.config import resolve
from fastsmooth.data import DataError, open_data, sets, tars
from fastsmooth.data.images import ImageSet
from fastsmooth.data.layouts import flat as flat_layouts
from fastsmooth.data.layouts import imagenet_facts, imagenet_labels
from fastsmooth.kernels import native
from fastsmooth.train import main

FACTS = imagenet_facts.facts()
TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"
GROUND_TRUTH = "data/ILSVRC2012_validation_ground_truth.txt"
CLS_LOC = "ILSVRC/Data/CLS-LOC"


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """The kernels, before the cache is another: they would be compiled anew."""
    native.library()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastsmooth"


def numbers(wnid: str) -> list[int]:
    """Those of the validation images of a class."""
    return (np.flatnonzero(FACTS.labels == FACTS.wnids.index(wnid)) + 1).tolist()


def val_name(number: int) -> str:
    return f"ILSVRC2012_val_{number:08}"


def read(root: Path, dataset: str = "imagenet") -> ImageSet:
    return data.read_set(resolve({"dataset": dataset, "data_dir": str(root)}))


# The forms of a tree {train/WNID/NAME, val/WNID/NAME: bytes}

Files = dict[str, bytes]


def split(files: Files, part: str) -> dict[tuple[str, str], bytes]:
    """The images of a part by class and name."""
    return {
        (path.split("/")[1], path.split("/")[2]): content
        for path, content in files.items()
        if path.startswith(f"{part}/")
    }


def packed(files: Files, mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def inner_tars(files: Files) -> Files:
    """The training images as WNID.tar, in an order that is not theirs."""
    images = split(files, "train")
    return {
        f"{wnid}.tar": packed(
            {n: images[w, n] for w, n in sorted(images, reverse=True) if w == wnid}
        )
        for wnid in sorted({wnid for wnid, _ in images}, reverse=True)
    }


def train_folder(files: Files) -> Files:
    return {path: content for path, content in files.items() if path.startswith("train/")}


def val_folder(files: Files) -> Files:
    return {path: content for path, content in files.items() if path.startswith("val/")}


def train_tar(files: Files) -> Files:
    return {TRAIN_TAR: packed(inner_tars(files))}


def flat(files: Files) -> Files:
    return {f"val/{name}": content for (_, name), content in split(files, "val").items()}


def val_tar(files: Files) -> Files:
    images = split(files, "val")
    return {VAL_TAR: packed({name: images[w, name] for w, name in sorted(images, reverse=True)})}


def csv(files: Files) -> Files:
    rows = [
        f"{name[:-5]},{wnid} 85 1 499 272 {wnid} 1 2 3 4 " for wnid, name in split(files, "val")
    ]
    return {"LOC_val_solution.csv": "\r\n".join(["ImageId,PredictionString", *rows, ""]).encode()}


def ids() -> np.ndarray:
    """The devkit's number of each class: in another order than that of the ids."""
    return np.random.default_rng(3).permutation(1000) + 1


def ground_truth(change: Callable[[list], None] = lambda lines: None) -> bytes:
    lines = ids()[FACTS.labels].tolist()
    change(lines)
    return "".join(f"{line}\n" for line in lines).encode()


def devkit(change: Callable[[list], None] = lambda lines: None) -> Files:
    return {f"{DEVKIT}/{GROUND_TRUTH}": ground_truth(change), f"{DEVKIT}/readme.txt": b"words"}


def devkit_tar(files: Files) -> Files:
    return {f"{DEVKIT}.tar.gz": tar_of(files)}


def below(folder: str, files: Files) -> Files:
    return {f"{folder}/{path}": content for path, content in files.items()}


def kaggle(files: Files) -> Files:
    return below(CLS_LOC, train_folder(files) | flat(files)) | csv(files)


def tiny(files: Files, sorted_as: str = "") -> Files:
    """Tiny ImageNet's form; with `sorted_as` its validation images in class folders."""
    classes = sorted({wnid for wnid, _ in split(files, "train")})
    found = {f"train/{w}/images/{n}": c for (w, n), c in split(files, "train").items()}
    found |= {f"train/{wnid}/{wnid}_boxes.txt": b"a\t0\t0\t63\t63\n" for wnid in classes}
    found |= {"test/images/test_0.JPEG": b"no label", "wnids.txt": "\n".join(classes).encode()}
    found["words.txt"] = "".join(
        f"{wnid}\tthing {k}, another word\n" for k, wnid in enumerate(("n00001740", *classes))
    ).encode()
    images = split(files, "val")
    lines = [f"{name}\t{wnid}\t0\t32\t44\t62\n" for wnid, name in images]
    found["val/val_annotations.txt"] = "".join(reversed(lines)).encode()
    where = sorted_as or "val/images/{name}"
    return found | {where.format(wnid=w, name=n): c for (w, n), c in images.items()}


# form: (the data set, what it makes of the tree, where in it --data-dir is)
FORMS: dict[str, tuple[str, Callable[[Files], Files], str]] = {
    "sorted": ("imagenet", dict, ""),
    "as downloaded": ("imagenet", lambda f: train_folder(f) | flat(f), ""),
    "with a csv": ("imagenet", lambda f: train_folder(f) | flat(f) | csv(f), ""),
    "with a devkit": ("imagenet", lambda f: train_folder(f) | flat(f) | devkit(), ""),
    "with a devkit's tar": (
        "imagenet", lambda f: train_folder(f) | flat(f) | devkit_tar(devkit()), "",
    ),
    "kaggle": ("imagenet", kaggle, ""),
    "kaggle's ILSVRC": ("imagenet", kaggle, "ILSVRC"),
    "kaggle's CLS-LOC": ("imagenet", kaggle, CLS_LOC),
    "kaggle's Data, renamed": (
        "imagenet",
        lambda f: below("in/Data/CLS-LOC", train_folder(f) | flat(f)) | below("in", csv(f)),
        "in",
    ),
    "kaggle, sorted": ("imagenet", lambda f: below(CLS_LOC, f), ""),
    "tars": ("imagenet", lambda f: train_tar(f) | val_tar(f) | devkit_tar(devkit()), ""),
    "train tar, val flat": ("imagenet", lambda f: train_tar(f) | flat(f), ""),
    "train tar, val sorted": ("imagenet", lambda f: train_tar(f) | val_folder(f), ""),
    "train sorted, val tar": ("imagenet", lambda f: train_folder(f) | val_tar(f), ""),
    "unpacked, tars kept": ("imagenet", lambda f: f | train_tar(f) | val_tar(f), ""),
    "tiny": ("tiny-imagenet", tiny, ""),
    "tiny, as unpacked": ("tiny-imagenet", lambda f: below("tiny-imagenet-200", tiny(f)), ""),
    "tiny, sorted": ("tiny-imagenet", lambda f: tiny(f, "val/{wnid}/{name}"), ""),
    "tiny, sorted with images": (
        "tiny-imagenet", lambda f: tiny(f, "val/{wnid}/images/{name}") | {"val/images/.x": b""}, "",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def photographs(imagenet_folder) -> Files:
    """The smallest of the photographs, under ImageNet's names: two to train and two to validate on,
    of each of six classes."""
    paths = sorted(imagenet_folder.glob("train/*/*"), key=lambda path: (path.stat().st_size, path))
    wnids = sorted(path.parent.name for path in paths[:12])[::2]
    contents = [path.read_bytes() for path in paths[:24]]
    files: Files = {}
    for k, wnid in enumerate(wnids):
        for i, number in enumerate((10042, 995)):  # whose order is that of the names
            files[f"train/{wnid}/{wnid}_{number}.JPEG"] = contents[4 * k + i]
        for i, number in enumerate(numbers(wnid)[7:9]):
            files[f"val/{wnid}/{val_name(number)}.JPEG"] = contents[4 * k + 2 + i]
    assert len(set(files.values())) == len(files) == 24
    return files


@pytest.mark.parametrize("dataset", ["named", "auto"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_what_class_folders_give(tmp_path, photographs, form, dataset):
    """The images that torchvision's ImageFolder finds, byte for byte and in its order."""
    name, arranged, where = FORMS[form]
    tree(tmp_path / "tree", photographs)
    root = tree(tmp_path / "form", arranged(photographs)) / where
    found = read(root, name if dataset == "named" else "auto")
    assert found.layout == name and found.remarks == ()
    for part, folder in ((found.train, "train"), (found.test, "val")):
        expected = ImageFolder(str(tmp_path / "tree" / folder))
        assert found.classes == tuple(expected.classes)
        assert part.labels.tolist() == expected.targets and part.labels.dtype == np.int64
        for i, (path, _) in enumerate(expected.samples):
            assert part.files.read(i).tobytes() == Path(path).read_bytes()
            assert os.path.basename(part.files.names[i]) == os.path.basename(path)
            assert part.files.names[i].startswith(str(tmp_path / "form"))
    assert ("labels from LOC_val_solution.csv" in found.about) == (
        "csv" in form or ("kaggle" in form and "sorted" not in form)
    )
    assert ("labels from ILSVRC2012_devkit_t12" in found.about) == (
        "devkit" in form or form == "tars"
    )
    evidence = f"--dataset {name}: "
    assert found.about.startswith(evidence) == (dataset == "auto") and "\n" not in found.about
    assert "labels from" in found.about or "class folders" in found.about


def batches(root: Path, dataset: str, loader: str, workers: int) -> list[torch.Tensor]:
    """All images, augmented and as they are tested, and their labels."""
    given = {"dataset": dataset, "data_dir": str(root), "loader": loader, "image_size": 32}
    more = {} if loader == "resident" else {"workers": workers}
    opened = open_data(resolve(given | more | {"augment": "crop-flip"}), CPU, pytest.fail)
    every = [torch.arange(len(opened.train))], [torch.arange(len(opened.test))]
    (trained,), (tested,) = opened.train.batches(every[0], epoch=1), opened.test.batches(every[1])
    return [*trained, *tested]


@pytest.fixture(scope="module")
def from_folders(photographs, compiled, tmp_path_factory) -> dict:
    """What class folders give, by loader."""
    root = tree(tmp_path_factory.mktemp("folders"), photographs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        return {row: batches(root, "folder", *row) for row in LOADERS}


@pytest.mark.parametrize(("loader", "workers"), LOADERS)
@pytest.mark.parametrize("form", ["as downloaded", "kaggle", "tars", "tiny"])
def test_every_loader_serves_the_same_pixels(
    tmp_path, photographs, from_folders, form, loader, workers
):
    dataset, arranged, _ = FORMS[form]
    root = tree(tmp_path / "form", arranged(photographs))
    found = batches(root, dataset, loader, workers)
    for ours, expected in zip(found, from_folders[loader, workers], strict=True):
        assert torch.equal(ours, expected)
    # torch's are resident's
    if loader == "torch":
        for ours, expected in zip(found, from_folders["resident", 0], strict=True):
            assert torch.equal(ours, expected)


# What is shipped


def test_classes_names_and_labels_are_the_published_ones():
    assert FACTS.names == tuple(ResNet18_Weights.DEFAULT.meta["categories"])
    assert len(set(FACTS.names)) == len(set(FACTS.wnids)) == 1000
    assert FACTS.wnids == tuple(sorted(FACTS.wnids))
    assert np.bincount(FACTS.labels, minlength=1000).tolist() == [50] * 1000
    assert FACTS.names[FACTS.labels[0]] == "sea snake"  # as the first image shows
    assert os.path.getsize(Path(data.__file__).with_name("imagenet.npz")) < 90_000


def test_classes_and_names_are_timms():
    spec = importlib.util.find_spec("timm")
    if spec is None:
        pytest.skip("timm is not installed")
    folder = Path(spec.origin).parent / "data" / "_info"  # importing it takes seconds
    assert tuple((folder / "imagenet_synsets.txt").read_text().split()) == FACTS.wnids
    words = dict(
        line.split("\t", 1)
        for line in (folder / "imagenet_synset_to_lemma.txt").read_text().splitlines()
    )
    others = {
        name
        for wnid, name in zip(FACTS.wnids, FACTS.names, strict=True)
        if name not in words[wnid].split(", ")
    }
    # what WordNet calls as it calls another class
    assert others == {"crane bird", "maillot tank suit"}


def test_labels_are_those_of_the_list_that_lies_beside_the_checkout():
    source = ARCHIVES / "imagenet-val-wnids.txt.gz"
    if not source.is_file():
        pytest.skip(f"{source} is not there")
    lines = gzip.decompress(source.read_bytes()).decode().split()
    assert [FACTS.wnids[label] for label in FACTS.labels] == lines


@pytest.mark.parametrize("dataset", ["imagenet", "folder", "auto"])
def test_class_folders_have_the_fingerprint_that_they_had_and_names_for_people(
    tmp_path, photographs, dataset
):
    found = read(tree(tmp_path, photographs), dataset)
    digest = hashlib.sha256(repr((found.classes, found.mean, found.std)).encode())
    for part in ("train", "val"):
        folder = ImageFolder(str(tmp_path / part))
        digest.update(np.array(folder.targets, np.int64).tobytes())
        names = [os.path.relpath(path, tmp_path / part) for path, _ in folder.samples]
        digest.update("\0".join(names).encode())
    assert found.fingerprint() == digest.hexdigest()
    words = dict(zip(FACTS.wnids, FACTS.names, strict=True))
    assert found.names == tuple(words[wnid] for wnid in found.classes)


def test_tiny_imagenets_names_are_those_of_words_txt_unless_two_are_alike(tmp_path, photographs):
    root = tree(tmp_path, tiny(photographs))
    found = read(root, "tiny-imagenet")
    assert found.names == tuple(f"thing {k}" for k in range(1, 7))
    words = [f"{wnid}\tcrane, kind {k}\n" for k, wnid in enumerate(found.classes[:2])]
    words += [f"{wnid}\tcat {k}, other\n" for k, wnid in enumerate(found.classes[2:])]
    (root / "words.txt").write_text("".join(words))
    assert read(root, "tiny-imagenet").names[:3] == ("crane, kind 0", "crane, kind 1", "cat 0")
    (root / "words.txt").unlink()
    names = dict(zip(FACTS.wnids, FACTS.names, strict=True))
    assert read(root, "tiny-imagenet").names == tuple(names[c] for c in found.classes)


# Parts of it


A, B, C = FACTS.wnids[:3]


def few(**more: bytes) -> Files:
    """Three images of each of two classes, in class folders; they are no images."""
    files = {f"train/{wnid}/{wnid}_{k}.JPEG": b"%d" % k for wnid in (A, B) for k in range(3)}
    return files | {
        f"val/{wnid}/{val_name(number)}.JPEG": b"%d" % number
        for wnid in (A, B)
        for number in numbers(wnid)[:3]
    }


FLAT = train_folder(few()) | flat(few())
FIRST = val_name(min(numbers(A)[0], numbers(B)[0]))


def test_validation_images_of_other_classes_are_left_out_and_counted(tmp_path):
    others = {
        f"val/{val_name(n)}.JPEG": b"x" for n in (*numbers(C)[:4], numbers(FACTS.wnids[9])[0])
    }
    root = tree(tmp_path / "tree", FLAT | others)
    line = f"{root / 'val'}: images of 2 classes that have no training images are left out: 5"
    assert read(root).remarks == (line,) and len(read(root).test) == 6
    root = tree(tmp_path / "tars", train_tar(few()) | val_tar(few() | below(f"val/{C}", {
        f"{val_name(numbers(C)[0])}.JPEG": b"x"
    })))  # fmt: skip
    line = f"{root / VAL_TAR}: images of 1 classes that have no training images are left out: 1"
    assert read(root).remarks == (line,)


def test_tiny_imagenets_images_of_other_classes_are_left_out_and_counted(tmp_path):
    files = annotated(f"val_7.JPEG\t{C}\t1\t2\t3\t4") | {"val/images/val_7.JPEG": b"x"}
    root = tree(tmp_path, files | {"wnids.txt": f"{C}\r\n{A}\r\n{B}\r\n".encode()})
    line = f"{root / 'val'}: images of 1 classes that have no training images are left out: 1"
    assert read(root, "tiny-imagenet").remarks == (line,)


@pytest.mark.parametrize("form", ["kaggle's CLS-LOC", "tiny", "tars"])
def test_a_folder_may_be_named_from_within(tmp_path, monkeypatch, form):
    dataset, arranged, where = FORMS[form]
    root = tree(tmp_path, arranged(few())) / where
    monkeypatch.chdir(root)
    here, there = read(Path("."), dataset), read(root, dataset)
    assert here.fingerprint() == there.fingerprint() and here.about == there.about


def test_a_class_that_is_never_tested_and_images_in_no_class_are_remarked(tmp_path):
    files = FLAT | {f"train/{C}/1.JPEG": b"x", "train/1.JPEG": b"x"}
    root = tree(tmp_path, files)
    assert read(root).remarks == (
        f"{root / 'train'}: images that lie in no class folder are left out: 1",
        f"no test images of class {C!r}: never tested",
    )


def test_all_validation_images_are_labelled_alike_by_number_csv_and_devkit(tmp_path):
    names = [f"{val_name(k + 1)}.JPEG" for k in range(50_000)]
    known = [FACTS.wnids[label] for label in FACTS.labels]
    rows = [f"{name[:-5]},{wnid} 1 2 3 4" for name, wnid in zip(names, known, strict=True)]
    text = "\n".join(["ImageId,PredictionString", *sorted(rows, key=hash)]).encode()
    sources = {"their numbers": {}, f"{DEVKIT}.tar.gz": devkit_tar(devkit())}
    for source, files in (
        sources | {"LOC_val_solution.csv": {"LOC_val_solution.csv": text}}
    ).items():
        root = tree(tmp_path, files)
        assert imagenet_labels.labels_of(root / "val", names, [root]) == (known, source)


def test_a_csv_wins_over_what_is_known(tmp_path):
    rows = [f"{name[:-5]},{B if wnid == A else A} 1 2 3 4" for wnid, name in split(few(), "val")]
    text = "\n".join(["ImageId,PredictionString", *rows]).encode()
    root = tree(tmp_path, FLAT | {"LOC_val_solution.csv": text} | devkit())
    found = read(root)
    assert [os.path.basename(name) for name in found.test.files.names[:3]] == [
        f"{val_name(n)}.JPEG" for n in numbers(B)[:3]
    ]


def test_what_is_hidden_or_belongs_to_a_system_is_no_image_of_an_archive(tmp_path):
    hidden = {f"._{A}.tar": b"no tar", ".DS_Store": b"x", "__MACOSX/1.JPEG": b"x"}
    inside = {f"./{A}_2.JPEG": b"2", f"./{A}_1.JPEG": b"1", "._1.JPEG": b"x", "Thumbs.db": b"x"}
    outer = {
        f"./{A}.tar": packed(inside | {"notes.txt": b"x"}),
        f"./{B}.tar": packed({"1.png": b"3"}),
    }
    root = tree(tmp_path, flat(few()) | {TRAIN_TAR: packed(hidden | outer)})
    files = read(root).train.files
    assert [name.removeprefix(f"{root / TRAIN_TAR}/") for name in files.names] == [
        f"{A}/{A}_1.JPEG", f"{A}/{A}_2.JPEG", f"{B}/1.png",
    ]  # fmt: skip
    assert [files.read(i).tobytes() for i in range(3)] == [b"1", b"2", b"3"]


def test_the_archive_of_archives_is_listed_once(tmp_path, monkeypatch, cache):
    root = tree(tmp_path / "tree", train_tar(few()) | val_tar(few()))
    first = read(root)
    assert len(list(cache.glob("nested-*.npz"))) == len(list(cache.glob("members-*.npz"))) == 1
    members = tars.members
    monkeypatch.setattr(tars, "members", pytest.fail)
    assert read(root).fingerprint() == first.fingerprint()
    # without the inner ones it is another listing
    monkeypatch.setattr(tars, "members", members)
    (plain,) = tars.listed([str(root / TRAIN_TAR)])
    assert sorted(plain.names) == sorted(f"{wnid}.tar".encode() for wnid in (A, B))
    more = few() | {f"train/{C}/1.JPEG": b"another"}
    tree(root, train_tar(more))
    assert read(root).classes == (A, B, C)


# How it is recognised


RECOGNISED = {
    "class folders": (few(), "imagenet"),
    "two classes and files beside them": (few() | {"train/README": b"x"}, "imagenet"),
    "one class": ({p: c for p, c in few().items() if B not in p}, "folder"),
    "a class of another name": (few() | {"train/cat/1.JPEG": b""}, "folder"),
    "a class of WordNet's alone": (few() | {"train/n99999999/1.JPEG": b""}, "folder"),
    "without val": (train_folder(few()), "folder"),
    "tested on test/": (train_folder(few()) | {f"test/{A}/1.JPEG": b""}, "folder"),
    "tiny": (tiny(few()), "tiny-imagenet"),
    "tiny without wnids.txt": (
        {path: c for path, c in tiny(few()).items() if path != "wnids.txt"}, "tiny-imagenet",
    ),
    "tiny without its texts": (
        {path: c for path, c in tiny(few()).items() if "boxes" in path or ".txt" not in path},
        "folder",
    ),
    "images/ in one class": (few() | {f"train/{A}/images/1.JPEG": b""}, "folder"),
    "the train tar alone": (train_tar(few()), ""),
    "the val tar alone": (val_tar(few()), ""),
    "a tar of another name": ({"train.tar": b"", VAL_TAR: b""}, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", RECOGNISED)
def test_a_folder_is_recognised_by_what_it_holds(tmp_path, name):
    files, expected = RECOGNISED[name]
    root = tree(tmp_path, files)
    found = {row for row in ("imagenet", "tiny-imagenet") if sets.SIGNS[row].look(root)}
    assert found == {expected} - {"", "folder"}
    if expected:
        assert sets.recognised(root)[0] == expected


def test_a_folder_is_recognised_without_its_images_being_listed(tmp_path, monkeypatch):
    root = tree(tmp_path, few())
    folders, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: folders.append(str(path)) or scandir(path))
    words = sets.SIGNS["imagenet"].look(root)
    assert words == "train/ of 2 of its 1,000 classes and val/"
    assert folders == [str(root / "train")]
    # nor are more entries than class folders may be
    monkeypatch.setattr(flat_layouts, "MOST", 100)
    tree(root, {f"train/{k}.JPEG": b"" for k in range(98)})
    assert sets.SIGNS["imagenet"].look(root)
    tree(root, {"train/98.JPEG": b""})
    assert not sets.SIGNS["imagenet"].look(root)


# What is refused


def swapped(lines: list) -> None:
    """The labels of two images of different classes."""
    lines[4], lines[1234] = lines[1234], lines[4]


def replaced(number: int, value: object) -> Callable[[list], None]:
    return lambda lines: lines.__setitem__(number - 1, value)


def solution(*rows: str, header: str = "ImageId,PredictionString") -> Files:
    return FLAT | {"LOC_val_solution.csv": "\n".join([header, *rows]).encode()}


def rows(change: Callable[[list], None] = lambda lines: None) -> list[str]:
    lines = [f"{name[:-5]},{wnid} 1 2 3 4" for wnid, name in split(few(), "val")]
    change(lines)
    return lines


def without(files: Files, part: str) -> Files:
    return {path: content for path, content in files.items() if part not in path}


def train_of(*inner: tuple[str, bytes], mode: str = "w") -> Files:
    """A train tar of these members, and val/ as it is downloaded."""
    return flat(few()) | {TRAIN_TAR: tar_with(*inner, mode=mode)}


def tar_with(*members: tuple[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def linked() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo("1.JPEG")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    return buffer.getvalue()


def annotated(*lines: str, keep: bool = True) -> Files:
    """Tiny ImageNet with these lines of annotations, before those that are right or in place."""
    files = tiny(few())
    right = files["val/val_annotations.txt"].decode().splitlines() if keep else []
    return files | {"val/val_annotations.txt": "\n".join([*lines, *right]).encode()}


GOOD = tar_with(("1.JPEG", b"x" * 700), ("2.JPEG", b"y" * 700))
TWO = ((f"{A}.tar", GOOD), (f"{B}.tar", GOOD))
ONE = next(iter(split(few(), "val")))[1]
LAST = val_name(max(numbers(A)[2], numbers(B)[2]))
NEXT = val_name(numbers(A)[3])
DIR = "imagenet"

# what is wrong: (the data set, the files, what is said after the folder's name)
WRONG: dict[str, tuple[str, Files, str]] = {
    "no train": (DIR, flat(few()), f" has no train/ and no {TRAIN_TAR}: --dataset imagenet wants"),
    "no val": (DIR, train_folder(few()), f" has no val/ and no {VAL_TAR}: --dataset imagenet"),
    "nothing": (DIR, {"notes.txt": b""}, " has no train/ and no"),
    "a packed train tar": (
        DIR, flat(few()) | {f"{TRAIN_TAR}.gz": b""},
        f" has no train/ and no {TRAIN_TAR} ({TRAIN_TAR}.gz is to be unpacked to it): --dataset",
    ),
    "two of them": (
        DIR, FLAT | below(CLS_LOC, FLAT),
        f" has train and {CLS_LOC}/train: give the folder of one of them",
    ),
    "some of val sorted": (
        DIR, FLAT | {f"val/{A}/{NEXT}.JPEG": b""},
        f"/val has images both in class folders ('{A}') and beside them ('{FIRST}.JPEG' (and 5",
    ),
    "val of other names": (
        DIR, train_folder(few()) | {"val/cat.JPEG": b"", "val/dog.JPEG": b""},
        "/val is to hold ILSVRC2012_val_00000001.JPEG and so on, to 50,000, and has 'cat.JPEG' "
        "(and 1 more)",
    ),
    "another name in val": (DIR, FLAT | {"val/cat.JPEG": b""}, " and has 'cat.JPEG': remove"),
    "a number over 50,000": (
        DIR, FLAT | {f"val/{val_name(50_001)}.JPEG": b""},
        f"and has '{val_name(50_001)}.JPEG': remove",
    ),
    "a number of seven digits": (
        DIR, FLAT | {"val/ILSVRC2012_val_0000001.JPEG": b""}, "has 'ILSVRC2012_val_0000001.JPEG'",
    ),
    "one number twice": (
        DIR, FLAT | {f"val/{ONE[:-5]}.png": b""}, f"/val has '{ONE[:-5]}' more than once",
    ),
    "training classes of other names": (
        DIR, FLAT | {"train/cat/1.JPEG": b"", "train/dog/1.JPEG": b""},
        "/train has a class folder that is none of ImageNet's 1,000 classes: 'cat' (and 1 more)",
    ),
    "a class without images": (
        DIR, FLAT | {f"train/{C}/notes.txt": b""}, f" has no training images of class '{C}': add",
    ),
    "one class": (DIR, without(FLAT, f"train/{B}"), " has images of 1 classes: at least two"),
    "no image of a trained class": (
        DIR, train_folder(few()) | {f"val/{val_name(numbers(C)[0])}.JPEG": b""},
        "/val has no images of the 2 classes that are trained: add some",
    ),
    "an empty val": (DIR, train_folder(few()) | {"val/notes.txt": b""}, "/val has no images"),
    "the inner tars unpacked no further": (
        DIR, flat(few()) | {f"train/{A}.tar": GOOD, f"train/{B}.tar": GOOD},
        f"/train holds archives in place of class folders: '{A}.tar' (and 1 more): unpack each",
    ),
    "Tiny ImageNet by the other's name": (
        DIR, tiny(few()), "/val/images is a form of Tiny ImageNet: --dataset tiny-imagenet",
    ),
    "a csv with another header": (
        DIR, solution(*rows(), header="file,label"),
        "/LOC_val_solution.csv begins with 'file,label' in place of 'ImageId,PredictionString'",
    ),
    "an empty csv": (DIR, FLAT | {"LOC_val_solution.csv": b""}, "csv begins with 'nothing' in"),
    "a csv of one column": (
        DIR, solution(*(row.split(",")[0] for row in rows())),
        ".csv, line 2: 1 columns in place of 2 (and 5 more lines are wrong): fetch it again",
    ),
    "a csv with an unknown class": (
        DIR, solution(*rows(lambda r: r.insert(2, f"{NEXT},n99999999 1 2 3 4"))),
        ".csv, line 4: 'n99999999' is none of ImageNet's 1,000 classes: fetch",
    ),
    "a csv with two classes of an image": (
        DIR, solution(*rows(lambda r: r.insert(0, f"{NEXT},{A} 1 2 3 4 {B} 1 2 3 4"))),
        f".csv, line 2: '{A} 1 2 3 4 {B} 1 2 3 4' is not one class with its boxes: fetch",
    ),
    "a csv with an image twice": (
        DIR, solution(*rows(), *rows()[1:3]),
        f".csv, line 8: '{rows()[1].split(',')[0]}' stands there twice (and 1 more lines",
    ),
    "a csv of the test images": (
        DIR, solution(f"ILSVRC2012_test_00000001,{A} 1 2 3 4"),
        ".csv, line 2: 'ILSVRC2012_test_00000001' is no image of the validation set",
    ),
    "an image without a row": (
        DIR, solution(*rows()[:3]),
        f".csv has no row for '{rows()[3].split(',')[0]}' (and 2 more) of ",
    ),
    "a row without an image": (
        DIR, solution(*rows(), f"{NEXT},{A} 1 2 3 4"),
        f"/val: '{NEXT}' (7 rows, 6 images): fetch it again, or remove it",
    ),
    "a csv that is no text": (
        DIR, FLAT | {"LOC_val_solution.csv": b"\xff\xfe\x00"}, ".csv: not a csv that can be read",
    ),
    "a csv with an open quote": (
        DIR, solution(f'"{NEXT},{A} 1 2 3 4'), ".csv: not a csv that can be read",
    ),
    "a devkit without labels": (
        DIR, FLAT | {f"{DEVKIT}/readme.txt": b""}, f"/{DEVKIT} has no {GROUND_TRUTH}: fetch",
    ),
    "a devkit's tar without labels": (
        DIR, FLAT | devkit_tar({f"{DEVKIT}/readme.txt": b""}),
        f"/{DEVKIT}.tar.gz holds no ILSVRC2012_validation_ground_truth.txt: fetch",
    ),
    "a devkit's tar cut short": (
        DIR, FLAT | {f"{DEVKIT}.tar.gz": tar_of(devkit())[:-5000]},
        f"/{DEVKIT}.tar.gz: not an archive that can be read (it is cut short): fetch it again",
    ),
    "a devkit's tar that is none": (
        DIR, FLAT | {f"{DEVKIT}.tar.gz": b"<html>404</html>"}, ".tar.gz: not an archive that can",
    ),
    "a devkit's tar that is damaged": (
        DIR, FLAT | {f"{DEVKIT}.tar.gz": tar_of(devkit())[:99] + bytes(999)}, ".tar.gz: not an",
    ),
    "a devkit's tar that unpacks to too much": (
        DIR, FLAT | {f"{DEVKIT}.tar.gz": gzip.compress(bytes((1 << 26) + 1), 1)},
        ".tar.gz: not an archive that can be read (it unpacks to too much)",
    ),
    "a label too few": (
        DIR, FLAT | devkit(lambda lines: lines.pop()),
        f"/{GROUND_TRUTH} has 49,999 lines in place of 50,000: fetch it again, or remove it",
    ),
    "a label too many": (
        DIR, FLAT | devkit(lambda lines: lines.append(1)), "has 50,001 lines in place of 50,000",
    ),
    "a label 0": (
        DIR, FLAT | devkit(replaced(7, 0)), ".txt, line 7: '0' is no class from 1 to 1,000: fetch",
    ),
    "labels that are no numbers": (
        DIR, FLAT | devkit(lambda lines: lines.__setitem__(slice(3), "abc")),
        ".txt, line 1: 'a' is no class from 1 to 1,000 (and 2 more lines are wrong): fetch",
    ),
    "two labels swapped": (
        DIR, FLAT | devkit(swapped),
        f".txt, line 5: it says {ids()[FACTS.labels[1234]]}, but image 5 is of class "
        f"{FACTS.wnids[FACTS.labels[4]]}, which is {ids()[FACTS.labels[4]]} elsewhere (and 1 more",
    ),
    "a class under two numbers": (
        DIR, FLAT | devkit(replaced(9, ids()[FACTS.labels[10]])), ".txt, line 9: it says ",
    ),
    "labels in another order": (
        DIR, FLAT | devkit(lambda lines: lines.sort()), " more lines are wrong): fetch it again",
    ),
    "a train tar cut short": (
        DIR, flat(few()) | {TRAIN_TAR: tar_with(*TWO)[:15_000]},
        f"/{TRAIN_TAR} is cut short: it ends inside '{B}.tar': fetch it again",
    ),
    "an inner tar cut short": (
        DIR, train_of((f"{A}.tar", GOOD), (f"{B}.tar", GOOD[:2300])),
        f"/{TRAIN_TAR}/{B}.tar is cut short: it ends inside '2.JPEG': fetch it again",
    ),
    "an inner tar of another name": (
        DIR, train_of(*TWO, ("cats.tar", GOOD)),
        f"/{TRAIN_TAR} is to hold WNID.tar of ImageNet's 1,000 classes, and has 'cats': fetch",
    ),
    "a file beside the inner tars": (
        DIR, train_of(*TWO, ("1.JPEG", b"x"), ("2.JPEG", b"x")), "and has '1.JPEG' (and 1 more)",
    ),
    "an inner tar that is none": (
        DIR, train_of(TWO[0], (f"{B}.tar", b"<html>404</html>")),
        f"/{TRAIN_TAR}/{B}.tar: not a tar archive that can be read",
    ),
    "an empty inner tar": (
        DIR, train_of(TWO[0], (f"{B}.tar", tar_with())), f"/{B}.tar: it holds no files: fetch",
    ),
    "an inner tar without images": (
        DIR, train_of(TWO[0], (f"{B}.tar", tar_with(("notes.txt", b"x")))),
        f" has no training images of class '{B}'",
    ),
    "an inner tar that is packed": (
        DIR, train_of(TWO[0], (f"{B}.tar", gzip.compress(GOOD))),
        f"/{B}.tar is packed with gzip: unpack it to a .tar",
    ),
    "a link in an inner tar": (
        DIR, train_of(TWO[0], (f"{B}.tar", linked())), f"/{B}.tar: '1.JPEG' is a link: pack the",
    ),
    "a train tar that is packed": (
        DIR, train_of(*TWO, mode="w:gz"), f"/{TRAIN_TAR} is packed with gzip: unpack it to a .tar",
    ),
    "an inner tar twice": (
        DIR, train_of(*TWO, TWO[1]), f"/{TRAIN_TAR} has '{B}/1.JPEG' (and 1 more) more than once",
    ),
    "an image twice in an inner tar": (
        DIR, train_of(TWO[0], (f"{B}.tar", tar_with(("1.JPEG", b"x"), ("./1.JPEG", b"y")))),
        f"/{TRAIN_TAR} has '{B}/1.JPEG' more than once: remove what is there twice",
    ),
    "a train tar of one class": (DIR, train_of(TWO[0]), " has images of 1 classes: at least two"),
    "a class that the train tar has not": (
        DIR, train_tar(few()) | val_folder(few()) | {f"val/{C}/1.JPEG": b""},
        f"/val has a class folder that {TRAIN_TAR} has not: '{C}': remove it",
    ),
    "another name in the val tar": (
        DIR, train_folder(few()) | {VAL_TAR: tar_with((ONE, b"x"), ("readme.txt", b"x"))},
        f"/{VAL_TAR} is to hold ILSVRC2012_val_00000001.JPEG and so on, to 50,000, and has 'read",
    ),
    "a text with a number in the val tar": (
        DIR, train_folder(few()) | {VAL_TAR: tar_with((f"{ONE[:-5]}.xml", b"x"))}, ".xml': remove",
    ),
    "a val tar of folders": (
        DIR, train_folder(few()) | {VAL_TAR: tar_with((f"{A}/{ONE}", b"x"))}, f" has '{A}/{ONE}'",
    ),
    "an image twice in the val tar": (
        DIR, train_folder(few()) | {VAL_TAR: tar_with((ONE, b"x"), (ONE, b"x"))},
        f"/{VAL_TAR} has '{ONE[:-5]}' more than once",
    ),
    "a val tar cut short": (
        DIR, train_folder(few()) | {VAL_TAR: tar_with((ONE, bytes(9999)))[:3000]},
        f"/{VAL_TAR} is cut short: it ends inside '{ONE}'",
    ),
    "an empty file for a val tar": (
        DIR, train_folder(few()) | {VAL_TAR: b""}, f"/{VAL_TAR}: not a tar archive, it is empty",
    ),
    "annotations with an unknown class": (
        "tiny-imagenet", annotated("val_7.JPEG\tn99999999\t1\t2\t3\t4"),
        "/val/val_annotations.txt, line 1: 'n99999999' is none of the 2 classes: take it",
    ),
    "annotations of an image that is not there": (
        "tiny-imagenet", annotated(f"val_7.JPEG\t{A}\t1\t2\t3\t4", f"val_8.JPEG\t{A}\t1"),
        "/val/images: 'val_7.JPEG' (and 1 more) (8 rows, 6 images): take it",
    ),
    "an image without annotations": (
        "tiny-imagenet", tiny(few()) | {"val/images/val_7.JPEG": b""},
        "/val/val_annotations.txt has no row for 'val_7.JPEG' of ",
    ),
    "annotations of an image twice": (
        "tiny-imagenet", annotated(f"{ONE}\t{A}\t1\t2\t3\t4"),
        f"/val/val_annotations.txt, line 7: '{ONE}' stands there twice: take it",
    ),
    "annotations without tabs": (
        "tiny-imagenet", annotated(f"val_7.JPEG {A} 1 2 3 4", "and more"),
        f", line 1: 'val_7.JPEG {A} 1 2 3 4' is no name and class with a tab between (and 1 more",
    ),
    "empty annotations": (
        "tiny-imagenet", annotated(keep=False), "/val/val_annotations.txt, line 1: '' is no name",
    ),
    "annotations that are no text": (
        "tiny-imagenet", tiny(few()) | {"val/val_annotations.txt": b"\xff\xfe"}, ": not a text in",
    ),
    "no annotations": (
        "tiny-imagenet", without(tiny(few()), "annotations"),
        "/val/val_annotations.txt: no such file, which has the labels of",
    ),
    "some of Tiny ImageNet's val sorted": (
        "tiny-imagenet", tiny(few()) | {f"val/{A}/images/val_7.JPEG": b""},
        f"/val has images both in images/ and in class folders ('{A}'): sort all of them",
    ),
    "Tiny ImageNet's images beside images/": (
        "tiny-imagenet", tiny(few(), "val/{name}"),
        "/val has no images in images/, but beside it: --dataset tiny-imagenet wants",
    ),
    "Tiny ImageNet without validation images": (
        "tiny-imagenet", without(tiny(few()), "val/images"), "/val has no images: --dataset tiny",
    ),
    "Tiny ImageNet without val": (
        "tiny-imagenet", without(tiny(few()), "val/"), " has no val/: --dataset tiny-imagenet",
    ),
    "Tiny ImageNet without train": (
        "tiny-imagenet", below("tiny-imagenet-200", without(tiny(few()), "train/")),
        " has no tiny-imagenet-200/train/: --dataset tiny-imagenet wants",
    ),
    "a class that wnids.txt does not name": (
        "tiny-imagenet", tiny(few()) | {"wnids.txt": A.encode()},
        f"/train has a class folder that wnids.txt does not name: '{B}': remove it",
    ),
    "a wnids.txt of other words": (
        "tiny-imagenet", tiny(few()) | {"wnids.txt": b"cat\ndog\n"},
        "/wnids.txt, line 1: 'cat' is no WordNet id (and 1 more lines are wrong)",
    ),
    "a wnids.txt with a class twice": (
        "tiny-imagenet", tiny(few()) | {"wnids.txt": f"{A}\n{B}\n{A}\n".encode()},
        f"/wnids.txt names '{A}' more than once",
    ),
    "a class of Tiny ImageNet without images": (
        "tiny-imagenet", tiny(few()) | {f"train/{C}/images/x.txt": b"",
            "wnids.txt": f"{A}\n{B}\n{C}".encode()},
        f" has no training images of class '{C}'",
    ),
    "Tiny ImageNet sorted by classes that are not trained": (
        "tiny-imagenet", tiny(few(), "val/{wnid}/{name}") | {f"val/{C}/1.JPEG": b""},
        f"/val has a class folder '{C}' that train/ has not",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_in_one_line(tmp_path, name):
    dataset, files, words = WRONG[name]
    root = tree(tmp_path / "tree", files)
    with pytest.raises(DataError) as error:
        read(root, dataset)
    message = one_line(error)
    assert words in message and str(root) in message
    assert message.count(": ") >= 1 and len(message) < 600


@pytest.mark.parametrize(
    "name", ["a row without an image", "an inner tar cut short", "some of val sorted", "no val"]
)
@pytest.mark.parametrize("flags", [[], ["--check-data"]])
def test_the_command_ends_with_that_line(tmp_path, name, flags):
    dataset, files, words = WRONG[name]
    root = tree(tmp_path / "tree", files)
    argv = ["--dataset", dataset, "--data-dir", str(root), "--out", str(tmp_path / "run")]
    assert words in refused(main, [*flags, *(argv if not flags else argv[:-2])])
    assert not (tmp_path / "run").exists()


def test_a_share_is_refused_of_what_is_split(tmp_path):
    for name, files in (("imagenet", FLAT), ("tiny-imagenet", tiny(few()))):
        root = tree(tmp_path / name, files)
        config = resolve({"dataset": "auto", "data_dir": str(root), "val_share": 0.1})
        with pytest.raises(DataError, match="is split into training and validation images already"):
            data.read_set(config)


def test_an_archive_that_changed_while_it_is_read_is_named(tmp_path):
    root = tree(tmp_path, train_tar(few()) | val_tar(few()))
    files = read(root).train.files
    tree(root, {TRAIN_TAR: (root / TRAIN_TAR).read_bytes() + bytes(512)})
    with pytest.raises(OSError, match="has changed since its images were listed"):
        files.read(0)


def test_data_is_checked_and_trained_on_where_it_lies(tmp_path, photographs):
    files = train_tar(photographs) | val_tar(photographs)
    root = tree(tmp_path / "tree", files)
    checked = said(main, ["--check-data", "--data-dir", str(root)])
    assert checked.code == 0 and not checked.err
    about, counted = checked.out.splitlines()
    assert about == (
        f"--dataset imagenet: {TRAIN_TAR} and {VAL_TAR}; train: {TRAIN_TAR}, in place, "
        f"val: {VAL_TAR}, labels from their numbers"
    )
    assert counted.startswith("imagenet: 12 train and 12 test images, 6 classes, 0 bad; ")
    run = ["--model", "resnet8", "--image-size", "32", "--augment", "crop-flip", "--batchsize", "6"]
    run += ["--device", "cpu", "--epochs", "1", "--out", str(tmp_path / "run")]
    done = said(main, [*run, "--data-dir", str(root)])
    assert done.code == 0 and not done.err and about in done.out.splitlines()
