"""--image-size "24 @0, 40 @50%": the syntax, the epochs, and that every loader, batch, process and
interruption gives each epoch's images at its size, as torchvision makes them of PIL's."""

import itertools
import json
import random
from fractions import Fraction
from math import floor
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
from exact import EXACT
from images import CPU, HAS_DALI, LOADERS, noise, opened, tree
from PIL import Image
from rows import read_rows
from said import refused, said
from torchvision.transforms import functional as TF

import fastsmooth as fs
from fastsmooth import data, models, sharpness
from fastsmooth.cli import stages
from fastsmooth.cli.config import Config, fitted, resolve
from fastsmooth.cli.flags import ConfigError
from fastsmooth.cli.parse import parse, read_saved
from fastsmooth.data import DataError, Stream, augment
from fastsmooth.data.chunks import normalisation
from fastsmooth.data.layouts.common import IMAGENET_MEAN, IMAGENET_STD
from fastsmooth.data.order import permutation
from fastsmooth.report import groups
from fastsmooth.sweep.__main__ import main as sweep
from fastsmooth.train import main
from fastsmooth.training import device, loop

FOLDER = ["--dataset", "folder", "--data-dir", "images"]
SIZES = {0: 24, 1: 40, 2: 16}  # by epoch
STAGES = "24 @0, 40 @1, 16 @2"
every_loader = pytest.mark.parametrize(("loader", "workers"), LOADERS)


def config(*words: object) -> Config:
    return resolve(parse([*FOLDER, *map(str, words)]).given)


# What is written


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("128 @0, 192 @50%, 224 @80%", "128 @0, 192 @50%, 224 @80%"),
        ("128@0,192@40ep", "128 @0, 192 @40"),
        (" 224 @ 0% ,\t128 @ 33.30 % ", "224 @0, 128 @33.3%"),
        ("64 @0ep, 128 @1e1, 64 @012", "64 @0, 128 @10, 64 @12"),
        ("128 @0", 128),
        ("128", 128),
    ],
)
def test_sizes_are_kept_in_one_form(text, canonical):
    parser = stages.image_size(8, 1024)
    assert parser(text) == canonical and parser(str(canonical)) == canonical


@pytest.mark.parametrize("points", ["0, 5up", "0, 1e6samples, 50%", "0, 2.5", "0, 99.999999%"])
def test_the_syntax_knows_points_that_images_do_not_take(points):
    """As numbers of other schedules may have them."""
    text = ", ".join(f"0.{k + 1} @{point.strip()}" for k, point in enumerate(points.split(",")))
    found = stages.parsed(text, float, "")
    assert [each.value for each in found] == [0.1, 0.2, 0.3][: len(found)]
    assert stages.parsed(stages.written(found), float, "") == found


REFUSED = [
    ("@50%, 224 @80%", "'@50%' is no VALUE @POINT"),
    ("128,", "'128' is no VALUE @POINT"),
    ("128 @0,", "'' is no VALUE @POINT"),
    ("128 @, 192 @5", "'128 @' is no VALUE @POINT"),
    ("128 @0 192 @5", "two points, without a comma"),
    ("128 @0; 192 @5", "two points, without a comma"),
    ("128 @5, 192 @10", "the first stage, 128 @5, does not begin @0"),
    ("128 @50%", "the first stage, 128 @50%, does not begin @0"),
    ("128 @0, 192 @0", "192 @0 does not begin after 128 @0"),
    ("128 @0, 192 @0%", "192 @0 does not begin after 128 @0"),
    ("128 @0, 192 @5, 224 @5ep", "224 @5 does not begin after 192 @5"),
    ("128 @0, 192 @50%, 224 @40%", "224 @40% does not begin after 192 @50%"),
    ("128 @0, 192 @15, 224 @50%", "224 @50% begins at epoch 10 and 192 @15 at epoch 15"),
    ("128 @0, 192 @10, 224 @50%", "224 @50% begins at epoch 10 and 192 @10 at epoch 10"),
    ("128 @0, 192 @2%", "of 20 epochs, 192 @2% begins at epoch 0 and 128 @0 at epoch 0"),
    ("128 @0, 192 @150%", "at 150% the run is over"),
    ("128 @0, 192 @100%", "at 100% the run is over"),
    ("128 @0, 192 @98%", "192 @98% begins at epoch 20, but the run ends after 20"),
    ("128 @0, 192 @20", "192 @20 begins at epoch 20, but the run ends after 20"),
    ("128 @0, 192 @-5", "'-5' is no point of a run"),
    ("128 @0, 192 @nan%", "'nan%' is no point of a run"),
    ("128 @0, 192 @\u0665", "is no point of a run"),  # an Arabic five
    ("128 @0, 192 @5 weeks", "'5 weeks' is no point of a run"),
    ("128 @0, 192 @2000up", "192 @2000up begins inside an epoch"),
    ("128 @0, 192 @1e6samples", "192 @1000000samples begins inside an epoch"),
    ("128 @0, 192 @2.5", "192 @2.5 begins inside an epoch"),
    ("128 @0, 128 @5", "128 @5 changes nothing after 128 @0"),
    ("4 @0, 128 @5", "4 is out of range: it must be at least 8 and at most 1024"),
    ("128 @0, 2000 @5", "2000 is out of range: it must be at least 8 and at most 1024"),
    ("-128 @0, 192 @5", "-128 is out of range"),
    ("128 @0, large @5", "'large' is not a whole number"),
    ("128 @0, 19.5 @5", "'19.5' is not a whole number"),
    (", ".join(f"{64 + k % 2} @{k}" for k in range(101)), "101 stages: write at most 100"),
    ("x" * 100_000 + " @0, 128 @5", "is not a whole number"),
]
CONTRADICTIONS = [
    ([*FOLDER, "--mode", "critical"], "--mode critical measures one function of the parameters"),
    ([*FOLDER, "--mode", "sampling"], "--mode sampling measures one function of the parameters"),
    ([*FOLDER, "--graphs", "on"], "--graphs on plays again updates of one image size"),
    (["--dataset", "npz", "--data-dir", "x"], "npz is an array of pixels"),
    (["--dataset", "torchvision/SVHN", "--data-dir", "x"], "SVHN is an array of pixels"),
    (["--dataset", "cifar10", "--data-dir", "x"], "--image-size has no effect with --dataset"),
    ([], "--image-size has no effect with --dataset digits"),
]


@pytest.mark.parametrize(("text", "words"), REFUSED, ids=[text[:40] for text, _ in REFUSED])
def test_what_no_run_can_do_is_refused_with_the_right_form(text, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refused(main, [*FOLDER, f"--image-size={text}", "--plan"])
    assert message.startswith("--image-size: ") and words in message and len(message) < 400
    example = "write " + stages.SIZES in message or f"as in {stages.SIZES}" in message
    remedies = ("lower the point", "write points that", "leave it out", "write at most")
    assert example or any(remedy in message for remedy in remedies)


@pytest.mark.parametrize(("flags", "words"), CONTRADICTIONS)
def test_flags_that_need_one_size_refuse_several(flags, words):
    message = refused(main, [*flags, "--image-size", "128 @0, 192 @5", "--plan"])
    assert words in message
    if words.startswith("--mode") or "array" in words or "--graphs" in words:
        assert "give --image-size one size, such as 192" in message
        with pytest.raises(ConfigError):  # in a file of flags too
            resolve(parse([*flags, "--image-size", "128 @0, 192 @5"]).given)


# When they begin


def test_percentages_are_rounded_to_whole_epochs_halves_up():
    rng = random.Random(0)
    cases = [(15, "50", 8), (3, "50", 2), (1000, "0.05", 1), (7, "99", 7)]
    for epochs, percent, start in cases:
        assert stages.epoch_of(stages.moment(f"{percent}%"), epochs) == start
    for _ in range(2000):
        epochs, percent = rng.randint(1, 10**6), f"{rng.randint(0, 99)}.{rng.randint(0, 999999)}"
        expected = floor(Fraction(percent) * epochs / 100 + Fraction(1, 2))
        assert stages.epoch_of(stages.moment(f"{percent}%"), epochs) == expected


def plan_of(*flags: str) -> list[dict]:
    found = said(main, [*flags, "--plan", "--json"])
    assert found.code == 0, found.err
    return [json.loads(line) for line in found.out.splitlines()]


def test_a_plan_shows_the_size_of_every_epoch_where_it_changes():
    flags = [*FOLDER, "--epochs", "15", "--method", "batch", "--decay-epoch", "6"]
    rows = plan_of(*flags, "--image-size", "128 @0, 192 @50%, 160 @12ep")
    assert [row["image_size"] for row in rows] == [128] * 8 + [192] * 4 + [160] * 3
    page = said(main, [*flags, "--image-size", "128 @0, 192 @50%, 160 @12ep", "--plan"]).out
    heading, *lines = page.splitlines()
    assert heading.split()[-1] == "pixels"
    assert [(line.split()[0], line.split()[-1]) for line in lines[:5]] == [
        ("0-5", "128x128"),
        ("6-7", "128x128"),
        ("8-11", "192x192"),
        ("12-14", "160x160"),
        ("delta", "c2)"),
    ]
    # nothing is new where there is one size
    one = plan_of(*flags, "--image-size", "128")
    assert all("image_size" not in row for row in one)
    assert "pixels" not in said(main, [*flags, "--image-size", "128", "--plan"]).out


def test_percentages_are_of_the_epochs_that_a_budget_takes():
    """1,281,167 images and batches of 32: 40,037 updates an epoch."""
    flags = ["--dataset", "imagenet", "--data-dir", "x", "--batchsize", "32"]
    rows = plan_of(*flags, "--budget", "updates=400300", "--image-size", "128 @0, 192 @50%")
    assert [row["image_size"] for row in rows] == [128] * 5 + [192] * 5
    line = [*flags, "--budget", "epochs=2", "--image-size", "128 @0, 192 @2", "--plan"]
    assert "192 @2 begins at epoch 2, but the run ends after 2" in refused(main, line)


def test_the_largest_size_picks_the_network_and_the_augmentation():
    large = config("--image-size", "48 @0, 128 @5, 64 @10")
    assert (large.model, large.augment) == ("torchvision/resnet34", "resized-crop-flip")
    small = config("--image-size", "16 @0, 64 @5, 8 @10")
    assert (small.model, small.augment) == ("resnet18", "crop-flip")
    assert fitted(config(), 300).image_size == 224  # the images call for one size


# Pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory, imagenet_folder) -> Path:
    """24 photographs to train on and 8 to test, JPEG but for some PNG, 40 to 150 pixels a side:
    each size that is asked for makes some of them smaller and some larger."""
    root, rng = tmp_path_factory.mktemp("sizes") / "images", random.Random(5)
    paths = sorted(imagenet_folder.glob("train/*/*"))[:32]
    for k, path in enumerate(paths):
        image = Image.open(path).convert("RGB")
        image = image.resize((rng.randint(40, 150), rng.randint(12, 150)), reducing_gap=2)
        target = root / ("train" if k < 24 else "val") / "ab"[k % 2]
        target.mkdir(parents=True, exist_ok=True)
        if k % 10 == 5:
            image = image.convert("P")  # which the fast decoders leave to PIL
        image.save(target / (f"{k:02}.png" if k % 5 == 0 else f"{k:02}.jpg"), quality=95)
    return root


def as_torchvision(paths: list[Path], kind: str, size: int, epoch: int | None) -> torch.Tensor:
    """uint8 [n, 3, size, size]: PIL images through torchvision's transforms, with the numbers that
    are drawn for the epoch at this size."""
    images = [Image.open(path).convert("RGB") for path in paths]
    rows = None
    if epoch is not None:
        rows = augment.draw(kind, size, 3, epoch, torch.arange(len(paths)))
    made = []
    for k, image in enumerate(images):
        if rows is not None and kind == "resized-crop-flip":
            flip, *uniforms = rows[k].tolist()
            width, height = (torch.tensor([v]) for v in image.size)
            (box,) = augment.crop_boxes(width, height, torch.tensor([uniforms])).tolist()
            image = TF.resized_crop(image, *box, [size, size])
        else:
            short = round(size * 256 / 224) if kind == "resized-crop-flip" else size
            image = TF.center_crop(TF.resize(image, short), [size, size])
            if rows is None:
                made.append(image)
                continue
            top, left, flip, angle = rows[k].tolist()
            image = TF.crop(TF.pad(image, max(1, size // 8)), int(top), int(left), size, size)
        image = TF.hflip(image) if flip else image
        made.append(TF.rotate(image, angle) if kind == "crop-flip-rotate" else image)
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2)


def pixels_of(x: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (x.double() * std + mean) * 255


def opened_in(folder: Path, loader: str = "resident", workers: int = 0, **given):
    """With a chunk that divides no epoch, of 3 epochs."""
    given = {"dataset": "folder", "data_dir": str(folder), "seed": 3, "epochs": 3} | given
    given |= {"chunk": 7} if loader != "resident" else {}
    return opened(loader, workers, **{"image_size": STAGES, "augment": "crop-flip"} | given)


@every_loader
@pytest.mark.parametrize("kind", ["none", "crop-flip-rotate", "resized-crop-flip"])
def test_each_epoch_has_torchvisions_pixels_at_its_size(folder, loader, workers, kind):
    if (loader, kind) == ("resident", "resized-crop-flip"):
        pytest.skip("it decodes whole images")
    loaded = opened_in(folder, loader, workers, augment=kind)
    splits = {"train": loaded.train, "test": loaded.test}
    # of photographs as small as these a decoder's rounding is a larger share
    tolerance = {"torch": 0, "resident": 0, "threads": 0.2, "dali": 0.6}[loader]
    for split, epoch in itertools.product(splits, (2, 0, 1, None)):
        paths = sorted((folder / ("train" if split == "train" else "val")).glob("*/*"))
        paths.sort(key=lambda path: (path.parent.name, path.name))
        size = SIZES[epoch] if split == "train" and epoch is not None else 16
        assert splits[split].size == 16 and loaded.size == 16  # that of the last stage
        expected = as_torchvision(paths, kind, size, None if kind == "none" else epoch)
        (x, _), *rest = splits[split].batches([torch.arange(len(paths))], epoch)
        assert x.shape == expected.shape and not rest
        assert x.is_contiguous(memory_format=torch.channels_last)
        off = (pixels_of(x) - expected).abs().mean((1, 2, 3))
        assert off.mean() <= tolerance + 1e-3, (split, epoch, off.mean())
        if loader in ("torch", "resident"):
            assert off.max() < 1e-3


@pytest.mark.parametrize(
    ("loader", "workers", "world"),
    [
        (*given, world)
        for given in LOADERS
        for world in (1, 3)
        if given[0] != "torch" or (given[1] == 2) == (world == 1)
    ],
)
def test_batches_and_ranks_change_together_with_the_size(folder, loader, workers, world):
    """What comes is what a run of one size gives in the same epoch, bit for bit; shares may be
    empty, and images are also asked for as an update asks."""
    rng, kind = random.Random(f"{loader} {world}"), "crop-flip-rotate"
    expected = {}
    for epoch, size in SIZES.items():
        alone = 0 if loader == "torch" else workers
        whole = opened_in(folder, loader, alone, image_size=size, augment=kind)
        expected[epoch] = next(whole.train.batches([torch.arange(24)], epoch))
    loaded = opened_in(folder, loader, workers, augment=kind)
    place = [{"rank": rank, "world": world} for rank in range(world)]
    streams = [Stream(loaded.train, 3, 3, loaded.fingerprint, **each) for each in place]
    first = random.Random(loader).choice([0, 1])  # a stream may also begin inside a stage
    for stream in streams:
        state = stream.state_dict() | {"epoch": first, "cursor": 5 * first}
        stream.load_state_dict(state)
    for epoch in range(first, 3):
        order, cursor = permutation(3, epoch, 24), streams[0].cursor
        batch_size = 1 + epoch
        for stream in streams:
            stream.batch_size = batch_size
        for batches in zip(*(stream.batches() for stream in streams), strict=True):
            end = min(cursor + batch_size, 24)
            for rank, batch in enumerate(batches):
                index = order[[i for i in range(cursor, end) if i % world == rank]]
                how = rng.choice(["images", "ahead", "skip"])
                if how == "skip":
                    continue
                x, y = batch.images() if how == "images" else batch.ahead(torch.float32)
                if how == "ahead" and batch.cursor is not None:  # the next test moves it on
                    continue
                u, v = expected[epoch]
                assert torch.equal(y, v[index])
                assert len(index) == 0 or torch.equal(x, u[index])
            cursor, batch_size = end, rng.randint(1, 9)
            for stream in streams:
                stream.batch_size = batch_size
        assert cursor == 24
    for stream in streams:
        stream.close()


def test_the_cursor_of_images_on_the_device_goes_with_the_size(folder):
    """Updates that find their images by it see each epoch at its size."""
    loaded = opened_in(folder)
    stream = Stream(loaded.train, 3, 3, loaded.fingerprint)
    stream.batch_size = 5
    for epoch, size in SIZES.items():
        whole = opened_in(folder, image_size=size)
        u, v = next(whole.train.batches([permutation(3, epoch, 24)], epoch))
        at = 0
        for batch in stream.batches():
            x, y = batch.ahead(torch.float32)
            batch.cursor.add_(batch.count)
            assert torch.equal(x, u[at : at + 5]) and torch.equal(y, v[at : at + 5])
            at += batch.count
        assert at == 24


def test_images_in_memory_are_held_at_one_size(folder, monkeypatch):
    loaded = opened_in(folder)
    stream = Stream(loaded.train, 3, 3, loaded.fingerprint)
    stream.batch_size, held = 24, []
    decoded = loaded.train.decoded

    def watched(size: int):
        assert loaded.train.stored.numel() == stream._reader._pixels.numel() == 0
        return decoded(size)

    monkeypatch.setattr(loaded.train, "decoded", watched)
    for _ in range(3):
        for _ in stream.rest_of_epoch():
            held.append(loaded.train.stored.shape)
    assert held == [(24, size, size, 3) for size in SIZES.values()]


@pytest.mark.parametrize(("room", "name"), [(1.01, "resident"), (0.99, "threads")])
def test_what_must_fit_in_memory_is_the_largest_size(folder, monkeypatch, room, name):
    """24 images of 40 x 40 and 8 tested at 16 x 16."""
    needed = 3 * (24 * 40**2 + 8 * 16**2)
    monkeypatch.setattr(data, "free_memory", lambda device: room * needed / data.MEMORY_SHARE)
    monkeypatch.setattr(data.dali, "available", lambda: False)
    c = resolve(
        {"dataset": "folder", "data_dir": str(folder), "epochs": 3, "image_size": STAGES}
        | {"augment": "crop-flip"}
    )
    found = data.open_data(c, CPU)
    assert found.loader == name and "decoded anew for each size" in found.choice


@pytest.mark.parametrize("policy", ["raise", "zeros"])
def test_a_file_that_goes_bad_before_its_size_begins_is_found_then(tmp_path, policy):
    tree(
        tmp_path,
        {f"{s}/{c}/{i}.png": noise() for s in ("train", "val") for c in "ab" for i in "12"},
    )
    given = {"on_bad_image": policy, "image_size": "16 @0, 24 @1", "augment": "none"}
    train = opened_in(tmp_path, **given).train
    list(train.batches([torch.arange(4)], 0))
    (tmp_path / "train" / "b" / "1.png").write_bytes(b"no image")
    if policy == "raise":
        for _ in range(2):  # and whoever asks again is told again
            with pytest.raises(DataError, match=r"b/1\.png: not an image"):
                next(train.batches([torch.arange(4)], 1))
        return
    x, _ = next(train.batches([torch.arange(4)], 1))
    black = normalisation(IMAGENET_MEAN, IMAGENET_STD, CPU)[:, 0, None, None]
    assert x.shape == (4, 3, 24, 24) and (x[2] == black).all() and not (x[3] == black).all()


@pytest.mark.skipif(not HAS_DALI, reason="DALI is not installed")
def test_dali_has_one_pipeline_for_all_sizes(folder, monkeypatch):
    loaded = opened_in(folder, "dali", 1)
    engine, made = loaded.train.engine, []
    build = engine._pipeline
    monkeypatch.setattr(engine, "_pipeline", lambda most: made.append(most) or build(most))
    stream = Stream(loaded.train, 3, 3, loaded.fingerprint)
    stream.batch_size = 5
    assert [len(list(stream.rest_of_epoch())) for _ in range(3)] == [5] * 3
    stream.close()
    assert made == [7]


# Whole runs

RUN = ["--model", "resnet8", "--norm", "group", "--image-size", "24 @0, 16 @34%, 40 @2"]
RUN += ["--epochs", "3", "--method", "batch", "--decay-epoch", "1", "--batchsize", "4"]
RUN += ["--log-every", "2", "--augment", "crop-flip", "--seed", "3", "--device", "cpu"]


def run(folder: Path, out: Path, *flags: str, code: int = 0) -> str:
    line = ["--dataset", "folder", "--data-dir", str(folder), *RUN, *flags, "--out", str(out)]
    found = said(main, line)
    assert found.code == code, found
    return found.out


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> tuple[Path, str]:
    """A run, and what it said."""
    out = tmp_path_factory.mktemp("trained") / "run"
    return out, run(folder, out)


def test_a_run_says_its_sizes_and_its_epochs_have_them(folder, trained, tmp_path):
    out, words = trained
    assert (
        "images brought to 24x24 from epoch 0, 16x16 from epoch 1, 40x40 from epoch 2 (pixels), "
        "tested at 40x40" in words
    )
    rows = [row for row in read_rows(out) if row["kind"] == "epoch"]
    assert [row["image_size"] for row in rows] == [24, 16, 40]
    assert len({row["batch_size"] for row in rows}) == 3  # which change with it here
    assert read_saved(out).image_size == "24 @0, 16 @34%, 40 @2"
    words = run(folder, tmp_path / "one", "--image-size", "16", "--epochs", "1")
    assert "images brought to 16x16 pixels, " in words
    assert all("image_size" not in row for row in read_rows(tmp_path / "one"))


@pytest.mark.parametrize(
    ("loader", "update"),
    # the size changes after 6 updates and after 9
    [
        *(("resident", k) for k in (6, 8, 10)),
        ("threads", 8),
        ("torch", 8),
        *[("dali", 8)] * HAS_DALI,
    ],
)
def test_a_run_ends_in_the_same_bits_wherever_it_was_interrupted(
    folder, trained, tmp_path, monkeypatch, loader, update
):
    flags, count, whole = [*EXACT, "--loader", loader], loop.Run.count, trained[0]
    if loader != "resident":
        workers = "0" if loader == "torch" else "1"
        flags, whole = [*flags, "--workers", workers, "--chunk", "5"], tmp_path / "whole"
        run(folder, whole, *flags)

    def counted(self, point):
        count(self, point)
        if self.update == update:
            self.stop_asked = lambda: 15

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "count", counted)
        run(folder, tmp_path / "halved", *flags, code=75)
    assert said(main, ["--resume", "--out", str(tmp_path / "halved")]).code == 0
    forks.assert_same_run(tmp_path / "halved", whole)


def test_a_run_that_goes_on_keeps_its_sizes(folder, trained, tmp_path):
    run(folder, tmp_path / "run", "--max-time", "0.001", code=75)
    again = ["--resume", "--out", str(tmp_path / "run"), "--image-size"]
    message = refused(main, [*again, "24 @0, 16 @34%, 32 @2"])
    assert "has --image-size 24 @0, 16 @34%, 40 @2, not 24 @0, 16 @34%, 32 @2" in message
    # the same in other words
    assert said(main, [*again, "24@0%,16@34.0%,40 @2ep", "--max-time", "0.001"]).code == 75


def test_a_stage_that_the_model_cannot_take_is_named(folder, tmp_path, monkeypatch):
    def flat(name: str, classes: int, norm: str, channels: int) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 24**2, classes))

    monkeypatch.setattr(models, "build", flat)
    for size, words in [
        ("24 @0, 16 @2", "16x16 images, which --image-size has from epoch 2 on ("),
        ("16 @0, 24 @2", "16x16 images, which --image-size has from epoch 0 on ("),
        ("16", "16x16 images ("),
    ]:
        line = ["--dataset", "folder", "--data-dir", str(folder), *RUN, "--image-size", size]
        message = refused(main, [*line, "--out", str(tmp_path / "run")])
        assert message.startswith(f"the model cannot take {words}")
        assert message.endswith(": use another --model than resnet8")
    assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_a_model_of_one_size_names_the_stage_that_it_cannot_take(folder, tmp_path):
    pytest.importorskip("timm")
    line = ["--dataset", "folder", "--data-dir", str(folder), "--augment", "crop-flip"]
    line += ["--model", "timm/vit_tiny_patch16_224", "--batchsize", "4", "--out"]
    message = refused(main, [*line, str(tmp_path / "run"), "--image-size", "224 @0, 192 @5"])
    assert "cannot take 192x192 images, which --image-size has from epoch 5 on (" in message
    assert message.endswith(": use --image-size 224")
    assert not (tmp_path / "run").exists()


def test_no_graph_is_captured_where_the_size_changes():
    cuda = torch.device("cuda")
    for size, graphs in [("128", "on"), ("128 @0, 192 @5", "off")]:
        assert device.choose_graphs(config("--image-size", size), cuda, "triton", 1) == graphs


@pytest.mark.parametrize("flags", [[], ["--measure", "step"], ["--estimator", "micro-batch"]])
def test_noise_is_measured_on_the_images_of_the_batch(folder, trained, tmp_path, flags):
    """At the size of the epoch, whichever that is, and without another bit of the training."""
    often = ["every=1", "--batchsize", "8"] if "micro-batch" in flags else ["every=2"]
    run(folder, tmp_path / "run", "--track-noise", *often, *flags)
    rows = [row for row in read_rows(tmp_path / "run") if row["kind"] == "measure"]
    assert {row["epoch"] for row in rows} == {0, 1, 2} and all(
        row["c2_sampled"] > 0 for row in rows
    )
    if not flags:
        found, expected = (
            forks.final_state(out)["model"] for out in (tmp_path / "run", trained[0])
        )
        assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_the_sharpness_of_a_run_is_that_at_its_last_size(trained, folder, tmp_path):
    """So it is the one that is measured of the same weights in a run of that size."""
    out, _ = trained
    flags = ["--samples", "8", "--batch", "4", "--n-iters", "1", "--device", "cpu"]
    one = tmp_path / "one"
    one.mkdir()
    for path in out.rglob("*"):
        if path.is_file():
            (one / path.relative_to(out)).parent.mkdir(exist_ok=True)
            (one / path.relative_to(out)).write_bytes(path.read_bytes())
    saved = json.loads((one / "config.json").read_text())
    (one / "config.json").write_text(json.dumps(saved | {"image_size": 40}))
    values = []
    for path in (out, one):
        for more in ([], ["--augment"]):
            assert said(sharpness.main, [str(path), *flags, *more]).code == 0
        results = json.loads((path / "sharpness.json").read_text())["results"]
        values.append([entry["value"] for entry in results])
    assert values[0] == values[1] and len(set(values[0])) == 2


# The other ways in and out


def test_files_of_flags_and_saved_runs_say_sizes_as_the_command_line_does(
    folder, tmp_path, trained
):
    text = "128 @0, 192 @50%, 224 @80%"
    (tmp_path / "flags.toml").write_text(f'image-size = "{text}"\nepochs = 10\n')
    given = parse([*FOLDER, "--config", str(tmp_path / "flags.toml")]).given
    assert resolve(given) == config("--image-size", text, "--epochs", 10)
    again = resolve(parse(["--config", str(trained[0] / "config.json")]).given)
    assert again.image_size == "24 @0, 16 @34%, 40 @2"


def test_a_sweep_takes_sizes_as_values(tmp_path):
    values = ["224", "128 @0, 224 @50%", "128 @0, 192 @50%, 224 @80%"]
    (tmp_path / "grid.toml").write_text(f"image-size = {json.dumps(values)}\n")
    for line in (["--image-size", *values], ["--grid", str(tmp_path / "grid.toml")]):
        found = said(sweep, [*FOLDER, *line, "--out", str(tmp_path / "out"), "--plan"])
        assert found.code == 0, found
        for value in values:
            assert value in found.out
        assert "image-size=128--0--224--50-" in found.out


def test_a_report_tells_runs_of_other_sizes_apart():
    base = {"dataset": "folder", "data_dir": "x", "model": "resnet8", "method": "constant"}
    sizes = [16, "16 @0, 24 @50%", "16 @0, 24 @5"]
    configs = [groups.identity(base | {"image_size": size}) for size in sizes]
    fields = groups.differing(configs)
    assert fields == ["image_size"]
    assert groups.names_of(configs, fields) == [
        "image size 16", "image size 16 @0, 24 @50%", "image size 16 @0, 24 @5",
    ]  # fmt: skip
    assert sorted(sizes, key=groups.order)[0] == 16


def test_a_data_set_without_a_run_has_one_size(folder):
    with pytest.raises(ConfigError, match="give one"):
        fs.open_data("folder", folder, image_size="16 @0, 24 @5", device="cpu")


@pytest.mark.full
def test_a_compiled_network_takes_every_size(folder, tmp_path, monkeypatch):
    """Each is compiled once, and the last once more for the tests."""

    def small(name: str, classes: int, norm: str) -> torch.nn.Module:
        layers = torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)
        return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(8, classes))

    monkeypatch.setattr(models, "build", small)
    losses = []
    for compiled in ("off", "on"):
        run(folder, tmp_path / compiled, "--compile", compiled)
        rows = [row for row in read_rows(tmp_path / compiled) if row["kind"] == "epoch"]
        losses.append([row["test_loss"] for row in rows])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    summary = json.loads((tmp_path / "on" / "summary.json").read_text())
    assert summary["compiled_graphs"] == 4
