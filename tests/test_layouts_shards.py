"""WebDataset shards: the samples of class folders from any loader, and one line for whatever is
wrong with them."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from images import LOADERS, encoded, every_batch, noise, one_line, solid, tree
from repacked import (
    Images,
    assert_same,
    assert_same_streams,
    class_folders,
    classes_of,
    opened,
    own_cache,
    shuffled,
    taken,
    tar,
)

from fastsmooth.cli.config import resolve
from fastsmooth.data import DataError, read_set, sets, tars
from fastsmooth.data.layouts import shards

every_loader = pytest.mark.parametrize(("loader", "workers"), LOADERS)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    return own_cache(tmp_path / "cache", monkeypatch)


@pytest.fixture(scope="module")
def images(cifar_folder) -> Images:
    return taken(cifar_folder, 3, {"train": 8, "test": 4})


def sharded(root: Path, images: Images, parts=(("train", 3), ("test", 2)), label="cls") -> Path:
    """Shards PART-K.tar of KEY.png and a label, which the class's number, its name or JSON is."""
    classes = classes_of(images)
    of = {
        "cls": lambda name: ("cls", b"%d\n" % classes.index(name)),
        "name": lambda name: ("cls", name.encode()),
        "json": lambda name: ("json", json.dumps({"label": classes.index(name)}).encode()),
    }[label]
    for part, count in parts:
        rows = shuffled(images, part)
        for k in range(count):
            members = []
            for name, file, content in rows[k::count]:
                key, suffix = f"{name}/{file}".rsplit(".", 1)
                kind, text = of(name)
                members += [(f"{key}.{suffix}", content), (f"{key}.{kind}", text)]
            tar(root / f"cifar-{part}-{k:06}.tar", members)
    return root


def read(root: Path, **given):
    return read_set(resolve({"dataset": "webdataset", "data_dir": str(root)} | given))


def refusal(root: Path, **given) -> str:
    with pytest.raises(DataError) as error:
        read(root, **given)
    return one_line(error)


PNG = encoded(solid(), "PNG")


def shard(*samples: tuple[str, dict[str, bytes]]) -> list[tuple[str, bytes]]:
    return [(f"{key}.{suffix}", data) for key, of in samples for suffix, data in of.items()]


def two_classes(root: Path, more: tuple = (), name: str = "train-0.tar") -> Path:
    """Two samples to train on and two to test on, and more in the shard to train on."""
    good, test = (
        [(f"{what}{k}", {"png": PNG, "cls": b"%d" % k}) for k in (0, 1)]
        for what in ("good", "test")
    )
    tar(root / "val-0.tar", shard(*test))
    tar(root / name, shard(*good, *more))
    return root


# The same samples


@every_loader
def test_shards_give_the_samples_of_class_folders(tmp_path, images, loader, workers):
    given = {"loader": loader, "workers": workers, "augment": "crop-flip"}
    data = opened(sharded(tmp_path / "tars", images), "webdataset", **given)
    reference = opened(class_folders(tmp_path / "tree", images), "folder", **given)
    assert_same(data, reference)
    assert data.about == "shards: 3 to train on, 2 named test; labels from .cls"
    assert not data.bad.reasons


@pytest.mark.parametrize("loader", sorted({name for name, _ in LOADERS} - {"resident"}))
def test_photographs_in_shards_are_those_of_class_folders(tmp_path, imagenet_folder, loader):
    images = taken(imagenet_folder, 4, {"train": 1, "val": 1})
    root = sharded(tmp_path / "tars", images, (("train", 2), ("val", 1)), "name")
    given = {"loader": loader, "image_size": 64, "augment": "resized-crop-flip"}
    data = opened(root, "auto", **given)
    assert_same(data, opened(class_folders(tmp_path / "tree", images), "folder", **given))
    assert data.about.startswith("--dataset webdataset: 3 tar shards; ")
    assert data.class_names == tuple(classes_of(images))


@pytest.mark.parametrize("seed", range(2))
def test_streams_of_shards_are_those_of_class_folders(tmp_path, images, seed):
    data = opened(sharded(tmp_path / "tars", images), "webdataset", augment="crop-flip", seed=seed)
    reference = opened(
        class_folders(tmp_path / "tree", images), "folder", augment="crop-flip", seed=seed
    )
    assert_same_streams(data, reference, seed)


@pytest.mark.parametrize("label", ["name", "json"])
def test_labels_may_be_names_or_json(tmp_path, images, label):
    found = read(sharded(tmp_path, images, label=label))
    names = tuple(classes_of(images)) if label == "name" else ("0", "1", "2")
    assert found.classes == names
    assert found.train.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8


def test_shards_of_the_library_that_wrote_them(tmp_path, images):
    wds = pytest.importorskip("webdataset")
    classes = classes_of(images)
    for part, folder in (("train", "train"), ("test", "val")):
        (tmp_path / folder).mkdir()
        with wds.TarWriter(str(tmp_path / folder / "0000.tar")) as writer:
            for name, file, content in shuffled(images, part):
                key = f"{name}_{file[:-4]}"
                sample = {"__key__": key, "image.png": content, "cls": classes.index(name)}
                writer.write(sample | {"json": {"caption": "an image"}})
    found = read(tmp_path)
    assert found.about == "shards: 1 to train on, 1 named val; labels from .cls"
    pipeline = wds.WebDataset(
        str(tmp_path / "train" / "0000.tar"), shardshuffle=False, empty_check=False
    )
    theirs = sorted(
        (int(s["cls"]), f"train/0000.tar/{s['__key__']}.image.png", s["image.png"])
        for s in pipeline
    )
    files = found.train.files
    assert theirs == [
        (label, os.path.relpath(files.names[i], tmp_path), files.read(i).tobytes())
        for i, label in enumerate(found.train.labels.tolist())
    ]


def test_a_share_is_held_out_as_of_class_folders(tmp_path, images):
    one_part = {name: data for name, data in images.items() if name.startswith("train")}
    sharded(tmp_path / "tars", one_part, (("train", 2),))
    files = {name.removeprefix("train/"): data for name, data in one_part.items()}
    given = {"val_share": 0.4, "augment": "none"}
    data = opened(tmp_path / "tars", "webdataset", **given)
    assert_same(data, opened(class_folders(tmp_path / "tree", files), "folder", **given))


def test_members_of_a_sample_need_not_stand_together(tmp_path):
    """As of a tar whose order is the folder's."""
    two_classes(tmp_path)
    samples = [(f"{k}", {"JPG": PNG, "cls": b"%d" % (k % 2)}) for k in range(20)]
    members = shard(*samples)
    tar(tmp_path / "train-0.tar", members[::2] + members[1::2])
    assert read(tmp_path).train.labels.tolist() == [0] * 10 + [1] * 10


def test_what_belongs_to_no_sample_is_passed_over(tmp_path):
    two_classes(tmp_path)
    odd = [
        ("__index__", b"{}"),
        ("__meta__/a.json", b"{}"),
        ("._good0.png", b"x"),
        (".hidden.png", b"x"),
        ("README", b""),
    ]
    odd += [("good0.txt", b"a caption"), ("good0.npy", b"\x93"), ("notes.txt", b"no image")]
    tar(tmp_path / "train-1.tar", odd + shard(("new", {"webp": PNG, "cls": b"1"})))
    assert read(tmp_path).train.labels.tolist() == [0, 1, 1]


def test_class_names_are_read_from_a_list_beside_the_shards(tmp_path):
    tree(two_classes(tmp_path), {"classnames.txt": b"  Katze \n\nHund\n"})
    found = read(tmp_path)
    assert (found.classes, found.names) == (("0", "1"), ("Katze", "Hund"))
    (tmp_path / "classnames.txt").write_text("one\n")
    found = read(tmp_path)
    assert found.names == ()
    assert "has 1 lines, the labels are of 2 classes" in found.remarks[0]


@pytest.mark.parametrize(
    ("json_of", "label"),
    [
        ({"label": 1, "cls": 0}, 1),
        ({"class_id": "1"}, 1),
        ({"cls": 1, "caption": "x", "width": 3.5}, 1),
    ],
)
def test_what_json_may_say(tmp_path, json_of, label):
    two_classes(tmp_path, (("j", {"png": PNG, "json": json.dumps(json_of).encode()}),))
    found = read(tmp_path)
    assert found.train.labels.tolist() == [0, label, 1]
    assert found.about.endswith("labels from .cls and .json")


def test_a_cls_goes_before_json(tmp_path):
    two_classes(tmp_path, (("j", {"png": PNG, "json": b'{"label": 0}', "cls": b"1"}),))
    assert read(tmp_path).train.labels.tolist() == [0, 1, 1]


# The second time


def test_the_second_time_no_shard_is_read(tmp_path, images, monkeypatch):
    root = sharded(tmp_path, images)
    first = read(root)
    monkeypatch.setattr(tars, "members", pytest.fail)
    monkeypatch.setattr(os, "pread", pytest.fail)
    again = read(root)
    assert again.fingerprint() == first.fingerprint()
    assert np.array_equal(again.train.files.start, first.train.files.start)


def test_a_shard_that_changes_after_it_was_listed_is_not_read(tmp_path, images):
    root = sharded(tmp_path, images)
    data = opened(root, "webdataset", augment="none")
    os.utime(root / "cifar-train-000001.tar", ns=(5, 5))
    with pytest.raises(DataError) as error:
        every_batch(data.train)
    assert "it has changed since its images were listed: start again" in one_line(error)
    assert "cifar-train-000001.tar/" in str(error.value)


# Which shards are which


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train/0.tar", "val/0.tar"),
        ("imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"),
        ("data/training_0.tar", "data/test_0.tar"),
        ("Train/x.TAR", "VAL/x.tar"),
        ("train/train-0.tar", "valid.tar"),
    ],
)
def test_names_say_what_shards_are_for(tmp_path, train, test):
    two_classes(tmp_path, name="train-0.tar")
    for name, to in (("train-0.tar", train), ("val-0.tar", test)):
        (tmp_path / to).parent.mkdir(exist_ok=True)
        (tmp_path / name).rename(tmp_path / to)
    tar(tmp_path / ".hidden.tar", shard(("x", {"png": PNG, "cls": b"9"})))
    tar(tmp_path / "raw" / "0.tar", shard(("x", {"png": PNG, "cls": b"9"})))
    found = read(tmp_path)
    assert found.train.files.names[0].startswith(str(tmp_path / train))
    assert found.test.files.names[0].startswith(str(tmp_path / test))


def test_val_goes_before_test_and_what_is_neither_is_left_out_with_a_remark(tmp_path):
    two_classes(tmp_path)
    for name in ("test-0.tar", "more.tar"):
        tar(tmp_path / name, shard(("x", {"png": PNG, "cls": b"1"})))
    (tmp_path / "train-1.tar.gz").write_bytes(b"x")
    found = read(tmp_path)
    assert (len(found.train), len(found.test)) == (2, 2)
    assert found.remarks == (
        "shards that are neither to train nor to test on are left out: 'more.tar' and 1 more",
        "packed shards are left out: 'train-1.tar.gz'",
    )


def test_shards_are_recognised_by_a_sample(tmp_path):
    assert sets.recognised(two_classes(tmp_path / "a")) == ("webdataset", "2 tar shards")
    pictures = [(f"cat/{k}.png", PNG) for k in range(9)]  # class folders in a tar
    tar(tmp_path / "b" / "all.tar", pictures)
    assert shards.sign(tmp_path / "b") == "" == shards.sign(tmp_path / "nowhere")
    (tmp_path / "b" / "all.tar").write_bytes(b"damaged")
    assert shards.sign(tmp_path / "b") == "1 tar shards"


def test_keys_may_begin_anew_in_each_shard_but_no_shard_stands_twice(tmp_path):
    two_classes(tmp_path)
    more = [(f"good{k}", {"png": encoded(noise(), "PNG"), "cls": b"%d" % k}) for k in (0, 1)]
    tar(tmp_path / "train-1.tar", shard(*more))
    found = read(tmp_path)
    assert found.train.labels.tolist() == [0, 0, 1, 1] and len(found.remarks) == 1
    assert "2 of 4 samples have the key of another in another shard" in found.remarks[0]
    (tmp_path / "train-2.tar").write_bytes((tmp_path / "train-1.tar").read_bytes())
    message = refusal(tmp_path)
    assert message == f"{tmp_path}/train-2.tar holds the same samples as {tmp_path}/train-1.tar: " \
        "remove one"  # fmt: skip


def test_raw_images_that_are_numbered_anew_in_each_shard_are_no_copies(tmp_path):
    for part in ("train", "val"):
        samples = [(f"{k}", {"ppm": encoded(noise(), "PPM"), "cls": b"%d" % k}) for k in (0, 1)]
        tar(tmp_path / f"{part}.tar", shard(*samples))
    assert len(read(tmp_path).train) == 2


# What is wrong

DEEP = b'{"label":' + b"[" * 100_000
SAMPLES = {
    "no label": ({"png": PNG}, "has no label (looked for .cls, and for label, class_id or cls in"),
    "a caption": ({"png": PNG, "txt": b"a cat"}, "has no label (looked for .cls"),
    "no image": ({"cls": b"1"}, "has no image: pack it anew, or remove it"),
    "two images": (
        {"png": PNG, "seg.png": PNG, "cls": b"1"},
        "has several images ('bad.png', 'bad.seg.png'): keep one",
    ),
    "negative": ({"png": PNG, "cls": b"-1"}, "in .cls: -1 is no whole number from 0 on"),
    "a float": ({"png": PNG, "cls": b"1.5"}, "in .cls: 1.5 is no whole number from 0 on"),
    "nan": ({"png": PNG, "cls": b"nan"}, "in .cls: nan is no whole number from 0 on"),
    "empty": ({"png": PNG, "cls": b" \n"}, "in .cls: it is empty: correct it"),
    "too many": ({"png": PNG, "cls": b"1000000"}, "1000000 is over 999,999"),
    "far too many": ({"png": PNG, "cls": b"9" * 9999}, "is over 999,999"),
    "a text": ({"png": PNG, "cls": b"x" * 300}, "300 bytes are no class's name"),
    "a tensor": ({"png": PNG, "cls": b"\x93NUMPY\0\xff"}, "it is no text"),
    "no utf-8": ({"png": PNG, "cls": b"\xff\xfe"}, "in .cls: 'utf-8' codec"),
    "a large label": ({"png": PNG, "cls": b"1" * (1 << 21)}, "it has 2,097,152 bytes"),
    "a name": ({"png": PNG, "cls": b"cat"}, "some labels are numbers and others names"),
    "no json": ({"png": PNG, "json": b"{"}, "in .json: Expecting property name"),
    "json without": ({"png": PNG, "json": b'{"caption": "x"}'}, "it has none of label, class_id"),
    "a json list": ({"png": PNG, "json": b"[1]"}, "it has none of label, class_id, cls"),
    "a json float": ({"png": PNG, "json": b'{"label": 1.0}'}, "label is 1.0, no whole number"),
    "a json bool": ({"png": PNG, "json": b'{"label": true}'}, "label is True, no whole number"),
    "a json null": ({"png": PNG, "json": b'{"label": null}'}, "label is None, no whole number"),
    "deep json": ({"png": PNG, "json": DEEP}, "in .json: "),
    "two labels": ({"png": PNG, "fine.cls": b"1", "coarse.cls": b"0"}, "has several labels .cls"),
}


@pytest.mark.parametrize("fault", SAMPLES)
def test_a_sample_that_is_wrong_is_named_with_its_shard(tmp_path, fault):
    of, words = SAMPLES[fault]
    message = refusal(two_classes(tmp_path, (("bad", of),)))
    assert words in message and len(message) < 500
    if fault != "a name":
        assert message.startswith(f"{tmp_path / 'train-0.tar'}: sample 'bad' ")


def test_a_key_that_stands_twice_in_a_shard_is_refused(tmp_path):
    message = refusal(two_classes(tmp_path, (("good1", {"png": PNG}),)))
    assert message.endswith("train-0.tar: sample 'good1' has two members .png: pack it anew")
    message = refusal(two_classes(tmp_path, (("good1", {"cls": b"0"}),)))
    assert message.endswith("train-0.tar: sample 'good1' has two members .cls: pack it anew")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:700])


FOLDERS = {
    "cut short": (lambda root: cut(root / "train-0.tar"), "cut short: it ends inside"),
    "packed as .tar": (
        lambda root: (root / "train-0.tar").write_bytes(b"\x1f\x8b" + bytes(99)),
        "train-0.tar is packed with gzip: unpack it",
    ),
    "all packed": (
        lambda root: [p.rename(p.with_suffix(".tar.gz")) for p in root.glob("*.tar")],
        "holds no shards *.tar, nor do its train/ and val/: unpack 'train-0.tar.gz' and 1 more",
    ),
    "none": (
        lambda root: [p.unlink() for p in root.glob("*.tar")],
        "holds no shards *.tar, nor do its train/ and val/: shards *.tar of KEY.jpg",
    ),
    "no training shard": (
        lambda root: (root / "train-0.tar").rename(root / "0.tar"),
        "has shards named val and none named train: give those to train on a name with train",
    ),
    "no test shard": (
        lambda root: (root / "val-0.tar").unlink(),
        "holds 1 shards, and no split into training and test images",
    ),
    "two words": (
        lambda root: (root / "val-0.tar").rename(root / "train-val.tar"),
        "train-val.tar: its name says train and val: rename it to what it is for",
    ),
    "no samples": (
        lambda root: [tar(p, [("README", b"x")]) for p in root.glob("*.tar")],
        "its shards hold no samples (looked for .cls",
    ),
    "a pipe": (
        lambda root: os.mkfifo(root / "train-1.tar"),
        "it is a pipe, a socket or a device, not a file (",
    ),
    "a link to nothing": (
        lambda root: (root / "train-1.tar").symlink_to("nowhere"), "No such file or directory (",
    ),
    "one class": (
        lambda root: [tar(p, shard((p.name, {"png": PNG, "cls": b"0"}))) for p in root.glob("*")],
        "has images of 1 classes: at least two are needed",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FOLDERS)
def test_shards_that_cannot_be_used_are_named(tmp_path, fault):
    root = two_classes(tmp_path / "set")
    spoil, words = FOLDERS[fault]
    spoil(root)
    assert words in refusal(root)


def test_a_share_of_what_is_split_and_a_lone_file_are_refused(tmp_path):
    root = two_classes(tmp_path)
    message = refusal(root, val_share=0.1)
    assert message.endswith("has shards named val to test on already: leave --val-share out")
    assert "is a file: give the folder of the shards" in refusal(root / "val-0.tar")
    assert "no such directory" in refusal(root / "nowhere")


@pytest.mark.parametrize(
    "key", ["../../x", "/etc/passwd", "new\nline", "\x1b[31mred", "caf\udce9", "k" * 300]
)
def test_hostile_names_are_shown_and_lead_nowhere(tmp_path, key, monkeypatch):
    two_classes(tmp_path / "set")
    with tarfile.open(tmp_path / "set" / "train-1.tar", "w") as file:
        for suffix, content in (("png", b"no image"), ("cls", b"1")):
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError) as error:
        opened(tmp_path / "set", "webdataset", loader="resident")
    message = one_line(error)
    assert message.startswith(f"{tmp_path / 'set' / 'train-1.tar'}/")
    assert "not an image that can be read" in message
    after = [p for p in sorted(tmp_path.rglob("*")) if "cache" not in p.parts]
    assert after == [p for p in before if "cache" not in p.parts]
    data = opened(tmp_path / "set", "webdataset", loader="threads", on_bad_image="zeros")
    assert len(data.bad.reasons) == 1


def test_a_bomb_in_a_shard_is_refused_before_it_is_decoded(tmp_path):
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        sum_ = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + sum_

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99)))
    two_classes(tmp_path, (("bomb", {"png": bomb, "cls": b"1"}),))
    for loader in ("resident", "threads"):
        with pytest.raises(DataError) as error:
            opened(tmp_path, "webdataset", loader=loader)
        assert "train-0.tar/bomb.png: the image is too large to decode safely" in one_line(error)


def test_the_pattern_of_keys_is_the_librarys():
    tariterators = pytest.importorskip("webdataset.tariterators")
    names = ["a.jpg", "a/b.c.d", "a.b/c.jpg", "a.b/c", "a", ".a", "./a.jpg", "a/", "a..b"]
    for name in names:
        ours = shards.parted(name.encode())
        theirs = tariterators.base_plus_ext(name)
        assert ours == (None if theirs[0] is None else tuple(part.encode() for part in theirs))
    assert shards.parted(b"__meta__/x.json") is None
    assert shards.parted(b"a/._b.jpg") is None  # hidden, while theirs is a sample "a/"


def test_numbers_that_do_not_occur_are_no_classes(tmp_path):
    found = read(two_classes(tmp_path, (("late", {"png": PNG, "cls": b"102"}),)))
    assert found.classes[-1] == "102" and len(found.classes) == len(set(found.train.labels)) == 3


def test_shards_that_are_added_move_no_sample_to_the_other_part(tmp_path):
    """Not even where they repeat a key."""
    samples = [(f"{k:03}", {"png": PNG, "cls": b"%d" % (k % 2)}) for k in range(60)]
    tar(tmp_path / "a.tar", shard(*samples))
    before = set(read(tmp_path, val_share=0.3).test.files.names)
    tar(tmp_path / "b.tar", shard(("007", {"png": PNG, "cls": b"1"})))
    after = read(tmp_path, val_share=0.3).test.files.names
    assert {name for name in after if "a.tar" in name} == before and len(before) > 9
