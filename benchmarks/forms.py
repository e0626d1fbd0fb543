"""The photographs of bench_loader in other forms than class folders, and the loaders that other
libraries have for these: webdataset's for tars, datasets' for parquet."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from fastsmooth.data.layouts.common import IMAGENET_MEAN, IMAGENET_STD

SHARDS = 8  # tars of a split
ROWS = 100  # of a row group, as Hugging Face writes them
SHORT_SIDE = 256  # of the images that are prepared
# the names of our variants: --dataset, and the folder that `write` makes
OURS = {"tar": "webdataset", "parquet": "parquet", "arrow": "arrow", "prepared": "folder"}
PEERS = ("webdataset", "datasets")


def listed(root: Path, split: str) -> list[tuple[Path, int]]:
    """The files of a tree and their classes' numbers."""
    classes = sorted(path.name for path in (root / "train").iterdir())
    files = sorted((root / split).glob("*/*"))
    return [(path, classes.index(path.parent.name)) for path in files]


def available() -> bool:
    return all(find_spec(name) is not None for name in (*PEERS, "pyarrow"))


def write(root: Path, target: Path, copies: int) -> dict[str, int]:
    """The images of root/train, each `copies` times, and of root/val, as tars, parquet, arrow and
    prepared class folders, in folders of those names; the MB that each takes."""
    if (target / "written").exists():
        return sizes(target)
    for split, times in (("train", copies), ("val", 1)):
        images = listed(root, split) * times
        write_tars(images, target / "tar", split)
        write_tables(images, target, split)
    classes = max(label for _, label in listed(root, "train")) + 1
    (target / "arrow" / "dataset_dict.json").write_text('{"splits": ["train", "val"]}')
    (target / "tar" / "classes.txt").write_text("".join(f"class{k}\n" for k in range(classes)))
    prepare(target / "tar", target / "prepared")
    (target / "written").touch()
    return sizes(target)


def write_tars(images: list[tuple[Path, int]], folder: Path, split: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    count = -(-len(images) // SHARDS)
    for number, start in enumerate(range(0, len(images), count)):
        with tarfile.open(folder / f"{split}-{number:06}.tar", "w") as tar:
            for k, (path, label) in enumerate(images[start : start + count], start):
                for ending, data in (("jpg", path.read_bytes()), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{k:08}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def write_tables(images: list[tuple[Path, int]], target: Path, split: str) -> None:
    """As datasets.Dataset.to_parquet and save_to_disk do."""
    import datasets

    datasets.disable_progress_bars()
    kinds = [f"class{k}" for k in range(1 + max(label for _, label in images))]
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=kinds)}
    )
    rows = {
        "image": [{"bytes": path.read_bytes(), "path": None} for path, _ in images],
        "label": [label for _, label in images],
    }
    table = datasets.Dataset.from_dict(rows, features=features)
    (target / "parquet").mkdir(parents=True, exist_ok=True)
    table.to_parquet(target / "parquet" / f"{split}-00000-of-00001.parquet", batch_size=ROWS)
    table.save_to_disk(target / "arrow" / split)


def prepare(root: Path, target: Path) -> None:
    from fastsmooth.__main__ import main

    flags = ["--dataset", "webdataset", "--data-dir", str(root), "--out", str(target)]
    if main(["prepare", *flags, "--short-side", str(SHORT_SIDE), "--format", "jpeg"]):
        raise RuntimeError("fastsmooth prepare failed")


def augmented(image: Image.Image, steps: transforms.Compose) -> Tensor:
    return steps(image.convert("RGB"))


def training_steps(size: int) -> transforms.Compose:
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


class Peer:
    """Another library's loader in two worker processes. One call is a batch."""

    def __init__(self, name: str, folder: Path, size: int, workers: int):
        self.make = partial(PEER_LOADERS[name], folder, size, workers)
        self._batches: Iterator[Any] | None = None

    def __call__(self) -> tuple[Tensor, Tensor]:
        assert self._batches is not None
        x, y = next(self._batches)
        return x, torch.as_tensor(y)

    def resize(self, batch_size: int) -> None:
        self._batches = self.make(batch_size)

    def close(self) -> None:
        self._batches = None


def webdataset_batches(
    folder: Path, size: int, workers: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled in a buffer of 1,000 samples, as webdataset's own example of ImageNet does."""
    import webdataset

    steps = partial(augmented, steps=training_steps(size))
    shards = sorted(str(path) for path in (folder / "tar").glob("train-*.tar"))
    images = (
        webdataset.WebDataset(shards, shardshuffle=len(shards))
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(steps, int)
        .batched(batch_size)
        .repeat()
    )
    loader = webdataset.WebLoader(images, batch_size=None, num_workers=workers)
    for x, y in loader:
        yield torch.as_tensor(x), y


def datasets_batches(
    folder: Path, size: int, workers: int, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """A DataLoader over the parquet files, which datasets turns into arrow first."""
    import datasets
    from torch.utils.data import DataLoader

    steps = training_steps(size)

    def transformed(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return rows | {"image": [augmented(image, steps) for image in rows["image"]]}

    with patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}):
        table = datasets.load_dataset(
            "parquet",
            data_files={"train": str(folder / "parquet" / "train-*.parquet")},
            split="train",
            cache_dir=str(folder / "cache"),
        )
    table = table.cast_column("image", datasets.Image()).with_transform(transformed)
    options: dict[str, Any] = {"shuffle": True, "num_workers": workers, "persistent_workers": True}
    loader = DataLoader(table, batch_size, **options)
    while True:
        for batch in loader:
            yield batch["image"], batch["label"]


PEER_LOADERS = {"webdataset": webdataset_batches, "datasets": datasets_batches}


def sizes(folder: Path) -> dict[str, int]:
    return {
        name: round(sum(p.stat().st_size for p in (folder / name).rglob("*") if p.is_file()) / 1e6)
        for name in OURS
    }


def versions() -> dict[str, str]:
    return {name: version(name) for name in (*PEERS, "pyarrow")}
