"""The command `prepare`: smaller images stored once, whole or not at all, and known as what they
are."""

import dataclasses
import errno
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from forks import SERVER
from images import encoded, noise, opened, solid, tree
from PIL import Image
from said import one_line, refused, said
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from fastsmooth import data
from fastsmooth import train as training
from fastsmooth.cli.config import resolve
from fastsmooth.data import prepared, sets
from fastsmooth.data.files import Paths
from fastsmooth.kernels import native
from fastsmooth.prepare import names, shrink, stores, work
from fastsmooth.prepare.__main__ import main

rng = random.Random(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    native.library()  # from the cache that is there: it takes long to build
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stores, "SHARD", 5)
    monkeypatch.setattr(os, "sync", lambda: None)  # others may have much to write


def picture(width: int, height: int) -> Image.Image:
    return noise((8, 6)).resize((width, height))


def source(root: Path, count: int = 4) -> Path:
    """JPEGs that are too large, and some that are not, of two classes."""
    files = {
        f"{split}/{name}/{k}.jpg": encoded(picture(60 + 9 * k, 90 - 20 * (k % 4)), "JPEG")
        for split in ("train", "val")
        for name in ("cat", "dog")
        for k in range(count)
    }
    return tree(root, files)


def prepare(into: str = "out", *flags: str, side: int = 32, of: str = "in") -> list[str]:
    return ["--data-dir", of, "--out", into, "--short-side", str(side), *flags]


def read(root: str = "out", **given) -> data.sets.ImageSet:
    return data.read_set(resolve({"data_dir": root} | given))


def everything(root: Path | str) -> dict[str, bytes]:
    """What is in a folder, by name."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(Path(root).rglob("*"))
        if path.is_file()
    }


formats = pytest.mark.parametrize("form", ["jpeg", "tar"])


# What is stored


def test_photographs_are_resized_as_torchvision_does_and_encoded_once(imagenet_folder):
    paths = [str(next(folder.iterdir())) for folder in sorted((imagenet_folder / "val").iterdir())]
    files = Paths(paths[:12])
    index = data.read_index(files)
    for i, path in enumerate(files.names):
        image = Image.open(path).convert("RGB")
        got = shrink.shrunk(files, index, i, 160, 92)
        if min(image.size) <= 160:
            assert got == Path(path).read_bytes()
            continue
        view = T.Resize(160, T.InterpolationMode.BICUBIC)(image)
        assert got == encoded(view, "JPEG", quality=92, subsampling=2)
        # in grey, as half of the colour is left out
        stored, view = (np.asarray(v.convert("L"), np.float64) for v in (decoded(got), view))
        assert np.abs(stored - view).mean() < 3


@pytest.mark.parametrize("extent", [(500, 375), (375, 500), (333, 333), (97, 3000), (31, 32)])
@pytest.mark.parametrize("side", [8, 32, 33, 256])
def test_the_size_is_torchvisions_and_never_larger(extent, side):
    expected = T.Resize(side)(Image.new("L", extent)).size
    assert shrink.smaller(extent, side) == (expected if min(extent) > side else extent)


def decoded(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def exif() -> bytes:
    info = Image.Exif()
    info[0x0112] = 6  # to be turned by a quarter
    return info.tobytes()


SMALL = {
    "rgb.jpg": encoded(picture(32, 50), "JPEG", quality=40, exif=exif()),
    "grey.jpeg": encoded(picture(20, 32).convert("L"), "JPEG", progressive=True),
    "kind.png": encoded(picture(9, 11), "JPEG"),  # whatever it is called
}
OTHERS = {
    "rgb.png": encoded(picture(32, 50), "PNG"),
    "alpha.png": encoded(solid((50, 100, 150, 20), (30, 30), "RGBA"), "PNG"),
    "print.jpg": encoded(picture(30, 32).convert("CMYK"), "JPEG"),
    "big.jpg": encoded(picture(64, 40), "JPEG", exif=exif()),
    "deep.png": encoded(Image.fromarray(np.full((40, 40), 500, np.uint16)), "PNG"),
}


def test_a_small_jpeg_is_copied_and_all_else_is_what_training_reads(tmp_path):
    tree(tmp_path, {name: content for name, content in (SMALL | OTHERS).items()})
    files = Paths([str(tmp_path / name) for name in (*SMALL, *OTHERS)])
    index = data.read_index(files)
    for i, (name, content) in enumerate((SMALL | OTHERS).items()):
        got = shrink.shrunk(files, index, i, 32, 92)
        if name in SMALL:
            assert got == content
            continue
        image = Image.open(io.BytesIO(content)).convert("RGB")
        view = T.Resize(32, T.InterpolationMode.BICUBIC)(image) if name == "big.jpg" else image
        if name == "deep.png":
            view = T.Resize(32, T.InterpolationMode.BICUBIC)(image)
        assert got == encoded(view, "JPEG", quality=92, subsampling=2)
        kept = decoded(got)
        assert kept.mode == "RGB" and not kept.getexif() and kept.size == view.size


# Names and order


def random_name(of: str) -> str:
    return "".join(rng.choice(of) for _ in range(rng.randint(1, 6)))


HOSTILE = "ab./ %-_\n\x1b\\:é猫A\udcff0"


def test_names_are_safe_and_no_two_become_one():
    some = {random_name(HOSTILE) for _ in range(3000)} | {"lost+found", ".a", "Thumbs.db", "%2E"}
    kept = {names.safe(name) for name in some}
    assert len(kept) == len(some)
    for name in kept:
        assert name.isprintable() and name[0] != "." and not set('/\\<>:"|?*') & set(name)
        assert name.lower() not in names.OF_SYSTEMS
        name.encode()
    assert names.safe("n01440764_10026") == "n01440764_10026" and names.safe("a/b") == "a%2Fb"


def test_images_of_any_names_sort_in_class_folders_as_they_stand():
    for _ in range(300):
        count, classes = rng.randint(1, 12), [random_name(HOSTILE) for _ in range(3)]
        if len(set(classes)) < 3:
            continue
        endings = [rng.choice((".jpg", ".png", ".JPEG", "")) for _ in range(count)]
        own = [f"root/{random_name(HOSTILE)}{ending}" for ending in endings]
        if rng.random() < 0.5:
            own.sort()
        labels = np.array(sorted(rng.randrange(3) for _ in own), np.int64)
        folders = names.class_folders(classes)
        assert folders == sorted(set(folders)) and len(folders) == 3
        paths = names.image_files(own, labels, folders)
        pairs = [path.split("/") for path in paths]
        assert pairs == sorted(pairs) and len(set(paths)) == count
        assert [folders.index(path.split("/")[0]) for path in paths] == labels.tolist()


def test_names_stay_where_they_can_and_long_ones_are_cut():
    labels = np.array([0, 0, 1, 1, 1])
    paths = ["x/a/1.JPEG", "x/a/2.png", "x/b/deep/1.jpg", "x/b/2.jpg", "x/b/2.png"]
    assert names.image_files(paths, labels, ["a", "b"]) == [
        *("a/1.jpg", "a/2.jpg"),
        *("b/0-deep%2F1.jpg", "b/1-2.jpg", "b/2-2.jpg"),  # 2.jpg twice
    ]
    (long,) = names.image_files(["x/" + "猫" * 84 + ".png"], np.array([0]), ["a"])
    assert long == "a/0-" + "猫" * 33 + ".jpg"
    assert names.class_folders(["b", "a", ""]) == ["0-b", "1-a", "2-"]
    assert names.image_files([], np.zeros(0, np.int64), ["a"]) == []


ODD = {
    "train/a b/1.png": picture(40, 50),
    "train/a b/1.jpg": picture(50, 40),
    "train/a b/deep/2.png": picture(60, 40),
    "train/ü/a.png": picture(40, 40),
    "train/ü/a b.png": picture(40, 60),
    "train/100%/x:y.png": picture(33, 90),
    "val/ü/1.webp": picture(40, 50),
    "val/100%/1.png": picture(40, 50),
    "val/a b/1.bmp": picture(40, 50),
}


def test_class_folders_have_the_same_samples_in_the_same_order(tmp_path):
    tree(tmp_path / "in", ODD)
    found = said(main, prepare())
    assert found.code == 0 and not found.err, found
    before, now = read("in"), read()
    assert now.names == before.classes and now.layout == "folder"
    for split in ("train", "test"):
        one, other = getattr(before, split), getattr(now, split)
        assert one.labels.tolist() == other.labels.tolist()
        for i, path in enumerate(one.files.names):
            image = T.Resize(32, T.InterpolationMode.BICUBIC)(Image.open(path).convert("RGB"))
            expected = encoded(image, "JPEG", quality=92, subsampling=2)
            assert other.files.read(i).tobytes() == expected
    assert ImageFolder("out/train").targets == before.train.labels.tolist()


def test_shards_have_the_same_samples_in_the_same_order(tmp_path):
    tree(tmp_path / "in", ODD)
    assert main(prepare("out", "--format", "tar", "--workers", "1")) == 0
    assert main(prepare("folders")) == 0
    shards = sorted(path.name for path in Path("out").glob("*.tar"))
    assert shards == ["train-00000.tar", "train-00001.tar", "val-00000.tar"]
    folders = read("folders")
    for name, split in (("train", folders.train), ("val", folders.test)):
        members = []
        for path in sorted(Path("out").glob(f"{name}-*.tar")):
            with tarfile.open(path) as tar:
                for info in tar:
                    assert (info.mtime, info.mode, info.uid, info.uname) == (0, 0o644, 0, "")
                    assert info.isfile() and not info.pax_headers
                    members.append((info.name, tar.extractfile(info).read()))
        expected = [
            pair
            for i, label in enumerate(split.labels.tolist())
            for pair in (
                (f"{i:08}.jpg", split.files.read(i).tobytes()),
                (f"{i:08}.cls", str(label).encode()),
            )
        ]
        assert members == expected
    assert Path("out/classes.txt").read_text().splitlines() == list(folders.classes)


def test_shards_are_read_back_as_class_folders_are(tmp_path):
    tree(tmp_path / "in", ODD)
    assert main(prepare("shards", "--format", "tar")) == main(prepare("folders")) == 0
    one, other = read("shards"), read("folders")
    assert one.layout == "webdataset" and one.names == other.names
    for split in ("train", "test"):
        before, now = getattr(other, split), getattr(one, split)
        assert before.labels.tolist() == now.labels.tolist()
        for i in range(len(before)):
            assert np.array_equal(before.files.read(i), now.files.read(i))


# Interruptions


def whole(form: str, **more) -> dict[str, bytes]:
    """What an uninterrupted run of the command leaves."""
    assert main(prepare("whole", "--format", form, **more)) == 0
    return everything("whole")


def killed_after(count: int, monkeypatch, error: BaseException) -> None:
    """The next run of the command meets the error at its count-th image."""
    made, real = itertools.count(), stores.shrunk

    def shrunk(*given):
        if next(made) == count:
            raise error
        return real(*given)

    monkeypatch.setattr(stores, "shrunk", shrunk)


@formats
@pytest.mark.parametrize("count", [0, 1, 6, 13, 23])
def test_what_is_interrupted_goes_on_and_ends_in_the_same_bytes(tmp_path, monkeypatch, form, count):
    source(tmp_path / "in", 6)
    expected = whole(form)
    with monkeypatch.context() as patch:
        killed_after(count, patch, KeyboardInterrupt())
        found = said(main, prepare("out", "--format", form))
    assert (found.code, found.err) == (130, "interrupted: the same command goes on with out\n")
    assert Path("out", prepared.PART).exists() and not Path("out", prepared.FILE).exists()
    made = []
    real = stores.shrunk
    monkeypatch.setattr(stores, "shrunk", lambda *given: made.append(given[2]) or real(*given))
    assert main(prepare("out", "--format", form, "--workers", "3")) == 0
    assert everything("out") == expected
    assert len(made) <= 24 - (count if form == "jpeg" else count // 5 * 5 if count < 12 else 12)


def slow(argv: list[str], cache: str, home: str) -> None:
    """The command in a process that takes its time."""
    os.environ["XDG_CACHE_HOME"] = cache
    os.chdir(home)
    stores.SHARD, os.sync = 5, lambda: None
    real = stores.shrunk
    stores.shrunk = lambda *given: time.sleep(0.03) or real(*given)
    main(argv)


@formats
def test_what_is_killed_at_any_time_goes_on(tmp_path, form):
    source(tmp_path / "in", 12)
    expected = whole(form)
    line = prepare("out", "--format", form, "--workers", "2")
    for _ in range(4):
        process = SERVER.Process(target=slow, args=(line, str(tmp_path / "cache"), str(tmp_path)))
        process.start()
        until = time.monotonic() + 60
        while not Path("out", prepared.PART).exists() and process.is_alive():
            assert time.monotonic() < until
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.join()
    if Path("out", prepared.PART).exists():  # else it was done before
        words = refused(training.main, ["--data-dir", "out", "--out", "run"])
        assert words.startswith("--data-dir out is unfinished: give the command prepare again")
    assert main(line) == 0
    assert everything("out") == expected


def test_what_a_power_cut_leaves_is_made_again(tmp_path, monkeypatch):
    source(tmp_path / "in")
    for form in ("jpeg", "tar"):
        expected = whole(form)
        with monkeypatch.context() as patch:
            killed_after(15, patch, KeyboardInterrupt())
            assert main(prepare("out", "--format", form)) == 130
        stored = sorted(p for p in Path("out").rglob("*") if p.suffix in (".jpg", ".tar"))
        content = stored[0].read_bytes()
        stored[0].write_bytes(content[: len(content) // 2])
        stored[1].write_bytes(b"")
        (stored[0].parent / f".{stored[0].name}.0123abcd.tmp").write_bytes(b"half")
        assert main(prepare("out", "--format", form)) == 0
        assert everything("out") == expected
        shutil.rmtree("out")
        shutil.rmtree("whole")


def test_a_shard_of_other_samples_is_written_again(tmp_path, monkeypatch):
    source(tmp_path / "in")
    expected = whole("tar")
    name, second = "train-00000.tar", expected["train-00001.tar"]
    first = expected[name]
    label = first.index(b"00000000.cls") + 512
    others = {
        "other samples": second,
        "another class": first[:label] + b"1" + first[label + 1 :],
        "fewer": second[:512] + first[512:],
        "more": first.rstrip(b"\0") + bytes(-len(first.rstrip(b"\0")) % 512) + second,
    }
    for what, content in others.items():
        with monkeypatch.context() as patch:
            killed_after(15, patch, KeyboardInterrupt())
            assert main(prepare(what, "--format", "tar")) == 130
        Path(what, name).write_bytes(content)
        assert main(prepare(what, "--format", "tar")) == 0 and everything(what) == expected


@formats
def test_a_full_disk_is_one_line_and_then_it_goes_on(tmp_path, monkeypatch, form):
    source(tmp_path / "in")
    expected = whole(form)
    calls, real = itertools.count(), os.replace

    def replace(*given):
        if next(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        found = said(main, prepare("out", "--format", form))
    assert found.code == 74 and "cannot write out/" in one_line(found.err)
    assert not list(Path("out").rglob(".*.tmp"))
    assert main(prepare("out", "--format", form)) == 0 and everything("out") == expected


def test_a_finished_folder_is_left_as_it_is(tmp_path, monkeypatch):
    source(tmp_path / "in")
    assert main(prepare()) == 0
    before = everything("out")
    monkeypatch.setattr(stores, "shrunk", lambda *given: pytest.fail("nothing is left to do"))
    found = said(main, prepare())
    assert found.code == 0 and "out is finished, nothing to do: train with " in found.out
    # killed between its last two steps
    Path("out", prepared.PART).write_bytes(b"{}")
    assert main(prepare()) == 0 and everything("out") == before


def test_two_do_not_write_one_folder(tmp_path):
    source(tmp_path / "in")
    Path("out").mkdir()
    process = SERVER.Process(target=hold, args=(str(tmp_path / "out"),))
    process.start()
    try:
        until = time.monotonic() + 60
        while not Path("out/held").exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        Path("out/held").unlink()
        assert refused_loudly(prepare()).endswith("another process is writing there: wait for it "
                                                  "or stop it")  # fmt: skip
    finally:
        process.kill()
        process.join()


def hold(folder: str) -> None:
    work.lock_out(Path(folder))
    Path(folder, "held").touch()
    time.sleep(60)


def refused_loudly(argv: list[str], command=main) -> str:
    """The message of a refusal; what is said before it of the images is none of it."""
    found = said(command, argv)
    assert found.code == 2, found
    return one_line(found.err)


# Refusals


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--quality", "80"], "was begun with --quality 92, not 80: give the same, or choose"),
        (["--short-side", "24"], "was begun with --short-side 32, not 24"),
        (["--format", "tar"], "was begun with --format jpeg, not tar"),
        (["--data-dir", "other"], "was begun of other images (folder "),
        (["--val-share", "0.5", "--data-dir", "in/train"], "was begun of other images (folder "),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_request_for_the_same_folder_is_refused(
    tmp_path, monkeypatch, flags, words, finished
):
    source(tmp_path / "in")
    source(tmp_path / "other", 2)
    with monkeypatch.context() as patch:
        if not finished:
            killed_after(3, patch, KeyboardInterrupt())
        main(prepare())
    before = everything("out")
    assert words in refused_loudly([*prepare(), *flags])
    assert everything("out") == before


def test_another_encoder_is_refused(tmp_path, monkeypatch):
    source(tmp_path / "in")
    assert main(prepare()) == 0
    monkeypatch.setattr(work, "encoder", lambda: "Pillow 99")
    assert "not Pillow 99, and images would be encoded otherwise" in refused_loudly(prepare())


def test_a_folder_with_other_files_is_not_touched(tmp_path):
    source(tmp_path / "in")
    tree(tmp_path / "out", {"notes.txt": b"mine"})
    assert refused_loudly(prepare()) == "--out out holds other files: choose a new folder"
    assert everything("out") == {"notes.txt": b"mine"}
    (tmp_path / "file").write_bytes(b"")
    assert refused_loudly(prepare("file")).startswith("--out file")
    tree(tmp_path / "new", {".lock": b"", ".prepared.part.json.0123abcd.tmp": b"{"})
    assert main(prepare("new")) == 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--out", "o", "--short-side", "9"], "--data-dir is missing: --help says how"),
        (["--data-dir", "in", "--short-side", "9"], "--out is missing"),
        (["--data-dir", "in", "--out", "o"], "--short-side is missing"),
        (prepare("in/out"), "lies in --data-dir in, whose images would be among those that are"),
        (prepare("in"), "lies in --data-dir in"),
        (prepare("o", "--dataset", "cifar10"), "stored as pixels, not as image files"),
        (prepare("o", "--dataset", "torchvision/SVHN"), "stored as pixels, not as image files"),
        (prepare("o", "--dataset", "npz"), "stored as pixels, not as image files"),
        (prepare("o", "--dataset", "foldr"), "--dataset foldr"),
        (prepare("o", "--dataset", "imagenet", "--val-share", "0.1"), "--val-share has no effect"),
        (prepare("o", "--format", "webp"), "--format webp"),
        (prepare("o", "--quality", "101"), "--quality"),
        (prepare("o", "--on-bad-image", "zeros"), "--on-bad-image"),
        (prepare("o", of="nowhere"), "--data-dir nowhere: no such directory"),
    ],
)
def test_a_command_line_is_refused_in_one_line(tmp_path, line, words):
    source(tmp_path / "in", 1)
    before = everything(tmp_path)
    assert words in refused(main, line)
    assert everything(tmp_path) == before


def test_pixels_that_are_recognised_are_refused(tmp_path, monkeypatch):
    source(tmp_path / "in", 1)
    digits = sets.digits(resolve({}))
    monkeypatch.setitem(sets.READERS, "folder", lambda config: digits)
    words = refused(main, prepare())
    assert words.startswith("--data-dir in is folder, which is stored as pixels")


# Images that cannot be read


def test_bad_headers_are_listed_before_anything_is_made(tmp_path):
    source(tmp_path / "in")
    tree(tmp_path, {"in/train/cat/0.jpg": b"none", "in/val/dog/1.jpg": b""})
    found = said(main, prepare())
    assert found.code == 2 and not Path("out").exists()
    listed = [line for line in found.out.splitlines() if "not an image that can be read" in line]
    assert [line.split(":")[0] for line in listed] == ["in/train/cat/0.jpg", "in/val/dog/1.jpg"]
    assert "2 of 16 images are bad: replace them and give the same command" in one_line(found.err)


@formats
def test_damaged_images_are_all_listed_and_replaced_it_goes_on(tmp_path, form):
    source(tmp_path / "in")
    expected = whole(form)
    bad = ["in/train/cat/1.jpg", "in/train/dog/0.jpg", "in/val/dog/1.jpg"]
    good = {name: Path(name).read_bytes() for name in bad}
    for name, content in good.items():
        Path(name).write_bytes(content[: len(content) // 2])
    found = said(main, prepare("out", "--format", form))
    assert found.code == 2 and "3 of 16 images are bad: replace them" in one_line(found.err)
    listed = [line for line in found.out.splitlines() if "truncated" in line]
    assert [line.split(":")[0] for line in listed] == bad
    assert "unfinished" in refused(training.main, ["--data-dir", "out"])
    tree(tmp_path, good)
    assert main(prepare("out", "--format", form)) == 0 and everything("out") == expected


def test_a_side_that_no_jpeg_has_is_named(tmp_path):
    source(tmp_path / "in")
    tree(tmp_path, {"in/train/cat/9.png": Image.new("L", (65_501, 20))})
    found = said(main, prepare())
    assert found.code == 2
    assert "9.png: a JPEG has at most 65,500 pixels a side, not 65,501" in found.out


# Another data set


def test_a_prepared_set_is_another_data_set_in_every_record(tmp_path):
    source(tmp_path / "in")
    flags = {"a": [], "b": ["--quality", "80"], "c": ["--short-side", "30"], "d": ["--short-side",
             "999"]}  # fmt: skip
    for name, more in flags.items():
        assert main([*prepare(name), *more]) == 0
    shutil.copytree("a", "e")
    prints = {name: read(name).fingerprint() for name in ("in", *flags, "e")}
    assert len(set(prints.values())) == 5 and prints["a"] == prints["e"]
    of = prints["in"][:12]
    about = f"prepared: short side 32, JPEG quality 92, from folder {of}"
    assert read("a").about == f"--dataset folder: prepared.json; {about}"
    assert read("a", dataset="folder").about == about
    assert read("a").names == ("cat", "dog")
    assert opened("torch", 0, data_dir="a", dataset="folder").fingerprint == prints["a"]
    # one that was prepared of a prepared one is a third
    assert main(prepare("f", side=16, of="a")) == 0
    assert f"from folder {prints['a'][:12]}" in read("f").about


def test_a_run_records_it_and_is_not_gone_on_with_on_the_originals(tmp_path):
    source(tmp_path / "in", 2)
    assert main(prepare()) == 0
    run = ["--data-dir", "out", "--image-size", "16", "--model", "resnet8", "--augment", "none"]
    run += ["--device", "cpu", "-b", "4", "--epochs", "1", "--out", "run"]
    assert training.main(run) == 0
    kept = json.loads(Path("run/env.json").read_text())["images"]
    assert "prepared: short side 32, JPEG quality 92, from folder " in kept
    Path("run/status.json").unlink()  # as if it had been killed at its end
    for other in ("in", "other"):
        if other == "other":
            assert main(prepare("other", "--quality", "80")) == 0
        words = refused_loudly(["--resume", "--out", "run", "--data-dir", other], training.main)
        assert "the images are not those the run was started with" in words


@pytest.mark.parametrize("dataset", ["auto", "folder", "webdataset", "imagenet"])
def test_an_unfinished_set_is_no_set(tmp_path, dataset):
    source(tmp_path / "out")
    Path("out", prepared.PART).write_bytes(b"")
    line = ["--data-dir", "out", "--dataset", dataset]
    assert "is unfinished: give the command prepare again" in refused(training.main, line)


def test_a_set_that_has_lost_or_gained_images_is_refused(tmp_path):
    source(tmp_path / "in")
    assert main(prepare()) == 0
    shutil.copy("out/train/cat/1.jpg", "out/train/cat/0-more.jpg")
    words = refused(training.main, ["--data-dir", "out"])
    assert words == (
        "--data-dir out holds 9 training and 8 test images, but not the 8 and 8 with their labels "
        "that prepared.json speaks of: prepare them again, or remove prepared.json to take them as "
        "they are"
    )
    Path("out/train/dog/2.jpg").unlink()  # as many as before, but other labels
    assert "holds 8 training and 8 test images" in refused(training.main, ["--data-dir", "out"])
    Path("out/prepared.json").unlink()
    assert len(read().train) == 8


def record(**other) -> bytes:
    good = prepared.Record(
        version=1, layout="folder", fingerprint="0", stored="jpeg", short_side=1, quality=1,
        encoder="", classes=["a", "b"], train=1, test=1, labels="", contents="", bytes_before=0,
        bytes_after=0,
    )  # fmt: skip
    return json.dumps(dataclasses.asdict(good) | other).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"{}", b"\xff", b"[" * 100_000, record(more=1),
        record(version=2), record(stored="zip"), record(classes=[1]), record(classes=[]),
        record(train=True), record(train="1"), record(quality=1.0), record(layout=None),
    ],
)  # fmt: skip
def test_a_damaged_record_is_one_line(tmp_path, content):
    source(tmp_path / "out")
    Path("out", prepared.FILE).write_bytes(content)
    for dataset in ("auto", "folder"):
        words = refused(training.main, ["--data-dir", "out", "--dataset", dataset])
        assert words.startswith("out/prepared.json is damaged, or of another version of fastsmooth")
    Path("out", prepared.FILE).unlink()
    Path("out", prepared.FILE).mkdir()
    assert "prepared.json" in refused(training.main, ["--data-dir", "out"])


def test_the_sum_of_the_contents_is_that_of_the_files(tmp_path):
    source(tmp_path / "in")
    digests = []
    for form in ("jpeg", "tar"):
        assert main(prepare(form, "--format", form)) == 0
        said_of = json.loads(Path(form, prepared.FILE).read_text())
        digests.append(said_of["contents"])
        if form == "jpeg":
            files = read("jpeg")
            images = [
                split.files.read(i).tobytes()
                for split in (files.train, files.test)
                for i in range(len(split))
            ]
            each = b"".join(hashlib.sha256(image).digest() for image in images)
            assert said_of["contents"] == hashlib.sha256(each).hexdigest()
            assert said_of["bytes_after"] == sum(map(len, images))
            before = sum(path.stat().st_size for path in Path("in").rglob("*.jpg"))
            assert (said_of["train"], said_of["test"], said_of["bytes_before"]) == (8, 8, before)
    assert digests[0] == digests[1]


def test_what_is_said(tmp_path, monkeypatch):
    source(tmp_path / "in")
    monkeypatch.setattr(work, "span", lambda seconds: "7 s")
    found = said(main, prepare())
    assert found.code == 0 and not found.err
    first, last = found.out.splitlines()
    assert first == "--dataset folder: train/ of class folders"
    assert last.startswith("out: 8 training and 8 test images, 0.0 MB before, 0.0 MB now, 7 s: ")
    assert last.endswith(" --data-dir out") and "train" in last
    times = itertools.count(0, 3)
    monkeypatch.setattr(work, "time", SimpleNamespace(monotonic=lambda: next(times)))
    lines = said(main, prepare("other")).err.splitlines()
    assert lines[0] == "preparing: 1 of 16 images, 7 s left" and 3 < len(lines) < 8


def test_all_images_are_on_the_disk_before_they_are_said_to_be_there(tmp_path, monkeypatch):
    source(tmp_path / "in")
    monkeypatch.setattr(os, "sync", lambda: there.append(sorted(everything("out"))))
    there: list[list[str]] = []
    assert main(prepare()) == 0
    (names_then,) = there
    assert prepared.PART in names_then and prepared.FILE not in names_then
    assert len([name for name in names_then if name.endswith(".jpg")]) == 16


def test_threads_make_the_same_as_one(tmp_path):
    source(tmp_path / "in", 12)
    for form in ("jpeg", "tar"):
        for threads in ("1", "5"):
            assert main(prepare(form + threads, "--format", form, "--workers", threads)) == 0
        assert everything(form + "1") == everything(form + "5")


def test_the_decoded_batches_are_those_of_the_stored_images(tmp_path):
    source(tmp_path / "in")
    assert main(prepare()) == 0
    given = {"dataset": "folder", "data_dir": "out", "image_size": 32, "augment": "none"}
    for loader in ("resident", "torch"):
        ((x, y),) = opened(loader, 0, **given).train.batches([torch.arange(8)])
        view = T.Compose([T.Resize(32), T.CenterCrop(32), T.ToTensor()])
        normalised = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        kept = ImageFolder("out/train")
        assert torch.equal(x, torch.stack([normalised(view(image)) for image, _ in kept]))
        assert y.tolist() == kept.targets
