"""The stream and its engines: every sample once whatever the batches, and PIL's pixels whoever
decodes them."""

import gc
import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from archives import extracted
from images import CPU, HAS_DALI, LOADERS, encoded, every_batch, one_line, opened, tree
from PIL import Image
from rows import read_rows

from fastsmooth.cli.config import resolve
from fastsmooth.data import (
    ENGINES,
    DataError,
    EngineParts,
    Stream,
    augment,
    images,
    open_data,
    sets,
)
from fastsmooth.data.chunks import ChunkedLoader, Engine, Job, Segment, jobs, normalisation
from fastsmooth.data.engines.resident import ResidentLoader
from fastsmooth.data.index import NO_FILES
from fastsmooth.data.layouts import common
from fastsmooth.data.order import permutation
from fastsmooth.data.source import BadImages, Source
from fastsmooth.train import main

MEAN, STD = common.IMAGENET_MEAN, common.IMAGENET_STD
# mean difference from PIL's pixels of a set of photographs, of 255
TOLERANCE = {"torch": 0, "threads": 0.05, "dali": 0.3}
DECODERS = [name for name in TOLERANCE if name != "dali" or HAS_DALI]

every_loader = pytest.mark.parametrize(("loader", "workers"), LOADERS)
every_decoder = pytest.mark.parametrize("decoder", DECODERS)
fast_decoders = pytest.mark.parametrize("decoder", DECODERS[1:])


def stream_of(data, seed: int = 0, epochs: int = 3, **more) -> Stream:
    return Stream(data.train, seed, epochs, data.fingerprint, **more)


def chunk(loader: str, size: int) -> dict:
    return {} if loader == "resident" else {"chunk": size}


def pixels_of(x: torch.Tensor) -> torch.Tensor:
    """float64 [B, 3, size, size] between 0 and 255."""
    mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (MEAN, STD))
    return (x.double() * std + mean) * 255


def our_threads() -> list[str]:
    gc.collect()
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fastsmooth")]


def gone(names: tuple[str, ...] = ("fastsmooth data",)) -> bool:
    """Whether threads of these names end, within a second or so."""
    deadline = time.monotonic() + 5
    while any(name.startswith(names) for name in our_threads()):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


# The stream


@pytest.fixture(scope="module")
def digits_by_epoch() -> list[torch.Tensor]:
    """The images of three epochs with crop and flip, by sample."""
    train = opened(augment="crop-flip", seed=4).train
    return [next(train.batches([torch.arange(len(train))], epoch))[0] for epoch in range(3)]


@pytest.mark.parametrize(
    ("loader", "workers", "size"),
    [
        (*given, size)
        for given in LOADERS
        if given != ("torch", 2)
        for size in ((0,) if given[0] == "resident" else (7, 64, 2048))
    ],
)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_batches_on_any_ranks_are_the_permutation(
    digits_by_epoch, loader, workers, size, world
):
    rng = random.Random(f"{loader} {size} {world}")
    data = opened(loader, workers, augment="crop-flip", seed=4, **chunk(loader, size))
    n, drop_last = len(data.train), world % 2 == 0
    labels = torch.from_numpy(sets.digits(None).train.labels)
    ranks = [stream_of(data, 4, drop_last=drop_last, rank=r, world=world) for r in range(world)]
    for epoch in range(3):
        order, seen, cursor = permutation(4, epoch, n), [], 0
        batch_size = rng.choice([1, 5, 64, 400, n, 2 * n])
        for stream in ranks:
            stream.batch_size = batch_size
        for batches in zip(*(stream.rest_of_epoch() for stream in ranks), strict=True):
            end = min(cursor + batch_size, n)
            for r, (x, y) in enumerate(batches):
                places = torch.arange(cursor, end)
                index = order[places[places % world == r]]
                assert torch.equal(x, digits_by_epoch[epoch][index]) and torch.equal(
                    y, labels[index]
                )
                seen += index.tolist()
            cursor, batch_size = end, rng.randint(20, 400)
            for stream in ranks:  # in force at the very next batch
                assert (stream.epoch, stream.cursor) == (epoch, end)
                stream.batch_size = batch_size
        if not drop_last:
            assert cursor == n
        assert (
            cursor <= n
            and n - cursor < batch_size
            and sorted(seen) == sorted(order[:cursor].tolist())
        )
    assert all((stream.epoch, stream.cursor) == (3, 0) for stream in ranks)
    for stream in ranks:
        stream.close()


@every_loader
def test_a_stream_goes_on_with_another_chunk_and_another_number_of_ranks(loader, workers):
    rng = random.Random(loader)
    data = opened(loader, workers, augment="crop-flip-rotate", seed=2**40 + 1, **chunk(loader, 64))
    n, seed = len(data.train), 2**40 + 1
    expected = [
        torch.cat([x for x, _ in every_batch(data.train, 100, seed, epoch)]) for epoch in range(3)
    ]
    for other_size, world in [(7, 1), (100, 3), (2048, 2)]:
        first = stream_of(data, seed)
        first.batch_size = rng.randint(20, 200)
        for _ in first.rest_of_epoch():
            pass
        stop = rng.randint(0, 5)
        for done, _ in enumerate(first.rest_of_epoch()):
            if done == stop:
                break
        state = first.state_dict()
        first.close()
        assert {name: type(value) for name, value in state.items()} == {
            "seed": int, "epoch": int, "cursor": int, "fingerprint": str, "first_epoch": int,
        }  # fmt: skip
        assert state["epoch"] == 1 and 0 < state["cursor"] < n
        state = json.loads(json.dumps(state))
        other = opened(
            loader, workers, augment="crop-flip-rotate", seed=seed, **chunk(loader, other_size)
        )
        ranks = [stream_of(other, seed, rank=r, world=world) for r in range(world)]
        for r, stream in enumerate(ranks):
            stream.load_state_dict(state)
            for epoch, start in [(1, state["cursor"]), (2, 0)]:
                stream.batch_size = rng.randint(20, 200)
                found = torch.cat([x for x, _ in stream.rest_of_epoch()])
                assert torch.equal(
                    found, expected[epoch][[i for i in range(start, n) if i % world == r]]
                )
            stream.close()


def test_the_state_of_other_images_or_of_another_seed_is_refused():
    stream = stream_of(opened(), seed=1)
    state = stream.state_dict() | {"cursor": 40}
    for foreign, words in [({"fingerprint": "0" * 64}, "images"), ({"seed": 2}, "--seed 2, not 1")]:
        with pytest.raises(DataError, match=words) as error:
            stream.load_state_dict(state | foreign)
        one_line(error)
        assert stream.cursor == 0
    stream.load_state_dict(state)
    assert stream.cursor == 40


# Pixels


@pytest.fixture(scope="module")
def real_pixels(tmp_path_factory) -> np.ndarray:
    """4,096 images of CIFAR-100."""
    root = extracted(
        "cifar100-12k",
        tmp_path_factory,
        lambda m: Path(m.name).parts[1:2] == ("train",) and m.name < "cifar100-12k/train/m",
    )
    paths = sorted(root.glob("train/*/*"))[:4096]
    assert len(paths) == 4096
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])


@pytest.mark.parametrize("kind", ["crop-flip", "crop-flip-rotate"])
def test_images_in_memory_get_pils_pixels(real_pixels, kind):
    split, index = images.Split(np.zeros(4096, np.int64), real_pixels), torch.arange(4096)
    rows = augment.draw(kind, 32, 9, 4, index).tolist()
    made = [
        augment.crop_flip_rotate(Image.fromarray(a), row, 32)
        for a, row in zip(real_pixels, rows, strict=True)
    ]
    expected = torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2)
    value, zero = torch.arange(256) / 255, (0.0, 0.0, 0.0)
    for name in ("resident", "threads", *(["dali"] if HAS_DALI else [])):
        if name == "resident":
            loader = ResidentLoader(split, kind, 9, zero, (1.0, 1.0, 1.0), CPU)
        else:
            source = Source(split, NO_FILES, kind, 32, 9, BadImages("raise", print))
            engine = ENGINES[name](EngineParts(source, 300, 2, CPU, resolve({})))
            loader = ChunkedLoader(engine, split.labels, 32, 300, zero, (1.0, 1.0, 1.0), CPU)
        ((x, _),) = loader.batches([index], 4)
        others = (x != value[expected.long()]).any(1).double().mean().item()
        assert others <= (0.0005 if (name, kind) == ("dali", "crop-flip-rotate") else 0), name


@pytest.fixture(scope="module")
def photographs(imagenet_folder) -> dict[str, tuple[torch.Tensor, list[int]]]:
    """The views by PIL and which of them are grey: uint8 [128, 3, 224, 224], as they are tested and
    of epoch 1."""
    drawn = augment.draw("resized-crop-flip", 224, 3, 1, torch.arange(128))
    found = {}
    for split, directory in [("test", "val"), ("train", "train")]:
        paths = sorted(imagenet_folder.glob(f"{directory}/*/*"))
        grey = [i for i, path in enumerate(paths) if Image.open(path).mode == "L"]
        images = [Image.open(path).convert("RGB") for path in paths]
        if split == "train":
            width, height = torch.tensor([image.size for image in images]).T
            boxes = augment.crop_boxes(width, height, drawn[:, 1:]).tolist()
            given = zip(images, boxes, drawn[:, 0].tolist(), strict=True)
            images = [augment.resized_crop_flip(*one, 224) for one in given]
        else:
            images = [augment.evaluation_view(image, "resized-crop-flip", 224) for image in images]
        found[split] = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), grey
    return found


@every_decoder
def test_photographs_are_decoded_as_by_pil(imagenet_folder, photographs, decoder):
    data = opened(decoder, 2, dataset="imagenet", data_dir=str(imagenet_folder), seed=3, chunk=50)
    for split, epoch in [("test", None), ("train", 1)]:
        expected, grey = photographs[split]
        parts = list(getattr(data, split).batches(torch.arange(128).split(32), epoch))
        found, labels = (torch.cat(part) for part in zip(*parts, strict=True))
        assert torch.equal(labels, torch.arange(128))
        difference = (pixels_of(found) - expected).abs().mean((1, 2, 3))
        if decoder == "torch":
            assert difference.max() < 1e-4
        assert difference.mean() <= TOLERANCE[decoder] + 1e-4, (split, difference.mean())
        assert split == "train" or len(grey) == 3
        for i in grey:
            assert difference[i] <= (0.3 if TOLERANCE[decoder] else 1e-4)
            # three equal channels
            assert (pixels_of(found[i]) - pixels_of(found[i])[0]).abs().max() < 1e-4


@fast_decoders
def test_a_photograph_has_the_same_bits_in_any_chunk_and_batch(imagenet_folder, decoder):
    given = {"dataset": "imagenet", "data_dir": str(imagenet_folder), "seed": 3, "image_size": 64}
    index = permutation(0, 0, 128)[:50]
    found = []
    for size, batch_size, threads in [(50, 50, 2), (7, 5, 1), (64, 13, 2)]:
        train = opened(decoder, threads, **given, chunk=size).train
        found.append(torch.cat([x for x, _ in train.batches(index.split(batch_size), 2)]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


# Files that are not photographs


def picture(width: int = 160, height: int = 120) -> Image.Image:
    """Smooth colours and some grain."""
    rng = np.random.default_rng(width)
    y, x = np.mgrid[:height, :width] / 40
    waves = np.stack([np.sin(x + y), np.cos(x - y), np.sin(2 * x) * np.cos(y)], axis=-1)
    return Image.fromarray(
        (127 + 90 * waves + rng.normal(0, 8, (height, width, 3))).clip(0, 255).astype(np.uint8)
    )


def oriented() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(), "JPEG", quality=90, exif=exif)


def odd_files() -> dict[str, bytes]:
    grey = picture().convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    alpha = picture().copy()
    alpha.putalpha(grey)
    return {
        "a-baseline": encoded(picture(), "JPEG", quality=90),
        "b-progressive": encoded(picture(), "JPEG", quality=90, progressive=True),
        "c-cmyk": encoded(picture().convert("CMYK"), "JPEG", quality=90),
        "d-grey": encoded(grey, "JPEG", quality=90),
        "e-png": encoded(picture(), "PNG"),
        "f-grey-png": encoded(grey, "PNG"),
        "g-rgba-png": encoded(alpha, "PNG"),
        "h-palette-png": encoded(picture().convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        "i-16-bit-png": encoded(deep, "PNG"),
        "j-gif": encoded(picture(), "GIF"),
        "k-exif-6": oriented(),
        "l-1x1": encoded(picture(1, 1), "JPEG"),
        "m-1x2000": encoded(picture(1, 2000), "JPEG"),
        "n-2000x1": encoded(picture(2000, 1), "JPEG"),
        "o-1x2000-png": encoded(picture(1, 2000), "PNG"),
        "p-subsampled": encoded(picture(161, 121), "JPEG", quality=90, subsampling=2),
        "q-bmp": encoded(picture(), "BMP"),
    }


PLAIN = {name for name in odd_files() if name[0] not in "ghijq"}


@every_decoder
@pytest.mark.parametrize("kind", ["resized-crop-flip", "crop-flip"])
def test_a_file_of_any_kind_is_read_as_pil_reads_it(tmp_path, decoder, kind, monkeypatch):
    files = odd_files()
    tree(
        tmp_path,
        {
            f"{split}/{c}/{name}.JPEG": data
            for split in ("train", "val")
            for c in "ab"
            for name, data in files.items()
        },
    )
    data = opened(
        decoder,
        2,
        dataset="folder",
        data_dir=str(tmp_path),
        augment=kind,
        image_size=48,
        seed=1,
        chunk=9,
    )
    paths = sorted((tmp_path / "train").glob("*/*"))
    drawn = augment.draw(kind, 48, 1, 2, torch.arange(len(paths)))
    assert len(paths) == 2 * len(files)
    slowly, by_pil = [], Source.by_pil
    monkeypatch.setattr(
        Source, "by_pil", lambda source, i, view: slowly.append(i) or by_pil(source, i, view)
    )
    for split, epoch in [("test", None), ("train", 2)]:
        ((x, _),) = getattr(data, split).batches([torch.arange(len(paths))], epoch)
        for path, found, row in zip(paths, pixels_of(x), drawn, strict=True):
            image = Image.open(path).convert("RGB")
            if epoch is None:
                image = augment.evaluation_view(image, kind, 48)
            elif kind == "crop-flip":
                image = augment.crop_flip_rotate(
                    augment.evaluation_view(image, kind, 48), row.tolist(), 48
                )
            else:
                (box,) = augment.crop_boxes(*torch.tensor([image.size]).T, row[None, 1:]).tolist()
                image = augment.resized_crop_flip(image, box, row[0].item(), 48)
            difference = (
                (found - torch.from_numpy(np.array(image)).permute(2, 0, 1)).abs().mean().item()
            )
            allowed = TOLERANCE[decoder] if path.stem in PLAIN else 0
            assert difference <= allowed + 1e-4, (path.stem, split, difference)
    # the fast decoders themselves have read what is plain, and nothing else
    fast = {name for name in PLAIN if decoder == "dali" or not name.endswith("png")}
    assert decoder == "torch" or {paths[i].stem for i in slowly} == files.keys() - fast


def bad_files() -> dict[str, bytes]:
    jpeg, progressive = (
        encoded(picture(), "JPEG", quality=90),
        encoded(picture(), "JPEG", progressive=True),
    )
    png = encoded(picture(), "PNG")
    cut = {
        f"{name}-{share}": data[: len(data) * share // 100]
        for name, data in [("jpeg", jpeg), ("progressive", progressive), ("png", png)]
        for share in (90, 50, 10)
    }
    return cut | {"empty": b"", "text": b"<html>404 not found</html>\n" * 20}


def opened_saying(root: Path, decoder: str, **given):
    said, workers = [], 0 if decoder == "torch" else 2
    settings = {"dataset": "folder", "data_dir": str(root), "loader": decoder, "workers": workers}
    settings |= {"image_size": 48, "chunk": 5}
    return open_data(resolve(settings | given), CPU, said.append), said


def good_files() -> dict[str, bytes]:
    names = [
        f"{split}/{c}/{k}.JPEG"
        for split in ("train", "val")
        for c in ("cat", "dog")
        for k in range(4)
    ]
    return {
        name: encoded(picture(150 + k, 120), "JPEG", quality=90) for k, name in enumerate(names)
    }


@every_decoder
@pytest.mark.parametrize("name", bad_files())
def test_a_damaged_file_is_refused_by_its_name(tmp_path, decoder, name):
    tree(tmp_path, good_files() | {f"train/cat/2-{name}.JPEG": bad_files()[name]})
    with pytest.raises(DataError) as error:
        data, _ = opened_saying(tmp_path, decoder, augment="resized-crop-flip")
        every_batch(data.train, 3, epoch=0)
    message = one_line(error)
    assert message.startswith(f"{tmp_path / 'train' / 'cat' / f'2-{name}.JPEG'}: ")
    assert message.endswith("; or serve it black with --on-bad-image zeros")
    assert gone()


@every_decoder
def test_damaged_files_may_be_black_and_their_neighbours_keep_their_pixels(tmp_path, decoder):
    given = {"augment": "resized-crop-flip"}
    tree(tmp_path, good_files())
    data, said = opened_saying(tmp_path, decoder, on_bad_image="zeros", **given)
    index = torch.arange(len(data.test))
    ((expected, _),) = data.test.batches([index])
    assert not said and not data.bad.reasons and index.numel() == 8
    # beside each good file some bad ones, so that no chunk of five is without
    bad = {
        f"val/{'cat' if k < 6 else 'dog'}/{k % 4}-{name}.JPEG": content
        for k, (name, content) in enumerate(bad_files().items())
    }
    tree(tmp_path, bad)
    data, said = opened_saying(tmp_path, decoder, on_bad_image="zeros", **given)
    paths = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("val/*/*"))
    black = torch.tensor([path in bad for path in paths])
    assert len(paths) == len(data.test) == 8 + len(bad)
    for batch_size in (30, 1, 4):
        x = torch.cat([x for x, _ in data.test.batches(torch.arange(len(paths)).split(batch_size))])
        assert torch.equal(x[~black], expected)
        zero = normalisation(MEAN, STD, CPU)[:, 0, None, None]
        assert (x[black] == zero).all()
    assert sorted(data.bad.reasons) == sorted(str(tmp_path / path) for path in bad)
    assert len(said) == len(bad)  # each once
    assert all(len(line.splitlines()) == 1 and "it is served black" in line for line in said)


# Threads and memory


@pytest.mark.parametrize("loader", [name for name in ("threads", "dali") if name in DECODERS])
def test_threads_end_with_what_they_work_for(tmp_path, loader):
    assert gone(("fastsmooth",))
    data = opened(loader, 2, augment="crop-flip", chunk=16)
    stream = stream_of(data)
    stream.batch_size = 10
    expected = every_batch(data.train, 10, epoch=0)
    assert gone()
    batches = stream.rest_of_epoch()
    assert torch.equal(next(batches)[0], expected[0][0])
    assert "fastsmooth data" in our_threads()
    stream.close()
    assert gone()
    assert torch.equal(next(batches)[0], expected[1][0])  # it goes on from where it is
    assert our_threads().count("fastsmooth data") == 1
    stream.close()
    stream.close()
    assert gone()
    abandoned = data.train.batches(torch.arange(1000).split(10), 0)
    next(abandoned)
    assert "fastsmooth data" in our_threads()
    del abandoned
    assert gone()
    tree(tmp_path, good_files() | {"train/dog/9.JPEG": bad_files()["jpeg-90"]})
    files, _ = opened_saying(tmp_path, loader, augment="crop-flip")
    stream = stream_of(files, epochs=1)
    stream.batch_size = 2
    with pytest.raises(DataError, match=r"9\.JPEG"):
        for _ in stream.rest_of_epoch():
            pass
    assert gone()
    # not an end of the data, also for whoever asks again
    with pytest.raises(DataError, match=r"9\.JPEG"):
        list(stream.rest_of_epoch())
    stream.close()
    del data, files, stream, batches
    assert gone(("fastsmooth",))


class Watched:
    """An engine whose chunks are watched."""

    def __init__(self, engine: Engine):
        self.engine, self.ahead = engine, engine.ahead
        self.places: list[int] = []  # of the chunks' memory
        self.held: dict[int, int] = {}

    def chunks(self, jobs: Iterator[Job]):
        for made in self.engine.chunks(jobs):
            place = made.pixels.data_ptr()
            assert place not in self.held  # no two chunks in the same memory
            self.held[place] = len(made.pixels)
            self.places.append(place)
            yield made._replace(
                release=lambda place=place, give=made.release: (self.held.pop(place), give())
            )


def test_the_memory_of_chunks_is_used_again(tmp_path):
    tree(tmp_path, good_files())
    data, _ = opened_saying(tmp_path, "threads", augment="resized-crop-flip", chunk=2)
    data.train.engine = watched = Watched(data.train.engine)
    index = torch.arange(8).repeat(20)
    taken = [(x, x.clone()) for x, _ in data.train.batches(index.split(3), 0)]
    assert len(watched.places) == 80 and not watched.held
    # two in the works, two ready, one at hand, one just given back
    assert len(set(watched.places)) <= 6
    assert all(torch.equal(x, copy) for x, copy in taken)
    x = torch.cat([x for x, _ in taken]).view(20, 8, 3, 48, 48)
    assert (x == x[0]).all()


@fast_decoders
@pytest.mark.parametrize("dataset", ["digits", "folder"])
def test_a_chunk_that_is_held_keeps_its_pixels(tmp_path, decoder, dataset):
    tree(tmp_path, good_files())
    folder = {"dataset": "folder", "data_dir": str(tmp_path), "image_size": 48}
    data = opened(
        decoder, 2, augment="crop-flip", **(folder if dataset == "folder" else {}), chunk=5
    )
    index = torch.arange(len(data.train)).repeat(20)[:160]
    held = [
        (made, made.pixels.clone())
        for made in data.train.engine.chunks(jobs([Segment(index, 0)], 5))
    ]
    assert len(held) == 32 and all(torch.equal(made.pixels, copy) for made, copy in held)


@pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
def test_dali_keeps_its_pipeline_between_passes(monkeypatch):
    data = opened("dali", 2, augment="crop-flip", chunk=100)
    engine, made = data.test.engine, []
    build = engine._pipeline
    monkeypatch.setattr(engine, "_pipeline", lambda most: made.append(most) or build(most))
    for _ in range(10):
        list(engine.chunks(jobs([Segment(torch.arange(360), None)], 100)))
        abandoned = engine.chunks(jobs([Segment(torch.arange(360), None)], 100))
        next(abandoned)
        abandoned.close()
    assert made == [100] and len(engine.idle) == 1
    # nothing of a pass that was given up is left in the pipeline
    expected = every_batch(data.test, 100)
    assert all(
        torch.equal(x, y)
        for (x, _), (y, _) in zip(expected, every_batch(opened().test, 100), strict=True)
    )


def test_chunks_are_cut_at_the_same_places_wherever_a_segment_starts():
    index = torch.arange(100, 150)
    made = list(jobs([Segment(index, 3, 37), Segment(index, 4)], 16))
    assert [(job.segment, job.epoch, job.skip) for job in made] == [
        (0, 3, 5),
        (0, 3, 0),
        *[(1, 4, 0)] * 4,
    ]
    assert torch.equal(torch.cat([job.index for job in made]), torch.cat([index[32:], index]))
    assert [len(job.index) for job in made] == [16, 2, 16, 16, 16, 2]


# Whole runs


def final_weights(out: Path) -> dict:
    newest = max((out / "checkpoints").glob("*.pt"), key=lambda path: int(path.stem.split("-")[1]))
    return torch.load(newest, weights_only=True)["model"]


@fast_decoders
def test_a_run_on_photographs_ends_in_the_same_weights_wherever_it_was_interrupted(
    tmp_path, imagenet_folder, decoder
):
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
        for folder in sorted((imagenet_folder / split).iterdir())[:32]:
            (tmp_path / "images" / split / folder.name).symlink_to(folder)
    line = [
        "--dataset",
        "imagenet",
        "--data-dir",
        str(tmp_path / "images"),
        "--model",
        "resnet20",
        "--image-size",
        "48",
    ]
    line += [
        "--method",
        "hybrid",
        "--epochs",
        "2",
        "--decay-epoch",
        "1",
        "--batchsize",
        "8",
        "--checkpoint-every",
        "3",
    ]
    line += ["--loader", decoder, "--workers", "2", "--chunk", "14", "--on-bad-image", "zeros"]
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    assert main([*line, "--out", str(whole)]) == 0
    code, runs = main([*line, "--out", str(halved), "--max-time", "0.001"]), 1
    while code == 75 and runs < 20:
        code, runs = (
            main(["--resume", "--out", str(halved), "--max-time", "0.001" if runs < 3 else "1h"]),
            runs + 1,
        )
    assert code == 0 and runs >= 3
    weights, others = final_weights(whole), final_weights(halved)
    assert weights.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in weights.items())
    rows = [row for row in read_rows(whole) if row["kind"] == "epoch"]
    assert len(rows) == 2 and rows[1]["batch_size"] > rows[0]["batch_size"]
    assert gone()
