"""Augmentation against torchvision on PIL images: the same numbers give the same pixels, drawn from
the same laws."""

import itertools
import math

import numpy as np
import pytest
import torch
from bounds import chi_square, chi_square_limit, ks, ks_limit, share_limit
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import functional as TF

from fastsmooth.data import augment
from fastsmooth.data.chunks import ChunkedLoader
from fastsmooth.data.engines.resident import ResidentLoader
from fastsmooth.data.engines.torchloader import TorchEngine
from fastsmooth.data.images import Split
from fastsmooth.data.index import NO_FILES
from fastsmooth.data.source import BadImages, Source
from fastsmooth.kernels.augment import sources_ref

CPU = torch.device("cpu")
MEAN = (0.5070751592371323, 0.48654887331495095, 0.4409178433670343)  # of CIFAR-100
STD = (0.2673342858792401, 0.2564384629170883, 0.27615047132568404)
PADDING = {8: 1, 32: 4, 33: 4}
SIZES = list(PADDING)
# width, height; torchvision falls back on some boxes
SHAPES = [(500, 375), (333, 500), (64, 64), (40, 160), (7, 10)]
EXTREME = [(1000, 20), (20, 1000), (1, 300), (300, 1), (1, 1), (4000, 1), (3, 2)]


def random_pixels(n: int, size: int, low: int = 0) -> np.ndarray:
    return np.random.default_rng(size).integers(low, 256, (n, size, size, 3), dtype=np.uint8)


def rows(size: int, n: int) -> torch.Tensor:
    """Drawn parameters, and after them the corners of their range."""
    drawn = augment.draw("crop-flip-rotate", size, 11, 3, torch.arange(n))
    ends = (0, 2 * PADDING[size])
    corners = itertools.product(ends, ends, (0, 1), (-15.0, -7.5, -1e-8, 0.0, 1e-8, 15.0))
    return torch.cat([drawn, torch.tensor(list(corners), dtype=torch.float64)])


def torchvision_image(
    image: Image.Image, row: list[float], size: int, rotate: bool = True
) -> Image.Image:
    """RandomCrop, RandomHorizontalFlip and RandomRotation as torchvision applies them, with given
    numbers."""
    top, left, flip, angle = row
    image = TF.crop(TF.pad(image, PADDING[size]), int(top), int(left), size, size)
    image = TF.hflip(image) if flip else image
    return image.rotate(angle, Image.Resampling.NEAREST, fillcolor=(0, 0, 0)) if rotate else image


def torchvision_tensor(image: Image.Image) -> torch.Tensor:
    return T.Normalize(MEAN, STD)(T.ToTensor()(image))


def both_loaders(pixels: np.ndarray, kind: str, seed: int = 0) -> list:
    split, size = Split(np.arange(len(pixels)), pixels), pixels.shape[1]
    engine = TorchEngine(
        Source(split, NO_FILES, kind, size, seed, BadImages("raise", print)),
        workers=0,
        pinned=False,
    )
    return [
        ResidentLoader(split, kind, seed, MEAN, STD, CPU),
        ChunkedLoader(engine, split.labels, size, 40, MEAN, STD, CPU),
    ]


@pytest.mark.parametrize("size", SIZES)
def test_crop_flip_rotate_gives_torchvisions_pixels(size):
    params = rows(size, 250).tolist()
    for array, row in zip(random_pixels(len(params), size), params, strict=True):
        image = Image.fromarray(array)
        expected = torchvision_image(image, row, size)
        assert np.array_equal(augment.crop_flip_rotate(image, row, size), expected), row


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rotate", [True, False])
def test_the_moves_look_up_torchvisions_pixels(size, rotate):
    params = rows(size, 700)
    if not rotate:
        params[:, 3] = 0
    pixels = random_pixels(len(params), size, low=1)  # no black pixel that could pass for the fill
    moves = augment.moves("crop-flip-rotate" if rotate else "crop-flip", size, params)
    assert moves.dtype == torch.int32 and moves.shape == (len(params), 8)
    index, inside = (found.numpy() for found in sources_ref(moves, size))
    for array, row, places, kept in zip(pixels, params.tolist(), index, inside, strict=True):
        with_fill = np.concatenate([array.reshape(-1, 3), np.zeros((1, 3), np.uint8)])
        expected = torchvision_image(Image.fromarray(array), row, size, rotate)
        found = with_fill[np.where(kept, places, size * size)]
        assert np.array_equal(found.reshape(size, size, 3), expected), row


def test_of_a_resized_crop_the_flip_alone_is_left():
    params = augment.draw("resized-crop-flip", 32, 0, 0, torch.arange(50))
    index, inside = sources_ref(augment.moves("resized-crop-flip", 32, params), 32)
    plain = torch.arange(32 * 32).view(32, 32)
    assert inside.all() and set(params[:, 0].tolist()) == {0.0, 1.0}
    for found, flip in zip(index, params[:, 0].tolist(), strict=True):
        assert torch.equal(found.view(32, 32), plain.flip(1) if flip else plain)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["none", "crop-flip", "crop-flip-rotate"])
def test_loaders_give_torchvisions_tensors_bit_for_bit(size, kind):
    n = 150
    pixels = random_pixels(n, size)
    index, epoch, seed = torch.randperm(n, generator=torch.Generator().manual_seed(0)), 6, 2**40 + 1
    params = augment.draw(kind, size, seed, epoch, torch.arange(n)).tolist()
    images = [Image.fromarray(array) for array in pixels]
    if kind != "none":
        rotate = kind == "crop-flip-rotate"
        images = [
            torchvision_image(image, row, size, rotate)
            for image, row in zip(images, params, strict=True)
        ]
    expected = torch.stack([torchvision_tensor(images[i]) for i in index.tolist()])
    for loader in both_loaders(pixels, kind, seed):
        x, y = (
            torch.cat(parts) for parts in zip(*loader.batches(index.split(64), epoch), strict=True)
        )
        assert x.dtype == torch.float32 and torch.equal(x, expected), type(loader).__name__
        assert torch.equal(y, index)


def test_real_images_equal_those_of_torchvisions_own_pipeline(cifar_folder, monkeypatch):
    paths = sorted(cifar_folder.glob("train/*/*.png"))[::5]
    images = [Image.open(path).convert("RGB") for path in paths]
    loader = both_loaders(
        np.stack([np.asarray(image) for image in images]), "crop-flip-rotate", seed=1
    )[0]
    (x, _), *_ = loader.batches([torch.arange(len(images))], epoch=2)
    params = augment.draw("crop-flip-rotate", 32, 1, 2, torch.arange(len(images))).tolist()
    for image, (top, left, flip, angle), ours in zip(images, params, x, strict=True):
        box, turn = (int(top), int(left), 32, 32), angle
        monkeypatch.setattr(T.RandomCrop, "get_params", staticmethod(lambda *_, box=box: box))
        monkeypatch.setattr(
            T.RandomRotation, "get_params", staticmethod(lambda *_, turn=turn: turn)
        )
        pipeline = [
            T.RandomCrop(32, padding=4),
            T.RandomHorizontalFlip(flip),
            T.RandomRotation(15),
            T.ToTensor(),
        ]
        assert torch.equal(ours, T.Compose([*pipeline, T.Normalize(MEAN, STD)])(image))


def test_images_that_are_evaluated_are_not_augmented():
    pixels = random_pixels(20, 32)
    expected = torch.stack([torchvision_tensor(Image.fromarray(array)) for array in pixels])
    for loader in both_loaders(pixels, "crop-flip-rotate"):
        (x, _), *_ = loader.batches([torch.arange(20)])
        assert torch.equal(x, expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["crop-flip", "crop-flip-rotate"])
def test_the_fill_is_black_before_normalisation(size, kind):
    pixels = np.full((64, size, size, 3), 255, np.uint8)
    black, white = (
        (torch.full((3,), v) - torch.tensor(MEAN)) / torch.tensor(STD) for v in (0.0, 1.0)
    )
    params = augment.draw(kind, size, 0, 0, torch.arange(64))
    for loader in both_loaders(pixels, kind):
        (x, _), *_ = loader.batches([torch.arange(64)], epoch=0)
        is_black, is_white = ((x == v[:, None, None]).all(1) for v in (black, white))
        assert (is_black | is_white).all() and is_black.any() and is_white.any()
        cut_above, cut_below = params[:, 0] == 0, params[:, 0] == 2 * PADDING[size]
        middle = size // 2  # of a row: rotation hardly moves it
        assert is_black[cut_above, 0, middle].all() and is_black[cut_below, -1, middle].all()
        assert cut_above.any() and cut_below.any()
        if kind == "crop-flip":  # what the crop leaves out is black, and nothing else
            kept = size - (params[:, :2] - PADDING[size]).abs()
            assert torch.equal(is_white.sum((1, 2)).double(), kept.prod(1))


@pytest.mark.parametrize("size", SIZES)
def test_crop_offsets_have_the_law_of_torchvisions_random_crop(size):
    n, spread = 4000, 2 * PADDING[size] + 1
    padded = torch.empty(3, size + spread - 1, size + spread - 1)
    torch.manual_seed(0)
    theirs = np.array([T.RandomCrop.get_params(padded, (size, size))[:2] for _ in range(n)])
    ours = augment.draw("crop-flip", size, 0, 0, torch.arange(n))[:, :2].long().numpy()
    for offsets in (ours, theirs):
        counts = np.bincount(offsets[:, 0] * spread + offsets[:, 1], minlength=spread**2)
        assert len(counts) == spread**2
        assert chi_square(counts, n / spread**2) < chi_square_limit(spread**2 - 1)
    for column in (0, 1):
        assert ks(ours[:, column], theirs[:, column]) < ks_limit(n, n)


def test_angles_have_the_law_of_torchvisions_random_rotation():
    n = 5000
    torch.manual_seed(0)
    theirs = [T.RandomRotation.get_params([-15.0, 15.0]) for _ in range(n)]
    ours = augment.draw("crop-flip-rotate", 32, 0, 0, torch.arange(n))[:, 3]
    assert -15 <= ours.min() < -14.9 and 14.9 < ours.max() <= 15
    assert ks(ours, theirs) < ks_limit(n, n)
    assert (augment.draw("crop-flip", 32, 0, 0, torch.arange(n))[:, 3] == 0).all()


@pytest.mark.parametrize(
    ("kind", "column"), [("crop-flip", 2), ("crop-flip-rotate", 2), ("resized-crop-flip", 0)]
)
def test_half_of_the_images_are_flipped(kind, column):
    n = 20_000
    flips = augment.draw(kind, 32, 0, 0, torch.arange(n))[:, column]
    assert set(flips.tolist()) == {0.0, 1.0}
    assert abs(flips.mean().item() - 0.5) < share_limit(n)


def test_offsets_flip_and_angle_are_independent():
    n = 20_000
    top, left, flip, angle = augment.draw("crop-flip-rotate", 32, 0, 0, torch.arange(n)).T
    cell = ((top * 9 + left) * 2 + flip) * 4 + ((angle + 15) / 7.5).floor().clamp(0, 3)
    counts = torch.bincount(cell.long(), minlength=9 * 9 * 2 * 4)
    assert chi_square(counts, n / len(counts)) < chi_square_limit(len(counts) - 1)


@pytest.mark.parametrize("kind", ["crop-flip-rotate", "resized-crop-flip"])
def test_parameters_of_other_samples_epochs_and_seeds_are_unrelated(kind):
    n = 5000
    index = torch.arange(n)
    keys = [
        (0, 0, index),
        (0, 1, index),
        (1, 0, index),
        (2**32, 0, index),
        (0, 0, index + n),
        (0, 0, index + 1),
    ]
    # each number of a sample one row
    draws = torch.cat([augment.draw(kind, 32, *key) for key in keys], dim=1).T
    correlation = torch.corrcoef(draws).fill_diagonal_(0)
    assert correlation.isfinite().all()
    assert correlation.abs().max() < 6 / math.sqrt(n)


def test_parameters_of_a_sample_do_not_depend_on_its_batch():
    for kind in ("crop-flip", "crop-flip-rotate", "resized-crop-flip"):
        whole = augment.draw(kind, 32, 3, 4, torch.arange(1000))
        index = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
        for batch_size in (1, 7, 1000):
            parts = [augment.draw(kind, 32, 3, 4, part) for part in index[:100].split(batch_size)]
            assert torch.equal(torch.cat(parts), whole[index[:100]])


def crop_boxes(shapes: list[tuple[int, int]], uniforms: torch.Tensor) -> torch.Tensor:
    width, height = torch.tensor(shapes).T
    boxes = augment.crop_boxes(width, height, uniforms)
    assert boxes.dtype == torch.int64 and boxes.shape == (len(shapes), 4)
    return boxes


def box_of_one(width: int, height: int, uniforms: list[float]) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop.get_params, as published, with given uniforms."""
    for area, ratio, at_y, at_x in np.reshape(uniforms, (10, 4)).tolist():
        target = width * height * (0.08 + area * (1.0 - 0.08))
        aspect = math.exp(math.log(3 / 4) + ratio * (math.log(4 / 3) - math.log(3 / 4)))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(at_y * (height - h + 1)), int(at_x * (width - w + 1)), h, w
    if width / height < 3 / 4:
        w, h = width, round(width / (3 / 4))
    elif width / height > 4 / 3:
        w, h = round(height * (4 / 3)), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def test_crop_boxes_of_many_images_are_those_of_torchvisions_loop_over_the_attempts():
    shapes = list(
        itertools.islice(itertools.cycle([*SHAPES, *EXTREME, (300, 400), (400, 300)]), 2600)
    )
    uniforms = augment.draw("resized-crop-flip", 224, 5, 1, torch.arange(len(shapes)))[:, 1:]
    expected = [
        box_of_one(*shape, row) for shape, row in zip(shapes, uniforms.tolist(), strict=True)
    ]
    assert [tuple(box) for box in crop_boxes(shapes, uniforms).tolist()] == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_crop_boxes_have_the_law_of_torchvisions_random_resized_crop(shape):
    n = 2500
    width, height = shape
    torch.manual_seed(0)
    image = torch.empty(3, 1, 1).expand(3, height, width)
    args = [0.08, 1.0], [3 / 4, 4 / 3]
    theirs = np.array([T.RandomResizedCrop.get_params(image, *args) for _ in range(n)])
    uniforms = augment.draw("resized-crop-flip", 224, 0, 0, torch.arange(n))[:, 1:]
    boxes = crop_boxes([shape] * n, uniforms).double().numpy()
    for name, value in {
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
        "height": lambda b: b[:, 2],
        "width": lambda b: b[:, 3],
        "area": lambda b: b[:, 2] * b[:, 3],
        "ratio": lambda b: b[:, 3] / b[:, 2],
        "place across": lambda b: b[:, 1] / np.maximum(width - b[:, 3], 1),
        "place down": lambda b: b[:, 0] / np.maximum(height - b[:, 2], 1),
    }.items():
        assert ks(value(boxes), value(theirs)) < ks_limit(n, n), name


@pytest.mark.parametrize("shape", EXTREME)
def test_boxes_of_extreme_images_fall_back_as_torchvision_does(shape):
    width, height = shape
    image = torch.empty(3, 1, 1).expand(3, height, width)
    torch.manual_seed(0)
    theirs = {
        T.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(300)
    }
    uniforms = augment.draw("resized-crop-flip", 224, 0, 0, torch.arange(300))[:, 1:]
    assert set(map(tuple, crop_boxes([shape] * 300, uniforms).tolist())) == theirs


def test_crop_boxes_lie_inside_the_image_whatever_was_drawn():
    low, high = 0.0, 1 - 2**-32
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 2**32, (60, 40), generator=generator).double() / 2**32
    corners = [
        list(corner) * 10
        for corner in itertools.product(
            (low, 0.5, high), (low, 0.5, high), (low, high), (low, high)
        )
    ]
    uniforms = torch.cat([drawn, torch.tensor(corners, dtype=torch.float64)])
    for width, height in [
        *SHAPES,
        *EXTREME,
        (2, 1),
        (1, 2),
        (20_000, 3),
        (3, 20_000),
        (12_000, 12_000),
    ]:
        top, left, h, w = crop_boxes([(width, height)] * len(uniforms), uniforms).T
        assert h.min() >= 1 and w.min() >= 1 and top.min() >= 0 and left.min() >= 0
        assert (top + h).max() <= height and (left + w).max() <= width


def test_crop_boxes_reach_every_edge_of_the_image():
    uniforms = augment.draw("resized-crop-flip", 224, 0, 0, torch.arange(4000))[:, 1:]
    top, left, h, w = crop_boxes([(20, 16)] * 4000, uniforms).T
    assert top.min() == left.min() == 0 and (top + h).max() == 16 and (left + w).max() == 20


def test_resized_crop_flip_gives_the_pixels_of_torchvisions_transform(monkeypatch):
    rng = np.random.default_rng(0)
    params = augment.draw("resized-crop-flip", 32, 0, 0, torch.arange(40))
    assert set(params[:, 0].tolist()) == {0.0, 1.0}
    shapes = [(50, 37), (37, 50), (20, 20), (200, 9)] * 10
    boxes = crop_boxes(shapes, params[:, 1:]).tolist()
    for flip, box, (width, height) in zip(params[:, 0].tolist(), boxes, shapes, strict=True):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        monkeypatch.setattr(
            T.RandomResizedCrop, "get_params", staticmethod(lambda *_, box=box: box)
        )
        pipeline = T.Compose([T.RandomResizedCrop(32), T.RandomHorizontalFlip(flip)])
        assert np.array_equal(augment.resized_crop_flip(image, box, flip, 32), pipeline(image))


@pytest.mark.parametrize(
    "shape", [(500, 375), (375, 500), (256, 256), (224, 224), (100, 80), (32, 32)]
)
def test_the_view_that_is_tested_is_torchvisions_resize_and_central_crop(shape):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (shape[1], shape[0], 3), dtype=np.uint8))
    for kind, size, short in [
        ("resized-crop-flip", 224, 256),
        ("crop-flip", 32, 32),
        ("none", 33, 33),
    ]:
        expected = T.Compose([T.Resize(short), T.CenterCrop(size)])(image)
        assert np.array_equal(augment.evaluation_view(image, kind, size), expected)


@pytest.mark.parametrize(
    "shape", [(500, 375), (375, 500), (256, 256), (224, 224), (100, 81), (32, 32), (1, 1), (1, 200)]
)
def test_the_views_of_the_sizes_alone_are_those_of_the_view_that_is_tested(shape):
    """What a decoder is told to do, done by PIL: the box, resized, and the pixels that are kept of
    it."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (shape[1], shape[0], 3), dtype=np.uint8))
    for kind, size in [("resized-crop-flip", 224), ("crop-flip", 32), ("none", 33)]:
        views = augment.views(kind, size, None, *torch.tensor([shape]).T)
        (top, left, height, width), (tall, wide), (down, right) = (v[0].tolist() for v in views)
        assert (top, left, width, height) == (0, 0, *shape)
        found = image.resize((wide, tall), Image.Resampling.BILINEAR).crop(
            (right, down, right + size, down + size)
        )
        assert np.array_equal(found, augment.evaluation_view(image, kind, size))
