"""Sharpness of saved runs: python -m fastsmooth.sharpness RUN... [flags]

How much the loss rises when the weights move, on average (avg_l2, avg_linf) or at worst (m_apgd_l2,
m_apgd_linf), after Andriushchenko et al. 2023 (arXiv 2302.07011). Without flags it is what arXiv
2311.08745 reports: adaptive m_apgd_linf with rho 0.0002 on the first 1024 training images in
batches of 128, without augmentation, BatchNorm in eval mode.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from argparse import SUPPRESS, BooleanOptionalAction
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as in fastsmooth.train, before torch is imported

import torch
from torch import nn

from fastsmooth import data, models
from fastsmooth.cli import flags as flag_types
from fastsmooth.cli import parse as parsing
from fastsmooth.cli.config import Config
from fastsmooth.cli.flags import ConfigError
from fastsmooth.data.order import in_order
from fastsmooth.messages import (
    BAD_INPUT,
    DONE,
    command,
    end_with,
    exit_code,
    failure,
    one_line,
    printable,
    say,
    show,
    tell,
    warn,
)
from fastsmooth.noise.sharpness import ALGORITHMS, Setting, Sharpness, average, sharpness
from fastsmooth.processors import keep_within_quota
from fastsmooth.runfolder.checkpoint import CheckpointError, Checkpoints
from fastsmooth.runfolder.files import finite, read_object
from fastsmooth.runfolder.write import RunFolder, RunFolderError
from fastsmooth.terminal import Table, columns

PUBLISHED_RHO = {"m_apgd_linf": 0.0002}
SCANNED_RHO = {  # by the authors of the algorithms
    "avg_l2": "0.05 0.1 0.2 0.4",
    "avg_linf": "0.1 0.2 0.4 0.8",
    "m_apgd_l2": "0.25 0.5 1 2",
    "m_apgd_linf": "0.0005 0.001 0.002 0.004",
}


@dataclass(frozen=True)
class Request:
    """What a command line asks for."""

    runs: tuple[Path, ...]
    setting: Setting
    rho: tuple[float, ...]
    samples: int
    batch: int
    test: bool
    augment: bool
    device: str
    data_dir: str | None
    json: bool

    @property
    def split(self) -> str:
        return "test" if self.test else "train"

    def described(self) -> str:
        s = self.setting
        words = [("adaptive " if s.adaptive else "") + s.algorithm]
        words.append(
            f"{s.n_iters} {'draws' if s.algorithm.startswith('avg') else 'iterations'} a batch"
        )
        words.append(
            f"the first {self.samples:,} {'test' if self.test else 'training'} images in batches "
            f"of {self.batch}"
        )
        words += ["augmented"] * self.augment + ["normalized logits"] * s.normalize_logits
        words += [f"random start, {s.restarts} restart{'s' * (s.restarts > 1)}"] * s.random_start
        return ", ".join(words) + "; value +- standard error over batches"


def parser() -> flag_types.Parser:
    p = flag_types.Parser(
        prog=command("sharpness"),
        usage="%(prog)s RUN... [flags]",
        description="Sharpness at the newest checkpoint of run folders. Without flags: as arXiv "
        "2311.08745 reports it.",
        add_help=False,
    )
    d = Setting()
    add = p.add_argument
    # fmt: off
    add("runs", nargs="*", metavar="RUN", type=flag_types.text, help="run folders that "
                                                                     "fastsmooth.train wrote")
    add("--algorithm", default=d.algorithm, choices=ALGORITHMS, metavar="NAME", help=f"{' '.join(ALGORITHMS)} "
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     ""
                                                                                     f"({d.algorithm})")
    add("--rho", nargs="+", type=flag_types.positive, metavar="X", help="how far weights move, measured for each X by itself. avg_l2: standard deviation of every coordinate; avg_linf, m_apgd_linf: bound of every coordinate; m_apgd_l2: L2 length of the whole; adaptive: of each in units of |w| (0.0002 for m_apgd_linf)")
    add("--adaptive", default=d.adaptive, action=BooleanOptionalAction, help="in units of each weight's size, as published (on)")
    add("--normalize-logits", action="store_true", help="logits without their mean and of length 1")
    add("--n-iters", default=d.n_iters, type=flag_types.whole(1), metavar="N", help=f"m_apgd: iterations; avg: draws ({d.n_iters})")
    add("--restarts", "--n-restarts", default=d.restarts, type=flag_types.whole(1), metavar="N", help=f"m_apgd: the worst of N random starts ({d.restarts})")
    add("--step-size-mult", default=d.step_size_mult, type=flag_types.positive, metavar="X", help="m_apgd: the first step in units of 2 rho (1)")
    add("--random-start", "--sharpness-rand-init", action="store_true", help="m_apgd: start at a random perturbation")
    add("--samples", "--n-eval-sharpness", default=1024, type=flag_types.whole(1), metavar="N", help="the first N images (1024)")
    add("--batch", "--bs-sharpness", default=128, type=flag_types.whole(1), metavar="M", help="images a batch, each perturbed for itself: the m of m-sharpness (128)")
    add("--test", "--sharpness-on-test-set", action="store_true", help="on test images")
    add("--augment", "--data-augm-sharpness", action="store_true", help="augmented as the run trained, by the numbers of epoch --seed")
    add("--seed", default=d.seed, type=flag_types.whole(0, 2**32 - 1), metavar="N", help=f"of draws, random starts and augmentation ({d.seed})")
    add("--device", default="auto", type=flag_types.device, metavar="DEV", help="auto, cpu, cuda, cuda:N or mps (auto)")
    add("--data-dir", type=flag_types.text, metavar="DIR", help="where the run's images are now (as in its config.json)")
    add("--json", action="store_true", help="one JSON object a result")
    add("-h", "--help", action="store_true", default=SUPPRESS, help="this page")
    # fmt: on
    return p


def parse(argv: list[str]) -> Request | None:
    """The request of a command line; None where it asks for help. Raises ConfigError."""
    given = vars(parser().parse_args([flag_types.plain(word) for word in argv]))
    if given.pop("help", False):
        return None
    setting = Setting(**{f.name: given.pop(f.name) for f in dataclasses.fields(Setting)})
    runs, rho = given.pop("runs"), given.pop("rho")
    if not runs:
        raise ConfigError(
            f"no run is named: {command('sharpness')} RUN, a folder that fastsmooth.train wrote"
        )
    check(setting)
    if rho is None and setting.algorithm not in PUBLISHED_RHO:
        raise ConfigError(
            f"--algorithm {setting.algorithm} needs --rho, since none is published for it; "
            f"its authors scan {SCANNED_RHO[setting.algorithm]}"
        )
    rho = rho or [PUBLISHED_RHO[setting.algorithm]]
    if len(set(rho)) < len(rho):
        raise ConfigError("--rho names a value more than once: give every value once")
    if given["samples"] % given["batch"]:
        raise ConfigError(
            f"--samples {given['samples']} is no multiple of --batch {given['batch']}, and a smaller batch is another "
            f"m-sharpness: give --samples {max(given['samples'] // given['batch'], 1) * given['batch']}"
        )
    return Request(runs=tuple(map(Path, runs)), setting=setting, rho=tuple(rho), **given)


def check(s: Setting) -> None:
    """Refuse flags that would change nothing."""
    idle = {
        "--restarts": s.restarts > 1,
        "--random-start": s.random_start,
        "--step-size-mult": s.step_size_mult != 1,
    }
    named = next((name for name, given in idle.items() if given), None)
    if ALGORITHMS[s.algorithm][0] is average and named:
        raise ConfigError(
            f"{named} has no effect with --algorithm {s.algorithm}: it needs m_apgd_l2 or m_apgd_linf"
        )
    if s.restarts > 1 and not s.random_start:
        raise ConfigError(
            f"--restarts {s.restarts} would climb the same way {s.restarts} times: add --random-start"
        )


def main(argv: list[str] | None = None) -> int:
    """Measure every run of a command line; the exit code. A run that cannot be measured is one line
    on stderr."""
    return exit_code(lambda: carry_out(sys.argv[1:] if argv is None else argv), (ConfigError,))


def carry_out(argv: list[str]) -> int:
    request = parse(argv)
    if request is None:
        show(*parser().format_help().splitlines())
        return DONE
    keep_within_quota(torch)
    device = pick_device(request.device)
    # TF32 would round the loss more coarsely than it rises
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "ieee"
    table = table_of(request)
    if not request.json:
        say(request.described())
        say(table.heading(columns(sys.stdout)))
    return max(attempt(path, request, device, table) for path in request.runs)


def attempt(path: Path, request: Request, device: torch.device, table: Table) -> int:
    """Measure one run and print what was found; an exit code."""
    try:
        entries = measure_run(path, request, device)
    except (
        ConfigError,
        models.ModelError,
        data.DataError,
        CheckpointError,
        RunFolderError,
    ) as error:
        return refuse(error)
    except torch.OutOfMemoryError:
        return refuse(f"{path}: out of memory at --batch {request.batch}: try --device cpu")
    except Exception as error:  # the other runs can be measured all the same
        code, words = failure(error)
        tell("error", f"{path}: {words}")
        return code
    for entry in entries:
        if request.json:
            show(json.dumps({"run": str(path)} | finite(entry)[0]), whole=True)
        else:
            say(table.row(cells(path, entry), columns(sys.stdout)))
    return DONE


def refuse(error: Exception | str) -> int:
    tell("error", error)
    return BAD_INPUT


def table_of(request: Request) -> Table:
    width = max(len(printable(str(path))) for path in request.runs)
    layout = {"run": f"<{width}", "update": ">9", "rho": ">8", "sharpness": ">24"}
    return Table(
        layout | {"error increase": ">14", "clean loss": ">10"},
        ("clean loss", "update", "error increase"),
    )


def cells(path: Path, entry: dict[str, Any]) -> list[str]:
    value = f"{entry['value']:.6g}" + (
        "" if entry["error"] is None else f" +- {entry['error']:.2g}"
    )
    numbers = [f"{entry['error_increase']:.2%}", f"{entry['clean_loss']:.4g}"]
    return [printable(str(path)), f"{entry['step']:,}", f"{entry['rho']:g}", value, *numbers]


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    there = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    device = torch.device(name)
    if (device.index or 0) >= there[device.type]:
        raise ConfigError(
            f"--device {name}: this machine has {there[device.type]} such devices: --device cpu"
        )
    return device


def measure_run(path: Path, request: Request, device: torch.device) -> list[dict[str, Any]]:
    """The entries of one run, one for each rho, after they are written to its sharpness.json and
    metrics.jsonl."""
    started = time.perf_counter()
    c = parsing.read_saved(path)
    earlier = earlier_results(path)
    with closing(RunFolder(path)) as folder:  # nobody goes on with the run meanwhile
        images = open_images(path, c, request, device)
        model, state = load(path, c, images, device)
        loader = images.test if request.test else images.train
        order = in_order(request.samples, request.batch, str(device))
        batches = loader.batches(order, request.setting.seed if request.augment else None)
        found = sharpness(model, batches, request.setting, request.rho)
        entries = [entry_of(result, request, state["update"]) for result in found]
        again = [key(entry) for entry in entries]
        kept = [entry for entry in earlier if key(entry) not in again]
        folder.write("sharpness.json", {"results": kept + entries})
        drop_torn_row(folder)
        seconds = round((time.perf_counter() - started) / len(entries), 3)
        for entry in entries:
            folder.row("measure", standing(state) | row_of(entry) | {"seconds": seconds})
        folder.sync()
    return entries


def earlier_results(path: Path) -> list[dict[str, Any]]:
    saved = path / "sharpness.json"
    if not saved.exists():
        return []
    results = (read_object(saved) or {}).get("results")
    if not isinstance(results, list) or not all(isinstance(entry, dict) for entry in results):
        raise ConfigError(f"{saved} is damaged: move it away, and the run is measured anew")
    return results


def open_images(path: Path, c: Config, request: Request, device: torch.device) -> data.Data:
    """The run's images, as it read them. Raises DataError or ConfigError."""
    if request.augment and c.augment == "none":
        raise ConfigError(f"--augment: {path} trained on images as they are: leave it out")
    if c.dataset in ("imagenet", "folder") and c.loader in ("auto", "resident"):
        c = dataclasses.replace(c, loader="threads")  # decodes what is measured alone
    if request.data_dir:
        c = dataclasses.replace(c, data_dir=request.data_dir)
    images = data.open_data(c, device, warn)
    there = len(images.test if request.test else images.train)
    if request.samples > there:
        kind = "test" if request.test else "training"
        raise ConfigError(
            f"--samples {request.samples} exceeds the {there} {kind} images of {path}: lower --samples"
        )
    return images


def load(
    path: Path, c: Config, images: data.Data, device: torch.device
) -> tuple[nn.Module, dict[str, Any]]:
    """The model at the newest valid checkpoint, and that checkpoint. Raises CheckpointError,
    DataError or ModelError."""
    state = Checkpoints(path / "checkpoints", warn).load()
    if state is None:
        raise CheckpointError(
            f"{path} has no checkpoint: train it to the end of an epoch, or with --checkpoint-every"
        )
    model = models.build(c.model, images.classes, c.norm)
    try:
        same_images = state["data"]["fingerprint"] == images.fingerprint
        model.load_state_dict(state["model"])
        standing(state)
    except Exception as error:  # a sound file of another program may fail anywhere
        raise CheckpointError(
            f"{path}: its checkpoint is not of {c.model} with {images.classes} classes: {one_line(error)[:200]}: "
            "start a new run"
        ) from None
    if not same_images:
        raise data.DataError(
            f"{path}: the images in {c.data_dir} are not those it was trained on: give --data-dir"
        )
    return model.to(device, memory_format=torch.channels_last), state


def standing(state: dict[str, Any]) -> dict[str, Any]:
    """The fields of every row, at a checkpoint. lr, batch size, momentum and delta are known at the
    end of an epoch."""
    at = {"epoch": state["epoch"], "step": state["update"], "samples": state["samples"]}
    at |= dict.fromkeys(("lr", "batch_size", "momentum", "delta"))
    last = state["last_epoch"]
    return {name: last[name] for name in at} if last and last["step"] == state["update"] else at


def entry_of(result: Sharpness, request: Request, update: int) -> dict[str, Any]:
    """A result as sharpness.json has it: first what tells it from others, then what was found."""
    entry = dataclasses.asdict(request.setting) | {"rho": result.rho, "split": request.split}
    entry |= {
        "samples": request.samples,
        "batch": request.batch,
        "augment": request.augment,
        "step": update,
    }
    return entry | dataclasses.asdict(result)


FOUND = {f.name for f in dataclasses.fields(Sharpness)} - {"rho"}


def key(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in FOUND}


def row_of(entry: dict[str, Any]) -> dict[str, Any]:
    """A result as metrics.jsonl has it, named so that it hides no field that every row has."""
    renamed = {"value": "sharpness", "error": "sharpness_se"}
    settings = {name: value for name, value in entry.items() if name not in ("step", "per_batch")}
    return {renamed.get(name, f"sharpness_{name}"): value for name, value in settings.items()}


def drop_torn_row(folder: RunFolder) -> None:
    """Remove the half row that a killed run left at the end of metrics.jsonl: the next would be
    glued to it."""
    rows = (folder.path / "metrics.jsonl").read_bytes()
    folder.rewind(rows.rfind(b"\n") + 1)


if __name__ == "__main__":
    end_with(main)
