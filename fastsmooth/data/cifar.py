"""CIFAR-10 and CIFAR-100 from their official python archives: downloaded, verified, and unpickled
without trust."""

from __future__ import annotations

import hashlib
import http.client
import pickle
import sys
import tarfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets

from fastsmooth.data.images import DataError, Split
from fastsmooth.messages import note_again
from fastsmooth.runfolder.files import rename, sync

# address, file names and MD5 sums
OFFICIAL = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
CHUNK = 1 << 20


def read(name: str, directory: Path) -> tuple[Split, Split, tuple[str, ...]]:
    """(train, test, class names) of `name` in `directory`, fetched if absent. Raises DataError."""
    official = OFFICIAL[name]
    root = provide(name, directory)
    train = [unpickle(root / file, md5) for file, md5 in official.train_list]
    test = [unpickle(root / file, md5) for file, md5 in official.test_list]
    meta = unpickle(root / official.meta["filename"], official.meta["md5"])
    return split(train, root), split(test, root), tuple(meta[official.meta["key"]])


def split(batches: list[dict], root: Path) -> Split:
    try:
        data = np.concatenate([batch["data"] for batch in batches])
        labels = np.concatenate(
            [batch["fine_labels" if "fine_labels" in batch else "labels"] for batch in batches]
        )
        pixels = data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        if pixels.dtype != np.uint8 or len(pixels) != len(labels):
            raise ValueError(f"{len(pixels)} images of {pixels.dtype}, {len(labels)} labels")
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"{root}: not the CIFAR layout ({error}): delete it and fetch it again"
        ) from None
    return Split(labels.astype(np.int64), np.ascontiguousarray(pixels))


def provide(name: str, directory: Path) -> Path:
    """The folder of the extracted archive; extracts a local archive, or downloads it first."""
    official = OFFICIAL[name]
    root = directory / official.base_folder
    if root.is_dir():
        return root
    archive = directory / official.filename
    if not archive.is_file():
        download(official.url, archive, official.tgz_md5)
    elif file_md5(archive) != official.tgz_md5:
        raise DataError(
            f"{archive}: its MD5 sum is not the official {official.tgz_md5}: delete it and fetch "
            "it again"
        )
    try:
        with tarfile.open(archive) as tar:
            # no links out, no devices, no "..", no absolute names
            tar.extractall(directory, filter="data")
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{archive}: cannot be extracted ({error}): delete it and fetch it again"
        ) from None
    if not root.is_dir():
        raise DataError(
            f"{archive} holds no folder {official.base_folder}: delete it and fetch it again"
        )
    return root


def download(url: str, target: Path, md5: str) -> None:
    """Fetch `url` into `target` with progress; a broken transfer goes on where it stopped; the sum
    is checked."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    for attempt in range(3):
        try:
            transfer(url, part)
            break
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == 416:
                break  # the part is complete already
            if attempt == 2:
                reason = getattr(error, "reason", None) or error
                raise DataError(
                    f"cannot download {target.name} ({reason}): try again, the part is kept, "
                    f"or put the file into {target.parent} yourself"
                ) from None
            time.sleep(attempt + 1)
    if file_md5(part) != md5:
        part.unlink()
        raise DataError(
            f"{target.name}: the download's MD5 sum is not the official {md5}: try again"
        )
    sync(part)
    rename(part, target)


def transfer(url: str, part: Path) -> None:
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    with urllib.request.urlopen(request, timeout=60) as response:
        if response.status != 206:
            done = 0  # the server sends the whole file again
        total = done + int(response.headers.get("Content-Length", 0))
        shown = -1
        with part.open("ab" if done else "wb") as file:
            while block := response.read(CHUNK):
                file.write(block)
                done += len(block)
                percent = 100 * done // total if total else 0
                if percent >= shown + (1 if sys.stderr.isatty() else 10):
                    shown = percent
                    note_again(f"{part.stem}: {done / 1e6:.0f} of {total / 1e6:.0f} MB")
        if total and done < total:
            raise OSError(f"connection closed after {done} of {total} bytes")


def file_md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


class Unpickler(pickle.Unpickler):
    """Reads arrays of plain numbers, all that CIFAR has; refuses the rest: it could run code."""

    ALLOWED = (
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        # NumPy 2 moved the module; the files name the old one
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def unpickle(path: Path, md5: str | None = None) -> dict:
    """The dict in a CIFAR file, its MD5 sum checked where it is known. Raises DataError."""
    try:
        if md5 is not None and file_md5(path) != md5:
            raise DataError(
                f"{path}: its MD5 sum is not the official {md5}: delete its folder and fetch it "
                "again"
            )
        with path.open("rb") as file:
            value = Unpickler(file, encoding="latin1").load()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}: delete its folder and fetch it again") from None
    except DataError:
        raise
    except Exception as error:  # a hostile pickle may raise anything
        raise DataError(
            f"{path}: not a CIFAR file ({error}): delete its folder and fetch it again"
        ) from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a CIFAR file: delete its folder and fetch it again")
    return value
