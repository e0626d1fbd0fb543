"""Smaller copies of the images of a data set, made once, so that training decodes less: python -m
fastsmooth.prepare --data-dir IN --out OUT --short-side 256

What is killed, or interrupted, goes on with the same command and ends in the same bytes.
"""

from __future__ import annotations

import os
import sys
from argparse import SUPPRESS
from pathlib import Path
from typing import Any

from fastsmooth.cli import flags as flag_types
from fastsmooth.cli.config import FIELDS, Config, resolve
from fastsmooth.cli.facts import FILE_SETS, SMALLEST_IMAGE, is_among
from fastsmooth.cli.flags import ConfigError, flag
from fastsmooth.messages import (
    DONE,
    INTERRUPTED,
    command,
    end_with,
    exit_code,
    note,
    one_line,
    printable_path,
    show,
)
from fastsmooth.runfolder.write import RunFolderError

OF_TRAINING = ("data_dir", "dataset", "val_share", "labels", "workers")  # flags that mean the same
LARGEST_SIDE = 8192  # pixels; nobody trains at more
FORMATS = ("jpeg", "tar")


def parser() -> flag_types.Parser:
    p = flag_types.Parser(
        prog=command("prepare"),
        usage="%(prog)s --data-dir IN --out OUT --short-side N [flags]",
        description="Store smaller copies of the images of a data set, once, as JPEGs to train on.",
        argument_default=SUPPRESS,
        add_help=False,
    )
    # fmt: off
    add = p.add_argument_group("the images that are there").add_argument
    words = {"data_dir": "where they are", "dataset": "what they are (auto: as they are recognised)", "workers": "threads that make images (one a processor)"}
    for name in OF_TRAINING:
        meta = FIELDS[name].metadata
        add(flag(name), dest=name, metavar=meta["metavar"], choices=meta["choices"], type=meta["parse"], help=words.get(name, meta["help"]))
    add = p.add_argument_group("those that are made").add_argument
    add("--out", type=flag_types.text, metavar="DIR", help="a new folder for them, or one that this command began")
    add("--short-side", type=flag_types.whole(SMALLEST_IMAGE, LARGEST_SIDE), metavar="N", help="pixels of the shorter side, 256 or 320 to train at 224; smaller images keep their size")
    add("--format", choices=FORMATS, help="jpeg: class folders; tar: shards of WebDataset (jpeg)")
    add("--quality", type=flag_types.whole(1, 100), metavar="Q", help="of the JPEGs (92); those that are small enough already are copied as they are")
    add("-h", "--help", action="store_true", help="this page")
    # fmt: on
    return p


def main(argv: list[str] | None = None) -> int:
    """Make what a command line asks for; the exit code."""
    return exit_code(
        lambda: carry_out(sys.argv[1:] if argv is None else argv), (ConfigError, RunFolderError)
    )


def carry_out(argv: list[str]) -> int:
    given = vars(parser().parse_args([flag_types.plain(word) for word in argv]))
    if given.pop("help", False):
        show(*parser().format_help().splitlines())
        return DONE
    config, out = configured(given)
    try:
        from fastsmooth import data  # with PyTorch, after the flags are right: it takes seconds
        from fastsmooth.prepare import work
    except Exception as error:  # of a broken installation, which may raise anything
        raise ConfigError(
            f"no image can be read ({one_line(error)}): {command('train')} --doctor says what is "
            "missing"
        ) from None
    try:
        work.prepare(
            config, out, given["short_side"], given.get("quality", 92), given.get("format", "jpeg")
        )
    except data.DataError as error:
        raise ConfigError(str(error)) from None
    except KeyboardInterrupt:
        note(f"interrupted: the same command goes on with {printable_path(str(out))}")
        return INTERRUPTED
    return DONE


def configured(given: dict[str, Any]) -> tuple[Config, Path]:
    """What a run on the images would be given, and the folder to make. Raises ConfigError."""
    for name in ("data_dir", "out", "short_side"):
        if name not in given:
            raise ConfigError(f"{flag(name)} is missing: --help says how")
    name = given.get("dataset", "auto")
    if not is_among(name, FILE_SETS):
        raise ConfigError(
            f"--dataset {name} is stored as pixels, not as image files: there is nothing to "
            "prepare, train on it as it is"
        )
    source, out = Path(given["data_dir"]), Path(given["out"])
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(source)):
        raise ConfigError(
            f"--out {out} lies in --data-dir {source}, whose images would be among those that are "
            "read: choose a folder outside of it"
        )
    return resolve({name: given[name] for name in OF_TRAINING if name in given}), out


if __name__ == "__main__":
    end_with(main)
