"""The index of a tree's image files: what their headers say, which of them are bad, and how it is
kept."""

import errno
import os
import pickle
import shutil
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from images import encoded, noise, solid, tree
from PIL import Image

from fastsmooth.data import images, index
from fastsmooth.data.files import Paths
from fastsmooth.data.index import read_index

SIZE = (40, 24)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The folder in which the indices of this test are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastsmooth"


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The name of every file that Pillow opens from now on."""
    names, pillow = [], Image.open

    def spy(path, *given, **options):
        names.append(os.path.basename(path))
        return pillow(path, *given, **options)

    monkeypatch.setattr(Image, "open", spy)
    return names


def listed(root: Path) -> tuple[str, ...]:
    return tuple(
        sorted(os.path.join(base, file) for base, _, files in os.walk(root) for file in files)
    )


class Below(Paths):
    """Files, their root given, as that of a few may lie further down."""

    root = ""  # in place of the property

    def __init__(self, paths, root: Path | str):
        super().__init__(paths)
        self.root = str(root)


def indexed(root: Path, *given):
    return read_index(Below(listed(root), root), *given)


def sizes(found) -> list[tuple[int, int]]:
    return list(zip(found.width.tolist(), found.height.tolist(), strict=True))


def three_images(root: Path) -> Path:
    return tree(root, {f"{k}.png": encoded(solid(size=(10 + k, 20 + k)), "PNG") for k in (1, 2, 3)})


THREE = [(11, 21), (12, 22), (13, 23)]


def png(bits: int, colour: int, interlace: int = 0, before: bytes = b"") -> bytes:
    """A PNG of 40x24 black pixels: colour 0 is gray, 2 is RGB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", *SIZE, bits, colour, 0, 0, interlace)
    # a byte each; the 7 passes of an interlaced image have rows of their own
    rows = 45 if interlace else SIZE[1]
    data = zlib.compress(bytes(rows + SIZE[0] * SIZE[1] * bits * (3 if colour == 2 else 1) // 8))
    extra = chunk(b"tRNS", before) if before else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", data)
        + chunk(b"IEND", b"")
    )


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation: to be shown turned by 90 degrees
    return encoded(noise(SIZE), "JPEG", exif=exif)


PLAIN = {
    "rgb.jpg": encoded(noise(SIZE), "JPEG"),
    "progressive.jpg": encoded(noise(SIZE), "JPEG", progressive=True),
    "unsubsampled.jpg": encoded(noise(SIZE), "JPEG", subsampling=0),
    "stored-as-rgb.jpg": encoded(noise(SIZE), "JPEG", keep_rgb=True),
    "gray.jpg": encoded(noise(SIZE).convert("L"), "JPEG"),
    "cmyk.jpg": encoded(noise(SIZE).convert("CMYK"), "JPEG"),
    "turned.jpg": rotated(),
    "rgb.png": encoded(noise(SIZE), "PNG"),
    "gray.png": encoded(noise(SIZE).convert("L"), "PNG"),
    "interlaced.png": png(8, 2, interlace=1),
    "really-a-png.JPEG": encoded(noise(SIZE), "PNG"),
    "really-a-jpeg.png": encoded(noise(SIZE), "JPEG"),
}
NOT_PLAIN = {
    "alpha.png": encoded(noise(SIZE).convert("RGBA"), "PNG"),
    "gray-alpha.png": encoded(noise(SIZE).convert("LA"), "PNG"),
    "palette.png": encoded(noise(SIZE).convert("P"), "PNG"),
    "bit.png": encoded(noise(SIZE).convert("1"), "PNG"),
    "gray-of-2-bits.png": png(2, 0),
    "gray-of-4-bits.png": png(4, 0),
    "gray-of-16-bits.png": png(16, 0),
    "rgb-of-16-bits.png": png(16, 2),
    "rgb-with-a-transparent-colour.png": png(8, 2, before=bytes(6)),
    "gray-with-a-transparent-colour.png": png(8, 0, before=bytes(2)),
    "two-frames.jpg": encoded(noise(SIZE), "MPO", save_all=True, append_images=[noise(SIZE)]),
    "palette.gif": encoded(noise(SIZE), "GIF"),
    "map.bmp": encoded(noise(SIZE), "BMP"),
    "anymap.ppm": encoded(noise(SIZE), "PPM"),
    "print.tif": encoded(noise(SIZE), "TIFF"),
    "web.webp": encoded(noise(SIZE), "WEBP"),
    "really-a-gif.JPEG": encoded(noise(SIZE), "GIF"),
}


@pytest.mark.parametrize(
    ("name", "content", "plain"),
    [(*item, True) for item in PLAIN.items()] + [(*item, False) for item in NOT_PLAIN.items()],
    ids=[*PLAIN, *NOT_PLAIN],
)
def test_a_header_gives_the_stored_size_and_whether_the_file_is_plain(
    tmp_path, name, content, plain
):
    root = tree(tmp_path / "tree", {name: content})
    assert images.open_image(Paths([str(root / name)]), 0).size == SIZE
    for _ in range(2):  # read, then kept
        found = indexed(root)
        assert sizes(found) == [SIZE] and found.size.tolist() == [len(content)]
        assert found.plain.tolist() == [plain] and found.bad == {}


def test_the_index_is_made_of_arrays_in_the_order_of_the_paths(tmp_path):
    files = {
        f"{name[::-1]}/{k}.png": encoded(noise((9 + k, 30 + k)), "PNG")
        for name in ("ab", "ca")
        for k in range(9)
    }
    paths = listed(tree(tmp_path / "tree", files))
    for order in (paths, paths[::-1], paths[5:] + paths[:5]):
        found = read_index(Below(order, tmp_path / "tree"))
        assert sizes(found) == [
            (9 + int(Path(path).stem), 30 + int(Path(path).stem)) for path in order
        ]
        assert found.size.tolist() == [os.path.getsize(path) for path in order]
    dtypes = [array.dtype for array in (found.width, found.height, found.size, found.plain)]
    assert dtypes == [np.int32, np.int32, np.int64, bool]


def test_no_images_make_an_empty_index(tmp_path):
    for _ in range(2):
        found = read_index(Below((), tmp_path))
        assert (
            len(found.width)
            == len(found.height)
            == len(found.size)
            == len(found.plain)
            == len(found.bad)
            == 0
        )


def test_imagenets_sizes_are_pillows(imagenet_folder):
    paths = listed(imagenet_folder / "train")
    found = read_index(Below(paths, imagenet_folder))
    assert len(paths) == 128 and sizes(found) == [Image.open(path).size for path in paths]
    assert found.size.tolist() == [os.path.getsize(path) for path in paths]
    assert found.plain.all() and found.bad == {}


BAD = {
    "no-bytes.png": (b"", "not an image that can be read: remove it"),
    "words.jpg": (b"<html>404 not found</html>\n" * 20, "not an image that can be read: remove it"),
    "header-only.jpg": (encoded(noise(), "JPEG")[:20], "remove"),
    "header-only.png": (encoded(noise(), "PNG")[:20], "remove"),
}


def refused(root: Path, name: str, reason: str) -> None:
    """The file is bad, its neighbours are not, and open_image would say the same."""
    tree(root, {"a-good-one.png": solid(), "z-good-one.png": solid()})
    with pytest.raises(images.DataError) as error:
        images.open_image(Paths([str(root / name)]), 0)
    three = [str(root / n) for n in ("a-good-one.png", name, "z-good-one.png")]
    for _ in range(2):  # read, then kept
        found = read_index(Below(three, root))
        assert found.bad == {1: str(error.value)}
        assert found.bad[1].startswith(f"{root / name}: ") and reason in found.bad[1]
        assert sizes(found) == [(32, 32), (0, 0), (32, 32)] and found.plain.tolist() == [
            True,
            False,
            True,
        ]


@pytest.mark.parametrize("name", BAD)
def test_a_header_that_cannot_be_read_is_bad(tmp_path, name):
    content, reason = BAD[name]
    refused(tree(tmp_path / "tree", {name: content}), name, reason)


# Pillow itself only refuses what is over twice its limit
@pytest.mark.parametrize("share", [1.5, 3])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_that_is_too_large_to_decode_safely_is_bad(tmp_path, monkeypatch, share):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    root = tree(tmp_path / "tree", {"big.png": noise((100, int(50 * share)))})
    refused(
        root, "big.png", "the image is too large to decode safely: remove it or make it smaller"
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_on_pixels_holds_for_what_was_kept_before_it_fell(tmp_path, monkeypatch):
    root = three_images(tmp_path / "tree")
    assert indexed(root).bad == {}
    with monkeypatch.context() as lowered:
        lowered.setattr(Image, "MAX_IMAGE_PIXELS", 12 * 22)
        assert list(indexed(root).bad) == [2]
    assert indexed(root).bad == {}


@pytest.mark.parametrize(
    ("target", "reason"),
    [("gone.png", "No such file"), ("link.png", "symbolic links"), (".", "Is a directory")],
)
def test_a_link_that_leads_to_no_file_is_bad(tmp_path, target, reason):
    root = tree(tmp_path / "tree", {"link.png": None})
    (root / "link.png").rmdir()
    (root / "link.png").symlink_to(target)
    refused(root, "link.png", reason)


def test_a_file_that_may_not_be_read_is_bad(tmp_path, bound_by_modes):
    path = tree(tmp_path / "tree", {"secret.png": solid()}) / "secret.png"
    path.chmod(0)
    refused(path.parent, "secret.png", "Permission denied")


def test_every_bad_file_is_named_by_its_position_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "CHUNK", 2)
    root = tree(
        tmp_path / "tree", {f"{k:02}.png": b"bad" if k % 3 == 0 else solid() for k in range(20)}
    )
    for _ in range(2):
        bad = indexed(root).bad
        assert list(bad) == list(range(0, 20, 3))
        assert all(bad[k].startswith(f"{root}/{k:02}.png: ") for k in bad)


def test_a_bad_file_that_was_repaired_is_good_although_its_size_and_time_are_the_same(tmp_path):
    good = encoded(solid(), "PNG")
    path = tree(tmp_path / "tree", {"1.png": b"x" * len(good)}) / "1.png"
    before = os.stat(path)
    assert list(indexed(path.parent).bad) == [0]
    path.write_bytes(good)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    found = indexed(path.parent)
    assert found.bad == {} and sizes(found) == [(32, 32)]


def test_a_file_that_changes_while_it_is_read_is_bad(tmp_path, monkeypatch):
    root, pillow = three_images(tmp_path / "tree"), Image.open
    calls = []

    def fail_once(path):
        calls.append(path)
        return (
            pillow(path)
            if path.endswith("2.png") and calls.count(path) > 1
            else pillow(f"{path}.gone")
        )

    monkeypatch.setattr(Image, "open", fail_once)
    assert "2.png: it changed while it was read" in indexed(root).bad[1]


def test_nothing_is_read_or_written_the_second_time(tmp_path, cache, read):
    root = three_images(tmp_path / "tree")
    first = indexed(root)
    (kept,) = cache.iterdir()
    before = kept.stat()
    assert (
        sorted(read) == ["1.png", "2.png", "3.png"]
        and kept.name.startswith("index-")
        and kept.suffix == ".npz"
    )
    read.clear()
    second = indexed(root)
    assert read == [] and kept.stat() == before
    for field in ("width", "height", "size", "plain"):
        assert np.array_equal(getattr(first, field), getattr(second, field))


def overwrite(path: Path, size: int | None = None, later: int = 0) -> None:
    """Another image in the file, of this many bytes and this much later, in ns; as before where not
    given."""
    before = os.stat(path)
    content = encoded(solid(size=(7, 5)), "PNG")
    # PNG readers stop at the end chunk
    path.write_bytes(content + bytes((size or before.st_size) - len(content)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + later))


@pytest.mark.parametrize("change", [{"size": 200}, {"later": 1}], ids=["size", "time"])
def test_a_file_whose_size_or_time_changed_is_read_again_alone(tmp_path, read, change):
    root = three_images(tmp_path / "tree")
    indexed(root)
    read.clear()
    overwrite(root / "2.png", **change)
    assert sizes(indexed(root)) == [THREE[0], (7, 5), THREE[2]] and read == ["2.png"]
    read.clear()
    assert sizes(indexed(root)) == [THREE[0], (7, 5), THREE[2]] and read == []


def test_files_that_were_added_are_read_alone(tmp_path, read):
    root = three_images(tmp_path / "tree")
    indexed(root)
    read.clear()
    tree(
        root,
        {
            "0.png": encoded(solid(size=(7, 5)), "PNG"),
            "2-and-a-half.png": encoded(solid(size=(8, 6)), "PNG"),
        },
    )
    expected = [(7, 5), THREE[0], (8, 6), *THREE[1:]]
    assert sizes(indexed(root)) == expected and sorted(read) == ["0.png", "2-and-a-half.png"]
    read.clear()
    assert sizes(indexed(root)) == expected and read == []


def test_a_file_that_was_renamed_is_read_alone(tmp_path, read):
    root = three_images(tmp_path / "tree")
    indexed(root)
    read.clear()
    (root / "3.png").rename(root / "4.png")  # the sizes and times are those of before, one by one
    for _ in range(2):
        assert sizes(indexed(root)) == THREE and read == ["4.png"]


def test_a_file_that_was_removed_leaves_the_cache(tmp_path, cache, read):
    root = three_images(tmp_path / "tree")
    indexed(root)
    (root / "2.png").rename(tmp_path / "2.png")
    read.clear()
    assert sizes(indexed(root)) == [THREE[0], THREE[2]] and read == []
    (kept,) = cache.iterdir()
    assert b"3.png" in kept.read_bytes() and b"2.png" not in kept.read_bytes()
    (tmp_path / "2.png").rename(root / "2.png")
    assert sizes(indexed(root)) == THREE and read == ["2.png"]


def test_two_files_that_swap_their_names_are_read_again(tmp_path):
    root = three_images(tmp_path / "tree")
    indexed(root)
    for old, new in [("1.png", "x"), ("2.png", "1.png"), ("x", "2.png")]:
        (root / old).rename(root / new)
    assert sizes(indexed(root)) == [THREE[1], THREE[0], THREE[2]]


def test_two_trees_have_a_cache_each(tmp_path, cache, read):
    first = three_images(tmp_path / "first")
    second = shutil.copytree(first, tmp_path / "second")  # names, sizes and times are the same
    overwrite(second / "2.png")
    for _ in range(2):
        assert sizes(indexed(first)) == THREE
        assert sizes(indexed(second)) == [THREE[0], (7, 5), THREE[2]]
    assert len(read) == 6 and len(list(cache.iterdir())) == 2


def test_a_tree_is_the_same_by_its_relative_path(tmp_path, monkeypatch, read):
    root = three_images(tmp_path / "tree")
    indexed(root)
    read.clear()
    for folder, relative, prefix in [
        (tmp_path, "tree", "tree/"),
        (root, ".", ""),
        (root, "../tree/", "../tree/"),
    ]:
        monkeypatch.chdir(folder)
        assert sizes(read_index(Below([f"{prefix}{k}.png" for k in (1, 2, 3)], relative))) == THREE
    assert read == []


def test_without_xdg_cache_home_the_cache_is_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    indexed(three_images(tmp_path / "tree"))
    assert len(list((tmp_path / "home" / ".cache" / "fastsmooth").glob("index-*.npz"))) == 1


def tampered(cache: Path, **arrays) -> None:
    """The cache with these of its arrays changed by a function."""
    (kept,) = cache.iterdir()
    with np.load(kept) as file:
        content = dict(file)
    np.savez(kept, **(content | {name: change(content[name]) for name, change in arrays.items()}))


def with_field(**values):
    def change(table):
        table = table.copy()
        for field, value in values.items():
            table[field][1] = value
        return table

    return change


UNFIT = {
    "another version": {"version": lambda v: v + 1},
    "a version that is an array": {"version": lambda v: np.array([v, v])},
    "names of another type": {"names": lambda a: a.astype(np.int8)},
    "names of two dimensions": {"names": lambda a: a[None]},
    "a name too few": {"names": lambda a: a[:-6]},
    "a name too many": {"names": lambda a: np.append(a, a[:6])},
    "records of floats": {"table": lambda a: np.ones((3, 5))},
    "fields of another type": {
        "table": lambda a: a.astype(
            [(n, "<i8") if n == "width" else (n, a.dtype[n]) for n in a.dtype.names]
        )
    },
    "a field too many": {"table": lambda a: np.ones(3, [*a.dtype.descr, ("more", "u1")])},
    "a record too few": {"table": lambda a: a[:-1]},
    "a record too many": {"table": lambda a: np.append(a, a[:1])},
    "records of two dimensions": {"table": lambda a: a[:, None]},
}


@pytest.mark.parametrize("what", UNFIT)
def test_a_cache_that_does_not_fit_is_built_again(tmp_path, cache, read, what):
    root = three_images(tmp_path / "tree")
    indexed(root)
    read.clear()
    tampered(cache, **UNFIT[what])
    assert sizes(indexed(root)) == THREE and len(read) == 3
    assert sizes(indexed(root)) == THREE and len(read) == 3


@pytest.mark.parametrize(
    "field", [{"width": -12}, {"height": -22}, {"width": -12, "height": -22}, {"width": 2**30}]
)
def test_a_record_with_an_impossible_size_is_read_again(tmp_path, cache, read, field):
    root = three_images(tmp_path / "tree")
    indexed(root)
    read.clear()
    tampered(cache, table=with_field(**field))
    assert sizes(indexed(root)) == THREE and read == ["2.png"]


def test_a_flag_that_is_neither_0_nor_1_becomes_a_safe_bool(tmp_path, cache):
    root = three_images(tmp_path / "tree")
    indexed(root)
    tampered(cache, table=with_field(plain=2))
    assert indexed(root).plain.view(np.uint8).tolist() == [1, 1, 1]


def test_a_record_of_a_file_that_is_gone_is_not_believed(tmp_path, cache):
    root = three_images(tmp_path / "tree")
    paths = listed(root)
    (root / "2.png").unlink()
    read_index(Below(paths, root))
    tampered(cache, table=with_field(width=12, height=22))
    found = read_index(Below(paths, root))
    assert list(found.bad) == [1] and sizes(found)[1] == (0, 0) and found.size[1] == 0


DAMAGED = {
    "no bytes": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "words": lambda content: b"no cache\n" * 100,
    # the archive has checksums
    "a flipped byte": lambda content: content.replace(b"2.png", b"7.png"),
    "one array": lambda content: (
        b"\x93NUMPY\x01\x00" + struct.pack("<H", 61) + b"{'descr':'<i8'}".ljust(60) + b"\n"
    ),
    "a pickle": pickle.dumps,
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_cache_is_built_again(tmp_path, cache, read, what):
    root = three_images(tmp_path / "tree")
    indexed(root)
    (kept,) = cache.iterdir()
    kept.write_bytes(DAMAGED[what](kept.read_bytes()))
    read.clear()
    assert sizes(indexed(root)) == THREE and len(read) == 3
    assert sizes(indexed(root)) == THREE and len(read) == 3


@pytest.mark.parametrize(
    "who",
    ["is another user's", "may be written by the group", "may be written by all", "is a pipe"],
)
def test_a_cache_that_others_may_have_written_is_not_believed(
    tmp_path, cache, read, monkeypatch, who
):
    """Sizes that are wrong would be other pixels, without a word; it is replaced by one that is
    believed."""
    before = os.umask(0o002)  # as on systems with a group for every user
    try:
        root = three_images(tmp_path / "tree")
        indexed(root)
        (kept,) = cache.iterdir()
        assert (kept.stat().st_mode & 0o777, cache.stat().st_mode & 0o777) == (0o600, 0o700)
        tampered(cache, table=with_field(width=77))
        assert sizes(indexed(root))[1] == (77, 22)  # so far it is believed
        read.clear()
        if who == "is a pipe":
            kept.unlink()
            os.mkfifo(kept)
        elif who == "is another user's":
            if os.geteuid():
                pytest.skip("only root gives files away")
            os.chown(kept, 65534, -1)
        else:
            kept.chmod(0o620 if "group" in who else 0o602)
        assert sizes(indexed(root)) == THREE and len(read) == 3
        if who != "is a pipe":
            assert sizes(indexed(root)) == THREE and len(read) == 3
            assert kept.stat().st_uid == os.geteuid() and kept.stat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


class Payload:
    """An object that leaves a folder where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", ["version", "names", "table"])
def test_a_cache_with_python_objects_is_not_unpickled(tmp_path, cache, name):
    root, mark = three_images(tmp_path / "tree"), tmp_path / "mark"
    indexed(root)
    tampered(cache, **{name: lambda array: np.array([Payload(mark)] * 3, dtype=object)})
    assert sizes(indexed(root)) == THREE
    (kept,) = cache.iterdir()
    kept.write_bytes(pickle.dumps(Payload(mark)))
    assert sizes(indexed(root)) == THREE and not mark.exists()


@pytest.mark.parametrize(
    "obstacle", ["a file for the folder", "a folder for the file", "no home", "read-only"]
)
def test_a_cache_that_cannot_be_written_costs_nothing_but_the_cache(
    tmp_path, cache, monkeypatch, obstacle
):
    root = three_images(tmp_path / "tree")
    if obstacle == "a file for the folder":
        cache.parent.write_bytes(b"")
    elif obstacle == "a folder for the file":
        indexed(root)
        (kept,) = cache.iterdir()
        kept.unlink()
        kept.mkdir()
    elif obstacle == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    else:
        cache.mkdir(parents=True)
        cache.chmod(0o500)
    for _ in range(2):
        assert sizes(indexed(root)) == THREE


def test_a_cache_that_could_not_be_finished_leaves_the_old_one(tmp_path, cache, monkeypatch):
    root = three_images(tmp_path / "tree")
    indexed(root)
    (kept,) = cache.iterdir()
    before = kept.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    tree(root, {"4.png": encoded(solid(size=(7, 5)), "PNG")})
    assert sizes(indexed(root)) == [*THREE, (7, 5)]
    assert list(cache.iterdir()) == [kept] and kept.read_bytes() == before


@pytest.mark.parametrize(
    "name", [b"two\nlines\r.png", b"\xff\xfe.png", b"\xff\xfe/\n/x.png", "é 素.png".encode()]
)
def test_odd_file_names_are_read_kept_and_named_on_one_line(tmp_path, read, name):
    root = three_images(tmp_path / "tree")
    path = os.fsencode(root) + b"/" + name
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(encoded(solid(size=(7, 5)), "PNG"))
    except OSError:
        pytest.skip("this file system wants UTF-8")
    paths = (
        [*listed(root)[:3], os.fsdecode(path)]
        if b"\n" not in name
        else [os.fsdecode(path), str(root / "1.png")]
    )
    at = paths.index(os.fsdecode(path))
    assert sizes(read_index(Below(paths, root)))[at] == (7, 5)
    read.clear()
    assert sizes(read_index(Below(paths, root)))[at] == (7, 5) and read == []
    with open(path, "wb"):
        pass  # now it is empty
    message = read_index(Below(paths, root)).bad[at]
    assert message == " ".join(
        f"{os.fsdecode(path)}: not an image that can be read: remove it".splitlines()
    )


# 1938, 1970, 2286: in ns, the last needs 64 bits unsigned
@pytest.mark.parametrize("seconds", [-(10**9), 0, 10**10])
def test_a_file_may_be_of_any_time(tmp_path, read, seconds):
    root = three_images(tmp_path / "tree")
    os.utime(root / "2.png", (seconds, seconds))
    for _ in range(2):
        assert sizes(indexed(root)) == THREE
    assert len(read) == 3


def test_progress_is_told_now_and_then_only_when_it_takes_long(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "CHUNK", 2)
    root, lines = tree(tmp_path / "tree", {f"{k:02}.png": solid() for k in range(40)}), []
    indexed(root, lines.append)
    assert lines == []
    shutil.rmtree(tmp_path / "cache")
    clock = iter(range(10**6))
    # a second a chunk
    monkeypatch.setattr(index, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    indexed(root, lines.append)
    steps = [15, 70]  # the third chunk is after 2 s; then every 10 s, of which telling takes one
    phases = ["looking for changed image files", "reading image headers"]
    assert lines == [f"{what}: {step} %" for what in phases for step in steps]


def test_the_parts_of_one_folder_are_kept_apart(tmp_path, read):
    root = three_images(tmp_path / "tree")
    paths = listed(root)
    for _ in range(2):
        assert sizes(read_index(Below(paths[:2], root), None, "train")) == THREE[:2]
        assert sizes(read_index(Below(paths[2:], root), None, "test")) == THREE[2:]
    assert sorted(read) == ["1.png", "2.png", "3.png"]
