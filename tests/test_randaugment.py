"""RandAugment and random erasing against torchvision's transforms, given the numbers that are drawn
here: all bits, through every loader, and drawn from the same laws."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch
from bounds import chi_square, chi_square_limit, ks, ks_limit, share_limit
from images import CPU, LOADERS, every_batch, noise, opened, tree
from PIL import Image
from said import refused
from torchvision import transforms as T
from torchvision.transforms import InterpolationMode, autoaugment
from torchvision.transforms import functional as TF

import fastsmooth as fs
from fastsmooth.cli.config import resolve
from fastsmooth.data import augment, open_data
from fastsmooth.data.changes import Changes, erase, erased_boxes
from fastsmooth.data.chunks import Segment, normalisation
from fastsmooth.data.layouts.common import IMAGENET_MEAN, IMAGENET_STD
from fastsmooth.data.order import permutation
from fastsmooth.data.randaugment import CHOICES, OPERATIONS, contrasted, draw, randaugment
from fastsmooth.train import main

every_loader = pytest.mark.parametrize(("loader", "workers"), LOADERS)
# processes of its own change nothing of what the loader torch does
every_kind = pytest.mark.parametrize(
    ("loader", "workers"), [loader for loader in LOADERS if loader != ("torch", 2)]
)
FLAGS = {"randaugment": "2,9", "random_erasing": 0.5}


def pixels(n: int, channels: int, size: int) -> torch.Tensor:
    """Noise, and images of one value, few values and slopes: uint8 [n, channels, size, size]."""
    generator = torch.Generator().manual_seed(size)
    images = torch.randint(0, 256, (n, channels, size, size), generator=generator)
    slope = torch.arange(size) * 200 // size
    images[0], images[1], images[2] = 7, slope, slope[:, None] + 55
    images[3], images[4] = images[3] // 4 + 90, images[4] % 2 * 255
    return images.to(torch.uint8)


@contextmanager
def given(choices: list[int]) -> Iterator[None]:
    """Inside, torchvision's RandAugment draws these operations and signs."""
    numbers = []
    for choice in choices:
        name, sign = CHOICES[choice]
        numbers.append(list(OPERATIONS).index(name))
        numbers += [int(sign < 0)] * OPERATIONS[name].signed
    left = iter(numbers)
    with mock.patch.object(torch, "randint", lambda *_: torch.tensor([next(left)])):
        yield
    assert not list(left)


def by_torchvision(image: torch.Tensor, choices: list[int], magnitude: int) -> torch.Tensor:
    with given(choices):
        return T.RandAugment(len(choices), magnitude)(image)


@pytest.mark.parametrize("magnitude", [0, 9, 15, 30])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 8), (1, 33), (3, 32), (3, 224)])
def test_every_operation_gives_torchvisions_pixels(channels, size, magnitude):
    """Of a batch those of its own function of each image alone, with fill 0."""
    images = pixels(5, channels, size)
    space = T.RandAugment()._augmentation_space(31, (size, size))
    assert list(space) == list(OPERATIONS)
    for name, (amounts, signed) in space.items():
        operation = OPERATIONS[name]
        assert operation.signed == signed
        amount = float(amounts[magnitude]) if amounts.ndim else 0.0
        assert operation.amounts(size)[magnitude].item() == amount
        for value in (amount, -amount) if signed else (amount,):
            how = name, value, InterpolationMode.NEAREST, [0.0] * channels
            expected = torch.stack([autoaugment._apply_op(image, *how) for image in images])
            assert torch.equal(operation.apply(images, value), expected), (name, value)


@pytest.mark.parametrize(("channels", "size", "rounds"), [(3, 32, 2), (1, 8, 2), (3, 24, 9)])
def test_drawn_operations_are_done_as_torchvisions_own_transform_does_them(channels, size, rounds):
    images = pixels(120, channels, size)
    drawn = draw(5, 2, torch.arange(120), rounds)
    assert drawn.shape == (rounds, 120) and len({CHOICES[k][0] for k in drawn[0].tolist()}) == 14
    before, found = images.clone(), randaugment(images, drawn, 9)
    assert torch.equal(images, before) and found.dtype == torch.uint8
    for image, choices, ours in zip(images, drawn.T.tolist(), found, strict=True):
        assert torch.equal(ours, by_torchvision(image, choices, 9)), choices


def test_an_image_becomes_the_same_in_any_batch():
    images, index = pixels(60, 3, 16), torch.arange(60)
    whole = randaugment(images, draw(1, 0, index, 2), 20)
    for size in (1, 7, 60):
        parts = [randaugment(images[at], draw(1, 0, at, 2), 20) for at in index.split(size)]
        assert torch.equal(torch.cat(parts), whole)
    some = torch.tensor([59, 3, 3, 17])
    assert torch.equal(randaugment(images[some], draw(1, 0, some, 2), 20), whole[some])


def test_the_mean_of_a_large_image_is_summed_of_it_alone():
    """Past 2^24 float32 rounds, in an order that may be the batch's."""
    images = pixels(6, 3, 300) | 192
    alone = torch.cat([TF.adjust_contrast(image[None], 1.4) for image in images])
    with mock.patch.object(TF, "adjust_contrast", wraps=TF.adjust_contrast) as calls:
        assert torch.equal(contrasted(images, 0.4), alone)
        assert calls.call_count == 6
        contrasted(images[..., :256, :256], 0.4)
        assert calls.call_count == 7


def test_operations_and_signs_are_drawn_alike():
    n = 40_000
    one, two = draw(0, 0, torch.arange(n), 2)
    counts = torch.bincount(one // 2 * 14 + two // 2, minlength=14 * 14)
    assert chi_square(counts, n / 14**2) < chi_square_limit(14**2 - 1)
    for drawn in (one, two):
        signed = torch.tensor([row.signed for row in OPERATIONS.values()])[drawn // 2]
        assert not (drawn % 2)[~signed].any()
        negative = (drawn % 2)[signed].double()
        assert abs(negative.mean().item() - 0.5) < share_limit(len(negative))
        cells = torch.bincount(drawn[signed], minlength=2 * 14)[2:20]
        assert chi_square(cells, n / 28) < chi_square_limit(17)


def test_other_samples_epochs_and_seeds_draw_other_operations():
    index = torch.arange(5000)
    keys = [(0, 0, index), (0, 1, index), (1, 0, index), (2**40, 0, index), (0, 0, index + 1)]
    drawn = torch.cat([draw(*key, 2) // 2 for key in keys]).double()
    drawn = torch.cat([drawn, augment.draw("crop-flip", 32, 0, 0, index)[:, :3].T])
    correlation = torch.corrcoef(drawn).fill_diagonal_(0)
    assert correlation.abs().max() < 6 / math.sqrt(len(index))


# Random erasing


def box_of_one(size: int, uniforms: torch.Tensor) -> tuple[int, int, int, int]:
    """torchvision's RandomErasing.get_params, as published, with given uniforms [10, 4]; nothing
    where no box fits."""
    for area, ratio, at_y, at_x in uniforms.tolist():
        target = size * size * (0.02 + area * (0.33 - 0.02))
        aspect = math.exp(math.log(0.3) + ratio * (math.log(3.3) - math.log(0.3)))
        h, w = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if h < size and w < size:
            return int(at_y * (size - h + 1)), int(at_x * (size - w + 1)), h, w
    return 0, 0, 0, 0


@pytest.mark.parametrize("size", [8, 32, 33])
def test_boxes_are_those_of_torchvisions_loop_over_the_attempts(size):
    n = 3000
    uniforms = torch.rand(10, 4, n, generator=torch.Generator().manual_seed(0)).double()
    # some with large flat boxes alone, which do not fit
    uniforms[:, :2, :20] = torch.tensor([1.0, 1.0]).view(1, 2, 1)
    uniforms[:9, :2, 20:40] = torch.tensor([1.0, 1.0]).view(1, 2, 1)
    words = (uniforms * 2**32).floor().long()
    chosen = torch.zeros(4, n, dtype=torch.int64)

    def philox(seed, epoch, index, stream):
        return words.transpose(0, 1) if isinstance(stream, torch.Tensor) else chosen

    with mock.patch("fastsmooth.data.changes.philox", philox):
        found = erased_boxes(1.0, size, 0, 0, torch.arange(n))
    uniforms = words.double() / 2**32
    expected = [box_of_one(size, uniforms[..., k]) for k in range(n)]
    assert expected[0] == (0, 0, 0, 0) != expected[25]
    assert list(map(tuple, found.tolist())) == expected


@pytest.mark.parametrize("size", [8, 32])
def test_boxes_have_the_law_of_torchvisions_random_erasing(size):
    """Those that are erased, half of all: whether one is says nothing of its box."""
    n = 3000
    torch.manual_seed(0)
    arguments = torch.empty(3, size, size), (0.02, 0.33), (0.3, 3.3), [0.0]
    theirs = np.array([T.RandomErasing.get_params(*arguments)[:4] for _ in range(n)])
    boxes = erased_boxes(0.5, size, 7, 1, torch.arange(2 * n)).numpy()
    boxes = boxes[boxes[:, 2] > 0]
    for name, value in {
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "height": lambda b: b[:, 2],
        "width": lambda b: b[:, 3],
        "area": lambda b: b[:, 2] * b[:, 3],
        "ratio": lambda b: b[:, 2] / b[:, 3],
        "place across": lambda b: b[:, 1] / (size - b[:, 3]),
        "place down": lambda b: b[:, 0] / (size - b[:, 2]),
    }.items():
        assert ks(value(boxes), value(theirs)) < ks_limit(len(boxes), n), name


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9, 1.0])
def test_so_many_images_are_erased(share):
    n = 20_000
    erased = erased_boxes(share, 32, 0, 0, torch.arange(n))[:, 2] > 0
    assert abs(erased.double().mean().item() - share) < share_limit(n) * (0 < share < 1) + 1e-12
    others = [erased_boxes(share, 32, *key, torch.arange(n))[:, 2] > 0 for key in ((0, 1), (1, 0))]
    if 0 < share < 1:
        drawn = torch.stack([erased, *others]).double()
        assert torch.corrcoef(drawn).fill_diagonal_(0).abs().max() < 6 / math.sqrt(n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_box_is_erased_as_torchvision_erases_it(dtype):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 3, 16, 16, generator=generator).to(dtype)
    boxes = erased_boxes(0.7, 16, 0, 0, torch.arange(200))
    expected = torch.stack(
        [TF.erase(image, *box, 0.0) for image, box in zip(x, boxes.tolist(), strict=True)]
    )
    stored = x.permute(0, 2, 3, 1).contiguous()
    erase(stored, boxes)
    assert torch.equal(stored.permute(0, 3, 1, 2), expected) and not torch.equal(expected, x)


# Batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Noise of 32 x 32 pixels in two classes: 90 for training, 10 for testing."""
    counts = {"train": 45, "val": 5}
    files = {
        f"{split}/{name}/{k}.png": noise()
        for split, count in counts.items()
        for name, k in itertools.product(("ant", "bee"), range(count))
    }
    return tree(tmp_path_factory.mktemp("images"), files)


def of_folder(folder, loader="resident", workers=0, **more):
    where = {"dataset": "folder", "data_dir": str(folder), "augment": "crop-flip"}
    return opened(loader, workers, **(where | more))


@pytest.fixture(scope="module")
def by_pipeline(folder) -> torch.Tensor:
    """x of every training sample in epoch 3 of seed 11, by torchvision's transforms on one image
    after the other."""
    seed, epoch = 11, 3
    paths = sorted(folder.glob("train/*/*.png"))
    index = torch.arange(len(paths))
    params = augment.draw("crop-flip", 32, seed, epoch, index).tolist()
    boxes = erased_boxes(FLAGS["random_erasing"], 32, seed, epoch, index).tolist()
    normalise = T.Compose([T.ToTensor(), T.Normalize(IMAGENET_MEAN, IMAGENET_STD)])
    x = []
    for i, path in enumerate(paths):
        image = augment.crop_flip_rotate(Image.open(path), params[i], 32)
        choices = draw(seed, epoch, index, 2)[:, i].tolist()
        pixels = by_torchvision(TF.pil_to_tensor(image), choices, 9)
        made = normalise(TF.to_pil_image(pixels))
        x.append(TF.erase(made, *boxes[i], 0.0))
    return torch.stack(x)


@every_loader
def test_every_loader_gives_the_images_of_torchvisions_pipeline(
    loader, workers, folder, by_pipeline
):
    more = {} if loader == "resident" else {"chunk": 13}
    data = of_folder(folder, loader, workers, seed=11, **FLAGS, **more)
    for size in (7, 90):
        found = every_batch(data.train, size, seed=11, epoch=3)
        x, _ = (torch.cat(parts) for parts in zip(*found, strict=True))
        assert torch.equal(x, by_pipeline[permutation(11, 3, 90)])
        assert x.is_contiguous(memory_format=torch.channels_last)


@every_kind
@pytest.mark.parametrize("flag", FLAGS)
def test_one_of_them_alone_is_the_same_through_every_loader(flag, loader, workers, folder):
    given = {flag: FLAGS[flag], "augment": "none"}
    expected = every_batch(of_folder(folder, **given).train, epoch=1)
    plain = every_batch(of_folder(folder, augment="none").train, epoch=1)
    found = every_batch(of_folder(folder, loader, workers, **given).train, epoch=1)
    for (x, y), (same, labels), (other, _) in zip(found, expected, plain, strict=True):
        assert torch.equal(x, same) and torch.equal(y, labels) and not torch.equal(x, other)


@every_kind
def test_images_that_are_tested_are_as_they_were(loader, workers, folder):
    """Those of the training set too, where they are measured as they are tested."""
    changed, plain = (of_folder(folder, loader, workers, **flags) for flags in (FLAGS, {}))
    index = [torch.arange(10)]
    for epoch in (None, 0):  # the published ImageNet code tests on the training view
        for (x, _), (same, _) in zip(
            changed.test.batches(index, epoch), plain.test.batches(index, epoch), strict=True
        ):
            assert torch.equal(x, same)
    (x, _), (same, _) = (next(data.train.batches(index)) for data in (changed, plain))
    assert torch.equal(x, same)


@every_kind
def test_images_of_several_sizes_are_changed_at_their_size(loader, workers, folder):
    more = {"image_size": "24 @0, 40 @1", "epochs": 2}
    data = of_folder(folder, loader, workers, **FLAGS, **more)
    for epoch, size in ((0, 24), (1, 40)):
        alone = of_folder(folder, loader, workers, image_size=size, **FLAGS)
        for (x, _), (same, _) in zip(
            every_batch(data.train, epoch=epoch), every_batch(alone.train, epoch=epoch), strict=True
        ):
            assert x.shape[2:] == (size, size) and torch.equal(x, same)


@pytest.mark.parametrize(("loader", "workers"), [("torch", 0), ("threads", 2)])
def test_random_resized_crops_are_changed_in_chunks_of_any_size(loader, workers, folder):
    sizes = [
        every_batch(
            of_folder(
                folder, loader, workers, **FLAGS | {"augment": "resized-crop-flip", "chunk": chunk}
            ).train,
            batch,
            epoch=2,
        )
        for chunk, batch in ((7, 90), (64, 31))
    ]
    x, same = (torch.cat([part for part, _ in found]) for found in sizes)
    assert torch.equal(x, same)


@every_kind
def test_digits_of_eight_pixels_and_one_channel_are_changed(loader, workers):
    given = {"augment": "crop-flip", "randaugment": "1,20", "random_erasing": 0.3}
    data = opened(loader, workers, **given)
    x, _ = next(data.train.batches([torch.arange(200)], 4))
    plain, _ = next(
        opened(loader, workers, augment="crop-flip").train.batches([torch.arange(200)], 4)
    )
    table = normalisation(*digits_constants(), CPU)
    stored = (plain[..., None] - table[0]).abs().argmin(-1).to(torch.uint8)
    drawn, boxes = draw(0, 4, torch.arange(200), 1), erased_boxes(0.3, 8, 0, 4, torch.arange(200))
    for k in range(200):
        pixels = by_torchvision(stored[k], drawn[:, k].tolist(), 20)
        expected = table[0][pixels.long()]
        assert torch.equal(x[k], TF.erase(expected, *boxes[k].tolist(), 0.0)), k


def digits_constants():
    from fastsmooth.data import read_set

    images = read_set(resolve({}))
    return images.mean, images.std


def test_the_library_changes_images_too(folder):
    index = [torch.arange(90)]
    data = fs.open_data("folder", folder, image_size=32, augment="crop-flip", device="cpu", **FLAGS)
    expected = of_folder(folder, **FLAGS).train.batches(index, 2)
    assert torch.equal(next(data.train.batches(index, 2))[0], next(expected)[0])
    with pytest.raises(ValueError, match="mixup"):
        fs.open_data("digits", device="cpu", mixup=0.2)


@pytest.mark.parametrize(("loader", "workers"), [("resident", 0), ("threads", 2)])
def test_images_in_bfloat16_are_the_same_rounded(loader, workers, folder):
    data = of_folder(folder, loader, workers, **FLAGS)
    segment = Segment(torch.randperm(90, generator=torch.Generator().manual_seed(0)), 1)
    made = []
    for dtype in (torch.float32, torch.bfloat16):
        reader = data.train.reader([segment])
        made.append(reader.take(50, reader.room(50, dtype))[0])
        reader.close()
    assert torch.equal(made[0].bfloat16(), made[1])


def test_a_cursor_finds_the_boxes_of_its_samples_and_randaugment_has_none(folder):
    index = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    train = of_folder(folder, random_erasing=0.8).train
    expected = torch.cat([x for x, _ in train.batches(index.split(30), 5)])
    reader = train.reader([Segment(index, 5, 10)])
    reader.begin()
    reader.cursor.add_(20)
    assert torch.equal(reader.ahead(30, torch.float32)[0], expected[30:60])
    assert of_folder(folder, randaugment="1,9").train.reader([Segment(index, 5)]).cursor is None


def test_boxes_stay_at_their_place_from_epoch_to_epoch(folder):
    """A captured update reads them there."""
    index = torch.arange(90)
    reader = of_folder(folder, random_erasing=0.8).train.reader(
        [Segment(index, 0), Segment(index, 1)]
    )
    reader.begin()
    place, first = reader._boxes.data_ptr(), reader._boxes.clone()
    reader.advance()
    reader.begin()
    assert reader._boxes.data_ptr() == place
    assert torch.equal(reader._boxes, Changes(0, erasing=0.8).boxes(32, 1, index))
    assert not torch.equal(reader._boxes, first)


# What is refused, and what the constants are of


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--randaugment 2", "--randaugment: '2' is not N,M, as in 2,9"),
        ("--randaugment 2,31", "of magnitude M (0 to 30)"),
        ("--randaugment 0,9", "N operations (1 to 9)"),
        ("--randaugment 2,9.5", "is not N,M"),
        ("--randaugment=-2,9", "is not N,M"),
        ("--randaugment rand-m9-mstd0.5", "is not N,M"),
        ("--random-erasing 1.5", "--random-erasing: 1.5 is out of range"),
        ("--random-erasing nan", "--random-erasing: nan is not a finite number"),
        ("--reprob 0.25", "fastsmooth calls it --random-erasing"),
        ("--aa rand-m9", "--randaugment N,M does N random operations of magnitude M"),
    ],
)
def test_bad_values_are_refused_in_a_line(words, part):
    assert part in refused(main, words.split())


@pytest.mark.parametrize("flags", [{"randaugment": "2,9"}, {"random_erasing": 0.1}])
def test_published_constants_are_of_images_without(flags):
    plain = resolve({"dataset": "cifar100"})
    assert plain.c2 == 1280 and resolve({"dataset": "cifar100"} | flags).c2 is None


@pytest.mark.parametrize("flags", [{"randaugment": "2,9"}, {"random_erasing": 0.1}])
def test_a_direction_is_measured_on_the_images_that_its_buffer_is_made_of(flags):
    given = {"mode": "sampling", "optimizer": "shb"}
    assert not resolve(given).measure_augment and resolve(given | flags).measure_augment
    data = open_data(resolve(given | flags), CPU)
    assert data.train.changes is not None and data.test.changes is None
