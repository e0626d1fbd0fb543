"""What is known of the data sets before any of them is opened, and the constants that were
published of them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

SMALLEST_IMAGE, LARGEST_IMAGE = 8, 1024  # pixels a side
PAPER: dict[str, Any] = {
    "epochs": 200,
    "lr": 0.1,
    "batch_size": 32,
    "min_epochs": 11,
    "steps": (10_000,),
}
CIFAR = PAPER | {"model": "resnet18", "image_size": 32}


@dataclass(frozen=True)
class SetFacts:
    """Sizes that --plan needs, and the defaults a data set brings along."""

    train: int | None  # images in the training split; None: only the folder knows
    test: int | None
    classes: int | None
    defaults: dict[str, Any]


DIGITS: dict[str, Any] = {"model": "resnet8", "image_size": 8, "augment": "none"}
DIGITS |= {"epochs": 15, "lr": 0.1, "batch_size": 32, "min_epochs": 1, "steps": (200,)}
IMAGENET = PAPER | {"model": "torchvision/resnet34", "image_size": 224}
IMAGENET |= {"augment": "resized-crop-flip", "batch_size": 256, "steps": (1000,)}
# what is empty the images say, once they are there
FOLDER = PAPER | {"model": "", "image_size": 0, "augment": ""}
FOLDER |= {"epochs": 20, "min_epochs": 1, "steps": (200,)}
ARRAYS = FOLDER | {"augment": "crop-flip"}
TORCHVISION = "torchvision/NAME"  # the row of all data sets of torchvision
# the data sets of torchvision that are files; the others are arrays of pixels
PHOTOGRAPHS = {
    "Caltech101", "Caltech256", "CLEVRClassification", "Country211", "DTD", "EuroSAT",
    "FGVCAircraft", "Flowers102", "Food101", "GTSRB", "Imagenette", "OxfordIIITPet",
    "RenderedSST2", "StanfordCars", "SUN397",
}  # fmt: skip
# those whose mirror images are others, or none: digits, letters, signs and words
HANDED = {
    "EMNIST", "GTSRB", "KMNIST", "MNIST", "QMNIST", "RenderedSST2", "SEMEION", "SVHN", "USPS",
}  # fmt: skip
SETS = {
    "digits": SetFacts(1437, 360, 10, DIGITS),
    "cifar10": SetFacts(50_000, 10_000, 10, CIFAR | {"augment": "crop-flip"}),
    "cifar100": SetFacts(50_000, 10_000, 100, CIFAR | {"augment": "crop-flip-rotate"}),
    "imagenet": SetFacts(1_281_167, 50_000, 1000, IMAGENET),
    "tiny-imagenet": SetFacts(100_000, 10_000, 200, FOLDER | {"image_size": 64}),
    "folder": SetFacts(None, None, None, FOLDER),
    "table": SetFacts(None, None, None, FOLDER),
    "webdataset": SetFacts(None, None, None, FOLDER),
    "parquet": SetFacts(None, None, None, FOLDER),
    "arrow": SetFacts(None, None, None, FOLDER),
    "npz": SetFacts(None, None, None, ARRAYS),
    TORCHVISION: SetFacts(None, None, None, ARRAYS),
    "auto": SetFacts(None, None, None, FOLDER),  # which of these lies in --data-dir
}
ARRAY_SETS = {"npz", TORCHVISION}  # of pixels, of any size
FILE_SETS = SETS.keys() - ARRAY_SETS - {"digits", "cifar10", "cifar100"}  # of encoded images
# which may come without a split into training and test images
UNSPLIT_SETS = {"auto", "folder", "table", "webdataset", "parquet", "arrow", "npz", TORCHVISION}


class DataSets(tuple[str, ...]):
    """The names that --dataset takes."""

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and row_of(name) in tuple(self)


def row_of(dataset: str) -> str:
    """The row of SETS for what --dataset says."""
    return TORCHVISION if dataset.startswith("torchvision/") else dataset


def in_torchvision(dataset: str) -> str:
    """What torchvision calls it, less the part that is meant of EMNIST; "" of other data sets."""
    return dataset.removeprefix("torchvision/").partition("-")[0] * ("/" in dataset)


def is_among(dataset: str, names: Collection[object]) -> bool:
    """Whether `names`, of rows of SETS, have what --dataset says. What holds for class folders
    holds for the image files of torchvision."""
    photographs = in_torchvision(dataset) in PHOTOGRAPHS
    return row_of(dataset) in names or (photographs and "folder" in names)


def defaults_of(dataset: str) -> dict[str, Any]:
    """What the data set brings along; what is empty its images say."""
    name = in_torchvision(dataset)
    defaults = FOLDER if name in PHOTOGRAPHS else SETS[row_of(dataset)].defaults
    return defaults | {"augment": "none"} if name in HANDED else defaults


# The networks that images call for, by the largest size each is for, in pixels a side.
NETWORKS = {16: "resnet20", 64: "resnet18", LARGEST_IMAGE: "torchvision/resnet34"}
# images up to SMALL are taken as they are, others in steps of STEP up to USUAL
SMALL, USUAL = 64, 224
STEP = 32
# Published bounds (data set, optimizer, model, lr, momentum) -> (C^2, K^2), from critical batch
# sizes at eps 0.5; they say nothing of another data set, network, learning rate or momentum.
PUBLISHED: dict[tuple[str, str, str, float, float], tuple[float, float | None]] = {
    # arXiv 2402.02325 and its reviews; its code (main.py at 1f49b05) has all digits
    ("cifar100", "sgd", "resnet18", 0.1, 0.0): (1280.0, None),
    ("cifar100", "shb", "resnet18", 0.1, 0.9): (25.318, 1.77**2),
    ("cifar100", "nshb", "resnet18", 0.1, 0.9): (128.0, 4.5**2),
    ("cifar100", "sgd", "wrn-28-10", 0.1, 0.0): (10.0, None),
    ("cifar100", "shb", "wrn-28-10", 0.1, 0.9): (0.79, 1.66**2),  # the code
    ("cifar100", "nshb", "wrn-28-10", 0.1, 0.9): (1.0, 4.262**2),
}
# What else the published code trained with: another value is another gradient noise.
PUBLISHED_WITH = {
    "augment": "crop-flip-rotate", "norm": "batch", "weight_decay": 0.0, "init": None,
    "extend": None, "freeze": None, "mixup": 0.0, "cutmix": 0.0, "randaugment": None,
    "random_erasing": 0.0,
    "label_smoothing": 0.0, "loss": "cross-entropy",
}  # fmt: skip
# of the published code, some without effect
PUBLISHED_FLAGS = {"decay_epoch", "power", "beta", "nu", "eps", "steps"}

# The flags of public references, by the name of the recipe; docs/train.md has sources, and what
# differs.
RECIPES: dict[str, dict[str, Any]] = {
    # github.com/kuangliu/pytorch-cifar, main.py at 49b7aa9
    "pytorch-cifar": {
        "method": "cosine", "epochs": 200, "lr": 0.1, "batch_size": 128, "optimizer": "shb",
        "beta": 0.9, "weight_decay": 5e-4, "augment": "crop-flip",
    },
    # github.com/weiaicunzai/pytorch-cifar100, train.py and conf/global_settings.py at 11d8418
    "weiaicunzai": {
        "method": "step", "milestones": ("30%", "60%", "80%"), "factor": 0.2, "warmup": "1ep",
        "epochs": 200, "lr": 0.1, "batch_size": 128, "optimizer": "shb", "beta": 0.9,
        "weight_decay": 5e-4, "augment": "crop-flip-rotate",
    },
    # arXiv 2110.00476, table 2, procedure A3
    "timm-a3": {
        "model": "timm/resnet50", "image_size": 160, "augment": "resized-crop-flip",
        "method": "cosine", "warmup": "5ep", "epochs": 100, "lr": 8e-3, "batch_size": 2048,
        "optimizer": "timm/lamb", "weight_decay": 0.02, "decay_weights_only": True, "loss": "bce",
        "mixup": 0.1, "cutmix": 1.0, "randaugment": "2,6",
    },
}  # fmt: skip
