"""Odd and bad images through every loader: each is read as PIL reads it, or named in one line and,
where asked, served black."""

import os
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from images import CPU, LOADERS, encoded, every_batch, tree
from PIL import Image
from torchvision import transforms as T

from fastsmooth.cli.config import resolve
from fastsmooth.data import DataError, open_data
from fastsmooth.data.layouts.common import IMAGENET_MEAN, IMAGENET_STD
from fastsmooth.data.order import permutation

SIZE = 32
# mean difference from PIL's pixels, of 255
TOLERANCE = {"resident": 0, "torch": 0, "threads": 0.05, "dali": 0.3}
EXACT = 1e-4  # of 255: what normalising and back rounds off


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(width: int = 60, height: int = 44) -> Image.Image:
    """Smooth colours and some grain."""
    y, x = np.mgrid[:height, :width] / 15
    waves = np.stack([np.sin(x + y), np.cos(x - y), np.sin(2 * x) * np.cos(y)], axis=-1)
    grain = np.random.default_rng(width).normal(0, 8, (height, width, 3))
    return Image.fromarray((127 + 90 * waves + grain).clip(0, 255).astype(np.uint8))


def with_alpha() -> Image.Image:
    image = picture()
    image.putalpha(image.convert("L"))
    return image


def clear(image: Image.Image) -> bytes:
    """A PNG of it, of whose colours one is transparent."""
    return encoded(image, "PNG", transparency=3)


def deep() -> Image.Image:
    return Image.fromarray(np.asarray(picture().convert("L")).astype(np.uint16) * 257)


def with_wrong_sum(kind: bytes) -> bytes:
    """A PNG with a bit of the check sum of its first chunk of this kind flipped."""
    content = bytearray(encoded(picture(), "PNG"))
    at = content.index(kind)
    (length,) = struct.unpack(">I", content[at - 4 : at])
    content[at + 4 + length] ^= 1
    return bytes(content)


def with_wrong_pixels(share: float) -> bytes:
    """A PNG with a bit flipped inside its compressed pixels, under the right check sum of the
    chunk."""
    content = bytearray(encoded(picture(), "PNG"))
    at = content.index(b"IDAT")
    (length,) = struct.unpack(">I", content[at - 4 : at])
    end = at + 4 + length
    content[at + 4 + int(share * (length - 1))] ^= 1
    content[end : end + 4] = struct.pack(">I", zlib.crc32(content[at:end]))
    return bytes(content)


def bomb(width: int = 20_000, height: int = 20_000) -> bytes:
    """A valid PNG of one bit a pixel, all black: some kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    press = zlib.compressobj(1)
    rows = bytes(1 + (width + 7) // 8) * 100
    data = b"".join([*(press.compress(rows) for _ in range(height // 100)), press.flush()])
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def jpeg(image: Image.Image, **options) -> bytes:
    return encoded(image, "JPEG", quality=90, **options)


def put(content: bytes) -> Callable[[bytes], None]:
    def make(path: bytes) -> None:
        with open(path, "wb") as file:
            file.write(content)

    return make


def closed(path: bytes) -> None:
    put(jpeg(picture()))(path)
    os.chmod(path, 0)


ODD: dict[str, tuple[bytes, Callable[[bytes], None]]] = {  # file name, and what makes it
    "half a JPEG": (b"x.jpg", put(jpeg(picture())[:900])),
    "the header of a JPEG": (b"x.jpg", put(jpeg(picture())[:20])),
    "half a progressive JPEG": (b"x.jpg", put(jpeg(picture(), progressive=True)[:900])),
    "half a PNG": (b"x.png", put(encoded(picture(), "PNG")[:900])),
    "no bytes": (b"x.jpg", put(b"")),
    "a text": (b"x.jpg", put(b"404 not found\n" * 30)),
    "a CMYK JPEG": (b"x.jpg", put(jpeg(picture().convert("CMYK")))),
    "a grey JPEG": (b"x.jpg", put(jpeg(picture().convert("L")))),
    "a progressive JPEG": (b"x.jpg", put(jpeg(picture(), progressive=True))),
    "a 16-bit PNG": (b"x.png", put(encoded(deep(), "PNG"))),
    "a PNG with a palette": (b"x.png", put(encoded(picture().convert("P"), "PNG"))),
    "a PNG with a palette and transparency": (b"x.png", put(clear(picture().convert("P")))),
    "a PNG with alpha": (b"x.png", put(encoded(with_alpha(), "PNG"))),
    "a grey PNG with alpha": (b"x.png", put(encoded(with_alpha().convert("LA"), "PNG"))),
    "a grey PNG": (b"x.png", put(encoded(picture().convert("L"), "PNG"))),
    "a PNG of one pixel": (b"x.png", put(encoded(picture(1, 1), "PNG"))),
    "a PNG of one row": (b"x.png", put(encoded(picture(900, 1), "PNG"))),
    "a PNG whose header has a wrong sum": (b"x.png", put(with_wrong_sum(b"IHDR"))),
    "a PNG whose pixels have a wrong sum": (b"x.png", put(with_wrong_sum(b"IDAT"))),
    "a PNG whose pixels are damaged": (b"x.png", put(with_wrong_pixels(0.5))),
    "a PNG whose last byte is damaged": (b"x.png", put(with_wrong_pixels(1))),
    "a bomb of 20,000 x 20,000 pixels": (b"x.png", lambda path: put(bomb())(path)),
    "a link to nothing": (b"x.jpg", lambda path: os.symlink(b"gone.jpg", path)),
    "a link to itself": (b"x.jpg", lambda path: os.symlink(b"x.jpg", path)),
    "a name that is not UTF-8": (b"x\xff\xfe.jpg", put(jpeg(picture()))),
    "a name that is not UTF-8 of a text": (b"x\xff\xfe.jpg", put(b"404 not found\n" * 30)),
    "a name with a line break": (b"x\ny.png", put(encoded(picture(), "PNG"))),
    "a name with a line break of a text": (b"x\r\ny.png", put(b"404 not found\n" * 30)),
    "a BMP": (b"x.bmp", put(encoded(picture(), "BMP"))),
    "a WebP": (b"x.webp", put(encoded(picture(), "WEBP"))),
    "a WebP named JPEG": (b"x.jpg", put(encoded(picture(), "WEBP"))),
    "a GIF named PNG": (b"x.png", put(encoded(picture(), "GIF"))),
    "a JPEG that is to be turned": (b"x.jpg", put(jpeg(picture(),
        exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"))),
    "a file that may not be read": (b"x.jpg", closed),
}  # fmt: skip
BAD = {
    "half a JPEG", "the header of a JPEG", "half a progressive JPEG", "half a PNG", "no bytes",
    "a text", "a PNG whose pixels are damaged", "a PNG whose header has a wrong sum",
    "a bomb of 20,000 x 20,000 pixels", "a link to nothing", "a link to itself",
    "a name that is not UTF-8 of a text",
    "a name with a line break of a text", "a file that may not be read",
}  # fmt: skip
# the pixels themselves are whole
EITHER = {"a PNG whose pixels have a wrong sum", "a PNG whose last byte is damaged"}
VIEW = T.Compose([T.Resize(SIZE), T.CenterCrop(SIZE)])


def pixels_of(x: torch.Tensor) -> torch.Tensor:
    """float64 [B, 3, SIZE, SIZE] between 0 and 255."""
    mean, std = (
        torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return (x.double() * std + mean) * 255


def pil_view(path: bytes) -> torch.Tensor:
    """What is tested of an image, by PIL and torchvision: float64 [3, SIZE, SIZE]."""
    with Image.open(path) as file:
        return torch.from_numpy(np.array(VIEW(file.convert("RGB")))).permute(2, 0, 1).double()


def read(
    root: Path, loader: str, workers: int, policy: str
) -> tuple[torch.Tensor, list[str], dict]:
    """The pixels of all training images, the lines that were said, and the reasons of bad
    images."""
    lines: list[str] = []
    given = {
        "dataset": "folder",
        "data_dir": str(root),
        "loader": loader,
        "image_size": SIZE,
        "on_bad_image": policy,
    }
    more = {} if loader == "resident" else {"workers": workers, "chunk": 3}
    data = open_data(resolve(given | more), CPU, lines.append)
    x = torch.cat([x for x, _ in data.train.batches(torch.arange(len(data.train)).split(2))])
    return pixels_of(x), lines, data.bad.reasons


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize(("loader", "workers"), LOADERS)
def test_an_odd_image_is_read_right_or_named_and_its_neighbours_are_as_before(
    tmp_path, loader, workers, name, cases, bound_by_modes
):
    if cases("odd images, loader by loader", 1, int(loader != "torch")) == 0:
        pytest.skip("with --full: PyTorch's DataLoader, which is not what reads images by itself")
    good = {
        f"{split}/{c}/{k}.png": picture(50 + k)
        for split in ("train", "val")
        for c in ("ant", "bee")
        for k in (1, 2)
    }
    root = tree(tmp_path / "images", good)
    file, make = ODD[name]
    folder = os.fsencode(root / "train" / "ant")
    path = os.path.join(folder, file)
    make(path)
    shown = " ".join(os.fsdecode(path).splitlines())
    kept = [os.path.join(folder, b"1.png"), os.path.join(folder, b"2.png")]
    kept += [os.fsencode(root / "train" / "bee" / f"{k}.png") for k in (1, 2)]
    place, allowed = 2, TOLERANCE[loader] + EXACT  # 1.png, 2.png, x
    try:
        found, lines, _ = read(root, loader, workers, "raise")
        refusal = ""
    except DataError as error:
        refusal = str(error)
    assert name in EITHER or bool(refusal) == (name in BAD)
    if refusal:
        assert len(refusal.splitlines()) == 1 and refusal.startswith(f"{shown}: "), refusal
        assert ": remove" in refusal and refusal.endswith(
            "; or serve it black with --on-bad-image zeros"
        )
        found, lines, reasons = read(root, loader, workers, "zeros")
        assert list(reasons) == [os.fsdecode(path)] and len(lines) == 1
        assert lines[0].startswith(f"{shown}: ") and lines[0].endswith("; it is served black")
        assert len(lines[0].splitlines()) == 1
        assert found[place].abs().max() <= EXACT
    else:
        assert not lines and (found[place] - pil_view(path)).abs().mean() <= allowed
    neighbours = torch.cat([found[:place], found[place + 1 :]])
    assert len(found) == 5
    for ours, neighbour in zip(neighbours, kept, strict=True):
        assert (ours - pil_view(neighbour)).abs().mean() <= allowed


@pytest.mark.parametrize(("loader", "workers"), LOADERS)
def test_a_folder_that_is_called_like_an_image_is_a_folder(tmp_path, loader, workers, cases):
    cases("odd images, loader by loader", 1, 1)
    files = {f"{split}/{c}/1.png": picture() for split in ("train", "val") for c in ("ant", "bee")}
    root = tree(
        tmp_path / "images",
        files | {"train/ant/x.jpg/inside.png": picture(70), "train/ant/y.png": None},
    )
    found, lines, _ = read(root, loader, workers, "raise")
    assert len(found) == 3 and not lines
    inside = os.fsencode(root / "train/ant/x.jpg/inside.png")
    assert (found[1] - pil_view(inside)).abs().mean() <= TOLERANCE[loader] + EXACT


# Files that change, and files that are damaged

# which decodes everything once, at the start
INDEXED = [pair for pair in LOADERS if pair[0] != "resident"]


def replaced(path: Path, content: bytes, disguised: bool) -> None:
    """Another image in the file's place; disguised: of as many bytes and the same time of
    modification."""
    before = os.stat(path)
    if disguised:
        content += bytes(before.st_size - len(content))  # behind what a decoder reads
    path.with_name("new").write_bytes(content)
    os.replace(path.with_name("new"), path)
    if disguised:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "disguised", [False, True], ids=["as it comes", "of the same bytes and time"]
)
@pytest.mark.parametrize("augment", ["none", "resized-crop-flip"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("loader", "workers"), INDEXED)
def test_an_image_that_is_replaced_by_one_of_another_size_under_a_run_is_bad(
    tmp_path, loader, workers, kind, augment, disguised, cases
):
    few = (loader != "torch" or workers == 0) and (kind == "JPEG" or augment == "none")
    if cases("images replaced under a run by others of another size", 1, int(few)) == 0:
        pytest.skip("with --full")
    suffix = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[kind]
    files = {
        f"{split}/{c}/{k}.{suffix}": encoded(picture(), kind)
        for split in ("train", "val")
        for c in "ab"
        for k in "12"
    }
    root = tree(tmp_path / "images", files)
    given = {
        "dataset": "folder",
        "data_dir": str(root),
        "loader": loader,
        "image_size": SIZE,
        "augment": augment,
    }
    given |= {"workers": workers, "chunk": 2}
    lines: list[str] = []
    train = open_data(resolve(given), CPU).train
    black = open_data(resolve(given | {"on_bad_image": "zeros"}), CPU, lines.append).train
    before = every_batch(black, 2, epoch=1)
    path = root / f"train/b/1.{suffix}"
    replaced(path, encoded(picture(30, 40), kind), disguised)
    with pytest.raises(DataError) as error:
        every_batch(train, 2, epoch=1)
    assert str(error.value) == (
        f"{path}: 30 x 40 pixels, which was 60 x 44 when the run began: put the old image back, or "
        "start a new run; or serve it black with --on-bad-image zeros"
    )
    after = every_batch(black, 2, epoch=1)
    assert (
        len(lines) == 1
        and lines[0].startswith(f"{path}: 30 x 40 pixels")
        and lines[0].endswith("it is served black")
    )
    order = permutation(0, 1, 4).tolist()
    for place, (old, new) in enumerate(
        zip(*(torch.cat([x for x, _ in passed]) for passed in (before, after)), strict=True)
    ):
        if order[place] == 2:
            assert pixels_of(new).abs().max() <= EXACT
        else:
            assert torch.equal(old, new)
    # what is started now reads the new image, whatever is kept of the old one
    fresh = open_data(resolve(given | {"augment": "none"}), CPU).train
    ((x, _),) = fresh.batches([torch.tensor([2])])
    assert (pixels_of(x)[0] - pil_view(os.fsencode(path))).abs().mean() <= TOLERANCE[loader] + EXACT


def whole(rng: np.random.Generator) -> bytes:
    """A JPEG of some kind."""
    image = picture(int(rng.integers(40, 90)), int(rng.integers(40, 90)))
    options = {
        "progressive": bool(rng.integers(2)),
        "restart_marker_blocks": int(rng.integers(2)) * 3,
    }
    return jpeg(image.convert("L") if rng.integers(4) == 0 else image, **options)


def cut(content: bytearray, at: int, rng) -> bytearray:
    return content[:at]


def without_end(content: bytearray, at: int, rng) -> bytearray:
    return content[:-2] + bytes(int(rng.integers(3)))


def flipped(content: bytearray, at: int, rng) -> bytearray:
    for k in rng.integers(2, len(content), int(rng.integers(1, 20))):
        content[k] ^= 1 << int(rng.integers(8))
    return content


def zeroed(content: bytearray, at: int, rng) -> bytearray:
    end = min(len(content), at + int(rng.integers(1, 600)))
    return content[:at] + bytes(end - at) + content[end:]


def shortened(content: bytearray, at: int, rng) -> bytearray:
    return content[:at] + content[at + int(rng.integers(1, 200)) :]


def with_marker(content: bytearray, at: int, rng) -> bytearray:
    """A marker where none belongs: the rest of the pixels is grey to DALI, and broken to others."""
    return content[:at] + bytes([0xFF, int(rng.integers(1, 255))]) + content[at + 2 :]


def with_second_frame(content: bytearray, at: int, rng) -> bytearray:
    return content[:-2] + b"\xff\xc0"


DAMAGE = (cut, without_end, flipped, zeroed, shortened, with_marker, with_second_frame)


@pytest.mark.parametrize(("loader", "workers"), INDEXED)
def test_every_loader_finds_the_same_damaged_jpegs_bad(
    tmp_path, loader, workers, cases, imagenet_folder
):
    number = cases("damaged JPEGs, loader by loader", 449, 56 * (loader != "torch"))
    if number == 0:
        pytest.skip("with --full: PyTorch's DataLoader decodes as this test does")
    rng = np.random.default_rng(3)
    photos = sorted(imagenet_folder.glob("train/*/*"))[:: max(1, 128 * 7 // number)]
    files: dict[str, Image.Image | bytes] = {f"val/{c}/1.png": picture() for c in "ab"} | {
        "train/b/1.png": picture()
    }
    for k in range(number):
        content = bytearray(
            photos[k // 7 % len(photos)].read_bytes()
            if k % 14 >= 7 and number > 100
            else whole(rng)
        )
        at = int(rng.integers(len(content) // 3, len(content) - 2))
        files[f"train/a/{k:03}.jpg"] = bytes(DAMAGE[k % 7](content, at, rng))
    root = tree(tmp_path / "images", files)
    bad, good = {}, {}
    for k in range(number):
        path = root / f"train/a/{k:03}.jpg"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                good[k] = pil_view(os.fsencode(path))
        except Exception as error:  # PIL's decoders do not agree on a type
            bad[str(path)] = error
    found, _, reasons = read(root, loader, workers, "zeros")
    assert reasons.keys() == bad.keys()
    assert len(bad) > number // 4 and len(good) > number // 4
    for k, expected in good.items():
        # a photo brought to SIZE differs by 0.2
        assert (found[k] - expected).abs().mean() <= 1, (k, DAMAGE[k % 7])


def test_black_images_are_counted_in_the_summary_of_a_run(tmp_path, monkeypatch, cases):
    import json

    from said import said

    from fastsmooth.train import main

    cases("a run with black images", 1, 1)
    monkeypatch.chdir(tmp_path)
    files = {
        f"{split}/{c}/{k}.png": picture()
        for split in ("train", "val")
        for c in ("ant", "bee")
        for k in (1, 2)
    }
    tree(
        Path("images"),
        files | {"train/ant/x.jpg": b"text", "train/bee/x.png": b"", "val/ant/x.png": b"text"},
    )
    argv = [
        "--dataset",
        "folder",
        "--data-dir",
        "images",
        "--model",
        "resnet8",
        "--epochs",
        "2",
        "--batchsize",
        "2",
    ]
    found = said(main, [*argv, "--on-bad-image", "zeros", "--out", "run"])
    assert found.code == 0 and "3 images could not be read and were served black" in found.out
    assert json.loads(Path("run/summary.json").read_text())["bad_images"] == 3
    assert sorted(line.split(": ")[2].split("/", 1)[1] for line in found.err.splitlines()) == [
        "train/ant/x.jpg", "train/bee/x.png", "val/ant/x.png",
    ]  # fmt: skip


def test_there_are_at_least_20_odd_images():
    assert len(ODD) >= 20 and ODD.keys() >= BAD | EITHER
