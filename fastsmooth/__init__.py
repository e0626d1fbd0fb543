"""fastsmooth: train image classifiers under noise schedules and measure how far the noise smooths
the loss.

    import fastsmooth as fs

Nothing of it costs time before it is used: what __all__ lists is imported when it is asked for, and
so is torch, which schedules and run folders do without. docs/python.md has an example of each.

`fs.loss_sharpness` is the function that measures sharpness. `fastsmooth.sharpness` is the module of
the command of that name, wherever and whenever it is imported; it is never the function.
"""

from importlib import import_module as _import_module
from os import PathLike as _PathLike
from pathlib import Path as _Path
from typing import TYPE_CHECKING
from typing import Any as _Any

if TYPE_CHECKING:
    import torch

    from fastsmooth.data import Data
    from fastsmooth.driving import BatchSchedule, torch_lr_scheduler
    from fastsmooth.models import build as build_model
    from fastsmooth.noise import estimators
    from fastsmooth.noise.estimators import Estimate
    from fastsmooth.noise.gradients import full_gradient
    from fastsmooth.noise.online import NoiseTracker
    from fastsmooth.noise.persample import sample_norms
    from fastsmooth.noise.sharpness import loss_sharpness
    from fastsmooth.optim import NoisySGD
    from fastsmooth.report.runs import load_runs
    from fastsmooth.schedule import Point, Schedule, Smoothing
    from fastsmooth.trained import load_run

__version__ = "0.1.0"
__all__ = [
    "BatchSchedule",
    "Estimate",
    "NoiseTracker",
    "NoisySGD",
    "Point",
    "Schedule",
    "Smoothing",
    "__version__",
    "build_model",
    "estimators",
    "full_gradient",
    "load_run",
    "load_runs",
    "loss_sharpness",
    "open_data",
    "sample_norms",
    "torch_lr_scheduler",
]

# The kernels stand in a top-level folder of the checkout; an installed copy has them inside the
# package already.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file():
    __path__.append(str(_root))

# name here -> the module it is in, and its name there; without one it is the module
_HOMES = {
    "BatchSchedule": ("driving", "BatchSchedule"),
    "Estimate": ("noise.estimators", "Estimate"),
    "NoiseTracker": ("noise.online", "NoiseTracker"),
    "NoisySGD": ("optim", "NoisySGD"),
    "Point": ("schedule", "Point"),
    "Schedule": ("schedule", "Schedule"),
    "Smoothing": ("schedule", "Smoothing"),
    "build_model": ("models", "build"),
    "estimators": ("noise.estimators", ""),
    "full_gradient": ("noise.gradients", "full_gradient"),
    "load_run": ("trained", "load_run"),
    "load_runs": ("report.runs", "load_runs"),
    "loss_sharpness": ("noise.sharpness", "loss_sharpness"),
    "sample_norms": ("noise.persample", "sample_norms"),
    "torch_lr_scheduler": ("driving", "torch_lr_scheduler"),
}


def __getattr__(name: str) -> _Any:
    """What __all__ lists, imported the first time (PEP 562)."""
    if name == "sharpness":
        raise AttributeError(
            "fastsmooth.sharpness is the module of a command, which `import fastsmooth.sharpness` "
            "imports: the function is fastsmooth.loss_sharpness"
        )
    if name not in _HOMES:
        raise AttributeError(f"module 'fastsmooth' has no attribute {name!r}")
    place, there = _HOMES[name]
    module = _import_module(f"fastsmooth.{place}")
    globals()[name] = value = getattr(module, there) if there else module
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def open_data(
    dataset: str | None = None,
    data_dir: "str | _PathLike[str] | None" = None,
    *,
    image_size: int | None = None,
    augment: str | None = None,
    loader: str = "auto",
    device: "str | torch.device" = "auto",
    seed: int = 0,
    **flags: _Any,
) -> "Data":
    """A data set behind its loaders, as fastsmooth.train opens it.

        data = fs.open_data("cifar100", "data/")
        x, y = next(data.train.batches(torch.randperm(len(data.train)).split(128), epoch=0))

    Args:
        dataset: digits (shipped), cifar10, cifar100 (downloaded to data_dir if absent),
            torchvision/NAME, or the form of what lies in data_dir: imagenet, tiny-imagenet, folder,
            table, webdataset, parquet, arrow or npz (docs/data.md). None recognises it; without a
            data_dir it is digits.
        image_size: pixels a side; None: the data set's, of a folder what its images call for.
        augment: none, crop-flip, crop-flip-rotate or resized-crop-flip; None: the data set's.
        loader: auto, resident, dali, threads or torch.
        device: that of the batches: auto, cpu, cuda, cuda:N or mps.
        seed: of the augmentation, which is a function of (seed, epoch, sample).
        flags: any other flag of fastsmooth.train about data, such as workers=4, and randaugment and
            random_erasing.

    Returns Data: train and test, whose batches(indices, epoch) give x, float32 [B, C, S, S]
    normalised, and y, int64 [B], augmented unless epoch is None; classes, size, channels (C: 1 of
    grey arrays, else 3) and more. Raises
    ValueError: ConfigError for values that no flag takes, with what may have been meant, DataError
    for images that cannot be read.
    """
    import dataclasses

    import torch

    from fastsmooth import data
    from fastsmooth.cli import config, parse
    from fastsmooth.cli.device import pick_device
    from fastsmooth.names import about_value

    of_data = [name for name, f in config.FIELDS.items() if f.metadata["group"] == "data"]
    of_data += ["randaugment", "random_erasing"]
    for name in flags:
        if name not in of_data:
            raise config.ConfigError(f"open_data: {name}: {about_value('', name, of_data)}")
    named: dict[str, _Any] = {"dataset": dataset, "image-size": image_size, "augment": augment}
    named |= {"loader": loader, "device": str(device), "seed": seed, **flags}
    named["data-dir"] = data_dir and str(data_dir)
    given = {name: value for name, value in named.items() if value is not None}
    c = config.resolve(parse.from_table(parse.parser(), given, "open_data"))
    if c.sizes.changes:
        raise config.ConfigError(
            f"open_data: image_size {c.image_size}: sizes that change are those of a run: give one"
        )
    images = data.read_set(c)
    if c.dataset == "auto":
        c = dataclasses.replace(c, dataset=images.layout)
    if not (c.image_size and c.augment):
        c = config.fitted(c, data.usual_side(images))
    c = dataclasses.replace(c, model="")  # no model is there that might want other channels
    return data.open_data(c, pick_device(c.device, torch), images=images)
