"""CIFAR's archives without trust: downloaded, verified and unpickled, or refused in one line that
names the file."""

import hashlib
import http.server
import os
import pickle
import struct
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from archives import tar_of
from images import one_line, opened, rng, tree
from torchvision import datasets
from torchvision import transforms as T

from fastsmooth.data import DataError, cifar


def python2_pickle(table: dict) -> bytes:
    """A dict as Python 2 and NumPy 1 pickled it when the official archives were made: protocol 2,
    byte strings."""

    def dump(value) -> bytes:
        if isinstance(value, str):
            return b"T" + struct.pack("<i", len(value)) + value.encode()
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, list):
            return b"](" + b"".join(map(dump, value)) + b"e"
        rows, columns = value.shape
        empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        dtype = (
            b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN"
            + dump(-1)
            + dump(-1)
            + b"K\x00tb"
        )
        raw = b"T" + struct.pack("<i", value.nbytes) + value.tobytes()
        return (
            empty + b"(K\x01" + dump(rows) + dump(columns) + b"\x86" + dtype + b"\x89" + raw + b"tb"
        )

    return b"\x80\x02}(" + b"".join(dump(key) + dump(value) for key, value in table.items()) + b"u."


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


class Miniature:
    """An archive of a few images in CIFAR's layout, and what torchvision would say of it."""

    def __init__(
        self,
        name: str,
        base: type,
        label_key: str,
        parts: list[str],
        damage: dict[str, bytes] | None = None,
    ):
        self.images = {
            part: rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8) for part in [*parts, "test"]
        }
        self.labels = {part: rng.integers(0, 10, 12).tolist() for part in self.images}
        files = {
            part: python2_pickle(
                {"data": self.planes(part), label_key: self.labels[part], "batch_label": part}
            )
            for part in self.images
        }
        files["meta"] = python2_pickle({base.meta["key"]: [f"class {k}" for k in range(10)]})
        files |= damage or {}
        self.files = {f"{base.base_folder}/{part}": content for part, content in files.items()}
        self.archive = tar_of(self.files)
        facts = {
            "train_list": [[part, md5(files[part])] for part in parts],
            "test_list": [["test", md5(files["test"])]],
            "meta": {"filename": "meta", "key": base.meta["key"], "md5": md5(files["meta"])},
            "tgz_md5": md5(self.archive),
        }
        self.name, self.parts, self.official = name, parts, type("Miniature", (base,), facts)

    def planes(self, part: str) -> np.ndarray:
        """Rows of 1024 red, 1024 green and 1024 blue values."""
        return np.stack(
            [
                np.concatenate([image[..., c].ravel() for c in range(3)])
                for image in self.images[part]
            ]
        )

    def extract(self, root: Path) -> Path:
        return tree(root, self.files)

    def read(self, root: Path):
        return opened(dataset=self.name, data_dir=str(root))

    def assert_read(self, data) -> None:
        for loader, parts in [(data.train, self.parts), (data.test, ["test"])]:
            ((x, y),) = loader.batches([torch.arange(len(loader))])
            images = np.concatenate([self.images[part] for part in parts])
            black, white = (
                loader.tables[torch.float32][:, value, None, None] for value in (0, 255)
            )
            x = (x - black) / (white - black)
            assert np.array_equal((x * 255).round().byte().permute(0, 2, 3, 1), images)
            assert y.tolist() == [label for part in parts for label in self.labels[part]]
        assert data.classes == 10

    def refusal(self, root: Path) -> str:
        with pytest.raises(DataError) as error:
            self.read(root)
        return one_line(error)


MINIATURES = {
    "cifar10": (datasets.CIFAR10, "labels", ["data_batch_1", "data_batch_2"]),
    "cifar100": (datasets.CIFAR100, "fine_labels", ["train"]),
}


@pytest.fixture
def miniature(monkeypatch):
    """Makes a Miniature and has it pass for the official archive."""

    def make(name: str = "cifar100", damage: dict[str, bytes] | None = None) -> Miniature:
        made = Miniature(name, *MINIATURES[name], damage)
        monkeypatch.setitem(cifar.OFFICIAL, name, made.official)
        return made

    return make


@pytest.mark.parametrize("name", MINIATURES)
def test_cifar_is_read_from_its_extracted_folder(tmp_path, miniature, name):
    made = miniature(name)
    made.extract(tmp_path)
    made.assert_read(made.read(tmp_path))


@pytest.mark.parametrize("name", MINIATURES)
def test_cifar_is_read_from_a_local_archive(tmp_path, miniature, name):
    made = miniature(name)
    (tmp_path / made.official.filename).write_bytes(made.archive)
    made.assert_read(made.read(tmp_path))
    (tmp_path / made.official.filename).unlink()
    made.assert_read(made.read(tmp_path))  # from what was extracted


@pytest.mark.parametrize("name", MINIATURES)
def test_cifar_is_read_as_torchvision_reads_it(tmp_path, miniature, name):
    made = miniature(name)
    made.extract(tmp_path)
    for train, split in zip((True, False), cifar.read(name, tmp_path)[:2], strict=True):
        theirs = made.official(tmp_path, train=train)
        assert np.array_equal(split.pixels, theirs.data) and split.labels.tolist() == theirs.targets


def test_the_official_sums_are_torchvisions():
    assert cifar.OFFICIAL == {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}


def test_cifar_sets_are_normalised_with_the_papers_constants(tmp_path, miniature):
    for name, mean, std in [
        ("cifar10", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        (
            "cifar100",
            (0.5070751592371323, 0.48654887331495095, 0.4409178433670343),
            (0.2673342858792401, 0.2564384629170883, 0.27615047132568404),
        ),
    ]:
        made = miniature(name)
        data = made.read(made.extract(tmp_path))
        first = made.images[made.parts[0]][0]
        ((x, _),) = data.train.batches([torch.tensor([0])])
        assert torch.equal(x[0], T.Normalize(mean, std)(T.ToTensor()(first)))


@pytest.mark.parametrize("file", ["train", "test", "meta"])
def test_a_cifar_file_that_was_changed_or_is_missing_is_named(tmp_path, miniature, file):
    made = miniature()
    path = made.extract(tmp_path) / made.official.base_folder / file
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    message = made.refusal(tmp_path)
    assert str(path) in message and "MD5" in message
    path.unlink()
    message = made.refusal(tmp_path)
    assert str(path) in message and "No such file" in message


def test_a_local_archive_that_was_changed_is_named_and_not_extracted(tmp_path, miniature):
    made = miniature()
    archive = tmp_path / made.official.filename
    archive.write_bytes(made.archive[:-1] + b"x")
    message = made.refusal(tmp_path)
    assert str(archive) in message and "MD5" in message
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]


@pytest.mark.parametrize(
    "table",
    [
        {"fine_labels": [0] * 12},
        {"data": np.zeros((12, 3072), np.uint8)},
        {"data": np.zeros((12, 3071), np.uint8), "fine_labels": [0] * 12},
        {"data": np.zeros((12, 3072), np.uint8), "fine_labels": [0] * 11},
        {"data": ["a"] * 12, "fine_labels": [0] * 12},
    ],
)
def test_a_file_of_another_layout_is_refused(tmp_path, miniature, table):
    made = miniature(damage={"train": python2_pickle(table)})
    assert "not the CIFAR layout" in made.refusal(made.extract(tmp_path))


@pytest.mark.parametrize(
    "content", [b"", b"no pickle", pickle.dumps([1, 2], 2), b"\x80\x02}(", b"\x80\x02."]
)
def test_a_file_that_is_no_pickled_dict_is_refused(tmp_path, miniature, content):
    made = miniature(damage={"train": content})
    message = made.refusal(made.extract(tmp_path))
    assert (
        str(tmp_path / made.official.base_folder / "train") in message
        and "not a CIFAR file" in message
    )


def test_a_dict_pickled_by_python3_and_a_later_numpy_is_read(tmp_path):
    table = {"data": rng.integers(0, 256, (2, 3072), dtype=np.uint8), "labels": [3, 1]}
    for protocol in (2, 4):
        (tmp_path / "file").write_bytes(pickle.dumps(table, protocol))
        read = cifar.unpickle(tmp_path / "file")
        assert read["labels"] == [3, 1] and np.array_equal(read["data"], table["data"])


class Call:
    """Pickled, a call that is made when it is loaded."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def attacks(marker: Path) -> dict[str, bytes]:
    system, evaluated = (
        Call(os.system, f"touch {marker}"),
        Call(eval, f"open({str(marker)!r}, 'w')"),
    )
    every = {f"system, protocol {k}": pickle.dumps(system, k) for k in range(6)}
    every |= {f"eval, protocol {k}": pickle.dumps(evaluated, k) for k in range(6)}
    return every | {
        "nested": pickle.dumps({"data": [1, {"deep": (2, [system])}], "fine_labels": [0]}, 2),
        "as a key": pickle.dumps({("k", evaluated): 1}, 2),
        "getattr": pickle.dumps(Call(getattr, os.system, "__call__"), 2),
        "numpy function": pickle.dumps(Call(np.save, str(marker), [1]), 2),
        "dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
        "import": f"cos\nsystem\n(S'touch {marker}'\ntR.".encode(),
        "old name": f'c__builtin__\neval\n(S\'open("{marker}", "w")\'\ntR.'.encode(),
        "instance": f"(S'touch {marker}'\nios\nsystem\n.".encode(),
    }


@pytest.mark.parametrize("attack", attacks(Path("marker")))
def test_a_pickle_that_would_run_code_is_refused(tmp_path, attack):
    path, marker = tmp_path / "file", tmp_path / "marker"
    path.write_bytes(attacks(marker)[attack])
    with pytest.raises(DataError) as error:
        cifar.unpickle(path)
    assert str(path) in one_line(error) and "it asks for " in one_line(error)
    assert not marker.exists() and not marker.with_suffix(".npy").exists()


def test_a_pickle_that_would_run_code_does_so_where_nothing_restricts_it(tmp_path):
    marker = tmp_path / "marker"
    for name, attack in attacks(marker).items():
        if name.startswith(("system", "eval", "nested", "old name", "instance", "import")):
            pickle.loads(attack)
            assert marker.exists(), name
            marker.unlink()


def test_an_archive_with_hostile_pickles_is_refused_even_under_the_right_sums(tmp_path, miniature):
    marker = tmp_path / "marker"
    made = miniature(damage={"train": attacks(marker)["nested"]})
    (tmp_path / made.official.filename).write_bytes(made.archive)
    assert "it asks for " in made.refusal(tmp_path)
    assert not marker.exists()


def member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def hostile_archives(outside: Path) -> dict[str, bytes]:
    base = datasets.CIFAR100.base_folder
    link = member(f"{base}/link", tarfile.SYMTYPE, str(outside))
    relative = member(f"{base}/link", tarfile.SYMTYPE, f"../../{outside.name}")
    through = member(f"{base}/link/x", tarfile.REGTYPE)
    return {
        "dots": tar_of({f"../{outside.name}/x": b"x"}),
        "dots inside": tar_of({f"{base}/../../{outside.name}/x": b"x"}),
        "absolute": tar_of({f"{outside}/x": b"x"}),
        "link": tar_of({}, link, through),
        "relative link": tar_of({}, relative, through),
        "hard link": tar_of(
            {},
            member(f"{base}/x", tarfile.LNKTYPE, f"../{outside.name}/kept"),
            member(f"{base}/x", tarfile.REGTYPE),
        ),
        "device": tar_of({}, member(f"{base}/train", tarfile.CHRTYPE)),
        "pipe": tar_of({}, member(f"{base}/train", tarfile.FIFOTYPE)),
    }


@pytest.mark.parametrize("kind", hostile_archives(Path("/x")))
def test_an_archive_cannot_write_outside_its_folder(tmp_path, miniature, kind):
    outside, data = tmp_path / "outside", tmp_path / "data"
    tree(tmp_path, {"outside/kept": b"kept", "data": None})
    archive = hostile_archives(outside)[kind]
    made = miniature()
    made.official.tgz_md5 = md5(archive)
    (data / made.official.filename).write_bytes(archive)
    made.refusal(data)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "outside"]
    assert [path.name for path in outside.iterdir()] == ["kept"] and (
        outside / "kept"
    ).read_bytes() == b"kept"
    assert not any(
        path.is_symlink() or path.is_char_device() or path.is_fifo() for path in data.rglob("*")
    )


class Server(http.server.ThreadingHTTPServer):
    """Serves one file to 127.0.0.1 and notes which ranges were asked for; `troubles` are met one a
    request."""

    daemon_threads = True

    def __init__(self, content: bytes, ranges: bool = True):
        super().__init__(("127.0.0.1", 0), Answer)
        self.content, self.ranges = content, ranges
        self.troubles: list[str] = []
        self.asked: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}/archive.tar.gz"


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        trouble = self.server.troubles.pop(0) if self.server.troubles else None
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.server.ranges else 0
        body = self.server.content[start:]
        if trouble == "404":
            return self.send_error(404, "Not Found")
        if trouble == "no HTTP":
            return self.wfile.write(b"220 mail.example ESMTP\r\n\r\n")
        if asked and self.server.ranges and not body:
            return self.send_error(416)
        self.send_response(206 if asked and self.server.ranges else 200)
        if trouble == "chunk cut":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            return self.wfile.write(b"%x\r\n" % len(body) + body[: len(body) // 2])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if trouble == "half" else body)

    def log_message(self, *args):
        pass


@pytest.fixture
def served(miniature, monkeypatch):
    """A Miniature and the server that its official address points to."""
    made = miniature()
    server = Server(made.archive)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    made.official.url = server.url
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setattr(cifar.time, "sleep", lambda seconds: None)
    yield made, server
    server.shutdown()
    server.server_close()
    thread.join()


def part_of(made: Miniature, root: Path) -> Path:
    return root / (made.official.filename + ".part")


def test_cifar_is_downloaded_where_it_is_missing(tmp_path, served, capsys):
    made, server = served
    root = tmp_path / "new" / "folder"
    made.assert_read(made.read(root))
    assert server.asked == [None] and (root / made.official.filename).read_bytes() == made.archive
    assert not part_of(made, root).exists()
    shown = capsys.readouterr()
    assert "MB" in shown.err and not shown.out
    made.assert_read(made.read(root))
    assert server.asked == [None]  # not again


def test_a_download_goes_on_from_the_part_that_is_there(tmp_path, served):
    made, server = served
    part_of(made, tmp_path).write_bytes(made.archive[:1000])
    made.assert_read(made.read(tmp_path))
    assert server.asked == ["bytes=1000-"]


@pytest.mark.parametrize("trouble", ["half", "chunk cut", "no HTTP"])
def test_a_connection_that_breaks_is_taken_up_again(tmp_path, served, trouble):
    made, server = served
    server.troubles = [trouble, trouble]
    made.assert_read(made.read(tmp_path))
    assert len(server.asked) == 3 and server.asked[0] is None
    if trouble == "half":
        half = len(made.archive) // 2
        assert server.asked[1:] == [
            f"bytes={half}-",
            f"bytes={half + (len(made.archive) - half) // 2}-",
        ]


def test_a_connection_that_always_breaks_is_one_line_and_its_part_is_kept(tmp_path, served):
    made, server = served
    server.troubles = ["half"] * 3
    message = made.refusal(tmp_path)
    assert made.official.filename in message and "connection closed" in message
    kept = part_of(made, tmp_path).read_bytes()
    assert kept == made.archive[: len(kept)] and len(kept) > len(made.archive) / 2
    made.assert_read(made.read(tmp_path))
    assert server.asked[-1] == f"bytes={len(kept)}-"


def test_a_server_without_ranges_sends_the_whole_file_again(tmp_path, served):
    made, server = served
    server.ranges = False
    part_of(made, tmp_path).write_bytes(b"the start of something else")
    made.assert_read(made.read(tmp_path))


def test_a_part_that_is_complete_already_is_used(tmp_path, served):
    made, server = served
    part_of(made, tmp_path).write_bytes(made.archive)
    made.assert_read(made.read(tmp_path))
    assert server.asked == [f"bytes={len(made.archive)}-"]


@pytest.mark.parametrize("start", [None, b"a part of another file"])
def test_a_download_with_the_wrong_sum_is_refused_and_removed(tmp_path, served, start):
    made, server = served
    if start:
        part_of(made, tmp_path).write_bytes(start)
    else:
        server.content = made.archive[:-1] + b"x"
    message = made.refusal(tmp_path)
    assert "MD5" in message and made.official.filename in message
    assert list(tmp_path.iterdir()) == []
    server.content = made.archive
    made.assert_read(made.read(tmp_path))


def test_a_file_that_the_server_lacks_is_one_line(tmp_path, served):
    made, server = served
    server.troubles = ["404"] * 10
    message = made.refusal(tmp_path)
    assert made.official.filename in message and "Not Found" in message and str(tmp_path) in message


def test_a_server_that_does_not_speak_http_is_one_line(tmp_path, served):
    made, server = served
    server.troubles = ["no HTTP"] * 10
    assert made.official.filename in made.refusal(tmp_path)


def test_a_server_that_is_not_there_is_one_line(tmp_path, served):
    made, _ = served
    made.official.url = "http://127.0.0.1:9/archive.tar.gz"  # the discard port: nobody listens
    message = made.refusal(tmp_path)
    assert made.official.filename in message and "refused" in message
