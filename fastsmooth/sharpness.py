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
from argparse import SUPPRESS, BooleanOptionalAction
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsmooth.cli import flags as flag_types
from fastsmooth.cli.flags import ConfigError
from fastsmooth.messages import (
    BAD_INPUT,
    DONE,
    command,
    end_with,
    exit_code,
    failure,
    printable,
    say,
    show,
    tell,
)
from fastsmooth.noise.algorithms import ALGORITHMS, Setting
from fastsmooth.runfolder.files import finite
from fastsmooth.terminal import Table, columns


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
    trust_code: bool

    def described(self) -> str:
        s, images = self.setting, "test" if self.test else "training"
        each = "iterations" if ALGORITHMS[s.algorithm].at_worst else "draws"
        words = [
            ("adaptive " if s.adaptive else "") + s.algorithm,
            f"{s.n_iters} {each} a batch",
            f"the first {self.samples:,} {images} images in batches of {self.batch}",
        ]
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
    add("runs", nargs="*", metavar="RUN", type=flag_types.text, help="run folders that fastsmooth.train wrote")
    add("--algorithm", default=d.algorithm, choices=ALGORITHMS, metavar="NAME", help=f"{' '.join(ALGORITHMS)} ({d.algorithm})")
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
    add("--trust-code", action="store_true", help="run the Python file in a run folder that its network came from")
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
    rho = rho or [published_rho(setting.algorithm)]
    if len(set(rho)) < len(rho):
        raise ConfigError("--rho names a value more than once: give every value once")
    samples, batch = given["samples"], given["batch"]
    if samples % batch:
        raise ConfigError(
            f"--samples {samples} is no multiple of --batch {batch}, and a smaller batch is "
            f"another m-sharpness: give --samples {max(samples // batch, 1) * batch}"
        )
    return Request(runs=tuple(map(Path, runs)), setting=setting, rho=tuple(rho), **given)


def published_rho(algorithm: str) -> float:
    row = ALGORITHMS[algorithm]
    if row.published_rho is None:
        raise ConfigError(
            f"--algorithm {algorithm} needs --rho, since none is published for it; its authors "
            f"scan {row.scanned_rho}"
        )
    return row.published_rho


def check(s: Setting) -> None:
    """Refuse flags that would change nothing."""
    idle = {
        "--restarts": s.restarts > 1,
        "--random-start": s.random_start,
        "--step-size-mult": s.step_size_mult != 1,
    }
    named = next((name for name, given in idle.items() if given), None)
    if named and not ALGORITHMS[s.algorithm].at_worst:
        raise ConfigError(
            f"{named} has no effect with --algorithm {s.algorithm}: it needs m_apgd_l2 or "
            "m_apgd_linf"
        )
    if s.restarts > 1 and not s.random_start:
        raise ConfigError(
            f"--restarts {s.restarts} would climb the same way {s.restarts} times: add "
            "--random-start"
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
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # as in fastsmooth.train, which says why
    from fastsmooth import saved  # with torch, after the flags are right: it takes seconds

    device = saved.ready_device(request.device)
    images = saved.Images(
        request.samples, request.batch, request.test, request.augment, request.data_dir
    )
    table = table_of(request)
    if not request.json:
        say(request.described())
        say(table.heading(columns(sys.stdout)))

    def measure(path: Path) -> list[dict[str, Any]]:
        return saved.measure_sharpness(
            path, request.setting, request.rho, images, device, request.trust_code
        )

    return max(attempt(path, measure, request.json, table) for path in request.runs)


def attempt(
    path: Path, measure: Callable[[Path], list[dict[str, Any]]], as_json: bool, table: Table
) -> int:
    """Measure one run and print its entries of sharpness.json; an exit code."""
    try:
        entries = measure(path)
    except ConfigError as error:
        tell("error", error)
        return BAD_INPUT
    except Exception as error:  # the other runs can be measured all the same
        code, words = failure(error)
        tell("error", f"{path}: {words}")
        return code
    for entry in entries:
        if as_json:
            show(json.dumps({"run": str(path)} | finite(entry)[0]), whole=True)
        else:
            say(table.row(cells(path, entry), columns(sys.stdout)))
    return DONE


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


if __name__ == "__main__":
    end_with(main)
