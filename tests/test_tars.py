"""What a tar holds, listed by headers alone: as Python's tarfile reads it, and one line for what
cannot be read by position."""

import bz2
import gzip
import io
import lzma
import os
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from images import one_line

from fastsmooth.data import tars
from fastsmooth.data.files import Archive
from fastsmooth.data.images import DataError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
every_form = pytest.mark.parametrize("form", FORMATS)
KINDS = {
    "a folder": tarfile.DIRTYPE,
    "a device": tarfile.CHRTYPE,
    "a block device": tarfile.BLKTYPE,
    "a pipe": tarfile.FIFOTYPE,
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The folder in which the listings of this test are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fastsmooth"


def member(name: str, **given) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in given.items():
        setattr(info, field, value)
    return info


def packed(files: list[tuple[tarfile.TarInfo | str, bytes]], form: str = "gnu") -> bytes:
    """A tar of the members, in this order, names with their contents."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[form]) as tar:
        for info, content in files:
            info = member(info) if isinstance(info, str) else info
            if info.isreg():
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def written(tmp_path: Path, data: bytes, name: str = "a.tar") -> str:
    (tmp_path / name).write_bytes(data)
    return str(tmp_path / name)


def held(path: str, listing: tars.Listing | None = None) -> list[tuple[str, bytes]]:
    """(name, content) of each file, read at the places that are listed."""
    listing = listing or tars.scan(Archive.at(path))
    data = Path(path).read_bytes()
    ranges = zip(listing.names, listing.start.tolist(), listing.length.tolist(), strict=True)
    return [(os.fsdecode(name), data[start : start + length]) for name, start, length in ranges]


def expected(path: str) -> list[tuple[str, bytes]]:
    with tarfile.open(path, encoding="utf-8") as tar:
        files = [info for info in tar if info.isfile() or info.islnk()]
        return [(info.name, tar.extractfile(info).read()) for info in files]


def refusal(path: str) -> str:
    with pytest.raises(DataError) as error:
        tars.listed([path])
    message = one_line(error)
    assert message.startswith(path), message
    return message


def usual_only(monkeypatch) -> None:
    """From now on nothing is left to tarfile."""
    monkeypatch.setattr(tars, "unusual", None)


# As tarfile reads it

CONTENTS = [b"", b"x", b"y" * 511, b"z" * 512, b"\0" * 513, os.urandom(5000)]


@every_form
def test_plain_files_are_listed_without_tarfile(tmp_path, monkeypatch, form):
    files = [(f"shard/{k}.png", content) for k, content in enumerate(CONTENTS)]
    path = written(tmp_path, packed(files, form))
    assert expected(path) == files
    usual_only(monkeypatch)
    assert held(path) == files


@every_form
@pytest.mark.parametrize(
    "name",
    [
        "n" * 100,
        "/".join(["folder" * 10] * 2 + ["n" * 99]),  # of ustar in its prefix
        "caf\xe9.png",
        "\u732b/\U0001f408.jpg",
        "two\nlines\x1b[31m.png",
        "../../x.jpg",
        "/etc/passwd",
        "./a b.png",
    ],
)
def test_names_are_those_of_tarfile(tmp_path, form, name):
    files = [("first", b"1"), (name, b"content"), ("last", b"2")]
    path = written(tmp_path, packed(files, form))
    assert held(path) == expected(path)
    assert [os.path.basename(n) for n, _ in held(path)] == [
        "first", os.path.basename(name), "last",
    ]  # fmt: skip
    assert not (tmp_path.parent / "x.jpg").exists()


@pytest.mark.parametrize("form", ["gnu", "pax"])
@pytest.mark.parametrize("name", ["l" * 101, "d/" * 200 + "\xe9" * 300, "e\udcff" * 90])
def test_long_names_and_those_that_are_no_utf_8(tmp_path, form, name):
    path = written(tmp_path, packed([(name, b"content"), ("last", b"2")], form))
    assert held(path) == expected(path) == [(name, b"content"), ("last", b"2")]


def test_headers_of_pax_with_times_sizes_and_comments(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"added")
    os.utime(file, ns=(1_600_000_000_123_456_789,) * 2)
    path = str(tmp_path / "a.tar")
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "all"}) as tar:
        tar.add(file, "added.png")  # a float time, which is a header of its own
        info = member("sized.png", size=7, pax_headers={"size": "7", "comment": "x" * 2000})
        tar.addfile(info, io.BytesIO(b"content"))
    assert held(path) == expected(path) == [("added.png", b"added"), ("sized.png", b"content")]


def test_a_size_in_base_256_is_read(tmp_path):
    data = bytearray(packed([("large.png", b"content"), ("next", b"1")]))
    data[124:136] = b"\x80" + (7).to_bytes(11, "big")
    path = written(tmp_path, resummed(data))
    assert held(path) == expected(path) == [("large.png", b"content"), ("next", b"1")]


def test_times_that_gnu_tar_writes_where_others_have_the_folder_are_no_name(tmp_path):
    data = bytearray(packed([("incremental.png", b"content")]))
    data[345:369] = b"14371234567\x0014371234567\0"
    path = written(tmp_path, resummed(data))
    assert held(path) == [("incremental.png", b"content")]  # tarfile takes them for the folder


def resummed(data: bytes, at: int = 0) -> bytes:
    """The tar with the right sum in the header at this byte."""
    header = bytearray(data[at : at + 512])
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(data[:at] + header + data[at + 512 :])


@every_form
def test_a_hard_link_has_the_bytes_of_what_it_links_to(tmp_path, form):
    link = member("link.png", type=tarfile.LNKTYPE, linkname="one.png")
    twice = member("twice.png", type=tarfile.LNKTYPE, linkname="link.png")
    again = member("again.png", type=tarfile.LNKTYPE, linkname="two.png")
    files = [("zero.png", b"0"), ("one.png", b"1" * 600), (link, b""), ("two.png", b"2")]
    path = written(tmp_path, packed([*files, (twice, b""), (again, b"")], form))
    assert held(path) == expected(path)
    assert held(path)[-2:] == [("twice.png", b"1" * 600), ("again.png", b"2")]


@every_form
@pytest.mark.parametrize("what", KINDS)
def test_what_is_no_file_is_passed_over(tmp_path, form, what):
    files = [("a", b"1"), (member("odd", type=KINDS[what]), b""), ("b", b"2")]
    path = written(tmp_path, packed(files, form))
    assert held(path) == [("a", b"1"), ("b", b"2")]


@pytest.mark.parametrize("ending", [0, 1, 512, 700, 1024, 10240])
def test_an_archive_may_end_without_the_blocks_of_its_end(tmp_path, ending):
    data = packed([("a", b"1"), ("b", b"2")]).rstrip(b"\0")
    data += bytes(-len(data) % 512 + ending)
    path = written(tmp_path, data)
    assert held(path) == [("a", b"1"), ("b", b"2")]


def test_an_archive_that_was_added_to(tmp_path):
    path = written(tmp_path, packed([("a", b"1")]))
    with tarfile.open(path, "a") as tar:
        tar.addfile(member("b", size=1), io.BytesIO(b"2"))
    assert held(path) == expected(path) == [("a", b"1"), ("b", b"2")]


def test_an_archive_of_no_members_holds_none(tmp_path):
    (listing,) = tars.listed([written(tmp_path, bytes(10240))])
    assert listing.names == [] and listing.start.shape == listing.length.shape == (0,)


def test_an_archive_inside_another_is_listed_by_the_places_in_the_outer_one(tmp_path):
    inner = packed([("a", b"1"), (member("l", type=tarfile.LNKTYPE, linkname="a"), b"")])
    path = written(tmp_path, packed([("first", b"x"), ("inner.tar", inner), ("last", b"y")]))
    listing = tars.scan_nested(Archive.at(path))
    inside = [("inner/a", b"1"), ("inner/l", b"1")]
    assert held(path, listing) == [("first", b"x"), *inside, ("last", b"y")]


def test_archives_of_all_kinds_are_listed_as_tarfile_lists_them(tmp_path):
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
    names = names.filter(lambda name: name.strip("/") == name)
    files = st.lists(st.tuples(names, st.binary(max_size=1500)), min_size=1, max_size=5)

    @hypothesis.settings(deadline=None, max_examples=25, database=None)
    @hypothesis.given(files, st.sampled_from(["gnu", "pax"]), st.integers(0, 3))
    def check(given, form, links):
        more = [
            (member(f"link {k}", type=tarfile.LNKTYPE, linkname=given[k % len(given)][0]), b"")
            for k in range(links)
        ]
        path = written(tmp_path, packed([*given, *more], form))
        assert held(path) == expected(path)

    check()


# What is refused


@pytest.mark.parametrize(
    ("packer", "pack"),
    [
        ("gzip", gzip.compress),
        ("bzip2", bz2.compress),
        ("xz", lzma.compress),
        ("zstd", lambda data: b"\x28\xb5\x2f\xfd" + data),
    ],
)
def test_a_packed_archive_is_named_with_its_packer(tmp_path, packer, pack):
    path = written(tmp_path, pack(packed([("a", b"1")])))
    assert refusal(path) == f"{path} is packed with {packer}: unpack it to a .tar, read by position"


WHOLE = packed([("first.png", b"1" * 700), ("d" * 150 + "/second.png", b"2" * 700)])


@pytest.mark.parametrize("size", [1, 100, 511, 513, 600, 1211, 1213, 1535, 1600, 2048, 2600, 3700])
def test_an_archive_that_is_cut_short_is_refused(tmp_path, size):
    """Inside a header, a content, its padding or a long name."""
    message = refusal(written(tmp_path, WHOLE[:size]))
    assert "cut short: it ends inside" in message or "not a tar archive that can be read" in message


def test_the_file_in_which_an_archive_ends_is_named(tmp_path):
    assert "it ends inside 'first.png': fetch it again" in refusal(written(tmp_path, WHOLE[:700]))
    assert "second.png': fetch it again" in refusal(written(tmp_path, WHOLE[:3600]))


def test_flipped_bits_of_a_header_are_found(tmp_path):
    rng = random.Random(3)
    data = packed([("first.png", b"1" * 700), ("second.png", b"2")])
    for at in [*rng.sample(range(500), 40), 124, 148, 156, 257]:
        for header in (0, 1536):
            damaged = bytearray(data)
            damaged[header + at] ^= 1 << rng.randrange(7)
            # what tarfile passes over or cannot read is refused, and what it reads is the same
            path = written(tmp_path, bytes(damaged))
            try:
                found = held(path)
            except DataError as error:
                assert str(error).startswith(path)
            else:
                assert found == expected(path)
                assert found == held(written(tmp_path, data)) or at in (*range(148, 156), 154, 155)


@pytest.mark.parametrize(
    ("infos", "words"),
    [
        ([member("l", type=tarfile.SYMTYPE, linkname="a")], "'l' is a link: pack the file itself"),
        (
            [member("l", type=tarfile.LNKTYPE, linkname="later"), "later"],
            "'l' is a link to 'later', which it does not hold: pack it anew",
        ),
        (
            [member("s", pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"})],
            "'s' is stored in pieces: pack the file itself",
        ),
        ([member("n", pax_headers={"size": "-512"})], "'n' has -512 bytes"),
        ([member("n", pax_headers={"path": "a\0b"})], "a file has the name 'a\\x00b'"),
        ([member("n", pax_headers={"comment": "x" * (1 << 21)})], "not a tar archive that can be"),
        ([member("n", pax_headers={"size": "9" * 30})], "cut short: it ends inside 'n'"),
        ([member("d", type=b"Z", pax_headers={"size": "9" * 30})], "ends inside 'what is no file'"),
    ],
)
def test_what_cannot_be_read_by_position_is_refused_by_its_name(tmp_path, infos, words):
    path = written(tmp_path, packed([("a", b"1"), *((info, b"") for info in infos)], "pax"))
    assert words in refusal(path)


def test_a_negative_size_of_gnu_is_refused_and_never_walked_back(tmp_path):
    for kind in (b"0", b"Z"):
        data = bytearray(packed([("a", b"1"), ("b", b"2")]))
        data[1024 + 124 : 1024 + 136] = b"\xff" * 10 + (0x10000 - 1024).to_bytes(2, "big")
        data[1024 + 156 : 1024 + 157] = kind
        assert "'b' has -1024 bytes" in refusal(written(tmp_path, resummed(data, 1024)))


def test_two_archives_in_one_file_and_one_not_fetched_to_its_end_are_refused(tmp_path):
    one = packed([("a", b"1")])
    path = written(tmp_path, one + one)
    assert f"{path}: it goes on behind its end, at byte 1,024" in refusal(path)
    path = written(tmp_path, one + bytes(2 << 20))
    assert "it goes on behind its end, at byte 1,024" in refusal(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a tar archive, it is empty"),
        (b"<html>404 not found</html>" * 50, "not a tar archive that can be read"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (os.urandom(4096), "not a tar archive that can be read"),
    ],
)
def test_what_is_no_archive_is_refused(tmp_path, content, words):
    assert words in refusal(written(tmp_path, content))


def test_a_folder_and_a_pipe_are_no_archives(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "folder.tar").mkdir()
    for name in ("pipe.tar", "folder.tar", "none.tar"):
        with pytest.raises(OSError) as error:
            tars.listed([str(tmp_path / name)])
        assert name in str(error.value)


# The cache


@pytest.fixture
def scanned(monkeypatch) -> list[str]:
    """The name of every archive that is read from now on."""
    names, members = [], tars.members

    def spy(archive, *given):
        names.append(os.path.basename(archive.path))
        return members(archive, *given)

    monkeypatch.setattr(tars, "members", spy)
    return names


def same(one: list[tars.Listing], other: list[tars.Listing]) -> bool:
    fields = [(v.archive, v.joined, v.start.tolist(), v.length.tolist(), v.notes) for v in one]
    return fields == [
        (v.archive, v.joined, v.start.tolist(), v.length.tolist(), v.notes) for v in other
    ]


def three(tmp_path: Path) -> list[str]:
    return [
        written(tmp_path, packed([(f"{n}{k}", b"x" * 600) for k in range(n)]) or b"", f"{n}.tar")
        for n in (0, 1, 2)
    ]


def test_archives_are_read_once(tmp_path, cache, scanned):
    paths = three(tmp_path)
    first = tars.listed(paths)
    assert sorted(scanned) == ["0.tar", "1.tar", "2.tar"]
    assert [listing.names for listing in first] == [[], [b"10"], [b"20", b"21"]]
    scanned.clear()
    opened = os.listdir("/proc/self/fd")
    assert same(tars.listed(paths), first) and same(tars.listed(paths[1:]), first[1:])
    assert same(tars.listed([os.path.relpath(path) for path in paths[:1]])[:0], [])
    assert not scanned and os.listdir("/proc/self/fd") == opened
    assert [path.suffix for path in cache.iterdir()] == [".npz"]
    assert tars.listed([]) == []


@pytest.mark.parametrize("change", ["content", "time", "new"])
def test_an_archive_that_changed_is_read_again_alone(tmp_path, scanned, change):
    paths = three(tmp_path)
    before = tars.listed(paths)
    scanned.clear()
    if change == "content":
        written(tmp_path, packed([("other", b"x")]), "1.tar")
    elif change == "time":
        os.utime(paths[1], ns=(5, 5))
    else:
        os.rename(paths[1], tmp_path / "9.tar")
        paths[1] = str(tmp_path / "9.tar")
    after = tars.listed(paths)
    assert scanned == [os.path.basename(paths[1])]
    assert after[1].names == ([b"other"] if change == "content" else [b"10"])
    assert same(after[::2], before[::2])
    assert same(tars.listed(paths), after) and len(scanned) == 1


def test_archives_that_are_gone_leave_the_cache_and_others_stay(tmp_path, cache, scanned):
    paths = three(tmp_path)
    tars.listed(paths)
    os.remove(paths[0])
    os.utime(paths[1], ns=(5, 5))
    tars.listed(paths[1:2])
    kept = tars.load("members", str(tmp_path))
    assert sorted(kept) == ["1.tar", "2.tar"] and scanned[3:] == ["1.tar"]


def test_what_others_make_of_archives_is_kept_apart_with_its_notes(tmp_path):
    paths = three(tmp_path)

    def first_alone(archive):
        found = tars.scan(archive)
        joined = b"".join(b"\0" + name for name in found.names[:1])
        note = b"".join(b"\0%d" % len(found.names) for _ in found.names[:1])
        return tars.Listing(archive, joined, found.start[:1], found.length[:1], note)

    every, first = tars.listed(paths), tars.listed(paths, None, "first", first_alone)
    again = tars.listed(paths, None, "first", pytest.fail)
    assert same(again, first) and same(tars.listed(paths), every)
    assert [listing.notes for listing in again] == [b"", b"\x001", b"\x002"]


def test_an_archive_that_changes_while_it_is_listed_is_not_read(tmp_path, monkeypatch):
    path = written(tmp_path, packed([("a", b"1")]))
    archive = Archive.at(path)
    os.utime(path, ns=(5, 5))
    with pytest.raises(OSError, match="changed since"):
        tars.scan(archive)


def tampered(cache: Path, **arrays) -> None:
    (file,) = cache.iterdir()
    with np.load(file) as kept:
        fields = dict(kept)
    np.savez(file, **(fields | {name: f(fields[name]) for name, f in arrays.items()}))


DAMAGES = {
    "an old version": lambda cache: tampered(cache, version=lambda v: v - 1),
    "ranges beyond": lambda cache: tampered(cache, length=lambda v: v + 10**9),
    "negative starts": lambda cache: tampered(cache, start=lambda v: v - 10**6),
    "ranges that overflow": lambda cache: tampered(cache, length=lambda v: v | (2**63 - 1)),
    "fewer names": lambda cache: tampered(cache, names=lambda v: v[3:]),
    "other counts": lambda cache: tampered(cache, counts=lambda v: v[::-1] * 2),
    "negative counts": lambda cache: tampered(cache, counts=lambda v: v - 1),
    "floats": lambda cache: tampered(cache, start=lambda v: v.astype(float)),
    "objects": lambda cache: tampered(cache, names=lambda v: v.astype(object)),
    "nothing": lambda cache: next(cache.iterdir()).write_bytes(b""),
    "half": lambda cache: next(cache.iterdir()).write_bytes(
        next(cache.iterdir()).read_bytes()[:700]
    ),
    "another's": lambda cache: next(cache.iterdir()).chmod(0o666),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_cache_that_does_not_fit_is_made_again(tmp_path, cache, scanned, damage):
    paths = three(tmp_path)
    first = tars.listed(paths)
    DAMAGES[damage](cache)
    assert same(tars.listed(paths), first) and len(scanned) == 6
    if damage != "another's" or os.geteuid():
        assert same(tars.listed(paths), first) and len(scanned) == 6


def test_a_cache_that_cannot_be_written_costs_nothing_but_the_cache(tmp_path, cache, scanned):
    cache.parent.write_bytes(b"no folder")
    paths = three(tmp_path)
    assert same(tars.listed(paths), tars.listed(paths)) and len(scanned) == 6
