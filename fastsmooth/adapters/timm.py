"""Gradient noise in timm's own train.py, which need not be changed:

    python -m fastsmooth.adapters.timm --track-noise every=50 -- train.py DATA ARGS

The script is loaded as a module, its train_one_epoch() is watched while it runs, and its main() is
called. A line of its log tells of each measurement; summary.csv gets the columns train_noise_c2 and
train_noise_delta, means of the epoch, and train_noise_scale, of its last measurement.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import logging
import math
import sys
from argparse import SUPPRESS
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from fastsmooth.adapters.common import Numbers, OfEach, Watch
from fastsmooth.cli.flags import ConfigError, Parser
from fastsmooth.messages import BAD_INPUT, DONE, command, end_with, show, tell
from fastsmooth.noise.aside import instead
from fastsmooth.noise.losses import NotCovered
from fastsmooth.noise.online import ESTIMATORS, MODES, Every, NoiseTracker
from fastsmooth.noise.quantities import QUANTITIES

NEEDED = ("epoch", "model", "loader", "optimizer", "args")  # of train_one_epoch's arguments
# of a measurement: what stands before it, its column and its form
SAID = (
    ("  C2: ", "c2_sampled", ".4g"),
    (" +- ", "c2_sampled_se", ".2g"),
    ("  Scale: ", "noise_scale", ".4g"),
    ("  Delta: ", "delta_measured", ".4g"),
)
MEANS = {"noise_c2": "noise/c2_sampled", "noise_delta": "noise/delta_measured"}


class EpochWatch:
    """Stands in the place of a script's train_one_epoch, and calls it.

    Args: plain, the script's; log, of a line of text; options, NoiseTracker's own.

    `watch.noise` is the NoiseTracker, from the first epoch on. Raises NotCovered, a ValueError, for
    a training that cannot be measured.
    """

    watch: Watch

    def __init__(self, plain: Callable[..., Any], log: Callable[[str], None], **options: Any):
        self.plain, self.say, self.options = plain, log, options
        self.signature = inspect.signature(plain)
        self.began = False
        self.epoch = 0
        self.rows: list[Numbers] = []  # of this epoch

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if not self.began:
            self.begin(given)
        self.epoch, self.rows = given["epoch"], []
        with self.watched(given):
            metrics = self.plain(*bound.args, **bound.kwargs)
        self.watch.noise.end_epoch()
        if isinstance(metrics, dict):
            metrics.update(self.of_epoch())
        return metrics

    def begin(self, given: Mapping[str, Any]) -> None:
        """Make the tracker, by the arguments of the first call. Raises NotCovered."""
        args, loader = given["args"], given["loader"]
        check_batches(given)
        task = given.get("task")
        criterion = given.get("loss_fn") if task is None else getattr(task, "criterion", None)
        if criterion is None:
            raise NotCovered(
                f"{type(task).__name__} has no criterion(output, target), which is measured"
            )
        # the rest are means that have no reduction
        loss = criterion if isinstance(criterion, nn.CrossEntropyLoss) else OfEach(criterion)
        model = given["model"] if task is None else task.get_trainable_module()
        try:
            noise = NoiseTracker(
                model,
                given["optimizer"],
                samples=len(loader.dataset),
                loss=loss,
                clips=getattr(args, "clip_grad", None) is not None,
                **self.options,
            )
        except ValueError as error:
            raise NotCovered(str(error)) from error
        updates = -(-len(loader) // getattr(args, "grad_accum_steps", 1))
        noise.resume_at(given["epoch"] * updates, given["epoch"])
        log = functools.partial(self.log, getattr(args, "rank", 0) == 0)
        self.watch = Watch(noise, log, given.get("amp_autocast") or contextlib.nullcontext)
        self.began = True

    @contextlib.contextmanager
    def watched(self, given: dict[str, Any]) -> Iterator[None]:
        """Inside, the task (or the model and the loss) and the optimizer of a call tell of what
        they get; `given` is changed to a loss and a scaler that do."""
        optimizer, scaler = given["optimizer"], given.get("loss_scaler")
        step = functools.partial(self.step, optimizer.step)
        with contextlib.ExitStack() as stack:
            stack.enter_context(instead(optimizer, "step", step))
            if scaler is not None:
                given["loss_scaler"] = functools.partial(self.scaled, scaler)
            if given.get("task") is not None:
                hook = given["task"].register_forward_hook(self.after_task)
            else:
                inputs: list[Tensor] = []
                hook = given["model"].register_forward_pre_hook(
                    lambda module, args: inputs.append(args[0]) if module.training else None
                )
                given["loss_fn"] = functools.partial(self.after_loss, given["loss_fn"], inputs)
            stack.callback(hook.remove)
            yield

    def after_task(self, task: nn.Module, args: tuple[Any, ...], result: dict[str, Tensor]) -> None:
        """Of a task(input, target) that has given its result."""
        if not self.watch.noise.wants_next:
            return
        x, y = args
        if "output" not in result:
            raise NotCovered(f"{type(task).__name__} gives no output, of which its loss is made")
        with torch.no_grad():
            value, own = result["loss"], self.watch.noise.loss(result["output"], y).mean()
        if not math.isclose(value.item(), own.item(), rel_tol=1e-3) and value.isfinite():
            raise NotCovered(
                f"{type(task).__name__} trains on a loss of {value.item():.4g} where its "
                f"criterion(output, target) is {own.item():.4g}: a task with other losses than its "
                "criterion, as distillation, is not measured"
            )
        self.watch.batch(x, y)

    def after_loss(
        self, plain: Callable[..., Tensor], inputs: list[Tensor], output: Tensor, target: Tensor
    ) -> Tensor:
        """The loss_fn of an older script, where that is not in a task; `inputs` are those of the
        model since the last call."""
        x = inputs[-1]
        inputs.clear()
        self.watch.batch(x, target)
        return plain(output, target)

    def step(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The optimizer's, of an update that has come."""
        self.watch.before_update()
        return plain(*args, **kwargs)

    def scaled(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The script's scaler of float16, which leaves an update out where gradients overflow."""
        update = self.watch.noise.update
        result = plain(*args, **kwargs)
        if kwargs.get("need_update", True) and self.watch.noise.update == update:
            self.watch.forget()
            self.watch.before_update()
        return result

    def log(self, primary: bool, numbers: Numbers) -> None:
        """Of a measurement, on every process; one says it."""
        self.rows.append(numbers)
        words = [
            f"{before}{numbers[f'noise/{name}']:{form}}"
            for before, name, form in SAID
            if f"noise/{name}" in numbers
        ]
        if primary:
            self.say(f"Noise: {self.epoch} [{self.watch.noise.update - 1:>4d}]{''.join(words)}")

    def of_epoch(self) -> dict[str, float | None]:
        """What is added to an epoch's metrics, the same keys each time; None of what was not
        measured in it."""
        found: dict[str, float | None] = {}
        for name, key in MEANS.items():
            values = [row[key] for row in self.rows if key in row]
            found[name] = math.fsum(values) / len(values) if values else None
        scales = [row["noise/noise_scale"] for row in self.rows if "noise/noise_scale" in row]
        return found | {"noise_scale": scales[-1] if scales else None}


def check_batches(given: Mapping[str, Any]) -> None:
    """Raises NotCovered for arguments of train_one_epoch by which the gradient of an update is not
    the mean of those of its samples, or these are no independent draws."""
    args = given["args"]
    if given.get("naflex_mode"):
        raise NotCovered(
            "--naflex-loader: batches are dicts of patches, not a tensor [B, ...]: measure without"
        )
    if given.get("scheduled_batch_mode"):
        scale = getattr(args, "variable_batch_loss_scale", None)
        if scale not in (None, "none") or getattr(args, "grad_accum_steps", 1) > 1:
            raise NotCovered(
                "--train-img-sizes: batches of several sizes, whose losses are scaled or "
                "accumulated, are no mean over their samples: measure without "
                "--variable-batch-loss-scale and --grad-accum-steps"
            )
    for name in ("aug_repeats", "aug_splits"):
        if getattr(args, name, 0):
            flag = f"--{name.replace('_', '-')}"
            raise NotCovered(
                f"{flag}: a batch has the same sample several times, which are no independent "
                f"draws: measure without {flag}"
            )
    mixed = getattr(args, "mixup", 0) or getattr(args, "cutmix", 0)
    off = getattr(args, "mixup_off_epoch", 0)
    if (mixed or getattr(args, "cutmix_minmax", None)) and not 0 < off <= given["epoch"]:
        raise NotCovered(
            "--mixup, --cutmix: the samples of a batch are mixed in pairs, by a number that they "
            "share, and are no independent draws: measure without, or a training that is taken up "
            "after --mixup-off-epoch"
        )


# The command


def parser() -> Parser:
    p = Parser(
        prog=command("adapters.timm"),
        usage="%(prog)s --track-noise WHEN [flags] -- train.py ARGS",
        description="timm's own train.py with measurements of its gradient noise.",
        argument_default=SUPPRESS,
        add_help=False,
    )
    add = p.add_argument
    add("--track-noise", type=str, metavar="WHEN", help="every=50 updates, every=2ep")
    add("--estimator", choices=ESTIMATORS, help="auto: per-sample where BatchNorm allows it")
    add("--bn", choices=MODES, help="BatchNorm while measuring (train)")
    add("--quantities", nargs="+", choices=tuple(QUANTITIES), metavar="NAME", help="what else")
    add("-h", "--help", action="store_true", help="this page")
    return p


def parse(argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """(options of EpochWatch, the script and its arguments); without the latter where help is
    asked for. Raises ConfigError."""
    where = argv.index("--") if "--" in argv else len(argv)
    options, script = vars(parser().parse_args(argv[:where])), argv[where + 1 :]
    if options.pop("help", False):
        return {}, []
    if "track_noise" not in options:
        raise ConfigError("--track-noise: say when to measure, as in --track-noise every=50")
    if not script:
        raise ConfigError("no script: give timm's train.py and its arguments after --")
    every = options.pop("track_noise")
    try:
        Every.parse(every)
    except ValueError as error:
        raise ConfigError(f"--track-noise {error}") from None
    return {"every": every, **options}, script


def loaded(path: Path) -> ModuleType:
    """The script as a module, which can be found by its name, as workers of a DataLoader do. Raises
    ConfigError for one that is no training script of timm, and what the script raises."""
    if not path.is_file():
        raise ConfigError(f"{path}: there is no such script: give the path of timm's train.py")
    sys.path.insert(0, str(path.parent.resolve()))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is no Python script: give timm's train.py")
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plain = getattr(module, "train_one_epoch", None)
    if not (callable(plain) and callable(getattr(module, "main", None))):
        raise ConfigError(f"{path} has no train_one_epoch() and main(): give timm's train.py")
    names = inspect.signature(plain).parameters
    if not ({*NEEDED} <= {*names} and {"task", "loss_fn"} & {*names}):
        raise ConfigError(
            f"{path}: train_one_epoch() takes {' '.join(names)}, and not {' '.join(NEEDED)} and "
            "task or loss_fn, as in timm's train.py"
        )
    return module


def main(argv: list[str] | None = None) -> int:
    """Run the script of a command line; the exit code. What is wrong with our flags or cannot be
    measured is one line on stderr; what the script raises, its SystemExit too, goes on."""
    try:
        options, script = parse(sys.argv[1:] if argv is None else argv)
        if not script:
            show(*parser().format_help().splitlines())
            return DONE
        module = loaded(Path(script[0]))
        watch = EpochWatch(module.train_one_epoch, logger_of(module).info, **options)
        module.train_one_epoch = watch  # type: ignore[attr-defined]
        with instead(sys, "argv", script):
            module.main()
    except (ConfigError, NotCovered) as error:
        tell("error", error)
        return BAD_INPUT
    return DONE


def logger_of(module: ModuleType) -> logging.Logger:
    """The script's own, else one of its name."""
    return getattr(module, "_logger", None) or logging.getLogger(module.__name__)


if __name__ == "__main__":
    end_with(main)
